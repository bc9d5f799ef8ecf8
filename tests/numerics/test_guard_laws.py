"""Tails and intervals against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.guard import laws


def log_fraction(value: Fraction) -> float:
    """Ln of a positive fraction, whatever its size."""
    shift = value.numerator.bit_length() - value.denominator.bit_length()
    scaled = value / Fraction(2) ** shift
    return math.log(float(scaled)) + shift * math.log(2.0)


def binomial_tail(n: int, p: Fraction, successes: int) -> Fraction:
    hit, miss = p.numerator, p.denominator - p.numerator
    return Fraction(sum(math.comb(n, k) * hit**k * miss ** (n - k) for k in range(successes, n + 1)), p.denominator**n)


@given(st.integers(1, 120), st.sampled_from([Fraction(1, 4), Fraction(1, 2), Fraction(1, 1024), Fraction(7, 8)]), st.data())
def test_the_binomial_tail_is_exact(n: int, p: Fraction, data: st.DataObject) -> None:
    successes = data.draw(st.integers(1, n))
    assert laws.log_binomial_tail(n, float(p), successes) == pytest.approx(log_fraction(binomial_tail(n, p, successes)), rel=1e-11, abs=1e-13)


@pytest.mark.parametrize(("n", "successes"), [(1000, 1000), (1000, 900), (3000, 1800), (3000, 1500), (3000, 1300)])
def test_the_binomial_tail_is_exact_where_it_is_no_float_any_more(n: int, successes: int) -> None:
    p = Fraction(1, 4)
    assert laws.log_binomial_tail(n, 0.25, successes) == pytest.approx(log_fraction(binomial_tail(n, p, successes)), rel=1e-11)


def gamma_tail(n: int, total: Fraction) -> float:
    """Ln of exp(-t) times sum over k < n of t**k / k!: the sum exact, the exponential apart."""
    term, whole = Fraction(1), Fraction(0)
    for k in range(n):
        whole += term
        term = term * total / (k + 1)
    return log_fraction(whole) - float(total)


@pytest.mark.parametrize(("n", "total"), [(1, 5), (1, 900), (3, 1), (50, 20), (50, 60), (50, 4000), (400, 390), (400, 600), (400, 2500)])
def test_the_gamma_tail_is_exact(n: int, total: int) -> None:
    assert laws.log_gamma_tail(n, float(total)) == pytest.approx(gamma_tail(n, Fraction(total)), rel=1e-10, abs=1e-12)


def test_the_ends_of_the_tails() -> None:
    assert laws.log_binomial_tail(10, 0.5, 0) == laws.log_binomial_tail(10, 0.5, -3) == laws.log_binomial_tail(0, 0.5, 0) == 0.0
    assert laws.log_binomial_tail(10, 0.5, 11) == laws.log_binomial_tail(0, 0.5, 1) == -math.inf
    assert laws.log_binomial_tail(5000, 0.25, 5000) == pytest.approx(5000 * math.log(0.25))
    assert laws.log_gamma_tail(3, 0.0) == laws.log_gamma_tail(3, -1.0) == 0.0
    for bad in (lambda: laws.log_binomial_tail(-1, 0.5, 0), lambda: laws.log_binomial_tail(1, 0.0, 0), lambda: laws.log_gamma_tail(0, 1.0)):
        with pytest.raises(ValueError):
            bad()


def test_the_tails_fall_at_every_step_across_the_place_where_the_method_changes() -> None:
    binomial = [laws.log_binomial_tail(4000, 0.25, k) for k in range(1000, 2600, 5)]
    assert min(binomial) < math.log(1e-300)
    assert (np.diff(binomial) < 0).all()
    gamma = [laws.log_gamma_tail(1000, t) for t in np.linspace(1000, 3500, 300)]
    assert min(gamma) < math.log(1e-300)
    assert (np.diff(gamma) < 0).all()


@given(st.integers(1, 40), st.data(), st.sampled_from([0.95, 0.99]))
def test_clopper_pearson_has_the_tails_it_says(n: int, data: st.DataObject, confidence: float) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = laws.clopper_pearson(successes, n, confidence)
    half = (1 - confidence) / 2
    if successes > 0:
        assert float(binomial_tail(n, Fraction(low), successes)) == pytest.approx(half, rel=1e-8)
    else:
        assert low == 0.0
    if successes < n:
        assert 1.0 - float(binomial_tail(n, Fraction(high), successes + 1)) == pytest.approx(half, rel=1e-6)
    else:
        assert high == 1.0
    with pytest.raises(ValueError):
        laws.clopper_pearson(n + 1, n)
    with pytest.raises(ValueError):
        laws.clopper_pearson(0, 0)
