"""One process is two: the same gradient, the same trajectory, the same bytes from run to run and after a death, replicated and in parts.

The processes are forked by ranks.py, which see; here its lines are judged. `make soak` has every write point, and real processes that are killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stillroom.core.launch import Launch, launched
from stillroom.models.loading import empty_model
from stillroom.models.parallel import ALONE, stored_by_parameter
from stillroom.runs.loop import share
from tiny_run import metrics_of, tiny_recipe

SOURCE = Path(__file__).resolve().parents[2] / "src"
RANKS = Path(__file__).with_name("ranks.py")
RELATIVE = 1e-5
MODES = ("replicate", "shard")


def environment(**more: str) -> dict[str, str]:
    paths = [str(SOURCE), str(Path(__file__).resolve().parents[1])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **more}


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A directory in memory where there is one."""
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="stillroom-test-") as name:
        yield Path(name)


def lines_of(directory: Path, *cases: str) -> dict[str, dict[str, Any]]:
    """What ranks.py says of these cases, by name."""
    child = subprocess.run(
        [sys.executable, str(RANKS), str(directory), *cases], env=environment(), capture_output=True, text=True, timeout=3000, check=False
    )
    assert child.returncode == 0, child.stderr[-3000:]
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    return {line["case"]: line for line in lines}


# --- shares -------------------------------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 60), max_size=40), size=st.integers(1, 7))
def test_every_record_is_in_one_share_and_the_shares_are_alike(lengths: list[int], size: int) -> None:
    records = [f"{place:02d}" for place in range(len(lengths))]
    tokens = dict(zip(records, sorted(lengths), strict=True))
    shares = [share(records, rank, size) for rank in range(size)]
    assert sorted(record for mine in shares for record in mine) == records
    assert all(mine == sorted(mine) for mine in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    sums = [sum(tokens[record] for record in mine) for mine in shares]
    # No two shares are further apart than the longest record and the shortest, and than one record where there is one too many.
    assert max(sums) - min(sums) <= max(lengths, default=0)


def test_a_share_of_one_is_the_whole_in_its_order() -> None:
    assert share(["b", "c", "a"], 0, 1) == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Launch(0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Launch(5, 8, 1)),
        ({"RANK": "3"}, Launch(0, 1, 0)),
    ],
)
def test_a_process_knows_its_place_from_its_environment(given: dict[str, str], expected: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected


def test_alone_nothing_is_exchanged() -> None:
    assert ALONE.add([1.5, True]) == [1.5, True]
    assert ALONE.asked_of_first(lambda: True)
    with pytest.raises(ZeroDivisionError), ALONE.together():
        ALONE.first(lambda: 1 / 0)


def test_weights_can_be_read_in_parts_only_where_each_parameter_is_stored_by_its_name(tmp_path: Path) -> None:
    from helpers import save_tiny, tiny_model

    directory = save_tiny(tmp_path / "tied", "llama")
    files = [directory / "model.safetensors"]
    model = empty_model(tiny_model("llama", rows=220).config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert stored_by_parameter(model, files)
    assert not stored_by_parameter(empty_model(tiny_model("llama", rows=219).config), files)
    assert not stored_by_parameter(empty_model(tiny_model("gpt2", rows=220).config), files)
    (directory / "other.safetensors").write_bytes(files[0].read_bytes())
    assert not stored_by_parameter(model, files)


# --- one step -----------------------------------------------------------------------------------------------------------------------------


def test_the_gradient_of_two_processes_is_that_of_one(memory: Path) -> None:
    """Tied and untied heads, a soft cap, a bias, a projection, fused and by autograd; uneven shares, a process with no record, and with no scored row."""
    lines = lines_of(memory / "step", "gradients", "agreement")
    differing, verbs, narrow = lines.pop("another weight"), lines.pop("verbs"), lines.pop("bfloat16")
    assert len(lines) == 36
    for case, line in lines.items():
        assert line["names"], case
        assert line["whole"] > 0.1, case
        assert line["gradient"] <= RELATIVE, line
        assert line["numbers"] <= RELATIVE, line
    assert differing["codes"] == [2, 2]
    assert differing["words"] == 1
    assert verbs["codes"] == [0, 0], verbs
    assert narrow["codes"] == [0, 0], narrow


# --- whole runs ---------------------------------------------------------------------------------------------------------------------------


def test_the_trajectory_of_two_processes_is_that_of_one_and_its_own_again(memory: Path) -> None:
    lines = lines_of(memory / "trajectories", "trajectories", "from disk")
    assert_trajectories(lines, "hidden")
    for mode in MODES:
        files = ["optimiser.safetensors", "weights.safetensors"]
        for case, there in (("2 to 1", ["shard", "shard"] if mode == "shard" else files), ("1 to 2", files)):
            line = lines[f"{case}, {mode}"]
            assert line["steps"] == [4]
            assert line["files"] == there
            assert line["weights"] <= RELATIVE, line
            assert line["curve"] <= RELATIVE, line
    for case in ("part by part", "whole at first"):
        assert lines[case]["codes"] == [0, 0], lines[case]
    assert not lines["whole at first"]["differences"]


@pytest.mark.soak
def test_so_is_that_of_live_targets_and_a_student_from_disk(memory: Path) -> None:
    assert_trajectories(lines_of(memory / "live", "live trajectories"), "live, from disk")


def assert_trajectories(lines: dict[str, dict[str, Any]], kind: str) -> None:
    for mode in MODES:
        line = lines[f"one is two, {mode}, {kind}"]
        assert line["weights"] <= RELATIVE, line
        assert line["curve"] <= RELATIVE, line
        assert not lines[f"twice, {mode}, {kind}"]["differences"]


# --- what goes wrong ------------------------------------------------------------------------------------------------------------------------

# The exit codes of the processes in any order, and what exactly one of them says.
WAYS = {
    "an error": ([1, 1], "ValueError: the third batch is bad"),
    "killed": ([-9, 2], "[process-lost]"),
    "a signal": ([130, 130], "[interrupted]"),
    "disk": ([2, 2], "[disk-full]"),
}


def test_where_one_process_fails_all_end_and_one_says_why(memory: Path) -> None:
    """And the run goes on from there to the same bytes."""
    lines = lines_of(memory / "failures", "failures", "memory")
    assert_failures(lines, 4)
    for mode in MODES:
        line = lines[f"memory, {mode}"]
        assert line["codes"] == [0, 0], line
        assert line["halvings"] == [{"step": 1, "micro_batch": 1}]
        assert line["weights"] <= RELATIVE
        assert line["curve"] <= RELATIVE
    assert not lines["memory, replicate"]["told"]
    for told in lines["memory, shard"]["told"]:
        assert sum("with micro-batches of 1" in text for _, text in told) == 1
        assert all(code != 0 for code, _ in told)


@pytest.mark.soak
def test_so_they_do_in_the_other_mode(memory: Path) -> None:
    assert_failures(lines_of(memory / "other failures", "other failures"), 4)


def assert_failures(lines: dict[str, dict[str, Any]], expected: int) -> None:
    assert lines["none"]["codes"] == [2, 2]
    assert sum("[parallel-unavailable]" in text for text in lines["none"]["texts"]) == 1
    failed = {case: line for case, line in lines.items() if case.rpartition(", ")[0] in WAYS}
    assert len(failed) == expected
    for case, line in failed.items():
        codes, words = WAYS[case.rpartition(", ")[0]]
        assert sorted(line["codes"]) == codes, line
        assert sum(words in text for text in line["texts"]) == 1, line
        assert sum(bool(text) for text in line["texts"]) == 1, line
        assert line["seconds"] < 100, line
        assert not line["differences"], line


# --- every write point ------------------------------------------------------------------------------------------------------------------------


def assert_all_resumed(lines: dict[str, dict[str, Any]], least: dict[int, int]) -> None:
    """`least`: how many deaths each process must have died."""
    died = dict.fromkeys(least, 0)
    for case, line in lines.items():
        assert line["died"] == 137, line
        assert line["other"] not in (0, 137), f"{case}: the other process went on, or hung: {line['output']}"
        assert line["resumed"] == [0, 0], f"{case}: {line['output']}"
        assert not line["differences"], case
        died[line["rank"]] += 1
    assert all(died[rank] >= count for rank, count in least.items()), died


@pytest.mark.parametrize("mode", MODES)
def test_a_death_of_either_process_changes_nothing(mode: str, memory: Path) -> None:
    assert_all_resumed(lines_of(memory / "deaths", f"deaths {mode}"), {0: 3, 1: 1} if mode == "shard" else {0: 3})


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
def test_a_death_of_either_process_at_any_write_point_changes_nothing(mode: str, memory: Path) -> None:
    assert_all_resumed(lines_of(memory / "all deaths", f"all deaths {mode}"), {0: 100, 1: 10} if mode == "shard" else {0: 100})


# --- real processes and real signals ----------------------------------------------------------------------------------------------------------


class Pair:
    """Two real processes of one run, as torchrun would start them, to be killed."""

    def __init__(self, folder: Path, mode: str) -> None:
        tree = tiny_recipe(folder / "in", prompts=200)
        tree["training"] |= {"steps": 200, "checkpoint_every": 10, "validate_every": 25, "sequences_per_step": 8}
        tree["evaluation"] = {}
        tree["hardware"]["parallel"] = mode
        self.recipe, self.out, self.expected = folder / "recipe.yaml", folder / "out", folder / "whole"
        self.recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")

    def begin(self, out: Path) -> list[subprocess.Popen[str]]:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        arguments = [sys.executable, "-m", "stillroom", "collect" if not (out / "transfer_set.json").exists() else "train", str(self.recipe)]
        return [
            subprocess.Popen(
                [*arguments, "--out", str(out)],
                env=environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]

    def finish(self, out: Path) -> None:
        for child in self.begin(out):
            _, errors = child.communicate(timeout=600)
            assert child.returncode == 0, errors


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
def test_killed_ten_times_two_processes_end_with_the_same_bytes(mode: str, tmp_path: Path) -> None:
    """Twenty real kills over both ways: of the first process, of the second, or of both."""
    pair, draw = Pair(tmp_path, mode), random.Random(7)
    for out in (pair.expected, pair.out):
        pair.finish(out)
    pair.finish(pair.expected)
    for kill in range(10):
        children = pair.begin(pair.out)
        metrics = pair.out / "metrics.jsonl"
        until = time.monotonic() + 300
        while all(child.poll() is None for child in children) and (metrics.read_bytes().count(b"\n") if metrics.exists() else 0) < 15 * kill + 5:
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        for child in draw.choice([children[:1], children[1:], children]):
            child.send_signal(signal.SIGKILL)
        for child in children:
            _, errors = child.communicate(timeout=120)
            assert child.returncode != 0, errors
    assert not (pair.out / "training.json").exists()
    pair.finish(pair.out)
    assert (pair.out / "student" / "model.safetensors").read_bytes() == (pair.expected / "student" / "model.safetensors").read_bytes()
    assert metrics_of(pair.out) == metrics_of(pair.expected)
