"""An objective: a weighted sum of terms, and its gradient through a student's head without ever holding all the logits.

Shapes: R scored rows, V vocabulary size, D width of the student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from stillroom.core.errors import RecipeError
from stillroom.objectives import fused
from stillroom.objectives.divergences import Divergence, require_kind
from stillroom.objectives.matching import StateMatch
from stillroom.objectives.tensors import as_tensor, as_tensors
from stillroom.targets.kinds import TARGET_KINDS, Array, Targets, TextTargets
from stillroom.targets.protocols import StepSums
from stillroom.targets.rows import row_count, slice_targets

Head: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedTerm:
    """One divergence, or a distance between hidden states, and its weight in the sum."""

    divergence: Divergence | StateMatch
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """sum over terms of weight x divergence, in nats per row, zero where the student equals what it is compared with.

    Both distributions are softened to `match_temperature` before they are compared. With `scale_by_temperature_squared` every term that softening
    acts on is multiplied by its square, which keeps the gradient's size about constant in the temperature (Hinton et al. 2015, section 2).
    Terms without a unit (total variation, alpha-beta, hidden states) are added as they are.
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
        needy = [term.divergence.kinds for term in self.terms if not _reads_text(term)]
        return tuple(kind for kind in TARGET_KINDS if all(kind in kinds for kinds in needy))

    @property
    def reads_text_alone(self) -> bool:
        """Whether no term needs anything of the teacher beyond the text."""
        return all(_reads_text(term) for term in self.terms)

    @property
    def state_matches(self) -> tuple[StateMatch, ...]:
        """The terms that compare hidden states."""
        return tuple(term.divergence for term in self.terms if isinstance(term.divergence, StateMatch))

    def factor(self, term: WeightedTerm) -> float:
        """What the nats of `term` are multiplied by in the sum."""
        squared = self.match_temperature**2 if self.scale_by_temperature_squared and term.divergence.softens else 1.0
        return term.weight * squared

    def check(self, kind: str, target_temperature: float = 1.0) -> None:
        """Raises StillroomError 'targets-unsupported', naming the kinds that would do for all terms, if one cannot be computed from such targets."""
        needy = [term.divergence for term in self.terms if not _reads_text(term)]
        require_kind(", ".join(one.name for one in needy if kind not in one.kinds), kind, self.required_kinds)
        for one in needy:
            one.check(kind, target_temperature, self.match_temperature)

    def rows(
        self,
        student_logits_RV: Tensor,
        targets: Targets,
        labels: TextTargets,
        *,
        states_RD: Tensor | None = None,
        projections: nn.ModuleDict | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Nats per row of the whole (weighted, scaled) and of each term by name (neither weighted nor scaled).

        `student_logits_RV` in float32 or wider, padding sliced off; `targets` and `labels` are tensors on its device. Terms on text read `labels`.
        Terms on hidden states read `states_RD`, what the student's head is given, and their own of the `projections` (matching.new_projections).
        Autocast does not reach in here: a teacher's head is applied in the type of the logits.
        """
        with torch.autocast(student_logits_RV.device.type, enabled=False):
            return self._rows(student_logits_RV, targets, labels, states_RD, projections)

    def _rows(
        self, student_logits_RV: Tensor, targets: Targets, labels: TextTargets, states_RD: Tensor | None, projections: nn.ModuleDict | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total_R = student_logits_RV.new_zeros(student_logits_RV.shape[0])
        terms_R: dict[str, Tensor] = {}
        for term in self.terms:
            divergence = term.divergence
            if isinstance(divergence, StateMatch):
                assert states_RD is not None, f"{divergence.name} needs the student's hidden states"
                nats_R = divergence.compare_R(states_RD, targets, projections)
            else:
                nats_R = divergence.nats(student_logits_RV, labels if _reads_text(term) else targets, self.match_temperature)
            total_R = total_R + self.factor(term) * nats_R
            terms_R[divergence.name] = nats_R
        return total_R, terms_R


def _reads_text(term: WeightedTerm) -> bool:
    return term.divergence.kinds == ("text",)


def backward_chunked(
    hidden_RD: Tensor,
    head: Head,
    *,
    size: int,
    objective: Objective,
    targets: Targets,
    labels: TextTargets,
    divide_by: float,
    rows_per_chunk: int,
    weights_R: Array | None = None,
    projections: nn.ModuleDict | None = None,
) -> tuple[Tensor, StepSums]:
    """Takes scored rows through the student's head, `rows_per_chunk` at a time, and back.

    `head` turns hidden rows into logits of at least `size` columns (the head module with its bias, scale and soft-cap, an adapter, anything that
    autograd can follow); columns from `size` on are padding and are cut off. Adds the gradient of (sum over rows of weight x nats) / `divide_by` to
    whatever parameters `head` and `projections` use, and returns that gradient with respect to `hidden_RD`, for `hidden_RD.backward(gradient_RD)`,
    and the undivided sums. `weights_R` are those of Batch; None means all 1. The result does not depend on `rows_per_chunk` beyond rounding; with no
    rows the gradient is zero.

    Where `objectives.fused` knows head and terms (`fuse`) it does the work, in smaller chunks if memory asks for it: the same function without
    autograd.
    """
    rows = _Rows(head, size, objective, targets, labels, weights_R, projections).beside(hidden_RD)
    gradient_RD = torch.zeros_like(hidden_RD, requires_grad=False)
    sums = _Sums(objective.term_names)
    if (through := rows.fused_head(hidden_RD, backward=True)) is not None:
        for start, stop in through.chunks_of(hidden_RD, rows.targets, rows_per_chunk):
            rows.fused_chunk(through, hidden_RD[start:stop].detach(), start, stop, sums, divide_by, gradient_RD[start:stop])
        through.finish()
        return gradient_RD, sums.value(rows.weights_R)
    for start, stop in _chunks(hidden_RD.shape[0], rows_per_chunk):
        chunk_RD = hidden_RD[start:stop].detach().requires_grad_()
        with torch.enable_grad():
            total_R = rows.chunk(chunk_RD, start, stop, sums)
            (total_R.sum() / divide_by).backward()
        assert chunk_RD.grad is not None
        gradient_RD[start:stop] = chunk_RD.grad
    return gradient_RD, sums.value(rows.weights_R)


def sums_chunked(
    hidden_RD: Tensor,
    head: Head,
    *,
    size: int,
    objective: Objective,
    targets: Targets,
    labels: TextTargets,
    rows_per_chunk: int,
    weights_R: Array | None = None,
    projections: nn.ModuleDict | None = None,
) -> StepSums:
    """The sums that `backward_chunked` returns, without any gradient."""
    rows = _Rows(head, size, objective, targets, labels, weights_R, projections).beside(hidden_RD)
    sums = _Sums(objective.term_names)
    with torch.no_grad():
        if (through := rows.fused_head(hidden_RD, backward=False)) is not None:
            for start, stop in through.chunks_of(hidden_RD, rows.targets, rows_per_chunk):
                rows.fused_chunk(through, hidden_RD[start:stop], start, stop, sums)
            return sums.value(rows.weights_R)
        for start, stop in _chunks(hidden_RD.shape[0], rows_per_chunk):
            rows.chunk(hidden_RD[start:stop], start, stop, sums)
    return sums.value(rows.weights_R)


def _chunks(rows: int, rows_per_chunk: int) -> list[tuple[int, int]]:
    return [(start, min(start + rows_per_chunk, rows)) for start in range(0, rows, rows_per_chunk)]


@dataclass(frozen=True, slots=True)
class _Rows:
    """What belongs to scored rows beside the student's states: the same for every chunk."""

    head: Head
    size: int
    objective: Objective
    targets: Targets
    labels: TextTargets
    weights_R: Array | None
    projections: nn.ModuleDict | None

    def beside(self, hidden_RD: Tensor) -> _Rows:
        """The same on the device of the states, whose rows they must be."""
        device = hidden_RD.device
        targets, labels = as_tensors(self.targets, device), as_tensors(self.labels, device)
        weights_R = None if self.weights_R is None else as_tensor(self.weights_R, device)
        counts = [hidden_RD.shape[0], row_count(targets), row_count(labels), *(() if weights_R is None else weights_R.shape)]
        assert len(set(counts)) == 1, f"hidden rows, targets, labels and weights disagree on the number of scored rows: {counts}"
        return replace(self, targets=targets, labels=labels, weights_R=weights_R)

    def chunk(self, chunk_RD: Tensor, start: int, stop: int, sums: _Sums) -> Tensor:
        """The objective of these rows, each times its weight; their sums are added to `sums`."""
        logits_RV = self.head(chunk_RD)[:, : self.size]
        # Half-precision logits are widened before anything is exponentiated; float64 stays, for tests.
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        targets, labels = slice_targets(self.targets, start, stop), slice_targets(self.labels, start, stop)
        total_R, terms_R = self.objective.rows(logits_RV, targets, labels, states_RD=chunk_RD, projections=self.projections)
        return self._add(total_R, terms_R, start, stop, sums)

    def fused_head(self, hidden_RD: Tensor, *, backward: bool) -> fused.RowsThroughHead | None:
        """These rows without autograd, where that is known how."""
        terms = self._fused_terms()
        return fused.fuse(
            hidden_RD,
            self.head,
            size=self.size,
            terms=terms,
            targets=self.targets,
            match_temperature=self.objective.match_temperature,
            backward=backward,
        )

    def fused_chunk(
        self,
        through: fused.RowsThroughHead,
        chunk_RD: Tensor,
        start: int,
        stop: int,
        sums: _Sums,
        divide_by: float = 1.0,
        gradient_RD: Tensor | None = None,
    ) -> None:
        """As `chunk`, and with `gradient_RD` the way back as well, which writes it."""
        targets, labels = slice_targets(self.targets, start, stop), slice_targets(self.labels, start, stop)
        wide = torch.promote_types(chunk_RD.dtype, torch.float32)
        coefficients_R = chunk_RD.new_full((len(chunk_RD),), 1.0 / divide_by, dtype=wide)
        if self.weights_R is not None:
            coefficients_R = coefficients_R * self.weights_R[start:stop].to(wide)
        nats = through.chunk(chunk_RD, targets, labels, coefficients_R, gradient_RD)
        total_R = chunk_RD.new_zeros(len(chunk_RD), dtype=wide)
        terms_R: dict[str, Tensor] = {}
        for term in self.objective.terms:
            divergence = term.divergence
            if isinstance(divergence, StateMatch):
                terms_R[divergence.name] = self._match(term, chunk_RD, targets, coefficients_R, gradient_RD)
            else:
                terms_R[divergence.name] = nats[divergence.name]
            total_R += self.objective.factor(term) * terms_R[divergence.name]
        self._add(total_R, terms_R, start, stop, sums)

    def _match(self, term: WeightedTerm, chunk_RD: Tensor, targets: Targets, coefficients_R: Tensor, gradient_RD: Tensor | None) -> Tensor:
        """A distance between hidden states, by autograd; its gradient is added to `gradient_RD` and to the projection."""
        assert isinstance(term.divergence, StateMatch)
        with torch.set_grad_enabled(gradient_RD is not None), torch.autocast(chunk_RD.device.type, enabled=False):
            states_RD = chunk_RD.detach().requires_grad_(gradient_RD is not None)
            distance_R = term.divergence.compare_R(states_RD, targets, self.projections)
            if gradient_RD is not None:
                (self.objective.factor(term) * (coefficients_R * distance_R).sum()).backward()
                assert states_RD.grad is not None
                gradient_RD += states_RD.grad
        return distance_R.detach()

    def _fused_terms(self) -> list[fused.FusedTerm]:
        return [
            fused.FusedTerm(divergence=term.divergence, factor=self.objective.factor(term), reads_text=_reads_text(term))
            for term in self.objective.terms
            if isinstance(term.divergence, Divergence)
        ]

    def _add(self, total_R: Tensor, terms_R: dict[str, Tensor], start: int, stop: int, sums: _Sums) -> Tensor:
        """`total_R`, each row times its weight; the sums over rows are added to `sums`."""
        if self.weights_R is not None:
            weights_R: Tensor = self.weights_R[start:stop].to(total_R.dtype)
            total_R, terms_R = total_R * weights_R, {name: nats_R * weights_R for name, nats_R in terms_R.items()}
        sums.add(total_R, terms_R)
        return total_R


class _Sums:
    """Sums of nats over chunks; they stay on the device until asked for, so that chunks do not wait for one another."""

    def __init__(self, term_names: tuple[str, ...]) -> None:
        self._names = term_names
        self._chunks: list[Tensor] = []
        self._rows = 0

    def add(self, total_R: Tensor, terms_R: dict[str, Tensor]) -> None:
        self._chunks.append(torch.stack([total_R.detach().sum(), *(terms_R[name].detach().sum() for name in self._names)]))
        self._rows += total_R.shape[0]

    def value(self, weights_R: Tensor | None) -> StepSums:
        table = torch.stack(self._chunks).tolist() if self._chunks else []
        totals = [sum(column) for column in zip(*table, strict=True)] or [0.0] * (1 + len(self._names))
        return StepSums(
            objective_nats=totals[0],
            terms_nats=dict(zip(self._names, totals[1:], strict=True)),
            scored_tokens=self._rows,
            scored_weight=float(self._rows if weights_R is None else weights_R.sum()),
        )
