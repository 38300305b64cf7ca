"""merge(shard(x, ep)) == x and reshard(a -> b) == shard(b), over every expert storage."""

import math
import tempfile
from pathlib import Path

import pytest
from convert_runs import merge, reshard, shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored_models import PLAIN, STORAGES, WIDTH, read_tensors, read_tree, write_model

from epctl.convert.open import open_checkpoint
from epctl.layout.source import read_shard_header
from epctl.output import set_mode

EP_SIZES = (1, 2, 4, 8, 64)


@pytest.fixture(autouse=True)
def quiet():
    set_mode(quiet=True)
    yield
    set_mode()


def without_stale(tensors):
    return {name: value for name, value in tensors.items() if not name.endswith("inv_freq")}


@st.composite
def cases(draw, storages):
    storage = draw(st.sampled_from(storages))
    first, second = draw(st.sampled_from(EP_SIZES)), draw(st.sampled_from(EP_SIZES))
    experts = math.lcm(first, second) * draw(st.integers(1, 2))
    hidden, width = draw(st.integers(2, 9)), draw(st.integers(1, 9))
    if storage == "mxfp4":
        hidden, width = 32 * draw(st.integers(1, 2)), 32 * draw(st.integers(1, 2))
    elif storage == "fp8":
        hidden, width = (
            draw(st.sampled_from((1, 127, 128, 130))),
            draw(st.sampled_from((1, 128, 129))),
        )
        experts = min(experts, 8) if max(first, second) <= 8 else experts
    elif width == hidden or (storage == "fused_transposed" and hidden == 2 * width):
        width = hidden + 1  # square experts leave their orientation to the config
    sizes = {
        "num_experts": experts,
        "hidden": hidden,
        "width": width,
        "num_layers": draw(st.integers(1, 2)),
        "num_files": draw(st.integers(1, 3)),
        "dtype": draw(st.sampled_from(("BF16", "F32", "F16"))),
        "seed": draw(st.integers(0, 99)),
    }
    return storage, first, second, sizes, draw(st.booleans())


def check(case, choice):
    storage, first, second, sizes, replicate = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model", storage, **sizes)
        options = {"storage": choice, "replicate": replicate}
        # Small files, so that experts of a layer come to lie in several.
        whole = shard(model, folder / "a", first, max_file_bytes=3000, **options)
        merged = merge(folder / "a", folder / "merged")
        assert read_tensors(folder / "merged") == without_stale(read_tensors(model))
        assert {path.name for path in model.iterdir()} <= {
            path.name for path in (folder / "merged").iterdir()
        }
        other = shard(model, folder / "b", second, **options)
        reshard(folder / "a", folder / "ab", second)
        assert read_tree(folder / "ab") == read_tree(folder / "b")
        assert whole["digest"] == other["digest"]
        if choice == "checkpoint":
            assert merged["digest"] == whole["digest"]
        stale = sizes["num_layers"]
        assert len(open_checkpoint(str(folder / "b")).dropped) == stale
        assert whole["changed"] == []


PROFILE = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@PROFILE
@given(cases(list(STORAGES)))
def test_checkpoint_storage_survives_shard_merge_and_reshard(case):
    check(case, "checkpoint")


@PROFILE
@given(cases(PLAIN))
def test_fused_storage_survives_shard_merge_and_reshard(case):
    check(case, "fused")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("ep", EP_SIZES)
def test_every_storage_at_every_size(storage, ep, tmp_path):
    sizes = {"mxfp4": (64, 32), "fp8": (130, 128)}.get(storage, (6, 4))
    experts = max(4, ep)
    model = write_model(
        tmp_path / "model", storage, num_experts=experts, hidden=sizes[0], width=sizes[1]
    )
    manifest = shard(model, tmp_path / "s", ep)
    share = experts // ep
    assert [entry["experts"]["0"] for entry in manifest["placement"]] == [
        [rank * share, (rank + 1) * share] for rank in range(ep)
    ]
    merge(tmp_path / "s", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == without_stale(read_tensors(model))
    reshard(tmp_path / "s", tmp_path / "one", 1)
    shard(model, tmp_path / "direct", 1)
    assert read_tree(tmp_path / "one") == read_tree(tmp_path / "direct")


def test_a_rank_holds_its_own_experts_and_no_others(tmp_path):
    model = write_model(tmp_path / "model", "per_expert", num_experts=8)
    shard(model, tmp_path / "s", 4)
    names = set(read_tensors(tmp_path / "s" / "rank-00001"))
    assert names == {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        for layer in (0, 1)
        for expert in (2, 3)
        for projection in ("gate", "up", "down")
    }
    assert not any("experts." in name for name in read_tensors(tmp_path / "s" / "shared"))


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path):
    model = write_model(tmp_path / "m", "fp8", num_experts=4, hidden=3, width=5)
    shard(model, tmp_path / "s", 2)
    for path in (tmp_path / "s").rglob("*.safetensors"):
        for name, entry in read_shard_header(path).tensors.items():
            assert entry.start % WIDTH[entry.dtype] == 0, name


def test_one_rank_alone_writes_the_same_bytes(tmp_path):
    model = write_model(tmp_path / "model", "stacked", num_experts=8)
    shard(model, tmp_path / "all", 4)
    shard(model, tmp_path / "one", 4, rank=2)
    everything, alone = read_tree(tmp_path / "all"), read_tree(tmp_path / "one")
    weights = {path for path in alone if path.endswith(".safetensors")}
    assert {path.split("/")[0] for path in weights} == {"rank-00002", "shared"}
    assert all(alone[path] == everything[path] for path in weights)


def test_replicate_gives_each_rank_a_folder_of_its_own(tmp_path):
    model = write_model(tmp_path / "model", "per_expert", num_experts=4)
    shard(model, tmp_path / "s", 2, replicate=True)
    rank = tmp_path / "s" / "rank-00001"
    assert {"config.json", "tokenizer.json"} <= {path.name for path in rank.iterdir()}
    assert "model.embed_tokens.weight" in read_tensors(rank)
    assert not (tmp_path / "s" / "shared").exists()


def test_swapping_two_experts_changes_the_digests_of_just_those(tmp_path):
    one = shard(write_model(tmp_path / "m", "fused", num_experts=4), tmp_path / "s", 2)
    digests = one["tensors"]["model.layers.0.mlp.experts.gate_up_proj"]["digests"]
    assert list(digests) == ["0", "1", "2", "3"]
    assert len(set(digests.values())) == 4
    other = shard(tmp_path / "m", tmp_path / "s4", 4)
    assert other["tensors"]["model.layers.0.mlp.experts.gate_up_proj"]["digests"] == digests
