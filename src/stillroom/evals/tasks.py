"""Answers against items: exact match, per family, and how much of the gap to the teacher a student recovered.

Every interval is a bootstrap over items, paired where models are compared: all models answer the same items in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillroom.core.errors import RunError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.statistics import Interval, mean_interval, paired_statistic_interval
from stillroom.evals.measured import Absence, Evidence

NORMALISATION = "whitespace around answer and expected answer is stripped; nothing else"
# Half of what a 95 % interval leaves out.
_TAIL = 0.025


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt whose right answer is known. `family` groups items that are reported together."""

    prompt: str
    answer: str
    family: str | None = None

    @property
    def id(self) -> str:
        """Names the item by its content: the first 16 hexadecimal digits of the SHA-256 of [prompt, answer, family] as canonical JSON."""
        return sha256_hex(canonical_json([self.prompt, self.answer, self.family]))[:16]


class ItemResult(Evidence):
    """What one model answered to one item."""

    id: str
    prompt: str
    expected: str
    answer: str
    right: bool
    family: str | None


class ItemScores(Evidence):
    """What one model answered to all items, in their order: the content of an evals/*.json file."""

    model: str
    metric: str = "exact_match"
    normalisation: str = NORMALISATION
    items: tuple[ItemResult, ...]

    @property
    def right_N(self) -> NDArray[np.float64]:
        """1 where the answer is right, 0 where it is wrong."""
        return np.array([item.right for item in self.items], dtype=np.float64)


def exact_match(answers: Sequence[str], items: Sequence[Item]) -> NDArray[np.int8]:
    """1 where an answer equals its item's, 0 elsewhere; whitespace around both is stripped and nothing else is changed."""
    return np.array([answer.strip() == item.answer.strip() for answer, item in zip(answers, items, strict=True)], dtype=np.int8)


def score_items(model: str, answers: Sequence[str], items: Sequence[Item]) -> ItemScores:
    """The answers of `model` with their verdicts. One answer for each item."""
    rights = exact_match(answers, items)
    results = (
        ItemResult(id=item.id, prompt=item.prompt, expected=item.answer, answer=answer, right=bool(right), family=item.family)
        for answer, item, right in zip(answers, items, rights, strict=True)
    )
    return ItemScores(model=model, items=tuple(results))


def accuracy(scores: ItemScores, *, resamples: int, seed: int) -> Interval | Absence:
    """Share of right answers with its 95 % interval (bootstrap over items; exact where all items have the same verdict)."""
    if not scores.items:
        return Absence(absent="there are no labelled items")
    return _share(scores.right_N, resamples, seed)


def accuracy_by_family(scores: ItemScores, *, resamples: int, seed: int) -> dict[str, Interval]:
    """`accuracy` within each family, in the order in which families first appear; items without one are left out."""
    families = list(dict.fromkeys(item.family for item in scores.items if item.family is not None))
    right_N = scores.right_N
    members = {family: np.array([item.family == family for item in scores.items]) for family in families}
    return {family: _share(right_N[member_N], resamples, seed) for family, member_N in members.items()}


def _share(right_N: NDArray[np.float64], resamples: int, seed: int) -> Interval:
    """Where all verdicts agree every resample is the same and the bootstrap would claim certainty: the Clopper-Pearson interval is given instead."""
    n = len(right_N)
    bound = float(_TAIL ** (1.0 / n))
    if right_N.all():
        return Interval(value=1.0, low=bound, high=1.0, n=n)
    if not right_N.any():
        return Interval(value=0.0, low=0.0, high=1.0 - bound, n=n)
    interval = mean_interval(right_N, resamples=resamples, seed=seed)
    assert interval is not None, "a mean of at least two finite values is defined"
    return interval


def gap_recovered(student: ItemScores, label_only: ItemScores, teacher: ItemScores, *, resamples: int, seed: int) -> Interval | Absence:
    """(student - label_only) / (teacher - label_only) in exact match, with a paired bootstrap over items.

    Absent where there are no items, and where the interval of teacher - label_only does not lie above 0: a share of no gap means nothing.
    Raises RunError 'run-corrupt' where the three were not scored on the same items.
    """
    _require_same_items(student, label_only, teacher)
    columns = {"student": student.right_N, "label_only": label_only.right_N, "teacher": teacher.right_N}
    gap = paired_statistic_interval(columns, _gap, resamples=resamples, seed=seed)
    if gap is None:
        return Absence(absent="there are no labelled items")
    if gap.low <= 0.0:
        return Absence(
            absent=f"the teacher is not clearly better than label-only: teacher - label-only is {gap.value:.3f} [{gap.low:.3f}, {gap.high:.3f}]"
        )
    recovered = paired_statistic_interval(columns, _recovered, resamples=resamples, seed=seed)
    return recovered or Absence(absent="teacher - label-only vanishes in too many resamples")


def _gap(means: dict[str, float]) -> float:
    return means["teacher"] - means["label_only"]


def _recovered(means: dict[str, float]) -> float | None:
    """Undefined in a draw where the teacher is not better: such a draw counts against both ends of the interval."""
    gap = _gap(means)
    return (means["student"] - means["label_only"]) / gap if gap > 0.0 else None


def _require_same_items(*scores: ItemScores) -> None:
    first = [item.id for item in scores[0].items]
    for other in scores[1:]:
        if [item.id for item in other.items] != first:
            raise RunError(
                "run-corrupt",
                found=f"{len(first)} items of {scores[0].model} and {len(other.items)} of {other.model} that are not the same in the same order",
                expected="every model scored on the same items",
                why="models are compared item by item",
                do="Evaluate again: delete the run's evals/ directory and run the evaluate stage.",
            )
