"""Typed parts of recipes, plans and reports, whose fields are described by the string below each.

pydantic's own `use_attribute_docstrings` reads and parses the source of every class when it is imported, which takes longer than the rest of a short
command. Here it is read when somebody asks: a JSON Schema, the recipe template, the reference pages.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Documented(BaseModel):
    """Frozen, and strict about its keys; its JSON Schema has the descriptions."""

    # Built when first used: most commands need the recipe alone, and not what a report is made of.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        fields: dict[str, Any] = handler.resolve_ref_schema(schema).get("properties", {})
        for name, text in descriptions(cls).items():
            fields[name].setdefault("description", text)
        return schema


@lru_cache(maxsize=256)
def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """The description of each field that has one: the string that stands below it in the source; none where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(model)))
    except (OSError, TypeError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    return {
        above.target.id: inspect.cleandoc(below.value.value)
        for above, below in zip(body, body[1:], strict=False)
        if isinstance(above, ast.AnnAssign)
        and isinstance(above.target, ast.Name)
        and above.target.id in model.model_fields
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }
