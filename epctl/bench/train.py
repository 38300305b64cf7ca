"""`epctl bench train`: whole training steps of epctl beside DeepSpeed's AutoEP and transformers.

Gates first, for every ZeRO stage and optimizer; then engines take turns, because two rarely fit a
GPU: a visit builds one, times its steps in both routings and destroys it, and rounds of visits go
through all cases and implementations. What runs in the ranks is in train_ranks.py.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epctl.bench.machine import machine_facts
from epctl.bench.registry import Result
from epctl.bench.train_cases import (
    SIZES,
    Case,
    Device,
    Sizes,
    Visit,
    make_cases,
    parse_peers,
    parse_routings,
    plan_visits,
    rank_counts,
    settings_of,
)
from epctl.bench.train_flops import FORMULA, vendor_flops
from epctl.bench.train_model import TINY, BenchModel, open_bench_model
from epctl.bench.train_rows import Measured, make_rows
from epctl.bench.train_view import draw, table
from epctl.errors import ConfigError, LaunchError, ResourceError
from epctl.launch.devices import count_gpus
from epctl.output import format_count, out

__all__ = ["draw", "measure", "table"]

MODULE = "epctl.bench.train_ranks"
GPU_MODEL, GPU_LAYERS = "moonshotai/Moonlight-16B-A3B", 9
CPU_RANKS = 2
MOST_GATE_STEPS = 100
LEAST_MOVED = 1e-2  # five times what losses in bfloat16 may differ by
# The longest a rank works without a word: an engine's build with a compilation in its first step.
SILENCE_SECONDS = 420.0


def measure(
    *,
    model: str | None = None,
    layers: int | None = None,
    ranks: int | None = None,
    ep: int | None = None,
    zero: Sequence[int] = (),
    optim: Sequence[str] = (),
    sequence_length: int | None = None,
    micro_batch: int | None = None,
    recompute: str | None = None,
    peers: Sequence[str] | None = None,
    routings: Sequence[str] = (),
    steps: int | None = None,
    rounds: int | None = None,
    gate_steps: int | None = None,
    scaling: bool = False,
    minutes: float | None = None,
    profile: bool = True,
    device: str | None = None,
    settings: Sequence[str] = (),
) -> Result:
    """Measures every case: ZeRO stages x optimizers (x numbers of ranks with `scaling`).

    Args:
        model: `tiny`, a catalog name, a folder or a hub id; None is tiny on a CPU and 9 layers of
            Moonlight on GPUs.
        layers: decoder layers to keep; None is all.
        ranks: None is every GPU, or two ranks on a CPU.
        ep: expert parallel size; None is the number of ranks.
        zero, optim: stages and optimizers; none is 2 and 3, muon and adamw.
        recompute: `train.activation_checkpointing`, of all implementations.
        peers: names of PEERS; None is all, () is none.
        steps, rounds: timed steps a visit and routing, and visits.
        gate_steps: steps in bfloat16 that the gate compares with the whole model's; None is 2.
        minutes: no engine's turn begins later than this; what was left out is said.
        settings: `key=value` of epctl's config beyond these.

    Raises:
        ConfigError, LayoutError, InputError: settings or a model that cannot be measured.
        ResourceError: more ranks than GPUs.
        GateError: a loss, norm, choice or weight that is not the whole model's; nothing is shown.
        LaunchError: a rank failed outside of any engine's turn.
    """
    chosen, num_ranks = _place(device, ranks)
    sizes = _sizes(chosen, sequence_length, micro_batch, recompute, steps, rounds, gate_steps)
    opened = open_bench_model(model or (GPU_MODEL if chosen == "cuda" else TINY))
    if model is None and chosen == "cuda" and layers is None:
        layers = GPU_LAYERS
    opened = opened.cut(layers)
    cases = make_cases(
        opened,
        chosen,
        counts=rank_counts(num_ranks, scaling=scaling),
        ep=ep,
        stages=tuple(zero) or (2, 3),
        optimizers=tuple(optim) or ("muon", "adamw"),
        sizes=sizes,
        settings=settings,
    )
    if gate_steps is not None and not cases[0].bfloat16:
        out.warning("`--gate-steps` is ignored: nothing is timed in bfloat16 here")
    names = parse_peers(peers)
    asked = _asked(opened, sizes, routings, profile)
    asked["deadline"] = None if minutes is None else time.time() + 60 * minutes
    run = _Run(opened, chosen, cases, names, sizes, asked)
    out.note(_announcement(run))
    run.all()
    return _document(run)


def _place(device: str | None, ranks: int | None) -> tuple[Device, int]:
    """Decides where to measure and on how many ranks."""
    if device not in (None, "cuda", "cpu"):
        raise ConfigError(f"device {device!r} is unknown; known: cuda, cpu")
    if ranks is not None and ranks < 1:
        raise ConfigError(f"{ranks} ranks cannot be measured")
    num_gpus, reason = count_gpus()
    if device == "cpu" or (device is None and num_gpus == 0):
        if device is None:
            out.note(f"no GPU ({reason}): gloo ranks on the CPU, small sizes")
        return "cpu", ranks or CPU_RANKS
    if num_gpus < (ranks or 1):
        raise ResourceError(
            f"{ranks or 1} ranks need as many GPUs, this machine offers {num_gpus} ({reason})",
            hint="use `--device cpu` for the small sizes",
        )
    return "cuda", ranks or num_gpus


def _sizes(device: Device, length: int | None, rows: int | None, recompute: str | None,
           steps: int | None, rounds: int | None, gate_steps: int | None) -> Sizes:  # fmt: skip
    given: dict[str, Any] = {
        "sequence_length": length,
        "micro_batch": rows,
        "recompute": recompute,
        "steps": steps,
        "rounds": rounds,
        "gate_steps": gate_steps,
    }
    counts = (length, rows, steps, rounds, gate_steps, 1)
    if min(value for value in counts if value is not None) < 1:
        raise ConfigError("bench train needs at least one token, sequence, step and round")
    if (gate_steps or 0) > MOST_GATE_STEPS:
        raise ConfigError(
            f"{gate_steps} steps of the gate are more than {MOST_GATE_STEPS}: ranks that wait for "
            "the whole model so long are taken for dead"
        )
    return SIZES[device]._replace(**{k: v for k, v in given.items() if v is not None})


def _asked(
    model: BenchModel, sizes: Sizes, routings: Sequence[str], profile: bool
) -> dict[str, Any]:
    """Returns what all ranks are told beside their cases."""
    assert model.layout.moe is not None
    on_gpu = sizes.gate_length == SIZES["cuda"].gate_length
    # Real widths and one layer of each kind fit beside nothing else; a small model goes in whole.
    gate_layers = model.first_moe_layer + 1 if on_gpu else None
    return {
        "values": dict(model.values),
        "gate_values": dict(model.cut(gate_layers).values),
        "num_experts": model.layout.moe.num_experts,
        "routings": parse_routings(routings),
        "warm_up": sizes.warm_up,
        "steps": sizes.steps,
        "gate_steps": sizes.gate_steps,
        "profile": profile,
    }


class _Run:
    """The launches of a benchmark, and what has been measured so far."""

    def __init__(
        self,
        model: BenchModel,
        device: Device,
        cases: list[Case],
        peers: list[str],
        sizes: Sizes,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.device, self.cases, self.peers = model, device, cases, peers
        self.sizes, self.settings = sizes, settings
        self.measured = Measured()
        self._turn: list[Any] = []

    def all(self) -> None:
        """Runs every gate and visit; ranks that an engine took down are started again."""
        for num_ranks in sorted({case.num_ranks for case in self.cases}):
            cases = [case for case in self.cases if case.num_ranks == num_ranks]
            visits = plan_visits(cases, self.peers, self.sizes.rounds)
            while visits and not self.measured.is_over:
                self._launch(num_ranks, cases, visits)
                visits = [visit for visit in visits if self._is_open(visit)]

    def _is_open(self, visit: Visit) -> bool:
        measured = self.measured
        dead = visit[:2] in measured.failures or visit.implementation in measured.absent
        return visit not in measured.visits and not dead

    def _launch(self, num_ranks: int, cases: list[Case], visits: list[Visit]) -> None:
        # Only here: a benchmark that cannot start should say so at once.
        from epctl.bench.rank_launch import follow_ranks

        settings = self.settings | {
            "device": self.device,
            "cases": [case.document() for case in cases],
            "gates": [case.key for case in cases if case.key not in self.measured.gates],
            "visits": visits,
        }
        self._turn = []
        with tempfile.TemporaryDirectory(prefix="epctl-bench-") as name:
            events = follow_ranks(
                Path(name), self.device, num_ranks, settings, MODULE, SILENCE_SECONDS
            )
            try:
                for event in events:
                    if "failed" in event:
                        self._fail(event["failed"], event["peak"])
                        return
                    self._take(event)
            except LaunchError as error:
                self._fail(error.message, None)
            finally:
                events.close()  # type: ignore[attr-defined]

    def _take(self, event: dict[str, Any]) -> None:
        if "begin" in event:
            self._turn = event["begin"]
            if self._turn[0] == "gate":
                out.note(f"{self._turn[1]}: gate against transformers' own model, unsharded")
        elif "note" in event:
            out.note(event["note"])
        elif "absent" in event:
            self.measured.absent[event["absent"]] = event["reason"]
        elif "visit" in event:
            self._tell(self.measured.take_visit(event["visit"]))
        elif "gate" in event:
            self.measured.gates[event["gate"]["case"]] = event["gate"]
            _warn_of_few(event["gate"])
        elif "over" in event:
            out.warning("the time is over: not every engine had all of its turns")
            self.measured.is_over = True
        elif "rates" in event:
            self.measured.rates.append(event["rates"])

    def _tell(self, visit: Visit) -> None:
        """Says what a green implementation has reached so far."""
        case = next(case for case in self.cases if case.key == visit.case)
        so_far = dataclasses.replace(self.measured, absent=dict(self.measured.absent))
        rate = self.measured.rates[-1]["matmul_tflops"]
        for row in make_rows(self.model, self.device, [case], [*self.peers], so_far, rate, None):
            if row["implementation"] == visit.implementation and "failed" not in row:
                out.note(
                    f"{visit.case}: {visit.implementation}, {row['routing']}: "
                    f"{row['tokens_per_second']['median']:,.0f} tokens/s a rank, peak "
                    f"{row['peak_gib']:.2f} GiB"
                )

    def _fail(self, reason: str, peak: int | None) -> None:
        """Notes whose turn it was; the others' turns go on in new ranks."""
        if not self._turn or self._turn[0] != "visit":
            where = f"in the gate of {self._turn[1]}" if self._turn else "before the first gate"
            raise LaunchError(f"the ranks failed {where}: {reason}", exit_code=1)
        _, case, implementation, _ = self._turn
        out.warning(f"{case}: {implementation} failed: {reason}")
        self.measured.failures[case, implementation] = (reason, peak)


def _warn_of_few(gate: dict[str, Any]) -> None:
    """Warns where steps in bfloat16 show little: a batch known by heart, a loss that stays."""
    losses = gate["bfloat16_losses"]
    whole: list[float] = losses["whole"]
    if losses["unlearnt"] < len(whole):
        out.warning(
            f"{gate['case']}: from step {losses['unlearnt'] + 1} in bfloat16 on differences are "
            f"over the first loss: the whole model had learnt the batch, {whole[0]:.3f} had become "
            f"{whole[losses['unlearnt']]:.3f}"
        )
    moved = 1 - min(whole) / whole[0] if whole else math.inf
    if moved < LEAST_MOVED:
        out.warning(
            f"{gate['case']}: the loss moved by {moved:.1%} in {len(whole)} steps in bfloat16, too "
            "little to show a wrong update: `--gate-steps 20` takes more"
        )


def _announcement(run: _Run) -> str:
    config = run.cases[0].config
    shape = run.model.shape(config.optim)
    counts = sorted({case.num_ranks for case in run.cases})
    names = ", ".join(("epctl", *run.peers))
    return (
        f"{run.model.name}, {run.model.num_layers} layers, "
        f"{format_count(shape.num_parameters)} parameters on "
        f"{' and '.join(map(str, counts))} {run.device} ranks; {len(run.cases)} cases of {names}, "
        f"{run.sizes.rounds} rounds of {run.sizes.steps} steps a routing"
    )


def _document(run: _Run) -> Result:
    rates = run.measured.rates
    gpu = rates[0]["gpu"] if rates else None
    rate = max(entry["matmul_tflops"] for entry in rates)
    vendor = vendor_flops(gpu)
    sizes = run.sizes
    return {
        "machine": machine_facts(gpu),
        "device": run.device,
        "model": run.model.name,
        "layers": run.model.num_layers,
        "num_parameters": run.model.shape(run.cases[0].config.optim).num_parameters,
        "sequence_length": sizes.sequence_length,
        "micro_batch": sizes.micro_batch,
        "recompute": sizes.recompute,
        "steps": sizes.steps,
        "rounds": sizes.rounds,
        "gate_steps": sizes.gate_steps if run.cases[0].bfloat16 else 0,
        "precision": "bfloat16" if run.cases[0].bfloat16 else "float32",
        "matmul_tflops": rate,
        "vendor_tflops": vendor / 1e12 if vendor else None,
        "flops_formula": FORMULA,
        "memory": "allocated on the GPU" if run.device == "cuda" else "resident, of the process",
        "speed_of": "wall clock" if run.device == "cuda" else "processor time of the slowest rank",
        "settings": {case.key: settings_of(case) for case in run.cases},
        "gates": {key: gate["worst"] for key, gate in run.measured.gates.items()},
        "bfloat16_losses": {
            key: gate["bfloat16_losses"]
            for key, gate in run.measured.gates.items()
            if gate["bfloat16_losses"]["whole"]
        },
        "rows": make_rows(run.model, run.device, run.cases, run.peers, run.measured, rate, vendor),
        "absent": run.measured.absent,
    }
