"""`python -m unlucky_ranks FOLDER WHAT`: rank 1 does WHAT, rank 0 waits for something else."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def main(folder: Path, what: str) -> None:
    rank = os.environ["RANK"]
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if rank == "1" and what == "raise":
        raise RuntimeError("the unlucky one")
    if rank == "1" and what == "exit":
        sys.exit(7)
    time.sleep(200)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
