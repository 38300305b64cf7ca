"""Runs a module on several ranks in one process tree: heavy imports once, then ranks by fork.

`python -m forked_ranks NUM_RANKS MODULE FOLDER ...`: each rank runs `python -m MODULE FOLDER ...`
with its own RANK and writes to FOLDER/rank-K.log. Exit codes go to FOLDER/codes.json; when a rank
fails, the others are left to whoever kills the group.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path

from preloaded import preload


def be_a_rank(rank: int, module: str, arguments: list[str]) -> None:
    log = os.open(f"{arguments[0]}/rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def wait_for(ranks: dict[int, int]) -> list[int | None]:
    """Returns each rank's exit code, None of those that still ran when one failed."""
    codes: dict[int, int] = {}
    while len(codes) < len(ranks) and not any(codes.values()):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.02)
    return [codes.get(rank) for rank in sorted(ranks.values())]


def main(num_ranks: int, module: str, arguments: list[str]) -> None:
    preload()
    ranks = {}
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            return be_a_rank(rank, module, arguments)
        ranks[pid] = rank
    codes = wait_for(ranks)
    Path(arguments[0], "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
