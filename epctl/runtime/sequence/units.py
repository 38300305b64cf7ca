"""Towers that see whole images or tiles: what a unit is, its tiles, and how the model is called.

Shape suffixes: I units, X tiles of all units, C channels, H height, W width, T visual tokens,
D decoder hidden size.

A unit is what the model's own code makes visual tokens of by itself: a tile, an image of several
tiles that it lays together again, or a clip. The tower sees tiles, so they may be shared apart from
the units (`TileShare`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from epctl.errors import InputError
from epctl.runtime.sequence.detect import Parts, feature_parameters, find_parts, num_tiles_function
from epctl.runtime.sequence.group import SequenceGroup
from epctl.runtime.sequence.tower import parameter_dtype, pixel_shape

Features = list[Tensor]


@dataclass
class Units:
    """The images or clips of a batch.

    Attributes:
        tiles_XCHW: tiles of the units end to end; images of a tower that packs them, padded.
        offsets: the first tile of each unit, and the number of tiles.
        rows: cumulative patch rows of the units, for a tower that packs images; else None.
        call: makes (the numbers of units, their tiles) into [T, D] for each and the model's output.
        order_X: which of the tiles `call` last gave to the tower, if not all in their order.
    """

    tiles_XCHW: Tensor
    offsets: tuple[int, ...]
    rows: tuple[int, ...] | None
    call: Callable[[Sequence[int], Tensor], tuple[Features, Any]]
    order_X: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def tiles_of(self, first: int, last: int) -> Tensor:
        return self.tiles_XCHW[self.offsets[first] : self.offsets[last]]


def units_of(parts: Parts, pixels: Tensor | None, options: dict[str, Any], modality: str) -> Units:
    """Returns the units of a batch; without pixels one that stands in for a rank that has none.

    Args:
        options: what else the model's features take, `image_sizes` and masks among it.
    """
    if modality == "video":
        return _clips(parts, pixels, options)
    assert parts.encoder is not None
    makers = {"tiles": _tiles, "batches": _batches, "images": _images}
    if parts.encoder.form == "images" and parts.encoder.takes_sizes:
        return _packed_images(parts, pixels, options)
    return makers[parts.encoder.form](parts, pixels, options)


def blank(parts: Parts, count: int = 1) -> Tensor:
    """Returns tiles of the tower's own size that are not zeros: models drop images of zeros."""
    assert parts.encoder is not None
    parameter = next(parts.encoder.module.parameters())
    dtype = parameter_dtype(parts.encoder.module)
    return torch.ones((count, *pixel_shape(parts.encoder)), dtype=dtype, device=parameter.device)


def _one_each(count: int) -> tuple[int, ...]:
    return tuple(range(count + 1))


def _listed(output: Any) -> Features:
    return [unit.reshape(-1, unit.shape[-1]) for unit in output.pooler_output]


def _tiles(parts: Parts, pixels: Tensor | None, options: dict[str, Any]) -> Units:
    tiles = blank(parts) if pixels is None else pixels
    if tiles.dim() != 4:
        raise InputError(
            f"images of shape {tuple(tiles.shape)} are given; sequence parallelism knows packed "
            "rows and [tiles, channels, height, width]"
        )
    for name, value in options.items():
        if isinstance(value, Tensor):
            raise InputError(
                f"tiles come with `{name}` of shape {tuple(value.shape)}, which sequence "
                "parallelism does not know how to cut"
            )
    model: Any = parts.model

    def call(own: Sequence[int], own_tiles: Tensor) -> tuple[Features, Any]:
        output = model.get_image_features(own_tiles, **options, return_dict=True)
        return _listed(output), output

    return Units(tiles, _one_each(len(tiles)), None, call)


def _batches(parts: Parts, pixels: Tensor | None, options: dict[str, Any]) -> Units:
    """[batch, images, C, H, W] with empty places, which the model recognises by their zeros."""
    mask = options.get("pixel_attention_mask") if pixels is not None else None
    if pixels is not None and pixels.dim() != 5:
        raise InputError(
            f"images of shape {tuple(pixels.shape)} are given with a mask; sequence parallelism "
            "knows [batch, images, channels, height, width]"
        )
    tiles = blank(parts) if pixels is None else pixels.flatten(0, 1)
    used = (tiles != 0).flatten(1).any(dim=1)
    tiles = tiles[used]
    masks = None if mask is None else mask.flatten(0, 1)[used]
    others = {key: value for key, value in options.items() if key != "pixel_attention_mask"}
    model: Any = parts.model

    def call(own: Sequence[int], own_tiles: Tensor) -> tuple[Features, Any]:
        given = {} if masks is None else {"pixel_attention_mask": masks[list(own)][None]}
        output = model.get_image_features(own_tiles[None], **given, **others, return_dict=True)
        rows = torch.cat([unit.reshape(-1, unit.shape[-1]) for unit in output.pooler_output])
        return list(rows.chunk(len(own))), output

    return Units(tiles, _one_each(len(tiles)), None, call)


def _packed_images(parts: Parts, pixels: Tensor | None, options: dict[str, Any]) -> Units:
    """Padded images with their sizes; the tower packs their patches itself."""
    model, encoder = parts.model, parts.encoder
    assert encoder is not None
    images = blank(parts) if pixels is None else pixels
    sizes = _sizes(options, images) if pixels is not None else [tuple(images.shape[-2:])]
    others = {key: value for key, value in options.items() if key != "image_sizes"}
    patch: int = encoder.module.config.patch_size  # type: ignore[union-attr, assignment]
    rows = tuple(accumulate(((h // patch) * (w // patch) for h, w in sizes), initial=0))
    features: Any = getattr(model, "get_image_features")  # noqa: B009

    def call(own: Sequence[int], own_images: Tensor) -> tuple[Features, Any]:
        given = torch.tensor([sizes[i] for i in own])
        output = features(own_images, image_sizes=given, **others, return_dict=True)
        return _listed(output), output

    return Units(images, _one_each(len(images)), rows, call)


def _images(parts: Parts, pixels: Tensor | None, options: dict[str, Any]) -> Units:
    """Images of several tiles, [images, most tiles, C, H, W] or the tiles end to end."""
    model: Any = parts.model
    tile = blank(parts)
    sizes = _sizes(options, pixels) if pixels is not None else [tuple(tile.shape[-2:])]
    divided = (
        _divided(options.get("batch_num_images"), len(sizes)) if pixels is not None else [True]
    )
    counts = [
        int(num_tiles_function(model)(size, model.config.image_grid_pinpoints, tile.shape[-1]))
        if apart
        else 1
        for size, apart in zip(sizes, divided, strict=True)
    ]
    if pixels is None:
        pixels = blank(parts, counts[0])
    elif pixels.dim() == 5:
        pixels = torch.cat([image[:n] for image, n in zip(pixels, counts, strict=True)])
    others = {k: v for k, v in options.items() if k not in ("image_sizes", "batch_num_images")}
    offsets = tuple(accumulate(counts, initial=0))

    def call(own: Sequence[int], own_tiles: Tensor) -> tuple[Features, Any]:
        order, groups = _as_samples([divided[i] for i in own])
        pieces = torch.split(torch.arange(len(own_tiles)), [counts[i] for i in own])
        units.order_X = torch.cat([pieces[i] for i in order]).to(own_tiles.device)
        given: dict[str, Any] = {"image_sizes": torch.tensor([sizes[own[i]] for i in order])}
        if not all(divided):
            given["batch_num_images"] = torch.tensor(groups)
        tiles = own_tiles[units.order_X]
        output = model.get_image_features(tiles, **given, **others, return_dict=True)
        by_image = dict(zip(order, _listed(output), strict=True))
        return [by_image[i] for i in range(len(own))], output

    units = Units(pixels, offsets, None, call)
    return units


def _sizes(options: dict[str, Any], images: Tensor) -> list[tuple[int, int]]:
    given = options.get("image_sizes")
    if given is None:
        return [(images.shape[-2], images.shape[-1])] * len(images)
    pairs = given.tolist() if isinstance(given, Tensor) else given
    return [(int(height), int(width)) for height, width in pairs]


def _divided(num_images: Any, total: int) -> list[bool]:
    """Tells which images are cut into tiles: those that are alone in their sample."""
    if num_images is None:
        return [True] * total
    counts = num_images.tolist() if isinstance(num_images, Tensor) else num_images
    return [count == 1 for count in counts for _ in range(count)]


def _as_samples(divided: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Returns the images, undivided ones last, and how many of them make up a sample.

    A model that divides what is alone in a sample divides no image of a sample of two: an
    undivided image without another is given twice.
    """
    alone = [i for i, apart in enumerate(divided) if apart]
    together = [i for i, apart in enumerate(divided) if not apart]
    if len(together) == 1:
        together *= 2
    groups = [1] * len(alone) + ([len(together)] if together else [])
    return alone + together, groups


def _clips(parts: Parts, pixels: Tensor | None, options: dict[str, Any]) -> Units:
    """[clips, frames, C, H, W]: the tower sees frames, the model pools and ends each clip."""
    clips = blank(parts)[None] if pixels is None else pixels
    num_frames = clips.shape[1]
    model: Any = parts.model
    takes = feature_parameters(model, "video")
    given = {key: value for key, value in options.items() if key in takes}

    def call(own: Sequence[int], frames: Tensor) -> tuple[Features, Any]:
        own_clips = frames.view(len(own), num_frames, *frames.shape[1:])
        output = model.get_video_features(own_clips, **given, return_dict=True)
        return _listed(output), output

    offsets = tuple(range(0, len(clips) * num_frames + 1, num_frames))
    return Units(clips.flatten(0, 1), offsets, None, call)


def unreached(model: nn.Module) -> list[nn.Parameter]:
    """Returns the tower's parameters that no gradient reaches: LLaVA takes an earlier layer's rows.

    Trained, they would only decay: no loss says what they should be. Asked of autograd, on a blank
    image, so the model must be on meta, where that costs nothing; towers that look at the values of
    their pixels cannot be asked there, and use all they have.
    """
    parts = find_parts(model)
    encoder = parts.encoder
    if encoder is None or encoder.form not in ("tiles", "images") or encoder.takes_sizes:
        return []
    units = units_of(parts, None, {}, "image")
    features, _ = units.call([0], units.tiles_XCHW)
    used = [p for p in encoder.module.parameters() if p.requires_grad]
    found = torch.autograd.grad(torch.cat(features).sum(), used, allow_unused=True)
    return [p for p, gradient in zip(used, found, strict=True) if gradient is None]


class TileShare:
    """The tower on an even share of the tiles, whatever whole units this rank has.

    While it is active the tower's input is replaced by the share, and what it gives goes by one
    all-to-all to the ranks whose units the tiles are of.
    """

    def __init__(
        self, units: Units, tile_cuts: Sequence[int], unit_cuts: Sequence[int], group: SequenceGroup
    ) -> None:
        first, last = tile_cuts[group.rank], tile_cuts[group.rank + 1]
        self.group = group
        self.units = units
        self.tiles_XCHW = units.tiles_XCHW[first:last]
        starts = [units.offsets[unit] for unit in unit_cuts]
        self.sent = _overlaps((first, last), starts)
        self.received = _overlaps((starts[group.rank], starts[group.rank + 1]), list(tile_cuts))

    def input(self, given: Tensor) -> Tensor:
        """Returns this rank's share of the tiles; a rank without any keeps one of what is given."""
        return self.tiles_XCHW.to(given) if len(self.tiles_XCHW) else given[:1]

    def output(self, output: Any, num_tiles: int) -> Any:
        """Returns the tower's output for the tiles of this rank's units, `num_tiles` at least.

        The hidden states that the model asked for, or else the last one; the rest is taken away.
        """
        if output.get("hidden_states") is not None:
            states = tuple(
                state if state is None else self._exchanged(state, num_tiles)
                for state in output.hidden_states
            )
            return type(output)(hidden_states=states)
        return type(output)(last_hidden_state=self._exchanged(output.last_hidden_state, num_tiles))

    def _exchanged(self, state: Tensor, num_tiles: int) -> Tensor:
        own = state[: len(self.tiles_XCHW)]
        arrived = self.group.exchange(own.contiguous(), self.sent, self.received)
        if self.units.order_X is not None and len(arrived):
            arrived = arrived[self.units.order_X]
        missing = num_tiles - len(arrived)
        return torch.cat((arrived, arrived.new_zeros(missing, *arrived.shape[1:])))


def _overlaps(own: tuple[int, int], cuts: Sequence[int]) -> list[int]:
    """Returns how many of the numbers in `own` lie between consecutive cuts."""
    return [max(0, min(own[1], last) - max(own[0], first)) for first, last in pairwise(cuts)]


def share_tiles(tower: nn.Module, share: TileShare) -> list[Any]:
    """Returns the hooks that make a tower work on its share; remove them afterwards."""
    names = list(inspect.signature(inspect.unwrap(type(tower).forward)).parameters)
    name = names[1]  # after self
    num_given: list[int] = []

    def before(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        tiles = args[0] if args else given[name]
        num_given.append(len(tiles))
        own = share.input(tiles)
        return ((own, *args[1:]), given) if args else (args, given | {name: own})

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return share.output(output, num_given.pop())

    return [
        tower.register_forward_pre_hook(before, with_kwargs=True),
        tower.register_forward_hook(after),
    ]
