"""Hostfiles as DeepSpeed and MPI know them: `HOST slots=N`, comments, blank lines. Pure parsing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from epctl.errors import ConfigError

_LINE = re.compile(r"(?P<name>[A-Za-z0-9._:@-]+)\s+slots\s*=\s*(?P<slots>\d+)")


@dataclass(frozen=True)
class Host:
    """A machine and how many ranks it takes."""

    name: str
    slots: int


def parse_hostfile(text: str, source: str = "hostfile") -> list[Host]:
    """Returns the hosts in order; raises ConfigError with the line of the first defect.

    Every host must have the same number of slots: torchrun starts as many ranks on each.
    """
    hosts: list[Host] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        # A name that starts with a dash would be an option of ssh.
        if match is None or line.startswith("-") or int(match["slots"]) < 1:
            raise ConfigError(
                f"{source}, line {number}: `{line}` is not `HOST slots=N`",
                hint="write for example `worker-1 slots=8`",
            )
        if any(host.name == match["name"] for host in hosts):
            raise ConfigError(f"{source}, line {number}: host `{match['name']}` stands there twice")
        hosts.append(Host(match["name"], int(match["slots"])))
    if not hosts:
        raise ConfigError(f"{source} names no host")
    counts = {host.slots for host in hosts}
    if len(counts) > 1:
        raise ConfigError(
            f"{source}: hosts have {' and '.join(map(str, sorted(counts)))} slots",
            hint="give every host the same number: ranks are shared out evenly",
        )
    return hosts


def read_hostfile(path: Path) -> list[Host]:
    """Reads and parses a hostfile; raises ConfigError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read hostfile `{path}`: {error}") from None
    return parse_hostfile(text, f"hostfile `{path}`")
