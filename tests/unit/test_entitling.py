"""From a recipe to what is asked of the terms: sources, use, the day, the user's own records; and what differs between two answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from own_terms import APACHE, DENIAL, DISPLAY, EVIDENCE, apache_with, confirm, own_terms, service
from stillroom import demo
from stillroom.core import clock
from stillroom.core.errors import EntitlementDenied, EntitlementError, EntitlementUnknown, ModelError, RecipeError
from stillroom.entitlement.facts import FACTS
from stillroom.entitlement.store import TermsStore
from stillroom.entitlement.verdict import Verdict
from stillroom.runs.entitling import decide_recipe, digests_of, drift, entitled, method_of, sources_of, terms_of, use_of
from stillroom.runs.recipe import IntentSection, Recipe

TODAY = date(2026, 11, 24)
Tree = dict[str, Any]
APACHE_TEACHER: Tree = {"terms": {"licence": "Apache-2.0"}}


def recipe(**changes: Any) -> Recipe:
    tree: Tree = {"teacher": {"model": "owner/teacher"}, "student": {"from_teacher": {"layers": [0]}}, "prompts": {"path": "p.jsonl"}}
    scratch: Tree = {"student": {"from_scratch": {"layers": 1, "width": 8, "heads": 1, "feed_forward": 8}}}
    return Recipe.from_tree(tree | scratch | changes)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_card(hub: Path, kind: str, name: str, licence: str) -> None:
    """A card in the hub's cache."""
    repository = hub / f"{kind}--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(f"---\nlicense: {licence}\n---\n")


def decided(one: Recipe, store: TermsStore | None = None, today: date = TODAY) -> Verdict:
    return decide_recipe(one, today=today, store=store or TermsStore.open(Path("/nowhere/at/all")))


# --- sources ----------------------------------------------------------------------------------------------------------------------------------


def test_the_teacher_alone() -> None:
    (teacher,) = sources_of(recipe())
    assert (teacher.name, teacher.access, teacher.role, teacher.licence) == ("owner/teacher", "weights", "teacher", None)


def test_base_and_datasets_are_sources_too() -> None:
    one = recipe(
        student={"model": "owner/base"},
        prompts={"dataset": "owner/prompts"},
        terms={"base_licence": "mit", "datasets": [{"name": "owner/prompts", "licence": "cc-by-4.0"}, {"name": "owner/more"}]},
    )
    found = [(source.role, source.name, source.access, source.licence) for source in sources_of(one)]
    assert found == [
        ("teacher", "owner/teacher", "weights", None),
        ("base", "owner/base", "weights", "mit"),
        ("dataset", "owner/prompts", "dataset", "cc-by-4.0"),
        ("dataset", "owner/more", "dataset", None),
    ]


def test_what_the_card_says_goes_before_what_the_recipe_says(hub: Path) -> None:
    put_card(hub, "models", "owner/teacher", "mit")
    put_card(hub, "models", "owner/base", "other")
    put_card(hub, "datasets", "owner/prompts", "cc-by-4.0")
    one = recipe(student={"model": "owner/base"}, prompts={"dataset": "owner/prompts"}, terms={"licence": "Apache-2.0", "base_licence": "Apache-2.0"})
    found = [(source.licence, source.declared_by) for source in sources_of(one)]
    assert found == [("mit", "its model card"), ("Apache-2.0", "the recipe's terms.base_licence"), ("cc-by-4.0", "its dataset card")]


def test_a_directory_proves_nothing_by_its_name_and_a_snapshot_does(tmp_path: Path, hub: Path) -> None:
    directory = tmp_path / "claude-opus-4"
    directory.mkdir()
    (directory / "README.md").write_text("---\nlicense: mit\n---\n")
    (local,) = sources_of(recipe(teacher={"model": str(directory)}))
    assert (local.name, local.licence) == ("./claude-opus-4", "mit")
    put_card(hub, "models", "owner/teacher", "mit")
    (snapshot,) = sources_of(recipe(teacher={"model": str(hub / "models--owner--teacher" / "snapshots" / "c0ffee")}))
    assert (snapshot.name, snapshot.licence) == ("owner/teacher", "mit")
    (named,) = sources_of(recipe(teacher={"model": str(directory)}, terms={"model": "owner/other"}))
    assert named.name == "owner/other"


def test_a_teacher_that_is_no_model_here_has_no_card(hub: Path) -> None:
    put_card(hub, "models", "gpt-5.2", "mit")
    (teacher,) = sources_of(recipe(teacher={"model": "gpt-5.2"}, terms={"access": "api:openai"}))
    assert (teacher.name, teacher.access, teacher.licence) == ("gpt-5.2", "api:openai", None)


# --- use --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, "hidden"),
        ({"targets": {"kind": "text"}}, "text"),
        ({"targets": {"kind": "top_k"}}, "logits"),
        ({"targets": {"kind": "full"}}, "logits"),
        ({"targets": {"kind": "hidden"}}, "hidden"),
        ({"objective": {"terms": [{"divergence": "cross_entropy"}]}}, "text"),
        ({"objective": {"terms": [{"divergence": "cross_entropy"}, {"divergence": "forward_kl"}]}}, "hidden"),
        ({"student": {"from_teacher": {"layers": [0]}}, "targets": {"kind": "text"}}, "weights"),
        ({"terms": {"access": "api:openai"}}, "logprobs"),
        ({"terms": {"access": "api:openai"}, "targets": {"kind": "top_k"}}, "logprobs"),
        ({"terms": {"access": "api:openai"}, "targets": {"kind": "text"}}, "text"),
    ],
)
def test_the_method_is_the_most_that_the_plan_may_choose(changes: Tree, method: str) -> None:
    assert method_of(recipe(**changes)) == method
    assert use_of(recipe(**changes)).facts["method"] == method


def test_what_is_not_stated_is_not_a_fact() -> None:
    use = use_of(recipe())
    assert dict(use.facts) == {"purpose": "train", "method": "hidden", "modality": "text"}
    assert (use.assertions, use.student_name) == ((), None)


def test_every_stated_fact_arrives() -> None:
    stated = {
        "purpose": "train",
        "task": "classifier",
        "competes": {"value": False, "asserted_by": "legal", "why": "it sorts our own mail"},
        "release": "internal",
        "commercial": False,
        "publish_dataset": False,
        "monthly_users": 0,
        "group_revenue_usd": 5,
        "model_as_a_service": False,
        "assistant_business": True,
        "domicile": "DE",
        "territories": ["US", "DE"],
    }
    use = use_of(recipe(intent={**stated, "student_name": "x"}))
    assert set(stated) == {name for name, fact in FACTS.items() if fact.stated}
    assert {name: use.facts[name] for name in stated} == stated | {"competes": False, "territories": frozenset({"DE", "US"})}
    assert [(one.fact, one.value, one.asserted_by, one.why) for one in use.assertions] == [("competes", False, "legal", "it sorts our own mail")]
    assert use.student_name == "x"


def test_the_choices_of_the_recipe_are_those_of_the_facts() -> None:
    schema = IntentSection.model_json_schema()["properties"]
    for name, fact in FACTS.items():
        if fact.stated and fact.kind == "choice":
            assert tuple(schema[name]["anyOf"][0]["enum"]) == fact.choices


# --- the verdict ------------------------------------------------------------------------------------------------------------------------------


def test_a_licence_in_the_recipe_is_enough_where_the_card_does_not_say() -> None:
    assert decided(recipe()).outcome == "unknown"
    verdict = decided(recipe(**APACHE_TEACHER))
    assert verdict.outcome == "allow-with-obligations"
    assert [reason.cited for reason in verdict.reasons] == [f"{APACHE}#grant", f"{APACHE}#outputs"]
    assert digests_of(verdict) == tuple(line.split(" ")[1] for line in verdict.instruments)


@pytest.mark.parametrize("licence", ["llama3.1", "our contract"])
def test_card_and_recipe_must_not_contradict_each_other(hub: Path, licence: str) -> None:
    put_card(hub, "models", "owner/teacher", "apache-2.0")
    assert decided(recipe(terms={"licence": "Apache License, Version 2.0"})).allows
    verdict = decided(recipe(terms={"licence": licence}))
    assert (verdict.outcome, verdict.asks) == ("unknown", "licence")
    assert verdict.question is not None
    assert f"under {licence}, as the recipe says, or under apache-2.0, as its card does" in verdict.question
    assert not verdict.obligations


def test_a_denial_stands_whatever_else_is_contradicted(hub: Path, tmp_path: Path) -> None:
    put_card(hub, "models", "owner/teacher", "apache-2.0")
    store = own_terms(tmp_path / "store", apache_with(DENIAL))
    assert decided(recipe(terms={"licence": "mit"}), store).outcome == "deny"


def test_the_day_is_that_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = own_terms(tmp_path / "store", service())
    one = recipe(teacher={"model": "acme-1"}, terms={"access": "api:acme"})
    confirm(store, "acme-api@2026-01-01", TODAY)
    monkeypatch.setenv("STILLROOM_TERMS", str(store.directory))
    outcomes = []
    for day in (datetime(2026, 11, 25, tzinfo=UTC), datetime(2027, 6, 1, tzinfo=UTC)):
        monkeypatch.setattr(clock, "now", lambda day=day: day)
        outcomes.append(decide_recipe(one).outcome)
    assert outcomes == ["allow", "unknown"]


def test_a_pinned_catalogue_and_a_day_to_come_are_refused() -> None:
    decided(recipe(terms={"licence": "mit", "catalogue": "2026-11-24"}))
    with pytest.raises(RecipeError, match=r"terms\.catalogue"):
        decided(recipe(terms={"licence": "mit", "catalogue": "2026-11-23"}))
    with pytest.raises(RecipeError, match=r"terms\.generated_on"):
        decided(recipe(prompts={"path": "p", "answers": "given"}, terms={"licence": "mit", "generated_on": "2026-11-25"}))
    with pytest.raises(RecipeError, match=r"terms\.generated_on"):
        recipe(terms={"generated_on": "2026-11-24"})


# --- answers that are given -------------------------------------------------------------------------------------------------------------------


def versions(second: Tree | None) -> list[Tree]:
    """A licence whose first version forbids and whose second does not."""
    common = {"kind": "licence", "provider": "acme", "title": "Acme Licence", "url": "https://acme.example/l", "fixed": True, "evidence": EVIDENCE}
    covers = {"applies_to": {"access": ["weights"]}}
    grant = {
        "id": "all",
        "locator": "1",
        "effect": "permit",
        "actions": ["train-on-output", "use-logits"],
        "paraphrase": "Everything may be done with it.",
    }
    first = common | covers | {"id": "acme@2024-01-01", "effective": "2024-01-01", "superseded": "2025-01-01", "clauses": [grant, DENIAL]}
    last = common | covers | {"id": "acme@2025-01-01", "effective": "2025-01-01", "clauses": [grant, *([second] if second else [])]}
    return [first, last]


def test_the_day_of_given_answers_is_asked_for_where_it_can_change_the_answer(tmp_path: Path) -> None:
    store = own_terms(tmp_path / "store", *versions(None))
    given = {"path": "p.jsonl", "answers": "given"}
    assert decided(recipe(terms={"licence": "acme"}), store).outcome == "allow"
    undated = decided(recipe(prompts=given, terms={"licence": "acme"}), store)
    assert (undated.outcome, undated.asks) == ("unknown", "generated_on")
    assert decided(recipe(prompts=given, terms={"licence": "acme", "generated_on": "2025-06-01"}), store).outcome == "allow"
    assert decided(recipe(prompts=given, terms={"licence": "acme", "generated_on": "2024-06-01"}), store).outcome == "deny"
    # Of Apache-2.0 there is one version, so no day matters.
    assert decided(recipe(prompts=given, **APACHE_TEACHER), store).allows


def test_the_day_of_what_a_service_answered_is_always_asked_for(tmp_path: Path) -> None:
    store = own_terms(tmp_path / "store", service())
    confirm(store, "acme-api@2026-01-01", TODAY)
    acme = {"teacher": {"model": "acme-1"}, "prompts": {"path": "p.jsonl", "answers": "given"}}
    assert decided(recipe(**acme, terms={"access": "api:acme"}), store).asks == "generated_on"
    assert decided(recipe(**acme, terms={"access": "api:acme", "generated_on": "2026-11-01"}), store).outcome == "allow"


# --- written permissions ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def permitted(tmp_path: Path) -> Callable[..., Verdict]:
    """The verdict where Apache-2.0 forbids training and a permission given to Example Ltd lifts it."""
    letter = tmp_path / "letter.txt"
    letter.write_text("You may.")
    permission = {
        "id": "letter", "grantor": "The work's owner", "holder": "Example Ltd", "instruments": ["apache-2.0"], "actions": ["train-on-output"],
        "granted": "2026-01-01", "expires": "2027-01-01", "document": "letter.txt", "document_sha256": hashlib.sha256(b"You may.").hexdigest(),
    }  # fmt: skip
    (tmp_path / "permission.yaml").write_text(yaml.safe_dump({"authorisations": [permission]}))
    (tmp_path / "recipe.yaml").write_text("")
    store = own_terms(tmp_path / "store", apache_with(DENIAL))

    def verdict(**intent: Any) -> Verdict:
        one = recipe(terms={"licence": "Apache-2.0", "authorisations": ["permission.yaml"]}, intent=intent)
        return decided(one.with_paths_relative_to(tmp_path), store)

    return verdict


def test_a_permission_lifts_for_whom_it_was_given_to(permitted: Callable[..., Verdict]) -> None:
    assert permitted(holder="example ltd").outcome == "allow-with-obligations"


@pytest.mark.parametrize(("intent", "says"), [({}, "nobody says who accepts"), ({"holder": "Somebody Else"}, "accepted by Somebody Else")])
def test_a_permission_for_somebody_else_counts_for_nothing(permitted: Callable[..., Verdict], intent: Tree, says: str) -> None:
    verdict = permitted(**intent)
    assert verdict.outcome == "deny"
    assert any("counts for nothing" in warning and says in warning for warning in verdict.warnings)


def test_a_permission_that_is_not_there_is_an_error() -> None:
    with pytest.raises(EntitlementError, match="nowhere"):
        decided(recipe(terms={"licence": "mit", "authorisations": ["nowhere.yaml"]}))


# --- the gate ---------------------------------------------------------------------------------------------------------------------------------


def test_the_gate_lets_through_what_is_allowed_and_nothing_else(tmp_path: Path) -> None:
    nothing, forbidding = own_terms(tmp_path / "a"), own_terms(tmp_path / "b", apache_with(DENIAL))
    assert entitled(recipe(**APACHE_TEACHER), today=TODAY, store=nothing).allows
    with pytest.raises(EntitlementDenied, match="no-training"):
        entitled(recipe(**APACHE_TEACHER), today=TODAY, store=forbidding)
    with pytest.raises(EntitlementUnknown, match="Under which licence"):
        entitled(recipe(), today=TODAY, store=nothing)
    with pytest.raises(RecipeError, match="evaluate"):
        entitled(recipe(**APACHE_TEACHER, intent={"purpose": "evaluate"}), today=TODAY, store=nothing)


def test_an_api_teacher_that_is_allowed_needs_an_endpoint(tmp_path: Path) -> None:
    store = own_terms(tmp_path / "store", service())
    confirm(store, "acme-api@2026-01-01", TODAY)
    with pytest.raises(ModelError, match="no teacher.endpoint to ask") as caught:
        entitled(recipe(teacher={"model": "acme-1"}, terms={"access": "api:acme"}), today=TODAY, store=store)
    assert caught.value.code == "model-unsupported"
    asked = {"endpoint": {"url": "https://api.acme.example/v1", "model": "acme-1"}, "tokenizer": "t"}
    assert entitled(recipe(teacher=asked, terms={"access": "api:acme"}), today=TODAY, store=store).allows


# --- what is told -----------------------------------------------------------------------------------------------------------------------------


def test_the_lines_of_a_plan_have_citations_obligations_and_the_question() -> None:
    allowed = terms_of(recipe(**APACHE_TEACHER), decided(recipe(**APACHE_TEACHER)))
    assert (allowed.outcome, allowed.teacher, allowed.licence, allowed.question) == ("allow-with-obligations", "owner/teacher", "Apache-2.0", None)
    assert all(part in allowed.reasons[0] for part in ("Apache License, Version 2.0", f"{APACHE}#grant", "section 2", "https://", "P1"))
    assert any("licence-copy" in line and "release is weights" in line for line in allowed.obligations)
    unknown = terms_of(recipe(), decided(recipe()))
    assert unknown.question is not None
    assert unknown.reasons == ["owner/teacher not on file: nothing says under which licence owner/teacher is"]


def test_the_demo_may_learn_from_its_teacher_by_its_card(tmp_path: Path) -> None:
    one = demo.recipe(tmp_path, seed=0)
    (teacher,) = sources_of(one)
    assert (teacher.licence, teacher.declared_by) == ("apache-2.0", "its model card")
    verdict = decided(one)
    assert verdict.outcome == "allow-with-obligations"
    assert {obligation.condition for obligation in verdict.obligations} == {"release is weights"}


def test_what_drifts_is_told_record_by_record(tmp_path: Path) -> None:
    one = recipe(**APACHE_TEACHER)
    then = decided(one, own_terms(tmp_path / "store"))
    assert drift(then, then) == []
    now = decided(one, own_terms(tmp_path / "store", apache_with(DISPLAY)))
    assert drift(then, now) == [f"record {APACHE}: changed", f"obligation added: display ({APACHE}#show)"]
    assert drift(now, then) == [f"record {APACHE}: changed", f"obligation removed: display ({APACHE}#show)"]
    denied = decided(one, own_terms(tmp_path / "store", apache_with(DENIAL)))
    assert drift(then, denied)[:2] == ["outcome: was allow-with-obligations, is deny", f"record {APACHE}: changed"]
    assert f"reason added: owner/teacher, prohibits: {APACHE}#no-training" in drift(then, denied)
    store = own_terms(tmp_path / "store", *versions(None))
    moved = decided(recipe(terms={"licence": "acme"}), store)
    assert drift(decided(one, store), moved)[:3] == [
        "outcome: was allow-with-obligations, is allow",
        "record acme@2025-01-01: added",
        f"record {APACHE}: removed",
    ]
