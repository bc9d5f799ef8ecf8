"""Curation in a run: from the recipe's section to steps, over what was collected, and into files that say what was left out and why.

    curation.json   each step with its settings, rows before and after it, and how many it dropped by reason; which evaluation items were hit
    curation.jsonl  every answer that was left out: by which step, why, and what shows it

A gate before the steps (`collecting`: there is no answer, or none that can be learned from) and one behind them (`last-gate`) are counted as steps too, so
that requested = accepted + all dropped can be followed down the list.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, assert_never

from stillroom.core import durable
from stillroom.core.errors import DataError
from stillroom.core.hashing import canonical_json
from stillroom.data import DROP_REASONS, Curated, Prompt
from stillroom.data.curation import Curation, Pipeline, Row, Step
from stillroom.data.decontamination import Decontamination, EvaluationItem, hits_by_item
from stillroom.data.duplicates import ExactDuplicates, NearDuplicates
from stillroom.data.filters import Emptiness, IdentityLeak, PromptEcho, Refusal, Truncation
from stillroom.data.json_schema import JsonSchema
from stillroom.data.verifiers import FunctionVerifier, RegexVerifier, SchemaVerifier
from stillroom.data.words import shortened, words
from stillroom.runs.directory import Run
from stillroom.runs.inputs import Inputs
from stillroom.runs.plan import CurationFacts
from stillroom.runs.recipe import CurationStep, Recipe, VerifierSection
from stillroom.runs.summaries import CurationSummary, HitItem, HitSplit, SiftedStep

SPLIT = "evaluation"
COLLECTING, LAST_GATE = "collecting", "last-gate"
_CHARACTERS = 200
# Of prompts that are looked at before they are asked.
_SAMPLED = 1000
# A question of fewer words may be asked in many conversations.
_QUESTION_WORDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The steps of a run, and why these."""

    pipeline: Pipeline
    why: str

    @property
    def facts(self) -> CurationFacts:
        """What the plan says of them."""
        return CurationFacts(steps=[step.name for step in self.pipeline.steps], sha256=self.pipeline.sha256, why=self.why)

    def require_planned(self, planned: CurationFacts | None) -> None:
        """Raises DataError 'curation-changed' where these are not the steps of the plan."""
        if planned is not None and planned.sha256 != self.pipeline.sha256:
            raise DataError(
                "curation-changed",
                found=f"steps, verifier's files and evaluation items whose SHA-256 is {self.pipeline.sha256}",
                expected=f"{planned.sha256}, those that this run was planned with",
                why="the report would speak of other rules than the recipe's author saw in the plan",
                do="Put the verifier's file, the schema and the evaluation items back as they were, or run in a new directory; with collection.store "
                "naming this run's requests.sqlite, nothing is bought twice.",
            )


def chosen(recipe: Recipe, inputs: Inputs) -> Chosen:
    """The recipe's steps over its evaluation items. A verifier's function is imported, and so its module run.

    Raises DataError 'verifier-invalid', and as `load_prompts` does.
    """
    names, why = _names(recipe)
    steps: list[Step] = [_step(name, inputs) for name in names]
    if recipe.curation.verifier is not None:
        # What decontamination hits is then said of answers that would have been learned from.
        place = names.index("decontamination") if "decontamination" in names else len(names)
        steps[place:place] = _verifiers(recipe.curation.verifier)
    return Chosen(pipeline=Pipeline(tuple(steps)), why=why)


def _names(recipe: Recipe) -> tuple[tuple[CurationStep, ...], str]:
    asked = recipe.curation.steps
    if asked != "auto":
        return asked, "the recipe asks for it"
    last: tuple[CurationStep, ...] = ("decontamination",) if recipe.evaluation.path is not None else ()
    items = "what is measured is kept out of what is learned" if last else "there are no evaluation items to keep out"
    if recipe.teacher.endpoint is None and recipe.prompts.answers == "teacher":
        return last, f"{items}; answers of weights that are here are looked at no further"
    return ("truncation", "emptiness", "refusal", "identity", *last), f"the answers come from elsewhere; {items}"


def _step(name: CurationStep, inputs: Inputs) -> Step:
    match name:
        case "truncation":
            return Truncation()
        case "emptiness":
            return Emptiness()
        case "refusal":
            return Refusal()
        case "identity":
            return IdentityLeak()
        case "prompt_echo":
            return PromptEcho()
        case "exact_duplicates":
            return ExactDuplicates()
        case "near_duplicates":
            return NearDuplicates()
        case "decontamination":
            return Decontamination(items=_items(inputs))
    assert_never(name)


def _items(inputs: Inputs) -> tuple[EvaluationItem, ...]:
    """The one split whose scores are reported, each item named by its place. The pairs that the label-only baseline is stopped on are not reported."""
    return tuple(EvaluationItem(split=SPLIT, id=str(number), prompt=_asked(item)) for number, item in enumerate(inputs.items, start=1))


def _asked(prompt: Prompt) -> str:
    """What the item is known by: its text, or the last question of a conversation; all turns where that is one like "Why?" which follows on others."""
    questions = [turn.content for turn in prompt.messages or () if turn.role == "user"]
    if len(questions) == 1 or (questions and len(words(questions[-1])) >= _QUESTION_WORDS):
        return questions[-1]
    return _told_whole(prompt)


def _told_whole(prompt: Prompt) -> str:
    """The text, or a conversation's turns one below the other."""
    return prompt.text if prompt.text is not None else "\n".join(turn.content for turn in prompt.messages or ())


def _verifiers(section: VerifierSection) -> list[Step]:
    steps: list[Step] = []
    if section.regex is not None:
        steps.append(RegexVerifier(pattern=section.regex))
    if section.forbidden is not None:
        steps.append(RegexVerifier(pattern=section.forbidden, forbid=True))
    if section.json_schema is not None:
        steps.append(SchemaVerifier(schema=JsonSchema.of(_schema(section.json_schema))))
    if section.function is not None:
        steps.append(FunctionVerifier.load(section.function))
    return steps


def _schema(named: str | dict[str, Any]) -> Any:
    if isinstance(named, dict):
        return named
    try:
        tree = json.loads(Path(named).expanduser().read_text(encoding="utf-8"))
        canonical_json(tree)  # what has no canonical form (NaN, half a surrogate pair) could not be told apart from another
        return tree
    except (OSError, TypeError, ValueError, RecursionError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(
            "verifier-invalid",
            found=f"the schema {named}: {found}",
            expected="a file with a JSON Schema",
            do="Mend curation.verifier.json_schema, or leave it out.",
        ) from error


def asked_in_vain(found: Chosen, prompts: Sequence[Prompt]) -> tuple[int, int]:
    """How many of a sample of the prompts have an evaluation item in them, so that whatever is answered will be left out; and how many were looked at."""
    every = max(1, len(prompts) // _SAMPLED)
    rows = [Row(key=prompt.id, prompt=prompt, answer="") for prompt in prompts[::every][:_SAMPLED]]
    against = tuple(step for step in found.pipeline.steps if isinstance(step, Decontamination))
    return len(Pipeline(against).run(rows).dropped), len(rows)


# --- what was collected -------------------------------------------------------------------------------------------------------------------


def curated_lines(pipeline: Pipeline, lines: Iterable[Mapping[str, Any]], prompts: Sequence[Prompt]) -> Curation:
    """The steps over the lines of collect.jsonl that have a record and were not left out before; each row is named by its prompt's id."""
    asked = {prompt.id: prompt for prompt in prompts}
    return pipeline.run(_row(line, asked[line["prompt_id"]]) for line in lines if line["record_id"] is not None and line.get("left_out") is None)


def _row(line: Mapping[str, Any], prompt: Prompt) -> Row:
    return Row(
        key=line["prompt_id"],
        prompt=prompt,
        answer=line["answer"],
        reasoning=line.get("reasoning"),
        # An endpoint may say `stop` of what it cut, and weights that are here say nothing: whether an answer ended was decided when it came.
        finish_reason=line.get("finish_reason") if line["finished"] else "length",
    )


def write(run: Run, pipeline: Pipeline, curation: Curation, curated: Curated, lines: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> None:
    """curation.json and curation.jsonl. `curated` is what the last gate made of the lines, with what the steps left out."""
    told = _Told(curation, curated, lines, {prompt.id: prompt for prompt in prompts})
    durable.write_bytes_atomic(
        run.left_out_path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in told.evidence()).encode(errors="replace")
    )
    summary = CurationSummary(
        sha256=pipeline.sha256,
        requested=len(lines),
        accepted=len(curated.kept),
        steps=told.steps(),
        splits=_splits(pipeline, curation),
        items=[HitItem(item=hit.item, rows=hit.rows) for hit in hits_by_item(curation.dropped)],
        placeholders_unknown=sum(line.get("placeholders_unknown") or 0 for line in lines),
    )
    durable.write_json_atomic(run.curation_path, summary.model_dump(mode="json"))


@dataclass(frozen=True)
class _Told:
    """What became of every line, put into the order of the steps."""

    curation: Curation
    curated: Curated
    lines: Sequence[Mapping[str, Any]]
    prompts: Mapping[str, Prompt]

    def steps(self) -> list[SiftedStep]:
        found = self.curation.reasons
        gates = {COLLECTING: Counter[str](), LAST_GATE: Counter[str]()}
        for candidate, reason in self.curated.dropped:
            if candidate.prompt_id not in found:
                gates[self._gate(candidate.prompt_id)][reason] += 1
        first = self._of_gate(COLLECTING, len(self.lines), gates[COLLECTING])
        between = [
            SiftedStep(step=one.step, settings=one.settings, before=one.before, after=one.after, dropped=one.dropped) for one in self.curation.steps
        ]
        return [first, *between, self._of_gate(LAST_GATE, len(self.curation.kept), gates[LAST_GATE])]

    def _of_gate(self, name: str, before: int, dropped: Counter[str]) -> SiftedStep:
        return SiftedStep(step=name, settings={}, before=before, after=before - dropped.total(), dropped=dict(dropped))

    def _gate(self, prompt_id: str) -> str:
        return LAST_GATE if prompt_id in self._seen else COLLECTING

    @cached_property
    def _seen(self) -> frozenset[str]:
        return frozenset(row.key for row in self.curation.kept)

    def evidence(self) -> Iterable[dict[str, Any]]:
        """A line for each answer that was left out, in the order of the prompts."""
        by_step = {drop.key: drop for drop in self.curation.dropped}
        reasons = {candidate.prompt_id: reason for candidate, reason in self.curated.dropped}
        for line in self.lines:
            if (reason := reasons.get(line["prompt_id"])) is None:
                continue
            drop = by_step.get(line["prompt_id"])
            yield {
                "prompt_id": line["prompt_id"],
                "step": drop.step if drop is not None else self._gate(line["prompt_id"]),
                "reason": reason,
                "evidence": drop.finding.evidence if drop is not None else DROP_REASONS[reason],
                "against": list(drop.finding.against) if drop is not None else [],
                "prompt": shortened(_told_whole(self.prompts[line["prompt_id"]]), _CHARACTERS),
                "answer": shortened(line["answer"], _CHARACTERS),
            }


def _splits(pipeline: Pipeline, curation: Curation) -> list[HitSplit]:
    """How many items of each split stood in rows that were left out, and by what the others could have been found."""
    hit = {hit.item for hit in hits_by_item(curation.dropped)}
    return [
        HitSplit(
            split=found.split,
            items=found.items,
            hit=sum(item.name in hit for item in step.items if item.split == found.split),
            by_overlap=found.by_overlap,
            by_prompt_alone=found.by_prompt_alone,
        )
        for step in pipeline.steps
        if isinstance(step, Decontamination)
        for found in step.coverage()
    ]
