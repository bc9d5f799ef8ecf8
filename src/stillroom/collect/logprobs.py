"""Log-probabilities from an endpoint: believed only after they have been checked, and kept packed.

`verify` holds an answer's log-probabilities against its text, its usage and themselves. What fails is *demoted*: the text stays an answer, and the reason
is counted. What holds becomes top-k targets with an exact tail, the same kind as a local teacher's. T generated tokens, N alternatives of all of them
end to end, K kept ones for each.
"""

from __future__ import annotations

import io
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from stillroom.collect.wire import Answer, Places
from stillroom.core import durable
from stillroom.core.errors import CollectError, StoreError
from stillroom.targets.kinds import TopKTargets
from stillroom.targets.vocabulary import Vocabulary

DemotionReason: TypeAlias = Literal[
    "absent",  # no log-probabilities came
    "unreadable",  # some came that are not in a known shape
    "count-differs",  # another number of entries than the usage counts
    "text-differs",  # the tokens joined are not the text
    "stop-inside-token",  # the text ends inside a token, at a stop string
    "token-unknown",  # a generated token that is not, or not uniquely, one of the teacher's tokenizer
    "id-differs",  # an id whose token is not the one given beside it
    "not-finite",
    "above-zero",
    "mass-above-one",
    "duplicate-alternative",
    "chosen-inconsistent",  # the token's log-probability is not that of its entry in the list, or too large to be outside it
    "not-greedy",  # a likelier alternative than the token, at temperature 0
    "too-few-alternatives",
]

# Values are float32 at the other end, and some servers write four decimals: 20 of those are off by 5e-5 of their mass together.
_MASS_TOLERANCE = 1e-3
_VALUE_TOLERANCE_NATS = 1e-3
# What is left of 1 after float32 values of rounding 6e-8 is known no better than that.
_LEAST_REST = 2.0**-24
_UNKNOWN_NATS = -9000.0  # OpenAI's -9999: "very unlikely", not a value
_LOWEST_FLOAT16 = -65504.0
_REPLACEMENT = "\ufffd".encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Demoted:
    """The text is kept, its log-probabilities are not. `detail` says where, in numbers and not in the answer's words."""

    reason: DemotionReason
    detail: str = ""


class TokenIndex:
    """From the bytes of a token to its id, where exactly one has them, over one vocabulary. Made once, used for many answers."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        counts = Counter(vocabulary.tokens)
        self._ids = {token: index for index, token in enumerate(vocabulary.tokens) if token and counts[token] == 1}

    def ids_of(self, tokens: Iterable[bytes]) -> NDArray[numpy.int64]:
        """-1 where none or several have the bytes."""
        get = self._ids.get
        return numpy.array([get(token, -1) for token in tokens], numpy.int64)

    def is_ending(self, index: int) -> bool:
        return index in self.vocabulary.special_ids or index in self.vocabulary.end_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectations:
    """What an answer was asked for, and what is known of the endpoint.

    `alternatives`: fewer at any place, after those that cannot be resolved are left out, is a reason to demote. `temperature` as it was sampled.
    `reported`: whether the endpoint gives the distribution before temperature or after it, as the probe proved. `usage_is_its_own` is false where the
    usage counts several answers. `index` is the teacher's tokenizer where it is known; without it tokens stay bytes.
    """

    alternatives: int
    temperature: float
    reported: Literal["before", "after"] = "before"
    stop: tuple[str, ...] = ()
    usage_is_its_own: bool = True
    index: TokenIndex | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Verified:
    """Log-probabilities that have passed, of the answer's tokens in order. Alternatives stand in descending order within their place.

    `ids_T` and `top_ids_N` are the teacher's, -1 where not known; bytes are kept only where some id is not. `rest_log_mass_T`: the log of what the listed
    alternatives leave of 1, computed in float64, -inf where they are the whole vocabulary. `temperature` is the one the distribution is at.
    `ended`: the last place is the end token, which is not in the text. `skipped`: places before these, of reasoning, or 0.
    """

    ids_T: NDArray[numpy.int32]
    logprobs_T: NDArray[numpy.float64]
    top_ids_N: NDArray[numpy.int32]
    top_logprobs_N: NDArray[numpy.float64]
    starts_T1: NDArray[numpy.int64]
    rest_log_mass_T: NDArray[numpy.float64]
    temperature: float
    ended: bool
    skipped: int = 0
    tokens_T: list[bytes] | None = None
    top_tokens_N: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.ids_T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How many answers were verified, and how many demoted for which reason."""

    verified: int
    demoted: Mapping[DemotionReason, int] = field(default_factory=dict)

    @property
    def rate(self) -> float | None:
        """The share that was verified; None of none."""
        total = self.verified + sum(self.demoted.values())
        return self.verified / total if total else None


def tally(results: Iterable[Verified | Demoted]) -> Tally:
    """The table of a set of results, reasons by how often they were met."""
    counts: Counter[DemotionReason] = Counter()
    verified = 0
    for result in results:
        if isinstance(result, Demoted):
            counts[result.reason] += 1
        else:
            verified += 1
    return Tally(verified=verified, demoted=dict(counts.most_common()))


# -- checks ------------------------------------------------------------------------------------------------------------


def verify(answer: Answer, expected: Expectations) -> Verified | Demoted:
    """Checks an answer's log-probabilities in every way that they can be checked here; the first check that fails is the reason."""
    places = answer.places
    if places is None:
        return Demoted(reason="unreadable" if answer.places_unreadable else "absent")
    tokens = _Tokens(places, expected.index)
    span = _matched(answer, places, tokens, expected)
    if isinstance(span, Demoted):
        return span
    chosen_T, logprobs_T = tokens.ids_T, places.logprobs_T
    table = _Table(places, tokens)
    problem = table.problem(expected) or (_unresolved(tokens, span) if expected.index else None)
    if problem is not None:
        return problem
    table = table.sorted()
    first, last = span.first, span.last
    if len(table.listed_T[first:last]) and (fewest := int(table.listed_T[first:last].min())) < expected.alternatives:
        return Demoted(reason="too-few-alternatives", detail=f"{fewest} at a place, {expected.alternatives} expected")
    begin, end = int(table.starts_T1[first]), int(table.starts_T1[last])
    kept_bytes = expected.index is None
    return Verified(
        ids_T=chosen_T[first:last].astype(numpy.int32),
        logprobs_T=numpy.minimum(logprobs_T[first:last], 0.0),
        top_ids_N=table.ids_N[begin:end].astype(numpy.int32),
        top_logprobs_N=numpy.minimum(table.logprobs_N[begin:end], 0.0),
        starts_T1=table.starts_T1[first : last + 1] - begin,
        rest_log_mass_T=table.rest_log_mass_T(expected.index)[first:last],
        temperature=1.0 if expected.reported == "before" else expected.temperature,
        ended=span.ended,
        skipped=first,
        tokens_T=tokens.bytes_T[first:last] if kept_bytes else None,
        top_tokens_N=table.bytes_N[begin:end] if kept_bytes else None,
    )


class _Tokens:
    """The generated tokens: their bytes and their ids, each from the other where only one was given."""

    def __init__(self, places: Places, index: TokenIndex | None) -> None:
        count = len(places)
        self.id_differs: int | None = None
        self.with_vocabulary = index is not None
        given = places.tokens_T
        if index is None:
            self.ids_T = numpy.full(count, -1, numpy.int64) if places.ids_T is None else places.ids_T
            self.bytes_T = given or [b""] * count
            self.ending_T = [not token for token in self.bytes_T]
            return
        if places.ids_T is None:
            self.ids_T = index.ids_of(given or [b""] * count)
        else:
            self.ids_T = numpy.where((places.ids_T >= 0) & (places.ids_T < index.vocabulary.size), places.ids_T, -1)
        known = index.vocabulary.tokens
        self.ending_T = [id_ >= 0 and index.is_ending(id_) for id_ in self.ids_T.tolist()]
        self.bytes_T = [known[id_] if id_ >= 0 else b"" for id_ in self.ids_T.tolist()] if given is None or places.ids_T is not None else given
        if given is not None and places.ids_T is not None:
            self.id_differs = next((t for t, token in enumerate(given) if not self._agree(t, token)), None)

    def _agree(self, t: int, given: bytes) -> bool:
        """Special tokens are written as nothing by some; a first token may have lost its leading space; a replacement character is not a claim."""
        known = self.bytes_T[t]
        return given == known or _REPLACEMENT in given or (self.ending_T[t] and not given) or (t == 0 and known == b" " + given)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    first: int
    last: int  # exclusive
    ended: bool


def _matched(answer: Answer, places: Places, tokens: _Tokens, expected: Expectations) -> _Span | Demoted:
    """Which places are those of the text, or why they are not."""
    if tokens.id_differs is not None:
        return Demoted(reason="id-differs", detail=f"place {tokens.id_differs}")
    span = _span(answer, tokens, expected.stop)
    if isinstance(span, Demoted):
        counted = _counted(answer, places, expected)
        return counted if counted is not None else span
    # An end token that is counted but has no entry is no gap where the text is whole.
    return _counted(answer, places, expected, spare=1 if answer.finish_reason == "stop" and not span.ended else 0) or span


def _counted(answer: Answer, places: Places, expected: Expectations, spare: int = 0) -> Demoted | None:
    usage = answer.usage
    if usage is None or not expected.usage_is_its_own:
        return None
    entries = len(places) + (len(answer.reasoning_places) if answer.reasoning_places is not None else 0)
    possible = {usage.completion_tokens, usage.completion_tokens - spare}
    if answer.reasoning_places is None:
        possible |= {count - usage.reasoning_tokens for count in possible}
    if entries in possible:
        return None
    return Demoted(reason="count-differs", detail=f"{entries} entries, {usage.completion_tokens} tokens in the usage")


def _span(answer: Answer, tokens: _Tokens, stop: tuple[str, ...]) -> _Span | Demoted:
    text, count = answer.text.encode(), len(tokens.bytes_T)
    ended = bool(count) and tokens.ending_T[-1]
    spoken = count - ended
    joined = b"".join(tokens.bytes_T[:spoken])
    if _says(joined, answer.text):
        return _Span(first=0, last=count, ended=ended)
    # Without the tokenizer an end token is known by being all that the text lacks, unless a stop string explains it.
    lacks_last = answer.finish_reason == "stop" and spoken > 0 and not ended
    if lacks_last and _says(b"".join(tokens.bytes_T[: spoken - 1]), answer.text):
        if any(tokens.bytes_T[spoken - 1].startswith(string.encode()) for string in stop):
            return _Span(first=0, last=spoken - 1, ended=False)
        if not tokens.with_vocabulary:
            return _Span(first=0, last=spoken, ended=True)
    if stop and answer.finish_reason == "stop" and (cut_at := _stopped(joined, text, stop)) is not None:
        return _cut(tokens, len(joined[:cut_at]), 0)
    if answer.reasoning is not None:
        found = _after_reasoning(tokens, answer, spoken, ended)
        if isinstance(found, Demoted) and lacks_last and not tokens.with_vocabulary:
            found = _after_reasoning(tokens, answer, spoken - 1, True)
        return found
    return Demoted(reason="text-differs", detail=f"{len(joined)} bytes of tokens, {len(text)} bytes of text")


def _says(joined: bytes, text: str) -> bool:
    """Whether the tokens' bytes are the text: byte for byte; with bytes that are not UTF-8 written as replacement characters; or but for the leading
    space that SentencePiece puts before a first word.
    """
    encoded = text.encode()
    return joined == encoded or joined == b" " + encoded or (_REPLACEMENT in encoded and joined.decode("utf-8", "replace") == text)


def _stopped(joined: bytes, text: bytes, stop: tuple[str, ...]) -> int | None:
    """Where the text ends in the tokens' bytes, if a stop string follows there."""
    for lead in (b"", b" "):
        whole = lead + text
        if joined.startswith(whole) and any(joined[len(whole) :].startswith(string.encode()) for string in stop):
            return len(whole)
    return None


def _cut(tokens: _Tokens, length: int, first: int) -> _Span | Demoted:
    total = 0
    for t, token in enumerate(tokens.bytes_T):
        if total == length:
            return _Span(first=first, last=t, ended=False)
        total += len(token)
        if total > length:
            return Demoted(reason="stop-inside-token", detail=f"place {t}")
    return _Span(first=first, last=len(tokens.bytes_T), ended=False)


def _after_reasoning(tokens: _Tokens, answer: Answer, spoken: int, ended: bool) -> _Span | Demoted:
    """Where reasoning is taken out of the text but its tokens have entries among the text's, the text is what the last of them say."""
    text, tail, length = answer.text.encode(), b"", 0
    for t in range(spoken - 1, -1, -1):
        tail = tokens.bytes_T[t] + tail
        length = len(tail)
        if length >= len(text):
            if tail == text or tail.lstrip() == text:
                return _Span(first=t, last=spoken + ended, ended=ended)
            if not tail.lstrip().endswith(text):
                break
    return Demoted(reason="text-differs", detail=f"{length} bytes of tokens at the end, {len(text)} bytes of text, after reasoning")


def _unresolved(tokens: _Tokens, span: _Span) -> Demoted | None:
    unknown = numpy.flatnonzero(tokens.ids_T[span.first : span.last] < 0)
    return Demoted(reason="token-unknown", detail=f"place {span.first + int(unknown[0])}") if len(unknown) else None


class _Table:
    """All alternatives that can be told apart, with the place of each; the mass of the others counts towards the rest."""

    def __init__(self, places: Places, tokens: _Tokens, index: TokenIndex | None = None) -> None:
        self._places, self._tokens = places, tokens
        self.starts_T1 = places.starts_T1
        self.listed_T = numpy.diff(places.starts_T1)
        self.place_N = numpy.repeat(numpy.arange(len(places)), self.listed_T)
        self.logprobs_N = places.top_logprobs_N
        self.bytes_N = places.top_tokens_N or [b""] * len(self.logprobs_N)
        self.ids_N = numpy.full(len(self.logprobs_N), -1, numpy.int64) if places.top_ids_N is None else places.top_ids_N

    def problem(self, expected: Expectations) -> Demoted | None:
        values = (self._places.logprobs_T, self.logprobs_N)
        if not all(numpy.isfinite(array).all() for array in values):
            return Demoted(reason="not-finite")
        if any((array > _VALUE_TOLERANCE_NATS).any() for array in values):
            return Demoted(reason="above-zero")
        return self._resolve(expected.index) or self._mass_problem() or self._chosen_problem(expected.temperature)

    def _resolve(self, index: TokenIndex | None) -> Demoted | None:
        """Gives alternatives their ids, or leaves them out; finds those that are listed twice."""
        given = self._places.top_tokens_N
        if index is not None:
            if self._places.top_ids_N is None:
                self.ids_N = index.ids_of(self.bytes_N)
            else:
                inside = (self.ids_N >= 0) & (self.ids_N < index.vocabulary.size)
                if not inside.all():
                    return Demoted(reason="id-differs", detail="an id outside the vocabulary")
                if given is not None and (bad := self._first_disagreement(index, given)) is not None:
                    return Demoted(reason="id-differs", detail=f"an alternative at place {bad}")
        known_N = self.ids_N >= 0
        if known_N.any() or index is not None:
            keys = (self.place_N * (1 << 32) + self.ids_N)[known_N]
            if len(numpy.unique(keys)) != len(keys):
                return Demoted(reason="duplicate-alternative")
        named = [(t, token) for t, token in zip(self.place_N.tolist(), self.bytes_N, strict=True) if token and _REPLACEMENT not in token]
        if self._places.top_ids_N is None and len(set(named)) != len(named):
            return Demoted(reason="duplicate-alternative")
        if index is None and not known_N.any():
            known_N = numpy.array([bool(token) and _REPLACEMENT not in token for token in self.bytes_N], bool)
        self.known_N = known_N
        return None

    def _first_disagreement(self, index: TokenIndex, given: list[bytes]) -> int | None:
        known, special = index.vocabulary.tokens, index.vocabulary.special_ids
        for n, (id_, token) in enumerate(zip(self.ids_N.tolist(), given, strict=True)):
            claims = token and token != known[id_] and _REPLACEMENT not in token and id_ not in special
            if claims and (self.place_N[n] or known[id_] != b" " + token):
                return int(self.place_N[n])
        return None

    def _mass_problem(self) -> Demoted | None:
        count = len(self._places)
        mass_T = numpy.bincount(self.place_N, numpy.exp(self.logprobs_N), count)
        self.mass_T = mass_T
        self.chosen_N = self._is_chosen()
        in_list_T = numpy.bincount(self.place_N[self.chosen_N], minlength=count) > 0
        self.in_list_T = in_list_T
        total_T = mass_T + numpy.where(in_list_T, 0.0, numpy.exp(self._places.logprobs_T))
        # Without any name to compare, the chosen token may be in the list all the same.
        nameless = self._places.tokens_T is None and self._places.ids_T is None
        worst = (mass_T if nameless else total_T).max(initial=0.0)
        return Demoted(reason="mass-above-one", detail=f"{worst:.4f}") if worst > 1 + _MASS_TOLERANCE else None

    def _is_chosen(self) -> NDArray[numpy.bool_]:
        ids_T = self._tokens.ids_T
        by_id_N: NDArray[numpy.bool_] = (self.ids_N >= 0) & (self.ids_N == ids_T[self.place_N])
        if self._places.top_ids_N is not None and self._places.ids_T is not None:
            return by_id_N
        given = self._places.tokens_T or self._tokens.bytes_T
        same = [given[t] == token for t, token in zip(self.place_N.tolist(), self.bytes_N, strict=True)]
        same_N: NDArray[numpy.bool_] = by_id_N | numpy.array(same, bool)
        return same_N

    def _chosen_problem(self, temperature: float) -> Demoted | None:
        chosen_T = self._places.logprobs_T
        differs_N = self.chosen_N & (numpy.abs(self.logprobs_N - chosen_T[self.place_N]) > _VALUE_TOLERANCE_NATS)
        if differs_N.any():
            return Demoted(reason="chosen-inconsistent", detail=f"place {int(self.place_N[differs_N][0])}")
        least_T, most_T = numpy.full(len(chosen_T), math.inf), numpy.full(len(chosen_T), -math.inf)
        numpy.minimum.at(least_T, self.place_N, self.logprobs_N)
        numpy.maximum.at(most_T, self.place_N, self.logprobs_N)
        outside_T = ~self.in_list_T & (self.listed_T > 0) & (chosen_T > least_T + _VALUE_TOLERANCE_NATS)
        if outside_T.any():
            return Demoted(reason="chosen-inconsistent", detail=f"place {int(numpy.flatnonzero(outside_T)[0])}, outside its list")
        if temperature == 0 and (beaten := numpy.flatnonzero(chosen_T < most_T - _VALUE_TOLERANCE_NATS)).size:
            return Demoted(reason="not-greedy", detail=f"place {int(beaten[0])}")
        return None

    def sorted(self) -> _Table:
        """Descending within each place, ties by id; without the alternatives that cannot be told apart."""
        kept = numpy.flatnonzero(self.known_N)
        order = kept[numpy.lexsort((self.ids_N[kept], -self.logprobs_N[kept], self.place_N[kept]))]
        self.place_N, self.ids_N, self.logprobs_N = self.place_N[order], self.ids_N[order], self.logprobs_N[order]
        self.bytes_N = [self.bytes_N[n] for n in order.tolist()]
        self.listed_T = numpy.bincount(self.place_N, minlength=len(self._places))
        self.starts_T1 = numpy.append(0, numpy.cumsum(self.listed_T))
        return self

    def rest_log_mass_T(self, index: TokenIndex | None) -> NDArray[numpy.float64]:
        listed_T = numpy.bincount(self.place_N, numpy.exp(self.logprobs_N), len(self._places))
        with numpy.errstate(divide="ignore"):
            rest_T = numpy.log(numpy.maximum(1 - listed_T, _LEAST_REST))
        return rest_T if index is None else numpy.where(self.listed_T >= index.vocabulary.size, -math.inf, rest_T)


# -- targets -----------------------------------------------------------------------------------------------------------


def top_k_targets(verified: Verified, vocabulary: Vocabulary, k: int, temperature: float) -> TopKTargets:
    """The `k` likeliest ids of every place and the log of the mass of all others, in float64: the rows that predict the answer's tokens, in order.

    The mass of alternatives that are listed but not kept is added to what the whole list leaves, so nothing cancels. Where the list is everything that is
    known, a rest below 2^-24 cannot be told from rounding, and is 2^-24. Raises CollectError 'targets-unsupported' where the values are at another
    temperature (a cut list cannot be brought to it), where a place has fewer than `k` ids, or where ids are not known.
    """
    if abs(verified.temperature - temperature) > 1e-9:
        _unsupported(f"log-probabilities at temperature {verified.temperature:g}", f"temperature {temperature:g}")
    k = min(k, vocabulary.size)
    counts_T = numpy.diff(verified.starts_T1)
    if len(counts_T) and int(counts_T.min()) < k:
        _unsupported(f"a place with {int(counts_T.min())} alternatives", f"{k} for each")
    if (verified.top_ids_N < 0).any() or (verified.top_ids_N >= vocabulary.size).any():
        _unsupported("alternatives whose ids are not known", "ids of the teacher's tokenizer")
    kept_TK = verified.starts_T1[:-1, None] + numpy.arange(k)
    rank_N = numpy.arange(len(verified.top_ids_N)) - numpy.repeat(verified.starts_T1[:-1], counts_T)
    place_N = numpy.repeat(numpy.arange(len(verified)), counts_T)
    others_T = numpy.bincount(place_N, numpy.exp(verified.top_logprobs_N) * (rank_N >= k), len(verified))
    with numpy.errstate(divide="ignore"):
        tail_T = numpy.log(others_T + numpy.exp(verified.rest_log_mass_T))
    return TopKTargets(
        vocabulary=vocabulary.fingerprint,
        temperature=temperature,
        ids_RK=verified.top_ids_N[kept_TK],
        log_probs_RK=verified.top_logprobs_N[kept_TK],
        tail_log_mass_R=tail_T,
    )


def _unsupported(found: str, expected: str) -> None:
    do = "Ask for targets that these can give, or collect again with other settings."
    raise CollectError("targets-unsupported", found=found, expected=expected, do=do)


# -- on disk -----------------------------------------------------------------------------------------------------------

_ROWS_TOGETHER = 64
_FLOAT16 = pyarrow.float16()
_SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("ids", pyarrow.list_(pyarrow.int32())),
        ("logprobs", pyarrow.list_(_FLOAT16)),
        ("top_ids", pyarrow.list_(pyarrow.int32())),
        ("top_logprobs", pyarrow.list_(_FLOAT16)),
        ("counts", pyarrow.list_(pyarrow.int32())),
        ("rest_log_mass", pyarrow.list_(pyarrow.float32())),
        ("temperature", pyarrow.float64()),
        ("ended", pyarrow.bool_()),
        ("skipped", pyarrow.int32()),
        ("tokens", pyarrow.list_(pyarrow.binary())),
        ("top_tokens", pyarrow.list_(pyarrow.binary())),
        ("crc32", pyarrow.int64()),
    ],
    metadata={"stillroom": "log-probabilities 1"},
)
# The upper bytes of ids and of float16 values repeat, the lower ones do not: split, they compress.
_SPLIT = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in ("ids", "logprobs", "top_ids", "top_logprobs", "rest_log_mass")}


def write_shard(path: Path, items: Sequence[tuple[str, Verified]]) -> None:
    """Makes `path` a Parquet file of verified answers, each under its key, in order; complete or not at all, and flushed.

    Log-probabilities become float16: each changes by at most 2^-11 of itself (half of that on average), 0.004 nats at -8; below -65504 they become that.
    The rest is float32, from the values before rounding. Raises ResourceError 'disk-full'.
    """
    rows = [_row(key, verified) for key, verified in items]
    table = pyarrow.Table.from_pylist(rows, schema=_SCHEMA)
    sink = io.BytesIO()
    pyarrow.parquet.write_table(
        table, sink, compression="zstd", compression_level=9, use_dictionary=False, write_statistics=False,
        column_encoding=_SPLIT, write_page_checksum=True, row_group_size=_ROWS_TOGETHER,
    )  # fmt: skip
    durable.write_bytes_atomic(path, sink.getvalue())


def _row(key: str, verified: Verified) -> dict[str, Any]:
    row = {
        "key": key,
        "ids": verified.ids_T.astype(numpy.int32),
        "logprobs": numpy.maximum(verified.logprobs_T, _LOWEST_FLOAT16).astype(numpy.float16),
        "top_ids": verified.top_ids_N.astype(numpy.int32),
        "top_logprobs": numpy.maximum(verified.top_logprobs_N, _LOWEST_FLOAT16).astype(numpy.float16),
        "counts": numpy.diff(verified.starts_T1).astype(numpy.int32),
        "rest_log_mass": verified.rest_log_mass_T.astype(numpy.float32),
        "temperature": float(verified.temperature),
        "ended": bool(verified.ended),
        "skipped": int(verified.skipped),
        "tokens": verified.tokens_T,
        "top_tokens": verified.top_tokens_N,
    }
    return row | {"crc32": _crc32(row)}


def _crc32(row: Mapping[str, Any]) -> int:
    """Over every value in the order of the schema, with the length of what has one."""
    crc = 0
    for name in _SCHEMA.names[:-1]:
        value = row[name]
        match value:
            case numpy.ndarray():
                data = value.tobytes()
            case list():
                data = b"".join(len(item).to_bytes(4, "little") + item for item in value)
            case _:
                data = repr(value).encode()
        crc = zlib.crc32(len(data).to_bytes(8, "little") + data, crc)
    return crc


def read(path: Path, places: Sequence[int] | None = None) -> list[tuple[str, Verified]]:
    """The answers at `places` (row numbers; all where None) with their keys, in that order. Only the row groups that they are in are read.

    Raises StoreError 'logprobs-corrupt' where a byte of them is not as it was written, or a row is not there.
    """
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            wanted = range(file.metadata.num_rows) if places is None else places
            return _read_rows(file, wanted)
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, MemoryError, OverflowError) as error:
        raise StoreError(
            "logprobs-corrupt",
            found=f"{path}: {' '.join(str(error).split())[:200] or type(error).__name__}",
            expected="a file as Stillroom wrote it",
            do="Restore the file from a copy, or leave it out: its answers remain as text.",
        ) from error


def _read_rows(file: pyarrow.parquet.ParquetFile, wanted: Sequence[int]) -> list[tuple[str, Verified]]:
    if not file.schema_arrow.equals(_SCHEMA):
        raise ValueError("other columns than those of log-probabilities")
    found: dict[int, tuple[str, Verified]] = {}
    needed, start = set(wanted), 0
    for group in range(file.metadata.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        inside = sorted(row for row in needed if start <= row < stop)
        if inside:
            table = file.read_row_group(group)
            if table.num_rows != stop - start:
                raise ValueError(f"row group {group} has {table.num_rows} rows")
            found |= {row: _item(table, row - start) for row in inside}
        start = stop
    return [found[row] for row in wanted]


def _item(table: pyarrow.Table, index: int) -> tuple[str, Verified]:
    row: dict[str, Any] = {}
    for name in _SCHEMA.names:
        value = table.column(name)[index]
        is_array = isinstance(value, pyarrow.ListScalar) and name not in ("tokens", "top_tokens")
        row[name] = value.values.to_numpy(zero_copy_only=False) if is_array else value.as_py()
    if row["crc32"] != _crc32(row):
        raise ValueError(f"row {index} does not match its checksum")
    return row["key"], Verified(
        ids_T=row["ids"],
        logprobs_T=row["logprobs"].astype(numpy.float64),
        top_ids_N=row["top_ids"],
        top_logprobs_N=row["top_logprobs"].astype(numpy.float64),
        starts_T1=numpy.append(0, numpy.cumsum(row["counts"])),
        rest_log_mass_T=row["rest_log_mass"].astype(numpy.float64),
        temperature=row["temperature"],
        ended=row["ended"],
        skipped=row["skipped"],
        tokens_T=row["tokens"],
        top_tokens_N=row["top_tokens"],
    )
