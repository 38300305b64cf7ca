"""Held-out curves of the embedded default under Muon and AdamW: the picture in docs/muon.md.

    python tests/distributed/measure_convergence.py FOLDER [--steps 300] [--minutes 60] [--plot PNG]

One rank, CPU, one run after another; every run leaves `FOLDER/<optimizer>-<rate>-<seed>.json`, and
a run whose file is there is not repeated, so an interrupted measurement goes on.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

# Three rates around the best of each: a first look put AdamW's below Muon's.
RATES = {"muon": (1e-3, 3e-3, 9e-3), "adamw": (3e-4, 1e-3, 3e-3)}
STYLES = (":", "-", "--")
COLORS = {"muon": "#d55e00", "adamw": "#0072b2"}
SEEDS = (0, 1)
EVAL_EVERY = 25
MICRO_BATCH, SEQUENCE, EVAL_BATCHES = 4, 128, 16


def run(optimizer: str, rate: float, seed: int, num_steps: int) -> dict[str, Any]:
    """Trains once; returns (step, held-out loss) points and seconds a step."""
    import torch

    from epctl.config import resolve_config
    from epctl.launch.ds_config import deepspeed_config
    from epctl.runtime import data, default_model
    from epctl.runtime import deepspeed_seams as seams
    from epctl.runtime.build import build_model
    from epctl.runtime.engine import create_engine, train_step
    from epctl.runtime.evaluate import held_out_loss
    from epctl.runtime.weights import RandomWeights

    flags = {
        "parallel.zero": 1,
        "optim.name": optimizer,
        "optim.lr": rate,
        "train.steps": num_steps,
        "train.micro_batch_size": MICRO_BATCH,
        "train.sequence_length": SEQUENCE,
        "train.seed": seed,
    }
    config = resolve_config(flags=flags).config
    torch.manual_seed(seed)
    mesh = seams.create_mesh(1)
    ds_config = deepspeed_config(config, bfloat16=False, on_cpu=True)
    device = torch.device("cpu")
    model = build_model(
        default_model.default_config(),
        mesh,
        RandomWeights(seed),
        dtype=torch.float32,
        device=device,
    )
    engine, _, scheduler = create_engine(model, config, ds_config)
    text = data.ByteData(data.standard_library_corpus(), SEQUENCE, seed)
    held_out = [text.held_out_batch(i * MICRO_BATCH, MICRO_BATCH) for i in range(EVAL_BATCHES)]
    points = [(0, held_out_loss(engine, held_out))]
    seconds = 0.0
    for step in range(num_steps):
        batch = text.train_batch(step * MICRO_BATCH, MICRO_BATCH)
        begun = time.perf_counter()
        train_step(engine, scheduler, [batch], config, mesh)
        seconds += time.perf_counter() - begun
        if (step + 1) % EVAL_EVERY == 0 or step + 1 == num_steps:
            points.append((step + 1, held_out_loss(engine, held_out)))
    engine.destroy()
    gc.collect()
    return {
        "optimizer": optimizer,
        "rate": rate,
        "seed": seed,
        "points": points,
        "seconds_per_step": seconds / num_steps,
    }


def measure(folder: Path, num_steps: int, minutes: float) -> None:
    """Runs what is missing, seeds outermost, and stops before a run that would pass the time."""
    import torch

    from epctl.runtime import deepspeed_seams as seams

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29533")
    torch.set_num_threads(1)
    seams.initialize_distributed("cpu", datetime.timedelta(minutes=5))
    deadline = time.monotonic() + 60 * minutes
    longest = 0.0
    for seed, place, optimizer in itertools.product(SEEDS, range(3), RATES):
        rate = RATES[optimizer][place]
        path = folder / f"{optimizer}-{rate:g}-{seed}.json"
        if path.exists() or time.monotonic() + longest > deadline:
            continue
        begun = time.monotonic()
        result = run(optimizer, rate, seed, num_steps)
        longest = max(longest, time.monotonic() - begun)
        path.write_text(json.dumps(result), encoding="utf-8")


def plot(folder: Path, picture: Path) -> None:
    """Draws the mean over seeds of each optimizer and rate, seeds as thin lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for optimizer, color in COLORS.items():
        for rate, style in zip(RATES[optimizer], STYLES, strict=True):
            curves = [r["points"] for r in runs if (r["optimizer"], r["rate"]) == (optimizer, rate)]
            if not curves:
                continue
            for points in curves:
                axes.plot(*zip(*points, strict=True), color=color, ls=style, lw=0.5)
            steps = [step for step, _ in curves[0]]
            means = [sum(c[i][1] for c in curves) / len(curves) for i in range(len(steps))]
            label = f"{optimizer} {rate:g}: {means[-1]:.3f} ({len(curves)} seeds)"
            axes.plot(steps, means, color=color, ls=style, lw=1.8, label=label)
    axes.set(xlabel="optimizer step", ylabel="held-out loss (nats a byte)", ylim=(2.1, 3.5))
    axes.grid(alpha=0.3)
    axes.legend(title="rate: mean last loss", fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    measure(arguments.folder, arguments.steps, arguments.minutes)
    if arguments.plot:
        plot(arguments.folder, arguments.plot)


if __name__ == "__main__":
    main()
