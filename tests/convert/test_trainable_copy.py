"""`epctl train` refuses quantised checkpoints, and the command it names makes one it takes."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from stored_models import write_model

from epctl.errors import LayoutError
from epctl.launch.model_reference import open_reference, require_trainable
from epctl.layout.detect import detect
from epctl.layout.source import read_folder

ROUTING = {
    "num_experts_per_tok": 2,
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
}


def epctl(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "epctl", *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "storage"),
    [("openai/gpt-oss-20b", "mxfp4"), ("deepseek-ai/DeepSeek-V3", "fp8_block")],
)
def test_published_quantised_models_are_refused_without_a_network(model, storage):
    result = epctl("train", model, "--dry-run")
    assert result.returncode == 4
    assert f"`{model}` is stored quantised ({storage})" in result.stderr
    assert f"hint: make a bfloat16 copy first: `epctl export {model} -o FOLDER" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("storage", ["fp8", "mxfp4"])
def test_the_command_of_the_hint_makes_a_copy_that_is_not_refused(tmp_path, storage):
    model = write_model(tmp_path / "m", storage, num_experts=4, hidden=64, width=64)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(ROUTING | config))
    with pytest.raises(LayoutError, match="is stored quantised") as caught:
        open_reference(str(model))
    command = re.search("`epctl (.*)`", caught.value.hint)[1].replace("FOLDER", str(tmp_path / "o"))
    done = epctl(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    layout = detect(read_folder(tmp_path / "o"))
    assert layout.moe.storage.quantization is None
    assert layout.dtype == "BF16"
    require_trainable(layout)
