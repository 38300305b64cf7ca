"""Eight ranks of test_dispatch_ranks.py: uneven exchanges against a dense sum, and bytes counted.

Called as `python -m dispatch_ranks FOLDER`; rank K writes the largest differences of every case and
the bytes it handed to `all_to_all_single` in `rank-K.json`.

Shape suffixes: T tokens of this rank, A tokens of all ranks, D hidden size, E experts, K top_k,
I intermediate size.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from epctl.runtime import deepspeed_seams as seams
from epctl.runtime import dispatch
from epctl.runtime.leave import leave
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe import LocalExperts
from epctl.runtime.moe_rules import ExpertShape
from epctl.runtime.recompute import OPTIONS

NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 16, 3, 12, 20
EP_SIZES = (8, 4, 2)
Choice = Callable[[int, torch.Generator], Tensor]


def anywhere(num_tokens: int, generator: torch.Generator) -> Tensor:
    return torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(TOP_K).indices


def one_rank(num_tokens: int, generator: torch.Generator) -> Tensor:
    """Two experts, both on rank 1 of eight, on rank 0 of a group of four or two."""
    held = torch.tensor([2, 3, -1])
    return held.expand(num_tokens, TOP_K).clone()


def with_drops(num_tokens: int, generator: torch.Generator) -> Tensor:
    """As capacity leaves choices; every third token has lost all of them."""
    experts_TK = anywhere(num_tokens, generator)
    experts_TK[torch.rand(experts_TK.shape, generator=generator) < 0.3] = -1
    experts_TK[::3] = -1
    return experts_TK


CASES: dict[str, tuple[list[int], Choice]] = {
    "even": ([9] * 8, anywhere),
    "uneven": ([37, 1, 0, 12, 5, 0, 64, 3], anywhere),
    "all to one rank": ([9] * 8, one_rank),
    "all to ranks that have none": ([0, 0, 0, 3, 0, 2, 0, 4], one_rank),
    "one rank alone has tokens": ([0, 0, 0, 21, 0, 0, 0, 0], anywhere),
    "nobody has tokens": ([0] * 8, anywhere),
    "dropped": ([9, 4, 0, 12, 7, 8, 30, 1], with_drops),
}


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inward, outward = (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    shapes = {"w1": inward, "w3": inward, "w2": outward}
    return {
        name: 0.3 * torch.randn(NUM_EXPERTS, *shape, generator=generator)
        for name, shape in shapes.items()
    }


def dense(x_AD: Tensor, experts_AK: Tensor, weights_AK: Tensor, held: dict[str, Tensor]) -> Tensor:
    """Every expert for every token, in float64: the definition, without rows or ranks."""
    share_AE = torch.zeros(len(x_AD), NUM_EXPERTS + 1, dtype=torch.float64)
    share_AE = share_AE.scatter_add(1, experts_AK % (NUM_EXPERTS + 1), weights_AK)[:, :-1]
    gate, up = (torch.einsum("ad,eid->aei", x_AD, held[name]) for name in ("w1", "w3"))
    return torch.einsum("aei,edi,ae->ad", silu(gate) * up, held["w2"], share_AE)


def differences(name: str, mesh: Mesh, experts: LocalExperts, recomputed: bool) -> dict[str, float]:
    """Returns the largest differences of output and every gradient, over the reference's largest.

    Every rank draws everybody's tokens, so that it knows what it should have got.
    """
    counts, choose = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    total, start = sum(counts), sum(counts[: mesh.rank])
    x_AD, flow_AD = (torch.randn(total, HIDDEN, generator=generator) for _ in range(2))
    weights_AK = torch.rand(total, TOP_K, generator=generator)
    experts_AK = choose(total, generator)
    mine = slice(start, start + counts[mesh.rank])
    x_TD, weights_TK = (t[mine].clone().requires_grad_() for t in (x_AD, weights_AK))
    experts.zero_grad()
    run = functools.partial(checkpoint, experts, **OPTIONS) if recomputed else experts
    y_TD = run(x_TD, experts_AK[mine], weights_TK)
    (y_TD * flow_AD[mine]).sum().backward()

    held = {key: value.double().requires_grad_() for key, value in weights().items()}
    x, w = (t.double().requires_grad_() for t in (x_AD, weights_AK))
    y_AD = dense(x, experts_AK, w, held)
    in_group = _group_tokens(mesh, counts)
    (y_AD * flow_AD)[in_group].sum().backward()
    found = {"y": _off(y_TD, y_AD[mine]), "dx": _off(x_TD.grad, _of(x)[mine])}
    found["dweights"] = _off(weights_TK.grad, _of(w)[mine])
    local = _local(mesh)
    for key, value in held.items():
        found[f"d{key}"] = _off(getattr(experts, key).grad, _of(value)[local])
    return found


def _of(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _off(actual: Tensor | None, expected: Tensor) -> float:
    assert actual is not None
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    off = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    return float("inf") if torch.isnan(off) else float(off)


def _local(mesh: Mesh) -> slice:
    held = mesh.local_experts(NUM_EXPERTS)
    return slice(held.start, held.stop)


def _group_tokens(mesh: Mesh, counts: list[int]) -> list[int]:
    """Returns the tokens of this rank's ep group, whose experts no other group's tokens reach."""
    assert mesh.ep_group is not None
    ranks = dist.get_process_group_ranks(mesh.ep_group)
    return [t for r in ranks for t in range(sum(counts[:r]), sum(counts[: r + 1]))]


def made_experts(mesh: Mesh) -> LocalExperts:
    experts = LocalExperts(ExpertShape(NUM_EXPERTS, HIDDEN, INTERMEDIATE), mesh, torch.float32)
    local = _local(mesh)
    with torch.no_grad():
        for name, value in weights().items():
            getattr(experts, name).copy_(value[local])
    return experts


def moonlight_bytes(mesh: Mesh) -> dict[str, int]:
    """Returns bytes of an exchange there and back at Moonlight's sizes, and a row an expert's.

    `wanted` is by hand: a row there and back and of 6 choices 8 bytes each, for each token and rank
    that holds one of its experts; and two counts a rank.
    """
    num_tokens, hidden, num_experts, top_k = 256, 2048, 64, 6
    generator = torch.Generator().manual_seed(mesh.rank)
    x_TD = torch.randn(num_tokens, hidden, generator=generator).bfloat16()
    experts_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    weights_TK = torch.rand(num_tokens, top_k, generator=generator)
    local = mesh.num_local_experts(num_experts)
    assert mesh.ep_group is not None
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        sent = dispatch.dispatch(x_TD, experts_TK, weights_TK, local, mesh.ep_group)
        dispatch.combine(sent.x_RD, sent)
    moved = sum(rows.nbytes for _, rows, *_ in (call.args for call in exchange.call_args_list))
    num_rows = sum(len({expert // local for expert in row}) for row in experts_TK.tolist())
    back = sum(sent.splits.received)  # what other ranks' tokens get from here
    return {
        "moved": moved,
        "wanted": num_rows * (hidden * 2 + top_k * 8) + back * hidden * 2 + mesh.ep_size * 2 * 8,
        "row_an_expert": 2 * num_tokens * top_k * hidden * 2,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=60))
    found: dict[str, Any] = {"bytes": {}}
    for ep in EP_SIZES:
        mesh = seams.create_mesh(ep)
        experts = made_experts(mesh)
        for name in CASES:
            found[f"{name}, EP {ep}"] = differences(name, mesh, experts, False)
            found[f"{name}, EP {ep}, recomputed"] = differences(name, mesh, experts, True)
        found["bytes"][ep] = moonlight_bytes(mesh)
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
