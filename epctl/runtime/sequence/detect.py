"""Which parts of a model are sharded, found by probes and never by class name.

What would be computed wrongly is refused by name, with the reason.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

from torch import nn

from epctl.errors import LayoutError

KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# What a packed tower may derive from its grid: each can be given for a rank's own rows (tower.py).
KNOWN_OF_GRID = frozenset(
    {
        "get_vision_position_ids",
        "get_vision_attention_seqlens",
        "get_vision_cu_seqlens",
        "get_vision_window_index",
        "get_vision_interpolation_indices_and_weights",
        "get_vision_temporal_merge_index",
        "get_vision_frame_index",
    }
)
TAKEN = frozenset({"self", "pixel_values", "image_grid_thw", "image_sizes", "args", "kwargs"})
TILES_OF_IMAGE = "image_size_to_num_patches"

Form = Literal["packed", "tiles", "images", "batches"]


@dataclass(frozen=True)
class Encoder:
    """A vision tower and how its input is cut.

    `packed` towers take patch rows of all images end to end with a grid; `tiles` towers take
    `[tiles, channels, height, width]`; `images` are given with their sizes and belong together,
    each of one or several tiles; `batches` are `[batch, images, ...]`, empty places among them.
    `attentions` and `blocks` are in the order of the layers.
    """

    module: nn.Module
    form: Form
    attentions: tuple[nn.Module, ...]
    blocks: tuple[nn.Module, ...]

    @property
    def takes_sizes(self) -> bool:
        """True if the tower itself packs images of different sizes."""
        return "image_sizes" in accepted(self.module)


@dataclass(frozen=True)
class Parts:
    """The parts of a model that sequence parallelism touches."""

    model: nn.Module
    decoder: nn.Module
    decoder_attentions: tuple[nn.Module, ...]
    encoder: Encoder | None

    @property
    def takes_encoder_outputs(self) -> bool:
        """True if the model can be given vision features (transformers 5.20 and later)."""
        return "mm_encoder_outputs" in accepted(self.model)


def find_parts(model: Any) -> Parts:
    """Returns the parts of a transformers model.

    Raises LayoutError, with the reason, if sharding its sequence would compute something else.
    """
    if not hasattr(model, "get_decoder"):
        raise _refusal(model, "it is not a model of transformers")
    decoder = model.get_decoder()
    attentions = _attentions(decoder)
    _check_masks(model, decoder)
    _check_decoder(model, decoder, attentions)
    if not getattr(model, "_supports_attention_backend", True):
        raise _refusal(model, "its attention does not go through transformers' registry")
    return Parts(model, decoder, attentions, _find_encoder(model))


def _find_encoder(model: Any) -> Encoder | None:
    if not hasattr(model, "get_image_features"):
        if "pixel_values" in accepted(model):
            raise _refusal(model, "it takes images, but has no `get_image_features`")
        return None
    encoder = model.get_encoder(modality="image")
    if encoder is model:
        raise _refusal(model, "it takes images, but `get_encoder` finds no vision tower")
    form = _form(model, encoder)
    return Encoder(encoder, form, _attentions(encoder), _blocks(encoder))


def _form(model: Any, encoder: nn.Module) -> Form:
    """Tells the kinds of towers apart by what they are called with and what they call."""
    takes = feature_parameters(model)
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in TAKEN:
            raise _refusal(model, f"its images come with `{name}`, which is not known")
    if "image_grid_thw" in takes:
        _check_packed(model, encoder)
        return "packed"
    if "pixel_attention_mask" in takes:
        return "batches"
    sized = "image_sizes" in accepted(encoder)
    sizes = takes.get("image_sizes")
    if sizes is not None and (sized or sizes.default is inspect.Parameter.empty):
        if not sized:
            num_tiles_function(model)
        return "images"
    return "tiles"


def feature_parameters(model: Any, modality: str = "image") -> dict[str, inspect.Parameter]:
    """Returns what a model's features of images or videos take, its inner model's too."""
    found: dict[str, inspect.Parameter] = {}
    for part in (model, getattr(model, "base_model", model)):
        function = getattr(type(part), f"get_{modality}_features", None)
        if function is not None:
            found |= inspect.signature(inspect.unwrap(function)).parameters
    return found


def num_tiles_function(model: Any) -> Any:
    """Returns the function by which the model's own code counts the tiles of an image.

    Raises LayoutError if it uses none that is known.
    """
    inner = getattr(model, "base_model", model)
    if TILES_OF_IMAGE not in called_names(inner, "get_image_features"):
        raise _refusal(model, f"how many tiles an image has is not told by `{TILES_OF_IMAGE}`")
    return getattr(sys.modules[type(inner).__module__], TILES_OF_IMAGE)


def _check_packed(model: Any, encoder: nn.Module) -> None:
    """Raises LayoutError for a tower that would need its whole grid."""
    used = called_names(encoder)
    name = type(encoder).__name__
    for needed in ("get_vision_position_ids", "get_vision_attention_seqlens"):
        if needed not in used:
            raise _refusal(
                model,
                f"its tower {name} does not take positions and segments from outside "
                f"(`{needed}` of transformers.vision_utils)",
            )
    given = _keywords_in(inspect.unwrap(type(encoder).forward).__code__)
    joined = "merge_temporal" in given and "get_vision_temporal_merge_index" not in used
    if joined or "include_temporal" in given:
        raise _refusal(model, f"frames attend to each other in {name}")
    _check_around(model, encoder)
    for module in encoder.modules():
        derived = {n for n in called_names(module) if n.startswith("get_vision_")}
        unknown = sorted(derived - KNOWN_OF_GRID)
        if unknown:
            raise _refusal(
                model, f"{type(module).__name__} uses `{unknown[0]}`, which is not known"
            )
        whole = {"grid_thw", "image_shapes"} & accepted(module)
        handed_on = any("get_vision" in n for part in module.modules() for n in called_names(part))
        if whole and not handed_on and not takes_shapes(module):
            raise _refusal(model, f"{type(module).__name__} needs the grid of all images")


def _check_around(model: Any, encoder: nn.Module) -> None:
    """Raises LayoutError if a part beside the tower and the models needs the grid: a resampler."""
    known = {id(module) for module in encoder.modules()}
    known |= {id(model), id(getattr(model, "base_model", model))}
    for module in model.modules():
        if id(module) not in known and {"grid_thw", "image_grid_thw"} & accepted(module):
            raise _refusal(model, f"{type(module).__name__} needs the grid of all images")


def takes_shapes(module: nn.Module) -> bool:
    """True for a position embedding that is told the rows and the shape of each segment."""
    return {"lengths", "image_shapes"} <= accepted(module)


def _check_decoder(model: Any, decoder: nn.Module, attentions: tuple[nn.Module, ...]) -> None:
    config = decoder.config.get_text_config()  # type: ignore[operator, union-attr]
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYER_TYPES)
    if odd:
        reason = {"linear_attention": "its recurrent state runs along the whole sequence"}
        raise _refusal(model, f"layers of type `{odd[0]}`: {reason.get(odd[0], 'not known')}")
    num_layers = getattr(config, "num_hidden_layers", len(attentions))
    if len(attentions) != num_layers:
        raise _refusal(
            model, f"{len(attentions)} of its {num_layers} decoder layers have causal attention"
        )
    for attention in attentions:
        if not getattr(attention, "is_causal", True):
            raise _refusal(model, f"{type(attention).__name__} of the decoder is not causal")
        if getattr(attention, "sinks", None) is not None:
            raise _refusal(model, f"{type(attention).__name__} has attention sinks")
    if getattr(config, "use_bidirectional_attention", None):
        raise _refusal(model, "`use_bidirectional_attention`: tokens see those after them")
    if getattr(config, "attn_logit_softcapping", None):
        raise _refusal(model, "`attn_logit_softcapping` bends its attention logits")
    if getattr(config, "output_router_logits", False):
        raise _refusal(
            model, "`output_router_logits`: its balance loss is a product of means over the batch"
        )


def _check_masks(model: Any, decoder: nn.Module) -> None:
    """Refuses models that build a mask above the decoder: none but a causal one is known here."""
    for module in _above(model, decoder):
        masks = [n for n in called_names(module) if n.startswith("create_") and "mask" in n]
        if masks:
            raise _refusal(
                model,
                f"{type(module).__name__} builds its own mask (`{masks[0]}`): "
                "image blocks attend in both directions",
            )


def _above(model: Any, decoder: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules between the outermost and the decoder."""
    if model is not decoder:
        yield model
    inner = getattr(model, "base_model", model)
    if inner is not model and inner is not decoder:
        yield inner


def _attentions(module: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the attention modules, as the model declares them or by their `is_causal`."""
    classes = _recorded(module, "attentions")
    if classes:
        return tuple(m for m in module.modules() if isinstance(m, classes))
    return tuple(m for m in module.modules() if hasattr(m, "is_causal"))


def _blocks(module: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the transformer blocks, as declared or as the parents of the attention modules."""
    classes = _recorded(module, "hidden_states")
    if classes:
        return tuple(m for m in module.modules() if isinstance(m, classes))
    attentions = {id(m) for m in _attentions(module)}
    return tuple(m for m in module.modules() if any(id(c) in attentions for c in m.children()))


def _recorded(module: nn.Module, kind: str) -> tuple[type, ...]:
    declared = getattr(module, "_can_record_outputs", None) or {}
    found = declared.get(kind)
    candidates = found if isinstance(found, (list, tuple)) else [found]
    targets = [getattr(c, "target_class", c) for c in candidates]
    return tuple(target for target in targets if isinstance(target, type))


def called_names(module: nn.Module, method: str = "forward") -> tuple[str, ...]:
    """Returns the global names and attributes that a module's method uses."""
    function = inspect.unwrap(getattr(type(module), method))
    code = getattr(function, "__code__", None)
    return _names_in(code) if code else ()


def _keywords_in(code: CodeType) -> frozenset[str]:
    """Returns the names of keyword arguments that a code gives in its calls."""
    tuples = [part for part in code.co_consts if isinstance(part, tuple)]
    return frozenset(name for part in tuples for name in part if isinstance(name, str))


def _names_in(code: CodeType) -> tuple[str, ...]:
    """Returns a code's names and those of comprehensions and functions within it."""
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return (*code.co_names, *(name for part in inner for name in _names_in(part)))


def accepted(owner: nn.Module | type, method: str = "forward") -> frozenset[str]:
    """Returns the names of what a method of a module or class takes; looks through wrappers."""
    owner_class = owner if isinstance(owner, type) else type(owner)
    function = inspect.unwrap(getattr(owner_class, method))
    return frozenset(inspect.signature(function).parameters)


def _refusal(model: Any, reason: str) -> LayoutError:
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return LayoutError(
        f"`{name}` cannot be trained with its sequence over several ranks: {reason}",
        hint="train it without `--sp`",
    )
