"""Hostile and broken indexes and folders."""

import json
import os
import pickle
from pathlib import Path

import pytest
from checkpoints import CONFIG, shard, tensor_shard, write_model

from epctl.errors import ExitCode, HubError, InputError
from epctl.hub import _PROXIES, resolve
from epctl.layout.safetensors import (
    DuplicateTensorError,
    HeaderSyntaxError,
    TensorEntryError,
    TruncatedFileError,
)
from epctl.layout.shards import (
    CheckpointIndexError,
    MissingShardError,
    MissingTensorError,
    RepeatedTensorError,
    UnsafePathError,
)

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
F4 = ("F32", (1,))


def index(**weight_map):
    return {"metadata": {"total_size": 4 * len(weight_map)}, "weight_map": weight_map}


def test_index_that_names_a_missing_shard_is_refused(tmp_path):
    write_model(tmp_path, {ONE: tensor_shard({"a": F4})}, index=index(a=ONE, b=TWO))
    with pytest.raises(MissingShardError, match=TWO):
        resolve(str(tmp_path))


def test_index_that_names_an_absent_tensor_is_refused_with_the_count(tmp_path):
    write_model(
        tmp_path, {ONE: tensor_shard({"a": F4})}, index=index(a=ONE, ghost=ONE, phantom=ONE)
    )
    with pytest.raises(MissingTensorError, match=f"`{ONE}` holds `ghost`.*2 such tensors"):
        resolve(str(tmp_path))


def test_tensor_that_the_index_omits_is_a_warning(tmp_path):
    write_model(tmp_path, {ONE: tensor_shard({"a": F4, "extra": F4})}, index=index(a=ONE))
    source = resolve(str(tmp_path))
    assert list(source.tensors) == ["a"]
    assert any("`extra`" in warning and "1 tensors" in warning for warning in source.warnings)


def test_of_two_copies_the_index_decides_and_says_so(tmp_path):
    shards = {ONE: tensor_shard({"a": F4}), TWO: tensor_shard({"b": F4, "a": ("F32", (3,))})}
    write_model(tmp_path, shards, index=index(a=ONE, b=TWO))
    source = resolve(str(tmp_path))
    assert source.tensors["a"].shape == (1,)
    assert any(
        "two shards" in warning and f"used: `{ONE}`" in warning for warning in source.warnings
    )


def test_two_copies_without_an_index_are_refused(tmp_path):
    write_model(tmp_path, {ONE: tensor_shard({"a": F4}), TWO: tensor_shard({"a": F4})})
    with pytest.raises(RepeatedTensorError, match=f"`a` is in `{ONE}` and in `{TWO}`"):
        resolve(str(tmp_path))


UNSAFE = [
    "../up.safetensors", "..\\up.safetensors", "/etc/up.safetensors", "C:\\up.safetensors",
    "C:up.safetensors", "\\\\host\\share\\up.safetensors", "sub/up.safetensors",
    "a/../../up.safetensors", "up\0.safetensors", "..safetensors", "~/up.safetensors",
    "nul.safetensors", "up.safetensors/", "", "up\n.safetensors", "file:up.safetensors",
    ".safetensors", "COM1.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE)
def test_shard_path_that_could_leave_the_folder_is_refused(name, tmp_path):
    write_model(tmp_path, {ONE: tensor_shard({"a": F4})}, index=index(a=name))
    with pytest.raises(UnsafePathError) as caught:
        resolve(str(tmp_path))
    assert caught.value.exit_code == ExitCode.INPUT
    assert "\0" not in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["pytorch_model.bin", 7, None, ["a"]])
def test_shard_that_is_no_safetensors_file_is_refused(name, tmp_path):
    write_model(tmp_path, {ONE: tensor_shard({"a": F4})}, index=index(a=name))
    with pytest.raises(UnsafePathError, match=r"no \.safetensors file"):
        resolve(str(tmp_path))


def test_link_that_leaves_the_folder_is_refused(tmp_path):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(tensor_shard({"a": F4}))
    model = write_model(tmp_path / "model", {}, index=index(a=ONE))
    (model / ONE).symlink_to(secret)
    with pytest.raises(UnsafePathError, match="link that leaves"):
        resolve(str(model))


def test_links_of_the_hub_cache_are_followed(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    write_model(snapshot, {})
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_bytes(tensor_shard({"a": F4}))
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert list(resolve(str(snapshot)).tensors) == ["a"]


def test_wrong_total_size_is_a_warning_with_both_numbers(tmp_path):
    wrong = {"metadata": {"total_size": 999}, "weight_map": {"a": ONE}}
    write_model(tmp_path, {ONE: tensor_shard({"a": F4})}, index=wrong)
    assert "the index claims 999 bytes, its tensors have 4" in resolve(str(tmp_path)).warnings


def test_short_shard_is_refused(tmp_path):
    write_model(tmp_path, {ONE: tensor_shard({"a": F4})[:-2]}, index=index(a=ONE))
    with pytest.raises(TruncatedFileError, match="2 bytes are missing"):
        resolve(str(tmp_path))


def test_unusual_shard_names_are_accepted(tmp_path):
    name = "weights part=1 @v2+x.safetensors"
    write_model(tmp_path, {name: tensor_shard({"a": F4})}, index=index(a=name))
    assert resolve(str(tmp_path)).tensors["a"].file == name


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[]", HeaderSyntaxError),
        ("{", HeaderSyntaxError),
        ("{}", CheckpointIndexError),
        ('{"weight_map": {}}', CheckpointIndexError),
        ('{"weight_map": ["a"]}', CheckpointIndexError),
        (f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}', DuplicateTensorError),
    ],
)
def test_broken_index_is_refused(text, error, tmp_path):
    write_model(tmp_path, {ONE: tensor_shard({"a": F4})}, index=text)
    with pytest.raises(error, match=r"index\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    "config", ["[]", "{", '{"a": 1, "a": 2}', '{"a":' * 6000 + "1" + "}" * 6000]
)
def test_broken_config_is_refused(config, tmp_path):
    write_model(tmp_path, {"model.safetensors": tensor_shard({"a": F4})}, config=config)
    with pytest.raises(InputError, match=r"config\.json"):
        resolve(str(tmp_path))


def test_constants_that_python_writes_into_configs_are_read(tmp_path):
    # The default time_step_limit of Mamba hybrids; transformers 4 wrote it as Infinity.
    config = '{"model_type": "llama", "time_step_limit": [0.0, Infinity], "x": NaN}'
    write_model(tmp_path, {"model.safetensors": tensor_shard({"a": F4})}, config=config)
    assert resolve(str(tmp_path)).config["time_step_limit"] == [0.0, float("inf")]


def test_control_characters_of_an_index_stay_out_of_messages(tmp_path):
    index = {"weight_map": {"\x1b]0;owned\x07": ONE}}
    write_model(tmp_path, {ONE: tensor_shard({"a": F4})}, index=index)
    with pytest.raises(TensorEntryError) as caught:
        resolve(str(tmp_path))
    assert caught.value.message.isprintable()


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_refused_and_never_opened(name, tmp_path):
    canary = tmp_path / "canary"
    model = write_model(tmp_path / "model", {name: pickle.dumps(Canary(str(canary)))})
    with pytest.raises(InputError, match="pickled weights"):
        resolve(str(model))
    assert not canary.exists()


def test_pickle_behind_a_safetensors_name_is_refused(tmp_path):
    canary = tmp_path / "canary"
    data = pickle.dumps(Canary(str(canary)), protocol=2)
    model = write_model(tmp_path / "model", {"model.safetensors": data})
    with pytest.raises(InputError, match="pickle"):
        resolve(str(model))
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["folder", "file", "name"])
def test_gguf_is_refused_with_a_sentence(kind, tmp_path):
    model = write_model(tmp_path, {"model-Q4.gguf": b"GGUF" + bytes(60)})
    reference = {"folder": model, "file": model / "model-Q4.gguf", "name": "absent.gguf"}[kind]
    with pytest.raises(InputError, match="cannot be trained or sharded"):
        resolve(str(reference))


@pytest.mark.parametrize(
    "reference",
    ["../../etc", "/no/such/folder", "./nothing", "a/b/c", "org/..", "org/name@", "org/na me", "@x",
     "org/name@../x", "", "-x/y"],
)  # fmt: skip
def test_reference_that_is_nothing_is_refused_offline(reference, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError):
        resolve(reference)


def test_empty_reference_is_not_this_folder(tmp_path, monkeypatch):
    write_model(tmp_path, {"model.safetensors": tensor_shard({"a": F4})})
    monkeypatch.chdir(tmp_path)
    assert resolve(".").tensors
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        resolve("")


@pytest.mark.parametrize("reference", ["a" * 5000, "~nobody-of-this-name/model"])
def test_path_that_the_system_refuses_is_a_typed_error(reference):
    with pytest.raises(InputError, match="cannot be read") as caught:
        resolve(reference)
    assert len(caught.value.message) < 300


def test_folder_that_may_not_be_read_is_a_typed_error(tmp_path, monkeypatch):
    write_model(tmp_path, {"model.safetensors": tensor_shard({"a": F4})})

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("url", ["http://localhost:99999", "http://[::1", "hub.example", "ftp://x"])
def test_endpoint_that_is_no_address_is_a_hub_error(url, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in _PROXIES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(HubError, match="no http"):
        resolve("org/name")


def test_folder_without_config_or_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        resolve(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(shard({}))
    with pytest.raises(InputError, match=r"no `config\.json`"):
        resolve(str(tmp_path))


def test_code_named_by_the_config_is_never_imported(tmp_path, capsys):
    import sys

    from epctl.layout.detect import detect

    config = {
        **CONFIG,
        "auto_map": {"AutoConfig": "configuration_trap.Trap"},
        "trust_remote_code": True,
    }
    model = write_model(tmp_path, {"model.safetensors": tensor_shard({"a": F4})}, config=config)
    (model / "configuration_trap.py").write_text("raise SystemExit('imported')\n")
    before = set(sys.modules)
    layout = detect(resolve(str(model)))
    assert layout.remote_code
    assert any("nothing of it was imported" in warning for warning in layout.warnings)
    assert not {name for name in set(sys.modules) - before if "trap" in name}
    assert json.loads((model / "config.json").read_text())["trust_remote_code"] is True
