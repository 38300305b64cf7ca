"""Whether a step's gradient points where the unsharded one does, each element counted once.

A norm cannot tell a gradient from another of the same length: experts in another order, rows of
another rank. No rank ever holds a whole gradient for this: it compares the pieces that its
optimizer gets with the same pieces of the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.check_record import part_of
from epctl.runtime.mesh import Mesh
from epctl.runtime.names import HubTensor, hub_tensors
from epctl.runtime.optimizer import MatrixOptimizer

# What a reference gradient is stored as. Elements are off by 2^-9 at most, so their cosine with
# what they were is short of one by less than half of that squared: 1.9e-6.
STORED_DTYPE = torch.bfloat16
AT_ONCE = 2**24  # elements that are widened to float64
SAME = 1e-6  # relative: squares of the same elements, added up in two orders
WHOLE = "everything"


class Agreement(NamedTuple):
    """Sums over elements: products of both gradients, squares of each."""

    product: float
    own: float
    reference: float

    def __add__(self, other: tuple[Any, ...]) -> Agreement:
        return Agreement(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def cosine(self) -> float:
        """The cosine between both; 1 where both are zero, 0 where one is or is not finite."""
        if self.own == 0 and self.reference == 0:
            return 1.0
        size = (self.own * self.reference) ** 0.5
        return self.product / size if size > 0 else 0.0

    def cosine_of_all(self, squares: float) -> float:
        """Returns the cosine, or 0 if not every element was compared, and once.

        A step that ZeRO skips, for a gradient that is not finite, has compared none.

        Args:
            squares: of all that is stored.
        """
        complete = abs(self.reference - squares) <= SAME * squares
        return self.cosine if complete else 0.0


NOTHING = Agreement(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Piece:
    """Elements of one Parameter's gradient as the optimizer gets them.

    Attributes:
        share: of the whole that this rank's count is: ranks may hold the same elements.
    """

    fragment: seams.Fragment
    gradient: Tensor
    divisor: float
    share: float


def gradient_pieces(
    partitions: Mapping[int, seams.FlatPartition], optimizer: torch.optim.Optimizer, mesh: Mesh
) -> Iterator[Piece]:
    """Yields this rank's pieces of the gradient; to be called as a step begins.

    Args:
        partitions: by the id of their flat tensor.
    """
    # epctl's own clips as it reads; DeepSpeed's gets gradients that are clipped.
    own = optimizer if isinstance(optimizer, MatrixOptimizer) else None
    divisor = 1.0 if own is None else own.divisor
    for flat in (flat for group in optimizer.param_groups for flat in group["params"]):
        gradient = flat.grad if own is None else own.gradient_of(flat)
        if gradient is None:
            continue
        partition = partitions[id(flat)]
        for fragment in partition.fragments_by_rank[partition.group_rank]:
            piece = gradient.view(-1)[fragment.offset : fragment.offset + fragment.num_elements]
            count = (
                1 if partition.process_group is not None else _replicas(fragment.parameter, mesh)
            )
            yield Piece(fragment, piece, divisor, 1 / count)


def _replicas(parameter: nn.Parameter, mesh: Mesh) -> int:
    return mesh.edp_size if seams.is_expert_parameter(parameter) else mesh.num_ranks


def stored_gradients(module: nn.Module, dtype: torch.dtype = STORED_DTYPE) -> dict[str, Tensor]:
    """Returns a whole model's gradients by checkpoint name, on the CPU."""
    found = {}
    for tensor in hub_tensors(module):
        if tensor.tensor.grad is not None:
            local = replace(tensor, tensor=tensor.tensor.grad).local()
            # A copy also where dtype and device stay: clipping and momentum work in place.
            found[tensor.name] = local.detach().to(dtype, copy=True).cpu().contiguous()
    return found


class DirectionObserver:
    """Compares gradients with stored ones; a hook for before an optimizer's step."""

    def __init__(
        self, engine: Any, mesh: Mesh, stored: Any, dtype: torch.dtype = STORED_DTYPE
    ) -> None:
        """`stored`: an open safetensors file of `stored_gradients`, in `dtype`."""
        self.mesh, self.stored, self.names = mesh, stored, set(stored.keys())
        self.dtype = dtype
        self.partitions = {id(p.flat): p for p in seams.flat_partitions(engine)}
        self.tensors: dict[int, list[HubTensor]] = {}
        for tensor in hub_tensors(engine.module):
            self.tensors.setdefault(id(tensor.tensor), []).append(tensor)
        self.found: dict[str, Agreement] = {}

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for piece in gradient_pieces(self.partitions, optimizer, self.mesh):
            fragment = piece.fragment
            part = part_of(self.tensors[id(fragment.parameter)][0].name)
            expected = self._expected(fragment.parameter)
            here = expected[fragment.start : fragment.start + fragment.num_elements]
            found = _agreement(piece.gradient, here, piece.divisor, piece.share)
            self.found[part] = self.found.get(part, NOTHING) + found

    def _expected(self, parameter: nn.Parameter) -> Tensor:
        """Returns the reference of one Parameter as it lies in this layout, flat."""
        whole = torch.zeros(seams.full_shape(parameter), dtype=self.dtype)
        for tensor in self.tensors[id(parameter)]:
            if tensor.name in self.names:
                replace(tensor, tensor=whole).local().copy_(self.stored.get_tensor(tensor.name))
        return whole.view(-1)

    def take(self) -> dict[str, Agreement]:
        """Returns what all ranks found, by part of the model; a collective."""
        everyone: list[Any] = [None] * self.mesh.num_ranks
        dist.all_gather_object(everyone, {part: tuple(found) for part, found in self.found.items()})
        total: dict[str, Agreement] = {}
        for one in everyone:
            for part, found in one.items():
                total[part] = total.get(part, NOTHING) + found
        return total


def _agreement(own: Tensor, expected: Tensor, divisor: float, share: float) -> Agreement:
    """Sums in float64 where `own` is, a few elements at a time."""
    total = torch.zeros(3, dtype=torch.float64, device=own.device)
    for a, b in zip(torch.split(own, AT_ONCE), torch.split(expected, AT_ONCE), strict=True):
        a, b = a.double() / divisor, b.to(own.device).double()
        total += share * torch.stack((a @ b, a @ a, b @ b))
    return Agreement(*total.tolist())


def cosines(found: Mapping[str, Agreement], stored: Any) -> dict[str, float]:
    """Returns the cosine of every part of the model, and of the whole under `WHOLE`.

    Args:
        found: what all ranks compared.
        stored: the open safetensors file that they compared with.
    """
    squares: dict[str, float] = {}
    for name in stored.keys():  # noqa: SIM118  (a file, not a dict)
        part = part_of(name)
        square = float(stored.get_tensor(name).float().square().sum(dtype=torch.float64))
        squares[part] = squares.get(part, 0.0) + square
    result = {
        part: found.get(part, NOTHING).cosine_of_all(squares.get(part, 0.0))
        for part in squares.keys() | found.keys()
    }
    everything = sum(found.values(), start=NOTHING)
    return result | {WHOLE: everything.cosine_of_all(sum(squares.values()))}
