"""Model FLOPs of a token, and what vendors say a GPU can do. No torch.

    FLOPs a token = 3 x (2 x (N + K x E) + S x H x (q + v) x L)

N: elements of the matrices that every token meets, head included, embedding not; K x E: those of
the experts it is sent to; the last term is causal attention over S tokens, L layers of H heads with
widths q and v. Factor 3: forward, and backward that costs twice as much. What activation
checkpointing computes again is not counted, nor norms, softmax and routing.
"""

from __future__ import annotations

from epctl.launch.memory_shape import ModelShape

FORMULA = "3 x (2 x (dense + head + top-k experts) + causal attention); nothing recomputed counts"
# Dense bf16 FLOP/s of the data sheets; the first name inside a GPU's own decides.
VENDOR_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989.5e12,
    "H100": 989.5e12,
    "H200": 989.5e12,
    "H800": 989.5e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
}


def flops_per_token(shape: ModelShape, sequence_length: int) -> float:
    """Returns the model FLOPs of forward and backward for one token of a whole sequence."""
    expert = shape.num_expert_projections * shape.hidden_size * shape.expert_intermediate
    elements = shape.num_matrix_parameters + shape.num_head_elements
    elements += shape.num_moe_layers * shape.top_k * expert
    attention = 0.0
    if shape.attention is not None:
        widths = shape.attention.qk_head_dim + shape.attention.v_head_dim
        # A token sees half of the sequence on average; two FLOPs a product.
        attention = shape.num_layers * shape.attention.num_heads * widths * sequence_length
    return 3.0 * (2.0 * elements + attention)


def vendor_flops(gpu: str | None) -> float | None:
    """Returns the data sheet's dense bf16 FLOP/s of a GPU by its name, None if it is not known."""
    if gpu is None:
        return None
    return next((rate for name, rate in VENDOR_FLOPS.items() if name in gpu), None)
