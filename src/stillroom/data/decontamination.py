"""Keeps what will be measured out of what is learned: rows that have an evaluation item in them, against every split that will be reported.

Three signs, in this order: the row's prompt is the item's, normalised; the two have 13 words in a row in common (the rule of Brown et al. 2020,
appendix C); the row has at least half of the item's runs of 8 words (as Chowdhery et al. 2022, section 8, with another share). A run of words that
several items have is how such questions are put, and counts for nothing; one that many different rows have counts only where it belongs to most of
an item, so that an instruction used on both sides flags nothing, and an item of which a hundred variants were made is still found.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.data.curation import Drop, Finding, Row, Sifted, sift_each
from stillroom.data.prompts import Prompt
from stillroom.data.words import digest, grams, identity, shortened, words


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationItem:
    """One item of a split that will be reported: its id there, and what a model is asked."""

    split: str
    id: str
    prompt: str

    @property
    def name(self) -> str:
        """How hits are reported: SPLIT/ID."""
        return f"{self.split}/{self.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemHits:
    """How many rows were dropped because they have this item in them; by name, the most first."""

    item: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """By what the items of one split can be found. `items` = `by_overlap` + `by_prompt_alone`: too short, or made of runs that other items have too."""

    split: str
    items: int
    by_overlap: int
    by_prompt_alone: int


@dataclass(frozen=True, kw_only=True)
class Decontamination:
    """Drops rows that have one of `items` in the prompt or in the answer.

    A run of words counts as boilerplate if more than `boilerplate_items` different items have it; it counts only towards `share` if more than
    `boilerplate_rows` rows with different prompts have it. An item of fewer than `short_words` words is found by its whole prompt alone.
    """

    name: ClassVar[str] = "decontamination"
    items: tuple[EvaluationItem, ...] = field(repr=False)
    long_words: int = 13
    short_words: int = 8
    share: float = 0.5
    boilerplate_items: int = 3
    boilerplate_rows: int = 20

    @property
    def settings(self) -> Json:
        """The settings, with how many items there are and one digest over all of them in place of their texts."""
        numbers = ("long_words", "short_words", "share", "boilerplate_items", "boilerplate_rows")
        items = sorted([item.split, item.id, item.prompt] for item in self.items)
        return {name: getattr(self, name) for name in numbers} | {"items": len(items), "items_sha256": sha256_hex(canonical_json(items))}

    def sift(self, rows: Sequence[Row]) -> Sifted:
        index = self._index
        common = self._common_to_rows(rows, index)
        return sift_each(self.name, rows, lambda row: self._judge(row, index, common))

    def coverage(self) -> tuple[Coverage, ...]:
        """For each split, in order of name, how many items can be found by what."""
        splits = Counter(item.split for item in self.items)
        found = Counter(item.split for number, item in enumerate(self.items) if self._index.sizes[number])
        return tuple(
            Coverage(split=split, items=count, by_overlap=found[split], by_prompt_alone=count - found[split])
            for split, count in sorted(splits.items())
        )

    # --- the items ------------------------------------------------------------------------------------------------------------------------

    @cached_property
    def _index(self) -> _Index:
        by_prompt: dict[bytes, list[int]] = defaultdict(list)
        long: dict[bytes, list[int]] = defaultdict(list)
        short: dict[bytes, list[int]] = defaultdict(list)
        first: dict[bytes, int] = {}
        for number, item in enumerate(self.items):
            whole = digest(identity(item.prompt))
            by_prompt[whole].append(number)
            if first.setdefault(whole, number) == number:  # an item that stands in two splits is one when runs are counted
                for holders, length in ((long, self.long_words), (short, self.short_words)):
                    for gram in set(grams(words(item.prompt), length)):
                        holders[digest(gram)].append(number)
        sizes: Counter[int] = Counter()
        for holders in (long, short):
            for gram_digest in [gram for gram, numbers in holders.items() if len(numbers) > self.boilerplate_items]:
                del holders[gram_digest]
        for numbers in short.values():
            sizes.update(numbers)
        twins = {number: tuple(by_prompt[digest(identity(self.items[number].prompt))]) for number in first.values()}
        for number, same in twins.items():
            sizes.update({twin: sizes[number] for twin in same if twin != number})
        return _Index(by_prompt=by_prompt, long=long, short=short, sizes=sizes, twins=twins)

    # --- the rows -------------------------------------------------------------------------------------------------------------------------

    def _common_to_rows(self, rows: Iterable[Row], index: _Index) -> frozenset[bytes]:
        """Runs of an item's words that more than `boilerplate_rows` rows with different prompts have."""
        counts: Counter[bytes] = Counter()
        seen: set[bytes] = set()
        for row in rows:
            prompt = digest(identity(_asked(row.prompt)))
            if prompt in seen:
                continue
            seen.add(prompt)
            counts.update({gram: 1 for _, _, gram in self._runs(row, index)})
        return frozenset(gram for gram, count in counts.items() if count > self.boilerplate_rows)

    def _runs(self, row: Row, index: _Index) -> Iterable[tuple[bool, str, bytes]]:
        """The runs of words of a row that are an item's: whether it is a long one, the run, its digest."""
        for text in (*_texts(row.prompt), row.answer):
            said = words(text)
            for is_long, length, holders in ((True, self.long_words, index.long), (False, self.short_words, index.short)):
                if not holders:
                    continue
                for gram in grams(said, length):
                    if (found := digest(gram)) in holders:
                        yield is_long, gram, found

    def _judge(self, row: Row, index: _Index, common: frozenset[bytes]) -> Finding | None:
        if same := index.by_prompt.get(digest(identity(_asked(row.prompt)))):
            return self._finding("the prompt of", {number: shortened(_asked(row.prompt)) for number in same}, index)
        hit: dict[int, str] = {}
        parts: dict[int, dict[bytes, str]] = defaultdict(dict)
        for is_long, gram, found in self._runs(row, index):
            for number in index.long[found] if is_long else index.short[found]:
                if not is_long:
                    parts[number][found] = gram
                elif found not in common:
                    hit.setdefault(number, shortened(gram, 160))
        if hit:
            return self._finding(f"{self.long_words} words of", hit, index)
        shares = {number: next(iter(runs.values())) for number, runs in parts.items() if len(runs) >= self.share * index.sizes[number]}
        return self._finding(f"{self.share:.0%} or more of the runs of {self.short_words} words of", shares, index) if shares else None

    def _finding(self, what: str, evidence: Mapping[int, str], index: _Index) -> Finding:
        numbers = sorted({twin for number in evidence for twin in index.twins.get(number, (number,))})
        names = tuple(self.items[number].name for number in numbers)
        return Finding(reason="contaminated", evidence=f"{what} {names[0]}: {next(iter(evidence.values()))}", against=names)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """Which items (by their place) have a prompt or a run of words, boilerplate left out; `sizes` counts an item's short runs that are left."""

    by_prompt: Mapping[bytes, list[int]]
    long: Mapping[bytes, list[int]]
    short: Mapping[bytes, list[int]]
    sizes: Counter[int]
    twins: Mapping[int, tuple[int, ...]]


def hits_by_item(dropped: Iterable[Drop]) -> tuple[ItemHits, ...]:
    """How many of the dropped rows have each evaluation item in them, the most often first, then by name."""
    counts = Counter(item for drop in dropped if drop.reason == "contaminated" for item in drop.finding.against)
    return tuple(ItemHits(item=item, rows=rows) for item, rows in sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def _texts(prompt: Prompt) -> tuple[str, ...]:
    return (prompt.text,) if prompt.text is not None else tuple(turn.content for turn in prompt.messages or ())


def _asked(prompt: Prompt) -> str:
    """What is asked: the text, or the last turn of the user."""
    if prompt.text is not None:
        return prompt.text
    turns = prompt.messages or ()
    return next((turn.content for turn in reversed(turns) if turn.role == "user"), turns[-1].content if turns else "")
