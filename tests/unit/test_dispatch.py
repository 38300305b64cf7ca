"""Which ranks a token is sent to, and how many bytes that saves; no process group needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from host_reads import READING_METHODS, HostReads
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from epctl.errors import ResourceError
from epctl.kernels.row_messages import choices_by_rank
from epctl.runtime import dispatch
from epctl.runtime.dispatch import RowSplits
from epctl.runtime.recompute import OPTIONS, recomputing

# Moonlight: rows of 2048 bfloat16, top-6 of 64; a row's metadata is 6 int32 ids, 6 float32 weights.
HIDDEN_BYTES, TOP_K, NUM_EXPERTS = 2048 * 2, 6, 64
METADATA_BYTES = TOP_K * (4 + 4)


def test_choices_are_counted_by_rank() -> None:
    experts = torch.tensor([[0, 1, 5], [4, 5, 6], [-1, 2, -1], [-1, -1, -1]])
    expected = [[2, 0, 1, 0], [0, 0, 2, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert choices_by_rank(experts, 2, 4).tolist() == expected


def test_no_tokens_need_nobody() -> None:
    assert choices_by_rank(torch.zeros(0, 3, dtype=torch.int64), 2, 4).shape == (0, 4)


@pytest.mark.parametrize(("ep", "bound", "expected_share"), [(4, 0.58, 0.558), (8, 0.78, 0.756)])
def test_bytes_against_one_row_an_expert(ep: int, bound: float, expected_share: float) -> None:
    """Random routing; dispatch with metadata and the way back, the reference without metadata."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(20_000, NUM_EXPERTS, generator=generator)
    experts = scores.topk(TOP_K).indices
    num_rows = int((choices_by_rank(experts, NUM_EXPERTS // ep, ep) > 0).sum())
    assert num_rows / experts.numel() == pytest.approx(expected_share, abs=0.003)
    moved = num_rows * (2 * HIDDEN_BYTES + METADATA_BYTES) + 2 * 2 * 8 * ep * ep  # and the counts
    assert moved / (experts.numel() * 2 * HIDDEN_BYTES) <= bound


def test_more_rows_than_allowed_are_refused_before_they_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    splits = RowSplits([1, 2], [300, 200], group=None)  # type: ignore[arg-type]
    dispatch._require_room(splits, 500, 64)
    dispatch._require_room(splits, None, 64)
    with pytest.raises(ResourceError, match=r"500 rows .* rank 3.* is 499 "):
        dispatch._require_room(splits, 499, 64)


@pytest.fixture
def host_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What makes the host wait, by the method of a tensor that does so."""
    read: list[str] = []
    for name in READING_METHODS:
        own = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda *a, name=name, own=own: read.append(name) or own(*a)
        )
    return read


def inputs(num_tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, router weights and experts."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, 16, generator=generator, requires_grad=True)
    weights_TK = torch.rand(num_tokens, 3, generator=generator, requires_grad=True)
    return x_TD, weights_TK, torch.rand(num_tokens, 8, generator=generator).topk(3).indices


def layer(group: dist.ProcessGroup, events: list[str]) -> Callable[..., Tensor]:
    """There and back; experts scale rows, and note when they do."""

    def run(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        events.append("again" if recomputing() else "forward")
        sent = dispatch.dispatch(
            x_TD.tanh(), experts_TK, weights_TK, 8, group, meanwhile=lambda: events.append("shared")
        )
        y_RD = sent.x_RD.sin() * sent.weights_RK.sum(dim=1, keepdim=True)
        return dispatch.combine(y_RD, sent)

    return run


def test_the_host_waits_once_a_layer(alone: dist.ProcessGroup, host_reads: list[str]) -> None:
    """For the counts, which say how much memory to take; forward, the way back and backward."""
    x_TD, weights_TK, experts_TK = inputs()
    with HostReads() as reads:
        layer(alone, [])(x_TD, weights_TK, experts_TK).backward(torch.ones(9, 16))
    assert [*host_reads, *reads.found] == ["tolist"]
    assert x_TD.grad is not None
    assert weights_TK.grad is not None


def test_a_recomputed_layer_does_not_wait_again(
    alone: dist.ProcessGroup, host_reads: list[str]
) -> None:
    expected = inputs()
    layer(alone, [])(*expected).square().sum().backward()
    events: list[str] = []
    found = inputs()
    checkpoint(layer(alone, events), *found, **OPTIONS).square().sum().backward()
    assert host_reads == ["tolist"] * 2  # one a forward
    assert events == ["forward", "shared", "again", "shared"]
    for one, other in zip(expected[:2], found[:2], strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("bound", [0, 2**28])
def test_rows_made_before_the_host_knows_how_many(
    alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    """In room for all there can be, unless that is too much; some tokens go nowhere."""
    x_TD, weights_TK, experts_TK = inputs()
    experts_TK[2:5] = -1
    monkeypatch.setattr(dispatch, "AHEAD_BYTES", bound)
    rooms: list[int] = []
    write = dispatch.write_messages
    monkeypatch.setattr(
        dispatch,
        "write_messages",
        lambda *a: rooms.append(a[-1]) or write(*a),  # type: ignore[func-returns-value]
    )
    sent = dispatch.dispatch(x_TD, experts_TK, weights_TK, 8, alone)
    assert rooms == [9 if bound else 6]
    kept = [0, 1, 5, 6, 7, 8]
    assert torch.equal(sent.x_RD, x_TD[kept])
    assert torch.equal(sent.experts_RK, experts_TK[kept].int())
    assert torch.equal(sent.weights_RK, weights_TK[kept])
    (sent.x_RD.sum() + sent.weights_RK.sum()).backward()
    goes = (experts_TK >= 0).any(dim=1, keepdim=True).float()
    assert torch.equal(x_TD.grad, goes.expand(9, 16))  # type: ignore[arg-type]
    assert torch.equal(weights_TK.grad, goes.expand(9, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("as_many", [False, True])
def test_a_router_that_chooses_otherwise_in_recomputation_is_told(
    alone: dist.ProcessGroup, as_many: bool
) -> None:
    def other(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        if recomputing() and as_many:
            experts_TK = experts_TK.roll(1, dims=0)
        elif recomputing():
            experts_TK = experts_TK.masked_fill(experts_TK == experts_TK[0, 0], -1)
        return layer(alone, [])(x_TD, weights_TK, experts_TK)

    y_TD = checkpoint(other, *inputs(), **OPTIONS)
    with pytest.raises(RuntimeError, match="chose other experts"):
        y_TD.sum().backward()


@pytest.fixture
def travels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every exchange, as what is sent leaves and as what comes is waited for."""
    events: list[str] = []

    class Waited:
        def __init__(self, what: str, work: dist.Work) -> None:
            self.what, self.work = what, work

        def wait(self) -> None:
            events.append(f"{self.what} there")
            self.work.wait()

    def start(rows: Tensor, splits: RowSplits) -> tuple[Tensor, Waited]:
        what = "rows" if rows.shape[1] == 16 else "choices"
        events.append(f"{what} leave")
        received, work = own(rows, splits)
        return received, Waited(what, work)

    own = dispatch._start
    monkeypatch.setattr(dispatch, "_start", start)
    return events


def test_tokens_leave_first_and_gradients_travel_under_the_recomputation(
    alone: dist.ProcessGroup, travels: list[str]
) -> None:
    y_TD = checkpoint(layer(alone, travels), *inputs(), **OPTIONS)
    there = ["rows leave", "choices leave", "shared", "choices there", "rows there"]
    results = ["rows leave", "rows there"]
    assert travels == ["forward", *there, *results]
    travels.clear()
    y_TD.sum().backward()
    gradients = ["rows leave", "choices leave", "choices there", "rows there"]
    assert travels == ["rows leave", "again", *there, "rows there", *gradients]


def test_tokens_that_want_no_gradient(alone: dist.ProcessGroup) -> None:
    """The first layer of a model whose embedding is frozen: no way back, weights go on learning."""
    x_TD, weights_TK, experts_TK = inputs()
    y_TD = checkpoint(layer(alone, []), x_TD.detach(), weights_TK, experts_TK, **OPTIONS)
    y_TD.sum().backward()
    expected = inputs()
    layer(alone, [])(*expected).sum().backward()
    assert weights_TK.grad is not None
    assert torch.equal(weights_TK.grad, expected[1].grad)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("ahead", [0, 2**28])
def test_on_a_gpu_as_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, host_reads: list[str], ahead: int
) -> None:
    """NCCL, pinned counts, rows ahead of them, and a recomputation; some tokens go nowhere."""
    monkeypatch.setattr(dispatch, "AHEAD_BYTES", ahead)
    expected = inputs(num_tokens=700)
    expected[2][2:5] = -1
    x_TD, weights_TK = (t.detach().cuda().requires_grad_() for t in expected[:2])
    experts_TK = expected[2].cuda()
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        run = layer(dist.group.WORLD, [])
        run(x_TD, weights_TK, experts_TK)  # libraries set themselves up
        host_reads.clear()
        torch.cuda.set_sync_debug_mode("error")  # but for events, nobody waits for the device
        y_TD = checkpoint(run, x_TD, weights_TK, experts_TK, **OPTIONS)
        y_TD.square().sum().backward()
        torch.cuda.set_sync_debug_mode("default")
        found = [y_TD.detach().cpu(), x_TD.grad, weights_TK.grad]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
    assert host_reads[0] == "tolist"
    assert "tolist" not in host_reads[1:]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        reference = layer(dist.group.WORLD, [])(*expected)
    finally:
        dist.destroy_process_group()
    reference.square().sum().backward()
    for one, other in zip(
        found, (reference.detach(), expected[0].grad, expected[1].grad), strict=True
    ):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)
