"""What lifts a prohibition and what does not, what counts as having read a text, and what a verdict says of itself."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import pytest

from stillroom.core.errors import EntitlementDenied, EntitlementUnknown
from stillroom.entitlement.library import Source, builtin
from stillroom.entitlement.records import Authorisation
from stillroom.entitlement.verdict import Assertion, Attached, Circumstances, Use, Verdict, decide, require
from terms_cases import TODAY, confirmed

CLAUDE = Source(name="claude-sonnet-4-5", access="api:anthropic")
FACTS: dict[str, Any] = {
    "purpose": "train",
    "method": "text",
    "modality": "text",
    "task": "narrow-generative",
    "release": "internal",
    "commercial": True,
}
READ = ["anthropic-commercial-terms@2025-06-17", "anthropic-usage-policy@2025-09-15"]
DIGEST = "a" * 64


def permission(**changed: Any) -> Authorisation:
    tree = {
        "id": "letter-1",
        "grantor": "Anthropic",
        "holder": "Example Ltd",
        "instruments": ["anthropic-usage-policy", "anthropic-commercial-terms"],
        "actions": ["generate-for-training", "train-on-output", "train-competing"],
        "granted": date(2026, 1, 1),
        "expires": date(2027, 1, 1),
        "document": "letter.pdf",
        "document_sha256": DIGEST,
        "conditions": ["the student is never distributed"],
    }
    return Authorisation.model_validate(tree | changed)


def asked(*permissions: tuple[Authorisation, str | None], today: date = TODAY, **facts: Any) -> Verdict:
    circumstances = Circumstances(
        today=today,
        confirmations=confirmed(READ, today),
        authorisations=tuple(Attached(authorisation=one, found_sha256=found) for one, found in permissions),
    )
    return decide([CLAUDE], Use(facts=FACTS | facts), builtin(), circumstances)


def test_nothing_attached_denies_and_names_who_could_allow() -> None:
    verdict = asked()
    assert verdict.outcome == "deny"
    assert any("authorisation of Anthropic" in change for change in verdict.changed_by)
    with pytest.raises(EntitlementDenied) as raised:
        require(verdict)
    assert raised.value.exit_code == 4
    assert verdict.alternatives


def test_an_authorisation_lifts_it_and_its_conditions_become_obligations() -> None:
    verdict = asked((permission(), DIGEST))
    assert verdict.outcome == "allow-with-obligations"
    assert any("never distributed" in obligation.says and "letter-1" in obligation.says for obligation in verdict.obligations)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, None),
        ({}, "b" * 64),
        ({"expires": TODAY - timedelta(days=1)}, DIGEST),
        ({"granted": TODAY + timedelta(days=1)}, DIGEST),
        ({"actions": ["evaluate-only"]}, DIGEST),
        ({"instruments": ["anthropic-consumer-terms"]}, DIGEST),
        ({"models": ["claude-haiku-*"]}, DIGEST),
        ({"scope": {"commercial": False}}, DIGEST),
        ({"scope": {"release": "none"}}, DIGEST),
    ],
    ids=["no-document", "other-document", "expired", "not-yet", "other-actions", "other-instrument", "other-model", "out-of-scope", "other-release"],
)
def test_an_authorisation_that_does_not_fit_lifts_nothing(changed: dict[str, Any], found: str | None) -> None:
    assert asked((permission(**changed), found)).outcome == "deny"


def test_a_scope_that_turns_on_a_fact_asks_for_the_fact() -> None:
    verdict = asked((permission(scope={"monthly_users": {"over": 10}}), DIGEST))
    assert verdict.outcome == "unknown"
    assert verdict.asks == "monthly_users"
    with pytest.raises(EntitlementUnknown) as raised:
        require(verdict)
    assert "intent.monthly_users" in str(raised.value)


def test_who_asserts_that_nothing_competes_is_recorded() -> None:
    source = Source(name="gpt-5.2", access="api:openai")
    circumstances = Circumstances(
        today=TODAY, confirmations=confirmed(["openai-services-agreement@2026-01-01", "openai-usage-policies@2025-10-29"], TODAY)
    )
    use = Use(
        facts=FACTS | {"competes": False}, assertions=(Assertion(fact="competes", value=False, asserted_by="A. Counsel", why="it reads invoices"),)
    )
    verdict = decide([source], use, builtin(), circumstances)
    assert verdict.outcome == "allow-with-obligations"
    assert any("A. Counsel asserts: not competes, because it reads invoices" in obligation.says for obligation in verdict.obligations)
    general = decide([source], replace(use, facts=use.facts | {"task": "general-llm"}), builtin(), circumstances)
    assert general.outcome == "deny"
    assert any("rule of the house" in warning for warning in general.warnings)
    # What is stated does not get round the rule, and is not told to.
    assert not any("competes" in change for change in general.changed_by)
    assert any("task is" in change for change in general.changed_by)


def test_a_rule_of_the_house_is_not_got_round_by_not_saying_what_the_student_does() -> None:
    source = Source(name="gpt-5.2", access="api:openai")
    circumstances = Circumstances(
        today=TODAY, confirmations=confirmed(["openai-services-agreement@2026-01-01", "openai-usage-policies@2025-10-29"], TODAY)
    )
    facts = {name: value for name, value in FACTS.items() if name != "task"} | {"competes": False}
    verdict = decide([source], Use(facts=facts), builtin(), circumstances)
    assert (verdict.outcome, verdict.asks) == ("unknown", "task")


def test_a_model_that_is_said_to_be_reached_through_another_maker_is_asked_about() -> None:
    circumstances = Circumstances(today=TODAY, confirmations=confirmed(["deepseek-open-platform-terms@2026-04-29"], TODAY))
    verdict = decide([Source(name="gpt-5.2", access="api:deepseek")], Use(facts=FACTS), builtin(), circumstances)
    assert (verdict.outcome, verdict.asks) == ("unknown", "service")


def test_another_text_than_the_records_does_not_count_and_neither_does_an_old_reading() -> None:
    source = Source(name="deepseek-chat", access="api:deepseek")
    name = "deepseek-open-platform-terms@2026-04-29"
    use = Use(facts=FACTS)

    def outcome(today: date, digest: str | None = None, review_by: date | None = None) -> str:
        catalogue = builtin()
        record = catalogue.records[name].model_copy(update={"text_sha256": digest})
        one = replace(confirmed([name], TODAY)[name], review_by=review_by or TODAY + timedelta(days=90))
        mine = replace(catalogue, records={**catalogue.records, name: record})
        verdict = decide([source], use, mine, Circumstances(today=today, confirmations={name: one}), alternatives=False)
        return f"{verdict.outcome} {verdict.reasons[0].standing}"

    assert outcome(TODAY) == "allow permits"
    assert outcome(TODAY, digest="0" * 64) == "allow permits"
    assert outcome(TODAY, digest="1" * 64) == "unknown other text"
    assert outcome(TODAY + timedelta(days=90)) == "allow permits"
    assert outcome(TODAY + timedelta(days=91)) == "unknown stale"


def test_a_verdict_is_the_same_bytes_for_the_same_question() -> None:
    assert asked().sha256 == asked().sha256
    assert asked(commercial=False).sha256 != asked().sha256
