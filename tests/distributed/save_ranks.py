"""Two ranks save a ZeRO-3 model while one of them fails at each place; run by test_save.py."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from seams_ranks import make

from epctl.runtime import checkpoint, checkpoint_files
from epctl.runtime import deepspeed_seams as seams
from epctl.runtime.checkpoint_files import TensorWriter
from epctl.runtime.leave import leave


def outcome(folder: Path, save: Callable[[Path], object]) -> dict[str, Any]:
    """Returns what `save` raised on this rank and what it left in `folder`."""
    folder.mkdir(exist_ok=True)
    raised, message = "", ""
    try:
        save(folder / "model")
    except Exception as error:
        raised, message = type(error).__name__, str(error)
    dist.barrier()
    left = sorted(path.name for path in folder.glob("*"))
    dist.barrier()
    return {"raised": raised, "message": message, "left": left}


def main(folder: Path) -> None:
    seams.initialize_distributed("cpu", datetime.timedelta(seconds=30))
    rank = dist.get_rank()
    _, mesh, engine, _, _ = make(3, 2)
    checkpoint_files.SHARD_BYTES = 1  # a file a tensor, so that a failure falls between gatherings

    def save(path: Path, extras: Callable[[Path], None] = lambda staging: None) -> None:
        checkpoint.save_model(engine.module, mesh, path, extras)

    result = {}
    open_file = TensorWriter._open_file

    def full_disk(self: TensorWriter, number: int) -> None:
        if dist.get_rank() == 1 and number == 2:
            raise OSError(28, "No space left on device")
        open_file(self, number)

    TensorWriter._open_file = full_disk  # type: ignore[method-assign]
    result["full_disk"] = outcome(folder / "full", save)
    TensorWriter._open_file = open_file  # type: ignore[method-assign]

    def broken_extras(staging: Path) -> None:
        raise ValueError("the tokenizer cannot be saved")

    result["extras"] = outcome(folder / "extras", lambda path: save(path, broken_extras))
    (folder / "file").write_text("in the way")
    result["staging"] = outcome(folder / "staging", lambda path: save(folder / "file" / "model"))
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "model.tmp":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    if rank == 0:
        (folder / "replace" / "model").mkdir(parents=True)
        (folder / "replace" / "model" / "earlier").write_text("kept")
    Path.rename = refuse  # type: ignore[method-assign]
    result["replace"] = outcome(folder / "replace", save)
    Path.rename = rename  # type: ignore[method-assign]
    result["kept"] = (folder / "replace" / "model" / "earlier").exists()
    dist.barrier()
    result["good"] = outcome(folder / "replace", save)
    result["replaced"] = sorted(path.name for path in (folder / "replace" / "model").glob("*e*"))
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    os.environ.setdefault("RANK", "0")
    main(Path(sys.argv[1]))
    leave(0)
