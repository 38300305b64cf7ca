"""Runs many short trainings in one process tree: heavy imports once, then ranks by fork.

`python -m forked_runs SCENARIOS_JSON`: each scenario is a prepared run folder, a number of ranks
and planted faults. Ranks run `epctl.runtime.worker` as torchrun would start it. Prints one line of
JSON a scenario: the exit code of each rank.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from parity_ranks import tiny_config
from preloaded import preload

from epctl.launch.ports import free_port
from epctl.runtime import default_model, faults, leave, train, worker

SECONDS = 240.0


def tiny_model_config() -> Any:
    return tiny_config(
        vocab_size=default_model.VOCAB_SIZE,
        bos_token_id=default_model.BOS,
        eos_token_id=default_model.EOS,
        pad_token_id=default_model.PAD,
        architectures=["DeepseekV3ForCausalLM"],
    )


def be_a_rank(scenario: dict[str, Any], rank: int, port: int, meeting: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(scenario["num_ranks"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        faults.VARIABLE: scenario.get("fault", ""),
        faults.MEETING_VARIABLE: meeting,
    }
    default_model.default_config = tiny_model_config
    if scenario.get("no_preflight"):
        train.require_disk_space = lambda *arguments: None
    if scenario.get("poison") and rank == scenario["poison"]["rank"]:
        train.create_engine = poisoned(train.create_engine, scenario["poison"]["step"])
    leave.leave(worker.main(Path(scenario["run"]), "train"))


def poisoned(create_engine: Any, step: int) -> Any:
    """Returns `create_engine` of a model whose head gets an infinite gradient in one step."""

    def create(module: Any, *arguments: Any) -> Any:
        created = create_engine(module, *arguments)
        passes = [0]

        def poison(head: Any, inputs: Any, output: Any) -> None:
            if output.requires_grad:
                passes[0] += 1
                if passes[0] == step:
                    output.register_hook(lambda gradient: gradient * float("inf"))

        created[0].module.lm_head.register_forward_hook(poison)
        return created

    return create


def run(scenario: dict[str, Any]) -> list[int]:
    """Returns the ranks' exit codes, negative for a signal; a hang ends in SIGKILL for all."""
    port, meeting = free_port(), tempfile.mkdtemp(prefix="meeting")
    children = {}
    for rank in range(scenario["num_ranks"]):
        pid = os.fork()
        if pid == 0:
            be_a_rank(scenario, rank, port, meeting)
        children[pid] = rank
    codes: dict[int, int] = {}
    deadline = time.monotonic() + SECONDS
    while len(codes) < len(children):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[children[pid]] = os.waitstatus_to_exitcode(status)
            if codes[children[pid]] != 0:  # as torchrun does, after what others need to notice
                deadline = min(deadline, time.monotonic() + scenario.get("patience", 60.0))
        elif time.monotonic() > deadline:
            for child, rank in children.items():
                if rank not in codes:
                    os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.02)
    shutil.rmtree(meeting)
    return [codes[rank] for rank in sorted(codes)]


if __name__ == "__main__":
    preload()
    for wanted in json.loads(sys.argv[1]):
        started = time.monotonic()
        result = {"name": wanted["name"], "codes": run(wanted)}
        result["seconds"] = round(time.monotonic() - started, 2)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
