"""Finding and reading records; every damaged file is one clear error that names it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epctl.errors import HubError, InputError
from epctl.launch.dataset_reference import pin_dataset
from epctl.runtime.data_encode import TextEncoder
from epctl.runtime.data_files import Record, find_records
from epctl.runtime.data_reading import ShareReader
from epctl.runtime.data_store import DocumentWriter, StoredDocuments, encode, is_held_out
from epctl.runtime.default_model import byte_tokenizer


def texts(patterns: list[str]) -> list[Any]:
    return [record["text"] for _, (_, record, _) in find_records(patterns).records()]


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
            find_records([pattern])
        assert pattern in str(caught.value)


def test_a_hub_dataset_without_network_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set") as caught:
        pin_dataset("org/name@main", "train", "auto")
    assert "--data" in str(caught.value.hint)
    commit = "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "org___name" / "default" / "0.0.0" / commit).mkdir(parents=True)
    for reference in ("org/name", "org/name@main", f"org/name@{commit}"):
        assert pin_dataset(reference, "train", "always").sha == commit
    assert not pin_dataset("org/name", "train", "always").streaming
    for reference in ("org/name@v2", f"org/name@{'f' * 40}", "org/other"):
        with pytest.raises(HubError, match="not in the cache"):
            pin_dataset(reference, "train", "auto")


class Lanes:
    """Records of given numbers of lanes' lengths, none of them opened before it is asked for."""

    in_part = True

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths
        self.num_lanes = len(lengths)

    def records(self, lane: int = 0, first: int = 0, step: int = 1) -> Any:
        for number in range(first, self.lengths[lane], step):
            yield number, (f"{lane}:{number}", {})


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    num_ranks=st.integers(1, 5),
    stops=st.lists(st.integers(1, 15), max_size=3),
)
def test_every_record_is_read_once_whatever_ranks_and_rounds(
    lengths: list[int], num_ranks: int, stops: list[int]
) -> None:
    source = Lanes(*lengths)
    seen: list[int] = []
    first = 0
    for stop in [*sorted(stops), None]:
        # Each time as a continued run does: new readers that begin where the others stopped.
        for rank in range(num_ranks):
            reader = ShareReader(source, rank, num_ranks, first)
            found = list(reader.read(stop))
            assert all(
                where == f"{n % len(lengths)}:{n // len(lengths)}" for n, (where, _) in found
            )
            seen += [number for number, _ in found]
        # What complete rounds hold is a prefix of the order.
        bound = stop if stop is not None else max(lengths)
        numbers = {i * len(lengths) + lane for lane, n in enumerate(lengths) for i in range(n)}
        assert sorted(seen) == sorted(n for n in numbers if n // len(lengths) < bound)
        first = bound


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_documents_stand_in_the_order_of_the_source_whatever_the_ranks(
    tmp_path: Path, num_ranks: int
) -> None:
    records = [Record(f"r{n}", {"text": f"{n:02d}" * (n + 1)}) for n in range(11)]
    encoder = TextEncoder(byte_tokenizer(), "text")
    stems = [tmp_path / f"train-{rank}" for rank in range(num_ranks)]
    for rank, stem in enumerate(stems):
        writer = DocumentWriter(stem)
        for number, record in list(enumerate(records))[rank::num_ranks]:
            writer.add(number, encode(record, encoder, 260))
        writer.close()
    stored = StoredDocuments(stems)
    assert stored.lengths.tolist() == [2 * (n + 1) + 1 for n in range(11)]
    found = [stored.tokens(n, 0, int(stored.lengths[n]))[0].tolist() for n in range(11)]
    assert found == [encoder(record, "").ids for _, record, _ in records]
    assert stored.tokens(3, 2, 5)[0].tolist() == encoder(records[3][1], "").ids[2:5]


def test_token_ids_beyond_the_vocabulary_are_another_models_tokenizer() -> None:
    encoder = TextEncoder(byte_tokenizer(), "text")
    with pytest.raises(InputError, match="token id 257, but the model's vocabulary ends at 199"):
        encode(Record("here", {"text": "a"}), encoder, 200)


def test_held_out_documents_come_from_all_over() -> None:
    chosen = [n for n in range(10_000) if is_held_out(n, 0.02)]
    assert 150 < len(chosen) < 250
    assert max(b - a for a, b in itertools.pairwise(chosen)) < 200
