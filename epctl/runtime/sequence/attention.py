"""epctl's entries in transformers' attention registry.

Shape suffixes: B batch, H query heads, J key/value heads, R rows of this rank, D head size.

The model calls them with queries, keys and values after rotary embedding and before key heads are
repeated. What a rank holds of the sequence comes along as the keyword `sequence_layout`, through
the model's own keyword arguments: so a layer recomputed in backward (activation checkpointing)
sees the layout it was first run with. Without a layout a call is an ordinary one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from epctl.errors import LayoutError
from epctl.runtime.sequence.attend import Rule, attend
from epctl.runtime.sequence.cuts import is_local
from epctl.runtime.sequence.documents import Intervals, of_offsets
from epctl.runtime.sequence.exchange import (
    gather_keys,
    start_heads_to_rows,
    start_rows_to_heads,
)
from epctl.runtime.sequence.group import SequenceGroup
from epctl.runtime.sequence.heads import choose_method, halves, place_heads

DECODER_ATTENTION = "epctl_sequence"
# Vision towers of the Qwen kind hand over a packed batch whole only if the name says flash.
VISION_ATTENTION = "epctl_sequence_flash"
# From so many bytes of queries, keys and values of all ranks on, a rank's heads go in two halves:
# one attends while the other travels. Below, a second message costs more than it hides.
OVERLAPPED_BYTES = 2**24


@dataclass
class DecoderLayout:
    """What the ranks hold of the decoder's tokens; `offsets` cut every sequence of the batch."""

    group: SequenceGroup
    offsets: tuple[int, ...]
    intervals: Intervals
    num_calls: int = 0


@dataclass
class VisionLayout:
    """What the ranks hold of the packed patch rows.

    `segments` are the kinds of segments the tower's layers use, by their number of offsets: kinds
    refine each other, so two of one number are the same.
    """

    group: SequenceGroup
    offsets: tuple[int, ...]
    segments: dict[int, tuple[int, ...]]
    always_exchange: bool = False
    num_calls: int = 0
    num_exchanges: int = 0
    _own: dict[int, Intervals] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in pairwise(self.offsets))

    def in_rows(self, patches: int) -> VisionLayout:
        """Returns the layout of whole tiles of `patches` rows as one of rows."""
        offsets = tuple(tile * patches for tile in self.offsets)
        tiles = tuple(range(0, offsets[-1] + 1, patches))
        return VisionLayout(self.group, offsets, {len(tiles): tiles}, self.always_exchange)

    def own_intervals(self, key: int) -> Intervals:
        """Returns this rank's segments in its own rows, for layers that attend locally."""
        if key not in self._own:
            first, last = self.offsets[self.group.rank : self.group.rank + 2]
            inside = [o - first for o in self.segments[key] if first <= o <= last]
            self._own[key] = of_offsets(inside)
        return self._own[key]


def register_attention() -> None:
    """Puts both functions into transformers' registry; more than once changes nothing."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(DECODER_ATTENTION, decoder_attention)
    ALL_ATTENTION_FUNCTIONS.register(VISION_ATTENTION, vision_attention)


def decoder_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    sequence_layout: DecoderLayout | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention of this rank's rows over all of them; returns [B, R, H, D]."""
    _refuse_unknown(module, unused)
    if sequence_layout is None:
        return _whole_attention(module, query, key, value, attention_mask, scaling, sliding_window)
    layout = sequence_layout
    layout.num_calls += 1
    rule = Rule(causal=True, scaling=scaling, dropout=dropout, window=sliding_window)
    out_BHRD = _sharded(query, key, value, layout.offsets, layout.intervals, rule, layout.group)
    return out_BHRD.transpose(1, 2).contiguous(), None


def vision_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    sequence_layout: VisionLayout | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention within segments of packed rows; returns [1, R, H, D].

    Local where no segment of this layer straddles a cut, an all-to-all over heads where one does.
    """
    _refuse_unknown(module, unused)
    rule = Rule(causal=False, scaling=scaling, dropout=dropout)
    if sequence_layout is None:
        offsets = (0, query.shape[2]) if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
        intervals = of_offsets(offsets) * query.shape[0]
        return attend(query, key, value, intervals, rule).transpose(1, 2).contiguous(), None
    layout = sequence_layout
    layout.num_calls += 1
    if cu_seq_lens_q is None:  # a tower of tiles [n, H, patches, D]
        return _tiles_attention(query, key, value, layout, rule), None
    segments = len(cu_seq_lens_q)
    num_rows = layout.sizes[layout.group.rank]
    # A rank without rows runs a dummy block, so that it calls what the others call.
    dummy = _dummy(query, key, value, num_rows)
    query, key, value = (x[:, :, :num_rows] for x in (query, key, value))
    out_BHRD = _vision_rows(query, key, value, segments, layout, rule)
    return torch.cat((out_BHRD, dummy), dim=2).transpose(1, 2).contiguous(), None


def _dummy(query: Tensor, key: Tensor, value: Tensor, num_rows: int) -> Tensor:
    """Returns something for the rows past this rank's own that hangs on q, k and v."""
    q, k, v = (x[:, :, num_rows:] for x in (query, key, value))
    return v + 0 * (q + k)


def _vision_rows(
    query: Tensor, key: Tensor, value: Tensor, segments: int, layout: VisionLayout, rule: Rule
) -> Tensor:
    offsets = layout.segments[segments]
    if is_local(offsets, layout.offsets) and not layout.always_exchange:
        return attend(query, key, value, layout.own_intervals(segments), rule)
    layout.num_exchanges += 1
    intervals = of_offsets(offsets)
    return _sharded(query, key, value, layout.offsets, intervals, rule, layout.group)


def _tiles_attention(
    q_BHRD: Tensor, k_BHRD: Tensor, v_BHRD: Tensor, layout: VisionLayout, rule: Rule
) -> Tensor:
    """Tiles laid end to end as packed rows; returns [tiles, patches, H, D]."""
    layout = layout.in_rows(q_BHRD.shape[2])
    (segments,) = layout.segments
    q, k, v = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (q_BHRD, k_BHRD, v_BHRD))
    num_rows = layout.sizes[layout.group.rank]
    dummy = _dummy(q, k, v, num_rows)
    q, k, v = (x[:, :, :num_rows] for x in (q, k, v))
    out = torch.cat((_vision_rows(q, k, v, segments, layout, rule), dummy), dim=2)
    tiles, num_heads, patches, _ = q_BHRD.shape
    return out.view(num_heads, tiles, patches, -1).permute(1, 2, 0, 3).contiguous()


def _sharded(
    q_BHRD: Tensor,
    k_BJRD: Tensor,
    v_BJRD: Tensor,
    offsets: tuple[int, ...],
    intervals: Intervals,
    rule: Rule,
    group: SequenceGroup,
) -> Tensor:
    """Attention of cut rows, by exchanging heads or by gathering keys; returns [B, H, R, D]."""
    if group.size == 1:
        return attend(q_BHRD, k_BJRD, v_BJRD, intervals, rule)
    sizes = [stop - start for start, stop in pairwise(offsets)]
    num_heads, num_kv_heads = q_BHRD.shape[1], k_BJRD.shape[1]
    dims = (q_BHRD.shape[-1], k_BJRD.shape[-1], v_BJRD.shape[-1])
    method = choose_method(num_heads, num_kv_heads, sizes, dims, causal=rule.causal)
    if method == "keys":
        k, v = gather_keys(k_BJRD, v_BJRD, sizes, group)
        return attend(q_BHRD, k, v, intervals, rule, first_query=offsets[group.rank])
    placement = place_heads(num_heads, num_kv_heads, group.size)
    row_bytes = (num_heads * dims[0] + num_kv_heads * sum(dims[1:])) * q_BHRD.element_size()
    shares = [placement]
    if len(q_BHRD) * sum(sizes) * row_bytes >= OVERLAPPED_BYTES:  # the same on every rank
        shares = halves(placement, num_heads, num_kv_heads)
    coming = [start_rows_to_heads(q_BHRD, k_BJRD, v_BJRD, sizes, share, group) for share in shares]
    going = []
    for share, arrive in zip(shares, coming, strict=True):
        q, k, v = arrive()
        pairs = share.kv_of_query(group.rank, num_heads, num_kv_heads)
        if pairs is not None and not _is_grouped(pairs):
            index = torch.tensor(pairs, device=k.device)
            k, v = k.index_select(1, index), v.index_select(1, index)
        out = attend(q, k, v, intervals, rule)
        going.append(start_heads_to_rows(out, sizes, share, group))
    # Of every rank the first share's heads, then the second's.
    by_rank = zip(*[finish() for finish in going], strict=True)
    return torch.cat([heads for of_rank in by_rank for heads in of_rank], dim=1)


def _is_grouped(pairs: list[int]) -> bool:
    """True if every key head serves the same number of query heads in turn."""
    times, rest = divmod(len(pairs), pairs[-1] + 1)
    return not rest and pairs == [i // times for i in range(len(pairs))]


def _whole_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    sliding_window: int | None,
) -> tuple[Tensor, None]:
    """An ordinary call: generation, where every rank holds the whole sequence and its cache."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sliding_window is not None and key.shape[2] > sliding_window and attention_mask is None:
        rule = Rule(causal=True, scaling=scaling, window=sliding_window)
        whole = (((0, key.shape[2]),),) * query.shape[0]
        first_query = key.shape[2] - query.shape[2]
        out_BHRD = attend(query, key, value, whole, rule, first_query)
        return out_BHRD.transpose(1, 2).contiguous(), None
    result = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    return cast(tuple[Tensor, None], result)


def _refuse_unknown(module: nn.Module, given: dict[str, Any]) -> None:
    """Raises LayoutError for what changes attention and is not computed here."""
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if given.get(name) is not None:
            raise LayoutError(
                f"{type(module).__name__} attends with `{name}`, which sequence parallelism lacks",
                hint="train this model without `--sp`",
            )
