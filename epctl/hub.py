"""From a model reference to a ModelSource: folder, hub (headers only), its cache, catalog.

A reference is a folder, or a hub id `org/name` with an optional `@revision`. On the hub the
revision is pinned to its commit first; then config, index and the header of every shard are read
by range request. Not one byte of weights is downloaded. When the hub cannot be reached, its cache
on this disk and then the bundled catalog answer, and a note says so. `HF_ENDPOINT`, `HF_TOKEN`,
`HF_HOME`, `HF_HUB_OFFLINE` and the proxy variables count as they do for huggingface_hub.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from epctl.errors import HubError, InputError
from epctl.layout.catalog import catalog_source, find_entry
from epctl.layout.safetensors import short_text
from epctl.layout.shards import MissingShardError
from epctl.layout.source import ModelSource, choose_weights, read_folder

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy")
# Seconds to find out that there is no network: short when something else can answer.
QUICK_CONNECT, PATIENT_CONNECT = 0.8, 5.0


def parse_reference(reference: str) -> tuple[str, str | None]:
    """Returns (hub id, revision or None). Raises InputError for anything that is neither."""
    model_id, _, revision = reference.partition("@")
    unsafe = ".." in reference or len(model_id) > 96 or "--" in model_id
    if unsafe or not _HUB_ID.fullmatch(model_id) or ("@" in reference and not revision):
        raise InputError(
            f"`{reference}` is neither a folder nor a hub id such as `org/name@revision`",
            hint="give a folder that holds config.json and .safetensors files, or a hub id",
        )
    if revision and not _REVISION.fullmatch(revision):
        raise InputError(f"`{revision}` is no revision: a commit, a tag or a branch is needed")
    return model_id, revision or None


def resolve(reference: str) -> ModelSource:
    """Returns what `reference` names.

    Raises InputError (and subclasses) for what is missing, damaged or unsafe, and HubError when
    neither the hub, its cache nor the catalog can answer.
    """
    try:
        path = Path(reference).expanduser()
        if reference and path.is_dir():
            return read_local(path, id=reference)
        _refuse_files(path, reference)
    except (OSError, RuntimeError) as error:  # unreadable, too long a name, `~` of nobody
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"`{short_text(reference)}` cannot be read: {reason}") from None
    model_id, revision = parse_reference(reference)
    if offline():
        return _fall_back(model_id, revision, "HF_HUB_OFFLINE is set", hint=None)
    has_other = find_entry(model_id) is not None or cached_snapshot(model_id, revision) is not None
    problem = connection_problem(QUICK_CONNECT if has_other else PATIENT_CONNECT)
    if problem:
        return _fall_back(model_id, revision, problem, hint="check the network or `HF_ENDPOINT`")
    return _from_hub(model_id, revision)


def read_local(folder: Path, *, id: str) -> ModelSource:
    """Returns the source in a Hugging Face folder, or in one of `epctl convert shard`."""
    if (folder / "manifest.json").is_file():
        from epctl.convert.source import shard_source

        sharded = shard_source(folder)
        if sharded is not None:
            return replace(sharded, id=id)
    return read_folder(folder, id=id)


def _refuse_files(path: Path, reference: str) -> None:
    if path.suffix.lower() == ".gguf":
        raise InputError(
            f"`{reference}` is GGUF: weights re-quantised for inference, which cannot be trained "
            "or sharded",
            hint="use the safetensors repository that it was made from",
        )
    if path.is_file():
        raise InputError(
            f"`{reference}` is a file; a checkpoint is a folder", hint=f"try `{path.parent}`"
        )
    if reference.startswith((".", "/", "~")):
        raise InputError(f"there is no folder `{reference}`")


def _from_hub(model_id: str, revision: str | None) -> ModelSource:
    from epctl.layout.remote import HubUnavailableError, pin, read_headers

    try:
        pinned = pin(model_id, revision, endpoint())
        snapshot = cached_snapshot(model_id, pinned.sha)
        if snapshot is not None:
            # Without all its shards it is a download that was interrupted.
            with suppress(MissingShardError):
                return read_folder(snapshot, id=model_id, kind="cache", revision=pinned.sha)
        return read_headers(pinned)
    except HubUnavailableError as error:
        return _fall_back(model_id, revision, error.message, hint=error.hint)


def _fall_back(model_id: str, revision: str | None, reason: str, hint: str | None) -> ModelSource:
    """Returns the cached snapshot or the catalog entry; raises HubError without either."""
    snapshot = cached_snapshot(model_id, revision)
    if snapshot is not None:
        return read_folder(snapshot, id=model_id, kind="cache", revision=snapshot.name)
    if revision is None:
        note = f"{reason}: facts come from the bundled catalog, not from the files"
        source = catalog_source(model_id, notes=(note,))
        if source is not None:
            return source
    elif find_entry(model_id) is not None:
        hint = f"the catalog describes `{model_id}` without a revision"
    raise HubError(
        f"`{model_id}`{f' at {revision}' if revision else ''} cannot be read: {reason}, and it is "
        "neither in the cache nor in the catalog",
        hint=hint or f"`hf download {model_id}` on a machine with a network fills the cache",
    )


def offline() -> bool:
    """True when `HF_HUB_OFFLINE` asks for no network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def endpoint() -> str:
    """Returns the hub's address: `HF_ENDPOINT`, or the client's own default."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def hub_home() -> Path:
    """Returns the folder of all hub caches, as the variables say now."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface"))


def cache_folder() -> Path:
    """Returns the hub's cache of models."""
    return Path(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub")


def cached_snapshot(model_id: str, revision: str | None) -> Path | None:
    """Returns the folder of a downloaded snapshot that holds config and weights, else None."""
    repository = cache_folder() / f"models--{model_id.replace('/', '--')}"
    name = revision or "main"
    reference = repository / "refs" / name
    if reference.is_file():
        name = reference.read_text(encoding="utf-8").strip()
    snapshot = repository / "snapshots" / name
    if not re.fullmatch(r"[0-9a-f]{40}", name) or not (snapshot / "config.json").is_file():
        return None
    try:
        weights = choose_weights(sorted(entry.name for entry in snapshot.iterdir()), str(snapshot))
    except InputError:
        return None
    complete = isinstance(weights, list) or any(snapshot.glob("*.safetensors"))
    return snapshot if complete else None


def _address(url: str) -> tuple[str, int]:
    """Returns host and port. Raises HubError for what is no http(s) address."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in ("http", "https"):
        raise HubError(
            f"HF_ENDPOINT `{url}` is no http(s) address",
            hint="unset it for the public hub, or give one such as `https://hub.example`",
        )
    return host, port or (443 if parts.scheme == "https" else 80)


def connection_problem(timeout: float) -> str | None:
    """Returns why the hub cannot be reached within `timeout` seconds, None when it can.

    Asked first because name resolution alone may block for half a minute on a machine without a
    network. With a proxy set the question is left to the client.
    """
    if any(os.environ.get(name) for name in _PROXIES):
        return None
    host, port = _address(endpoint())
    failure: list[str] = [f"no answer from {host} within {timeout:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=timeout).close()
            failure[0] = ""
        except OSError as error:
            failure[0] = f"{host} is not reachable ({error.strerror or error})"

    # A thread, because getaddrinfo takes no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    return failure[0] or None
