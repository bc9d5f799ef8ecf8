"""Probing an endpoint from beginning to end: entitled before the first request, under a cap, and kept, so that nothing is bought twice.

The calls and their answers lie whole in a request store. A probe that was stopped goes on from them; one that is finished is read, not made again.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit

from stillroom.collect.collector import Policy, refusal, send
from stillroom.collect.logprobs import TokenIndex
from stillroom.collect.probe import MOST_CALLS, ProbeReport, Signal, probe, signal
from stillroom.collect.reading import read_response
from stillroom.collect.spend import Amount, Caps, Price, PriceList, Spend, in_units
from stillroom.collect.store import RequestStore
from stillroom.collect.transport import authorised, open_transport, request_headers
from stillroom.collect.wire import AGAIN, ROUTES, Answer, Call, Endpoint, Failure, Response, Transport
from stillroom.core import clock, optional
from stillroom.core.errors import CollectError
from stillroom.core.identities import Json
from stillroom.core.interrupts import StopRequest
from stillroom.entitlement.verdict import Verdict
from stillroom.runs.entitling import entitled_endpoint
from stillroom.runs.observer import Observer, Silent
from stillroom.runs.recipe import Recipe
from stillroom.targets.vocabulary import Vocabulary

# A whole probe reserves less than half of it even where no answer has a usage, and each of them stays reserved.
MOST_TOKENS = 50_000
PATIENCE = Policy(timeout_seconds=120.0, attempts=4, longest_wait_seconds=60.0)
_LOOK_SECONDS = 0.25  # how often a request to stop is looked for in a wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be found out, and for how much.

    `overflow_tokens` is the number of words that are sent to see what happens past the context (None: that is not tested). `max_tokens` (without it
    MOST_TOKENS, and for the context what its prompt may be counted as) and `max_money`, in the currency of `prices`, are the most that this one probe
    may spend on top of what the store has spent. `again` buys everything anew.
    """

    overflow_tokens: int | None = None
    index: TokenIndex | None = None
    prices: PriceList | None = None
    max_tokens: int | None = None
    max_money: Decimal | str | None = None
    again: bool = False

    @property
    def tokens(self) -> int:
        return self.max_tokens if self.max_tokens is not None else MOST_TOKENS + len("word ") * (self.overflow_tokens or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What was found. `day` is that of the last call; `number` counts whole probes of this endpoint from 0.

    Of its calls, `sent` were sent by this command (each attempt counts) and `reused` were in the store. `spent` and `reserved` are what this command
    added to the store's; `spend` is all of the store's.
    """

    endpoint: Endpoint
    report: ProbeReport
    day: str
    number: int
    overflow_tokens: int | None
    tokenizer: str | None
    verdict: Verdict
    store: Path
    spend: Spend
    sent: int = 0
    reused: int = 0
    spent: Amount = Amount()
    reserved: Amount = Amount()
    warnings: tuple[str, ...] = ()

    @property
    def signal(self) -> Signal:
        return signal(self.report)

    def kept(self) -> Json:
        """What the store remembers: the report's own form with what it was asked for."""
        names = ("day", "number", "overflow_tokens", "tokenizer")
        return {**self.report.to_json(), **{name: getattr(self, name) for name in names}}

    def to_json(self) -> Json:
        """What the store remembers, what follows from it, and what this command did. Money is text: JSON's numbers are doubles."""
        amounts = {"spent": self.spent, "reserved": self.reserved}
        told = {name: {"tokens": amount.tokens, "money": str(in_units(amount.money))} for name, amount in amounts.items()}
        done = {"sent": self.sent, "reused": self.reused, **told, "currency": self.spend.currency}
        return {**self.kept(), "signal": asdict(self.signal), "terms": self.verdict.outcome, "this_command": done, "store": str(self.store)}


def probe_endpoint(
    endpoint: Endpoint,
    store: Path,
    wanted: Wanted,
    *,
    access: str | None = None,
    licence: str | None = None,
    recipe: Recipe | None = None,
    observer: Observer | None = None,
    transport: Transport | None = None,
) -> Probed:
    """Finds out what an endpoint honours, or reads what was found before.

    Before the first request, and before the store is opened, its terms are asked: raises EntitlementDenied, EntitlementUnknown. Raises CollectError
    'endpoint-refuses' (no connection, key, quota, model, or not one answer) and 'key-unusable', SpendError, SpendCapReached, RequestStoreError, and
    Interrupted; after each of these the same call goes on from what was bought.
    """
    host = urlsplit(endpoint.base_url).hostname or ""
    verdict = entitled_endpoint(endpoint.model, host, access=access, licence=licence, recipe=recipe)
    price = wanted.prices.price(endpoint) if wanted.prices is not None else None
    with RequestStore.open(store) as kept:
        before = kept.spend()
        earlier = _earlier(kept, endpoint, verdict, before)
        if earlier is not None and not wanted.again and _covers(earlier, wanted):
            return earlier
        if earlier is not None and not wanted.again and wanted.overflow_tokens is None:
            wanted = replace(wanted, overflow_tokens=earlier.overflow_tokens)  # what was found of the context is not forgotten for a tokenizer
        number = 0 if earlier is None else earlier.number + wanted.again
        _permit(kept, endpoint, price, wanted, before)
        observer = observer or Silent()
        observer.stage("probe", f"{endpoint.model} at {endpoint.base_url}: at most {MOST_CALLS} calls, {wanted.tokens:,} tokens")
        with StopRequest("Give the same command again: it goes on from what was bought.") as stop:
            buyer = _Buyer(kept, transport or open_transport(), PATIENCE, stop, observer)
            report = asyncio.run(_probed(endpoint, buyer, wanted, number))
        after = kept.spend()
        probed = Probed(
            endpoint=endpoint,
            report=report,
            day=clock.now().date().isoformat(),
            number=number,
            overflow_tokens=wanted.overflow_tokens,
            tokenizer=_fingerprint(wanted.index),
            verdict=verdict,
            store=store,
            spend=after,
            sent=buyer.sent,
            reused=buyer.reused,
            spent=after.settled - before.settled,
            reserved=after.reserved - before.reserved,
            warnings=tuple(filter(None, [price.age_warning(clock.now().date()) if price is not None else None])),
        )
        kept.remember("probe", endpoint, probed.kept())
        return probed


def token_index(directory: Path) -> TokenIndex:
    """The teacher's tokenizer, which tells the ids of tokens. Needs the extra `train`: raises StillroomError 'missing-extra' without it."""
    tokenizer = optional.load("stillroom.models.tokenizers", extra="train").load_tokenizer(str(directory))
    return TokenIndex(Vocabulary.from_tokenizer(tokenizer, len(tokenizer)))


def _fingerprint(index: TokenIndex | None) -> str | None:
    return None if index is None else index.vocabulary.fingerprint


def _earlier(store: RequestStore, endpoint: Endpoint, verdict: Verdict, spend: Spend) -> Probed | None:
    """The probe that the store remembers; None where there is none, or one of another version."""
    stored = store.recall("probe", endpoint)
    try:
        names = ("day", "number", "overflow_tokens", "tokenizer")
        known = None if stored is None else {name: stored[name] for name in names} | {"report": ProbeReport.from_json(stored)}
    except (CollectError, KeyError):
        return None
    return None if known is None else Probed(endpoint=endpoint, verdict=verdict, store=store.path, spend=spend, **known)


def _covers(earlier: Probed, wanted: Wanted) -> bool:
    """Whether all that is wanted was found out then."""
    return wanted.overflow_tokens in (None, earlier.overflow_tokens) and _fingerprint(wanted.index) in (None, earlier.tokenizer)


def _permit(store: RequestStore, endpoint: Endpoint, price: Price | None, wanted: Wanted, before: Spend) -> None:
    """A cap on what is spent from now on, both routes together."""
    caps, gone = Caps.of(wanted.max_money, wanted.tokens), before.settled + before.reserved
    above = Caps(money=None if caps.money is None else caps.money + gone.money, tokens=wanted.tokens + gone.tokens)
    for route in ROUTES:
        store.permit(replace(endpoint, route=route), price, above)


async def _probed(endpoint: Endpoint, buyer: _Buyer, wanted: Wanted, number: int) -> ProbeReport:
    """Raises where not one call was answered: there is nothing to report then."""
    try:
        report = await probe(endpoint, buyer, overflow_tokens=wanted.overflow_tokens, index=wanted.index, first_sample=2 * number)
    finally:
        await buyer.transport.close()
    answered = any(finding.verdict in ("proved", "refuted") for finding in report.findings)
    if not answered and buyer.first_failure is not None:
        raise refusal(endpoint, buyer.first_failure)
    return report


class _Buyer:
    """Buys one call at a time: from the store where it was bought before, else reserved, sent, settled and kept whole."""

    def __init__(self, store: RequestStore, transport: Transport, policy: Policy, stop: StopRequest, observer: Observer) -> None:
        self.transport = transport
        self._store, self._policy, self._stop, self._observer = store, policy, stop, observer
        self._headers = request_headers()
        self._calls = self.sent = self.reused = 0
        self.first_failure: Failure | None = None

    async def __call__(self, call: Call) -> Response | Failure:
        self._stop.check("between two calls of the probe")
        found = self._kept(call.key)
        if found is not None:
            self.reused += 1
        else:
            found = await self._bought(call)
        if isinstance(found, Failure):
            self.first_failure = self.first_failure or found
        self._calls += 1
        self._observer.progress(self._calls, MOST_CALLS + 1, "calls", {})
        return found

    def _kept(self, key: str) -> Response | Failure | None:
        raw = self._store.raw(key)
        if raw is not None:
            return Response(status=200, headers={}, body=raw, seconds=0.0)
        if self._store.answer(key) is not None:
            return Failure(reason="malformed", message="the store has an answer to this call from a collection, and not its body")
        return self._store.failure(key)

    async def _bought(self, call: Call) -> Response | Failure:
        for attempt in range(1, self._policy.attempts + 1):
            found = await self._once(call)
            if not isinstance(found, Failure) or found.reason not in AGAIN or attempt >= self._attempts(found):
                break
            wait = max(found.retry_after_seconds or 0.0, self._policy.first_wait_seconds * 2.0 ** (attempt - 1))
            await self._wait(min(wait, self._policy.longest_wait_seconds))
        if isinstance(found, Failure) and found.reason in ("bad-key", "quota-exhausted", "not-sent"):
            raise refusal(call.endpoint, found)
        return found

    def _attempts(self, failure: Failure) -> int:
        """A server that breaks on what it was asked breaks again, and may bill each time."""
        return min(2, self._policy.attempts) if failure.reason in ("server-error", "malformed") else self._policy.attempts

    async def _once(self, call: Call) -> Response | Failure:
        headers = authorised(call.endpoint, self._headers)
        reservation = await self._store.begin(call)
        self.sent += 1
        found = await send(self.transport, self._store, reservation, headers, self._policy.timeout_seconds)
        if isinstance(found, Failure):
            return found
        outcomes = read_response(call, found)
        answer = next((outcome for outcome in outcomes if isinstance(outcome, Answer)), None)
        outcome = outcomes[0] if answer is None else replace(answer, usage=outcomes[0].usage)  # one response, one usage
        request_id = found.headers.get("x-request-id")
        await self._store.settle(reservation, outcome, found.body, status=found.status, request_id=request_id, keep_raw=True)
        return outcome if isinstance(outcome, Failure) else found

    async def _wait(self, seconds: float) -> None:
        """Ends early at a request to stop, which the next call meets."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (left := until - loop.time()) > 0 and not self._stop.asked:
            await asyncio.sleep(min(left, _LOOK_SECONDS))
        self._stop.check("while waiting to ask the endpoint again")
