"""The MoE block as two `torch.library` operators: forward, and its backward.

Plain eager calls skip the operators (eager.py).

What is kept for the backward is the tokens (2D bytes a token in bf16), the pre-activation H (4KI)
and a few integers a row. The backward overwrites H, so a second backward over the same graph
raises; `recompute=True` keeps no H and computes it again.
Shape suffixes: see reference.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from epctl.kernels import grouped_gemm as gemm
from epctl.kernels import weight_gradient
from epctl.kernels.activation import (
    NO_BIASES,
    SWIGLU,
    Activation,
    ActivationFunction,
    ExpertBiases,
    GateForm,
)
from epctl.kernels.bias_gradient import (
    add_bias_to_weight_gradient,
    down_bias_gradient,
    gate_up_bias_gradient,
)
from epctl.kernels.eager import sees_only_autograd
from epctl.kernels.permute import (
    RoutingTables,
    combine,
    max_tiles,
    routing_tables,
    spread,
)
from epctl.kernels.tiles import TileTable, choose_tiles, device_capability

HOPPER = (9, 0)

# Where H stands among the backward's arguments after the gradient.
H_OF_KEPT = 7

# Function, form, limit, alpha; whether H is kept; rows.
RULE_LENGTH = 6


def _tiles(num_rows: int, w3_EID: Tensor) -> TileTable:
    on_gpu = w3_EID.is_cuda
    capability = device_capability(w3_EID.device) if on_gpu else HOPPER
    return choose_tiles(w3_EID.dtype, capability, num_rows / w3_EID.shape[0])


def _activation(function: str, form: str, limit: float, alpha: float) -> Activation:
    bound = None if limit == float("inf") else limit
    return Activation(cast(ActivationFunction, function), cast(GateForm, form), bound, alpha)


def _of_experts(biases: list[Tensor]) -> ExpertBiases:
    """Returns biases as they are passed to the operators: all, or without gate's, or none."""
    return ExpertBiases(*[None] * (3 - len(biases)), *biases)


def _results(
    x_TD: Tensor,
    weights_TK: Tensor,
    w1_EID: Tensor | None,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    biases: list[Tensor],
) -> list[Tensor]:
    """Returns what the backward's results look like: these, empty tensors for what is not there.

    An operator that writes to an input has a fixed number of results.
    """
    given = (x_TD, weights_TK, w1_EID, w3_EID, w2_EDI, *_of_experts(biases))
    return [x_TD.new_empty(0) if tensor is None else tensor for tensor in given]


def _h_width(w1_EID: Tensor | None, w3_EID: Tensor) -> int:
    return w3_EID.shape[1] * (1 if w1_EID is None else 2)


def _inward(
    x_TD: Tensor,
    experts_TK: Tensor,
    w1_EID: Tensor | None,
    w3_EID: Tensor,
    biases: list[Tensor],
    activation: Activation,
    keep_h: bool,
    num_rows: int,
) -> tuple[list[Tensor], Tensor, RoutingTables]:
    """Returns the activations of all rows (none without any), what is kept of H, and the order."""
    tiles = _tiles(num_rows, w3_EID)
    tables = routing_tables(experts_TK, w3_EID.shape[0], tiles.block_rows, num_rows)
    if not num_rows:
        return [], x_TD.new_empty(0, _h_width(w1_EID, w3_EID)), tables
    h, a_NI = gemm.gate_up(
        x_TD,
        w1_EID,
        w3_EID,
        tables,
        experts_TK.shape[1],
        tiles.gate_up,
        biases=_of_experts(biases),
        activation=activation,
        write_h=keep_h,
    )
    return [a_NI], h, tables


def _outward(
    activations: list[Tensor],
    x_TD: Tensor,
    weights_TK: Tensor,
    w2_EDI: Tensor,
    biases: list[Tensor],
    tables: RoutingTables,
) -> Tensor:
    """Takes the one tensor of `activations` out of the list: it is gone before the results are."""
    if not activations:
        return x_TD.new_zeros(x_TD.shape)
    a_NI = activations.pop()
    tile = _tiles(len(a_NI), w2_EDI).down
    y_ND = gemm.down(a_NI, w2_EDI, tables, tile, biases=_of_experts(biases))
    del a_NI
    return combine(y_ND, tables.row_of_pair_N, weights_TK, weights_TK.shape[1])[0]


def _forward(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    w1_EID: Tensor | None,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    biases: list[Tensor],
    function: str,
    form: str,
    limit: float,
    alpha: float,
    keep_h: bool,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    activation = _activation(function, form, limit, alpha)
    of_rows = x_TD, experts_TK, w1_EID, w3_EID, biases, activation, keep_h, num_rows
    activations, h, tables = _inward(*of_rows)
    return _outward(activations, x_TD, weights_TK, w2_EDI, biases, tables), h, *tables


_moe_forward = torch.library.custom_op("epctl::moe_forward", mutates_args=())(_forward)


@_moe_forward.register_fake
def _(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    w1_EID: Tensor | None,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    biases: list[Tensor],
    function: str,
    form: str,
    limit: float,
    alpha: float,
    keep_h: bool,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_experts = w3_EID.shape[0]
    num_pairs = experts_TK.numel()
    num_tiles = max_tiles(num_rows, num_experts, _tiles(num_rows, w3_EID).block_rows)
    offsets = num_experts + 1
    integer_sizes = (num_pairs, num_pairs, num_rows, offsets, offsets, num_tiles, num_tiles, 1)
    h = x_TD.new_empty(num_rows if keep_h else 0, _h_width(w1_EID, w3_EID))
    integers = [x_TD.new_empty(size, dtype=torch.int32) for size in integer_sizes]
    return torch.empty_like(x_TD), h, *integers  # type: ignore[return-value]


def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    w1_EID: Tensor | None,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    biases: list[Tensor],
    experts_TK: Tensor | None,
    h: Tensor,
    tables: list[Tensor],
    function: str,
    form: str,
    limit: float,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sorted_order = RoutingTables(*tables)
    num_rows = len(sorted_order.pair_of_row_N)
    if not num_rows:
        results = _results(x_TD, weights_TK, w1_EID, w3_EID, w2_EDI, biases)
        return tuple(torch.zeros_like(result) for result in results)  # type: ignore[return-value]
    top_k, tiles = weights_TK.shape[1], _tiles(num_rows, w3_EID)
    if not len(h):
        h, _ = gemm.gate_up(
            x_TD,
            w1_EID,
            w3_EID,
            sorted_order,
            top_k,
            tiles.gate_up,
            biases=_of_experts(biases),
            write_a=False,
        )
    # Spread once for two products, and gone before the memory peaks.
    a_NI = h.new_empty(num_rows, w3_EID.shape[1])
    dy = spread(dy_TD, sorted_order, top_k, beside=(h, a_NI))
    partial_PN = gemm.down_backward(
        dy,
        w2_EDI,
        h,
        a_NI,
        weights_TK,
        sorted_order,
        tiles.down_backward,
        activation=_activation(function, form, limit, alpha),
    )
    # Each temporary dies before the next large gradient is made: the order is the peak memory.
    dw2_EDI = weight_gradient.down_weight_gradient(
        dy, a_NI, w2_EDI, sorted_order, tiles.down_weight_gradient
    )
    dbiases: list[Tensor] = []
    if biases:
        dbiases = gate_up_bias_gradient(h, biases[:-1], sorted_order)
        dbiases.append(down_bias_gradient(dy, biases[-1], weights_TK, sorted_order))
    del dy, a_NI
    dx_ND = gemm.input_gradient(h, w1_EID, w3_EID, sorted_order, tiles.input_gradient)
    dx_TD, dweights_TK = combine(dx_ND, sorted_order.row_of_pair_N, None, top_k, partial_PN)
    assert dweights_TK is not None
    if biases:
        assert experts_TK is not None
        dweights_TK = add_bias_to_weight_gradient(dweights_TK, dy_TD, biases[-1], experts_TK)
    del dx_ND
    x = spread(x_TD, sorted_order, top_k)
    dw1_EID, dw3_EID = weight_gradient.gate_up_weight_gradient(
        h, x, w3_EID, sorted_order, tiles.gate_up_weight_gradient
    )
    gate = None if w1_EID is None else dw1_EID
    results = _results(dx_TD, dweights_TK, gate, dw3_EID, dw2_EDI, dbiases)
    return tuple(results)  # type: ignore[return-value]


_moe_backward = torch.library.custom_op("epctl::moe_backward", mutates_args=("h",))(_backward)


@_moe_backward.register_fake
def _(
    dy_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    w1_EID: Tensor | None,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    biases: list[Tensor],
    experts_TK: Tensor | None,
    h: Tensor,
    tables: list[Tensor],
    function: str,
    form: str,
    limit: float,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    results = _results(x_TD, weights_TK, w1_EID, w3_EID, w2_EDI, biases)
    return tuple(torch.empty_like(result) for result in results)  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, experts_TK, weights_TK, w1_EID, w3_EID, w2_EDI, biases, *gate, _, _ = inputs
    _, h, *tables = output
    # Otherwise autograd would hand the backward zero-filled gradients for H and the integers.
    ctx.set_materialize_grads(False)
    ctx.gate = gate
    ctx.num_biases, ctx.has_gate = len(biases), w1_EID is not None
    of_biases = (*biases, experts_TK) if biases else ()
    ctx.save_for_backward(x_TD, weights_TK, w1_EID, w3_EID, w2_EDI, h, *of_biases, *tables)


def _kept(ctx: Any) -> tuple[Any, ...]:
    """Returns what `_keep` kept, as the backward's arguments after `dy_TD`."""
    x_TD, weights_TK, w1_EID, w3_EID, w2_EDI, h, *rest = ctx.saved_tensors
    biases, experts_TK = rest[: ctx.num_biases], None
    tables = rest[ctx.num_biases :]
    if biases:
        experts_TK, *tables = tables
    sizes = x_TD, weights_TK, w1_EID, w3_EID, w2_EDI
    return *sizes, biases, experts_TK, h, tables, *ctx.gate


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, inputs, output)


def _gradients(ctx: Any, results: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Returns the gradients of the operator's six tensors, and of its biases."""
    dx_TD, dweights_TK, dw1_EID, dw3_EID, dw2_EDI, *dbiases = results
    gate = dw1_EID if ctx.has_gate else None
    return (dx_TD, None, dweights_TK, gate, dw3_EID, dw2_EDI), dbiases[3 - ctx.num_biases :]


def _operator_backward(ctx: Any, dy_TD: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if dy_TD is None:
        return *(None,) * 6, [None] * ctx.num_biases, *(None,) * RULE_LENGTH
    tensors, biases = _gradients(ctx, _moe_backward(dy_TD.contiguous(), *_kept(ctx)))
    return *tensors, biases, *(None,) * RULE_LENGTH


_moe_forward.register_autograd(_operator_backward, setup_context=_save)


class _Passage:
    """Between the two nodes of a plain call: its second half goes there, a gradient comes back."""

    outward: functools.partial[Tensor] | None = None
    dy_TD: Tensor | None = None


class _Inward(torch.autograd.Function):
    """The first half of the same two functions without the operators around them.

    It keeps all that backward needs, and the second half nothing: a recomputation ends as soon as
    all is there again, so it makes neither the down projection nor anything after it. Biases come
    last, one by one.
    """

    @staticmethod
    def forward(ctx: Any, passage: _Passage, *inputs: Any) -> Tensor:
        tensors, rest = inputs[:6], inputs[6:]
        biases = list(rest[RULE_LENGTH:])
        x_TD, experts_TK, weights_TK, w1_EID, w3_EID, w2_EDI = tensors
        function, form, limit, alpha, keep_h, num_rows = rest[:RULE_LENGTH]
        activation = _activation(function, form, limit, alpha)
        of_rows = x_TD, experts_TK, w1_EID, w3_EID, biases, activation, keep_h, num_rows
        activations, h, tables = _inward(*of_rows)
        passage.outward = functools.partial(
            _outward, activations, x_TD, weights_TK, w2_EDI, biases, tables
        )
        _keep(ctx, (*tensors, biases, *rest[:RULE_LENGTH]), (x_TD, h, *tables))
        ctx.passage = passage
        link: Tensor = x_TD.new_empty(0)
        return link

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Any, ...]:
        dy_TD, ctx.passage.dy_TD = ctx.passage.dy_TD, None
        if dy_TD is None:
            return tuple([None] * (7 + RULE_LENGTH + ctx.num_biases))
        kept, alone = _kept(ctx), sees_only_autograd(dy_TD)
        run: Callable[..., tuple[Tensor, ...]] = _backward if alone else _moe_backward
        tensors, biases = _gradients(ctx, run(dy_TD.contiguous(), *kept))
        # H was overwritten: another backward over this graph must find that out.
        increment_version(kept[H_OF_KEPT])
        return None, *tensors, *(None,) * RULE_LENGTH, *biases


class _Outward(torch.autograd.Function):
    """The second half, from the activations of rows to tokens; `link` has no elements."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, passage: _Passage) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.passage = passage
        outward, passage.outward = passage.outward, None  # its activations go with it
        assert outward is not None
        return outward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor | None) -> tuple[Tensor | None, None]:
        ctx.passage.dy_TD = dy_TD
        return None if dy_TD is None else dy_TD.new_empty(0), None


def _run(
    tensors: tuple[Tensor | None, ...], biases: list[Tensor], rule: tuple[Any, ...], trains: bool
) -> Tensor:
    if not sees_only_autograd(*tensors, *biases):
        y_TD: Tensor = _moe_forward(*tensors, biases, *rule)[0]
    elif trains:
        passage = _Passage()
        link = _Inward.apply(passage, *tensors, *rule, *biases)  # type: ignore[no-untyped-call]
        y_TD = cast(Tensor, _Outward.apply(link, passage))  # type: ignore[no-untyped-call]
    else:
        run: Callable[..., tuple[Tensor, ...]] = _forward
        y_TD = run(*tensors, biases, *rule)[0]
    return y_TD


def moe_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    w1_EID: Tensor | None,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    biases: ExpertBiases = NO_BIASES,
    activation: Activation = SWIGLU,
    *,
    recompute: bool = False,
    num_held: int | None = None,
) -> Tensor:
    """Returns the weighted sum of each token's experts, [T, D]; see `epctl.kernels.moe_mlp`.

    Without `w1_EID` experts have no gate. Biases are of all projections that there are, or none.

    Raises:
        ValueError: tokens and expert weights differ in dtype, or the dtype has no kernel.
    """
    if x_TD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"the kernels take bfloat16, float16 or float32, not {x_TD.dtype}")
    of_experts = [bias for bias in biases if bias is not None]
    matrices = [w for w in (w1_EID, w3_EID, w2_EDI) if w is not None]
    differing = {w.dtype for w in (*matrices, *of_experts)} - {x_TD.dtype}
    if differing:
        raise ValueError(f"x_TD is {x_TD.dtype}, but expert weights are {differing.pop()}")
    if len(of_experts) not in (0, len(matrices)):
        number = "three" if len(matrices) == 3 else "two"
        raise ValueError(
            f"{len(of_experts)} of the {number} projections have biases; all or none can"
        )
    inputs = (x_TD, weights_TK, *matrices, *of_experts)
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    tensors = (
        x_TD.contiguous(),
        experts_TK.contiguous(),
        weights_TK.contiguous().float(),
        None if w1_EID is None else w1_EID.contiguous(),
        w3_EID.contiguous(),
        w2_EDI.contiguous(),
    )
    limit = float("inf") if activation.limit is None else activation.limit
    num_rows = experts_TK.numel() if num_held is None else num_held
    gate = activation.function, activation.form, limit, activation.alpha
    rule = *gate, trains and not recompute, num_rows
    return _run(tensors, [bias.contiguous() for bias in of_experts], rule, trains)
