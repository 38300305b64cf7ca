"""`epctl train` without `--ep` or `--zero`: the planner's first answer, and what it foresees.

What somebody chose is never changed: the planner fills in the rest. The tokens of a step stay what
the settings say; only their cut into micro-batches may change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from epctl.config import ResolvedConfig, RunConfig
from epctl.launch.cost_rates import load_rates
from epctl.launch.devices import Placement, gpu_memory, host_memory
from epctl.launch.memory import Prediction, cpu_bytes, predict, relative_error
from epctl.launch.memory_default import default_model
from epctl.launch.memory_settings import rank_plan
from epctl.launch.memory_shape import ModelShape, model_shape
from epctl.launch.memory_terms import PHASES
from epctl.launch.plan_command import nothing_fits
from epctl.launch.planner import Option, Request, make_request, plan
from epctl.layout.detect import detect
from epctl.layout.model import ModelLayout
from epctl.layout.source import ModelSource
from epctl.output import Output, format_bytes

SOURCE = "plan"
FILE_NAME = "prediction.json"
# What makes a plan necessary where it is not stated.
DECIDED = ("parallel.ep", "parallel.zero")
# What the planner fills in, too, unless somebody chose it; on CPU only the two above.
FILLED = (
    "optim.offload",
    "train.activation_checkpointing",
    "moe.recompute",
    "train.micro_batch_size",
)
# A share of the host's free memory is left to everything else.
HOST_SHARE = 0.9


def plan_run(
    resolved: ResolvedConfig, placement: Placement, source: ModelSource | None, output: Output
) -> ResolvedConfig:
    """Returns the settings with EP, ZeRO stage and what hangs on them chosen, and says so.

    Raises ResourceError if nothing fits the GPUs; on a host that is a warning.
    """
    if all(resolved.is_given(key) for key in DECIDED):
        return resolved
    memory = _memory_of_a_rank(placement)
    if memory is None:
        output.note("no plan: the driver does not tell the GPUs' memory; defaults it is")
        return resolved
    request = _request(resolved, placement, source, memory)
    answer = plan(request)
    if answer.best is None and placement.device == "cpu":
        # The host may swap, and what is free now may not be what is free then.
        output.warning(nothing_fits(request, answer).message)
        return resolved
    if answer.best is None:
        error = nothing_fits(request, answer)
        anyway = "state `--ep` and `--zero` to try all the same"
        error.hint = f"{error.hint}; or {anyway}" if error.hint else anyway
        raise error
    return _taken(resolved, answer.best, request, output)


def _memory_of_a_rank(placement: Placement) -> float | None:
    if placement.device == "cuda":
        return gpu_memory()
    return HOST_SHARE * host_memory() / placement.ranks_per_node


def _request(
    resolved: ResolvedConfig, placement: Placement, source: ModelSource | None, memory: float
) -> Request:
    config = resolved.config
    shape, layout = run_shape(config, source)
    on_cpu = placement.device == "cpu"
    kept = [key for key in FILLED if on_cpu or resolved.is_given(key)]
    values = {key: _value(config, key) for key in kept}
    values |= {key: _value(config, key) for key in DECIDED if resolved.is_given(key)}
    train = config.train
    rows = train.micro_batch_size * train.gradient_accumulation_steps
    sp = config.parallel.sp
    return make_request(
        shape, layout, config,
        num_ranks=placement.num_ranks,
        memory_bytes=memory,
        num_nodes=placement.num_nodes,
        host_bytes=host_memory(),
        device=placement.device,
        tokens_per_step=rows * train.sequence_length * (placement.num_ranks // sp),
        optimizers=("adamw",) if config.optim.name == "adamw" else ("muon",),
        fixed=values | {"parallel.sp": sp},
        rates=load_rates(),
        patches=shape.usual_patches(train.sequence_length),
    )  # fmt: skip


def _value(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _taken(
    resolved: ResolvedConfig, best: Option, request: Request, output: Output
) -> ResolvedConfig:
    """Returns the settings with the option's values where they differ or were open."""
    changed = [key for key in DECIDED if not resolved.is_given(key)]
    keys = (*FILLED, "train.gradient_accumulation_steps")
    changed += [k for k in keys if _value(best.config, k) != _value(resolved.config, k)]
    sources = dict(resolved.sources) | dict.fromkeys(changed, SOURCE)
    kept = resolved.config.parallel.num_ranks
    config = best.config
    parallel = config.parallel.model_copy(update={"num_ranks": kept})
    config = config.model_copy(update={"parallel": parallel})
    said = ", ".join(f"{key.partition('.')[2]} {_value(config, key)}" for key in changed)
    unit = "GPU" if request.device == "cuda" else "rank"
    output.note(
        f"plan: {said} ({format_bytes(best.needed_bytes)} predicted of "
        f"{format_bytes(request.memory_bytes)} a {unit}); `--ep` and `--zero` decide otherwise"
    )
    return ResolvedConfig(config, sources)


def run_shape(config: RunConfig, source: ModelSource | None) -> tuple[ModelShape, ModelLayout]:
    """Returns the shape and layout of what a run trains; without a source the embedded model."""
    if source is None:
        source, layout = default_model()
    else:
        layout = detect(source)
    return model_shape(layout, source.config, config.optim, config.train.parameters), layout


def predict_run(config: RunConfig, placement: Placement, source: ModelSource | None) -> Prediction:
    """Returns what a rank of a run will hold. Raises ConfigError for settings that are refused."""
    shape, _ = run_shape(config, source)
    patches = shape.usual_patches(config.train.sequence_length) if config.data.train else 0
    run = rank_plan(config, placement.num_ranks, placement.device, patches=patches)
    return predict(shape, run)


def rank_bytes(prediction: Prediction) -> dict[str, int]:
    """Returns the state of a rank by kind, as the train panel counts it afterwards."""
    parts = {
        "parameters": prediction.of("parameters"),
        "masters": prediction.of("masters"),
        "optimizer_state": prediction.of("optimizer state"),
    }
    return {name: round(value) for name, value in {**parts, "total": sum(parts.values())}.items()}


def prediction_document(prediction: Prediction, device: str) -> dict[str, Any]:
    """Returns what the run folder keeps, for the comparison with the measured peak."""
    on_cpu = device == "cpu"
    peak = cpu_bytes(prediction) if on_cpu else prediction.peak_bytes
    return {
        "peak_bytes": round(peak),
        "peak_phase": PHASES[prediction.peak_phase],
        "host_bytes": round(prediction.host_bytes),
        "needed_bytes": round(peak if on_cpu else prediction.needed_bytes),
        "state_bytes": rank_bytes(prediction),
        "measured_as": "resident memory of the process" if on_cpu else "allocated on the GPU",
    }


def memory_text(document: dict[str, Any]) -> str:
    """Returns the predicted peak of a rank in a line."""
    host = f", {format_bytes(document['host_bytes'])} on the host" if document["host_bytes"] else ""
    return (
        f"peak {format_bytes(document['peak_bytes'])} predicted ({document['measured_as']}; "
        f"in: {document['peak_phase']}){host}"
    )


def write_prediction(folder: Path, document: dict[str, Any]) -> None:
    """Puts the prediction into the run folder."""
    (folder / FILE_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_prediction(folder: Path) -> dict[str, Any] | None:
    """Returns the prediction of a run folder, None where there is none."""
    try:
        document: dict[str, Any] = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document


def compared_text(event: dict[str, Any]) -> str:
    """Returns prediction beside measurement in a line."""
    return (
        f"peak memory {format_bytes(event['measured_bytes'])} ({event['measured_as']}), "
        f"{format_bytes(event['predicted_bytes'])} predicted ({event['error']:+.0%})"
    )


def compared(document: dict[str, Any], measured: int) -> dict[str, Any]:
    """Returns prediction, measurement and relative error, for metrics.jsonl and the summary."""
    return {
        "predicted_bytes": document["peak_bytes"],
        "measured_bytes": measured,
        "error": round(relative_error(document["peak_bytes"], measured), 4),
        "measured_as": document["measured_as"],
        "peak_phase": document["peak_phase"],
    }
