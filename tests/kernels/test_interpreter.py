"""Runs test_triton.py in Triton's interpreter, where no GPU can run it.

A process of its own: the interpreter is chosen when Triton is first imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton.py runs on this GPU itself")
def test_triton_kernels_in_the_interpreter(run_in_interpreter: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    names = (
        "test_triton.py",
        "test_triton_variants.py",
        "test_sparsemixer.py",
        "test_triton_functions.py",
    )
    tests = [Path(__file__).with_name(name) for name in names]
    said = run_in_interpreter(*tests)
    passed = re.search(r"(\d+) passed", said)
    assert passed, said[-4000:]
    assert int(passed[1]) > 65
    assert "skipped" not in said
