"""The chain's workspace, its chunks, its graphs (on a stand-in for CUDA's), and which it takes."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from epctl.kernels import newton_schulz_chain as chains
from epctl.kernels import newton_schulz_graph as graphs
from epctl.kernels.newton_schulz import (
    COEFFICIENTS,
    normalize,
    orthogonalize,
    orthogonalize_normal_,
    resolve_iteration,
)
from epctl.kernels.newton_schulz_chain import Chain, iterate_, workspace_bytes
from epctl.kernels.newton_schulz_cost import (
    RATES,
    MeasuredAt,
    Rates,
    choose_iteration,
    count_products,
    predicted_seconds,
)
from epctl.runtime.deepspeed_seams import FlatPartition, Fragment
from epctl.runtime.optimizer import MatrixOptimizer

ROWS = tuple(COEFFICIENTS["you"])
H100 = "NVIDIA H100 80GB HBM3"


def batch(*shape: int, seed: int = 3) -> Tensor:
    x_BMN = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return normalize(x_BMN)


class Allocations(TorchDispatchMode):
    """The most bytes of new storages that were alive at once after any operation."""

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()
        self.peak = 0
        self._existing = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self._seen: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(found, Tensor):
                self._seen.append(weakref.ref(found))
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in (ref() for ref in self._seen)
            if tensor is not None and tensor.untyped_storage().data_ptr() not in self._existing
        }
        self.peak = max(self.peak, sum(storages.values()))
        return result


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("size", [1, 3, 12])
def test_workspace_is_the_formula_and_does_not_grow_with_the_batch(
    method: Any, shape: tuple[int, int], size: int
) -> None:
    x_BMN = batch(12, *shape)
    gc.collect()
    with Allocations(x_BMN) as counted:
        iterate_(x_BMN, Chain(method, "torch", ROWS, at_once=size))
    assert counted.peak == workspace_bytes(shape, size, method, torch.float32)


def test_workspace_of_moonlights_matrices_is_small() -> None:
    """The bar of issue 10 is 2 GiB, the stretch 0.5 GiB; all stacked they would take 13.5 GB."""
    device, half = torch.device("cuda"), torch.float16
    shapes = ((1408, 2048), (2048, 1408), (2816, 2048), (11264, 2048), (3072, 2048), (576, 2048))
    shapes += ((4096, 512), (2048, 2048), (64, 2048))
    for shape in shapes:
        for method, products in itertools.product(("standard", "gram"), ("torch", "symmetric")):
            chain = Chain(method, products, ROWS)  # type: ignore[arg-type]
            size = chains.matrices_at_once(shape, chain, half, device)
            assert size
            largest = 2**29 + 2**12
            assert graphs.block_bytes(shape, size, chain.method, half) <= largest, shape
    chain = Chain("gram", "symmetric", ROWS)
    sizes = [chains.matrices_at_once(s, chain, half, device) for s in ((1408, 2048), (11264, 2048))]
    assert sizes == [19, 4]
    assert chains.matrices_at_once((64, 2048), chain, half, device) > 100  # type: ignore[operator]
    assert chains.matrices_at_once((1408, 2048), chain, half, torch.device("cpu")) is None


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_chunks_give_the_same_as_all_at_once(method: Any) -> None:
    x_BMN = batch(5, 24, 40)
    whole = x_BMN.clone()
    orthogonalize_normal_(whole, method=method)
    parts = x_BMN.clone()
    orthogonalize_normal_(parts, method=method, at_once=2)
    # Library kernels depend on the batch size: float32 rounding times the polynomial's gain.
    assert float((whole - parts).norm() / whole.norm()) < 485 * 2.0**-24
    assert not torch.equal(parts, x_BMN)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_batches_of_one_short_side_together_give_the_same(method: Any, size: int) -> None:
    batches = [batch(3, 24, 40, seed=1), batch(1, 24, 24, seed=2), batch(5, 64, 24, seed=3)]
    expected = [x.clone() for x in batches]
    for x_BMN in expected:
        orthogonalize_normal_(x_BMN, method=method)
    chains.iterate_together_(batches, Chain(method, "torch", ROWS), size)
    for found, wanted in zip(batches, expected, strict=True):
        # Library kernels depend on the batch size, as above.
        assert float((found - wanted).norm() / wanted.norm()) < 485 * 2.0**-24


@pytest.mark.parametrize(("size", "expected"), [(4, [4, 4, 1]), (9, [9]), (100, [9])])
def test_parts_are_cut_across_batches(size: int, expected: list[int]) -> None:
    batches = [torch.arange(3), torch.arange(3, 4), torch.arange(4, 9)]
    parts = list(chains._cut(batches, size))
    assert [sum(len(part) for part in group) for group in parts] == expected
    assert torch.cat([part for group in parts for part in group]).tolist() == list(range(9))


@pytest.mark.parametrize("at_once", [None, 2])
def test_on_a_cpu_batches_go_one_by_one(at_once: int | None) -> None:
    batches = [batch(3, 24, 40, seed=1), batch(2, 40, 24, seed=2), torch.zeros(0, 24, 30)]
    expected = [x.clone() for x in batches]
    for x_BMN in expected:
        orthogonalize_normal_(x_BMN, at_once=at_once)
    orthogonalize_normal_(*batches, at_once=at_once)
    assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shapes", [[(2, 2048, 2816), (3, 3072, 2048), (1, 2048, 2048)],
                                    [(2, 64, 96), (1, 128, 64)]])  # fmt: skip
def test_on_a_gpu_batches_together_are_as_right_as_apart(shapes: list[Any]) -> None:
    batches = [batch(*shape, seed=i).cuda().half() for i, shape in enumerate(shapes)]
    exact = [x.float() for x in batches]
    for x_BMN in exact:
        orthogonalize_normal_(x_BMN, products="torch")
    orthogonalize_normal_(*batches, products="symmetric", use_graphs=True)
    for found, wanted in zip(batches, exact, strict=True):
        assert float((found.float() - wanted).norm() / wanted.norm()) < 5e-3


@pytest.mark.parametrize("num_matrices", [8, 64])
def test_a_step_allocates_by_the_chunk_and_not_by_the_model(num_matrices: int) -> None:
    """Beside masters, gradients and momentum: a batch and its workspace, here in float32."""
    shape, in_chunk = (24, 24), 4
    stack = nn.Parameter(torch.randn(num_matrices, *shape))
    group = {"params": [stack], "name": "m", "kind": "muon", "lr": 0.01, "weight_decay": 0.1}
    chunk_elements = in_chunk * shape[0] * shape[1]
    optimizer = MatrixOptimizer([group], chunk_elements=chunk_elements)
    layout = ((Fragment(stack, 0, stack.numel(), 0),),)
    optimizer.wire([FlatPartition(stack, None, 0, layout)])
    stack.grad = torch.randn_like(stack)
    momentum = optimizer.state[stack]["momentum_buffer"]
    gc.collect()
    with Allocations(stack, stack.grad, momentum) as counted:
        optimizer.step()
    batch_bytes = 4 * chunk_elements
    at_work = batch_bytes + workspace_bytes(shape, in_chunk, "standard", torch.float32)
    # The batch before is let go only when this one stands.
    assert at_work <= counted.peak <= at_work + batch_bytes


def test_an_empty_batch_is_left_alone() -> None:
    assert orthogonalize(torch.zeros(0, 4, 6)).shape == (0, 4, 6)


class RecordedGraph:
    """Stands in for a CUDA graph: replaying runs the recorded function on its fixed buffers."""

    def __init__(self, run: Any) -> None:
        self.replay = run


class CpuGraphs(graphs.GraphCache):
    """A cache that records on a CPU, and counts what it records."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__(torch.device("cpu"))
        self.num_recorded = 0
        self.fails = fails

    def _record(self, run: Any) -> Any:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.num_recorded += 1
        return RecordedGraph(run)

    def _on_own_stream(self) -> Any:
        return warnings.catch_warnings()


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_replays_give_what_the_chain_gives(method: Any) -> None:
    chain, cache = Chain(method, "torch", ROWS), CpuGraphs()
    for shape in ((5, 24, 40), (5, 40, 24), (2, 16, 64)):
        x_BMN = batch(*shape)
        expected = x_BMN.clone()
        for part in expected.split(2):
            chains.run_chain_(part, chain, chains.create_workspace(part, chain.method))
        for _ in range(2):  # the second time from graphs alone
            found = x_BMN.clone()
            graphs.replay_(found, chain, 2, cache)
            assert torch.equal(found, expected)
    assert cache.num_recorded == len({(2, 24, 40), (1, 24, 40), (2, 40, 24), (1, 40, 24), (2, 16)})


def test_all_graphs_share_one_block_as_large_as_the_largest_needs() -> None:
    chain, cache = Chain("gram", "torch", ROWS), CpuGraphs()
    for shape in ((4, 16, 24), (4, 48, 64), (4, 16, 24)):  # the block grows in between
        x_BMN = batch(*shape)
        expected = x_BMN.clone()
        chains.run_chain_(expected, chain, chains.create_workspace(expected, chain.method))
        graphs.replay_(x_BMN, chain, 4, cache)
        assert torch.equal(x_BMN, expected)
    assert cache.block.numel() <= graphs.block_bytes((48, 64), 4, "gram", torch.float32)
    assert cache.num_recorded == 3  # the small one twice: its first place is gone
    storages = {item.x_BMN.untyped_storage().data_ptr() for item in cache.captured.values()}
    assert storages == {cache.block.untyped_storage().data_ptr()}


def test_a_failed_capture_says_so_once_and_goes_on_without() -> None:
    chain, cache = Chain("gram", "torch", ROWS), CpuGraphs(fails=True)
    x_BMN = batch(3, 16, 24)
    expected = x_BMN.clone()
    for part in expected.split(2):
        chains.run_chain_(part, chain, chains.create_workspace(part, chain.method))
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted"):
        graphs.replay_(x_BMN, chain, 2, cache)
    assert torch.equal(x_BMN, expected)


def test_products_are_counted_as_published() -> None:
    assert count_products("standard") == (5, 5, 5)
    assert count_products("gram") == (2, 14, 2)


def test_torch_products_stay_until_both_are_measured() -> None:
    half = {at: rates for at, rates in RATES.items() if at.products == "torch"}
    chosen = choose_iteration(1408, 2048, H100, rates=half)
    assert (chosen.method, chosen.products) == ("standard", "torch")
    assert "symmetric not measured on NVIDIA H100" in chosen.reason
    assert "no GPU" in choose_iteration(1408, 2048, None).reason
    assert "torch and symmetric not measured" in choose_iteration(1408, 2048, "NVIDIA B200").reason
    assert "torch and symmetric not measured" in choose_iteration(8192, 8192, "NVIDIA H200").reason


@pytest.mark.parametrize("gpu", [H100, "NVIDIA H200"])
def test_measured_gpus_take_symmetric_products(gpu: str) -> None:
    experts = choose_iteration(1408, 2048, gpu)
    assert (experts.method, experts.products) == ("gram", "symmetric")


def test_parts_are_equal() -> None:
    assert [chains._even_parts(count, 19) for count in (64, 19, 20, 1)] == [16, 19, 10, 1]


def test_graphs_are_for_products_that_end_before_the_next_is_launched() -> None:
    assert chains._is_short(3, 576, 2048)
    assert not chains._is_short(16, 1408, 2048)
    assert chains._is_short(1, 2048, 1408)


def test_measured_rates_decide_where_both_are_there() -> None:
    rates = {
        MeasuredAt("H100", "torch", 2048): Rates(684, 662, 619, "made up"),
        MeasuredAt("H100", "symmetric", 2048): Rates(945, 872, 619, "made up"),
        MeasuredAt("H100", "symmetric", 640): Rates(300, 250, 619, "made up"),
    }
    experts = choose_iteration(1408, 2048, H100, rates=rates)
    assert (experts.method, experts.products) == ("gram", "symmetric")
    assert "us gram by symmetric" in experts.reason
    small = choose_iteration(576, 2048, H100, rates=rates)
    assert small.products == "torch"
    # 64 x 1408x2048 by cuBLAS, as measured: 5 x (0.68 + 0.77 + 0.73) ms.
    torch_rates = RATES[MeasuredAt("H100", "torch", 4096)]
    seconds = 64 * predicted_seconds("standard", 1408, 2048, torch_rates)
    assert seconds == pytest.approx(5 * (0.68 + 0.77 + 0.73) * 1e-3, rel=0.01)


def test_a_named_method_keeps_the_chosen_products() -> None:
    cpu = torch.device("cpu")
    chosen = resolve_iteration((24, 40), cpu, torch.float32, method="gram", products="symmetric")
    assert (chosen.method, chosen.products) == ("gram", "symmetric")
    in_bfloat16 = resolve_iteration((16, 128), cpu, torch.bfloat16)
    assert in_bfloat16.method == "standard"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(7, 1408, 2048), (7, 2048, 1408), (5, 576, 2048)])
def test_graphs_and_symmetric_products_on_a_gpu(shape: tuple[int, int, int]) -> None:
    """Half precision against float32's products; a second batch goes through the same graph."""
    for seed in (1, 2):
        x_BMN = batch(*shape, seed=seed).to("cuda")
        expected = orthogonalize(x_BMN, dtype=torch.float32, products="torch", method="gram")
        for at_once, use_graphs in ((None, True), (None, False), (2, True)):
            found = orthogonalize(
                x_BMN, products="symmetric", method="gram", use_graphs=use_graphs, at_once=at_once
            )
            assert float((found - expected).norm() / expected.norm()) < 5e-3
    cache = graphs._CACHES[x_BMN.device]
    assert cache.refused is None
    assert cache.captured
