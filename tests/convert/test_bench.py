"""`epctl bench convert` and `compare`: gate, document, table, picture, litter."""

import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from epctl.bench import compare, convert, measure, synthetic
from epctl.bench.command import run_case
from epctl.bench.registry import CASES
from epctl.convert.open import open_checkpoint
from epctl.errors import GateError, InputError, ResourceError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    files = [folder / "out/result.json", folder / "out/result.png"]
    process = subprocess.run(
        [
            sys.executable, "-m", "epctl", "bench", "convert", "--size-gb", "0.03", "--rounds", "2",
            "--folder", str(folder), "--json-file", str(files[0]), "--png", str(files[1]), "--json",
        ],
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return folder, files, json.loads(process.stdout)


def test_the_document_has_rates_memory_and_machine(result):
    folder, files, document = result
    assert json.loads(files[0].read_text()) == document
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert [row["operation"] for row in document["rows"]] == list(convert.OPERATIONS)
    for row in document["rows"]:
        rate = row["gb_per_s"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert row["peak_resident_mib"] * 2**20 < document["memory_bound_bytes"]
    assert document["rows"][0]["of_copy"]["median"] == 1
    assert document["machine"]["load_average"]
    assert "dropped" in document["caches"]
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_two_results_are_compared_row_by_row(result, tmp_path):
    _, files, document = result
    for row in document["rows"]:
        row["peak_resident_mib"] *= 2
    (tmp_path / "b.json").write_text(json.dumps(document))
    process = subprocess.run(
        [sys.executable, "-m", "epctl", "bench", "compare", str(files[0]),
         str(tmp_path / "b.json"), "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    changes = json.loads(process.stdout)["changes"]
    memory = [change for change in changes if change["metric"] == "peak_resident_mib"]
    assert [change["ratio"] for change in memory] == [2] * len(convert.OPERATIONS)
    assert not any(change["within_spread"] for change in memory)
    assert all(c["within_spread"] for c in changes if c["metric"] == "gb_per_s")


def test_results_that_cannot_be_compared_are_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(InputError, match="no benchmark's result"):
        compare.read_result(tmp_path / "x.json")
    one, other = {"benchmark": "a", "rows": []}, {"benchmark": "b", "rows": []}
    with pytest.raises(InputError, match="different benchmarks"):
        compare.compare_results(one, other)
    with pytest.raises(InputError, match="no row in common"):
        compare.compare_results(one, one)


def test_results_of_every_case_can_be_compared(result):
    """The stored H100 document was written before convert was a case of the same harness."""
    moe = compare.read_result(ROOT / "benchmarks/moe_h100_202611_moonlight.json")
    changes = compare.compare_results(moe, moe)
    assert {"forward_ms", "both_ms", "peak_mib"} <= {change.metric for change in changes}
    assert {change.ratio for change in changes} == {1}
    _, files, _ = result
    with pytest.raises(InputError, match="different benchmarks: `moe` and `convert`"):
        compare.compare_results(moe, compare.read_result(files[0]))


def test_another_machine_is_named():
    one, other = {"machine": {"device": "A"}}, {"machine": {"device": "B"}}
    assert compare.machine_differences(one, other) == ["other device: A and B"]


def test_another_size_is_named():
    one, other = (
        {"num_bytes": 1, "rows": [1], "rate": 1.0},
        {"num_bytes": 2, "rows": [], "rate": 2.0},
    )
    assert compare.setting_differences(one, other) == ["other num_bytes: 1 and 2"]


def test_a_wrong_conversion_prints_no_number(tmp_path, monkeypatch, capsys):
    def damaged(*arguments, **options):
        manifest, seconds = write(*arguments, **options)
        return manifest | {"digest": str(arguments[0])}, seconds

    write = convert.write
    monkeypatch.setattr(convert, "write", damaged)
    with pytest.raises(GateError, match="digests of the whole disagree"):
        run_case("convert", size_gb=0.02, rounds=1, folder=tmp_path)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_first(tmp_path):
    with pytest.raises(ResourceError, match="measuring a checkpoint of 1e"):
        run_case("convert", size_gb=1e6, folder=tmp_path)


def test_the_synthetic_checkpoint_is_moonlights_layout(tmp_path):
    shape = synthetic.shape_for(20_000_000)
    written = synthetic.write_checkpoint(tmp_path / "m", shape)
    view = open_checkpoint(str(tmp_path / "m"))
    assert view.moe.num_experts == 64
    assert view.warnings == ()
    assert sum(tensor.num_bytes for tensor in view.tensors.values()) == written
    assert synthetic.shape_for(8_000_000_000).num_layers == 7
    assert synthetic.shape_for(8_000_000_000).expert_width == 1408


def test_peak_memory_is_reset_between_measurements():
    if not measure.reset_peak_resident():
        pytest.skip("/proc/self/clear_refs cannot be written here")
    # A bytearray may be cut from memory that the heap kept, and goes back there when it is freed.
    ballast = mmap.mmap(-1, 64 * 2**20)
    ballast[:] = b"x" * len(ballast)
    high = measure.peak_resident_bytes()
    ballast.close()
    assert measure.reset_peak_resident()
    assert measure.peak_resident_bytes() < high - 32 * 2**20


def test_a_spread_is_the_middle_four_fifths_and_the_whole_range_of_few():
    assert measure.spread([3, 1, 2]) == (2, 1, 3)
    assert measure.spread(list(range(11))) == (5, 1, 9)


def test_rounds_are_interleaved_and_every_call_is_where_it_should_be():
    calls = []
    samples = measure.sample_interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        warm_up=1,
        rounds=2,
        clock=lambda run: float(run() is None),
        before=lambda name: calls.append(f"before {name}"),
        after=lambda name, number, seconds: calls.append(f"after {name} {number}"),
    )
    assert samples == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert calls == [
        "a", "b",
        "before a", "a", "a", "after a 0", "before b", "b", "b", "after b 0",
        "before a", "a", "a", "after a 1", "before b", "b", "b", "after b 1",
    ]  # fmt: skip


def test_every_case_is_listed_has_a_command_and_all_parts():
    process = subprocess.run(
        [sys.executable, "-m", "epctl", "bench", "list", "--json"], capture_output=True, text=True
    )
    assert [case["name"] for case in json.loads(process.stdout)["cases"]] == list(CASES)
    from epctl.cli_bench import bench_app

    assert {command.name for command in bench_app.registered_commands} >= CASES.keys()
    for case in CASES.values():
        module = case.load()
        assert all(callable(getattr(module, part)) for part in ("measure", "table", "draw"))


def test_measuring_files_does_not_load_torch():
    program = (
        "import sys, epctl.bench.command, epctl.bench.compare, epctl.bench.convert, "
        "epctl.bench.measure, epctl.bench.machine\n"
        "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules), 'heavy'"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
