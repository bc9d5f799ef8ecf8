"""The verdict: three-valued, with a reason for everything; silence is never consent and a denial stands whatever else is unknown."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.core.errors import EntitlementDenied, EntitlementUnknown
from stillroom.entitlement import TermsStatement, Verdict, decide, licence_id, require
from stillroom.entitlement.terms import Distillation

DISTILLATION: tuple[Distillation, ...] = ("allowed", "allowed-with-obligations", "denied", "unknown")
names = st.none() | st.sampled_from(["Apache-2.0", "apache-2.0", "mit", "other", "llama3.1", "gemma", ""]) | st.text(max_size=10)
statements = st.builds(
    TermsStatement,
    licence=st.sampled_from(["Apache 2.0", "MIT", "Llama 3.1 Community License", "our contract"]),
    distillation=st.sampled_from(DISTILLATION),
    document=st.none() | st.just("https://example.org"),
    read_on=st.none() | st.just("2026-11-24"),
    obligations=st.lists(st.sampled_from(["display its name", "keep the notice"]), max_size=2, unique=True).map(tuple),
)


def terms(distillation: Distillation, *obligations: str, licence: str = "Apache-2.0") -> TermsStatement:
    return TermsStatement(licence=licence, distillation=distillation, document="https://example.org", read_on="2026-11-24", obligations=obligations)


def test_what_is_allowed_is_allowed_and_cites_what_was_read() -> None:
    verdict = decide(terms("allowed"), "apache-2.0")
    assert (verdict.outcome, verdict.obligations, verdict.question) == ("allow", (), None)
    assert verdict.allows
    (reason,) = verdict.reasons
    assert "Apache-2.0" in reason.clause
    assert "https://example.org" in reason.evidence
    assert "2026-11-24" in reason.evidence
    require(verdict)


@pytest.mark.parametrize("distillation", ["allowed", "allowed-with-obligations"])
def test_obligations_are_carried(distillation: Distillation) -> None:
    verdict = decide(terms(distillation, "keep the notice"), None)
    assert (verdict.outcome, verdict.obligations) == ("allow-with-obligations", ("keep the notice",))
    assert verdict.allows
    require(verdict)


@pytest.mark.parametrize("declared", [None, "apache-2.0", "mit"])
def test_a_denial_stands_whatever_the_card_says(declared: str | None) -> None:
    verdict = decide(terms("denied"), declared)
    assert verdict.outcome == "deny"
    with pytest.raises(EntitlementDenied, match="written permission") as raised:
        require(verdict)
    assert (raised.value.code, raised.value.exit_code) == ("entitlement-denied", 4)


@pytest.mark.parametrize(
    ("statement", "declared", "asked"),
    [
        (None, None, "Which licence or terms"),
        (None, "apache-2.0", "Which licence or terms"),
        (terms("unknown"), None, "May outputs under Apache-2.0 train another model"),
        (terms("allowed-with-obligations"), None, "Which obligations"),
        (terms("allowed"), "llama3.1", "under Apache-2.0, as the recipe says, or under llama3.1"),
        (terms("allowed", "a notice"), "cc-by-nc-4.0", "under Apache-2.0, as the recipe says, or under cc-by-nc-4.0"),
    ],
)
def test_what_is_not_known_is_asked_for_in_one_question(statement: TermsStatement | None, declared: str | None, asked: str) -> None:
    verdict = decide(statement, declared)
    assert verdict.outcome == "unknown"
    assert not verdict.allows
    assert verdict.question is not None
    assert asked in verdict.question
    assert verdict.question.count("?") == 1
    with pytest.raises(EntitlementUnknown) as raised:
        require(verdict)
    assert verdict.question in str(raised.value)
    assert (raised.value.code, raised.value.exit_code) == ("entitlement-unknown", 5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Apache-2.0", "apache-2.0"),
        ("Apache License, Version 2.0", "apache-2.0"),
        ("apache_2.0", "Apache 2.0"),
        ("MIT License", "mit"),
        ("Llama 3.1 Community License Agreement", "llama3.1"),
        ("Gemma Terms of Use", "gemma"),
        ("Our Own Licence", "our-own-license"),
    ],
)
def test_one_licence_by_two_names_is_no_contradiction(one: str, other: str) -> None:
    assert licence_id(one) == licence_id(other) is not None
    assert decide(terms("allowed", licence=one), other).outcome == "allow"


@pytest.mark.parametrize(("one", "other"), [("llama3.1", "llama3.2"), ("mit", "apache-2.0"), ("cc-by-4.0", "cc-by-nc-4.0"), ("gpl-3.0", "agpl-3.0")])
def test_two_licences_are_two(one: str, other: str) -> None:
    assert licence_id(one) != licence_id(other)
    assert decide(terms("allowed", licence=one), other).outcome == "unknown"


@pytest.mark.parametrize("untold", [None, "", "other", "Unknown", "n/a"])
def test_a_card_that_does_not_tell_contradicts_nothing(untold: str | None) -> None:
    assert licence_id(untold) is None
    assert decide(terms("allowed"), untold).outcome == "allow"


@given(st.none() | statements, names)
def test_every_verdict_is_whole(statement: TermsStatement | None, declared: str | None) -> None:
    verdict = decide(statement, declared)
    assert verdict.reasons
    assert all(text for reason in verdict.reasons for text in (reason.clause, reason.source, reason.evidence, reason.what_would_change_it))
    assert (verdict.question is not None) == (verdict.outcome == "unknown")
    assert bool(verdict.obligations) == (verdict.outcome == "allow-with-obligations")
    assert (verdict.outcome == "deny") == (statement is not None and statement.distillation == "denied")
    if verdict.allows:
        assert statement is not None
        assert statement.distillation in ("allowed", "allowed-with-obligations")
    assert json.loads(json.dumps(verdict.as_json())) == verdict.as_json()
    assert len(verdict.sha256) == 64


def test_a_decision_is_known_by_its_content() -> None:
    one, same, other = decide(terms("allowed"), None), decide(terms("allowed"), None), decide(terms("allowed", "a notice"), None)
    assert one.sha256 == same.sha256 != other.sha256
    assert terms("allowed").sha256 == terms("allowed").sha256 != terms("denied").sha256
    assert isinstance(one, Verdict)
