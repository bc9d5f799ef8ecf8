"""The run directory: whose it is, how far it has come, and what is said of a damaged file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.core import durable
from stillroom.core.errors import RunError, StillroomError
from stillroom.runs.directory import STATES, Run
from stillroom.runs.plan import Plan
from stillroom.runs.recipe import Recipe
from stillroom.runs.report import Report
from stillroom.runs.summaries import Evaluation, Training, read

RECIPE = Recipe.from_tree(
    {"teacher": {"model": "teacher"}, "student": {"from_teacher": {"layers": [0]}}, "prompts": {"path": "prompts.jsonl"}},
)


def _begun(directory: Path, recipe: Recipe = RECIPE) -> Run:
    run = Run.begin(recipe, directory)
    directory.mkdir(exist_ok=True)
    durable.write_json_atomic(run.recipe_path, recipe.model_dump(mode="json"))
    return run


def test_a_directory_of_another_recipe_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    _begun(tmp_path / "run")
    other = Recipe.from_tree({**RECIPE.model_dump(), "seed": 1})
    with pytest.raises(RunError, match="seed") as caught:
        Run.begin(other, tmp_path / "run")
    assert caught.value.code == "run-other-recipe"
    assert Run.begin(RECIPE, tmp_path / "run").recipe == RECIPE


def test_a_directory_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError) as caught:
        Run.begin(RECIPE, tmp_path)
    assert caught.value.code == "run-not-a-run"


def test_a_directory_that_holds_only_inputs_is_free(tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    assert Run.begin(RECIPE, tmp_path).state == "new"


def test_the_state_is_that_of_the_last_stage_whose_files_are_all_there(tmp_path: Path) -> None:
    run = _begun(tmp_path)
    seen = [run.state]
    for path in (run.env_path, run.transfer_set_path, run.trained_path, run.evaluated_path, run.page_path):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        seen.append(run.state)
    assert seen == list(STATES)
    run.trained_path.unlink()
    assert run.state == "collected"


def test_open_returns_the_recipe_and_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        Run.open(tmp_path)
    _begun(tmp_path)
    assert Run.open(tmp_path).recipe == RECIPE


def test_a_report_that_is_not_there_yet_is_asked_for_in_vain(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        _ = _begun(tmp_path).report
    assert caught.value.code == "run-not-a-run"


def test_a_second_holder_of_the_lock_is_told_who_holds_it(tmp_path: Path) -> None:
    run = _begun(tmp_path)
    with run.locked(), pytest.raises(RunError) as caught, Run.begin(RECIPE, tmp_path).locked():
        pass
    assert caught.value.code == "run-locked"


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5).map(lambda v: json.dumps(v).encode())
)
@settings(max_examples=200)
def test_any_bytes_in_a_file_of_the_run_are_its_content_or_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(data)
    for model in (Plan, Report, Training, Evaluation):
        with pytest.raises(StillroomError) as caught:
            read(path, model)
        assert caught.value.code == "run-corrupt"
