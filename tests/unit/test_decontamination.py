"""Decontamination: an evaluation item is found whole, in part and in any dress; what only looks like one is kept."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.data import Message, Prompt
from stillroom.data.curation import Row
from stillroom.data.decontamination import Coverage, Decontamination, EvaluationItem, ItemHits, hits_by_item

TEMPLATE = (
    "Answer the following multiple choice question. The last line of your response should be of the form Answer: LETTER where the letter is one of the four. "
    "Think step by step before you answer and do not leave any choice out of your reasoning."
)
DRAW = random.Random(0)
QUESTIONS = [" ".join(f"q{n}w{DRAW.randrange(10**6)}" for _ in range(16)) for n in range(60)]
OTHERS = [" ".join(f"t{n}w{DRAW.randrange(10**6)}" for _ in range(16)) for n in range(400)]


def items(template: str = "", count: int = 20) -> tuple[EvaluationItem, ...]:
    return tuple(EvaluationItem(split="test", id=str(n), prompt=f"{template} {QUESTIONS[n]}".strip()) for n in range(count))


def row(key: str, prompt: str | tuple[Message, ...], answer: str = "A") -> Row:
    return Row(key=key, prompt=Prompt.of(prompt), answer=answer)


def test_the_same_prompt_is_found_in_any_dress_and_however_short() -> None:
    step = Decontamination(items=(EvaluationItem(split="val", id="7", prompt="2 plus 2?"), *items()))
    found = step.sift([row("a", "2  PLUS 2"), row("b", "2 plus 3?"), row("c", (Message("system", "Be brief."), Message("user", "2 plus 2")))])
    assert [(drop.key, drop.finding.against) for drop in found.dropped] == [("a", ("val/7",)), ("c", ("val/7",))]


def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not() -> None:
    words = QUESTIONS[3].split()
    step = Decontamination(items=items(), share=1.0)
    found = step.sift([row("13", "So: " + " ".join(words[2:15]) + " what then?"), row("12", "So: " + " ".join(words[2:14]) + " what then?")])
    assert [(drop.key, drop.finding.against) for drop in found.dropped] == [("13", ("test/3",))]
    assert words[2] in found.dropped[0].finding.evidence


def test_half_of_the_short_runs_are_enough_and_the_answer_counts_too() -> None:
    words = QUESTIONS[5].split()  # nine runs of eight words
    step = Decontamination(items=items())
    found = step.sift([row("five", "x", " ".join(words[:12])), row("four", "x y", " ".join(words[:11]))])
    assert [drop.key for drop in found.dropped] == ["five"]


def test_an_instruction_used_on_both_sides_flags_nothing() -> None:
    step = Decontamination(items=items(TEMPLATE))
    rows = [row(str(n), f"{TEMPLATE} {OTHERS[n]}") for n in range(400)]
    assert not step.sift(rows).dropped
    leaked = row("leaked", f"{TEMPLATE} {QUESTIONS[2]}")
    (drop,) = step.sift([*rows, leaked]).dropped
    assert (drop.key, drop.finding.against) == ("leaked", ("test/2",))
    assert Decontamination(items=items(TEMPLATE), boilerplate_items=10**9, boilerplate_rows=10**9).sift(rows).dropped, "without the rule it would"


def test_an_instruction_of_one_item_that_many_rows_have_flags_nothing() -> None:
    step = Decontamination(items=(EvaluationItem(split="t", id="1", prompt=f"{' '.join(TEMPLATE.split()[:16])} {QUESTIONS[0]} {QUESTIONS[1]}"),))
    rows = [row(str(n), f"{' '.join(TEMPLATE.split()[:16])} {OTHERS[n]}") for n in range(400)]
    assert not step.sift(rows).dropped
    assert len(step.sift(rows[:20]).dropped) == 20, "of a few rows it cannot be known that they share an instruction"


def test_an_item_of_which_many_variants_were_made_is_still_found() -> None:
    step = Decontamination(items=items())
    rows = [row(str(n), f"{OTHERS[n]} {QUESTIONS[4]}") for n in range(100)]
    found = step.sift(rows)
    assert len(found.dropped) == 100
    assert hits_by_item(found.dropped) == (ItemHits(item="test/4", rows=100),)


def test_an_item_of_two_splits_is_reported_for_both() -> None:
    twice = (*items(count=5), EvaluationItem(split="other", id="x", prompt=QUESTIONS[1].upper()))
    found = Decontamination(items=twice).sift([row("a", QUESTIONS[1]), row("b", f"{OTHERS[0]} {QUESTIONS[1]}")])
    assert [drop.finding.against for drop in found.dropped] == [("test/1", "other/x")] * 2


def test_coverage_says_what_can_be_found_by_what() -> None:
    step = Decontamination(
        items=(
            *items(),
            EvaluationItem(split="short", id="1", prompt="2 plus 2"),
            *(EvaluationItem(split="same", id=str(n), prompt=f"{TEMPLATE} {n}") for n in range(9)),
        )
    )
    assert step.coverage() == (
        Coverage(split="same", items=9, by_overlap=9, by_prompt_alone=0),
        Coverage(split="short", items=1, by_overlap=0, by_prompt_alone=1),
        Coverage(split="test", items=20, by_overlap=20, by_prompt_alone=0),
    )


def test_no_items_no_rows() -> None:
    assert Decontamination(items=()).sift([row("a", "x")]).kept
    assert Decontamination(items=items()).sift([]).kept == ()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=20), max_size=8), st.lists(st.text(min_size=1, max_size=20), max_size=8))
def test_every_row_whose_prompt_is_an_item_goes_whatever_the_texts(prompts: list[str], asked: list[str]) -> None:
    step = Decontamination(items=tuple(EvaluationItem(split="s", id=str(n), prompt=text) for n, text in enumerate(prompts)))
    found = step.sift([row(str(n), text) for n, text in enumerate(asked)])
    assert {asked[int(one.key)] for one in found.kept}.isdisjoint(prompts)


def test_two_hundred_thousand_rows() -> None:
    step = Decontamination(items=items())
    rows = [row(str(n), f"{OTHERS[n % 400]} number {n}") for n in range(200_000)]
    rows[777] = row("777", QUESTIONS[9])
    assert [drop.key for drop in step.sift(rows).dropped] == ["777"]
