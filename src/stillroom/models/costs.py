"""What a whole model takes to read, to write and to learn, measured on copies of one and of two of its layers.

B sequences, T positions, R scored rows, V vocabulary rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import DynamicCache, PreTrainedModel

from stillroom.models.adapters import LoraSettings, add_lora
from stillroom.models.arithmetic import recompute_layers
from stillroom.models.loading import body_of, head_of
from stillroom.models.local import head_draws, head_log_probs, head_top_k
from stillroom.models.probing import Cost, Meter, Pattern, copy_of
from stillroom.models.rollouts import choose_tokens
from stillroom.models.student import OptimiserSettings, optimiser_of
from stillroom.objectives.fused import linear_head
from stillroom.objectives.matching import new_projections
from stillroom.objectives.objective import Objective, backward_chunked
from stillroom.targets.kinds import DrawnTargets, FullTargets, HiddenTargets, Targets, TeacherHead, TextTargets, TopKTargets

# No probe puts more tokens than this through a copy at once, nor more than so many multiplications through one of its layers.
_PROBE_TOKENS = 1024
_PROBE_MULTIPLICATIONS = 5e8
_PROBE_LOGITS = 2**21
_PROBE_WRITERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingCosts:
    """A whole model that reads and writes, without gradients. A pass takes call + tokens x token; one more token for each of B sequences takes
    step + B x each. `distribution` is one row of log-probabilities, `picking` one row of what a store keeps of them.
    """

    call_seconds: float
    token_seconds: float
    step_seconds: float
    each_seconds: float
    distribution_seconds: float
    picking_seconds: float
    cache_bytes: float
    """Keys and values of one token, all layers."""
    layer_bytes: float
    """Those of one layer."""
    working_bytes: float
    """What lives beside weights and cache while a layer reads, for each token."""
    distribution_bytes: float
    """What lives of a row while its log-probabilities are made, themselves included."""
    picking_bytes: float
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
    fixed_bytes: float
    """What is kept and lives whatever the number of tokens."""
    row_bytes: float
    """What lives of one row of a chunk while it goes through head, objective and back."""
    head_bytes: float
    """What lives besides, whatever the number of rows: the head's gradient before it is added."""
    head_is_plain: bool
    """Whether the head is one that `objectives.fused` takes, which bounds the rows of a chunk itself."""


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
    pattern: Pattern, size: int, *, batch: int, tokens: float, temperature: float, kind: str, k: int, dtype: torch.dtype, meter: Meter
) -> ReadingCosts:
    """Measures passes over prompts and steps of up to `batch` sequences with caches of `tokens` tokens; `size` is the number of real tokens."""
    width = _fitting_width(pattern, tokens)
    many, writers = _fitting_batch(pattern, batch, width), max(2, min(batch, _PROBE_WRITERS, _tokens_allowed(pattern)))
    depths = [_read_at(copy_of(pattern, depth, dtype, meter.device), many, writers, width, temperature, meter) for depth in (1, 2)]
    passes, one_pass, steps, one_step, kept, working = (_AtDepths(one, two) for one, two in zip(*depths, strict=True))
    # The vocabulary's share grows with it where the copies' is cut.
    more = max(1.0, size / pattern.rows) * pattern.widening
    token = passes.whole(pattern) / (many * width)
    alone = one_step.whole(pattern, of_rest=more)
    # A sequence of a large batch takes no less than a token of a large pass.
    each = max(token, (steps.whole(pattern, of_rest=more) - alone) / (writers - 1))
    distribution, picked = _distributions(pattern, size, kind, k, dtype, meter)
    return ReadingCosts(
        call_seconds=max(0.0, one_pass.whole(pattern) - width * token),
        token_seconds=token,
        step_seconds=max(0.0, alone - each),
        each_seconds=each,
        distribution_seconds=distribution.seconds * more,
        picking_seconds=picked.seconds * more,
        cache_bytes=kept.layer * pattern.layers * pattern.widening,
        layer_bytes=kept.layer * pattern.widening,
        working_bytes=working.one * pattern.widening,
        distribution_bytes=distribution.peak_bytes * more / pattern.widening,
        picking_bytes=picked.peak_bytes * more / pattern.widening,
    )


def _read_at(model: PreTrainedModel, many: int, writers: int, width: int, temperature: float, meter: Meter) -> tuple[float, ...]:
    """Seconds of a pass over many prompts and over one, and of a step of many writers and of one; a token's cache, and what lives beside it."""
    _read(model, many, width)
    peak_bytes, kept_bytes = meter.bytes(partial(_read, model, many, width))
    return (
        meter.seconds(partial(_read, model, many, width)),
        meter.seconds(partial(_read, model, 1, width)),
        meter.seconds(_step(model, writers, width, temperature)),
        meter.seconds(_step(model, 1, width, temperature)),
        kept_bytes / (many * width),
        (peak_bytes - kept_bytes) / (many * width),
    )


def _distributions(pattern: Pattern, size: int, kind: str, k: int, dtype: torch.dtype, meter: Meter) -> tuple[Cost, Cost]:
    """What one row of log-probabilities takes, and of ids picked or drawn; over the copies' part of the vocabulary."""
    model = copy_of(pattern, 1, dtype, meter.device)
    rows, size = _PROBE_LOGITS // pattern.rows, min(size, pattern.rows)
    states_RD = torch.zeros((rows, _width(model)), device=meter.device)
    distribution = meter.cost(lambda: head_log_probs(model, states_RD, size, 1.0))
    picked = distribution
    if kind == "top_k":
        picked = meter.cost(lambda: head_top_k(model, states_RD, size, min(k, size), 1.0))
    elif kind == "drawn":
        places_RN = torch.rand((rows, k), dtype=torch.float64, device=meter.device)
        picked = meter.cost(lambda: head_draws(model, states_RD, size, places_RN, 1.0))
    return distribution.per(rows), picked.per(rows)


def _fitting_width(pattern: Pattern, tokens: float) -> int:
    return max(2, min(math.ceil(tokens), _tokens_allowed(pattern)))


def _fitting_batch(pattern: Pattern, batch: int, width: int) -> int:
    return max(1, min(batch, _tokens_allowed(pattern) // width))


def _tokens_allowed(pattern: Pattern) -> int:
    return int(max(16, min(_PROBE_TOKENS, _PROBE_MULTIPLICATIONS // max(1.0, pattern.layer_parameters))))


@torch.inference_mode()
def _read(model: PreTrainedModel, batch: int, width: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    ids_BT = torch.ones((batch, width), dtype=torch.int64, device=model.device)
    body_of(model)(input_ids=ids_BT, attention_mask=_mask(batch, width, model.device), past_key_values=cache, use_cache=True)
    return cache


def _mask(batch: int, width: int, device: torch.device) -> torch.Tensor | None:
    """As in a run, prompts of a batch differ in length: every other one is shorter by a token. One alone needs no mask."""
    if batch == 1:
        return None
    mask_BT = torch.ones((batch, width), dtype=torch.int64, device=device)
    mask_BT[::2, 0] = 0
    return mask_BT


def _step(model: PreTrainedModel, batch: int, width: int, temperature: float) -> Callable[[], object]:
    """One more token for each of `batch` sequences, as models.rollouts writes it; the cache grows with every call."""
    cache = _read(model, 1, width)
    cache.batch_repeat_interleave(batch)
    generator = torch.Generator().manual_seed(0)
    ids_B1 = torch.ones((batch, 1), dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def action() -> object:
        mask_BT = _mask(batch, cache.get_seq_length() + 1, model.device)
        positions_B1 = None if mask_BT is None else mask_BT.sum(-1, keepdim=True) - 1
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
    recomputed: bool,
    meter: Meter,
    lora: LoraSettings | None = None,
    offload: bool = False,
) -> LearningCosts:
    """Measures forward and backward through the body, through the head with the objective, and an optimiser step, of what is learned.

    `recomputed`: layers are computed again for their gradient, as `arithmetic.recompute_layers` has it.
    """
    width = _fitting_width(pattern, tokens)
    batch = _fitting_batch(pattern, micro_batch, width)
    copies = [_learner(pattern, depth, meter.device, lora) for depth in (1, 2)]
    for copy in copies if recomputed else []:
        recompute_layers(copy)
    depths = [_learn_at(copy, batch, width, dtype, meter, offload) for copy in copies]
    passes, one_pass, optimiser, kept, kept_always, beside, beside_always = (_AtDepths(one, two) for one, two in zip(*depths, strict=True))
    of_states = replace(pattern, scale=1.0)  # the bytes of a layer's states do not grow with its parameters
    model = _learner(pattern, 1, meter.device, lora)
    rows = max(2, min(rows_per_chunk, _PROBE_LOGITS // pattern.rows))
    through_head = partial(_head_and_back, model, objective, kind, min(k, pattern.rows), teacher_width, min(size, pattern.rows), dtype)
    through_head(rows)()  # from now on there is a gradient to add to
    half_peak_bytes, _ = meter.bytes(through_head(rows // 2))
    head = meter.cost(through_head(rows))
    row_bytes = (head.peak_bytes - half_peak_bytes) / (rows - rows // 2)
    more = max(1.0, size / pattern.rows)
    token = passes.whole(pattern) / (batch * width)
    return LearningCosts(
        call_seconds=max(0.0, one_pass.whole(pattern) - width * token),
        token_seconds=token,
        row_seconds=head.seconds / rows * more * pattern.widening,
        parameter_seconds=optimiser.two,
        kept_bytes=kept.whole(of_states) * pattern.widening,
        working_bytes=max(0.0, beside.one, beside.two) * pattern.widening,
        fixed_bytes=kept_always.whole(pattern) + max(0.0, beside_always.one, beside_always.two) * pattern.scale,
        row_bytes=row_bytes * more,
        head_bytes=max(0.0, head.peak_bytes - row_bytes * rows) * more * pattern.widening,
        head_is_plain=linear_head(head_of(model)) is not None,
    )


def _learner(pattern: Pattern, depth: int, device: torch.device, lora: LoraSettings | None) -> PreTrainedModel:
    """A copy that learns as the student does; a stand-in has other layers than those that are named."""
    model = copy_of(pattern, depth, torch.float32, device)
    return model if lora is None else add_lora(model, replace(lora, targets=None) if pattern.stands_in else lora)


def _learn_at(model: PreTrainedModel, batch: int, width: int, dtype: torch.dtype, meter: Meter, offload: bool) -> tuple[float, ...]:
    """Seconds of a micro-batch and of one sequence, and of the optimiser for each parameter; then bytes: kept of each token and whatever their number
    (weights in another dtype), and what lives beside them, likewise (a layer's gradient before it is added).
    """
    _learn(model, batch, width, dtype)
    kept, beside = [], []
    for tokens in (width // 2, width):
        peak_bytes, _ = meter.bytes(partial(_learn, model, batch, tokens, dtype))
        _, kept_bytes = meter.bytes(partial(_learning, model, batch, tokens, dtype))
        kept.append(kept_bytes)
        beside.append(peak_bytes - kept_bytes)
    more = batch * (width - width // 2)
    kept_each, beside_each = ((two - one) / more for one, two in (kept, beside))
    return (
        meter.seconds(partial(_learn, model, batch, width, dtype)),
        meter.seconds(partial(_learn, model, 1, width, dtype)),
        _optimiser_seconds(model, meter, offload),
        kept_each,
        kept[1] - kept_each * batch * width,
        beside_each,
        beside[1] - beside_each * batch * width,
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
    model: PreTrainedModel, objective: Objective, kind: str, k: int, teacher_width: int, size: int, dtype: torch.dtype, rows: int
) -> Callable[[], object]:
    if any(not match.learned for match in objective.state_matches):
        teacher_width = _width(model)  # such a term compares states of one width, and a stand-in is narrower than the model
    states_RD = torch.full((rows, _width(model)), 0.01, device=model.device)
    targets = _targets(kind, rows, size, k, teacher_width, objective.match_temperature, model.device)
    labels = TextTargets(vocabulary="", token_ids_R=torch.zeros(rows, dtype=torch.int64, device=model.device))
    projections = new_projections(objective.state_matches, student_width=_width(model), teacher_width=teacher_width, seed=0).to(model.device)

    def action() -> object:
        with _arithmetic(model, dtype):
            return backward_chunked(
                states_RD,
                head_of(model),
                size=size,
                objective=objective,
                targets=targets,
                labels=labels,
                divide_by=rows,
                rows_per_chunk=rows,
                projections=projections,
            )

    return action


def _targets(kind: str, rows: int, size: int, k: int, teacher_width: int, temperature: float, device: torch.device) -> Targets:
    """Targets of `kind`, every distribution the even one; `k` ids of each row are kept (top_k) or drawn (drawn)."""
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
        case "drawn":
            # Every draw another id: as much work as there can be.
            return DrawnTargets(
                vocabulary="",
                temperature=temperature,
                draws=k,
                offsets_R1=torch.arange(rows + 1, device=device) * k,
                ids_U=torch.arange(k, device=device).repeat(rows),
                counts_U=torch.ones(rows * k, dtype=torch.int32, device=device),
                entropy_R=torch.full((rows,), -even, device=device),
            )
        case "full":
            return FullTargets(vocabulary="", temperature=temperature, log_probs_RV=torch.full((rows, size), even, device=device))
        case _:
            return TextTargets(vocabulary="", token_ids_R=torch.zeros(rows, dtype=torch.int64, device=device))


def _optimiser_seconds(model: PreTrainedModel, meter: Meter, offload: bool) -> float:
    """Clipping and one AdamW step, for each parameter that is learned."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = optimiser_of(parameters, OptimiserSettings(offload=offload), meter.device)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)

    def action() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()

    action()
    return meter.seconds(action) / sum(parameter.numel() for parameter in parameters)


def _width(model: PreTrainedModel) -> int:
    return int(head_of(model).weight_VD.shape[1])
