"""Named ranges: nothing when nobody looks, NVTX in its domain when a tool does."""

from __future__ import annotations

import ast
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from epctl.runtime import ranges, time_breakdown

ROOT = Path(ranges.__file__).parent


class FakeLibrary:
    """The C functions of NVTX, writing down what they are told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.nvtxDomainCreateA = _Function(lambda name: self.calls.append(("domain", name)) or 77)
        self.nvtxDomainRangePushEx = _Function(self._push)
        self.nvtxDomainRangePop = _Function(lambda d: self.calls.append(("pop", d.value)))

    def _push(self, domain: Any, reference: Any) -> None:
        attributes = reference._obj
        assert attributes.size == ctypes.sizeof(attributes) == 48
        assert (attributes.version, attributes.message_type) == (3, 1)
        self.calls.append(("push", domain.value, attributes.message.ascii.decode()))


class _Function:
    def __init__(self, body: Any) -> None:
        self.body, self.restype = body, None

    def __call__(self, *arguments: Any) -> Any:
        return self.body(*arguments)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    fake = FakeLibrary()
    monkeypatch.setattr(ranges, "_load_library", lambda: fake)
    ranges.open_nvtx.cache_clear()
    yield fake
    ranges.watch_with_nvtx({})
    ranges.open_nvtx.cache_clear()


def test_nobody_looking_a_range_is_one_shared_object() -> None:
    assert ranges.watch_with_nvtx({}) is False
    assert ranges.annotate("router") is ranges.annotate("optimizer")
    with ranges.annotate("router"), ranges.annotate("router"):
        pass


def test_without_a_tool_the_library_is_not_even_opened(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges.watch_with_nvtx({"PATH": "/bin"})
    with ranges.annotate("experts"):
        pass
    assert library.calls == []


@pytest.mark.parametrize("variable", ranges.TOOL_VARIABLES)
def test_a_tool_sees_ranges_in_the_domain(library: FakeLibrary, variable: str) -> None:
    assert ranges.watch_with_nvtx({variable: "/opt/nsys/libinjection.so"})
    with ranges.annotate("dispatch"), ranges.annotate("experts"):
        pass
    assert library.calls == [
        ("domain", b"epctl"),
        ("push", 77, "dispatch"),
        ("push", 77, "experts"),
        ("pop", 77),
        ("pop", 77),
    ]


def test_a_range_closes_when_its_work_fails(library: FakeLibrary) -> None:
    ranges.watch_with_nvtx({ranges.TOOL_VARIABLES[0]: "x"})
    with pytest.raises(ValueError, match="broken"), ranges.annotate("combine"):
        raise ValueError("broken")
    assert [call[0] for call in library.calls] == ["domain", "push", "pop"]


def test_profiler_marks_are_ranges() -> None:
    assert ranges.trace_name("steps") == time_breakdown.STEP_MARK
    assert ranges.trace_name("optimizer") == time_breakdown.OPTIMIZER_MARK


def test_every_range_has_a_name_of_the_owner_and_every_name_a_range() -> None:
    used = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "annotate":
                assert isinstance(node.args[0], ast.Constant)
                used.add(node.args[0].value)
    assert used | {"steps"} == set(ranges.RANGE_NAMES)
