"""A language model of a few hundred tokens: made of hashes, deterministic, causal, and consistent.

Its next-token distribution is a function of the seed and of the tokens before it, and of nothing else: the same after a prompt as after the same
tokens of an answer, and the same at every temperature. Tokens are the 256 bytes, words with the space before them, parts of a character, and
one that ends an answer. Every token has some mass everywhere, and the masses of a distribution sum to 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from random import Random
from typing import NamedTuple

from stillroom.core.seeds import derive_seed

_WORDS = """a about above after again all also always and another answer any are around as ask at away back be because before began being below
between book both but by came can change clear close come could day did different do does down each early earth easy end enough even every example
far few find first follow for form found four from full gave get give go good great had half hand has have head hear help her here high him his home
house how idea if important in into is it its just keep kind know land large last late learn leave left letter light like line list little live
long look made make man many may mean might more morning most move much must my name near need never new next night no not now number of off often
old on once one only open or order other our out over own page part people place plain point read real right river road room run said same saw say
school sea second see set she short should show side small so some song soon sound start state still stop story such take talk tell than that the
their them then there these they thing think this those thought three through time to together too took tree turn two under until up us use very walk
want was watch water way we well went were what when where which while who why will with word work world would year yes you young your"""

WORDS = tuple(_WORDS.split())

_CHARACTERS = ("é", "ß", "€", "日", "語", "😀", "🌍")
_MERGED = b"\xf0\x9f"  # a part of a character that is a token of its own, as merges leave them
_TINY = 1e-12  # of what would break a character: practically never drawn, even at a temperature of 2
_SMALL = 1e-6  # of a byte of ASCII where a word is expected
_STATES = 512
_MASK, _FACTOR, _TERM = (1 << 64) - 1, 0x9E3779B97F4A7C15, 0x632BE59BD9B4E019

TOKENS: tuple[bytes, ...] = (*(bytes([value]) for value in range(256)), *(b" " + word.encode() for word in WORDS), _MERGED)
"""The bytes of each token but the last, END, which has none."""
END = len(TOKENS)
END_TEXT = "<|end|>"
SIZE = END + 1
_IDS = {token: id for id, token in enumerate(TOKENS)}
_LIKELY = (*range(256, 256 + len(WORDS)), *b",.\n")
_PIECES = re.compile(rb" [a-z]+(?![A-Za-z])|[^ ]+| ")


def _beginnings() -> dict[bytes, set[bytes]]:
    """The bytes that may follow each incomplete beginning of a character."""
    found: dict[bytes, set[bytes]] = {}
    for character in map(str.encode, _CHARACTERS):
        for cut in range(1, len(character)):
            found.setdefault(character[:cut], set()).add(character[cut : cut + 1])
    return found


_INSIDE = _beginnings()
_REST = {character[:cut]: character[cut:] for character in map(str.encode, _CHARACTERS) for cut in range(1, len(character))}
_STARTS = {_IDS[part]: weight for part, weight in ((b"\xc3", 3.0), (b"\xe2", 1.0), (b"\xe6", 1.0), (b"\xe8", 1.0), (b"\xf0\x9f", 2.0))}
_FLOOR = {id: _SMALL if 32 <= id < 127 else _TINY for id in range(SIZE)}
_BEGIN = {_IDS[start] for start in _INSIDE if start in _IDS}


class Place(NamedTuple):
    """One token and the distribution that it was drawn from."""

    distribution: Distribution
    id: int
    open: bool
    """Whether the text ends inside a character after this token."""


@dataclass(slots=True)
class Distribution:
    """Ids by falling log-probability (natural, rounded down to seven decimals, so that no sum of masses is above 1)."""

    ids: tuple[int, ...]
    logprobs: array[float]
    rank: dict[int, int]
    drawing: dict[tuple[float, float], list[float]] = field(default_factory=dict)
    """Running sums of the masses that are drawn from, by temperature and top_p."""
    written: dict[tuple[int, int, bool], bytes] = field(default_factory=dict)
    """Whatever a writer keeps of it."""

    def logprob(self, id: int) -> float:
        """Of one token."""
        return self.logprobs[self.rank[id]]

    def sums(self, temperature: float, top_p: float) -> list[float]:
        """Running sums of the masses, likeliest first, of what is left at that temperature; at temperature 0 one token is."""
        found = self.drawing.get((temperature, top_p))
        if found is None:
            if len(self.drawing) >= 16:
                self.drawing.clear()
            found = self.drawing[temperature, top_p] = self._sums(temperature, top_p) if temperature else [1.0]
        return found

    def _sums(self, temperature: float, top_p: float) -> list[float]:
        highest = self.logprobs[0]
        sums = list(accumulate(map(math.exp, ((value - highest) / temperature for value in self.logprobs))))
        return sums[: bisect_left(sums, top_p * sums[-1]) + 1]


def distribution(masses: dict[int, float]) -> Distribution:
    """Of masses that need not sum to 1: tokens that are not among them have next to nothing, bytes of ASCII text a little more."""
    masses = _FLOOR | masses
    total = math.log(math.fsum(masses.values()))
    ids = tuple(sorted(masses, key=masses.__getitem__, reverse=True))
    logprobs = array("d", (math.floor((math.log(masses[id]) - total) * 1e7) / 1e7 for id in ids))
    return Distribution(ids, logprobs, {id: rank for rank, id in enumerate(ids)})


@dataclass(slots=True)
class Context:
    """All that a distribution depends on of the tokens before it: a hash, and the bytes of a character that is not complete."""

    hash: int = 0
    open: bytes = b""

    def after(self, id: int) -> Context:
        """With one more token."""
        together = self.open + TOKENS[id]
        return Context(((self.hash ^ (id + 1)) * _FACTOR + _TERM) & _MASK, together if together in _INSIDE else b"")


class Language:
    """The model. Two with the same arguments are the same."""

    def __init__(self, seed: int, *, answer_tokens: int = 32, fixed_length: bool = False, fragment_share: float = 0.05) -> None:
        self._seed = seed
        self._answer_tokens = answer_tokens
        self._ending = 0 if fixed_length else max(1, round(_STATES / answer_tokens))
        self._fixed_length = fixed_length
        self._fragment_share = fragment_share
        self._states: list[Distribution | None] = [None] * _STATES
        self._inside = {
            opened: distribution({_IDS[rest]: 1 / (place + 1) for place, rest in enumerate(sorted(rests))}) for opened, rests in _INSIDE.items()
        }

    def next(self, context: Context) -> Distribution:
        """The distribution of the token that follows."""
        if context.open:
            return self._inside[context.open]
        state = context.hash >> 55
        return self._states[state] or self._ordinary(state)

    @staticmethod
    def after(ids: Sequence[int]) -> Context:
        """The context after tokens."""
        hash, opened = 0, b""
        for id in ids:
            hash = ((hash ^ (id + 1)) * _FACTOR + _TERM) & _MASK
            if opened or id in _BEGIN:
                opened += TOKENS[id]
                opened = opened if opened in _INSIDE else b""
        return Context(hash, opened)

    def read(self, ids: Sequence[int], context: Context | None = None) -> tuple[list[Place], Context]:
        """The given tokens with the distributions at their places, and the context after them."""
        context = context or Context()
        places = []
        for id in ids:
            found = self.next(context)
            context = context.after(id)
            places.append(Place(found, id, bool(context.open)))
        return places, context

    def write(self, context: Context, *, limit: int, temperature: float, top_p: float, draws: Iterator[float]) -> tuple[list[Place], bool]:
        """An answer of at most `limit` tokens, and whether it ended by itself."""
        places: list[Place] = []
        most = min(limit, self._answer_tokens) if self._fixed_length else limit
        hash, opened = context.hash, context.open
        while len(places) < most:
            found = self._inside[opened] if opened else self._states[hash >> 55] or self._ordinary(hash >> 55)
            sums = found.drawing.get((temperature, top_p)) or found.sums(temperature, top_p)
            id = found.ids[bisect_right(sums, next(draws) * sums[-1])]
            if id == END:
                return places, True
            hash = ((hash ^ (id + 1)) * _FACTOR + _TERM) & _MASK
            if opened or id in _BEGIN:
                opened += TOKENS[id]
                opened = opened if opened in _INSIDE else b""
            places.append(Place(found, id, opened != b""))
        # A fixed length that is reached ends the answer, and not inside a character.
        ended = self._fixed_length and most < limit
        if ended and places and places[-1].open:
            more, _ = self.read(list(_REST[opened]), Context(hash, opened))
            places += more[: limit - len(places)]
            ended = not places[-1].open
        return places, ended

    def _ordinary(self, state: int) -> Distribution:
        """A shuffled order of words whose masses fall as a power; some states are likely to end the answer."""
        order = list(_LIKELY)
        chance = Random(derive_seed(self._seed, "state", state))
        chance.shuffle(order)
        words = [(rank + 1) ** -1.4 * (0.5 + chance.random()) for rank in range(len(order))]
        end = 0.6 if state < self._ending else _TINY if self._fixed_length else _SMALL
        rest = (1 - end - self._fragment_share) / sum(words)
        masses = {id: rest * word for id, word in zip(order, words, strict=True)}
        if self._fragment_share:
            masses |= {id: self._fragment_share * weight / sum(_STARTS.values()) for id, weight in _STARTS.items()}
        found = self._states[state] = distribution(masses | {END: end})
        return found


def tokens_of(text: str) -> list[int]:
    """The tokens of a text: its words with a space before them where they are known, and otherwise its bytes. UnicodeEncodeError for half a pair."""
    ids: list[int] = []
    for piece in _PIECES.findall(text.encode()):
        known = _IDS.get(piece)
        if known is not None:
            ids.append(known)
            continue
        first, *others = piece.split(_MERGED)
        ids.extend(first)
        for other in others:
            ids.append(_IDS[_MERGED])
            ids.extend(other)
    return ids


def bytes_of(ids: Sequence[int]) -> bytes:
    """What tokens say together."""
    return b"".join(TOKENS[id] for id in ids)


def words(count: int, draws: Iterator[float]) -> str:
    """A text of `count` tokens."""
    return "".join(f" {WORDS[int(next(draws) * len(WORDS))]}" for _ in range(count))


def token_text(id: int) -> str:
    """As an endpoint shows one token: bytes that are not UTF-8 by themselves as U+FFFD."""
    return END_TEXT if id == END else TOKENS[id].decode(errors="replace")


@lru_cache(maxsize=4 * SIZE)
def token_json(id: int, with_id: bool, with_bytes: bool) -> tuple[bytes, bytes]:
    """The JSON of an entry before and after its log-probability. `id` may be a twin: one that is SIZE above the token it looks like."""
    real = id % SIZE
    known = list(TOKENS[real]) if with_bytes and real != END else None
    before = f'{{"token":{json.dumps(token_text(real), ensure_ascii=False)},"logprob":'
    after = f',"bytes":{json.dumps(known, separators=(",", ":"))}' + (f',"id":{id}' if with_id else "")
    return before.encode(), after.encode()


encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Compact JSON text."""


def draws(*names: str | int) -> Iterator[float]:
    """Numbers in [0, 1) without end, a function of `names`."""
    key = json.dumps(names).encode()
    block = 0
    while True:
        values = array("I", hashlib.shake_256(key + b"%d" % block).digest(256))
        yield from (value / 4294967296 for value in values)
        block += 1
