"""Predicted bytes against what engines on gloo ranks really allocate, case by case.

The full grid (ZeRO 0 to 3 x EP 1, 2, 4 x AdamW, Muon x offload x bfloat16, float32) is `slow`.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks
from parity_ranks import tiny_config

from epctl.config import resolve_config
from epctl.launch.ds_config import deepspeed_config
from epctl.launch.memory import Prediction, predict
from epctl.launch.memory_default import deepseek_v3_source
from epctl.launch.memory_settings import rank_plan
from epctl.launch.memory_shape import model_shape
from epctl.launch.memory_terms import Phase
from epctl.layout.detect import detect

NUM_RANKS = 4
BUCKET_ELEMENTS = 50_021  # memory_ranks.py
# What engines allocate outside the terms: loss scalars, norms, flags.
SMALL = 1024
# Buffers that are alive between backward and step; the others are gone by then.
LASTING = ("small parameters kept whole", "gradient staging", "copy-back buffer on the host")


def named(**case: Any) -> dict[str, Any]:
    return {**case, "name": " ".join(f"{key}={value}" for key, value in case.items())}


def few_cases() -> Iterator[dict[str, Any]]:
    """Every stage and EP size; optimizer and offload take turns; accumulation; freezing."""
    for zero, ep in itertools.product((0, 1, 2, 3), (1, 2, 4)):
        optim = "muon" if (ep + zero) % 3 else "adamw"
        offload = zero > 0 and (zero + ep // 2) % 2 == 0
        yield named(zero=zero, ep=ep, optim=optim, offload=offload, precision="bfloat16")
    for zero in (1, 2, 3):
        case = {"zero": zero, "ep": 2, "optim": "muon", "precision": "bfloat16"}
        yield named(**case, offload=zero == 2, accumulation=2)
    yield named(zero=3, ep=2, optim="muon", offload=False, precision="bfloat16", train="experts")
    yield named(zero=2, ep=2, optim="muon", offload=False, precision="float32")


def all_cases() -> Iterator[dict[str, Any]]:
    grid = itertools.product(
        ("bfloat16", "float32"), (0, 1, 2, 3), (1, 2, 4), ("adamw", "muon"), (False, True)
    )
    for precision, zero, ep, optim, offload in grid:
        if not (zero == 0 and offload):
            yield named(zero=zero, ep=ep, optim=optim, offload=offload, precision=precision)


@functools.cache
def tiny() -> Any:
    config = tiny_config().to_dict() | {"scoring_func": "sigmoid", "norm_topk_prob": True}
    source = deepseek_v3_source("tiny", config)
    return source, detect(source)


def predicted(case: dict[str, Any]) -> Prediction:
    flags = {
        "parallel.ep": case["ep"],
        "parallel.zero": case["zero"],
        "optim.name": case["optim"],
        "optim.offload": case["offload"],
        "train.parameters": case.get("train", "all"),
        "train.precision": case["precision"],
        "train.gradient_accumulation_steps": case.get("accumulation", 1),
    }
    config = resolve_config(flags=flags).config
    document = deepspeed_config(config, bfloat16=case["precision"] == "bfloat16", on_cpu=True)
    document["zero_optimization"]["reduce_bucket_size"] = BUCKET_ELEMENTS
    source, layout = tiny()
    shape = model_shape(layout, source.config, config.optim, config.train.parameters)
    return predict(shape, rank_plan(config, NUM_RANKS, "cpu", deepspeed=document))


def gradient_bytes(prediction: Prediction) -> float:
    """Returns what backward leaves: gradients wherever they lie, and lasting buffers."""
    return sum(
        term.num_bytes
        for term in prediction.terms
        if (term.group == "gradients" and term.phases & Phase.LAST_BACKWARD) or term.name in LASTING
    )


def check(folder: Path, cases: list[dict[str, Any]], timeout: float) -> None:
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    counted = run_ranks("memory_ranks", NUM_RANKS, folder, str(path), timeout=timeout)
    for case in cases:
        prediction, ranks = predicted(case), [rank[case["name"]] for rank in counted]
        state = {
            "parameters": prediction.of("parameters"),
            "masters": prediction.of("masters"),
            "state": prediction.of("optimizer state"),
        }
        for kind, expected in state.items():
            assert max(rank[kind] for rank in ranks) == expected, (case["name"], kind)
        gradients = max(rank["gradients"] for rank in ranks)
        assert gradients == pytest.approx(gradient_bytes(prediction), rel=0.1, abs=SMALL), case


def test_state_is_exact_and_gradients_within_a_tenth(tmp_path: Path) -> None:
    check(tmp_path, list(few_cases()), timeout=400)


@pytest.mark.slow
def test_every_stage_ep_optimizer_offload_and_precision(tmp_path: Path) -> None:
    check(tmp_path, list(all_cases()), timeout=900)
