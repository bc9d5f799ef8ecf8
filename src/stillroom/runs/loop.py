"""The one training loop. The kinds of run differ in where a batch comes from (`BatchSource`), and in nothing else.

A step: take the next records, count their scored tokens, forward and backward micro-batch by micro-batch, one optimiser step. Everything
that decides a step is a function of (recipe, seed, step), so that a run which was killed ends with the same bytes as one which was not.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stillroom.core import durable
from stillroom.core.errors import DivergedError, Interrupted, ResourceError
from stillroom.core.interrupts import StopRequest
from stillroom.core.launch import EndedElsewhere
from stillroom.core.seeds import derive_seed
from stillroom.models.local import text_targets
from stillroom.models.memory import is_out_of_memory
from stillroom.models.student import TransformersStudent
from stillroom.objectives.objective import Objective
from stillroom.runs.loggers import Loggers
from stillroom.runs.observer import Observer
from stillroom.runs.summaries import Halving
from stillroom.targets.protocols import Batch, StepSums

_SCORED_AT_ONCE = 64


class BatchSource(Protocol):
    """Where batches come from: a store, a live teacher, or text alone."""

    def length(self, record_id: str) -> int:
        """Tokens of a record, so that similar lengths can go together."""
        ...

    def scored_tokens(self, record_ids: Sequence[str]) -> int:
        """Scored rows of these records, without asking for their targets."""
        ...

    def batches(self, parts: Sequence[Sequence[str]]) -> Iterator[Batch]:
        """For each part, when its turn comes, its records in the order asked for, with what the teacher said about them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """Everything about the loop but the model and the data. `patience` None: train to the last step and keep the last weights."""

    steps: int
    sequences_per_step: int
    micro_batch: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    validate_every: int
    checkpoint_every: int
    seed: int
    length_window: int = 1
    patience: int | None = None
    min_learning_rate: float = 0.0
    decay_steps: int = 0

    def learning_rate_at(self, step: int) -> float:
        """The rate of step `step` (from 0), a function of nothing else.

        A linear warm-up whose first step is not lost; then the schedules of transformers.optimization: cosine or linear to `min_learning_rate`,
        constant, or constant until the last `decay_steps`, over which it falls as 1 - sqrt (Haegele et al. 2024, section 3).
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        begins = max(self.warmup_steps, self.steps - self.decay_steps) if self.schedule == "warmup_stable_decay" else self.warmup_steps
        share = max(0, step - begins) / max(1, self.steps - begins)
        match self.schedule:
            case "cosine":
                left = 0.5 * (1 + math.cos(math.pi * share))
            case "linear":
                left = 1 - share
            case "warmup_stable_decay":
                left = 1 - math.sqrt(share)
            case _:
                return self.learning_rate
        return self.min_learning_rate + (self.learning_rate - self.min_learning_rate) * left


@dataclass(slots=True)
class Progress:
    """Where the loop is; saved with every checkpoint."""

    step: int = 0
    scored_tokens: int = 0
    seconds: float = 0.0
    """Of training, over all parts of an interrupted run."""
    micro_batch: int = 0
    best_nats: float = math.inf
    best_step: int = -1
    validations_without_gain: int = 0
    stopped_early: bool = False
    halvings: list[Halving] = field(default_factory=list)


def step_records(
    records: Sequence[str], step: int, per_step: int, seed: int, *, window: int = 1, length: Callable[[str], int] = lambda record: 0
) -> list[str]:
    """The records of step `step`: consecutive slices of an endless stream in which every epoch is a fresh permutation of `records`.

    With a `window` above 1 the slices of so many steps are pooled, sorted by `length` and cut again, and the steps of the window come in random
    order: each step's records are then of similar lengths, and the window's records are the same.
    """
    first = step - step % window
    pool = [_streamed(records, position, seed) for position in range(first * per_step, (first + window) * per_step)]
    if window == 1:
        return pool
    pool.sort(key=length)
    turn = int(_permutation(window, seed, "window", first)[step - first])
    return pool[turn * per_step : (turn + 1) * per_step]


def _streamed(records: Sequence[str], position: int, seed: int) -> str:
    epoch, offset = divmod(position, len(records))
    return records[int(_permutation(len(records), seed, "order", epoch)[offset])]


def share(records: Sequence[str], rank: int, size: int) -> list[str]:
    """What process `rank` of `size` takes of `records`, in their order: dealt from the last on, there and back again.

    Of records sorted by length all get about as much; of fewer records than processes, some get none.
    """
    mine = []
    for place, record in enumerate(reversed(records)):
        turn, seat = divmod(place, size)
        if rank == (seat if turn % 2 == 0 else size - 1 - seat):
            mine.append(record)
    return mine[::-1]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, *names: str | int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.Generator(np.random.Philox(derive_seed(seed, *names))).permutation(count)


class Loop:
    """Trains `student` on `records` and keeps metrics.jsonl and checkpoints/ under `directory`.

    `consumed(record_ids)` is called with the records of finished steps before the checkpoint that covers them is published, so that a ledger
    which refuses repeats holds every record that reached the weights. `admitted(record_ids)` is called with all records whenever the loop begins or
    is resumed, and raises where one of them may not be learned from.

    Where the student is trained by several processes, each runs this loop: every one takes its share of each step's records, what is logged is of all
    of them together, and the first alone calls `consumed` and `admitted` and writes.
    """

    def __init__(
        self,
        student: TransformersStudent,
        objective: Objective,
        source: BatchSource,
        records: Sequence[str],
        validation: Sequence[str],
        settings: LoopSettings,
        directory: Path,
        *,
        observer: Observer,
        stop: StopRequest,
        consumed: Callable[[Sequence[str]], None] = lambda _: None,
        admitted: Callable[[Sequence[str]], object] = lambda _: None,
        loggers: Loggers | None = None,
    ) -> None:
        self.student, self.objective, self.source = student, objective, source
        self.records, self.validation, self.settings = records, validation, settings
        self.directory, self.observer, self.stop, self.consumed, self.admitted = directory, observer, stop, consumed, admitted
        self.progress = Progress(micro_batch=settings.micro_batch)
        self.processes = student.processes
        self._nothing = _no_batch(student)
        self._since_checkpoint: list[str] = []
        self.loggers = loggers or Loggers((), directory, observer)

    def run(self) -> Progress:
        """Trains to the end (or to early stopping) from the last checkpoint. Raises Interrupted, DivergedError, ResourceError, what `admitted` does."""
        self.processes.first(lambda: self.admitted([*self.records, *self.validation]))
        self._resume()
        try:
            self._train()
        finally:
            self.loggers.close()
        if self.settings.patience is not None and self.progress.best_step >= 0:
            self.student.load(self.directory / "best")
        return self.progress

    def _train(self) -> None:
        began, before, began_tokens = time.monotonic(), self.progress.seconds, self.progress.scored_tokens
        while self.progress.step < self.settings.steps and not self.progress.stopped_early:
            self._one_step(began, began_tokens)
            if self._due(self.settings.validate_every):
                self._validate()
            self.progress.seconds = before + time.monotonic() - began
            # A signal may have come to one process alone, or not yet to all: they stop after the same step.
            stopping = self.processes.add([self.stop.asked])[0] > 0
            if self._due(self.settings.checkpoint_every) or self.progress.stopped_early or stopping:
                self._checkpoint()
            if stopping:
                # All of them know, so that one can say it, whichever of them ends first.
                if not self.processes.is_first:
                    raise EndedElsewhere(Interrupted.exit_code)
                self.stop.ask()
                self.stop.check(f"after step {self.progress.step} of {self.settings.steps}")

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.settings.steps

    def _one_step(self, began: float, began_tokens: int) -> None:
        step = self.progress.step
        settings = self.settings
        records = step_records(
            self.records, step, settings.sequences_per_step, settings.seed, window=settings.length_window, length=self.source.length
        )
        sums = self._accumulate(records)
        if not math.isfinite(sums.objective_nats):
            raise self._diverged(f"an objective of {sums.objective_nats} at step {step + 1}")
        rate = self.settings.learning_rate_at(step)
        norm = self.student.optim_step(rate)
        if not math.isfinite(norm):
            raise self._diverged(f"a gradient norm of {norm} at step {step + 1}")
        self.progress.step += 1
        self.progress.scored_tokens += sums.scored_tokens
        self._since_checkpoint.extend(records)
        seconds = time.monotonic() - began
        speed = (self.progress.scored_tokens - began_tokens) / max(seconds, 1e-9)
        self._log("train", sums, learning_rate=rate, gradient_norm=norm, wall={"seconds": round(seconds, 3), "tokens_per_second": round(speed, 1)})
        nats = sums.objective_nats / max(1, sums.scored_tokens)
        self.observer.progress(self.progress.step, self.settings.steps, "step", {"nats/token": f"{nats:.4f}", "tokens/s": f"{speed:,.0f}"})

    def _accumulate(self, records: Sequence[str]) -> StepSums:
        """The whole step's gradient; where a micro-batch does not fit into memory, the step is begun again with half of it."""
        ordered = sorted(records, key=lambda record: (self.source.length(record), record))
        while True:
            sums, error = self._attempt(ordered)
            fits = error is None or not is_out_of_memory(error)
            too_large, failed, sums = self._added_up(sums, not fits, error is not None and fits)
            if failed:
                raise error if error is not None and fits else EndedElsewhere(1)
            if not too_large:
                return sums
            self.student.drop_gradient()
            if self.progress.micro_batch == 1:
                raise self._out_of_memory(records) from error
            self._halve()

    def _attempt(self, ordered: Sequence[str]) -> tuple[StepSums, Exception | None]:
        """The sums of this process's share, or why there are none."""
        try:
            return self._accumulate_in(ordered, self.progress.micro_batch), None
        except Exception as error:
            if self.student.in_step:
                # The others wait for this process in the middle of a pass, and cannot be asked: the run ends.
                if is_out_of_memory(error):
                    raise self._half_next_time(ordered) from error
                raise
            # Without the frames that it came through, which hold what did not fit.
            return StepSums(objective_nats=0.0), error.with_traceback(None) if is_out_of_memory(error) else error

    def _accumulate_in(self, ordered: Sequence[str], micro_batch: int) -> StepSums:
        # Counted over all shares, and before any batch is made, so that no more than one of them has to be held.
        divide_by = max(1, self.source.scored_tokens(ordered))
        return _added([self.student.forward_backward(batch, self.objective, divide_by) for batch in self._batches(ordered, micro_batch)])

    def _batches(self, records: Sequence[str], at_once: int) -> Iterator[Batch]:
        """This process's share of `records`; where processes go in step, as many batches as the largest share makes."""
        mine = share(records, self.processes.rank, self.processes.size)
        most = -(-len(records) // self.processes.size) if self.student.in_step else len(mine)
        parts = [mine[at : at + at_once] for at in range(0, most, at_once)]
        batches = self.source.batches([part for part in parts if part])
        for part in parts:
            yield next(batches) if part else self._nothing

    def _added_up(self, sums: StepSums, too_large: bool, failed: bool) -> tuple[bool, bool, StepSums]:
        """Over all processes: whether one has not enough memory, whether one failed, and the sums."""
        names = self.objective.term_names
        of_terms = (sums.terms_nats.get(name, 0.0) for name in names)
        added = self.processes.add([too_large, failed, sums.objective_nats, sums.scored_tokens, sums.scored_weight, *of_terms])
        terms = dict(zip(names, added[5:], strict=True))
        whole = StepSums(objective_nats=added[2], terms_nats=terms, scored_tokens=int(added[3]), scored_weight=added[4])
        return added[0] > 0, added[1] > 0, whole

    def _halve(self) -> None:
        self.progress.micro_batch //= 2
        self.progress.halvings.append(Halving(step=self.progress.step + 1, micro_batch=self.progress.micro_batch))
        self.observer.note(f"out of memory at step {self.progress.step + 1}: going on with micro-batches of {self.progress.micro_batch}")

    def _out_of_memory(self, records: Sequence[str]) -> ResourceError:
        return ResourceError(
            "out-of-memory",
            found=f"one sequence of up to {max(self.source.length(r) for r in records)} tokens does not fit",
            expected="room for at least one",
            do="Shorten the prompts or answers, lower training.rows_per_chunk, or use a machine with more memory.",
        )

    def _half_next_time(self, records: Sequence[str]) -> ResourceError:
        """Leaves word, so that the same command goes on from the last checkpoint with half the micro-batch; the error that says so."""
        if self.progress.micro_batch == 1:
            return self._out_of_memory(records)
        half = self.progress.micro_batch // 2
        durable.write_json_atomic(self._halved, {"step": self.progress.step + 1, "micro_batch": half})
        return ResourceError(
            "out-of-memory",
            found=f"micro-batches of {self.progress.micro_batch} sequences at step {self.progress.step + 1}, in process {self.processes.rank}",
            expected="a student in parts that fits into each process's memory",
            why="the others are in the middle of the same pass, and cannot begin it again",
            do=f"Run the same command again: it goes on from the last checkpoint, with micro-batches of {half}.",
        )

    def _validate(self) -> None:
        if not self.validation:
            return
        # What fits with its gradient fits without.
        at_once = min(_SCORED_AT_ONCE, self.progress.micro_batch)
        parts = [self.student.score(batch, self.objective) for batch in self._batches(self.validation, at_once)]
        _, _, sums = self._added_up(_added(parts), False, False)
        if sums.scored_tokens == 0:
            return
        if not math.isfinite(sums.objective_nats):
            raise self._diverged(f"a validation objective of {sums.objective_nats} after step {self.progress.step}")
        self._log("validation", sums)
        nats = sums.objective_nats / sums.scored_tokens
        if self.settings.patience is None:
            return
        if nats < self.progress.best_nats:
            self.progress.best_nats, self.progress.best_step, self.progress.validations_without_gain = nats, self.progress.step, 0
            self._publish(self.directory / "best")
        else:
            self.progress.validations_without_gain += 1
            self.progress.stopped_early = self.progress.validations_without_gain >= self.settings.patience

    # --- what is on disk --------------------------------------------------------------------------------------------------------------

    @property
    def _metrics(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def _checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def _halved(self) -> Path:
        """Word of a micro-batch that did not fit and could not be begun again."""
        return self.directory / "out_of_memory.json"

    def _log(self, name: str, sums: StepSums, **more: Any) -> None:
        if not self.processes.is_first:
            return
        tokens = max(1, sums.scored_tokens)
        line = {
            "step": self.progress.step,
            "name": name,
            "nats_per_token": sums.objective_nats / tokens,
            "terms": {term: nats / tokens for term, nats in sums.terms_nats.items()},
            "scored_tokens": sums.scored_tokens,
            **more,
        }
        durable.append_lines(self._metrics, [json.dumps(line)], sync=False)
        self.loggers.log(self.progress.step, name, line)

    def _checkpoint(self) -> None:
        self.processes.first(lambda: self.consumed(self._since_checkpoint))
        self._since_checkpoint = []
        self._publish(self._checkpoints / f"step-{self.progress.step:08d}")
        self.processes.first(self._remove_older)

    def _remove_older(self) -> None:
        for old in sorted(self._checkpoints.glob("step-????????"))[:-1]:
            shutil.rmtree(old, ignore_errors=True)

    def _publish(self, final: Path) -> None:
        """The student and the loop's position, as one directory that is either whole or not there; no process goes on before it is there."""
        partial = final.with_name(final.name + ".partial")

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            durable.require_free_bytes(self.directory, 2 * self.student.checkpoint_bytes, "a checkpoint")
            partial.mkdir(parents=True)

        def end() -> None:
            durable.write_json_atomic(partial / "loop.json", _saved(self.progress))
            durable.replace_directory(partial, final)

        self.processes.first(begin)
        if self.student.in_step:
            self.student.save(partial)
        else:
            self.processes.first(lambda: self.student.save(partial))
        self.processes.first(end)

    def _resume(self) -> None:
        self.processes.first(self._settle)
        found = sorted(self._checkpoints.glob("step-????????"))
        if found:
            self.student.load(found[-1])
            self.progress = _loaded(durable.read_json(found[-1] / "loop.json"))
        self.student.require_same()
        if self._halved.exists():
            self._halve_as_told()
        self.processes.first(self._resume_curves)

    def _resume_curves(self) -> None:
        """The loggers go on where they were; what metrics.jsonl has beyond the checkpoint is done again."""
        logged = max((json.loads(line)["step"] for line in durable.read_lines(self._metrics)), default=0)
        if self.progress.step < self.settings.steps and not self.progress.stopped_early:
            self.loggers.open(logged)
        durable.keep_lines(self._metrics, lambda line: json.loads(line)["step"] <= self.progress.step)

    def _settle(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        durable.settle_directory(self.directory / "best")

    def _halve_as_told(self) -> None:
        told = Halving(**durable.read_json(self._halved))
        if told.micro_batch < self.progress.micro_batch:
            self.progress.micro_batch = told.micro_batch
            self.progress.halvings.append(told)

    def _diverged(self, found: str) -> DivergedError:
        return DivergedError(
            "diverged",
            found=found,
            expected="finite numbers",
            why="weights that are updated from here on would be worthless; those of the last checkpoint are kept",
            do="Lower training.learning_rate, or add training.warmup_steps, and run in a new directory.",
        )


def _no_batch(student: TransformersStudent) -> Batch:
    labels = text_targets((), student.vocabulary)
    return Batch(sequences=(), targets=labels, labels=labels)


def _added(parts: Sequence[StepSums]) -> StepSums:
    terms: dict[str, float] = {}
    for part in parts:
        for name, nats in part.terms_nats.items():
            terms[name] = terms.get(name, 0.0) + nats
    return StepSums(
        objective_nats=sum(part.objective_nats for part in parts),
        terms_nats=terms,
        scored_tokens=sum(part.scored_tokens for part in parts),
        scored_weight=sum(part.scored_weight for part in parts),
    )


def _saved(progress: Progress) -> dict[str, Any]:
    saved = {name: getattr(progress, name) for name in Progress.__dataclass_fields__}
    saved["best_nats"] = None if math.isinf(progress.best_nats) else progress.best_nats
    saved["halvings"] = [halving.model_dump() for halving in progress.halvings]
    return saved


def _loaded(saved: dict[str, Any]) -> Progress:
    best_nats = math.inf if saved["best_nats"] is None else saved["best_nats"]
    return Progress(**{**saved, "best_nats": best_nats, "halvings": [Halving(**halving) for halving in saved["halvings"]]})
