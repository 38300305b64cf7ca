"""Hostile and damaged shards: one typed error each, naming the file and the tensor."""

import struct
import time
import tracemalloc

import pytest
from checkpoints import shard, tensor_shard

from epctl.errors import ExitCode, InputError
from epctl.layout.safetensors import (
    MAX_HEADER_BYTES,
    DuplicateTensorError,
    HeaderSyntaxError,
    HeaderTooLargeError,
    NotSafetensorsError,
    TensorEntryError,
    TensorHoleError,
    TensorOverlapError,
    TensorSizeError,
    TrailingBytesError,
    TruncatedFileError,
)
from epctl.layout.source import read_shard_header

A4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
B4 = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}


def entry(**changes):
    return shard({"a": {**A4, **changes}}, bytes(4))


CASES = {
    "empty file": (b"", TruncatedFileError, "0 bytes"),
    "seven bytes": (b"\x05\0\0\0\0\0\0", TruncatedFileError, "7 bytes"),
    "length beyond the file": (shard(b"{}", length=100), TruncatedFileError, "100 bytes"),
    "length over 100 MB": (
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
        HeaderTooLargeError,
        str(MAX_HEADER_BYTES + 1),
    ),
    "length 2**63": (struct.pack("<Q", 2**63) + b"{}", HeaderTooLargeError, str(2**63)),
    "length 2**64 - 1": (b"\xff" * 8 + b"{}", HeaderTooLargeError, str(2**64 - 1)),
    "length one": (shard(b"{"), HeaderSyntaxError, "1 bytes"),
    "not UTF-8": (shard(b'{"\xff\xfe": 1}'), HeaderSyntaxError, "UTF-8"),
    "not JSON": (shard(b"{nonsense}"), HeaderSyntaxError, "JSON"),
    "a JSON array": (shard(b"[1, 2]"), HeaderSyntaxError, "starts with"),
    "NaN": (shard(b'{"a": NaN}'), HeaderSyntaxError, "NaN"),
    "leading space": (shard(b'  {"a": 1}'), HeaderSyntaxError, "starts with"),
    "5,000 nested objects": (
        shard(b'{"a":' * 5000 + b"1" + b"}" * 5000),
        HeaderSyntaxError,
        "nested",
    ),
    "a number of 10,000 digits": (
        shard(b'{"a": ' + b"9" * 10_000 + b"}"),
        HeaderSyntaxError,
        "JSON",
    ),
    "same entry twice": (
        shard(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        DuplicateTensorError,
        "`a` twice",
    ),
    "two entries of one name": (
        shard(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            bytes(8),
        ),
        DuplicateTensorError,
        "`a` twice",
    ),
    "overlap": (
        shard({"a": A4, "b": {**A4, "data_offsets": [2, 6]}}, bytes(6)),
        TensorOverlapError,
        "`b` and `a`",
    ),
    "hole": (
        shard({"a": A4, "b": {**A4, "data_offsets": [8, 12]}}, bytes(12)),
        TensorHoleError,
        "4 bytes",
    ),
    "hole at the start": (entry(data_offsets=[4, 8]) + bytes(4), TensorHoleError, "before `a`"),
    "negative offset": (entry(data_offsets=[-4, 0]), TensorEntryError, "`a`"),
    "offsets the wrong way round": (entry(data_offsets=[4, 0]), TensorSizeError, "`a`"),
    "three offsets": (entry(data_offsets=[0, 2, 4]), TensorEntryError, "`a`"),
    "a float offset": (entry(data_offsets=[0, 4.0]), TensorEntryError, "`a`"),
    "a boolean offset": (entry(data_offsets=[False, 4]), TensorEntryError, "`a`"),
    "shape and offsets disagree": (entry(shape=[2]), TensorSizeError, "needs 8 bytes"),
    "dtype and offsets disagree": (entry(dtype="F64"), TensorSizeError, "needs 8 bytes"),
    "shape overflows 64 bits": (entry(shape=[2**40, 2**40]), TensorSizeError, "`a`"),
    "shape overflows to its offsets": (entry(shape=[2**62, 4, 1]), TensorSizeError, "`a`"),
    "negative size": (entry(shape=[-1]), TensorEntryError, "shape"),
    "unknown dtype": (entry(dtype="F31"), TensorEntryError, "F31"),
    "dtype is a list": (entry(dtype=["F32"]), TensorEntryError, "dtype"),
    "entry is a text": (shard({"a": "F32"}), TensorEntryError, "`a`"),
    "fields missing": (shard({"a": {}}), TensorEntryError, "`a`"),
    "metadata is a list": (shard({"__metadata__": [1]}), TensorEntryError, "__metadata__"),
    "cut by one byte": (tensor_shard({"a": ("F32", (2,))})[:-1], TruncatedFileError, "1 bytes are"),
    "one byte more": (tensor_shard({"a": ("F32", (2,))}) + b"\0", TrailingBytesError, "1 bytes"),
    "zip appended": (
        tensor_shard({"a": ("F32", (2,))}) + b"PK\x03\x04payload",
        TrailingBytesError,
        "`a` ends",
    ),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        NotSafetensorsError,
        "LFS",
    ),
    "web page": (b"<!DOCTYPE html><html>Not found</html>", NotSafetensorsError, "web page"),
    "JSON error": (b'{"error": "Repository not found"}', NotSafetensorsError, "JSON"),
    "zeros": (bytes(64), NotSafetensorsError, "zeros"),
    "zip of pickles": (b"PK\x03\x04" + bytes(60), NotSafetensorsError, "pickle"),
    "pickle": (b"\x80\x02}q\x00X\x05\x00\x00\x00" + b"a" * 40, NotSafetensorsError, "pickle"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(60), NotSafetensorsError, "GGUF"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_damaged_shard_has_its_own_error(case, tmp_path):
    data, expected, words = CASES[case]
    path = tmp_path / "model-00001-of-00002.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_shard_header(path)
    assert type(caught.value) is expected
    assert words in caught.value.message
    assert path.name in caught.value.message
    assert caught.value.exit_code == ExitCode.INPUT


def test_padded_header_and_empty_tensors_are_sound(tmp_path):
    path = tmp_path / "a.safetensors"
    empty = {"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]}
    raw = shard({"z": empty, "a": A4, "b": B4})[8:] + b"   "
    path.write_bytes(shard(raw, bytes(8)))
    header = read_shard_header(path)
    assert list(header.tensors) == ["z", "a", "b"]
    assert header.tensors["z"].num_elements == 0
    assert header.tensors["b"].end == path.stat().st_size


def test_header_of_640_bytes_is_no_pickle(tmp_path):
    # 640 is 80 02 00 .. in little endian, the opening of a protocol-2 pickle.
    path = tmp_path / "a.safetensors"
    path.write_bytes(shard(b"{}" + b" " * 638))
    assert read_shard_header(path).header_size == 640


def test_control_characters_of_a_name_stay_out_of_messages(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(shard({"\x1b[31mred\n": {}}))
    with pytest.raises(TensorEntryError) as caught:
        read_shard_header(path)
    assert "\x1b" not in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "\x9b31m", "a\ud800b", "a." * 600])
def test_names_that_no_reader_should_repeat_are_refused(name, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(tensor_shard({name: ("F32", (1,))}))
    with pytest.raises(TensorEntryError) as caught:
        read_shard_header(path)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300


def test_names_in_any_script_are_sound(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(tensor_shard({"模型.вес.\u00a0é": ("F32", (1,))}))
    assert len(read_shard_header(path).tensors) == 1


def many_entries(count):
    rows = (
        b'"t%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (n, n, n + 1)
        for n in range(count)
    )
    return shard(b"{" + b",".join(rows) + b"}", bytes(count))


def test_time_and_memory_are_proportional_to_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    data = many_entries(100_000)
    path.write_bytes(data)
    tracemalloc.start()
    header = read_shard_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(header.tensors) == 100_000
    assert peak < 25 * len(data)


def test_ten_million_entries_are_refused_unread(tmp_path):
    # Ten million entries need at least 400 MB of header: the announced length alone is refused.
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 400_000_000))
        file.truncate(400_000_008 + 10_000_000)  # sparse
    begin = time.thread_time()
    with pytest.raises(HeaderTooLargeError):
        read_shard_header(path)
    assert time.thread_time() - begin < 0.5
