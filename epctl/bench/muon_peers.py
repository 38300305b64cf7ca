"""The peers of `epctl bench muon`: each returns its function, or why it cannot take part."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Orthogonalize = Callable[[Tensor], Tensor]
NUM_STEPS = 5
JORDAN = (3.4445, -4.7750, 2.0315)


def _torch_muon() -> Orthogonalize | str:
    """The iteration of torch.optim.Muon, which takes one matrix at a time, in bfloat16."""
    try:
        from torch.optim._muon import _zeropower_via_newtonschulz as iterate
    except ImportError:
        return f"torch {torch.__version__} has no torch.optim.Muon"
    return lambda x_BMN: torch.stack([iterate(x_MN, JORDAN, NUM_STEPS, 1e-7) for x_MN in x_BMN])


def _deepspeed(name: str) -> Callable[[], Orthogonalize | str]:
    def build() -> Orthogonalize | str:
        try:
            from deepspeed.runtime.zero.muon import original_muon
        except ImportError as error:
            return f"DeepSpeed is not installed ({error})"
        iterate = getattr(original_muon, name, None)
        if iterate is None:
            return f"this DeepSpeed has no {name}"
        _compile_for_each_shape()
        return lambda x_BMN: iterate(x_BMN, NUM_STEPS)

    return build


def _gram_newton_schulz() -> Orthogonalize | str:
    if importlib.util.find_spec("gram_newton_schulz") is None:
        return "gram-newton-schulz is not installed"
    if not torch.cuda.is_available():
        return "its kernels need a GPU"
    _compile_for_each_shape()
    package = importlib.import_module("gram_newton_schulz")
    iterate: Orthogonalize = package.GramNewtonSchulz(ns_coefficients=[JORDAN] * NUM_STEPS)
    return iterate


def forget_compiled() -> None:
    """Drops what peers compiled for other shapes: a limit on recompilations would end them."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def _compile_for_each_shape() -> None:
    """Has peers compiled for the batch that is timed, not for any size of it."""
    if torch.cuda.is_available():
        dynamo = importlib.import_module("torch._dynamo")
        dynamo.config.automatic_dynamic_shapes = False


PEERS: Mapping[str, Callable[[], Orthogonalize | str]] = {
    "torch.optim.Muon": _torch_muon,
    "deepspeed-standard": _deepspeed("zeropower_via_newtonschulz5"),
    "deepspeed-gram": _deepspeed("zeropower_via_gram_newtonschulz"),
    "gram-newton-schulz": _gram_newton_schulz,
}
