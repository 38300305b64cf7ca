"""A port for ranks to meet at, which stays free until one of them listens, seconds later."""

from __future__ import annotations

import contextlib
import secrets
import socket
from pathlib import Path

HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
USUAL_START = 32768
LOWEST = 15000
NUM_TRIES = 100


def free_port() -> int:
    """Returns a port of this machine that nobody listens on.

    It lies below those that the system hands out for connections and for listeners that name none:
    while ranks import, another program's may get any of these.
    """
    start = handed_out_from()
    for _ in range(NUM_TRIES if start > LOWEST else 0):
        with contextlib.suppress(OSError):
            return _bound(LOWEST + secrets.randbelow(start - LOWEST))
    return _bound(0)  # the system's choice


def handed_out_from() -> int:
    """Returns the first of the ports that the system hands out by itself."""
    try:
        return int(HANDED_OUT.read_text("ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return USUAL_START


def _bound(port: int) -> int:
    with socket.socket() as listener:
        listener.bind(("", port))
        return int(listener.getsockname()[1])
