"""A model hub on 127.0.0.1: revisions, range requests, gates, rate limits and broken connections.

It speaks what huggingface_hub and `datasets` ask for: `/api/models/ID/revision/REV`, its `tree`,
and `/ID/resolve/SHA/FILE`, the same for datasets. Every body byte that leaves is counted by file.
"""

import json
import re
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


class LoopbackHub:
    """Holds repositories and faults; a context manager that serves on a free port.

    `files[id][name]` are contents, `revisions[id][name]` a commit. `faults[file]` is a list that
    each request for the file takes one entry from: a status code, `cut`, `slow`, `whole` (no
    range support), `redirect`, or None. `gated` maps an id to the token that opens it, `private`
    too. A dataset's id begins with `datasets/`. `commits[id, sha]` are the contents of a commit
    other than the latest; `paths` are all paths asked for, in order.
    """

    def __init__(self, latency=0.0):
        self.files = {}
        self.revisions = {}
        self.faults = defaultdict(list)
        self.gated = {}
        self.private = {}
        self.commits = {}
        self.paths = []
        self.latency = latency
        self.sent = Counter()
        self.requests = Counter()
        self.lock = threading.Lock()

    def add(self, model_id, files, **revisions):
        self.files[model_id] = files
        self.revisions[model_id] = {"main": SHA, SHA: SHA, **revisions}

    def contents(self, repository, sha):
        """Returns the files of a commit, or none of one that there is not."""
        if (repository, sha) in self.commits:
            return self.commits[repository, sha]
        known = self.revisions.get(repository, {}).values()
        return self.files[repository] if sha in known else {}

    def take_fault(self, name):
        with self.lock:
            self.requests[name] += 1
            return self.faults[name].pop(0) if self.faults[name] else None

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            owner = hub

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        pass  # a client that hangs up is part of the tests


def repository(kind, name):
    """Returns the key of a repository: the id, a dataset's after `datasets/`."""
    return name if kind == "models" else f"datasets/{name}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    owner = None

    def log_message(self, *_):
        pass

    def do_GET(self):
        time.sleep(self.owner.latency)
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.owner.paths.append(path)
        tree = re.fullmatch(r"/api/(models|datasets)/(.+?)/tree/([^/]+)(?:/(.+))?", path)
        api = re.fullmatch(r"/api/(models|datasets)/(.+?)(?:/revision/(.+))?", path)
        resolve = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path)
        if tree:
            recursive = parse_qs(address.query).get("recursive", ["false"])[0].lower() == "true"
            self.answer_tree(repository(tree[1], tree[2]), tree[3], tree[4] or "", recursive)
        elif api:
            self.answer_model(repository(api[1], api[2]), api[3] or "main")
        elif resolve:
            self.answer_file(*resolve.groups())
        elif path.startswith("/cdn/"):
            model_id, name = path.removeprefix("/cdn/").rsplit("/", 1)
            self.send_file(self.owner.files[model_id][name], name)
        else:
            self.fail(404, "EntryNotFound")

    def do_HEAD(self):
        match = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", unquote(urlsplit(self.path).path))
        if match is None:
            return self.fail(404, "EntryNotFound")
        if self.refused(match[1]):
            return None
        data = self.owner.contents(match[1], match[2]).get(match[3])
        self.send_response(404 if data is None else 200)
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", match[2])
        self.send_header("ETag", f'"{match[3].replace("/", "-")}-{match[2][:8]}"')
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        return None

    def fail(self, status, code=None, **headers):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def refused(self, model_id):
        given = self.headers.get("Authorization")
        for tokens, code in ((self.owner.gated, "GatedRepo"), (self.owner.private, None)):
            if model_id in tokens and given != f"Bearer {tokens[model_id]}":
                # To somebody without a token the hub does not tell private from absent.
                self.fail(403 if given else 401, code or (None if given else "RepoNotFound"))
                return True
        return False

    def answer_model(self, model_id, revision):
        fault = self.owner.take_fault("model_info")
        if fault:
            return self.fail(fault, Retry_After="0")
        if model_id not in self.owner.files:
            return self.fail(404, "RepoNotFound")
        if self.refused(model_id):
            return None
        sha = self.owner.revisions[model_id].get(revision)
        if sha is None:
            return self.fail(404, "RevisionNotFound")
        files = self.owner.contents(model_id, sha)
        names = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        self.send_json({"id": model_id, "sha": sha, "siblings": names, "gated": False})
        return None

    def answer_tree(self, model_id, revision, folder, recursive):
        if self.refused(model_id):
            return
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for name, data in self.owner.contents(model_id, revision).items():
            if not name.startswith(prefix):
                continue
            inside = name.removeprefix(prefix).partition("/")
            if inside[1] and not recursive:
                path = prefix + inside[0]
                entries[path] = {"type": "directory", "path": path, "oid": path}
            else:
                entries[name] = {"type": "file", "path": name, "size": len(data), "oid": name}
        self.send_json(list(entries.values()))

    def send_json(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_file(self, model_id, revision, name):
        if self.refused(model_id):
            return None
        fault = self.owner.take_fault(name)
        if isinstance(fault, int):
            return self.fail(fault, Retry_After="0")
        if fault == "redirect":
            return self.fail(302, Location=f"{self.owner.address}/cdn/{model_id}/{name}")
        data = self.owner.contents(model_id, revision).get(name)
        if data is None:
            return self.fail(404, "EntryNotFound")
        return self.send_file(data, name, fault)

    def send_file(self, data, name, fault=None):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, len(data) - 1
        if asked and fault != "whole":
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            if first >= len(data):
                return self.fail(416, Content_Range=f"bytes */{len(data)}")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            self.send_response(200)
        body = data[first : last + 1]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.send_body(body, name, fault)
        return None

    def send_body(self, body, name, fault):
        if fault == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        if fault == "slow":
            self.close_connection = True
            time.sleep(1.5)
            body = b""
        try:
            for start in range(0, len(body), 4096):
                self.wfile.write(body[start : start + 4096])
                with self.owner.lock:
                    self.owner.sent[name] += len(body[start : start + 4096])
        except OSError:
            self.close_connection = True
