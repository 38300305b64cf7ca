"""Property: any header either reads back exactly or raises a typed error, quickly."""

import time

import pytest
from checkpoints import shard, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epctl.errors import InputError
from epctl.hub import resolve
from epctl.layout.detect import detect
from epctl.layout.safetensors import DTYPE_BITS, LENGTH_BYTES, header_size, parse_header

QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20).filter(
    lambda name: name != "__metadata__"
)
WHOLE = [dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0]
TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(WHOLE), st.lists(st.integers(0, 4), max_size=4)), max_size=8
)


def sound(tensors):
    """Returns the bytes of a sound shard and its entries."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = DTYPE_BITS[dtype] // 8
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return shard(header, bytes(offset))


def read(data):
    size = header_size(data[:LENGTH_BYTES], file="f", file_size=len(data))
    return parse_header(data[LENGTH_BYTES : LENGTH_BYTES + size], file="f", file_size=len(data))


@QUICK
@given(tensors=TENSORS)
def test_sound_headers_read_back_exactly(tensors):
    data = sound(tensors)
    header = read(data)
    assert {name: (e.dtype, list(e.shape)) for name, e in header.tensors.items()} == tensors
    assert sum(entry.num_bytes for entry in header.tensors.values()) == (
        len(data) - LENGTH_BYTES - header.header_size
    )


@QUICK
@given(
    tensors=TENSORS,
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 3),
)
def test_edited_bytes_never_hang_and_never_escape_typed_errors(tensors, edits, cut):
    data = bytearray(sound(tensors))
    for position, value in edits:
        data[position % len(data)] = value
    begin, header, message = time.thread_time(), None, "`f`"
    try:
        header = read(bytes(data[: len(data) - cut]))
    except InputError as error:
        message = error.message
    assert "`f`" in message
    if header is not None:
        covered = sum(entry.num_bytes for entry in header.tensors.values())
        assert covered == len(data) - cut - LENGTH_BYTES - header.header_size
    assert time.thread_time() - begin < 1.0


@QUICK
@given(raw=st.binary(max_size=300))
def test_random_bytes_never_escape_typed_errors(raw):
    for data in (raw, shard(raw), shard(b"{" + raw + b"}")):
        try:
            read(data)
        except InputError:
            continue


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["model_type", "architectures", "num_local_experts", "num_experts", "num_hidden_layers",
     "hidden_size", "num_experts_per_tok", "text_config", "vision_config", "mlp_layer_types",
     "moe_layer_freq", "first_k_dense_replace", "auto_map", "norm_topk_prob", "n_group",
     "scoring_func", "routed_scaling_factor", "quantization_config", "num_attention_heads"]
)  # fmt: skip
PIECES = st.sampled_from(
    ["model", "layers", "0", "1", "mlp", "experts", "gate", "weight", "gate_proj", "up_proj",
     "down_proj", "block_sparse_moe", "w1", "w2", "w3", "visual", "blocks", "inv_freq"]
)  # fmt: skip


@QUICK
@given(
    config=st.dictionaries(KEYS, JSON | st.sampled_from(["mixtral", "deepseek_v3", "qwen2_vl"])),
    names=st.lists(
        st.lists(PIECES, min_size=1, max_size=7).map(".".join), max_size=12, unique=True
    ),
    side=st.integers(0, 3),
)
def test_any_config_over_any_names_gives_a_layout_or_a_typed_error(config, names, side, tmp_path):
    import json

    tensors = {name: ("U8", [side, 2]) for name in names}
    write_model(tmp_path, {"model.safetensors": sound(tensors)}, config=json.dumps(config))
    try:
        layout = detect(resolve(str(tmp_path)))
    except InputError:
        return
    assert layout.num_tensors == len(names)


@pytest.mark.parametrize("side", [0, 1])
def test_experts_of_no_size_do_not_divide_by_zero(side, tmp_path):
    block = "model.layers.0.block_sparse_moe.experts.0"
    tensors = {f"{block}.{name}.weight": ("U8", [side, side]) for name in ("w1", "w2", "w3")}
    config = '{"model_type": "mixtral", "num_local_experts": 1, "num_experts_per_tok": 0}'
    write_model(tmp_path, {"model.safetensors": sound(tensors)}, config=config)
    assert detect(resolve(str(tmp_path))).moe.num_experts == 1
