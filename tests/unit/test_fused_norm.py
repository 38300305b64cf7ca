"""One kernel stands in for a model's RMS norms where they compute just that, and nowhere else."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from parity_ranks import tiny_config
from torch import Tensor, nn
from torch.nn import functional as F

from epctl.runtime.build import build_model
from epctl.runtime.fused_norm import FusedNorm, FusedOffsetNorm, fuse_norms
from epctl.runtime.mesh import Mesh
from epctl.runtime.weights import RandomWeights

HIDDEN, EPSILON = 192, 1e-5
# Half the distance between neighbours, relative: what rounding to bf16 once may cost.
BFLOAT16_ROUNDING = 2**-8

PLAIN = [
    ("llama", "LlamaRMSNorm"),
    ("deepseek_v3", "DeepseekV3RMSNorm"),
    ("qwen3_vl", "Qwen3VLTextRMSNorm"),
    ("glm4v", "Glm4vRMSNorm"),
    ("gpt_oss", "GptOssRMSNorm"),
    ("olmo2", "Olmo2RMSNorm"),
    ("t5", "T5LayerNorm"),
]
OFFSET = [
    ("gemma", "GemmaRMSNorm"),
    ("gemma3", "Gemma3RMSNorm"),
    ("qwen3_next", "Qwen3NextRMSNorm"),
]


def class_of(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)


def norm_of(module: str, name: str) -> nn.Module:
    """Returns transformers' norm; a weight of one, or of zero, would hide what is done with it."""
    norm: nn.Module = class_of(module, name)(HIDDEN, EPSILON)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(HIDDEN, generator=generator))  # type: ignore[operator]
    return norm


def fused(norm: nn.Module) -> nn.Module:
    ours = copy.deepcopy(norm)
    assert fuse_norms(ours) == 1
    return ours


def tokens(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(4, 33, HIDDEN, generator=torch.Generator().manual_seed(2))


def run(norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y: Tensor = norm(x)
    generator = torch.Generator().manual_seed(3)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    weight = norm.get_parameter("weight")
    assert x.grad is not None
    assert weight.grad is not None
    return {"y": y.detach(), "x.grad": x.grad, "weight.grad": weight.grad}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize(("module", "name"), PLAIN + OFFSET)
def test_float32_equals_transformers(module: str, name: str, scale: float) -> None:
    theirs = norm_of(module, name)
    ours, x = fused(theirs), tokens(scale)
    assert isinstance(ours, FusedOffsetNorm) is ((module, name) in OFFSET)
    expected, found = run(theirs, x), run(ours, x)
    for key, value in expected.items():
        distance = float((found[key] - value).norm() / value.norm())
        assert distance <= 1e-6, (key, distance)


@pytest.mark.parametrize(("module", "name"), PLAIN + OFFSET)
def test_bfloat16_rounds_once(module: str, name: str) -> None:
    theirs = norm_of(module, name).bfloat16()
    ours, x = fused(theirs), tokens().bfloat16()
    offset = 1.0 if isinstance(ours, FusedOffsetNorm) else 0.0
    scale_D = theirs.get_parameter("weight").double() + offset
    exact = F.rms_norm(x.double(), (HIDDEN,), scale_D, EPSILON)
    found, expected = ours(x), theirs(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    # The last digits are what float32 does not hold.
    once = BFLOAT16_ROUNDING * (1 + 1e-4)
    assert bool(((found.double() - exact).abs() <= once * exact.abs()).all())
    assert bool(((found.double() - expected.double()).abs() <= 2 * once * exact.abs()).all())
    gradients, wanted = run(ours, x), run(theirs, x)
    for key in ("x.grad", "weight.grad"):
        distance = (gradients[key].double() - wanted[key].double()).norm()
        assert float(distance / wanted[key].double().norm()) <= 2 * BFLOAT16_ROUNDING, key


@pytest.mark.parametrize(("module", "name"), PLAIN + OFFSET)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_mixed_dtypes_are_transformers_own(module: str, name: str, weight: torch.dtype) -> None:
    theirs = norm_of(module, name).to(weight)
    other = torch.bfloat16 if weight == torch.float32 else torch.float32
    x = tokens().to(other)
    found, expected = fused(theirs)(x), theirs(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_callers_may_name_the_input() -> None:
    ours = fused(norm_of("llama", "LlamaRMSNorm"))
    assert torch.equal(ours(hidden_states=tokens()), ours(tokens()))


class Odd(nn.Module):
    """A norm that looks like the others; `kind` is what it does otherwise."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))
        self.eps, self.kind = EPSILON, kind

    def forward(self, x: Tensor) -> Tensor:
        values = x - x.mean(-1, keepdim=True) if self.kind == "centred" else x
        if self.kind == "clamped":
            values = values.clamp(-100, 100)
        eps = 2 * self.eps if self.kind == "another epsilon" else self.eps
        computed = values if self.kind == "in bf16" else values.float()
        y = computed * torch.rsqrt(computed.pow(2).mean(-1, keepdim=True) + eps)
        y = y * (self.weight.abs() if self.kind == "positive weight" else self.weight)
        return y if self.kind == "float32 result" else y.to(x.dtype)


class Gated(Odd):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x) * (1.0 if gate is None else gate)


ODD = ("centred", "clamped", "another epsilon", "in bf16", "positive weight", "float32 result")


def test_the_odd_class_is_plain_without_its_oddity() -> None:
    assert fuse_norms(Odd("nothing")) == 1


@pytest.mark.parametrize("kind", ODD)
def test_a_norm_that_computes_anything_else_is_left_alone(kind: str) -> None:
    norm = Odd(kind)
    assert fuse_norms(norm) == 0
    assert type(norm) is Odd


def test_what_cannot_be_told_is_left_alone() -> None:
    assert fuse_norms(Gated("nothing")) == 0
    assert fuse_norms(nn.LayerNorm(HIDDEN, bias=False)) == 0
    assert fuse_norms(class_of("qwen3_next", "Qwen3NextRMSNormGated")(HIDDEN)) == 0
    assert fuse_norms(class_of("llama4", "Llama4TextL2Norm")()) == 0
    replaced = Odd("nothing")
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    assert fuse_norms(replaced) == 0


def test_fusing_twice_changes_nothing() -> None:
    norm = Odd("nothing")
    assert fuse_norms(norm) == 1
    before = type(norm)
    assert fuse_norms(norm) == 0
    assert type(norm) is before


def test_a_model_on_meta_is_fused_and_keeps_its_names() -> None:
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    with torch.device("meta"):
        config = Qwen2_5_VLConfig(text_config={"num_hidden_layers": 2}, vision_config={"depth": 2})
        model = AutoModelForImageTextToText.from_config(config)
    names = list(model.state_dict())
    # Two a layer of either stack, one at the end of the text and one in the merger.
    assert fuse_norms(model) == 2 * 2 + 1 + 2 * 2 + 1
    assert list(model.state_dict()) == names
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("swap", [True, False])
def test_the_trained_model_has_them_and_its_peers_do_not(swap: bool) -> None:
    cpu = torch.device("cpu")
    model = build_model(
        tiny_config(),
        Mesh(0, 1, 1, 0),
        RandomWeights(1),
        dtype=torch.float32,
        device=cpu,
        swap=swap,
    )
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert norms
    assert {isinstance(m, FusedNorm) for m in norms} == {swap}
