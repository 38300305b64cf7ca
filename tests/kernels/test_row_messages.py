"""Rows, their tables and messages against plain loops: dropped choices, empty places, no tokens."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from epctl.kernels.row_messages import count_choices, write_messages

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
RUNS_TRITON = INTERPRETING or torch.cuda.is_available()
# tokens, top_k, places, experts of a place
SHAPES = [(1, 1, 1, 4), (37, 3, 2, 5), (200, 6, 4, 2), (65, 2, 9, 1), (0, 2, 3, 4)]
ROUTINGS = ["random", "dropped", "one place", "nowhere"]


@pytest.fixture(autouse=True, params=["triton"] if INTERPRETING else ["reference", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "triton" and not RUNS_TRITON:
        pytest.skip("needs a CUDA GPU, or TRITON_INTERPRET=1 (test_interpreter.py)")
    monkeypatch.setenv("EPCTL_KERNELS", request.param)


def problem(tokens: int, top_k: int, num_experts: int, routing: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(tokens, num_experts, generator=generator)
    if routing == "one place":
        scores[:, : num_experts // 2] = -1.0
    experts_TK = scores.argsort(dim=1, descending=True)[:, :top_k].clone()
    if routing in ("dropped", "nowhere"):
        least = 0.3 if routing == "dropped" else 2.0
        experts_TK[torch.rand(experts_TK.shape, generator=generator) < least] = -1
    return experts_TK, torch.rand(experts_TK.shape, generator=generator)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "top_k", "places", "local"), SHAPES)
def test_rows_and_messages(
    tokens: int, top_k: int, places: int, local: int, routing: str, device: torch.device
) -> None:
    if top_k > places * local:
        pytest.skip("fewer experts than choices")
    experts_TK, weights_TK = problem(tokens, top_k, places * local, routing)
    rows = [
        (place, token)
        for place in range(places)
        for token in range(tokens)
        if any(e >= 0 and e // local == place for e in experts_TK[token].tolist())
    ]
    choices = count_choices(experts_TK.to(device), local, places)
    held = [
        [e for e in experts_TK.flatten().tolist() if e >= 0 and e // local == p]
        for p in range(places)
    ]
    expected = [[sum(place == p for place, _ in rows), len(held[p])] for p in range(places)]
    assert choices.sent_P2.tolist() == expected
    assert choices.sent_P2.dtype == torch.int64

    inputs = experts_TK.to(device), weights_TK.to(device)
    tables, message_SC = write_messages(*inputs, choices, local, len(rows))
    assert tables.token_S.tolist() == [token for _, token in rows]
    row_of_TP = torch.full((tokens, places), -1)
    for number, (place, token) in enumerate(rows):
        row_of_TP[token, place] = number
        ids = [
            e - place * local if e >= 0 and e // local == place else -1
            for e in experts_TK[token].tolist()
        ]
        assert message_SC[number, :top_k].tolist() == ids
    assert tables.row_of_TP.tolist() == row_of_TP.tolist()
    sent_SK = message_SC[:, top_k:].contiguous().view(torch.float32).cpu()
    assert torch.equal(sent_SK, weights_TK[[token for _, token in rows]])
    assert {t.dtype for t in (*tables, message_SC)} == {torch.int32}

    spare = 7 if tokens else 0
    roomy, longer_SC = write_messages(*inputs, choices, local, len(rows) + spare)
    assert torch.equal(roomy.token_S[: len(rows)], tables.token_S)
    assert roomy.token_S[len(rows) :].tolist() == [0] * spare
    assert torch.equal(roomy.row_of_TP, tables.row_of_TP)
    assert torch.equal(longer_SC[: len(rows)], message_SC)


@pytest.mark.skipif(not RUNS_TRITON, reason="the reference has no blocks")
def test_blocks_grow_with_the_tokens(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """A program reads what every block counted, so there may not be too many."""
    from epctl.kernels import row_messages_triton

    monkeypatch.setattr(row_messages_triton, "MOST_BLOCKS", 2)
    test_rows_and_messages(200, 6, 4, 2, "random", device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_many_tokens_agree_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    experts_TK, weights_TK = (t.cuda() for t in problem(100_003, 6, 64, "dropped"))
    results = []
    for name in ("reference", "triton"):
        monkeypatch.setenv("EPCTL_KERNELS", name)
        choices = count_choices(experts_TK, 8, 8)
        num_rows = int(choices.sent_P2[:, 0].sum())
        tables, message_SC = write_messages(experts_TK, weights_TK, choices, 8, num_rows)
        results.append((choices.sent_P2, *tables, message_SC))
    for reference, triton in zip(*results, strict=True):
        assert torch.equal(reference, triton)
