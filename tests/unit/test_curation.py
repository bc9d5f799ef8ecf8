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
    st.sampled_from(
        [
            "I can't help with that.",
            "As an AI language model, I",
            "<think>",
            "",
            "{}",
            "x " * 40,
            "I\u2019m sorry, but I cannot do that",
            "a b c d e f",
        ]
    ),
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


# What was measured when the rules were written. `tuned` and `mended` were looked at while writing them; `held` was written afterwards and never was.
MEASURED = [
    (Refusal(), "refusals.jsonl", "tuned", 1.0, 1.0),
    (Refusal(), "refusals.jsonl", "mended", 1.0, 0.96),
    (Refusal(), "refusals.jsonl", "held", 0.80, 0.66),
    (IdentityLeak(), "identity.jsonl", "tuned", 1.0, 1.0),
    (IdentityLeak(), "identity.jsonl", "mended", 0.96, 1.0),
    (IdentityLeak(), "identity.jsonl", "held", 0.94, 1.0),
]


@pytest.mark.parametrize(("step", "name", "part", "precision", "recall"), MEASURED, ids=lambda value: str(value)[:24])
def test_refusals_and_identities_are_found_as_well_as_was_measured(step: Any, name: str, part: str, precision: float, recall: float) -> None:
    cases = [case for case in labelled(name) if case["part"] == part]
    assert {case["positive"] for case in cases} == {True, False}
    found_precision, found_recall, wrong = measured(step, cases)
    assert found_precision >= precision, "\n".join(wrong)
    assert found_recall >= recall, "\n".join(wrong)


def test_a_long_answer_is_no_refusal_and_own_names_can_be_added() -> None:
    refusal = "I can't help with that. " + "But there is a lot to say of it. " * 60
    assert reasons(Refusal(), refusal) == [None]
    assert reasons(Refusal(longest_characters=10_000), refusal) == ["refusal"]
    assert reasons(IdentityLeak(), "I am Hal (9000).") == [None]
    assert reasons(IdentityLeak(names=("Hal (9000)",)), "I am Hal (9000).", "He is Hal (9000).") == ["identity", None]


# --- the prompt said again ----------------------------------------------------------------------------------------------------------------


def test_an_answer_that_says_the_prompt_again_is_dropped() -> None:
    system = " ".join(f"rule{n}" for n in range(30))
    question = " ".join(f"word{n}" for n in range(70))
    turns = (Message("system", system), Message("user", f"Shorten this: {question}"))
    step = PromptEcho(
        shared=(
            "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty",
        )
    )
    echo = "prompt-echo"
    found = reasons(
        step,
        f"Shorten this: {question} Done.",
        "As told: " + " ".join(f"RULE{n}," for n in range(5, 25)),
        " ".join(f"rule{n}" for n in range(19)),
        " ".join(f"word{n}" for n in range(60)),
        " ".join(f"word{n}" for n in range(59)),
        step.shared[0].upper(),
        "A few words.",
        prompt=turns,
    )
    assert found == [echo, echo, None, echo, None, echo, None]
    assert reasons(PromptEcho(question_words=None), " ".join(f"word{n}" for n in range(60)), prompt=turns) == [None]
    assert reasons(PromptEcho(), "What is it? A spider.") == [None]
    assert reasons(PromptEcho(), "秘鲁的首都是哪里？利马。", prompt="秘鲁的首都是哪里？") == [echo]


HOSTILE = [
    "a",
    " ",
    "\n",
    "i am ",
    "sorry ",
    "i can't ",
    "as an ai ",
    "ich kann ",
    "<think>",
    "\n<think",
    "i understand ",
    "我是",
    "no, ",
    ".",
    "word word, ",
    "\u0301",
    "ab-",
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_no_text_takes_more_than_time_in_proportion(piece: str) -> None:
    """A pattern that backtracked would need 10^12 steps for a megabyte, which nobody would live to see."""
    text = (piece * (MEGABYTE // len(piece)))[:MEGABYTE]
    one = [row("a", text, prompt=text or "x")] if text.strip() else [row("a", text)]
    for step in (Truncation(), Emptiness(), Refusal(longest_characters=MEGABYTE), IdentityLeak(names=("Ab",)), PromptEcho()):
        assert len(step.sift(one).kept) + len(step.sift(one).dropped) == 1


# --- verifiers ------------------------------------------------------------------------------------------------------------------------------

CHECKS = """
import sys

def number(prompt, answer):
    return answer.isdigit()

def why(prompt, answer):
    return True if prompt == "What is it?" else f"asked {prompt!r}"

def turns(prompt, answer):
    prompt[0]["content"] = "changed"
    return prompt[-1]["role"] == "user"

def fails(prompt, answer):
    match answer:
        case "exit":
            sys.exit(3)
        case "none":
            return None
        case "deep":
            return fails(prompt, answer)
        case "surrogate":
            raise ValueError("\\ud800")
    return 1 / 0

value = 3
"""


def test_a_python_function_decides_and_its_failures_are_drops(tmp_path: Path) -> None:
    file = tmp_path / "checks.py"
    file.write_text(CHECKS, encoding="utf-8")
    number = FunctionVerifier.load(f"{file}:number")
    assert reasons(number, "12", "twelve") == [None, "verifier"]
    assert settings_of(number)["sha256"] is not None
    assert reasons(FunctionVerifier.load(f"{file}:why"), "x") == [None]
    assert reasons(FunctionVerifier.load(f"{file}:why"), "x", prompt="Other?") == ["verifier"]
    asked = (Message("system", "Be brief."), Message("user", "Hm?"))
    rows = [row("a", "x", prompt=asked)]
    assert FunctionVerifier.load(f"{file}:turns").sift(rows).kept == tuple(rows)
    assert rows[0].prompt.messages == asked
    assert reasons(FunctionVerifier.load(f"{file}:fails"), "exit", "none", "deep", "surrogate", "x") == ["verifier-error"] * 5


def test_a_function_of_an_installed_module_can_be_named() -> None:
    assert reasons(FunctionVerifier.load("operator:eq"), "What is it?", "x") == [None, "verifier"]


@pytest.mark.parametrize(
    "target", ["", "checks", ":f", "no_such_module:f", "operator:nothing", "{}:value", "{}:missing", "no/file.py:f", "{bad}:f", "{exit}:f", "os:a b"]
)
def test_a_function_that_cannot_be_used_is_refused_before_any_row(target: str, tmp_path: Path) -> None:
    for name, text in (("ok", CHECKS), ("bad", "def f(:"), ("exit", "raise SystemExit(1)")):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        FunctionVerifier.load(target.format(tmp_path / "ok.py", bad=tmp_path / "bad.py", exit=tmp_path / "exit.py"))
    assert caught.value.code == "verifier-invalid"


def test_a_regular_expression_decides() -> None:
    assert reasons(RegexVerifier(pattern=r"\d+"), "a 12", "b") == [None, "verifier"]
    assert reasons(RegexVerifier(pattern=r"\d+", whole=True), "a 12", "12") == ["verifier", None]
    assert reasons(RegexVerifier(pattern=r"TODO", forbid=True), "TODO: x", "done") == ["verifier", None]
    with pytest.raises(DataError, match="verifier-invalid"):
        RegexVerifier(pattern="(")


SCHEMA = {
    "$defs": {"name": {"type": "string", "minLength": 2, "pattern": "^[a-z]+$"}},
    "type": "object",
    "properties": {"name": {"$ref": "#/$defs/name"}, "ages": {"type": "array", "items": {"type": "integer", "minimum": 0}, "uniqueItems": True}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ('{"name": "ada"}', True),
        ('```json\n{"name": "ada", "ages": [1, 2]}\n```', True),
        ('{"name": "ada", "ages": [1, 1.0]}', False),
        ('{"name": "ada", "ages": [true]}', False),
        ('{"name": "A"}', False),
        ('{"ages": []}', False),
        ('{"name": "ada", "more": 1}', False),
        ('{"name": "ada", "name": "bob"}', False),
        ('{"name": NaN}', False),
        ("[1]", False),
        ("Here: {}", False),
        ("", False),
        ("[" * 100_000, False),
        ("9" * 5000, False),
    ],
)
def test_a_json_schema_decides(answer: str, fits: bool) -> None:
    assert reasons(SchemaVerifier(schema=JsonSchema.of(SCHEMA)), answer) == [None if fits else "verifier"]


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"enum": [1, "a", None]}, [1, 1.0, "a", None], [True, "b", 0]),
        ({"const": False}, [False], [0, None]),
        ({"type": ["integer", "null"]}, [3, 3.0, None], [3.5, True, "3"]),
        ({"multipleOf": 0.1}, [0.3, 7, "x"], [0.35]),
        ({"exclusiveMinimum": 1, "maximum": 3}, [2, 3], [1, 4]),
        ({"anyOf": [{"type": "string"}, {"minimum": 5}]}, ["x", 5], [4]),
        ({"oneOf": [{"type": "integer"}, {"minimum": 5}]}, [4, 5.5], [5, 4.5]),
        ({"not": {"type": "string"}}, [1], ["x"]),
        ({"prefixItems": [{"const": 1}], "items": False}, [[1], []], [[2], [1, 2]]),
        ({"minProperties": 1, "maxProperties": 1}, [{"a": 1}], [{}, {"a": 1, "b": 2}]),
        ({"allOf": [{"minLength": 1}, {"maxLength": 2}]}, ["é"], ["", "abc"]),
        ({"properties": {"child": {"$ref": "#"}}, "additionalProperties": False}, [{"child": {"child": {}}}], [{"child": {"x": 1}}]),
        ({"$defs": {"a/b~c": {"type": "null"}}, "$ref": "#/$defs/a~1b~0c"}, [None], [1]),
        (False, [], [1, None]),
    ],
)
def test_each_keyword_means_what_the_standard_says(schema: Any, good: list[Any], bad: list[Any]) -> None:
    read = JsonSchema.of(schema)
    assert [read.fault(value) for value in good] == [None] * len(good)
    assert all(read.fault(value) for value in bad)


@pytest.mark.parametrize(
    "schema",
    [3, None, [], {"format": "date"}, {"properties": {"a": {"dependentRequired": {}}}}, {"type": "text"}, {"$ref": "other.json"}, {"$ref": "#/$defs/x"},
     {"items": [True]}, {"pattern": "("}, {"minLength": -1}, {"multipleOf": 0}, {"enum": 1}, {"anyOf": []}, {"required": [1]}, {"minItems": True}],
)  # fmt: skip
def test_a_schema_that_is_not_understood_whole_is_refused(schema: Any) -> None:
    with pytest.raises(DataError, match="verifier-invalid") as caught:
        JsonSchema.of(schema)
    if isinstance(schema, dict) and "format" in schema:
        assert "'format'" in caught.value.found


def test_a_schema_that_asks_of_itself_without_end_is_an_error_of_the_row() -> None:
    assert reasons(SchemaVerifier(schema=JsonSchema.of({"$ref": "#"})), "1") == ["verifier-error"]


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.sampled_from(sorted(KEYWORDS)), inner, max_size=3), max_leaves=8)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(JSON, JSON)
def test_any_json_is_a_schema_or_refused_and_any_schema_judges_any_json(tree: Any, value: Any) -> None:
    try:
        schema = JsonSchema.of(tree)
    except DataError:
        return
    step = SchemaVerifier(schema=schema)
    assert reasons(step, json.dumps(value))[0] in (None, "verifier", "verifier-error")


# --- many rows ------------------------------------------------------------------------------------------------------------------------------


def test_two_hundred_thousand_rows_go_through_the_filters() -> None:
    draw = random.Random(0)
    rows = [row(str(n), f"{draw.random()} is my answer" if n % 10 else "I can't help with that.") for n in range(200_000)]
    found = Pipeline((Truncation(), Emptiness(), Refusal(), IdentityLeak(), ExactDuplicates())).run(rows)
    assert (len(found.kept), found.counts) == (180_000, {"refusal": 20_000})
