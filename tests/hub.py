"""A server on this machine that speaks as much of the Hugging Face hub's protocol as fetching a file takes."""

import hashlib
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + 34 * "0"


@dataclass
class Hub:
    """files: {"owner/name/file": content}. refused: {"owner/name": (status, the hub's word for it)}.

    cut: how many bytes each answer has before the connection is closed; the first of the list is for the first answer,
    None or nothing left for whole ones. stall: bytes after which an answer waits until `resume` is set. sent: what is
    sent instead of the content that is announced. asked: what was asked for, (method, file, range).
    """

    files: dict[str, bytes] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    sent: dict[str, bytes] = field(default_factory=dict)
    cut: list[int | None] = field(default_factory=list)
    stall: int | None = None
    resume: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""
    store: str = ""  # where large files lie, another host as with the real one

    def ranges(self) -> list[str | None]:
        return [ranged for method, _, ranged in self.asked if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer("HEAD")

    def do_GET(self):
        self.answer("GET")

    def answer(self, method: str) -> None:
        hub = self.hub
        resolved = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        stored = re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", self.path)
        repo, name = (resolved or stored).groups()
        file = f"{repo}/{name}"
        hub.asked.append((method, file, self.headers.get("Range")))
        if repo in hub.refused:
            status, word = hub.refused[repo]
            return self.head(status, {"X-Error-Code": word, "Content-Length": "0"})
        if file not in hub.files:
            known = any(other.startswith(f"{repo}/") for other in hub.files)
            return self.head(404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound", "Content-Length": "0",
                                   "X-Repo-Commit": COMMIT})
        content = hub.files[file]
        large = not name.endswith(".json")
        if resolved and large:
            etag = hashlib.sha256(content).hexdigest()
            return self.head(302, {"Location": f"{hub.store}/cdn/{file}", "X-Linked-Etag": f'"{etag}"',
                                   "X-Linked-Size": str(len(content)), "X-Repo-Commit": COMMIT, "Content-Length": "0"})
        etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
        content = hub.sent.get(file, content)
        body = content[start:]
        self.head(206 if start else 200, {
            "Content-Length": str(len(body)), "ETag": f'"{etag}"', "X-Repo-Commit": COMMIT,
            **({"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {})})
        if method == "HEAD":
            return None
        limit = hub.cut.pop(0) if hub.cut else None
        if hub.stall is not None:
            self.wfile.write(body[:hub.stall])
            self.wfile.flush()
            hub.stalled.set()
            hub.resume.wait(60)
            body = body[hub.stall:]
        self.wfile.write(body if limit is None else body[:limit])
        if limit is not None:
            self.close_connection = True
        return None

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serving():
    """A Hub that answers at its `url` until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url, hub.store = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.resume.set()
        server.shutdown()
        thread.join()
        server.server_close()
