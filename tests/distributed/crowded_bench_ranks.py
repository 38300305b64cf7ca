"""Ranks of `epctl bench multimodal-sp` where one rank alone runs out of memory amid its step.

The step of two ranks that follows must find that nothing of it is left.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epctl.bench import multimodal_sp_ranks
from epctl.runtime.leave import leave
from epctl.runtime.sequence.group import SequenceGroup

sharded = multimodal_sp_ranks.sharded
held: list[weakref.ref[Tensor]] = []


def run_out(layer: Any, args: tuple[Tensor, ...]) -> None:
    held.append(weakref.ref(args[0]))
    raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB. GPU 0 has 139.80 GiB in all")


@contextmanager
def crowded(model: Any, group: SequenceGroup, mode: Any) -> Iterator[Any]:
    with sharded(model, group, mode) as parallel:
        if group.size > 1:
            assert all(tensor() is None for tensor in held), "the failed step keeps its tensors"
            yield parallel
            return
        hook = model.get_decoder().layers[-1].register_forward_pre_hook(run_out)
        try:
            yield parallel
        finally:
            hook.remove()


if __name__ == "__main__":
    multimodal_sp_ranks.sharded = crowded  # type: ignore[attr-defined]
    multimodal_sp_ranks.main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave(0)
