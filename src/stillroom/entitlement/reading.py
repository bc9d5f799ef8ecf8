"""YAML files of terms, read strictly: what is wrong is told with its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stillroom.core.errors import EntitlementError
from stillroom.entitlement import records
from stillroom.entitlement.records import CatalogueFile

_Loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TEXT = "tag:yaml.org,2002:str"
# Conditions nest a few deep; PyYAML's own composer recurses without a limit, and dies where the stack ends.
_DEEPEST = 50
# Aliases of aliases unfold without end; a file with every instrument that there is would have some twenty thousand.
_MOST_VALUES = 200_000


def read_terms(path: Path) -> CatalogueFile:
    """The records, models and authorisations of a file. Raises EntitlementError 'terms-missing', 'terms-invalid' (file and line)."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not UTF-8, and a null byte in the path, are ValueErrors
        raise EntitlementError(
            "terms-missing",
            found=f"{path}: {error}",
            expected="a YAML file of terms records",
            do="Check the path; `stillroom terms show ID` prints a record.",
        ) from error
    return parse_terms(text, str(path))


def parse_terms(text: str, name: str) -> CatalogueFile:
    """The same from text; `name` is what errors call it."""
    reader = _Reader(text, name)
    try:
        tree = reader.tree()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise _invalid(where, f"not YAML: {getattr(error, 'problem', None) or error}") from error
    try:
        return CatalogueFile.model_validate(tree)
    except ValidationError as error:
        raise _as_error(error, reader, tree) from error


class _Reader:
    """One YAML document as plain values, built from the parser's events, with the line of each value noted. Keys that repeat are refused."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._events: Iterator[Any] = yaml.parse(text, Loader=_Loader)
        self._lines: dict[int, dict[str | int, int]] = {}
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._count = 0

    def tree(self) -> Any:
        """The value of the document. Raises yaml.YAMLError, and EntitlementError for what is YAML and still not to be read."""
        next(self._events)
        if isinstance(next(self._events), yaml.StreamEndEvent):
            raise _invalid(self.name, "an empty file")
        found = self._value(next(self._events), 0)
        next(self._events)
        if not isinstance(after := next(self._events), yaml.StreamEndEvent):
            raise self._refusal(after, "a second document")
        return found

    def where(self, path: Iterable[str | int], tree: Any) -> str:
        """The file and line of what stands at `path`, or of the innermost value around it that is there."""
        line, here = 1, tree
        for part in path:
            known = self._lines.get(id(here), {})
            if part not in known:
                break
            line, here = known[part], here[part]
        return f"{self.name}:{line}"

    def _value(self, event: Any, depth: int) -> Any:
        self._count += 1
        if depth > _DEEPEST:
            raise self._refusal(event, "nested too deeply")
        if self._count > _MOST_VALUES:
            raise self._refusal(event, "more values than a file of terms can have")
        if isinstance(event, yaml.AliasEvent):
            return self._aliased(event)
        before = self._count
        if isinstance(event, yaml.MappingStartEvent):
            found: Any = self._mapping(depth)
        elif isinstance(event, yaml.SequenceStartEvent):
            found = self._sequence(depth)
        else:
            found = self._scalar(event)
        if event.anchor is not None:
            self._anchors[event.anchor] = found, self._count - before
        return found

    def _mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines = self._lines[id(found)] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self._refusal(event, "a key that is not a word")
            if event.value in found:
                raise self._refusal(event, f"the key {event.value!r} twice")
            lines[event.value] = _line(event)
            found[event.value] = self._value(next(self._events), depth + 1)
        return found

    def _sequence(self, depth: int) -> list[Any]:
        found: list[Any] = []
        lines = self._lines[id(found)] = {}
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            lines[len(found)] = _line(event)
            found.append(self._value(event, depth + 1))
        return found

    def _scalar(self, event: Any) -> Any:
        tag, text = event.tag, event.value
        if tag is None and event.implicit[0]:
            tag = next((tag for tag, form in yaml.SafeLoader.yaml_implicit_resolvers.get(text[:1], ()) if form.match(text)), None)
        if tag in (None, "!", _TEXT):
            return text
        try:
            return yaml.constructor.SafeConstructor().construct_object(yaml.ScalarNode(tag, text))
        except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # the 13th month; a tag of somebody's own
            raise self._refusal(event, f"{text[:60]!r} is not a {tag.rpartition(':')[2]}") from error

    def _aliased(self, event: Any) -> Any:
        if event.anchor not in self._anchors:
            raise self._refusal(event, f"*{event.anchor} stands for nothing above it")
        found, count = self._anchors[event.anchor]
        self._count += count
        return found

    def _refusal(self, event: Any, found: str) -> EntitlementError:
        return _invalid(f"{self.name}:{_line(event)}", found)


def _line(event: Any) -> int:
    line: int = event.start_mark.line
    return line + 1


def _as_error(error: ValidationError, reader: _Reader, tree: Any) -> EntitlementError:
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    path = ".".join(str(part) for part in first["loc"])
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        text = f"unknown key{_nearest(str(first['loc'][-1]))}"
    return _invalid(reader.where(first["loc"], tree), f"{path or 'the file'}: {text}")


def _nearest(key: str) -> str:
    known = [name for model in vars(records).values() if hasattr(model, "model_fields") for name in model.model_fields]
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _invalid(where: str, found: str) -> EntitlementError:
    return EntitlementError(
        "terms-invalid", found=f"{where}: {found}", expected="a file of terms records as docs/reference/terms.md has it", do="Mend that line."
    )
