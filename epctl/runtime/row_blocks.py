"""Where one Parameter holds several matrices in its rows: fused projections, attention heads."""

from __future__ import annotations

from typing import Any

from torch import nn

from epctl.runtime.deepspeed_seams import full_shape

# Projections that hold gate and up, and what the down projection beside them is called.
FUSED_GATES = {"gate_up_proj": "down_proj", "input_linear": "output_linear"}


def blocks_of(
    model: nn.Module, name: str, parameter: nn.Parameter, per_head: bool
) -> tuple[int, ...] | None:
    """Returns the rows of each matrix in a Muon parameter, or None if it is one matrix.

    Fused gate|up and q|k|v are always apart: an orthogonal factor of the stack is not a stack of
    orthogonal factors. Heads only with `per_head`; the output projection has its heads in columns
    and stays whole.
    """
    module_name, _, own_name = name.rpartition(".")
    leaf = own_name if own_name != "weight" else module_name.rpartition(".")[2]
    num_rows, num_columns = full_shape(parameter)[-2:]
    if leaf in FUSED_GATES and _rows_are_stacked(model, name, num_rows, FUSED_GATES[leaf]):
        return (num_rows // 2,) * 2
    attention = _submodule(model, module_name.rpartition(".")[0])
    if per_head and attention is not None:
        blocks = _head_blocks(leaf, num_rows, attention)
        if blocks is not None:
            return blocks
    if leaf in ("qkv", "in_proj_weight") and num_rows == 3 * num_columns:
        return (num_columns,) * 3
    return None


def _rows_are_stacked(model: nn.Module, name: str, num_rows: int, down_name: str) -> bool:
    """True if gate and up are row blocks: the down projection next to it has half as many inputs.

    Some families store the transpose, whose rows are the hidden size.
    """
    holder = _submodule(model, name.removesuffix(".weight").rpartition(".")[0])
    down: Any = getattr(holder, down_name, None)
    weight = getattr(down, "weight", down)
    return weight is not None and num_rows == 2 * full_shape(weight)[-1]


def _head_blocks(leaf: str, num_rows: int, attention: nn.Module) -> tuple[int, ...] | None:
    """Rows of each head; `kv_b_proj` of MLA interleaves each head's key and value rows."""
    widths = {
        "q_proj": _width(attention, "qk_head_dim", "head_dim"),
        "q_b_proj": _width(attention, "qk_head_dim"),
        "k_proj": _width(attention, "head_dim"),
        "v_proj": _width(attention, "head_dim"),
    }
    if leaf == "kv_b_proj":
        key, value = _width(attention, "qk_nope_head_dim"), _width(attention, "v_head_dim")
        if key and value and num_rows % (key + value) == 0:
            return (key, value) * (num_rows // (key + value))
    width = widths.get(leaf)
    return (width,) * (num_rows // width) if width and num_rows % width == 0 else None


def _width(attention: nn.Module, *names: str) -> int | None:
    found = (getattr(attention, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name) if name else model
    except AttributeError:
        return None
