"""A value that meets a JSON Schema, drawn by chance: for the part of JSON Schema that constrained decoding usually knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_KNOWN = {
    "type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems", "enum", "const", "anyOf", "minimum", "maximum",
    "$ref", "$defs", "title", "description", "default", "$schema", "examples",
}  # fmt: skip
_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_DEEPEST = 16
_MOST_ITEMS = 1000


class SchemaRefused(Exception):
    """A schema that this part does not cover; the text says why."""


def check_schema(schema: Any) -> None:
    """Raises SchemaRefused unless `any_value` can meet `schema`."""
    _Walk(schema, iter(lambda: 0.5, None)).value(schema, 0)


def any_value(schema: Any, draws: Iterator[float], words: tuple[str, ...]) -> Any:
    """A value that meets `schema`, a function of `draws`."""
    return _Walk(schema, draws, words).value(schema, 0)


class _Walk:
    def __init__(self, root: Any, draws: Iterator[float], words: tuple[str, ...] = ("word",)) -> None:
        self._root, self._draws, self._words = root, draws, words
        self._left = 4 * _MOST_ITEMS

    def value(self, schema: Any, depth: int) -> Any:
        self._left -= 1
        if depth > _DEEPEST or self._left < 0:
            raise SchemaRefused("it is nested too deeply, or has no end")
        if schema is True or schema == {}:
            return self._text()
        if not isinstance(schema, dict):
            raise SchemaRefused("a schema is an object")
        if unknown := set(schema) - _KNOWN:
            raise SchemaRefused(f"'{min(unknown)}' is not supported")
        if "$ref" in schema:
            return self.value(self._referred(schema["$ref"]), depth + 1)
        if "const" in schema:
            return schema["const"]
        for name in ("enum", "anyOf"):
            if name in schema:
                chosen = self._one_of(schema[name], name)
                return chosen if name == "enum" else self.value(chosen, depth + 1)
        return self._typed(schema, depth)

    def _typed(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type", "object" if "properties" in schema else "string")
        if isinstance(kind, list):
            kind = self._one_of(kind, "type")
        match kind:
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, depth)
            case "string":
                return self._text()
            case "integer" | "number":
                return self._number(schema, whole=kind == "integer")
            case "boolean":
                return next(self._draws) < 0.5
            case "null":
                return None
            case _:
                raise SchemaRefused(f"'type' is one of {', '.join(_TYPES)}")

    def _object(self, schema: dict[str, Any], depth: int) -> Any:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise SchemaRefused("'properties' is an object and 'required' a list of names")
        # Without any, a JSON object all the same, with something in it.
        names = [*properties, *(name for name in required if name not in properties)]
        if not names and schema.get("additionalProperties", True) is not False:
            return {"answer": self._text()}
        return {name: self.value(properties.get(name, True), depth + 1) for name in names}

    def _array(self, schema: dict[str, Any], depth: int) -> Any:
        least, most = self._count(schema, "minItems", 0), self._count(schema, "maxItems", _MOST_ITEMS)
        if least > most:
            raise SchemaRefused("'minItems' is above 'maxItems'")
        length = min(max(least, 1 + int(next(self._draws) * 3)), most)
        return [self.value(schema.get("items", True), depth + 1) for _ in range(length)]

    def _count(self, schema: dict[str, Any], name: str, default: int) -> int:
        value = schema.get(name, default)
        if type(value) is not int or not 0 <= value <= _MOST_ITEMS:
            raise SchemaRefused(f"'{name}' is an integer from 0 to {_MOST_ITEMS}")
        return value

    def _number(self, schema: dict[str, Any], *, whole: bool) -> int | float:
        bounds = []
        for name, default in (("minimum", None), ("maximum", None)):
            value = schema.get(name, default)
            if value is not None and (type(value) not in (int, float) or abs(value) > 1e15):
                raise SchemaRefused(f"'{name}' is a number within 1e15")
            bounds.append(value)
        low = bounds[0] if bounds[0] is not None else min(0, bounds[1] - 100 if bounds[1] is not None else 0)
        high = bounds[1] if bounds[1] is not None else low + 100
        if whole:
            low, high = -int(-low // 1), int(high // 1)
        if low > high:
            raise SchemaRefused("there is no number from 'minimum' to 'maximum'")
        if whole:
            return min(int(low + int(next(self._draws) * (high - low + 1))), int(high))
        return min(max(round(low + next(self._draws) * (high - low), 2), low), high)

    def _text(self) -> str:
        return " ".join(self._words[int(next(self._draws) * len(self._words))] for _ in range(1 + int(next(self._draws) * 3)))

    def _one_of(self, values: Any, name: str) -> Any:
        if not isinstance(values, list) or not values:
            raise SchemaRefused(f"'{name}' is a list of at least one")
        return values[int(next(self._draws) * len(values))]

    def _referred(self, reference: Any) -> Any:
        found: Any = self._root
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise SchemaRefused("'$ref' points into the schema itself")
        for name in filter(None, reference[1:].split("/")):
            if not isinstance(found, dict) or name not in found:
                raise SchemaRefused(f"'$ref' {reference} points nowhere")
            found = found[name]
        return found
