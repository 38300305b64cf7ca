"""`epctl bench muon`: orthogonalisation by shape, or all a rank owns of a model, beside peers.

The gate compares one matrix of full rank and one of rank 64 with the float64 value of the same
polynomial, made from their singular values. Shape suffixes: see kernels/newton_schulz.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from epctl.bench.device import MEBIBYTE, choose_device, clock_of, gpu_name, matmul_rate
from epctl.bench.machine import machine_facts
from epctl.bench.measure import sample_interleaved, spread
from epctl.bench.muon_own import Implementation, implementations, seconds_until_ready
from epctl.bench.muon_peers import PEERS, forget_compiled
from epctl.bench.muon_products import product_rows
from epctl.bench.muon_shapes import MatrixBatch, matrices_of_rank, parse_shapes
from epctl.bench.registry import Result
from epctl.bench.report import cell
from epctl.errors import ConfigError, GateError
from epctl.kernels.newton_schulz import coefficient_table, iteration_dtype
from epctl.kernels.newton_schulz_cost import iteration_flops
from epctl.kernels.newton_schulz_graph import shared_bytes
from epctl.output import out

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

# Of issue and reference: the update's relative error against the same polynomial in float64.
FULL_RANK_BAR, RANK_64_BAR, LARGEST_SINGULAR_VALUE = 5e-3, 0.1, 1.25
POOR_RANK = 64
# bfloat16 iterations of others round the polynomial itself; beyond this an update is another one.
PEER_BAR = 0.3
SMALL = "epctl bench muon --shape 4x176x256"
GPU_SHAPES = ("64x1408x2048", "64x2048x1408")
CPU_SHAPES = ("4x176x256", "4x256x176")

COLUMNS = (
    ("matrices", "batch"),
    ("of", "implementation"),
    ("ms", "ms"),
    ("TFLOP/s", "tflops"),
    ("of floor", "of_floor"),
    ("error", "error_full_rank"),
    ("of product", "error"),
    ("rank 64", "error_rank_64"),
    ("sigma max", "sigma_max"),
    ("peak MiB", "peak_mib"),
)


def measure(
    *,
    shapes: Sequence[str] | None = None,
    model: str | None = None,
    ep: int = 8,
    peers: Sequence[str] | None = None,
    products: bool = False,
    step: bool = False,
    device: str | None = None,
    warm_up: int = 3,
    rounds: int = 15,
) -> Result:
    """Measures batches of matrices, or all that one rank of a model owns.

    Args:
        shapes: `BATCHxROWSxCOLUMNS` each; None takes Moonlight's experts, small ones on a CPU.
        model: a hub id or folder; its matrices at expert parallel size `ep` replace `shapes`.
        peers: names of `PEERS`; None is all that run here, () is none.
        products: also measure each kind of product alone, on a GPU with every candidate tile.
        step: also measure the whole optimizer step over the matrices, and its workspace.
        device: `cuda` or `cpu`; None takes the GPU when there is one.

    Raises:
        ConfigError: a malformed shape, an unknown peer, or a count below one.
        ResourceError: no GPU where one is needed.
        GateError: epctl's own result is off the polynomial.
    """
    _check_asked(peers, rounds)
    batches = matrices_of_rank(model, ep) if model else parse_shapes(shapes or _default_shapes())
    chosen = choose_device(device, max(_flops(b, "torch") for b in batches), small=SMALL)
    dtype = iteration_dtype(chosen)
    result: Result = {
        "machine": machine_facts(gpu_name(chosen)),
        "matmul_tflops": matmul_rate(chosen, dtype) / 1e12,
        "model": model,
        "ep": ep if model else None,
        "rounds": rounds,
        "rows": [],
        "absent": {},
    }
    repeats = (warm_up, rounds)
    if chosen.type == "cuda":
        try:
            result["kernels_ready_s"] = seconds_until_ready(batches, chosen)
        except Exception as error:  # no default needs them yet
            result["absent"]["epctl's Triton kernels"] = f"{type(error).__name__}: {error}"[:200]
    names = list(PEERS if peers is None else peers)
    for batch in batches:
        _measure_batch(result, batch, chosen, names, repeats)
    if model:
        result["totals"] = _totals(result)
    if products:
        _add_products(result, batches, chosen, repeats)
    if step:
        _add_step(result, batches, chosen, repeats)
    return result


def _check_asked(peers: Sequence[str] | None, rounds: int) -> None:
    unknown = [name for name in peers or () if name not in PEERS]
    if unknown:
        raise ConfigError(f"peer {unknown[0]!r} is unknown; known: {', '.join(PEERS)}")
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}; it must be at least 1")


def _add_products(
    result: Result,
    batches: Sequence[MatrixBatch],
    device: torch.device,
    repeats: tuple[int, int],
) -> None:
    for batch in _of_each_size(batches):
        out.note(f"{batch.label}: products")
        rows, absent = product_rows(batch, device, result["matmul_tflops"], repeats)
        result["rows"] += rows
        result["absent"] |= absent


def _add_step(
    result: Result,
    batches: Sequence[MatrixBatch],
    device: torch.device,
    repeats: tuple[int, int],
) -> None:
    from epctl.bench.muon_step_case import step_rows  # DeepSpeed: seconds to import

    out.note("whole optimizer step")
    rows, absent = step_rows(batches, device, result["ep"], result["matmul_tflops"], repeats)
    result["rows"] += rows
    result["absent"] |= absent


def _of_each_size(batches: Sequence[MatrixBatch]) -> list[MatrixBatch]:
    """Returns the batches without those whose products have another's sizes and strides."""
    return list({(b.num_measured, b.num_rows, b.num_columns): b for b in batches}.values())


def _default_shapes() -> Sequence[str]:
    return GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES


def _measure_batch(
    result: Result,
    batch: MatrixBatch,
    device: torch.device,
    peers: Sequence[str],
    repeats: tuple[int, int],
) -> None:
    out.note(f"{batch.label}: gate, then {repeats[1]} rounds")
    forget_compiled()
    found, absent = implementations(device, peers)
    result["absent"] |= absent
    green: dict[str, dict[str, float]] = {}
    for item in found:
        try:
            green[item.name] = gate(item, batch, device)
        except Exception as error:  # a peer or candidate fails in its own way; the run goes on
            if not item.candidate:
                raise
            red = isinstance(error, GateError)
            result["absent"][item.name] = (
                f"gate red: {error}" if red else f"{type(error).__name__}: {error}"[:200]
            )
    x_BMN = torch.randn(
        batch.num_measured, batch.num_rows, batch.num_columns, device=device,
        generator=torch.Generator(device).manual_seed(0),
    )  # fmt: skip
    if device.type == "cuda":
        x_BMN = x_BMN.bfloat16()  # what peers take: their time has no conversion in it
    passed = {item.name: item for item in found if item.name in green}
    runs = {name: functools.partial(item.run, x_BMN) for name, item in passed.items()}
    samples = sample_interleaved(
        runs, warm_up=repeats[0], rounds=repeats[1], clock=clock_of(device)
    )
    for name, item in passed.items():
        row = {**batch.facts(), "implementation": name, "gate": green[name], **green[name]}
        row["ms"] = spread([1e3 * seconds for seconds in samples[name]])._asdict()
        row |= _rates(row, batch, result["matmul_tflops"])
        if device.type == "cuda":
            row["peak_mib"] = _peak(item, x_BMN)
        result["rows"].append(row)


def gate(item: Implementation, batch: MatrixBatch, device: torch.device) -> dict[str, float]:
    """Returns the errors of one implementation at one shape.

    Raises GateError beyond the bars; NaN is beyond every bar.
    """
    shape = (batch.num_rows, batch.num_columns)
    full, poor = full_rank_matrix(shape, device), rank_poor_matrix(shape, device)
    full_error, sigma = _error(item, full)
    poor_error, poor_sigma = _error(item, poor)
    found = {
        "error_full_rank": full_error,
        "error_rank_64": poor_error,
        "sigma_max": max(sigma, poor_sigma),
    }
    bars = (
        (FULL_RANK_BAR, RANK_64_BAR, LARGEST_SINGULAR_VALUE)
        if item.own
        else (PEER_BAR, float("inf"), float("inf"))
    )
    for (name, value), bar in zip(found.items(), bars, strict=True):
        if not value <= bar:
            where = f"{item.name} at {batch.label}"
            raise GateError(f"{where}: {name} is {value:.2e}, {bar:.2e} allowed")
    return found


def _error(item: Implementation, x_MN: Tensor) -> tuple[float, float]:
    expected = polynomial_in_float64(x_MN, item.coefficients)
    found = item.run(x_MN[None])[0].double()
    if not torch.isfinite(found).all():
        return float("nan"), float("nan")
    error = float((found - expected).norm() / expected.norm())
    return error, float(torch.linalg.matrix_norm(found, 2))


def polynomial_in_float64(x_MN: Tensor, coefficients: str, num_steps: int = 5) -> Tensor:
    """Returns the exact value of the iteration: the polynomial on the singular values."""
    x_MN = x_MN.double()
    left, values, right = torch.linalg.svd(x_MN / x_MN.norm(), full_matrices=False)
    for a, b, c in coefficient_table(coefficients, num_steps):
        values = a * values + b * values**3 + c * values**5
    exact_MN: Tensor = (left * values) @ right
    return exact_MN


def full_rank_matrix(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Returns a matrix whose singular values fall evenly from 1 to 0.1 (in their logarithm)."""
    generator = torch.Generator(device).manual_seed(1)
    short = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(side, short, device=device, generator=generator)).Q
        for side in shape
    )
    matrix_MN: Tensor = (left * torch.logspace(0, -1, short, device=device)) @ right.T
    return matrix_MN


def rank_poor_matrix(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Returns a matrix of rank 64, or of half the shorter side if that is less."""
    generator = torch.Generator(device).manual_seed(2)
    rank = min(POOR_RANK, max(1, min(shape) // 2))
    left, right = (torch.randn(side, rank, device=device, generator=generator) for side in shape)
    return left @ right.T


def _flops(batch: MatrixBatch, products: Any) -> float:
    """Returns the fewest FLOPs of the measured matrices over both iterations."""
    shape = (batch.num_rows, batch.num_columns)
    methods: tuple[Any, ...] = ("standard", "gram")
    fewest = min(iteration_flops(m, *shape, products=products) for m in methods)
    return batch.num_measured * fewest


def _rates(row: dict[str, Any], batch: MatrixBatch, matmul_tflops: float) -> dict[str, float]:
    """TFLOP/s of the plain iteration; the floor is its symmetric form at the matmul rate."""
    seconds = row["ms"]["median"] / 1e3
    floor = _flops(batch, "symmetric") / (matmul_tflops * 1e12)
    return {
        "tflops": _flops(batch, "torch") / seconds / 1e12,
        "floor_ms": 1e3 * floor,
        "of_floor": floor / seconds,
    }


def _peak(item: Implementation, x_BMN: Tensor) -> float:
    """Returns MiB beside the input; what a graph holds between calls is in it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    item.run(x_BMN)
    torch.cuda.synchronize()
    held = shared_bytes() if item.uses_graphs else 0
    return (torch.cuda.max_memory_allocated() - before + held) / MEBIBYTE


def _totals(result: Result) -> dict[str, float]:
    """Returns the ms of everything a rank owns, for what was measured at every shape."""
    labels = {row["batch"] for row in result["rows"]}
    totals: dict[str, float] = {}
    for name in {row["implementation"] for row in result["rows"]}:
        rows = [row for row in result["rows"] if row["implementation"] == name]
        if {row["batch"] for row in rows} == labels:
            totals[name] = sum(
                row["ms"]["median"] / row["num_measured"] * row["num_owned"] for row in rows
            )
    return totals


def table(result: Result) -> Table:
    """Returns the rows, the fastest of a batch first, and the totals of a model."""
    from rich.table import Table

    shown = Table(
        title=f"orthogonalisation on {result['machine']['device']}, "
        f"matmul {result['matmul_tflops']:.2f} TFLOP/s{_ready(result)}",
        title_justify="left",
    )
    columns = [(title, key) for title, key in COLUMNS if any(key in r for r in result["rows"])]
    for title, _ in columns:
        left = title in ("matrices", "of")
        shown.add_column(title, justify="left" if left else "right", no_wrap=title == "of")
    for row in sorted(result["rows"], key=lambda r: (r["batch"], r["ms"]["median"])):
        shown.add_row(*(_shown(row, key) for _, key in columns))
    for name, milliseconds in sorted(result.get("totals", {}).items(), key=lambda t: t[1]):
        shown.add_row(f"all of a rank, EP={result['ep']}", name, f"{milliseconds:,.1f}")
    return shown


def _ready(result: Result) -> str:
    seconds = result.get("kernels_ready_s")
    return "" if seconds is None else f", kernels ready in {seconds:.1f} s"


def _shown(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if key.startswith("error"):
        return "-" if value is None else f"{value:.1e}"
    return f"{value:.0%}" if key == "of_floor" else cell(value)


def draw(result: Result, figure: Figure) -> None:
    """Draws milliseconds a batch as bars, the floor as a line."""
    axes = figure.subplots()
    # Orthogonalisation alone: a step takes a hundred times as long, a product a tenth.
    rows = [row for row in result["rows"] if "error_full_rank" in row]
    names = [f"{row['implementation']}\n{row['batch']}" for row in rows]
    axes.barh(names, [row["ms"]["median"] for row in rows], color="tab:blue")
    for place, row in enumerate(rows):
        axes.vlines(row["floor_ms"], place - 0.4, place + 0.4, color="tab:red")
    axes.invert_yaxis()
    axes.set_xlabel("ms (red: the symmetric iteration at this process's matmul rate)")
    axes.set_title(result["machine"]["device"])
