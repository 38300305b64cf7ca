"""manifest.json: what an output is, where it came from, and a digest for every expert's tensors.

Digests are SHA-256 of a tensor's bytes as stored. Fused tensors have one for each expert, keyed by
the *global* expert id, so that a digest stays the same at every expert-parallel size, and experts
that change places are noticed. The digest of the whole is taken over all of them and depends on
neither ranks nor files: shard, re-shard and merge of the same weights agree on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from epctl import __version__
from epctl.convert.plan import OutputPlan, placement, rank_folder
from epctl.convert.recipes import LogicalTensor
from epctl.errors import InputError
from epctl.layout.model import ExpertStorage, MoELayout, RouterLayout
from epctl.layout.names import fold_table
from epctl.layout.safetensors import parse_json_object

MANIFEST_NAME = "manifest.json"
FORMAT = "epctl-convert"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 1 << 30

# Digest of each (tensor, global expert id or None).
Digests = Mapping[tuple[str, int | None], str]


def build_manifest(plan: OutputPlan, digests: Digests, record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the manifest of a finished output; equal inputs give equal documents."""
    ep = int(plan.options.get("ep") or 1)
    tensors = {
        tensor.name: _tensor(tensor, digests) for tensor in plan.tensors if _keys(tensor, digests)
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": plan.kind,
        "tool": {"name": "epctl", "version": __version__},
        "source": dict(record),
        "options": dict(plan.options),
        "digest": whole_digest(tensors),
        "num_tensors": len(tensors),
        "num_bytes": plan.num_bytes,
        "placement": _placement(plan, ep),
        "experts": _experts(plan),
        "dropped": _folded(plan.dropped, ("reason",)),
        "changed": _folded(plan.changed, ("from", "to")),
        "files": {
            file.path: {"num_bytes": file.num_bytes, "num_tensors": len(file.tensors)}
            for file in plan.files
        },
        "origin": dict(plan.origin),
        "tensors": tensors,
    }


def _keys(tensor: LogicalTensor, digests: Digests) -> list[int | None]:
    return [b.expert for b in tensor.blocks if (tensor.name, b.expert) in digests]


def _tensor(tensor: LogicalTensor, digests: Digests) -> dict[str, Any]:
    entry: dict[str, Any] = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
    if tensor.layer is not None:
        entry["layer"] = tensor.layer
    if tensor.num_experts:
        keys = _keys(tensor, digests)
        entry["num_experts"] = tensor.num_experts
        entry["digests"] = {str(expert): digests[tensor.name, expert] for expert in keys}
        return entry
    if tensor.expert is not None:
        entry["expert"] = tensor.expert
    entry["digest"] = digests[tensor.name, tensor.expert]
    return entry


def digests_of(entry: Mapping[str, Any]) -> dict[int | None, str]:
    """Returns the digests of a manifest's tensor by global expert id, None for a shared tensor."""
    if "digests" in entry:
        return {int(expert): digest for expert, digest in entry["digests"].items()}
    return {entry.get("expert"): entry["digest"]}


def whole_digest(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the digest of a manifest's tensors: name, dtype, shape, expert, bytes; no order."""
    lines = []
    for name, entry in tensors.items():
        shape = "x".join(map(str, entry["shape"]))
        for expert, digest in digests_of(entry).items():
            lines.append(f"{name}\t{entry['dtype']}\t{shape}\t{expert}\t{digest}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _placement(plan: OutputPlan, ep: int) -> list[dict[str, Any]]:
    """Returns for each rank its experts of each layer, first and end, as global ids."""
    if plan.kind != "shard" or plan.moe is None:
        return []
    moe = plan.moe
    return [
        {
            "rank": rank,
            "folder": rank_folder(rank),
            "experts": {
                str(layer): list(placement(moe.experts_of_layer(layer), ep, rank))
                for layer in moe.layers
            },
        }
        for rank in plan.ranks
    ]


def _experts(plan: OutputPlan) -> dict[str, Any] | None:
    moe, origin = plan.moe, plan.origin_moe
    if moe is None or origin is None:
        return None
    return {
        "family": plan.family,
        "layers": {
            str(layer): {"prefix": prefix, "num_experts": moe.experts_of_layer(layer)}
            for layer, prefix in moe.layer_prefixes.items()
        },
        "hidden_size": moe.expert_hidden_size,
        "intermediate_size": moe.expert_intermediate_size,
        "storage": asdict(moe.storage),
        "origin_storage": asdict(origin.storage),
    }


def _folded(entries: Iterable[Mapping[str, str]], keys: tuple[str, ...]) -> list[dict[str, str]]:
    """Returns entries with names of one pattern folded: `layers.{0-26}.inv_freq`."""
    table = fold_table((entry["name"], tuple(entry[key] for key in keys)) for entry in entries)
    return [
        {"name": name, **dict(zip(keys, values, strict=True))}  # type: ignore[call-overload]
        for name, values in table
    ]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Returns the manifest of a folder that epctl wrote, None for any other folder.

    Raises InputError for a damaged one, or one of a later format.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file() or path.stat().st_size > MAX_MANIFEST_BYTES:
        return None
    document = parse_json_object(path.read_bytes(), file=str(path), what="manifest")
    if document.get("format") != FORMAT:
        return None
    if document.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"`{path}` has format version {document.get('format_version')}; this epctl reads "
            f"{FORMAT_VERSION}",
            hint="use the epctl version that wrote it, named in its `tool`",
        )
    missing = [
        key for key in ("kind", "source", "options", "tensors", "files") if key not in document
    ]
    if missing:
        raise InputError(f"`{path}` lacks {', '.join(missing)}: it is damaged")
    return document


def moe_of_manifest(experts: Mapping[str, Any] | None, storage_key: str) -> MoELayout | None:
    """Returns the experts' layout that a manifest describes; raises InputError if it is damaged.

    Only what conversion needs is filled in: no router, no shared experts.
    """
    if experts is None:
        return None
    try:
        fields = dict(experts[storage_key])
        if fields["block_size"] is not None:
            fields["block_size"] = tuple(fields["block_size"])
        counts = {int(k): int(v["num_experts"]) for k, v in experts["layers"].items()}
        return MoELayout(
            layer_prefixes={int(k): str(v["prefix"]) for k, v in experts["layers"].items()},
            dense_layers=(),
            num_experts=max(counts.values()),
            top_k=None,
            hidden_size=int(experts["hidden_size"]),
            expert_hidden_size=int(experts["hidden_size"]),
            expert_intermediate_size=int(experts["intermediate_size"]),
            storage=ExpertStorage(**fields),
            router=RouterLayout(None, None, None, None),
            num_experts_by_layer=counts,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the manifest's `experts` are damaged: {error!r}") from None
