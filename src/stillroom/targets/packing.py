"""Drawn targets and their tokens as lanes of words, several records at once: what a shard of drawn targets holds.

A record has one lane for every TOKENS_PER_LANE of its tokens, with one symbol a token, and then some lanes for its scored rows, as many as its writer
chose. These hold four kinds of symbols, one kind after the other: for each row how many unique ids it has and whether its own token (the one it
predicts) is among them; the ids, without those tokens; the counts; the entropies. The symbols of each kind are shared out over the lanes evenly, but
those of one row stay in one lane.

Suffixes: L lanes, R rows, T tokens, U unique ids of all rows, O those that are not the row's own token, S symbols, E records.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from stillroom.core.identities import TokenSequence
from stillroom.targets.coding import PRECISION, WHOLE, Integers, LaneReader, Words, ranges, write_lanes
from stillroom.targets.kinds import DrawnTargets
from stillroom.targets.prior import ENTROPY_STEPS_PER_NAT, DrawnPrior, quantised_entropy
from stillroom.targets.rows import slice_targets

TOKENS_PER_LANE = 128
# Every lane costs 4 bytes and is one more to read beside the others: about 13 rows of a dozen unique ids.
_SYMBOLS_PER_LANE = 320
# What is packed in one go.
_ROWS_AT_ONCE = 8192

# One step of the table of quantiles, of 128, in slots.
_STEP = PRECISION - 7
_WITHIN = (1 << _STEP) - 1
# Entries of a row of that table.
_ROW = 129
# `DrawnPrior.quantiles` has the number of its row above these bits.
_SHARE = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Records as words: `lanes_E` lanes each, `lengths_L` words each lane, all end to end."""

    lanes_E: Integers
    lengths_L: Integers
    words: Words


def _joined(parts: Sequence[Packed]) -> Packed:
    lanes_E, lengths_L, words = (
        numpy.concatenate(arrays) for arrays in zip(*((one.lanes_E, one.lengths_L, one.words) for one in parts), strict=True)
    )
    return Packed(lanes_E=lanes_E, lengths_L=lengths_L, words=words)


def _no_records() -> Packed:
    none = numpy.empty(0, dtype=numpy.int64)
    return Packed(lanes_E=none, lengths_L=none, words=numpy.empty(0, dtype=numpy.uint32))


def in_order(parts: Sequence[Packed], order: Integers) -> Packed:
    """The records of all parts as one, the i-th of them at place order[i]."""
    lanes_E, lengths_L, words = (
        numpy.concatenate(arrays) for arrays in zip(*((one.lanes_E, one.lengths_L, one.words) for one in parts), strict=True)
    )
    back = numpy.argsort(order)
    words_E = _sums(lengths_L, lanes_E)
    lanes = ranges((numpy.cumsum(lanes_E) - lanes_E)[back], lanes_E[back])
    return Packed(lanes_E=lanes_E[back], lengths_L=lengths_L[lanes], words=words[ranges((numpy.cumsum(words_E) - words_E)[back], words_E[back])])


def no_rows(draws: int, *, vocabulary: str, temperature: float) -> DrawnTargets:
    """Drawn targets of no row."""
    whole, half = numpy.zeros(1, dtype=numpy.int64), numpy.empty(0, dtype=numpy.int32)
    return DrawnTargets(
        vocabulary=vocabulary,
        temperature=temperature,
        draws=draws,
        offsets_R1=whole,
        ids_U=half,
        counts_U=half,
        entropy_R=numpy.empty(0, dtype=numpy.float32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which lanes belong to what, from the number of tokens, rows and lanes of each record."""

    rows_E: Integers
    row_lanes_E: Integers
    tokens_L: Integers  # symbols of each lane of tokens
    token_lanes: Integers  # places of the lanes of tokens among all lanes
    row_lanes: Integers

    @classmethod
    def of(cls, tokens_E: Integers, rows_E: Integers, lanes_E: Integers) -> Layout:
        """Raises ValueError if there are not lanes enough, or lanes for nothing."""
        token_lanes_E = _token_lanes(tokens_E)
        row_lanes_E = lanes_E - token_lanes_E
        if ((row_lanes_E > 0) != (rows_E > 0)).any() or (row_lanes_E < 0).any():
            raise ValueError("the lanes of a record do not fit its tokens and rows")
        first_E = numpy.cumsum(lanes_E) - lanes_E
        return cls(
            rows_E=rows_E,
            row_lanes_E=row_lanes_E,
            tokens_L=_full_parts(tokens_E, token_lanes_E),
            token_lanes=ranges(first_E, token_lanes_E),
            row_lanes=ranges(first_E + token_lanes_E, row_lanes_E),
        )

    def shared(self, symbols_R: Integers) -> Integers:
        """How many symbols of one kind each lane of rows has, if the rows have `symbols_R` of them.

        A row is in lane floor(before x lanes / all) of its record, where `before` is the number of symbols of the record's rows before it.
        """
        before_R1 = numpy.append(0, numpy.cumsum(symbols_R))
        end_E = numpy.cumsum(self.rows_E)
        start_E = before_R1[end_E - self.rows_E]
        all_E = before_R1[end_E] - start_E
        before_R = before_R1[:-1] - numpy.repeat(start_E, self.rows_E)
        within_R = before_R * numpy.repeat(self.row_lanes_E, self.rows_E) // numpy.maximum(numpy.repeat(all_E, self.rows_E), 1)
        # Rows without symbols at a record's end would be in a lane too many.
        lane_R = numpy.repeat(numpy.cumsum(self.row_lanes_E) - self.row_lanes_E, self.rows_E) + within_R
        symbols_L = numpy.bincount(lane_R[symbols_R > 0], symbols_R[symbols_R > 0], len(self.row_lanes))
        return symbols_L.astype(numpy.int64)


def scored(sequences: Sequence[TokenSequence]) -> tuple[Integers, Integers]:
    """For each scored row the place, among the tokens of all sequences, of the token before and of the one it predicts."""
    lengths = numpy.array([len(sequence.ids) for sequence in sequences], dtype=numpy.int64)
    firsts = numpy.cumsum(lengths) - lengths
    spans = [
        (first + max(start, 1), first + stop)
        for first, sequence in zip(firsts.tolist(), sequences, strict=True)
        for start, stop in sequence.answer_spans
    ]
    bounds = numpy.array(spans, dtype=numpy.int64).reshape(-1, 2)
    predicted_R = ranges(bounds[:, 0], numpy.maximum(bounds[:, 1] - bounds[:, 0], 0))
    return predicted_R - 1, predicted_R


def require_drawn(sequences: Sequence[TokenSequence], targets: DrawnTargets, draws: int, size: int) -> None:
    """Raises ValueError, saying what is wrong, unless these are tokens of `size` ids and targets of `draws` draws among them."""
    tokens_T = tokens_of(sequences)
    if ((tokens_T < 0) | (tokens_T >= size)).any():
        raise ValueError(f"a token is not one of the {size} ids of drawn targets")
    offsets_R1, ids_U, counts_U = targets.offsets_R1, targets.ids_U, targets.counts_U
    if targets.draws != draws:
        raise ValueError(f"{targets.draws} draws a row, where the store has {draws}")
    unique_R = numpy.diff(offsets_R1)
    if offsets_R1[0] != 0 or offsets_R1[-1] != len(ids_U) or len(ids_U) != len(counts_U) or len(targets.entropy_R) != len(unique_R):
        raise ValueError("the offsets of drawn targets do not fit their ids, counts and entropies")
    if (unique_R < 1).any() or (counts_U < 1).any() or (_sums(counts_U, unique_R) != draws).any():
        raise ValueError(f"the counts of a row of drawn targets are not whole numbers from 1 on that sum to {draws}")
    ascending = numpy.diff(ids_U) > 0
    ascending[offsets_R1[1:-1] - 1] = True
    if not ascending.all() or (ids_U < 0).any() or (ids_U >= size).any():
        raise ValueError(f"the ids of a row of drawn targets are not ascending and among {size}")
    quantised_entropy(targets.entropy_R, size)


def _row_counts(sequences: Sequence[TokenSequence]) -> Integers:
    return numpy.array([len(sequence.scored_rows) for sequence in sequences], dtype=numpy.int64)


def tokens_of(sequences: Sequence[TokenSequence]) -> Integers:
    """All tokens, end to end."""
    return numpy.fromiter((token for sequence in sequences for token in sequence.ids), dtype=numpy.int64)


def pack(prior: DrawnPrior, sequences: Sequence[TokenSequence], targets: DrawnTargets) -> Packed:
    """`targets` (numpy), which `require_drawn` lets pass, are those of the scored rows of all sequences, end to end."""
    rows_E = _row_counts(sequences)
    ends_E = numpy.cumsum(rows_E)
    parts = [_no_records()]
    # Some records at a time: every symbol takes a hundred bytes on its way.
    for begin, end in _groups(ends_E):
        first = int(ends_E[begin] - rows_E[begin])
        parts.append(_packed(prior, sequences[begin:end], slice_targets(targets, first, int(ends_E[end - 1]))))
    return _joined(parts)


def _groups(ends_E: Integers) -> list[tuple[int, int]]:
    """Runs of records with about _ROWS_AT_ONCE rows each."""
    group_E = ends_E // _ROWS_AT_ONCE
    bounds = [0, *(numpy.flatnonzero(numpy.diff(group_E)) + 1).tolist(), len(ends_E)]
    return [(begin, end) for begin, end in itertools.pairwise(bounds) if begin < end]


def _packed(prior: DrawnPrior, sequences: Sequence[TokenSequence], targets: DrawnTargets) -> Packed:
    tokens_T = tokens_of(sequences)
    before_R, predicted_R = scored(sequences)
    rows = _Rows.of(prior, targets, prior.context_V[tokens_T[before_R]].astype(numpy.int64), tokens_T[predicted_R])
    tokens_E = numpy.array([len(sequence.ids) for sequence in sequences], dtype=numpy.int64)
    rows_E = _row_counts(sequences)
    lanes_E = _token_lanes(tokens_E) + -(-_sums(2 * rows.unique_R, rows_E) // _SYMBOLS_PER_LANE)
    layout = Layout.of(tokens_E, rows_E, lanes_E)
    token_words, token_lengths = write_lanes(*_token_intervals(prior, tokens_T, layout.tokens_L), layout.tokens_L)
    row_words, row_lengths = write_lanes(*rows.intervals(prior, layout))
    lengths_L = numpy.empty(int(lanes_E.sum()), dtype=numpy.int64)
    lengths_L[layout.token_lanes], lengths_L[layout.row_lanes] = token_lengths, row_lengths
    first_L = numpy.cumsum(lengths_L) - lengths_L
    words = numpy.empty(int(lengths_L.sum()), dtype=numpy.uint32)
    words[ranges(first_L[layout.token_lanes], token_lengths)] = token_words
    words[ranges(first_L[layout.row_lanes], row_lengths)] = row_words
    return Packed(lanes_E=lanes_E, lengths_L=lengths_L, words=words)


def unpack_tokens(prior: DrawnPrior, packed: Packed, layout: Layout) -> Integers:
    """The tokens of all records, end to end. Raises ValueError if the words are not such tokens."""
    reader = _reader(packed, layout.token_lanes)
    tokens_T = numpy.empty(int(layout.tokens_L.sum()), dtype=numpy.int64)
    one_L = numpy.ones(len(layout.tokens_L), dtype=numpy.int64)
    context_L = numpy.zeros_like(one_L)
    bounds = _bounds(prior)

    def decode(symbols_A: Integers, slots_A: Integers) -> tuple[Integers, Integers]:
        context_A = context_L[: len(symbols_A)]
        places_A, starts_A, frequencies_A = _find_ids(prior, one_L[: len(symbols_A)], bounds[context_A], bounds[context_A + 1], slots_A)
        found_A = places_A - context_A * prior.size
        tokens_T[symbols_A] = found_A
        context_A[:] = prior.context_V[found_A]
        return starts_A, frequencies_A

    reader.read(layout.tokens_L, decode)
    reader.require_end()
    return tokens_T


def unpack_rows(
    prior: DrawnPrior, packed: Packed, layout: Layout, before_R: Integers, predicted_R: Integers, *, vocabulary: str, temperature: float
) -> DrawnTargets:
    """The targets of all scored rows. `before_R` is the token before each row's own token, `predicted_R` that one. Raises ValueError as above."""
    reader = _reader(packed, layout.row_lanes)
    one_L = layout.shared(numpy.ones_like(predicted_R))
    symbols_R = _read_family(reader, one_L, lambda symbols_A, slots_A: prior.unique.find(numpy.zeros_like(symbols_A), slots_A))
    unique_R, among_R = symbols_R // 2 + 1, symbols_R % 2
    offsets_R1 = numpy.append(0, numpy.cumsum(unique_R))
    others_U = _read_ids(prior, reader, layout, prior.context_V[before_R].astype(numpy.int64), unique_R - among_R)
    ids_U = _with_own(others_U, unique_R - among_R, among_R, predicted_R)
    counts_U = _read_counts(prior, reader, layout, unique_R)
    group_R = prior.entropy_group_N[unique_R].astype(numpy.int64)
    entropy_R = _read_family(reader, one_L, lambda symbols_A, slots_A: prior.entropy.find(group_R[symbols_A], slots_A))
    reader.require_end()
    return DrawnTargets(
        vocabulary=vocabulary,
        temperature=temperature,
        draws=prior.draws,
        offsets_R1=offsets_R1,
        ids_U=ids_U.astype(numpy.int32),
        counts_U=counts_U.astype(numpy.int32),
        entropy_R=(entropy_R / ENTROPY_STEPS_PER_NAT).astype(numpy.float32),
    )


# -- writing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Drawn targets as the symbols of their lanes. O: the unique ids of all rows but for rows' own tokens."""

    unique_R: Integers
    among_R: Integers
    context_R: Integers
    others_O: Integers
    counts_U: Integers
    entropy_R: Integers

    @classmethod
    def of(cls, prior: DrawnPrior, targets: DrawnTargets, context_R: Integers, predicted_R: Integers) -> _Rows:
        unique_R = numpy.diff(targets.offsets_R1)
        row_U = numpy.repeat(numpy.arange(len(unique_R)), unique_R)
        own_U = targets.ids_U == predicted_R[row_U]
        return cls(
            unique_R=unique_R,
            among_R=numpy.bincount(row_U[own_U], minlength=len(unique_R)),
            context_R=context_R,
            others_O=targets.ids_U[~own_U].astype(numpy.int64),
            counts_U=targets.counts_U.astype(numpy.int64),
            entropy_R=quantised_entropy(targets.entropy_R, prior.size),
        )

    def intervals(self, prior: DrawnPrior, layout: Layout) -> tuple[Integers, Integers, Integers]:
        """Starts and frequencies of all symbols, lane after lane, and the number of symbols of each lane."""
        others_R = self.unique_R - self.among_R
        one_L = layout.shared(numpy.ones_like(self.unique_R))
        kinds = (
            (one_L, prior.unique.intervals(numpy.zeros_like(self.unique_R), 2 * (self.unique_R - 1) + self.among_R)),
            (layout.shared(others_R), self._id_intervals(prior, others_R)),
            (layout.shared(self.unique_R - 1), self._count_intervals(prior)),
            (one_L, prior.entropy.intervals(prior.entropy_group_N[self.unique_R].astype(numpy.int64), self.entropy_R)),
        )
        symbols_L: Integers = numpy.sum([counts_L for counts_L, _ in kinds], axis=0, dtype=numpy.int64)
        target_L = numpy.cumsum(symbols_L) - symbols_L
        starts, frequencies = numpy.empty(int(symbols_L.sum()), dtype=numpy.int64), numpy.empty(int(symbols_L.sum()), dtype=numpy.int64)
        for counts_L, (some_starts, some_frequencies) in kinds:
            places = ranges(target_L, counts_L)
            starts[places], frequencies[places] = some_starts, some_frequencies
            target_L = target_L + counts_L
        return starts, frequencies, symbols_L

    def _id_intervals(self, prior: DrawnPrior, others_R: Integers) -> tuple[Integers, Integers]:
        first_O, left_O = _descending(others_R)
        context_O = numpy.repeat(self.context_R, others_R)
        places_O = context_O * prior.size + self.others_O
        # An id's weights begin after those of the id before it in the row, or at the context's own beginning.
        before_O = numpy.where(first_O, context_O * prior.size, numpy.append(0, places_O[:-1] + 1)[: len(places_O)])
        return _interval_of(prior, left_O, before_O, (context_O + 1) * prior.size, places_O)

    def _count_intervals(self, prior: DrawnPrior) -> tuple[Integers, Integers]:
        first_U, left_U = _descending(self.unique_R)
        spent_U = numpy.cumsum(self.counts_U) - self.counts_U
        shared_U = prior.draws - (spent_U - numpy.repeat(spent_U[first_U], self.unique_R))
        # The last id of a row has what is left.
        coded = left_U > 1
        return prior.counts.intervals(prior.count_context(left_U[coded], shared_U[coded]), self.counts_U[coded] - 1)


def _token_intervals(prior: DrawnPrior, tokens_T: Integers, tokens_L: Integers) -> tuple[Integers, Integers]:
    context_T = numpy.append(0, prior.context_V[tokens_T[:-1]])[: len(tokens_T)].astype(numpy.int64)
    context_T[(numpy.cumsum(tokens_L) - tokens_L)[tokens_L > 0]] = 0
    begin_T = context_T * prior.size
    return _interval_of(prior, numpy.ones_like(tokens_T), begin_T, begin_T + prior.size, begin_T + tokens_T)


def _interval_of(prior: DrawnPrior, left_S: Integers, begin_S: Integers, end_S: Integers, places_S: Integers) -> tuple[Integers, Integers]:
    """Interval of the id at `places_S` of `weight_before`, the next of `left_S` in ascending order among those from `begin_S` to `end_S`."""
    table = prior.weight_before
    begin, end = table[begin_S].astype(numpy.int64), table[end_S].astype(numpy.int64)
    starts = _slot_of(prior, left_S, end - begin, table[places_S] - begin)
    return starts, _slot_of(prior, left_S, end - begin, table[places_S + 1] - begin) - starts


def _slot_of(prior: DrawnPrior, left_S: Integers, whole_S: Integers, weight_S: Integers) -> Integers:
    """The first slot that points at `weight_S` of `whole_S` or past it, where `left_S` ids are still to come: see `_find_ids`."""
    share_S = ((weight_S << PRECISION) + whole_S - 1) // whole_S
    places_S = prior.steps.last_not_above((left_S << 32) + share_S)
    # At the very end there is no step to the right.
    places_S -= share_S == WHOLE
    quantile_S = prior.quantiles[places_S]
    within_S = share_S - (quantile_S & _SHARE)
    step_S = prior.quantiles[places_S + 1] - quantile_S
    slots: Integers = ((places_S - left_S * _ROW) << _STEP) + ((within_S << _STEP) + step_S - 1) // step_S
    return slots


# -- reading -------------------------------------------------------------------------------------------------------------


def _find_ids(prior: DrawnPrior, left_A: Integers, begin_A: Integers, end_A: Integers, slots_A: Integers) -> tuple[Integers, Integers, Integers]:
    """Places in `weight_before`, starts and frequencies, of the next of `left_A` ids in ascending order among the weights from begin_A to end_A.

    A slot is a probability. The table of quantiles makes it a share of these weights, in straight lines between its entries; the share lies in an id.
    """
    whole_A = end_A - begin_A
    places_A = left_A * _ROW + (slots_A >> _STEP)
    quantile_A = prior.quantiles[places_A]
    share_A = (quantile_A & _SHARE) + ((prior.quantiles[places_A + 1] - quantile_A) * (slots_A & _WITHIN) >> _STEP)
    found_A = prior.places.last_not_above(begin_A + (share_A * whole_A >> PRECISION))
    # Where the id begins and where it ends, in one go.
    starts_A, ends_A = _slot_of(prior, left_A, whole_A, prior.weight_before[numpy.stack([found_A, found_A + 1])] - begin_A)
    return found_A, starts_A, ends_A - starts_A


def _read_family(reader: LaneReader, counts_L: Integers, find: Callable[[Integers, Integers], tuple[Integers, Integers, Integers]]) -> Integers:
    symbols_S = numpy.empty(int(counts_L.sum()), dtype=numpy.int64)

    def decode(symbols_A: Integers, slots_A: Integers) -> tuple[Integers, Integers]:
        symbols_S[symbols_A], starts_A, frequencies_A = find(symbols_A, slots_A)
        return starts_A, frequencies_A

    reader.read(counts_L, decode)
    return symbols_S


def _read_ids(prior: DrawnPrior, reader: LaneReader, layout: Layout, context_R: Integers, others_R: Integers) -> Integers:
    first_O, left_O = _descending(others_R)
    context_O = numpy.repeat(context_R, others_R)
    bounds, size = _bounds(prior), prior.size
    begin_O, end_O = bounds[context_O], bounds[context_O + 1]
    counts_L = layout.shared(others_R)
    # Where the last id that each lane found ends: there the next of the same row begins.
    after_L = numpy.zeros(len(counts_L), dtype=numpy.int64)
    places_O = numpy.empty(len(context_O), dtype=numpy.int64)

    def decode(symbols_A: Integers, slots_A: Integers) -> tuple[Integers, Integers]:
        begin_A = numpy.where(first_O[symbols_A], begin_O[symbols_A], after_L[: len(symbols_A)])
        found_A, starts_A, frequencies_A = _find_ids(prior, left_O[symbols_A], begin_A, end_O[symbols_A], slots_A)
        places_O[symbols_A] = found_A
        after_L[: len(symbols_A)] = prior.weight_before[found_A + 1]
        return starts_A, frequencies_A

    reader.read(counts_L, decode)
    return places_O - context_O * size


def _with_own(others_O: Integers, others_R: Integers, among_R: Integers, predicted_R: Integers) -> Integers:
    """The ids of all rows, ascending in each, once the rows' own tokens are among them again."""
    rows = numpy.arange(len(others_R)) << PRECISION
    keys_O, own = numpy.repeat(rows, others_R) + others_O, (rows + predicted_R)[among_R == 1]
    ids_U: Integers = numpy.sort(numpy.concatenate([keys_O, own]), kind="stable") & (WHOLE - 1)
    return ids_U


def _read_counts(prior: DrawnPrior, reader: LaneReader, layout: Layout, unique_R: Integers) -> Integers:
    coded_R = unique_R - 1
    # Of n ids n - 1 have a symbol: with n, n - 1, ..., 2 left.
    first_S, left_S = _descending(coded_R)
    left_S += 1
    counts_L = layout.shared(coded_R)
    shared_L = numpy.empty(len(counts_L), dtype=numpy.int64)
    counts_S = numpy.empty(len(first_S), dtype=numpy.int64)

    def decode(symbols_A: Integers, slots_A: Integers) -> tuple[Integers, Integers]:
        shared_A = numpy.where(first_S[symbols_A], prior.draws, shared_L[: len(symbols_A)])
        less_A, starts_A, frequencies_A = prior.counts.find(prior.count_context(left_S[symbols_A], shared_A), slots_A)
        counts_S[symbols_A] = less_A + 1
        shared_L[: len(symbols_A)] = shared_A - less_A - 1
        return starts_A, frequencies_A

    reader.read(counts_L, decode)
    last_R = numpy.cumsum(unique_R) - 1
    counts_U = numpy.empty(int(unique_R.sum()), dtype=numpy.int64)
    coded = numpy.ones(len(counts_U), dtype=bool)
    coded[last_R] = False
    counts_U[coded] = counts_S
    spent = numpy.append(0, numpy.cumsum(counts_S))
    until_R = numpy.cumsum(coded_R)
    counts_U[last_R] = prior.draws - (spent[until_R] - spent[until_R - coded_R])
    return counts_U


def _reader(packed: Packed, lanes: Integers) -> LaneReader:
    first_L = numpy.cumsum(packed.lengths_L) - packed.lengths_L
    lengths = packed.lengths_L[lanes]
    return LaneReader(packed.words[ranges(first_L[lanes], lengths)], lengths)


# -- both ----------------------------------------------------------------------------------------------------------------


def _bounds(prior: DrawnPrior) -> Integers:
    """Where the weights of each context begin, and where the last ends."""
    bounds: Integers = prior.weight_before[:: prior.size].astype(numpy.int64)
    return bounds


def _descending(counts_R: Integers) -> tuple[NDArray[numpy.bool_], Integers]:
    """For count, count - 1, ..., 1 of each row, end to end: whether it is the first of its row, and the number itself."""
    left_S = numpy.repeat(numpy.cumsum(counts_R), counts_R) - numpy.arange(int(counts_R.sum()))
    return left_S == numpy.repeat(counts_R, counts_R), left_S


def _sums(numbers_R: Integers, rows_E: Integers) -> Integers:
    """Sums over the rows of each record."""
    before = numpy.append(0, numpy.cumsum(numbers_R))
    end_E = numpy.cumsum(rows_E)
    sums: Integers = before[end_E] - before[end_E - rows_E]
    return sums


def _token_lanes(tokens_E: Integers) -> Integers:
    return -(-tokens_E // TOKENS_PER_LANE)


def _full_parts(tokens_E: Integers, lanes_E: Integers) -> Integers:
    """Tokens of each lane: all that it can hold, and the last of a record the rest."""
    tokens_L = numpy.full(int(lanes_E.sum()), TOKENS_PER_LANE, dtype=numpy.int64)
    some = lanes_E > 0
    tokens_L[numpy.cumsum(lanes_E)[some] - 1] = (tokens_E - TOKENS_PER_LANE * (lanes_E - 1))[some]
    return tokens_L
