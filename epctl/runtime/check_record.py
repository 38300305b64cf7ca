"""What `--check` compares: losses, gradient norms by part, router choices, weights. No engine here.

Shape suffixes: L MoE layers, T tokens, K top_k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

# First match decides; what none matches is a norm.
PARTS = (
    ("vision", ".visual."),
    ("vision", "vision_"),
    ("vision", "projector."),
    ("vision", "connector."),
    ("vision", "image_newline"),
    ("embedding", ".embed_tokens."),
    ("head", "lm_head."),
    ("attention", "attn."),
    ("experts", ".experts."),
    ("shared experts", "shared_"),
    ("router", ".gate."),
    ("router", ".router."),
    ("dense MLP", ".mlp."),
)


def part_of(name: str) -> str:
    """Returns which part of the model a checkpoint tensor belongs to."""
    return next((part for part, sign in PARTS if sign in f".{name}"), "norms")


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: mean loss, norm of the raw gradient, and by part as the optimizer got it.

    The norms by part are taken after clipping, so they also show a wrong clipping factor.
    """

    loss: float
    norm: float
    norm_by_part: Mapping[str, float]


@dataclass(frozen=True)
class Tolerance:
    """Largest relative difference that rounding explains, in float32.

    Sums run in another order over ranks, experts and kernels. `choices` is a share of tokens: two
    scores that agree to the last digits may swap. `weights` is norm-wise by part after the steps,
    `direction` what a gradient's cosine may fall short of one.
    """

    loss: float
    norm: float
    direction: float
    choices: float
    weights: float


# On CPU tiny models differ by 1e-8 to 1e-7; depth and width add some digits. On GPUs tensor cores
# round float32 factors to 10 bits of mantissa (TF32).
TOLERANCES = {
    "cpu": Tolerance(loss=1e-6, norm=1e-5, direction=1e-5, choices=1e-3, weights=2e-6),
    "cuda": Tolerance(loss=1e-3, norm=1e-2, direction=1e-3, choices=2e-2, weights=1e-3),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    quantity: str
    reference: float | None
    asked: float | None
    difference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance  # false for NaN too


def step_rows(
    reference: list[StepRecord], asked: list[StepRecord], tolerance: Tolerance
) -> list[Row]:
    """Returns the rows of losses and norms, by part for the first step."""
    rows = []
    for number, (left, right) in enumerate(zip(reference, asked, strict=True), start=1):
        rows.append(_row(f"loss, step {number}", left.loss, right.loss, tolerance.loss))
        rows.append(_row(f"gradient norm, step {number}", left.norm, right.norm, tolerance.norm))
    first, second = reference[0].norm_by_part, asked[0].norm_by_part
    for part in sorted(first.keys() | second.keys()):
        quantity = f"gradient of {part}, step 1"
        rows.append(_row(quantity, first.get(part, 0.0), second.get(part, 0.0), tolerance.norm))
    return rows


def direction_rows(cosines: Mapping[str, float], tolerance: Tolerance) -> list[Row]:
    """Returns a row for each cosine between a part's first gradient and the reference's."""
    return [
        Row(f"gradient direction of {part}, step 1", None, None, 1 - cosine, tolerance.direction)
        for part, cosine in sorted(cosines.items())
    ]


def _row(quantity: str, reference: float, asked: float, tolerance: float) -> Row:
    difference = abs(asked - reference) / max(abs(reference), 1e-30)
    same = asked == reference
    return Row(quantity, reference, asked, 0.0 if same else difference, tolerance)


def choice_row(reference_LTK: Tensor, asked_LTK: Tensor, tolerance: Tolerance) -> Row:
    """Returns the share of tokens that some layer sends to other experts."""
    differs_T = (reference_LTK.sort(-1).values != asked_LTK.sort(-1).values).any(-1).any(0)
    share = float(differs_T.double().mean())
    return Row("router choices, share of tokens", None, None, share, tolerance.choices)


def weight_rows(
    squares: Mapping[str, tuple[float, float]], num_steps: int, tolerance: Tolerance
) -> list[Row]:
    """Returns a row a part from (sum of squared differences, sum of squared weights)."""
    return [
        Row(
            f"weights of {part} after {num_steps} steps",
            None,
            None,
            math.sqrt(difference / max(total, 1e-30)),
            tolerance.weights,
        )
        for part, (difference, total) in sorted(squares.items())
    ]


def report(rows: list[Row], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON document of a check."""
    return {
        **facts,
        "ok": all(row.ok for row in rows),
        "rows": [asdict(row) | {"ok": row.ok} for row in rows],
    }
