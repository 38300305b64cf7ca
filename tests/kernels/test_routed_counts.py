"""No kernel is compiled in the middle of a run because a count came out as a multiple of 16."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton")

from epctl.kernels import grouped_gemm, permute
from epctl.kernels.tile_access import ROUTED_COUNTS

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


KERNELS: list[Any] = [
    value
    for module in (permute, grouped_gemm)
    for name, value in vars(module).items()
    if name.endswith("_kernel") and hasattr(value, "params")
]


def test_all_of_them_are_found() -> None:
    assert len(KERNELS) >= 9


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_integers_that_vary_choose_no_kernel(kernel: Any) -> None:
    """Every integer of these kernels is such a count; the rest are addresses and constants."""
    integers = [
        parameter
        for parameter in kernel.params
        if not parameter.is_constexpr and parameter.name.startswith(("num_", "max_"))
        if not parameter.name.endswith("_ptr")
    ]
    assert integers
    assert {parameter.name for parameter in integers} <= set(ROUTED_COUNTS)
    assert all(parameter.do_not_specialize for parameter in integers)
