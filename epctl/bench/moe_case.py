"""`epctl bench moe` as a case: gate, measurement, table and picture of one MoE block and its peers.

What a block is, how it is checked and timed is in moe.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from epctl.bench import moe
from epctl.bench.device import choose_device, gpu_name, matmul_rate
from epctl.bench.machine import machine_facts
from epctl.bench.moe_shapes import MoEShape, Routing, parse_routing, parse_shape
from epctl.bench.peers import PEERS, build
from epctl.bench.registry import Result
from epctl.bench.report import cell
from epctl.errors import ConfigError, GateError
from epctl.launch.memory_activations import moe_block_bytes
from epctl.output import out

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SMALL = "epctl bench moe --shape 128,96,8,2 --tokens 512"

COLUMNS = (
    ("routing", "routing"),
    ("tokens", "tokens"),
    ("of", "implementation"),
    ("fwd ms", "forward_ms"),
    ("TFLOP/s", "forward_tflops"),
    ("fwd+bwd ms", "both_ms"),
    ("TFLOP/s", "both_tflops"),
    ("of peak", "of_floor"),
    ("saved MiB", "saved_mib"),
    ("peak MiB", "peak_mib"),
)


def measure(
    *,
    shape: str = "moonlight",
    tokens: Sequence[int] = (16384,),
    routings: Sequence[str] = ("natural",),
    peers: Sequence[str] | None = None,
    device: str | None = None,
    warm_up: int = 3,
    rounds: int = 15,
) -> Result:
    """Measures one MoE block for each of `routings` and `tokens`.

    Args:
        shape: a name of `MOE_SHAPES` or `hidden,intermediate,experts,top_k`.
        tokens: block sizes, each measured by itself.
        routings: names of `ROUTINGS`.
        peers: names of `epctl.bench.peers.PEERS`; None is all that run here, () is none.
        device: `cuda` or `cpu`; None takes the GPU when there is one.
        warm_up: untimed calls of each implementation first.
        rounds: timed rounds; each measures every implementation once.

    Raises:
        ConfigError: an unknown shape, routing or peer, or a count below one.
        ResourceError: no GPU where one is needed.
        GateError: epctl's own result or a gradient is off the float32 reference.
    """
    parsed = parse_shape(shape)
    blocks = [(count, parse_routing(name)) for name in routings for count in tokens]
    if not blocks or min(*tokens, rounds) < 1:
        raise ConfigError("bench moe needs at least one routing, one token and one round")
    chosen = choose_device(device, 3 * parsed.forward_flops(max(tokens)), small=SMALL)
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    names = _chosen_peers(peers)
    result: Result = {
        "machine": machine_facts(gpu_name(chosen)),
        "matmul_tflops": matmul_rate(chosen, dtype) / 1e12,
        "shape_name": shape,
        "shape": parsed._asdict(),
        "rows": [],
        "absent": {},
    }
    for count, routing in blocks:
        _measure_block(result, parsed, count, routing, chosen, dtype, names, (warm_up, rounds))
    return result


def _chosen_peers(peers: Sequence[str] | None) -> list[str]:
    unknown = [name for name in peers or () if name not in PEERS]
    if unknown:
        raise ConfigError(f"peer {unknown[0]!r} is unknown; known: {', '.join(PEERS)}")
    return list(PEERS if peers is None else peers)


def _measure_block(
    result: Result,
    shape: MoEShape,
    tokens: int,
    routing: Routing,
    device: torch.device,
    dtype: torch.dtype,
    peers: list[str],
    repeats: tuple[int, int],
) -> None:
    out.note(f"{routing} routing, {tokens:,} tokens: gate, then {repeats[1]} rounds")
    problem = moe.make_problem(shape, tokens, routing, device, dtype)
    errors = _gates(result, problem.first(moe.GATE_TOKENS), peers)
    if "epctl" not in errors:
        raise GateError(f"{routing} routing, {tokens:,} tokens: {result['absent']['epctl']}")
    built = [build(name, problem) for name in errors]
    passed = [item for item in built if not isinstance(item, str)]
    measured = moe.measure(passed, problem, warm_up=repeats[0], rounds=repeats[1])
    facts = {"routing": routing, "tokens": tokens, "imbalance": moe.load_imbalance(problem)}
    for item in passed:
        row = {**facts, "implementation": item.name, "note": item.note, **measured[item.name]}
        row["gate"] = errors[item.name]
        if item.name == "epctl" and "peak_mib" in row:
            row |= _foreseen(row["peak_mib"], shape, tokens)
        result["rows"].append(row | _rates(row, shape, tokens, result["matmul_tflops"]))


def _gates(result: Result, problem: moe.Problem, peers: list[str]) -> dict[str, dict[str, float]]:
    """Returns the errors of every implementation whose gate is green; the rest get a reason."""
    wanted = moe.reference_results(problem)
    green: dict[str, dict[str, float]] = {}
    for name in ("epctl", *peers):
        built = build(name, problem)
        if isinstance(built, str):
            result["absent"][name] = built
            continue
        try:
            errors = moe.gate_errors(built, problem, wanted)
        except Exception as error:
            # A peer may fail in any way of its own; the run goes on without it.
            result["absent"][name] = f"{type(error).__name__}: {error}"[:200]
            continue
        worst = max(errors, key=lambda key: math.inf if math.isnan(errors[key]) else errors[key])
        if errors[worst] <= moe.GATE_TOLERANCE:
            green[name] = errors
        else:
            result["absent"][name] = (
                f"gate red: {worst} is {errors[worst]:.1e} off, {moe.GATE_TOLERANCE:.0e} allowed"
            )
    return green


def _foreseen(peak_mib: float, shape: MoEShape, tokens: int) -> dict[str, float]:
    """Returns the peak that the memory model predicts, beside the measured one."""
    _, peak = moe_block_bytes(tokens=tokens, **shape._asdict())
    error = peak / 2**20 / peak_mib - 1
    out.note(f"peak memory {peak_mib:,.0f} MiB, {peak / 2**20:,.0f} predicted ({error:+.1%})")
    return {"predicted_peak_mib": peak / 2**20, "predicted_peak_error": error}


def _rates(
    row: dict[str, Any], shape: MoEShape, tokens: int, matmul_tflops: float
) -> dict[str, float]:
    forward_teraflop = shape.forward_flops(tokens) / 1e12
    both_tflops = 3 * forward_teraflop / (row["both_ms"]["median"] * 1e-3)
    return {
        "forward_tflops": forward_teraflop / (row["forward_ms"]["median"] * 1e-3),
        "both_tflops": both_tflops,
        "of_floor": both_tflops / matmul_tflops,
    }


def table(result: Result) -> Table:
    """Returns the rows for a terminal; times are medians ± half of the 10 % to 90 % range."""
    from rich.table import Table

    shape = ", ".join(f"{key} {value}" for key, value in result["shape"].items())
    rows = Table(title=f"MoE block, {shape}; {result['machine']['device']}", title_justify="left")
    for title, _ in COLUMNS:
        rows.add_column(title, justify="left" if title in ("routing", "of") else "right")
    for row in result["rows"]:
        rows.add_row(*(cell(row.get(key)) for _, key in COLUMNS))
    return rows


def draw(result: Result, figure: Figure) -> None:
    """Draws TFLOP/s and peak memory over tokens, a line for each implementation and routing."""
    figure.set_size_inches(12, 4.5)
    rate, memory = figure.subplots(1, 2)
    for (routing, name), rows in _lines(result["rows"]).items():
        tokens = [row["tokens"] for row in rows]
        label = f"{name}, {routing}"
        style = "-" if name == "epctl" else "--"
        rate.plot(tokens, [row["both_tflops"] for row in rows], style, marker="o", label=label)
        if all("peak_mib" in row for row in rows):
            memory.plot(tokens, [row["peak_mib"] for row in rows], style, marker="o", label=label)
    for axes, title in ((rate, "forward+backward, TFLOP/s"), (memory, "peak above weights, MiB")):
        axes.set(title=title, xlabel="tokens", ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    rate.legend(fontsize=8)
    figure.suptitle(f"{result['shape_name']}, {result['machine']['device']}")


def _lines(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["routing"], row["implementation"]), []).append(row)
    return {key: sorted(line, key=lambda row: int(row["tokens"])) for key, line in lines.items()}
