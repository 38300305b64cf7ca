"""Which expert-parallel and sequence-parallel sizes are legal, and why not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from epctl.layout.model import AttentionLayout, SequenceParallelSize

SEQUENCE_SIZES = (1, 2, 4, 8, 16, 32)


def ep_sizes(experts_by_layer: Iterable[int]) -> tuple[int, ...]:
    """Returns the sizes that give every rank the same number of experts in every layer."""
    common = 0
    for num_experts in experts_by_layer:
        common = math.gcd(common, num_experts)
    return tuple(size for size in range(1, common + 1) if common % size == 0)


def why_not_ep(ep: int, num_experts: int) -> str | None:
    """Returns why an expert-parallel size is illegal, None when it is legal."""
    if ep > num_experts:
        return f"ep({ep}) > num_experts({num_experts}): a rank would hold no expert"
    if ep < 1 or num_experts % ep:
        return f"num_experts({num_experts}) % ep({ep}) = {num_experts % ep if ep else '?'}, not 0"
    return None


def sequence_sizes(
    decoder: AttentionLayout | None,
    vision: AttentionLayout | None,
    refusals: Sequence[str],
) -> tuple[SequenceParallelSize, ...]:
    """Returns each size of SEQUENCE_SIZES with its verdict.

    Any number of heads can be shared (epctl/runtime/sequence/heads.py): they are dealt out by
    all-to-all, unevenly where they do not divide, or keys and values are gathered. The reason says
    which. `refusals` rule out every size above 1.
    """
    if decoder is None and vision is None:
        return ()
    return tuple(_verdict(size, decoder, vision, refusals) for size in SEQUENCE_SIZES)


def _verdict(
    size: int,
    decoder: AttentionLayout | None,
    vision: AttentionLayout | None,
    refusals: Sequence[str],
) -> SequenceParallelSize:
    if size == 1:
        return SequenceParallelSize(1, True, "no exchange")
    problems = list(refusals)
    notes = []
    for name, attention in (("decoder", decoder), ("vision tower", vision)):
        if attention is None:
            continue
        if attention.num_heads is None:
            problems.append(f"the number of heads of the {name} is not known")
        else:
            notes.append(_how_shared(name, attention, size))
    return SequenceParallelSize(size, not problems, "; ".join(problems or notes))


def _how_shared(name: str, attention: AttentionLayout, size: int) -> str:
    """Returns how the heads of one part are shared by `size` ranks."""
    heads, kv_heads = attention.num_heads or 1, attention.num_kv_heads or attention.num_heads or 1
    if heads < size:
        return f"{heads} query heads of the {name}: keys and values are gathered on each rank"
    if heads % size:
        return (
            f"{heads} query heads of the {name}: {heads // size} or {heads // size + 1} a rank, or "
            "keys and values gathered, whichever moves less"
        )
    each = f"{heads // size} of {heads} query heads a rank in the {name}"
    if kv_heads % size == 0:
        return each
    return f"{each}, key/value heads go to each rank that uses them ({kv_heads})"
