"""What `epctl bench muon` times: epctl's iterations in their variants, and the peers there are.

Shape suffixes: see kernels/newton_schulz.py.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from epctl.bench.muon_peers import PEERS, Orthogonalize
from epctl.bench.muon_shapes import MatrixBatch
from epctl.kernels.muon_passes import apply_update_, mix_momentum_, normalize_into
from epctl.kernels.newton_schulz import iteration_dtype, orthogonalize_normal_
from epctl.runtime.muon_rule import MuonRule


class Implementation(NamedTuple):
    """One way to orthogonalise, and the named polynomial it computes.

    Attributes:
        own: held to the bars of epctl's own.
        candidate: no default: if it is wrong or does not run, it has no number and the rest has.
        uses_graphs: its graphs hold memory between calls.
    """

    name: str
    run: Orthogonalize
    coefficients: str
    own: bool
    candidate: bool = True
    uses_graphs: bool = False


# Settings of `own_iteration` by name; of `epctl` they are the optimizer's own choice.
VARIANTS: dict[str, dict[str, Any]] = {
    "epctl": {"by_rule": True},
    "epctl standard": {"method": "standard", "products": "torch"},
    "epctl gram": {"method": "gram", "products": "torch"},
}
TRITON: dict[str, Any] = {"products": "symmetric", "passes": "triton"}
GRAPHS: dict[str, Any] = {**TRITON, "use_graphs": True}
GPU_VARIANTS: dict[str, dict[str, Any]] = {
    "epctl symmetric": GRAPHS,
    "epctl symmetric, no graphs": TRITON,
    "epctl symmetric, all at once": {**TRITON, "at_once": 64},
    "epctl standard symmetric": {**GRAPHS, "method": "standard"},
}


def own_iteration(
    x_BMN: Tensor, *, by_rule: bool = False, passes: Any = "torch", **settings: Any
) -> Tensor:
    """Returns orthogonal factors as the optimizer makes them: norm and cast in, then the chain."""
    normal_BMN = torch.empty_like(x_BMN, dtype=iteration_dtype(x_BMN.device))
    if by_rule:
        rule = MuonRule()
        rule.normalize_into(x_BMN, normal_BMN)
        rule.orthogonalize_(normal_BMN)
        return normal_BMN
    normalize_into(x_BMN, normal_BMN, implementation=passes)
    orthogonalize_normal_(normal_BMN, **settings)
    return normal_BMN


def implementations(
    device: torch.device, peers: Sequence[str]
) -> tuple[list[Implementation], dict[str, str]]:
    """Returns what can run on `device`, and why the others cannot."""
    absent: dict[str, str] = {}
    variants = dict(VARIANTS)
    if device.type == "cuda":
        variants |= GPU_VARIANTS
    else:
        absent["epctl symmetric"] = "its Triton kernels need a GPU, and so do its graphs"
    found = [
        Implementation(
            name,
            functools.partial(_run_own, settings),
            "you",
            True,
            name not in VARIANTS,
            settings.get("use_graphs", name == "epctl"),
        )
        for name, settings in variants.items()
    ]
    for name in peers:
        try:
            built = PEERS[name]()
        except Exception as error:  # another package's surprise; the run goes on without it
            built = f"{type(error).__name__}: {error}"[:200]
        if isinstance(built, str):
            absent[name] = built
        else:
            found.append(Implementation(name, built, "jordan", own=False))
    return found, absent


def _run_own(settings: dict[str, Any], x_BMN: Tensor) -> Tensor:
    return own_iteration(x_BMN, **settings)


def seconds_until_ready(batches: Sequence[MatrixBatch], device: torch.device) -> float:
    """Returns how long the first step at every shape takes with nothing compiled before.

    To be called before any Triton kernel of this process runs: its cache is an empty folder
    meanwhile.
    """
    previous = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            begin = time.perf_counter()
            for batch in batches:
                shape = (batch.num_rows, batch.num_columns)
                x_BMN = torch.ones(1, *shape, device=device)
                own_iteration(x_BMN, **GPU_VARIANTS["epctl symmetric"])
            flat = torch.ones(4096, device=device)
            mix_momentum_(flat, flat.clone(), 0.9, nesterov=True, implementation="triton")
            apply_update_(
                flat, flat.half(), rate=1.0, scale=1.0, decay=0.0, implementation="triton"
            )
            torch.cuda.synchronize(device)
            return time.perf_counter() - begin
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if previous is not None:
                os.environ["TRITON_CACHE_DIR"] = previous
