"""Seconds of one optimizer step, by what takes them. Pure arithmetic over rates; it ranks plans.

Nothing is fitted to a run. What is not modelled: launch gaps of small batches, stragglers beyond
the imbalance factor, and the overlap of dispatch with compute, which the runtime does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

from epctl.launch.cost_rates import Rates
from epctl.launch.memory_activations import distinct_ranks, layer_bytes
from epctl.launch.memory_settings import RankPlan
from epctl.launch.memory_shape import ModelShape
from epctl.launch.memory_state import local_counts

# Share of ZeRO's collectives that compute hides (overlap_comm, prefetch): assumed.
HIDDEN_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one optimizer step; `tokens` are those of all ranks."""

    experts: float
    dense: float
    attention: float
    memory_bound: float
    dispatch: float
    gathers: float
    muon: float
    adamw: float
    offload: float
    sequence: float
    tokens: int
    num_ranks: int

    @property
    def seconds(self) -> float:
        return sum(self.parts().values())

    @property
    def tokens_per_second_per_rank(self) -> float:
        return self.tokens / self.seconds / self.num_ranks

    def parts(self) -> dict[str, float]:
        """Returns the seconds of each part."""
        names = ("experts", "dense", "attention", "memory_bound", "dispatch", "gathers", "muon")
        return {n: getattr(self, n) for n in (*names, "adamw", "offload", "sequence")}


def step_cost(shape: ModelShape, plan: RankPlan, rates: Rates, ranks_per_node: int) -> StepCost:
    """Returns the predicted seconds of a step."""
    count = plan.accumulation
    return StepCost(
        experts=count * _experts(shape, plan, rates),
        dense=count * _dense(shape, plan, rates),
        attention=count * _attention(shape, plan, rates),
        memory_bound=count * _memory_bound(shape, plan, rates),
        dispatch=count * _dispatch(shape, plan, rates, ranks_per_node),
        gathers=_gathers(shape, plan, rates, ranks_per_node),
        muon=_muon(shape, plan, rates, ranks_per_node),
        adamw=_adamw(shape, plan, rates),
        offload=_offload(shape, plan, rates),
        sequence=count * _sequence(shape, plan, rates, ranks_per_node),
        tokens=plan.tokens_per_step,
        num_ranks=plan.num_ranks,
    )


def link(size: int, ranks_per_node: int, rates: Rates) -> float:
    """Returns the bytes/s of a collective over `size` consecutive ranks."""
    return rates.nvlink if size <= ranks_per_node else rates.network


def _again(shape: ModelShape, plan: RankPlan, part: str) -> float:
    """The share of decoder layers whose `part` is made again; of whole layers all but the last."""
    if plan.recomputes_layers and (part, plan.checkpointing) != ("attention", "except_attention"):
        return 1 - 1 / shape.num_layers
    return float(plan.checkpointing == part)


def _experts(shape: ModelShape, plan: RankPlan, rates: Rates) -> float:
    if not shape.num_moe_layers:
        return 0.0
    products = shape.num_expert_projections
    forward = 2 * products * plan.num_tokens * shape.top_k
    forward *= shape.hidden_size * shape.expert_intermediate * shape.num_moe_layers
    rows = plan.num_tokens * shape.top_k * plan.ep / shape.num_experts
    imbalance = plan.imbalance if plan.ep > 1 else 1.0
    # All products but the last are made again, which is two of three; a recomputation of the layer
    # too ends when all that is kept is there (more, behind a gate on shared experts or a norm).
    times = _again(shape, plan, "moe") + float(plan.recomputes_experts)
    passes = 3 + times * (products - 1) / products
    return passes * forward * imbalance / rates.expert_flops(rows)


def _dense(shape: ModelShape, plan: RankPlan, rates: Rates) -> float:
    rate = rates.matmul * rates.dense_share
    layers = 2 * plan.num_tokens * (shape.num_matrix_parameters - _vision_parameters(shape))
    head = 2 * plan.num_tokens * shape.num_head_elements
    vision = 2 * plan.patches * plan.micro_batch / plan.sp * _vision_parameters(shape)
    layers *= 3 + _again(shape, plan, "full")
    vision *= 4 if plan.recomputes_layers else 3
    return (layers + vision + 3 * head) / rate


def _vision_parameters(shape: ModelShape) -> int:
    vision = shape.vision
    if vision is None:
        return 0
    mlp = (3 if vision.is_gated else 2) * vision.hidden_size * vision.intermediate_size
    return vision.num_layers * (4 * vision.hidden_size**2 + mlp)


def _attention(shape: ModelShape, plan: RankPlan, rates: Rates) -> float:
    a, vision = shape.attention, shape.vision
    flops = 0.0
    if a is not None:
        # Causal: half of the square. A rank of a sequence has its share of heads, all tokens.
        square = plan.micro_batch * plan.sequence_length**2 / 2 / plan.sp
        flops = 2 * square * a.num_heads * (a.qk_head_dim + a.v_head_dim) * shape.num_layers
    if vision is not None and plan.patches:
        full, windowed = vision.num_full_layers, vision.num_layers - vision.num_full_layers
        reach = full * plan.patches + windowed * vision.window_patches
        flops += 4 * plan.micro_batch * plan.patches * reach * vision.hidden_size / plan.sp
    # Backward of attention is two and a half forwards.
    return (3.5 + _again(shape, plan, "attention")) * flops / rates.attention


def _memory_bound(shape: ModelShape, plan: RankPlan, rates: Rates) -> float:
    """Norms, residuals and the loss: what layers keep is written and read once each."""
    kinds = ((True, shape.num_moe_layers), (False, shape.num_layers - shape.num_moe_layers))
    kept = sum(layer_bytes(shape, plan, is_moe=moe).kept * n for moe, n in kinds if n)
    # In blocks: written, read twice, their gradient written and read twice, 2 B each.
    in_blocks = plan.num_tokens * shape.vocab_size * 4 > plan.logits_bytes
    logits = (12 if in_blocks else 20) * plan.num_tokens * shape.vocab_size
    return (2 * kept * (1 + _again(shape, plan, "full") / 3) + logits) / rates.memory


def _dispatch(shape: ModelShape, plan: RankPlan, rates: Rates, ranks_per_node: int) -> float:
    """Dispatch and combine, forward and backward; each token once to each rank it needs."""
    if plan.ep == 1 or not shape.num_moe_layers:
        return 0.0
    rows = plan.num_tokens * distinct_ranks(plan.ep, shape.num_experts, shape.top_k)
    remote = rows * (plan.ep - 1) / plan.ep * plan.imbalance
    times = 4 + _again(shape, plan, "moe")  # a recomputation ends before combine
    moved = times * remote * shape.hidden_size * plan.width * shape.num_moe_layers
    return moved / link(plan.ep, ranks_per_node, rates)


def _gathers(shape: ModelShape, plan: RankPlan, rates: Rates, ranks_per_node: int) -> float:
    """ZeRO's collectives of a step: parameters out, gradients in."""
    local = local_counts(shape, plan)
    parts = ((local.dense, plan.num_ranks), (local.experts, plan.edp))
    seconds = 0.0
    for elements, size in parts:
        if size == 1:
            continue
        span = plan.num_ranks if size > 1 else 1
        once = elements * plan.width * (size - 1) / size / link(span, ranks_per_node, rates)
        if plan.zero == 3:
            seconds += 3 * once * plan.accumulation
        elif plan.zero == 2:
            seconds += once * (1 + plan.accumulation)
        else:
            seconds += 2 * once
    # The last gather of ZeRO-1/2 follows the step and hides behind nothing.
    return seconds * (1 - HIDDEN_SHARE)


def newton_schulz_flops(num_rows: int, num_columns: int) -> float:
    """Returns the FLOPs of five iterations by the cheaper form, the Gram one restarted once.

    kernels/newton_schulz.py counts them itself but comes with torch; a test compares the two.
    """
    short, long = sorted((num_rows, num_columns))
    aspect = long / short
    return min(20 * aspect + 10, 28 + 8 * aspect) * float(short) ** 3


def _muon(shape: ModelShape, plan: RankPlan, rates: Rates, ranks_per_node: int) -> float:
    if plan.optimizer != "muon":
        return 0.0
    flops = moved = 0.0
    for family in shape.families:
        if family.kind != "muon" or not family.trained:
            continue
        rows, columns = family.shape[-2:]
        stacked = family.shape[0] if len(family.shape) == 3 else 1
        owners = plan.num_ranks
        flops += newton_schulz_flops(rows, columns) * stacked * family.count / owners
        size = plan.edp if family.part == "experts" else plan.num_ranks
        if size > 1:
            held = family.count * family.num_elements / owners
            moved += 2 * 4 * held * (size - 1) / size
    span = plan.num_ranks
    return flops / rates.newton_schulz + moved / link(span, ranks_per_node, rates)


def _adamw(shape: ModelShape, plan: RankPlan, rates: Rates) -> float:
    """Reads and writes of gradient, master and state, and of the update that Muon hands over."""
    local = local_counts(shape, plan)
    share = "partition" if plan.zero in (1, 2) else "sliced" if plan.zero == 3 else "elements"
    return 30 * local.trained(share) / rates.memory


def _offload(shape: ModelShape, plan: RankPlan, rates: Rates) -> float:
    if not plan.offload:
        return 0.0
    local = local_counts(shape, plan)
    elements = local.trained("partition")
    copies = (plan.accumulation + 1) * plan.width * elements / rates.host_link
    matrices = 8 * local.trained("partition", kind="muon") / rates.host_link
    return copies + matrices + 28 * elements / rates.host_step


def _sequence(shape: ModelShape, plan: RankPlan, rates: Rates, ranks_per_node: int) -> float:
    """All-to-all of q, k, v and the output of every decoder layer, forward and backward."""
    a = shape.attention
    if plan.sp == 1 or a is None:
        return 0.0
    heads = 2 * a.num_heads + 2 * max(a.num_kv_heads, plan.sp)
    moved = heads * a.qk_head_dim * plan.num_tokens * (plan.sp - 1) / plan.sp * plan.width
    times = 2 + _again(shape, plan, "attention")
    return times * moved * shape.num_layers / link(plan.sp, ranks_per_node, rates)
