"""`epctl train --dry-run`: values with their sources, the engine's JSON, the command, the bytes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from epctl.config import ResolvedConfig, RunConfig, flat_values
from epctl.errors import ConfigError
from epctl.launch.command import launch_command, rank_environment
from epctl.launch.dataset_reference import PinnedDataset
from epctl.launch.devices import Placement
from epctl.output import Output, format_bytes


def count_state(
    config: RunConfig,
    model_config: Mapping[str, Any] | None,
    placement: Placement,
    environment: Mapping[str, str],
    *,
    bfloat16: bool,
) -> dict[str, int]:
    """Returns the bytes a rank holds between steps, counted on the meta device by a child process.

    Raises ConfigError for settings that the model refuses.
    """
    request = {
        "config": config.model_dump(),
        "model_config": None if model_config is None else dict(model_config),
        "num_ranks": placement.num_ranks,
        "bfloat16": bfloat16,
    }
    process = subprocess.run(
        [sys.executable, "-m", "epctl.runtime.count_state"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=rank_environment(placement, environment),
    )
    if process.returncode != 0:
        raise RuntimeError(f"counting failed: {process.stderr.strip()[-2000:]}")
    answer: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    if "error" in answer:
        raise ConfigError(answer["error"], hint=answer["hint"])
    return answer


def show_dry_run(
    resolved: ResolvedConfig,
    placement: Placement,
    folder: Path,
    deepspeed: Mapping[str, Any],
    rank_bytes: Mapping[str, int],
    datasets: Mapping[str, PinnedDataset],
    output: Output,
) -> None:
    """Shows what would run."""
    values = flat_values(resolved.config)
    command = launch_command(folder, placement, launch=resolved.config.launch)
    output.document(
        {
            "config": {
                key: {"value": value, "source": resolved.sources[key]}
                for key, value in values.items()
            },
            "deepspeed": deepspeed,
            "command": command,
            "placement": placement.reason,
            "bytes_per_rank": rank_bytes,
            "datasets": {use: asdict(dataset) for use, dataset in datasets.items()},
        }
    )
    width = max(map(len, values))
    for key, value in values.items():
        output.text(f"{key:<{width}}  {_shown(value):<20}  {resolved.sources[key]}")
    output.text("\nDeepSpeed config\n" + json.dumps(deepspeed, indent=2))
    output.text(f"\nranks: {placement.num_ranks} ({placement.reason})")
    output.text(
        f"state a rank: {format_bytes(rank_bytes['total'])}: parameters "
        f"{format_bytes(rank_bytes['parameters'])}, masters {format_bytes(rank_bytes['masters'])}, "
        f"optimizer {format_bytes(rank_bytes['optimizer_state'])} (counted; gradients and "
        "activations come on top)"
    )
    for use, dataset in datasets.items():
        how = "streamed" if dataset.streaming else "downloaded"
        output.text(f"{use} data: {dataset}, {how}")
    output.text("command: " + shlex.join(command))


def _shown(value: Any) -> str:
    return " ".join(value) or "()" if isinstance(value, tuple) else str(value)
