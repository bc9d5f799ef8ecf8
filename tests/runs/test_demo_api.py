"""`stillroom demo --api` as a newcomer runs it, at small sizes: a real llama.cpp server that is probed, asked, and gone when the command ends.

What the whole of it reaches is in benchmarks/results (`benchmarks/demo_api.py`).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stillroom import Recipe, Run, demo
from stillroom.collect.probe import MOST_CALLS
from stillroom.collect.store import RequestStore
from stillroom.models import serving

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

PROMPTS, ITEMS = 200, 8
_SMALL = f"""
from stillroom import demo
demo.PROMPTS, demo.LABELLED_PAIRS, demo.EVALUATION_ITEMS, demo._STEPS = {PROMPTS}, 24, {ITEMS}, 4
from stillroom.cli import main
main()
"""


def started(out: Path, *more: object) -> subprocess.Popen[str]:
    """The command over fewer prompts and steps, in a process group of its own."""
    command = [sys.executable, "-c", _SMALL, "demo", "--api", "--out", str(out), *map(str, more)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def is_open(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex((serving.HOST, port)) == 0


def answers(out: Path) -> int:
    place = out / "requests.sqlite"
    if not (out / "targets").exists():  # the store is there from the first call of the probe on
        return 0
    with RequestStore.open(place, read_only=True) as store:
        return store.counts().answered


def test_it_stops_when_asked_goes_on_and_leaves_no_server(tmp_path: Path) -> None:
    out, port = tmp_path / "run", serving.free_port()
    first = started(out, "--port", port)
    while answers(out) < 20:
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 130, said
    assert {line.split()[0] for line in said.splitlines()} >= {"serve", "probe", "plan", "collect"}
    assert "[interrupted]" in said
    assert not is_open(port)
    bought = answers(out)
    assert 20 <= bought < PROMPTS
    second = started(out)  # at the port that it began with
    shown, said = second.communicate(timeout=300)
    assert second.returncode == 0, said
    assert not is_open(port)
    done = Run.open(out)
    assert done.recipe == Recipe.from_yaml(out / "inputs" / "recipe.yaml")
    assert f":{port}/" in str(done.recipe.teacher.endpoint)
    collection = done.report.collection
    assert collection is not None
    asked, evaluated = collection.rows["collect"], collection.rows["evaluate"]
    assert (asked.requested, evaluated.requested, asked.pending) == (PROMPTS, ITEMS, 0)
    assert asked.accepted == PROMPTS - sum(asked.rejected.values()) - sum(asked.failed.values())
    assert (collection.logprobs_verified, collection.logprobs_demoted) == (PROMPTS, {})
    assert "asked of the endpoint" in shown
    assert f"{PROMPTS} answers verified, 0 demoted" in shown
    with RequestStore.open(out / "requests.sqlite", read_only=True) as store:
        spend = store.spend()
    # Each row and each call of the probe once, but for what the server broke off, which is told.
    assert PROMPTS + ITEMS < spend.attempts <= PROMPTS + ITEMS + MOST_CALLS + spend.unknown
    third = started(out)
    again, said = third.communicate(timeout=120)
    assert third.returncode == 0, said
    assert again == shown
    assert "serve" not in said  # what is finished is read


def test_a_directory_of_another_run_is_left_as_it_is(tmp_path: Path, stillroom: Callable[..., tuple[int, str, str]]) -> None:
    """Here of the demo without an address; no server is begun for it."""
    recipe = demo.prepare(tmp_path, 0)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    code, _, said = stillroom("demo", "--api", "--out", tmp_path)
    assert code == 2
    assert "[run-other-recipe]" in said
    assert "serve " not in said
    assert not (tmp_path / "inputs" / "recipe.yaml").exists()


def test_a_port_that_is_taken(tmp_path: Path, stillroom: Callable[..., tuple[int, str, str]]) -> None:
    with socket.socket() as taken:
        taken.bind((serving.HOST, 0))
        taken.listen()
        code, _, said = stillroom("demo", "--api", "--out", tmp_path / "run", "--port", taken.getsockname()[1])
    assert code == 2
    assert "[port-in-use]" in said
    assert "--port" in said
    assert not (tmp_path / "run" / "requests.sqlite").exists()


def test_a_port_without_a_server(tmp_path: Path, stillroom: Callable[..., tuple[int, str, str]]) -> None:
    code, _, said = stillroom("demo", "--out", tmp_path / "run", "--port", 5)
    assert code == 2
    assert "--api" in said
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_made(tmp_path: Path, stillroom: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "file").touch()
    code, _, said = stillroom("demo", "--api", "--out", tmp_path / "file" / "run", "--port", 0)
    assert code == 2
    assert "--out" in said
