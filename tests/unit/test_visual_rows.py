"""From a chat with images to a packed row: placeholders, targets, positions, pixels, limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import visual_models
from visual_models import IMAGE_ID, VIDEO_ID, write_chats, write_visual_model

from epctl.errors import InputError
from epctl.runtime.data_batch import Batch
from epctl.runtime.data_encode import Encoded
from epctl.runtime.data_files import find_records
from epctl.runtime.data_packing import IGNORED, PackedRows, whole_spans
from epctl.runtime.data_store import DocumentWriter, StoredDocuments, encode
from epctl.runtime.native_config import config_of
from epctl.runtime.visual_encode import VisualChatEncoder
from epctl.runtime.visual_files import VisualFiles
from epctl.runtime.visual_load import load_visual_processor
from epctl.runtime.visual_packed import PackedProcessor
from epctl.runtime.visual_processor import VisualLimits, VisualProcessor
from epctl.runtime.visual_records import Columns, StoredVisual
from epctl.runtime.visual_rows import VisualData, VisualReader, usable_lengths, without_empty

LENGTH = 157


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl_moe"])
def processor(request: Any, tmp_path_factory: pytest.TempPathFactory) -> PackedProcessor:
    folder = write_visual_model(request.param, tmp_path_factory.mktemp(request.param))
    found = load_visual_processor(folder, config_of(folder), visual_models.tokenizer())
    assert isinstance(found, PackedProcessor)
    return found


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats"))


def encoder_of(processor: VisualProcessor, run: Path, **limits: Any) -> VisualChatEncoder:
    return VisualChatEncoder(
        processor, VisualFiles(run), VisualLimits(**{"sequence_length": LENGTH, **limits}),
        "messages", Columns(),
    )  # fmt: skip


def encode_all(encoder: VisualChatEncoder, chats: Path) -> list[Encoded]:
    records = find_records([str(chats)]).records()
    return [encode(record, encoder, visual_models.VOCAB) for _, record in records]


def stored(documents: list[Encoded], stem: Path) -> StoredDocuments:
    writer = DocumentWriter(stem)
    for number, document in enumerate(documents):
        writer.add(number, document)
    counts = writer.close()
    assert counts.images == sum(v.modality == "image" for d in documents for v in d.visuals)
    return StoredDocuments([stem])


def test_only_the_answer_is_learned_and_each_image_has_its_tokens(
    processor: PackedProcessor, chats: Path, tmp_path: Path
) -> None:
    encoder = encoder_of(processor, tmp_path)
    for number, document in enumerate(encode_all(encoder, chats)):
        ids, trained = np.array(document.ids), np.array(document.trained)
        answer = processor.tokenizer.decode(ids[trained].tolist())
        words = "word " * (number % 4 + 1)
        assert answer == f"it is {number} {words}<|im_end|>"
        for visual in document.visuals:
            own = ids[visual.start : visual.stop]
            token = IMAGE_ID if visual.modality == "image" else VIDEO_ID
            assert (own == token).sum() == np.prod(visual.grid) // 4
        assert (ids == IMAGE_ID).sum() == sum(
            np.prod(v.grid) // 4 for v in document.visuals if v.modality == "image"
        )
        kinds = [(1, 0), (2, 0), (0, number % 8 == 2), (1, 0)][number % 4]
        counted = [sum(v.modality == m for v in document.visuals) for m in ("image", "video")]
        assert counted == list(kinds)


def test_a_clip_of_equal_frames_is_that_image_through_time(processor: PackedProcessor) -> None:
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8))
    still, clip = processor.image(image), processor.clip([image] * 3)
    assert clip.grid == (2, *still.grid[1:])
    torch.testing.assert_close(clip.rows_RF, torch.cat([still.rows_RF] * 2), rtol=0, atol=0)


def test_a_row_holds_several_documents_and_their_pixels(
    processor: PackedProcessor, chats: Path, tmp_path: Path
) -> None:
    """Positions restart with each document, and its rotary ones are those it has alone."""
    encoder = encoder_of(processor, tmp_path)
    documents = stored(encode_all(encoder, chats), tmp_path / "train-0")
    spans = without_empty(whole_spans(usable_lengths(documents, LENGTH), LENGTH, packing=True))
    rows = PackedRows(documents, spans, LENGTH, visual_models.PAD)
    data = object.__new__(VisualData)
    data.reader = VisualReader(processor, encoder.files, encoder.limits)
    index = next(n for n, row in enumerate(spans) if len(row) > 1)
    batch = data.batch_of(rows, [index, 0])
    assert isinstance(batch, Batch)
    assert batch.positions_BS is not None
    assert batch.positions_BS.shape == (4, 2, LENGTH)
    place = 0
    for span in spans[index]:
        here = slice(place, place + span.num_tokens)
        ids_S, visuals = batch.ids_BS[0, here], documents.visuals(span.document)
        assert batch.positions_BS[0, 0, here].tolist() == list(range(span.num_tokens))
        expected = processor.positions(ids_S, visuals)
        assert expected is not None
        assert torch.equal(batch.positions_BS[1:, 0, here], expected)
        assert batch.labels_BS[0, place] == IGNORED
        place = here.stop
    tokens = ((batch.ids_BS == IMAGE_ID).sum(), (batch.ids_BS == VIDEO_ID).sum())
    for name, count in zip(("pixel_values", "pixel_values_videos"), tokens, strict=True):
        assert len(batch.visuals.get(name, ())) == 4 * count
    assert not (batch.labels_BS == IMAGE_ID).any()


def test_a_cut_takes_an_image_whole_or_not_at_all(
    processor: PackedProcessor, chats: Path, tmp_path: Path
) -> None:
    documents = stored(encode_all(encoder_of(processor, tmp_path), chats), tmp_path / "train-0")
    for length in range(8, 60, 7):
        usable = usable_lengths(documents, length)
        assert (usable <= length).all()
        for document, stop in enumerate(usable.tolist()):
            for visual in documents.visuals(document):
                assert stop <= visual.start or stop >= visual.stop
    # The question alone teaches nothing: such a document leaves the rows.
    assert not usable_lengths(documents, 8).any()


def test_limits_are_refused_with_their_numbers(
    processor: PackedProcessor, chats: Path, tmp_path: Path
) -> None:
    small = encoder_of(processor, tmp_path, sequence_length=12)
    with pytest.raises(InputError, match=r"of 40 x 24 pixels takes 15 tokens, a sequence has 12"):
        encode_all(small, chats)
    fewer = encoder_of(processor, tmp_path, max_pixels=256)
    visuals = [v for document in encode_all(fewer, chats) for v in document.visuals]
    assert max(16 * np.prod(v.grid) for v in visuals if v.modality == "image") <= 256


def test_a_file_that_changed_after_it_was_counted_is_named(
    processor: PackedProcessor, tmp_path: Path
) -> None:
    from PIL import Image

    files, path = VisualFiles(tmp_path), tmp_path / "a.png"
    grid = processor.image_grid(48, 32, None)
    Image.new("RGB", (48, 32)).save(path)
    reader = VisualReader(processor, files, VisualLimits(sequence_length=LENGTH))
    visual = StoredVisual("image", (str(path),), (), grid, 0, 0)
    assert reader.document([visual]).grids == [grid]
    Image.new("RGB", (96, 96)).save(path)
    with pytest.raises(InputError, match=r"a\.png` has changed: .* patches now"):
        reader.document([visual])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<image>", "there is no file `.*gone.png`"),
        ("<|image_pad|> <image>", "wrote 2 image placeholders for 1 images"),
    ],
)
def test_records_that_cannot_be_trained_on_are_named(
    processor: PackedProcessor, chats: Path, tmp_path: Path, content: str, message: str
) -> None:
    name = "gone.png" if message.startswith("there") else str(chats.parent / "images/0-0.png")
    record = {
        "images": [name],
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "a"},
        ],
    }
    (tmp_path / "bad.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(InputError, match=message) as caught:
        encode_all(encoder_of(processor, tmp_path), tmp_path / "bad.jsonl")
    assert "line 1" in str(caught.value)


def test_a_model_without_a_processor_is_refused(tmp_path: Path) -> None:
    write_visual_model("qwen2_5_vl", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="a vision-language model and no image processor"):
        load_visual_processor(tmp_path, config_of(tmp_path), visual_models.tokenizer())
