"""Device functions of the epilogues: expert biases, SwiGLU and its clamped forms, their gradients.

Plain SwiGLU has branches of its own: what it compiles to is what was measured.
Shape suffixes: see reference.py.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from epctl.kernels.activation import GATE_FORMS, Activation
from epctl.kernels.tile_access import store_tile, tile_pointers

PRODUCT = tl.constexpr(GATE_FORMS.index("product"))
CLAMPED = tl.constexpr(GATE_FORMS.index("clamped"))
CLAMPED_AFTER = tl.constexpr(GATE_FORMS.index("clamped_after"))


@triton.jit
def clamped_gate(gate, up, FORM: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """Returns the activation and its derivatives by gate and up; see `Activation`."""
    inside = (up >= -LIMIT) & (up <= LIMIT)
    up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    if FORM == CLAMPED_AFTER:
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        below = silu <= LIMIT
        hidden = tl.minimum(silu, LIMIT)
        slope = sigmoid + silu * (1.0 - sigmoid)
    else:
        below = gate <= LIMIT
        gate = tl.minimum(gate, LIMIT)
        STEEPNESS: tl.constexpr = 1.0 if FORM == CLAMPED else ALPHA
        sigmoid = tl.sigmoid(STEEPNESS * gate)
        hidden = gate * sigmoid
        slope = sigmoid + STEEPNESS * hidden * (1.0 - sigmoid)
        if FORM != CLAMPED:
            up = up + 1.0
    return hidden * up, tl.where(below, up * slope, 0.0), tl.where(inside, hidden, 0.0)


@triton.jit
def add_bias(values, bias_ptr, expert, column, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    columns = column + tl.arange(0, BLOCK_N)
    bias = tl.load(
        bias_ptr + expert.to(tl.int64) * WIDTH + columns, mask=columns < WIDTH, other=0.0
    )
    return values + bias.to(tl.float32)[None, :]


@triton.jit
def gate_backward(
    da,
    weight,
    h,
    h_ptr,
    a,
    a_ptr,
    row,
    lane,
    row_end,
    column,
    FORM: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
    TMA_STORE: tl.constexpr,
):
    """Writes weighted A, and dH over H, for WIDTH columns; returns the row sums of dA * A.

    `da` is what the loss would feel of A if the router's weight were 1.
    """
    # In slices, since the tile's H, A and gradients do not fit in registers at once.
    if WIDTH > SLICE:
        HALF: tl.constexpr = WIDTH // 2
        left, right = da.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        sums = gate_backward(
            left,
            weight,
            h,
            h_ptr,
            a,
            a_ptr,
            row,
            lane,
            row_end,
            column,
            FORM,
            LIMIT,
            ALPHA,
            INTERMEDIATE,
            ROWS,
            HALF,
            SLICE,
            TMA_STORE,
        )
        column += HALF
        sums += gate_backward(
            right,
            weight,
            h,
            h_ptr,
            a,
            a_ptr,
            row,
            lane,
            row_end,
            column,
            FORM,
            LIMIT,
            ALPHA,
            INTERMEDIATE,
            ROWS,
            HALF,
            SLICE,
            TMA_STORE,
        )
    else:
        columns = column + tl.arange(0, WIDTH)
        inside = (row + lane < row_end)[:, None] & (columns[None, :] < INTERMEDIATE)
        h_at = tile_pointers(h_ptr, row, lane, columns, 2 * INTERMEDIATE)
        gate = tl.load(h_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h_at + INTERMEDIATE, mask=inside, other=0.0).to(tl.float32)
        if FORM == PRODUCT:
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            sums = tl.sum(da * silu * up, 1)
            hidden = silu * up
        else:
            hidden, by_gate, by_up = clamped_gate(gate, up, FORM, LIMIT, ALPHA)
            sums = tl.sum(da * hidden, 1)
        store_tile(
            a,
            a_ptr,
            row,
            lane,
            column,
            hidden * weight[:, None],
            row_end,
            INTERMEDIATE,
            INTERMEDIATE,
            ROWS,
            WIDTH,
            TMA_STORE,
        )
        da = da * weight[:, None]
        # Branches, since by_gate and by_up do not exist in the other one.
        if FORM == PRODUCT:  # noqa: SIM108
            dgate = da * up * (sigmoid + silu * (1.0 - sigmoid))
        else:
            dgate = da * by_gate
        # H gives way to its own gradient. Whoever writes an element may not be who read it above.
        tl.debug_barrier()
        store_tile(
            h,
            h_ptr,
            row,
            lane,
            column,
            dgate,
            row_end,
            2 * INTERMEDIATE,
            INTERMEDIATE,
            ROWS,
            WIDTH,
            TMA_STORE,
        )
        upper = column + INTERMEDIATE
        if FORM == PRODUCT:  # noqa: SIM108
            dup = da * silu
        else:
            dup = da * by_up
        store_tile(
            h,
            h_ptr,
            row,
            lane,
            upper,
            dup,
            row_end,
            2 * INTERMEDIATE,
            2 * INTERMEDIATE,
            ROWS,
            WIDTH,
            TMA_STORE,
        )
    return sums


def gate_constants(activation: Activation) -> dict[str, int | float]:
    limit = float("inf") if activation.limit is None else activation.limit
    return {"FORM": GATE_FORMS.index(activation.form), "LIMIT": limit, "ALPHA": activation.alpha}
