"""`epctl bench moe`: one MoE block, router included, against its peers and the matmul rate.

The DeepSeek-V3 rule routes every shape. The first columns of a token spell its logits, exact in
bf16 and all different, and the router's weight reads them off: so every implementation picks the
same experts whatever its arithmetic, and gradients can be compared. Shape suffixes: see
kernels/reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epctl.bench.device import clock_of, peak_memory
from epctl.bench.measure import sample_interleaved, spread
from epctl.bench.moe_shapes import MoEShape, Routing
from epctl.kernels import moe_mlp, reference, route, router_logits

SCALE = 2.446

# Storage in bf16 costs 0.2 % a rounding and the longest path has five; a wrong index costs 10 %.
GATE_TOLERANCE = 2e-2

# The gate's reference holds every row in float32 several times over: more tokens than these are
# gated on the first ones.
GATE_TOKENS = 16384

Block = Callable[[], Tensor]


class Problem(NamedTuple):
    """Tokens, parameters and the gradient that flows back, all on one device."""

    x_TD: Tensor
    router_ED: Tensor
    bias_E: Tensor
    w1_EID: Tensor
    w3_EID: Tensor
    w2_EDI: Tensor
    dy_TD: Tensor
    top_k: int

    def first(self, tokens: int) -> Problem:
        """Returns the problem of the first `tokens` tokens; parameters are shared."""
        x_TD = self.x_TD.detach()[:tokens].clone().requires_grad_()
        return self._replace(x_TD=x_TD, dy_TD=self.dy_TD[:tokens])

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient, by the name that the gate reports."""
        return {
            "dx": self.x_TD,
            "drouter": self.router_ED,
            "dw1": self.w1_EID,
            "dw3": self.w3_EID,
            "dw2": self.w2_EDI,
        }


class Implementation(NamedTuple):
    """One way to run the block.

    Attributes:
        forward: runs it on the problem's tokens.
        gradients: the parameters' gradients after a backward, under the names of
            `Problem.leaves`.
        note: what a reader must know, such as a peer's settings.
    """

    name: str
    forward: Block
    gradients: Callable[[], dict[str, Tensor]]
    reset: Callable[[], None]
    note: str = ""


def make_problem(
    shape: MoEShape, tokens: int, routing: Routing, device: torch.device, dtype: torch.dtype
) -> Problem:
    """Returns a fresh random block whose logits are a permutation of a grid for each token."""
    generator = torch.Generator(device).manual_seed(tokens)
    hidden, intermediate, num_experts, top_k = shape

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(*sizes, device=device, dtype=dtype)
        return values.normal_(std=scale, generator=generator)

    x_TD = normal(tokens, hidden)
    order_TE = torch.rand(tokens, num_experts, device=device, generator=generator).argsort(-1)
    x_TD[:, :num_experts] = ((order_TE - num_experts // 2) / (num_experts / 4)).to(dtype)
    bias_E = _selection_bias(x_TD[:, :num_experts].float().sigmoid(), top_k, routing)
    problem = Problem(
        x_TD=x_TD,
        router_ED=torch.eye(num_experts, hidden, device=device, dtype=dtype),
        bias_E=bias_E,
        w1_EID=normal(num_experts, intermediate, hidden, scale=hidden**-0.5),
        w3_EID=normal(num_experts, intermediate, hidden, scale=hidden**-0.5),
        w2_EDI=normal(num_experts, hidden, intermediate, scale=intermediate**-0.5),
        dy_TD=normal(tokens, hidden),
        top_k=top_k,
    )
    for leaf in problem.leaves.values():
        leaf.requires_grad_()
    return problem


def _selection_bias(scores_TE: Tensor, top_k: int, routing: Routing) -> Tensor:
    """Returns the correction bias that gives the routing: none, even loads, or a Zipf skew."""
    num_tokens, num_experts = scores_TE.shape
    bias_E = torch.zeros(num_experts, device=scores_TE.device)
    if routing == "zipf":
        # Rank r is wanted 1/r as often: its scores start that far down, in units of their spread.
        ranks_E = torch.arange(1, num_experts + 1, device=scores_TE.device)
        return -ranks_E.log() * 0.15
    if routing == "balanced":
        for step in range(200):
            chosen_TK = (scores_TE + bias_E).topk(top_k, dim=-1).indices
            load_E = torch.zeros_like(bias_E).index_add_(
                0, chosen_TK.flatten(), torch.ones(num_tokens * top_k, device=bias_E.device)
            )
            bias_E += 0.02 * 0.97**step * (load_E.mean() - load_E).sign()
    return bias_E


def epctl_block(problem: Problem) -> Implementation:
    """Returns epctl's own block, on whatever `choose_implementation` picks."""

    def forward() -> Tensor:
        weights_TK, experts_TK = route(
            router_logits(problem.x_TD, problem.router_ED),
            problem.bias_E,
            top_k=problem.top_k,
            normalize=True,
            scale=SCALE,
        )
        return moe_mlp(
            problem.x_TD, experts_TK, weights_TK, problem.w1_EID, problem.w3_EID, problem.w2_EDI
        )

    return Implementation("epctl", forward, lambda: leaf_gradients(problem), lambda: reset(problem))


def leaf_gradients(problem: Problem) -> dict[str, Tensor]:
    """Returns the gradients that a backward left on the problem's own tensors."""
    gradients = {name: leaf.grad for name, leaf in problem.leaves.items()}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def reset(problem: Problem) -> None:
    """Drops the gradients of the problem's own tensors."""
    for leaf in problem.leaves.values():
        leaf.grad = None


def reference_results(problem: Problem) -> dict[str, Tensor]:
    """Returns the float32 reference's result `y` and gradients."""
    leaves = {name: leaf.detach().float() for name, leaf in problem.leaves.items()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    x_TD, router_ED, w1_EID, w3_EID, w2_EDI = leaves.values()
    weights_TK, experts_TK = reference.route(
        x_TD @ router_ED.T, problem.bias_E, top_k=problem.top_k, normalize=True, scale=SCALE
    )
    y_TD = reference.moe_mlp(x_TD, experts_TK, weights_TK, w1_EID, w3_EID, w2_EDI)
    torch.autograd.backward(y_TD, problem.dy_TD.float())
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y_TD.detach(), **gradients}


def gate_errors(
    implementation: Implementation, problem: Problem, wanted: dict[str, Tensor]
) -> dict[str, float]:
    """Returns the norm-wise relative error of the result and of every gradient."""
    implementation.reset()
    y_TD = implementation.forward()
    torch.autograd.backward(y_TD, problem.dy_TD)
    got = {"y": y_TD.detach(), **implementation.gradients()}
    implementation.reset()
    return {
        name: float((got[name].float() - want).norm() / want.norm()) if name in got else math.inf
        for name, want in wanted.items()
    }


def measure(
    implementations: list[Implementation], problem: Problem, *, warm_up: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Returns forward and forward+backward times in ms and memory in MiB, by name."""
    device = problem.x_TD.device

    def both(implementation: Implementation) -> Callable[[], object]:
        def run() -> None:
            implementation.reset()
            torch.autograd.backward(implementation.forward(), problem.dy_TD)

        return run

    repeats: dict[str, Any] = {"warm_up": warm_up, "rounds": rounds, "clock": clock_of(device)}
    forward = sample_interleaved({item.name: item.forward for item in implementations}, **repeats)
    complete = sample_interleaved({item.name: both(item) for item in implementations}, **repeats)
    rows: dict[str, dict[str, Any]] = {}
    for item in implementations:
        item.reset()
        rows[item.name] = {
            "forward_ms": _milliseconds(forward[item.name]),
            "both_ms": _milliseconds(complete[item.name]),
        }
    if device.type == "cuda":
        for item in implementations:
            for other in implementations:
                other.reset()
            saved, peak = peak_memory(
                item.forward, lambda y: torch.autograd.backward(y, problem.dy_TD)
            )
            item.reset()
            rows[item.name] |= {"saved_mib": saved, "peak_mib": peak}
    return rows


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return spread([1e3 * value for value in seconds])._asdict()


def load_imbalance(problem: Problem) -> float:
    """Returns the most loaded expert's rows over the mean."""
    with torch.no_grad():
        logits_TE = problem.x_TD.float() @ problem.router_ED.float().T
        _, experts_TK = reference.route(
            logits_TE, problem.bias_E, top_k=problem.top_k, normalize=True, scale=SCALE
        )
        counts = torch.bincount(experts_TK.flatten(), minlength=len(problem.bias_E)).float()
        return float(counts.max() / counts.mean())
