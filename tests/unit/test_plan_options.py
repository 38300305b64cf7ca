"""The planner: what it offers is legal and fits, what it cannot offer it explains."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epctl.config import resolve_config
from epctl.errors import ConfigError, ResourceError
from epctl.kernels.newton_schulz_cost import choose_method, iteration_flops
from epctl.launch import planner
from epctl.launch.cost import newton_schulz_flops, step_cost
from epctl.launch.cost_rates import H100_EXPERTS, Rates, load_rates, remember
from epctl.launch.memory_shape import model_shape
from epctl.launch.plan_command import Asked, build_request, nothing_fits, parse_size
from epctl.launch.plan_view import train_line
from epctl.launch.planner import Answer, Request, make_request, plan
from epctl.launch.planner_change import smallest_changes
from epctl.launch.planner_rules import require_legal, why_illegal
from epctl.layout.catalog import catalog_source
from epctl.layout.detect import detect

MOONLIGHT = "moonshotai/Moonlight-16B-A3B"
MODELS = (MOONLIGHT, "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3", "Qwen/Qwen2.5-VL-7B-Instruct")


@functools.cache
def request_of(model: str, sequence_length: int = 4096) -> Request:
    source = catalog_source(model)
    assert source is not None
    layout = detect(source)
    flags = {"model.reference": model, "train.sequence_length": sequence_length}
    base = resolve_config(flags=flags).config
    shape = model_shape(layout, source.config, base.optim)
    return make_request(shape, layout, base, num_ranks=8, memory_bytes=80 * 2**30)


def answer(model: str, gpus: int, gibibytes: float, **changes: Any) -> tuple[Request, Answer]:
    request = dataclasses.replace(
        request_of(model),
        num_ranks=gpus,
        num_nodes=-(-gpus // 8),
        memory_bytes=gibibytes * 2**30,
        **changes,
    )
    return request, plan(request)


@given(
    st.sampled_from(MODELS),
    st.sampled_from((1, 2, 3, 4, 6, 8, 12, 16, 64, 100, 256)),
    st.sampled_from((24, 80, 141, 400)),
    st.sampled_from((None, 2**19, 2**20, 96 * 4096)),
)
@settings(max_examples=40, deadline=None)
def test_every_option_is_legal_fits_and_keeps_the_tokens(
    model: str, gpus: int, gibibytes: float, tokens: int | None
) -> None:
    request, found = answer(model, gpus, gibibytes, tokens_per_step=tokens)
    for option in found.options[:20]:
        require_legal(option.config, gpus, "cuda", request.limits)
        assert option.needed_bytes <= 0.95 * request.memory_bytes
        if tokens is not None:
            assert option.plan.tokens_per_step == tokens
    speeds = [round(option.speed, 1) for option in found.options]
    assert speeds == sorted(speeds, reverse=True)


@given(st.sampled_from(MODELS[:2]), st.sampled_from((1, 2, 4, 8, 16)), st.sampled_from((80, 141)))
@settings(max_examples=12, deadline=None)
def test_more_gpus_never_make_a_plan_impossible(model: str, gpus: int, gibibytes: float) -> None:
    on_device = {"optim.offload": False}
    _, few = answer(model, gpus, gibibytes, fixed=on_device)
    _, many = answer(model, 2 * gpus, gibibytes, fixed=on_device)
    assert few.best is None or many.best is not None
    assert few.leanest is not None
    assert many.leanest is not None
    assert many.leanest.needed_bytes <= few.leanest.needed_bytes + 2**20 + (
        2 * 1.2e9 if gpus == 1 else 0  # a second GPU brings gathers
    )


def test_fixed_settings_are_never_changed() -> None:
    fixed = {"parallel.ep": 2, "parallel.zero": 3, "train.activation_checkpointing": "full"}
    _, found = answer(MOONLIGHT, 8, 141, fixed=fixed)
    assert found.options
    for option in found.options:
        assert (option.plan.ep, option.plan.zero, option.plan.checkpointing) == (2, 3, "full")


def test_experts_alone_may_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = {"parallel.ep": 2, "parallel.zero": 2, "train.micro_batch_size": 1}
    request, found = answer(MOONLIGHT, 8, 141, fixed=fixed)
    by_name = {option.plan.recomputed: option for option in found.options}
    both = {"attention+experts", "moe", "full"}
    assert set(by_name) == {"none", "experts", "attention"} | both
    assert (next(iter(by_name)), next(reversed(by_name))) == ("none", "full")
    for less in ("none", "attention"):
        more = f"{less}+experts" if less != "none" else "experts"
        assert by_name[more].needed_bytes < by_name[less].needed_bytes
    line = train_line(request, by_name["attention+experts"], MOONLIGHT)
    assert "--set moe.recompute=activation" in line
    assert "moe.recompute" not in train_line(request, by_name["none"], MOONLIGHT)
    monkeypatch.setattr(planner, "LONG_SEQUENCE", 4096)
    _, long = answer(MOONLIGHT, 8, 141, fixed=fixed)
    assert {option.plan.recomputed for option in long.options} == {*by_name, "except_attention"}
    _, kept = answer(MOONLIGHT, 8, 141, fixed=fixed | {"moe.recompute": "none"})
    assert not any(option.plan.recomputes_experts for option in kept.options)


def test_illegal_sizes_are_left_out_with_the_reason() -> None:
    _, found = answer(MOONLIGHT, 12, 141)
    assert any("does not divide the 12 ranks" in reason for reason in found.rejected)
    assert {option.plan.ep for option in found.options} <= {1, 2, 4}
    request = request_of(MODELS[3])
    config = resolve_config(flags={"parallel.ep": 2}).config
    assert "without routed experts" in str(why_illegal(config, 8, "cuda", request.limits))


def test_nothing_fits_says_the_smallest_change() -> None:
    request, found = answer("deepseek-ai/DeepSeek-V3", 8, 80)
    assert found.best is None
    changes = smallest_changes(request, found)
    assert [change.factor for change in changes] == sorted(change.factor for change in changes)
    for change in changes:
        assert change.option.needed_bytes > 0
    error = nothing_fits(request, found)
    assert isinstance(error, ResourceError)
    assert "GiB a GPU" in (error.hint or "")
    assert "GPUs" in (error.hint or "")
    more = int(next(c.text for c in changes if c.text.endswith("GPUs")).split()[0])
    assert plan(dataclasses.replace(request, num_ranks=more, num_nodes=more // 8)).best is not None


def test_the_front_is_what_no_other_option_beats() -> None:
    _, found = answer(MOONLIGHT, 8, 141, tokens_per_step=2**20)
    front = found.front()
    for option in found.options:
        assert any(
            other.needed_bytes <= option.needed_bytes and other.speed >= option.speed
            for other in front
        )
    assert front[-1].speed == max(option.speed for option in found.options)


def test_offload_is_only_taken_where_nothing_fits_without() -> None:
    _, found = answer(MOONLIGHT, 1, 80)
    assert found.best is not None
    assert found.best.plan.offload
    _, roomy = answer(MOONLIGHT, 1, 400)
    assert roomy.best is not None
    assert not roomy.best.plan.offload
    _, bounded = answer(MOONLIGHT, 1, 80, host_bytes=64 * 2**30)
    assert bounded.best is None


def test_the_train_line_states_the_plan_and_parses() -> None:
    request, found = answer(MOONLIGHT, 8, 80, tokens_per_step=2**20)
    assert found.best is not None
    words = train_line(request, found.best, MOONLIGHT).split()
    run = found.best.plan
    assert words[words.index("--ep") + 1] == str(run.ep)
    settings_given = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    flags = {"parallel.ep": run.ep, "parallel.zero": run.zero}
    config = resolve_config(settings=settings_given, flags=flags).config
    assert config.train.micro_batch_size == run.micro_batch
    assert config.train.gradient_accumulation_steps == run.accumulation


def test_sizes_of_memory() -> None:
    assert parse_size("80GiB") == parse_size("80") == 80 * 2**30
    assert parse_size("141 GB") == 141e9
    for text in ("", "0", "many", "-3GiB"):
        with pytest.raises(ConfigError):
            parse_size(text)


def test_bad_requests_say_the_numbers() -> None:
    with pytest.raises(ConfigError, match="cannot be shared out over 3 nodes"):
        build_request(Asked(MOONLIGHT, 8, "80GiB", nodes=3))
    with pytest.raises(ConfigError, match="no whole number of sequences"):
        build_request(Asked(MOONLIGHT, 8, "80GiB", tokens_per_step=1000))
    with pytest.raises(ConfigError, match="1 to 16,384"):
        build_request(Asked(MOONLIGHT, 20_000, "80GiB"))


@pytest.mark.parametrize(
    "shape", [(1408, 2048), (2048, 1408), (2048, 2048), (64, 2048), (4096, 512)]
)
def test_newton_schulz_is_counted_as_the_kernels_count_it(shape: tuple[int, int]) -> None:
    method = choose_method(*shape).method
    assert newton_schulz_flops(*shape) == pytest.approx(iteration_flops(method, *shape))


def test_rates_come_from_bench_where_it_ran(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    assert load_rates(environment=environment).measured == []
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    document = json.loads((benchmarks / "moe_h100_202611_sweep.json").read_text())
    remember(document, environment)
    rates = load_rates(environment=environment)
    assert rates.measured == ["matmul", "experts"]
    assert rates.matmul == pytest.approx(document["matmul_tflops"] * 1e12)
    assert len(rates.experts) == 4
    muon = json.loads((benchmarks / "muon_h100_202611.json").read_text())
    remember(muon, environment)
    both = load_rates(environment=environment)
    assert both.measured == ["matmul", "experts", "newton_schulz"]
    assert both.matmul == rates.matmul
    assert both.newton_schulz == pytest.approx(Rates().newton_schulz, rel=0.01)  # the default's run
    assert both.sources["newton_schulz"].endswith("epctl bench muon, 64x1408x2048")
    on_cpu = tmp_path / "cpu.json"
    on_cpu.write_text(json.dumps({**document, "machine": {"device": "x86_64"}}))
    assert load_rates([on_cpu]) == Rates()
    on_cpu.write_text(json.dumps({**muon, "machine": {"device": "x86_64"}}))
    assert load_rates([on_cpu]) == Rates()
    on_cpu.write_text(json.dumps({**document, "machine": {"device": "x86_64"}}))
    remember(json.loads(on_cpu.read_text()), {"XDG_CACHE_HOME": str(tmp_path / "other")})
    assert not (tmp_path / "other").exists()


def test_expert_rate_between_measured_sizes() -> None:
    rates = Rates()
    assert rates.expert_flops(768) == H100_EXPERTS[2][1]
    assert H100_EXPERTS[1][1] < rates.expert_flops(400) < H100_EXPERTS[2][1]
    assert rates.expert_flops(1e9) == H100_EXPERTS[-1][1]


def test_recomputing_costs_a_forward_and_a_link_costs_its_bytes() -> None:
    request, found = answer(MOONLIGHT, 8, 400, tokens_per_step=2**20)
    run = next(o.plan for o in found.options if o.plan.checkpointing == "none" and o.plan.ep == 8)
    shape = request.shape
    none = step_cost(shape, run, Rates(), 8)
    full = step_cost(shape, dataclasses.replace(run, checkpointing="full"), Rates(), 8)
    # All but the last layer, and of each all products but the last.
    assert full.experts == pytest.approx((3 + 2 / 3 * 26 / 27) / 3 * none.experts)
    assert full.dispatch == pytest.approx((4 + 26 / 27) / 4 * none.dispatch)
    kept = step_cost(shape, dataclasses.replace(run, checkpointing="except_attention"), Rates(), 8)
    assert full.attention == pytest.approx((3.5 + 26 / 27) / 3.5 * none.attention)
    assert kept == dataclasses.replace(full, attention=none.attention)
    across = step_cost(shape, run, Rates(), 4)
    assert across.dispatch == pytest.approx(none.dispatch * Rates().nvlink / Rates().network)


def test_a_plan_is_quick_and_imports_no_torch() -> None:
    # Two seconds of a machine that does the loop in 0.19 s, the quickest of three tries: others
    # may share this one, and then processor time itself grows.
    code = (
        "import sys, time; started = time.process_time()\n"
        "sum(i * i for i in range(3_000_000)); loop = time.process_time() - started\n"
        "started = time.process_time()\n"
        "from epctl.launch.plan_command import *\n"
        "from epctl.output import Output, Mode\n"
        "request, layout, notes = build_request(Asked('deepseek-ai/DeepSeek-V3', 8, '80GiB'))\n"
        "from epctl.launch.plan_command import _show_sweep\n"
        "_show_sweep(request, Output(Mode.JSON), None)\n"
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)\n"
        "seconds = time.process_time() - started\n"
        "print(seconds * min(1, 0.19 / loop), file=sys.stderr)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    tries = []
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0, result.stderr
        sweep = json.loads(result.stdout)["sweep"]
        assert [row["gpus"] for row in sweep] == [2**k for k in range(15)]
        tries.append(float(result.stderr.split()[-1]))
    assert min(tries) < 2.0, tries
