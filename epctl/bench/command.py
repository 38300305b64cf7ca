"""The bodies of `epctl bench`: what the command line parses, run and rendered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epctl.bench.registry import MoEShape, Routing, parse_routing, parse_shape
from epctl.errors import ConfigError, GateError, ResourceError
from epctl.output import out

# A block that a laptop's CPU finishes in seconds; larger ones are refused there.
LARGEST_CPU_FLOPS = 2e12


def run_moe(
    *,
    shape: str = "moonlight",
    tokens: Sequence[int] = (16384,),
    routings: Sequence[str] = ("natural",),
    peers: Sequence[str] | None = None,
    device: str | None = None,
    warm_up: int = 3,
    rounds: int = 15,
    json_path: Path | None = None,
    png_path: Path | None = None,
) -> dict[str, Any]:
    """Measures one MoE block, renders the result, and returns it as a JSON-ready dict.

    Args:
        shape: a name of `MOE_SHAPES` or `hidden,intermediate,experts,top_k`.
        tokens: block sizes, each measured by itself.
        routings: names of `ROUTINGS`.
        peers: names of `epctl.bench.peers.PEERS`; None is all that run here, () is none.
        device: `cuda` or `cpu`; None takes the GPU when there is one.
        warm_up: untimed calls of each implementation first.
        rounds: timed rounds; each measures every implementation once.
        json_path: also write the document there.
        png_path: also draw TFLOP/s and memory over tokens there.

    Raises:
        ConfigError: an unknown shape, routing or peer, or a count below one.
        ResourceError: no GPU where one is needed.
        GateError: epctl's own result or a gradient is off the float32 reference; no number is
            printed then.
    """
    import torch

    from epctl.bench import runner
    from epctl.bench.report import moe_table, write_json, write_moe_png

    parsed = parse_shape(shape)
    cases = [(count, parse_routing(name)) for name in routings for count in tokens]
    if not cases or min(*tokens, rounds) < 1:
        raise ConfigError("bench moe needs at least one routing, one token and one round")
    chosen = _chosen_device(device, parsed, max(tokens))
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    names = _chosen_peers(peers)
    ceiling = runner.matmul_rate(chosen, dtype)
    result: dict[str, Any] = {
        "benchmark": "moe",
        "machine": runner.machine_facts(chosen),
        "matmul_tflops": ceiling / 1e12,
        "shape_name": shape,
        "shape": parsed._asdict(),
        "rows": [],
        "absent": {},
    }
    for count, routing in cases:
        _run_case(result, parsed, count, routing, chosen, dtype, names, (warm_up, rounds))
    out.data(moe_table(result))
    for name, reason in result["absent"].items():
        out.note(f"{name} did not take part: {reason}")
    out.document(result)
    if json_path is not None:
        write_json(result, json_path)
    if png_path is not None:
        write_moe_png(result, png_path)
    return result


def _chosen_device(name: str | None, shape: MoEShape, most_tokens: int) -> Any:
    import torch

    if name not in (None, "cuda", "cpu"):
        raise ConfigError(f"device {name!r} is unknown; known: cuda, cpu")
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ResourceError("device cuda is asked for, but torch sees no CUDA GPU")
    if name == "cuda" or (name is None and has_gpu):
        return torch.device("cuda")
    flops = 3 * shape.forward_flops(most_tokens)
    if flops > LARGEST_CPU_FLOPS:
        raise ResourceError(
            f"no CUDA GPU here, and {flops / 1e12:.1f} TFLOP a call is too much for a CPU"
            f" ({LARGEST_CPU_FLOPS / 1e12:.0f} is the most)",
            hint="a small block runs anywhere: `epctl bench moe --shape 128,96,8,2 --tokens 512`",
        )
    return torch.device("cpu")


def _chosen_peers(peers: Sequence[str] | None) -> list[str]:
    from epctl.bench.peers import PEERS

    unknown = [name for name in peers or () if name not in PEERS]
    if unknown:
        raise ConfigError(f"peer {unknown[0]!r} is unknown; known: {', '.join(PEERS)}")
    return list(PEERS if peers is None else peers)


def _run_case(
    result: dict[str, Any],
    shape: MoEShape,
    tokens: int,
    routing: Routing,
    device: Any,
    dtype: Any,
    peers: list[str],
    repeats: tuple[int, int],
) -> None:
    from epctl.bench import moe
    from epctl.bench.peers import build

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
        result["rows"].append(row | _rates(row, shape, tokens, result["matmul_tflops"]))


def _gates(result: dict[str, Any], problem: Any, peers: list[str]) -> dict[str, dict[str, float]]:
    """Returns the errors of every implementation whose gate is green; the rest get a reason."""
    from epctl.bench import moe
    from epctl.bench.peers import build

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
