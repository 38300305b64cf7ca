"""Kernels with biases and clamps compile for Hopper, on machines without a GPU.

The interpreter runs Python; what Triton's compiler refuses shows here.
"""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton")

BF16, INT, FLOAT = "*bf16", "*i32", "*fp32"
TABLES = {
    "offsets_ptr": INT,
    "tile_expert_ptr": INT,
    "tile_row_ptr": INT,
    "num_tiles_ptr": INT,
    "max_tiles": "i32",
}
CONSTANTS: dict[str, Any] = {
    "HIDDEN": 256, "INTERMEDIATE": 192, "USE_TMA": False, "TMA_STORE": False, "PRECISION": "ieee",
    "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 8,
}  # fmt: skip
GATE = {"FUNCTION": 0, "FORM": 0, "GATED": True, "LIMIT": 7.0, "ALPHA": 1.702}
GATE_UP = dict.fromkeys(("x_ptr", "w1", "w3", "b1_ptr", "b3_ptr", "h", "h_ptr", "a", "a_ptr"), BF16)
DOWN = dict.fromkeys(("a", "w2", "b2_ptr", "y", "y_ptr"), BF16)
BACKWARD = dict.fromkeys(("dy", "w2", "h", "h_ptr", "a", "a_ptr"), BF16)
CASES = {
    "gate up": (
        "_gate_up_kernel",
        {**GATE_UP, "pair_of_row_ptr": INT, **TABLES},
        {**CONSTANTS, **GATE, "TOP_K": 4, "WRITE_H": True, "WRITE_A": True},
    ),
    "down": ("_down_kernel", {**DOWN, **TABLES}, CONSTANTS),
    "backward": (
        "_down_backward_kernel",
        {
            **BACKWARD, "weights_ptr": FLOAT, "partial_ptr": FLOAT, "pair_of_row_ptr": INT,
            "padded_offsets_ptr": INT, **TABLES, "num_rows": "i32",
        },
        {**CONSTANTS, **GATE, "SLICE": 32},
    ),
}  # fmt: skip


def compile_for_hopper(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(names) == types.keys() | constants.keys()
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    ptx: str = compiled.asm["ptx"]
    return ptx


@pytest.mark.parametrize("form", range(4))
@pytest.mark.parametrize("case", CASES)
def test_grouped_products_compile(case: str, form: int) -> None:
    from epctl.kernels import grouped_gemm

    name, types, constants = CASES[case]
    if "FORM" in constants:
        constants = {**constants, "FORM": form}
    elif form:
        pytest.skip("no gate in this kernel")
    assert "wgmma" in compile_for_hopper(getattr(grouped_gemm, name), types, constants)


@pytest.mark.parametrize(("function", "gated"), [(1, True), (2, False), (3, True), (4, False)])
@pytest.mark.parametrize("case", ["gate up", "backward"])
def test_activation_functions_compile(case: str, function: int, gated: bool) -> None:
    from epctl.kernels import grouped_gemm

    name, types, constants = CASES[case]
    constants = {**constants, "FUNCTION": function, "GATED": gated}
    if case == "gate up" and not gated:
        types = {key: kind for key, kind in types.items() if key not in ("w1", "b1_ptr")}
        constants |= {"w1": None, "b1_ptr": None}
    assert "wgmma" in compile_for_hopper(getattr(grouped_gemm, name), types, constants)


def test_input_gradient_without_a_gate_compiles() -> None:
    from epctl.kernels import grouped_gemm

    types = {**dict.fromkeys(("dh", "w3", "dx", "dx_ptr"), BF16), **TABLES}
    constants = {**CONSTANTS, "GATED": False, "w1": None}
    assert "wgmma" in compile_for_hopper(grouped_gemm._input_gradient_kernel, types, constants)


def test_bias_gradient_compiles() -> None:
    from epctl.kernels import bias_gradient

    types = {
        "rows_ptr": BF16, "row_weights_ptr": FLOAT, "pair_of_row_ptr": INT, "offsets_ptr": INT,
        "first_rows_ptr": INT, "out_ptr": BF16, "width": "i32", "row_stride": "i32",
    }  # fmt: skip
    constants = {"BLOCK_M": 32, "BLOCK_N": 64}
    assert ".entry" in compile_for_hopper(bias_gradient._row_sum_kernel, types, constants)


@pytest.mark.parametrize("sampled", [False, True])
def test_sparsemixer_compiles(sampled: bool) -> None:
    from epctl.kernels import sparsemixer

    noise = ("exponential1_ptr", "uniform1_ptr", "exponential2_ptr", "uniform2_ptr")
    types = {
        "logits_ptr": FLOAT, "weights_ptr": FLOAT, "experts_ptr": "*i64", "num_tokens": "i32",
        "threshold": FLOAT[1:], **(dict.fromkeys(noise, FLOAT) if sampled else {}),
    }  # fmt: skip
    sizes = {"NUM_EXPERTS": 16, "TOKENS": 32, "SIZE": 16}
    constants = {**sizes, "SAMPLED": sampled, **({} if sampled else dict.fromkeys(noise))}
    assert ".entry" in compile_for_hopper(sparsemixer._sparsemixer_kernel, types, constants)


def test_sparsemixer_gradient_compiles() -> None:
    from epctl.kernels import sparsemixer

    types = {
        "dweights_ptr": FLOAT, "logits_ptr": BF16, "experts_ptr": "*i64", "dlogits_ptr": BF16,
        "num_tokens": "i32", "threshold": FLOAT[1:],
    }  # fmt: skip
    constants = {"NUM_EXPERTS": 16, "TOKENS": 32, "SIZE": 16}
    assert ".entry" in compile_for_hopper(
        sparsemixer._sparsemixer_backward_kernel, types, constants
    )
