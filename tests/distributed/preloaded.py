"""Imports what every rank imports, once, before ranks are forked: six seconds a rank otherwise."""

from __future__ import annotations

import importlib
import threading

MODULES = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "transformers.conversion_mapping",
    "transformers.integrations.hub_kernels",
    "transformers.models.auto.modeling_auto",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "epctl.runtime.train",
)


def preload() -> None:
    """Imports and does nothing else: no process group, no thread that a fork would lose."""
    for name in MODULES:
        importlib.import_module(name)
    assert threading.active_count() == 1, threading.enumerate()
