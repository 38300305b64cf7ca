"""Reading from a hub through the real client: pinned, headers only, and every way to fail."""

import json
import time

import pytest
from checkpoints import MOE_CONFIG, moe_tensors, tensor_shard
from loopback import SHA

from epctl.errors import ExitCode, HubError
from epctl.hub import connection_problem, resolve
from epctl.layout import remote
from epctl.layout.detect import detect
from epctl.layout.safetensors import (
    NotSafetensorsError,
    TensorSizeError,
    TruncatedFileError,
)
from epctl.layout.shards import MissingShardError, UnsafePathError

MODEL = "org/tiny"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CATALOG_ID = "allenai/OLMoE-1B-7B-0924"


@pytest.fixture
def quick(monkeypatch):
    """Short limits, so that the failing paths take no time."""
    monkeypatch.setattr(remote, "SILENCE_LIMIT", 0.3)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.01)


def two_shards():
    """Returns a repository of one MoE layer in two shards; weights far larger than headers."""
    tensors = moe_tensors(hidden_size=64, width=96)
    config = {**MOE_CONFIG, "hidden_size": 64, "intermediate_size": 96}
    names = list(tensors)
    halves = {ONE: names[:6], TWO: names[6:]}
    files = {
        name: tensor_shard({tensor: tensors[tensor] for tensor in held})
        for name, held in halves.items()
    }
    weight_map = {tensor: name for name, held in halves.items() for tensor in held}
    files["config.json"] = json.dumps(config).encode()
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    files["modeling_trap.py"] = b"raise SystemExit"
    return files


def header_bytes(data):
    return 8 + int.from_bytes(data[:8], "little")


def test_only_headers_are_downloaded(hub):
    files = two_shards()
    hub.add(MODEL, files)
    source = resolve(MODEL)
    assert hub.sent == {
        "config.json": len(files["config.json"]),
        "model.safetensors.index.json": len(files["model.safetensors.index.json"]),
        ONE: header_bytes(files[ONE]),
        TWO: header_bytes(files[TWO]),
    }
    assert sum(len(files[name]) for name in (ONE, TWO)) > 50 * (hub.sent[ONE] + hub.sent[TWO])
    assert source.file_sizes == {name: len(files[name]) for name in (ONE, TWO)}


def test_layout_over_the_wire_equals_the_folder(hub, tmp_path):
    files = two_shards()
    hub.add(MODEL, files)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert resolve(MODEL).tensors == resolve(str(tmp_path)).tensors
    assert detect(resolve(MODEL)).moe == detect(resolve(str(tmp_path))).moe


@pytest.mark.parametrize("revision", ["", "@main", "@v1.0", f"@{SHA}", "@refs/pr/1"])
def test_revision_is_pinned_to_its_commit(hub, revision):
    hub.add(MODEL, two_shards(), **{"v1.0": SHA, "refs/pr/1": SHA})
    source = resolve(MODEL + revision)
    assert (source.kind, source.revision) == ("hub", SHA)


def test_single_file_repository(hub):
    data = tensor_shard(moe_tensors())
    hub.add(MODEL, {"config.json": json.dumps(MOE_CONFIG).encode(), "model.safetensors": data})
    assert detect(resolve(MODEL)).moe.num_experts == 4
    assert hub.sent["model.safetensors"] == header_bytes(data)


@pytest.mark.parametrize(
    "faults", [[429], [429, 503], [500, 502, 504], ["cut"], ["cut", 429, "cut"], ["redirect"] * 2]
)
def test_passing_failures_are_retried(hub, quick, faults):
    hub.add(MODEL, two_shards())
    hub.faults[TWO] = list(faults)
    assert len(resolve(MODEL).tensors) == 13


def test_silent_server_is_retried(hub, quick):
    hub.add(MODEL, two_shards())
    hub.faults[ONE] = ["slow"]
    assert len(resolve(MODEL).tensors) == 13


@pytest.mark.parametrize("fault", [429, 503, "cut", "slow"])
def test_lasting_failure_ends_as_a_hub_error_that_names_the_file(hub, quick, fault):
    hub.add(MODEL, two_shards())
    hub.faults[TWO] = [fault] * 20
    begin = time.perf_counter()
    with pytest.raises(HubError, match=TWO) as caught:
        resolve(MODEL)
    assert caught.value.exit_code == ExitCode.HUB
    assert time.perf_counter() - begin < 5
    assert hub.requests[TWO] == remote.NUM_ATTEMPTS


def test_failure_of_a_catalogued_model_falls_back_with_the_reason(hub, quick):
    hub.add(CATALOG_ID, two_shards())
    hub.faults["model_info"] = [503] * 9
    source = resolve(CATALOG_ID)
    assert source.kind == "catalog"
    assert "503" in source.notes[0]


def test_catalog_does_not_stand_in_for_a_revision(hub, quick):
    hub.add(CATALOG_ID, two_shards())
    hub.faults["model_info"] = [503] * 9
    with pytest.raises(HubError, match="neither in the cache nor in the catalog"):
        resolve(f"{CATALOG_ID}@main")


def test_server_without_ranges_is_read_no_further_than_the_header(hub):
    big = tensor_shard({"a": ("F32", (4_000_000,))})
    config = {"model_type": "dense"}
    hub.add(MODEL, {"config.json": json.dumps(config).encode(), "model.safetensors": big})
    hub.faults["model.safetensors"] = ["whole", "whole"]
    assert resolve(MODEL).tensors["a"].shape == (4_000_000,)
    assert hub.sent["model.safetensors"] < len(big) // 2  # the rest died with the connection


@pytest.mark.parametrize("token", [None, "wrong"])
def test_gated_repository_says_how_to_get_in(hub, token, monkeypatch):
    hub.add(MODEL, two_shards())
    hub.gated[MODEL] = "right"
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match="gated") as caught:
        resolve(MODEL)
    assert "HF_TOKEN" in caught.value.hint
    assert "wrong" not in str(caught.value)
    assert ("no token" in caught.value.message) == (token is None)


def test_token_of_the_environment_opens_the_gate(hub, monkeypatch):
    hub.add(MODEL, two_shards())
    hub.gated[MODEL] = "right"
    monkeypatch.setenv("HF_TOKEN", "right")
    assert resolve(MODEL).revision == SHA


def test_unknown_model_and_unknown_revision(hub):
    hub.add(MODEL, two_shards())
    with pytest.raises(HubError, match="no model `org/absent`"):
        resolve("org/absent")
    with pytest.raises(HubError, match="no revision `v9`"):
        resolve(f"{MODEL}@v9")


def test_index_that_names_a_shard_the_repository_lacks(hub):
    files = two_shards()
    del files[TWO]
    hub.add(MODEL, files)
    with pytest.raises(MissingShardError, match=TWO):
        resolve(MODEL)


def test_unsafe_shard_name_is_refused_before_any_request_for_it(hub):
    files = two_shards()
    files["model.safetensors.index.json"] = b'{"weight_map": {"a": "../../x.safetensors"}}'
    hub.add(MODEL, files)
    with pytest.raises(UnsafePathError):
        resolve(MODEL)
    assert set(hub.requests) == {"model_info", "config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda data: data[:-1], TruncatedFileError),
        (lambda data: b"", TruncatedFileError),
        (lambda data: data[:20], TruncatedFileError),
        (lambda data: b"<!DOCTYPE html><html></html>", NotSafetensorsError),
        (lambda data: data.replace(b"[0, ", b"[1, ", 1), TensorSizeError),
    ],
)
def test_damaged_shard_on_the_hub_is_the_same_error(hub, change, error):
    files = two_shards()
    files[TWO] = change(files[TWO])
    hub.add(MODEL, files)
    with pytest.raises(error, match=TWO):
        resolve(MODEL)


def test_downloaded_snapshot_is_read_from_disk(hub, tmp_path):
    files = two_shards()
    hub.add(MODEL, files)
    fill_cache(tmp_path, files)
    source = resolve(MODEL)
    assert (source.kind, source.revision) == ("cache", SHA)
    assert source.shard_path(ONE).read_bytes() == files[ONE]
    assert not hub.sent


def fill_cache(tmp_path, files):
    repository = tmp_path / "hf" / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    for name, data in files.items():
        (snapshot / name).write_bytes(data)


@pytest.mark.parametrize("revision", ["", "@main", f"@{SHA}"])
def test_offline_reads_the_cache_and_asks_nobody(hub, tmp_path, monkeypatch, revision):
    hub.add(MODEL, two_shards())
    fill_cache(tmp_path, two_shards())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(MODEL + revision).kind == "cache"
    assert not hub.requests


def test_offline_without_cache_uses_the_catalog_or_says_so(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = resolve(CATALOG_ID)
    assert (source.kind, source.revision) == ("catalog", None)
    assert "HF_HUB_OFFLINE" in source.notes[0]
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        resolve("org/absent")


def test_shard_of_a_remote_model_has_no_path(hub):
    from epctl.errors import InputError

    hub.add(MODEL, two_shards())
    with pytest.raises(InputError, match="not on this disk"):
        resolve(MODEL).shard_path(ONE)


def test_unreachable_hub_is_found_out_quickly(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    begin = time.perf_counter()
    assert "not reachable" in connection_problem(0.5)
    assert resolve(CATALOG_ID).kind == "catalog"
    assert time.perf_counter() - begin < 3.0


def test_endpoint_that_is_no_address_is_refused(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "ftp://127.0.0.1")
    with pytest.raises(HubError, match="HF_ENDPOINT"):
        resolve("org/absent")
