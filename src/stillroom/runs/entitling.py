"""From a recipe to the verdict on it: what is learned from, for what use, on which day, on whose records. Reads model cards, loads no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

from stillroom.collect.providers import is_loopback
from stillroom.core import clock
from stillroom.core.cards import cached_snapshot, declared_licence, hub_id_of, is_hub_id
from stillroom.core.errors import ModelError, RecipeError
from stillroom.entitlement.facts import FACTS, FactValue
from stillroom.entitlement.library import CATALOGUE_DATE, Catalogue, Role, Source, written
from stillroom.entitlement.store import TermsStore, attached
from stillroom.entitlement.verdict import Assertion, Attached, Circumstances, Reason, Use, Verdict, decide, require
from stillroom.runs.plan import Terms
from stillroom.runs.recipe import IntentSection, Recipe, TermsSection

Method = Literal["text", "logprobs", "logits", "hidden", "weights"]


# --- what is learned from ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Named:
    """A source, and the licence that the recipe or an option gives it: the card's goes before it, and the two must not contradict each other."""

    source: Source
    stated: str | None
    stated_in: str

    @classmethod
    def of(cls, source: Source, card: str | None, card_name: str, stated: str | None, stated_in: str) -> _Named:
        licence, by = (card, card_name) if card is not None else (stated, stated_in if stated is not None else "")
        return cls(source=replace(source, licence=licence, declared_by=by), stated=stated, stated_in=stated_in)

    def contradicts(self, catalogue: Catalogue) -> bool:
        if self.stated is None or self.source.licence is None or written(self.stated) == written(self.source.licence):
            return False
        families = [catalogue.licence_family(name) for name in (self.stated, self.source.licence)]
        return families[0] != families[1] or families[0] is None


def sources_of(recipe: Recipe) -> tuple[Source, ...]:
    """The teacher, the student's base where it is a model, and the datasets. A licence is that of the card, where there is one here that tells."""
    return tuple(named.source for named in _named(recipe))


def _named(recipe: Recipe) -> Iterator[_Named]:
    terms = recipe.terms
    if recipe.teacher.endpoint is not None:
        # Nothing here tells what is behind an endpoint: it is looked up by the name that it is asked by, and has no card.
        source = Source(name=terms.model or recipe.teacher.source, access=terms.access, role="teacher", generated_on=terms.generated_on)
        yield _Named.of(source, None, "", terms.licence, "terms.licence")
    else:
        yield _model(
            recipe.teacher.source, recipe.teacher.revision, terms.model, terms.licence, "teacher", access=terms.access, day=terms.generated_on
        )
    if recipe.student.model is not None:
        yield _model(recipe.student.model, recipe.student.revision, terms.base_model, terms.base_licence, "base")
    licences = {dataset.name: dataset.licence for dataset in terms.datasets}
    for name in dict.fromkeys([*([recipe.prompts.dataset] if recipe.prompts.dataset is not None else []), *licences]):
        source = Source(name=name, access="dataset", role="dataset")
        yield _Named.of(source, _card_of(name, None, "datasets"), "its dataset card", licences.get(name), "the recipe's terms.datasets")


def _model(
    model: str,
    revision: str | None,
    known_as: str | None,
    stated: str | None,
    role: Role,
    *,
    access: str = "weights",
    day: date | None = None,
    stated_in: str | None = None,
) -> _Named:
    local = access.partition(":")[0] in ("weights", "host")
    source = Source(name=known_as or (_name_of(model) if local else model), access=access, role=role, generated_on=day)
    card = _card_of(model, revision, "models") if local else None
    in_recipe = "the recipe's terms.base_licence" if role == "base" else "the recipe's terms.licence"
    return _Named.of(source, card, "its model card", stated, stated_in or in_recipe)


def _name_of(model: str) -> str:
    """A hub id as it stands, also of a snapshot in the hub's cache. A directory proves nothing by its name, and its path would tell of its owner."""
    path = Path(model).expanduser()
    if not path.is_dir() and is_hub_id(model):
        return model
    return hub_id_of(path.absolute()) or f"./{path.absolute().name}"


def _card_of(name: str, revision: str | None, kind: Literal["models", "datasets"]) -> str | None:
    path = Path(name).expanduser()
    if path.is_dir():
        return declared_licence(path)
    snapshot = cached_snapshot(name, revision, kind=kind) if is_hub_id(name) else None
    return declared_licence(snapshot) if snapshot is not None else None


# --- what for ---------------------------------------------------------------------------------------------------------------------------


def use_of(recipe: Recipe) -> Use:
    """What the recipe and its intent say of the use. What is not stated is not in its facts."""
    return _use(recipe.intent, method_of(recipe))


def _use(intent: IntentSection, method: Method) -> Use:
    facts: dict[str, FactValue] = {"purpose": "train", "method": method, "modality": "text", **_stated(intent)}
    assertions: tuple[Assertion, ...] = ()
    if (competes := intent.competes) is not None:
        facts["competes"] = competes.value
        assertions = (Assertion(fact="competes", value=competes.value, asserted_by=competes.asserted_by, why=competes.why),)
    return Use(facts=facts, assertions=assertions, student_name=intent.student_name)


def _stated(intent: IntentSection) -> dict[str, FactValue]:
    found = {name: getattr(intent, name) for name, fact in FACTS.items() if fact.stated and name != "competes"}
    return {name: frozenset(value) if isinstance(value, tuple) else value for name, value in found.items() if value is not None}


def method_of(recipe: Recipe) -> Method:
    """What of the teacher is learned from; where the plan is still to choose, the most that it may choose."""
    if recipe.student.from_teacher is not None:
        return "weights"
    local = recipe.terms.access == "weights" and recipe.teacher.endpoint is None
    match recipe.targets.kind:
        case "text":
            return "text"
        case "drawn" | "top_k":
            return "logits" if local else "logprobs"
        case "full":
            return "logits"
        case "hidden":
            return "hidden"
        case "auto":
            if all(term.divergence == "cross_entropy" for term in recipe.objective.terms):
                return "text"
            return "hidden" if local else "logprobs"


# --- the verdict ------------------------------------------------------------------------------------------------------------------------


def decide_recipe(recipe: Recipe, *, today: date | None = None, store: TermsStore | None = None) -> Verdict:
    """The verdict on a recipe as it stands today, by our records and the user's own.

    Raises RecipeError where the recipe pins another catalogue or a day to come, EntitlementError where the user's own terms cannot be used.
    """
    today = today or clock.now().date()
    store = store or TermsStore.open()
    _require_sensible_days(recipe.terms, today)
    catalogue = store.catalogue()
    permissions, warnings = permissions_of(recipe)
    circumstances = Circumstances(today=today, confirmations=store.confirmations(), authorisations=permissions)
    use = use_of(recipe)
    named = list(_named(recipe))
    verdict = _decide(named, use, catalogue, circumstances, warnings)
    if recipe.prompts.answers != "teacher" and recipe.terms.generated_on is None and verdict.allows:
        verdict = _dated(verdict, [one.source for one in named], use, catalogue, circumstances)
    return verdict


def _decide(named: Sequence[_Named], use: Use, catalogue: Catalogue, circumstances: Circumstances, warnings: Sequence[str]) -> Verdict:
    verdict = decide([one.source for one in named], use, catalogue, circumstances)
    verdict = replace(verdict, warnings=(*verdict.warnings, *warnings))
    for one in named:
        if one.contradicts(catalogue):
            where = "the recipe" if "recipe" in one.stated_in else one.stated_in
            return _asking(
                verdict,
                one.source,
                found=f"{one.source.name} is declared to be under {one.source.licence} by its card and under {one.stated} by {where}",
                question=f"Is {one.source.name} under {one.stated}, as {where} says, or under {one.source.licence}, as its card does?",
                asks="licence",
            )
    return verdict


def entitled(recipe: Recipe, *, today: date | None = None, store: TermsStore | None = None) -> Verdict:
    """The gate: returns the verdict only where it lets a run learn from the teacher. Raises EntitlementDenied, EntitlementUnknown.

    Raises RecipeError where the intent is only to evaluate, which no run is, and ModelError for a teacher that is allowed but not within reach.
    """
    _require_training(recipe.intent)
    verdict = decide_recipe(recipe, today=today, store=store)
    require(verdict)
    if recipe.terms.access != "weights" and recipe.teacher.endpoint is None:
        raise ModelError(
            "model-unsupported",
            found=f"a teacher reached through {recipe.terms.access}, and no teacher.endpoint to ask; its terms allow it ({verdict.outcome})",
            expected="teacher.endpoint, or terms.access weights",
            do="Give teacher.endpoint in the place of teacher.model.",
        )
    return verdict


def entitled_endpoint(
    model: str,
    host: str,
    *,
    access: str | None = None,
    licence: str | None = None,
    recipe: Recipe | None = None,
    today: date | None = None,
    store: TermsStore | None = None,
) -> Verdict:
    """The gate before the first request to the model behind an endpoint: may one learn from it by its log-probabilities? Raises as `entitled` does.

    What `access` and `licence` do not state, and the intent, come from the recipe's `terms` and `intent`, whatever its teacher. The recipe's access
    `weights` is taken to be that of the endpoint only where `host` is this machine: it is the default, and says nothing of somebody else's servers.
    """
    today = today or clock.now().date()
    store = store or TermsStore.open()
    terms, intent = (recipe.terms, recipe.intent) if recipe is not None else (TermsSection(), IntentSection())
    _require_training(intent)
    _require_sensible_days(terms, today)
    permissions, warnings = permissions_of(recipe) if recipe is not None else ((), [])
    if access is None and recipe is not None and (terms.access != "weights" or is_loopback(host)):
        access = terms.access
    stated_in = "--licence" if licence is not None else None
    named = _model(model, None, terms.model, licence or terms.licence, "teacher", access=access or f"host:{host}", stated_in=stated_in)
    circumstances = Circumstances(today=today, confirmations=store.confirmations(), authorisations=permissions)
    verdict = _decide([named], _use(intent, "logprobs"), store.catalogue(), circumstances, warnings)
    if access is None:
        verdict = _asking(
            verdict,
            named.source,
            found=f"nothing says how {named.source.name} is reached at {host}",
            question="Who serves it? Say --access weights (you, from its weights), api:PROVIDER (its maker) or host:NAME (somebody else)",
            asks="access",
        )
    elif verdict.question is not None:
        verdict = replace(verdict, question=f"{verdict.question} (Here: --licence ID, or --recipe FILE with terms and intent.)")
    require(verdict)
    return verdict


def _require_training(intent: IntentSection) -> None:
    if intent.purpose == "evaluate":
        raise RecipeError(
            "recipe-invalid",
            found="`intent.purpose` is evaluate",
            expected="train, or nothing",
            why="a run trains a student on what the teacher says, and evaluating is allowed where training is not",
            do="Take it out, or ask without running: stillroom terms check RECIPE.",
        )


def _require_sensible_days(terms: TermsSection, today: date) -> None:
    if terms.catalogue is not None and terms.catalogue != CATALOGUE_DATE:
        raise RecipeError(
            "recipe-invalid",
            found=f"`terms.catalogue` is {terms.catalogue}, and the catalogue here is of {CATALOGUE_DATE}",
            expected="the catalogue that the recipe was read against",
            why="another catalogue may give another answer",
            do="Install the Stillroom that has it; or look at the answer (stillroom terms check RECIPE) with that line taken out, and put the new date there.",
        )
    if terms.generated_on is not None and terms.generated_on > today:
        raise RecipeError(
            "recipe-invalid",
            found=f"`terms.generated_on` is {terms.generated_on}, and today is {today}",
            expected="a day that has been",
            do="Write the day on which the answers were generated.",
        )


def permissions_of(recipe: Recipe) -> tuple[tuple[Attached, ...], list[str]]:
    """Authorisations that were given to whoever accepts the terms, and a warning about each other one."""
    holder = recipe.intent.holder
    found, warnings = [], []
    for one in attached(Path(path) for path in recipe.terms.authorisations):
        permission = one.authorisation
        if holder is not None and written(holder) == written(permission.holder):
            found.append(one)
        else:
            who = "nobody says who accepts the terms (intent.holder)" if holder is None else f"the terms are accepted by {holder}"
            warnings.append(f"the authorisation {permission.id} counts for nothing: it is given to {permission.holder}, and {who}")
    return tuple(found), warnings


def _asking(verdict: Verdict, source: Source, *, found: str, question: str, asks: str) -> Verdict:
    """The verdict, unknown for one more reason; a denial stands."""
    if verdict.outcome == "deny":
        return verdict
    reason = Reason(standing="not on file", source=source.name, role=source.role, record=None, clause=None, says=found)
    return replace(verdict, outcome="unknown", reasons=(reason, *verdict.reasons), obligations=(), question=question, asks=asks)


def _dated(verdict: Verdict, sources: list[Source], use: Use, catalogue: Catalogue, circumstances: Circumstances) -> Verdict:
    """Answers that are given may be from before the terms of today: where their day can change the answer, it is asked for."""
    teacher = sources[0]
    found = f"the answers come with the prompts, nothing says of which day they are, and terms of {teacher.access} move"
    if teacher.way == "weights":
        earlier = _under_earlier_terms(sources, use, catalogue, circumstances)
        changed = next(((day, other) for day, other in earlier if not other.allows or _owed(other) != _owed(verdict)), None)
        if changed is None:
            return verdict
        found = (
            f"the terms of {teacher.name} have changed: for answers of {changed[0]} the verdict is {changed[1].outcome}, with other duties or reasons"
        )
    question = "On which day were the answers generated that come with the prompts? Say so in the recipe: terms.generated_on"
    return _asking(verdict, teacher, found=found, question=question, asks="generated_on")


def _under_earlier_terms(sources: list[Source], use: Use, catalogue: Catalogue, circumstances: Circumstances) -> Iterator[tuple[date, Verdict]]:
    """The verdict for answers of each day on which a version came into force, as far back as every instrument of the teacher is on file."""
    applied, _ = catalogue.applying(sources, circumstances.today)
    families = {one.record.family for one in applied if one.source.role in ("teacher", "ancestor")}
    days = {version.effective for family in families for version in catalogue.versions(family) if version.effective < circumstances.today}
    for day in sorted(days, reverse=True):
        if all(catalogue.in_force(family, day) for family in families):
            then = [replace(source, generated_on=day) if source.role == "teacher" else source for source in sources]
            yield day, decide(then, use, catalogue, circumstances, alternatives=False)


def _owed(verdict: Verdict) -> set[tuple[str, str | None]]:
    return {(obligation.duty, obligation.text) for obligation in verdict.obligations}


# --- what is told -----------------------------------------------------------------------------------------------------------------------


def terms_of(recipe: Recipe, verdict: Verdict) -> Terms:
    """The verdict in lines, for plan and report."""
    teacher = sources_of(recipe)[0]
    return Terms(
        outcome=verdict.outcome,
        teacher=teacher.name,
        access=teacher.access,
        licence=teacher.licence,
        reasons=[reason_line(reason) for reason in verdict.reasons],
        obligations=[obligation.line for obligation in verdict.obligations],
        changed_by=list(verdict.changed_by),
        alternatives=list(verdict.alternatives),
        question=verdict.question,
        facts=list(verdict.facts),
        assertions=[
            f"{one.asserted_by} asserts: {'' if one.value else 'not '}{one.fact.replace('_', ' ')}, because {one.why}" for one in verdict.assertions
        ],
        instruments=list(verdict.instruments),
        warnings=list(verdict.warnings),
        catalogue=verdict.catalogue,
        decision=verdict.sha256,
    )


def digests_of(verdict: Verdict) -> tuple[str, ...]:
    """Digests of the records that were asked: what a ledger entry names as its terms."""
    return tuple(instrument.rpartition(" ")[2] for instrument in verdict.instruments)


def reason_line(reason: Reason) -> str:
    """A reason with its citation, where a record is behind it."""
    if reason.record is None:
        return f"{reason.source} {reason.standing}: {reason.says}"
    place = f"{reason.locator}; " if reason.locator else ""
    return f"{reason.title} {reason.standing}: {reason.says} ({place}{reason.cited}, for {reason.source}; {reason.url}; {reason.grade})"


def drift(then: Verdict, now: Verdict) -> list[str]:
    """What is different between two decisions, in lines: outcome, instruments, reasons, obligations. Empty where nothing is."""
    lines = [f"outcome: was {then.outcome}, is {now.outcome}"] if then.outcome != now.outcome else []
    old, new = (dict(instrument.split(" ", 1) for instrument in verdict.instruments) for verdict in (then, now))
    lines += [f"record {name}: added" for name in sorted(new.keys() - old.keys())]
    lines += [f"record {name}: removed" for name in sorted(old.keys() - new.keys())]
    lines += [f"record {name}: changed" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    told = [{f"{one.source}, {one.standing}: {one.cited or one.says}" for one in verdict.reasons} for verdict in (then, now)]
    lines += [*_changes("reason", *told)]
    owed = [{f"{one.duty} ({one.record}#{one.clause})" for one in verdict.obligations} for verdict in (then, now)]
    return [*lines, *_changes("obligation", *owed)]


def _changes(what: str, then: Iterable[str], now: Iterable[str]) -> Iterator[str]:
    before, after = set(then), set(now)
    yield from (f"{what} added: {line}" for line in sorted(after - before))
    yield from (f"{what} removed: {line}" for line in sorted(before - after))
