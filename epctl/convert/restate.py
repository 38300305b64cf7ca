"""A view's tensors in the storage and dtype of an output: whole tensors, not yet dealt out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from epctl.convert.experts import ExpertTensor, find_expert_tensors
from epctl.convert.recipes import Block, LogicalTensor
from epctl.convert.scales import dequantized_tensor, scale_name
from epctl.convert.targets import DtypeChoice, StorageChoice, same_arrangement, target_layout
from epctl.convert.view import CheckpointView, stale_reason
from epctl.convert.weave import (
    fused_tensor,
    layer_tensors,
    output_dtype,
    plain_piece,
)
from epctl.errors import LayoutError
from epctl.layout.model import MoELayout

# Selection biases move in steps far below bfloat16's resolution; they stay what they are.
_CORRECTION_BIAS = re.compile(r"(correction_bias|expert_bias|router_bias|balancing_biases)$")
_PACKED = re.compile(r"(_blocks|\.weight_packed|\.qweight)$")


@dataclass(frozen=True)
class Restated:
    """The whole tensors of an output, with what was left out and what changed its dtype."""

    tensors: tuple[LogicalTensor, ...]
    moe: MoELayout | None
    dropped: tuple[Mapping[str, str], ...]
    changed: tuple[Mapping[str, str], ...]


def restate(view: CheckpointView, storage: StorageChoice, dtype: DtypeChoice) -> Restated:
    """Returns every tensor of the output in order. Raises LayoutError for what cannot be done."""
    return _Restatement(view, target_layout(view, storage, dtype), dtype == "bf16").run()


class _Restatement:
    def __init__(self, view: CheckpointView, target: MoELayout | None, bf16: bool) -> None:
        self.view = view
        self.target = target
        self.bf16 = bf16
        self.experts = find_expert_tensors(view.moe, view.tensors)
        self.copies_experts = (
            view.moe is None or target is None or same_arrangement(view.moe.storage, target.storage)
        )
        self.scales = self._scales_of_plain_tensors() if bf16 else {}
        self.consumed = set(self.scales.values())
        self.tensors: list[LogicalTensor] = []
        self.dropped: list[Mapping[str, str]] = list(view.dropped)
        self.changed: list[Mapping[str, str]] = list(view.changed)
        self.woven_layers: set[int] = set()

    def run(self) -> Restated:
        for name in self.view.tensors:
            reason = stale_reason(name)
            if reason is not None:
                self.dropped.append({"name": name, "reason": reason})
            elif name in self.experts:
                self._add_expert(name, self.experts[name])
            elif name in self.consumed:
                self._drop_scale(name)
            else:
                self._add_plain(name)
        return Restated(tuple(self.tensors), self.target, tuple(self.dropped), tuple(self.changed))

    def _scales_of_plain_tensors(self) -> dict[str, str]:
        plain = [name for name in self.view.tensors if name not in self.experts]
        found = {name: scale_name(self.view, name) for name in plain}
        return {name: scale for name, scale in found.items() if scale is not None}

    def _drop_scale(self, name: str) -> None:
        self.dropped.append({"name": name, "reason": "scales, multiplied into their weight"})

    def _note_change(self, name: str, dtype: str) -> None:
        stored = self.view.tensors[name].dtype
        if stored != dtype:
            self.changed.append({"name": name, "from": stored, "to": dtype})

    def _add_plain(self, name: str) -> None:
        stored = self.view.tensors[name]
        if self.bf16 and _PACKED.search(name):
            raise LayoutError(
                f"`{name}` ({stored.dtype}) is packed in a way that cannot be dequantised",
                hint="use `--dtype keep`, or the unquantised checkpoint",
            )
        if name in self.scales:
            tensor = dequantized_tensor(self.view, name, self.scales[name])
        else:
            keeps = name in self.view.correction_biases or _CORRECTION_BIAS.search(name)
            dtype = output_dtype(stored.dtype, self.bf16 and not keeps)
            block = Block(None, (plain_piece(stored.extents, stored, dtype),))
            tensor = LogicalTensor(name, dtype, stored.shape, (block,))
        self._note_change(name, tensor.dtype)
        self.tensors.append(tensor)

    def _add_expert(self, name: str, expert: ExpertTensor) -> None:
        assert self.view.moe is not None
        assert self.target is not None
        if self.copies_experts:
            self._copy_expert(name, expert, self.target)
            return
        self._note_woven(name, expert)
        if expert.layer not in self.woven_layers:
            self.woven_layers.add(expert.layer)
            self.tensors += layer_tensors(
                self.view, self.view.moe, self.target, expert.layer, bf16=self.bf16
            )

    def _copy_expert(self, name: str, expert: ExpertTensor, target: MoELayout) -> None:
        stored = self.view.tensors[name]
        output = self._target_name(name, expert, target)
        if expert.expert is None:
            tensor = fused_tensor(
                output, stored, expert.layer, target.experts_of_layer(expert.layer), self.bf16
            )
        else:
            dtype = output_dtype(stored.dtype, self.bf16)
            block = Block(expert.expert, (plain_piece(stored.extents, stored, dtype),))
            tensor = LogicalTensor(output, dtype, stored.shape, (block,), expert.layer)
        self._note_change(name, tensor.dtype)
        self.tensors.append(tensor)

    def _target_name(self, name: str, expert: ExpertTensor, target: MoELayout) -> str:
        """Returns the name in the output; tensors that no layout describes keep theirs."""
        key, _, kind = expert.key.partition(".")
        storage = target.storage
        names = {"": storage.names, "scale": storage.scales, "bias": storage.biases}.get(kind, {})
        template = names.get(key)
        return (
            name if template is None else target.tensor_name(expert.layer, template, expert.expert)
        )

    def _note_woven(self, name: str, expert: ExpertTensor) -> None:
        """Notes what becomes of a stored tensor whose experts are laid out anew."""
        assert self.target is not None
        source, target = self.view.moe, self.target.storage
        assert source is not None
        if expert.key in source.storage.names:
            dequantizes = bool(source.storage.scales) and not target.scales
            stored = self.view.tensors[name].dtype
            self._note_change(name, "BF16" if dequantizes else output_dtype(stored, self.bf16))
        elif expert.key.endswith(".scale") and not target.scales:
            self._drop_scale(name)
        elif not expert.key.endswith((".scale", ".bias")):
            self.dropped.append(
                {"name": name, "reason": "the storage asked for has no place for it"}
            )


def reordered(restated: Restated, names: Mapping[str, str]) -> Restated:
    """Returns the tensors in the order of `names`; those not in it go last."""
    position = {name: place for place, name in enumerate(names)}
    tensors = sorted(restated.tensors, key=lambda t: position.get(t.name, len(position)))
    return replace(restated, tensors=tuple(tensors))
