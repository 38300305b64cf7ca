"""Images and clips on the disk: kept where they lie, opened when a sample is drawn.

What comes as bytes (parquet, hub datasets, data URIs) is written once into the run's data folder
under its digest.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from epctl.errors import InputError
from epctl.runtime.visual_video import VideoFacts, is_video, measure, read_frames

FOLDER = "visuals"


class ClipFacts(NamedTuple):
    """A clip as it will be read: its files, which frames of them, and how fast they follow."""

    files: tuple[str, ...]
    frames: tuple[int, ...]
    fps: float
    size: tuple[int, int]

    @property
    def num_frames(self) -> int:
        return len(self.frames) or len(self.files)


@dataclass(frozen=True)
class VisualFiles:
    """Keeps and opens the images of a run; `folder` is the run's data folder."""

    folder: Path

    def keep(self, value: Any, base: Path | None, where: str) -> str:
        """Returns the name by which `open` finds an image.

        Args:
            base: what a relative path is relative to: the folder of the data file.

        Raises InputError for a file that is not there, or a form that is not known.
        """
        if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
            value = value.get("bytes") or value.get("path")
        if hasattr(value, "convert"):  # an image of Pillow: `datasets` decodes them
            buffer = io.BytesIO()
            value.save(buffer, format="PNG")
            value = buffer.getvalue()
        if isinstance(value, str) and value.startswith("data:"):
            value = _decoded(value, where)
        if isinstance(value, bytes):
            return self._written(value)
        if not isinstance(value, str):
            raise InputError(f"{where}: an image given as {type(value).__name__}, not as a path")
        if "://" in value and not value.startswith("file://"):
            raise InputError(
                f"{where}: the image `{value}` is on the network; ranks read local files",
                hint="download the images and name their paths relative to the data file",
            )
        path = Path(value.removeprefix("file://")).expanduser()
        path = path if path.is_absolute() or base is None else base / path
        if not path.exists():
            raise InputError(
                f"{where}: there is no file `{path}`",
                hint="paths are relative to the folder of the data file",
            )
        return str(path.absolute())

    def _written(self, content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()[:32]
        path = self.folder / FOLDER / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            staging = path.with_name(f"{name}.{os.getpid()}.tmp")
            staging.write_bytes(content)
            staging.rename(path)
        return f"{FOLDER}/{name}"

    def open(self, name: str) -> Any:
        """Returns the whole image as RGB, upright. Raises InputError for one that is damaged."""
        path = self._path(name)
        with _errors(path) as image:
            return _upright(image)

    def clip(
        self,
        value: Any,
        base: Path | None,
        where: str,
        *,
        own_fps: float | None,
        fps: float,
        max_frames: int,
    ) -> ClipFacts:
        """Returns how a video is read: a list of frames, a folder of them, or a file of several.

        Frames that are given one by one are taken as they are; of a file so many that `fps`
        follow each other in a second. More than `max_frames` are thinned out evenly.
        """
        if isinstance(value, str):
            path = Path(self.keep(value, base, where))
            if path.is_dir():
                value = [str(p) for p in sorted(path.iterdir()) if p.is_file()]
        if isinstance(value, (list, tuple)):
            names = [self.keep(frame, base, where) for frame in value]
            if not names:
                raise InputError(f"{where}: a video without a frame")
            kept = _spread(len(names), min(len(names), max_frames))
            sizes = {self.open(names[n]).size for n in kept}
            if len(sizes) > 1:
                raise InputError(f"{where}: frames of one video have sizes {sorted(sizes)}")
            rate = (own_fps or fps) * len(kept) / len(names)
            return ClipFacts(tuple(names[n] for n in kept), (), rate, sizes.pop())
        name = self.keep(value, base, where)
        count, stated, size = self._measure(name, f"{where}: ")
        rate = own_fps or stated or fps
        wanted = max(1, min(count, max_frames, round(count / rate * fps)))
        return ClipFacts((name,), tuple(_spread(count, wanted)), rate * wanted / count, size)

    def _measure(self, name: str, where: str) -> VideoFacts:
        """Returns what there is of a clip in one file."""
        path = self._path(name)
        if is_video(path):
            return measure(path, where)
        with _errors(path, where) as image:
            count = getattr(image, "n_frames", 1)
            milliseconds = image.info.get("duration")
            return VideoFacts(count, 1000 / milliseconds if milliseconds else None, image.size)

    def frames(self, files: Sequence[str], frames: Sequence[int]) -> list[Any]:
        """Returns the images of a clip."""
        if not frames:
            return [self.open(name) for name in files]
        path = self._path(files[0])
        if is_video(path):
            return read_frames(path, frames)
        with _errors(path) as image:
            found = []
            for frame in frames:
                image.seek(frame)
                found.append(_upright(image))
            return found

    def _path(self, name: str) -> Path:
        return self.folder / name  # an absolute name stays as it is


class _errors:
    """Opens an image; what Pillow raises about it becomes an InputError that names the file."""

    def __init__(self, path: Path, where: str = "") -> None:
        self.path = path
        self.where = where
        self.image: Any = None

    def __enter__(self) -> Any:
        from PIL import Image

        try:
            self.image = Image.open(self.path)
        except Exception as error:
            raise self._explained(error) from None
        return self.image

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.image.close()
        if isinstance(error, Exception) and not isinstance(error, InputError):
            raise self._explained(error) from None

    def _explained(self, error: Exception) -> InputError:
        return InputError(
            f"{self.where}`{self.path}` is no image that can be read: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            hint="a video is given as such: under `videos`, or as a part of type `video`",
        )


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image).convert("RGB")


def _spread(count: int, wanted: int) -> list[int]:
    """Returns `wanted` of `count` numbers, the first and the last among them."""
    if wanted == 1:
        return [0]
    return [round(n * (count - 1) / (wanted - 1)) for n in range(wanted)]


def _decoded(uri: str, where: str) -> bytes:
    """Returns the bytes of a `data:` URI. Raises InputError for what is no base64."""
    try:
        return base64.b64decode(uri.partition(",")[2], validate=True)
    except ValueError as error:
        raise InputError(f"{where}: {uri[:40]!r}... is no image in base64: {error}") from None
