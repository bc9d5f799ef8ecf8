"""A real server for tests and for the demonstrations: llama.cpp over the bundled teacher, or over any model directory or GGUF file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
