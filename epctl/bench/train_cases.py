"""What `epctl bench train` runs: cases, their settings, and the visits of each implementation.

A visit builds one engine, times steps and destroys it: two engines rarely fit a GPU together.
Rounds go through all cases and implementations in turn. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

from epctl.bench.train_model import BenchModel
from epctl.config import RunConfig, flat_values, resolve_config
from epctl.errors import ConfigError
from epctl.runtime.mesh import validate_expert_parallel

Device = Literal["cpu", "cuda"]
Routing = Literal["natural", "balanced"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)
PEERS = ("deepspeed", "transformers")
OPTIMIZERS = ("muon", "adamw")
OWN = "epctl"
# Both engines' AdamW at once: no decay that only one of them leaves out for norms, no schedule.
FIXED: Mapping[str, Any] = {
    "optim.lr": None,  # by precision, below
    "optim.weight_decay": 0.0,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "train.steps": 100_000,
    "run.save": False,
}
# By whether a run is in bfloat16: small enough there that engines stay together for some steps.
LEARNING_RATE: Mapping[bool, float] = {False: 1e-3, True: 1e-5}
# As `--check`: float32, so that only rounding of sums is left.
GATE_FLAGS: Mapping[str, Any] = {"train.precision": "float32", "check.steps": 2}
# AdamW's first steps go by the sign of a gradient, however small: rounding is all of some updates.
GATE_RATES: Mapping[str, float] = {"muon": 1e-3, "adamw": 3e-5}


class Sizes(NamedTuple):
    """Defaults of a device: tokens, repeats, and the gate's tokens."""

    sequence_length: int
    micro_batch: int
    recompute: str
    warm_up: int
    steps: int
    rounds: int
    gate_length: int
    gate_rows: int
    gate_steps: int


SIZES: Mapping[Device, Sizes] = {
    "cpu": Sizes(64, 2, "none", 0, 2, 2, 32, 2, 2),
    "cuda": Sizes(4096, 4, "full", 1, 5, 2, 512, 1, 2),
}


@dataclass(frozen=True)
class Case:
    """One row group: a number of ranks, a ZeRO stage and an optimizer."""

    num_ranks: int
    ep: int
    zero: int
    optim: str
    bfloat16: bool
    config: RunConfig
    gate_config: RunConfig

    @property
    def key(self) -> str:
        return f"{self.num_ranks} ranks, EP {self.ep}, ZeRO-{self.zero}, {self.optim}"

    def facts(self) -> dict[str, Any]:
        """Returns what names the case in a row."""
        return {
            "ranks": self.num_ranks, "ep": self.ep, "zero": self.zero, "optim": self.optim
        }  # fmt: skip

    def document(self) -> dict[str, Any]:
        """Returns what the ranks are told."""
        return {
            "key": self.key,
            "config": self.config.model_dump(),
            "gate_config": self.gate_config.model_dump(),
            "bfloat16": self.bfloat16,
        }


class Visit(NamedTuple):
    """One engine's turn."""

    case: str
    implementation: str
    number: int


def make_cases(
    model: BenchModel,
    device: Device,
    *,
    counts: Sequence[int],
    ep: int | None,
    stages: Sequence[int],
    optimizers: Sequence[str],
    sizes: Sizes,
    settings: Sequence[str] = (),
) -> list[Case]:
    """Returns every case; `ep` None takes as many as there are ranks.

    Raises ConfigError for an EP size that does not fit, an unknown stage or optimizer, and for a
    `--set` of something that a flag decides.
    """
    unknown = [name for name in optimizers if name not in OPTIMIZERS]
    if unknown:
        raise ConfigError(f"optimizer {unknown[0]!r} is unknown; known: {', '.join(OPTIMIZERS)}")
    if ep is not None and not 1 <= ep <= max(counts):
        raise ConfigError(f"expert parallel size {ep} on {max(counts)} ranks cannot be")
    moe = model.layout.moe
    assert moe is not None
    given = resolve_config(settings=list(settings), flags={})
    bfloat16 = given.config.train.uses_bfloat16(device)
    cases = []
    for num_ranks, zero, optim in itertools.product(counts, stages, optimizers):
        size = num_ranks if ep is None else min(ep, num_ranks)
        validate_expert_parallel(size, num_ranks, moe.num_experts)
        flags = {**FIXED, **_flags(device, sizes, size, zero, optim)}
        for key in given.given().keys() & flags.keys():
            raise ConfigError(f"`--set {key}`: `epctl bench train` or a flag of it decides that")
        flags["optim.lr"] = LEARNING_RATE[bfloat16]
        gate = {
            **flags,
            **GATE_FLAGS,
            "optim.lr": GATE_RATES[optim],
            "train.sequence_length": sizes.gate_length,
            "train.micro_batch_size": sizes.gate_rows,
        }
        configs = (_resolved(flags, settings), _resolved(gate, settings))
        cases.append(Case(num_ranks, size, zero, optim, bfloat16, *configs))
    return cases


def _flags(device: Device, sizes: Sizes, ep: int, zero: int, optim: str) -> dict[str, Any]:
    return {
        "parallel.ep": ep,
        "parallel.zero": zero,
        "parallel.device": device,
        "optim.name": optim,
        "train.sequence_length": sizes.sequence_length,
        "train.micro_batch_size": sizes.micro_batch,
        "train.activation_checkpointing": sizes.recompute,
    }


def _resolved(flags: Mapping[str, Any], settings: Sequence[str]) -> RunConfig:
    return resolve_config(settings=list(settings), flags=flags).config


def plan_visits(cases: Sequence[Case], peers: Sequence[str], rounds: int) -> list[Visit]:
    """Returns the visits in their order: round by round, so that time drifts alike for all."""
    return [
        Visit(case.key, name, number)
        for number in range(rounds)
        for case in cases
        for name in (OWN, *peers)
    ]


def rank_counts(num_ranks: int, *, scaling: bool) -> list[int]:
    """Returns the numbers of ranks to measure: one, or all powers of two up to it and itself."""
    if not scaling:
        return [num_ranks]
    powers = [2**n for n in range(num_ranks.bit_length()) if 2**n < num_ranks]
    return [*powers, num_ranks]


def parse_stages(text: str) -> list[int]:
    """Returns the ZeRO stages of a list with commas. Raises ConfigError for another number."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part in ("0", "1", "2", "3") for part in parts):
        raise ConfigError(f"`--zero {text}`: stages are 0 to 3", hint="write `--zero 2,3`")
    return [int(part) for part in parts]


def parse_optimizers(text: str) -> list[str]:
    """Returns the names of a list with commas; `make_cases` knows which there are."""
    return [part.strip() for part in text.split(",")]


def parse_routings(names: Sequence[str]) -> list[Routing]:
    """Returns the routings by name, all for none. Raises ConfigError for an unknown one."""
    for name in names:
        if name not in ROUTINGS:
            raise ConfigError(f"routing {name!r} is unknown; known: {', '.join(ROUTINGS)}")
    return [cast(Routing, name) for name in names] or list(ROUTINGS)


def parse_peers(names: Sequence[str] | None) -> list[str]:
    """Returns the peers, all for None. Raises ConfigError for an unknown one."""
    for name in names or ():
        if name not in PEERS:
            raise ConfigError(f"peer {name!r} is unknown; known: {', '.join(PEERS)}")
    return list(PEERS if names is None else names)


def settings_of(case: Case) -> dict[str, Any]:
    """Returns the settings of a case that are not defaults, for the document."""
    defaults = flat_values(RunConfig())
    own = flat_values(case.config)
    return {key: value for key, value in own.items() if value != defaults[key]}
