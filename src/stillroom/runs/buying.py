"""What a run asks of an endpoint, for collecting, evaluating and comparing alike: one store, one account, one loop; nothing is bought twice.

A row is named by its purpose, its prompt as it is sent, and its call, so that what is asked again is known again, and another setting is another row.
Log-probabilities that passed verification are in Parquet files beside the store, which name their answers, and are read from there alone: what a run learns
from is the same whether it was interrupted or not.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import numpy

from stillroom.collect.collector import Collector, Policy, Progress, Reader
from stillroom.collect.logprobs import TokenIndex, Verified, read, top_k_targets, write_shard
from stillroom.collect.machines import logprobs_directory
from stillroom.collect.packing import unpack
from stillroom.collect.rate import RateController
from stillroom.collect.spend import in_units
from stillroom.collect.store import RequestStore, Row, StoredRow
from stillroom.collect.store import shard as rows_of_shard
from stillroom.collect.transport import open_transport
from stillroom.collect.wire import Answer, Call
from stillroom.core import durable
from stillroom.core.errors import RequestStoreError, SpendCapReached
from stillroom.core.identities import TokenIds, TokenSequence
from stillroom.core.interrupts import StopRequest
from stillroom.core.statistics import Interval
from stillroom.data import Prompt
from stillroom.ledger.entries import Response
from stillroom.models.local import text_targets
from stillroom.objectives.tensors import as_arrays
from stillroom.runs.collecting import Answered, given_answer
from stillroom.runs.directory import Run
from stillroom.runs.endpoints import EndpointTeacher, obtainable
from stillroom.runs.observer import Observer
from stillroom.runs.planning import Prepared, asking_of, pilot_of
from stillroom.runs.projection import Expected
from stillroom.runs.summaries import Bought, Rows
from stillroom.targets.kinds import Targets, TopKTargets
from stillroom.targets.rows import concatenate, slice_targets
from stillroom.targets.store import StoredRecord
from stillroom.targets.vocabulary import Vocabulary

# Answers whose log-probabilities go into one file.
_SHARD = 512
_SHELVE_SECONDS = 2.0
# Of the other ids in a row that is known to be one id: so little that it is nothing in float32 beside 1.
_NOTHING_NATS = -60.0
COLLECT, EVALUATE, COMPARE = "collect", "evaluate", "compare"


class Purchases:
    """The request store of one run, open; made by `opened`."""

    def __init__(self, prepared: Prepared, teacher: EndpointTeacher, store: RequestStore, observer: Observer, stop: StopRequest | None) -> None:
        self.prepared, self.teacher, self.store = prepared, teacher, store
        self.observer, self.stop = observer, stop
        self.seconds = 0.0
        self._asking = asking_of(prepared.recipe, teacher, prepared.renderer)
        self._rows: dict[str, StoredRow] = {}

    @classmethod
    @contextmanager
    def opened(cls, run: Run, prepared: Prepared, observer: Observer, stop: StopRequest | None) -> Iterator[Purchases]:
        """Opens the store, makes it where there is none, and lets it buy under the recipe's caps. Raises as RequestStore.open and `permit` do, and where
        what is in it was read with another tokenizer.
        """
        teacher = prepared.endpoint_teacher
        assert teacher is not None
        place = teacher.store or run.requests_path
        with durable.unwritable_reported(place, "collection.store"):
            place.parent.mkdir(parents=True, exist_ok=True)
        with RequestStore.open(place) as store:
            store.permit(teacher.endpoint, teacher.price, teacher.caps)
            if prepared.plan.signal.kind == "top_k":
                _require_same_tokenizer(store, teacher, prepared.teacher_vocabulary)
            yield cls(prepared, teacher, store, observer, stop)

    def buy(self, purpose: str, prompts: Sequence[Prompt], *, temperature: float, top_logprobs: int | None = None) -> list[str]:
        """The names of the rows that have these prompts' answers, each of which has ended: answered, or failed for good.

        Raises Interrupted, SpendCapReached, CollectError as the collector does: what was bought is kept, and the same call goes on.
        """
        return self._buy(self.rows(purpose, prompts, temperature=temperature, top_logprobs=top_logprobs))

    def rows(self, purpose: str, prompts: Sequence[Prompt], *, temperature: float, top_logprobs: int | None = None) -> list[Row]:
        """What `buy` buys."""
        sent = [self.prepared.inputs.sent(prompt) for prompt in prompts]
        calls = [self._asking.call(prompt, temperature=temperature, top_logprobs=top_logprobs) for prompt in sent]
        return [Row(row=_name(purpose, prompt, call), prompt=prompt.id, call=call) for prompt, call in zip(sent, calls, strict=True)]

    def buy_shard(self, rows: Sequence[Row], index: int, count: int) -> int:
        """Buys what one of `count` machines is to buy (`index` from 0); returns how many rows those are. Raises as `buy` does."""
        return len(self._buy(list(rows_of_shard(rows, index, count))))

    def _buy(self, rows: Sequence[Row]) -> list[str]:
        names = [row.row for row in rows]
        self.store.request(rows)
        began = time.monotonic()
        if self.store.pending(1):
            try:
                asyncio.run(self._collect(frozenset(row.call.key for row in rows)))
            except SpendCapReached as error:
                raise self._cap_reached(error, set(names)) from error
        self.seconds += time.monotonic() - began
        self._shelve(1)
        wanted = set(names)
        self._rows |= {row.row: replace(row, answer=None) for row in self.store.rows() if row.row in wanted}
        return names

    def row(self, name: str) -> StoredRow:
        """What became of a row that `buy` has named, without its answer."""
        return self._rows[name]

    def texts(self, purpose: str, prompts: Sequence[Prompt]) -> list[str | None]:
        """Greedy answers, which are accepted as they are, with what redaction puts back; None where the endpoint gave none."""
        names = self.buy(purpose, prompts, temperature=0.0)
        self.store.accept(name for name in names if self.row(name).state == "answered")
        answers = [self.store.answer(self.row(name).key) for name in names]
        back = self.prepared.inputs.back
        return [None if answer is None else back(prompt, answer.text).text for prompt, answer in zip(prompts, answers, strict=True)]

    def verified(self, rows: Sequence[StoredRow]) -> dict[str, Verified]:
        """The log-probabilities of those rows whose were believed, by the row's name."""
        shards: dict[str, list[tuple[int, StoredRow]]] = {}
        for row in rows:
            if row.logprobs is not None:
                shards.setdefault(row.logprobs[0], []).append((row.logprobs[1], row))
        found: dict[str, Verified] = {}
        for shard, wanted in shards.items():
            for (key, verified), (_, row) in zip(read(self._shards / shard, [place for place, _ in wanted]), wanted, strict=True):
                assert key == row.key, f"{shard} has another answer in the place of {row.key}"
                found[row.row] = verified
        return found

    # -- the loop ----------------------------------------------------------------------------------------------------------------

    async def _collect(self, keys: frozenset[str]) -> None:
        section = self.prepared.recipe.buying
        transport = open_transport()
        collector = Collector(
            transport,
            self.store,
            self.teacher.endpoint,
            parse=reader_of(self.prepared),
            controller=RateController(time.monotonic, largest_concurrency=section.in_flight, state=self.store.recall("rates", self.teacher.endpoint)),
            policy=Policy(timeout_seconds=section.timeout_seconds),
            stop=self.stop,
            progress=lambda progress: self._tell(progress, len(keys)),
            only=keys,
        )
        shelving = asyncio.create_task(self._shelve_as_they_come())
        try:
            await collector.collect()
        finally:
            shelving.cancel()
            with suppress(asyncio.CancelledError):
                await shelving
            await transport.close()

    def _tell(self, progress: Progress, rows: int) -> None:
        spent = f"{progress.spend.settled.tokens:,} tokens"
        if progress.spend.currency is not None:
            spent = f"{in_units(progress.spend.settled.money):.4f} {progress.spend.currency}"
        done = {"requests/s": f"{progress.requests_per_second:,.1f}", "spent": spent}
        self.observer.progress(min(rows, progress.answered + progress.failed), rows, "answers", done)

    def _cap_reached(self, error: SpendCapReached, wanted: set[str]) -> SpendCapReached:
        states = Counter(row.state for row in self.store.rows() if row.row in wanted)
        return SpendCapReached(
            "spend-cap-reached",
            may_fit_later=error.may_fit_later,
            found=f"{states['answered']:,} of {states.total():,} rows are bought, {states['pending'] + states['in-flight']:,} are missing; {error.found}",
            expected=error.expected,
            why=error.why,
            do="Raise collection.max_money or collection.max_tokens and give the same command again: what was bought is kept, and is not paid for again.",
        )

    # -- log-probabilities ---------------------------------------------------------------------------------------------------------

    @property
    def _shards(self) -> Path:
        return logprobs_directory(self.store.path)

    async def _shelve_as_they_come(self) -> None:
        while True:
            await asyncio.sleep(_SHELVE_SECONDS)
            await asyncio.to_thread(self._shelve, _SHARD)

    def _shelve(self, at_least: int) -> None:
        """Moves what waits in the store into files of `_SHARD` answers, as long as there are `at_least` so many. A file is named by its first answer, so
        that one that a crash left unnamed is written again in its place.
        """
        while len(waiting := self.store.unshelved(_SHARD)) >= at_least:
            self._shards.mkdir(exist_ok=True)
            keys = [key for key, _ in waiting]
            shard = f"{keys[0]}.parquet"
            write_shard(self._shards / shard, [(key, unpack(packed)) for key, packed in waiting])
            self.store.shelve(shard, keys)

    # -- what it came to -----------------------------------------------------------------------------------------------------------

    def summary(self) -> Bought:
        """Rows and spend of the whole store, as they are now."""
        rows: dict[str, list[StoredRow]] = {}
        verified, demoted = 0, Counter[str]()
        ahead = {row.row for row in self.rows(EVALUATE, self.prepared.inputs.items, temperature=0.0)}
        for row in self.store.rows():
            ahead.discard(row.row)
            rows.setdefault(row.row.partition("/")[0] if "/" in row.row else "other", []).append(replace(row, answer=None))
            verified += row.logprobs is not None
            if row.demoted is not None:
                demoted[row.demoted.partition(":")[0]] += 1
        self.store.counts().require_conserved()
        spend, answers = self.store.spend(len(ahead)), self.store.spent_on_rows()
        priced = spend.currency is not None
        return Bought(
            rows={purpose: _counted(some) for purpose, some in rows.items()},
            verified=verified,
            demoted=dict(demoted.most_common()),
            attempts=spend.attempts,
            unknown=spend.unknown,
            spent_tokens=spend.settled.tokens,
            reserved_tokens=spend.reserved.tokens,
            currency=spend.currency,
            spent_money=f"{in_units(spend.settled.money):f}" if priced else None,
            reserved_money=f"{in_units(spend.reserved.money):f}" if priced else None,
            cap_tokens=spend.caps.tokens,
            cap_money=None if spend.caps.money is None else f"{in_units(spend.caps.money):f}",
            prices_as_of=None if self.teacher.price is None else self.teacher.price.as_of.isoformat(),
            answers_tokens=answers.tokens,
            answers_money=f"{in_units(answers.money):f}" if priced else None,
            projected_tokens=_expected(spend.projected_tokens),
            projected_money=_expected(spend.projected_money),
            pilot=pilot_of(self.prepared)[0],
        )

    def write_summary(self, run: Run) -> None:
        """requests.json."""
        durable.write_json_atomic(run.bought_path, self.summary().model_dump(mode="json"))


def _require_same_tokenizer(store: RequestStore, teacher: EndpointTeacher, vocabulary: Vocabulary) -> None:
    """The ids beside the store are of one tokenizer. Raises RequestStoreError 'request-store-other' where they are of another than the recipe's."""
    known = store.recall("tokenizer", teacher.endpoint)
    if known is None:
        store.remember("tokenizer", teacher.endpoint, {"fingerprint": vocabulary.fingerprint})
    elif known["fingerprint"] != vocabulary.fingerprint:
        raise RequestStoreError(
            "request-store-other",
            found=f"{store.path}, whose log-probabilities of {teacher.source!r} were read with a tokenizer whose fingerprint is {known['fingerprint']}",
            expected=f"{vocabulary.fingerprint}, that of teacher.tokenizer",
            why="an id would mean another token",
            do="Give teacher.tokenizer as it was, or choose another collection.store.",
        )


def _expected(found: Interval | None) -> Expected | None:
    return None if found is None else Expected(value=found.value, low=found.low, high=found.high)


def _name(purpose: str, prompt: Prompt, call: Call) -> str:
    return f"{purpose}/{prompt.id}/{call.key[:16]}"


def _writable(text: str | None) -> str | None:
    """What an endpoint said beside its answer as a file can hold it: halves of surrogate pairs become question marks."""
    return None if text is None else text.encode(errors="replace").decode()


def _counted(rows: Sequence[StoredRow]) -> Rows:
    ends = [(row.verdict or ("failed" if row.state == "failed" else "pending"), row.reason or "") for row in rows]
    reasons = {end: Counter(reason for other, reason in ends if other == end) for end in ("rejected", "failed")}
    return Rows(
        requested=len(rows),
        accepted=sum(end == "accepted" for end, _ in ends),
        rejected=dict(reasons["rejected"].most_common()),
        failed=dict(reasons["failed"].most_common()),
        pending=sum(end == "pending" for end, _ in ends),
    )


def reader_of(prepared: Prepared) -> Reader:
    """How this run reads responses; log-probabilities are checked against the teacher's tokenizer."""
    teacher = prepared.endpoint_teacher
    assert teacher is not None
    if prepared.plan.signal.kind != "top_k":
        return Reader()
    found = obtainable(prepared.recipe, teacher, prepared.teacher_vocabulary.size)
    return Reader(
        index=TokenIndex(prepared.teacher_vocabulary), reported_after_temperature=found.reported == "after", usage_trusted=found.usage_trusted
    )


# -- answers as records ------------------------------------------------------------------------------------------------------------


class _How(TypedDict):
    """How a collection asks: as many alternatives as are kept."""

    temperature: float
    top_logprobs: int | None


@dataclass
class BoughtAnswers:
    """Answers to prompts, and their targets, from a store: `collecting.Answering` for a teacher behind an endpoint."""

    purchases: Purchases
    run: Run

    def __post_init__(self) -> None:
        self.prepared = self.purchases.prepared
        self._names: dict[str, str] = {}
        self._share = 0.0

    @property
    def _top_k(self) -> bool:
        return self.prepared.plan.signal.kind == "top_k"

    def begin(self, prompts: Sequence[Prompt], missing: int) -> None:
        """Buys every answer that is not there yet; `missing` prompts have no record so far."""
        asked = self._asked(prompts)
        if not asked:
            return
        names = self.purchases.buy(COLLECT, asked, **self._how)
        self._names = {prompt.id: name for prompt, name in zip(asked, names, strict=True)}
        self._share = self.purchases.seconds / max(1, missing)

    def buy_shard(self, prompts: Sequence[Prompt], index: int, count: int) -> int:
        """Buys the answers that one of several machines is to buy; returns how many prompts are its."""
        return self.purchases.buy_shard(self.purchases.rows(COLLECT, self._asked(prompts), **self._how), index, count)

    def _asked(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        asked = [prompt for prompt in prompts if not self.prepared.comes_with_answer(prompt)]
        return [prompt for prompt in asked if self._fits(self.prepared.renderer.prompt_ids(prompt))]

    @property
    def _how(self) -> _How:
        signal = self.prepared.plan.signal
        return {"temperature": self.prepared.recipe.generation.sampling_temperature, "top_logprobs": signal.k if self._top_k else None}

    def row(self, prompt: Prompt) -> StoredRow | None:
        """What became of a prompt's row; None where it was too long to be asked."""
        return self.purchases.row(self._names[prompt.id]) if prompt.id in self._names else None

    def seconds_each(self) -> float:
        """The wall time of buying, for each prompt that had no record."""
        return self._share

    def _fits(self, ids: TokenIds) -> bool:
        return len(ids) + self.prepared.recipe.generation.max_new_tokens <= self.prepared.context_tokens

    def answers(self, number: int, prompts: Sequence[Prompt]) -> list[Answered]:
        """What came of each prompt of a part."""
        rows = [self.purchases.row(self._names[prompt.id]) for prompt in prompts if prompt.id in self._names] if self._top_k else []
        verified = self.purchases.verified(rows)
        return [
            given_answer(self.prepared, prompt)
            if self.prepared.comes_with_answer(prompt)
            else self._answered(prompt, verified.get(self._names.get(prompt.id, "")))
            for prompt in prompts
        ]

    def _answered(self, prompt: Prompt, verified: Verified | None) -> Answered:
        renderer = self.prepared.renderer
        asked = renderer.prompt_ids(prompt)
        nothing = Answered(prompt=prompt, prompt_tokens=len(asked))
        if prompt.id not in self._names:
            return nothing
        row = self.purchases.row(self._names[prompt.id])
        answer = self.purchases.store.answer(row.key)
        if answer is None:
            return replace(nothing, left_out="no-answer")
        learned = self.prepared.inputs.back(prompt, answer.text)
        nothing = replace(
            nothing,
            answer=learned.text,
            finish_reason=_writable(answer.finish_reason),
            reasoning=_writable(answer.reasoning),
            placeholders_unknown=len(learned.unknown),
        )
        if answer.thinking == "unterminated":
            return replace(nothing, left_out="unterminated-reasoning")
        if self._top_k and verified is None:
            return replace(nothing, left_out="unverified-logprobs")
        finished = self._is_finished(answer, verified)
        if verified is not None:
            sequence, targets = self._verified_record(prompt, verified, finished)
        else:
            sequence, targets = self._text_record(prompt, learned.text, finished), None
        if not sequence.scored_rows:
            return replace(nothing, left_out="empty-answer")
        usage = answer.usage
        return replace(
            nothing,
            sequence=sequence,
            answer_tokens=len(sequence.ids) - len(asked),
            finished=finished,
            targets=targets,
            response=Response(model=answer.model, id=answer.response_id, fingerprint=answer.fingerprint),
            counted=None if usage is None else (usage.prompt_tokens, usage.completion_tokens, usage.reasoning_tokens),
        )

    def _is_finished(self, answer: Answer, verified: Verified | None) -> bool:
        """Some endpoints say `stop` of an answer that they cut: one that has all the tokens that it was allowed, and no end token, is cut."""
        most, usage = self.prepared.recipe.generation.max_new_tokens, answer.usage
        if verified is not None and verified.ended:
            return True
        return answer.finish_reason != "length" and (usage is None or usage.completion_tokens < most)

    def _text_record(self, prompt: Prompt, answer: str, finished: bool) -> TokenSequence:
        sequence = self.prepared.renderer.sequence(prompt, answer)
        if finished or sequence.ids[-1] not in self.prepared.teacher_vocabulary.end_ids:
            return sequence
        # A cut answer has no end, and nothing is to be learned from one that was put there.
        *spans, (start, stop) = sequence.answer_spans
        last = ((start, stop - 1),) if stop - 1 > start else ()
        return TokenSequence(ids=sequence.ids[:-1], answer_spans=(*spans, *last))

    def _verified_record(self, prompt: Prompt, verified: Verified, finished: bool) -> tuple[TokenSequence, Targets]:
        """The teacher's own tokens with what it listed at each. Earlier answers of a conversation have no distributions, and are not scored.

        An endpoint may say that an answer has ended without an entry for its end token: that row is then the end token alone.
        """
        vocabulary, signal = self.prepared.teacher_vocabulary, self.prepared.plan.signal
        targets = top_k_targets(verified, vocabulary, signal.k, signal.target_temperature)
        completion = tuple(int(index) for index in verified.ids_T)
        if finished and not verified.ended and completion:
            end = self._end_id(prompt)
            completion, targets = (*completion, end), concatenate([targets, _certain(end, targets)])
        sequence = self.prepared.renderer.sequence(prompt, completion=completion)
        return replace(sequence, answer_spans=sequence.answer_spans[-1:] if completion else ()), targets

    def _end_id(self, prompt: Prompt) -> int:
        return self.prepared.renderer.sequence(prompt, "x").ids[-1]

    def stored(self, answered: Sequence[Answered]) -> list[StoredRecord]:
        """Each sequence with its targets."""
        sequences = [one.sequence for one in answered if one.sequence is not None]
        if not sequences:
            return []
        if self._top_k:
            return [
                StoredRecord(sequence=one.sequence, targets=one.targets) for one in answered if one.sequence is not None and one.targets is not None
            ]
        targets, records, start = as_arrays(text_targets(sequences, self.prepared.teacher_vocabulary)), [], 0
        for sequence in sequences:
            stop = start + len(sequence.scored_rows)
            records.append(StoredRecord(sequence=sequence, targets=slice_targets(targets, start, stop)))
            start = stop
        return records

    def decided(self, reasons: dict[str, str | None]) -> None:
        """Enters what became of each prompt's answer (None: it was kept), and writes requests.json."""
        rows = [(name, reasons.get(prompt)) for prompt, name in self._names.items() if self.purchases.row(name).state == "answered"]
        self.purchases.store.accept(name for name, reason in rows if reason is None)
        self.purchases.store.reject((name, reason) for name, reason in rows if reason is not None)
        self.purchases.write_summary(self.run)


def asked_logprobs(prepared: Prepared) -> int | None:
    """How many alternatives to ask for: those that are kept."""
    return prepared.plan.signal.k if prepared.plan.signal.kind == "top_k" else None


def _certain(end: int, beside: TopKTargets) -> TopKTargets:
    """A row in which `end` has all the mass, of as many ids as the rows of `beside`."""
    k = beside.ids_RK.shape[1]
    others = [index for index in range(k + 1) if index != end][: k - 1]
    nats = numpy.full((1, k), _NOTHING_NATS)
    nats[0, 0] = 0.0
    return replace(beside, ids_RK=numpy.array([[end, *others]], numpy.int32), log_probs_RK=nats, tail_log_mass_R=numpy.array([_NOTHING_NATS]))
