"""Gumbel-max watermark (Aaronson 2022): a keyed draw in place of a random one.

The token is argmax over v of u(window, v) ** (1 / p(v)). Over keys it is distributed as p exactly, so no answer is worse; under one key the same window
and the same p always give the same token, which is what the sampler's rule of repeated windows is for. B windows, M candidates, N pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy
from numpy.typing import NDArray

from stillroom.core.identities import Json
from stillroom.guard.keys import Key
from stillroom.guard.laws import log_gamma_tail
from stillroom.guard.prf import Ids, keyed, keyed_candidates, uniform

Floats = NDArray[numpy.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class GumbelMax:
    """Without settings but the window's length."""

    name: ClassVar[str] = "gumbel"

    window: int = 3

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"a window has at least one token; found {self.window}")

    def watermarked(self, key: Key, windows_BK: Ids, candidates_BM: Ids, log_probs_BM: Floats) -> Floats:
        """All probability on the one token that the key chooses, as logarithms: 0 for it and -inf for the others."""
        uniforms_BM = uniform(keyed_candidates(key, self.name, windows_BK, candidates_BM))
        with numpy.errstate(divide="ignore"):  # a uniform of 0, once in 2**53, cannot win
            chosen_B = numpy.argmax(log_probs_BM - numpy.log(-numpy.log(uniforms_BM)), axis=1)
        changed_BM = numpy.full_like(log_probs_BM, -numpy.inf)
        changed_BM[numpy.arange(len(chosen_B)), chosen_B] = 0.0
        return changed_BM

    def scores(self, key: Key, windows_NK: Ids, tokens_N: Ids) -> Floats:
        """-ln(1 - u): under the null, over different pairs, independent standard exponentials (rounded down to what 53 bits give)."""
        return -numpy.log1p(-uniform(keyed(key, self.name, windows_NK, tokens_N)))

    def log_p(self, total: float, pairs: int) -> float:
        """Ln P(Gamma(pairs, 1) >= total): exact."""
        return log_gamma_tail(pairs, total)

    @property
    def mean(self) -> float:
        """Of one score, under the null."""
        return 1.0

    @property
    def most(self) -> float:
        """The largest score."""
        return -math.log(2.0**-53)

    def as_json(self) -> Json:
        return {"scheme": self.name, "window": self.window}
