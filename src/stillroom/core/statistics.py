"""Bootstrap intervals. What cannot be computed is None, never 0 and never NaN.

The percentile bootstrap of Efron (1979), at 95 %: items are drawn with replacement, the statistic is taken of each draw, and the interval runs
from the 2.5th to the 97.5th percentile. Two calls with the same number of items, `resamples` and `seed` use the same draws, so that their
intervals are paired.

N items, R resamples, K columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
Means: TypeAlias = dict[str, float]

# What a 95 % interval leaves out at each end; in thousandths, for in binary 0.025 is a little more than that.
_TAIL_PER_MILLE = 25
# Draws that are in memory at once, of 8 bytes each, a few times over.
_DRAWS_AT_ONCE = 1 << 21


@dataclass(frozen=True, slots=True)
class Interval:
    """A number computed from `n` items, and its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def mean_interval(values: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Interval | None:
    """The mean of `values` (N) with its interval; None where there are no values. ValueError where one is not finite.

    Where all values are equal so are all draws, and the interval has no width: it then says nothing about how sure one can be.
    """
    return paired_statistic_interval({"values": values}, lambda means: means["values"], resamples=resamples, seed=seed)


def predicted_total(
    values: ArrayLike, more: int, *, least: float = 0.0, most: float = math.inf, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """What `values` (N, drawn at random from all) and `more` items like them come to in all, with the 95 % interval of that total.

    The N are known; the others are predicted by their mean. Their error has two parts, that of the mean and what the others themselves scatter, so that
    the standard error is more * s * sqrt(1/N + 1/more): for a sample without replacement from a finite population the usual one, with its correction,
    and 0 where nothing is left. The quantiles are those of the studentised bootstrap (Efron 1982; Hall 1988), which unlike Student's t follow the
    skew that costs have. `least` and `most` bound the mean of the others (nothing is cheaper than free, or dearer than its worst case): with one or two
    values that is all that is known. Where all values are equal the interval has no width, and says nothing about how sure one can be.

    None where there are no values, or where the upper end has no bound. ValueError where a value is not finite.
    """
    values_N = _as_columns({"values": values})[:, 0]
    n = len(values_N)
    if n == 0:
        return None
    mean, total = float(values_N.mean()), float(values_N.sum())
    if more == 0:
        return Interval(value=total, low=total, high=total, n=n)
    low, high = _studentised_quantiles(values_N - mean, resamples, seed) if n > 1 else (-math.inf, math.inf)
    scatter = float(values_N.std(ddof=1)) * math.sqrt(1 / n + 1 / more) if n > 1 else 1.0
    ends = (mean, mean) if scatter == 0 else (max(least, mean - high * scatter), min(most, mean - low * scatter))
    # An item may have cost more than the worst case of one attempt: then the mean is its own bound.
    ends = (min(ends[0], mean), max(ends[1], mean))
    if not math.isfinite(ends[1]):
        return None
    return Interval(value=total + more * mean, low=total + more * ends[0], high=total + more * ends[1], n=n)


def _studentised_quantiles(centred_N: Floats, resamples: int, seed: int) -> tuple[float, float]:
    """Of the mean of a draw over its own standard error; infinite where a draw has no scatter."""
    n = len(centred_N)
    moments_R2 = np.concatenate(list(_drawn_means(np.stack([centred_N, centred_N**2], axis=1), resamples, seed)))
    means_R = moments_R2[:, 0]
    variances_R = np.maximum(moments_R2[:, 1] - means_R**2, 0.0) * n / (n - 1)
    flat_R = variances_R <= 1e-12 * float((centred_N**2).mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        studentised_R = np.sort(
            np.where(flat_R, np.where(means_R == 0, 0.0, np.copysign(np.inf, means_R)), math.sqrt(n) * means_R / np.sqrt(variances_R))
        )
    beyond = (resamples * _TAIL_PER_MILLE + 999) // 1000 - 1
    return float(studentised_R[beyond]), float(studentised_R[resamples - 1 - beyond])


def paired_statistic_interval(
    columns: Mapping[str, ArrayLike], statistic: Callable[[Means], float | None], *, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """A statistic of the means of several columns (each N) that were measured on the same items, with its interval.

    Whole items are drawn, so what the columns share cancels. A ratio of sums is a ratio of means: to resample prompts of unequal length, give their
    sums and their lengths as two columns. `statistic` gets {column: mean}; where it is undefined it returns None or a number that is not finite, or
    divides by zero. Undefined for the items themselves, or for so many draws that an end of the interval is, the result is None: an undefined
    draw counts as beyond both ends. None too where N = 0. ValueError for columns of unequal length or a value that is not finite.
    """
    columns_NK = _as_columns(columns)
    if len(columns_NK) == 0:
        return None
    names = list(columns)

    def taken(means_K: Floats) -> float:
        try:
            value = statistic(dict(zip(names, means_K.tolist(), strict=True)))
        except ZeroDivisionError:
            return math.nan
        return math.nan if value is None or not math.isfinite(value) else float(value)

    value = taken(columns_NK.mean(axis=0))
    drawn_R = np.array([taken(means_K) for means_RK in _drawn_means(columns_NK, resamples, seed) for means_K in means_RK])
    beyond = (resamples * _TAIL_PER_MILLE + 999) // 1000 - 1
    low = float(np.sort(np.where(np.isnan(drawn_R), -np.inf, drawn_R))[beyond])
    high = float(np.sort(np.where(np.isnan(drawn_R), np.inf, drawn_R))[resamples - 1 - beyond])
    if not all(math.isfinite(number) for number in (value, low, high)):
        return None
    return Interval(value=value, low=low, high=high, n=len(columns_NK))


def _as_columns(columns: Mapping[str, ArrayLike]) -> Floats:
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    lengths = {name: array.shape for name, array in arrays.items()}
    if not arrays or any(len(shape) != 1 for shape in lengths.values()) or len(set(lengths.values())) != 1:
        raise ValueError(f"columns must be one-dimensional and of one length; found {lengths}")
    columns_NK = np.stack(list(arrays.values()), axis=1)
    if not np.isfinite(columns_NK).all():
        raise ValueError(f"columns must be finite; look at {[name for name, array in arrays.items() if not np.isfinite(array).all()]}")
    return columns_NK


def _drawn_means(columns_NK: Floats, resamples: int, seed: int) -> Iterator[Floats]:
    """The means (R, K) of `resamples` draws of N items, some draws at a time: the draws do not depend on how many go together."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1; found {resamples}")
    generator = np.random.Generator(np.random.Philox(seed))
    n = len(columns_NK)
    columns_KN = np.ascontiguousarray(columns_NK.T)
    at_once = max(1, _DRAWS_AT_ONCE // n)
    for begin in range(0, resamples, at_once):
        drawn_RN: NDArray[Any] = generator.integers(n, size=(min(at_once, resamples - begin), n), dtype=np.int64)
        yield np.stack([column_N[drawn_RN].mean(axis=1) for column_N in columns_KN], axis=1)
