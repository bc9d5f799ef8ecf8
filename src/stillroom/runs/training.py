"""The train stage: the student on the transfer set, and the baseline that sees labels alone. Both go through the one loop."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from stillroom.core import durable
from stillroom.core.errors import DataError
from stillroom.core.hashing import sha256_file
from stillroom.core.identities import TokenSequence
from stillroom.core.interrupts import StopRequest
from stillroom.core.seeds import derive_seed
from stillroom.data import TransferSet
from stillroom.ledger import Ledger, Trained
from stillroom.models.adapters import WEIGHTS, add_lora, load_adapter, merged
from stillroom.models.arithmetic import compile_body, recompute_layers
from stillroom.models.export import export_adapter, export_student
from stillroom.models.loading import build_from_scratch, build_from_teacher, empty_model, load_model
from stillroom.models.local import LocalTeacher
from stillroom.models.memory import release_memory
from stillroom.models.packing import pack_as_proved, require_packing
from stillroom.models.parallel import Processes, Sharding, mode_of, stored_by_parameter
from stillroom.models.student import OptimiserSettings, TransformersStudent
from stillroom.objectives.divergences import cross_entropy
from stillroom.objectives.matching import StateMatch, new_projections
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.runs.collecting import request_of, store_identity
from stillroom.runs.directory import Run
from stillroom.runs.gates import Gates
from stillroom.runs.loggers import Loggers, chosen
from stillroom.runs.loop import BatchSource, Loop, LoopSettings, Progress
from stillroom.runs.observer import Observer
from stillroom.runs.planning import Prepared, lora_of
from stillroom.runs.recipe import LabelOnlySection
from stillroom.runs.sources import LiveSource, StoredSource, TextSource
from stillroom.runs.summaries import Training
from stillroom.targets.store import TargetStore, record_id

_UNREPORTED = "A student that is still being made by Stillroom; its report is not written yet.\n"


class Trainer:
    """Runs the stage for one run. `teacher` is needed where targets are live or the student starts from its layers.

    Of several `processes` each runs it; the first has the ledger, and writes.
    """

    def __init__(
        self,
        run: Run,
        prepared: Prepared,
        teacher: LocalTeacher | None,
        ledger: Ledger | None,
        gates: Gates,
        observer: Observer,
        stop: StopRequest,
        processes: Processes,
    ) -> None:
        self.processes = processes
        self.run, self.prepared, self.teacher, self.ledger = run, prepared, teacher, ledger
        self.gates, self.observer, self.stop = gates, observer, stop

    def train(self) -> None:
        """Student, then baseline, then training.json. Every record that is used must be in the ledger, and its decision must hold: gate 3."""
        transfer_set = TransferSet.load(self.run.transfer_set_path)
        store = TargetStore.open(self.run.store_path, store_identity(self.prepared))
        self.processes.first(lambda: transfer_set.require_backed(self._ledger, store))
        records, validation = split(transfer_set.ids, self.prepared.recipe.training.validation_fraction, derive_seed(self._seed, "validation"))
        progress = self._train_student(store, records, validation)
        release_memory()
        label_only = self.prepared.recipe.evaluation.label_only
        baseline = self._train_label_only(label_only) if label_only is not None else None
        self.processes.first(lambda: self._record(progress, baseline, records, validation, store))

    def _record(self, progress: Progress, baseline: Progress | None, records: Sequence[str], validation: Sequence[str], store: TargetStore) -> None:
        done = Training(
            steps=progress.step,
            scored_tokens=progress.scored_tokens,
            seconds=round(progress.seconds, 3),
            halvings=progress.halvings,
            processes=self.processes.size,
            parallel=mode_of(self.prepared.recipe.hardware.parallel, self.processes),
            records=len(records),
            validation_records=len(validation),
            weights_sha256=sha256_file(self.run.student_path / (WEIGHTS if self.run.recipe.student.saves_adapter else "model.safetensors")),
            store_sha256=store.sha256,
            label_only_steps=baseline.best_step if baseline else None,
            label_only_seconds=round(baseline.seconds, 3) if baseline else None,
            logger_failures=[
                failure for directory in (self.run.directory, self.run.label_only_path) for failure in self._loggers(directory, "").failures
            ],
        )
        durable.write_json_atomic(self.run.trained_path, done.model_dump(mode="json"))

    def _train_student(self, store: TargetStore, records: Sequence[str], validation: Sequence[str]) -> Progress:
        student = self._student(matches=self.prepared.objective.state_matches)
        self.observer.stage("train", f"{self.prepared.student.trainable:,} parameters on {len(records):,} records, {self._steps:,} steps")
        progress = Loop(
            student,
            self.prepared.objective,
            self._source(store),
            records,
            validation,
            self._settings(self._steps, len(records)),
            self.run.directory,
            observer=self.observer,
            stop=self.stop,
            consumed=self._enter,
            admitted=lambda records: self.gates.admit(records, self._ledger),
            loggers=self._loggers(self.run.directory, self.prepared.recipe.name),
        ).run()
        self._export(student, "student")
        return progress

    @property
    def _ledger(self) -> Ledger:
        assert self.ledger is not None, "only the first process has the ledger open"
        return self.ledger

    @property
    def _seed(self) -> int:
        return self.prepared.recipe.seed

    @property
    def _steps(self) -> int:
        return self.prepared.plan.steps

    def _student(self, matches: Sequence[StateMatch] = ()) -> TransformersStudent:
        training = self.prepared.recipe.training
        settings = OptimiserSettings(
            weight_decay=training.weight_decay, betas=training.adam_betas, clip_norm=training.clip_norm, offload=training.optimiser_offload
        )
        model, sharding = self._untrained()
        lora = lora_of(self.prepared.recipe)
        return TransformersStudent(
            self._engine(model if lora is None else add_lora(model, lora)),
            self.prepared.student.vocabulary,
            settings,
            dtype=self.prepared.dtype,
            rows_per_chunk=training.rows_per_chunk,
            projections=new_projections(matches, student_width=self.prepared.student.shape.width, teacher_width=self._teacher_width, seed=self._seed),
            processes=self.processes,
            sharding=sharding,
        )

    @property
    def _teacher_width(self) -> int:
        """Only terms on hidden states look at it, and those are for a teacher whose weights are here."""
        return 0 if self.prepared.endpoint_teacher is not None else self.prepared.local_teacher.shape.width

    def _engine(self, model: PreTrainedModel) -> PreTrainedModel:
        """The same model, going through its passes as recipe and plan say."""
        model.float().eval()
        if "student" in self.prepared.plan.hardware.packing:
            if model.device.type == "meta":  # its parts are read later; the plan proved it on a copy
                pack_as_proved(model)
            else:
                require_packing(model, "student", self.prepared.dtype)
        if self.prepared.recipe.training.gradient_checkpointing:
            recompute_layers(model)
        if self.prepared.recipe.hardware.compile:
            compile_body(model)
        return model

    def _untrained(self) -> tuple[PreTrainedModel, Sharding | None]:
        """The student before its first step, and how it is cut into parts; weights on disk are then read part by part."""
        if mode_of(self.prepared.recipe.hardware.parallel, self.processes) != "shard":
            return untrained_student(self.prepared, self.teacher), None
        description = self.prepared.student.description
        if description is None:
            return untrained_on_cpu(self.prepared, self.teacher), Sharding(device=self.prepared.device)
        empty = empty_model(description.config)
        if stored_by_parameter(empty, description.weight_files):
            return empty, Sharding(device=self.prepared.device, weights=description.directory)
        self.observer.note(
            f"{description.source} is not stored parameter by parameter: each process reads the whole student before it keeps its part"
        )
        return load_model(description), Sharding(device=self.prepared.device)

    def _settings(self, steps: int, records: int) -> LoopSettings:
        training = self.prepared.recipe.training
        return LoopSettings(
            steps=steps,
            sequences_per_step=training.sequences_per_step,
            micro_batch=self.prepared.plan.hardware.micro_batch,
            learning_rate=training.learning_rate,
            schedule=training.schedule,
            warmup_steps=min(training.warmup_steps, steps),
            validate_every=training.validate_every,
            checkpoint_every=training.checkpoint_every,
            seed=self._seed,
            length_window=training.length_window,
            min_learning_rate=training.min_learning_rate,
            decay_steps=max(1, round(training.decay_fraction * steps)),
        )

    def _loggers(self, directory: Path, title: str) -> Loggers:
        """Of the recipe they are told its identity and the loop's settings; paths and what is intended stay here."""
        recipe = self.prepared.recipe
        facts = {"recipe_sha256": recipe.sha256, "seed": recipe.seed, **recipe.training.model_dump(mode="json")}
        return Loggers(chosen(recipe.logging), directory, self.observer, project=recipe.logging.project, title=title, facts=facts)

    def _source(self, store: TargetStore) -> BatchSource:
        signal, vocabulary = self.prepared.plan.signal, self.prepared.teacher_vocabulary
        if not signal.live and signal.kind != "text":
            return StoredSource(store, vocabulary)
        sequences = dict(zip(store.record_ids, store.sequences(store.record_ids), strict=True))
        if signal.kind == "text":
            return TextSource(sequences, vocabulary)
        assert self.teacher is not None
        return LiveSource(self.teacher, sequences, request_of(self.prepared))

    def _enter(self, records: Sequence[str]) -> None:
        """The records that finished steps consumed, each entered once."""
        self._ledger.append(Trained(record_id=record) for record in dict.fromkeys(records))

    def _export(self, student: TransformersStudent, name: str) -> None:
        directory = self.run.student_path if name == "student" else self.run.label_only_path / "student"
        tokenizer, end_ids, model = self.prepared.tokenizer, self.prepared.teacher_vocabulary.end_ids, student.whole_model()

        def export() -> None:
            assert model is not None, "the first process has it"
            if name != "student" or not self.run.recipe.student.saves_adapter:
                whole = model if self.prepared.recipe.student.lora is None else merged(model)
                export_student(whole, tokenizer, directory, _UNREPORTED, end_ids=end_ids)
                return
            base = self.prepared.student.description
            assert base is not None, "the recipe sees to that"
            source = base.source if base.ref.kind == "hub" else str(base.directory)
            export_adapter(model, tokenizer, directory, _UNREPORTED, base=source, revision=base.revision, end_ids=end_ids)

        self.processes.first(export)

    # --- the baseline -----------------------------------------------------------------------------------------------------------------

    def _train_label_only(self, section: LabelOnlySection) -> Progress:
        sequences = self._labelled(section)
        seed = derive_seed(self._seed, "label_only")
        records, validation = split(tuple(sequences), section.validation_fraction, seed)
        self.observer.stage("label-only", f"the same architecture on {len(records)} labelled pairs, stopped on {len(validation)} others")
        student = self._student()
        settings = self._settings(self._steps, len(records))
        per_step = min(settings.sequences_per_step, len(records))
        settings = LoopSettings(
            steps=settings.steps,
            sequences_per_step=per_step,
            micro_batch=min(settings.micro_batch, per_step),
            learning_rate=section.learning_rate or settings.learning_rate,
            schedule="constant",
            warmup_steps=min(settings.warmup_steps, 20),
            validate_every=section.validate_every,
            checkpoint_every=settings.checkpoint_every,
            seed=seed,
            patience=section.patience,
        )
        objective = Objective(terms=(WeightedTerm(divergence=cross_entropy()),))
        source = TextSource(sequences, self.prepared.teacher_vocabulary)
        directory = self.run.label_only_path
        loggers = self._loggers(directory, f"{self.prepared.recipe.name} label-only")
        loop = Loop(student, objective, source, records, validation, settings, directory, observer=self.observer, stop=self.stop, loggers=loggers)
        progress = loop.run()
        self._export(student, "label_only")
        return progress

    def _labelled(self, section: LabelOnlySection) -> dict[str, TokenSequence]:
        sequences: dict[str, TokenSequence] = {}
        for prompt in self.prepared.inputs.pairs:
            sequence = self.prepared.renderer.sequence(prompt, prompt.answer)
            if len(sequence.ids) <= self.prepared.context_tokens:
                sequences[record_id(sequence)] = sequence
        if len(sequences) < 2:
            raise DataError(
                "items-invalid",
                found=f"{len(sequences)} usable items in {section.path}",
                expected="at least two: one to train on and one to stop on",
                do="Give more labelled items.",
            )
        return sequences


@contextmanager
def whole_student(run: Run, prepared: Prepared, place: Path) -> Iterator[Path]:
    """The directory of a student that can be run: student/, or where that has an adapter alone, `place`, which has it merged for as long as this lasts."""
    if not run.recipe.student.saves_adapter:
        yield run.student_path
        return
    lora = lora_of(run.recipe)
    assert lora is not None
    model = add_lora(untrained_on_cpu(prepared, None), lora)
    load_adapter(model, run.student_path)
    try:
        export_student(merged(model), prepared.tokenizer, place, _UNREPORTED, end_ids=prepared.teacher_vocabulary.end_ids)
        del model
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def untrained_student(prepared: Prepared, teacher: LocalTeacher | None) -> PreTrainedModel:
    """The student before its first step, float32: the same for the same recipe, and the same for student and baseline."""
    model = untrained_on_cpu(prepared, teacher)
    torch.nn.Module.to(model, prepared.device)
    return model


def untrained_on_cpu(prepared: Prepared, teacher: LocalTeacher | None) -> PreTrainedModel:
    """The same in the memory of the processor."""
    section, plan = prepared.recipe.student, prepared.student
    if plan.description is not None:
        return load_model(plan.description)
    if section.from_teacher is not None:
        # A teacher that computes in less than float32 has lost what its files have.
        whole = teacher is not None and prepared.plan.hardware.teacher_dtype == "float32"
        return build_from_teacher(teacher.model if teacher is not None and whole else prepared.local_teacher, section.from_teacher.layers)
    shape = section.from_scratch
    assert shape is not None
    return build_from_scratch(
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        feed_forward=shape.feed_forward,
        rows=plan.shape.rows,
        context_length=plan.shape.context_length or prepared.context_tokens,
        end_id=prepared.tokenizer.eos_token_id,
        pad_id=prepared.tokenizer.pad_token_id,
        seed=derive_seed(prepared.recipe.seed, "student"),
    )


def split(records: Sequence[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Training records and validation records: a random share, at least one on the training side, each side in the original order."""
    count = min(int(fraction * len(records)), len(records) - 1)
    if fraction > 0 and count == 0 and len(records) > 1:
        count = 1
    chosen = set(np.random.Generator(np.random.Philox(seed)).permutation(len(records))[:count].tolist())
    return [r for i, r in enumerate(records) if i not in chosen], [r for i, r in enumerate(records) if i in chosen]
