"""One kernel stands in for a feed-forward module's SwiGLU where it computes just that."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity_ranks import tiny_config
from torch import Tensor, nn

from epctl.runtime.build import build_model
from epctl.runtime.fused_gate import FusedGate, fuse_gates
from epctl.runtime.mesh import Mesh
from epctl.runtime.weights import RandomWeights

HIDDEN, INNER = 24, 40
PLAIN = [
    ("llama", "LlamaMLP"),
    ("deepseek_v3", "DeepseekV3MLP"),
    ("qwen2_moe", "Qwen2MoeMLP"),
    ("qwen3_moe", "Qwen3MoeMLP"),
    ("glm4_moe", "Glm4MoeMLP"),
    ("qwen2_5_vl", "Qwen2_5_VLMLP"),
]
OTHER = [("phi3", "Phi3MLP"), ("gpt_neox", "GPTNeoXMLP")]


def module_of(file: str, name: str, activation: str = "silu") -> nn.Module:
    config = SimpleNamespace(
        hidden_size=HIDDEN, intermediate_size=INNER, hidden_act=activation, mlp_bias=False,
        hidden_activation=activation,
    )  # fmt: skip
    modeling = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    made: nn.Module = getattr(modeling, name)(config)
    return made


def run(module: nn.Module) -> list[Tensor]:
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("file", "name"), PLAIN)
def test_values_and_gradients_are_transformers_own(file: str, name: str) -> None:
    theirs = module_of(file, name)
    ours = copy.deepcopy(theirs)
    assert fuse_gates(ours) == 1
    assert isinstance(ours, FusedGate)
    assert type(ours).__name__ == f"Fused{name}"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert fuse_gates(ours) == 0
    for one, other in zip(run(ours), run(theirs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("file", "name"), OTHER)
def test_other_layouts_stay(file: str, name: str) -> None:
    assert fuse_gates(module_of(file, name)) == 0


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_other_functions_stay(activation: str) -> None:
    assert fuse_gates(module_of("llama", "LlamaMLP", activation)) == 0


class Gated(nn.Module):
    """Llama's names around something else."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER)
        self.up_proj = nn.Linear(HIDDEN, INNER)
        self.down_proj = nn.Linear(INNER, HIDDEN)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.finish(self.down_proj(inner))

    def finish(self, y: Tensor) -> Tensor:
        return y


class Dropping(Gated):
    def finish(self, y: Tensor) -> Tensor:
        return nn.functional.dropout(y, 0.5, self.training)


class Clamping(Gated):
    def finish(self, y: Tensor) -> Tensor:
        return y.clamp(-1.0, 1.0)


class ClampingLate(Gated):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).clamp(max=1000.0), self.up_proj(x).clamp(-1000.0, 1000.0)
        result: Tensor = self.down_proj(nn.functional.silu(gate) * up)
        return result


class Scaling(Gated):
    """Its second input is optional: a probe would never see it."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(x)


class Residual(Gated):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * super().forward(x)


@pytest.mark.parametrize("other", [Dropping, Clamping, ClampingLate, Scaling, Residual])
def test_what_computes_more_stays(other: type[Gated]) -> None:
    assert fuse_gates(other()) == 0
    assert fuse_gates(Gated()) == 1


def test_a_probe_leaves_dropout_as_it_is() -> None:
    for made in (Gated(drop=nn.Dropout(0.1)), Clamping(drop=nn.Dropout(0.1))):
        fuse_gates(made)
        assert made.drop.training


def test_what_holds_more_stays() -> None:
    assert fuse_gates(Gated(norm=nn.LayerNorm(INNER))) == 0
    assert fuse_gates(Gated(scale=nn.Parameter(torch.ones(1)))) == 0


def test_a_model_to_train_has_them_in_dense_layers_and_shared_experts() -> None:
    def built(*, swap: bool) -> nn.Module:
        return build_model(
            tiny_config(),
            Mesh(0, 1, 1, 0),
            RandomWeights(seed=1, std=0.1),
            dtype=torch.float32,
            device=torch.device("cpu"),
            swap=swap,
        )

    fused = [name for name, m in built(swap=True).named_modules() if isinstance(m, FusedGate)]
    assert fused[0].endswith("layers.0.mlp")
    assert all(name.endswith("shared_experts") for name in fused[1:])
    assert len(fused) == 3
    assert not any(isinstance(module, FusedGate) for module in built(swap=False).modules())
