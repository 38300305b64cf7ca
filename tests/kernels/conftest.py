"""What the kernel tests share: the device, NaN-poisoned allocations, the tolerance table.

The tolerance of a result is derived, not fitted: every rounding to the storage dtype on its way
may cost half a unit in the last place, and a float32 sum of n terms about sqrt(n) of its own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12 * 2}

# How often a value is rounded to the storage dtype before it reaches this result.
ROUNDINGS = {
    "y": 3,  # activation, row of the down projection, sum
    "dx": 4,  # pre-activation, its gradient, row, sum
    "dweights": 2,  # both halves of the pre-activation; the rest is float32
    "dw1": 3,  # pre-activation, its gradient, result
    "dw3": 3,
    "dw2": 3,  # pre-activation, weighted activation, result
}


class Problem(NamedTuple):
    """One MoE block and what flows back into it."""

    x_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    w1_EID: Tensor
    w3_EID: Tensor
    w2_EDI: Tensor
    dy_TD: Tensor


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@pytest.fixture
def device() -> torch.device:
    use_gpu = torch.cuda.is_available() and not interpreting()
    return torch.device("cuda" if use_gpu else "cpu")


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what `empty` returns with NaN, or a far-off integer, so that unwritten memory shows."""

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(-(2**30)) if tensor.dtype in (torch.int32, torch.int64) else tensor

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


@pytest.fixture
def make_problem(device: torch.device) -> Callable[..., Problem]:
    """Builds a fresh random block; the routing is one of those that break dispatch code."""

    def make(
        tokens: int,
        hidden: int,
        intermediate: int,
        experts: int,
        top_k: int,
        dtype: torch.dtype = torch.float32,
        routing: str = "random",
    ) -> Problem:
        generator = torch.Generator().manual_seed(42)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator) * scale
            return values.to(device, dtype)

        scores = torch.rand(tokens, experts, generator=generator)
        experts_TK = scores.topk(top_k, dim=-1).indices
        if routing == "half elsewhere":
            experts_TK = experts_TK.masked_fill(experts_TK >= experts // 2, -1)
        elif routing == "all elsewhere":
            experts_TK = torch.full_like(experts_TK, -1)
        elif routing == "one expert":
            experts_TK = torch.full_like(experts_TK, experts - 1)
        else:
            assert routing == "random", routing
        return Problem(
            x_TD=normal(tokens, hidden),
            experts_TK=experts_TK.to(device),
            weights_TK=torch.rand(tokens, top_k, generator=generator).to(device),
            w1_EID=normal(experts, intermediate, hidden, scale=hidden**-0.5),
            w3_EID=normal(experts, intermediate, hidden, scale=hidden**-0.5),
            w2_EDI=normal(experts, hidden, intermediate, scale=intermediate**-0.5),
            dy_TD=normal(tokens, hidden),
        )

    return make


def run_block(
    block: Callable[..., Tensor], problem: Problem, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the forward's result and every gradient, computed on copies in `dtype`."""
    x, experts, weights, *matrices, dy = problem
    leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in (x, *matrices)]
    scale = weights.clone().requires_grad_()
    y = block(leaves[0], experts, scale, *leaves[1:])
    y.backward(dy.to(dtype))
    gradients = (leaves[0].grad, scale.grad, leaves[1].grad, leaves[2].grad, leaves[3].grad)
    return dict(zip(ROUNDINGS, (y.detach(), *gradients), strict=True))


@pytest.fixture
def assert_matches() -> Callable[..., None]:
    """Compares a block's result and all gradients with the float32 reference's."""
    from epctl.kernels import reference

    def check(block: Callable[..., Tensor], problem: Problem) -> None:
        dtype = problem.x_TD.dtype
        got = run_block(block, problem, dtype)
        wanted = run_block(reference.moe_mlp, problem, torch.float32)
        num_tokens, hidden = problem.x_TD.shape
        longest_sum = max(num_tokens, hidden, 2 * problem.w1_EID.shape[1])
        for name, want in wanted.items():
            allowed = ROUNDINGS[name] * (
                UNIT_ROUNDOFF[dtype] + math.sqrt(longest_sum) * UNIT_ROUNDOFF[torch.float32]
            )
            distance = (got[name].float() - want).norm()
            # NaN fails: no comparison with it is true.
            assert distance <= allowed * want.norm(), (
                f"{name}: {distance / want.norm():.2e} from the reference, {allowed:.2e} allowed"
            )

    return check


@pytest.fixture
def run_in_interpreter() -> Callable[..., str]:
    """Runs files' tests that need no GPU in Triton's interpreter; none may fail.

    In a process of its own, because the interpreter is chosen when Triton is first imported.
    Returns what pytest said.
    """

    def run(*files: str | Path) -> str:
        completed = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", *map(str, files)],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert completed.returncode == 0, completed.stdout[-4000:]
        return completed.stdout

    return run
