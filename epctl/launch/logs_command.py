"""The body of `epctl logs RUN`: what a run did, why it ended, where to look, how to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from epctl.config import ResolvedConfig
from epctl.errors import InputError
from epctl.launch.failure import explain_failure
from epctl.output import Output, format_bytes, format_seconds
from epctl.runtime.run_checkpoints import committed_checkpoints

FILES = {
    "config.json": "settings, each with its source",
    "ds_config.json": "the DeepSpeed JSON",
    "command.txt": "the command that started the ranks",
    "model.json": "the model and its commit",
    "metrics.jsonl": "every event",
    "loss.png": "the loss curve",
    "model": "the trained model, Hugging Face format",
}


def show_logs(run_folder: Path, output: Output, *, rank: int | None, num_lines: int) -> None:
    """Shows the state of a run, or the end of one rank's log.

    Raises InputError if the folder is no run or the rank has no log.
    """
    if not (run_folder / "config.json").is_file():
        raise InputError(
            f"`{run_folder}` is no run folder: it has no config.json",
            hint="`epctl train` names the folder at its end",
        )
    if rank is not None:
        _show_rank(run_folder, rank, num_lines, output)
        return
    document = describe_run(run_folder)
    output.document(document)
    output.text("\n".join(_lines(run_folder, document)))


def _show_rank(run_folder: Path, rank: int, num_lines: int, output: Output) -> None:
    path = run_folder / "logs" / f"rank-{rank}.log"
    if not path.is_file():
        known = sorted(p.name for p in (run_folder / "logs").glob("rank-*.log"))
        raise InputError(
            f"`{path}` does not exist", hint=f"there are: {', '.join(known) or 'none'}"
        )
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]
    output.document({"rank": rank, "path": str(path), "lines": lines})
    output.text("\n".join(lines))


def describe_run(run_folder: Path) -> dict[str, Any]:
    """Returns the run's state, steps, restarts, files, logs and how to resume it."""
    events = read_events(run_folder / "metrics.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    plans = [event for event in events if event["event"] == "plan"]
    state, failure = _state(run_folder, events)
    checkpoints = [str(path) for path in committed_checkpoints(run_folder)]
    resolved = ResolvedConfig.from_json((run_folder / "config.json").read_text("utf-8"))
    return {
        "run": str(run_folder),
        "state": state,
        "failure": failure,
        "step": steps[-1]["step"] if steps else 0,
        "steps": plans[-1]["steps"] if plans else None,
        "loss": steps[-1]["loss"] if steps else None,
        "seconds": round(events[-1]["time"] - events[0]["time"], 1) if events else 0.0,
        "starts": sum(event["event"] == "start" for event in events),
        "given": resolved.given(),
        "files": {name: FILES[name] for name in FILES if (run_folder / name).exists()},
        "logs": {p.name: p.stat().st_size for p in sorted((run_folder / "logs").glob("*.log"))},
        "checkpoints": checkpoints,
        "resume": f"epctl train --resume {run_folder}" if checkpoints else None,
    }


def read_events(path: Path) -> list[dict[str, Any]]:
    """Returns the events of a run; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def _state(run_folder: Path, events: list[dict[str, Any]]) -> tuple[str, str | None]:
    """Returns `done`, `failed` with the reason, or `running or stopped`; the last event decides."""
    if events and events[-1]["event"] == "done":
        return "done", None
    logs = run_folder / "logs"
    if (logs / "failed-ranks.json").exists() or any(logs.glob("failure-rank-*.json")):
        return "failed", explain_failure(run_folder).message
    return "running or stopped", None


def _lines(run_folder: Path, document: dict[str, Any]) -> list[str]:
    total = f" of {document['steps']}" if document["steps"] is not None else ""
    loss = f", loss {document['loss']:.4f}" if document["loss"] is not None else ""
    lines = [
        f"state        {document['state']}, step {document['step']}{total}{loss}, "
        f"{format_seconds(document['seconds'])}"
    ]
    if document["failure"]:
        lines.append(f"failure      {document['failure']}")
    if document["starts"] > 1:
        lines.append(f"starts       {document['starts']} (restarted or resumed)")
    given = " ".join(f"{key}={value}" for key, value in document["given"].items())
    lines.append(f"given        {given or 'nothing: all defaults'}")
    lines += [
        f"file         {run_folder / name}: {what}" for name, what in document["files"].items()
    ]
    lines += [
        f"log          {run_folder / 'logs' / name} ({format_bytes(size)})"
        for name, size in document["logs"].items()
    ]
    lines += [f"checkpoint   {path}" for path in document["checkpoints"]]
    if document["resume"] is not None and document["state"] != "done":
        lines.append(f"resume       {document['resume']}")
    return lines
