"""The unmodified vision tower on this rank's share of the rows, tiles or images.

Shape suffixes: S patch rows of all images, R of this rank, T visual tokens of this rank's tower,
V visual tokens of the group, L levels of features, D decoder hidden size.

Images and videos of a batch go through a packed tower in one pass, and a batch without either runs
it on a dummy block: every rank of a job calls the same modules in the same order, whatever its
sample holds, which ZeRO-3's gathers need. What the tower makes goes straight to the ranks that have
the placeholders (`route.py`): no rank holds the features of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from epctl.errors import LayoutError
from epctl.runtime.sequence.attention import VisionLayout
from epctl.runtime.sequence.cuts import (
    BALANCED,
    Cuts,
    LayerKind,
    Level,
    choose_cuts,
    cut_at,
    even_offsets,
)
from epctl.runtime.sequence.detect import Parts, accepted, feature_parameters
from epctl.runtime.sequence.group import SequenceGroup
from epctl.runtime.sequence.route import check_counts, fetch_rows, ranges, to_owners
from epctl.runtime.sequence.tower import (
    TowerInputs,
    layer_kinds,
    linear_cost,
    merge_size,
    parameter_dtype,
    pixel_shape,
    tower_inputs,
)
from epctl.runtime.sequence.units import TileShare, Units, share_tiles, units_of

# aligned: boundary of least expected time. units: whole frames, images or tiles. ulysses: equal
# rows, an all-to-all in every layer. replicate: every rank runs the tower on everything.
Strategy = Literal["aligned", "units", "ulysses", "replicate"]

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


@dataclass(frozen=True)
class Visuals:
    """A batch's images or videos as the model is given them.

    `owners_V` says which rank of the sequence group has the placeholder of each visual token.
    """

    modality: str
    pixels: Tensor
    grid: Tensor | None
    owners_V: Tensor


class _Place(NamedTuple):
    """What the ranks of one sample tell those of others that share the tower's work."""

    grids: list[list[int]]
    num_rows: int
    owners: list[Tensor]


class ShardedVision:
    """Runs the model's own features of images on a share and sends what it makes to its owners.

    Args:
        group: the ranks that share the tower: those of a sample, or those of several samples.
        samples: how many samples' ranks `group` holds, in consecutive ranks.
    """

    def __init__(
        self, parts: Parts, group: SequenceGroup, strategy: Strategy, samples: int = 1
    ) -> None:
        assert parts.encoder is not None
        self.parts = parts
        self.encoder = parts.encoder
        self.group = group
        self.samples = samples
        self.strategy = strategy
        self.cuts: Cuts | None = None
        self.layout: VisionLayout | None = None
        self.shapes: list[tuple[int, tuple[int, int, int]]] | None = None
        model: Any = parts.model
        # Bound now: on older versions the model's own attributes are replaced later.
        self._features = {
            modality: getattr(model, f"get_{modality}_features", None) for modality in PIXELS
        }
        self._check()

    def _check(self) -> None:
        """Raises LayoutError for a strategy that this kind of tower does not know."""
        form = self.encoder.form
        name = type(self.encoder.module).__name__
        if self.strategy == "ulysses" and form not in ("packed", "tiles"):
            raise LayoutError(f"`ulysses` cuts packed rows or tiles; {name} takes {form}")
        if self.samples > 1 and (form != "packed" or self.strategy == "replicate"):
            raise LayoutError(
                f"{name} takes {form}; work is shared among samples for packed rows that are cut",
                hint="without `parallel.share_images` the ranks of each sample share its images",
            )

    def encode(self, visuals: Sequence[Visuals], options: dict[str, Any]) -> dict[str, Any]:
        """Returns the model's outputs by modality with the features of this rank's placeholders.

        Args:
            visuals: images, videos, both or none; none runs the tower on a dummy and returns
                features of no image, tied to the graph.
            options: what else the caller gave to `get_image_features`.
        """
        self.layout = None
        if self.strategy == "replicate" and visuals:
            return {v.modality: self._whole(v, options) for v in visuals}
        if self.encoder.form == "packed":
            return self._encode_packed(visuals, options)
        return self._encode_units(visuals, options)

    def _whole(self, visuals: Visuals, options: dict[str, Any]) -> Any:
        given = {} if visuals.grid is None else {GRIDS[visuals.modality]: visuals.grid}
        function: Any = self._features[visuals.modality]
        names = feature_parameters(self.parts.model, visuals.modality)
        given |= {key: value for key, value in options.items() if key in names}
        output = function(visuals.pixels, **given, return_dict=True)
        features_LVD = _features_of(output)
        check_counts(visuals.modality, features_LVD.shape[1], len(visuals.owners_V))
        own = (visuals.owners_V == self.group.rank).nonzero()[:, 0]
        return _with_features(output, features_LVD[:, own.to(features_LVD.device)])

    # Packed rows

    def _encode_packed(self, visuals: Sequence[Visuals], options: dict[str, Any]) -> dict[str, Any]:
        unit = merge_size(self.encoder.module) ** 2
        places = self._places(visuals)
        grids = [grid for place in places for grid in place.grids]
        if not grids:
            output = self._run_rows(self._dummy_rows(unit), None, (0, 0), options)
            return {"image": _with_features(output, _features_of(output)[:, :0])}
        parameter = next(self.encoder.module.parameters())
        inputs = tower_inputs(self.encoder, torch.tensor(grids, device=parameter.device))
        offsets = self._cut_rows(inputs)
        own = (offsets[self.group.rank], offsets[self.group.rank + 1])
        pixels_R = self._own_pixels(visuals, inputs, offsets, places)
        output = self._run_rows(pixels_R, inputs, own, options)
        features_LTD = _features_of(output)[:, : (own[1] - own[0]) // unit]
        ranks_a_place = self.group.size // self.samples
        owners_V = torch.cat(
            [o + p * ranks_a_place for p, place in enumerate(places) for o in place.owners]
        )
        own_VLD = to_owners(
            features_LTD.transpose(0, 1),
            inputs.held_tokens(offsets),
            owners_V,
            self.group.of("features"),
        )
        return self._by_modality(output, own_VLD.transpose(0, 1), visuals)

    def _places(self, visuals: Sequence[Visuals]) -> list[_Place]:
        """Returns what each sample's ranks hold; a collective if there are several samples."""
        unit = merge_size(self.encoder.module) ** 2
        grids: list[list[int]] = []
        for v in visuals:
            assert v.grid is not None
            own = v.grid.tolist()
            check_counts(v.modality, sum(t * h * w for t, h, w in own) // unit, len(v.owners_V))
            grids += own
        num_rows = sum(t * h * w for t, h, w in grids)
        place = _Place(grids, num_rows, [v.owners_V for v in visuals])
        if self.samples == 1:
            return [place]
        every: list[_Place] = self.group.gather_objects(place)
        return every[:: self.group.size // self.samples]

    def _cut_rows(self, inputs: TowerInputs) -> tuple[int, ...]:
        layers, cost = layer_kinds(self.encoder, inputs), linear_cost(self.encoder)
        if self.strategy == "aligned":
            self.cuts = choose_cuts(inputs.levels(), layers, cost, self.group.size)
        else:
            level = inputs.levels()[0] if self.strategy == "units" else inputs.finest()
            self.cuts = cut_at(level, layers, cost, self.group.size)
        return self.cuts.offsets

    def _own_pixels(
        self,
        visuals: Sequence[Visuals],
        inputs: TowerInputs,
        offsets: tuple[int, ...],
        places: Sequence[_Place],
    ) -> Tensor:
        """Returns the pixel rows of this rank's share, a dummy block for none."""
        dummy = self._dummy_rows(inputs.merge_unit)
        wanted = [inputs.rows(start, stop) for start, stop in pairwise(offsets)]
        pixels_S = torch.cat([v.pixels for v in visuals]) if visuals else dummy.flatten(1)[:0]
        if self.samples == 1:
            pixels_R = pixels_S[wanted[self.group.rank].to(pixels_S.device)]
        else:
            starts = [sum(p.num_rows for p in places[:n]) for n in range(len(places) + 1)]
            size = self.group.size // self.samples
            every = [rows.cpu() for rows in wanted]
            pixels_R = fetch_rows(pixels_S.flatten(1), every, starts, size, self.group.of("pixels"))
            pixels_R = pixels_R.view(-1, *dummy.shape[1:])
        return pixels_R if len(pixels_R) else dummy

    def _run_rows(
        self,
        pixels_R: Tensor,
        inputs: TowerInputs | None,
        own: tuple[int, int],
        options: dict[str, Any],
    ) -> Any:
        """Runs the tower on rows with global segments; the grid only says how many there are."""
        merge = merge_size(self.encoder.module)
        grid = torch.tensor([[1, merge, len(pixels_R) // merge]], device=pixels_R.device)
        features: Any = self._features["image"]
        if inputs is None:
            self.shapes = None
            return features(pixels_R, grid, **options, return_dict=True)
        assert self.cuts is not None
        always = self.strategy == "ulysses"
        self.layout = VisionLayout(
            self.group.of("tower"), self.cuts.offsets, inputs.segments(), always
        )
        self.shapes = inputs.own_shapes(*own)
        output = features(
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

    # Tiles, images, clips

    def _encode_units(self, visuals: Sequence[Visuals], options: dict[str, Any]) -> dict[str, Any]:
        """One pass a modality that the model has, on a dummy for what this batch lacks."""
        given = {v.modality: v for v in visuals}
        outputs = {}
        for modality, function in self._features.items():
            if function is not None and (modality == "image" or not self._images_only):
                found = given.get(modality)
                output = self._run_units(modality, found, options)
                if found is not None or modality == "image":
                    outputs[modality] = output
                else:
                    self._tie(outputs["image"], output)
        return outputs

    @property
    def _images_only(self) -> bool:
        return "pixel_values_videos" not in accepted(self.parts.model)

    @staticmethod
    def _tie(output: Any, other: Any) -> None:
        """Hangs features of nothing on features of another modality: their pass ran for others."""
        extra, pooled = _features_of(other).sum(), output.pooler_output
        listed = isinstance(pooled, tuple)
        output.pooler_output = tuple(r + extra for r in pooled) if listed else pooled + extra

    def _run_units(self, modality: str, visuals: Visuals | None, options: dict[str, Any]) -> Any:
        pixels = None if visuals is None else visuals.pixels
        units = units_of(self.parts, pixels, options, modality)
        if visuals is None:
            features, output = units.call([0], units.tiles_XCHW)
            return _with_features(output, features[0][None, :0])
        unit_cuts, share = self._cut_units(units)
        first, last = unit_cuts[self.group.rank : self.group.rank + 2]
        chosen = units if last > first else units_of(self.parts, None, options, modality)
        numbers = range(first, last) if last > first else range(1)
        tiles = units.tiles_of(first, last) if last > first else chosen.tiles_XCHW
        hooks = [] if share is None else share_tiles(self.encoder.module, share)
        try:
            features, output = chosen.call(numbers, tiles)
        finally:
            for hook in hooks:
                hook.remove()
        rows_TD = torch.cat(features)
        rows_TD = rows_TD if last > first else rows_TD[:0]
        totals = self.group.gather_counts(len(rows_TD), rows_TD.device)
        check_counts(modality, sum(totals), len(visuals.owners_V))
        own_VLD = to_owners(
            rows_TD[:, None], ranges(totals), visuals.owners_V, self.group.of("features")
        )
        return _with_features(output, own_VLD.transpose(0, 1))

    def _cut_units(self, units: Units) -> tuple[tuple[int, ...], TileShare | None]:
        """Returns the cuts of the units, and of their tiles if those must be shared apart."""
        size = self.group.size
        if units.rows is not None:
            kinds = [LayerKind(len(self.encoder.blocks), units.rows)]
            level = Level("image", units.rows)
            self.cuts = cut_at(level, kinds, linear_cost(self.encoder), size)
            return tuple(units.rows.index(row) for row in self.cuts.offsets), None
        num_tiles = len(units.tiles_XCHW)
        each = LayerKind(1, tuple(range(num_tiles + 1)))
        by_unit = cut_at(Level("image", units.offsets), [each], 1.0, size)
        unit_cuts = tuple(units.offsets.index(tile) for tile in by_unit.offsets)
        tile_cuts = even_offsets(num_tiles, size)
        alone = len(units) == num_tiles
        self.cuts = Cuts("tile", tile_cuts, tuple(float(b - a) for a, b in pairwise(tile_cuts)))
        if alone:
            if self.strategy == "ulysses":
                self.layout = VisionLayout(
                    self.group.of("tower"), tile_cuts, {}, always_exchange=True
                )
            return tile_cuts, None
        if size == 1 or self.strategy == "units" or by_unit.imbalance <= BALANCED:
            self.cuts = by_unit
            return unit_cuts, None
        return unit_cuts, TileShare(units, tile_cuts, unit_cuts, self.group.of("tower"))

    def _by_modality(
        self, output: Any, own_LVD: Tensor, visuals: Sequence[Visuals]
    ) -> dict[str, Any]:
        """Divides this rank's features of one pass among images and videos."""
        rank = self.group.rank % (self.group.size // self.samples)
        counts = [int((v.owners_V == rank).sum()) for v in visuals]
        if not visuals:
            return {"image": _with_features(output, own_LVD)}
        parts = torch.split(own_LVD, counts, dim=1)
        return {
            v.modality: _with_features(output, part) for v, part in zip(visuals, parts, strict=True)
        }


def feature_options(parts: Parts, given: dict[str, Any]) -> dict[str, Any]:
    """Returns what of a forward's arguments `get_image_features` takes, pixels and grid apart."""
    names = set(feature_parameters(parts.model)) - {"self", "kwargs", *PIXELS.values()}
    names -= set(GRIDS.values())
    return {key: given[key] for key in names if given.get(key) is not None}


def _features_of(output: Any) -> Tensor:
    """Returns the tower's features [levels, T, D]: what replaces the tokens, then deepstack's."""
    pooled = output.pooler_output
    levels = [_rows(pooled)]
    levels += [_rows(level) for level in getattr(output, "deepstack_features", None) or ()]
    return torch.stack(levels)


def _rows(features: Any) -> Tensor:
    if isinstance(features, (list, tuple)):
        features = torch.cat(tuple(features))
    return features.reshape(-1, features.shape[-1])  # type: ignore[no-any-return]


def _with_features(output: Any, features_LTD: Tensor) -> Any:
    """Returns an output of the same kind that holds these features, as of one image."""
    listed = isinstance(output.pooler_output, (list, tuple))
    first_TD = features_LTD[0]
    fields: dict[str, Any] = {"pooler_output": (first_TD,) if listed else first_TD[None]}
    deep = getattr(output, "deepstack_features", None)
    if deep is not None and all(isinstance(level, Tensor) for level in deep):
        fields["deepstack_features"] = list(features_LTD[1:])  # before transformers 5.20
    elif deep is not None:
        fields["deepstack_features"] = [(level,) for level in features_LTD[1:]]
    return type(output)(**fields)
