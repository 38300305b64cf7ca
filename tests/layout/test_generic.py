"""The generic rule: structure from names and shapes, routing left to the user."""

from dataclasses import replace

import pytest
from stored import EXPERT_CASES, source

from epctl.errors import LayoutError
from epctl.layout.detect import detect
from epctl.layout.generic import generic_names
from epctl.layout.names import group_names

# Names that say nothing of experts, or two expert lists in one: out of reach without a family.
UNREACHABLE = {
    ("granitemoe", "hub"), ("granitemoehybrid", "hub"), ("granitemoeshared", "hub"),
    ("ernie4_5_vl_moe", "hub"),
}  # fmt: skip


def unlisted(name, naming):
    """Returns a fixture whose model_type nobody lists."""
    given = source(name, naming)
    config = {key: value for key, value in given.config.items() if key != "architectures"}
    for section in ("text_config", ""):
        part = config.get(section, config)
        if isinstance(part, dict) and "model_type" in part:
            part = {**part, "model_type": "nobody"}
            config = {**config, section: part} if section else part
    return replace(given, config=config)


# Layers of different sizes, or experts of two widths in one list, need the family's word.
IRREGULAR = ("dots3_note_vision_encoder", "ernie4_5_vl_moe")
REGULAR_CASES = [case for case in EXPERT_CASES if case[0] not in IRREGULAR]


@pytest.mark.parametrize(("name", "naming"), REGULAR_CASES)
def test_known_names_without_a_family_give_structure_and_the_routing_that_is_stated(name, naming):
    expected, layout = detect(source(name, naming)), detect(unlisted(name, naming))
    assert layout.family is None
    assert layout.moe.num_experts == expected.moe.num_experts
    assert layout.moe.expert_intermediate_size == expected.moe.expert_intermediate_size
    assert layout.moe.layers == expected.moe.layers
    assert layout.moe.router.weight is not None
    router = layout.moe.router
    for key in ("score_func", "normalize", "scale"):
        value, reason = getattr(router, key), layout.reasons[f"moe.router.{key}"]
        assert reason.startswith("config.json states none of" if value is None else "config ")
        if value is not None:  # the family may say otherwise where a config leaves it out
            assert value == getattr(expected.moe.router, key)
    if router.missing_keys:
        with pytest.raises(LayoutError):
            layout.require_trainable()


@pytest.mark.parametrize("case", [case for case in EXPERT_CASES if case not in UNREACHABLE])
def test_generic_rule_finds_the_same_experts_as_the_family(case):
    given = source(*case)
    known = detect(given).moe.storage.names
    found = generic_names(group_names(given.tensors), given.tensors)
    assert known in [entry.names.experts for entry in found]


def test_refusal_names_the_keys_and_the_section():
    layout = detect(unlisted("qwen3_moe", "hub"))
    with pytest.raises(LayoutError) as caught:
        layout.require_trainable()
    # Qwen3's config states `norm_topk_prob`; the other two it leaves to its class.
    for key, stated_as in (("score_func", "scoring_func"), ("scale", "routed_scaling_factor")):
        assert f"moe.router.{key}" in caught.value.message
        assert f"`{stated_as}`" in caught.value.hint
    assert "moe.router.normalize" not in caught.value.message
    assert "section of config.json" in caught.value.hint
    assert "docs/adding-a-model.md" in caught.value.hint
    assert "nobody" in caught.value.message


def test_what_the_refusal_asks_for_is_what_lets_the_layout_train():
    """The hint works as typed: the keys go into config.json, and the rule is known."""
    given = unlisted("qwen3_moe", "hub")
    stated = {"scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    section = {**given.config["text_config"], **stated}
    layout = detect(replace(given, config={**given.config, "text_config": section}))
    layout.require_trainable()
    router = layout.moe.router
    assert (router.score_func, router.normalize, router.scale) == ("sigmoid", True, 2.5)
    assert layout.reasons["moe.router.scale"] == ("config text_config.routed_scaling_factor = 2.5")


def test_names_nobody_used_are_read_by_shape():
    given = source("mixtral", "hub")
    tensors = {
        name.replace(".w1.", ".one.").replace(".w3.", ".two.").replace(".w2.", ".three."): entry
        for name, entry in given.tensors.items()
    }
    layout = detect(replace(unlisted("mixtral", "hub"), tensors=tensors))
    assert layout.moe.num_experts == 8
    assert layout.moe.storage.names["down"] == "block_sparse_moe.experts.{expert}.three.weight"
    assert layout.moe.router.weight == "block_sparse_moe.gate.weight"
    with pytest.raises(LayoutError, match=r"which of `one.weight` and `two.weight` is the gate"):
        layout.require_trainable()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inkling_text", "sink"),
        ("zaya", "MLP"),
        ("deepseek_v4", "tid2eid"),
        ("muse_spark_text", "projected space"),
        ("longcat_flash", "zero_expert_num"),
    ],
)
def test_a_rule_that_epctl_cannot_compute_is_refused_by_name(name, words):
    with pytest.raises(LayoutError, match=words):
        detect(source(name, "module")).require_trainable()


def test_dense_model_needs_no_router_to_train():
    detect(source("qwen2_vl", "hub")).require_trainable()
