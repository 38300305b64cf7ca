"""`epctl train --sp`: the same run with each sample on two ranks, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SMALL = [
    "--device=cpu",
    "--num-ranks=2",
    "--ep=2",
    "--steps=3",
    "--set=train.sequence_length=61",
    "--set=train.report_every=1",
    "--set=train.sample_tokens=0",
    "--set=train.eval_batches=1",
    "--set=run.save=false",
]


def epctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "epctl", "train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def trained(folder: Path, sp: int, *arguments: str) -> list[dict[str, Any]]:
    # As many sequences a step: two ranks share two, or have one each.
    size = f"--set=train.micro_batch_size={sp}"
    result = epctl(*SMALL, size, f"--sp={sp}", "-o", str(folder), *arguments)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.distributed
def test_a_run_with_shared_samples_is_the_same_run(tmp_path: Path) -> None:
    """Documents of odd lengths packed with padding, experts over both ranks, Muon, ZeRO-3.

    The shared run makes its logits in blocks as well, as long samples need it.
    """
    data = tmp_path / "notes.jsonl"
    records = [{"text": f"note {n}: " + "ab " * (n % 7 + 3)} for n in range(120)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    runs = [
        trained(tmp_path / "sp1", 1, "--data", str(data)),
        trained(tmp_path / "sp2", 2, "--data", str(data), "--set=train.logits_mib=0.01"),
    ]
    assert [next(e["sp"] for e in run if e["event"] == "plan") for run in runs] == [1, 2]
    whole, shared = ([e for e in run if e["event"] in ("step", "eval")] for run in runs)
    assert [e["event"] for e in whole] == ["eval", "step", "step", "step", "eval"]
    for one, two in zip(whole, shared, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=3e-6)
        assert two.get("grad_norm", 0) == pytest.approx(one.get("grad_norm", 0), rel=3e-5)
        assert two.get("tokens") == one.get("tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sp=3", "--num-ranks=4"], "sequence parallel size 3 does not divide the 4 ranks"),
        (["--sp=2", "--set=optim.qk_clip=100"], "`optim.qk_clip` looks at the queries and keys"),
        (["--sp=2", "--moe=autoep"], "`--moe autoep` with `--sp 2`"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_starts(
    arguments: list[str], message: str
) -> None:
    result = epctl("--device=cpu", *arguments, "--dry-run")
    assert result.returncode == 3
    assert message in " ".join(result.stderr.split())
