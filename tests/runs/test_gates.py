"""The gates of a run: at each the terms are asked anew, decisions are kept, what has changed is told, and nothing is learned without a yes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

import stillroom
from own_terms import APACHE, DENIAL, DISPLAY, apache_with, confirm, own_terms
from stillroom.core import clock, durable
from stillroom.core.errors import EntitlementDenied, EntitlementUnknown, Interrupted, LedgerError, RunError
from stillroom.data import TransferSet
from stillroom.entitlement.library import builtin
from stillroom.evals import cost
from stillroom.evals.measured import Absence
from stillroom.ledger import Ledger
from stillroom.models.local import LocalTeacher
from stillroom.runs import planning, training
from stillroom.runs.directory import Run
from stillroom.runs.entitling import decide_recipe
from stillroom.runs.gates import Gates, read_decision
from stillroom.runs.loop import Loop
from stillroom.runs.recipe import Recipe
from tiny_run import tiny_recipe


class Notes:
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, name: str, detail: str) -> None: ...

    def progress(self, done: int, total: int, unit: str, fields: dict[str, str]) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def of_drift(self) -> list[str]:
        return [note.partition(": ")[2] for note in self.notes if note.startswith("drift since decision ")]


class Case:
    """A tiny run, and the user's own terms."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.out, self.store = recipe, folder / "out", folder / "store"

    def terms(self, *clauses: dict[str, Any]) -> None:
        """From now on Apache-2.0 has these clauses too."""
        own_terms(self.store, *([apache_with(*clauses)] if clauses else []))

    def until(self, state: str) -> Notes:
        notes = Notes()
        stillroom.run(self.recipe, out=self.out, until=state, observer=notes)
        return notes

    @property
    def run(self) -> Run:
        return Run.open(self.out)

    @property
    def kept(self) -> set[str]:
        return {path.stem for path in (self.out / "decisions").iterdir()}

    @property
    def latest(self) -> str:
        return read_decision(self.out / "decision.json").sha256

    def entries(self, stage: str) -> list[dict[str, Any]]:
        lines = (json.loads(line)["entry"] for line in (self.out / "ledger.jsonl").read_text().splitlines())
        return [entry for entry in lines if entry["stage"] == stage]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe.from_tree(tiny_recipe(tmp_path_factory.mktemp("in")) | {"evaluation": {}})


@pytest.fixture(scope="module")
def collected_once(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Notes]:
    notes = Notes()
    return stillroom.run(recipe, out=tmp_path_factory.mktemp("run") / "out", until="collected", observer=notes).directory, notes


@pytest.fixture
def case(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setenv("STILLROOM_TERMS", str(tmp_path / "store"))
    return Case(recipe, tmp_path)


@pytest.fixture
def collected(case: Case, collected_once: tuple[Path, Notes]) -> Case:
    """A case whose answers have been collected, under our catalogue alone."""
    shutil.copytree(collected_once[0], case.out)
    return case


def before(target: Any, name: str, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """`act` is done whenever `target.name` is about to be called."""
    whole = getattr(target, name)

    def acted(*arguments: Any, **named: Any) -> Any:
        act()
        return whole(*arguments, **named)

    monkeypatch.setattr(target, name, acted)


# --- kept decisions and the ledger ------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_decision_and_its_ledger_names_it(collected: Case, collected_once: tuple[Path, Notes]) -> None:
    case, notes = collected, collected_once[1]
    assert case.kept == {case.latest}
    verdict = read_decision(case.out / "decision.json")
    assert verdict == decide_recipe(case.recipe)
    assert (case.out / "decision.md").read_text().count("not legal advice") == 1
    for entry in case.entries("collect"):
        assert entry["decision"] == case.latest
        assert entry["terms"] == [builtin().records[APACHE].sha256]
    assert TransferSet.load(case.run.transfer_set_path).decision == case.latest
    assert any(note.startswith("terms: allow-with-obligations") for note in notes.notes)
    assert any(note.startswith("obligation: If release is weights: licence-copy") for note in notes.notes)
    assert not notes.of_drift


def test_the_account_that_asks_is_in_the_ledger(case: Case) -> None:
    case.recipe = Recipe.from_tree(case.recipe.model_dump() | {"intent": {"account": "account-7"}})
    case.until("collected")
    assert {entry["access"]["account"] for entry in case.entries("collect")} == {"account-7"}


# --- each gate --------------------------------------------------------------------------------------------------------------------------------


def test_gate_1_stops_before_anything(case: Case) -> None:
    case.terms(DENIAL)
    with pytest.raises(EntitlementDenied, match="no-training"):
        case.until("reported")
    assert not case.out.exists()


def test_gate_1_asks_again_when_the_card_of_a_fetched_model_says_otherwise(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = shutil.copytree(case.recipe.teacher.model, tmp_path / "teacher")
    case.recipe = Recipe.from_tree(case.recipe.model_dump() | {"teacher": {"model": str(teacher)}})

    def fetched() -> None:
        (tmp_path / "teacher" / "README.md").write_text("---\nlicense: llama2\n---\n")

    before(planning, "describe", fetched, monkeypatch)
    with pytest.raises(EntitlementDenied, match="llama-2@"):
        case.until("planned")
    assert not (case.out / "recipe.json").exists()


def test_gate_2_stops_the_freezing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terms change while the teacher answers."""
    before(LocalTeacher, "generate", lambda: case.terms(DENIAL), monkeypatch)
    with pytest.raises(EntitlementDenied):
        case.until("collected")
    assert not case.run.transfer_set_path.exists()
    assert case.entries("collect")
    assert not case.entries("freeze")
    assert len(case.kept) == 1  # a denial is raised and not kept
    monkeypatch.undo()
    monkeypatch.setenv("STILLROOM_TERMS", str(case.store))
    case.terms()
    case.until("collected")
    assert case.run.state == "collected"


def test_gate_3_stops_before_the_first_step(collected: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terms change while the student is built."""
    case = collected
    before(training, "untrained_student", lambda: case.terms(DENIAL), monkeypatch)
    with pytest.raises(EntitlementDenied):
        case.until("trained")
    assert not (case.out / "checkpoints").exists()
    assert not case.entries("train")


def test_a_training_that_is_resumed_passes_the_gate_again(collected: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case = collected
    step = Loop._one_step

    def interrupted(loop: Loop, began: float, began_tokens: int) -> None:
        if loop.progress.step == 4:
            raise Interrupted("interrupted", found="a test", do="Go on.")
        step(loop, began, began_tokens)

    monkeypatch.setattr(Loop, "_one_step", interrupted)
    with pytest.raises(Interrupted):
        case.until("trained")
    trained = len(case.entries("train"))
    assert trained > 0
    monkeypatch.setattr(Loop, "_one_step", step)
    case.terms(DENIAL)
    with pytest.raises(EntitlementDenied):
        case.until("trained")
    assert len(case.entries("train")) == trained
    case.terms()
    case.until("trained")
    assert case.run.state == "trained"


def test_the_day_is_todays_at_every_gate(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A confirmation that holds when the answers are collected has run out when training is to begin."""
    record = apache_with() | {"fixed": False, "review_by": "2026-12-31"}
    store = own_terms(case.store, record)
    confirm(store, APACHE, date(2026, 11, 24))
    monkeypatch.setattr(clock, "now", lambda: datetime(2026, 11, 24, tzinfo=UTC))
    case.until("collected")
    monkeypatch.setattr(clock, "now", lambda: datetime(2027, 3, 1, tzinfo=UTC))
    with pytest.raises(EntitlementUnknown, match="stillroom terms confirm"):
        case.until("trained")
    confirm(store, APACHE, date(2027, 3, 1))
    case.until("trained")


# --- drift ------------------------------------------------------------------------------------------------------------------------------------


def test_terms_that_changed_since_the_answers_were_collected_are_told_as_a_difference(collected: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case = collected
    monkeypatch.setattr(cost, "measure_peak_memory", lambda *_: Absence(absent="not measured in this test"))
    first = case.latest
    case.terms(DISPLAY)
    notes = case.until("trained")
    assert notes.of_drift == [f"record {APACHE}: changed", f"obligation added: display ({APACHE}#show)"]
    assert sum(note.startswith("obligation: display [Made with the work]") for note in notes.notes) == 1
    assert case.kept == {first, case.latest}
    assert case.latest != first
    # The answers stay under the decision that they were made under.
    assert {entry["decision"] for entry in case.entries("collect")} == {first}
    assert TransferSet.load(case.run.transfer_set_path).decision == first
    again = case.until("reported")
    assert not again.of_drift
    terms = case.run.report.provenance.terms
    assert terms["decision"] == case.latest
    assert any("Made with the work" in line for line in terms["obligations"] or ())
    # A finished run can be looked at, whatever the terms have become.
    case.terms(DENIAL)
    case.until("reported")


def test_a_catalogue_that_grew_elsewhere_is_no_drift(collected: Case) -> None:
    case = collected
    first = case.latest
    other = apache_with() | {"id": "other-licence@2024-01-01"}
    own_terms(case.store, other)
    notes = case.until("trained")
    assert case.kept == {first, case.latest}
    assert not notes.of_drift
    assert not [note for note in notes.notes if note.startswith("obligation")]


# --- rows that are refused --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def drifted(collected: Case) -> tuple[Case, Path]:
    """A collected run whose terms have changed since, and the file of the decision that its rows name."""
    path = collected.run.decisions_path / f"{collected.latest}.json"
    collected.terms(DISPLAY)
    return collected, path


def test_a_row_whose_decision_was_not_kept_is_refused(drifted: tuple[Case, Path]) -> None:
    case, path = drifted
    kept = path.read_bytes()
    path.unlink()
    with pytest.raises(EntitlementUnknown, match=path.stem):
        case.until("trained")
    assert not case.entries("train")
    path.write_bytes(kept)
    case.until("trained")


def test_a_row_whose_decision_was_altered_is_refused(drifted: tuple[Case, Path]) -> None:
    case, path = drifted
    path.write_text(path.read_text().replace("Apache License", "Apache Licence"))
    with pytest.raises(RunError) as caught:
        case.until("trained")
    assert caught.value.code == "run-corrupt"
    assert not case.entries("train")


@pytest.mark.parametrize("text", ["{}", "[]", '{"reasons": 1}', "not json"])
def test_a_decision_that_cannot_be_read_is_named(drifted: tuple[Case, Path], text: str) -> None:
    case, path = drifted
    for file in (path, case.run.decision_path):
        was = file.read_text()
        file.write_text(text)
        with pytest.raises(RunError, match=file.name) as caught:
            case.until("trained")
        assert caught.value.code == "run-corrupt"
        file.write_text(was)


def test_a_row_whose_decision_did_not_allow_is_refused(collected: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run of ours makes such a row."""
    case = collected
    refused = replace(read_decision(case.run.decision_path), outcome="unknown", question="May it?")
    durable.write_json_atomic(case.run.decisions_path / f"{refused.sha256}.json", refused.as_json())
    monkeypatch.setattr(Ledger, "decision_of", lambda *_: refused.sha256)
    with pytest.raises(EntitlementDenied, match="whose outcome is unknown"):
        case.until("trained")
    assert not case.entries("train")


def test_a_row_that_is_not_in_the_ledger_is_refused(collected: Case) -> None:
    case = collected
    gates, ledger = Gates(case.run, Notes()), Ledger.open(case.out)
    gates.admit(TransferSet.load(case.run.transfer_set_path).ids, ledger)
    with pytest.raises(LedgerError) as caught:
        gates.admit(["0" * 64], ledger)
    assert caught.value.code == "ledger-unknown-record"
