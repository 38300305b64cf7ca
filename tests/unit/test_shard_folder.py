"""`epctl train` reads what `epctl convert shard` wrote as it reads the folder it came from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity_ranks import tiny_config
from torch import nn

from epctl.hub import read_local
from epctl.layout.detect import detect
from epctl.runtime.build import build_model
from epctl.runtime.load import CheckpointWeights
from epctl.runtime.mesh import Mesh
from epctl.runtime.names import hub_tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("shards")
    model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    model.save_pretrained(root / "model", max_shard_size="60KB")
    command = [sys.executable, "-m", "epctl", "convert", "shard", str(root / "model")]
    subprocess.run([*command, "--ep", "4", "-o", str(root / "sharded")], check=True)
    return root / "model", root / "sharded"


def rank_model(folder: Path, mesh: Mesh) -> tuple[nn.Module, CheckpointWeights]:
    source = read_local(folder, id="tiny")
    weights = CheckpointWeights(source, detect(source))
    cpu = torch.device("cpu")
    model = build_model(tiny_config(), mesh, weights, dtype=torch.float32, device=cpu)
    return model, weights


@pytest.mark.parametrize("ep_rank", [0, 1])
def test_a_rank_gets_the_same_weights_from_either(folders: tuple[Path, Path], ep_rank: int) -> None:
    mesh = Mesh(rank=ep_rank, num_ranks=2, ep_size=1, ep_rank=0)
    (plain, read_plain), (sharded, read_sharded) = (rank_model(f, mesh) for f in folders)
    expected = {t.name: t.local() for t in hub_tensors(plain)}
    found = {t.name: t.local() for t in hub_tensors(sharded)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_sharded.counts.num_bytes == read_plain.counts.num_bytes > 0


def test_inspect_says_the_same_of_either(folders: tuple[Path, Path]) -> None:
    layouts = [detect(read_local(folder, id="tiny")) for folder in folders]
    assert layouts[0].moe == layouts[1].moe
    assert layouts[0].parameters == layouts[1].parameters
