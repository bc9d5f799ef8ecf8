"""The stages of a run, each from what the one before left on disk: planned, collected, trained, evaluated, reported."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from stillroom import web
from stillroom.core import durable
from stillroom.core.errors import RecipeError, ResourceError
from stillroom.core.identities import Sampling
from stillroom.core.interrupts import StopRequest
from stillroom.data import Prompt, load_prompts
from stillroom.ledger import Ledger
from stillroom.models.arithmetic import compile_body, quantise
from stillroom.models.loading import describe, load_model, silence
from stillroom.models.local import LocalTeacher
from stillroom.models.memory import release_memory
from stillroom.models.packing import require_packing
from stillroom.models.parallel import Processes, join, mode_of
from stillroom.runs.buying import COMPARE, BoughtAnswers, Purchases
from stillroom.runs.card import student_card
from stillroom.runs.collecting import Answering, Collector, LocalAnswers
from stillroom.runs.directory import STATES, Run, environment
from stillroom.runs.evaluating import Evaluator
from stillroom.runs.gates import Gates
from stillroom.runs.observer import Observer, Silent
from stillroom.runs.plan import Plan
from stillroom.runs.planning import Prepared, prepare
from stillroom.runs.recipe import Recipe
from stillroom.runs.reporting import build_report
from stillroom.runs.summaries import Bought, read
from stillroom.runs.training import Trainer, whole_student

# In the place of a text: the endpoint refused, or failed for good. `stillroom requests` says why.
_NO_ANSWER = "(no answer)"
_COMMANDS = {"planned": "plan", "collected": "collect", "trained": "train", "evaluated": "evaluate", "reported": "report"}


def run(recipe: Recipe, out: Path, *, until: str, needs: str | None, observer: Observer) -> Run:
    """See stillroom.runs.run. Processes that torchrun started call it together: the first does everything but train, where all of them take part."""
    processes = join()
    found = Run.begin(recipe, out)
    # transformers speaks of attention masks and loading; what a person should know of a run is said by the run.
    with (
        processes.together(),
        durable.full_disk_reported(found.directory),
        silence(),
        found.locked() if processes.is_first else nullcontext(),
        StopRequest(f"To resume, run the same command again with --out {out}.") as stop,
    ):
        if mode_of(recipe.hardware.parallel, processes) == "shard":
            _require_whole_state(recipe)
        if needs is not None:
            processes.first(lambda: found.require(needs, _COMMANDS[needs]))
        return Stages(found, observer if processes.is_first else Silent(), stop, processes).run_until(until)


def _require_whole_state(recipe: Recipe) -> None:
    """Raises ResourceError 'parallel-unavailable' for what is only there for a student that each process holds whole."""
    asked = [
        name for name, wanted in (("student.lora", recipe.student.lora), ("training.optimiser_offload", recipe.training.optimiser_offload)) if wanted
    ]
    if asked:
        raise ResourceError(
            "parallel-unavailable",
            found=f"hardware.parallel is shard, and the recipe has {' and '.join(asked)}",
            expected="a student that is learned whole, its optimiser beside its parts",
            do=f"Set hardware.parallel to replicate, or leave {' and '.join(asked)} out.",
        )


def collect_shard(recipe: Recipe, out: Path, index: int, count: int, *, observer: Observer) -> Bought:
    """See stillroom.runs.collect_shard."""
    if recipe.teacher.endpoint is None or recipe.prompts.answers == "given":
        raise RecipeError(
            "recipe-invalid",
            found="a shard of a collection, of a recipe in which nothing is asked of an endpoint",
            expected="teacher.endpoint, and prompts.answers that are not all given",
            do="Give the command without --shard: what a model here answers is not divided.",
        )
    found = Run.begin(recipe, out)
    again = f"To resume, run the same command again with --out {out}."
    with durable.full_disk_reported(found.directory), silence(), found.locked(), StopRequest(again) as stop:
        prepared = prepare(recipe, out=found.directory, planned=plan_of(found), gate=True)
        with Purchases.opened(found, prepared, observer, stop) as purchases:
            rows = BoughtAnswers(purchases, found).buy_shard(prepared.prompts.prompts, index, count)
            observer.note(f"{rows:,} of {len(prepared.prompts.prompts):,} prompts are this machine's, and bought")
            return purchases.summary()


class Stages:
    """One run being taken further. Models are loaded when a stage needs them and let go when it ends."""

    def __init__(self, run: Run, observer: Observer, stop: StopRequest, processes: Processes) -> None:
        self.run, self.observer, self.stop, self.processes = run, observer, stop, processes
        self.gates = Gates(run, observer)
        self._prepared: Prepared | None = None

    def run_until(self, until: str) -> Run:
        """Every stage up to `until` that has not been done. The first process does it, but that all of them train."""
        steps: dict[str, Callable[[], None]] = {
            "planned": self._plan,
            "collected": self._collect,
            "evaluated": self._evaluate,
            "reported": self._report,
        }
        for state in STATES[1 : STATES.index(until) + 1]:
            if self.processes.asked_of_first(partial(self._before, state)):
                if state == "trained":
                    self._train()
                else:
                    self.processes.first(steps[state])
                release_memory()
        return self.run

    def _before(self, state: str) -> bool:
        return STATES.index(self.run.state) < STATES.index(state)

    @property
    def prepared(self) -> Prepared:
        """The recipe, checked; gate 1 is passed here, so nothing can be spent without it."""
        if self._prepared is None:
            prepared = prepare(self.run.recipe, out=self.run.directory, planned=plan_of(self.run), gate=True)
            torch.set_num_threads(prepared.plan.hardware.threads)
            torch.use_deterministic_algorithms(True, warn_only=True)
            if self.run.state != "new" and self.processes.is_first:
                # A cap may have been raised since.
                if durable.read_json(self.run.recipe_path) != (recipe := self.run.recipe.model_dump(mode="json")):
                    durable.write_json_atomic(self.run.recipe_path, recipe)
                self.gates.keep(prepared.verdict)
            self._prepared = prepared
        return self._prepared

    def _plan(self) -> None:
        self.observer.stage("plan", "checking recipe, models, prompts and terms")
        prepared = self.prepared
        plan = prepared.plan
        durable.require_free_bytes(self.run.directory, plan.estimate.disk_bytes, "targets, checkpoints and the student")
        durable.write_json_atomic(self.run.recipe_path, self.run.recipe.model_dump(mode="json"))
        durable.write_json_atomic(self.run.plan_path, plan.model_dump(mode="json"))
        self.gates.keep(prepared.verdict)
        durable.write_json_atomic(self.run.env_path, environment())
        for warning in plan.warnings:
            self.observer.note(f"warning: {warning}")
        self.observer.note(
            f"teacher {plan.teacher.source if plan.teacher.parameters is None else f'{plan.teacher.parameters:,} parameters'}, "
            f"student {plan.student.parameters:,}; signal {plan.signal.kind}; about {sum(plan.estimate.seconds.values()) / 60:.1f} minutes"
        )

    def _collect(self) -> None:
        prepared = self.prepared
        self.observer.stage("collect", f"the teacher answers {prepared.plan.prompts.count:,} prompts")
        if prepared.endpoint_teacher is None:
            self._collect_from(LocalAnswers(prepared, self._teacher()))
            return
        with Purchases.opened(self.run, prepared, self.observer, self.stop) as purchases:
            self._collect_from(BoughtAnswers(purchases, self.run))

    def _collect_from(self, answering: Answering) -> None:
        Collector(self.run, self.prepared, answering, self._ledger(), self.gates, self.observer, self.stop).collect()

    def _train(self) -> None:
        # The first prepares before the others look: what is fetched, is fetched once, and a refusal is the first's to say.
        self.processes.first(lambda: self.prepared)
        prepared = self.prepared
        live = prepared.plan.signal.live and prepared.plan.signal.kind != "text"
        teacher = self._teacher() if live or self.run.recipe.student.from_teacher is not None else None
        ledgers: list[Ledger] = []
        self.processes.first(lambda: ledgers.append(self._ledger()))
        Trainer(self.run, prepared, teacher, ledgers[0] if ledgers else None, self.gates, self.observer, self.stop, self.processes).train()

    def _evaluate(self) -> None:
        self.observer.stage("evaluate", "teacher, student and baseline on the same items")
        if self.prepared.endpoint_teacher is None:
            self._evaluate_with(self._teacher())
            return
        with Purchases.opened(self.run, self.prepared, self.observer, self.stop) as purchases:
            self._evaluate_with(purchases)

    def _evaluate_with(self, teacher: LocalTeacher | Purchases) -> None:
        Evaluator(self.run, self.prepared, teacher, self._ledger(), self.observer, self.stop).evaluate()

    def _report(self) -> None:
        self.observer.stage("report", "writing report.json and report.html")
        report = build_report(self.run)
        durable.write_bytes_atomic(self.run.student_path / "README.md", student_card(report, adapter=self.run.recipe.student.saves_adapter).encode())
        durable.write_json_atomic(self.run.report_path, report.model_dump(mode="json"))
        web.write(self.run.directory)

    def _ledger(self) -> Ledger:
        return Ledger.open(self.run.directory)

    def _teacher(self) -> LocalTeacher:
        return teacher_of(self.prepared)


def compare(run: Run, *, prompt: str | None, file: Path | None) -> list[tuple[str, str, str]]:
    """Prompt, teacher's answer, student's answer, for one prompt or for each of a file."""
    run.require("trained", "train")
    behind_endpoint = run.recipe.teacher.endpoint is not None
    prepared = prepare(run.recipe, out=run.directory, planned=plan_of(run), gate=behind_endpoint)
    typed = (Prompt.of(prompt),) if prompt is not None else load_prompts(file).prompts
    asked = prepared.inputs.taken_in(typed)
    ids = [prepared.renderer.prompt_ids(one) for one in asked]
    sampling = Sampling(max_new_tokens=run.recipe.generation.max_new_tokens)
    teacher = None if behind_endpoint else teacher_of(prepared)
    with whole_student(run, prepared, run.directory / f".merged-{os.getpid()}") as directory:
        model = load_model(describe(str(directory)), prepared.dtype, prepared.device)
    student = LocalTeacher(model, prepared.teacher.ref, prepared.teacher_vocabulary)

    def written(by: LocalTeacher) -> list[str]:
        return [prepared.renderer.answer_text(completion) for completion in by.generate(ids, sampling)]

    if teacher is None:
        with run.locked(), Purchases.opened(run, prepared, Silent(), None) as purchases:
            answers = [[_NO_ANSWER if text is None else text for text in purchases.texts(COMPARE, asked)], written(student)]
    else:
        answers = [written(teacher), written(student)]
    shown = [[prepared.inputs.shown(one, text) for one, text in zip(asked, texts, strict=True)] for texts in answers]
    return [(one.content, *pair) for one, *pair in zip(typed, *shown, strict=True)]


def plan_of(run: Run) -> Plan | None:
    """The plan that was made when the run began, if it has begun."""
    return read(run.plan_path, Plan) if run.state != "new" else None


def teacher_of(prepared: Prepared) -> LocalTeacher:
    """The teacher, loaded on the plan's device for it and computing as the plan says."""
    hardware = prepared.plan.hardware
    if hardware.teacher_dtype == "int8":
        # In the processor's memory, so that the device needs room for what is left of it alone.
        model = load_model(prepared.local_teacher, prepared.teacher_dtype)
        quantise(model)
        torch.nn.Module.to(model, prepared.teacher_device)
    else:
        model = load_model(prepared.local_teacher, prepared.teacher_dtype, prepared.teacher_device)
    if "teacher" in hardware.packing:
        require_packing(model, "teacher")
    if prepared.recipe.hardware.compile:
        compile_body(model)
    return LocalTeacher(model, prepared.teacher.ref, prepared.teacher_vocabulary, at_once=hardware.teacher_at_once)
