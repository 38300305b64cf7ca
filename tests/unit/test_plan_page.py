"""docs/plan.md is what the planner says now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from build_plan_page import PAGE, page

from epctl import cli
from epctl.launch.memory_default import deepseek_v3_source, default_model
from epctl.launch.memory_shape import model_shape


def test_the_page_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "run `HF_HUB_OFFLINE=1 .venv/bin/python tests/unit/build_plan_page.py`"
    )


def test_every_option_of_the_command_is_documented() -> None:
    import typer

    command = typer.main.get_command(cli.app).commands["plan"]  # type: ignore[attr-defined]
    text = PAGE.read_text(encoding="utf-8") + " ".join(command.epilog.split())
    for word in ("--gpus", "--gpu-memory", "--explain", "--sweep gpus", "--png", "--json"):
        assert word in text


def test_the_embedded_model_is_counted_as_transformers_builds_it() -> None:
    code = (
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "from epctl.runtime.default_model import default_config\n"
        "torch.set_default_device('meta')\n"
        "model = AutoModelForCausalLM.from_config(default_config())\n"
        "print(sum(p.numel() for p in model.parameters()))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    source, layout = default_model()
    counted = int(result.stdout.split()[-1])
    assert layout.parameters.total == counted
    assert model_shape(layout, source.config).num_parameters == counted
    assert deepseek_v3_source("x", source.config).tensors.keys() == source.tensors.keys()
