"""Models of whole images and tiles: tokens and inputs are those of the model's own processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tile_models
import torch
from PIL import Image
from tile_models import HERE, SIZES, write_tile_model
from visual_models import VOCAB, write_chats

from epctl.errors import InputError, LayoutError
from epctl.runtime.build import meta_model
from epctl.runtime.data_encode import Encoded
from epctl.runtime.data_files import find_records
from epctl.runtime.data_packing import PackedRows, whole_spans
from epctl.runtime.data_store import DocumentWriter, StoredDocuments, encode
from epctl.runtime.native_config import config_of
from epctl.runtime.sequence.units import unreached
from epctl.runtime.training_model import load_tokenizer
from epctl.runtime.visual_encode import VisualChatEncoder
from epctl.runtime.visual_files import VisualFiles
from epctl.runtime.visual_load import load_visual_processor
from epctl.runtime.visual_processor import Opened, VisualLimits
from epctl.runtime.visual_records import Columns, StoredVisual
from epctl.runtime.visual_rows import VisualData, VisualReader, usable_lengths, whole_stop
from epctl.runtime.visual_tiles import TileProcessor

LIMITS = VisualLimits(sequence_length=400)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in HERE:
        write_tile_model(name, root / name)
    return root


def load(folder: Path) -> TileProcessor:
    tokenizer = load_tokenizer(str(folder), trust_remote_code=False)
    found = load_visual_processor(folder, config_of(folder), tokenizer)
    assert isinstance(found, TileProcessor)
    return found


@pytest.fixture(params=HERE)
def processor(request: Any, folders: Path) -> TileProcessor:
    return load(folders / request.param)


def noise(size: tuple[int, int]) -> Any:
    pixels = np.random.default_rng(0).integers(0, 256, (*reversed(size), 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(processor: TileProcessor, run: Path, chats: Path) -> list[Encoded]:
    encoder = VisualChatEncoder(processor, VisualFiles(run), LIMITS, "messages", Columns())
    return [encode(r, encoder, VOCAB) for _, r in find_records([str(chats)]).records()]


@pytest.mark.parametrize("count", [1, 2])
def test_an_image_has_as_many_tokens_as_the_model_makes_of_it(
    processor: TileProcessor, folders: Path, count: int
) -> None:
    """Asked of the model itself, for every size of image, alone and with another in its text."""
    from transformers import AutoModelForImageTextToText

    folder = folders / Path(processor.tokenizer.name_or_path).name
    model = AutoModelForImageTextToText.from_pretrained(folder)
    for size in SIZES:
        opened = [Opened("image", [noise(size)])] * count
        inputs = processor.join([processor.document(opened, LIMITS)])
        with torch.no_grad():
            features = model.get_image_features(**inputs).pooler_output
        rows = torch.cat([f.reshape(-1, f.shape[-1]) for f in features])
        place = processor.image_place(size, count, LIMITS)
        assert place.grid == (1, size[1], size[0])
        assert count * place.ids.count(processor.image_id) == len(rows)


@pytest.mark.parametrize("name", ["llava", "llava_next", "idefics3"])
def test_tokens_of_a_chat_are_those_of_transformers(
    folders: Path, tmp_path: Path, name: str
) -> None:
    """Its combined processor, by its own class; the others' need torchvision for their videos."""
    from transformers.models.auto.processing_auto import processor_class_from_name

    processor = load(folders / name)
    chats = write_chats(tmp_path / "chats", video=False)
    kind: Any = processor_class_from_name(type(processor.combined).__name__)
    own = kind(
        tile_models.KINDS[name].processor(), processor.tokenizer, **tile_models.KINDS[name].settings
    )
    files = VisualFiles(tmp_path)
    for number, document in enumerate(encoded(processor, tmp_path, chats)):
        text = processor.tokenizer.decode(document.ids)
        for visual in reversed(document.visuals):
            before = processor.tokenizer.decode(document.ids[: visual.start])
            written = processor.tokenizer.decode(document.ids[visual.start : visual.stop])
            assert text.startswith(before + written)
            after = text[len(before + written) :]
            text = before + own.image_token + after
        images = [files.open(v.files[0]) for v in document.visuals]
        found = own(images=[images] if images else None, text=[text], add_special_tokens=False)
        assert found["input_ids"][0] == document.ids, number


def test_the_inputs_of_a_document_are_those_of_the_image_processor(
    processor: TileProcessor,
) -> None:
    name = Path(processor.tokenizer.name_or_path).name
    for sizes in (SIZES[:1], SIZES[1:3]):
        images = [noise(size) for size in sizes]
        document = processor.document([Opened("image", [i]) for i in images], LIMITS)
        found, expected = processor.join([document]), tile_models.plain_images(name, images)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], torch.as_tensor(value), rtol=0, atol=0)


def test_documents_of_unlike_images_are_padded_to_one_batch(processor: TileProcessor) -> None:
    apart = [processor.document([Opened("image", [noise(size)])], LIMITS) for size in SIZES]
    inputs = processor.join(apart)
    batched = "pixel_attention_mask" in inputs
    pixels = inputs["pixel_values"][0] if batched else inputs["pixel_values"]
    place = 0
    for document in apart:
        own = document.inputs["pixel_values"]
        here = pixels[place : place + len(own)]
        cut = here[tuple(slice(0, size) for size in own.shape)]
        assert torch.equal(cut, own)
        assert here.count_nonzero() == cut.count_nonzero()
        place += len(own)
    assert place == len(pixels)


def test_only_the_answer_is_learned(processor: TileProcessor, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats", count=8, video=False)
    for number, document in enumerate(encoded(processor, tmp_path, chats)):
        ids, trained = np.array(document.ids), np.array(document.trained)
        words = "word " * (number % 4 + 1)
        answer = processor.tokenizer.decode(ids[trained].tolist())
        assert answer == f"it is {number} {words}<|im_end|>"
        assert len(document.visuals) == (1, 2, 0, 1)[number % 4]


def test_max_pixels_makes_fewer_tiles(folders: Path) -> None:
    processor = load(folders / "internvl")
    few = VisualLimits(sequence_length=400, max_pixels=200)
    size = (64, 64)
    counted = [processor.image_place(size, 1, limits) for limits in (LIMITS, few)]
    assert counted[0].grid == counted[1].grid
    assert len(counted[0].ids) > len(counted[1].ids)
    document = processor.document([Opened("image", [noise(size)])], few)
    tiles = len(document.inputs["pixel_values"])
    assert counted[1].ids.count(processor.image_id) == 4 * tiles


def test_images_that_belong_together_go_together(folders: Path, tmp_path: Path) -> None:
    """Of several images LLaVA-OneVision divides none: one that were left alone would be divided."""
    first, second = (StoredVisual("image", ("x",), (), (1, 8, 8), s, s + 9) for s in (5, 20))
    assert whole_stop((first, second), 24, together=False) == 20
    assert whole_stop((first, second), 24, together=True) == 5
    assert whole_stop((first, second), 29, together=True) == 29
    assert whole_stop((first,), 18, together=True) == 18
    processor = load(folders / "llava_onevision")
    assert processor.together
    chats = write_chats(tmp_path / "chats", count=8, video=False)
    documents = encoded(processor, tmp_path, chats)
    writer = DocumentWriter(tmp_path / "train-0")
    for number, document in enumerate(documents):
        writer.add(number, document)
    writer.close()
    stored = StoredDocuments([tmp_path / "train-0"])
    length = documents[1].visuals[1].start + 3
    assert usable_lengths(stored, length, together=True)[1] == 0  # only the question is left
    rows = PackedRows(stored, whole_spans(stored.lengths, 400, packing=True), 400, 0)
    data = object.__new__(VisualData)
    data.reader = VisualReader(processor, VisualFiles(tmp_path), LIMITS)
    batch = data.batch_of(rows, list(range(len(rows))))
    assert batch.positions_BS is not None
    assert batch.positions_BS.dim() == 2  # a plain count
    assert batch.visuals["batch_num_images"].tolist() == [1, 2, 1, 1, 2, 1]
    assert len(batch.visuals["pixel_values"]) == 8


def test_a_file_that_changed_is_named_by_its_pixels(folders: Path, tmp_path: Path) -> None:
    processor = load(folders / "llava")
    noise((24, 16)).save(tmp_path / "a.png")
    reader = VisualReader(processor, VisualFiles(tmp_path), LIMITS)
    visual = StoredVisual("image", (str(tmp_path / "a.png"),), (), (1, 16, 24), 0, 4)
    assert reader.document([visual]).grids == [visual.grid]
    noise((24, 20)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"has changed: \(1, 20, 24\) pixels now"):
        reader.document([visual])


def test_a_clip_is_frames_that_are_not_cut(folders: Path, tmp_path: Path) -> None:
    """InternVL's frames are written with a number each and enter as images, in their place."""
    processor = load(folders / "internvl")
    place = processor.clip_place(3, 2.0, (64, 64), LIMITS)
    one = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    assert processor.tokenizer.decode(place.ids) == "\n".join(f"Frame{n}: {one}" for n in (1, 2, 3))
    assert place.grid == (3, 64, 64)
    frames, image = [noise((64, 64))] * 3, noise((24, 16))
    document = processor.document([Opened("video", frames), Opened("image", [image])], LIMITS)
    assert document.grids == [(3, 64, 64), (1, 16, 24)]
    pixels = document.inputs["pixel_values"]
    alone = tile_models.plain_images("internvl", [image])["pixel_values"]
    assert len(pixels) == 3 + len(alone)
    assert torch.equal(pixels[3:], alone)
    assert torch.equal(pixels[0], pixels[2])


def test_a_clip_is_refused_by_its_record(folders: Path, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats")
    with pytest.raises(InputError, match="line 3: the model \\(`llava`\\) takes no video"):
        encoded(load(folders / "llava"), tmp_path, chats)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("llava", {"encoder.layers.2", "post_layernorm"}), ("llava_onevision", {"post_layernorm"}),
     ("internvl", set()), ("idefics3", set())],
)  # fmt: skip
def test_what_no_loss_reaches_is_not_trained(folders: Path, name: str, parts: set[str]) -> None:
    """LLaVA-1.5 looks at the last layer but one; nothing says what the last should become."""
    model = meta_model(config_of(folders / name), torch.float32)
    unused = {id(p) for p in unreached(model)}
    tower = "model.vision_tower."
    for key, parameter in model.named_parameters():
        expected = any(key.startswith(f"{tower}{part}.") for part in parts)
        assert (id(parameter) in unused) == expected, key


def copy_of(folder: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize(
    ("name", "file", "change", "error", "message"),
    [
        ("llava", "processor_config.json", {}, InputError, "cannot say how an image is written"),
        ("internvl", "tokenizer_config.json", {"context_image_token": None}, InputError,
         "holds no whole processor"),
        ("llava", "config.json", {"image_token_id": 7, "image_token_index": 7}, LayoutError,
         "without the token 7"),
    ],
)  # fmt: skip
def test_a_processor_that_is_not_whole_is_refused(
    folders: Path, tmp_path: Path, name: str, file: str, change: dict[str, Any],
    error: type[Exception], message: str,
) -> None:  # fmt: skip
    folder = copy_of(folders / name, tmp_path / name)
    before = json.loads((folder / file).read_text())
    after = {} if not change else before | change
    (folder / file).write_text(json.dumps(after))
    with pytest.raises(error, match=message):
        load(folder)


def test_a_clip_that_is_written_in_another_way_is_refused(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = load(folders / "internvl")
    monkeypatch.setattr(processor.combined, "image_seq_length", 5)
    assert processor._frame_tokens == 5
    monkeypatch.setattr(processor.combined, "image_seq_length", 3)
    with pytest.raises(LayoutError, match=r"clip of 2 frames with 6 image tokens, .* has 5"):
        processor.clip_place(2, 2.0, (64, 64), LIMITS)


def test_what_comes_with_pixels_and_is_not_known_is_refused(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("epctl.runtime.visual_tiles.KNOWN", frozenset({"pixel_values"}))
    with pytest.raises(
        LayoutError, match=r"`llava_next`: .* gives `image_sizes` beside the pixels"
    ):
        load(folders / "llava_next")


def test_a_processor_whose_package_is_missing_is_refused(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Pixtral's without torchvision: transformers then gives a class that raises."""

    class Absent:
        @staticmethod
        def get_attributes() -> list[str]:
            raise ImportError("PixtralProcessor requires the Torchvision library")

    monkeypatch.setattr("epctl.runtime.visual_tiles.combined_class", lambda config: Absent)
    with pytest.raises(InputError, match="not installed: PixtralProcessor requires the Torchv"):
        load(folders / "llava")
