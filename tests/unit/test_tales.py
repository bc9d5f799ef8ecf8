"""The study's task: answers that vary, end in a checkable result, and whose questions are held out by a rule."""

from __future__ import annotations

import random

from studies import tales


def test_a_tale_ends_in_the_right_result_and_another_is_wrong() -> None:
    rng = random.Random(0)
    for question in tales.questions(400, seed=0, held_out=False):
        answer = tales.tale(question, rng)
        assert tales.is_right(question, answer)
        assert not tales.is_right(question, f"{answer} And more.")
        assert not tales.is_right(question, answer.replace(f"Answer: {question.result}", f"Answer: {question.result}0"))


def test_results_are_what_they_say() -> None:
    by_family = {question.family: question for question in tales.questions(4, seed=5, held_out=False)}
    one, other = (int(part) for part in by_family["larger"].text.removeprefix("larger: ").split(", "))
    assert by_family["larger"].result == str(max(one, other))
    one, other = (int(part) for part in by_family["sum"].text.removeprefix("sum: ").split(", "))
    assert by_family["sum"].result == str(one + other)
    assert by_family["first"].result == sorted(by_family["first"].text.removeprefix("first: ").split(", "))[0]
    assert by_family["later"].result in by_family["later"].text


def test_no_question_stands_on_both_sides() -> None:
    learned = {question.text for question in tales.questions(3_000, seed=1, held_out=False)}
    asked = {question.text for question in tales.questions(3_000, seed=2, held_out=True)}
    assert not learned & asked
    assert {question.family for question in tales.questions(8, seed=3, held_out=True)} == {"larger", "sum", "first", "later"}


def test_answers_vary_by_two_bits_a_word() -> None:
    """Of a whole answer: three sentences on average, "Answer", ":", the result and the end."""
    bits, words = tales.entropy_bits()
    assert 3 * bits / (3 * words + 4) >= 2.0


def test_the_corpus_is_the_same_for_a_seed() -> None:
    one, other = tales.corpus(4), tales.corpus(4)
    assert [next(one) for _ in range(300)] == [next(other) for _ in range(300)]
