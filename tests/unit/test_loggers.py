"""Loggers: each gets every value once, also over a resumed run; one that fails never stops or changes a run."""

from __future__ import annotations

import contextlib
import errno
import json
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stillroom
from stillroom.core import durable
from stillroom.core.errors import RecipeError, StillroomError
from stillroom.runs import loggers as module
from stillroom.runs.loggers import Loggers, chosen
from stillroom.runs.observer import Silent
from stillroom.runs.recipe import LoggingSection, Recipe
from tiny_run import metrics_of, tiny_recipe

NAMES = ("tensorboard", "wandb", "trackio", "mlflow")


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Fake:
    """Stands where one of the three optional packages would: keeps what it was told by the run's key, over `processes`."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.facts: dict[str, Any] = {}

    def module(self, name: str) -> types.ModuleType:
        found = types.ModuleType(name)
        found.__spec__ = ModuleSpec(name, None)
        {"wandb": self._wandb, "trackio": self._trackio, "mlflow": self._mlflow}[name](found)
        return found

    def _run(self, key: str, facts: dict[str, Any]) -> Any:
        self.begun.append(key)
        self.facts = facts
        log = lambda values, step: self.values.setdefault(key, []).append((step, dict(values)))  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: self.ended.append(key))

    def _wandb(self, found: Any) -> None:
        def init(*, project: str, name: str, id: str, resume: str, dir: str, config: dict[str, Any], settings: Any) -> Any:
            assert resume == "allow"
            assert Path(dir).is_dir()
            return self._run(id, config | {"project": project, "name": name})

        found.init, found.Settings = init, lambda **options: options

    def _trackio(self, found: Any) -> None:
        def init(*, project: str, name: str, resume: str, config: dict[str, Any], **options: Any) -> Any:
            assert resume == "allow"
            print("* chatter")
            self.run = self._run(name, config | {"project": project, "name": name.rpartition("-")[0]})
            return self.run

        found.init, found.finish = init, lambda: self.run.finish()

    def _mlflow(self, found: Any) -> None:
        fake = self
        found.entities = types.SimpleNamespace(Metric=lambda key, value, timestamp, step: (key, value, step))

        class Client:
            def get_experiment_by_name(self, name: str) -> Any:
                self.project = name
                return types.SimpleNamespace(experiment_id="7") if fake.begun else None

            def create_experiment(self, name: str) -> str:
                return "7"

            def search_runs(self, experiments: list[str], filter_string: str, max_results: int) -> list[Any]:
                key = filter_string.removeprefix("tags.stillroom_key = '").removesuffix("'")
                return [types.SimpleNamespace(info=types.SimpleNamespace(run_id=key))] if key in fake.begun else []

            def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
                key = tags["stillroom_key"]
                fake._run(key, tags | {"project": self.project, "name": run_name})
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id=key))

            def update_run(self, run_id: str, status: str) -> None:
                assert status == "RUNNING"
                fake.begun.append(run_id)

            def log_batch(self, run_id: str, metrics: list[tuple[str, float, int]]) -> None:
                [step] = {step for _, _, step in metrics}
                fake.values.setdefault(run_id, []).append((step, {key: value for key, value, _ in metrics}))

            def set_terminated(self, run_id: str) -> None:
                fake.ended.append(run_id)

        found.MlflowClient = Client


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    found = {name: Fake() for name in NAMES[1:]}
    for name, fake in found.items():
        monkeypatch.setitem(sys.modules, name, fake.module(name))
    return found


def line_of(step: int) -> dict[str, Any]:
    return {
        "nats_per_token": 1 / step,
        "terms": {"forward_kl": 2 / step},
        "learning_rate": 0.5,
        "wall": {"tokens_per_second": 9.0},
        "scored_tokens": 3,
    }


def tensorboard_of(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def raising(error: BaseException) -> Callable[..., Any]:
    def action(*_: Any, **__: Any) -> Any:
        raise error

    return action


# --- each value once ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_run_in_three_parts_is_one_run_with_every_value_once(
    name: str, fakes: dict[str, Fake], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second part is killed before it has come as far as the first, so that what metrics.jsonl has is less than what was logged."""
    for logged, steps in ((0, range(1, 6)), (5, range(3, 5)), (4, range(3, 8))):
        loggers = Loggers((name,), tmp_path, Silent(), project="house", title="tiny", facts={"seed": 3})
        loggers.open(logged)
        for step in steps:
            loggers.log(step, "train", line_of(step))
        if step == 7:
            loggers.log(7, "validation", {"nats_per_token": 0.25, "terms": {}})
            loggers.close()
    assert loggers.failures == ()
    if name == "tensorboard":
        found = tensorboard_of(tmp_path)
        assert found["train/nats_per_token"] == [(step, pytest.approx(1 / step)) for step in range(1, 8)]
        assert found["train/terms/forward_kl"][6] == (7, pytest.approx(2 / 7))
        assert found["validation/nats_per_token"] == [(7, 0.25)]
    else:
        fake = fakes[name]
        [(key, values)] = fake.values.items()
        assert [(step, found["train/nats_per_token"]) for step, found in values if "train/nats_per_token" in found] == [
            (step, 1 / step) for step in range(1, 8)
        ]
        assert values[0][1] == {
            "train/nats_per_token": 1.0,
            "train/terms/forward_kl": 2.0,
            "train/learning_rate": 0.5,
            "train/tokens_per_second": 9.0,
        }
        assert values[-1] == (7, {"validation/nats_per_token": 0.25})
        assert set(fake.begun) == {key}
        assert fake.ended == [key]
        assert (fake.facts["project"], fake.facts["name"], str(fake.facts["seed"])) == ("house", "tiny", "3")
    assert capfd.readouterr().out == ""


def test_two_loops_are_two_runs(fakes: dict[str, Fake], tmp_path: Path) -> None:
    for part in ("student", "label_only"):
        (tmp_path / part).mkdir()
        loggers = Loggers(("wandb",), tmp_path / part, Silent())
        loggers.open(0)
        loggers.log(1, "train", line_of(1))
        loggers.close()
    assert len(fakes["wandb"].values) == 2


# --- which --------------------------------------------------------------------------------------------------------------------------------


def test_tensorboard_is_used_where_it_is_installed_and_nobody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(LoggingSection()) == ("tensorboard",)
    assert chosen(LoggingSection(loggers=())) == ()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert chosen(LoggingSection()) == ()


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "train"), ("wandb", "wandb"), ("trackio", "trackio"), ("mlflow", "mlflow")])
def test_a_package_that_is_missing_is_said_when_the_run_is_planned(name: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillroom.core.optional.find_spec", lambda asked: None if asked == name else object())
    recipe = Recipe.from_tree(tiny_recipe(tmp_path / "in") | {"logging": {"loggers": [name]}})
    with pytest.raises(StillroomError, match=rf"pip install 'stillroom\[{extra}\]'") as caught:
        stillroom.plan(recipe)
    assert caught.value.code == "missing-extra"
    assert f"no package `{name}`" in str(caught.value)


def test_a_logger_that_nobody_knows_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"logging\.loggers"):
        Recipe.from_tree({"teacher": {"model": "t"}, "student": {"model": "m"}, "prompts": {"path": "p"}, "logging": {"loggers": ["comet"]}})


# --- failing ------------------------------------------------------------------------------------------------------------------------------


def test_one_that_fails_is_noted_once_recorded_and_switched_off(fakes: dict[str, Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Notes()
    loggers = Loggers(NAMES, tmp_path, watcher)
    working = sys.modules["wandb"].init
    monkeypatch.setattr(sys.modules["wandb"], "init", raising(ConnectionError("no route\nto host")))
    loggers.open(0)
    for step in (1, 2, 3):
        if step == 2:
            monkeypatch.setattr(sys.modules["mlflow"].MlflowClient, "log_batch", raising(TimeoutError()))
        loggers.log(step, "train", line_of(step))
    monkeypatch.setattr(sys.modules["trackio"], "finish", raising(ValueError("not now")))
    loggers.close()
    assert watcher.notes == [
        "wandb is switched off: ConnectionError: no route",
        "mlflow is switched off: TimeoutError",
        "trackio is switched off: ValueError: not now",
    ]
    assert [(one.logger, one.step) for one in loggers.failures] == [("wandb", 0), ("mlflow", 2), ("trackio", 3)]
    assert [step for step, _ in tensorboard_of(tmp_path)["train/learning_rate"]] == [1, 2, 3]
    assert Loggers(NAMES, tmp_path, watcher).failures == loggers.failures
    # The next part tries again.
    monkeypatch.setattr(sys.modules["wandb"], "init", working)
    again = Loggers(("wandb",), tmp_path, watcher)
    again.open(3)
    again.log(4, "train", line_of(4))
    assert [step for values in fakes["wandb"].values.values() for step, _ in values] == [4]
    assert again.failures == loggers.failures


def test_a_state_that_cannot_be_read_costs_a_second_run_and_no_more(fakes: dict[str, Fake], tmp_path: Path) -> None:
    for text in ("torn {", "[]", '{"logged_step": 1}', '{"logged_step": "x", "keys": {}, "failures": []}'):
        (tmp_path / "loggers.json").write_text(text)
        loggers = Loggers(("wandb",), tmp_path, Silent())
        loggers.open(0)
        loggers.log(1, "train", line_of(1))
        loggers.close()
        assert loggers.failures == ()
    assert len(fakes["wandb"].values) == 4


def test_where_the_state_cannot_be_kept_nothing_is_logged_and_nothing_raised(
    fakes: dict[str, Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Notes()
    monkeypatch.setattr(durable, "write_json_atomic", raising(OSError(errno.ENOSPC, "No space left on device")))
    loggers = Loggers(("wandb", "tensorboard"), tmp_path, watcher)
    loggers.open(0)
    loggers.log(1, "train", line_of(1))
    loggers.close()
    assert fakes["wandb"].begun == []
    assert watcher.notes == ["loggers are switched off: loggers.json cannot be written"]


def test_a_full_disk_under_tensorboard_prints_no_traceback_and_starts_no_thread(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow: what is written beyond that fails as on a full disk."""
    code = """
import resource, signal, sys, threading
from pathlib import Path
from stillroom.runs.loggers import Loggers
from stillroom.runs.observer import Silent
class Say(Silent):
    def note(self, text): print("NOTE", text)
loggers = Loggers(("tensorboard",), Path(sys.argv[1]), Say())
loggers.open(0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
for step in range(1, 200):
    loggers.log(step, "train", {"nats_per_token": 1.0, "terms": {}})
loggers.close()
print("threads", threading.active_count())
print("failed", [one.logger for one in loggers.failures])
"""
    path = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=path, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("NOTE tensorboard is switched off: OSError")
    assert lines[1:] == ["threads 1", "failed ['tensorboard']"]
    steps = [step for step, _ in tensorboard_of(tmp_path)["train/nats_per_token"]]
    assert steps == list(range(1, len(steps) + 1))
    assert 3 < len(steps) < 30


# --- a run --------------------------------------------------------------------------------------------------------------------------------


class Dies(Silent):
    def __init__(self, step: int) -> None:
        self.step = step

    def progress(self, done: int, total: int, unit: str, fields: dict[str, str]) -> None:
        if unit == "step" and done == self.step:
            raise KeyboardInterrupt


def test_a_run_whose_loggers_fail_is_the_run_it_would_have_been(fakes: dict[str, Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tiny_recipe(tmp_path / "in") | {"evaluation": {}}
    whole = stillroom.run(Recipe.from_tree(tree), out=tmp_path / "whole", until="trained").directory
    monkeypatch.setattr(sys.modules["mlflow"].MlflowClient, "log_batch", raising(OSError(errno.ENOSPC, "No space left on device")))
    tree["logging"] = {"loggers": ["wandb", "mlflow", "trackio"], "project": "house"}
    threads = threading.active_count()
    for step in (5, 4, None):
        with contextlib.suppress(KeyboardInterrupt):
            stillroom.run(Recipe.from_tree(tree), out=tmp_path / "logged", until="trained", observer=Dies(step) if step else Silent())
    assert threading.active_count() == threads
    logged = tmp_path / "logged"
    assert metrics_of(logged) == metrics_of(whole)
    assert (logged / "student" / "model.safetensors").read_bytes() == (whole / "student" / "model.safetensors").read_bytes()
    [values] = fakes["wandb"].values.values()
    assert [step for step, found in values if "train/nats_per_token" in found] == [1, 2, 3, 4, 5, 6]
    assert [step for step, found in values if "validation/nats_per_token" in found] == [3, 6]
    assert fakes["wandb"].facts["recipe_sha256"] == Recipe.from_tree(tree).sha256
    assert str(tmp_path) not in json.dumps(fakes["wandb"].facts), "paths of this machine are nobody's business"
    failures = json.loads((logged / "training.json").read_text())["logger_failures"]
    assert {one["logger"] for one in failures} == {"mlflow"}
    assert not (logged / "tensorboard").exists()
