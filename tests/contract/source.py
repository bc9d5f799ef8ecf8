"""What the contract tests read: the source of src/stillroom as syntax trees, and the imports in them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "stillroom"
_OURS = re.compile(r"stillroom(\.\w+)+")


@dataclass(frozen=True, slots=True)
class Import:
    """One import: where it stands, the dotted name it loads, and whether it runs only when a function is called."""

    module: str  # dotted name of the importing module
    where: str  # path:line, for the message
    target: str  # dotted name of what is imported; for `from a import b` it is a.b
    in_function: bool
    by_name: bool  # a module of ours named in a string that is handed to a call: import_module("stillroom....") or a helper over it

    @property
    def top(self) -> str:
        return self.target.split(".")[0]


@cache
def trees() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of the package by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = (path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
    return found


def room_of(dotted: str) -> str | None:
    """`models` for stillroom.models.loading; None for stillroom itself and for names outside the package."""
    parts = dotted.split(".")
    if parts[0] != "stillroom" or len(parts) < 2 or not (PACKAGE / parts[1]).is_dir():
        return None
    return parts[1]


def rooms() -> set[str]:
    return {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for name, (path, tree) in trees().items() for found in _imports_in(name, path, tree))


def _imports_in(module: str, path: Path, tree: ast.Module) -> Iterator[Import]:
    is_package = path.name == "__init__.py"

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, where, alias.name, in_function, False)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, is_package, node)
            for alias in node.names:
                yield Import(module, where, f"{base}.{alias.name}", in_function, False)
        elif isinstance(node, ast.Call):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str) and _OURS.fullmatch(argument.value):
                    yield Import(module, where, argument.value, in_function, True)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(tree, False)


def _absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts if is_package else parts[:-1]
    base = base[: len(base) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])
