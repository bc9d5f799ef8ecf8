"""Prompts of which some come with an answer: those are taken as given, and the teacher is asked for the others alone."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from endpoint_runs import KEY, fake_recipe, settings
from stillroom.core.errors import ModelError, RecipeError
from stillroom.data import TransferSet
from stillroom.runs import Recipe, plan, run
from stillroom.runs.entitling import decide_recipe
from stillroom.testing.fake_endpoint import fake_endpoint
from tiny_run import tiny_recipe, write_rows


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_KEY", KEY)


def some_answered(path: str, every: int) -> list[dict[str, Any]]:
    """Gives every so many prompts of a file an answer; returns the rows."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for number, row in enumerate(rows):
        if number % every == 0:
            row["answer"] = f"{number} as it was given"
    write_rows(Path(path), rows)
    return rows


def lines(done: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.collect_path.read_text(encoding="utf-8").splitlines()]


def test_an_endpoint_is_asked_only_for_what_is_missing(tmp_path: Path) -> None:
    with fake_endpoint(settings()) as server:
        recipe = fake_recipe(tmp_path / "in", server.base_url)
        rows = some_answered(str(recipe.prompts.path), 3)
        tree = recipe.model_dump(mode="json", exclude_none=True)
        tree["prompts"]["answers"] = "mixed"
        done = run(Recipe.from_tree(tree), out=tmp_path / "run")
        assert server.bill.done == 16 + 6  # and the items of the evaluation
    given = [line["given"] for line in lines(done)]
    assert given == ["answer" in row for row in rows]
    assert [line["answer"] for line in lines(done) if line["given"]] == [row["answer"] for row in rows if "answer" in row]
    assert done.report.making.teacher_tokens.value == sum(line["answer_tokens"] for line in lines(done) if not line["given"]) > 0
    assert TransferSet.load(done.transfer_set_path).accepted > 8
    bought = json.loads(done.bought_path.read_text())["rows"]["collect"]
    assert bought["requested"] == 16
    assert [one["chosen"] for one in json.loads(done.plan_path.read_text())["decisions"] if one["what"] == "collection"] == ["16 requests"]
    entries = [json.loads(line)["entry"] for line in (done.directory / "ledger.jsonl").read_text().splitlines()]
    collected = [entry for entry in entries if entry["stage"] == "collect"]
    # What came with the prompts was not answered by this endpoint now, and says nothing of it.
    assert sum(entry["response"] is None for entry in collected) == 8
    assert {entry["access"]["path"] for entry in collected} == {"self-hosted"}


def test_a_teacher_whose_weights_are_here_writes_only_what_is_missing(tmp_path: Path) -> None:
    tree = tiny_recipe(tmp_path)
    tree["generation"]["sampling_temperature"] = 0.0
    rows = some_answered(tree["prompts"]["path"], 2)
    whole = run(Recipe.from_tree(tree), out=tmp_path / "all", until="collected")
    tree["prompts"]["answers"] = "mixed"
    done = run(Recipe.from_tree(tree), out=tmp_path / "mixed", until="collected")
    for row, mixed, all_written in zip(rows, lines(done), lines(whole), strict=True):
        assert mixed["given"] is ("answer" in row)
        assert mixed["answer"] == (row["answer"] if "answer" in row else all_written["answer"])


@pytest.mark.parametrize("every", [1, 1000])
def test_all_or_one_of_them_given(tmp_path: Path, every: int) -> None:
    with fake_endpoint(settings()) as server:
        recipe = fake_recipe(tmp_path / "in", server.base_url, prompts=5)
        some_answered(str(recipe.prompts.path), every)
        tree = recipe.model_dump(mode="json", exclude_none=True)
        tree["prompts"]["answers"] = "mixed"
        done = run(Recipe.from_tree(tree), out=tmp_path / "run", until="collected")
        assert server.bill.received == (0 if every == 1 else 4)
    assert sum(line["given"] for line in lines(done)) == (5 if every == 1 else 1)


def test_answers_that_are_given_need_no_teacher_at_all(tmp_path: Path) -> None:
    """Nobody listens at the endpoint: nothing is asked of it where all answers are given and there is nothing to evaluate on."""
    recipe = fake_recipe(tmp_path / "in", "http://127.0.0.1:9/v1")
    some_answered(str(recipe.prompts.path), 1)
    tree = recipe.model_dump(mode="json", exclude_none=True)
    tree["prompts"]["answers"] = "given"
    tree["evaluation"].pop("path")
    done = run(Recipe.from_tree(tree), out=tmp_path / "run")
    assert done.state == "reported"
    entries = [json.loads(line)["entry"] for line in (done.directory / "ledger.jsonl").read_text().splitlines()]
    assert {(entry["access"]["path"], entry["response"], entry["signal"]) for entry in entries if entry["stage"] == "collect"} == {
        ("self-hosted", None, "text")
    }
    assert json.loads(done.bought_path.read_text())["attempts"] == 0


def test_the_day_of_what_is_given_is_asked_for_and_no_distributions_are(tmp_path: Path) -> None:
    with fake_endpoint(settings()) as server:
        recipe = fake_recipe(tmp_path / "in", server.base_url)
        tree = recipe.model_dump(mode="json", exclude_none=True)
        tree["prompts"]["answers"] = "mixed"
        some_answered(str(recipe.prompts.path), 2)
        with pytest.raises(ModelError, match="prompts.answers: mixed"):
            plan(Recipe.from_tree({**tree, "targets": {"kind": "top_k"}}))
        assert server.bill.received == 0
    tree["terms"] = {"access": "api:deepseek", "model": "deepseek-chat"}
    tree["intent"] = {}
    asked = decide_recipe(Recipe.from_tree(tree), today=date(2026, 11, 29))
    told = decide_recipe(Recipe.from_tree({**tree, "terms": {**tree["terms"], "generated_on": "2026-11-20"}}), today=date(2026, 11, 29))
    if told.allows:
        assert asked.asks == "generated_on"
    tree["prompts"]["answers"] = "teacher"
    with pytest.raises(RecipeError, match="generated_on"):
        Recipe.from_tree({**tree, "terms": {**tree["terms"], "generated_on": "2026-11-20"}})
