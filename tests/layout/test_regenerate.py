"""What is generated equals what the generators make now."""

import importlib
import inspect
import json
import pathlib

import pytest
from build_families_page import PAGE, page, row
from specs import EP_PLAN_TYPES, SPECS
from stored import NAMES, fixture


def test_every_spec_has_its_fixture():
    assert sorted(SPECS) == NAMES


@pytest.mark.parametrize(
    "name", ["deepseek_v3", "mixtral", "gpt_oss", "qwen3_vl_moe", "nemotron_h", "qwen2_5_vl"]
)
def test_fixture_equals_what_transformers_builds_now(name):
    transformers = pytest.importorskip("transformers", reason="needs the train extra")
    import build_fixtures

    stored = fixture(name)
    if stored["transformers"] != transformers.__version__:
        pytest.skip(f"fixtures are of {stored['transformers']}, this is {transformers.__version__}")
    assert json.loads(json.dumps(build_fixtures.fixture(name))) == stored


def test_list_of_types_with_an_expert_parallel_plan_is_transformers_own():
    transformers = pytest.importorskip("transformers", reason="needs the train extra")
    if fixture("mixtral")["transformers"] != transformers.__version__:
        pytest.skip("fixtures are of another release")
    found = set()
    for path in pathlib.Path(transformers.__file__).parent.glob("models/*/configuration_*.py"):
        if "base_model_ep_plan" not in path.read_text():
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for value in vars(module).values():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and getattr(value, "base_model_ep_plan", None):
                found.add(value.model_type)
    assert found == set(EP_PLAN_TYPES)


def test_at_least_55_of_the_types_are_detected():
    rows = [row(name) for name in EP_PLAN_TYPES]
    assert len(rows) == 67
    assert sum(detected for _, detected, _ in rows) >= 55


def test_families_page_is_current():
    assert PAGE.read_text() == page(), "run tests/layout/build_families_page.py"
