"""RMS norms of transformers in one kernel each way: theirs are six passes, and more in backward.

What a module is, is found by running it, never by its class name: one that computes anything else
stays as it is. torch's kernel computes in float32 and rounds once where transformers rounds twice.
Shape suffixes: D hidden size; x is [..., D].
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")

# Probes: small enough that epsilon counts, and large enough that a clamp would show.
SCALES = (1e-3, 1.0, 1e3)
FLOAT32_TOLERANCE = 1e-6
# Relative: transformers rounds to bf16 twice, torch once.
BFLOAT16_TOLERANCE = 3 * 2**-8


class FusedNorm(nn.Module):
    """Base of a model's own norm class, put before it: `x / rms(x) * weight` by torch's kernel."""

    weight: nn.Parameter
    rms_epsilon: float

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Returns the norm of the one input, whatever the class calls it, in its dtype."""
        (x,) = (*inputs, *named.values())
        if x.dtype != self.weight.dtype:
            # torch has no kernel for it, and classes differ in the dtype that they return.
            return cast(Tensor, super().forward(x))
        return self._normalize(x)

    def _normalize(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.rms_epsilon)


class FusedOffsetNorm(FusedNorm):
    """The same times `1 + weight` (Gemma, Qwen3-Next), a sum that only float32 holds."""

    def _normalize(self, x: Tensor) -> Tensor:
        scale_D = 1.0 + self.weight.float()
        return F.rms_norm(x.float(), scale_D.shape, scale_D, self.rms_epsilon).to(x.dtype)


def fuse_norms(model: nn.Module) -> int:
    """Makes every plain RMS norm of `model` run torch's kernel, in place; returns how many do.

    The module, its Parameter, names and state dict stay; its class becomes a subclass of its own.
    Weights may be on the meta device, but whole: ZeRO-3 partitions them afterwards.
    """
    count = 0
    for module in model.modules():
        epsilon = _epsilon(module)
        if epsilon is None or not _could_be_norm(module):
            continue
        for form in (FusedNorm, FusedOffsetNorm):
            if _computes(form, module, epsilon):
                _fuse(form, module, epsilon)
                count += 1
                break
    return count


def _fuse(form: type[FusedNorm], module: nn.Module, epsilon: float) -> None:
    module.__class__ = fused_class(cast(Any, form), cast(Any, type(module)))
    cast(FusedNorm, module).rms_epsilon = epsilon


@functools.cache
def fused_class(form: Any, own_class: Any) -> Any:
    """Returns a model's own class with `form` before it, the same for the same two.

    The name keeps the class's own: transformers initialises by it.
    """
    return type(f"Fused{own_class.__name__}", (form, own_class), {})


def _epsilon(module: nn.Module) -> float | None:
    values = (getattr(module, name, None) for name in EPSILON_NAMES)
    return next((float(value) for value in values if isinstance(value, int | float)), None)


def _could_be_norm(module: nn.Module) -> bool:
    """True for one vector `weight`, nothing beside it, and a forward of one input.

    A second input may be optional, as the gate of Mamba's norms: a probe would not see it.
    """
    weight = module._parameters.get("weight")
    owns_more = len(module._parameters) > 1 or module._buffers or module._modules
    if weight is None or weight.dim() != 1 or owns_more:
        return False
    is_replaced = isinstance(module, FusedNorm) or "forward" in vars(module)
    return not is_replaced and len(inspect.signature(type(module).forward).parameters) == 2


def _computes(form: type[FusedNorm], module: nn.Module, epsilon: float) -> bool:
    """True if `module` gives on random inputs what its fused form does, dtypes included."""
    for x, weight_D in _probes(module._parameters["weight"]):
        theirs = copy.copy(module)
        theirs.__dict__["_parameters"] = {"weight": nn.Parameter(weight_D, requires_grad=False)}
        ours = copy.copy(theirs)
        _fuse(form, ours, epsilon)
        try:
            expected = type(module).forward(theirs, x)
        except Exception:  # whatever it wants, it is not one tensor alone
            return False
        if not _agree(form.forward(cast(FusedNorm, ours), x), expected):
            return False
    return True


def _probes(weight: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (x [2, 3, D], weight [D]) on the CPU, in float32 at several scales and in bf16."""
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for scale in SCALES:
            # Not centred, or a norm that subtracts the mean would hardly differ.
            x = scale * (torch.randn(2, 3, len(weight), generator=generator) + 0.5)
            weight_D = torch.randn(len(weight), generator=generator)
            yield x.to(dtype), weight_D.to(dtype)


def _agree(ours: Tensor, theirs: Any) -> bool:
    if not isinstance(theirs, Tensor) or (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        return False
    rtol = FLOAT32_TOLERANCE if ours.dtype == torch.float32 else BFLOAT16_TOLERANCE
    return torch.allclose(ours.float(), theirs.float(), rtol=rtol, atol=0.0)
