"""Several tests at once: Holm's correction for p-values of a family that was fixed before data, and e-BH for e-values of many suspects.

A family that is chosen after looking (the best of several keys, prompts or groups) has no error rate at all. So a test that was registered stays in
its family where it could not be run: as one that found nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def holm(log_ps: Mapping[str, float | None]) -> dict[str, float]:
    """The adjusted ln p of each test of a family: rejecting those <= ln alpha errs at all with probability at most alpha, however they depend (Holm
    1979).

    None, of a test without a p, counts as p = 1. ValueError for NaN and for a p above 1.
    """
    known = {name: 0.0 if log_p is None else log_p for name, log_p in log_ps.items()}
    if wrong := [name for name, log_p in known.items() if not log_p <= 0.0]:
        raise ValueError(f"the logarithm of a p is not above 0; look at {wrong}")
    adjusted: dict[str, float] = {}
    highest = -math.inf
    for place, name in enumerate(sorted(known, key=known.__getitem__)):
        highest = max(highest, min(0.0, known[name] + math.log(len(known) - place)))
        adjusted[name] = highest
    return adjusted


def e_bh(log_es: Mapping[str, float | None], *, false_discovery_rate: float) -> frozenset[str]:
    """Of many suspects, those to be named: the expected share of innocents among them is at most the rate, however the e-values depend.

    The k with the largest e-values, for the largest k whose k-th is at least m / (k rate) of m (Wang and Ramdas 2022, e-BH). None counts as an
    e-value of 1. ValueError for NaN.
    """
    if not 0.0 < false_discovery_rate < 1.0:
        raise ValueError(f"a rate lies between 0 and 1; found {false_discovery_rate}")
    known = {name: 0.0 if log_e is None else log_e for name, log_e in log_es.items()}
    if wrong := [name for name, log_e in known.items() if math.isnan(log_e)]:
        raise ValueError(f"an e-value is a number; look at {wrong}")
    ordered = sorted(known, key=known.__getitem__, reverse=True)
    enough = [k for k, name in enumerate(ordered, start=1) if known[name] >= math.log(len(known) / (k * false_discovery_rate))]
    return frozenset(ordered[: max(enough, default=0)])
