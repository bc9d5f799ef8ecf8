"""The twin test against counting and theory: its law is that of all coins, its null holds whatever the differences are, and what breaks it is shown to."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.core.errors import GuardError, LedgerError
from stillroom.guard import evidence as bundle
from stillroom.guard.calibration import Student, calibrate
from stillroom.guard.evidence import Submission
from stillroom.guard.keys import Key
from stillroom.guard.laws import log_binomial_tail
from stillroom.guard.martingales import Symmetric, Wealth
from stillroom.guard.multiplicity import holm
from stillroom.guard.registration import Registration
from stillroom.guard.serving_log import Coins, Sampled, ServingLog, disclose, verify_serving_log
from stillroom.guard.twins import (
    Floats,
    Integers,
    SignLaw,
    TargetedTwinTest,
    TwinAudit,
    TwinEvidence,
    TwinTest,
    agreement_difference,
    clipped_levels,
    commitments,
    containment,
    flipped_as_good,
    lcs_length,
    lcs_ratio,
    rank_levels,
    recompute,
    residuals,
    running_residuals,
    sequential_ranks,
    words,
)

KEY = Key(hashlib.sha256(b"a key for tests of the twin test").digest())
COINS = Coins.of(KEY, 0)
TEST = TwinTest(coins=(COINS,), statistic="log-likelihood", flips=999)
UNLIKELY = math.log(1e-6)


def generator(seed: int) -> numpy.random.Generator:
    return numpy.random.Generator(numpy.random.Philox(seed))


def names(count: int) -> tuple[str, ...]:
    return tuple(f"0123456789abcdef-{number}" for number in range(count))


def signs_of(requests: tuple[str, ...], coins: Coins = COINS) -> Integers:
    return 1 - 2 * numpy.array([coins.served(request) for request in requests])


def evidence(differences: Any, references: Any = None, **more: Any) -> TwinEvidence:
    """Pairs with these first-minus-second differences."""
    found = numpy.asarray(differences, dtype=numpy.float64)
    given = numpy.zeros((len(found), 0)) if references is None else numpy.asarray(references, dtype=numpy.float64)
    facts: dict[str, Any] = {"requests": names(len(found)), "epochs": (0,) * len(found), "accounts": ("a",) * len(found)}
    return TwinEvidence(differences_N=found, references_NR=given, **(facts | more))


def fair_signs(seed: int, audits: int, pairs: int) -> Integers:
    return 2 * generator(seed).integers(2, size=(audits, pairs)) - 1


def too_many(rejected: int, audits: int, alpha: float) -> bool:
    """A count that a test of level alpha has less often than once in a million."""
    return log_binomial_tail(audits, alpha, rejected) < UNLIKELY


# --- the law


def counted(levels: list[int]) -> dict[int, Fraction]:
    """P(T = t) by counting in whole numbers."""
    law = {0: 1}
    for level in levels:
        following: dict[int, int] = {}
        for total, ways in law.items():
            for sign in (1, -1):
                following[total + sign * level] = following.get(total + sign * level, 0) + ways
        law = following
    return {total: Fraction(ways, 2 ** len(levels)) for total, ways in law.items()}


def log_of(p: Fraction) -> float:
    """Also where it is no float64."""
    return math.log(p.numerator) - math.log(p.denominator)


@pytest.mark.parametrize("levels", [[1], [3], [1, 1], [2, 4, 6], [0, 5, 0, 1], [7] * 40, list(range(1, 19)), [1] * 60 + [9] * 3, [32] * 9 + [1, 2]])
def test_every_tail_is_the_counted_one(levels: list[int]) -> None:
    law = SignLaw(numpy.array(levels))
    counts = counted(levels)
    tail, largest = Fraction(0), sum(levels)
    assert law.log_tail(largest + 1) == -math.inf
    for total in range(largest, -largest - 2, -1):
        tail += counts.get(total, Fraction(0))
        if total % 3 and abs(total) < largest - 8:
            continue
        assert law.log_tail(total) == pytest.approx(log_of(tail), rel=1e-12, abs=1e-12)
        assert law.log_bound(total) >= law.log_tail(total) - 1e-12
        if total > 0:
            assert law.log_bound(total) <= -(total**2) / (2 * law.variance) + 1e-12
    assert tail == 1
    totals = range(-largest - 2, largest + 3, 3)
    one_by_one = [law.log_tail(total) for total in totals]
    assert [law.log_tails(totals)[total] for total in totals] == pytest.approx(one_by_one, rel=1e-12, abs=1e-12)


def test_a_tail_far_below_the_least_float_is_right() -> None:
    law = SignLaw(numpy.ones(4000, dtype=numpy.int64))  # binomial, whose exact tail is known otherwise
    for heads in (2001, 2500, 3500, 3999, 4000):
        assert law.log_tail(2 * heads - 4000) == pytest.approx(log_binomial_tail(4000, 0.5, heads), rel=1e-9)


def test_the_signed_rank_law_is_wilcoxons() -> None:
    """The table of Wilcoxon (1945) and after: P(W+ >= 45) for 10 pairs is 0.0420, P(W+ >= 50) = 0.00977."""
    law = SignLaw(rank_levels(numpy.arange(1.0, 11.0), 10))
    assert math.exp(law.log_tail(2 * 45 - 55)) == pytest.approx(43 / 1024)
    assert math.exp(law.log_tail(2 * 50 - 55)) == pytest.approx(10 / 1024)


def test_redrawn_coins_follow_the_law() -> None:
    levels = rank_levels(numpy.abs(generator(0).standard_cauchy(300)), 64)
    law = SignLaw(levels)
    total = int(1.5 * math.sqrt(law.variance))
    found = flipped_as_good(levels, total, 20_000, seed=1)
    p = math.exp(law.log_tail(total))
    assert not too_many(found, 20_000, p)
    assert not too_many(20_000 - found, 20_000, 1 - p)
    assert found == flipped_as_good(levels, total, 20_000, seed=1)
    assert flipped_as_good(levels, -int(levels.sum()), 100, seed=1) == 100
    assert flipped_as_good(levels, int(levels.sum()) + 1, 100, seed=1) == 0


# --- scores


def test_levels_are_of_magnitudes_alone() -> None:
    assert rank_levels(numpy.array([0.0, 3.0, 1.0, 3.0, 2.0]), 4).tolist() == [0, 4, 1, 4, 2]
    assert rank_levels(numpy.zeros(3), 4).tolist() == [0, 0, 0]
    assert rank_levels(numpy.array([]), 4).tolist() == []
    assert rank_levels(generator(0).random(1000), 64).min() >= 1
    assert clipped_levels(numpy.array([0.0, 1.0, 2.0, 3.0, 1e300]), 10, 2.0).tolist() == [0, 2, 4, 6, 10]
    assert clipped_levels(numpy.zeros(2), 10, 2.0).tolist() == [0, 0]
    assert sequential_ranks(numpy.array([2.0, 1.0, 0.0, 2.0, 9.0])).tolist() == [1.0, 0.5, 0.0, 2.5 / 3, 1.0]


def test_references_take_out_what_they_explain_and_no_coin() -> None:
    draws = generator(3)
    shared = draws.standard_normal(500)
    differences, references = 2.0 * shared + 0.1 * draws.standard_normal(500), (shared + 0.01 * draws.standard_normal(500))[:, None]
    assert float(numpy.std(residuals(differences, references))) < 0.15
    flips = numpy.where(fair_signs(4, 1, 500)[0] > 0, 1.0, -1.0)
    for explained in (residuals, running_residuals):
        # The two texts of a pair named the other way round: the pair's residual changes its sign, and no other changes at all.
        assert numpy.array_equal(explained(differences * flips, references * flips[:, None]), explained(differences, references) * flips)
    assert numpy.array_equal(running_residuals(differences, references)[:100], running_residuals(differences[:100], references[:100]))
    assert residuals(differences, numpy.zeros((500, 2))).tolist() == differences.tolist()


# --- the test


@settings(max_examples=25, deadline=None)
@given(
    differences=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
    scores=st.sampled_from(["ranks", "clipped"]),
    with_references=st.booleans(),
)
def test_with_every_coin_the_other_way_round_the_statistic_is_the_negative(differences: list[float], scores: Any, with_references: bool) -> None:
    """First and second exchanged in every pair is the same as all coins flipped."""
    references = numpy.outer(numpy.arange(len(differences)) - 3.0, [1.0, 2.0]) if with_references else numpy.zeros((len(differences), 0))
    test = replace(TEST, scores=scores, references=("one", "two") if with_references else (), flips=9)
    plan = test.plan(alpha=0.01)
    one = test.test(plan, evidence(differences, references))
    other = test.test(plan, evidence([-difference for difference in differences], -references))
    if one.refused is not None:
        assert other.refused is not None
        return
    assert other.details["sum"] == -one.details["sum"]
    assert other.statistic == -one.statistic  # type: ignore[operator]


def test_the_finding_is_what_all_coins_say() -> None:
    """Twelve pairs, all 4,096 coins, by hand."""
    differences = numpy.array([0.3, -1.2, 0.8, 2.2, -0.1, 0.9, 1.1, -0.7, 4.0, 0.2, -0.6, 0.5])
    test = replace(TEST, levels=12)
    finding = test.test(test.plan(alpha=0.05), evidence(differences))
    ranks = numpy.argsort(numpy.argsort(numpy.abs(differences))) + 1
    signed = ranks * numpy.sign(differences)
    total = float(signed @ signs_of(names(12)))
    as_good = sum(float(signed @ numpy.array(signs)) >= total for signs in itertools.product((1, -1), repeat=12))
    assert finding.log_p == pytest.approx(math.log(as_good / 4096))
    assert finding.statistic == pytest.approx(total / math.sqrt(float((ranks**2).sum())))
    assert finding.details["mean_served_minus_twin"] == pytest.approx(float(differences @ signs_of(names(12))) / 12)
    assert finding.rank_p is not None
    assert abs(finding.rank_p - as_good / 4096) < 0.1
    assert finding.details["log_bound"] <= finding.details["log_self_normalised_bound"]
    assert (finding.scored, finding.alarm) == (12, None)
    json.dumps(finding.as_json(), allow_nan=False)


def test_a_suspect_that_prefers_what_was_served_is_found_and_one_that_does_not_is_not() -> None:
    requests = names(2000)
    noise = generator(5).standard_normal(2000)
    plan = TEST.plan(alpha=1e-6)
    assert not TEST.test(plan, evidence(noise)).rejects
    used = evidence(noise + 0.3 * signs_of(requests))
    finding = TEST.test(plan, used)
    assert finding.rejects
    assert finding.rank_p == 1 / 1000
    other = TwinTest(coins=(Coins.of(KEY, 1),), statistic="log-likelihood", flips=999)  # coins that were not those of these pairs
    assert not other.test(other.plan(alpha=1e-6), replace(used, epochs=(1,) * 2000)).rejects


def test_what_cannot_be_tested_is_refused() -> None:
    plan = TEST.plan(alpha=0.01)
    for nothing in ([], [0.0], [0.0] * 50):
        for test in (TEST, replace(TEST, scores="clipped"), replace(TEST, stopping="sequential")):
            finding = test.test(test.plan(alpha=0.01), evidence(nothing, left_out={"equal pairs": 3}))
            assert finding.refused is not None
            assert (finding.log_p, finding.log_e, finding.rejects) == (None, None, False)
            assert "equal pairs" in finding.refused
    finding = TEST.test(plan, evidence([1.0, 0.0]))
    assert (finding.scored, finding.left_out["pairs that the suspect does not tell apart"]) == (1, 1)
    assert finding.log_p in (0.0, pytest.approx(math.log(0.5)))
    for wrong in (replace(TEST, statistic="another"), replace(TEST, levels=32), replace(TEST, coins=()), replace(TEST, stopping="sequential")):
        with pytest.raises(GuardError) as raised:
            wrong.test(plan, evidence([1.0]))
        assert raised.value.code == "guard-plan"
    with pytest.raises(GuardError, match="references"):
        TEST.test(plan, evidence([1.0], [[1.0]]))
    with pytest.raises(GuardError, match="epochs"):
        TEST.test(plan, evidence([1.0], epochs=(4,)))
    for change in ({"requests": ("a", "a")}, {"requests": ("a",)}, {"epochs": (0,)}, {"accounts": ()}):
        with pytest.raises(GuardError):
            evidence([1.0, 2.0], **change)
    for wrong_number in (math.nan, math.inf):
        with pytest.raises(GuardError, match="finite"):
            evidence([wrong_number])
        with pytest.raises(GuardError, match="finite"):
            evidence([1.0], [[wrong_number]])


def test_the_coins_are_bound_by_the_plan() -> None:
    assert TEST.plan(alpha=0.01).commitments == (COINS.commitment,)
    assert TEST.plan(alpha=0.01).calibrated_as == replace(TEST, coins=(Coins.of(KEY, 9),)).plan(alpha=0.1).calibrated_as


def test_a_law_that_does_not_go_with_the_redrawn_coins_raises_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in either would be seen: here the law is made a normal one of half the width."""
    monkeypatch.setattr(SignLaw, "log_tail", lambda law, total: math.log(math.erfc(total / math.sqrt(law.variance) / math.sqrt(0.5)) / 2))
    finding = TEST.test(TEST.plan(alpha=0.05), evidence(generator(6).standard_normal(300) + 0.15 * signs_of(names(300))))
    assert finding.alarm is not None
    assert not finding.rejects


# --- validity: 10,000 audits whose coins are redrawn over fixed differences


def normal(pairs: int) -> Floats:
    return generator(10).standard_normal(pairs)


def heavy(pairs: int) -> Floats:
    return generator(11).standard_cauchy(pairs) ** 3


def dependent(pairs: int) -> Floats:
    """Blocks of one magnitude, as of one prompt asked often, with a common drift."""
    return numpy.repeat(generator(12).standard_normal(pairs // 10), 10) + 0.5


@pytest.mark.parametrize("scores", ["ranks", "clipped"])
@pytest.mark.parametrize("differences", [normal, heavy, dependent])
def test_null_audits_reject_as_often_as_they_say(differences: Any, scores: Any) -> None:
    """Of 10,000 audits no more than the exact region allows reject, by any of the ps; the exact one rejects no fewer either."""
    audits, pairs = 10_000, 60
    fixed = differences(pairs)
    levels = replace(TEST, scores=scores, levels=16).levels_of(fixed)
    totals = fair_signs(20, audits, pairs) @ (levels * numpy.sign(fixed).astype(numpy.int64))
    law = SignLaw(levels)
    values = sorted(set(totals.tolist()))
    tails = {total: law.log_tail(total) for total in values}
    bounds = {total: law.log_bound(total) for total in values}
    log_p = numpy.array([tails[total] for total in totals.tolist()])
    for alpha in (0.05, 0.01):
        reached = math.exp(max(tail for tail in tails.values() if tail <= math.log(alpha)))  # the law is discrete: its size is at most alpha
        rejected = int((log_p <= math.log(alpha)).sum())
        assert not too_many(rejected, audits, reached)
        assert not too_many(audits - rejected, audits, 1.0 - reached)
        bounded = numpy.array([bounds[total] for total in totals.tolist()])
        assert not too_many(int((bounded <= math.log(alpha)).sum()), audits, alpha)
        z = totals / math.sqrt(law.variance)
        assert not too_many(int(((z > 0) & (-z * z / 2 <= math.log(alpha))).sum()), audits, alpha)


def test_redrawn_coins_give_a_p_and_their_bare_share_does_not() -> None:
    """(1 + #)/(M + 1) is exact as the rank of what was seen among M + 1 exchangeable sums; #/M is 0 once in M + 1 audits."""
    audits, redraws = 4000, 19
    levels = rank_levels(numpy.abs(heavy(60)), 16)
    draws = generator(21)
    as_good = numpy.zeros(audits, dtype=numpy.int64)
    seen = fair_signs(22, audits, 60) @ levels
    for _ in range(redraws):
        as_good += (2 * draws.integers(2, size=(audits, 60)) - 1) @ levels >= seen
    for alpha in (0.05, 0.01):
        assert not too_many(int(((1 + as_good) / (1 + redraws) <= alpha).sum()), audits, alpha)
    assert too_many(int((as_good / redraws <= 0.01).sum()), audits, 0.01)


def test_the_keys_own_coins_give_null_audits_too() -> None:
    """300 keys, and the test as it is run: rejections at 0.05 within the exact region."""
    fixed = heavy(40)
    found = 0
    for number in range(300):
        test = TwinTest(coins=(Coins.of(KEY, number + 1),), statistic="log-likelihood", flips=1, levels=16)
        finding = test.test(test.plan(alpha=0.05), evidence(fixed, epochs=(number + 1,) * 40))
        found += finding.log_p is not None and finding.log_p <= math.log(0.05)
    assert not too_many(found, 300, 0.05)


def test_a_t_test_would_not_hold_where_this_does() -> None:
    """One pair that dwarfs all others: the normal approximation has its size wrong, the law of the coins has not."""
    fixed = numpy.append(numpy.full(9, 0.3), 3.0)
    levels = numpy.rint(numpy.abs(fixed) * 10).astype(numpy.int64)
    audits = 4000
    totals = fair_signs(30, audits, 10) @ levels
    law = SignLaw(levels)
    z = totals / math.sqrt(law.variance)
    assert too_many(int((z >= 0.8416).sum()), audits, 0.2)  # nominal 0.2; of all coins 0.37 give z >= 0.84
    rejecting = [total for total in set(totals.tolist()) if law.log_tail(total) <= math.log(0.2)]
    assert not too_many(int(numpy.isin(totals, rejecting).sum()), audits, 0.2)


# --- P7, P8, and pairs that depend on earlier coins


def test_peeking_makes_a_valid_p_invalid_and_the_e_value_stays_valid() -> None:
    """P7: looks after every 20 of 200 pairs, and a stop at the first p <= 0.05."""
    audits, pairs = 2000, 200
    fixed = normal(pairs)
    signs = fair_signs(40, audits, pairs)
    peeked = numpy.zeros(audits, dtype=bool)
    for seen in range(20, pairs + 1, 20):
        levels = rank_levels(numpy.abs(fixed[:seen]), 16)
        totals = signs[:, :seen] @ (levels * numpy.sign(fixed[:seen]).astype(numpy.int64))
        law = SignLaw(levels)
        critical = next(total for total in range(int(levels.sum()) % 2, int(levels.sum()) + 1, 2) if law.log_tail(total) <= math.log(0.05))
        peeked |= totals >= critical
    assert too_many(int(peeked.sum()), audits, 0.05)
    assert peeked.mean() > 0.12
    signed = sequential_ranks(numpy.abs(fixed)) * numpy.sign(fixed)
    log_ps = numpy.array([Wealth.of(Symmetric()).after(signed * row).log_p for row in signs])
    for alpha in (0.05, 0.01):
        assert not too_many(int((log_ps <= math.log(alpha)).sum()), audits, alpha)


def test_pairs_that_depend_on_earlier_coins_break_the_fixed_test_and_not_the_sequential_one() -> None:
    """Users who ask on while they were served badly, and hardly any more when they were served well: the magnitudes hold earlier coins."""
    audits, pairs = 2000, 200
    signs = fair_signs(41, audits, pairs)
    magnitudes = numpy.ones((audits, pairs))
    running = numpy.zeros(audits)
    for place in range(pairs):
        magnitudes[:, place] = numpy.where(running >= 1.8 * math.sqrt(max(place, 10)), 1e-3, 1.0) if place else 1.0
        magnitudes[:, place] = numpy.minimum(magnitudes[:, place], magnitudes[:, place - 1]) if place else 1.0
        running += magnitudes[:, place] * signs[:, place]
    z = running / numpy.sqrt((magnitudes**2).sum(axis=1))
    assert too_many(int((z >= 1.7).sum()), audits, 0.05)  # of a sum of +-1 that would be 0.045
    log_ps = [Wealth.of(Symmetric()).after(sequential_ranks(size) * row).log_p for size, row in zip(magnitudes[:500], signs[:500], strict=True)]
    assert not too_many(int((numpy.array(log_ps) <= math.log(0.05)).sum()), 500, 0.05)


def test_a_sequential_finding_can_stop_at_any_time() -> None:
    test = replace(TEST, stopping="sequential")
    plan = test.plan(alpha=1e-6)
    requests = names(1500)
    used = generator(7).standard_normal(1500) + 0.4 * signs_of(requests)
    finding = test.test(plan, evidence(used))
    assert finding.rejects
    assert finding.log_p == -finding.details["log_highest"]
    stopped = next(seen for seen in range(50, 1501, 50) if test.test(plan, evidence(used[:seen])).rejects)
    assert stopped < 1500
    # What was seen first does not change when more is seen.
    assert finding.log_p <= test.test(plan, evidence(used[:stopped])).log_p  # type: ignore[operator]
    assert not test.test(plan, evidence(generator(8).standard_normal(1500))).rejects


def test_a_mean_of_log_ps_is_no_p() -> None:
    """P8. Uniform ps of 20 groups: exp of their mean log is below 0.5 nearly always. And of two ps that lean on each other, below 0.05 twice too often."""
    audits = 4000
    uniform = generator(50).random((audits, 20))
    means = numpy.exp(numpy.log(uniform).mean(axis=1))
    assert too_many(int((means <= 0.5).sum()), audits, 0.5)
    assert too_many(int((numpy.median(uniform[:, :2], axis=1) <= 0.9).sum()), audits, 0.9)
    first = uniform[:, 0]
    second = numpy.where(first <= 0.1, 0.1 - first, first)  # uniform as well
    assert not too_many(int((second <= 0.05).sum()), audits, 0.05)
    assert too_many(int((numpy.sqrt(first * second) <= 0.05).sum()), audits, 0.05)
    # What stands in its place: one sum over all pairs, or Holm over groups.
    smallest = numpy.array([min(holm(dict(enumerate(numpy.log(row).tolist()))).values()) for row in uniform[:1000]])  # type: ignore[type-var, arg-type]
    assert not too_many(int((smallest <= math.log(0.05)).sum()), 1000, 0.05)


# --- groups


def test_the_cluster_that_passed_answers_on_is_named_in_95_of_100_cases() -> None:
    """Ten groups of 400 pairs each and 400 pairs of others; of one group's pairs 60 % were used, each moving its difference by 0.6 standard deviations.

    Named at alpha = 0.001 over all groups: that group, and no other, in at least 95 of 100 cases; another one in no more than Holm allows.
    """
    accounts = tuple(f"{number % 11}" for number in range(4400))
    groups = {f"group {name}": frozenset({f"{name}"}) for name in range(10)}
    right = wrong = 0
    for case in range(100):
        coins = Coins.of(KEY, 100 + case)
        targeted = TargetedTwinTest(twins=TwinTest(coins=(coins,), statistic="log-likelihood", flips=1, levels=8), groups=groups)
        draws = generator(60 + case)
        used = numpy.array([account == str(case % 10) for account in accounts]) & (draws.random(4400) < 0.6)
        given = evidence(draws.standard_normal(4400) + 0.6 * used * signs_of(names(4400), coins), accounts=accounts, epochs=(100 + case,) * 4400)
        finding = targeted.test(targeted.plan(alpha=0.001), given)
        right += finding.details["attributed"] == [f"group {case % 10}"]
        wrong += bool(set(finding.details["attributed"]) - {f"group {case % 10}"})
    assert right >= 95
    assert not too_many(wrong, 100, 0.001)


def test_groups_are_fixed_before_and_the_rest_is_the_control() -> None:
    accounts = ("a", "b", "c", "c") * 300
    twins = replace(TEST, flips=9)
    targeted = TargetedTwinTest(twins=twins, groups={"one": frozenset({"a"}), "none": frozenset({"z"})})
    plan = targeted.plan(alpha=0.01)
    assert plan.sha256 != TargetedTwinTest(twins=twins, groups={"one": frozenset({"b"})}).plan(alpha=0.01).sha256
    used = numpy.array([account == "a" for account in accounts])
    finding = targeted.test(plan, evidence(generator(9).standard_normal(1200) + used * signs_of(names(1200)), accounts=accounts))
    assert finding.details["attributed"] == ["one"]
    assert finding.details["groups"]["none"]["refused"] is not None
    assert finding.details["rest"]["scored"] == 900
    assert finding.details["rest"]["log_p"] > math.log(1e-4)
    assert finding.log_p == pytest.approx(finding.details["groups"]["one"]["log_p"] + math.log(2))
    assert targeted.test(plan, evidence([1.0], accounts=("b",))).refused is not None
    for wrong in ({}, {"one": frozenset({"a"}), "other": frozenset({"a"})}):
        with pytest.raises(GuardError):
            TargetedTwinTest(twins=twins, groups=wrong)
    with pytest.raises(GuardError) as raised:
        targeted.test(twins.plan(alpha=0.01), evidence([1.0]))
    assert raised.value.code == "guard-plan"


# --- from a log to a finding, and for whoever checks it


def served(directory: Path, count: int, epoch: int = 0) -> None:
    with ServingLog(directory, KEY, share=0.5, epoch=epoch) as log:
        names = [name for name in (log.next_request() for _ in range(2 * count)) if log.selects(name)]
        texts = [("a", "a") if place == 3 else ("a", None) if place == 4 else (f"a{place}", "b") for place in range(len(names))]
        log.append(
            Sampled(request=name, account=f"{place % 2}", prompt="{}", first=first, second=second, reason=None if second else "a sample failed")
            for place, (name, (first, second)) in enumerate(zip(names, texts, strict=True))
        )


def bundled(directory: Path, test: TwinTest, *, texts: bool, effect: float = 1.0) -> tuple[object, dict[str, bytes]]:
    """An opening of all coins, and the files, of a suspect that prefers what was served."""
    contents = verify_serving_log(directory / "serving.jsonl")
    epochs = {session.session: session.epoch for session in contents.sessions}
    by_epoch = {coins.epoch: coins for coins in test.coins}
    draws = generator(70)
    rows = [
        {
            "request": name,
            "difference": float(draws.standard_normal()) + effect * (1 - 2 * by_epoch[epochs[name[:16]]].served(name)),
            "references": [],
        }
        for name, (_, entry) in contents.requests.items()
        if entry["outcome"] == "twin"
    ]
    files = {
        "serving.jsonl": (directory / "serving.jsonl").read_bytes(),
        "differences.jsonl": "".join(json.dumps(row) + "\n" for row in reversed(rows)).encode(),
    }
    if texts:
        files["openings.jsonl"] = "".join(json.dumps(one.as_json()) + "\n" for one in disclose(directory, KEY)).encode()
    return {"coins": [coins.as_json() for coins in test.coins]}, files


@pytest.mark.parametrize("stopping", ["fixed", "sequential"])
@pytest.mark.parametrize("scores", ["ranks", "clipped"])
def test_a_third_party_finds_the_same(tmp_path: Path, stopping: Any, scores: Any) -> None:
    served(tmp_path, 60)
    served(tmp_path, 60, epoch=1)
    twins = replace(TEST, coins=(COINS, Coins.of(KEY, 1)), stopping=stopping, scores=scores)
    opening, files = bundled(tmp_path, twins, texts=True)
    assert commitments(opening) == twins.plan(alpha=0.01).commitments
    finding = recompute(twins.plan(alpha=0.01), json.loads(json.dumps(opening)), files)
    assert finding.rejects
    assert finding == recompute(twins.plan(alpha=0.01), opening, files)
    counts = {"pairs of one text": 2, "requests without two texts": 2, "selected requests that the log does not have": 0, "pairs without a score": 0}
    assert counts.items() <= finding.left_out.items()
    without_texts = recompute(twins.plan(alpha=0.01), opening, {name: files[name] for name in ("serving.jsonl", "differences.jsonl")})
    assert without_texts == finding
    # Whoever holds the log's head sees that it was cut short, which nothing else in it shows.
    cut = recompute(twins.plan(alpha=0.01), opening, files | {"serving.jsonl": files["serving.jsonl"].rpartition(b"\n{")[0] + b"\n"})
    head = verify_serving_log(tmp_path / "serving.jsonl").head
    assert finding.details["log"] == {"entries": head.entries, "head": head.hash}
    assert (cut.log_p, cut.alarm, cut.details["log"]["entries"]) == (finding.log_p, None, head.entries - 1)
    groups = TargetedTwinTest(twins=twins, groups={"even": frozenset({"0"})})
    assert recompute(groups.plan(alpha=0.01), opening, files).details["attributed"] == ["even"]


def test_what_somebody_could_have_left_out_makes_a_finding_doubtful(tmp_path: Path) -> None:
    """Pairs that the suspect does not prefer, dropped by whoever wants it to be guilty: a false positive, and an alarm."""
    served(tmp_path, 200)
    opening, files = bundled(tmp_path, TEST, texts=False, effect=0.0)
    plan = TEST.plan(alpha=0.01)
    assert not recompute(plan, opening, files).rejects
    rows = [json.loads(line) for line in files["differences.jsonl"].splitlines()]
    liked = [row for row in rows if row["difference"] * (1 - 2 * COINS.served(row["request"])) > -1.0]
    finding = recompute(plan, opening, files | {"differences.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in liked)})
    assert finding.log_p is not None
    assert finding.log_p < math.log(0.01)
    assert finding.alarm is not None
    assert not finding.rejects
    # Fewer pairs may be audited where that was planned; which, the coins' key says.
    half = replace(TEST, audited_share=0.5)
    kept = [row for row in rows if COINS.audits(row["request"], 0.5)]
    assert 60 < len(kept) < 140
    found = recompute(half.plan(alpha=0.01), opening, files | {"differences.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in kept)})
    assert (found.scored, found.alarm) == (len(kept), None)
    with pytest.raises(GuardError, match="no pair"):
        recompute(half.plan(alpha=0.01), opening, files)
    for absent, alarmed in ((1, False), (3, True)):
        given = evidence(generator(1).standard_normal(200), left_out={"selected requests that the log does not have": absent})
        for test in (TEST, replace(TEST, stopping="sequential")):
            assert (test.test(test.plan(alpha=0.01), given).alarm is not None) is alarmed


def test_evidence_that_is_not_of_the_log_is_refused(tmp_path: Path) -> None:
    served(tmp_path, 30)
    plan = TEST.plan(alpha=0.01)
    opening, files = bundled(tmp_path, TEST, texts=True)
    rows = [json.loads(line) for line in files["differences.jsonl"].splitlines()]

    def refused(**changed: bytes) -> str:
        with pytest.raises((GuardError, LedgerError)) as raised:
            recompute(plan, opening, files | {f"{name}.jsonl": data for name, data in changed.items()})
        return raised.value.found

    def lines(*trees: Any) -> bytes:
        return b"".join(json.dumps(tree).encode() + b"\n" for tree in trees)

    assert "no pair of the log" in refused(differences=lines(*rows, {"request": "0123456789abcdef-1", "difference": 1.0, "references": []}))
    assert "once" in refused(differences=lines(rows[0], rows[0]))
    assert "widths" in refused(differences=lines(rows[0], rows[1] | {"references": [1.0]}))
    for wrong in ({}, [], 1, rows[0] | {"difference": "1"}, rows[0] | {"difference": True}, rows[0] | {"references": None}):
        assert "once" in refused(differences=lines(wrong))
    assert "finite" in refused(differences=lines(rows[0] | {"difference": math.nan}))
    assert "not JSON" in refused(differences=b"x")
    assert "line 2 " in refused(serving=files["serving.jsonl"].replace(b'"account":"0"', b'"account":"1"', 1))
    assert "committed" in refused(openings=files["openings.jsonl"].replace(b'"first": "a0"', b'"first": "a1"', 1))
    for wrong_opening in ({}, [], {"coins": [1]}, {"coins": [Coins.of(KEY, 1).as_json()]}):
        with pytest.raises(GuardError):
            recompute(plan, wrong_opening, files)
    changes: list[dict[str, Any]] = [{"levels": "9"}, {"levels": 0}, {"flips": 1.5}, {"scores": "other"}, {"references": 1}, {"references": ["one"]}]
    wrong_plans = [replace(plan, settings=plan.settings | change) for change in changes]
    for wrong_plan in (*wrong_plans, replace(plan, test="other"), replace(plan, scope={}), replace(plan, scope={"audited_share": 2})):
        with pytest.raises(GuardError):
            recompute(wrong_plan, opening, files)
    assert recompute(plan, opening, {"serving.jsonl": files["serving.jsonl"]}).refused is not None


def test_coins_count_for_their_own_epoch_alone(tmp_path: Path) -> None:
    """A commitment does not cover the epoch: said anew, after the suspect was asked, it would give as many p's as epochs can be ordered."""
    served(tmp_path, 30)
    served(tmp_path, 30, epoch=1)
    one, two = COINS, Coins.of(KEY, 1)
    opening, files = bundled(tmp_path, replace(TEST, coins=(one, two)), texts=True)
    exchanged = replace(TEST, coins=(replace(one, epoch=1), replace(two, epoch=0)))
    plan, opening = exchanged.plan(alpha=0.01), {"coins": [coins.as_json() for coins in exchanged.coins]}
    assert commitments(opening) == replace(TEST, coins=(one, two)).plan(alpha=0.01).commitments
    for left_away in (set(), {"openings.jsonl"}):
        with pytest.raises(GuardError, match="said to be of epoch"):
            recompute(plan, opening, {name: data for name, data in files.items() if name not in left_away})
    with pytest.raises(GuardError, match="two coins of one epoch"):
        replace(TEST, coins=(one, Coins(0, two.key, two.nonce)))


def test_audits_for_the_null_harness_are_those_of_the_test() -> None:
    keys = [Key(hashlib.sha256(f"key {number}".encode()).digest()) for number in range(40)]
    given = evidence(heavy(30))
    for twins in (replace(TEST, flips=1), replace(TEST, stopping="sequential")):
        single = [replace(twins, coins=(Coins.of(key, 0),)) for key in keys]
        audit = TwinAudit(twins)
        assert audit.log_ps(given, keys) == pytest.approx([test.test(test.plan(alpha=0.05), given).log_p for test in single], rel=1e-9, abs=1e-12)
        assert (audit.test, audit.settings) == (twins.plan(alpha=0.05).test, twins.plan(alpha=0.05).settings)
    assert TwinAudit(TEST).log_ps(evidence([0.0]), keys) == [None] * 40
    student = Student(name="heavy", kind="independent", sha256="0" * 64, evidence=given)
    record = calibrate(TwinAudit(replace(TEST, levels=8)), [student], audits_per_student=400, seed=0)
    assert len(record.failures) == 2  # too few students and too few audits, and nothing else


def test_from_a_calibration_to_a_bundle_that_anybody_verifies(tmp_path: Path) -> None:
    """30 innocent suspects, 10,000 audits; a plan that was registered before the log began; a suspect that learned; and a verifier who has the bundle alone."""
    twins = replace(TEST, levels=16, flips=199)
    students = [
        Student(name=f"student {number}", kind="other-outputs", sha256=f"{number:064x}", evidence=evidence(generator(80 + number).standard_t(2, 25)))
        for number in range(30)
    ]
    record = calibrate(TwinAudit(twins), students, audits_per_student=334, seed=0)
    assert record.failures == ()
    registration = Registration.begin(tmp_path / "registration.jsonl", owner="A. Owner", purpose="To find out who learned from what we served.")
    registration.commit("coins", scheme="twins", commitment=COINS.commitment)
    registration.plan("twins", twins.plan(alpha=1e-6), suspect="model M, by log-probabilities")
    head = registration.seal(alpha=1e-6)
    served(tmp_path, 60)
    opening, files = bundled(tmp_path, twins, texts=True)
    made = {"twins": Submission(opening=opening, data=files)}
    bundle.write(tmp_path / "bundle", (tmp_path / "registration.jsonl").read_bytes(), made, [record])
    verification = bundle.verify(tmp_path / "bundle", held=[head])
    assert verification.holds, verification.failures
    finding = json.loads((tmp_path / "bundle" / "results.json").read_bytes())["findings"]["twins"]
    assert finding["rejects"]
    assert finding["calibration"] == record.sha256
    # Another difference, the manifest made to fit: what follows from the data is no longer what was found.
    path = tmp_path / "bundle" / "data" / "twins" / "differences.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"difference": -', b'"difference": ', 1))
    assert not bundle.verify(tmp_path / "bundle", held=[head]).holds


# --- suspects that show text alone


def plain_lcs(one: list[str], other: list[str]) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for place, found in enumerate(other):
            row.append(before[place] + 1 if found == word else max(row[-1], before[place + 1]))
    return row[-1]


@settings(max_examples=100, deadline=None)
@given(one=st.lists(st.sampled_from("abc"), max_size=70), other=st.lists(st.sampled_from("abcd"), max_size=70))
def test_the_longest_common_subsequence_is_that_of_the_table(one: list[str], other: list[str]) -> None:
    assert lcs_length(one, other) == plain_lcs(one, other) == lcs_length(other, one)


def test_agreement_is_of_words_and_turns_with_the_texts() -> None:
    assert lcs_ratio(words("a b c d"), words("a x c")) == pytest.approx(4 / 7)
    assert lcs_ratio([], []) == 0.0
    assert containment(words("a b c d e"), words("b c d x")) == pytest.approx(1 / 2)
    assert containment(words("a"), words("a b")) == 0.0
    samples = ["the cat sat on a mat", "the dog sat"]
    first, second = "the cat sat on the mat", "dogs are not cats"
    for measure in (lcs_ratio, containment):
        difference = agreement_difference(samples, first, second, measure)
        assert difference > 0
        assert agreement_difference(samples, second, first, measure) == -difference
    with pytest.raises(ValueError, match="no samples"):
        agreement_difference([], first, second)
