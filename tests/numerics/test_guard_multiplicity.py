"""Holm and e-BH: what their definitions say, against brute force; and that they hold where naive selection does not."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.guard.laws import log_binomial_tail
from stillroom.guard.multiplicity import e_bh, holm

IMPOSSIBLE = math.log(1e-6)
LOG_PS = st.lists(st.one_of(st.none(), st.floats(-12.0, 0.0), st.sampled_from([-2.0, -3.0, -4.0])), min_size=0, max_size=6)


def named(values: list[float | None]) -> dict[str, float | None]:
    return {f"test {number}": value for number, value in enumerate(values)}


def closed_bonferroni(log_ps: dict[str, float | None], alpha: float) -> set[str]:
    """Rejected where Bonferroni rejects every intersection that it is in (Marcus, Peritz and Gabriel 1976)."""
    known = {name: 0.0 if log_p is None else log_p for name, log_p in log_ps.items()}

    def bonferroni(names: tuple[str, ...]) -> bool:
        return min(known[name] for name in names) <= math.log(alpha / len(names))

    families = [names for size in range(1, len(known) + 1) for names in itertools.combinations(known, size)]
    return {name for name in known if all(bonferroni(names) for names in families if name in names)}


@given(values=LOG_PS, alpha=st.sampled_from([0.01, 0.05, 0.2]))
@settings(max_examples=150)
def test_holm_is_the_closure_of_bonferroni(values: list[float | None], alpha: float) -> None:
    adjusted = holm(named(values))
    near = any(abs(log_p - math.log(alpha)) < 1e-9 for log_p in adjusted.values())
    if not near:  # a tie at the level itself is decided by a rounding
        assert {name for name, log_p in adjusted.items() if log_p <= math.log(alpha)} == closed_bonferroni(named(values), alpha)
    assert set(adjusted) == set(named(values))
    assert all(log_p <= 0.0 for log_p in adjusted.values())


@given(values=LOG_PS)
@settings(max_examples=50)
def test_holm_keeps_the_order_and_never_helps(values: list[float | None]) -> None:
    adjusted = holm(named(values))
    for name, log_p in named(values).items():
        assert adjusted[name] >= (0.0 if log_p is None else log_p)
    for a, b in itertools.combinations(adjusted, 2):
        first, second = named(values)[a] or 0.0, named(values)[b] or 0.0
        assert (adjusted[a] - adjusted[b]) * (first - second) >= 0.0


def test_a_test_that_was_not_run_costs_as_one_that_found_nothing() -> None:
    assert holm({"a": -5.0, "b": None})["a"] == pytest.approx(-5.0 + math.log(2))
    assert holm({"a": -5.0, "b": None})["b"] == 0.0
    assert holm({}) == {}


@pytest.mark.parametrize("wrong", [math.nan, 0.1])
def test_what_is_no_p_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="look at"):
        holm({"a": -1.0, "b": wrong})


def test_holm_holds_for_dependent_tests_where_keeping_the_best_does_not() -> None:
    """P7. Twenty keys, or prompt sets, tried by the same owner: p's of one common and twenty own parts, 3,000 families, all of them null."""
    generator = numpy.random.default_rng(0)
    common, own = generator.normal(size=(3000, 1)), generator.normal(size=(3000, 20))
    scores = math.sqrt(0.3) * common + math.sqrt(0.7) * own
    ps = numpy.vectorize(lambda score: 0.5 * math.erfc(score / math.sqrt(2.0)))(scores)
    families = [holm({str(place): math.log(p) for place, p in enumerate(row)}) for row in ps]
    errors = sum(min(adjusted.values()) <= math.log(0.05) for adjusted in families)
    best = int((ps.min(axis=1) <= 0.05).sum())
    assert log_binomial_tail(3000, 0.05, errors) > IMPOSSIBLE
    assert log_binomial_tail(3000, 0.05, best) < IMPOSSIBLE


def test_a_mean_of_log_p_is_no_p() -> None:
    """P8. The geometric mean of ten p's, read as a p, is far from uniform; the same p's by Holm are not below."""
    ps = numpy.random.default_rng(0).random((4000, 10))
    near_half = numpy.exp(numpy.log(ps).mean(axis=1))
    assert log_binomial_tail(4000, 0.45, int((near_half <= 0.45).sum())) < IMPOSSIBLE
    smallest = [min(holm({str(place): math.log(p) for place, p in enumerate(row)}).values()) for row in ps]
    assert log_binomial_tail(4000, 0.45, sum(one <= math.log(0.45) for one in smallest)) > IMPOSSIBLE


@given(
    log_es=st.lists(st.one_of(st.none(), st.floats(-3.0, 8.0)), max_size=7),
    rate=st.sampled_from([0.05, 0.1, 0.5]),
)
@settings(max_examples=150)
def test_e_bh_names_the_largest_set_that_supports_itself(log_es: list[float | None], rate: float) -> None:
    known = {name: 0.0 if log_e is None else log_e for name, log_e in named(log_es).items()}
    supported = [
        set(names)
        for size in range(len(known) + 1)
        for names in itertools.combinations(known, size)
        if all(known[name] >= math.log(len(known) / (size * rate)) for name in names)
    ]
    largest = max(map(len, supported))
    found = e_bh(named(log_es), false_discovery_rate=rate)
    assert len(found) == largest
    assert set(found) in supported


def test_e_bh_keeps_the_share_of_innocents_under_dependence() -> None:
    """Forty suspects of whom ten learned from us; all e-values depend on one common coin. The mean share of innocents among those named, of 2,000 draws.

    By Hoeffding's inequality a mean of shares with expectation <= 0.2 exceeds 0.26 with probability < 1e-6.
    """
    generator = numpy.random.default_rng(0)
    shares, named_at_all = [], 0
    for _ in range(2000):
        common = generator.random()
        # an innocent's e-value is 1/x where the common coin is below x in (0, 1), else 0: expectation 1, and all at once
        cuts = generator.random(30) * 0.2 + 0.01
        innocents = numpy.where(common < cuts, -numpy.log(cuts), -50.0)
        guilty = generator.normal(4.0, 2.0, 10)
        found = e_bh({str(place): float(log_e) for place, log_e in enumerate([*guilty, *innocents])}, false_discovery_rate=0.2)
        wrong = sum(int(name) >= 10 for name in found)
        shares.append(wrong / max(1, len(found)))
        named_at_all += bool(found)
    assert numpy.mean(shares) <= 0.26
    assert named_at_all > 1000


def test_naming_whoever_is_above_one_over_alpha_has_no_rate_over_many_suspects() -> None:
    """Planted: 400 innocents, each with an e-value that is 1/0.05 one time in twenty. Each by itself is sound; together somebody is always named."""
    generator = numpy.random.default_rng(0)
    naive = tested = 0
    for _ in range(200):
        log_es = numpy.where(generator.random(400) < 0.05, math.log(20.0), -50.0)
        naive += bool((log_es >= math.log(20.0)).any())
        tested += bool(e_bh({str(place): float(log_e) for place, log_e in enumerate(log_es)}, false_discovery_rate=0.05))
    assert log_binomial_tail(200, 0.05, naive) < IMPOSSIBLE
    assert log_binomial_tail(200, 0.05, tested) > IMPOSSIBLE


def test_what_is_no_e_value_or_no_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="look at"):
        e_bh({"a": math.nan}, false_discovery_rate=0.1)
    for rate in (0.0, 1.0):
        with pytest.raises(ValueError, match="rate"):
            e_bh({"a": 1.0}, false_discovery_rate=rate)
    assert e_bh({}, false_discovery_rate=0.1) == frozenset()
    assert e_bh({"a": math.inf}, false_discovery_rate=0.1) == {"a"}
