"""Runs: the recipe, the plan, the stages, the run directory and the report. Importing this room imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.core import optional
from stillroom.runs.directory import Run
from stillroom.runs.entitling import entitled
from stillroom.runs.observer import Observer, Silent
from stillroom.runs.plan import Plan
from stillroom.runs.projection import Piloted
from stillroom.runs.recipe import Recipe
from stillroom.runs.summaries import Bought

__all__ = ["Comparison", "Observer", "Piloted", "Plan", "Recipe", "Run", "collect_shard", "compare", "pilot", "plan", "run"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt and what each of the two answers to it."""

    prompt: str
    teacher: str
    student: str


def plan(recipe: Recipe, *, out: Path | str | None = None, cards: bool = False) -> Plan:
    """What a run of `recipe` would do; with `cards`, also which graphics cards it would fit on. Loads no weights, makes no request, writes nothing.

    `out` is where the run will be, whose request store may have what a probe and a pilot found.

    Of a teacher that can only be asked through an endpoint, and of whose endpoint nothing is said, there is no plan: raises what `run` would raise.
    """
    if recipe.terms.access != "weights" and recipe.teacher.endpoint is None:
        entitled(recipe)
    result: Plan = _torch_side("stillroom.runs.planning").plan(recipe, out=None if out is None else Path(out), cards=cards)
    return result


def run(recipe: Recipe, *, out: Path | str, until: str = "reported", needs: str | None = None, observer: Observer | None = None) -> Run:
    """Takes the run of `recipe` in the directory `out` from wherever it is to the state `until` (see directory.STATES).

    `needs`, where given, is a state that must have been reached before. Raises StillroomError, of which Interrupted can be resumed by the
    same call; EntitlementDenied and EntitlementUnknown come before any work.
    """
    if Run.begin(recipe, Path(out)).state == "new":
        entitled(recipe)  # here already: an answer in a moment, and without the extra that training needs
    result: Run = _torch_side("stillroom.runs.stages").run(recipe, Path(out), until=until, needs=needs, observer=observer or Silent())
    return result


def collect_shard(recipe: Recipe, *, out: Path | str, index: int, count: int, observer: Observer | None = None) -> Bought:
    """Buys what one of `count` machines is to buy (`index` from 0) of the answers that a run of `recipe` needs, into the request store of `out`.

    The store is all that it leaves: `stillroom.collect.machines.merge_stores` makes one of several, with which a run goes on. Raises as `run` does,
    and RecipeError where the teacher is behind no endpoint, or the answers come with the prompts.
    """
    entitled(recipe)
    result: Bought = _torch_side("stillroom.runs.stages").collect_shard(recipe, Path(out), index, count, observer=observer or Silent())
    return result


def pilot(recipe: Recipe, *, out: Path | str, rows: int = 20, observer: Observer | None = None) -> Piloted:
    """Buys the answers to `rows` of the recipe's prompts, as the run in `out` will and for it, and says what the whole collection will cost.

    Raises EntitlementDenied and EntitlementUnknown before any request; SpendCapReached, CollectError and Interrupted as a collection does, after which
    the same call goes on; and RecipeError where nothing is to be bought of prompts.
    """
    entitled(recipe)
    result: Piloted = _torch_side("stillroom.runs.piloting").pilot(recipe, Path(out), rows, observer or Silent())
    return result


def compare(run: Run, *, prompt: str | None = None, file: Path | None = None) -> list[Comparison]:
    """What teacher and student answer to `prompt`, or to each prompt of `file`, greedily."""
    return [Comparison(*row) for row in _torch_side("stillroom.runs.stages").compare(run, prompt=prompt, file=file)]


def _torch_side(module: str) -> Any:
    return optional.load(module, extra="train")
