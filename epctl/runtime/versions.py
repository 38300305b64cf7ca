"""Library versions of all ranks: nodes of one job that import different code train apart."""

from __future__ import annotations

import importlib.metadata
import platform

from epctl.errors import ConfigError

LIBRARIES = ("epctl", "torch", "deepspeed", "transformers", "triton", "numpy")


def installed_versions() -> dict[str, str]:
    """Returns the version of Python and of each library that decides numbers or formats."""
    result = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "absent"
    return result


def differing_versions() -> list[str]:
    """Returns one line a library whose version is not the same on every rank. A collective."""
    import torch.distributed as dist

    by_rank: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, installed_versions())
    lines = []
    for name in by_rank[0]:
        found = [versions[name] for versions in by_rank]
        other = next((rank for rank, version in enumerate(found) if version != found[0]), None)
        if other is not None:
            lines.append(f"{name} is {found[0]} on rank 0 and {found[other]} on rank {other}")
    return lines


def require_equal_versions() -> None:
    """Raises ConfigError on every rank if ranks import different versions. A collective."""
    differing = differing_versions()
    if differing:
        raise ConfigError(
            "ranks run different software: " + "; ".join(differing),
            hint="install the same versions on every node",
        )
