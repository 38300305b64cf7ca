"""Saving a run: a short pause for the copy, then a thread that writes while training goes on.

The thread agrees with those of the other ranks over a gloo group of its own, so it never meets the
trainer's collectives. One save runs at a time: the next waits for it and says how long.
"""

from __future__ import annotations

import datetime
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from epctl.config import RunConfig
from epctl.convert.writer import sync_folder, write_synced
from epctl.errors import ResourceError
from epctl.runtime import checkpoint_files
from epctl.runtime.checkpoint import agree, attempt, make_staging, shard_stem, write_index
from epctl.runtime.checkpoint_files import TensorWriter
from epctl.runtime.checkpoint_manifest import (
    FileRecord,
    Topology,
    manifest_document,
    manifest_text,
    record_of,
)
from epctl.runtime.checkpoint_progress import PROGRESS_NAME, Progress
from epctl.runtime.checkpoint_snapshot import Snapshot, take_snapshot
from epctl.runtime.events import EventLog
from epctl.runtime.faults import reached
from epctl.runtime.host_copy import HostCopy
from epctl.runtime.mesh import Mesh
from epctl.runtime.run_checkpoints import (
    MODEL_FOLDER,
    STATE_FOLDER,
    checkpoint_folder,
    publish,
    purge,
)
from epctl.runtime.training_model import TrainingModel


@dataclass
class _Timing:
    """Seconds of a save as the events report them."""

    started: float
    waited: float
    pause: float


class Checkpointer:
    """Saves one run's checkpoints; every rank has one and calls it at the same steps."""

    def __init__(
        self,
        run_folder: Path,
        config: RunConfig,
        mesh: Mesh,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        model: TrainingModel,
        events: EventLog,
    ) -> None:
        self.run_folder = run_folder
        self.config = config
        self.mesh = mesh
        self.engine = engine
        self.optimizer = optimizer
        self.model = model
        self.events = events
        timeout = datetime.timedelta(minutes=config.parallel.timeout_minutes)
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._host = HostCopy(engine.device)
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(self, progress: Progress) -> Path:
        """Copies everything to the host and begins to write `checkpoints/step-N`. Collective.

        Waits for an earlier save first, and for this one unless it is asynchronous.

        Raises what stopped an earlier save, if that was not a full disk that the run may ignore.
        """
        before = time.perf_counter()
        self.finish()
        started = time.perf_counter()
        snapshot = take_snapshot(self.engine, self.optimizer, self.mesh, self._host)
        pause = time.perf_counter() - started
        timing = _Timing(started, started - before, pause)
        folder = checkpoint_folder(self.run_folder, progress.step)
        self._thread = threading.Thread(
            target=self._write, args=(folder, snapshot, progress, timing), name="checkpoint"
        )
        self._thread.daemon = True  # a rank that fails does not wait for its peers
        self._thread.start()
        if not self.config.checkpoint.asynchronous:
            self.finish()
        return folder

    def finish(self) -> None:
        """Waits for the running save, if any; raises what stopped it as `save` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    @property
    def has_failed(self) -> bool:
        """True once the running save has failed on this rank; ranks learn of it at different times.

        So the trainer agrees on it before anyone calls `raise_failure`.
        """
        return self._failure is not None

    def raise_failure(self) -> None:
        """Raises what stopped the last save; a full disk only where the run is to stop for it."""
        failure, self._failure = self._failure, None
        if failure is None:
            return
        if isinstance(failure, ResourceError) and self.config.checkpoint.on_full_disk != "stop":
            return
        raise failure

    # --- in the thread ------------------------------------------------------------------------

    def _write(self, folder: Path, snapshot: Snapshot, progress: Progress, timing: _Timing) -> None:
        try:
            num_bytes = self._write_and_commit(folder, snapshot, progress)
        except Exception as error:
            self._failure = error
            self.events.write("checkpoint_failed", step=progress.step, reason=str(error))
            return
        seconds = time.perf_counter() - timing.started
        self.events.write(
            "checkpoint",
            step=progress.step,
            folder=str(folder),
            bytes=num_bytes,
            pause_seconds=round(timing.pause, 4),
            seconds=round(seconds, 4),
            waited_seconds=round(timing.waited, 4),
            gigabytes_per_second=round(num_bytes / seconds / 1e9, 4),
            host_bytes=self._host.num_bytes,
        )
        if self.mesh.rank == 0:
            for problem in purge(self.run_folder, self.config.checkpoint.keep):
                self.events.write("warning", text=problem)

    def _write_and_commit(self, folder: Path, snapshot: Snapshot, progress: Progress) -> int:
        staging = folder.with_name(folder.name + ".tmp")
        failure = attempt(_make_folders, staging) if self.mesh.rank == 0 else None
        self._agree(staging, failure)
        written = _Written()
        failure = attempt(self._write_share, staging, snapshot, written)
        if self.mesh.rank == 0:
            failure = failure or attempt(self._write_extras, staging, progress, written)
        parts = self._agree(staging, failure or attempt(reached, "before agreement"), written)
        failure = attempt(reached, "before manifest")
        if self.mesh.rank == 0:
            failure = failure or attempt(self._commit, folder, staging, progress, parts)
        else:
            failure = failure or attempt(_pass_commit)
        self._agree(staging, failure)
        return sum(part.num_bytes for part in parts)

    def _agree(self, staging: Path, failure: Exception | None, part: Any = None) -> list[Any]:
        return agree(self.mesh, staging, failure, part, self._group)

    def _write_share(self, staging: Path, snapshot: Snapshot, written: _Written) -> None:
        reached("before write")
        rank = self.mesh.rank
        stems = {MODEL_FOLDER: shard_stem(rank), STATE_FOLDER: f"rank-{rank:05d}"}
        for part, stem in stems.items():
            items = getattr(snapshot, part)
            entries = [entry for entry, _ in items]
            writer = TensorWriter(staging / part, stem, entries, checkpoint_files.SHARD_BYTES)
            for entry, pieces in items:
                writer.add(entry.name, pieces)
            writer.close()
            written.files |= {f"{part}/{name}": r for name, r in writer.records.items()}
            if part == MODEL_FOLDER:
                written.index = writer.index
                written.model_bytes = writer.num_tensor_bytes

    def _write_extras(self, staging: Path, progress: Progress, written: _Written) -> None:
        """Writes config and tokenizer, and where the run stands."""
        dtype = next(self.engine.module.parameters()).dtype
        self.model.write_extras(staging / MODEL_FOLDER, dtype)
        write_synced(staging / STATE_FOLDER / PROGRESS_NAME, progress.to_json())

    def _commit(
        self, folder: Path, staging: Path, progress: Progress, parts: list[_Written]
    ) -> None:
        model_bytes = sum(part.model_bytes for part in parts)
        write_index(staging / MODEL_FOLDER, [part.index for part in parts], model_bytes)
        files = {path: record for part in parts for path, record in part.files.items()}
        for path in sorted(staging.glob("*/*")):
            name = str(path.relative_to(staging))
            if name not in files:  # config, tokenizer, index: small
                sync_folder(path)
                files[name] = record_of(path)
        for subfolder in (MODEL_FOLDER, STATE_FOLDER):
            sync_folder(staging / subfolder)
        mesh, parallel = self.mesh, self.config.parallel
        document = manifest_document(
            progress.step,
            Topology(mesh.num_ranks, mesh.ep_size, parallel.zero),
            self._model_facts(),
            files,
            optimizer=self.config.optim.name,
            data={"rows": progress.rows, "seed": self.config.train.seed},
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        publish(staging, folder, manifest_text(document))

    def _model_facts(self) -> dict[str, Any]:
        dtype = str(next(self.engine.module.parameters()).dtype).removeprefix("torch.")
        return {"name": self.model.name, "revision": self.model.revision, "dtype": dtype}


class _Written:
    """What a rank wrote: records by path, the index of its shards, bytes of its tensors."""

    def __init__(self) -> None:
        self.files: dict[str, FileRecord] = {}
        self.index: dict[str, str] = {}
        self.model_bytes = 0

    @property
    def num_bytes(self) -> int:
        return sum(record.num_bytes for record in self.files.values())


def _make_folders(staging: Path) -> None:
    make_staging(staging)
    for part in (MODEL_FOLDER, STATE_FOLDER):
        (staging / part).mkdir()


def _pass_commit() -> None:
    """The points that rank 0 passes while it commits; tests hurt other ranks there too."""
    reached("before rename")
    reached("before latest")
