"""The divergences once more, from their definitions: plain probabilities, Python floats, one row at a time. Slow, and nothing shared with the code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

LOG_OF_ZERO = -100.0


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    weights = [math.exp((logit - top) / temperature) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def coarsen(probabilities: Sequence[float], kept: Sequence[int]) -> list[float]:
    """The kept entries, and the sum of all the others."""
    others = [p for place, p in enumerate(probabilities) if place not in set(kept)]
    return [*(probabilities[place] for place in kept), *([math.fsum(others)] if others else [])]


def forward_kl(p: Sequence[float], q: Sequence[float]) -> float:
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def reverse_kl(p: Sequence[float], q: Sequence[float]) -> float:
    return math.fsum(b * (math.log(b) - (math.log(a) if a > 0 else LOG_OF_ZERO)) for a, b in zip(p, q, strict=True) if b > 0)


def generalized_jsd(p: Sequence[float], q: Sequence[float], weight_on_teacher: float) -> float:
    w = weight_on_teacher
    mixture = [w * a + (1 - w) * b for a, b in zip(p, q, strict=True)]
    return w * forward_kl(p, mixture) + (1 - w) * forward_kl(q, mixture)


def skew_forward_kl(p: Sequence[float], q: Sequence[float], alpha: float) -> float:
    return forward_kl(p, [alpha * a + (1 - alpha) * b for a, b in zip(p, q, strict=True)])


def skew_reverse_kl(p: Sequence[float], q: Sequence[float], alpha: float) -> float:
    return forward_kl(q, [(1 - alpha) * a + alpha * b for a, b in zip(p, q, strict=True)])


def total_variation(p: Sequence[float], q: Sequence[float]) -> float:
    return math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def alpha_beta(p: Sequence[float], q: Sequence[float], alpha: float, beta: float) -> float:
    """The four cases of Cichocki, Cruces and Amari 2011, equation 17, that the code accepts, each as it is printed there."""
    return math.fsum(_alpha_beta_share(a, b, alpha, beta) for a, b in zip(p, q, strict=True) if a > 0 or b > 0)


def _alpha_beta_share(a: float, b: float, alpha: float, beta: float) -> float:
    if beta == 0:
        powers = a**alpha * math.log(a**alpha / b**alpha) if a > 0 else 0.0
        return (powers - a**alpha + b**alpha) / alpha**2
    if alpha == 0:
        a = a if a > 0 else math.exp(LOG_OF_ZERO)
        return (b**beta * math.log(b**beta / a**beta) - b**beta + a**beta) / beta**2
    s = alpha + beta
    return -(a**alpha * b**beta - alpha / s * a**s - beta / s * b**s) / (alpha * beta)


def cross_entropy(token: int, q: Sequence[float]) -> float:
    return -math.log(q[token])


def head(states_RD: numpy.ndarray, weight_VD: numpy.ndarray, bias_V: numpy.ndarray | None, scale: float, softcap: float | None) -> list[list[float]]:
    """A teacher's logits: scale * softcap(states @ weight.T + bias), summed entry by entry."""
    rows = []
    for state in states_RD.astype(numpy.float64):
        row = []
        for v, weight in enumerate(weight_VD.astype(numpy.float64)):
            logit = math.fsum((state * weight).tolist()) + (float(bias_V[v]) if bias_V is not None else 0.0)
            logit = softcap * math.tanh(logit / softcap) if softcap is not None else logit
            row.append(scale * logit)
        rows.append(row)
    return rows
