"""What `stillroom probe` and `stillroom requests` do: they ask or read, and print. Loads no torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import typer
from pydantic import ValidationError
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from stillroom.cli import view
from stillroom.collect.machines import merge_stores
from stillroom.collect.spend import Amount, PriceList, Spend, in_units
from stillroom.collect.store import Counts, RequestStore
from stillroom.collect.wire import Endpoint, Route
from stillroom.core.errors import RecipeError, RequestStoreError
from stillroom.data.words import shortened
from stillroom.runs.endpoints import store_of
from stillroom.runs.probing import Probed, Wanted, probe_endpoint, token_index
from stillroom.runs.recipe import Recipe, TermsSection

_STYLES = {"proved": "green", "refuted": "red", "not-supported": "yellow", "not-tested": "dim"}


class Options(NamedTuple):
    """What the command line says of whom to ask, on what terms, and for how much."""

    url: str
    model: str
    route: Route
    key_variable: str | None
    allow_http: bool
    access: str | None
    licence: str | None
    recipe: Path | None
    prices: Path | None
    max_tokens: int | None
    max_money: str | None
    store: Path
    tokenizer: Path | None


def probe(options: Options, context_test: int | None, again: bool, as_json: bool) -> None:
    """Probes, or reads what was found before, and prints the report."""
    _require_access(options.access)
    endpoint = Endpoint.parse(options.url, options.model, route=options.route, key_variable=options.key_variable, allow_http=options.allow_http)
    recipe = Recipe.from_yaml(options.recipe) if options.recipe is not None else None
    wanted = Wanted(
        overflow_tokens=context_test,
        index=token_index(options.tokenizer) if options.tokenizer is not None else None,
        prices=PriceList.from_yaml(options.prices) if options.prices is not None else None,
        max_tokens=options.max_tokens,
        max_money=options.max_money,
        again=again,
    )
    with view.Screen(Console(stderr=True)) as screen:
        probed = probe_endpoint(endpoint, options.store, wanted, access=options.access, licence=options.licence, recipe=recipe, observer=screen)
        for warning in probed.warnings:
            screen.note(warning)
    if as_json:
        print(json.dumps(probed.to_json(), indent=2))
    else:
        Console().print(probe_page(probed))


def requests(path: Path, explain: str | None, as_json: bool) -> None:
    """Prints the account of a store, or what is known of one call."""
    if not os.path.isfile(path):  # of a path that no file can have, too
        raise RequestStoreError(
            "request-store-other", found=f"no file {path}", expected="a request store", do="Name the file that --store named, or look for *.sqlite."
        )
    with RequestStore.open(path, read_only=True) as store:
        if explain is not None:
            _explain(store, explain, as_json)
            return
        counts, spend = store.counts(), store.spend()
    if as_json:
        print(json.dumps({"rows": asdict(counts), "spend": _spend_json(spend)}, indent=2))
    else:
        Console().print(requests_page(counts, spend))


def explain(recipe: Path, out: Path, key: str) -> None:
    """Prints what is known of a call of a run; asks nobody. Raises RecipeError for a teacher that is not asked, RequestStoreError where there is no store."""
    read = Recipe.from_yaml(recipe)
    place = store_of(read, out)
    if read.teacher.endpoint is None or place is None:
        raise RecipeError(
            "recipe-invalid",
            found=f"--explain, and a teacher in {recipe} whose weights are here",
            expected="teacher.endpoint",
            do="Leave --explain out: such a teacher makes no calls.",
        )
    requests(place, key, as_json=False)


def merge(stores: list[Path], into: Path) -> bool:
    """Merges, and prints what was new and the account; whether no answers differed."""
    merged = merge_stores(stores, into)
    with RequestStore.open(into, read_only=True) as store:
        counts, spend = store.counts(), store.spend()
    console = Console()
    new = f"{merged.rows:,} rows, {merged.answers:,} answers, {merged.attempts:,} attempts and {len(merged.shards):,} files of log-probabilities are new"
    console.print(f"{into}: {new}", soft_wrap=True, highlight=False, markup=False)
    console.print(requests_page(counts, spend))
    if merged.conflicts:
        first = merged.conflicts[0]
        error = RequestStoreError(
            "request-stores-differ",
            found=f"{len(merged.conflicts):,} differences; the first is of the {first.what} to {first.of}: {shortened(first.here, 80)!r} here, {shortened(first.there, 80)!r} there",
            expected="machines that bought different calls",
            why=f"{into} has everything else of these stores, keeps its own where they differ, and counts what both paid",
            do="Go on with it; or give each machine a range of its own (--shard I/N) in new stores.",
        )
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
    return not merged.conflicts


def _explain(store: RequestStore, key: str, as_json: bool) -> None:
    try:
        found = store.explain(key)
    except ValueError as error:
        raise typer.BadParameter(f"{error}; a key is up to 64 hexadecimal digits", param_hint="--explain") from None
    if found is None:
        raise typer.BadParameter(f"{store.path} has no call whose key begins with {key}", param_hint="--explain")
    print(json.dumps(asdict(found), indent=2) if as_json else found)


def _require_access(access: str | None) -> None:
    try:
        TermsSection(access="weights" if access is None else access)
    except ValidationError:
        raise typer.BadParameter(f"{access!r} is none of weights, api:PROVIDER, host:NAME, consumer:PROVIDER", param_hint="--access") from None


# --- how it looks -----------------------------------------------------------------------------------------------------------------------


def probe_page(probed: Probed) -> RenderableType:
    """Findings, what follows from them, and what it took."""
    report, spend, found = probed.report, probed.spend, probed.signal
    facts = _facts()
    facts.add_row("endpoint", Text(f"{probed.endpoint.model} at {probed.endpoint.base_url}, {probed.endpoint.route} route"))
    facts.add_row("terms", Text(_terms(probed)))
    findings = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("finding", "verdict", "evidence"):
        findings.add_column(name, header_style="bold", no_wrap=name != "evidence", overflow="fold")
    for finding in report.findings:
        verdict = Text(finding.verdict.replace("-", " "), style=_STYLES[finding.verdict])
        findings.add_row(finding.name, verdict, Text(finding.evidence + _asked(len(finding.calls))))
    result = _facts()
    kind = f"top_k with k = {found.k}, {found.reported} temperature" if found.kind == "top_k" else "text"
    result.add_row("signal", Text(f"{kind}: {found.why}"))
    answered = [("models", report.models), ("fingerprints", report.fingerprints), ("providers", report.providers)]
    for name, values in answered:
        if values:
            result.add_row(name, Text(", ".join(values)))
    result.add_row("calls", Text(_calls(probed)))
    if probed.sent:
        result.add_row("this probe", Text(f"{_amount(probed.spent, spend)} spent, {_amount(probed.reserved, spend)} reserved"))
    result.add_row("store", Text(f"{probed.store}: {_amount(spend.settled, spend)} spent, {_amount(spend.reserved, spend)} reserved in all"))
    return Group(facts, Text(""), findings, Text(""), result)


def requests_page(counts: Counts, spend: Spend) -> RenderableType:
    """Where the rows are, by reason, and the account."""
    rows = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column(justify="right")
    rows.add_column(overflow="fold")
    rows.add_row("requested", f"{counts.requested:,}", "rows; a probe's calls are none")
    rows.add_row("accepted", f"{counts.accepted:,}", "")
    for name, reasons in (("rejected", counts.rejected), ("failed", counts.failed)):
        rows.add_row(name, f"{sum(reasons.values()):,}", Text(", ".join(f"{why} {number:,}" for why, number in sorted(reasons.items()))))
    rows.add_row("pending", f"{counts.pending:,}", f"{counts.in_flight:,} under way, {counts.answered:,} answered and not judged")
    account = _facts()
    account.add_row("spent", _amount(spend.settled, spend))
    account.add_row(
        "reserved", f"{_amount(spend.reserved, spend)}; of {spend.attempts:,} attempts, {spend.unknown:,} may have been billed without our knowing"
    )
    account.add_row("cap", _cap(spend))
    if spend.projected_tokens is not None and counts.pending > counts.answered:
        projected, money = spend.projected_tokens, spend.projected_money
        more = "" if money is None else f", {money.value:.4g} {spend.currency} ({money.low:.4g} to {money.high:.4g})"
        told = f"{projected.value:,.0f} tokens more ({projected.low:,.0f} to {projected.high:,.0f}){more}, for rows that wait"
        account.add_row("projected", f"{told}; by {projected.n:,} answers")
    if spend.overruns:
        account.add_row("overruns", f"{spend.overruns:,} attempts cost more than their worst case")
    return Group(rows, Text(""), account)


def _facts() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _terms(probed: Probed) -> str:
    verdict = probed.verdict
    duties = f", {len(verdict.obligations)} obligations" if verdict.obligations else ""
    return f"{verdict.outcome.replace('-', ' ')}{duties}; decision {verdict.sha256[:12]}"


def _asked(calls: int) -> str:
    return f" [{calls} call{'s' if calls != 1 else ''}]" if calls else ""


def _calls(probed: Probed) -> str:
    if not probed.sent:
        return f"none now: {probed.report.calls} were made, the last on {probed.day}; --again makes them anew"
    told = f"{probed.report.calls} made, by {probed.sent} requests"
    return f"{told}; {probed.reused} had been bought before" if probed.reused else told


def _amount(amount: Amount, spend: Spend) -> str:
    money = f" ({in_units(amount.money).normalize():f} {spend.currency})" if spend.currency is not None else ""
    return f"{amount.tokens:,} tokens{money}"


def _cap(spend: Spend) -> str:
    caps = spend.caps
    parts = [f"{caps.tokens:,} tokens"] if caps.tokens is not None else []
    parts += [f"{in_units(caps.money).normalize():f} {spend.currency}"] if caps.money is not None else []
    return ", ".join(parts) or "none yet"


def _spend_json(spend: Spend) -> dict[str, object]:
    amounts = {
        name: {"tokens": amount.tokens, "money": str(in_units(amount.money))}
        for name, amount in (("settled", spend.settled), ("reserved", spend.reserved))
    }
    caps = {"tokens": spend.caps.tokens, "money": None if spend.caps.money is None else str(in_units(spend.caps.money))}
    return {**amounts, "caps": caps, "currency": spend.currency, "attempts": spend.attempts, "unknown": spend.unknown, "overruns": spend.overruns}
