"""The recipe: one frozen tree that says everything a run depends on. YAML or Python give the same object.

Unknown keys are refused with the nearest known name. The canonical JSON of a recipe (RFC 8785) is hashed, and that hash is the run's identity.
"""

from __future__ import annotations

import difflib
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from stillroom.collect.providers import GENERIC, provider_of
from stillroom.core.errors import RecipeError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.entitlement.facts import FACTS, check_value
from stillroom.runs.documented import Documented

Positive: TypeAlias = Annotated[int, Field(gt=0)]
Fraction: TypeAlias = Annotated[float, Field(ge=0.0, lt=1.0)]


# Canonical JSON has no larger integers.
_MOST = 2**53 - 1
Name: TypeAlias = Annotated[str, Field(min_length=1)]


class _Section(Documented):
    model_config = ConfigDict(protected_namespaces=(), allow_inf_nan=False)


class FromScratch(_Section):
    """A student with random weights, built as a Llama on the teacher's tokenizer."""

    layers: Positive
    """Transformer layers."""
    width: Positive
    """Hidden size; a multiple of `heads`."""
    heads: Positive
    """Attention heads."""
    feed_forward: Positive
    """Width of the feed-forward layers."""


class FromTeacher(_Section):
    """A student that starts as some of the teacher's layers, with its embeddings and head."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """Indices of the teacher's layers to keep, in order."""


class EndpointSection(_Section):
    """A teacher behind an OpenAI-compatible endpoint."""

    url: Name
    """Its base URL, such as https://host/v1: what OpenAI clients call base_url. No key belongs into it."""
    model: Name
    """The name that the endpoint knows the model by."""
    route: Literal["chat", "completions"] = "chat"
    """chat: the endpoint renders conversations itself. completions: it is sent text or, with teacher.tokenizer, token ids."""
    key_variable: str | None = None
    """The environment variable that holds the key. It is read when a request is sent, and written nowhere."""
    allow_http: bool = False
    """Let key, prompts and answers go to another machine in clear, where the network between is yours."""


class TeacherSection(_Section):
    """The model to learn from: exactly one of model, endpoint."""

    model: str | None = None
    """A Hugging Face directory, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    endpoint: EndpointSection | None = None
    tokenizer: str | None = None
    """Only with endpoint: the teacher's own tokenizer, a directory or hub id. Without it answers are text, in the tokens of student.model."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Of its arithmetic; auto: as hardware.dtype. int8: bfloat16, with linear layers kept in eight bits. docs/concepts.md says what each costs in exactness."""

    @property
    def source(self) -> str:
        """What it is called: the directory, hub id or model name that the recipe gives."""
        if self.endpoint is not None:
            return self.endpoint.model
        assert self.model is not None
        return self.model

    @model_validator(mode="after")
    def _exactly_one(self) -> TeacherSection:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("give exactly one of model, endpoint")
        stray = [
            name for name, there in (("revision", self.revision is not None), ("dtype", self.dtype != "auto")) if there and self.endpoint is not None
        ]
        if self.endpoint is None and self.tokenizer is not None:
            stray.append("tokenizer")
        if stray:
            raise ValueError(f"{' and '.join(stray)} says nothing of a teacher {'behind an endpoint' if self.endpoint else 'whose weights are here'}")
        return self


class LoraSection(_Section):
    """Low-rank adapters are learned beside the student's weights, which stay as they are (LoRA); without dropout, whose draws could not be resumed."""

    rank: Positive = 16
    """Width of an adapter."""
    alpha: Positive = 32
    """What an adapter gives is multiplied by alpha / rank."""
    targets: Literal["all-linear"] | Annotated[tuple[Name, ...], Field(min_length=1)] = "all-linear"
    """Names of the layers that get one, such as [q_proj, v_proj]; all-linear: every linear layer but the head."""
    head: bool = False
    """Whether the head gets one as well. A head that was tied to the embeddings is a weight of its own in the merged student."""
    save: Literal["merged", "adapter"] = "merged"
    """merged: a student like any other. adapter: a directory that peft loads on the base model, which must then be student.model."""


class StudentSection(_Section):
    """The model that learns: exactly one of model, from_scratch, from_teacher."""

    model: str | None = None
    """A Hugging Face directory, or a hub id, with the teacher's vocabulary."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    from_scratch: FromScratch | None = None
    """A new model with random weights."""
    from_teacher: FromTeacher | None = None
    """Some of the teacher's own layers."""
    lora: LoraSection | None = None

    @property
    def saves_adapter(self) -> bool:
        """Whether student/ will have an adapter alone."""
        return self.lora is not None and self.lora.save == "adapter"

    @model_validator(mode="after")
    def _lora_has_a_base(self) -> StudentSection:
        if self.lora is None:
            return self
        if self.from_scratch is not None:
            raise ValueError("lora learns beside weights that are there, and those of from_scratch are random numbers; leave lora out")
        if self.lora.save == "adapter" and self.model is None:
            raise ValueError("lora.save: adapter needs student.model: layers taken from_teacher are no model that an adapter could be loaded on")
        return self

    @model_validator(mode="after")
    def _exactly_one(self) -> StudentSection:
        given = [name for name in ("model", "from_scratch", "from_teacher") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of model, from_scratch, from_teacher; found {', '.join(given) or 'none'}")
        return self


class PromptsSection(_Section):
    """What the teacher is asked. Rows have `prompt` (text) or `messages` (chat, any number of turns; assistant turns are answers and are scored)."""

    path: str | None = None
    """A .jsonl or .parquet file; relative paths are relative to the recipe."""
    dataset: str | None = None
    """A `datasets` id instead of a file."""
    split: str = "train"
    """Which split of the dataset."""
    limit: Positive | None = None
    """Use only the first so many."""
    answers: Literal["teacher", "given", "mixed"] = "teacher"
    """teacher: the teacher answers. given: the answers that come with the prompts (`answer`, or a last assistant turn) are what is scored.
    mixed: answers that come with prompts are taken as given, and the teacher answers the other prompts."""

    @model_validator(mode="after")
    def _exactly_one(self) -> PromptsSection:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give exactly one of path, dataset")
        return self


class DatasetTerms(_Section):
    """A dataset that the prompts or their answers come from."""

    name: Name
    """Its hub id, or the name that the catalogue of terms knows it by."""
    licence: str | None = None
    """What it is under, where its card does not say."""


class TermsSection(_Section):
    """What is learned from, as far as terms depend on it; `stillroom terms check RECIPE` says what follows. Model cards are read by themselves."""

    access: Annotated[str, Field(pattern=r"^(weights|(api|host|consumer):[A-Za-z0-9][A-Za-z0-9 ._-]*)$")] = "weights"
    """How the teacher is reached: weights, api:PROVIDER (its maker's API), host:NAME (somebody else's servers), consumer:PROVIDER (a product for consumers)."""
    model: str | None = None
    """The name that the catalogue of terms knows the teacher by (a hub id, a service's model name), where teacher.model is not it."""
    licence: str | None = None
    """What the teacher is under, where its model card does not say: an SPDX id, or an id that the hub uses."""
    base_model: str | None = None
    """The same name for student.model."""
    base_licence: str | None = None
    """The same licence for student.model."""
    datasets: tuple[DatasetTerms, ...] = ()
    """Datasets that the prompts or their answers come from; prompts.dataset is one by itself."""
    generated_on: date | None = None
    """The day on which answers that are given were generated, YYYY-MM-DD: the terms of that day count too."""
    authorisations: tuple[str, ...] = ()
    """YAML files of written permissions; relative paths are relative to the recipe."""
    catalogue: date | None = None
    """Pins the date of the catalogue of terms: with another one nothing is decided."""


class CompetesSection(_Section):
    """Whether the student, or what it is used in, competes with the teacher's provider. No terms define it, so somebody has to say, and why."""

    value: bool
    """Whether it does."""
    asserted_by: Annotated[str, Field(min_length=2)]
    """Who says so: a name, or a role in your organisation."""
    why: Annotated[str, Field(min_length=10)]
    """The reason, in a sentence; it is kept with the decision."""


class IntentSection(_Section):
    """What the student is for. State what you know: what is left out is asked for where it can change the answer."""

    purpose: Literal["train", "evaluate"] | None = None
    """Whether outputs train a model (the default) or only evaluate one; a run trains."""
    task: Literal["general-llm", "narrow-generative", "classifier", "embedder", "non-language"] | None = None
    """What the student will do."""
    release: Literal["none", "internal", "hosted", "weights"] | None = None
    """Who will be able to use it: nobody, your organisation, the public through a service, anybody who gets its weights."""
    commercial: bool | None = None
    """Whether it will be used commercially."""
    competes: CompetesSection | None = None
    publish_dataset: bool | None = None
    """Whether the teacher's outputs themselves will be published."""
    monthly_users: Annotated[int, Field(le=_MOST)] | None = None
    """Monthly active users of your products, affiliates included."""
    group_revenue_usd: Annotated[int, Field(le=_MOST)] | None = None
    """Your group's revenue over the last 12 months, in US dollars."""
    model_as_a_service: bool | None = None
    """Whether you offer models as a service to others."""
    assistant_business: bool | None = None
    """Whether you offer a product that is an AI assistant for work."""
    domicile: str | None = None
    """The country you are established in, as a two-letter code."""
    territories: tuple[str, ...] | None = None
    """Countries in which the student will be used or offered, as two-letter codes."""
    student_name: str | None = None
    """The name that the student will be published under."""
    holder: str | None = None
    """Who accepts the terms, and whom written permissions are given to: a person or an organisation."""
    account: str | None = None
    """A pseudonym of the account that asks the teacher; it is entered in the ledger. Never a name or a key."""

    @field_validator(*(name for name, fact in FACTS.items() if fact.stated and name != "competes"), mode="before")
    @classmethod
    def _as_the_fact_has_it(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None:
            return None
        assert info.field_name is not None
        checked = check_value(info.field_name, value)
        return tuple(sorted(checked)) if isinstance(checked, frozenset) else checked


class CollectionSection(_Section):
    """Only with teacher.endpoint: what may be spent, and how fast. top_logprobs, store and redaction stay; the rest may be changed while a run goes on."""

    prices: str | None = None
    """A YAML file of prices, dated; docs/guides/probe-an-endpoint.md has one. A cap in money needs the model's price in it."""
    max_money: Annotated[float, Field(ge=0.0)] | None = None
    """The most that the run may spend, in the currency of the prices: reserved before each request, so it cannot be passed. What its request store has spent
    before (a probe, another run with the same `store`) is counted."""
    max_tokens: Annotated[int, Field(ge=0, le=_MOST)] | None = None
    """The most that it may spend in tokens, prompts' and answers'. One of the two caps is needed; where the price is not known, this one."""
    in_flight: Positive = 256
    """The most requests at a time; how many there are is learnt from the endpoint."""
    timeout_seconds: Annotated[float, Field(gt=0.0)] = 600.0
    """How long one answer may take."""
    top_logprobs: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] = "auto"
    """How many alternatives to ask for at each token; auto: as many as the stored probe proved, at most targets.k, and none without a probe."""
    store: str | None = None
    """A request store to use, which may hold a probe and answers already: what is asked again is not bought again. One run at a time uses it; the caps hold
    for all that it has spent. By default requests.sqlite in the run's directory."""
    redaction: Literal["off", "placeholders", "restored"] = "placeholders"
    """placeholders: nobody sees the secrets in texts, the student neither. restored: they are taken out of what is sent alone. off: they are sent."""

    @field_validator("redaction", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false


# What may be raised or lowered between two parts of a run: it changes how answers are bought, and no answer.
CHANGEABLE = ("prices", "max_money", "max_tokens", "in_flight", "timeout_seconds")


class GenerationSection(_Section):
    """How the teacher writes its answers."""

    max_new_tokens: Positive = 256
    """Longest answer, in tokens, the end token included."""
    sampling_temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0 is greedy."""


class VerifierSection(_Section):
    """Rules of your own, those that are given, in this order: what one rejects is left out as verifier, what it cannot judge as verifier-error."""

    regex: str | None = None
    """A regular expression, as Python has them, that must be found in the answer."""
    forbidden: str | None = None
    """One that must not be found in it."""
    json_schema: Name | dict[str, Any] | None = None
    """The answer must be JSON that fits this schema, alone or in a code fence: a file, relative to the recipe, or the schema itself."""
    function: Name | None = None
    """FILE.py:NAME (relative to the recipe) or MODULE:NAME: a Python function of prompt and answer, which is run. It returns True, False, or why not."""

    @field_validator("json_schema")
    @classmethod
    def _has_a_canonical_form(cls, value: Any) -> Any:
        try:
            canonical_json(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"no JSON: {error}") from error
        return value

    @model_validator(mode="after")
    def _has_a_rule(self) -> VerifierSection:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self


CurationStep: TypeAlias = Literal[
    "truncation", "emptiness", "refusal", "identity", "prompt_echo", "exact_duplicates", "near_duplicates", "decontamination"
]


class CurationSection(_Section):
    """Which answers are left out of what the student sees; docs/guides/clean-what-a-teacher-wrote.md shows it. Each is counted, with its reason."""

    steps: Literal["auto"] | tuple[CurationStep, ...] = "auto"
    """In this order. auto: decontamination against the evaluation items; before it, where an endpoint answers or answers are given, the first four."""
    verifier: VerifierSection | None = None

    @field_validator("steps")
    @classmethod
    def _each_once(cls, value: Any) -> Any:
        if value != "auto" and len(set(value)) < len(value):
            raise ValueError("a step is there twice")
        return value


class TargetsSection(_Section):
    """What is kept of the teacher's distributions."""

    kind: Literal["auto", "text", "drawn", "top_k", "hidden", "full"] = "auto"
    """auto: what carries the most for the disk it takes; `plan` says what was chosen and why. full is never stored."""
    k: Positive = 64
    """How many ids top_k keeps of each row; the mass of the others is kept as one number."""
    draws: Annotated[int, Field(ge=1, le=255)] = 50
    """How many ids drawn takes from each row's distribution, with replacement: more of them, less noise in the gradient."""
    state_dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    """What hidden rounds each number of a state to; docs/reference/target-store.md says what that changes."""
    target_temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """The temperature that targets are made at."""
    live: bool = False
    """Ask the teacher again in every epoch instead of storing its targets."""


# Which of a term's parameters its divergence has, and what the divergence calls those that have another name.
_PARAMETERS = {
    "generalized_jsd": ("weight_on_teacher",),
    "skew_forward_kl": ("skew",),
    "skew_reverse_kl": ("skew",),
    "alpha_beta": ("alpha", "beta"),
    "hidden_cosine": ("projection",),
    "hidden_mse": ("projection",),
}
_CALLED = {"skew": "alpha", "projection": "learned"}


class Term(_Section):
    """One term of the objective."""

    divergence: Literal[
        "forward_kl",
        "reverse_kl",
        "generalized_jsd",
        "skew_forward_kl",
        "skew_reverse_kl",
        "total_variation",
        "alpha_beta",
        "cross_entropy",
        "hidden_cosine",
        "hidden_mse",
    ]
    """What is compared; docs/concepts.md has the formulas."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Its factor in the sum."""
    weight_on_teacher: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Only generalized_jsd: the share of the teacher in the mixture."""
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Only skew_forward_kl and skew_reverse_kl: how much of the one is mixed into the other."""
    alpha: Annotated[float, Field(ge=0.0)] = 0.5
    """Only alpha_beta: the teacher's exponent."""
    beta: Annotated[float, Field(ge=0.0)] = 0.5
    """Only alpha_beta: the student's exponent."""
    projection: bool = True
    """Only hidden_cosine and hidden_mse: whether a projection is learned with the student; without one the widths must be equal."""

    @model_validator(mode="after")
    def _only_what_has_an_effect(self) -> Term:
        known = {"divergence", "weight", *_PARAMETERS.get(self.divergence, ())}
        stray = [name for name, field in type(self).model_fields.items() if name not in known and getattr(self, name) != field.default]
        if stray:
            raise ValueError(f"{self.divergence} has no {', '.join(stray)}")
        return self

    @property
    def arguments(self) -> dict[str, float | bool]:
        """The parameters of its divergence, as that takes them."""
        names = _PARAMETERS.get(self.divergence, ())
        return {_CALLED.get(name, name): getattr(self, name) for name in names}


class ObjectiveSection(_Section):
    """What the student minimises: the weighted sum of terms, in nats per scored token."""

    terms: tuple[Term, ...] = Field(default=(Term(divergence="forward_kl"),), min_length=1)
    """By default forward_kl alone."""
    match_temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Both distributions are softened to this temperature before they are compared."""
    scale_by_temperature_squared: bool = False
    """Multiply by match_temperature squared, which keeps the gradient's size."""


class TrainingSection(_Section):
    """The loop."""

    steps: Positive | None = None
    """Optimiser steps; instead of `epochs`."""
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Passes over the transfer set; 3 if neither is given."""
    sequences_per_step: Positive = 64
    """Sequences in one optimiser step, over all micro-batches."""
    length_window: Positive = 1
    """Steps whose sequences are sorted by length together, so that little is padded; 1 mixes lengths freely."""
    micro_batch: Positive | Literal["auto"] = "auto"
    """Sequences that go through the student at once; auto: `plan` chooses what fits."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    """The highest rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    """How the rate falls to min_learning_rate: cosine and linear from the warm-up on, warmup_stable_decay only at the end, constant never."""
    min_learning_rate: Annotated[float, Field(ge=0.0)] = 0.0
    """The rate that the schedule ends at."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Only warmup_stable_decay: the share of all steps, at the end, over which the rate falls as 1 - sqrt."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises linearly."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's."""
    clip_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """The gradient's norm is clipped to this."""
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's."""
    validation_fraction: Fraction = 0.02
    """Share of the transfer set that is only scored, for the training curve."""
    validate_every: Positive = 100
    """Steps between two scorings of that share."""
    checkpoint_every: Positive = 200
    """Steps between two checkpoints."""
    rows_per_chunk: Positive = 2048
    """Scored rows that go through the vocabulary at once; bounds memory, changes nothing else."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Lay the sequences of a micro-batch end to end, each attending to itself alone, instead of padding them. auto: where it is proved to change nothing."""
    gradient_checkpointing: bool = False
    """Keep each layer's input alone and compute the layer again for its gradient: less memory, about a third more time, the same numbers."""
    optimiser_offload: bool = False
    """Keep the optimiser's state (8 bytes a learned number) and a copy of the weights in host memory; changes nothing where the device is the CPU."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self

    @model_validator(mode="after")
    def _the_rate_falls(self) -> TrainingSection:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate:g} is above learning_rate {self.learning_rate:g}")
        if self.schedule == "constant" and self.min_learning_rate:
            raise ValueError("the schedule constant has no min_learning_rate")
        return self


class LoggingSection(_Section):
    """Where the curves go beside metrics.jsonl. A logger that fails is switched off and never stops a run; a resumed run goes on in the same one."""

    loggers: Literal["auto"] | tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = "auto"
    """Which; auto: tensorboard where it is installed. Addresses and keys are taken from where each looks for them (WANDB_MODE, MLFLOW_TRACKING_URI, ...)."""
    project: Name = "stillroom"
    """The project, or the experiment, that the run is entered in."""


class LabelOnlySection(_Section):
    """The baseline: the student's architecture trained on labelled pairs alone, stopped on its own validation split."""

    path: str
    """A .jsonl or .parquet file with `prompt` (or `messages`) and `answer`."""
    limit: Positive | None = None
    """Use only the first so many pairs."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of the pairs that decides when to stop and is not trained on."""
    patience: Positive = 10
    """Validations without improvement before it stops."""
    validate_every: Positive = 10
    """Steps between two validations."""
    learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    """Its own learning rate; the training section's if not given."""


class EvaluationSection(_Section):
    """What teacher and student are compared on."""

    path: str | None = None
    """Labelled items: .jsonl or .parquet with `prompt` (or `messages`), `answer` and, if wanted, `family`. Without it, only fidelity and cost are measured."""
    limit: Positive | None = None
    """Use only the first so many items."""
    fidelity_prompts: Positive = 500
    """Prompts on which the two distributions are compared."""
    resamples: Annotated[int, Field(ge=100)] = 2000
    """Bootstrap resamples behind each interval."""
    label_only: LabelOnlySection | None = None


class HardwareSection(_Section):
    """Where it runs; auto: `plan` chooses."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the models run."""
    teacher_device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """Where the teacher is, as PyTorch names it (`cpu`, `cuda:1`); auto: with the student. Of several processes the first takes `cuda:N`, the next N + 1."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the models' arithmetic; the optimiser's state is always float32."""
    threads: Positive | Literal["auto"] = "auto"
    """CPU threads, of each process."""
    parallel: Literal["auto", "none", "replicate", "shard"] = "auto"
    """How several processes that torchrun started train one student. replicate: each holds the whole of it; shard: each holds a part. auto: replicate."""
    compile: bool = False
    """Have torch.compile make kernels of both models' bodies when they are first called; numbers move by rounding."""
    price_per_hour: Annotated[float, Field(ge=0.0)] | None = None
    """What an hour of this machine costs; without it no money is reported."""
    currency: str = "USD"
    """The currency of price_per_hour."""


class Recipe(_Section):
    """A whole run."""

    version: Literal[1] = 1
    """Version of this format."""
    name: str = "student"
    """Names the run in its report, and its directory where --out is not given."""
    teacher: TeacherSection
    terms: TermsSection = TermsSection()
    intent: IntentSection = IntentSection()
    student: StudentSection
    prompts: PromptsSection
    collection: CollectionSection | None = None
    generation: GenerationSection = GenerationSection()
    curation: CurationSection = CurationSection()
    targets: TargetsSection = TargetsSection()
    objective: ObjectiveSection = ObjectiveSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    logging: LoggingSection = LoggingSection()
    hardware: HardwareSection = HardwareSection()
    seed: Annotated[int, Field(ge=0)] = 0
    """Everything random comes from it. 0 is a seed like any other."""

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_defaults(cls, tree: Any) -> Any:
        # A YAML section whose keys are all commented out reads as null.
        return {key: value for key, value in tree.items() if value is not None} if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _a_day_is_for_answers_that_are_given(self) -> Recipe:
        if self.terms.generated_on is not None and self.prompts.answers == "teacher":
            raise ValueError(
                "terms.generated_on is the day of answers that are given; here prompts.answers is teacher, which answers when the run does"
            )
        return self

    @model_validator(mode="after")
    def _an_endpoint_is_paid_for(self) -> Recipe:
        endpoint = self.teacher.endpoint
        if endpoint is None:
            if self.collection is not None:
                raise ValueError("collection is for a teacher.endpoint; here the teacher's weights are asked")
            return self
        provider = provider_of(_host_of(endpoint.url))
        if self.terms.access == "weights" and provider is not GENERIC:
            raise ValueError(
                f"terms.access is weights, and the endpoint is {provider.name}'s: say api:{provider.name} for its own models, host:{provider.name} for others'"
            )
        if self.student.model is None and self.student.from_scratch is not None and self.teacher.tokenizer is None:
            raise ValueError("student.from_scratch is built on the teacher's tokenizer: give teacher.tokenizer, or a student.model")
        return self

    @property
    def buying(self) -> CollectionSection:
        """The section `collection`, or its defaults."""
        return self.collection or CollectionSection()

    @property
    def sha256(self) -> str:
        """The run's identity: SHA-256 of the canonical JSON."""
        return sha256_hex(self.canonical())

    def canonical(self) -> bytes:
        """RFC 8785 JSON of the whole tree, defaults included."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_yaml(cls, path: Path) -> Recipe:
        """Reads a recipe file. Raises RecipeError: missing, not YAML, an unknown key (with the nearest known one), a bad value."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                "recipe-missing", found=f"{path}: {error}", expected="a YAML file", do="Check the path, or write one with `stillroom init`."
            ) from error
        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError("recipe-syntax", found=f"{path}: {error}", expected="YAML", do="Mend the line named above.") from error
        return cls.from_tree(tree, name=str(path)).with_paths_relative_to(path.parent)

    @classmethod
    def from_tree(cls, tree: Any, *, name: str = "the recipe") -> Recipe:
        """Checks a tree of plain values."""
        if not isinstance(tree, dict):
            raise RecipeError(
                "recipe-invalid",
                found=f"{name} holds {type(tree).__name__}",
                expected="a mapping with teacher, student, prompts",
                do="See `stillroom init`.",
            )
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise _as_recipe_error(error, name) from error

    def with_paths_relative_to(self, folder: Path) -> Recipe:
        """The same recipe with every path that exists relative to `folder` made absolute."""

        def settle(value: str | None) -> str | None:
            if value is None or Path(value).expanduser().is_absolute():
                return value
            there = folder / Path(value).expanduser()
            return str(there.resolve()) if there.exists() else value

        tree = self.model_dump()
        paths = [("teacher", "model"), ("teacher", "tokenizer"), ("student", "model"), ("prompts", "path"), ("evaluation", "path")]
        if tree["collection"]:
            paths += [("collection", "prices"), ("collection", "store")]
        for section, key in paths:
            tree[section][key] = settle(tree[section][key])
        if tree["evaluation"]["label_only"]:
            tree["evaluation"]["label_only"]["path"] = settle(tree["evaluation"]["label_only"]["path"])
        verifier = tree["curation"]["verifier"]
        if verifier and isinstance(verifier["json_schema"], str):
            verifier["json_schema"] = settle(verifier["json_schema"])
        if verifier and verifier["function"]:
            file, colon, name = verifier["function"].rpartition(":")
            verifier["function"] = f"{settle(file) if file.endswith('.py') else file}{colon}{name}"
        tree["terms"]["authorisations"] = [settle(path) for path in tree["terms"]["authorisations"]]
        return Recipe.model_validate(tree)


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""  # what is wrong with it, the plan says


def _as_recipe_error(error: ValidationError, name: str) -> RecipeError:
    errors = error.errors()
    # A misspelt key also shows up as a missing one: say the misspelling.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])
        known = _known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
        hint = f"Did you mean `{near[0]}`?" if near else f"Known here: {', '.join(known)}."
        return RecipeError("recipe-unknown-key", found=f"`{where}` in {name}", expected=f"one of {', '.join(known)}", do=hint)
    found = f"`{where or 'recipe'}` in {name}: {first['msg']}"
    if first["type"] not in ("missing", "value_error"):
        found += f" (got {first['input']!r})"
    return RecipeError("recipe-invalid", found=found, do="Correct this value; `stillroom init` writes a recipe with every key explained.")


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields[part]
        model = _section_in(field.annotation)
    return list(model.model_fields)


def _section_in(annotation: Any) -> Any:
    """The _Section class inside an annotation such as `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _section_in(part)
        if found is not None:
            return found
    return None
