"""The Muon update of a batch of matrices: momentum, norm, orthogonal factor, scale. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from epctl.kernels.muon_passes import (
    Implementation,
    Kernels,
    apply_update_,
    choose_passes,
    mix_matrices_,
    mix_momentum_,
    normalize_into,
)
from epctl.kernels.newton_schulz import Method, iteration_dtype, orthogonalize_normal_

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
    kernels: Kernels = "auto"

    def mix_momentum_(
        self, gradient: Tensor, buffer: Tensor, divisor: Tensor | None = None
    ) -> None:
        """Folds the gradient over `divisor` into the momentum and turns it into the direction.

        Both are changed in place.
        """
        mix_momentum_(
            gradient, buffer, self.momentum, nesterov=self.nesterov, divisor=divisor,
            implementation=self.passes(gradient.device),
        )  # fmt: skip

    def mix_matrices_(
        self,
        gradient_BMN: Tensor,
        buffer_BMN: Tensor,
        divisor: Tensor | None = None,
        out_BMN: Tensor | None = None,
    ) -> Tensor | None:
        """As `mix_momentum_`, of whole matrices; returns their squares where they cost nothing.

        Args:
            out_BMN: float32, gets the directions in the gradient's place.
        """
        return mix_matrices_(
            gradient_BMN, buffer_BMN, self.momentum, nesterov=self.nesterov, divisor=divisor,
            out_BMN=out_BMN, implementation=self.passes(gradient_BMN.device),
        )  # fmt: skip

    def normalize_into(
        self, direction_BMN: Tensor, out_BMN: Tensor, squares_BS: Tensor | None = None
    ) -> None:
        """Writes each matrix with norm one, in the dtype of the iteration."""
        normalize_into(
            direction_BMN, out_BMN, squares_BS=squares_BS,
            implementation=self.passes(out_BMN.device),
        )  # fmt: skip

    def orthogonalize_(self, *batches: Tensor) -> None:
        """Replaces matrices of norm one by their orthogonal factors, not scaled, in place.

        Args:
            batches: [B, M, N] of one device and dtype.
        """
        if not batches:
            return
        products: Literal["auto", "torch", "symmetric"] = "auto"
        if self.kernels != "auto":
            products = "symmetric" if self.kernels == "triton" else "torch"
        orthogonalize_normal_(
            *batches,
            num_steps=self.num_steps,
            coefficients=self.coefficients,
            method=self.method,
            products=products,
            use_graphs=self.passes(batches[0].device) == "triton",
        )

    def apply_(
        self,
        weight: Tensor,
        factor: Tensor,
        shape: tuple[int, int],
        rate: float,
        decay: float,
        copy: Tensor | None = None,
    ) -> None:
        """Decays `weight` and takes the step along orthogonal factors of a shape, in place.

        Args:
            copy: gets the new weight too, in its own dtype.
        """
        apply_update_(
            weight, factor, rate=rate, scale=update_scale(*shape, self.scale), decay=decay,
            copy_P=copy, implementation=self.passes(weight.device),
        )  # fmt: skip

    def passes(self, device: torch.device) -> Implementation:
        """Returns what runs on `device`; beside a GPU, masters in host memory are torch's."""
        if device.type == "cpu" and torch.cuda.is_available():
            return "torch"
        return choose_passes(device, self.kernels).implementation

    def update_of(self, direction_BMN: Tensor) -> Tensor:
        """Returns the scaled orthogonal factor of each matrix, float32."""
        num_rows, num_columns = direction_BMN.shape[-2:]
        dtype = iteration_dtype(direction_BMN.device)
        normal_BMN = torch.empty_like(direction_BMN, dtype=dtype)
        self.normalize_into(direction_BMN, normal_BMN)
        self.orthogonalize_(normal_BMN)
        return normal_BMN.float().mul_(update_scale(num_rows, num_columns, self.scale))
