"""Reading by slices, from every storage of the layout, and the settings around it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_moonlight import write_tiny_moonlight

from epctl.config import RunConfig, resolve_config
from epctl.errors import ConfigError, InputError
from epctl.launch.ignored import ignored_settings
from epctl.launch.track import require_tracker, tracked_values
from epctl.layout.detect import detect
from epctl.layout.source import read_folder
from epctl.runtime.build import meta_model
from epctl.runtime.load import CheckpointWeights, leftover_tensors
from epctl.runtime.mesh import Mesh
from epctl.runtime.moe_blocks import swap_moe_blocks
from epctl.runtime.names import hub_tensors
from epctl.runtime.run_settings import num_steps
from epctl.runtime.trainable import select_trainable
from epctl.runtime.training_model import open_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_moonlight(tmp_path_factory.mktemp("moonlight") / "model")


@pytest.fixture(scope="module")
def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {n: t for p in checkpoint.glob("*.safetensors") for n, t in load_file(p).items()}


def weights_of(folder: Path) -> CheckpointWeights:
    source = read_folder(folder)
    return CheckpointWeights(source, detect(source))


def expert_parallel(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model on the meta device with epctl's layers, the experts of rank 0 of 2 in them."""
    config = open_checkpoint("tiny", folder, None).config
    model = meta_model(config, dtype)
    swap_moe_blocks(model, config, Mesh(0, 2, 2, 0), dtype)
    return model


def write_fused(folder: Path, tensors: dict[str, torch.Tensor], checkpoint: Path) -> Path:
    """The same model with all experts of a layer in one tensor, as transformers 5 holds them."""
    folder.mkdir()
    fused: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name)
        if match is None:
            fused[name] = value
        elif match[2] == "0" and match[3] != "up":
            stack = [_expert(tensors, match[1], e, match[3]) for e in range(8)]
            leaf = "gate_up_proj" if match[3] == "gate" else "down_proj"
            fused[f"{match[1]}.{leaf}"] = torch.stack(stack)
    save_file(fused, folder / "model.safetensors")
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    return folder


def _expert(tensors: dict[str, Any], prefix: str, expert: int, projection: str) -> torch.Tensor:
    def read(kind: str) -> torch.Tensor:
        value: torch.Tensor = tensors[f"{prefix}.{expert}.{kind}_proj.weight"]
        return value

    return torch.cat((read("gate"), read("up"))) if projection == "gate" else read("down")


def test_every_tensor_is_read_as_it_is_stored(
    checkpoint: Path, tensors: dict[str, torch.Tensor]
) -> None:
    weights = weights_of(checkpoint)
    for name, expected in tensors.items():
        destination = torch.full(expected.shape, float("nan"), dtype=torch.float32)
        weights.read_into(name, destination)
        assert torch.equal(destination, expected.float()), name
    assert weights.counts.num_bytes == sum(t.nbytes for t in tensors.values())
    stale = sum(name.endswith("inv_freq") for name in tensors)
    assert weights.counts.num_widened == len(tensors) - stale


def test_fused_experts_are_read_slice_by_slice(
    checkpoint: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    weights = weights_of(write_fused(tmp_path / "fused", tensors, checkpoint))
    names = [name for name in tensors if ".experts.5." in name]
    assert len(names) == 6
    for name in names:
        destination = torch.empty(tensors[name].shape)
        weights.read_into(name, destination)
        assert torch.equal(destination, tensors[name].float()), name
    assert weights.counts.num_bytes == sum(tensors[name].nbytes for name in names)


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"holds no tensor `model\.layers\.9\.x`"):
        weights_of(checkpoint).read_into("model.layers.9.x", torch.empty(1))


def test_a_correction_bias_in_bfloat16_is_widened_not_rounded_again(
    checkpoint: Path, tensors: dict[str, torch.Tensor]
) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert tensors[name].dtype == torch.bfloat16
    live = {t.name: t.tensor for t in hub_tensors(expert_parallel(checkpoint, torch.bfloat16))}
    assert live[name].dtype == torch.float32
    assert live["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def test_what_is_left_over_is_explained(checkpoint: Path) -> None:
    source = read_folder(checkpoint)
    config = open_checkpoint("tiny", checkpoint, None).config
    config.num_hidden_layers = 2
    reasons, unknown = leftover_tensors(source, meta_model(config, torch.bfloat16), 2)
    assert unknown == []
    assert isinstance(reasons, Counter)
    assert {text.split()[0]: count for text, count in reasons.items()}["stale"] == 3
    assert any("layers after the first 2" in text for text in reasons)


# --- what is trained, how long, what is ignored -----------------------------------------------


def config_of(**flags: Any) -> RunConfig:
    return resolve_config(flags={k.replace("__", "."): v for k, v in flags.items()}).config


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("nothing_like_this", "matches no parameter"),
        ("experts[", "is no regular expression"),
        (r"experts\.0\.", "names 1 of 8 experts"),
        (r"experts\.[0-3]\.", "names 4 of 8 experts"),
    ],
)
def test_what_cannot_be_trained_apart_is_refused(checkpoint: Path, wanted: str, said: str) -> None:
    model = expert_parallel(checkpoint, torch.float32)
    with pytest.raises(ConfigError) as caught:
        select_trainable(model, wanted, 8)
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"train__steps": 7}, 7),
        ({"train__tokens": 1000}, 2),  # 2 ranks x 2 rows x 2 micro-steps x 64 tokens = 512 a step
        ({"train__epochs": 1.5}, 8),  # 40 rows, 8 a step: 7.5 steps
    ],
)
def test_length_of_a_run(flags: dict[str, Any], expected: int) -> None:
    shape = {
        "train__micro_batch_size": 2,
        "train__sequence_length": 64,
        "train__gradient_accumulation_steps": 2,
    }
    train = config_of(**shape, **flags).train
    assert num_steps(train, Mesh(0, 2, 1, 0), 40) == expected


def test_epochs_over_text_without_end_are_refused() -> None:
    with pytest.raises(ConfigError, match="drawn without end"):
        num_steps(config_of(train__epochs=1.0).train, Mesh(0, 1, 1, 0), None)


def test_a_model_brings_its_own_defaults_and_a_later_length_replaces_an_earlier_one() -> None:
    resolved = resolve_config(flags={"model.reference": "x"})
    assert resolved.config.optim.lr == 2e-5
    assert resolved.config.train.epochs == 1.0
    assert resolved.sources["train.epochs"] == "default with MODEL"
    given = resolve_config(flags={"train.steps": 5}, settings=["train.epochs=2"])
    assert (given.config.train.steps, given.config.train.epochs) == (5, None)
    base = ({"train.tokens": 10, "optim.lr": 0.5}, "run x")
    resumed = resolve_config(flags={"train.steps": 5}, base=base)
    assert (resumed.config.train.tokens, resumed.config.optim.lr) == (None, 0.5)
    assert resumed.sources["optim.lr"] == "run x"


def test_settings_without_effect_are_named() -> None:
    embedded = dict(ignored_settings(resolve_config(flags={})))
    assert {"model.tokenizer", "data.packing", "checkpoint.keep"} <= embedded.keys()
    flags = {"model.reference": "x", "data.train": ("a",), "checkpoint.every": 5}
    assert (
        not {"data.packing", "checkpoint.keep"}
        & dict(ignored_settings(resolve_config(flags=flags))).keys()
    )


def test_trackers_get_numbers_by_step() -> None:
    step = {"event": "step", "time": 1.0, "step": 3, "loss": 2.5, "lr": 0.1}
    assert tracked_values(step) == {"train/loss": 2.5, "train/lr": 0.1}
    assert tracked_values({"event": "eval", "step": 3, "loss": 2.0}) == {"eval/loss": 2.0}
    assert tracked_values({"event": "saved"}) == {}
    require_tracker("none")


def test_config_json_round_trip_keeps_lists_of_paths() -> None:
    resolved = resolve_config(flags={"data.train": ("a", "b")})
    again = type(resolved).from_json(resolved.to_json())
    assert again.config == resolved.config
    assert json.loads(again.to_json()) == json.loads(resolved.to_json())
