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
from typing import ClassVar, TypeAlias

from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.data.curation import Drop, Finding, Row, Sifted, sift_each
from stillroom.data.prompts import Prompt
from stillroom.data.words import digest, grams, identity, shortened, words

# Whether it is a long run, and its words.
_Run: TypeAlias = tuple[bool, str]


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
        runs = {row.key: found for row in rows if (found := tuple(self._runs(row, index)))}  # of few rows: most have nothing in common with an item
        common = self._common_to_rows(rows, runs)
        return sift_each(self.name, rows, lambda row: self._judge(row, runs.get(row.key, ()), index, common))

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
        long: dict[str, list[int]] = defaultdict(list)
        short: dict[str, list[int]] = defaultdict(list)
        first: dict[bytes, int] = {}
        for number, item in enumerate(self.items):
            whole = digest(identity(item.prompt))
            by_prompt[whole].append(number)
            if first.setdefault(whole, number) == number:  # an item that stands in two splits is one when runs are counted
                for holders, length in ((long, self.long_words), (short, self.short_words)):
                    for gram in set(grams(words(item.prompt), length)):
                        holders[gram].append(number)
        sizes: Counter[int] = Counter()
        for holders in (long, short):
            for gram in [gram for gram, numbers in holders.items() if len(numbers) > self.boilerplate_items]:
                del holders[gram]
        for numbers in short.values():
            sizes.update(numbers)
        twins = {number: tuple(by_prompt[digest(identity(self.items[number].prompt))]) for number in first.values()}
        for number, same in twins.items():
            sizes.update({twin: sizes[number] for twin in same if twin != number})
        return _Index(by_prompt=by_prompt, long=long, short=short, sizes=sizes, twins=twins)

    # --- the rows -------------------------------------------------------------------------------------------------------------------------

    def _runs(self, row: Row, index: _Index) -> Iterable[_Run]:
        """The runs of words of a row that are an item's."""
        for text in (*_texts(row.prompt), row.answer):
            said = words(text)
            for is_long, length, holders in ((True, self.long_words, index.long), (False, self.short_words, index.short)):
                if holders:
                    yield from ((is_long, gram) for gram in grams(said, length) if gram in holders)

    def _common_to_rows(self, rows: Iterable[Row], runs: Mapping[str, Sequence[_Run]]) -> frozenset[_Run]:
        """Runs of an item's words that more than `boilerplate_rows` rows with different prompts have."""
        counts: Counter[_Run] = Counter()
        seen: set[bytes] = set()
        for row in rows:
            if row.key in runs and (prompt := digest(identity(_asked(row.prompt)))) not in seen:
                seen.add(prompt)
                counts.update(set(runs[row.key]))
        return frozenset(run for run, count in counts.items() if count > self.boilerplate_rows)

    def _judge(self, row: Row, runs: Sequence[_Run], index: _Index, common: frozenset[_Run]) -> Finding | None:
        if same := index.by_prompt.get(digest(identity(_asked(row.prompt)))):
            return self._finding("the prompt of", dict.fromkeys(same, shortened(_asked(row.prompt))), index)
        hit: dict[int, str] = {}
        parts: dict[int, set[str]] = defaultdict(set)
        for run in runs:
            is_long, gram = run
            for number in index.long[gram] if is_long else index.short[gram]:
                if not is_long:
                    parts[number].add(gram)
                elif run not in common:
                    hit.setdefault(number, shortened(gram, 160))
        if hit:
            return self._finding(f"{self.long_words} words of", hit, index)
        shares = {number: min(found) for number, found in parts.items() if len(found) >= self.share * index.sizes[number]}
        return self._finding(f"{self.share:.0%} or more of the runs of {self.short_words} words of", shares, index) if shares else None

    def _finding(self, what: str, evidence: Mapping[int, str], index: _Index) -> Finding:
        numbers = sorted({twin for number in evidence for twin in index.twins.get(number, (number,))})
        names = tuple(self.items[number].name for number in numbers)
        return Finding(reason="contaminated", evidence=f"{what} {names[0]}: {next(iter(evidence.values()))}", against=names)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """Which items (by their place) have a prompt or a run of words, boilerplate left out; `sizes` counts an item's short runs that are left."""

    by_prompt: Mapping[bytes, list[int]]
    long: Mapping[str, list[int]]
    short: Mapping[str, list[int]]
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
