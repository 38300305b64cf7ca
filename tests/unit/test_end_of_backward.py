"""ZeRO-2's end of backward leaves the waiting to the device; the seam needs a GPU's streams."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from epctl.runtime import deepspeed_gradients


@pytest.fixture
def seen() -> list[Any]:
    return []


def fake_zero(seen: list[Any], *, fails: bool = False) -> Any:
    zero = SimpleNamespace(overlap_comm=True, reduction_stream="reductions")

    def usual() -> None:
        seen.append(("usual", zero.overlap_comm))
        if fails:
            raise RuntimeError("no")

    zero.reduce_ipg_grads = lambda: seen.append("last bucket leaves")
    zero._clear_previous_reduced_grads = lambda: seen.append("cleared")
    zero.independent_gradient_partition_epilogue = usual
    return zero


def use_accelerator(monkeypatch: pytest.MonkeyPatch, seen: list[Any], *, in_order: bool) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: seen.append(("waits for", other)))
    accelerator = SimpleNamespace(
        resolves_data_dependency=lambda: in_order, current_stream=lambda: stream
    )
    monkeypatch.setattr(deepspeed_gradients, "get_accelerator", lambda: accelerator)


def test_the_device_waits_and_the_host_does_not(
    monkeypatch: pytest.MonkeyPatch, seen: list[Any]
) -> None:
    use_accelerator(monkeypatch, seen, in_order=False)
    zero = fake_zero(seen)
    deepspeed_gradients._end_backward_on_device_zero12(zero)
    zero.independent_gradient_partition_epilogue()
    waits = ["last bucket leaves", ("waits for", "reductions"), "cleared"]
    assert seen == [*waits, ("usual", False)]
    assert zero.overlap_comm


def test_what_fails_leaves_the_setting_as_it_was(
    monkeypatch: pytest.MonkeyPatch, seen: list[Any]
) -> None:
    use_accelerator(monkeypatch, seen, in_order=False)
    zero = fake_zero(seen, fails=True)
    deepspeed_gradients._end_backward_on_device_zero12(zero)
    with pytest.raises(RuntimeError, match="no"):
        zero.independent_gradient_partition_epilogue()
    assert zero.overlap_comm


def test_a_device_that_works_in_order_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, seen: list[Any]
) -> None:
    use_accelerator(monkeypatch, seen, in_order=True)
    zero = fake_zero(seen)
    usual = zero.independent_gradient_partition_epilogue
    deepspeed_gradients._end_backward_on_device_zero12(zero)
    assert zero.independent_gradient_partition_epilogue is usual
