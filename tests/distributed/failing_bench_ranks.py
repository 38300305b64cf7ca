"""Ranks of `epctl bench train` in which things go wrong, by the name in EPCTL_TEST_FAULT.

`engines`: AutoEP runs out of memory on rank 1 while rank 0 waits for it, and transformers trains
other weights. `scale`: epctl's router forgets the routed scale, which the gate must see. The names
of `WRONG`: gradients that are wrong in bfloat16 alone. `rate`: updates that are, by a tenth.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epctl.bench import train_engines, train_gate
from epctl.bench.train_engines import Order, Trainee
from epctl.bench.train_ranks import main
from epctl.runtime import moe_rules
from epctl.runtime.leave import leave


def out_of_memory(order: Order) -> Trainee:
    if dist.get_rank() == 1:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB. GPU 1 has 79.10 GiB in all")
    dist.barrier()  # as the others wait in a collective of the step
    raise AssertionError("unreachable")


def other_weights(order: Order) -> Trainee:
    config = train_engines.with_changes(order.config, "train", seed=1)
    return train_engines.open_transformers(dataclasses.replace(order, config=config))


def without_scale(rule: Any) -> dict[str, Any]:
    return route_arguments(rule) | {"scale": 1.0}


# In bfloat16 alone: which gradients, and what becomes of them.
WRONG: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "order": ("experts", lambda gradient: gradient.flip(0)),
    "router": ("gate", lambda gradient: -gradient),
    "nan": ("experts", lambda gradient: gradient * float("nan")),
}


def with_wrong_gradients(order: Order) -> Trainee:
    trainee = train_engines.open_epctl(order)
    part, change = WRONG[os.environ["EPCTL_TEST_FAULT"]]
    found = [p for n, p in trainee.engine.module.named_parameters() if f".mlp.{part}." in n]
    assert found
    for parameter in found:
        parameter.register_hook(change)
    return trainee


def at_another_rate(order: Order) -> Trainee:
    config = train_engines.with_changes(order.config, "optim", lr=0.9 * order.config.optim.lr)
    return train_engines.open_epctl(dataclasses.replace(order, config=config))


route_arguments = moe_rules.RouterRule.route_arguments

if __name__ == "__main__":
    if os.environ["EPCTL_TEST_FAULT"] == "scale":
        moe_rules.RouterRule.route_arguments = without_scale  # type: ignore[method-assign]
    elif os.environ["EPCTL_TEST_FAULT"] in WRONG:
        train_gate.open_epctl = with_wrong_gradients  # type: ignore[attr-defined]
    elif os.environ["EPCTL_TEST_FAULT"] == "rate":
        train_gate.open_epctl = at_another_rate  # type: ignore[attr-defined]
    elif os.environ["EPCTL_TEST_FAULT"] == "engines":
        train_engines.OPENERS["deepspeed"] = out_of_memory  # type: ignore[index]
        train_engines.OPENERS["transformers"] = other_weights  # type: ignore[index]
    leave(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
