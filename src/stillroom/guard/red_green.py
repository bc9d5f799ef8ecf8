"""Red/green watermark (Kirchenbauer et al. 2023, arXiv 2301.10226): after each window a keyed share of the tokens is favoured.

It moves the distribution, the more the larger `delta`, and is the easiest of the three to learn and to find. B windows, M candidates, N pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy
from numpy.typing import NDArray

from stillroom.core.identities import Json
from stillroom.guard.keys import Key
from stillroom.guard.laws import log_binomial_tail
from stillroom.guard.prf import Ids, Words, keyed, keyed_candidates

Floats = NDArray[numpy.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RedGreen:
    """`gamma`: the share of (window, token) pairs that are green. `delta`: what is added to the logit of a green token, in nats."""

    name: ClassVar[str] = "redgreen"

    window: int = 2
    gamma: float = 0.25
    delta: float = 2.0

    def __post_init__(self) -> None:
        if self.window < 1 or not 0.0 < self.gamma < 1.0 or not 0.0 < self.delta < math.inf:
            raise ValueError(f"a window has at least one token, gamma lies in (0, 1), delta is above 0 and finite; found {self}")

    def watermarked(self, key: Key, windows_BK: Ids, candidates_BM: Ids, log_probs_BM: Floats) -> Floats:
        """p(v) exp(delta green(v)), normalised over the candidates, as logarithms."""
        changed_BM = log_probs_BM + self.delta * self._green(keyed_candidates(key, self.name, windows_BK, candidates_BM))
        return numpy.asarray(changed_BM - numpy.logaddexp.reduce(changed_BM, axis=1, keepdims=True))

    def scores(self, key: Key, windows_NK: Ids, tokens_N: Ids) -> Floats:
        """1 for a green pair, else 0. Under the null, over different pairs, independent coins with probability `gamma`."""
        return self._green(keyed(key, self.name, windows_NK, tokens_N)).astype(numpy.float64)

    def log_p(self, total: float, pairs: int) -> float:
        """Ln P(Bin(pairs, gamma) >= total): exact."""
        return log_binomial_tail(pairs, self.gamma, round(total))

    @property
    def mean(self) -> float:
        """Of one score, under the null."""
        return self.gamma

    @property
    def most(self) -> float:
        """The largest score."""
        return 1.0

    def as_json(self) -> Json:
        return {"scheme": self.name, "window": self.window, "gamma": self.gamma, "delta": self.delta}

    def _green(self, words: Words) -> NDArray[numpy.bool_]:
        # A whole number of 2**-53, at most gamma: the law's p is never too small.
        return words < numpy.uint64(int(self.gamma * 2**53) << 11)
