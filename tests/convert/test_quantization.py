"""Dequantised weights equal an independent reckoning, also at the edges of blocks."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from convert_runs import export, merge, shard
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_models import model_tensors, read_tensors, write_model

from epctl.convert import quantization, scales
from epctl.errors import ConfigError, InputError, LayoutError
from epctl.layout.blocks import scale_block
from epctl.output import set_mode

torch = pytest.importorskip("torch", reason="the reference arithmetic is torch's")


@pytest.fixture(autouse=True)
def quiet():
    set_mode(quiet=True)
    yield
    set_mode()


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def fp8_reference(tensors, name):
    """Loops over blocks; the last ones are cut by the matrix."""
    _, shape, body = tensors[name]
    weight = torch.frombuffer(bytearray(body), dtype=torch.float8_e4m3fn).view(shape).float()
    grid = torch.frombuffer(bytearray(tensors[f"{name}_scale_inv"][2]), dtype=torch.float32)
    grid = grid.view(tensors[f"{name}_scale_inv"][1])
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            rows = slice(128 * row, 128 * row + 128)
            columns = slice(128 * column, 128 * column + 128)
            weight[rows, columns] *= grid[row, column]
    return bits(weight.bfloat16())


@pytest.mark.parametrize(("hidden", "width"), [(128, 256), (130, 129), (1, 127), (257, 64)])
@pytest.mark.parametrize("ep", [1, 2])
def test_fp8_is_right_at_block_edges(hidden, width, ep, tmp_path):
    model = write_model(tmp_path / "m", "fp8", num_experts=2, hidden=hidden, width=width)
    manifest = shard(model, tmp_path / "s", ep, dtype="bf16")
    merge(tmp_path / "s", tmp_path / "back")
    source, result = read_tensors(model), read_tensors(tmp_path / "back")
    checked = 0
    for name, (dtype, shape, _) in source.items():
        if dtype == "F8_E4M3":
            assert result[name][:2] == ("BF16", shape)
            assert result[name][2] == fp8_reference(source, name), name
            checked += 1
    assert checked == 2 * (1 + 2 * 3)
    assert not any(name.endswith("_scale_inv") for name in result)
    assert sum("scale" in entry["reason"] for entry in manifest["dropped"]) == 4


def test_fp8_fused_in_bfloat16_is_the_stack_of_its_experts(tmp_path):
    model = write_model(tmp_path / "m", "fp8", num_experts=4, hidden=130, width=129)
    shard(model, tmp_path / "s", 2, dtype="bf16", storage="fused")
    source = read_tensors(model)
    prefix = "model.layers.1.mlp.experts"
    dtype, shape, body = read_tensors(tmp_path / "s" / "rank-00001")[f"{prefix}.gate_up_proj"]
    assert (dtype, shape) == ("BF16", (2, 2 * 129, 130))
    wanted = b"".join(
        fp8_reference(source, f"{prefix}.{expert}.{projection}_proj.weight")
        for expert in (2, 3)
        for projection in ("gate", "up")
    )
    assert body == wanted


def test_fp8_weights_fuse_with_their_scales_only_at_block_boundaries(tmp_path):
    even = write_model(tmp_path / "even", "fp8", num_experts=2, hidden=130, width=256)
    shard(even, tmp_path / "s", 1, storage="fused")
    tensors = read_tensors(tmp_path / "s" / "rank-00000")
    source = read_tensors(even)
    prefix = "model.layers.0.mlp.experts"
    scale = tensors[f"{prefix}.gate_up_proj_scale_inv"]
    assert scale[:2] == ("F32", (2, 4, 2))
    assert scale[2] == b"".join(
        source[f"{prefix}.{expert}.{projection}_proj.weight_scale_inv"][2]
        for expert in (0, 1)
        for projection in ("gate", "up")
    )
    odd = write_model(tmp_path / "odd", "fp8", num_experts=2, hidden=130, width=255)
    with pytest.raises(LayoutError, match=r"255 wide, which is no multiple .* block of 128"):
        shard(odd, tmp_path / "none", 1, storage="fused")


def test_config_of_dequantised_weights_says_so(tmp_path):
    model = write_model(tmp_path / "m", "fp8", num_experts=2, hidden=8, width=8)
    shard(model, tmp_path / "keep", 1)
    assert (tmp_path / "keep/config.json").read_bytes() == (model / "config.json").read_bytes()
    shard(model, tmp_path / "s", 1, dtype="bf16")
    config = json.loads((tmp_path / "s/config.json").read_text())
    assert "quantization_config" not in config
    assert config["num_experts" if "num_experts" in config else "n_routed_experts"] == 2


def test_mxfp4_equals_transformers_own_dequantisation(tmp_path):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    model = write_model(tmp_path / "m", "mxfp4", num_experts=4, hidden=64, width=96)
    shard(model, tmp_path / "s", 2, dtype="bf16")
    merge(tmp_path / "s", tmp_path / "back")
    source, result = read_tensors(model), read_tensors(tmp_path / "back")
    for projection in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{projection}"
        _, shape, blocks = source[f"{name}_blocks"]
        _, grid, scales = source[f"{name}_scales"]
        wanted = mxfp4.convert_moe_packed_tensors(
            torch.frombuffer(bytearray(blocks), dtype=torch.uint8).view(shape),
            torch.frombuffer(bytearray(scales), dtype=torch.uint8).view(grid),
        )
        assert result[name][:2] == ("BF16", tuple(wanted.shape))
        assert result[name][2] == bits(wanted)
        assert f"{name}_blocks" not in result


def test_mxfp4_takes_the_low_nibble_first():
    # 0x52: low nibble 2 is 1.0, high nibble 5 is 3.0; exponent 128 doubles.
    blocks = np.full((1, 16), 0x52, np.uint8)
    values = quantization.dequantize_mxfp4(blocks, np.array([[128]], np.uint8))
    floats = quantization.to_float32(values, "BF16")
    assert floats[0, :4].tolist() == [2.0, 6.0, 2.0, 6.0]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"])
def test_every_float8_code_has_torchs_value(dtype):
    names = {
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "F8_E8M0": torch.float8_e8m0fnu,
    }  # fmt: skip
    codes = np.arange(256, dtype=np.uint8)
    wanted = torch.from_numpy(codes).view(names[dtype]).float().numpy()
    got = quantization.to_float32(codes, dtype)
    assert np.array_equal(got, wanted, equal_nan=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_rounding_to_bfloat16_is_torchs(values):
    array = np.array(values, np.float32)
    got = quantization.to_float32(quantization.to_bfloat16(array), "BF16")
    assert np.array_equal(got, torch.from_numpy(array).bfloat16().float(), equal_nan=True)


@settings(max_examples=200, deadline=None)
@given(st.floats(allow_nan=False))
def test_float64_is_rounded_once(value):
    result = quantization.to_float32(quantization.from_float64(np.array([value])), "BF16")[0]
    if math.isinf(result) or value == 0:
        return
    # The neighbours one bfloat16 step away lie no nearer.
    raw = quantization.to_bfloat16(np.array([result], np.float32))[0]
    for step in (-1, 1):
        if int(raw) & 0x7FFF == 0 and step < 0:
            continue
        neighbour = quantization.to_float32(np.array([int(raw) + step], np.uint16), "BF16")[0]
        if np.isfinite(neighbour):
            assert abs(float(result) - value) <= abs(float(neighbour) - value)


def test_float64_just_above_a_tie_rounds_up():
    # By way of float32 the 2**-40 is lost, the tie appears, and even is below.
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    got = quantization.to_float32(quantization.cast_to_bfloat16(value, "F64"), "BF16")
    assert got[0] == 1 + 2.0**-7


def test_float32_and_float16_become_bfloat16_but_selection_biases_do_not(tmp_path):
    model = write_model(tmp_path / "m", "per_expert", dtype="F32")
    manifest = export(model, tmp_path / "out", dtype="bf16")
    source, result = read_tensors(model), read_tensors(tmp_path / "out")
    for name, (_, shape, body) in source.items():
        if name.endswith("inv_freq"):
            continue
        if name.endswith("correction_bias"):
            assert result[name] == source[name]
            continue
        values = torch.frombuffer(bytearray(body), dtype=torch.float32)
        assert result[name] == ("BF16", shape, bits(values.bfloat16())), name
    changed = {(entry["from"], entry["to"]) for entry in manifest["changed"]}
    assert changed == {("F32", "BF16")}


def test_what_cannot_be_dequantised_is_refused(tmp_path):
    config, tensors = model_tensors("per_expert")
    name = "model.layers.0.self_attn.o_proj.weight_packed"
    from stored_models import write_shard

    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_shard(folder / "model.safetensors", {**tensors, name: ("I64", (2, 2))})
    with pytest.raises(LayoutError, match="packed in a way that cannot be dequantised"):
        shard(folder, tmp_path / "s", 2, dtype="bf16")
    shard(folder, tmp_path / "s", 2)


def test_scales_that_fit_no_block_are_refused():
    assert scale_block((300, 7), (3, 1), (128, 128)) == (128, 128)
    assert scale_block((300, 7), (300, 1), (128, 128)) == (1, 128)
    assert scale_block((300, 7), (3, 1)) == (128, 16)
    assert scale_block((300, 7), (5, 1)) == (64, 16)
    assert scale_block((300, 7), (6, 1)) is None
    view = SimpleNamespace(config={"quantization_config": {"weight_block_size": [128, 128]}})
    with pytest.raises(InputError, match=r"scales \[5, 1\] of `w` fit no block of its shape"):
        scales.fp8_scale(view, "w", (), "F32", (5, 1), (300, 7))


def test_mxfp4_has_no_other_packed_storage(tmp_path):
    model = write_model(tmp_path / "m", "mxfp4", num_experts=2, hidden=32, width=32)
    with pytest.raises(LayoutError, match="no other storage"):
        shard(model, tmp_path / "s", 1, storage="fused")


def test_illegal_sizes_and_ranks_say_the_numbers(tmp_path):
    model = write_model(tmp_path / "m", "per_expert", num_experts=6)
    with pytest.raises(ConfigError, match="`--ep 4` does not divide the 6 experts of layer 0"):
        shard(model, tmp_path / "s", 4)
    with pytest.raises(ConfigError, match="`--rank` is 3; `--ep 3` has 0 to 2"):
        shard(model, tmp_path / "s", 3, rank=3)
