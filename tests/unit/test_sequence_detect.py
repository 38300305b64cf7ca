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


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_are_found_without_class_names(name: str) -> None:
    parts = find_parts(build(name))
    assert len(parts.decoder_attentions) == 3
    form = "packed" if name in PACKED else "tiles" if name in TILES else None
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
