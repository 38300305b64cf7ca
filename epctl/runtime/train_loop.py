"""The training loop: steps, reports, evaluations and checkpoints, in an order fixed by the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from epctl.config import RunConfig
from epctl.runtime.data_batch import Batch, TrainingData
from epctl.runtime.engine import train_step
from epctl.runtime.evaluate import held_out_loss, sample_continuation
from epctl.runtime.events import EventLog
from epctl.runtime.mesh import Mesh
from epctl.runtime.profile import StepProfiler, profiled
from epctl.runtime.report import attention_facts, expert_load, peak_memory
from epctl.runtime.run_settings import rows_per_step, tokens_per_step

PROMPT_TOKENS = 64


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
    save_checkpoint: Callable[[int], None] = field(default=lambda step: None)
    profiler: StepProfiler | None = None

    def run(self, first_step: int = 0) -> None:
        """Trains from `first_step` (0 for a fresh run) to the end."""
        train = self.config.train
        clock = _Clock(tokens_per_step(train, self.mesh.num_ranks))
        for step in range(first_step, train.steps):
            with profiled(self.profiler, step, self.events):
                batches = list(self.batches(step))
                loss, norm = train_step(
                    self.engine, self.scheduler, batches, self.config, self.mesh
                )
            done = step + 1
            clock.tick()
            if done % train.report_every == 0 or done in (first_step + 1, train.steps):
                self._report(done, loss, norm, clock)
            if train.eval_every and done % train.eval_every == 0 and done < train.steps:
                self.evaluate("step", done)
                clock.restart()
            every = self.config.run.checkpoint_every
            if every and (done % every == 0 or done == train.steps):
                self.save_checkpoint(done)
                clock.restart()

    def batches(self, step: int) -> Iterator[Batch]:
        """Yields this rank's micro-batches: the global batch depends on the step alone."""
        train = self.config.train
        first = step * rows_per_step(train, self.mesh.num_ranks)
        yield from self._micro_batches(self.data.train_batch, first, _accumulation(self.config))

    def _micro_batches(
        self, draw: Callable[[int, int], Batch], first: int, count: int
    ) -> Iterator[Batch]:
        size = self.config.train.micro_batch_size
        for micro_step in range(count):
            place = micro_step * self.mesh.num_ranks + self.mesh.rank
            yield draw(first + place * size, size)

    def evaluate(self, when: str, step: int) -> None:
        """Writes the held-out loss."""
        count = self.config.train.eval_batches
        batches = self._micro_batches(self.data.held_out_batch, 0, count)
        loss = held_out_loss(self.engine, batches)
        self.events.write("eval", when=when, step=step, loss=round(loss, 6))

    def sample(self, when: str) -> None:
        """Writes a sampled continuation of a held-out prompt."""
        train = self.config.train
        if not train.sample_tokens:
            return
        prompt = self.data.prompt(PROMPT_TOKENS)
        ids = sample_continuation(self.engine, prompt, train.sample_tokens, seed=train.seed)
        self.events.write("sample", when=when, prompt=self._text(prompt), text=self._text(ids))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _report(self, done: int, loss: float, norm: float, clock: _Clock) -> None:
        seconds = clock.seconds_per_step()
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
            expert_load=round(expert_load(self.engine), 3),
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
