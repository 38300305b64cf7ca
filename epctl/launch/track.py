"""Experiment trackers beside metrics.jsonl: fed by the launcher's events, not by the ranks."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

from epctl.config import RunConfig
from epctl.errors import ConfigError
from epctl.output import out

Event = dict[str, Any]
PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None:
        """Records numbers of a step."""

    def close(self) -> None: ...


def require_tracker(name: str) -> None:
    """Raises ConfigError if the tracker's package is not installed."""
    package = PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"`--track {name}` needs the package `{package}`, which is not installed",
            hint=f"`pip install {package}`; metrics.jsonl is written in any case",
        )


def open_tracker(name: str, run_folder: Path, config: RunConfig) -> Tracker | None:
    """Returns the tracker, None for `none`."""
    if name == "none":
        return None
    require_tracker(name)
    if name == "tensorboard":
        return _TensorBoard(run_folder / "tensorboard")
    return _Module(name, run_folder, config)


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        summary = importlib.import_module("tensorboard.summary")
        self._writer = summary.Writer(str(folder))

    def log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Module:
    """wandb, and trackio, which keeps to wandb's functions."""

    def __init__(self, name: str, run_folder: Path, config: RunConfig) -> None:
        self._module = importlib.import_module(name)
        with contextlib.redirect_stdout(out.stderr):  # trackio announces itself on stdout
            self._module.init(project="epctl", name=run_folder.name, config=config.model_dump())

    def log(self, values: dict[str, float], step: int) -> None:
        self._module.log(values, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(out.stderr):
            self._module.finish()


def tracked_values(event: Event) -> dict[str, float]:
    """Returns the numbers of a step or an evaluation, by the names trackers show."""
    if event["event"] == "eval":
        return {"eval/loss": event["loss"]}
    if event["event"] != "step":
        return {}
    skipped = ("event", "time", "step")
    numbers = {k: v for k, v in event.items() if isinstance(v, int | float) and k not in skipped}
    return {f"train/{key}": float(value) for key, value in numbers.items()}
