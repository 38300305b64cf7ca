"""The Muon update of a batch of matrices: momentum, orthogonal factor, scale. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from epctl.kernels.newton_schulz import Method, orthogonalize

UpdateScale = Literal["match_rms_adamw", "original"]


def update_scale(num_rows: int, num_columns: int, rule: UpdateScale) -> float:
    """Returns the factor on an orthogonal update of a matrix.

    `match_rms_adamw` gives the update the RMS of a typical AdamW step, 0.2 (Moonlight, arXiv
    2502.16982, 2.2); `original` is sqrt(max(1, rows/columns)) (Jordan, 2024).
    """
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(num_rows, num_columns))
    return math.sqrt(max(1.0, num_rows / num_columns))


@dataclass(frozen=True)
class MuonRule:
    """All that decides a Muon update besides its rate and weight decay."""

    momentum: float = 0.95
    nesterov: bool = True
    momentum_dtype: torch.dtype = torch.float32
    scale: UpdateScale = "match_rms_adamw"
    num_steps: int = 5
    coefficients: str = "you"
    method: Method = "auto"

    def mix_momentum_(self, gradient: Tensor, buffer: Tensor) -> None:
        """Folds the gradient into the momentum (a moving average) and turns it into the direction.

        Both float32 tensors of one shape, changed in place; the buffer may be bfloat16, which is
        rounded once, after the sum in float32.
        """
        average = buffer.float().lerp_(gradient.view_as(buffer), 1 - self.momentum)
        if average is not buffer:
            buffer.copy_(average)
        if self.nesterov:
            gradient.lerp_(average.view_as(gradient), self.momentum)
        else:
            gradient.copy_(average.view_as(gradient))

    def update_of(self, direction_BMN: Tensor) -> Tensor:
        """Returns the scaled orthogonal factor of each matrix, float32."""
        num_rows, num_columns = direction_BMN.shape[-2:]
        orthogonal_BMN: Tensor = orthogonalize(
            direction_BMN,
            num_steps=self.num_steps,
            coefficients=self.coefficients,
            method=self.method,
        )
        return orthogonal_BMN.mul_(update_scale(num_rows, num_columns, self.scale))
