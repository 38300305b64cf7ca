"""The ways of sharing a vision tower that `epctl bench multimodal-sp` compares, and the peer.

Shape suffixes: S all patch rows or tiles, R those of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epctl.runtime.sequence.exchange import gather_rows
from epctl.runtime.sequence.group import SequenceGroup
from epctl.runtime.sequence.parallel import SequenceParallel, parallelize
from epctl.runtime.sequence.tower import linear_cost
from epctl.runtime.sequence.vision import ShardedVision, Strategy

Mode = Literal["replicate", "gcs", "ulysses", "units", "aligned"]
MODES: tuple[Mode, ...] = ("replicate", "gcs", "ulysses", "units", "aligned")


@contextmanager
def sharded(model: nn.Module, group: SequenceGroup, mode: Mode) -> Iterator[SequenceParallel]:
    """Runs a block with the model's samples shared in one of the ways; the decoder alike in all."""
    strategy: Strategy = "ulysses" if mode == "gcs" else mode
    parallel = parallelize(model, group, vision=strategy)
    vision = parallel.vision
    assert vision is not None
    undo = _gather_compute_scatter(vision) if mode == "gcs" else []
    try:
        yield parallel
    finally:
        for remove in undo:
            remove()
        parallel.remove()


def _gather_compute_scatter(vision: ShardedVision) -> list[Callable[[], None]]:
    """Makes every attention layer gather its input, compute it whole on each rank and cut it.

    What DeepSpeed's ViT wrapper does (deepspeed/sequence/autosp_vit.py), with a gather that has a
    gradient, so that it can train.
    """
    hooks = []
    for attention in vision.encoder.attentions:
        before = attention.register_forward_pre_hook(_gather_inputs(vision), with_kwargs=True)
        hooks += [before.remove, attention.register_forward_hook(_cut_output(vision)).remove]
    return hooks


def _sizes(vision: ShardedVision) -> list[int]:
    assert vision.layout is not None
    return [stop - start for start, stop in pairwise(vision.layout.offsets)]


def _gather_inputs(vision: ShardedVision) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        assert vision.layout is not None
        vision.layout.num_calls += 1
        kept = {key: value for key, value in given.items() if key != "sequence_layout"}
        sizes, group = _sizes(vision), vision.group.of("tower")
        if args:
            args = (gather_rows(args[0], sizes, group), *args[1:])
        else:
            kept["hidden_states"] = gather_rows(kept["hidden_states"], sizes, group)
        angles = kept.get("position_embeddings")
        if angles is not None:
            kept["position_embeddings"] = tuple(gather_rows(x, sizes, group) for x in angles)
        return args, kept

    return hook


def _cut_output(vision: ShardedVision) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        assert vision.layout is not None
        own = slice(*vision.layout.offsets[vision.group.rank : vision.group.rank + 2])
        if isinstance(output, tuple):
            return (output[0][own], *output[1:])
        return output[own]

    return hook


def vision_cost(parallel: SequenceParallel, mode: Mode) -> float:
    """Returns the slowest rank's tower work over an even share; 1 is perfect, N is no sharing.

    With gather-compute-scatter the attention and its four projections (a third of a block's
    weights where the MLP has eight widths squared) are done whole on every rank.
    """
    vision, size = parallel.vision, parallel.group.size
    assert vision is not None
    if mode == "replicate":
        return float(size)
    cuts = vision.cuts
    assert cuts is not None
    if mode != "gcs":
        return cuts.imbalance
    rows = cuts.offsets[-1]
    if vision.encoder.form == "tiles":
        return _gcs_cost_of_tiles(vision, size)
    linear = linear_cost(vision.encoder) * len(vision.encoder.blocks) * rows
    whole = sum(cuts.costs)
    projections = linear * _attention_share(vision)
    shared = linear - projections
    return (shared / size + whole - shared) * size / whole


def _gcs_cost_of_tiles(vision: ShardedVision, size: int) -> float:
    """The same where only tiles are counted: a tile's patches attend among themselves."""
    config: Any = vision.encoder.module.config
    side = config.image_size[0] if isinstance(config.image_size, list) else config.image_size
    patch = config.patch_size[0] if isinstance(config.patch_size, list) else config.patch_size
    patches = (side // patch) ** 2 + 1
    linear = linear_cost(vision.encoder)
    shared = linear * (1 - _attention_share(vision))
    return float((shared / size + linear - shared + patches) * size / (linear + patches))


def _attention_share(vision: ShardedVision) -> float:
    block = sum(p.numel() for p in vision.encoder.blocks[0].parameters())
    return sum(p.numel() for p in vision.encoder.attentions[0].parameters()) / block


def wrap_with_deepspeed(model: nn.Module, group: SequenceGroup) -> int:
    """Applies DeepSpeed's `auto_wrap_model_for_sp` in place; returns how many layers it wrapped.

    Raises ValueError, DeepSpeed's own, if it finds nothing that it knows.
    """
    import logging

    from deepspeed.sequence.auto_sp import auto_wrap_model_for_sp
    from deepspeed.sequence.autosp_vit import UlyssesSPViTAttention

    logging.getLogger("deepspeed").setLevel(logging.ERROR)
    logging.getLogger("deepspeed.sequence.auto_sp").setLevel(logging.ERROR)
    auto_wrap_model_for_sp(model, group.group)
    return sum(isinstance(module, UlyssesSPViTAttention) for module in model.modules())


class SavedBytes:
    """Counts what autograd keeps for backward, weights apart: memory that needs no GPU to measure.

    `at_decoder` is what the tower had kept when the decoder began.
    """

    def __init__(self, model: Any) -> None:
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._decoder = model.get_decoder()
        self.total = self.at_decoder = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor

    def measure(self, forward: Callable[[], Tensor]) -> Tensor:
        """Runs `forward` and counts; every storage once."""
        hook = self._decoder.register_forward_pre_hook(self._note, prepend=True)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                return forward()
        finally:
            hook.remove()

    def _note(self, *_: Any) -> None:
        self.at_decoder = self.total
