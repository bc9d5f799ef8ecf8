"""What a collection is expected to cost: from the rows that a pilot bought to all of them, with intervals and the caps that would do. Makes no request."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from hashlib import sha256
from pathlib import Path

from pydantic import ValidationError

from stillroom.collect.spend import PICOS_PER_UNIT, Amount, Caps, Price, Spend, cost, in_units
from stillroom.collect.store import Attempt
from stillroom.collect.wire import Endpoint
from stillroom.core.identities import Json
from stillroom.core.statistics import Interval, predicted_total
from stillroom.data import Prompt
from stillroom.runs.documented import Documented


class Expected(Documented):
    """A number that was projected, with its 95 % interval."""

    value: float
    low: float
    high: float


class Pilot(Documented):
    """What a pilot's rows came to, and what follows from them for the whole collection: the prompts' answers and the evaluation items'."""

    day: str
    """On which it was last looked at."""
    asks: str
    """SHA-256 of what the run would ask: a pilot of anything else says nothing of it."""
    rows: int
    """Prompts that were drawn."""
    prompts: int
    """In all, the drawn ones with them."""
    items: int
    """Evaluation items, taken to cost what a prompt does."""
    tokens: Expected
    """What the endpoint is expected to count for the whole collection."""
    money: Expected | None
    """The same in money; None where the price is not known. What an endpoint does without counting it is in neither."""
    currency: str | None
    price: str | None
    """SHA-256 of the price that the money was computed at."""
    prices_as_of: str | None
    cap_tokens_needed: int
    """A cap in tokens that is enough at the upper end of the interval: for what the store holds already, and for what stays reserved, too."""
    cap_money_needed: str | None
    """The same in money, an exact decimal."""
    prompt_tokens: float
    """On average, of an answer; so with the next two."""
    completion_tokens: float
    reasoning_tokens: float
    """Among the completion's."""
    seconds_median: float | None
    """Of one request that was answered; None where none was."""
    seconds_longest: float | None
    answers_per_second: float | None
    """While there were requests under way."""
    failed: dict[str, int]
    """Rows that got no answer, by reason."""
    left_out: dict[str, int]
    """Rows whose answer nobody would learn from, by reason."""
    demoted: dict[str, int]
    """Answers whose log-probabilities did not pass verification, by reason."""
    unknown: int
    """Requests that may have been billed without our knowing: their worst case stays reserved."""

    def suffices(self, caps: Caps) -> bool:
        """Whether these caps hold what would be needed at the upper end."""
        money = None if self.cap_money_needed is None else Decimal(self.cap_money_needed)
        return (caps.tokens is None or self.cap_tokens_needed <= caps.tokens) and (
            caps.money is None or (money is not None and money <= in_units(caps.money))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Piloted:
    """A pilot, and what this command did: `spent` and `reserved` are what it added to the store's, `spend` is all of the store's.

    `signal` is what would be collected, and `why`; without a probe, as a stored probe is `probed`, that may be less than the endpoint gives.
    """

    pilot: Pilot
    endpoint: Endpoint
    signal: str
    why: str
    probed: bool
    store: Path
    spend: Spend
    spent: Amount
    reserved: Amount

    @property
    def suffices(self) -> bool:
        """Whether the caps hold what would be needed at the upper end."""
        return self.pilot.suffices(self.spend.caps)

    def to_json(self) -> Json:
        """What the store remembers, and what this command did. Money is text: JSON's numbers are doubles."""
        amounts = {"spent": self.spent, "reserved": self.reserved}
        done = {name: {"tokens": amount.tokens, "money": f"{in_units(amount.money):f}"} for name, amount in amounts.items()}
        return {
            **self.pilot.model_dump(mode="json"),
            "suffices": self.suffices,
            "signal": {"kind": self.signal, "why": self.why},
            "this_command": done,
            "store": str(self.store),
        }


def caps_needed(pilot: Pilot) -> str:
    """The caps that would do, as recipes have them."""
    tokens = f"collection.max_tokens: {pilot.cap_tokens_needed}"
    return tokens if pilot.cap_money_needed is None else f"{tokens} and max_money: {_rounded_up(Decimal(pilot.cap_money_needed))}"


def _rounded_up(amount: Decimal) -> str:
    """To three digits."""
    place = Decimal(1).scaleb(amount.adjusted() - 2)
    return f"{(amount / place).to_integral_value(ROUND_CEILING) * place:f}" if amount else "0"


def kept_pilot(found: Json | None) -> Pilot | None:
    """What a store remembers of a pilot. None where there is none, or one that this version cannot read: it is made again from what was bought."""
    if found is None:
        return None
    try:
        return Pilot.model_validate(found)
    except ValidationError:
        return None


def drawn(prompts: Sequence[Prompt], rows: int, seed: int) -> list[Prompt]:
    """`rows` prompts drawn at random without replacement, in the order of the prompts: those whose ids, hashed with the seed, come first.

    Their place in the file does not matter, and a larger draw contains a smaller one.
    """
    chosen = heapq.nsmallest(rows, range(len(prompts)), key=lambda index: sha256(f"pilot {seed} {prompts[index].id}".encode()).digest())
    return [prompts[index] for index in sorted(chosen)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """A drawn row: how its call was sent, and what became of it. No attempts where the prompt is too long to be asked."""

    attempts: Sequence[Attempt] = ()
    failed: str | None = None
    left_out: str | None = None
    demoted: str | None = None

    def charged(self, price: Price | None) -> Amount:
        """What was counted, at this price."""
        return sum((cost(attempt.usage, price) for attempt in self.attempts if attempt.usage is not None), Amount())

    @property
    def held(self) -> Amount:
        """What stays reserved."""
        return sum((attempt.held for attempt in self.attempts), Amount())


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The collection that the rows were drawn for. `bought` of its rows, the drawn ones among them, have ended; `used` is what counts against the caps by
    now, of the whole store. `worst` is the most that one row can cost, `worst_mean` the same on average.
    """

    prompts: int
    items: int
    bought: int
    used: Amount
    worst: Amount
    worst_mean: Amount


def estimate(rows: Sequence[Fate], whole: Whole, price: Price | None, *, day: str, asks: str) -> Pilot:
    """What the drawn rows say of the whole. They are a simple random sample of the prompts; `predicted_total` has the method and what its interval means.

    Evaluation items are predicted as if they were more prompts, which they are where both come from one source.
    """
    charged = [row.charged(price) for row in rows]
    more = whole.prompts + whole.items - len(rows)
    tokens, money = _total(charged, more, whole.worst_mean)
    needed = _needed([one + row.held for one, row in zip(charged, rows, strict=True)], whole)
    attempts = [attempt for row in rows for attempt in row.attempts]
    answered = [attempt for attempt in attempts if attempt.answered]
    counted = [attempt.usage for attempt in answered if attempt.usage is not None]
    seconds = sorted(attempt.seconds for attempt in answered)
    busy = _busy_seconds(attempts)
    return Pilot(
        day=day,
        asks=asks,
        rows=len(rows),
        prompts=whole.prompts,
        items=whole.items,
        tokens=Expected(value=tokens.value, low=tokens.low, high=tokens.high),
        money=None if price is None else Expected(**{end: getattr(money, end) / PICOS_PER_UNIT for end in ("value", "low", "high")}),
        currency=None if price is None else price.currency,
        price=None if price is None else price.id,
        prices_as_of=None if price is None else price.as_of.isoformat(),
        cap_tokens_needed=needed.tokens,
        cap_money_needed=None if price is None else f"{in_units(needed.money).normalize():f}",
        prompt_tokens=_mean([usage.prompt_tokens for usage in counted]),
        completion_tokens=_mean([usage.completion_tokens for usage in counted]),
        reasoning_tokens=_mean([usage.reasoning_tokens for usage in counted]),
        seconds_median=seconds[len(seconds) // 2] if seconds else None,
        seconds_longest=seconds[-1] if seconds else None,
        answers_per_second=len(answered) / busy if answered and busy > 0 else None,
        failed=_by_reason(row.failed for row in rows),
        left_out=_by_reason(row.left_out for row in rows),
        demoted=_by_reason(row.demoted for row in rows),
        unknown=sum(attempt.held != Amount() for attempt in attempts),
    )


def _total(amounts: Sequence[Amount], more: int, most: Amount) -> tuple[Interval, Interval]:
    """Tokens, and money in picos."""
    tokens = predicted_total([amount.tokens for amount in amounts], more, most=most.tokens)
    money = predicted_total([amount.money for amount in amounts], more, most=most.money)
    assert tokens is not None, "there is a row, and a row's cost has a bound"
    assert money is not None, "likewise"
    return tokens, money


def _needed(amounts: Sequence[Amount], whole: Whole) -> Amount:
    """The caps that would do: what is used, what the rest comes to at the upper end, and room for the worst case of the last call."""
    more = whole.prompts + whole.items - whole.bought
    if more <= 0:
        return whole.used
    tokens, money = _total(amounts, more, whole.worst_mean)
    gone = sum(amounts, Amount())
    return whole.used + Amount(math.ceil(tokens.high) - gone.tokens, math.ceil(money.high) - gone.money) + whole.worst


def _busy_seconds(attempts: Sequence[Attempt]) -> float:
    """How long at least one of them was under way."""
    busy, until = 0.0, -math.inf
    for attempt in sorted(attempts, key=lambda one: one.began):
        ended = attempt.began + attempt.seconds
        busy += max(0.0, ended - max(attempt.began, until))
        until = max(until, ended)
    return busy


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _by_reason(reasons: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(reason for reason in reasons if reason is not None).most_common())
