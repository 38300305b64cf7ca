"""A run in pictures: the loss curve (braille dots in a terminal, a PNG) and the experts' loads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class HeatMap(NamedTuple):
    """A row a MoE layer; colors go from `least` to the largest value, or at least to `most`.

    `steps` are those of the columns; without them a column is an expert.
    """

    title: str
    values: list[list[float]]
    least: float
    most: float
    steps: list[int]


def write_load_png(
    path: Path, steps: Sequence[Mapping[str, Any]], choices: Sequence[Sequence[int]] = ()
) -> None:
    """Writes heat maps of how evenly experts are used.

    By report and MoE layer the load of the fullest expert over the mean and, where a capacity
    dropped choices, the share of those; by layer and expert what each was given in the end.

    Args:
        steps: the reports, with `step`, `expert_loads` and perhaps `drop_rates`.
        choices: of each layer those that its experts were given since the report before the last.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    maps = heat_maps(steps, choices)
    size = (1 + 6.5 * len(maps), 0.25 * len(maps[0].values) + 2)
    figure, panels = pyplot.subplots(
        1, len(maps), figsize=size, dpi=120, squeeze=False, layout="constrained"
    )
    for axes, drawn in zip(panels[0], maps, strict=True):
        _draw_map(axes, drawn)
    figure.savefig(path)
    pyplot.close(figure)


def heat_maps(
    steps: Sequence[Mapping[str, Any]], choices: Sequence[Sequence[int]] = ()
) -> list[HeatMap]:
    """Returns what `write_load_png` draws, of the same arguments."""
    numbers = [int(step["step"]) for step in steps]
    loads = _by_layer(steps, "expert_loads")
    maps = [HeatMap("load of the fullest expert over the mean", loads, 1.0, 1.1, numbers)]
    if all("drop_rates" in step for step in steps):
        dropped = _by_layer(steps, "drop_rates")
        maps.append(HeatMap("share of choices dropped", dropped, 0.0, 0.01, numbers))
    if choices:
        title = f"load of every expert over the mean, step {numbers[-1]}"
        maps.append(HeatMap(title, _over_mean(choices), 0.0, 1.0, []))
    return maps


def _by_layer(steps: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    return [list(layer) for layer in zip(*(step[key] for step in steps), strict=True)]


def _over_mean(choices: Sequence[Sequence[int]]) -> list[list[float]]:
    """Returns a row a layer; layers with fewer experts end in NaN, which stays white."""
    widest = max(map(len, choices))
    rows = []
    for layer in choices:
        mean = max(sum(layer) / len(layer), 1e-9)
        rows.append([count / mean for count in layer] + [math.nan] * (widest - len(layer)))
    return rows


def _draw_map(axes: Any, drawn: HeatMap) -> None:
    from matplotlib.ticker import MaxNLocator

    highest = max((v for row in drawn.values for v in row if math.isfinite(v)), default=0.0)
    image = axes.imshow(
        drawn.values,
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=drawn.least,
        vmax=max(highest, drawn.most),  # or colors of one value would lie around it
    )
    every = -(-len(drawn.values) // 16)
    axes.set_yticks(range(0, len(drawn.values), every))
    axes.set(xlabel="step" if drawn.steps else "expert", ylabel="MoE layer", title=drawn.title)
    if drawn.steps:
        places = sorted({round(n * (len(drawn.steps) - 1) / 5) for n in range(6)})
        axes.set_xticks(places, [str(drawn.steps[place]) for place in places])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(image, ax=axes)
