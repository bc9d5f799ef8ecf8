"""Exact tails of the laws that the tests use, in natural logarithms, so that a small p is not zero; and Clopper-Pearson intervals.

A p here is P(statistic >= what was seen) under the null, computed from the law itself, never from a normal approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
from scipy import special

# Terms of a tail that are summed at once.
_TERMS = 1 << 16
# A term so much below the largest changes no digit of a sum in float64.
_NEGLIGIBLE_NATS = 45.0


def log_binomial_tail(n: int, p: float, successes: int) -> float:
    """Ln P(Bin(n, p) >= successes): 0 where successes <= 0, -inf where successes > n."""
    if not 0.0 < p < 1.0 or n < 0:
        raise ValueError(f"a binomial law has n >= 0 and p in (0, 1); found n = {n}, p = {p}")
    if successes <= 0:
        return 0.0
    if successes > n:
        return -math.inf
    direct = float(special.betainc(successes, n - successes + 1, p))
    return math.log(direct) if direct > 1e-200 else _summed(lambda k: _binomial_term(n, p, k), successes, n)


def log_gamma_tail(n: int, total: float) -> float:
    """Ln P(Gamma(n, 1) >= total), of the sum of n independent standard exponentials; 0 where total <= 0."""
    if n < 1:
        raise ValueError(f"a sum has at least one term; found {n}")
    if total <= 0.0:
        return 0.0
    direct = float(special.gammaincc(n, total))
    # P(Gamma(n, 1) >= t) = P(Poisson(t) <= n - 1), whose terms fall from k = n - 1 down where t is far above n.
    return math.log(direct) if direct > 1e-200 else _summed(lambda k: _poisson_term(total, n - 1 - k), 0, n - 1)


def log10(natural: float) -> float:
    """The decimal logarithm of what `natural` is the natural one of."""
    return natural / math.log(10.0)


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share (Clopper and Pearson 1934). ValueError without trials."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"a share is of at least one trial; found {successes} of {trials}")
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, trials - successes + 1, tail))
    high = 1.0 if successes == trials else float(special.betaincinv(successes + 1, trials - successes, 1.0 - tail))
    return low, high


def _binomial_term(n: int, p: float, k: numpy.ndarray) -> numpy.ndarray:
    chosen = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return numpy.asarray(chosen + k * math.log(p) + (n - k) * math.log1p(-p))


def _poisson_term(mean: float, k: numpy.ndarray) -> numpy.ndarray:
    return numpy.asarray(k * math.log(mean) - mean - special.gammaln(k + 1))


def _summed(term: Callable[[numpy.ndarray], numpy.ndarray], first: int, last: int) -> float:
    """Ln of the sum of exp(term(k)), k from `first` to `last`, whose terms fall."""
    total, begin = -math.inf, first
    while begin <= last:
        some = term(numpy.arange(begin, min(last, begin + _TERMS - 1) + 1, dtype=numpy.float64))
        part = float(special.logsumexp(some))
        total = float(numpy.logaddexp(total, part))
        if float(some[-1]) < total - _NEGLIGIBLE_NATS:
            break
        begin += _TERMS
    return total
