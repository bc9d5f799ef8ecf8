"""Verdicts, records and differences between records as Markdown, for two readers: an engineer and a lawyer.

Words of the trade are explained where they first stand. What users and catalogue files bring in is written so that it cannot act as Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

from stillroom.core import clock
from stillroom.entitlement.facts import FACTS, Condition, describe_condition, facts_of
from stillroom.entitlement.records import GRADES, Action, AppliesTo, Clause, Duty, DutyKind, Effect, Evidence, Grade, Kind, Record
from stillroom.entitlement.verdict import Obligation, Outcome, Reason, Standing, Verdict

NOT_ADVICE = "This is not legal advice."
# Terms of services are reviewed every quarter: an older catalogue has gone without one.
_OLD_DAYS = 90

_WORDS = {
    "instrument": "a text that binds: a licence, a service's terms, a policy, the terms of a host or of a dataset",
    "record": "what Stillroom has on file of one version of an instrument",
    "digest": "a fingerprint, SHA-256, that is another one as soon as a single letter differs",
    "catalogue": "the collection of all records",
}
STANDINGS: dict[Standing, str] = {
    "prohibits": "forbids it",
    "permits": "permits it",
    "is silent": "is silent: the text does not speak of it, which is not the same as permission",
    "may prohibit": "may forbid it",
    "not on file": "not on file",
    "not covered": "nothing on file covers it",
    "not confirmed": "would cover it, but nobody here has confirmed the text",
    "stale": "would cover it, but is stale: the day by which the text was to be read again is past",
    "other text": "would cover it, but the text that was confirmed is another one",
    "not founded": "would cover it, but is not founded well enough to rely on",
    "authorised": "covered by a written authorisation",
}
ROLES = {
    "teacher": "the teacher",
    "base": "the model that the student starts from",
    "dataset": "a dataset",
    "ancestor": "what a source was itself trained on",
}
EFFECTS: dict[Effect, str] = {"permit": "permits", "prohibit": "forbids", "oblige": "puts a duty on", "silent": "does not speak of"}
_NAMES: dict[Effect, str] = {"permit": "a permission", "prohibit": "a prohibition", "oblige": "a duty", "silent": "silence"}
ACTIONS: dict[Action, str] = {
    "generate-for-training": "having outputs written for training",
    "train-on-output": "training a model on outputs",
    "train-competing": "training a model that competes with the provider",
    "use-logits": "learning from probabilities or inner states",
    "init-from-weights": "starting a model from the weights",
    "publish-dataset": "publishing the outputs",
    "distribute-student": "giving the student's weights to others",
    "serve-student": "offering the student as a service",
    "commercial-use": "commercial use",
    "evaluate-only": "evaluating a model without training one",
}
KINDS: dict[Kind, str] = {
    "licence": "a licence: the terms under which weights or data are given",
    "service-terms": "terms of a service: the contract with whoever calls it",
    "policy": "a policy: rules that a contract or a licence makes part of itself",
    "host-terms": "terms of a host: the contract with whoever serves somebody else's model",
    "dataset-terms": "terms of a dataset",
}
GRADES_CAN: dict[Grade, str] = {
    "P1": "It can forbid, and it can allow where the text is fixed or its user has confirmed it.",
    "P2": "It can forbid, and it can allow only once its user has confirmed the text.",
    "S": "It can forbid; it can never allow.",
    "M": "It can neither forbid nor allow; it makes the answer unknown.",
}
_FLAGS = {
    "contested-provenance": "how it was made is contested",
    "unilateral-change": "the provider can change it alone",
    "undefined-terms": "it turns on a word that it does not define",
    "territorial": "it depends on the country",
    "under-reports": "it is known to leave out conditions that apply",
}
_CARRIERS = {
    "student-weights": "the student's weights",
    "service": "a service that offers the student",
    "documentation": "its documentation",
    "licence": "the student's licence",
    "dataset": "the dataset of outputs",
    "maker": "whoever makes the student",
}
# The duty in words, and what to do for it; {text} is the exact string.
DUTIES: dict[DutyKind, tuple[str, str]] = {
    "name-prefix": ("a name", "Give the student a name that begins with {text}, and state it in the recipe: intent.student_name."),
    "display": ("a line to show", "Show {text}, word for word, where its carriers are read or used."),
    "notice-file": ("a notice file", "Pass the notices on in a file NOTICE beside the weights; `stillroom publish` writes it."),
    "licence-copy": ("a copy of the licence", "Put the text of the licence beside the weights, in LICENSES/."),
    "flow-down-restrictions": (
        "restrictions that are passed on",
        "Write the restrictions on use into the student's own licence, so that they bind whoever gets it.",
    ),
    "change-notice": ("a notice of changes", "Say in NOTICE that the work was changed, and how."),
    "non-commercial": ("no commercial use", "Neither use the student commercially nor license it for commercial use."),
    "attribution": ("credit", "Name the work and its maker in README.md and NOTICE."),
    "no-distribution": ("no passing on", "Keep the student inside your organisation; `stillroom publish` refuses it."),
    "share-alike": ("the same licence", "Release what is made of it under the same licence only."),
    "policy": ("a policy", "Keep to the policy, and name it where the student is offered."),
    "exclude-data": ("data to leave out", "Leave this data out of what the student learns from."),
    "other": ("something to see to", "A person has to see to this and keep a note of it."),
}


class _Page:
    """Lines of a document, and the words that it has explained so far."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._explained: set[str] = set()

    def add(self, *lines: str) -> None:
        self.lines += lines

    def section(self, title: str) -> None:
        self.add(*([""] if self.lines[-1] else []), f"## {title}", "")

    def word(self, name: str, shown: str | None = None) -> str:
        """A word of the trade as it is `shown`, explained the first time."""
        shown = shown or name
        if name in self._explained:
            return shown
        self._explained.add(name)
        return f"{shown} ({_WORDS[name]})"

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip() + "\n"


# --- a decision -------------------------------------------------------------------------------------------------------------------------


def decision_markdown(verdict: Verdict, *, today: date | None = None, name: str | None = None) -> str:
    """The content of decision.md: the answer, what decided it, what would change it, what must be carried, and what it rests on.

    `today` is the day of the decision, by default the present one; `name` is what the student is called.
    """
    today = today or clock.now().date()
    page = _Page()
    teachers = _listed(list(dict.fromkeys(_code(reason.source) for reason in verdict.reasons if reason.role == "teacher"))) or "its teacher"
    student = _inline(name) if name else "this student"
    does = "be evaluated with" if "purpose is evaluate" in verdict.facts else "learn from"
    count = len(verdict.obligations)
    page.add(f"# May {student} {does} {teachers}?", "")
    what, what_not = f"{student} may {does} {teachers}", f"{student} may not {does} {teachers}"
    page.add(
        _ANSWERS[verdict.outcome].format(
            what=what, what_not=what_not, count=f"{count} obligations below are" if count != 1 else "one obligation below is"
        ),
        "",
    )
    page.add(f"Decided on {today}. {NOT_ADVICE}", "")
    known = [f", here {student}" if name else "", f", here {teachers}" if teachers != "its teacher" else ""]
    page.add(f"The student is the model that learns{known[0]}; the teacher is the model that is learned from{known[1]}.")
    if verdict.question is not None:
        page.section("The question to answer")
        page.add(_inline(verdict.question))
    _reasons(verdict, page)
    _changes(verdict, page)
    if verdict.obligations:
        page.section("Obligations")
        page.add("Each goes with the student from now on. `stillroom publish` writes what a program can write, and checks the rest.", "")
        for number, obligation in enumerate(verdict.obligations, start=1):
            page.add(*_obligation(obligation, number))
    _facts(verdict, page)
    if verdict.warnings:
        page.section("Warnings")
        page.add(*(f"- {_inline(warning)}" for warning in verdict.warnings))
    _basis(verdict, page, today)
    return page.text


_ANSWERS: dict[Outcome, str] = {
    "allow": "**Yes.** {what}, and nothing has to be done for it.",
    "allow-with-obligations": "**Yes, with obligations.** {what}, as long as the {count} kept.",
    "deny": "**No.** {what_not} for the use that is stated below.",
    "unknown": "**Not known.** Whether {what} cannot be told before the question below is answered, and until then the answer is no.",
}


def _reasons(verdict: Verdict, page: _Page) -> None:
    page.section("What decided it")
    instrument = page.word("instrument")
    match verdict.outcome:
        case "deny":
            page.add(f"One clause that forbids it is enough, whatever another {instrument} says. The first of these is the best founded.", "")
        case "unknown":
            page.add(f"Every {instrument} that applies has to cover it. These do not, or not yet.", "")
        case _:
            page.add(f"Every {instrument} that applies was asked, and none forbids it. What each has to cover, it covers by this clause.", "")
    for number, reason in enumerate(verdict.reasons, start=1):
        page.add(*_reason(reason, number, page))


def _reason(reason: Reason, number: int, page: _Page) -> list[str]:
    where = ", ".join(
        _inline(part) for part in (reason.title and f"{reason.title}{f' ({reason.date})' if reason.date else ''}", reason.locator) if part
    )
    head = f"{number}. **{where}:** {STANDINGS[reason.standing]}." if where else f"{number}. **{STANDINGS[reason.standing].capitalize()}.**"
    lines = [
        head,
        f"   - In our words: {_inline(reason.says)}",
        f"   - About: {_code(reason.source)}, {ROLES.get(reason.role, _inline(reason.role))}",
    ]
    if reason.facts:
        lines.append(f"   - Facts it looks at: {_inline('; '.join(reason.facts))}")
    if reason.url:
        lines.append(f"   - The text: {_address(reason.url)}")
    if reason.grade:
        grade, _, founded = reason.grade.partition(": ")
        lines.append(f"   - How well founded: {_inline(founded)}; evidence grade {grade}")
    if reason.cited:
        lines.append(
            f"   - On file as: {_code(reason.cited)}, {page.word('record')} and clause"
            if reason.clause
            else f"   - On file as: {_code(reason.cited)}"
        )
    return lines


def _changes(verdict: Verdict, page: _Page) -> None:
    page.section("What would change it")
    if verdict.changed_by:
        page.add("Any one of these:", "", *(f"- {_inline(change)}" for change in verdict.changed_by))
    elif verdict.outcome == "unknown":
        page.add("The answer to the question above.")
    elif verdict.outcome == "deny":
        page.add("No single fact: only another teacher.")
    else:
        page.add(
            "Other facts than those below, a new version of a text, or a confirmation that runs out. The same question is asked again, with that day's "
            "date, before anything is spent, when the set to learn from is frozen, before the first training step, and at publishing."
        )
    if verdict.alternatives:
        page.add("", "The same use is allowed with each teacher of these, the most similar in size first:", "")
        page.add(*(f"- {_code(one)}" for one in verdict.alternatives))


def _obligation(obligation: Obligation, number: int) -> list[str]:
    short, to_do = DUTIES[obligation.duty]
    exact = _code(obligation.text) if obligation.text else ""
    state = {True: " It is met as things stand.", False: " **It is not met yet.**", None: ""}[obligation.met]
    lines = [f"{number}. **{short[0].upper()}{short[1:]}{f': {exact}' if exact else ''}.** {to_do.replace('{text}', exact)}{state}"]
    if obligation.condition:
        lines.append(f"   - Only if: {_inline(obligation.condition)}")
    lines += [
        f"   - Because: {_inline(obligation.says)}",
        f"   - Carried by: {_listed([_CARRIERS[carrier] for carrier in obligation.flows_to])}",
        f"   - From: {_inline(obligation.title)}, {_code(f'{obligation.record}#{obligation.clause}')}, for {_code(obligation.source)}; "
        f"{_address(obligation.url)}",
    ]
    return lines


def _facts(verdict: Verdict, page: _Page) -> None:
    page.section("Facts")
    asserted = {assertion.fact: assertion for assertion in verdict.assertions}
    known: set[str] = set()
    rows = []
    for phrase in verdict.facts:
        name = _fact_of(phrase)
        known.add(name)
        if name in asserted:
            by = f"{_inline(asserted[name].asserted_by)} asserts it, because {_inline(asserted[name].why)}; Stillroom records this and does not decide it"
        elif any(warning.startswith(f"{phrase}: by a rule of the house") for warning in verdict.warnings):
            by = "a rule of the house"
        else:
            by = "the recipe states it" if name != "purpose" and name in FACTS and FACTS[name].stated else "read off the recipe"
        rows.append(f"| {_inline(phrase)} | {FACTS[name].question if name in FACTS else ''} | {by} |")
    page.add("| known | what it answers | by whom |", "|---|---|---|", *rows)
    unstated = [name for name, fact in FACTS.items() if fact.stated and name not in known]
    if unstated:
        page.add("", "Not stated; each is asked for only where it can change the answer:", "")
        page.add(*(f"- {name.replace('_', ' ')}: {FACTS[name].question}{' Asked for above.' if name == verdict.asks else ''}" for name in unstated))


def _fact_of(phrase: str) -> str:
    """The fact of a phrase that facts.phrase made."""
    for name in FACTS:
        words = name.replace("_", " ")
        if phrase in (words, f"not {words}") or phrase.startswith(f"{words} is "):
            return name
    return ""


def _basis(verdict: Verdict, page: _Page, today: date) -> None:
    page.section("What this rests on")
    page.add(f"The {page.word('catalogue')} of {age(verdict.catalogue, today)}")
    if verdict.catalogue_sha256:
        page.add(f"Its {page.word('digest')} is `{verdict.catalogue_sha256}`, records of your own included.")
    page.add(f"This decision, as a program reads it in decision.json, has the {page.word('digest')} `{verdict.sha256}`.")
    if verdict.instruments:
        page.add("", f"Every {page.word('instrument')} that was asked, with the {page.word('digest')} of its {page.word('record')}:", "")
        page.add("| record | digest |", "|---|---|")
        for line in verdict.instruments:
            name, _, digest = line.partition(" ")
            page.add(f"| {_code(name)} | {_code(digest)} |")


def age(version: str, today: date) -> str:
    """The catalogue's date and how old that makes it, as the end of a sentence."""
    try:
        days = (today - date.fromisoformat(version)).days
    except ValueError:
        return f"{_inline(version)}."
    if days <= 0:
        return f"{version}, which is this day's."
    old = " That is old: look whether there is a newer one." if days > _OLD_DAYS else ""
    return f"{version}, which is {days} day{'s' if days > 1 else ''} old.{old}"


# --- a record ---------------------------------------------------------------------------------------------------------------------------


def record_markdown(record: Record) -> str:
    """Everything on file of one instrument, so that each statement can be followed back to its place in the text."""
    page = _Page()
    page.add(f"# {_inline(record.title)}", "")
    page.add(f"This is the {page.word('record')} {_code(record.id)}. {record_binds(record)}", "")
    page.add("| | |", "|---|---|")
    for label, value in _identity(record, page):
        page.add(f"| {label} | {value} |")
    if record.notes:
        page.add("", _inline(record.notes))
    for number, clause in enumerate(record.clauses, start=1):
        page.section(f"{number}. {_inline(clause.locator)}: {_NAMES[clause.effect]}")
        page.add(*(f"- {label}: {value}" for label, value in _clause_lines(record, clause)))
    looked_at = facts_of(*(condition for clause in record.clauses for condition in (clause.when, clause.unless or {})))
    if looked_at:
        page.section("What the conditions ask")
        page.add(*(f"- {name.replace('_', ' ')}: {fact.question}" for name, fact in FACTS.items() if name in looked_at))
    return page.text


def record_binds(record: Record) -> str:
    """What binds, and what does not."""
    return f"The clauses below are in our own words; what binds is the text at {_address(record.url)}."


def in_force_since(record: Record) -> str:
    """The day from which it is in force; the year alone where that is all that is known."""
    known_by_year = record.id.endswith(f"@{record.effective.year}") and (record.effective.month, record.effective.day) == (1, 1)
    return str(record.effective.year) if known_by_year else record.effective.isoformat()


def _identity(record: Record, page: _Page) -> list[tuple[str, str]]:
    evidence = record.evidence
    found = [
        ("kind", KINDS[record.kind]),
        ("provider", _inline(record.provider)),
        ("in force", f"from {in_force_since(record)}" + (f" to the day before {record.superseded}" if record.superseded else "")),
        ("text", _address(record.url)),
        ("digest of the text", f"{_code(record.text_sha256)}, the {page.word('digest')} of its file" if record.text_sha256 else "not on file"),
        (
            "can change",
            "no: a fixed text" if record.fixed else f"yes: this record is to be reviewed by {record.review_by}, and is stale after that day",
        ),
        ("covers", _coverage(record.applies_to)),
        ("evidence", f"grade {evidence.grade}: {_evidence(evidence)}. {GRADES_CAN[evidence.grade]}"),
    ]
    if record.variant:
        found.append(("for", _inline(record.variant)))
    if record.spdx:
        found.append(("SPDX id", _code(record.spdx)))
    if record.incorporates:
        found.append(("makes part of itself", ", ".join(map(_code, record.incorporates))))
    if record.flags:
        found.append(("to keep in mind", "; ".join(_FLAGS[flag] for flag in record.flags)))
    found.append(("digest of this record", _code(record.sha256)))
    return found


def _coverage(covers: AppliesTo) -> str:
    words = {
        "weights": "weights",
        "api": "a provider's programming interface",
        "host": "models that somebody else serves",
        "consumer": "a provider's product for consumers",
        "dataset": "datasets",
    }
    of = [_listed([_inline(name) for name in names]) for names in (covers.providers, covers.hosts) if names]
    return _listed([words[way] for way in covers.access]) + (f"; of {' and '.join(of)}" if of else "")


def _evidence(evidence: Evidence) -> str:
    reviewed = f", looked at on {evidence.reviewed}" if evidence.reviewed else ""
    return f"{GRADES[evidence.grade]} ({_inline(evidence.source)}{reviewed})"


def _clause_lines(record: Record, clause: Clause) -> list[tuple[str, str]]:
    found = [
        ("In our words", _inline(clause.paraphrase)),
        ("Where in the text", _inline(clause.locator)),
        ("Effect", f"{EFFECTS[clause.effect]} {_listed([ACTIONS[action] for action in clause.actions])}"),
        ("When", _inline(describe_condition(clause.when))),
    ]
    if clause.unless is not None:
        found.append(("Unless", _inline(describe_condition(clause.unless))))
    if clause.duty is not None:
        found.append(("Duty", _duty(clause.duty)))
    if clause.evidence is not None and clause.evidence != record.evidence:
        found.append(("Evidence", f"grade {clause.evidence.grade}: {_evidence(clause.evidence)}. {GRADES_CAN[clause.evidence.grade]}"))
    found.append(("Cited as", _code(f"{record.id}#{clause.id}")))
    return found


def _duty(duty: Duty) -> str:
    to_do = DUTIES[duty.kind][1].replace("{text}", _code(duty.text) if duty.text else "")
    return f"{_duty_name(duty)}. {to_do} Carried by {_listed([_CARRIERS[carrier] for carrier in duty.flows_to])}."


def _duty_name(duty: Duty) -> str:
    return DUTIES[duty.kind][0] + (f", {_code(duty.text)}" if duty.text else "")


# --- a difference -----------------------------------------------------------------------------------------------------------------------


def difference_markdown(before: Record, after: Record) -> str:
    """What differs between two records: what each says of every action, then what is told of the whole, then clause by clause."""
    page = _Page()
    page.add(f"# {_code(before.id)} and {_code(after.id)}", "")
    changes = [(ACTIONS[action], _says_of(before, action), _says_of(after, action)) for action in ACTIONS]
    changed = [(action, one, other) for action, one, other in changes if one != other]
    if changed:
        page.section("What the answer turns on")
        page.add(
            f"| | {_code(before.id)} | {_code(after.id)} |", "|---|---|---|", *(f"| {action} | {one} | {other} |" for action, one, other in changed)
        )
    whole = _fields_that_differ(
        before, after, ("kind", "provider", "title", "effective", "superseded", "url", "variant", "spdx", "fixed", "review_by")
    )
    whole += _fields_that_differ(before, after, ("applies_to", "incorporates", "evidence", "flags", "text_sha256", "notes"))
    if whole:
        page.section("The whole")
        page.add(*whole)
    clauses = _clauses_that_differ(before, after)
    if clauses:
        page.section("Clause by clause")
        page.add(*clauses)
    if not (changed or whole or clauses):
        page.add("They say the same.")
    return page.text


def _says_of(record: Record, action: Action) -> str:
    """What the clauses on one action do, with their conditions."""
    found = []
    for clause in record.clauses:
        if action in clause.actions:
            short = f" ({DUTIES[clause.duty.kind][0]})" if clause.duty is not None else ""
            when = f" when {describe_condition(clause.when)}" if clause.when else ""
            unless = f" unless {describe_condition(clause.unless)}" if clause.unless is not None else ""
            found.append(_inline(f"{EFFECTS[clause.effect]}{short}{when}{unless}"))
    return "; ".join(dict.fromkeys(found)) or "nothing on file"


def _clauses_that_differ(before: Record, after: Record) -> list[str]:
    old, new = ({clause.id: clause for clause in record.clauses} for record in (before, after))
    lines = []
    for name in dict.fromkeys([*old, *new]):
        if name not in new:
            lines += [f"- {_code(name)} only in {_code(before.id)} ({_inline(old[name].locator)}): {_inline(old[name].paraphrase)}"]
        elif name not in old:
            lines += [f"- {_code(name)} only in {_code(after.id)} ({_inline(new[name].locator)}): {_inline(new[name].paraphrase)}"]
        else:
            fields = ("locator", "effect", "actions", "when", "unless", "duty", "paraphrase", "evidence")
            changed = _fields_that_differ(old[name], new[name], fields)
            lines += [f"- {_code(name)} in both, changed:", *(f"  {line}" for line in changed)] if changed else []
    return lines


def _fields_that_differ(before: Record | Clause, after: Record | Clause, names: Iterable[str]) -> list[str]:
    found = []
    for name in names:
        one, other = getattr(before, name), getattr(after, name)
        if one != other:
            found.append(f"- {name.replace('_', ' ')}: {_value(name, one)} -> {_value(name, other)}")
    return found


def _value(name: str, value: Any) -> str:
    match value:
        case None | () | "":
            return "none"
        case bool():
            return "yes" if value else "no"
        case Duty():
            return f"{_duty_name(value)}, carried by {_listed([_CARRIERS[carrier] for carrier in value.flows_to])}"
        case Evidence():
            return f"grade {value.grade}, {_evidence(value)}"
        case AppliesTo():
            return _coverage(value)
        case dict():
            condition: Condition = value
            return _inline(describe_condition(condition))
        case tuple():
            return _inline(", ".join(value))
        case _:
            return _inline(str(value))


def printable(text: str) -> str:
    """The text with control characters but line feeds, and lone surrogates, as their code points: they could act on a terminal or cannot be written."""
    return "".join(char if char == "\n" or not _acts(char) else f"U+{ord(char):04X}" for char in text)


# --- Markdown ---------------------------------------------------------------------------------------------------------------------------


def _inline(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    flat = printable(" ".join(text.split()))
    flat = re.sub(r"([\\`*\[\]<>|])", r"\\\1", flat)
    flat = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", flat)
    # At the beginning of a line these would make a heading, a list, a rule or a fence.
    return re.sub(r"^([#+=~-]|\d+(?=[.)](?:\s|$)))", lambda found: f"\\{found[0]}" if not found[0].isdigit() else f"{found[0]}\\", flat)


def _code(text: str) -> str:
    """A code span that shows the text as it is; of a bar, which ends a table's cell, it shows a look-alike."""
    flat = printable(" ".join(text.split())).replace("|", "\u00a6")
    longest = max((len(run) for run in re.findall(r"`+", flat)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{fence}{pad}{flat}{pad}{fence}" if flat else "(no name)"


def _address(url: str) -> str:
    return f"<{url}>" if re.fullmatch(r"https?://[!-;=?-~]+", url) else _inline(url)


def _acts(char: str) -> bool:
    point = ord(char)
    # C0, C1, surrogates, and the marks that turn the direction of writing, with which a text can be made to show other than it is.
    return point < 0x20 or 0x7F <= point < 0xA0 or 0xD800 <= point < 0xE000 or 0x202A <= point <= 0x202E or 0x2066 <= point <= 0x2069


def _listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)
