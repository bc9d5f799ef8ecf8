"""Checking JSON against a JSON Schema: the part of draft 2020-12 that recipes need, written out, and nothing beyond it accepted.

Understood: `type` `enum` `const`; `properties` `required` `additionalProperties` `minProperties` `maxProperties`; `items` `prefixItems` `minItems`
`maxItems` `uniqueItems`; `minLength` `maxLength` `pattern` (as Python's `re` reads it); `minimum` `maximum` `exclusiveMinimum` `exclusiveMaximum`
`multipleOf`; `allOf` `anyOf` `oneOf` `not`; `$defs` and `$ref` to "#" or "#/$defs/NAME"; and for people `title` `description` `default` `examples`
`deprecated` `$schema` `$comment`. Any other keyword is refused by name when the schema is read, `format` too: a check that is passed over in silence is
worse than none. This is what pydantic's `model_json_schema()` writes for models of plain fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn, TypeAlias

from stillroom.core.errors import DataError
from stillroom.core.identities import Json
from stillroom.data.words import shortened

_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and value == int(value),
    "number": lambda value: _is_number(value),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
_BOUNDS: dict[str, tuple[Callable[[Any], bool], Callable[[Any, Any], bool]]] = {
    "minimum": (_TYPES["number"], lambda value, bound: value >= bound),
    "maximum": (_TYPES["number"], lambda value, bound: value <= bound),
    "exclusiveMinimum": (_TYPES["number"], lambda value, bound: value > bound),
    "exclusiveMaximum": (_TYPES["number"], lambda value, bound: value < bound),
    "multipleOf": (_TYPES["number"], lambda value, bound: Fraction(str(value)) % Fraction(str(bound)) == 0),
    "minLength": (_TYPES["string"], lambda value, bound: len(value) >= bound),
    "maxLength": (_TYPES["string"], lambda value, bound: len(value) <= bound),
    "minItems": (_TYPES["array"], lambda value, bound: len(value) >= bound),
    "maxItems": (_TYPES["array"], lambda value, bound: len(value) <= bound),
    "minProperties": (_TYPES["object"], lambda value, bound: len(value) >= bound),
    "maxProperties": (_TYPES["object"], lambda value, bound: len(value) <= bound),
}
_FOR_PEOPLE = frozenset({"title", "description", "default", "examples", "deprecated", "$schema", "$comment"})
_ONE = frozenset({"items", "additionalProperties", "not"})
_LISTS = frozenset({"prefixItems", "allOf", "anyOf", "oneOf"})
_NAMED = frozenset({"properties", "$defs"})
_OTHER = frozenset({"type", "enum", "const", "required", "uniqueItems", "pattern", "$ref"})
KEYWORDS = frozenset(_BOUNDS) | _FOR_PEOPLE | _ONE | _LISTS | _NAMED | _OTHER

Schema: TypeAlias = bool | Json


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A schema that has been read whole: it has no keyword but those of `KEYWORDS`, and each has a value of its kind."""

    root: Schema

    @classmethod
    def of(cls, tree: Any) -> JsonSchema:
        """Raises DataError 'verifier-invalid', naming what is not understood and where."""
        try:
            _check_schema(tree, "#", tree)
        except RecursionError:
            _refuse("a schema that is nested too deeply", "one that is not")
        return cls(tree)

    def fault(self, value: Any) -> str | None:
        """The first fault of a JSON value, where and what; None where there is none. RecursionError where a schema asks of itself without end."""
        return _fault(self.root, value, "$", self.root)


# --- reading a schema ----------------------------------------------------------------------------------------------------------------------


def _check_schema(schema: Any, where: str, root: Any) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        _refuse(f"{where} is {shortened(repr(schema), 40)}", "a schema: an object, true or false")
    for keyword, value in schema.items():
        if keyword not in KEYWORDS:
            _refuse(f"the keyword {keyword!r:.60} at {where}", f"one of {', '.join(sorted(KEYWORDS))}")
        at = f"{where}/{keyword}"
        if keyword in _ONE:
            _check_schema(value, at, root)
        elif keyword in _LISTS:
            _require(isinstance(value, list) and (bool(value) or keyword == "prefixItems"), at, value, "a list of schemas")
            for index, part in enumerate(value):
                _check_schema(part, f"{at}/{index}", root)
        elif keyword in _NAMED:
            _require(isinstance(value, dict), at, value, "an object of schemas")
            for name, part in value.items():
                _check_schema(part, f"{at}/{name}", root)
        elif keyword in _BOUNDS:
            counts = keyword.startswith(("min", "max")) and keyword not in ("minimum", "maximum")
            fits = type(value) is int and value >= 0 if counts else _is_number(value) and (value > 0 or keyword != "multipleOf")
            _require(fits, at, value, "a count" if counts else "a number" + (" above 0" if keyword == "multipleOf" else ""))
        elif keyword in _OTHER:
            _check_other(keyword, value, at, root)


def _check_other(keyword: str, value: Any, at: str, root: Any) -> None:
    match keyword:
        case "type":
            named = value if isinstance(value, list) else [value]
            _require(bool(named) and all(isinstance(one, str) and one in _TYPES for one in named), at, value, f"one of {', '.join(_TYPES)}")
        case "enum":
            _require(isinstance(value, list), at, value, "a list")
        case "required":
            _require(isinstance(value, list) and all(isinstance(one, str) for one in value), at, value, "a list of names")
        case "uniqueItems":
            _require(isinstance(value, bool), at, value, "true or false")
        case "pattern":
            _require(isinstance(value, str) and _compiles(value), at, value, "a regular expression")
        case "$ref":
            _require(isinstance(value, str) and _target(value, root) is not None, at, value, '"#" or "#/$defs/NAME", NAME being there')


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _target(reference: str, root: Any) -> Schema | None:
    if reference == "#":
        return root  # type: ignore[no-any-return]
    definitions = root.get("$defs") if isinstance(root, dict) else None
    name = reference.removeprefix("#/$defs/").replace("~1", "/").replace("~0", "~")
    return definitions.get(name) if reference.startswith("#/$defs/") and isinstance(definitions, dict) else None


def _require(fits: bool, at: str, value: Any, expected: str) -> None:
    if not fits:
        _refuse(f"{at} is {shortened(repr(value), 60)}", expected)


def _refuse(found: str, expected: str) -> NoReturn:
    raise DataError(
        "verifier-invalid",
        found=f"a JSON schema with {found}",
        expected=expected,
        why="what is not understood would not be checked",
        do="Leave it out, or check it with a Python function.",
    )


# --- checking a value ----------------------------------------------------------------------------------------------------------------------


def _fault(schema: Schema, value: Any, where: str, root: Schema) -> str | None:
    if isinstance(schema, bool):
        return None if schema else f"{where} may not be there"
    if "$ref" in schema:
        target = _target(schema["$ref"], root)
        assert target is not None, "checked when the schema was read"
        if fault := _fault(target, value, where, root):
            return fault
    return _fault_of_value(schema, value, where) or _fault_of_parts(schema, value, where, root) or _fault_of_choices(schema, value, where, root)


def _fault_of_value(schema: Json, value: Any, where: str) -> str | None:
    if "type" in schema:
        named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(_TYPES[name](value) for name in named):
            return f"{where} is not of type {' or '.join(named)}"
    if "const" in schema and not _same(value, schema["const"]):
        return f"{where} is not {shortened(repr(schema['const']), 40)}"
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        return f"{where} is none of those in enum"
    for keyword, (concerns, holds) in _BOUNDS.items():
        if keyword in schema and concerns(value) and not holds(value, schema[keyword]):
            return f"{where} breaks {keyword} {schema[keyword]}"
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        return f"{where} does not match {shortened(schema['pattern'], 40)}"
    if schema.get("uniqueItems") and isinstance(value, list) and len({_comparable(one) for one in value}) < len(value):
        return f"{where} has an item twice"
    return None


def _fault_of_parts(schema: Json, value: Any, where: str, root: Schema) -> str | None:
    if isinstance(value, dict):
        if missing := next((name for name in schema.get("required", ()) if name not in value), None):
            return f"{where} has no {missing!r:.60}"
        named, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        for name, part in value.items():
            if fault := _fault(named.get(name, rest), part, f"{where}.{name}", root):
                return fault
    if isinstance(value, list):
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        for index, part in enumerate(value):
            if fault := _fault(first[index] if index < len(first) else rest, part, f"{where}[{index}]", root):
                return fault
    return None


def _fault_of_choices(schema: Json, value: Any, where: str, root: Schema) -> str | None:
    for part in schema.get("allOf", ()):
        if fault := _fault(part, value, where, root):
            return fault
    if "anyOf" in schema and all(_fault(part, value, where, root) for part in schema["anyOf"]):
        return f"{where} fits none of anyOf"
    if "oneOf" in schema and (fits := sum(_fault(part, value, where, root) is None for part in schema["oneOf"])) != 1:
        return f"{where} fits {fits} of oneOf"
    if "not" in schema and _fault(schema["not"], value, where, root) is None:
        return f"{where} fits what it may not"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(one: Any, other: Any) -> bool:
    return bool(_comparable(one) == _comparable(other))


def _comparable(value: Any) -> Any:
    """Something hashable that is equal for equal JSON values only: 1 and 1.0 are equal, 1 and true are not."""
    match value:
        case dict():
            return ("object", frozenset((name, _comparable(part)) for name, part in value.items()))
        case list():
            return ("array", tuple(_comparable(part) for part in value))
        case bool():
            return ("boolean", value)
    return value
