"""Tournament watermark (Dathathri et al., Nature 634, 2024), the form with two candidates a layer, which does not distort.

Each layer i has a keyed coin g for each (window, token) and makes p <- p (1 + g - <p, g>): the distribution of the better of two tokens drawn from p,
better by their coins. Over keys it is p exactly. Every layer takes some of what was left to choose, so that later coins are favoured less.

All layers are scored, with one weight, for which the law is exactly binomial. A layer that is not scored would add no evidence and take variety from the
answers; a layer too many would dilute the score. What n pairs give is 2 sqrt(n) sum(uplift of layer i) / sqrt(layers) standard deviations, where the uplift
is how far above 1/2 the coin of a written token lies on average, which follows from the distribution alone. 20 layers give at least 0.85 of what the best
number would give for each of a range of distributions from 0.5 to 6 bits, and 0.9 from 1 to 4 bits (tests/numerics/test_guard_schemes.py holds this).
B windows, M candidates, N pairs, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy
from numpy.typing import NDArray

from stillroom.core.identities import Json
from stillroom.guard.keys import Key
from stillroom.guard.laws import log_binomial_tail
from stillroom.guard.prf import Ids, bits, keyed, keyed_candidates

Floats = NDArray[numpy.float64]
MOST_LAYERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Tournament:
    """`layers`: how many coins a pair has, at most 64, the bits of one keyed value."""

    name: ClassVar[str] = "tourney"

    window: int = 3
    layers: int = 20

    def __post_init__(self) -> None:
        if self.window < 1 or not 1 <= self.layers <= MOST_LAYERS:
            raise ValueError(f"a window has at least one token, a tournament 1 to {MOST_LAYERS} layers; found {self}")

    def watermarked(self, key: Key, windows_BK: Ids, candidates_BM: Ids, log_probs_BM: Floats) -> Floats:
        """The distribution of the winner, as logarithms."""
        words_BM = keyed_candidates(key, self.name, windows_BK, candidates_BM)
        coins_BML = bits(words_BM.reshape(-1), self.layers).reshape(*words_BM.shape, self.layers)
        with numpy.errstate(divide="ignore"):
            return numpy.asarray(numpy.log(winners(numpy.exp(log_probs_BM), coins_BML)))

    def scores(self, key: Key, windows_NK: Ids, tokens_N: Ids) -> Floats:
        """How many of a pair's coins are 1. Under the null, over different pairs, independent and Bin(layers, 1/2)."""
        mask = numpy.uint64((1 << self.layers) - 1)
        return numpy.asarray(numpy.bitwise_count(keyed(key, self.name, windows_NK, tokens_N) & mask), numpy.float64)

    def log_p(self, total: float, pairs: int) -> float:
        """Ln P(Bin(pairs layers, 1/2) >= total): exact."""
        return log_binomial_tail(pairs * self.layers, 0.5, round(total))

    @property
    def mean(self) -> float:
        """Of one score, under the null."""
        return self.layers / 2.0

    @property
    def most(self) -> float:
        """The largest score."""
        return float(self.layers)

    def as_json(self) -> Json:
        return {"scheme": self.name, "window": self.window, "layers": self.layers}


def winners(probabilities_BM: Floats, coins_BML: NDArray[numpy.uint8]) -> Floats:
    """The distribution of a tournament's winner, given all coins."""
    won_BM = probabilities_BM
    for layer in range(coins_BML.shape[2]):
        coin_BM = coins_BML[:, :, layer].astype(numpy.float64)
        # 1 + g - <p, g>, with 1 - <p, g> summed over what loses: a difference of sums could come out below 0.
        won_BM = numpy.asarray(won_BM * (coin_BM + (won_BM * (1.0 - coin_BM)).sum(axis=1, keepdims=True)))
    return numpy.asarray(won_BM / won_BM.sum(axis=1, keepdims=True))
