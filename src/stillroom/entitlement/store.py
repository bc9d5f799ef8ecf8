"""The user's own terms: records added to ours, texts confirmed, authorisations attached. docs/reference/terms.md documents the files.

    records/*.yaml        catalogue files that the user added
    confirmations.jsonl   who confirmed the text of which record, when, and until when that holds; the last line about a record counts
    texts/<sha256>        the confirmed texts, byte for byte: the user's evidence, readable by nobody else

Nothing is created by reading. A file is replaced whole or not at all, and what cannot be read is an error, never passed over.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from difflib import get_close_matches
from itertools import chain, count
from pathlib import Path
from typing import Any

from stillroom.core import durable
from stillroom.core.errors import EntitlementError, RunError
from stillroom.core.hashing import sha256_file, sha256_hex
from stillroom.entitlement.library import Catalogue, builtin, references
from stillroom.entitlement.reading import read_terms
from stillroom.entitlement.records import CatalogueFile, Record
from stillroom.entitlement.verdict import Attached, Confirmation

# A text that can be changed under its address is looked at again after a quarter of a year.
REVIEW_DAYS = 90
# A fixed text does not change, so its confirmation never turns stale; the date only says when to ask again whether its reader still reads it so: in ten years.
FIXED_REVIEW_DAYS = 3652

_PRIVATE_FILE, _PRIVATE_FOLDER = 0o600, 0o700
_FIELDS = ("record", "text_sha256", "confirmed_by", "confirmed_on", "review_by")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_LOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class TermsStore:
    """The directory of the user's own terms, which need not exist. Methods raise EntitlementError 'terms-missing' or 'terms-invalid'."""

    directory: Path

    @classmethod
    def open(cls, path: Path | None = None) -> TermsStore:
        """The store at `path`, or where this user's store is: STILLROOM_TERMS, else the platform's place for a user's data."""
        return cls(path if path is not None else _default_directory())

    # --- reading ----------------------------------------------------------------------------------------------------------------------

    def catalogue(self) -> Catalogue:
        """Our catalogue with the user's records laid over it."""
        own = self._own_files()
        return builtin().overlaid(own.values()) if own else builtin()

    def confirmations(self) -> dict[str, Confirmation]:
        """By record, the confirmation that was recorded last."""
        return {found.record: found for found in self._recorded()}

    def text_of(self, record_id: str) -> bytes | None:
        """The confirmed text of a record; None where none is confirmed or its copy was removed. An error where the copy was changed."""
        confirmed = self.confirmations().get(record_id)
        if confirmed is None:
            return None
        path = self._texts / confirmed.text_sha256
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(path, error) from error
        if sha256_hex(text) != confirmed.text_sha256:
            raise EntitlementError(
                "terms-invalid",
                found=f"{path} has another digest than its name says",
                expected=f"the text of {record_id} as {confirmed.confirmed_by} confirmed it on {confirmed.confirmed_on}",
                do="Put the text back from a copy, or confirm it again: stillroom terms confirm.",
            )
        return text

    def validated(self, path: Path) -> CatalogueFile:
        """The content of a file of the user's, once it is known to be sound and to fit what is on file.

        Raises EntitlementError: what `read_terms` raises; two records with one id; a name that no record has; and of an authorisation, that its
        document is not there or has another digest than it says.
        """
        file, catalogue = self._fitting(path)
        for one in attached([path]) if file.authorisations else ():
            _check_authorisation(path, one, catalogue)
        return file

    def _fitting(self, path: Path) -> tuple[CatalogueFile, Catalogue]:
        """A file, and the catalogue with it laid over the user's other files."""
        file = read_terms(path)
        if file == CatalogueFile():
            raise _invalid(f"{path} has nothing in it", "records, models, aliases or authorisations", "Check that it is the right file.")
        _refuse_clash(path, file, {})
        catalogue = self.catalogue()
        _check_references(path, file, catalogue)
        return file, catalogue.overlaid([file])

    # --- writing ----------------------------------------------------------------------------------------------------------------------

    def add(self, path: Path) -> tuple[str, ...]:
        """Copies a file of records into the store once it is known to be sound and to fit; the ids of its records, sorted.

        A record with the id of one of ours takes its place. Adding a file a second time does nothing. An error where a record is already in
        another file of the user's, or where the file holds authorisations, which belong beside their documents.
        """
        added, _ = self._fitting(path)
        _refuse_authorisations(path, added)
        data = _bytes_of(path)
        with self._locked():
            own = self._own_files()
            if not any(_bytes_of(there) == data for there in own):
                _refuse_clash(path, added, own)
                builtin().overlaid([*own.values(), added])  # raises where it does not fit
                self._write(self._free_name(path.stem), data)
        return tuple(sorted(record.id for record in added.records))

    def confirm(self, record_id: str, text: Path, by: str, today: date) -> Confirmation:
        """Records that `by` has read `text` today and that it is the text that the record `record_id` was written from; keeps a copy.

        It holds for REVIEW_DAYS, and FIXED_REVIEW_DAYS for a fixed text. Whether the digest is that of the record, where it has one, is for the
        caller to compare and to tell: a text with another digest is recorded too, and the verdict does not rely on it.
        """
        record = self.catalogue().records.get(record_id)
        if record is None:
            raise no_such_record(record_id, self.catalogue())
        data = _bytes_of(text)
        if not data.strip():
            raise _invalid(f"{text} is empty", f"the text of {record.title}", f"Save what {record.url} says as a file, and give that file.")
        reader = " ".join(by.split())
        if not reader or not _is_text(reader):
            raise _invalid(f"{by!r} as the name of who confirms", "a name", "Give it with --by NAME.")
        confirmation = Confirmation(
            record=record_id,
            text_sha256=sha256_hex(data),
            confirmed_by=reader,
            confirmed_on=today,
            review_by=today + timedelta(days=FIXED_REVIEW_DAYS if record.fixed else REVIEW_DAYS),
        )
        with self._locked():
            lines = [_line(found) for found in (*self._recorded(), confirmation)]
            # The text first: a confirmation never stands without it.
            self._write(self._texts / confirmation.text_sha256, data)
            self._write(self._log, "".join(lines).encode())
        return confirmation

    # --- files ------------------------------------------------------------------------------------------------------------------------

    @property
    def _records(self) -> Path:
        return self.directory / "records"

    @property
    def _texts(self) -> Path:
        return self.directory / "texts"

    @property
    def _log(self) -> Path:
        return self.directory / "confirmations.jsonl"

    def _own_files(self) -> dict[Path, CatalogueFile]:
        """Every file that the user added. An error where two of them have one record, or where one cannot be read."""
        found: dict[Path, CatalogueFile] = {}
        try:
            paths = sorted(path for path in self._records.iterdir() if path.suffix in (".yaml", ".yml"))
        except FileNotFoundError:
            return found
        except OSError as error:
            raise _unreadable(self._records, error) from error
        for path in paths:
            file = read_terms(path)
            if file.authorisations:
                raise _invalid(
                    f"{path} holds authorisations", "records, models or aliases", "Name it in the recipe's `terms.authorisations` instead."
                )
            _refuse_clash(path, file, found)
            found[path] = file
        return found

    def _recorded(self) -> list[Confirmation]:
        """Every line of the log, the oldest first."""
        try:
            data = self._log.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unreadable(self._log, error) from error
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        return [_parsed(line, f"{self._log}:{number}") for number, line in enumerate(lines, start=1)]

    def _free_name(self, stem: str) -> Path:
        names = (f"{stem}{suffix}.yaml" for suffix in chain([""], (f"-{number}" for number in count(2))))
        return next(path for name in names if not (path := self._records / name).exists())

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=_PRIVATE_FOLDER)
            durable.write_bytes_atomic(path, data, mode=_PRIVATE_FILE)
        except OSError as error:
            raise _unwritable(path, error) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes from writing; waits a little for one that does. Raises RunError 'run-locked'."""
        with ExitStack() as held:
            try:
                self.directory.mkdir(parents=True, exist_ok=True, mode=_PRIVATE_FOLDER)
                _enter(held, self.directory)
            except OSError as error:
                raise _unwritable(self.directory, error) from error
            yield


def attached(paths: Iterable[Path | str]) -> tuple[Attached, ...]:
    """Every authorisation in these files, with the digest of the document that lies where it says, None where none does.

    Raises EntitlementError: a file that cannot be read, that holds something else than authorisations, or an id that stands twice.
    """
    found: dict[str, Attached] = {}
    for path in map(Path, paths):
        file = read_terms(path)
        if not file.authorisations:
            raise _invalid(f"{path} holds no authorisation", "a list `authorisations`", "Check that it is the right file.")
        if file != CatalogueFile(authorisations=file.authorisations):
            raise _invalid(
                f"{path} holds more than authorisations",
                "a list `authorisations` alone",
                "Put the rest into a file of its own: stillroom terms add FILE",
            )
        for authorisation in file.authorisations:
            if authorisation.id in found:
                raise _invalid(f"{path}: a second authorisation {authorisation.id}", "each one once", "Remove one, or name it otherwise.")
            found[authorisation.id] = Attached(authorisation=authorisation, found_sha256=_digest_of(path.parent / authorisation.document))
    return tuple(found.values())


def record_named(name: str, catalogue: Catalogue, today: date) -> Record:
    """The record with the id `name`, or the version in force today of the family or licence that `name` stands for.

    Where none is in force it is the last one. Raises EntitlementError: no such record, or several for different people.
    """
    if name in catalogue.records:
        return catalogue.records[name]
    family = catalogue.licence_family(name)
    if family is None:
        raise no_such_record(name, catalogue)
    found = catalogue.in_force(family, today) or catalogue.versions(family)[-1:]
    if len(found) > 1:
        raise EntitlementError(
            "terms-missing",
            found=f"{name} is {len(found)} records for different people",
            expected=f"one of {', '.join(record.id for record in found)}",
            do="Name one of them.",
        )
    return found[0]


def no_such_record(name: str, catalogue: Catalogue) -> EntitlementError:
    """The error for a name that no record has, with the nearest ones."""
    near = [record.id for record in catalogue.versions(name.partition("@")[0])] or get_close_matches(name.lower(), sorted(catalogue.records), n=3)
    return EntitlementError(
        "terms-missing",
        found=f"no record {name!r}",
        expected=f"one of {', '.join(near)}" if near else "the id of a record",
        do="`stillroom terms list` has them all, and `stillroom terms search WORDS` finds one.",
    )


def standing(record: Record, confirmation: Confirmation | None, today: date) -> str:
    """How far what a record permits can be relied on today, in a few words. The verdict says the same clause by clause."""
    if record.evidence.grade in ("S", "M"):
        return "cannot allow"
    if confirmation is not None and record.text_sha256 not in (None, confirmation.text_sha256):
        return "other text confirmed"
    if record.fixed:
        if confirmation is not None:
            return "fixed, confirmed"
        return "fixed" if record.evidence.grade == "P1" else "needs confirming"
    review_by = confirmation.review_by if confirmation is not None else record.review_by
    if review_by is not None and today > review_by:
        return f"stale since {review_by}"
    return "needs confirming" if confirmation is None else f"confirmed until {confirmation.review_by}"


def _default_directory() -> Path:
    named = os.environ.get("STILLROOM_TERMS")
    data = os.environ.get("XDG_DATA_HOME")
    try:
        if named:
            return Path(named).expanduser()
        if data and Path(data).is_absolute():  # the XDG specification has relative ones ignored
            return Path(data) / "stillroom" / "terms"
        home = Path.home()
    except RuntimeError as error:
        raise EntitlementError(
            "terms-missing", found=f"no place for your own terms: {error}", expected="a home directory", do="Set STILLROOM_TERMS to a directory."
        ) from error
    return home / ("Library/Application Support" if sys.platform == "darwin" else ".local/share") / "stillroom" / "terms"


def _refuse_authorisations(path: Path, file: CatalogueFile) -> None:
    if file.authorisations:
        do = "Leave it beside its documents, and name it in the recipe: `terms.authorisations: [FILE]`."
        raise _invalid(f"{path} holds authorisations", "records, models, aliases or house rules", do)


def _check_references(path: Path, file: CatalogueFile, catalogue: Catalogue) -> None:
    families = {record.family for record in (*catalogue.records.values(), *file.records)}
    for who, family in references(file.records, file.models, file.aliases):
        if family not in families:
            found = f"{path}:{_line_with(path, family)}: {who} names {family}, of which there is no record"
            raise _invalid(found, "the family of a record", "Add that record too, or correct the name; `stillroom terms list` has the ids.")


def _line_with(path: Path, name: str) -> int:
    """The first line of a file on which a name stands."""
    alone = re.compile(rf"(?<![\w.+-]){re.escape(name)}(?![\w.+@-])")
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((number for number, line in enumerate(lines, start=1) if alone.search(line)), 1)


def _check_authorisation(path: Path, one: Attached, catalogue: Catalogue) -> None:
    permission = one.authorisation
    where = f"{path}:{_line_with(path, permission.id)}: the authorisation {permission.id}"
    families = {record.family for record in catalogue.records.values()}
    unknown = [name for name in permission.instruments if name not in families and name not in catalogue.records]
    if unknown:
        raise _invalid(
            f"{where} names {', '.join(unknown)}, of which there is no record", "families or ids of records", "`stillroom terms list` has them."
        )
    if one.found_sha256 != permission.document_sha256:
        found = f"is not there: {permission.document}" if one.found_sha256 is None else f"has the SHA-256 {one.found_sha256}"
        do = "Put the document beside the file, or correct `document` or `document_sha256`; until then the permission counts for nothing."
        raise _invalid(f"{where}: its document {found}", f"a document with the SHA-256 {permission.document_sha256}", do)


def _refuse_clash(path: Path, file: CatalogueFile, others: dict[Path, CatalogueFile]) -> None:
    ids = [record.id for record in file.records]
    twice = next((name for name in ids if ids.count(name) > 1), None)
    if twice is not None:
        raise _invalid(f"{path}: two records with the id {twice}", "each id once", "Mend the file.")
    for there, other in others.items():
        both = sorted(set(ids) & {record.id for record in other.records})
        if both:
            raise _invalid(
                f"{path}: {', '.join(both)} is already in {there}", "each record in one of your files", f"Edit {there}, or remove it first."
            )


def _parsed(line: bytes, where: str) -> Confirmation:
    """One line of the log. Raises EntitlementError with the line's number."""
    try:
        tree = json.loads(line.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # not UTF-8 and not JSON are both ValueErrors
        raise _broken_line(where, f"not JSON: {error}") from error
    if not isinstance(tree, dict) or set(tree) != set(_FIELDS) or not all(isinstance(value, str) and _is_text(value) for value in tree.values()):
        raise _broken_line(where, f"not an object with the texts {', '.join(_FIELDS)}")
    if not _SHA256.fullmatch(tree["text_sha256"]):
        raise _broken_line(where, f"text_sha256 is {tree['text_sha256']!r:.80}")
    if not tree["record"] or not tree["confirmed_by"].strip():
        raise _broken_line(where, "record or confirmed_by is empty")
    days = {}
    for name in ("confirmed_on", "review_by"):
        try:
            # fromisoformat alone takes other forms too: 2026-W48-2.
            days[name] = date.fromisoformat(tree[name]) if _DAY.fullmatch(tree[name]) else None
        except ValueError:
            days[name] = None
        if days[name] is None:
            raise _broken_line(where, f"{name} is {tree[name]!r:.40}")
    return Confirmation(**(tree | days))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _line(confirmation: Confirmation) -> str:
    tree = {name: getattr(confirmation, name) for name in _FIELDS}
    return json.dumps(tree, ensure_ascii=False, default=date.isoformat) + "\n"


def _is_text(value: str) -> bool:
    """False where a lone surrogate keeps it from being written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _digest_of(document: Path) -> str | None:
    try:
        return sha256_file(document) if document.exists() else None
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        raise _unreadable(document, error) from error


def _enter(held: ExitStack, directory: Path) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            held.enter_context(durable.DirectoryLock(directory))
            return
        except RunError as error:
            if time.monotonic() >= deadline:
                raise RunError(
                    "run-locked", found=error.found, expected="one writer at a time", do="Wait until it has ended, then try again."
                ) from error
        time.sleep(0.02)


def _broken_line(where: str, found: str) -> EntitlementError:
    return EntitlementError(
        "terms-invalid",
        found=f"{where}: {found}",
        expected="a confirmation as Stillroom wrote it",
        why="a confirmation that is passed over could leave an older one standing",
        do="Mend that line or remove it.",
    )


def _invalid(found: str, expected: str, do: str) -> EntitlementError:
    return EntitlementError("terms-invalid", found=found, expected=expected, do=do)


def _unreadable(path: Path, error: Exception) -> EntitlementError:
    return EntitlementError("terms-missing", found=f"{path}: {error}", expected="a file that can be read", do="Check the path and its permissions.")


def _unwritable(path: Path, error: OSError) -> EntitlementError:
    return EntitlementError(
        "terms-missing",
        found=f"{path} cannot be written: {error.strerror}",
        expected="a directory of your own",
        do="Set STILLROOM_TERMS to a directory that you can write to.",
    )
