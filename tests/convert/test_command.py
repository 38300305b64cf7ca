"""What a person sees of `epctl convert` and `epctl export`, and the codes they exit with."""

import json
import subprocess
import sys

import pytest
from checkpoint_by_hand import write_checkpoint
from stored_models import read_tensors, read_tree, write_model


def epctl(*arguments, timeout=120):
    return subprocess.run(
        [sys.executable, "-m", "epctl", *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "model", "per_expert", num_experts=8)


@pytest.fixture(scope="module")
def shards(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards") / "s"
    assert epctl("convert", "shard", model, "--ep", 4, "-o", output).returncode == 0
    return output


@pytest.mark.parametrize("arguments", [["convert", "--help"], ["convert", "shard", "--help"]])
def test_help_never_loads_torch(arguments):
    program = (
        "import sys\nfrom epctl.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stderr.strip() == "[]"


def test_sharding_without_arithmetic_loads_neither_torch_nor_numpy(model, tmp_path):
    program = (
        "import sys\nfrom epctl.cli import app\n"
        f"try: app(['convert', 'shard', {str(model)!r}, '--ep', '2', '-o', {str(tmp_path / 's')!r},"
        " '--quiet'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == "[]"
    assert (tmp_path / "s/manifest.json").is_file()


def test_dry_run_shows_the_plan_and_touches_nothing(model, tmp_path):
    result = epctl("convert", "shard", model, "--ep", 2, "-o", tmp_path / "s", "--dry-run")
    assert result.returncode == 0
    for text in ("rank-00000", "rank-00001", "shared", "needed", "inv_freq"):
        assert text in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_on_this_disk_can_be_planned_but_not_written(tmp_path):
    arguments = (
        "convert",
        "shard",
        "moonshotai/Moonlight-16B-A3B",
        "--ep",
        8,
        "-o",
        tmp_path / "s",
    )
    planned = epctl(*arguments, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    document = json.loads(planned.stdout)
    assert 30e9 < document["num_bytes"] < 34e9
    assert len(document["folders"]) == 9
    written = epctl(*arguments)
    assert written.returncode == 5
    assert "hf download moonshotai/Moonlight-16B-A3B" in written.stderr
    assert list(tmp_path.iterdir()) == []


def test_closing_table_and_json_say_the_same(model, tmp_path):
    told = epctl("convert", "shard", model, "--ep", 2, "-o", tmp_path / "a")
    document = json.loads(
        epctl("convert", "shard", model, "--ep", 2, "-o", tmp_path / "b", "--json").stdout
    )
    assert document["digest"] in told.stdout
    assert document["num_tensors"] == len(read_tensors(model)) - 2
    assert document["dropped"] == [
        {
            "name": "model.layers.{0-1}.self_attn.rotary_emb.inv_freq",
            "reason": "stale: the model computes it itself",
        }
    ]
    assert "dropped: model.layers.{0-1}.self_attn.rotary_emb.inv_freq (stale" in told.stdout
    assert read_tree(tmp_path / "a") == read_tree(tmp_path / "b")


def test_verify_holds_a_shard_folder_against_its_source(model, shards):
    for arguments in ([model, shards], [shards, model], [shards]):
        result = epctl("convert", "verify", *arguments)
        assert result.returncode == 0, result.stderr
        assert "equals" in result.stdout


def test_verify_names_what_differs_and_where(model, tmp_path):
    other = write_model(tmp_path / "other", "per_expert", num_experts=8, seed=1)
    result = epctl("convert", "verify", model, other, "--json")
    assert result.returncode == 7
    document = json.loads(result.stdout)
    assert not document["equal"]
    assert len(document["differences"]) == len(read_tensors(model)) - 2
    assert "first differs at value 0" in result.stderr
    assert "... and" in result.stderr


def test_verify_with_a_tolerance_compares_values(tmp_path):
    source = write_model(tmp_path / "m", "per_expert", num_experts=4, dtype="F32")
    narrow = tmp_path / "narrow"
    assert epctl("export", source, "-o", narrow, "--dtype", "bf16").returncode == 0
    (narrow / "manifest.json").unlink()  # a stranger's checkpoint
    bitwise = epctl("convert", "verify", source, narrow)
    assert bitwise.returncode == 7
    assert "F32 [4, 6] against BF16 [4, 6]" in bitwise.stderr
    assert epctl("convert", "verify", source, narrow, "--tolerance", "4e-3").returncode == 0
    strict = epctl("convert", "verify", source, narrow, "--tolerance", "1e-3")
    assert strict.returncode == 7
    assert "max |a - b| =" in strict.stderr


def test_verify_reads_a_fused_model_as_its_source(tmp_path):
    source = write_model(tmp_path / "m", "per_expert", num_experts=4)
    assert epctl("export", source, "-o", tmp_path / "f", "--storage", "fused").returncode == 0
    (tmp_path / "f/manifest.json").unlink()
    result = epctl("convert", "verify", source, tmp_path / "f")
    assert result.returncode == 0, result.stderr
    assert "experts stored as fused are read as per expert" in result.stderr


def test_merge_of_a_part_and_of_a_model_is_refused(model, tmp_path):
    part = tmp_path / "part"
    assert epctl("convert", "shard", model, "--ep", 4, "--rank", 1, "-o", part).returncode == 0
    assert epctl("convert", "verify", part).returncode == 0
    result = epctl("convert", "merge", part, "-o", tmp_path / "m")
    assert result.returncode == 4
    assert "holds rank 1 of 4 only" in result.stderr
    assert "is no shard folder" in epctl("convert", "merge", model, "-o", tmp_path / "m").stderr


def test_a_missing_file_of_a_rank_is_named(shards, model, tmp_path):
    copy = tmp_path / "copy"
    assert epctl("convert", "reshard", shards, "--ep", 2, "-o", copy).returncode == 0
    (copy / "rank-00001/model-00001-of-00001.safetensors").unlink()
    result = epctl("convert", "merge", copy, "-o", tmp_path / "m")
    assert result.returncode == 4
    assert "rank-00001/model-00001-of-00001.safetensors` is missing" in result.stderr


def test_reshard_names_its_output_by_default(shards):
    assert epctl("convert", "reshard", shards, "--ep", 1).returncode == 0
    assert (shards.parent / "s-ep1/rank-00000").is_dir()


def test_export_takes_a_run_its_checkpoint_or_a_shard_folder(model, shards, tmp_path):
    run = tmp_path / "run"
    for step in (10, 20):
        source = write_model(tmp_path / f"step-{step}", "per_expert", num_experts=8, seed=step)
        write_checkpoint(run, step, model=source)
    (run / "config.json").write_text("{}")
    assert epctl("export", run, "-o", tmp_path / "newest").returncode == 0
    older = run / "checkpoints/step-0000010"
    assert epctl("export", older, "-o", tmp_path / "older").returncode == 0
    assert epctl("export", older, "-o", tmp_path / "bf16", "--dtype", "bf16").returncode == 0
    dtypes = {name: dtype for name, (dtype, *_) in read_tensors(tmp_path / "bf16").items()}
    # Biases of the selection stay float32: they move in steps that bfloat16 does not resolve.
    assert {d for name, d in dtypes.items() if not name.endswith("_bias")} == {"BF16"}
    assert {d for name, d in dtypes.items() if name.endswith("_bias")} == {"F32"}
    for name, step in (("newest", 20), ("older", 10)):
        exported, wanted = read_tensors(tmp_path / name), read_tensors(tmp_path / f"step-{step}")
        assert exported == {name: value for name, value in wanted.items() if name in exported}
    (older / "manifest.json").unlink()
    unfinished = epctl("export", older, "-o", tmp_path / "unfinished")
    assert unfinished.returncode == 4
    assert "it was never finished" in unfinished.stderr
    write_model(run / "model", "per_expert", num_experts=8)
    assert epctl("export", run, "-o", tmp_path / "final").returncode == 0
    assert epctl("export", shards, "-o", tmp_path / "merged").returncode == 0
    assert read_tensors(tmp_path / "final") == read_tensors(tmp_path / "merged")


def test_a_dense_model_is_not_sharded(tmp_path):
    from stored_models import write_shard

    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 4}')
    write_shard(folder / "model.safetensors", {"model.norm.weight": ("BF16", (4,))})
    result = epctl("convert", "shard", folder, "--ep", 2, "-o", tmp_path / "s")
    assert result.returncode == 3
    assert "has no routed experts" in result.stderr


def test_a_damaged_manifest_is_refused(shards, tmp_path):
    import shutil

    copy = shutil.copytree(shards, tmp_path / "copy")
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[:-40])
    assert epctl("convert", "verify", copy).returncode == 4
    (copy / "manifest.json").write_text(text.replace("rank-00001/", "../rank-00001/"))
    result = epctl("convert", "verify", copy)
    assert result.returncode == 4
    assert "outside of it" in result.stderr
    for good, bad in (('"dtype": "BF16"', '"dtype": 7'), ('"num_experts": 8', '"num_experts": []')):
        assert good in text
        (copy / "manifest.json").write_text(text.replace(good, bad))
        result = epctl("convert", "merge", copy, "-o", tmp_path / "merged")
        assert result.returncode == 4, result.stderr
