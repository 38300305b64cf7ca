"""What a person sees of a run: plan panel, progress, summary. Fed by events alone."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epctl.launch.chart import braille_chart, write_load_png, write_loss_png
from epctl.launch.plan_train import compared_text, memory_text, read_prediction
from epctl.launch.track import Tracker, tracked_values
from epctl.output import Mode, Output, format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

Event = dict[str, Any]
# Numbers that an event holds as null when there is none: a diverged loss, an unmeasured load.
NULLABLE = ("loss", "grad_norm", "expert_load")


class RunView:
    """Renders events as they come: a live bar on a terminal, a plain line a report elsewhere."""

    def __init__(self, output: Output, run_folder: Path, tracker: Tracker | None = None) -> None:
        self.output = output
        self.tracker = tracker
        self.run_folder = run_folder
        self.steps: list[Event] = []
        self.evals: list[Event] = []
        self.samples: dict[str, Event] = {}
        self.choices: list[list[int]] = []
        self.plan: Event = {}
        self.memory: Event | None = None
        self._progress: Progress | None = None
        self._task: Any = None

    def __call__(self, event: Event) -> None:
        self.output.record(event)
        values = tracked_values(event)
        if self.tracker is not None and values:
            self.tracker.log(values, event["step"])
        event = with_numbers(event)
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def close(self) -> None:
        """Stops the live bar and the tracker, so that an error starts on a clean line."""
        if self.tracker is not None:
            self.tracker.close()
            self.tracker = None
        self._stop_bar()

    def _stop_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _on_start(self, event: Event) -> None:
        self.output.note(f"{event['ranks']} ranks are up, building the model")

    def _on_plan(self, event: Event) -> None:
        foreseen = read_prediction(self.run_folder)
        event = event if foreseen is None else {**event, "foreseen": memory_text(foreseen)}
        self.plan = event
        self.output.panel(plan_panel(event))

    def _on_eval(self, event: Event) -> None:
        if event["when"] == "after":
            self._stop_bar()
        self.evals.append(event)
        when = "at step" if event["when"] == "step" else f"{event['when']} training, step"
        self.output.note(f"held-out loss {when} {event['step']}: {event['loss']:.4f}")

    def _on_data(self, event: Event) -> None:
        self.output.note(data_line(event))
        if event["truncated"]:
            self.output.warning(
                f"{event['truncated']} conversations are longer than a sequence and lose their end"
            )
        if event["without_target"]:
            self.output.warning(f"{event['without_target']} records with nothing to learn skipped")

    def _on_loaded(self, event: Event) -> None:
        widened = event["num_widened"]
        self.output.note(
            f"rank 0 read {format_bytes(event['num_bytes'])} of weights in "
            f"{format_seconds(event['seconds'])}"
            + (f", {widened} tensors widened to float32" if widened else "")
        )
        for note in event["notes"]:
            self.output.note(note)

    def _on_checkpoint(self, event: Event) -> None:
        waited = event["waited_seconds"]
        late = f", after waiting {waited:.1f} s for the one before" if waited > 1 else ""
        self.output.note(
            f"checkpoint of step {event['step']}: {format_bytes(event['bytes'])} in "
            f"{format_seconds(event['seconds'])} ({event['gigabytes_per_second']:.2f} GB/s), "
            f"training paused {event['pause_seconds']:.2f} s{late}: {event['folder']}"
        )

    def _on_checkpoint_failed(self, event: Event) -> None:
        self.output.warning(
            f"no checkpoint of step {event['step']}, earlier ones stay: {event['reason']}"
        )

    def _on_resumed(self, event: Event) -> None:
        for rejected in event["rejected"]:
            self.output.warning(
                f"`{rejected['folder']}` is damaged and put aside as `{rejected['moved_to']}`: "
                f"{rejected['reason']}"
            )
        self.output.note(
            f"goes on after step {event['step']} from {event['checkpoint']}: "
            f"{format_bytes(event['bytes'])} of state in {format_seconds(event['seconds'])}"
        )

    def _on_warning(self, event: Event) -> None:
        self.output.warning(event["text"])

    def _on_spike(self, event: Event) -> None:
        done = {"warn": "goes on", "skip": "left out the update", "stop": "stops"}
        self.output.warning(
            f"step {event['step']}: loss {event['loss']:.4f}, median of recent steps "
            f"{event['median']:.4f}; the run {done[event['policy']]}"
        )

    def _on_profile(self, event: Event) -> None:
        self.output.panel(profile_table(event))
        self.output.note(f"trace of {event['steps']} steps: {event['folder']}/trace.json")

    def _on_memory(self, event: Event) -> None:
        self.memory = event

    def _on_sample(self, event: Event) -> None:
        self.samples[event["when"]] = event

    def _on_step(self, event: Event) -> None:
        self.steps.append(event)
        if not self.output.is_terminal:
            self.output.note(step_line(event, self.plan["steps"]))
        elif self.output.mode is Mode.HUMAN:
            self._advance(event)

    def _advance(self, event: Event) -> None:
        if self._progress is None:
            self._start_progress()
        assert self._progress is not None
        self._progress.update(self._task, completed=event["step"], facts=facts(event))

    def _start_progress(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as TimeLeft

        columns = ("step", MofNCompleteColumn(), BarColumn(24), TextColumn("{task.fields[facts]}"))
        console = self.output.console()
        self._progress = Progress(*columns, TimeLeft(), console=console)
        first = self.plan["first_step"]
        total = self.plan["steps"]
        self._task = self._progress.add_task("", total=total, completed=first, facts="")
        self._progress.start()

    def _on_experts(self, event: Event) -> None:
        self.choices = event["choices"]

    def _on_saved(self, event: Event) -> None:
        self.output.note(
            f"saved a Hugging Face folder: {format_bytes(event['bytes'])} in "
            f"{format_seconds(event['seconds'])}"
        )

    def _on_done(self, event: Event) -> None:
        self.close()
        steps = [step["step"] for step in self.steps]
        losses = [step["loss"] for step in self.steps]
        held_out = [(float(event["step"]), event["loss"]) for event in self.evals]
        title = f"{self.plan['model']}, ep {self.plan['ep']}, ZeRO-{self.plan['zero']}"
        try:
            write_loss_png(self.run_folder / "loss.png", steps, losses, held_out, title)
            routed = [step for step in self.steps if step.get("expert_loads")]
            if routed:
                write_load_png(self.run_folder / "expert_load.png", routed, self.choices)
        except (ImportError, OSError, ValueError) as error:  # the run itself is done and saved
            self.output.warning(f"no curve was drawn: {error}")
        if self.output.mode is Mode.HUMAN:
            self._summary(event, steps, losses)

    def _summary(self, event: Event, steps: list[int], losses: list[float]) -> None:
        self.output.text("\ntraining loss\n" + braille_chart(steps, losses))
        for when in ("before", "after"):
            if when in self.samples:
                self.output.text(f"\nsample {when} training:\n" + sample_text(self.samples[when]))
        before, after = self.evals[0]["loss"], self.evals[-1]["loss"]
        mean_rate = sum(s["tokens_per_second"] for s in self.steps) / len(self.steps)
        self.output.text(
            f"\nheld-out loss {before:.4f} -> {after:.4f} "
            f"({format_count(self.steps[-1]['tokens'])} tokens, {mean_rate:,.0f} tokens/s, "
            f"{format_seconds(event['seconds'])} in all)\n"
            + (f"{compared_text(self.memory)}\n" if self.memory is not None else "")
            + f"run folder  {self.run_folder}"
        )
        if (self.run_folder / "loss.png").exists():
            self.output.text(f"curve       {self.run_folder / 'loss.png'}")
        if (self.run_folder / "model").exists():
            self.output.text(f"model       {self.run_folder / 'model'} (loads in transformers)")


def with_numbers(event: Event) -> Event:
    """Returns the event with NaN where a number that may be missing is null."""
    missing = {key: math.nan for key in NULLABLE if key in event and event[key] is None}
    return {**event, **missing}


def facts(event: Event) -> str:
    """Returns what a report says besides the step: loss, speed, memory, expert load."""
    load = "-" if math.isnan(event["expert_load"]) else f"{event['expert_load']:.1f}x"
    return (
        f"loss {event['loss']:.4f}  {event['tokens_per_second']:,.0f} tokens/s  "
        f"{event['seconds_per_step']:.2f} s/step  norm {event['grad_norm']:.2f}  "
        f"{format_bytes(event['memory_bytes'])}  load {load}"
    )


def data_line(event: Event) -> str:
    """Returns what the data came to."""
    dataset = f"{event['dataset']}, " if event.get("dataset") else ""
    share = event["targets"] / max(1, event["tokens"])
    counts = ((event.get(kind, 0), kind) for kind in ("images", "videos"))
    visuals = "".join(f"{count:,} {kind}, " for count, kind in counts if count)
    return (
        f"data: {dataset}{event['documents']:,} documents ({event['format']}), {visuals}"
        f"{format_count(event['tokens'])} tokens, {share:.0%} of them "
        f"targets, {event['rows']:,} sequences and {event['held_out_rows']:,} held out"
    )


def step_line(event: Event, num_steps: int) -> str:
    """Returns the plain line of a report, for logs and pipes."""
    left = (num_steps - event["step"]) * event["seconds_per_step"]
    width = len(str(num_steps))
    step = f"{event['step']:>{width}}/{num_steps}"
    return f"step {step}  {facts(event)}  {format_seconds(left)} left"


def sample_text(event: Event) -> str:
    """Returns prompt and continuation, control characters shown, indented."""
    visible = "".join(
        c if c.isprintable() or c == "\n" else "\N{MIDDLE DOT}" for c in event["text"]
    )
    return textwrap.indent(f"{event['prompt']}[...]{visible}", "    ")


def plan_panel(event: Event) -> Table:
    """Returns the plan as a table: model, layout of ranks, who optimises what, counted bytes."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"epctl train: {event['model']}", box=box.ROUNDED, show_header=False, title_style=""
    )
    for name, value in _plan_rows(event):
        table.add_row(name, value)
    return table


def profile_table(event: Event) -> Table:
    """Returns where the time of the profiled steps went; communication: what work did not hide."""
    from rich import box
    from rich.table import Table

    table = Table(title=f"time of {event['steps']} steps, rank 0", box=box.ROUNDED, title_style="")
    for name in ("part", "ms a step", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for row in event["rows"]:
        table.add_row(row["part"], f"{row['ms'] / event['steps']:,.1f}", f"{row['share']:.1%}")
    return table


def _frozen_row(event: Event) -> list[tuple[str, str]]:
    if not event["num_frozen"]:
        return []
    count = format_count(event["num_frozen"])
    why = f"trained: {event['trained']}"
    if event["trained"] == "all":  # a vision tower's last layer, where an earlier one is looked at
        why = "no loss reaches them"
    return [("frozen", f"{count} parameters ({why}), no optimizer state")]


def _sequence(event: Event) -> str:
    """Returns how many ranks share a sample, nothing for one."""
    size = event.get("sp", 1)
    return f"sp {size}, " if size > 1 else ""


def _experts(event: Event) -> str:
    if not event["num_experts"]:
        return "no routed experts"
    return (
        f"{event['num_experts']} experts, top-{event['top_k']}, route scale {event['route_scale']}"
    )


def _local_experts_row(event: Event) -> list[tuple[str, str]]:
    if not event["num_experts"]:
        return []
    parameters = format_count(event["num_expert_parameters_rank"])
    return [
        ("on each rank", f"{event['num_local_experts']} experts a layer ({parameters} parameters)")
    ]


def _plan_rows(event: Event) -> list[tuple[str, str]]:
    bytes_total = (
        event["bytes_parameters"] + event["bytes_masters"] + event["bytes_optimizer_state"]
    )
    return [
        (
            "model",
            f"{event['architecture']}, {event['num_layers']} layers, {_experts(event)}",
        ),
        (
            "parallel",
            f"{event['num_ranks']} {event['device']} ranks ({event['backend']}), "
            f"ep {event['ep']} x edp {event['edp']}, {_sequence(event)}ZeRO-{event['zero']}, "
            f"{event['dtype']}",
        ),
        ("parameters", f"{format_count(event['num_parameters'])} in all"),
        *_local_experts_row(event),
        (
            "Muon",
            f"{format_count(event['num_muon'])} parameters in "
            f"{event['num_muon_matrices']:,} matrices; rank 0 owns "
            f"{event['num_owned_matrices']:,} and sends "
            f"{format_bytes(event['num_sent_bytes'])} a step",
        ),
        ("AdamW", f"{format_count(event['num_adamw'])} parameters"),
        *_frozen_row(event),
        (
            "state a rank",
            f"{format_bytes(bytes_total)}: parameters {format_bytes(event['bytes_parameters'])}, "
            f"masters {format_bytes(event['bytes_masters'])}, "
            f"optimizer {format_bytes(event['bytes_optimizer_state'])} (counted)",
        ),
        *([("memory a rank", event["foreseen"])] if "foreseen" in event else []),
    ]
