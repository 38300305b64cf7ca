"""A run in pictures: the loss curve (braille dots in a terminal, a PNG) and the experts' loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

# Dot bits of a braille cell by (row, column), Unicode 2800 block.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def braille_chart(
    steps: Sequence[float], values: Sequence[float], *, width: int = 60, height: int = 8
) -> str:
    """Returns a line chart of `values` over `steps` as text, axis labels included.

    What is not finite is left out; fewer than two points give an empty text.
    """
    points = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    if len(points) < 2:
        return ""
    steps, values = [s for s, _ in points], [v for _, v in points]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    first, last = steps[0], steps[-1]
    cells = [[0] * width for _ in range(height)]
    for column in range(width * 2):
        position = first + (last - first) * column / (width * 2 - 1)
        value = _interpolate(steps, values, position)
        row = round((high - value) / span * (height * 4 - 1))
        cells[row // 4][column // 2] |= DOTS[row % 4][column % 2]
    labels = [f"{high:8.3f} ", *["         "] * (height - 2), f"{low:8.3f} "]
    rows = [
        label + "|" + "".join(chr(0x2800 + bits) for bits in row)
        for label, row in zip(labels, cells, strict=True)
    ]
    axis = " " * 9 + "+" + "-" * width
    ends = " " * 10 + f"{first:g}" + f"{last:g}".rjust(width - len(f"{first:g}"))
    return "\n".join([*rows, axis, ends])


def _interpolate(steps: Sequence[float], values: Sequence[float], position: float) -> float:
    for index in range(1, len(steps)):
        if position <= steps[index]:
            left, right = steps[index - 1], steps[index]
            share = (position - left) / ((right - left) or 1.0)
            return values[index - 1] + share * (values[index] - values[index - 1])
    return values[-1]


def write_loss_png(
    path: Path,
    steps: Sequence[float],
    losses: Sequence[float],
    held_out: Sequence[tuple[float, float]],
    title: str,
) -> None:
    """Writes the training loss as a line and held-out losses as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(steps, losses, color="#1f6feb", linewidth=1.6, label="training loss")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", color="#d1480f", label="held-out loss")
        for step, loss in held_out:
            axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(6, 6))
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def write_load_png(path: Path, steps: Sequence[int], loads: Sequence[Sequence[float]]) -> None:
    """Writes max/mean load of each layer's experts over the reports as a heat map.

    Args:
        loads: one row a report: the ratio of each MoE layer, 1 where all experts are used alike.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_layer = [list(layer) for layer in zip(*loads, strict=True)]
    figure, axes = pyplot.subplots(figsize=(8, 0.25 * len(by_layer) + 2), dpi=120)
    image = axes.imshow(by_layer, aspect="auto", interpolation="nearest", cmap="magma", vmin=1)
    places = sorted({round(n * (len(steps) - 1) / 5) for n in range(6)})
    axes.set_xticks(places, [str(steps[place]) for place in places])
    every = -(-len(by_layer) // 16)
    axes.set_yticks(range(0, len(by_layer), every))
    axes.set(xlabel="step", ylabel="MoE layer", title="load of the fullest expert over the mean")
    figure.colorbar(image, ax=axes)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
