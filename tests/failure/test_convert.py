"""`epctl convert` killed, starved of disk, raced and lied to: old output or a resumable state."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CONVERT_TESTS = Path(__file__).parents[1] / "convert"
sys.path.insert(0, str(CONVERT_TESTS))

from stored_models import read_tree, write_model  # noqa: E402

# Runs the real command line with a kill (or a pause) in place of one of the journal's states.
CHILD = """
import os, signal, sys, time
from epctl.convert import writer
state, action, count, *arguments = sys.argv[1:]
left = [int(count)]
def reached(name):
    if name != state: return
    left[0] -= 1
    if left[0] == 0:
        if action == "kill": os.kill(os.getpid(), signal.SIGKILL)
        print("reached", flush=True)
        while True: time.sleep(0.05)
writer.reached = reached
writer.WRITEBACK_BYTES = 512
writer.NUM_WORKERS = 1
from epctl.cli import app
app(arguments)
"""
STATES = [
    ("journal opened", 1),
    ("before write", 1),
    ("before write", 3),
    ("mid-tensor", 1),
    ("mid-tensor", 9),
    ("before rename", 2),
    ("before journal", 2),
    ("before manifest", 1),
    ("before publish", 1),
    ("after publish", 1),
]


def command(source, output, *options):
    return ["convert", "shard", str(source), "--ep", "4", "-o", str(output), *options]


def child(state, action, count, arguments):
    return [sys.executable, "-c", CHILD, state, action, str(count), *arguments]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "epctl", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def killed_at(state, count, arguments):
    result = subprocess.run(
        child(state, "kill", count, arguments), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == -signal.SIGKILL, (state, result.stderr)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "model", "per_expert", num_experts=8)


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("expected") / "s"
    assert run(*command(model, output)).returncode == 0
    return read_tree(output)


@pytest.mark.parametrize(("state", "count"), STATES)
def test_killed_at_a_journal_state_resumes_to_the_same_bytes(
    state, count, model, expected, tmp_path
):
    output = tmp_path / "s"
    killed_at(state, count, command(model, output))
    assert output.exists() == (state == "after publish")
    result = run(*command(model, output))
    assert result.returncode == 0, result.stderr
    assert "took over the lock of process" in result.stderr
    assert read_tree(output) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_resumed_run_does_not_write_finished_files_again(model, tmp_path):
    output = tmp_path / "s"
    killed_at("before write", 4, command(model, output))
    finished = sorted((tmp_path / "s.partial/output").rglob("*.safetensors"))
    assert len(finished) == 3
    before = [path.stat().st_ino for path in finished]
    assert run(*command(model, output)).returncode == 0
    names = [path.relative_to(tmp_path / "s.partial/output") for path in finished]
    assert [(output / name).stat().st_ino for name in names] == before


@pytest.mark.parametrize("state", ["mid-tensor", "before manifest", "between renames"])
def test_replacing_an_output_keeps_the_old_one_until_the_new_is_whole(
    state, model, expected, tmp_path
):
    output = tmp_path / "s"
    assert run(*command(model, output, "--storage", "fused")).returncode == 0
    old = read_tree(output)
    killed_at(state, 1, command(model, output, "--overwrite"))
    kept = tmp_path / "s.partial/previous" if state == "between renames" else output
    assert read_tree(kept) == old
    result = run(*command(model, output, "--overwrite"))
    assert result.returncode == 0, result.stderr
    assert read_tree(output) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_merge_and_reshard_resume_too(model, tmp_path):
    shards = tmp_path / "s"
    assert run(*command(model, shards)).returncode == 0
    for name, arguments in (
        ("merged", ["convert", "merge", str(shards), "-o"]),
        ("resharded", ["convert", "reshard", str(shards), "--ep", "2", "-o"]),
    ):
        assert run(*arguments, str(tmp_path / "whole")).returncode == 0
        killed_at("before rename", 2, [*arguments, str(tmp_path / name)])
        assert run(*arguments, str(tmp_path / name)).returncode == 0
        assert read_tree(tmp_path / name) == read_tree(tmp_path / "whole")
        shutil.rmtree(tmp_path / "whole")


def test_other_options_than_the_interrupted_run_are_refused_with_the_difference(model, tmp_path):
    output = tmp_path / "s"
    killed_at("before write", 2, command(model, output))
    result = run(*command(model, output, "--dtype", "bf16", "--replicate"))
    assert result.returncode == 3
    assert "dtype was 'keep', now 'bf16'; replicate was False, now True" in result.stderr
    assert f"remove `{output}.partial` to start over" in result.stderr
    assert run(*command(model, output)).returncode == 0


def test_a_source_that_changed_in_between_is_refused(tmp_path):
    source = write_model(tmp_path / "model", "per_expert", num_experts=8)
    killed_at("before write", 2, command(source, tmp_path / "s"))
    shutil.rmtree(source)
    write_model(source, "per_expert", num_experts=8, seed=1)
    result = run(*command(source, tmp_path / "s"))
    assert result.returncode == 4
    assert "has changed since the interrupted conversion" in result.stderr
    assert not (tmp_path / "s").exists()


def test_a_source_that_changes_while_it_is_read_is_not_published(tmp_path):
    source = write_model(tmp_path / "model", "per_expert", num_experts=8)
    process = subprocess.Popen(
        [
            sys.executable, "-c",
            CHILD.replace("while True: time.sleep(0.05)", "sys.stdin.readline()"),
            "before rename", "pause", "5", *command(source, tmp_path / "s"),
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "reached\n"
    os.utime(next(source.glob("*.safetensors")))
    _, errors = process.communicate("go\n", timeout=60)
    assert process.returncode == 4
    assert "was changed while it was read; nothing was published" in errors
    assert not (tmp_path / "s").exists()


def test_a_second_converter_stops_at_the_lock(model, expected, tmp_path):
    output = tmp_path / "s"
    first = subprocess.Popen(
        child("before write", "pause", 2, command(model, output)), stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "reached\n"
        second = run(*command(model, output))
        assert second.returncode == 3
        assert re.search(
            rf"is being written by process {first.pid} on {re.escape(os.uname().nodename)}",
            second.stderr,
        )
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    assert run(*command(model, output)).returncode == 0
    assert read_tree(output) == expected


def test_a_lock_of_another_host_is_respected(model, tmp_path):
    (tmp_path / "s.lock").write_text(f"{os.getpid()}\nsome-other-host\n")
    result = run(*command(model, tmp_path / "s"))
    assert result.returncode == 3
    assert "some-other-host" in result.stderr
    assert f"remove `{tmp_path}/s.lock`" in result.stderr


def test_a_flipped_byte_is_found_and_named(model, tmp_path):
    output = tmp_path / "s"
    assert run(*command(model, output)).returncode == 0
    assert run("convert", "verify", str(output)).returncode == 0
    path = output / "rank-00002/model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + size]))
    header.pop("__metadata__")
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    for arguments in ([str(output)], [str(model), str(output)]):
        result = run("convert", "verify", *arguments)
        assert result.returncode == 7
        assert f"`{last}`" in result.stderr
        assert result.stderr.count("  `model.") == 1


def mounted(folder, megabytes):
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a tmpfs needs root and `mount`")
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)],
        capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {result.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    mounted(folder, 2)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / "model"
    return write_model(folder, "per_expert", num_experts=8, hidden=256, width=200)


def test_a_disk_too_small_is_seen_before_anything_is_written(large_model, small_disk):
    result = run(*command(large_model, small_disk / "s"))
    assert result.returncode == 6
    assert re.search(r"needs [\d.]+ MiB, `.*` has [\d.]+ MiB free", result.stderr)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing_half_made(large_model, small_disk):
    old = small_disk / "s"
    old.mkdir()
    (old / "manifest.json").write_text('{"format": "epctl-convert", "format_version": 1, '
                                       '"kind": "shard", "source": {}, "options": {}, '
                                       '"tensors": {}, "files": {}}')  # fmt: skip
    before = read_tree(old)
    program = CHILD.replace(
        "from epctl.cli import app",
        "from epctl.convert import command\n"
        "command.check_disk_space = lambda *a: (1, 1)\n"
        "from epctl.cli import app",
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "none", "kill", "1",
         *command(large_model, old, "--overwrite")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 6, result.stderr
    assert "filled up (No space left on device); the conversion needs" in result.stderr
    assert read_tree(old) == before
    assert [path.name for path in small_disk.iterdir()] == ["s"]


def test_files_are_readable_as_the_umask_says(model, tmp_path):
    program = "import os, sys; os.umask(0o027); from epctl.cli import app; app(sys.argv[1:])"
    output = tmp_path / "with space and ü"
    subprocess.run([sys.executable, "-c", program, *command(model, output)], check=True)
    modes = {path.stat().st_mode & 0o777 for path in output.rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_ctrl_c_leaves_a_state_that_resumes(model, expected, tmp_path):
    program = CHILD.replace("while True: time.sleep(0.05)", "time.sleep(1.5)")
    process = subprocess.Popen(
        [sys.executable, "-c", program, "before write", "pause", "3",
         *command(model, tmp_path / "s")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "reached\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "s.lock").exists()
    assert run(*command(model, tmp_path / "s")).returncode == 0
    assert read_tree(tmp_path / "s") == expected


@pytest.mark.parametrize("arguments", [["--ep", "2"], ["--ep", "2", "--overwrite"]])
def test_a_folder_that_epctl_did_not_write_is_never_replaced(arguments, model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    result = run("convert", "shard", str(model), "-o", str(tmp_path / "mine"), *arguments)
    assert result.returncode == 3
    assert (tmp_path / "mine/thesis.txt").read_text() == "x"


def test_an_output_inside_the_source_is_refused(model):
    result = run(*command(model, model / "shards"))
    assert result.returncode == 4
    assert "lie inside each other" in result.stderr
