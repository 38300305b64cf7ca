"""Every random state of a rank's process, as tensors that a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

KEYS = ("cpu", "cuda", "numpy", "python")


def random_state(device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yields (key, 1-D tensor) of torch's generators, numpy's and Python's."""
    yield "cpu", torch.get_rng_state()
    if device.type == "cuda":
        yield "cuda", torch.cuda.get_rng_state(device)
    _, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numbers = [*map(float, words), float(position), float(has_gauss), float(gauss)]
    yield "numpy", torch.tensor(numbers, dtype=torch.float64)
    _, internal, next_gauss = random.getstate()
    has_next = [float(next_gauss is not None), float(next_gauss or 0.0)]
    yield "python", torch.tensor([*map(float, internal), *has_next], dtype=torch.float64)


def set_random_state(key: str, value: Tensor, device: torch.device) -> None:
    """Puts one of them back."""
    if key == "cpu":
        torch.set_rng_state(value)
    elif key == "cuda" and device.type == "cuda":
        torch.cuda.set_rng_state(value, device)
    elif key == "numpy":
        words = value[:-3].numpy().astype(np.uint32)
        position, has_gauss, gauss = value[-3:].tolist()
        np.random.set_state(("MT19937", words, int(position), int(has_gauss), gauss))
    elif key == "python":
        *internal, has_next, next_gauss = value.tolist()
        state = tuple(int(word) for word in internal)
        random.setstate((3, state, next_gauss if has_next else None))


def seed_anew(seed: int, step: int, rank: int) -> None:
    """Seeds a rank that no checkpoint knows: another number than every other rank and step."""
    mixed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)
