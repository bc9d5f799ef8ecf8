"""The commented recipe that `stillroom init` writes, made from the recipe's own fields so that it cannot fall behind them."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from stillroom.runs.recipe import FromScratch, LabelOnlySection, Recipe, TermsSection

_HEAD = """\
# A recipe: everything a run depends on.
#   stillroom plan THIS-FILE     what would happen, before anything is spent
#   stillroom run THIS-FILE      do it; run again with the same --out to resume
# Relative paths are relative to this file. Lines that are commented out show the default or an alternative.
"""

_EXAMPLES: dict[str, Any] = {
    "teacher.model": "path/to/teacher",
    "terms.licence": "Apache-2.0",
    "terms.distillation": "unknown",
    "terms.document": "https://www.apache.org/licenses/LICENSE-2.0",
    "terms.read_on": "2026-11-24",
    "student.from_scratch.layers": 4,
    "student.from_scratch.width": 256,
    "student.from_scratch.heads": 4,
    "student.from_scratch.feed_forward": 1024,
    "prompts.path": "prompts.jsonl",
    "evaluation.path": "items.jsonl",
    "evaluation.label_only.path": "labelled.jsonl",
}
# Optional sections and values that the template shows uncommented.
_SHOWN = {"teacher.model", "terms", "terms.document", "terms.read_on", "student", "student.from_scratch", "prompts", "prompts.path"}
_OPTIONAL_SECTIONS: dict[str, type[BaseModel]] = {
    "terms": TermsSection,
    "student.from_scratch": FromScratch,
    "evaluation.label_only": LabelOnlySection,
}


def recipe_template() -> str:
    """A YAML recipe in which every key is explained; it is valid as it stands (its paths are examples)."""
    return _HEAD + "\n".join(_section(Recipe, "", 0, True)) + "\n"


def _section(model: type[BaseModel], prefix: str, depth: int, live: bool) -> list[str]:
    lines: list[str] = []
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        default = _EXAMPLES.get(key, _default(info.get_default(call_default_factory=True), info.default))
        shown = live and (key in _SHOWN or info.is_required() or (default is not None and key in _EXAMPLES and _shown_parent(key)))
        section = _OPTIONAL_SECTIONS.get(key) or _as_section(info.annotation)
        if depth == 0:
            lines.append("")
        lines.extend(_comment(info.description or (section.__doc__ if section else None), depth))
        if section is not None:
            mark = "" if shown or (depth == 0 and live and key not in _OPTIONAL_SECTIONS) else "# "
            lines.append(f"{'  ' * depth}{mark}{name}:")
            lines.extend(_section(section, f"{key}.", depth + 1, live and not mark))
            continue
        lines.append(f"{'  ' * depth}{'' if shown else '# '}{name}: {_plain(default)}")
    return lines


def _shown_parent(key: str) -> bool:
    return key.rpartition(".")[0] in _SHOWN


def _as_section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _default(value: Any, declared: Any) -> Any:
    if value is PydanticUndefined or declared is PydanticUndefined:
        return None
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return [_default(item, item) for item in value]
    return value


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _comment(text: str | None, depth: int) -> list[str]:
    if not text:
        return []
    indent = "  " * depth
    return [f"{indent}# {line}" for line in textwrap.wrap(" ".join(text.split()), 110 - len(indent))]
