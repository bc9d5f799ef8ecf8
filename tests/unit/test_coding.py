"""The entropy coder, the tables of drawn targets and their lanes: what is written is read again exactly, and takes what its probabilities say."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stillroom.core.identities import TokenSequence
from stillroom.targets import packing
from stillroom.targets.coding import WHOLE, Family, LaneReader, Search, cumulative_of, ranges, write_lanes
from stillroom.targets.kinds import DrawnTargets
from stillroom.targets.packing import Layout, Packed, in_order, pack, require_drawn, scored, unpack_rows, unpack_tokens
from stillroom.targets.prior import MOST_WEIGHT, DrawnPrior, estimate_prior, quantised_entropy

# -- lanes ------------------------------------------------------------------------------------------------------------------


def read_back(family: Family, contexts: numpy.ndarray, words: numpy.ndarray, lengths: numpy.ndarray, counts: numpy.ndarray) -> numpy.ndarray:
    found = numpy.empty_like(contexts)
    reader = LaneReader(words, lengths)

    def decode(symbols_A: numpy.ndarray, slots_A: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        found[symbols_A], starts_A, frequencies_A = family.find(contexts[symbols_A], slots_A)
        return starts_A, frequencies_A

    reader.read(counts, decode)
    reader.require_end()
    return found


@given(seed=st.integers(0, 2**32), counts=st.lists(st.integers(0, 60), max_size=9), skew=st.integers(0, 12))
@example(seed=0, counts=[], skew=1)
@example(seed=0, counts=[0, 0], skew=1)
def test_what_is_written_is_read_again_and_takes_what_it_must(seed: int, counts: list[int], skew: int) -> None:
    rng = numpy.random.default_rng(seed)
    counts_L = numpy.array(counts, dtype=numpy.int64)
    sizes = rng.integers(1, 9, 5)
    weights = [rng.random(size) ** skew + 1e-12 for size in sizes]
    family = Family(numpy.concatenate([cumulative_of(one) for one in weights]), sizes)
    contexts = rng.integers(0, 5, counts_L.sum())
    symbols = numpy.array([rng.choice(sizes[c], p=weights[c] / weights[c].sum()) for c in contexts], dtype=numpy.int64)
    starts, frequencies = family.intervals(contexts, symbols)
    words, lengths = write_lanes(starts, frequencies, counts_L)
    assert numpy.array_equal(read_back(family, contexts, words, lengths, counts_L), symbols)
    # Within a lane's last state, 64 bits, of the probabilities' own cost; and never less than that cost.
    cost_S = -numpy.log2(frequencies / WHOLE)
    ends = numpy.cumsum(counts_L)
    cost_L = numpy.array([cost_S[end - count : end].sum() for end, count in zip(ends, counts_L, strict=True)])
    assert (32 * lengths <= cost_L + 64 + 1e-3 * counts_L).all()
    assert (32 * lengths >= cost_L - 31).all()


def test_symbols_of_every_probability_that_there_is() -> None:
    """From one slot to all of them: the ends of every range in which the coder computes."""
    edges = numpy.array([0, 1, 2, 3, 2**16, 2**30, 2**31 - 2, 2**31 - 1], dtype=numpy.int64)
    family = Family(numpy.append(edges, 0), numpy.array([len(edges), 1]))
    rng = numpy.random.default_rng(0)
    for count in (1, 2, 3, 50, 1000):
        contexts = rng.integers(0, 2, count)
        symbols = numpy.where(contexts == 1, 0, rng.integers(0, len(edges), count))
        words, lengths = write_lanes(*family.intervals(contexts, symbols), numpy.array([count]))
        assert numpy.array_equal(read_back(family, contexts, words, lengths, numpy.array([count])), symbols)
    nothing, none = write_lanes(*family.intervals(numpy.ones(70, dtype=numpy.int64), numpy.zeros(70, dtype=numpy.int64)), numpy.array([70]))
    assert (len(nothing), none.tolist()) == (0, [0])  # what is certain takes no room


def test_a_word_that_is_not_as_it_was_written_is_noticed() -> None:
    """Not by itself a check of damage (checksums are), but of a reader with other tables."""
    family = Family(cumulative_of(numpy.array([5.0, 3.0, 1.0])), numpy.array([3]))
    symbols = numpy.random.default_rng(1).integers(0, 3, 200)
    words, lengths = write_lanes(*family.intervals(numpy.zeros(200, dtype=numpy.int64), symbols), numpy.array([200]))
    for place in range(len(words)):
        changed = words.copy()
        changed[place] ^= 1
        with pytest.raises(ValueError, match="does not end"):
            read_back(family, numpy.zeros(200, dtype=numpy.int64), changed, lengths, numpy.array([200]))


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=30))
def test_cumulative_starts_leave_room_for_every_symbol(weights: list[float]) -> None:
    starts = cumulative_of(numpy.array(weights))
    sizes = numpy.diff(numpy.append(starts, WHOLE))
    assert starts[0] == 0
    assert (sizes >= 1).all()
    assert sizes / WHOLE == pytest.approx(numpy.array(weights) / sum(weights), abs=2 * len(weights) / WHOLE)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=200, unique=True), st.integers(0, 14), st.integers(0, 2**32))
def test_the_search_finds_what_numpy_finds(values: list[int], shift: int, seed: int) -> None:
    values_sorted = numpy.array(sorted(values), dtype=numpy.uint32)
    search = Search(values_sorted, shift)
    # Few keys and many are not searched in the same way.
    for shape in ((2, 50), (2, 500)):
        keys = numpy.random.default_rng(seed).integers(values_sorted[0], int(values_sorted[-1]) + 1, shape)
        assert numpy.array_equal(search.last_not_above(keys), numpy.searchsorted(values_sorted, keys, side="right") - 1)


def test_ranges() -> None:
    assert ranges(numpy.array([5, 0, 7]), numpy.array([2, 0, 3])).tolist() == [5, 6, 7, 8, 9]


# -- tables -------------------------------------------------------------------------------------------------------------------


def some_drawn(rng: numpy.random.Generator, rows: int, size: int, draws: int, spread: float) -> DrawnTargets:
    ids, counts, offsets = [], [], [0]
    favourites = rng.permutation(size)[: min(size, 400)]
    for _ in range(rows):
        chosen = rng.permutation(favourites)[: int(rng.integers(1, min(len(favourites), 60) + 1))]
        times = rng.multinomial(draws, rng.dirichlet(numpy.full(len(chosen), spread)))
        order = numpy.argsort(chosen[times > 0])
        ids += chosen[times > 0][order].tolist()
        counts += times[times > 0][order].tolist()
        offsets.append(len(ids))
    return DrawnTargets(
        vocabulary="v",
        temperature=1.0,
        draws=draws,
        offsets_R1=numpy.array(offsets, dtype=numpy.int64),
        ids_U=numpy.array(ids, dtype=numpy.int32),
        counts_U=numpy.array(counts, dtype=numpy.int32),
        entropy_R=(rng.random(rows) * math.log(size)).astype(numpy.float32),
    )


@cache
def some_prior(seed: int, rows: int, size: int, draws: int) -> DrawnPrior:
    rng = numpy.random.default_rng(seed)
    targets = some_drawn(rng, rows, size, draws, 0.3)
    before_R = rng.integers(0, min(size, 40), rows)
    prior = estimate_prior(targets, before_R, rng.integers(0, size, rows), size)
    return DrawnPrior.from_bytes(prior.to_bytes())


SHAPES = [(0, 0, 2, 1), (1, 1, 2, 2), (2, 30, 19, 7), (3, 200, 300, 50), (4, 50, 5000, 255), (5, 0, 151_936, 50)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ids_of_a_context_share_all_slots_whatever_came_before(shape: tuple[int, int, int, int]) -> None:
    """For any number of ids to come and any least id, the intervals are end to end from 0 to 2^31, and none is empty."""
    prior = some_prior(*shape)
    size, draws = shape[2:]
    rng = numpy.random.default_rng(0)
    assert (numpy.diff(prior.weight_before[:: prior.size].astype(numpy.int64)) <= MOST_WEIGHT).all()
    for _ in range(40):
        context, left = int(rng.integers(0, len(prior.weights_CG))), int(rng.integers(1, draws + 1))
        least = int(rng.choice([0, size - 1, rng.integers(0, size)]))
        places = context * size + numpy.arange(least, size)
        whole = numpy.ones_like(places)
        starts, frequencies = packing._interval_of(prior, left * whole, places[0] * whole, (context + 1) * size * whole, places)
        assert starts[0] == 0
        assert (frequencies > 0).all()
        assert numpy.array_equal(starts[1:], (starts + frequencies)[:-1])
        assert starts[-1] + frequencies[-1] == WHOLE
        # And a slot leads back to its id.
        slots = numpy.concatenate([starts, starts + frequencies - 1])
        weights = prior.weight_before
        begin, end = (numpy.full(len(slots), int(weights[place])) for place in (places[0], (context + 1) * size))
        found, again, size_of = packing._find_ids(prior, numpy.full(len(slots), left), begin, end, slots)
        assert numpy.array_equal(found, numpy.tile(places, 2))
        assert numpy.array_equal(again, numpy.tile(starts, 2))
        assert numpy.array_equal(size_of, numpy.tile(frequencies, 2))


def test_an_id_to_come_is_as_probable_as_the_smallest_of_several_is() -> None:
    """Against the binomial law, at the table's own entries: the chance that none of m lies below a share y is (1 - y)^m."""
    prior = some_prior(3, 200, 300, 50)
    for left in (1, 2, 12, 50):
        share = prior.quantiles_NJ[left] / WHOLE
        assert 1 - (1 - share) ** left == pytest.approx(numpy.arange(129) / 128, abs=1e-6)


@pytest.mark.parametrize("draws", [2, 7, 13])
def test_counts_are_those_of_a_pitman_yor_process(draws: int) -> None:
    """Exactly: the conditional law of the next count, by enumerating every way in which unique ids can share the draws."""
    prior = some_prior(1, 1, 19, draws)

    def weight(c: int) -> Fraction:
        return Fraction(1) if c == 1 else weight(c - 1) * (c - 1 - Fraction(3, 5)) / c

    @cache
    def ways(m: int, s: int) -> Fraction:
        if m == 0:
            return Fraction(int(s == 0))
        return sum((weight(c) * ways(m - 1, s - c) for c in range(1, s + 1)), Fraction(0))

    for m in range(2, draws + 1):
        for s in range(m, draws + 1):
            possible = numpy.arange(s - m + 1)
            context = prior.count_context(numpy.full_like(possible, m), numpy.full_like(possible, s))
            _, frequencies = prior.counts.intervals(context, possible)
            assert frequencies.sum() == WHOLE
            expected = [float(weight(c + 1) * ways(m - 1, s - c - 1) / ways(m, s)) for c in possible.tolist()]
            assert frequencies / WHOLE == pytest.approx(expected, abs=2 * (s - m + 1) / WHOLE)


def test_a_prior_is_the_same_whoever_makes_it() -> None:
    rng = numpy.random.default_rng(9)
    targets = some_drawn(rng, 400, 3000, 20, 0.3)
    before_R, own_R = rng.integers(0, 200, 400), rng.integers(0, 3000, 400)
    one = estimate_prior(targets, before_R, own_R, 3000).to_bytes()
    assert one == estimate_prior(targets, before_R, own_R, 3000).to_bytes()
    assert one == DrawnPrior.from_bytes(one).to_bytes()


def test_what_is_no_prior_is_refused() -> None:
    data = some_prior(1, 1, 2, 2).to_bytes()
    for wrong in (b"", b"PK", data[: len(data) // 2], data.replace(b"quantiles", b"quantilez")):
        with pytest.raises(ValueError, match="is not a prior"):
            DrawnPrior.from_bytes(wrong)
    for draws, size in ((0, 5), (256, 5), (5, 1), (5, 2**22 + 1)):
        with pytest.raises(ValueError, match="drawn targets have"):
            estimate_prior(some_drawn(numpy.random.default_rng(0), 0, 5, draws, 1.0), numpy.empty(0, int), numpy.empty(0, int), size)


def test_context_makes_likely_ids_short() -> None:
    """A language whose next id is one of eight that the id before decides: with classes it takes less than half of what it takes without."""
    rng = numpy.random.default_rng(2)
    size, groups = 2000, 10
    before_R = rng.integers(0, size, 4000)
    # A row's ids are those whose last digit is that of the token before.
    ids_RK = numpy.sort((numpy.array([rng.choice(size // groups, 8, replace=False) for _ in before_R]) * groups) + before_R[:, None] % groups, axis=1)
    targets = DrawnTargets(
        vocabulary="v",
        temperature=1.0,
        draws=8,
        offsets_R1=numpy.arange(0, 8 * len(before_R) + 1, 8),
        ids_U=ids_RK.reshape(-1).astype(numpy.int32),
        counts_U=numpy.ones(8 * len(before_R), dtype=numpy.int32),
        entropy_R=numpy.full(len(before_R), math.log(8), dtype=numpy.float32),
    )

    def bits(context_R: numpy.ndarray) -> float:
        prior = estimate_prior(targets, context_R, numpy.zeros(len(before_R), dtype=numpy.int64), size)
        rows = packing._Rows.of(prior, targets, prior.context_V[context_R].astype(numpy.int64), numpy.zeros(len(before_R), dtype=numpy.int64))
        _, frequencies = rows._id_intervals(prior, rows.unique_R - rows.among_R)
        return float(-numpy.log2(frequencies / WHOLE).sum() / len(before_R))

    alone, known = bits(numpy.zeros_like(before_R)), bits(before_R)
    # Eight of 2,000 in any order, eight of 200 in any order; within 4 %.
    assert alone == pytest.approx(math.log2(math.comb(size, 8)), rel=0.04)
    assert known == pytest.approx(math.log2(math.comb(size // groups, 8)), rel=0.04)


# -- records --------------------------------------------------------------------------------------------------------------------


def some_sequences(rng: numpy.random.Generator, count: int, size: int, longest: int) -> list[TokenSequence]:
    sequences = []
    for _ in range(count):
        length = int(rng.integers(0, longest + 1))
        cuts = numpy.sort(rng.choice(length + 1, size=min(2 * int(rng.integers(0, 3)), (length + 1) // 2 * 2), replace=False)).tolist()
        spans = tuple(zip(cuts[::2], cuts[1::2], strict=True))
        sequences.append(TokenSequence(ids=tuple(rng.integers(0, size, length).tolist()), answer_spans=spans))
    return sequences


def round_trip(prior: DrawnPrior, sequences: list[TokenSequence], targets: DrawnTargets, order: numpy.ndarray | None = None) -> Packed:
    """Packs, takes the records apart, puts them together in another order, and unpacks: everything is as it was."""
    packed = pack(prior, sequences, targets)
    order = numpy.arange(len(sequences)) if order is None else order
    alone = [pack(prior, [sequence], rows_of(targets, sequences, at)) for at, sequence in enumerate(sequences)]
    # A record's words do not depend on the records beside it.
    assert numpy.array_equal(numpy.concatenate([numpy.empty(0, numpy.uint32), *(one.words for one in alone)]), packed.words)
    if len(sequences):
        packed = in_order([alone[at] for at in order], numpy.arange(len(order)))
    wanted = [sequences[at] for at in order]
    layout = Layout.of(numpy.array([len(s.ids) for s in wanted], int), numpy.array([len(s.scored_rows) for s in wanted], int), packed.lanes_E)
    tokens_T = unpack_tokens(prior, packed, layout)
    assert tokens_T.tolist() == [token for sequence in wanted for token in sequence.ids]
    before_R, predicted_R = scored(wanted)
    found = unpack_rows(prior, packed, layout, tokens_T[before_R], tokens_T[predicted_R], vocabulary="v", temperature=1.0)
    parts = [rows_of(targets, sequences, at) for at in order]
    assert found.ids_U.tolist() == [one for part in parts for one in part.ids_U.tolist()]
    assert found.counts_U.tolist() == [one for part in parts for one in part.counts_U.tolist()]
    assert numpy.diff(found.offsets_R1).tolist() == [one for part in parts for one in numpy.diff(part.offsets_R1).tolist()]
    entropies = numpy.array([one for part in parts for one in part.entropy_R.tolist()], dtype=numpy.float64)
    assert numpy.array_equal(found.entropy_R, quantised_entropy(entropies, prior.size) / 512)
    assert (numpy.abs(found.entropy_R - entropies) <= 2**-10).all()
    assert (found.draws, found.offsets_R1.dtype, found.ids_U.dtype, found.counts_U.dtype) == (prior.draws, numpy.int64, numpy.int32, numpy.int32)
    return packed


def rows_of(targets: DrawnTargets, sequences: list[TokenSequence], at: int) -> DrawnTargets:
    start = sum(len(sequence.scored_rows) for sequence in sequences[:at])
    stop = start + len(sequences[at].scored_rows)
    entries = slice(targets.offsets_R1[start], targets.offsets_R1[stop])
    return DrawnTargets(
        vocabulary="v",
        temperature=1.0,
        draws=targets.draws,
        offsets_R1=targets.offsets_R1[start : stop + 1] - targets.offsets_R1[start],
        ids_U=targets.ids_U[entries],
        counts_U=targets.counts_U[entries],
        entropy_R=targets.entropy_R[start:stop],
    )


@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(SHAPES[:5]),
    count=st.integers(0, 6),
    longest=st.sampled_from([1, 3, 30, 140]),
    spread=st.sampled_from([0.01, 0.3, 30.0]),
)
@settings(max_examples=60)
def test_any_records_come_back_exactly_in_any_order(seed: int, shape: tuple[int, int, int, int], count: int, longest: int, spread: float) -> None:
    """Whatever the prior was made of: here of other rows than those it codes, or of none."""
    rng = numpy.random.default_rng(seed)
    sequences = some_sequences(rng, count, shape[2], longest)
    targets = some_drawn(rng, sum(len(sequence.scored_rows) for sequence in sequences), shape[2], shape[3], spread)
    require_drawn(sequences, targets, shape[3], shape[2])
    round_trip(some_prior(*shape), sequences, targets, rng.permutation(count))


def explicit(ids: list[list[int]], counts: list[list[int]], draws: int, entropy: list[float]) -> DrawnTargets:
    return DrawnTargets(
        vocabulary="v",
        temperature=1.0,
        draws=draws,
        offsets_R1=numpy.append(0, numpy.cumsum([len(row) for row in ids])),
        ids_U=numpy.array([one for row in ids for one in row], dtype=numpy.int32),
        counts_U=numpy.array([one for row in counts for one in row], dtype=numpy.int32),
        entropy_R=numpy.array(entropy, dtype=numpy.float32),
    )


def test_the_rows_that_are_at_the_ends_of_what_can_be() -> None:
    """One id and as many ids as draws; with and without the row's own token; the first and the last id; no entropy and the most there can be."""
    most = math.log(5000)
    rng = numpy.random.default_rng(0)
    for seen in (SHAPES[4], (7, 0, 5000, 255)):
        prior = some_prior(*seen)
        of = TokenSequence(ids=(0, 4999, 17, 0, 3), answer_spans=((1, 5),))
        every = sorted({4999, 17, *rng.choice(4990, 253, replace=False).tolist()})[:255]
        rows = [[4999], [0], every, list(range(4745, 5000))]
        counts = [[255], [255], [255 - len(every) + 1, *[1] * (len(every) - 1)], [1] * 255]
        targets = explicit(rows, counts, 255, [0.0, most, most / 2, 1e-4])
        require_drawn([of], targets, 255, 5000)
        packed = round_trip(prior, [of], targets)
        assert len(packed.words) < 2 * 255 * 32 / 8
    tiny = some_prior(0, 0, 2, 1)
    of = TokenSequence(ids=(1, 1, 0, 0), answer_spans=((0, 4),))
    round_trip(tiny, [of, TokenSequence(ids=(), answer_spans=())], explicit([[0], [1], [0]], [[1]] * 3, 1, [math.log(2), 0.0, 0.5]))


def test_a_long_record_has_many_lanes_that_hold_about_the_same() -> None:
    rng = numpy.random.default_rng(4)
    prior = some_prior(*SHAPES[3])
    of = TokenSequence(ids=tuple(rng.integers(0, 300, 1000).tolist()), answer_spans=((100, 1000),))
    packed = round_trip(prior, [of], some_drawn(rng, 900, 300, 50, 0.3))
    assert packed.lanes_E.tolist() == [len(packed.lengths_L)]
    row_lanes = packed.lengths_L[8:]  # after those of the tokens, 128 each
    assert len(row_lanes) > 40
    assert row_lanes.max() < 1.5 * row_lanes.mean()


def test_lanes_that_do_not_fit_a_record_are_refused() -> None:
    for tokens, rows, lanes in ((5, 3, 1), (5, 0, 2), (0, 0, 1), (129, 3, 2), (129, 0, 1)):
        with pytest.raises(ValueError, match="do not fit"):
            Layout.of(numpy.array([tokens]), numpy.array([rows]), numpy.array([lanes]))


def test_no_rows_and_no_draws_hold_nothing() -> None:
    none = packing.no_rows(7, vocabulary="v", temperature=2.0)
    assert (none.draws, none.temperature, len(none.entropy_R), none.offsets_R1.tolist()) == (7, 2.0, 0, [0])
