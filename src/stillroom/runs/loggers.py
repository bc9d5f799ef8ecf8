"""Where a run's curves go beside metrics.jsonl: TensorBoard, wandb, trackio, mlflow, behind one small interface.

They are a convenience: one that fails is said once, recorded and switched off, and the run goes on. `loggers.json` in the run's directory keeps the
name under which each knows the run, so that a resumed run goes on in it, and the step up to which values were handed over, so that none is repeated.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from stillroom.core import clock, durable
from stillroom.core.errors import StillroomError
from stillroom.core.optional import load, require
from stillroom.runs.observer import Observer
from stillroom.runs.recipe import LoggingSection
from stillroom.runs.summaries import LoggerFailure

# The extra that installs each.
_EXTRAS = {"tensorboard": "train", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
_CURVES = ("nats_per_token", "learning_rate", "gradient_norm")


class Logger(Protocol):
    """One place that curves are shown in. Its methods may raise."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values of step `step`, by name. Steps do not fall."""
        ...

    def close(self) -> None:
        """Everything logged is to be kept."""
        ...


def chosen(section: LoggingSection) -> tuple[str, ...]:
    """The loggers of a recipe. Raises StillroomError 'missing-extra', naming the command, where the package of one is not installed."""
    if section.loggers == "auto":
        return ("tensorboard",) if find_spec("tensorboard") is not None else ()
    for name in section.loggers:
        require(name, extra=_EXTRAS[name])
    return tuple(dict.fromkeys(section.loggers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a logger is told of the run. `key` is unique, and the same whenever the run is resumed; `facts` are short texts and numbers."""

    project: str
    title: str
    key: str
    directory: Path
    facts: Mapping[str, Any]


class Loggers:
    """The loggers of one loop, by name. No method raises for what a logger does."""

    def __init__(
        self,
        names: Sequence[str],
        directory: Path,
        observer: Observer,
        *,
        project: str = "stillroom",
        title: str = "student",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._names, self._directory, self._observer = tuple(names), directory, observer
        self._project, self._title, self._facts = project, title, dict(facts or {})
        self._open: dict[str, Logger] = {}
        self._last_step = 0

    @property
    def failures(self) -> tuple[LoggerFailure, ...]:
        """Each time that one was switched off, over all parts of an interrupted run."""
        return tuple(self._state.failures)

    @cached_property
    def _state(self) -> _State:
        # A file that cannot be read costs no more than curves in two runs.
        with suppress(StillroomError, KeyError, TypeError, ValueError):
            if self._path.exists():
                return _State.of(durable.read_json(self._path))
        return _State()

    def _begin(self, name: str) -> None:
        key = self._state.keys[name]
        entry = Entry(project=self._project, title=self._title, key=key, directory=self._directory, facts=self._facts)
        self._open[name] = _LOGGERS[name](entry)

    def open(self, logged_step: int) -> None:
        """Begins, or goes on with, the run in each logger. Values up to `logged_step`, or up to what the last part handed over, are not logged again."""
        if not self._names:
            return
        self._state.logged_step = max(self._state.logged_step, logged_step)
        for name in self._names:
            self._state.keys.setdefault(name, secrets.token_hex(8))
        # Before any logger hears of it: a key that was used and lost would be a second run.
        if not self._kept():
            self._observer.note("loggers are switched off: loggers.json cannot be written")
            return
        for name in self._names:
            self._guarded(name, 0, partial(self._begin, name))

    def log(self, step: int, name: str, line: Mapping[str, Any]) -> None:
        """The numbers of a line of metrics.jsonl, each as `name`/its key."""
        if step <= self._state.logged_step or not self._open:
            return
        self._last_step = step
        values = {f"{name}/{key}": float(line[key]) for key in _CURVES if key in line}
        values |= {f"{name}/terms/{term}": float(nats) for term, nats in line.get("terms", {}).items()}
        values |= {f"{name}/{key}": float(value) for key, value in line.get("wall", {}).items()}
        for each, logger in list(self._open.items()):
            self._guarded(each, step, partial(logger.log, step, values))

    def close(self) -> None:
        """Lets every logger finish."""
        for name, logger in list(self._open.items()):
            self._guarded(name, self._last_step, logger.close)
        self._open = {}

    @property
    def _path(self) -> Path:
        return self._directory / "loggers.json"

    def _guarded(self, name: str, step: int, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._open.pop(name, None)
            self._state.failures.append(LoggerFailure(logger=name, step=step, error=_said(error)))
            self._observer.note(f"{name} is switched off: {_said(error)}")
            self._kept()

    def _kept(self) -> bool:
        """Whether the state is on the disk. Where that is full, whatever else needs room says so."""
        try:
            durable.write_json_atomic(self._path, self._state.tree())
        except (StillroomError, OSError):
            return False
        return True


@dataclass(slots=True)
class _State:
    """The content of loggers.json."""

    logged_step: int = 0
    keys: dict[str, str] = field(default_factory=dict)
    failures: list[LoggerFailure] = field(default_factory=list)

    @classmethod
    def of(cls, tree: dict[str, Any]) -> _State:
        failures = [LoggerFailure(**one) for one in tree["failures"]]
        return cls(int(tree["logged_step"]), {str(name): str(key) for name, key in tree["keys"].items()}, failures)

    def tree(self) -> dict[str, Any]:
        return {"logged_step": self.logged_step, "keys": self.keys, "failures": [one.model_dump() for one in self.failures]}


def _said(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


# -- one after the other ------------------------------------------------------------------------------------------------


class _TensorBoard:
    """An event file of our own in tensorboard/: the usual writer has a thread that prints a traceback where the disk is full."""

    def __init__(self, entry: Entry) -> None:
        self._events = load("tensorboard.compat.proto.event_pb2", extra="train")
        self._summaries = load("tensorboard.compat.proto.summary_pb2", extra="train")
        self._records = load("tensorboard.summary.writer.record_writer", extra="train")
        folder = entry.directory / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(clock.now().timestamp()):010d}.{socket.gethostname()}.{os.getpid()}"
        # Without a buffer, which would try again to write what did not fit when it is collected.
        self._file = (folder / name).open("ab", buffering=0)
        self._write(file_version="brain.Event:2")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._summaries.Summary(value=[self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(step=step, summary=summary)

    def close(self) -> None:
        self._file.close()

    def _write(self, **content: Any) -> None:
        record = io.BytesIO()
        self._records.RecordWriter(record).write(self._events.Event(wall_time=clock.now().timestamp(), **content).SerializeToString())
        if self._file.write(record.getvalue()) != record.tell():
            raise OSError(errno.ENOSPC, "only a part of a record could be written")


class _Wandb:
    """A run of wandb; its files are in the run's directory until they are synced."""

    def __init__(self, entry: Entry) -> None:
        wandb = load("wandb", extra="wandb")
        settings = wandb.Settings(console="off", silent=True, save_code=False, disable_git=True)
        self._run = wandb.init(
            project=entry.project,
            name=entry.title,
            id=entry.key,
            resume="allow",
            dir=str(entry.directory),
            config=dict(entry.facts),
            settings=settings,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of trackio, which knows runs by their names and prints what it does."""

    def __init__(self, entry: Entry) -> None:
        self._trackio = load("trackio", extra="trackio")
        with redirect_stdout(io.StringIO()):
            self._run = self._trackio.init(
                project=entry.project,
                name=f"{entry.title}-{entry.key}",
                resume="allow",
                config=dict(entry.facts),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()


class _Mlflow:
    """A run of mlflow, found again by a tag, since mlflow gives runs their ids itself."""

    def __init__(self, entry: Entry) -> None:
        mlflow = load("mlflow", extra="mlflow")
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient()
        found = self._client.get_experiment_by_name(entry.project)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(entry.project)
        runs = self._client.search_runs([experiment], filter_string=f"tags.stillroom_key = '{entry.key}'", max_results=1)
        if runs:
            self._run_id = runs[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            tags = {"stillroom_key": entry.key, **{name: str(value) for name, value in entry.facts.items()}}
            self._run_id = self._client.create_run(experiment, run_name=entry.title, tags=tags).info.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(clock.now().timestamp() * 1000)
        self._client.log_batch(self._run_id, metrics=[self._metric(key, value, now, step) for key, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


_LOGGERS: dict[str, Callable[[Entry], Logger]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio, "mlflow": _Mlflow}
