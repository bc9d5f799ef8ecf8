"""The loop that buys what a request store has pending: as fast as the endpoint allows, each call once, and nothing lost when it stops.

For each call, in this order: the controller lets it go; its worst case is reserved, durably; it is sent; what came is read, outside of the event loop
where it is large; the attempt is ended, durably. A call without an answer is made again only for the reasons of `AGAIN`: after a refusal (429) when the
controller lets it go, otherwise after a wait that grows, up to a limit of attempts. An answer that was cut at its limit of tokens is an answer. A job
stops, resumably, at a request to stop, at a cap, and where the endpoint can answer nobody (`STOPS`, or no connection).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import multiprocessing
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Container, Mapping
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TypeAlias

from stillroom.collect.logprobs import Demoted, Expectations, TokenIndex, verify
from stillroom.collect.packing import pack
from stillroom.collect.rate import RateController, Signal, Ticket
from stillroom.collect.reading import rates_of, read_response
from stillroom.collect.spend import Spend, worst_case
from stillroom.collect.store import Counts, PendingCall, RequestStore, Reservation
from stillroom.collect.transport import authorised, request_headers, without_key
from stillroom.collect.wire import AGAIN, STOPS, Answer, Call, Endpoint, Failure, NotSent, Outcome, OutcomeUnknown, Response, Transport
from stillroom.core.errors import CollectError, SpendCapReached
from stillroom.core.interrupts import StopRequest

_PAGE = 512
_LOOK_SECONDS = 0.25  # how often a request to stop is looked for while nothing happens


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """What a response came to. `packed` are log-probabilities that passed, for a shard; `demoted` is why they did not, and then `raw` is kept."""

    outcome: Outcome
    raw: bytes | None = None
    demoted: str | None = None
    packed: bytes | None = None


Parse: TypeAlias = Callable[[Call, Response], Parsed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Reads responses and, where log-probabilities were asked for, verifies and packs them. `index` is the teacher's tokenizer where it is known.

    `usage_trusted` is false where the probe saw usages that are not the number of tokens: none is then held against an answer.
    """

    index: TokenIndex | None = None
    reported_after_temperature: bool = False
    usage_trusted: bool = True

    def __call__(self, call: Call, response: Response) -> Parsed:
        """Raises nothing."""
        outcome = read_response(call, response)[0]
        asked = call.body.get("top_logprobs", call.body.get("logprobs"))
        if not isinstance(outcome, Answer) or asked is None or asked is False:
            return Parsed(outcome=outcome)
        found = verify(outcome, self._expected(call, 0 if asked is True else int(asked)))
        outcome = replace(outcome, places=None, reasoning_places=None)  # they are in what was found, and costly to hand on
        if isinstance(found, Demoted):
            return Parsed(outcome=outcome, raw=response.body, demoted=f"{found.reason}: {found.detail}" if found.detail else found.reason)
        return Parsed(outcome=outcome, packed=pack(found))

    def _expected(self, call: Call, alternatives: int) -> Expectations:
        stop = call.body.get("stop") or ()
        return Expectations(
            alternatives=alternatives,
            temperature=float(call.body.get("temperature", 1.0)),
            reported="after" if self.reported_after_temperature else "before",
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            usage_is_its_own=self.usage_trusted,
            index=self.index,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How patient a collection is. Bodies larger than `inline_bytes` are read in one of `decoders` processes (0: all in the event loop), each of
    which is given what reads them once; where one cannot be had, they are read in the event loop.

    Threads would not do: a body is parsed in one go that holds the interpreter's lock.
    """

    timeout_seconds: float = 600.0
    attempts: int = 8
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 60.0
    drain_seconds: float = 60.0
    decoders: int = max(1, min(4, (os.cpu_count() or 1) - 1))
    inline_bytes: int = 16 << 10
    progress_seconds: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a collection has come: answers and final failures since it began, how many answers a second of late, what was spent."""

    answered: int
    failed: int
    in_flight: int
    requests_per_second: float
    refusals: int
    spend: Spend


@dataclass(slots=True)
class _Try:
    """A call and how often this collection has sent it without an answer."""

    call: PendingCall
    attempts: int = 0


class Collector:
    """Collects for one model at one endpoint: the calls of `only` (their keys), which others may wait beside; all that is pending where it is None, which
    must then be of that endpoint. Made for one `collect`.
    """

    def __init__(
        self,
        transport: Transport,
        store: RequestStore,
        endpoint: Endpoint,
        *,
        parse: Parse | None = None,
        controller: RateController | None = None,
        policy: Policy | None = None,
        largest_concurrency: int = 256,
        stop: StopRequest | None = None,
        progress: Callable[[Progress], None] | None = None,
        jitter: random.Random | None = None,
        only: Container[str] | None = None,
    ) -> None:
        self._only = only
        self._transport, self._store, self._endpoint = transport, store, endpoint
        self._parse = parse or Reader()
        self._controller = controller or RateController(
            time.monotonic, largest_concurrency=largest_concurrency, state=store.recall("rates", endpoint)
        )
        self._policy = policy or Policy()
        self._stop, self._progress, self._jitter = stop, progress, jitter or random.Random()
        self._headers = request_headers()
        self._decoders: list[Executor] | None = None  # until the first body that is for them
        self._page: deque[PendingCall] = deque()
        self._position = 0
        self._ready: deque[_Try] = deque()
        self._later: list[tuple[float, int, _Try]] = []
        self._order = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._ended: BaseException | None = None
        self._cap_reached = False
        self._answered = self._failed = 0

    async def collect(self) -> Counts:
        """Buys all that is pending (of `only`), and says where the rows are.

        What was in flight is waited for, for `drain_seconds` at most, and all is settled, before it raises: Interrupted at a request to stop,
        SpendCapReached, CollectError 'endpoint-refuses' and 'key-unusable'. Run again, it goes on.
        """
        reporting = asyncio.create_task(self._report()) if self._progress is not None else None
        try:
            try:
                await self._dispatch()
            finally:
                await self._drain()
        finally:
            for decoder in self._decoders or ():
                decoder.shutdown()
            if reporting is not None:
                reporting.cancel()
            self._store.remember("rates", self._endpoint, self._controller.to_json())
        if self._ended is not None:
            raise self._ended
        if self._stop is not None:
            self._stop.check("after all that was in flight had been settled")
        return await asyncio.to_thread(self._store.counts)

    # -- what goes next ------------------------------------------------------------------------------------------------

    async def _dispatch(self) -> None:
        while not self._stopping:
            self._changed.clear()
            following = await self._next()
            if following is None:
                if self._ready:
                    continue  # it came back while the store was read
                if not self._tasks and not self._later:
                    return
                await self._wait(self._later[0][0] - time.monotonic() if self._later else math.inf)
                continue
            admitted = math.inf if self._cap_reached else self._controller.start(worst_case(following.call, None, len(following.call.content)).tokens)
            if isinstance(admitted, Ticket):
                task = asyncio.create_task(self._buy(following, admitted))
                self._tasks.add(task)
                task.add_done_callback(self._done)
            else:
                self._ready.appendleft(following)
                await self._wait(admitted)

    @property
    def _stopping(self) -> bool:
        return self._ended is not None or (self._stop is not None and self._stop.asked)

    async def _next(self) -> _Try | None:
        """A call that may go now: one whose wait is over, else the next of the store. None where all are in flight or waiting."""
        if self._later and self._later[0][0] <= time.monotonic():
            return heapq.heappop(self._later)[2]
        if self._ready:
            return self._ready.popleft()
        if len(self._later) >= _PAGE:
            return None  # what waits is all that is kept in memory
        call = await self._following()
        if call is None:
            return None
        if call.endpoint.identity != self._endpoint.identity or call.body.get("n") not in (None, 1):
            raise ValueError(f"call {call.key} is for another endpoint, or for several answers at once")
        return _Try(call)

    async def _following(self) -> PendingCall | None:
        """The next call of the store that is to be bought here."""
        while True:
            if not self._page:
                self._page.extend(await asyncio.to_thread(self._store.pending, _PAGE, self._position))
            if not self._page:
                return None
            call = self._page.popleft()
            self._position = call.position
            if self._only is None or call.key in self._only:
                return call

    async def _wait(self, seconds: float) -> None:
        """Until something is finished, `seconds` have passed, or it is time to look whether to stop."""
        timer = asyncio.get_running_loop().call_later(max(min(seconds, _LOOK_SECONDS), 0.0), self._changed.set)
        await self._changed.wait()
        timer.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(error)

    def _end(self, error: BaseException) -> None:
        self._ended = self._ended or error

    async def _drain(self) -> None:
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=self._policy.drain_seconds)
        remaining = set(self._tasks)
        for task in remaining:
            task.cancel()
        await asyncio.gather(*remaining, return_exceptions=True)

    # -- one attempt ---------------------------------------------------------------------------------------------------

    async def _buy(self, trying: _Try, ticket: Ticket) -> None:
        call = trying.call
        try:
            headers = authorised(self._endpoint, self._headers)
            reservation = await self._store.begin(call)
        except SpendCapReached as error:
            self._controller.finish(ticket, "unsent")
            self._over_cap(trying, error)
            return
        except BaseException:
            self._controller.finish(ticket, "unsent")
            raise
        try:
            found = await send(self._transport, self._store, reservation, headers, self._policy.timeout_seconds)
        except BaseException:
            self._controller.finish(ticket, "failed")
            raise
        if isinstance(found, Failure):
            self._controller.finish(ticket, "unsent" if found.reason == "not-sent" else "failed")
            await self._without_answer(trying, found)
        else:
            await self._settle(trying, ticket, reservation, found)
        self._cap_reached = False

    async def _settle(self, trying: _Try, ticket: Ticket, reservation: Reservation, response: Response) -> None:
        try:
            parsed = await self._parsed(trying.call, response)
        except BaseException:
            self._controller.finish(ticket, "failed")
            await self._store.unanswered(reservation)
            raise
        outcome = parsed.outcome
        usage = outcome.usage
        self._controller.finish(
            ticket,
            _signal(outcome),
            used_tokens=None if usage is None else usage.prompt_tokens + usage.completion_tokens,
            rates=rates_of(response.headers),
            retry_after_seconds=outcome.retry_after_seconds if isinstance(outcome, Failure) else None,
        )
        self._changed.set()  # there is room for another before this one is on the disk
        await self._store.settle(
            reservation,
            outcome,
            parsed.raw,
            demoted=parsed.demoted,
            packed=parsed.packed,
            status=response.status,
            request_id=response.headers.get("x-request-id"),
        )
        if isinstance(outcome, Failure):
            await self._without_answer(trying, outcome)
        else:
            self._answered += 1

    async def _parsed(self, call: Call, response: Response) -> Parsed:
        if len(response.body) <= self._policy.inline_bytes:
            return self._parse(call, response)
        if self._decoders is None:
            self._decoders = _started(self._policy.decoders, self._parse)
        if not self._decoders:
            return self._parse(call, response)
        decoder = self._decoders[next(self._order) % len(self._decoders)]
        plain = Call(endpoint=call.endpoint, body=call.body, sample=call.sample)  # without what a subclass and its caches carry
        try:
            return await asyncio.get_running_loop().run_in_executor(decoder, _read_there, plain, response)
        except BrokenExecutor:  # killed, perhaps for memory: what was paid for is read here
            return self._parse(call, response)

    async def _without_answer(self, trying: _Try, failure: Failure) -> None:
        if failure.reason in STOPS:
            self._end(refusal(self._endpoint, failure))
        elif failure.reason not in AGAIN:
            self._failed += 1
        elif failure.reason == "throttled":
            self._ready.append(trying)
        else:
            trying.attempts += 1
            if trying.attempts < self._policy.attempts:
                self._put_off(trying, failure.retry_after_seconds or 0.0)
            elif failure.reason == "not-sent":
                self._end(refusal(self._endpoint, failure))
            else:
                await self._store.give_up(trying.call, failure.reason)
                self._failed += 1

    def _put_off(self, trying: _Try, at_least_seconds: float) -> None:
        """Waits double, and are drawn from their upper half, so that calls that failed together do not come back together."""
        policy = self._policy
        longest = min(policy.first_wait_seconds * 2.0 ** (trying.attempts - 1), policy.longest_wait_seconds)
        due = time.monotonic() + max(longest * self._jitter.uniform(0.5, 1.0), at_least_seconds)
        heapq.heappush(self._later, (due, next(self._order), trying))

    def _over_cap(self, trying: _Try, error: SpendCapReached) -> None:
        """What is in flight may cost less than was reserved for it, and make room."""
        if error.may_fit_later and len(self._tasks) > 1:
            self._ready.append(trying)
            self._cap_reached = True
        else:
            self._end(error)

    # -- beside --------------------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        assert self._progress is not None
        before, at = 0, time.monotonic()
        while True:
            await asyncio.sleep(self._policy.progress_seconds)
            spend = await asyncio.to_thread(self._store.spend)
            now = time.monotonic()
            rate, before, at = (self._answered - before) / (now - at), self._answered, now
            self._progress(
                Progress(
                    answered=self._answered,
                    failed=self._failed,
                    in_flight=self._controller.in_flight,
                    requests_per_second=rate,
                    refusals=self._controller.refusals,
                    spend=spend,
                )
            )


async def send(
    transport: Transport, store: RequestStore, reservation: Reservation, headers: Mapping[str, str], timeout_seconds: float
) -> Response | Failure:
    """Sends what was reserved. A response is still to be settled, and has no key in it; of a failure, and of whatever else is raised, the store knows how
    the attempt ended.
    """
    call = reservation.call
    try:
        return without_key(await transport.send(call.endpoint.url, headers, call.content, timeout_seconds), call.endpoint)
    except NotSent as error:
        await store.release(reservation, "not-sent")
        return Failure(reason="not-sent", message=str(error))
    except OutcomeUnknown as error:
        await store.unanswered(reservation)
        return Failure(reason="outcome-unknown", message=str(error))
    except BaseException:  # cancelled, or a transport that breaks its word
        await store.unanswered(reservation)
        raise


def _started(decoders: int, parse: Parse) -> list[Executor]:
    """Processes that read responses with `parse`; none where it cannot be given to them, or none can be started."""
    found: list[Executor] = []
    for _ in range(decoders):
        try:
            found.append(_decoder(parse))
        except Exception:  # there is no telling what it meets whose copy is made; what was paid for is read in the event loop
            break
    return found


def _decoder(parse: Parse) -> Executor:
    """A process that reads responses, given `parse` once: a tokenizer in it is far larger than a response. Not forked, for this process has threads;
    and it does not import the caller's script, which need not expect that.
    """
    executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_read_with, initargs=(parse,))
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        executor.submit(int)  # starts it
    finally:
        sys.modules["__main__"] = main
    return executor


_parse_here: Parse | None = None  # in a process of `_decoder`, what reads


def _read_with(parse: Parse) -> None:
    global _parse_here
    _parse_here = parse


def _read_there(call: Call, response: Response) -> Parsed:
    assert _parse_here is not None, "only a process of _decoder reads so"
    return _parse_here(call, response)


def _signal(outcome: Outcome) -> Signal:
    match outcome:
        case Answer():
            return "answered"
        case Failure(reason="throttled"):
            return "refused"
        case Failure(reason="overloaded"):
            return "overloaded"
        case Failure():
            return "failed"


def refusal(endpoint: Endpoint, failure: Failure) -> CollectError:
    """Why nothing can be bought of an endpoint, and what to do about it."""
    do = {
        "quota-exhausted": "Raise the quota with the provider, and run again: what was bought is kept.",
        "bad-key": f"Look at the key in {endpoint.key_variable or 'the environment (no variable was named)'}, and run again.",
        "not-found": "Look at the URL and at the model's name, and run again.",
    }.get(failure.reason, "Look at the URL and at the network between, and run again.")
    return CollectError(
        "endpoint-refuses",
        found=f"{failure.reason} from {endpoint.model!r} at {endpoint.base_url}: {failure.message}",
        why="every other call would meet the same",
        do=do,
    )
