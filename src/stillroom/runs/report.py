"""The report: typed JSON in which every number says what it is, and every absence says why.

`report.json` is `Report.model_dump(mode="json")`; its JSON Schema is generated into docs/reference/report.schema.json.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from stillroom.runs.documented import Documented

SCHEMA_VERSION: Literal[1] = 1


class Number(Documented):
    """A measured number."""

    value: float
    n: int | None = None
    """How many observations stand behind it."""
    low: float | None = None
    """Lower end of the 95 % interval."""
    high: float | None = None
    """Upper end of the 95 % interval."""
    unit: str
    source: str
    """The file of the run directory it was computed from, or how it was measured."""


class Absent(Documented):
    """A number that is not there."""

    absent: str
    """Why."""


Maybe: TypeAlias = Number | Absent


class ModelQuality(Documented):
    """How well one model does on the evaluation items."""

    exact_match: Maybe
    families: dict[str, Number] = Field(default_factory=dict)


class Quality(Documented):
    """All models on the same items, paired."""

    teacher: ModelQuality
    student: ModelQuality
    student_before: ModelQuality
    """The student before training."""
    label_only: ModelQuality
    """The student's architecture trained on labelled pairs alone."""
    gap_recovered: Maybe
    """(student - label_only) / (teacher - label_only)."""


class Fidelity(Documented):
    """How close the student's next-token distributions are to the teacher's, on the teacher's own held-out answers."""

    forward_kl_nats: Maybe
    """Mean KL(teacher || student) per scored token."""
    top1_agreement: Maybe
    """Share of scored rows on which both have the same most probable token."""
    acceptance: Maybe
    """Mean of 1 - total variation: the expected acceptance when the student drafts for the teacher at temperature 1."""


class ModelCost(Documented):
    """What it takes to run one model."""

    parameters: Maybe
    bytes: Maybe
    """Size of the weights on disk."""
    flops_per_token: Maybe
    """Of one decoding step with an empty context, counted."""
    tokens_per_second: Maybe
    """Greedy decoding, batch 1."""
    tokens_per_second_batch_32: Maybe
    latency_p50_seconds: Maybe
    """Of one whole answer at batch 1."""
    latency_p95_seconds: Maybe
    peak_memory_bytes: Maybe
    """Of a fresh process that loads the model and answers, beyond what the libraries take."""


class Ratios(Documented):
    """Teacher over student for sizes and times, student over teacher for speeds: above 1 the student is better."""

    parameters: Maybe
    bytes: Maybe
    flops_per_token: Maybe
    tokens_per_second: Maybe
    tokens_per_second_batch_32: Maybe
    latency_p50_seconds: Maybe
    latency_p95_seconds: Maybe
    peak_memory_bytes: Maybe


class Cost(Documented):
    """Both models, measured on the same work, and their ratios."""

    teacher: ModelCost
    student: ModelCost
    ratios: Ratios


class Making(Documented):
    """What it took to make the student."""

    prompts: Number
    teacher_tokens: Maybe
    """Tokens that the teacher wrote."""
    training_tokens: Maybe
    """Scored tokens that the student was trained on, repeats counted."""
    updates: Maybe
    wall_seconds: dict[str, Number]
    """By stage: collect, train, evaluate."""
    money: Maybe


class AskedRows(Documented):
    """What became of what an endpoint was asked: requested = accepted + all rejected + all failed + pending."""

    requested: int
    accepted: int
    rejected: dict[str, int]
    """By reason."""
    failed: dict[str, int]
    """By reason."""
    pending: int


class Collection(Documented):
    """What was asked of the teacher's endpoint, and what it cost. Of the whole request store, where several runs share one."""

    rows: dict[str, AskedRows]
    """By what they were asked for: collect, evaluate."""
    logprobs_verified: int
    """Answers whose log-probabilities passed verification."""
    logprobs_demoted: dict[str, int]
    """Answers whose log-probabilities did not, by reason."""
    spent_tokens: Number
    reserved_tokens: Number
    """The worst case of attempts that may have been billed without our knowing. spent <= what the endpoint bills <= spent + reserved <= cap."""
    spent_money: Maybe
    reserved_money: Maybe
    cap_tokens: Maybe
    cap_money: Maybe
    projected_tokens: Maybe
    """What is still to be bought, at what an answer cost on average so far; 0 where nothing is."""
    projected_money: Maybe
    answers_tokens: Maybe
    """Of what was spent, what the answers cost: what a pilot's projection is to be compared with. The rest is a probe's."""
    answers_money: Maybe
    pilot_tokens: Maybe
    """What a pilot had projected for the answers, before they were bought."""
    pilot_money: Maybe
    break_even_calls: Maybe
    """After how many calls the student has cost as much as the teacher would have: collecting, training and the student's own calls together."""


class CurationStep(Documented):
    """What one step left out: before = after + all left_out."""

    step: str
    """`collecting` (no answer, or none that can be learned from) and `last-gate` (too long, cut off, empty, there already) belong to every run."""
    before: int
    after: int
    left_out: dict[str, int]
    """By reason."""
    shares: dict[str, Number]
    """The same as shares of the rows before the step."""


class SplitHits(Documented):
    """The evaluation items of one split that stood in answers which were left out for it."""

    split: str
    items: Number
    hit: Number
    by_overlap: Number
    """Items that would be found by their words wherever they stood."""
    by_prompt_alone: Number
    """Items that would be found by their whole prompt alone."""
    most_often: dict[str, int]
    """Items that were hit, with in how many answers; the first twenty."""


class Replaced(Documented):
    """Secrets of one kind that no endpoint saw."""

    places: Number
    distinct: Number
    texts: Number
    """Prompts, items and labelled pairs that had any."""


class Redaction(Documented):
    """What was taken out of the texts before the endpoint was asked."""

    mode: Literal["off", "placeholders", "restored"]
    texts: Number
    """Prompts, items and labelled pairs that were looked at."""
    kinds: dict[str, Replaced]
    placeholders_unknown: Number
    """Placeholders that stand in an answer and not in its prompt."""


class Curation(Documented):
    """What the student did not see of what was asked for, and why: requested = accepted + all left out."""

    sha256: str
    """Of the steps with their settings."""
    requested: Number
    accepted: Number
    steps: list[CurationStep]
    splits: list[SplitHits]
    redaction: Redaction | None
    """Only of a teacher behind an endpoint."""


class Sample(Documented):
    """One evaluation item, side by side."""

    prompt: str
    expected: str | None
    family: str | None
    teacher: str
    student: str
    teacher_right: bool | None
    student_right: bool | None
    agree: bool


class CurvePoint(Documented):
    """One point of a training curve."""

    step: int
    name: Literal["train", "validation"]
    nats: float
    """Objective per scored token."""


class Decision(Documented):
    """Something that was chosen, or that went another way than asked for."""

    what: str
    chosen: str
    why: str
    degraded: bool = False
    """Whether something was lost or done less well than asked for."""


class Provenance(Documented):
    """What everything was made from, and how to make it again."""

    recipe_sha256: str
    recipe_name: str
    teacher: dict[str, str | int | None]
    """Fields of ModelRef."""
    student: dict[str, str | int | None]
    terms: dict[str, str | list[str] | None]
    verdict: str
    seed: int
    versions: dict[str, str]
    machine: dict[str, str]
    transfer_set_sha256: str
    target_store_sha256: str | None
    ledger_head: str
    ledger_entries: int
    decisions: list[Decision]
    created: str
    commands: list[str]
    """How to reproduce."""


class Report(Documented):
    """A whole report."""

    schema_version: Literal[1] = SCHEMA_VERSION
    title: str
    quality: Quality
    fidelity: Fidelity
    cost: Cost
    making: Making
    collection: Collection | None = None
    """Only of a teacher behind an endpoint."""
    curation: Curation | None = None
    """None of a run that was collected before runs curated."""
    curves: list[CurvePoint]
    samples: list[Sample]
    """Disagreements first."""
    provenance: Provenance
