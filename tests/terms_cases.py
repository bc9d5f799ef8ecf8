"""Golden cases: what the verdict on one use must be. tests/entitlement/cases/*.yaml has them; the fields are those of `decided` and `check`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import yaml

from stillroom.entitlement.facts import check_value
from stillroom.entitlement.library import Catalogue, Role, Source, builtin
from stillroom.entitlement.verdict import Assertion, Circumstances, Confirmation, Use, Verdict, decide

TODAY = date(2026, 11, 24)
_DEFAULTS = {"purpose": "train", "method": "text", "modality": "text"}


def cases() -> list[dict[str, Any]]:
    """Every case of every file."""
    folder = Path(__file__).parent / "entitlement" / "cases"
    return [case | {"file": path.name} for path in sorted(folder.glob("*.yaml")) for case in yaml.safe_load(path.read_text(encoding="utf-8"))]


def decided(case: dict[str, Any], catalogue: Catalogue | None = None) -> Verdict:
    """The verdict on a case."""
    return decide(sources_of(case), use_of(case), catalogue or builtin(), circumstances_of(case), alternatives=False)


def sources_of(case: dict[str, Any]) -> list[Source]:
    """Teacher, base and datasets."""
    found = [_source(case["teacher"], "teacher", "weights")]
    if "base" in case:
        found.append(_source(case["base"], "base", "weights"))
    return found + [_source(one, "dataset", "dataset") for one in case.get("datasets", ())]


def use_of(case: dict[str, Any]) -> Use:
    """Facts, assertions, name."""
    facts = {name: check_value(name, value) for name, value in (_DEFAULTS | case.get("intent", {})).items()}
    assertions = tuple(Assertion(**one) for one in case.get("assertions", ()))
    return Use(facts=facts, assertions=assertions, student_name=case.get("student_name"))


def circumstances_of(case: dict[str, Any]) -> Circumstances:
    """The day and what was confirmed."""
    today = case.get("today", TODAY)
    return Circumstances(today=today, confirmations=confirmed(case.get("confirmed", ()), today))


def confirmed(ids: Iterable[str], today: date) -> dict[str, Confirmation]:
    """Confirmations of these records, made on the day."""
    return {
        name: Confirmation(record=name, text_sha256="0" * 64, confirmed_by="a lawyer", confirmed_on=today, review_by=today + timedelta(days=90))
        for name in ids
    }


def _source(tree: dict[str, Any], role: Role, access: str) -> Source:
    return Source(
        name=tree["name"],
        access=tree.get("access", access),
        role=role,
        licence=tree.get("licence"),
        declared_by="its model card",
        generated_on=tree.get("generated_on"),
    )
