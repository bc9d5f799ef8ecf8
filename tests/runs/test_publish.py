"""Publishing: what a student must carry is written beside it, read back, and refused where something is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, TypeAlias, get_args

import pytest
import yaml

from stillroom import runs
from stillroom.core.errors import EntitlementDenied, EntitlementError, EntitlementUnknown, LedgerError, RecipeError, RunError
from stillroom.entitlement.records import DutyKind
from stillroom.entitlement.store import TermsStore
from stillroom.runs.publishing import Published, check, publish
from stillroom.runs.recipe import Recipe
from tiny_run import tiny_recipe

Tree: TypeAlias = dict[str, Any]
Change: TypeAlias = Callable[[Tree], None]

KINDS: tuple[DutyKind, ...] = get_args(DutyKind)
EXACT = {"name-prefix": "House", "display": "Built with the House"}
# Duties that our own text meets; the others need a text that is not ours, a name or a person.
WRITTEN = {"display", "notice-file", "flow-down-restrictions", "change-notice", "attribution", "policy", "non-commercial", "share-alike"}
# Of these, the ones that put the student under a licence whose text is not ours.
FOREIGN_TEXT = {"non-commercial", "share-alike"}


def licence(family: str, *duties: Tree, prohibits: Tree | None = None) -> Tree:
    """A licence that permits all that a student needs, with duties, and one thing that it may prohibit."""
    clause = {"locator": "section 1", "paraphrase": f"What the {family} licence says of this, in our words."}
    clauses: list[Tree] = [
        {"id": "grant", "effect": "permit", "actions": ["train-on-output", "use-logits", "init-from-weights", "evaluate-only"], **clause},
        *({"id": f"duty-{at}", "effect": "oblige", "actions": ["train-on-output"], "duty": duty, **clause} for at, duty in enumerate(duties)),
        *([{"id": "ban", "effect": "prohibit", **prohibits, **clause}] if prohibits else []),
    ]
    return {
        "id": f"{family}@2025-01-01",
        "kind": "licence",
        "provider": "The House",
        "title": f"The {family} licence",
        "effective": date(2025, 1, 1),
        "url": f"https://example.org/{family}",
        "spdx": "MIT",  # as permissive as MIT, but for its duties
        "fixed": True,
        "applies_to": {"access": ["weights", "dataset"]},
        "evidence": {"grade": "P1", "source": "the text"},
        "clauses": clauses,
    }


RECORDS = [
    *(licence(f"house-{kind}", {"kind": kind, **({"text": EXACT[kind]} if kind in EXACT else {})}) for kind in KINDS),
    licence("house-plain"),
    licence("exaone-like", {"kind": "name-prefix", "text": "EXAONE"}),
    licence("shown-by-services", {"kind": "display", "text": "Built with the House", "flows_to": ["service", "documentation"]}),
    licence("no-commerce", {"kind": "non-commercial"}, prohibits={"actions": ["commercial-use"]}),
    licence("many-users", {"kind": "display", "text": "House Inside"}),
]
RECORDS[-1]["clauses"][1]["when"] = {"monthly_users": {"over": 100_000_000}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe."""
    folder = tmp_path_factory.mktemp("run")
    return runs.run(Recipe.from_tree(tiny_recipe(folder / "in")), out=folder / "out").directory


class Case:
    """A copy of the run, whose recipe can be made another: what the run did stays the same."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.student = directory, directory / "student"
        self.change(lambda tree: tree["intent"].update(release="weights", student_name="house-of-bees"))

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_tree(json.loads((self.directory / "recipe.json").read_text(encoding="utf-8")))

    def change(self, change: Change) -> Case:
        path = self.directory / "recipe.json"
        tree = json.loads(path.read_text(encoding="utf-8"))
        change(tree)
        path.write_text(json.dumps(Recipe.from_tree(tree).model_dump(mode="json")), encoding="utf-8")
        return self

    def under(self, family: str) -> Case:
        return self.change(lambda tree: tree["terms"].update(licence=family))

    def intent(self, **facts: Any) -> Case:
        return self.change(lambda tree: tree["intent"].update(facts))

    def text(self, name: str) -> str:
        return (self.student / name).read_text(encoding="utf-8")

    def front(self) -> Tree:
        found: Tree = yaml.safe_load(self.text("README.md").split("---\n")[1])
        return found

    def contents(self) -> dict[str, bytes]:
        return {path.relative_to(self.student).as_posix(): path.read_bytes() for path in sorted(self.student.rglob("*")) if path.is_file()}

    def refused(self, *says: str) -> str:
        with pytest.raises(EntitlementError) as raised:
            publish(self.directory)
        assert (raised.value.code, raised.value.exit_code) == ("obligations-unmet", 2)
        for text in says:
            assert text in str(raised.value)
        return str(raised.value)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TermsStore:
    """A user's own terms, with a licence for each kind of duty."""
    path = tmp_path / "terms"
    monkeypatch.setenv("STILLROOM_TERMS", str(path))
    (path / "records").mkdir(parents=True)
    (path / "records" / "house.yaml").write_text(yaml.safe_dump({"records": RECORDS}), encoding="utf-8")
    return TermsStore.open()


@pytest.fixture
def case(finished: Path, tmp_path: Path, store: TermsStore) -> Case:
    return Case(shutil.copytree(finished, tmp_path / "copy"))


def confirm(store: TermsStore, record: str, tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "text-to-confirm"
    path.write_bytes(text)
    store.confirm(record, path, "A. Lawyer", date.today())


# --- a whole student ------------------------------------------------------------------------------------------------------------------


def test_a_student_of_an_apache_teacher(case: Case) -> None:
    before = case.contents()
    found = publish(case.directory)
    assert not found.unmet
    assert found.licence.licence == "Apache-2.0"
    assert set(found.files) == {"README.md", "NOTICE", "LICENSE", "obligations.md", "LICENSES/apache-2.0.txt"}
    assert case.text("LICENSE") == case.text("LICENSES/apache-2.0.txt") == (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    assert all(case.contents()[name] == data for name, data in before.items() if name != "README.md")
    front = case.front()
    assert front["license"] == "apache-2.0"
    assert "base_model" not in front
    assert "distillation" in front["tags"]
    (teacher,) = front["teachers"]
    assert teacher["source"] == "./teacher"
    assert teacher["terms"] == ["apache-2.0@2004-01-01"]
    assert len(teacher["weights_sha256"]) == 64
    trained = sum(
        json.loads(line)["entry"]["stage"] == "train" for line in (case.directory / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert teacher["records"] == trained > 0


def test_the_card_has_everything_once(case: Case) -> None:
    publish(case.directory)
    card = case.text("README.md")
    for heading in ("# house-of-bees", "## What it was made from", "## How good it is", "## Licence and terms"):
        assert card.count(f"\n{heading}\n") == 1
    assert card.count("not legal advice") == 1
    report = json.loads((case.directory / "report.json").read_text(encoding="utf-8"))
    assert f"{report['fidelity']['forward_kl_nats']['value']:.4f}" in card
    assert report["provenance"]["ledger_head"] in card


def test_publishing_twice_gives_the_same_bytes(case: Case) -> None:
    case.under("house-other")
    case.refused()
    once = case.contents()
    case.refused()
    assert case.contents() == once


def test_names_in_any_script(case: Case) -> None:
    name = "Bücher-模型-🦙 | *x*"
    case.intent(student_name=f"  {name}\n")
    publish(case.directory)
    assert f"\n# {name}\n" in case.text("README.md")
    assert case.text("NOTICE").startswith(name)
    case.front()


def test_the_report_stage_and_publishing_write_one_card(case: Case) -> None:
    plain = case.text("README.md")
    publish(case.directory)
    figures = [line for line in plain.splitlines() if line.startswith(("| ", "Gap recovered", "Recipe ", "A student of"))]
    assert len(figures) >= 6
    assert set(figures) <= set(case.text("README.md").splitlines())


# --- each duty ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_duty(case: Case, kind: DutyKind) -> None:
    case.under(f"house-{kind}")
    if kind in WRITTEN - FOREIGN_TEXT:
        assert not publish(case.directory).unmet
    else:
        case.refused("of which there is no text" if kind in FOREIGN_TEXT else kind)
    (item,) = (item for item in check(case.directory).items if item.owed is not None)
    assert item.met == (kind in WRITTEN)
    assert item.artefacts
    assert f"### {kind}: {'met' if item.met else 'not met'}\n" in case.text("obligations.md")
    assert case.text("README.md").startswith("---\nlicense: ")


def test_a_name_prefix_is_unmet_and_then_met(case: Case) -> None:
    case.under("house-name-prefix").intent(student_name="tiny-x")
    case.refused("name-prefix [House]", "begins with 'House'", "intent.student_name")
    named = case.recipe.model_copy(update={"intent": case.recipe.intent.model_copy(update={"student_name": "House-tiny"})})
    assert not publish(case.directory, recipe=named).unmet
    assert "\n# House-tiny\n" in case.text("README.md")
    assert [item.met for item in check(case.directory, recipe=named).items] == [True, True]
    case.intent(student_name=None)  # the recipe's own name is tiny
    case.refused("name-prefix")


def test_a_line_to_be_shown_has_a_section_of_its_own(case: Case) -> None:
    publish(case.under("house-display").directory)
    card = case.text("README.md")
    assert "\n# house-of-bees\n\n## To be shown\n\nBuilt with the House\n\n" in card
    assert "A service" not in card


def test_a_service_shows_the_line_and_a_person_says_so(case: Case) -> None:
    case.under("shown-by-services").intent(release="hosted")
    case.refused("tick it")
    page = case.text("obligations.md")
    assert "- [ ] The service shows: Built with the House" in page
    assert "A service that this model runs in shows the same." in case.text("README.md")
    (case.student / "obligations.md").write_text(page.replace("- [ ] The service", "- [x] The service"), encoding="utf-8")
    assert not publish(case.directory).unmet
    assert "- [x] The service shows: Built with the House" in case.text("obligations.md")
    once = case.contents()
    publish(case.directory)
    assert case.contents() == once


def test_what_is_never_met_is_refused_and_written_all_the_same(case: Case) -> None:
    case.under("house-no-distribution")
    text = case.refused("no-distribution", "lets the student be given to nobody", "keep it inside")
    assert "licence: none" not in text
    assert case.text("LICENSE").startswith("Nobody outside is given a licence")
    assert case.front()["license_name"] == "not-licensed"


def test_restrictions_that_flow_down(case: Case) -> None:
    found = publish(case.under("house-flow-down-restrictions").directory)
    assert found.licence.licence == "Apache-2.0 with use restrictions"
    terms = case.text("LICENSE")
    assert terms.startswith("Licence of house-of-bees: Apache-2.0 with use restrictions\n")
    assert "use restrictions of The house-flow-down-restrictions licence (https://example.org/house-flow-down-restrictions)" in terms
    assert "LICENSES/apache-2.0.txt" in terms
    assert case.text("LICENSES/apache-2.0.txt").lstrip().startswith("Apache License")
    assert case.front() | {"license": "other", "license_name": "apache-2.0-with-use-restrictions", "license_link": "LICENSE"} == case.front()


def test_non_commercial_needs_its_text(case: Case) -> None:
    case.under("house-non-commercial").intent(commercial=False)
    case.refused("CC-BY-NC-4.0, of which there is no text", "LICENSES/cc-by-nc-4.0.txt")
    (case.student / "LICENSES").mkdir(exist_ok=True)
    (case.student / "LICENSES" / "cc-by-nc-4.0.txt").write_text("the legal code\n", encoding="utf-8")
    assert not publish(case.directory).unmet
    assert "\nFor non-commercial use only, as The house-non-commercial licence asks" in case.text("LICENSE")
    assert "\nFor non-commercial use only, as The house-non-commercial licence asks" in case.text("README.md")
    assert case.front()["license"] == "cc-by-nc-4.0"


def test_a_duty_that_depends_on_a_fact_nobody_states(case: Case) -> None:
    case.under("many-users")
    assert not publish(case.directory).unmet  # the line is shown whether or not it must be
    assert "only if monthly users over 100,000,000" in case.text("obligations.md")
    case.intent(monthly_users=10)
    assert [item.owed for item in publish(case.directory).items] == [None]
    assert "House Inside" not in case.text("README.md")


# --- texts ----------------------------------------------------------------------------------------------------------------------------


def test_a_licence_copy_that_the_user_confirmed(case: Case, store: TermsStore, tmp_path: Path) -> None:
    case.under("house-licence-copy")
    case.refused("stillroom terms confirm house-licence-copy@2025-01-01 --file TEXT", "at student/LICENSES/house-licence-copy.txt")
    text = "The House licence.\r\nÄ\n".encode("latin-1")
    confirm(store, "house-licence-copy@2025-01-01", tmp_path, text)
    assert not publish(case.directory).unmet
    assert (case.student / "LICENSES/house-licence-copy.txt").read_bytes() == text


def test_a_licence_copy_that_came_with_the_weights_goes_first(case: Case, store: TermsStore, tmp_path: Path) -> None:
    teacher = shutil.copytree(case.recipe.teacher.model, tmp_path / "other" / "teacher")
    (teacher / "LICENSE").write_text("Copyright (c) 2026 The House\n", encoding="utf-8")
    case.under("house-licence-copy").change(lambda tree: tree["teacher"].update(model=str(teacher)))
    confirm(store, "house-licence-copy@2025-01-01", tmp_path, b"The House licence.")
    assert not publish(case.directory).unmet
    assert case.text("LICENSES/house-licence-copy.txt") == "Copyright (c) 2026 The House\n"


def test_a_copyright_line_is_not_made_up(case: Case) -> None:
    """MIT asks for the copyright line of what is passed on: our copy of the text has none."""
    case.under("MIT")
    case.refused("licence-copy of MIT", "at student/LICENSES/mit.txt")
    text = case.text("LICENSES/mit.txt").replace("<year> <copyright holders>", "2026 The House")
    (case.student / "LICENSES/mit.txt").write_text(text, encoding="utf-8")
    assert not publish(case.directory).unmet
    assert case.text("LICENSES/mit.txt") == text


def test_a_notice_that_came_with_the_weights_is_passed_on(case: Case, tmp_path: Path) -> None:
    teacher = shutil.copytree(case.recipe.teacher.model, tmp_path / "other" / "teacher")
    (teacher / "NOTICE").write_text("Teacher\nCopyright 2026 The House\n", encoding="utf-8")
    case.change(lambda tree: tree["teacher"].update(model=str(teacher)))
    publish(case.directory)
    assert "The notice that came with ./teacher:\n\nTeacher\nCopyright 2026 The House\n" in case.text("NOTICE")


def test_weights_that_are_reused(case: Case) -> None:
    def change(tree: Tree) -> None:
        tree["student"] = {"model": tree["teacher"]["model"]}
        tree["terms"].update(base_model="meta-llama/Llama-3.2-1B", base_licence="llama3.2")
        tree["intent"].update(student_name="Llama-tiny", domicile="US", monthly_users=10, commercial=False)

    case.change(change)
    case.refused("licence-copy of Llama 3.2", "LICENSES/llama-3.2.txt")
    assert case.front()["base_model"] == "meta-llama/Llama-3.2-1B"
    assert case.front()["license"] == "llama3.2"
    assert "\nBuilt with Llama\n" in case.text("README.md")
    assert "Llama 3.2" in case.text("LICENSE").splitlines()[0]


# --- conflicts and gates --------------------------------------------------------------------------------------------------------------


def test_llama_and_exaone_want_two_prefixes(case: Case) -> None:
    def change(tree: Tree) -> None:
        tree["terms"].update(licence="llama3.1", datasets=[{"name": "some/answers", "licence": "exaone-like"}])
        tree["intent"].update(student_name="Llama-EXAONE", domicile="US", monthly_users=10, commercial=False)

    text = case.change(change).refused("conflict (name-prefix)", "Llama (./teacher)", "EXAONE (some/answers)")
    assert "Leave out ./teacher or some/answers" in text
    assert "conflict (name-prefix)" in case.text("obligations.md")


def test_non_commercial_with_a_commercial_intent(case: Case) -> None:
    case.under("house-non-commercial").intent(commercial=True)
    case.refused("conflict (non-commercial)", "Leave out ./teacher")


def test_the_terms_of_today_must_allow_it(case: Case) -> None:
    case.under("no-commerce").intent(commercial=True)
    before = case.contents()
    with pytest.raises(EntitlementDenied):
        publish(case.directory)
    case.under("nobody-knows-it")
    with pytest.raises(EntitlementUnknown):
        publish(case.directory)
    assert case.contents() == before


@pytest.mark.parametrize("release", [None, "none"])
def test_what_is_released_to_nobody_is_not_published(case: Case, release: str | None) -> None:
    case.intent(release=release)
    before = case.contents()
    with pytest.raises(RecipeError, match="intent.release"):
        publish(case.directory)
    assert case.contents() == before


def test_only_the_intent_may_differ(case: Case) -> None:
    other = case.recipe.model_copy(update={"seed": 99})
    with pytest.raises(RunError) as raised:
        publish(case.directory, recipe=other)
    assert raised.value.code == "run-other-recipe"


def test_a_run_that_is_not_finished(case: Case) -> None:
    (case.directory / "report.html").unlink()
    with pytest.raises(RunError, match="stillroom report"):
        publish(case.directory)


def test_records_that_were_only_collected_do_not_count(case: Case) -> None:
    path = case.directory / "ledger.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"stage":"train"' not in line), encoding="utf-8")
    (case.directory / "ledger.head.json").unlink()
    with pytest.raises(LedgerError) as raised:
        publish(case.directory)
    assert raised.value.code == "ledger-unknown-record"


def test_a_ledger_that_was_altered(case: Case) -> None:
    path = case.directory / "ledger.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"kept":true', '"kept":null', 1), encoding="utf-8")
    with pytest.raises(LedgerError) as raised:
        publish(case.directory)
    assert raised.value.code == "ledger-corrupt"


# --- what is missing ------------------------------------------------------------------------------------------------------------------


def _without(case: Case, name: str, line: str | None) -> None:
    path = case.student / name
    if line is None:
        path.unlink()
    else:
        path.write_text(path.read_text(encoding="utf-8").replace(line, ""), encoding="utf-8")


@pytest.mark.parametrize(
    ("family", "file", "line"),
    [
        ("house-display", "README.md", "Built with the House"),
        ("house-attribution", "NOTICE", None),
        ("house-flow-down-restrictions", "LICENSE", "are part of this licence"),
        ("apache-2.0", "LICENSES/apache-2.0.txt", None),
        ("apache-2.0", "LICENSE", None),
    ],
)
def test_a_deleted_artefact_is_noticed_and_written_again(case: Case, family: str, file: str, line: str | None) -> None:
    publish(case.under(family).directory)
    whole = case.contents()

    def unmet(found: Published) -> int:
        return len(found.unmet)

    assert unmet(check(case.directory)) == 0
    _without(case, file, line)
    assert unmet(check(case.directory)) == 1
    assert unmet(publish(case.directory)) == 0
    assert case.contents() == whole


def test_checking_writes_nothing(case: Case) -> None:
    everything = {path: path.stat().st_mtime_ns for path in case.directory.rglob("*")}
    assert check(case.directory).unmet
    assert {path: path.stat().st_mtime_ns for path in case.directory.rglob("*")} == everything


def test_a_tick_does_not_outlive_its_text(case: Case, store: TermsStore) -> None:
    case.under("house-exclude-data")
    case.refused()
    page = case.text("obligations.md").replace("- [ ] ", "- [x] ")
    (case.student / "obligations.md").write_text(page, encoding="utf-8")
    publish(case.directory)
    (at,) = (at for at, record in enumerate(RECORDS) if record["id"].startswith("house-exclude-data"))
    changed = json.loads(json.dumps(RECORDS, default=str))
    changed[at]["clauses"][1]["paraphrase"] = "It asks for something else now, which nobody has seen to."
    (store.directory / "records" / "house.yaml").write_text(yaml.safe_dump({"records": changed}), encoding="utf-8")
    case.refused("tick it")
    assert "\n- [x]" not in case.text("obligations.md")


# --- without weights ------------------------------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"}:
            raise ModuleNotFoundError(f"No module named {name!r} (refused by the test)", name=name)
sys.meta_path.insert(0, Refuse())
from pathlib import Path
from stillroom.runs.publishing import publish
print(publish(Path(sys.argv[1])).licence.licence)
"""


def test_publishing_needs_no_torch(case: Case) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(case.directory)], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Apache-2.0\n"
