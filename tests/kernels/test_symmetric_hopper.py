"""The symmetric product in CUDA C++: compiled here where NVRTC is, run on a GPU of compute 9.0."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from epctl.kernels import cuda_source, symmetric_hopper
from epctl.kernels.cuda_source import CudaSourceError, compile_source

AT = ("RESULTS_AT", "MIRRORS_AT", "BARRIERS_AT")
KINDS = [(dtype, t, a) for dtype in symmetric_hopper.ELEMENTS for t in (0, 1) for a in (0, 1)]


def compiled(dtype: torch.dtype, transposed: int, added: int) -> bytes:
    defines = symmetric_hopper.defines(dtype, bool(transposed), bool(added))
    try:
        return compile_source(symmetric_hopper.SOURCE, defines, symmetric_hopper.ARCHITECTURE)
    except CudaSourceError as error:
        if "was not found" in str(error):
            pytest.skip(str(error))
        raise


def tool(name: str) -> str:
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        pytest.skip(f"this Triton brings no {name}")
    return str(path)


@pytest.mark.parametrize(("dtype", "transposed", "added"), KINDS)
def test_it_compiles_without_a_spill(
    dtype: torch.dtype, transposed: int, added: int, tmp_path: Path
) -> None:
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled(dtype, transposed, added))
    usage = subprocess.run(
        [tool("cuobjdump"), "-res-usage", str(binary)], capture_output=True, text=True, check=True
    )
    assert re.search(r"STACK:0 ", usage.stdout), usage.stdout
    assert f"REG:{symmetric_hopper.NUM_REGISTERS} " in usage.stdout, usage.stdout
    listing = subprocess.run(
        [tool("nvdisasm"), str(binary)], capture_output=True, text=True, check=True
    )
    products = re.findall(r"HGMMA\S* .*", listing.stdout)
    assert products
    assert all(line.startswith("HGMMA.64x256x16.F32") for line in products)
    assert all((".BF16" in line) == (dtype == torch.bfloat16) for line in products)
    # One wait for all products of a step, not one for each.
    assert len(re.findall("WARPGROUP.DEPBAR", listing.stdout)) < len(products)


def test_the_compiler_is_quoted(tmp_path: Path) -> None:
    compiled(torch.float16, 0, 0)  # skips without NVRTC
    source = tmp_path / "wrong.cu"
    source.write_text("no_such_type x;")
    with pytest.raises(CudaSourceError, match=r"wrong\.cu.*no_such_type"):
        compile_source(source, {}, "sm_90a")


def test_without_a_runtime_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(cuda_source.ctypes, "CDLL", absent)
    with pytest.raises(CudaSourceError, match="NVRTC was not found"):
        compile_source(symmetric_hopper.SOURCE, {}, "sm_90a")


def test_shared_memory_is_what_the_source_uses() -> None:
    """Counted from the source's own constants, so that neither changes alone."""
    text = symmetric_hopper.SOURCE.read_text()
    found = dict(re.findall(r"constexpr u32 (\w+) = ([^;]+);", text))
    sizes: dict[str, int] = {}
    for name in (*("NUM_STAGES", "SQUARE", "PANEL", "STAGE", "RESULT"), *AT):
        sizes[name] = eval(found[name], {}, sizes)
    num_barriers = 2 * sizes["NUM_STAGES"] + 6
    needed = sizes["BARRIERS_AT"] + 8 * num_barriers + 1023
    assert needed <= symmetric_hopper.SHARED_BYTES <= 227 * 1024


def test_a_cpu_and_small_products_stay_with_triton() -> None:
    x = torch.zeros(64, 1408, 2048, dtype=torch.float16, device="meta")
    assert not symmetric_hopper.is_faster(x)
    assert not symmetric_hopper.fits(x, x, None, x[..., :1408])


class StandIn:
    """A kernel whose launches are counted, not started; tensors are on the CPU."""

    def __init__(self) -> None:
        self.prepared: list[tuple[Any, ...]] = []
        self.started: list[int] = []

    def tensor_map(self, x: Tensor, box: tuple[int, int]) -> tuple[int, tuple[int, ...]]:
        return x.data_ptr(), x.stride()

    def prepare(self, place: Any, sizes: tuple[int, int], *arguments: Any) -> Any:
        number = len(self.prepared)
        self.prepared.append((place, sizes, *arguments))
        return lambda: self.started.append(number)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    kernel = StandIn()
    monkeypatch.setattr(symmetric_hopper, "_kernel", lambda *_: kernel)
    monkeypatch.setattr(symmetric_hopper, "_num_multiprocessors", lambda _: 132)
    monkeypatch.setattr(symmetric_hopper, "_LAUNCHES", {})
    here = cuda_source.StreamState(0, 7, False)
    monkeypatch.setattr(cuda_source.StreamState, "current", lambda: here)
    return kernel


def test_a_launch_is_prepared_once_for_what_decides_it(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(2, 128, 64, dtype=torch.float16)
    gram, out = torch.zeros(2, 2, 128, 128, dtype=torch.float16).unbind()
    product = symmetric_hopper.symmetric_product
    product(x, x, None, out, 1.0, 1.0)
    product(x, x, None, out, 1.0, 1.0)
    assert stand_in.started == [0, 0]
    product(x, x, None, out, 2.0, 1.0)  # factors
    product(x, x, gram, out, 1.0, 1.0)  # what is added
    product(x, x, None, gram, 1.0, 1.0)  # an address
    product(x.view(2, 64, 128).mT, x, None, out, 1.0, 1.0)  # strides
    product(x.bfloat16(), x, None, out, 1.0, 1.0)
    for place in ((0, 8, False), (0, 7, True), (1, 7, False)):
        state = cuda_source.StreamState(*place)
        monkeypatch.setattr(cuda_source.StreamState, "current", lambda state=state: state)
        product(x, x, None, out, 1.0, 1.0)
    assert stand_in.started == [0, 0, *range(1, 9)]


def test_only_what_was_started_is_started_again(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(symmetric_hopper, "LEAST_FILLED", 0.0)
    x = torch.zeros(2, 512, 512, dtype=torch.float16)
    small = torch.zeros(2, 128, 128, dtype=torch.float16)  # Triton's, unless it is named
    out, other = torch.zeros_like(x), torch.zeros_like(small)
    again = symmetric_hopper.start_again
    assert not again(x, x, x, out, 1.0, 1.0)
    for operand, result in ((x, out), (small, other)):
        symmetric_hopper.symmetric_product(operand, operand, operand, result, 1.0, 1.0)
    assert again(x, x, x, out, 1.0, 1.0)
    assert not again(x, x, x, out, 1.0, 0.5)
    assert not again(small, small, small, other, 1.0, 1.0)
    monkeypatch.setattr(symmetric_hopper, "LEAST_FILLED", 2.0)  # none is: named, not chosen
    symmetric_hopper.symmetric_product(x, x, None, out, 1.0, 1.0)
    assert not again(x, x, None, out, 1.0, 1.0)
    monkeypatch.setenv(cuda_source.SWITCH, "0")
    assert not again(x, x, x, out, 1.0, 1.0)
    assert stand_in.started == [0, 1, 0, 2]


def test_prepared_launches_have_a_limit(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric_hopper, "MOST_LAUNCHES", 3)
    x = torch.zeros(1, 128, 64, dtype=torch.float16)
    out = torch.zeros(1, 128, 128, dtype=torch.float16)
    for number in range(8):
        symmetric_hopper.symmetric_product(x, x, None, out, float(number), 1.0)
        assert len(symmetric_hopper._LAUNCHES) <= 3
    assert stand_in.started == list(range(8))


# --- on a GPU -------------------------------------------------------------------------------------

gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _capable(request: pytest.FixtureRequest) -> None:
    needs_it = request.node.get_closest_marker("gpu") and torch.cuda.is_available()
    if needs_it and torch.cuda.get_device_capability() != symmetric_hopper.CAPABILITY:
        pytest.skip("written for compute capability 9.0")


def operand(dtype: torch.dtype, num: int, rows: int, summed: int, columns_first: bool) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(rows + summed)
    shape = (num, summed, rows) if columns_first else (num, rows, summed)
    x = (torch.randn(shape, device="cuda", generator=generator) / summed**0.5).to(dtype)
    return x.mT if columns_first else x


def symmetrized(x: Tensor) -> Tensor:
    return x.tril() + x.tril(-1).mT


def assert_is(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found, found.mT)
    roundoff = 2.0**-9 if found.dtype == torch.bfloat16 else 2.0**-12
    assert float((found.float() - expected).norm() / expected.norm()) <= 2 * roundoff


SIZES = [
    (5, 1408, 2048),
    (3, 2048, 1408),
    (2, 576, 2048),
    (7, 704, 72),
    (2, 136, 8),
    (1, 1000, 520),
]


@gpu
@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("dtype", symmetric_hopper.ELEMENTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_gram_of_rows_and_of_columns(
    sizes: tuple[int, int, int], dtype: torch.dtype, columns_first: bool
) -> None:
    """Results start as NaN: a square that is missed stays one. So does what surrounds them."""
    x = operand(dtype, *sizes, columns_first)
    guarded = x.new_full((sizes[0] + 2, sizes[1], sizes[1]), torch.nan)
    out = guarded[1:-1]
    assert symmetric_hopper.fits(x, x, None, out)
    symmetric_hopper.symmetric_product(x, x, None, out, 1.0, 1.0)
    assert_is(out, x.float() @ x.float().mT)
    assert guarded[[0, -1]].isnan().all()


@gpu
@pytest.mark.parametrize("summed", [8, 72, 136, 200, 320])
def test_few_steps_with_an_added_term(summed: int) -> None:
    """One to five steps: what is added is asked for in the first, or not until the fifth."""
    x = operand(torch.float16, 30, 648, summed, False)
    added = symmetrized(operand(torch.float16, 30, 648, 648, False))
    out = torch.full_like(added, torch.nan)
    symmetric_hopper.symmetric_product(x, x, added, out, 2.0, -1.0)
    assert_is(out, 2.0 * x.float() @ x.float().mT - added.float())


@gpu
@pytest.mark.parametrize("dtype", symmetric_hopper.ELEMENTS)
@pytest.mark.parametrize(("num", "rows"), [(16, 1408), (3, 2048), (40, 768), (2, 584), (1, 264)])
def test_added_term_factors_and_two_operands(dtype: torch.dtype, num: int, rows: int) -> None:
    x = operand(dtype, num, rows, 512, False)
    gram = symmetrized((x.float() @ x.float().mT).to(dtype))
    square = symmetrized((gram.float() @ gram.float()).to(dtype))
    out = torch.full_like(gram, torch.nan)
    symmetric_hopper.symmetric_product(gram, square, gram, out, -1.5, 0.75)
    assert_is(out, -1.5 * gram.float() @ square.float() + 0.75 * gram.float())


@gpu
def test_what_is_added_may_be_what_is_multiplied_and_results_repeat() -> None:
    """Also over many parts a multiprocessor: buffers are used again and again."""
    x = operand(torch.float16, 64, 1408, 256, False)
    gram = symmetrized(x @ x.mT)
    outs = [torch.full_like(gram, torch.nan) for _ in range(2)]
    for out in outs:
        symmetric_hopper.symmetric_product(gram, gram, gram, out, 0.5, 2.0)
    assert torch.equal(*outs)
    for part in range(0, 64, 16):
        at = slice(part, part + 16)
        assert_is(outs[0][at], 0.5 * gram[at].float() @ gram[at].float() + 2.0 * gram[at].float())


@gpu
def test_other_matrices_do_not_leak_into_a_result() -> None:
    x = operand(torch.float16, 3, 712, 200, False).clone()
    x[0] = x[2] = torch.nan
    for here in (x, x.mT.contiguous().mT):
        out = torch.zeros(3, 712, 712, dtype=x.dtype, device="cuda")
        symmetric_hopper.symmetric_product(here, here, None, out, 1.0, 1.0)
        assert_is(out[1:2], x[1:2].float() @ x[1:2].float().mT)


def chain(gram: Tensor, num_products: int = 6) -> Tensor:
    """Each product needs the one before, and writes what the one before that read.

    Eigenvalues between zero and one stay there.
    """
    one, other = gram.clone(), torch.full_like(gram, torch.nan)
    for _ in range(num_products):
        symmetric_hopper.symmetric_product(one, one, one, other, -0.5, 1.5)
        one, other = other, one
    return one


def gram_below_one(num: int, rows: int) -> Tensor:
    x = operand(torch.float16, num, rows, 256, False)
    gram = x.float() @ x.float().mT
    return symmetrized((gram / gram.norm(dim=(1, 2), keepdim=True)).half())


@gpu
def test_a_kernel_that_is_set_up_early_waits_for_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gram = gram_below_one(9, 1408)
    early = chain(gram)
    assert early.isfinite().all()
    monkeypatch.setattr(cuda_source.CudaKernel, "starts_early", False)
    assert torch.equal(early, chain(gram))
    # Between kernels of others, too.
    expected = chain(gram.mul(0.25).clone())
    monkeypatch.setattr(cuda_source.CudaKernel, "starts_early", True)
    found = chain(gram.mul(0.25).clone())
    assert torch.equal(found.add(1.0), expected.add(1.0))


@gpu
def test_a_captured_chain_is_the_same() -> None:
    gram = gram_below_one(5, 768)
    expected = chain(gram)
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(gram)
    for _ in range(3):
        found.fill_(torch.nan)
        graph.replay()
        assert torch.equal(found, expected)


@gpu
def test_what_is_started_again_reads_what_lies_there_now() -> None:
    from epctl.kernels.symmetric import symmetric_matmul

    x = operand(torch.float16, 24, 1536, 512, False).clone()
    gram = symmetrized((x.float() @ x.float().mT).half())
    out = torch.full_like(gram, torch.nan)
    for scale in (1.0, 0.5):
        gram.mul_(scale)
        out.fill_(torch.nan)
        expected = -1.5 * gram.float() @ gram.float() + 0.75 * gram.float()
        found = symmetric_matmul(gram, gram, gram, alpha=-1.5, beta=0.75, out=out)
        assert found is out
        assert_is(out, expected)
        assert symmetric_hopper.start_again(gram, gram, gram, out, -1.5, 0.75)
        assert_is(out, expected)


@gpu
def test_sizes_not_seen_before_are_not_captured() -> None:
    """Their places would come from the host; Triton computes them."""
    x = operand(torch.float16, 29, 896, 512, False)
    out = torch.empty(29, 896, 896, dtype=x.dtype, device="cuda")
    answers = []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answers.append(symmetric_hopper.fits(x, x, None, out))
        out.zero_()
    assert answers == [False]
    assert symmetric_hopper.fits(x, x, None, out)


@gpu
def test_a_thread_that_used_no_gpu_before() -> None:
    x = operand(torch.float16, 3, 640, 192, False)
    expected = torch.full((3, 640, 640), torch.nan, dtype=x.dtype, device="cuda")
    symmetric_hopper.symmetric_product(x, x, None, expected, 1.0, 1.0)
    found = torch.full_like(expected, torch.nan)
    torch.cuda.synchronize()
    symmetric_hopper._kernel.cache_clear()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(symmetric_hopper.symmetric_product, x, x, None, found, 1.0, 1.0).result()
        torch.cuda.synchronize()
    assert torch.equal(found, expected)


@gpu
def test_tensors_of_other_kinds_do_not_fit() -> None:
    x = operand(torch.float16, 3, 640, 640, False)
    out = torch.empty_like(x)
    assert symmetric_hopper.fits(x, x, x, out)
    assert not symmetric_hopper.fits(x, x.bfloat16(), x, out)
    assert not symmetric_hopper.fits(x, x, x.float(), out)
    assert not symmetric_hopper.fits(x, x, x, out.bfloat16())
    assert not symmetric_hopper.fits(x, x, x.cpu(), out)
    assert not symmetric_hopper.fits(x[:1].expand(3, -1, -1), x, x, out)
    assert not symmetric_hopper.fits(x.view(3, -1)[:, 4:-4].view(3, 1, -1), x, x, out)


@gpu
def test_what_it_cannot_read_goes_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from epctl.kernels import symmetric

    x = operand(torch.float16, 64, 1408, 2048, False)
    out = torch.empty(64, 1408, 1408, dtype=x.dtype, device="cuda")
    assert symmetric_hopper.is_faster(x)
    assert symmetric_hopper.fits(x, x, None, out)
    odd = operand(torch.float16, 2, 701, 512, False)  # rows of a result are no multiple of 16 bytes
    assert not symmetric_hopper.fits(odd, odd, None, odd.new_empty(2, 701, 701))
    with pytest.raises(ValueError, match="does not run"):
        symmetric.symmetric_matmul(odd, odd, tile=symmetric.HOPPER_TILE)
    assert_is(symmetric.symmetric_matmul(odd, odd), odd.float() @ odd.float().mT)
    monkeypatch.setenv(cuda_source.SWITCH, "0")
    assert not symmetric_hopper.fits(x, x, None, out)


@gpu
def test_a_compiler_that_refuses_leaves_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> bytes:
        raise CudaSourceError("not today")

    monkeypatch.setattr(symmetric_hopper, "compile_source", refuse)
    symmetric_hopper._kernel.cache_clear()
    x = operand(torch.float16, 1, 768, 1024, False)
    with pytest.warns(UserWarning, match="slower: not today"):
        assert not symmetric_hopper.fits(x, x, None, x.new_empty(1, 768, 768))
    symmetric_hopper._kernel.cache_clear()
