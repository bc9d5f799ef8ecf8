"""The plan: what a run will do, before anything is spent. Typed, printable, and written to plan.json."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stillroom.runs.documented import Documented
from stillroom.runs.report import Decision
from stillroom.runs.summaries import Pilot


class ModelFacts(Documented):
    """One model, as described without loading its weights."""

    source: str
    kind: str
    architecture: str | None
    parameters: int | None
    """None where it is not known: of a teacher behind an endpoint. So with what follows."""
    trainable: int | None = None
    """How many of a student's parameters are learned."""
    bytes: int | None
    layers: int | None
    width: int | None
    context_tokens: int | None
    rows: int | None
    """Width of its logits, padding included."""
    licence: str | None
    weights_sha256: str | None


class VocabularyFacts(Documented):
    """What the two tokenizers have in common, which is everything."""

    size: int
    """Real tokens, the same for both models."""
    teacher_rows: int | None
    """None where the teacher's weights are not here."""
    student_rows: int
    fingerprint: str


class Signal(Documented):
    """What is kept of the teacher."""

    kind: Literal["text", "drawn", "top_k", "hidden", "full"]
    k: int
    """Ids that top_k keeps of a row; 0 for other kinds."""
    draws: int
    """Ids that are drawn from a row; 0 for other kinds."""
    state_dtype: Literal["bfloat16", "float32", "int8"] | None
    """What hidden states are rounded to; none for other kinds."""
    target_temperature: float
    live: bool
    bytes_per_token: int
    why: str


class PromptFacts(Documented):
    """What the teacher will be asked, and how long the answers are taken to be."""

    count: int
    sha256: str
    """Of prompts and answers, in order."""
    duplicates_dropped: int
    tokens_mean: float
    tokens_longest: int
    answer_tokens_assumed: float
    answer_tokens_why: str


class CurationFacts(Documented):
    """What decides which answers the student sees."""

    steps: list[str]
    """In the order in which they run, a verifier's rules among them."""
    sha256: str
    """Of the steps with their settings, the verifier's files and the items that are kept out: with others a run does not go on."""
    why: str


class RedactedKind(Documented):
    """One kind of secret."""

    kind: str
    """As it stands in placeholders; LITERAL is text that looked like one by itself."""
    places: int
    """In how many places it was replaced."""
    distinct: int
    """How many different ones there are."""
    texts: int
    """In how many prompts, items and labelled pairs."""


class RedactionFacts(Documented):
    """What is taken out of the texts before an endpoint sees them. What it was is said nowhere."""

    mode: Literal["off", "placeholders", "restored"]
    texts: int
    """How many prompts, items and labelled pairs were looked at."""
    kinds: list[RedactedKind]


class CollectionFacts(Documented):
    """What will be asked of the teacher's endpoint, what that can cost, and what it is expected to. Amounts of money are exact decimals."""

    prompts: int
    """Answers to prompts; 0 where the answers are given."""
    items: int
    """Answers to evaluation items."""
    most_tokens: int
    """The worst case of a request (every byte that is sent counted as a token, and all that it may generate), on average over a sample, times their number."""
    most_money: str | None
    """The same in money; None where the price is not known."""
    cap_tokens: int | None
    cap_money: str | None
    currency: str | None
    prices_as_of: str | None
    pilot: Pilot | None
    """What `stillroom pilot` found for this very collection, and kept."""
    no_pilot: str | None
    """Why there is none, where there is none."""


class Hardware(Documented):
    """Where it will run, and what was chosen for it."""

    device: str
    teacher_device: str | None
    """None where its weights are not here. Of the first process; with an index, the others' teachers are on the devices after it."""
    dtype: str
    teacher_dtype: Literal["float32", "bfloat16", "int8"] | None
    """What the teacher computes in; None where its weights are not here."""
    packing: list[Literal["student", "teacher"]]
    """Whose sequences are laid end to end; the others' are padded."""
    threads: int
    micro_batch: int
    teacher_at_once: int
    """Sequences that go through the teacher at once."""
    why: str


class Estimate(Documented):
    """Predicted, not measured."""

    seconds: dict[str, float]
    """By stage: collect, train, label_only, evaluate. How long an endpoint takes to answer is not known, so collect is not there."""
    peak_memory_bytes: int
    """Of the process, beyond what the libraries take."""
    peak_bytes: dict[str, int]
    """The same by stage: collect, train, evaluate."""
    memory_available_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    how: str


class CardFit(Documented):
    """How the run would fit on graphics cards of one kind; predicted, not measured."""

    card: str
    """The memory that is printed on it."""
    usable_bytes: int
    """What of that a process can have; nine tenths of it may be planned."""
    fits: bool
    cards: int
    """How many of them, with a process for each."""
    settings: list[str]
    """What the recipe would have to say besides."""
    micro_batch: int
    """The largest that fits, of each process."""
    peak_bytes: dict[str, int]
    """By stage, on the first card."""


class Terms(Documented):
    """The entitlement verdict, in lines; decision.json has it whole."""

    outcome: str
    """allow, allow-with-obligations, deny or unknown."""
    teacher: str
    """The name that its terms were looked up by."""
    access: str
    """How it is reached."""
    licence: str | None
    """What its card declares, else the recipe."""
    reasons: list[str]
    """The deciding one first, each with its clause, the text's title and date, the place in it, its address, and how well founded it is."""
    obligations: list[str]
    """What the student must carry."""
    changed_by: list[str]
    """What would turn the answer into a yes."""
    alternatives: list[str]
    """Teachers that the same use is allowed with."""
    question: str | None
    """The one thing that is missing, where the outcome is unknown."""
    facts: list[str]
    """What is known of the use."""
    assertions: list[str]
    """What somebody asserts that no terms define."""
    instruments: list[str]
    """Every record of terms that was asked, with its digest."""
    warnings: list[str]
    """Records that are stale, authorisations that count for nothing, rules of the house."""
    catalogue: str
    """Date of the catalogue of terms."""
    decision: str
    """SHA-256 of the decision, which names its file in decisions/."""


class Plan(Documented):
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
    curation: CurationFacts | None = None
    """None in a plan that was made before runs curated."""
    redaction: RedactionFacts | None = None
    """Only of a teacher behind an endpoint."""
    collection: CollectionFacts | None = None
    """Only of a teacher behind an endpoint."""
    objective: str
    steps: int
    epochs: float
    hardware: Hardware
    estimate: Estimate
    cards: list[CardFit] = Field(default_factory=list)
    """Only where they were asked for: `stillroom plan --cards`."""
    decisions: list[Decision] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
