"""Activation checkpointing: what backward makes again instead of keeping.

`full` recomputes each decoder layer (transformers' own hook) but the last, `except_attention` too
but for what attention gave (kept_attention.py), `attention` and `moe` only that part of it.
Non-reentrant everywhere, which ZeRO-3's hooks need. A recomputed router sees the very tensors of
its first forward, so it chooses the same experts; what it counts must be counted once, which is
what `recomputing` is for.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from epctl.config import WHOLE_LAYERS, Recompute, RunConfig
from epctl.errors import ConfigError
from epctl.runtime.decoder import decoder_layers
from epctl.runtime.deepspeed_seams import AutoEPMoELayer
from epctl.runtime.kept_attention import KeptAttention, register_kept_attention
from epctl.runtime.replay import Findings
from epctl.runtime.sequence.attention import DECODER_ATTENTION

# Attention that can be kept, by its name in a model's config.
KEPT_IMPLEMENTATIONS = ("sdpa", DECODER_ATTENTION)

_depth = 0  # of recomputations under way; autograd runs them one at a time on a device's thread


def recomputing() -> bool:
    """True while backward makes activations again: count nothing, write nothing down."""
    return _depth > 0


@contextlib.contextmanager
def _recomputation() -> Iterator[None]:
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def _contexts() -> tuple[Any, Any]:
    """The context of the first forward and of the recomputation, as `checkpoint` wants them."""
    findings = Findings()

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with _recomputation(), findings.replaying():
            yield

    return findings.recording(), again()


OPTIONS: dict[str, Any] = {"use_reentrant": False, "context_fn": _contexts}


def _keeping_contexts() -> tuple[Any, Any]:
    """As `_contexts`, of a layer that keeps what its attention computed."""
    kept = KeptAttention()
    first, second = _contexts()
    return _both(first, kept.recording()), _both(second, kept.replaying())


@contextlib.contextmanager
def _both(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield


def set_up_recomputation(model: nn.Module, config: RunConfig) -> None:
    """Makes backward recompute what a config says, of layers and of experts.

    Raises ConfigError if the model has no such part.
    """
    checkpoint_activations(model, config.train.activation_checkpointing)
    if config.train.activation_checkpointing in WHOLE_LAYERS:
        keep_last_layer(model)
    if config.moe.recompute == "activation":
        recompute_expert_activations(model)


def checkpoint_activations(model: nn.Module, mode: Recompute) -> int:
    """Makes backward recompute a part of each layer; returns how many modules are recomputed.

    Raises ConfigError if the model has no such part.
    """
    if mode == "none":
        return 0
    if mode in WHOLE_LAYERS:
        if mode == "except_attention":
            _warn_if_not_kept(model)
        return _checkpoint_layers(model, keeps_attention=mode == "except_attention")
    found = [m for name, m in model.named_modules() if _is_part(name, m, mode)]
    if not found:
        raise ConfigError(
            f"`train.activation_checkpointing` is {mode}: no such part in {type(model).__name__}",
            hint="use `full`; `moe` needs epctl's own expert layer",
        )
    for module in found:
        _recompute_forward(module)
    return len(found)


def keep_last_layer(model: nn.Module) -> bool:
    """Takes the last decoder layer out of `full`; returns whether there was one to take out.

    Backward begins with it: it would be made again as soon as it was let go, and where memory
    peaks, in the backward of one layer, its activations are there either way.
    """
    layers = decoder_layers(model)
    if not layers or not getattr(layers[-1], "gradient_checkpointing", False):
        return False
    if layers[-1] in layers[:-1]:
        return False  # it is all of them
    layers[-1].gradient_checkpointing = False  # type: ignore[assignment]
    return True


def recompute_expert_activations(model: nn.Module) -> int:
    """Makes experts keep no pre-activation but compute it again; returns in how many layers.

    Raises ConfigError if the model has none of epctl's expert layers.
    """
    found = [module for module in model.modules() if hasattr(module, "recompute_activation")]
    if not found:
        raise ConfigError(
            f"`moe.recompute` is activation: {type(model).__name__} has none of epctl's experts",
            hint="leave it out for dense models and with `--moe autoep`",
        )
    for module in found:
        setattr(module, "recompute_activation", True)  # noqa: B010
    return len(found)


def _is_part(name: str, module: nn.Module, mode: Recompute) -> bool:
    if mode == "moe":
        return isinstance(module, AutoEPMoELayer)
    return name.rpartition(".")[2] in ("self_attn", "linear_attn")


def _warn_if_not_kept(model: nn.Module) -> None:
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if name not in KEPT_IMPLEMENTATIONS:
        warnings.warn(
            f"`train.activation_checkpointing` is except_attention, but attention is {name!r}: "
            "it is made again as with `full`",
            stacklevel=3,
        )


def _checkpoint_layers(model: Any, *, keeps_attention: bool) -> int:
    options = OPTIONS
    if keeps_attention:
        register_kept_attention()
        options = OPTIONS | {"context_fn": _keeping_contexts}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # its name before transformers 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return sum(bool(getattr(m, "gradient_checkpointing", False)) for m in model.modules())


def _recompute_forward(module: nn.Module) -> None:
    """Puts the checkpoint inside the module's own hooks, where transformers has it too."""
    original = module.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return original(*inputs, **named)
        return checkpoint(original, *inputs, **OPTIONS, **named)

    module.forward = forward
