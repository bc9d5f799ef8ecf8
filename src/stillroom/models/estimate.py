"""What a run will take in time and memory, before it is run.

Copies of both models with one and with two layers (weights of no meaning) are timed here, on the device and at the batch sizes of the run; since
layers are alike, the difference of the two is what each further layer takes. The same copies count the bytes that a backward pass keeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from stillroom.core.identities import TokenSequence
from stillroom.models.loading import body_of, config_from_teacher, count_parameters, head_of
from stillroom.models.student import OptimiserSettings, TransformersStudent
from stillroom.objectives.objective import Objective
from stillroom.targets.kinds import FullTargets, HiddenTargets, Targets, TeacherHead, TextTargets, TopKTargets
from stillroom.targets.protocols import Batch
from stillroom.targets.vocabulary import Vocabulary

# No probe puts more tokens than this through a model at once; larger batches are scaled up from it.
_PROBE_TOKENS = 4096
_REPEATS = 3
# Measured on CPU in this repository's demo (benchmarks/results): rendering, records, ledger and shards, for each prompt.
_SECONDS_PER_PROMPT = 0.0007
_BYTES_PER_PROMPT = 6_000
# Loading code, two processes that measure memory, model cards: what evaluation takes for the smallest of models.
_EVALUATION_SECONDS = 20.0
_TIMED_ANSWERS, _TIMED_TOKENS, _TIMED_REPEATS = 100, 24, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A run in the numbers that decide what it takes. Token counts are per sequence unless they say otherwise."""

    teacher: PretrainedConfig
    student: PretrainedConfig
    vocabulary: Vocabulary
    objective: Objective
    device: torch.device
    dtype: torch.dtype
    threads: int
    prompts: int
    prompt_tokens_mean: float
    answer_tokens_mean: float
    teacher_at_once: int
    target_kind: str
    k: int
    live: bool
    store_bytes: int
    steps: int
    sequences_per_step: int
    micro_batch: int
    rows_per_chunk: int
    validation_sequences: int
    validations: int
    label_only_steps: int
    items: int
    fidelity_prompts: int

    @property
    def tokens_mean(self) -> float:
        return self.prompt_tokens_mean + self.answer_tokens_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkEstimate:
    """`seconds` by stage (collect, train, label_only, evaluate); `peak_memory_bytes` of the process beyond what the libraries take."""

    seconds: dict[str, float]
    peak_memory_bytes: int
    how: str


@dataclass(frozen=True, slots=True)
class _Line:
    """A quantity that grows linearly with the number of layers, known at one and at two."""

    one: float
    two: float

    def at(self, layers: int) -> float:
        return self.one + max(0.0, self.two - self.one) * (layers - 1)


def estimate(work: Workload) -> WorkEstimate:
    """Times and sizes of `work` on this machine, by probing it for a second or so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(work.threads)
    try:
        probes = _Probes(work)
        seconds = _seconds(work, probes)
        peak = _peak_bytes(work, probes)
    finally:
        torch.set_num_threads(threads)
    return WorkEstimate(
        seconds=seconds, peak_memory_bytes=round(peak), how="one- and two-layer copies of both models timed on this machine, extrapolated"
    )


class _Probes:
    """The measurements that the estimates are made of; each for the whole model."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        teachers = [_copy(work.teacher, layers, work) for layers in (1, 2)]
        students = [_copy(work.student, layers, work) for layers in (1, 2)]
        self.teacher_layers = int(work.teacher.num_hidden_layers)
        self.student_layers = int(work.student.num_hidden_layers)
        self.teacher_parameters = _line(_count, teachers).at(self.teacher_layers)
        self.student_parameters = _line(_count, students).at(self.student_layers)
        prompt, whole = round(work.prompt_tokens_mean), round(work.tokens_mean)
        at_once = min(work.teacher_at_once, work.prompts)
        self.teacher_prefill = self._forward(teachers, at_once, prompt, self.teacher_layers)
        self.teacher_decode = self._decode(teachers, at_once, prompt, self.teacher_layers)
        self.teacher_forward = self._forward(teachers, at_once, whole, self.teacher_layers)
        self.teacher_decode_one = self._decode(teachers, 1, prompt, self.teacher_layers)
        self.student_forward = self._forward(students, at_once, whole, self.student_layers)
        self.student_decode = self._decode(students, at_once, prompt, self.student_layers)
        self.student_decode_one = self._decode(students, 1, prompt, self.student_layers)
        timed = [_train_step(work, model) for model in students]
        self.micro_step = _Line(timed[0][0], timed[1][0]).at(self.student_layers)
        self.optimiser_step = _Line(timed[0][1], timed[1][1]).at(self.student_layers)
        self.activation_bytes = _Line(timed[0][2], timed[1][2]).at(self.student_layers)

    def _forward(self, models: list[PreTrainedModel], batch: int, length: int, layers: int) -> float:
        """Seconds of one forward pass without the head."""
        some = max(1, min(batch, _PROBE_TOKENS // max(1, length)))
        ids_BT = torch.zeros((some, max(1, length)), dtype=torch.int64, device=self.work.device)
        return _line(lambda model: _timed(lambda: _body_forward(model, ids_BT), self.work.device), models).at(layers) * batch / some

    def _decode(self, models: list[PreTrainedModel], batch: int, length: int, layers: int) -> float:
        """Seconds of one more token for each of `batch` sequences with a cache of `length`."""
        some = max(1, min(batch, _PROBE_TOKENS // max(1, length)))
        return _line(lambda model: _timed_decode(model, some, max(1, length), self.work.device), models).at(layers) * batch / some


def _seconds(work: Workload, probes: _Probes) -> dict[str, float]:
    at_once = min(work.teacher_at_once, work.prompts)
    groups = work.prompts / at_once
    written = groups * (probes.teacher_prefill + work.answer_tokens_mean * probes.teacher_decode)
    scored = 0.0 if work.live or work.target_kind == "text" else groups * probes.teacher_forward
    micro_steps = work.sequences_per_step / work.micro_batch
    step = micro_steps * probes.micro_step + probes.optimiser_step
    if work.live and work.target_kind != "text":
        step += work.sequences_per_step / at_once * probes.teacher_forward
    validation = work.validations * work.validation_sequences / work.micro_batch * probes.micro_step / 3
    answers = work.items / at_once
    answering = answers * (
        probes.teacher_prefill + 3 * probes.student_forward + work.answer_tokens_mean * (probes.teacher_decode + 3 * probes.student_decode)
    )
    comparing = work.fidelity_prompts / at_once * (probes.teacher_forward + probes.student_forward)
    one = probes.teacher_decode_one + probes.student_decode_one
    timing = one * (_TIMED_REPEATS * _TIMED_TOKENS * 4 + _TIMED_ANSWERS * work.answer_tokens_mean)
    return {
        "collect": written + scored + work.prompts * _SECONDS_PER_PROMPT,
        "train": work.steps * step + validation,
        "label_only": work.label_only_steps * step,
        "evaluate": answering + comparing + timing + _EVALUATION_SECONDS,
    }


def _peak_bytes(work: Workload, probes: _Probes) -> float:
    element = torch.finfo(work.dtype).bits / 8
    at_once = min(work.teacher_at_once, work.prompts)
    teacher = probes.teacher_parameters * element
    inner = int(getattr(work.teacher, "intermediate_size", 0) or 4 * work.teacher.hidden_size)
    tokens = at_once * work.tokens_mean
    # Keys and values of every layer, what one layer holds while it works, and the states that are kept.
    cache = tokens * 2 * probes.teacher_layers * work.teacher.hidden_size * element
    working = tokens * (3 * inner + 6 * work.teacher.hidden_size) * element
    collecting = teacher + cache + working + 2 * at_once * work.vocabulary.size * 4
    student = probes.student_parameters * 4
    rows = min(work.rows_per_chunk, work.micro_batch * work.answer_tokens_mean)
    logits = rows * work.vocabulary.size * 4 * 6
    training = 4 * student + probes.activation_bytes + logits + work.store_bytes + (collecting if work.live else 0)
    evaluating = teacher + 3 * student + cache + working
    return max(collecting, training, evaluating) + work.prompts * _BYTES_PER_PROMPT


# --- the copies -----------------------------------------------------------------------------------------------------------------------


def _copy(config: PretrainedConfig, layers: int, work: Workload) -> PreTrainedModel:
    """A model of `config` cut to `layers`, every number the same small one: timing does not care."""
    cut = config_from_teacher(config, [min(index, int(config.num_hidden_layers) - 1) for index in range(layers)])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(cut, trust_remote_code=False, dtype=work.dtype)
    model = model.to_empty(device=work.device).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(0.01)
    assert isinstance(model, PreTrainedModel)
    return model


def _line(measure: Callable[[PreTrainedModel], float], models: list[PreTrainedModel]) -> _Line:
    return _Line(measure(models[0]), measure(models[1]))


def _count(model: PreTrainedModel) -> float:
    return float(count_parameters(model))


def _timed(action: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few runs, after one to warm up."""
    action()
    best = float("inf")
    for _ in range(_REPEATS):
        _wait(device)
        began = time.perf_counter()
        action()
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@torch.inference_mode()
def _body_forward(model: PreTrainedModel, ids_BT: torch.Tensor) -> object:
    return body_of(model)(input_ids=ids_BT, use_cache=False)


@torch.inference_mode()
def _timed_decode(model: PreTrainedModel, batch: int, length: int, device: torch.device) -> float:
    ids_BT = torch.zeros((batch, length), dtype=torch.int64, device=device)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    # The cache grows by a token each time, as it does in a run.
    seconds: float = _timed(lambda: model(input_ids=ids_BT[:, :1], past_key_values=cache, use_cache=True), device)
    return seconds


def _train_step(work: Workload, model: PreTrainedModel) -> tuple[float, float, float]:
    """Seconds of a micro-batch forward and backward, seconds of the optimiser, and the bytes kept for the backward pass."""
    student = TransformersStudent(model, replace(work.vocabulary, rows=head_of(model).weight_VD.shape[0]), OptimiserSettings(), dtype=work.dtype)
    prompt, answer = max(1, round(work.prompt_tokens_mean)), max(1, round(work.answer_tokens_mean))
    some = max(1, min(work.micro_batch, _PROBE_TOKENS // (prompt + answer)))
    batch = _batch(work, some, prompt, answer)
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        student.forward_backward(batch, work.objective, divide_by=1)
    seconds = _timed(lambda: student.forward_backward(batch, work.objective, divide_by=1), work.device)
    optimiser = _timed(lambda: _optimise(student, batch, work.objective), work.device) - seconds
    scale = work.micro_batch / some
    return seconds * scale, max(0.0, optimiser), sum(kept.values()) * scale


def _optimise(student: TransformersStudent, batch: Batch, objective: Objective) -> None:
    student.forward_backward(batch, objective, divide_by=1)
    student.optim_step(0.0)


def _batch(work: Workload, batch: int, prompt: int, answer: int) -> Batch:
    sequence = TokenSequence(ids=(0,) * (prompt + answer), answer_spans=((prompt, prompt + answer),))
    rows, size = batch * answer, work.vocabulary.size
    fingerprint, temperature = work.vocabulary.fingerprint, work.objective.match_temperature
    labels = TextTargets(vocabulary=fingerprint, token_ids_R=torch.zeros(rows, dtype=torch.int64))
    targets: Targets
    match work.target_kind:
        case "hidden":
            width = int(work.teacher.hidden_size)
            head = TeacherHead(weight_VD=torch.full((size, width), 0.01))
            targets = HiddenTargets(vocabulary=fingerprint, temperature=temperature, states_RD=torch.full((rows, width), 0.01), head=head)
        case "top_k":
            even = -torch.log(torch.tensor(float(size)))
            ids_RK = torch.arange(work.k, dtype=torch.int32).repeat(rows, 1)
            tail_R = torch.full((rows,), max(size - work.k, 1e-9)).log() + even
            targets = TopKTargets(
                vocabulary=fingerprint, temperature=temperature, ids_RK=ids_RK, log_probs_RK=even.expand(rows, work.k).clone(), tail_log_mass_R=tail_R
            )
        case "full":
            even_RV = torch.full((rows, size), -float(torch.log(torch.tensor(float(size)))))
            targets = FullTargets(vocabulary=fingerprint, temperature=temperature, log_probs_RV=even_RV)
        case _:
            targets = labels
    return Batch(sequences=(sequence,) * batch, targets=targets, labels=labels)
