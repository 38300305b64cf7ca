"""What `epctl bench multimodal-sp` would measure on more ranks than there are: a simulation. Pure.

    t(N) = serial + (t(1) - serial) * (tower's share of the time * slowest rank's share of the tower
           + decoder's share of the time * slowest rank's share of the tokens) + bytes(N) / rate

The cuts, the heads and so the bytes are those that N ranks would really choose. Times and the rate
of an exchange are measured in the same run; what one rank and a few do not explain is `serial`.
Left out: latency (rate is that of a large message) and slower links once N outgrows a host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from epctl.runtime.sequence.cuts import LayerKind, Level, choose_cuts, even_offsets, is_local
from epctl.runtime.sequence.heads import choose_method, place_heads, sent_elements

SIMULATED = (4, 8, 16, 32, 64)
PASSES = 2  # backward sends what forward sent


@dataclass(frozen=True)
class Attention:
    """Layers that attend alike; `dims` are query, key and value head sizes."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    dims: tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """A workload as far as its cuts and bytes depend on it.

    Attributes:
        levels: boundaries of the patch rows, coarse to fine; none for a tower of equal tiles.
        kinds: segments of the tower's layers.
        linear_cost: of a row, in attended pairs.
        num_tiles: of a tower of tiles.
        feature_elements: of all visual tokens, every level.
    """

    tower: Attention
    decoder: Attention
    num_tokens: int
    levels: tuple[Level, ...]
    kinds: tuple[LayerKind, ...]
    linear_cost: float
    num_tiles: int
    feature_elements: int
    element_size: int


@dataclass(frozen=True)
class Share:
    """The slowest rank's share of the work on N ranks, and the most bytes that a rank sends."""

    num_ranks: int
    tower: float
    decoder: float
    sent_bytes: float


@dataclass(frozen=True)
class Rates:
    """Measured in the run itself.

    Attributes:
        alone_s: forward and backward on one rank, in seconds.
        shared_s: the same on `num_ranks` ranks.
        tower_share: of one rank's forward time.
        bytes_per_second: that a rank sends to others in an all-to-all of `num_ranks` ranks.
    """

    alone_s: float
    shared_s: float
    num_ranks: int
    tower_share: float
    bytes_per_second: float


def attention_bytes(
    attention: Attention, num_layers: int, offsets: Sequence[int], *, causal: bool, size: int
) -> list[int]:
    """Returns what each rank sends in forward and backward of layers that attend over all ranks."""
    sizes = [stop - start for start, stop in pairwise(offsets)]
    heads, kv_heads, dims = attention.num_heads, attention.num_kv_heads, attention.dims
    method = choose_method(heads, kv_heads, sizes, dims, causal=causal)
    placement = place_heads(heads, kv_heads, len(sizes)) if method == "heads" else None
    elements = sent_elements(placement, kv_heads, sizes, dims)
    return [PASSES * num_layers * size * number for number in elements]


def share_at(geometry: Geometry, num_ranks: int) -> Share:
    """Returns how the slowest rank fares with the cuts that `num_ranks` ranks would choose."""
    tokens = even_offsets(geometry.num_tokens, num_ranks)
    sent = attention_bytes(
        geometry.decoder,
        geometry.decoder.num_layers,
        tokens,
        causal=True,
        size=geometry.element_size,
    )
    if geometry.levels:
        cuts = choose_cuts(geometry.levels, geometry.kinds, geometry.linear_cost, num_ranks)
        tower = cuts.imbalance / num_ranks
        num_layers = sum(
            k.num_layers for k in geometry.kinds if not is_local(k.offsets, cuts.offsets)
        )
        in_tower = attention_bytes(
            geometry.tower, num_layers, cuts.offsets, causal=False, size=geometry.element_size
        )
        sent = [a + b for a, b in zip(sent, in_tower, strict=True)]
    else:
        tower = -(-geometry.num_tiles // num_ranks) / geometry.num_tiles
    elsewhere = (num_ranks - 1) / num_ranks**2
    features = PASSES * geometry.feature_elements * geometry.element_size * elsewhere
    longest = max(stop - start for start, stop in pairwise(tokens))
    return Share(num_ranks, tower, longest / geometry.num_tokens, max(sent) + features)


def serial_seconds(rates: Rates, measured: Share) -> float:
    """Returns the time that more ranks do not shorten, from one rank and `measured.num_ranks`."""
    work = _work(rates, measured)
    exchange = measured.sent_bytes / rates.bytes_per_second
    rest = (rates.shared_s - exchange - rates.alone_s * work) / (1 - work)
    return min(max(rest, 0.0), rates.alone_s)


def simulated_seconds(rates: Rates, measured: Share, share: Share) -> float:
    """Returns the time of forward and backward on `share.num_ranks` ranks."""
    serial = serial_seconds(rates, measured)
    exchange = share.sent_bytes / rates.bytes_per_second
    return serial + (rates.alone_s - serial) * _work(rates, share) + exchange


def _work(rates: Rates, share: Share) -> float:
    return rates.tower_share * share.tower + (1 - rates.tower_share) * share.decoder


def scaling(
    geometry: Geometry,
    rates: Rates,
    measured_ms: dict[int, float],
    sizes: Sequence[int] = SIMULATED,
) -> dict[str, Any]:
    """Returns a table of N, measured where there were as many ranks, simulated beyond.

    Args:
        measured_ms: of each number of ranks that was measured, one among them.
    """
    reference = share_at(geometry, rates.num_ranks)
    points = [
        _point(geometry, size, ms / 1e3, measured_ms[1] / 1e3, simulated=False)
        for size, ms in sorted(measured_ms.items())
    ]
    for size in sizes:
        if size > max(measured_ms) and size <= geometry.num_tokens:
            seconds = simulated_seconds(rates, reference, share_at(geometry, size))
            points.append(_point(geometry, size, seconds, measured_ms[1] / 1e3, simulated=True))
    serial = serial_seconds(rates, reference)
    return {"points": points, "rates": asdict(rates), "serial_ms": serial * 1e3}


def _point(
    geometry: Geometry, num_ranks: int, seconds: float, alone: float, *, simulated: bool
) -> dict[str, Any]:
    share = share_at(geometry, num_ranks) if num_ranks > 1 else None
    return {
        "ranks": num_ranks,
        "source": "simulated" if simulated else "measured",
        "ms": seconds * 1e3,
        "speedup": alone / seconds,
        "tokens_per_second": geometry.num_tokens / seconds / num_ranks,
        "sent_mib": share.sent_bytes / 2**20 if share else 0.0,
        "tower_work": share.tower * num_ranks if share else 1.0,
    }
