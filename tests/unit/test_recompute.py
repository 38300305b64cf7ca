"""What activation checkpointing keeps, and that a recomputed router changes nothing."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from parity_ranks import tiny_config
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from epctl.config import TrainSection, resolve_config
from epctl.errors import ConfigError
from epctl.runtime.build import build_model
from epctl.runtime.kept_attention import KeptAttention
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe import LocalExperts, Router
from epctl.runtime.recompute import (
    checkpoint_activations,
    keep_last_layer,
    recompute_expert_activations,
    recomputing,
    set_up_recomputation,
)
from epctl.runtime.sequence.attend import Rule, attend
from epctl.runtime.weights import RandomWeights

MODES = ("none", "attention", "moe", "except_attention", "full")
NUM_TOKENS, TOP_K = 2 * 19, 3


def model_with(mode: Any, **changes: Any) -> nn.Module:
    model = build_model(
        tiny_config(**changes),
        Mesh(0, 1, 1, 0),
        RandomWeights(seed=1, std=0.2),
        dtype=torch.float32,
        device=torch.device("cpu"),
    ).train()
    checkpoint_activations(model, mode)
    return model


def loss_of(model: nn.Module) -> Tensor:
    ids = torch.randint(64, (2, 19), generator=torch.Generator().manual_seed(0))
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def kept_bytes(mode: str, experts: bool = False) -> int:
    """Bytes that autograd keeps of the forward, whoever keeps them; each storage counts once."""
    model = model_with(mode)
    if experts:
        assert recompute_expert_activations(model) == 2
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    del loss
    return sum(kept.values())


def _live_bytes() -> int:
    """Bytes of all tensors alive, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [x for x in gc.get_objects() if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def test_each_mode_keeps_less() -> None:
    kept = {mode: kept_bytes(mode) for mode in MODES}
    assert kept["full"] == kept["except_attention"] < kept["moe"] < kept["none"]
    assert kept["full"] < kept["attention"] < kept["none"]


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_same(mode: str) -> None:
    expected, found = model_with("none"), model_with(mode)
    for model in (expected, found):
        loss_of(model).backward()
    for (name, a), b in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("mode", MODES)
def test_routing_is_replayed_and_counted_once(mode: str) -> None:
    model = model_with(mode)
    chosen: dict[str, list[tuple[bool, Tensor]]] = {}
    routers = [(n, m) for n, m in model.named_modules() if isinstance(m, Router)]
    for name, router in routers:
        seen = chosen.setdefault(name, [])
        router.register_forward_hook(
            lambda _m, _i, output, seen=seen: seen.append((recomputing(), output[1].clone()))
        )
    loss_of(model).backward()
    assert not recomputing()
    for name, router in routers:
        again = mode in ("moe", "except_attention", "full")
        assert [when for when, _ in chosen[name]] == [False, True][: 1 + again]
        assert all(torch.equal(experts, chosen[name][0][1]) for _, experts in chosen[name])
        assert int(router.tokens_per_expert.sum()) == NUM_TOKENS * TOP_K


def test_full_keeps_the_layer_that_backward_begins_with() -> None:
    model, expected = model_with("full"), model_with("none")
    assert not keep_last_layer(expected)
    assert keep_last_layer(model)
    again: list[int] = []
    for number, layer in enumerate(model.get_decoder().layers):  # type: ignore[operator, union-attr]
        layer.self_attn.register_forward_hook(
            lambda *_, number=number: again.append(number) if recomputing() else None
        )
    for each in (model, expected):
        loss_of(each).backward()
    last = len(model.get_decoder().layers) - 1  # type: ignore[operator, union-attr, arg-type]
    assert again == list(reversed(range(last)))
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


# Heads of one width, which torch's fused attention on a CPU wants.
EVEN_HEADS = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}


class Attentions(TorchDispatchMode):
    """Counts fused attention, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "_scaled_dot_product" in func.name():
            self.names.append(func.name().rpartition("cpu")[2])
        return func(*args, **(kwargs or {}))


def test_kept_attention_is_not_made_again() -> None:
    made = {}
    models = {mode: model_with(mode, **EVEN_HEADS) for mode in ("none", "full", "except_attention")}
    for mode, model in models.items():
        with Attentions() as seen:
            losses = [loss_of(model) for _ in range(2)]  # two forwards before a backward
            (losses[0] + losses[1]).backward()
        made[mode] = (seen.names.count(""), seen.names.count("_backward"))
    assert made == {"none": (6, 6), "full": (12, 6), "except_attention": (6, 6)}
    for name in ("full", "except_attention"):
        pairs = zip(models["none"].parameters(), models[name].parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)  # type: ignore[arg-type]


def test_a_layer_that_keeps_attention_keeps_its_result_only() -> None:
    def kept(mode: str) -> int:
        model = model_with(mode, **EVEN_HEADS)
        before = _live_bytes()
        loss = loss_of(model)
        after = _live_bytes()
        del loss
        return after - before

    # Of every token and head the output and the log-sum-exp, in float32, in three layers.
    assert kept("except_attention") - kept("full") == 3 * 2 * 19 * 2 * (16 + 1) * 4


def test_dropout_in_attention_keeps_nothing() -> None:
    results = {}
    for mode in ("none", "except_attention"):
        model = model_with(mode, **EVEN_HEADS, attention_dropout=0.3)
        torch.manual_seed(3)
        loss_of(model).backward()
        results[mode] = [p.grad for p in model.parameters()]
    pairs = zip(*results.values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # type: ignore[arg-type]


def test_attention_over_intervals_is_kept_too() -> None:
    x_BHQD = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    kept, found = KeptAttention(), []
    for context, num_made in ((kept.recording, 2), (kept.replaying, 0)):
        with Attentions() as seen, context():
            intervals = (((0, 3), (3, 9)),)
            found.append(attend(x_BHQD, x_BHQD, x_BHQD, intervals, Rule(causal=True)))
        assert len(seen.names) == num_made
    assert torch.equal(*found)
    assert not kept.results


def test_an_attention_that_cannot_be_kept_is_told() -> None:
    with pytest.warns(UserWarning, match="attention is 'eager': it is made again as with `full`"):
        model_with("except_attention", attn_implementation="eager")


def test_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="is moe: no such part"):
        model_with("moe", first_k_dense_replace=3)


def test_yes_and_no_are_understood() -> None:
    assert TrainSection(activation_checkpointing=True).activation_checkpointing == "full"
    assert TrainSection(activation_checkpointing=False).activation_checkpointing == "none"
    for value in ("layers", 1, ["moe"]):
        with pytest.raises(ValidationError):
            TrainSection(activation_checkpointing=value)


def test_experts_that_compute_their_activation_again_keep_less() -> None:
    # Gate, up and their product of every choice, in float32, in two layers.
    saved = 3 * NUM_TOKENS * TOP_K * 24 * 4 * 2
    assert kept_bytes("none", experts=True) <= kept_bytes("none") - saved


def test_the_config_decides_for_layers_and_experts() -> None:
    flags = {"train.activation_checkpointing": "attention", "moe.recompute": "activation"}
    model = model_with("none")
    set_up_recomputation(model, resolve_config(flags=flags).config)
    parts = {type(m).__name__: "forward" in vars(m) for m in model.model.layers[1].children()}
    assert parts["FusedDeepseekV3Attention"]
    assert not parts["FusedDeepseekV3RMSNorm"]
    assert all(m.recompute_activation for m in model.modules() if isinstance(m, LocalExperts))


def test_models_without_our_experts_say_so() -> None:
    with pytest.raises(ConfigError, match="Linear has none of epctl's experts"):
        recompute_expert_activations(nn.Linear(2, 2))
