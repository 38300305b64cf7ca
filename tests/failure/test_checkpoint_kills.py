"""A save that dies at every phase, by the death of one rank and of all; damaged checkpoints.

After each: what must exist exists, training goes on from the right step, and loss, norm and the
trained weights are, bit for bit, those of the run that nothing happened to.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

from epctl.layout.source import read_shard_header

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1500)]

PHASES = {
    "before-write": 2,
    "mid-file": 2,
    "before-agreement": 2,
    "before-manifest": 2,
    "before-rename": 2,
    "before-latest": 4,
}
"""Phase of the second save, and the step that a run resumes from when all ranks die there."""
# The death of one rank at every phase is `slow`; in CI that of all is, and these.
ONE_IN_CI = ("mid-file", "before-manifest")
CASES = [
    pytest.param(phase, victim, marks=[pytest.mark.slow] if is_slow else [])
    for phase in PHASES
    for victim, is_slow in (("all", False), ("1", phase not in ONE_IN_CI))
]


@dataclass
class Runs:
    """Every scenario's folder, exit codes when it was hurt and when it went on."""

    folder: Path
    hurt: dict[str, list[int]] = field(default_factory=dict)
    resumed: dict[str, list[int]] = field(default_factory=dict)
    before: dict[str, list[str]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def fault_count(self, phase: str) -> int:
        """The second save passes a phase the second time; `mid file` once a tensor."""
        if phase != "mid-file":
            return 2
        step = self["unbroken"] / "checkpoints" / "step-0000002"
        files = [read_shard_header(path) for path in step.glob("*/*rank*1-00001.safetensors")]
        tensors = sum(len(header.tensors) for header in files)
        return tensors + tensors // 2


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty_latest(run: Path) -> None:
    (run / "checkpoints" / "latest").write_bytes(b"")


def latest_names_nothing(run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("step-0009999\n")


def flip_in_newest(run: Path) -> None:
    flip_byte(next((run / "checkpoints" / "step-0000004").glob("state/rank-00001*")))


def flip_in_all(run: Path) -> None:
    for folder in (run / "checkpoints").glob("step-*"):
        flip_byte(next(folder.glob("model/*.safetensors")))


def cut_newest_manifest(run: Path) -> None:
    path = run / "checkpoints" / "step-0000004" / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])


def shrink_a_file_of_newest(run: Path) -> None:
    path = next((run / "checkpoints" / "step-0000004").glob("model/*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    f.__name__: f
    for f in (
        empty_latest,
        latest_names_nothing,
        flip_in_newest,
        flip_in_all,
        cut_newest_manifest,
        shrink_a_file_of_newest,
    )
}


def collected_cases(request: pytest.FixtureRequest) -> list[tuple[str, str]]:
    """Returns the kills that this session asks for."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    found = [spec.params for spec in specs if spec is not None and "victim" in spec.params]
    return [(params["phase"], params["victim"]) for params in found]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("kills"))
    first = [scenario("unbroken", prepare(runs["unbroken"]))]
    # After its second checkpoint: a kill between steps.
    stopped = prepare(runs["stopped"], checkpoint__asynchronous=False)
    first.append(scenario("stopped", stopped, fault="data all kill 5"))
    assert run_all(first) == {"unbroken": [0, 0], "stopped": [-9, -9]}
    hurt, again = [], []
    for phase, victim in collected_cases(request):
        name = f"{phase}-{victim}"
        fault = f"{phase} {victim} kill {runs.fault_count(phase)}"
        hurt.append(scenario(name, prepare(runs[name]), fault=fault))
    raising = "before-write 1 raise 2"
    hurt.append(scenario("raising", prepare(runs["raising"]), fault=raising))
    runs.hurt = run_all(hurt)
    runs.before = {name: steps_on_disk(runs[name]) for name in runs.hurt}
    again = [scenario(name, runs[name]) for name in runs.hurt]
    for name, damage in DAMAGES.items():
        shutil.copytree(stopped, runs[name])
        damage(runs[name])
        again.append(scenario(name, runs[name]))
    runs.resumed = run_all(again)
    return runs


def assert_went_on_as_if_nothing_had_happened(runs: Runs, name: str) -> None:
    assert runs.resumed[name] == [0, 0], log_tail(runs[name])
    assert curve(runs[name]) == curve(runs["unbroken"])
    assert weights(runs[name]) == weights(runs["unbroken"])
    checkpoints = runs[name] / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step-0000006\n"
    left = {path.name for path in checkpoints.iterdir() if "damaged" not in path.name}
    assert left == {"latest", "step-0000002", "step-0000004", "step-0000006"}


@pytest.mark.parametrize(("phase", "victim"), CASES)
def test_a_kill_at_each_phase_of_a_save(runs: Runs, phase: str, victim: str) -> None:
    name = f"{phase}-{victim}"
    codes = runs.hurt[name]
    assert codes[1] == -9
    assert codes[0] == -9 if victim == "all" else codes[0] != 0
    committed = [step for step in runs.before[name] if not step.endswith(".tmp")]
    resumed_from = events(runs[name], "resumed")[0]["step"]
    if victim == "all":
        assert resumed_from == PHASES[phase]
    assert committed == ["step-0000002", "step-0000004"][: resumed_from // 2]
    assert_went_on_as_if_nothing_had_happened(runs, name)


def test_the_kills_really_left_half_a_checkpoint(runs: Runs) -> None:
    assert "step-0000004.tmp" in runs.before["mid-file-all"]
    assert "step-0000004.tmp" in runs.before["before-rename-all"]


def test_a_rank_that_raises_while_saving_stops_all_and_names_itself(runs: Runs) -> None:
    assert 0 not in runs.hurt["raising"]
    assert "planted at `before write`" in failure_texts(runs, "raising")
    assert runs.before["raising"] == ["step-0000002"]  # the half-written folder is removed
    assert_went_on_as_if_nothing_had_happened(runs, "raising")


def failure_texts(runs: Runs, name: str) -> str:
    return log_tail(runs[name]) + json.dumps(events(runs[name], "checkpoint_failed"))


@pytest.mark.parametrize(
    ("name", "said"),
    [("empty_latest", "latest` is empty"), ("latest_names_nothing", "names `step-0009999`")],
)
def test_a_latest_that_is_wrong_is_said_and_not_believed(runs: Runs, name: str, said: str) -> None:
    assert events(runs[name], "resumed")[0]["step"] == 4
    assert said in events(runs[name], "warning")[0]["text"]
    assert_went_on_as_if_nothing_had_happened(runs, name)


def test_one_flipped_byte_falls_back_saying_which_and_why(runs: Runs) -> None:
    name = "flip_in_newest"
    resumed = events(runs[name], "resumed")[0]
    assert resumed["step"] == 2
    (rejected,) = resumed["rejected"]
    assert rejected["folder"].endswith("step-0000004")
    assert "rank-00001" in rejected["reason"]
    assert "SHA-256" in rejected["reason"]
    assert Path(rejected["moved_to"]).is_dir()
    assert_went_on_as_if_nothing_had_happened(runs, name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cut_newest_manifest", "manifest.json"),
        ("shrink_a_file_of_newest", "bytes, the manifest says"),
    ],
)
def test_a_folder_that_its_manifest_does_not_describe_does_not_exist(
    runs: Runs, name: str, said: str
) -> None:
    assert events(runs[name], "resumed")[0]["step"] == 2
    assert said in events(runs[name], "warning")[0]["text"]
    assert_went_on_as_if_nothing_had_happened(runs, name)


def test_when_every_checkpoint_is_damaged_nothing_begins_again(runs: Runs) -> None:
    name = "flip_in_all"
    assert runs.resumed[name] == [4, 4]
    message: Any = failure(runs[name], 0)["message"]
    assert "has no sound checkpoint to go on from" in message
    assert "step-0000002" in message
    assert "step-0000004" in message
    assert steps_on_disk(runs[name]) == ["step-0000002", "step-0000004"]
    assert max(curve(runs[name])) == 4  # of the run before; not one step was taken
