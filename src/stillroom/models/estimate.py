"""What a run will take in time and memory, before it is run.

What depends on the models is measured here, as `costs` says. What does not is a handful of constants below, each with where it was measured. Stage by
stage, the terms follow what the stages in `runs` do; a stage that comes to do something else needs its term here, which benchmarks/plan_accuracy.py
and tests/runs/test_plan_accuracy.py notice.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from stillroom.models.adapters import LoraSettings
from stillroom.models.costs import LearningCosts, ReadingCosts, learning_costs, reading_costs
from stillroom.models.local import COMPARED_AT_ONCE, DRAWN_AT_ONCE, VALUES_AT_ONCE
from stillroom.models.probing import Meter, Outline, Pattern, as_in_a_run, pattern_of, stand_in
from stillroom.objectives.fused import GPU_BUFFER_BYTES, TRITON_DEVICES, gpu_row_bytes, rows_that_fit
from stillroom.objectives.objective import Objective

C = TypeVar("C")

# --- time: seconds of Python on a machine that runs `_python_seconds` in _REFERENCE_SECONDS; found with /proc and process_time on models of one layer
# and 32 numbers, on an idle core of the machine named in benchmarks/results/*-plan_accuracy.json.
_REFERENCE_SECONDS = 0.0030
_COLLECTED_SECONDS = 0.0005  # rendering, ledger, shard and collect.jsonl, for each prompt
_BATCHED_SECONDS = 0.00006  # reading back, packing and counting, for each sequence of a training step
_STEP_SECONDS = 0.003  # metrics, TensorBoard and progress, for each step
_CHECKPOINT_SECONDS = 0.05  # files made durable, for each checkpoint
_LOADING_SECONDS = 0.5  # describing, hashing and loading a small model
_CHILD_SECONDS = 5.0  # a process that imports torch and transformers; evaluation has two
_COMPARED_SECONDS = 3.5e-8  # two probabilities in float64: forward KL, agreement, acceptance
_WRITTEN_BYTES_A_SECOND = 3e8  # a checkpoint
# What evals.cost measures with.
_TIMED_ANSWERS, _TIMED_TOKENS, _TIMED_REPEATS, _TIMED_BATCH, _CHILD_ANSWERS = 100, 24, 8, 32, 32
# Epochs after which a baseline on few labels was at its best: the demo, seed 0, 80 steps of 128 on 400 pairs.
_LABEL_ONLY_EPOCHS = 25

# --- memory of a process on a CPU
_BASE_BYTES = 5e6  # a run of two dozen prompts
_PROMPT_BYTES = 350  # a prompt that is loaded
_COLLECTED_BYTES = 3_000  # its line in collect.jsonl, ledger entries and place in the transfer set, while they are made
_RECORD_BYTES, _TOKEN_BYTES = 1_500, 36  # a record and each of its tokens, while training
# Blocks of up to 32 MiB come from glibc's heap, where blocks of other sizes leave gaps; larger ones are mapped by themselves and leave none. Resident over
# live bytes at the peaks of stages, by VmHWM and LiveBytes: learning 1.7 (demo), 1.6 (wide), 1.5 (live), 1.4 (deep); reading and writing 1.1 to 2.1, the
# same batch in a fresh process or after others; 1.0 with every block mapped, which is 40 % slower.
_HEAP_BLOCK_BYTES, _GAPS = 2**25, 1.7
# The tables that drawn targets are coded with, for each id of the vocabulary: while they are read with, and while the first shard makes them. By VmHWM at
# V = 151,936.
_PRIOR_BYTES, _FIRST_PRIOR_BYTES = 530, 950
# Of a batch that writes: 1.2 to 1.3 (live) and 1.8 (demo) at the peak of collecting, which is that of a whole run where training pads nothing.
_WRITING_GAPS = 1.45

# --- memory of a GPU: what is added to the head's gradient at a time (fused_triton), and what cuBLAS works in.
_PIECE_BYTES, _PRODUCT_BYTES = 2**25, 2**26
# FSDP2 fetches the next layer while one is at work, and adds up the gradient of the one before.
_LAYERS_FETCHED = 2

# As in runs.collecting: prompts that are answered and stored together.
_PART = 512
# A batch is cut down when fewer than this share of it still write (models.rollouts).
_SHRINK_BELOW = 0.6
_VALIDATED_AT_ONCE = 64
# So much slower than at its fastest, a machine is said to be busy.
_BUSY = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelOnlyWork:
    """The baseline on labels alone."""

    pairs: int
    validation_fraction: float
    validate_every: int
    patience: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A run in the numbers that decide what it takes. `prompt_tokens` and `answer_tokens` are lengths of a sample, in no particular order.

    `packing` names the models whose sequences are laid end to end; `recomputed` says that the student's layers are computed again for their gradient.
    `row_bytes` is what a store keeps of a scored row; `mapped_bytes` the size of the teacher's files where they are not in the dtype it runs in.
    `parts`: into how many the student is cut, each with a process and a device of its own; times are then those of one process. `teacher` is None where
    its weights are not here: it takes no time and no memory, and how long collecting takes is not known.
    """

    teacher: Outline | None
    student: Outline
    mapped_bytes: int
    size: int
    objective: Objective
    device: torch.device
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    teacher_int8: bool
    packing: tuple[str, ...]
    recomputed: bool
    threads: int
    prompts: int
    prompt_tokens: tuple[int, ...]
    answer_tokens: tuple[int, ...]
    max_new_tokens: int
    written: bool
    sampling_temperature: float
    teacher_at_once: int
    target_kind: str
    k: int
    live: bool
    row_bytes: int
    from_teacher: bool
    steps: int
    sequences_per_step: int
    micro_batch: int
    length_window: int
    rows_per_chunk: int
    validation_fraction: float
    validate_every: int
    checkpoint_every: int
    label_only: LabelOnlyWork | None
    items: int
    fidelity_prompts: int
    trainable: int | None = None
    lora: LoraSettings | None = None
    optimiser_offload: bool = False
    parts: int = 1

    @property
    def learned(self) -> int:
        """Parameters with a gradient and an optimiser's state."""
        return self.student.parameters if self.trainable is None else self.trainable

    @property
    def teacher_bytes(self) -> float:
        """The teacher's weights: where layers are kept in eight bits, embeddings and head are not."""
        if self.teacher is None:
            return 0.0
        if not self.teacher_int8:
            return self.teacher.parameters * self.teacher_dtype.itemsize
        shape = self.teacher.shape
        whole = (1 if shape.tied_embeddings else 2) * shape.rows * shape.width
        return self.teacher.parameters + whole * (self.teacher_dtype.itemsize - 1)

    @property
    def teacher_whole_bytes(self) -> float:
        """The same before any layer is in eight bits."""
        return 0.0 if self.teacher is None else self.teacher.parameters * self.teacher_dtype.itemsize

    @property
    def teacher_width(self) -> int:
        return 0 if self.teacher is None else self.teacher.shape.width

    @property
    def whole_mean(self) -> float:
        return self.prompt_mean + self.answer_mean

    @property
    def prompt_mean(self) -> float:
        return sum(self.prompt_tokens) / len(self.prompt_tokens)

    @property
    def answer_mean(self) -> float:
        return sum(self.answer_tokens) / len(self.answer_tokens)

    @property
    def compared(self) -> float:
        """Sequences on which fidelity is measured: items that the teacher answers, or what was held out for validation."""
        if self.teacher is None:
            return 0.0
        return float(min(self.fidelity_prompts, self.items or self.validation_fraction * self.prompts))

    @property
    def whole_tokens(self) -> list[int]:
        """Lengths of prompts with answers, ascending."""
        answers = self.answer_tokens
        return sorted(prompt + answers[(index * 7919) % len(answers)] for index, prompt in enumerate(self.prompt_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkEstimate:
    """`seconds` and `peak_bytes` by stage; the bytes are those of the process beyond what the libraries take, on a GPU those allocated there."""

    seconds: dict[str, float]
    peak_bytes: dict[str, float]
    how: str

    @property
    def peak_memory_bytes(self) -> int:
        return round(max(self.peak_bytes.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was found on this machine. Seconds are those of the fastest runs: on average everything takes `slowdown` times as long, now.

    `python` is how many times slower than on the machine that the constants are of; `stand_ins` names the models that could not be probed themselves.
    """

    teacher: ReadingCosts
    student: ReadingCosts
    learning: LearningCosts
    python: float
    slowdown: float
    stand_ins: tuple[str, ...]


# Of a teacher that is not here.
_NO_READING = ReadingCosts(
    call_seconds=0.0, token_seconds=0.0, step_seconds=0.0, each_seconds=0.0, distribution_seconds=0.0, picking_seconds=0.0,
    cache_bytes=0.0, layer_bytes=0.0, working_bytes=0.0, distribution_bytes=0.0, picking_bytes=0.0,
)  # fmt: skip


def measure(work: Workload) -> Measured:
    """Probes this machine for a second or two, with copies of at most two layers. torch is left as it was."""
    with as_in_a_run(work.threads):
        meter = Meter(work.device)
        teacher, teacher_stands_in = _NO_READING, False
        if work.teacher is not None:
            teacher, teacher_stands_in = _probed(work.teacher, work.teacher_dtype.itemsize, work.device, partial(_teacher_costs, work, meter))
        student, student_stands_in = _probed(work.student, 4, work.device, partial(_student_costs, work, meter))
        # Weights, gradients and AdamW's two moments.
        learning, learning_stands_in = _probed(work.student, 16, work.device, partial(_learning_costs, work, meter))
        python = meter.seconds(_python_work) / _REFERENCE_SECONDS
    stand_ins = (("teacher", teacher_stands_in), ("student", student_stands_in or learning_stands_in))
    return Measured(
        teacher=teacher,
        student=student,
        learning=learning,
        python=python,
        slowdown=meter.slowdown,
        stand_ins=tuple(name for name, stands_in in stand_ins if stands_in),
    )


def _probed(outline: Outline, bytes_per_parameter: int, device: torch.device, probe: Callable[[Pattern], C]) -> tuple[C, bool]:
    """What `probe` finds for a model, and whether it had to look at a stand-in: a plan refuses nothing that a run might do."""
    pattern = pattern_of(outline, bytes_per_parameter, device)
    if not pattern.stands_in:
        # Memory that ran out all the same, or an architecture that cannot be run in this way: if it cannot be run at all, the run says so.
        with suppress(Exception):
            return probe(pattern), False
    return probe(stand_in(outline)), True


def _teacher_costs(work: Workload, meter: Meter, pattern: Pattern) -> ReadingCosts:
    return reading_costs(
        pattern,
        work.size,
        batch=min(work.teacher_at_once, work.prompts),
        tokens=work.prompt_mean + work.answer_mean / 2,
        temperature=work.sampling_temperature if work.written else 0.0,
        kind=work.target_kind,
        k=work.k,
        dtype=work.teacher_dtype,
        meter=meter,
    )


def _student_costs(work: Workload, meter: Meter, pattern: Pattern) -> ReadingCosts:
    return reading_costs(
        pattern,
        work.size,
        batch=min(work.teacher_at_once, max(work.items, _TIMED_BATCH)),
        tokens=work.prompt_mean + work.answer_mean / 2,
        temperature=0.0,
        kind="hidden",
        k=0,
        dtype=work.dtype,
        meter=meter,
    )


def _learning_costs(work: Workload, meter: Meter, pattern: Pattern) -> LearningCosts:
    return learning_costs(
        pattern,
        work.size,
        objective=work.objective,
        kind=work.target_kind,
        k=work.k,
        teacher_width=work.teacher_width,
        micro_batch=work.micro_batch,
        tokens=work.prompt_mean + work.answer_mean,
        rows_per_chunk=work.rows_per_chunk,
        dtype=work.dtype,
        recomputed=work.recomputed,
        meter=meter,
        lora=work.lora,
        offload=work.optimiser_offload,
    )


def estimate(work: Workload, found: Measured) -> WorkEstimate:
    """Times and sizes of `work`, which may differ in its micro-batch from what `found` was measured for."""
    seconds = _Seconds(work, found)
    # How fast an endpoint answers is not known before it is asked.
    collecting = {} if work.teacher is None else {"collect": seconds.collect()}
    by_stage = {**collecting, "train": seconds.train(), "label_only": seconds.label_only(), "evaluate": seconds.evaluate()}
    peaks = peak_bytes(work, found)
    whose = "both models" if work.teacher is not None else "the student"
    how = f"copies of {whose} with one and two layers measured on this machine as busy as it is, and extrapolated; memory is highest in {max(peaks, key=peaks.__getitem__)}"
    if found.stand_ins:
        how += f"; of the {' and the '.join(found.stand_ins)} a narrower stand-in was measured"
    if found.slowdown > _BUSY:
        how += f"; other work makes everything take {found.slowdown:.1f} times as long now"
    return WorkEstimate(seconds={name: value * found.slowdown for name, value in by_stage.items()}, peak_bytes=peaks, how=how)


def peak_bytes(work: Workload, found: Measured) -> dict[str, float]:
    """The most that each stage takes, as `WorkEstimate` has it, of the first process where there are several."""
    sizes = _Bytes(work, found)
    return {"collect": sizes.collect(), "train": sizes.train(), "evaluate": sizes.evaluate()}


def _python_work() -> int:
    """Plain Python of the kind that stages do between models."""
    total = 0
    for number in range(400):
        text = json.dumps({"prompt": f"{number} days", "ids": list(range(number % 40)), "x": {"a": number}}, sort_keys=True)
        total += len(hashlib.sha256(text.encode()).hexdigest()) + len(json.loads(text)["ids"])
    return total


# --- time -------------------------------------------------------------------------------------------------------------------------------


class _Seconds:
    """Seconds of each stage on an otherwise idle machine."""

    def __init__(self, work: Workload, found: Measured) -> None:
        self.work, self.found = work, found

    def collect(self) -> float:
        work, teacher = self.work, self.found.teacher
        written = self._answers(teacher, work.prompts, min(_PART, work.prompts), work.prompt_tokens) if work.written else 0.0
        scored = 0.0 if work.live or work.target_kind == "text" else self._targets(work.prompts)
        return written + scored + self.found.python * (work.prompts * _COLLECTED_SECONDS + _LOADING_SECONDS)

    def train(self) -> float:
        work = self.work
        sequences = work.sequences_per_step
        step = self._micro_steps(sequences, work.micro_batch, work.length_window) + self._optimiser()
        if work.live and work.target_kind != "text":
            step += self._targets(sequences)
        validated = work.validation_fraction * work.prompts
        validation = self._validation(validated) + (self._targets(validated) if work.live and work.target_kind != "text" else 0.0)
        return work.steps * step + work.steps / work.validate_every * validation + math.ceil(work.steps / work.checkpoint_every) * self._checkpoint()

    def label_only(self) -> float:
        work, section = self.work, self.work.label_only
        if section is None:
            return 0.0
        records = max(1.0, section.pairs * (1 - section.validation_fraction))
        sequences = min(work.sequences_per_step, records)
        steps = min(work.steps, section.patience * section.validate_every + _LABEL_ONLY_EPOCHS * records / sequences)
        step = self._micro_steps(sequences, min(work.micro_batch, sequences), 1) + self._optimiser()
        validations = steps / section.validate_every
        # Each validation that improves on those before publishes its weights.
        saved = max(0.0, validations - section.patience) + steps / work.checkpoint_every
        return steps * step + validations * self._validation(section.pairs * section.validation_fraction) + saved * self._checkpoint()

    def evaluate(self) -> float:
        work, teacher, student = self.work, self.found.teacher, self.found.student
        models = [student, student, student] if work.label_only is not None else [student, student]
        if work.teacher is not None:
            models.insert(0, teacher)
        answers = sum(self._answers(model, work.items, work.items, work.prompt_tokens) for model in models) if work.items else 0.0
        compared = self._compared() if work.teacher is not None else 0.0
        alone = [student] if work.teacher is None else [teacher, student]
        timed = sum(self._timed(model) for model in alone)
        python = len(alone) * _CHILD_SECONDS + (len(models) + 2) * _LOADING_SECONDS + len(models) * work.items * _COLLECTED_SECONDS / 4
        return answers + compared + timed + self.found.python * python

    def _answers(self, model: ReadingCosts, prompts: float, together: float, lengths: Sequence[int]) -> float:
        """`prompts` prompts are answered, `together` of them sorted by length into batches."""
        groups = math.ceil(together / self.work.teacher_at_once)
        batch = together / groups
        active = _active(self.work.answer_tokens, batch)
        widths = _widths(sorted(lengths), together, groups)
        return prompts / together * sum(model.writing(batch, width, len(active), sum(active)) for width in widths)

    def _targets(self, sequences: float) -> float:
        """The teacher's targets for so many sequences."""
        work, teacher = self.work, self.found.teacher
        rows = sequences * work.answer_mean
        each = {"drawn": teacher.picking_seconds, "top_k": teacher.picking_seconds, "full": teacher.distribution_seconds}
        return self._read(teacher, sequences, "teacher") + rows * each.get(work.target_kind, 0.0)

    def _read(self, model: ReadingCosts, sequences: float, whose: str) -> float:
        work = self.work
        groups = max(1, math.ceil(sequences / work.teacher_at_once))
        if whose in work.packing:
            return groups * model.reading(sequences / groups * work.whole_mean)
        widths = _widths(work.whole_tokens, min(sequences, work.teacher_at_once * groups), groups)
        return sum(model.reading(sequences / groups * width) for width in widths)

    def _micro_steps(self, sequences: float, micro_batch: float, window: int) -> float:
        """Forward and backward of one optimiser step: the steps of a window are sorted by length and cut into micro-batches, which are as wide as their
        longest where they are padded.
        """
        learning = self.found.learning
        count = math.ceil(sequences / micro_batch)
        widths = _widths(self.work.whole_tokens, sequences * window, count * window)
        tokens = sequences * (self.work.whole_mean if "student" in self.work.packing else sum(widths) / len(widths))
        rows = sequences * self.work.answer_mean
        return count * learning.call_seconds + tokens * learning.token_seconds + rows * learning.row_seconds + self._batches(sequences)

    def _batches(self, sequences: float) -> float:
        return self.found.python * sequences * _BATCHED_SECONDS

    def _optimiser(self) -> float:
        return self.work.learned * self.found.learning.parameter_seconds + self.found.python * _STEP_SECONDS

    def _validation(self, sequences: float) -> float:
        """Scored without gradients, in whatever order the records are."""
        if sequences < 1:
            return 0.0
        learning, work = self.found.learning, self.work
        groups = math.ceil(sequences / _VALIDATED_AT_ONCE)
        width = work.whole_mean if "student" in work.packing else _widths(work.whole_tokens, sequences / groups, 1)[0]
        # Forward alone is a third of forward and backward.
        passes = groups * learning.call_seconds + sequences * (width * learning.token_seconds + work.answer_mean * learning.row_seconds)
        return passes / 3 + self._batches(sequences)

    def _checkpoint(self) -> float:
        return 12 * self.work.learned / _WRITTEN_BYTES_A_SECOND + self.found.python * _CHECKPOINT_SECONDS

    def _compared(self) -> float:
        """Fidelity: the teacher answers, both models read, and every probability is compared."""
        work, teacher, student = self.work, self.found.teacher, self.found.student
        prompts = work.compared
        rows = prompts * work.answer_mean
        written = self._answers(teacher, prompts, prompts, work.prompt_tokens) if work.items else 0.0
        distributions = rows * (teacher.distribution_seconds + student.distribution_seconds + self.found.python * work.size * _COMPARED_SECONDS)
        return written + self._read(teacher, prompts, "teacher") + self._read(student, prompts, "evaluated") + distributions

    def _timed(self, model: ReadingCosts) -> float:
        """Speed, latency, and the answers of the process whose memory is measured."""
        work, prompt = self.work, self.work.prompt_mean
        alone = model.step_seconds + model.each_seconds
        wide = model.writing(_TIMED_BATCH, prompt, _TIMED_TOKENS, _TIMED_TOKENS * _TIMED_BATCH)
        answer = model.reading(prompt) + work.answer_mean * alone
        whole = model.reading(prompt) + work.max_new_tokens * alone
        asked = work.items or work.prompts
        answers = (min(asked, _TIMED_ANSWERS) + 1) * answer + min(asked, _CHILD_ANSWERS) * whole
        return _TIMED_REPEATS * (model.reading(prompt) + _TIMED_TOKENS * alone + wide) + answers


def _widths(ascending: Sequence[int], sequences: float, groups: int) -> list[float]:
    """Longest of each group, when so many draws from a sample are sorted and cut into equal groups."""
    n = len(ascending)
    ends = ((group + 1) / groups for group in range(groups))
    # Of m draws, the expected rank of the longest is m / (m + 1).
    return [float(ascending[min(n - 1, max(0, math.ceil(end * sequences / (sequences + 1) * n) - 1))]) for end in ends]


def _active(answers: Sequence[int], batch: float) -> list[float]:
    """Sequences that take part in each decoding step, until the longest answer of a batch ends."""
    ascending = sorted(answers)
    active, taking_part = batch, []
    for step in range(int(_widths(ascending, batch, 1)[0])):
        going = batch * (len(ascending) - bisect_right(ascending, step)) / len(ascending)
        if going < _SHRINK_BELOW * active:
            active = max(1.0, going)
        taking_part.append(active)
    return taking_part


# --- memory -----------------------------------------------------------------------------------------------------------------------------


class _Bytes:
    """The most that lives at once in each stage."""

    def __init__(self, work: Workload, found: Measured) -> None:
        self.work, self.found = work, found
        self.element, self.teacher_element = work.dtype.itemsize, work.teacher_dtype.itemsize
        self.teacher = work.teacher_bytes
        self.on_cpu = work.device.type == "cpu"
        # The longest there is sets the peak.
        self.longest_prompt, self.longest_answer = max(work.prompt_tokens), max(work.answer_tokens)
        self.rows_stored = 0 if work.live or work.target_kind == "text" else work.prompts * work.answer_mean
        self.head = work.size * work.teacher_width * self.teacher_element if work.target_kind == "hidden" else 0
        self.prompt_bytes = work.prompts * _PROMPT_BYTES

    def collect(self) -> float:
        work, teacher = self.work, self.found.teacher
        part = min(_PART, work.prompts)
        batch = min(work.teacher_at_once, part)
        rows = part * work.answer_mean
        # On a CPU: files that are mapped while another dtype is made of them; weights that are whole until they are kept in eight bits.
        phases = [float(work.mapped_bytes), work.teacher_whole_bytes - self.teacher] if self.on_cpu else [0.0]
        if work.written:
            phases.append(self._writing(teacher, batch, work.sampling_temperature, self.teacher_element))
        if self.rows_stored:
            # The states of a part, and the same laid end to end; then what is kept of them, as records, columns and file.
            states = rows * work.teacher_width * 4
            phases.append(states + max(states, self._teacher_reading(teacher, batch)))
            # Drawn ids are in float64 places and int64 ids, and then sorted, before they are counted.
            kept = rows * (32 * work.k if work.target_kind == "drawn" else work.row_bytes)
            phases.append(5 * rows * work.row_bytes + self._prior(_FIRST_PRIOR_BYTES))
            if work.target_kind in ("drawn", "top_k") and work.teacher is not None:
                at_once = DRAWN_AT_ONCE if work.target_kind == "drawn" else VALUES_AT_ONCE
                values = min(rows, max(1, at_once // work.size))
                picking = self._resident(values * teacher.picking_bytes, values * work.size * 4)
                phases.append(states + picking + kept)
        return self._process(self.teacher + max(phases), work.prompts * _COLLECTED_BYTES)

    def train(self) -> float:
        work, learning = self.work, self.found.learning
        weights, gradients = 4.0 * work.student.parameters / work.parts, 4.0 * work.learned / work.parts
        micro_steps = math.ceil(work.sequences_per_step / work.parts / work.micro_batch)
        tokens = work.micro_batch * self._length(work.micro_batch, work.sequences_per_step * work.length_window, "student")
        rows = work.micro_batch * work.answer_mean
        # The feed-forward layer's are the largest blocks of a body, the logits those of a head.
        block = tokens * work.student.shape.feed_forward * 4
        kept, working = (self._resident(tokens * each, block) for each in (learning.kept_bytes, learning.working_bytes))
        chunk = self._through_head(rows)
        targets = rows * self._target_bytes()
        # With one micro-batch, gradients come to be as what was kept for them goes.
        before, after = (gradients, gradients) if micro_steps > 1 else (0.0, gradients)
        passing = learning.fixed_bytes + self._fetched() + max(before + kept + targets + max(chunk, working), after + working)
        teacher = self.teacher if work.from_teacher or (work.live and work.target_kind != "text") else 0.0
        asking = 0.0
        if work.live and work.target_kind != "text":
            asking = self._teacher_reading(self.found.teacher, work.micro_batch) + 3 * targets + before
        # Weights and AdamW's two moments; the head of stored states is read from its file and copied once.
        moments = 0.0 if work.optimiser_offload and not self.on_cpu else 2 * gradients
        heads = (self.head if self.rows_stored else 0) + self._prior(_PRIOR_BYTES)
        tensors = weights + moments + max(passing, asking, gradients) + teacher + heads
        files = self._mapped() + (self.head if self.rows_stored else 0)
        return self._process(tensors, work.prompts * (_RECORD_BYTES + _TOKEN_BYTES * (work.prompt_mean + work.answer_mean)) + files)

    def _through_head(self, rows: float) -> float:
        """A chunk of a micro-batch's rows, on its way through the head and back."""
        work, learning = self.work, self.found.learning
        hidden = work.target_kind == "hidden"
        rows = min(rows, work.rows_per_chunk)
        if learning.head_is_plain and work.device.type in TRITON_DEVICES:
            width = work.student.shape.width
            buffers = min(GPU_BUFFER_BYTES, rows * gpu_row_bytes(work.size, hidden, work.dtype))
            # The head in the type of the products, where that is not its own.
            narrowed = work.size * width * self.element if work.dtype != torch.float32 else 0
            return buffers + narrowed + _PIECE_BYTES + _PRODUCT_BYTES
        if learning.head_is_plain and self.on_cpu and work.dtype == torch.float32:
            rows = min(rows, rows_that_fit(work.size, hidden, torch.float32))
        return self._resident(rows * learning.row_bytes, rows * work.size * 4) + learning.head_bytes

    def _fetched(self) -> float:
        """Of a student in parts, what is whole on each device while it passes: embeddings and head with their gradient, and layers, as models.parallel
        cuts it.
        """
        work, shape = self.work, self.work.student.shape
        if work.parts == 1:
            return 0.0
        outside = (1 if shape.tied_embeddings else 2) * shape.rows * shape.width
        layer = (work.student.parameters - outside) / shape.layers
        return 2 * 4 * outside + layer * (_LAYERS_FETCHED * self.element + 2 * 4)

    def evaluate(self) -> float:
        work, teacher, student = self.work, self.found.teacher, self.found.student
        weights = work.student.parameters * self.element
        longest = max(1, self.longest_answer)
        writing = 0.0
        if work.items:
            batch = min(work.teacher_at_once, work.items)
            writing = self._writing(student, batch, 0.0, self.element) + 4 * work.student.parameters
            writing = max(writing, self._writing(teacher, batch, 0.0, self.teacher_element))
        # Both models' distributions over a chunk of sequences, as fidelity holds them, one of them in the making.
        sequences = max(1.0, min(work.teacher_at_once, work.compared, VALUES_AT_ONCE // (longest * work.size)))
        rows = sequences * work.answer_mean
        making = rows * (work.size * 4 + student.distribution_bytes)
        values = min(rows * work.size, COMPARED_AT_ONCE)
        comparing = 2 * rows * work.size * 4 + self._resident(7 * values * 8, values * 8)
        reading = max(self._teacher_reading(teacher, sequences), self._reading(student, work.student, sequences, "evaluated"))
        tensors = self.teacher + weights + max(writing, making, comparing, reading, work.mapped_bytes if self.on_cpu else 0)
        files = 0.0 if work.items else self._mapped()
        return self._process(tensors, files + (self.head if self.rows_stored else 0) + work.items * 4 * _RECORD_BYTES)

    def _length(self, batch: float, sorted_together: float, whose: str) -> float:
        """Tokens that a sequence of the largest batch takes: of a padded batch, those of the longest there is. Of one laid end to end the mean of so many
        from the upper end of what is sorted together, and three standard deviations more, since a run has many batches.
        """
        lengths = self.work.whole_tokens
        if whose not in self.work.packing:
            return lengths[-1]
        share = min(1.0, batch / max(1.0, sorted_together))
        upper = lengths[min(len(lengths) - 1, math.floor((1 - share) * len(lengths))) :]
        mean = sum(upper) / len(upper)
        deviation = math.sqrt(sum((length - mean) ** 2 for length in upper) / len(upper) / max(1.0, batch))
        return min(lengths[-1], mean + 3 * deviation)

    def _writing(self, model: ReadingCosts, batch: float, temperature: float, element: int) -> float:
        """The cache of a batch when it is largest, and a layer at work on it; sampling noise is a few times the logits."""
        work = self.work
        taking_part = _active(work.answer_tokens, batch)
        cached = max(active * (self.longest_prompt + step + 1) for step, active in enumerate(taking_part))
        reading = batch * self.longest_prompt * (model.cache_bytes + model.working_bytes)
        logits = batch * work.size * (4 * 5 if temperature > 0 else element)
        writing = cached * model.cache_bytes + max(2 * cached * model.layer_bytes, logits)
        return self._resident(max(reading, writing), batch * self.longest_prompt * model.layer_bytes / 2, _WRITING_GAPS)

    def _teacher_reading(self, model: ReadingCosts, sequences: float) -> float:
        return 0.0 if self.work.teacher is None else self._reading(model, self.work.teacher, sequences, "teacher")

    def _reading(self, model: ReadingCosts, outline: Outline, sequences: float, whose: str) -> float:
        """A layer at work on whole sequences, without a cache."""
        tokens = sequences * self._length(sequences, sequences, whose)
        return self._resident(tokens * model.working_bytes, tokens * outline.shape.feed_forward * 4)

    def _target_bytes(self) -> float:
        """Of one scored row in a batch, while it is gathered or made."""
        work = self.work
        return {"full": work.size * 4, "drawn": 8 * work.k}.get(work.target_kind, 3 * work.row_bytes)

    def _prior(self, bytes_each: float) -> float:
        return self.work.size * bytes_each if self.rows_stored and self.work.target_kind == "drawn" else 0.0

    def _mapped(self) -> float:
        """The store's files: verified byte by byte when it is opened, so all of them are in memory."""
        return self.rows_stored * self.work.row_bytes

    def _resident(self, live: float, block: float, gaps: float = _GAPS) -> float:
        """What live tensors take of the process when they are made of blocks of such a size."""
        return live * gaps if self.on_cpu and block <= _HEAP_BLOCK_BYTES else live

    def _process(self, tensors: float, others: float) -> float:
        return tensors + others + self.prompt_bytes + _BASE_BYTES if self.on_cpu else tensors
