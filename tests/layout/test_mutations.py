"""Every family, damaged in the same ways: the error or warning is the right one for each."""

import re
from dataclasses import replace

import pytest
from stored import EXPERT_CASES, source

from epctl.layout.detect import detect
from epctl.layout.experts import (
    ExpertGapError,
    ExpertShapeError,
    ExtraExpertError,
    MixedExpertsError,
)
from epctl.layout.mixture import LayerMismatchError

# Families whose config gives no exact number of experts for a layer.
UNCOUNTED = ("dots3_note_vision_encoder", "ernie4_5_vl_moe")
CASES = [case for case in EXPERT_CASES if case[0] not in UNCOUNTED]
SINGLE = [case for case in CASES if detect(source(*case)).moe.storage.kind == "per_expert"]
FUSED = [case for case in CASES if case not in SINGLE]


def parts(case):
    """Returns the source, its MoE layout and the last layer's prefix."""
    given = source(*case)
    moe = detect(given).moe
    return given, moe, moe.layer_prefixes[moe.layers[-1]]


def expert_names(moe, expert):
    layer = moe.layers[-1]
    return {moe.expert_tensor(layer, expert, p).name for p in moe.storage.projections}


@pytest.mark.parametrize("case", SINGLE)
def test_missing_expert_is_a_gap_that_names_it(case):
    given, moe, _ = parts(case)
    victim = moe.num_experts // 2
    names = expert_names(moe, victim)
    tensors = {name: entry for name, entry in given.tensors.items() if name not in names}
    with pytest.raises(ExpertGapError) as caught:
        detect(replace(given, tensors=tensors))
    assert f"layer {moe.layers[-1]} has {moe.num_experts - 1} of {moe.num_experts}" in str(
        caught.value
    )
    assert any(name in str(caught.value) for name in names)


@pytest.mark.parametrize("case", SINGLE)
def test_extra_expert_is_too_many(case):
    given, moe, _ = parts(case)
    layer = moe.layers[-1]
    tensors = dict(given.tensors)
    for projection in moe.storage.projections:
        last = moe.expert_tensor(layer, moe.num_experts - 1, projection).name
        template = moe.tensor_name(layer, moe.storage.names[projection], moe.num_experts)
        tensors[template] = tensors[last]
    with pytest.raises(ExtraExpertError, match=f"layer {layer} has {moe.num_experts + 1} experts"):
        detect(replace(given, tensors=tensors))


@pytest.mark.parametrize("case", SINGLE)
def test_one_expert_turned_around_is_mixed(case):
    given, moe, _ = parts(case)
    name = moe.expert_tensor(moe.layers[-1], moe.num_experts - 1, "down").name
    entry = given.tensors[name]
    if entry.shape == entry.shape[::-1]:
        entry = entry._replace(shape=(entry.shape[0], entry.shape[1] + 1))
    tensors = {**given.tensors, name: entry._replace(shape=entry.shape[::-1])}
    with pytest.raises(MixedExpertsError, match=re.escape(name)):
        detect(replace(given, tensors=tensors))


def fused_names(moe):
    return [
        moe.tensor_name(layer, moe.storage.names[key])
        for layer in moe.layers
        for key in moe.storage.names
    ]


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize(("change", "error"), [(-1, ExpertGapError), (1, ExtraExpertError)])
def test_fused_experts_of_the_wrong_number(case, change, error):
    given, moe, _ = parts(case)
    tensors = dict(given.tensors)
    for name in fused_names(moe):
        count, *rest = tensors[name].shape
        tensors[name] = tensors[name]._replace(shape=(count + change, *rest))
    with pytest.raises(error, match=f"holds {moe.num_experts + change} experts"):
        detect(replace(given, tensors=tensors))


def turned(given, moe, key):
    """Returns the source with one fused projection of every layer turned around."""
    tensors = dict(given.tensors)
    for layer in moe.layers:
        name = moe.tensor_name(layer, moe.storage.names[key])
        experts, one, two = tensors[name].shape
        tensors[name] = tensors[name]._replace(shape=(experts, two, one))
    return replace(given, tensors=tensors)


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("key", ["up", "down"])
def test_one_fused_projection_turned_around_is_refused_or_told(case, key):
    given, moe, _ = parts(case)
    stored = "gate_up" if key == "up" and "gate_up" in moe.storage.names else key
    hidden, inner = moe.expert_hidden_size, moe.expert_intermediate_size
    widening = 2 if "gate_up" in moe.storage.names else 1
    # The other projection reads the same both ways round, so all experts look turned.
    looks_turned = inner == hidden if key == "up" else hidden == widening * inner
    damaged = turned(given, moe, stored)
    if damaged == given:  # a square matrix: turning it changes no shape
        assert hidden == (widening if key == "up" else 1) * inner
        return
    if not looks_turned:
        with pytest.raises(ExpertShapeError, match="fit neither"):
            detect(damaged)
        return
    layout = detect(damaged)
    assert layout.moe.storage.transposed != moe.storage.transposed
    assert any("are stored" in warning for warning in layout.warnings)


# Families with a second expert list, which takes the place of the first when that is gone.
LISTED = [
    case
    for case in CASES
    if case[0] != "ernie4_5_vl_moe_text"
    and len(detect(source(*case)).moe.layers) > 1
    and "the tensors agree" in detect(source(*case)).reasons["moe.layers"]
]


def test_most_configs_list_their_layers():
    assert len(LISTED) > len(CASES) // 2


@pytest.mark.parametrize("case", LISTED)
def test_layer_without_its_experts_is_named_when_the_config_lists_layers(case):
    given, moe, prefix = parts(case)
    storage = {name.split("{")[0] for name in moe.storage.names.values()}
    starts = tuple(f"{prefix}.{start}" for start in storage)
    tensors = {name: entry for name, entry in given.tensors.items() if not name.startswith(starts)}
    with pytest.raises(LayerMismatchError, match=f"layer {moe.layers[-1]} should have experts"):
        detect(replace(given, tensors=tensors))
