"""Shared by all tests: where GPU tests run, and a sink that collects output."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess

import pytest

from epctl.output import Mode, Output

# Workers of pytest-xdist share the cores; it also tells them a terminal's width that is none.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("COLUMNS", None)


def pytest_configure() -> None:
    """`&` and `nohup` make the tests, and all that they start, ignore signals they are about."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any("gpu" in item.keywords for item in items):
        return
    reason = _no_gpu_reason()
    for item in items:
        if "gpu" in item.keywords and reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu_reason() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "no CUDA device: nvidia-smi is absent"
    listing = subprocess.run([program, "-L"], capture_output=True, text=True)
    return None if "GPU 0" in listing.stdout else "no CUDA device: nvidia-smi lists none"


@pytest.fixture
def sink() -> tuple[Output, io.StringIO, io.StringIO]:
    stdout, stderr = io.StringIO(), io.StringIO()
    return Output(Mode.HUMAN, stdout, stderr), stdout, stderr
