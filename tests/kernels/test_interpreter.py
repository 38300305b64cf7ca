"""Runs test_triton.py in Triton's interpreter, where no GPU can run it.

A process of its own: the interpreter is chosen when Triton is first imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton.py runs on this GPU itself")
def test_triton_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    names = ("test_triton.py", "test_triton_variants.py")
    tests = [Path(__file__).with_name(name) for name in names]
    completed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", *map(str, tests)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=tests[0].parents[2],
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stdout[-4000:]
    passed = re.search(r"(\d+) passed", completed.stdout)
    assert passed, completed.stdout[-4000:]
    assert int(passed[1]) > 65
    assert "skipped" not in completed.stdout
