"""The blocked loss stands in for transformers' own: same loss, same gradients, same refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from parity_ranks import tiny_config
from torch import nn

from epctl.runtime import chunked_loss

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def tiny_model(family: str, **changes: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if family == "DeepseekV3":
        config = tiny_config(**changes)
    else:
        config = getattr(transformers, f"{family}Config")(**SMALL, **changes)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.train()


def batch(**more: Any) -> dict[str, Any]:
    ids = torch.randint(64, (3, 21), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels, "use_cache": False, **more}


def loss_and_gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients


MODELS = [
    ("DeepseekV3", {}),
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True}),
    ("GraniteMoe", {"logits_scaling": 8.0, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("Cohere", {"logit_scale": 0.0625}),
]


@pytest.mark.parametrize(("family", "changes"), MODELS)
@pytest.mark.parametrize("items", [None, 17.0])
def test_equals_transformers(family: str, changes: dict[str, Any], items: float | None) -> None:
    theirs = tiny_model(family, **changes)
    ours = copy.deepcopy(theirs)
    assert chunked_loss.limit_logits(ours, max_logits_bytes=4 * 63 * 10) is None  # ten words
    inputs = batch() if items is None else batch(num_items_in_batch=torch.tensor(items))
    expected, found = loss_and_gradients(theirs, inputs), loss_and_gradients(ours, inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=1e-7, msg=name)


def test_shifted_labels_are_taken_as_they_are() -> None:
    theirs = tiny_model("Llama")
    ours = copy.deepcopy(theirs)
    chunked_loss.limit_logits(ours, max_logits_bytes=4 * 63 * 10)
    inputs = batch()
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    inputs |= {"shift_labels": shifted}
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss)


@pytest.mark.parametrize("over", [False, True])
def test_logits_exist_only_under_the_limit(over: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        chunked_loss,
        "chunked_cross_entropy",
        lambda x_TD, *_, num_rows, **options: seen.append(num_rows) or x_TD.sum(),
    )
    model = tiny_model("Llama")
    whole = 4 * 63 * 64
    chunked_loss.limit_logits(model, whole - over)
    result = model(**batch())
    assert ("logits" in result) is not over
    assert seen == ([32] if over else [])  # of 63 tokens


def test_no_labels_give_logits() -> None:
    model = tiny_model("Llama")
    expected = model(input_ids=batch()["input_ids"]).logits
    chunked_loss.limit_logits(model, 1)
    assert torch.equal(model(input_ids=batch()["input_ids"]).logits, expected)


def test_bent_logits_are_refused_with_the_reason() -> None:
    model = tiny_model("Gemma2", head_dim=16, final_logit_softcapping=30.0)
    reason = chunked_loss.limit_logits(model, 1)
    assert reason is not None
    assert "final_logit_softcapping" in reason
    assert "logits" in model(**batch())
