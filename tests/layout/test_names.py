"""Folding of tensor names: whatever goes in comes out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epctl.layout.names import (
    fill_pattern,
    fold_table,
    format_ranges,
    group_names,
    parse_ranges,
    split_name,
    unfold_name,
)

PARTS = st.lists(
    st.sampled_from(["layers", "0", "1", "7", "10", "01", "w1", "expert_3", "conv1d", "x"]),
    min_size=1, max_size=6,
).map(".".join)  # fmt: skip


@given(name=PARTS)
def test_a_name_is_its_pattern_and_indices(name):
    assert fill_pattern(*split_name(name)) == name


@given(names=st.sets(PARTS, max_size=30))
def test_a_folded_table_unfolds_to_itself(names):
    folded = fold_table((name, len(name)) for name in sorted(names))
    unfolded = [(name, value) for text, value in folded for name in unfold_name(text)]
    assert sorted(unfolded) == sorted((name, len(name)) for name in names)


@given(numbers=st.sets(st.integers(0, 50), min_size=1))
def test_ranges_read_back(numbers):
    assert parse_ranges(format_ranges(numbers)) == sorted(numbers)


@pytest.mark.parametrize(
    ("name", "pattern", "indices"),
    [
        (
            "model.layers.3.mlp.experts.7.w1.weight",
            "model.layers.#.mlp.experts.#.w1.weight",
            (3, 7),
        ),
        ("a.expert_3.wi", "a.expert_#.wi", (3,)),
        ("conv1d.w1", "conv1d.w1", ()),
        ("a.01.b", "a.01.b", ()),
        ("a.#.0", "a.\ufffd.0", ()),
    ],
)
def test_pattern_of_a_name(name, pattern, indices):
    assert split_name(name) == (pattern, indices)


def test_ragged_experts_fold_by_layer():
    table = [(f"l.{layer}.e.{expert}", 1) for layer in range(3) for expert in range(2 + layer % 2)]
    assert [text for text, _ in fold_table(table)] == ["l.{0,2}.e.{0-1}", "l.{1}.e.{0-2}"]


def test_groups_keep_the_order_of_the_file():
    groups = group_names(["b.1", "a", "b.0"])
    assert list(groups) == ["b.#", "a"]
    assert groups["b.#"].names == ["b.1", "b.0"]
