"""What is trained: the embedded small model, or a checkpoint on this disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from epctl.config import RunConfig
from epctl.errors import InputError, LayoutError
from epctl.hub import read_local
from epctl.launch.model_reference import LocalModel, require_trainable
from epctl.layout.detect import detect
from epctl.layout.model import MoELayout
from epctl.runtime import default_model
from epctl.runtime.build import meta_model
from epctl.runtime.load import CheckpointWeights, leftover_tensors
from epctl.runtime.moe_blocks import moe_layout
from epctl.runtime.native_config import config_of, is_visual, text_config
from epctl.runtime.sequence.detect import find_parts
from epctl.runtime.visual_load import copy_processor, load_visual_processor
from epctl.runtime.visual_processor import VisualProcessor
from epctl.runtime.weights import RandomWeights, WeightSource

GENERATION_NAME = "generation_config.json"


@dataclass
class TrainingModel:
    """A model to build, where its weights come from, its tokenizer and image processor."""

    name: str
    config: Any
    weights: WeightSource
    tokenizer: Any
    moe: MoELayout | None
    revision: str | None = None
    notes: list[str] = field(default_factory=list)
    visual: VisualProcessor | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(text_config(self.config).num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        return int(text_config(self.config).vocab_size)

    def write_extras(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes what makes a folder of weights a model: configs and tokenizer.

        How to generate is the original's own, byte for byte, if it says.
        """
        from transformers import GenerationConfig

        self.config.dtype = str(dtype).removeprefix("torch.")
        self.config.save_pretrained(folder)
        source = self.weights.source if isinstance(self.weights, CheckpointWeights) else None
        original = source.folder / GENERATION_NAME if source and source.folder else None
        if original is not None and original.is_file():
            shutil.copyfile(original, folder / GENERATION_NAME)
        else:
            GenerationConfig.from_model_config(self.config).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if source is not None and source.folder is not None:
            copy_processor(source.folder, folder)


def open_training_model(
    config: RunConfig, run_folder: Path, *, weights_from: Path | None = None
) -> TrainingModel:
    """Returns what the run trains.

    Args:
        weights_from: a checkpoint of this run whose weights replace the original ones.

    Raises InputError or LayoutError for a model that cannot be read or trained.
    """
    if config.model.reference is None and weights_from is None:
        return _embedded_model(config.train.seed)
    if config.model.reference is None:
        embedded = _embedded_model(config.train.seed)
        checkpoint = open_checkpoint(str(weights_from), weights_from, embedded.tokenizer)
        checkpoint.name = embedded.name
        return checkpoint
    local = LocalModel.read(run_folder)
    tokenizer = load_tokenizer(local.tokenizer_folder, trust_remote_code=local.trust_remote_code)
    model = open_checkpoint(local.id, weights_from or Path(local.folder), tokenizer)
    model.revision = local.revision
    return model


def _embedded_model(seed: int) -> TrainingModel:
    config = default_model.default_config()
    return TrainingModel(
        default_model.NAME,
        config,
        RandomWeights(seed),
        default_model.byte_tokenizer(),
        moe_layout(meta_model(config, torch.bfloat16), config),
    )


def open_checkpoint(name: str, folder: Path | None, tokenizer: Any) -> TrainingModel:
    """Returns a checkpoint, its tensors accounted for one by one.

    Raises LayoutError for a model that cannot be trained, InputError for tensors without a place.
    """
    assert folder is not None
    source = read_local(folder, id=name)
    layout = detect(source)
    require_trainable(layout)
    config = config_of(folder)
    weights = CheckpointWeights(source, layout)
    whole = meta_model(config, torch.bfloat16)
    weights.note_names(whole)
    num_layers = text_config(config).num_hidden_layers
    dropped, unknown = leftover_tensors(source, whole, num_layers, layout)
    if unknown:
        raise InputError(
            f"`{name}` holds {len(unknown)} tensors that the model has no place for, first "
            f"`{unknown[0]}`: training and saving would lose them",
            hint="config.json belongs to another checkpoint, or the layout is a newer one",
        )
    notes = [f"not read: {count} {reason}" for reason, count in dropped.items()]
    if source.config.get("output_router_logits"):
        notes.append("output_router_logits is off: there is no balancing loss")
    visual = None
    if is_visual(config):
        _require_known_parts(whole)
        visual = load_visual_processor(folder, config, tokenizer)
    return TrainingModel(name, config, weights, tokenizer, layout.moe, notes=notes, visual=visual)


def _require_known_parts(model: nn.Module) -> None:
    """Raises LayoutError for a vision-language model that `sequence/` cannot run, at any `--sp`."""
    try:
        find_parts(model)
    except LayoutError as error:
        raise LayoutError(
            f"{error.message}; one rank a sample trains vision-language models that way, too",
            hint="docs/sequence-parallel.md lists the models that are known",
        ) from None


def load_tokenizer(folder: str, *, trust_remote_code: bool) -> Any:
    """Returns the tokenizer in `folder`; code of the repository runs only if it is trusted.

    Raises InputError if transformers cannot make one of the files.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers, JSON and import errors have no common base
        first_line = str(error).strip().splitlines()[:1]
        raise InputError(
            f"the tokenizer in `{folder}` cannot be loaded: {type(error).__name__}: "
            f"{''.join(first_line)}",
            hint="give another one with `--tokenizer PATH|ID`",
        ) from None


@contextlib.contextmanager
def closing(weights: WeightSource) -> Iterator[WeightSource]:
    """Unmaps a checkpoint's shards when the block ends."""
    try:
        yield weights
    finally:
        if isinstance(weights, CheckpointWeights):
            weights.close()


def check_bytes(model: nn.Module, weights: WeightSource) -> None:
    """Asserts that a rank read the bytes of the tensors it holds, and not one more."""
    if isinstance(weights, CheckpointWeights):
        expected = weights.expected_bytes(model)
        assert weights.counts.num_bytes == expected, (weights.counts.num_bytes, expected)
