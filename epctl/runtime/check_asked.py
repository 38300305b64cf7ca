"""The asked-for side of `--check`: the layout, engine and optimizer that a long run would use.

Shape suffixes: L MoE layers, B sequences, T tokens, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from epctl.config import RunConfig
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.balance import routers_of
from epctl.runtime.check_directions import Agreement, DirectionObserver, gradient_pieces
from epctl.runtime.check_record import StepRecord, part_of
from epctl.runtime.data_batch import Batch
from epctl.runtime.engine import train_step
from epctl.runtime.mesh import Mesh
from epctl.runtime.names import HubTensor, hub_tensors

Squares = dict[str, tuple[float, float]]


@dataclass
class AskedRun:
    """An engine under observation."""

    engine: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    config: RunConfig
    mesh: Mesh

    def run(
        self, steps: list[list[Batch]], gradients: Any
    ) -> tuple[list[StepRecord], dict[str, Agreement]]:
        """Takes the steps on this rank's micro-batches; a collective.

        Args:
            gradients: an open safetensors file with the reference's of the first step.

        Returns:
            Every step's record, and how the first gradient agrees with the reference, by part.
        """
        observer = GradientObserver(self.engine, self.mesh)
        hook = self.optimizer.register_step_pre_hook(observer)
        directions = DirectionObserver(self.engine, self.mesh, gradients)
        look = self.optimizer.register_step_pre_hook(directions)
        records = []
        for batches in steps:
            loss, norm = train_step(self.engine, self.scheduler, batches, self.config, self.mesh)
            look.remove()
            records.append(StepRecord(loss, norm, observer.take()))
        hook.remove()
        return records, directions.take()

    @torch.no_grad()
    def choices(self, batches: list[Batch]) -> Tensor | None:
        """Returns the experts of the global batch's tokens, in its order; a collective.

        None for DeepSpeed's own layer, whose router does not say.
        """
        counting = routers_of(self.engine.module)
        routers = [m for m in counting if not isinstance(m, seams.AutoEPMoELayer)]
        if not routers:
            return None
        found: list[list[Tensor]] = [[] for _ in routers]
        hooks = [
            router.register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output[-1]))
            for router, seen in zip(routers, found, strict=True)
        ]
        self.engine.eval()
        for batch in batches:
            self.engine(**batch.to(self.engine.device).model_inputs())
        self.engine.train()
        for hook in hooks:
            hook.remove()
        size = self.config.train.micro_batch_size
        # Of each micro-batch [L, B, this rank's tokens of a sequence, K].
        mine = [
            torch.stack([seen[m].cpu().view(size, -1, seen[m].shape[-1]) for seen in found])
            for m in range(len(batches))
        ]
        gathered: list[Any] = [None] * self.mesh.num_ranks
        dist.all_gather_object(gathered, mine)
        return self._in_order(gathered, len(batches))

    def _in_order(self, by_rank: list[list[Tensor]], num_micro_batches: int) -> Tensor:
        """Returns the choices micro-step by micro-step, place by place, as the reference walks."""
        sp = self.mesh.sp_size
        pieces = []
        for m in range(num_micro_batches):
            for first in range(0, self.mesh.num_ranks, sp):
                of_sample = [by_rank[rank][m] for rank in range(first, first + sp)]
                pieces.append(torch.cat(of_sample, dim=2).flatten(1, 2))
        return torch.cat(pieces, dim=1)

    @torch.no_grad()
    def weight_squares(self, reference: Any) -> Squares:
        """Returns (squared differences, squared reference weights) by part; a collective.

        Args:
            reference: an open safetensors file with every checkpoint tensor.
        """
        squares: dict[str, Tensor] = {}
        for tensor in hub_tensors(self.engine.module):
            parameters = [tensor.tensor] if isinstance(tensor.tensor, torch.nn.Parameter) else []
            with seams.full_parameters(parameters):
                if self._counts_here(tensor):
                    _add_difference(squares, tensor, reference.get_tensor(tensor.name))
        return self._summed(squares)

    def _counts_here(self, tensor: HubTensor) -> bool:
        return self.mesh.edp_rank == 0 if tensor.is_expert else self.mesh.rank == 0

    def _summed(self, squares: dict[str, Tensor]) -> Squares:
        names: list[Any] = [None] * self.mesh.num_ranks
        dist.all_gather_object(names, {part: value.tolist() for part, value in squares.items()})
        total: Squares = {}
        for one in names:
            for part, (difference, size) in one.items():
                before = total.get(part, (0.0, 0.0))
                total[part] = (before[0] + difference, before[1] + size)
        return total


def _add_difference(squares: dict[str, Tensor], tensor: HubTensor, expected: Tensor) -> None:
    actual = tensor.local().detach().cpu().double()
    pair = torch.stack(
        ((actual - expected.double()).square().sum(), expected.double().square().sum())
    )
    part = part_of(tensor.name)
    squares[part] = squares[part] + pair if part in squares else pair


class GradientObserver:
    """Sums squared gradients by part as the optimizer uses them, each element once."""

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        self.mesh = mesh
        self.partitions = {id(p.flat): p for p in seams.flat_partitions(engine)}
        self.part_of_parameter = {
            id(tensor.tensor): part_of(tensor.name) for tensor in hub_tensors(engine.module)
        }
        self._squares: dict[str, float] = {}

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for piece in gradient_pieces(self.partitions, optimizer, self.mesh):
            part = self.part_of_parameter[id(piece.fragment.parameter)]
            square = float(piece.gradient.double().square().sum()) / piece.divisor**2
            self._squares[part] = self._squares.get(part, 0.0) + square * piece.share

    def take(self) -> dict[str, float]:
        """Returns the norms over all ranks since the last call; a collective."""
        everyone: list[Any] = [None] * self.mesh.num_ranks
        dist.all_gather_object(everyone, self._squares)
        self._squares = {}
        parts = sorted({part for squares in everyone for part in squares})
        return {part: sum(s.get(part, 0.0) for s in everyone) ** 0.5 for part in parts}
