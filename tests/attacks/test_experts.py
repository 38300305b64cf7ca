"""Checkpoints whose experts do not add up."""

import pytest
from checkpoints import MOE_CONFIG, moe_tensors, tensor_shard, write_model

from epctl.errors import LayoutError
from epctl.hub import resolve
from epctl.layout.detect import detect
from epctl.layout.experts import (
    ExpertGapError,
    ExpertShapeError,
    ExtraExpertError,
    MixedExpertsError,
    OrphanScaleError,
)
from epctl.layout.mixture import LayerMismatchError
from epctl.layout.parallel import why_not_ep

BLOCK = "model.layers.0.block_sparse_moe"


def layout_of(tmp_path, tensors, config=MOE_CONFIG):
    write_model(tmp_path, {"model.safetensors": tensor_shard(tensors)}, config=config)
    return detect(resolve(str(tmp_path)))


def test_sound_layer_is_detected(tmp_path):
    layout = layout_of(tmp_path, moe_tensors())
    assert (layout.moe.num_experts, layout.moe.top_k, layout.moe.expert_intermediate_size) == (
        4,
        2,
        6,
    )
    assert layout.moe.layers == (0,)
    assert layout.ep_sizes == (1, 2, 4)


def test_missing_last_expert_is_a_gap(tmp_path):
    tensors = {name: spec for name, spec in moe_tensors().items() if ".experts.3." not in name}
    with pytest.raises(ExpertGapError, match=r"0 has 3 of 4 experts: 3 missing.*experts\.3\.w1"):
        layout_of(tmp_path, tensors)


def test_gap_in_the_middle_is_found_without_a_config_count(tmp_path):
    tensors = {name: spec for name, spec in moe_tensors().items() if ".experts.1." not in name}
    config = {key: value for key, value in MOE_CONFIG.items() if key != "num_local_experts"}
    with pytest.raises(ExpertGapError, match="1 missing"):
        layout_of(tmp_path, tensors, config)


def test_one_missing_projection_is_named(tmp_path):
    tensors = moe_tensors()
    del tensors[f"{BLOCK}.experts.2.w3.weight"]
    with pytest.raises(ExpertGapError, match=r"experts\.2\.w3\.weight"):
        layout_of(tmp_path, tensors)


def test_expert_too_many_is_refused(tmp_path):
    with pytest.raises(ExtraExpertError, match="layer 0 has 5 experts, the config says 4: 4 are"):
        layout_of(tmp_path, moe_tensors(num_experts=5))


def test_mixed_dtypes_in_a_layer_are_refused(tmp_path):
    tensors = moe_tensors()
    tensors[f"{BLOCK}.experts.2.w1.weight"] = ("BF16", (6, 4))
    with pytest.raises(MixedExpertsError, match=r"experts\.2\.w1\.weight` is BF16"):
        layout_of(tmp_path, tensors)


def test_mixed_shapes_in_a_layer_are_refused(tmp_path):
    tensors = moe_tensors()
    tensors[f"{BLOCK}.experts.1.w2.weight"] = ("F32", (4, 8))
    with pytest.raises(MixedExpertsError, match=r"\[4, 8\]"):
        layout_of(tmp_path, tensors)


def test_one_transposed_projection_is_refused(tmp_path):
    tensors = {
        name: (dtype, shape[::-1] if name.endswith("w2.weight") else shape)
        for name, (dtype, shape) in moe_tensors().items()
    }
    with pytest.raises(ExpertShapeError, match="fit neither"):
        layout_of(tmp_path, tensors)


def test_experts_transposed_as_a_whole_are_read_by_the_hidden_size(tmp_path):
    tensors = {
        name: (dtype, shape[::-1] if ".experts." in name else shape)
        for name, (dtype, shape) in moe_tensors().items()
    }
    layout = layout_of(tmp_path, tensors)
    assert layout.moe.storage.transposed
    assert (layout.moe.hidden_size, layout.moe.expert_intermediate_size) == (4, 6)


def test_scale_without_its_weight_is_refused(tmp_path):
    tensors = {**moe_tensors(), f"{BLOCK}.experts.9.w1.weight_scale_inv": ("F32", (1, 1))}
    with pytest.raises(OrphanScaleError, match=r"experts\.9\.w1\.weight`, which is not there"):
        layout_of(tmp_path, tensors)


def test_block_scales_are_quantisation_not_parameters(tmp_path):
    tensors = moe_tensors(dtype="F8_E4M3")
    tensors |= {f"{name}_scale_inv": ("F32", (1, 1)) for name in list(tensors) if "experts" in name}
    layout = layout_of(tmp_path, tensors)
    assert layout.moe.storage.quantization == "fp8_block"
    assert layout.moe.storage.scales["down"] == (
        "block_sparse_moe.experts.{expert}.w2.weight_scale_inv"
    )
    assert layout.parameters.scales == 12
    assert layout.parameters.routed_experts == 4 * 3 * 24


def test_layer_that_lost_its_experts_is_refused(tmp_path):
    tensors = {**moe_tensors(), **moe_tensors(prefix="model.layers.2")}
    config = {**MOE_CONFIG, "num_hidden_layers": 3, "first_k_dense_replace": 0}
    with pytest.raises(LayerMismatchError, match="layer 1 should have experts"):
        layout_of(tmp_path, tensors, config)


def test_layers_after_the_last_are_multi_token_prediction(tmp_path):
    tensors = {**moe_tensors(), **moe_tensors(prefix="model.layers.1")}
    layout = layout_of(tmp_path, tensors)
    assert (layout.moe.layers, layout.moe.mtp_layers) == ((0,), (1,))
    assert layout.parameters.mtp == layout.parameters.total == 4 * 3 * 24 + 16
    assert any("layer 1 are kept verbatim" in warning for warning in layout.warnings)


def test_mtp_layer_absent_is_no_complaint(tmp_path):
    layout = layout_of(tmp_path, moe_tensors(), {**MOE_CONFIG, "num_nextn_predict_layers": 1})
    assert layout.moe.mtp_layers == ()
    assert layout.warnings == ()


def test_config_that_promises_experts_no_tensor_has(tmp_path):
    layout = layout_of(tmp_path, {"model.layers.0.mlp.up_proj.weight": ("F32", (6, 4))})
    assert layout.moe is None
    assert any("no tensor belongs to an expert" in warning for warning in layout.warnings)


def test_no_expert_beyond_the_last(tmp_path):
    moe = layout_of(tmp_path, moe_tensors()).moe
    with pytest.raises(LayoutError):
        moe.expert_tensor(0, 4, "gate")
    with pytest.raises(LayoutError):
        moe.expert_tensor(1, 0, "gate")


@pytest.mark.parametrize(
    ("ep", "num_experts", "words"),
    [(3, 64, "% ep(3) = 1"), (128, 64, "ep(128) > num_experts(64)"), (0, 64, "ep(0)")],
)
def test_illegal_expert_parallel_size_says_why(ep, num_experts, words):
    assert words in why_not_ep(ep, num_experts)


def test_legal_expert_parallel_size_has_no_complaint():
    assert why_not_ep(8, 64) is None
