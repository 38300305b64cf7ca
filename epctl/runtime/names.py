"""Hub tensor names of a live model: the one map that load, save, Muon and checks share.

Live modules hold a layer's experts stacked: epctl's and DeepSpeed's layers this rank's as `w1`,
`w3`, `w2`, transformers' block all of them with gate and up in one tensor. A `HubTensor` is one
tensor of a checkpoint that stores every expert's projections by themselves, as it lives in any of
these. Where a checkpoint keeps all experts in one tensor, a HubTensor is one expert's slice of it,
under the name `PREFIX.mlp.experts.N.gate_proj.weight` (stored_tensors.py puts them together).

What a checkpoint calls a tensor is noted on the module that owns it (hub_names.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from epctl.layout.model import ExpertTensor, MoELayout, Projection
from epctl.runtime.deepspeed_seams import AutoEPMoELayer, full_shape

# w1 gates, w3 is up, w2 is down: the names DeepSpeed's engine insists on.
STACKED_WEIGHTS: dict[str, Projection] = {"w1": "gate", "w3": "up", "w2": "down"}
STACKED_BIASES: dict[str, Projection] = {"b1": "gate", "b3": "up", "b2": "down"}
FUSED_TENSORS: dict[str, tuple[Projection, ...]] = {
    "gate_up_proj": ("gate", "up"),
    "up_proj": ("up",),
    "down_proj": ("down",),
}


@dataclass(frozen=True)
class StoredExperts:
    """The place of a live layer's experts in a checkpoint: its layout and the layer's number."""

    moe: MoELayout
    layer: int

    def name(self, expert: int, projection: Projection, leaf: str) -> str:
        """Returns the stored name, or the one that stands for a slice of a shared tensor."""
        storage = self.moe.storage
        if storage.kind == "per_expert" and leaf == "weight" and projection in storage.names:
            return self.moe.tensor_name(self.layer, storage.names[projection], expert)
        prefix = self.moe.layer_prefixes[self.layer]
        return join(prefix, f"mlp.experts.{expert}.{projection}_proj.{leaf}")


@dataclass(frozen=True)
class ExpertSource:
    """Which projection of which expert a live slice is, and where a checkpoint stores it."""

    stored: StoredExperts
    expert: int
    projection: Projection
    leaf: str


@dataclass(frozen=True)
class HubTensor:
    """A checkpoint tensor and where it lives: a Parameter or buffer, an expert of it, its rows.

    With `transposed` the live expert is [in, out]; `part` of `num_parts` is then in its columns,
    `interleaved` or one after the other.
    """

    name: str
    tensor: Tensor
    local_expert: int | None = None
    part: int = 0
    num_parts: int = 1
    transposed: bool = False
    interleaved: bool = False
    source: ExpertSource | None = None

    def shared_place(self) -> ExpertTensor | None:
        """Returns where this slice lies in a stored tensor of all experts, None if it is alone."""
        if self.source is None or self.source.stored.moe.storage.kind == "per_expert":
            return None
        moe, source = self.source.stored.moe, self.source
        find = moe.expert_tensor if source.leaf == "weight" else moe.expert_bias
        return find(source.stored.layer, source.expert, source.projection)

    def local(self) -> Tensor:
        """Returns the view of the live tensor; at ZeRO-3 only while Parameters are gathered."""
        if self.local_expert is None:
            return self.tensor
        value = self.tensor[self.local_expert]
        value = value.t() if self.transposed else value
        if self.interleaved:
            return value[self.part :: self.num_parts]
        return value.chunk(self.num_parts)[self.part]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint, also where ZeRO-3 holds only a slice."""
        shape = tuple(full_shape(self.tensor))
        if self.local_expert is None:
            return shape
        first, *rest = reversed(shape[1:]) if self.transposed else shape[1:]
        return (first // self.num_parts, *rest)

    @property
    def num_elements(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def is_expert(self) -> bool:
        return self.local_expert is not None


def hub_tensors(module: nn.Module, prefix: str = "") -> Iterator[HubTensor]:
    """Yields every checkpoint tensor that `module` holds on this rank, experts one by one.

    A Parameter that two modules share (a tied head) comes once, under the first one's name.
    """
    seen: set[int] = set()
    owners = dict(module.named_modules())
    routers = {f"{path}.router" for path, owner in owners.items() if type(owner) is AutoEPMoELayer}
    for path, child in owners.items():
        layer: Any = owners.get(path.rpartition(".")[0]) if path else None
        owner_name = join(prefix, path)
        if path.removesuffix(".gate") in routers:  # DeepSpeed's own layer; its child is `gate`
            owner_name = owner_name.removesuffix(".gate").removesuffix(".router") + ".gate"
        for leaf, parameter in child.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield from _of_parameter(child, layer, owner_name, leaf, parameter)
        for leaf, buffer in child.named_buffers(recurse=False):
            if leaf not in child._non_persistent_buffers_set:
                yield HubTensor(stored_name(child, owner_name, leaf), buffer)


def _of_parameter(
    owner: nn.Module, layer: nn.Module | None, owner_name: str, leaf: str, parameter: nn.Parameter
) -> Iterator[HubTensor]:
    if isinstance(layer, AutoEPMoELayer) and leaf in (STACKED_WEIGHTS | STACKED_BIASES):
        first = layer.ep_rank * layer.num_local_experts
        kind = "weight" if leaf in STACKED_WEIGHTS else "bias"
        projection = (STACKED_WEIGHTS | STACKED_BIASES)[leaf]
        for local in range(layer.num_local_experts):
            expert = first + local
            name = _expert_name(owner, owner_name, expert, projection, kind)
            source = _source(owner, expert, projection, kind)
            yield HubTensor(name, parameter, local, source=source)
    elif is_fused_experts(owner) and leaf.removesuffix("_bias") in FUSED_TENSORS:
        yield from _of_fused(owner, owner_name, leaf, parameter)
    else:
        yield HubTensor(stored_name(owner, owner_name, leaf), parameter)


def _of_fused(
    owner: nn.Module, owner_name: str, leaf: str, parameter: nn.Parameter
) -> Iterator[HubTensor]:
    """Yields the experts of transformers' own module."""
    parts = FUSED_TENSORS[leaf.removesuffix("_bias")]
    is_bias = leaf.endswith("_bias")
    transposed = not is_bias and is_transposed(owner)
    interleaved = len(parts) == 2 and not getattr(owner, "is_concatenated", True)
    for expert in range(full_shape(parameter)[0]):
        for part, projection in enumerate(parts):
            kind = "bias" if is_bias else "weight"
            name = _expert_name(owner, owner_name, expert, projection, kind)
            yield HubTensor(name, parameter, expert, part, len(parts), transposed, interleaved)


def is_fused_experts(module: nn.Module) -> bool:
    """True for transformers' module of all routed experts: a 3-D down projection of its own."""
    down = module._parameters.get("down_proj")
    return down is not None and len(full_shape(down)) == 3


def is_transposed(experts: Any) -> bool:
    """True if transformers keeps these experts [in, out]; classes without the mark: shapes say."""
    marked = getattr(experts, "is_transposed", None)
    if marked is not None:
        return bool(marked)
    name = "gate_up_proj" if "gate_up_proj" in experts._parameters else "up_proj"
    inward, outward = full_shape(experts._parameters[name]), full_shape(experts.down_proj)
    return bool(inward[1] == outward[2])


def _expert_name(
    owner: nn.Module, owner_name: str, expert: int, projection: Projection, leaf: str
) -> str:
    stored: StoredExperts | None = getattr(owner, "stored_experts", None)
    if stored is not None:
        return stored.name(expert, projection, leaf)
    return f"{owner_name}.{expert}.{projection}_proj.{leaf}"


def _source(
    owner: nn.Module, expert: int, projection: Projection, leaf: str
) -> ExpertSource | None:
    stored: StoredExperts | None = getattr(owner, "stored_experts", None)
    return None if stored is None else ExpertSource(stored, expert, projection, leaf)


def stored_name(owner: nn.Module, owner_name: str, leaf: str) -> str:
    """Returns the checkpoint's name of a Parameter or buffer that is no expert's."""
    noted: Mapping[str, str] = getattr(owner, "hub_names", {})
    return noted.get(leaf) or live_name(owner, owner_name, leaf)


def live_name(owner: nn.Module, owner_name: str, leaf: str) -> str:
    """Returns transformers' name of it; epctl's router holds some of its tensors one level up."""
    inner: Mapping[str, str] = getattr(owner, "live_leaves", {})
    return join(owner_name, inner.get(leaf, leaf))


def join(prefix: str, name: str) -> str:
    """Joins two parts of a dotted name, either of which may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name
