"""The rooms import each other in one direction only, and the base install works without torch."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from contract import source
from stillroom.core.identities import ModelRef, Sampling
from stillroom.ledger import Circumstances, Collected, Ledger, PromptSource
from stillroom.testing.fake_endpoint import fake_endpoint

# docs/architecture.md, section 2. A room may import those named here, and nothing else of the package.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "entitlement": {"core"},
    "ledger": {"core", "entitlement"},
    "data": {"core", "entitlement", "ledger"},
    "targets": {"core"},
    "objectives": {"core", "targets"},
    "collect": {"core", "targets"},
    "models": {"core", "targets", "objectives", "collect"},
    "evals": {"core", "data", "targets", "objectives"},
    "guard": {"core", "targets", "ledger"},
    "web": {"core"},
    "testing": {"core"},
}
ALLOWED["runs"] = set(ALLOWED) - {"testing"}
ALLOWED["demo"] = ALLOWED["runs"] | {"runs"}
ALLOWED["cli"] = ALLOWED["demo"] | {"demo"}

WITHOUT_TORCH = ("core", "entitlement", "ledger", "data", "targets", "collect", "guard", "runs", "web", "demo", "cli", "testing")
NEEDS_WEIGHTS = {"torch", "transformers", "peft", "safetensors", "tokenizers", "tensorboard", "accelerate", "huggingface_hub", "jinja2"}
# Of runs, only the modules that are loaded by name when a stage needs them: the base install imports the room without them (tested below).
MAY_TOUCH_WEIGHTS = {"objectives", "models", "evals", "runs"}
OPTIONAL = NEEDS_WEIGHTS | {"datasets", "gguf", "triton", "xllamacpp"}

# What a distribution is called where that differs from what is imported.
DISTRIBUTIONS = {"yaml": "pyyaml", "pydantic_core": "pydantic"}


def test_every_room_is_in_the_table() -> None:
    assert source.rooms() <= set(ALLOWED), f"rooms without an entry in ALLOWED: {sorted(source.rooms() - set(ALLOWED))}"


def test_the_table_has_no_cycle() -> None:
    tuple(TopologicalSorter(ALLOWED).static_order())  # raises CycleError


def test_rooms_import_in_one_direction() -> None:
    wrong = []
    for found in source.imports():
        here, there = source.room_of(found.module), source.room_of(found.target)
        if here is None or there is None or here == there:
            continue
        if there not in ALLOWED[here]:
            wrong.append(f"{found.where}: {here} may not import {there} ({found.target})")
    assert not wrong, "\n".join(wrong)


def test_modules_of_a_room_do_not_import_each_other_in_a_circle() -> None:
    names = set(source.trees())
    graph: dict[str, set[str]] = {name: set() for name in names}
    for found in source.imports():
        if found.by_name:
            continue
        target = found.target if found.target in names else found.target.rpartition(".")[0]
        if target in names and target != found.module and not found.module.startswith(f"{target}."):
            graph[found.module].add(target)
    tuple(TopologicalSorter(graph).static_order())


def test_rooms_below_the_command_line_take_nothing_from_the_package_itself_but_its_version() -> None:
    wrong = [
        f"{found.where}: {found.target}"
        for found in source.imports()
        if source.room_of(found.module) not in (None, "cli")
        and found.top == "stillroom"
        and source.room_of(found.target) is None
        and found.target != "stillroom.__version__"
    ]
    assert not wrong, "\n".join(wrong)


def test_only_optional_packages_are_imported_inside_a_function() -> None:
    # A module of our own that needs weights is loaded by name (importlib) by the stage that needs it; its direction is held above.
    wrong = [f"{found.where}: {found.target}" for found in source.imports() if found.in_function and not found.by_name and found.top not in OPTIONAL]
    assert not wrong, "\n".join(wrong)


def test_modules_loaded_by_name_exist() -> None:
    wrong = [
        f"{found.where}: {found.target}"
        for found in source.imports()
        if found.by_name and found.top == "stillroom" and found.target not in source.trees()
    ]
    assert not wrong, "\n".join(wrong)


def test_weights_are_touched_only_where_they_may_be() -> None:
    wrong = [
        f"{found.where}: {found.target}"
        for found in source.imports()
        if found.top in NEEDS_WEIGHTS and source.room_of(found.module) not in MAY_TOUCH_WEIGHTS
    ]
    assert not wrong, "\n".join(wrong)


def test_pickle_and_evaluation_of_text_are_not_used() -> None:
    wrong = []
    for path, tree in source.trees().values():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            weights_only = any(k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True for k in node.keywords)
            if name in ("eval", "exec", "pickle.load", "pickle.loads", "torch.save") or (name == "torch.load" and not weights_only):
                wrong.append(f"{path.relative_to(source.ROOT)}:{node.lineno}: {name}")
            if name in ("np.load", "numpy.load") and any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
                wrong.append(f"{path.relative_to(source.ROOT)}:{node.lineno}: {name} with allow_pickle")
            if any(k.arg == "trust_remote_code" and ast.unparse(k.value) != "False" for k in node.keywords):
                wrong.append(f"{path.relative_to(source.ROOT)}:{node.lineno}: trust_remote_code")
    assert not wrong, "\n".join(wrong)


def _declared() -> tuple[set[str], set[str]]:
    """Names of the base dependencies, and of those in any extra."""
    project = tomllib.loads((source.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\s\[<>=!~;]", requirement)[0].lower() for requirement in requirements}

    extras = project["optional-dependencies"]
    return names(project["dependencies"]), {name for requirements in extras.values() for name in names(requirements)} - {"stillroom"}


def test_every_import_is_declared() -> None:
    base, optional = _declared()
    wrong = []
    for found in source.imports():
        if found.top in sys.stdlib_module_names or found.top == "stillroom":
            continue
        distribution = DISTRIBUTIONS.get(found.top, found.top)
        declared = base | optional if found.top in OPTIONAL else base
        if distribution not in declared:
            wrong.append(f"{found.where}: {found.top} is not in pyproject.toml's {'extras' if found.top in OPTIONAL else 'dependencies'}")
    assert not wrong, "\n".join(wrong)


def test_every_base_dependency_is_used() -> None:
    base, _ = _declared()
    used = {DISTRIBUTIONS.get(found.top, found.top) for found in source.imports()}
    assert base <= used, f"declared but never imported: {sorted(base - used)}"


# Runs in a fresh interpreter in which the optional packages are not to be had: what is then imported works in a base install.
WITHOUT_EXTRAS = """
import importlib, sys
from importlib.machinery import PathFinder

class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in {refused!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
for name in {names!r}:
    importlib.import_module(name)
"""


def _base_modules() -> list[str]:
    """The package, its rooms that have no torch, and the command line's module."""
    present = source.rooms()
    return ["stillroom", *(f"stillroom.{room}" for room in WITHOUT_TORCH if room in present)]


def _run_without_extras(names: list[str], more: str = "") -> subprocess.CompletedProcess[str]:
    code = WITHOUT_EXTRAS.format(refused=sorted(OPTIONAL | {"pandas"}), names=names) + more
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=source.ROOT / "src", stdin=subprocess.DEVNULL, check=False
    )


def test_the_base_install_imports_without_torch() -> None:
    done = _run_without_extras(_base_modules())
    assert done.returncode == 0, done.stderr


def test_rooms_without_torch_import_without_it_module_by_module() -> None:
    loaded_by_name = {found.target for found in source.imports() if found.by_name}
    rooms = set(WITHOUT_TORCH) - {"runs", "demo"}
    names = [name for name in source.trees() if source.room_of(name) in rooms and name not in loaded_by_name and not name.endswith("__main__")]
    done = _run_without_extras(names)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_the_command_line_answers_without_torch(arguments: list[str]) -> None:
    done = _run_without_extras(
        ["stillroom.cli"], f"\nsys.argv = ['stillroom', *{arguments!r}]\nfrom stillroom.cli import main\nraise SystemExit(main())\n"
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


EACH = """
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from stillroom.cli import main
import json

done = {{}}
for name, arguments in {commands!r}.items():
    sys.argv = ["stillroom", *arguments]
    said, code = StringIO(), 0
    with redirect_stdout(said), redirect_stderr(said):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    done[name] = (code, said.getvalue())

from pathlib import Path
from stillroom import web
from stillroom.ledger import verify_ledger
verify_ledger(Path({run!r}) / "ledger.jsonl")
done["page"] = (0, str(web.write(Path({run!r}))))
print(json.dumps(done))
"""
CIRCUMSTANCES = Circumstances(
    teacher=ModelRef(source="fake-teacher", kind="endpoint", revision=None, weights_sha256=None, architecture=None, parameters=None, licence="own"),
    sampling=Sampling(max_new_tokens=16),
    prompt_source=PromptSource(name="pairs.jsonl", sha256="b" * 64),
    signal="text",
    terms=(),
    decision="c" * 64,
)
RECIPE = """
name: base
teacher: {{endpoint: {{url: "{url}", model: fake-teacher}}}}
terms: {{licence: own, base_licence: own}}
student: {{model: {folder}/student}}
prompts: {{path: {folder}/pairs.jsonl}}
collection: {{max_tokens: 100000}}
targets: {{kind: text}}
objective: {{terms: [{{divergence: cross_entropy}}]}}
"""


def test_what_the_base_install_does_and_what_it_names_an_extra_for(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "two days", "answer": "P2D"}\n')
    (tmp_path / "report.json").write_bytes((source.ROOT / "tests" / "fixtures" / "report.json").read_bytes())
    Ledger.open(tmp_path).append(
        [Collected(record_id="a" * 64, prompt="two days", output="P2D", prompt_tokens=3, output_tokens=4, circumstances=CIRCUMSTANCES)]
    )
    recipe, out = str(tmp_path / "recipe.yaml"), str(tmp_path / "run")
    with fake_endpoint() as server:
        Path(recipe).write_text(RECIPE.format(url=server.base_url, folder=tmp_path))
        whom = [server.base_url, "--model", "fake-teacher", "--access", "weights", "--licence", "own", "--store", str(tmp_path / "requests.sqlite")]
        works = {
            "probe": ["probe", *whom],
            "requests": ["requests", str(tmp_path / "requests.sqlite")],
            "import": ["import", str(tmp_path / "pairs.jsonl"), "--to", str(tmp_path / "prompts.jsonl")],
            "terms": ["terms", "show", "apache-2.0"],
            "init": ["init", "--out", str(tmp_path / "written.yaml")],
        }
        lacks = {
            "plan": (["plan", recipe], "train"),
            "collect": (["collect", recipe, "--out", out], "train"),
            "export": (["export", str(tmp_path), "--out", str(tmp_path / "student.gguf")], "train"),
            "tokenizer": (["probe", *whom, "--tokenizer", str(tmp_path)], "train"),
            "serve": (["serve", str(tmp_path)], "serve"),
        }
        child = _run_without_extras(
            ["stillroom.cli"], EACH.format(commands=works | {name: words for name, (words, _) in lacks.items()}, run=str(tmp_path))
        )
        asked = server.bill.received
    assert child.returncode == 0, child.stderr
    done = json.loads(child.stdout)
    for name in (*works, "page"):
        assert done[name][0] == 0, done[name][1]
    assert asked > 10
    assert "signal" in done["probe"][1]
    assert (tmp_path / "prompts.jsonl").is_file()
    assert (tmp_path / "report.html").is_file()
    for name, (_, extra) in lacks.items():
        code, said = done[name]
        assert code == 2
        assert said.startswith("[missing-extra]"), said
        assert f"pip install 'stillroom[{extra}]'" in said
    assert not Path(out).exists()
