"""The MoE block on torch's own grouped GEMM: what runs on a GPU where Triton does not.

Shape suffixes: see reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from epctl.kernels.activation import NO_BIASES, SWIGLU, Activation, ExpertBiases


def moe_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    w1_EID: Tensor | None,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    biases: ExpertBiases = NO_BIASES,
    activation: Activation = SWIGLU,
) -> Tensor:
    """Returns the weighted sum of each token's experts, [T, D]; see `epctl.kernels.moe_mlp`.

    No host synchronisation. Unlike the Triton path it stores gathered tokens and every
    intermediate, several times the memory.
    """
    num_experts, top_k = w3_EID.shape[0], experts_TK.shape[1]
    # Pairs held elsewhere sort behind the last expert, where no group reaches.
    sorted_N, order_N = (experts_TK.reshape(-1) % (num_experts + 1)).sort(stable=True)
    ends_E = torch.searchsorted(
        sorted_N, torch.arange(num_experts, device=x_TD.device), right=True
    ).to(torch.int32)
    held_N1 = (sorted_N < num_experts).unsqueeze(-1)
    # `grouped_mm` leaves rows beyond the last group unwritten, in gradients too: `where`, unlike a
    # product with zero, keeps their NaN out.
    rows_ND = torch.where(held_N1, x_TD[order_N // top_k], 0)
    expert_N = sorted_N.clamp(max=num_experts - 1)

    def project(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.grouped_mm(rows, weight.transpose(-1, -2), offs=ends_E)
        return out if bias is None else torch.where(held_N1, out + bias[expert_N], 0)

    gate_NI = None if w1_EID is None else project(rows_ND, w1_EID, biases.gate_EI)
    a_NI = activation(gate_NI, project(rows_ND, w3_EID, biases.up_EI))
    y_ND = project(a_NI, w2_EDI, biases.down_ED)
    y_ND = torch.where(held_N1, y_ND, 0)
    held_TK = experts_TK >= 0
    weights_TK1 = torch.where(held_TK, weights_TK, 0).unsqueeze(-1)
    y_TKD = y_ND[order_N.argsort()].view(*experts_TK.shape, -1)
    return (y_TKD * weights_TK1).sum(dim=1).to(x_TD.dtype)
