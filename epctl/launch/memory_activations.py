"""What forward keeps for backward, and what backward of one layer adds on top.

T tokens of a micro-batch on this rank; other letters: memory_shape.py. Formulas count bytes a
token in a run of 2-byte numbers; float32 runs hold twice the 2-byte parts. What is saved follows
from transformers' eager layers (an RMSNorm keeps a float32 copy of its input and its result before
the weight: more than torch's kernel keeps on a GPU, fused_norm.py), scaled-dot-product attention
(q, k, v, its output and one float32 a head), and epctl's MoE operator (kernels/moe.py): the tokens
and the pre-activation H.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from epctl.launch.memory_settings import RankPlan
from epctl.launch.memory_shape import AttentionShape, ModelShape
from epctl.launch.memory_terms import Phase, Term

# Rows that the kernels round an expert up to (kernels/permute.py, PADDING).
ROW_PADDING = 64


@lru_cache(maxsize=1024)
def distinct_ranks(ep: int, num_experts: int, top_k: int) -> float:
    """Returns the ranks that a token's K experts lie on, on average, if all are equally likely."""
    if ep <= 1 or not num_experts:
        return 1.0
    local = num_experts // ep
    missed = math.comb(num_experts - local, top_k) / math.comb(num_experts, top_k)
    return ep * (1.0 - missed)


@dataclass(frozen=True, slots=True)
class MoEBytes:
    """One MoE layer on one rank: bytes kept for backward, and the peak of backward above them."""

    kept: float
    forward_extra: float
    backward_extra: float
    rows: float


def moe_bytes(
    *, tokens: float, hidden: int, intermediate: int, local_experts: int, num_experts: int,
    top_k: int, width: int, received: float, projections: int = 3, imbalance: float = 1.0,
    recompute: bool = False,
) -> MoEBytes:  # fmt: skip
    """Returns the operator's bytes, router included (kernels/moe.py, dispatch.py).

    Args:
        received: rows that come to a rank for one token of its own: 1 without expert parallelism,
            the distinct ranks a token needs with it. Each brings K ids and weights; the operator
            allocates rows for the choices held here, which are T x K on average.
        imbalance: rows of this rank over the mean.
        recompute: the pre-activation is made again in backward.
    """
    rows_in = tokens * received * imbalance
    rows = tokens * imbalance * top_k
    h = rows * (projections - 1) * intermediate * width
    # Of a row its choice; of a choice both places, the weight and the router's id.
    integers = 4 * rows + (8 + 12) * rows_in * top_k
    kept = integers if recompute else h + integers
    activated, spread = rows * intermediate * width, (rows + local_experts * 63) * hidden * width
    products = rows * hidden * width
    one_gradient = local_experts * intermediate * hidden * width
    all_gradients = projections * one_gradient
    dx = rows_in * hidden * width
    backward = max(
        spread + activated + one_gradient,
        one_gradient + products + dx,
        dx + spread + all_gradients,
    )
    again = h if recompute else 0.0
    return MoEBytes(kept, activated + products, again + backward, rows)


def moe_block_bytes(
    *, tokens: int, hidden: int, intermediate: int, num_experts: int, top_k: int
) -> tuple[float, float]:
    """Returns (bytes kept for backward, peak) of a bf16 block as `epctl bench moe` runs it.

    Tokens and weights exist before and are not counted; result, router logits and every gradient
    of an expert are.
    """
    moe = moe_bytes(
        tokens=tokens, hidden=hidden, intermediate=intermediate, local_experts=num_experts,
        num_experts=num_experts, top_k=top_k, width=2, received=1.0,
    )  # fmt: skip
    kept = 2 * tokens * hidden + moe.kept + 4 * tokens * num_experts
    return kept, kept + moe.backward_extra


def attention_token_bytes(a: AttentionShape, hidden: int, width: int) -> float:
    """Returns the bytes a token that one attention block keeps, its norm included."""
    norm = hidden * (4 + width + width)
    keys = a.num_heads if a.q_rank or a.kv_rank or a.num_kv_heads == a.num_heads else a.num_kv_heads
    kept = a.num_heads * a.qk_head_dim + keys * a.qk_head_dim + a.num_heads * a.v_head_dim
    values = keys * a.v_head_dim
    if a.kv_rank:
        # kv_b's result stays whole under the values cut from it; both latents are normalised.
        values = a.num_heads * (a.qk_head_dim - a.rope_dim + a.v_head_dim)
        norm += (a.kv_rank + a.q_rank) * (4 + 2 * width)
    if a.has_qk_norm:
        norm += (a.num_heads + a.num_kv_heads) * a.qk_head_dim * (4 + width)
    return norm + (kept + values) * width + 4 * a.num_heads


def mlp_token_bytes(intermediate: int, width: int, *, is_gated: bool = True) -> float:
    """Returns the bytes a token of one MLP: gate, its activation, up and their product."""
    return (4 if is_gated else 2) * intermediate * width


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes of one decoder layer for a micro-batch: kept whole, by its parts, and in backward."""

    attention: float
    block: float
    backward: float
    dispatch: float = 0.0
    result: float = 0.0  # of attention: its output and log-sum-exp

    @property
    def kept(self) -> float:
        """All that forward keeps, rows sent to experts apart."""
        return self.attention + self.block


def _attention_part(shape: ModelShape, plan: RankPlan) -> tuple[float, float]:
    """Returns (kept, in backward) of the attention block of a layer."""
    if shape.attention is None:
        return 0.0, 0.0
    a, tokens = shape.attention, plan.num_tokens
    token_bytes = attention_token_bytes(a, shape.hidden_size, plan.width)
    mask = _mask_elements(shape, plan) * plan.width
    flow = tokens * plan.width * a.num_heads * (2 * a.qk_head_dim + 2 * a.v_head_dim)
    if plan.sp > 1:
        # All-to-all of q, k, v and of the output: what is sent beside what arrived.
        flow += tokens * plan.width * (2 * a.num_heads + 2 * a.num_kv_heads) * a.qk_head_dim
    return tokens * token_bytes + mask, flow


def _mask_elements(shape: ModelShape, plan: RankPlan) -> float:
    """Elements of the mask that keeps packed documents apart; attention adds it as numbers.

    Where the sequence is cut, and with a vision tower, attention runs over intervals instead.
    """
    has_mask = plan.is_packed and plan.sp == 1 and shape.vision is None
    return plan.micro_batch * plan.sequence_length**2 if has_mask else 0.0


def layer_bytes(shape: ModelShape, plan: RankPlan, *, is_moe: bool) -> LayerBytes:
    """Returns the bytes of one decoder layer; depends on nothing that ZeRO decides."""
    tokens, hidden, width = plan.num_tokens, shape.hidden_size, plan.width
    attention, flow = _attention_part(shape, plan)
    norm = tokens * hidden * (4 + 2 * width)
    # The residual's gradient, and a norm's in float32.
    residual = tokens * hidden * (2 * width + 8)
    if not is_moe:
        block = tokens * mlp_token_bytes(shape.dense_intermediate, width)
        weights = 3 * shape.dense_intermediate * hidden * width
        peak = max(flow, 3 * tokens * shape.dense_intermediate * width + weights)
        return LayerBytes(attention, norm + block, residual + peak, result=_result(shape, plan))
    moe, received = _moe_of(shape, plan)
    router = tokens * shape.num_experts * 8  # the tokens themselves are kept by the norm
    shared = tokens * mlp_token_bytes(shape.shared_intermediate, width)
    dispatch = 0.0
    backward = moe.backward_extra
    if plan.ep > 1:
        rows = tokens * received * plan.imbalance
        # Of a row its token, and of a token its row on every rank.
        dispatch = rows * (hidden * width + 8 * shape.top_k + 4) + 4 * tokens * plan.ep
        # Gradients of the rows come in and go out by all-to-all.
        backward += 2 * rows * hidden * width
    return LayerBytes(
        attention, norm + router + shared + moe.kept, residual + max(flow, backward), dispatch,
        _result(shape, plan),
    )  # fmt: skip


def _result(shape: ModelShape, plan: RankPlan) -> float:
    if shape.attention is None:
        return 0.0
    a = shape.attention
    return plan.num_tokens * a.num_heads * (a.v_head_dim * plan.width + 4)


def _moe_of(shape: ModelShape, plan: RankPlan) -> tuple[MoEBytes, float]:
    received = distinct_ranks(plan.ep, shape.num_experts, shape.top_k)
    moe = moe_bytes(
        tokens=plan.num_tokens, hidden=shape.hidden_size, intermediate=shape.expert_intermediate,
        local_experts=shape.num_experts // plan.ep, num_experts=shape.num_experts,
        top_k=shape.top_k, width=plan.width, received=received,
        projections=shape.num_expert_projections,
        imbalance=plan.imbalance if plan.ep > 1 else 1.0,
        recompute=plan.recomputes_experts,
    )  # fmt: skip
    return moe, received


def activation_terms(shape: ModelShape, plan: RankPlan) -> Iterator[Term]:
    """Yields what forward leaves behind, and the layer that backward works on."""
    tokens, hidden, width = plan.num_tokens, shape.hidden_size, plan.width
    kinds = [(True, shape.num_moe_layers), (False, shape.num_layers - shape.num_moe_layers)]
    layers = [(layer_bytes(shape, plan, is_moe=moe), n) for moe, n in kinds if n > 0]
    if not layers:
        return
    inputs = tokens * hidden * width
    full = plan.recomputes_layers
    kept = sum((inputs * full + _stored(layer, plan)) * count for layer, count in layers)
    results = " + attention's result" if plan.checkpointing == "except_attention" else ""
    yield Term(
        "inputs of recomputed layers" if full else "activations kept by the layers",
        "activations",
        kept + inputs,
        f"(L + 1) x {width} B x T x D{results}" if full else _kept_formula(plan),
        Phase.LOSS | Phase.FIRST_BACKWARD,
        values={"L": shape.num_layers, "T": tokens, "D": hidden},
    )
    largest = max(layer.kept - _stored(layer, plan) + layer.backward for layer, _ in layers)
    yield Term(
        "one layer in backward", "activations", largest,
        "what backward makes again of a layer + its gradients and temporaries",
        Phase.BACKWARD,
        values={
            "attention": max(layer.attention for layer, _ in layers),
            "block": max(layer.block for layer, _ in layers),
            "gradients": max(layer.backward for layer, _ in layers),
        },
    )  # fmt: skip
    if full:
        # Of which kind the last one is, the shape does not say.
        last = max(layer.kept + layer.dispatch for layer, _ in layers)
        yield Term(
            "last layer, not recomputed", "activations", last,
            "what forward leaves of a layer; in backward it is the one layer's",
            Phase.LOSS,
        )  # fmt: skip
    yield from _dispatch_terms(shape, plan, [(layer.dispatch, n) for layer, n in layers])
    if mask := _mask_elements(shape, plan):
        yield Term(
            "mask of packed documents", "activations", mask,
            "1 B x micro-batch x S x S", Phase.MICRO_STEP,
            values={"S": plan.sequence_length},
        )  # fmt: skip
    if plan.sp > 1:
        whole = plan.micro_batch * plan.sequence_length * hidden * width
        yield Term(
            "embedded sequence before it is cut", "activations", whole * (2 if plan.patches else 1),
            f"{width} B x S x D, every rank of a sequence",
            Phase.MICRO_STEP, values={"S": plan.sequence_length, "D": hidden},
        )  # fmt: skip


def _dispatch_terms(
    shape: ModelShape, plan: RankPlan, layers: list[tuple[float, int]]
) -> Iterator[Term]:
    """Yields the rows that came from other ranks: of one layer where the block is made again."""
    largest = max(num_bytes for num_bytes, _ in layers)
    if not largest:
        return
    again = plan.checkpointing == "moe" or plan.recomputes_layers
    received = distinct_ranks(plan.ep, shape.num_experts, shape.top_k)
    every = sum(num_bytes * count for num_bytes, count in layers)
    yield Term(
        "rows sent to experts", "dispatch", largest if again else every,
        f"T x {received:.2f} distinct ranks x imbalance x {plan.width} B x D"
        + (", one layer" if again else ", every MoE layer"),
        Phase.BACKWARD if again else Phase.LOSS | Phase.FIRST_BACKWARD,
        values={"T": plan.num_tokens, "ranks": received, "imbalance": plan.imbalance},
    )  # fmt: skip


def _stored(layer: LayerBytes, plan: RankPlan) -> float:
    """Bytes of a layer that stay from its forward to its backward, besides its input."""
    return {
        "none": layer.kept,
        "attention": layer.block,
        "moe": layer.attention,
        "except_attention": layer.result,
        "full": 0.0,
    }[plan.checkpointing]


def _kept_formula(plan: RankPlan) -> str:
    parts = {"none": "attention + block", "attention": "block", "moe": "attention"}
    per_token = "2d" if plan.recomputes_experts else "2d + 4Kn"
    return f"sum over layers of {parts[plan.checkpointing]}; block of a MoE: {per_token} and router"


def vision_terms(shape: ModelShape, plan: RankPlan) -> Iterator[Term]:
    """Yields the vision tower's activations; patches are dealt out over the ranks of a sequence."""
    vision = shape.vision
    if vision is None or not plan.patches:
        return
    patches = plan.patches * plan.micro_batch / plan.sp
    hidden, width = vision.hidden_size, plan.width
    mlp = mlp_token_bytes(vision.intermediate_size, width, is_gated=vision.is_gated)
    layer = patches * (2 * hidden * (4 + 2 * width) + 8 * hidden * width + mlp)
    full = plan.recomputes_layers
    kept = vision.num_layers * (patches * hidden * width if full else layer)
    yield Term(
        "vision tower", "activations", kept,
        f"layers x {width} B x patches x width" if full else "layers x (norms + attention + MLP)",
        Phase.MICRO_STEP, values={"layers": vision.num_layers, "patches": patches, "width": hidden},
    )  # fmt: skip
    yield Term(
        "one vision layer in backward", "activations", 2 * layer,
        "twice what a layer keeps", Phase.LAST_BACKWARD, values={"patches": patches},
    )  # fmt: skip
