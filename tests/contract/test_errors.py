"""Every error code is documented, and every one can happen."""

from __future__ import annotations

import ast
import inspect
import re

from contract import source
from stillroom.core import errors

PAGE = source.ROOT / "docs" / "reference" / "errors.md"


def _raised() -> tuple[set[str], list[str]]:
    """Codes that the source gives to an error's constructor, and the calls whose code cannot be read off."""
    classes = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.StillroomError)}
    codes: set[str] = set()
    unreadable = []
    for path, tree in source.trees().values():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in classes:
                continue
            first = node.args[0] if node.args else next((k.value for k in node.keywords if k.arg == "code"), None)
            choices = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
            for choice in choices:
                if isinstance(choice, ast.Constant) and isinstance(choice.value, str):
                    codes.add(choice.value)
                else:
                    unreadable.append(
                        f"{path.relative_to(source.ROOT)}:{node.lineno}: {ast.unparse(node.func)}({ast.unparse(choice) if choice else ''})"
                    )
    return codes, unreadable


def test_every_code_raised_is_a_literal_and_known() -> None:
    codes, unreadable = _raised()
    assert not unreadable, "\n".join(unreadable)
    assert codes <= set(errors.CODES), f"raised but not in CODES: {sorted(codes - set(errors.CODES))}"


def test_every_code_is_raised_somewhere() -> None:
    codes, _ = _raised()
    assert set(errors.CODES) <= codes, f"in CODES but never raised: {sorted(set(errors.CODES) - codes)}"


def test_every_code_has_its_anchor_and_no_other() -> None:
    anchors = re.findall(r'^<a id="([^"]+)"></a>$', PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(anchors) == sorted(errors.CODES)


def test_the_drawn_hierarchy_is_the_real_one() -> None:
    drawn = dict(re.findall(r"^\s*(?:[|`]- )?(\w+)\s+exit (\d+)", errors.__doc__ or "", re.MULTILINE))
    real = {name: str(kind.exit_code) for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.StillroomError)}
    named = set(re.findall(r"^\s*[|`]- (\w+)", errors.__doc__ or "", re.MULTILINE)) | {"StillroomError"}
    assert named == set(real)
    assert all(real[name] == code for name, code in drawn.items())
    assert {name for name, code in real.items() if code != "2"} <= set(drawn)


def test_a_message_says_what_was_found_expected_and_what_to_do() -> None:
    error = errors.DataError("prompts-empty", found="no rows", expected="at least one", why="there is nothing to learn from", do="Write some.")
    text = str(error)
    assert text.splitlines()[0].startswith("[prompts-empty] ")
    for part in ("no rows", "at least one", "there is nothing to learn from", "Write some."):
        assert part in text
