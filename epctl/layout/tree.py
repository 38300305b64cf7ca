"""The module tree of a checkpoint, siblings of equal structure folded: `layers.1-26`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from epctl.layout.names import format_ranges
from epctl.layout.safetensors import TensorEntry

Node = dict[str, Any]
# Components of a name that become levels; models have some ten, and every level is a recursion.
MAX_LEVELS = 64


def build_tree(tensors: Mapping[str, TensorEntry]) -> Node:
    """Returns nested dicts by name component; leaves are `BF16 [1408, 2048]` texts."""
    root: Node = {}
    for name, entry in tensors.items():
        *parents, leaf = name.split(".", MAX_LEVELS)
        node = root
        for parent in parents:
            child = node.setdefault(parent, {})
            # A name may be both a tensor and a prefix of others; the tensor moves below itself.
            node[parent] = node = child if isinstance(child, dict) else {"(tensor)": child}
        node[leaf] = f"{entry.dtype} {list(entry.shape)}"
    return root


def fold_tree(node: Node) -> Node:
    """Returns the tree with numbered siblings of equal structure under one key, `1-26 (x26)`."""
    folded: Node = {}
    runs: dict[Any, list[int]] = {}
    numbered: dict[Any, Any] = {}
    for key, child in node.items():
        small = fold_tree(child) if isinstance(child, dict) else child
        if key.isdecimal() and isinstance(child, dict):
            signature = _signature(small)
            runs.setdefault(signature, []).append(int(key))
            numbered[signature] = small
        else:
            folded[key] = small
    for signature, numbers in runs.items():
        times = f" (x{len(numbers)})" if len(numbers) > 1 else ""
        folded[f"{format_ranges(numbers)}{times}"] = numbered[signature]
    return folded


def _signature(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return tuple((key, _signature(child)) for key, child in sorted(node.items()))


def tree_lines(tensors: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Yields the folded tree, one line a node."""
    yield from _lines(fold_tree(build_tree(tensors)), "")


def _lines(node: Node, indent: str) -> Iterator[str]:
    for position, (key, child) in enumerate(node.items()):
        last = position == len(node) - 1
        branch, bar = ("`-- ", "    ") if last else ("|-- ", "|   ")
        # A chain of single children reads better as one dotted name.
        while isinstance(child, dict) and len(child) == 1:
            (inner, child) = next(iter(child.items()))
            key = f"{key}.{inner}"
        if not isinstance(child, dict):
            yield f"{indent}{branch}{key}  {child}"
            continue
        yield f"{indent}{branch}{key}"
        yield from _lines(child, indent + bar)
