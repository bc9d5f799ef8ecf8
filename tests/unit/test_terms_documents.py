"""Decisions, records and differences as documents: everything that decided is there, each word is explained once, and nothing in it acts as Markdown."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from stillroom.core import clock
from stillroom.entitlement import documents, records
from stillroom.entitlement.documents import decision_markdown, difference_markdown, printable, record_markdown
from stillroom.entitlement.facts import FACTS
from stillroom.entitlement.library import CATALOGUE_DATE, Source, builtin
from stillroom.entitlement.reading import parse_terms
from stillroom.entitlement.records import Record
from stillroom.entitlement.verdict import Assertion, Circumstances, Confirmation, Obligation, Outcome, Reason, Standing, Use, Verdict, decide
from terms_cases import cases, decided

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "terms.md"
TODAY = date(2026, 11, 24)
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
CASES = {f"{case['file']}-{at}": case for at, case in enumerate(cases())}
RECORDS = builtin().records


def reason(**changed: Any) -> Reason:
    whole = Reason(
        standing="prohibits",
        source="gpt-4.1",
        role="teacher",
        record="openai-services-agreement@2026-01-01",
        clause="no-competing-models",
        says="Output may not be used to develop competing models.",
        locator="section 3.3(e)",
        title="OpenAI Services Agreement",
        date="2026-01-01",
        grade="P1: the text itself was read (Open Terms Archive)",
        url="https://openai.com/policies/services-agreement",
        facts=("competes", "release not stated"),
    )
    return replace(whole, **changed)


def obligation(**changed: Any) -> Obligation:
    whole = Obligation(
        duty="name-prefix",
        record="llama-3.1@2024-07-23",
        clause="name",
        source="meta-llama/Llama-3.1-8B",
        says="The name of the model begins with Llama.",
        text="Llama",
        flows_to=("student-weights",),
        title="Llama 3.1 Community License",
        url="https://www.llama.com/llama3_1/license/",
    )
    return replace(whole, **changed)


def verdict(outcome: Outcome = "deny", **changed: Any) -> Verdict:
    parts: dict[str, Any] = {
        "outcome": outcome,
        "reasons": (reason(),),
        "obligations": (obligation(),) if outcome == "allow-with-obligations" else (),
        "question": "Who will be able to use the student?" if outcome == "unknown" else None,
        "asks": "release" if outcome == "unknown" else None,
        "instruments": (f"openai-services-agreement@2026-01-01 {'a' * 64}",),
        "facts": ("purpose is train", "method is text", "competes", "task is general-llm"),
        "changed_by": () if outcome.startswith("allow") else ("allowed if release is internal",),
        "alternatives": () if outcome.startswith("allow") else ("Qwen/Qwen2.5-7B-Instruct",),
        "catalogue_sha256": "b" * 64,
    }
    return Verdict(**(parts | changed))


def sections(text: str) -> list[str]:
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


# --- a decision -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_answer_stands_first_in_one_sentence(outcome: Outcome) -> None:
    lines = decision_markdown(verdict(outcome), today=TODAY, name="tiny-x").splitlines()
    assert lines[0] == "# May tiny-x learn from `gpt-4.1`?"
    begins = {"allow": "**Yes.** ", "allow-with-obligations": "**Yes, with obligations.** ", "deny": "**No.** ", "unknown": "**Not known.** "}
    assert lines[2].startswith(begins[outcome])
    assert lines[2].endswith(".")
    assert ". " not in lines[2].removeprefix(begins[outcome]), "one sentence"


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_it_says_once_that_it_is_not_legal_advice(outcome: Outcome) -> None:
    text = decision_markdown(verdict(outcome))
    assert text.count("This is not legal advice.") == 1
    assert text.lower().count("legal advice") == 1


def test_what_decided_it_can_be_followed_back_to_its_place() -> None:
    text = decision_markdown(verdict(), today=TODAY)
    for words in (
        "OpenAI Services Agreement (2026-01-01), section 3.3(e):** forbids it.",
        "Output may not be used to develop competing models.",
        "<https://openai.com/policies/services-agreement>",
        "the text itself was read (Open Terms Archive); evidence grade P1",
        "`openai-services-agreement@2026-01-01#no-competing-models`",
        "competes; release not stated",
        "allowed if release is internal",
        "`Qwen/Qwen2.5-7B-Instruct`",
        "a" * 64,
        "b" * 64,
    ):
        assert words in text, words


def test_words_of_the_trade_are_explained_where_they_first_stand() -> None:
    text = decision_markdown(verdict("allow-with-obligations"), today=TODAY, name="tiny-x")
    for word, explained in documents._WORDS.items():
        assert text.count(f"({explained})") == 1, word
        if word != "record":  # also the head of a table
            assert re.search(rf"\b{word}s?\b", text).end() == text.index(f" ({explained})"), word  # type: ignore[union-attr]
    assert "The student is the model that learns, here tiny-x; the teacher is the model that is learned from, here `gpt-4.1`." in text


def test_the_question_comes_before_everything_that_led_to_it() -> None:
    text = decision_markdown(verdict("unknown"), today=TODAY)
    assert sections(text)[0] == "The question to answer"
    assert "Who will be able to use the student?" in text
    assert "- release: Who will be able to use the student: nobody" in text
    assert "Asked for above." in text


def test_each_obligation_says_what_to_do() -> None:
    found = (
        obligation(met=False),
        obligation(clause="display", duty="display", text="Built with Llama", flows_to=("documentation", "service"), condition="release is hosted"),
        obligation(clause="copy", duty="licence-copy", text=None, met=True),
    )
    text = decision_markdown(verdict("allow-with-obligations", obligations=found), today=TODAY)
    assert "as long as the 3 obligations below are kept" in text
    assert "begins with `Llama`" in text
    assert "**It is not met yet.**" in text
    assert "Show `Built with Llama`, word for word" in text
    assert "Only if: release is hosted" in text
    assert "It is met as things stand." in text
    assert "Carried by: its documentation and a service that offers the student" in text


def test_facts_say_who_states_them() -> None:
    found = verdict(
        facts=("purpose is train", "method is hidden", "task is general-llm", "not competes", "release is weights"),
        assertions=(Assertion(fact="competes", value=False, asserted_by="the head of product", why="we sell bicycles"),),
    )
    text = decision_markdown(found, today=TODAY)
    assert "| purpose is train | Will outputs train a model, or only evaluate one? | read off the recipe |" in text
    assert "| method is hidden | What of the teacher is learned from? | read off the recipe |" in text
    assert "| the head of product asserts it, because we sell bicycles; Stillroom records this and does not decide it |" in text
    assert re.search(r"\| release is weights \| .* \| the recipe states it \|", text)
    assert "- monthly users: How many monthly active users" in text
    ruled = verdict(warnings=('competes: by a rule of the house, no instrument defines "compete"',))
    assert re.search(r"\| competes \| .* \| a rule of the house \|", decision_markdown(ruled, today=TODAY))


def test_stale_is_called_stale_and_silence_is_not_called_permission() -> None:
    found = verdict("unknown", reasons=(reason(standing="stale"),), warnings=("a@2020 is stale: it was to be reviewed by 2026-01-01",))
    text = decision_markdown(found, today=TODAY)
    assert "is stale: the day by which the text was to be read again is past" in text
    assert "- a@2020 is stale: it was to be reviewed by 2026-01-01" in text
    silent = decision_markdown(verdict("allow", reasons=(reason(standing="is silent"),)), today=TODAY)
    assert "the text does not speak of it, which is not the same as permission" in silent


def test_the_age_of_the_catalogue_is_told() -> None:
    def told(today: date) -> str:
        return next(line for line in decision_markdown(verdict(), today=today).splitlines() if line.startswith("The catalogue"))

    assert told(CATALOGUE_DATE).endswith(f"of {CATALOGUE_DATE}, which is this day's.")
    assert told(CATALOGUE_DATE + timedelta(days=1)).endswith("which is 1 day old.")
    assert told(CATALOGUE_DATE + timedelta(days=90)).endswith("which is 90 days old.")
    assert told(CATALOGUE_DATE + timedelta(days=91)).endswith("which is 91 days old. That is old: look whether there is a newer one.")
    assert "The catalogue (the collection of all records) of our own." in decision_markdown(verdict(catalogue="our own"), today=TODAY)


def test_the_day_is_todays_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now", lambda: clock.datetime(2027, 3, 1, 12, tzinfo=clock.UTC))
    assert "Decided on 2027-03-01." in decision_markdown(verdict())
    assert decision_markdown(verdict()) == decision_markdown(verdict(), today=date(2027, 3, 1))


def test_what_is_not_on_file_has_no_clause_to_cite() -> None:
    missing = reason(
        standing="not on file", record=None, clause=None, locator=None, title=None, date=None, grade=None, url=None, facts=(), says="nothing"
    )
    text = decision_markdown(verdict("unknown", reasons=(missing,)), today=TODAY)
    assert "1. **Not on file.**\n   - In our words: nothing\n   - About: `gpt-4.1`, the teacher\n" in text
    assert "None" not in text


def test_evaluating_is_not_called_learning() -> None:
    text = decision_markdown(verdict("allow", facts=("purpose is evaluate",)), today=TODAY, name="tiny-x")
    assert text.startswith("# May tiny-x be evaluated with `gpt-4.1`?")


@pytest.mark.parametrize("name", CASES)
def test_the_golden_cases_as_documents(name: str) -> None:
    """Whatever decides, what decided it is in the document, and no value of Python's."""
    found = decided(CASES[name])
    text = decision_markdown(found, today=TODAY, name="tiny-x")
    for part in found.reasons:
        assert part.cited in text
        assert not part.url or part.url in text
    for duty in found.obligations:
        assert f"{duty.record}#{duty.clause}" in text
        assert not duty.text or " ".join(duty.text.split()) in text
    assert all(line.split()[0] in text for line in found.instruments)
    assert found.sha256 in text
    assert not re.search(r"\bNone\b|\bTrue\b|\bFalse\b|frozenset|\(\)|\{\}", text), text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "\n\n\n" not in text


def test_every_word_of_the_vocabulary_has_its_words() -> None:
    assert set(documents.STANDINGS) == set(get_args(Standing))
    assert set(documents.ACTIONS) == set(get_args(records.Action))
    assert set(documents.DUTIES) == set(get_args(records.DutyKind))
    assert set(documents.EFFECTS) == set(documents._NAMES) == set(get_args(records.Effect))
    assert set(documents.KINDS) == set(get_args(records.Kind))
    assert set(documents.GRADES_CAN) == set(get_args(records.Grade))


# --- nothing acts as Markdown ---------------------------------------------------------------------------------------------------------

HOSTILE = (
    st.text(max_size=30)
    | st.sampled_from(
        ["# a heading", "- a list", "1. one", "~~~", "===", "---", "](http://evil)", "<script>alert(1)</script>", "a | b", "`code`", "``", "**bold**", "\n## Outcome: allowed\n", "\u202eallowed", "\x1b[31m", "_x_", "\\", "\r\n\r\n# b", "![x](y)"]
    )
)  # fmt: skip


@settings(deadline=None)
@given(one=HOSTILE, two=HOSTILE, three=HOSTILE)
def test_what_users_bring_in_cannot_act(one: str, two: str, three: str) -> None:
    found = verdict(
        "unknown",
        reasons=(reason(source=one, says=two, title=three, url=one, locator=two),),
        question=two,
        facts=("competes", f"domicile is {three}"),
        assertions=(Assertion(fact="competes", value=True, asserted_by=one, why=two),),
        obligations=(obligation(says=three, text=one or "x", title=two, url=three, source=two),),
        warnings=(three,),
        changed_by=(one,),
        alternatives=(two,),
    )
    plain = verdict("unknown", facts=("competes", "domicile is DE"), assertions=(Assertion(fact="competes", value=True, asserted_by="a", why="b"),))
    plain = replace(plain, obligations=(obligation(),), warnings=("w",))
    text = decision_markdown(found, today=TODAY, name=three)
    assert sections(text) == sections(decision_markdown(plain, today=TODAY, name="x"))
    assert len(re.findall(r"^[ >*+-]*(?:\d+[.)] )?#", text, re.MULTILINE)) == 1 + len(sections(text))
    assert "<script" not in re.sub(r"`[^`\n]*`", "", text).replace("\\<", "")
    assert not any(documents._acts(char) for char in text if char != "\n")
    text.encode()


def test_text_of_a_cell_stays_in_its_cell() -> None:
    text = decision_markdown(verdict(instruments=("a|b c|d",), facts=("domicile is a|b",)), today=TODAY)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (3, 4) for row in rows), rows


def test_printable_leaves_text_and_line_feeds_as_they_are() -> None:
    assert printable("Zoë\n日本 ✓") == "Zoë\n日本 ✓"
    assert printable("a\x1b[31mb\r\u202e\ud800") == "aU+001B[31mbU+000DU+202EU+D800"


# --- a record -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_a_lawyer_can_follow_every_record_back_to_its_source(name: str) -> None:
    of = RECORDS[name]
    text = record_markdown(of)
    plain = text.replace("\\", "")
    assert f"`{of.id}`" in text
    assert of.title in plain
    assert of.provider in plain
    assert (f"<{of.url}>" in text) if of.url.startswith("http") else of.url in plain
    assert of.sha256 in text
    assert f"grade {of.evidence.grade}: " in text
    assert of.evidence.source in plain
    assert str(of.effective) in text or of.id.endswith(f"@{of.effective.year}")
    assert len(re.findall(r"^## \d+\. ", text, re.MULTILINE)) == len(of.clauses)
    for clause in of.clauses:
        assert f"Where in the text: {clause.locator}" in plain
        assert f"In our words: {clause.paraphrase}" in plain
        assert f"`{of.id}#{clause.id}`" in text
        assert clause.duty is None or not clause.duty.text or clause.duty.text in text
    assert not re.search(r"\bNone\b|\bTrue\b|\bFalse\b", text)


def test_a_record_explains_the_facts_that_its_conditions_ask() -> None:
    text = record_markdown(RECORDS["openai-services-agreement@2026-01-01"])
    assert "- When: competes" in text
    assert "- Unless: task is classifier or embedder and release is none or internal" in text
    assert f"- competes: {FACTS['competes'].question}" in text
    assert "reviewed by" in text


def test_a_record_with_everything() -> None:
    tree = {
        "id": "a@2020", "kind": "service-terms", "provider": "A | B", "title": "Terms *of* A", "effective": date(2020, 1, 1), "superseded": date(2021, 1, 1),
        "url": "see the drawer", "variant": "EEA", "spdx": "LicenseRef-a", "fixed": True, "text_sha256": "0" * 64,
        "applies_to": {"access": ["api", "host"], "providers": ["a"], "hosts": ["*"]}, "evidence": {"grade": "P2", "source": "a copy"},
        "incorporates": [], "flags": ["territorial"], "notes": "A note.",
        "clauses": [{"id": "x", "locator": "s. 1", "effect": "prohibit", "actions": ["train-on-output"], "when": {"territories": {"within": ["EU"]}},
                     "paraphrase": "Not in the European Union.", "evidence": {"grade": "S", "source": "an article"}}],
    }  # fmt: skip
    (of,) = parse_terms(yaml.safe_dump({"records": [tree]}), "a test").records
    text = record_markdown(of)
    for words in (
        "# Terms \\*of\\* A",
        "| provider | A \\| B |",
        "| in force | from 2020 to the day before 2021-01-01 |",
        "see the drawer",
        f"`{'0' * 64}`",
        "| for | EEA |",
        "`LicenseRef-a`",
        "it depends on the country",
        "A note.",
        "- When: territories within EU",
        "- Evidence: grade S: somebody's description of the text was read (an article). It can forbid; it can never allow.",
    ):
        assert words in text, words


# --- a difference ---------------------------------------------------------------------------------------------------------------------


def changed(of: Record, **fields: Any) -> Record:
    return Record.model_validate(of.model_dump(exclude_none=True) | fields)


def test_a_difference_says_what_the_answer_turns_on() -> None:
    text = difference_markdown(RECORDS["llama-3@2024-04-18"], RECORDS["llama-3.1@2024-07-23"])
    row = next(line for line in text.splitlines() if line.startswith("| training a model on outputs |"))
    before, after = (cell.strip() for cell in row.strip("|").split(" | ")[1:])
    assert "forbids" in before
    assert after.startswith("permits")
    assert "`outputs-may-train` only in `llama-3.1@2024-07-23`" in text


def test_every_field_that_differs_is_told_and_no_other() -> None:
    of = RECORDS["apache-2.0@2004-01-01"]
    assert "They say the same." in difference_markdown(of, of)
    clause = of.clauses[0].model_dump(exclude_none=True)
    moved = changed(
        of, clauses=[clause | {"locator": "section 0", "when": {"commercial": True}}, *(c.model_dump(exclude_none=True) for c in of.clauses[1:])]
    )
    text = difference_markdown(of, moved)
    assert "- locator: the whole text -> section 0" in text
    assert "- when: always -> commercial" in text
    assert "paraphrase" not in text
    assert sections(text) == ["What the answer turns on", "Clause by clause"]
    renamed = changed(of, title="Other", text_sha256="1" * 64, flags=["territorial"], superseded=date(2030, 1, 1))
    text = difference_markdown(of, renamed)
    assert "- title: Apache License, Version 2.0 -> Other" in text
    assert f"- text sha256: none -> {'1' * 64}" in text
    assert "- flags: none -> territorial" in text
    assert "- superseded: none -> 2030-01-01" in text
    assert sections(text) == ["The whole"]
    fewer = changed(of, clauses=[clause])
    assert difference_markdown(of, fewer).count("only in") == len(of.clauses) - 1


def test_a_difference_of_every_pair_of_versions_can_be_written() -> None:
    for family in {of.family for of in RECORDS.values()}:
        versions = builtin().versions(family)
        for one, other in zip(versions, versions[1:], strict=False):
            text = difference_markdown(one, other)
            assert "They say the same." not in text
            assert not re.search(r"\bNone\b|\bTrue\b|\bFalse\b|frozenset", text)


# --- the reference page ---------------------------------------------------------------------------------------------------------------


def test_the_reference_page_has_every_field_and_every_word() -> None:
    text = PAGE.read_text(encoding="utf-8")
    parts = [
        part for part in vars(records).values() if isinstance(part, type) and issubclass(part, BaseModel) and part.__module__ == records.__name__
    ]
    fields = {name for part in parts for name in part.model_fields}
    words = {
        word for kind in (records.Action, records.DutyKind, records.Effect, records.Grade, records.Access, records.Kind) for word in get_args(kind)
    }
    choices = {choice for fact in FACTS.values() for choice in fact.choices}
    carriers = set(documents._CARRIERS)
    missing = sorted(word for word in fields | words | choices | carriers | set(FACTS) | set(documents._FLAGS) if f"`{word}`" not in text)
    assert not missing, missing


def test_the_examples_of_the_reference_page_are_files_that_can_be_read() -> None:
    blocks = re.findall(r"^```yaml[^\n]*\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found = [
        parse_terms(block, "docs/reference/terms.md") for block in blocks if re.match(r"(records|models|aliases|house_rules|authorisations):", block)
    ]
    assert any(file.records for file in found)
    assert any(file.authorisations for file in found)
    assert any(file.models and file.aliases for file in found)


def test_a_decision_on_the_real_catalogue_names_confirmations_that_ran_out() -> None:
    name = "deepseek-open-platform-terms@2026-04-29"
    old = Confirmation(record=name, text_sha256="0" * 64, confirmed_by="A", confirmed_on=date(2026, 5, 1), review_by=date(2026, 7, 30))
    teacher = Source(name="deepseek-chat", access="api:deepseek")
    use = Use(facts={"purpose": "train", "method": "text", "modality": "text"})
    found = decide([teacher], use, builtin(), Circumstances(today=TODAY, confirmations={name: old}))
    text = decision_markdown(found, today=TODAY)
    assert found.outcome == "unknown"
    assert f"{name} is stale" in text.replace("\\", "")
