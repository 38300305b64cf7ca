"""Reads the stored fixtures back as model sources."""

import functools
import json
from pathlib import Path

from epctl.layout.names import unfold_name
from epctl.layout.safetensors import TensorEntry
from epctl.layout.source import ModelSource

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.json"))


@functools.cache
def fixture(name):
    return json.loads((FIXTURES / f"{name}.json").read_text())


def table(rows):
    """Returns the tensor table of folded rows."""
    return {
        tensor: TensorEntry(dtype, tuple(shape), "model.safetensors", 0, 0)
        for folded, dtype, shape in rows
        for tensor in unfold_name(folded)
    }


def source(name, naming, config=None):
    """Returns a fixture as a ModelSource; `naming` is module or hub."""
    document = fixture(name)
    return ModelSource(name, "folder", config or document["config"], table(document[naming]))


def namings(name):
    """Returns the namings that a fixture stores."""
    return [naming for naming in ("module", "hub") if naming in fixture(name)]


CASES = [(name, naming) for name in NAMES for naming in namings(name)]
EXPERT_CASES = [case for case in CASES if "experts" in fixture(case[0])["facts"]]
