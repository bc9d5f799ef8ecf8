"""Pairs out of token ids: which are scored, which are left out and why, against a plain loop; and tokens of another tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.core.errors import GuardError
from stillroom.guard.windows import (
    NO_TOKEN,
    NOT_EXACT,
    NOT_IN_FILTER,
    READ_BEFORE,
    SCORED_BEFORE,
    SHORT,
    Answer,
    OncePer,
    Pairs,
    Reading,
    WindowSet,
    aligned_reading,
    exactly_written,
    pairs_of_answers,
    pairs_of_readings,
)
from stillroom.targets.vocabulary import Vocabulary

Pair = tuple[tuple[int, ...], int]
small = st.integers(0, 3)
large = st.sampled_from([0, 1, 2**31, 2**32 - 1])


def as_pairs(found: Pairs) -> list[Pair]:
    return [(tuple(window), token) for window, token in zip(found.windows_NK.tolist(), found.tokens_N.tolist(), strict=True)]


def reduced(candidates: list[Pair], once_per: OncePer, only: set[tuple[int, ...]] | None) -> tuple[list[Pair], dict[str, int]]:
    """The filter and the rule of once, in a loop."""
    kept: list[Pair] = []
    seen: set[Any] = set()
    left_out: dict[str, int] = {SCORED_BEFORE: 0}
    for window, token in candidates:
        if only is not None and window not in only:
            left_out[NOT_IN_FILTER] = left_out.get(NOT_IN_FILTER, 0) + 1
            continue
        what = window if once_per == "window" else (window, token)
        if what in seen:
            left_out[SCORED_BEFORE] += 1
            continue
        seen.add(what)
        kept.append((window, token))
    return kept, left_out


def plain_answers(answers: list[Answer], k: int, once_per: OncePer, only: set[tuple[int, ...]] | None) -> tuple[list[Pair], dict[str, int]]:
    left_out = {SHORT: 0, NOT_EXACT: 0, READ_BEFORE: 0}
    candidates = []
    in_prompts = {answer.prompt_ids[p - k : p] for answer in answers for p in range(k, len(answer.prompt_ids))}
    for answer in answers:
        ids, begin = (*answer.prompt_ids, *answer.answer_ids), len(answer.prompt_ids)
        read = in_prompts if once_per == "window" else {ids[p - k : p] for p in range(k, begin)}
        for p in range(begin, len(ids)):
            if p < k:
                left_out[SHORT] += 1
            elif answer.exact is not None and not answer.exact[p - begin]:
                left_out[NOT_EXACT] += 1
            elif ids[p - k : p] in read:
                left_out[READ_BEFORE] += 1
            else:
                candidates.append((ids[p - k : p], ids[p]))
    kept, more = reduced(candidates, once_per, only)
    return kept, left_out | more


def plain_readings(readings: list[Reading], k: int, once_per: OncePer, only: set[tuple[int, ...]] | None) -> tuple[list[Pair], dict[str, int]]:
    left_out = {SHORT: 0, NOT_EXACT: 0, READ_BEFORE: 0}
    candidates = []
    read: set[tuple[int, ...]] = set()
    for reading in readings:
        if once_per == "pair":
            read = set()
        for t, predicted in enumerate(reading.predicted_ids):
            window = reading.context_ids[max(t + 1 - k, 0) : t + 1]
            if len(window) < k:
                left_out[SHORT] += 1
                continue
            if predicted == NO_TOKEN:
                left_out[NOT_EXACT] += 1
            elif window in read:
                left_out[READ_BEFORE] += 1
            else:
                candidates.append((window, predicted))
            read.add(window)
    kept, more = reduced(candidates, once_per, only)
    return kept, left_out | more


def check(found: Pairs, expected: tuple[list[Pair], dict[str, int]], filtered: bool, tokens: int) -> None:
    kept, left_out = expected
    assert as_pairs(found) == kept
    assert len(found) + sum(found.left_out.values()) == tokens
    assert found.left_out == left_out | ({NOT_IN_FILTER: left_out.get(NOT_IN_FILTER, 0)} if filtered else {})


@st.composite
def answers(draw: st.DrawFn) -> list[Answer]:
    ids = st.lists(draw(st.sampled_from([small, large])), max_size=14).map(tuple)
    found = []
    for prompt, answer in draw(st.lists(st.tuples(ids, ids), max_size=5)):
        exact = draw(st.none() | st.lists(st.booleans(), min_size=len(answer), max_size=len(answer)).map(tuple))
        found.append(Answer(prompt_ids=prompt, answer_ids=answer, exact=exact))
    return found


@st.composite
def readings(draw: st.DrawFn) -> list[Reading]:
    some = draw(st.sampled_from([small, large]))
    rows = draw(st.lists(st.lists(st.tuples(some, some | st.just(NO_TOKEN)), max_size=20), max_size=5))
    return [Reading(context_ids=tuple(c for c, _ in row), predicted_ids=tuple(p for _, p in row)) for row in rows]


windows = st.integers(1, 4)
rules = st.sampled_from(["pair", "window"])


@settings(max_examples=40)
@given(answers(), windows, rules, st.booleans())
def test_pairs_of_answers_are_those_of_a_plain_loop(some: list[Answer], k: int, once_per: OncePer, filtered: bool) -> None:
    only = WindowSet.of([answer.answer_ids for answer in some[::2]], k) if filtered else None
    known = None if only is None else {tuple(window) for window in only.windows_NK.tolist()}
    check(
        pairs_of_answers(some, k, once_per=once_per, only=only),
        plain_answers(some, k, once_per, known),
        filtered,
        sum(len(a.answer_ids) for a in some),
    )


@settings(max_examples=40)
@given(readings(), windows, rules, st.booleans())
def test_pairs_of_readings_are_those_of_a_plain_loop(some: list[Reading], k: int, once_per: OncePer, filtered: bool) -> None:
    only = WindowSet.of([reading.context_ids for reading in some[::2]], k) if filtered else None
    known = None if only is None else {tuple(window) for window in only.windows_NK.tolist()}
    check(
        pairs_of_readings(some, k, once_per=once_per, only=only),
        plain_readings(some, k, once_per, known),
        filtered,
        sum(len(r.context_ids) for r in some),
    )


def test_long_windows_of_large_ids_are_told_apart_exactly() -> None:
    """Eight ids of 32 bits are four times what 64 bits hold: 2,000 windows that differ in one place, and each a second time."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**32, size=8)
    rows = np.broadcast_to(base, (2000, 8)).copy()
    rows[np.arange(2000), np.arange(2000) % 8] = rng.permutation(2**20)[:2000]
    some = [Answer(prompt_ids=tuple(row.tolist()), answer_ids=(5,)) for row in (*rows, *rows)]
    found = pairs_of_answers(some, 8)
    assert (found.windows_NK == rows).all()
    assert found.left_out[SCORED_BEFORE] == 2000


def test_the_first_answer_token_is_scored_although_its_window_is_the_prompt_s_end() -> None:
    """Nothing in the prompt follows it, so there is nothing to copy; where the prompt has it earlier too, there is."""
    assert as_pairs(pairs_of_answers([Answer(prompt_ids=(1, 2, 3), answer_ids=(4,))], 2)) == [((2, 3), 4)]
    again = pairs_of_answers([Answer(prompt_ids=(2, 3, 9, 2, 3), answer_ids=(4,))], 2)
    assert len(again) == 0
    assert again.left_out[READ_BEFORE] == 1


def test_nothing_and_next_to_nothing() -> None:
    for empty in (pairs_of_answers([], 2), pairs_of_readings([], 2), pairs_of_answers([Answer(prompt_ids=(), answer_ids=())], 2)):
        assert len(empty) == 0
        assert not any(empty.left_out.values())
    one = pairs_of_answers([Answer(prompt_ids=(), answer_ids=(7,))], 1)
    assert (len(one), one.left_out[SHORT]) == (0, 1)


def test_a_filter_is_the_windows_that_a_token_follows() -> None:
    only = WindowSet.of([(1, 2, 3), (2, 3, 4), (9,), ()], 2)
    assert only.windows_NK.tolist() == [[1, 2], [2, 3]]
    assert only.sha256 == WindowSet.of([(2, 3, 4), (1, 2, 3)], 2).sha256 != WindowSet.of([(1, 2, 3)], 2).sha256
    assert only == WindowSet.of([(2, 3, 4), (1, 2, 3)], 2) != WindowSet.of([(1, 2, 3)], 2)
    with pytest.raises(GuardError, match="windows of 3"):
        pairs_of_answers([Answer(prompt_ids=(1, 2, 3), answer_ids=(4,))], 3, only=only)
    assert len(pairs_of_answers([Answer(prompt_ids=(1, 2), answer_ids=(4,))], 2, only=WindowSet.of([], 2))) == 0


def test_evidence_survives_json_and_what_is_none_is_refused() -> None:
    answer = Answer(prompt_ids=(1, 2), answer_ids=(3, 4), exact=(True, False))
    reading = Reading(context_ids=(1, 2), predicted_ids=(3, NO_TOKEN))
    assert Answer.from_json(answer.as_json()) == answer
    assert Answer.from_json(Answer(prompt_ids=(), answer_ids=(3,)).as_json()) == Answer(prompt_ids=(), answer_ids=(3,))
    assert Reading.from_json(reading.as_json()) == reading
    for kind, row in (
        (Answer, {}),
        (Answer, {"prompt_ids": [1], "answer_ids": [-1]}),
        (Answer, {"prompt_ids": [1.0], "answer_ids": []}),
        (Answer, {"prompt_ids": [True], "answer_ids": []}),
        (Answer, {"prompt_ids": [], "answer_ids": [1], "exact": []}),
        (Answer, {"prompt_ids": [], "answer_ids": [1], "exact": [1]}),
        (Answer, {"prompt_ids": [], "answer_ids": [2**32]}),
        (Reading, {"context_ids": [1], "predicted_ids": []}),
        (Reading, {"context_ids": [-1], "predicted_ids": [1]}),
        (Reading, {"context_ids": [1], "predicted_ids": [-2]}),
    ):
        with pytest.raises(GuardError) as refused:
            kind.from_json(row)
        assert refused.value.code == "guard-evidence"


# -- another tokenizer (pitfall P12) -----------------------------------------------------------------------------------

TEACHER = Vocabulary(
    tokens=(b"the", b" cat", b" sat", b" ", b"c", b"at", b" the", b"<end>", b"\xc3", b"\xa9", b" cat", b" s"),
    special={"<end>": 7},
    end_ids=(7,),
    rows=16,
)


def test_a_token_is_the_suspect_s_where_it_wrote_the_same_bytes_as_one_piece() -> None:
    text = (0, 1, 2, 7)  # the cat sat <end>
    assert exactly_written(TEACHER, text, [b"the", b" cat", b" sat", b""]) == (True, True, True, False)
    assert exactly_written(TEACHER, text, [b"the", b" c", b"at", b" sat"]) == (True, False, True, False)
    assert exactly_written(TEACHER, text, [b"the cat", b" sat"]) == (False, False, True, False)
    assert exactly_written(TEACHER, text, [b" the", b" cat", b" sat"]) == (True, True, True, False)  # a space added before the text
    assert exactly_written(TEACHER, text, [b"the", b" cab", b" sat"]) == (True, False, False, False)  # other bytes from there on
    assert exactly_written(TEACHER, text, [b"the", b" cat"]) == (True, True, False, False)
    assert exactly_written(TEACHER, text, []) == (False,) * 4
    assert exactly_written(TEACHER, (), [b"the"]) == ()
    assert exactly_written(TEACHER, (8, 9), [b"\xc3\xa9"]) == (False, False)  # halves of a character
    assert exactly_written(TEACHER, (8, 9), [b"\xc3", b"\xa9"]) == (True, True)


def test_a_prediction_counts_where_both_tokenizers_stand_at_the_same_byte() -> None:
    context = (0, 1, 2)
    exact = aligned_reading(TEACHER, context, [b"the", b" cat", b" sat"], [b" s", b" sat", b" the"])
    assert exact == Reading(context_ids=context, predicted_ids=(11, 2, 6))
    # After " c" the suspect stands inside the teacher's token, and has read a part of it.
    inside = aligned_reading(TEACHER, context, [b"the", b" c", b"at", b" sat"], [b" s", b"at", b" sat", b" the"])
    assert inside.predicted_ids == (11, 2, 6)
    across = aligned_reading(TEACHER, context, [b"the c", b"at sat"], [b"at", b" the"])
    assert across.predicted_ids == (NO_TOKEN, NO_TOKEN, 6)


def test_a_predicted_piece_counts_where_exactly_one_ordinary_token_has_its_bytes() -> None:
    def predicted(piece: bytes) -> int:
        return aligned_reading(TEACHER, (0,), [b"the"], [piece]).predicted_ids[0]

    assert predicted(b" sat") == 2
    assert predicted(b" dog") == NO_TOKEN
    assert predicted(b"") == NO_TOKEN
    assert predicted(b" cat") == NO_TOKEN  # two tokens have these bytes
    assert predicted(b"<end>") == NO_TOKEN  # a special token is no text


def test_a_suspect_that_read_other_bytes_predicts_nothing_of_ours() -> None:
    assert aligned_reading(TEACHER, (0, 1), [b"thy", b" cat"], [b" cat", b" sat"]).predicted_ids == (NO_TOKEN, NO_TOKEN)
    with pytest.raises(GuardError, match="1 pieces and 2 predictions"):
        aligned_reading(TEACHER, (0,), [b"the"], [b"a", b"b"])
    assert aligned_reading(TEACHER, (0, 1), [b"", b" the", b" cat"], [b"the", b" s", b" sat"]).predicted_ids == (11, 2)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 6), max_size=12), st.data())
def test_a_suspect_never_has_read_beyond_the_window_that_its_prediction_is_scored_with(ids: list[int], data: st.DataObject) -> None:
    text = b"".join(TEACHER.tokens[index] for index in ids)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(text) - 1, 1)), max_size=len(text)))) if text else []
    bounds = [0, *(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if a < b]
    reading = aligned_reading(TEACHER, tuple(ids), pieces, [b" sat"] * len(pieces))
    end = 0
    for index, predicted in zip(ids, reading.predicted_ids, strict=True):
        end += len(TEACHER.tokens[index])
        assert predicted == (2 if end in bounds else NO_TOKEN)
