"""Which rank a failed job blames, from the records it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from epctl.errors import ConfigError
from epctl.launch.failure import explain_failure
from epctl.runtime.worker import lost_its_peer, record_failure


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def write_codes(run_folder: Path, codes: dict[int, int]) -> None:
    (run_folder / "logs" / "failed-ranks.json").write_text(json.dumps(codes))


def test_the_cause_wins_over_ranks_that_only_lost_their_peer(run_folder: Path) -> None:
    record_failure(run_folder, 0, RuntimeError("gloo: Connection closed by peer [127.0.0.1]"))
    record_failure(run_folder, 2, ZeroDivisionError("division by zero"))
    write_codes(run_folder, {0: 1, 2: 1})
    error = explain_failure(run_folder)
    assert error.message == "rank 2 failed first: ZeroDivisionError: division by zero"
    assert error.exit_code == 1
    assert error.hint is not None
    assert "rank-2.log" in error.hint


def test_a_known_error_of_a_rank_keeps_its_message_hint_and_code(run_folder: Path) -> None:
    record_failure(run_folder, 1, ConfigError("EP 3 does not fit", hint="use `--ep 4`"))
    error = explain_failure(run_folder)
    assert (error.message, error.hint, error.exit_code) == ("EP 3 does not fit", "use `--ep 4`", 3)


@pytest.mark.parametrize(
    ("code", "expected", "exit_code"),
    [
        (-9, "SIGKILL (killed, usually the host ran out of memory)", 137),
        (-7, "SIGBUS (bus error, usually /dev/shm is full)", 135),
        (-6, "SIGABRT (aborted, usually a failed assertion in native code)", 134),
        (-11, "SIGSEGV (segmentation fault in native code)", 139),
        (-4, "SIGILL (killed by a signal)", 132),
        (-50, "signal 50 (killed by a signal)", 178),
    ],
)
def test_a_rank_killed_by_a_signal_is_translated(
    run_folder: Path, code: int, expected: str, exit_code: int
) -> None:
    record_failure(run_folder, 0, RuntimeError("Connection reset by peer"))
    write_codes(run_folder, {0: 1, 3: code})
    error = explain_failure(run_folder)
    assert error.message == f"rank 3 failed first: {expected}"
    assert error.exit_code == exit_code


def test_hints_quote_a_path_with_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    (folder / "logs").mkdir(parents=True)
    write_codes(folder, {1: 41})
    assert explain_failure(folder).hint == f"see its log: `tail '{folder}/logs/rank-1.log'`"
    record_failure(folder, 0, ZeroDivisionError("x"))
    assert f"`tail '{folder}/logs/rank-0.log'`" in str(explain_failure(folder).hint)


def test_a_trainers_own_exit_code_passes_through(run_folder: Path) -> None:
    write_codes(run_folder, {1: 41})
    error = explain_failure(run_folder)
    assert (error.message, error.exit_code) == ("rank 1 failed first with exit code 41", 41)


def test_a_launcher_that_fails_before_any_rank_shows_its_log(run_folder: Path) -> None:
    (run_folder / "logs" / "launcher.log").write_text("Traceback\nImportError: no torch\n")
    error: Any = explain_failure(run_folder)
    assert error.exit_code == 1
    assert error.message.endswith("ImportError: no torch")


@pytest.mark.parametrize("kind", ["OutOfMemoryError", "MemoryError"])
def test_memory_that_ran_out_is_a_resource_error_with_what_to_change(
    run_folder: Path, kind: str
) -> None:
    error_class = MemoryError if kind == "MemoryError" else type(kind, (RuntimeError,), {})
    record_failure(run_folder, 3, error_class("CUDA out of memory. Tried 2.00 GiB\nmore"))
    error = explain_failure(run_folder)
    assert error.exit_code == 6
    assert error.message == "rank 3 ran out of memory: CUDA out of memory. Tried 2.00 GiB"
    assert error.hint is not None
    assert "train.micro_batch_size" in error.hint


def test_only_collectives_can_lose_a_peer() -> None:
    """A broken pipe of the data reader is a cause; the same words from gloo are a symptom."""
    nccl = type("DistBackendError", (RuntimeError,), {})
    assert lost_its_peer(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"))
    assert lost_its_peer(nccl("NCCL error: remote process exited or there was a network error"))
    assert not lost_its_peer(nccl("NCCL error: invalid argument"))
    assert not lost_its_peer(BrokenPipeError("Broken pipe"))
    assert not lost_its_peer(ValueError("parquet read error in row group 3"))
