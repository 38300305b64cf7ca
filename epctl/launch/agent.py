"""Runs torchrun in this process and writes down which ranks failed and how.

`python -m epctl.launch.agent RUN_FOLDER TORCHRUN_ARGUMENTS...`; torchrun itself would exit 1 for
whatever a rank did, and say which only in prose.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from pathlib import Path
from types import FrameType

FILE_NAME = "failed-ranks.json"
HANDLED_BY_TORCHRUN = "SIGINT,SIGHUP,SIGQUIT"


def main(run_folder: Path, arguments: list[str]) -> int:
    """Returns 0, or 1 after writing `logs/failed-ranks.json` with each failed rank's exit code.

    A scheduler that signals every process of a job signals this one too. torchrun would end the
    ranks 30 seconds later whatever they write; here the requests to end are left to the ranks and
    to the launcher, which knows how long they may take.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    end_with_parent(signal.SIGKILL)  # and the ranks with this process
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _leave_to_the_ranks)
    try:
        run.main([f"--signals-to-handle={HANDLED_BY_TORCHRUN}", *arguments])
    except ChildFailedError as error:
        failed = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
        (run_folder / "logs" / FILE_NAME).write_text(json.dumps(failed), encoding="utf-8")
        return 1
    return 0


def _leave_to_the_ranks(number: int, frame: FrameType | None) -> None:
    pass


def end_with_parent(number: signal.Signals) -> None:
    """Asks Linux to send this process a signal when its parent dies, however that dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # 1 is PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
