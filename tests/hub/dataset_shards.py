"""Parquet files of a small hub dataset; every record says where it stands."""

from __future__ import annotations

import io
from typing import Any


def shard(name: str, num_records: int, key: str = "text") -> bytes:
    """Returns a parquet file of records of many lengths."""
    from datasets import Dataset

    file = io.BytesIO()
    texts = [f"{name} record {n:03d} " + "abcdefgh" * (n % 5) for n in range(num_records)]
    values: list[Any] = texts
    if key == "messages":
        turns = ("user", "assistant")
        values = [[{"role": role, "content": text} for role in turns] for text in texts]
    Dataset.from_dict({key: values}).to_parquet(file)
    return file.getvalue()


def shards(count: int, num_records: int = 40, **options: Any) -> dict[str, bytes]:
    return {
        f"data/train-{n:05d}-of-{count:05d}.parquet": shard(
            f"shard {n}", num_records + n, **options
        )
        for n in range(count)
    }
