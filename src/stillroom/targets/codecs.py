"""How each kind of targets is written down: which columns a row has, of which type, and how much is lost.

Shapes: R scored rows, V vocabulary size, K kept ids, D width of the teacher. numpy only.

| codec   | columns of one row                                          | bytes per row         | stored = live                          |
|---------|-------------------------------------------------------------|-----------------------|----------------------------------------|
| text    | none: the tokens are there already                          | 0                     | yes                                    |
| sampled | log_probs float32: the tokens are there already             | 4                     | yes, if live numbers are float32       |
| drawn   | none of fixed width: entropy-coded, see `packing`           | as the rows are       | yes, but for the entropy: within 2^-10 |
| top_k   | ids int32 x K, log_probs float32 x K, tail_log_mass float32 | 8 K + 4               | yes, if live numbers are float32       |
| hidden  | states x D, bfloat16 (as uint16), float32 or int8; with     | 2 D, 4 D or D + 4     | yes, if live states are rounded too    |
|         | int8 a float32 scale                                        |                       |                                        |

`torch.Tensor.to(torch.bfloat16)` rounds as `to_bfloat16` does, to the nearest, ties to even: a live teacher that rounds its states with either gives
what the store gives, bit for bit. Rounding twice changes nothing, for int8 as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeAlias, assert_never

import numpy
from numpy.typing import DTypeLike, NDArray

from stillroom.targets.kinds import Array, DrawnTargets, FullTargets, HiddenTargets, SampledTargets, Targets, TeacherHead, TextTargets, TopKTargets
from stillroom.targets.prior import ENTROPY_STEPS_PER_NAT, MOST_DRAWS, quantised_entropy
from stillroom.targets.rows import slice_targets

STATE_DTYPES = ("bfloat16", "float32", "int8")
# How far a state may be from the one that is read back, as a share of itself, or for int8 of its row's scale (half a step, and a division's rounding).
BFLOAT16_ERROR = 2.0**-8
INT8_ERROR = 0.5 + 2.0**-16
# Below 2^-126 bfloat16 has steps of equal size.
SMALLEST_BFLOAT16 = 2.0**-133
SMALLEST_SCALE = 2.0**-100
# Of 16 significant bits, the largest of which 127 are still a float32.
LARGEST_SCALE = (2.0**128 // 127 // 2.0**106 - 1) * 2.0**106
# An error is measured in float64 in half a dozen arrays of so many rows at a time, or so many log-probabilities (16 MiB) if those are more rows; a head is
# widened so many numbers at a time.
_MEASURED_ROWS, _MEASURED_VALUES, _WIDENED_NUMBERS = 64, 2**21, 2**22


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
class SampledCodec:
    """The log-probability of each row's own token, in float32."""

    kind: ClassVar[str] = "sampled"

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(name="log_probs", dtype="<f4", width=0),)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnCodec:
    """`draws` ids drawn from the teacher, as unique ids and counts, and the entropy to the nearest 1/512 nat; entropy-coded together with the tokens.

    Exact but for the entropy, which is off by at most 2^-10 nats and shifts the value of a divergence by as much, and no gradient. What is drawn
    depends on `seed` and the record's tokens alone.
    """

    draws: int
    seed: int = 0
    kind: ClassVar[str] = "drawn"

    def __post_init__(self) -> None:
        if not 1 <= self.draws <= MOST_DRAWS:
            raise ValueError(f"drawn targets have from 1 to {MOST_DRAWS} draws a row, not {self.draws}")

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

    bfloat16 halves the disk; each state is off by at most 2^-8 of itself. float32 is exact for float32 states. int8 quarters it: a row has one
    scale, its largest state in size / 127 rounded up to 16 significant bits, and each state is off by at most (1/2 + 2^-16) scale.

    What that makes of the distribution: where each state of a row is off by at most e_d, the logit of id v is off by at most
    scale of the head x sum_d e_d |w_vd| / temperature (a soft-cap only lessens it); with e the largest of these over v, log-probabilities are off
    by at most 2 e, and KL(original || decoded) is at most e^2 / 2 (Hoeffding's lemma: the differences of the logits lie within 2 e of one another).
    docs/reference/target-store.md states by how much the value and the gradient of each divergence can change, and why.
    """

    width: int
    state_dtype: str = "bfloat16"
    kind: ClassVar[str] = "hidden"

    def __post_init__(self) -> None:
        if self.state_dtype not in STATE_DTYPES:
            raise ValueError(f"no state_dtype {self.state_dtype!r}; there are {', '.join(STATE_DTYPES)}")

    @property
    def columns(self) -> tuple[Column, ...]:
        states = Column(name="states", dtype={"bfloat16": "<u2", "float32": "<f4", "int8": "i1"}[self.state_dtype], width=self.width)
        return (states, Column(name="scales", dtype="<f4", width=0)) if self.state_dtype == "int8" else (states,)


Codec: TypeAlias = TextCodec | SampledCodec | DrawnCodec | TopKCodec | HiddenCodec


def describe(codec: Codec) -> dict[str, Any]:
    """The codec as plain values, for a manifest: `kind` and its parameters."""
    match codec:
        case TextCodec():
            return {"kind": "text"}
        case SampledCodec():
            return {"kind": "sampled"}
        case DrawnCodec():
            return {"kind": "drawn", "draws": codec.draws, "seed": codec.seed}
        case TopKCodec():
            return {"kind": "top_k", "k": codec.k}
        case HiddenCodec():
            return {"kind": "hidden", "width": codec.width, "state_dtype": codec.state_dtype}
        case _:
            assert_never(codec)


def codec_from(description: dict[str, Any]) -> Codec:
    """The codec that `describe` described. Raises ValueError for anything else."""
    parameters = {name: value for name, value in description.items() if name != "kind"}
    codecs: dict[str, type[Codec]] = {codec.kind: codec for codec in (TextCodec, SampledCodec, DrawnCodec, TopKCodec, HiddenCodec)}
    try:
        return codecs[description["kind"]](**parameters)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no codec is described by {description}") from error


FixedCodec: TypeAlias = TextCodec | SampledCodec | TopKCodec | HiddenCodec


def bytes_per_row(codec: FixedCodec) -> int:
    """What a scored row takes on disk beyond its tokens. Of drawn targets the rows themselves decide."""
    return sum(column.bytes_per_row for column in codec.columns)


def encode(codec: FixedCodec, targets: Targets) -> dict[str, NDArray[Any]]:
    """The columns of `targets` (numpy arrays), one entry per row each. Raises ValueError if the targets are not of the codec's kind and shape.

    Drawn targets have no columns: `packing.pack` writes them.
    """
    match codec, targets:
        case TextCodec(), TextTargets():
            return {}
        case SampledCodec(), SampledTargets():
            arrays = {"log_probs": targets.log_probs_R}
        case TopKCodec(), TopKTargets():
            _require_distinct(numpy.asarray(targets.ids_RK))
            arrays = {"ids": targets.ids_RK, "log_probs": targets.log_probs_RK, "tail_log_mass": targets.tail_log_mass_R}
        case HiddenCodec(), HiddenTargets():
            arrays = _states(codec.state_dtype, numpy.asarray(targets.states_RD))
        case _:
            raise ValueError(f"{type(targets).__name__} cannot be written by {codec}")
    return {column.name: _shaped(column, arrays[column.name]) for column in codec.columns}


def _states(state_dtype: str, states_RD: NDArray[Any]) -> dict[str, NDArray[Any]]:
    if state_dtype == "bfloat16":
        return {"states": states_RD if states_RD.dtype == numpy.uint16 else to_bfloat16(states_RD)}
    wide_RD = from_bfloat16(states_RD) if states_RD.dtype == numpy.uint16 else states_RD
    if state_dtype == "int8":
        rounded_RD, scales_R = to_int8(wide_RD)
        return {"states": rounded_RD, "scales": scales_R}
    return {"states": wide_RD}


def decode(
    codec: FixedCodec, columns: dict[str, NDArray[Any]], *, vocabulary: str, temperature: float, head: TeacherHead | None, labels_R: NDArray[Any]
) -> Targets:
    """The targets that `encode` wrote; `labels_R` are the tokens that the rows predict, which text and sampled targets are made of."""
    match codec:
        case TextCodec():
            return TextTargets(vocabulary=vocabulary, token_ids_R=labels_R)
        case SampledCodec():
            return SampledTargets(vocabulary=vocabulary, temperature=temperature, token_ids_R=labels_R, log_probs_R=columns["log_probs"])
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
            states_RD = from_int8(columns["states"], columns["scales"]) if codec.state_dtype == "int8" else columns["states"]
            return HiddenTargets(vocabulary=vocabulary, temperature=temperature, states_RD=states_RD, head=head)
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


def to_int8(states_RD: Array) -> tuple[NDArray[numpy.int8], NDArray[numpy.float32]]:
    """Whole numbers from -127 to 127 and a scale for each row, whose product is the state. A row that is not finite has the scale NaN.

    Scales have 16 significant bits and are at least 2^-100, so that every product is a float32 exactly and rounding it again gives the same numbers.
    """
    states_RD = numpy.ascontiguousarray(states_RD, dtype="<f4")
    steps_R = numpy.abs(states_RD).max(axis=1, initial=0.0) / numpy.float32(127)
    finite_R = numpy.isfinite(steps_R)
    bits_R = numpy.where(finite_R, steps_R, 1).astype("<f4").view("<u4")
    rounded_up_R = ((bits_R + numpy.uint32(0xFF)) & numpy.uint32(0xFFFFFF00)).view("<f4")
    scales_R = rounded_up_R.clip(numpy.float32(SMALLEST_SCALE), numpy.float32(LARGEST_SCALE))
    rounded_RD = numpy.rint(numpy.where(finite_R[:, None], states_RD, 0) / scales_R[:, None]).astype(numpy.int8)
    return rounded_RD, numpy.where(finite_R, scales_R, numpy.float32("nan"))


def from_int8(rounded_RD: Array, scales_R: Array) -> NDArray[numpy.float32]:
    """The float32 states that these stand for: exact."""
    states_RD: NDArray[numpy.float32] = numpy.asarray(rounded_RD).astype(numpy.float32) * numpy.asarray(scales_R, dtype=numpy.float32)[:, None]
    return states_RD


# -- what a codec loses ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecError:
    """What is lost over a sample of `rows` rows; None where the codec has no such loss.

    top_k and hidden: KL(original || decoded) in nats. hidden besides: the largest difference of a log-probability, and what either can be at most
    in these rows, by the bound that HiddenCodec states. drawn: the largest difference of a row's entropy (draws are no approximation of anything:
    their mean is the distribution itself).
    """

    rows: int
    mean_kl_nats: float | None = None
    max_kl_nats: float | None = None
    kl_bound_nats: float | None = None
    max_log_prob_error_nats: float | None = None
    log_prob_bound_nats: float | None = None
    max_entropy_error_nats: float | None = None


def measure_error(codec: Codec, targets: Targets, log_probs_RV: Array) -> CodecError | None:
    """What is lost between the teacher's distributions `log_probs_RV` and those that can be read back from a store, on a sample of at least one row.

    `log_probs_RV` are the teacher's own, in nats, at the targets' temperature; `targets` the targets of the same rows, all numpy. top_k says nothing
    about how the tail is shared out: it is decoded evenly over the ids that were not kept, so the loss counts what was not kept. Text and sampled
    targets stand for no distribution: None.
    """
    if isinstance(codec, TextCodec | SampledCodec):
        return None
    rows, size = log_probs_RV.shape
    at_once = max(_MEASURED_ROWS, _MEASURED_VALUES // size)
    starts = range(0, rows, at_once)
    return _worst([_measured(codec, slice_targets(targets, at, min(at + at_once, rows)), log_probs_RV[at : at + at_once]) for at in starts])


def _measured(codec: DrawnCodec | TopKCodec | HiddenCodec, targets: Targets, log_probs_RV: Array) -> CodecError:
    original_RV = numpy.asarray(log_probs_RV, dtype=numpy.float64)
    if isinstance(codec, DrawnCodec):
        return _entropy_error(targets, original_RV)
    assert isinstance(targets, TopKTargets | HiddenTargets), f"{type(targets).__name__} are not written by {codec}"
    head = targets.head if isinstance(targets, HiddenTargets) else None
    decoded = decode(
        codec, encode(codec, targets), vocabulary=targets.vocabulary, temperature=targets.temperature, head=head, labels_R=numpy.empty(0)
    )
    decoded_RV = whole_log_probs_RV(decoded, original_RV.shape[1])
    p_RV = numpy.exp(original_RV)
    with numpy.errstate(invalid="ignore"):
        kl_R = numpy.where(p_RV > 0, p_RV * (original_RV - decoded_RV), 0.0).sum(axis=1)
    # Rounding can leave a divergence a hair under zero.
    kl_R = numpy.maximum(kl_R, 0.0)
    measured = CodecError(rows=len(kl_R), mean_kl_nats=float(kl_R.mean()), max_kl_nats=float(kl_R.max()))
    if isinstance(codec, HiddenCodec) and isinstance(targets, HiddenTargets):
        # Against what the very states give, in float64: the teacher's own float32 rounding is none of the codec's.
        exact_RV = whole_log_probs_RV(targets, original_RV.shape[1])
        e = float(logit_bound_R(codec, targets).max())
        return replace(
            measured,
            kl_bound_nats=e * e / 2,
            max_log_prob_error_nats=float(numpy.abs(exact_RV - decoded_RV).max()),
            log_prob_bound_nats=2 * e,
        )
    return measured


def _worst(parts: Sequence[CodecError]) -> CodecError:
    """That of all rows: the mean over them, and the largest of what is a maximum or a bound."""
    rows = sum(part.rows for part in parts)
    whole: dict[str, float] = {}
    for name in (field.name for field in fields(CodecError) if field.name not in ("rows", "mean_kl_nats")):
        values = [getattr(part, name) for part in parts]
        if None not in values:
            whole[name] = max(values)
    if parts[0].mean_kl_nats is not None:
        whole["mean_kl_nats"] = sum(part.rows * part.mean_kl_nats for part in parts if part.mean_kl_nats is not None) / rows
    return CodecError(rows=rows, **whole)


def logit_bound_R(codec: HiddenCodec, targets: HiddenTargets) -> NDArray[numpy.float64]:
    """For each row, by how much a logit over the temperature can be off at most once the states have been through the codec (see HiddenCodec)."""
    error_RD, weight_VD = state_bound_RD(codec, _widened(targets.states_RD)), targets.head.weight_VD
    bounds = [(error_RD @ numpy.abs(_widened(weight_VD[ids])).T).max(axis=1) for ids in _pieces(weight_VD)]
    bound_R: NDArray[numpy.float64] = numpy.maximum.reduce(bounds)
    return bound_R * abs(targets.head.scale) / targets.temperature


def state_bound_RD(codec: HiddenCodec, states_RD: Array) -> NDArray[numpy.float64]:
    """By how much each of these float32 states can be off at most once it has been through the codec."""
    match codec.state_dtype:
        case "bfloat16":
            sizes_RD: NDArray[numpy.float64] = numpy.abs(numpy.asarray(states_RD, dtype=numpy.float64))
            return numpy.maximum(BFLOAT16_ERROR * sizes_RD, SMALLEST_BFLOAT16 / 2)
        case "int8":
            scales_R = to_int8(states_RD)[1].astype(numpy.float64)
            return numpy.tile(INT8_ERROR * scales_R[:, None], (1, states_RD.shape[1]))
        case _:
            return numpy.zeros(states_RD.shape)


def _entropy_error(targets: Targets, original_RV: NDArray[numpy.float64]) -> CodecError:
    assert isinstance(targets, DrawnTargets), f"{type(targets).__name__} are not written as drawn targets"
    with numpy.errstate(invalid="ignore"):
        exact_R = -numpy.where(original_RV > -math.inf, numpy.exp(original_RV) * original_RV, 0.0).sum(axis=1)
    stored_R = quantised_entropy(targets.entropy_R, original_RV.shape[1]) / ENTROPY_STEPS_PER_NAT
    return CodecError(rows=len(exact_R), max_entropy_error_nats=float(numpy.abs(stored_R - exact_R).max()))


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
        case TextTargets() | SampledTargets() | DrawnTargets():
            raise ValueError(f"{type(targets).__name__} are no distribution")
        case _:
            assert_never(targets)


def _head_logits_RV(targets: HiddenTargets) -> NDArray[numpy.float64]:
    head = targets.head
    states_RD = _widened(targets.states_RD)
    logits_RV: NDArray[numpy.float64] = numpy.empty((len(states_RD), len(head.weight_VD)))
    for ids in _pieces(head.weight_VD):
        numpy.matmul(states_RD, _widened(head.weight_VD[ids]).T, out=logits_RV[:, ids])
    if head.bias_V is not None:
        logits_RV = logits_RV + _widened(head.bias_V)
    if head.softcap is not None:
        logits_RV = head.softcap * numpy.tanh(logits_RV / head.softcap)
    return logits_RV * head.scale


def _pieces(weight_VD: Array) -> list[slice]:
    """A head's rows, so many at a time that they may be widened."""
    rows = max(1, _WIDENED_NUMBERS // weight_VD.shape[1])
    return [slice(start, start + rows) for start in range(0, len(weight_VD), rows)]


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
