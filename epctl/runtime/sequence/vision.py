"""The unmodified vision tower on this rank's share of the rows or tiles.

Shape suffixes: S patch rows of all images, R of this rank, T visual tokens, D decoder hidden size.

Images and videos of a batch go through the tower in one pass, and a batch without either runs it on
a dummy block: every rank of a job calls the same modules in the same order, whatever its sample
holds, which ZeRO-3's gathers need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from epctl.errors import LayoutError
from epctl.runtime.sequence.attention import VisionLayout
from epctl.runtime.sequence.cuts import Cuts, choose_cuts, cut_at, even_offsets
from epctl.runtime.sequence.detect import Parts, accepted
from epctl.runtime.sequence.exchange import gather_rows
from epctl.runtime.sequence.group import SequenceGroup
from epctl.runtime.sequence.tower import (
    TowerInputs,
    layer_kinds,
    linear_cost,
    parameter_dtype,
    pixel_shape,
    tower_inputs,
)

# aligned: coarsest boundary that balances. units: whole frames, images or tiles. ulysses: equal
# rows, an all-to-all in every layer. replicate: every rank runs the tower on everything.
Strategy = Literal["aligned", "units", "ulysses", "replicate"]

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


@dataclass(frozen=True)
class Visuals:
    """A batch's images or videos as the model is given them."""

    modality: str
    pixels: Tensor
    grid: Tensor | None

    def num_tokens(self, merge_unit: int) -> list[int]:
        """Returns the visual tokens of each image or clip."""
        assert self.grid is not None
        return [int(n) // merge_unit for n in self.grid.prod(dim=-1).tolist()]


class ShardedVision:
    """Runs `get_image_features` of the model on a share and gathers what it gives."""

    def __init__(self, parts: Parts, group: SequenceGroup, strategy: Strategy) -> None:
        assert parts.encoder is not None
        self.parts = parts
        self.encoder = parts.encoder
        self.group = group
        self.strategy = strategy
        self.cuts: Cuts | None = None
        self.layout: VisionLayout | None = None
        model: Any = parts.model
        # Bound now: on older versions the model's own attribute is replaced later.
        self._features = model.get_image_features

    def encode(self, visuals: Sequence[Visuals], options: dict[str, Any]) -> dict[str, Any]:
        """Returns the tower's outputs by modality, the same on every rank of the group.

        Args:
            visuals: images, videos, both or none; none runs the tower on a dummy and returns
                features of no image, tied to the graph.
            options: what else the caller gave to `get_image_features`.
        """
        if self.strategy == "replicate" and visuals:
            return {v.modality: self._whole(v, options) for v in visuals}
        if self.encoder.form == "tiles":
            return self._encode_tiles(visuals, options)
        return self._encode_packed(visuals, options)

    def _whole(self, visuals: Visuals, options: dict[str, Any]) -> Any:
        given = {"image_grid_thw": visuals.grid} if visuals.grid is not None else {}
        return self._features(visuals.pixels, **given, **options, return_dict=True)

    # Packed rows

    def _encode_packed(self, visuals: Sequence[Visuals], options: dict[str, Any]) -> dict[str, Any]:
        merge: int = getattr(self.encoder.module, "spatial_merge_size")  # noqa: B009
        if not visuals:
            output = self._run_rows(self._dummy_rows(merge**2), None, (0, 0), options)
            return {"image": _with_features(output, _features_of(output)[:, :0], [0])}
        grids = [v.grid for v in visuals if v.grid is not None]
        assert len(grids) == len(visuals)
        inputs = tower_inputs(self.encoder, torch.cat(grids))
        offsets = self._cut_rows(inputs)
        own = (offsets[self.group.rank], offsets[self.group.rank + 1])
        pixels_S = torch.cat([v.pixels for v in visuals]) if len(visuals) > 1 else visuals[0].pixels
        pixels_R = pixels_S[inputs.rows(*own)]
        if own[0] == own[1]:
            pixels_R = self._dummy_rows(merge**2)
        output = self._run_rows(pixels_R, inputs, own, options)
        features_LTD = _features_of(output)[:, : (own[1] - own[0]) // merge**2]
        sizes = [size // merge**2 for size in _sizes(offsets)]
        features_LTD = gather_rows(
            features_LTD.transpose(0, 1).contiguous(), sizes, self.group
        ).transpose(0, 1)
        if inputs.unorder_M is not None:
            features_LTD = features_LTD[:, inputs.unorder_M]
        return _by_modality(output, features_LTD, visuals, merge**2)

    def _cut_rows(self, inputs: TowerInputs) -> tuple[int, ...]:
        layers, cost = layer_kinds(self.encoder, inputs), linear_cost(self.encoder)
        if self.strategy == "aligned":
            self.cuts = choose_cuts(inputs.levels(), layers, cost, self.group.size)
        else:
            level = inputs.levels()[0] if self.strategy == "units" else inputs.finest()
            self.cuts = cut_at(level, layers, cost, self.group.size)
        return self.cuts.offsets

    def _run_rows(
        self,
        pixels_R: Tensor,
        inputs: TowerInputs | None,
        own: tuple[int, int],
        options: dict[str, Any],
    ) -> Any:
        """Runs the tower on rows with global segments; the grid only says how many there are."""
        merge: int = getattr(self.encoder.module, "spatial_merge_size")  # noqa: B009
        grid = torch.tensor([[1, merge, len(pixels_R) // merge]], device=pixels_R.device)
        if inputs is None:
            return self._features(pixels_R, grid, **options, return_dict=True)
        assert self.cuts is not None
        always = self.strategy == "ulysses"
        self.layout = VisionLayout(self.group, self.cuts.offsets, inputs.segments(), always)
        output = self._features(
            pixels_R,
            grid,
            **inputs.local(*own, pixels_R.device),
            **options,
            sequence_layout=self.layout,
            return_dict=True,
        )
        self._check_calls(self.layout)
        return output

    def _check_calls(self, layout: VisionLayout) -> None:
        """Raises LayoutError if a layer attended without being told of the cuts."""
        expected = len(self.encoder.attentions)
        if layout.num_calls != expected:
            raise LayoutError(
                f"{layout.num_calls} of the {expected} attention layers of "
                f"{type(self.encoder.module).__name__} received their share of the rows: the tower "
                "does not hand keyword arguments to its attention",
                hint="train without `--sp`, or keep the tower whole",
            )

    def _dummy_rows(self, num_rows: int) -> Tensor:
        parameter = next(self.encoder.module.parameters())
        dtype = parameter_dtype(self.encoder.module)
        shape = (num_rows, *pixel_shape(self.encoder))
        return torch.zeros(shape, dtype=dtype, device=parameter.device)

    # Tiles

    def _encode_tiles(self, visuals: Sequence[Visuals], options: dict[str, Any]) -> dict[str, Any]:
        pixels = visuals[0].pixels if visuals else self._dummy_rows(0)
        if pixels.dim() != 4 or options.get("image_sizes") is not None:
            raise LayoutError(
                f"images of shape {tuple(pixels.shape)} are unpacked by their sizes inside the "
                "model; sequence parallelism knows packed rows and [tiles, channels, height, width]"
            )
        offsets = even_offsets(len(pixels), self.group.size)
        if visuals:
            self.cuts = Cuts("tile", offsets, tuple(map(float, _sizes(offsets))))
        own = pixels[offsets[self.group.rank] : offsets[self.group.rank + 1]]
        layout = VisionLayout(self.group, offsets, {}, always_exchange=True)
        self.layout = layout if self.strategy == "ulysses" and visuals else None
        output = self._features(own if len(own) else self._dummy_rows(1), **options)
        given = output.pooler_output
        listed = isinstance(given, (list, tuple))
        features_ITD = (torch.stack(tuple(given)) if listed else given)[: len(own)]
        if visuals:
            features_ITD = gather_rows(features_ITD.contiguous(), _sizes(offsets), self.group)
        output.pooler_output = tuple(features_ITD) if listed else features_ITD
        if listed and not len(features_ITD):
            output.pooler_output = (features_ITD.flatten(0, 1),)
        output.hidden_states = None
        return {"image": output}


def visuals_of(given: dict[str, Any]) -> list[Visuals]:
    """Returns the images and videos in a forward's keyword arguments."""
    return [
        Visuals(modality, given[key], given.get(GRIDS[modality]))
        for modality, key in PIXELS.items()
        if given.get(key) is not None
    ]


def feature_options(parts: Parts, given: dict[str, Any]) -> dict[str, Any]:
    """Returns what of a forward's arguments `get_image_features` takes, pixels and grid apart."""
    names = accepted(parts.model, "get_image_features") - {"self", "kwargs", *PIXELS.values()}
    names -= set(GRIDS.values())
    return {key: given[key] for key in names if given.get(key) is not None}


def _sizes(offsets: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(offsets)]


def _features_of(output: Any) -> Tensor:
    """Returns the tower's features [levels, T, D]: what replaces the tokens, then deepstack's."""
    pooled = output.pooler_output
    levels = [torch.cat(tuple(pooled)) if isinstance(pooled, (list, tuple)) else pooled]
    for level in getattr(output, "deepstack_features", None) or ():
        levels.append(torch.cat(tuple(level)) if isinstance(level, (list, tuple)) else level)
    return torch.stack(levels)


def _with_features(output: Any, features_LTD: Tensor, split: list[int]) -> Any:
    """Returns a tower output of the same kind that holds these features, one tensor an image."""
    fields: dict[str, Any] = {"pooler_output": torch.split(features_LTD[0], split)}
    deep = getattr(output, "deepstack_features", None)
    if deep is not None and all(isinstance(level, Tensor) for level in deep):
        fields["deepstack_features"] = list(features_LTD[1:])  # before transformers 5.20
    elif deep is not None:
        fields["deepstack_features"] = [torch.split(level, split) for level in features_LTD[1:]]
    return type(output)(**fields)


def _by_modality(
    output: Any, features_LTD: Tensor, visuals: Sequence[Visuals], merge_unit: int
) -> dict[str, Any]:
    """Divides the features of one pass among images and videos."""
    splits = [v.num_tokens(merge_unit) for v in visuals]
    parts = torch.split(features_LTD, [sum(split) for split in splits], dim=1)
    return {
        v.modality: _with_features(output, part, split)
        for v, part, split in zip(visuals, parts, splits, strict=True)
    }
