"""An objective inside a Hugging Face `Trainer`: two of its own arguments, no subclass.

    Trainer(model=..., train_dataset=records, data_collator=TaughtCollator(batch), compute_loss_func=ObjectiveLoss(objective, vocabulary), ...)

The collator makes a rectangle of ids and, where Trainer expects labels, `Taught`: what the teacher said about the scored rows. Trainer takes labels out
of the batch before it calls the model and hands them to the loss function with the model's output and the number of items of the whole step. So the
gradient is the engine's: a sum over scored rows, divided once by the step's count, however many batches are accumulated and however uneven they are.
What differs from the engine: the logits of a whole micro-batch are held at once (Trainer's models give them all), and Trainer puts the model into
training mode, in which dropout, where a family has it, is not zero.

Works with anything that keeps Trainer's contract for `compute_loss_func`, several processes and gradient accumulation included. B sequences, T
positions, R scored rows, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillroom.core.errors import StillroomError
from stillroom.models.batching import pack_rectangle
from stillroom.objectives.objective import Objective
from stillroom.objectives.tensors import as_tensor, as_tensors
from stillroom.targets.kinds import Targets, TextTargets
from stillroom.targets.protocols import Batch
from stillroom.targets.vocabulary import Vocabulary

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Taught:
    """Stands where Trainer expects a tensor of labels, and answers what Trainer asks of one: how many of them are not -100.

    `rows_R`: the scored rows, as indices into the flattened B x T; `weights_R`: how much each counts.
    """

    rows_R: Tensor
    weights_R: Tensor
    targets: Targets
    labels: TextTargets

    __iter__ = None  # what answers to [...] would otherwise pass for a sequence without end

    def to(self, device: torch.device | str, **_: Any) -> Taught:
        """The same on `device`."""
        return Taught(self.rows_R.to(device), self.weights_R.to(device), as_tensors(self.targets, device), as_tensors(self.labels, device))

    def __getitem__(self, _: object) -> Taught:
        """Trainer leaves out each sequence's first label, which no row predicts; here it is not among the rows to begin with."""
        return self

    def ne(self, _: int) -> Tensor:
        """One entry for each scored row: its weight, so that the sum of them is what the step is divided by."""
        return self.weights_R


@dataclass(frozen=True, slots=True)
class TaughtCollator:
    """Trainer's `data_collator`: from rows of the dataset to a batch.

    `batch` makes a Batch of the values of the rows' `column`: `batch` of a source in stillroom.runs.sources, whose records are ids of a target store,
    or any function of your own. Set `remove_unused_columns=False` in TrainingArguments, or Trainer takes the column away.
    """

    batch: Callable[[Sequence[Any]], Batch]
    column: str = "record"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`input_ids` (B x T, padded on the right, which under causal attention no scored row sees) and `labels` (Taught), on the CPU."""
        batch = self.batch([row[self.column] for row in rows])
        rectangle = pack_rectangle(batch.sequences, _CPU)
        weights_R = torch.ones(len(rectangle.rows_R)) if batch.weights_R is None else as_tensor(batch.weights_R, _CPU)
        return {"input_ids": rectangle.ids_BT, "labels": Taught(rectangle.rows_R, weights_R, batch.targets, batch.labels)}


@dataclass(frozen=True, slots=True)
class ObjectiveLoss:
    """Trainer's `compute_loss_func`. `vocabulary` is the student's: columns of the logits from its `size` on are padding and are cut off.

    Raises StillroomError 'trainer-unsupported' for an objective that matches hidden states.
    """

    objective: Objective
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        if self.objective.state_matches:
            raise StillroomError(
                "trainer-unsupported",
                found=f"{', '.join(match.name for match in self.objective.state_matches)} in an objective for a Trainer",
                expected="divergences alone",
                why="a projection is learned with the student, and Trainer would neither train nor save it",
                do="Leave the term out, or train with Stillroom's own loop.",
            )

    def __call__(self, outputs: Any, labels: Taught, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The sum over scored rows of weight x nats, divided by `num_items_in_batch`, which Trainer counts over the whole step.

        A step without scored rows has loss zero. Where a Trainer counts nothing, evaluation takes the batch's own mean, and training raises
        StillroomError 'trainer-unsupported', since its gradient would be scaled wrongly.
        """
        if num_items_in_batch is None and torch.is_grad_enabled():
            raise StillroomError(
                "trainer-unsupported",
                found="a Trainer that does not say how many tokens the step scores (num_items_in_batch is None)",
                expected="the number of items that Trainer counts for `compute_loss_func`",
                why="batches of unequal length would be averaged as if they were equal",
                do="Use a Trainer that passes num_items_in_batch to its compute_loss_func.",
            )
        logits_BTV: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        taught = labels.to(logits_BTV.device)
        logits_RV = logits_BTV.flatten(0, 1).index_select(0, taught.rows_R)[:, : self.vocabulary.size]
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        total_R, _ = self.objective.rows(logits_RV, taught.targets, taught.labels)
        items = torch.as_tensor(taught.weights_R.sum() if num_items_in_batch is None else num_items_in_batch, device=total_R.device)
        return (total_R * taught.weights_R.to(total_R.dtype)).sum() / items.to(total_R.dtype).clamp_min(torch.finfo(total_R.dtype).tiny)
