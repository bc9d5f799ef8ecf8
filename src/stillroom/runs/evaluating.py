"""The evaluate stage: teacher, student, the student before training and the baseline on the same items; fidelity; cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel

from stillroom.core import durable
from stillroom.core.clock import iso, now
from stillroom.core.errors import DataError
from stillroom.core.identities import Sampling, TokenIds, TokenSequence
from stillroom.core.interrupts import StopRequest
from stillroom.core.seeds import derive_seed
from stillroom.data import Prompt, TransferSet
from stillroom.evals.cost import CostSubject, measure_cost
from stillroom.evals.fidelity import measure_fidelity
from stillroom.evals.tasks import Item, ItemScores, score_items
from stillroom.ledger import Ledger
from stillroom.models.loading import describe, load_model
from stillroom.models.local import COMPARED_AT_ONCE, VALUES_AT_ONCE, LocalTeacher
from stillroom.models.rollouts import decode
from stillroom.runs.buying import EVALUATE, Purchases
from stillroom.runs.collecting import sampling_of, store_identity
from stillroom.runs.directory import Run
from stillroom.runs.observer import Observer
from stillroom.runs.planning import Prepared
from stillroom.runs.summaries import Evaluation, read
from stillroom.runs.training import split, untrained_student, whole_student
from stillroom.targets.store import TargetStore

_STEPS = 6


class Evaluator:
    """Runs the stage for one run; what has its file in evals/ is not measured again."""

    def __init__(
        self, run: Run, prepared: Prepared, teacher: LocalTeacher | Purchases, ledger: Ledger, observer: Observer, stop: StopRequest
    ) -> None:
        self.run, self.prepared, self.ledger = run, prepared, ledger
        self.teacher = teacher if isinstance(teacher, LocalTeacher) else None
        self.purchases = teacher if isinstance(teacher, Purchases) else None
        self.observer, self.stop = observer, stop
        self._done = 0
        self._student_directory = run.student_path

    def evaluate(self) -> None:
        """Every measurement, then samples.jsonl and the summary. Raises Interrupted between two measurements."""
        began = time.monotonic()
        self.run.evals_path.mkdir(exist_ok=True)
        with whole_student(self.run, self.prepared, self.run.evals_path / ".merged") as self._student_directory:
            self._measure_all()
        done = Evaluation(
            seconds=round(time.monotonic() - began, 3),
            time=iso(now()),
            ledger_head=self.ledger.head,
            ledger_entries=self.ledger.count,
        )
        durable.write_json_atomic(self.run.evaluated_path, done.model_dump(mode="json"))

    def _measure_all(self) -> None:
        if self._items:
            self._measure("teacher", self._teacher_answers)
            self._score("student", lambda: self._student)
            self._score("student_before", lambda: untrained_student(self.prepared, self.teacher).eval())
            if self.run.recipe.evaluation.label_only is not None:
                self._score("label_only", lambda: self._loaded(self.run.label_only_path / "student"))
            self._write_samples()
        if self.teacher is not None:
            self._measure("fidelity", partial(self._fidelity, self.teacher))
        self._measure("cost", self._cost)

    def _measure(self, name: str, measured: Callable[[], BaseModel]) -> None:
        path = self.run.evals_path / f"{name}.json"
        if not path.exists():
            durable.write_bytes_atomic(path, measured().model_dump_json().encode())
        self._done += 1
        self.observer.progress(self._done, _STEPS, "measurements", {"last": name})
        self.stop.check(f"after measuring {name}")

    # --- answers ----------------------------------------------------------------------------------------------------------------------

    @cached_property
    def _items(self) -> tuple[Prompt, ...]:
        """What every model is scored on: all items, but those that an endpoint gave no answer to. They are no wrong answers, and requests.json has them."""
        items = self.prepared.inputs.items
        if self.purchases is None or not items:
            return items
        return tuple(item for item, text in zip(items, self._bought, strict=True) if text is not None)

    @cached_property
    def _bought(self) -> list[str | None]:
        assert self.purchases is not None
        texts = self.purchases.texts(EVALUATE, self.prepared.inputs.items)
        self.purchases.write_summary(self.run)
        missing = texts.count(None)
        if missing == len(texts):
            raise DataError(
                "items-invalid",
                found=f"none of {missing} evaluation items has an answer of the teacher's",
                expected="one at least",
                do="requests.json says why each request failed.",
            )
        if missing:
            self.observer.note(f"the endpoint gave no answer to {missing} of {len(texts)} items: no model is scored on them")
        return texts

    def _teacher_answers(self) -> ItemScores:
        if self.purchases is None:
            assert self.teacher is not None
            return self._answers("teacher", self.teacher.model)
        return score_items("teacher", [text for text in self._bought if text is not None], self._asked)

    @property
    def _asked(self) -> list[Item]:
        return [Item(prompt=item.content, answer=item.answer or "", family=item.family) for item in self._items]

    def _score(self, name: str, model: Callable[[], PreTrainedModel]) -> None:
        self._measure(name, lambda: self._answers(name, model()))

    def _answers(self, name: str, model: PreTrainedModel) -> ItemScores:
        prompts = [self.prepared.renderer.prompt_ids(item) for item in self._items]
        completions = self._decode(model, prompts, self.run.recipe.generation.max_new_tokens)
        return score_items(name, [self.prepared.renderer.answer_text(completion) for completion in completions], self._asked)

    def _decode(self, model: PreTrainedModel, prompts: Sequence[TokenIds], max_new_tokens: int, *, stop_at_end: bool = True) -> list[TokenIds]:
        """Greedy answers; one decoder for all models, so that they compare."""
        vocabulary = self.prepared.teacher_vocabulary
        return decode(
            model,
            prompts,
            Sampling(max_new_tokens=max_new_tokens),
            end_ids=frozenset(vocabulary.end_ids),
            size=vocabulary.size,
            at_once=self.prepared.plan.hardware.teacher_at_once,
            stop_at_end=stop_at_end,
        )

    @cached_property
    def _student(self) -> PreTrainedModel:
        return self._loaded(self._student_directory)

    def _loaded(self, directory: Path) -> PreTrainedModel:
        return load_model(describe(str(directory)), self.prepared.dtype, self.prepared.device)

    def _write_samples(self) -> None:
        teacher, student = (read(self.run.evals_path / f"{name}.json", ItemScores) for name in ("teacher", "student"))
        lines = [
            json.dumps(
                {"prompt": one.prompt, "expected": one.expected, "family": one.family, "teacher": one.answer, "student": other.answer},
                ensure_ascii=False,
            )
            for one, other in zip(teacher.items, student.items, strict=True)
        ]
        durable.write_bytes_atomic(self.run.directory / "samples.jsonl", "".join(f"{line}\n" for line in lines).encode())

    # --- fidelity and cost ------------------------------------------------------------------------------------------------------------

    def _fidelity(self, teacher: LocalTeacher) -> BaseModel:
        student = LocalTeacher(self._student, teacher.ref, self.prepared.student.vocabulary, at_once=teacher.at_once)

        def rows(model: LocalTeacher) -> Callable[[Sequence[TokenSequence]], torch.Tensor]:
            return lambda sequences: model.log_probs(model.hidden_states(sequences), 1.0)

        sequences = self._held_out_sequences(teacher)
        longest = max([1, *(len(sequence.scored_rows) for sequence in sequences)])
        size = self.prepared.teacher_vocabulary.size
        return measure_fidelity(
            rows(teacher),
            rows(student),
            sequences,
            sequences_per_chunk=min(teacher.at_once, max(1, VALUES_AT_ONCE // (longest * size))),
            rows_per_chunk=max(1, COMPARED_AT_ONCE // size),
        )

    def _held_out_sequences(self, teacher: LocalTeacher) -> list[TokenSequence]:
        """The teacher's own answers to prompts that the student was not trained on."""
        count = self.run.recipe.evaluation.fidelity_prompts
        if not self._items:
            ids = TransferSet.load(self.run.transfer_set_path).ids
            fraction = self.run.recipe.training.validation_fraction
            _, validation = split(ids, fraction, derive_seed(self.run.recipe.seed, "validation"))
            return TargetStore.open(self.run.store_path, store_identity(self.prepared)).sequences(validation[:count])
        chosen = self._items[:count]
        sampling = sampling_of(self.prepared)
        completions = teacher.generate([self.prepared.renderer.prompt_ids(item) for item in chosen], sampling)
        return [self.prepared.renderer.sequence(item, completion=completion) for item, completion in zip(chosen, completions, strict=True)]

    def _cost(self) -> BaseModel:
        prompts = [self.prepared.renderer.prompt_ids(item) for item in (self._items or self.prepared.prompts.prompts)[:200]]

        def subject(model: PreTrainedModel, directory: Path) -> CostSubject:
            return CostSubject(
                model=model,
                directory=directory,
                answer=lambda asked, most: self._decode(model, asked, most),
                answer_at_length=lambda asked, length: self._decode(model, asked, length, stop_at_end=False),
            )

        return measure_cost(
            subject(self.teacher.model, self.prepared.local_teacher.directory) if self.teacher is not None else None,
            subject(self._student, self._student_directory),
            prompts,
            max_new_tokens=self.run.recipe.generation.max_new_tokens,
            resamples=self.run.recipe.evaluation.resamples,
            seed=derive_seed(self.run.recipe.seed, "cost"),
        )
