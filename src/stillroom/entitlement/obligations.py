"""From what a verdict obliges to what must be there: who brings which duty, which duties cannot be met together, under which licence the student can
be given away, and the exact text that each duty puts in which file. Pure: reads and writes nothing.

The files are those beside the student's weights: README.md (its model card), NOTICE, LICENSE, LICENSES/ and obligations.md. An `Artefact` says what
must be in one of them; the same exact text serves whoever writes the file and whoever checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, TypeAlias, TypeVar

from stillroom.entitlement.facts import Facts
from stillroom.entitlement.library import Catalogue, Source
from stillroom.entitlement.records import DutyKind, Record
from stillroom.entitlement.verdict import Circumstances, Obligation, Use, Verdict, begins_with, judge

README, NOTICE, LICENSE, CHECKLIST = "README.md", "NOTICE", "LICENSE", "obligations.md"

How: TypeAlias = Literal["title", "line", "file", "tick", "never"]
T = TypeVar("T")
ConflictKind: TypeAlias = Literal["name-prefix", "non-commercial", "share-alike", "denied"]

# Licences under which weights may go on under another licence, as long as notices are kept.
_PERMISSIVE = frozenset(
    {"Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "OpenMDW-1.0", "CC0-1.0", "CC-BY-4.0", "CDLA-Permissive-2.0", "ODC-By-1.0"}
)


# --- whose duties -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Owed:
    """One duty of one clause, and every source that brings it. `condition` is what it depends on, where a fact is not known."""

    duty: DutyKind
    record: str
    clause: str
    title: str
    url: str
    says: str
    text: str | None
    flows_to: tuple[str, ...]
    sources: tuple[str, ...]
    condition: str | None = None

    @property
    def family(self) -> str:
        """The instrument, whatever its version."""
        return self.record.partition("@")[0]

    @property
    def cited(self) -> str:
        """The clause as record#clause."""
        return f"{self.record}#{self.clause}"


def verdicts_by_source(sources: Iterable[Source], use: Use, catalogue: Catalogue, circumstances: Circumstances) -> dict[str, Verdict]:
    """The verdict on each source by itself, with what it was made from: its reasons and obligations, whoever else brings the same.

    Whether the student is of an instrument's family is judged among all sources, as in the verdict on all of them.
    """
    sources = tuple(sources)
    everything, _ = catalogue.applying(sources, circumstances.today)
    found = {}
    for name in dict.fromkeys(source.name for source in sources):
        applied, gaps = catalogue.applying([source for source in sources if source.name == name], circumstances.today)
        others = [replace(one, record=_mute(one.record)) for one in everything if one not in applied and one.source.role in ("teacher", "base")]
        verdict = judge((*applied, *others), gaps, use, circumstances, catalogue.house_rules)
        found[name] = replace(verdict, instruments=tuple(sorted({f"{one.record.id} {one.record.sha256}" for one in applied})))
    return found


def _mute(record: Record) -> Record:
    """A record that is there, so that its family is known, and says nothing: of a policy nothing is needed."""
    return record.model_copy(update={"kind": "policy", "clauses": ()})


def union(obligations: Mapping[str, Iterable[Obligation]], used: Iterable[str]) -> tuple[Owed, ...]:
    """The duties of the sources in `used`, each once, with every source that brings it. What no record of reached the weights obliges to nothing.

    `obligations` has those of each source by its name. The order is that of kind, record and clause, whatever the order of sources.
    """
    found: dict[tuple[str, ...], Owed] = {}
    for name in sorted(set(used)):
        for one in obligations.get(name, ()):
            key = (one.duty, one.record, one.clause, one.says)
            before = found.get(key)
            origin = name if one.source == name else f"{one.source} (through {name})"
            found[key] = Owed(
                duty=one.duty,
                record=one.record,
                clause=one.clause,
                title=one.title,
                url=one.url,
                says=one.says,
                text=one.text,
                flows_to=one.flows_to,
                sources=(origin,) if before is None else tuple(dict.fromkeys((*before.sources, origin))),
                condition=one.condition if before is None else _either(before.condition, one.condition),
            )
    return tuple(found[key] for key in sorted(found))


def _either(one: str | None, other: str | None) -> str | None:
    if one is None or other is None:
        return None
    return one if one == other else f"{one}, or {other}"


# --- conflicts --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Duties that cannot be met together. `clashes` are the sets of sources that cannot stand together."""

    kind: ConflictKind
    says: str
    clashes: tuple[frozenset[str], ...]

    @property
    def drop(self) -> tuple[tuple[str, ...], ...]:
        """Every smallest set of sources without which the conflict is gone."""
        return smallest_drops(self.clashes)


def conflicts(verdicts: Mapping[str, Verdict], facts: Facts) -> tuple[Conflict, ...]:
    """Every conflict between sources, given the verdict on each (see `verdicts_by_source`) and the facts.

    Two name prefixes; a non-commercial duty with a commercial intent; share-alike with another share-alike, with restrictions to pass on or with a
    non-commercial duty of another instrument; and what a source's own terms deny already, which dropping others does not mend.
    """
    duties = {name: verdict.obligations for name, verdict in verdicts.items()}
    found = (_denials(verdicts), _prefixes(duties), _commercial(duties, facts), _share_alike(duties))
    return tuple(conflict for conflict in found if conflict is not None)


def smallest_drops(clashes: Iterable[frozenset[str]]) -> tuple[tuple[str, ...], ...]:
    """Every smallest set of sources that has at least one of each clash, found by trying all of a size before the next. Empty without a clash."""
    clashes = set(clashes)
    if not clashes:
        return ()
    # A source that clashes by itself must go whatever else does.
    forced = frozenset(name for clash in clashes if len(clash) == 1 for name in clash)
    rest = [clash for clash in clashes if not clash & forced]
    names = sorted({name for clash in rest for name in clash})
    for size in range(len(names) + 1):
        hitting = [chosen for chosen in combinations(names, size) if all(clash & set(chosen) for clash in rest)]
        if hitting:
            return tuple(tuple(sorted(forced | set(chosen))) for chosen in hitting)
    raise AssertionError("all names together hit every clash")


def _denials(verdicts: Mapping[str, Verdict]) -> Conflict | None:
    denied = {name: verdict.reasons[0] for name, verdict in sorted(verdicts.items()) if verdict.outcome == "deny"}
    if not denied:
        return None
    told = "; ".join(f"{name}: {reason.says} ({reason.cited}; its own terms deny this use already)" for name, reason in denied.items())
    return Conflict(kind="denied", says=told, clashes=tuple(frozenset({name}) for name in denied))


def _prefixes(duties: Mapping[str, Sequence[Obligation]]) -> Conflict | None:
    asked = [(name, one.text or "") for name, owed in sorted(duties.items()) for one in owed if one.duty == "name-prefix"]
    clashes = _pairs(asked, lambda one, other: not (begins_with(one, other) or begins_with(other, one)))
    if not clashes:
        return None
    told = ", ".join(f"{prefix} ({name})" for name, prefix in dict.fromkeys(asked))
    return Conflict(kind="name-prefix", says=f"no name begins with all of these: {told}", clashes=clashes)


def _commercial(duties: Mapping[str, Sequence[Obligation]], facts: Facts) -> Conflict | None:
    names = [name for name, owed in sorted(duties.items()) if any(one.duty == "non-commercial" for one in owed)]
    if not names or facts.get("commercial") is not True:
        return None
    says = f"the use is commercial, and these allow non-commercial use only: {', '.join(names)}"
    return Conflict(kind="non-commercial", says=says, clashes=tuple(frozenset({name}) for name in names))


def _share_alike(duties: Mapping[str, Sequence[Obligation]]) -> Conflict | None:
    kinds = ("share-alike", "flow-down-restrictions", "non-commercial")
    asked = [(name, (one.duty, one.record.partition("@")[0])) for name, owed in sorted(duties.items()) for one in owed if one.duty in kinds]
    clashes = _pairs(asked, lambda one, other: "share-alike" in (one[0], other[0]) and one[1] != other[1])
    if not clashes:
        return None
    told = ", ".join(f"{duty} of {family} ({name})" for name, (duty, family) in dict.fromkeys(asked))
    return Conflict(kind="share-alike", says=f"no one licence meets all of these: {told}", clashes=clashes)


def _pairs(asked: Sequence[tuple[str, T]], clash: Callable[[T, T], bool]) -> tuple[frozenset[str], ...]:
    """The pairs of sources (or single ones) of which something clashes, each once and in order."""
    found = {frozenset({one, other}) for (one, first), (other, second) in combinations(asked, 2) if clash(first, second)}
    return tuple(sorted(found, key=sorted))


# --- the student's licence --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A licence that was not proposed, and why."""

    licence: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LicenceProposal:
    """The most permissive licence that meets every duty. It is a proposal: whoever publishes decides.

    `family` and `url` name its text, None where no licence can be given; `record` where it is a record's own. `restrictions` are the duties whose use restrictions it passes on. `data` is
    the licence proposed for the transfer set, where the intent is to publish that too.
    """

    licence: str
    why: str
    rejected: tuple[Rejected, ...]
    family: str | None = None
    url: str | None = None
    record: str | None = None
    restrictions: tuple[Owed, ...] = ()
    data: str | None = None

    @property
    def copied(self) -> bool:
        """Whether LICENSE refers to a copy of the text in LICENSES, below terms of its own; else LICENSE is the text itself, which we have."""
        return self.licence not in ("Apache-2.0", "MIT")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """`against` is why it will not do; None where it will."""

    licence: str
    against: str | None
    why: str = ""
    family: str | None = None
    url: str | None = None
    record: str | None = None
    restricts: bool = False


def propose_licence(duties: Sequence[Owed], facts: Facts, derived_from: Iterable[Record] = ()) -> LicenceProposal:
    """The student's licence: the first, from most to least permissive, that meets all duties; and why not each other.

    `derived_from` are licences of weights that the student derives from (it starts from them, or learned from their logits or hidden states): one that
    is not permissive stays with it.
    """
    candidates = _Candidates(duties, derived_from).all()
    chosen = next(one for one in candidates if one.against is None)
    return LicenceProposal(
        licence=chosen.licence,
        why=chosen.why,
        rejected=tuple(Rejected(licence=one.licence, why=one.against or _passed_over(one, chosen)) for one in candidates if one is not chosen),
        family=chosen.family,
        url=chosen.url,
        record=chosen.record,
        restrictions=tuple(one for one in duties if one.duty == "flow-down-restrictions") if chosen.restricts else (),
        data=_DATA if facts.get("publish_dataset") is True and not any(_binds_data(one) for one in duties) else None,
    )


_DATA = "CDLA-Permissive-2.0"


@dataclass(frozen=True, slots=True)
class _Tie:
    """An instrument that the student must be under, and why."""

    record: str
    title: str
    url: str
    why: str


class _Candidates:
    """Licences from most to least permissive, each held against the duties."""

    def __init__(self, duties: Sequence[Owed], derived_from: Iterable[Record]) -> None:
        self.closed = _of_kind(duties, "no-distribution")
        self.non_commercial = _of_kind(duties, "non-commercial")
        self.flow_down = _of_kind(duties, "flow-down-restrictions")
        self.tied: dict[str, _Tie] = {}
        for one in derived_from:
            if one.spdx not in _PERMISSIVE:
                self.tied[one.family] = _Tie(one.id, one.title, one.url, f"the student derives from weights under {one.title}, and stays under it")
        self.bound = frozenset(self.tied)
        for duty in _of_kind(duties, "share-alike"):
            self._tie(duty, f"{duty.title} asks for the same licence ({duty.cited})")
        if self.non_commercial and self.flow_down and not self.tied:
            # CC-BY-NC-4.0 takes no further restrictions; the instrument that asks for both is a licence with both.
            for duty in self.non_commercial:
                self._tie(duty, f"{duty.title} allows non-commercial use only, and restrictions are to be passed on")

    def _tie(self, duty: Owed, why: str) -> None:
        self.tied.setdefault(duty.family, _Tie(duty.record, duty.title, duty.url, why))

    def all(self) -> list[_Candidate]:
        """In order; the last always will do."""
        hindrance = self._closed() or self._commercial() or self._other_than(None)
        found = [
            _Candidate(
                licence="Apache-2.0",
                family="apache-2.0",
                url="https://www.apache.org/licenses/LICENSE-2.0",
                against=hindrance or self._unrestricted(),
                why="no duty asks for more than notices, names and copies",
            ),
            _Candidate(licence="MIT", family="mit", url="https://opensource.org/license/mit", against=hindrance or self._unrestricted()),
            _Candidate(licence=_DATA, against="it is a licence for data, and the student is weights"),
            _Candidate(
                licence="Apache-2.0 with use restrictions",
                family="apache-2.0",
                url="https://www.apache.org/licenses/LICENSE-2.0",
                against=hindrance or (None if self.flow_down else "it passes on restrictions, and no duty asks for any"),
                why="the use restrictions of {} are to be passed on, and nothing else is asked of the licence".format(
                    ", ".join(dict.fromkeys(one.title for one in self.flow_down))
                ),
                restricts=True,
            ),
            *self._own(),
            _Candidate(
                licence="CC-BY-NC-4.0",
                family="cc-by-nc-4.0",
                url="https://creativecommons.org/licenses/by-nc/4.0/legalcode",
                against=self._closed()
                or (None if self.non_commercial else "it forbids commercial use, and no duty asks for that")
                or self._other_than("cc-by-nc-4.0")
                or ("it takes no use restrictions beside its own" if self.flow_down else None),
                why=f"{', '.join(dict.fromkeys(one.title for one in self.non_commercial))}: non-commercial use only",
            ),
            _Candidate(licence="no licence (it stays inside)", against=None, why="no licence above meets every duty"),
        ]
        return found

    def _own(self) -> Iterator[_Candidate]:
        if not self.tied:
            yield _Candidate(licence="the teacher's own licence", against="no duty ties the student to it")
        for family, tie in self.tied.items():
            others = [one for one in self.flow_down if one.family != family]
            stranger = next((one for one in self.non_commercial if one.family != family), None)
            against = self._closed() or self._other_than(family)
            if against is None and stranger is not None:
                against = f"it does not hold users to non-commercial use, as {stranger.title} asks ({stranger.cited})"
            if against is None and others and family not in self.bound:
                against = f"it has no place for the restrictions of {others[0].title} ({others[0].cited})"
            licence = f"{tie.title} with use restrictions" if others else tie.title
            yield _Candidate(licence=licence, family=family, url=tie.url, record=tie.record, against=against, why=tie.why, restricts=bool(others))

    def _closed(self) -> str | None:
        return next((f"{one.title} lets the student be given to nobody ({one.cited})" for one in self.closed), None)

    def _commercial(self) -> str | None:
        return next((f"it allows commercial use, and {one.title} does not ({one.cited})" for one in self.non_commercial), None)

    def _unrestricted(self) -> str | None:
        return next((f"it passes on no use restrictions, as {one.title} asks ({one.cited})" for one in self.flow_down), None)

    def _other_than(self, family: str | None) -> str | None:
        """Why the student must be under another instrument than `family`."""
        return next((tie.why for tied, tie in self.tied.items() if tied != family), None)


def _of_kind(duties: Sequence[Owed], kind: DutyKind) -> list[Owed]:
    return [one for one in duties if one.duty == kind]


def _passed_over(one: _Candidate, chosen: _Candidate) -> str:
    if one.licence == "MIT" and chosen.licence == "Apache-2.0":
        return "it would do as well; Apache-2.0 comes first because it also grants patents"
    return f"it allows less than {chosen.licence}, which meets every duty"


def _binds_data(one: Owed) -> bool:
    closing = one.duty in ("no-distribution", "non-commercial", "share-alike", "flow-down-restrictions")
    return closing or ("dataset" in one.flows_to and one.duty not in ("exclude-data", "other"))


# --- what must be there -----------------------------------------------------------------------------------------------------------------


_IN_THE_CARD = "the section “Licence and terms”"
_BEFORE_THE_TEXT = "the terms before the licence's text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """What a duty puts in one file, and how it is held to it.

    `how` is one of

    title  the title of the file (its first heading) begins with `text`
    line   `text` stands in the file, in lines of its own
    file   the file is there and has something in it; `text` says what
    tick   a person has ticked the line `text`
    never  nothing can meet it; `text` says why
    """

    duty: DutyKind
    file: str
    how: How
    text: str
    where: str

    def present(self, files: Mapping[str, str]) -> bool:
        """Whether it is in `files`: the content of each by its path below the student's directory."""
        content = files.get(self.file, "")
        match self.how:
            case "title":
                return begins_with(title_of(content), self.text)
            case "line":
                return f"\n{self.text}\n" in f"\n{content}\n"
            case "file":
                return bool(content.strip()) and not is_template(content)
            case "tick":
                return self.text in ticked(content)
            case "never":
                return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A line of the account: a duty (or a conflict) with its artefacts, whether it is met, and what to do where it is not."""

    what: str
    met: bool
    do: str = ""
    owed: Owed | None = None
    artefacts: tuple[tuple[Artefact, bool], ...] = ()


def artefacts(duty: Owed, *, hosted: bool) -> tuple[Artefact, ...]:
    """The artefacts of one duty. `hosted`: the student is offered as a service, and what that must show no file of ours can show for it."""
    if set(duty.flows_to) <= {"dataset"} and duty.duty != "exclude-data":
        return (_tick(duty, f"The transfer set, where it is published, carries {duty.duty}: {duty.text or duty.says}"),)
    match duty.duty:
        case "name-prefix":
            return (_put(duty, README, "title", "the title: the student's name"),)
        case "display":
            shown = _put(duty, README, "line", "the section “To be shown”")
            return (shown, _tick(duty, f"The service shows: {text_of(duty)}")) if hosted and "service" in duty.flows_to else (shown,)
        case "notice-file" | "change-notice":
            return (_put(duty, NOTICE, "line", "a paragraph"),)
        case "licence-copy":
            return (_put(duty, licence_file(duty.family), "file", "the whole file"),)
        case "flow-down-restrictions" | "share-alike":
            return (_put(duty, LICENSE, "line", _BEFORE_THE_TEXT),)
        case "attribution":
            return (_put(duty, README, "line", _IN_THE_CARD), _put(duty, NOTICE, "line", "a paragraph"))
        case "non-commercial":
            return (_put(duty, LICENSE, "line", _BEFORE_THE_TEXT), _put(duty, README, "line", _IN_THE_CARD))
        case "policy":
            return (_put(duty, README, "line", _IN_THE_CARD),)
        case "no-distribution":
            return (_put(duty, README, "never", "nowhere: the student may not be published"),)
        case "exclude-data" | "other":
            return (_tick(duty, (duty.text or duty.says).strip().removesuffix(".")),)


def text_of(duty: Owed) -> str:
    """The exact text that a duty puts into a file: what the instrument asks for word by word, else our own words."""
    sources = ", ".join(duty.sources)
    match duty.duty:
        case "flow-down-restrictions":
            return (
                f"The use restrictions of {duty.title} ({duty.url}) are part of this licence. Whoever uses, changes or passes on this model is held to "
                "them, and passes them on with it."
            )
        case "share-alike":
            return f"This model is under the same licence as {sources}: {duty.title}, {duty.url}"
        case "non-commercial":
            return f"For non-commercial use only, as {duty.title} asks: {duty.url}"
        case "change-notice":
            return f"This model is not {sources}: it was made from that, and all of its weights were changed or trained anew by distillation with Stillroom."
        case "licence-copy":
            return f"the text of {duty.title}"
        case "no-distribution":
            return f"{duty.title} lets the student be given to nobody"
        case "policy":
            return f"Whoever uses this model keeps to {duty.title}: {duty.url}"
        case _:
            return (duty.text or f"Made with {sources}, under {duty.title}: {duty.url}").strip()


def account(
    duties: Sequence[Owed], found: Sequence[Conflict], proposal: LicenceProposal, files: Mapping[str, str], *, hosted: bool
) -> tuple[Item, ...]:
    """Every conflict and every duty, each held to the files that are there. What is unmet comes with what to do."""
    clashing = [
        Item(what=f"conflict ({conflict.kind}): {conflict.says}", met=False, do=f"Leave out {_choices(conflict.drop)}, and run again without it.")
        for conflict in found
    ]
    owed = [_item(duty, [(artefact, artefact.present(files)) for artefact in artefacts(duty, hosted=hosted)]) for duty in duties]
    # Where conflicts or a ban on giving the student away stand in the way of a licence, they are items of their own and say more.
    explained = proposal.family is None and (clashing or any(duty.duty == "no-distribution" for duty in duties))
    licence = () if explained else (_licence_item(proposal, duties, files),)
    return (*clashing, *licence, *owed)


def licence_file(family: str) -> str:
    """Where the copy of an instrument's text is."""
    return f"LICENSES/{family}.txt"


def is_template(text: str) -> bool:
    """Whether a licence's text lacks the copyright line of what it came with."""
    return "<copyright holders>" in text


def title_of(markdown: str) -> str:
    """The first heading of a page; empty where it has none."""
    body = markdown.split("\n---\n", 1)[1] if markdown.startswith("---\n") and "\n---\n" in markdown else markdown
    return next((line[2:].strip() for line in body.splitlines() if line.startswith("# ")), "")


def ticked(checklist: str) -> frozenset[str]:
    """The lines of a checklist that somebody has ticked."""
    return frozenset(line[6:].strip() for line in checklist.splitlines() if line.startswith(("- [x] ", "- [X] ")))


def _put(duty: Owed, file: str, how: How, where: str) -> Artefact:
    return Artefact(duty=duty.duty, file=file, how=how, text=text_of(duty), where=where)


def _tick(duty: Owed, says: str) -> Artefact:
    text = " ".join(f"{says} ({duty.title}, {duty.cited}; {', '.join(duty.sources)})".split())
    return Artefact(duty=duty.duty, file=CHECKLIST, how="tick", text=text, where="the list to be ticked by a person")


def _item(duty: Owed, held: Sequence[tuple[Artefact, bool]]) -> Item:
    missing = [artefact for artefact, there in held if not there]
    steps = [_step(duty, artefact) for artefact in missing]
    if missing and duty.condition is not None:
        steps.append(f"It holds only if {duty.condition}: state that fact in `intent` if it does not.")
    exact = f" [{duty.text.strip()}]" if duty.text else ""
    return Item(
        what=f"{duty.duty}{exact} of {duty.title} ({duty.cited}) for {', '.join(duty.sources)}",
        met=not missing,
        do=" ".join(steps),
        owed=duty,
        artefacts=tuple(held),
    )


def _step(duty: Owed, artefact: Artefact) -> str:
    match artefact.how:
        case "title":
            return (
                f"Give the student a name that begins with {artefact.text!r}: intent.student_name, in a copy of the run's recipe.json "
                "(stillroom publish DIR --recipe FILE)."
            )
        case "line":
            return f"Publish again: {artefact.file} lacks its text."
        case "file":
            return _supply(duty.url, duty.record, artefact.file)
        case "tick":
            return f"See to it, then tick it (- [x]) in student/{artefact.file} and publish again."
        case "never":
            return f"{artefact.text}: keep it inside, or run again without {', '.join(duty.sources)}."


def _licence_item(proposal: LicenceProposal, duties: Sequence[Owed], files: Mapping[str, str]) -> Item:
    if proposal.family is None:
        reasons = "; ".join(f"{one.licence}: {one.why}" for one in proposal.rejected)
        return Item(what=f"licence: none meets every duty ({reasons})", met=False, do="Leave out a source that stands in the way, and run again.")
    if not files.get(LICENSE, "").strip():
        return Item(what=f"licence: {proposal.licence}", met=False, do=f"Publish again: {LICENSE} is not there.")
    copy = licence_file(proposal.family)
    owed = any(duty.duty == "licence-copy" and duty.family == proposal.family for duty in duties)  # then it is an item of its own
    if proposal.copied and not owed and not files.get(copy, "").strip():
        do = _supply(str(proposal.url), proposal.record, copy)
        return Item(what=f"licence: {proposal.licence}, of which there is no text", met=False, do=do)
    return Item(what=f"licence: {proposal.licence}", met=True)


def _supply(url: str, record: str | None, file: str) -> str:
    confirm = f" and confirm it (stillroom terms confirm {record} --file TEXT), or put it" if record is not None else " and put it"
    return f"Get the text, as it came with the weights or from {url},{confirm} at student/{file}; then publish again."


def _choices(drops: Sequence[Sequence[str]]) -> str:
    return " or ".join(" and ".join(names) for names in drops)
