"""Finds what is on file by what a person would type: a licence id, a model's name, words of a title or a clause."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stillroom.entitlement.library import Catalogue
from stillroom.entitlement.records import Record, Subject

_MOST_WORDS_OF_A_NAME = 5
_SHORTEST_PART = 3
# Words of a question that name nothing.
_EMPTY = frozenset(
    "a about am an and are can distil distill do does for from i in is it license licence may my of on or say says terms that the their this to under "
    "use was what which who with".split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """`licences` are names that stand for a family, with it; `subjects` models and datasets; `records` have the most of the words, `words` how many."""

    licences: tuple[tuple[str, str], ...]
    subjects: tuple[Subject, ...]
    records: tuple[Record, ...]
    words: tuple[str, ...]
    matched: int

    @property
    def anything(self) -> bool:
        return bool(self.licences or self.subjects or self.records)


def search(query: str, catalogue: Catalogue) -> Found:
    """What answers to `query`, records in the order of their ids."""
    words = _words(query)
    told = [word for word in words if word not in _EMPTY] or words
    names = list(dict.fromkeys([*_runs(told), *_runs(words)]))
    licences = {name: family for name in names if (family := catalogue.licence_family(name)) is not None}
    exact = [entry for name in names if (entry := catalogue.subject(name)) is not None]
    near = [entry for entry in catalogue.subjects if told and all(_in_a_name(word, entry) for word in told)]
    scored = [(sum(word in text for word in told), record) for record in catalogue.records.values() for text in [_text(record)]]
    most = max((score for score, _ in scored), default=0)
    return Found(
        licences=_longest(licences),
        subjects=tuple(dict.fromkeys([*exact, *near])),
        records=tuple(sorted((record for score, record in scored if score == most > 0), key=lambda record: record.id)),
        words=tuple(told),
        matched=most,
    )


def _words(query: str) -> list[str]:
    return [word for part in query.lower().split() if (word := part.strip("?!,;:.\"'()[]`"))]


def _runs(words: list[str]) -> Iterator[str]:
    """Every run of a few words: names have blanks in them."""
    for length in range(min(_MOST_WORDS_OF_A_NAME, len(words)), 0, -1):
        for begin in range(len(words) - length + 1):
            yield " ".join(words[begin : begin + length])


def _longest(licences: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Of names for one family, the longest; the family's own name tells nothing new, and is kept where it is the only one."""
    found: dict[str, str] = {}
    for name, family in sorted(licences.items(), key=lambda pair: -len(pair[0])):
        found.setdefault(family, name)
    return tuple((name, family) for family, name in sorted(found.items()))


def _in_a_name(word: str, entry: Subject) -> bool:
    return len(word) >= _SHORTEST_PART and any(word in name for name in entry.names)


def _text(record: Record) -> str:
    parts = [record.id, record.kind, record.provider, record.title, record.spdx or "", record.notes, *record.flags]
    parts += [*record.applies_to.providers, *record.applies_to.hosts]
    for clause in record.clauses:
        parts += [clause.locator, clause.paraphrase, *clause.actions]
        if clause.duty is not None:
            parts += [clause.duty.kind, clause.duty.text or ""]
    return "\n".join(parts).lower()
