"""From token ids to the (window, token) pairs that a keyed scheme scores, and what is left out on the way, counted by reason.

Three rules keep the law of the scores under the null, whatever the suspect:

- a pair is scored once over all evidence: for a second time it says nothing new, and counted again it makes innocent text look guilty by chance;
- a window is left out where the suspect has read it, with the token that follows it, earlier in what it was given: what it was given may be watermarked,
  and whoever continues or imitates it copies its choices;
- a token that the suspect did not choose as that token, because its tokenizer cuts the text otherwise, is not scored.

Where neither what the suspect was given nor the filter depends on the key, which pairs enter does not depend on it at all, and their keyed values are
independent. Where one does (reading mode reads the key's own texts), whether a pair enters still does not depend on the pair's own value, since up to its
window the text did not; but which texts follow depends on the values of pairs before. With `once_per="window"` each window enters once, and none whose values
another text may have shown: of readings the first use over the pool alone, scored or not, of answers no window of any prompt. Its values then come fresh one
after the other there too. For this a text must be given from where it begins: of what the suspect did not read of it, no prediction is there (-1), or it
stands in the prompt.

T token positions of all texts laid end to end, E ends of windows, N pairs, K tokens of a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy
from numpy.typing import NDArray

from stillroom.core.errors import GuardError
from stillroom.core.identities import Json, TokenIds
from stillroom.targets.vocabulary import Vocabulary

Ints = NDArray[numpy.int64]
Mask = NDArray[numpy.bool_]
OncePer: TypeAlias = Literal["pair", "window"]

NO_TOKEN = -1
_LARGEST_ID = 2**32 - 1

SHORT = "with too short a context for a window"
NOT_EXACT = "where the suspect's token is none of the teacher's"
READ_BEFORE = "whose window stood earlier in what the suspect was given"
NOT_IN_FILTER = "whose window is not in the filter"
SCORED_BEFORE = "that were scored before"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the suspect was asked and answered, in the teacher's tokens; `exact` says which answer tokens it chose as such (None: all)."""

    prompt_ids: TokenIds
    answer_ids: TokenIds
    exact: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.exact is not None and len(self.exact) != len(self.answer_ids):
            raise _bad(f"{len(self.answer_ids)} answer tokens and {len(self.exact)} marks of exactness", "one mark for each token")

    def as_json(self) -> Json:
        return {
            "prompt_ids": list(self.prompt_ids),
            "answer_ids": list(self.answer_ids),
            **({} if self.exact is None else {"exact": list(self.exact)}),
        }

    @classmethod
    def from_json(cls, row: Json) -> Answer:
        """The answer whose `as_json` this is. Raises GuardError 'guard-evidence'."""
        exact = row.get("exact")
        if exact is not None and not (isinstance(exact, list) and all(isinstance(mark, bool) for mark in exact)):
            raise _bad("marks of exactness that are not true or false", "a list of true and false")
        return cls(
            prompt_ids=_ids(row, "prompt_ids"),
            answer_ids=_ids(row, "answer_ids"),
            exact=None if exact is None else tuple(bool(mark) for mark in exact),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A text that the suspect has read, in the teacher's tokens, and what it found most probable next after each of them.

    `predicted_ids[t]` follows context_ids[: t + 1]; -1 where its next piece is no token of the teacher, or the two tokenizers do not meet.
    """

    context_ids: TokenIds
    predicted_ids: TokenIds

    def __post_init__(self) -> None:
        if len(self.context_ids) != len(self.predicted_ids):
            raise _bad(f"{len(self.context_ids)} tokens and {len(self.predicted_ids)} predictions", "one prediction after each token")

    def as_json(self) -> Json:
        return {"context_ids": list(self.context_ids), "predicted_ids": list(self.predicted_ids)}

    @classmethod
    def from_json(cls, row: Json) -> Reading:
        """The reading whose `as_json` this is. Raises GuardError 'guard-evidence'."""
        return cls(context_ids=_ids(row, "context_ids"), predicted_ids=_ids(row, "predicted_ids", least=NO_TOKEN))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowSet:
    """The windows that a test is restricted to, each once, in order. Which they are must not depend on the suspect."""

    windows_NK: Ints = field(repr=False)

    @classmethod
    def of(cls, texts: Sequence[TokenIds], window: int) -> WindowSet:
        """All windows of `texts` that a token follows, such as those of the answers that were served."""
        flat = _Flat.of(texts)
        ends_E = flat.ends(window)
        ends_E = ends_E[flat.places_T[ends_E] < flat.lengths_T[ends_E] - 1]
        return cls(windows_NK=numpy.unique(flat.windows(ends_E, window), axis=0))

    @classmethod
    def from_json(cls, rows: object) -> WindowSet:
        """The windows whose lists of ids these are. Raises GuardError 'guard-evidence' where they are not such, each once and in order."""
        known = isinstance(rows, list) and bool(rows) and all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows)
        if not known or not all(type(index) is int and 0 <= index <= _LARGEST_ID for row in rows for index in row):  # type: ignore[attr-defined]
            raise _bad("windows that are no lists of token ids of one length", "a list for each window")
        windows_NK = numpy.array(rows, numpy.int64).reshape(len(rows), -1)  # type: ignore[arg-type]
        if not numpy.array_equal(numpy.unique(windows_NK, axis=0), windows_NK):
            raise _bad("windows that are not each there once, in order", "the windows as WindowSet.of gives them")
        return cls(windows_NK=windows_NK)

    @property
    def sha256(self) -> str:
        """SHA-256 of the ids as little-endian 32-bit numbers, window by window."""
        return hashlib.sha256(self.windows_NK.astype("<u4").tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WindowSet) and self.windows_NK.shape == other.windows_NK.shape and bool((self.windows_NK == other.windows_NK).all())

    def __hash__(self) -> int:
        return hash(self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """What is scored, and how many tokens were left out, by reason."""

    windows_NK: Ints = field(repr=False)
    tokens_N: Ints = field(repr=False)
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.tokens_N)


def pairs_of_answers(answers: Sequence[Answer], window: int, *, once_per: OncePer = "pair", only: WindowSet | None = None) -> Pairs:
    """The pairs of the tokens that the suspect wrote, windows over prompt and answer. Raises GuardError 'guard-evidence'."""
    prompts = numpy.array([len(answer.prompt_ids) for answer in answers], numpy.int64)
    lengths = prompts + numpy.array([len(answer.answer_ids) for answer in answers], numpy.int64)
    flat = _Flat.of([part for answer in answers for part in (answer.prompt_ids, answer.answer_ids)], lengths)
    prompts_T = prompts[flat.texts_T]
    written_E = numpy.flatnonzero(flat.places_T >= prompts_T)
    long_enough = flat.places_T[written_E] >= window
    left_out = {SHORT: int((~long_enough).sum())}
    exact_E = _exact(answers)[long_enough]
    left_out[NOT_EXACT] = int((~exact_E).sum())
    ends_E = written_E[long_enough][exact_E] - 1
    read_E = flat.ends(window)
    read_E = read_E[flat.places_T[read_E] < prompts_T[read_E] - 1]
    both = numpy.concatenate([ends_E, read_E])
    used = _identified(flat.uses(both, window, once_per))
    fresh_E = ~numpy.isin(used[: len(ends_E)], used[len(ends_E) :])
    left_out[READ_BEFORE] = int((~fresh_E).sum())
    ends_E = ends_E[fresh_E]
    return _reduced(flat.windows(ends_E, window), flat.ids_T[ends_E + 1], once_per, only, left_out)


def pairs_of_readings(readings: Sequence[Reading], window: int, *, once_per: OncePer = "pair", only: WindowSet | None = None) -> Pairs:
    """The pairs of what the suspect found most probable after each window of what it read. Raises GuardError 'guard-evidence'."""
    flat = _Flat.of([reading.context_ids for reading in readings])
    predicted_T = _checked(_joined([reading.predicted_ids for reading in readings]), least=NO_TOKEN)
    ends_E = flat.ends(window)
    left_out = {SHORT: len(flat.ids_T) - len(ends_E)}
    # A window that was read stays read, whether or not there was a prediction to score.
    fresh_E = _first(_identified(flat.uses(ends_E, window, once_per)))
    exact_E = predicted_T[ends_E] != NO_TOKEN
    left_out[NOT_EXACT] = int((~exact_E).sum())
    left_out[READ_BEFORE] = int((exact_E & ~fresh_E).sum())
    ends_E = ends_E[exact_E & fresh_E]
    return _reduced(flat.windows(ends_E, window), predicted_T[ends_E], once_per, only, left_out)


def _reduced(windows_EK: Ints, tokens_E: Ints, once_per: OncePer, only: WindowSet | None, left_out: dict[str, int]) -> Pairs:
    if only is not None:
        if len(only.windows_NK) and only.windows_NK.shape[1] != windows_EK.shape[1]:
            raise _bad(f"a filter of windows of {only.windows_NK.shape[1]} tokens", f"windows of {windows_EK.shape[1]}, as the scheme has them")
        known = _identified(numpy.concatenate([windows_EK, only.windows_NK.reshape(-1, windows_EK.shape[1])]))
        inside_E = numpy.isin(known[: len(windows_EK)], known[len(windows_EK) :])
        left_out[NOT_IN_FILTER] = int((~inside_E).sum())
        windows_EK, tokens_E = windows_EK[inside_E], tokens_E[inside_E]
    once_E = _first(_identified(windows_EK if once_per == "window" else numpy.column_stack([windows_EK, tokens_E])))
    left_out[SCORED_BEFORE] = int((~once_E).sum())
    return Pairs(windows_NK=windows_EK[once_E], tokens_N=tokens_E[once_E], left_out=left_out)


# -- texts laid end to end ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Flat:
    ids_T: Ints
    texts_T: Ints  # which text a position belongs to
    places_T: Ints  # its position in that text
    lengths: Ints  # of each text

    @classmethod
    def of(cls, parts: Sequence[TokenIds], lengths: Ints | None = None) -> _Flat:
        """Texts of these lengths (None: each part is a text)."""
        if lengths is None:
            lengths = numpy.array([len(part) for part in parts], numpy.int64)
        ids_T = _checked(_joined(parts), least=0)
        texts_T = numpy.repeat(numpy.arange(len(lengths)), lengths)
        return cls(ids_T, texts_T, numpy.arange(len(ids_T)) - (numpy.cumsum(lengths) - lengths)[texts_T], lengths)

    @property
    def lengths_T(self) -> Ints:
        return self.lengths[self.texts_T]

    def ends(self, window: int) -> Ints:
        """The positions that a whole window of their text ends at."""
        return numpy.flatnonzero(self.places_T >= window - 1)

    def windows(self, ends_E: Ints, window: int) -> Ints:
        """The windows that end there, the token there included."""
        return numpy.asarray(self.ids_T[ends_E[:, None] + numpy.arange(1 - window, 1)])

    def uses(self, ends_E: Ints, window: int, once_per: OncePer) -> Ints:
        """What must not have been read before: the windows that end there, in their own text or, once per window, in any."""
        windows_EK = self.windows(ends_E, window)
        return windows_EK if once_per == "window" else numpy.column_stack([self.texts_T[ends_E], windows_EK])


def _exact(answers: Sequence[Answer]) -> Mask:
    """For all answer tokens, one answer after the other, whether the suspect chose them as such."""
    marks = [numpy.ones(len(a.answer_ids), numpy.bool_) if a.exact is None else numpy.array(a.exact, numpy.bool_) for a in answers]
    return numpy.concatenate(marks) if marks else numpy.zeros(0, numpy.bool_)


def _joined(texts: Sequence[TokenIds]) -> Ints:
    parts = [numpy.asarray(text, numpy.int64) for text in texts]
    return numpy.concatenate(parts) if parts else numpy.zeros(0, numpy.int64)


def _checked(ids_T: Ints, *, least: int) -> Ints:
    if len(ids_T) and (int(ids_T.min()) < least or int(ids_T.max()) > _LARGEST_ID):
        raise _bad(f"token ids from {int(ids_T.min()):,} to {int(ids_T.max()):,}", f"ids from {least} to {_LARGEST_ID:,}")
    return ids_T


# -- rows of numbers as one number each --------------------------------------------------------------------------------


def _identified(rows_NC: Ints) -> NDArray[numpy.uint64]:
    """A number for each row, equal exactly where the rows are: their columns side by side in 64 bits while they fit, else numbered by order first."""
    found = numpy.zeros(len(rows_NC), numpy.uint64)
    taken = 0
    for column in rows_NC.T:
        wide = int(column.max()).bit_length() if len(column) else 0
        if taken + wide > 64:
            found = numpy.unique(found, return_inverse=True)[1].astype(numpy.uint64)
            taken = max(len(found) - 1, 0).bit_length()
        found = (found << numpy.uint64(wide)) | column.astype(numpy.uint64)
        taken += wide
    return found


def _first(identities_N: NDArray[numpy.uint64]) -> Mask:
    """Where each number occurs for the first time."""
    first_N = numpy.zeros(len(identities_N), numpy.bool_)
    first_N[numpy.unique(identities_N, return_index=True)[1]] = True
    return first_N


# -- another tokenizer -------------------------------------------------------------------------------------------------


def exactly_written(vocabulary: Vocabulary, ids: TokenIds, pieces: Sequence[bytes]) -> tuple[bool, ...]:
    """Which of the teacher's tokens `ids` the suspect wrote as one piece: the piece begins and ends where the token does, after the same bytes.

    `ids` are the teacher's tokens of the answer's text, `pieces` the bytes of the suspect's tokens, in order.
    """
    starts, bounds, text = _cut(_bytes(vocabulary, ids))
    piece_starts, piece_bounds, piece_text = _cut(pieces, like=text)
    alike = _common(text, piece_text)
    spans = set(zip(piece_starts, piece_bounds, strict=True))
    return tuple(start < end <= alike and (start, end) in spans for start, end in zip(starts, bounds, strict=True))


def aligned_reading(vocabulary: Vocabulary, context_ids: TokenIds, pieces: Sequence[bytes], predicted: Sequence[bytes]) -> Reading:
    """What a suspect with a tokenizer of its own found most probable, in the teacher's tokens.

    `pieces` are the bytes of the suspect's tokens of the same text (b"" for its special ones), `predicted[j]` those of its most probable next token after
    pieces[: j + 1]. A prediction counts where the suspect has read the bytes of context_ids[: t + 1] and not one more, and where exactly one ordinary
    token of the teacher has the bytes that it predicts. Anywhere else it could have read a part of the token whose choice is being tested.
    """
    if len(pieces) != len(predicted):
        raise _bad(f"{len(pieces)} pieces and {len(predicted)} predictions", "one prediction after each piece")
    _, bounds, text = _cut(_bytes(vocabulary, context_ids))
    _, piece_bounds, piece_text = _cut(pieces, like=text)
    alike = _common(text, piece_text)
    after = dict(zip(piece_bounds, predicted, strict=True))  # of several pieces that end there, the last has read all of them
    single = _single_tokens(vocabulary)
    chosen = [single.get(after[end], NO_TOKEN) if end <= alike and end in after else NO_TOKEN for end in bounds]
    return Reading(context_ids=context_ids, predicted_ids=tuple(chosen))


def _bytes(vocabulary: Vocabulary, ids: TokenIds) -> list[bytes]:
    """The bytes of each token, none for special ones, which are no part of a text."""
    return [b"" if index in vocabulary.special_ids else vocabulary.tokens[index] for index in ids]


@lru_cache(maxsize=4)
def _single_tokens(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The id of each byte string that is exactly one ordinary token."""
    found: dict[bytes, int] = {}
    twice: set[bytes] = set()
    for index, token in enumerate(vocabulary.tokens):
        if not token or index in vocabulary.special_ids:
            continue
        if token in found:
            twice.add(token)
        found[token] = index
    return {token: index for token, index in found.items() if token not in twice}


def _cut(pieces: Sequence[bytes], like: bytes | None = None) -> tuple[list[int], list[int], bytes]:
    """Where each piece begins and ends, and their text; a space that a tokenizer adds before a text (`like` has none) is taken away."""
    pieces = list(pieces)
    first = next((number for number, piece in enumerate(pieces) if piece), None)
    if like is not None and first is not None and pieces[first].startswith(b" ") and not like.startswith(b" "):
        pieces[first] = pieces[first][1:]
    bounds, end = [], 0
    for piece in pieces:
        end += len(piece)
        bounds.append(end)
    return [end - len(piece) for end, piece in zip(bounds, pieces, strict=True)], bounds, b"".join(pieces)


def _common(one: bytes, other: bytes) -> int:
    """How many bytes two texts begin with alike."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    differ = numpy.frombuffer(one[:length], numpy.uint8) != numpy.frombuffer(other[:length], numpy.uint8)
    return int(differ.argmax())


def _ids(row: Json, name: str, *, least: int = 0) -> TokenIds:
    ids = row.get(name)
    if not isinstance(ids, list) or not all(type(index) is int and least <= index <= _LARGEST_ID for index in ids):
        raise _bad(f"`{name}` that is no list of token ids", f"whole numbers from {least}")
    return tuple(ids)


def _bad(found: str, expected: str) -> GuardError:
    return GuardError("guard-evidence", found=found, expected=expected, do="Make the evidence again from what the suspect gave.")
