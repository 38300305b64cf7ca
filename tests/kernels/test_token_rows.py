"""Rows taken from tokens and added to them: the same numbers as indexing, and each way back."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from epctl.kernels import TokenRows, add_rows, number_rows, take_rows

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
RUNS_TRITON = INTERPRETING or torch.cuda.is_available()
# tokens, places, columns
# The interpreter cuts bf16 off where a GPU rounds.
HALVES = [torch.float16] if INTERPRETING else [torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 8), (37, 2, 40), (50, 4, 6), (64, 8, 2056)]


@pytest.fixture(autouse=True, params=["triton"] if INTERPRETING else ["reference", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "triton" and not RUNS_TRITON:
        pytest.skip("needs a CUDA GPU, or TRITON_INTERPRET=1 (test_interpreter.py)")
    monkeypatch.setenv("EPCTL_KERNELS", request.param)


def goes(tokens: int, places: int, device: torch.device) -> Tensor:
    """Returns which token goes where, most to several places and some to none."""
    generator = torch.Generator().manual_seed(7)
    return (torch.rand(tokens, places, generator=generator) < 0.6).to(device)


def tables_of(goes_TP: Tensor) -> TokenRows:
    return number_rows(goes_TP, int(goes_TP.sum()))[0]


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return values.to(device, dtype).requires_grad_()


@pytest.mark.parametrize(("tokens", "places"), [(0, 3), (1, 1), (37, 4), (300, 8)])
def test_rows_are_numbered_place_by_place(tokens: int, places: int, device: torch.device) -> None:
    goes_TP = goes(tokens, places, device)
    place_S, token_S = goes_TP.t().nonzero(as_tuple=True)
    tables, found_S = number_rows(goes_TP, len(token_S))
    assert tables.token_S.tolist() == token_S.tolist()
    assert found_S.tolist() == place_S.tolist()
    row_of_TP = torch.full((tokens, places), -1)
    row_of_TP[token_S.cpu(), place_S.cpu()] = torch.arange(len(token_S))
    assert tables.row_of_TP.tolist() == row_of_TP.tolist()
    assert {t.dtype for t in (*tables, found_S)} == {torch.int32}


@pytest.mark.parametrize(("tokens", "places", "columns"), SHAPES)
def test_float32_is_what_indexing_gives_bit_for_bit(
    tokens: int, places: int, columns: int, device: torch.device
) -> None:
    tables = tables_of(goes(tokens, places, device))
    token_S = tables.token_S.long()
    x_TD = normal(tokens, columns, device=device)
    rows_SD = normal(len(token_S), columns, device=device)
    taken_SD, added_TD = take_rows(x_TD, tables), add_rows(rows_SD, tables)
    # On the CPU adding by index goes row by row, which is the order of places.
    summed_TD = torch.zeros(tokens, columns).index_add(0, token_S.cpu(), rows_SD.detach().cpu())
    assert torch.equal(taken_SD, x_TD[token_S])
    assert torch.equal(added_TD.cpu(), summed_TD)
    taken_SD.backward(rows_SD.detach())
    added_TD.backward(x_TD.detach())
    assert x_TD.grad is not None
    assert rows_SD.grad is not None
    assert torch.equal(x_TD.grad.cpu(), summed_TD)
    assert torch.equal(rows_SD.grad, x_TD[token_S])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_are_added_in_float32_and_rounded_once(
    device: torch.device, dtype: torch.dtype
) -> None:
    tables = tables_of(goes(64, 8, device))
    rows_SD = normal(len(tables.token_S), 72, device=device, dtype=dtype)
    wanted = add_rows(rows_SD.float(), tables).to(dtype)
    assert torch.equal(add_rows(rows_SD, tables), wanted)


def test_a_token_without_rows_is_zero_whatever_the_others_hold(device: torch.device) -> None:
    goes_TP = goes(37, 4, device)
    goes_TP[5] = False
    tables = tables_of(goes_TP)
    rows_SD = torch.full((len(tables.token_S), 16), float("nan"), device=device)
    added_TD = add_rows(rows_SD, tables)
    assert torch.equal(added_TD[5].cpu(), torch.zeros(16))
    assert bool(added_TD[goes_TP.any(dim=1)].isnan().all())


@pytest.mark.parametrize(("tokens", "places"), [(0, 3), (5, 3)])
def test_nothing_goes_anywhere(tokens: int, places: int, device: torch.device) -> None:
    tables = tables_of(torch.zeros(tokens, places, dtype=torch.bool, device=device))
    x_TD = normal(tokens, 16, device=device)
    added_TD = add_rows(take_rows(x_TD, tables), tables)
    added_TD.sum().backward()
    assert x_TD.grad is not None
    assert torch.equal(added_TD, torch.zeros_like(x_TD))
    assert torch.equal(x_TD.grad, torch.zeros_like(x_TD))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_host_waits_for_nothing(device: torch.device) -> None:
    goes_TP = goes(300, 8, device)
    num_rows = int(goes_TP.sum())
    x_TD = normal(300, 64, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tables, _ = number_rows(goes_TP, num_rows)
        add_rows(take_rows(x_TD, tables), tables).backward(x_TD.detach())
    finally:
        torch.cuda.set_sync_debug_mode("default")
