"""What the parity ranks are held against: transformers' own model, unsharded, and its gradients.

Shape suffixes: T tokens, K top_k.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from epctl.config import RunConfig
from epctl.runtime.build import meta_model
from epctl.runtime.check_directions import DirectionObserver, gradient_pieces
from epctl.runtime.check_reference import run_reference
from epctl.runtime.data_batch import Batch
from epctl.runtime.deepspeed_seams import full_shape
from epctl.runtime.moe_blocks import moe_layout
from epctl.runtime.names import is_fused_experts
from epctl.runtime.training_model import TrainingModel
from epctl.runtime.weights import WeightSource


def drop_by_score(
    weights_TK: Tensor, experts_TK: Tensor, num_experts: int, factor: float
) -> Tensor:
    """Returns weights, zero where an expert had enough choices of larger weight; in loops."""
    capacity = math.ceil(factor * experts_TK.numel() / num_experts)
    kept_TK = torch.zeros_like(weights_TK)
    for expert in experts_TK.unique():
        rows, places = (experts_TK == expert).nonzero(as_tuple=True)
        best = weights_TK[rows, places].detach().topk(min(capacity, len(rows))).indices
        kept_TK[rows[best], places[best]] = 1.0
    return weights_TK * kept_TK


def limit_experts(module: nn.Module, factor: float, num_experts: int) -> None:
    """Has transformers' own experts drop what is over their capacity, as they are called."""

    def drop(experts: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x_TD, experts_TK, weights_TK, *rest = inputs
        weights_TK = drop_by_score(weights_TK, experts_TK, num_experts, factor)
        return (x_TD, experts_TK, weights_TK, *rest)

    for experts in filter(is_fused_experts, module.modules()):
        experts.register_forward_pre_hook(drop)


def run_whole(
    model_config: Any,
    weights: WeightSource,
    config: RunConfig,
    steps: list[list[Tensor]],
    folder: Path,
) -> dict[str, Any]:
    """Trains transformers' model on one rank; gradients and weights go to files in `folder`."""
    moe = moe_layout(meta_model(model_config, torch.float32), model_config)
    model = TrainingModel("whole", model_config, weights, None, moe)
    capacity = config.moe.capacity_factor

    def before_step(module: nn.Module, number: int) -> None:
        if capacity is not None and number == 0:
            limit_experts(module, capacity, model_config.n_routed_experts)

    reference = run_reference(
        model,
        config,
        [[Batch.of_ids(ids) for ids in step] for step in steps],
        torch.device("cpu"),
        dist.new_group([0]),
        before_step=before_step,
        gradient_dtype=torch.float32,
    )
    folder.mkdir()
    # As the optimizer gets them: clipped.
    clipping, norm = config.optim.gradient_clipping, reference.steps[0].norm
    factor = clipping / (norm + 1e-6) if 0 < clipping < norm else 1.0
    clipped = {name: gradient * factor for name, gradient in reference.gradients.items()}
    save_file(clipped, folder / "gradients.safetensors")
    save_file(reference.weights, folder / "model.safetensors")
    return {
        "losses": [step.loss for step in reference.steps],
        "norms": [step.norm for step in reference.steps],
    }


class GradientErrors(DirectionObserver):
    """Squares of every tensor's difference from the stored gradient, and of the stored one.

    Ranks may hold parts of a tensor, or the same: sums over all ranks are those of the whole.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, dtype=torch.float32)
        self.squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for piece in gradient_pieces(self.partitions, optimizer, self.mesh):
            fragment = piece.fragment
            expected = self._expected(fragment.parameter).double()
            here = slice(fragment.start, fragment.start + fragment.num_elements)
            off, known = torch.zeros_like(expected), torch.zeros_like(expected)
            off[here] = piece.gradient.double() / piece.divisor - expected[here]
            known[here] = expected[here]
            self._add(fragment.parameter, off, known, piece.share)

    def _add(self, parameter: nn.Parameter, off: Tensor, known: Tensor, share: float) -> None:
        shape = tuple(full_shape(parameter))
        for tensor in self.tensors[id(parameter)]:
            for place, flat in enumerate((off, known)):
                part = dataclasses.replace(tensor, tensor=flat.view(shape)).local()
                self.squares[tensor.name][place] += share * float(part.square().sum())


def gradient_errors(ranks: list[dict[str, Any]], name: str) -> dict[str, tuple[float, float]]:
    """Returns a tensor's relative error and the norm it was held against, over all ranks."""
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for rank in ranks:
        for tensor, squares in rank[name]["squares"].items():
            for place, value in enumerate(squares):
                total[tensor][place] += value
    return {
        tensor: ((off / max(known, 1e-60)) ** 0.5, known**0.5)
        for tensor, (off, known) in total.items()
    }
