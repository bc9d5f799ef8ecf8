"""The plan: what a run will do, before anything is spent. Typed, printable, and written to plan.json."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from stillroom.runs.report import Decision


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelFacts(_Part):
    """One model, as described without loading its weights."""

    source: str
    kind: str
    architecture: str
    parameters: int
    bytes: int
    layers: int
    width: int
    context_tokens: int
    rows: int
    """Width of its logits, padding included."""
    licence: str | None
    weights_sha256: str | None


class VocabularyFacts(_Part):
    """What the two tokenizers have in common, which is everything."""

    size: int
    """Real tokens, the same for both models."""
    teacher_rows: int
    student_rows: int
    fingerprint: str


class Signal(_Part):
    """What is kept of the teacher."""

    kind: Literal["text", "top_k", "hidden", "full"]
    k: int
    target_temperature: float
    live: bool
    bytes_per_token: int
    why: str


class PromptFacts(_Part):
    """What the teacher will be asked, and how long the answers are taken to be."""

    count: int
    sha256: str
    """Of prompts and answers, in order."""
    duplicates_dropped: int
    tokens_mean: float
    tokens_longest: int
    answer_tokens_assumed: float
    answer_tokens_why: str


class Hardware(_Part):
    """Where it will run, and what was chosen for it."""

    device: str
    dtype: str
    threads: int
    micro_batch: int
    teacher_at_once: int
    """Sequences that go through the teacher at once."""
    why: str


class Estimate(_Part):
    """Predicted, not measured."""

    seconds: dict[str, float]
    """By stage: collect, train, label_only, evaluate."""
    peak_memory_bytes: int
    """Of the process, beyond what the libraries take."""
    memory_available_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    how: str


class Terms(_Part):
    """The entitlement verdict, as plain text; decision.json has it whole."""

    outcome: str
    licence: str | None
    document: str | None
    read_on: str | None
    reasons: list[str]
    obligations: list[str]
    question: str | None


class Plan(_Part):
    """What a run will do, before anything is spent: the content of plan.json."""

    schema_version: Literal[1] = 1
    recipe_name: str
    recipe_sha256: str
    teacher: ModelFacts
    student: ModelFacts
    vocabulary: VocabularyFacts
    terms: Terms
    prompts: PromptFacts
    signal: Signal
    objective: str
    steps: int
    epochs: float
    hardware: Hardware
    estimate: Estimate
    decisions: list[Decision] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
