"""The user's own terms: what is added, confirmed and attached comes back as it was, is kept to oneself, and what is broken is told with its line."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom.core import durable
from stillroom.core.errors import EntitlementError, ResourceError, RunError, StillroomError
from stillroom.core.hashing import sha256_hex
from stillroom.entitlement import store as module
from stillroom.entitlement.library import CATALOGUE_FOLDER, Catalogue, Source, builtin
from stillroom.entitlement.reading import parse_terms, read_terms
from stillroom.entitlement.records import CatalogueFile, Record
from stillroom.entitlement.store import FIXED_REVIEW_DAYS, REVIEW_DAYS, TermsStore, attached, record_named, standing
from stillroom.entitlement.verdict import Circumstances, Confirmation, Use, decide

TODAY = date(2026, 11, 24)
APACHE, OPENAI = "apache-2.0@2004-01-01", "openai-services-agreement@2026-01-01"
# A text is asked for once a test; the tests share nothing else.
within = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def store(tmp_path: Path) -> TermsStore:
    return TermsStore.open(tmp_path / "terms")


def record(name: str = "our-contract@2026-10-01", **changed: Any) -> dict[str, Any]:
    clause = {
        "id": "training",
        "locator": "section 1",
        "effect": "permit",
        "actions": ["train-on-output", "generate-for-training", "evaluate-only"],
        "paraphrase": "Outputs may be used to train models of one's own.",
    }
    found = {
        "id": name,
        "kind": "licence",
        "provider": "Our Supplier",
        "title": "Contract of October",
        "effective": date(2026, 10, 1),
        "url": "https://example.org/contract",
        "review_by": date(2027, 1, 1),
        "applies_to": {"access": ["weights"]},
        "evidence": {"grade": "P1", "source": "the signed contract"},
        "clauses": [clause],
    } | changed
    return {key: value for key, value in found.items() if value is not None}


def written(path: Path, *records: dict[str, Any], **lists: Any) -> Path:
    tree: dict[str, Any] = ({"records": list(records)} if records else {}) | lists
    path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


def text_in(folder: Path, text: str = "You may train on outputs.\n", name: str = "text.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@contextmanager
def refused(code: str, *says: str) -> Iterator[None]:
    with pytest.raises(StillroomError) as raised:
        yield
    assert raised.value.code == code
    for words in says:
        assert words in str(raised.value), str(raised.value)


# --- where it is --------------------------------------------------------------------------------------------------------------------


def test_it_lies_where_the_user_says_else_with_the_users_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STILLROOM_TERMS", str(tmp_path / "here"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert TermsStore.open().directory == tmp_path / "here"
    monkeypatch.setenv("STILLROOM_TERMS", "~/mine")
    assert TermsStore.open().directory == tmp_path / "mine"
    monkeypatch.setenv("STILLROOM_TERMS", "")
    assert TermsStore.open().directory == tmp_path / "data" / "stillroom" / "terms"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setattr("sys.platform", "linux")
    assert TermsStore.open().directory == tmp_path / ".local" / "share" / "stillroom" / "terms"
    monkeypatch.setattr("sys.platform", "darwin")
    assert TermsStore.open().directory == tmp_path / "Library" / "Application Support" / "stillroom" / "terms"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("STILLROOM_TERMS", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with refused("terms-missing", "STILLROOM_TERMS"):
        TermsStore.open()


def test_reading_creates_nothing(store: TermsStore, tmp_path: Path) -> None:
    assert store.confirmations() == {}
    assert store.catalogue() == builtin()
    assert store.text_of(APACHE) is None
    assert list(tmp_path.iterdir()) == []
    with refused("terms-missing"):
        store.add(tmp_path / "missing.yaml")
    with refused("terms-missing"):
        store.confirm("no-such@2020", tmp_path / "missing.txt", "me", TODAY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["records", "confirmations.jsonl"])
def test_what_cannot_be_read_is_an_error(store: TermsStore, name: str) -> None:
    store.directory.mkdir()
    if name == "records":
        (store.directory / name).write_text("a file where a folder should be")
        with refused("terms-missing", "records"):
            store.catalogue()
    else:
        (store.directory / name).mkdir()
        with refused("terms-missing", "confirmations.jsonl"):
            store.confirmations()


# --- adding -------------------------------------------------------------------------------------------------------------------------


def test_what_was_added_is_on_file_byte_for_byte(store: TermsStore, tmp_path: Path) -> None:
    path = written(tmp_path / "Vertrag – Köln.yaml", record(title="Vertrag über Töchtermodelle ✓"), record("other@2026"))
    assert store.add(path) == ("other@2026", "our-contract@2026-10-01")
    assert (store.directory / "records" / path.name).read_bytes() == path.read_bytes()
    catalogue = store.catalogue()
    assert catalogue.records["our-contract@2026-10-01"].title == "Vertrag über Töchtermodelle ✓"
    assert catalogue.own == {"other@2026", "our-contract@2026-10-01"}
    assert set(catalogue.records) > set(builtin().records)


def test_a_record_of_the_users_takes_the_place_of_ours(store: TermsStore, tmp_path: Path) -> None:
    ours = builtin().records["mit@1988"].model_dump(mode="json", exclude_none=True)
    store.add(written(tmp_path / "mit.yaml", ours | {"title": "MIT as our lawyers read it"}))
    assert store.catalogue().records["mit@1988"].title == "MIT as our lawyers read it"
    assert builtin().records["mit@1988"].title != "MIT as our lawyers read it"


def test_adding_a_file_a_second_time_changes_nothing(store: TermsStore, tmp_path: Path) -> None:
    path = written(tmp_path / "a.yaml", record())
    assert store.add(path) == store.add(path)
    assert [there.name for there in (store.directory / "records").iterdir()] == ["a.yaml"]


def test_two_files_of_one_name_are_both_kept(store: TermsStore, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    store.add(written(tmp_path / "a.yaml", record()))
    store.add(written(tmp_path / "b" / "a.yaml", record("second@2026")))
    assert sorted(there.name for there in (store.directory / "records").iterdir()) == ["a-2.yaml", "a.yaml"]
    assert store.catalogue().own == {"our-contract@2026-10-01", "second@2026"}


def test_a_record_in_two_files_of_the_users_is_refused_with_both_names(store: TermsStore, tmp_path: Path) -> None:
    store.add(written(tmp_path / "a.yaml", record()))
    with refused("terms-invalid", "our-contract@2026-10-01", "a.yaml", "b.yaml"):
        store.add(written(tmp_path / "b.yaml", record(title="Contract, mended")))
    assert store.catalogue().records["our-contract@2026-10-01"].title == "Contract of October"
    (store.directory / "records" / "b.yaml").write_bytes((tmp_path / "b.yaml").read_bytes())
    with refused("terms-invalid", "our-contract@2026-10-01", "a.yaml", "b.yaml"):
        store.catalogue()


def test_two_records_with_one_id_in_one_file_are_refused(store: TermsStore, tmp_path: Path) -> None:
    with refused("terms-invalid", "two records"):
        store.add(written(tmp_path / "a.yaml", record(), record()))


@pytest.mark.parametrize(
    ("lists", "says"),
    [
        ({}, "nothing in it"),
        ({"records": [record(incorporates=["no-such-policy"])]}, "no-such-policy"),
        ({"aliases": [{"family": "no-such-family", "names": ["x"]}]}, "no-such-family"),
    ],
    ids=["empty", "unknown-instrument", "unknown-family"],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(store: TermsStore, tmp_path: Path, lists: dict[str, Any], says: str) -> None:
    with refused("terms-invalid", says):
        store.add(written(tmp_path / "a.yaml", **lists))
    assert not (store.directory / "records").exists()


def test_models_and_aliases_of_the_users_are_looked_up_before_ours(store: TermsStore, tmp_path: Path) -> None:
    subject = {"names": ["acme/*"], "provider": "acme", "instruments": ["mit"], "evidence": {"grade": "P1", "source": "their model card"}}
    assert store.add(written(tmp_path / "a.yaml", models=[subject], aliases=[{"family": "mit", "names": ["acme-licence"]}])) == ()
    found = store.catalogue()
    assert found.subject("acme/tiny") is not None
    assert found.licence_family("Acme Licence") == "mit"


def test_a_full_disk_leaves_the_store_as_it_was(store: TermsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(written(tmp_path / "a.yaml", record()))

    def full(path: Path, data: bytes, *, mode: int = 0o644) -> None:
        raise ResourceError("disk-full", found="the disk is full", do="Free some space.")

    monkeypatch.setattr(durable, "write_bytes_atomic", full)
    with refused("disk-full"):
        store.add(written(tmp_path / "b.yaml", record("b@2026")))
    with refused("disk-full"):
        store.confirm(APACHE, text_in(tmp_path), "me", TODAY)
    assert store.catalogue().own == {"our-contract@2026-10-01"}
    assert store.confirmations() == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_told(store: TermsStore, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with refused("terms-missing", "cannot be written"):
        store.confirm(APACHE, text_in(tmp_path), "me", TODAY)


def test_a_file_in_the_place_of_the_directory_is_told(tmp_path: Path) -> None:
    store = TermsStore.open(text_in(tmp_path, name="terms"))
    with refused("terms-missing"):
        store.confirmations()
    with refused("terms-missing"):
        store.confirm(APACHE, tmp_path / "terms", "me", TODAY)


# --- confirming ---------------------------------------------------------------------------------------------------------------------


def test_a_confirmation_is_what_was_read_by_whom_and_until_when(store: TermsStore, tmp_path: Path) -> None:
    path = text_in(tmp_path, "Ausgaben dürfen verwendet werden.\r\n")
    made = store.confirm(OPENAI, path, "  Zoë  Müller ", TODAY)
    assert made == Confirmation(
        record=OPENAI,
        text_sha256=sha256_hex(path.read_bytes()),
        confirmed_by="Zoë Müller",
        confirmed_on=TODAY,
        review_by=TODAY + timedelta(days=REVIEW_DAYS),
    )
    assert TermsStore.open(store.directory).confirmations() == {OPENAI: made}
    assert store.text_of(OPENAI) == path.read_bytes()
    (line,) = (store.directory / "confirmations.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "record": OPENAI,
        "text_sha256": made.text_sha256,
        "confirmed_by": "Zoë Müller",
        "confirmed_on": "2026-11-24",
        "review_by": "2027-02-22",
    }


def test_a_fixed_text_is_looked_at_again_in_ten_years(store: TermsStore, tmp_path: Path) -> None:
    made = store.confirm(APACHE, text_in(tmp_path), "me", TODAY)
    assert made.review_by == TODAY + timedelta(days=FIXED_REVIEW_DAYS)
    assert 9.99 < FIXED_REVIEW_DAYS / 365.25 < 10.01


def test_the_last_confirmation_counts_and_the_earlier_ones_stay(store: TermsStore, tmp_path: Path) -> None:
    first = store.confirm(OPENAI, text_in(tmp_path, "one"), "A", TODAY)
    other = store.confirm(APACHE, text_in(tmp_path, "licence"), "A", TODAY)
    # Recorded later, though by a clock that runs behind.
    second = store.confirm(OPENAI, text_in(tmp_path, "two"), "B", TODAY - timedelta(days=30))
    assert store.confirmations() == {OPENAI: second, APACHE: other}
    assert len((store.directory / "confirmations.jsonl").read_bytes().splitlines()) == 3
    assert {path.name for path in (store.directory / "texts").iterdir()} == {one.text_sha256 for one in (first, second, other)}
    assert store.text_of(OPENAI) == b"two"


def test_evidence_is_readable_by_nobody_else(store: TermsStore, tmp_path: Path) -> None:
    store.add(written(tmp_path / "a.yaml", record()))
    made = store.confirm(OPENAI, text_in(tmp_path), "me", TODAY)

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(store.directory) == mode(store.directory / "texts") == 0o700
    assert mode(store.directory / "texts" / made.text_sha256) == mode(store.directory / "confirmations.jsonl") == 0o600


@pytest.mark.parametrize("text", ["", " \n\t\r\n"])
def test_an_empty_text_confirms_nothing(store: TermsStore, tmp_path: Path, text: str) -> None:
    with refused("terms-invalid", "is empty", "OpenAI Services Agreement"):
        store.confirm(OPENAI, text_in(tmp_path, text), "me", TODAY)
    assert not store.directory.exists()


@pytest.mark.parametrize("name", ["", "  ", "\ud800"])
def test_somebody_confirms(store: TermsStore, tmp_path: Path, name: str) -> None:
    with refused("terms-invalid", "--by"):
        store.confirm(OPENAI, text_in(tmp_path), name, TODAY)


def test_a_record_that_is_not_there_is_told_with_the_nearest(store: TermsStore, tmp_path: Path) -> None:
    with refused("terms-missing", "openai-services-agreement@2025-01-01", OPENAI):
        store.confirm("openai-services-agreement@2025-01-01", text_in(tmp_path), "me", TODAY)


def test_a_text_that_was_removed_or_changed_since(store: TermsStore, tmp_path: Path) -> None:
    made = store.confirm(OPENAI, text_in(tmp_path), "me", TODAY)
    kept = store.directory / "texts" / made.text_sha256
    kept.write_text("something else")
    with refused("terms-invalid", "another digest", OPENAI):
        store.text_of(OPENAI)
    kept.unlink()
    assert store.text_of(OPENAI) is None
    assert store.confirmations() == {OPENAI: made}


GOOD = '{"record": "a@2020", "text_sha256": "' + "0" * 64 + '", "confirmed_by": "A", "confirmed_on": "2026-11-24", "review_by": "2027-02-22"}'


@pytest.mark.parametrize(
    "line",
    [
        "",
        " ",
        "{",
        "[]",
        "null",
        "\x00",
        '"a"',
        GOOD[:-1],
        GOOD + GOOD,
        GOOD.replace('"A"', "1"),
        GOOD.replace('"A"', '""'),
        GOOD.replace('"A"', '"\\ud800"'),
        GOOD.replace('"record": "a@2020"', '"record": ""'),
        GOOD.replace('"record"', '"recrod"'),
        GOOD.replace("}", ', "more": "x"}'),
        GOOD.replace("}", ', "record": "b@2020"}'),
        GOOD.replace("0" * 64, "0" * 63),
        GOOD.replace("0" * 64, "A" * 64),
        GOOD.replace("2026-11-24", "2026-13-24"),
        GOOD.replace("2026-11-24", "2026-W48-2"),
        GOOD.replace("2026-11-24", "24.11.2026"),
        GOOD.replace("2027-02-22", ""),
        "[" * 100_000,
    ],
)
def test_a_broken_line_is_told_with_its_number_and_never_passed_over(store: TermsStore, line: str) -> None:
    store.directory.mkdir()
    log = store.directory / "confirmations.jsonl"
    log.write_text(f"{GOOD}\n{line}\n{GOOD}\n", encoding="utf-8")
    with refused("terms-invalid", "confirmations.jsonl:2"):
        store.confirmations()
    assert log.read_text(encoding="utf-8").startswith(GOOD)


def test_a_broken_line_keeps_a_confirmation_from_being_written_over_it(store: TermsStore, tmp_path: Path) -> None:
    store.directory.mkdir()
    log = store.directory / "confirmations.jsonl"
    log.write_bytes(b"{\n")
    with refused("terms-invalid", "confirmations.jsonl:1"):
        store.confirm(OPENAI, text_in(tmp_path), "me", TODAY)
    assert log.read_bytes() == b"{\n"


def test_a_last_line_without_a_line_feed_is_read(store: TermsStore) -> None:
    store.directory.mkdir()
    (store.directory / "confirmations.jsonl").write_text(f"{GOOD}\n{GOOD.replace('a@2020', 'b@2020')}", encoding="utf-8")
    assert set(store.confirmations()) == {"a@2020", "b@2020"}


def _confirm_often(directory: Path, folder: Path, name: str, times: int) -> None:
    path = text_in(folder, f"text of {name}", f"{name}.txt")
    for _ in range(times):
        TermsStore(directory).confirm(APACHE, path, name, TODAY)


def test_two_processes_lose_no_confirmation(store: TermsStore, tmp_path: Path) -> None:
    spawned = multiprocessing.get_context("spawn")
    others = [spawned.Process(target=_confirm_often, args=(store.directory, tmp_path, name, 10)) for name in ("ann", "bob")]
    for one in others:
        one.start()
    for one in others:
        one.join(60)
        assert one.exitcode == 0
    lines = [json.loads(line) for line in (store.directory / "confirmations.jsonl").read_text().splitlines()]
    assert sorted(line["confirmed_by"] for line in lines) == ["ann"] * 10 + ["bob"] * 10


def test_a_writer_that_does_not_end_is_told(store: TermsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)
    store.directory.mkdir()
    with durable.DirectoryLock(store.directory), pytest.raises(RunError, match="try again") as raised:
        store.confirm(APACHE, text_in(tmp_path), "me", TODAY)
    assert raised.value.code == "run-locked"


# --- what a confirmation is worth ---------------------------------------------------------------------------------------------------


def on_file(**changed: Any) -> Record:
    (found,) = parse_terms(yaml.safe_dump({"records": [record(**changed)]}), "a test").records
    return found


def outcome(of: Record, confirmations: dict[str, Confirmation], today: date) -> tuple[str, str]:
    """What the verdict makes of a teacher under this record alone, and why."""
    catalogue = Catalogue.of([CatalogueFile(records=(of,))])
    teacher = Source(name="acme/tiny", access="weights", licence=of.family, declared_by="its card")
    use = Use(facts={"purpose": "train", "method": "text", "modality": "text"})
    verdict = decide([teacher], use, catalogue, Circumstances(today=today, confirmations=confirmations))
    return verdict.outcome, verdict.reasons[0].standing


def test_the_cycle_of_a_confirmation(store: TermsStore, tmp_path: Path) -> None:
    """Needs confirming; confirmed; stale; confirmed again; of another text. The words that `terms list` shows are those that the verdict acts on."""
    text = text_in(tmp_path)
    store.add(written(tmp_path / "a.yaml", record(text_sha256=sha256_hex(text.read_bytes()))))
    name = "our-contract@2026-10-01"

    def now(today: date) -> tuple[str, str, str]:
        of, confirmations = store.catalogue().records[name], store.confirmations()
        return (standing(of, confirmations.get(name), today), *outcome(of, confirmations, today))

    assert now(TODAY) == ("needs confirming", "unknown", "not confirmed")
    assert now(date(2027, 1, 2)) == ("stale since 2027-01-01", "unknown", "stale")
    until = store.confirm(name, text, "me", TODAY).review_by
    assert now(TODAY) == now(until)
    assert now(TODAY) == (f"confirmed until {until}", "allow", "permits")
    assert now(until + timedelta(days=1)) == (f"stale since {until}", "unknown", "stale")
    later = store.confirm(name, text, "me", until + timedelta(days=1)).review_by
    assert now(until + timedelta(days=1)) == (f"confirmed until {later}", "allow", "permits")
    store.confirm(name, text_in(tmp_path, "You may not."), "me", until + timedelta(days=1))
    assert now(until + timedelta(days=1)) == ("other text confirmed", "unknown", "other text")


@pytest.mark.parametrize("grade", ["P1", "P2", "S", "M"])
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("confirmed", [True, False])
@pytest.mark.parametrize("day", [TODAY, date(2027, 1, 1), date(2027, 1, 2), date(2040, 1, 1)])
def test_the_standing_says_what_the_verdict_does(grade: str, fixed: bool, confirmed: bool, day: date) -> None:
    of = on_file(evidence={"grade": grade, "source": "a source"}, fixed=fixed, review_by=None if fixed else date(2027, 1, 1))
    confirmation = Confirmation(record=of.id, text_sha256="0" * 64, confirmed_by="A", confirmed_on=TODAY, review_by=date(2027, 1, 1))
    confirmations = {of.id: confirmation} if confirmed else {}
    words = standing(of, confirmations.get(of.id), day)
    expected = {
        "permits": words.startswith(("fixed", "confirmed")),
        "not confirmed": words == "needs confirming",
        "stale": words == "stale since 2027-01-01",
        "not founded": words == "cannot allow",
    }
    found, why = outcome(of, confirmations, day)
    assert expected[why], (words, why)
    assert (found == "allow") == (why == "permits")


# --- names --------------------------------------------------------------------------------------------------------------------------


def test_a_record_is_found_by_id_family_and_licence_id(tmp_path: Path) -> None:
    catalogue = builtin()
    assert record_named(APACHE, catalogue, TODAY).id == APACHE
    assert record_named("apache-2.0", catalogue, TODAY).id == APACHE
    assert record_named("Apache 2.0", catalogue, TODAY).id == APACHE
    with refused("terms-missing", "no record 'apach-2.0@2004-01-01'", APACHE):
        record_named("apach-2.0@2004-01-01", catalogue, TODAY)
    with refused("terms-missing", "stillroom terms list"):
        record_named("", catalogue, TODAY)


def test_of_several_versions_the_one_in_force_is_meant() -> None:
    old = on_file(name="a@2025", effective=date(2025, 1, 1), superseded=date(2026, 1, 1))
    new = on_file(name="a@2026", effective=date(2026, 1, 1))
    catalogue = Catalogue.of([CatalogueFile(records=(old, new))])
    assert record_named("a", catalogue, TODAY) == new
    assert record_named("a", catalogue, date(2025, 6, 1)) == old
    assert record_named("a", catalogue, date(2020, 1, 1)) == new  # none was in force: the last
    both = Catalogue.of([CatalogueFile(records=(new, on_file(name="a@2026-02-01", effective=date(2026, 1, 1), variant="EEA")))])
    with refused("terms-missing", "a@2026", "a@2026-02-01"):
        record_named("a", both, TODAY)


# --- authorisations -----------------------------------------------------------------------------------------------------------------


def permission(**changed: Any) -> dict[str, Any]:
    return {
        "id": "letter-of-may",
        "grantor": "Anthropic",
        "holder": "Acme",
        "instruments": ["anthropic-usage-policy"],
        "actions": ["train-on-output"],
        "granted": date(2026, 5, 1),
        "expires": date(2027, 5, 1),
        "document": "letter.pdf",
        "document_sha256": sha256_hex(b"signed"),
    } | changed


def test_an_authorisation_comes_with_the_digest_of_what_lies_beside_it(tmp_path: Path) -> None:
    path = written(tmp_path / "a.yaml", authorisations=[permission()])
    (found,) = attached([path])
    assert (found.authorisation.id, found.found_sha256) == ("letter-of-may", None)
    (tmp_path / "letter.pdf").write_bytes(b"signed")
    assert attached([str(path)])[0].found_sha256 == found.authorisation.document_sha256
    (tmp_path / "letter.pdf").write_bytes(b"forged")
    assert attached([path])[0].found_sha256 == sha256_hex(b"forged")
    assert attached([]) == ()


def test_authorisation_files_that_cannot_be_used(tmp_path: Path, store: TermsStore) -> None:
    one = written(tmp_path / "a.yaml", authorisations=[permission()])
    with refused("terms-invalid", "letter-of-may", "second"):
        attached([one, written(tmp_path / "b.yaml", authorisations=[permission()])])
    with refused("terms-invalid", "no authorisation"):
        attached([written(tmp_path / "c.yaml", record())])
    with refused("terms-invalid", "more than authorisations", "terms add"):
        attached([written(tmp_path / "d.yaml", record(), authorisations=[permission()])])
    with refused("terms-missing", "e.yaml"):
        attached([tmp_path / "e.yaml"])
    with refused("terms-missing", "letter.pdf"):
        (tmp_path / "letter.pdf").mkdir()
        attached([one])
    with refused("terms-invalid", "terms.authorisations"):
        store.add(one)


def test_validating_says_what_an_authorisation_is_worth(tmp_path: Path, store: TermsStore) -> None:
    path = written(tmp_path / "a.yaml", authorisations=[permission()])
    with refused("terms-invalid", "letter-of-may", "is not there: letter.pdf"):
        store.validated(path)
    (tmp_path / "letter.pdf").write_bytes(b"forged")
    with refused("terms-invalid", sha256_hex(b"forged"), sha256_hex(b"signed")):
        store.validated(path)
    (tmp_path / "letter.pdf").write_bytes(b"signed")
    assert len(store.validated(path).authorisations) == 1
    with refused("terms-invalid", "no-such-terms"):
        store.validated(written(tmp_path / "b.yaml", authorisations=[permission(instruments=["no-such-terms"])]))


def test_authorisations_in_the_store_are_refused(tmp_path: Path, store: TermsStore) -> None:
    (store.directory / "records").mkdir(parents=True)
    written(store.directory / "records" / "a.yml", authorisations=[permission()])
    with refused("terms-invalid", "a.yml", "terms.authorisations"):
        store.catalogue()


# --- readers ------------------------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [*Record.model_fields, *CatalogueFile.model_fields, "any", "not", "within", "over", "release", "domicile", "monthly_users", "~"]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.dates()
    | st.binary(max_size=8)
    | st.sampled_from(["P1", "permit", "NO", "EU", "a@2020", "train-on-output", "2024-13-45", "0b", "1:99", "<<"])
)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=20)
pieces = st.sampled_from(
    ["records:\n", "- ", "  ", "id: ", "a@2020", "\n", ": ", "&a ", "*a", "<<: ", "!!int ", "!foo ", "? ", "[", "]", "{", "}", "'", '"', "|\n", "--- ", "\t", "\x00",
     "2024-02-30", "\ufeff", "é", "when: ", "{any: [", "clauses:\n", "#"]
)  # fmt: skip
mangled = st.lists(pieces, max_size=30).map("".join)


def never_a_traceback(read: Callable[[], object]) -> None:
    error = None
    try:
        read()
    except EntitlementError as refusal:
        error = refusal
    assert error is None or error.code in ("terms-missing", "terms-invalid")
    str(error).encode()


@within
@given(data=st.binary(max_size=300) | mangled.map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(data)
    for read in (lambda: read_terms(path), lambda: attached([path]), lambda: TermsStore(tmp_path / "s").validated(path)):
        never_a_traceback(read)


@within
@given(tree=trees)
def test_any_yaml_is_read_or_refused(tree: Any) -> None:
    text = yaml.safe_dump({"records": [record() | (tree if isinstance(tree, dict) else {"clauses": tree})]})
    never_a_traceback(lambda: [one.sha256 for one in parse_terms(text, "any.yaml").records])


@within
@given(tree=trees)
def test_any_condition_is_read_or_refused(tree: Any) -> None:
    clause = record()["clauses"][0] | {"when": tree}
    never_a_traceback(lambda: [one.sha256 for one in parse_terms(yaml.safe_dump({"records": [record(clauses=[clause])]}), "any.yaml").records])


@pytest.mark.parametrize(
    "condition",
    [
        {"domicile": {"within": [["DE"]]}},
        {"territories": {"within": [{"a": 1}]}},
        {"monthly_users": {"over": 10**30}},
        {"release": [["none"]]},
        {"task": {"a": 1}},
        {"any": {"task": "classifier"}},
    ],
    ids=str,
)
def test_a_condition_that_is_none_is_told_with_its_line(condition: Any) -> None:
    clause = record()["clauses"][0] | {"when": condition}
    with refused("terms-invalid", "f.yaml:", "when: "):
        parse_terms(yaml.safe_dump({"records": [record(clauses=[clause])]}), "f.yaml")


def test_a_house_rule_settles_a_fact_that_is_true_or_false() -> None:
    with refused("terms-invalid", "f.yaml:2", "task"):
        parse_terms("house_rules:\n- fact: task\n  value: true\n  when: {}\n  why: because\n", "f.yaml")


@within
@given(data=st.data())
def test_a_file_that_was_cut_off_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    whole = data.draw(st.sampled_from(sorted(CATALOGUE_FOLDER.glob("*.yaml")))).read_bytes()
    path = tmp_path / "cut.yaml"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    never_a_traceback(lambda: read_terms(path))


@within
@given(data=st.binary(max_size=300) | st.integers(0, len(GOOD)).map(lambda end: GOOD[:end].encode()) | trees.map(lambda tree: repr(tree).encode()))
def test_any_log_is_read_or_refused(data: bytes, tmp_path: Path) -> None:
    store = TermsStore(tmp_path)
    (tmp_path / "confirmations.jsonl").write_bytes(data)
    never_a_traceback(store.confirmations)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("records:\n  - id: a@2020\n    effective: 2024-13-45\n", "f.yaml:3"),
        ("a: 1\nb: !thing 2\n", "f.yaml:2"),
        ("records: &a\n  - *a\n", "f.yaml:2: *a stands for nothing above it"),
        ("records: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("records:\n  - id: a@2020\n    id: b@2020\n", "f.yaml:3: the key 'id' twice"),
        ("records:\n  - id: a@2020\n    titel: x\n", "did you mean 'title'"),
        ("records:\n\t- id: a\n", "f.yaml:2"),
        ("", "an empty file"),
        ("# only a comment\n", "an empty file"),
    ],
    ids=["no-such-day", "tag", "alias-of-itself", "deep", "key-twice", "misspelt", "tab", "empty", "comment"],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_with_its_line(text: str, says: str) -> None:
    with refused("terms-invalid", says, "f.yaml"):
        parse_terms(text, "f.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("'- ' * 200_000", "f.yaml:1: nested too deeply"),
        (
            "'a: &a [x,x,x,x,x,x,x,x,x,x]\\n' + ''.join(f'{b}: &{b} [' + ','.join([f'*{a}'] * 10) + ']\\n' for a, b in zip('abcdefgh', 'bcdefghi'))",
            "more values than a file of terms can have",
        ),
    ],
    ids=["nesting", "aliases-of-aliases"],
)
def test_what_has_no_end_does_not_end_the_process(text: str, says: str) -> None:
    """In a process of its own, with little memory: a composer that recurses dies where the stack ends, and one that unfolds takes all there is."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\nfrom stillroom.entitlement.reading import parse_terms\nparse_terms({text}, 'f.yaml')"
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.returncode
    assert says in done.stderr


def test_what_is_said_once_can_be_referred_to() -> None:
    text = yaml.safe_dump({"records": [record()]}).replace("  evidence:\n", "  evidence: &read\n")
    text += "models:\n- names: [acme/*]\n  provider: acme\n  evidence: *read\n- names: [acme/tiny]\n  provider: acme\n  evidence: *read\n"
    file = parse_terms(text, "f.yaml")
    assert [model.evidence for model in file.models] == [file.records[0].evidence] * 2
    line = text.splitlines().index("    grade: P1") + 1
    with refused("terms-invalid", f"f.yaml:{line}: ", "evidence.grade"):
        parse_terms(text.replace("grade: P1", "grade: P9"), "f.yaml")


def test_a_clause_that_is_wrong_is_told_with_its_line(tmp_path: Path) -> None:
    long = record()["clauses"][0] | {"paraphrase": " ".join(["word"] * 61)}
    path = written(tmp_path / "a.yaml", record(clauses=[record()["clauses"][0], long | {"id": "second"}]))
    line = next(number for number, text in enumerate(path.read_text().splitlines(), start=1) if text.strip().startswith("paraphrase: word"))
    with refused("terms-invalid", f"a.yaml:{line}", "at most 60 words"):
        read_terms(path)


def test_a_confirmation_is_not_changed_by_reading(store: TermsStore, tmp_path: Path) -> None:
    made = store.confirm(APACHE, text_in(tmp_path), "me", TODAY)
    assert store.confirmations()[APACHE] == replace(made)
