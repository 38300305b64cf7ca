"""examples/moonlight/first_hour.sh, as it stands, on a tiny model of Moonlight's layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT, rank_environment
from tiny_moonlight import write_tiny_moonlight

pytestmark = pytest.mark.distributed


def test_the_script_goes_through(tmp_path: Path) -> None:
    model = write_tiny_moonlight(tmp_path / "model")
    question = {"role": "user", "content": "What is 2 plus 2?"}
    record = json.dumps({"messages": [question, {"role": "assistant", "content": "4."}]})
    (tmp_path / "chats.jsonl").write_text(f"{record}\n" * 40)
    settings = {
        "MODEL": str(model),
        "DATA": str(tmp_path / "chats.jsonl"),
        "EP": "2",
        "STEPS": "2",
        "LENGTH": "64",
        "CHECK_LAYERS": "2",
        "RUN": str(tmp_path / "run"),
        "EPCTL": f"{sys.executable} -m epctl",
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        [ROOT / "examples" / "moonlight" / "first_hour.sh"],
        env=rank_environment() | settings,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [f"== {n}." in done.stderr for n in range(1, 8)] == [True] * 7
    assert json.loads((tmp_path / "run-check" / "check.json").read_text())["ok"]
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert (tmp_path / "run-shards" / "rank-00001").is_dir()
    assert (tmp_path / "run-exported" / "config.json").is_file()
    assert "router choices, share of tokens" in done.stdout
