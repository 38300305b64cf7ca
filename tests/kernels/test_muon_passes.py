"""Muon's passes in Triton against torch's, in float64: odd sizes, zero matrices, poisoned borders.

On a CPU in Triton's interpreter, by a run of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from epctl.bench.muon_own import GPU_VARIANTS, own_iteration
from epctl.kernels import muon_passes
from epctl.kernels.adamw import AdamWRule, adamw_step_
from epctl.kernels.muon_passes import (
    Implementation,
    PassChoice,
    apply_update_,
    choose_passes,
    mix_matrices_,
    mix_momentum_,
    normalize_into,
)
from epctl.kernels.newton_schulz import orthogonalize

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
here = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETING), reason="needs a GPU or the interpreter"
)
ROUNDOFF = 2.0**-24
SIZES = [1, 7, 2047, 2048, 2049, 5000]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests below run on this GPU themselves")
@pytest.mark.skipif(INTERPRETING, reason="already in the interpreter")
def test_in_the_interpreter(run_in_interpreter: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    assert "passed" in run_in_interpreter(__file__)


def random(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def within(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the tensor's copy in the middle of a poisoned flat one, and that whole one."""
    around = torch.full((tensor.numel() + 128,), torch.nan, dtype=tensor.dtype).to(tensor.device)
    inner = around[64 : 64 + tensor.numel()].view_as(tensor)
    inner.copy_(tensor)
    return inner, around


def assert_borders(around: Tensor) -> None:
    assert around[:64].isnan().all()
    assert around[-64:].isnan().all()


def assert_close(found: Tensor, expected: Tensor, num_roundings: float, dtype: torch.dtype) -> None:
    """Within roundings of values no larger than the largest; plus one to what it is stored in."""
    bfloat16 = 2.0**-7 if INTERPRETING else 2.0**-8  # the interpreter cuts off, a GPU rounds
    stored = {torch.float32: ROUNDOFF, torch.bfloat16: bfloat16, torch.float16: 2.0**-11}[dtype]
    assert found.isfinite().all()
    difference = (found.double() - expected).abs()
    allowed = num_roundings * ROUNDOFF * expected.abs().max() + stored * expected.abs() + 2.0**-25
    assert (difference <= allowed).all(), float((difference - allowed).max())


@here
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_momentum(size: int, dtype: torch.dtype, nesterov: bool, device: torch.device) -> None:
    gradient, around_gradient = within(random(device, size))
    buffer, around_buffer = within(random(device, size, seed=1).to(dtype))
    average = 0.95 * buffer.double() + 0.05 * gradient.double()
    direction = 0.05 * gradient.double() + 0.95 * average if nesterov else average.clone()
    mix_momentum_(gradient, buffer, 0.95, nesterov=nesterov, implementation="triton")
    # The factor itself is rounded to float32 (0.05 by up to 2^-25/0.05), then five operations.
    assert_close(buffer, average, 20 + 5, dtype)
    assert_close(gradient, direction, 20 + 8, torch.float32)
    assert_borders(around_gradient)
    assert_borders(around_buffer)


@here
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_momentum_of_a_divided_gradient(
    implementation: Implementation, device: torch.device
) -> None:
    """Clipping: as if the gradient had been divided before, whatever holds the divisor."""
    gradient, buffer = random(device, 5000), random(device, 5000, seed=1)
    expected, average = gradient / 3.5, buffer.clone()
    mix_momentum_(expected, average, 0.95, nesterov=True, implementation=implementation)
    mix_momentum_(
        gradient, buffer, 0.95, nesterov=True, divisor=torch.tensor(3.5),
        implementation=implementation,
    )  # fmt: skip
    assert_close(buffer, average.double(), 8, torch.float32)
    assert_close(gradient, expected.double(), 8, torch.float32)


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 9), (2, 64, 64), (1, 181, 200), (0, 4, 4)])
def test_norm_and_cast(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x, _ = within(random(device, *shape))
    if shape[0] == 3:
        x[1] = 0.0  # an expert that no token reached
    out, around = within(torch.full(shape, torch.nan, dtype=dtype, device=device))
    normalize_into(x, out, implementation="triton")
    norms = x.double().norm(dim=(1, 2), keepdim=True)
    expected = torch.where(norms > 0, x.double() / norms, 0.0)
    if x.numel():
        assert_close(out, expected, 1, dtype)
    assert_borders(around)


@here
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 9), (2, 64, 64), (2, 181, 200), (0, 4, 4)])
def test_momentum_of_matrices_and_their_norms(
    shape: tuple[int, int, int], dtype: torch.dtype, nesterov: bool, device: torch.device
) -> None:
    """The squares that come with directions give what reading the directions again gives."""
    gradient, around_gradient = within(random(device, *shape))
    buffer, around_buffer = within(random(device, *shape, seed=1).to(dtype))
    if shape[0] == 3:
        gradient[1] = buffer[1] = 0.0
    expected, average = gradient.clone(), buffer.clone()
    divisor = torch.tensor(3.5, device=device)
    squares = mix_matrices_(
        gradient, buffer, 0.95, nesterov=nesterov, divisor=divisor, implementation="triton"
    )
    mix_momentum_(
        expected, average, 0.95, nesterov=nesterov, divisor=divisor, implementation="triton"
    )
    assert torch.equal(gradient, expected)
    assert torch.equal(buffer, average)
    assert squares is not None
    found, again = (torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2))
    normalize_into(gradient, found, squares_BS=squares, implementation="triton")
    normalize_into(gradient, again, implementation="triton")
    assert torch.equal(found, again)
    norms = gradient.double().norm(dim=(1, 2))
    assert torch.allclose(squares.sum(dim=1).sqrt(), norms, rtol=1e-12)
    assert_borders(around_gradient)
    assert_borders(around_buffer)


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=here)])
def test_directions_beside_a_gradient_of_another_dtype(
    implementation: Implementation, device: torch.device
) -> None:
    """As if it had been widened; it stays as it was."""
    gradient = random(device, 3, 7, 301).bfloat16()
    buffer = random(device, 3, 7, 301, seed=1)
    expected, average, before = gradient.float(), buffer.clone(), gradient.clone()
    mix_matrices_(expected, average, 0.95, nesterov=True, implementation=implementation)
    found, around = within(torch.full((3, 7, 301), torch.nan, device=device))
    mix_matrices_(
        gradient, buffer, 0.95, nesterov=True, out_BMN=found, implementation=implementation
    )
    assert torch.equal(found, expected)
    assert torch.equal(buffer, average)
    assert torch.equal(gradient, before)
    assert_borders(around)


def test_torchs_adamw_takes_parts_of_a_tensor(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = AdamWRule(step=3, rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1)
    results = []
    for part in (2**26, 999):
        monkeypatch.setattr("epctl.kernels.adamw.PART_ELEMENTS", part)
        weight, gradient, average = (random(device, 50, 100, seed=i) for i in range(3))
        square = random(device, 50, 100, seed=3).square()
        adamw_step_(weight, gradient, average, square, rule, divisor=torch.tensor(2.0))
        results.append((weight, average, square))
    # To the roundings of its vectors and of what is left over at an end.
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-21, atol=2.0**-24)


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=here)])
def test_adamw_of_a_gradient_of_another_dtype(
    implementation: Implementation, device: torch.device
) -> None:
    rule = AdamWRule(step=3, rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1)
    gradient = random(device, 5000).bfloat16()
    results = []
    for given in (gradient, gradient.float()):
        weight, average = random(device, 5000, seed=1), random(device, 5000, seed=2)
        square = random(device, 5000, seed=3).square()
        adamw_step_(weight, given, average, square, rule, implementation=implementation)
        results.append((weight, average, square))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=here)])
def test_a_copy_of_the_new_weight(implementation: Implementation, device: torch.device) -> None:
    weight, update = random(device, 5000), random(device, 5000, seed=1) / 30
    copy, around = within(torch.full((5000,), torch.nan, dtype=torch.bfloat16, device=device))
    apply_update_(
        weight, update, rate=0.02, scale=9.05, decay=0.1, copy_P=copy,
        implementation=implementation,
    )  # fmt: skip
    assert_close(copy, weight.double(), 0, torch.bfloat16)
    assert_borders(around)


def adamw_by_hand(
    weight: Tensor, gradient: Tensor, average: Tensor, square: Tensor, rule: AdamWRule
) -> tuple[Tensor, Tensor, Tensor]:
    """In float64; the paper's algorithm 2 with its schedule's factor in the rate."""
    weight, gradient, average, square = (x.double() for x in (weight, gradient, average, square))
    average = rule.beta1 * average + (1 - rule.beta1) * gradient
    square = rule.beta2 * square + (1 - rule.beta2) * gradient**2
    unbiased = average / (1 - rule.beta1**rule.step)
    root = (square / (1 - rule.beta2**rule.step)).sqrt()
    weight = weight * (1 - rule.rate * rule.decay) - rule.rate * unbiased / (root + rule.eps)
    return weight, average, square


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=here)])
@pytest.mark.parametrize("step", [1, 2, 5000])
@pytest.mark.parametrize("size", SIZES)
def test_adamw(size: int, step: int, implementation: Implementation, device: torch.device) -> None:
    rule = AdamWRule(step=step, rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1)
    weight, around_weight = within(random(device, size))
    gradient, around_gradient = within(random(device, size, seed=1))
    average, around_average = within(random(device, size, seed=2) * (step > 1))
    square, around_square = within(random(device, size, seed=3).square() * (step > 1))
    copy, around_copy = within(torch.full((size,), torch.nan, device=device).bfloat16())
    expected = adamw_by_hand(weight, gradient / 3.5, average, square, rule)
    adamw_step_(
        weight, gradient, average, square, rule,
        divisor=torch.tensor(3.5, device=device), copy_P=copy, implementation=implementation,
    )  # fmt: skip
    for found, wanted in zip((weight, average, square), expected, strict=True):
        # 0.05 and 0.1 are rounded to float32 as a whole, by up to 20 of its last places.
        assert_close(found, wanted, 20 + 8, torch.float32)
    assert_close(copy, weight.double(), 0, torch.bfloat16)
    for around in (around_weight, around_average, around_square, around_copy, around_gradient):
        assert_borders(around)


@here
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e30, 1e38])
def test_no_norm_overflows_or_underflows(scale: float, device: torch.device) -> None:
    x = random(device, 2, 20, 30).clamp(-3, 3) * scale
    out = torch.empty_like(x, dtype=torch.float16)
    normalize_into(x, out, implementation="triton")
    expected = x.double() / x.double().norm(dim=(1, 2), keepdim=True)
    assert_close(out, expected, 1, torch.float16)


@here
@pytest.mark.parametrize("update_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_update(
    size: int, dtype: torch.dtype, update_dtype: torch.dtype, device: torch.device
) -> None:
    weight, around = within(random(device, size).to(dtype))
    update = (random(device, size, seed=2) / 30).to(update_dtype)
    expected = (1 - 0.02 * 0.1) * weight.double() - 0.02 * 9.05 * update.double()
    apply_update_(weight, update, rate=0.02, scale=9.05, decay=0.1, implementation="triton")
    assert_close(weight, expected, 6, dtype)
    assert_borders(around)


@here
def test_triton_and_torch_give_the_same_step(device: torch.device) -> None:
    """One whole step of a matrix, by both; half precision's rounding cannot hide a wrong factor."""
    found = {}
    for implementation in ("torch", "triton"):
        weight, gradient = random(device, 600), random(device, 600, seed=1)
        buffer = random(device, 600, seed=2)
        mix_momentum_(gradient, buffer, 0.9, nesterov=True, implementation=implementation)  # type: ignore[arg-type]
        normal = torch.empty(1, 20, 30, device=device)
        normalize_into(gradient.view(1, 20, 30), normal, implementation=implementation)  # type: ignore[arg-type]
        apply_update_(
            weight, normal.view(-1), rate=0.1, scale=2.0, decay=0.1,
            implementation=implementation,  # type: ignore[arg-type]
        )  # fmt: skip
        found[implementation] = weight, buffer
    for ours, theirs in zip(found["triton"], found["torch"], strict=True):
        assert float((ours - theirs).abs().max()) <= 16 * ROUNDOFF * float(theirs.abs().max())


def test_torch_normalises_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(torch.device("cpu"), 7, 8, 8)
    whole, parts = torch.empty_like(x), torch.empty_like(x)
    normalize_into(x, whole)
    monkeypatch.setattr(muon_passes, "PART_ELEMENTS", 128)
    normalize_into(x, parts)
    assert torch.equal(whole, parts)


def test_torch_runs_until_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_passes(cpu) == PassChoice(
        "torch", "Triton needs a CUDA GPU; these tensors are on cpu"
    )
    assert choose_passes(gpu, "torch") == PassChoice("torch", "named")
    pytest.importorskip("triton")
    monkeypatch.setattr(muon_passes, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert choose_passes(gpu).reason == "measured on NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(muon_passes, "MEASURED_ON", ())
    assert choose_passes(gpu, "triton").implementation == "triton"
    assert "not measured on NVIDIA H100" in choose_passes(gpu).reason
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="cannot run on cpu"):
        choose_passes(cpu, "triton")


@here
def test_the_optimizer_steps_alike_by_triton_and_by_torch(device: torch.device) -> None:
    """Passes, symmetric products and masters together, two steps, a stack with a starved expert."""
    steps = {kernels: two_steps(kernels, device) for kernels in ("torch", "triton")}
    for theirs, ours in zip(steps["torch"], steps["triton"], strict=True):
        # Float32 rounding of the direction, times the polynomial's slope at zero (485), each step.
        on_gpu = device.type == "cuda"  # in half precision there
        allowed = 2 * 0.02 if on_gpu else 2 * 485 * 2.0**-22
        assert float((ours - theirs).norm() / theirs.norm()) < allowed
        assert not torch.equal(ours, theirs)


@here
@pytest.mark.parametrize("name", GPU_VARIANTS)
def test_each_variant_of_the_benchmark_is_the_same_iteration(
    name: str, device: torch.device
) -> None:
    x_BMN = random(device, 2, 17, 24)
    expected = orthogonalize(x_BMN, dtype=torch.float32, method="standard", products="torch")
    found = own_iteration(x_BMN, **GPU_VARIANTS[name])
    allowed = 5e-3 if device.type == "cuda" else 4 * 485 * 2.0**-22
    assert float((found - expected).norm() / expected.norm()) < allowed


@here
def test_large_matrices_are_mixed_by_themselves(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = two_steps("triton", device)
    monkeypatch.setattr("epctl.runtime.muon_step.LARGE", 2 * 17 * 24)
    for ours, theirs in zip(two_steps("triton", device), expected, strict=True):
        assert torch.equal(ours, theirs)


def two_steps(kernels: str, device: torch.device) -> list[Tensor]:
    """Returns what two steps change: a matrix, a stack of two, a tall one."""
    from epctl.runtime.deepspeed_seams import FlatPartition, Fragment
    from epctl.runtime.muon_rule import MuonRule
    from epctl.runtime.optimizer import MatrixOptimizer

    shapes = ((20, 33), (2, 17, 24), (40, 12))
    parameters = [torch.nn.Parameter(random(device, *s, seed=i)) for i, s in enumerate(shapes)]
    group = {"params": parameters, "name": "m", "kind": "muon", "lr": 0.02, "weight_decay": 0.1}
    rule = MuonRule(kernels=kernels)  # type: ignore[arg-type]
    optimizer = MatrixOptimizer([group], rule=rule)
    layouts = [((Fragment(p, 0, p.numel(), 0),),) for p in parameters]
    optimizer.wire([FlatPartition(p, None, 0, f) for p, f in zip(parameters, layouts, strict=True)])
    before = [p.detach().clone() for p in parameters]
    for step in range(2):
        for place, parameter in enumerate(parameters):
            parameter.grad = random(device, *parameter.shape, seed=10 * step + place)
        parameters[1].grad[1] = 0.0  # type: ignore[index]
        optimizer.step()
    return [p.detach() - start for p, start in zip(parameters, before, strict=True)]
