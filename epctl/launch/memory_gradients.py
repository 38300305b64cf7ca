"""Gradients of a rank, the buckets they pass through, and what ZeRO-3 gathers.

Describes DeepSpeed 0.19.8 under the JSON of ds_config.py: stage_1_and_2.py, stage3.py,
bf16_optimizer.py, unfused_optimizer.py, partitioned_param_coordinator.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from epctl.launch.memory_settings import RankPlan
from epctl.launch.memory_shape import ModelShape, Part
from epctl.launch.memory_state import LocalCounts, local_counts
from epctl.launch.memory_terms import Phase, Place, Term


def gradient_terms(shape: ModelShape, plan: RankPlan) -> Iterator[Term]:
    """Yields gradients and the buffers they pass through."""
    local = local_counts(shape, plan)
    if plan.zero == 3:
        yield from _gradients_zero3(local, plan)
    elif plan.zero == 0:
        yield from _gradients_zero0(local, plan)
    elif plan.offload:
        yield from _gradients_offloaded(local, plan)
    elif plan.uses_bf16_optimizer:
        yield from _gradients_bf16_optimizer(local, plan)
    else:
        yield from _gradients_zero12(local, plan)


def _bucket(local: LocalCounts, plan: RankPlan, phases: Phase, count: int) -> Term:
    elements = plan.engine.reduce_bucket
    formula = f"{count} x {plan.width} B x reduce_bucket_size"
    if plan.on_cpu:
        # The host gives memory to what is written, not to what is asked for.
        elements = min(elements, local.trained("elements"))
        formula += ", as far as gradients fill it"
    return Term(
        "reduction buckets", "engine buffers", count * plan.width * elements, formula,
        phases, values={"elements": elements},
    )  # fmt: skip


def _gradients_zero3(local: LocalCounts, plan: RankPlan) -> Iterator[Term]:
    yield _bucket(local, plan, Phase.ALWAYS, 1)
    place: Place = "host" if plan.offload else "device"
    for part in ("dense", "experts"):
        elements = local.trained("sliced", "experts" if part == "experts" else "dense")
        if elements:
            cut = "edp" if part == "experts" else "ranks"
            yield Term(
                f"gradients, {part}", "gradients", plan.gradient_bytes * elements,
                f"{plan.gradient_bytes} B x trained {part} / {cut}, one flat buffer for good",
                place=place, values={"elements": elements},
            )  # fmt: skip
    if plan.offload:
        elements = local.trained("sliced")
        yield Term(
            "float32 gradients on the host", "gradients", 4 * elements,
            "4 B x trained / ranks: what the host's optimizer reads",
            place="host", values={"elements": elements},
        )  # fmt: skip
    reduced = min(plan.engine.reduce_bucket, local.trained("elements"))
    yield Term(
        "reduce-scatter copy", "engine buffers",
        reduced * (plan.width + plan.gradient_bytes / min(plan.num_ranks, plan.edp)),
        f"{plan.width} B x bucket + {plan.gradient_bytes} B x bucket / ranks: flattened, then cast",
        Phase.BACKWARD, values={"bucket": reduced},
    )  # fmt: skip


def _gradients_zero0(local: LocalCounts, plan: RankPlan) -> Iterator[Term]:
    elements = local.trained("elements")
    yield Term(
        "gradients", "gradients", plan.width * elements,
        f"{plan.width} B x trained, whole on every rank",
        _alive(plan), values={"elements": elements},
    )  # fmt: skip
    bucket = min(500_000_000, elements)
    yield Term(
        "all-reduce copy", "engine buffers", plan.width * bucket * (plan.num_ranks > 1),
        f"{plan.width} B x at most 5e8 gradients, flattened",
        Phase.LAST_BACKWARD, values={"elements": bucket},
    )  # fmt: skip
    if plan.bfloat16:
        yield Term(
            "float32 gradients", "optimizer work", 4 * elements,
            "4 B x trained: every master's gradient at once (FP16_UnfusedOptimizer)",
            Phase.STEP, values={"elements": elements},
        )  # fmt: skip


def _alive(plan: RankPlan) -> Phase:
    """When gradients that backward makes exist: with several micro-steps also before the loss."""
    phases = Phase.LAST_BACKWARD | Phase.STEP
    return phases | Phase.LOSS | Phase.FIRST_BACKWARD if plan.accumulation > 1 else phases


def _gradients_zero12(local: LocalCounts, plan: RankPlan) -> Iterator[Term]:
    # With float32 accumulation under bfloat16 there is one compact buffer a group; otherwise
    # whole Parameters' gradients are copied out of the bucket.
    compact = plan.zero == 2 and plan.gradient_bytes > plan.width
    attribute = "partition" if compact else "touched"
    for part in ("dense", "experts"):
        own: Part = "experts" if part == "experts" else "dense"
        elements = local.trained(attribute, own)
        if elements:
            what = "partition" if compact else "Parameters that its partition touches"
            width = plan.kept_gradient_bytes(part) if compact else plan.gradient_bytes
            yield Term(
                f"gradients, {part}", "gradients", width * elements,
                f"{width} B x trained {part}: the rank's {what}",
                _alive(plan) | (Phase.FIRST_BACKWARD if part == "dense" else Phase(0)),
                values={"elements": elements},
            )  # fmt: skip
    yield _bucket(local, plan, Phase.BACKWARD, plan.engine.num_buckets)
    if plan.zero == 1 and plan.accumulation > 1:
        whole = local.trained("elements")
        yield Term(
            "gradients before reduction", "gradients", plan.width * whole,
            f"{plan.width} B x trained: ZeRO-1 reduces at the last micro-step only",
            Phase.LOSS | Phase.FIRST_BACKWARD, values={"elements": whole},
        )  # fmt: skip


def _gradients_bf16_optimizer(local: LocalCounts, plan: RankPlan) -> Iterator[Term]:
    elements = local.trained("elements")
    yield Term(
        "gradients", "gradients", 4 * elements,
        "4 B x trained, whole on every rank for good (BF16_Optimizer)",
        values={"elements": elements},
    )  # fmt: skip
    yield Term(
        "gradients of the micro-step", "gradients", plan.width * elements,
        f"{plan.width} B x trained, until they are added",
        Phase.LAST_BACKWARD | Phase.STEP, values={"elements": elements},
    )  # fmt: skip
    bucket = min(500_000_000, elements)
    yield Term(
        "all-reduce copy", "engine buffers", 4 * bucket * (plan.num_ranks > 1),
        "4 B x at most 5e8 gradients, flattened",
        Phase.LAST_BACKWARD, values={"elements": bucket},
    )  # fmt: skip


def _gradients_offloaded(local: LocalCounts, plan: RankPlan) -> Iterator[Term]:
    partition = local.trained("partition")
    largest = max(group.largest for group in local.groups)
    yield Term(
        "float32 gradients on the host", "gradients", 4 * partition,
        "4 B x trained / ranks: what the host's optimizer reads",
        place="host", values={"elements": partition},
    )  # fmt: skip
    yield Term(
        "copy-back buffer on the host", "engine buffers", plan.width * (partition + largest),
        f"{plan.width} B x (trained / ranks + the largest Parameter)",
        place="host", values={"elements": partition, "largest": largest},
    )  # fmt: skip
    yield Term(
        "gradient staging", "engine buffers", plan.width * largest,
        f"{plan.width} B x the largest Parameter", values={"largest": largest},
    )  # fmt: skip
    if plan.accumulation > 1 and plan.zero == 2 and plan.gradient_bytes == plan.width:
        touched = local.trained("touched")
        yield Term(
            "accumulated gradients on the host", "gradients", plan.width * touched,
            f"{plan.width} B x Parameters that the rank's partition touches",
            place="host", values={"elements": touched},
        )  # fmt: skip
    if plan.zero == 2 and plan.gradient_bytes > plan.width:
        yield Term(
            "float32 gradients on the device", "gradients", 4 * partition,
            "4 B x trained / ranks: ZeRO-2 adds them up there before they are copied",
            _alive(plan) | Phase.FIRST_BACKWARD, values={"elements": partition},
        )  # fmt: skip
    if plan.zero == 1 and plan.accumulation > 1:
        whole = local.trained("elements")
        yield Term(
            "gradients before reduction", "gradients", plan.width * whole,
            f"{plan.width} B x trained: ZeRO-1 reduces at the last micro-step only",
            Phase.LOSS | Phase.FIRST_BACKWARD, values={"elements": whole},
        )  # fmt: skip
    yield _bucket(local, plan, Phase.BACKWARD, plan.engine.num_buckets)


def gather_terms(shape: ModelShape, plan: RankPlan) -> Iterator[Term]:
    """Yields ZeRO-3's gathered parameters: the layer at work, what runs ahead, what is kept."""
    if plan.zero < 3 or plan.num_ranks == 1:
        return
    local = local_counts(shape, plan)
    gathers_experts = plan.edp > 1 and local.experts > 0
    layers = max(1, shape.num_layers)
    dense_layer = max(0, local.dense - 2 * shape.num_head_elements) / layers
    layer = dense_layer
    if gathers_experts:
        layer += shape.layer_expert_elements / plan.ep
    everything = local.dense + (local.experts if gathers_experts else 0)
    ahead = min(plan.engine.prefetch, everything)
    head = shape.num_head_elements
    # A gathered Parameter stays while its next use is nearer than the reuse distance, so after
    # forward the last half of that distance is still whole: the head first.
    window = plan.engine.reuse_distance / 2
    beyond = max(0.0, window - head)
    share = (local.dense - head + (local.experts if gathers_experts else 0)) / max(
        1, local.dense - head + local.experts
    )
    kept = min(head, window) + min(beyond * share, max(0, everything - head))
    yield Term(
        "gathered for the loss", "engine buffers", plan.width * min(everything, kept + ahead),
        f"{plan.width} B x (head + layers inside half of stage3_max_reuse_distance + prefetch)",
        Phase.LOSS, values={"kept": kept, "prefetch": ahead},
    )  # fmt: skip
    yield Term(
        "gathered for a layer", "engine buffers",
        plan.width * min(everything, layer + ahead + max(0.0, kept - head)),
        f"{plan.width} B x (a layer's dense part"
        + (" and its experts" if gathers_experts else "")
        + " + prefetch + layers inside the reuse distance)",
        Phase.BACKWARD, values={"layer": layer, "prefetch": ahead},
    )  # fmt: skip
