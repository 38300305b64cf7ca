"""Pure tensor functions of the MoE block: no model, no config, no process group.

Installed as `epctl.kernels`. Nothing here imports the rest of epctl, and nothing prints.
"""

from epctl.kernels.activation import Activation, ExpertBiases
from epctl.kernels.dispatch import (
    Choice,
    choose_implementation,
    moe_mlp,
    route,
    route_sparsemixer,
)
from epctl.kernels.router_logits import router_logits
from epctl.kernels.token_rows import TokenRows, add_rows, number_rows, take_rows

__all__ = [
    "Activation",
    "Choice",
    "ExpertBiases",
    "TokenRows",
    "add_rows",
    "choose_implementation",
    "moe_mlp",
    "number_rows",
    "route",
    "route_sparsemixer",
    "router_logits",
    "take_rows",
]
