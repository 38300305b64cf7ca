"""Writes a plan: staged, journalled, synced, published by one rename. Killed anywhere, it resumes.

    DIR.lock                 owner, while a converter runs
    DIR.partial/journal.jsonl  what was asked, files that are whole
    DIR.partial/output/        becomes DIR
    DIR.partial/previous/      the old DIR while `--overwrite` swaps the two

A file is written under `<name>.tmp`, synced and renamed before the journal lists it. Everything
in `output/` is determined by the plan, so a resumed run ends in the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from epctl.convert.execute import Reader, block_chunks
from epctl.convert.journal import JOURNAL_NAME, Journal, Request
from epctl.convert.manifest import MANIFEST_NAME, build_manifest
from epctl.convert.plan import OutputPlan, PlannedFile
from epctl.convert.view import CheckpointView
from epctl.errors import InputError, ResourceError
from epctl.output import format_bytes

WRITEBACK_BYTES = 64 * 2**20
# More than cores: some hash and copy while others wait for the disk.
NUM_WORKERS = 4

Progress = Callable[[int], None]


def reached(state: str) -> None:
    """Called at each state of the journal; tests put a kill in its place."""


class _Stopped(Exception):
    """Another worker failed, or the user pressed Ctrl-C."""


class Writer:
    """Writes one plan into `output`; `advance` is told the bytes written, from any thread."""

    def __init__(
        self, view: CheckpointView, plan: OutputPlan, output: Path, advance: Progress
    ) -> None:
        self.view = view
        self.plan = plan
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.staged = self.partial / "output"
        self.journal = Journal(self.partial / JOURNAL_NAME)
        self.advance = advance
        self.resumed = False
        self._stop = threading.Event()
        self._journal_lock = threading.Lock()

    def run(self, small_files: dict[str, bytes]) -> dict[str, Any]:
        """Writes everything and publishes it; returns the manifest.

        Args:
            small_files: config, tokenizer and the like, by path inside the output.

        Raises:
            ResourceError: the disk is too small or filled up; nothing is left behind then.
            ConfigError, InputError: an interrupted conversion is there that this one cannot resume.
        """
        request = self.request()
        with _disk_full_is_told(self.partial, self.plan, self.output):
            self.staged.mkdir(parents=True, exist_ok=True)
            self.resumed = self.journal.open(request)
            reached("journal opened")
            self._write_files()
            if self.view.identity() != request.source_identity:
                raise InputError(
                    f"`{self.view.id}` was changed while it was read; nothing was published",
                    hint=f"remove `{self.partial}` and convert again",
                )
            reached("before manifest")
            manifest = build_manifest(self.plan, self._digests(), self.view.record)
            self._write_small_files(small_files, manifest)
        publish(self.output)
        return manifest

    def request(self) -> Request:
        """Returns what a resumed run must agree with; reads the state of the source's files."""
        return Request(self.plan.options, self.view.id, self.view.identity(), self.plan.digest())

    def finish_published(self) -> bool:
        """Cleans up after a run that was killed behind its last rename; False if there was none.

        Raises ConfigError or InputError if that run was asked something else.
        """
        if not self.output.exists() or self.staged.exists() or not self.journal.path.exists():
            return False
        self.journal.open(self.request())
        clear_partial(self.partial)
        return True

    def _digests(self) -> dict[tuple[str, int | None], str]:
        found: dict[tuple[str, int | None], str] = {}
        for file in self.plan.files:
            digests = iter(self.journal.finished[file.path])
            for tensor in file.tensors:
                for block in tensor.blocks:
                    found[tensor.name, block.expert] = next(digests)
        return found

    def _write_files(self) -> None:
        todo = []
        for file in self.plan.files:
            if self._is_whole(file):
                self.advance(file.num_bytes)
            else:
                todo.append(file)
        # The largest first, so that none is left to be written alone at the end.
        todo.sort(key=lambda file: -file.num_bytes)
        with Reader(self.view) as reader, ThreadPoolExecutor(NUM_WORKERS) as pool:
            futures = [pool.submit(self._write_file, reader, file) for file in todo]
            try:
                # Short waits, so that Ctrl-C is seen while workers run.
                while wait(futures, timeout=0.2).not_done and not _failed(futures):
                    pass
            finally:
                self._stop.set()
        for future in futures:
            error = future.exception()
            if error is not None and not isinstance(error, _Stopped):
                raise error

    def _is_whole(self, file: PlannedFile) -> bool:
        path = self.staged / file.path
        return (
            file.path in self.journal.finished
            and path.is_file()
            and path.stat().st_size == file.num_bytes
        )

    def _write_file(self, reader: Reader, file: PlannedFile) -> None:
        if self._stop.is_set():
            raise _Stopped
        reached("before write")
        path = self.staged / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb", buffering=0) as target:
            digests = self._write_body(reader, file, target.fileno())
            os.fsync(target.fileno())
        reached("before rename")
        temporary.rename(path)
        sync_folder(path.parent)
        reached("before journal")
        with self._journal_lock:
            self.journal.finish(file.path, digests)

    def _write_body(self, reader: Reader, file: PlannedFile, descriptor: int) -> list[str]:
        written = write_all(descriptor, file.header())
        self.advance(written)
        flushed = 0
        digests = []
        for tensor in file.tensors:
            for block in tensor.blocks:
                told = hashlib.sha256()
                for chunk in block_chunks(reader, block):
                    if self._stop.is_set():
                        raise _Stopped
                    told.update(chunk)
                    written += write_all(descriptor, chunk)
                    self.advance(len(chunk))
                    if written - flushed >= WRITEBACK_BYTES:
                        reached("mid-tensor")
                        start_writeback(descriptor, flushed, written - flushed)
                        flushed = written
                digests.append(told.hexdigest())
            reached("after tensor")
        assert written == file.num_bytes, f"{file.path}: {written} bytes, planned {file.num_bytes}"
        return digests

    def _write_small_files(self, small_files: dict[str, bytes], manifest: dict[str, Any]) -> None:
        """Writes indexes and copied files, the manifest last."""
        files = dict(small_files)
        sizes = {
            tensor.name: tensor.num_bytes for file in self.plan.files for tensor in file.tensors
        }
        for path, weight_map in self.plan.indexes.items():
            files[path] = _index_text(weight_map, self.plan, sizes)
        files[MANIFEST_NAME] = json.dumps(manifest, indent=1, ensure_ascii=False).encode()
        for name, data in files.items():
            write_synced(self.staged / name, data)
        for folder, _, _ in os.walk(self.staged):
            sync_folder(Path(folder))


def _index_text(weight_map: Any, plan: OutputPlan, sizes: dict[str, int]) -> bytes:
    # A fused tensor's size is that of its rank's part: every index but the whole one is a rank's.
    total = sum(sizes[name] for name in weight_map)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(document, indent=1, ensure_ascii=False).encode()


def _failed(futures: list[Future[None]]) -> bool:
    return any(future.done() and future.exception() is not None for future in futures)


def write_all(descriptor: int, data: bytes | memoryview) -> int:
    """Writes all of `data`, however little each call takes; returns its bytes."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done:])
    return done


def start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Lets the disk begin; a sync of gigabytes at the end would leave it idle until then."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a small file whole: under another name, synced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(output: Path) -> None:
    """Renames the staged folder to `output`, an old one out of the way first, and cleans up.

    Killed between the two renames, the next run finds the staged folder whole and repeats this.
    """
    partial = output.with_name(output.name + ".partial")
    reached("before publish")
    if output.exists():
        previous = partial / "previous"
        if previous.exists():
            shutil.rmtree(previous)
        output.rename(previous)
        reached("between renames")
    (partial / "output").rename(output)
    sync_folder(output.parent)
    reached("after publish")
    clear_partial(partial)


def clear_partial(partial: Path) -> None:
    """Removes a staging folder, its journal last: while that stands, a rerun can tell."""
    for name in ("previous", "output"):
        if (partial / name).exists():
            shutil.rmtree(partial / name)
    shutil.rmtree(partial)


@contextmanager
def _disk_full_is_told(partial: Path, plan: OutputPlan, output: Path) -> Iterator[None]:
    """Turns a full disk into ResourceError and frees what was written: nothing half-made stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"cannot write `{error.filename or partial}`: {error.strerror or error}",
                hint="choose another `--output`",
            ) from None
        shutil.rmtree(partial, ignore_errors=True)
        raise ResourceError(
            f"the disk of `{output}` filled up ({error.strerror}); the conversion needs "
            f"{format_bytes(plan.num_bytes)}. What was written is removed again, "
            "the source and any older output are untouched",
            hint="free disk space or choose another `--output`",
        ) from None


def check_disk_space(output: Path, plan: OutputPlan, done_bytes: int = 0) -> tuple[int, int]:
    """Returns (bytes needed, bytes free); raises ResourceError if the disk cannot hold the plan."""
    needed = plan.num_bytes - done_bytes + _small_bytes(plan)
    existing = next(path for path in (output, *output.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(
            f"`{output}` needs {format_bytes(needed)}, `{existing}` has {format_bytes(free)} free",
            hint="choose another disk with `--output`, or `--rank K` to write one rank's part",
        )
    return needed, free


def _small_bytes(plan: OutputPlan) -> int:
    # Manifest and indexes: about 300 bytes a tensor and 90 a digest.
    blocks = sum(len(tensor.blocks) for tensor in plan.tensors)
    return 2**20 + 400 * len(plan.tensors) + 100 * blocks
