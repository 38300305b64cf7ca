"""What a layout says about routing and experts, as the arguments of epctl's kernels. No modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from epctl.errors import LayoutError
from epctl.kernels import Activation
from epctl.kernels.activation import SWIGLU, ActivationFunction, GateForm
from epctl.kernels.reference import GroupScore, ScoreFunction
from epctl.layout.model import MoELayout

# The names of transformers' ACT2FN that the kernels compute.
FUNCTIONS: dict[str, ActivationFunction] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
FORMS: dict[str, GateForm] = {
    "standard": "product",
    "ungated": "product",
    "clamped_swiglu": "clamped",
    "swiglu_then_clamped": "clamped_after",
    "gpt_oss_swiglu": "shifted",
}
SCORES: dict[tuple[str, bool], ScoreFunction] = {
    ("sigmoid", False): "sigmoid",
    ("softmax", False): "softmax",
    ("sqrtsoftplus", False): "sqrt_softplus",
    ("softmax", True): "topk_softmax",
    ("sigmoid", True): "topk_sigmoid",
}


@dataclass(frozen=True)
class RouterRule:
    """How a router turns logits into experts and weights; see `epctl.kernels.route`."""

    num_experts: int
    top_k: int
    score_func: ScoreFunction
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "top2_sum"
    normalize: bool = True
    normalize_epsilon: float = 0.0
    scale: float = 1.0
    logit_cap: float = 0.0

    @classmethod
    def from_layout(cls, moe: MoELayout, config: Any = None) -> RouterRule | None:
        """Returns the rule of a layout, None where it selects in a way that is not stated here.

        A scale that the block applies to its own output is not the router's.
        """
        router = moe.router
        if router.selection != "top_k":
            return None
        assert not router.missing_keys, router.missing_keys
        return cls(
            num_experts=moe.num_experts,
            top_k=int(moe.top_k or 0),
            score_func=SCORES[str(router.score_func), router.score_after_selection],
            num_groups=router.num_groups,
            top_groups=router.top_groups,
            group_score=cast(GroupScore, router.group_score or "top2_sum"),
            normalize=bool(router.normalize),
            normalize_epsilon=router.normalize_epsilon,
            scale=float(router.scale or 0.0) if router.scale_on == "weight" else 1.0,
            logit_cap=float(getattr(config, "moe_router_logit_softcapping", None) or 0.0),
        )

    def route_arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of `epctl.kernels.route`."""
        values = dict(vars(self))
        del values["num_experts"], values["logit_cap"]
        return values


@dataclass(frozen=True)
class ExpertShape:
    """Sizes and arithmetic of a layer's routed experts, all ranks' together."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool = True
    has_biases: bool = False
    weighs_input: bool = False
    activation: Activation = SWIGLU

    @classmethod
    def from_layout(
        cls, moe: MoELayout, layer: int, limit: float | None, alpha: float
    ) -> ExpertShape:
        """Returns the shape of `layer`'s experts; `limit` and `alpha` are as in `Activation`.

        Raises LayoutError for an activation that the kernels do not compute.
        """
        return cls(
            num_experts=moe.experts_of_layer(layer),
            hidden_size=moe.expert_hidden_size,
            intermediate_size=moe.expert_intermediate_size,
            gated=moe.storage.gated,
            has_biases=bool(moe.storage.biases),
            weighs_input=moe.router.weight_on == "expert_input",
            activation=activation_of(moe, limit, alpha),
        )


def activation_of(moe: MoELayout, limit: float | None, alpha: float) -> Activation:
    """Returns the experts' activation. Raises LayoutError for one that is not computed here."""
    form = FORMS.get(moe.activation_rule)
    function = FUNCTIONS.get(moe.activation or "silu")
    if form is None or function is None:
        raise LayoutError(
            f"these experts compute {moe.activation_rule} with `{moe.activation}`, which epctl's "
            f"kernels do not (they know {', '.join(FORMS)}; {', '.join(FUNCTIONS)})"
        )
    if form == "product":
        return Activation(function)
    return Activation("silu" if form == "shifted" else function, form, limit, alpha)
