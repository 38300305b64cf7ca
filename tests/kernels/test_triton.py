"""The Triton kernels against the float32 reference: on a GPU, or in Triton's interpreter.

The interpreter computes bf16 dots wrongly on CPU, so there only float32 runs; test_interpreter.py
starts this file that way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from epctl.kernels import reference

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
NEEDS = "needs a CUDA GPU, or TRITON_INTERPRET=1 (test_interpreter.py)"
pytestmark = pytest.mark.skipif(not (INTERPRETING or torch.cuda.is_available()), reason=NEEDS)

gpu = pytest.mark.gpu
# tokens, hidden, intermediate, experts, top_k
SMALL = [(1, 64, 64, 4, 4), (63, 64, 64, 4, 2), (37, 40, 24, 5, 3), (50, 64, 128, 8, 1)]
LARGE = [
    (1, 256, 320, 16, 4),
    (63, 256, 320, 16, 4),
    (100, 264, 200, 8, 2),
    (1000, 256, 320, 16, 4),
    (1000, 256, 384, 16, 16),
    (1000, 512, 256, 128, 8),
    (4096, 2048, 1408, 64, 6),
]


def _name(value: object) -> str | None:
    return "T{}-D{}-I{}-E{}-K{}".format(*value) if isinstance(value, tuple) else None


@pytest.fixture
def moe() -> ModuleType:
    from epctl.kernels import moe

    return moe


@pytest.mark.parametrize("shape", SMALL, ids=_name)
def test_moe_float32(
    moe: ModuleType, make_problem: Callable, assert_matches: Callable, shape: tuple[int, ...]
) -> None:
    assert_matches(moe.moe_mlp, make_problem(*shape))


@pytest.mark.parametrize("routing", ["half elsewhere", "all elsewhere", "one expert"])
def test_moe_routing(
    moe: ModuleType, make_problem: Callable, assert_matches: Callable, routing: str
) -> None:
    assert_matches(moe.moe_mlp, make_problem(50, 64, 64, 4, 2, routing=routing))


def for_held_rows(moe: ModuleType, **options: object) -> Callable[..., torch.Tensor]:
    """The block as expert-parallel ranks call it: they know how many choices are theirs."""

    def block(x: torch.Tensor, experts: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return moe.moe_mlp(x, experts, *rest, num_held=int((experts >= 0).sum()), **options)

    return block


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("routing", ["random", "half elsewhere", "all elsewhere"])
def test_moe_takes_memory_for_the_rows_held_here(
    moe: ModuleType, make_problem: Callable, assert_matches: Callable, routing: str, recompute: bool
) -> None:
    problem = make_problem(50, 64, 64, 4, 2, routing=routing)
    block = for_held_rows(moe, recompute=recompute)
    assert_matches(block, problem)
    x, *rest, _ = problem
    y = block(x.requires_grad_(), *rest)
    outward, inward = y.grad_fn, y.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    assert not outward.saved_tensors  # type: ignore[union-attr]  # a recomputation ends before it
    sizes = {t.shape for t in inward.saved_tensors}  # type: ignore[union-attr]
    num_held = int((problem.experts_TK >= 0).sum())
    assert torch.Size([num_held]) in sizes
    assert recompute or torch.Size([num_held, 128]) in sizes


def test_moe_without_tma(
    moe: ModuleType,
    make_problem: Callable,
    assert_matches: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from epctl.kernels import grouped_gemm, weight_gradient

    for module in (grouped_gemm, weight_gradient):
        monkeypatch.setattr(module, "can_use_tma", lambda tensors: False)
    assert_matches(moe.moe_mlp, make_problem(63, 64, 64, 4, 2))


@pytest.mark.parametrize("routing", ["random", "half elsewhere"])
def test_moe_tma_stores(
    moe: ModuleType,
    make_problem: Callable,
    assert_matches: Callable,
    monkeypatch: pytest.MonkeyPatch,
    routing: str,
) -> None:
    from epctl.kernels import tiles

    # A block of 128 columns overhangs the gate half of 192 and reaches into the up half.
    tile = tiles.Tile(32, 128, 32, num_warps=4, num_stages=1, tma_store=True, slice_n=32)
    weights = tile._replace(block_n=32)
    table = tiles.TileTable(tile, tile, tile, tile, weights, weights)
    monkeypatch.setattr(tiles, "FLOAT32", table)
    assert_matches(moe.moe_mlp, make_problem(200, 64, 192, 3, 2, routing=routing))


def test_moe_recompute(moe: ModuleType, make_problem: Callable, assert_matches: Callable) -> None:
    def block(*arguments: torch.Tensor) -> torch.Tensor:
        return moe.moe_mlp(*arguments, recompute=True)

    assert_matches(block, make_problem(63, 64, 64, 4, 2))


def test_moe_no_tokens(moe: ModuleType, make_problem: Callable, assert_matches: Callable) -> None:
    assert_matches(moe.moe_mlp, make_problem(0, 64, 64, 4, 2))


@pytest.fixture(params=[True, False], ids=["eager", "operators"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a plain autograd node, and through torch's operators."""
    from epctl.kernels import eager

    monkeypatch.setattr(eager, "enabled", request.param)


@pytest.mark.usefixtures("each_way")
def test_moe_second_backward_is_refused(moe: ModuleType, make_problem: Callable) -> None:
    x, experts, weights, *matrices, dy = make_problem(20, 64, 64, 4, 2)
    y = moe.moe_mlp(x.requires_grad_(), experts, weights, *matrices)
    y.backward(dy, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_moe_refuses_mixed_dtypes(moe: ModuleType, make_problem: Callable) -> None:
    x, experts, weights, *matrices, _ = make_problem(20, 64, 64, 4, 2)
    with pytest.raises(ValueError, match=r"bfloat16, but expert weights are torch\.float32"):
        moe.moe_mlp(x.bfloat16(), experts, weights, *matrices)


@pytest.mark.parametrize("exact", [True, False], ids=["held", "all pairs"])
@pytest.mark.parametrize("routing", ["random", "half elsewhere"])
def test_routing_tables_are_a_stable_sort(
    make_problem: Callable, routing: str, exact: bool
) -> None:
    from epctl.kernels.permute import routing_tables

    experts_TK = make_problem(300, 4, 4, 12, 3, routing=routing).experts_TK
    flat = experts_TK.reshape(-1).cpu()
    num_held = int((flat >= 0).sum())
    tables = routing_tables(experts_TK, 12, 32, num_held if exact else flat.numel())
    wanted = flat.argsort(stable=True)[int((flat < 0).sum()) :]
    assert tables.pair_of_row_N[: len(wanted)].tolist() == wanted.tolist()
    counts = torch.bincount(flat[flat >= 0], minlength=12)
    assert tables.offsets_E.tolist() == [0, *counts.cumsum(0).tolist()]
    num_tiles = int(tables.num_tiles_1)
    starts = [(e, int(tables.offsets_E[e]) + r) for e in range(12) for r in range(0, counts[e], 32)]
    got = zip(tables.tile_expert_M.tolist(), tables.tile_row_M.tolist(), strict=True)
    assert list(got)[:num_tiles] == starts
    assert len(tables.tile_row_M) >= num_tiles


@pytest.mark.parametrize("score_func", reference.SCORE_FUNCTIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "top_groups", "group_score"),
    [
        (24, 4, 1, 1, "top2_sum"),
        (24, 4, 6, 3, "top2_sum"),
        (20, 3, 4, 2, "max"),
        (8, 8, 1, 1, "max"),
    ],
)
def test_route(
    device: torch.device,
    score_func: str,
    normalize: bool,
    experts: int,
    top_k: int,
    groups: int,
    top_groups: int,
    group_score: str,
) -> None:
    from epctl.kernels import router

    generator = torch.Generator().manual_seed(42)
    logits_TE = torch.randn(50, experts, generator=generator).to(device)
    bias_E = torch.randn(experts, generator=generator).to(device) * 0.2
    dweights_TK = torch.randn(50, top_k, generator=generator).to(device)
    results = []
    for run in (router.route, reference.route):
        leaf = logits_TE.clone().requires_grad_()
        weights_TK, experts_TK = run(
            leaf,
            bias_E,
            top_k=top_k,
            score_func=score_func,
            num_groups=groups,
            top_groups=top_groups,
            group_score=group_score,
            normalize=normalize,
            scale=2.446,
        )
        weights_TK.backward(dweights_TK)
        results.append((experts_TK, weights_TK.detach(), leaf.grad))
    got, wanted = results
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[2], wanted[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2)])
def test_route_ties_floors_and_nan(device: torch.device, groups: int, top_groups: int) -> None:
    from epctl.kernels import router

    rule = {"top_k": 3, "num_groups": groups, "top_groups": top_groups, "normalize": True}
    generator = torch.Generator().manual_seed(42)
    logits_TE = torch.randint(-2, 3, (40, 16), generator=generator).float().to(device)
    got = router.route(logits_TE, **rule, normalize_floor=1.5, scale=1.0)
    wanted = reference.route(logits_TE, **rule, normalize_floor=1.5, scale=1.0)
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[0], wanted[0])
    broken_TE = torch.full((2, 16), float("nan"), device=device)
    _, experts_TK = router.route(broken_TE, **rule, scale=1.0)
    assert all(len(set(row)) == 3 and max(row) < 16 for row in experts_TK.tolist())


def test_operators_tell_torch_the_truth(moe: ModuleType, make_problem: Callable) -> None:
    x, experts, weights, *matrices, _ = make_problem(20, 64, 64, 4, 2)
    torch.library.opcheck(
        moe._moe_forward,
        (
            x.requires_grad_(),
            experts,
            weights,
            *matrices,
            [],
            "silu",
            "product",
            1.0,
            1.0,
            True,
            40,
        ),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def run_every_way(
    moe: ModuleType, problem: object, monkeypatch: pytest.MonkeyPatch, ways: list[tuple[bool, bool]]
) -> list[list[torch.Tensor]]:
    """Router and block, forward and backward, with (eager, launch) switched on or off."""
    from epctl.kernels import eager, launch, router

    x, _, _, *matrices, dy = problem
    logits_TE = x.float() @ matrices[0][:, 0].float().T
    results = []
    for by_function, by_facts in ways:
        monkeypatch.setattr(eager, "enabled", by_function)
        monkeypatch.setattr(launch, "enabled", by_facts and launch._is_known())
        leaves = [t.clone().requires_grad_() for t in (logits_TE, x, *matrices)]
        weights, experts = router.route(leaves[0], top_k=2, normalize=True, scale=2.446)
        y = moe.moe_mlp(leaves[1], experts, weights, *leaves[2:])
        y.backward(dy)
        results.append([y.detach(), weights.detach(), *(leaf.grad for leaf in leaves)])
    return results


def test_operators_and_their_functions_are_one(
    moe: ModuleType, make_problem: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(63, 64, 64, 4, 2)
    first, second = run_every_way(moe, problem, monkeypatch, [(True, False), (False, False)])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("needs_grad", [True, False])
def test_dispatch_modes_see_operators(
    moe: ModuleType, make_problem: Callable, needs_grad: bool
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from epctl.kernels import router

    class Watch(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(function.name())
            return function(*args, **(kwargs or {}))

    x, experts, weights, *matrices, dy = make_problem(20, 64, 64, 4, 2)
    with Watch() as watch:
        logits = torch.zeros(20, 4, device=x.device, requires_grad=needs_grad)
        router.route(logits, top_k=2, normalize=True, scale=1.0)
        y = moe.moe_mlp(x.requires_grad_(needs_grad), experts, weights, *matrices)
        if needs_grad:
            y.backward(dy)
    seen = {name for name in watch.names if name.startswith("epctl::")}
    backward = {"epctl::moe_backward"} if needs_grad else set()
    assert seen == {"epctl::route", "epctl::moe_forward"} | backward


@gpu
@pytest.mark.parametrize("shape", [(512, 256, 320, 16, 2), (1000, 264, 200, 8, 2)], ids=_name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_way_to_start_kernels_is_one(
    moe: ModuleType,
    make_problem: Callable,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    problem = make_problem(*shape, dtype=dtype)
    # Twice by facts: the first time Triton starts the kernels.
    ways = [(False, False), (True, False), (False, True), (True, True), (True, True)]
    wanted, *others = run_every_way(moe, problem, monkeypatch, ways)
    for results in others:
        assert all(torch.equal(one, other) for one, other in zip(wanted, results, strict=True))


@gpu
@pytest.mark.parametrize("shape", LARGE, ids=_name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_moe_half(
    moe: ModuleType,
    make_problem: Callable,
    assert_matches: Callable,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    assert_matches(moe.moe_mlp, make_problem(*shape, dtype=dtype))


@gpu
@pytest.mark.parametrize("routing", ["half elsewhere", "all elsewhere"])
@pytest.mark.parametrize("shape", [(1000, 256, 320, 16, 4), (9000, 256, 192, 8, 2)], ids=_name)
def test_moe_half_of_held_rows(
    moe: ModuleType,
    make_problem: Callable,
    assert_matches: Callable,
    shape: tuple[int, ...],
    routing: str,
) -> None:
    problem = make_problem(*shape, dtype=torch.bfloat16, routing=routing)
    assert_matches(for_held_rows(moe), problem)


@gpu
@pytest.mark.parametrize("routing", ["half elsewhere", "all elsewhere", "one expert"])
@pytest.mark.parametrize("shape", [(1000, 256, 320, 16, 4), (9000, 256, 192, 8, 2)], ids=_name)
def test_moe_half_routing(
    moe: ModuleType,
    make_problem: Callable,
    assert_matches: Callable,
    shape: tuple[int, ...],
    routing: str,
) -> None:
    assert_matches(moe.moe_mlp, make_problem(*shape, dtype=torch.bfloat16, routing=routing))


@gpu
def test_moe_forward_is_deterministic(moe: ModuleType, make_problem: Callable) -> None:
    problem = make_problem(1000, 256, 320, 16, 4, torch.bfloat16)
    first, second = (moe.moe_mlp(*problem[:6]) for _ in range(2))
    assert torch.equal(first, second)


def test_moe_under_compile_and_checkpoint(
    moe: ModuleType, make_problem: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.checkpoint import checkpoint

    problem = make_problem(63, 64, 64, 4, 2)
    # The compiler cannot trace through the poisoned allocators.
    monkeypatch.undo()
    x, experts, weights, *matrices, dy = problem
    gradients = []
    for block in (
        moe.moe_mlp,
        torch.compile(moe.moe_mlp, fullgraph=True, backend="aot_eager"),
        lambda *arguments: checkpoint(moe.moe_mlp, *arguments, use_reentrant=False),
    ):
        leaf = x.clone().requires_grad_()
        block(leaf, experts, weights, *matrices).backward(dy)
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@gpu
def test_moe_beyond_int32_offsets(moe: ModuleType) -> None:
    """131,072 rows of 2 x 8,448 columns pass 2^31 elements; the last rows must be right."""
    generator = torch.Generator("cuda").manual_seed(42)
    tokens, hidden, intermediate = 131072, 64, 8448
    x_TD = torch.randn(tokens, hidden, generator=generator, device="cuda").bfloat16()
    w1, w3 = (
        torch.randn(2, intermediate, hidden, generator=generator, device="cuda").bfloat16() / 8
        for _ in range(2)
    )
    w2 = torch.randn(2, hidden, intermediate, generator=generator, device="cuda").bfloat16() / 64
    experts_TK = (torch.arange(tokens, device="cuda") % 2).unsqueeze(1)
    weights_TK = torch.ones(tokens, 1, device="cuda")
    leaf = x_TD.clone().requires_grad_()
    y_TD = moe.moe_mlp(leaf, experts_TK, weights_TK, w1, w3, w2)
    y_TD.sum().backward()
    tail = x_TD[-64:].float().requires_grad_()
    wanted = reference.moe_mlp(
        tail, experts_TK[-64:], weights_TK[-64:], w1.float(), w3.float(), w2.float()
    )
    wanted.sum().backward()
    assert (y_TD[-64:] - wanted).norm() <= 6e-3 * wanted.norm()
    assert (leaf.grad[-64:] - tail.grad).norm() <= 1e-2 * tail.grad.norm()
