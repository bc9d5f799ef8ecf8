"""May one learn from this teacher? An answer with reasons, three-valued: yes (perhaps with obligations), no, or a question.

This is not legal advice. The answer is as good as the statement of terms it was given, which the user makes; what is never done is to take
silence for consent. A denial stands whatever else is unknown; a fact that is missing matters only where it could change the answer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from stillroom.core.errors import EntitlementDenied, EntitlementUnknown
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.entitlement.terms import TermsStatement, licence_id

Outcome: TypeAlias = Literal["allow", "allow-with-obligations", "deny", "unknown"]

_SOURCE = "the recipe's `terms`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a verdict is what it is: the clause in a paraphrase, who says that it is there, what shows it, and what would change the answer."""

    clause: str
    source: str
    evidence: str
    what_would_change_it: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer. `obligations` are what the student must carry; `question` asks for the one fact that is missing where the outcome is unknown."""

    outcome: Outcome
    reasons: tuple[Reason, ...]
    obligations: tuple[str, ...] = ()
    question: str | None = None

    @property
    def allows(self) -> bool:
        """True for both kinds of yes."""
        return self.outcome in ("allow", "allow-with-obligations")

    def as_json(self) -> Json:
        """The content of decision.json."""
        tree = asdict(self)
        return tree | {"reasons": list(tree["reasons"]), "obligations": list(tree["obligations"])}

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON: the decision's id, which ledger entries refer to."""
        return sha256_hex(canonical_json(self.as_json()))


def decide(terms: TermsStatement | None, teacher_licence: str | None) -> Verdict:
    """The verdict on learning from a teacher under `terms`, whose model card declares `teacher_licence` (None where it declares none)."""
    if terms is None:
        return _missing_terms(teacher_licence)
    if terms.distillation == "denied":
        return Verdict(
            outcome="deny",
            reasons=(
                Reason(
                    clause=f"{terms.licence} does not let outputs train another model",
                    source=_SOURCE,
                    evidence=terms.evidence,
                    what_would_change_it="a written permission from the teacher's owner, or another teacher",
                ),
            ),
        )
    if _contradicted(terms.licence, teacher_licence):
        assert teacher_licence is not None
        return _contradiction(terms, teacher_licence)
    if terms.distillation == "unknown":
        return _unknown(
            terms, "what it says about training on outputs is not known", f"May outputs under {terms.licence} train another model for your purpose?"
        )
    if terms.distillation == "allowed-with-obligations" and not terms.obligations:
        return _unknown(
            terms, "it allows training on outputs under obligations that are not named", f"Which obligations does {terms.licence} lay on the student?"
        )
    return Verdict(
        outcome="allow-with-obligations" if terms.obligations else "allow",
        reasons=(
            Reason(
                clause=f"{terms.licence} lets outputs train another model{' under obligations' if terms.obligations else ''}",
                source=_SOURCE,
                evidence=terms.evidence,
                what_would_change_it="other terms: another revision of the teacher, another way of reaching it, or another purpose",
            ),
        ),
        obligations=terms.obligations,
    )


def require(verdict: Verdict) -> None:
    """Returns only where the verdict allows. Raises EntitlementDenied, or EntitlementUnknown with the question."""
    match verdict.outcome:
        case "allow" | "allow-with-obligations":
            return
        case "deny":
            raise EntitlementDenied(
                "entitlement-denied", found=_told(verdict), do=f"What would change it: {'; '.join(r.what_would_change_it for r in verdict.reasons)}."
            )
        case "unknown":
            raise EntitlementUnknown(
                "entitlement-unknown",
                found=_told(verdict),
                why="a student made without the right to make it cannot be mended later",
                do=f"Answer this in the recipe's `terms`: {verdict.question}",
            )


def _missing_terms(teacher_licence: str | None) -> Verdict:
    declared = f"the model card declares {teacher_licence}" if licence_id(teacher_licence) else "the model card declares no licence"
    return Verdict(
        outcome="unknown",
        reasons=(
            Reason(
                clause="nobody has said what the teacher's terms are",
                source="the recipe has no `terms`",
                evidence=declared,
                what_would_change_it="a `terms` section in the recipe that names the licence and what it says about distillation",
            ),
        ),
        question="Which licence or terms is the teacher under, and may its outputs train another model for your purpose?",
    )


def _unknown(terms: TermsStatement, clause: str, question: str) -> Verdict:
    return Verdict(
        outcome="unknown",
        reasons=(
            Reason(
                clause=f"{terms.licence}: {clause}",
                source=_SOURCE,
                evidence=terms.evidence,
                what_would_change_it="the answer to the question, in the recipe's `terms`",
            ),
        ),
        question=question,
    )


def _contradicted(stated: str, declared: str | None) -> bool:
    one, other = licence_id(stated), licence_id(declared)
    return one is not None and other is not None and one != other


def _contradiction(terms: TermsStatement, declared: str) -> Verdict:
    question = f"Is the teacher under {terms.licence}, as the recipe says, or under {declared}, as its model card does?"
    return Verdict(
        outcome="unknown",
        reasons=(
            Reason(
                clause=f"the teacher's model card declares {declared}, and not {terms.licence}",
                source="the teacher's model card",
                evidence=f"licence id {declared!r} in the card; the recipe rests on {terms.evidence}",
                what_would_change_it="one licence in both places, with what it says about distillation",
            ),
        ),
        question=question,
    )


def _told(verdict: Verdict) -> str:
    return "; ".join(f"{reason.clause} ({reason.source}; {reason.evidence})" for reason in verdict.reasons)
