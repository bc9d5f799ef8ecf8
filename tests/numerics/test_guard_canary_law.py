"""The law of the exposure score: the tail is that of the law itself, at any size of p, and never above the bound by Gamma."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.guard.canaries import SCORES_PER_NAT, log_exposure_tail, scores
from stillroom.guard.laws import log_gamma_tail


def law(canaries: int, codes: int) -> dict[int, Fraction]:
    """The law of the sum, in fractions, by adding one canary after another."""
    single = Counter(scores(numpy.arange(1, codes + 1), codes).tolist())
    sums: Counter[int] = Counter({0: 1})
    for _ in range(canaries):
        further: Counter[int] = Counter()
        for so_far, ways in sums.items():
            for score, ranks in single.items():
                further[so_far + score] += ways * ranks
        sums = further
    return {total: Fraction(ways, codes**canaries) for total, ways in sums.items()}


@pytest.mark.parametrize(("canaries", "codes"), [(1, 2), (1, 7), (2, 10), (5, 2), (3, 33), (6, 5), (9, 3)])
def test_the_tail_is_that_of_the_law_everywhere(canaries: int, codes: int) -> None:
    exact = law(canaries, codes)
    tail = Fraction(0)
    for total in sorted(exact, reverse=True):
        tail += exact[total]
        expected = math.log(tail.numerator) - math.log(tail.denominator)
        assert log_exposure_tail(total, canaries, codes) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert log_exposure_tail(max(exact) + 1, canaries, codes) == -math.inf
    assert log_exposure_tail(0, canaries, codes) == 0.0


@given(canaries=st.integers(1, 300), codes=st.integers(2, 2000), share=st.floats(0.0, 1.0))
@settings(max_examples=60)
def test_the_tail_is_a_probability_and_at_most_the_gamma_bound(canaries: int, codes: int, share: float) -> None:
    total = int(share * canaries * scores(numpy.array([1]), codes)[0])
    found = log_exposure_tail(total, canaries, codes)
    assert found <= 0.0
    assert found <= log_gamma_tail(canaries, total / SCORES_PER_NAT) + 1e-9
    # every canary at its largest score has probability 1/M each, and no sum that can be reached has less than that
    assert found >= -canaries * math.log(codes) - 1e-9


def test_the_smallest_p_is_not_zero() -> None:
    total = int(200 * scores(numpy.array([1]), 1000)[0])
    assert log_exposure_tail(total, 200, 1000) == pytest.approx(-200 * math.log(1000), rel=1e-12)
