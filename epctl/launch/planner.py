"""Which ways to run a model fit, and which of them is fastest. Pure arithmetic, no torch.

Every candidate is a RunConfig that the rules of `epctl train` accept (planner_rules.py); memory.py
says what it needs, cost.py how long a step takes.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from epctl.config import Recompute, RunConfig
from epctl.launch.cost import StepCost, step_cost
from epctl.launch.cost_rates import Rates
from epctl.launch.memory import Prediction, cpu_bytes, predict
from epctl.launch.memory_settings import RankPlan, rank_plan
from epctl.launch.memory_shape import ModelShape
from epctl.launch.planner_rules import ModelLimits, model_limits, why_illegal
from epctl.layout.model import ModelLayout

# ZeRO-0 adds micro-steps up in bfloat16 and averages expert norms: only where it is asked for.
STAGES = (1, 2, 3)
# `train.activation_checkpointing` and `moe.recompute`.
Recomputed = tuple[str, str]
# Tokens from which attention is kept: at 4,096 nothing was gained, at 32,768 5 % (an H200).
LONG_SEQUENCE = 8192
# Shorter sequences are not worth an exchange in every layer.
SHORTEST_CUT_SEQUENCE = 16_384
LARGEST_MICRO_BATCH = 64
# A prediction may be off, and routing shifts while a model trains: this share is left alone.
HEADROOM = 0.05


@dataclass(frozen=True)
class Request:
    """What is to be planned. `fixed` holds dotted settings that somebody chose.

    `memory_bytes` is one GPU's, or on CPU a rank's share of the host; `host_bytes` the memory of a
    node for offload, None when it is not known.
    """

    shape: ModelShape
    limits: ModelLimits
    ep_sizes: tuple[int, ...]
    sp_sizes: tuple[int, ...]
    base: RunConfig
    num_ranks: int
    memory_bytes: float
    num_nodes: int = 1
    host_bytes: float | None = None
    device: str = "cuda"
    tokens_per_step: int | None = None
    optimizers: tuple[str, ...] = ("muon",)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rates: Rates = field(default_factory=Rates)
    imbalance: float = 1.0
    patches: int = 0

    @property
    def usable_bytes(self) -> float:
        """Returns what a plan may need of a GPU's (or a CPU rank's) memory."""
        return (1 - HEADROOM) * self.memory_bytes

    @property
    def ranks_per_node(self) -> int:
        return max(1, self.num_ranks // self.num_nodes)


@dataclass(frozen=True)
class Option:
    """One way to run, with what it needs and how fast it is predicted to be."""

    config: RunConfig
    plan: RankPlan
    prediction: Prediction
    needed_bytes: float
    cost_of: Callable[[], StepCost]

    @functools.cached_property
    def cost(self) -> StepCost:
        return self.cost_of()

    @property
    def speed(self) -> float:
        """Returns tokens a second and rank."""
        return self.cost.tokens_per_second_per_rank


@dataclass(frozen=True)
class Answer:
    """Options that fit, fastest first; why the others do not; the one that needs least."""

    options: tuple[Option, ...]
    rejected: Mapping[str, int]
    num_considered: int
    leanest: Option | None

    @property
    def best(self) -> Option | None:
        return self.options[0] if self.options else None

    def front(self) -> list[Option]:
        """Returns the options that no other beats in both memory and speed, leanest first."""
        found: list[Option] = []
        for option in sorted(self.options, key=lambda o: (o.needed_bytes, -o.speed)):
            if not found or option.speed > found[-1].speed:
                found.append(option)
        return found


def make_request(shape: ModelShape, layout: ModelLayout, base: RunConfig, **given: Any) -> Request:
    """Returns a request with the sizes that the layout allows."""
    return Request(
        shape=shape,
        limits=model_limits(layout),
        ep_sizes=layout.ep_sizes or (1,),
        sp_sizes=layout.sp_sizes or (1,),
        base=base,
        **given,
    )


def plan(request: Request) -> Answer:
    """Returns every way to run the model that was looked at, sorted."""
    options: list[Option] = []
    rejected: Counter[str] = Counter()
    leanest: Option | None = None
    for optimizer, sp, ep, zero in _meshes(request):
        for offload in _offload_choices(request):
            found, needed = _of_mesh(request, optimizer, sp, ep, zero, offload, rejected)
            options += found
            if needed is not None and (
                leanest is None or needed.needed_bytes < leanest.needed_bytes
            ):
                leanest = needed
            if found and not request.fixed.get("optim.offload"):
                break  # what fits on the device is never slower than offload
    options.sort(key=lambda o: (-round(o.speed, 1), o.needed_bytes))
    return Answer(tuple(options), rejected, len(options) + rejected.total(), leanest)


def _meshes(request: Request) -> Iterator[tuple[str, int, int, int]]:
    fixed = request.fixed
    sp_sizes: Iterable[int] = (1,)
    if _sequence_length(request) >= SHORTEST_CUT_SEQUENCE:
        sp_sizes = request.sp_sizes
    sizes = itertools.product(
        request.optimizers,
        (fixed["parallel.sp"],) if "parallel.sp" in fixed else sp_sizes,
        (fixed["parallel.ep"],) if "parallel.ep" in fixed else request.ep_sizes,
        (fixed["parallel.zero"],) if "parallel.zero" in fixed else STAGES,
    )
    for optimizer, sp, ep, zero in sizes:
        if max(sp, ep) <= request.num_ranks or "parallel.ep" in fixed:
            yield optimizer, sp, ep, zero


def _sequence_length(request: Request) -> int:
    return request.base.train.sequence_length


def _offload_choices(request: Request) -> tuple[bool, ...]:
    fixed = request.fixed.get("optim.offload")
    if fixed is not None:
        return (bool(fixed),)
    return (False,) if request.device == "cpu" else (False, True)


def _of_mesh(
    request: Request, optimizer: str, sp: int, ep: int, zero: int, offload: bool,
    rejected: Counter[str],
) -> tuple[list[Option], Option | None]:  # fmt: skip
    """Returns what fits of one mesh, and its leanest option whether it fits or not."""
    modes, batches = _recompute_choices(request), list(_batches(request, sp))
    if not batches:
        rejected["the tokens of a step are no whole number of sequences a rank"] += 1
        return [], None

    def option(mode: Recomputed, batch: tuple[int, int]) -> Option:
        config = _config(request, optimizer, ep, zero, sp, offload, mode, *batch)
        return _option(request, config)

    first = _config(request, optimizer, ep, zero, sp, offload, modes[-1], *batches[-1])
    reason = why_illegal(first, request.num_ranks, request.device, request.limits)
    if reason is not None:
        rejected[reason] += 1
        return [], None
    # Memory rises with the micro-batch: what the smallest cannot do, none can.
    leanest = option(modes[-1], batches[-1])
    problem = _too_large(request, leanest)
    if problem is not None:
        rejected[problem] += len(modes) * len(batches)
        return [], leanest
    found: list[Option] = []
    for mode in modes:
        problem = _too_large(request, option(mode, batches[-1]))
        for batch in batches if problem is None else ():
            candidate = option(mode, batch)
            if _too_large(request, candidate) is None:
                found.append(candidate)  # smaller micro-batches are slower
                break
            rejected[str(_too_large(request, candidate))] += 1
        if problem is not None:
            rejected[problem] += len(batches)
    return found, leanest


def _recompute_choices(request: Request) -> list[Recomputed]:
    """Returns what backward may make again, the choice that keeps least last."""
    fixed = request.fixed
    modes: Iterable[str]
    if "train.activation_checkpointing" in fixed:
        modes = (str(fixed["train.activation_checkpointing"]),)
    else:
        without = set() if request.shape.num_moe_layers else {"moe"}
        if request.base.train.sequence_length < LONG_SEQUENCE:
            without.add("except_attention")
        modes = (mode for mode in get_args(Recompute) if mode not in without)
    return [(mode, experts) for mode in modes for experts in _expert_choices(request, mode)]


def _expert_choices(request: Request, mode: str) -> tuple[str, ...]:
    fixed = request.fixed.get("moe.recompute")
    if fixed is not None:
        return (str(fixed),)
    # A block that is made again whole holds its pre-activation for a moment only.
    can_save = request.shape.num_moe_layers and mode in ("none", "attention")
    return ("none", "activation") if can_save else ("none",)


def _batches(request: Request, sp: int) -> Iterator[tuple[int, int]]:
    """Yields (micro-batch, accumulation), largest micro-batch first."""
    fixed, train = request.fixed, request.base.train
    groups = max(1, request.num_ranks // sp)
    if request.tokens_per_step is None:
        accumulation = train.gradient_accumulation_steps
        if "train.micro_batch_size" in fixed:
            yield train.micro_batch_size, accumulation
            return
        yield from ((size, accumulation) for size in _powers(LARGEST_MICRO_BATCH))
        return
    rows, rest = divmod(request.tokens_per_step, train.sequence_length)
    if rest or rows % groups:
        return
    rows //= groups
    sizes = [train.micro_batch_size] if "train.micro_batch_size" in fixed else _divisors(rows)
    yield from ((size, rows // size) for size in sizes if rows % size == 0)


def _powers(largest: int) -> list[int]:
    return [size for size in (64, 32, 16, 8, 4, 2, 1) if size <= largest]


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, min(number, LARGEST_MICRO_BATCH) + 1) if number % size == 0]
    return small[::-1]


def _config(
    request: Request, optimizer: str, ep: int, zero: int, sp: int, offload: bool,
    recomputed: Recomputed, micro_batch: int, accumulation: int,
) -> RunConfig:  # fmt: skip
    base = request.base
    parallel = {"ep": ep, "zero": zero, "sp": sp, "num_ranks": request.num_ranks}
    checkpointing, experts = recomputed
    name = base.optim.name if base.optim.name == "deepspeed-muon" else optimizer
    return base.model_copy(
        update={
            "parallel": base.parallel.model_copy(update=parallel),
            "moe": base.moe.model_copy(update={"recompute": experts}),
            "optim": base.optim.model_copy(update={"offload": offload, "name": name}),
            "train": base.train.model_copy(
                update={
                    "activation_checkpointing": checkpointing,
                    "micro_batch_size": micro_batch,
                    "gradient_accumulation_steps": accumulation,
                }
            ),
        }
    )


def _option(request: Request, config: RunConfig) -> Option:
    run = rank_plan(
        config, request.num_ranks, request.device,
        imbalance=request.imbalance, patches=request.patches,
    )  # fmt: skip
    prediction = predict(request.shape, run)
    needed = prediction.needed_bytes if request.device == "cuda" else cpu_bytes(prediction)

    def cost() -> StepCost:
        return step_cost(request.shape, run, request.rates, request.ranks_per_node)

    return Option(config, run, prediction, needed, cost)


def _too_large(request: Request, option: Option) -> str | None:
    if option.needed_bytes > request.usable_bytes:
        where = "a GPU has" if request.device == "cuda" else "the host has for a rank"
        return f"needs more memory than {where} ({HEADROOM:.0%} left free)"
    on_host = option.prediction.host_bytes * request.ranks_per_node
    if request.host_bytes is not None and option.plan.offload and on_host > request.host_bytes:
        return "needs more host memory than a node has"
    return None
