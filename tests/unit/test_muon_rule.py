"""The Muon update itself, and the whole optimizer against torch.optim.Muon without DeepSpeed."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from host_reads import READING_METHODS, HostReads
from torch import Tensor, nn

from epctl.config import resolve_config
from epctl.errors import ConfigError
from epctl.kernels.newton_schulz import orthogonalize
from epctl.launch.ds_config import deepspeed_config
from epctl.runtime.deepspeed_seams import FlatPartition, Fragment
from epctl.runtime.muon_rule import MuonRule, update_scale
from epctl.runtime.optimizer import MatrixOptimizer

SHAPES = ((24, 16), (16, 40), (20, 20))
RATE, DECAY = 0.02, 0.1


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def optimizer_over(
    parameters: list[nn.Parameter], kind: str = "muon", **options: Any
) -> MatrixOptimizer:
    """An optimizer wired as at ZeRO-0 on one rank: every Parameter is a tensor of its own."""
    group = {"params": parameters, "name": kind, "kind": kind, "lr": RATE, "weight_decay": DECAY}
    optimizer = MatrixOptimizer([group], **options)
    fragments = [((Fragment(p, 0, p.numel(), 0),),) for p in parameters]
    optimizer.wire(
        [FlatPartition(p, None, 0, f) for p, f in zip(parameters, fragments, strict=True)]
    )
    return optimizer


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], step: int) -> None:
    for parameter, gradient in zip(parameters, gradients(step), strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_muon_step_by_step(
    scale: Any, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch iterates in bfloat16; with its iteration in float32 nothing else differs."""

    def in_float32(grad: Tensor, coefficients: Any, num_steps: int, eps: float) -> Tensor:
        assert coefficients == (3.4445, -4.775, 2.0315)
        return orthogonalize(
            grad[None], coefficients="jordan", num_steps=num_steps, method="standard"
        )[0]

    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", in_float32)
    ours, theirs = matrices(), matrices()
    rule = MuonRule(scale=scale, nesterov=nesterov, coefficients="jordan", method="standard")
    optimizer = optimizer_over(ours, rule=rule)
    reference = torch.optim.Muon(
        theirs, lr=RATE, weight_decay=DECAY, nesterov=nesterov, adjust_lr_fn=scale
    )
    for step in range(6):
        run(optimizer, ours, step)
        run(reference, theirs, step)
        for mine, other in zip(ours, theirs, strict=True):
            assert relative(mine, other) < 1e-6


def test_stays_within_bfloat16_of_unchanged_torch_muon() -> None:
    """The summed update of torch's own bfloat16 iteration is off by its rounding, not by a rule."""
    ours, theirs, before = matrices(), matrices(), matrices()
    optimizer = optimizer_over(ours, rule=MuonRule(coefficients="jordan", method="standard"))
    reference = torch.optim.Muon(
        theirs, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(6):
        run(optimizer, ours, step)
        run(reference, theirs, step)
    for mine, other, start in zip(ours, theirs, before, strict=True):
        assert relative(mine - start, other - start) < 0.02


def test_adamw_parameters_equal_torch_adamw() -> None:
    ours, theirs = matrices(), matrices()
    optimizer = optimizer_over(ours, kind="adamw", betas=(0.9, 0.95), eps=1e-8)
    reference = torch.optim.AdamW(
        theirs, lr=RATE, weight_decay=DECAY, betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    for step in range(4):
        run(optimizer, ours, step)
        run(reference, theirs, step)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_update_scales_for_moonlights_experts() -> None:
    assert update_scale(1408, 2048, "match_rms_adamw") == pytest.approx(9.0510, abs=1e-4)
    assert update_scale(1408, 2048, "original") == 1.0
    assert update_scale(2048, 1408, "original") == pytest.approx(math.sqrt(2048 / 1408))


def test_update_has_the_rms_of_an_adamw_step() -> None:
    direction = torch.randn(1, 96, 160, generator=torch.Generator().manual_seed(3))
    update = MuonRule(coefficients="you").update_of(direction)
    assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=0.03)


def test_decay_is_decoupled_and_uses_the_unscaled_rate() -> None:
    parameters, before = matrices(), matrices()
    optimizer = optimizer_over(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, start in zip(parameters, before, strict=True):
        assert torch.equal(parameter, start * (1 - RATE * DECAY))


def test_no_gradient_lets_the_momentum_go_on() -> None:
    """An expert that no token reached is still moved, on every rank alike: state is never lazy."""
    parameters = matrices()
    optimizer = optimizer_over(parameters)
    run(optimizer, parameters, 0)
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in parameters]
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    optimizer.step()
    for parameter, start, buffer in zip(parameters, before, buffers, strict=True):
        assert torch.allclose(optimizer.state[parameter]["momentum_buffer"], 0.95 * buffer)
        assert relative(parameter, start) > 1e-3


def test_bfloat16_momentum_is_kept_rounded_and_survives_load_state_dict() -> None:
    """torch casts loaded state to the parameter's dtype, which broke a resume upstream (7746)."""
    parameters, exact = matrices(), matrices()
    rule = MuonRule(momentum_dtype=torch.bfloat16)
    optimizer = optimizer_over(parameters, rule=rule)
    reference = optimizer_over(exact)
    for step in range(4):
        run(optimizer, parameters, step)
        run(reference, exact, step)
    for mine, other in zip(parameters, exact, strict=True):
        assert optimizer.state[mine]["momentum_buffer"].dtype == torch.bfloat16
        assert 0 < relative(mine, other) < 5e-3
    second = optimizer_over(matrices(), rule=rule)
    second.load_state_dict(optimizer.state_dict())
    for old, new in zip(optimizer.state.values(), second.state.values(), strict=True):
        assert new["momentum_buffer"].dtype == torch.bfloat16
        assert torch.equal(old["momentum_buffer"], new["momentum_buffer"])


def test_row_blocks_are_matrices_of_their_own() -> None:
    """Gate and up in one Parameter give the updates of two, with the scale of the block's shape."""
    generator = torch.Generator().manual_seed(5)
    halves = [nn.Parameter(torch.randn(8, 12, generator=generator)) for _ in range(2)]
    fused = nn.Parameter(torch.cat([half.detach() for half in halves]))
    gradient = torch.randn(16, 12, generator=generator)
    apart = optimizer_over(halves)
    together = optimizer_over([fused], row_blocks={id(fused): (8, 8)})
    for half, part in zip(halves, gradient.chunk(2), strict=True):
        half.grad = part.clone()
    fused.grad = gradient.clone()
    apart.step()
    together.step()
    assert torch.equal(fused, torch.cat([half.detach() for half in halves]))


def test_rows_are_scaled_after_the_step_and_only_once() -> None:
    parameters, plain = matrices(), matrices()
    optimizer, reference = optimizer_over(parameters), optimizer_over(plain)
    factors = torch.linspace(0.5, 1.0, SHAPES[0][0])
    optimizer.scale_rows_after_step({id(parameters[0]): factors})
    run(optimizer, parameters, 0)
    run(reference, plain, 0)
    assert torch.equal(parameters[0], plain[0] * factors[:, None])
    assert torch.equal(parameters[1], plain[1])
    scaled = parameters[1].detach().clone()
    run(optimizer, parameters, 1)
    run(reference, plain, 1)
    assert torch.equal(parameters[1], plain[1])
    assert not torch.equal(parameters[1], scaled)


def test_no_value_of_a_step_is_read_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host runs ahead of the GPU. Masters in host memory (offload) are the one exception."""
    parameters = matrices()
    optimizer = optimizer_over(parameters)
    optimizer.scale_rows_after_step({id(parameters[0]): torch.ones(SHAPES[0][0])})
    for parameter, gradient in zip(parameters, gradients(0), strict=True):
        parameter.grad = gradient

    def refuse(*args: Any) -> None:
        raise AssertionError("the host reads a tensor")

    for name in READING_METHODS:
        monkeypatch.setattr(Tensor, name, refuse)
    with HostReads() as reads:
        optimizer.step()
    monkeypatch.undo()
    assert not reads.found
    with HostReads() as reads:
        parameters[0].sum().item()
    assert reads.found  # the spy sees what it is there for


def test_kernels_that_cannot_run_here_are_refused_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'triton' cannot run on cpu"):
        optimizer_over(matrices(), rule=MuonRule(kernels="triton"))


def test_adamw_reads_its_step_count_alone_which_is_on_the_host() -> None:
    parameters = matrices()
    optimizer = optimizer_over(parameters, kind="adamw")
    with HostReads() as reads:
        run(optimizer, parameters, 0)
    assert len(reads.found) == len(parameters)
    assert all(optimizer.state[p]["step"].device.type == "cpu" for p in parameters)


def test_steps_before_wiring_change_nothing() -> None:
    """ZeRO-0 bf16's constructor runs a step with zero gradients: it would decay the weights."""
    parameters = matrices()
    group = {"params": parameters, "name": "m", "kind": "muon", "lr": 0.1, "weight_decay": 0.5}
    optimizer = MatrixOptimizer([group])
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, matrices(), strict=True))
    assert not optimizer.state


def test_wiring_without_a_muon_parameter_fails() -> None:
    parameters = matrices()
    group = {"params": parameters, "name": "m", "kind": "muon", "lr": 0.1, "weight_decay": 0.0}
    optimizer = MatrixOptimizer([group])
    first = parameters[0]
    layout = FlatPartition(first, None, 0, ((Fragment(first, 0, first.numel(), 0),),))
    with pytest.raises(AssertionError, match="2 Muon parameters are in no partition"):
        optimizer.wire([layout])


def test_bfloat16_sums_are_in_float32_where_the_engine_can() -> None:
    """ZeRO-1 changes its class for it, so only a real sum asks for it."""
    stages = {}
    for zero, accumulation in itertools.product((0, 1, 2, 3), (1, 4)):
        flags = {"parallel.zero": zero, "train.gradient_accumulation_steps": accumulation}
        document = deepspeed_config(resolve_config(flags=flags).config, bfloat16=True, on_cpu=True)
        stages[zero, accumulation] = "data_types" in document
    assert [key for key, value in stages.items() if value] == [
        (1, 4),
        (2, 1),
        (2, 4),
        (3, 1),
        (3, 4),
    ]


def test_deepspeeds_own_muon_is_steered_around_its_traps() -> None:
    for zero in (0, 1, 2, 3):
        flags = {"parallel.zero": zero, "optim.name": "deepspeed-muon"}
        flags |= {"optim.lr": 2e-3, "optim.adamw_lr": 1e-4}
        document = deepspeed_config(resolve_config(flags=flags).config, bfloat16=False, on_cpu=True)
        assert document["gradient_clipping"] == 0.0
        assert document["zero_optimization"]["reduce_scatter"] is (zero < 3)
        parameters = document["optimizer"]["params"]
        assert (parameters["muon_lr"], parameters["adam_lr"]) == (2e-3, 1e-4)


def test_offload_without_zero_is_refused() -> None:
    config = resolve_config(flags={"parallel.zero": 0, "optim.offload": True}).config
    with pytest.raises(ConfigError, match="needs ZeRO 1, 2 or 3"):
        deepspeed_config(config, bfloat16=False, on_cpu=True)
