"""YAML files of terms, read strictly: what is wrong is told with its line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import ValidationError

from stillroom.core.errors import EntitlementError
from stillroom.entitlement import records
from stillroom.entitlement.records import CatalogueFile

_Path: TypeAlias = tuple[str | int, ...]
_Loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CONSTRUCTOR = yaml.constructor.SafeConstructor()
_DEEPEST, _MOST_VALUES = 64, 200_000


def read_terms(path: Path) -> CatalogueFile:
    """The records, models and authorisations of a file. Raises EntitlementError 'terms-missing', 'terms-invalid' (file and line)."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EntitlementError(
            "terms-missing",
            found=f"{path}: {error}",
            expected="a YAML file of terms records",
            do="Check the path; `stillroom terms show ID` prints a record.",
        ) from error
    return parse_terms(text, str(path))


def parse_terms(text: str, name: str) -> CatalogueFile:
    """The same from text; `name` is what errors call it."""
    try:
        _refuse_what_cannot_be_held(text, name)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise _invalid(where, f"not YAML: {getattr(error, 'problem', None) or error}") from error
    if root is None:
        raise _invalid(name, "an empty file")
    reader = _Reader(name)
    tree = reader.plain(root, ())
    try:
        return CatalogueFile.model_validate(tree)
    except ValidationError as error:
        raise _as_error(error, reader.lines, name) from error


def _refuse_what_cannot_be_held(text: str, name: str) -> None:
    """Nesting that would end the process, and anchors that hold themselves: told from the events, before anything recurses."""
    depth, open_anchors, anchors = 0, [], set()
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            open_anchors.append(event.anchor)
            if depth > _DEEPEST:
                raise _invalid(f"{name}:{_line(event)}", "nested too deeply")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            anchors.add(open_anchors.pop())
        elif isinstance(event, yaml.AliasEvent) and event.anchor not in anchors:
            raise _invalid(f"{name}:{_line(event)}", f"*{event.anchor} stands for nothing above it")
        elif isinstance(event, yaml.ScalarEvent):
            anchors.add(event.anchor)


class _Reader:
    """Plain values of nodes, with the line of each path noted. Keys that repeat are refused, and more values than a file of terms can have."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[_Path, int] = {}

    def plain(self, node: yaml.Node, path: _Path) -> Any:
        """The value of a node and of what is in it."""
        line = _line(node)
        self.lines[path] = line
        if len(self.lines) > _MOST_VALUES:
            raise _invalid(
                f"{self.name}:{line}", f"more values than a file of terms can have ({_MOST_VALUES:,}, aliases counted as often as they are used)"
            )
        if isinstance(node, yaml.MappingNode):
            found: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key, key_line = str(key_node.value), _line(key_node)
                if key in found:
                    raise _invalid(f"{self.name}:{key_line}", f"the key {key!r} twice")
                found[key] = self.plain(value_node, (*path, key))
                self.lines[(*path, key)] = key_line
            return found
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(child, (*path, index)) for index, child in enumerate(node.value)]
        if node.tag == "tag:yaml.org,2002:str":
            return node.value
        try:
            return _CONSTRUCTOR.construct_object(node, deep=True)
        except Exception as error:  # YAML's constructors raise what Python's raise: ValueError, IndexError, OverflowError
            raise _invalid(f"{self.name}:{line}", f"{str(node.value)!r:.60} is no value: {getattr(error, 'problem', None) or error}") from error


def _line(where: Any) -> int:
    """The line of an event or node, from 1."""
    return int(where.start_mark.line) + 1


def _as_error(error: ValidationError, lines: dict[_Path, int], name: str) -> EntitlementError:
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    path: _Path = tuple(first["loc"])
    while path and path not in lines:
        path = path[:-1]
    where = ".".join(str(part) for part in first["loc"])
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        text = f"unknown key{_nearest(str(first['loc'][-1]))}"
    return _invalid(f"{name}:{lines.get(path, 1)}", f"{where or 'the file'}: {text}")


def _nearest(key: str) -> str:
    known = [name for model in vars(records).values() if hasattr(model, "model_fields") for name in model.model_fields]
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _invalid(where: str, found: str) -> EntitlementError:
    return EntitlementError(
        "terms-invalid", found=f"{where}: {found}", expected="a file of terms records as docs/reference/terms.md has it", do="Mend that line."
    )
