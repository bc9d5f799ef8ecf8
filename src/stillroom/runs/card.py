"""The student's model card: what it is, from whom it learned, how good it was found, what it must carry. One card: publishing adds to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stillroom.entitlement.obligations import LicenceProposal
from stillroom.runs.report import Absent, Maybe, Report

_ADAPTER = (
    "These files are a LoRA adapter without its base model, which adapter_config.json names: `peft.AutoPeftModelForCausalLM.from_pretrained` loads both. "
    "The numbers below are of the two merged."
)
_ROWS = (("teacher", "teacher"), ("student", "this model"), ("label_only", "its architecture on labels alone"))


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeFrom:
    """One thing that the student was made from: `role` teacher, base or dataset; `instruments` the ids of the terms it came under.

    `records` is how many records of it reached the weights; None for a base, which is there as a whole.
    """

    role: str
    name: str
    access: str
    instruments: tuple[str, ...] = ()
    records: int | None = None
    revision: str | None = None
    weights_sha256: str | None = None
    licence: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What the card says of a student that is given away, beside what its report says.

    `hub_licence` are the front matter's keys about the licence; `base_model` is there only where its weights were reused; `shown` are lines that
    must be shown, and `served` says that a service must show them too; `terms` are lines that whoever uses the student must find.
    """

    name: str
    licence: LicenceProposal
    hub_licence: dict[str, str]
    base_model: str | None
    made_from: tuple[MadeFrom, ...]
    shown: tuple[str, ...]
    served: bool
    terms: tuple[str, ...]


def student_card(report: Report, release: Release | None = None, *, adapter: bool = False) -> str:
    """README.md of the student's directory. With `release` the card of a student that is given away; `adapter`: the directory has an adapter alone."""
    title = _one_line(release.name if release is not None else report.title)
    front = yaml.safe_dump(_front(report, release, "peft" if adapter else "transformers"), sort_keys=False, allow_unicode=True, width=10_000)
    facts = report.provenance
    lines = [
        f"---\n{front}---",
        f"# {title}",
        *(_to_be_shown(release) if release is not None else ()),
        f"A student of {facts.student['parameters']:,} parameters, distilled by Stillroom from {_whom(facts.teacher)}.",
        *([_ADAPTER] if adapter else ()),
        *(_sources(release.made_from) if release is not None else ()),
        *(["## How good it is"] if release is not None else ()),
        _table(("on the evaluation items", "exact match"), [(name, _figure(getattr(report.quality, field).exact_match)) for field, name in _ROWS]),
        f"Gap recovered: {_figure(report.quality.gap_recovered)}. Forward KL: {_figure(report.fidelity.forward_kl_nats)} nats per token.",
        *(_licence(release) if release is not None else _terms(report)),
        f"Recipe {facts.recipe_sha256}, transfer set {facts.transfer_set_sha256}, ledger head {facts.ledger_head}.",
    ]
    return "\n\n".join(lines) + "\n"


def _whom(teacher: Mapping[str, str | int | None]) -> str:
    parameters = teacher["parameters"]
    return f"a teacher of {parameters:,}" if parameters is not None else f"{_one_line(str(teacher['source']))}, which answered through an endpoint"


def _front(report: Report, release: Release | None, library: str) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["distillation", "stillroom"]}
    if release is None:
        teacher = report.provenance.teacher
        source = Path(str(teacher["source"])).name if teacher["kind"] == "directory" else teacher["source"]
        return {**front, "teachers": [{"source": source, "weights_sha256": teacher["weights_sha256"], "licence": report.provenance.terms["licence"]}]}
    base = {"base_model": release.base_model} if release.base_model is not None else {}
    datasets = [one.name for one in release.made_from if one.role == "dataset"]
    return {
        **release.hub_licence,
        **base,
        **front,
        **({"datasets": datasets} if datasets else {}),
        "teachers": [_teacher(one) for one in release.made_from if one.role == "teacher"],
    }


def _teacher(one: MadeFrom) -> dict[str, Any]:
    told = {"source": one.name, "revision": one.revision, "weights_sha256": one.weights_sha256, "access": one.access, "licence": one.licence}
    return {**{name: value for name, value in told.items() if value is not None}, "terms": list(one.instruments), "records": one.records}


def _to_be_shown(release: Release) -> list[str]:
    if not release.shown:
        return []
    served = ["A service that this model runs in shows the same."] if release.served else []
    return ["## To be shown", *release.shown, *served]


def _sources(made_from: Iterable[MadeFrom]) -> list[str]:
    rows = []
    for one in made_from:
        share = "its weights, as a start" if one.records is None else f"{one.records:,} records"
        rows.append((one.role, one.name, one.access, share, ", ".join(one.instruments) or "nothing on file"))
    return ["## What it was made from", _table(("what", "which", "reached through", "used in training", "under"), rows)]


def _licence(release: Release) -> list[str]:
    licence = release.licence
    about = f"Licence: {licence.licence}." if licence.family is None else f"Licence: {licence.licence}, see LICENSE ({licence.why})."
    return [
        "## Licence and terms",
        about,
        *release.terms,
        "Notices are in NOTICE, texts of licences in LICENSES, and every duty with the place where it is met in obligations.md. This is not legal advice.",
    ]


def _terms(report: Report) -> list[str]:
    terms = report.provenance.terms
    obligations = "\n".join(f"- obligation: {_one_line(str(one))}" for one in terms["obligations"] or ())
    about = f"Terms of the teacher: {terms['licence']}, verdict {report.provenance.verdict}. This is not legal advice."
    return [about, obligations] if obligations else [about]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _figure(number: Maybe) -> str:
    if isinstance(number, Absent):
        return f"not measured: {number.absent}"
    interval = f" [{number.low:.4f}, {number.high:.4f}], n = {number.n}" if number.low is not None and number.high is not None else ""
    return f"{number.value:.4f}{interval}"
