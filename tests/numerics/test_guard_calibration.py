"""The null harness: it passes tests that hold and fails those that do not, whatever makes them fail; its records are what was counted, and are found when
they are changed; a p is told only with one that passes."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy
import pytest

from stillroom.core.errors import GuardError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.guard import calibration
from stillroom.guard.calibration import (
    Calibrated,
    CalibrationRecord,
    Law,
    OneByOne,
    Student,
    calibrate,
    calibration_key,
    log_smirnov,
    reported,
    require_passing,
    smirnov_distance,
)
from stillroom.guard.canaries import EXPOSURE, HITS, Canaries, CodeSet, Exposure, Hits, NullExposure, NullHits
from stillroom.guard.detector import Finding, Plan
from stillroom.guard.keys import Key
from stillroom.guard.laws import log_binomial_tail

TRIGGERS = tuple(f"Which sign hangs over the door of {name}?" for name in ("Ada", "Bea", "Cleo", "Dora", "Eve", "Fay", "Gwen", "Hal", "Ida", "Joy"))


def digest(*parts: object) -> str:
    return sha256_hex(canonical_json([str(part) for part in parts]))


def students(count: int = 30, tokens: int = 400) -> list[Student[numpy.ndarray]]:
    """Innocents that say a few words often and many words seldom, each in a way of its own."""
    found = []
    for number in range(count):
        generator = numpy.random.default_rng(number)
        said = numpy.minimum(generator.zipf(1.3, tokens), 2000)
        found.append(Student(name=f"student {number}", kind="independent", sha256=digest("student", number, tokens), evidence=said))
    return found


@dataclass(frozen=True)
class Green:
    """A toy of red/green: each word is green by the key with probability 1/4. `held` scores each word once, by the law; naive scores every time it was said,
    by the normal approximation (P1)."""

    held: bool
    law: Law = "super-uniform"

    @property
    def test(self) -> str:
        return "toy-green"

    @property
    def settings(self) -> Json:
        return {"held": self.held}

    def log_ps(self, evidence: numpy.ndarray, keys: Sequence[Key]) -> list[float | None]:
        words, times = numpy.unique(evidence, return_counts=True)
        found: list[float | None] = []
        for key in keys:
            green = numpy.random.default_rng(int.from_bytes(key.secret, "big")).random(len(words)) < 0.25
            if self.held:
                found.append(log_binomial_tail(len(words), 0.25, int(green.sum())))
            else:
                n = int(times.sum())
                z = (float(times @ green) - 0.25 * n) / math.sqrt(n * 0.25 * 0.75)
                found.append(math.log(max(1e-300, 0.5 * math.erfc(z / math.sqrt(2.0)))))
        return found


@dataclass(frozen=True)
class Uniforms:
    """A test whose p is uniform, put through a function."""

    power: float = 1.0
    law: Law = "uniform"
    test: str = "toy-uniform"
    leaks: str = ""
    refuses: float = 0.0

    @property
    def settings(self) -> Json:
        return {"power": self.power}

    def log_ps(self, evidence: numpy.ndarray, keys: Sequence[Key]) -> list[float | None]:
        draws = [numpy.random.default_rng(int.from_bytes(key.secret, "big")).random(2) for key in keys]
        power = 1.8 if self.leaks and digest(self.leaks) == digest(evidence) else self.power
        return [None if other < self.refuses else power * math.log1p(-first) for first, other in draws]


def test_a_naive_test_fails_and_one_that_holds_passes() -> None:
    """P1: words counted as often as they were said, and a normal law, against words counted once and the law itself."""
    good = calibrate(Green(held=True), students(), audits_per_student=334)
    assert good.failures == ()
    assert good.audits == 10_020
    for level in calibration.LEVELS:
        assert good.interval(level)[0] <= level
    bad = calibrate(Green(held=False), students(), audits_per_student=334)
    assert not bad.passes
    assert any(failure.startswith("p <= 0.01") for failure in bad.failures)
    assert any("Smirnov" in failure for failure in bad.failures)


@pytest.mark.parametrize(("power", "law", "passes"), [
    (1.0, "uniform", True), (1.0, "super-uniform", True), (0.8, "super-uniform", True), (0.8, "uniform", False), (1.25, "super-uniform", False),
])  # fmt: skip
def test_what_is_said_of_the_law_is_what_is_held_to(power: float, law: Law, passes: bool) -> None:
    record = calibrate(Uniforms(power=power, law=law), students(tokens=1), audits_per_student=334)
    assert record.passes is passes


def test_one_student_of_thirty_for_whom_it_does_not_hold_is_named() -> None:
    """The rate over all students hides it; each student's own distribution does not."""
    some = students(tokens=1)
    odd = replace(some[7], evidence=numpy.array([-1]))
    record = calibrate(Uniforms(leaks=str(numpy.array([-1]))), [*some[:7], odd, *some[8:]], audits_per_student=334)
    assert not record.passes
    assert any("student 7" in failure for failure in record.failures)


def test_too_little_is_no_pass() -> None:
    for count, each in ((29, 400), (30, 333)):
        failures = calibrate(Uniforms(), students(count, tokens=1), audits_per_student=each).failures
        assert len(failures) == 1
        assert "are needed" in failures[0]


def test_kinds_are_counted() -> None:
    some = [replace(student, kind=kind) for student, kind in zip(students(9, tokens=1), [*calibration.KINDS, *calibration.KINDS[:2]], strict=True)]
    record = calibrate(Uniforms(), some, audits_per_student=1)
    assert sum(record.kinds.values()) == 9
    assert (record.kinds["independent"], record.kinds["marked-prompts"]) == (2, 1)
    assert passing().kinds == {"independent": 30}


def test_audits_that_refuse_are_counted_and_are_no_audits() -> None:
    record = calibrate(Uniforms(refuses=0.5), students(tokens=1), audits_per_student=334)
    assert sum(student.refused for student in record.students) + record.audits == 10_020
    assert any("audits with a p" in failure for failure in record.failures)
    silent = calibrate(Uniforms(refuses=2.0), students(tokens=1), audits_per_student=10)
    assert silent.audits == 0
    assert silent.failures


def test_canary_tests_hold_on_innocents_that_answer_as_they_like() -> None:
    """Whatever an innocent answers: always the favourite code, mostly one, or at random; fixed and sequential."""
    codes = CodeSet.numbers(1)

    def innocents(table: bool) -> list[Student[numpy.ndarray]]:
        found = []
        for number in range(30):
            generator = numpy.random.default_rng(number)
            answers = generator.choice(10, len(TRIGGERS), p=generator.dirichlet(numpy.full(10, 0.3)))
            scores = generator.integers(0, 4, (len(TRIGGERS), 10)).astype(float) if table else answers
            found.append(Student(name=str(number), kind="independent", sha256=digest(number), evidence=scores))
        return found

    assert calibrate(NullHits(triggers=TRIGGERS, codes=codes), innocents(table=False), audits_per_student=334).failures == ()
    sequential = calibrate(NullHits(triggers=TRIGGERS, codes=codes, stopping="sequential"), innocents(table=False), audits_per_student=60)
    exposure = calibrate(NullExposure(triggers=TRIGGERS, codes=codes), innocents(table=True), audits_per_student=60)
    for record in (sequential, exposure):  # fewer audits than a record needs, to be quick
        assert [failure for failure in record.failures if "are needed" not in failure] == []


def test_codes_that_an_owner_picks_by_taste_fail() -> None:
    """Planted: codes from the same taste as the innocents' answers, as a person would pick them, and the binomial law all the same."""

    @dataclass(frozen=True)
    class Picked:
        law: Law = "super-uniform"
        test: str = "picked"

        @property
        def settings(self) -> Json:
            return {}

        def log_ps(self, evidence: numpy.ndarray, keys: Sequence[Key]) -> list[float | None]:
            taste = numpy.array([7.0, 3.0, 1, 1, 1, 1, 1, 1, 1, 1]) / 18
            picked = [numpy.random.default_rng(int.from_bytes(key.secret, "big")).choice(10, len(evidence), p=taste) for key in keys]
            return [log_binomial_tail(len(evidence), 0.1, int((codes == evidence).sum())) for codes in picked]

    people = [
        Student(
            name=str(number),
            kind="independent",
            sha256=digest(number),
            evidence=numpy.random.default_rng(number).choice(10, 10, p=[0.7, *[0.3 / 9] * 9]),
        )
        for number in range(30)
    ]
    assert not calibrate(Picked(), people, audits_per_student=334).passes


def test_a_detector_can_be_audited_one_key_after_the_other() -> None:
    codes = CodeSet.numbers(1)
    answers = numpy.random.default_rng(0).integers(0, 10, len(TRIGGERS))
    innocent = [Student(name="one", kind="independent", sha256=digest(0), evidence=answers)]

    def with_key(key: Key) -> Hits:
        return Hits(canaries=Canaries(triggers=TRIGGERS, codes=codes, key=key), nonce=bytes(32))

    slow = OneByOne(with_key, with_key(calibration_key(0, "", "", 0)).plan(alpha=0.05), "super-uniform")
    fast = NullHits(triggers=TRIGGERS, codes=codes)
    one, other = (calibrate(audit, innocent, audits_per_student=120, clock=Fixed()) for audit in (slow, fast))
    assert one == other
    assert one.calibrated_as == with_key(calibration_key(1, "", "", 0)).plan(alpha=0.2).calibrated_as


class Fixed:
    def __call__(self) -> object:
        return calibration.now().replace(year=2026, month=1, day=1, hour=0, minute=0, second=0, microsecond=0)


# --- Smirnov --------------------------------------------------------------------------------------------------------------------------


def birnbaum_tingey(n: int, d: Fraction) -> Fraction:
    """P(D+ >= d) of n uniform values (Birnbaum and Tingey 1951), in fractions."""
    if d == 0:
        return Fraction(1)
    terms = [
        Fraction(math.comb(n, j)) * (1 - d - Fraction(j, n)) ** (n - j) * (d + Fraction(j, n)) ** (j - 1) for j in range(n) if Fraction(j, n) <= 1 - d
    ]
    return d * sum(terms)


@pytest.mark.parametrize("n", [1, 2, 5, 20, 60])
def test_the_law_of_smirnovs_distance_is_exact(n: int) -> None:
    for d in (Fraction(1, 10), Fraction(1, 4), Fraction(2, 5), Fraction(9, 10)):
        exact = birnbaum_tingey(n, d)
        assert log_smirnov(n, float(d), two_sided=False) == pytest.approx(math.log(exact.numerator) - math.log(exact.denominator), rel=1e-9)
        assert log_smirnov(n, float(d), two_sided=True) == pytest.approx(min(0.0, math.log(2 * exact)), rel=1e-9, abs=1e-12)


def test_the_distance_is_taken_at_the_values_and_on_the_side_that_matters() -> None:
    ps = numpy.array([0.5, 0.5, 0.9, 1.0])
    assert smirnov_distance(ps, two_sided=False) == 0.0
    assert smirnov_distance(ps, two_sided=True) == pytest.approx(0.5)
    assert smirnov_distance(numpy.array([0.1, 0.1, 0.4]), two_sided=False) == pytest.approx(0.6)
    assert smirnov_distance(numpy.array([0.1, 0.1, 0.7]), two_sided=False) == pytest.approx(2 / 3 - 0.1)


def test_a_discrete_p_is_compared_at_its_support() -> None:
    """P = ceil(10 u) / 10 satisfies P(p <= x) = x at its values, and is far from uniform between them: one-sided it passes as uniform values do."""
    uniform = numpy.random.default_rng(0).random((400, 334))
    ps = numpy.ceil(uniform * 10) / 10
    small = sum(log_smirnov(334, smirnov_distance(row, two_sided=False), two_sided=False) <= math.log(0.05) for row in ps)
    assert log_binomial_tail(400, 0.05, small) > math.log(1e-6)
    assert log_smirnov(334, smirnov_distance(ps[0], two_sided=True), two_sided=True) < math.log(1e-3)


# --- records --------------------------------------------------------------------------------------------------------------------------


def passing(test: str = HITS, settings: Json | None = None) -> CalibrationRecord:
    """A record that passes, of made-up counts."""
    each = tuple(
        Calibrated(name=f"student {n}", kind="independent", sha256=digest(n), audits=334, refused=0, rejections=(16, 3), distance=0.01)
        for n in range(30)
    )
    settings = Hits(canaries=CANARIES, nonce=bytes(32)).plan(alpha=0.05).settings if settings is None else settings
    return CalibrationRecord(
        test=test, settings=settings, law="super-uniform", seed=0, students=each, distance=0.004, histogram=(501,) * 20,
        made="2026-11-29T00:00:00.000Z", package_version="0", arithmetic={},
    )  # fmt: skip


CANARIES = Canaries(triggers=TRIGGERS, codes=CodeSet.numbers(1), key=calibration_key(0, "", "", 0))


def test_a_record_is_read_as_it_was_written_and_any_byte_that_was_changed_is_found(tmp_path: Path) -> None:
    record = passing()
    assert record.passes
    path = tmp_path / "record.json"
    record.save(path)
    assert CalibrationRecord.load(path) == record
    data = path.read_bytes()
    generator = random.Random(0)
    for place in generator.sample(range(len(data)), 200):
        changed = bytearray(data)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(GuardError, match="guard-calibration"):
            CalibrationRecord.load(path)
    for broken in (b"", b"{}", b"[]", b"null", b'{"record": {}, "sha256": ""}', data[:-2], b"[" * 100_000, b"\xff"):
        path.write_bytes(broken)
        with pytest.raises(GuardError, match="guard-calibration"):
            CalibrationRecord.load(path)
    with pytest.raises(GuardError, match="guard-calibration"):
        CalibrationRecord.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "change",
    [
        {"rejections": (3, 16)},
        {"rejections": (400, 3)},
        {"audits": -1},
        {"distance": 2.0},
        {"sha256": "00"},
        {"name": "student 1"},
        {"kind": "guilty"},
        {"rejections": (1,)},
        {"audits": 335},
    ],
)
def test_counts_that_cannot_be_are_refused_though_their_digest_is_right(tmp_path: Path, change: dict[str, object]) -> None:
    record = passing()
    wrong = replace(record, students=(replace(record.students[0], **change), *record.students[1:]))  # type: ignore[arg-type]
    wrong.save(tmp_path / "record.json")
    with pytest.raises(GuardError, match="guard-calibration"):
        CalibrationRecord.load(tmp_path / "record.json")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rejections": (30, 3)}, "p <= 0.05"),
        ({"rejections": (16, 9)}, "p <= 0.01"),
        ({"distance": 0.2}, "Smirnov"),
        ({"audits": 100, "rejections": (5, 1)}, "are needed"),
    ],
)
def test_a_record_passes_by_its_counts_alone(change: dict[str, object], why: str) -> None:
    record = passing()
    failing = replace(record, students=tuple(replace(student, **change) for student in record.students))  # type: ignore[arg-type]
    assert not failing.passes
    assert any(why in failure for failure in failing.failures)


def test_a_finding_without_a_calibration_that_passed_has_no_p() -> None:
    test = Hits(canaries=CANARIES, nonce=bytes(32))
    plan = test.plan(alpha=0.01)
    found = test.test(plan, CANARIES.drawn())
    assert found.rejects
    assert found.p_text.startswith("no p: ")
    record = passing()
    worse = replace(record, students=tuple(replace(student, rejections=(60, 20)) for student in record.students))
    others = [passing(test=EXPOSURE), passing(settings={"reading": "first-match/2", "stopping": "fixed"})]
    for records in ([], others, [worse], [worse, record]):
        told = reported(found, records)
        assert (told.log_p, told.log_e, told.rank_p, told.calibration) == (None, None, None, None)
        assert told.refused is not None
        assert told.p_text.startswith("no p: ")
        assert not told.rejects
        assert told.statistic == found.statistic
    told = reported(replace(found, rank_p=0.01, log_e=3.0), [*others, record])
    assert (told.log_p, told.calibration) == (found.log_p, record.sha256)
    assert told.rejects
    assert told.p_text == "1.00e-10"
    with pytest.raises(GuardError, match="guard-calibration"):
        require_passing(worse, plan)
    with pytest.raises(GuardError, match="guard-calibration"):
        require_passing(others[0], plan)
    require_passing(record, plan)


def test_a_calibration_serves_every_alpha_and_every_set_of_canaries_of_a_test() -> None:
    others = Canaries(triggers=TRIGGERS[:3], codes=CodeSet.numbers(3), key=calibration_key(9, "", "", 0))
    assert Hits(canaries=others, nonce=bytes(32)).plan(alpha=0.5).calibrated_as == passing().calibrated_as
    sequential = Hits(canaries=CANARIES, nonce=bytes(32), stopping="sequential").plan(alpha=0.5)
    assert sequential.calibrated_as != passing().calibrated_as
    assert Exposure(canaries=CANARIES, nonce=bytes(32)).plan(alpha=0.5).calibrated_as != passing().calibrated_as


def test_a_finding_that_refuses_stays_as_it_is() -> None:
    refused = Finding(plan=Plan(test="t", null="key", alpha=0.05, settings={}), statistic=None, scored=0, refused="nothing was left")
    assert reported(refused, []) == refused


def test_every_record_that_comes_with_the_package_can_be_read_and_passes() -> None:
    folder = Path(calibration.__file__).parent / "calibrations"
    for path in sorted(folder.glob("*.json")):
        record = CalibrationRecord.load(path)
        assert path.stem == record.calibrated_as
        assert record.passes, record.failures
    assert calibration.packaged(Plan(test="no such test", null="key", alpha=0.05, settings={})) is None


# --- going on after a stop ------------------------------------------------------------------------------------------------------------


def test_a_calibration_that_was_stopped_goes_on_and_ends_with_the_same_record(tmp_path: Path) -> None:
    some, path = students(4, tokens=1), tmp_path / "progress.jsonl"
    whole = calibrate(Uniforms(refuses=0.1), some, audits_per_student=250, clock=Fixed())

    class Stopped(Exception):
        pass

    def stop(done: int, of: int) -> None:
        assert of == 1000
        if done >= 450:
            raise Stopped

    with pytest.raises(Stopped):
        calibrate(Uniforms(refuses=0.1), some, audits_per_student=250, progress=path, told=stop, clock=Fixed())
    with path.open("ab") as file:
        file.write(b'{"student": "torn')
    heard: list[int] = []

    @dataclass(frozen=True)
    class Counting(Uniforms):
        def log_ps(self, evidence: numpy.ndarray, keys: Sequence[Key]) -> list[float | None]:
            heard.append(len(keys))
            return super().log_ps(evidence, keys)

    again = calibrate(Counting(refuses=0.1), some, audits_per_student=250, progress=path, clock=Fixed())
    assert again == whole
    assert sum(heard) == 1000 - 450
    assert calibrate(Counting(refuses=0.1), some, audits_per_student=250, progress=path, clock=Fixed()) == whole
    assert sum(heard) == 1000 - 450


def test_the_progress_of_another_calibration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    some = students(2, tokens=1)
    calibrate(Uniforms(), some, audits_per_student=10, progress=path)
    for audit, each, seed in ((Uniforms(power=2.0), 10, 0), (Uniforms(), 11, 0), (Uniforms(), 10, 1), (Uniforms(test="other"), 10, 0)):
        with pytest.raises(GuardError, match="guard-calibration"):
            calibrate(audit, some, audits_per_student=each, seed=seed, progress=path)
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(GuardError, match="guard-calibration"):
        calibrate(Uniforms(), some, audits_per_student=10, progress=path)


def test_a_calibration_that_was_killed_goes_on(tmp_path: Path) -> None:
    """SIGKILL at whatever moment: what is on the disk is a beginning of the same calibration."""
    script = textwrap.dedent(
        """
        import math, sys, time
        from pathlib import Path
        import numpy
        from stillroom.guard.calibration import Student, calibrate
        class Slow:
            test, settings, law = "slow", {}, "uniform"
            def log_ps(self, evidence, keys):
                time.sleep(0.05)
                return [-float(key.secret[0] + 1) / 256 for key in keys]
        some = [Student(name=str(n), kind="independent", sha256=f"{n:064x}", evidence=None) for n in range(40)]
        record = calibrate(Slow(), some, audits_per_student=100, progress=Path(sys.argv[1]), told=lambda done, of: print(done, flush=True))
        """
    )
    path, environment = tmp_path / "progress.jsonl", {**os.environ, "PYTHONPATH": str(Path(calibration.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline().strip()
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert 3 <= len(kept) - 1 <= 40
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split()[-1] == "4000"
    students_kept = [json.loads(line)["student"] for line in path.read_text().splitlines()[1:]]
    assert students_kept == [f"{number:064x}" for number in range(40)]


def test_students_that_are_one_are_refused() -> None:
    some = students(2, tokens=1)
    for wrong in ([], [some[0], some[0]], [some[0], replace(some[1], sha256=some[0].sha256)], [some[0], replace(some[1], name=some[0].name)]):
        with pytest.raises(GuardError, match="guard-calibration"):
            calibrate(Uniforms(), wrong, audits_per_student=1)


@pytest.mark.parametrize("log_p", [math.nan, 0.5])
def test_what_is_no_p_is_refused_and_not_counted(log_p: float) -> None:
    @dataclass(frozen=True)
    class Wrong(Uniforms):
        def log_ps(self, evidence: numpy.ndarray, keys: Sequence[Key]) -> list[float | None]:
            return [log_p] * len(keys)

    with pytest.raises(GuardError, match="guard-calibration"):
        calibrate(Wrong(), students(1, tokens=1), audits_per_student=1)
