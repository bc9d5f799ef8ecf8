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
