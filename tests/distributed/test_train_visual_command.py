"""`epctl train FOLDER --data chats.jsonl --sp 2` as typed, and what it refuses before it starts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch import rank_environment
from tile_models import write_tile_model
from visual_models import write_chats, write_visual_model

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

SMALL = [
    "--device=cpu",
    "--num-ranks=2",
    "--zero=3",
    "--steps=2",
    "--set=train.sequence_length=157",
    "--set=train.micro_batch_size=2",
    "--set=train.report_every=1",
    "--set=train.sample_tokens=3",
    "--set=train.eval_batches=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("command")
    write_visual_model("qwen3_vl_moe", root / "model")
    write_tile_model("internvl_moe", root / "tiles")
    write_chats(root / "chats")
    return root


def epctl(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = rank_environment() | {"COLUMNS": "120"}
    # Another folder than the data's: its paths are relative to the data file.
    command = [sys.executable, "-m", "epctl", "train", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=environment, cwd=folder
    )


def test_a_run_as_typed(folder: Path) -> None:
    """Two ranks share each sample and the experts; held-out images, samples, a saved model."""
    run = folder / "run"
    result = epctl(
        folder, "model", "--data", "chats/chats.jsonl", "--ep=2", "--sp=2", "-o", str(run), *SMALL
    )
    assert result.returncode == 0, result.stderr
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    data = next(event for event in events if event["event"] == "data")
    assert (data["documents"], data["images"], data["videos"]) == (
        23,
        23,
        3,
    )  # one more is held out
    assert "23 images, 3 videos" in result.stderr
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2]
    prompts = [event["prompt"] for event in events if event["event"] == "sample"]
    assert prompts[0].endswith("<assistant>")
    names = {path.name for path in (run / "model").iterdir()}
    assert {"preprocessor_config.json", "chat_template.json", "config.json"} <= names
    assert next(event for event in events if event["event"] == "plan")["sp"] == 2


def test_a_missing_image_ends_the_run_with_its_line(folder: Path) -> None:
    broken = folder / "broken"
    shutil.copytree(folder / "chats", broken)
    (broken / "images/0-0.png").unlink()
    result = epctl(
        folder, "model", "--data", "broken/chats.jsonl", "-o", str(folder / "refused"), *SMALL
    )
    assert result.returncode == 4
    said = " ".join(result.stderr.split())
    assert "chats.jsonl` line 1: there is no file" in said
    assert "relative to the folder of the data file" in said


def test_a_folder_without_a_processor_is_refused_before_ranks_start(folder: Path) -> None:
    other = folder / "no-processor"
    shutil.copytree(folder / "model", other)
    (other / "preprocessor_config.json").unlink()
    result = epctl(folder, str(other), "--data", "chats/chats.jsonl", "--dry-run", *SMALL)
    assert result.returncode == 4
    assert "holds a vision-language model and no image processor" in " ".join(result.stderr.split())


def test_a_dry_run_foresees_the_towers_memory(folder: Path) -> None:
    result = epctl(
        folder, "model", "--data", "chats/chats.jsonl", "--dry-run", "--json", "--sp=2", *SMALL
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["memory"]["peak_bytes"] > 0


@pytest.mark.parametrize("model", ["model", "tiles"])
def test_a_check_compares_the_tower_too(folder: Path, model: str) -> None:
    """transformers on one rank against two ranks that share samples and experts."""
    run = folder / f"check-{model}"
    result = epctl(
        folder, model, "--data", "chats/chats.jsonl", "--ep=2", "--sp=2", "--check",
        "-o", str(run), *(flag for flag in SMALL if not flag.startswith("--steps")),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads((run / "check.json").read_text())
    assert report["ok"]
    assert (report["sp"], report["zero"]) == (2, 3)
    rows = {row["quantity"]: row for row in report["rows"]}
    assert rows["gradient of vision, step 1"]["reference"] > 0.01
    assert "router choices, share of tokens" in rows
