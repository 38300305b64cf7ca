"""The body of `epctl config`: the DeepSpeed JSON of a run, and why each key has its value."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from typing import Any

from epctl.config import ResolvedConfig, flat_values
from epctl.launch.devices import Placement, count_gpus
from epctl.launch.ds_config import REASONS, SETTINGS, deepspeed_config, flat_keys
from epctl.launch.model_reference import open_reference
from epctl.launch.nodes import place_job
from epctl.output import Output


@dataclass(frozen=True)
class ExplainedKey:
    """One value of the DeepSpeed JSON: the setting it stands for, who chose it, and the reason."""

    key: str
    value: Any
    setting: str | None
    source: str | None
    reason: str


def show_config(resolved: ResolvedConfig, output: Output, *, explain: bool) -> None:
    """Writes the DeepSpeed JSON to stdout, or with `explain` each key with its reason.

    Raises ConfigError for settings that contradict each other, LayoutError for a model that cannot
    be trained.
    """
    placement = plan_placement(resolved)
    document = deepspeed_json(resolved, placement)
    rows = explain_keys(document, resolved)
    output.document(
        {"deepspeed": document, "placement": placement.reason, "keys": [vars(r) for r in rows]}
    )
    if explain:
        output.text("\n".join(_lines(rows)))
        output.note(f"ranks: {placement.num_ranks} ({placement.reason})")
    else:
        output.text(json.dumps(document, indent=2))


def plan_placement(resolved: ResolvedConfig) -> Placement:
    """Returns where the ranks would run; EP is checked against the ranks and the experts."""
    from epctl.runtime.mesh import validate_expert_parallel

    config = resolved.config
    num_experts = None
    if config.model.reference is not None:
        _, layout = open_reference(config.model.reference)
        num_experts = layout.moe.num_experts if layout.moe is not None else None
    placement = place_job(config, count_gpus())
    validate_expert_parallel(config.parallel.ep, placement.num_ranks, num_experts)
    return placement


def deepspeed_json(resolved: ResolvedConfig, placement: Placement) -> dict[str, Any]:
    """Returns the DeepSpeed JSON of these settings on these devices."""
    bfloat16 = resolved.config.train.uses_bfloat16(placement.device)
    return deepspeed_config(resolved.config, bfloat16=bfloat16, on_cpu=placement.device == "cpu")


def explain_keys(document: dict[str, Any], resolved: ResolvedConfig) -> list[ExplainedKey]:
    """Returns one row a value of the DeepSpeed JSON, in its order."""
    values = flat_values(resolved.config)
    rows = []
    for key, value in flat_keys(document):
        setting = SETTINGS.get(key)
        source = resolved.sources[setting] if setting is not None else None
        reason = REASONS[key]
        if setting is not None and value != values[setting] and f"`{setting}`" not in reason:
            reason = f"{reason} (setting: {values[setting]})"
        rows.append(ExplainedKey(key, value, setting, source, reason))
    return rows


def _lines(rows: list[ExplainedKey]) -> list[str]:
    """Each key with its value, then the reason and the setting behind it, indented."""
    result = []
    for row in rows:
        origin = f" [{row.setting}: {row.source}]" if row.setting is not None else ""
        result.append(f"{row.key} = {json.dumps(row.value)}")
        result += textwrap.wrap(
            row.reason + origin, 96, initial_indent="    ", subsequent_indent="    "
        )
    return result
