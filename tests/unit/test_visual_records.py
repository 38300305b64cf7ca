"""What a record says of images, whatever way it says it, and what is wrong with a record."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from epctl.errors import InputError
from epctl.runtime.visual_files import VisualFiles
from epctl.runtime.visual_records import Columns, Source, read_visuals

PART = {"type": "image"}


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("content", "columns", "expected", "values"),
    [
        ([PART, text("a")], ["x"], [PART, text("a")], ["x"]),
        ([{"type": "image", "image": "y", "text": None}], [], [PART], ["y"]),
        ([{"type": "image_url", "image_url": {"url": "z"}}], [], [PART], ["z"]),
        ("a <image> b <image>", ["x", "y"], [text("a "), PART, text(" b "), PART], ["x", "y"]),
        ("a", ["x", "y"], [PART, PART, text("a")], ["x", "y"]),
        ("a <image> b", [], "a <image> b", []),
        ([PART, {"type": "image", "path": "p"}, PART], ["x", "y"], [PART] * 3, ["x", "p", "y"]),
    ],
)
def test_every_form_gives_parts_and_sources(
    content: Any, columns: list[str], expected: Any, values: list[str]
) -> None:
    messages = user(content)
    found, sources = read_visuals({"images": columns}, messages, Columns(), "here")
    assert found[0]["content"] == expected
    assert found[1] == messages[1]
    assert [source.value for source in sources] == values
    assert messages == user(content), "the record itself stays as it was"


def test_a_video_is_a_list_of_frames_or_a_name() -> None:
    content = [{"type": "video", "video": ["a", "b"], "fps": 4}, PART]
    record = {"images": ["x"], "videos": None}
    _, sources = read_visuals(record, user(content), Columns(), "here")
    assert sources == [Source("video", ["a", "b"], 4.0), Source("image", "x")]


@pytest.mark.parametrize(
    ("content", "images", "message"),
    [
        ([PART, PART], ["x"], "speak of 2 images, `images` holds 1"),
        ("<image>", ["x", "y"], "speak of 1 images, `images` holds 2"),
        ("<image> <image>", ["x"], "speak of 2 images, `images` holds 1"),
        ([{"type": "audio"}], [], "content part of type `audio`"),
        ("a", 5, "`images` is int, not a list"),
    ],
)
def test_numbers_that_disagree_are_an_error(content: Any, images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_visuals({"images": images}, user(content), Columns(), "here")


def encoded(size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (9, 8, 7)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_bytes_are_kept_once_under_their_digest(tmp_path: Path) -> None:
    files = VisualFiles(tmp_path / "data")
    uri = "data:image/png;base64," + base64.b64encode(encoded()).decode()
    forms = [encoded(), {"bytes": encoded(), "path": "elsewhere.png"}, uri]
    names = {files.keep(form, None, "here") for form in forms}
    assert len(names) == 1
    (name,) = names
    assert files.open(name).size == (6, 4)
    # What a run resumed in a folder that was moved finds all the same.
    (tmp_path / "data").rename(tmp_path / "moved")
    assert VisualFiles(tmp_path / "moved").open(name).size == (6, 4)
    assert files.open(files.keep(Image.new("L", (3, 5)), None, "here")).mode == "RGB"


def test_paths_are_relative_to_the_data_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded())
    files = VisualFiles(tmp_path / "run")
    for value in ("a.png", {"bytes": None, "path": "a.png"}, f"file://{tmp_path}/a.png"):
        assert files.open(files.keep(value, tmp_path, "here")).size == (6, 4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("b.png", "line 3: there is no file `.*b.png`"),
        ("https://example.org/a.png", "is on the network"),
        ("data:image/png;base64,@@@x", "is no image in base64"),
        (7, "given as int"),
    ],
)
def test_what_cannot_be_kept_says_why(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VisualFiles(tmp_path).keep(value, tmp_path, "line 3")


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(encoded((64, 64))[:-60])
    (tmp_path / "none.png").write_text("hello")
    for name in ("cut.png", "none.png"):
        with pytest.raises(InputError, match=f"{name}` is no image that can be read"):
            VisualFiles(tmp_path).open(name)


def test_clips_are_thinned_out_and_keep_their_pace(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(21)]
    # 100 ms a frame: 2.1 seconds.
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], duration=100)
    files = VisualFiles(tmp_path)
    facts = files.clip("a.png", tmp_path, "here", own_fps=None, fps=2.0, max_frames=64)
    assert facts.frames == (0, 7, 13, 20)
    assert facts.fps == pytest.approx(10 * 4 / 21)
    images = files.frames(facts.files, facts.frames)
    assert [image.getpixel((0, 0))[0] for image in images] == [0, 7, 13, 20]
    given = [frame.copy() for frame in frames[:5]]
    facts = files.clip(given, None, "here", own_fps=3.0, fps=2.0, max_frames=3)
    assert (facts.num_frames, facts.fps) == (3, pytest.approx(3 * 3 / 5))


def test_frames_of_unlike_sizes_are_refused(tmp_path: Path) -> None:
    given = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]
    with pytest.raises(InputError, match=r"sizes \[\(8, 8\), \(8, 9\)\]"):
        VisualFiles(tmp_path).clip(given, None, "x", own_fps=None, fps=2.0, max_frames=9)


def test_parquet_columns_of_images_are_kept_as_bytes(tmp_path: Path) -> None:
    """As `datasets` writes them: an image column, content parts with a field of None."""
    datasets = pytest.importorskip("datasets")
    from epctl.runtime.data_files import find_records

    rows = {
        "images": [[Image.new("RGB", (6, 4), (n, 0, 0))] for n in range(2)],
        "messages": [user([{**PART, "text": None}, {"type": "text", "text": "a"}])] * 2,
    }
    rows["messages"] = [[chat[0]] for chat in rows["messages"]]
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [
                        {"type": datasets.Value("string"), "text": datasets.Value("string")}
                    ],
                }
            ],
        }
    )
    path = tmp_path / "chats.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    files = VisualFiles(tmp_path / "run")
    for number, (_, record) in enumerate(find_records([str(path)]).records()):
        messages, (source,) = read_visuals(
            record.values, record.values["messages"], Columns(), record.where
        )
        assert messages[0]["content"] == [PART, text("a")]
        image = files.open(files.keep(source.value, record.folder, record.where))
        assert image.getpixel((0, 0)) == (number, 0, 0)
