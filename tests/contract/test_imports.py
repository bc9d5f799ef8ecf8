"""The rooms import each other in one direction only, and the base install works without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter

import pytest

from contract import source

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

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (refused by the test)", name=name)
        return None

sys.meta_path.insert(0, Refuse())
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
