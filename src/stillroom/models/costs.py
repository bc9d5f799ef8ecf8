"""What a whole model takes to read, to write and to learn, measured on copies of one and of two of its layers.

B sequences, T positions, R scored rows, V vocabulary rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache, PreTrainedModel

from stillroom.models.loading import body_of, head_of
from stillroom.models.local import head_log_probs, head_top_k
from stillroom.models.probing import Meter, Pattern, copy_of
from stillroom.models.rollouts import choose_tokens
from stillroom.models.student import OptimiserSettings, adamw
from stillroom.objectives.objective import Objective, backward_chunked
from stillroom.targets.kinds import FullTargets, HiddenTargets, Targets, TeacherHead, TextTargets, TopKTargets

# No probe puts more tokens than this through a copy at once, nor more than so many multiplications through one of its layers.
_PROBE_TOKENS = 1024
_PROBE_MULTIPLICATIONS = 5e8
_PROBE_LOGITS = 2**21
_PROBE_WRITERS = 64


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
    distribution_bytes: float
    """What lives of a row while its log-probabilities are made, themselves included."""
    top_k_bytes: float
    """The same while the most probable are picked as well."""

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
    pattern: Pattern, size: int, *, batch: int, tokens: float, temperature: float, k: int, dtype: torch.dtype, meter: Meter
) -> ReadingCosts:
    """Measures passes over prompts and steps of up to `batch` sequences with caches of `tokens` tokens; `size` is the number of real tokens."""
    width = _fitting_width(pattern, tokens)
    many, writers = _fitting_batch(pattern, batch, width), max(2, min(batch, _PROBE_WRITERS, _tokens_allowed(pattern)))
    passes, one_pass, steps, one_step, kept, working = [], [], [], [], [], []
    for depth in (1, 2):
        model = copy_of(pattern, depth, dtype, meter.device)
        _read(model, many, width)
        peak_bytes, kept_bytes = meter.bytes(partial(_read, model, many, width))
        kept.append(kept_bytes / (many * width))
        working.append((peak_bytes - kept_bytes) / (many * width))
        passes.append(meter.seconds(partial(_read, model, many, width)))
        one_pass.append(meter.seconds(partial(_read, model, 1, width)))
        steps.append(meter.seconds(_step(model, writers, width, temperature)))
        one_step.append(meter.seconds(_step(model, 1, width, temperature)))
    # The vocabulary's share grows with it where the copies' is cut.
    more = max(1.0, size / pattern.rows)
    token = _AtDepths(*passes).whole(pattern) / (many * width)
    alone = _AtDepths(*one_step).whole(pattern, of_rest=more)
    # A sequence of a large batch takes no less than a token of a large pass.
    each = max(token, (_AtDepths(*steps).whole(pattern, of_rest=more) - alone) / (writers - 1))
    rows = max(1, min(many * width, _PROBE_LOGITS // pattern.rows))
    states_RD = torch.zeros((rows, _width(model)), device=meter.device)
    cut, kept_ids = min(size, pattern.rows), min(k, size, pattern.rows)
    distribution = meter.cost(lambda: head_log_probs(model, states_RD, cut, 1.0))
    picked = meter.cost(lambda: head_top_k(model, states_RD, cut, kept_ids, 1.0)) if k else distribution
    cache = _AtDepths(*kept)
    return ReadingCosts(
        call_seconds=max(0.0, _AtDepths(*one_pass).whole(pattern) - width * token),
        token_seconds=token,
        step_seconds=max(0.0, alone - each),
        each_seconds=each,
        distribution_seconds=distribution.seconds / rows * more * pattern.widening,
        top_k_seconds=max(0.0, picked.seconds - distribution.seconds) / rows * more,
        cache_bytes=cache.layer * pattern.layers * pattern.widening,
        layer_bytes=cache.layer * pattern.widening,
        working_bytes=working[0] * pattern.widening,
        distribution_bytes=distribution.peak_bytes / rows * more,
        top_k_bytes=picked.peak_bytes / rows * more,
    )


def _fitting_width(pattern: Pattern, tokens: float) -> int:
    return max(2, min(math.ceil(tokens), _tokens_allowed(pattern)))


def _fitting_batch(pattern: Pattern, batch: int, width: int) -> int:
    return max(1, min(batch, _tokens_allowed(pattern) // width))


def _tokens_allowed(pattern: Pattern) -> int:
    return int(max(16, min(_PROBE_TOKENS, _PROBE_MULTIPLICATIONS // max(1.0, pattern.layer_parameters / pattern.scale))))


@torch.inference_mode()
def _read(model: PreTrainedModel, batch: int, width: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    mask_BT = torch.ones((batch, width), dtype=torch.int64, device=model.device)
    mask_BT[::2, 0] = 0
    body_of(model)(input_ids=torch.ones_like(mask_BT), attention_mask=mask_BT, past_key_values=cache, use_cache=True)
    return cache


def _step(model: PreTrainedModel, batch: int, width: int, temperature: float) -> Callable[[], object]:
    """One more token for each of `batch` sequences, as models.rollouts writes it; the cache grows with every call."""
    cache = _read(model, 1, width)
    cache.batch_repeat_interleave(batch)
    generator = torch.Generator().manual_seed(0)
    ids_B1 = torch.ones((batch, 1), dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def action() -> object:
        mask_BT = torch.ones((batch, cache.get_seq_length() + 1), dtype=torch.int64, device=model.device)
        mask_BT[::2, 0] = 0
        positions_B1 = mask_BT.sum(-1, keepdim=True) - 1
        output = model(input_ids=ids_B1, attention_mask=mask_BT, position_ids=positions_B1, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return choose_tokens(output.logits[:, -1], temperature, generator).tolist()

    action()
    return action


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
    passes, one_pass, kept, working = [], [], [], []
    for depth in (1, 2):
        model = copy_of(pattern, depth, torch.float32, meter.device)
        _learn(model, batch, width, dtype)
        peak_bytes, _ = meter.bytes(partial(_learn, model, batch, width, dtype))
        _, kept_bytes = meter.bytes(partial(_learning, model, batch, width, dtype))
        passes.append(meter.seconds(partial(_learn, model, batch, width, dtype)))
        one_pass.append(meter.seconds(partial(_learn, model, 1, width, dtype)))
        kept.append(kept_bytes / (batch * width))
        working.append((peak_bytes - kept_bytes) / (batch * width))
    more = max(1.0, size / pattern.rows)
    rows = max(1, min(rows_per_chunk, batch * width, _PROBE_LOGITS // pattern.rows))
    through_head = _head_and_back(model, objective, kind, min(k, pattern.rows), teacher_width, rows, min(size, pattern.rows), dtype)
    through_head()
    head = meter.cost(through_head)
    token = _AtDepths(*passes).whole(pattern) / (batch * width)
    return LearningCosts(
        call_seconds=max(0.0, _AtDepths(*one_pass).whole(pattern) - width * token),
        token_seconds=token,
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
