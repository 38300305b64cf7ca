"""A model hub on 127.0.0.1: revisions, range requests, gates, rate limits and broken connections.

It speaks what huggingface_hub asks for when inspecting: `/api/models/ID/revision/REV` and
`/ID/resolve/SHA/FILE`. Every body byte that leaves is counted by file.
"""

import json
import re
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

SHA = "0123456789abcdef0123456789abcdef01234567"


class LoopbackHub:
    """Holds repositories and faults; a context manager that serves on a free port.

    `files[id][name]` are contents, `revisions[id][name]` a commit. `faults[file]` is a list that
    each request for the file takes one entry from: a status code, `cut`, `slow`, `whole` (no
    range support), `redirect`, or None. `gated` maps an id to the token that opens it.
    """

    def __init__(self, latency=0.0):
        self.files = {}
        self.revisions = {}
        self.faults = defaultdict(list)
        self.gated = {}
        self.latency = latency
        self.sent = Counter()
        self.requests = Counter()
        self.lock = threading.Lock()

    def add(self, model_id, files, **revisions):
        self.files[model_id] = files
        self.revisions[model_id] = {"main": SHA, SHA: SHA, **revisions}

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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    owner = None

    def log_message(self, *_):
        pass

    def do_GET(self):
        time.sleep(self.owner.latency)
        path = unquote(self.path.split("?")[0])
        api = re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path)
        resolve = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path)
        if api:
            self.answer_model(api[1], api[2] or "main")
        elif resolve:
            self.answer_file(*resolve.groups())
        elif path.startswith("/cdn/"):
            model_id, name = path.removeprefix("/cdn/").rsplit("/", 1)
            self.send_file(self.owner.files[model_id][name], name)
        else:
            self.fail(404, "EntryNotFound")

    def fail(self, status, code=None, **headers):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def refused(self, model_id):
        token = self.owner.gated.get(model_id)
        if token is None or self.headers.get("Authorization") == f"Bearer {token}":
            return False
        self.fail(403 if "Authorization" in self.headers else 401, "GatedRepo")
        return True

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
        names = [{"rfilename": name} for name in self.owner.files[model_id]]
        body = json.dumps({"id": model_id, "sha": sha, "siblings": names, "gated": False}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def answer_file(self, model_id, revision, name):
        if self.refused(model_id):
            return None
        fault = self.owner.take_fault(name)
        if isinstance(fault, int):
            return self.fail(fault, Retry_After="0")
        if fault == "redirect":
            return self.fail(302, Location=f"{self.owner.address}/cdn/{model_id}/{name}")
        if revision != SHA or name not in self.owner.files.get(model_id, {}):
            return self.fail(404, "EntryNotFound")
        return self.send_file(self.owner.files[model_id][name], name, fault)

    def send_file(self, data, name, fault=None):
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = 0, len(data) - 1
        if asked and fault != "whole":
            first, last = int(asked[1]), min(int(asked[2]), last)
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
