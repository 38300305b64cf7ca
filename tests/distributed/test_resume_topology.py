"""A checkpoint of any layout goes on at any other: weights, moments, schedule, place in the data.

float32, AdamW and Muon: the next three losses are those of the run that went on where it was, and
saved again at once the state is the same to the last bit, tensor by tensor and expert by expert.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import rank_environment
from tiny_moonlight import write_tiny_moonlight

from epctl.runtime.checkpoint_reader import StateReader

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1500)]

Layout = tuple[int, int, int, str]
Pair = tuple[str, int, int, int]

# name: (ranks, ep, ZeRO stage, optimizer)
SOURCES = {
    "a": (1, 1, 0, "muon"),
    "b": (2, 2, 3, "muon"),
    "c": (2, 1, 2, "adamw"),
    "d": (2, 2, 1, "adamw"),
    "e": (4, 4, 3, "muon"),
    "f": (4, 2, 2, "muon"),
    "g": (4, 4, 0, "adamw"),
}
# source, and the (ranks, ep, ZeRO stage) that it goes on at
PAIRS = [
    ("e", 2, 2, 2),
    ("e", 1, 1, 0),
    ("e", 2, 1, 3),
    ("e", 4, 2, 1),
    ("f", 2, 2, 3),
    ("f", 1, 1, 1),
    ("f", 4, 4, 3),
    ("a", 4, 4, 3),
    ("a", 2, 2, 1),
    ("b", 4, 2, 2),
    ("b", 1, 1, 3),
    ("c", 4, 4, 3),
    ("c", 1, 1, 0),
    ("c", 2, 2, 1),
    ("d", 4, 1, 3),
    ("d", 2, 2, 0),
    ("g", 2, 2, 3),
    ("g", 1, 1, 2),
]


def pair_name(pair: Pair) -> str:
    source, num_ranks, ep, zero = pair
    return f"{source}-to-{num_ranks}ranks-ep{ep}-zero{zero}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("topology")
    run_layouts(folder, SOURCES, PAIRS)
    return folder


def run_layouts(
    folder: Path, sources: dict[str, Layout], pairs: list[Pair], **options: Any
) -> None:
    """Runs every source, then every pair, one process tree a number of ranks."""
    model = write_tiny_moonlight(folder / "model", dtype=torch.float32)
    (model / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')
    cases = [
        (ranks, {"name": name, "ep": ep, "zero": zero, "optim": optim})
        for name, (ranks, ep, zero, optim) in sources.items()
    ]
    later = [
        (
            ranks,
            {
                "name": pair_name((source, ranks, ep, zero)),
                "ep": ep,
                "zero": zero,
                "optim": sources[source][3],
                "from": source,
            },
        )
        for source, ranks, ep, zero in pairs
    ]
    phases = [
        {"num_ranks": size, "cases": [{"model": str(model), **case, **options} for case in mine]}
        for group in (cases, later)
        for size in sorted({ranks for ranks, _ in group})
        if (mine := [case for ranks, case in group if ranks == size])
    ]
    result = subprocess.run(
        [sys.executable, "-m", "topology_ranks", str(folder), json.dumps(phases)],
        env=rank_environment(),
        capture_output=True,
        text=True,
    )
    logs = "".join(path.read_text()[-2000:] for path in folder.glob("rank-*.log"))
    assert result.returncode == 0, result.stderr[-2000:] + logs


def outcome(folder: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return result


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
def test_the_next_three_losses_are_those_of_the_run_it_was(folder: Path, pair: Pair) -> None:
    assert_losses_go_on(folder, pair)


def assert_losses_go_on(folder: Path, pair: Pair) -> None:
    before, after = outcome(folder, pair[0]), outcome(folder, pair_name(pair))
    assert len(after["losses"]) == 3
    assert after["losses"] == pytest.approx(before["losses"], abs=1e-6, rel=0)
    assert after["held_out"] == pytest.approx(before["held_out"], abs=1e-6, rel=0)


def test_losses_depend_on_what_is_restored(folder: Path) -> None:
    """The test above would pass on steps that change nothing, or a schedule that stands still."""
    before = outcome(folder, "e")
    assert len({round(loss, 4) for loss in before["first"] + before["losses"]}) == 5


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
def test_every_expert_has_its_own_weights_and_moments_to_the_last_bit(
    folder: Path, pair: Pair
) -> None:
    assert_state_is_kept(folder, pair, SOURCES[pair[0]][3])


def assert_state_is_kept(folder: Path, pair: Pair, optim: str) -> None:
    place = Path("checkpoints", "step-0000002", "state")
    states = [folder / name / place for name in (pair[0], pair_name(pair))]
    with StateReader(states[0]) as before, StateReader(states[1]) as after:
        keys = {key for key in before.tensors() if not key[0].startswith("random.")}
        assert keys == {key for key in after.tensors() if not key[0].startswith("random.")}
        for name, key in sorted(keys):
            assert torch.equal(before.read(name, key), after.read(name, key)), (name, key)
        moments = {key for name, key in keys if ".experts.7." in name}
        expected = {"muon": {"momentum_buffer"}, "adamw": {"exp_avg", "exp_avg_sq", "step"}}
        assert moments == {"master"} | expected[optim]
        values = {before.read(n, "master").numpy().tobytes() for n, k in keys if ".experts." in n}
        assert len(values) == len({n for n, _ in keys if ".experts." in n})  # no two are alike


def test_transformers_loads_the_model_and_has_the_trainers_held_out_loss(folder: Path) -> None:
    """ZeRO-3, EP=4, Muon."""
    from topology_ranks import NUM_HELD_OUT
    from train_model_ranks import packed_data
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder / "e" / "checkpoints" / "step-0000002" / "model", dtype=torch.float32
    ).eval()
    batch = packed_data().held_out_batch(0, NUM_HELD_OUT)
    with torch.no_grad():
        total = float(model(**batch.model_inputs(), num_items_in_batch=1).loss)
    trained = outcome(folder, "e")
    assert total / batch.num_targets == pytest.approx(trained["held_out"], abs=1e-5, rel=0)
    assert abs(trained["held_out"] - trained["first"][0]) > 1e-3
    for place in ("e", pair_name(PAIRS[0])):  # the original's own, also a checkpoint later
        kept = folder / place / "checkpoints" / "step-0000002" / "model" / "generation_config.json"
        assert kept.read_bytes() == (folder / "model" / "generation_config.json").read_bytes()
