"""Runs the Triton kernels' tests in Triton's interpreter, where no GPU can run them.

Processes of their own: the interpreter is chosen when Triton is first imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Of each file, how many tests the interpreter runs at least.
FILES = {
    "test_triton.py": 40,
    "test_triton_variants.py": 15,
    "test_sparsemixer.py": 5,
    "test_token_rows.py": 5,
    "test_triton_functions.py": 20,
    "test_cross_entropy.py": 12,
    "test_latent_heads.py": 20,
    "test_row_messages.py": 12,
    "test_gradient_share.py": 12,
    "test_gated_product.py": 12,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on this GPU themselves")
@pytest.mark.parametrize(("name", "least"), FILES.items())
def test_triton_kernels_in_the_interpreter(
    run_in_interpreter: Callable[..., str], name: str, least: int
) -> None:
    pytest.importorskip("triton")
    said = run_in_interpreter(Path(__file__).with_name(name))
    passed = re.search(r"(\d+) passed", said)
    assert passed, said[-4000:]
    assert int(passed[1]) >= least
    # Half precision of cross-entropy: the interpreter cuts bfloat16 off where a GPU rounds.
    assert said.count("skipped") == (name == "test_cross_entropy.py")
