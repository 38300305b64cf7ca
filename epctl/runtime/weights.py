"""Where a rank's weights come from: a source that fills one named tensor at a time."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor, nn


class WeightSource(Protocol):
    """Fills tensors by their checkpoint names; called in the same order on every rank."""

    def read_into(self, name: str, destination: Tensor) -> None:
        """Copies tensor `name` into `destination`; raises InputError if it does not fit."""

    def note_names(self, model: nn.Module) -> None:
        """Notes on the modules of `model` where this source's names differ from transformers'."""


class RandomWeights:
    """Fresh weights that depend on seed and name alone: not on rank, EP size or load order.

    Matrices are normal with `std`, vectors that scale (norms) are one, biases zero.
    """

    def __init__(self, seed: int, std: float = 0.02) -> None:
        self.seed = seed
        self.std = std

    def note_names(self, model: nn.Module) -> None:
        """Fresh weights have transformers' own names."""

    def read_into(self, name: str, destination: Tensor) -> None:
        if destination.ndim < 2:
            destination.fill_(0.0 if name.endswith("bias") else 1.0)
            return
        generator = torch.Generator().manual_seed(self._seed_of(name))
        values = torch.empty(destination.shape).normal_(0.0, self.std, generator=generator)
        destination.copy_(values)

    def _seed_of(self, name: str) -> int:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


class DeviceWeights(RandomWeights):
    """Fresh weights made where they will lie, with that device's generator: for benchmarks.

    They depend on seed, name and kind of device. A model of billions of parameters is filled in
    seconds; through the CPU it would take minutes.
    """

    def read_into(self, name: str, destination: Tensor) -> None:
        if destination.ndim < 2:
            super().read_into(name, destination)
            return
        generator = torch.Generator(destination.device).manual_seed(self._seed_of(name))
        values = torch.empty(destination.shape, device=destination.device)
        destination.copy_(values.normal_(0.0, self.std, generator=generator))
