"""What is refused is refused with its reason, before anything starts or while it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import SIZES, tiny_config, write_tiny_model

from epctl.errors import LayoutError
from epctl.launch.model_reference import open_reference
from epctl.runtime import moe_blocks
from epctl.runtime.build import meta_model
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe import Router
from epctl.runtime.native_config import cut_depth, native_config

ONE_RANK = Mesh(0, 1, 1, 0)


@pytest.mark.parametrize(
    ("model_type", "values", "reason"),
    [
        ("llama", {}, "no routed experts"),
        (
            "gemma4_text",
            {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2,
             "moe_intermediate_size": 24, "vocab_size_per_layer_input": 64},
            "normalises and scales its input",
        ),
    ],
)  # fmt: skip
def test_a_folder_is_refused_before_anything_starts(
    tmp_path: Path, model_type: str, values: dict[str, Any], reason: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **SIZES, **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(LayoutError, match=reason):
        open_reference(str(tmp_path))


def test_another_family_is_accepted(tmp_path: Path) -> None:
    _, layout = open_reference(str(write_tiny_model("mixtral", tmp_path)))
    assert layout.model_type == "mixtral"


def test_types_without_a_class_are_refused() -> None:
    with pytest.raises(LayoutError, match="has no model_type `newcomer`"):
        native_config({"model_type": "newcomer"})
    with pytest.raises(LayoutError, match="no causal language model of type `siglip_vision_model`"):
        native_config({"model_type": "siglip_vision_model"})


def test_experts_whose_blocks_are_not_found_are_not_trained_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a block to swap every rank would train all experts, and epctl would not notice."""
    config = tiny_config("mixtral")
    model = meta_model(config, torch.float32)
    monkeypatch.setattr(moe_blocks, "moe_blocks", lambda model: iter(()))
    with pytest.raises(LayoutError, match=r"layers \[0, 1, 2\] have experts"):
        moe_blocks.swap_moe_blocks(model, config, ONE_RANK, torch.float32)


@pytest.mark.parametrize("training", [True, False])
def test_phimoe_routes_as_transformers_does_and_counts(training: bool) -> None:
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

    config = tiny_config("phimoe")
    config.input_jitter_noise, config.router_jitter_noise = 0.2, 0.3
    model = meta_model(config, torch.float32)
    moe_blocks.swap_moe_blocks(model, config, ONE_RANK, torch.float32)
    ours, theirs = model.get_submodule("model.layers.0.mlp.router"), PhimoeTopKRouter(config)
    assert not isinstance(ours, Router)
    assert isinstance(ours, PhimoeTopKRouter)
    ours.to_empty(device="cpu")
    ours.tokens_per_expert.zero_()
    ours.load_state_dict({"weight": theirs.weight.data.normal_()})
    results = []
    tokens = torch.randn(50, 32)
    for router in (ours, theirs):
        torch.manual_seed(5)
        x = tokens.clone().requires_grad_()
        jittered = x * 1.0
        outputs = router.train(training)(jittered)
        outputs[1].square().sum().backward()
        results.append((*outputs, jittered, x.grad, router.weight.grad))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert int(ours.tokens_per_expert.sum()) == (100 if training else 0)


def test_cutting_the_depth_cuts_lists_by_layer() -> None:
    config = tiny_config("gpt_oss")
    assert cut_depth(config, 2) == 2
    assert len(config.layer_types) == 2
