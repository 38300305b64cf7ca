"""Ranks of the sequence-parallel tests: many models and cuts in one process group.

Called as `python -m sequence_ranks FOLDER CASES_JSON`. Of every case a rank writes the loss and the
largest relative error of any parameter's gradient against the unsharded model, which each rank runs
itself; ranks of one group get one sample, other groups other samples, as in data parallelism.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import sequence_engine
import torch
import torch.distributed as dist
from sequence_models import batch, build
from sequence_spy import Spy, held
from torch import Tensor, nn

from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.chunked_loss import limit_logits
from epctl.runtime.leave import leave
from epctl.runtime.mesh import Mesh
from epctl.runtime.recompute import checkpoint_activations
from epctl.runtime.sequence import attention, decoder, tower, units, vision
from epctl.runtime.sequence import loss as loss_of
from epctl.runtime.sequence.group import SequenceGroup, create_sequence_group
from epctl.runtime.sequence.loss import IGNORED, shifted_targets
from epctl.runtime.sequence.parallel import parallelize
from epctl.runtime.sequence.route import ranges

# Gradients below this share of the largest are zero but for rounding (a bias on keys: softmax does
# not see it); they must stay as small.
ZERO = 1e-6

Gradients = dict[str, Tensor | None]


def groups_of(sp: int) -> SequenceGroup:
    if sp not in _GROUPS:
        _GROUPS[sp] = create_sequence_group(sp)
    return _GROUPS[sp]


_GROUPS: dict[int, SequenceGroup] = {}


def samples(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The sample of each data-parallel place; `images` and `kinds` may differ between them."""
    count = dist.get_world_size() // case["sp"]
    images = case.get("images", 5)
    per_place = images if isinstance(images, list) else [images] * count
    kinds = case.get("kinds", [case.get("kind", "plain")])
    return [
        batch(case["model"], 10 + p, kinds[p % len(kinds)], per_place[p % len(per_place)])
        for p in range(count)
    ]


def num_targets(inputs: dict[str, Any]) -> int:
    return int((shifted_targets(inputs["labels"]) != IGNORED).sum())


def unsharded(case: dict[str, Any], model: nn.Module) -> tuple[float, Gradients]:
    """Loss and gradients over all samples together, on one rank."""
    everything = samples(case)
    total = sum(map(num_targets, everything))
    loss = 0.0
    for inputs in everything:
        output = model(**inputs, use_cache=False, num_items_in_batch=total)
        output.loss.backward()
        loss += float(output.loss.detach())
    return loss, take_gradients(model)


def take_gradients(model: nn.Module) -> Gradients:
    result = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return result


def sharded(case: dict[str, Any], model: nn.Module) -> tuple[float, Gradients]:
    """The same by sequence parallelism; gradients are averaged over all ranks."""
    everything = samples(case)
    num_ranks = dist.get_world_size()
    inputs = everything[dist.get_rank() // case["sp"]]
    if case.get("given_count", True):
        inputs["num_items_in_batch"] = sum(map(num_targets, everything)) / num_ranks
    if "zero" in case:
        engine = sequence_engine.create(model, case["zero"], mesh_of(case))
        loss, gradients = sequence_engine.step(engine, inputs)
        engine.destroy()
    else:
        loss = model(**inputs).loss
        loss.backward()
        gradients = averaged(take_gradients(model))
    loss = loss.detach().double()
    dist.all_reduce(loss)
    return float(loss) / num_ranks, gradients


def averaged(gradients: Gradients) -> Gradients:
    for gradient in gradients.values():
        if gradient is not None:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return gradients


def mesh_of(case: dict[str, Any]) -> Mesh:
    return seams.create_mesh(case.get("ep", 1))


def worst_error(found: Gradients, expected: Gradients) -> tuple[float, str]:
    """Returns the largest relative error over parameters, and whose it is."""
    norms = [float(g.norm()) for g in expected.values() if g is not None]
    zero = ZERO * max(norms)
    worst = (0.0, "")
    for name, gradient in expected.items():
        reference = torch.zeros(()) if gradient is None else gradient
        own = found[name]
        own = torch.zeros_like(reference) if own is None else own
        norm, distance = float(reference.norm()), float((own - reference).norm())
        error = distance / norm if norm > zero else (distance if distance > zero else 0.0) / zero
        worst = max(worst, (error, name))
    return worst


@contextlib.contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Breaks the code in one of the ways that the tests must notice."""
    with contextlib.ExitStack() as stack:
        if name == "features without gradient":
            whole = vision.to_owners
            broken = lambda rows, *rest: whole(rows.detach(), *rest)  # noqa: E731
            stack.enter_context(mock.patch.object(vision, "to_owners", broken))
        elif name == "tiles without gradient":
            whole = units.TileShare._exchanged
            broken = lambda self, state, *rest: whole(self, state.detach(), *rest)  # noqa: E731
            stack.enter_context(mock.patch.object(units.TileShare, "_exchanged", broken))
        elif name == "features in the tower's order":
            broken = lambda self, offsets: ranges([(b - a) // 4 for a, b in pairwise(offsets)])  # noqa: E731
            stack.enter_context(mock.patch.object(tower.TowerInputs, "held_tokens", broken))
        elif name == "shapes of all images":
            lengths = lambda self: [b - a for a, b in pairwise(self.frames)]  # noqa: E731
            broken = lambda self, *own: list(zip(lengths(self), self.shapes, strict=True))  # noqa: E731
            stack.enter_context(mock.patch.object(tower.TowerInputs, "own_shapes", broken))
        elif name == "heads without gradient":
            whole = attention.start_rows_to_heads
            broken = lambda q, k, *rest: whole(q, k.detach(), *rest)  # noqa: E731
            stack.enter_context(mock.patch.object(attention, "start_rows_to_heads", broken))
        elif name == "labels cut before they are shifted":
            broken = lambda x, a, b: loss_of.shifted_targets(x[:, a:b]).contiguous()  # noqa: E731
            stack.enter_context(mock.patch.object(loss_of, "local_targets", broken))
        elif name == "positions not cut":
            broken = lambda given, tokens: torch.arange(tokens.shape[1]).remainder(7)[None]  # noqa: E731
            stack.enter_context(mock.patch.object(decoder, "_positions", broken))
        else:
            assert name is None, name
        yield


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, case.get("dtype", "float32"))
    model = build(case["model"], dtype=dtype, **case.get("changes", {}))
    if case.get("spy") == "unsharded":
        with Spy() as spy:
            unsharded(case, model)
        return {"held": held(spy, model, samples(case)[0], 1)}
    expected_loss, expected = unsharded(case, model)
    if "ep" in case:
        sequence_engine.swap_experts(model, mesh_of(case))
        expected = sequence_engine.expected_here(expected, mesh_of(case))
    if checkpointing := case.get("checkpointing"):
        checkpoint_activations(model, "except_attention" if checkpointing == "kept" else "full")
    if "logits_bytes" in case:
        assert limit_logits(model, case["logits_bytes"]) is None
    parallel = parallelize(
        model,
        groups_of(case["sp"]),
        vision=case.get("vision", "aligned"),
        encoder_outputs=case.get("encoder_outputs"),
        vision_group=groups_of(dist.get_world_size()) if case.get("balance") else None,
    )
    parallel.group.traffic.reset()
    spy = Spy()
    attention.OVERLAPPED_BYTES = 0 if case.get("overlap") else 2**24
    with mutated(case.get("mutation")), spy if case.get("spy") else contextlib.nullcontext():
        loss, found = sharded(case, model)
    error, name = worst_error(found, expected)
    cuts = parallel.vision_cuts
    layout = parallel.vision.layout if parallel.vision is not None else None
    return {
        "loss": loss,
        "expected_loss": expected_loss,
        "error": error,
        "parameter": name,
        "level": None if cuts is None else cuts.level,
        "sizes": None if cuts is None else cuts.sizes,
        "imbalance": None if cuts is None else cuts.imbalance,
        "exchanges": None if layout is None else layout.num_exchanges,
        "bytes": dict(parallel.group.traffic.by_part),
        "held": held(spy, model, samples(case)[0], case["sp"]) if case.get("spy") else None,
    }


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    seams.initialize_distributed("cpu", datetime.timedelta(minutes=5))
    torch.set_num_threads(1)
    results = {}
    for case in cases:
        try:
            results[case["name"]] = run_case(case)
        except Exception as error:
            raise RuntimeError(f"in case {case['name']}") from error
        gc.collect()
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave(0)
