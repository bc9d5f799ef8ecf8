"""The null harness: a test prints a p only where it was shown, on models that had no part in what was served, to reject no oftener than it says.

The evidence of each innocent student is fixed, and the secret (key, coins, codes) is drawn anew for every audit. Given the student all audits are
then independent, and the p of an exact test satisfies P(p <= x) <= x for each. That is what is measured:

- how often p <= 0.05 and p <= 0.01, with exact intervals (Clopper and Pearson 1934);
- how far the distribution of p lies above the uniform one (or, of a test whose law is continuous, from it), by the exact law of Smirnov's statistic,
  for each student and for all together, corrected by Holm. Of a discrete law the statistic is taken at the values that p has, where the bound must
  hold.

A record is passed where the interval at 99.9 % reaches down to the rate, and every corrected p of the comparison is above 0.001: both fail an exact
test about once in a thousand times, where an interval at 95 % would fail one in forty, and tempt to other seeds. At least 30 students and 10,000
audits.

What a pass does not say: that the law holds for evidence that depends on the secret in ways that no student here has, such as watermarked prompts
that are copied. So students of several kinds belong into a record.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Generic, Literal, NoReturn, Protocol, TypeAlias, TypeVar, get_args

import numpy
import scipy
from numpy.typing import NDArray
from scipy import special

from stillroom import __version__
from stillroom.core import durable
from stillroom.core.clock import Clock, iso, now
from stillroom.core.errors import GuardError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.guard.detector import Detector, Finding, Plan
from stillroom.guard.keys import Key
from stillroom.guard.laws import clopper_pearson
from stillroom.guard.multiplicity import holm

VERSION = 1
LEVELS = (0.05, 0.01)
LEAST_STUDENTS, LEAST_AUDITS = 30, 10_000
# Below these a record fails: see above.
CONFIDENCE, LEAST_KS_P = 0.999, 0.001
_BINS = 20
_AUDITS_PER_LINE = 100
_DIGEST = re.compile("[0-9a-f]{64}")
_KEY_DOMAIN = b"stillroom guard calibration 1\n"

# Why a student is innocent: trained by itself; on the same teacher without its key, or with another; on another teacher; on the same other data; on other
# answers of the same teacher than those that were served; or clean, and asked with prompts that carry the mark.
Kind: TypeAlias = Literal["independent", "no-key", "other-key", "other-teacher", "same-data", "other-outputs", "marked-prompts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Law: TypeAlias = Literal["uniform", "super-uniform"]
Progress: TypeAlias = Callable[[int, int], None]
E = TypeVar("E")
C = TypeVar("C", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Student(Generic[E]):
    """An innocent model's evidence; `sha256` is a digest of what it is, by which it is known."""

    name: str
    kind: Kind
    sha256: str
    evidence: E


class Audit(Protocol[C]):
    """A test whose secret can be drawn anew. `law` says whether p is uniform under the null, or (where it is discrete, or a bound) only not below."""

    @property
    def test(self) -> str: ...
    @property
    def settings(self) -> Json: ...
    @property
    def law(self) -> Law: ...
    def log_ps(self, evidence: C, keys: Sequence[Key]) -> Sequence[float | None]:
        """Ln p of the audit with each key, None where it refuses."""
        ...


@dataclass(frozen=True)
class OneByOne(Generic[E]):
    """Any detector as an audit: `with_key` makes it with the secret that a key gives. Slow where a test could do many keys at once."""

    with_key: Callable[[Key], Detector[E]]
    plan: Plan
    law: Law

    @property
    def test(self) -> str:
        return self.plan.test

    @property
    def settings(self) -> Json:
        return self.plan.settings

    def log_ps(self, evidence: E, keys: Sequence[Key]) -> list[float | None]:
        detectors = map(self.with_key, keys)
        return [detector.test(detector.plan(alpha=self.plan.alpha), evidence).log_p for detector in detectors]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What came of one student: how many audits gave a p, how many refused, how many p's are <= each of `LEVELS`, and Smirnov's distance."""

    name: str
    kind: Kind
    sha256: str
    audits: int
    refused: int
    rejections: tuple[int, ...]
    distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """A calibration of one test with its settings. Whether it passes is computed from its counts whenever one asks, and stated nowhere."""

    test: str
    settings: Json
    law: Law
    seed: int
    students: tuple[Calibrated, ...]
    distance: float
    histogram: tuple[int, ...]
    made: str
    package_version: str
    arithmetic: dict[str, str]
    version: int = VERSION

    @property
    def calibrated_as(self) -> str:
        """`Plan.calibrated_as` of the plans that it is for."""
        return Plan(test=self.test, null="key", alpha=0.5, settings=self.settings).calibrated_as

    @property
    def audits(self) -> int:
        """Those that gave a p."""
        return sum(student.audits for student in self.students)

    @property
    def kinds(self) -> dict[Kind, int]:
        """How many students there are of each kind that there is."""
        counted = {kind: sum(student.kind == kind for student in self.students) for kind in KINDS}
        return {kind: count for kind, count in counted.items() if count}

    def rejections(self, level: float) -> int:
        """How many had p <= `level`, one of `LEVELS`."""
        return sum(student.rejections[LEVELS.index(level)] for student in self.students)

    def interval(self, level: float, confidence: float = 0.95) -> tuple[float, float]:
        """The exact interval of the rate of false positives at that level. ValueError where no audit gave a p."""
        return clopper_pearson(self.rejections(level), self.audits, confidence)

    @property
    def log_ks(self) -> dict[str, float]:
        """Ln p of Smirnov's statistic for each student and for "all students", corrected by Holm."""
        two_sided = self.law == "uniform"
        found = {student.name: log_smirnov(student.audits, student.distance, two_sided=two_sided) for student in self.students if student.audits}
        return holm(found | {"all students": log_smirnov(self.audits, self.distance, two_sided=two_sided)} if found else {})

    @property
    def failures(self) -> tuple[str, ...]:
        """Why it is not passed; empty where it is."""
        why = [
            f"{count:,} {what}, and {least:,} are needed"
            for count, least, what in ((len(self.students), LEAST_STUDENTS, "students"), (self.audits, LEAST_AUDITS, "audits with a p"))
            if count < least
        ]
        if not self.audits:
            return tuple(why)
        for level in LEVELS:
            if self.interval(level, CONFIDENCE)[0] > level:
                why.append(f"p <= {level} in {self.rejections(level):,} of {self.audits:,} audits ({self.rejections(level) / self.audits:.4f})")
        name, log_ks = min(self.log_ks.items(), key=lambda one: one[1])
        if log_ks <= math.log(LEAST_KS_P):
            why.append(f"the p's of {name} are not {self.law}: Smirnov's p is {math.exp(log_ks):.2g} after Holm")
        return tuple(why)

    @property
    def passes(self) -> bool:
        return not self.failures

    @property
    def sha256(self) -> str:
        """SHA-256 of its canonical JSON."""
        return sha256_hex(canonical_json(self.as_json()))

    def as_json(self) -> Json:
        return {**{one.name: getattr(self, one.name) for one in fields(self)}, "students": [asdict(student) for student in self.students]}

    @property
    def as_bytes(self) -> bytes:
        """The file that `load` reads: canonical JSON of {record, sha256}."""
        return canonical_json({"record": self.as_json(), "sha256": self.sha256}) + b"\n"

    def save(self, path: Path) -> None:
        durable.write_bytes_atomic(path, self.as_bytes)

    @classmethod
    def load(cls, path: Path) -> CalibrationRecord:
        """Raises GuardError 'guard-calibration' where the file is not as it was written."""
        try:
            data = path.read_bytes()
        except OSError as error:
            _refuse_record(f"{path}: {error.strerror}")
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> CalibrationRecord:
        """The record in a file's bytes; `name` is what the file is called in messages."""
        try:
            tree = json.loads(data)
            record = cls._from_json(tree["record"])
            whole = record.as_bytes == data  # its digest is among them
        except (TypeError, KeyError, ValueError, AttributeError, RecursionError):
            whole = False
        if not whole:
            _refuse_record(f"{name} is not as it was written")
        return record

    @classmethod
    def _from_json(cls, tree: Json) -> CalibrationRecord:
        students = tuple(Calibrated(**{**student, "rejections": tuple(student["rejections"])}) for student in tree["students"])
        record = cls(**{**tree, "students": students, "histogram": tuple(tree["histogram"])})
        if record.version != VERSION or record.law not in ("uniform", "super-uniform") or not _possible(record):
            raise ValueError("counts that cannot be")
        return record


def calibrate(
    audit: Audit[E],
    students: Sequence[Student[E]],
    *,
    audits_per_student: int,
    seed: int = 0,
    progress: Path | None = None,
    told: Progress | None = None,
    clock: Clock = now,
) -> CalibrationRecord:
    """Runs the audits and counts. The keys follow from `seed`, the test, the student and the number of the audit, so that a calibration can be
    repeated.

    With `progress`, a file, what was done is kept there, and a calibration that was stopped goes on; `told` hears of (audits done, of all). Raises
    GuardError 'guard-calibration' for students that are not distinct, or a file of another calibration.
    """
    if len({student.sha256 for student in students}) != len(students) or len({student.name for student in students}) != len(students) or not students:
        _refuse_record(f"{len(students)} students, and not as many names and digests", "students that were trained independently of each other")
    if audits_per_student < 1:
        raise ValueError(f"a student is audited at least once; found {audits_per_student}")
    kept = _Kept(progress, {"test": audit.test, "settings": audit.settings, "seed": seed, "audits_per_student": audits_per_student})
    found: dict[str, list[float | None]] = {student.sha256: [] for student in students}
    for student in students:
        log_ps = found[student.sha256]
        for begin in range(0, audits_per_student, _AUDITS_PER_LINE):
            numbers = range(begin, min(audits_per_student, begin + _AUDITS_PER_LINE))
            log_ps += kept.of(student.sha256, begin) or kept.keep(
                student.sha256, begin, list(audit.log_ps(student.evidence, [calibration_key(seed, audit.test, student.sha256, n) for n in numbers]))
            )
            if told is not None:
                told(sum(map(len, found.values())), audits_per_student * len(students))
    return _record(audit, students, found, seed, clock)


def calibration_key(seed: int, test: str, student: str, number: int) -> Key:
    """The key of one audit. Anybody can compute it: it is for calibration, and never for serving."""
    return Key(hashlib.sha256(_KEY_DOMAIN + canonical_json([str(seed), test, student, number])).digest())


def smirnov_distance(ps_N: NDArray[numpy.float64], *, two_sided: bool) -> float:
    """Sup over x of (share of p <= x) - x, at the values that p has; two-sided, of the absolute difference."""
    ordered_N, n = numpy.sort(ps_N), len(ps_N)
    above = float((numpy.arange(1, n + 1) / n - ordered_N).max())
    below = float((ordered_N - numpy.arange(n) / n).max())
    return max(above, below if two_sided else 0.0, 0.0)


@lru_cache(maxsize=4096)
def log_smirnov(n: int, distance: float, *, two_sided: bool) -> float:
    """Ln of the probability of such a distance, or a larger one, under uniformity; super-uniform values have it less often.

    One-sided it is exact (Smirnov 1944; Birnbaum and Tingey 1951). Two-sided it is twice that, which is the exact value but for cases with large
    distances on both sides: they are less than a millionth where it is below 0.001.
    """
    one_sided = float(special.smirnov(n, min(1.0, distance)))
    p = min(1.0, (2.0 if two_sided else 1.0) * one_sided)
    return math.log(p) if p > 0.0 else -math.inf


def packaged(plan: Plan) -> CalibrationRecord | None:
    """The record for the plan's test and settings that comes with Stillroom, if there is one."""
    file = resources.files("stillroom.guard") / "calibrations" / f"{plan.calibrated_as}.json"
    return CalibrationRecord.from_bytes(file.read_bytes(), file.name) if file.is_file() else None


def require_passing(record: CalibrationRecord, plan: Plan) -> None:
    """Raises GuardError 'guard-calibration' where the record is of another test or other settings, or does not pass."""
    if record.calibrated_as != plan.calibrated_as:
        _refuse_record(f"a record of {record.test!r} with {record.settings}", f"one of {plan.test!r} with {plan.settings}")
    if record.failures:
        _refuse_record(f"a calibration of {plan.test!r} that failed: {'; '.join(record.failures)}", "one that passed")


def reported(finding: Finding, records: Iterable[CalibrationRecord], *, with_packaged: bool = True) -> Finding:
    """The finding as it may be told: without p and e, and with the reason, unless a calibration of its test and settings has passed.

    The first of `records` for its test and settings decides; where there is none, that which comes with Stillroom, unless `with_packaged` is false.
    """
    if finding.refused is not None:
        return finding
    fitting = (record for record in records if record.calibrated_as == finding.plan.calibrated_as)
    record = next(fitting, packaged(finding.plan) if with_packaged else None)
    if record is None:
        return _silenced(finding, "this test has not been calibrated with these settings")
    if record.failures:
        return _silenced(finding, f"its calibration failed: {'; '.join(record.failures)}")
    return replace(finding, calibration=record.sha256)


def arithmetic() -> dict[str, str]:
    """What the last digits of a result may depend on."""
    return {"python": platform.python_version(), "numpy": numpy.__version__, "scipy": scipy.__version__, "machine": platform.machine()}


def _silenced(finding: Finding, why: str) -> Finding:
    return replace(finding, log_p=None, log_e=None, rank_p=None, refused=why, calibration=None)


def _record(audit: Audit[E], students: Sequence[Student[E]], found: dict[str, list[float | None]], seed: int, clock: Clock) -> CalibrationRecord:
    two_sided = audit.law == "uniform"
    ps = {sha256: numpy.exp(numpy.array([log_p for log_p in log_ps if log_p is not None])) for sha256, log_ps in found.items()}
    if any(numpy.isnan(some).any() or (some > 1.0).any() for some in ps.values()):
        _refuse_record("a p that is above 1, or not a number", "probabilities")
    everything = numpy.concatenate([*ps.values()])
    counted = numpy.histogram(everything, bins=_BINS, range=(0.0, 1.0))[0]
    return CalibrationRecord(
        test=audit.test,
        settings=audit.settings,
        law=audit.law,
        seed=seed,
        students=tuple(_counted(student, ps[student.sha256], len(found[student.sha256]), two_sided) for student in students),
        distance=smirnov_distance(everything, two_sided=two_sided) if len(everything) else 0.0,
        histogram=tuple(int(count) for count in counted),
        made=iso(clock()),
        package_version=__version__,
        arithmetic=arithmetic(),
    )


def _counted(student: Student[E], ps_N: NDArray[numpy.float64], asked: int, two_sided: bool) -> Calibrated:
    return Calibrated(
        name=student.name,
        kind=student.kind,
        sha256=student.sha256,
        audits=len(ps_N),
        refused=asked - len(ps_N),
        rejections=tuple(int((ps_N <= level).sum()) for level in LEVELS),
        distance=smirnov_distance(ps_N, two_sided=two_sided) if len(ps_N) else 0.0,
    )


def _possible(record: CalibrationRecord) -> bool:
    """Whether counts and distances could be those of some calibration."""
    students = record.students
    distinct = all(len({getattr(student, name) for student in students}) == len(students) for name in ("name", "sha256"))
    whole = [number for student in students for number in (student.audits, student.refused, *student.rejections)] + [*record.histogram]
    return (
        distinct
        and len(students) > 0
        and all(isinstance(number, int) and number >= 0 for number in whole)
        and all(_DIGEST.fullmatch(student.sha256) is not None and student.kind in KINDS for student in students)
        and all(len(student.rejections) == len(LEVELS) and student.audits >= student.rejections[0] >= student.rejections[1] for student in students)
        and all(0.0 <= distance <= 1.0 for distance in (record.distance, *(student.distance for student in students)))
        and len(record.histogram) == _BINS
        and sum(record.histogram) == record.audits
    )


class _Kept:
    """What a calibration has done: one line that says of which calibration, then one for each piece."""

    def __init__(self, path: Path | None, what: Json) -> None:
        self._path = path
        self._pieces: dict[tuple[str, int], list[float | None]] = {}
        if path is None:
            return
        durable.repair_tail(path)
        first = canonical_json({"version": VERSION, "package_version": __version__, **what}).decode()
        lines = list(durable.read_lines(path))
        if not lines:
            durable.append_lines(path, [first])
        elif lines[0] != first:
            _refuse_record(f"{path} is the progress of another calibration", "a new file, or that of the calibration that was stopped")
        try:
            self._pieces = dict(self._parsed(lines[1:]))
        except (KeyError, TypeError, ValueError):
            _refuse_record(f"{path} has a line that is no piece of a calibration")

    @staticmethod
    def _parsed(lines: Sequence[str]) -> Iterator[tuple[tuple[str, int], list[float | None]]]:
        for tree in map(json.loads, lines):
            yield (str(tree["student"]), int(tree["first"])), [None if log_p is None else float(log_p) for log_p in tree["log_ps"]]

    def of(self, student: str, first: int) -> list[float | None] | None:
        return self._pieces.get((student, first))

    def keep(self, student: str, first: int, log_ps: list[float | None]) -> list[float | None]:
        if self._path is not None:
            # -inf is no JSON: a p of 0 is kept as the smallest there is.
            told = [log_p if log_p is None or math.isfinite(log_p) else -1e308 for log_p in map(_plain, log_ps)]
            durable.append_lines(self._path, [json.dumps({"student": student, "first": first, "log_ps": told})], sync=False)
        return log_ps


def _plain(log_p: float | None) -> float | None:
    return None if log_p is None else float(log_p)


def _refuse_record(found: str, expected: str = "a record as Stillroom wrote it") -> NoReturn:
    raise GuardError(
        "guard-calibration",
        found=found,
        expected=expected,
        why="a p of a test that was not shown to hold would accuse innocents at an unknown rate",
        do="Calibrate the test with these settings, on students that had no part in what was served.",
    )
