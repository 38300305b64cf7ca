"""The routing rule that a layout states, computed, equals the live router of transformers.

Each router is built with config values that differ from the class defaults, so that reading the
wrong key shows as a wrong weight, not only as a wrong word.
"""

import dataclasses
import inspect

import pytest
from specs import EP_PLAN_TYPES, SPECS
from stored import namings, source

from epctl.layout.detect import detect

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("transformers", reason="needs the train extra")

# Values no class has as its default; groups only where the config has them at all.
CHANGES = {
    "norm_topk_prob": lambda value: not value,
    "moe_renormalize": lambda value: not value,
    "routed_scaling_factor": lambda value: 1.75,
    "route_scale": lambda value: 1.75,
    "router_scaling_factor": lambda value: 1.75,
    "moe_routed_scaling_factor": lambda value: 1.75,
    "moe_router_scaling_factor": lambda value: 1.75,
    "n_group": lambda value: 4 if value else value,
    "num_expert_group": lambda value: 4 if value else value,
    "topk_group": lambda value: 2 if value else value,
    "expert_selection_fn": lambda value: "sigmoid",
}
# No router of its own class, or not a rule that RouterLayout states (docs/families.md says why).
NO_ROUTER = {
    "phimoe": "sequential picks with jitter", "zaya": "an MLP with state",
    "inkling_text": "shared experts as a sink", "muse_spark_text": "an output multiplier",
    "gemma4_text": "normalised input", "diffusion_gemma_text": "normalised input",
    "deepseek_v4": "hash layers", "openai_privacy_filter": "divides by top_k",
}  # fmt: skip
TYPES = [name for name in EP_PLAN_TYPES if name not in NO_ROUTER]


def changed(config):
    """Returns the config keys that can differ from the default, changed."""
    return {key: change(config[key]) for key, change in CHANGES.items() if key in config}


def build_changed(name):
    """Returns the live model on meta and the layout, both of a config with odd values."""
    import build_fixtures

    spec = SPECS[name]
    given = source(name, namings(name)[0])
    changes = changed(given.config)
    model = build_fixtures.build({**spec, "config": {**spec.get("config", {}), **changes}})
    layout = detect(dataclasses.replace(given, config={**given.config, **changes}))
    return model, layout


def find_router(model, layout):
    """Returns the module that owns the router weight of the first MoE layer, on CPU, random."""
    moe = layout.moe
    path = moe.router_tensors(moe.layers[0])["weight"].removesuffix(".weight")
    # afmoe and its like hold the linear layer inside the router module.
    owners = [path, path.rsplit(".", 1)[0]]
    for owner in owners:
        module = model.get_submodule(owner)
        if hasattr(module, "top_k"):
            break
    module = module.to_empty(device="cpu").float()
    torch.manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.copy_(torch.randn(tensor.shape) * 0.5)
    return module


def live(module, hidden, bias):
    """Returns (weights, indices) of the live router, experts ascending."""
    arguments = inspect.signature(module.forward).parameters
    # Some routers are handed the bias, which their block owns; one insists on [batch, token, H].
    extra = [bias] if any("bias" in name for name in arguments) else []
    try:
        outputs = module(hidden, *extra)
    except ValueError:
        outputs = module(hidden[None], *extra)
    indices = next(o for o in outputs if not o.is_floating_point())
    weights = next(o for o in outputs if o.is_floating_point() and o.shape == indices.shape)
    return sort(weights.float(), indices)


def sort(weights, indices):
    order = indices.reshape(-1, indices.shape[-1]).argsort(-1)
    flat = weights.reshape(order.shape), indices.reshape(order.shape)
    return flat[0].gather(-1, order), flat[1].gather(-1, order)


def stated(router, top_k, logits, bias):
    """Returns (weights, indices) by the rule that RouterLayout states."""
    functions = {
        "softmax": lambda x: x.softmax(-1),
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
    }
    score = functions[router.score_func]
    scores = logits if router.score_after_selection else score(logits)
    choice = scores + bias if bias is not None else scores
    if router.num_groups > 1:
        groups = choice.view(choice.shape[0], router.num_groups, -1)
        best = groups.topk(2, -1)[0].sum(-1)
        if router.group_score == "max":
            best = groups.max(-1).values
        kept = torch.zeros_like(best).scatter(1, best.topk(router.top_groups, -1)[1], 1).bool()
        choice = groups.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    indices = choice.topk(top_k, -1)[1]
    weights = scores.gather(1, indices)
    weights = score(weights) if router.score_after_selection else weights
    if router.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + router.normalize_epsilon)
    return sort(weights * (router.scale if router.scale_on == "weight" else 1.0), indices)


@pytest.mark.parametrize("name", TYPES)
def test_stated_rule_equals_the_live_router(name):
    model, layout = build_changed(name)
    moe = layout.moe
    module = find_router(model, layout)
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    num_experts = moe.experts_of_layer(moe.layers[0])
    weight = next(t for t in tensors.values() if t.dim() == 2 and t.shape[0] == num_experts)
    own = next((t for k, t in tensors.items() if k.endswith("correction_bias")), None)
    bias = own if own is not None else torch.randn(num_experts)
    hidden = torch.randn(9, weight.shape[1]) / weight.shape[1] ** 0.5
    logits = hidden @ weight.T
    if moe.router.linear_bias:
        logits = logits + tensors["bias"]
    used = bias.flatten() if moe.router.correction_bias else None
    with torch.no_grad():
        weights, indices = live(module, hidden, bias)
        expected_weights, expected_indices = stated(moe.router, moe.top_k, logits, used)
    torch.testing.assert_close(indices, expected_indices, rtol=0, atol=0)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-6)


def test_a_wrong_rule_would_show():
    model, layout = build_changed("deepseek_v3")
    router = layout.moe.router
    module = find_router(model, layout)
    hidden = torch.randn(9, 7168) / 7168**0.5
    with torch.no_grad():
        logits, bias = hidden @ module.weight.T, module.e_score_correction_bias
        right = live(module, hidden, bias)[0]
        for change in ({"score_func": "softmax"}, {"normalize": True}, {"scale": 1.0}):
            wrong = dataclasses.replace(router, **change)
            assert not torch.allclose(right, stated(wrong, 8, logits, bias)[0], rtol=1e-3)
