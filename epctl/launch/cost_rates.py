"""How fast a machine is: from results of `epctl bench` kept on this one, else documented defaults.

Each rate carries where it is from, so that a plan can say which of its numbers were measured here.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# (rows of an expert on average, FLOP/s of forward and backward): benchmarks/moe_h100_202611.md.
H100_EXPERTS = ((48, 36e12), (192, 147e12), (768, 459e12), (1536, 507e12), (6144, 516e12))
DEFAULT_SOURCES: Mapping[str, str] = {
    "matmul": "one H100, benchmarks/moe_h100_202611.md: 787 TFLOP/s, 8192^3 in bf16",
    "experts": "one H100, benchmarks/moe_h100_202611.md: 36 to 516 TFLOP/s by rows of an expert",
    "memory": "one H100: device copy 3.02 TB/s",
    "dense_share": "assumed: dense layers reach 0.6 of the matmul rate",
    "attention": "assumed: 350 TFLOP/s of attention, forward and backward",
    "newton_schulz": "one H100, benchmarks/muon_h100_202611.md: 701 TFLOP/s of the FLOPs of whole "
    "products, 64 experts",
    "nvlink": "assumed: 300 GB/s a GPU inside a node",
    "network": "assumed: 45 GB/s a GPU between nodes (a 400 Gb/s card each)",
    "host_link": "assumed: 25 GB/s a GPU to host memory",
    "host_step": "assumed: 10 GB/s a rank of optimizer state on the host",
}


@dataclass(frozen=True)
class Rates:
    """FLOP/s and bytes/s of one GPU and what joins it to others."""

    matmul: float = 787e12
    experts: tuple[tuple[float, float], ...] = H100_EXPERTS
    memory: float = 3.0e12
    dense_share: float = 0.6
    attention: float = 350e12
    newton_schulz: float = 701e12
    nvlink: float = 300e9
    network: float = 45e9
    host_link: float = 25e9
    host_step: float = 10e9
    sources: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_SOURCES))

    def expert_flops(self, rows: float) -> float:
        """Returns the grouped GEMMs' FLOP/s at so many rows an expert, between measured points."""
        points = self.experts
        if rows <= points[0][0]:
            return points[0][1] * max(rows, 1.0) / points[0][0]
        for (low, slow), (high, fast) in itertools.pairwise(points):
            if rows <= high:
                share = math.log(rows / low) / math.log(high / low)
                return slow + share * (fast - slow)
        return points[-1][1]

    @property
    def measured(self) -> list[str]:
        """Returns the names of rates that were measured on this machine."""
        return [name for name, text in self.sources.items() if text.startswith("measured")]


def store_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns where results of `epctl bench` are kept for later plans."""
    cache = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "epctl" / "bench"


def remember(document: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> None:
    """Keeps a GPU's benchmark result for the planner; a cache that cannot be written is no failure.

    A CPU's says nothing about the GPUs that are planned for.
    """
    if "driver" not in document.get("machine", {}):
        return
    folder = store_folder(environment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{document['benchmark']}.json"
        path.write_text(json.dumps(document) + "\n", encoding="utf-8")
    except OSError:
        return


def load_rates(files: Iterable[Path] = (), environment: Mapping[str, str] = os.environ) -> Rates:
    """Returns the rates: of `files`, else of what bench left on this machine, else the defaults.

    Results of a CPU say nothing about the GPUs that are planned for and are left out.
    """
    kept = store_folder(environment)
    given = list(files) or [kept / "moe.json", kept / "muon.json"]
    rates = Rates()
    for path in given:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(document, dict) and "driver" in document.get("machine", {}):
            rates = _with_muon(_with_moe(rates, document), document)
    return rates


def _with_moe(rates: Rates, document: Mapping[str, Any]) -> Rates:
    """Returns rates with what an `epctl bench moe` document measured."""
    shape = document.get("shape", {})
    if document.get("benchmark") != "moe" or not shape:
        return rates
    points = sorted(
        (row["tokens"] * shape["top_k"] / shape["num_experts"], row["both_tflops"] * 1e12)
        for row in document["rows"]
        if row["implementation"] == "epctl" and row["routing"] == "natural"
    )
    where = _where(document)
    sources = dict(rates.sources) | {"matmul": f"{where}, epctl bench moe"}
    if points:
        sources["experts"] = f"{where}, epctl bench moe, {len(points)} sizes"
    return replace(
        rates,
        matmul=float(document["matmul_tflops"]) * 1e12,
        experts=_rising(points) if points else rates.experts,
        sources=sources,
    )


def _with_muon(rates: Rates, document: Mapping[str, Any]) -> Rates:
    """Returns rates with what an `epctl bench muon` document measured, of its longest batch."""
    if document.get("benchmark") != "muon":
        return rates
    rows = [row for row in document["rows"] if row["implementation"] == "epctl"]
    if not rows:
        return rates
    longest = max(rows, key=lambda row: float(row["ms"]["median"]))
    source = f"{_where(document)}, epctl bench muon, {longest['batch']}"
    return replace(
        rates,
        newton_schulz=float(longest["tflops"]) * 1e12,
        sources=dict(rates.sources) | {"newton_schulz": source},
    )


def _where(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    return f"measured on this machine: {machine['device']}, {machine.get('date', 'no date')}"


def _rising(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Extends one or few measured sizes by the shape of the default curve."""
    if len(points) > 2:
        return tuple(points)
    rows, flops = points[-1]
    scale = flops / Rates().expert_flops(rows)
    return tuple((n, scale * rate) for n, rate in H100_EXPERTS)
