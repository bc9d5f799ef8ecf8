"""Before a twin test: how many pairs it needs, and how small a use of them it can find.

The model is that a share of the audited pairs was used, and that each used pair moves the suspect's difference by `effect` standard deviations of what
differences are by themselves, which are normal: a difference is N(effect, 1) with chance `share`, else N(0, 1). The statistic is the signed rank sum
of `twins`, whose mean and variance under this model are exact functions of three probabilities (Lehmann 1975, section 4.2; Noether 1987), and whose
law is taken to be normal (of up to 64 pairs the critical value is exact); a test compares with simulated audits. Dependence between used pairs costs more
than the model says.

What a suspect's effect is, is not known before: plan for several.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy
from scipy import integrate, optimize, special

from stillroom.guard.twins import SignLaw

_MOST_PAIRS = 10**9
_EXACT_PAIRS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What was asked and found: with `pairs` audited pairs of which `share` were used, a test at `alpha` rejects with chance `power`."""

    pairs: int
    share: float
    effect: float
    alpha: float
    power: float


def power(*, pairs: int, share: float, effect: float, alpha: float) -> float:
    """The chance that the test rejects. 0 where so few pairs can give no p as small as alpha."""
    if pairs < 1 or not 0.0 <= share <= 1.0 or effect < 0.0 or not 0.0 < alpha < 1.0:
        raise ValueError(f"a plan has pairs >= 1, share in [0, 1], effect >= 0, alpha in (0, 1); found {pairs}, {share}, {effect}, {alpha}")
    if -pairs * math.log(2.0) > math.log(alpha):
        return 0.0
    mean, variance = _moments(pairs, share, effect)
    critical = _critical(pairs, alpha)
    return float(special.ndtr((mean - critical) / math.sqrt(variance))) if variance > 0 else float(mean >= critical)


def pairs_needed(*, share: float, effect: float, alpha: float, power_wanted: float) -> Planned:
    """The fewest audited pairs with which the power is at least that. ValueError where a billion are not enough."""
    low, high = 0, 1
    while power(pairs=high, share=share, effect=effect, alpha=alpha) < power_wanted:
        low, high = high, high * 2
        if high > _MOST_PAIRS:
            raise ValueError(f"more than {_MOST_PAIRS:,} pairs for a share of {share} and an effect of {effect}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power(pairs=middle, share=share, effect=effect, alpha=alpha) < power_wanted else (low, middle)
    return Planned(pairs=high, share=share, effect=effect, alpha=alpha, power=power(pairs=high, share=share, effect=effect, alpha=alpha))


def detectable_share(*, pairs: int, effect: float, alpha: float, power_wanted: float) -> Planned | None:
    """The smallest share of use that so many pairs find with that power; None where they do not find use of all."""

    def lacking(share: float) -> float:
        return power(pairs=pairs, share=share, effect=effect, alpha=alpha) - power_wanted

    if lacking(1.0) < 0.0:
        return None
    share = 0.0 if lacking(0.0) >= 0.0 else float(optimize.brentq(lacking, 0.0, 1.0, xtol=1e-6))
    return Planned(pairs=pairs, share=share, effect=effect, alpha=alpha, power=power(pairs=pairs, share=share, effect=effect, alpha=alpha))


@lru_cache(maxsize=256)
def _critical(pairs: int, alpha: float) -> float:
    """What the sum of the ranks of positive differences has to reach."""
    if pairs > _EXACT_PAIRS:
        mean, variance = pairs * (pairs + 1) / 4.0, pairs * (pairs + 1) * (2 * pairs + 1) / 24.0
        return mean - float(special.ndtri(alpha)) * math.sqrt(variance)
    law = SignLaw(numpy.arange(1, pairs + 1))
    low, high = -1, pairs * (pairs + 1) // 2
    while high - low > 1:
        middle = (low + high) // 2
        rejects = law.log_tail(2 * middle - pairs * (pairs + 1) // 2) <= math.log(alpha)
        low, high = (low, middle) if rejects else (middle, high)
    return high - 0.5  # the sum is a whole number


def _moments(pairs: int, share: float, effect: float) -> tuple[float, float]:
    """Mean and variance of the sum of the ranks of positive differences."""

    def over_share(chance: Callable[[float], float]) -> float:
        return (1.0 - share) * chance(0.0) + share * chance(effect)

    def above(threshold: float) -> float:
        """P(difference > threshold)."""
        return over_share(lambda mean: float(special.ndtr(mean - threshold)))

    def density(x: float) -> float:
        return over_share(lambda mean: math.exp(-((x - mean) ** 2) / 2.0) / math.sqrt(2.0 * math.pi))

    limit = 10.0 + effect
    positive = above(0.0)
    # Of two: their sum is positive. Of three: the first's sums with both others are.
    pair = over_share(lambda one: over_share(lambda other: float(special.ndtr((one + other) / math.sqrt(2.0)))))
    triple = float(integrate.quad(lambda x: above(-x) ** 2 * density(x), -limit, limit, limit=200)[0])
    # The first is positive and so is its sum with another.
    both = float(integrate.quad(lambda x: above(-x) * density(x), 0.0, limit, limit=200)[0])
    n = float(pairs)
    mean = n * positive + n * (n - 1) / 2.0 * pair
    variance = (
        n * positive * (1.0 - positive)
        + n * (n - 1) / 2.0 * pair * (1.0 - pair)
        + 2.0 * n * (n - 1) * (both - positive * pair)
        + n * (n - 1) * (n - 2) * (triple - pair * pair)
    )
    return mean, variance
