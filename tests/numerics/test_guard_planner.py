"""The planner's power is that of simulated audits, and its three questions have one answer."""

from __future__ import annotations

import math

import numpy
import pytest

from stillroom.guard.laws import log_binomial_tail
from stillroom.guard.planner import detectable_share, pairs_needed, power
from stillroom.guard.twins import SignLaw, rank_levels

AUDITS = 1000


@pytest.mark.parametrize(
    ("pairs", "share", "effect", "alpha"),
    [(60, 1.0, 0.4, 0.05), (400, 0.5, 0.3, 0.01), (400, 0.15, 1.5, 1e-4), (1500, 0.25, 0.5, 1e-4), (300, 0.0, 1.0, 0.05)],
)
def test_the_power_is_that_of_simulated_audits(pairs: int, share: float, effect: float, alpha: float) -> None:
    """Within three points, and the exact region of 1,000 audits at one in a million."""
    draws = numpy.random.Generator(numpy.random.Philox(pairs))
    differences = draws.standard_normal((AUDITS, pairs)) + effect * (draws.random((AUDITS, pairs)) < share)
    ranks = numpy.argsort(numpy.argsort(numpy.abs(differences), axis=1), axis=1)
    levels = rank_levels(numpy.arange(1.0, pairs + 1), 64)
    totals = (levels[ranks] * numpy.sign(differences).astype(numpy.int64)).sum(axis=1)
    law = SignLaw(levels)
    low, high = 0, int(levels.sum()) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if law.log_tail(middle) <= math.log(alpha) else (middle, high)
    rejected = int((totals >= high).sum())
    planned = power(pairs=pairs, share=share, effect=effect, alpha=alpha)
    assert log_binomial_tail(AUDITS, min(1 - 1e-9, planned + 0.03), rejected) > math.log(1e-6)
    assert log_binomial_tail(AUDITS, min(1 - 1e-9, 1.03 - planned), AUDITS - rejected) > math.log(1e-6)


def test_pairs_share_and_power_belong_together() -> None:
    planned = pairs_needed(share=0.25, effect=0.5, alpha=1e-6, power_wanted=0.9)
    assert planned.power >= 0.9 > power(pairs=planned.pairs - 1, share=0.25, effect=0.5, alpha=1e-6)
    back = detectable_share(pairs=planned.pairs, effect=0.5, alpha=1e-6, power_wanted=0.9)
    assert back is not None
    assert back.share == pytest.approx(0.25, abs=1e-3)
    # n goes with 1/share**2.
    assert pairs_needed(share=0.025, effect=0.5, alpha=1e-6, power_wanted=0.9).pairs / planned.pairs == pytest.approx(100, rel=0.1)


def test_what_no_number_of_pairs_shows_is_said() -> None:
    assert power(pairs=19, share=1.0, effect=100.0, alpha=1e-6) == 0.0  # 2**-19 is more than that
    assert power(pairs=20, share=1.0, effect=100.0, alpha=1e-6) == pytest.approx(1.0)
    assert power(pairs=10_000, share=0.0, effect=1.0, alpha=0.01) == pytest.approx(0.01, rel=1e-6)
    assert detectable_share(pairs=19, effect=100.0, alpha=1e-6, power_wanted=0.9) is None
    assert detectable_share(pairs=100, effect=1.0, alpha=0.95, power_wanted=0.9) is not None
    with pytest.raises(ValueError, match="more than 1,000,000,000"):
        pairs_needed(share=0.0, effect=1.0, alpha=0.01, power_wanted=0.9)
    for wrong in ({"pairs": 0}, {"share": 1.1}, {"effect": -1.0}, {"alpha": 0.0}):
        with pytest.raises(ValueError, match="a plan has"):
            power(**({"pairs": 10, "share": 0.5, "effect": 1.0, "alpha": 0.01} | wrong))  # type: ignore[arg-type]
