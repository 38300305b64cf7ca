"""What the simulation of more ranks is fed with: a workload's geometry and this run's own rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epctl.bench.multimodal_sp_modes import sharded
from epctl.bench.multimodal_sp_scaling import Attention, Geometry
from epctl.runtime.sequence.detect import find_parts
from epctl.runtime.sequence.group import SequenceGroup
from epctl.runtime.sequence.route import placeholders
from epctl.runtime.sequence.tower import layer_kinds, linear_cost, tower_inputs

REPEATS = 5


def geometry_of(model: Any, inputs: dict[str, Tensor]) -> Geometry:
    """Returns what cuts and bytes of a workload depend on; one sequence of images or a video."""
    parts = find_parts(model)
    encoder = parts.encoder
    assert encoder is not None
    text, vision = model.config.get_text_config(), encoder.module.config
    grid = inputs.get("image_grid_thw", inputs.get("video_grid_thw"))
    modality = "image" if "pixel_values" in inputs else "video"
    visual = int(placeholders(model.config, inputs["input_ids"], modality).sum())
    size = text.hidden_size // text.num_attention_heads
    size = getattr(text, "head_dim", None) or size
    decoder = Attention(
        text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, (size,) * 3
    )
    heads = getattr(vision, "num_heads", None) or vision.num_attention_heads  # type: ignore[union-attr]
    width = vision.hidden_size // heads  # type: ignore[union-attr, operator]
    tower = Attention(len(encoder.blocks), heads, heads, (width,) * 3)  # type: ignore[arg-type]
    levels = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    found = None if grid is None else tower_inputs(encoder, grid.cpu())
    return Geometry(
        tower,
        decoder,
        inputs["input_ids"].numel(),
        () if found is None else tuple(found.levels()),
        () if found is None else tuple(layer_kinds(encoder, found)),
        linear_cost(encoder),
        len(inputs["pixel_values"]) if found is None else 0,
        visual * text.hidden_size * levels,
        next(model.parameters()).element_size(),
    )


def tower_share(model: Any, inputs: dict[str, Tensor], device: torch.device) -> float:
    """Returns the tower's part of the forward time on one rank, the median of a few."""
    shares = []
    with sharded(model, SequenceGroup(), "aligned"):
        for _ in range(REPEATS):
            at_decoder: list[float] = []
            hook = model.get_decoder().register_forward_pre_hook(
                lambda *_, at=at_decoder: at.append(_now(device)), prepend=True
            )
            start = _now(device)
            with torch.no_grad():
                model(**inputs)
            end = _now(device)
            hook.remove()
            shares.append((at_decoder[0] - start) / (end - start))
    return sorted(shares)[REPEATS // 2]


def exchange_rate(group: SequenceGroup, device: torch.device, num_bytes: int) -> float:
    """Returns the bytes a second that a rank sends to others in an all-to-all. A collective.

    Args:
        num_bytes: that each rank sends to others in one exchange.
    """
    count = max(1, num_bytes // (4 * max(1, group.size - 1)))
    rows = torch.zeros(count * group.size, device=device)
    splits = [count] * group.size
    quiet = group.of("rate")

    def once() -> None:
        quiet.exchange(rows, splits, splits)

    once()
    seconds = sorted(_timed(once, group, device) for _ in range(REPEATS))[REPEATS // 2]
    return 4 * count * (group.size - 1) / seconds


def _timed(run: Callable[[], None], group: SequenceGroup, device: torch.device) -> float:
    dist.barrier(group=group.group)
    start = _now(device)
    run()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def largest_exchange(geometry: Geometry) -> int:
    """Returns the bytes that one layer's rows of queries, keys and values are in all."""
    decoder = geometry.decoder
    width = (decoder.num_heads + 2 * decoder.num_kv_heads) * decoder.dims[0]
    return geometry.num_tokens * width * geometry.element_size
