"""SwiGLU of transformers' feed-forward modules (dense layers, shared experts) in one kernel.

What a module is, is found by running it with small projections, as fused_norm.py does with norms:
one that computes anything else stays as it is.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn

from epctl.kernels.gated_product import gated_product
from epctl.runtime.fused_norm import fused_class

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Sizes of a probe's projections: different ones, so that a swapped projection cannot run.
NUM_INPUTS, NUM_HIDDEN, NUM_OUTPUTS = 8, 12, 8
# Of a probe's tokens: so small that a shift would show, and so large that a clamp would.
SCALES = (1e-2, 3.0, 1e4)
TOLERANCE = 1e-6  # of the largest output


class FusedGate(nn.Module):
    """Base of a model's own class, put before it: `down(silu(gate(x)) * up(x))`."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Returns the output for the one input, whatever the class calls it."""
        (x,) = (*inputs, *named.values())
        return cast(Tensor, self.down_proj(gated_product(self.gate_proj(x), self.up_proj(x))))


def fuse_gates(model: nn.Module) -> int:
    """Makes every plain SwiGLU of `model` run epctl's kernel, in place; returns how many do.

    The module, its Parameters, names and state dict stay; its class becomes a subclass of its own.
    """
    count = 0
    for module in model.modules():
        if _could_be_gated(module) and _computes_it(module):
            module.__class__ = fused_class(cast(Any, FusedGate), cast(Any, type(module)))
            count += 1
    return count


def _could_be_gated(module: nn.Module) -> bool:
    """True for three linear projections, no other Parameter, and a forward of one input."""
    if isinstance(module, FusedGate) or "forward" in vars(module):
        return False
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return False
    if any(type(module._modules.get(name)) is not nn.Linear for name in PROJECTIONS):
        return False
    others = [child for name, child in module._modules.items() if name not in PROJECTIONS]
    owns_more = any(list(child.parameters()) for child in others if child is not None)
    return not (module._parameters or module._buffers or owns_more)


def _computes_it(module: nn.Module) -> bool:
    """True if the class's forward, with small projections, gives what the fused one does."""
    for training, scale in itertools.product((False, True), SCALES):
        small = _with_small_projections(module).train(training)
        x = scale * torch.randn(2, 3, NUM_INPUTS, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            try:
                theirs = small(x)
            except Exception:  # whatever it wants, it is not tokens alone
                return False
            ours = FusedGate.forward(cast(FusedGate, small), x)
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            return False
        if not float((theirs - ours).abs().max()) <= TOLERANCE * float(ours.abs().max()):
            return False
    return True


def _with_small_projections(module: nn.Module) -> nn.Module:
    """Returns the module's shell around projections of the same kind, of probe size, on the CPU."""
    small = copy.copy(module)
    # Copies: the probe sets them to train or not, and these are the model's own.
    small.__dict__["_modules"] = {name: copy.copy(m) for name, m in module._modules.items()}
    generator = torch.Generator().manual_seed(1)
    sizes = ((NUM_INPUTS, NUM_HIDDEN), (NUM_INPUTS, NUM_HIDDEN), (NUM_HIDDEN, NUM_OUTPUTS))
    for name, (num_inputs, num_outputs) in zip(PROJECTIONS, sizes, strict=True):
        bias = cast(nn.Linear, module._modules[name]).bias is not None
        with torch.device("cpu"):
            linear = nn.Linear(num_inputs, num_outputs, bias=bias, dtype=torch.float32)
            for parameter in linear.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator)
        small._modules[name] = linear
    return small
