"""`stillroom terms`: what it prints and how it ends, through the command line as a user has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom.cli import terms
from stillroom.core import clock
from stillroom.core.hashing import sha256_hex
from stillroom.entitlement.library import builtin
from stillroom.entitlement.obligations import Item, LicenceProposal
from stillroom.entitlement.search import search
from stillroom.entitlement.store import TermsStore
from stillroom.entitlement.verdict import Outcome, Verdict
from stillroom.runs import publishing
from stillroom.runs.entitling import decide_recipe
from stillroom.runs.publishing import Published
from stillroom.runs.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
OPENAI, DEEPSEEK = "openai-services-agreement@2026-01-01", "deepseek-open-platform-terms@2026-04-29"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _nobodys_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a store of its own, a fixed day, and a working directory to be in."""
    monkeypatch.setenv("STILLROOM_TERMS", str(tmp_path / "terms"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(clock, "now", lambda: NOON)
    monkeypatch.chdir(tmp_path)


def recipe(**changed: Any) -> Path:
    """A recipe on disk whose teacher is somebody's model, whose card is not here."""
    tree: dict[str, Any] = {
        "name": "tiny-x",
        "teacher": {"model": "acme/large"},
        "student": {"from_scratch": {"layers": 2, "width": 8, "heads": 2, "feed_forward": 8}},
        "prompts": {"path": "prompts.jsonl"},
        "targets": {"kind": "text"},
    }
    path = Path("recipe.yaml")
    path.write_text(yaml.safe_dump(tree | changed, allow_unicode=True), encoding="utf-8")
    return path


RELEASED = {"task": "general-llm", "release": "weights", "commercial": True, "monthly_users": 1000}
ALLOWED: dict[str, Any] = {"terms": {"licence": "apache-2.0"}}
OBLIGED: dict[str, Any] = {"teacher": {"model": "meta-llama/Llama-3.1-8B-Instruct"}, "terms": {"licence": "llama3.1"}, "intent": RELEASED}
DENIED: dict[str, Any] = {
    "teacher": {"model": "gpt-4.1"},
    "terms": {"access": "api:openai"},
    "intent": RELEASED | {"competes": {"value": True, "asserted_by": "the head of product", "why": "it is a chat product like theirs"}},
}
UNKNOWN: dict[str, Any] = {"terms": {"licence": "no-such-licence"}}
CASES = {"allow": (ALLOWED, 0), "allow-with-obligations": (OBLIGED, 3), "deny": (DENIED, 4), "unknown": (UNKNOWN, 5)}


# --- check ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_check_ends_with_the_code_of_the_answer(outcome: Outcome, stillroom: Run) -> None:
    tree, expected = CASES[outcome]
    code, out, err = stillroom("terms", "check", recipe(**tree))
    assert (code, err) == (expected, "")
    assert terms.EXIT_CODES[outcome] == expected
    assert out.startswith(terms._OUTCOMES[outcome] + "\n")
    assert " ".join(out.split()).count("This is not legal advice.") == 1
    assert max(map(len, out.splitlines())) <= 120


def test_a_denial_says_which_clause_and_what_would_change_it(stillroom: Run) -> None:
    code, out, _ = stillroom("terms", "check", recipe(**DENIED))
    assert code == 4
    flat = " ".join(out.split())
    for words in (
        f"{OPENAI}#no-competing-models",
        "section 3.3(e)",
        "the text itself was read",
        "https://openai.com/policies/services-agreement",
        "changed by a written authorisation of OpenAI",
        "asserted competes is true, by the head of product",
    ):
        assert words in flat, words


def test_obligations_are_listed(stillroom: Run) -> None:
    _, out, _ = stillroom("terms", "check", recipe(**OBLIGED))
    assert "obligation  name-prefix [Llama]" in out


def test_the_question_comes_last(stillroom: Run) -> None:
    _, out, _ = stillroom("terms", "check", recipe(**UNKNOWN))
    last = out.rstrip().rsplit("\n\n", 1)[1]
    assert last.startswith("question    ")
    assert "no-such-licence" in last


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_check_json_is_the_decision(outcome: Outcome, stillroom: Run) -> None:
    tree, expected = CASES[outcome]
    path = recipe(**tree)
    code, out, err = stillroom("terms", "check", path, "--json")
    assert (code, err) == (expected, "")
    verdict = decide_recipe(Recipe.from_yaml(path), today=NOON.date(), store=TermsStore.open())
    assert json.loads(out) == json.loads(json.dumps(verdict.as_json()))
    assert json.loads(out)["outcome"] == outcome


def test_check_writes_the_document(stillroom: Run) -> None:
    code, _, _ = stillroom("terms", "check", recipe(**OBLIGED), "--out", "decision.md")
    assert code == 3
    text = Path("decision.md").read_text(encoding="utf-8")
    assert text.startswith("# May tiny-x learn from `meta-llama/Llama-3.1-8B-Instruct`?\n\n**Yes, with obligations.**")
    assert "Decided on 2026-11-24." in text
    code, _, err = stillroom("terms", "check", recipe(**OBLIGED), "--out", "no/such/folder/decision.md")
    assert code == 2
    assert "Choose another --out" in err
    assert "Traceback" not in err


def test_check_needs_no_model_on_this_machine(stillroom: Run) -> None:
    assert stillroom("terms", "check", recipe(teacher={"model": "./no-such-directory"}, **ALLOWED))[0] == 0


@pytest.mark.parametrize(
    ("content", "code"),
    [("", "recipe-invalid"), ("teacher: [", "recipe-syntax"), ("teecher: {model: a}", "recipe-unknown-key"), (None, "recipe-missing")],
    ids=["empty", "not-yaml", "misspelt", "missing"],
)
def test_a_recipe_that_is_none(content: str | None, code: str, stillroom: Run) -> None:
    if content is not None:
        Path("recipe.yaml").write_text(content, encoding="utf-8")
    found, out, err = stillroom("terms", "check", "recipe.yaml")
    assert (found, out) == (2, "")
    assert f"[{code}]" in err


def test_what_is_broken_in_the_store_is_told_and_decides_nothing(stillroom: Run, tmp_path: Path) -> None:
    (tmp_path / "terms").mkdir()
    (tmp_path / "terms" / "confirmations.jsonl").write_text("{}\n")
    for command in (["check", str(recipe(**ALLOWED))], ["list"], ["show", "mit"]):
        code, out, err = stillroom("terms", *command)
        assert (code, out) == (2, ""), command
        assert "confirmations.jsonl:1" in err


def test_confirming_turns_an_unknown_into_a_yes_until_it_is_stale(stillroom: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(teacher={"model": "deepseek-chat"}, terms={"access": "api:deepseek"}, intent=RELEASED)
    code, out, _ = stillroom("terms", "check", path)
    assert code == 5
    assert f"stillroom terms confirm {DEEPSEEK}" in " ".join(out.split())
    Path("text.txt").write_text("Outputs may be used to train other models, by distillation for example.\n", encoding="utf-8")
    code, out, _ = stillroom("terms", "confirm", DEEPSEEK, "--file", "text.txt", "--by", "Jane Doe")
    assert code == 0
    assert f"{DEEPSEEK}: confirmed by Jane Doe on 2026-11-24; it holds until 2027-02-22." in out
    assert stillroom("terms", "check", path)[0] in (0, 3)
    assert "confirmed until 2027-02-22" in line_of(stillroom("terms", "list")[1], DEEPSEEK)
    monkeypatch.setattr(clock, "now", lambda: NOON + timedelta(days=91))
    code, out, _ = stillroom("terms", "check", path)
    assert code == 5
    assert "is stale" in out
    assert "stale since 2027-02-22" in line_of(stillroom("terms", "list")[1], DEEPSEEK)


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"{name} "))


# --- list, show, search, diff ---------------------------------------------------------------------------------------------------------


def test_list_has_every_record_on_a_line(stillroom: Run) -> None:
    code, out, _ = stillroom("terms", "list")
    assert code == 0
    for name, of in builtin().records.items():
        line = line_of(out, name)
        assert of.kind in line
        assert of.provider in line
        assert f"  {of.evidence.grade}  " in line
    assert line_of(out, "apache-2.0@2004-01-01").endswith("fixed")
    assert line_of(out, OPENAI).endswith("needs confirming")
    assert f"catalogue of {date(2026, 11, 24)}" in out


def test_show_leads_back_to_the_source(stillroom: Run) -> None:
    code, out, _ = stillroom("terms", "show", "llama3.1")
    assert code == 0
    assert "<https://www.llama.com/llama3_1/license/>" in out
    assert "`llama-3.1@2024-07-23#name`" in out
    assert out.rstrip().endswith("Standing on 2026-11-24: fixed.")


def test_show_tells_who_confirmed_and_what_other_versions_there_are(stillroom: Run) -> None:
    Path("text.txt").write_text("the text")
    stillroom("terms", "confirm", "mistral-api-terms", "--file", "text.txt", "--by", "Jane")
    _, out, _ = stillroom("terms", "show", "mistral-api-terms")
    assert "Confirmed on 2026-11-24 by Jane" in out
    assert "Other versions: mistral-api-terms@2024-02-26" in out


@pytest.mark.parametrize("command", [["show", "no-such"], ["diff", "mit", "no-such"], ["confirm", "no-such", "--file", "x"]])
def test_a_record_that_is_not_there(command: list[str], stillroom: Run) -> None:
    code, out, err = stillroom("terms", *command)
    assert (code, out) == (2, "")
    assert "[terms-missing]" in err
    assert "no-such" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["what is llama3.1?"], "llama3.1 stands for llama-3.1: llama-3.1@2024-07-23"),
        (["what", "is", "llama3.1?"], "llama3.1 stands for llama-3.1: llama-3.1@2024-07-23"),
        (["Apache", "License", "2.0"], "stands for apache-2.0: apache-2.0@2004-01-01"),
        (["Qwen/Qwen2.5-72B-Instruct"], "comes under qwen-2024: qwen-2024@2024-09-19"),
        (["qwen2.5-72b"], "comes under qwen-2024: qwen-2024@2024-09-19"),
        (["meta-llama/Llama-3.1-8B-Instruct"], "comes under llama-3.1: llama-3.1@2024-07-23"),
        (["no-competing", "developed", "classify", "categorise"], "openai-services-agreement@2026-01-01"),
        (["distribute-student", "share-alike"], "records with all of"),
        (["zzzz"], "Nothing on file of zzzz"),
    ],
)
def test_search_finds_licences_models_and_words(words: list[str], says: str, stillroom: Run) -> None:
    code, out, _ = stillroom("terms", "search", *words)
    assert code == 0
    assert says in out, out


@settings(max_examples=60, deadline=None)
@given(
    query=st.text(max_size=40)
    | st.lists(st.sampled_from(["llama", "3.1", "what", "is", "?", "meta-llama/llama-3.1-8b", "*", "[", "apache"])).map(" ".join)
)
def test_any_words_can_be_searched(query: str) -> None:
    search(query, builtin())


def test_search_is_the_same_in_any_case_and_order() -> None:
    one, other = search("LLAMA license Meta", builtin()), search("meta llama licence", builtin())
    assert one.records == other.records
    assert one.records


def test_diff_of_two_versions_of_a_family(stillroom: Run) -> None:
    code, out, _ = stillroom("terms", "diff", "mistral-api-terms@2024-02-26", "mistral-api-terms@2024-02-27")
    assert code == 0
    assert "# `mistral-api-terms@2024-02-26` and `mistral-api-terms@2024-02-27`" in out
    assert "training a model on outputs" in out
    assert stillroom("terms", "diff", "xai-acceptable-use", "xai-acceptable-use")[1].startswith("# `xai-acceptable-use@2026-06-26` and ")
    code, _, err = stillroom("terms", "diff", "mit", "mit")
    assert code == 2
    assert "two records" in err


# --- validate, add, confirm -----------------------------------------------------------------------------------------------------------

OWN = """\
records:
  - id: liefervertrag@2026-10-01
    kind: licence
    provider: Zulieferer Müller
    title: Vertrag über Modelle – 2026
    effective: 2026-10-01
    url: https://example.org/vertrag
    fixed: true
    applies_to: {access: [weights]}
    evidence: {grade: P1, source: the signed contract}
    clauses:
      - id: training
        locator: § 4
        effect: permit
        actions: [train-on-output, generate-for-training, evaluate-only]
        paraphrase: Ausgaben dürfen zum Training verwendet werden.
"""


def own(text: str = OWN, name: str = "vertrag – müller.yaml") -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def test_records_of_ones_own_are_validated_added_and_asked(stillroom: Run) -> None:
    assert stillroom("terms", "check", recipe(terms={"licence": "liefervertrag"}))[0] == 5
    code, out, _ = stillroom("terms", "validate", own())
    assert (code, out) == (0, "vertrag – müller.yaml is sound. It has records: 1.\n")
    code, out, _ = stillroom("terms", "add", own())
    assert code == 0
    assert "liefervertrag@2026-10-01" in out
    assert line_of(stillroom("terms", "list")[1], "liefervertrag@2026-10-01").endswith("fixed; yours")
    assert "Vertrag über Modelle – 2026" in stillroom("terms", "show", "liefervertrag")[1]
    assert "liefervertrag@2026-10-01" in stillroom("terms", "search", "MÜLLER")[1]
    code, out, _ = stillroom("terms", "check", recipe(terms={"licence": "liefervertrag"}))
    assert code == 0
    assert "liefervertrag@2026-10-01 is your own record" in out


def test_adding_in_place_of_ours_says_so(stillroom: Run) -> None:
    text = OWN.replace("liefervertrag@2026-10-01", "mit@1988")
    assert "In place of ours: mit@1988." in stillroom("terms", "add", own(text))[1]
    assert line_of(stillroom("terms", "list")[1], "mit@1988").endswith("yours")


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("", "own.yaml", "an empty file"),
        ("records:\n  - id: [\n", "own.yaml:3", "not YAML"),
        (OWN.replace("effect: permit", "effect: allow"), "own.yaml:14", "effect"),
        (OWN.replace("    title:", "    titel:"), "own.yaml:5", "did you mean 'title'?"),
        (OWN.replace("2026-10-01\n    url", "2026-13-01\n    url"), "own.yaml:6", "2026-13-01"),
        (OWN.replace("fixed: true", "fixed: true\n    incorporates: [no-such-policy]"), "own.yaml:9", "no-such-policy"),
        (OWN.replace("        locator: § 4\n", ""), "own.yaml:12", "locator"),
        (OWN.replace("train-on-output,", "train-on-outputs,"), "own.yaml:15", "actions"),
    ],
    ids=["empty", "not-yaml", "value", "key", "day", "reference", "missing", "action"],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line(text: str, where: str, says: str, stillroom: Run) -> None:
    for command in ("validate", "add"):
        code, out, err = stillroom("terms", command, own(text, "own.yaml"))
        assert (code, out) == (2, "")
        assert "[terms-invalid]" in err
        assert where in err, err
        assert says in err, err
    assert not Path("terms").exists()


def test_confirm_compares_with_the_digest_that_the_record_has(stillroom: Run) -> None:
    text = b"Ausgaben d\xc3\xbcrfen zum Training verwendet werden."
    Path("text.txt").write_bytes(text)
    Path("other.txt").write_bytes(b"Sie d\xc3\xbcrfen es nicht.")
    stillroom("terms", "add", own(OWN.replace("fixed: true", f"fixed: true\n    text_sha256: {sha256_hex(text)}")))
    code, out, _ = stillroom("terms", "confirm", "liefervertrag", "--file", "text.txt", "--by", "Zoë")
    assert code == 0
    assert "It is the text that the record was written from: the digests are the same." in out
    assert stillroom("terms", "check", recipe(terms={"licence": "liefervertrag"}))[0] == 0
    code, out, _ = stillroom("terms", "confirm", "liefervertrag", "--file", "other.txt", "--by", "Zoë")
    assert code == 0
    assert "It is NOT the text that the record was written from" in out
    assert f"It differs from the text that Zoë confirmed on 2026-11-24 ({sha256_hex(text)})." in out
    assert stillroom("terms", "check", recipe(terms={"licence": "liefervertrag"}))[0] == 5
    _, out, _ = stillroom("terms", "confirm", OPENAI, "--file", "other.txt", "--by", "Zoë")
    assert "The record has no digest of its text to compare with" in out


def test_confirm_knows_who_is_logged_in(stillroom: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("text.txt").write_text("the text")
    monkeypatch.setattr("getpass.getuser", lambda: "jdoe")
    assert "confirmed by jdoe on" in stillroom("terms", "confirm", OPENAI, "--file", "text.txt")[1]

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nobody)
    code, _, err = stillroom("terms", "confirm", OPENAI, "--file", "text.txt")
    assert code == 2
    assert "Give it with --by NAME." in err


def test_confirm_refuses_an_empty_text(stillroom: Run) -> None:
    Path("text.txt").write_text(" \n")
    code, _, err = stillroom("terms", "confirm", OPENAI, "--file", "text.txt", "--by", "A")
    assert code == 2
    assert "text.txt is empty" in err


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200) | st.integers(0, len(OWN)).map(lambda end: OWN.encode()[:end]))
def test_no_file_makes_a_traceback(data: bytes, stillroom: Run) -> None:
    Path("any.yaml").write_bytes(data)
    for command in (["validate", "any.yaml"], ["check", "any.yaml"], ["add", "any.yaml"]):
        code, _, err = stillroom("terms", *command)
        assert code in (0, 2)
        assert "Traceback" not in err


# --- how it looks ---------------------------------------------------------------------------------------------------------------------


def test_what_a_file_brings_in_does_not_act_on_the_terminal(stillroom: Run) -> None:
    stillroom("terms", "add", own(OWN.replace("Vertrag über Modelle – 2026", '"Contract \\e[2J\\u202E"')))
    out = stillroom("terms", "show", "liefervertrag")[1] + stillroom("terms", "list")[1] + stillroom("terms", "search", "contract")[1]
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "U+001B" in out


def test_a_narrow_terminal_gets_narrow_lines() -> None:
    verdict = Verdict(outcome="unknown", reasons=(), question="word " * 40, warnings=("warned " * 30,))
    assert max(map(len, terms.decision_lines(verdict, 60))) <= 60


# --- publish --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("met", [True, False])
def test_publish_prints_each_duty_and_whether_it_is_met(met: bool, stillroom: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What publishing itself does is tested in tests/runs/test_publish.py; this is how its account is called for and shown."""
    asked: list[tuple[str, Path, Recipe | None]] = []

    def account(what: str) -> Callable[..., Published]:
        def made(directory: Path, *, recipe: Recipe | None = None, observer: object = None) -> Published:
            asked.append((what, directory, recipe))
            return Published(
                directory=directory / "student",
                name="Llama-tiny-x",
                licence=LicenceProposal(licence="Apache-2.0", why="nothing stands against it", rejected=()),
                items=(Item(what="name-prefix [Llama]", met=True), Item(what="display", met=met, do="Show it")),
                files=("README.md", "NOTICE"),
            )

        return made

    monkeypatch.setattr(publishing, "publish", account("publish"))
    monkeypatch.setattr(publishing, "check", account("check"))
    code, out, _ = stillroom("publish", "run", *([] if met else ["--check", "--recipe", recipe(**ALLOWED)]))
    assert code == (0 if met else 2)
    assert asked == [("publish", Path("run"), None)] if met else asked == [("check", Path("run"), Recipe.from_yaml(Path("recipe.yaml")))]
    flat = " ".join(out.split())
    assert "student Llama-tiny-x, in run/student" in flat
    assert "licence Apache-2.0 is proposed: nothing stands against it" in flat
    assert "met name-prefix [Llama]" in flat
    assert ("met display" if met else "NOT MET display. Show it") in flat
    assert "files README.md, NOTICE" in flat


# --- a base install -------------------------------------------------------------------------------------------------------------------

WITHOUT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (refused by the test)", name=name)
        return None

sys.meta_path.insert(0, Refuse())
sys.argv = ["stillroom", *{arguments!r}]
from stillroom.cli import main
try:
    main()
finally:
    print("loaded", *sorted({{name.split(".")[0] for name in sys.modules}}), file=sys.stderr)
"""
HEAVY = ["torch", "transformers", "tokenizers", "safetensors", "peft", "huggingface_hub", "datasets", "jinja2", "accelerate", "tensorboard"]


def in_a_base_install(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(refused=HEAVY, arguments=list(arguments))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_check_works_without_torch_and_loads_only_what_it_needs(outcome: Outcome) -> None:
    """What takes time to load and is not needed is not loaded: benchmarks/terms_check.py measures what is left."""
    tree, expected = CASES[outcome]
    done = in_a_base_install("terms", "check", str(recipe(**tree)))
    assert done.returncode == expected, done.stderr
    loaded = set(done.stderr.rsplit("loaded", 1)[1].split())
    assert not loaded & {"rich", "numpy", "pyarrow", "psutil", *HEAVY}


@pytest.mark.parametrize("command", [["list"], ["show", "mit"], ["search", "llama3.1"], ["diff", "mit", "apache-2.0"], ["--help"]])
def test_every_other_command_works_without_torch(command: list[str]) -> None:
    done = in_a_base_install("terms", *command)
    assert done.returncode == 0, done.stderr
    assert "rich" not in done.stderr.rsplit("loaded", 1)[1].split()


@pytest.mark.parametrize("command", ["plan", "run", "publish"])
def test_commands_that_need_more_say_so_or_say_what_is_wrong(command: str) -> None:
    done = in_a_base_install(command, "no-such-recipe.yaml")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("[")
