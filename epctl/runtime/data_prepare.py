"""From the `[data]` settings to training data: find, tokenise once, pack. A collective.

Each rank tokenises its share into the run folder; a resumed run finds the files there, and reads on
where they end if a stream was read in part and the run is longer now.
"""

from __future__ import annotations

import json
import math
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from epctl.config import RunConfig
from epctl.config_data import DataSection
from epctl.errors import ConfigError, InputError
from epctl.launch.dataset_reference import PinnedDataset, read_datasets
from epctl.runtime.data_batch import PackedData
from epctl.runtime.data_encode import ChatEncoder, Encoder, TextEncoder
from epctl.runtime.data_files import NumberedRecord, RecordSource, find_records
from epctl.runtime.data_packing import (
    PackedRows,
    chopped_spans,
    stream_spans,
    whole_spans,
)
from epctl.runtime.data_reading import Progress, ShareReader, read_rounds
from epctl.runtime.data_store import (
    DocumentWriter,
    StoredCounts,
    StoredDocuments,
    encode,
    is_held_out,
)
from epctl.runtime.mesh import Mesh
from epctl.runtime.run_settings import num_steps, rows_per_step
from epctl.runtime.visual_encode import VisualChatEncoder
from epctl.runtime.visual_files import VisualFiles
from epctl.runtime.visual_processor import VisualLimits, VisualProcessor
from epctl.runtime.visual_records import Columns
from epctl.runtime.visual_rows import VisualData, VisualReader, usable_lengths, without_empty

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
    images: int
    videos: int
    dataset: str | None


@dataclass(frozen=True)
class Manifest:
    """What lies in the folder: `generations` are the ranks that wrote each set of files."""

    settings: dict[str, Any]
    format: str
    generations: list[int] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    counts: StoredCounts = field(default_factory=StoredCounts)
    held_out: StoredCounts = field(default_factory=StoredCounts)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Returns what was written, None before the first time."""
        path = folder / MANIFEST
        if not path.exists():
            return None
        document = json.loads(path.read_text(encoding="utf-8"))
        progress = Progress(**document.pop("progress"))
        # Older runs did not count what they held out.
        counts = StoredCounts(**document.pop("counts"))
        held_out = StoredCounts(**document.pop("held_out", {}))
        return cls(**document, progress=progress, counts=counts, held_out=held_out)

    def write(self, folder: Path) -> None:
        staging = folder / f"{MANIFEST}.tmp"
        document = asdict(self) | {"progress": self.progress._asdict()}
        staging.write_text(json.dumps(document), encoding="utf-8")
        staging.rename(folder / MANIFEST)


def load_data(
    config: RunConfig,
    folder: Path,
    mesh: Mesh,
    tokenizer: Any,
    vocab_size: int,
    processor: VisualProcessor | None = None,
) -> tuple[PackedData, DataFacts]:
    """Returns the data of a run, tokenised into `folder` unless it already is.

    Hub datasets are read at the commits that the launcher pinned beside `folder`.

    Args:
        processor: of a model that takes images; `messages` records may then hold some.

    Raises InputError (and HubError) for data that is missing, damaged or too little.
    """
    data = config.data
    pinned = read_datasets(folder.parent)
    manifest = Manifest.read(folder)
    stored = _stored_settings(data)
    # Settings that are newer than the run had their defaults then.
    if manifest is not None and _stored_settings(DataSection()) | manifest.settings != stored:
        raise ConfigError(
            f"`{folder}` holds tokens of other data: {manifest.settings}",
            hint="resume with the run's own `--data` settings, or start a new run",
        )
    source = training_source(data, pinned.get("train"))
    if manifest is None:
        manifest = Manifest(stored, _format_on_rank_0(data, source, mesh))
    wanted = _tokens_wanted(config, mesh, source, manifest.format)
    reader = _visual_reader(config, folder, processor) if manifest.format == "messages" else None
    if not _is_enough(manifest, wanted):
        encoder = _encoder(config, manifest.format, tokenizer, reader)
        manifest = _prepare(config, folder, mesh, source, encoder, vocab_size, manifest, wanted)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    together = reader is not None and reader.processor.together
    train, held_out = _rows(config, folder, manifest, pad_id, together=together)
    lengths = train.documents.lengths
    # Of one document only rows are held out.
    counts = manifest.counts if manifest.counts.documents else manifest.held_out
    facts = DataFacts(
        format=manifest.format,
        documents=counts.documents,
        tokens=counts.tokens,
        targets=counts.targets,
        rows=len(train),
        held_out_rows=len(held_out),
        truncated=int((lengths > train.length).sum()) if manifest.format == "messages" else 0,
        without_target=counts.without_target,
        images=counts.images,
        videos=counts.videos,
        dataset=str(pinned["train"]) if "train" in pinned else None,
    )
    window = data.shuffle_window if source.in_part else None
    packed = PackedData(train, held_out, config.train.seed, shuffle=data.shuffle, window=window)
    return packed if reader is None else VisualData.of(packed, reader), facts


def _stored_settings(data: DataSection) -> dict[str, Any]:
    """Returns the settings that decide which tokens are stored; packing and order come later."""
    later = {"packing", "shuffle", "shuffle_window", "streaming"}
    values: dict[str, Any] = json.loads(data.model_dump_json(exclude=later))
    return values


def training_source(data: DataSection, dataset: PinnedDataset | None) -> RecordSource:
    """Returns the training records; without `data.train`, this Python's own library sources."""
    patterns = data.train or (str(Path(sysconfig.get_paths()["stdlib"]) / "*.py"),)
    return find_records(patterns, data.text_key, dataset)


def _format_on_rank_0(data: DataSection, source: RecordSource, mesh: Mesh) -> str:
    """Returns `messages` or `text`; one rank looks, so a download happens once."""
    if data.format != "auto":
        return data.format
    found: list[Any] = [_format(data, source) if mesh.rank == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return str(found[0])


def _format(data: DataSection, source: RecordSource) -> str:
    for _, record in source.records():
        return "messages" if data.messages_key in record.values else "text"
    raise InputError(f"`--data {' '.join(data.train)}` holds no record")


def _visual_reader(
    config: RunConfig, folder: Path, processor: VisualProcessor | None
) -> VisualReader | None:
    if processor is None:
        return None
    data = config.data
    limits = VisualLimits(
        config.train.sequence_length,
        data.max_pixels,
        data.max_frame_pixels,
        data.video_fps,
        data.max_frames,
    )
    return VisualReader(processor, VisualFiles(folder), limits)


def _encoder(config: RunConfig, kind: str, tokenizer: Any, reader: VisualReader | None) -> Encoder:
    data = config.data
    if kind == "messages" and reader is not None:
        columns = Columns(data.images_key, data.videos_key)
        return VisualChatEncoder(
            reader.processor, reader.files, reader.limits, data.messages_key, columns
        )
    if kind == "messages":
        return ChatEncoder(tokenizer, data.messages_key)
    return TextEncoder(tokenizer, data.text_key)


def _stem(folder: Path, split: str, generation: int, rank: int) -> Path:
    return folder / f"{split}-{generation:02d}-{rank:05d}"


def _stems(folder: Path, split: str, manifest: Manifest) -> list[Path]:
    return [
        _stem(folder, split, generation, rank)
        for generation, num_ranks in enumerate(manifest.generations)
        for rank in range(num_ranks)
    ]


def _tokens_wanted(config: RunConfig, mesh: Mesh, source: RecordSource, kind: str) -> int | None:
    """Returns how many tokens to read of what need not be read whole; None for all."""
    if config.train.epochs is not None or not source.in_part:
        return None
    num_rows = num_steps(config.train, mesh, None) * rows_per_step(
        config.train, mesh.num_data_ranks
    )
    # Whole windows, so that their order does not change when the run goes on further.
    window = config.data.shuffle_window
    return _tokens_that_fill(math.ceil(num_rows / window) * window, config, kind)


def _tokens_that_fill(num_rows: int, config: RunConfig, kind: str) -> int:
    """Returns tokens that fill `num_rows` rows and begin another, however they are packed."""
    # Two neighbours among rows of whole documents always hold more than one row's length.
    factor = 2 if kind == "messages" else 1
    return factor * (num_rows + 1) * config.train.sequence_length


def _is_enough(manifest: Manifest, wanted: int | None) -> bool:
    progress = manifest.progress
    return progress.exhausted or (wanted is not None and progress.tokens >= wanted)


def _prepare(
    config: RunConfig,
    folder: Path,
    mesh: Mesh,
    source: RecordSource,
    encoder: Encoder,
    vocab_size: int,
    before: Manifest,
    wanted: int | None,
) -> Manifest:
    """Tokenises this rank's share of what `before` lacks; the manifest comes last."""
    data, length = config.data, config.train.sequence_length
    folder.mkdir(parents=True, exist_ok=True)
    generation = len(before.generations)
    writers = {
        name: DocumentWriter(_stem(folder, name, generation, mesh.rank))
        for name in ("train", "eval")
    }

    def add(split: str, number: int, item: NumberedRecord) -> int:
        document = encode(item[1], encoder, vocab_size)
        stored = writers[split].add(number, document)
        # Of a chat longer than a row only the row's length is used.
        return min(stored, length) if before.format == "messages" else stored

    share = 0.0 if data.eval else data.held_out_share

    def add_training(number: int, item: NumberedRecord) -> int:
        if is_held_out(number, share):
            add("eval", number, item)
            return 0
        return add("train", number, item)

    if data.eval and not generation:
        held_out = find_records(data.eval, data.text_key, read_datasets(folder.parent).get("eval"))
        reader = ShareReader(held_out, mesh.rank, mesh.num_ranks)
        needed = _held_out_tokens(config, mesh, held_out, before.format)
        read_rounds(reader, Progress(), needed, lambda n, item: add("eval", n, item), _over_ranks)
    reader = ShareReader(source, mesh.rank, mesh.num_ranks, before.progress.records)
    progress = read_rounds(reader, before.progress, wanted, add_training, _over_ranks)
    own = [writers[name].close() for name in ("train", "eval")]
    gathered: list[Any] = [None] * mesh.num_ranks
    dist.all_gather_object(gathered, own)
    manifest = Manifest(
        before.settings,
        before.format,
        [*before.generations, mesh.num_ranks],
        progress,
        sum((train for train, _ in gathered), before.counts),
        sum((held_out for _, held_out in gathered), before.held_out),
    )
    if mesh.rank == 0:
        manifest.write(folder)
    dist.barrier()
    return manifest


def _held_out_tokens(config: RunConfig, mesh: Mesh, source: RecordSource, kind: str) -> int | None:
    """Returns the tokens that an evaluation looks at; None to read all of a source."""
    if not source.in_part:
        return None
    train = config.train
    num_rows = train.eval_batches * train.micro_batch_size * mesh.num_data_ranks
    return _tokens_that_fill(num_rows, config, kind)


def _over_ranks(tokens: int, exhausted: bool) -> tuple[int, bool]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (tokens, exhausted))
    return sum(item[0] for item in gathered), all(item[1] for item in gathered)


def _rows(
    config: RunConfig, folder: Path, manifest: Manifest, pad_id: int, *, together: bool
) -> tuple[PackedRows, PackedRows]:
    """Returns (training rows, held-out rows): by document, or the last rows of too few documents.

    Of a stream that goes on, the rows of whole windows: the last ones may change with what follows.

    Raises InputError if there are not two rows.
    """
    length = config.train.sequence_length
    train, held_out = (
        _packed(
            StoredDocuments(_stems(folder, split, manifest)),
            length,
            manifest.format,
            pad_id,
            packing=config.data.packing,
            together=together,
        )
        for split in ("train", "eval")
    )
    if not manifest.progress.exhausted:
        window = config.data.shuffle_window
        train = train.first((len(train) - 1) // window * window)
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
    documents: StoredDocuments,
    length: int,
    kind: str,
    pad_id: int,
    *,
    packing: bool,
    together: bool,
) -> PackedRows:
    if kind == "messages":
        usable = usable_lengths(documents, length, together=together)
        spans = without_empty(whole_spans(usable, length, packing=packing))
    elif packing:
        spans = stream_spans(documents.lengths, length)
    else:
        spans = chopped_spans(documents.lengths, length)
    return PackedRows(documents, spans, length, pad_id)
