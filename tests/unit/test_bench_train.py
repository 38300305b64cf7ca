"""`epctl bench train` without ranks: models by name, FLOPs, cases, rows, routing tables."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epctl.bench import train, train_view
from epctl.bench.compare import compare_results
from epctl.bench.train_cases import (
    FIXED,
    SIZES,
    Case,
    Visit,
    make_cases,
    parse_peers,
    parse_routings,
    parse_stages,
    plan_visits,
    rank_counts,
)
from epctl.bench.train_flops import flops_per_token, vendor_flops
from epctl.bench.train_gate import (
    BFLOAT16_TOLERANCE,
    Rows,
    _bfloat16_rows,
    bfloat16_rate,
    num_unlearnt,
)
from epctl.bench.train_model import open_bench_model
from epctl.bench.train_ranks import _told
from epctl.bench.train_routing import even_table
from epctl.bench.train_rows import Measured, make_rows
from epctl.config import OptimSection
from epctl.errors import ConfigError, HubError
from epctl.output import set_mode
from epctl.runtime.build import meta_model
from epctl.runtime.native_config import native_config
from epctl.runtime.weights import DeviceWeights

MOONLIGHT = "moonshotai/Moonlight-16B-A3B"


# Models


def test_moonlight_is_cut_to_nine_layers_without_a_network() -> None:
    whole = open_bench_model(MOONLIGHT)
    assert whole.shape(OptimSection()).num_parameters == 15_960_108_544
    cut = whole.cut(9)
    shape = cut.shape(OptimSection())
    assert (shape.num_layers, shape.num_moe_layers) == (9, 8)
    live = meta_model(native_config(cut.values), torch.bfloat16)
    assert shape.num_parameters == sum(p.numel() for p in live.parameters()) == 5_432_846_848


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", "mistralai/Mixtral-8x7B-v0.1"])
def test_other_families_are_cut_as_transformers_builds_them(name: str) -> None:
    cut = open_bench_model(name).cut(2)
    live = meta_model(native_config(cut.values), torch.bfloat16)
    assert cut.shape(OptimSection()).num_parameters == sum(p.numel() for p in live.parameters())


@pytest.mark.parametrize("layers", [0, 1, 28])
def test_a_depth_without_experts_or_beyond_the_model_is_refused(layers: int) -> None:
    with pytest.raises(ConfigError, match=f"--layers {layers}.* 27 layers, the first 1 without"):
        open_bench_model(MOONLIGHT).cut(layers)


def test_a_name_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="neither in the cache nor in the catalog"):
        open_bench_model("nobody/nothing-7B")


def test_device_weights_depend_on_seed_and_name_alone() -> None:
    def made(seed: int, name: str) -> torch.Tensor:
        values = torch.zeros(4, 6, 5)[1:3, :, :3]  # a slice, as an expert's is
        DeviceWeights(seed).read_into(name, values)
        return values.clone()

    assert torch.equal(made(0, "a.weight"), made(0, "a.weight"))
    assert not torch.equal(made(0, "a.weight"), made(0, "b.weight"))
    assert not torch.equal(made(0, "a.weight"), made(1, "a.weight"))
    scale = torch.zeros(7)
    DeviceWeights(0).read_into("norm.weight", scale)
    assert torch.equal(scale, torch.ones(7))


# FLOPs


def test_flops_are_those_that_torch_counts() -> None:
    """Its counter sees the whole square of attention; the formula counts the causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    model = open_bench_model("tiny")
    config = native_config(model.values)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_config(config)
    rows, length = 2, 32
    ids = torch.randint(0, 256, (rows, length))
    with FlopCounterMode(display=False) as counter:
        live(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    shape = model.shape(OptimSection())
    attention = shape.attention
    assert attention is not None
    widths = attention.qk_head_dim + attention.v_head_dim
    other_half = 3 * shape.num_layers * attention.num_heads * widths * length
    counted = counter.get_total_flops() / (rows * length)
    assert flops_per_token(shape, length) + other_half == pytest.approx(counted, rel=5e-3)


def test_longer_sequences_cost_attention_only() -> None:
    shape = open_bench_model(MOONLIGHT).shape(OptimSection())
    short, long = flops_per_token(shape, 4096), flops_per_token(shape, 8192)
    assert long - short == 3 * 27 * 16 * (192 + 128) * 4096
    assert short == pytest.approx(17.1e9, rel=0.05)  # active parameters by six, and attention


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H200", 989.5), ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756)],
)
def test_the_data_sheets_rate_is_found_by_name(name: str, tflops: float) -> None:
    assert vendor_flops(name) == tflops * 1e12
    assert vendor_flops("a card of tomorrow") is None


# Routing


@given(st.integers(1, 200), st.integers(2, 64), st.data())
def test_an_even_table_is_even_and_repeats_no_expert(
    num_tokens: int, num_experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, min(8, num_experts)))
    table_TK = even_table(num_tokens, top_k, num_experts)
    assert table_TK.shape == (num_tokens, top_k)
    assert all(len(set(row)) == top_k for row in table_TK.tolist())
    counts_E = torch.bincount(table_TK.flatten(), minlength=num_experts)
    assert counts_E.max() - counts_E.min() <= 1


# Cases


def cases(**changes: Any) -> list[Case]:
    given: dict[str, Any] = {
        "counts": [2], "ep": None, "stages": [2, 3], "optimizers": ["muon", "adamw"],
        "sizes": SIZES["cpu"], **changes,
    }  # fmt: skip
    return make_cases(open_bench_model("tiny"), "cpu", **given)


def test_cases_are_stages_times_optimizers_and_ep_follows_the_ranks() -> None:
    found = cases(counts=[1, 2])
    assert [(c.num_ranks, c.ep, c.zero, c.optim) for c in found] == [
        (n, n, z, o) for n, z, o in itertools.product((1, 2), (2, 3), ("muon", "adamw"))
    ]
    config = found[0].config
    assert (config.optim.weight_decay, config.train.sequence_length) == (0.0, 64)
    assert found[0].gate_config.train.precision == "float32"


def test_a_setting_that_bench_decides_is_refused_and_others_are_taken() -> None:
    config = cases(settings=["optim.momentum_dtype=bfloat16"])[0].config
    assert config.optim.momentum_dtype == "bfloat16"
    assert cases(settings=["train.precision=bfloat16"])[0].bfloat16
    for key in (*FIXED, "parallel.zero", "train.micro_batch_size"):
        value = "constant" if key == "optim.schedule" else "1"
        with pytest.raises(ConfigError, match=r"a flag of it decides that|boolean"):
            cases(settings=[f"{key}={value}"])


def test_rounds_go_through_all_cases_and_implementations() -> None:
    found = cases(stages=[3])
    order = [(v.number, v.implementation) for v in plan_visits(found, ["deepspeed"], 2)]
    assert order == [(n, i) for n in (0, 1) for _ in found for i in ("epctl", "deepspeed")]


def test_wrong_requests_are_refused() -> None:
    assert rank_counts(6, scaling=True) == [1, 2, 4, 6]
    assert rank_counts(8, scaling=False) == [8]
    with pytest.raises(ConfigError, match="stages are 0 to 3"):
        parse_stages("2,4")
    with pytest.raises(ConfigError, match="known: deepspeed, transformers"):
        parse_peers(["megatron"])
    with pytest.raises(ConfigError, match="known: natural, balanced"):
        parse_routings(["zipf"])
    with pytest.raises(ConfigError, match="optimizer 'sgd' is unknown"):
        cases(optimizers=["sgd"])
    with pytest.raises(ConfigError, match="does not divide the 6 ranks"):
        cases(counts=[6], ep=4)
    for ep in (0, 4):
        with pytest.raises(ConfigError, match=f"expert parallel size {ep} on 2 ranks"):
            cases(counts=[2], ep=ep)
    with pytest.raises(ConfigError, match="at least one token"):
        train.measure(device="cpu", steps=0)
    with pytest.raises(ConfigError, match="0 ranks"):
        train.measure(device="cpu", ranks=0)


# Rows


def visit(case: Case, name: str, number: int, **changes: Any) -> dict[str, Any]:
    slower = 1.0 if name == "epctl" else 2.0
    return {
        "case": case.key,
        "implementation": name,
        "number": number,
        "note": "n",
        "build_seconds": 1.0,
        "seconds": {"natural": [0.5 * slower], "balanced": [0.4 * slower]},
        "processor_seconds": {"natural": [0.5 * slower], "balanced": [0.4 * slower]},
        "losses": {"natural": [5.0, 4.9], "balanced": [4.9, 4.8]},
        "optimizer_seconds": [0.1 * slower, 0.3 * slower, 0.2 * slower],
        "first_norm": 1.0,
        "peaks": {"natural": slower * 2**30, "balanced": slower * 2**30},
        "imbalance": {"natural": 3.0, "balanced": 1.0},
        "breakdown": {"optimizer": 1.0, "compute": 2.0, "idle": 1.0} if number == 0 else None,
        "left_over": 0,
        **changes,
    }


def measured(found: list[Case], **of_peer: Any) -> Measured:
    result = Measured()
    for case in found:
        errors = {"loss": 1e-8, "norm": 1e-7, "weights": 1e-7}
        result.gates[case.key] = {"case": case.key, "errors": errors, "worst": "w", "ok": True}
        for number in (0, 1):
            result.take_visit(visit(case, "epctl", number))
            result.take_visit(visit(case, "deepspeed", number, **of_peer))
    return result


def rows_of(found: list[Case], result: Measured) -> list[dict[str, Any]]:
    model = open_bench_model("tiny")
    return make_rows(model, "cpu", found, ["deepspeed"], result, 0.2, 989e12)


def test_rows_state_rates_memory_and_the_ratio_in_the_same_run() -> None:
    found = cases(stages=[3], optimizers=["muon"])
    own, balanced, peer, _ = rows_of(found, measured(found))
    assert own["tokens_per_second"]["median"] == 2 * 64 / 0.5
    assert own["mfu"] == pytest.approx(own["tflops"] / 0.2)
    assert own["speed_over_deepspeed"] == 2.0
    assert own["memory_over_deepspeed"] == 0.5
    assert own["memory_error"] == pytest.approx(own["predicted_gib"] / 1.0 - 1)
    assert own["breakdown_ms"]["compute"] == 2.0
    assert own["optimizer_seconds"]["median"] == pytest.approx(0.2)
    assert peer["optimizer_seconds"]["median"] == pytest.approx(0.4)
    assert "breakdown_ms" not in balanced
    assert "optimizer_seconds" not in balanced
    assert "speed_over_deepspeed" not in peer
    assert all("gate" in row for row in (own, balanced, peer))


@pytest.mark.parametrize("change", [{"losses": {"natural": [5.001]}}, {"first_norm": 1.01}])
def test_a_peer_that_computes_something_else_has_no_number(change: dict[str, Any]) -> None:
    found = cases(stages=[3], optimizers=["adamw"])
    result = measured(found, **change)
    assert {row["implementation"] for row in rows_of(found, result)} == {"epctl"}
    assert result.absent[f"deepspeed at {found[0].key}"].startswith("gate red: a ")


def test_two_muons_may_differ_after_their_first_update() -> None:
    found = cases(stages=[3], optimizers=["muon"])
    losses = {"natural": [5.0, 3.0], "balanced": [3.0]}
    rows = rows_of(found, measured(found, losses=losses, first_norm=7.0))
    assert {row["implementation"] for row in rows} == {"epctl", "deepspeed"}


def test_a_failed_engine_is_a_row_with_its_numbers() -> None:
    found = cases(stages=[3], optimizers=["muon"])
    result = measured(found)
    reason = "out of memory: Tried to allocate 20.00 GiB"
    result.failures[found[0].key, "epctl"] = (reason, 3 * 2**30)
    row, *others = rows_of(found, result)
    assert row["failed"][0] == reason
    assert row["failed"][1] == "3.00 GiB at its peak"
    assert row["failed"][2].endswith(" predicted")
    assert others == []
    assert "no losses here" in result.absent[f"deepspeed at {found[0].key}"]


def test_what_the_time_did_not_reach_is_said() -> None:
    found = cases(stages=[3], optimizers=["muon"])
    result = measured(found)
    result.visits = {key: v for key, v in result.visits.items() if key.implementation == "epctl"}
    assert len(rows_of(found, result)) == 2
    assert "the time was over" in result.absent[f"deepspeed at {found[0].key}"]


def test_scaling_is_over_the_fewest_ranks() -> None:
    found = cases(counts=[1, 2], stages=[3], optimizers=["muon"])
    result = measured(found)
    key = Visit(found[1].key, "epctl", 0)
    result.visits[key]["seconds"]["natural"] = [1.0]
    result.visits[key._replace(number=1)]["seconds"]["natural"] = [1.0]
    own = [r for r in rows_of(found, result) if r["implementation"] == "epctl"]
    assert [r["scaling"] for r in own if r["routing"] == "natural"] == [1.0, 0.5]


def without_parts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "breakdown_ms"} for row in rows]


def test_the_document_is_shown_drawn_and_compared(tmp_path: Any) -> None:
    from matplotlib.figure import Figure
    from rich.console import Console

    found = cases()
    result = measured(found)
    result.failures[found[1].key, "deepspeed"] = ("out of memory: too much", None)
    document = {
        "benchmark": "train", "machine": {"device": "cpu", "date": "today"}, "model": "m",
        "layers": 4, "micro_batch": 2, "sequence_length": 64, "recompute": "none", "rounds": 2,
        "precision": "float32", "matmul_tflops": 0.2, "vendor_tflops": 989.0,
        "flops_formula": "f", "memory": "resident", "speed_of": "wall clock",
        "rows": rows_of(found, result),
    }  # fmt: skip
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(train_view.table(document))
    text = console.export_text()
    assert "ZeRO-2, adamw: deepspeed failed: out of memory: too much" in text
    assert "where a step goes" in text
    for rows, num_panels in ((document["rows"], 3), (without_parts(document["rows"]), 2)):
        figure = Figure()
        train_view.draw(document | {"rows": rows}, figure)
        assert len(figure.axes) == num_panels
    changes = compare_results(document, document)
    assert {change.metric for change in changes} >= {"tokens_per_second", "mfu", "peak_gib"}
    assert all(change.within_spread for change in changes)


# Steps in bfloat16


def loss_rows(expected: list[float], losses: list[float]) -> Rows:
    rows = _bfloat16_rows(expected, losses, {"everything": 1.0})
    return [row for row in rows if row[0].startswith("bfloat16 loss")]


def test_a_learnt_batch_is_compared_over_the_first_loss() -> None:
    whole = [12.0, 9.0, 6.1, 5.9, 6.5, 0.04]
    assert num_unlearnt(whole) == 3
    assert num_unlearnt(whole[:3]) == 3
    assert num_unlearnt([]) == 0
    rows = loss_rows(whole, [12.0, 9.009, 6.0, 5.91, 6.5, 0.06])
    errors = [0.0, 1e-3, 0.1 / 6.1, 0.01 / 12, 0.0, 0.02 / 12]
    assert [row[1] for row in rows] == pytest.approx(errors)
    assert rows[1][0] == "bfloat16 loss, step 2 (9.0090, of the whole model 9.0000)"
    assert rows[5][0] == "bfloat16 loss, step 6 over the first (0.0600, of the whole model 0.0400)"


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 12.0])
def test_no_step_is_left_out(wrong: float) -> None:
    whole = [12.0, 5.0, 0.1]
    for step in range(3):
        losses = [wrong if number == step else loss for number, loss in enumerate(whole)]
        is_red = [not row[1] <= BFLOAT16_TOLERANCE for row in loss_rows(whole, losses)]
        assert is_red == [number == step and losses[step] != whole[step] for number in range(3)]


def test_few_steps_go_fast_enough_to_show_an_update() -> None:
    """At the slow rates AdamW's second loss moved by 1.1e-3 on an H200, at the others by 2.5 %."""
    for optim in ("muon", "adamw"):
        fast, slow = bfloat16_rate(optim, 2, 2048), bfloat16_rate(optim, 20, 2048)
        assert slow <= fast / 5
        assert bfloat16_rate(optim, 20, 64) == fast


def test_the_table_says_how_close_bfloat16_came() -> None:
    row = {"gate": {"bfloat16_loss": 4.7e-4, "bfloat16_direction": 1.8e-4}}
    losses = {"whole": [12.0, 6.5, 5.5], "epctl": [12.0, 6.5, 5.5], "unlearnt": 2}
    said = train_view._gates({"rows": [row, {"gate": {}}], "bfloat16_losses": {"a": losses}})
    assert "3 steps in bfloat16, largest difference of a loss 4.7e-04" in said
    assert "of the gradient's cosine from one 1.8e-04" in said
    assert train_view._gates({"rows": [{"gate": {"loss": 0.0}}], "bfloat16_losses": {}}) == ""


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        ([12.0, 6.5, 6.1], ""),
        ([12.0, 6.5, 5.5], "from step 3 in bfloat16 on differences are over the first loss"),
        ([12.0, 11.95], "the loss moved by 0.4% in 2 steps in bfloat16, too little"),
        ([], ""),
    ],
)
def test_steps_that_show_little_are_told(
    capsys: pytest.CaptureFixture[str], whole: list[float], said: str
) -> None:
    set_mode()
    losses = {"whole": whole, "epctl": whole, "unlearnt": num_unlearnt(whole)}
    train._warn_of_few({"case": "a case", "bfloat16_losses": losses})
    text = " ".join(capsys.readouterr().err.split())
    assert said in text
    assert bool(text) == bool(said)


def test_a_red_gate_tells_its_losses() -> None:
    losses = {"whole": [12.0, 6.5], "epctl": [12.0, float("nan")], "unlearnt": 2}
    assert _told(losses) == "losses of steps in bfloat16: whole 12.0000 6.5000; epctl 12.0000 nan"
    assert _told({"whole": [], "epctl": [], "unlearnt": 0}).endswith("none taken")
