"""Duplicates: the first of a group stays, near is what the Jaccard index says, and many alike rows cost no more than many different ones."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.data import Prompt
from stillroom.data.curation import Row
from stillroom.data.duplicates import ExactDuplicates, NearDuplicates, _banding
from stillroom.data.words import grams, identity, normalised, words

WORDS = [f"word{n}" for n in range(5000)]


def rows_of(answers: Sequence[str], prompt: str = "Say it.") -> list[Row]:
    return [Row(key=f"r{n}", prompt=Prompt.of(prompt), answer=answer) for n, answer in enumerate(answers)]


def test_words_are_compared_and_not_their_dress() -> None:
    assert normalised("  Ｆｕｌｌ\u00a0width\n\tSTRASSE ") == "full width strasse"
    assert words("It's 3.5 km—naïve!") == ["it", "s", "3", "5", "km", "naïve"]
    assert words("我是学生 ok") == ["我", "是", "学", "生", "ok"]
    assert list(grams(["a", "b", "c"], 2)) == ["a b", "b c"]
    assert list(grams(["a"], 2)) == []
    assert identity("+ -") == "+ -"


def test_exact_duplicates_name_the_first() -> None:
    step = ExactDuplicates(of="answer")
    found = step.sift(rows_of(["The cat.", "a dog", "the  CAT", "THE CAT!", "a + b", "a - b", "a - B"]))
    assert [(drop.key, drop.finding.against) for drop in found.dropped] == [("r2", ("r0",)), ("r3", ("r0",)), ("r6", ("r5",))]


def test_the_prompt_and_the_answer_are_compared_apart() -> None:
    rows = [
        Row(key="a", prompt=Prompt.of("one two"), answer="three"),
        Row(key="b", prompt=Prompt.of("one"), answer="two three"),
        Row(key="c", prompt=Prompt.of("One, two"), answer="four"),
    ]
    assert not ExactDuplicates().sift(rows).dropped
    assert [drop.key for drop in ExactDuplicates(of="prompt").sift(rows).dropped] == ["c"]


def text_of(draw: random.Random, length: int) -> list[str]:
    return [draw.choice(WORDS) for _ in range(length)]


def test_near_duplicates_are_found_at_the_threshold_and_not_below() -> None:
    draw = random.Random(1)
    answers, near = [], set()
    for n in range(300):
        text = text_of(draw, 100)
        answers.append(" ".join(text))
        changed = list(text)
        for place in range(3 if n % 2 else 20):
            changed[place * 5] = draw.choice(WORDS)
        answers.append(" ".join(changed))
        if n % 2:
            near.add(f"r{len(answers) - 1}")
    step = NearDuplicates(of="answer")
    found = {drop.key for drop in step.sift(rows_of(answers)).dropped}
    assert found <= near
    assert len(found) >= 0.97 * len(near)


def jaccard(one: str, other: str, length: int) -> float:
    sets = [set(grams(words(text), length)) or {identity(text)} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


TEXTS = st.lists(st.sampled_from("a b c d e".split()), max_size=12).map(" ".join) | st.text(max_size=12)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=30))
def test_what_is_dropped_is_that_close_to_an_earlier_row_that_was_kept(answers: list[str]) -> None:
    step = NearDuplicates(of="answer", threshold=0.5, permutations=64)
    rows = rows_of(answers)
    found = step.sift(rows)
    by_key = {one.key: one for one in rows}
    kept = [one.key for one in found.kept]
    for drop in found.dropped:
        (earlier,) = drop.finding.against
        assert earlier in kept
        assert int(earlier[1:]) < int(drop.key[1:])
        assert jaccard(by_key[drop.key].answer, by_key[earlier].answer, 3) >= 0.5
    assert found == step.sift(rows)
    equal = {identity(answer) for answer in answers}
    assert len(found.kept) <= len(equal)


def test_what_is_missed_is_what_the_docstring_says() -> None:
    bands, length = _banding(0.8, 128)
    assert (bands, length) == (14, 9)
    assert [round((1 - index**length) ** bands, 3) for index in (0.8, 0.85, 0.9)] == [0.133, 0.025, 0.001]


def test_no_rows_and_one_row() -> None:
    for step in (ExactDuplicates(), NearDuplicates()):
        assert (step.sift([]).kept, step.sift([]).dropped) == ((), ())
        assert len(step.sift(rows_of([""])).kept) == 1


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"threshold": 1.1}, {"shingle_words": 0}, {"permutations": 4}])
def test_settings_without_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="near duplicates"):
        NearDuplicates(**settings)  # type: ignore[arg-type]


def test_rows_that_all_share_most_of_their_text_are_compared_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: with a common opening of most of the text every row meets every other, and still each is compared with at most 48."""
    opening = " ".join(WORDS[:60])
    draw = random.Random(2)
    answers = [f"{opening} {' '.join(text_of(draw, 20))}" for _ in range(1500)]
    made: list[int] = []
    shingles = NearDuplicates._shingles

    def counted(self: NearDuplicates, text: str) -> set[bytes]:
        made.append(1)
        return shingles(self, text)

    monkeypatch.setattr(NearDuplicates, "_shingles", counted)
    assert len(NearDuplicates(of="answer").sift(rows_of(answers)).kept) == 1500
    assert len(made) <= 2 * 1500, "each row once for its signature, and at most once more to be compared"


def test_two_hundred_thousand_rows() -> None:
    draw = random.Random(3)
    distinct = [" ".join(text_of(draw, 8)) for _ in range(100_000)]
    rows = rows_of([*distinct, *(f"{text}." for text in distinct)])
    assert len(ExactDuplicates().sift(rows).kept) == 100_000


def test_many_rows_of_one_text_are_one_cluster() -> None:
    found = NearDuplicates(of="answer").sift(rows_of(["the same few words again and again"] * 20_000))
    assert [one.key for one in found.kept] == ["r0"]
