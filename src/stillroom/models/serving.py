"""A student behind an OpenAI-compatible address, by a server that exists: llama.cpp through `xllamacpp`, or vLLM where it is installed.

The server is a child process on this machine's own address. llama.cpp reads GGUF: the student is converted once, and again when it changed.
Importing this module imports no torch; only a conversion does.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from stillroom.core.errors import ModelError, ResourceError, StillroomError
from stillroom.core.hashing import sha256_files, sha256_hex
from stillroom.core.interrupts import StopRequest
from stillroom.core.optional import load, require

Backend: TypeAlias = Literal["llama.cpp", "vllm"]
Quantisation: TypeAlias = Literal["f32", "f16", "q8_0"]

HOST = "127.0.0.1"
# Raised when the same directory is to become another GGUF file than before.
_CONVERSION = 1
_CONVERTED_FROM = ("*.json", "*.jinja", "*.safetensors", "README.md", "NOTICE", "LICENSE", "obligations.md", "LICENSES/*")
_POLL_SECONDS = 0.05
_ENDS_WITHIN_SECONDS = 10.0
_LAST_WORDS = 12
_LOG_ERRORS_AND_WARNINGS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How a student is served. `context` is in tokens for each of `parallel` requests at once; None is the student's own, of which one request
    may take what the others leave. Port 0 is any free one.

    `threads` is llama.cpp's for computing: they wait for each other busily, so more than there are idle cores is slower than one. `exact` keeps
    its cache in float32 and its attention unfused, for log-probabilities that are compared; it is slower.
    """

    port: int = 0
    context: int | None = None
    parallel: int = 4
    threads: int = 1
    quantize: Quantisation = "f32"
    exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server of `student`: its process and what that writes on standard error, its address without a path, the name it knows the student by,
    and whether that has a chat template. `notes` are what was said of a conversion, () where none was needed.
    """

    backend: Backend
    student: Path
    process: subprocess.Popen[str]
    log: IO[str]
    address: str
    model: str
    chat: bool
    notes: tuple[str, ...] = ()

    @property
    def base_url(self) -> str:
        """What OpenAI's clients call base_url."""
        return f"{self.address}/v1"

    def until(self, stop: StopRequest) -> None:
        """Returns once `stop` is asked. Raises StillroomError 'server-failed' where the server ends before."""
        while not stop.asked:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_POLL_SECONDS)
            self.require_running()

    def require_running(self) -> None:
        """Raises StillroomError 'server-failed' where the server has ended."""
        if self.process.poll() is not None:
            raise _failed(self.backend, self.student, self.log)

    def curl(self) -> str:
        """A command for a shell that asks it one question."""
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]} if self.chat else {"prompt": "Hello"}
        body = json.dumps({"model": self.model, **asked, "max_tokens": 64, "temperature": 0}, ensure_ascii=False)
        path = "/chat/completions" if self.chat else "/completions"
        direct = ["--noproxy", "*"] if urllib.request.getproxies().get("http") else []
        return shlex.join(["curl", "-sS", *direct, self.base_url + path, "-H", "Content-Type: application/json", "-d", body])


@contextmanager
def served(student: Path | str, settings: ServerSettings | None = None, *, backend: Backend = "llama.cpp") -> Iterator[str]:
    """The base_url (http://127.0.0.1:PORT/v1) of a server over `student` inside the with block. Raises as `started`."""
    with started(Path(student), settings or ServerSettings(), backend) as server:
        yield server.base_url


@contextmanager
def started(student: Path, settings: ServerSettings, backend: Backend) -> Iterator[Server]:
    """A server over `student`, a Hugging Face directory or for llama.cpp a .gguf file, which answers when the block begins and is gone after it.

    Raises StillroomError 'missing-extra' where the backend is not installed, 'server-failed' where it ends instead of answering, ResourceError
    'port-in-use', ModelError 'model-missing', and for a directory whatever `export_gguf` raises.
    """
    if not student.exists():
        raise ModelError("model-missing", found=f"no {student}", expected="a Hugging Face directory or a .gguf file", do="Check the path.")
    if settings.port:
        require_free(settings.port)
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
        start = _start_llama if backend == "llama.cpp" else _start_vllm
        server = start(student, settings, stack, log)
        _wait_until_it_answers(server)
        yield server


def choose_backend(wanted: Literal["auto", "llama.cpp", "vllm"]) -> Backend:
    """The backend of `auto`: llama.cpp where it is installed, else vLLM. Raises StillroomError 'missing-extra' where neither is."""
    if wanted != "auto":
        return wanted
    if find_spec("xllamacpp") is None and find_spec("vllm") is not None:
        return "vllm"
    require("xllamacpp", extra="serve")
    return "llama.cpp"


# -- the GGUF file ------------------------------------------------------------------------------------------------------


@contextmanager
def converted(student: Path, quantize: Quantisation) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The student as a GGUF file: itself where it is one, else converted, kept beside the directory under a name that its content decides.

    With it comes what `export_gguf` notes; () where nothing was converted. Where nothing can be written beside the directory, the file lies in a
    temporary one and is gone after the block.
    """
    if student.is_file():
        yield student, ()
        return
    directory = student.resolve()
    kept = f".{directory.name}.{quantize}."
    name = f"{kept}{_digest(directory)[:16]}.gguf"
    notes: tuple[str, ...] = ()
    with ExitStack() as stack:
        beside = os.access(directory.parent, os.W_OK)
        file = (directory.parent if beside else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stillroom-")))) / name
        if not file.is_file():
            notes = load("stillroom.models.export_gguf", extra="train").export_gguf(directory, file, quantize=quantize).notes
            for old in file.parent.iterdir():
                if old.name.startswith(kept) and old.name.endswith(".gguf") and old != file:
                    old.unlink(missing_ok=True)
        yield file, notes


def _digest(directory: Path) -> str:
    """Of everything that the GGUF file is made from, and of how."""
    files = {str(path.relative_to(directory)): path for pattern in _CONVERTED_FROM for path in directory.glob(pattern) if path.is_file()}
    return sha256_hex(f"{_CONVERSION} {sha256_files(files)}".encode())


# -- the processes ------------------------------------------------------------------------------------------------------


def llama_settings(file: Path, name: str, settings: ServerSettings) -> dict[str, Any]:
    """What `llama_child` is told."""
    return {
        "file": str(file), "name": name, "host": HOST, "port": settings.port, "context": settings.context or 0, "parallel": settings.parallel,
        "threads": settings.threads, "exact": settings.exact, "verbosity": _LOG_ERRORS_AND_WARNINGS,
    }  # fmt: skip


def _start_llama(student: Path, settings: ServerSettings, stack: ExitStack, log: IO[str]) -> Server:
    require("xllamacpp", extra="serve")
    file, notes = stack.enter_context(converted(student, settings.quantize))
    name = student.resolve().name.removesuffix(".gguf")
    process = _child(
        [sys.executable, "-m", "stillroom.models.llama_child", json.dumps(llama_settings(file, name, settings))], stack, subprocess.PIPE, log
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    if not address:
        process.wait()
        raise _failed("llama.cpp", student, log)
    chat = _has_chat_template(student)
    return Server(backend="llama.cpp", student=student, process=process, log=log, address=address, model=name, chat=chat, notes=notes)


def _start_vllm(student: Path, settings: ServerSettings, stack: ExitStack, log: IO[str]) -> Server:
    if find_spec("vllm") is None:
        do = "Install vLLM as its own documentation says (it is not an extra of Stillroom), or use --backend llama.cpp."
        raise StillroomError("missing-extra", found="no package `vllm`", expected="vLLM in this environment", do=do)
    port, name = settings.port or free_port(), student.resolve().name
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(student), "--served-model-name", name]
    command += ["--host", HOST, "--port", str(port), "--max-num-seqs", str(settings.parallel)]
    command += ["--max-model-len", str(settings.context)] if settings.context else []
    process = _child(command, stack, log, log, {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"})
    address, chat = f"http://{HOST}:{port}", _has_chat_template(student)
    return Server(backend="vllm", student=student, process=process, log=log, address=address, model=name, chat=chat)


def _child(command: list[str], stack: ExitStack, out: IO[str] | int, log: IO[str], more: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A child that finds the modules that this process does, gets no Ctrl-C of ours, and is stopped when the stack is left."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | (more or {})
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=log, text=True, env=environment, start_new_session=True)
    stack.callback(_stop, process)
    return process


def _stop(process: subprocess.Popen[str]) -> None:
    """Asks the child to end by a signal and by the end of its standard input; ends it by force where it does not."""
    process.terminate()
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(_ENDS_WITHIN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _wait_until_it_answers(server: Server) -> None:
    # No proxy of the environment stands between this machine and itself.
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    while True:
        with suppress(OSError):  # refused, or 503 while it loads
            with ask(f"{server.address}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        if server.process.poll() is not None:
            raise _failed(server.backend, server.student, server.log)
        time.sleep(_POLL_SECONDS)


def _last_words(log: IO[str]) -> str:
    """The end of what a server wrote on standard error."""
    log.seek(0)
    return " | ".join(line.strip() for line in log.read().splitlines()[-_LAST_WORDS:] if line.strip())


def _failed(backend: Backend, student: Path, log: IO[str]) -> StillroomError:
    return StillroomError(
        "server-failed",
        found=f"{backend} ended instead of serving {student}; its last words: {_last_words(log) or 'none'}",
        expected="a server that answers",
        do="Look at its words: a file that it does not take, a context that does not fit into memory, or a port that is not allowed.",
    )


def _has_chat_template(student: Path) -> bool:
    """Whether the directory has one; a .gguf file is taken to have one."""
    if student.is_file() or (student / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((student / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def require_free(port: int) -> None:
    """Raises ResourceError 'port-in-use' where something listens at it."""
    with socket.socket() as held:
        # As servers do: an address whose last connections are still fading is free.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((HOST, port))
        except OSError as error:
            raise ResourceError(
                "port-in-use",
                found=f"port {port} of {HOST}: {error.strerror}",
                expected="a port that is free",
                do="Stop what uses it, or choose another --port; 0 takes any that is free.",
            ) from error


def free_port() -> int:
    """A port of this machine that nothing uses now."""
    with socket.socket() as held:
        held.bind((HOST, 0))
        port: int = held.getsockname()[1]
    return port
