"""A pilot: a few rows of a collection, bought as the run will buy them, so that what the whole costs is estimated and nothing is paid for twice.

Entitled before the first request, charged to the recipe's caps, kept in the store that the run goes on from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stillroom.core import clock, durable
from stillroom.core.errors import RecipeError
from stillroom.core.interrupts import StopRequest
from stillroom.data import Prompt
from stillroom.models.loading import silence
from stillroom.runs.buying import COLLECT, EVALUATE, BoughtAnswers, Purchases, asked_logprobs
from stillroom.runs.collecting import Answered, curated_by, line_of
from stillroom.runs.curating import chosen
from stillroom.runs.directory import Run
from stillroom.runs.observer import Observer
from stillroom.runs.planning import Prepared, asked_of, asks_of, prepare, spread, worst_cases
from stillroom.runs.projection import Fate, Piloted, Whole, drawn, estimate
from stillroom.runs.recipe import Recipe
from stillroom.runs.stages import plan_of
from stillroom.targets.store import record_id


def pilot(recipe: Recipe, out: Path, rows: int, observer: Observer) -> Piloted:
    """See stillroom.runs.pilot."""
    if recipe.teacher.endpoint is None or recipe.prompts.answers == "given":
        what = "a teacher whose weights are here" if recipe.teacher.endpoint is None else "answers that are given with the prompts"
        raise _nothing_to_buy(what)
    run = Run.begin(recipe, out)
    with (
        durable.full_disk_reported(run.directory),
        silence(),
        run.locked(),
        StopRequest("Give the same command again: it goes on from what was bought.") as stop,
    ):
        prepared = prepare(recipe, out=run.directory, planned=plan_of(run), gate=True)
        asked = asked_of(recipe, prepared.renderer, prepared.prompts.prompts)
        prompts = drawn(asked, rows, recipe.seed)
        if not prompts:
            raise _nothing_to_buy("answers that are given with the prompts")
        observer.stage("pilot", f"{len(prompts):,} of {len(asked):,} prompts")
        with Purchases.opened(run, prepared, observer, stop) as purchases:
            return _bought(run, prepared, purchases, asked, prompts)


def _nothing_to_buy(found: str) -> RecipeError:
    return RecipeError(
        "recipe-invalid", found=found, expected="answers that are bought from an endpoint", do="A pilot is for those: stillroom plan says the rest."
    )


def _bought(run: Run, prepared: Prepared, purchases: Purchases, asked: Sequence[Prompt], prompts: Sequence[Prompt]) -> Piloted:
    teacher, store, recipe = prepared.endpoint_teacher, purchases.store, prepared.recipe
    assert teacher is not None
    before = store.spend()
    answering = BoughtAnswers(purchases, run)
    answering.begin(prompts, len(prompts))
    fates = _fates(prepared, answering, prompts)
    after, signal, inputs = store.spend(), prepared.plan.signal, prepared.inputs
    looked_at = [inputs.sent(prompt) for prompt in spread((*asked, *inputs.items), 200)]
    mean, worst = worst_cases(recipe, teacher, prepared.renderer, signal, looked_at)
    whole = Whole(
        prompts=len(asked),
        items=len(inputs.items),
        bought=_ended(prepared, purchases, asked, fates),
        used=after.settled + after.reserved,
        worst=worst,
        worst_mean=mean,
    )
    asks = asks_of(recipe, teacher, prepared.renderer, inputs, signal, len(prompts))
    found = estimate(fates, whole, teacher.price, day=clock.now().date().isoformat(), asks=asks)
    store.remember("pilot", teacher.endpoint, found.model_dump(mode="json"))
    return Piloted(
        pilot=found,
        signal=signal.kind,
        why=signal.why,
        probed=teacher.probe is not None,
        store=store.path,
        spend=after,
        spent=after.settled - before.settled,
        reserved=after.reserved - before.reserved,
        endpoint=teacher.endpoint,
    )


def _fates(prepared: Prepared, answering: BoughtAnswers, prompts: Sequence[Prompt]) -> list[Fate]:
    """What became of each drawn prompt, judged as the run will judge it."""
    answered = answering.answers(0, prompts)
    lines = [line_of(one, _record(one), 0.0) for one in answered]
    reasons = {candidate.prompt_id: reason for candidate, reason in curated_by(chosen(prepared.recipe, prepared.inputs), prepared, lines)[1].dropped}
    fates = []
    for prompt in prompts:
        row = answering.row(prompt)
        if row is None:
            fates.append(Fate(left_out=reasons.get(prompt.id)))
            continue
        failed = row.reason if row.state == "failed" else None
        fates.append(
            Fate(
                attempts=answering.purchases.store.attempts(row.key),
                failed=failed,
                left_out=reasons.get(prompt.id) if failed is None else None,
                demoted=None if row.demoted is None else row.demoted.partition(":")[0],
            )
        )
    return fates


def _record(answered: Answered) -> str | None:
    return None if answered.sequence is None else record_id(answered.sequence)


def _ended(prepared: Prepared, purchases: Purchases, prompts: Sequence[Prompt], fates: Sequence[Fate]) -> int:
    """How many rows of the collection have ended, with those that are too long to be asked among the drawn ones."""
    ended = {row.row for row in purchases.store.rows() if row.state in ("answered", "failed")}
    asked = sum(bool(fate.attempts) or fate.failed is not None for fate in fates)
    if len(ended) > asked:  # the names of all rows take time, and nearly always there are no others
        temperature = prepared.recipe.generation.sampling_temperature
        rows = purchases.rows(COLLECT, prompts, temperature=temperature, top_logprobs=asked_logprobs(prepared))
        rows += purchases.rows(EVALUATE, prepared.inputs.items, temperature=0.0)
        asked = sum(row.row in ended for row in rows)
    return asked + sum(not fate.attempts and fate.failed is None for fate in fates)
