"""Bootstrap intervals against theory, simulation and a loop that does it the slow way."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from stillroom.core import statistics
from stillroom.core.statistics import Interval, Means, mean_interval, paired_statistic_interval


def gap_recovered(means: Means) -> float | None:
    gap = means["teacher"] - means["label_only"]
    return (means["student"] - means["label_only"]) / gap if gap > 0 else None


def test_no_values_give_no_interval() -> None:
    assert mean_interval([]) is None
    assert paired_statistic_interval({"a": [], "b": []}, lambda means: means["a"]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, bad])


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        paired_statistic_interval({"a": [1.0, 2.0], "b": [1.0]}, lambda means: means["a"])
    with pytest.raises(ValueError, match="one-dimensional"):
        mean_interval([[1.0, 2.0]])


def test_the_value_is_the_mean_and_n_the_number_of_items() -> None:
    values = np.array([True, False, True, True])
    found = mean_interval(values)
    assert found is not None
    assert (found.value, found.n) == (0.75, 4)
    assert found.low <= found.value <= found.high
    assert mean_interval([3.5]) == Interval(3.5, 3.5, 3.5, 1)


def test_the_same_seed_gives_the_same_interval_and_0_is_a_seed() -> None:
    values = np.random.default_rng(1).normal(size=50)
    assert mean_interval(values, seed=0) == mean_interval(values, seed=0)
    assert mean_interval(values, seed=0) != mean_interval(values, seed=1)


def test_how_many_draws_are_in_memory_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=37)
    whole = mean_interval(values, resamples=500, seed=3)
    for at_once in (1, 37, 100, 37 * 7):
        monkeypatch.setattr(statistics, "_DRAWS_AT_ONCE", at_once)
        assert mean_interval(values, resamples=500, seed=3) == whole


def test_it_agrees_with_a_loop_over_resamples() -> None:
    """The plain definition: draw items, take the statistic, sort, leave out 2.5 % on each side."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(2.0, 1.0, size=40), rng.normal(5.0, 1.0, size=40)
    generator = np.random.Generator(np.random.Philox(9))
    ratios = []
    for _ in range(1000):
        drawn = generator.integers(40, size=40)
        ratios.append(x[drawn].mean() / y[drawn].mean())
    ratios.sort()
    found = paired_statistic_interval({"x": x, "y": y}, lambda means: means["x"] / means["y"], resamples=1000, seed=9)
    assert found is not None
    assert found.value == pytest.approx(x.mean() / y.mean(), rel=1e-12)
    assert [found.low, found.high] == pytest.approx([ratios[24], ratios[975]], rel=1e-12)


def test_the_width_is_that_of_the_normal_interval() -> None:
    values = np.random.default_rng(5).normal(0.0, 3.0, size=1000)
    found = mean_interval(values, resamples=4000)
    assert found is not None
    half = 1.959964 * values.std() / math.sqrt(1000)
    assert found.low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.08 * half)


@pytest.mark.parametrize("draw", ["bernoulli", "exponential"])
def test_a_mean_is_covered_as_often_as_stated(draw: str) -> None:
    """600 experiments of 100 items: 95 % of the intervals hold the true mean, within four standard errors and the known small-sample loss."""
    rng = np.random.default_rng(6)
    covered = 0
    for experiment in range(600):
        values, true = (rng.random(100) < 0.7, 0.7) if draw == "bernoulli" else (rng.exponential(1.0, 100), 1.0)
        found = mean_interval(values, resamples=400, seed=experiment)
        assert found is not None
        covered += found.low <= true <= found.high
    assert 0.905 <= covered / 600 <= 0.98


def test_a_gap_recovered_is_covered_as_often_as_stated_and_pairing_narrows_it() -> None:
    """Items of varying difficulty answered by three models: the true share of the gap is 0.8."""
    rng = np.random.default_rng(7)
    covered, paired_width, unpaired_width = 0, 0.0, 0.0
    for experiment in range(400):
        difficulty = rng.random(300)
        columns = {name: (difficulty < share).astype(float) for name, share in (("teacher", 0.95), ("student", 0.85), ("label_only", 0.45))}
        found = paired_statistic_interval(columns, gap_recovered, resamples=400, seed=experiment)
        assert found is not None
        covered += found.low <= 0.8 <= found.high
        paired_width += found.high - found.low
        shuffled = {name: rng.permutation(values) for name, values in columns.items()}
        apart = paired_statistic_interval(shuffled, gap_recovered, resamples=400, seed=experiment)
        assert apart is not None
        unpaired_width += apart.high - apart.low
    assert 0.90 <= covered / 400 <= 0.985
    assert paired_width < 0.9 * unpaired_width


def test_what_two_columns_share_cancels() -> None:
    noise = np.random.default_rng(8).normal(0.0, 100.0, size=200)
    found = paired_statistic_interval({"a": noise + 1.0, "b": noise}, lambda means: means["a"] - means["b"])
    assert found is not None
    assert found.low == pytest.approx(1.0, abs=1e-9)
    assert found.high == pytest.approx(1.0, abs=1e-9)


def test_a_share_of_no_gap_is_absent() -> None:
    right = (np.arange(100) % 2).astype(float)
    assert paired_statistic_interval({"teacher": right, "label_only": right, "student": 1 - right}, gap_recovered) is None
    assert paired_statistic_interval({"a": right, "b": 0 * right}, lambda means: means["a"] / means["b"]) is None  # divides by zero
    assert paired_statistic_interval({"a": right}, lambda means: math.inf) is None
    assert paired_statistic_interval({"a": right}, lambda means: math.nan) is None


def test_a_gap_that_vanishes_in_many_draws_is_absent() -> None:
    rng = np.random.default_rng(9)
    teacher, student = (rng.random(60) < 0.52).astype(float), (rng.random(60) < 0.52).astype(float)
    label_only = np.roll(teacher, 1)
    label_only[np.flatnonzero(label_only)[0]] = 0.0  # one item worse: about a third of the draws have no gap
    assert paired_statistic_interval({"teacher": teacher, "student": student, "label_only": label_only}, gap_recovered) is None


def test_undefined_draws_count_as_beyond_both_ends() -> None:
    values = np.random.default_rng(10).normal(size=60)
    whole = mean_interval(values, resamples=1000, seed=1)
    calls = iter(range(10_000))
    holed = paired_statistic_interval({"a": values}, lambda means: None if next(calls) % 100 == 5 else means["a"], resamples=1000, seed=1)
    assert whole is not None
    assert holed is not None
    assert holed.low < whole.low
    assert holed.high > whole.high


def test_two_thousand_resamples_of_two_thousand_items_are_quick() -> None:
    rng = np.random.default_rng(11)
    columns = {name: (rng.random(2000) < share).astype(float) for name, share in (("teacher", 0.95), ("student", 0.9), ("label_only", 0.5))}
    began = time.process_time()
    found = paired_statistic_interval(columns, gap_recovered, resamples=2000)
    assert found is not None
    assert found.low > 0.8
    assert time.process_time() - began < 2.0  # 0.2 s on an idle core
