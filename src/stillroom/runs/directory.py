"""The run directory: what is in it, what state it is in, and how it is opened.

    recipe.json  plan.json  decision*  decisions/  env.json   plan     (decisions are added to at every gate)
    targets/  ledger.jsonl  collect.jsonl  curation.json  curation.jsonl  transfer_set.json  collect  (of an endpoint: requests.sqlite  requests-logprobs/  requests.json)
    metrics.jsonl  tensorboard/  checkpoints/  student/       train    (label_only/ holds the baseline's own)
    evals/*.json  samples.jsonl                               evaluate
    report.json  report.html                                  report

A stage is done when its last file is there; every file is replaced atomically or appended to, so that a run killed anywhere can be resumed.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from stillroom.core import durable
from stillroom.core.errors import RunError
from stillroom.runs.recipe import CHANGEABLE, Recipe
from stillroom.runs.report import Report
from stillroom.runs.summaries import read

STATES = ("new", "planned", "collected", "trained", "evaluated", "reported")
# What may be in a directory that no run has begun in: a lock, inputs that whoever began it put there, and what a death in the first write left.
_NOT_OURS = (".lock", "inputs", ".recipe.json.partial", "requests-logprobs")
# The requests of a run whose teacher is behind an endpoint. A probe, a pilot or other machines may have begun it before the run.
REQUESTS = "requests.sqlite"
_PACKAGES = ("stillroom", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "pydantic")


@dataclass(frozen=True, slots=True)
class Run:
    """A directory with a recipe in it. Paths below are where things are or will be; nothing is read before it is asked for."""

    directory: Path
    recipe: Recipe

    @classmethod
    def begin(cls, recipe: Recipe, directory: Path) -> Run:
        """The run of `recipe` in `directory`, new or begun before. Raises RunError where the directory belongs to another recipe or to something else."""
        with durable.unwritable_reported(directory, "--out"):
            return cls._begun(recipe, directory)

    @classmethod
    def _begun(cls, recipe: Recipe, directory: Path) -> Run:
        run = cls(directory.resolve(), recipe)
        if run.recipe_path.exists():
            found = durable.read_json(run.recipe_path)
            if _fixed(found) != _fixed(recipe.model_dump(mode="json")):
                raise RunError(
                    "run-other-recipe",
                    found=f"{directory} holds a run of another recipe; they differ in {', '.join(_differences(found, recipe.model_dump(mode='json')))}",
                    expected="a new directory, or the same recipe",
                    why="results of two recipes in one directory could not be told apart",
                    do="Choose another --out, or go back to the recipe that began this run.",
                )
        elif directory.exists() and not directory.is_dir():
            raise RunError("run-not-a-run", found=f"{directory} is a file", expected="a directory, or nothing yet", do="Choose another --out.")
        elif directory.exists() and any(path.name not in _NOT_OURS and not path.name.startswith(REQUESTS) for path in directory.iterdir()):
            raise RunError(
                "run-not-a-run",
                found=f"{directory} is not empty and holds no recipe.json",
                expected="an empty or new directory, or a run begun before",
                do="Choose another --out.",
            )
        return run

    @classmethod
    def open(cls, directory: Path | str) -> Run:
        """A run that exists. Raises RunError where `directory` holds none."""
        directory = Path(directory)
        path = directory / "recipe.json"
        with durable.unwritable_reported(directory, "DIR"):
            there = path.exists()
        if not there:
            raise RunError("run-not-a-run", found=f"{directory} has no recipe.json", expected="a run directory", do="Check the path.")
        return cls(directory.resolve(), Recipe.from_tree(durable.read_json(path), name=str(path)))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other process out of the directory. Raises RunError 'run-locked'."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                "run-not-a-run", found=f"{self.directory}: {error.strerror}", expected="a directory", do="Choose another --out."
            ) from error
        with ExitStack() as held:
            with durable.unwritable_reported(self.directory, "--out"):
                held.enter_context(durable.DirectoryLock(self.directory))
            yield

    @property
    def state(self) -> str:
        """The last state of `STATES` that has been reached."""
        reached = "new"
        last_files = (self.env_path, self.transfer_set_path, self.trained_path, self.evaluated_path, self.page_path)
        for state, path in zip(STATES[1:], last_files, strict=True):
            if not path.exists():
                break
            reached = state
        return reached

    def require(self, state: str, command: str) -> None:
        """Raises RunError where `state` has not been reached; `command` is what reaches it."""
        if STATES.index(self.state) < STATES.index(state):
            raise RunError(
                "run-not-a-run",
                found=f"{self.directory} is {self.state}",
                expected=f"a run that is {state}",
                do=f"Do that stage first: stillroom {command} RECIPE --out {self.directory}",
            )

    @property
    def report(self) -> Report:
        """The finished report. Raises RunError where the run has not come that far."""
        self.require("reported", "run")
        return read(self.report_path, Report)

    @property
    def recipe_path(self) -> Path:
        return self.directory / "recipe.json"

    @property
    def plan_path(self) -> Path:
        return self.directory / "plan.json"

    @property
    def decision_path(self) -> Path:
        return self.directory / "decision.json"

    @property
    def decisions_path(self) -> Path:
        return self.directory / "decisions"

    @property
    def env_path(self) -> Path:
        return self.directory / "env.json"

    @property
    def store_path(self) -> Path:
        return self.directory / "targets"

    @property
    def collect_path(self) -> Path:
        return self.directory / "collect.jsonl"

    @property
    def requests_path(self) -> Path:
        return self.directory / REQUESTS

    @property
    def bought_path(self) -> Path:
        return self.directory / "requests.json"

    @property
    def curation_path(self) -> Path:
        return self.directory / "curation.json"

    @property
    def left_out_path(self) -> Path:
        return self.directory / "curation.jsonl"

    @property
    def transfer_set_path(self) -> Path:
        return self.directory / "transfer_set.json"

    @property
    def trained_path(self) -> Path:
        return self.directory / "training.json"

    @property
    def student_path(self) -> Path:
        return self.directory / "student"

    @property
    def label_only_path(self) -> Path:
        return self.directory / "label_only"

    @property
    def evals_path(self) -> Path:
        return self.directory / "evals"

    @property
    def evaluated_path(self) -> Path:
        return self.evals_path / "summary.json"

    @property
    def report_path(self) -> Path:
        return self.directory / "report.json"

    @property
    def page_path(self) -> Path:
        return self.directory / "report.html"


def _fixed(tree: Any) -> Any:
    """A recipe's tree without what may change while its run goes on."""
    section = tree.get("collection") if isinstance(tree, dict) else None
    return tree | {"collection": {key: value for key, value in section.items() if key not in CHANGEABLE}} if section else tree


def _differences(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Dotted paths at which two trees differ, the first five."""
    if isinstance(one, dict) and isinstance(other, dict):
        paths = [path for key in sorted(set(one) | set(other)) for path in _differences(one.get(key), other.get(key), f"{prefix}{key}.")]
        return paths[:5]
    return [] if one == other else [prefix.rstrip(".")]


def environment() -> dict[str, Any]:
    """Versions and machine, for env.json and the report."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    machine = {"system": platform.platform(), "processor": _processor(), "python": sys.version.split()[0]}
    called = "stillroom" if Path(sys.argv[0]).stem in ("stillroom", "__main__") else sys.argv[0]
    return {"versions": versions, "machine": machine, "command": [called, *sys.argv[1:]]}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
