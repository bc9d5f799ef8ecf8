"""An objective inside a Hugging Face Trainer has the engine's gradient: accumulated, uneven, weighted, in two processes, through every kind of head."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from helpers import tiny_model
from stillroom.core.errors import StillroomError
from stillroom.core.identities import ModelRef, TokenSequence
from stillroom.models.hf_adapter import ObjectiveLoss, Taught, TaughtCollator
from stillroom.models.local import LocalTeacher, text_targets
from stillroom.models.student import OptimiserSettings, TransformersStudent, named_gradients
from stillroom.objectives.divergences import cross_entropy, forward_kl, generalized_jsd, reverse_kl
from stillroom.objectives.matching import hidden_mse
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.targets.kinds import TargetRequest, TextTargets
from stillroom.targets.protocols import Batch
from stillroom.targets.vocabulary import Vocabulary

RELATIVE = 1e-5
SIZE, TEACHER_ROWS, STUDENT_ROWS = 61, 64, 72
# Both have heads wider than the tokenizer; gemma2 caps its logits, cohere scales them, gpt2 ties its head.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"attn_implementation": "eager"},
    "cohere": {},
    "gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
GOAL = Objective(
    terms=(
        WeightedTerm(divergence=generalized_jsd(0.3)),
        WeightedTerm(divergence=reverse_kl(), weight=0.5),
        WeightedTerm(divergence=cross_entropy(), weight=0.2),
    ),
    match_temperature=2.0,
    scale_by_temperature_squared=True,
)
# Eight records of 2 to 9 scored tokens, so that batches of two are of unequal weight.
SEQUENCES = {
    f"record {i}": TokenSequence(
        ids=tuple((5 * i + 7 * t * t + i * t) % SIZE for t in range(6 + i)), answer_spans=((4, 6 + i),) if i else ((2, 3), (4, 5))
    )
    for i in range(8)
}


def vocabulary(rows: int) -> Vocabulary:
    return Vocabulary(tokens=tuple(bytes([i]) for i in range(SIZE)), special={}, end_ids=(0,), rows=rows)


def student_of(family: str) -> PreTrainedModel:
    return tiny_model(family, rows=STUDENT_ROWS, seed=2, spread=0.2, **FAMILIES[family])


@dataclass(frozen=True)
class LiveSource:
    """A teacher that is asked again for every batch."""

    teacher: LocalTeacher
    sequences: dict[str, TokenSequence]
    request: TargetRequest

    def batch(self, records: Sequence[str]) -> Batch:
        sequences = tuple(self.sequences[record] for record in records)
        return Batch(
            sequences=sequences, targets=self.teacher.targets(sequences, self.request), labels=text_targets(sequences, self.teacher.vocabulary)
        )


def source_of(family: str = "llama", kind: str = "full", sequences: dict[str, TokenSequence] = SEQUENCES) -> LiveSource:
    ref = ModelRef(source="here", kind="directory", revision=None, weights_sha256=None, architecture="", parameters=1, licence=None)
    teacher = LocalTeacher(tiny_model(family, rows=TEACHER_ROWS, width=48, seed=1, spread=0.2, **FAMILIES[family]), ref, vocabulary(TEACHER_ROWS))
    return LiveSource(teacher, sequences, TargetRequest(kind=kind, k=9))


def engine(model: PreTrainedModel, batches: Sequence[Batch], objective: Objective) -> tuple[float, dict[str, Tensor]]:
    """The mean of the whole step and its gradient, by our own engine."""
    student = TransformersStudent(model, vocabulary(STUDENT_ROWS), OptimiserSettings(), rows_per_chunk=3)
    divide_by = max(1.0, sum(batch.scored_weight for batch in batches))
    nats = sum(student.forward_backward(batch, objective, divide_by).objective_nats for batch in batches)
    return nats / divide_by, {name: gradient.clone() for name, gradient in named_gradients(student.model)}


class Gradients(TrainerCallback):
    """What the model's gradients are before each optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.steps.append({name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def trainer_of(
    directory: Path, model: PreTrainedModel, batch: Callable[[Sequence[Any]], Batch], records: Sequence[str], objective: Objective, **arguments: Any
) -> tuple[Trainer, Gradients]:
    gradients = Gradients()
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(directory), **(settings | arguments)),
        train_dataset=[{"record": record} for record in records],
        eval_dataset=[{"record": record} for record in records],
        data_collator=TaughtCollator(batch),
        compute_loss_func=ObjectiveLoss(objective, vocabulary(STUDENT_ROWS)),
        callbacks=[gradients],
    )
    return trainer, gradients


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float = RELATIVE) -> None:
    whole = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in wanted.values()))
    assert found.keys() == wanted.keys()
    assert whole > 1e-3
    for name, gradient in wanted.items():
        off = float((found[name].double() - gradient.double()).norm())
        assert off <= relative * max(float(gradient.norm()), 1e-3 * whole), f"{name}: off by {off / whole:.1e} of the whole gradient"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "accumulated"), [(8, 1), (2, 4), (1, 8), (3, 3)])
def test_an_accumulated_step_has_the_engines_gradient_and_loss(family: str, batch: int, accumulated: int, tmp_path: Path) -> None:
    """Micro-batches of unequal numbers of scored tokens, the last of (3, 3) of unequal numbers of sequences."""
    source = source_of(family)
    value, expected = engine(student_of(family), [source.batch(list(SEQUENCES))], GOAL)
    trainer, gradients = trainer_of(
        tmp_path, student_of(family), source.batch, list(SEQUENCES), GOAL, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated
    )
    trainer.train()
    (found,) = gradients.steps
    assert_same(found, expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(value, rel=RELATIVE)


@pytest.mark.parametrize("kind", ["hidden", "top_k", "text"])
def test_every_kind_of_targets_goes_through(kind: str, tmp_path: Path) -> None:
    terms = (WeightedTerm(divergence=forward_kl()), WeightedTerm(divergence=cross_entropy()))
    goal = Objective(terms=terms[1:] if kind == "text" else terms)
    source = source_of(kind=kind)
    _, expected = engine(student_of("llama"), [source.batch(list(SEQUENCES))], goal)
    trainer, gradients = trainer_of(tmp_path, student_of("llama"), source.batch, list(SEQUENCES), goal)
    trainer.train()
    assert_same(gradients.steps[0], expected)


def test_a_mean_of_means_would_be_seen(tmp_path: Path) -> None:
    """The same step as a Trainer averages it that counts sequences and not tokens: nowhere near."""
    source, records = source_of(), list(SEQUENCES)
    _, expected = engine(student_of("llama"), [source.batch(records)], GOAL)
    trainer, gradients = trainer_of(tmp_path, student_of("llama"), source.batch, records, GOAL)
    loss = trainer.compute_loss_func
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: loss(outputs, labels, num_items_in_batch=4 * labels.weights_R.sum())
    trainer.train()
    with pytest.raises(AssertionError, match="off by"):
        assert_same(gradients.steps[0], expected, relative=1e-2)


def test_weights_of_rows_are_in_the_sum_and_in_what_it_is_divided_by(tmp_path: Path) -> None:
    source, records = source_of(), list(SEQUENCES)

    def weighted(records: Sequence[str]) -> Batch:
        batch = source.batch(records)
        return replace(batch, weights_R=numpy.concatenate([numpy.linspace(0, len(s.ids) / 5, len(s.scored_rows)) for s in batch.sequences]))

    value, expected = engine(student_of("llama"), [weighted(records)], GOAL)
    trainer, gradients = trainer_of(tmp_path, student_of("llama"), weighted, records, GOAL)
    trainer.train()
    assert_same(gradients.steps[0], expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(value, rel=RELATIVE)
    _, unweighted = engine(student_of("llama"), [source.batch(records)], GOAL)
    with pytest.raises(AssertionError, match="off by"):
        assert_same(unweighted, expected, relative=1e-2)


def test_records_without_scored_rows_change_nothing(tmp_path: Path) -> None:
    empty = {f"empty {i}": TokenSequence(ids=(1, 2, 3), answer_spans=()) for i in range(2)}
    source = source_of(sequences=SEQUENCES | empty)
    records = [*SEQUENCES, *empty]
    _, expected = engine(student_of("llama"), [source.batch(records)], GOAL)
    trainer, gradients = trainer_of(tmp_path, student_of("llama"), source.batch, records, GOAL, gradient_accumulation_steps=5)
    trainer.train()
    assert_same(gradients.steps[0], expected)
    trainer, gradients = trainer_of(tmp_path, student_of("llama"), source.batch, list(empty), GOAL, gradient_accumulation_steps=1)
    trainer.train()
    assert not any(gradient.any() for gradient in gradients.steps[0].values())
    assert trainer.state.log_history[0]["loss"] == 0.0


def test_trainers_own_steps_go_on_from_there(tmp_path: Path) -> None:
    """Two optimiser steps of two batches each: in each, the gradient of the weights as they are by then."""
    source = source_of()
    trainer, gradients = trainer_of(
        tmp_path, student_of("llama"), source.batch, list(SEQUENCES), GOAL, gradient_accumulation_steps=2, max_steps=2, lr_scheduler_type="constant"
    )
    order: list[str] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: (order.extend(row["record"] for row in rows), collate(rows))[1]
    trainer.train()
    assert sorted(order[:8]) == sorted(SEQUENCES)
    _, first = engine(student_of("llama"), [source.batch(order[:4])], GOAL)
    assert_same(gradients.steps[0], first)
    assert trainer.state.global_step == len(gradients.steps) == 2
    moved = student_of("llama")
    optimiser = torch.optim.AdamW(moved.parameters(), lr=1e-3, weight_decay=0.0)
    for name, parameter in moved.named_parameters():
        parameter.grad = gradients.steps[0][name]
    optimiser.step()
    optimiser.zero_grad()
    _, second = engine(moved, [source.batch(order[4:8])], GOAL)
    assert_same(gradients.steps[1], second, relative=1e-4)  # Adam's first step divides each gradient by itself


def test_evaluation_is_the_mean_of_the_objective(tmp_path: Path) -> None:
    source = source_of()
    value, _ = engine(student_of("llama"), [source.batch(list(SEQUENCES))], GOAL)
    trainer, _ = trainer_of(tmp_path, student_of("llama"), source.batch, list(SEQUENCES), GOAL, per_device_eval_batch_size=8)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(value, rel=RELATIVE)


# -- two processes ----------------------------------------------------------------------------------------------------------


def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    """torch.distributed over gloo: four records each, in batches of two, unequal in every way; the step's tokens are counted over both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    _, expected = engine(student_of("llama"), [source_of().batch(list(SEQUENCES))], GOAL)
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for found in ranks:
        assert_same(found, expected)


def one_of_two(directory: Path) -> None:
    source, rank = source_of(), int(os.environ["RANK"])
    seen: list[str] = []

    def batch(records: Sequence[str]) -> Batch:
        seen.extend(records)
        return source.batch(records)

    trainer, gradients = trainer_of(
        directory / str(rank), student_of("llama"), batch, list(SEQUENCES), GOAL, gradient_accumulation_steps=2, ddp_backend="gloo"
    )
    assert trainer.args.world_size == 2
    trainer.train()
    assert len(set(seen)) == 4, seen
    save_file(gradients.steps[0], directory / f"{rank}.safetensors")


# -- what is refused, and what Trainer may ask ------------------------------------------------------------------------------


def test_a_trainer_that_does_not_count_is_refused_in_training_alone() -> None:
    batch = source_of().batch(list(SEQUENCES))
    taught = TaughtCollator(lambda _: batch)([{"record": 0}])
    logits = student_of("llama")(input_ids=taught["input_ids"]).logits
    loss = ObjectiveLoss(GOAL, vocabulary(STUDENT_ROWS))
    with pytest.raises(StillroomError, match="num_items_in_batch is None") as caught:
        loss({"logits": logits}, taught["labels"])
    assert caught.value.code == "trainer-unsupported"
    with torch.no_grad():
        mean = loss((logits,), taught["labels"])
    assert mean.item() == pytest.approx(engine(student_of("llama"), [batch], GOAL)[0], rel=RELATIVE)


def test_an_objective_with_a_projection_is_refused() -> None:
    goal = Objective(terms=(WeightedTerm(divergence=forward_kl()), WeightedTerm(divergence=hidden_mse())))
    with pytest.raises(StillroomError, match="hidden_mse in an objective for a Trainer") as caught:
        ObjectiveLoss(goal, vocabulary(STUDENT_ROWS))
    assert caught.value.code == "trainer-unsupported"


def test_what_stands_for_labels_counts_as_labels_do_and_is_no_sequence() -> None:
    sequences = tuple(SEQUENCES.values())
    labels = text_targets(sequences, vocabulary(STUDENT_ROWS))
    taught = TaughtCollator(lambda _: Batch(sequences=sequences, targets=labels, labels=labels))([{"record": None}])["labels"]
    assert isinstance(taught, Taught)
    scored = sum(len(sequence.scored_rows) for sequence in sequences)
    assert int(taught.ne(-100).sum()) == int(taught[..., 1:].ne(-100).sum()) == scored
    assert isinstance(taught.to("cpu", non_blocking=True).labels, TextTargets)
    with pytest.raises(TypeError, match="not iterable"):
        iter(taught)


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
