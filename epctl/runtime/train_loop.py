"""The training loop: steps, reports, evaluations and checkpoints, in an order fixed by the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from epctl.config import RunConfig
from epctl.interval import parse_interval
from epctl.runtime.checkpoint_progress import Progress
from epctl.runtime.checkpoint_save import Checkpointer
from epctl.runtime.data_batch import Batch, TrainingData
from epctl.runtime.engine import train_step
from epctl.runtime.evaluate import held_out_loss, sample_continuation
from epctl.runtime.events import EventLog
from epctl.runtime.faults import reached
from epctl.runtime.guards import StepGuard
from epctl.runtime.mesh import Mesh
from epctl.runtime.profile import StepProfiler, profiled
from epctl.runtime.read_ahead import ReadAhead
from epctl.runtime.report import attention_facts, peak_memory
from epctl.runtime.routing_report import Routing, take_routing
from epctl.runtime.run_settings import rows_per_step, tokens_per_step
from epctl.runtime.stop_request import StopRequest
from epctl.runtime.visual_rows import VisualData
from epctl.runtime.watchdog import Watchdog

PROMPT_TOKENS = 64


class RunStopped(Exception):
    """SIGTERM or SIGUSR1 reached some rank; all have finished step `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass
class TrainLoop:
    """Everything a step needs; `config.train.steps` is the length of the whole run."""

    engine: Any
    scheduler: Any
    config: RunConfig
    mesh: Mesh
    data: TrainingData
    events: EventLog
    tokenizer: Any
    guard: StepGuard | None = None
    checkpointer: Checkpointer | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    watchdog: Watchdog | None = None
    profiler: StepProfiler | None = None
    first_step: int = 0
    first_row: int = 0
    saved_step: int = -1

    def __post_init__(self) -> None:
        self.step = self.first_step
        self._interval = parse_interval(self.config.checkpoint.every)
        self._last_save = time.monotonic()
        self._ahead: ReadAhead[list[Batch]] | None = None
        self.routing = Routing({})  # of the last report

    def begin_at(self, progress: Progress) -> None:
        """Goes on where a checkpoint stands."""
        self.first_step, self.first_row = progress.step, progress.rows
        self.step = self.saved_step = progress.step

    def run(self) -> None:
        """Trains from the first step (0 for a fresh run) to the end.

        Raises RunStopped on every rank when one was asked to end, GateError when a guard fires.
        """
        train = self.config.train
        clock = _Clock(tokens_per_step(train, self.mesh.num_data_ranks))
        for step in range(self.first_step, train.steps):
            with profiled(self.profiler, step, self.events):
                loss, norm = self._train_step(step)
            self.step = done = step + 1
            clock.tick()
            if done % train.report_every == 0 or done in (self.first_step + 1, train.steps):
                self._report(done, loss, norm, clock)
            is_due = self._agree_on_what_follows()
            if train.eval_every and done % train.eval_every == 0 and done < train.steps:
                self.evaluate("step", done)
                clock.restart()
            if is_due or (self._interval is not None and done == train.steps):
                self.save_checkpoint()
                clock.restart()

    def _train_step(self, step: int) -> tuple[float, float]:
        self.enter("data", step + 1)
        reached("data")
        batches = self._step_batches(step)
        if self.guard is not None:
            self.guard.step = step + 1
        return train_step(
            self.engine, self.scheduler, batches, self.config, self.mesh, self.guard, self.enter
        )

    def _step_batches(self, step: int) -> list[Batch]:
        if not isinstance(self.data, VisualData):  # token ids lie in memory
            return list(self.batches(step))
        if self._ahead is None:
            last_step = self.config.train.steps - 1
            self._ahead = ReadAhead(lambda number: list(self.batches(number)), last_step)
        return self._ahead.take(step)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Tells the watchdog what this rank does from now on."""
        if self.watchdog is not None:
            self.watchdog.enter(phase, step)

    def _agree_on_what_follows(self) -> bool:
        """Returns whether a checkpoint is due; a collective, so that all ranks do the same.

        Raises RunStopped, and what made a save fail, on all of them.
        """
        self.enter("agreement")
        interval, waited = self._interval, time.monotonic() - self._last_save
        by_clock = interval is not None and interval.seconds is not None
        # Clocks differ: rank 0's decides. Steps are the same everywhere.
        due = (
            interval is not None
            and interval.is_due(self.step, waited)
            and (self.mesh.rank == 0 or not by_clock)
        )
        failed = self.checkpointer is not None and self.checkpointer.has_failed
        stopping, failed, due = self._any_rank(self.stop.number is not None, failed, due)
        if failed and self.checkpointer is not None:
            self.checkpointer.finish()
        if stopping:
            raise RunStopped(self.step)
        return due

    def _any_rank(self, *answers: bool) -> list[bool]:
        flags = torch.tensor(answers, dtype=torch.int32, device=self.engine.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]

    def save_checkpoint(self) -> None:
        """Begins to save the step that was finished last, unless it is saved already."""
        if self.checkpointer is None or self.saved_step == self.step:
            return
        self.enter("save")
        self.checkpointer.save(self.progress())
        self.saved_step = self.step
        self._last_save = time.monotonic()

    def progress(self) -> Progress:
        """Returns where the run stands."""
        rows = rows_per_step(self.config.train, self.mesh.num_data_ranks)
        return Progress(
            step=self.step,
            rows=self.first_row + (self.step - self.first_step) * rows,
            global_steps=self.engine.global_steps,
            losses=self.guard.losses if self.guard is not None else [],
        )

    def batches(self, step: int) -> Iterator[Batch]:
        """Yields this rank's micro-batches: the global batch depends on the step alone."""
        train = self.config.train
        rows = rows_per_step(train, self.mesh.num_data_ranks)
        first = self.first_row + (step - self.first_step) * rows
        yield from self._micro_batches(self.data.train_batch, first, _accumulation(self.config))

    def _micro_batches(
        self, draw: Callable[[int, int], Batch], first: int, count: int
    ) -> Iterator[Batch]:
        size = self.config.train.micro_batch_size
        for micro_step in range(count):
            place = micro_step * self.mesh.num_data_ranks + self.mesh.data_rank
            yield draw(first + place * size, size)

    def evaluate(self, when: str, step: int) -> None:
        """Writes the held-out loss; raises RunStopped as soon as a rank is asked to end."""
        loss = held_out_loss(self.engine, self._held_out_batches(), self.mesh.sp_size)
        self.events.write("eval", when=when, step=step, loss=round(loss, 6))

    def _held_out_batches(self) -> Iterator[Batch]:
        count = self.config.train.eval_batches
        for batch in self._micro_batches(self.data.held_out_batch, 0, count):
            self.enter("evaluation data")
            reached("eval")
            self.enter("evaluation")
            yield batch
            if self._any_rank(self.stop.number is not None)[0]:
                raise RunStopped(self.step)

    def sample(self, when: str) -> None:
        """Writes a sampled continuation of a held-out prompt."""
        train = self.config.train
        if not train.sample_tokens:
            return
        prompt = self.data.prompt(PROMPT_TOKENS)
        images = self.data.prompt_inputs(PROMPT_TOKENS)
        ids = sample_continuation(
            self.engine, prompt, train.sample_tokens, seed=train.seed, images=images
        )
        self.events.write("sample", when=when, prompt=self._text(prompt), text=self._text(ids))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _report(self, done: int, loss: float, norm: float, clock: _Clock) -> None:
        seconds = clock.seconds_per_step()
        self.routing = take_routing(self.engine)
        self.events.write(
            "step",
            step=done,
            loss=round(loss, 6),
            grad_norm=round(norm, 6),
            lr=self.scheduler.get_last_lr()[0],
            seconds_per_step=round(seconds, 4),
            tokens_per_second=round(clock.tokens_per_step / seconds, 1),
            tokens=clock.tokens_per_step * done,
            memory_bytes=peak_memory(self.engine.device),
            **self.routing.facts,
            **attention_facts(self.scheduler.optimizer),
        )


def _accumulation(config: RunConfig) -> int:
    return config.train.gradient_accumulation_steps


class _Clock:
    """Seconds a step since the last report, without evaluations and checkpoints."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self._steps = 0
        self._seconds = 0.0
        self._last = time.perf_counter()

    def tick(self) -> None:
        now = time.perf_counter()
        self._steps += 1
        self._seconds += now - self._last
        self._last = now

    def restart(self) -> None:
        self._last = time.perf_counter()

    def seconds_per_step(self) -> float:
        """Returns the mean since the last call."""
        mean = self._seconds / max(1, self._steps)
        self._steps, self._seconds = 0, 0.0
        return mean
