"""`epctl train MODEL` on damaged or unfit input: one clear error each, before a rank starts."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_by_hand import write_checkpoint
from tiny_moonlight import write_tiny_moonlight

from epctl.config import ResolvedConfig, resolve_config
from epctl.errors import ConfigError, EpctlError, HubError, InputError, LayoutError, exit_code_of
from epctl.launch.resume_run import resumed_settings
from epctl.launch.train_command import run_train
from epctl.output import Mode, Output
from epctl.runtime.checkpoint_manifest import Topology


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_moonlight(tmp_path_factory.mktemp("moonlight") / "model")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a job was started")

    monkeypatch.setattr("epctl.launch.train_command.run_job", fail)


def attempt(tmp_path: Path, model: Path | str | None, **flags: Any) -> EpctlError:
    """Asks for a run and returns its error; nothing may be left behind."""
    given = {"model.reference": None if model is None else str(model), "parallel.device": "cpu"}
    given |= {key.replace("__", "."): value for key, value in flags.items()}
    given["run.output"] = str(tmp_path / "run")
    resolved: ResolvedConfig = resolve_config(flags=given)
    with pytest.raises(EpctlError) as caught:
        run_train(resolved, Output(Mode.QUIET), dry_run=False, verbose=False)
    return caught.value


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncate_shard(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def quantise(folder: Path) -> None:
    """Stores the experts as FP8 blocks with scales, as DeepSeek-V3 is published."""
    import torch
    from safetensors.torch import load_file, save_file

    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(folder / file)
        for name in [n for n in tensors if ".experts." in n]:
            scale = name + "_scale_inv"
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[scale] = torch.ones(1, 1)
            index["weight_map"][scale] = file
        save_file(tensors, folder / file)
    index_path.write_text(json.dumps(index))


def remote_tokenizer(folder: Path) -> None:
    """A tokenizer that is code of the repository, as Moonlight's own."""
    (folder / "tokenizer.json").unlink()
    config = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_evil.py").write_text("raise SystemExit('remote code ran')\n")


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


Damage = Callable[[Path], None]
DAMAGES: dict[str, tuple[Damage, type[EpctlError], str, str]] = {
    "missing shard": (remove_shard, InputError, "model-00002-of-00002", "fetch"),
    "truncated shard": (truncate_shard, InputError, "model-00001-of-00002", "download"),
    "no config": (lambda f: (f / "config.json").unlink(), InputError, "no `config.json`", ""),
    "fp8": (quantise, LayoutError, "stored quantised (fp8", "epctl export"),
    "other family": (
        lambda f: edit_config(f, model_type="newcomer", architectures=["NewcomerForCausalLM"]),
        LayoutError,
        "model_type `newcomer`",
        "adding-a-model",
    ),
    "no tokenizer": (no_tokenizer, InputError, "no tokenizer", "--tokenizer"),
    "remote tokenizer": (remote_tokenizer, InputError, "does not run unasked", "--tokenizer"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_model_is_one_clear_error(copy: Path, tmp_path: Path, name: str) -> None:
    damage, kind, said, hint = DAMAGES[name]
    damage(copy)
    error = attempt(tmp_path, copy)
    assert isinstance(error, kind), repr(error)
    assert said in error.message
    assert hint in (error.hint or "")
    assert exit_code_of(error) == 4


def test_unknown_model_without_network_says_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = attempt(tmp_path, "nobody/unknown-model")
    assert isinstance(error, HubError)
    assert "HF_HUB_OFFLINE" in error.message
    assert "cache" in error.message
    assert "no folder `nobody/unknown-model`" in error.message
    assert "epctl train ./FOLDER" in (error.hint or "")
    assert exit_code_of(error) == 5


def test_a_model_that_only_the_catalog_knows_has_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    error = attempt(tmp_path, "moonshotai/Moonlight-16B-A3B")
    assert isinstance(error, HubError)
    assert "only the bundled catalog knows the model" in error.message


def test_remote_code_needs_a_pinned_revision(tmp_path: Path, checkpoint: Path) -> None:
    error = attempt(
        tmp_path,
        checkpoint,
        model__tokenizer="org/name@main",
        model__trust_remote_code=True,
    )
    assert isinstance(error, ConfigError)
    assert "needs a pinned revision" in error.message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("binary.txt", b"\x7fELF\0\0", "is binary"),
        (None, b"", "no file matches"),
    ],
)
def test_bad_data_files(
    tmp_path: Path, checkpoint: Path, name: str | None, content: bytes, said: str
) -> None:
    path = tmp_path / (name or "missing.txt")
    if name is not None:
        path.write_bytes(content)
    error = attempt(tmp_path, checkpoint, data__train=(str(path),))
    assert isinstance(error, InputError)
    assert said in error.message
    assert path.name in error.message


def test_ep_size_that_does_not_divide_this_models_experts(tmp_path: Path, checkpoint: Path) -> None:
    error = attempt(tmp_path, checkpoint, parallel__ep=3)
    assert isinstance(error, ConfigError)
    assert "3 does not divide the 8 routed experts" in error.message


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "wandb" else find(name)
    )
    error = attempt(tmp_path, None, run__track="wandb")
    assert isinstance(error, ConfigError)
    assert "pip install wandb" in (error.hint or "")


def test_resume_of_what_is_no_run_or_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run folder"):
        resumed_settings(tmp_path)
    (tmp_path / "config.json").write_text(resolve_config(flags={}).to_json())
    with pytest.raises(InputError, match="has no checkpoint") as caught:
        resumed_settings(tmp_path)
    assert "checkpoint.every" in str(caught.value.hint)


def test_a_batch_that_the_new_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "earlier"
    settings = {"train.micro_batch_size": 1, "parallel.num_ranks": 2}
    write_checkpoint(run, 4, topology=Topology(2, 2, 3))
    (run / "config.json").write_text(resolve_config(flags=settings).to_json())
    error = attempt(tmp_path, None, run__resume=str(run), parallel__num_ranks=3)
    assert isinstance(error, ConfigError)
    assert "the run has 2 sequences a step, which 3 ranks cannot share" in error.message


def test_two_lengths_at_once_contradict() -> None:
    with pytest.raises(ConfigError, match=r"`train.steps` and `train.epochs` are both given"):
        resolve_config(flags={"train.steps": 3, "train.epochs": 1.0})


# --- found by the ranks, because only they read records and tensors ---------------------------


def test_a_tensor_of_another_shape_names_both_shapes(copy: Path) -> None:
    from epctl.runtime.training_model import open_checkpoint

    edit_config(copy, intermediate_size=40)
    model = open_checkpoint("tiny", copy, None)
    import torch

    name = "model.layers.0.mlp.gate_proj.weight"
    with pytest.raises(InputError, match=r"has shape \[48, 32\], the model has \[40, 32\]"):
        model.weights.read_into(name, torch.empty(40, 32))


def test_tensors_without_a_place_are_refused(copy: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from epctl.runtime.training_model import open_checkpoint

    save_file({"model.layers.1.extra.weight": torch.ones(2)}, copy / "extra.safetensors")
    index_path = copy / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["model.layers.1.extra.weight"] = "extra.safetensors"
    index_path.write_text(json.dumps(index))
    with pytest.raises(InputError, match="1 tensors that the model has no place for"):
        open_checkpoint("tiny", copy, None)


def test_a_broken_tokenizer_file_is_named(copy: Path) -> None:
    from epctl.runtime.training_model import load_tokenizer

    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_tokenizer(str(copy), trust_remote_code=False)
    assert "--tokenizer" in str(caught.value.hint)


def test_auto_map_is_not_followed_and_not_saved(copy: Path, tmp_path: Path) -> None:
    import sys

    import torch

    from epctl.runtime.training_model import load_tokenizer, open_checkpoint

    remote = "raise SystemExit('remote code ran')\n"
    (copy / "modeling_absent.py").write_text(remote)
    model = open_checkpoint("tiny", copy, load_tokenizer(str(copy), trust_remote_code=False))
    model.write_extras(tmp_path, torch.bfloat16)
    assert type(model.config).__module__.startswith("transformers.models.deepseek_v3")
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not [name for name in sys.modules if "modeling_absent" in name]
