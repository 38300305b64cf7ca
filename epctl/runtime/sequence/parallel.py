"""The hooks that train a transformers model with its sequence over several ranks.

    parallelize(model, group)
    output = model(**whole_batch)      # the same whole batch on every rank of the group
    output.loss.backward()             # then average gradients over all ranks, as DDP and ZeRO do

No model code is changed. A pre-hook on the model encodes the images and cuts the labels, a pre-hook
on the decoder cuts its inputs, and the attention functions in transformers' registry do the rest.
Generation (`use_cache=True`) passes through untouched: every rank computes the whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from epctl.errors import InputError, LayoutError
from epctl.runtime.sequence import loss
from epctl.runtime.sequence.attention import (
    DECODER_ATTENTION,
    VISION_ATTENTION,
    DecoderLayout,
    register_attention,
)
from epctl.runtime.sequence.cuts import Cuts
from epctl.runtime.sequence.decoder import cut_inputs, cut_tokens, sharded_inputs, token_offsets
from epctl.runtime.sequence.detect import Parts, find_parts, takes_shapes
from epctl.runtime.sequence.group import SequenceGroup
from epctl.runtime.sequence.route import owners, placeholders
from epctl.runtime.sequence.vision import (
    GRIDS,
    PIXELS,
    ShardedVision,
    Strategy,
    Visuals,
    feature_options,
)


class SequenceParallel:
    """Sequence parallelism in place on one model; `remove` takes it off again."""

    def __init__(
        self,
        parts: Parts,
        group: SequenceGroup,
        vision: ShardedVision | None,
        encoder_outputs: bool,
    ) -> None:
        self.parts = parts
        self.group = group
        self.vision = vision
        self.encoder_outputs = encoder_outputs
        self._undo: list[Callable[[], Any]] = []
        self._passing = False  # generation: nothing is cut
        self._ready: dict[str, Any] = {}  # outputs that `get_image_features` hands over
        self._ties: list[Tensor] = []  # features of no image, still to be tied to the graph
        self._layout: DecoderLayout | None = None  # of tokens that were cut before the decoder
        self._waiting: Callable[[], Any] | None = None  # takes the inner model's hook off again

    @property
    def vision_cuts(self) -> Cuts | None:
        """Where the patch rows of the last batch were cut."""
        return None if self.vision is None else self.vision.cuts

    def install(self) -> None:
        """Sets attention functions and hooks."""
        register_attention()
        model, decoder = self.parts.model, self.parts.decoder
        self._set_attention(decoder, DECODER_ATTENTION)
        if self.vision is not None:
            self._install_vision(self.vision)
        hooks = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
        ]
        self._undo += [hook.remove for hook in hooks]

    def remove(self) -> None:
        """Puts the model back as it was."""
        self._stop_waiting()
        while self._undo:
            self._undo.pop()()

    def _install_vision(self, vision: ShardedVision) -> None:
        encoder = vision.encoder
        inject = encoder.form == "tiles" and vision.strategy == "ulysses"
        packs = encoder.form == "packed" or encoder.takes_sizes
        if packs or inject:
            self._set_attention(encoder.module, VISION_ATTENTION)
        if inject:
            for attention in encoder.attentions:
                hook = attention.register_forward_pre_hook(_inject(vision), with_kwargs=True)
                self._undo.append(hook.remove)
        for module in encoder.module.modules():
            if takes_shapes(module):
                inject_shapes = module.register_forward_pre_hook(_shapes(vision), with_kwargs=True)
                self._undo.append(inject_shapes.remove)
        if not self.encoder_outputs:
            for modality in PIXELS:
                self._replace_features(modality)

    def _set_attention(self, part: nn.Module, name: str) -> None:
        """Chooses the attention function for every config that a part's modules read."""
        for module in part.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_attn_implementation") and config._attn_implementation != name:
                self._undo.append(_restore(config, config._attn_implementation))
                config._attn_implementation = name

    def _replace_features(self, modality: str) -> None:
        """Before transformers 5.20 a model calls its own method: it finds the outputs ready."""
        name = f"get_{modality}_features"

        for module in self.parts.model.modules():
            if hasattr(type(module), name):
                original = getattr(module, name)
                module.__dict__[name] = self._ready_or(modality, original)
                self._undo.append(lambda m=module: m.__dict__.pop(name, None))  # type: ignore[misc]

    def _ready_or(self, modality: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def hand_over(*args: Any, **given: Any) -> Any:
            return self._ready[modality] if modality in self._ready else original(*args, **given)

        return hand_over

    # Hooks

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = _bound(model, args, given)
        self._ready, self._ties, self._layout = {}, [], None
        self._passing = bool(given.get("use_cache")) or given.get("past_key_values") is not None
        if self._passing:
            return (), given
        cut_labels = {} if given.get("labels") is None else self._local_loss(given)
        if self.vision is not None and given.get("mm_encoder_outputs") is None:
            inner = getattr(model, "base_model", model)
            if inner is model:
                return (), self._encode(self.vision, given)
            self._await(inner, self.vision)
        return (), given | cut_labels

    def _await(self, inner: nn.Module, vision: ShardedVision) -> None:
        """Encodes when the inner model is called: ZeRO-3 has its own parameters whole by then.

        Registered now, so that the hook comes after those of an engine that was made later.
        """

        def before(
            module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            self._stop_waiting()
            return (), self._encode(vision, _bound(module, args, given))

        self._stop_waiting()
        self._waiting = inner.register_forward_pre_hook(before, with_kwargs=True).remove

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting()
            self._waiting = None

    def _local_loss(self, given: dict[str, Any]) -> dict[str, Any]:
        """Returns this rank's targets and what its summed loss is divided by."""
        labels_BS = given["labels"]
        start, stop = token_offsets(labels_BS.shape[1], self.group)[self.group.rank :][:2]
        targets_BR = loss.local_targets(labels_BS, start, stop)
        divisor = given.get("num_items_in_batch")
        if divisor is None:
            divisor = loss.divisor(labels_BS, self.group.size)
        return {
            "labels": targets_BR,
            "shift_labels": targets_BR,
            "num_items_in_batch": divisor,
        }

    def _encode(self, vision: ShardedVision, given: dict[str, Any]) -> dict[str, Any]:
        """Cuts the tokens, and hands over the features of those that are this rank's."""
        if given.get("input_ids") is None:
            raise InputError(
                "a vision-language model is given `inputs_embeds`; sequence parallelism finds the "
                "owner of each visual token by its `input_ids`"
            )
        visuals = self._visuals(given)
        inputs, self._layout = cut_tokens(given, self._positions(given), self.group)
        outputs = vision.encode(visuals, feature_options(self.parts, given))
        if self.encoder_outputs:
            kept = {key: value for key, value in inputs.items() if key not in PIXELS.values()}
            return kept | {"mm_encoder_outputs": outputs}
        self._ready = outputs
        if not visuals:
            self._ties = [_first_tensor(outputs["image"].pooler_output)]
        return inputs

    def _visuals(self, given: dict[str, Any]) -> list[Visuals]:
        """Returns the images and videos of a batch, and who has their placeholders."""
        ids_BS, config = given["input_ids"], getattr(self.parts.model, "config")  # noqa: B009
        offsets = token_offsets(ids_BS.shape[1], self.group)
        return [
            Visuals(
                modality,
                given[key],
                given.get(GRIDS[modality]),
                owners(placeholders(config, ids_BS, modality), offsets),
            )
            for modality, key in PIXELS.items()
            if given.get(key) is not None
        ]

    def _positions(self, given: dict[str, Any]) -> Tensor | None:
        """Returns the positions of all tokens; multimodal ones as the model makes them."""
        if given.get("position_ids") is not None:
            positions: Tensor = given["position_ids"]
            return positions
        inner = getattr(self.parts.model, "base_model")  # noqa: B009
        visual = any(given.get(key) is not None for key in GRIDS.values())
        if hasattr(inner, "compute_3d_position_ids"):
            return _called(inner.compute_3d_position_ids, given)  # type: ignore[no-any-return]
        if hasattr(inner, "get_rope_index") and visual:  # older versions of transformers
            return _called(inner.get_rope_index, given)[0]  # type: ignore[no-any-return]
        return None

    def _before_decoder(
        self, decoder: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = _bound(decoder, args, given)
        if self._passing:
            return (), given
        while self._ties:
            tie = self._ties.pop().sum()
            given["inputs_embeds"] = given["inputs_embeds"] + tie.to(given["inputs_embeds"].dtype)
        if self._layout is not None:
            return (), cut_inputs(given, self._layout)
        return (), sharded_inputs(given, self.group)

    def _after_decoder(
        self, decoder: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any
    ) -> None:
        """Raises LayoutError if a layer attended without being told of the cuts."""
        self._ready, self._layout = {}, None
        layout = given.get("sequence_layout")
        if not isinstance(layout, DecoderLayout):
            return
        expected = len(self.parts.decoder_attentions)
        if layout.num_calls != expected:
            raise LayoutError(
                f"{layout.num_calls} of the {expected} attention layers of "
                f"{type(decoder).__name__} received their share of the sequence: the model does "
                "not hand keyword arguments to its attention",
                hint="train this model without `--sp`",
            )


def parallelize(
    model: nn.Module,
    group: SequenceGroup,
    *,
    vision: Strategy = "aligned",
    encoder_outputs: bool | None = None,
    vision_group: SequenceGroup | None = None,
) -> SequenceParallel:
    """Makes `model` train with the sequence of each sample cut over `group`.

    Every rank of the group calls the model with the same whole batch. Logits come back for this
    rank's tokens; the loss is this rank's sum over the global valid tokens, times the group's
    size, so that averaging gradients over ranks gives the unsharded gradient. With
    `num_items_in_batch` the loss is the local sum over that.

    Args:
        vision: how the tower is shared; see `ShardedVision`.
        encoder_outputs: hand features over as `mm_encoder_outputs`; default: if the model takes
            them (transformers 5.20), else through `get_image_features`.
        vision_group: ranks that share the tower's work on all their samples' images, whole
            sequence groups in consecutive ranks; default: the ranks of each sample alone. All of
            them must call the model together.

    Raises LayoutError for a model whose sequence cannot be cut, with the reason.
    """
    parts = find_parts(model)
    sharded = None
    if parts.encoder is not None:
        shared = vision_group or group
        assert shared.rank % group.size == group.rank
        assert shared.size % group.size == 0
        sharded = ShardedVision(parts, shared, vision, shared.size // group.size)
    if encoder_outputs is None:
        encoder_outputs = parts.takes_encoder_outputs
    parallel = SequenceParallel(parts, group, sharded, encoder_outputs)
    parallel.install()
    return parallel


def _bound(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    """Returns positional arguments under their names too."""
    if not args:
        return dict(given)
    names = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]
    return dict(zip(names, args, strict=False)) | given


def _inject(vision: ShardedVision) -> Callable[..., Any]:
    """Gives the attention of a tower without keyword arguments the layout all the same."""

    def hook(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        return args, given | {"sequence_layout": vision.layout}

    return hook


def _shapes(vision: ShardedVision) -> Callable[..., Any]:
    """Tells a position embedding the segments of this rank's rows in place of all."""

    def hook(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        if vision.shapes is None:
            return None
        given = _bound(module, args, given)
        device = given["image_shapes"].device
        rows, shapes = zip(*vision.shapes, strict=True)
        given["lengths"] = torch.tensor(rows, device=device)
        given["image_shapes"] = torch.tensor(shapes, device=device)
        return (), given

    return hook


def _called(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Calls a method with what it takes of the model's arguments; what it must have is None."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        varies = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        needed = parameter.default is parameter.empty and not varies
        if needed or given.get(name) is not None:
            found[name] = given.get(name)
    return function(**found)


def _restore(config: Any, name: str | None) -> Callable[[], None]:
    return lambda: setattr(config, "_attn_implementation", name)


def _first_tensor(value: Any) -> Tensor:
    return value if isinstance(value, torch.Tensor) else value[0]
