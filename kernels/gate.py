"""Device functions of the epilogues: expert biases, activations of every form, their gradients.

Plain SwiGLU has branches of its own: what it compiles to is what was measured.
Shape suffixes: see reference.py.
"""

# Triton gives its kernels no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import math

import triton
import triton.language as tl

from epctl.kernels.activation import ACTIVATION_FUNCTIONS, GATE_FORMS, Activation
from epctl.kernels.tile_access import store_tile, tile_pointers

PRODUCT = tl.constexpr(GATE_FORMS.index("product"))
CLAMPED = tl.constexpr(GATE_FORMS.index("clamped"))
CLAMPED_AFTER = tl.constexpr(GATE_FORMS.index("clamped_after"))

SILU = tl.constexpr(ACTIVATION_FUNCTIONS.index("silu"))
GELU = tl.constexpr(ACTIVATION_FUNCTIONS.index("gelu"))
GELU_TANH = tl.constexpr(ACTIVATION_FUNCTIONS.index("gelu_tanh"))
RELU = tl.constexpr(ACTIVATION_FUNCTIONS.index("relu"))

SQRT_HALF = tl.constexpr(0.5**0.5)
NORMAL_DENSITY = tl.constexpr((2 * math.pi) ** -0.5)
# Of torch's tanh approximation, doubled: x * sigmoid(2u) is x / 2 * (1 + tanh(u)).
TANH_SCALE = tl.constexpr(2 * (2 / math.pi) ** 0.5)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def function_of(x, FUNCTION: tl.constexpr):
    """Returns an activation function of float32 values, and its derivative."""
    if FUNCTION == SILU:
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    elif FUNCTION == GELU:
        share = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        value = x * share
        slope = share + x * NORMAL_DENSITY * tl.exp(-0.5 * x * x)
    elif FUNCTION == GELU_TANH:
        square = x * x
        share = tl.sigmoid(x * TANH_SCALE * (square * TANH_CUBIC + 1.0))
        value = x * share
        steepness = (square * TANH_CUBIC * 3.0 + 1.0) * TANH_SCALE
        slope = share + value * (1.0 - share) * steepness
    else:
        # In this order, so that NaN stays.
        rectified = tl.where(x <= 0.0, 0.0, x)
        if FUNCTION == RELU:
            value = rectified
            slope = tl.where(x > 0.0, 1.0, 0.0)
        else:
            value = rectified * rectified
            slope = 2.0 * rectified
    return value, slope


@triton.jit
def gated(
    gate,
    up,
    FUNCTION: tl.constexpr,
    FORM: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
):
    """Returns the activation and its derivatives by gate and up; see `Activation`."""
    if FORM == PRODUCT:
        hidden, slope = function_of(gate, FUNCTION)
        by_gate, by_up = up * slope, hidden
        hidden = hidden * up
    else:
        hidden, by_gate, by_up = clamped_gate(gate, up, FUNCTION, FORM, LIMIT, ALPHA)
    return hidden, by_gate, by_up


@triton.jit
def clamped_gate(
    gate,
    up,
    FUNCTION: tl.constexpr,
    FORM: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
):
    """`gated` for the forms that clamp."""
    inside = (up >= -LIMIT) & (up <= LIMIT)
    up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    if FORM == CLAMPED_AFTER:
        value, slope = function_of(gate, FUNCTION)
        below = value <= LIMIT
        hidden = tl.minimum(value, LIMIT)
    else:
        below = gate <= LIMIT
        gate = tl.minimum(gate, LIMIT)
        if FORM == CLAMPED:
            hidden, slope = function_of(gate, FUNCTION)
        else:
            sigmoid = tl.sigmoid(ALPHA * gate)
            hidden = gate * sigmoid
            slope = sigmoid + ALPHA * hidden * (1.0 - sigmoid)
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
    FUNCTION: tl.constexpr,
    FORM: tl.constexpr,
    GATED: tl.constexpr,
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
            FUNCTION,
            FORM,
            GATED,
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
            FUNCTION,
            FORM,
            GATED,
            LIMIT,
            ALPHA,
            INTERMEDIATE,
            ROWS,
            HALF,
            SLICE,
            TMA_STORE,
        )
    else:
        H_WIDTH: tl.constexpr = 2 * INTERMEDIATE if GATED else INTERMEDIATE
        columns = column + tl.arange(0, WIDTH)
        inside = (row + lane < row_end)[:, None] & (columns[None, :] < INTERMEDIATE)
        h_at = tile_pointers(h_ptr, row, lane, columns, H_WIDTH)
        gate = tl.load(h_at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(h_at + INTERMEDIATE, mask=inside, other=0.0).to(tl.float32)
        SWIGLU: tl.constexpr = GATED and FORM == PRODUCT and FUNCTION == SILU
        if SWIGLU:
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            sums = tl.sum(da * silu * up, 1)
            hidden = silu * up
        else:
            if GATED:
                hidden, by_gate, by_up = gated(gate, up, FUNCTION, FORM, LIMIT, ALPHA)
            else:
                # The one pre-activation there is stands where gate's does.
                hidden, by_gate = function_of(gate, FUNCTION)
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
        if SWIGLU:  # noqa: SIM108
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
            H_WIDTH,
            INTERMEDIATE,
            ROWS,
            WIDTH,
            TMA_STORE,
        )
        if GATED:
            upper = column + INTERMEDIATE
            if SWIGLU:  # noqa: SIM108
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
                H_WIDTH,
                H_WIDTH,
                ROWS,
                WIDTH,
                TMA_STORE,
            )
    return sums


def gate_constants(activation: Activation, *, has_gate: bool) -> dict[str, int | float]:
    """Returns the compile-time constants that say what stands between the projections."""
    return {
        "FUNCTION": ACTIVATION_FUNCTIONS.index(activation.function),
        "FORM": GATE_FORMS.index(activation.form),
        "GATED": has_gate,
        "LIMIT": float("inf") if activation.limit is None else activation.limit,
        "ALPHA": activation.alpha,
    }
