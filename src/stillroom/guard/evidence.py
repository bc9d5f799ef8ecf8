"""The bundle: everything that a finding follows from, so that anybody can follow it without the teacher, and without us.

    registration.jsonl         what was fixed before (`registration`)
    data/NAME/...              what the suspect answered, for the test registered as NAME
    openings.json              {NAME: the secrets, opened}
    calibrations/*.json        the records that the tests are calibrated by
    results.json               the findings, and the family of all registered tests
    limits.md                  what may be said of it, and what not
    manifest.json              {version, files: {path: {bytes, sha256}}}, canonical JSON

It is a directory, or the same in a zip file that is written in one way only, byte for byte. `verify` recomputes all of it: it finds any byte that was
changed, any secret that does not open its commitment, any number that does not follow.

**What verification cannot know.** A bundle is its owner's word, recomputed. That the answers came from the suspect, its model will show when asked
again (`respondent`). That secrets and tests were fixed before, only a hash shows that somebody else held: without one an owner could have written the
whole bundle this morning, with triggers that the suspect answers so anyway (Liu et al., USENIX Security 2024). `verify` says so whenever it was given
none.

A module adds a test to `RECOMPUTED` with one line.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

from stillroom import __version__
from stillroom.core import durable
from stillroom.core.errors import GuardError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.guard import calibration, canaries, radioactivity, twins
from stillroom.guard.calibration import CalibrationRecord
from stillroom.guard.detector import CLAIMS, NEGATIVE, Finding, Plan, power_of_ten
from stillroom.guard.multiplicity import holm
from stillroom.guard.registration import Registered

VERSION = 1
REGISTRATION, OPENINGS, RESULTS, LIMITS, MANIFEST = "registration.jsonl", "openings.json", "results.json", "limits.md", "manifest.json"
# The last digits of a transcendental function differ between builds of numpy and scipy; nothing else may.
_LAST_DIGITS = 1e-9
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_PLAIN = re.compile("[A-Za-z0-9_-][A-Za-z0-9._-]*")

Files = Mapping[str, bytes]


class Finds(Protocol):
    """The finding of a test out of its plan, its opening and its files. What cannot be read raises a GuardError."""

    def __call__(self, plan: Plan, opening: object, data: Files) -> Finding: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """How a test is recomputed; what an opening of its secrets commits to; and how whoever has the model repeats it (`AGAIN` of its module)."""

    commitments: Callable[[object], tuple[str, ...]]
    finds: Finds
    again: str


RECOMPUTED: dict[str, Recomputed] = {
    canaries.HITS: Recomputed(commitments=canaries.commitments, finds=canaries.recompute, again=canaries.AGAIN),
    canaries.EXPOSURE: Recomputed(commitments=canaries.commitments, finds=canaries.recompute, again=canaries.AGAIN),
    twins.TWINS: Recomputed(commitments=twins.commitments, finds=twins.recompute, again=twins.AGAIN),
    twins.BY_GROUP: Recomputed(commitments=twins.commitments, finds=twins.recompute, again=twins.AGAIN),
    radioactivity.TEST: Recomputed(commitments=radioactivity.commitments, finds=radioactivity.recompute, again=radioactivity.AGAIN),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What belongs to one registered test: its secrets opened, and its files by name."""

    opening: Json = field(repr=False)
    data: Files


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was verified, whether it holds, and what was found."""

    name: str
    holds: bool
    found: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `verify` found. `notes` are what a reader has to know though nothing is wrong; `bundle_sha256` is that of the manifest."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    bundle_sha256: str | None

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    @property
    def failures(self) -> tuple[str, ...]:
        return tuple(f"{check.name}: {check.found}" for check in self.checks if not check.holds)


def write(
    directory: Path,
    registration: bytes,
    submissions: Mapping[str, Submission],
    records: Iterable[CalibrationRecord] = (),
    *,
    tests: Mapping[str, Recomputed] = RECOMPUTED,
) -> str:
    """Computes the findings, writes the bundle as a new directory, and returns its digest, the SHA-256 of its manifest.

    `registration` is the file, sealed. A registered test without a submission stays in the family as one that was not run. Raises GuardError
    'guard-evidence' or 'guard-plan'; then nothing is written.
    """
    if directory.exists():
        _refuse(f"{directory} exists", "a new directory")
    registered = Registered.read(registration)
    if registered.alpha is None:
        _refuse("a registration that is not sealed", "one that is: the family of tests is fixed before the data")
    if unknown := sorted(set(submissions) - set(registered.plans)):
        _refuse(f"a submission to {unknown[0]!r}, which was not registered", "only what was registered")
    if unsafe := sorted(
        name for name in (*registered.plans, *(file for one in submissions.values() for file in one.data)) if not _PLAIN.fullmatch(name)
    ):
        _refuse(f"a test or a file called {unsafe[0]!r}", "a name of letters, digits, '-', '_' and '.'")
    used = [record for plan in registered.plans.values() if (record := _record_for(plan, records)) is not None]
    openings = {name: submission.opening for name, submission in submissions.items()}
    contents = {
        REGISTRATION: registration,
        OPENINGS: canonical_json(openings),
        **{f"data/{name}/{file}": data for name, submission in submissions.items() for file, data in submission.data.items()},
        **{f"calibrations/{record.calibrated_as}.json": record.as_bytes for record in used},
    }
    findings = {
        name: _found(name, plan, submissions[name].opening, submissions[name].data, used, tests) if name in submissions else _not_run(plan)
        for name, plan in registered.plans.items()
    }
    contents[RESULTS] = canonical_json(_results(registered, findings))
    contents[LIMITS] = limits(registered, findings).encode()
    contents[MANIFEST] = _manifest(contents)
    _publish(directory, contents)
    return sha256_hex(contents[MANIFEST])


def archive(directory: Path, path: Path) -> None:
    """Writes the bundle in `directory` to a zip file, always the same bytes. Raises GuardError 'guard-evidence' where it is none."""
    durable.write_bytes_atomic(path, _zipped(_read(directory)))


def verify(
    path: Path, *, held: Sequence[str] = (), tests: Mapping[str, Recomputed] = RECOMPUTED, known: Iterable[CalibrationRecord] = ()
) -> Verification:
    """Recomputes a bundle, a directory or a zip file, and says of each thing whether it holds.

    `held` are hashes that somebody else got from the owner: heads of the registration, or the digest of the bundle. `known` are records of
    calibration that the reader has from elsewhere and trusts, beside those that come with Stillroom. Raises GuardError 'guard-evidence' where there
    is nothing at `path` that could be a bundle; whatever is in the files, it raises nothing.
    """
    try:
        contents = _read(path)
    except GuardError as error:
        if not path.exists():
            raise
        return Verification(checks=(Check("files", False, error.found),), notes=(), bundle_sha256=None)
    checks = _checked_files(path, contents)
    digest = sha256_hex(contents.get(MANIFEST, b""))
    if not all(check.holds for check in checks):
        return Verification(checks=tuple(checks), notes=(), bundle_sha256=digest)
    notes: list[str] = []
    try:
        bundle = _parsed(contents)
        _require(bundle.registered.alpha is not None, "the registration is not sealed")
        checks.append(Check("registration", True, f"{len(bundle.registered.entries)} entries, head {bundle.registered.head}"))
        checks += _checked_held(bundle.registered, digest, held, notes)
        checks += _checked_contents(bundle, tests, known, notes)
    except Exception as error:  # a bundle comes from an adversary: whatever it makes of us is a bundle that does not hold
        checks.append(Check("contents", False, _why(error)))
    return Verification(checks=tuple(checks), notes=tuple(notes), bundle_sha256=digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A bundle whose files are as they were written. That its results follow from them, `verify` says."""

    registered: Registered
    openings: Json
    results: Json
    contents: Files

    def data(self, name: str) -> dict[str, bytes]:
        """The files of the test registered as `name`."""
        begin = f"data/{name}/"
        return {file.removeprefix(begin): data for file, data in self.contents.items() if file.startswith(begin)}


def opened(path: Path) -> Opened:
    """Reads a bundle, without recomputing. Raises GuardError 'guard-evidence' where a file is not as it was written."""
    contents = _read(path)
    if failed := [check for check in _checked_files(path, contents) if not check.holds]:
        _refuse(f"{failed[0].name}: {failed[0].found}", "a bundle as it was written")
    return _parsed(contents)


def _parsed(contents: Files) -> Opened:
    """Raises GuardError 'guard-evidence'."""
    try:
        registered = Registered.read(contents[REGISTRATION])
        openings, results = _json(contents[OPENINGS]), _json(contents[RESULTS])
        _require(isinstance(results["findings"], dict) and isinstance(results["family"], dict), "results.json has no findings")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        _refuse(_why(error), "a bundle as it was written")
    return Opened(registered=registered, openings=openings, results=results, contents=contents)


def rerun(path: Path, name: str, data: Files, *, tests: Mapping[str, Recomputed] = RECOMPUTED) -> Finding:
    """The test registered as `name` over other data, such as what the accused collected from their own model, with the secrets that the bundle opens.

    Raises GuardError 'guard-evidence' where the bundle does not hold or has no such test.
    """
    bundle = opened(path)
    if name not in bundle.openings:
        _refuse(f"no test called {name!r} with its secrets", f"one of {', '.join(bundle.openings)}")
    return _found(name, bundle.registered.plans[name], bundle.openings[name], data, _records(bundle.contents), tests)


def limits(registered: Registered, findings: Mapping[str, Finding]) -> str:
    """What may be said of each finding, in sentences that can be quoted, and what not."""
    adjusted, rejected = _family(registered, findings)
    lines = ["# What this evidence may claim", ""]
    for name, finding in findings.items():
        plan, entry = finding.plan, next(one for one in registered.entries if one["kind"] == "plan" and one["name"] == name)
        lines += [f"## {name}", "", f"Test: {plan.test}. Suspect: {entry['suspect']}.", "", f"Null: {CLAIMS[plan.null].null}", ""]
        if finding.refused is not None:
            lines += [f"No p: {finding.refused}. Nothing may be claimed.", ""]
        elif finding.alarm is not None:
            lines += [f"Alarm: {finding.alarm}. Nothing may be claimed.", ""]
        elif name in rejected:
            lines += [
                f"If the null were true, data this extreme would occur with probability at most {finding.p_text}; corrected for the "
                f"{len(findings)} registered tests, {power_of_ten(adjusted[name])}. The null is rejected at {registered.alpha}.",
                "",
                f"This proves: {CLAIMS[plan.null].proves}",
                "",
                f"It does not prove: {CLAIMS[plan.null].does_not_prove}",
                "",
            ]
        else:
            lines += [f"The null is not rejected at {registered.alpha} (p {finding.p_text}, corrected {power_of_ten(adjusted[name])}).", ""]
    return "\n".join([*lines, NEGATIVE, ""])


# --- results ------------------------------------------------------------------------------------------------------------------------


def _found(name: str, plan: Plan, opening: object, data: Files, records: Sequence[CalibrationRecord], tests: Mapping[str, Recomputed]) -> Finding:
    """The finding as it may be reported. Refuses a test that is not known and secrets that do not open their commitments."""
    if plan.test not in tests:
        _refuse(f"a test {plan.test!r}", f"one that can be recomputed here: {', '.join(sorted(tests))}")
    if tests[plan.test].commitments(opening) != plan.commitments:
        _refuse(f"secrets of {name!r} that are not those that were committed to", "the secrets of its plan, in order")
    return calibration.reported(tests[plan.test].finds(plan, opening, data), records, with_packaged=False)


def _not_run(plan: Plan) -> Finding:
    return Finding(plan=plan, statistic=None, scored=0, refused="the test was registered and was not run")


def _family(registered: Registered, findings: Mapping[str, Finding]) -> tuple[dict[str, float], list[str]]:
    """Holm's adjusted ln p of every registered test, and which are rejected. A finding with an alarm, or without p, counts as p = 1."""
    assert registered.alpha is not None, "a family is sealed"
    usable = {name: finding.log_p if finding.refused is None and finding.alarm is None else None for name, finding in findings.items()}
    adjusted = holm(usable)
    return adjusted, [name for name, log_p in adjusted.items() if log_p <= math.log(registered.alpha)]


def _results(registered: Registered, findings: Mapping[str, Finding]) -> Json:
    adjusted, rejected = _family(registered, findings)
    return {
        "version": VERSION,
        "stillroom": __version__,
        "arithmetic": calibration.arithmetic(),
        "findings": {name: finding.as_json() for name, finding in findings.items()},
        "family": {"alpha": registered.alpha, "correction": "holm", "adjusted_log_p": adjusted, "rejected": sorted(rejected)},
    }


def _record_for(plan: Plan, records: Iterable[CalibrationRecord]) -> CalibrationRecord | None:
    return next((record for record in records if record.calibrated_as == plan.calibrated_as), None) or calibration.packaged(plan)


def _records(contents: Files) -> list[CalibrationRecord]:
    records = {name: CalibrationRecord.from_bytes(data, name) for name, data in contents.items() if name.startswith("calibrations/")}
    _require(
        all(name == f"calibrations/{record.calibrated_as}.json" for name, record in records.items()), "a record of calibration has another's name"
    )
    return list(records.values())


# --- verification -------------------------------------------------------------------------------------------------------------------


def _checked_files(path: Path, contents: Files) -> list[Check]:
    """That the files are those of the manifest, which is spelled in one way only; and that a zip file is, too."""
    checks = []
    try:
        if path.is_file():
            same = _zipped(contents) == path.read_bytes()
            checks.append(Check("archive", same, "" if same else "the zip file is not as it was written"))
        manifest = _json(contents.get(MANIFEST, b""))
        told = manifest["files"]
        _require(manifest.keys() == {"version", "files"} and manifest["version"] == VERSION, f"it is not of version {VERSION}")
        _require(canonical_json(manifest) == contents[MANIFEST], "it is not as it was written")
        _require({REGISTRATION, OPENINGS, RESULTS, LIMITS} <= told.keys(), "a file that belongs to a bundle is not in it")
    except Exception as error:  # it may be anything
        return [*checks, Check("manifest", False, _why(error))]
    checks.append(Check("manifest", True, f"{len(told)} files"))
    for name in sorted(told.keys() | (contents.keys() - {MANIFEST})):
        if name not in told:
            checks.append(Check(f"file {name}", False, "it is not in the manifest"))
        elif name not in contents:
            checks.append(Check(f"file {name}", False, "it is missing"))
        else:
            same = told[name] == {"bytes": len(contents[name]), "sha256": sha256_hex(contents[name])}
            checks.append(Check(f"file {name}", same, "" if same else "it is not as it was written"))
    return checks


def _checked_held(registered: Registered, digest: str, held: Sequence[str], notes: list[str]) -> list[Check]:
    """That what somebody else holds is of this bundle; and up to where it covers the registration."""
    checks, covered = [], -1
    for one in held:
        if one == digest:
            checks.append(Check(f"held elsewhere {one}", True, "the digest of this bundle"))
        elif one in registered.hashes:
            place = registered.hashes.index(one)
            covered = max(covered, place)
            checks.append(
                Check(f"held elsewhere {one}", True, f"covers the registration up to its entry {place} of {registered.entries[place]['time']}")
            )
        else:
            checks.append(Check(f"held elsewhere {one}", False, "it is no head of this registration: what was registered then was something else"))
    if covered < len(registered.hashes) - 1:
        uncovered = [f"{one['kind']} {one.get('name', '')}".strip() for one in registered.entries[covered + 1 :]]
        notes.append(
            f"No hash that somebody else held shows when this was fixed: {', '.join(uncovered)}. The times are the owner's word; an owner could have written it "
            "after asking the suspect."
        )
    return checks


def _checked_contents(bundle: Opened, tests: Mapping[str, Recomputed], known: Iterable[CalibrationRecord], notes: list[str]) -> list[Check]:
    registered, openings, results = bundle.registered, bundle.openings, bundle.results
    records = _records(bundle.contents)
    checks: list[Check] = []
    _require(openings.keys() <= registered.plans.keys(), "an opening of something that was not registered")
    findings: dict[str, Finding] = {}
    exact = results.get("arithmetic") == calibration.arithmetic()
    for name, plan in registered.plans.items():
        try:
            findings[name] = _found(name, plan, openings[name], bundle.data(name), records, tests) if name in openings else _not_run(plan)
            checks.append(_compared(f"result of {name}", results["findings"][name], findings[name].as_json(), exact, notes))
        except Exception as error:  # as above
            checks.append(Check(f"result of {name}", False, f"it cannot be recomputed: {_why(error)}"))
    checks += _checked_records(records, results, findings, known, notes)
    if len(findings) == len(registered.plans):
        checks.append(_compared("family", results["family"], _results(registered, findings)["family"], exact, notes))
        told = limits(registered, findings).encode() == bundle.contents[LIMITS]
        checks.append(Check("limits", told, "" if told else "limits.md does not say what follows from the results"))
    told_keys = (
        results.keys() == {"version", "stillroom", "arithmetic", "findings", "family"} and results["findings"].keys() == registered.plans.keys()
    )
    checks.append(Check("results", told_keys, "" if told_keys else "results.json has other fields than results have"))
    return checks


def _checked_records(
    records: Sequence[CalibrationRecord], results: Json, findings: Mapping[str, Finding], known: Iterable[CalibrationRecord], notes: list[str]
) -> list[Check]:
    """That a p is told only where the record passes. Of one that the reader has from nowhere else a note says so."""
    trusted = {record.sha256 for record in known}
    checks = []
    for record in records:
        names = [name for name, finding in findings.items() if finding.plan.calibrated_as == record.calibrated_as]
        said = [results["findings"].get(name) for name in names]
        told = any(isinstance(one, dict) and one.get("refused") is None for one in said)
        checks.append(Check(f"calibration {record.calibrated_as}", record.passes or not told, "; ".join(record.failures)))
        own = calibration.packaged(findings[names[0]].plan) if names else None
        if record.sha256 not in trusted and (own is None or own.sha256 != record.sha256):
            notes.append(f"The calibration of {record.test} is the owner's own word: it does not come with Stillroom, and can be run again.")
    return checks


def _compared(name: str, told: object, follows: object, exact: bool, notes: list[str]) -> Check:
    """`told` is what the bundle says and `follows` what was computed; where the arithmetic is of other versions, floats may differ in the last
    digits.
    """
    spelled = json.loads(canonical_json(follows))
    if canonical_json(told) == canonical_json(spelled):
        return Check(name, True, "bit-equal")
    if not exact and _close(told, spelled):
        notes.append(f"{name}: equal to nine digits; the last ones depend on versions of numpy and scipy, which are others here.")
        return Check(name, True, "equal to nine digits")
    return Check(name, False, "what the bundle says does not follow from what is in it")


def _close(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_close, a, b))
    if isinstance(a, float | int) and isinstance(b, float) and not isinstance(a, bool):
        return math.isclose(a, b, rel_tol=_LAST_DIGITS)
    return type(a) is type(b) and a == b


# --- files --------------------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, bytes]:
    """Every file of a bundle by its path. Raises GuardError 'guard-evidence' where there is something else than plain files."""
    if path.is_dir() and not (path / MANIFEST).is_file():
        _refuse(f"{path} has no {MANIFEST}", "a bundle")  # so that no other directory is read through
    try:
        return _unzipped(path.read_bytes()) if path.is_file() else dict(_walked(path))
    except OSError as error:
        _refuse(f"{path}: {error.strerror or error}", "a bundle")


def _walked(directory: Path) -> Iterable[tuple[str, bytes]]:
    def failed(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(directory, onerror=failed):
        for name in [*folders, *names]:
            file = Path(folder) / name
            mode = file.lstat().st_mode
            if stat.S_ISREG(mode):
                yield file.relative_to(directory).as_posix(), file.read_bytes()
            elif not stat.S_ISDIR(mode):
                _refuse(f"{file} is neither a file nor a folder", "a bundle, which has nothing else")


def _unzipped(data: bytes) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            members = file.infolist()
            stored = all(one.compress_type == zipfile.ZIP_STORED and one.file_size == one.compress_size for one in members)
            if not stored or sum(one.file_size for one in members) > len(data) or len({one.filename for one in members}) != len(members):
                _refuse("a zip file that we did not write", "one in which files are stored as they are")
            return {one.filename: file.read(one) for one in members}
    except GuardError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds for a file that was changed
        _refuse(f"a zip file that cannot be read: {_why(error)}", "a bundle")


def _zipped(contents: Files) -> bytes:
    """Stored, sorted, of one time and mode: no choice is left that could change a byte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name in sorted(contents):
            member = zipfile.ZipInfo(name, _ZIP_TIME)
            member.create_system, member.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            file.writestr(member, contents[name])
    return buffer.getvalue()


def _manifest(contents: Files) -> bytes:
    files = {name: {"bytes": len(data), "sha256": sha256_hex(data)} for name, data in contents.items()}
    return canonical_json({"version": VERSION, "files": files})


def _publish(directory: Path, contents: Files) -> None:
    """Writes all files beside, then gives the directory its name: a bundle is whole or absent."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with durable.full_disk_reported(directory):
        for name, data in contents.items():
            file = partial / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    durable.replace_directory(partial, directory)


def _json(data: bytes) -> Json:
    """A JSON object that is spelled canonically. Raises GuardError 'guard-evidence'."""
    tree = json.loads(data)
    _require(isinstance(tree, dict) and canonical_json(tree) == data, "a file is not canonical JSON")
    return dict(tree)


def _why(error: Exception) -> str:
    return error.found if isinstance(error, GuardError) else f"{type(error).__name__}: {error}"[:200]


def _require(holds: bool, found: str) -> None:
    if not holds:
        _refuse(found, "a bundle as it was written")


def _refuse(found: str, expected: str) -> NoReturn:
    raise GuardError(
        "guard-evidence",
        found=found,
        expected=expected,
        why="evidence that is not whole accuses somebody of something that nobody can check",
        do="Take the bundle as its owner wrote it, or write it again from what was registered.",
    )
