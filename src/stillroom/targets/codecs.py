"""How each kind of targets is written down: which columns a row has, of which type, and how much is lost.

Shapes: R scored rows, V vocabulary size, K kept ids, D width of the teacher. numpy only.

| codec  | columns of one row                                          | bytes per row | stored = live                       |
|--------|-------------------------------------------------------------|---------------|-------------------------------------|
| text   | none: the tokens are there already                          | 0             | yes                                 |
| top_k  | ids int32 x K, log_probs float32 x K, tail_log_mass float32 | 8 K + 4       | yes, if live numbers are float32    |
| hidden | states x D, bfloat16 (as uint16) or float32                 | 2 D or 4 D    | yes, if live states are rounded too |

`torch.Tensor.to(torch.bfloat16)` rounds as `to_bfloat16` does, to the nearest, ties to even: a live teacher that rounds its states with either gives
what the store gives, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, assert_never

import numpy
from numpy.typing import DTypeLike, NDArray

from stillroom.targets.kinds import Array, FullTargets, HiddenTargets, Targets, TeacherHead, TextTargets, TopKTargets

STATE_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One array of a row: its name, its little-endian numpy type, and how many of them a row has (0: a single number, not an array)."""

    name: str
    dtype: str
    width: int

    @property
    def bytes_per_row(self) -> int:
        return numpy.dtype(self.dtype).itemsize * max(self.width, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextCodec:
    """Nothing is stored beyond the tokens."""

    kind: ClassVar[str] = "text"

    @property
    def columns(self) -> tuple[Column, ...]:
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKCodec:
    """The `k` most probable ids of each row, and the log of the mass of all others, in float32. Exact for float32 log-probabilities."""

    k: int
    kind: ClassVar[str] = "top_k"

    @property
    def columns(self) -> tuple[Column, ...]:
        return (
            Column(name="ids", dtype="<i4", width=self.k),
            Column(name="log_probs", dtype="<f4", width=self.k),
            Column(name="tail_log_mass", dtype="<f4", width=0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenCodec:
    """The teacher's last hidden state, `width` numbers a row, in `state_dtype`; the teacher's head lies beside the shards once.

    bfloat16 halves the disk; each state is off by at most 2^-8 of itself. float32 is exact for float32 states.
    """

    width: int
    state_dtype: str = "bfloat16"
    kind: ClassVar[str] = "hidden"

    def __post_init__(self) -> None:
        if self.state_dtype not in STATE_DTYPES:
            raise ValueError(f"no state_dtype {self.state_dtype!r}; there are {', '.join(STATE_DTYPES)}")

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(name="states", dtype="<u2" if self.state_dtype == "bfloat16" else "<f4", width=self.width),)


Codec: TypeAlias = TextCodec | TopKCodec | HiddenCodec


def describe(codec: Codec) -> dict[str, Any]:
    """The codec as plain values, for a manifest: `kind` and its parameters."""
    match codec:
        case TextCodec():
            return {"kind": "text"}
        case TopKCodec():
            return {"kind": "top_k", "k": codec.k}
        case HiddenCodec():
            return {"kind": "hidden", "width": codec.width, "state_dtype": codec.state_dtype}
        case _:
            assert_never(codec)


def codec_from(description: dict[str, Any]) -> Codec:
    """The codec that `describe` described. Raises ValueError for anything else."""
    parameters = {name: value for name, value in description.items() if name != "kind"}
    codecs: dict[str, type[Codec]] = {"text": TextCodec, "top_k": TopKCodec, "hidden": HiddenCodec}
    try:
        return codecs[description["kind"]](**parameters)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no codec is described by {description}") from error


def bytes_per_row(codec: Codec) -> int:
    """What a scored row takes on disk beyond its tokens."""
    return sum(column.bytes_per_row for column in codec.columns)


def encode(codec: Codec, targets: Targets) -> dict[str, NDArray[Any]]:
    """The columns of `targets` (numpy arrays), one entry per row each. Raises ValueError if the targets are not of the codec's kind and shape."""
    match codec, targets:
        case TextCodec(), TextTargets():
            return {}
        case TopKCodec(), TopKTargets():
            _require_distinct(numpy.asarray(targets.ids_RK))
            arrays = {"ids": targets.ids_RK, "log_probs": targets.log_probs_RK, "tail_log_mass": targets.tail_log_mass_R}
        case HiddenCodec(), HiddenTargets():
            states_RD = numpy.asarray(targets.states_RD)
            rounds = codec.state_dtype == "bfloat16" and states_RD.dtype != numpy.uint16
            widens = codec.state_dtype == "float32" and states_RD.dtype == numpy.uint16
            arrays = {"states": to_bfloat16(states_RD) if rounds else from_bfloat16(states_RD) if widens else states_RD}
        case _:
            raise ValueError(f"{type(targets).__name__} cannot be written by {codec}")
    return {column.name: _shaped(column, arrays[column.name]) for column in codec.columns}


def decode(
    codec: Codec, columns: dict[str, NDArray[Any]], *, vocabulary: str, temperature: float, head: TeacherHead | None, labels_R: NDArray[Any]
) -> Targets:
    """The targets that `encode` wrote; `labels_R` are the tokens that the rows predict, which text targets are made of."""
    match codec:
        case TextCodec():
            return TextTargets(vocabulary=vocabulary, token_ids_R=labels_R)
        case TopKCodec():
            return TopKTargets(
                vocabulary=vocabulary,
                temperature=temperature,
                ids_RK=columns["ids"],
                log_probs_RK=columns["log_probs"],
                tail_log_mass_R=columns["tail_log_mass"],
            )
        case HiddenCodec():
            assert head is not None, "a store of hidden states has its teacher's head"
            return HiddenTargets(vocabulary=vocabulary, temperature=temperature, states_RD=columns["states"], head=head)
        case _:
            assert_never(codec)


def to_bfloat16(values: Array) -> NDArray[numpy.uint16]:
    """The upper 16 bits of float32 numbers after rounding to the nearest bfloat16, ties to even. NaN stays NaN."""
    bits = numpy.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # Rounding would carry a NaN with a long payload over into a number.
    return numpy.where(numpy.isnan(values), 0x7FC0, rounded).astype(numpy.uint16)


def from_bfloat16(bits: Array) -> NDArray[numpy.float32]:
    """The float32 numbers whose upper 16 bits these are: exact."""
    widened: NDArray[numpy.float32] = (numpy.asarray(bits, dtype="<u2").astype("<u4") << 16).view("<f4")
    return widened


# -- what a codec loses ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecError:
    """KL(original || decoded) in nats over a sample of `rows` rows."""

    mean_kl_nats: float
    max_kl_nats: float
    rows: int


def measure_error(codec: Codec, targets: Targets, log_probs_RV: Array) -> CodecError | None:
    """What is lost between the teacher's distributions `log_probs_RV` and those that can be read back from a store, on a sample of at least one row.

    `log_probs_RV` are the teacher's own, in nats, at the targets' temperature; `targets` the targets of the same rows, all numpy. top_k says nothing
    about how the tail is shared out: it is decoded evenly over the ids that were not kept, so the loss counts what was not kept. Text stores no
    distribution: None.
    """
    if isinstance(codec, TextCodec):
        return None
    original_RV = numpy.asarray(log_probs_RV, dtype=numpy.float64)
    columns = encode(codec, targets)
    head = targets.head if isinstance(targets, HiddenTargets) else None
    temperature = targets.temperature if not isinstance(targets, TextTargets) else 1.0
    decoded = decode(codec, columns, vocabulary=targets.vocabulary, temperature=temperature, head=head, labels_R=numpy.empty(0))
    decoded_RV = whole_log_probs_RV(decoded, original_RV.shape[1])
    p_RV = numpy.exp(original_RV)
    with numpy.errstate(invalid="ignore"):
        kl_R = numpy.where(p_RV > 0, p_RV * (original_RV - decoded_RV), 0.0).sum(axis=1)
    # Rounding can leave a divergence a hair under zero.
    kl_R = numpy.maximum(kl_R, 0.0)
    return CodecError(mean_kl_nats=float(kl_R.mean()), max_kl_nats=float(kl_R.max()), rows=len(kl_R))


def whole_log_probs_RV(targets: Targets, size: int) -> NDArray[numpy.float64]:
    """The distribution that stored targets stand for, over all `size` ids, in float64; the tail of top_k shared out evenly."""
    match targets:
        case FullTargets():
            full_RV: NDArray[numpy.float64] = numpy.asarray(targets.log_probs_RV, dtype=numpy.float64)
            return full_RV
        case HiddenTargets():
            return _log_softmax_RV(_head_logits_RV(targets) / targets.temperature)
        case TopKTargets():
            rows, k = targets.ids_RK.shape
            share = -math.inf if k == size else -math.log(size - k)
            whole_RV = numpy.repeat((numpy.asarray(targets.tail_log_mass_R, dtype=numpy.float64) + share)[:, None], size, axis=1)
            whole_RV[numpy.arange(rows)[:, None], targets.ids_RK] = targets.log_probs_RK
            return whole_RV
        case TextTargets():
            raise ValueError("text is no distribution")
        case _:
            assert_never(targets)


def _head_logits_RV(targets: HiddenTargets) -> NDArray[numpy.float64]:
    head = targets.head
    logits_RV: NDArray[numpy.float64] = _widened(targets.states_RD) @ _widened(head.weight_VD).T
    if head.bias_V is not None:
        logits_RV = logits_RV + _widened(head.bias_V)
    if head.softcap is not None:
        logits_RV = head.softcap * numpy.tanh(logits_RV / head.softcap)
    return logits_RV * head.scale


def _widened(array: Array) -> NDArray[numpy.float64]:
    plain = numpy.asarray(array)
    return (from_bfloat16(plain) if plain.dtype == numpy.uint16 else plain).astype(numpy.float64)


def _log_softmax_RV(logits_RV: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    shifted_RV = logits_RV - logits_RV.max(axis=1, keepdims=True)
    log_probs_RV: NDArray[numpy.float64] = shifted_RV - numpy.log(numpy.exp(shifted_RV).sum(axis=1, keepdims=True))
    return log_probs_RV


def _require_distinct(ids_RK: NDArray[Any]) -> None:
    # An id kept twice would be counted twice, and the tail once too little.
    if (numpy.diff(numpy.sort(ids_RK, axis=1), axis=1) == 0).any():
        raise ValueError("a row of top_k targets keeps an id twice")


def _shaped(column: Column, array: Array) -> NDArray[Any]:
    dtype: DTypeLike = column.dtype
    shaped = numpy.ascontiguousarray(array, dtype=dtype)
    expected = (column.width,) if column.width else ()
    if shaped.shape[1:] != expected:
        raise ValueError(f"column {column.name} has rows of shape {shaped.shape[1:]}, the codec writes {expected}")
    return shaped
