"""`epctl bench convert`: shard, merge and re-shard beside the disk's own copy rate.

The gate comes first: what was sharded and merged again must equal the source bit by bit, and
sharding, merging and re-sharding must agree on the digest of the whole. Then rounds: a plain
sequential copy and each conversion in turn, in this process, every one from a cold cache to bytes
that are synced. Two copies are the yardstick: one file after another as `dd` would, and as many
files at a time as a conversion has in flight, which is nearer to what the disk can do.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epctl.bench import host
from epctl.bench.synthetic import Shape, shape_for, write_checkpoint
from epctl.convert.command import write
from epctl.convert.jobs import ShardOptions, plan_folder, plan_reshard, plan_shard_folder
from epctl.convert.open import open_checkpoint, open_shards
from epctl.convert.verify import compare
from epctl.convert.writer import NUM_WORKERS, WRITEBACK_BYTES, start_writeback
from epctl.errors import ConfigError, GateError, ResourceError
from epctl.output import Mode, format_bytes, out

if TYPE_CHECKING:
    from rich.table import Table

COPY_CHUNK = 4 * 2**20
MEMORY_ALLOWANCE = 256 * 2**20
SHARD_EP, RESHARD_EP = 8, 4
OPERATIONS = ("copy", "copy-parallel", "shard", "merge", "reshard")

Step = Callable[[], Any]


def run_convert(
    *,
    size_gb: float = 1.0,
    rounds: int = 3,
    folder: Path | None = None,
    json_path: Path | None = None,
    png_path: Path | None = None,
) -> dict[str, Any]:
    """Measures, shows the result and returns it as a JSON-ready dict.

    Args:
        size_gb: size of the synthetic checkpoint, in 10^9 bytes.
        rounds: measured rounds, after one that warms up and is the gate.
        folder: where to write; three times the size must be free there. Removed afterwards.

    Raises:
        ConfigError: a size or a count that cannot be measured.
        ResourceError: the disk is too small.
        GateError: a conversion is wrong; no number is shown then.
    """
    if size_gb <= 0 or rounds < 1:
        raise ConfigError(f"`--size-gb {size_gb:g}` and `--rounds {rounds}` must be positive")
    with _work_folder(folder or Path.cwd(), size_gb) as work:
        result = _measure(work, shape_for(int(size_gb * 1e9)), rounds)
    out.data(convert_table(result))
    out.document(result)
    if json_path is not None:
        from epctl.bench.report import write_json

        write_json(result, json_path)
    if png_path is not None:
        write_convert_png(result, png_path)
    return result


@contextmanager
def _work_folder(parent: Path, size_gb: float) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    needed, free = int(3.1e9 * size_gb), shutil.disk_usage(parent).free
    if free < needed:
        raise ResourceError(
            f"measuring a checkpoint of {size_gb:g} GB needs {format_bytes(needed)} in `{parent}`, "
            f"{format_bytes(free)} are free",
            hint="choose a smaller `--size-gb`, or another `--folder`",
        )
    work = parent / f"epctl-bench-convert-{os.getpid()}"
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _measure(work: Path, shape: Shape, rounds: int) -> dict[str, Any]:
    model = work / "model"
    out.note(f"writing a synthetic checkpoint: {shape.num_layers} layers of 64 experts")
    num_bytes = write_checkpoint(model, shape)
    steps = _steps(work, model)
    facts = host.host_facts(work)
    out.note("gate: shard, merge, compare bit by bit, re-shard")
    _gate(work, model, steps)
    samples: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    peaks: dict[str, int] = {}
    caches = ""
    for number in range(rounds):
        for name in OPERATIONS:
            caches = _prepare(work, name)
            host.reset_peak_resident()
            with _silence():
                start = time.perf_counter()
                steps[name]()
                samples[name].append(time.perf_counter() - start)
            peaks[name] = max(peaks.get(name, 0), host.peak_resident_bytes())
            rate = num_bytes / samples[name][-1] / 1e9
            out.note(f"round {number + 1} of {rounds}: {name} {rate:.2f} GB/s")
    return {
        "benchmark": "convert",
        "machine": facts | {"load_average_after": list(os.getloadavg())},
        "shape": shape._asdict(),
        "num_bytes": num_bytes,
        "caches": caches,
        "rounds": rounds,
        "ep": {"shard": SHARD_EP, "reshard": RESHARD_EP},
        "memory_bound_bytes": shape.fusion_unit_bytes + MEMORY_ALLOWANCE,
        "rows": [_row(name, samples, peaks, num_bytes) for name in OPERATIONS],
    }


def _row(
    name: str, samples: dict[str, list[float]], peaks: dict[str, int], num_bytes: int
) -> dict[str, Any]:
    # Each round's own ratio: the disk's rate drifts more between rounds than within one.
    ratios = {
        copy: [theirs / mine for theirs, mine in zip(samples[copy], samples[name], strict=True)]
        for copy in ("copy", "copy-parallel")
    }
    return {
        "operation": name,
        "seconds": host.spread(samples[name]),
        "gb_per_s": host.spread([num_bytes / second / 1e9 for second in samples[name]]),
        "of_copy": host.spread(ratios["copy"]),
        "of_copy_parallel": host.spread(ratios["copy-parallel"]),
        "peak_resident_mib": peaks[name] / 2**20,
    }


def _steps(work: Path, model: Path) -> dict[str, Step]:
    def shard() -> Any:
        view = open_checkpoint(str(model))
        return write("shard", view, plan_shard_folder(view, ShardOptions(SHARD_EP)), work / "shard")

    def merge() -> Any:
        view = open_shards(str(work / "shard"))
        return write("merge", view, plan_folder(view, "origin", "keep"), work / "merge")

    def reshard() -> Any:
        view = open_shards(str(work / "shard"))
        return write("reshard", view, plan_reshard(view, RESHARD_EP), work / "reshard")

    return {
        "copy": lambda: copy_folder(model, work / "copy"),
        "copy-parallel": lambda: copy_parallel(model, work / "copy-parallel"),
        "shard": shard,
        "merge": merge,
        "reshard": reshard,
    }


def copy_folder(source: Path, target: Path) -> None:
    """Copies a folder's files one after another, as `dd` with a sync at the end of each would."""
    target.mkdir()
    buffer = memoryview(bytearray(COPY_CHUNK))
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as read, (target / path.name).open("wb", 0) as written:
            while count := read.readinto(buffer):
                written.write(buffer[:count])
            os.fsync(written.fileno())


def copy_parallel(source: Path, target: Path) -> None:
    """Copies several files at a time, their writeback begun early: what this disk can do."""
    target.mkdir()
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        list(pool.map(lambda path: _copy_file(path, target / path.name), sorted(source.iterdir())))


def _copy_file(source: Path, target: Path) -> None:
    buffer = memoryview(bytearray(COPY_CHUNK))
    written = flushed = 0
    with source.open("rb", buffering=0) as read, target.open("wb", buffering=0) as write_to:
        while count := read.readinto(buffer):
            written += write_to.write(buffer[:count])
            if written - flushed >= WRITEBACK_BYTES:
                start_writeback(write_to.fileno(), flushed, written - flushed)
                flushed = written
        os.fsync(write_to.fileno())


def _prepare(work: Path, name: str) -> str:
    """Removes what would be written and earlier outputs; returns the state of the caches."""
    # Merging and re-sharding read what `shard` wrote; everything else may go.
    for other in OPERATIONS:
        if other == name or other != "shard":
            shutil.rmtree(work / other, ignore_errors=True)
    return host.drop_caches(work)


def _gate(work: Path, model: Path, steps: dict[str, Step]) -> None:
    """Raises GateError unless the conversions are right; warms up what they import."""
    with _silence():
        digests = {}
        for name in ("shard", "merge", "reshard"):
            _prepare(work, name)
            digests[name] = steps[name]()[0]["digest"]
            if name == "merge":
                one, other = open_checkpoint(str(model)), open_checkpoint(str(work / name))
                verdict = compare(one, other, None, lambda _: None)
                if verdict.differences:
                    raise GateError(f"merged is not the source: {verdict.differences[0].text}")
    if len(set(digests.values())) != 1:
        raise GateError(f"digests of the whole disagree: {digests}")


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the conversions' own lines out of the benchmark's."""
    mode = out.mode
    out.mode = Mode.QUIET
    try:
        yield
    finally:
        out.mode = mode


def convert_table(result: dict[str, Any]) -> Table:
    """Returns the rows for a terminal: medians, with the lowest and highest round."""
    from rich.table import Table

    machine = result["machine"]
    load = machine["load_average"][0]
    table = Table(
        title=f"convert, {result['num_bytes'] / 1e9:.2f} GB, {machine['num_cpus']} CPUs at load "
        f"{load:g}, caches {result['caches']}",
        title_justify="left",
        caption=f"memory bound {format_bytes(result['memory_bound_bytes'])}: one projection of one "
        "layer's experts + 256 MiB",
        caption_justify="left",
    )
    titles = ("GB/s", "lowest", "highest", "of copy", "of parallel copy", "peak resident")
    for title in ("operation", *titles):
        table.add_column(title, justify="left" if title == "operation" else "right")
    for row in result["rows"]:
        rate = row["gb_per_s"]
        table.add_row(
            row["operation"],
            *(f"{rate[key]:.3f}" for key in ("median", "low", "high")),
            f"{row['of_copy']['median']:.2f}",
            f"{row['of_copy_parallel']['median']:.2f}",
            f"{row['peak_resident_mib']:.0f} MiB",
        )
    return table


def write_convert_png(result: dict[str, Any], path: Path) -> None:
    """Draws GB/s of each operation, with the range over rounds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = [row["operation"] for row in result["rows"]]
    rates = [row["gb_per_s"] for row in result["rows"]]
    medians = [rate["median"] for rate in rates]
    errors = [
        [rate["median"] - rate["low"] for rate in rates],
        [rate["high"] - rate["median"] for rate in rates],
    ]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.bar(names, medians, yerr=errors, capsize=4)
    axes.axhline(0.8 * medians[0], linestyle="--", color="grey", label="0.8 of the copy")
    axes.set(ylabel="GB/s", title=f"{result['num_bytes'] / 1e9:.2f} GB, Moonlight layout")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
