"""`epctl train MODEL` on a checkpoint of transformers: loss, bytes, memory, partial training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_ranks
from safetensors.torch import save_file
from tiny_moonlight import reference_loss, write_tiny_moonlight

from epctl.layout.source import read_folder

pytestmark = pytest.mark.distributed

GRID = [(ep, zero) for ep in (1, 2, 4) for zero in (1, 2, 3)]
MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_moonlight(tmp_path_factory.mktemp("moonlight") / "model")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cases = [
        {"name": f"ep{ep}-zero{zero}", "ep": ep, "zero": zero, "model": str(checkpoint)}
        for ep, zero in GRID
    ]
    folder = tmp_path_factory.mktemp("loaded")
    return run_ranks("train_model_ranks", 4, folder, "first_loss", json.dumps(cases))


@pytest.mark.parametrize(("ep", "zero"), GRID)
def test_first_loss_is_transformers_own(
    checkpoint: Path, loaded: list[dict[str, Any]], ep: int, zero: int
) -> None:
    ids = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(1))
    expected = reference_loss(checkpoint, ids)
    for rank in loaded:
        assert rank[f"ep{ep}-zero{zero}"]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("ep", "zero"), GRID)
def test_a_rank_reads_its_own_experts_and_no_others(
    checkpoint: Path, loaded: list[dict[str, Any]], ep: int, zero: int
) -> None:
    table = read_folder(checkpoint).tensors
    expert_of = {
        name: int(match[1])
        for name in table
        if (match := re.search(r"\.experts\.(\d+)\.", name)) is not None
    }
    dense = {n for n in table if n not in expert_of and not n.endswith("inv_freq")}
    num_local = 8 // ep
    for number, rank in enumerate(loaded):
        first = (number % ep) * num_local
        own = {n for n, e in expert_of.items() if first <= e < first + num_local}
        result = rank[f"ep{ep}-zero{zero}"]
        assert set(result["read"]) == dense | own
        assert result["num_bytes"] == sum(table[name].num_bytes for name in dense | own)
    together = set().union(*(rank[f"ep{ep}-zero{zero}"]["read"] for rank in loaded))
    assert together == dense | set(expert_of)


@pytest.mark.parametrize(("ep", "zero"), GRID)
def test_the_schedule_reaches_every_group(loaded: list[dict[str, Any]], ep: int, zero: int) -> None:
    """Warm-up of one step: half the rate, then all of it, for dense and expert groups alike."""
    rates = loaded[0][f"ep{ep}-zero{zero}"]["rates"]
    num_groups = len(rates) // 2
    assert num_groups == 3  # Muon dense, Muon experts, AdamW
    assert rates == [1e-3] * num_groups + [2e-3] * num_groups


def test_stale_tensors_and_widened_ones_are_told(loaded: list[dict[str, Any]]) -> None:
    result = loaded[0]["ep4-zero3"]
    assert result["notes"] == [
        "not read: 3 stale `inv_freq` tensors, which the model computes itself"
    ]
    assert result["num_widened"] == result["num_tensors"]  # bf16 file, float32 run


def test_a_rank_never_holds_the_whole_model(tmp_path: Path) -> None:
    """Resident memory rises by less than the share + one fusion unit + 300 MiB."""
    model = write_large_model(tmp_path / "model")
    whole = sum(entry.num_bytes for entry in read_folder(model).tensors.values())
    flags = {"train.precision": "bfloat16"}
    case = {"name": "large", "ep": 4, "zero": 3, "model": str(model), "flags": flags}
    ranks = run_ranks("train_model_ranks", 4, tmp_path, "peak_memory", json.dumps([case]))
    fusion_unit = 16 * 512 * 512 * 2
    for rank in ranks:
        result = rank["large"]
        bound = result["share"] + fusion_unit + 300 * MIB
        assert bound < 0.75 * whole, "the bound would not notice a whole model"
        assert result["share"] < result["rise"] + 32 * MIB, "the measurement sees nothing"
        assert result["rise"] < bound


def write_large_model(folder: Path) -> Path:
    """Writes about 700 MiB in the layout, tensor by tensor, without building the model."""
    from parity_ranks import tiny_config

    from epctl.runtime.build import meta_model
    from epctl.runtime.default_model import VOCAB_SIZE, byte_tokenizer
    from epctl.runtime.names import hub_tensors

    config = tiny_config(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        moe_intermediate_size=512,
        n_routed_experts=64,
        num_hidden_layers=9,
    )
    folder.mkdir()
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    weight_map: dict[str, str] = {}
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for tensor in hub_tensors(meta_model(config, torch.bfloat16)):
        match = re.match(r"model\.layers\.(\d+)\.", tensor.name)
        file = f"model-{int(match[1]) + 1 if match else 0:05d}.safetensors"
        value = torch.full(tensor.shape, 0.01, dtype=torch.bfloat16)
        by_layer.setdefault(file, {})[tensor.name] = value
        weight_map[tensor.name] = file
    for file, tensors in by_layer.items():
        save_file(tensors, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


PARTIAL = {
    "experts": (r"\.mlp\.experts\.", {"ep": 2, "zero": 3}),
    "attention": (r"\.self_attn\.", {"ep": 1, "zero": 2}),
    "router": (r"\.mlp\.gate\.weight$", {"ep": 2, "zero": 1}),
    r"layers\.2\.": (r"layers\.2\.(?!.*correction_bias)", {"ep": 2, "zero": 3, "optim": "adamw"}),
}


@pytest.fixture(scope="module")
def partially_trained(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    cases = [
        {
            "name": f"case{number}",
            "model": str(checkpoint),
            "flags": {"train.parameters": wanted},
            **layout,
        }
        for number, (wanted, (_, layout)) in enumerate(PARTIAL.items())
    ]
    folder = tmp_path_factory.mktemp("partial")
    return run_ranks("train_model_ranks", 2, folder, "partial", json.dumps(cases))


@pytest.mark.parametrize("number", range(len(PARTIAL)), ids=PARTIAL)
def test_only_what_is_named_changes_and_has_optimizer_state(
    partially_trained: list[dict[str, Any]], number: int
) -> None:
    pattern = list(PARTIAL.values())[number][0]
    for rank in partially_trained:
        result = rank[f"case{number}"]
        assert result["changed"]
        assert all(re.search(pattern, name) for name in result["with_state"])
        assert result["changed"] == result["with_state"]
