"""From a recipe to a plan: everything that can be known, checked or refused before anything is spent. Loads no weights, writes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from stillroom.collect.spend import Amount, in_units, worst_case
from stillroom.collect.wire import Call
from stillroom.core import clock, durable
from stillroom.core.errors import DataError, ModelError, ResourceError, StoreError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.launch import launched
from stillroom.data import LoadedPrompts, Prompt
from stillroom.entitlement.verdict import Verdict
from stillroom.models.adapters import LoraSettings, add_lora
from stillroom.models.arithmetic import require_compiler
from stillroom.models.cards import fits
from stillroom.models.estimate import LabelOnlyWork, WorkEstimate, Workload, estimate, measure
from stillroom.models.loading import (
    ModelDescription,
    ModelShape,
    config_from_scratch,
    config_from_teacher,
    count_parameters,
    describe,
    shape_of,
    skeleton_of,
)
from stillroom.models.packing import cannot_pack, why_not_packed
from stillroom.models.probing import Outline
from stillroom.models.tokenizers import Renderer, load_tokenizer, vocabulary_of
from stillroom.objectives.divergences import DIVERGENCES
from stillroom.objectives.matching import STATE_MATCHES
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.runs.curating import asked_in_vain, chosen
from stillroom.runs.endpoints import Asking, EndpointTeacher, endpoint_teacher, obtainable, require_askable, require_signal
from stillroom.runs.entitling import decide_recipe, entitled, sources_of, terms_of
from stillroom.runs.inputs import Inputs
from stillroom.runs.loggers import chosen as loggers_chosen
from stillroom.runs.plan import (
    CardFit,
    CollectionFacts,
    CurationFacts,
    Estimate,
    Hardware,
    ModelFacts,
    Plan,
    PromptFacts,
    RedactionFacts,
    Signal,
    VocabularyFacts,
)
from stillroom.runs.projection import Pilot, caps_needed, drawn
from stillroom.runs.recipe import ObjectiveSection, Recipe
from stillroom.runs.report import Decision
from stillroom.targets.vocabulary import Vocabulary, require_same

# How many prompts are rendered to learn how long they are.
_SAMPLED_PROMPTS = 1000
# A store of hidden states may take this much of the free disk before fewer numbers a token are kept.
_STORE_SHARE_OF_FREE_DISK = 0.25
_STORE_MOST_BYTES = 50e9
_MEMORY_SHARE = 0.7
# A step is sorted by length before it is cut into micro-batches, so smaller ones pad less; a CPU gains nothing from larger ones.
_CPU_MICRO_BATCH = 64
_DEFAULT_EPOCHS = 3.0
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentPlan:
    """What the student will be; `description` only where it is a model on disk."""

    kind: str
    config: PretrainedConfig
    shape: ModelShape
    parameters: int
    trainable: int
    vocabulary: Vocabulary
    description: ModelDescription | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A recipe with everything that its stages need and that costs nothing to make."""

    recipe: Recipe
    plan: Plan
    verdict: Verdict
    teacher: ModelDescription | EndpointTeacher
    teacher_vocabulary: Vocabulary
    student: StudentPlan
    tokenizer: PreTrainedTokenizerFast
    renderer: Renderer
    inputs: Inputs
    objective: Objective

    @property
    def prompts(self) -> LoadedPrompts:
        """What the teacher is asked."""
        return self.inputs.prompts

    @property
    def context_tokens(self) -> int:
        """The longest sequence that both models take, as far as is known."""
        lengths = [length for length in (_context_length(self.teacher), self.student.shape.context_length) if length is not None]
        return min(lengths, default=1 << 30)

    def comes_with_answer(self, prompt: Prompt) -> bool:
        """Whether this prompt's answer is given (or should be), so that the teacher is not asked for it."""
        return _comes_with_answer(self.recipe, self.renderer, prompt)

    @property
    def local_teacher(self) -> ModelDescription:
        """The teacher, where its weights are here: what asks for it has been refused otherwise."""
        assert isinstance(self.teacher, ModelDescription), "no weights of this teacher are here"
        return self.teacher

    @property
    def endpoint_teacher(self) -> EndpointTeacher | None:
        return self.teacher if isinstance(self.teacher, EndpointTeacher) else None

    @property
    def device(self) -> torch.device:
        return torch.device(self.plan.hardware.device)

    @property
    def teacher_device(self) -> torch.device:
        """Of this process's teacher."""
        assert self.plan.hardware.teacher_device is not None, "no weights of this teacher are here"
        kind, _, index = self.plan.hardware.teacher_device.partition(":")
        return torch.device(kind, _require_index(int(index) + launched().local_rank)) if index else torch.device(kind)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.plan.hardware.dtype)  # type: ignore[no-any-return]

    @property
    def teacher_dtype(self) -> torch.dtype:
        """Of the teacher's products; where its layers are kept in eight bits, too."""
        assert self.plan.hardware.teacher_dtype is not None, "no weights of this teacher are here"
        return product_dtype(self.plan.hardware.teacher_dtype)


def product_dtype(teacher_dtype: str) -> torch.dtype:
    """What a teacher that computes in `teacher_dtype` multiplies in."""
    return torch.float32 if teacher_dtype == "float32" else torch.bfloat16


def plan(recipe: Recipe, *, out: Path | None = None, cards: bool = False) -> Plan:
    """The plan alone, by what the store of a run in `out` already has; with `cards`, also which graphics cards it would fit on, which takes some seconds more."""
    return prepare(recipe, out=out, cards=cards).plan


def prepare(recipe: Recipe, *, out: Path | None = None, planned: Plan | None = None, gate: bool = False, cards: bool = False) -> Prepared:
    """Checks everything and decides everything that a run depends on. Raises StillroomError for whatever would make the run fail later.

    `out` is where the run will be, so that the right disk is looked at; None: where the process is. `planned` is a plan made before: its decisions
    stand, so that a run that is resumed goes on as it began. With `gate`, the terms must allow learning from the teacher, or EntitlementDenied
    or EntitlementUnknown is raised before anything else is looked at, and again after a model was fetched whose card says what was not known.
    """
    # Of a teacher that cannot be asked, and of a use that is no run, there is nothing to plan: the gate says why.
    no_plan = (recipe.terms.access != "weights" and recipe.teacher.endpoint is None) or recipe.intent.purpose == "evaluate"
    decided = entitled if gate or no_plan else decide_recipe
    verdict, sources = decided(recipe), sources_of(recipe)
    loggers_chosen(recipe.logging)
    teacher = _teacher(recipe, out)
    if planned is not None and isinstance(teacher, ModelDescription):
        _require_same_teacher(planned, teacher)
    base = _base(recipe)
    tokenizer, teacher_vocabulary = _tokens_of(recipe, teacher, base)
    student = _plan_student(recipe, teacher, tokenizer, teacher_vocabulary, base)
    renderer = Renderer(tokenizer)
    inputs = Inputs(recipe)
    prompts, _ = inputs.prompts, inputs.pairs  # and the items before them: what is wrong with any of them is said before anything is spent
    if sources_of(recipe) != sources:  # a card came with what was fetched
        verdict = decided(recipe)
    if planned is not None:
        _require_same_prompts(planned, prompts)
    objective = objective_of(recipe.objective)
    for match in objective.state_matches:
        assert isinstance(teacher, ModelDescription), "terms on hidden states have been refused"
        match.check_widths(student.shape.width, teacher.shape.width)
    if planned is None:
        planned = _Planner(recipe, out or Path.cwd(), teacher, student, teacher_vocabulary, renderer, inputs, objective).plan(verdict, cards=cards)
    return Prepared(
        recipe=recipe,
        plan=planned,
        verdict=verdict,
        teacher=teacher,
        teacher_vocabulary=teacher_vocabulary,
        student=student,
        tokenizer=tokenizer,
        renderer=renderer,
        inputs=inputs,
        objective=objective,
    )


@dataclass(frozen=True, slots=True)
class _Base:
    """The model that the student is made from."""

    description: ModelDescription
    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary


def _teacher(recipe: Recipe, out: Path | None) -> ModelDescription | EndpointTeacher:
    if recipe.teacher.endpoint is None:
        return describe(recipe.teacher.source, recipe.teacher.revision)
    require_askable(recipe)
    return endpoint_teacher(recipe, out)


def _base(recipe: Recipe) -> _Base | None:
    """None where the student is no model that exists."""
    section = recipe.student
    if section.model is None:
        return None
    description = describe(section.model, section.revision)
    tokenizer = load_tokenizer(section.model, section.revision)
    return _Base(description, tokenizer, vocabulary_of(tokenizer, description.shape.rows, description.end_ids))


def _tokens_of(recipe: Recipe, teacher: ModelDescription | EndpointTeacher, base: _Base | None) -> tuple[PreTrainedTokenizerFast, Vocabulary]:
    """The tokenizer that the teacher's text is in, with its vocabulary. Behind an endpoint that is the one that the recipe names, else the student's,
    in whose tokens the teacher's text is then written.
    """
    section = recipe.teacher
    if isinstance(teacher, ModelDescription):
        tokenizer = load_tokenizer(section.source, section.revision)
        return tokenizer, vocabulary_of(tokenizer, teacher.shape.rows, teacher.end_ids)
    if section.tokenizer is not None:
        tokenizer = load_tokenizer(section.tokenizer)
        rows = 1 + max([*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder])
        return tokenizer, vocabulary_of(tokenizer, rows)
    assert base is not None, "the recipe has been refused otherwise"
    return base.tokenizer, base.vocabulary


def _context_length(teacher: ModelDescription | EndpointTeacher) -> int | None:
    return teacher.shape.context_length if isinstance(teacher, ModelDescription) else None


def _end_ids(teacher: ModelDescription | EndpointTeacher) -> tuple[int, ...]:
    """At which the teacher's own settings say that an answer ends; an endpoint says nothing of it."""
    return teacher.end_ids if isinstance(teacher, ModelDescription) else ()


def _require_same_teacher(planned: Plan, teacher: ModelDescription) -> None:
    if planned.teacher.weights_sha256 != teacher.weights_sha256:
        raise StoreError(
            "store-mismatch",
            found=f"a teacher whose weights have SHA-256 {teacher.weights_sha256}",
            expected=f"{planned.teacher.weights_sha256}, the weights that this run was planned with",
            why="a student of two teachers could be told from neither",
            do="Put the teacher back as it was, or run in a new directory.",
        )


def _require_same_prompts(planned: Plan, prompts: LoadedPrompts) -> None:
    if planned.prompts.sha256 != prompts.sha256:
        raise DataError(
            "prompts-changed",
            found=f"{len(prompts.prompts)} prompts in {prompts.source} whose SHA-256 is {prompts.sha256}",
            expected=f"{planned.prompts.count} with {planned.prompts.sha256}, the prompts that this run was planned with",
            why="the answers that are there already are answers to those",
            do="Put the prompts back as they were, or run in a new directory.",
        )


def _comes_with_answer(recipe: Recipe, renderer: Renderer, prompt: Prompt) -> bool:
    match recipe.prompts.answers:
        case "teacher":
            return False
        case "given":
            return True
        case "mixed":
            return prompt.answer is not None or renderer.ends_with_answer(prompt)


def objective_of(section: ObjectiveSection) -> Objective:
    """The recipe's objective as the objectives room has it."""
    terms = []
    for term in section.terms:
        terms.append(WeightedTerm(divergence=(DIVERGENCES | STATE_MATCHES)[term.divergence](**term.arguments), weight=term.weight))
    return Objective(
        terms=tuple(terms), match_temperature=section.match_temperature, scale_by_temperature_squared=section.scale_by_temperature_squared
    )


def _plan_student(
    recipe: Recipe,
    teacher: ModelDescription | EndpointTeacher,
    tokenizer: PreTrainedTokenizerFast,
    teacher_vocabulary: Vocabulary,
    base: _Base | None,
) -> StudentPlan:
    section = recipe.student
    if base is not None:
        description, vocabulary = base.description, base.vocabulary
        require_same(teacher_vocabulary, vocabulary)
        return StudentPlan(
            kind=description.ref.kind,
            config=description.config,
            shape=description.shape,
            parameters=description.parameters,
            trainable=_trainable(recipe, skeleton_of(description.config)) if section.lora is not None else description.parameters,
            vocabulary=vocabulary,
            description=description,
        )
    if section.from_scratch is not None:
        shape = section.from_scratch
        config: PretrainedConfig = config_from_scratch(
            layers=shape.layers,
            width=shape.width,
            heads=shape.heads,
            feed_forward=shape.feed_forward,
            rows=teacher_vocabulary.size,
            context_length=_context_length(teacher) or tokenizer.model_max_length,
            end_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
        )
        kind = "from_scratch"
    else:
        assert section.from_teacher is not None
        assert isinstance(teacher, ModelDescription), "layers of an endpoint have been refused"
        config = config_from_teacher(teacher.config, section.from_teacher.layers)
        kind = "from_teacher"
    skeleton = skeleton_of(config)
    found = shape_of(skeleton)
    vocabulary = vocabulary_of(tokenizer, found.rows, _end_ids(teacher))
    parameters = count_parameters(skeleton)
    return StudentPlan(
        kind=kind,
        config=config,
        shape=found,
        parameters=parameters,
        trainable=_trainable(recipe, skeleton) if section.lora is not None else parameters,
        vocabulary=vocabulary,
        description=None,
    )


def lora_of(recipe: Recipe) -> LoraSettings | None:
    """The recipe's adapters as the models room has them."""
    section = recipe.student.lora
    if section is None:
        return None
    targets = None if section.targets == "all-linear" else section.targets
    return LoraSettings(rank=section.rank, alpha=section.alpha, targets=targets, head=section.head, seed=recipe.seed)


def _trainable(recipe: Recipe, skeleton: PreTrainedModel) -> int:
    """How many parameters adapters have; raises where they do not fit the model. The skeleton is used up."""
    lora = lora_of(recipe)
    assert lora is not None
    return sum(parameter.numel() for parameter in add_lora(skeleton, lora).parameters() if parameter.requires_grad)


class _Planner:
    """Fills in the plan, section by section; every choice leaves a Decision."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        teacher: ModelDescription | EndpointTeacher,
        student: StudentPlan,
        vocabulary: Vocabulary,
        renderer: Renderer,
        inputs: Inputs,
        objective: Objective,
    ) -> None:
        self.recipe, self.out, self.teacher, self.student, self.vocabulary = recipe, out, teacher, student, vocabulary
        self.renderer, self.inputs, self.prompts, self.objective = renderer, inputs, inputs.prompts, objective
        self.decisions: list[Decision] = []
        self.warnings: list[str] = []
        self.prompt_lengths: list[int] = []
        self.answer_lengths: list[int] = []

    def plan(self, verdict: Verdict, *, cards: bool) -> Plan:
        """The whole page."""
        recipe = self.recipe
        facts = self._prompts()
        signal = self._signal(facts)
        curation = self._curation()
        redaction = self._redaction(signal)
        steps, epochs = self._length(facts.count)
        device, dtype = self._device(), self._dtype()
        if recipe.hardware.compile:
            require_compiler(torch.device(device))
        self._adapters()
        hardware = self._hardware(device, dtype, signal)
        hardware, found = self._fitted(self._workload(facts, signal, hardware, steps), hardware)
        disk = self._disk_bytes(facts, signal)
        return Plan(
            recipe_name=recipe.name,
            recipe_sha256=recipe.sha256,
            teacher=_facts_of_teacher(self.teacher),
            student=self._student_facts(),
            vocabulary=VocabularyFacts(
                size=self.vocabulary.size,
                teacher_rows=self.teacher.shape.rows if isinstance(self.teacher, ModelDescription) else None,
                student_rows=self.student.shape.rows,
                fingerprint=self.vocabulary.fingerprint,
            ),
            terms=terms_of(recipe, verdict),
            prompts=facts,
            signal=signal,
            curation=curation,
            redaction=redaction,
            collection=self._collection(signal),
            objective=_described(self.objective),
            steps=steps,
            epochs=epochs,
            hardware=hardware,
            estimate=Estimate(
                seconds={stage: round(seconds, 1) for stage, seconds in found.seconds.items()},
                peak_memory_bytes=found.peak_memory_bytes,
                peak_bytes={stage: round(peak) for stage, peak in found.peak_bytes.items()},
                memory_available_bytes=_memory_available(device),
                disk_bytes=disk,
                disk_free_bytes=durable.free_bytes(self.out),
                how=found.how,
            ),
            cards=self._cards(facts, signal, hardware, steps) if cards else [],
            decisions=self.decisions,
            warnings=self.warnings,
        )

    def _decided(self, what: str, chosen: str, why: str, *, degraded: bool = False) -> None:
        self.decisions.append(Decision(what=what, chosen=chosen, why=why, degraded=degraded))

    # --- prompts and signal -----------------------------------------------------------------------------------------------------------

    def _prompts(self) -> PromptFacts:
        sample = spread(self.prompts.prompts, _SAMPLED_PROMPTS)
        lengths = self.prompt_lengths = [len(self.renderer.prompt_ids(prompt)) for prompt in sample]
        longest = max(lengths)
        context = _context_length(self.teacher)
        if context is not None and min(lengths) + 1 >= context:
            raise DataError(
                "sequence-too-long",
                found=f"prompts of at least {min(lengths)} tokens",
                expected=f"room for an answer in the teacher's context of {context}",
                do="Shorten the prompts.",
            )
        lossy = sum(self.renderer.loses_text(prompt) for prompt in spread(sample, 200))
        if lossy:
            self.warnings.append(f"in {lossy} of {min(200, len(sample))} prompts looked at, some text is lost by the teacher's tokenizer")
        self.answer_lengths, why = self._answer_lengths()
        return PromptFacts(
            count=len(self.prompts.prompts),
            sha256=self.prompts.sha256,
            duplicates_dropped=self.prompts.duplicates,
            tokens_mean=sum(lengths) / len(lengths),
            tokens_longest=longest,
            answer_tokens_assumed=sum(self.answer_lengths) / len(self.answer_lengths),
            answer_tokens_why=why,
        )

    def _answer_lengths(self) -> tuple[list[int], str]:
        most, items = self.recipe.generation.max_new_tokens, self.inputs.items
        given = [prompt for prompt in spread(self.prompts.prompts, 200) if prompt.answer is not None or self.renderer.ends_with_answer(prompt)]
        if given:
            return self._lengths_of(given, most), "the mean of the answers given with the prompts"
        answered = [item for item in spread(items, 200) if item.answer is not None]
        if answered:
            return self._lengths_of(answered, most), "the mean of the evaluation items' answers"
        return [most], "the most that generation.max_new_tokens allows: nothing is known of the answers yet"

    def _lengths_of(self, prompts: Sequence[Prompt], most: int) -> list[int]:
        return [min(most, len(self.renderer.sequence(prompt, prompt.answer).scored_rows)) for prompt in prompts]

    def _signal(self, facts: PromptFacts) -> Signal:
        return self._asked_signal(self.teacher, facts) if isinstance(self.teacher, EndpointTeacher) else self._local_signal(self.teacher, facts)

    def _asked_signal(self, teacher: EndpointTeacher, facts: PromptFacts) -> Signal:
        """What the stored probe proved, as far as the objective can use it."""
        section = self.recipe.targets
        possible = obtainable(self.recipe, teacher, self.vocabulary.size)
        require_signal(section.kind, possible, self.objective.reads_text_alone)
        text = section.kind == "text" or (section.kind == "auto" and self.objective.reads_text_alone)
        kind: Literal["text", "top_k"] = "text" if text else possible.kind
        why = "the recipe asks for it" if section.kind == "text" else "the objective reads the teacher's text alone" if text else possible.why
        if section.kind == "auto":
            self._decided("targets.kind", kind, why)
        self.objective.check(kind, section.target_temperature)
        if kind == "top_k" and possible.k < section.k:
            self._decided("targets.k", str(possible.k), f"of {section.k} asked for: {possible.why}", degraded=possible.k < self.vocabulary.size)
        return Signal(
            kind=kind,
            k=possible.k if kind == "top_k" else 0,
            draws=0,
            state_dtype=None,
            target_temperature=section.target_temperature,
            live=False,
            bytes_per_token=8 * possible.k + 4 if kind == "top_k" else 0,
            why=why,
        )

    def _collection(self, signal: Signal) -> CollectionFacts | None:
        """What the requests can cost at the worst, beside what they may, and what a pilot expects."""
        teacher = self.teacher
        if not isinstance(teacher, EndpointTeacher):
            return None
        prompts = asked_of(self.recipe, self.renderer, self.prompts.prompts)
        asked = (*prompts, *self.inputs.items)
        each, _ = worst_cases(self.recipe, teacher, self.renderer, signal, [self.inputs.sent(prompt) for prompt in spread(asked, 200)])
        most = Amount(each.tokens * len(asked), each.money * len(asked))
        if teacher.price is not None and (warning := teacher.price.age_warning(clock.now().date())) is not None:
            self.warnings.append(warning)
        pilot, why = _pilot_of(self.recipe, teacher, self.renderer, self.inputs, signal)
        self._warn_of_caps(teacher, most, pilot)
        return CollectionFacts(
            prompts=len(prompts),
            items=len(self.inputs.items),
            most_tokens=most.tokens,
            most_money=None if teacher.price is None else f"{in_units(most.money).normalize():f}",
            cap_tokens=teacher.caps.tokens,
            cap_money=None if teacher.caps.money is None else f"{in_units(teacher.caps.money).normalize():f}",
            currency=None if teacher.price is None else teacher.price.currency,
            prices_as_of=None if teacher.price is None else teacher.price.as_of.isoformat(),
            pilot=pilot,
            no_pilot=why,
        )

    def _warn_of_caps(self, teacher: EndpointTeacher, most: Amount, pilot: Pilot | None) -> None:
        if pilot is not None and not pilot.suffices(teacher.caps):
            self.warnings.append(
                f"the cap may be reached before all is answered: by the pilot, {caps_needed(pilot)} would do; the run goes on when it is raised"
            )
        elif pilot is None and not most.fits(teacher.caps):
            self.warnings.append("the cap may be reached before all is answered, at the worst; it can be raised, and the run goes on")

    def _curation(self) -> CurationFacts:
        """Which steps will run; what is asked in vain is said before it is paid for."""
        found = chosen(self.recipe, self.inputs)
        if self.recipe.curation.steps == "auto":
            self._decided("curation.steps", ", ".join(found.facts.steps) or "none", found.why)
        if isinstance(self.teacher, EndpointTeacher) and self.recipe.prompts.answers == "teacher":
            hit, looked_at = asked_in_vain(found, self.prompts.prompts)
            if hit:
                self.warnings.append(
                    f"{hit} of {looked_at} prompts looked at have an evaluation item in them: their answers will be paid for and left out"
                )
        return found.facts

    def _redaction(self, signal: Signal) -> RedactionFacts | None:
        mode, found = self.inputs.mode, self.inputs.redaction
        if mode == "restored" and signal.kind == "top_k":
            raise ModelError(
                "targets-unsupported",
                found="collection.redaction: restored, and targets of kind top_k",
                expected="text, or placeholders",
                why="the endpoint's log-probabilities are those of placeholders, and not of what is put back in their place",
                do="Set collection.redaction to placeholders or off; or learn from the text: targets.kind: text, objective.terms: [{divergence: cross_entropy}].",
            )
        if found is not None and found.kinds:
            kinds = ", ".join(f"{one.places} {one.kind} in {one.texts} texts" for one in found.kinds)
            self._decided("collection.redaction", mode, f"replaced before anything is sent: {kinds}")
        if vain := self.inputs.secrets_in_answers_alone():
            self.warnings.append(
                f"in {vain} of {len(self.inputs.items)} evaluation items the expected answer has a secret that the prompt has not: its placeholder is never the right answer"
            )
        return found

    def _local_signal(self, teacher: ModelDescription, facts: PromptFacts) -> Signal:
        section = self.recipe.targets
        # Bytes a token: of a hidden state its numbers, of int8 with their scale; eight for a kept id with its log-probability, four for the tail.
        width = teacher.shape.width
        sizes = {
            "text": 0,
            "drawn": _drawn_bytes(section.draws),
            "hidden": {"bfloat16": 2 * width, "float32": 4 * width, "int8": width + 4}[section.state_dtype],
            "top_k": 8 * min(section.k, self.vocabulary.size) + 4,
            "full": 4 * self.vocabulary.size,
        }
        kind, why = self._kind(facts, sizes)
        live = section.live or kind == "full"
        if kind == "full" and not section.live:
            self._decided("targets", "live", "full distributions are never stored", degraded=True)
        self.objective.check(kind, section.target_temperature)
        return Signal(
            kind=kind,  # type: ignore[arg-type]
            k=min(section.k, self.vocabulary.size) if kind == "top_k" else 0,
            draws=section.draws if kind == "drawn" else 0,
            state_dtype=section.state_dtype if kind == "hidden" else None,
            target_temperature=section.target_temperature,
            live=live,
            bytes_per_token=sizes[kind],
            why=why,
        )

    def _kind(self, facts: PromptFacts, sizes: dict[str, int]) -> tuple[str, str]:
        section = self.recipe.targets
        if section.kind != "auto":
            return section.kind, "the recipe asks for it"
        possible = self.objective.required_kinds
        if self.objective.reads_text_alone:
            return "text", "the objective reads the teacher's text alone"
        tokens = facts.count * facts.answer_tokens_assumed
        room = min(_STORE_MOST_BYTES, _STORE_SHARE_OF_FREE_DISK * durable.free_bytes(self.out))
        if "hidden" in possible and (section.live or sizes["hidden"] * tokens <= room):
            chosen, why = "hidden", f"hidden states and the teacher's head give the whole distribution at {sizes['hidden']} bytes a token"
        else:
            unsoftened = section.target_temperature == self.objective.match_temperature
            chosen = "drawn" if "drawn" in possible and unsoftened and not section.live else "top_k"
            why = f"hidden states would take {sizes['hidden'] * tokens / 1e9:.1f} GB of the {room / 1e9:.1f} GB allowed"
            if chosen == "drawn":
                why += "; the gradient from drawn ids is that of the whole distribution on average"
        self._decided("targets.kind", chosen, why)
        return chosen, why

    def _length(self, prompts: int) -> tuple[int, float]:
        training = self.recipe.training
        records = max(1, prompts - int(training.validation_fraction * prompts))
        if training.steps is not None:
            return training.steps, training.steps * training.sequences_per_step / records
        epochs = training.epochs or _DEFAULT_EPOCHS
        return max(1, round(epochs * records / training.sequences_per_step)), epochs

    def _adapters(self) -> None:
        lora = self.recipe.student.lora
        if lora is None:
            return
        learned = f"{self.student.trainable:,} parameters are learned beside {self.student.parameters:,} that stay as they are"
        kept = "student/ has the adapter alone, and what is evaluated is the adapter merged into its base"
        self._decided("student.lora", f"rank {lora.rank}", f"{learned}; {kept if lora.save == 'adapter' else 'student/ has both merged'}")

    # --- hardware ---------------------------------------------------------------------------------------------------------------------

    def _teacher_device(self, device: str) -> str | None:
        if isinstance(self.teacher, EndpointTeacher):
            return None
        asked = self.recipe.hardware.teacher_device
        if asked == "auto":
            return device
        kind, _, index = asked.partition(":")
        self._require_device(kind, "hardware.teacher_device")
        if index:
            _require_index(int(index))
        return asked

    def _device(self) -> str:
        asked = self.recipe.hardware.device
        return self._require_device(asked, "hardware.device")

    def _require_device(self, asked: str, key: str) -> str:
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if asked == "auto":
            return next(name for name in ("cuda", "mps", "cpu") if there[name])
        if not there[asked]:
            raise ResourceError(
                "device-unavailable",
                found=f"no {asked} device that PyTorch {torch.__version__} can use",
                expected=f"one of {', '.join(name for name in there if there[name])}",
                do=f"Set {key} to one of these, or to auto.",
            )
        return asked

    def _dtype(self) -> str:
        asked = self.recipe.hardware.dtype
        if asked != "auto":
            return asked
        return "bfloat16" if self._device() == "cuda" and torch.cuda.is_bf16_supported() else "float32"

    def _teacher_dtype(self, dtype: str) -> Literal["float32", "bfloat16", "int8"] | None:
        if isinstance(self.teacher, EndpointTeacher):
            return None
        asked = self.recipe.teacher.dtype
        return ("bfloat16" if dtype == "bfloat16" else "float32") if asked == "auto" else asked

    def _packing(self, device: str, dtype: str, teacher_dtype: str | None, signal: Signal) -> list[Literal["student", "teacher"]]:
        """Whose sequences can be laid end to end, tried on copies of two layers with weights that mean nothing."""
        asked = self.recipe.training.packing
        if asked == "off":
            return []
        place, arithmetic = torch.device(device), getattr(torch, dtype)
        tried = {"student": why_not_packed(self._outline(self.student), torch.float32, arithmetic, place)}
        if signal.kind != "text" and isinstance(self.teacher, ModelDescription) and teacher_dtype is not None:
            own = product_dtype(teacher_dtype)
            tried["teacher"] = why_not_packed(self._outline(self.teacher), own, own, place)
        faults = {whose: why for whose, why in tried.items() if why is not None}
        if faults and asked == "on":
            raise cannot_pack(*next(iter(faults.items())))
        chosen: list[Literal["student", "teacher"]] = [whose for whose in ("student", "teacher") if whose in tried and whose not in faults]
        named = " and ".join(chosen) or "nobody"
        if faults:
            said = "; ".join(f"sequences of the {whose} are padded: {why}" for whose, why in faults.items())
            self._decided("training.packing", named, said, degraded=True)
        else:
            self._decided("training.packing", named, "sequences laid end to end give what each gives alone, on copies of two layers")
        return chosen

    def _outline(self, model: ModelDescription | StudentPlan) -> Outline:
        return Outline(config=model.config, shape=model.shape, parameters=model.parameters)

    def _hardware(self, device: str, dtype: str, signal: Signal) -> Hardware:
        threads = self.recipe.hardware.threads
        per_step = self.recipe.training.sequences_per_step
        asked = self.recipe.training.micro_batch
        teacher_dtype = self._teacher_dtype(dtype)
        return Hardware(
            device=device,
            teacher_device=self._teacher_device(device),
            dtype=dtype,
            teacher_dtype=teacher_dtype,
            packing=self._packing(device, dtype, teacher_dtype, signal),
            threads=threads if threads != "auto" else torch.get_num_threads(),
            micro_batch=min(asked, per_step) if asked != "auto" else min(per_step, _CPU_MICRO_BATCH) if device == "cpu" else per_step,
            teacher_at_once=256,
            why="the recipe asks for it" if asked != "auto" else "the largest micro-batch that fits, on a CPU at most 64",
        )

    def _fitted(self, work: Workload, hardware: Hardware) -> tuple[Hardware, WorkEstimate]:
        """Halves the micro-batch until the estimate fits into memory, unless the recipe sets it."""
        available = _memory_available(hardware.device)
        measured = measure(work)
        while True:
            found = estimate(work, measured)
            fits = found.peak_memory_bytes <= _MEMORY_SHARE * available
            if fits or self.recipe.training.micro_batch != "auto" or work.micro_batch == 1:
                break
            work = replace(work, micro_batch=work.micro_batch // 2)
        if not fits:
            self.warnings.append(f"about {found.peak_memory_bytes / 1e9:.1f} GB of memory will be needed, and {available / 1e9:.1f} GB are available")
        if self.recipe.training.micro_batch == "auto":
            self._decided("training.micro_batch", str(work.micro_batch), "the largest that fits into memory by the estimate")
        return hardware.model_copy(update={"micro_batch": work.micro_batch}), found

    def _cards(self, facts: PromptFacts, signal: Signal, hardware: Hardware, steps: int) -> list[CardFit]:
        """The same run on a card, in the arithmetic that `auto` means there; the teacher shares the card with the student."""
        dtype = "bfloat16" if self.recipe.hardware.dtype == "auto" else hardware.dtype
        there = {"device": "cuda", "dtype": dtype, "teacher_dtype": self._teacher_dtype(dtype)}
        work = self._workload(facts, signal, hardware.model_copy(update=there), steps)
        return [CardFit(**asdict(fit)) for fit in fits(work)]

    # --- sizes ------------------------------------------------------------------------------------------------------------------------

    def _workload(self, facts: PromptFacts, signal: Signal, hardware: Hardware, steps: int) -> Workload:
        recipe = self.recipe
        training = recipe.training
        dtype: torch.dtype = getattr(torch, hardware.dtype)
        teacher = self.teacher if isinstance(self.teacher, ModelDescription) else None
        teacher_dtype = product_dtype(hardware.teacher_dtype or "float32")
        return Workload(
            teacher=self._outline(teacher) if teacher is not None else None,
            student=self._outline(self.student),
            trainable=self.student.trainable,
            lora=lora_of(recipe),
            optimiser_offload=training.optimiser_offload,
            mapped_bytes=0 if teacher is None or teacher.stored_dtype == _SAFETENSORS_NAMES.get(teacher_dtype) else teacher.weight_bytes,
            size=self.vocabulary.size,
            objective=self.objective,
            device=torch.device(hardware.device),
            dtype=dtype,
            teacher_dtype=teacher_dtype,
            teacher_int8=hardware.teacher_dtype == "int8",
            packing=tuple(hardware.packing),
            recomputed=training.gradient_checkpointing,
            threads=hardware.threads,
            prompts=facts.count,
            prompt_tokens=tuple(self.prompt_lengths),
            answer_tokens=tuple(self.answer_lengths),
            max_new_tokens=recipe.generation.max_new_tokens,
            written=recipe.prompts.answers != "given",
            sampling_temperature=recipe.generation.sampling_temperature,
            teacher_at_once=hardware.teacher_at_once,
            target_kind=signal.kind,
            k=signal.k or signal.draws,
            live=signal.live,
            row_bytes=signal.bytes_per_token,
            from_teacher=recipe.student.from_teacher is not None,
            steps=steps,
            sequences_per_step=training.sequences_per_step,
            micro_batch=hardware.micro_batch,
            length_window=training.length_window,
            rows_per_chunk=training.rows_per_chunk,
            validation_fraction=training.validation_fraction,
            validate_every=training.validate_every,
            checkpoint_every=training.checkpoint_every,
            label_only=self._label_only(),
            items=len(self.inputs.items),
            fidelity_prompts=recipe.evaluation.fidelity_prompts,
        )

    def _label_only(self) -> LabelOnlyWork | None:
        section = self.recipe.evaluation.label_only
        if section is None:
            return None
        return LabelOnlyWork(
            pairs=len(self.inputs.pairs),
            validation_fraction=section.validation_fraction,
            validate_every=section.validate_every,
            patience=section.patience,
        )

    def _student_facts(self) -> ModelFacts:
        if self.student.description is not None:
            return _facts_of_description(self.student.description).model_copy(update={"trainable": self.student.trainable})
        return ModelFacts(
            source=self.student.kind,
            kind=self.student.kind,
            architecture=(self.student.config.architectures or [type(self.student.config).__name__.replace("Config", "ForCausalLM")])[0],
            parameters=self.student.parameters,
            trainable=self.student.trainable,
            bytes=4 * self.student.parameters,
            layers=self.student.shape.layers,
            width=self.student.shape.width,
            context_tokens=self.student.shape.context_length or 0,
            rows=self.student.shape.rows,
            licence=None,
            weights_sha256=None,
        )

    def _disk_bytes(self, facts: PromptFacts, signal: Signal) -> int:
        tokens = facts.count * facts.answer_tokens_assumed
        store = 0 if signal.live else tokens * signal.bytes_per_token
        sequences = facts.count * (facts.tokens_mean + facts.answer_tokens_assumed) * 4
        # Two checkpoints while one replaces the other (what is learned, with two moments), and the student itself, if only for its evaluation.
        weights = 2 * 12 * self.student.trainable + 4 * self.student.parameters
        return int(store + sequences + weights * (2 if self.recipe.evaluation.label_only else 1) + 3000 * facts.count)


def spread(values: Sequence[Prompt], most: int) -> list[Prompt]:
    """At most `most` of `values`, evenly spaced."""
    if len(values) <= most:
        return list(values)
    return [values[index * len(values) // most] for index in range(most)]


def _drawn_bytes(draws: int) -> int:
    """Of a row of drawn targets, everything counted: what benchmarks/results/*-store.json has for 25, 50 and 100 draws, in round numbers."""
    return math.ceil(20.0 * math.pow(draws / 50, 0.75))


def _require_index(index: int) -> int:
    """`index`, if there is a CUDA device of that number."""
    if index >= torch.cuda.device_count():
        raise ResourceError(
            "device-unavailable",
            found=f"no cuda:{index} among {torch.cuda.device_count()} CUDA devices",
            expected="a device for the teacher of every process",
            do="Start fewer processes, or set hardware.teacher_device to a device that is there.",
        )
    return index


def _memory_available(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def _facts_of_teacher(teacher: ModelDescription | EndpointTeacher) -> ModelFacts:
    if isinstance(teacher, ModelDescription):
        return _facts_of_description(teacher)
    return ModelFacts(
        source=teacher.source,
        kind=teacher.ref.kind,
        architecture=None,
        parameters=None,
        bytes=None,
        layers=None,
        width=None,
        context_tokens=None,
        rows=None,
        licence=teacher.licence,
        weights_sha256=None,
    )


def asking_of(recipe: Recipe, teacher: EndpointTeacher, renderer: Renderer) -> Asking:
    """How this recipe asks: where the teacher's tokens are known, the completions route is sent them as they are."""
    prompt_ids = renderer.prompt_ids if recipe.teacher.tokenizer is not None else None
    return Asking(teacher.endpoint, recipe.generation.max_new_tokens, prompt_ids)


def worst_cases(recipe: Recipe, teacher: EndpointTeacher, renderer: Renderer, signal: Signal, prompts: Sequence[Prompt]) -> tuple[Amount, Amount]:
    """The most that asking one of these, as they are sent, can cost: on average, and of all."""
    asking = asking_of(recipe, teacher, renderer)
    worst = [worst_case(collecting_call(recipe, asking, signal, prompt), teacher.price) for prompt in prompts]
    tokens, money = [one.tokens for one in worst], [one.money for one in worst]
    mean = Amount(math.ceil(sum(tokens) / max(1, len(worst))), math.ceil(sum(money) / max(1, len(worst))))
    return mean, Amount(max(tokens, default=0), max(money, default=0))


def asked_of(recipe: Recipe, renderer: Renderer, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those that come without an answer."""
    return [prompt for prompt in prompts if not _comes_with_answer(recipe, renderer, prompt)]


def collecting_call(recipe: Recipe, asking: Asking, signal: Signal, prompt: Prompt) -> Call:
    """The call that gives the answer to learn from."""
    return asking.call(prompt, temperature=recipe.generation.sampling_temperature, top_logprobs=signal.k if signal.kind == "top_k" else None)


def pilot_of(prepared: Prepared) -> tuple[Pilot | None, str | None]:
    """The stored pilot of this very collection; else why there is none."""
    teacher = prepared.endpoint_teacher
    assert teacher is not None, "a pilot is of an endpoint"
    return _pilot_of(prepared.recipe, teacher, prepared.renderer, prepared.inputs, prepared.plan.signal)


def _pilot_of(recipe: Recipe, teacher: EndpointTeacher, renderer: Renderer, inputs: Inputs, signal: Signal) -> tuple[Pilot | None, str | None]:
    if recipe.prompts.answers == "given":
        return None, "the answers are given"
    pilot = teacher.pilot
    if pilot is None:
        return None, "none was made"
    if pilot.asks != asks_of(recipe, teacher, renderer, inputs, signal, pilot.rows):
        return None, f"the one of {pilot.day} asked something else"
    if pilot.price != (teacher.price and teacher.price.id):
        return None, f"the one of {pilot.day} was reckoned at other prices; to make it again buys nothing"
    return pilot, None


def asks_of(recipe: Recipe, teacher: EndpointTeacher, renderer: Renderer, inputs: Inputs, signal: Signal, rows: int) -> str:
    """SHA-256 of what a run asks of its endpoint: the calls of the prompts that a pilot of so many rows draws, and all prompts and items."""
    asking = asking_of(recipe, teacher, renderer)
    calls = [
        collecting_call(recipe, asking, signal, prompt).key
        for prompt in map(inputs.sent, drawn(asked_of(recipe, renderer, inputs.prompts.prompts), rows, recipe.seed))
    ]
    return sha256_hex(canonical_json([inputs.prompts.sha256, [item.id for item in inputs.items], calls]))


def _facts_of_description(model: ModelDescription) -> ModelFacts:
    return ModelFacts(
        source=model.source,
        kind=model.ref.kind,
        architecture=model.architecture,
        parameters=model.parameters,
        bytes=model.weight_bytes,
        layers=model.shape.layers,
        width=model.shape.width,
        context_tokens=model.shape.context_length or 0,
        rows=model.shape.rows,
        licence=model.licence,
        weights_sha256=model.weights_sha256,
    )


def _described(objective: Objective) -> str:
    terms = " + ".join(f"{term.weight:g} x {term.divergence.name}" if term.weight != 1 else term.divergence.name for term in objective.terms)
    squared = ", times its square" if objective.scale_by_temperature_squared else ""
    return terms if objective.match_temperature == 1 else f"{terms} at match temperature {objective.match_temperature:g}{squared}"
