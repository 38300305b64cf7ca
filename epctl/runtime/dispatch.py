"""Token exchange over the expert-parallel axis: each token goes once to each rank it needs.

Shape suffixes: T tokens here, K top_k, D hidden size, P ranks of the ep group,
S rows this rank sends, R rows it receives (one a token and destination rank), C columns of a
message.

A row carries its token, the local ids of the experts it is for (-1 where a choice lives on another
rank, or was dropped) and their router weights. The expert side forms the weighted sum of a row, so
the way back also moves one row a rank. Backward is the mirror of forward. The exchange of counts
also says how many choices are coming: the experts take memory for those, not for K a row.

The device idles from the counts until the first exchange has been started, so rows are made before
the host knows how many there are, and leave before what is said of them. A recomputed layer knows
its counts (replay.py) and does not wait at all, and is made again while the gradients of its
results travel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from epctl.errors import ResourceError
from epctl.kernels import TokenRows, add_rows, take_rows
from epctl.kernels.row_messages import count_choices, write_messages
from epctl.runtime import replay

# What rows may take before it is known how many there are.
AHEAD_BYTES = 2**28


@dataclass(frozen=True)
class RowSplits:
    """How many rows this rank sends to and receives from each rank of `group`."""

    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup

    def reversed(self) -> RowSplits:
        return RowSplits(self.received, self.sent, self.group)


class Dispatched(NamedTuple):
    """Rows for this rank's experts, and what `combine` needs to send the results back.

    Attributes:
        prepare_backward: called in backward once gradients of the results are on their way.
    """

    x_RD: Tensor
    experts_RK: Tensor
    weights_RK: Tensor
    num_held: int
    tables: TokenRows
    splits: RowSplits
    prepare_backward: Callable[[], None]


def _start(rows: Tensor, splits: RowSplits) -> tuple[Tensor, dist.Work]:
    """Returns where rows will arrive, and what to wait for; c10d keeps `rows` until then."""
    received = rows.new_empty(sum(splits.received), *rows.shape[1:])
    work = dist.all_to_all_single(
        received, rows.contiguous(), splits.received, splits.sent, group=splits.group, async_op=True
    )
    assert work is not None
    return received, work


class _Travel:
    """An exchange under way: one half of it starts it, the other waits and takes what came."""

    def __init__(
        self, splits: RowSplits, is_kept: bool, in_backward: Callable[[], None] | None = None
    ) -> None:
        self.splits = splits
        self.is_kept = is_kept
        self.in_backward = in_backward
        self.under_way: tuple[Tensor, dist.Work] | None = None

    def start(self, rows: Tensor, splits: RowSplits) -> None:
        self.under_way = _start(rows, splits)

    def arrive(self) -> Tensor:
        assert self.under_way is not None
        received, work = self.under_way
        self.under_way = None
        work.wait()
        return received


class _StartExchange(torch.autograd.Function):
    """Backward runs after that of everything computed meanwhile: autograd goes newest first."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, travel: _Travel) -> Tensor:
        ctx.travel = travel
        travel.start(rows, travel.splits)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if ctx.travel.in_backward is not None:
            ctx.travel.in_backward()
        return ctx.travel.arrive(), None


class _FinishExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, travel: _Travel) -> Tensor:
        ctx.travel, ctx.sent_shape = travel, rows.shape
        received = travel.arrive()
        if travel.is_kept:
            ctx.save_for_backward(received)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.travel.start(gradients[0], ctx.travel.splits.reversed())
        # Its values are read by nobody: the gradient is what arrives.
        return gradients[0].new_empty(1).expand(ctx.sent_shape), None


def start_exchange(
    rows: Tensor,
    splits: RowSplits,
    *,
    is_kept: bool = False,
    in_backward: Callable[[], None] | None = None,
) -> Callable[[], Tensor]:
    """Sends rows on their way; what it returns waits for those that come, differentiable.

    Backward goes the other way round: what was computed meanwhile goes back while gradients do.

    Args:
        is_kept: keep what arrives for backward, so that a recomputation ends after this exchange
            on every rank, and never before it on one: it ends with the last tensor that is kept,
            and a rank that no row reaches may keep none behind it.
        in_backward: called while gradients travel, before they are waited for.
    """
    travel = _Travel(splits, is_kept, in_backward)
    started = _StartExchange.apply(rows, travel)  # type: ignore[no-untyped-call]

    def finish() -> Tensor:
        return cast(Tensor, _FinishExchange.apply(started, travel))  # type: ignore[no-untyped-call]

    return finish


class _StartChoices(torch.autograd.Function):
    """Ids and weights of a row's choices travel in one message, as 2K integers of 4 bytes."""

    @staticmethod
    def forward(
        ctx: Any, weights_TK: Tensor, message_SC: Tensor, tables: TokenRows, travel: _Travel
    ) -> Tensor:
        ctx.tables, ctx.travel = tables, travel
        travel.start(message_SC, travel.splits)
        # Its values are read by nobody: what is waited for is the message.
        return weights_TK.new_empty(1).expand(len(message_SC), weights_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return add_rows(ctx.travel.arrive(), ctx.tables), None, None, None


class _FinishChoices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, started_SK: Tensor, travel: _Travel) -> tuple[Tensor, Tensor]:
        ctx.travel, ctx.sent_shape = travel, started_SK.shape
        experts_RK, bits_RK = travel.arrive().chunk(2, dim=1)
        experts_RK = experts_RK.contiguous()
        ctx.mark_non_differentiable(experts_RK)
        return experts_RK, bits_RK.contiguous().view(torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.travel.start(gradients[1], ctx.travel.splits.reversed())
        return gradients[1].new_empty(1).expand(ctx.sent_shape), None


def start_choices(
    weights_TK: Tensor, message_SC: Tensor, tables: TokenRows, splits: RowSplits
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Sends what is said of rows; what it returns waits for what is said of those that come.

    That are int32 ids and float32 weights; differentiable in weights, the way back as in
    `start_exchange`.

    Args:
        weights_TK: whose bits are in the messages.
        message_SC: as `write_messages` makes them.
    """
    travel = _Travel(splits, is_kept=False)
    started: Tensor = _StartChoices.apply(weights_TK, message_SC, tables, travel)  # type: ignore[no-untyped-call]

    def finish() -> tuple[Tensor, Tensor]:
        choices = _FinishChoices.apply(started, travel)  # type: ignore[no-untyped-call]
        return cast(tuple[Tensor, Tensor], choices)

    return finish


class _Recall(torch.autograd.Function):
    """Passes `x` on; what it saves brings a recomputation about when it is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recalled: list[Any]) -> Tensor:
        ctx.save_for_backward(x.new_empty(0))
        recalled.append(ctx)  # the way back holds it, and it nothing of the way back
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def recallable(x: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Returns `x`, and what makes the checkpointed layer around it again, in backward.

    Elsewhere than in a layer to recompute the call does nothing, nor where `x` wants no gradient:
    autograd then keeps nothing, and torch 2.11 refuses to be asked.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x, lambda: None
    recalled: list[Any] = []
    x = cast(Tensor, _Recall.apply(x, recalled))  # type: ignore[no-untyped-call]

    def recall() -> None:
        while recalled:
            _ = recalled.pop().saved_tensors

    return x, recall


Counts = tuple[RowSplits, int]


def exchange_counts(
    sent_P2: Tensor, experts_TK: Tensor, group: dist.ProcessGroup
) -> Callable[[], Counts]:
    """Tells every rank how many rows come from whom: one exchange, one host synchronisation.

    A recomputation does neither: its forward knew.

    Args:
        sent_P2: how many rows and how many choices go to each rank.
        experts_TK: what was counted; a recomputation must have chosen the same.

    Returns what waits for the rows, and for how many choices are coming to this rank's experts.
    """
    if replay.is_known():
        counts, chosen_TK = replay.recall()
        same = (chosen_TK == experts_TK).all()
        torch._assert_async(same, "a recomputed router chose other experts than its forward")
        return lambda: cast(Counts, counts)
    received_P2 = torch.empty_like(sent_P2)
    dist.all_to_all_single(received_P2, sent_P2, group=group)
    counts = _on_host(torch.stack((sent_P2, received_P2)).transpose(1, 2))

    def finish() -> Counts:
        (sent, _), (received, held) = counts()
        found = RowSplits(sent, received, group), sum(held)
        replay.note((found, experts_TK))
        return found

    return finish


def _on_host(values: Tensor) -> Callable[[], Any]:
    """Starts to copy values to the host; what it returns waits for them, and for nothing later."""
    if not values.is_cuda:
        return values.tolist
    copied = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copied.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def wait() -> Any:
        arrived.synchronize()
        return copied.tolist()

    return wait


def _require_room(splits: RowSplits, max_rows: int | None, num_tokens: int) -> None:
    coming = sum(splits.received)
    if max_rows is None or coming <= max_rows:
        return
    raise ResourceError(
        f"{coming} rows are on their way to the experts of rank {dist.get_rank()}, "
        f"`moe.max_tokens_per_rank` is {max_rows} ({num_tokens} tokens of its own)",
        hint="routing is skewed: raise the bound, use a smaller `train.micro_batch_size`, "
        "`moe.bias_update_rate=0.001` to balance, or `moe.capacity_factor=1.25` to drop",
    )


def dispatch(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    num_local_experts: int,
    group: dist.ProcessGroup,
    max_rows: int | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Dispatched:
    """Sends each token once to each rank that holds one of its experts.

    Args:
        experts_TK: global expert ids, int64; -1 for a choice that was dropped.
        weights_TK: router weights, float32; the gradient flows back through the exchange.
        max_rows: rows that this rank takes at most.
        meanwhile: called while tokens travel.

    Raises ResourceError if more rows than `max_rows` are on their way, before they arrive.
    """
    num_tokens, num_places = len(x_TD), dist.get_world_size(group)
    choices = count_choices(experts_TK, num_local_experts, num_places)
    finish_counts = exchange_counts(choices.sent_P2, experts_TK, group)
    write = functools.partial(write_messages, experts_TK, weights_TK, choices, num_local_experts)
    most_rows = num_tokens * min(num_places, experts_TK.shape[1])
    taken_SD = None
    if not replay.is_known() and most_rows * x_TD[:1].nbytes <= AHEAD_BYTES:
        # The device does this while the host waits, in room for as many rows as there can be.
        tables, message_SC = write(most_rows)
        taken_SD = x_TD.detach().index_select(0, tables.token_S)
        splits, num_held = finish_counts()
        tables, message_SC = tables.first(sum(splits.sent)), message_SC[: sum(splits.sent)]
    else:
        splits, num_held = finish_counts()
        tables, message_SC = write(sum(splits.sent))
    _require_room(splits, max_rows, num_tokens)
    rows_SD, recall = recallable(take_rows(x_TD, tables, taken_SD))
    finish_rows = start_exchange(rows_SD, splits, is_kept=True)
    finish_choices = start_choices(weights_TK, message_SC, tables, splits)
    if meanwhile is not None:
        meanwhile()
    experts_RK, weights_RK = finish_choices()
    x_RD = finish_rows()
    return Dispatched(x_RD, experts_RK, weights_RK, num_held, tables, splits, recall)


def combine(y_RD: Tensor, sent: Dispatched) -> Tensor:
    """Returns each token's sum over the ranks it went to, [T, D] in the dtype of `y_RD`.

    The few partial sums of a token are added in float32.
    """
    finish = start_exchange(y_RD, sent.splits.reversed(), in_backward=sent.prepare_backward)
    return add_rows(finish(), sent.tables)
