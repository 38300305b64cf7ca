"""`epctl train MODEL --data chats.jsonl` as typed, resumed as typed, and what `--dry-run` said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import rank_environment
from tiny_moonlight import write_tiny_moonlight

pytestmark = pytest.mark.distributed

SETTINGS = (
    "--ep", "2", "--zero", "3", "--steps", "4", "--lr", "1e-3",
    "--set", "train.sequence_length=96", "--set", "checkpoint.every=2",
    "--set", "train.eval_every=2", "--set", "train.sample_tokens=8",
    "--set", "train.eval_batches=1",
)  # fmt: skip


def epctl(*arguments: str) -> str:
    """Runs the command and returns its stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "epctl", *arguments],
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    write_tiny_moonlight(folder / "model")
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(80):
            question = {"role": "user", "content": f"What is {number} plus {number}?"}
            answer = {"role": "assistant", "content": f"It is {2 * number}."}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    return folder


@pytest.fixture(scope="module")
def asked(folder: Path) -> list[str]:
    return ["train", str(folder / "model"), "--data", str(folder / "chats.jsonl"), *SETTINGS]


@pytest.fixture(scope="module")
def planned(asked: list[str], folder: Path) -> dict[str, Any]:
    before = sorted(folder.rglob("*"))
    document = json.loads(epctl(*asked, "-o", str(folder / "run"), "--dry-run", "--json"))
    assert sorted(folder.rglob("*")) == before, "a dry run touches nothing"
    return dict(document)


@pytest.fixture(scope="module")
def run(asked: list[str], folder: Path, planned: dict[str, Any]) -> Path:
    epctl(*asked, "-o", str(folder / "run"), "--json")
    return folder / "run"


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_dry_run_names_the_source_of_each_value(planned: dict[str, Any], folder: Path) -> None:
    config = planned["config"]
    assert config["parallel.ep"] == {"value": 2, "source": "flag"}
    assert config["train.sequence_length"] == {"value": 96, "source": "--set"}
    assert config["train.activation_checkpointing"]["source"] == "default with MODEL"
    assert config["optim.momentum"]["source"] == "default"
    assert planned["deepspeed"]["zero_optimization"]["stage"] == 3
    assert "epctl.runtime.worker" in planned["command"]


def test_dry_run_counts_the_bytes_that_the_run_then_holds(
    planned: dict[str, Any], run: Path
) -> None:
    plan = next(event for event in events(run) if event["event"] == "plan")
    counted = planned["bytes_per_rank"]
    for name in ("parameters", "masters", "optimizer_state"):
        assert counted[name] == pytest.approx(plan[f"bytes_{name}"], rel=0.005)


def test_the_run_learns_from_assistant_turns_and_tells_so(run: Path) -> None:
    found = events(run)
    data = next(event for event in found if event["event"] == "data")
    assert data["format"] == "messages"
    assert 0 < data["targets"] < data["tokens"] / 2
    losses = [event["loss"] for event in found if event["event"] == "eval"]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_checkpoints_and_the_end_load_in_transformers(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (run / "model", *sorted((run / "checkpoints").glob("step-*/model"))):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model).__name__ == "DeepseekV3ForCausalLM"
        assert AutoTokenizer.from_pretrained(folder).chat_template


def test_resume_as_typed_ends_in_the_same_bytes(run: Path, tmp_path: Path) -> None:
    """The run is killed after its first checkpoint, as far as the folder can tell."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "checkpoints" / "step-0000004")
    epctl("train", "--resume", str(copy), "--json")
    for path in sorted((run / "model").glob("*.safetensors")):
        assert path.read_bytes() == (copy / "model" / path.name).read_bytes()
    for path in sorted((run / "checkpoints" / "step-0000004" / "state").iterdir()):
        resumed = copy / "checkpoints" / "step-0000004" / "state" / path.name
        assert path.read_bytes() == resumed.read_bytes()
    steps = [event["step"] for event in events(copy) if event["event"] == "step"]
    assert steps == [1, 4, 3, 4]  # the first run's own reports, then those after the checkpoint
