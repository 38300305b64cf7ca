"""Vision layouts, and the legal sequence-parallel sizes with a reason for each refusal."""

import dataclasses

import pytest
from stored import namings, source

from epctl.config import resolve_config
from epctl.errors import ConfigError, LayoutError
from epctl.launch.model_reference import require_trainable
from epctl.launch.planner_rules import model_limits, require_legal
from epctl.layout.catalog import catalog_source
from epctl.layout.detect import detect

# model_type: tower, projector (below an optional `model.`), layers, merge size
TOWERS = {
    "llava": ("vision_tower.", "multi_modal_projector.", 4, None),
    "llava_next": ("vision_tower.", "multi_modal_projector.", 4, None),
    "llava_onevision": ("vision_tower.", "multi_modal_projector.", 4, None),
    "internvl": ("vision_tower.", "multi_modal_projector.", 4, 2),
    "qwen2_vl": ("visual.", "visual.merger.", 4, 2),
    "qwen2_5_vl": ("visual.", "visual.merger.", 8, 2),
    "qwen3_vl": ("visual.", "visual.merger.", 4, 2),
    "qwen3_vl_moe": ("visual.", "visual.merger.", 4, 2),
    "glm4v": ("visual.", "visual.merger.", 4, 2),
    "glm4v_moe": ("visual.", "visual.merger.", 4, 2),
    "gemma3": ("vision_tower.", "multi_modal_projector.", 4, None),
    "paligemma": ("vision_tower.", "multi_modal_projector.", 4, None),
    "idefics3": ("vision_model.", "connector.", 4, 2),
    "smolvlm": ("vision_model.", "connector.", 4, 2),
    "mistral3": ("vision_tower.", "multi_modal_projector.", 4, 2),
    "llama4": ("vision_model.", "multi_modal_projector.", 4, 2),
    "aria": ("vision_tower.", "multi_modal_projector.", 4, None),
}


def published(name):
    """Returns a fixture in its published naming."""
    return source(name, namings(name)[-1])


@pytest.mark.parametrize("name", TOWERS)
def test_tower_projector_and_sizes(name):
    tower, projector, num_layers, _ = TOWERS[name]
    given = published(name)
    vision = detect(given).vision
    prefixes = (vision.tower_prefix, vision.projector_prefix)
    assert tuple(p.removeprefix("model.") for p in prefixes) == (tower, projector)
    assert vision.attention.num_layers == num_layers
    section = given.config["vision_config"]
    heads = section.get("num_heads", section.get("num_attention_heads"))
    assert vision.attention.num_heads == heads
    assert section["patch_size"] in (vision.patch_size, [vision.patch_size] * 2)
    assert vision.placeholder
    token = next(v for k, v in given.config.items() if k in ("image_token_id", "image_token_index"))
    assert vision.image_token_id == token
    assert any(n.startswith(vision.decoder_prefix) and "layers.0." in n for n in given.tensors)


@pytest.mark.parametrize("name", [name for name, row in TOWERS.items() if row[3]])
def test_merge_size(name):
    assert detect(published(name)).vision.merge_size == TOWERS[name][3]


def test_windowed_layers_are_those_outside_the_full_ones():
    layout = detect(catalog_source("Qwen/Qwen2.5-VL-7B-Instruct"))
    full = {7, 15, 23, 31}
    assert set(layout.vision.windowed_layers) == set(range(32)) - full
    assert layout.vision.window_size == 112


@pytest.mark.parametrize("name", ["vit", "siglip_vision_model", "dinov2", "clip_vision_model"])
def test_plain_tower_has_no_decoder(name):
    layout = detect(published(name))
    vision = layout.vision
    assert (vision.tower_prefix, vision.projector_prefix, vision.decoder_prefix) == ("", None, None)
    assert (vision.attention.num_layers, vision.attention.num_heads) == (4, 12)
    assert layout.decoder is None
    assert layout.moe is None
    assert layout.sp_sizes == (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize(
    ("model_id", "heads", "size", "words"),
    [
        ("Qwen/Qwen2-VL-7B-Instruct", (28, 4), 4, "7 of 28 query heads a rank in the decoder"),
        ("Qwen/Qwen2-VL-7B-Instruct", (28, 4), 8, "28 query heads of the decoder: 3 or 4 a rank"),
        ("Qwen/Qwen3-VL-8B-Instruct", (32, 8), 16, "go to each rank that uses them (8)"),
        ("moonshotai/Moonlight-16B-A3B", (16, 16), 32, "keys and values are gathered"),
    ],
)
def test_sequence_parallel_sizes_say_how_heads_are_shared(model_id, heads, size, words):
    layout = detect(catalog_source(model_id))
    assert (layout.decoder.num_heads, layout.decoder.num_kv_heads) == heads
    assert layout.sp_sizes == (1, 2, 4, 8, 16, 32)
    reasons = {entry.size: entry.reason for entry in layout.sequence_parallel}
    assert words in reasons[size]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma3", "both directions"),
        ("paligemma", "both directions"),
        ("qwen3_next", "recurrence"),
        ("jamba", "recurrence"),
    ],
)
def test_sequence_parallel_is_refused_with_the_reason(name, words):
    layout = detect(published(name))
    assert layout.sp_sizes == (1,)
    assert all(words in e.reason for e in layout.sequence_parallel if e.size > 1)


def test_key_value_heads_that_neither_divide_nor_repeat_are_shared_too():
    from epctl.layout.model import AttentionLayout
    from epctl.layout.parallel import sequence_sizes

    verdicts = {e.size: e for e in sequence_sizes(AttentionLayout(2, 64, 24, 6), None, [])}
    assert verdicts[2].legal
    assert verdicts[4].legal
    assert "6 of 24 query heads a rank" in verdicts[4].reason


def test_width_of_qwen2_vl_is_the_towers_not_its_outputs():
    vision = detect(catalog_source("Qwen/Qwen2-VL-7B-Instruct")).vision
    assert vision.attention.hidden_size == 1280


def test_text_only_model_has_no_vision():
    assert detect(published("mixtral")).vision is None


@pytest.mark.parametrize(
    "name",
    ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava", "internvl", "llava_next",
     "llava_onevision", "idefics3"],
)  # fmt: skip
def test_models_of_patches_and_of_tiles_train(name):
    require_trainable(detect(source(name, namings(name)[-1])))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3", "image tokens attend to each other in both directions"),
        ("siglip_vision_model", "without a decoder"),
    ],
)
def test_other_images_are_refused_by_their_headers(name, reason):
    with pytest.raises(LayoutError, match=reason):
        require_trainable(detect(source(name, namings(name)[-1])))


@pytest.mark.parametrize(("name", "refused"), [("internvl", True), ("qwen2_vl", False)])
def test_images_of_tiles_are_not_shared_among_samples(name, refused):
    """Before a rank starts, as the library would refuse it on each."""
    limits = model_limits(detect(published(name)))
    config = resolve_config(flags={"parallel.share_images": True, "parallel.sp": 2}).config
    if refused:
        with pytest.raises(ConfigError, match="takes whole images or tiles"):
            require_legal(config, 4, "cpu", limits)
    else:
        require_legal(config, 4, "cpu", limits)


def test_a_config_without_an_image_token_is_refused():
    """As InternVL's remote-code form: the token is the tokenizer's secret there."""
    given = published("internvl")
    config = {key: value for key, value in given.config.items() if key != "image_token_id"}
    with pytest.raises(LayoutError, match="states no token that stands for images"):
        require_trainable(detect(dataclasses.replace(given, config=config)))
