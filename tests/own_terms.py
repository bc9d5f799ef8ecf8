"""A user's own terms for tests: what Apache-2.0 says, changed in one way or another, and an invented provider."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import yaml

from stillroom.entitlement.library import builtin
from stillroom.entitlement.store import TermsStore

APACHE = "apache-2.0@2004-01-01"
EVIDENCE = {"grade": "P1", "source": "a test", "reviewed": "2026-11-24"}
DENIAL = {
    "id": "no-training",
    "locator": "section 99",
    "effect": "prohibit",
    "actions": ["train-on-output"],
    "paraphrase": "Nobody may train anything on what the work writes.",
}
DISPLAY = {
    "id": "show",
    "locator": "section 98",
    "effect": "oblige",
    "actions": ["train-on-output"],
    "duty": {"kind": "display", "text": "Made with the work", "flows_to": ["documentation"]},
    "paraphrase": "Whoever trains on what the work writes shows a line that says so.",
}


def apache_with(*clauses: dict[str, Any]) -> dict[str, Any]:
    """The record of Apache-2.0 with more clauses, as plain values."""
    record = builtin().records[APACHE].model_dump(mode="json", exclude_none=True)
    return record | {"clauses": [*record["clauses"], *clauses]}


def service(provider: str = "acme", **more: Any) -> dict[str, Any]:
    """The terms of an invented provider's API, which let everything be learned from; they can be changed under their address."""
    clause = {
        "id": "outputs",
        "locator": "section 1",
        "effect": "permit",
        "actions": ["generate-for-training", "train-on-output", "use-logits"],
        "paraphrase": "The customer may do with outputs what it likes.",
    }
    return {
        "id": f"{provider}-api@2026-01-01",
        "kind": "service-terms",
        "provider": provider,
        "title": f"{provider.title()} API Terms",
        "effective": "2026-01-01",
        "url": f"https://{provider}.example/terms",
        "review_by": "2027-01-01",
        "applies_to": {"access": ["api"], "providers": [provider]},
        "evidence": EVIDENCE,
        "clauses": [clause],
        **more,
    }


def own_terms(store: Path, *records: dict[str, Any], **lists: Any) -> TermsStore:
    """The store in which exactly these records are the user's own."""
    folder = store / "records"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.yaml"):
        old.unlink()
    if records or lists:
        (folder / "own.yaml").write_text(yaml.safe_dump({"records": list(records), **lists}), encoding="utf-8")
    return TermsStore.open(store)


def confirm(store: TermsStore, record: str, today: date) -> None:
    """Confirms the record's text."""
    text = store.directory.parent / "text.txt"
    text.write_text("The terms as they are.", encoding="utf-8")
    store.confirm(record, text, "a lawyer", today)
