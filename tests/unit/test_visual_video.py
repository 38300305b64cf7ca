"""Videos in files: which frames are taken, that they are those of the file, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import visual_models
from PIL import Image
from visual_models import write_visual_model

from epctl.errors import InputError
from epctl.runtime.data_encode import Encoded
from epctl.runtime.data_files import find_records
from epctl.runtime.data_store import encode
from epctl.runtime.native_config import config_of
from epctl.runtime.visual_encode import VisualChatEncoder
from epctl.runtime.visual_files import VisualFiles
from epctl.runtime.visual_load import load_visual_processor
from epctl.runtime.visual_processor import VisualLimits
from epctl.runtime.visual_records import Columns
from epctl.runtime.visual_rows import VisualReader
from epctl.runtime.visual_video import measure, read_frames

CODECS = {"mp4": "mpeg4", "mkv": "mpeg4", "avi": "mpeg4", "webm": "libvpx-vp9"}
STEP = 10  # of grey, from one frame to the next; codecs are off by one or two


def write_video(path: Path, count: int = 25, rate: int = 10, rotation: float = 0) -> Path:
    """Writes frames of 32 x 24 pixels, each a shade lighter; the first rows are black."""
    av = pytest.importorskip("av")  # of the `dev` extra
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix[1:]], rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for n in range(count):
            pixels = np.full((24, 32, 3), n * STEP, np.uint8)
            pixels[:8] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def shades(images: list[Any], place: tuple[int, int] = (16, 20)) -> list[int]:
    return [round(image.getpixel(place)[0] / STEP) for image in images]


@pytest.mark.parametrize("form", CODECS)
def test_so_many_frames_follow_each_other_in_a_second(tmp_path: Path, form: str) -> None:
    """2.5 seconds, at 2 frames a second, spread over the whole."""
    write_video(tmp_path / f"a.{form}")
    files = VisualFiles(tmp_path)
    facts = files.clip(f"a.{form}", tmp_path, "here", own_fps=None, fps=2.0, max_frames=64)
    assert (facts.frames, facts.size) == ((0, 6, 12, 18, 24), (32, 24))
    assert facts.fps == pytest.approx(2.0)
    images = files.frames(facts.files, facts.frames)
    assert shades(images) == [0, 6, 12, 18, 24]
    assert {(image.mode, image.size) for image in images} == {("RGB", (32, 24))}
    fewer = files.clip(f"a.{form}", tmp_path, "here", own_fps=None, fps=2.0, max_frames=3)
    assert (fewer.frames, fewer.fps) == ((0, 12, 24), pytest.approx(1.2))


def test_a_video_in_a_table_is_kept_as_bytes(tmp_path: Path) -> None:
    content = write_video(tmp_path / "a.mp4").read_bytes()
    files = VisualFiles(tmp_path / "run")
    facts = files.clip({"bytes": content}, None, "x", own_fps=None, fps=1.0, max_frames=64)
    assert shades(files.frames(facts.files, facts.frames)) == [0, 24]


def test_a_video_that_was_turned_is_shown_upright(tmp_path: Path) -> None:
    """The black rows above go to the left where a player turns it against the clock."""
    path = write_video(tmp_path / "a.mp4", rotation=90)
    assert measure(path).size == (24, 32)
    (image,) = read_frames(path, [20])
    assert shades([image], (3, 16)) == [0]
    assert shades([image], (20, 16)) == [20]


def test_a_clip_of_a_file_is_the_clip_of_its_frames(tmp_path: Path) -> None:
    """Tokens, timestamps and pixels: of the file, and of the same frames given one by one."""
    video = write_video(tmp_path / "a.mp4")
    frames = []
    for number in (0, 6, 12, 18, 24):
        frames.append(f"{number}.png")
        read_frames(video, [number])[0].save(tmp_path / frames[-1])
    folder = write_visual_model("qwen3_vl_moe", tmp_path / "model")
    processor = load_visual_processor(folder, config_of(folder), visual_models.tokenizer())
    limits = VisualLimits(sequence_length=400)
    files = VisualFiles(tmp_path / "run")
    encoder = VisualChatEncoder(processor, files, limits, "messages", Columns())
    clips = [{"type": "video", "video": "a.mp4"}, {"type": "video", "video": frames, "fps": 2.0}]
    found = [encoded(encoder, tmp_path, clip) for clip in clips]
    assert found[0].ids == found[1].ids
    assert found[0].trained == found[1].trained
    reader = VisualReader(processor, files, limits)
    own, given = (reader.document(document.visuals).inputs for document in found)
    assert own.keys() == given.keys() == {"pixel_values_videos", "video_grid_thw"}
    assert all(torch.equal(own[name], given[name]) for name in own)


def encoded(encoder: VisualChatEncoder, folder: Path, clip: dict[str, Any]) -> Encoded:
    user = {"role": "user", "content": [clip, {"type": "text", "text": "what?"}]}
    record = {"messages": [user, {"role": "assistant", "content": "grey"}]}
    path = folder / "chat.jsonl"
    path.write_text(json.dumps(record) + "\n")
    ((_, record_read),) = find_records([str(path)]).records()
    return encode(record_read, encoder, visual_models.VOCAB)


def test_without_the_library_the_hint_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"\x00\x00\x00\x20ftypisom")
    with pytest.raises(InputError, match=r"line 3: `.*a\.mp4` is no image, .* `av` \(PyAV\)") as e:
        VisualFiles(tmp_path).clip("a.mp4", tmp_path, "line 3", own_fps=None, fps=2, max_frames=9)
    assert e.value.hint is not None
    assert "pip install 'epctl[video]'" in e.value.hint
    Image.new("RGB", (8, 8)).save(tmp_path / "a.gif")  # needs no library
    facts = VisualFiles(tmp_path).clip("a.gif", tmp_path, "x", own_fps=None, fps=2, max_frames=9)
    assert facts.num_frames == 1


def test_a_file_that_is_no_video_is_named(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:-300])
    (tmp_path / "text.mp4").write_text("hello " * 100)
    for name in ("cut.mp4", "text.mp4"):
        with pytest.raises(InputError, match=rf"here: `.*{name}` is neither an image nor a video"):
            VisualFiles(tmp_path).clip(name, tmp_path, "here", own_fps=None, fps=2, max_frames=9)


def test_a_file_that_lost_frames_is_named(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", count=5)
    with pytest.raises(InputError, match=r"a\.mp4` gives 2 of the 3 frames .* number 9"):
        read_frames(video, [0, 4, 9])


def test_sound_is_no_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        samples = np.zeros((1, 800), np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(InputError, match=r"x: `.*a\.wav` holds no video, only sound"):
        measure(tmp_path / "a.wav", "x: ")
