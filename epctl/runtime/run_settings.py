"""What a rank derives from the config before it builds anything: device, precision, length."""

from __future__ import annotations

import math
import os

import torch

from epctl.config import RunConfig, TrainSection
from epctl.errors import ConfigError
from epctl.runtime.mesh import Mesh


def choose_device(config: RunConfig) -> torch.device:
    """Returns this rank's device and makes it current.

    Raises ConfigError if CUDA is asked for and torch sees none.
    """
    wanted = config.parallel.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU", hint="use `--device cpu`")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def rows_per_step(train: TrainSection, num_data_ranks: int) -> int:
    """Returns the sequences of one optimizer step over all ranks."""
    return train.micro_batch_size * train.gradient_accumulation_steps * num_data_ranks


def tokens_per_step(train: TrainSection, num_data_ranks: int) -> int:
    return rows_per_step(train, num_data_ranks) * train.sequence_length


def num_steps(train: TrainSection, mesh: Mesh, num_train_rows: int | None) -> int:
    """Returns the optimizer steps of a run, at least one.

    Args:
        num_train_rows: sequences of one pass over the data; None when it has no end.

    Raises ConfigError for epochs over data without an end.
    """
    if train.tokens is not None:
        return math.ceil(train.tokens / tokens_per_step(train, mesh.num_data_ranks))
    if train.epochs is None:
        return train.steps
    if num_train_rows is None:
        raise ConfigError(
            "`train.epochs` counts passes over given data; the embedded text is drawn without end",
            hint="use `--steps` or `--tokens`, or give `--data`",
        )
    return max(
        1, math.ceil(train.epochs * num_train_rows / rows_per_step(train, mesh.num_data_ranks))
    )
