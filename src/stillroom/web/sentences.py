"""What the numbers say, in words. Every sentence is made from the report; none is kept ready."""

from __future__ import annotations

from collections.abc import Sequence

from stillroom.web.format import percent, percent_in_words, times
from stillroom.web.readings import Measured, Node, Reading, read

_ABOUT_EQUAL = 0.05


def verdict(report: Node) -> str:
    """The report in one sentence: how much was kept, how much smaller, how much faster, as far as each was measured."""
    kept = _kept(report)
    smaller = _compared(read(report, "cost", "ratios", "parameters"), "is {} smaller", "is {} larger than the teacher", "is as large as the teacher")
    if smaller is None:
        smaller = _compared(read(report, "cost", "ratios", "bytes"), "is {} smaller", "is {} larger than the teacher", "is as large as the teacher")
    faster = _compared(
        read(report, "cost", "ratios", "tokens_per_second"),
        "answers {} faster",
        "answers {} slower than the teacher",
        "answers as fast as the teacher",
    )
    clauses = [clause for clause in (kept, smaller, faster) if clause]
    if not clauses:
        return "Neither the student\u2019s quality nor its cost was measured."
    if kept is None:
        return f"How well the student answers was not measured; it {_listed(clauses)}."
    return f"The student {_listed(clauses)}."


def _listed(clauses: Sequence[str]) -> str:
    return clauses[0] if len(clauses) == 1 else ", ".join(clauses[:-1]) + " and " + clauses[-1]


def _kept(report: Node) -> str | None:
    gap = read(report, "quality", "gap_recovered")
    if isinstance(gap, Measured):
        return _gap_in_words(gap.value)
    student, teacher = (read(report, "quality", who, "exact_match") for who in ("student", "teacher"))
    if isinstance(student, Measured) and isinstance(teacher, Measured):
        return f"gets {percent(student.value)} of the items exactly right where the teacher gets {percent(teacher.value)}"
    agreement = read(report, "fidelity", "top1_agreement")
    if isinstance(agreement, Measured):
        return f"would write the same next token as the teacher {percent_in_words(agreement.value)} of the time"
    return None


def _gap_in_words(value: float) -> str:
    if value <= 0:
        return f"keeps nothing of what the labels alone do not give (gap recovered {percent_in_words(value)})"
    if value > 1:
        return f"keeps all of what the labels alone do not give, and more ({percent_in_words(value)})"
    return f"keeps {percent_in_words(value)} of what the labels alone do not give"


def _compared(reading: Reading, better: str, worse: str, equal: str) -> str | None:
    if not isinstance(reading, Measured) or reading.value <= 0:
        return None
    if abs(reading.value - 1) < _ABOUT_EQUAL:
        return equal
    return better.format(times(reading.value)) if reading.value > 1 else worse.format(times(1 / reading.value))


def allowed(verdict_word: str) -> str:
    """The entitlement verdict in words; an unlisted one stands for itself."""
    known = {
        "allow": "The teacher\u2019s terms, as recorded, allow training this student.",
        "allowed": "The teacher\u2019s terms, as recorded, allow training this student.",
        "allow-with-obligations": "The teacher\u2019s terms, as recorded, allow training this student, with obligations.",
        "allowed-with-obligations": "The teacher\u2019s terms, as recorded, allow training this student, with obligations.",
        "deny": "The teacher\u2019s terms, as recorded, forbid training this student.",
        "denied": "The teacher\u2019s terms, as recorded, forbid training this student.",
        "unknown": "It is not known whether the teacher\u2019s terms allow training this student.",
    }
    return known.get(verdict_word.replace("_", "-").replace(" ", "-").lower(), f"Verdict: {verdict_word}")
