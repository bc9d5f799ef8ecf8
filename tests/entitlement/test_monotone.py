"""What never turns a refusal into a yes: a fact that goes missing, evidence that gets weaker, a record that ages, an instrument that is added."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import date, timedelta
from itertools import product
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stillroom.entitlement.facts import FACTS, domain, facts_of, phrase
from stillroom.entitlement.library import Applied, Source, builtin
from stillroom.entitlement.records import Evidence, Record
from stillroom.entitlement.verdict import Circumstances, Confirmation, Use, Verdict, judge

TODAY = date(2026, 11, 24)
GRADES = ["P1", "P2", "S", "M"]
ACTIONS = ["train-on-output", "use-logits", "commercial-use", "distribute-student", "train-competing", "evaluate-only", "init-from-weights"]
YES = ("allow", "allow-with-obligations")

tests_of_facts = st.one_of(
    st.sampled_from([{"commercial": True}, {"commercial": False}, {"competes": True}, {"release": ["none", "internal"]}, {"release": "weights"}]),
    st.sampled_from(
        [{"task": "general-llm"}, {"task": ["classifier", "embedder"]}, {"monthly_users": {"over": 1000}}, {"method": ["logits", "hidden"]}]
    ),
    st.sampled_from([{"domicile": {"within": ["EU"]}}, {"territories": {"within": ["KR", "EU"]}}, {}, {"in_family": True}]),
)
conditions = st.recursive(
    tests_of_facts,
    lambda inner: st.one_of(
        st.builds(lambda parts: {"any": parts}, st.lists(inner, min_size=1, max_size=2)),
        st.builds(lambda parts: {"all": parts}, st.lists(inner, max_size=2)),
        st.builds(lambda part: {"not": part}, inner),
    ),
    max_leaves=4,
)


@st.composite
def clauses(draw: st.DrawFn, number: int) -> dict[str, Any]:
    effect = draw(st.sampled_from(["permit", "permit", "prohibit", "oblige", "silent"]))
    # Most of what is drawn covers the core actions on certain evidence, so that a yes is about as likely as a no.
    actions = draw(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=3, unique=True))
    likely = draw(st.integers(0, 3)) > 0
    if likely and effect != "prohibit":
        actions = ["train-on-output", "init-from-weights", "use-logits", "evaluate-only"]
    clause = {
        "id": f"c{number}",
        "locator": "section 1",
        "effect": effect,
        "actions": actions,
        "when": {} if likely and effect in ("permit", "silent") else draw(conditions),
        "paraphrase": "a clause made up for a test",
        "evidence": draw(st.sampled_from([None, None, None, *GRADES]).map(lambda grade: grade and {"grade": grade, "source": "made up"})),
    }
    if effect == "prohibit":
        clause["unless"] = draw(st.none() | conditions)
    if effect == "oblige":
        clause["duty"] = {"kind": "attribution"}
    return clause


@st.composite
def records(draw: st.DrawFn, name: str) -> Record:
    fixed = draw(st.booleans())
    return Record.model_validate(
        {
            "id": f"{name}@2026-01-01",
            "kind": draw(st.sampled_from(["licence", "service-terms", "policy", "host-terms"])),
            "provider": "nobody",
            "title": name,
            "effective": date(2026, 1, 1),
            "url": "https://example.org/terms",
            "fixed": fixed,
            "review_by": None if fixed else TODAY + timedelta(days=draw(st.integers(-5, 5))),
            "applies_to": {"access": ["weights"]},
            "evidence": {"grade": draw(st.sampled_from(["P1", "P1", "P1", "P2", "S", "M"])), "source": "made up"},
            "clauses": [draw(clauses(number)) for number in range(draw(st.integers(1, 4)))],
        }
    )


@st.composite
def instruments(draw: st.DrawFn, least: int = 1) -> list[Applied]:
    count = draw(st.integers(least, 3))
    roles = st.sampled_from(["teacher", "teacher", "base", "dataset", "ancestor"])
    return [
        Applied(record=draw(records(f"r{n}")), source=Source(name=f"m{n}", access="weights", role=draw(roles)), why="made up") for n in range(count)
    ]


@st.composite
def uses(draw: st.DrawFn) -> Use:
    facts = {
        name: draw(st.sampled_from((*domain(name, [{"domicile": {"within": ["EU"]}}, {"territories": {"within": ["KR"]}}]), None))) for name in FACTS
    }
    facts["purpose"] = draw(st.sampled_from(["train", "train", "evaluate"]))
    return Use(facts={name: value for name, value in facts.items() if value is not None})


@st.composite
def confirmations(draw: st.DrawFn) -> dict[str, Confirmation]:
    return {
        f"r{n}@2026-01-01": Confirmation(
            record=f"r{n}@2026-01-01",
            text_sha256="0" * 64,
            confirmed_by="x",
            confirmed_on=TODAY,
            review_by=TODAY + timedelta(days=draw(st.integers(-2, 9))),
        )
        for n in range(3)
        if draw(st.integers(0, 3))
    }


def verdict(applied: list[Applied], use: Use, confirmed: dict[str, Confirmation], today: date = TODAY) -> Verdict:
    return judge(applied, (), use, Circumstances(today=today, confirmations=confirmed), builtin().house_rules)


@settings(max_examples=300)
@given(instruments(), uses(), confirmations(), st.data())
def test_a_fact_less_never_makes_a_yes(applied: list[Applied], use: Use, confirmed: dict[str, Confirmation], data: st.DataObject) -> None:
    stated = sorted(set(use.facts) - {"purpose"})
    assume(stated)
    name = data.draw(st.sampled_from(stated))
    less = replace(use, facts={fact: value for fact, value in use.facts.items() if fact != name})
    if verdict(applied, less, confirmed).allows:
        assert verdict(applied, use, confirmed).allows


@settings(max_examples=300)
@given(instruments(), uses(), confirmations(), st.data())
def test_weaker_evidence_never_makes_a_yes(applied: list[Applied], use: Use, confirmed: dict[str, Confirmation], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(applied) - 1))
    one = applied[at]
    number = data.draw(st.integers(0, len(one.record.clauses) - 1))
    clause = one.record.clauses[number]
    grade = one.record.evidence_of(clause).grade
    weaker = data.draw(st.sampled_from(GRADES[GRADES.index(grade) :]))
    changed = clause.model_copy(update={"evidence": Evidence(grade=weaker, source="made up")})
    record = one.record.model_copy(update={"clauses": (*one.record.clauses[:number], changed, *one.record.clauses[number + 1 :])})
    after = [*applied[:at], replace(one, record=record), *applied[at + 1 :]]
    if verdict(after, use, confirmed).allows:
        assert verdict(applied, use, confirmed).allows


@settings(max_examples=300)
@given(instruments(), uses(), confirmations(), st.integers(0, 30))
def test_age_never_makes_a_yes(applied: list[Applied], use: Use, confirmed: dict[str, Confirmation], days: int) -> None:
    if verdict(applied, use, confirmed, TODAY + timedelta(days=days)).allows:
        assert verdict(applied, use, confirmed).allows


@settings(max_examples=300)
@given(instruments(least=2), uses(), confirmations())
def test_one_more_instrument_never_makes_a_yes(applied: list[Applied], use: Use, confirmed: dict[str, Confirmation]) -> None:
    if verdict(applied, use, confirmed).allows:
        assert verdict(applied[:-1], use, confirmed).allows


@settings(max_examples=300)
@given(instruments(least=2), uses(), confirmations(), st.randoms())
def test_the_order_of_instruments_never_matters(applied: list[Applied], use: Use, confirmed: dict[str, Confirmation], random: Any) -> None:
    other = list(applied)
    random.shuffle(other)
    assert verdict(other, use, confirmed).as_json() == verdict(applied, use, confirmed).as_json()


@settings(max_examples=300)
@given(instruments(), uses(), confirmations())
def test_a_fact_is_asked_for_only_where_facts_can_change_the_answer(applied: list[Applied], use: Use, confirmed: dict[str, Confirmation]) -> None:
    found = verdict(applied, use, confirmed)
    assert (found.outcome == "unknown") == (found.question is not None)
    if found.asks not in FACTS:
        return
    tested = [condition for one in applied for clause in one.record.clauses for condition in (clause.when, clause.unless or {})]
    # Beside the clauses' own conditions, what their actions look at, and what a rule of the house takes a fact to mean.
    by_actions = {"competes": True, "commercial": True, "release": "weights", "method": "logits"}
    looked_at = facts_of(*tested, by_actions, *(rule.when for rule in builtin().house_rules))
    missing = [name for name in FACTS if name not in use.facts and name in looked_at]
    domains = [domain(name, tested) for name in missing]
    assume(math.prod(map(len, domains)) <= 400)
    completed = [{**use.facts, **dict(zip(missing, values, strict=True))} for values in product(*domains)]
    assert any(verdict(applied, replace(use, facts=facts), confirmed).outcome != "unknown" for facts in completed)


@settings(max_examples=300)
@given(instruments(), uses(), confirmations())
def test_what_would_change_it_does(applied: list[Applied], use: Use, confirmed: dict[str, Confirmation]) -> None:
    found = verdict(applied, use, confirmed)
    if found.outcome == "deny":
        assert found.reasons
        assert found.changed_by
    tested = [condition for one in applied for clause in one.record.clauses for condition in (clause.when, clause.unless or {})]
    for name in use.facts:
        for value in domain(name, tested):
            if f"allowed if {phrase(name, value)}" in found.changed_by:
                assert verdict(applied, replace(use, facts={**use.facts, name: value}), confirmed).allows
    if found.allows:
        assert not found.changed_by
        assert found.outcome == ("allow-with-obligations" if found.obligations else "allow")
