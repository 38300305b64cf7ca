"""Hub tensor names of a live model: the one map that load, save, Muon and checks share.

A DeepSeek-V3 checkpoint stores each expert's projections as tensors of their own; epctl's layer
stacks this rank's experts. A `HubTensor` is one checkpoint tensor as it lives here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from epctl.runtime.deepspeed_seams import full_shape
from epctl.runtime.moe import ExpertParallelMoE

# w1 gates, w3 is up, w2 is down: the names DeepSpeed's engine insists on.
EXPERT_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class HubTensor:
    """A checkpoint tensor, and the Parameter or buffer (and local expert) it lives in."""

    name: str
    tensor: Tensor
    local_expert: int | None = None

    def local(self) -> Tensor:
        """Returns the view of the live tensor; at ZeRO-3 only while Parameters are gathered."""
        return self.tensor if self.local_expert is None else self.tensor[self.local_expert]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint, also where ZeRO-3 holds only a slice."""
        shape = full_shape(self.tensor) if isinstance(self.tensor, nn.Parameter) else self.tensor.shape
        return tuple(shape if self.local_expert is None else shape[1:])

    @property
    def is_expert(self) -> bool:
        return self.local_expert is not None


def hub_tensors(module: nn.Module, prefix: str = "") -> Iterator[HubTensor]:
    """Yields every checkpoint tensor that `module` holds on this rank, experts one by one."""
    layers = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, ExpertParallelMoE)
    }
    for name, parameter in module.named_parameters():
        owner, _, leaf = name.rpartition(".experts.")
        layer = layers.get(owner)
        if layer is None:
            yield HubTensor(join(prefix, name), parameter)
        else:
            yield from _expert_tensors(join(prefix, owner), leaf, parameter, layer)
    persistent = set(module.state_dict(keep_vars=True))
    for name, buffer in module.named_buffers():
        if name in persistent:
            yield HubTensor(join(prefix, name), buffer)


def _expert_tensors(
    owner: str, leaf: str, parameter: nn.Parameter, layer: ExpertParallelMoE
) -> Iterator[HubTensor]:
    for local, expert in enumerate(layer.local_experts):
        name = f"{owner}.experts.{expert}.{EXPERT_PROJECTIONS[leaf]}.weight"
        yield HubTensor(name, parameter, local)


def join(prefix: str, name: str) -> str:
    """Joins two parts of a dotted name, either of which may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name
