"""Configs and tables that claim impossible numbers: a typed error or a layout, at once."""

import json

import pytest
from checkpoints import MOE_CONFIG, moe_tensors, tensor_shard, write_model

from epctl.errors import InputError
from epctl.hub import resolve
from epctl.layout.command import inspect
from epctl.layout.detect import detect
from epctl.layout.document import layout_document
from epctl.layout.experts import ExpertGapError, ExpertShapeError
from epctl.layout.facts import ConfigValueError
from epctl.layout.names import format_gaps

HUGE = 10**12
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 4,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}


def layout_of(tmp_path, config, tensors):
    write_model(tmp_path, {"model.safetensors": tensor_shard(tensors)}, config=config)
    return detect(resolve(str(tmp_path)))


def deepseek_tensors():
    block = "model.layers.0.mlp"
    tensors = {f"{block}.gate.weight": ("F32", (4, 4))}
    for expert in range(4):
        for name, shape in (("gate", (6, 4)), ("up", (6, 4)), ("down", (4, 6))):
            tensors[f"{block}.experts.{expert}.{name}_proj.weight"] = ("F32", shape)
    return tensors


@pytest.mark.timeout(20)
@pytest.mark.parametrize("count", [HUGE, -1])
def test_impossible_number_of_layers_is_refused(count, tmp_path):
    with pytest.raises(ConfigValueError, match=f"num_hidden_layers = {count}: 0 to 100000"):
        layout_of(tmp_path, MOE_CONFIG | {"num_hidden_layers": count}, moe_tensors())


@pytest.mark.timeout(20)
def test_impossible_number_of_experts_in_the_config_is_a_gap(tmp_path):
    with pytest.raises(ExpertGapError, match=f"4 of {HUGE} experts: 4-{HUGE - 1} missing"):
        layout_of(tmp_path, MOE_CONFIG | {"num_local_experts": HUGE}, moe_tensors())


@pytest.mark.timeout(20)
def test_impossible_expert_number_in_a_name_is_a_gap(tmp_path):
    config = {key: value for key, value in MOE_CONFIG.items() if key != "num_local_experts"}
    tensors = moe_tensors()
    for name in ("w1", "w2", "w3"):
        block = "model.layers.0.block_sparse_moe.experts"
        shape = tensors[f"{block}.0.{name}.weight"]
        tensors[f"{block}.99999999.{name}.weight"] = shape
    with pytest.raises(ExpertGapError, match=r"4-99999998 missing, first `.*experts\.4\."):
        layout_of(tmp_path, config, tensors)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("count", [HUGE, 0])
def test_fused_tensor_without_bytes_claims_no_experts(count, tmp_path):
    block = "model.layers.0.mlp.experts"
    tensors = {
        f"{block}.gate_up_proj": ("F32", (count, 0, 0)),
        f"{block}.down_proj": ("F32", (count, 0, 0)),
    }
    with pytest.raises(ExpertShapeError, match=f"would hold {count} experts"):
        layout_of(tmp_path, {"model_type": "newcomer"}, tensors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("routed_scaling_factor", "2.5x"),
        ("routed_scaling_factor", [1, 2]),
        ("norm_topk_prob", "no"),
        ("norm_topk_prob", {}),
    ],
)
def test_routing_value_of_the_wrong_type_is_refused_and_named(key, value, tmp_path):
    with pytest.raises(ConfigValueError, match=f"config {key} = "):
        layout_of(tmp_path, DEEPSEEK | {key: value}, deepseek_tensors())


def test_infinite_scale_is_refused(tmp_path):
    config = json.dumps(DEEPSEEK)[:-1] + ', "routed_scaling_factor": 1e999}'
    with pytest.raises(ConfigValueError, match="routed_scaling_factor = inf: a finite number"):
        layout_of(tmp_path, config, deepseek_tensors())


@pytest.mark.parametrize(
    "odd",
    [
        {"moe_layer_freq": {"a": 1}, "mlp_layer_types": [["sparse"]]},
        {"swiglu_limit": float("inf"), "hidden_act": {"a": 1}},
        {"vision_config": {"patch_size": 14, "image_size": 10**400}, "downsample_ratio": 1e-320},
        {"mm_tokens_per_image": 10**400, "vision_config": {"patch_size": 14, "image_size": 9}},
        {"quantization_config": {"bits": -4}},
    ],
)
def test_odd_values_give_a_layout_or_a_typed_error_and_sound_json(odd, tmp_path):
    tensors = deepseek_tensors() | {"vision_tower.layers.0.weight": ("F32", (2, 2))}
    tensors["model.layers.0.self_attn.q_proj.weight_packed"] = ("I32", (2, 2))
    try:
        layout = layout_of(tmp_path, DEEPSEEK | odd, tensors)
    except InputError:
        return
    json.dumps(layout_document(layout), allow_nan=False)
    assert layout.parameters.total > 0


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "\ud800"])
def test_texts_of_the_config_reach_the_terminal_without_control_characters(text, tmp_path, capsys):
    config = DEEPSEEK | {"architectures": [f"A{text}"], "model_type": f"m{text}"}
    write_model(
        tmp_path, {"model.safetensors": tensor_shard(deepseek_tensors())}, config=json.dumps(config)
    )
    inspect(str(tmp_path))
    shown = capsys.readouterr().out
    assert text not in shown
    assert all(line.isprintable() for line in shown.splitlines())


def test_tree_of_a_name_with_many_components(tmp_path, capsys):
    tensors = {".".join("a" * 500): ("F32", (1,)), ".".join("a" * 400): ("F32", (1,))}
    write_model(tmp_path, {"model.safetensors": tensor_shard(tensors)})
    inspect(str(tmp_path), tree=True)
    assert "F32 [1]" in capsys.readouterr().out


def test_gaps_are_what_is_missing():
    assert format_gaps([], 3) == "0-2"
    assert format_gaps([0, 2, 3, 6, 9], 8) == "1,4-5,7"
    assert format_gaps([2, 1, 0, 0], 3) == ""
