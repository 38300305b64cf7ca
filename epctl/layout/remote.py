"""Header-only reading of a hub repository: pin the commit, then range requests, many at a time.

HubError
`-- HubUnavailableError    network, rate limit or server failure: another source may answer
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from epctl.errors import HubError, InputError
from epctl.layout.safetensors import LENGTH_BYTES, ShardHeader, header_size, parse_header
from epctl.layout.shards import CheckpointIndex, MissingShardError, merge_shards, parse_index
from epctl.layout.source import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    MAX_INDEX_BYTES,
    ModelSource,
    choose_weights,
    parse_config,
)

NUM_CONNECTIONS = 32
NUM_ATTEMPTS = 4
# Seconds: to hear anything at all, and for one answer in full. Headers are small.
SILENCE_LIMIT, ANSWER_LIMIT, LONGEST_PAUSE = 10.0, 60.0, 5.0
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class HubUnavailableError(HubError):
    """Network, rate limit or server failure."""


class _Retry(Exception):
    """One attempt failed in a way that the next may not; holds the reason and a pause in s."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass(frozen=True, slots=True)
class PinnedModel:
    """A repository at one commit; `files` are its paths."""

    id: str
    sha: str
    files: tuple[str, ...]
    endpoint: str


def pin(model_id: str, revision: str | None, endpoint: str) -> PinnedModel:
    """Returns the repository at the commit that `revision` (default `main`) names now.

    Raises HubError for what asking again cannot mend (not found, gated), HubUnavailableError else.
    """
    from huggingface_hub import HfApi

    def ask() -> Any:
        with mapped_errors(model_id, revision):
            return HfApi(endpoint=endpoint).model_info(
                model_id, revision=revision, timeout=SILENCE_LIMIT
            )

    info = with_retries(ask, f"`{model_id}`")
    files = tuple(sibling.rfilename for sibling in info.siblings or ())
    if not info.sha or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise HubError(f"the hub names no commit for `{model_id}`")
    return PinnedModel(model_id, info.sha, files, endpoint)


def read_headers(pinned: PinnedModel) -> ModelSource:
    """Returns the ModelSource of a pinned repository: config, index and every shard's header.

    Raises HubError, HubUnavailableError, or the InputError of a defect.
    """
    where = f"`{pinned.id}`"
    weights = choose_weights(list(pinned.files), where)
    if CONFIG_NAME not in pinned.files:
        raise InputError(f"{where} has no `{CONFIG_NAME}`")
    config = parse_config(_read_whole(pinned, CONFIG_NAME, MAX_CONFIG_BYTES))
    index: CheckpointIndex | None = None
    shards = weights if isinstance(weights, list) else []
    if isinstance(weights, str):
        index = parse_index(_read_whole(pinned, weights, MAX_INDEX_BYTES))
        shards = index.shards
    for shard in shards:
        if shard not in pinned.files:
            raise MissingShardError(
                f"the index of {where} names `{shard}`, which the repository does not hold",
                hint="the upload is incomplete; ask its author",
            )
    headers = _read_shards(pinned, shards)
    tensors, warnings = merge_shards(headers, index)
    return ModelSource(
        id=pinned.id,
        kind="hub",
        config=config,
        tensors=tensors,
        revision=pinned.sha,
        file_sizes={header.file: header.file_size for header in headers},
        warnings=tuple(warnings),
    )


def _read_shards(pinned: PinnedModel, shards: list[str]) -> list[ShardHeader]:
    pool = ThreadPoolExecutor(max_workers=min(NUM_CONNECTIONS, max(1, len(shards))))
    try:
        return list(pool.map(lambda shard: _read_shard(pinned, shard), shards))
    finally:
        # On the first failure nothing that is still queued may run.
        pool.shutdown(wait=True, cancel_futures=True)


def _read_shard(pinned: PinnedModel, file: str) -> ShardHeader:
    # Two exact requests instead of a generous one: no weight byte crosses the wire.
    start, file_size = _fetch(pinned, file, 0, LENGTH_BYTES)
    size = header_size(start, file=file, file_size=file_size)
    data, _ = _fetch(pinned, file, LENGTH_BYTES, size)
    return parse_header(data, file=file, file_size=file_size)


def _read_whole(pinned: PinnedModel, file: str, limit: int) -> bytes:
    data, size = _fetch(pinned, file, 0, limit)
    if size > limit:
        raise InputError(f"`{file}` of `{pinned.id}` has {size} bytes; at most {limit} are read")
    return data


def _fetch(pinned: PinnedModel, file: str, first: int, count: int) -> tuple[bytes, int]:
    """Returns up to `count` bytes from `first` and the size of the file."""
    what = f"`{file}` of `{pinned.id}`"
    return with_retries(lambda: _request(pinned, file, first, count), what)  # type: ignore[no-any-return]


def with_retries(ask: Any, what: str) -> Any:
    """Returns what `ask` does, asked again where `mapped_errors` says that it may help.

    Raises HubUnavailableError after `NUM_ATTEMPTS`.
    """
    for attempt in range(NUM_ATTEMPTS):
        try:
            return ask()
        except _Retry as failure:
            if attempt == NUM_ATTEMPTS - 1:
                raise HubUnavailableError(
                    f"{what} could not be read in {NUM_ATTEMPTS} attempts: {failure}",
                    hint="try again later, or `hf download` it and give the folder",
                ) from None
            pause = 0.1 * 3**attempt if failure.pause is None else failure.pause
            time.sleep(min(pause, LONGEST_PAUSE))
    raise AssertionError("unreachable: the last attempt returns or raises")


def _request(pinned: PinnedModel, file: str, first: int, count: int) -> tuple[bytes, int]:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    url = hf_hub_url(pinned.id, file, revision=pinned.sha, endpoint=pinned.endpoint)
    headers = build_hf_headers()
    headers["Range"] = f"bytes={first}-{first + count - 1}"
    headers["Accept-Encoding"] = "identity"  # ranges count stored bytes
    with (
        mapped_errors(pinned.id, pinned.sha, file),
        get_session().stream(
            "GET", url, headers=headers, timeout=SILENCE_LIMIT, follow_redirects=True
        ) as response,
    ):
        return _body(response, first, count)


def _body(response: Any, first: int, count: int) -> tuple[bytes, int]:
    """Returns the bytes asked for and the file size, reading no more than that."""
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    if response.status_code == 416:
        # An empty file, or one shorter than `first`: the caller's checks name the defect.
        total = re.search(r"/(\d+)", response.headers.get("Content-Range", ""))
        return b"", int(total[1]) if total else 0
    hf_raise_for_status(response)
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    ranged = response.status_code == 206 and match is not None and int(match[1]) == first
    if ranged and match is not None:
        skip, file_size = 0, int(match[3])
    else:  # a server that ignores ranges sends the whole file; stop as soon as possible
        skip = first
        file_size = int(response.headers.get("Content-Length", -1))
    wanted = skip + min(count, max(0, file_size - first)) if file_size >= 0 else skip + count
    data = _read_bounded(response, wanted)
    if file_size >= 0 and len(data) < wanted:
        raise _Retry(f"the connection was cut after {len(data)} of {wanted} bytes")
    return data[skip:wanted], file_size if file_size >= 0 else len(data)


def _read_bounded(response: Any, wanted: int) -> bytes:
    deadline = time.monotonic() + ANSWER_LIMIT
    data = bytearray()
    for chunk in response.iter_raw():
        data += chunk
        if len(data) >= wanted:
            break
        if time.monotonic() > deadline:
            raise _Retry(f"{len(data)} of {wanted} bytes came in {ANSWER_LIMIT:g} s")
    return bytes(data)


@contextmanager
def mapped_errors(
    model_id: str, revision: str | None, file: str | None = None, *, kind: str = "model"
) -> Iterator[None]:
    """Turns huggingface_hub's errors into ours, those worth another attempt into _Retry."""
    from huggingface_hub import errors, get_token
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        yield
    except errors.GatedRepoError:
        known = "the token given has no access" if get_token() else "no token is set"
        raise HubError(
            f"`{model_id}` is gated and {known}",
            hint=f"accept its terms on the {kind}'s page, then `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"`{model_id}` has no revision `{revision}`") from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"the hub has no {kind} `{model_id}`, or it is private",
            hint=f"check the spelling; for a private {kind} `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise _Retry(str(error).partition("\n")[0]) from None
    except errors.EntryNotFoundError:
        what = f"no file `{file}`" if file else "not all of its files"
        raise HubError(f"`{model_id}` has {what} at {revision}") from None
    except errors.HfHubHTTPError as error:
        raise _from_status(error, model_id) from None
    except httpx.TransportError as error:
        raise _Retry(f"{type(error).__name__}: {error}".rstrip(": ")) from None


def _from_status(error: Any, model_id: str) -> Exception:
    status = error.response.status_code
    if status == 429:
        after = error.response.headers.get("Retry-After", "")
        return _Retry("the hub limits requests (429)", float(after) if after.isdigit() else None)
    if status >= 500:
        return _Retry(f"the hub answered {status}")
    if status in (401, 403):
        return HubError(
            f"the hub refuses `{model_id}` ({status})", hint="`hf auth login` or set HF_TOKEN"
        )
    return HubError(f"the hub answered {status} for `{model_id}`")
