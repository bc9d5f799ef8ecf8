"""Filters and the pipeline: what is dropped, why, and that nothing is lost on the way."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.core.errors import DataError
from stillroom.core.hashing import canonical_json
from stillroom.data import DROP_REASONS, Message, Prompt
from stillroom.data.curation import Pipeline, Row, Sifted, settings_of
from stillroom.data.decontamination import Decontamination, EvaluationItem
from stillroom.data.duplicates import ExactDuplicates, NearDuplicates
from stillroom.data.filters import Emptiness, IdentityLeak, PromptEcho, Refusal, Truncation
from stillroom.data.json_schema import KEYWORDS, JsonSchema
from stillroom.data.verifiers import FunctionVerifier, RegexVerifier, SchemaVerifier

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "curation"
MEGABYTE = 1_000_000


def row(key: str, answer: str, *, prompt: str | tuple[Message, ...] = "What is it?", reason: str | None = "stop") -> Row:
    return Row(key=key, prompt=Prompt.of(prompt), answer=answer, finish_reason=reason)


def reasons(step: Any, *answers: str, prompt: str | tuple[Message, ...] = "What is it?") -> list[str | None]:
    """The reason for each answer, None for those that are kept."""
    sifted = step.sift([row(str(n), answer, prompt=prompt) for n, answer in enumerate(answers)])
    found = {drop.key: drop.reason for drop in sifted.dropped}
    return [found.get(str(n)) for n in range(len(answers))]


# --- the pipeline ---------------------------------------------------------------------------------------------------------------------


def every_step() -> Pipeline:
    items = (EvaluationItem(split="test", id="1", prompt="how many legs has a spider that lost two"),)
    return Pipeline(
        (
            Truncation(),
            Emptiness(),
            Refusal(),
            IdentityLeak(),
            PromptEcho(),
            ExactDuplicates(),
            NearDuplicates(),
            RegexVerifier(pattern=r"[^\0]"),
            SchemaVerifier(schema=JsonSchema.of(True)),
            Decontamination(items=items),
        )
    )


def test_each_step_drops_for_its_reason_and_the_account_adds_up() -> None:
    rows = [
        row("cut", "It is", reason="length"),
        row("open", "<think>\nhm, so"),
        row("empty", " \u200b\n"),
        row("refused", "I'm sorry, but I can't help with that."),
        row("named", "I am ChatGPT, at your service."),
        row("echo", "Tell me what the capital of Peru is. It is Lima.", prompt="Tell me what the capital of Peru is."),
        row("first", "It is a spider"),
        row("again", "it is a SPIDER!"),
        row("leak", "Six", prompt="How many legs has a spider that lost two?"),
        row("last", "Lima", prompt="Capital of Peru?"),
    ]
    steps = [step for step in every_step().steps if step.name != "verifier-schema"]
    found = Pipeline(tuple(steps)).run(rows)
    assert [kept.key for kept in found.kept] == ["first", "last"]
    assert found.reasons == {
        "cut": "truncated",
        "open": "unterminated-reasoning",
        "empty": "empty-answer",
        "refused": "refusal",
        "named": "identity",
        "echo": "prompt-echo",
        "again": "duplicate",
        "leak": "contaminated",
    }
    assert all(drop.finding.evidence and drop.reason in DROP_REASONS for drop in found.dropped)
    first = found.steps[0]
    assert (first.before, first.after, first.dropped) == (10, 8, {"truncated": 1, "unterminated-reasoning": 1})
    assert first.rate("truncated") == 0.1
    assert sum(sum(step.dropped.values()) for step in found.steps) == len(found.dropped)
    assert [step.before for step in found.steps[1:]] == [step.after for step in found.steps[:-1]]


ANSWERS = st.one_of(
    st.text(max_size=60),
    st.sampled_from(["I can't help with that.", "As an AI language model, I", "<think>", "", "{}", "x " * 40, "I\u2019m sorry, but I cannot do that", "a b c d e f"]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(ANSWERS, ANSWERS.filter(lambda text: bool(text.strip())), st.sampled_from([None, "stop", "length", "\ud800"]))))
def test_whatever_the_rows_each_comes_out_once_and_in_order(parts: list[tuple[str, str, str | None]]) -> None:
    rows = [Row(key=str(n), prompt=Prompt.of(prompt), answer=answer, finish_reason=reason) for n, (answer, prompt, reason) in enumerate(parts)]
    found = every_step().run(rows)
    assert found.rows == len(rows)
    gone = found.reasons
    assert list(found.kept) == [one for one in rows if one.key not in gone]
    assert found == every_step().run(rows)
    for step, before in zip(found.steps, [len(rows), *(s.after for s in found.steps)], strict=False):
        assert step.before == before == step.after + sum(step.dropped.values())
        assert step.rate("truncated") is None if not before else True


def test_no_rows_and_one_row() -> None:
    assert (every_step().run([]).kept, every_step().run([]).rows) == ((), 0)
    assert every_step().run([row("one", '"fine"')]).rows == 1


def test_two_rows_under_one_key_are_refused() -> None:
    with pytest.raises(ValueError, match="more than one row"):
        Pipeline(()).run([row("a", "x"), row("a", "y")])


@dataclass(frozen=True)
class Broken:
    name: ClassVar[str] = "broken"
    how: str = "lost"

    def sift(self, rows: Sequence[Row]) -> Sifted:
        match self.how:
            case "lost":
                return Sifted(kept=tuple(rows[1:]), dropped=())
            case "moved":
                return Sifted(kept=tuple(reversed(rows)), dropped=())
        return Sifted(kept=(*rows, row("new", "x")), dropped=())


@pytest.mark.parametrize("how", ["lost", "moved", "added"])
def test_a_step_that_loses_moves_or_adds_a_row_is_found_out(how: str) -> None:
    with pytest.raises(AssertionError, match="broken"):
        Pipeline((Broken(how=how),)).run([row("a", "x"), row("b", "y")])


def test_settings_are_json_and_name_the_pipeline() -> None:
    for step in every_step().steps:
        canonical_json(settings_of(step))
    assert every_step().sha256 == every_step().sha256
    assert Pipeline((Refusal(),)).sha256 != Pipeline((Refusal(longest_characters=7),)).sha256
    one, other = (Decontamination(items=(EvaluationItem(split="t", id="1", prompt=text),)) for text in ("a", "b"))
    assert Pipeline((one,)).sha256 != Pipeline((other,)).sha256


# --- cut off and empty ------------------------------------------------------------------------------------------------------------------


def test_truncation_goes_by_the_finish_reason_and_by_open_reasoning() -> None:
    step = Truncation()
    rows = [row(str(n), "fine", reason=reason) for n, reason in enumerate(["stop", None, "length", "MAX_TOKENS", "content_filter", "end_turn"])]
    assert [drop.key for drop in step.sift(rows).dropped] == ["2", "3", "4"]
    open_, fine = "unterminated-reasoning", None
    assert reasons(
        step,
        "<think>so",
        "<think>so</think> 4",
        "  <think>\na</think>\n<think>b",
        "The tag `<think>` opens a block.",
        "so</think> 4",
        "Use <reasoning> like this",
        "text\n\t<reasoning> and on",
    ) == [open_, fine, open_, fine, fine, fine, open_]


def test_an_answer_is_empty_when_nothing_of_it_can_be_seen() -> None:
    assert reasons(Emptiness(), "", " \n\t", "\u200b\u2060\ufeff", "\x00", "0", "+", "é", "😀", " \u3000x") == ["empty-answer"] * 4 + [None] * 5


# --- refusals and identity, measured ----------------------------------------------------------------------------------------------------


def labelled(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FIXTURES / name).read_text(encoding="utf-8").splitlines()]


def measured(step: Any, cases: list[dict[str, Any]]) -> tuple[float, float, list[str]]:
    """Precision and recall of a step on labelled answers, and the answers that it gets wrong."""
    found = [reason is not None for reason in reasons(step, *(case["answer"] for case in cases))]
    counts = Counter(zip((case["positive"] for case in cases), found, strict=True))
    wrong = [f"{case['positive']}: {case['answer']}" for case, hit in zip(cases, found, strict=True) if hit != case["positive"]]
    return (
        counts[True, True] / (counts[True, True] + counts[False, True]),
        counts[True, True] / (counts[True, True] + counts[True, False]),
        wrong,
    )
