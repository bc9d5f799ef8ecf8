"""A language model of a large vocabulary, trained in a minute or two from text that is on any machine: next-token distributions as a teacher has them.

The text is that of the interpreter's own standard library and of the packages installed beside it (sources, documentation). A byte-level BPE is trained on
one part of the files, and on the same part a 5-gram model: absolute discounting, interpolated down to the unigrams and to the uniform distribution
(Chen and Goodman 1999, section 2.6). Distributions are asked for on the other part. Deterministic: the same files give the same model.

Suffixes: T tokens, V vocabulary size, N draws, E ids that have followed a context.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

Integers = NDArray[numpy.int64]
Floats = NDArray[numpy.float64]

END = 0
_SUFFIXES = frozenset({".py", ".pyi", ".pyx", ".rst", ".md", ".txt", ".h", ".hpp", ".html", ".js", ".yaml", ".toml"})
# Files of data are no text, and what is as long as this mostly is one.
_MOST_BYTES = 200_000
_HELD_OUT_SHARE = 0.04
_ORDERS = 4
_DISCOUNT = 0.75


# -- text ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a model is trained on, what it may be asked about, and the characters of both by package."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]
    package_characters: dict[str, int]

    @property
    def sha256(self) -> str:
        """Of all texts in order."""
        digest = hashlib.sha256()
        for text in (*self.training, *self.held_out):
            digest.update(hashlib.sha256(text.encode()).digest())
        return digest.hexdigest()


def text_here(size: int, share: float) -> Text:
    """About `size` characters of text from the interpreter's installation, of one package at most `share` of it. Which files is decided by their names' hashes.

    Files are held out one by one, not package by package: a teacher, too, has seen text of the kind that it is asked about.
    """
    packages: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for package, name, path in _files():
        packages[package].append((hashlib.sha256(name.encode()).hexdigest(), path))
    chosen, seen = [], set()
    for package, files in sorted(packages.items()):
        left = size * share
        for digest, path in sorted(files):
            text = path.read_bytes().decode(errors="replace")
            if left > 0 and text not in seen:
                seen.add(text)
                chosen.append((digest, package, text))
                left -= len(text)
    training, held_out, total = [], [], 0
    package_characters: dict[str, int] = defaultdict(int)
    for digest, package, text in sorted(chosen):
        if total < size:
            total += len(text)
            package_characters[package] += len(text)
            (held_out if int(digest[-8:], 16) < _HELD_OUT_SHARE * 2**32 else training).append(text)
    return Text(
        training=tuple(training), held_out=tuple(held_out), package_characters=dict(sorted(package_characters.items(), key=lambda one: -one[1]))
    )


def _files() -> Iterator[tuple[str, str, Path]]:
    """Package, name and path of every file of text."""
    places = sysconfig.get_paths()
    standard, installed = Path(places["stdlib"]), Path(places["purelib"])
    for root in (standard, installed):
        for path in root.rglob("*"):
            name = path.relative_to(root)
            if path.suffix not in _SUFFIXES or "site-packages" in name.parts or not path.is_file() or not 500 < path.stat().st_size < _MOST_BYTES:
                continue
            yield "the standard library" if root == standard else name.parts[0], name.as_posix(), path


# -- tokenizer -----------------------------------------------------------------------------------------------------------


def trained_tokenizer(texts: Sequence[str], size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` ids, fewer where the text has not as many pairs that occur twice. Id 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens_of(tokenizer: Tokenizer, texts: Sequence[str]) -> Integers:
    """All texts end to end, each with the end token after it."""
    parts: list[Any] = [numpy.empty(0, dtype=numpy.int64)]
    # Some at a time: an encoding holds much more than its ids.
    for start in range(0, len(texts), 256):
        parts += [numpy.array([*encoding.ids, END]) for encoding in tokenizer.encode_batch_fast(list(texts[start : start + 256]))]
    return numpy.concatenate(parts)


# -- model ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One next-token distribution: what each order of the context adds, longest first, and the share that the unigrams have of the rest.

    The probability of id v is rest x unigram_v + the sum of what every order gives it. An order has an id once; two orders may have the same.
    """

    orders: tuple[tuple[Integers, Floats], ...]
    rest: float


class NGrams:
    """The model."""

    def __init__(self, tokens_T: Integers, size: int) -> None:
        self.size = size
        self._orders = [_Order(tokens_T, order, size) for order in range(1, _ORDERS + 1)]
        times_V = numpy.bincount(tokens_T, minlength=size).astype(numpy.float64)
        left = _DISCOUNT * numpy.count_nonzero(times_V) / size
        self.unigram_V = (numpy.maximum(times_V - _DISCOUNT, 0) + left) / times_V.sum()
        self._unigram_until_V = numpy.cumsum(self.unigram_V)
        self._plogp_V = self.unigram_V * numpy.log(self.unigram_V)
        self._plogp = float(self._plogp_V.sum())
        # All zero between two calls.
        self._scratch_V = numpy.zeros(size)

    def rows(self, tokens_T: Integers) -> Iterator[Row]:
        """For each token of a text the distribution of the one after it, given the text up to there."""
        bounds = [order.find(tokens_T) for order in self._orders]
        for place in range(len(tokens_T)):
            found, rest = [], 1.0
            for order, (begin, end) in zip(reversed(self._orders), reversed(bounds), strict=True):
                if begin[place] == end[place]:
                    continue
                times_E = order.times[begin[place] : end[place]]
                total = float(times_E.sum())
                found.append((order.ids[begin[place] : end[place]], (times_E - _DISCOUNT) * (rest / total)))
                rest *= _DISCOUNT * len(times_E) / total
            yield Row(orders=tuple(found), rest=rest)

    def whole_V(self, row: Row) -> Floats:
        """The distribution over all ids."""
        whole_V = row.rest * self.unigram_V
        for ids_E, probabilities_E in row.orders:
            whole_V[ids_E] += probabilities_E
        return whole_V

    def probability(self, row: Row, token: int) -> float:
        """Of one id."""
        return float(row.rest * self.unigram_V[token] + sum(part_E[ids_E == token].sum() for ids_E, part_E in row.orders))

    def entropy(self, row: Row) -> float:
        """In nats. Ids that no order has are as the unigrams say, of which the sum over all is known."""
        scratch_V = self._scratch_V
        for ids_E, probabilities_E in row.orders:
            scratch_V[ids_E] += probabilities_E
        entropy, plogp, mass = 0.0, self._plogp, 1.0
        for ids_E, _ in row.orders:
            # What an earlier order had is zero by now.
            ids_E = ids_E[scratch_V[ids_E] > 0]
            unigram_E = self.unigram_V[ids_E]
            p_E = scratch_V[ids_E] + row.rest * unigram_E
            scratch_V[ids_E] = 0.0
            entropy -= float((p_E * numpy.log(p_E)).sum())
            plogp -= float(self._plogp_V[ids_E].sum())
            mass -= float(unigram_E.sum())
        return entropy - row.rest * (plogp + mass * math.log(row.rest))

    def draws_N(self, row: Row, places_N: Floats) -> Integers:
        """The id at each place in [0, 1) of the running sum of the orders' probabilities and then the unigrams': drawn ids where places are uniform."""
        ids_N, begin = numpy.empty(len(places_N), dtype=numpy.int64), 0.0
        for ids_E, probabilities_E in row.orders:
            until_E = begin + numpy.cumsum(probabilities_E)
            here = (places_N >= begin) & (places_N < until_E[-1])
            ids_N[here] = ids_E[numpy.searchsorted(until_E, places_N[here], side="right")]
            begin = float(until_E[-1])
        left = places_N >= begin
        within = (places_N[left] - begin) / row.rest * self._unigram_until_V[-1]
        ids_N[left] = numpy.searchsorted(self._unigram_until_V, within, side="right").clip(max=self.size - 1)
        return ids_N


class _Order:
    """What has followed each context of `order` tokens, and how often."""

    def __init__(self, tokens_T: Integers, order: int, size: int) -> None:
        self._order, self._bits = order, numpy.uint64(max(size - 1, 1).bit_length())
        # Context and next id in one number, so that one sort puts both in order: 46 bits of a context's hash where ids take 18.
        keys = self._contexts(tokens_T)[order - 1 : -1] | tokens_T[order:].astype(numpy.uint64)
        keys, times = numpy.unique(keys, return_counts=True)
        self._keys, self.times = keys, times.astype(numpy.float64)
        self.ids = (keys & ((numpy.uint64(1) << self._bits) - numpy.uint64(1))).astype(numpy.int64)

    def find(self, tokens_T: Integers) -> tuple[list[int], list[int]]:
        """Where the entries of the context that ends at each token begin and end."""
        contexts = self._contexts(tokens_T)
        begin = numpy.searchsorted(self._keys, contexts, "left")
        end = numpy.searchsorted(self._keys, contexts | ((numpy.uint64(1) << self._bits) - numpy.uint64(1)), "right")
        # A text's first tokens have no such context.
        end[: self._order - 1] = begin[: self._order - 1]
        return begin.tolist(), end.tolist()

    def _contexts(self, tokens_T: Integers) -> NDArray[numpy.uint64]:
        """A hash of the tokens of the context that ends at each place, above the bits of an id."""
        hashes = numpy.zeros(len(tokens_T), dtype=numpy.uint64)
        for back in range(self._order):
            earlier = numpy.zeros(len(tokens_T), dtype=numpy.uint64)
            earlier[back:] = tokens_T[: len(tokens_T) - back].astype(numpy.uint64) + numpy.uint64(1)
            hashes = (hashes ^ earlier) * numpy.uint64(0x9E3779B97F4A7C15)
            hashes ^= hashes >> numpy.uint64(29)
        return hashes >> self._bits << self._bits
