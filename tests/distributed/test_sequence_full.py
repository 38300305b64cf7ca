"""The full product of the sequence-parallel cases: `slow`, its dates in docs/testing.md."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks
from sequence_models import CONFIGS, IMAGES, PACKED, TILES

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def grid(model: str) -> list[dict[str, Any]]:
    """Every cut x batch x recomputation, and every ZeRO stage x cut x recomputation."""
    visual = model in PACKED or model in TILES or model in IMAGES
    kinds = ["plain", "padded", "left"]
    kinds += ["packed"] if model not in TILES else []
    # Kimi's tower averages the frames of a clip, which transformers' own features do not survive.
    clips = model in PACKED and model != "kimi_k25"
    kinds += ["video"] if clips or model == "llava_onevision" else []
    kinds += ["together"] if model == "llava_onevision" else []
    cases: list[dict[str, Any]] = [
        {"kind": kind, "sp": sp, "checkpointing": recomputed}
        for kind, sp, recomputed in itertools.product(kinds, (1, 2, 4), (False, True))
    ]
    cases += [
        {"kind": "padded", "sp": sp, "zero": zero, "checkpointing": recomputed}
        for sp, zero, recomputed in itertools.product((1, 2, 4), range(4), (False, True))
    ]
    if visual:
        strategies = ("units", "replicate") + (("ulysses",) if model not in IMAGES else ())
        cases += [
            {"kind": "padded", "sp": sp, "vision": vision, "images": images}
            for vision, sp, images in itertools.product(strategies, (2, 4), (2, 5))
        ]
        cases += [
            {"sp": sp, "images": images, "encoder_outputs": handed, "zero": 3}
            for sp, images, handed in itertools.product((2, 4), ([0, 5], [2, 0]), (True, False))
        ]
    if model in PACKED:
        cases += [
            {"sp": sp, "images": images, "balance": True, "checkpointing": recomputed}
            for sp, images, recomputed in itertools.product(
                (1, 2), ([0, 5], [3, 1], [2, 0, 1, 4]), (False, True)
            )
        ]
    if model in ("deepseek_v3", "qwen3_vl_moe", "glm4v_moe", "kimi_k25"):
        cases += [
            {"kind": "padded", "sp": sp, "ep": ep, "zero": zero}
            for sp, ep, zero in itertools.product((1, 2, 4), (1, 2, 4), range(4))
        ]
    return [{"name": json.dumps(options), "model": model, **options} for options in cases]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("model", CONFIGS)
def test_every_combination(model: str, tmp_path: Path) -> None:
    ranks = run_ranks("sequence_ranks", 4, tmp_path, json.dumps(grid(model)), timeout=1100)
    for rank in ranks:
        for name, result in rank.items():
            assert result["loss"] == pytest.approx(result["expected_loss"], abs=1e-5), name
            assert result["error"] <= 1e-4, (name, result["parameter"])
