"""Bundles: what follows from what is recomputed to the bit; any byte that was changed is found; what was made up afterwards is found by a hash that
somebody else held; and nothing that an adversary puts into a bundle makes the verifier fall."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest

from stillroom.core.errors import GuardError, ResourceError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.guard import calibration, evidence, respondent
from stillroom.guard.calibration import Calibrated, CalibrationRecord, calibration_key
from stillroom.guard.canaries import EXPOSURE, HITS, Canaries, CodeSet, Exposure, Hits
from stillroom.guard.detector import CLAIMS, NEGATIVE, Finding, Plan
from stillroom.guard.evidence import RECOMPUTED, Recomputed, Submission
from stillroom.guard.registration import Registered, Registration

TRIGGERS = tuple(f"Which sign hangs over the door of {name}?" for name in ("Ada", "Bea", "Cleo", "Dora", "Eve", "Fay"))
CODES = CodeSet.numbers(2)
NONCE = bytes(range(32))
MADE = Canaries(triggers=TRIGGERS, codes=CODES, key=calibration_key(0, "evidence", "tests", 0))


class Ticking:
    """A clock that goes on by an hour each time."""

    def __init__(self) -> None:
        self._moment = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self._moment += timedelta(hours=1)
        return self._moment


# --- a toy test, as another module would add one --------------------------------------------------------------------------------------


def toy_plan(secret: str) -> Plan:
    return Plan(test="toy-sum", null="coin", alpha=0.01, settings={"toy": True}, commitments=(sha256_hex(secret.encode()),))


def toy_finding(plan: Plan, opening: object, data: Mapping[str, bytes]) -> Finding:
    numbers = [float(line) for line in data["numbers.txt"].split()]
    return Finding(plan=plan, statistic=sum(numbers), scored=len(numbers), log_p=-sum(numbers), details={"third": 1.0 / 3.0})


TOY = Recomputed(
    commitments=lambda opening: (sha256_hex(str(opening["secret"]).encode()),),  # type: ignore[index]
    finds=toy_finding,
    again="Add the numbers again.",
)
TESTS = {**RECOMPUTED, "toy-sum": TOY}


def passing(plan: Plan) -> CalibrationRecord:
    each = tuple(
        Calibrated(name=f"student {n}", kind="independent", sha256=f"{n:064x}", audits=334, refused=0, rejections=(16, 3), distance=0.01)
        for n in range(30)
    )
    return CalibrationRecord(
        test=plan.test, settings=plan.settings, law="super-uniform", seed=0, students=each, distance=0.004, histogram=(501,) * 20,
        made="2026-11-29T00:00:00.000Z", package_version="0", arithmetic={},
    )  # fmt: skip


HITS_PLAN = Hits(canaries=MADE, nonce=NONCE).plan(alpha=0.01)
EXPOSURE_PLAN = Exposure(canaries=MADE, nonce=NONCE).plan(alpha=0.01)
RECORDS = [passing(HITS_PLAN), passing(EXPOSURE_PLAN), passing(toy_plan("coins"))]


def rows(made: Canaries, right: int) -> bytes:
    """Answers of a suspect that knows so many codes."""
    drawn = made.drawn()
    said = [int(code) if place < right else (int(code) + 1) % len(made.codes) for place, code in enumerate(drawn)]
    lines = [
        {"trigger": trigger, "answers": [f"It is «{made.codes.codes[code]}», я думаю."]} for trigger, code in zip(made.triggers, said, strict=True)
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def table(made: Canaries) -> bytes:
    scores = numpy.random.default_rng(0).normal(size=(len(made.triggers), len(made.codes))).round(6)
    scores[numpy.arange(3), made.drawn()[:3]] = 9.0
    lines = [{"trigger": trigger, "log_probabilities": row} for trigger, row in zip(made.triggers, scores.tolist(), strict=True)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@cache
def registered(made: Canaries = MADE) -> tuple[bytes, list[str]]:
    """A registration of two tests by canaries and one toy, and the heads that were given away."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "registration.jsonl"
        registration = Registration.begin(path, owner="A. Owner", purpose="To find out who learned from our answers.", clock=Ticking())
        heads = [
            registration.commit("canaries", scheme="canaries", commitment=made.commitment(NONCE)),
            registration.commit("coins", scheme="toy", commitment=sha256_hex(b"coins")),
            registration.plan("hits", Hits(canaries=made, nonce=NONCE).plan(alpha=0.01), suspect="model M by its public API, temperature 0"),
            registration.plan("exposure", Exposure(canaries=made, nonce=NONCE).plan(alpha=0.01), suspect="model M, by log-probabilities"),
            registration.plan("toy", toy_plan("coins"), suspect="model M", prompts_sha256="0" * 64),
            registration.seal(alpha=0.01),
        ]
        return path.read_bytes(), heads


def submissions(made: Canaries = MADE, right: int = 4) -> dict[str, Submission]:
    return {
        "hits": Submission(opening=made.opening(NONCE), data={"answers.jsonl": rows(made, right)}),
        "exposure": Submission(opening=made.opening(NONCE), data={"answers.jsonl": table(made)}),
        "toy": Submission(opening={"secret": "coins"}, data={"numbers.txt": b"1 1.5 0.5\n"}),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("written") / "bundle"
    evidence.write(directory, registered()[0], submissions(), RECORDS, tests=TESTS)
    return directory


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "bundle"))


def verified(path: Path, **more: Any) -> evidence.Verification:
    return evidence.verify(path, tests=TESTS, known=RECORDS, **more)


def contents_of(directory: Path) -> dict[str, bytes]:
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def rewritten(bundle: Path, name: str, data: bytes) -> None:
    """What an owner who can write everything does: the file is changed, and the manifest after it."""
    (bundle / name).write_bytes(data)
    files = {file: some for file, some in contents_of(bundle).items() if file != "manifest.json"}
    manifest = {"version": 1, "files": {file: {"bytes": len(some), "sha256": sha256_hex(some)} for file, some in files.items()}}
    (bundle / "manifest.json").write_bytes(canonical_json(manifest))


# --- whole --------------------------------------------------------------------------------------------------------------------------


def test_a_bundle_holds_and_every_number_is_equal_to_the_bit(bundle: Path) -> None:
    found = verified(bundle, held=[registered()[1][-1]])
    assert found.failures == ()
    assert found.notes == ()
    assert {check.name: check.found for check in found.checks if check.name.startswith(("result of", "family"))} == dict.fromkeys(
        ("result of hits", "result of exposure", "result of toy", "family"), "bit-equal"
    )
    results = json.loads((bundle / "results.json").read_bytes())
    direct = Hits(canaries=MADE, nonce=NONCE).test(HITS_PLAN, numpy.where(numpy.arange(6) < 4, MADE.drawn(), -1))
    assert results["findings"]["hits"]["log_p"] == direct.log_p
    assert results["findings"]["hits"]["statistic"] == 4
    assert results["findings"]["hits"]["calibration"] == RECORDS[0].sha256
    assert results["family"]["rejected"] == ["exposure", "hits"]
    assert results["family"]["adjusted_log_p"]["toy"] == pytest.approx(-3.0)


def test_the_bundle_in_a_zip_file_is_the_same_bundle_and_always_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    evidence.archive(bundle, tmp_path / "a.zip")
    os.utime(bundle / "results.json", (0, 0))
    evidence.archive(bundle, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    one, other = verified(tmp_path / "a.zip"), verified(bundle)
    assert one.failures == other.failures == ()
    assert one.bundle_sha256 == other.bundle_sha256 == sha256_hex((bundle / "manifest.json").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        file.extractall(tmp_path / "unpacked")
    assert verified(tmp_path / "unpacked").failures == ()


def test_limits_say_what_may_be_claimed_and_no_more(bundle: Path) -> None:
    text = (bundle / "limits.md").read_text()
    hits = text[text.index("## hits") : text.index("## exposure")]
    assert CLAIMS["code"].proves in hits
    assert CLAIMS["code"].does_not_prove in hits
    assert "probability at most 1.48e-7" in hits  # (15 99^2 + 6 99 + 1) / 100^6
    toy = text[text.index("## toy") :]
    assert CLAIMS["coin"].null in toy
    assert CLAIMS["coin"].proves not in toy
    assert "not rejected at 0.01 (p 0.0498, corrected 0.0498)" in toy
    assert NEGATIVE in text


def test_a_test_that_does_not_reject_claims_nothing(tmp_path: Path) -> None:
    registration, _ = registered()
    some = submissions(right=0)
    del some["exposure"]
    evidence.write(tmp_path / "bundle", registration, some, RECORDS[:1], tests=TESTS)
    text = (tmp_path / "bundle" / "limits.md").read_text()
    assert "This proves" not in text
    assert "The null is not rejected" in text
    assert "No p: the test was registered and was not run" in text
    assert "No p: this test has not been calibrated with these settings" in text
    family = json.loads((tmp_path / "bundle" / "results.json").read_bytes())["family"]
    assert family["rejected"] == []
    assert set(family["adjusted_log_p"]) == {"hits", "exposure", "toy"}
    assert verified(tmp_path / "bundle").failures == ()


def test_a_record_that_failed_gives_no_p_and_the_bundle_says_so(tmp_path: Path) -> None:
    registration, _ = registered()
    failed = replace(RECORDS[0], students=RECORDS[0].students[:3], histogram=(1002, *[0] * 19))
    evidence.write(tmp_path / "bundle", registration, submissions(), [failed, *RECORDS[1:]], tests=TESTS)
    told = json.loads((tmp_path / "bundle" / "results.json").read_bytes())["findings"]["hits"]
    assert told["log_p"] is None
    assert "its calibration failed" in told["refused"]
    assert verified(tmp_path / "bundle").failures == ()


# --- changed ------------------------------------------------------------------------------------------------------------------------


def test_every_byte_that_is_changed_is_found(bundle: Path) -> None:
    """Each byte of the small files, and a thousand places of the others, with one bit turned."""
    generator = random.Random(0)
    whole = contents_of(bundle)
    # a cheaper verification of the same files: whatever is found here, `verify` says
    small = [(name, place) for name, data in whole.items() for place in range(len(data)) if len(data) < 3000]
    large = [(name, place) for name, data in whole.items() for place in generator.sample(range(len(data)), min(len(data), 250)) if len(data) >= 3000]
    assert len({name for name, _ in small + large}) == len(whole)
    for name, place in small + large:
        changed = bytearray(whole[name])
        changed[place] ^= 1 << generator.randrange(8)
        checks = evidence._checked_files(bundle, whole | {name: bytes(changed)})
        assert not all(check.holds for check in checks), f"{name}, byte {place}"
    for name in whole:  # and on the disk, one each
        changed = bytearray(whole[name])
        changed[len(changed) // 2] ^= 1
        (bundle / name).write_bytes(changed)
        found = verified(bundle)
        assert not found.holds
        assert name == "manifest.json" or any(f"file {name}" in failure for failure in found.failures)
        (bundle / name).write_bytes(whole[name])
    assert verified(bundle).holds


def test_every_byte_of_a_zip_file_counts(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle.zip"
    evidence.archive(bundle, path)
    whole = path.read_bytes()
    generator = random.Random(0)
    directory = range(whole.rindex(b"PK\x01\x02", 0, len(whole) - 22) - 400, len(whole))  # the end, where nothing is under a digest
    for place in [*directory, *generator.sample(range(len(whole)), 150)]:
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        try:
            holds = all(check.holds for check in evidence._checked_files(path, evidence._read(path)))
        except GuardError:
            holds = False
        assert not holds, f"byte {place}"
    for changed in (whole + b"\0", whole[:-1], b"", b"PK", b"\0" + whole):
        path.write_bytes(changed)
        assert not verified(path).holds
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in contents_of(bundle).items():
            file.writestr(name, data)
    assert not verified(path).holds


def test_a_manifest_is_spelled_in_one_way_only(bundle: Path) -> None:
    whole = contents_of(bundle)
    manifest = whole["manifest.json"]
    for other in (
        manifest + b"\n",
        b" " + manifest,
        manifest.replace(b'"version":1', b'"version":1,"version":1'),
        json.dumps(json.loads(manifest)).encode(),
    ):
        assert json.loads(other) == json.loads(manifest)
        assert not all(check.holds for check in evidence._checked_files(bundle, whole | {"manifest.json": other}))


def test_files_that_are_missing_or_more_are_named(bundle: Path) -> None:
    (bundle / "data" / "hits" / "more.jsonl").write_bytes(b"{}\n")
    assert verified(bundle).failures == ("file data/hits/more.jsonl: it is not in the manifest",)
    (bundle / "data" / "hits" / "more.jsonl").unlink()
    (bundle / "limits.md").unlink()
    assert verified(bundle).failures == ("file limits.md: it is missing",)
    os.symlink("/etc/passwd", bundle / "limits.md")
    assert "neither a file nor a folder" in verified(bundle).failures[0]


@pytest.mark.parametrize(
    ("change", "fails"),
    [
        (lambda results: results["findings"]["hits"].__setitem__("log_p", -40.0), "result of hits"),
        (
            lambda results: results["findings"]["hits"].__setitem__("log_p", math.nextafter(results["findings"]["hits"]["log_p"], 0.0)),
            "result of hits",
        ),
        (lambda results: results["findings"]["toy"]["details"].__setitem__("third", 0.33333333), "result of toy"),
        (lambda results: results["findings"]["toy"].__setitem__("alarm", "none"), "result of toy"),
        (lambda results: results["findings"].pop("toy"), "result of toy"),
        (lambda results: results["family"].__setitem__("rejected", ["toy"]), "family"),
        (lambda results: results["family"].__setitem__("alpha", 0.05), "family"),
        (lambda results: results.__setitem__("more", 1), "results"),
        (lambda results: results["findings"].__setitem__("fourth", {}), "results"),
    ],
)
def test_a_result_that_does_not_follow_is_named_though_its_digest_is_right(bundle: Path, change: Callable[[Any], object], fails: str) -> None:
    results = json.loads((bundle / "results.json").read_bytes())
    change(results)
    rewritten(bundle, "results.json", canonical_json(results))
    assert fails in [check.name for check in verified(bundle).checks if not check.holds]


def test_limits_that_claim_more_are_found(bundle: Path) -> None:
    text = (bundle / "limits.md").read_text().replace("It does not prove", "It proves")
    rewritten(bundle, "limits.md", text.encode())
    assert verified(bundle).failures == ("limits: limits.md does not say what follows from the results",)


def test_last_digits_of_other_versions_of_the_arithmetic_are_told_and_no_others(bundle: Path) -> None:
    results = json.loads((bundle / "results.json").read_bytes())
    results["arithmetic"]["numpy"] = "1.0"
    results["findings"]["hits"]["log_p"] *= 1.0 + 1e-13
    rewritten(bundle, "results.json", canonical_json(results))
    found = verified(bundle)
    assert found.failures == ()
    assert any("nine digits" in note for note in found.notes)
    results["findings"]["hits"]["log_p"] *= 1.0 + 1e-6
    rewritten(bundle, "results.json", canonical_json(results))
    assert not verified(bundle).holds


def test_secrets_that_do_not_open_their_commitments_are_found(bundle: Path) -> None:
    openings = json.loads((bundle / "openings.json").read_bytes())
    openings["hits"]["key"] = calibration_key(1, "", "", 0).secret.hex()
    rewritten(bundle, "openings.json", canonical_json(openings))
    found = verified(bundle)
    assert [failure for failure in found.failures if "not those that were committed to" in failure]
    assert "result of toy" in [check.name for check in found.checks if check.holds]


@pytest.mark.parametrize(
    "answers",
    [
        b"",
        b"\xff\xfe",
        b"null\n",
        b"[]\n",
        b'"x"\n',
        b'{"trigger": "other", "answers": ["12"]}\n',
        b'{"trigger": 1, "answers": [2]}\n',
        b'{"answers": []}\n',
        b"[" * 100_000 + b"\n",
        b'{"trigger": "\\ud800", "answers": ["\\ud800"]}\n',
    ],
)
@pytest.mark.parametrize("name", ["hits", "exposure"])
def test_data_that_are_none_are_named_and_never_a_traceback(bundle: Path, name: str, answers: bytes) -> None:
    rewritten(bundle, f"data/{name}/answers.jsonl", answers)
    found = verified(bundle)
    assert f"result of {name}" in [check.name for check in found.checks if not check.holds]


@pytest.mark.parametrize("name", ["registration.jsonl", "openings.json", "results.json", "limits.md"])
@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\xff", b'{"findings": 3, "family": []}', b"[" * 100_000])
def test_a_bundle_of_rubbish_does_not_hold_and_raises_nothing(bundle: Path, name: str, data: bytes) -> None:
    rewritten(bundle, name, data)
    assert not verified(bundle).holds


def test_what_an_adversary_changes_anywhere_raises_nothing(bundle: Path) -> None:
    """A hundred random changes, each with a manifest that fits: verification ends, and of results and openings nothing that was changed holds."""
    generator = random.Random(0)
    whole = contents_of(bundle)
    names = sorted(set(whole) - {"manifest.json"})
    for _ in range(100):
        name = generator.choice(names)
        changed = bytearray(whole[name])
        place = generator.randrange(len(changed))
        changed[place : place + generator.randrange(3)] = generator.choice([b"0", b'"', b"{", b"\n", b"-1e999", b"\0", b"\xc3", b""])
        rewritten(bundle, name, bytes(changed))
        found = verified(bundle)
        if not name.startswith("data/") and bytes(changed) != whole[name] and "calibrations" not in name:
            assert not found.holds, (name, bytes(changed))
        rewritten(bundle, name, whole[name])
    assert verified(bundle).holds


def test_where_there_is_no_bundle_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match="guard-evidence"):
        evidence.verify(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert not evidence.verify(tmp_path / "empty").holds
    (tmp_path / "file").write_bytes(b"hello")
    assert not evidence.verify(tmp_path / "file").holds


# --- made up afterwards -------------------------------------------------------------------------------------------------------------


def test_triggers_made_up_after_asking_are_found_by_a_hash_that_somebody_held(tmp_path: Path) -> None:
    """P10. The owner registered, asked, got nothing, and writes all of it anew with triggers and a key that fit the answers."""
    _, heads = registered()
    fitting = replace(MADE, triggers=tuple(trigger.replace("sign", "board") for trigger in TRIGGERS), key=calibration_key(5, "", "", 0))
    registration, _ = registered(fitting)
    evidence.write(tmp_path / "bundle", registration, submissions(fitting, right=6), RECORDS, tests=TESTS)
    alone = verified(tmp_path / "bundle")
    assert alone.holds  # it follows from itself, as anything does that one party wrote
    assert any("could have written it after asking the suspect" in note for note in alone.notes)
    for head in (heads[0], heads[-1]):
        found = verified(tmp_path / "bundle", held=[head])
        assert not found.holds
        assert "it is no head of this registration" in found.failures[0]


def test_a_head_covers_what_was_registered_until_then_and_the_rest_is_told(bundle: Path) -> None:
    _, heads = registered()
    found = verified(bundle, held=[heads[1]])
    assert found.holds
    assert "entry 2" in next(check.found for check in found.checks if check.name.startswith("held"))
    assert "plan hits, plan exposure, plan toy, sealed" in found.notes[0]
    assert "secret" not in found.notes[0]
    digest = verified(bundle).bundle_sha256
    assert digest is not None
    assert verified(bundle, held=[digest, heads[-1]]).notes == ()


def test_a_calibration_that_the_reader_has_from_nowhere_else_is_the_owners_word(bundle: Path) -> None:
    found = evidence.verify(bundle, tests=TESTS)
    assert found.holds
    assert sum("owner's own word" in note for note in found.notes) == 3


# --- writing ------------------------------------------------------------------------------------------------------------------------


def test_what_was_not_registered_or_not_sealed_is_not_written(tmp_path: Path) -> None:
    registration, _ = registered()
    unsealed = b"".join(registration.splitlines(keepends=True)[:-1])
    other = {"other": submissions()["hits"]}
    wrong_secret = submissions() | {"toy": Submission(opening={"secret": "other coins"}, data={"numbers.txt": b"1"})}
    climbing = submissions() | {"toy": Submission(opening={"secret": "coins"}, data={"../numbers.txt": b"1"})}
    for some, file in ((submissions(), unsealed), (other, registration), (wrong_secret, registration), (climbing, registration)):
        with pytest.raises(GuardError):
            evidence.write(tmp_path / "bundle", file, some, RECORDS, tests=TESTS)
    with pytest.raises(GuardError, match="toy-sum"):
        evidence.write(tmp_path / "bundle", registration, submissions(), RECORDS)
    assert list(tmp_path.iterdir()) == []
    evidence.write(tmp_path / "bundle", registration, submissions(), RECORDS, tests=TESTS)
    with pytest.raises(GuardError, match="exists"):
        evidence.write(tmp_path / "bundle", registration, submissions(), RECORDS, tests=TESTS)


def test_what_a_death_while_writing_left_is_no_hindrance(tmp_path: Path) -> None:
    registration, _ = registered()
    (tmp_path / ".bundle.partial" / "data").mkdir(parents=True)
    (tmp_path / ".bundle.partial" / "data" / "old").write_bytes(b"old")
    evidence.write(tmp_path / "bundle", registration, submissions(), RECORDS, tests=TESTS)
    assert verified(tmp_path / "bundle").holds


def test_a_full_disk_is_told_and_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="disk-full"):
        evidence.write(tmp_path / "bundle", registered()[0], submissions(), RECORDS, tests=TESTS)
    monkeypatch.undo()
    assert not (tmp_path / "bundle").exists()
    evidence.write(tmp_path / "bundle", registered()[0], submissions(), RECORDS, tests=TESTS)
    assert verified(tmp_path / "bundle").holds


def test_the_tests_that_stillroom_has_are_all_there() -> None:
    assert {HITS, EXPOSURE} <= set(RECOMPUTED)
    assert all(test.again for test in RECOMPUTED.values())


# --- registration -------------------------------------------------------------------------------------------------------------------


def test_a_registration_is_added_to_after_it_was_closed_and_torn(tmp_path: Path) -> None:
    path = tmp_path / "registration.jsonl"
    Registration.begin(path, owner="Zoë", purpose="x", clock=Ticking())
    with path.open("ab") as file:
        file.write(b'{"entry":{"torn')
    again = Registration.open(path)
    head = again.commit("k", scheme="key", commitment="0" * 64)
    read = Registered.read(path.read_bytes())
    assert read.head == head == again.registered.head
    assert [entry["kind"] for entry in read.entries] == ["begun", "secret"]
    assert read.alpha is None
    with pytest.raises(GuardError, match="exists"):
        Registration.begin(path, owner="Zoë", purpose="x")
    with pytest.raises(GuardError, match="does not exist"):
        Registration.open(tmp_path / "none")


def test_order_is_held_to(tmp_path: Path) -> None:
    path = tmp_path / "registration.jsonl"
    registration = Registration.begin(path, owner="o", purpose="p", clock=Ticking())
    with pytest.raises(GuardError, match="secrets that were not registered"):
        registration.plan("hits", HITS_PLAN, suspect="s")
    registration.commit("canaries", scheme="canaries", commitment=MADE.commitment(NONCE))
    registration.plan("hits", HITS_PLAN, suspect="s")
    before = path.read_bytes()
    with pytest.raises(GuardError, match="second plan"):
        registration.plan("hits", HITS_PLAN, suspect="s")
    for alpha in (0.0, 1.0, math.inf):
        with pytest.raises((GuardError, ValueError)):
            registration.seal(alpha=alpha)
    assert path.read_bytes() == before
    registration.seal(alpha=0.01)
    with pytest.raises(GuardError, match="after the seal"):
        registration.commit("late", scheme="key", commitment="0" * 64)
    assert Registered.read(path.read_bytes()).plans == {"hits": HITS_PLAN}


def test_every_byte_of_a_registration_counts() -> None:
    data, heads = registered()
    assert Registered.read(data).head == heads[-1]
    assert Registered.read(data).hashes[1:] == tuple(heads)
    generator = random.Random(0)
    for place in generator.sample(range(len(data)), 500):
        changed = bytearray(data)
        changed[place] ^= 1 << generator.randrange(8)
        with pytest.raises(GuardError):
            Registered.read(bytes(changed))
    lines = data.splitlines(keepends=True)
    for some in (lines[1:], [lines[0], *lines[2:]], [lines[0], lines[2], lines[1], *lines[3:]], [*lines, lines[-1]], [*lines[:2], *lines[1:]]):
        with pytest.raises(GuardError):
            Registered.read(b"".join(some))


# --- the accused --------------------------------------------------------------------------------------------------------------------


def test_the_accused_are_told_what_to_check(bundle: Path) -> None:
    _, heads = registered()
    text = respondent.listing(bundle, tests=TESTS)
    assert all(head in text for head in heads)
    assert "2026-01-01T01:00:00.000Z" in text
    for name in ("hits", "exposure"):
        assert sha256_hex((bundle / "data" / name / "answers.jsonl").read_bytes()) in text
    for explanation in (*respondent.INNOCENT["code"], *respondent.INNOCENT["coin"]):
        assert explanation in text
    assert TOY.again in text
    assert NEGATIVE in text
    assert "could have written it after asking" in text
    assert "What does not hold" not in text
    assert "could have written it after asking" not in respondent.listing(bundle, held=[heads[-1]], tests=TESTS)


def test_the_accused_are_told_what_does_not_hold(bundle: Path) -> None:
    rewritten(bundle, "limits.md", b"Guilty.\n")
    assert "limits.md does not say what follows" in respondent.listing(bundle, tests=TESTS)
    rewritten(bundle, "results.json", b'{"family":{"rejected":3},"findings":{"hits":null}}')
    assert "result of hits" in respondent.listing(bundle, tests=TESTS)
    (bundle / "limits.md").write_bytes(b"Guilty!\n")
    with pytest.raises(GuardError, match=r"limits\.md"):
        respondent.listing(bundle, tests=TESTS)


def test_every_null_has_innocent_explanations() -> None:
    assert respondent.INNOCENT.keys() == CLAIMS.keys()


def test_the_accused_can_run_the_test_on_their_own_model(bundle: Path) -> None:
    own = evidence.rerun(bundle, "hits", {"answers.jsonl": rows(MADE, 0)}, tests=TESTS)
    assert own.log_p == 0.0
    assert not own.rejects
    same = evidence.rerun(bundle, "hits", {"answers.jsonl": rows(MADE, 4)}, tests=TESTS)
    assert same.rejects
    with pytest.raises(GuardError, match="no test called"):
        evidence.rerun(bundle, "other", {}, tests=TESTS)
    shutil.rmtree(bundle / "calibrations")
    with pytest.raises(GuardError, match="missing"):
        evidence.rerun(bundle, "hits", {"answers.jsonl": rows(MADE, 0)}, tests=TESTS)


def test_a_sequential_test_is_recomputed_from_the_first_triggers(tmp_path: Path) -> None:
    test = Hits(canaries=MADE, nonce=NONCE, stopping="sequential")
    plan = test.plan(alpha=0.01)
    registration = Registration.begin(tmp_path / "r.jsonl", owner="o", purpose="p")
    registration.commit("canaries", scheme="canaries", commitment=MADE.commitment(NONCE))
    registration.plan("hits", plan, suspect="s")
    registration.seal(alpha=0.01)
    data = (tmp_path / "r.jsonl").read_bytes()
    first = b"".join(rows(MADE, 3).splitlines(keepends=True)[:3])
    evidence.write(tmp_path / "bundle", data, {"hits": Submission(opening=MADE.opening(NONCE), data={"answers.jsonl": first})}, [passing(plan)])
    told = json.loads((tmp_path / "bundle" / "results.json").read_bytes())["findings"]["hits"]
    assert told["scored"] == 3
    assert told["log_e"] > math.log(100)
    assert told["rejects"] is True
    assert evidence.verify(tmp_path / "bundle", known=[passing(plan)]).failures == ()
    last = b"".join(rows(MADE, 3).splitlines(keepends=True)[3:])
    with pytest.raises(GuardError, match="word for word"):  # which triggers were asked is not chosen afterwards
        evidence.write(tmp_path / "other", data, {"hits": Submission(opening=MADE.opening(NONCE), data={"answers.jsonl": last})}, [passing(plan)])
    assert calibration.packaged(plan) is None
