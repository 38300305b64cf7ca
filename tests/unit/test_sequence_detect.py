"""What sequence parallelism finds in a model, and what it refuses by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from epctl.errors import InputError, LayoutError
from epctl.runtime.mesh import validate_sequence_parallel
from epctl.runtime.sequence.attention import DECODER_ATTENTION
from epctl.runtime.sequence.detect import find_parts
from epctl.runtime.sequence.group import SequenceGroup
from epctl.runtime.sequence.parallel import parallelize

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from sequence_models import CONFIGS, PACKED, TILES, batch, build

FORMS = {
    "llava_next": "images",
    "llava_onevision": "images",
    "mistral3": "images",
    "pixtral": "images",
    "idefics3": "batches",
    "smolvlm": "batches",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_are_found_without_class_names(name: str) -> None:
    parts = find_parts(build(name))
    assert len(parts.decoder_attentions) == 3
    form = FORMS.get(name) or ("packed" if name in PACKED else "tiles" if name in TILES else None)
    assert (parts.encoder.form if parts.encoder else None) == form
    if parts.encoder is not None:
        assert len(parts.encoder.attentions) == len(parts.encoder.blocks) >= 3
        assert parts.takes_encoder_outputs


def tiny(kind: str) -> Any:
    import transformers as t

    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "head_dim": 16,
        "pad_token_id": None,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    if kind == "gemma3":
        config = t.Gemma3Config(text_config=text, vision_config=vision)
        return t.AutoModelForImageTextToText.from_config(config)
    if kind == "paligemma":
        inner = {"model_type": "gemma", **text}
        config = t.PaliGemmaConfig(text_config=inner, vision_config=vision)
        return t.AutoModelForImageTextToText.from_config(config)
    if kind == "qwen3_5_text":
        linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
        return t.AutoModelForCausalLM.from_config(t.Qwen3_5TextConfig(**text, **linear))
    if kind == "gpt_oss":
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
        return t.AutoModelForCausalLM.from_config(t.GptOssConfig(**text, **experts))
    if kind == "mamba":
        small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 8}
        return t.AutoModelForCausalLM.from_config(t.MambaConfig(**small))
    assert kind == "gemma2"
    return t.AutoModelForCausalLM.from_config(t.Gemma2Config(**text))


REASONS = {
    "gemma3": "image blocks attend in both directions",
    "paligemma": "image blocks attend in both directions",
    "qwen3_5_text": "`linear_attention`: its recurrent state",
    "gpt_oss": "attention sinks",
    "mamba": "`linear_attention`: its recurrent state",
    "gemma2": "`attn_logit_softcapping`",
}


@pytest.mark.parametrize("kind", REASONS)
def test_unsafe_models_are_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(LayoutError) as refused:
        find_parts(tiny(kind))
    assert REASONS[kind] in str(refused.value)
    assert f"`{kind}`" in str(refused.value)


@pytest.mark.parametrize("name", ["llama", "llava", "qwen3_vl"])
def test_generation_and_removal_leave_the_model_as_it_was(name: str) -> None:
    model = build(name).eval()
    inputs = batch(name, 3, images=2)
    inputs.pop("labels")
    with torch.no_grad():
        expected = model(**inputs, use_cache=True).logits
        before = model.get_decoder().config._attn_implementation
        parallel = parallelize(model, SequenceGroup())
        assert model.get_decoder().config._attn_implementation == DECODER_ATTENTION
        torch.testing.assert_close(model(**inputs, use_cache=True).logits, expected)
        torch.testing.assert_close(model(**inputs).logits, expected)
        parallel.remove()
        assert model.get_decoder().config._attn_implementation == before
        torch.testing.assert_close(model(**inputs).logits, expected)
    assert "get_image_features" not in model.__dict__


def test_the_saved_config_does_not_name_our_attention(tmp_path: Path) -> None:
    model = build("llama")
    parallelize(model, SequenceGroup())
    model.config.save_pretrained(tmp_path)
    assert "epctl" not in (tmp_path / "config.json").read_text()


def test_short_sequences_and_odd_sizes_are_refused_with_numbers() -> None:
    model = build("llama")
    parallelize(model, SequenceGroup(rank=0, size=4))
    with pytest.raises(InputError, match="3 tokens cannot be cut for 4 ranks"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), labels=torch.ones(1, 3).long())
    with pytest.raises(ValueError, match="size 3 does not divide the 4 ranks"):
        validate_sequence_parallel(3, 4)


def test_a_full_mask_is_refused() -> None:
    model = build("llama")
    parallelize(model, SequenceGroup())
    with pytest.raises(InputError, match="padding mask"):
        model(input_ids=torch.ones(1, 8).long(), attention_mask=torch.ones(1, 1, 8, 8))


def test_towers_that_need_their_whole_grid_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions from a grid of its own: sharded rows would silently get those of other rows."""
    model: Any = build("glm4v")
    embeddings = model.model.visual.embeddings

    def forward(self: Any, rows: Any, grid_thw: Any) -> Any:
        return rows

    monkeypatch.setattr(type(embeddings), "forward", forward)
    with pytest.raises(LayoutError, match="Embeddings needs the grid of all images"):
        find_parts(model)


def test_an_unknown_way_to_use_the_grid_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("qwen2_vl")

    def forward(self: Any, rows: Any) -> Any:
        return rows.get_vision_spiral()

    monkeypatch.setattr(type(model.model.visual.merger), "forward", forward)
    with pytest.raises(LayoutError, match="`get_vision_spiral`, which is not known"):
        find_parts(model)


def test_a_clip_for_a_tower_that_averages_frames_is_refused() -> None:
    """transformers' own features of such a clip do not come out either (5.23)."""
    model: Any = build("kimi_k25")
    clip = {"pixel_values_videos": torch.randn(32, 3, 4, 4)}
    clip["video_grid_thw"] = torch.tensor([[2, 4, 4]])
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        model.get_video_features(*clip.values())
    parallelize(model, SequenceGroup())
    ids = torch.tensor([[3, 4, *([91] * 8), 5]])
    with pytest.raises(InputError, match="a clip of 2 frames is given; this tower averages"):
        model(input_ids=ids, labels=ids, **clip)


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "mistral3"])
def test_equal_rows_are_refused_where_a_tower_sees_whole_images(name: str) -> None:
    with pytest.raises(LayoutError, match="`ulysses` cuts packed rows or tiles"):
        parallelize(build(name), SequenceGroup(), vision="ulysses")


def test_placeholders_that_do_not_fit_their_images_are_refused_with_numbers() -> None:
    for name, tokens in (("qwen2_vl", 37), ("mistral3", 40), ("llava", 20)):
        model = build(name)
        inputs = batch(name, 3)
        inputs["input_ids"][inputs["input_ids"] == 90] = 4
        parallelize(model, SequenceGroup())
        with pytest.raises(InputError, match=rf"make {tokens} visual tokens, .* have 0"):
            model(**inputs)


UNSAFE = {
    "minimax_m3_vl": "frames attend to each other in",
    "ernie4_5_vl_moe": "needs the grid of all images",
    "lfm2_vl": "its images come with `spatial_shapes`",
    "mllama": "has no `get_image_features`",
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_towers_of_other_kinds_are_refused_by_what_they_do(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(kind)
    text = config.get_text_config()
    text.num_hidden_layers = 2
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None):
            setattr(
                text,
                name,
                ["full_attention"] * 2 if name == "layer_types" else getattr(text, name)[:2],
            )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(LayoutError) as refused:
        find_parts(model)
    assert UNSAFE[kind] in str(refused.value)


def test_what_comes_with_tiles_and_is_not_known_is_refused() -> None:
    from epctl.runtime.sequence.units import units_of

    parts = find_parts(build("internvl"))
    with pytest.raises(InputError, match=r"tiles come with `pixel_mask` of shape \(2, 16\)"):
        units_of(parts, torch.ones(2, 3, 16, 16), {"pixel_mask": torch.ones(2, 16)}, "image")
    parts = find_parts(build("idefics3"))
    with pytest.raises(InputError, match=r"images of shape \(2, 3, 16, 16\) are given with a mask"):
        units_of(parts, torch.ones(2, 3, 16, 16), {}, "image")
