"""Records of a hub dataset, through `datasets`: streamed in lanes, or downloaded and indexed.

A stream is cut into lanes, fixed pieces of its shards, so that ranks can read different ones. The
lanes depend on the dataset alone, never on the number of ranks, and so does the order of records.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from epctl.errors import ConfigError, EpctlError, HubError, InputError
from epctl.launch.dataset_reference import LOCAL_HINT, PinnedDataset
from epctl.runtime.data_files import NumberedRecord, Record, first_line

# More would be more open connections for a run on few ranks; fewer would make ranks share.
MAX_LANES = 16


class HubRecords:
    """One split of a dataset at its pinned commit. Opened when first read."""

    in_part = True

    def __init__(self, dataset: PinnedDataset) -> None:
        self.dataset = dataset

    @property
    def num_lanes(self) -> int:
        """Lanes of the stream; a downloaded dataset is one, read at any place."""
        with self._errors():
            return min(MAX_LANES, self._rows.num_shards) if self.dataset.streaming else 1

    def records(self, lane: int = 0, first: int = 0, step: int = 1) -> Iterator[NumberedRecord]:
        """Yields records `first`, `first + step` and so on of a lane, with their numbers."""
        with self._errors():
            if self.dataset.streaming:
                rows = self._rows.shard(self.num_lanes, lane).skip(first)
            else:
                rows = self._rows.select(range(min(first, len(self._rows)), len(self._rows), step))
            for place, record in enumerate(rows):
                if self.dataset.streaming and place % step:
                    continue
                number = first + (place if self.dataset.streaming else place * step)
                where = f"lane {lane} record" if self.num_lanes > 1 else "record"
                yield number, Record(f"dataset `{self.dataset}` {where} {number + 1}", record)

    @cached_property
    def _rows(self) -> Any:
        from epctl.hub import offline

        dataset = self.dataset
        rows = load(
            dataset.name,
            name=dataset.config,
            revision=dataset.sha,
            split=dataset.split,
            streaming=dataset.streaming,
        )
        if offline() and not any(dataset.sha in file["filename"] for file in rows.cache_files):
            raise HubError(
                f"`datasets` has another commit of `{dataset.name}` in its cache than "
                f"{dataset.sha}, which this run began with",
                hint="unset HF_HUB_OFFLINE",
            )
        return rows

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns what `datasets` raises, which has no common base, into our errors."""
        try:
            yield
        except EpctlError:
            raise
        except Exception as error:
            raise _explained(self.dataset, error) from None


def _explained(dataset: PinnedDataset, error: Exception) -> EpctlError:
    text = str(error)
    what = f"dataset `{dataset.name}`"
    if "split" in text and ("Available splits" in text or "Should be one of" in text):
        return ConfigError(
            f"{what} has no split `{dataset.split}`: {first_line(error)}",
            hint="name one with `--set data.split=NAME` (`data.eval_split` for `--eval-data`)",
        )
    if "BuilderConfig" in text or "Config name is missing" in text:
        return ConfigError(
            f"{what} has no configuration `{dataset.config}`: {first_line(error)}"
            if dataset.config
            else f"{what} has several configurations: {' '.join(text.split())[:300]}",
            hint=f"name one: `--data {dataset.name}:CONFIG`",
        )
    refused = any(sign in text for sign in ("401", "403", "gated", "restricted"))
    return HubError(
        f"{what}, split `{dataset.split}`: {first_line(error)}",
        hint="accept its terms on its page, then `hf auth login` or set HF_TOKEN"
        if refused
        else f"check the network and try again; or {LOCAL_HINT}",
    )


def load(kind: str, **arguments: Any) -> Any:
    """Returns `datasets.load_dataset(...)`. Raises InputError without the package."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(
            "parquet files and hub datasets need the package `datasets`",
            hint="`pip install 'epctl[train]'`",
        ) from None
    return load_dataset(kind, **arguments)
