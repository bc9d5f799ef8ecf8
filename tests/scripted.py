"""An endpoint that says what a test wants said, for answers and failures that the fake endpoint does not make: one of its own thread, on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from helpers import save_tiny
from stillroom.runs import Recipe
from tiny_run import tiny_recipe, write_rows


@dataclass
class Scripted:
    """`answers` by prompt: a text, or a text with its finish reason; others by `echo`. `before` may answer a request in its place (status, headers, body)."""

    answers: Mapping[str, str | tuple[str, str]] = field(default_factory=dict)
    echo: Callable[[str], str] = lambda prompt: f"You said: {prompt}"
    before: Callable[[int, str, Mapping[str, str]], tuple[int, dict[str, str], bytes] | None] = lambda number, prompt, headers: None
    base_url: str = ""
    prompts: list[str] = field(default_factory=list)
    """Of the requests received, without those that `before` answered."""
    bodies: list[bytes] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def received(self) -> int:
        return len(self.bodies)

    def reply(self, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        asked = json.loads(body)
        prompt = asked["messages"][-1]["content"]
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
        if (answered := self.before(number, prompt, headers)) is not None:
            return answered
        with self.lock:
            self.prompts.append(prompt)
        said = self.answers.get(prompt)
        text, reason = (said if isinstance(said, tuple) else (said, "stop")) if said is not None else (self.echo(prompt), "stop")
        return 200, {}, json.dumps(completion(asked["model"], text, reason)).encode()


def completion(model: str, text: str, reason: str = "stop") -> dict[str, Any]:
    """A whole answer of the chat route."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_790_000_000,
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}],
        "usage": {"prompt_tokens": 8, "completion_tokens": 8, "total_tokens": 16},
    }


@contextmanager
def scripted_endpoint(script: Scripted) -> Iterator[Scripted]:
    """`script` behind an address, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, headers, answer = script.reply(dict(self.headers), body)
            self.send_response(status)
            for name, value in {"content-type": "application/json", "content-length": str(len(answer)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def asked_recipe(folder: Path, url: str, prompts: list[str], items: list[dict[str, str]], **changes: Any) -> Recipe:
    """A recipe whose teacher is at `url` and learns two steps from its text; no baseline. Its key is in SCRIPTED_KEY."""
    tree = tiny_recipe(folder)
    tree |= {
        "teacher": {"endpoint": {"url": url, "model": "scripted", "key_variable": "SCRIPTED_KEY"}},
        "student": {"model": str(save_tiny(folder / "student", layers=1, width=16, max_position_embeddings=4096))},
        "prompts": {"path": str(write_rows(folder / "asked.jsonl", [{"prompt": text} for text in prompts]))},
        "collection": {"max_tokens": 10_000_000},
        "generation": {"max_new_tokens": 16, "sampling_temperature": 0.0},
        "targets": {"kind": "text"},
        "objective": {"terms": [{"divergence": "cross_entropy"}]},
        "training": tree["training"] | {"steps": 2, "sequences_per_step": 2},
        "evaluation": {"path": str(write_rows(folder / "measured.jsonl", items)), "resamples": 100},
    }
    return Recipe.from_tree({**tree, **changes})
