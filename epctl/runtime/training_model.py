"""What is trained: the embedded small model, or a checkpoint on this disk."""

from __future__ import annotations

import contextlib
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
from epctl.runtime import default_model
from epctl.runtime.build import meta_model
from epctl.runtime.load import CheckpointWeights, leftover_tensors
from epctl.runtime.weights import RandomWeights, WeightSource


@dataclass
class TrainingModel:
    """A model to build, where its weights come from, and its tokenizer."""

    name: str
    config: Any
    weights: WeightSource
    tokenizer: Any
    revision: str | None = None
    notes: list[str] = field(default_factory=list)

    def write_extras(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes what makes a folder of weights a model: configs and tokenizer."""
        from transformers import GenerationConfig

        self.config.dtype = str(dtype).removeprefix("torch.")
        self.config.save_pretrained(folder)
        GenerationConfig.from_model_config(self.config).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


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
    return TrainingModel(
        default_model.NAME,
        default_model.default_config(),
        RandomWeights(seed),
        default_model.byte_tokenizer(),
    )


def open_checkpoint(name: str, folder: Path | None, tokenizer: Any) -> TrainingModel:
    """Returns a DeepSeek-V3-layout checkpoint, its tensors accounted for one by one."""
    assert folder is not None
    source = read_local(folder, id=name)
    layout = detect(source)
    require_trainable(layout)
    config = _native_config(folder)
    if config.tie_word_embeddings:
        raise LayoutError(
            f"`{name}` ties embedding and head (`tie_word_embeddings`), which is not built yet",
            hint="no published DeepSeek-V3-layout model does; check config.json",
        )
    weights = CheckpointWeights(source, layout)
    whole = meta_model(config, torch.bfloat16)
    dropped, unknown = leftover_tensors(source, whole, config.num_hidden_layers)
    if unknown:
        raise InputError(
            f"`{name}` holds {len(unknown)} tensors that the model has no place for, first "
            f"`{unknown[0]}`: training and saving would lose them",
            hint="config.json belongs to another checkpoint, or the layout is a newer one",
        )
    notes = [f"not read: {count} {reason}" for reason, count in dropped.items()]
    return TrainingModel(name, config, weights, tokenizer, notes=notes)


def _native_config(folder: Path) -> Any:
    """Returns transformers' own config, whatever code the repository brings along.

    `auto_map` is dropped: saved beside weights without that code it would break loading.
    """
    from transformers import DeepseekV3Config

    config = DeepseekV3Config.from_pretrained(folder)
    if hasattr(config, "auto_map"):
        del config.auto_map
    config.model_type = "deepseek_v3"
    config.architectures = ["DeepseekV3ForCausalLM"]
    return config


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


def cut_depth(config: Any, num_layers: int | None) -> int:
    """Reduces a transformers config to its first layers; returns how many are left."""
    if num_layers is not None:
        config.num_hidden_layers = min(num_layers, config.num_hidden_layers)
    return int(config.num_hidden_layers)


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
