"""Two checkpoints tensor by tensor: weights and state by name, whatever layouts wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from epctl.runtime.checkpoint_reader import StateReader
from epctl.runtime.run_checkpoints import MODEL_FOLDER, STATE_FOLDER


@dataclass(frozen=True)
class Difference:
    """One tensor: equal, changed (by how much), or in one of the two only.

    `change` is the norm of the difference over the norm of the first.
    """

    part: str
    name: str
    kind: str
    change: float | None = None

    @property
    def text(self) -> str:
        how = f"changed by {self.change:.3e}" if self.change is not None else self.kind
        return f"{self.part} {self.name}: {how}"


def compare(first: Path, second: Path) -> list[Difference]:
    """Returns a row for each tensor of either checkpoint; holds two tensors at a time."""
    return [*_compare_models(first, second), *_compare_states(first, second)]


def _compare_models(first: Path, second: Path) -> Iterator[Difference]:
    places = [_places(folder / MODEL_FOLDER) for folder in (first, second)]
    for name in sorted(places[0].keys() | places[1].keys()):
        if name not in places[0] or name not in places[1]:
            which = "first" if name in places[0] else "second"
            yield Difference(MODEL_FOLDER, name, f"in the {which} only")
        else:
            values = [_read(found[name], name) for found in places]
            yield _difference(MODEL_FOLDER, name, *values)


def _places(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _compare_states(first: Path, second: Path) -> Iterator[Difference]:
    with StateReader(first / STATE_FOLDER) as one, StateReader(second / STATE_FOLDER) as other:
        for name, key in sorted(one.tensors() | other.tensors()):
            full = f"{name}.{key}"
            if not one.has(name, key) or not other.has(name, key):
                which = "first" if one.has(name, key) else "second"
                yield Difference(STATE_FOLDER, full, f"in the {which} only")
            else:
                values = one.read(name, key), other.read(name, key)
                yield _difference(STATE_FOLDER, full, *values)


def _difference(part: str, name: str, one: Tensor, other: Tensor) -> Difference:
    if one.shape != other.shape or one.dtype != other.dtype:
        return Difference(part, name, f"{list(one.shape)} {one.dtype} against {list(other.shape)}")
    if torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8)):
        return Difference(part, name, "equal")
    apart = float((one.double() - other.double()).norm())
    return Difference(part, name, "changed", apart / max(float(one.double().norm()), 1e-300))
