"""An objective: a weighted sum of divergences, and its gradient through a student's head without ever holding all the logits.

Shapes: R scored rows, V vocabulary size, D width of the student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from stillroom.core.errors import RecipeError
from stillroom.objectives.divergences import Divergence
from stillroom.objectives.tensors import as_tensors
from stillroom.targets.kinds import TARGET_KINDS, Targets, TextTargets
from stillroom.targets.protocols import StepSums
from stillroom.targets.rows import row_count, slice_targets

Head: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedTerm:
    """One divergence and its weight in the sum."""

    divergence: Divergence
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """sum over terms of weight x divergence, in nats per row, zero where the student equals what it is compared with.

    Both distributions are softened to `match_temperature` before they are compared. With `scale_by_temperature_squared` every term that softening
    acts on is multiplied by its square, which keeps the gradient's size about constant in the temperature (Hinton et al. 2015, section 2).
    """

    terms: tuple[WeightedTerm, ...]
    match_temperature: float = 1.0
    scale_by_temperature_squared: bool = False

    def __post_init__(self) -> None:
        names = self.term_names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not names:
            raise RecipeError(
                "recipe-invalid",
                found=f"the term {', '.join(twice)} more than once in one objective" if twice else "an objective without terms",
                expected="at least one term, each once",
                do="Give each divergence once, with the sum of its weights.",
            )

    @property
    def term_names(self) -> tuple[str, ...]:
        return tuple(term.divergence.name for term in self.terms)

    @property
    def required_kinds(self) -> tuple[str, ...]:
        """The target kinds from which every term can be computed, in the order of `TARGET_KINDS`. Terms on text need no targets beyond the labels."""
        needy = [term.divergence for term in self.terms if term.divergence.softens]
        return tuple(kind for kind in TARGET_KINDS if all(kind in divergence.kinds for divergence in needy))

    def check(self, kind: str, target_temperature: float = 1.0) -> None:
        """Raises StillroomError 'targets-unsupported', naming the kinds that would do, if a term cannot be computed from such targets."""
        for term in self.terms:
            if term.divergence.softens:
                term.divergence.check(kind, target_temperature, self.match_temperature)

    def rows(self, student_logits_RV: Tensor, targets: Targets, labels: TextTargets) -> tuple[Tensor, dict[str, Tensor]]:
        """Nats per row of the whole (weighted, scaled) and of each term by name (neither weighted nor scaled).

        `student_logits_RV` in float32 or wider, padding sliced off; `targets` and `labels` are tensors on its device. Terms on text read `labels`.
        Autocast does not reach in here: a teacher's head is applied in the type of the logits.
        """
        with torch.autocast(student_logits_RV.device.type, enabled=False):
            return self._rows(student_logits_RV, targets, labels)

    def _rows(self, student_logits_RV: Tensor, targets: Targets, labels: TextTargets) -> tuple[Tensor, dict[str, Tensor]]:
        total_R = student_logits_RV.new_zeros(student_logits_RV.shape[0])
        terms_R: dict[str, Tensor] = {}
        for term in self.terms:
            divergence = term.divergence
            nats_R = divergence.nats(student_logits_RV, targets if divergence.softens else labels, self.match_temperature)
            squared = self.match_temperature**2 if self.scale_by_temperature_squared and divergence.softens else 1.0
            total_R = total_R + term.weight * squared * nats_R
            terms_R[divergence.name] = nats_R
        return total_R, terms_R


def backward_chunked(
    hidden_RD: Tensor,
    head: Head,
    *,
    size: int,
    objective: Objective,
    targets: Targets,
    labels: TextTargets,
    divide_by: int,
    rows_per_chunk: int,
) -> tuple[Tensor, StepSums]:
    """Takes scored rows through the student's head, `rows_per_chunk` at a time, and back.

    `head` turns hidden rows into logits of at least `size` columns (the head module with its bias, scale and soft-cap, an adapter, anything that
    autograd can follow); columns from `size` on are padding and are cut off. Adds the gradient of (sum over rows of nats) / `divide_by` to
    whatever parameters `head` uses, and returns that gradient with respect to `hidden_RD`, for `hidden_RD.backward(gradient_RD)`, and the
    undivided sums. The result does not depend on `rows_per_chunk` beyond rounding; with no rows the gradient is zero.
    """
    targets, labels = as_tensors(targets, hidden_RD.device), as_tensors(labels, hidden_RD.device)
    gradient_RD = torch.zeros_like(hidden_RD, requires_grad=False)
    sums = _Sums(objective.term_names)
    for start, stop in _chunks(_checked_rows(hidden_RD, targets, labels), rows_per_chunk):
        chunk_RD = hidden_RD[start:stop].detach().requires_grad_()
        with torch.enable_grad():
            total_R = _chunk_rows(chunk_RD, head, size, objective, targets, labels, start, stop, sums)
            (total_R.sum() / divide_by).backward()
        assert chunk_RD.grad is not None
        gradient_RD[start:stop] = chunk_RD.grad
    return gradient_RD, sums.value()


def sums_chunked(
    hidden_RD: Tensor, head: Head, *, size: int, objective: Objective, targets: Targets, labels: TextTargets, rows_per_chunk: int
) -> StepSums:
    """The sums that `backward_chunked` returns, without any gradient."""
    targets, labels = as_tensors(targets, hidden_RD.device), as_tensors(labels, hidden_RD.device)
    sums = _Sums(objective.term_names)
    with torch.no_grad():
        for start, stop in _chunks(_checked_rows(hidden_RD, targets, labels), rows_per_chunk):
            _chunk_rows(hidden_RD[start:stop], head, size, objective, targets, labels, start, stop, sums)
    return sums.value()


def _chunk_rows(
    chunk_RD: Tensor, head: Head, size: int, objective: Objective, targets: Targets, labels: TextTargets, start: int, stop: int, sums: _Sums
) -> Tensor:
    logits_RV = head(chunk_RD)[:, :size]
    # Half-precision logits are widened before anything is exponentiated; float64 stays, for tests.
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    total_R, terms_R = objective.rows(logits_RV, slice_targets(targets, start, stop), slice_targets(labels, start, stop))
    sums.add(total_R, terms_R)
    return total_R


def _chunks(rows: int, rows_per_chunk: int) -> list[tuple[int, int]]:
    return [(start, min(start + rows_per_chunk, rows)) for start in range(0, rows, rows_per_chunk)]


def _checked_rows(hidden_RD: Tensor, targets: Targets, labels: TextTargets) -> int:
    counts = (hidden_RD.shape[0], row_count(targets), row_count(labels))
    assert len(set(counts)) == 1, f"hidden rows, targets and labels disagree on the number of scored rows: {counts}"
    return counts[0]


class _Sums:
    """Sums of nats over chunks; they stay on the device until asked for, so that chunks do not wait for one another."""

    def __init__(self, term_names: tuple[str, ...]) -> None:
        self._names = term_names
        self._chunks: list[Tensor] = []
        self._rows = 0

    def add(self, total_R: Tensor, terms_R: dict[str, Tensor]) -> None:
        self._chunks.append(torch.stack([total_R.detach().sum(), *(terms_R[name].detach().sum() for name in self._names)]))
        self._rows += total_R.shape[0]

    def value(self) -> StepSums:
        table = torch.stack(self._chunks).tolist() if self._chunks else []
        totals = [sum(column) for column in zip(*table, strict=True)] or [0.0] * (1 + len(self._names))
        return StepSums(objective_nats=totals[0], terms_nats=dict(zip(self._names, totals[1:], strict=True)), scored_tokens=self._rows)
