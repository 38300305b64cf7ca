"""Video files frame by frame, through PyAV (mp4, mov, mkv, webm, avi): what its FFmpeg decodes.

PyAV is what transformers reads videos with, too. It is optional: nothing is imported before the
first file that Pillow does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from epctl.errors import InputError


class VideoFacts(NamedTuple):
    """Frames, frames a second if that is known, and (width, height) of an upright frame."""

    num_frames: int
    fps: float | None
    size: tuple[int, int]


def is_video(path: Path) -> bool:
    """True for a file that is no image to Pillow: only a library for videos can tell what it is."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path):
            return False
    except UnidentifiedImageError:
        return True
    except Exception:  # a damaged image: whoever reads it says what is wrong
        return False


def measure(path: Path, where: str = "") -> VideoFacts:
    """Returns what there is in a video file. Its packets are counted, one frame is decoded.

    Raises InputError, with `where` before it, if it is no video or PyAV is missing.
    """
    with _opened(path, where) as container:
        stream = container.streams.video[0]
        # The count in the header is an estimate in some formats and missing in others.
        num_frames = sum(1 for packet in container.demux(stream) if packet.size)
        rate = stream.average_rate
        container.seek(0)
        image = _upright(next(container.decode(stream)))
    return VideoFacts(num_frames, float(rate) if rate else None, image.size)


def read_frames(path: Path, numbers: Sequence[int]) -> list[Any]:
    """Returns the frames of these numbers, in order, as upright RGB images of Pillow.

    Raises InputError if the file has fewer frames than it had, is damaged, or PyAV is missing.
    """
    wanted, found = set(numbers), {}
    with _opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                found[number] = _upright(frame)
            if len(found) == len(wanted):
                break
    if len(found) < len(wanted):
        raise InputError(
            f"`{path}` gives {len(found)} of the {len(wanted)} frames that were chosen, the last "
            f"of them number {max(wanted)}: the file is damaged or has changed",
            hint="put the old file back, or start a new run",
        )
    return [found[number] for number in numbers]


def _upright(frame: Any) -> Any:
    """Returns a frame as it is shown: phones store how it must be turned."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


@contextmanager
def _opened(path: Path, where: str = "") -> Iterator[Any]:
    """Opens a video file; what PyAV raises about it becomes an InputError that names the file."""
    try:
        import av
    except ImportError:
        raise InputError(
            f"{where}`{path}` is no image, and video files need the package `av` (PyAV), not "
            "installed here",
            hint="`pip install 'epctl[video]'`; without it a video is its frames: a list of images "
            "or a folder of them (`ffmpeg -i clip.mp4 -vf fps=2 frames/%05d.jpg`)",
        ) from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{where}`{path}` holds no video, only sound")
            yield container
    except (av.FFmpegError, StopIteration) as error:
        raise InputError(
            f"{where}`{path}` is neither an image nor a video that can be read: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no frame'}"
        ) from None
