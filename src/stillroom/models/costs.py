"""What a whole model takes to read, to write and to learn, measured on copies of one and of two of its layers.

B sequences, T positions, R scored rows, V vocabulary rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from stillroom.core.identities import Sampling, TokenIds
from stillroom.models.loading import body_of, head_of
from stillroom.models.local import head_log_probs, head_top_k
from stillroom.models.probing import Meter, Pattern, copy_of
from stillroom.models.rollouts import decode
from stillroom.models.student import OptimiserSettings, adamw
from stillroom.objectives.objective import Objective, backward_chunked
from stillroom.targets.kinds import FullTargets, HiddenTargets, Targets, TeacherHead, TextTargets, TopKTargets

# No probe puts more tokens than this through a copy at once, nor more than so many multiplications through one of its layers.
_PROBE_TOKENS = 1024
_PROBE_MULTIPLICATIONS = 5e8
_PROBE_LOGITS = 2**21
# Tokens that are written after the first, to time one of them.
_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingCosts:
    """A whole model that reads and writes, without gradients. A pass takes call + tokens x token; one more token for each of B sequences takes
    step + B x each. `distribution` is one row of log-probabilities, `top_k` what picking the most probable of it takes besides.
    """

    call_seconds: float
    token_seconds: float
    step_seconds: float
    each_seconds: float
    distribution_seconds: float
    top_k_seconds: float
    cache_bytes: float
    """Keys and values of one token, all layers."""
    layer_bytes: float
    """Those of one layer."""
    working_bytes: float
    """What lives beside weights and cache while a layer reads, for each token."""

    def reading(self, tokens: float) -> float:
        """Seconds of one pass over so many tokens."""
        return self.call_seconds + tokens * self.token_seconds

    def writing(self, batch: float, prompt: float, steps: float, batch_steps: float) -> float:
        """Seconds of one batch: its prompts, then `steps` tokens, in which `batch_steps` sequences took part in all."""
        return self.reading(batch * prompt) + steps * self.step_seconds + batch_steps * self.each_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningCosts:
    """A whole student that learns. A micro-batch takes call + tokens x token + rows x row; the optimiser, parameters x parameter."""

    call_seconds: float
    token_seconds: float
    row_seconds: float
    parameter_seconds: float
    kept_bytes: float
    """What is kept of one token, in all layers, until the backward pass has used it."""
    working_bytes: float
    """What lives beside that, for each token, while one layer goes back."""
    row_bytes: float
    """What lives of one row of a chunk while it goes through head, objective and back."""


@dataclass(frozen=True, slots=True)
class _AtDepths:
    """A quantity of copies with one and with two layers."""

    one: float
    two: float

    @property
    def layer(self) -> float:
        return max(0.0, self.two - self.one)

    @property
    def rest(self) -> float:
        return max(0.0, self.one - self.layer)

    def whole(self, pattern: Pattern, *, of_rest: float = 1.0) -> float:
        """For all layers, and `of_rest` times what does not belong to any."""
        return self.layer * pattern.scale * pattern.layers + self.rest * of_rest


# --- reading and writing ----------------------------------------------------------------------------------------------------------------


def reading_costs(
    pattern: Pattern, size: int, *, batch: int, prompt_tokens: float, temperature: float, k: int, dtype: torch.dtype, meter: Meter
) -> ReadingCosts:
    """Measures decoding of up to `batch` prompts at once, by the decoder that runs use; `size` is the number of real tokens."""
    width = _fitting_width(pattern, prompt_tokens)
    many = _fitting_batch(pattern, batch, width)
    timings: dict[tuple[int, int], list[float]] = {(count, tokens): [] for count in (many, 1) for tokens in (1, 1 + _STEPS)}
    kept, peak = [], []
    for depth in (1, 2):
        model = copy_of(pattern, depth, dtype, meter.device)
        _write(model, _prompts(1, width), 1, temperature)
        peak_bytes, kept_bytes = meter.bytes(lambda model=model: _read(model, many, width))  # type: ignore[misc]
        peak.append((peak_bytes - kept_bytes) / (many * width))
        kept.append(kept_bytes / (many * width))
        for (count, tokens), taken in timings.items():
            prompts = _prompts(count, width)
            taken.append(meter.seconds(lambda model=model, prompts=prompts, tokens=tokens: _write(model, prompts, tokens, temperature)))  # type: ignore[misc]
        rows = max(1, min(many * width, _PROBE_LOGITS // pattern.rows))
    # The vocabulary's share grows with it where the copies' is cut.
    more = max(1.0, size / pattern.rows)
    call, token = _line(_AtDepths(*timings[1, 1]).whole(pattern), _AtDepths(*timings[many, 1]).whole(pattern), 1, many)
    steps = {count: _AtDepths(*((b - a) / _STEPS for a, b in zip(timings[count, 1], timings[count, 1 + _STEPS], strict=True))) for count in (1, many)}
    step, each = _line(steps[1].whole(pattern, of_rest=more), steps[many].whole(pattern, of_rest=more), 1, many)
    states_RD = torch.zeros((rows, _width(model)), device=meter.device)
    cut, kept_ids = min(size, pattern.rows), min(k, size, pattern.rows)
    distribution = meter.seconds(lambda: head_log_probs(model, states_RD, cut, 1.0)) / rows
    picked = meter.seconds(lambda: head_top_k(model, states_RD, cut, kept_ids, 1.0)) / rows if k else distribution
    cache = _AtDepths(*kept)
    return ReadingCosts(
        call_seconds=call,
        token_seconds=token / width,
        step_seconds=step,
        each_seconds=each,
        distribution_seconds=distribution * more * pattern.widening,
        top_k_seconds=max(0.0, picked - distribution) * more,
        cache_bytes=cache.layer * pattern.layers * pattern.widening,
        layer_bytes=cache.layer * pattern.widening,
        working_bytes=peak[0] * pattern.widening,
    )


def _line(at_few: float, at_many: float, few: int, many: int) -> tuple[float, float]:
    """Intercept and slope; both at least 0, and where both points are one, no intercept."""
    slope = (at_many - at_few) / (many - few) if many > few else at_few / few
    slope = max(0.0, min(slope, at_few / few))
    return max(0.0, at_few - slope * few), slope


def _fitting_width(pattern: Pattern, tokens: float) -> int:
    return max(2, min(math.ceil(tokens), _tokens_allowed(pattern)))


def _fitting_batch(pattern: Pattern, batch: int, width: int) -> int:
    return max(1, min(batch, _tokens_allowed(pattern) // width))


def _tokens_allowed(pattern: Pattern) -> int:
    return int(max(16, min(_PROBE_TOKENS, _PROBE_MULTIPLICATIONS // max(1.0, pattern.layer_parameters / pattern.scale))))


def _prompts(count: int, width: int) -> list[TokenIds]:
    """Every other one is shorter by a token: as in a run, there is padding, and so a mask."""
    return [(1,) * (width - index % 2) for index in range(count)]


def _write(model: PreTrainedModel, prompts: Sequence[TokenIds], tokens: int, temperature: float) -> object:
    sampling = Sampling(max_new_tokens=tokens, temperature=temperature, seed=0)
    rows = head_of(model).weight_VD.shape[0]
    return decode(model, prompts, sampling, end_ids=frozenset(), size=rows, at_once=len(prompts), stop_at_end=False)


@torch.inference_mode()
def _read(model: PreTrainedModel, batch: int, width: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    mask_BT = torch.ones((batch, width), dtype=torch.int64, device=model.device)
    mask_BT[::2, 0] = 0
    body_of(model)(input_ids=torch.ones_like(mask_BT), attention_mask=mask_BT, past_key_values=cache, use_cache=True)
    return cache


# --- learning ---------------------------------------------------------------------------------------------------------------------------


def learning_costs(
    pattern: Pattern,
    size: int,
    *,
    objective: Objective,
    kind: str,
    k: int,
    teacher_width: int,
    micro_batch: int,
    tokens: float,
    rows_per_chunk: int,
    dtype: torch.dtype,
    meter: Meter,
) -> LearningCosts:
    """Measures forward and backward through the body, through the head with the objective, and an optimiser step."""
    width = _fitting_width(pattern, tokens)
    batch = _fitting_batch(pattern, micro_batch, width)
    seconds, few_seconds, kept, working = [], [], [], []
    for depth in (1, 2):
        model = copy_of(pattern, depth, torch.float32, meter.device)
        _learn(model, batch, width, dtype)
        seconds.append(meter.seconds(lambda model=model: _learn(model, batch, width, dtype)))  # type: ignore[misc]
        few_seconds.append(meter.seconds(lambda model=model: _learn(model, 1, width, dtype)))  # type: ignore[misc]
        peak_bytes, _ = meter.bytes(lambda model=model: _learn(model, batch, width, dtype))  # type: ignore[misc]
        _, kept_bytes = meter.bytes(lambda model=model: _learning(model, batch, width, dtype))  # type: ignore[misc]
        kept.append(kept_bytes / (batch * width))
        working.append((peak_bytes - kept_bytes) / (batch * width))
    more = max(1.0, size / pattern.rows)
    rows = max(1, min(rows_per_chunk, batch * width, _PROBE_LOGITS // pattern.rows))
    through_head = _head_and_back(model, objective, kind, min(k, pattern.rows), teacher_width, rows, min(size, pattern.rows), dtype)
    through_head()
    head = meter.cost(through_head)
    call, token = _line(_AtDepths(*few_seconds).whole(pattern), _AtDepths(*seconds).whole(pattern), 1, batch)
    return LearningCosts(
        call_seconds=call,
        token_seconds=token / width,
        row_seconds=head.seconds / rows * more,
        parameter_seconds=_optimiser_seconds(model, meter),
        kept_bytes=_AtDepths(*kept).whole(pattern) * pattern.widening,
        working_bytes=max(0.0, min(working)) * pattern.widening,
        row_bytes=head.peak_bytes / rows * more,
    )


def _learning(model: PreTrainedModel, batch: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    ids_BT = torch.ones((batch, width), dtype=torch.int64, device=model.device)
    with _arithmetic(model, dtype):
        states_BTD: torch.Tensor = body_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    return states_BTD


def _learn(model: PreTrainedModel, batch: int, width: int, dtype: torch.dtype) -> None:
    states_BTD = _learning(model, batch, width, dtype)
    states_BTD.backward(torch.full_like(states_BTD, 1e-3))


def _arithmetic(model: PreTrainedModel, dtype: torch.dtype) -> torch.autocast | nullcontext[None]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype)


def _head_and_back(
    model: PreTrainedModel, objective: Objective, kind: str, k: int, teacher_width: int, rows: int, size: int, dtype: torch.dtype
) -> Callable[[], object]:
    states_RD = torch.full((rows, _width(model)), 0.01, device=model.device)
    targets = _targets(kind, rows, size, k, teacher_width, objective.match_temperature, model.device)
    labels = TextTargets(vocabulary="", token_ids_R=torch.zeros(rows, dtype=torch.int64, device=model.device))

    def action() -> object:
        with _arithmetic(model, dtype):
            return backward_chunked(
                states_RD, head_of(model), size=size, objective=objective, targets=targets, labels=labels, divide_by=rows, rows_per_chunk=rows
            )

    return action


def _targets(kind: str, rows: int, size: int, k: int, teacher_width: int, temperature: float, device: torch.device) -> Targets:
    """Targets of `kind`, every distribution the even one."""
    even = -math.log(size)
    match kind:
        case "hidden":
            head = TeacherHead(weight_VD=torch.full((size, teacher_width), 0.01, device=device))
            states_RD = torch.full((rows, teacher_width), 0.01, dtype=torch.bfloat16, device=device)
            return HiddenTargets(vocabulary="", temperature=temperature, states_RD=states_RD, head=head)
        case "top_k":
            ids_RK = torch.arange(k, device=device).expand(rows, k).contiguous()
            tail_R = torch.full((rows,), even + math.log(max(size - k, 1e-9)), device=device)
            log_probs_RK = torch.full((rows, k), even, device=device)
            return TopKTargets(vocabulary="", temperature=temperature, ids_RK=ids_RK, log_probs_RK=log_probs_RK, tail_log_mass_R=tail_R)
        case "full":
            return FullTargets(vocabulary="", temperature=temperature, log_probs_RV=torch.full((rows, size), even, device=device))
        case _:
            return TextTargets(vocabulary="", token_ids_R=torch.zeros(rows, dtype=torch.int64, device=device))


def _optimiser_seconds(model: PreTrainedModel, meter: Meter) -> float:
    """Clipping and one AdamW step, for each parameter."""
    optimiser = adamw(model, OptimiserSettings())
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)

    def action() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()

    action()
    return meter.seconds(action) / sum(parameter.numel() for parameter in parameters)


def _width(model: PreTrainedModel) -> int:
    return int(head_of(model).weight_VD.shape[1])
