"""Sequences end to end in one row: nothing is padded, positions start anew with each sequence, and each attends to itself alone.

A model's own attention does the work, called once for each length there is, on all sequences of that length together: what a padded batch computes of a
sequence is computed, and nothing else. `transformers` lets attention functions and mask functions be registered by name
(https://huggingface.co/docs/transformers/attention_interface). The mask function is called once for each kind of layer in a pass; here it returns which
sequences there are and what a position sees within its own, and that travels as the attention mask through the layers, and once more where a layer is
computed again for its gradient. Without sequences end to end both functions are the model's own.

H heads, T positions of the whole row, d a head's dimension, N positions of the longest sequence, D width, R scored rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from stillroom.core.errors import ModelError
from stillroom.core.identities import TokenSequence
from stillroom.models.batching import Line, lay_end_to_end, pack_rectangle
from stillroom.models.loading import PACKED, body_of, head_of, own_attention, silence
from stillroom.models.probing import Outline, copy_of, pattern_of

Forward = Callable[..., Any]

_OWN = ("sdpa", "eager")
# What rounding may make of states, as a share of their norm: batches of other shapes, through any number of layers.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_PROBE_LENGTHS = (1, 3, 3, 6, 8)

_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("stillroom_packed_lengths", default=None)


@dataclass(frozen=True, slots=True)
class _Packed:
    """What a kind of layer sees, in the place of its attention mask: the lengths of the sequences, ascending, and what the longest sees of itself
    (1, 1, N, N), as its implementation takes it; None: all that came before. A shorter one sees the same, as far as it goes.
    """

    lengths: tuple[int, ...]
    seen: torch.Tensor | None

    @property
    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(start, count, length) of the sequences of one length."""
        start = 0
        for length in sorted(set(self.lengths)):
            count = self.lengths.count(length)
            yield start, count, length
            start += count * length


# -- the two functions ----------------------------------------------------------------------------------------------------


def _mask(own: str, *, q_length: int, **arguments: Any) -> Any:
    """The mask of the model's own implementation, or `_Packed`."""
    lengths = _lengths.get()
    if lengths is None:
        return ALL_MASK_ATTENTION_FUNCTIONS[own](q_length=q_length, **arguments)
    assert q_length == sum(lengths), "a row of sequences has no cache"
    assert arguments.get("attention_mask") is None, "nor any padding"
    longest, start = lengths[-1], q_length - lengths[-1]
    arguments |= {"batch_size": 1, "kv_length": longest, "kv_offset": start, "allow_is_causal_skip": False}
    if own == "sdpa":
        # Where the last position sees all others there is no window, and no mask need be made.
        last = sdpa_mask(q_length=1, q_offset=start + longest - 1, **{name: value for name, value in arguments.items() if name != "q_offset"})
        assert last is not None
        if bool(last.all()):
            return _Packed(lengths, None)
    return _Packed(lengths, ALL_MASK_ATTENTION_FUNCTIONS[own](q_length=longest, **arguments | {"q_offset": start}))


def _attention(
    own: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention (1, T, H, d) over query, key and value (1, H, T, d), or the model's own where `attention_mask` is not `_Packed`."""
    forward = _own_attention(own, module)
    if not isinstance(attention_mask, _Packed):
        result: tuple[torch.Tensor, torch.Tensor | None] = forward(module, query, key, value, attention_mask, **options)
        return result
    if (whole := _varlen(query, key, value, attention_mask, options)) is not None:
        return whole.unsqueeze(0), None
    parts = []
    for start, count, length in attention_mask.runs:
        # (count, H, length, d), without a copy.
        own_qkv = (part[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1) for part in (query, key, value))
        seen = None if attention_mask.seen is None else attention_mask.seen[..., :length, :length]
        attended, _ = forward(module, *own_qkv, seen, **options)
        parts.append(attended.flatten(0, 1))
    return torch.cat(parts).unsqueeze(0), None


def _own_attention(own: str, module: nn.Module) -> Forward:
    """The function that the model's own code would have called: eager ones are defined beside each model."""
    for kind in type(module).__mro__:
        code = sys.modules.get(kind.__module__)
        if (known := getattr(code, "ALL_ATTENTION_FUNCTIONS", None)) is not None:
            forward: Forward = known.get_interface(own, getattr(code, "eager_attention_forward", None))
            return forward
    raise AssertionError(f"{type(module).__name__} is not of a file that has attention functions")


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: _Packed, options: dict[str, Any]) -> torch.Tensor | None:
    """All sequences in one call of flash attention (T, H, d), on a GPU that has it, in half precision, where all that came before is seen; else None."""
    if not _on_gpu(query) or packed.seen is not None or options.get("s_aux") is not None:
        return None
    half = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else query.dtype
    if half not in (torch.bfloat16, torch.float16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    ends = torch.tensor((0, *packed.lengths), device=query.device).cumsum(0).to(torch.int32)
    query, key, value = (part[0].transpose(0, 1).to(half) for part in (query, key, value))
    longest = packed.lengths[-1]
    attended = varlen_attn(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        scale=options.get("scaling"),
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, torch.Tensor)
    return attended


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def _register(prepared: Callable[[Forward], Forward] = lambda function: function) -> None:
    for name in _OWN:
        AttentionInterface.register(PACKED + name, partial(prepared(_attention), name))
        AttentionMaskInterface.register(PACKED + name, partial(prepared(_mask), name))


_register()


def leave_to_python() -> None:
    """From now on torch.compile leaves both functions as they are: it would make another kernel for every set of lengths that it meets."""
    _register(torch.compiler.disable)


# -- a model that packs ---------------------------------------------------------------------------------------------------


def packs(model: PreTrainedModel) -> bool:
    """Whether `pack` said that this model may."""
    return str(model.config._attn_implementation).startswith(PACKED)


def pack(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str | None:
    """Has `scored_states` lay sequences end to end for this model, if that is proved to change nothing but rounding; else returns why not.

    Proved on the model itself, with a handful of tokens: each sequence has the states that it has alone, and no state depends on another sequence's
    tokens, by a derivative that is exactly zero. A model that carries something from position to position by itself (a recurrence, a convolution) or has
    attention of its own making fails, and is left as it was. `dtype`: what its arithmetic is autocast to, where it is not the model's own.
    """
    configs = {id(config): config for config in _configs(model)}
    before = {place: config._attn_implementation for place, config in configs.items()}
    own = {place: own_attention(config) or "eager" for place, config in configs.items()}
    if other := set(own.values()).difference(_OWN):
        return f"the attention is {', '.join(sorted(other))}"
    for place, config in configs.items():
        config._attn_implementation_internal = PACKED + own[place]
    why: str | None = "it failed on sequences laid end to end"
    try:
        with suppress(RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError), silence():
            why = _difference(model, dtype or model.dtype)
    finally:
        if why is not None:
            for place, config in configs.items():
                config._attn_implementation_internal = before[place]
    return why


def pack_as_proved(model: PreTrainedModel) -> None:
    """`pack` of a model that has no weights yet, after `why_not_packed` found no reason against it."""
    for config in {id(config): config for config in _configs(model)}.values():
        config._attn_implementation_internal = PACKED + (own_attention(config) or "eager")


def require_packing(model: PreTrainedModel, whose: str, dtype: torch.dtype | None = None) -> None:
    """`pack`, or ModelError 'packing-unsupported'."""
    why = pack(model, dtype)
    if why is not None:
        raise cannot_pack(whose, why)


def why_not_packed(outline: Outline, dtype: torch.dtype, arithmetic: torch.dtype, device: torch.device) -> str | None:
    """`pack` on a copy of two of a model's layers, whose weights mean nothing: what is proved of a model before it is loaded.

    `dtype` is that of its weights, `arithmetic` what they are autocast to.
    """
    pattern = pattern_of(outline, dtype.itemsize, device)
    if pattern.stands_in:
        return "two of its layers do not fit into memory beside what is there, or cannot be cut out, so that it could not be tried"
    return pack(copy_of(pattern, min(2, pattern.layers), dtype, device), arithmetic)


def cannot_pack(whose: str, why: str) -> ModelError:
    """The error of a model that cannot take sequences end to end."""
    return ModelError(
        "packing-unsupported",
        found=f"the {whose}, of which {why}",
        expected="a model that takes sequences laid end to end as it takes each alone",
        why="sequences would be seen by one another",
        do="Set training.packing to off.",
    )


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    found = (getattr(module, "config", None) for module in model.modules())
    return [config for config in found if isinstance(config, PretrainedConfig)]


def _difference(model: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """What laying a few sequences end to end changes; None: nothing but rounding."""
    rows = head_of(model).weight_VD.shape[0]
    ids = torch.randint(rows, (sum(_PROBE_LENGTHS),), generator=torch.Generator().manual_seed(0)).to(model.device)
    positions = torch.cat([torch.arange(length) for length in _PROBE_LENGTHS]).to(model.device)
    line = Line(ids_1T=ids[None], positions_1T=positions[None], rows_R=torch.arange(len(ids)), lengths=_PROBE_LENGTHS)
    body = body_of(model)
    with _autocast(model, dtype):
        with torch.enable_grad(), _embedded(model) as embedded:
            together = through(body, line)[0]
            tested = slice(sum(_PROBE_LENGTHS[:3]), sum(_PROBE_LENGTHS[:4]))
            (gradient_TD,) = torch.autograd.grad((together[tested] * _direction(together[tested])).sum(), embedded)
        with torch.no_grad():
            alone = [body(input_ids=own[None], use_cache=False).last_hidden_state[0] for own in ids.split(_PROBE_LENGTHS)]
    reached = gradient_TD.reshape(-1, gradient_TD.shape[-1]).ne(0).any(dim=-1)
    if bool(reached[: tested.start].any()) or bool(reached[tested.stop :].any()):
        return "states depend on the tokens of other sequences"
    if not bool(reached[tested].all()):
        return "states do not depend on all tokens before them"
    off = max(float((a - b).norm() / b.norm()) for a, b in zip(together.detach().split(_PROBE_LENGTHS), alone, strict=True))
    return None if off <= _ROUNDING[dtype] else f"states are {off:.1e} of their norm away from those of each sequence alone"


def _direction(states: torch.Tensor) -> torch.Tensor:
    """Anything that is not orthogonal to what a norm leaves over."""
    numbers = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    return numbers.to(states)


@contextmanager
def _embedded(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """The embedded tokens of the pass inside, as leaves to differentiate by."""
    found: list[torch.Tensor] = []

    def hook(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def _autocast(model: PreTrainedModel, dtype: torch.dtype) -> Any:
    return nullcontext() if dtype == model.dtype else torch.autocast(model.device.type, dtype)


# -- passes ---------------------------------------------------------------------------------------------------------------


def through(body: Forward, line: Line) -> torch.Tensor:
    """Last hidden states, 1 x T x D, of sequences laid end to end, by the body of a model that packs."""
    token = _lengths.set(line.lengths)
    try:
        states_1TD: torch.Tensor = body(input_ids=line.ids_1T, position_ids=line.positions_1T, use_cache=False).last_hidden_state
    finally:
        _lengths.reset(token)
    return states_1TD


def scored_states(model: PreTrainedModel, sequences: Sequence[TokenSequence], body: Forward | None = None) -> torch.Tensor:
    """The last hidden state (after the final norm) of every scored row, R x D, in the order of `sequences`; end to end where the model packs, else padded.

    `body` is called in the place of the model's own where it is given.
    """
    body = body or body_of(model)
    if packs(model):
        line = lay_end_to_end(sequences, model.device)
        states, rows_R = through(body, line), line.rows_R
    else:
        rectangle = pack_rectangle(sequences, model.device)
        states, rows_R = body(input_ids=rectangle.ids_BT, use_cache=False).last_hidden_state, rectangle.rows_R
    states_RD: torch.Tensor = states.reshape(-1, states.shape[-1]).index_select(0, rows_R)
    return states_RD
