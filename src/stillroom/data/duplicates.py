"""Steps that compare rows with each other: the same again, and nearly the same again. Of any such group the first row stays.

Near duplicates are found by MinHash (Broder 1997) and banding (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4), then compared exactly:
no row is dropped on an estimate. Work and memory grow with the number of rows and not with its square, whatever the rows are, because a row is
compared with a bounded number of others.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from stillroom.data.curation import Drop, Finding, Row, Sifted, sift_each
from stillroom.data.words import digest, grams, identity, normalised, words

Part: TypeAlias = Literal["prompt", "answer", "both"]

# How many of a band's rows a row can meet, and with how many in all it is compared: what keeps a million rows with one opening from meeting each other.
_ROWS_OF_A_BAND = 16
_COMPARED = 48


def _text(row: Row, of: Part) -> str:
    match of:
        case "prompt":
            return row.prompt.content
        case "answer":
            return row.answer
        case "both":
            return f"{row.prompt.content}\n\0\n{row.answer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactDuplicates:
    """Drops rows whose words are those of an earlier row, in order; case, spacing, punctuation and widths do not count.

    Where a text has signs without words (numbers in a formula are words) it is compared whole. `of` says what is compared.
    """

    name: ClassVar[str] = "exact-duplicates"
    of: Part = "both"

    def sift(self, rows: Sequence[Row]) -> Sifted:
        first: dict[bytes, str] = {}

        def judge(row: Row) -> Finding | None:
            parts = (row.prompt.content, row.answer) if self.of == "both" else (_text(row, self.of),)
            earlier = first.setdefault(digest("\0".join(map(_exact, parts))), row.key)
            return None if earlier == row.key else Finding(reason="duplicate", evidence=f"the words of row {earlier}", against=(earlier,))

        return sift_each(self.name, rows, judge)


def _exact(text: str) -> str:
    """The words where a text has nothing else that could carry meaning, as an operator does; else all of it, normalised."""
    return identity(text) if not any(sign in text for sign in "+-*/=<>^%&|~") else normalised(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicates:
    """Drops rows that are nearly an earlier row that was kept: the Jaccard index of their sets of `shingle_words` words in a row is >= `threshold`.

    A row that is dropped is always that close to the row it names. A row that is that close may be missed, with probability (1 - j**r)**b for an index
    of j, b bands and r values in each (14 and 9 by default): 13 % at 0.8, 2.5 % at 0.85, 0.1 % at 0.9. And where more than a few rows share most of
    their text, a row is compared with at most 48 of them.
    """

    name: ClassVar[str] = "near-duplicates"
    of: Part = "both"
    threshold: float = 0.8
    shingle_words: int = 3
    permutations: int = 128
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1 or self.shingle_words < 1 or self.permutations < 16:
            raise ValueError("near duplicates want a threshold in (0, 1], at least one word a shingle and at least 16 permutations")

    def sift(self, rows: Sequence[Row]) -> Sifted:
        bands_NB = self._bands(rows)
        shared_NB = np.stack([_shared(column) for column in bands_NB.T], axis=1) if len(rows) else bands_NB.astype(bool)
        met: dict[tuple[int, int], list[int]] = defaultdict(list)
        shingles = lru_cache(maxsize=1 << 14)(lambda index: frozenset(self._shingles(_text(rows[index], self.of))))
        kept: list[Row] = []
        dropped: list[Drop] = []
        for index, row in enumerate(rows):
            bands = [(int(band), int(bands_NB[index, band])) for band in np.flatnonzero(shared_NB[index])]
            finding = self._finding(index, rows, Counter(other for band in bands for other in met[band]), shingles)
            if finding is not None:
                dropped.append(Drop(key=row.key, step=self.name, finding=finding))
                continue
            kept.append(row)
            for band in bands:
                if len(met[band]) < _ROWS_OF_A_BAND:
                    met[band].append(index)
        return Sifted(kept=tuple(kept), dropped=tuple(dropped))

    def _finding(self, index: int, rows: Sequence[Row], met: Counter[int], shingles: Callable[[int], frozenset[bytes]]) -> Finding | None:
        """The earliest of the rows met, of those with most bands in common, that is close enough."""
        likeliest = sorted(other for other, _ in met.most_common(_COMPARED))
        for other in likeliest:
            mine, theirs = shingles(index), shingles(other)
            common = len(mine & theirs)
            jaccard = common / (len(mine) + len(theirs) - common)
            if jaccard >= self.threshold:
                earlier = rows[other].key
                return Finding(reason="near-duplicate", evidence=f"Jaccard index {jaccard:.3f} with row {earlier}", against=(earlier,))
        return None

    def _bands(self, rows: Sequence[Row]) -> NDArray[np.uint64]:
        """For each row a number for each band of its signature (N, B): rows with an equal number in one band are likely to be alike."""
        bands, length = _banding(self.threshold, self.permutations)
        found_NB = np.empty((len(rows), bands), np.uint64)
        sets = (list(self._shingles(_text(row, self.of))) for row in rows)
        for index, sketch in enumerate(_sketches(sets, self.permutations, self.seed)):
            found_NB[index] = _band_numbers(sketch[: bands * length].reshape(bands, length))
        return found_NB

    def _shingles(self, text: str) -> set[bytes]:
        """Runs of words as bytes; of a text with fewer words, all of it."""
        found = words(text)
        if len(found) < self.shingle_words:
            return {identity(text).encode("utf-8", "surrogatepass")}
        return {gram.encode("utf-8", "surrogatepass") for gram in grams(found, self.shingle_words)}


def _sketches(sets: Iterable[list[bytes]], permutations: int, seed: int) -> Iterable[NDArray[np.uint64]]:
    # CRC-32 is what the standard library has that is fast and gives 32 bits; datasketch mixes them before it permutes.
    for sketch in MinHash.generator(sets, num_perm=permutations, seed=seed, hashfunc=zlib.crc32):
        yield sketch.hashvalues.astype(np.uint64)


@lru_cache(maxsize=8)
def _banding(threshold: float, permutations: int) -> tuple[int, int]:
    """How many bands, and how many values each. False positives only cost a comparison, so misses weigh more."""
    index = MinHashLSH(threshold=min(threshold, 0.99), num_perm=permutations, weights=(0.1, 0.9))
    return int(index.b), int(index.r)


def _band_numbers(values_BR: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One number for each band, equal where all its values are (Horner's rule modulo 2**64, then mixed)."""
    number_B = np.full(values_BR.shape[0], 0x9E3779B97F4A7C15, np.uint64)
    for value_B in values_BR.T:
        number_B = (number_B ^ value_B) * np.uint64(0xD6E8FEB86659FD93)
        number_B ^= number_B >> np.uint64(32)
    return number_B


def _shared(column_N: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which numbers of a band are those of more than one row: only these rows meet anyone, and most do not."""
    _, inverse, counts = np.unique(column_N, return_inverse=True, return_counts=True)
    found: NDArray[np.bool_] = counts[inverse] > 1
    return found
