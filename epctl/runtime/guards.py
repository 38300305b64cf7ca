"""Guards of a step: asked after backward and before the update, decided by all ranks together.

A loss or a gradient that is not finite stops the run, naming rank, step and parameter: once it is
in the weights or folded into momentum, nothing later is worth anything. A loss far above the
recent ones warns, skips the update or stops, as the run says.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epctl.config_checkpoint import GuardsSection
from epctl.errors import GateError
from epctl.runtime.checkpoint_state import named_ranges
from epctl.runtime.deepspeed_seams import full_shape
from epctl.runtime.faults import reached

# Losses that must be known before any is called a spike.
MIN_HISTORY = 8


class SpikeRule:
    """Calls a loss a spike when it is `factor` times the median of the last accepted ones."""

    def __init__(self, factor: float, window: int, losses: list[float] | None = None) -> None:
        self.factor = factor
        self.losses: deque[float] = deque(losses or [], maxlen=window)

    def judge(self, loss: float) -> float | None:
        """Returns the median that `loss` is too far above, None for a loss like the others.

        A spike is not remembered: the median stays that of good steps.
        """
        if len(self.losses) >= MIN_HISTORY:
            median = statistics.median(self.losses)
            if loss > self.factor * median > 0:
                return median
        self.losses.append(loss)
        return None


class GradientWatch:
    """Largest magnitude of each gradient as autograd hands it over, on this rank, on the device.

    A stack of experts has one value an expert. Gradients are looked at before ZeRO reduces and
    frees them: afterwards nobody can say which rank a bad value came from.
    """

    def __init__(self, module: nn.Module) -> None:
        ranges = named_ranges(module)
        trained = [p for p in module.parameters() if p.requires_grad]
        self._names: list[list[str]] = []
        self._largest: list[Tensor] = []
        self._handles = []
        for parameter in trained:
            shape = full_shape(parameter)
            rows = shape[0] if len(shape) == 3 else 1
            names = [found.name for found in ranges[id(parameter)]]
            per_row = max(1, len(names) // rows)
            self._names.append(names[::per_row][:rows])
            self._largest.append(torch.zeros(rows, device=parameter.device))
            hook = self._hook(len(self._largest) - 1)
            self._handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            largest = self._largest[index]
            if gradient.numel():
                rows = gradient.detach().reshape(largest.numel(), -1)
                norms = torch.linalg.vector_norm(rows, math.inf, dim=1, dtype=torch.float32)
                torch.maximum(largest, norms.to(largest.device), out=largest)

        return look

    def take(self) -> Tensor:
        """Returns all values since the last call as one tensor (NaN and infinity stay visible)."""
        values = torch.cat(self._largest) if self._largest else torch.zeros(0)
        for largest in self._largest:
            largest.zero_()
        return values

    def name_of(self, index: int) -> str:
        """Returns the hub name of the value at `index` of `take`."""
        for names, largest in zip(self._names, self._largest, strict=True):
            if index < largest.numel():
                return names[min(index, len(names) - 1)]
            index -= largest.numel()
        raise AssertionError("index beyond the values")

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class StepGuard:
    """Both guards, and what they found, for one run."""

    def __init__(
        self,
        engine: Any,
        guards: GuardsSection,
        losses: list[float] | None = None,
        tell: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        self.guards = guards
        self.step = 0
        self.rule = SpikeRule(guards.spike_factor, guards.spike_window, losses)
        self._device = engine.device
        self._watch = GradientWatch(engine.module) if guards.non_finite == "stop" else None
        self._tell = tell

    @property
    def losses(self) -> list[float]:
        return list(self.rule.losses)

    def before_update(self, loss_sum: Tensor, num_micro_batches: int) -> bool:
        """Returns whether this step's update is to be left out; a collective.

        Args:
            loss_sum: float64, this rank's losses of the step.
            num_micro_batches: of all ranks, so that the sum of sums over it is the mean loss.

        Raises GateError on every rank.
        """
        bad = self._last_bad_gradient()
        mine = torch.stack([loss_sum.to(torch.float64), torch.tensor(float(bad)).to(loss_sum)])
        if reached("loss"):
            mine[0] = math.nan
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        reports = torch.stack(gathered).tolist()
        if self._watch is not None:
            self._require_finite(reports)
        return self._skips(sum(loss for loss, _ in reports) / num_micro_batches)

    def _last_bad_gradient(self) -> int:
        """Returns the bad value nearest to the loss, where it began; -1 if all are finite."""
        if self._watch is None:
            return -1
        values = self._watch.take()
        bad = torch.nonzero(~torch.isfinite(values))
        return int(bad[-1]) if len(bad) else -1

    def _require_finite(self, reports: list[list[float]]) -> None:
        # A bad gradient spreads backward, and to other ranks with the tokens of their experts.
        nearest = max(bad for _, bad in reports)
        rank = next((r for r, (_, bad) in enumerate(reports) if bad == nearest >= 0), None)
        what: list[str | None] = [None]
        if rank is not None and rank == dist.get_rank():
            assert self._watch is not None
            what = [f"the gradient of `{self._watch.name_of(int(reports[rank][1]))}`"]
        if rank is not None:
            dist.broadcast_object_list(what, src=rank)
        losses = [loss for loss, _ in reports]
        bad_loss = next((r for r, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad_loss is not None:  # a bad loss makes every gradient bad: it is the cause
            rank, what = bad_loss, [f"the loss ({losses[bad_loss]})"]
        if rank is not None:
            raise GateError(
                f"step {self.step}: {what[0]} of rank {rank} is not finite; "
                "no rank made the update",
                hint="resume from the last checkpoint with a lower `--lr` or a smaller "
                "`optim.gradient_clipping`; `--set guards.non_finite=off` goes on regardless",
            )

    def _skips(self, loss: float) -> bool:
        if self.guards.spike == "off" or not math.isfinite(loss):
            return False
        median = self.rule.judge(loss)
        if median is None:
            return False
        facts = {"step": self.step, "loss": round(loss, 6), "median": round(median, 6)}
        self._tell("spike", **facts, policy=self.guards.spike)
        if self.guards.spike == "stop":
            raise GateError(
                f"step {self.step}: the loss is {loss:.4f}, "
                f"{loss / median:.1f} times the median of the last {len(self.rule.losses)}; "
                "no rank made the update",
                hint="`--set guards.spike=warn` or `skip` goes on",
            )
        return self.guards.spike == "skip"
