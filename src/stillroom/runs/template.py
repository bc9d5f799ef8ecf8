"""The commented recipe that `stillroom init` writes, made from the recipe's own fields so that it cannot fall behind them."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from stillroom.runs.documented import descriptions
from stillroom.runs.recipe import (
    CollectionSection,
    CompetesSection,
    EndpointSection,
    FromScratch,
    LabelOnlySection,
    LoraSection,
    Recipe,
    VerifierSection,
)

_HEAD = """\
# A recipe: everything a run depends on.
#   stillroom plan THIS-FILE     what would happen, before anything is spent
#   stillroom run THIS-FILE      do it; run again with the same --out to resume
# Relative paths are relative to this file. Lines that are commented out show the default or an alternative.
"""

_EXAMPLES: dict[str, Any] = {
    "teacher.model": "path/to/teacher",
    "teacher.endpoint.url": "https://api.example.com/v1",
    "teacher.endpoint.model": "example-large",
    "teacher.endpoint.key_variable": "EXAMPLE_API_KEY",
    "teacher.tokenizer": "path/to/tokenizer",
    "collection.prices": "prices.yaml",
    "collection.max_money": 5,
    "collection.max_tokens": 1000000,
    "collection.store": "requests.sqlite",
    "curation.verifier.regex": "[.!?]\\s*$",
    "curation.verifier.forbidden": "(?i)as an ai",
    "curation.verifier.json_schema": "schema.json",
    "curation.verifier.function": "checks.py:name",
    "terms.model": "owner/name",
    "terms.licence": "Apache-2.0",
    "terms.base_model": "owner/name",
    "terms.base_licence": "Apache-2.0",
    "terms.datasets": [{"name": "owner/name", "licence": "CC-BY-4.0"}],
    "terms.generated_on": "2026-11-24",
    "terms.authorisations": ["authorisation.yaml"],
    "terms.catalogue": "2026-11-24",
    "intent.purpose": "train",
    "intent.task": "narrow-generative",
    "intent.release": "internal",
    "intent.commercial": False,
    "intent.competes.value": False,
    "intent.competes.asserted_by": "head of product",
    "intent.competes.why": "it sorts our own support mail and is sold to nobody",
    "intent.publish_dataset": False,
    "intent.monthly_users": 1000,
    "intent.group_revenue_usd": 1000000,
    "intent.model_as_a_service": False,
    "intent.assistant_business": False,
    "intent.domicile": "DE",
    "intent.territories": ["DE", "US"],
    "intent.student_name": "name",
    "intent.holder": "Example Ltd",
    "intent.account": "account-1",
    "student.from_scratch.layers": 4,
    "student.from_scratch.width": 256,
    "student.from_scratch.heads": 4,
    "student.from_scratch.feed_forward": 1024,
    "prompts.path": "prompts.jsonl",
    "evaluation.path": "items.jsonl",
    "evaluation.label_only.path": "labelled.jsonl",
}
# Optional sections and values that the template shows uncommented.
_SHOWN = {"teacher.model", "student", "student.from_scratch", "prompts", "prompts.path"}
_OPTIONAL_SECTIONS: dict[str, type[BaseModel]] = {
    "teacher.endpoint": EndpointSection,
    "collection": CollectionSection,
    "intent.competes": CompetesSection,
    "curation.verifier": VerifierSection,
    "student.from_scratch": FromScratch,
    "student.lora": LoraSection,
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
        lines.extend(_comment(descriptions(model).get(name) or (section.__doc__ if section else None), depth))
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
