"""The texts that a run reads: prompts, evaluation items, labelled pairs; of a teacher behind an endpoint without what redaction takes out.

Which number a placeholder gets depends on the order in which texts are looked at. It is one order, prompts, items, pairs, whatever is asked for first: so
the same recipe over the same files always gives the same texts, and no table of secrets has to be kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from stillroom.core.errors import DataError
from stillroom.data import LoadedPrompts, Prompt, load_prompts
from stillroom.data.redaction import RedactedPrompt, Redactor, Restored
from stillroom.runs.plan import RedactedKind, RedactionFacts
from stillroom.runs.recipe import Recipe

_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Sent:
    """What is sent for a prompt that has placeholders."""

    prompt: Prompt
    placeholders: frozenset[str]


class Inputs:
    """Reads each file when it is first asked for. Raises DataError as `load_prompts` does. Nothing that is printed of it has a secret in it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.mode = recipe.buying.redaction if recipe.teacher.endpoint is not None else "off"
        self._redactor = Redactor()
        self._sent: dict[str, _Sent] = {}
        self._texts: Counter[str] = Counter()
        self._looked_at = 0

    def __repr__(self) -> str:
        return f"Inputs({self._redactor!r})"

    @cached_property
    def prompts(self) -> LoadedPrompts:
        """What the teacher is asked."""
        section = self.recipe.prompts
        loaded = load_prompts(section.path, dataset=section.dataset, split=section.split, limit=section.limit)
        return replace(loaded, prompts=self._taken(loaded.prompts))

    @cached_property
    def items(self) -> tuple[Prompt, ...]:
        """What all models are scored on, each with its answer. Raises DataError 'items-invalid'."""
        _ = self.prompts
        section = self.recipe.evaluation
        if section.path is None:
            return ()
        loaded = load_prompts(section.path, limit=section.limit).prompts
        _require_answers([one for one in loaded if one.answer is None], section.path, "leave evaluation.path out to measure fidelity and cost alone")
        return self._taken(loaded)

    @cached_property
    def pairs(self) -> tuple[Prompt, ...]:
        """What the label-only baseline is made from, each with its answer or ending in one. None of it is sent. Raises DataError 'items-invalid'."""
        _ = self.items
        section = self.recipe.evaluation.label_only
        if section is None:
            return ()
        loaded = load_prompts(section.path, limit=section.limit).prompts
        unanswered = [one for one in loaded if one.answer is None and not (one.messages and one.messages[-1].role == "assistant")]
        _require_answers(unanswered, section.path, "leave evaluation.label_only out")
        return self._taken(loaded) if self.mode == "placeholders" else loaded

    def taken_in(self, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
        """Prompts from elsewhere as this run would use them; after all of its own, whose placeholders they share."""
        if self.mode != "off":
            _ = self.pairs
        return self._taken(prompts)

    # --- to the endpoint and back -------------------------------------------------------------------------------------------------------

    def sent(self, prompt: Prompt) -> Prompt:
        """What an endpoint is asked for one of these prompts."""
        found = self._sent.get(prompt.id)
        return prompt if found is None or self.mode == "placeholders" else found.prompt

    def back(self, prompt: Prompt, answer: str) -> Restored:
        """What is learned of an endpoint's answer to one of these prompts. `unknown` are the placeholders that stand in it and not in its prompt."""
        if self.mode == "off":
            return Restored(text=answer, unknown=())
        restored = self._restored(prompt, answer)
        return restored if self.mode == "restored" else replace(restored, text=answer)

    def shown(self, prompt: Prompt, answer: str) -> str:
        """An answer to one of these prompts for whoever wrote that prompt, and for nothing that is kept."""
        return self._restored(prompt, answer).text if self.mode == "placeholders" else answer

    def _restored(self, prompt: Prompt, answer: str) -> Restored:
        found = self._sent.get(prompt.id)
        return self._redactor.restore(answer, found.placeholders if found is not None else _NOTHING)

    # --- what was replaced --------------------------------------------------------------------------------------------------------------

    @property
    def redaction(self) -> RedactionFacts | None:
        """What was replaced in all of them; None where nothing is sent to anybody."""
        if self.recipe.teacher.endpoint is None:
            return None
        _ = self.pairs
        kinds = [RedactedKind(kind=one.kind, places=one.places, distinct=one.distinct, texts=self._texts[one.kind]) for one in self._redactor.counts]
        return RedactionFacts(mode=self.mode, texts=self._looked_at, kinds=kinds)

    def secrets_in_answers_alone(self) -> int:
        """How many items have a placeholder in the expected answer that their prompt does not have: nobody can know it."""
        if self.mode != "placeholders":
            return 0
        return sum(item.answer is not None and bool(self._restored(item, item.answer).unknown) for item in self.items)

    # --- one after the other ------------------------------------------------------------------------------------------------------------

    def _taken(self, prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
        return tuple(map(self._take, prompts)) if self.mode != "off" else tuple(prompts)

    def _take(self, prompt: Prompt) -> Prompt:
        redacted = self._redactor.redact_prompt(prompt)
        answer = prompt.answer
        found = redacted.placeholders
        if self.mode == "placeholders" and answer is not None:
            in_answer = self._redactor.redact(answer)
            answer, found = in_answer.text, found | in_answer.placeholders
        self._looked_at += 1
        self._texts.update({placeholder[1:].rpartition("_")[0] for placeholder in found})
        return self._kept(prompt, redacted, answer)

    def _kept(self, prompt: Prompt, redacted: RedactedPrompt, answer: str | None) -> Prompt:
        used = replace(redacted.prompt, answer=answer) if self.mode == "placeholders" else prompt
        if redacted.placeholders:
            self._sent[used.id] = _Sent(redacted.prompt, redacted.placeholders)
        return used


def _require_answers(unanswered: Sequence[Prompt], path: str, otherwise: str) -> None:
    """What has no answer is refused when the file is read, by the plan, and not when all else has been paid for."""
    if unanswered:
        raise DataError(
            "items-invalid",
            found=f"{len(unanswered)} items without an answer in {path}, the first of them {unanswered[0].content[:60]!r}",
            expected="`answer` on every item",
            do=f"Add it, or {otherwise}.",
        )
