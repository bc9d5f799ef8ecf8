"""The recipes for real model pairs: each is a recipe, says what it rests on, and takes two steps on a tiny pair of its kind."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

import helpers
import stillroom
from stillroom.core import clock
from stillroom.core.errors import EntitlementUnknown
from stillroom.entitlement.store import TermsStore
from stillroom.runs.entitling import decide_recipe
from stillroom.runs.recipe import Recipe

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
by_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)

# The tiny family that stands in for each, and how far teacher's and student's heads are padded beyond the tokenizer.
STAND_INS: dict[str, tuple[str, int, int]] = {
    "gemma-2-9b-to-2b": ("gemma2", 0, 0),
    "llama-3.1-8b-to-3.2-1b": ("llama", 0, 0),
    "qwen2.5-7b-to-0.5b": ("mistral", 20, 4),
    "qwen3-1.7b-to-half-its-layers": ("qwen3", 0, 0),
    "qwen3-8b-to-0.6b": ("qwen3", 0, 0),
}


def test_there_are_recipes_and_each_has_its_stand_in() -> None:
    assert {path.stem for path in RECIPES} == set(STAND_INS)


@by_recipe
def test_it_is_a_recipe_with_its_hardware_and_its_result(path: Path) -> None:
    Recipe.from_yaml(path)
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^# Hardware +\S", text, re.MULTILINE)
    result = re.search(r"^# Expected result +(.+)$", text, re.MULTILINE)
    assert result, "no expected result"
    # A measured result names the dated file that holds it.
    stored = re.search(r"benchmarks/results/\S+\.json", result[1])
    assert result[1] == "not measured" or (stored and (path.parents[1] / stored[0]).exists())


@by_recipe
def test_its_verdict_is_the_one_it_states(path: Path) -> None:
    stated = re.search(r"^# Terms +([a-z-]+)(?:: asks (?:for intent\.(\w+)|to (confirm)))?", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert stated, "no line that says what the terms are"
    verdict = decide_recipe(Recipe.from_yaml(path), today=date(2026, 11, 24))
    assert (verdict.outcome, verdict.asks) == (stated[1], stated[2] or stated[3])


@by_recipe
def test_it_has_no_key_that_only_repeats_a_default(path: Path) -> None:
    """What a recipe says, it means: a reader should not have to find out which lines matter."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in ("generation", "training", "evaluation", "hardware", "targets"):
        defaults = Recipe.model_fields[name].default.model_dump(mode="json")
        repeated = [key for key, value in (tree.get(name) or {}).items() if defaults[key] == value]
        assert not repeated, f"{name}: {repeated}"


def _tiny(path: Path, folder: Path) -> dict[str, Any]:
    """The recipe with a tiny pair, six given answers and two steps in place of the real ones; everything else as it stands."""
    family, teacher_padding, student_padding = STAND_INS[path.stem]
    tree = Recipe.from_yaml(path).model_dump(mode="json")
    # Its terms stay those of the real pair.
    tree["terms"] |= {"model": tree["teacher"]["model"], "base_model": tree["student"]["model"]}
    tokenizer = helpers.tiny_tokenizer()
    layers = 1 + max((tree["student"]["from_teacher"] or {"layers": [1]})["layers"])
    tree["teacher"] = {
        "model": str(helpers.save_tiny(folder / "teacher", family, tokenizer=tokenizer, rows=len(tokenizer) + teacher_padding, layers=layers))
    }
    if tree["student"]["model"] is not None:
        student = helpers.save_tiny(folder / "student", family, tokenizer=tokenizer, rows=len(tokenizer) + student_padding, layers=1, seed=1)
        tree["student"] = {"model": str(student)}
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n} hours", "answer": f"PT{n}H"}) + "\n" for n in range(6)), encoding="utf-8")
    tree["prompts"] = {"path": str(prompts), "answers": "given"}
    tree["generation"]["max_new_tokens"] = 16
    tree["training"] |= {"steps": 2, "epochs": None, "sequences_per_step": 4}
    tree["hardware"] = {"device": "cpu", "threads": 1}
    return tree


def _answer_what_is_asked(tree: dict[str, Any], folder: Path) -> None:
    """As its user would: facts that only they know, and texts that they have read."""
    tree["intent"]["monthly_users"] = 1000
    tree["terms"]["generated_on"] = "2026-11-24"
    text = folder / "text.txt"
    text.write_text("The terms as they are.", encoding="utf-8")
    store = TermsStore.open()
    while (verdict := decide_recipe(Recipe.from_tree(tree))).asks == "confirm":
        record = next(reason.record for reason in verdict.reasons if reason.standing == "not confirmed")
        assert record is not None
        store.confirm(record, text, "a test", clock.now().date())


@by_recipe
def test_two_steps_on_a_tiny_pair(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = _tiny(path, tmp_path)
    monkeypatch.setenv("STILLROOM_TERMS", str(tmp_path / "store"))
    if not decide_recipe(Recipe.from_yaml(path)).allows:
        with pytest.raises(EntitlementUnknown):
            stillroom.run(Recipe.from_tree(tree), out=tmp_path / "refused", until="trained")
        _answer_what_is_asked(tree, tmp_path)
    run = stillroom.run(Recipe.from_tree(tree), out=tmp_path / "run", until="trained")
    steps = [line for line in map(json.loads, (run.directory / "metrics.jsonl").read_text().splitlines()) if line["name"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["nats_per_token"] > 0 and line["scored_tokens"] > 0 for line in steps)
    assert (run.student_path / "model.safetensors").exists()
