"""What is written is true: generated pages are fresh, examples run, links lead somewhere."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import generate_docs
import stillroom
import update_readme
from contract import markdown, source
from stillroom.core.errors import CODES
from stillroom.runs.report import Report

DOCS = source.ROOT / "docs"
DOCUMENTS = sorted([*source.ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(source.ROOT / "recipes").glob("*.md")])


@pytest.mark.parametrize("name", ["cli.md", "recipe.md", "plan.md", "report.md", "report.schema.json", "errors.md", "fake-endpoint.md", "servers.md"])
def test_generated_pages_are_fresh(name: str) -> None:
    written = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert written == generate_docs.pages()[name], f"docs/reference/{name} is stale: run `make docs`"


def test_nothing_in_the_reference_is_left_undocumented() -> None:
    """Every option of the command line and every key of the recipe says what it is."""
    empty = []
    for name in ("cli.md", "recipe.md"):
        for line in generate_docs.pages()[name].splitlines():
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            if line.startswith("| `") and not cells[-1]:
                empty.append(f"{name}: {cells[0]}")
    assert not empty, "\n".join(empty)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(source.ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    broken = []
    for link in markdown.links(path.read_text(encoding="utf-8")):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, fragment = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (fragment and target.suffix == ".md" and fragment not in markdown.anchors(target)):
            broken.append(link)
    assert not broken, f"{path.name}: {broken}"


def test_every_page_is_reachable_from_the_index() -> None:
    reached: set[Path] = set()
    waiting = [DOCS / "README.md"]
    while waiting:
        path = waiting.pop().resolve()
        if path in reached or path.suffix != ".md":
            continue
        reached.add(path)
        for link in markdown.links(path.read_text(encoding="utf-8")):
            target = path.parent / link.partition("#")[0]
            if "://" not in link and target.is_file():
                waiting.append(target)
    missing = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if path.resolve() not in reached]
    assert not missing, missing


def test_the_error_codes_that_documents_name_exist() -> None:
    for path in DOCUMENTS:
        for block in markdown.blocks(path.read_text(encoding="utf-8")):
            for line in block.text.splitlines():
                if line.startswith("[") and "] " in line and line[1 : line.index("]")].replace("-", "").isalpha():
                    assert line[1 : line.index("]")] in CODES, f"{path.name}: {line}"


# Files and directories of a run whose keys are described on a page of their own, or are those of a Hugging Face directory or of a checkpoint.
ELSEWHERE = {
    "recipe.json",
    "plan.json",
    "report.json",
    "ledger.jsonl",
    "ledger.head.json",
    "targets/",
    "student/",
    "checkpoints/",
    "label_only/",
    "inputs/",
    "decisions/",
}

# --- examples -----------------------------------------------------------------------------------------------------------------------


def _perform(path: Path, folder: Path) -> None:
    """Does what a document says, in order, in one folder: ```yaml NAME and ```python NAME write a file, ```console runs its `$ ` lines.

    Each command must end with 0. What the document shows as output must be what comes, `...` standing for anything (as in doctest).
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(source.ROOT / "src"),
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }
    checker = doctest.OutputChecker()
    for block in markdown.blocks(path.read_text(encoding="utf-8")):
        if len(block.info) == 2:
            (folder / block.info[1]).write_text(block.text, encoding="utf-8")
        if block.language != "console":
            continue
        for command in markdown.commands(block):
            done = subprocess.run(
                ["bash", "-c", command.line],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, f"$ {command.line}\n{done.stdout}"
            if command.shown.strip():
                flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
                assert checker.check_output(command.shown.strip() + "\n", done.stdout, flags), f"$ {command.line}\n{done.stdout}"


def test_getting_started_can_be_followed_and_its_run_is_as_documented(tmp_path: Path) -> None:
    """One test, because the run is the slow part: then every file of it has its section in run-directory.md, and every key of its JSON is named there."""
    _perform(DOCS / "getting-started.md", tmp_path)
    undocumented = _undocumented(tmp_path / "runs" / "first")
    assert not undocumented, "\n".join(undocumented)


def test_the_guide_to_terms_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_TERMS", str(tmp_path / "terms"))
    _perform(DOCS / "guides" / "may-i-distil-this-model.md", tmp_path)


def test_the_guide_to_ones_own_trainer_can_be_followed(tmp_path: Path) -> None:
    _perform(DOCS / "guides" / "use-your-own-trainer.md", tmp_path)


def test_the_guide_to_cleaning_can_be_followed(tmp_path: Path) -> None:
    _perform(DOCS / "guides" / "clean-what-a-teacher-wrote.md", tmp_path)


def test_the_guide_to_several_devices_can_be_followed(tmp_path: Path) -> None:
    _perform(DOCS / "guides" / "train-on-several-devices.md", tmp_path)
    undocumented = _undocumented(tmp_path / "runs" / "two")
    assert not undocumented, "\n".join(undocumented)


def test_the_guide_to_probing_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_TERMS", str(tmp_path / "terms"))
    _perform(DOCS / "guides" / "probe-an-endpoint.md", tmp_path)


def test_the_guide_to_costs_can_be_followed_and_its_run_is_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key of requests.json is named in run-directory.md, as all others are."""
    monkeypatch.setenv("STILLROOM_TERMS", str(tmp_path / "terms"))
    _perform(DOCS / "guides" / "costs-and-caps.md", tmp_path)
    undocumented = _undocumented(tmp_path / "run")
    assert not undocumented, "\n".join(undocumented)


def test_the_guide_to_several_machines_can_be_followed(tmp_path: Path) -> None:
    _perform(DOCS / "guides" / "collect-on-several-machines.md", tmp_path)


def test_the_guide_to_distilling_from_an_api_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_TERMS", str(tmp_path / "terms"))
    _perform(DOCS / "guides" / "distil-from-an-api.md", tmp_path)
    undocumented = _undocumented(tmp_path / "runs" / "tickets")
    assert not undocumented, "\n".join(undocumented)


def test_the_guide_to_serving_can_be_followed(tmp_path: Path) -> None:
    _perform(DOCS / "guides" / "serve-the-student.md", tmp_path)


def _undocumented(run: Path) -> list[str]:
    sections = dict(
        re.findall(
            r"^## `([^`]+)`\n(.*?)(?=^## |\Z)", (DOCS / "reference" / "run-directory.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
    )
    undocumented = []
    for path in sorted(run.rglob("*")):
        if path.is_dir():
            continue
        name = path.relative_to(run).parts[0] + ("/" if path.parent != run else "")
        if name not in sections:
            undocumented.append(name)
        elif path.suffix in (".json", ".jsonl") and name not in ELSEWHERE:
            text = path.read_text(encoding="utf-8")
            trees = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
            keys = {key for tree in trees for key in tree}
            undocumented += [f"{path.relative_to(run)}: {key}" for key in sorted(keys) if f"`{key}`" not in sections[name]]
    return undocumented


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(source.ROOT)))
def test_recipes_in_documents_are_recipes(path: Path) -> None:
    for block in markdown.blocks(path.read_text(encoding="utf-8")):
        if block.language == "yaml" and (tree := yaml.safe_load(block.text)) and {"teacher", "student", "prompts"} <= set(tree):
            stillroom.Recipe.from_tree(tree, name=str(path))


# --- README -------------------------------------------------------------------------------------------------------------------------


def test_the_readme_shows_the_two_commands_first() -> None:
    first_screen = "\n".join((source.ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:20])
    assert "make demo" in first_screen
    assert "make test" in first_screen


def test_the_readme_shows_what_a_report_prints() -> None:
    """The pasted output is what the terminal makes today of the stored report of a real run."""
    shown = update_readme.pasted((source.ROOT / "README.md").read_text(encoding="utf-8"))
    stored = source.ROOT / "benchmarks" / "results" / "readme-report.json"
    assert shown.strip(), "README has no demo output: run scripts/update_readme.py"
    report = Report.model_validate_json(stored.read_text(encoding="utf-8"))
    assert shown == update_readme.terminal_text(report), "README's output is not that of benchmarks/results/readme-report.json"


def test_the_readme_table_is_that_of_the_results() -> None:
    text = (source.ROOT / "README.md").read_text(encoding="utf-8")
    assert update_readme.with_results(text) == text, "README's table is stale: run scripts/update_readme.py"
