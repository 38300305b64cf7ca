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
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.empty(destination.shape).normal_(0.0, self.std, generator=generator)
        destination.copy_(values)
