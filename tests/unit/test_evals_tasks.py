"""Exact match, its intervals, and the share of the gap that a student recovered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.core.errors import RunError
from stillroom.core.statistics import Interval
from stillroom.evals.measured import Absence
from stillroom.evals.tasks import Item, ItemScores, accuracy, accuracy_by_family, exact_match, gap_recovered, score_items

RESAMPLES = 500


def items_of(count: int, families: tuple[str | None, ...] = (None,)) -> list[Item]:
    return [Item(prompt=f"question {index}", answer=f"answer {index}", family=families[index % len(families)]) for index in range(count)]


def scores_of(right: np.ndarray, model: str = "model", families: tuple[str | None, ...] = (None,)) -> ItemScores:
    items = items_of(len(right), families)
    return score_items(model, [item.answer if ok else "wrong" for item, ok in zip(items, right, strict=True)], items)


def drawn(shares: tuple[float, float, float], count: int, seed: int) -> tuple[ItemScores, ItemScores, ItemScores]:
    """Student, label-only and teacher that share one difficulty for each item, as real models do."""
    difficulty = np.random.default_rng(seed).random(count)
    student, label_only, teacher = (
        scores_of(difficulty < share, name) for share, name in zip(shares, ("student", "label_only", "teacher"), strict=True)
    )
    return student, label_only, teacher


def test_only_whitespace_around_is_forgiven() -> None:
    answers = ["P1D", " P1D\n", "p1d", "P1D.", "P 1D", ""]
    assert exact_match(answers, [Item("one day", "P1D")] * 6).tolist() == [1, 1, 0, 0, 0, 0]


def test_each_item_needs_one_answer() -> None:
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a"], items_of(2))


@given(st.lists(st.tuples(st.text(), st.text(), st.none() | st.text(), st.booleans()), max_size=8))
def test_scores_survive_json(rows: list[tuple[str, str, str | None, bool]]) -> None:
    items = [Item(prompt, answer, family) for prompt, answer, family, _ in rows]
    scores = score_items("m", [item.answer if ok else item.answer + "!" for item, (*_, ok) in zip(items, rows, strict=True)], items)
    assert ItemScores.model_validate_json(scores.model_dump_json()) == scores
    assert scores.right_N.tolist() == [float(ok) for *_, ok in rows]


def test_an_item_is_named_by_its_content() -> None:
    ids = {Item("a", "b", "c").id, Item("a", "b").id, Item("ab", "", "c").id, Item("a", "bc").id}
    assert len(ids) == 4
    assert Item("a", "b", "c").id == Item("a", "b", "c").id


def test_accuracy_is_the_share_of_right_answers() -> None:
    interval = accuracy(scores_of(np.arange(200) % 4 == 0), resamples=RESAMPLES, seed=1)
    assert isinstance(interval, Interval)
    assert (interval.value, interval.n) == (0.25, 200)
    # sqrt(0.25 * 0.75 / 200) = 0.0306: the normal interval is 0.25 +- 0.060
    assert interval.low == pytest.approx(0.19, abs=0.012)
    assert interval.high == pytest.approx(0.31, abs=0.012)


@pytest.mark.parametrize("right", [True, False])
def test_all_items_alike_do_not_claim_certainty(right: bool) -> None:
    interval = accuracy(scores_of(np.full(50, right)), resamples=RESAMPLES, seed=0)
    assert isinstance(interval, Interval)
    nearest = interval.low if right else 1.0 - interval.high
    # At this true share, 50 items alike happen with probability 2.5 %.
    assert nearest**50 == pytest.approx(0.025)
    assert interval.value == float(right)


def test_no_items_is_absent_and_not_zero() -> None:
    nothing = scores_of(np.array([], dtype=bool))
    assert isinstance(accuracy(nothing, resamples=RESAMPLES, seed=0), Absence)
    assert isinstance(gap_recovered(nothing, nothing, nothing, resamples=RESAMPLES, seed=0), Absence)
    assert accuracy_by_family(nothing, resamples=RESAMPLES, seed=0) == {}


def test_families_are_scored_apart() -> None:
    families = ("date", "cron", None)
    right = np.array([index % 3 == 0 or index % 6 == 1 for index in range(60)])
    by_family = accuracy_by_family(scores_of(right, families=families), resamples=RESAMPLES, seed=0)
    assert list(by_family) == ["date", "cron"]
    assert {family: (interval.value, interval.n) for family, interval in by_family.items()} == {"date": (1.0, 20), "cron": (0.5, 20)}


def test_gap_recovered_is_the_share_of_the_gap() -> None:
    student, label_only, teacher = drawn((0.95, 0.55, 0.99), 2000, seed=3)
    recovered = gap_recovered(student, label_only, teacher, resamples=RESAMPLES, seed=0)
    shares = [float(scores.right_N.mean()) for scores in (student, label_only, teacher)]
    assert isinstance(recovered, Interval)
    assert recovered.value == pytest.approx((shares[0] - shares[1]) / (shares[2] - shares[1]))
    assert recovered.low < recovered.value < recovered.high
    assert recovered.n == 2000


def test_gap_interval_is_paired() -> None:
    """Against the delta method: the ratio's variance from the items' residuals, which unpaired resampling would miss by several times."""
    student, label_only, teacher = drawn((0.95, 0.55, 0.99), 2000, seed=4)
    recovered = gap_recovered(student, label_only, teacher, resamples=4000, seed=0)
    assert isinstance(recovered, Interval)
    above, below = student.right_N - label_only.right_N, teacher.right_N - label_only.right_N
    deviation = (above - recovered.value * below).std() / (below.mean() * np.sqrt(len(below)))
    assert recovered.high - recovered.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_no_gap_has_no_share() -> None:
    student, _, teacher = drawn((0.9, 0.5, 0.9), 300, seed=5)
    same = gap_recovered(student, scores_of(teacher.right_N > 0, "label_only"), teacher, resamples=RESAMPLES, seed=0)
    assert isinstance(same, Absence)
    assert "not clearly better" in same.absent
    worse = gap_recovered(student, scores_of(np.ones(300, dtype=bool)), teacher, resamples=RESAMPLES, seed=0)
    assert isinstance(worse, Absence)


def test_the_gap_is_only_taken_on_the_same_items() -> None:
    student, label_only, teacher = drawn((0.9, 0.5, 0.99), 100, seed=6)
    shuffled = ItemScores(model="teacher", items=tuple(reversed(teacher.items)))
    for other in (shuffled, ItemScores(model="teacher", items=teacher.items[:-1])):
        with pytest.raises(RunError) as raised:
            gap_recovered(student, label_only, other, resamples=RESAMPLES, seed=0)
        assert raised.value.code == "run-corrupt"
