"""The memory rows of `epctl inspect`: what a GPU holds of a model on a few sizes of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from epctl.config import MODEL_DEFAULTS, RunConfig, resolve_config
from epctl.launch.memory import predict
from epctl.launch.memory_settings import rank_plan
from epctl.launch.memory_shape import ModelShape, model_shape
from epctl.launch.planner_rules import model_limits, why_illegal
from epctl.layout.model import ModelLayout

NUM_GPUS = (1, 8, 64, 512)
# Of a model that takes images, how a node shares one long sample.
SEQUENCE_SIZES = (1, 2, 4, 8)
NODE = 8
LONG_SEQUENCE = 65_536


def memory_rows(layout: ModelLayout, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one row a job size: ZeRO-3, train's defaults with MODEL, the largest ep up to 8.

    With a vision tower half of the tokens are an image's, and a node is shown with one long sample
    at each sp, too.
    """
    if layout.decoder is None:
        return []
    flags = {"model.reference": layout.id, "parallel.zero": 3}
    base = resolve_config(flags=flags).config
    shape = model_shape(layout, config, base.optim)
    rows = [_row(shape, layout, base, gpus) for gpus in NUM_GPUS]
    if layout.vision is not None:
        train = base.train.model_copy(update={"sequence_length": LONG_SEQUENCE})
        long = base.model_copy(update={"train": train})
        legal = (sp for sp in SEQUENCE_SIZES if sp in layout.sp_sizes)
        rows += [_row(shape, layout, long, NODE, sp) for sp in legal]
    return [row for row in rows if row is not None]


def _row(
    shape: ModelShape, layout: ModelLayout, base: RunConfig, gpus: int, sp: int = 1
) -> dict[str, Any] | None:
    limits = model_limits(layout)
    for ep in sorted(layout.ep_sizes or (1,), reverse=True):
        parallel = base.parallel.model_copy(update={"ep": ep, "sp": sp})
        config = base.model_copy(update={"parallel": parallel})
        if ep > 8 or why_illegal(config, gpus, "cuda", limits) is not None:
            continue
        patches = shape.usual_patches(base.train.sequence_length)
        found = predict(shape, rank_plan(config, gpus, "cuda", patches=patches))
        return {
            "gpus": gpus,
            "ep": ep,
            "sp": sp,
            "sequence_length": base.train.sequence_length,
            "zero": 3,
            "state_bytes": round(found.state_bytes),
            "peak_bytes": round(found.peak_bytes),
            "needed_bytes": round(found.needed_bytes),
        }
    return None


def assumptions() -> str:
    """Returns what the rows take for granted, in a line."""
    length = MODEL_DEFAULTS["train.sequence_length"]
    return f"ZeRO-3, Muon, one sequence of {length:,} tokens, full recomputation"
