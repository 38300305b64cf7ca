"""The bundled catalog: every total is checked against what was published."""

import json

import pytest

from epctl.layout.catalog import catalog_files, catalog_source, find_entry, read_entry
from epctl.layout.detect import detect

IDS = sorted(catalog_files())
# Exact counts that somebody printed from the published files.
EXACT_FILE_COUNTS = {
    # parameters + fp8 scales + correction biases, as the hub shows for the checkpoint
    "MiniMaxAI/MiniMax-M2": 228_703_644_928,
    # parameters + correction biases
    "moonshotai/Kimi-VL-A3B-Instruct": 16_407_656_048,
}


def test_catalog_holds_at_least_25_models():
    assert len(IDS) >= 25


@pytest.mark.parametrize("model_id", IDS)
def test_total_equals_the_computed_one_and_is_near_the_published(model_id):
    entry = read_entry(catalog_files()[model_id])
    counts = detect(catalog_source(model_id)).parameters
    assert counts.total == entry["computed_total_parameters"]
    deviation = counts.total / entry["published"]["total_parameters"] - 1
    assert abs(deviation) <= 0.01 or entry["flag"], f"{deviation:+.2%} and no flag explains it"
    assert abs(deviation) < 0.1


@pytest.mark.parametrize("model_id", IDS)
def test_catalog_layout_is_complete(model_id):
    source = catalog_source(model_id)
    layout = detect(source)
    assert (layout.source, layout.revision) == ("catalog", None)
    assert layout.family is not None
    if layout.moe:
        assert not layout.moe.router.missing_keys
        assert layout.ep_sizes[-1] == layout.moe.num_experts
        assert all(name in source.tensors for name in layout.moe.router_tensors(
            layout.moe.layers[0]).values())  # fmt: skip
    else:
        assert layout.vision is not None


@pytest.mark.parametrize("model_id", EXACT_FILE_COUNTS)
def test_count_of_the_published_files_is_exact(model_id):
    counts = detect(catalog_source(model_id)).parameters
    assert counts.total + counts.scales + counts.buffers == EXACT_FILE_COUNTS[model_id]


def test_moonlight_inventory():
    source = catalog_source("moonshotai/Moonlight-16B-A3B")
    layout = detect(source)
    moe, router = layout.moe, layout.moe.router
    assert layout.num_tensors == 5_344
    assert len(layout.dropped) == 27
    assert "27 stale inv_freq tensors will be dropped" in layout.warnings
    assert layout.parameters.total == 15_960_108_544
    assert layout.parameters.routed_experts == 26 * 64 * 3 * 2048 * 1408
    assert layout.parameters.active_per_token == 2_914_774_528
    assert (moe.layers, moe.dense_layers) == (tuple(range(1, 27)), (0,))
    assert (moe.num_experts, moe.top_k, moe.expert_intermediate_size) == (64, 6, 1408)
    assert (moe.shared_experts.num_experts, moe.shared_experts.intermediate_size) == (2, 2816)
    assert (router.score_func, router.normalize, router.scale) == ("sigmoid", True, 2.446)
    assert (router.num_groups, router.top_groups, router.float32) == (1, 1, True)
    assert layout.reasons["moe.router.scale"] == "config routed_scaling_factor = 2.446"
    assert layout.ep_sizes == (1, 2, 4, 8, 16, 32, 64)
    # 26 x (192 expert + 3 shared + gate + bias), dense MLP, 27 x 7 attention and norms, 27 stale
    assert 26 * 197 + 3 + 27 * 7 + 27 + 3 == 5_344


def test_every_moonlight_expert_tensor_is_named():
    source = catalog_source("moonshotai/Moonlight-16B-A3B")
    moe = detect(source).moe
    names = {
        moe.expert_tensor(layer, expert, projection).name
        for layer in moe.layers
        for expert in range(moe.num_experts)
        for projection in moe.storage.projections
    }
    assert len(names) == 26 * 192
    assert names == {name for name in source.tensors if ".mlp.experts." in name}


def test_deepseek_v3_is_quantised_in_blocks():
    layout = detect(catalog_source("deepseek-ai/DeepSeek-V3"))
    assert layout.moe.storage.quantization == "fp8_block"
    assert layout.moe.storage.block_size == (128, 128)
    assert (layout.moe.router.num_groups, layout.moe.router.top_groups) == (8, 4)


def test_gpt_oss_is_mxfp4_and_interleaved():
    storage = detect(catalog_source("openai/gpt-oss-20b")).moe.storage
    assert (storage.quantization, storage.interleaved, storage.transposed) == ("mxfp4", True, False)
    assert storage.names["gate_up"] == "mlp.experts.gate_up_proj_blocks"
    assert set(storage.biases) == set(storage.scales) == {"gate_up", "down"}


def test_published_qwen3_vl_experts_are_transposed():
    storage = detect(catalog_source("Qwen/Qwen3-VL-30B-A3B-Instruct")).moe.storage
    assert (storage.kind, storage.transposed) == ("fused", True)


def test_alias_is_answered_by_its_sibling_with_a_note():
    source = catalog_source("deepseek-ai/DeepSeek-V3-Base")
    assert source.id == "deepseek-ai/DeepSeek-V3-Base"
    assert "`deepseek-ai/DeepSeek-V3`" in source.notes[0]


def test_upper_and_lower_case_are_the_same_as_on_the_hub():
    source = catalog_source("moonshotai/moonlight-16b-a3b")
    assert len(source.tensors) == 5344
    assert source.notes == ()


def test_unknown_id_is_not_in_the_catalog():
    assert find_entry("org/absent") is None
    assert catalog_source("org/absent") is None


def test_catalog_files_hold_no_reading_aids_that_could_run():
    for file in catalog_files().values():
        text = json.dumps(read_entry(file))
        assert "__" not in text
        assert "trust_remote_code" not in text
