"""Ports that ranks meet at: none that the system would give to somebody else meanwhile."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from epctl.launch import ports


def test_below_what_the_system_hands_out() -> None:
    found = {ports.free_port() for _ in range(50)}
    assert len(found) > 40
    assert all(ports.LOWEST <= port < ports.handed_out_from() for port in found)


def test_a_port_in_use_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", ports.free_port()))
        busy.listen()
        taken = busy.getsockname()[1]
        offers = iter([taken, taken, taken + 1, taken + 2, taken + 3])
        monkeypatch.setattr(ports.secrets, "randbelow", lambda _: next(offers) - ports.LOWEST)
        assert ports.free_port() in range(taken + 1, taken + 4)


@pytest.mark.parametrize("text", ["1024\t65535\n", "", "what"])
def test_a_system_that_hands_out_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "range"
    path.write_text(text)
    monkeypatch.setattr(ports, "HANDED_OUT", path)
    assert 1024 <= ports.free_port() <= 65535
    monkeypatch.setattr(ports, "HANDED_OUT", tmp_path / "absent")
    assert ports.handed_out_from() == ports.USUAL_START
