"""The same recipe gives the same bytes: run twice, killed anywhere and resumed, interrupted by Ctrl-C and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import stillroom
from stillroom.data import TransferSet
from stillroom.ledger import Ledger
from stillroom.runs.recipe import Recipe
from tiny_run import metrics_of, tiny_recipe

SOURCE = Path(__file__).resolve().parents[2] / "src"
CRASHING = Path(__file__).with_name("crashing.py")
PROMPTS, STEPS = 520, 300
# Fewer write points than these, and a stage has lost some, or the test has.
LEAST_POINTS = {"planned": 10, "collected": 50, "trained": 100, "evaluated": 20, "reported": 8}


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SOURCE), str(Path(__file__).resolve().parents[1])]),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


# --- twice ----------------------------------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "hidden": {},
    "hidden int8": {"targets": {"kind": "hidden", "state_dtype": "int8"}},
    "drawn": {"targets": {"kind": "drawn", "draws": 12}},
    "top-k": {"targets": {"kind": "top_k", "k": 5}, "objective": {"terms": [{"divergence": "reverse_kl"}]}},
    "full and live, from the teacher's layer": {
        "targets": {"kind": "full", "live": True},
        "student": {"from_teacher": {"layers": [0]}},
        "training": {"steps": 4, "sequences_per_step": 6, "micro_batch": 4, "learning_rate": 1e-3, "weight_decay": 0.1},
    },
    "an int8 teacher, padded, layers computed again": {
        "teacher": {"dtype": "int8"},
        "training": {"steps": 4, "sequences_per_step": 6, "micro_batch": 4, "packing": "off", "gradient_checkpointing": True},
    },
    "text": {"objective": {"terms": [{"divergence": "cross_entropy"}]}, "targets": {"kind": "auto"}},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_the_same_run_twice_gives_the_same_bytes(changes: dict[str, Any], tmp_path: Path) -> None:
    tree = tiny_recipe(tmp_path / "in")
    changes = changes | {"teacher": tree["teacher"] | changes.get("teacher", {})}
    recipe = Recipe.from_tree(tree | changes | {"evaluation": {}})
    runs = [stillroom.run(recipe, out=tmp_path / name, until="trained") for name in ("first", "second")]
    assert_same_student(*[run.directory for run in runs])


def test_another_seed_gives_another_student(tmp_path: Path) -> None:
    tree = tiny_recipe(tmp_path / "in") | {"evaluation": {}}
    runs = [stillroom.run(Recipe.from_tree(tree | {"seed": seed}), out=tmp_path / str(seed), until="trained") for seed in (0, 1)]
    assert weights_of(runs[0].directory) != weights_of(runs[1].directory)


def weights_of(directory: Path) -> bytes:
    return (directory / "student" / "model.safetensors").read_bytes()


def assert_same_student(expected: Path, found: Path) -> None:
    """Weights, curve and records; and a ledger in which each record has each of its entries once."""
    assert weights_of(found) == weights_of(expected)
    assert metrics_of(found) == metrics_of(expected)
    sets = [TransferSet.load(directory / "transfer_set.json") for directory in (expected, found)]
    assert sets[0].ids == sets[1].ids
    assert sets[0].dropped == sets[1].dropped
    counts = []
    for directory in (expected, found):
        ledger = Ledger.open(directory)
        ledger.verify()
        entries = [json.loads(line)["entry"] for line in (directory / "ledger.jsonl").read_text().splitlines()]
        assert len(entries) == len({(entry["stage"], entry["record"]) for entry in entries})
        counts.append({stage: sum(ledger.has(record, stage) for record in sets[0].ids) for stage in ("collect", "freeze", "train")})
    assert counts[0] == counts[1]
    assert counts[0]["collect"] == counts[0]["freeze"] == len(sets[0].ids)
    assert counts[0]["train"] > 0


# --- every write point ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory where there is one: hundreds of runs flush every file."""
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="stillroom-test-") as name:
        yield Path(name)


def deaths(directory: Path, *modes: str, kind: str = "hidden") -> list[dict[str, Any]]:
    command = [sys.executable, str(CRASHING), str(directory), kind, *modes]
    child = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=3000, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


def assert_all_resumed(lines: list[dict[str, Any]]) -> dict[str, int]:
    """And in how many places each stage could die."""
    places: dict[str, int] = {}
    for line in lines:
        where = f"{line['stage']}, write point {line['point']}"
        assert line["died"] == 137, f"{where}: {line['output']}"
        assert line["resumed"] == 0, f"{where} cannot be resumed: {line['output']}"
        assert not line["differences"], f"{where}: {line['differences']}"
        places[line["stage"]] = places.get(line["stage"], 0) + 1
        assert line["point"] == places[line["stage"]]
    return places


@pytest.mark.parametrize("states", [("trained",), ("planned", "collected", "evaluated", "reported")])
def test_a_death_at_any_write_point_changes_nothing(states: tuple[str, ...], memory: Path) -> None:
    """Every write point of the stages that end in `states`: a child dies there, another resumes; see crashing.py."""
    places = assert_all_resumed(deaths(memory, *states))
    assert places.keys() == set(states)
    assert all(count >= LEAST_POINTS[state] for state, count in places.items()), places


def test_a_death_at_any_write_point_of_collecting_drawn_targets_changes_nothing(memory: Path) -> None:
    places = assert_all_resumed(deaths(memory, "collected", kind="drawn"))
    assert places["collected"] > LEAST_POINTS["collected"]


@pytest.mark.soak
def test_two_deaths_in_a_whole_run_change_nothing(memory: Path) -> None:
    places = assert_all_resumed(deaths(memory, "whole"))
    assert places["whole"] >= sum(LEAST_POINTS.values())


# --- real processes and real signals ----------------------------------------------------------------------------------------------------------


class Work:
    """A longer run for a child to be stopped in, and the same run uninterrupted: two parts of prompts, and steps enough that none is missed."""

    def __init__(self, folder: Path, **hardware: Any) -> None:
        tree = tiny_recipe(folder / "in", prompts=PROMPTS)
        tree["training"] |= {"steps": STEPS, "checkpoint_every": 10, "validate_every": 25, "sequences_per_step": 8}
        tree["evaluation"] = {}
        tree["hardware"] |= hardware
        self.recipe, self.out = folder / "recipe.yaml", folder / "out"
        self.recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
        self.whole = stillroom.run(Recipe.from_yaml(self.recipe), out=folder / "whole", until="trained").directory

    def begin(self, command: str) -> subprocess.Popen[str]:
        program = "from stillroom.cli import main; main()"
        arguments = [sys.executable, "-c", program, command, str(self.recipe), "--out", str(self.out)]
        return subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def stop(self, number: int, file: str, lines: int, delay: float = 0.0) -> tuple[int, str]:
        """Begins or resumes the run, sends the signal once `file` has so many lines; how it ended, and its last words."""
        child = self.begin("run")
        until = time.monotonic() + 300
        while child.poll() is None and _lines(self.out / file) < lines:
            assert time.monotonic() < until
            time.sleep(0.001)
        time.sleep(delay)
        child.send_signal(number)
        _, errors = child.communicate(timeout=300)
        return child.returncode, errors

    def finish(self) -> None:
        """The last child goes to the end, and the bytes are those of the uninterrupted run."""
        child = self.begin("train")
        _, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors
        assert_same_student(self.whole, self.out)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("work"))


def test_killed_three_times_it_ends_with_the_same_bytes(work: Work, tmp_path: Path) -> None:
    work.out = tmp_path / "killed"
    draw = random.Random(20)
    moments = [("collect.jsonl", 1), ("metrics.jsonl", draw.randint(1, 40)), ("metrics.jsonl", draw.randint(60, 110))]
    for file, lines in moments:
        code, errors = work.stop(signal.SIGKILL, file, lines, delay=draw.uniform(0, 0.03))
        assert code == -signal.SIGKILL, errors
        assert not (work.out / "training.json").exists()
    work.finish()


@pytest.mark.soak
def test_killed_while_bodies_are_compiled_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """A process that goes on compiles anew, for the shapes that it meets first."""
    work = Work(tmp_path, compile=True)
    for file, lines in (("collect.jsonl", 1), ("metrics.jsonl", 40), ("metrics.jsonl", 150)):
        code, errors = work.stop(signal.SIGKILL, file, lines)
        assert code == -signal.SIGKILL, errors
    work.finish()


def test_ctrl_c_says_how_to_resume_and_resuming_ends_with_the_same_bytes(work: Work, tmp_path: Path) -> None:
    work.out = tmp_path / "interrupted"
    for file, lines, where in (("targets/manifest.json", 1, f"of {PROMPTS} prompts"), ("metrics.jsonl", 35, f"of {STEPS}")):
        code, errors = work.stop(signal.SIGINT, file, lines)
        assert code == 130, errors
        assert "[interrupted]" in errors
        assert where in errors
        assert f"run the same command again with --out {work.out}" in errors
        assert "Traceback" not in errors
    work.finish()
