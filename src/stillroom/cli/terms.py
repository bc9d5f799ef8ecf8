"""`stillroom terms ...`: what is on file, the user's own terms, and the verdict on a recipe."""

from __future__ import annotations

import gc
import getpass
import json
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillroom.cli.later import Later
from stillroom.core import clock, durable
from stillroom.core.errors import EntitlementError, RunError
from stillroom.entitlement import documents
from stillroom.entitlement.library import CATALOGUE_DATE, Catalogue, builtin
from stillroom.entitlement.records import GRADES, Record, Subject
from stillroom.entitlement.search import search as search_catalogue
from stillroom.entitlement.store import TermsStore, record_named, standing
from stillroom.entitlement.verdict import Confirmation, Outcome, Verdict

if TYPE_CHECKING:
    from stillroom.runs import entitling
    from stillroom.runs import recipe as recipes
else:
    entitling = Later("stillroom.runs.entitling")
    recipes = Later("stillroom.runs.recipe")

app = typer.Typer(
    name="terms",
    help="What licences and terms say about learning from a model: look it up, add your own, confirm a text, ask about a recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

EXIT_CODES: dict[Outcome, int] = {"allow": 0, "allow-with-obligations": 3, "deny": 4, "unknown": 5}
_WIDEST = 120

IdArgument = Annotated[
    str, typer.Argument(metavar="ID", help="A record, as `terms list` names it; a family or licence id stands for its version in force.")
]


@app.command("list")
def list_() -> None:
    """List every record: id, kind, provider, date in force, evidence grade, and whether it can be relied on today.

    Standing: fixed (never changes), confirmed until a day, needs confirming, stale (past its review), cannot allow (evidence too weak).
    """
    store = TermsStore.open()
    catalogue, confirmations, today = store.catalogue(), store.confirmations(), clock.now().date()
    rows = [("record", "kind", "provider", "in force", "grade", "standing today")]
    for name, record in sorted(catalogue.records.items()):
        notes = [standing(record, confirmations.get(name), today)]
        notes += [f"until {record.superseded}"] if record.superseded is not None else []
        notes += ["yours"] if name in catalogue.own else []
        rows.append((name, record.kind, record.provider, documents.in_force_since(record), record.evidence.grade, "; ".join(notes)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        _print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    _print("", *(f"{grade}  {meaning}" for grade, meaning in GRADES.items()))
    _print(f"catalogue of {CATALOGUE_DATE}; your own terms: {store.directory}")


@app.command()
def show(record: IdArgument) -> None:
    """Show one record: what it says clause by clause, where in the text, and how well that is founded."""
    store = TermsStore.open()
    catalogue, today = store.catalogue(), clock.now().date()
    found = record_named(record, catalogue, today)
    confirmation = store.confirmations().get(found.id)
    _print(documents.record_markdown(found), "")
    _print(f"Standing on {today}: {standing(found, confirmation, today)}.")
    if confirmation is not None:
        _print(f"Confirmed on {confirmation.confirmed_on} by {confirmation.confirmed_by}; SHA-256 of that text: {confirmation.text_sha256}.")
    others = [other.id for other in catalogue.versions(found.family) if other.id != found.id]
    if others:
        _print(f"Other versions: {', '.join(others)}.")


@app.command()
def search(words: Annotated[list[str], typer.Argument(metavar="WORDS", help="A model, a licence id, or words of a title or a clause.")]) -> None:
    """Find records, licence ids and models: `terms search llama3.1`, `terms search Qwen/Qwen2.5-72B-Instruct`."""
    catalogue, today = TermsStore.open().catalogue(), clock.now().date()
    found = search_catalogue(" ".join(words), catalogue)
    if not found.anything:
        _print(f"Nothing on file of {' '.join(words)}. Where you know the terms, add a record: stillroom terms add FILE")
        return
    for name, family in found.licences:
        _print(f"{name} stands for {family}: {_in_force(family, catalogue)}")
        under = [", ".join(entry.names) for entry in catalogue.subjects if family in entry.instruments]
        _print(*(f"  {names} comes under it" for names in under))
    for entry in found.subjects:
        _print(*_subject_lines(entry, catalogue))
    exact = bool(found.licences or found.subjects)
    if found.records and (not exact or found.matched == len(found.words)):
        _print(f"records with {'all' if found.matched == len(found.words) else f'{found.matched} of {len(found.words)}'} of: {' '.join(found.words)}")
        width = max(len(record.id) for record in found.records)
        for record in found.records:
            current = record in catalogue.in_force(record.family, today)
            _print(f"  {record.id.ljust(width)}  {record.title}{'' if current else ' (not in force)'}")


@app.command()
def validate(file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file of records, models, aliases or authorisations.")]) -> None:
    """Check a file of your own: its form, and that it fits what is on file. What is wrong is told with its line."""
    found = TermsStore.open().validated(file)
    lists = {name: getattr(found, name) for name in type(found).model_fields}
    _print(f"{file} is sound. It has {', '.join(f'{name}: {len(part)}' for name, part in lists.items() if part)}.")


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A record, or a family; the same family twice: its last two versions.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
) -> None:
    """Compare two records, or two versions of one, clause by clause."""
    catalogue, today = TermsStore.open().catalogue(), clock.now().date()
    one, other = record_named(before, catalogue, today), record_named(after, catalogue, today)
    if one is other:
        versions = catalogue.versions(one.family)
        if before in catalogue.records or len(versions) < 2:
            raise EntitlementError(
                "terms-missing",
                found=f"{before} and {after} are both {one.id}",
                expected="two records",
                do=f"On file of {one.family}: {', '.join(version.id for version in versions)}.",
            )
        one, other = versions[-2:]
    _print(documents.difference_markdown(one, other))


@app.command()
def add(file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file of records, models or aliases.")]) -> None:
    """Add a file of your own records; one with the id of ours takes its place."""
    store = TermsStore.open()
    ids = store.add(file)
    ours = sorted(set(ids) & set(builtin().records))
    _print(f"Added to {store.directory}: {', '.join(ids) or 'no records, and what else the file holds'}.")
    if ours:
        _print(f"In place of ours: {', '.join(ours)}.")


@app.command()
def confirm(
    record: IdArgument,
    file: Annotated[Path, typer.Option("--file", metavar="TEXT", help="The text as you read it, saved to a file; a copy is kept for you alone.")],
    by: Annotated[str | None, typer.Option("--by", metavar="NAME", help="Who has read it; by default your login name.")] = None,
) -> None:
    """Confirm that you have read the text that a record was written from, and that it still says so."""
    store = TermsStore.open()
    catalogue, today = store.catalogue(), clock.now().date()
    found = record_named(record, catalogue, today)
    earlier = store.confirmations().get(found.id)
    confirmation = store.confirm(found.id, file, by if by is not None else _login(), today)
    _print(f"{found.id}: confirmed by {confirmation.confirmed_by} on {confirmation.confirmed_on}; it holds until {confirmation.review_by}.")
    _print(f"SHA-256 {confirmation.text_sha256}, kept in {store.directory}.", *_compared(found, earlier, confirmation))


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print decision.json instead of a page.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the decision there, as a Markdown document.")] = None,
) -> None:
    """Say whether a recipe's teacher may be learned from. Exit code 0: yes; 3: yes, with obligations; 4: no; 5: not known, and what to answer."""
    found = recipes.Recipe.from_yaml(recipe)
    verdict = entitling.decide_recipe(found)
    if out is not None:
        _write(out, documents.decision_markdown(verdict, name=found.name))
    if as_json:
        _print(json.dumps(verdict.as_json(), ensure_ascii=False, sort_keys=True, indent=2))
    else:
        _print(*decision_lines(verdict, _width()))
    # The process ends here: what is there need not be looked through for cycles once more, which takes a tenth of the whole command.
    gc.freeze()
    raise typer.Exit(EXIT_CODES[verdict.outcome])


# --- how it looks -----------------------------------------------------------------------------------------------------------------------

_OUTCOMES: dict[Outcome, str] = {
    "allow": "ALLOWED, with nothing to do for it",
    "allow-with-obligations": "ALLOWED, as long as the obligations are kept",
    "deny": "NOT ALLOWED",
    "unknown": "NOT KNOWN, which counts as not allowed",
}


def decision_lines(verdict: Verdict, width: int) -> list[str]:
    """A decision on a screen of this width; the question, where there is one, comes last."""
    lines = [_OUTCOMES[verdict.outcome], ""]
    for reason in verdict.reasons:
        where = ", ".join(part for part in (reason.title and f"{reason.title} ({reason.date})", reason.locator) if part)
        lines += _labelled("because", f"{where or reason.source}: {documents.STANDINGS[reason.standing]}", width)
        lines += _labelled("", reason.says, width)
        about = [f"about {reason.source}, {documents.ROLES.get(reason.role, reason.role)}"]
        about += [f"facts: {'; '.join(reason.facts)}"] if reason.facts else []
        lines += _labelled("", "; ".join(about), width)
        if reason.cited:
            lines += _labelled("", f"{reason.cited}; {reason.grade}; {reason.url}", width)
    for label, texts in (
        ("obligation", [obligation.line for obligation in verdict.obligations]),
        ("changed by", verdict.changed_by),
        ("instead", [", ".join(verdict.alternatives)] if verdict.alternatives else []),
        ("facts", ["; ".join(verdict.facts)]),
        ("asserted", [f"{one.fact} is {'true' if one.value else 'false'}, by {one.asserted_by}: {one.why}" for one in verdict.assertions]),
        ("warning", verdict.warnings),
    ):
        for text in texts:
            lines += _labelled(label, text, width)
    told = f"of {documents.age(verdict.catalogue, clock.now().date())} The decision is {verdict.sha256[:12]}. {documents.NOT_ADVICE}"
    lines += ["", *_labelled("catalogue", told, width)]
    if verdict.question is not None:
        lines += ["", *_labelled("question", verdict.question, width)]
    return lines


def _labelled(label: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), width, initial_indent=f"{label:<12}", subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False
    )


def _subject_lines(entry: Subject, catalogue: Catalogue) -> list[str]:
    lines = [f"{entry.what} {', '.join(entry.names)} of {entry.provider} (evidence {entry.evidence.grade}: {entry.evidence.source})"]
    lines += [f"  comes under {family}: {_in_force(family, catalogue)}" for family in entry.instruments]
    lines += [] if entry.instruments else ["  comes under no licence on file; the terms of whoever serves it apply"]
    lines += [f"  made from {', '.join(entry.made_from)}"] if entry.made_from else []
    lines += [f"  note: {flag.replace('-', ' ')}" for flag in entry.flags]
    return lines + ([f"  {' '.join(entry.notes.split())}"] if entry.notes else [])


def _in_force(family: str, catalogue: Catalogue) -> str:
    today = clock.now().date()
    current = [record.id for record in catalogue.in_force(family, today)]
    earlier = [record.id for record in catalogue.versions(family) if record.id not in current]
    return (", ".join(current) or "none in force") + (f" (other versions: {', '.join(earlier)})" if earlier else "")


def _compared(record: Record, earlier: Confirmation | None, confirmation: Confirmation) -> Sequence[str]:
    """What the digest of the text tells, beside the record's and beside the last one's."""
    lines = []
    if record.text_sha256 == confirmation.text_sha256:
        lines.append("It is the text that the record was written from: the digests are the same.")
    elif record.text_sha256 is not None:
        lines.append(
            f"It is NOT the text that the record was written from ({record.text_sha256}): nothing is allowed on it. Read what changed and add a record "
            f"of this version: stillroom terms add FILE"
        )
    else:
        lines.append("The record has no digest of its text to compare with: that it says so rests on your reading.")
    if earlier is not None and earlier.text_sha256 != confirmation.text_sha256:
        lines.append(f"It differs from the text that {earlier.confirmed_by} confirmed on {earlier.confirmed_on} ({earlier.text_sha256}).")
    return lines


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:  # a user without a name, as in some containers
        raise EntitlementError("terms-invalid", found="no login name", expected="the name of who confirms", do="Give it with --by NAME.") from error


def _write(path: Path, text: str) -> None:
    try:
        durable.write_bytes_atomic(path, text.encode())
    except OSError as error:
        raise RunError(
            "run-not-a-run", found=f"{path} cannot be written: {error.strerror}", expected="the path of a file", do="Choose another --out."
        ) from error


def _width() -> int:
    return min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST)


def _print(*lines: str) -> None:
    for line in lines:
        # What a file brings in does not act on the terminal.
        typer.echo(documents.printable(line.rstrip("\n")))
