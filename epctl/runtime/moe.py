"""epctl's MoE layer: transformers' own block around epctl's router and this rank's experts.

The block's forward is the class's own, so shared experts, their gates, output scales and norms are
what transformers computes; its router and its experts are replaced.
Shape suffixes: B batch, S sequence, T tokens (B*S), D hidden size, E experts, K top_k,
I expert intermediate size.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from epctl.kernels import ExpertBiases, moe_mlp, route, route_sparsemixer, router_logits
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.dispatch import combine, dispatch
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe_rules import ExpertShape, RouterRule
from epctl.runtime.profile import annotate
from epctl.runtime.recompute import recomputing
from epctl.runtime.shared_experts import EarlyShared, run_shared_early

if TYPE_CHECKING:
    from epctl.runtime.balance import DispatchLimits, RouterLosses


class Router(nn.Module):
    """Scores in float32 whatever the model's dtype: bf16 logits would choose other experts.

    Called as transformers' routers are: with the tokens, and with the correction bias where the
    block owns that.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    tokens_per_expert: Tensor
    live_leaves: dict[str, str]
    losses: RouterLosses | None = None

    def __init__(self, rule: RouterRule, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.rule = rule
        self.weight = weight
        self.register_parameter("bias", bias)
        _register_counts(self, rule.num_experts)

    def forward(
        self, x: Tensor, correction_bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits [T, E], weights [T, K] in float32 and global expert ids [T, K]."""
        with annotate("router"):
            return self._route(x, correction_bias_E)

    def _route(self, x: Tensor, correction_bias_E: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = router_logits(x.reshape(-1, x.shape[-1]), self.weight)
        if self.bias is not None:
            logits_TE = logits_TE + self.bias.float()
        if self.rule.logit_cap:
            logits_TE = torch.tanh(logits_TE / self.rule.logit_cap) * self.rule.logit_cap
        if correction_bias_E is None:
            correction_bias_E = getattr(self, "e_score_correction_bias", None)
        if correction_bias_E is not None:
            correction_bias_E = correction_bias_E.flatten()
        weights_TK, experts_TK = route(logits_TE, correction_bias_E, **self.rule.route_arguments())
        if self.training:
            count_tokens(self, experts_TK)
            if self.losses is not None:
                score_func = self.rule.score_func
                weights_TK = self.losses.attach(weights_TK, logits_TE, experts_TK, score_func)
        return logits_TE, weights_TK, experts_TK


class _Counting:
    """Adds counting to a router of transformers'; its last output is the experts."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        router = cast(Any, self)
        outputs = super().forward(*inputs, **options)  # type: ignore[misc]
        if router.training:
            count_tokens(router, outputs[-1])
        return outputs


class _SparseMixing:
    """Phi-MoE's router of transformers' with epctl's projection and kernel in its forward."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits [T, E], weights [T, 2] in float32 and global expert ids [T, 2]."""
        router = cast(Any, self)
        if router.training and router.input_jitter_noise > 0:
            # In place, as in transformers: the experts get what the router saw.
            low, high = 1.0 - router.input_jitter_noise, 1.0 + router.input_jitter_noise
            x *= torch.empty_like(x).uniform_(low, high)
        with annotate("router"):
            logits_TE = router_logits(x.reshape(-1, x.shape[-1]), router.weight)
            return logits_TE, *route_sparsemixer(
                logits_TE, jitter=router.router_jitter_noise, sampled=router.training
            )


@functools.cache
def _counting_class(router_class: Any, selection: str) -> Any:
    if selection == "sparsemixer":
        bases: tuple[Any, ...] = (_Counting, _SparseMixing, router_class)
    else:
        bases = (_Counting, router_class)
    return type(f"Counting{router_class.__name__}", bases, {})


def counting_router(router: nn.Module, num_experts: int, selection: str) -> nn.Module:
    """Returns transformers' router, counting its choices: for rules that are not `RouterRule`s.

    It computes as transformers', but for `sparsemixer`, which has a kernel.
    """
    counting_class = _counting_class(cast(Any, type(router)), selection)
    counting: nn.Module = counting_class.__new__(counting_class)
    counting.__dict__.update(router.__dict__)
    _register_counts(counting, num_experts)
    return counting


def _register_counts(router: nn.Module, num_experts: int) -> None:
    counts = torch.zeros(num_experts, dtype=torch.int64)
    router.register_buffer("tokens_per_expert", counts, persistent=False)


def count_tokens(router: Any, experts_TK: Tensor) -> None:
    """Adds to a router's counts on the device, without a host synchronisation; once a forward."""
    if recomputing():
        return
    chosen = experts_TK.detach().flatten()
    router.tokens_per_expert.scatter_add_(0, chosen, torch.ones_like(chosen))


class LocalExperts(nn.Module):
    """This rank's experts; `w1` gate and `w3` up stay two Parameters (DeepSpeed's save, Muon).

    Called as transformers' experts are; tokens travel to the ranks that hold their experts.
    """

    w1: nn.Parameter | None
    w3: nn.Parameter
    w2: nn.Parameter
    limits: DispatchLimits | None = None
    recompute_activation = False
    shared: EarlyShared | None = None

    def __init__(self, shape: ExpertShape, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.ep_size, self.ep_group = mesh.ep_size, mesh.ep_group
        self.num_local_experts = count = mesh.num_local_experts(shape.num_experts)
        inward = (count, shape.intermediate_size, shape.hidden_size)
        outward = (count, shape.hidden_size, shape.intermediate_size)
        self.w1 = _empty(inward, dtype) if shape.gated else None
        self.w3 = _empty(inward, dtype)
        self.w2 = _empty(outward, dtype)
        biased = shape.has_biases
        self.b1 = _empty(inward[:2], dtype) if biased and shape.gated else None
        self.b3 = _empty(inward[:2], dtype) if biased else None
        self.b2 = _empty(outward[:2], dtype) if biased else None

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Returns the weighted sum of each token's experts, [T, D] in the dtype of `x_TD`.

        Args:
            experts_TK: global expert ids, int64.
        """
        weights_TK = weights_TK.float()
        limits = self.limits if self.training else None
        if limits is not None:
            weights_TK, experts_TK = limits.drop(weights_TK, experts_TK, self.shape.num_experts)
        if self.ep_size == 1:
            with annotate("experts"):
                return self.compute(x_TD, experts_TK, weights_TK)
        assert self.ep_group is not None
        with annotate("dispatch"):
            sent = dispatch(
                x_TD,
                experts_TK,
                weights_TK,
                self.num_local_experts,
                self.ep_group,
                max_rows=None if limits is None else limits.max_rows,
                meanwhile=None if self.shared is None else self.shared.run_ahead,
            )
        with annotate("experts"):
            y_RD = self.compute(sent.x_RD, sent.experts_RK, sent.weights_RK, sent.num_held)
        with annotate("combine"):
            return combine(y_RD, sent)

    def compute(
        self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, num_held: int | None = None
    ) -> Tensor:
        """Returns the sum over the experts held here; -1 is an expert elsewhere.

        Args:
            num_held: how many ids are not -1, where that is known.
        """
        if self.shape.weighs_input:
            x_TD, experts_TK, weights_TK, top_k = _weigh_input(x_TD, experts_TK, weights_TK)
        y_TD = moe_mlp(
            x_TD,
            experts_TK,
            weights_TK,
            self.w1,
            self.w3,
            self.w2,
            biases=ExpertBiases(self.b1, self.b3, self.b2),
            activation=self.shape.activation,
            recompute=self.recompute_activation,
            num_held=num_held,
        )
        if self.shape.weighs_input:
            y_TD = y_TD.view(-1, top_k, y_TD.shape[-1]).sum(dim=1)
        return y_TD


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype))


def _weigh_input(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Returns one row a choice, scaled by its weight, with weight 1 (Llama 4, whose K is 1)."""
    top_k = experts_TK.shape[1]
    held_TK = experts_TK >= 0
    scale_TK1 = torch.where(held_TK, weights_TK, 0).to(x_TD.dtype).unsqueeze(-1)
    rows_ND = (x_TD.unsqueeze(1) * scale_TK1).flatten(0, 1)
    ones_N1 = torch.ones(len(rows_ND), 1, device=x_TD.device)
    return rows_ND, experts_TK.reshape(-1, 1), ones_N1, top_k


class ExpertParallelMoE(seams.AutoEPMoELayer):  # type: ignore[misc]
    """What `expert_parallel` makes of a transformers block; ZeRO places its Parameters.

    A subclass of DeepSpeed's layer that never runs its constructor, which wants a source module
    with all experts in it.
    """

    experts: LocalExperts
    local_experts: range


class _WeighingInput:
    """Llama 4's block, whose own forward repeats every token for every expert."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        block = cast(Any, self)
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        logits_TE, weights_TK, experts_TK = block.router(x_TD)
        routed_TD = block.experts(x_TD, experts_TK, weights_TK)
        return block.shared_expert(x_TD) + routed_TD, logits_TE


@functools.cache
def _layer_class(block_class: Any, weighs_input: bool) -> type[ExpertParallelMoE]:
    """Returns the block's class as an ExpertParallelMoE too; the forward stays the block's."""
    own = (_WeighingInput,) if weighs_input else ()
    name = f"ExpertParallel{block_class.__name__}"
    return cast(type[ExpertParallelMoE], type(name, (*own, block_class, ExpertParallelMoE), {}))


def expert_parallel(
    block: nn.Module,
    router_name: str,
    router: nn.Module,
    shape: ExpertShape,
    mesh: Mesh,
    dtype: torch.dtype,
) -> ExpertParallelMoE:
    """Returns `block` with this rank's experts and epctl's router in place of its own.

    Args:
        block: a transformers MoE block with children `experts` and `router_name`; it is consumed.
        router: called with the tokens; returns logits, weights and global expert ids.
    """
    layer_class = _layer_class(cast(Any, type(block)), shape.weighs_input)
    layer = layer_class.__new__(layer_class)
    layer.__dict__.update(block.__dict__)
    layer.experts = LocalExperts(shape, mesh, dtype)
    if mesh.ep_size > 1:
        layer.experts.shared = run_shared_early(layer)
    setattr(layer, router_name, router)
    layer.local_experts = mesh.local_experts(shape.num_experts)
    seams.mark_expert_layer(layer, mesh, shape.num_experts)
    return layer
