"""The engines that `epctl bench train` times: epctl's, DeepSpeed's own AutoEP, plain transformers.

All three get the same weights, tokens, ZeRO settings, precision and recomputation. The peers are
what their users run: transformers' own blocks and loss, and the optimizer that DeepSpeed builds.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from epctl.config import RunConfig
from epctl.launch.ds_config import deepspeed_config
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.build import build_model
from epctl.runtime.data_batch import Batch
from epctl.runtime.engine import create_engine, train_step
from epctl.runtime.mesh import Mesh
from epctl.runtime.native_config import native_config
from epctl.runtime.ranges import annotate
from epctl.runtime.recompute import checkpoint_activations, set_up_recomputation
from epctl.runtime.weights import DeviceWeights

# What DeepSpeed offers beside its defaults; its Triton kernels, so on GPUs only.
FUSED = {"combine_impl": "fused_weighted_sum", "gate_up_impl": "fused"}
SAME_PRESET = {"kimi_k2": "deepseek_v3", "qwen2_moe": "qwen3_moe"}


class AbsentError(Exception):
    """An implementation cannot run this model; the message says why."""


@dataclass
class Trainee:
    """An engine ready to train.

    Attributes:
        step: takes one optimizer step on this rank's micro-batches; returns the mean loss over
            all ranks and the engine's norm of the gradient. A collective.
        note: what a reader must know of its settings.
    """

    engine: Any
    step: Callable[[Sequence[Batch]], tuple[float, float]]
    note: str

    def close(self) -> None:
        """Lets go of the engine, so that the next one finds its memory free."""
        seams.release_engine(self.engine)


@dataclass(frozen=True)
class Order:
    """What to build: config.json's values and a run's settings, on this rank's device."""

    values: Mapping[str, Any]
    config: RunConfig
    device: torch.device

    @property
    def bfloat16(self) -> bool:
        return self.config.train.uses_bfloat16(self.device.type)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bfloat16 else torch.float32

    def deepspeed(self, config: RunConfig) -> dict[str, Any]:
        """Returns the DeepSpeed JSON of a config on this device."""
        on_cpu = self.device.type == "cpu"
        return deepspeed_config(config, bfloat16=self.bfloat16, on_cpu=on_cpu)

    def build(self, mesh: Mesh, *, swap: bool, zero3: dict[str, Any] | None) -> nn.Module:
        """Returns the model with fresh weights, made on the device."""
        model = build_model(
            native_config(self.values),
            mesh,
            DeviceWeights(self.config.train.seed),
            dtype=self.dtype,
            device=self.device,
            zero3_config=zero3,
            swap=swap,
        )
        if swap:
            set_up_recomputation(model, self.config)
        else:  # peers have none of epctl's experts
            checkpoint_activations(model, self.config.train.activation_checkpointing)
        return model


def open_epctl(order: Order) -> Trainee:
    """Returns epctl's engine, as `epctl train` makes it."""
    config = order.config
    mesh = seams.create_mesh(config.parallel.ep)
    document = order.deepspeed(config)
    zero3 = document if config.parallel.zero == 3 else None
    engine, _, scheduler = create_engine(
        order.build(mesh, swap=True, zero3=zero3), config, document
    )

    def step(batches: Sequence[Batch]) -> tuple[float, float]:
        return train_step(engine, scheduler, batches, config, mesh)

    return Trainee(engine, step, _accumulation(document))


def open_deepspeed(order: Order) -> Trainee:
    """Returns DeepSpeed's AutoEP with its fused options and its own optimizer.

    Raises AbsentError for a model type that it has no preset for.
    """
    config = with_changes(order.config, "moe", implementation="autoep")
    document = _peer_document(order, config)
    document["expert_parallel"]["preset_model"] = _preset(str(order.values.get("model_type")))
    note = "AutoEP, defaults (its fused options need a GPU)"
    if order.device.type == "cuda":
        document["expert_parallel"] |= FUSED
        note = "AutoEP, " + ", ".join(f"{key} {value}" for key, value in FUSED.items())
    mesh = seams.create_mesh(config.parallel.ep)
    # It slices a model that every rank holds whole: nothing to partition before.
    return _peer(order.build(mesh, swap=False, zero3=None), document, note)


def open_transformers(order: Order) -> Trainee:
    """Returns transformers' own model under plain ZeRO: every rank computes every expert."""
    config = with_changes(order.config, "parallel", ep=1)
    document = _peer_document(order, config)
    zero3 = document if config.parallel.zero == 3 else None
    model: Any = order.build(seams.create_mesh(1), swap=False, zero3=zero3)
    kind = getattr(model.config, "_experts_implementation", None) or "eager"
    return _peer(model, document, f"no expert parallelism, {kind} experts")


OPENERS: Mapping[str, Callable[[Order], Trainee]] = {
    "epctl": open_epctl,
    "deepspeed": open_deepspeed,
    "transformers": open_transformers,
}


def with_changes(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    """Returns the settings with those of one section replaced; they are not validated again."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})


def _preset(model_type: str) -> str:
    from deepspeed.module_inject.auto_ep_config import PRESET_MODELS

    name = SAME_PRESET.get(model_type, model_type)
    if name not in PRESET_MODELS:
        raise AbsentError(f"AutoEP has no preset for model_type `{model_type}`")
    return name


def _peer_document(order: Order, config: RunConfig) -> dict[str, Any]:
    """Returns epctl's DeepSpeed JSON with DeepSpeed's own optimizer in place of epctl's."""
    on_gpu = order.device.type == "cuda"
    plain_adam = not on_gpu or not _fused_adam_builds()
    if config.optim.name == "muon":
        document = order.deepspeed(with_changes(config, "optim", name="deepspeed-muon"))
        document["optimizer"]["params"]["torch_adam"] = plain_adam
        return document
    optim = config.optim
    document = order.deepspeed(config)
    params = {
        "lr": optim.adamw_lr or optim.lr,
        "betas": [optim.beta1, optim.beta2],
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "torch_adam": plain_adam,
    }
    # torch's own fused kernel where DeepSpeed's needs a compiler that is not there.
    fused = {"fused": True} if on_gpu and plain_adam else {}
    return document | {"optimizer": {"type": "AdamW", "params": params | fused}}


@functools.cache
def _fused_adam_builds() -> bool:
    """True if DeepSpeed's FusedAdam is there or compiles; rank 0 goes first. A collective."""
    if shutil.which("nvcc") is None and not _is_prebuilt():
        return False
    found = [False]
    for turn in (True, False):
        if turn == (dist.get_rank() == 0):
            found[0] = _load_fused_adam()
        dist.barrier()
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _is_prebuilt() -> bool:
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get("fused_adam"))


def _load_fused_adam() -> bool:
    from deepspeed.ops.op_builder import FusedAdamBuilder

    try:
        FusedAdamBuilder().load(verbose=False)
    except Exception:  # a compiler, ninja or a toolkit of another version: torch's kernel it is
        return False
    return True


def _peer(model: nn.Module, document: dict[str, Any], note: str) -> Trainee:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=document,
        dist_init_required=False,
    )

    def step(batches: Sequence[Batch]) -> tuple[float, float]:
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        for batch in batches:
            loss = engine(**batch.model_inputs()).loss
            engine.backward(loss)
            total += loss.detach().double()
            del loss
            with annotate("optimizer"):
                engine.step()
        dist.all_reduce(total)
        loss = float(total) / (len(batches) * dist.get_world_size())
        return loss, seams.gradient_norm(engine)

    parts = (note, _optimizer_note(document), _accumulation(document))
    return Trainee(engine, step, "; ".join(parts))


def _optimizer_note(document: Mapping[str, Any]) -> str:
    params = document["optimizer"]["params"]
    adam = "torch's AdamW" if params["torch_adam"] else "FusedAdam"
    if document["optimizer"]["type"] == "Muon":
        return f"DeepSpeed's Muon ({params['ns_method']}), {adam}"
    return adam


def _accumulation(document: Mapping[str, Any]) -> str:
    dtype = document.get("data_types", {}).get("grad_accum_dtype")
    return "gradients added up in float32" if dtype == "fp32" else "gradients in the model's dtype"
