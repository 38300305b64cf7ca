"""The end of backward leaves the waiting to the device; the seams need a GPU's streams."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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


def fake_zero3(seen: list[Any], *, fails: bool = False, offload: bool = False) -> Any:
    stream = SimpleNamespace(synchronize=lambda: seen.append("the host stops"))
    zero = SimpleNamespace(reduce_and_partition_stream=stream, ipg_buckets={torch.bfloat16: None})
    zero.offload_optimizer, zero.zenflow = offload, False

    def usual() -> None:
        zero.reduce_and_partition_stream.synchronize()
        seen.append("usual")
        if fails:
            raise RuntimeError("no")

    zero._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads = lambda dtype: seen.append(
        ("last bucket leaves", dtype)
    )
    zero.independent_gradient_partition_epilogue = usual
    return zero


@pytest.mark.parametrize("fails", [False, True])
def test_zero3_leaves_it_to_the_device_too(
    monkeypatch: pytest.MonkeyPatch, seen: list[Any], *, fails: bool
) -> None:
    use_accelerator(monkeypatch, seen, in_order=False)
    zero = fake_zero3(seen, fails=fails)
    stream = zero.reduce_and_partition_stream
    deepspeed_gradients._end_backward_on_device_zero3(zero)
    with pytest.raises(RuntimeError, match="no") if fails else contextlib.nullcontext():
        zero.independent_gradient_partition_epilogue()
    assert seen == [("last bucket leaves", torch.bfloat16), ("waits for", stream), "usual"]
    assert zero.reduce_and_partition_stream is stream


@pytest.mark.parametrize(("offload", "in_order"), [(True, False), (False, True)])
def test_zero3_stops_the_host_where_it_reads_gradients(
    monkeypatch: pytest.MonkeyPatch, seen: list[Any], *, offload: bool, in_order: bool
) -> None:
    use_accelerator(monkeypatch, seen, in_order=in_order)
    zero = fake_zero3(seen, offload=offload)
    usual = zero.independent_gradient_partition_epilogue
    deepspeed_gradients._end_backward_on_device_zero3(zero)
    assert zero.independent_gradient_partition_epilogue is usual


def test_zero3_takes_the_norm_before_parameters_are_put_away(
    monkeypatch: pytest.MonkeyPatch, seen: list[Any]
) -> None:
    zero = SimpleNamespace(offload_optimizer=False, model_parallel_group=None)
    zero._pre_step = lambda: seen.append("begins")
    zero.grad_partitions_flat_buffer, zero.dp_process_group = "gradients", "ranks"

    def norm(gradients: list[str], group: str) -> float:
        seen.append((gradients, group))
        return 3.0 + len(seen)

    monkeypatch.setattr(deepspeed_gradients, "_norm_over_ranks", norm)
    deepspeed_gradients._norm_at_once_zero3(zero)
    zero._pre_step()
    assert seen == ["begins", (["gradients"], "ranks")]
    zero._pre_step()  # one that overflowed asked for no norm
    assert zero._get_norm_groups() == [7.0]
