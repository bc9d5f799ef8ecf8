"""The recipe: strict, helpful, the same from YAML and from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.core.errors import RecipeError
from stillroom.runs.documented import descriptions
from stillroom.runs.recipe import Recipe, TermsSection
from stillroom.runs.template import recipe_template

SMALLEST: dict[str, Any] = {
    "teacher": {"model": "teacher"},
    "student": {"from_teacher": {"layers": [0, 2]}},
    "prompts": {"path": "prompts.jsonl"},
}


def test_the_template_is_a_recipe_and_says_what_every_key_is() -> None:
    text = recipe_template()
    assert Recipe.from_tree(yaml.safe_load(text)).teacher.model == "path/to/teacher"
    written = {line.strip().removeprefix("# ").partition(":")[0] for line in text.splitlines() if ":" in line}
    assert written >= set(Recipe.model_fields)
    for section in ("training", "targets", "hardware", "terms", "intent"):
        assert written >= set(type(getattr(Recipe.from_tree(SMALLEST), section)).model_fields)


def test_yaml_and_python_give_the_same_object_and_the_same_hash(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    from_python = Recipe.model_validate(SMALLEST)
    assert Recipe.from_yaml(path) == from_python
    assert Recipe.from_yaml(path).sha256 == from_python.sha256
    assert Recipe.from_tree({**SMALLEST, "seed": 1}).sha256 != from_python.sha256


def test_a_recipe_round_trips_through_its_canonical_json() -> None:
    recipe = Recipe.from_tree(SMALLEST)
    assert Recipe.model_validate_json(recipe.canonical()) == recipe


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"trainng": {}}, "`training`"),
        ({"training": {"learning_rat": 1e-3}}, "`learning_rate`"),
        ({"objective": {"terms": [{"divergense": "forward_kl"}]}}, "`divergence`"),
        ({"student": {"from_scratch": {"layers": 1, "width": 8, "heads": 1, "feedforward": 8}}}, "`feed_forward`"),
        ({"evaluation": {"label_only": {"path": "x", "patients": 3}}}, "`patience`"),
        ({"terms": {"license": "mit"}}, "`licence`"),
        ({"curation": {"verifier": {"regexp": "x"}}}, "`regex`"),
        ({"terms": {"datasets": [{"nmae": "x"}]}}, "`name`"),
        ({"intent": {"comercial": True}}, "`commercial`"),
        ({"intent": {"competes": {"value": False, "because": "x"}}}, "one of value, asserted_by, why"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_tree({**SMALLEST, **change})
    assert caught.value.code == "recipe-unknown-key"
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"student": {}},
        {"student": {"model": "a", "from_teacher": {"layers": [0]}}},
        {"prompts": {"path": "a", "dataset": "b"}},
        {"training": {"steps": 3, "epochs": 1}},
        {"training": {"steps": 0}},
        {"training": {"learning_rate": float("nan")}},
        {"training": {"learning_rate": float("inf")}},
        {"targets": {"target_temperature": 0}},
        {"objective": {"terms": []}},
        {"seed": -1},
        {"teacher": "teacher"},
        {"version": 2},
        {"curation": {"steps": ["refusals"]}},
        {"curation": {"steps": ["refusal", "refusal"]}},
        {"curation": {"verifier": {}}},
        {"curation": {"verifier": {"json_schema": {"minimum": float("nan")}}}},
        {"terms": {"access": "openai"}},
        {"terms": {"access": "api:"}},
        {"terms": {"datasets": [{"licence": "mit"}]}},
        {"terms": {"generated_on": "yesterday"}, "prompts": {"path": "p", "answers": "given"}},
        {"intent": {"task": "chatbot"}},
        {"intent": {"release": True}},
        {"intent": {"commercial": "no"}},
        {"intent": {"monthly_users": -1}},
        {"intent": {"monthly_users": 2**53}},
        {"intent": {"domicile": "Germany"}},
        {"intent": {"territories": []}},
        {"intent": {"competes": False}},
        {"intent": {"competes": {"value": False, "asserted_by": "legal", "why": "no"}}},
    ],
)
def test_a_bad_value_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_tree({**SMALLEST, **change})
    assert caught.value.code == "recipe-invalid"
    assert next(iter(change)) in str(caught.value)


def test_paths_are_relative_to_the_recipe_where_something_is_there(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**SMALLEST, "teacher": {"model": "owner/name"}}))
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.prompts.path == str(tmp_path / "prompts.jsonl")
    assert recipe.teacher.model == "owner/name"


def test_permissions_are_relative_to_the_recipe_too(tmp_path: Path) -> None:
    (tmp_path / "letter.yaml").write_text("")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**SMALLEST, "terms": {"authorisations": ["letter.yaml", "nowhere.yaml"]}}))
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").terms.authorisations == (str(tmp_path / "letter.yaml"), "nowhere.yaml")


def test_a_fact_that_is_wrong_is_named_with_what_it_takes() -> None:
    with pytest.raises(RecipeError, match=r"`intent\.task`.*task takes one of general-llm"):
        Recipe.from_tree({**SMALLEST, "intent": {"task": "chatbot"}})


def test_the_order_of_territories_is_no_difference() -> None:
    one, other = (Recipe.from_tree({**SMALLEST, "intent": {"territories": codes}}) for codes in (["US", "DE"], ["DE", "US", "DE"]))
    assert one.sha256 == other.sha256


def test_days_are_written_as_days(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for written in ("2026-11-24", "'2026-11-24'"):
        path.write_text(f"teacher: {{model: t}}\nstudent: {{from_teacher: {{layers: [0]}}}}\nprompts: {{path: p}}\nterms: {{catalogue: {written}}}\n")
        assert Recipe.from_yaml(path).model_dump(mode="json")["terms"]["catalogue"] == "2026-11-24"


def test_every_description_is_found_in_the_source() -> None:
    """And in the JSON Schema, whose text is made from them."""
    schema = Recipe.model_json_schema()["$defs"]["TermsSection"]["properties"]
    assert descriptions(TermsSection).keys() == TermsSection.model_fields.keys() == schema.keys()
    assert all(schema[name]["description"] == text for name, text in descriptions(TermsSection).items())


def test_sections_left_empty_are_defaults() -> None:
    assert Recipe.from_tree({**SMALLEST, "training": None, "hardware": None}) == Recipe.from_tree(SMALLEST)


@given(st.binary(max_size=400))
@settings(max_examples=200)
def test_any_bytes_are_a_recipe_or_a_recipe_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(data)
    with pytest.raises(RecipeError):
        Recipe.from_yaml(path)


_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_trees = st.recursive(_leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)


@given(st.dictionaries(st.sampled_from(list(Recipe.model_fields)), _trees, max_size=6))
@settings(max_examples=300)
def test_any_tree_is_a_recipe_or_a_recipe_error(tree: dict[str, Any]) -> None:
    # It never has all that a recipe needs, so it is always refused.
    with pytest.raises(RecipeError) as caught:
        Recipe.from_tree({key: value for key, value in tree.items() if key != "teacher"})
    assert caught.value.code in ("recipe-unknown-key", "recipe-invalid")


def test_a_parameter_that_a_divergence_does_not_have_is_refused() -> None:
    term = {"divergence": "forward_kl", "skew": 0.3}
    with pytest.raises(RecipeError) as raised:
        Recipe.from_tree(SMALLEST | {"objective": {"terms": [term]}})
    assert "forward_kl has no skew" in str(raised.value)
    kept = Recipe.from_tree(SMALLEST | {"objective": {"terms": [term | {"divergence": "skew_reverse_kl"}]}})
    assert kept.objective.terms[0].arguments == {"alpha": 0.3}
    assert Recipe.from_tree(kept.model_dump(mode="json")) == kept
