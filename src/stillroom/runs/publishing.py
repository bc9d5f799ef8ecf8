"""Publishing: the last gate. Decides anew, finds what reached the weights, and writes and checks what the student must carry when it is given away.

Beside the student's weights it writes README.md (the model card), NOTICE, LICENSE, LICENSES/*.txt and obligations.md, reads them back, and holds every
duty to them. docs/reference/publishing.md has them field by field. Needs no torch; the same run and terms give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stillroom.core import clock, durable
from stillroom.core.cards import cached_snapshot, is_hub_id
from stillroom.core.errors import EntitlementError, LedgerError, RecipeError, RunError
from stillroom.core.identities import Json
from stillroom.data import TransferSet
from stillroom.entitlement.library import Applied, Catalogue, Source
from stillroom.entitlement.obligations import (
    CHECKLIST,
    LICENSE,
    NOTICE,
    README,
    Artefact,
    Conflict,
    Item,
    LicenceProposal,
    Owed,
    account,
    artefacts,
    conflicts,
    is_template,
    licence_file,
    propose_licence,
    ticked,
    union,
    verdicts_by_source,
)
from stillroom.entitlement.store import TermsStore
from stillroom.entitlement.verdict import Circumstances, Verdict
from stillroom.ledger import Ledger, verify_ledger
from stillroom.runs.card import MadeFrom, Release, student_card
from stillroom.runs.directory import Run
from stillroom.runs.entitling import entitled, permissions_of, sources_of, use_of
from stillroom.runs.gates import Gates
from stillroom.runs.observer import Observer, Silent
from stillroom.runs.recipe import Recipe

_TEXTS = Path(__file__).parents[1] / "entitlement" / "texts"
# Licence ids that the hub knows; any other licence is "other" with a name and a link.
_HUB_LICENCES = tuple(
    "apache-2.0 mit cc-by-nc-4.0 cc-by-sa-4.0 cc-by-nc-sa-4.0 llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma grok2-community openmdw-1.0".split()
)
_LICENCE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
_NOTICE_NAMES = ("NOTICE", "NOTICE.txt", "NOTICE.md", "Notice")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A student's account: each duty and conflict with whether it is met, the licence proposed, and the files that are there."""

    directory: Path
    name: str
    licence: LicenceProposal
    items: tuple[Item, ...]
    files: tuple[str, ...]

    @property
    def unmet(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if not item.met)


def publish(directory: Path, *, recipe: Recipe | None = None, observer: Observer | None = None) -> Published:
    """Writes what the student of the run in `directory` must carry, and checks that all of it is there.

    `recipe`, where given, is the run's own with another `intent`: a name or a release that was settled after the run. Raises EntitlementDenied or
    EntitlementUnknown where the terms of today do not allow the use, RecipeError where the intent releases nothing, and EntitlementError
    'obligations-unmet' where something is missing: what could be written then is.
    """
    run = _run(directory, recipe)
    with durable.full_disk_reported(run.directory), run.locked():
        records = TransferSet.load(run.transfer_set_path).ids
        verdict = Gates(run, observer or Silent()).admit(records, Ledger.open(run.directory))
        case = _case_of(run, verdict)
        _write(case)
        published = _held(case)
    _require_met(published)
    return published


def check(directory: Path, *, recipe: Recipe | None = None) -> Published:
    """The account as the files are now; writes nothing and raises for no unmet duty. Raises like `publish` otherwise."""
    run = _run(directory, recipe)
    return _held(_case_of(run, entitled(run.recipe)))


def _run(directory: Path, recipe: Recipe | None) -> Run:
    run = Run.open(directory)
    if recipe is not None:
        run = Run(run.directory, _with_intent_of(run, recipe))
    release = run.recipe.intent.release
    if release in (None, "none"):
        raise RecipeError(
            "recipe-invalid",
            found=f"`intent.release` is {release or 'not stated'}",
            expected="internal, hosted or weights: who will be able to use the student",
            why="what a student must carry depends on whom it is given to",
            do="Say so in a copy of the run's recipe.json, under `intent`, and hand that in: stillroom publish DIR --recipe FILE",
        )
    run.require("reported", "report")
    return run


def _with_intent_of(run: Run, recipe: Recipe) -> Recipe:
    settled = run.recipe.model_copy(update={"intent": recipe.intent})
    if settled != recipe:
        raise RunError(
            "run-other-recipe",
            found=f"a recipe that differs from that of {run.directory} in more than its intent",
            expected="the recipe of the run, with another intent",
            why="the student was made by the recipe in its directory and no other",
            do="Copy the run's recipe.json and change `intent` alone.",
        )
    return settled


# --- what the student was made from -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """Everything that decides what is written."""

    run: Run
    name: str
    verdict: Verdict
    store: TermsStore
    catalogue: Catalogue
    made_from: tuple[MadeFrom, ...]
    applied: Mapping[str, tuple[Applied, ...]]
    """What applies to each source that was used, what it was made from included."""
    duties: tuple[Owed, ...]
    conflicts: tuple[Conflict, ...]
    licence: LicenceProposal

    @property
    def hosted(self) -> bool:
        return self.run.recipe.intent.release == "hosted"

    def put(self, file: str) -> list[Artefact]:
        """What duties put into a file as lines, in the order of the duties."""
        found = (one for duty in self.duties for one in artefacts(duty, hosted=self.hosted))
        return [one for one in found if one.file == file and one.how == "line"]

    def lines(self, file: str) -> list[str]:
        """Their exact texts, each once."""
        return list(dict.fromkeys(one.text for one in self.put(file)))


def _case_of(run: Run, verdict: Verdict) -> _Case:
    recipe, store, today = run.recipe, TermsStore.open(), clock.now().date()
    catalogue, use = store.catalogue(), use_of(recipe)
    sources = sources_of(recipe)
    used = _used(run, sources)
    names = [one.name for one in used]
    circumstances = Circumstances(today=today, confirmations=store.confirmations(), authorisations=permissions_of(recipe)[0])
    judged = verdicts_by_source(sources, use, catalogue, circumstances)
    brought = {(one.record, one.clause) for found in judged.values() for one in found.obligations}
    assert {(one.record, one.clause) for one in verdict.obligations} <= brought, "a duty of the verdict that no source brings"
    verdicts = {name: judged[name] for name in names}
    duties = union({name: found.obligations for name, found in verdicts.items()}, names)
    applied = {name: catalogue.applying([source for source in sources if source.name == name], today)[0] for name in names}
    inside = use.facts["method"] in ("logits", "hidden", "weights")
    derived_from = [
        one.record
        for found in applied.values()
        for one in found
        if one.record.kind == "licence" and (one.source.role == "base" or (one.source.role == "teacher" and inside))
    ]
    return _Case(
        run=run,
        name=" ".join((recipe.intent.student_name or recipe.name).split()),
        verdict=verdict,
        store=store,
        catalogue=catalogue,
        made_from=tuple(replace(one, instruments=tuple(sorted({found.record.id for found in applied[one.name]}))) for one in used),
        applied=applied,
        duties=duties,
        conflicts=conflicts(verdicts, use.facts),
        licence=propose_licence(duties, use.facts, derived_from),
    )


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where records came from, as the ledger has it."""

    teacher: str
    teacher_kind: str
    revision: str | None
    weights_sha256: str | None
    prompts: str

    @classmethod
    def of(cls, entry: Json) -> _Origin:
        teacher = entry["teacher"]
        return cls(teacher["source"], teacher["kind"], teacher["revision"], teacher["weights_sha256"], entry["prompt_source"]["name"])

    def is_of(self, source: Source, recipe: Recipe) -> bool:
        """Whether records of this origin came from `source`."""
        match source.role:
            case "teacher":
                return self.teacher == (Path(recipe.teacher.source).name if self.teacher_kind == "directory" else recipe.teacher.source)
            case "dataset":
                return recipe.prompts.dataset != source.name or self.prompts == source.name
            case _:
                return False


def _used(run: Run, sources: Sequence[Source]) -> list[MadeFrom]:
    """Sources of which something reached the weights: the base; a teacher and a dataset where a record that was trained on names them.

    Of datasets that the recipe only names in its terms each counts: the ledger cannot tell their records apart.
    """
    trained = _trained_on(run)
    found = []
    for source in sources:
        origins = [origin for origin in trained if origin.is_of(source, run.recipe)]
        if source.role != "base" and not origins:
            continue
        teacher = origins[0] if source.role == "teacher" else None
        found.append(
            MadeFrom(
                role=source.role,
                name=source.name,
                access=source.access,
                records=None if source.role == "base" else sum(trained[origin] for origin in origins),
                revision=teacher.revision if teacher is not None else None,
                weights_sha256=teacher.weights_sha256 if teacher is not None else None,
                licence=source.licence,
            )
        )
    return found


def _trained_on(run: Run) -> Counter[_Origin]:
    """How many records reached the weights, by origin; at least one. Raises LedgerError where the ledger does not verify or has none."""
    path = run.directory / "ledger.jsonl"
    verify_ledger(path)
    collected: dict[str, _Origin] = {}
    once: dict[_Origin, _Origin] = {}
    found: Counter[_Origin] = Counter()
    for line in durable.read_lines(path):
        tree: Json = json.loads(line)
        entry = tree["entry"]
        if entry["stage"] == "collect":
            origin = _Origin.of(entry)
            collected[tree["hash"]] = once.setdefault(origin, origin)
        elif entry["stage"] == "train":
            found[collected[entry["collected"]]] += 1
    if not found:
        raise LedgerError(
            "ledger-unknown-record",
            found=f"no record in {path} that was trained on",
            expected="the records that the student learned from",
            why="a student of unknown origin cannot be given away",
            do="Restore the ledger from a copy, or run again in a new directory.",
        )
    return found


# --- texts ------------------------------------------------------------------------------------------------------------------------------


def _licence_texts(case: _Case) -> dict[str, bytes]:
    """The text of each licence that a copy is owed of, or that the student is put under; by path. What is not to be had is left out."""
    wanted = {duty.family: duty.record for duty in case.duties if duty.duty == "licence-copy"}
    if case.licence.copied and case.licence.family is not None:
        latest = next((one.id for one in reversed(case.catalogue.versions(case.licence.family))), "")
        wanted.setdefault(case.licence.family, case.licence.record or latest)
    found = {}
    for family, record in sorted(wanted.items()):
        path = licence_file(family)
        text = _licence_text(case, family, record, case.run.student_path / path)
        if text is not None:
            found[path] = text
    return found


def _licence_text(case: _Case, family: str, record: str, there: Path) -> bytes | None:
    """What came with the weights, else what the user confirmed, else ours, else what is there already: whoever put it there had it from somewhere."""
    shipped = _TEXTS / f"{family}.txt"
    candidates = (
        *(text for name, directory in _directories(case) if _is_under(case, name, family) for text in _beside(directory, _LICENCE_NAMES)),
        case.store.text_of(record),
        shipped.read_bytes() if shipped.exists() else None,
        there.read_bytes() if there.exists() else None,
    )
    texts = [text for text in candidates if text is not None and text.strip()]
    # A template without its copyright line is a last resort.
    return next((text for text in texts if not is_template(text.decode(errors="replace"))), texts[0] if texts else None)


def _is_under(case: _Case, name: str, family: str) -> bool:
    """Whether a source's own weights are under that licence and no other, so that the licence beside them is this one."""
    licences = {one.record.family for one in case.applied[name] if one.source.name == name and one.record.kind == "licence"}
    return licences == {family}


def _directories(case: _Case) -> Iterator[tuple[str, Path]]:
    """Where the weights of teacher and base are on this machine, by the source's name."""
    recipe = case.run.recipe
    models = {"teacher": (recipe.teacher.model, recipe.teacher.revision), "base": (recipe.student.model, recipe.student.revision)}
    for one in case.made_from:
        model, revision = models.get(one.role, (None, None))
        if model is None:
            continue
        directory = Path(model).expanduser()
        snapshot = cached_snapshot(model, revision) if not directory.is_dir() and is_hub_id(model) else directory
        if snapshot is not None and snapshot.is_dir():
            yield one.name, snapshot


def _beside(directory: Path, names: Iterable[str]) -> Iterator[bytes]:
    for name in names:
        try:
            yield (directory / name).read_bytes()
        except OSError:
            continue


# --- the files --------------------------------------------------------------------------------------------------------------------------


def _write(case: _Case) -> None:
    """Every file that can be written; the account last, since it tells of the others."""
    student = case.run.student_path
    texts = _licence_texts(case)
    for path, text in (
        *texts.items(),
        (LICENSE, _license(case)),
        (NOTICE, _notice(case).encode()),
        (README, student_card(case.run.report, _release(case), adapter=case.run.recipe.student.saves_adapter).encode()),
    ):
        (student / path).parent.mkdir(exist_ok=True)
        durable.write_bytes_atomic(student / path, text)
    done = ticked(_read(student / CHECKLIST))
    durable.write_bytes_atomic(student / CHECKLIST, _account_page(case, _held(case), done).encode())


def _license(case: _Case) -> bytes:
    licence = case.licence
    if licence.family is not None and not licence.copied:
        return (_TEXTS / f"{licence.family}.txt").read_bytes()
    if licence.family is None:
        return f"Nobody outside is given a licence for {case.name}: {licence.why}.\n".encode()
    paragraphs = [
        f"Licence of {case.name}: {licence.licence}",
        *case.lines(LICENSE),
        f"The text of the licence is in {licence_file(licence.family)}, and at {licence.url}",
    ]
    return ("\n\n".join(paragraphs) + "\n").encode()


def _notice(case: _Case) -> str:
    made_from = [f"- {one.role} {one.name}: {', '.join(one.instruments) or 'nothing on file'}" for one in case.made_from]
    paragraphs = [case.name, "Made by distillation with Stillroom from\n" + "\n".join(made_from), *case.lines(NOTICE)]
    owing = {source for duty in case.duties if duty.duty == "notice-file" for source in duty.sources}
    for name, directory in _directories(case):
        if name in owing:
            paragraphs += [f"The notice that came with {name}:\n\n{_text(one).strip()}" for one in _beside(directory, _NOTICE_NAMES)]
    return "\n\n".join(dict.fromkeys(paragraphs)) + "\n"


def _release(case: _Case) -> Release:
    shown = [one.text for one in case.put(README) if one.duty == "display"]
    reused = next((one.name for one in case.made_from if one.role == "base"), None)
    if case.run.recipe.student.from_teacher is not None:
        reused = next(one.name for one in case.made_from if one.role == "teacher")
    return Release(
        name=case.name,
        licence=case.licence,
        hub_licence=_hub_licence(case),
        base_model=reused if reused is not None and is_hub_id(reused) else None,
        made_from=case.made_from,
        shown=tuple(dict.fromkeys(shown)),
        served=any("service" in duty.flows_to for duty in case.duties if duty.duty == "display"),
        terms=tuple(line for line in case.lines(README) if line not in shown),
    )


def _hub_licence(case: _Case) -> dict[str, str]:
    """The keys that the hub reads: an id that it knows, or `other` with a name and a link."""
    licence = case.licence
    if licence.family is None:
        return {"license": "other", "license_name": "not-licensed", "license_link": LICENSE}
    known = next((name for name in _HUB_LICENCES if case.catalogue.licence_family(name) == licence.family or name == licence.family), None)
    if known is not None and not licence.restrictions:
        return {"license": known}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence.licence.lower()).strip("-"), "license_link": LICENSE}


def _account_page(case: _Case, published: Published, done: frozenset[str]) -> str:
    """obligations.md: what is owed to whom, where it is met, and what a person must see to and tick."""
    unmet = published.unmet
    lines = [
        f"# Obligations of {case.name}",
        f"{len(published.items) - len(unmet)} of {len(published.items)} met. Written by `stillroom publish`, which keeps the ticks below. "
        "This is not legal advice.",
        f"Decision {case.verdict.sha256}, catalogue of terms of {case.verdict.catalogue}. The use: {'; '.join(case.verdict.facts)}.",
    ]
    if unmet:
        lines += ["## Not met", "\n".join(f"- {item.what}. {item.do}" for item in unmet)]
    lines += _licence_section(case)
    lines += ["## Duties"] if case.duties else []
    for item in published.items:
        if item.owed is not None:
            lines += _duty_section(item, item.owed)
    boxes = [one.text for item in published.items for one, _ in item.artefacts if one.how == "tick"]
    if boxes:
        lines += ["## To be seen to by a person", "\n".join(f"- [{'x' if text in done else ' '}] {text}" for text in dict.fromkeys(boxes))]
    return "\n\n".join(lines) + "\n"


def _licence_section(case: _Case) -> list[str]:
    licence = case.licence
    data = [f"For the transfer set, where it is published: {licence.data}."] if licence.data is not None else []
    rejected = "\n".join(f"- {one.licence}: not proposed, because {one.why}" for one in licence.rejected)
    return ["## Licence", f"Proposed: {licence.licence}, because {licence.why}.", *data, rejected]


def _duty_section(item: Item, owed: Owed) -> list[str]:
    told = [
        f"- asked by {owed.title} ({owed.cited}, {owed.url}), for {', '.join(owed.sources)}",
        f"- which says: {owed.says}",
        *([f"- only if {owed.condition}"] if owed.condition is not None else []),
        *(f"- {'present' if there else 'missing'} in {one.file}, {one.where}: {' '.join(one.text.split())}" for one, there in item.artefacts),
    ]
    return [f"### {owed.duty}: {'met' if item.met else 'not met'}", "\n".join(told)]


# --- reading back -----------------------------------------------------------------------------------------------------------------------


def _held(case: _Case) -> Published:
    """The account over the files as they are on disk."""
    student = case.run.student_path
    wanted = [README, NOTICE, LICENSE, CHECKLIST, *(path.relative_to(student).as_posix() for path in sorted(student.glob("LICENSES/*.txt")))]
    files = {name: text for name in wanted if (text := _read(student / name))}
    return Published(
        directory=student,
        name=case.name,
        licence=case.licence,
        items=account(case.duties, case.conflicts, case.licence, files, hosted=case.hosted),
        files=tuple(files),
    )


def _require_met(published: Published) -> None:
    unmet = published.unmet
    if unmet:
        each = "\n".join(f"    - {item.what}. {item.do}" for item in unmet)
        raise EntitlementError(
            "obligations-unmet",
            found=f"{len(unmet)} of {len(published.items)} not met:\n{each}",
            expected="every duty met",
            why="a student that does not carry what its sources ask for may not be given away",
            do=f"See to each as it says there, and publish again; {published.directory / CHECKLIST} has all of them.",
        )


def _read(path: Path) -> str:
    try:
        return _text(path.read_bytes())
    except OSError:
        return ""


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n")
