"""An S3-compatible store on loopback that fails on purpose: `with object_store() as store: ...`.

A separate process runs moto's S3 server behind a layer that counts what is sent and injects faults:
errors 500, connections reset, bodies cut short, bodies that trickle, or nothing but errors. Used by
tests and by `cavmae bench storage-faults`; needs the `dev` extra.
"""

import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAULTS = ("error", "reset", "truncated", "slow")
SLOW_PARTS = 5
SLOW_SECONDS = 0.05
"""Delay between the parts of a body that trickles."""


@dataclass(frozen=True)
class ObjectStore:
    """A running store.

    Attributes:
        url: of the server, `http://127.0.0.1:PORT`.
        environment: variables with which s3fs finds it.
    """

    url: str
    environment: dict[str, str]

    def make_bucket(self, bucket: str) -> None:
        """Make an empty bucket."""
        self._call("PUT", f"/{bucket}")

    def upload(self, folder: Path, bucket: str) -> str:
        """Upload a folder's files to a new bucket; returns its `s3://` URL."""
        self.make_bucket(bucket)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                self._call("PUT", f"/{bucket}/{name}", path.read_bytes())
        return f"s3://{bucket}"

    def replace(self, bucket: str, name: str, data: bytes) -> None:
        """Replace an object's bytes."""
        self._call("PUT", f"/{bucket}/{name}", data)

    def fail(self, every: int, kinds: Iterable[str] = FAULTS) -> None:
        """Make each `every`-th download fail, by the kinds in turn; 0: none."""
        self._call("POST", "/_faults", json.dumps([every, list(kinds)]).encode())

    def down(self, is_down: bool, status: str = "503 Service Unavailable") -> None:
        """Answer everything with an error of this status, or stop doing so."""
        self._call("POST", "/_down", json.dumps(status if is_down else "").encode())

    def has(self, bucket: str, name: str) -> bool:
        """Return whether an object exists."""
        try:
            self._call("HEAD", f"/{bucket}/{name}")
        except urllib.error.HTTPError:
            return False
        return True

    def counts(self) -> dict[str, int]:
        """Return `bytes` of objects sent, `requests` for them, and the count of each fault."""
        return json.loads(self._call("GET", "/_counts"))

    def _call(self, method: str, path: str, data: bytes | None = None) -> bytes:
        # A form would be parsed; plain HTTP reads and overwrites public objects only.
        headers = {"Content-Type": "application/octet-stream", "x-amz-acl": "public-read-write"}
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Start a store that ends with the block.

    Raises:
        RuntimeError: it did not start.
    """
    from s3fs import S3FileSystem

    process = subprocess.Popen(
        [sys.executable, "-m", __spec__.name if __spec__ else __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port.isdigit():
            raise RuntimeError("the object store did not start; is the `dev` extra installed?")
        url = f"http://127.0.0.1:{port}"
        S3FileSystem.clear_instance_cache()  # else it would continue with the store before
        keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")
        yield ObjectStore(url, keys | {"AWS_ENDPOINT_URL_S3": url, "AWS_REGION": "us-east-1"})
    finally:
        S3FileSystem.clear_instance_cache()
        process.kill()
        process.wait()


class _Spoiler:
    """Counts the answers of a WSGI application and injects faults."""

    def __init__(self, application: Callable[..., Iterable[bytes]]):
        self._application = application
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._every = 0
        self._down = ""
        self._kinds = itertools.cycle(FAULTS)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]

        def answer(status: str, body: bytes = b"") -> list[bytes]:
            start(status, [("Content-Length", str(len(body)))])
            return [body]

        if path in ("/_faults", "/_down"):
            order = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            if path == "/_down":
                self._down = order
            else:
                self._every, self._kinds = order[0], itertools.cycle(order[1])
            return answer("200 OK")
        if path == "/_counts":
            return answer("200 OK", json.dumps(self._counts).encode())
        if self._down:
            return answer(self._down)
        if method != "GET" or path.count("/") < 2:
            return self._application(environ, start)
        fault = self._fault()
        if fault == "error":
            return answer("500 Internal Server Error")
        if fault == "reset":
            return _reset(environ)
        body = b"".join(self._application(environ, start))
        with self._lock:
            self._counts["bytes"] += len(body)
        if fault == "truncated":
            return _cut(body, environ)
        return _trickle(body) if fault == "slow" else [body]

    def _fault(self) -> str | None:
        with self._lock:
            self._counts["requests"] += 1
            if not self._every or self._counts["requests"] % self._every:
                return None
            fault = next(self._kinds)
            self._counts[fault] += 1
            return fault


def _cut(body: bytes, environ: dict[str, Any]) -> Iterator[bytes]:
    """Send half of the announced body, then close the connection."""
    yield body[: len(body) // 2]
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


def _trickle(body: bytes) -> Iterator[bytes]:
    step = len(body) // SLOW_PARTS + 1
    for start in range(0, len(body), step):
        time.sleep(SLOW_SECONDS)
        yield body[start : start + step]


def _reset(environ: dict[str, Any]) -> Iterable[bytes]:
    """Close the connection with an RST instead of an answer."""
    connection = environ["werkzeug.socket"]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.detach())
    raise ConnectionResetError("on purpose")


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def _serve() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = _Spoiler(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve()
