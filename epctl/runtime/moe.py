"""epctl's MoE layer: this rank's experts only, router in float32, kernels behind one seam.

Shape suffixes: B batch, S sequence, T tokens (B*S), D hidden size, E experts, K top_k,
I expert intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epctl.kernels import moe_mlp, route
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.dispatch import combine, dispatch
from epctl.runtime.mesh import Mesh
from epctl.runtime.recompute import recomputing


@dataclass(frozen=True)
class RouterRule:
    """How a router turns logits into experts and weights; every field has its config key."""

    num_experts: int
    top_k: int
    score_func: Literal["sigmoid", "softmax"]
    num_groups: int
    top_groups: int
    normalize: bool
    scale: float

    @classmethod
    def from_deepseek_v3(cls, config: Any) -> RouterRule:
        """Reads the rule from a DeepSeek-V3 config (Moonlight: scale 2.446, one group)."""
        return cls(
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            score_func="sigmoid",
            num_groups=config.n_group or 1,
            top_groups=config.topk_group or 1,
            normalize=bool(config.norm_topk_prob),
            scale=float(config.routed_scaling_factor),
        )


class Router(nn.Module):
    """Scores in float32 whatever the model's dtype: bf16 logits would choose other experts."""

    weight: nn.Parameter
    e_score_correction_bias: Tensor

    def __init__(self, rule: RouterRule, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rule = rule
        self.weight = nn.Parameter(torch.empty(rule.num_experts, hidden_size, dtype=dtype))
        self.register_buffer("e_score_correction_bias", torch.zeros(rule.num_experts))
        self.register_buffer(
            "tokens_per_expert",
            torch.zeros(rule.num_experts, dtype=torch.int64),
            persistent=False,
        )

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights [T, K] in float32 and global expert ids [T, K]."""
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        weights_TK, experts_TK = route(
            logits_TE,
            self.e_score_correction_bias,
            top_k=self.rule.top_k,
            score_func=self.rule.score_func,
            num_groups=self.rule.num_groups,
            top_groups=self.rule.top_groups,
            normalize=self.rule.normalize,
            scale=self.rule.scale,
        )
        if self.training and not recomputing():
            self._count(experts_TK)
        return weights_TK, experts_TK

    def _count(self, experts_TK: Tensor) -> None:
        """Adds to the routing counts on the device, without a host synchronisation."""
        counts = cast(Tensor, self.tokens_per_expert)
        chosen = experts_TK.flatten()
        counts.scatter_add_(0, chosen, torch.ones_like(chosen))


class LocalExperts(nn.Module):
    """This rank's experts; `w1` gate and `w3` up stay two Parameters (DeepSpeed's save, Muon)."""

    def __init__(
        self, num_local_experts: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        inward = (num_local_experts, intermediate_size, hidden_size)
        outward = (num_local_experts, hidden_size, intermediate_size)
        self.w1 = nn.Parameter(torch.empty(inward, dtype=dtype))
        self.w3 = nn.Parameter(torch.empty(inward, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(outward, dtype=dtype))

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Returns the weighted sum of the local experts' outputs; -1 is an expert elsewhere."""
        return moe_mlp(x_TD, experts_TK, weights_TK, self.w1, self.w3, self.w2)


class ExpertParallelMoE(seams.AutoEPMoELayer):  # type: ignore[misc]
    """Drop-in for a DeepSeek-V3 MoE block, built with this rank's experts only.

    A subclass of DeepSpeed's layer so that ZeRO places its Parameters, but never through the
    parent's constructor, which wants a source module with all experts in it.
    """

    def __init__(
        self,
        rule: RouterRule,
        shared_experts: nn.Module | None,
        hidden_size: int,
        intermediate_size: int,
        mesh: Mesh,
        dtype: torch.dtype,
    ) -> None:
        nn.Module.__init__(self)
        self.gate = Router(rule, hidden_size, dtype)
        num_local_experts = mesh.num_local_experts(rule.num_experts)
        self.experts = LocalExperts(num_local_experts, hidden_size, intermediate_size, dtype)
        self.shared_experts = shared_experts
        self.local_experts = mesh.local_experts(rule.num_experts)
        seams.mark_expert_layer(self, mesh, rule.num_experts)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        x_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        weights_TK, experts_TK = self.gate(x_TD)
        y_BSD = self._routed(x_TD, experts_TK, weights_TK).view_as(hidden_BSD)
        if self.shared_experts is not None:
            y_BSD = y_BSD + self.shared_experts(hidden_BSD)
        return y_BSD

    def _routed(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if self.ep_size == 1:
            return cast(Tensor, self.experts(x_TD, experts_TK, weights_TK))
        sent = dispatch(x_TD, experts_TK, weights_TK, self.num_local_experts, self.ep_group)
        y_RD = self.experts(sent.x_RD, sent.experts_RK, sent.weights_RK)
        return combine(y_RD, sent, x_TD.shape[0])
