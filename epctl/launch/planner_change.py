"""When nothing fits: the smallest single change of the request that would make something fit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from epctl.launch.planner import HEADROOM, Answer, Option, Request, plan

LARGEST_JOB = 16_384
SHORTEST_SEQUENCE = 512


@dataclass(frozen=True)
class Change:
    """One change of the request that would make something fit, and what then does."""

    text: str
    factor: float
    option: Option


def smallest_changes(request: Request, answer: Answer) -> list[Change]:
    """Returns single changes after which something fits, the smallest first."""
    found = [_more_memory(request, answer), _more_ranks(request), _shorter_sequences(request)]
    return sorted((change for change in found if change), key=lambda change: change.factor)


def _more_memory(request: Request, answer: Answer) -> Change | None:
    if answer.leanest is None:
        return None
    needed = answer.leanest.needed_bytes / (1 - HEADROOM)
    return Change(
        f"{-(-needed // 2**30):.0f} GiB a {_unit(request)}",
        needed / request.memory_bytes,
        answer.leanest,
    )


def _unit(request: Request) -> str:
    return "GPU" if request.device == "cuda" else "rank"


def _more_ranks(request: Request) -> Change | None:
    """Doubles the ranks; a node stays as large as it is once it has eight."""
    if request.device == "cpu":
        return None
    factor = 2
    while request.num_ranks * factor <= LARGEST_JOB:
        ranks = request.num_ranks * factor
        nodes = max(request.num_nodes, -(-ranks // max(8, request.ranks_per_node)))
        more = dataclasses.replace(request, num_ranks=ranks, num_nodes=nodes)
        best = plan(more).best
        if best is not None:
            return Change(f"{ranks:,} GPUs", factor, best)
        factor *= 2
    return None


def _shorter_sequences(request: Request) -> Change | None:
    """Halves the sequence; not where images decide how long it is."""
    factor = 2
    while not request.patches and request.base.train.sequence_length // factor >= SHORTEST_SEQUENCE:
        length = request.base.train.sequence_length // factor
        train = request.base.train.model_copy(update={"sequence_length": length})
        shorter = request.base.model_copy(update={"train": train})
        best = plan(dataclasses.replace(request, base=shorter)).best
        if best is not None:
            return Change(f"sequences of {length:,} tokens", factor, best)
        factor *= 2
    return None
