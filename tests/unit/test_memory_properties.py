"""Properties of the memory model that hold for every model and every plan."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epctl.config import resolve_config
from epctl.launch.memory import Prediction, predict
from epctl.launch.memory_settings import RankPlan, rank_plan
from epctl.launch.memory_shape import ModelShape, model_shape
from epctl.launch.memory_state import ALIGNMENT
from epctl.layout.catalog import catalog_source
from epctl.layout.detect import detect

MODELS = (
    "moonshotai/Moonlight-16B-A3B",
    "Qwen/Qwen3-30B-A3B",
    "zai-org/GLM-4.5-Air",
    "mistralai/Mixtral-8x7B-v0.1",
    "deepseek-ai/DeepSeek-V3",
)
EXPERT_SIZES = (1, 2, 4, 8)


@functools.cache
def shape_of(model: str, optimizer: str) -> ModelShape:
    source = catalog_source(model)
    assert source is not None
    config = resolve_config(flags={"optim.name": optimizer}).config
    return model_shape(detect(source), source.config, config.optim)


@functools.cache
def base_plan(zero: int, accumulation: int, offload: bool, optimizer: str) -> RankPlan:
    flags = {
        "model.reference": "x",
        "parallel.zero": zero,
        "optim.name": optimizer,
        "optim.offload": offload,
        "train.gradient_accumulation_steps": accumulation,
    }
    return rank_plan(resolve_config(flags=flags).config, 1, "cuda")


plans = st.fixed_dictionaries(
    {
        "model": st.sampled_from(MODELS),
        "optimizer": st.sampled_from(("muon", "adamw")),
        "accumulation": st.sampled_from((1, 2, 8)),
        "offload": st.booleans(),
        "checkpointing": st.sampled_from(("none", "attention", "moe", "except_attention", "full")),
        "recomputes_experts": st.booleans(),
        "micro_batch": st.sampled_from((1, 2, 8)),
        "sequence_length": st.sampled_from((512, 4096, 32768)),
        "edp": st.integers(1, 64),
        "ep": st.sampled_from(EXPERT_SIZES),
    }
)


def prediction(drawn: dict[str, Any], zero: int, **changes: Any) -> Prediction:
    drawn = {**drawn, **changes}
    plan = base_plan(zero, drawn["accumulation"], drawn["offload"], drawn["optimizer"])
    plan = dataclasses.replace(
        plan,
        num_ranks=drawn["ep"] * drawn["edp"],
        ep=drawn["ep"],
        checkpointing=drawn["checkpointing"],
        recomputes_experts=drawn["recomputes_experts"],
        micro_batch=drawn["micro_batch"],
        sequence_length=drawn["sequence_length"],
    )
    return predict(shape_of(drawn["model"], drawn["optimizer"]), plan)


def padding(drawn: dict[str, Any], factor: int) -> float:
    """What flat groups may be padded by at more ranks: 16 bytes an element of alignment at most."""
    ranks = drawn["ep"] * drawn["edp"] * factor
    num_groups = 4 + shape_of(drawn["model"], drawn["optimizer"]).num_moe_layers * 3
    return 16.0 * ALIGNMENT * ranks * num_groups


@given(plans, st.sampled_from((1, 2, 3)), st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_more_gpus_never_need_more_memory_a_rank(
    drawn: dict[str, Any], zero: int, factor: int
) -> None:
    few, many = prediction(drawn, zero), prediction(drawn, zero, edp=drawn["edp"] * factor)
    if drawn["edp"] * drawn["ep"] > 1:  # the first second GPU brings collectives and their buffers
        slack = padding(drawn, factor) + _first_gather(drawn, zero, few)
        assert many.peak_bytes <= few.peak_bytes + slack
    assert many.state_bytes <= few.state_bytes + padding(drawn, factor)


def _first_gather(drawn: dict[str, Any], zero: int, few: Prediction) -> float:
    """Experts that one rank held whole are gathered once a second holds the other half."""
    if zero < 3 or drawn["edp"] > 1:
        return 0.0
    shape = shape_of(drawn["model"], drawn["optimizer"])
    return 2.0 * (shape.layer_expert_elements / drawn["ep"] + 1e9)


@given(plans)
@settings(max_examples=60, deadline=None)
def test_a_higher_stage_never_holds_more_state(drawn: dict[str, Any]) -> None:
    one, two, three = (prediction(drawn, zero) for zero in (1, 2, 3))
    # ZeRO-3 pads every Parameter, the others a group.
    slack = 1e6 + padding(drawn, 1)
    assert three.state_bytes <= two.state_bytes + slack
    assert two.state_bytes == one.state_bytes
    if drawn["accumulation"] > 1 and not drawn["offload"]:
        # Without accumulation ZeRO-1 keeps bfloat16 gradients, the others float32 ones.
        assert two.of("gradients") <= one.of("gradients")
        assert three.of("gradients") <= two.of("gradients") + slack


@given(plans, st.sampled_from((1, 2, 3)))
@settings(max_examples=60, deadline=None)
def test_a_larger_ep_never_raises_expert_memory(drawn: dict[str, Any], zero: int) -> None:
    ranks = 64
    sizes = [prediction(drawn, zero, ep=ep, edp=ranks // ep) for ep in EXPERT_SIZES]
    held = [_expert_bytes(found) for found in sizes]
    for smaller, larger in itertools.pairwise(held):
        assert larger <= smaller + padding({**drawn, "ep": 1, "edp": ranks}, 1)


def _expert_bytes(found: Prediction) -> float:
    groups = ("parameters", "masters", "optimizer state")
    return sum(
        term.num_bytes
        for term in found.terms
        if term.group in groups and term.name.endswith("experts")
    )


@given(plans, st.sampled_from((0, 1, 2, 3)))
@settings(max_examples=40, deadline=None)
def test_every_term_is_a_number_of_bytes_with_a_formula(drawn: dict[str, Any], zero: int) -> None:
    found = prediction({**drawn, "offload": drawn["offload"] and zero > 0}, zero)
    for term in found.terms:
        assert 0 < term.num_bytes < 1e16
        assert term.explanation()
    assert found.peak_bytes >= found.state_bytes - found.host_bytes


@pytest.mark.parametrize("model", MODELS)
def test_the_shape_holds_every_parameter(model: str) -> None:
    source = catalog_source(model)
    assert source is not None
    layout = detect(source)
    assert model_shape(layout, source.config).num_parameters == layout.parameters.total
