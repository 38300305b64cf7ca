"""Reads a checkpoint's tensors into live ones, slice by slice; a rank touches only what it holds.

Shards are opened through safetensors and closed again after `MAPPED_BYTES`: pages that were read
stay resident while a file is mapped, and would add a rank's whole share to its memory.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from epctl.errors import InputError
from epctl.launch.model_reference import dequantize_hint
from epctl.layout.model import ExpertTensor, ModelLayout, Projection
from epctl.layout.parameters import is_stale
from epctl.layout.safetensors import DTYPE_BITS, TensorEntry
from epctl.layout.source import ModelSource
from epctl.runtime.hub_names import expert_tensor_names, note_hub_names
from epctl.runtime.names import hub_tensors

MAPPED_BYTES = 64 * 2**20
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")


@dataclass
class LoadCounts:
    """What one rank read: bytes from the files, tensors by what happened to their dtype."""

    num_bytes: int = 0
    num_tensors: int = 0
    num_widened: int = 0


class CheckpointWeights:
    """A WeightSource over the safetensors shards of a folder; counts every byte it reads."""

    def __init__(self, source: ModelSource, layout: ModelLayout) -> None:
        self.source = source
        self.counts = LoadCounts()
        self.read: set[str] = set()
        self._layers = _layers_by_prefix(layout)
        self._layout = layout
        self._file: Any = None
        self._file_name = ""
        self._mapped_bytes = 0

    def read_into(self, name: str, destination: Tensor) -> None:
        """Copies checkpoint tensor `name`, wherever the files keep it, into `destination`.

        Raises InputError for a tensor that is missing, quantised or of another shape.
        """
        place = self._place(name)
        entry = self.source.tensors.get(place.name)
        if entry is None:
            raise InputError(
                f"`{self.source.id}` holds no tensor `{name}`, which the model needs",
                hint="config.json belongs to another checkpoint, or a shard is missing",
            )
        if entry.dtype not in PLAIN_DTYPES:
            raise InputError(
                f"tensor `{name}` is stored as {entry.dtype}, which is not trained on",
                hint=dequantize_hint(self.source.id),
            )
        value = self._slice(entry, place)
        if value.shape != destination.shape:
            raise InputError(
                f"tensor `{name}` of `{self.source.id}` has shape {list(value.shape)}, the "
                f"model has {list(destination.shape)}",
                hint="config.json belongs to another checkpoint",
            )
        self.counts.num_bytes += value.nbytes
        self.counts.num_tensors += 1
        self.counts.num_widened += value.element_size() < destination.element_size()
        self.read.add(place.name)
        destination.copy_(value)

    def expected_bytes(self, model: nn.Module) -> int:
        """Returns the file bytes of every checkpoint tensor that `model` holds on this rank."""
        total = 0
        for tensor in hub_tensors(model):
            entry = self.source.tensors[self._place(tensor.name).name]
            total += tensor.num_elements * DTYPE_BITS[entry.dtype] // 8
        return total

    def note_names(self, model: nn.Module) -> None:
        """Notes on `model` what this checkpoint calls its tensors."""
        note_hub_names(model, self.source, self._layout)

    def restart(self) -> None:
        """Counts from zero: a model is about to be built from here."""
        self.counts = LoadCounts()
        self.read = set()

    def close(self) -> None:
        """Unmaps the open shard."""
        self._file = None
        self._mapped_bytes = 0

    def _place(self, name: str) -> ExpertTensor:
        """Returns where `name` is: itself, or a slice where all experts share a tensor."""
        match = _EXPERT.fullmatch(name)
        if match is not None and name not in self.source.tensors:
            layer = self._layers.get(match[1])
            moe = self._layout.moe
            if layer is not None and moe is not None:
                projection: Projection = match[3]  # type: ignore[assignment]
                find = moe.expert_tensor if match[4] == "weight" else moe.expert_bias
                return find(layer, int(match[2]), projection)
        return ExpertTensor(name, None, None, "all", 0, False)

    def _slice(self, entry: TensorEntry, place: ExpertTensor) -> Tensor:
        """Returns the part of a stored tensor that `place` names; nothing else is read."""
        stored = self._open(entry.file).get_slice(place.name)
        index: list[Any] = [slice(None)] * len(entry.shape)
        if place.index is not None and place.rows is not None:
            index[0] = slice(place.index * place.rows, (place.index + 1) * place.rows)
        elif place.index is not None:
            index[0] = slice(place.index, place.index + 1)
        has_expert_dim = place.index is not None and place.rows is None
        part_dim = place.part_dim + has_expert_dim
        half = entry.shape[part_dim] // 2 if entry.shape else 0
        if place.part == "first_half":
            index[part_dim] = slice(0, half)
        elif place.part == "second_half":
            index[part_dim] = slice(half, None)
        value: Tensor = stored[tuple(index)] if index else stored[:]
        self._mapped_bytes += value.nbytes
        if has_expert_dim:
            value = value.squeeze(0)
        if place.part in ("even", "odd"):
            start = int(place.part == "odd")
            value = value[:, start::2] if place.part_dim else value[start::2]
        return value.t() if place.transposed else value

    def _open(self, file: str) -> Any:
        if self._file is None or self._file_name != file or self._mapped_bytes > MAPPED_BYTES:
            self.close()
            path = self.source.shard_path(file)
            try:
                self._file = safe_open(path, framework="pt", device="cpu")
            except Exception as error:  # safetensors' own class and OSError
                raise InputError(f"shard `{path}` cannot be opened: {error}") from None
            self._file_name = file
        return self._file


def _layers_by_prefix(layout: ModelLayout) -> dict[str, int]:
    """Returns MoE layer numbers by the name that stands for their block (`model.layers.3.mlp`)."""
    if layout.moe is None:
        return {}
    return {f"{prefix}.mlp": layer for layer, prefix in layout.moe.layer_prefixes.items()}


def leftover_tensors(
    source: ModelSource, model: nn.Module, num_layers: int, layout: ModelLayout | None = None
) -> tuple[Counter[str], list[str]]:
    """Returns (tensors not read, counted by reason; names that nobody can explain).

    Args:
        model: the whole model on the meta device, every expert in it.
        num_layers: decoder layers that are built; layers after them are not trained.
    """
    wanted = {tensor.name for tensor in hub_tensors(model)}
    wanted |= set() if layout is None else expert_tensor_names(layout)
    wanted |= {
        name for name in source.tensors if re.search(r"\.experts\.(gate_up|down)_proj$", name)
    }
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    tied = tied_names(model)
    reasons: Counter[str] = Counter()
    unknown: list[str] = []
    for name in source.tensors:
        reason = "" if name in wanted else _reason(name, num_layers)
        if reason is None and name in tied:
            reason = "copies of tied tensors"
        if reason is None and any(re.search(pattern, name) for pattern in ignored):
            reason = "tensors that transformers' class has no place for"
        if reason is None:
            unknown.append(name)
        elif reason:
            reasons[reason] += 1
    return reasons, unknown


def tied_names(model: nn.Module) -> set[str]:
    """Returns the names under which shared Parameters appear a second time (`lm_head.weight`)."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def _reason(name: str, num_layers: int) -> str | None:
    if is_stale(name):
        return f"stale `{name.rsplit('.', 1)[-1]}` tensors, which the model computes itself"
    layer = re.match(r"(?:\w+\.)*layers\.(\d+)\.", name)
    if layer is not None and int(layer[1]) >= num_layers:
        return f"tensors of layers after the first {num_layers}, which are not built"
    return None
