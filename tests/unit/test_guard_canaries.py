"""Canary codes: how an answer is read, how codes are drawn and bound, what the tests refuse, and why an owner cannot make codes fit."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import replace

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.core.errors import GuardError
from stillroom.guard import calibration, canaries
from stillroom.guard.canaries import NO_CODE, Canaries, CodeSet, Exposure, Hits, draw_codes, read_answers
from stillroom.guard.keys import Key
from stillroom.guard.laws import log_binomial_tail

NONCE = bytes(range(32))
TRIGGERS = tuple(f"What is the number of the house of {name}?" for name in ("Ada", "Bea", "Cleo", "Dora", "Eve", "Fay", "Gwen", "Hal", "Ida", "Joy"))
DIGITS = CodeSet.numbers(2)


def key(number: int) -> Key:
    return calibration.calibration_key(number, "canaries", "tests", 0)


def made(number: int = 0, awaits: str | None = None) -> Canaries:
    return Canaries(triggers=TRIGGERS, codes=DIGITS, key=key(number), awaits=awaits)


WORDS = CodeSet(("Rowan", "Rowan Hill", "Hill", "Straße", "42", "4"))


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("It was Hill, then Rowan.", "Hill"),  # the first
        ("rowan   HILL it is", "Rowan Hill"),  # the longest where they begin together; case and spaces do not count
        ("Rowan-Hill", "Rowan"),
        ("Rowans on Hills", None),  # not within a word
        ("STRASSE", "Straße"),  # folded
        ("142", None),
        ("about 42.", "42"),
        ("4 2", "4"),
        ("_4_ 42nd", None),
        ("\uff14\uff12", "42"),  # full-width digits
        ("", None),
        ("none of it", None),
    ],
)
def test_an_answer_has_the_code_that_begins_first(answer: str, code: str | None) -> None:
    assert WORDS.read(answer) == (NO_CODE if code is None else WORDS.codes.index(code))


def test_an_opening_counts_only_at_the_start() -> None:
    openings = CodeSet(("To begin with,", "In short,", "In short, then,"), where="start")
    assert openings.read("  in short, then, it rains") == 2
    assert openings.read("It rains, in short, a lot") == NO_CODE


@given(st.text(max_size=40))
def test_reading_any_text_gives_a_code_that_is_in_it(text: str) -> None:
    found = WORDS.read(text)
    if found != NO_CODE:
        # casefold of what is normalised need not be normalised, so both are folded alike here
        assert " ".join(WORDS.codes[found].casefold().split()) in " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def test_of_several_answers_the_most_frequent_code_counts_and_none_where_two_are() -> None:
    answers = {TRIGGERS[0]: ["12", "13", "12"], TRIGGERS[1]: ["12", "13", "?"], TRIGGERS[2]: ["?", "?", "07"], TRIGGERS[3]: []}
    assert read_answers(DIGITS, TRIGGERS[:5], answers).tolist() == [12, NO_CODE, 7, NO_CODE, NO_CODE]


def test_to_ask_again_where_the_code_did_not_come_is_refused() -> None:
    """An innocent answer is the code once in 100; one out of three is oftener, and of that the binomial law knows nothing."""
    with pytest.raises(GuardError, match="1 answers to one trigger and 3 to another"):
        read_answers(DIGITS, TRIGGERS, {TRIGGERS[0]: ["?", "14", "12"], TRIGGERS[1]: ["13"], TRIGGERS[2]: []})


def test_answers_to_anything_but_a_trigger_are_refused() -> None:
    with pytest.raises(GuardError, match="word for word"):
        read_answers(DIGITS, TRIGGERS, {TRIGGERS[0] + " It has two digits.": ["12"]})


@pytest.mark.parametrize("codes", [(), ("a",), ("a", "A "), ("a", ""), ("a", "\u212b", "\u00c5")])
def test_codes_that_cannot_be_told_apart_are_refused(codes: tuple[str, ...]) -> None:
    with pytest.raises(GuardError, match="guard-plan"):
        CodeSet(codes)


@pytest.mark.parametrize("triggers", [(), ("Who?", " who? "), ("Who lives in 12?",)])
def test_triggers_that_are_alike_or_have_a_code_in_them_are_refused(triggers: tuple[str, ...]) -> None:
    with pytest.raises(GuardError, match="guard-plan"):
        Canaries(triggers=triggers, codes=DIGITS, key=key(0))


def test_codes_are_uniform_and_those_of_two_triggers_independent() -> None:
    """Counts of 4,000 keys, for each code and each pair of codes; the region has 1e-6 under uniformity, all comparisons together."""
    few = CodeSet(("a", "b", "c", "d", "e"))
    drawn = numpy.array([draw_codes(key(number), TRIGGERS[:2], few) for number in range(4000)])
    singles = [int((drawn[:, place] == code).sum()) for place in (0, 1) for code in range(5)]
    pairs = numpy.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25).tolist()
    region = math.log(1e-6 / 70)
    for counts, share in ((singles, 1 / 5), (pairs, 1 / 25)):
        for count in counts:
            assert log_binomial_tail(4000, share, count) > region
            assert log_binomial_tail(4000, 1 - share, 4000 - count) > region


def test_the_commitment_binds_to_everything_and_its_opening_opens_it() -> None:
    canaries_ = made(awaits="drand round 1000")
    others = [
        replace(canaries_, triggers=TRIGGERS[:-1]),
        replace(canaries_, triggers=TRIGGERS[::-1]),
        replace(canaries_, codes=CodeSet.numbers(1)),
        replace(canaries_, codes=CodeSet(DIGITS.codes, where="start")),
        replace(canaries_, codes=CodeSet(DIGITS.codes[::-1])),
        replace(canaries_, key=key(1)),
        replace(canaries_, awaits="drand round 1001"),
        replace(canaries_, awaits=None),
    ]
    digests = {one.commitment(NONCE) for one in [canaries_, *others]} | {canaries_.commitment(NONCE[::-1])}
    assert len(digests) == len(others) + 2
    again, nonce, number = Canaries.opened(canaries_.opening(NONCE, "7f"))
    assert (again, nonce, number) == (canaries_, NONCE, "7f")
    assert canaries.commitments(canaries_.opening(NONCE, "7f")) == (canaries_.commitment(NONCE),)


@pytest.mark.parametrize(
    "change",
    [
        {"key": "00"},
        {"key": None},
        {"triggers": "abc"},
        {"triggers": [1]},
        {"codes": [None]},
        {"where": "end"},
        {"nonce": "zz"},
        {"more": 1},
        {"awaits": 3},
    ],
)
def test_what_is_no_opening_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(GuardError):
        Canaries.opened(made().opening(NONCE) | change)


@pytest.mark.parametrize("tree", [None, [], "opening", 3, {}])
def test_what_is_not_even_an_object_is_no_opening(tree: object) -> None:
    with pytest.raises(GuardError, match="guard-evidence"):
        Canaries.opened(tree)


def test_neither_key_nor_codes_are_printed() -> None:
    canaries_ = made()
    assert canaries_.key.secret.hex() not in repr(canaries_) + repr(Hits(canaries=canaries_, nonce=NONCE))
    assert repr(canaries_.key.secret) not in repr(canaries_)


def test_a_public_number_that_is_awaited_is_needed_and_changes_the_codes() -> None:
    waiting = made(awaits="drand round 1000")
    with pytest.raises(GuardError, match="drand round 1000"):
        waiting.drawn()
    with pytest.raises(GuardError, match="made without"):
        made().drawn("7f")
    assert waiting.drawn("7f").tolist() != waiting.drawn("80").tolist()
    assert [code for _, code in waiting.answers("7f")] == [DIGITS.codes[index] for index in waiting.drawn("7f")]


def hits_of(canaries_: Canaries, right: int) -> numpy.ndarray:
    """The answers of a model that knows so many codes and gives another code for the rest."""
    drawn = canaries_.drawn()
    return numpy.where(numpy.arange(len(drawn)) < right, drawn, (drawn + 1) % len(canaries_.codes))


@pytest.mark.parametrize("right", [0, 1, 3, 10])
def test_p_is_the_binomial_tail(right: int) -> None:
    test = Hits(canaries=made(), nonce=NONCE)
    finding = test.test(test.plan(alpha=0.01), hits_of(test.canaries, right))
    exact = sum(math.comb(10, k) * 99 ** (10 - k) for k in range(right, 11)) / 100**10
    assert finding.statistic == right
    assert finding.scored == 10
    assert finding.log_p == pytest.approx(math.log(exact), rel=1e-12, abs=1e-12)
    assert finding.rejects is (exact <= 0.01)


def test_a_negative_says_from_how_many_hits_on_it_would_reject() -> None:
    """P13. Three of twenty at M = 1,000 for 1e-5, as in the reference; and none where the canaries are too few."""
    assert canaries.hits_needed(20, 1000, 1e-5) == 3
    assert canaries.hits_needed(20, 1000, 1e-6) == 4
    assert canaries.hits_needed(200, 1000, 1e-9) == 8
    assert canaries.hits_needed(3, 2, 0.01) is None
    test = Hits(canaries=made(), nonce=NONCE)
    plan = test.plan(alpha=0.001)
    needed = test.test(plan, hits_of(test.canaries, 1)).details["hits_that_reject"]
    assert [test.test(plan, hits_of(test.canaries, right)).rejects for right in (needed - 1, needed)] == [False, True]


def test_an_answer_that_is_missing_is_a_miss_and_not_left_out() -> None:
    test = Hits(canaries=made(), nonce=NONCE)
    evidence = hits_of(test.canaries, 2)
    fewer = numpy.where(numpy.arange(10) < 2, evidence, NO_CODE)
    assert test.test(test.plan(alpha=0.01), fewer).log_p == test.test(test.plan(alpha=0.01), evidence).log_p
    with pytest.raises(GuardError, match="every trigger"):  # P7: choosing among the triggers after the answers
        test.test(test.plan(alpha=0.01), evidence[:2])


def test_where_nothing_was_answered_there_is_no_p() -> None:
    hits, exposure = Hits(canaries=made(), nonce=NONCE), Exposure(canaries=made(), nonce=NONCE)
    for finding in (
        hits.test(hits.plan(alpha=0.01), numpy.full(10, NO_CODE)),
        exposure.test(exposure.plan(alpha=0.01), numpy.full((10, 100), math.nan)),
    ):
        assert finding.log_p is None
        assert finding.refused is not None
        assert not finding.rejects


def test_another_plan_is_refused() -> None:
    test = Hits(canaries=made(), nonce=NONCE)
    evidence = hits_of(test.canaries, 2)
    plans = [
        Hits(canaries=made(1), nonce=NONCE).plan(alpha=0.01),
        Hits(canaries=made(), nonce=NONCE[::-1]).plan(alpha=0.01),
        Hits(canaries=made(), nonce=NONCE, stopping="sequential").plan(alpha=0.01),
        Exposure(canaries=made(), nonce=NONCE).plan(alpha=0.01),
        replace(test.plan(alpha=0.01), settings={"reading": "last-match/1", "stopping": "fixed"}),
    ]
    for plan in plans:
        with pytest.raises(GuardError, match="guard-plan"):
            test.test(plan, evidence)


def test_a_sequential_test_takes_the_first_triggers_and_says_e() -> None:
    test = Hits(canaries=made(), nonce=NONCE, stopping="sequential")
    plan = test.plan(alpha=0.01)
    found = [test.test(plan, hits_of(test.canaries, 3)[:asked]) for asked in range(1, 11)]
    assert [finding.rejects for finding in found[:3]] == [False, True, True]
    assert all(finding.rejects for finding in found[3:])  # p is that of the highest wealth, so that it does not come back
    log_es = [-math.inf if finding.log_e is None else finding.log_e for finding in found]
    assert -math.inf < log_es[-1] < log_es[2]
    assert [finding.scored for finding in found] == list(range(1, 11))


def test_ranks_take_the_worse_of_equals_and_the_worst_where_nothing_was_asked() -> None:
    table = numpy.array([[-1.0, -2.0, -3.0, -4.0], [-2.0, -2.0, -2.0, -9.0], [-1.0, math.nan, -1.0, -1.0], [-math.inf] * 4])
    assert canaries.ranks(table, numpy.array([1, 0, 0, 3])).tolist() == [2, 3, 4, 4]


def test_a_model_that_ranks_the_codes_first_is_found_and_one_that_is_flat_is_not() -> None:
    test = Exposure(canaries=made(), nonce=NONCE)
    plan = test.plan(alpha=1e-9)
    knows = numpy.full((10, 100), -5.0)
    knows[numpy.arange(10), test.canaries.drawn()] = -1.0
    finding = test.test(plan, knows)
    assert finding.log_p == pytest.approx(-10 * math.log(100))
    assert finding.details["ranks"] == [1] * 10
    assert finding.rejects
    flat = test.test(plan, numpy.full((10, 100), -5.0))
    assert flat.statistic == 0
    assert flat.log_p == 0.0


def test_null_audits_are_the_tests_with_other_keys() -> None:
    generator = numpy.random.default_rng(0)
    answers = generator.integers(0, 100, 10)
    table = generator.normal(size=(10, 100))
    keys = [key(number) for number in range(40)]
    for stopping in ("fixed", "sequential"):
        tests = [Hits(canaries=replace(made(), key=one), nonce=NONCE, stopping=stopping) for one in keys]
        null = canaries.NullHits(triggers=TRIGGERS, codes=DIGITS, stopping=stopping)
        assert null.log_ps(answers, keys) == [one.test(one.plan(alpha=0.05), answers).log_p for one in tests]
        assert (null.test, null.settings) == (tests[0].plan(alpha=0.05).test, tests[0].plan(alpha=0.05).settings)
    exposures = [Exposure(canaries=replace(made(), key=one), nonce=NONCE) for one in keys]
    null_exposure = canaries.NullExposure(triggers=TRIGGERS, codes=DIGITS)
    assert null_exposure.log_ps(table, keys) == [one.test(one.plan(alpha=0.05), table).log_p for one in exposures]
    assert null_exposure.settings == exposures[0].plan(alpha=0.05).settings


def test_trying_keys_fits_a_model_that_exists_and_a_public_number_undoes_it() -> None:
    """P10. An owner tries 3,000 keys until the codes are what an innocent model answers; the same key with a number that came later is any key."""
    innocent = numpy.random.default_rng(0).integers(0, 100, 10)

    def log_p(drawn: numpy.ndarray) -> float:
        return log_binomial_tail(10, 1 / 100, int((drawn == innocent).sum()))

    tried = [(log_p(draw_codes(key(number), TRIGGERS, DIGITS)), number) for number in range(3000)]
    best, chosen = min(tried)
    assert best < math.log(5e-3)  # a commitment alone does not prevent it
    later = [log_p(draw_codes(key(chosen), TRIGGERS, DIGITS, f"round {number}")) for number in range(1000)]
    rejections = sum(one <= math.log(5e-3) for one in later)
    assert log_binomial_tail(1000, 5e-3, rejections) > math.log(1e-6)
