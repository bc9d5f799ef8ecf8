"""What the stages leave for those after them, beside the plan and the transfer set; and how such files are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from stillroom.core import durable
from stillroom.core.errors import RunError
from stillroom.runs.documented import Documented
from stillroom.runs.projection import Expected, Pilot

M = TypeVar("M", bound=BaseModel)


class Halving(Documented):
    """A micro-batch that did not fit into memory."""

    step: int
    micro_batch: int


class LoggerFailure(Documented):
    """A logger that was switched off, so that the run could go on."""

    logger: str
    step: int
    """The step whose values it was given; 0 where it could not begin."""
    error: str


class Training(Documented):
    """training.json: what the train stage did."""

    steps: int
    scored_tokens: int
    """Repeats counted."""
    seconds: float
    halvings: list[Halving] = Field(default_factory=list)
    processes: int = 1
    """How many took part in the last part of it."""
    parallel: Literal["none", "replicate", "shard"] = "none"
    """How they shared the student."""
    records: int
    validation_records: int
    weights_sha256: str
    """Of student/model.safetensors, or student/adapter_model.safetensors."""
    store_sha256: str
    label_only_steps: int | None
    """The step whose weights the baseline kept."""
    label_only_seconds: float | None
    logger_failures: list[LoggerFailure] = Field(default_factory=list)


class Evaluation(Documented):
    """evals/summary.json: when the evaluate stage was done, and the ledger as it was then."""

    seconds: float
    time: str
    ledger_head: str
    ledger_entries: int


class SiftedStep(Documented):
    """What one step of curation did: before = after + all dropped."""

    step: str
    settings: dict[str, Any]
    before: int
    after: int
    dropped: dict[str, int] = Field(default_factory=dict)
    """By reason."""


class HitSplit(Documented):
    """The evaluation items of one split, and how many of them stood in answers that were left out."""

    split: str
    items: int
    hit: int
    by_overlap: int
    """Items that are found by their words wherever they stand."""
    by_prompt_alone: int
    """Items that are found by their whole prompt alone: too short, or made of what other items have too."""


class HitItem(Documented):
    """An evaluation item, and how many answers that were left out have it in them."""

    item: str
    """SPLIT/NUMBER, its place among the items from 1."""
    rows: int


class CurationSummary(Documented):
    """curation.json: what was left out of the transfer set, step by step."""

    sha256: str
    """Of the steps between the two gates, with their settings."""
    requested: int
    accepted: int
    steps: list[SiftedStep]
    """`collecting` first and `last-gate` last: those two belong to every run."""
    splits: list[HitSplit] = Field(default_factory=list)
    items: list[HitItem] = Field(default_factory=list)
    """Those that were hit, the most often first."""
    placeholders_unknown: int = 0
    """Placeholders that stand in an answer and not in its prompt."""


class Rows(Documented):
    """What became of what was asked: requested = accepted + all rejected + all failed + pending."""

    requested: int
    accepted: int
    rejected: dict[str, int] = Field(default_factory=dict)
    """By reason."""
    failed: dict[str, int] = Field(default_factory=dict)
    """By reason."""
    pending: int = 0


class Bought(Documented):
    """requests.json: what the request store has and what it cost, when collecting and when evaluating had ended. Amounts of money are exact decimals."""

    rows: dict[str, Rows]
    """By what they were asked for: collect, evaluate."""
    verified: int
    """Answers whose log-probabilities passed."""
    demoted: dict[str, int]
    """Answers whose log-probabilities did not, by reason."""
    attempts: int
    unknown: int
    """Attempts that may have been billed without our knowing: their worst case is reserved."""
    spent_tokens: int
    reserved_tokens: int
    currency: str | None
    spent_money: str | None
    reserved_money: str | None
    cap_tokens: int | None
    cap_money: str | None
    prices_as_of: str | None
    answers_tokens: int | None = None
    """Of what was spent, what the rows' answers cost; the rest is a probe's."""
    answers_money: str | None = None
    projected_tokens: Expected | None = None
    """What is still to be bought, evaluation items with it, at what an answer cost on average so far; 0 where nothing is."""
    projected_money: Expected | None = None
    pilot: Pilot | None = None
    """What a pilot of this collection had projected."""


def read(path: Path, model: type[M]) -> M:
    """The typed content of a JSON file of the run directory. Raises RunError 'run-corrupt', naming the field that is not as it should be."""
    tree = durable.read_json(path)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise RunError(
            "run-corrupt",
            found=f"{path}: {where}: {first['msg']}",
            expected="a file as Stillroom wrote it",
            do="Restore the file from a copy, or run again in a new directory.",
        ) from error
