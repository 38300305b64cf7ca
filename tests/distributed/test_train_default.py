"""The command as typed, cut to a few steps: what it prints, writes and leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.distributed

STEPS = 12
SETTINGS = [
    "--set=train.sequence_length=64",
    "--set=train.micro_batch_size=2",
    "--set=train.sample_tokens=8",
    "--device=cpu",
]


def run_epctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "epctl", "train", *SETTINGS, *arguments]
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


@pytest.fixture(scope="module")
def human(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("human") / "run"
    flags = ["--ep", "4", "--zero", "3", "--optim", "muon", "--steps", str(STEPS)]
    return folder, run_epctl(*flags, "-o", str(folder))


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_succeeds_and_the_loss_falls_by_a_clear_margin(human: tuple[Path, Any]) -> None:
    folder, result = human
    assert result.returncode == 0, result.stderr
    losses = {e["when"]: e["loss"] for e in events(folder) if e["event"] == "eval"}
    assert losses["before"] == pytest.approx(5.56, abs=0.15)  # ln 260
    assert losses["after"] < losses["before"] - 1.0


def test_plan_panel_progress_and_warnings_go_to_stderr_and_the_result_to_stdout(
    human: tuple[Path, Any],
) -> None:
    folder, result = human
    for text in (
        "starting 4 ranks",
        "top-6, route scale 2.446",
        "4 cpu ranks (gloo), ep 4 x edp 1, ZeRO-3, float32",
        "4.08 M parameters in 607 matrices",
        f"step {STEPS}/{STEPS}  loss",
        "held-out loss before training",
    ):
        assert text in result.stderr
        assert text not in result.stdout
    assert "training loss\n" in result.stdout
    assert "sample after training" in result.stdout
    assert f"run folder  {folder}" in result.stdout
    assert "deepspeed" not in result.stderr.lower()


def test_the_run_folder_explains_itself(human: tuple[Path, Any]) -> None:
    folder, _ = human
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "ds_config.json", "command.txt", "logs"} <= names
    for picture in ("loss.png", "expert_load.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    logs = {path.name for path in (folder / "logs").iterdir()}
    assert {f"rank-{rank}.log" for rank in range(4)} <= logs
    assert json.loads((folder / "config.json").read_text())["sources"]["parallel.ep"] == "flag"


def test_report_fields(human: tuple[Path, Any]) -> None:
    folder, _ = human
    steps = [e for e in events(folder) if e["event"] == "step"]
    assert [e["step"] for e in steps] == [1, 5, 10, 12]
    for event in steps:
        assert event["tokens"] == event["step"] * 4 * 2 * 64
        assert event["memory_bytes"] > 100e6
        assert 1.0 <= event["expert_load"] <= 64.0
        assert event["grad_norm"] > 0
    (experts,) = [e for e in events(folder) if e["event"] == "experts"]
    # Steps 11 and 12 of four ranks with two rows of 64 tokens; six of 64 experts a token.
    assert [sum(layer) for layer in experts["choices"]] == [2 * 4 * 2 * 64 * 6] * 3
    assert {len(layer) for layer in experts["choices"]} == {64}


def test_checkpoint_loads_in_transformers_and_gives_the_trainers_held_out_loss(
    human: tuple[Path, Any],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from epctl.runtime.data import sample_batch, standard_library_corpus

    folder, _ = human
    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    model.eval()
    text = standard_library_corpus().held_out
    losses = []
    with torch.no_grad():
        for index in range(8 * 4):
            batch = sample_batch(text, 2 * index, 2, 64, seed=0)
            losses.append(float(model(input_ids=batch, labels=batch).loss))
    trained = [e["loss"] for e in events(folder) if e["event"] == "eval"][-1]
    assert sum(losses) / len(losses) == pytest.approx(trained, abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    source = "def f(x):\n    return 'é'\n"
    assert tokenizer(source)["input_ids"] == list(source.encode())
    assert tokenizer.decode(list(source.encode())) == source


def test_json_mode_writes_only_json_lines_to_stdout(tmp_path: Path) -> None:
    flags = ["--ep=2", "--zero=1", "--optim=adamw", "--steps=6", "--json", "--profile"]
    result = run_epctl(*flags, "-o", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    kinds = [json.loads(line)["event"] for line in result.stdout.splitlines()]
    assert kinds[0] == "start"
    assert kinds[-1] == "done"
    assert {"plan", "eval", "step", "sample", "saved", "profile"} <= set(kinds)
    assert result.stderr == ""
    shares = {
        row["part"]: row["share"]
        for event in events(tmp_path / "run")
        if event["event"] == "profile"
        for row in event["rows"]
    }
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert min(shares["compute"], shares["optimizer"], shares["expert exchange"]) > 0
    plan = next(e for e in events(tmp_path / "run") if e["event"] == "plan")
    assert plan["num_muon"] == 0
    assert plan["num_adamw"] == plan["num_parameters"]


def test_deepspeeds_own_layer_trains_for_comparison(tmp_path: Path) -> None:
    flags = ["--ep=2", "--zero=3", "--moe=autoep", "--steps=2", "-q"]
    result = run_epctl(*flags, "-o", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    plan = next(e for e in events(tmp_path / "run") if e["event"] == "plan")
    assert plan["num_parameters"] == 4147584
    assert (tmp_path / "run" / "model" / "model.safetensors.index.json").exists()
