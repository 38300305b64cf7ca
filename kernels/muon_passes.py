"""Muon's passes over memory around the iteration: momentum in, norm and cast in, update out.

Each has one definition here, in torch, and one Triton kernel that reads and writes once. Shape
suffixes: B matrices of a batch, M rows, N columns, P elements of a flat tensor.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from epctl.kernels.dispatch import triton_installed
from epctl.kernels.newton_schulz import normalize
from epctl.kernels.tiles import device_name

Kernels = Literal["auto", "torch", "triton"]
Implementation = Literal["torch", "triton"]

# Parts of the names of GPUs on which the Triton passes, symmetric products and graphs were
# measured to be faster than torch's: `auto` takes them there.
MEASURED_ON: tuple[str, ...] = ("H100", "H200")

# Elements that torch normalises at once, unless one matrix has more: bounds its float32 copy.
PART_ELEMENTS = 2**22


class PassChoice(NamedTuple):
    """An implementation's name and the reason it was taken."""

    implementation: Implementation
    reason: str


def choose_passes(device: torch.device, kernels: Kernels = "auto") -> PassChoice:
    """Returns what runs Muon's passes, its products and its launches on `device`.

    Raises:
        ValueError: `triton` where it cannot run.
    """
    if kernels == "torch":
        return PassChoice("torch", "named")
    interpreting = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type != "cuda" and not (kernels == "triton" and interpreting):
        if kernels == "triton":
            raise ValueError(f"Muon's kernels 'triton' cannot run on {device.type} tensors")
        return PassChoice("torch", f"Triton needs a CUDA GPU; these tensors are on {device.type}")
    if not triton_installed():
        if kernels == "triton":
            raise ValueError("Muon's kernels 'triton' need Triton, which is not installed")
        return PassChoice("torch", "Triton is not installed")
    if kernels == "triton":
        return PassChoice("triton", "named")
    gpu = device_name(device)
    if any(name in gpu for name in MEASURED_ON):
        return PassChoice("triton", f"measured on {gpu}")
    return PassChoice("torch", f"Muon's Triton kernels are not measured on {gpu}")


def _triton() -> ModuleType:
    from epctl.kernels import muon_passes_triton  # late: Triton takes a second to load

    return muon_passes_triton


def mix_momentum_(
    gradient_P: Tensor,
    buffer_P: Tensor,
    momentum: float,
    *,
    nesterov: bool,
    divisor: Tensor | None = None,
    implementation: Implementation = "torch",
) -> None:
    """Folds the gradient into the momentum (a moving average) and turns it into the direction.

    Both are changed in place and have as many elements; the gradient is float32, the buffer may be
    bfloat16, which is rounded once, after the sum in float32.

    Args:
        divisor: what the gradient is divided by first (clipping), float32, one element.
    """
    if divisor is not None:
        divisor = divisor.to(gradient_P.device)
    if implementation == "triton":
        _triton().mix_momentum_(gradient_P, buffer_P, momentum, nesterov=nesterov, divisor=divisor)
        return
    if divisor is not None:
        gradient_P.div_(divisor)
    average = buffer_P.float().lerp_(gradient_P.view_as(buffer_P), 1 - momentum)
    if average is not buffer_P:
        buffer_P.copy_(average)
    if nesterov:
        gradient_P.lerp_(average.view_as(gradient_P), momentum)
    else:
        gradient_P.copy_(average.view_as(gradient_P))


def mix_matrices_(
    gradient_BMN: Tensor,
    buffer_BMN: Tensor,
    momentum: float,
    *,
    nesterov: bool,
    divisor: Tensor | None = None,
    out_BMN: Tensor | None = None,
    implementation: Implementation = "torch",
) -> Tensor | None:
    """As `mix_momentum_`, of whole matrices; returns what spares `normalize_into` a pass, if any.

    That are sums of squares of each direction's blocks, float64, added up while they are written.

    Args:
        gradient_BMN: of any floating dtype where `out_BMN` is given.
        out_BMN: float32, contiguous: what gets the directions; by default the gradient.
    """
    if divisor is not None:
        divisor = divisor.to(gradient_BMN.device)
    if implementation == "triton":
        squares_BS: Tensor = _triton().mix_matrices_(
            gradient_BMN, buffer_BMN, momentum,
            nesterov=nesterov, divisor=divisor, out_BMN=out_BMN,
        )  # fmt: skip
        return squares_BS
    if out_BMN is not None:
        gradient_BMN = out_BMN.copy_(gradient_BMN)
    mix_momentum_(gradient_BMN, buffer_BMN, momentum, nesterov=nesterov, divisor=divisor)
    return None


def normalize_into(
    x_BMN: Tensor,
    out_BMN: Tensor,
    *,
    squares_BS: Tensor | None = None,
    implementation: Implementation = "torch",
) -> None:
    """Writes each matrix over its Frobenius norm, an exactly zero one as zero.

    Args:
        x_BMN: any floating dtype, contiguous; for torch on any device.
        out_BMN: of the iteration's dtype, contiguous; cast after the division.
        squares_BS: of the same matrices, by `mix_matrices_`.
    """
    if implementation == "triton" and x_BMN.device == out_BMN.device:
        _triton().normalize_into(x_BMN, out_BMN, squares_BS)
        return
    size = max(1, PART_ELEMENTS // max(1, x_BMN.shape[1] * x_BMN.shape[2]))
    for part, out in zip(torch.split(x_BMN, size), torch.split(out_BMN, size), strict=True):
        out.copy_(normalize(part.to(out.device)))


def apply_update_(
    weight_P: Tensor,
    update_P: Tensor,
    *,
    rate: float,
    scale: float,
    decay: float,
    copy_P: Tensor | None = None,
    implementation: Implementation = "torch",
) -> None:
    """Makes `weight` `(1 - rate * decay) * weight - rate * scale * update`, in float32, in place.

    Args:
        weight_P: the float32 master (or a bfloat16 one, rounded once by Triton).
        update_P: as many orthogonalised elements, of any floating dtype; for torch on any device.
        copy_P: gets the new weight too, rounded to its dtype.
    """
    if implementation == "triton" and weight_P.device == update_P.device:
        _triton().apply_update_(
            weight_P, update_P, rate=rate, scale=scale, decay=decay, copy_P=copy_P
        )
        return
    # Two launches a piece and no float32 copy: there are hundreds of pieces at ZeRO-3.
    update = update_P.to(weight_P.device)
    weight_P.mul_(1 - rate * decay).add_(update, alpha=-rate * scale)
    if copy_P is not None:
        copy_P.copy_(weight_P)
