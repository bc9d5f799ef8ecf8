"""The page as a whole: one self-contained file that asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

from stillroom.core.durable import write_bytes_atomic
from stillroom.core.errors import RunError
from stillroom.web import record, results
from stillroom.web.markup import Html, el
from stillroom.web.sentences import verdict

SCHEMA_VERSION = 1

_CONTENTS = (
    ("summary", "Summary"),
    ("quality", "Quality"),
    ("trade", "Size, quality, speed"),
    ("training", "Training"),
    ("fidelity", "Fidelity"),
    ("failures", "Where it fails"),
    ("samples", "Samples"),
    ("cost", "Cost to run"),
    ("making", "Cost to make"),
    ("collection", "The endpoint"),
    ("curation", "Left out"),
    ("provenance", "Provenance"),
    ("reproduce", "How to reproduce"),
    ("obligations", "Obligations"),
)


def render(report: dict[str, Any], *, metrics: list[dict[str, Any]] | None = None) -> str:
    """The report as one HTML document: styles, script and pictures inside, readable without the script, nothing fetched from anywhere.

    `report` is the content of report.json, `metrics` the rows of metrics.jsonl if there are any. Whatever the report lacks is shown as absent.
    """
    style, script = _resource("report.css"), _resource("report.js")
    main = el(
        "main",
        results.quality(report),
        results.exchange(report),
        results.training(report, metrics),
        results.fidelity(report),
        results.failures(report),
        results.side_by_side(report),
        record.costs(report),
        record.making(report),
        record.collection(report),
        record.curation(report),
        record.provenance(report),
        record.reproduce(report),
        record.obligations(report),
        el(
            "footer",
            el("p", "Made by Stillroom from report.json, which holds every number in full. Rest on a number to see its raw value and source."),
        ),
    )
    skip = el("a", "Skip to the results", href="#quality", class_="skip")
    body = el("body", skip, el("div", results.summary(report), _contents(report), main, class_="page"), el("script", script))
    return "<!doctype html>\n" + el("html", _head(report, style, script), body, lang="en") + "\n"


def _head(report: dict[str, Any], style: Html, script: Html) -> Html:
    policy = f"default-src 'none'; style-src '{_source_hash(style)}'; script-src '{_source_hash(script)}'; img-src data:; base-uri 'none'; form-action 'none'"
    return el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="description", content=verdict(report)),
        el("link", rel="icon", href="data:,"),
        el("title", str(report.get("title") or "Distillation report")),
        el("style", style),
    )


def _contents(report: dict[str, Any]) -> Html:
    there = [entry for entry in _CONTENTS if entry[0] not in ("collection", "curation") or report.get(entry[0])]
    return el("nav", el("ol", [el("li", el("a", title, href=f"#{anchor}")) for anchor, title in there]), aria_label="Contents")


def _resource(name: str) -> Html:
    return Html(resources.files("stillroom.web").joinpath(name).read_text(encoding="utf-8"))


def _source_hash(content: Html) -> str:
    """The content's digest in the form that a content security policy takes: only this very text may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def write(run_directory: Path) -> Path:
    """Reads report.json (and metrics.jsonl if it is there), writes report.html beside it, durably and whole, and returns its path.

    Raises RunError: `run-not-a-run` without a report.json, `run-corrupt` where it cannot be read or is of another schema.
    """
    source = run_directory / "report.json"
    if not source.is_file():
        raise RunError("run-not-a-run", found=f"no report.json in {run_directory}", expected="an evaluated run", do="Run `stillroom report` first.")
    report = _parsed(source)
    if not isinstance(report, dict) or report.get("schema_version") != SCHEMA_VERSION:
        version = report.get("schema_version") if isinstance(report, dict) else None
        raise RunError(
            "run-corrupt",
            found=f"{source} with schema version {version!r}",
            expected=f"version {SCHEMA_VERSION}",
            do="Make the report again with this version.",
        )
    target = run_directory / "report.html"
    write_bytes_atomic(target, render(report, metrics=_metrics(run_directory / "metrics.jsonl")).encode())
    return target


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError("run-corrupt", found=f"{path}: {error}", expected="JSON", do="Make the report again with `stillroom report`.") from error


def _metrics(path: Path) -> list[dict[str, Any]] | None:
    """The rows of metrics.jsonl. A last line cut off by a crash is left out; the curves in the report do not depend on it."""
    if not path.is_file():
        return None
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
