"""What is said of a run's data, on one rank."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from epctl.config import RunConfig
from epctl.runtime.data_prepare import MANIFEST, DataFacts, load_data
from epctl.runtime.default_model import VOCAB_SIZE, byte_tokenizer


def facts(folder: Path) -> DataFacts:
    data = {"train": [str(folder / "*.txt")], "format": "text"}
    train = {"sequence_length": 16, "steps": 1, "micro_batch_size": 1}
    config = RunConfig.model_validate({"data": data, "train": train})
    mesh = SimpleNamespace(rank=0, num_ranks=1, num_data_ranks=1)
    _, found = load_data(config, folder / "run" / "data", mesh, byte_tokenizer(), VOCAB_SIZE)
    return found


@pytest.mark.usefixtures("alone")
def test_one_document_is_counted_though_its_last_rows_are_held_out(tmp_path: Path) -> None:
    """The first document is one that is held out, if there are others."""
    (tmp_path / "only.txt").write_text("x" * 400)
    (tmp_path / "run").mkdir()
    first = facts(tmp_path)
    assert first.documents == 1
    assert first.tokens >= 400
    assert first.held_out_rows > 0
    assert facts(tmp_path) == first  # as it lies in the folder


@pytest.mark.usefixtures("alone")
def test_a_folder_of_an_older_run_is_read(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text("y" * 40)
    (tmp_path / "run").mkdir()
    first = facts(tmp_path)
    assert 20 < first.documents < 40  # the others are held out
    path = tmp_path / "run" / "data" / MANIFEST
    manifest = json.loads(path.read_text())
    assert manifest["held_out"].pop("documents") == 40 - first.documents
    del manifest["held_out"]
    path.write_text(json.dumps(manifest))
    assert facts(tmp_path) == first
