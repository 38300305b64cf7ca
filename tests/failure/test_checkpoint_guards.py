"""Guards, signals, stalls and full disks, in real ranks: what stops, who is named, what stays."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_runs import (
    curve,
    events,
    failure,
    log_tail,
    prepare,
    run_all,
    scenario,
    steps_on_disk,
    weights,
)

from epctl.runtime.checkpoint_diff import compare

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1500)]

LONG = {"train__steps": 14, "checkpoint__every": 1, "checkpoint__keep": 20}
# Every second loss or so is above 1.0001 times the median: a spike, for this test.
TOUCHY = {"guards__spike_factor": 1.0001, "guards__spike_window": 8, **LONG}
STALL = {"guards__stall_minutes": 0.15}
EVAL = {"train__eval_every": 2}
TERMS = {"in_step": "data 1 term 4", "in_eval": "eval 0 term 2", "in_save": "before-write 1 term 1"}


@dataclass
class Runs:
    folder: Path
    codes: dict[str, list[int]]
    resumed: dict[str, list[int]]
    messages: dict[str, list[str]]
    left: dict[str, tuple[int, list[str]]]  # last step and checkpoints, before it went on

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("guards")

    def planned(name: str, fault: str = "", **more: object) -> dict[str, object]:
        extra = {key: more.pop(key) for key in ("poison",) if key in more}
        return scenario(name, prepare(folder / name, **more), fault=fault, **extra)

    first = [
        planned("unbroken"),
        planned("loss", "loss 1 nan 3"),
        planned("gradient", poison={"rank": 1, "step": 3}),
        planned("spike-skip", guards__spike="skip", **TOUCHY),
        planned("spike-stop", guards__spike="stop", **TOUCHY),
        planned("full", "before-write 1 full 2"),
        planned("full-stop", "before-write 1 full 2", checkpoint__on_full_disk="stop"),
        planned("stall", "data 1 stall 3", **STALL),
        *(planned(name, fault, **EVAL) for name, fault in TERMS.items()),
    ]
    codes = run_all(first)
    failed = [name for name, ended in codes.items() if 0 not in ended]
    messages = {name: [failure(folder / name, r)["message"] for r in (0, 1)] for name in failed}
    left = {n: (max(curve(folder / n)), steps_on_disk(folder / n)) for n in failed}
    resumed = run_all([scenario(name, folder / name) for name in (*TERMS, "stall", "loss")])
    return Runs(folder, codes, resumed, messages, left)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("loss", "step 3: the loss (nan) of rank 1 is not finite; no rank made the update"),
        ("gradient", "step 3: the gradient of `lm_head.weight` of rank 1 is not finite"),
    ],
)
def test_what_is_not_finite_on_one_rank_stops_all_before_the_update(
    runs: Runs, name: str, said: str
) -> None:
    assert runs.codes[name] == [7, 7], log_tail(runs[name])
    messages = runs.messages[name]
    assert messages[0] == messages[1]
    assert messages[0].startswith(said)
    assert runs.left[name] == (2, ["step-0000002"])


def test_a_run_stopped_by_a_guard_goes_on_from_its_checkpoint(runs: Runs) -> None:
    assert runs.resumed["loss"] == [0, 0]
    assert curve(runs["loss"]) == curve(runs["unbroken"])


def test_a_skipped_spike_leaves_weights_and_moments_as_they_were(runs: Runs) -> None:
    assert runs.codes["spike-skip"] == [0, 0], log_tail(runs["spike-skip"])
    steps = [event["step"] for event in events(runs["spike-skip"], "spike")]
    assert steps
    checkpoints = runs["spike-skip"] / "checkpoints"
    spike = steps[0]
    for step in range(spike - 1, spike + 1):
        before, after = (checkpoints / f"step-{s:07d}" for s in (step - 1, step))
        rows = [row for row in compare(before, after) if ".master" in row.name]
        moved = {row.kind for row in rows}
        assert ("changed" in moved) is (step != spike)


def test_a_spike_may_stop_the_run(runs: Runs) -> None:
    assert runs.codes["spike-stop"] == [7, 7]
    assert "times the median of the last 8" in runs.messages["spike-stop"][1]


def test_a_full_disk_keeps_what_was_there_and_the_run_goes_on(runs: Runs) -> None:
    assert runs.codes["full"] == [0, 0], log_tail(runs["full"])
    assert steps_on_disk(runs["full"]) == ["step-0000002", "step-0000006"]
    (failed,) = events(runs["full"], "checkpoint_failed")
    assert failed["step"] == 4
    assert "No space left on device" in failed["reason"]
    assert weights(runs["full"]) == weights(runs["unbroken"])


def test_or_stops_if_the_run_says_so(runs: Runs) -> None:
    assert runs.codes["full-stop"] == [6, 6]
    assert "No space left on device" in runs.messages["full-stop"][0]
    assert steps_on_disk(runs["full-stop"]) == ["step-0000002"]


def test_a_stalled_rank_is_named_with_its_phase_and_stacks(runs: Runs) -> None:
    assert set(runs.codes["stall"]) == {134}
    for message in runs.messages["stall"]:
        assert message.startswith("rank 1 stalled in step 3, phase `data`")
    stacks = (runs["stall"] / "logs" / "rank-1.log").read_text()
    assert "most recent call first" in stacks
    assert "faults.py" in stacks
    assert runs.resumed["stall"] == [0, 0]
    assert weights(runs["stall"]) == weights(runs["unbroken"])


@pytest.mark.parametrize("name", TERMS)
def test_sigterm_saves_one_checkpoint_and_a_resume_changes_nothing(runs: Runs, name: str) -> None:
    assert runs.codes[name] == [0, 0], log_tail(runs[name])
    (stopped,) = events(runs[name], "stopped")
    saved = [event["step"] for event in events(runs[name], "checkpoint")]
    resumed = events(runs[name], "resumed")[0]["step"]
    assert stopped["checkpoint"].endswith(f"step-{stopped['step']:07d}")
    assert resumed == stopped["step"]
    assert saved.count(stopped["step"]) == 1
    if name == "in_step":
        assert stopped["step"] == 4  # the step in which the signal came is finished
    if name == "in_eval":
        assert stopped["step"] == 2
    assert runs.resumed[name] == [0, 0]
    assert curve(runs[name]) == curve(runs["unbroken"])
    assert weights(runs[name]) == weights(runs["unbroken"])


def test_a_disk_that_really_fills_up(tmp_path: Path) -> None:
    """A tmpfs that holds two checkpoints of this run and not a third."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)])
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = prepare(disk / "run", run__save=False)
        codes = run_all([scenario("disk", run, no_preflight=True)])
        assert codes == {"disk": [0, 0]}, log_tail(run)
        assert steps_on_disk(run) == ["step-0000002", "step-0000004"]
        (failed,) = events(run, "checkpoint_failed")
        assert failed["step"] == 6
        assert "No space left on device" in failed["reason"]
        assert max(curve(run)) == 6
    finally:
        subprocess.run(["umount", str(disk)], check=True)
