"""The decoder on this rank's tokens: its inputs are sliced before it runs.

Shape suffixes: B sequences, S all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epctl.errors import InputError, LayoutError
from epctl.runtime.sequence import documents
from epctl.runtime.sequence.attention import DecoderLayout
from epctl.runtime.sequence.cuts import even_offsets
from epctl.runtime.sequence.group import SequenceGroup

# Consumed by the loss around the decoder, not by the decoder.
OF_THE_LOSS = ("shift_labels", "num_items_in_batch", "labels")
HANDLED = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "position_ids",
        "attention_mask",
        "visual_pos_masks",
        "deepstack_visual_embeds",
    }
)


def token_offsets(num_tokens: int, group: SequenceGroup) -> tuple[int, ...]:
    """Returns the cuts of every sequence of a batch.

    Raises InputError for fewer tokens than ranks.
    """
    if num_tokens < group.size:
        raise InputError(
            f"a sequence of {num_tokens} tokens cannot be cut for {group.size} ranks",
            hint=f"give at least {group.size} tokens, or a smaller `--sp`",
        )
    return even_offsets(num_tokens, group.size)


def cut_tokens(
    given: dict[str, Any], positions: Tensor | None, group: SequenceGroup
) -> tuple[dict[str, Any], DecoderLayout]:
    """Returns a vision-language model's arguments for this rank's tokens, and the layout.

    Cut before the model embeds them, so that no rank holds the embeddings of a whole sequence.

    Args:
        positions: of all tokens, as the model makes them of all images; None counts from zero.
    """
    ids_BS = given["input_ids"]
    batch, length = ids_BS.shape
    offsets = token_offsets(length, group)
    own = slice(*offsets[group.rank : group.rank + 2])
    inputs = dict(given)
    for key, value in given.items():
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape == ids_BS.shape:
            inputs[key] = value[:, own]
    inputs["attention_mask"] = None
    inputs["position_ids"] = _positions({"position_ids": positions}, ids_BS)[..., own]
    return inputs, DecoderLayout(group, offsets, _intervals(given, batch, length))


def cut_inputs(given: dict[str, Any], layout: DecoderLayout) -> dict[str, Any]:
    """Returns the decoder's keyword arguments for tokens that were cut by `cut_tokens`."""
    inputs = {key: value for key, value in given.items() if key not in OF_THE_LOSS}
    inputs["attention_mask"] = None
    inputs["use_cache"] = False
    if layout.group.size > 1:
        _refuse_uncut(inputs, layout.offsets[-1])
    inputs["sequence_layout"] = layout
    return inputs


def sharded_inputs(given: dict[str, Any], group: SequenceGroup) -> dict[str, Any]:
    """Returns a text decoder's keyword arguments for this rank's tokens, layout included.

    Positions are cut on their last dimension, embeddings and ids on dimension 1.
    """
    embedded = given.get("inputs_embeds")
    tokens = given.get("input_ids") if embedded is None else embedded
    assert tokens is not None, "neither input_ids nor inputs_embeds"
    batch, length = tokens.shape[:2]
    offsets = token_offsets(length, group)
    own = slice(*offsets[group.rank : group.rank + 2])
    intervals = _intervals(given, batch, length)
    inputs = {key: value for key, value in given.items() if key not in OF_THE_LOSS}
    inputs["attention_mask"] = None
    inputs["use_cache"] = False
    for key in ("input_ids", "inputs_embeds"):
        if given.get(key) is not None:
            inputs[key] = given[key][:, own]
    inputs["position_ids"] = _positions(given, tokens)[..., own]
    _refuse_uncut(inputs, length)
    inputs["sequence_layout"] = DecoderLayout(group, offsets, intervals)
    return inputs


def _positions(given: dict[str, Any], tokens: Tensor) -> Tensor:
    positions = given.get("position_ids")
    if isinstance(positions, Tensor):
        return positions
    batch, length = tokens.shape[:2]
    return torch.arange(length, device=tokens.device).expand(batch, length)


def _intervals(given: dict[str, Any], batch: int, length: int) -> documents.Intervals:
    """Returns who attends to whom, by the rules of transformers' own masks.

    A padding mask decides if there is one; else text positions that restart mark documents.
    """
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor):
        if mask.dim() != 2:
            raise InputError(
                f"an attention mask of shape {tuple(mask.shape)} is given; sequence parallelism "
                "takes a padding mask of sequences by tokens, or positions that restart"
            )
        return documents.of_mask(mask)
    text = _text_positions(given.get("position_ids"))
    if text is None:
        return documents.whole_rows(batch, length)
    return documents.of_positions(text.expand(batch, length))


def _text_positions(positions: Tensor | None) -> Tensor | None:
    """Returns [B, S] text positions; three rows of mRoPE alone say nothing of documents."""
    if positions is None or positions.dim() == 2:
        return positions
    return positions[0] if positions.shape[0] == 4 else None


def _refuse_uncut(inputs: dict[str, Any], length: int) -> None:
    """Raises LayoutError for a tensor of full length that nobody here knows how to cut."""
    for key, value in inputs.items():
        if key not in HANDLED and isinstance(value, Tensor) and length in value.shape[:3]:
            raise LayoutError(
                f"the decoder is given `{key}` of shape {tuple(value.shape)}, which sequence "
                "parallelism does not know how to cut",
                hint="train this model without `--sp`",
            )
