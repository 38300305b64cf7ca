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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epctl.bench.machine import drop_caches, machine_facts
from epctl.bench.measure import peak_resident_bytes, reset_peak_resident, sample_interleaved, spread
from epctl.bench.registry import Result
from epctl.bench.synthetic import Shape, shape_for, write_checkpoint
from epctl.convert.command import write
from epctl.convert.jobs import ShardOptions, plan_folder, plan_reshard, plan_shard_folder
from epctl.convert.open import open_checkpoint, open_shards
from epctl.convert.verify import compare
from epctl.convert.writer import NUM_WORKERS, WRITEBACK_BYTES, start_writeback
from epctl.errors import ConfigError, GateError, ResourceError
from epctl.output import Mode, format_bytes, out

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

COPY_CHUNK = 4 * 2**20
MEMORY_ALLOWANCE = 256 * 2**20
SHARD_EP, RESHARD_EP = 8, 4
OPERATIONS = ("copy", "copy-parallel", "shard", "merge", "reshard")

Step = Callable[[], Any]


def measure(*, size_gb: float = 1.0, rounds: int = 3, folder: Path | None = None) -> Result:
    """Writes a synthetic checkpoint, gates the conversions and measures them.

    Args:
        size_gb: size of the synthetic checkpoint, in 10^9 bytes.
        rounds: measured rounds, after one that warms up and is the gate.
        folder: where to write; three times the size must be free there. Removed afterwards.

    Raises:
        ConfigError: a size or a count that cannot be measured.
        ResourceError: the disk is too small.
        GateError: a conversion is wrong.
    """
    if size_gb <= 0 or rounds < 1:
        raise ConfigError(f"`--size-gb {size_gb:g}` and `--rounds {rounds}` must be positive")
    with _work_folder(folder or Path.cwd(), size_gb) as work:
        return _measure(work, shape_for(int(size_gb * 1e9)), rounds)


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


def _measure(work: Path, shape: Shape, rounds: int) -> Result:
    model = work / "model"
    out.note(f"writing a synthetic checkpoint: {shape.num_layers} layers of 64 experts")
    num_bytes = write_checkpoint(model, shape)
    steps = _steps(work, model)
    facts = machine_facts(folder=work)
    out.note("gate: shard, merge, compare bit by bit, re-shard")
    gate = _gate(work, model, steps)
    peaks: dict[str, int] = {}
    caches = ""

    def before(name: str) -> None:
        nonlocal caches
        caches = _prepare(work, name)
        reset_peak_resident()

    def after(name: str, number: int, seconds: float) -> None:
        peaks[name] = max(peaks.get(name, 0), peak_resident_bytes())
        rate = num_bytes / seconds / 1e9
        out.note(f"round {number + 1} of {rounds}: {name} {rate:.2f} GB/s")

    samples = sample_interleaved(
        {name: _silent(steps[name]) for name in OPERATIONS},
        rounds=rounds,
        # What was written is in the way of a second call.
        lead_in=False,
        before=before,
        after=after,
    )
    return {
        "machine": facts | {"load_average_after": list(os.getloadavg())},
        "shape": shape._asdict(),
        "num_bytes": num_bytes,
        "caches": caches,
        "rounds": rounds,
        "ep": {"shard": SHARD_EP, "reshard": RESHARD_EP},
        "memory_bound_bytes": shape.fusion_unit_bytes + MEMORY_ALLOWANCE,
        "rows": [
            _row(name, samples, num_bytes)
            | {"peak_resident_mib": peaks[name] / 2**20, "gate": gate}
            for name in OPERATIONS
        ],
    }


def _row(name: str, samples: dict[str, list[float]], num_bytes: int) -> dict[str, Any]:
    def ratios(copy: str) -> dict[str, float]:
        # Each round's own ratio: the disk's rate drifts more between rounds than within one.
        pairs = zip(samples[copy], samples[name], strict=True)
        return _spread([theirs / mine for theirs, mine in pairs])

    return {
        "operation": name,
        "seconds": _spread(samples[name]),
        "gb_per_s": _spread([num_bytes / second / 1e9 for second in samples[name]]),
        "of_copy": ratios("copy"),
        "of_copy_parallel": ratios("copy-parallel"),
    }


def _spread(samples: Sequence[float]) -> dict[str, float]:
    return spread(samples)._asdict()


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
    return drop_caches(work)


def _gate(work: Path, model: Path, steps: dict[str, Step]) -> dict[str, float]:
    """Raises GateError unless the conversions are right; warms up what they import.

    Returns what was found wrong, which is nothing: the tensors that differ, the digests too many.
    """
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
    return {"differing_tensors": 0, "further_digests": 0}


def _silent(step: Step) -> Step:
    def run() -> Any:
        with _silence():
            return step()

    return run


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the conversions' own lines out of the benchmark's."""
    mode = out.mode
    out.mode = Mode.QUIET
    try:
        yield
    finally:
        out.mode = mode


def table(result: Result) -> Table:
    """Returns the rows for a terminal: medians, with the lowest and highest round."""
    from rich.table import Table

    machine = result["machine"]
    load = machine["load_average"][0]
    rows = Table(
        title=f"convert, {result['num_bytes'] / 1e9:.2f} GB, {machine['num_cpus']} CPUs at load "
        f"{load:g}, caches {result['caches']}",
        title_justify="left",
        caption=f"memory bound {format_bytes(result['memory_bound_bytes'])}: one projection of one "
        "layer's experts + 256 MiB",
        caption_justify="left",
    )
    titles = ("GB/s", "lowest", "highest", "of copy", "of parallel copy", "peak resident")
    for title in ("operation", *titles):
        rows.add_column(title, justify="left" if title == "operation" else "right")
    for row in result["rows"]:
        rate = row["gb_per_s"]
        rows.add_row(
            row["operation"],
            *(f"{rate[key]:.3f}" for key in ("median", "low", "high")),
            f"{row['of_copy']['median']:.2f}",
            f"{row['of_copy_parallel']['median']:.2f}",
            f"{row['peak_resident_mib']:.0f} MiB",
        )
    return rows


def draw(result: Result, figure: Figure) -> None:
    """Draws GB/s of each operation, with the range over rounds."""
    names = [row["operation"] for row in result["rows"]]
    rates = [row["gb_per_s"] for row in result["rows"]]
    medians = [rate["median"] for rate in rates]
    errors = [
        [rate["median"] - rate["low"] for rate in rates],
        [rate["high"] - rate["median"] for rate in rates],
    ]
    figure.set_size_inches(7, 4)
    axes = figure.subplots()
    axes.bar(names, medians, yerr=errors, capsize=4)
    axes.axhline(0.8 * medians[0], linestyle="--", color="grey", label="0.8 of the copy")
    axes.set(ylabel="GB/s", title=f"{result['num_bytes'] / 1e9:.2f} GB, Moonlight layout")
    axes.legend()
