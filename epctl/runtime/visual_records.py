"""What images and videos a chat record names, in the order in which its messages speak of them.

The common forms: columns `images` and `videos` beside `messages`; content as a list of parts, of
which `{"type": "image"}` takes the next of the column or names its own file; `<image>` in a text.
Pure: nothing is opened here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from epctl.errors import InputError

Modality = Literal["image", "video"]
Grid = tuple[int, int, int]  # of frames, height and width
MODALITIES: tuple[Modality, ...] = ("image", "video")
_MARK = re.compile(r"<(image|video)>")
# Where a part may name its file.
_PLACES = ("path", "url", "image_url", "video_url")


class Source(NamedTuple):
    """An image or video as the record gives it.

    Attributes:
        value: a path, encoded bytes, an image, or for a video a list of those, its frames.
        fps: frames a second of a video, if the record says.
    """

    modality: Modality
    value: Any
    fps: float | None = None


@dataclass(frozen=True)
class StoredVisual:
    """An image or clip of a stored document: where it lies and which tokens stand for it.

    Attributes:
        files: one file, or one a frame.
        frames: which frames of a file with several; empty for all there is.
        grid: frames, height and width in what the processor counts: patches or pixels.
        start, stop: from its first token to past its last.
        fps: frames a second of those kept.
    """

    modality: Modality
    files: tuple[str, ...]
    frames: tuple[int, ...]
    grid: Grid
    start: int
    stop: int
    fps: float = 1.0

    def to_document(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> StoredVisual:
        lists = {key: tuple(document[key]) for key in ("files", "frames", "grid")}
        return cls(**{**document, **lists})


class Columns(NamedTuple):
    """The keys of a record's images and videos."""

    image: str = "images"
    video: str = "videos"

    def of(self, modality: Modality) -> str:
        return self.image if modality == "image" else self.video


def read_visuals(
    record: Mapping[str, Any], messages: list[Any], columns: Columns, where: str
) -> tuple[list[dict[str, Any]], list[Source]]:
    """Returns the messages with `{"type": "image"}` parts where images stand, and the images.

    Images of a column that no message speaks of come first in the first user's message.

    Raises InputError, with the numbers, where messages and columns disagree.
    """
    left = {m: _listed(record.get(columns.of(m)), columns.of(m), where) for m in MODALITIES}
    given = {m: len(values) for m, values in left.items()}
    taken: list[Source] = []
    asked = dict.fromkeys(MODALITIES, 0)
    result = []
    for message in messages:
        parts = list(_parts(message.get("content"), left, where))
        for part in parts:
            if part["type"] in MODALITIES:
                modality: Modality = part["type"]
                asked[modality] += part["value"] is None
                source = _take(part, left[modality])
                taken += [source] if source is not None else []
        result.append({**message, "content": _content(message, parts)})
    for modality in MODALITIES:
        if given[modality] and not asked[modality]:
            sources = [Source(modality, value) for value in left[modality]]
            _put_first(result, modality, len(sources), where)
            taken = [*sources, *taken]
        elif asked[modality] != given[modality]:
            raise InputError(
                f"{where}: the messages speak of {asked[modality]} {modality}s, "
                f"`{columns.of(modality)}` holds {given[modality]}",
                hint=f"one `{columns.of(modality)}` entry for each place, in order",
            )
    return result, taken


def _listed(value: Any, key: str, where: str) -> list[Any]:
    """Returns a column's values; one that is no list is one image."""
    if value is None:
        return []
    if isinstance(value, (str, bytes, Mapping)) or hasattr(value, "convert"):
        return [value]
    if not isinstance(value, list):
        raise InputError(f"{where}: `{key}` is {type(value).__name__}, not a list")
    return list(value)


def _parts(
    content: Any, left: Mapping[Modality, list[Any]], where: str
) -> Iterator[dict[str, Any]]:
    """Yields a message's content as parts; marks in a text count if the column has something."""
    if isinstance(content, str):
        if not any(left.values()):
            yield {"type": "text", "text": content}
            return
        place = 0
        for mark in _MARK.finditer(content):
            if left["image" if mark[1] == "image" else "video"]:
                yield from _text(content[place : mark.start()])
                yield {"type": mark[1], "value": None}
                place = mark.end()
        yield from _text(content[place:])
        return
    for part in content or ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            yield {"type": "text", "text": str(part.get("text") or "")}
        elif kind in ("image", "image_url", "video"):
            yield _visual_part(part, "video" if kind == "video" else "image")
        else:
            raise InputError(
                f"{where}: a content part of type `{kind}`; known are text, image and video"
            )


def _text(text: str) -> Iterator[dict[str, Any]]:
    if text:
        yield {"type": "text", "text": text}


def _visual_part(part: Mapping[str, Any], modality: Modality) -> dict[str, Any]:
    """Returns the part with what it names as `value`, None for the next of the column."""
    value = next((part[key] for key in (modality, *_PLACES) if part.get(key) is not None), None)
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    return {"type": modality, "value": value, "fps": part.get("fps") or part.get("sample_fps")}


def _take(part: Mapping[str, Any], left: list[Any]) -> Source | None:
    """Returns what stands at a place; None if the column has nothing left."""
    value = part["value"]
    if value is None:
        if not left:
            return None
        value = left.pop(0)
    fps = part.get("fps")
    return Source(part["type"], value, float(fps) if fps else None)


def _content(message: Mapping[str, Any], parts: list[dict[str, Any]]) -> Any:
    """Returns the content for the template; a text without images stays as it was."""
    if not any(part["type"] in MODALITIES for part in parts):
        return message.get("content")
    return [p if p["type"] == "text" else {"type": p["type"]} for p in parts]


def _put_first(messages: list[dict[str, Any]], modality: Modality, count: int, where: str) -> None:
    message = next((m for m in messages if m.get("role") == "user"), None)
    if message is None:
        raise InputError(f"{where}: {count} {modality}s and no user's message to put them into")
    content = message["content"]
    text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    message["content"] = [{"type": modality}] * count + text
