"""The catalogue: every record, model and alias there is, ours and the user's, and which of them apply to a source.

Named for where records are kept together; the files themselves are in catalogue/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

from stillroom.core.errors import EntitlementError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.entitlement.reading import read_terms
from stillroom.entitlement.records import Alias, CatalogueFile, Evidence, HouseRule, Record, Subject

# The day on which the notes that the catalogue was written from were last checked, and what users pin.
CATALOGUE_DATE = date(2026, 11, 24)
CATALOGUE_FOLDER = Path(__file__).parent / "catalogue"

Role: TypeAlias = Literal["teacher", "base", "dataset", "ancestor"]

# Where a licence is stated that no card declares.
_SAID_IN: dict[Role, str] = {
    "teacher": "Say so in the recipe's `terms.licence`.",
    "base": "Say so in the recipe's `terms.base_licence`.",
    "dataset": "Say so in the recipe's `terms.datasets`.",
    "ancestor": "Add an entry under `models`: stillroom terms add FILE",
}

# What a model card says when it does not say: "other" stands for terms that the hub has no id for.
_UNTOLD = frozenset({"", "other", "unknown", "none", "n-a"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Something that is learned from or built on.

    `access` is how it is reached: weights, api:PROVIDER, host:NAME, consumer:PROVIDER, dataset. `licence` is what it is said to be under, and
    `declared_by` who says so ("its model card", "the recipe"). `generated_on` is the day of its outputs; None: today.
    """

    name: str
    access: str
    role: Role = "teacher"
    licence: str | None = None
    declared_by: str = ""
    generated_on: date | None = None

    @property
    def way(self) -> str:
        return self.access.partition(":")[0]

    @property
    def through(self) -> str:
        """The provider or host."""
        return self.access.partition(":")[2].lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A record that applies to a source, and why. `limit` is the evidence for that, where it is weaker than a declaration."""

    record: Record
    source: Source
    why: str
    limit: Evidence | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """An instrument that should apply and is not on file, or one of two that contradict each other: the question asks what would close it."""

    source: Source
    found: str
    question: str
    asks: Literal["licence", "host", "service", "dataset"]


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """All that is on file. `own` are ids of records that the user added or put in place of ours."""

    records: Mapping[str, Record]
    subjects: tuple[Subject, ...]
    aliases: Mapping[str, str]
    house_rules: tuple[HouseRule, ...]
    own: frozenset[str] = frozenset()

    @classmethod
    def of(cls, files: Iterable[CatalogueFile]) -> Catalogue:
        """The catalogue of some files. Raises EntitlementError 'terms-invalid' where two records have one id, or one incorporates what is not there."""
        records: dict[str, Record] = {}
        subjects: list[Subject] = []
        aliases: dict[str, str] = {}
        rules: list[HouseRule] = []
        for file in files:
            for record in file.records:
                if record.id in records:
                    raise _invalid(f"two records with the id {record.id}")
                records[record.id] = record
            subjects += file.models
            rules += file.house_rules
            for alias in file.aliases:
                for name in alias.names:
                    if aliases.setdefault(written(name), alias.family) != alias.family:
                        raise _invalid(f"the licence id {name!r} stands for both {aliases[written(name)]} and {alias.family}")
        catalogue = cls(records=records, subjects=tuple(subjects), aliases=aliases, house_rules=tuple(rules))
        catalogue._check_references()
        return catalogue

    def overlaid(self, files: Iterable[CatalogueFile]) -> Catalogue:
        """This catalogue with a user's records: a record with the id of ours takes its place; models and aliases are looked up before ours."""
        files = tuple(files)
        records = dict(self.records)
        aliases = dict(self.aliases)
        for file in files:
            records |= {record.id: record for record in file.records}
            aliases |= {written(name): alias.family for alias in file.aliases for name in alias.names}
        catalogue = replace(
            self,
            records=records,
            aliases=aliases,
            subjects=(*(subject for file in files for subject in file.models), *self.subjects),
            house_rules=(*self.house_rules, *(rule for file in files for rule in file.house_rules)),
            own=frozenset(record.id for file in files for record in file.records),
        )
        catalogue._check_references()
        return catalogue

    @cached_property
    def sha256(self) -> str:
        """Digest of everything on file."""
        return sha256_hex(canonical_json({name: record.sha256 for name, record in sorted(self.records.items())}))

    def versions(self, family: str) -> list[Record]:
        """Every version of an instrument, the oldest first."""
        return sorted((record for record in self.records.values() if record.family == family), key=lambda record: record.effective)

    def in_force(self, family: str, day: date) -> list[Record]:
        """The versions that were in force on a day; several where they are for different people (`variant`)."""
        found = [r for r in self.versions(family) if r.effective <= day and (r.superseded is None or day < r.superseded)]
        latest = {record.variant: record for record in found}
        return list(latest.values())

    def licence_family(self, name: str | None) -> str | None:
        """The family that a licence id or a common spelling stands for; None where it does not tell."""
        if name is None:
            return None
        text = written(name)
        if text in _UNTOLD:
            return None
        shorter = text.removesuffix("-agreement").removesuffix("-license").removesuffix("-licence")
        families = {record.family for record in self.records.values()}
        for candidate in (text, shorter):
            if candidate in self.aliases:
                return self.aliases[candidate]
            if candidate in families:
                return candidate
        return None

    def subject(self, name: str) -> Subject | None:
        """What is known of a model or dataset: the entry whose matching name is the most specific."""
        lower = name.lower()
        found = [(len(pattern), -at, entry) for at, entry in enumerate(self.subjects) for pattern in entry.names if matches(lower, pattern)]
        return max(found, key=lambda one: one[:2])[2] if found else None

    # --- what applies -----------------------------------------------------------------------------------------------------------------

    def applying(self, sources: Iterable[Source], today: date) -> tuple[tuple[Applied, ...], tuple[Gap, ...]]:
        """Every record that applies to these sources, to what they were made from, and to what those incorporate; and what is not on file.

        Where a text changed between the day of generation and today, both versions apply.
        """
        applied: dict[tuple[str, Source], Applied] = {}
        gaps: set[Gap] = set()
        waiting, seen = list(sources), set()
        while waiting:
            source = waiting.pop(0)
            if source in seen:
                continue
            seen.add(source)
            for found in self._of_source(source, today):
                if isinstance(found, Gap):
                    gaps.add(found)
                elif (key := (found.record.id, source)) not in applied or applied[key].limit is not None:
                    # Of two ways to apply, the better founded one.
                    applied[key] = found
            waiting += self._ancestors(source)
        ordered = sorted(applied.values(), key=lambda one: (one.source.role, one.source.name, one.record.id, repr(one.source)))
        return tuple(ordered), tuple(sorted(gaps, key=lambda gap: (gap.source.name, gap.asks, gap.found, repr(gap.source))))

    def _of_source(self, source: Source, today: date) -> Iterator[Applied | Gap]:
        direct: list[tuple[str, str, Evidence | None]] = []
        match source.way:
            case "weights" | "dataset":
                yield from self._under_licence(source, direct)
            case "host":
                yield from self._under_licence(source, direct)
                hosts = self._families(source)
                if not hosts:
                    question = (
                        f"What do the terms of the host {source.through!r} say about training on outputs? Add a record: stillroom terms add FILE"
                    )
                    yield Gap(source=source, found=f"no terms of a host named {source.through!r} are on file", question=question, asks="host")
                direct += [(family, f"{source.through} hosts it", None) for family in hosts]
                direct += [(family, f"{self._provider(source)} makes it, whoever serves it", None) for family in self._policies(source)]
            case "api" | "consumer":
                maker = self._provider(source)
                if maker is not None and maker != source.through:
                    question = f"Who serves {source.name}? It is known as {maker}'s: write terms.access api:{maker}, or host:NAME for somebody else's servers"
                    yield Gap(
                        source=source,
                        found=f"{source.name} is known as {maker}'s, and is said to be reached through {source.access}",
                        question=question,
                        asks="service",
                    )
                services = self._families(source)
                if not services:
                    question = f"What do {source.through!r}'s terms say about training on outputs? Add a record: stillroom terms add FILE"
                    yield Gap(
                        source=source, found=f"no terms of {source.through!r} for {source.access} are on file", question=question, asks="service"
                    )
                direct += [(family, f"it is reached through {source.access}", None) for family in services]
        yield from self._with_incorporated(source, direct, today)

    def _under_licence(self, source: Source, direct: list[tuple[str, str, Evidence | None]]) -> Iterator[Gap]:
        """The weights' (or rows') own instruments: what is declared and what the catalogue knows must not contradict each other."""
        entry = self.subject(source.name)
        known = entry.instruments if entry is not None else ()
        declared = self.licence_family(source.licence)
        what: Literal["dataset", "licence"] = "dataset" if source.way == "dataset" else "licence"
        if declared is not None:
            direct.append((declared, f"{source.declared_by or 'its declaration'} says {source.licence}", None))
            if known and declared not in known:
                question = f"Is {source.name} under {declared}, as {source.declared_by or 'it'} says, or under {', '.join(known)}, as is on file?"
                yield Gap(
                    source=source,
                    found=f"{source.name} is declared to be under {declared} and known as under {', '.join(known)}",
                    question=question,
                    asks="licence",
                )
        elif source.licence is not None and written(source.licence) not in _UNTOLD:
            question = f"What does {source.licence!r} say about training on outputs? Add a record: stillroom terms add FILE"
            yield Gap(source=source, found=f"no record of {source.licence!r} is on file", question=question, asks="licence")
        for family in known:
            if family != declared:
                assert entry is not None
                direct.append((family, f"{source.name} is known to come under it ({entry.evidence.source})", entry.evidence))
        if not direct and source.way == "host" and source.licence is None and self._policies(source):
            return  # a closed model that somebody else serves, whose maker's policies reach whoever uses it
        licences = [family for family, _, _ in direct if any(record.kind != "policy" for record in self.versions(family))]
        unheard = declared is None and source.licence is not None and written(source.licence) not in _UNTOLD  # asked about above
        if not licences and not unheard:
            question = f"Under which licence is {source.name}? {_SAID_IN[source.role]}"
            yield Gap(source=source, found=f"nothing says under which licence {source.name} is", question=question, asks=what)

    def _with_incorporated(self, source: Source, direct: list[tuple[str, str, Evidence | None]], today: date) -> Iterator[Applied | Gap]:
        waiting, seen = list(direct), set()
        while waiting:
            family, why, limit = waiting.pop(0)
            if family in seen:
                continue
            seen.add(family)
            records: dict[str, Record] = {}
            for day in sorted({source.generated_on or today, today}):
                in_force = self.in_force(family, day)
                records |= {record.id: record for record in in_force}
                if not in_force:
                    question = f"Which version of {family} was in force on {day}? Add its record: stillroom terms add FILE"
                    yield Gap(source=source, found=f"no version of {family} that was in force on {day} is on file", question=question, asks="licence")
            for record in records.values():
                yield Applied(record=record, source=source, why=why, limit=limit)
                waiting += [(name, f"{record.id} makes it part of itself", limit) for name in record.incorporates]

    def _families(self, source: Source) -> list[str]:
        """Terms of the service or host that a source is reached through."""
        way, through, provider = source.way, source.through, self._provider(source)
        found = set()
        for record in self.records.values():
            covers = record.applies_to
            wanted = record.kind == ("host-terms" if way == "host" else "service-terms") and way in covers.access
            if not wanted:
                continue
            if way != "host" and through in covers.providers:
                found.add(record.family)
            # Terms of a host may be for the models of some providers alone.
            if way == "host" and through in covers.hosts and (not covers.providers or provider in covers.providers):
                found.add(record.family)
        return sorted(found)

    def _policies(self, source: Source) -> list[str]:
        """Policies of a model's maker that reach whoever uses it through any host."""
        provider = self._provider(source)
        return sorted(
            {
                record.family
                for record in self.records.values()
                if record.kind == "policy"
                and "host" in record.applies_to.access
                and "*" in record.applies_to.hosts
                and provider in record.applies_to.providers
            }
        )

    def _provider(self, source: Source) -> str | None:
        entry = self.subject(source.name)
        return entry.provider.lower() if entry is not None else None

    def _ancestors(self, source: Source) -> list[Source]:
        entry = self.subject(source.name)
        if entry is None or source.way in ("api", "consumer"):
            return []
        found = []
        for name in entry.made_from:
            known = self.subject(name)
            access = "dataset" if known is not None and known.what == "dataset" else "weights"
            if known is not None and known.what == "model" and not known.instruments:
                access = f"api:{known.provider.lower()}"
            found.append(Source(name=name, access=access, role="ancestor", generated_on=source.generated_on))
        return found

    def _check_references(self) -> None:
        families = {record.family for record in self.records.values()}
        named = references(self.records.values(), self.subjects, [Alias(family=family, names=(name,)) for name, family in self.aliases.items()])
        for who, family in named:
            if family not in families:
                raise _invalid(f"{who} names {family}, of which there is no record")


def references(records: Iterable[Record], subjects: Iterable[Subject], aliases: Iterable[Alias]) -> Iterator[tuple[str, str]]:
    """(who, family) of each family that a record, a model or an alias names: there must be a record of it."""
    yield from ((record.id, family) for record in records for family in record.incorporates)
    yield from ((subject.names[0], family) for subject in subjects for family in subject.instruments)
    yield from ((alias.names[0], alias.family) for alias in aliases)


@lru_cache(maxsize=1)
def builtin() -> Catalogue:
    """The catalogue that comes with Stillroom."""
    return Catalogue.of(read_terms(path) for path in sorted(CATALOGUE_FOLDER.glob("*.yaml")))


def matches(name: str, pattern: str) -> bool:
    """Whether a name is what a pattern says, in which * stands for any characters. Many patterns are tried once each: no time to compile them."""
    first, *others = pattern.split("*")
    if not others:
        return name == pattern
    if not name.startswith(first):
        return False
    at = len(first)
    for part in others[:-1]:
        found = name.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return len(name) - at >= len(others[-1]) and name.endswith(others[-1])


def written(name: str) -> str:
    """One spelling for names that differ in case, blanks, underscores, slashes."""
    return "-".join(name.lower().replace("_", " ").replace(",", " ").replace("-", " ").replace("/", " ").split())


def _invalid(found: str) -> EntitlementError:
    return EntitlementError(
        "terms-invalid", found=found, expected="records that fit together", do="Mend the file; `stillroom terms validate FILE` tells more."
    )
