"""Finding and reading records; every damaged file is one clear error that names it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from epctl.errors import HubError, InputError
from epctl.runtime.data_encode import TextEncoder
from epctl.runtime.data_files import find_records
from epctl.runtime.data_store import DocumentWriter, StoredDocuments, encode_share, is_held_out
from epctl.runtime.default_model import byte_tokenizer


def texts(patterns: list[str]) -> list[Any]:
    return [record["text"] for _, record in find_records(patterns, "train").records()]


def test_text_jsonl_json_parquet_folders_and_globs(tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "c.json").write_text('[{"text": "three"}]')
    Dataset.from_dict({"text": ["four", "five"]}).to_parquet(str(tmp_path / "d.parquet"))
    (tmp_path / "ignored.bin").write_bytes(b"\0\1")
    assert texts([str(tmp_path)]) == ["one", "two", "plain", "three", "four", "five"]
    assert texts([str(tmp_path / "*.txt"), str(tmp_path / "a.jsonl")]) == ["plain", "one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "is empty"),
        ("binary.txt", b"ab\0cd", "is binary"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text: byte 3 is 0xe9"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("list.jsonl", b'{"text": "a"}\n5\n', "line 2 is a JSON int, not an object"),
        ("bad.parquet", b"PAR1 but no more", "cannot be read as parquet"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        texts([str(path)])
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_patterns_without_files(tmp_path: Path) -> None:
    for pattern in (str(tmp_path / "*.txt"), str(tmp_path / "none.jsonl"), str(tmp_path)):
        with pytest.raises(InputError) as caught:
            find_records([pattern], "train")
        assert pattern in str(caught.value)


def test_a_hub_dataset_without_network_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = find_records(["org/name@main"], "train")
    assert source.dataset == "org/name@main"
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set") as caught:
        list(source.records())
    assert "--data" in str(caught.value.hint)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_documents_stand_in_the_order_of_the_source_whatever_the_ranks(
    tmp_path: Path, num_ranks: int
) -> None:
    records = [(f"r{n}", {"text": f"{n:02d}" * (n + 1)}) for n in range(11)]
    encoder = TextEncoder(byte_tokenizer(), "text")
    stems = [tmp_path / f"train-{rank}" for rank in range(num_ranks)]
    for rank, stem in enumerate(stems):
        writer = DocumentWriter(stem)
        for index, document in encode_share(records, rank, num_ranks, encoder, 260):
            writer.add(index, document)
        writer.close()
    stored = StoredDocuments(stems)
    assert stored.lengths.tolist() == [2 * (n + 1) + 1 for n in range(11)]
    found = [stored.tokens(n, 0, int(stored.lengths[n]))[0].tolist() for n in range(11)]
    assert found == [encoder(record, "").ids for _, record in records]
    assert stored.tokens(3, 2, 5)[0].tolist() == encoder(records[3][1], "").ids[2:5]


def test_token_ids_beyond_the_vocabulary_are_another_models_tokenizer() -> None:
    encoder = TextEncoder(byte_tokenizer(), "text")
    with pytest.raises(InputError, match="token id 257, but the model's vocabulary ends at 199"):
        list(encode_share([("here", {"text": "a"})], 0, 1, encoder, 200))


def test_held_out_documents_come_from_all_over() -> None:
    chosen = [n for n in range(10_000) if is_held_out(n, 0.02)]
    assert 150 < len(chosen) < 250
    assert max(b - a for a, b in itertools.pairwise(chosen)) < 200
