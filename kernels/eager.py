"""Whether a call may skip torch's dispatcher: an operator's own function, in a plain autograd node.

`torch.library` operators are what `torch.compile`, fake tensors and selective checkpoints see. In
plain eager code nobody looks, and their way through the dispatcher, argument defaults and lists of
tensors costs more host time than the kernels of a small batch run.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import Parameter

ENVIRONMENT_VARIABLE = "EPCTL_FAST_LAUNCH"

# One switch for all that is done to start kernels sooner; launch.py has its part from here.
enabled = os.environ.get(ENVIRONMENT_VARIABLE, "1") != "0"


def sees_only_autograd(*tensors: Tensor | None) -> bool:
    """Returns whether autograd is all that could tell an operator from its function.

    False under `torch.compile`, dispatch modes (fake tensors, selective checkpoints, profilers of
    operators), functorch's transforms and tracing, for subclasses of tensors, and when
    `EPCTL_FAST_LAUNCH=0`.
    """
    return (
        enabled
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.maybe_current_level() is None
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        and all(t is None or type(t) is Tensor or type(t) is Parameter for t in tensors)
    )
