"""`epctl inspect` as typed: text, JSON, tensor table, tree, speed, and no torch."""

import json
import os
import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from epctl.cli import app

MOONLIGHT = "moonshotai/Moonlight-16B-A3B"
runner = CliRunner()


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("COLUMNS", "110")


def run(*arguments):
    return runner.invoke(app, ["inspect", *arguments])


def document(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_moonlight_as_typed_shows_the_card_and_says_why_the_catalog_answered():
    result = run(MOONLIGHT)
    assert result.exit_code == 0
    for words in (
        "source: catalog; 5,344 tensors", "Parameters: 15.96 B, 2.91 B active", "14.39 B",
        "26 (1-26), dense 0", "64, top 6", "sigmoid", "2.446", "routed_scaling_factor",
        "1 2 4 8 16 32 64", "27 stale inv_freq tensors will be dropped",
    ):  # fmt: skip
        assert words in result.stdout, words
    assert "not reachable" in result.stderr
    assert "bundled catalog" in result.stderr


STABLE = {
    "model": {"id", "revision", "source", "architecture", "model_type", "dtype"},
    "parameters": {
        "total", "active_per_token", "routed_experts", "shared_experts", "dense", "vision",
        "embeddings",
    },
    "moe": {
        "num_layers", "layers", "dense_layers", "num_experts", "top_k",
        "expert_intermediate_size", "shared_experts", "expert_storage", "router",
    },
}  # fmt: skip


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_no_value_is_lost_in_a_narrow_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = run(MOONLIGHT).stdout
    assert max(map(len, shown.splitlines())) <= columns
    unwrapped = "".join(shown.split())
    for value in ("64,top6", "1408ofhidden2048", "2.446", "mlp.gate.e_score_correction_bias"):
        assert value in unwrapped
    assert ("routed_scaling_factor=2.446" in unwrapped) == (columns == 200)


def test_json_has_the_stable_names():
    result = document(MOONLIGHT)
    assert set(result) >= {*STABLE, "vision", "ep_sizes", "sp_sizes", "warnings", "reasons"}
    for section, names in STABLE.items():
        assert names <= set(result[section])
    router = {"score_func", "correction_bias", "num_groups", "top_groups", "normalize", "scale"}
    assert router <= set(result["moe"]["router"])
    assert result["model"]["source"] == "catalog"
    assert result["moe"]["expert_storage"] == "per_expert"
    assert result["moe"]["shared_experts"] == 2
    parts = ("routed_experts", "shared_experts", "dense", "vision", "embeddings")
    assert sum(result["parameters"][part] for part in parts) == result["parameters"]["total"]


def test_documented_names_are_those_of_the_json():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
    result = document("Qwen/Qwen3-VL-30B-A3B-Instruct")
    for section in ("model", "parameters", "moe", "vision"):
        for name in result[section]:
            assert f"`{name}`" in page, f"{section}.{name} is not documented"


def test_vision_model_has_its_own_table():
    result = run("Qwen/Qwen2.5-VL-7B-Instruct")
    for words in ("Vision", "32 layers, 16 heads", "28 of 32 layers", "151655", "1 2 4 8 16 32"):
        assert words in result.stdout, words
    assert "Mixture of experts" not in result.stdout


def test_tensor_table_takes_a_filter():
    by_part = run(MOONLIGHT, "--tensors", "--filter", "layers.1.mlp.gate.").stdout.splitlines()
    assert by_part[-1] == "2 tensors"
    assert by_part[1].startswith("model.layers.1.mlp.gate.weight")
    assert "[64, 2048]" in by_part[1]
    assert run(MOONLIGHT, "--tensors", "--filter", "*.inv_freq").stdout.endswith("27 tensors\n")
    assert run(MOONLIGHT, "--tensors").stdout.endswith("5344 tensors\n")
    rows = document(MOONLIGHT, "--tensors", "--filter", "lm_head")["tensors"]
    assert [row["shape"] for row in rows] == [[163840, 2048]]


def test_tree_folds_equal_layers():
    lines = run(MOONLIGHT, "--tree").stdout.splitlines()
    assert len(lines) < 60
    assert any("1-26 (x26)" in line for line in lines)
    assert any("experts.0-63 (x64)" in line for line in lines)
    assert document(MOONLIGHT, "--tree")["tree"]["model"]["layers"].keys() == {"0", "1-26 (x26)"}


def test_quiet_prints_data_only():
    result = run(MOONLIGHT, "--quiet")
    assert result.stderr == ""
    assert "15.96 B" in result.stdout


def test_error_has_its_exit_code_and_a_hint(tmp_path):
    result = run(str(tmp_path))
    assert result.exit_code == 4
    assert "error: " in result.stderr
    assert "hint: " in result.stderr
    assert run("org/absent").exit_code == 5


def subprocess_run(code, **environment):
    variables = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False
    )


HEAVY = ("torch", "transformers", "deepspeed", "triton", "numpy", "safetensors")
LOADED = f"""
import sys
from typer.testing import CliRunner
from epctl.cli import app
result = CliRunner().invoke(app, ["inspect", {MOONLIGHT!r}, "--json"])
assert result.exit_code == 0, result.output
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""


def test_inspect_imports_neither_torch_nor_its_friends():
    result = subprocess_run(LOADED)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_inspect_of_the_catalog_is_quick():
    # Processor time, so that a busy machine does not fail the test; alone it is the wall time.
    def used():
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    times = []
    for _ in range(3):
        before = used()
        assert subprocess_run(LOADED).returncode == 0
        times.append(used() - before)
    assert min(times) < 1.5
