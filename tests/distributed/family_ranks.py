"""One rank of test_families.py: every family's model at this EP size against transformers' own.

Each rank gives its own tokens to a block. transformers' block, with all experts, gets the tokens of
all ranks, so its gradients are what the ranks' must add up to.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from family_models import SIZES, inputs
from torch import Tensor, nn

from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.build import build_model
from epctl.runtime.checkpoint import save_model
from epctl.runtime.leave import leave
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe import ExpertParallelMoE
from epctl.runtime.moe_blocks import moe_blocks, router_of
from epctl.runtime.names import hub_tensors
from epctl.runtime.training_model import open_checkpoint

NUM_TOKENS = 37


def difference(actual: Tensor, expected: Tensor) -> float:
    """Returns the norm-wise relative difference."""
    distance = (actual.detach().double() - expected.detach().double()).norm()
    return float(distance / expected.detach().double().norm().clamp_min(1e-30))


def build(folder: Path, mesh: Mesh) -> nn.Module:
    """Returns epctl's model, read by epctl."""
    model = open_checkpoint(folder.name, folder, None)
    cpu = torch.device("cpu")
    return build_model(model.config, mesh, model.weights, dtype=torch.float32, device=cpu)


def transformers_model(folder: Path) -> nn.Module:
    """Returns transformers' own model, read by transformers; its tensors under the hub's names."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    open_checkpoint(folder.name, folder, None).weights.note_names(model)
    return model


def first_output(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some blocks return their router's logits too."""
    return output if isinstance(output, Tensor) else output[0]


def chosen(block: nn.Module, x: Tensor) -> Tensor:
    """Returns the experts that a block hands its experts module, ascending for each token."""
    seen: list[Tensor] = []
    hook = router_of(block).register_forward_hook(lambda _m, _i, output: seen.extend(output))
    block(x)
    hook.remove()
    experts = [output for output in seen if not output.is_floating_point()]
    if not experts:  # Llama 4's router returns scores that are zero where it did not choose
        scores = seen[0]
        experts = [scores.topk(int((scores > 0).sum(dim=1).max())).indices]
    return experts[0].reshape(-1, experts[0].shape[-1]).sort(dim=-1).values


def gradients(block: nn.Module) -> dict[str, Tensor]:
    return {
        tensor.name: dataclasses.replace(tensor, tensor=tensor.tensor.grad).local()
        for tensor in hub_tensors(block)
        if tensor.tensor.grad is not None
    }


def compare_block(ours: nn.Module, theirs: nn.Module, mesh: Mesh, hidden: int) -> dict[str, float]:
    """Returns the differences of output, input gradient and every parameter's gradient."""
    generator = torch.Generator().manual_seed(5)
    shape = (mesh.num_ranks, NUM_TOKENS, hidden)
    everyone, flow = (torch.randn(shape, generator=generator) for _ in range(2))
    x = everyone[mesh.rank : mesh.rank + 1].clone().requires_grad_()
    x_all = everyone.clone().requires_grad_()
    y, y_all = first_output(ours(x)), first_output(theirs(x_all))
    mine = slice(mesh.rank * NUM_TOKENS, (mesh.rank + 1) * NUM_TOKENS)
    y_all = y_all.reshape(-1, hidden)
    found = {"output": difference(y.reshape(-1, hidden), y_all[mine])}
    (y.reshape(-1, hidden) * flow[mesh.rank]).sum().backward()
    (y_all * flow.reshape(-1, hidden)).sum().backward()
    assert x.grad is not None
    assert x_all.grad is not None
    found["dx"] = difference(x.grad[0], x_all.grad[mesh.rank])
    for tensor in hub_tensors(ours):
        if tensor.tensor.grad is not None and not tensor.is_expert:
            dist.all_reduce(tensor.tensor.grad)
    expected = gradients(theirs)
    actual = gradients(ours)
    lacking = {n for n in expected if expected[n].abs().max() > 0 and not _elsewhere(n, mesh, ours)}
    assert lacking <= actual.keys(), sorted(lacking - actual.keys())
    for name, gradient in actual.items():
        kind = name if ".experts." not in name else "experts." + ".".join(name.split(".")[-2:])
        found[kind] = max(found.get(kind, 0.0), difference(gradient, expected[name]))
    same = torch.equal(chosen(ours, x.detach()), chosen(theirs, everyone)[mine])
    return found | {"choices": 0.0 if same else 1.0}


def _elsewhere(name: str, mesh: Mesh, layer: Any) -> bool:
    """True for an expert of another rank."""
    _, separator, rest = name.partition(".experts.")
    return bool(separator) and int(rest.split(".")[0]) not in layer.local_experts


def run_family(folder: Path, output: Path, mesh: Mesh) -> dict[str, Any]:
    ours, theirs = build(folder, mesh), transformers_model(folder)
    # Phi-MoE samples its experts while it trains: ranks would draw others than one process.
    train = folder.name != "phimoe"
    ours.train(train), theirs.train(train)
    layers = [m for m in ours.modules() if isinstance(m, ExpertParallelMoE)]
    blocks = [block for _, block in moe_blocks(theirs)]
    hidden = SIZES["hidden_size"]
    block = compare_block(layers[0], blocks[0], mesh, hidden)
    for model in (ours, theirs):
        model.zero_grad()
    ids = inputs()
    losses = []
    for model in (ours, theirs):
        loss = model.eval()(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss))
    embeddings = [model.get_input_embeddings().weight.grad for model in (ours, theirs)]
    save_model(ours, mesh, output, lambda staging: None)
    return {
        "num_layers": [len(layers), len(blocks)],
        "block": block,
        "losses": losses,
        "embedding_gradient": difference(*embeddings),
    }


def main(folder: Path, families: list[str]) -> None:
    warnings.filterwarnings("error", message="shared experts ran twice")
    torch.set_num_threads(1)
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=60))
    mesh = seams.create_mesh(dist.get_world_size())
    results: dict[str, Any] = {}
    for family in families:
        try:
            results[family] = run_family(folder.parent / "models" / family, folder / family, mesh)
        except Exception:
            if mesh.num_ranks > 1:
                raise  # the other ranks wait in a collective
            results[family] = {"error": traceback.format_exc()}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave(0)
