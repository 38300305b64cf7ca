"""The JSON that `epctl inspect --json` writes. Names are stable: extend, never rename."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from epctl.layout.model import ModelLayout, MoELayout, VisionLayout
from epctl.layout.safetensors import TensorEntry


def layout_document(layout: ModelLayout) -> dict[str, Any]:
    """Returns the whole layout as plain JSON values; docs/inspect.md lists the names."""
    return {
        "model": {
            "id": layout.id,
            "revision": layout.revision,
            "source": layout.source,
            "architecture": layout.architecture,
            "model_type": layout.model_type,
            "dtype": layout.dtype,
            "family": layout.family,
            "num_tensors": layout.num_tensors,
            "num_bytes": layout.num_bytes,
            "remote_code": layout.remote_code,
        },
        "parameters": asdict(layout.parameters),
        "moe": _moe(layout.moe) if layout.moe else None,
        "vision": _vision(layout.vision) if layout.vision else None,
        "decoder": asdict(layout.decoder) if layout.decoder else None,
        "ep_sizes": list(layout.ep_sizes),
        "sp_sizes": list(layout.sp_sizes),
        "sequence_parallel": [asdict(entry) for entry in layout.sequence_parallel],
        "dropped": list(layout.dropped),
        "warnings": list(layout.warnings),
        "reasons": dict(layout.reasons),
    }


def _moe(moe: MoELayout) -> dict[str, Any]:
    router, shared = moe.router, moe.shared_experts
    return {
        "num_layers": len(moe.layers),
        "layers": list(moe.layers),
        "dense_layers": list(moe.dense_layers),
        "mtp_layers": list(moe.mtp_layers),
        "num_experts": moe.num_experts,
        "num_experts_by_layer": {str(k): v for k, v in moe.num_experts_by_layer.items()},
        "top_k": moe.top_k,
        "hidden_size": moe.hidden_size,
        "expert_hidden_size": moe.expert_hidden_size,
        "expert_intermediate_size": moe.expert_intermediate_size,
        "shared_experts": shared.num_experts if shared else 0,
        "shared_intermediate_size": shared.intermediate_size if shared else None,
        "shared_gate": shared.gate if shared else None,
        "expert_storage": moe.storage.kind,
        "storage": {**asdict(moe.storage), "label": moe.storage.label},
        "activation": moe.activation,
        "activation_rule": moe.activation_rule,
        "activation_limit": moe.activation_limit,
        "router": {
            **asdict(router),
            "known": not router.missing_keys,
        },
        "untrainable": moe.untrainable,
    }


def _vision(vision: VisionLayout) -> dict[str, Any]:
    document = asdict(vision)
    attention = document.pop("attention")
    lists = {
        "windowed_layers": list(vision.windowed_layers),
        "cut_units": list(vision.cut_units),
    }
    return {**attention, **document, **lists}


def tensor_rows(
    tensors: Mapping[str, TensorEntry], pattern: str | None = None
) -> list[dict[str, Any]]:
    """Returns one row a tensor, in name order of the checkpoint.

    `pattern` keeps names that contain it, or that it matches when it has `*`, `?` or `[`.
    """
    return [
        {
            "name": name,
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "num_bytes": entry.num_bytes,
            "file": entry.file,
        }
        for name, entry in tensors.items()
        if _matches(name, pattern)
    ]


def _matches(name: str, pattern: str | None) -> bool:
    if not pattern:
        return True
    if any(wildcard in pattern for wildcard in "*?["):
        import fnmatch

        return fnmatch.fnmatchcase(name, pattern)
    return pattern in name
