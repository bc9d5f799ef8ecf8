"""The collect stage: the teacher answers, its targets are stored, every record is entered in the ledger, and the transfer set is frozen.

Prompts go in parts of fixed size, so that a part is the same whatever came before. collect.jsonl has one line for each prompt; a part is done when
all its lines are there, and they are written after its shard and its ledger entries. A part that a crash cut short is done again, and finds what it
had already written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Protocol, assert_never

from stillroom.core import durable
from stillroom.core.errors import DataError
from stillroom.core.identities import Sampling, TokenIds, TokenSequence
from stillroom.core.interrupts import StopRequest
from stillroom.core.seeds import derive_seed
from stillroom.data import Candidate, Curated, Prompt, TransferSet, curate, freeze
from stillroom.data.curation import Curation
from stillroom.data.transfer_set import DropReason
from stillroom.ledger import Access, Circumstances, Collected, Frozen, Ledger, PromptSource
from stillroom.ledger.entries import Response
from stillroom.models.loading import teacher_head_arrays
from stillroom.models.local import LocalTeacher
from stillroom.models.memory import trim_heap
from stillroom.objectives.tensors import as_arrays, head_as_arrays
from stillroom.runs.curating import Chosen, chosen, curated_lines, write
from stillroom.runs.directory import Run
from stillroom.runs.endpoints import access_path
from stillroom.runs.entitling import digests_of
from stillroom.runs.gates import Gates
from stillroom.runs.observer import Observer
from stillroom.runs.planning import Prepared
from stillroom.targets.codecs import Codec, DrawnCodec, HiddenCodec, TextCodec, TopKCodec, measure_error
from stillroom.targets.kinds import TargetRequest, Targets, TeacherHead
from stillroom.targets.rows import slice_targets
from stillroom.targets.store import StoredRecord, StoreIdentity, TargetStore, record_id

PART = 512
# Rows on which the codec's error is measured.
_ERROR_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A prompt and what came of it; no sequence where it was too long to ask, or, with `left_out`, where there is no answer to learn from.

    `given` is an answer that came with the prompt. `targets` are those of the sequence's rows where they came with the answer. `counted` are the tokens of
    prompt, answer and reasoning as an endpoint counts them, `response` what it said of itself, `finish_reason` and `reasoning` what it said of the answer. `placeholders_unknown` is how many
    placeholders stand in the answer and not in its prompt.
    """

    prompt: Prompt
    prompt_tokens: int
    sequence: TokenSequence | None = None
    answer: str = ""
    answer_tokens: int = 0
    finished: bool = False
    left_out: DropReason | None = None
    given: bool = False
    targets: Targets | None = None
    response: Response | None = None
    counted: tuple[int, int, int] | None = None
    finish_reason: str | None = None
    reasoning: str | None = None
    placeholders_unknown: int = 0


class Answering(Protocol):
    """Who answers prompts: a model here, or an endpoint."""

    def begin(self, prompts: Sequence[Prompt], missing: int) -> None:
        """Called once, before any part: `missing` prompts have no line yet."""
        ...

    def seconds_each(self) -> float:
        """Wall time that a prompt took beside its part."""
        ...

    def answers(self, number: int, prompts: Sequence[Prompt]) -> list[Answered]:
        """What came of each prompt of a part."""
        ...

    def stored(self, answered: Sequence[Answered]) -> list[StoredRecord]:
        """Those that have a sequence, in order, with the teacher's targets."""
        ...

    def decided(self, reasons: dict[str, str | None]) -> None:
        """Told, for each prompt, why its answer was left out; None where it was kept."""
        ...


def store_identity(prepared: Prepared) -> StoreIdentity:
    """What the targets of this recipe depend on."""
    template = prepared.tokenizer.chat_template
    return StoreIdentity(
        teacher=prepared.teacher.ref,
        vocabulary=prepared.teacher_vocabulary.fingerprint,
        vocabulary_size=prepared.teacher_vocabulary.size,
        chat_template_sha256=sha256(template.encode()).hexdigest() if isinstance(template, str) else None,
        codec=_codec(prepared),
        temperature=prepared.recipe.targets.target_temperature,
        generation=sampling_of(prepared),
        arithmetic=prepared.plan.hardware.teacher_dtype or "not known",
    )


def sampling_of(prepared: Prepared) -> Sampling:
    """How the teacher answers."""
    generation = prepared.recipe.generation
    return Sampling(
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.sampling_temperature,
        # Greedy answers do not depend on a seed, so neither does what they are stored under.
        seed=derive_seed(prepared.recipe.seed, "generation") if generation.sampling_temperature > 0 else 0,
    )


def request_of(prepared: Prepared) -> TargetRequest:
    """Which targets the plan chose."""
    signal = prepared.plan.signal
    return TargetRequest(
        kind=signal.kind,
        temperature=signal.target_temperature,
        k=signal.k,
        draws=signal.draws,
        seed=_draws_seed(prepared) if signal.kind == "drawn" else 0,
        state_dtype=signal.state_dtype or "bfloat16",
    )


def _draws_seed(prepared: Prepared) -> int:
    return derive_seed(prepared.recipe.seed, "draws")


def _codec(prepared: Prepared) -> Codec:
    signal = prepared.plan.signal
    if signal.live:
        return TextCodec()
    match signal.kind:
        case "text":
            return TextCodec()
        case "drawn":
            return DrawnCodec(draws=signal.draws, seed=_draws_seed(prepared))
        case "top_k":
            return TopKCodec(k=signal.k)
        case "hidden":
            assert signal.state_dtype is not None
            return HiddenCodec(width=prepared.local_teacher.shape.width, state_dtype=signal.state_dtype)
        case "full":
            raise AssertionError("full distributions are never stored")
        case _:
            assert_never(signal.kind)


class LocalAnswers:
    """A teacher whose weights are here. The head of hidden targets, and what rounding costs, are its to say."""

    def __init__(self, prepared: Prepared, teacher: LocalTeacher) -> None:
        self.prepared, self.teacher = prepared, teacher

    def head(self) -> TeacherHead:
        """What turns stored states into distributions, as arrays."""
        return head_as_arrays(teacher_head_arrays(self.teacher.model, self.teacher.vocabulary.size))

    def begin(self, prompts: Sequence[Prompt], missing: int) -> None:
        """Nothing: it answers part by part."""

    def seconds_each(self) -> float:
        return 0.0

    def decided(self, reasons: dict[str, str | None]) -> None:
        """Nothing: nobody keeps an account of it."""

    def answers(self, number: int, prompts: Sequence[Prompt]) -> list[Answered]:
        """Those that come with the prompts, and those that the teacher writes, all of a part together."""
        renderer, sampling = self.prepared.renderer, sampling_of(self.prepared)
        sampling = Sampling(max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature, seed=derive_seed(sampling.seed, "part", number))
        asked = {prompt.id: renderer.prompt_ids(prompt) for prompt in prompts if not self.prepared.comes_with_answer(prompt)}
        fitting = [prompt for prompt, ids in asked.items() if len(ids) + sampling.max_new_tokens <= self.prepared.context_tokens]
        completions = self.teacher.generate([asked[prompt] for prompt in fitting], sampling) if fitting else []
        written = dict(zip(fitting, completions, strict=True))
        return [
            given_answer(self.prepared, prompt)
            if prompt.id not in asked
            else self._written(prompt, asked[prompt.id], written[prompt.id])
            if prompt.id in written
            else Answered(prompt=prompt, prompt_tokens=len(asked[prompt.id]))
            for prompt in prompts
        ]

    def _written(self, prompt: Prompt, asked: TokenIds, completion: TokenIds) -> Answered:
        renderer = self.prepared.renderer
        return Answered(
            prompt=prompt,
            prompt_tokens=len(asked),
            sequence=renderer.sequence(prompt, completion=completion),
            answer=renderer.answer_text(completion),
            answer_tokens=len(completion),
            finished=completion[-1] in self.teacher.vocabulary.end_ids,
        )

    def stored(self, answered: Sequence[Answered]) -> list[StoredRecord]:
        """Each sequence with the teacher's targets for its own rows."""
        # What decoding leaves on the heap is of no use to scoring, and by how much it would raise the peak is chance.
        trim_heap()
        sequences = [one.sequence for one in answered if one.sequence is not None]
        if not sequences:
            return []
        request = request_of(self.prepared)
        kind = "text" if isinstance(_codec(self.prepared), TextCodec) else request.kind
        targets = as_arrays(self.teacher.targets(sequences, replace(request, kind=kind)))
        records, start = [], 0
        for sequence in sequences:
            stop = start + len(sequence.scored_rows)
            records.append(StoredRecord(sequence=sequence, targets=slice_targets(targets, start, stop)))
            start = stop
        return records

    def measure_codec(self, store: TargetStore, records: Sequence[StoredRecord]) -> None:
        """Enters into the store what its codec costs, once, by the rows of `records`."""
        if isinstance(store.identity.codec, TextCodec) or not records or store.codec_error is not None:
            return
        sequences = [record.sequence for record in records]
        states_RD = self.teacher.hidden_states(sequences)[:_ERROR_ROWS]
        temperature = store.identity.temperature
        exact = self.teacher.log_probs(states_RD, temperature).cpu().numpy()
        # What the codec is given, before it rounds: the states as the teacher has them.
        targets = as_arrays(self.teacher.targets(sequences, replace(request_of(self.prepared), state_dtype="float32")))
        error = measure_error(store.identity.codec, slice_targets(targets, 0, len(exact)), exact)
        if error is not None:
            store.record_codec_error(error)


def given_answer(prepared: Prepared, prompt: Prompt) -> Answered:
    """The answer that comes with a prompt. Raises DataError 'prompts-invalid' where there is none."""
    renderer = prepared.renderer
    if prompt.answer is None and not renderer.ends_with_answer(prompt):
        raise DataError(
            "prompts-invalid",
            found=f"a prompt without an answer ({prompt.content[:60]!r}), where prompts.answers is given",
            expected="`answer`, or a conversation that ends with an assistant turn",
            do="Add the answers; or set prompts.answers to mixed, so that the teacher is asked for those that are missing, or to teacher.",
        )
    sequence = renderer.sequence(prompt, prompt.answer)
    answer_tokens = len(sequence.scored_rows)
    if len(sequence.ids) > prepared.context_tokens:
        return Answered(prompt=prompt, prompt_tokens=len(sequence.ids) - answer_tokens, answer_tokens=answer_tokens, given=True)
    answer = prompt.answer if prompt.answer is not None else (prompt.messages or ())[-1].content
    return Answered(
        prompt=prompt,
        prompt_tokens=len(sequence.ids) - answer_tokens,
        sequence=sequence,
        answer=answer,
        answer_tokens=answer_tokens,
        finished=True,
        given=True,
    )


class Collector:
    """Runs the stage for one run."""

    def __init__(
        self, run: Run, prepared: Prepared, answering: Answering, ledger: Ledger, gates: Gates, observer: Observer, stop: StopRequest
    ) -> None:
        self.run, self.prepared, self.answering, self.ledger = run, prepared, answering, ledger
        self.gates, self.observer, self.stop = gates, observer, stop
        identity = store_identity(prepared)
        head = answering.head() if isinstance(answering, LocalAnswers) and identity.codec.kind == "hidden" else None
        self.store = TargetStore.create_or_resume(run.store_path, identity, head)
        self._circumstances = self._all_circumstances()

    def collect(self) -> TransferSet:
        """Every part that is not done yet, then the transfer set. Raises Interrupted between parts."""
        prompts = self.prepared.prompts.prompts
        done = self._done(len(prompts))
        self.answering.begin(prompts, len(prompts) - len(done))
        began, tokens = time.monotonic(), 0
        for start in range(len(done), len(prompts), PART):
            lines = self._part(start // PART, prompts[start : start + PART])
            durable.append_lines(self.run.collect_path, [json.dumps(line, ensure_ascii=False) for line in lines])
            done += lines
            tokens += sum(line["answer_tokens"] for line in lines)
            speed = tokens / max(1e-9, time.monotonic() - began)
            self.observer.progress(len(done), len(prompts), "prompts", {"tokens/s": f"{speed:,.0f}"})
            self.stop.check(f"after {len(done)} of {len(prompts)} prompts")
        return self._freeze(done)

    def _done(self, prompts: int) -> list[dict[str, Any]]:
        """The lines of the parts that are whole; what is there of a part that is not, is removed."""
        durable.repair_tail(self.run.collect_path)
        lines = list(durable.read_lines(self.run.collect_path))
        whole = len(lines) if len(lines) == prompts else len(lines) // PART * PART
        if whole < len(lines):
            durable.write_bytes_atomic(self.run.collect_path, "".join(f"{line}\n" for line in lines[:whole]).encode())
        return [json.loads(line) for line in lines[:whole]]

    # --- one part ---------------------------------------------------------------------------------------------------------------------

    def _part(self, number: int, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        began = time.monotonic()
        answered = self.answering.answers(number, prompts)
        asked = [one for one in answered if one.sequence is not None]
        records = self.answering.stored(asked)
        self.store.append_shard(records)
        ids = {one.prompt.id: record_id(record.sequence) for one, record in zip(asked, records, strict=True)}
        self.ledger.append(self._collected(ids[one.prompt.id], one) for one in asked)
        if number == 0 and isinstance(self.answering, LocalAnswers):
            self.answering.measure_codec(self.store, records[:64])
        seconds = (time.monotonic() - began) / len(prompts) + self.answering.seconds_each()
        return [line_of(one, ids.get(one.prompt.id), seconds) for one in answered]

    # --- ledger and transfer set ------------------------------------------------------------------------------------------------------

    def _all_circumstances(self) -> Circumstances:
        prepared = self.prepared
        return Circumstances(
            teacher=prepared.teacher.ref,
            sampling=sampling_of(prepared),
            prompt_source=PromptSource(name=prepared.prompts.source, sha256=prepared.prompts.source_sha256),
            signal=prepared.plan.signal.kind,
            terms=digests_of(prepared.verdict),
            decision=prepared.verdict.sha256,
            access=Access(
                path=access_path(prepared.recipe),
                endpoint=prepared.endpoint_teacher.endpoint.base_url if prepared.endpoint_teacher is not None else None,
                account=prepared.recipe.intent.account,
            ),
        )

    def _collected(self, record: str, answered: Answered) -> Collected:
        prompt_tokens, output_tokens, reasoning = answered.counted or (answered.prompt_tokens, answered.answer_tokens, None)
        return Collected(
            record_id=record,
            prompt=answered.prompt.content,
            output=answered.answer,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            circumstances=self._circumstances,
            response=answered.response,
            reasoning_tokens=reasoning,
        )

    def _freeze(self, lines: Sequence[dict[str, Any]]) -> TransferSet:
        """Curates what was collected, enters each record's fate in the ledger, and writes the transfer set: gate 2."""
        curated = self._curate(lines)
        reasons = {candidate.id: reason for candidate, reason in curated.dropped if candidate.id in self.store}
        kept = {candidate.id for candidate in curated.kept}
        verdict = self.gates.admit([candidate.id for candidate in curated.kept], self.ledger)
        self.ledger.append(
            [Frozen(record_id=candidate.id) for candidate in curated.kept]
            + [Frozen(record_id=record, reason=reason) for record, reason in reasons.items() if record not in kept]
        )
        transfer_set = freeze(curated, self.ledger, decision=verdict.sha256)
        fates: dict[str, str | None] = {candidate.prompt_id: reason for candidate, reason in curated.dropped}
        self.answering.decided(fates | {candidate.prompt_id: None for candidate in curated.kept})
        transfer_set.save(self.run.transfer_set_path)
        return transfer_set

    def _curate(self, lines: Sequence[dict[str, Any]]) -> Curated:
        """The recipe's steps, then the last gate; what both left out is written down, also where nothing is left."""
        prepared = self.prepared
        steps = chosen(prepared.recipe, prepared.inputs)
        steps.require_planned(prepared.plan.curation)
        found, curated = curated_by(steps, prepared, lines)
        write(self.run, steps.pipeline, found, curated, lines, prepared.prompts.prompts)
        return curated


def line_of(answered: Answered, record: str | None, seconds: float) -> dict[str, Any]:
    """A line of collect.jsonl."""
    return {
        "prompt_id": answered.prompt.id,
        "record_id": record,
        "prompt_tokens": answered.prompt_tokens,
        "answer_tokens": answered.answer_tokens,
        "finished": answered.finished,
        "answer": answered.answer,
        "left_out": answered.left_out,
        "given": answered.given,
        "finish_reason": answered.finish_reason,
        "reasoning": answered.reasoning,
        "placeholders_unknown": answered.placeholders_unknown,
        "seconds": round(seconds, 6),
    }


def curated_by(steps: Chosen, prepared: Prepared, lines: Sequence[dict[str, Any]]) -> tuple[Curation, Curated]:
    """What the recipe's steps leave of them, and what the last gate does."""
    context_tokens, found = prepared.context_tokens, curated_lines(steps.pipeline, lines, prepared.prompts.prompts)
    reasons = found.reasons
    return found, curate((_candidate(line, context_tokens, reasons.get(line["prompt_id"])) for line in lines), max_tokens=context_tokens)


def _candidate(line: dict[str, Any], context_tokens: int, found: DropReason | None) -> Candidate:
    asked = line["record_id"] is not None
    left_out: DropReason | None = line.get("left_out") or found
    return Candidate(
        id=line["record_id"] if asked else line["prompt_id"],
        prompt_id=line["prompt_id"],
        # What was too long to ask has no sequence; it counts as one token more than fits.
        tokens=line["prompt_tokens"] + line["answer_tokens"] if asked else context_tokens + 1,
        answer=line["answer"],
        finished=line["finished"],
        left_out=left_out,
    )
