"""`--data org/name[:config][@revision]` on a loopback hub: pinned, shared, read on, refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dataset_shards import shards
from launch import ROOT, rank_environment, run_ranks

from epctl.config_data import DataSection
from epctl.errors import InputError
from epctl.launch.dataset_reference import (
    PinnedDataset,
    is_dataset,
    pin_datasets,
    read_datasets,
    write_datasets,
)

NEXT_SHA = "f" * 40


def add(hub: Any, files: dict[str, bytes], name: str = "org/data") -> None:
    hub.add(f"datasets/{name}", files)


def pinned(folder: Path, streaming: str, **changes: Any) -> None:
    """Pins `org/data` for a run in `folder`, as the launcher does."""
    folder.mkdir(parents=True, exist_ok=True)
    data = DataSection(train=("org/data",), streaming=streaming, **changes)  # type: ignore[arg-type]
    write_datasets(pin_datasets(data, folder), folder)


def global_rows(ranks: list[Any], case: str, run: int) -> dict[int, list[int]]:
    """Returns the rows of all positions; each must be one rank's only."""
    merged: dict[int, list[int]] = {}
    for rank in ranks:
        rows = {int(place): row for place, row in rank[case][run]["rows"].items()}
        assert not merged.keys() & rows.keys()
        merged |= rows
    return dict(sorted(merged.items()))


@pytest.fixture
def folder(tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_ranks_read_different_records_and_a_run_goes_on_where_it_stopped(
    hub: Any, folder: Path
) -> None:
    add(hub, shards(3))
    cases = [
        {"name": "long", "num_steps": [16]},
        {"name": "parts", "num_steps": [8, 16]},
        {"name": "downloaded", "num_steps": [8, 16]},
        {"name": "one-rank", "num_steps": [32]},
        {"name": "whole", "num_steps": [1], "train": {"epochs": 1.0}},
    ]
    for case in cases:
        pinned(folder / str(case["name"]), "never" if case["name"] == "downloaded" else "always")
    two = [case for case in cases if case["name"] != "one-rank"]
    ranks = run_ranks("data_ranks", 2, folder, json.dumps(two))

    # k + k steps are 2k steps: every position of the order holds the same row.
    whole = global_rows(ranks, "long", 0)
    assert list(whole) == list(range(32))
    first, continued = (global_rows(ranks, "parts", run) for run in (0, 1))
    assert continued == whole
    assert first == {place: whole[place] for place in range(16)}
    assert len({tuple(row) for row in whole.values()}) == 32
    shuffled = [row for _, row in sorted(whole.items())]
    assert shuffled != sorted(shuffled)
    downloaded = [global_rows(ranks, "downloaded", run) for run in (0, 1)]
    assert downloaded[0] == {place: downloaded[1][place] for place in range(16)}

    # Records are read by one rank, once; the second part begins where the first ended.
    for case in ("long", "parts", "downloaded"):
        read = [entry for rank in ranks for run in rank[case] for entry in run["read"]]
        assert len(read) == len(set(read))
        assert all(rank[case][0]["read"] for rank in ranks)
    assert ranks[0]["parts"][1]["read"]
    lanes = [{entry.split(" record")[0] for entry in rank["long"][0]["read"]} for rank in ranks]
    assert [len(seen) for seen in lanes] == [2, 1]
    # A run of known length leaves the rest of the stream alone; one of an epoch reads all of it.
    assert sum(len(rank["long"][0]["read"]) for rank in ranks) < 80
    assert sum(len(rank["whole"][0]["read"]) for rank in ranks) == 40 + 41 + 42

    # The order is the dataset's, not the ranks'.
    alone = run_ranks("data_ranks", 1, folder, json.dumps([c for c in cases if c not in two]))
    assert global_rows(alone, "one-rank", 0) == whole
    assert alone[0]["one-rank"][0]["facts"]["dataset"].startswith("org/data@0123456789ab")


def test_ranks_take_turns_in_a_lane_when_there_are_too_few(hub: Any, folder: Path) -> None:
    add(hub, shards(2, num_records=30, key="messages"))
    pinned(folder / "few", "always")
    ranks = run_ranks("data_ranks", 3, folder, json.dumps([{"name": "few", "num_steps": [4, 8]}]))
    read = [[entry for run in rank["few"] for entry in run["read"]] for rank in ranks]
    everything = [entry for entries in read for entry in entries]
    assert len(everything) == len(set(everything))
    assert all(read)
    rows = global_rows(ranks, "few", 1)
    assert len({tuple(row) for row in rows.values()}) == len(rows) == 24
    assert ranks[0]["few"][1]["facts"]["format"] == "messages"


def test_what_names_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "folder").mkdir()
    for text in ("org/data", "org/data:config", "org/data-v1.5@main", "a/b:c d@refs/convert/x"):
        assert is_dataset(text), text
    for text in ("local/folder", "org/x.jsonl", "data", "./org/data", "/org/data", "a/b/c", "o/*"):
        assert not is_dataset(text), text


def test_the_commit_is_pinned_and_a_resumed_run_keeps_it(hub: Any, folder: Path) -> None:
    add(hub, shards(1))
    data = DataSection(train=("org/data:default@main",), eval=("org/data",), eval_split="train")
    first = pin_datasets(data, None)
    sha = "0123456789abcdef0123456789abcdef01234567"
    assert first["train"] == PinnedDataset("org/data", "default", sha, "train", False)
    write_datasets(first, folder)
    hub.revisions["datasets/org/data"]["main"] = NEXT_SHA
    assert pin_datasets(data, folder) == read_datasets(folder) == first
    assert pin_datasets(data, None)["train"].sha == NEXT_SHA
    other = DataSection(train=(f"org/data:default@{NEXT_SHA}",))
    hub.revisions["datasets/org/data"][NEXT_SHA] = NEXT_SHA
    assert pin_datasets(other, folder)["train"].sha == NEXT_SHA


def test_large_datasets_are_streamed(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub, shards(2))
    data = DataSection(train=("org/data",))
    assert not pin_datasets(data, None)["train"].streaming
    monkeypatch.setattr("epctl.launch.dataset_reference.STREAM_ABOVE_BYTES", 100)
    assert pin_datasets(data, None)["train"].streaming
    never = data.model_copy(update={"streaming": "never"})
    assert not pin_datasets(never, None)["train"].streaming


def test_a_dataset_beside_other_data_is_refused(hub: Any) -> None:
    with pytest.raises(InputError, match="stands alone"):
        pin_datasets(DataSection(train=("org/data", "README.md")), None)


def refusal(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Returns exit code and stderr of `epctl train`."""
    done = subprocess.run(
        [sys.executable, "-m", "epctl", "train", "--steps", "1", "--ep", "1", *arguments,
         "--output", str(folder / "run")],
        env={**rank_environment(), **environment}, cwd=ROOT,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_datasets_that_cannot_be_had_are_one_clear_error(hub: Any, folder: Path) -> None:
    add(hub, shards(1), "org/private")
    add(hub, shards(1), "org/gated")
    add(hub, shards(1), "org/forbidden")
    hub.private |= {"datasets/org/private": "secret", "datasets/org/forbidden": "secret"}
    hub.gated["datasets/org/gated"] = "secret"

    code, said = refusal(folder, "--data", "org/absent")
    assert code == 5
    assert "the hub has no dataset `org/absent`, or it is private" in said
    assert "there is no file or folder `org/absent` either" in said
    assert "hint:" in said
    for name, token in (("org/private", ""), ("org/gated", ""), ("org/forbidden", "wrong")):
        environment = {"HF_TOKEN": token} if token else {}
        code, said = refusal(folder, "--data", name, **environment)
        assert code == 5, said
        assert name in said
        assert "HF_TOKEN" in said.partition("hint:")[2]
    code, said = refusal(folder, "--data", "org/gated@nope", HF_TOKEN="secret")
    assert code == 5
    assert "has no revision `nope`" in said
    code, said = refusal(folder, "--data", "org/gated", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 5
    assert "127.0.0.1 is not reachable" in said
    assert "hint: point `--data` at local" in said
    assert not (folder / "run").exists()


def test_a_dry_run_shows_the_commit_and_leaves_nothing(hub: Any, folder: Path) -> None:
    add(hub, shards(1))
    code, said = refusal(folder, "--data", "org/data", "--dry-run", "--json")
    assert code == 0, said
    assert not (folder / "run").exists()
    assert not (folder / "cache").exists()
    assert hub.sent == {}


def test_a_split_or_configuration_that_is_not_there_is_named_by_the_rank(
    hub: Any, folder: Path
) -> None:
    add(hub, shards(2, 3))
    sha = "0123456789abcdef0123456789abcdef01234567"
    program = (
        "import json, sys\n"
        "from epctl.errors import EpctlError\n"
        "from epctl.launch.dataset_reference import PinnedDataset\n"
        "from epctl.runtime.data_hub import HubRecords\n"
        "cases = [(None, 'nope'), ('nope', 'train'), (None, 'train')]\n"
        "for config, split in cases:\n"
        "    for streaming in (True, False):\n"
        f"        d = PinnedDataset('org/data', config, {sha!r}, split, streaming)\n"
        "        try: print(len(list(HubRecords(d).records())))\n"
        "        except EpctlError as e: print(type(e).__name__, e.message, '|', e.hint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=rank_environment(), capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stderr
    for line in lines[:2]:
        assert "ConfigError dataset `org/data` has no split `nope`" in line
        assert "data.split" in line
    for line in lines[2:4]:
        assert "ConfigError dataset `org/data` has no configuration `nope`" in line
    assert lines[4:] == ["3", "7"]
