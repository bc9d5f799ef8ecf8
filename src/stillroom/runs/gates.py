"""The gates of a run: at each the verdict is made anew, kept with the run, and compared with what was decided before.

    decision.json        the latest decision; decision.md says the same to people
    decisions/<sha>.json every decision that the run was made under, by its SHA-256, which ledger entries and the transfer set name

Only decisions that allow are kept: one that does not is raised, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from stillroom.core import durable
from stillroom.core.errors import EntitlementDenied, EntitlementUnknown, RunError
from stillroom.core.identities import Json
from stillroom.entitlement.documents import decision_markdown
from stillroom.entitlement.verdict import Assertion, Obligation, Reason, Verdict
from stillroom.ledger import Ledger
from stillroom.runs.directory import Run
from stillroom.runs.entitling import drift, entitled
from stillroom.runs.observer import Observer

T = TypeVar("T", Reason, Obligation, Assertion)

_PARTS = {"reasons": Reason, "obligations": Obligation, "assertions": Assertion}


class Gates:
    """The decisions of one run, in one process."""

    def __init__(self, run: Run, observer: Observer) -> None:
        self.run, self.observer = run, observer
        self._compared: set[tuple[str, str]] = set()

    def pass_now(self) -> Verdict:
        """Decides with today's date and keeps the decision. Raises EntitlementDenied or EntitlementUnknown where it no longer allows."""
        verdict = entitled(self.run.recipe)
        self.keep(verdict)
        return verdict

    def keep(self, verdict: Verdict) -> None:
        """Makes `verdict`, which allows, the run's latest decision, and tells how it differs from the one before, and what it asks for."""
        assert verdict.allows, "a decision that does not allow is raised and not kept"
        before = read_decision(self.run.decision_path) if self.run.decision_path.exists() else None
        kept = self._kept(verdict.sha256)
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            durable.write_json_atomic(kept, verdict.as_json())
        if before != verdict:
            durable.write_bytes_atomic(self.run.directory / "decision.md", decision_markdown(verdict, name=self.run.recipe.name).encode())
            durable.write_json_atomic(self.run.decision_path, verdict.as_json())
        if before is None or self._tell_drift(before, verdict):
            self._tell(verdict)

    def admit(self, records: Iterable[str], ledger: Ledger) -> Verdict:
        """The gate before records are learned from: today's verdict must allow, and each record's own decision must be kept and have allowed.

        Raises EntitlementDenied, EntitlementUnknown. Tells how today's decision differs from those that the records were collected under.
        """
        verdict = self.pass_now()
        found: dict[str, str] = {}
        for record in records:
            found.setdefault(ledger.decision_of(record), record)
        for digest, record in found.items():
            self._tell_drift(self._require_kept(digest, record), verdict)
        return verdict

    def _require_kept(self, digest: str, record: str) -> Verdict:
        path = self._kept(digest)
        if not path.exists():
            raise EntitlementUnknown(
                "entitlement-unknown",
                found=f"record {record} was collected under the decision {digest}, which is not in {path.parent}",
                expected="a decision that this run has kept",
                why="nobody can tell whether that record may be learned from",
                do="Put that file back from a copy, or collect again in a new directory.",
            )
        decision = read_decision(path)
        if decision.sha256 != digest:
            raise _corrupt(path, f"does not have the SHA-256 that it is named by, but {decision.sha256}")
        if not decision.allows:
            raise EntitlementDenied(
                "entitlement-denied",
                found=f"record {record} was collected under the decision {digest}, whose outcome is {decision.outcome}",
                expected="a decision that allowed it",
                do="Collect again in a new directory, under a decision that allows it.",
            )
        return decision

    def _kept(self, digest: str) -> Path:
        return self.run.decisions_path / f"{digest}.json"

    def _tell_drift(self, then: Verdict, now: Verdict) -> bool:
        """Tells what is different, once a process; whether anything is."""
        pair = (then.sha256, now.sha256)
        if pair in self._compared or pair[0] == pair[1]:
            return False
        self._compared.add(pair)
        lines = drift(then, now)
        for line in lines:
            self.observer.note(f"drift since decision {pair[0][:12]}: {line}")
        return bool(lines)

    def _tell(self, verdict: Verdict) -> None:
        self.observer.note(f"terms: {verdict.outcome}, by the catalogue of {verdict.catalogue}")
        for obligation in verdict.obligations:
            self.observer.note(f"obligation: {obligation.line}")
        for warning in verdict.warnings:
            self.observer.note(f"warning: {warning}")


def read_decision(path: Path) -> Verdict:
    """The verdict in a decision file. Raises RunError 'run-corrupt' where there is none that can be read."""
    tree = durable.read_json(path)
    try:
        parts: dict[str, Any] = {name: tuple(_part(kind, part) for part in tree[name]) for name, kind in _PARTS.items()}
        plain = {field.name: _frozen(tree[field.name]) for field in fields(Verdict) if field.name not in _PARTS}
        return Verdict(**parts, **plain)
    except (TypeError, KeyError, AttributeError) as error:
        raise _corrupt(path, f"is not a decision: {error!r}") from error


def _part(kind: type[T], tree: Json) -> T:
    return kind(**{name: _frozen(value) for name, value in tree.items()})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _corrupt(path: Path, what: str) -> RunError:
    return RunError(
        "run-corrupt",
        found=f"{path} {what}",
        expected="a file as Stillroom wrote it",
        do="Restore the file from a copy, or run again in a new directory.",
    )
