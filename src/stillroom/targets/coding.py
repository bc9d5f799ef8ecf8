"""Entropy coding in numpy: many short streams, decoded in lockstep, so that no Python runs for each symbol.

A *lane* is a list of 32-bit words that holds a list of symbols. A symbol is coded as its interval [start, start + frequency) of [0, 2^31): its probability
is frequency / 2^31. The coder is range asymmetric numeral systems (Duda 2013, arXiv 1311.2540) with a 64-bit state and 32-bit words, which comes within
a thousandth of a bit of the probabilities' own cost, except that a lane's last state wastes two bytes on average. It begins at state 0, so that the first
symbols written only fill the state, and a lane that was read to its end is back at state 0 with no word left: a cheap check of the reader.

Suffixes: L lanes, S symbols, lane after lane in the order in which they are read; A lanes that are still active in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy
from numpy.typing import NDArray

Integers: TypeAlias = NDArray[numpy.int64]
Words: TypeAlias = NDArray[numpy.uint32]
# (symbols_A, slots_A) -> (starts_A, frequencies_A): which symbol of each lane is due, and where in [0, 2^31) its lane's state points.
Decode: TypeAlias = Callable[[Integers, Integers], tuple[Integers, Integers]]

PRECISION = 31
WHOLE = 1 << PRECISION

_SLOT = numpy.uint64(WHOLE - 1)
_SHIFT = numpy.uint64(PRECISION)
_WORD = numpy.uint64(32)
_LOW = numpy.uint64(2**32)
# Of so few keys among so few values, one search through all values takes less time than the calls that halving takes.
_FEW_KEYS = 384
_FEW_VALUES = 1 << 17
# A state of at least 2^33 x frequency would outgrow 64 bits when the symbol is added to it.
_ROOM = numpy.uint64(33)


def write_lanes(starts_S: Integers, frequencies_S: Integers, counts_L: Integers) -> tuple[Words, Integers]:
    """The words of all lanes end to end, and how many words each lane has. Lane l holds counts_L[l] symbols.

    The last symbol of a lane is written first, since what is written last is read first.
    """
    starts, frequencies = starts_S.astype(numpy.uint64), frequencies_S.astype(numpy.uint64)
    order, first, active = _schedule(counts_L)
    state = numpy.zeros(len(order), dtype=numpy.uint64)
    # A symbol sends out one word at most. Each lane fills its part of `sent` from the end, so that its words come to lie in the order of reading.
    sent = numpy.empty(len(starts), dtype=numpy.uint32)
    position = first + counts_L[order]
    for step in range(len(active) - 1, -1, -1):
        count = active[step]
        symbols, now = first[:count] + step, state[:count]
        full = numpy.flatnonzero((now >> _ROOM) >= frequencies[symbols])
        position[full] -= 1
        sent[position[full]] = now[full].astype(numpy.uint32)
        now[full] >>= _WORD
        quotient, remainder = numpy.divmod(now, frequencies[symbols])
        state[:count] = (quotient << _SHIFT) + remainder + starts[symbols]
    return _gathered(order, state, sent, position, first + counts_L[order])


def _gathered(order: Integers, state: NDArray[numpy.uint64], sent: Words, begin: Integers, end: Integers) -> tuple[Words, Integers]:
    """State and words of each lane, in the lanes' own order. A state takes two words, or one or none where it is small and nothing was sent."""
    sizes = end - begin
    state_words = numpy.where((state >= _LOW) | (sizes > 0), 2, (state > 0).astype(numpy.int64))
    lengths = numpy.empty(len(order), dtype=numpy.int64)
    lengths[order] = state_words + sizes
    words = numpy.empty(int(lengths.sum()), dtype=numpy.uint32)
    target = (numpy.cumsum(lengths) - lengths)[order]
    for place, part in ((0, state), (1, state >> _WORD)):
        there = state_words > place
        words[target[there] + place] = part[there].astype(numpy.uint32)
    words[ranges(target + state_words, sizes)] = sent[ranges(begin, sizes)]
    return words, lengths


class LaneReader:
    """Reads lanes in lockstep. `words` holds them end to end, `lengths_L` says how many words each has."""

    def __init__(self, words: Words, lengths_L: Integers) -> None:
        self._words = words
        self._end = numpy.cumsum(lengths_L)
        self._position = self._end - lengths_L
        self._state = numpy.zeros(len(lengths_L), dtype=numpy.uint64)
        for place in (0, 1):
            there = numpy.flatnonzero(lengths_L > place)
            self._state[there] |= words[self._position[there] + place].astype(numpy.uint64) << numpy.uint64(32 * place)
        self._position += numpy.minimum(lengths_L, 2)

    def read(self, counts_L: Integers, decode: Decode) -> None:
        """Reads the next counts_L[l] symbols of each lane l; `decode` is asked once a step and keeps what it finds.

        Lanes are given to `decode` in one order from step to step, each step a prefix of those before: what it keeps for each lane it may slice.
        """
        order, first, active = _schedule(counts_L)
        state, position, end = self._state[order], self._position[order], self._end[order]
        for step, count in enumerate(active):
            now = state[:count]
            slots = (now & _SLOT).view(numpy.int64)
            starts, frequencies = decode(first[:count] + step, slots)
            now >>= _SHIFT
            now *= frequencies.view(numpy.uint64)
            now += (slots - starts).view(numpy.uint64)
            short = numpy.flatnonzero((now < _LOW) & (position[:count] < end[:count]))
            now[short] = (now[short] << _WORD) | self._words[position[short]]
            position[short] += 1
        self._state[order], self._position[order] = state, position

    def require_end(self) -> None:
        """Raises ValueError unless every lane was read to its end, as a lane that was written with the same tables is."""
        if (self._state != 0).any() or (self._position != self._end).any():
            raise ValueError("a coded stream does not end where its symbols end")


class Search:
    """Finds places in a large sorted array of whole numbers from 0 on, through a table of its places at every 2^`shift`: few reads, and those nearby."""

    def __init__(self, values: NDArray[Any], shift: int) -> None:
        self._values, self._shift = values, shift
        edges = numpy.arange((int(values[-1]) >> shift) + 2) << shift
        self._table = numpy.searchsorted(values, edges.astype(values.dtype), side="right").astype(numpy.int32)

    def last_not_above(self, keys_A: Integers) -> Integers:
        """The last place of a value that is not above each key, in whatever shape; there must be one."""
        values, keys = self._values, keys_A.reshape(-1)
        if len(keys) <= _FEW_KEYS and len(values) <= _FEW_VALUES:
            few: Integers = numpy.searchsorted(values, keys.astype(values.dtype), side="right").reshape(keys_A.shape) - 1
            return few
        buckets = keys >> self._shift
        low, high = self._table[buckets].astype(numpy.int64), self._table[buckets + 1].astype(numpy.int64)
        # The first place of a value above the key lies in [low, high], which is halved until it is known.
        open_ = numpy.flatnonzero(low < high)
        while len(open_):
            some_low, some_high = low[open_], high[open_]
            middle = (some_low + some_high) >> 1
            above = values[middle] > keys[open_]
            low[open_] = some_low = numpy.where(above, some_low, middle + 1)
            high[open_] = some_high = numpy.where(above, middle, some_high)
            open_ = open_[some_low < some_high]
        places: Integers = (low - 1).reshape(keys_A.shape)
        return places


class Family:
    """Several distributions over 0, 1, ..., one for each context, ready to write and to read.

    `cumulative` has, context after context, the start of every symbol in [0, 2^31), the first of each context 0; `sizes` the number of symbols.
    """

    def __init__(self, cumulative: Integers, sizes: Integers) -> None:
        self._first = numpy.cumsum(sizes) - sizes
        # Context c lies in [c, c + 1) x 2^31, so that one sorted array serves all.
        bases = numpy.arange(len(sizes) + 1, dtype=numpy.int64) << PRECISION
        self._flat = numpy.append(cumulative + numpy.repeat(bases[:-1], sizes), bases[-1])
        self._search = Search(self._flat, shift=PRECISION - 6)
        assert (numpy.diff(self._flat) > 0).all(), "every symbol has a probability"

    def intervals(self, contexts_S: Integers, symbols_S: Integers) -> tuple[Integers, Integers]:
        """Start and frequency of symbols, for `write_lanes`."""
        places = self._first[contexts_S] + symbols_S
        starts = self._flat[places]
        return starts - (contexts_S << PRECISION), self._flat[places + 1] - starts

    def find(self, contexts_A: Integers, slots_A: Integers) -> tuple[Integers, Integers, Integers]:
        """The symbols that the slots lie in, and their starts and frequencies."""
        bases = contexts_A << PRECISION
        places = self._search.last_not_above(bases + slots_A)
        starts = self._flat[places]
        return places - self._first[contexts_A], starts - bases, self._flat[places + 1] - starts


def cumulative_of(weights: NDArray[Any]) -> Integers:
    """Starts in [0, 2^31) for one context: floor(F x (2^31 - n)) + i for symbol i of n, F being the share of the symbols before it. None is empty."""
    size = len(weights)
    before = numpy.append(0.0, numpy.cumsum(weights))
    starts: Integers = numpy.floor(before[:-1] / before[-1] * (WHOLE - size)).astype(numpy.int64) + numpy.arange(size)
    return starts


def ranges(starts: Integers, counts: Integers) -> Integers:
    """start, start + 1, ... of each range, end to end."""
    before = numpy.cumsum(counts) - counts
    return numpy.repeat(starts - before, counts) + numpy.arange(int(counts.sum()))


def _schedule(counts_L: Integers) -> tuple[Integers, Integers, list[int]]:
    """Lanes with the most symbols first; the first symbol of each in that order; for each step the number of lanes that are not done."""
    order = numpy.argsort(-counts_L, kind="stable")
    first = (numpy.cumsum(counts_L) - counts_L)[order]
    steps = numpy.arange(int(counts_L.max(initial=0)))
    active = numpy.searchsorted(-counts_L[order], -steps, side="left")
    return order, first, active.tolist()
