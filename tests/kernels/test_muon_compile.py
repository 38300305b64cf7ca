"""Muon's kernels compile for Hopper without a GPU: tensor cores, wide stores, no spill.

The interpreter runs Python; what Triton's compiler refuses or does badly shows here.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")


def compile_for_hopper(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    aligned: tuple[str, ...] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> Any:
    """Compiles as a launch with these arguments would: pointers and `aligned` are multiples of 16.

    An argument of value 1 is a constant there too.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(names) == types.keys() | constants.keys()
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in aligned
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def stack_bytes(compiled: Any, folder: Path) -> int:
    """Bytes of a thread's registers that the assembler put into memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump")
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    shown = subprocess.run(
        [str(tool), "-res-usage", str(binary)], capture_output=True, text=True, check=True
    )
    found = re.search(r"STACK:(\d+)", shown.stdout)
    assert found, shown.stdout
    return int(found.group(1))


# What is added is square, and square operands lie by rows: transposed, added.
VARIANTS = {"X X^T": (False, False), "X^T X": (True, False), "square": (False, True)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_rows", [1408, 576])
def test_symmetric_products_compile(num_rows: int, variant: str, tmp_path: Path) -> None:
    import torch

    from epctl.kernels import symmetric

    transposed, added = VARIANTS[variant]
    tile = symmetric.choose_tile(num_rows, torch.float16)
    block = "{1},{0}" if transposed else "{0},{1}"
    strides = [f"{side}_stride_{dim}" for side in ("left", "right") for dim in "brk"]
    ones = [stride for stride in strides if stride[-1] == ("r" if transposed else "k")]
    types = {
        "left": f"tensordesc<fp16[{block.format(tile.block_m, tile.block_k)}]>",
        "right": f"tensordesc<fp16[{block.format(tile.block_n, tile.block_k)}]>",
        "added_ptr": "*fp16",
        "out": f"tensordesc<fp16[{tile.block_m},{tile.block_m}]>",
        **dict.fromkeys(("num_rows", "num_summed"), "i32"),
        **{stride: "i32" for stride in strides if stride not in ones},
        **dict.fromkeys(("alpha", "beta"), "fp32"),
    }
    constants = {
        "HAS_ADDED": added, "USE_TMA": True, "WINDOWS": True, "TRANSPOSED": transposed,
        "EVEN": num_rows % tile.block_n == 0, "EVEN_K": True, "PRECISION": "tf32",
        **dict.fromkeys(ones, 1),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
    }  # fmt: skip
    compiled = compile_for_hopper(
        symmetric._symmetric_kernel, types, constants,
        aligned=("num_rows", "num_summed", *strides),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    ptx = compiled.asm["ptx"]
    assert "wgmma" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert "wgmma.wait_group.sync.aligned 1;" in ptx, "no product is in flight beside the next"
    # Results leave by the copy engine, the mirror's as well.
    assert "cp.async.bulk.tensor.2d.global.shared" in ptx
    assert "st.global" not in ptx
    assert stack_bytes(compiled, tmp_path) == 0


PASSES = {
    "mix float32": (
        "_mix_kernel",
        {
            "gradient_ptr": "*bf16",
            "buffer_ptr": "*fp32",
            "direction_ptr": "*fp32",
            "divisor_ptr": "*fp32",
            "squares_ptr": "*fp64",
        },
    ),
    "mix bfloat16": (
        "_mix_kernel",
        {
            "gradient_ptr": "*fp32",
            "buffer_ptr": "*bf16",
            "direction_ptr": "*fp32",
            "divisor_ptr": "*fp32",
            "squares_ptr": "*fp64",
        },
    ),
    "squares": ("_squares_kernel", {"x_ptr": "*fp32", "squares_ptr": "*fp64"}),
    "normalize": (
        "_normalize_kernel",
        {"x_ptr": "*fp32", "inverse_ptr": "*fp64", "out_ptr": "*fp16"},
    ),
    "apply": (
        "_apply_kernel",
        {"weight_ptr": "*fp32", "update_ptr": "*fp16", "copy_ptr": "*bf16"},
    ),
}
SCALARS = {
    "num_elements": "i64", "size": "i32", "num_blocks": "i32",
    "momentum": "fp32", "kept": "fp32", "rate": "fp32",
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_passes_compile(name: str, tmp_path: Path) -> None:
    from epctl.kernels import muon_passes_triton as passes

    kernel_name, pointers = PASSES[name]
    kernel = getattr(passes, kernel_name)
    scalars = {key: kind for key, kind in SCALARS.items() if key in kernel.arg_names}
    constants = {
        "HAS_DIVISOR": True, "NESTEROV": True, "HAS_SQUARES": True, "HAS_COPY": True,
        "BLOCK": passes.BLOCK,
    }  # fmt: skip
    compiled = compile_for_hopper(
        kernel,
        {**pointers, **scalars},
        {key: value for key, value in constants.items() if key in kernel.arg_names},
        aligned=("num_elements", "size"),
        num_warps=passes.NUM_WARPS,
    )
    wide = re.findall(r"ld\.global\.v\d\.b\d+", compiled.asm["ptx"])
    assert wide, "elements are read one by one"
    assert stack_bytes(compiled, tmp_path) == 0


def test_adamw_compiles(tmp_path: Path) -> None:
    from epctl.kernels import adamw_triton

    tensors = ("weight", "gradient", "average", "square", "divisor")
    scalars = ("kept", "beta1", "beta2", "eps", "rate", "root_scale")
    compiled = compile_for_hopper(
        adamw_triton._step_kernel,
        {f"{name}_ptr": "*fp32" for name in tensors}
        | {"copy_ptr": "*bf16", "num_elements": "i64"}
        | dict.fromkeys(scalars, "fp32"),
        {"HAS_DIVISOR": True, "HAS_COPY": True, "BLOCK": adamw_triton.BLOCK},
        aligned=("num_elements",),
        num_warps=adamw_triton.NUM_WARPS,
    )
    assert len(re.findall(r"ld\.global\.v4\.b32", compiled.asm["ptx"])) >= 8
    assert stack_bytes(compiled, tmp_path) == 0
