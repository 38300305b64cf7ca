"""`epctl train org/name`: the weights and the tokenizer come from the hub at the pinned commit."""

from pathlib import Path

import pytest
from tiny_moonlight import write_tiny_moonlight

from epctl.config_data import ModelSection
from epctl.errors import HubError
from epctl.launch.model_reference import LocalModel, fetch, open_reference


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    folder = write_tiny_moonlight(tmp_path / "model")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_headers_first_then_the_snapshot(hub, files, tmp_path: Path) -> None:
    hub.add("org/tiny", files | {"modeling_absent.py": b"raise SystemExit('remote code ran')"})
    source, layout = open_reference("org/tiny")
    assert source.folder is None
    assert layout.moe is not None
    local = fetch(source, ModelSection(reference="org/tiny"))
    folder = Path(local.folder)
    assert {path.name for path in folder.iterdir()} == set(files)
    for name, content in files.items():
        assert (folder / name).read_bytes() == content
    assert local.revision == source.revision
    local.write(tmp_path)
    assert LocalModel.read(tmp_path) == local


def test_a_download_that_fails_is_a_hub_error(hub, files) -> None:
    hub.add("org/absent", files)
    source, _ = open_reference("org/absent")
    hub.faults["model-00001-of-00002.safetensors"] = [404] * 4
    with pytest.raises(HubError, match="cannot be downloaded") as caught:
        fetch(source, ModelSection(reference="org/absent"))
    assert "epctl train ./FOLDER" in str(caught.value.hint)
