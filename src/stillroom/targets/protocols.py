"""What the other rooms may ask of a teacher, a student, and a change to a teacher's logits. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stillroom.core.identities import ModelRef, Sampling, TokenIds, TokenSequence
from stillroom.targets.kinds import Array, TargetRequest, Targets, TextTargets
from stillroom.targets.vocabulary import Vocabulary


class LogitsTransform(Protocol):
    """A change to a teacher's logits before its distribution is taken or sampled (a watermark, a defence)."""

    def __call__(self, context_BT: Array, logits_BV: Array) -> Array:
        """New logits for the next token of each context; same shape."""
        ...


class Teacher(Protocol):
    """What can be learned from: text it writes and distributions it gives."""

    @property
    def ref(self) -> ModelRef: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def capabilities(self) -> frozenset[str]:
        """Names from `TARGET_KINDS` that `targets` can give."""
        ...

    def generate(self, prompts: Sequence[TokenIds], sampling: Sampling) -> list[TokenIds]:
        """One completion for each prompt, without the prompt, the end token included where the teacher produced it."""
        ...

    def targets(self, sequences: Sequence[TokenSequence], request: TargetRequest) -> Targets:
        """Targets for the scored rows of `sequences`, laid end to end. Raises StillroomError 'targets-unsupported' beyond `capabilities`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences of one micro-batch, what the teacher said about their scored rows, and the tokens those rows predict.

    `weights_R` (float, at least 0; None: all 1) says how much each scored row counts: a row of weight w counts as w rows, in every sum and in the
    number that the sums are divided by. Weights of 1 change nothing, a weight of 2 is the row given twice, and 0 is a row that is not scored.
    """

    sequences: tuple[TokenSequence, ...]
    targets: Targets
    labels: TextTargets
    weights_R: Array | None = None

    @property
    def scored_tokens(self) -> int:
        return sum(len(sequence.scored_rows) for sequence in self.sequences)

    @property
    def scored_weight(self) -> float:
        """The sum of the weights of the scored rows: this batch's share of a step's `divide_by`."""
        return float(self.scored_tokens if self.weights_R is None else self.weights_R.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSums:
    """Sums over scored rows, in nats, never means: the objective, and each of its terms by name (without the term's factor).

    Each row counts by its weight (Batch.weights_R), and a mean is a sum divided by `scored_weight`; `scored_tokens` counts rows whatever their weight.
    """

    objective_nats: float
    terms_nats: dict[str, float] = field(default_factory=dict)
    scored_tokens: int = 0
    scored_weight: float = 0.0


class Student(Protocol):
    """What learns: five verbs over one model, its optimiser and its position in training."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def forward_backward(self, batch: Batch, objective: Any, divide_by: float) -> StepSums:
        """Adds the gradient of (sum over scored rows) / `divide_by` to what is accumulated; returns undivided sums.

        `divide_by` is the sum of `Batch.scored_weight` over the whole step, all micro-batches and ranks: without weights, its number of scored
        tokens. `objective` is objectives.Objective.
        """
        ...

    def optim_step(self, learning_rate: float) -> float:
        """One optimiser step on the accumulated gradient, which is clipped before and zeroed after; returns its norm before clipping."""
        ...

    def sample(self, prompts: Sequence[TokenIds], sampling: Sampling) -> list[TokenIds]:
        """One completion for each prompt, as Teacher.generate."""
        ...

    def logprobs(self, sequences: Sequence[TokenSequence]) -> list[list[float]]:
        """For each sequence the log-probability in nats of each answer token (those with a scored row), at temperature 1."""
        ...

    def save(self, directory: Path) -> None:
        """Everything that `load` needs to go on bit for bit: weights, optimiser, counters. Not a Hugging Face directory (see models.export)."""
        ...

    def load(self, directory: Path) -> None: ...
