"""Turns recipes into bytes: reads extents, computes matrices, yields buffers to write.

Files are read with `pread` into a buffer that is used again, not through a mapping: mapped pages
count as resident memory, and a page fault at a time is slower than a large read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from epctl.convert.recipes import Block, Cast, Copy, Matrix, Scale, Weave
from epctl.convert.view import CheckpointView, Extent
from epctl.errors import ConfigError, InputError

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

CHUNK_BYTES = 4 * 2**20
FILES_A_THREAD = 16


class Reader:
    """Reads a view's files; shared by threads, with one buffer a thread."""

    def __init__(self, view: CheckpointView) -> None:
        self.view = view
        self.num_bytes_read = 0
        self._opened: set[int] = set()
        self._lock = threading.Lock()
        self._local = threading.local()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes every file."""
        for descriptor in self._opened:
            os.close(descriptor)
        self._opened.clear()

    def chunks(self, extents: tuple[Extent, ...], size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Yields the bytes of extents in pieces of at most `size`; each is valid until the next."""
        buffer = self._buffer(size)
        for extent in _join(extents):
            for start in range(extent.start, extent.end, size):
                part = buffer[: min(size, extent.end - start)]
                self._fill(extent.file, start, part)
                yield part

    def read(self, extents: tuple[Extent, ...]) -> bytearray:
        """Returns the bytes of extents in a buffer of their own."""
        result = bytearray(sum(extent.num_bytes for extent in extents))
        target, position = memoryview(result), 0
        for extent in _join(extents):
            self._fill(extent.file, extent.start, target[position : position + extent.num_bytes])
            position += extent.num_bytes
        return result

    def _buffer(self, size: int) -> memoryview:
        buffer: bytearray | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = bytearray(size)
        return memoryview(buffer)

    def _fill(self, file: str, start: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._descriptor(file), [target[done:]], start + done)
            except OSError as error:
                raise InputError(
                    f"`{self.view.path(file)}` cannot be read: {error.strerror}"
                ) from None
            if count == 0:
                raise InputError(
                    f"`{self.view.path(file)}` ended at byte {start + done}; it was cut while read"
                )
            done += count
        with self._lock:
            self.num_bytes_read += done

    def _descriptor(self, file: str) -> int:
        """Returns an open file of this thread; a checkpoint may have a thousand, the oldest go."""
        mine: dict[str, int] | None = getattr(self._local, "descriptors", None)
        if mine is None:
            mine = self._local.descriptors = {}
        if file not in mine:
            if len(mine) >= FILES_A_THREAD:
                oldest = mine.pop(next(iter(mine)))
                with self._lock:
                    self._opened.discard(oldest)
                os.close(oldest)
            mine[file] = os.open(self.view.path(file), os.O_RDONLY | os.O_CLOEXEC)
            with self._lock:
                self._opened.add(mine[file])
        return mine[file]


def _join(extents: tuple[Extent, ...]) -> Iterator[Extent]:
    """Yields extents with neighbours in the same file made one."""
    last: Extent | None = None
    for extent in extents:
        if last is not None and last.file == extent.file and last.end == extent.start:
            last = Extent(last.file, last.start, extent.end)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last


def block_chunks(reader: Reader, block: Block) -> Iterator[memoryview]:
    """Yields the output bytes of a block; each buffer is valid until the next is asked for."""
    for piece in block.pieces:
        if isinstance(piece, Copy):
            yield from reader.chunks(piece.extents)
        elif isinstance(piece, Cast):
            yield from _cast(reader, piece)
        else:
            yield _bytes_of(_weave(reader, piece))


def arithmetic() -> ModuleType:
    """Returns the numpy arithmetic; raises ConfigError where numpy is not installed."""
    try:
        from epctl.convert import quantization
    except ImportError:
        raise ConfigError(
            "this conversion computes on weights, which needs numpy; it is not installed",
            hint="`pip install numpy`, or keep storage and dtype: those conversions only copy",
        ) from None
    return quantization


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view("u1").data


def _cast(reader: Reader, piece: Cast) -> Iterator[memoryview]:
    import numpy as np

    math = arithmetic()
    raw = math.raw_dtype(piece.dtype)
    for chunk in reader.chunks(piece.extents):
        yield _bytes_of(math.cast_to_bfloat16(np.frombuffer(chunk, raw), piece.dtype))


def _weave(reader: Reader, piece: Weave) -> NDArray[Any]:
    """Returns the two-dimensional array of a Weave, contiguous."""
    import numpy as np

    stored: dict[tuple[Extent, ...], NDArray[Any]] = {}
    for matrix in piece.matrices:  # gate and up may be halves of one stored matrix
        if matrix.extents not in stored:
            stored[matrix.extents] = _stored(reader, matrix, piece.dtype)
    arrays = [_projection(stored[matrix.extents], matrix) for matrix in piece.matrices]
    if len(arrays) == 1:
        woven = arrays[0]
    elif piece.interleaved:
        woven = np.stack(arrays, axis=1).reshape(-1, arrays[0].shape[1])
    else:
        woven = np.concatenate(arrays)
    return np.ascontiguousarray(woven.T if piece.transposed else woven)


def _stored(reader: Reader, matrix: Matrix, dtype: str) -> NDArray[Any]:
    """Returns a matrix as it is stored, dequantised, in the raw bits of `dtype`."""
    import numpy as np

    math = arithmetic()
    if matrix.scale is not None:
        return _dequantized(reader, matrix, matrix.scale)
    raw = np.frombuffer(reader.read(matrix.extents), math.raw_dtype(matrix.dtype))
    values: NDArray[Any] = raw.reshape(matrix.shape)
    if matrix.dtype != dtype:
        values = math.cast_to_bfloat16(values, matrix.dtype)
    return values


def _projection(stored: NDArray[Any], matrix: Matrix) -> NDArray[Any]:
    """Returns one projection, [out, in]."""
    values = _part(stored, matrix)
    return values.T if matrix.transposed else values


def _part(values: NDArray[Any], matrix: Matrix) -> NDArray[Any]:
    half = matrix.shape[matrix.part_dim] // 2
    rows = {
        "all": slice(None),
        "first_half": slice(0, half),
        "second_half": slice(half, None),
        "even": slice(0, None, 2),
        "odd": slice(1, None, 2),
    }[matrix.part]
    return values[:, rows] if matrix.part_dim else values[rows]


def _dequantized(reader: Reader, matrix: Matrix, scale: Scale) -> NDArray[Any]:
    import numpy as np

    math = arithmetic()
    packed = np.frombuffer(reader.read(matrix.extents), "u1")
    if scale.kind == "mxfp4":
        exponents = np.frombuffer(reader.read(scale.extents), "u1")
        result: NDArray[Any] = math.dequantize_mxfp4(
            packed.reshape(matrix.shape[0], -1), exponents.reshape(matrix.shape[0], -1)
        )
        return result
    dtype = "F8_E8M0" if scale.dtype == "U8" else scale.dtype
    grid = np.frombuffer(reader.read(scale.extents), math.raw_dtype(dtype))
    result = math.dequantize_fp8(
        packed.reshape(matrix.shape),
        matrix.dtype,
        math.to_float32(grid, dtype).reshape(scale.shape),
        scale.block,
    )
    return result
