"""From the files of a run to its report: reads what the stages wrote, computes intervals, and says where each number came from."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

from stillroom.collect.spend import break_even_calls
from stillroom.core import durable
from stillroom.core.seeds import derive_seed
from stillroom.core.statistics import Interval
from stillroom.data import DROP_REASONS, TransferSet
from stillroom.evals import fidelity as fidelity_of
from stillroom.evals.cost import CostMeasurements
from stillroom.evals.cost import ModelCost as MeasuredCost
from stillroom.evals.fidelity import FidelitySums
from stillroom.evals.measured import Absence, Measured
from stillroom.evals.tasks import ItemScores, accuracy, accuracy_by_family, gap_recovered
from stillroom.runs.directory import Run
from stillroom.runs.entitling import terms_of
from stillroom.runs.gates import read_decision
from stillroom.runs.plan import Plan, RedactionFacts
from stillroom.runs.projection import Expected, Pilot
from stillroom.runs.report import (
    Absent,
    AskedRows,
    Collection,
    Cost,
    Curation,
    CurationStep,
    CurvePoint,
    Decision,
    Fidelity,
    Making,
    Maybe,
    ModelCost,
    ModelQuality,
    Number,
    Provenance,
    Quality,
    Ratios,
    Redaction,
    Replaced,
    Report,
    Sample,
    SplitHits,
)
from stillroom.runs.summaries import Bought, CurationSummary, Evaluation, HitItem, HitSplit, SiftedStep, Training, read

MODELS = ("teacher", "student", "student_before", "label_only")
_SAMPLES = 60
# Beyond this many points a curve is thinned.
_CURVE_POINTS = 300
# Evaluation items that are named; curation.json has all.
_ITEMS = 20


def build_report(run: Run) -> Report:
    """The report of an evaluated run."""
    plan = read(run.plan_path, Plan)
    scores = {name: _scores(run, name) for name in MODELS}
    summary = read(run.evaluated_path, Evaluation)
    training = read(run.trained_path, Training)
    bought = read(run.bought_path, Bought) if run.recipe.teacher.endpoint is not None and run.bought_path.exists() else None
    return Report(
        title=run.recipe.name,
        quality=_quality(run, scores),
        fidelity=_fidelity(run),
        cost=_cost(run),
        making=_making(run, plan, summary, training, bought),
        collection=_collection(run, bought, training) if bought is not None else None,
        curation=_curation(run, plan) if run.curation_path.exists() else None,
        curves=_curves(run.directory / "metrics.jsonl"),
        samples=_samples(scores["teacher"], scores["student"]),
        provenance=_provenance(run, plan, summary, training),
    )


# --- quality --------------------------------------------------------------------------------------------------------------------------


def _scores(run: Run, name: str) -> ItemScores | None:
    path = run.evals_path / f"{name}.json"
    return read(path, ItemScores) if path.exists() else None


def _quality(run: Run, scores: dict[str, ItemScores | None]) -> Quality:
    resamples, seed = run.recipe.evaluation.resamples, derive_seed(run.recipe.seed, "report")
    parts = {name: _model_quality(name, found, resamples, seed) for name, found in scores.items()}
    teacher, student, label_only = scores["teacher"], scores["student"], scores["label_only"]
    gap: Maybe
    if teacher is None or student is None:
        gap = Absent(absent="there are no evaluation items")
    elif label_only is None:
        gap = Absent(absent="the recipe has no label-only baseline")
    else:
        found = gap_recovered(student, label_only, teacher, resamples=resamples, seed=seed)
        gap = _number(
            found, "ratio", "evals/{student,label_only,teacher}.json: (student - label_only) / (teacher - label_only), paired bootstrap over items"
        )
    return Quality(**parts, gap_recovered=gap)


def _model_quality(name: str, scores: ItemScores | None, resamples: int, seed: int) -> ModelQuality:
    if scores is None:
        why = "the recipe has no label-only baseline" if name == "label_only" else "the recipe has no evaluation items"
        return ModelQuality(exact_match=Absent(absent=why))
    source = f"evals/{name}.json, bootstrap over items"
    families = accuracy_by_family(scores, resamples=resamples, seed=seed)
    return ModelQuality(
        exact_match=_number(accuracy(scores, resamples=resamples, seed=seed), "ratio", source),
        families={family: _of_interval(interval, "ratio", source) for family, interval in families.items()},
    )


def _number(found: Interval | Absence, unit: str, source: str) -> Maybe:
    return Absent(absent=found.absent) if isinstance(found, Absence) else _of_interval(found, unit, source)


def _of_interval(interval: Interval, unit: str, source: str) -> Number:
    return Number(value=interval.value, low=interval.low, high=interval.high, n=interval.n, unit=unit, source=source)


# --- fidelity and cost ----------------------------------------------------------------------------------------------------------------


def _fidelity(run: Run) -> Fidelity:
    if run.recipe.teacher.endpoint is not None:
        why = Absent(absent="an endpoint gives no distributions over the student's text, and of its own text at most the likeliest tokens")
        return Fidelity(forward_kl_nats=why, top1_agreement=why, acceptance=why)
    sums = read(run.evals_path / "fidelity.json", FidelitySums)
    resamples, seed = run.recipe.evaluation.resamples, derive_seed(run.recipe.seed, "fidelity")
    source = f"evals/fidelity.json: {sums.scored_tokens} tokens of the teacher's own answers, bootstrap over answers"
    return Fidelity(
        forward_kl_nats=_number(fidelity_of.forward_kl(sums, resamples=resamples, seed=seed), "nats/token", source),
        top1_agreement=_number(fidelity_of.top1_agreement(sums, resamples=resamples, seed=seed), "ratio", source),
        acceptance=_number(fidelity_of.acceptance(sums, resamples=resamples, seed=seed), "ratio", source),
    )


def _cost(run: Run) -> Cost:
    measured = read(run.evals_path / "cost.json", CostMeasurements)
    return Cost(
        teacher=ModelCost(**_cost_fields(measured.teacher)),
        student=ModelCost(**_cost_fields(measured.student)),
        ratios=Ratios(**_cost_fields(measured.ratios)),
    )


def _cost_fields(cost: MeasuredCost) -> dict[str, Maybe]:
    return {name: _measured(getattr(cost, name)) for name in MeasuredCost.model_fields}


def _measured(found: Measured | Absence) -> Maybe:
    if isinstance(found, Absence):
        return Absent(absent=found.absent)
    return Number(value=found.value, low=found.low, high=found.high, n=found.n, unit=found.unit, source=f"evals/cost.json: {found.how}")


# --- the making -----------------------------------------------------------------------------------------------------------------------


def _making(run: Run, plan: Plan, summary: Evaluation, training: Training, bought: Bought | None) -> Making:
    collected = [json.loads(line) for line in durable.read_lines(run.collect_path)]
    written = sum(line["answer_tokens"] for line in collected if not line.get("given", run.recipe.prompts.answers == "given"))
    seconds = {"collect": sum(line["seconds"] for line in collected), "train": training.seconds, "evaluate": summary.seconds}
    if training.label_only_seconds is not None:
        seconds["label_only"] = training.label_only_seconds
    rate, currency = run.recipe.hardware.price_per_hour, run.recipe.hardware.currency
    money: Maybe = Absent(absent="the recipe gives no hardware.price_per_hour")
    if rate is not None:
        spent = sum(seconds.values()) / 3600 * rate
        money = Number(value=spent, unit=currency, source=f"wall time of all stages at {rate:g} {currency} an hour")
    if bought is not None:
        money = _with_requests(money, bought)
    return Making(
        prompts=Number(value=plan.prompts.count, unit="prompts", source="plan.json"),
        teacher_tokens=Number(value=written, unit="tokens", source="collect.jsonl: tokens the teacher wrote"),
        training_tokens=Number(value=training.scored_tokens, unit="tokens", source="training.json: scored tokens, repeats counted"),
        updates=Number(value=training.steps, unit="updates", source="training.json"),
        wall_seconds={
            name: Number(value=value, unit="seconds", source="wall clock, pauses between resumed parts left out") for name, value in seconds.items()
        },
        money=money,
    )


def _with_requests(machine: Maybe, bought: Bought) -> Maybe:
    """What the requests cost, and the machine where its price is in the same currency."""
    if bought.currency is None or bought.spent_money is None:
        return Absent(absent="the teacher's price is not known")
    value, source = float(bought.spent_money), f"requests.json: what the endpoint counted, at prices of {bought.prices_as_of}"
    if isinstance(machine, Number) and machine.unit == bought.currency:
        return Number(value=value + machine.value, unit=bought.currency, source=f"{source}; and {machine.source}")
    return Number(value=value, unit=bought.currency, source=f"{source}; the machine's time is not in it")


# --- what was asked of an endpoint ----------------------------------------------------------------------------------------------------


def _collection(run: Run, bought: Bought, training: Training) -> Collection:
    def tokens(value: int) -> Number:
        return Number(value=value, unit="tokens", source="requests.json")

    def money(value: str | None) -> Maybe:
        if value is None or bought.currency is None:
            return Absent(absent="the teacher's price is not known")
        return Number(value=float(value), unit=bought.currency, source=f"requests.json, at prices of {bought.prices_as_of}")

    no_cap = Absent(absent="the recipe sets none")
    unpriced = Absent(absent="the teacher's price is not known")
    no_pilot = Absent(absent="no pilot of this collection was made")
    projection = "requests.json: what is still to be bought, at the average so far"
    pilot = bought.pilot
    return Collection(
        rows={purpose: AskedRows(**rows.model_dump()) for purpose, rows in bought.rows.items()},
        logprobs_verified=bought.verified,
        logprobs_demoted=bought.demoted,
        spent_tokens=tokens(bought.spent_tokens),
        reserved_tokens=tokens(bought.reserved_tokens),
        spent_money=money(bought.spent_money),
        reserved_money=money(bought.reserved_money),
        cap_tokens=no_cap if bought.cap_tokens is None else tokens(bought.cap_tokens),
        cap_money=no_cap if bought.cap_money is None else money(bought.cap_money),
        projected_tokens=_projection(bought.projected_tokens, "tokens", projection, Absent(absent="nothing was bought that it could be told from")),
        projected_money=_projection(bought.projected_money, bought.currency, projection, unpriced),
        answers_tokens=unpriced if bought.answers_tokens is None else tokens(bought.answers_tokens),
        answers_money=money(bought.answers_money),
        pilot_tokens=no_pilot if pilot is None else _projection(pilot.tokens, "tokens", _by_pilot(pilot), no_pilot, pilot.rows),
        pilot_money=no_pilot if pilot is None else _projection(pilot.money, pilot.currency, _by_pilot(pilot), unpriced, pilot.rows),
        break_even_calls=_break_even(run, bought, training),
    )


def _projection(found: Expected | None, unit: str | None, source: str, why: Absent, n: int | None = None) -> Maybe:
    if found is None or unit is None:
        return why
    return Number(value=found.value, low=found.low, high=found.high, n=n, unit=unit, source=source)


def _by_pilot(pilot: Pilot) -> str:
    return f"requests.json: by {pilot.rows} of {pilot.prompts:,} prompts, on {pilot.day}, for them and {pilot.items:,} evaluation items"


def _break_even(run: Run, bought: Bought, training: Training) -> Maybe:
    """By what was spent on an answer on average, and what the machine costs while the student trains and while it gives one answer alone."""
    hardware, student = run.recipe.hardware, read(run.evals_path / "cost.json", CostMeasurements).student
    if bought.currency is None or bought.spent_money is None:
        return Absent(absent="the teacher's price is not known")
    if hardware.price_per_hour is None:
        return Absent(absent=f"hardware.price_per_hour, in {bought.currency}, is not given")
    if hardware.currency != bought.currency:
        return Absent(absent=f"the machine's price is in {hardware.currency}, and the teacher's in {bought.currency}")
    if isinstance(student.latency_p50_seconds, Absence):
        return Absent(absent=f"the student's latency is not known: {student.latency_p50_seconds.absent}")
    hour = Decimal(str(hardware.price_per_hour)) / 3600
    answered = sum(rows.accepted + sum(rows.rejected.values()) for rows in bought.rows.values())
    spent = Decimal(bought.spent_money)
    found = break_even_calls(
        spent,
        hour * Decimal(str(training.seconds)),
        spent / answered if answered else None,
        hour * Decimal(str(student.latency_p50_seconds.value)),
    )
    if found.calls is None:
        return Absent(absent=found.reason or "it never does")
    source = "requests.json, training.json, evals/cost.json: the least number of calls that would have cost the teacher's price as much; one answer at a time"
    return Number(value=found.calls, unit="calls", source=source)


# --- what was left out ----------------------------------------------------------------------------------------------------------------


def _curation(run: Run, plan: Plan) -> Curation:
    found = read(run.curation_path, CurationSummary)
    return Curation(
        sha256=found.sha256,
        requested=_counted_in("curation.json", found.requested, "answers"),
        accepted=_counted_in("curation.json", found.accepted, "answers"),
        steps=[_curation_step(step) for step in found.steps],
        splits=[_split_hits(split, found.items) for split in found.splits],
        redaction=_redaction(plan.redaction, found) if plan.redaction is not None else None,
    )


def _counted_in(file: str, value: int, unit: str) -> Number:
    return Number(value=value, unit=unit, source=file)


def _curation_step(step: SiftedStep) -> CurationStep:
    shares = {
        reason: Number(value=count / step.before, n=step.before, unit="ratio", source=f"curation.json: {count} of the rows before {step.step}")
        for reason, count in step.dropped.items()
    }
    return CurationStep(step=step.step, before=step.before, after=step.after, left_out=step.dropped, shares=shares)


def _split_hits(split: HitSplit, items: list[HitItem]) -> SplitHits:
    def counted(value: int) -> Number:
        return _counted_in("curation.json", value, "items")

    hits = {hit.item: hit.rows for hit in items if hit.item.startswith(f"{split.split}/")}
    return SplitHits(
        split=split.split,
        items=counted(split.items),
        hit=counted(split.hit),
        by_overlap=counted(split.by_overlap),
        by_prompt_alone=counted(split.by_prompt_alone),
        most_often=dict(list(hits.items())[:_ITEMS]),
    )


def _redaction(facts: RedactionFacts, curated: CurationSummary) -> Redaction:
    def counted(value: int, unit: str) -> Number:
        return _counted_in("plan.json", value, unit)

    return Redaction(
        mode=facts.mode,
        texts=counted(facts.texts, "texts"),
        kinds={
            one.kind: Replaced(places=counted(one.places, "places"), distinct=counted(one.distinct, "secrets"), texts=counted(one.texts, "texts"))
            for one in facts.kinds
        },
        placeholders_unknown=_counted_in("curation.json", curated.placeholders_unknown, "placeholders"),
    )


def _curves(metrics: Path) -> list[CurvePoint]:
    lines = [json.loads(line) for line in durable.read_lines(metrics)]
    points = [CurvePoint(step=line["step"], name=line["name"], nats=line["nats_per_token"]) for line in lines]
    train = [point for point in points if point.name == "train"]
    every = max(1, len(train) // _CURVE_POINTS)
    thinned = {point.step for index, point in enumerate(train) if index % every == 0 or index == len(train) - 1}
    return [point for point in points if point.name == "validation" or point.step in thinned]


def _samples(teacher: ItemScores | None, student: ItemScores | None) -> list[Sample]:
    """Disagreements first, and among them those in which the student is wrong; then a few agreements."""
    if teacher is None or student is None:
        return []
    samples = [
        Sample(
            prompt=one.prompt,
            expected=one.expected,
            family=one.family,
            teacher=one.answer,
            student=other.answer,
            teacher_right=one.right,
            student_right=other.right,
            agree=one.answer == other.answer,
        )
        for one, other in zip(teacher.items, student.items, strict=True)
    ]
    differing = sorted((sample for sample in samples if not sample.agree), key=lambda sample: bool(sample.student_right))[: _SAMPLES * 2 // 3]
    agreeing = [sample for sample in samples if sample.agree][: _SAMPLES - len(differing)]
    return differing + agreeing


# --- provenance -----------------------------------------------------------------------------------------------------------------------


def _provenance(run: Run, plan: Plan, summary: Evaluation, training: Training) -> Provenance:
    environment = durable.read_json(run.env_path)
    transfer_set = TransferSet.load(run.transfer_set_path)
    recipe = run.recipe
    # What holds is the latest decision; the plan has the one that was made first.
    verdict = read_decision(run.decision_path)
    terms = terms_of(recipe, verdict).model_copy(update={"licence": plan.terms.licence})
    halvings = [
        Decision(what="training.micro_batch", chosen=str(halved.micro_batch), why=f"out of memory at step {halved.step}", degraded=True)
        for halved in training.halvings
    ]
    loggers = [
        Decision(what=f"logger {failed.logger}", chosen=f"switched off at step {failed.step}", why=failed.error, degraded=True)
        for failed in training.logger_failures
    ]
    dropped = [
        Decision(what="transfer set", chosen=f"{count} records left out", why=DROP_REASONS[reason], degraded=True)  # type: ignore[index]
        for reason, count in transfer_set.dropped.items()
    ]
    return Provenance(
        recipe_sha256=recipe.sha256,
        recipe_name=recipe.name,
        teacher=_identity(plan.teacher.model_dump()),
        student=_identity({**plan.student.model_dump(), **_counted(run), "weights_sha256": training.weights_sha256}),
        terms=terms.model_dump(exclude={"outcome", "changed_by", "alternatives", "question"}),
        verdict=verdict.outcome,
        seed=recipe.seed,
        versions=environment["versions"],
        machine=environment["machine"],
        transfer_set_sha256=transfer_set.sha256,
        target_store_sha256=training.store_sha256,
        ledger_head=summary.ledger_head,
        ledger_entries=summary.ledger_entries,
        decisions=[*plan.decisions, *halvings, *loggers, *dropped],
        created=summary.time,
        commands=[f"stillroom run {run.recipe_path.name} --out NEW-DIRECTORY", " ".join(environment["command"])],
    )


def _counted(run: Run) -> dict[str, int]:
    """The student's parameters as they were counted: a tied head that was adapted has become one of its own."""
    counted = read(run.evals_path / "cost.json", CostMeasurements).student.parameters
    return {} if isinstance(counted, Absence) else {"parameters": round(counted.value)}


def _identity(facts: dict[str, Any]) -> dict[str, str | int | None]:
    wanted = ("source", "kind", "architecture", "parameters", "layers", "width", "licence", "weights_sha256")
    return {name: facts[name] for name in wanted}
