"""`epctl convert shard org/name`: planned from headers, downloaded once, resumed, refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import rank_environment
from tiny_moonlight import write_tiny_moonlight

from epctl import hub_download
from epctl.convert.open import open_checkpoint, with_weights
from epctl.errors import HubError, ResourceError

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_moonlight(tmp_path_factory.mktemp("hub-model") / "model")


@pytest.fixture
def files(hub: Any, model: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    files |= {"modeling_tiny.py": b"x = 1\n", "pytorch_model.bin": b"pickled", "LICENSE": b"free"}
    hub.add("org/tiny", files)
    return files


def epctl(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "epctl", *map(str, arguments)],
        env=rank_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_hub_model_is_sharded_as_its_folder_is(
    hub: Any, files: dict[str, bytes], model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "sharded"
    command = ("convert", "shard", "org/tiny", "--ep", 2, "-o", output, "--json")
    planned = epctl(*command, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    headers = hub.sent[SHARD]
    assert 0 < headers < len(files[SHARD]) / 4
    written = epctl(*command[:-1])
    assert written.returncode == 0, written.stderr
    assert "downloading `org/tiny`: 0.00 GB into" in written.stderr
    assert hub.sent[SHARD] <= 2 * headers + len(files[SHARD])
    assert hub.sent["pytorch_model.bin"] == 0
    manifest = json.loads((output / "manifest.json").read_text())
    local = epctl("convert", "shard", model, "--ep", 2, "-o", tmp_path / "local", "--json")
    assert manifest["digest"] == json.loads(local.stdout)["digest"]
    assert manifest["source"]["id"] == "org/tiny"
    assert manifest["source"]["revision"] == "0123456789abcdef0123456789abcdef01234567"
    assert (output / "modeling_tiny.py").read_bytes() == files["modeling_tiny.py"]
    assert (output / "LICENSE").read_bytes() == b"free"

    sent = hub.sent[SHARD]
    verified = epctl("convert", "verify", "org/tiny", output)
    assert verified.returncode == 0, verified.stderr
    assert hub.sent[SHARD] == sent  # the cache has it


def test_a_plan_that_cannot_be_is_refused_before_a_weight_is_fetched(
    hub: Any, files: dict[str, bytes], tmp_path: Path
) -> None:
    refused = epctl("convert", "shard", "org/tiny", "--ep", 7, "-o", tmp_path / "x")
    assert refused.returncode == 3
    assert hub.sent[SHARD] < len(files[SHARD]) / 4


def test_an_interrupted_download_goes_on(hub: Any, files: dict[str, bytes]) -> None:
    """The snapshot then has a config, an index and one of two shards."""
    hub.faults["model-00002-of-00002.safetensors"] = [None, None, 404]
    view = open_checkpoint("org/tiny")
    with pytest.raises(HubError, match="cannot be downloaded"):
        with_weights(view)
    hub.faults.clear()
    sent = hub.sent[SHARD]
    whole = with_weights(open_checkpoint("org/tiny"))
    assert whole.folder is not None
    for name in (SHARD, "model-00002-of-00002.safetensors"):
        assert (whole.folder / name).read_bytes() == files[name]
    assert hub.sent[SHARD] - sent < len(files[SHARD]) / 4


def test_the_disk_is_asked_before_the_first_byte(
    hub: Any, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(len(data) for name, data in files.items() if name != "pytorch_model.bin")
    free = total + 1000
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(hub_download.shutil, "disk_usage", lambda path: usage)
    view = open_checkpoint("org/tiny")
    sent = hub.sent[SHARD]
    with pytest.raises(ResourceError, match="the download and what is written from it need"):
        with_weights(view, tmp_path / "out", 2000)
    assert hub.sent[SHARD] == sent
    progress: list[int] = []
    advance = hub_download.ByteProgress.advance
    monkeypatch.setattr(
        hub_download.ByteProgress, "advance", lambda self, n: (progress.append(n), advance(self, n))
    )
    assert with_weights(view, tmp_path / "out", 0).folder is not None
    assert sum(progress) == total


def test_without_a_network_or_access_it_says_what_to_do(
    hub: Any, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = open_checkpoint("org/tiny")
    hub.gated["org/tiny"] = "secret"
    with pytest.raises(HubError, match="gated") as caught:
        with_weights(view)
    assert "HF_TOKEN" in str(caught.value.hint)
    assert "hf download org/tiny" in str(caught.value.hint)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="not reachable") as caught:
        with_weights(view)
    assert "hf download org/tiny" in str(caught.value.hint)
