"""The largest attention logit of every head, measured while the model trains.

Shape suffixes: B batch, H query heads, J key heads, S queries, T keys, D head size.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Kimi K2's bound (arXiv 2507.20534): above it softmax saturates and training has diverged.
WARN_ABOVE = 100.0
QUERIES_AT_ONCE = 512


@dataclass(frozen=True)
class LogitReport:
    """The largest attention logit of a step, over all ranks, and where it was."""

    largest: float
    layer: str
    head: int


class AttentionLogits:
    """Listens to transformers' attention registry; one maximum a head of each layer.

    The registry entry that the model uses is wrapped, whatever it is, so every implementation
    and whoever registered it stays in charge of the attention itself. Costs one more Q K^T.
    """

    def __init__(self, model: nn.Module, interval: int) -> None:
        """Wraps the model's attention.

        Args:
            interval: steps between measurements.
        """
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        assert interval >= 1
        self.interval = interval
        self.num_steps = 0
        self.latest: dict[str, Tensor] = {}
        self.latest_report: LogitReport | None = None
        self._names = {id(module): name for name, module in model.named_modules()}
        self._maxima_H: dict[str, Tensor] = {}
        self._warned = False
        implementation = getattr(model, "config").get_text_config()._attn_implementation  # noqa: B009
        self._restore = _wrap(ALL_ATTENTION_FUNCTIONS, implementation or "eager", self._observe)

    def close(self) -> None:
        """Puts the registry back."""
        self._restore()

    @torch.no_grad()
    def _observe(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, scaling: float | None
    ) -> None:
        name = self._names.get(id(module))
        if name is None or not module.training or self.num_steps % self.interval:
            return
        causal = bool(getattr(module, "is_causal", False))
        maxima_H = largest_logits(query, key, mask, scaling=scaling, causal=causal)
        if name in self._maxima_H:
            maxima_H = torch.maximum(maxima_H, self._maxima_H[name])
        self._maxima_H[name] = maxima_H

    def collect(self) -> LogitReport | None:
        """Ends a step: returns the largest logit if it was measured. A collective if so.

        `latest` then holds the maxima of each layer's heads over all ranks, `latest_report` the
        result until the next measurement.
        """
        measured = self.num_steps % self.interval == 0
        self.num_steps += 1
        if not measured or not self._maxima_H:
            return None
        names = sorted(self._maxima_H)
        sizes = [self._maxima_H[name].numel() for name in names]
        joined = torch.cat([self._maxima_H[name] for name in names])
        if dist.is_initialized():
            dist.all_reduce(joined, op=dist.ReduceOp.MAX)
        parts = torch.split(joined, sizes)
        self.latest = dict(zip(names, parts, strict=True))
        self._maxima_H = {}
        self.latest_report = _report(self.latest)
        self._warn(self.latest_report)
        return self.latest_report

    def _warn(self, report: LogitReport) -> None:
        if report.largest > WARN_ABOVE and not self._warned:
            self._warned = True
            warnings.warn(
                f"attention logit {report.largest:.1f} > {WARN_ABOVE:.0f} in {report.layer}, "
                f"head {report.head}; `optim.qk_clip` bounds it",
                RuntimeWarning,
                stacklevel=3,
            )


def _report(latest: dict[str, Tensor]) -> LogitReport:
    layer = max(latest, key=lambda name: float(latest[name].max()))
    return LogitReport(float(latest[layer].max()), layer, int(latest[layer].argmax()))


def largest_logits(
    query_BHSD: Tensor,
    key_BJTD: Tensor,
    mask: Any,
    *,
    scaling: float | None,
    causal: bool,
) -> Tensor:
    """Returns the largest allowed logit of each query head, float32 [H].

    Args:
        query_BHSD: with rotary embedding applied, as given to attention.
        key_BJTD: the same; J divides H.
        mask: boolean (true is allowed) or additive, broadcastable to [B, H, S, T]; None with
            `causal` means each query sees the keys up to its own place. Documents packed without
            a mask tensor (by offsets) count as one: an upper bound.
        scaling: of the logits; 1/sqrt(D) by default.
    """
    num_queries, num_keys = query_BHSD.shape[2], key_BJTD.shape[2]
    scaling = query_BHSD.shape[-1] ** -0.5 if scaling is None else scaling
    key_BHTD = key_BJTD.repeat_interleave(query_BHSD.shape[1] // key_BJTD.shape[1], dim=1)
    positions_T = torch.arange(num_keys, device=key_BJTD.device)
    largest_H = torch.full((query_BHSD.shape[1],), -torch.inf, device=query_BHSD.device)
    for begin in range(0, num_queries, QUERIES_AT_ONCE):
        part_BHSD = query_BHSD[:, :, begin : begin + QUERIES_AT_ONCE]
        logits_BHST = (part_BHSD @ key_BHTD.mT).float() * scaling
        if isinstance(mask, Tensor):
            rows = mask[..., begin : begin + QUERIES_AT_ONCE, :num_keys]
            blocked = ~rows if rows.dtype == torch.bool else rows < torch.finfo(rows.dtype).min / 2
            logits_BHST = logits_BHST.masked_fill(blocked, -torch.inf)
        elif causal:
            places_S = torch.arange(begin, begin + part_BHSD.shape[2], device=positions_T.device)
            later_ST = positions_T > places_S[:, None] + num_keys - num_queries
            logits_BHST = logits_BHST.masked_fill(later_ST, -torch.inf)
        largest_H = torch.maximum(largest_H, logits_BHST.amax(dim=(0, 2, 3)))
    return largest_H


def _wrap(registry: Any, name: str, observe: Callable[..., None]) -> Callable[[], None]:
    """Replaces one entry of the registry; returns what puts it back.

    `eager` has no entry: every model's module brings its own function of that name.
    """
    original = registry.get(name) if name in registry else None

    def attention(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        mask = options.get("attention_mask", rest[1] if len(rest) > 1 else None)
        observe(module, query, key, mask, options.get("scaling"))
        call = original or sys.modules[type(module).__module__].eager_attention_forward
        return call(module, query, key, *rest, **options)

    registry[name] = attention

    def restore() -> None:
        del registry[name]
        if original is not None and name not in registry:
            registry[name] = original

    return restore
