"""Family files: data that adds a family without code, and what is wrong with bad ones."""

import json

import pytest
from stored import source

from epctl.errors import LayoutError
from epctl.layout import families
from epctl.layout.detect import detect
from epctl.layout.families import build_family, load_families, resolve_documents
from epctl.layout.router import SCORE_FUNCTIONS

FAMILIES = list(load_families().values())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family_states_what_training_needs(family):
    assert family.title
    if not family.names:
        assert family.vision or family.untrainable
        return
    assert family.router is not None
    assert {"score_func", "normalize", "scale"} <= family.router.keys()
    score = family.router["score_func"]
    assert (score["default"] if isinstance(score, dict) else score) in SCORE_FUNCTIONS
    for names in family.names:
        assert "down" in names.experts
        assert set(names.experts) in ({"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"})
        assert names.router


def test_no_model_type_belongs_to_two_families():
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    assert len(kinds) == len(set(kinds))


def test_like_merges_and_null_removes():
    base = {
        "name": "a",
        "title": "A",
        "model_types": ["a"],
        "router": {"x": 1, "y": 2},
        "notes": ["n"],
    }
    child = {"name": "b", "title": "B", "model_types": ["b"], "like": "a", "router": {"x": None}}
    resolved = resolve_documents({"a": base, "b": child})["b"]
    assert resolved["router"] == {"y": 2}
    assert resolved["model_types"] == ["b"]
    assert "notes" not in resolved


@pytest.mark.parametrize("like", ["absent", "a"])
def test_a_chain_that_cannot_be_resolved_is_an_error(like):
    with pytest.raises(LayoutError, match="cannot be resolved"):
        resolve_documents({"a": {"name": "a", "like": like}})


@pytest.mark.parametrize(
    "document",
    [
        {"name": "x"},
        {"name": "x", "title": "X", "model_types": [], "nmaes": []},
        {"name": "x", "title": "X", "model_types": [], "names": [{"naming": "a", "expert": {}}]},
    ],
)
def test_a_mistake_in_a_family_file_names_the_file(document):
    with pytest.raises(LayoutError, match=r"x\.json"):
        build_family(document, file="x.json")


NEW_FAMILY = {
    "name": "newcomer",
    "title": "Newcomer",
    "model_types": ["newcomer"],
    "names": [
        {
            "naming": "checkpoint",
            "experts": {
                "gate": "moe.bank.{expert}.a.weight",
                "up": "moe.bank.{expert}.b.weight",
                "down": "moe.bank.{expert}.c.weight",
            },
            "router": "moe.switch.weight",
        }
    ],
    "config": {"num_experts": ["bank_size"], "top_k": ["bank_pick"]},
    "router": {"score_func": "softmax", "normalize": True, "scale": 1.0},
}


def newcomer():
    """Returns a model whose names nobody has seen."""
    from dataclasses import replace

    given = source("mixtral", "hub")
    words = {"block_sparse_moe.experts": "moe.bank", "block_sparse_moe.gate": "moe.switch"}
    words |= {".w1.": ".a.", ".w3.": ".b.", ".w2.": ".c."}
    tensors = {}
    for name, entry in given.tensors.items():
        for old, new in words.items():
            name = name.replace(old, new)
        tensors[name] = entry
    config = {"model_type": "newcomer", "bank_size": 8, "bank_pick": 2, "hidden_size": 4096}
    return replace(given, tensors=tensors, config={**config, "num_hidden_layers": 4})


def test_a_family_is_added_by_one_file_and_no_code(monkeypatch):
    assert detect(newcomer()).moe is None
    extended = {**load_families(), "newcomer": build_family(NEW_FAMILY, file="newcomer.json")}
    monkeypatch.setattr(families, "load_families", lambda: extended)
    families.families_by_model_type.cache_clear()
    try:
        layout = detect(newcomer())
    finally:
        families.families_by_model_type.cache_clear()
    assert (layout.family, layout.moe.num_experts, layout.moe.top_k) == ("newcomer", 8, 2)
    assert layout.moe.expert_tensor(0, 7, "up").name == "model.layers.0.moe.bank.7.b.weight"
    layout.require_trainable()


def test_family_files_are_plain_json_with_their_own_name():
    from importlib import resources

    for file in (resources.files("epctl.layout") / "families").iterdir():
        assert json.loads(file.read_text())["name"] == file.name.removesuffix(".json")
