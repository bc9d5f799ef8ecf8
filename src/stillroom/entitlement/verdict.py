"""May one learn from this teacher? An answer with reasons: yes, yes with obligations, no, or the one question that would settle it.

Every instrument that applies is asked; a denial stands whatever else is unknown, and what nobody has stated or read is never taken for consent:

- A clause bears on a use when the use includes one of its actions and its condition holds. `prohibit` denies. Of each instrument but a policy, the core
  actions of the use need a `permit`, or a `silent` that says that the text does not speak of them.
- Only evidence that holds up lets something be allowed: the text was read (P1) and is fixed or confirmed by the user, or it was read in part (P2) and
  confirmed; never past its review date. A description (S) can deny, a memory (M) can only make unknown.
- A missing fact makes the answer unknown only if some value of it would change the answer.
- Only an authorisation that is attached, in scope, in date, and whose document has the stated digest, lifts a prohibition.

This is not legal advice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from itertools import product
from typing import Literal, TypeAlias

from stillroom.core.errors import EntitlementDenied, EntitlementUnknown
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.entitlement.facts import (
    FACTS,
    NEVER,
    Condition,
    Facts,
    FactValue,
    describe_condition,
    domain,
    facts_of,
    holds,
    left_open,
    phrase,
    settled,
    with_meanings,
)
from stillroom.entitlement.library import CATALOGUE_DATE, Applied, Catalogue, Gap, Source, matches
from stillroom.entitlement.records import GRADES, Action, Authorisation, Clause, DutyKind, Grade, HouseRule

Outcome: TypeAlias = Literal["allow", "allow-with-obligations", "deny", "unknown"]
Standing: TypeAlias = Literal[
    "prohibits",
    "permits",
    "is silent",
    "may prohibit",
    "not on file",
    "not covered",
    "not confirmed",
    "stale",
    "other text",
    "not founded",
    "authorised",
]

_RANK: dict[Grade, int] = {"P1": 0, "P2": 1, "S": 2, "M": 3}
# When each action is part of a use.
_ACTIONS: dict[Action, Condition] = {
    "generate-for-training": {"purpose": "train"},
    "train-on-output": {"purpose": "train"},
    "train-competing": {"purpose": "train", "competes": True},
    "use-logits": {"purpose": "train", "method": ["logprobs", "logits", "hidden"]},
    "init-from-weights": {"purpose": "train", "method": "weights"},
    "publish-dataset": {"publish_dataset": True},
    "distribute-student": {"purpose": "train", "release": "weights"},
    "serve-student": {"purpose": "train", "release": "hosted"},
    "commercial-use": {"commercial": True},
    "evaluate-only": {"purpose": "evaluate"},
}
_MOST_COMPLETIONS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """A user has read the text of a record: its digest, who, when, and until when that holds."""

    record: str
    text_sha256: str
    confirmed_by: str
    confirmed_on: date
    review_by: date


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """An authorisation with the digest of the document that was found beside it; None where there was none."""

    authorisation: Authorisation
    found_sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assertion:
    """Who states a fact that no instrument defines, and why."""

    fact: str
    value: bool
    asserted_by: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What is intended: the facts that are known, who asserts the contestable ones, and the student's name where it has one."""

    facts: Mapping[str, FactValue]
    assertions: tuple[Assertion, ...] = ()
    student_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What the answer depends on beside the use: the day, and what the user has confirmed and attached."""

    today: date
    confirmations: Mapping[str, Confirmation] = field(default_factory=dict)
    authorisations: tuple[Attached, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """One clause (or its absence) and what it does to the answer. `clause` is None where no clause decides."""

    standing: Standing
    source: str
    role: str
    record: str | None
    clause: str | None
    says: str
    locator: str | None = None
    title: str | None = None
    date: str | None = None
    grade: str | None = None
    url: str | None = None
    facts: tuple[str, ...] = ()
    changed_by: tuple[str, ...] = ()

    @property
    def cited(self) -> str:
        """The clause as record#clause."""
        return "#".join(part for part in (self.record, self.clause) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Obligation:
    """What the student must carry, from which clause; `condition` where it depends on a fact that is not known; `met` False where it is known not to be."""

    duty: DutyKind
    record: str
    clause: str
    source: str
    says: str
    text: str | None
    flows_to: tuple[str, ...]
    title: str
    url: str
    condition: str | None = None
    met: bool | None = None

    @property
    def line(self) -> str:
        """One line for a list of obligations."""
        exact = f" [{self.text}]" if self.text else ""
        unmet = " NOT MET YET." if self.met is False else ""
        condition = f"If {self.condition}: " if self.condition else ""
        return f"{condition}{self.duty}{exact}: {self.says} ({self.record}, {self.clause}){unmet}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer. `question` asks for the one thing that is missing where the outcome is unknown, and `asks` names it."""

    outcome: Outcome
    reasons: tuple[Reason, ...]
    obligations: tuple[Obligation, ...] = ()
    question: str | None = None
    asks: str | None = None
    instruments: tuple[str, ...] = ()
    """record (digest) of everything that was asked."""
    facts: tuple[str, ...] = ()
    assertions: tuple[Assertion, ...] = ()
    changed_by: tuple[str, ...] = ()
    """What would turn the answer into a yes."""
    alternatives: tuple[str, ...] = ()
    """Teachers that the same use is allowed with."""
    warnings: tuple[str, ...] = ()
    catalogue: str = CATALOGUE_DATE.isoformat()
    catalogue_sha256: str = ""

    @property
    def allows(self) -> bool:
        """True for both kinds of yes."""
        return self.outcome in ("allow", "allow-with-obligations")

    def as_json(self) -> Json:
        """The content of decision.json."""
        tree: Json = asdict(self, dict_factory=lambda pairs: {name: list(value) if isinstance(value, tuple) else value for name, value in pairs})
        return tree

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON: the decision's id, which ledger entries refer to."""
        return sha256_hex(canonical_json(self.as_json()))


# --- the answer -------------------------------------------------------------------------------------------------------------------------


def decide(sources: Iterable[Source], use: Use, catalogue: Catalogue, circumstances: Circumstances, *, alternatives: bool = True) -> Verdict:
    """The verdict on learning from `sources` for this use. Pure: reads nothing but its arguments."""
    sources = tuple(sources)
    applied, gaps = catalogue.applying(sources, circumstances.today)
    verdict = judge(applied, gaps, use, circumstances, catalogue.house_rules)
    house = tuple(
        f"{phrase(rule.fact, True)}: by a rule of the house, {rule.why}"
        for rule in catalogue.house_rules
        if use.facts.get(rule.fact) is not True and holds(rule.when, use.facts)
    )
    contested = tuple(
        f"{source.name}: how it was made is contested; this is a warning and denies nothing"
        for source in sources
        if (entry := catalogue.subject(source.name)) is not None and "contested-provenance" in entry.flags
    )
    own = tuple(f"{one.record.id} is your own record" for one in applied if one.record.id in catalogue.own)
    others = _alternatives(sources, use, catalogue, circumstances) if alternatives and not verdict.allows else ()
    return replace(
        verdict, warnings=tuple(dict.fromkeys((*verdict.warnings, *house, *contested, *own))), alternatives=others, catalogue_sha256=catalogue.sha256
    )


def judge(applied: Sequence[Applied], gaps: Sequence[Gap], use: Use, circumstances: Circumstances, rules: Sequence[HouseRule] = ()) -> Verdict:
    """The verdict over instruments that are already known to apply, with the rules of the house."""
    case = _Case(applied, gaps, circumstances, rules)
    outcome = case.outcome(use.facts)
    obligations = case.obligations(use) if outcome in ("allow", "allow-with-obligations") else ()
    if outcome == "allow" and obligations:
        outcome = "allow-with-obligations"
    changed_by = case.changed_by(use.facts, outcome)
    question, asks = case.question(use.facts) if outcome == "unknown" else (None, None)
    reasons = tuple(replace(reason, changed_by=changed_by) if at == 0 else reason for at, reason in enumerate(case.reasons(use.facts, outcome)))
    return Verdict(
        outcome=outcome,
        reasons=reasons,
        obligations=obligations,
        question=question,
        asks=asks,
        instruments=tuple(sorted({f"{one.record.id} {one.record.sha256}" for one in applied})),
        facts=tuple(phrase(name, use.facts[name]) for name in FACTS if name in use.facts),
        assertions=use.assertions,
        changed_by=changed_by,
        warnings=case.warnings(),
    )


def require(verdict: Verdict) -> None:
    """Returns only where the verdict allows. Raises EntitlementDenied, or EntitlementUnknown with the question."""
    match verdict.outcome:
        case "allow" | "allow-with-obligations":
            return
        case "deny":
            change = "; ".join([*verdict.changed_by, *(f"entitled teacher: {name}" for name in verdict.alternatives)])
            raise EntitlementDenied("entitlement-denied", found=_told(verdict), do=f"What would change it: {change or 'another teacher'}.")
        case "unknown":
            raise EntitlementUnknown(
                "entitlement-unknown",
                found=_told(verdict),
                why="a student made without the right to make it cannot be mended later",
                do=f"Answer this: {verdict.question}",
            )


def _told(verdict: Verdict) -> str:
    return "; ".join(
        f"{reason.source}: {reason.says} ({reason.cited or reason.standing}{f', {reason.locator}' if reason.locator else ''})"
        for reason in verdict.reasons[:3]
    )


def _alternatives(sources: Sequence[Source], use: Use, catalogue: Catalogue, circumstances: Circumstances) -> tuple[str, ...]:
    """Teachers on file, of the most similar size first, with which the same use would be allowed."""
    teacher = next((source for source in sources if source.role == "teacher"), None)
    if teacher is None:
        return ()
    entry = catalogue.subject(teacher.name)
    size = entry.parameters if entry is not None and entry.parameters else None
    found = []
    for other in catalogue.subjects:
        if other.suggest is None or other is entry:
            continue
        instead = [replace(teacher, name=other.suggest, access="weights", licence=None), *(source for source in sources if source.role != "teacher")]
        verdict = decide(instead, use, catalogue, circumstances, alternatives=False)
        if verdict.allows:
            # Where the teacher's size is not known, the largest come first.
            parameters = other.parameters or 1.0
            distance = abs(math.log(parameters / size)) if size else -math.log(parameters)
            found.append((distance, len(verdict.obligations), other.suggest))
    return tuple(name for _, _, name in sorted(found)[:3])


# --- one case ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Point:
    """A clause of an instrument that applies, with the whole condition under which it bears on the use."""

    one: Applied
    clause: Clause
    bears: Condition
    when: Condition
    """The clause's own condition, without the actions."""


class _Case:
    """Instruments that apply, under some circumstances, asked about facts of which some may be missing."""

    def __init__(self, applied: Sequence[Applied], gaps: Sequence[Gap], circumstances: Circumstances, rules: Sequence[HouseRule]) -> None:
        self.applied, self.gaps, self.circumstances = applied, gaps, circumstances
        families = _Families(
            bases=frozenset(one.record.family for one in applied if one.source.role == "base"),
            teachers=frozenset(one.record.family for one in applied if one.source.role == "teacher"),
        )
        # By a rule of the house a fact is what it says wherever the rule holds, whatever is stated.
        meanings = {rule.fact: {"any": [{rule.fact: True}, rule.when]} for rule in rules}
        points = [_point(one, clause, families, meanings) for one in applied for clause in one.record.clauses]
        self.prohibitions = [point for point in points if point.clause.effect == "prohibit"]
        self.duties = [point for point in points if point.clause.effect == "oblige"]
        self.grants = [point for point in points if point.clause.effect in ("permit", "silent")]
        self.conditions = [point.bears for point in points] + [one.authorisation.scope for one in circumstances.authorisations]
        self.needs = [(one, action, condition) for one in applied for action, condition in _core(one)]

    # --- outcome ----------------------------------------------------------------------------------------------------------------------

    def outcome(self, facts: Facts) -> Outcome:
        """Of facts that may be incomplete: unknown only where completions of them differ, or something else than a fact is missing."""
        found = self._kleene(facts)
        if found != "unknown":
            return found
        outcomes = self._of_completions(facts)
        if outcomes <= {"allow", "allow-with-obligations"}:
            return "allow" if outcomes == {"allow"} else "allow-with-obligations"
        return "deny" if outcomes == {"deny"} else "unknown"

    def _of_completions(self, facts: Facts) -> set[Outcome]:
        """Outcomes over all values of the facts that are missing and could matter; unknown and deny where those are too many to try."""
        missing = self._missing(facts)
        domains = [domain(name, self.conditions) for name in missing]
        if math.prod(map(len, domains)) > _MOST_COMPLETIONS:
            return {"unknown", "deny"}
        return {self._kleene({**facts, **dict(zip(missing, values, strict=True))}) for values in product(*domains)}

    def _kleene(self, facts: Facts) -> Outcome:
        unsure = bool(self.gaps)
        for point in self.prohibitions:
            prohibited = self._prohibits(point, facts)
            if prohibited and self._denies(point):
                return "deny"
            unsure = unsure or prohibited is not False
        unsure = unsure or any(self._granted(one, action, needed, facts) is not True for one, action, needed in self.needs)
        if unsure:
            return "unknown"
        return "allow-with-obligations" if any(holds(point.bears, facts) is not False for point in self.duties) else "allow"

    def _denies(self, point: _Point) -> bool:
        """Whether a prohibition that bears denies, or only makes unknown: what is known from memory, and terms that somebody else agreed to."""
        return self._grade(point) != "M" and not _of_others(point)

    def _prohibits(self, point: _Point, facts: Facts) -> bool | None:
        bears = holds(point.bears, facts)
        if bears is False:
            return False
        lifted = self._authorised(point.one, point.clause.actions, facts)
        if lifted:
            return False
        return bears if lifted is False else None

    def _granted(self, one: Applied, action: Action, needed: Condition, facts: Facts) -> bool | None:
        """Whether `action` is covered, where the use includes it."""
        included = holds(needed, facts)
        if included is False:
            return True
        answers = [self._authorised(one, (action,), facts)]
        for point in self.grants:
            if point.one is one and action in point.clause.actions and self._doubt(point) is None:
                answers.append(holds(point.when, facts))
        if True in answers:
            return True
        return None if None in answers or included is None else False

    def _missing(self, facts: Facts) -> list[str]:
        """Facts that are not there and that clauses which could change the outcome look at."""
        undecided = [point.bears for point in (*self.prohibitions, *self.grants) if holds(point.bears, facts) is None]
        undecided += [needed for _, _, needed in self.needs if holds(needed, facts) is None]
        undecided += [point.when for point in self.grants if holds(point.when, facts) is None]
        undecided += [one.authorisation.scope for one in self.circumstances.authorisations if holds(one.authorisation.scope, facts) is None]
        looked_at = facts_of(*undecided)
        return [name for name in FACTS if name in looked_at and name not in facts]

    # --- evidence ---------------------------------------------------------------------------------------------------------------------

    def _grade(self, point: _Point) -> Grade:
        return point.one.record.evidence_of(point.clause).grade

    def _doubt(self, point: _Point) -> Standing | None:
        """Why a grant cannot be relied on; None where it can."""
        record = point.one.record
        grades = [self._grade(point), *([point.one.limit.grade] if point.one.limit is not None else [])]
        if max(_RANK[grade] for grade in grades) >= _RANK["S"]:
            return "not founded"
        confirmed = self.circumstances.confirmations.get(record.id)
        if confirmed is not None and record.text_sha256 is not None and confirmed.text_sha256 != record.text_sha256:
            return "other text"
        if confirmed is None and (not record.fixed or "P2" in grades):
            stale = record.review_by is not None and self.circumstances.today > record.review_by
            return "stale" if stale else "not confirmed"
        if not record.fixed:
            assert confirmed is not None
            if self.circumstances.today > confirmed.review_by:
                return "stale"
        return None

    def _authorised(self, one: Applied, actions: Iterable[Action], facts: Facts) -> bool | None:
        found = [self._lifts(attached, one, actions, facts) for attached in self.circumstances.authorisations]
        return True if True in found else None if None in found else False

    def _lifts(self, attached: Attached, one: Applied, actions: Iterable[Action], facts: Facts) -> bool | None:
        permission = attached.authorisation
        days = {self.circumstances.today, one.source.generated_on or self.circumstances.today}
        sound = (
            attached.found_sha256 == permission.document_sha256
            and bool({one.record.family, one.record.id} & set(permission.instruments))
            and set(actions) <= set(permission.actions)
            and any(matches(one.source.name.lower(), model.lower()) for model in permission.models)
            and all(permission.granted <= day <= permission.expires for day in days)
        )
        return holds(permission.scope, facts) if sound else False

    # --- what is told -----------------------------------------------------------------------------------------------------------------

    def reasons(self, facts: Facts, outcome: Outcome) -> list[Reason]:
        """The deciding one first. The order does not depend on that of the instruments."""
        if outcome == "deny":
            denied = [point for point in self.prohibitions if self._prohibits(point, facts) and self._denies(point)]
            if not denied:  # each value of a missing fact is prohibited, by different clauses
                denied = [point for point in self.prohibitions if self._prohibits(point, facts) is None]
            return [self._reason(point, "prohibits", facts) for point in sorted(denied, key=self._order)]
        if outcome == "unknown":
            return [*self._reasons_undecided(facts), *self._reasons_uncovered(facts), *self._reasons_of_gaps()]
        reasons = []
        for one, action, needed in self.needs:
            if holds(needed, facts) is False:
                continue
            points = [
                p for p in self.grants if p.one is one and action in p.clause.actions and self._doubt(p) is None and holds(p.when, facts) is not False
            ]
            for point in sorted(points, key=self._order)[:1]:
                reasons.append(self._reason(point, "is silent" if point.clause.effect == "silent" else "permits", facts))
            if not points:
                says = f"{action} rests on a written authorisation"
                reasons.append(self._bare(one, "authorised", says))
        return list(dict.fromkeys(sorted(reasons, key=lambda reason: (_ROLES.index(reason.role), reason.source, reason.cited))))

    def _reasons_undecided(self, facts: Facts) -> Iterator[Reason]:
        for point in sorted(self.prohibitions, key=self._order):
            if self._prohibits(point, facts) is not False:
                yield self._reason(point, "may prohibit", facts)

    def _reasons_uncovered(self, facts: Facts) -> Iterator[Reason]:
        found = []
        for one, action, needed in self.needs:
            if self._granted(one, action, needed, facts) is True:
                continue
            points = [p for p in self.grants if p.one is one and action in p.clause.actions and holds(p.when, facts) is not False]
            doubts = [(point, doubt) for point in points if (doubt := self._doubt(point)) is not None]
            if doubts:
                point, doubt = min(doubts, key=lambda pair: self._order(pair[0]))
                found.append(self._reason(point, doubt, facts))
            else:
                found.append(self._bare(one, "not covered", f"nothing on file of {one.record.title} says whether {action} is allowed"))
        yield from sorted(dict.fromkeys(found), key=lambda reason: (_ROLES.index(reason.role), reason.source, reason.cited))

    def _reasons_of_gaps(self) -> Iterator[Reason]:
        for gap in self.gaps:
            yield Reason(standing="not on file", source=gap.source.name, role=gap.source.role, record=None, clause=None, says=gap.found)

    def _reason(self, point: _Point, standing: Standing, facts: Facts) -> Reason:
        record, clause = point.one.record, point.clause
        evidence = record.evidence_of(clause)
        looked_at = facts_of(point.when)
        return Reason(
            standing=standing,
            source=point.one.source.name,
            role=point.one.source.role,
            record=record.id,
            clause=clause.id,
            says=clause.paraphrase,
            locator=clause.locator,
            title=record.title,
            date=record.effective.isoformat(),
            grade=f"{evidence.grade}: {GRADES[evidence.grade]} ({evidence.source})",
            url=record.url,
            facts=tuple(
                phrase(name, facts[name]) if name in facts else f"{name.replace('_', ' ')} not stated"
                for name, fact in FACTS.items()
                if name in looked_at and (name in facts or fact.stated)
            ),
        )

    def _bare(self, one: Applied, standing: Standing, says: str) -> Reason:
        record = one.record
        return Reason(
            standing=standing,
            source=one.source.name,
            role=one.source.role,
            record=record.id,
            clause=None,
            says=says,
            title=record.title,
            date=record.effective.isoformat(),
            grade=f"{record.evidence.grade}: {GRADES[record.evidence.grade]} ({record.evidence.source})",
            url=record.url,
        )

    def _order(self, point: _Point) -> tuple[int, int, str, str, str]:
        return (_RANK[self._grade(point)], _ROLES.index(point.one.source.role), point.one.source.name, point.one.record.id, point.clause.id)

    def obligations(self, use: Use) -> tuple[Obligation, ...]:
        """Every duty that holds, or may hold; then what was asserted and what was authorised."""
        found: dict[tuple[str, str], Obligation] = {}
        for point in sorted(self.duties, key=lambda point: (point.one.record.id, point.clause.id, point.one.source.name)):
            bears = holds(point.bears, use.facts)
            if bears is False:
                continue
            duty = point.clause.duty
            assert duty is not None
            found.setdefault(
                (point.one.record.id, point.clause.id),
                Obligation(
                    duty=duty.kind,
                    record=point.one.record.id,
                    clause=point.clause.id,
                    source=point.one.source.name,
                    says=point.clause.paraphrase,
                    text=duty.text,
                    flows_to=duty.flows_to,
                    title=point.one.record.title,
                    url=point.one.record.url,
                    condition=None if bears else describe_condition(left_open(point.bears, use.facts)),
                    met=_prefix_met(duty.text, use.student_name) if duty.kind == "name-prefix" else None,
                ),
            )
        return (*found.values(), *self._recorded(use))

    def _recorded(self, use: Use) -> Iterator[Obligation]:
        for assertion in use.assertions:
            asked = [point for point in self.prohibitions if assertion.fact in facts_of(point.clause.when, point.clause.unless or {})]
            stated = phrase(assertion.fact, assertion.value)
            yield from self._kept_on_file(
                asked,
                f"keep on file that {assertion.asserted_by} asserts: {stated}, because {assertion.why}; the text leaves it undefined, and its owner may see it otherwise",
            )
        for attached in self.circumstances.authorisations:
            permission = attached.authorisation
            lifted = [
                p for p in self.prohibitions if holds(p.bears, use.facts) is not False and self._lifts(attached, p.one, p.clause.actions, use.facts)
            ]
            conditions = "; ".join(permission.conditions) or "no conditions named"
            yield from self._kept_on_file(
                lifted, f"keep to the authorisation {permission.id} of {permission.grantor} (until {permission.expires}): {conditions}"
            )

    def _kept_on_file(self, points: Iterable[_Point], says: str) -> Iterator[Obligation]:
        """One obligation on the maker, under the first of the clauses that it concerns; none where it concerns none."""
        for point in sorted(points, key=self._order)[:1]:
            yield Obligation(
                duty="other",
                record=point.one.record.id,
                clause=point.clause.id,
                source=point.one.source.name,
                says=says,
                text=None,
                flows_to=("maker",),
                title=point.one.record.title,
                url=point.one.record.url,
            )

    def question(self, facts: Facts) -> tuple[str, str]:
        """The one question, and what it asks for: a fact that can change the answer; else what is not on file; else a text to confirm."""
        missing = self._missing(facts)
        for name in missing:
            if {self.outcome({**facts, name: value}) for value in domain(name, self.conditions)} != {"unknown"}:
                return f"{FACTS[name].question} Say so in the recipe: intent.{name}", name
        if self.gaps:
            return self.gaps[0].question, self.gaps[0].asks
        for reason in self._reasons_uncovered(facts):
            if reason.standing in ("not confirmed", "stale", "other text"):
                assert reason.record is not None
                return (
                    f"Does {reason.title} still say this? Read {reason.url} and confirm: stillroom terms confirm {reason.record} --file TEXT",
                    "confirm",
                )
        others = [point for point in sorted(self.prohibitions, key=self._order) if _of_others(point) and self._prohibits(point, facts)]
        if others:
            title, name = others[0].one.record.title, others[0].one.source.name
            return (
                f"Does {title} bind you for what somebody else had {name} write? That is unsettled: attach an authorisation, or leave it out",
                "privity",
            )
        if missing and self._of_completions(facts) != {"unknown"}:  # several facts settle it together
            return f"{FACTS[missing[0]].question} Say so in the recipe: intent.{missing[0]}", missing[0]
        reason = next(iter([*self._reasons_undecided(facts), *self._reasons_uncovered(facts)]))
        return (
            f"What does {reason.title} ({reason.url}) say? What is on file is not well enough founded. Add a record: stillroom terms add FILE",
            "record",
        )

    def changed_by(self, facts: Facts, outcome: Outcome) -> tuple[str, ...]:
        """Single changes that would turn the answer into a yes, found by trying them; for a denial, the authorisation that would lift it too."""
        if outcome in ("allow", "allow-with-obligations"):
            return ()
        found = []
        looked_at = facts_of(*self.conditions)
        for name in FACTS:
            if name not in looked_at or name not in facts or not FACTS[name].stated:
                continue
            for value in domain(name, self.conditions):
                if value != facts[name] and self.outcome({**facts, name: value}) in ("allow", "allow-with-obligations"):
                    found.append(f"allowed if {phrase(name, value)}")
        if outcome == "deny":
            lifted: dict[str, set[str]] = {}
            for point in (p for p in self.prohibitions if self._prohibits(p, facts) is not False):
                # A licence is used by many owners; a service's terms are one provider's.
                owner = f"whoever owns {point.one.source.name}" if point.one.record.kind == "licence" else point.one.record.provider
                lifted.setdefault(owner, set()).update(point.clause.actions)
            found += [f"a written authorisation of {owner} for {', '.join(sorted(actions))}" for owner, actions in sorted(lifted.items())]
        return tuple(found)

    def warnings(self) -> tuple[str, ...]:
        """Records that are past their review date, and authorisations that count for nothing."""
        today = self.circumstances.today
        found = []
        for one in self.applied:
            confirmed = self.circumstances.confirmations.get(one.record.id)
            review_by = confirmed.review_by if confirmed is not None else one.record.review_by
            if not one.record.fixed and review_by is not None and today > review_by:
                found.append(f"{one.record.id} is stale: it was to be reviewed by {review_by}")
            if "contested-provenance" in one.record.flags:
                found.append(f"{one.record.id}: provenance contested; this is a warning and denies nothing")
        for attached in self.circumstances.authorisations:
            permission = attached.authorisation
            if attached.found_sha256 != permission.document_sha256:
                found.append(
                    f"the authorisation {permission.id} counts for nothing: its document {'is not there' if attached.found_sha256 is None else 'has another digest'}"
                )
            elif not permission.granted <= today <= permission.expires:
                found.append(f"the authorisation {permission.id} counts for nothing: it holds from {permission.granted} to {permission.expires}")
        return tuple(sorted(set(found)))


# Facts that follow from a source's role: of a base's weights the student is made; of what datasets and ancestors wrote it reads the text.
_SETTLED: dict[str, Facts] = {
    "base": {"method": "weights"},
    "dataset": {"method": "text"},
    "ancestor": {"method": "text"},
}
_ROLES = ("teacher", "base", "dataset", "ancestor")


def _of_others(point: _Point) -> bool:
    """Terms of a service bind whoever agreed to them. Whether they bind a later user of a dataset with its outputs is unsettled."""
    return point.one.source.role == "ancestor" and point.one.source.way in ("api", "consumer")


def _core(one: Applied) -> list[tuple[Action, Condition]]:
    """The actions that an instrument must cover, each with when it must."""
    if one.record.kind == "policy":
        return []
    evaluate: list[tuple[Action, Condition]] = [("evaluate-only", _ACTIONS["evaluate-only"])]
    if one.source.role == "base":
        return [("init-from-weights", {"purpose": "train"}), *evaluate]
    core: list[tuple[Action, Condition]] = [("train-on-output", _ACTIONS["train-on-output"]), *evaluate]
    if one.record.kind == "licence" and one.source.role == "teacher" and one.source.way == "weights":
        core += [("use-logits", _ACTIONS["use-logits"]), ("init-from-weights", _ACTIONS["init-from-weights"])]
    return core


@dataclass(frozen=True, slots=True)
class _Families:
    """Families of the instruments that the student's base and its teacher come under."""

    bases: frozenset[str]
    teachers: frozenset[str]

    def in_family(self, family: str) -> Condition:
        """When a student starts from weights under this instrument: always, never, or if it is made of its teacher's weights."""
        return {} if family in self.bases else {"method": "weights"} if family in self.teachers else NEVER


def _point(one: Applied, clause: Clause, families: _Families, meanings: Mapping[str, Condition]) -> _Point:
    actions = [with_meanings(_of_role(one.source.role, action), meanings) for action in clause.actions]
    when: Condition = {"all": [clause.when, {"not": clause.unless}]} if clause.unless is not None else clause.when
    known = _SETTLED.get(one.source.role)
    if known is not None:
        when = settled(when, known)
    when = with_meanings(when, {"in_family": families.in_family(one.record.family), **meanings})
    return _Point(one, clause, {"all": [{"any": actions}, when]}, when)


def _of_role(role: str, action: Action) -> Condition:
    if role == "base":
        if action == "init-from-weights":
            return {"purpose": "train"}
        if action in ("train-on-output", "generate-for-training", "use-logits", "publish-dataset"):
            return NEVER
    if role in ("dataset", "ancestor") and action in ("use-logits", "init-from-weights"):
        return NEVER
    return _ACTIONS[action]


def _prefix_met(prefix: str | None, name: str | None) -> bool | None:
    return None if name is None or prefix is None else begins_with(name, prefix)


def begins_with(name: str, prefix: str) -> bool:
    """Whether a name has the prefix; hyphens and underscores stand for the blanks that names of models cannot have."""
    spaced = str.maketrans("-_", "  ")
    return name.translate(spaced).startswith(prefix.translate(spaced))
