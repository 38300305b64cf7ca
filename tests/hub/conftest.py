import sys
from pathlib import Path

import pytest

for folder in ("hub", "attacks"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running loopback hub that huggingface_hub talks to, and an empty cache."""
    from loopback import LoopbackHub

    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with LoopbackHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server
