"""From the `[data]` settings to training data: find, tokenise once, pack. A collective.

Each rank tokenises its share into the run folder; a resumed run finds the files there.
"""

from __future__ import annotations

import json
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from epctl.config import DataSection, RunConfig
from epctl.errors import ConfigError, InputError
from epctl.runtime.data_batch import PackedData
from epctl.runtime.data_encode import ChatEncoder, Encoder, TextEncoder
from epctl.runtime.data_files import RecordSource, find_records
from epctl.runtime.data_packing import (
    Documents,
    PackedRows,
    chopped_spans,
    stream_spans,
    whole_spans,
)
from epctl.runtime.data_store import (
    DocumentWriter,
    StoredCounts,
    StoredDocuments,
    encode_share,
    is_held_out,
)
from epctl.runtime.mesh import Mesh

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class DataFacts:
    """What the data came to, for the plan."""

    format: str
    documents: int
    tokens: int
    targets: int
    rows: int
    held_out_rows: int
    truncated: int
    without_target: int


def load_data(
    config: RunConfig, folder: Path, mesh: Mesh, tokenizer: Any, vocab_size: int
) -> tuple[PackedData, DataFacts]:
    """Returns the data of a run, tokenised into `folder` unless it already is.

    Raises InputError (and HubError) for data that is missing, damaged or too little.
    """
    source = training_source(config.data)
    kind = _format(config.data, source)
    if not (folder / MANIFEST).exists():
        _prepare(config, folder, mesh, source, _encoder(config.data, kind, tokenizer), vocab_size)
    counts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if counts["settings"] != _stored_settings(config.data):
        raise ConfigError(
            f"`{folder}` holds tokens of other data: {counts['settings']}",
            hint="resume with the run's own `--data` settings, or start a new run",
        )
    num_parts = counts["num_ranks"]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    train, held_out = _rows(config, folder, num_parts, kind, pad_id)
    lengths = train.documents.lengths
    facts = DataFacts(
        format=kind,
        documents=counts["documents"],
        tokens=counts["tokens"],
        targets=counts["targets"],
        rows=len(train),
        held_out_rows=len(held_out),
        truncated=int((lengths > train.length).sum()) if kind == "messages" else 0,
        without_target=counts["without_target"],
    )
    shuffle = config.data.shuffle
    return PackedData(train, held_out, config.train.seed, shuffle=shuffle), facts


def _stored_settings(data: DataSection) -> dict[str, Any]:
    """Returns the settings that decide which tokens are stored; packing and order come later."""
    later = {"packing", "shuffle"}
    values: dict[str, Any] = json.loads(data.model_dump_json(exclude=later))
    return values


def training_source(data: DataSection) -> RecordSource:
    """Returns the training records; without `data.train`, this Python's own library sources."""
    patterns = data.train or (str(Path(sysconfig.get_paths()["stdlib"]) / "*.py"),)
    return find_records(patterns, data.split, data.text_key)


def _format(data: DataSection, source: RecordSource) -> str:
    if data.format != "auto":
        return data.format
    for _, record in source.records():
        return "messages" if data.messages_key in record else "text"
    raise InputError(f"`--data {' '.join(data.train)}` holds no record")


def _encoder(data: DataSection, kind: str, tokenizer: Any) -> Encoder:
    if kind == "messages":
        return ChatEncoder(tokenizer, data.messages_key)
    return TextEncoder(tokenizer, data.text_key)


def _stem(folder: Path, split: str, rank: int) -> Path:
    return folder / f"{split}-{rank:05d}"


def _prepare(
    config: RunConfig,
    folder: Path,
    mesh: Mesh,
    source: RecordSource,
    encoder: Encoder,
    vocab_size: int,
) -> None:
    """Tokenises this rank's share; the manifest is written when every rank is done."""
    data = config.data
    folder.mkdir(parents=True, exist_ok=True)
    writers = {name: DocumentWriter(_stem(folder, name, mesh.rank)) for name in ("train", "eval")}
    share = 0.0 if data.eval else data.held_out_share
    budget = _token_budget(config, mesh) if source.dataset else None
    for index, document in encode_share(
        source.records(), mesh.rank, mesh.num_ranks, encoder, vocab_size
    ):
        writers["eval" if is_held_out(index, share) else "train"].add(index, document)
        if budget is not None and writers["train"].counts.tokens >= budget:
            break
    if data.eval:
        held_out = find_records(data.eval, data.eval_split, data.text_key)
        for index, document in encode_share(
            held_out.records(), mesh.rank, mesh.num_ranks, encoder, vocab_size
        ):
            writers["eval"].add(index, document)
    counts = {name: writer.close() for name, writer in writers.items()}
    gathered: list[Any] = [None] * mesh.num_ranks
    dist.all_gather_object(gathered, counts["train"])
    if mesh.rank == 0:
        _write_manifest(folder, gathered, _stored_settings(data))
    dist.barrier()


def _token_budget(config: RunConfig, mesh: Mesh) -> int | None:
    """Tokens a rank needs of a hub dataset: a run of known length reads no further."""
    train = config.train
    if train.epochs is not None:
        return None
    tokens_per_step = (
        train.micro_batch_size
        * train.gradient_accumulation_steps
        * train.sequence_length
        * mesh.num_ranks
    )
    total = train.tokens if train.tokens is not None else train.steps * tokens_per_step
    return (total + tokens_per_step) // mesh.num_ranks + train.sequence_length


def _write_manifest(folder: Path, gathered: list[StoredCounts], settings: dict[str, Any]) -> None:
    names = asdict(StoredCounts()).keys()
    totals = {name: sum(getattr(counts, name) for counts in gathered) for name in names}
    staging = folder / f"{MANIFEST}.tmp"
    document = {"num_ranks": len(gathered), **totals, "settings": settings}
    staging.write_text(json.dumps(document), encoding="utf-8")
    staging.rename(folder / MANIFEST)


def _rows(
    config: RunConfig, folder: Path, num_parts: int, kind: str, pad_id: int
) -> tuple[PackedRows, PackedRows]:
    """Returns (training rows, held-out rows): by document, or the last rows of too few documents.

    Raises InputError if there are not two rows.
    """
    length = config.train.sequence_length
    train, held_out = (
        _packed(
            StoredDocuments([_stem(folder, split, rank) for rank in range(num_parts)]),
            length,
            kind,
            pad_id,
            packing=config.data.packing,
        )
        for split in ("train", "eval")
    )
    if not len(held_out) or not len(train):
        whole = train if len(train) else held_out
        if len(whole) < 2:
            raise InputError(
                f"the data fills {len(whole)} sequences of {length} tokens "
                f"({int(whole.documents.lengths.sum())} tokens in all); 2 are needed, one to hold "
                "out",
                hint="give more data, `--eval-data`, or a smaller `--set train.sequence_length=N`",
            )
        train, held_out = whole.split_tail(config.data.held_out_share)
    return train, held_out


def _packed(
    documents: Documents, length: int, kind: str, pad_id: int, *, packing: bool
) -> PackedRows:
    if kind == "messages":
        spans = whole_spans(documents.lengths, length, packing=packing)
    elif packing:
        spans = stream_spans(documents.lengths, length)
    else:
        spans = chopped_spans(documents.lengths, length)
    return PackedRows(documents, spans, length, pad_id)
