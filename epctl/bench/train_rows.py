"""From what the ranks measured to the rows of `epctl bench train`. Pure; no torch.

A row is one case, routing and implementation. A peer whose losses are not epctl's has no number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from epctl.bench.measure import spread
from epctl.bench.train_cases import OWN, ROUTINGS, Case, Device, Visit
from epctl.bench.train_flops import flops_per_token
from epctl.bench.train_model import BenchModel
from epctl.launch.memory import Prediction, cpu_bytes, predict, relative_error
from epctl.launch.memory_settings import rank_plan
from epctl.output import format_bytes

GIBIBYTE = 2**30
# Relative, of losses and the first gradient norm that an engine's and epctl's steps must share.
# By whether the run is in bfloat16.
LOSS_TOLERANCE = {False: 1e-5, True: 1e-3}
NORM_TOLERANCE = {False: 1e-4, True: 3e-2}
COMPARED_STEPS = 3

Row = dict[str, Any]


@dataclass
class Measured:
    """What events told; `failures` by (case, implementation): the reason, and the peak bytes."""

    gates: dict[str, dict[str, Any]] = field(default_factory=dict)
    visits: dict[Visit, dict[str, Any]] = field(default_factory=dict)
    failures: dict[tuple[str, str], tuple[str, int | None]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    rates: list[dict[str, Any]] = field(default_factory=list)
    is_over: bool = False

    def take_visit(self, event: dict[str, Any]) -> Visit:
        """Keeps what a visit measured; returns whose it was."""
        visit = Visit(event["case"], event["implementation"], event["number"])
        self.visits[visit] = event
        return visit

    def of(self, case: str, implementation: str) -> list[dict[str, Any]]:
        """Returns the visits of an implementation, in the order of their rounds."""
        if (case, implementation) in self.failures:
            return []
        found = [v for v in self.visits if v[:2] == (case, implementation)]
        return [self.visits[visit] for visit in sorted(found, key=lambda v: v.number)]


def make_rows(
    model: BenchModel,
    device: Device,
    cases: Sequence[Case],
    peers: Sequence[str],
    measured: Measured,
    matmul_tflops: float,
    vendor: float | None,
) -> list[Row]:
    """Returns every row, peers gated by their losses; red ones go to `measured.absent`."""
    rows: list[Row] = []
    for case in cases:
        maker = _RowMaker(model, device, case, measured, matmul_tflops, vendor)
        rows += maker.rows((OWN, *peers))
    _add_scaling(rows)
    return rows


class _RowMaker:
    """Rows of one case."""

    def __init__(
        self,
        model: BenchModel,
        device: Device,
        case: Case,
        measured: Measured,
        matmul_tflops: float,
        vendor: float | None,
    ) -> None:
        self.case, self.device, self.measured = case, device, measured
        self.matmul_tflops, self.vendor = matmul_tflops, vendor
        train = case.config.train
        shape = model.shape(case.config.optim)
        self.flops = flops_per_token(shape, train.sequence_length)
        self.tokens = (
            train.micro_batch_size * train.gradient_accumulation_steps * train.sequence_length
        )
        self.prediction = predict(shape, rank_plan(case.config, case.num_ranks, device))

    def rows(self, names: Sequence[str]) -> list[Row]:
        own = self.measured.of(self.case.key, OWN)
        found: list[Row] = []
        for name in names:
            if name in self.measured.absent:
                continue
            failure = self.measured.failures.get((self.case.key, name))
            if failure is not None:
                found.append(self._failed(name, *failure))
                continue
            found += self._measured_rows(name, own)
        # A shared CPU's wall clock says more about its neighbours than about the code.
        of = "processor_seconds" if self.device == "cpu" else "step_seconds"
        for row in found:
            row |= dict(_ratios(row, found, of))
        return found

    def _measured_rows(self, name: str, own: list[dict[str, Any]]) -> list[Row]:
        visits = self.measured.of(self.case.key, name)
        if not visits:
            self.measured.absent[f"{name} at {self.case.key}"] = "the time was over before its turn"
            return []
        gate = self._gate(name, visits, own)
        if gate is None:
            return []
        routings = [r for r in ROUTINGS if r in visits[0]["seconds"]]
        return [self._row(name, routing, visits, gate) for routing in routings]

    def _gate(
        self, name: str, visits: list[dict[str, Any]], own: list[dict[str, Any]]
    ) -> dict[str, float] | None:
        """Returns the errors of the gate; None for a peer whose loss is not epctl's."""
        if name == OWN:
            errors: dict[str, float] = self.measured.gates[self.case.key]["errors"]
            return errors
        where = f"{name} at {self.case.key}"
        if not own:
            self.measured.absent[where] = "epctl itself has no losses here to compare with"
            return None
        errors = {"loss": max(_loss_errors(visits, own, self.case.optim))}
        if self.case.optim == "adamw":  # DeepSpeed's Muon tells the norm of its update
            norms = (visits[0]["first_norm"], own[0]["first_norm"])
            errors["norm"] = _difference(*norms)
        for quantity, tolerances in (("loss", LOSS_TOLERANCE), ("norm", NORM_TOLERANCE)):
            error, allowed = errors.get(quantity, 0.0), tolerances[self.case.bfloat16]
            if not error <= allowed:
                self.measured.absent[where] = (
                    f"gate red: a {quantity} is {error:.1e} off epctl's, {allowed:.0e} allowed"
                )
                return None
        return errors

    def _row(
        self, name: str, routing: str, visits: list[dict[str, Any]], gate: dict[str, float]
    ) -> Row:
        seconds = [value for visit in visits for value in visit["seconds"][routing]]
        used = [value for visit in visits for value in visit["processor_seconds"][routing]]
        rates = spread([self.tokens / value for value in seconds])
        stepping = [value for visit in visits for value in visit["optimizer_seconds"]]
        tflops = self.flops * rates.median / 1e12
        row = self.case.facts() | {
            "routing": routing,
            "implementation": name,
            "tokens_per_second": rates._asdict(),
            "step_seconds": spread(seconds)._asdict(),
            "processor_seconds": spread(used)._asdict(),
            "tflops": tflops,
            "mfu": tflops / self.matmul_tflops,
            "imbalance": max(visit["imbalance"][routing] for visit in visits),
            "timed_steps": float(len(seconds)),
            "build_seconds": min(visit["build_seconds"] for visit in visits),
        }
        first = routing == next(iter(visits[0]["seconds"]))
        if first:
            row["optimizer_seconds"] = spread(stepping)._asdict()
        if self.vendor is not None:
            row["mfu_vendor"] = 1e12 * tflops / self.vendor
        peak = max(visit["peaks"][routing] for visit in visits)
        row |= self._memory(name, peak)
        # A dict: shares of a step are no metrics of their own.
        breakdown = next((v["breakdown"] for v in visits if v["breakdown"]), None)
        if breakdown is not None and first:
            row["breakdown_ms"] = breakdown
        # Lists, so that wording is not part of a row's name.
        return row | {"notes": [visits[0]["note"]], "losses": visits[0]["losses"][routing],
                      "gate": gate}  # fmt: skip

    def _memory(self, name: str, peak: int) -> dict[str, float]:
        found = {"peak_gib": peak / GIBIBYTE}
        if name == OWN:
            predicted = predicted_bytes(self.prediction, self.device)
            found["predicted_gib"] = predicted / GIBIBYTE
            found["memory_error"] = relative_error(predicted, peak)
        return found

    def _failed(self, name: str, reason: str, peak: int | None) -> Row:
        row = self.case.facts() | {"routing": "-", "implementation": name}
        said = [reason]
        if peak is not None:
            said.append(f"{format_bytes(peak)} at its peak")
        if name == OWN:
            predicted = predicted_bytes(self.prediction, self.device)
            said.append(f"{format_bytes(predicted)} predicted")
        return row | {"failed": said, "gate": {}}


def predicted_bytes(prediction: Prediction, device: Device) -> float:
    """Returns the predicted peak as it is measured on the device."""
    return cpu_bytes(prediction) if device == "cpu" else prediction.peak_bytes


def _loss_errors(
    visits: list[dict[str, Any]], own: list[dict[str, Any]], optim: str
) -> Iterator[float]:
    """Yields relative differences of losses that must agree.

    Two AdamWs agree for some steps; two Muons have other polynomials, and only the loss before the
    first update is the same.
    """
    routing = next(iter(own[0]["losses"]))
    count = COMPARED_STEPS if optim == "adamw" else 1
    for visit in visits:
        pairs = zip(visit["losses"][routing], own[0]["losses"][routing], strict=False)
        yield from (_difference(*pair) for pair in itertools.islice(pairs, count))


def _difference(theirs: float, ours: float) -> float:
    """Returns the relative difference; infinite where there is no number."""
    difference = abs(theirs - ours) / max(abs(ours), 1e-30)
    return difference if difference == difference else math.inf


def _ratios(row: Row, rows: list[Row], seconds: str) -> Iterator[tuple[str, float]]:
    """Yields speed and memory of epctl's row over each peer's of the same case and routing."""
    if row["implementation"] != OWN or "failed" in row:
        return
    for other in rows:
        if other["implementation"] == OWN or "failed" in other:
            continue
        if other["routing"] == row["routing"]:
            name = other["implementation"]
            yield f"speed_over_{name}", other[seconds]["median"] / row[seconds]["median"]
            yield f"memory_over_{name}", row["peak_gib"] / other["peak_gib"]


def _add_scaling(rows: list[Row]) -> None:
    """Adds each row's tokens/s a rank over the same row's on the fewest ranks."""
    fewest: dict[tuple[Any, ...], Row] = {}
    measured = [row for row in rows if "failed" not in row]
    for row in sorted(measured, key=lambda row: int(row["ranks"])):
        key = tuple(row[k] for k in ("zero", "optim", "routing", "implementation"))
        first = fewest.setdefault(key, row)
        if len({r["ranks"] for r in rows}) > 1:
            base = first["tokens_per_second"]["median"]
            row["scaling"] = row["tokens_per_second"]["median"] / base
