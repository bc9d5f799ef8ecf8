"""What was fixed before, and when: a chain of entries to which an owner adds, and whose last hash somebody else holds.

`registration.jsonl` has one line per entry, `{"entry": {...}, "hash": "..."}` in canonical JSON, hashed and chained as the ledger's lines are
(`stillroom.ledger.chain`). Every entry has version, sequence, previous, time and kind:

    begun    owner: who registers; purpose: a sentence
    secret   name; scheme: what it is for; commitment: what is published of it. Before it is used in serving
    plan     name; plan: the fields of a `Plan`; suspect: who is to be tested, and how they are asked; prompts_sha256: of the questions, or null.
             After its secrets, and before the first question
    sealed   alpha: of all plans together; correction: "holm". After it nothing

**Who holds the hash decides what it proves.** A file that one party keeps can be written anew by that party, with other times and other secrets. So
the head is given away whenever something is added: to a notary, a journal, a public log, the other side's lawyer. A secret of which no head was held
proves nothing that its owner could not have made up. One whose entry is covered by a head that was held before the suspect was trained can have been
chosen to fit it only so far as it does what a model did that existed then; one that depends on a public random number of a later time, not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from stillroom.core import durable
from stillroom.core.clock import Clock, iso, now
from stillroom.core.errors import GuardError
from stillroom.core.identities import Json
from stillroom.guard.detector import Plan
from stillroom.ledger.chain import EMPTY, Head

VERSION = 1
_COMMON = frozenset({"version", "sequence", "previous", "time", "kind"})
_TEXTS: dict[str, tuple[str, ...]] = {
    "begun": ("owner", "purpose"),
    "secret": ("name", "scheme", "commitment"),
    "plan": ("name", "suspect"),
    "sealed": ("correction",),
}
_OTHERS = {"begun": frozenset[str](), "secret": frozenset[str](), "plan": frozenset({"plan", "prompts_sha256"}), "sealed": frozenset({"alpha"})}


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """The entries of a registration, each with its hash, verified; `plans` by name, in order; `alpha` once it is sealed."""

    entries: tuple[Json, ...]
    hashes: tuple[str, ...]
    plans: Mapping[str, Plan]
    alpha: float | None

    @property
    def head(self) -> str:
        """The hash of the last entry: what somebody else is to hold. 64 zeros where there is none."""
        return self.hashes[-1] if self.hashes else EMPTY.hash

    @classmethod
    def read(cls, data: bytes, name: str = "registration.jsonl") -> Registered:
        """The registration in a file's bytes. Raises GuardError 'guard-evidence' that names the first line at fault."""
        entries: list[Json] = []
        heads = [EMPTY]
        plans: dict[str, Plan] = {}
        for number, line in enumerate(data.splitlines(keepends=True), start=1):
            entry, head = _parsed(line, heads[-1], f"line {number} of {name}")
            _require_order(entry, entries, f"line {number} of {name}")
            if entry["kind"] == "plan":
                plans[entry["name"]] = Plan.from_json(entry["plan"])
            entries.append(entry)
            heads.append(head)
        alpha = entries[-1]["alpha"] if entries and entries[-1]["kind"] == "sealed" else None
        return cls(entries=tuple(entries), hashes=tuple(head.hash for head in heads[1:]), plans=plans, alpha=alpha)


class Registration:
    """A registration that is added to, by one process at a time. Each method returns the new head, which is to be given away."""

    def __init__(self, path: Path, clock: Clock, registered: Registered) -> None:
        self._path, self._clock, self._registered = path, clock, registered

    @classmethod
    def begin(cls, path: Path, *, owner: str, purpose: str, clock: Clock = now) -> Registration:
        """A new one. Raises GuardError 'guard-evidence' where `path` exists."""
        if path.exists():
            _refuse(f"{path} exists", "a new file: a registration is added to, and never begun again")
        registration = cls(path, clock, Registered.read(b""))
        registration._add("begun", {"owner": owner, "purpose": purpose})
        return registration

    @classmethod
    def open(cls, path: Path, clock: Clock = now) -> Registration:
        """One that was begun. A line torn by a crash is cut off: its head had not been returned. Raises GuardError 'guard-evidence'."""
        if not path.exists():
            _refuse(f"{path} does not exist", "a registration that was begun")
        durable.repair_tail(path)
        return cls(path, clock, Registered.read(path.read_bytes(), str(path)))

    @property
    def registered(self) -> Registered:
        return self._registered

    def commit(self, name: str, *, scheme: str, commitment: str) -> str:
        """Registers a secret by its commitment: before it is used."""
        return self._add("secret", {"name": name, "scheme": scheme, "commitment": commitment})

    def plan(self, name: str, plan: Plan, *, suspect: str, prompts_sha256: str | None = None) -> str:
        """Registers a test: after its secrets, before the suspect is asked. Raises GuardError 'guard-evidence' where a secret is not registered."""
        return self._add("plan", {"name": name, "plan": plan.as_json(), "suspect": suspect, "prompts_sha256": prompts_sha256})

    def seal(self, *, alpha: float) -> str:
        """Closes the family: the tests registered, and no others, err with probability at most `alpha` together."""
        return self._add("sealed", {"alpha": alpha, "correction": "holm"})

    def _add(self, kind: str, facts: Json) -> str:
        line, _ = Head(len(self._registered.entries), self._registered.head).follow(
            {"version": VERSION, "time": iso(self._clock()), "kind": kind, **facts}
        )
        kept = self._path.read_bytes() if self._path.exists() else b""
        self._registered = Registered.read(kept + line.encode() + b"\n", str(self._path))  # refuses what would not be read again
        durable.append_lines(self._path, [line])
        return self._registered.head


def _parsed(line: bytes, before: Head, where: str) -> tuple[Json, Head]:
    """The entry of a line that follows from the one before, has the fields of its kind, and is spelled as we spell it; and the head it makes."""
    try:
        entry = json.loads(line)["entry"]
        spelled, head = before.follow({name: value for name, value in entry.items() if name not in ("sequence", "previous")})
    except (AttributeError, TypeError, KeyError, ValueError, RecursionError):
        spelled, head = "", before
    if not spelled or spelled.encode() + b"\n" != line:
        _refuse(f"{where} is not an entry with its hash that follows from the line before it", "the lines as they were written, and no others")
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in _TEXTS or entry.keys() != _COMMON | set(_TEXTS[kind]) | _OTHERS[kind] or entry["version"] != VERSION:
        _refuse(f"{where} is not an entry of version {VERSION}", "the lines as they were written")
    if not all(isinstance(entry[name], str) for name in (*_TEXTS[kind], "time")):
        _refuse(f"{where} has a field that is no text", "the lines as they were written")
    return entry, head


def _require_order(entry: Json, before: list[Json], where: str) -> None:
    """That it comes when its kind may."""
    if (entry["kind"] == "begun") != (not before):
        _refuse(f"{where} begins a registration", "one beginning, at the top")
    if before and before[-1]["kind"] == "sealed":
        _refuse(f"{where} comes after the seal", "nothing after it: tests that are added later have no error rate")
    if any(one["kind"] == entry["kind"] and one.get("name") == entry.get("name") for one in before):
        _refuse(f"{where} is a second {entry['kind']} {entry.get('name')!r}", "one of each name")
    if entry["kind"] == "plan":
        _require_secrets(Plan.from_json(entry["plan"]), before, where)
    if entry["kind"] == "sealed" and not (isinstance(entry["alpha"], float) and 0.0 < entry["alpha"] < 1.0 and entry["correction"] == "holm"):
        _refuse(f"{where} seals at {entry['alpha']!r}", "an alpha between 0 and 1, and Holm's correction")


def _require_secrets(plan: Plan, before: list[Json], where: str) -> None:
    known = {one["commitment"] for one in before if one["kind"] == "secret"}
    if missing := set(plan.commitments) - known:
        _refuse(f"{where} plans with {len(missing)} secrets that were not registered before it", "secrets whose commitments stand above")


def _refuse(found: str, expected: str) -> NoReturn:
    raise GuardError(
        "guard-evidence",
        found=found,
        expected=expected,
        why="only what was fixed before it could be chosen to fit proves anything",
        do="Register first: secrets before serving, tests before asking; and take the file as it was.",
    )
