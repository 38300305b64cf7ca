"""Strict reading of safetensors headers: every defect has its own error, naming file and tensor.

safetensors' own parser guards its Rust core; this one stands in front of it because inspection
never opens the data, because the messages must say what to do, and because some defects
(duplicate keys, Git LFS pointers, saved error pages) pass or mislead there. Nothing here reads
past the header, and work and memory are proportional to the header, bounded at 100 MB.

    InputError
    `-- HeaderError                 a defect of one .safetensors file
        |-- TruncatedFileError      fewer bytes than the header says, or no room for a header
        |-- HeaderTooLargeError     over the 100 MB that safetensors allows
        |-- NotSafetensorsError     another kind of file: LFS pointer, web page, pickle, GGUF
        |-- HeaderSyntaxError       not UTF-8, not JSON, not an object, nested too deep
        |-- DuplicateTensorError    a tensor name twice in one header
        |-- TensorEntryError        a field is missing or of the wrong type, an unknown dtype
        |-- TensorSizeError         shape and dtype do not fill the bytes that the offsets span
        |-- TensorOverlapError      two tensors share bytes
        |-- TensorHoleError         bytes that belong to no tensor
        `-- TrailingBytesError      bytes after the last tensor
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from epctl.errors import InputError

MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
# Published names stay under 150 characters; longer ones only serve to make readers slow.
MAX_NAME_CHARACTERS = 1024
DTYPE_BITS: Mapping[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
# C0 and C1 controls, and surrogates without their other half.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_REDOWNLOAD = "download the file again; `hf cache verify` finds damaged copies"


class HeaderError(InputError):
    """A defect of one .safetensors file."""


class TruncatedFileError(HeaderError):
    pass


class HeaderTooLargeError(HeaderError):
    pass


class NotSafetensorsError(HeaderError):
    pass


class HeaderSyntaxError(HeaderError):
    pass


class DuplicateTensorError(HeaderError):
    pass


class TensorEntryError(HeaderError):
    pass


class TensorSizeError(HeaderError):
    pass


class TensorOverlapError(HeaderError):
    pass


class TensorHoleError(HeaderError):
    pass


class TrailingBytesError(HeaderError):
    pass


class TensorEntry(NamedTuple):
    """One tensor of a checkpoint; `start` and `end` are byte offsets from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """The header of one shard: tensors by name, the free-form metadata, sizes in bytes."""

    file: str
    file_size: int
    header_size: int
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def header_size(start: bytes, *, file: str, file_size: int) -> int:
    """Returns the length in bytes of the JSON header, from the first bytes of a file.

    `start` holds the first 8 bytes or more (fewer only if the file is shorter). Raises
    NotSafetensorsError, TruncatedFileError or HeaderTooLargeError.
    """
    if file_size < LENGTH_BYTES or len(start) < LENGTH_BYTES:
        raise TruncatedFileError(
            f"`{file}` has {file_size} bytes, too few for a safetensors header length (8 bytes)",
            hint=_REDOWNLOAD,
        )
    (size,) = struct.unpack("<Q", start[:LENGTH_BYTES])
    if not 2 <= size <= min(MAX_HEADER_BYTES, file_size - LENGTH_BYTES):
        # Asked only now: the bytes 80 02 00 .. open a pickle but are also the length 640.
        _refuse_other_formats(start, file)
    if size > MAX_HEADER_BYTES:
        raise HeaderTooLargeError(
            f"`{file}` announces a header of {size} bytes; safetensors allows {MAX_HEADER_BYTES}",
            hint="this is not a safetensors file, or it was damaged or built to exhaust memory",
        )
    if size > file_size - LENGTH_BYTES:
        raise TruncatedFileError(
            f"`{file}` announces a header of {size} bytes but has only "
            f"{file_size - LENGTH_BYTES} after the length",
            hint=_REDOWNLOAD,
        )
    if size < 2:
        raise HeaderSyntaxError(
            f"`{file}` announces a header of {size} bytes; the shortest header is `{{}}`",
            hint=_REDOWNLOAD,
        )
    return int(size)


_OTHER_FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull`"),
    (b"<!DOCTYPE", "a saved web page, not weights", _REDOWNLOAD),
    (b"<!doctype", "a saved web page, not weights", _REDOWNLOAD),
    (b"<html", "a saved web page, not weights", _REDOWNLOAD),
    (b"GGUF", "a GGUF file", "use the original safetensors checkpoint"),
    (b"PK\x03\x04", "a zip archive (a torch pickle?), which can run code", "use safetensors"),
    (b"\x80\x02", "a Python pickle, which can run code", "use a safetensors checkpoint"),
    (b'{"', "JSON text (an index or an error message?), not weights", _REDOWNLOAD),
    (bytes(8), "zeros: an empty or preallocated file", _REDOWNLOAD),
)


def _refuse_other_formats(start: bytes, file: str) -> None:
    # Only the 8 length bytes are sure to be there, so a prefix of the magic has to do.
    for magic, what, hint in _OTHER_FORMATS:
        known = magic[:LENGTH_BYTES]
        if start[: len(known)] == known:
            raise NotSafetensorsError(f"`{file}` is {what}", hint=hint)


def format_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Returns the header of (name, dtype, shape, bytes) in order, its length in front.

    Padded so that data starts aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape, num_bytes in tensors:
        end = position + num_bytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def parse_header(data: bytes, *, file: str, file_size: int) -> ShardHeader:
    """Returns the validated header of a shard.

    `data` is exactly the JSON header (without its 8 length bytes), `file_size` the size of the
    whole file in bytes. Raises the HeaderError of the first defect found.
    """
    if not data.startswith(b"{"):
        raise HeaderSyntaxError(f"the header of `{file}` starts with {data[:1]!r}, not with {{")
    document = _parse_json(data, file)
    metadata = _checked_metadata(document.pop("__metadata__", {}), file)
    first = LENGTH_BYTES + len(data)
    tensors = {name: _checked_entry(name, entry, file, first) for name, entry in document.items()}
    _check_coverage(tensors, file, first, file_size)
    return ShardHeader(file, file_size, len(data), tensors, metadata)


def parse_json_object(
    data: bytes, *, file: str, what: str, constants: bool = False
) -> dict[str, Any]:
    """Returns a JSON object; duplicate keys, other JSON values and bad UTF-8 are refused.

    `constants` lets `Infinity` and `NaN` pass, which Python writes into configs. Raises
    DuplicateTensorError or HeaderSyntaxError, naming `file`.
    """
    try:
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=lambda pairs: _unique(pairs, file),
            parse_constant=float if constants else _refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise HeaderSyntaxError(
            f"the {what} of `{file}` is not UTF-8 at byte {error.start}", hint=_REDOWNLOAD
        ) from None
    except RecursionError:
        raise HeaderSyntaxError(f"the {what} of `{file}` is nested too deep") from None
    except InputError:
        raise
    except ValueError as error:
        raise HeaderSyntaxError(
            f"the {what} of `{file}` is not JSON: {error}", hint=_REDOWNLOAD
        ) from None
    if not isinstance(document, dict):
        raise HeaderSyntaxError(
            f"the {what} of `{file}` is a JSON {type(document).__name__}, not an object"
        )
    return document


def _parse_json(data: bytes, file: str) -> dict[str, Any]:
    return parse_json_object(data, file=file, what="header")


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _unique(pairs: list[tuple[str, Any]], file: str) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateTensorError(
                    f"`{file}` has the key `{short_text(key)}` twice; "
                    "readers disagree on which one counts"
                )
            seen.add(key)
    return document


def _checked_metadata(metadata: Any, file: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise TensorEntryError(f"`__metadata__` of `{file}` must map names to texts")
    return metadata


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _checked_entry(name: str, entry: Any, file: str, first: int) -> TensorEntry:
    """Returns the entry with absolute offsets; raises what is wrong with it."""
    check_name(name, file)
    if not isinstance(entry, dict):
        kind = type(entry).__name__
        raise TensorEntryError(f"{_where(name, file)} is described by {kind}, not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None or not isinstance(dtype, str):
        raise TensorEntryError(
            f"{_where(name, file)} has dtype {short_text(repr(dtype))}, which safetensors lacks"
        )
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise TensorEntryError(
            f"{_where(name, file)} has shape {short_text(repr(shape))}, not a list of sizes"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise TensorEntryError(
            f"{_where(name, file)} has data_offsets {short_text(repr(offsets))}, "
            "not two non-negative integers"
        )
    start, end = offsets
    num_bits = _num_bits(shape, bits)
    if end < start or num_bits != (end - start) * 8:
        raise TensorSizeError(
            f"{_where(name, file)}: shape {short_text(str(shape))} of {dtype} needs "
            f"{num_bits // 8} bytes, data_offsets {start} to {end} span {end - start}"
        )
    return TensorEntry(dtype, tuple(shape), file, first + start, first + end)


def check_name(name: str, file: str) -> None:
    """Raises TensorEntryError for a tensor name no reader should repeat: endless, or unprintable.

    Control characters would reach the terminal, lone surrogates can be written to no file.
    """
    if len(name) > MAX_NAME_CHARACTERS:
        raise TensorEntryError(
            f"{_where(name, file)} has a name of {len(name)} characters; "
            f"at most {MAX_NAME_CHARACTERS} are read"
        )
    if not name.isprintable() and _UNPRINTABLE.search(name):
        raise TensorEntryError(f"{_where(name, file)} has control characters in its name")


def _where(name: str, file: str) -> str:
    return f"tensor `{short_text(name)}` of `{file}`"


def _num_bits(shape: list[int], bits: int) -> int:
    # Python integers do not overflow, but a shape of thousands of huge sizes would grow one
    # without bound; past 2**70 no file can match.
    total = bits
    for size in shape:
        total *= size
        if total == 0:
            return 0
        total = min(total, 1 << 70)
    return total


def _check_coverage(
    tensors: Mapping[str, TensorEntry], file: str, first: int, file_size: int
) -> None:
    """Raises unless the tensors cover the bytes after the header exactly once."""
    position, previous = first, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < position:
            raise TensorOverlapError(
                f"tensors `{short_text(name)}` and `{short_text(previous)}` of `{file}` share "
                f"{min(position, entry.end) - entry.start} bytes from offset {entry.start - first}"
            )
        if entry.start > position:
            raise TensorHoleError(
                f"`{file}` has {entry.start - position} bytes that belong to no tensor "
                f"before `{short_text(name)}` (offset {position - first})"
            )
        position, previous = entry.end, name
    if position > file_size:
        raise TruncatedFileError(
            f"`{file}` has {file_size} bytes but its tensors end at byte {position} "
            f"(`{short_text(previous)}`): {position - file_size} bytes are missing",
            hint=_REDOWNLOAD,
        )
    if position < file_size:
        raise TrailingBytesError(
            f"`{file}` has {file_size - position} bytes after its last tensor "
            f"(`{short_text(previous)}` ends at byte {position})",
            hint="a safetensors file ends with its last tensor; download the file again",
        )


def short_text(text: str) -> str:
    """Returns text of a file for a message: no control characters, no screenful."""
    clean = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return clean if len(clean) <= 120 else clean[:117] + "..."
