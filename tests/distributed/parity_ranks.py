"""Ranks of the parity tests: many (EP, ZeRO, optimizer) cases in one process group.

Called as `python -m parity_ranks FOLDER CASES_JSON [REFERENCES]`; rank K writes `rank-K.json` with
losses, norms and gradient errors of every case, rank 0 and the ranks of its ep group write the
weights after training. A case that is `whole` trains transformers' own model on one rank; with
REFERENCES, the folder of such a run, others compare their first gradients with its.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity_reference import GradientErrors, run_whole
from safetensors import safe_open

from epctl.config import RunConfig, resolve_config
from epctl.launch.ds_config import deepspeed_config
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime import moe
from epctl.runtime.build import build_model
from epctl.runtime.checkpoint import save_model
from epctl.runtime.dispatch import Dispatched, combine, dispatch
from epctl.runtime.engine import create_engine, train_step
from epctl.runtime.leave import leave
from epctl.runtime.recompute import set_up_recomputation
from epctl.runtime.weights import RandomWeights

NUM_STEPS = 4
GLOBAL_BATCH = 8
CALLS: collections.Counter[str] = collections.Counter()  # of a case, recomputations included
BALANCE = {"moe.sequence_loss": 0.05, "moe.z_loss": 0.01, "moe.bias_update_rate": 0.01}


def tiny_config(**changes: Any) -> Any:
    from transformers import DeepseekV3Config

    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_shared_experts": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.446,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_nextn_predict_layers": 0,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    return DeepseekV3Config(**values)


def case_config(case: dict[str, Any], num_ranks: int) -> RunConfig:
    accumulation = case.get("accumulation", 1)
    flags = {
        "parallel.ep": case["ep"],
        "parallel.zero": case["zero"],
        "optim.name": case.get("optim", "muon"),
        "optim.lr": 2e-3,
        "optim.gradient_clipping": case.get("clipping", 0.5),
        "optim.schedule": "linear",
        "optim.warmup_steps": 1,
        "train.steps": NUM_STEPS,
        "train.micro_batch_size": GLOBAL_BATCH // num_ranks // accumulation,
        "train.gradient_accumulation_steps": accumulation,
        "moe.implementation": case.get("moe", "epctl"),
        "train.activation_checkpointing": case.get("recompute", "none"),
        "moe.recompute": case.get("experts", "none"),
        "train.logits_mib": case.get("logits_mib"),
        "moe.capacity_factor": case.get("capacity"),
        **(BALANCE if case.get("balance") else {}),
        **case.get("flags", {}),
    }
    return resolve_config(flags=flags).config


def global_batch(step: int) -> torch.Tensor:
    """No two sequences begin alike: who of them is over a capacity would be left to rounding."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 64, (GLOBAL_BATCH, 24), generator=generator)
    ids[:, 0] = torch.arange(GLOBAL_BATCH) + 2 * step
    return ids


def rank_batches(step: int, config: RunConfig) -> list[torch.Tensor]:
    """This rank's micro-batches of the step; together all ranks and micro-steps see the batch."""
    share = global_batch(step).chunk(dist.get_world_size())[dist.get_rank()]
    return list(share.chunk(config.train.gradient_accumulation_steps))


def whole_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains the unsharded model; a capacity is of as many tokens as a micro-batch's there."""
    config = case_config(case, 1)
    steps = [list(global_batch(n).chunk(case["micro_batches"])) for n in range(NUM_STEPS)]
    return run_whole(tiny_config(), weights(), config, steps, folder / case["name"])


def weights() -> RandomWeights:
    return RandomWeights(seed=1, std=0.08)


def run_case(case: dict[str, Any], folder: Path, references: Path | None) -> dict[str, Any]:
    if case.get("whole"):
        return whole_case(case, folder)
    config = case_config(case, dist.get_world_size())
    mesh = seams.create_mesh(config.parallel.ep)
    ds_config = deepspeed_config(config, bfloat16=False, on_cpu=True)
    ds_config["zero_optimization"] |= case.get("zero_options", {})
    swap = config.moe.implementation == "epctl"
    model = build_model(
        tiny_config(**case.get("model", {})),
        mesh,
        weights(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        zero3_config=ds_config if config.parallel.zero == 3 and swap else None,
        swap=swap,
    )
    set_up_recomputation(model, config)
    CALLS.clear()
    engine, optimizer, scheduler = create_engine(model, config, ds_config)
    with contextlib.ExitStack() as stack:
        squares: dict[str, list[float]] = {}
        if references is not None and "reference" in case:
            path = references / case["reference"] / "gradients.safetensors"
            stored = stack.enter_context(safe_open(path, framework="pt"))
            errors = GradientErrors(engine, mesh, stored)
            squares, hook = errors.squares, optimizer.register_step_pre_hook(errors)
            stack.callback(hook.remove)
        records = [train_step(engine, scheduler, rank_batches(0, config), config, mesh)]
    for step in range(1, NUM_STEPS):
        records.append(train_step(engine, scheduler, rank_batches(step, config), config, mesh))
    save_model(engine.module, mesh, folder / case["name"], lambda staging: None)
    engine.destroy()
    losses, norms = zip(*records, strict=True)
    return {"losses": losses, "norms": norms, "calls": dict(CALLS), "squares": squares}


def check_held_counts() -> None:
    """The kernels take memory for as many choices as the exchange of counts announced."""

    def checked(*arguments: Any, **options: Any) -> Dispatched:
        CALLS["dispatch"] += 1
        sent = dispatch(*arguments, **options)
        held = int((sent.experts_RK >= 0).sum())
        assert sent.num_held == held, (sent.num_held, held)
        return sent

    def counted(*arguments: Any) -> torch.Tensor:
        CALLS["combine"] += 1
        return combine(*arguments)

    moe.dispatch = checked  # type: ignore[attr-defined]
    moe.combine = counted  # type: ignore[attr-defined]


def main(folder: Path, cases: list[dict[str, Any]], references: Path | None = None) -> None:
    check_held_counts()
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=60))
    results = {}
    for case in cases:
        results[case["name"]] = run_case(case, folder, references)
        gc.collect()
    path = folder / f"rank-{os.environ['RANK']}.json"
    path.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), *map(Path, sys.argv[3:]))
    leave(0)
