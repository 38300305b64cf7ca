"""Sequence parallelism changes where rows live, never what is computed (float32, gloo).

Loss to 1e-5 and every parameter's gradient to 1e-4 relative to the unsharded model: twenty tiny
models with their quirks, cut for 1, 2 and 4 ranks, with recomputation, ZeRO stages and experts.
One launch of four ranks runs the pairwise choice; the full product is in test_sequence_full.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from launch import run_ranks

from epctl.bench.multimodal_sp_scaling import Attention, attention_bytes

# One launch runs every case: a minute on two quiet cores, several on a busy machine.
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1000)]

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def case(model: str, sp: int, **options: Any) -> dict[str, Any]:
    words = [f"{key}={value}" for key, value in options.items()]
    return {"name": "-".join([model, f"sp{sp}", *words]), "model": model, "sp": sp, **options}


CASES = [
    case("llama", 1, kind="padded"),
    case("llama", 4, kind="left", checkpointing="kept"),
    case("llama", 2, kind="packed", zero=3),
    case("qwen3", 2, kind="padded", zero=1),
    case("qwen3", 4, kind="packed", given_count=False),
    case("qwen2_window", 4, kind="packed", checkpointing=True),
    case("qwen2_window", 2, kind="left"),
    case("six_heads", 4, kind="packed", zero=2),
    case("deepseek_v3", 4, kind="padded", zero=0),
    case("deepseek_v3", 2, kind="packed", zero=3, ep=4, checkpointing=True),
    case("llava", 4, kind="padded", images=2, zero=3, checkpointing=True),
    case("llava", 2, images=[5, 0], encoder_outputs=False),
    case("llava", 2, vision="ulysses", images=3),
    case("internvl", 2, kind="left", zero=1, checkpointing=True),
    case("internvl", 4, images=2, given_count=False),
    case("internvl", 4, vision="ulysses", images=3, kind="padded"),
    case("qwen2_vl", 4, kind="video", checkpointing=True),
    case("qwen2_vl", 2, kind="padded", images=2, vision="units", zero=2),
    case("qwen2_5_vl", 1, kind="padded"),
    case("qwen2_5_vl", 2, kind="packed", checkpointing=True),
    case("qwen2_5_vl", 4, kind="padded", images=2, vision="units", zero=3, checkpointing=True),
    case("qwen2_5_vl", 4, kind="video", encoder_outputs=False),
    case("qwen3_vl", 4, kind="left", zero=2, checkpointing=True),
    case("qwen3_vl", 2, images=[0, 3], zero=3),
    case("qwen3_vl", 2, kind="video", vision="replicate"),
    case("qwen3_vl", 4, kind="padded", images=2, vision="units"),
    case("qwen3_vl_moe", 2, kind="padded", ep=2, zero=3, checkpointing="kept"),
    case("qwen3_vl_moe", 2, kind="video", ep=2, zero=1),
    case("qwen3_vl_moe", 4, images=[5], ep=2, zero=0),
    case("llava_next", 1, kind="padded"),
    case("llava_next", 2, kind="left", zero=1, checkpointing=True),
    case("llava_next", 4, images=[3], zero=2),
    case("llava_next", 4, images=2, vision="units", encoder_outputs=False),
    case("llava_next", 2, images=[0, 4], zero=3),
    case("llava_onevision", 1, kind="video"),
    case("llava_onevision", 2, kind="together", checkpointing=True),
    case("llava_onevision", 4, kind="together", images=3, zero=1),
    case("llava_onevision", 4, kind="video", images=2),
    case("llava_onevision", 2, images=[3, 0], kinds=["video", "plain"], zero=3),
    case("idefics3", 1, kind="padded"),
    case("idefics3", 2, kind="left", zero=2, checkpointing=True),
    case("idefics3", 4, kind="padded", images=3),
    case("smolvlm", 2, images=[5, 0], zero=3),
    case("smolvlm", 4, kind="packed", images=2, encoder_outputs=False, checkpointing=True),
    case("mistral3", 1, kind="left"),
    case("mistral3", 2, kind="padded", zero=3, checkpointing=True),
    case("mistral3", 4, images=2, given_count=False),
    case("pixtral", 2, images=[0, 5]),
    case("pixtral", 4, kind="packed", checkpointing=True),
    case("pixtral", 2, kind="padded", vision="replicate"),
    case("glm4v", 1, kind="video"),
    case("glm4v", 2, kind="video", zero=3, checkpointing=True),
    case("glm4v", 4, kind="padded", vision="ulysses"),
    case("glm4v", 2, images=[0, 3], encoder_outputs=False),
    case("glm4v_moe", 4, kind="left", ep=2, zero=3),
    case("glm4v_moe", 2, kind="video", vision="replicate"),
    case("kimi_k25", 1, kind="padded"),
    case("kimi_k25", 2, images=[5, 0], ep=2, zero=3, checkpointing=True),
    case("kimi_k25", 4, kind="packed", images=2, vision="ulysses"),
    case("kimi_k25", 4, kind="padded", images=2),
    case("qwen2_5_vl", 1, images=[1, 5, 0, 2], balance=True, zero=3),
    case("qwen2_5_vl", 2, images=[0, 5], kinds=["video", "padded"], balance=True),
    case("qwen3_vl", 2, images=[5, 0], balance=True, checkpointing=True),
    case("qwen3_vl", 1, images=[0, 4, 1, 0], balance=True, vision="ulysses"),
    case("glm4v", 2, images=[1, 4], balance=True, vision="units"),
    case("kimi_k25", 2, images=[4, 1], balance=True, zero=1),
    case("llama", 2, kind="padded", logits_bytes=600),
    case("deepseek_v3", 2, kind="packed", overlap=True, checkpointing="kept"),
    case(
        "llama",
        2,
        kind="left",
        overlap=True,
        zero=3,
        changes={"num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    case("qwen2_5_vl", 2, kind="video", overlap=True, checkpointing="kept"),
    case("qwen3_vl", 2, images=[0, 3], vision="ulysses", overlap=True),
    case("internvl", 2, vision="ulysses", images=1, kind="padded", overlap=True),
    case("qwen2_5_vl", 4, kind="padded", images=3, logits_bytes=600, checkpointing=True),
    case("mistral3", 2, logits_bytes=600),
]
# What one rank makes besides: a step of a quarter of the tokens, and for comparison one of all.
SPIED = case("qwen2_5_vl", 4, kind="padded", spy="sharded", logits_bytes=600)
WHOLE = case("qwen2_5_vl", 1, kind="padded", spy="unsharded")
for spied in (SPIED, WHOLE):
    spied["changes"] = {"vocab_size": 101}  # the size of nothing else
# As deep as the real tower: four layers of 32 attend to whole images.
DEEP = {"vision_changes": {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]}}
DEEP_CASES = {
    mode: case("qwen2_5_vl", 2, vision=mode, changes=DEEP) for mode in ("aligned", "ulysses")
}
CASES += [SPIED, *DEEP_CASES.values()]
MUTATIONS = [
    case("qwen3_vl", 2, mutation="features without gradient"),
    case("llava", 4, mutation="features without gradient"),
    case("mistral3", 2, mutation="features without gradient"),
    case("llava_next", 4, images=[3], mutation="tiles without gradient"),
    case("qwen2_5_vl", 2, mutation="features in the tower's order"),
    case("glm4v", 4, mutation="shapes of all images"),
    case("qwen3_vl", 1, images=[0, 4, 1, 0], balance=True, mutation="features without gradient"),
    case("llama", 4, mutation="heads without gradient"),
    case("deepseek_v3", 2, overlap=True, mutation="heads without gradient"),
    case("llama", 2, mutation="labels cut before they are shifted"),
    case("llama", 2, mutation="positions not cut"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sequence")
    return run_ranks(
        "sequence_ranks", 4, folder, json.dumps([*CASES, *MUTATIONS, WHOLE]), timeout=900
    )


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_gradients_are_those_of_the_unsharded_model(
    results: list[dict[str, Any]], case: dict[str, Any]
) -> None:
    for rank in results:
        result = rank[case["name"]]
        assert result["loss"] == pytest.approx(result["expected_loss"], abs=LOSS_TOLERANCE)
        assert result["error"] <= GRADIENT_TOLERANCE, result["parameter"]


@pytest.mark.parametrize("case", MUTATIONS, ids=[case["name"] for case in MUTATIONS])
def test_broken_code_is_noticed(results: list[dict[str, Any]], case: dict[str, Any]) -> None:
    """A comparison that passes with a severed gradient or a lost target would prove nothing."""
    assert max(rank[case["name"]]["error"] for rank in results) > 100 * GRADIENT_TOLERANCE


def test_windows_attend_without_communication(results: list[dict[str, Any]]) -> None:
    """Cut at windows, two of the four tower layers exchange heads; twice with recomputation."""
    result = results[0]["qwen2_5_vl-sp2-kind=packed-checkpointing=True"]
    assert (result["level"], result["exchanges"]) == ("window", 4)


def test_whole_images_need_no_exchange(results: list[dict[str, Any]]) -> None:
    """Two images on four ranks: two ranks hold nothing, and nobody talks inside the tower."""
    result = results[0]["qwen3_vl-sp4-kind=padded-images=2-vision=units"]
    assert result["exchanges"] == 0
    assert result["sizes"].count(0) == 2


def test_equal_rows_exchange_in_every_layer(results: list[dict[str, Any]]) -> None:
    result = results[0]["qwen2_vl-sp4-kind=video-checkpointing=True"]
    assert result["exchanges"] == 2 * 3


def test_no_rank_holds_what_is_shared(results: list[dict[str, Any]]) -> None:
    """No mask of tokens by tokens, no whole sequence's embeddings, features, rows or logits."""
    for rank in results:
        assert {name for name, shapes in rank[SPIED["name"]]["held"].items() if shapes} == set()


def test_the_spy_sees_what_an_unsharded_step_makes(results: list[dict[str, Any]]) -> None:
    seen = {name for name, shapes in results[0][WHOLE["name"]]["held"].items() if shapes}
    assert seen == {"masks", "embeddings", "features", "logits", "tower rows"}


def test_images_of_all_samples_are_shared_by_all_ranks(results: list[dict[str, Any]]) -> None:
    """Samples of 1, 5, 0 and 2 images, a rank each: every rank has a share of the rows."""
    result = results[0]["qwen2_5_vl-sp1-images=[1, 5, 0, 2]-balance=True-zero=3"]
    assert len(result["sizes"]) == 4
    assert result["imbalance"] < 1.5 < 4 * max(28, 148, 0, 104) / (28 + 148 + 104)


def test_windows_spare_at_least_five_sixths_of_the_bytes(results: list[dict[str, Any]]) -> None:
    """Features on their way to their owners included; an exchange in every layer is eight times."""
    sent = {
        mode: [rank[case["name"]]["bytes"] for rank in results] for mode, case in DEEP_CASES.items()
    }
    moved = {
        mode: max(parts["tower"] + parts["features"] for parts in ranks)
        for mode, ranks in sent.items()
    }
    assert moved["aligned"] <= moved["ulysses"] / 6
    features = {mode: sum(parts["features"] for parts in ranks) for mode, ranks in sent.items()}
    decoder = Attention(3, 4, 2, (8, 8, 8))
    tower = Attention(32, 4, 4, (8, 8, 8))
    for mode, layers in (("aligned", 4), ("ulysses", 32)):
        rows = results[0][DEEP_CASES[mode]["name"]]["sizes"]
        in_tower = attention_bytes(tower, layers, (0, rows[0], sum(rows)), causal=False, size=4)
        in_decoder = attention_bytes(decoder, 3, (0, 31, 62), causal=True, size=4)
        for rank, parts in enumerate(sent[mode]):
            assert parts["tower"] == in_tower[rank % 2]
            assert parts["decoder"] == in_decoder[rank % 2]
    # A row travels once at most, to one rank, there and its gradient back: two groups of two ranks.
    assert 0 < features["aligned"] <= 2 * 2 * 37 * 32 * 4
