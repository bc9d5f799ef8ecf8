"""The report's schema is a JSON Schema, the stored reports satisfy it, and it refuses what is not a report."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from contract import source
from stillroom.runs.report import Report

# A report that a real run of the demo wrote (scripts/update_readme.py stores it beside the benchmarks).
STORED = sorted([*(source.ROOT / "benchmarks" / "results").glob("*report*.json"), *(source.ROOT / "tests").rglob("*report*.json")])


def test_there_is_a_stored_report() -> None:
    assert STORED


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.name)
def test_stored_reports_are_reports(path: Path) -> None:
    report = Report.model_validate_json(path.read_text(encoding="utf-8"))
    assert Report.model_validate(report.model_dump(mode="json")) == report


@pytest.mark.parametrize("path", STORED[:1], ids=lambda path: path.name)
def test_an_unknown_or_a_missing_field_is_refused(path: Path) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    more = copy.deepcopy(tree) | {"invented": 1}
    with pytest.raises(ValidationError):
        Report.model_validate(more)
    del tree["fidelity"]["acceptance"]
    with pytest.raises(ValidationError):
        Report.model_validate(tree)


def test_the_fields_that_the_issue_promises_are_there() -> None:
    schema = Report.model_json_schema(mode="serialization")["$defs"]
    costs = {"parameters", "bytes", "flops_per_token", "tokens_per_second", "latency_p50_seconds", "latency_p95_seconds", "peak_memory_bytes"}
    assert costs <= set(schema["ModelCost"]["required"])
    assert costs <= set(schema["Ratios"]["required"])
    assert {"teacher", "student", "label_only", "gap_recovered"} <= set(schema["Quality"]["required"])
    assert {"forward_kl_nats", "top1_agreement", "acceptance"} <= set(schema["Fidelity"]["required"])
    assert {"exact_match", "families"} <= set(schema["ModelQuality"]["properties"])
    assert {"value", "n", "low", "high", "unit", "source"} <= set(schema["Number"]["properties"])
