"""A real server for tests and for the demonstrations: llama.cpp over the bundled teacher, or over any model directory or GGUF file; and a relay before it."""

from __future__ import annotations

import json
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from stillroom.models.export_gguf import export_gguf
from stillroom.models.serving import Server, ServerSettings, started

TEACHER = Path(__file__).parents[1] / "src" / "stillroom" / "demo" / "teacher"


@contextmanager
def llama_server(model: Path = TEACHER, *, exact: bool = True, parallel: int = 4, context: int | None = 256) -> Iterator[Server]:
    """llama.cpp over `model` in a process of its own on a free port, which answers when the block begins and is gone after it.

    A directory is converted into a temporary file, so nothing is written beside it. `exact`: log-probabilities as close to PyTorch's as they come.
    Raises StillroomError 'server-failed' with the server's last words where it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="stillroom-") as directory:
        file = model
        if model.is_dir():
            file = Path(directory) / f"{model.name}.gguf"
            export_gguf(model, file)
        with started(file, ServerSettings(exact=exact, parallel=parallel, context=context), "llama.cpp") as server:
            yield server


class Relay:
    """Stands before a server, hands every request on and its answer back; `change`, where set, is given the body asked and the answer's, and returns
    what is answered in its place."""

    def __init__(self, target: str) -> None:
        self.change: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None
        self.asked: list[dict[str, Any]] = []
        self._target = target.removesuffix("/v1")
        relay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status, answer = relay.forward(self.path, body)
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def forward(self, path: str, body: bytes) -> tuple[int, bytes]:
        asked = json.loads(body)
        self.asked.append(asked)
        request = urllib.request.Request(self._target + path, body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as found:
                status, answer = found.status, found.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        if self.change is not None:
            answer = json.dumps(self.change(asked, json.loads(answer))).encode()
        return status, answer

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def relayed(target: str) -> Iterator[Relay]:
    """A relay before `target`, on a port of its own."""
    relay = Relay(target)
    try:
        yield relay
    finally:
        relay.close()
