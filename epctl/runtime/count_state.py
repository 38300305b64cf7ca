"""Counts what a rank will hold, from the model on the meta device: no weights, no ranks.

`python -m epctl.runtime.count_state` reads a request as JSON on stdin and answers with the last
line of stdout (DeepSpeed announces itself before that). The launcher asks it for `--dry-run`, in
a process of its own because torch and DeepSpeed come with it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import nn

from epctl.config import RunConfig
from epctl.errors import EpctlError, exit_code_of
from epctl.output import Mode, Output
from epctl.runtime.mesh import Mesh

MASTER_BYTES = 4
# Bytes of AdamW's two float32 moments an element; Muon's one has a dtype of its own.
ADAMW_BYTES = 8


def count_rank_bytes(
    config: RunConfig, model_config: Any, num_ranks: int, *, bfloat16: bool
) -> dict[str, int]:
    """Returns the bytes of parameters, masters and optimizer state on the fullest rank."""
    from epctl.runtime.build import meta_model
    from epctl.runtime.moe_blocks import count_experts, swap_moe_blocks
    from epctl.runtime.parameter_groups import classify
    from epctl.runtime.trainable import select_trainable

    mesh = Mesh(0, num_ranks, config.parallel.ep, 0)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    model = meta_model(model_config, dtype)
    num_experts = count_experts(model, model_config)
    swap_moe_blocks(model, model_config, mesh, dtype)
    select_trainable(model, config.train.parameters, num_experts)
    kinds = {id(found.parameter): found.kind for found in classify(model, config.optim)}
    stage = config.parallel.zero
    momentum_bytes = getattr(torch, config.optim.momentum_dtype).itemsize
    result = {"parameters": 0, "masters": 0, "optimizer_state": 0}
    for parameter in model.parameters():
        share = _share(parameter, mesh)
        held = share if stage == 3 else parameter.numel()
        result["parameters"] += held * parameter.element_size()
        if id(parameter) in kinds:
            stepped = share if stage > 0 else parameter.numel()
            has_master = stage > 0 or bfloat16
            result["masters"] += stepped * MASTER_BYTES * has_master
            on_muon = kinds[id(parameter)] == "muon"
            result["optimizer_state"] += stepped * (momentum_bytes if on_muon else ADAMW_BYTES)
    return result | {"total": sum(result.values())}


def _share(parameter: nn.Parameter, mesh: Mesh) -> int:
    """Returns the elements of one rank's slice, padding included."""
    from epctl.runtime.deepspeed_seams import is_expert_parameter

    group_size = mesh.edp_size if is_expert_parameter(parameter) else mesh.num_ranks
    return -(-parameter.numel() // group_size)


def main() -> int:
    """Answers one request; an error goes out as JSON too."""
    request = json.load(sys.stdin)
    try:
        config = RunConfig.model_validate(request["config"])
        answer: dict[str, Any] = count_rank_bytes(
            config,
            _model_config(request["model_config"]),
            request["num_ranks"],
            bfloat16=request["bfloat16"],
        )
    except EpctlError as error:
        answer = {"error": error.message, "hint": error.hint, "exit_code": exit_code_of(error)}
    Output(Mode.JSON).record(answer)
    return 0


def _model_config(values: dict[str, Any] | None) -> Any:
    from epctl.runtime.default_model import default_config
    from epctl.runtime.native_config import native_config

    return default_config() if values is None else native_config(values)


if __name__ == "__main__":
    sys.exit(main())
