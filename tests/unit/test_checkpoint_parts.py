"""The parts of a checkpoint that need no rank: intervals, names, manifests, retention, resume."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_by_hand import write_checkpoint

from epctl.config import resolve_config
from epctl.errors import ConfigError, GateError, InputError
from epctl.interval import Interval, parse_interval
from epctl.launch import checkpoints_command
from epctl.launch.resume_run import choose_resume, reopen_run_folder
from epctl.launch.run_folder import run_lock
from epctl.output import Mode, Output
from epctl.runtime import run_checkpoints
from epctl.runtime.checkpoint_files import Entry, TensorWriter
from epctl.runtime.checkpoint_manifest import find_damage, read_manifest, record_of
from epctl.runtime.checkpoint_reader import StateReader, slice_name
from epctl.runtime.guards import SpikeRule
from epctl.runtime.host_copy import HostCopy, bytes_on_host
from epctl.runtime.random_state import KEYS, random_state, seed_anew, set_random_state
from epctl.runtime.run_checkpoints import committed_checkpoints, latest_defect, purge, sweep

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for step in (2, 4, 6):
        write_checkpoint(folder, step)
    (folder / "config.json").write_text(resolve_config(flags={}).to_json())
    return folder


# --- intervals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500steps", Interval(steps=500)),
        ("1 step", Interval(steps=1)),
        ("500", Interval(steps=500)),
        ("30min", Interval(seconds=1800)),
        ("1.5h", Interval(seconds=5400)),
        ("90s", Interval(seconds=90)),
        ("off", None),
        ("0", None),
        ("0min", None),
    ],
)
def test_intervals(text: str, expected: Interval | None) -> None:
    assert parse_interval(text) == expected


@pytest.mark.parametrize("text", ["", "often", "1.5steps", "-3", "10 parsecs"])
def test_what_is_no_interval_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.every"):
        resolve_config(settings=[f"checkpoint.every='{text}'"], flags={})


def test_an_interval_is_due_by_steps_or_by_time() -> None:
    by_steps, by_time = Interval(steps=3), Interval(seconds=60)
    assert [by_steps.is_due(step, 1e9) for step in (1, 2, 3, 6)] == [False, False, True, True]
    assert [by_time.is_due(3, seconds) for seconds in (59.9, 60.0)] == [False, True]


def test_a_bare_number_of_the_settings_counts_steps() -> None:
    config = resolve_config(settings=["checkpoint.every=7"], flags={}).config
    assert parse_interval(config.checkpoint.every) == Interval(steps=7)


# --- files and copies -------------------------------------------------------------------------


def test_tensors_are_written_in_chunks_of_memory_and_digested_as_they_go(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(i + 1, 5) for i in range(6)} | {"none": torch.empty(0)}
    host = HostCopy(CPU, chunk_bytes=64)  # no tensor but the first fits one chunk
    pieces = {name: host.add(tensor) for name, tensor in tensors.items()}
    entries = [Entry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    writer = TensorWriter(tmp_path, "x", entries, shard_bytes=100)
    for name in tensors:
        writer.add(name, pieces[name])
    writer.close()
    assert len(writer.records) > 2
    for name, record in writer.records.items():
        assert record_of(tmp_path / name) == record
    from safetensors.torch import load_file

    loaded = {n: t for name in writer.records for n, t in load_file(tmp_path / name).items()}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_memory_is_used_again_by_the_next_save() -> None:
    host = HostCopy(CPU, chunk_bytes=64)
    host.add(torch.ones(40))
    first = host.num_bytes
    host.clear()
    (piece, *_) = host.add(torch.zeros(16))
    assert (first, host.num_bytes) == (160, 64)
    assert bytes(piece) == bytes(64)


def test_slices_are_found_by_name_whatever_cut_them(tmp_path: Path) -> None:
    whole = torch.arange(100, dtype=torch.float32)
    for number, (start, stop) in enumerate([(60, 100), (0, 25), (25, 60)]):
        entry = Entry(slice_name("w.7.weight", "exp_avg", start), torch.float32, (stop - start,))
        writer = TensorWriter(tmp_path, f"rank-{number}", [entry])
        writer.add(entry.name, [bytes_on_host(whole[start:stop])])
        writer.close()
    with StateReader(tmp_path) as reader:
        assert torch.equal(reader.read("w.7.weight", "exp_avg"), whole)
        part = torch.zeros(40, dtype=torch.bfloat16)
        reader.read_into("w.7.weight", "exp_avg", 20, part)
        assert torch.equal(part, whole[20:60].bfloat16())
        with pytest.raises(InputError, match=r"lacks `exp_avg` of `w.7.weight` from element 100"):
            reader.read_into("w.7.weight", "exp_avg", 90, torch.zeros(20))
        with pytest.raises(InputError, match=r"lacks `master` of `w.7.weight`"):
            reader.read_into("w.7.weight", "master", 0, torch.zeros(20))


def test_every_random_state_comes_back() -> None:
    seed_anew(3, 5, 1)
    saved = {key: value.clone() for key, value in random_state(CPU)}
    assert set(saved) <= set(KEYS)
    drawn = [float(torch.rand(1)), float(np.random.random()), random.random(), random.gauss(0, 1)]
    seed_anew(3, 5, 2)
    assert float(torch.rand(1)) != drawn[0]
    for key, value in saved.items():
        set_random_state(key, value, CPU)
    again = [float(torch.rand(1)), float(np.random.random()), random.random(), random.gauss(0, 1)]
    assert again == drawn


# --- what counts ------------------------------------------------------------------------------


def test_a_folder_counts_by_its_manifest_alone(run: Path) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "step-0000008.tmp").mkdir()
    (checkpoints / "step-0000010").mkdir()
    assert [folder.name[-1] for folder in committed_checkpoints(run)] == ["2", "4", "6"]
    state = checkpoints / "step-0000006" / "state" / "run.json"
    state.write_text('{"step": 60}')
    assert [folder.name[-1] for folder in committed_checkpoints(run)] == ["2", "4"]
    with pytest.raises(InputError, match="has 12 bytes, the manifest says 11"):
        read_manifest(checkpoints / "step-0000006")
    state.write_text('{"step": 9}')  # the right size: only reading the bytes can tell
    manifest = read_manifest(checkpoints / "step-0000006")
    reason = find_damage(checkpoints / "step-0000006", manifest, manifest.files)
    assert reason is not None
    assert "has SHA-256" in reason


@pytest.mark.parametrize("change", ["outside", "step", "digest"])
def test_a_manifest_that_lies_is_refused(run: Path, change: str) -> None:
    path = run / "checkpoints" / "step-0000006" / "manifest.json"
    document: dict[str, Any] = json.loads(path.read_text())
    if change == "outside":
        document["files"]["../x"] = document["files"]["state/run.json"]
    if change == "step":
        document["step"] = 8
    if change == "digest":
        document["files"]["state/run.json"]["sha256"] = "0" * 64
    path.write_text(json.dumps(document))
    assert [folder.name[-1] for folder in committed_checkpoints(run)] == ["2", "4"]


def test_latest_names_the_newest(run: Path) -> None:
    assert latest_defect(run) is None
    latest = run / "checkpoints" / "latest"
    latest.write_text("step-0000004\n")
    assert "names `step-0000004`; the newest is" in (latest_defect(run) or "")
    latest.unlink()
    assert "is missing" in (latest_defect(run) or "")


def test_retention_keeps_the_newest_and_survives_what_cannot_be_removed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(run_checkpoints.shutil, "rmtree", refuse)
        (problem,) = purge(run, keep=2)
    assert "step-0000002` was not removed: Device or resource busy" in problem
    assert [folder.name[-1] for folder in committed_checkpoints(run)] == ["4", "6"]
    assert purge(run, keep=2) == []
    with pytest.raises(AssertionError):
        purge(run, keep=1)
    with pytest.raises(ConfigError, match=r"checkpoint\.keep"):
        resolve_config(settings=["checkpoint.keep=1"], flags={})


def test_a_sweep_removes_leftovers_and_gives_a_replaced_checkpoint_its_name_back(run: Path) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "step-0000006").rename(checkpoints / "step-0000006.old")
    (checkpoints / "step-0000008.tmp" / "model").mkdir(parents=True)
    (checkpoints / "step-0000000.purge").mkdir()
    (checkpoints / "latest.tmp").touch()
    (run / "model.tmp").mkdir()
    sweep(run)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest",
        "step-0000002",
        "step-0000004",
        "step-0000006",
    ]
    assert not (run / "model.tmp").exists()


# --- `--resume` -------------------------------------------------------------------------------


def test_resume_modes(run: Path, tmp_path: Path, sink: Any) -> None:
    output = sink[0]
    new = tmp_path / "new"
    assert choose_resume(None, new, output) == (None, new)
    assert choose_resume(str(run), None, output) == (run, None)
    assert choose_resume("must", run, output) == (run, None)
    assert choose_resume("auto", run, output) == (run, None)
    assert choose_resume("never", run, output) == (None, run)
    assert choose_resume("auto", new, output) == (None, new)
    assert "has no checkpoint: begins at step 0" in sink[2].getvalue()
    with pytest.raises(ConfigError, match="`--resume auto` needs the run's folder"):
        choose_resume("auto", None, output)
    with pytest.raises(ConfigError, match="goes on in that folder"):
        choose_resume(str(run), new, output)


def test_auto_never_begins_again_over_checkpoints_that_do_not_count(run: Path, sink: Any) -> None:
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="none of them counts"):
        choose_resume("auto", run, sink[0])


def test_auto_puts_a_run_without_a_checkpoint_aside(run: Path, sink: Any) -> None:
    shutil.rmtree(run / "checkpoints")
    assert choose_resume("auto", run, sink[0]) == (None, run)
    assert not run.exists()
    (aside,) = run.parent.glob("run.before-*")
    assert (aside / "config.json").exists()
    assert "put aside" in sink[2].getvalue()


def test_one_run_has_one_job(run: Path) -> None:
    with run_lock(run) as note:
        assert note is None
        with pytest.raises(ConfigError, match=f"is being written by process {os.getpid()}"):
            run_lock(run).__enter__()


def test_a_run_on_a_read_only_disk_is_refused_before_ranks_start(run: Path, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(mount)]).returncode != 0:
        pytest.skip("mounting needs root")
    try:
        shutil.copytree(run, mount / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        with pytest.raises(ConfigError, match="Read-only file system"):
            reopen_run_folder(mount / "run")
        with pytest.raises(ConfigError, match="Read-only file system"):
            run_lock(mount / "run").__enter__()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


# --- guards -----------------------------------------------------------------------------------


def test_a_spike_is_measured_against_good_steps_and_not_remembered() -> None:
    rule = SpikeRule(factor=2.0, window=10)
    assert [rule.judge(loss) for loss in (9.0, 1.0, 1.1, 0.9, 1.0, 1.2, 1.0, 1.0)] == [None] * 8
    assert rule.judge(2.1) == pytest.approx(1.0)
    assert rule.judge(2.1) == pytest.approx(1.0)
    assert rule.judge(1.9) is None
    again = SpikeRule(2.0, 10, list(rule.losses))
    assert again.judge(2.1) == rule.judge(2.1)


# --- `epctl checkpoints` ----------------------------------------------------------------------


def show(action: Any, *arguments: Any, **named: Any) -> tuple[dict[str, Any], str]:
    """Returns the JSON document and the text of one command."""
    texts = []
    for mode in (Mode.JSON, Mode.HUMAN):
        stdout = io.StringIO()
        action(*arguments, Output(mode, stdout, io.StringIO()), **named)
        texts.append(stdout.getvalue())
    return json.loads(texts[0]), texts[1]


def test_list_shows_what_counts_and_why_something_does_not(run: Path) -> None:
    (run / "checkpoints" / "step-0000004" / "manifest.json").unlink()
    document, text = show(checkpoints_command.show_list, run)
    states = {c["step"]: c["committed"] for c in document["checkpoints"]}
    assert states == {2: True, 4: False, 6: True}
    assert document["checkpoints"][2]["topology"] == {"num_ranks": 2, "ep": 2, "zero": 3}
    assert "2 ranks, ep 2, ZeRO-3" in text
    assert "does not count" in text
    with pytest.raises(InputError, match="is no run folder"):
        show(checkpoints_command.show_list, run.parent / "other")


def test_verify_reads_every_byte(run: Path) -> None:
    document, text = show(checkpoints_command.verify, run, [])
    assert all(found["sound"] for found in document["checkpoints"])
    assert text.count(": sound, ") == 3
    (run / "checkpoints" / "step-0000004" / "state" / "run.json").write_text('{"step": 5}')
    stdout = io.StringIO()
    with pytest.raises(GateError, match="1 of 3 checkpoints are not sound: step 4"):
        checkpoints_command.verify(run, [], Output(Mode.JSON, stdout, io.StringIO()))
    assert [c["sound"] for c in json.loads(stdout.getvalue())["checkpoints"]] == [True, False, True]
    assert show(checkpoints_command.verify, run, [2, 6])[0]["checkpoints"][1]["step"] == 6
    with pytest.raises(InputError, match="there is no checkpoint of step 9"):
        show(checkpoints_command.verify, run, [9])


def test_prune_shows_first_and_keeps_two(run: Path) -> None:
    document, text = show(checkpoints_command.prune, run, 2, remove=False)
    assert (document["steps"], document["removed"]) == ([2], False)
    assert text.startswith("would remove: 2 (")
    assert len(committed_checkpoints(run)) == 3
    with run_lock(run), pytest.raises(ConfigError, match="is being written by"):
        show(checkpoints_command.prune, run, 2, remove=True)
    show(checkpoints_command.prune, run, 2, remove=True)
    assert [folder.name[-1] for folder in committed_checkpoints(run)] == ["4", "6"]


def test_diff_wants_two_steps(run: Path) -> None:
    with pytest.raises(ConfigError, match="diff compares two steps, 1 given"):
        show(checkpoints_command.diff, run, [2])
    document, _ = show(checkpoints_command.diff, run, [2, 4])
    assert (document["num_equal"], document["changed"]) == (0, [])
