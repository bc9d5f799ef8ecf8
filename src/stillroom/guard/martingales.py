"""Tests by betting: one looks at any time, stops when one likes, and the error rate holds.

A bettor starts with 1 and stakes part of what it has on the next value, at odds that are fair (or worse) under the null. What it has, E, is then an
e-value whenever one stops, for its expectation is at most 1; and P(sup E >= 1/alpha) <= alpha (Ville 1939), so that exp(-`log_highest`) is a p
however often one looked (Waudby-Smith and Ramdas 2024; Shafer 2021).

The bets here are a fixed mixture: the stake is divided equally among K constant strategies, each of which keeps its own account. It is predictable,
as no strategy looks at what it bets on; it is within ln K of the best of them in hindsight; and it has nothing to be tuned.

All of it is in natural logarithms. N values, K strategies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NoReturn, TypeAlias

import numpy
from numpy.typing import ArrayLike, NDArray
from scipy import special

from stillroom.core.errors import GuardError
from stillroom.core.identities import Json

Floats: TypeAlias = NDArray[numpy.float64]

VERSION = 1
# Shares of what can be staked: for effects that show in two values, and for those that take a million.
_SHARES = numpy.array([0.9, 0.75, *(2.0**-k for k in range(1, 11))])
# How far a difference pulls, in units of the root mean square so far.
_PULLS = numpy.array([2.0**-k for k in range(-1, 11)])
# Powers of calibrators: e = power p**(power - 1).
_POWERS = numpy.array([*(2.0**-k for k in range(1, 8)), *(1.0 - 2.0**-k for k in range(2, 9))])
_AT_ONCE = 1 << 14
_LAST_DIGITS = 1e-9


@dataclass(frozen=True, slots=True)
class Bounded:
    """Values in [0, 1]. Null: given those before, the expectation of each is at most `mean`. Such are hits of canaries (mean 1/M) and green tokens.

    Strategy k multiplies by 1 + f (x - mean) / mean, for the share f of what could be staked.
    """

    mean: float

    def __post_init__(self) -> None:
        if not 0.0 < self.mean < 1.0:
            raise ValueError(f"a mean lies between 0 and 1; found {self.mean}")


@dataclass(frozen=True, slots=True)
class Signs:
    """Differences, of which only the signs count. Null: each that is not 0 is as likely to have the other sign. Such are twins.

    Strategy k multiplies by 1 + f sign.
    """


@dataclass(frozen=True, slots=True)
class Symmetric:
    """Differences whose size counts too. Null: given those before and its own size, each is as likely to have the other sign.

    Strategy k multiplies by exp(g s) / cosh(g s) with g in units of 1 / root mean square of the sizes up to and with this one: expectation 1 whatever
    the size, as the sign alone is random (after de la Peña 1999).
    """


@dataclass(frozen=True, slots=True)
class Uniform:
    """P-values. Null: given those before, P(p <= x) <= x. Such are p's of disjoint data, and 1 - u of a keyed uniform value u (Gumbel).

    Strategy k multiplies by a p**(a - 1), a in (0, 1): it falls in p and integrates to 1 (Vovk and Wang 2021).
    """


Bet: TypeAlias = Bounded | Signs | Symmetric | Uniform
_KINDS: dict[str, type[Signs] | type[Symmetric] | type[Uniform]] = {"signs": Signs, "symmetric": Symmetric, "uniform": Uniform}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wealth:
    """What a bettor has after `count` values. Begin with `Wealth.of(bet)`, and put `after(values)` in its place as values come; in which pieces they
    come makes no difference but in the last digits.

    `log_wealth_K` is what each strategy has, as if it had begun with 1; `log_highest` the most that all had together, at any value; `squares` the sum
    of squares that `Symmetric` needs.
    """

    bet: Bet
    log_wealth_K: tuple[float, ...]
    count: int = 0
    log_highest: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, bet: Bet) -> Wealth:
        """1, before anything was staked."""
        return cls(bet=bet, log_wealth_K=(0.0,) * len(_strategies(bet)))

    @property
    def log_e(self) -> float:
        """Ln of the e-value now."""
        return float(special.logsumexp(self.log_wealth_K)) - math.log(len(self.log_wealth_K))

    @property
    def log_p(self) -> float:
        """Ln of a p that holds whenever one stops: -ln of the most that the bettor ever had."""
        return min(0.0, -self.log_highest)

    def after(self, values: ArrayLike) -> Wealth:
        """What it has after more values, in their order. The order, like the bet, must not have been chosen by looking at them.

        ValueError for a value that is not finite or out of the bet's range.
        """
        values_N = _checked(self.bet, values)
        wealth = self
        for begin in range(0, len(values_N), _AT_ONCE):
            wealth = wealth._after(values_N[begin : begin + _AT_ONCE])
        return wealth

    def _after(self, values_N: Floats) -> Wealth:
        sizes_N = self.squares + numpy.cumsum(values_N**2) if isinstance(self.bet, Symmetric) else values_N
        gains_NK = _log_gains(self.bet, values_N, sizes_N, self.count)
        paths_NK = numpy.asarray(self.log_wealth_K) + numpy.cumsum(gains_NK, axis=0)
        totals_N = special.logsumexp(paths_NK, axis=1) - math.log(paths_NK.shape[1])
        return replace(
            self,
            log_wealth_K=tuple(paths_NK[-1].tolist()),
            count=self.count + len(values_N),
            log_highest=max(self.log_highest, float(totals_N.max())),
            squares=float(sizes_N[-1]) if isinstance(self.bet, Symmetric) else 0.0,
        )

    def as_json(self) -> Json:
        """All of it, so that an audit goes on where it stopped."""
        bet: Json = {"kind": "bounded", "mean": self.bet.mean} if isinstance(self.bet, Bounded) else {"kind": type(self.bet).__name__.lower()}
        return {
            "version": VERSION,
            "bet": bet,
            "log_wealth": list(self.log_wealth_K),
            "count": self.count,
            "log_highest": self.log_highest,
            "squares": self.squares,
        }

    @classmethod
    def from_json(cls, tree: object) -> Wealth:
        """What `as_json` wrote. Raises GuardError 'guard-evidence' for anything else."""
        if not isinstance(tree, dict) or tree.get("version") != VERSION:
            _not_wealth()
        try:
            bet: Bet = Bounded(tree["bet"]["mean"]) if tree["bet"]["kind"] == "bounded" else _KINDS[tree["bet"]["kind"]]()
            logs = tuple(float(log) for log in tree["log_wealth"])
            wealth = cls(bet=bet, log_wealth_K=logs, count=int(tree["count"]), log_highest=float(tree["log_highest"]), squares=float(tree["squares"]))
        except (TypeError, KeyError, ValueError):
            _not_wealth()
        numbers = (*wealth.log_wealth_K, wealth.log_highest, wealth.squares)
        whole = len(wealth.log_wealth_K) == len(_strategies(bet)) and wealth.count >= 0 and all(map(math.isfinite, numbers))
        if not whole or wealth.log_highest < max(0.0, wealth.log_e) - _LAST_DIGITS:
            _not_wealth()
        return wealth


def log_product(log_es: Iterable[float]) -> float:
    """Ln of the e-value of disjoint data together: each is an e-value whatever the others found, as where its coins or codes are its own."""
    return math.fsum(log_es)


def log_average(log_es: Iterable[float]) -> float:
    """Ln of the mean of e-values, which is one however they depend on each other: as where several tests read the same data. ValueError for none."""
    known = list(log_es)
    if not known:
        raise ValueError("there is no mean of nothing")
    return float(special.logsumexp(known)) - math.log(len(known))


def log_e_of_p(log_p: float) -> float:
    """Ln of an e-value made of one p: the mean over powers a of a p**(a - 1). ValueError where it is above 0."""
    if not log_p <= 0.0:
        raise ValueError(f"the logarithm of a p is not above 0; found {log_p}")
    return log_average(_uniform_log_gains(numpy.array([log_p]))[0])


def _strategies(bet: Bet) -> Floats:
    match bet:
        case Bounded() | Signs():
            return _SHARES
        case Symmetric():
            return _PULLS
        case Uniform():
            return _POWERS


def _checked(bet: Bet, values: ArrayLike) -> Floats:
    values_N = numpy.asarray(values, dtype=numpy.float64)
    if values_N.ndim != 1 or not numpy.isfinite(values_N).all():
        raise ValueError("values are one-dimensional and finite")
    low, high = {Bounded: (0.0, 1.0), Uniform: (math.ulp(0.0), 1.0)}.get(type(bet), (-math.inf, math.inf))
    if len(values_N) and (values_N.min() < low or values_N.max() > high):
        raise ValueError(f"values of this bet lie in [{low}, {high}]; found {values_N.min()} to {values_N.max()}")
    return values_N


def _log_gains(bet: Bet, values_N: Floats, squares_N: Floats, before: int) -> Floats:
    """Ln of what each strategy's account is multiplied by at each value; `squares_N` are the sums of squares with it, `before` counts earlier
    values.
    """
    match bet:
        case Bounded(mean=mean):
            return numpy.asarray(numpy.log1p(_SHARES * ((values_N - mean) / mean)[:, None]))
        case Signs():
            return numpy.asarray(numpy.log1p(_SHARES * numpy.sign(values_N)[:, None]))
        case Symmetric():
            counts_N = before + numpy.arange(1, len(values_N) + 1)
            scale_N = numpy.sqrt(squares_N / counts_N)
            pulled_NK = _PULLS * numpy.divide(values_N, scale_N, out=numpy.zeros_like(values_N), where=scale_N > 0.0)[:, None]
            # ln(exp(x) / cosh(x)) = ln 2 - ln(1 + exp(-2x)), without overflow
            return numpy.asarray(math.log(2.0) - numpy.logaddexp(0.0, -2.0 * pulled_NK))
        case Uniform():
            return _uniform_log_gains(numpy.log(values_N))


def _uniform_log_gains(log_ps_N: Floats) -> Floats:
    return numpy.asarray(numpy.log(_POWERS) + (_POWERS - 1.0) * log_ps_N[:, None])


def _not_wealth() -> NoReturn:
    raise GuardError(
        "guard-evidence",
        found="something that is not the state of a sequential test",
        expected=f"what an audit of version {VERSION} kept",
        why="a state that was changed makes an error rate of nothing",
        do="Begin again with the values themselves.",
    )
