"""What the trainer eats: micro-batches drawn by global position, whatever the text comes from.

Shape suffixes: B sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from epctl.runtime.data_packing import IGNORED, PackedRows, RowOrder


@dataclass(frozen=True)
class Batch:
    """Token ids, targets (`IGNORED` where none) and positions that restart at each document.

    Attributes:
        positions_BS: [B, S], or [4, B, S] with rotary positions below.
        visuals: pixels and grids, by the names that the model's forward gives them.
    """

    ids_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor | None = None
    visuals: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_ids(cls, ids_BS: Tensor) -> Batch:
        """Returns a batch in which every token is a target and a row is one document."""
        return cls(ids_BS, ids_BS)

    def to(self, device: torch.device) -> Batch:
        positions_BS = self.positions_BS
        return Batch(
            self.ids_BS.to(device),
            self.labels_BS.to(device),
            None if positions_BS is None else positions_BS.to(device),
            {name: value.to(device) for name, value in self.visuals.items()},
        )

    @property
    def num_targets(self) -> int:
        """Tokens the loss is taken over; the first of a row has nothing before it."""
        return int((self.labels_BS[:, 1:] != IGNORED).sum())

    def model_inputs(self) -> dict[str, Any]:
        """Returns the keyword arguments of a transformers model's forward.

        Without `use_cache=False` transformers makes a cache, and with one it does not look for
        document boundaries: every document would attend to those before it.
        """
        inputs: dict[str, Any] = {
            "input_ids": self.ids_BS,
            "labels": self.labels_BS,
            "use_cache": False,
        }
        if self.positions_BS is not None:
            inputs["position_ids"] = self.positions_BS
        return {**inputs, **self.visuals}


class TrainingData(Protocol):
    """Micro-batches by position in the global order, and a prompt to sample from."""

    num_train_rows: int | None  # None: drawn without end

    def train_batch(self, first: int, count: int) -> Batch:
        """Returns the sequences at global positions `first` and following."""

    def held_out_batch(self, first: int, count: int) -> Batch:
        """Returns held-out sequences, starting over when there are no more."""

    def prompt(self, num_tokens: int) -> list[int]:
        """Returns the beginning of a held-out document."""

    def prompt_inputs(self, num_tokens: int) -> dict[str, Any]:
        """Returns what the model is given beside that prompt's ids: its images."""


class PackedData:
    """Training data from packed rows."""

    def __init__(
        self,
        train: PackedRows,
        held_out: PackedRows,
        seed: int,
        *,
        shuffle: bool,
        window: int | None = None,
    ) -> None:
        self.train = train
        self.held_out = held_out
        self.num_train_rows: int | None = len(train)
        self.order = RowOrder(len(train), seed, shuffle=shuffle, window=window)

    def train_batch(self, first: int, count: int) -> Batch:
        return self.batch_of(self.train, [self.order.row_at(first + n) for n in range(count)])

    def held_out_batch(self, first: int, count: int) -> Batch:
        rows = self.held_out
        return self.batch_of(rows, [(first + n) % len(rows) for n in range(count)])

    def batch_of(self, rows: PackedRows, indices: list[int]) -> Batch:
        """Returns the batch of chosen rows."""
        return _stack(rows, indices)

    def prompt(self, num_tokens: int) -> list[int]:
        ids = self.held_out[0].ids_S
        return [int(i) for i in ids[: min(num_tokens, len(ids) // 2)]]

    def prompt_inputs(self, num_tokens: int) -> dict[str, Any]:
        return {}


def _stack(rows: PackedRows, indices: list[int]) -> Batch:
    picked = [rows[index] for index in indices]
    return Batch(
        torch.from_numpy(np.stack([row.ids_S for row in picked])),
        torch.from_numpy(np.stack([row.labels_S for row in picked])),
        torch.from_numpy(np.stack([row.positions_S for row in picked])),
    )
