"""Each rank's rows of hub datasets: prepared, drawn by position, and read on further.

A case is `{"name", "num_steps": [...], "data": {...}, "train": {...}}`; the steps are the lengths
of one run that is continued in its folder. The dataset is pinned in the folder by the caller.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from epctl.config import RunConfig
from epctl.runtime import data_reading
from epctl.runtime.data_prepare import load_data
from epctl.runtime.default_model import VOCAB_SIZE, byte_tokenizer
from epctl.runtime.leave import leave
from epctl.runtime.run_settings import rows_per_step

READ: list[str] = []
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"


def count_reads() -> None:
    """Notes where every record that this rank is given stands."""
    until = data_reading._Cursor.until

    def counted(cursor: Any, stop: int | None) -> Any:
        for number, record in until(cursor, stop):
            READ.append(record[0])
            yield number, record

    data_reading._Cursor.until = counted  # type: ignore[method-assign]


def run(case: dict[str, Any], folder: Path, mesh: Any) -> list[dict[str, Any]]:
    results = []
    for num_steps in case["num_steps"]:
        READ.clear()
        config = RunConfig.model_validate(
            {
                "data": {"train": ["org/data"], "shuffle_window": 8, **case.get("data", {})},
                "train": {
                    "steps": num_steps, "sequence_length": 64, "micro_batch_size": 1,
                    "eval_batches": 1, **case.get("train", {}),
                },
            }
        )  # fmt: skip
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        data, facts = load_data(config, folder / "data", mesh, tokenizer, VOCAB_SIZE)
        global_rows = num_steps * rows_per_step(config.train, mesh.num_ranks)
        mine = range(mesh.rank, global_rows, mesh.num_ranks)
        results.append(
            {
                "facts": vars(facts),
                "read": list(READ),
                "rows": {n: data.train_batch(n, 1).ids_BS[0].tolist() for n in mine},
                "held_out": data.held_out_batch(0, 1).ids_BS[0].tolist(),
            }
        )
    return results


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    data_reading.ROUND_RECORDS = 4
    count_reads()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=90))
    size = dist.get_world_size()
    mesh = SimpleNamespace(rank=dist.get_rank(), num_ranks=size, num_data_ranks=size)
    results = {case["name"]: run(case, folder / case["name"], mesh) for case in cases}
    (folder / f"rank-{mesh.rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave(0)
