"""`epctl train --dry-run`: values with their sources, the engine's JSON, the command, the bytes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from epctl.config import ResolvedConfig, flat_values
from epctl.launch.command import launch_command
from epctl.launch.dataset_reference import PinnedDataset
from epctl.launch.devices import Placement
from epctl.launch.memory import Prediction
from epctl.launch.plan_train import memory_text, prediction_document, rank_bytes
from epctl.output import Output, format_bytes


def show_dry_run(
    resolved: ResolvedConfig,
    placement: Placement,
    folder: Path,
    deepspeed: Mapping[str, Any],
    foreseen: Prediction,
    datasets: Mapping[str, PinnedDataset],
    output: Output,
) -> None:
    """Shows what would run."""
    values = flat_values(resolved.config)
    state = rank_bytes(foreseen)
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
            "bytes_per_rank": state,
            "memory": prediction_document(foreseen, placement.device),
            "datasets": {use: asdict(dataset) for use, dataset in datasets.items()},
        }
    )
    width = max(map(len, values))
    for key, value in values.items():
        output.text(f"{key:<{width}}  {_shown(value):<20}  {resolved.sources[key]}")
    output.text("\nDeepSpeed config\n" + json.dumps(deepspeed, indent=2))
    output.text(f"\nranks: {placement.num_ranks} ({placement.reason})")
    output.text(
        f"state a rank: {format_bytes(state['total'])}: parameters "
        f"{format_bytes(state['parameters'])}, masters {format_bytes(state['masters'])}, "
        f"optimizer {format_bytes(state['optimizer_state'])} (predicted)"
    )
    output.text("memory a rank: " + memory_text(prediction_document(foreseen, placement.device)))
    output.text("command: " + shlex.join(command))


def _shown(value: Any) -> str:
    return " ".join(value) or "()" if isinstance(value, tuple) else str(value)
