"""Hub tensor names of a live model: the one map that load, save, Muon and checks share.

A DeepSeek-V3 checkpoint stores each expert's projections as tensors of their own. Live modules
stack them: epctl's and DeepSpeed's layers hold this rank's experts as `w1`, `w3`, `w2`,
transformers' block holds all of them with gate and up in one tensor. A `HubTensor` is one
checkpoint tensor as it lives in any of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from epctl.runtime.deepspeed_seams import AutoEPMoELayer, full_shape

# w1 gates, w3 is up, w2 is down: the names DeepSpeed's engine insists on.
STACKED_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
FUSED_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class HubTensor:
    """A checkpoint tensor and where it lives: a Parameter or buffer, an expert of it, its rows."""

    name: str
    tensor: Tensor
    local_expert: int | None = None
    part: int = 0
    num_parts: int = 1

    def local(self) -> Tensor:
        """Returns the view of the live tensor; at ZeRO-3 only while Parameters are gathered."""
        if self.local_expert is None:
            return self.tensor
        return self.tensor[self.local_expert].chunk(self.num_parts)[self.part]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint, also where ZeRO-3 holds only a slice."""
        shape = tuple(full_shape(self.tensor))
        if self.local_expert is None:
            return shape
        return (shape[1] // self.num_parts, *shape[2:])

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
    """Yields every checkpoint tensor that `module` holds on this rank, experts one by one."""
    for path, child in module.named_modules():
        for leaf, parameter in child.named_parameters(recurse=False):
            yield from _of_parameter(child, join(prefix, path), leaf, parameter, module, path)
        for leaf, buffer in child.named_buffers(recurse=False):
            if leaf not in child._non_persistent_buffers_set:
                yield HubTensor(hub_name(join(prefix, path), leaf), buffer)


def _of_parameter(
    owner: nn.Module,
    owner_name: str,
    leaf: str,
    parameter: nn.Parameter,
    root: nn.Module,
    path: str,
) -> Iterator[HubTensor]:
    layer = root.get_submodule(path.rpartition(".")[0]) if path else None
    if isinstance(layer, AutoEPMoELayer) and leaf in STACKED_PROJECTIONS:
        first = layer.ep_rank * layer.num_local_experts
        for local in range(layer.num_local_experts):
            name = f"{owner_name}.{first + local}.{STACKED_PROJECTIONS[leaf]}.weight"
            yield HubTensor(name, parameter, local)
    elif leaf in FUSED_PROJECTIONS and parameter.ndim == 3:
        parts = FUSED_PROJECTIONS[leaf]
        for expert in range(parameter.shape[0]):
            for part, projection in enumerate(parts):
                name = f"{owner_name}.{expert}.{projection}.weight"
                yield HubTensor(name, parameter, expert, part, len(parts))
    else:
        yield HubTensor(hub_name(owner_name, leaf), parameter)


def hub_name(owner_name: str, leaf: str) -> str:
    """Returns the checkpoint name; DeepSpeed's layer calls the router `router(.gate)`."""
    for live, stored in ((".router.gate", ".gate"), (".router", ".gate")):
        if owner_name.endswith(live):
            owner_name = owner_name.removesuffix(live) + stored
            break
    return join(owner_name, leaf)


def join(prefix: str, name: str) -> str:
    """Joins two parts of a dotted name, either of which may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name
