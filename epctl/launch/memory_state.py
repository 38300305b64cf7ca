"""What a rank holds between steps: parameters, float32 masters, optimizer state.

Describes epctl's runtime on DeepSpeed 0.19.8: stage_1_and_2.py, stage3.py, bf16_optimizer.py,
unfused_optimizer.py, and optimizer.py here. Dense parameters are cut over all ranks, experts over
the ranks that hold the same ones (edp).
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from epctl.launch.memory_settings import RankPlan
from epctl.launch.memory_shape import Kind, ModelShape, Part
from epctl.launch.memory_terms import Place, Term

MASTER_BYTES = 4
# AdamW's two float32 moments an element.
ADAMW_BYTES = 8
# DeepSpeed splits expert groups at so many elements (moe/utils.py, max_group_size).
EXPERT_GROUP_ELEMENTS = 178_956_971
# Above so many ranks the elements that a partition touches are bounded, not walked.
WALKED_RANKS = 64
# Flat groups are padded to this times the ranks (nccl_start_alignment_factor).
ALIGNMENT = 2


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """Trained Parameters that the optimizer steps on as one flat tensor, on one rank's share.

    `elements`: whole Parameters of the group, as they lie on a rank before ZeRO cuts them.
    `partition`: what one rank owns at ZeRO-1/2, padding included; `sliced`: at ZeRO-3.
    `touched`: elements of whole Parameters that a rank's partition overlaps.
    """

    part: Part
    kind: Kind
    elements: int
    partition: int
    sliced: int
    touched: int
    largest: int


@dataclass(frozen=True)
class LocalCounts:
    """Elements of a model on one rank at an ep size, whatever is trained."""

    groups: tuple[FlatGroup, ...]
    dense: int
    experts: int
    dense_sliced: int
    experts_sliced: int
    num_small: int

    def trained(self, attribute: str, part: Part | None = None, kind: Kind | None = None) -> int:
        """Returns the sum of a field of the groups of a part and a kind."""
        key = (attribute, part, kind)
        if key not in self._sums:
            self._sums[key] = sum(
                getattr(group, attribute)
                for group in self.groups
                if part in (None, group.part) and kind in (None, group.kind)
            )
        return self._sums[key]

    @functools.cached_property
    def _sums(self) -> dict[tuple[str, Part | None, Kind | None], int]:
        """What `trained` has answered: a plan asks the same of one layout many times."""
        return {}


def local_counts(shape: ModelShape, plan: RankPlan) -> LocalCounts:
    """Returns a rank's elements; depends on ranks and ep only, and is remembered."""
    return _local_counts(shape, plan.num_ranks, plan.ep, plan.engine.persistence_threshold)


@functools.lru_cache(maxsize=4096)
def _local_counts(shape: ModelShape, num_ranks: int, ep: int, threshold: int) -> LocalCounts:
    held, sliced, num_small = {"dense": 0, "experts": 0}, {"dense": 0, "experts": 0}, 0
    members: dict[tuple[Part, Kind], list[tuple[int, int]]] = {}
    for family in shape.families:
        is_expert = family.part == "experts"
        numel = family.num_elements // ep if is_expert else family.num_elements
        group_size = num_ranks // ep if is_expert else num_ranks
        held[family.part] += family.count * numel
        sliced[family.part] += family.count * -(-numel // group_size)
        # One rank's slice is the whole: nothing to gather.
        num_small += family.count * numel * (numel <= threshold and group_size > 1)
        if family.trained:
            members.setdefault((family.part, family.kind), []).append((numel, family.count))
    groups = tuple(
        group
        for (part, kind), sizes in members.items()
        for group in _flat_groups(
            part, kind, sizes, num_ranks // ep if part == "experts" else num_ranks
        )
    )
    return LocalCounts(
        groups, held["dense"], held["experts"], sliced["dense"], sliced["experts"], num_small
    )


def _flat_groups(
    part: Part, kind: Kind, sizes: list[tuple[int, int]], num_ranks: int
) -> Iterator[FlatGroup]:
    if part == "dense":
        yield _flat_group(part, kind, sizes, num_ranks)
        return
    current: list[tuple[int, int]] = []
    elements = 0
    for numel in _in_layers(sizes):
        if current and elements + numel > EXPERT_GROUP_ELEMENTS:
            yield _flat_group(part, kind, current, num_ranks)
            current, elements = [], 0
        current.append((numel, 1))
        elements += numel
    if current:
        yield _flat_group(part, kind, current, num_ranks)


def _flat_group(part: Part, kind: Kind, sizes: list[tuple[int, int]], num_ranks: int) -> FlatGroup:
    elements = sum(numel * count for numel, count in sizes)
    largest = max(numel for numel, _ in sizes)
    step = ALIGNMENT * num_ranks
    partition = -(-elements // step) * ALIGNMENT
    return FlatGroup(
        part,
        kind,
        elements,
        partition,
        sum(count * -(-numel // num_ranks) for numel, count in sizes),
        _touched(tuple(sizes), partition, num_ranks),
        largest,
    )


@functools.lru_cache(maxsize=4096)
def _touched(sizes: tuple[tuple[int, int], ...], partition: int, num_ranks: int) -> int:
    """Returns the most elements of whole Parameters that one rank's partition overlaps.

    Where a cut falls inside a Parameter, both its ranks hold its whole gradient. Parameters are
    taken layer by layer; with many ranks the bound is as good.
    """
    elements = sum(numel * count for numel, count in sizes)
    largest = max(numel for numel, _ in sizes)
    if num_ranks == 1 or num_ranks > WALKED_RANKS:
        return min(elements, elements if num_ranks == 1 else partition + largest)
    ends = list(itertools.accumulate(_in_layers(sizes)))
    most = 0
    for rank in range(num_ranks):
        first = bisect.bisect_right(ends, rank * partition)
        last = bisect.bisect_left(ends, min(elements, (rank + 1) * partition))
        if first <= last < len(ends):
            most = max(most, ends[last] - (ends[first - 1] if first else 0))
    return most


def _in_layers(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Returns every Parameter's elements, one of each family in turn."""
    rounds = max(count for _, count in sizes)
    return [numel for turn in range(rounds) for numel, count in sizes if turn < count]


def state_terms(shape: ModelShape, plan: RankPlan) -> Iterator[Term]:
    """Yields what exists between steps: parameters, float32 masters, optimizer state."""
    local = local_counts(shape, plan)
    yield from _parameter_terms(local, plan)
    place: Place = "host" if plan.offload else "device"
    shares = "partition" if plan.zero in (1, 2) else "sliced" if plan.zero == 3 else "elements"
    cut = {0: "", 1: " / ranks", 2: " / ranks", 3: " / ranks"}[plan.zero]
    for part in ("dense", "experts"):
        own: Part = "experts" if part == "experts" else "dense"
        stepped = local.trained(shares, own)
        if not stepped:
            continue
        values = {"elements": stepped}
        where = cut.replace("ranks", "edp") if part == "experts" else cut
        if _has_masters(plan):
            formula = f"4 B x trained {part}{where}"
            yield Term(
                f"masters, {part}", "masters", MASTER_BYTES * stepped, formula,
                place=place, values=values,
            )  # fmt: skip
        for kind, width in (("muon", plan.momentum_bytes), ("adamw", ADAMW_BYTES)):
            count = local.trained(shares, own, "muon" if kind == "muon" else "adamw")
            if count:
                yield Term(
                    f"{'Muon momentum' if kind == 'muon' else 'AdamW moments'}, {part}",
                    "optimizer state",
                    width * count,
                    f"{width} B x {part} on {kind}{where}",
                    place=place,
                    values={"elements": count},
                )


def _has_masters(plan: RankPlan) -> bool:
    """False at ZeRO-0 in float32 only, where the parameters themselves are stepped on."""
    return plan.bfloat16 or plan.zero > 0


def _parameter_terms(local: LocalCounts, plan: RankPlan) -> Iterator[Term]:
    width = plan.width
    if plan.zero < 3:
        frozen = local.dense + local.experts - local.trained("elements")
        padding = 0
        if plan.zero:
            ranks = {"dense": plan.num_ranks, "experts": plan.edp}
            padding = sum(g.partition * ranks[g.part] - g.elements for g in local.groups)
        yield Term(
            "parameters, dense", "parameters", width * (local.dense + padding),
            f"{width} B x dense, whole on every rank (ZeRO-{plan.zero}), padding included",
            values={"elements": local.dense, "padding": padding, "frozen": frozen},
        )  # fmt: skip
        if local.experts:
            yield Term(
                "parameters, experts", "parameters", width * local.experts,
                f"{width} B x experts / ep", values={"elements": local.experts, "ep": plan.ep},
            )  # fmt: skip
        return
    yield Term(
        "parameters, dense", "parameters", width * local.dense_sliced,
        f"{width} B x dense / ranks",
        values={"elements": local.dense_sliced, "ranks": plan.num_ranks},
    )  # fmt: skip
    if local.experts:
        yield Term(
            "parameters, experts", "parameters", width * local.experts_sliced,
            f"{width} B x experts / ep / edp",
            values={"elements": local.experts_sliced, "ep": plan.ep, "edp": plan.edp},
        )  # fmt: skip
    if local.num_small:
        yield Term(
            "small parameters kept whole", "engine buffers", width * local.num_small,
            f"{width} B x Parameters of at most {plan.engine.persistence_threshold:,} elements",
            values={"elements": local.num_small},
        )  # fmt: skip


def largest_step(local: LocalCounts, plan: RankPlan) -> int:
    """Returns the elements of the largest tensor one optimizer step works on."""
    shares = "partition" if plan.zero in (1, 2) else "sliced" if plan.zero == 3 else "largest"
    largest = max((getattr(group, shares) for group in local.groups), default=0)
    return min(largest, plan.engine.sub_group) if plan.zero == 3 else int(largest)
