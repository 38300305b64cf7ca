"""Phi-MoE's router: the reference against transformers' own, the Triton kernel against both.

The kernel runs on a GPU, or in Triton's interpreter (test_interpreter.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from epctl.kernels import reference, route_sparsemixer
from epctl.kernels.reference import SparseMixerNoise

HAS_TRITON = os.environ.get("TRITON_INTERPRET", "0") == "1" or torch.cuda.is_available()
needs_triton = pytest.mark.skipif(
    not HAS_TRITON, reason="needs a CUDA GPU, or TRITON_INTERPRET=1 (test_interpreter.py)"
)
Run = Callable[[Tensor], tuple[Tensor, Tensor]]
# tokens, experts
SIZES = [(1, 2), (63, 16), (100, 5), (300, 33)]


def logits_of(tokens: int, experts: int, device: torch.device, *, ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(42)
    if ties:
        return torch.randint(-2, 3, (tokens, experts), generator=generator).float().to(device)
    return torch.randn(tokens, experts, generator=generator).to(device)


def run(route: Run, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaf = logits_TE.clone().requires_grad_()
    weights_T2, experts_T2 = route(leaf)
    generator = torch.Generator().manual_seed(7)
    weights_T2.backward(torch.randn(weights_T2.shape, generator=generator).to(leaf.device))
    assert leaf.grad is not None
    return experts_T2, weights_T2.detach(), leaf.grad


def assert_same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[2].float(), wanted[2].float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("sampled", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_is_transformers(
    size: tuple[int, int], jitter: float, sampled: bool, ties: bool
) -> None:
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    logits_TE = logits_of(*size, torch.device("cpu"), ties=ties)
    torch.manual_seed(3)
    wanted = run(lambda leaf: sparsemixer(leaf, jitter, sampled), logits_TE)
    drawn = torch.get_rng_state()
    torch.manual_seed(3)
    got = run(
        lambda leaf: route_sparsemixer(
            leaf, jitter=jitter, sampled=sampled, implementation="reference"
        ),
        logits_TE,
    )
    assert_same(got, wanted)
    assert torch.equal(torch.get_rng_state(), drawn), "the next layer would draw other numbers"


def test_sampling_takes_others_than_the_best() -> None:
    """So that what the training cases compare is not the best pick alone, nor the whole step."""
    logits_TE = logits_of(300, 33, torch.device("cpu"))
    torch.manual_seed(3)
    sampled, _, _ = run(lambda leaf: route_sparsemixer(leaf, jitter=0.4, sampled=True), logits_TE)
    best, _, _ = run(lambda leaf: route_sparsemixer(leaf, jitter=0.4, sampled=False), logits_TE)
    assert 50 < int((sampled[:, 0] != best[:, 0]).sum()) < 250


def test_reference_gradient() -> None:
    logits_TE = logits_of(5, 6, torch.device("cpu")).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda leaf: reference.sparsemixer(leaf, 0.4)[0], (logits_TE,))


@pytest.mark.parametrize(
    ("experts", "jitter", "said"),
    [(1, 0.1, "there are 1"), (4, -0.1, "jitter is -0.1"), (4, float("nan"), "jitter is nan")],
)
def test_what_cannot_be_routed_is_refused(experts: int, jitter: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        route_sparsemixer(torch.zeros(3, experts), jitter=jitter, sampled=False)


@needs_triton
@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("sampled", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel(
    device: torch.device, size: tuple[int, int], jitter: float, sampled: bool, ties: bool
) -> None:
    from epctl.kernels import sparsemixer

    logits_TE = logits_of(*size, device, ties=ties)
    noise = SparseMixerNoise.draw(logits_TE) if sampled else None
    got = run(lambda leaf: sparsemixer.sparsemixer(leaf, jitter, noise), logits_TE)
    wanted = run(lambda leaf: reference.sparsemixer(leaf, jitter, noise), logits_TE)
    assert_same(got, wanted)


@needs_triton
@pytest.mark.parametrize("sampled", [False, True])
def test_kernel_of_no_tokens_and_of_nan(device: torch.device, sampled: bool) -> None:
    from epctl.kernels import sparsemixer

    for logits_TE in (
        torch.zeros(0, 8, device=device),
        torch.full((3, 8), torch.nan, device=device),
    ):
        noise = SparseMixerNoise.draw(logits_TE) if sampled else None
        experts, weights, gradient = run(
            lambda leaf, noise=noise: sparsemixer.sparsemixer(leaf, 0.1, noise), logits_TE
        )
        assert experts.shape == weights.shape == (len(logits_TE), 2)
        assert gradient.shape == logits_TE.shape
        assert all(0 <= a < 8 and 0 <= b < 8 and a != b for a, b in experts.tolist())


@needs_triton
@pytest.mark.parametrize("sampled", [False, True])
def test_kernel_tells_torch_the_truth(device: torch.device, sampled: bool) -> None:
    from epctl.kernels import sparsemixer

    logits_TE = logits_of(20, 6, device).requires_grad_()
    noise = list(SparseMixerNoise.draw(logits_TE)) if sampled else []
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(sparsemixer._sparsemixer, (logits_TE, noise, 0.1), test_utils=checks)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_kernel_of_half_precision(device: torch.device, dtype: torch.dtype) -> None:
    from epctl.kernels import sparsemixer

    logits_TE = logits_of(1000, 16, device).to(dtype)
    noise = SparseMixerNoise.draw(logits_TE)
    got = run(lambda leaf: sparsemixer.sparsemixer(leaf, 0.4, noise), logits_TE)
    wanted = run(lambda leaf: reference.sparsemixer(leaf, 0.4, noise), logits_TE.float())
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-6)
    assert got[2].dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    assert (got[2].float() - wanted[2]).norm() <= 1.01 * unit * wanted[2].norm()
