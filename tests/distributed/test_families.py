"""Every family that trains computes what transformers computes, at EP 1 and 2 (float32, gloo).

Models are transformers' own, written by `save_pretrained`, so the hub's names and storage are read
and written. One launch a number of ranks runs all families.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import FAMILIES, write_tiny_model
from launch import ROOT, run_ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

# float32 sums of a few hundred terms in another order, norm-wise.
TOLERANCE = 1e-5
LOSS_TOLERANCE = 2e-6
EP_SIZES = (1, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        write_tiny_model(family, root / "models" / family)
    return root


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, list[dict[str, Any]]]:
    found = {}
    for ep in EP_SIZES:
        (folder / f"ep{ep}").mkdir()
        names = json.dumps(list(FAMILIES))
        found[ep] = run_ranks("family_ranks", ep, folder / f"ep{ep}", names, timeout=600)
    return found


@pytest.mark.parametrize("ep", EP_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_block_equals_transformers(results: dict[int, list[Any]], family: str, ep: int) -> None:
    for rank in results[ep]:
        found = rank[family]
        assert "error" not in found, found["error"]
        assert found["num_layers"][0] == found["num_layers"][1] > 0
        block = found["block"]
        assert block.pop("choices") == 0, "other experts are chosen"
        wrong = {name: value for name, value in block.items() if not value <= TOLERANCE}
        assert not wrong, wrong
        assert any(name.startswith("experts.") for name in block)
        assert any("gate" in name or "router" in name for name in block)


@pytest.mark.parametrize("ep", EP_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_first_loss_equals_transformers(
    results: dict[int, list[Any]], family: str, ep: int
) -> None:
    for rank in results[ep]:
        ours, theirs = rank[family]["losses"]
        assert abs(ours - theirs) <= LOSS_TOLERANCE * theirs
        assert rank[family]["embedding_gradient"] <= TOLERANCE


@pytest.mark.parametrize("ep", EP_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_what_was_read(
    results: dict[int, list[Any]], folder: Path, family: str, ep: int
) -> None:
    """Names, shapes and bytes, the experts' storage included."""
    expected, actual = (
        {name: t for path in root.glob("*.safetensors") for name, t in load_file(path).items()}
        for root in (folder / "models" / family, folder / f"ep{ep}" / family)
    )
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name], tensor.to(actual[name].dtype)), name


def test_every_type_that_trains_is_here() -> None:
    """docs/families.md is generated from what `epctl train` decides by."""
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    trains = {cells[0] for cells in rows if cells[-1] == "yes"}
    assert trains == FAMILIES.keys()
