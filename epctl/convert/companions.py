"""The small files of a checkpoint: config, tokenizer, code, licence. Copied, never run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from epctl.convert.manifest import MANIFEST_NAME
from epctl.convert.plan import OutputPlan, rank_folder
from epctl.convert.view import CheckpointView
from epctl.errors import InputError
from epctl.layout.source import CONFIG_NAME, is_pickle

MAX_COMPANION_BYTES = 64 * 2**20
_WEIGHTS = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".tmp", ".lock")


def small_files(view: CheckpointView, plan: OutputPlan) -> dict[str, bytes]:
    """Returns what stands beside the weights, by path inside the output.

    With `--replicate` each rank's folder is a model folder of its own and gets a copy. Raises
    InputError for a file that cannot be read.
    """
    files = dict(_companions(view))
    if plan.options.get("dtype") == "bf16":
        files[CONFIG_NAME] = json.dumps(bfloat16_config(view.config), indent=2).encode() + b"\n"
    if plan.options.get("replicate"):
        for rank in plan.ranks:
            files |= {f"{rank_folder(rank)}/{name}": data for name, data in _top(files)}
    return files


def _top(files: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
    return [(name, data) for name, data in files.items() if "/" not in name]


def _companions(view: CheckpointView) -> Iterator[tuple[str, bytes]]:
    folder = view.path("")
    real = Path(os.path.realpath(folder))
    # The hub's cache links each file into `blobs` of the same repository.
    allowed = {real, real.parent.parent / "blobs"}
    for path in sorted(folder.iterdir()):
        skipped = path.name.startswith(".") or path.name.endswith(_WEIGHTS) or is_pickle(path.name)
        if skipped or path.name == MANIFEST_NAME or not path.is_file():
            continue
        if Path(os.path.realpath(path)).parent not in allowed:
            continue
        try:
            if path.stat().st_size <= MAX_COMPANION_BYTES:
                yield path.name, path.read_bytes()
        except OSError as error:
            raise InputError(f"`{path}` cannot be read: {error.strerror}") from None


def bfloat16_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config for weights that are bfloat16 now: no quantisation, dtypes set."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key == "quantization_config":
            continue
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            result[key] = "bfloat16"
        elif key.endswith("_config") and isinstance(value, dict):
            result[key] = bfloat16_config(value)
        else:
            result[key] = value
    return result
