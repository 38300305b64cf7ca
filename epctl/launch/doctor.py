"""The body of `epctl doctor`: this machine, the engine's hazards by probe, a plan's verdict."""

from __future__ import annotations

import importlib.util
import os
import re
import textwrap
import time
from dataclasses import asdict, dataclass
from typing import Any

from epctl.config import ResolvedConfig, flat_values
from epctl.errors import ConfigError, GateError
from epctl.launch import doctor_facts
from epctl.launch.devices import Placement, count_gpus
from epctl.launch.hazards import Hazard, advice, load_hazards
from epctl.launch.nodes import place_job
from epctl.launch.probe_run import ProbeResult, run_probes
from epctl.output import Output, format_bytes, format_seconds

NEEDED_BY_PROBES = ("torch", "deepspeed", "transformers")


@dataclass(frozen=True)
class Diagnosis:
    """A hazard, what its probe said, and whether the plan at hand suffers from it."""

    hazard: Hazard
    result: ProbeResult
    endangers_plan: bool

    def document(self) -> dict[str, Any]:
        """Returns the entry of `hazards` in `epctl doctor --json`."""
        detail = self.result.seen
        verdict = self.result.verdict
        return {
            "id": self.hazard.id,
            "title": self.hazard.title,
            "verdict": f"{verdict}: {detail}" if verdict == "not probed here" else verdict,
            "action": advice(self.hazard, verdict),
            "upstream": list(self.hazard.upstream),
            "seen": detail,
            "endangers_plan": self.endangers_plan,
            "seconds": self.result.seconds,
        }


def run_doctor(
    resolved: ResolvedConfig, output: Output, *, only: list[str] | None, probes: bool
) -> None:
    """Reports on machine and engine; raises GateError if a live hazard endangers the plan.

    Args:
        only: ids of the hazards to probe; None is all of them.
        probes: False reports on the machine alone.
    """
    started = time.monotonic()
    hazards = choose_hazards(only)
    placement = place_job(resolved.config, count_gpus())
    report = machine_report(placement)
    show_machine(report, output)
    plan = plan_facts(resolved, placement)
    diagnoses = diagnose(hazards, plan, output) if probes else []
    seconds = round(time.monotonic() - started, 1)
    documents = [diagnosis.document() for diagnosis in diagnoses]
    output.document(report | {"hazards": documents, "seconds": seconds})
    if diagnoses:
        output.text("\n".join(hazard_lines(diagnoses)))
    output.note(f"{len(diagnoses)} hazards probed, {format_seconds(seconds)} in all")
    _conclude(diagnoses, output)


def choose_hazards(only: list[str] | None) -> list[Hazard]:
    """Returns the hazards asked for; raises ConfigError for an unknown id."""
    known = load_hazards()
    unknown = [hazard_id for hazard_id in only or [] if hazard_id not in known]
    if unknown:
        raise ConfigError(f"unknown hazard `{unknown[0]}`", hint=f"valid: {', '.join(known)}")
    return [known[hazard_id] for hazard_id in only or known]


def machine_report(placement: Placement) -> dict[str, Any]:
    """Returns the part of the report that needs no torch."""
    return {
        "versions": doctor_facts.versions(),
        "machine": doctor_facts.machine(),
        "gpus": doctor_facts.gpus(),
        "links": doctor_facts.links(),
        "placement": placement.reason,
        "checks": [asdict(check) for check in doctor_facts.checks(os.environ)],
        "environment": doctor_facts.relevant_environment(os.environ),
    }


def plan_facts(resolved: ResolvedConfig, placement: Placement) -> dict[str, Any]:
    """Returns what hazards are judged by: settings, where and in what precision it would run."""
    bfloat16 = resolved.config.train.uses_bfloat16(placement.device)
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    return flat_values(resolved.config) | {
        "plan.device": placement.device,
        "plan.precision": "bfloat16" if bfloat16 else "float32",
        "environment.stale_build_lock": bool(doctor_facts.build_locks(os.environ)),
        "environment.arch_list_suffix": re.search(r"\d[a-z]", arch_list) is not None,
    }


def diagnose(hazards: list[Hazard], plan: dict[str, Any], output: Output) -> list[Diagnosis]:
    """Probes the hazards, saying how far it is."""
    absent = [name for name in NEEDED_BY_PROBES if importlib.util.find_spec(name) is None]
    if absent:
        output.warning(f"no probe can run: {', '.join(absent)} not installed")
        reason = "needs the `train` extra"
        results = [ProbeResult(h.id, "not probed here", reason, 0.0) for h in hazards]
    else:
        output.note(f"starting two gloo ranks for {len(hazards)} probes")
        results = run_probes([h.id for h in hazards], _Progress(len(hazards), output))
    by_id = {result.id: result for result in results}
    return [
        Diagnosis(h, by_id[h.id], by_id[h.id].verdict == "live" and h.endangers(plan))
        for h in hazards
    ]


class _Progress:
    """One line a probe on stderr."""

    def __init__(self, total: int, output: Output) -> None:
        self.total, self.output, self.count = total, output, 0

    def __call__(self, result: ProbeResult) -> None:
        self.count += 1
        width = len(str(self.total))
        self.output.note(
            f"[{self.count:>{width}}/{self.total}] {result.id}: {result.verdict} "
            f"({format_seconds(result.seconds)})"
        )


def show_machine(report: dict[str, Any], output: Output) -> None:
    """Writes the machine's part as text."""
    memory = format_bytes(report["machine"]["memory_bytes"])
    lines = [
        "versions     " + ", ".join(f"{name} {v}" for name, v in report["versions"].items()),
        f"machine      {report['machine']['system']}, {report['machine']['num_cores']} cores, "
        f"{memory}",
        "tools        "
        + ", ".join(f"{n}: {'yes' if y else 'no'}" for n, y in report["machine"]["tools"].items()),
        f"ranks        {report['placement']}",
    ]
    for index, gpu in enumerate(report["gpus"]):
        lines.append(f"GPU {index}        " + ", ".join(gpu.values()))
    lines += [f"             {line}" for line in report["links"]]
    for check in report["checks"]:
        hint = f" (hint: {check['hint']})" if check["hint"] else ""
        lines.append(f"{check['status']:<12} {check['name']}: {check['value']}{hint}")
    lines += [f"variable     {name}={value}" for name, value in report["environment"].items()]
    output.text("\n".join(lines))


def hazard_lines(diagnoses: list[Diagnosis]) -> list[str]:
    """Returns a paragraph a hazard: verdict, what was seen, what epctl does."""
    lines = []
    for diagnosis in diagnoses:
        hazard, result = diagnosis.hazard, diagnosis.result
        mark = "  ENDANGERS THIS PLAN" if diagnosis.endangers_plan else ""
        lines += ["", f"{result.verdict}: {hazard.id} ({', '.join(hazard.upstream)}){mark}"]
        for text in (hazard.title, f"seen: {result.seen}", advice(hazard, result.verdict)):
            lines += textwrap.wrap(text, 96, initial_indent="    ", subsequent_indent="      ")
    return lines


def _conclude(diagnoses: list[Diagnosis], output: Output) -> None:
    for diagnosis in diagnoses:
        if diagnosis.result.verdict == "failed":
            output.warning(f"probe {diagnosis.hazard.id} failed: {diagnosis.result.seen}")
    dangers = [d.hazard for d in diagnoses if d.endangers_plan]
    if dangers:
        first = dangers[0]
        raise GateError(
            f"{len(dangers)} live hazards that epctl cannot avoid for this plan, first "
            f"`{first.id}`: {first.title}; {first.consequence}",
            hint=f"change the plan; see `docs/hazards.md` ({', '.join(first.upstream)})",
        )
