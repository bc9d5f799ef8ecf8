"""What calls cost: prices from a user's dated file, caps, the most that a call can cost, what it did cost, and when a student has paid for itself.

Money is a whole number of **picos**: 10**-12 of a unit of the currency. A price per million tokens with up to six decimals is then a whole number of
picos per token, so that costs are sums of integers, equal to a bill to the last digit, and no rounding is ever done. A file of prices:

    as_of: 2026-11-01          # the day on which the prices were looked up
    currency: USD
    prices:
      - base_url: https://api.example.com/v1     # or `host: api.example.com`
        model: example-large
        input: 2.50            # per million tokens
        cached_input: 1.25     # without it: as input
        output: 10.00
        reasoning: 10.00       # without it: as output
        per_request: 0.001     # without it: 0
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import yaml

from stillroom.collect.wire import Call, Endpoint, Usage
from stillroom.core.errors import SpendError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.core.statistics import Interval, mean_interval

Picos: TypeAlias = int

PICOS_PER_UNIT = 10**12
# A price per million tokens, times this, is picos per token.
_PER_MILLION = 10**6
# SQLite adds up integers of 64 bits.
LARGEST_MONEY_CAP = 9_000_000 * PICOS_PER_UNIT
STALE_AFTER_DAYS = 90
# What chat templates put around a message and before the first one (gpt-oss and Llama 3.1 write a system message of their own, of some 60 tokens).
TOKENS_PER_MESSAGE = 16
TOKENS_PER_REQUEST = 128

_PRICES = ("input", "cached_input", "output", "reasoning", "per_request")
_ENTRY = {"base_url", "host", "model", "as_of", "currency", *_PRICES}


# -- prices ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a model costs: picos per token, and per request; as looked up on the day `as_of`."""

    currency: str
    as_of: date
    input: Picos
    cached_input: Picos
    output: Picos
    reasoning: Picos
    per_request: Picos = 0

    @cached_property
    def id(self) -> str:
        """SHA-256 of the canonical JSON of all of it."""
        return sha256_hex(canonical_json(self.as_json()))

    def as_json(self) -> Json:
        """Numbers as text: JSON's are doubles."""
        return {"as_of": self.as_of.isoformat(), "currency": self.currency} | {name: str(getattr(self, name)) for name in _PRICES}

    @classmethod
    def from_json(cls, tree: Json) -> Price:
        """The inverse of `as_json`. KeyError or ValueError for anything else."""
        return cls(currency=tree["currency"], as_of=date.fromisoformat(tree["as_of"]), **{name: int(tree[name]) for name in _PRICES})

    def age_warning(self, today: date) -> str | None:
        """A sentence where the price is old, or of a day that has not come."""
        days = (today - self.as_of).days
        if days > STALE_AFTER_DAYS:
            return f"The price was looked up on {self.as_of}, {days} days ago: look again, and write the new day into the file."
        return f"The price is dated {self.as_of}, which has not come yet: look at `as_of`." if days < 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceList:
    """Prices by whom they are asked of (a base URL, or a host) and model. `name` is what errors call it."""

    name: str
    prices: Mapping[tuple[str, str], Price]

    @classmethod
    def from_yaml(cls, path: Path) -> PriceList:
        """Reads a file of prices. Raises SpendError 'prices-invalid': missing, not YAML, an unknown key, a number that is no exact price."""
        try:
            tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_ExactLoader)  # noqa: S506 - a SafeLoader that reads decimals as decimals
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # not UTF-8, and a date that is none, are ValueErrors
            raise _invalid(f"{path}: {error}", "a YAML file of prices") from error
        return cls(name=str(path), prices=_prices_of(tree, str(path)))

    def price(self, endpoint: Endpoint) -> Price | None:
        """The price of a model at an endpoint: that of its base URL before that of its host. None where it is not known."""
        host = urlsplit(endpoint.base_url).netloc
        return self.prices.get((endpoint.base_url, endpoint.model)) or self.prices.get((host, endpoint.model))


class _ExactLoader(yaml.SafeLoader):
    """Numbers with a point become decimals, digit by digit; a key that repeats is refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"{sorted(twice)} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _exact(loader: yaml.SafeLoader, node: Any) -> Decimal | str:
    text = str(loader.construct_scalar(node))
    try:
        return Decimal(text)
    except InvalidOperation:
        return text  # .inf and .nan, which are refused where they stand


_ExactLoader.add_constructor("tag:yaml.org,2002:float", _exact)


def _prices_of(tree: Any, name: str) -> dict[tuple[str, str], Price]:
    if not isinstance(tree, dict) or not isinstance(tree.get("prices"), list):
        raise _invalid(f"{name} has no list of `prices`", "`as_of`, `currency` and `prices`")
    if unknown := set(map(str, tree)) - {"as_of", "currency", "prices"}:
        raise _invalid(f"{name} has the keys {sorted(unknown)}", "`as_of`, `currency` and `prices`")
    found: dict[tuple[str, str], Price] = {}
    for number, entry in enumerate(tree["prices"], start=1):
        where = f"entry {number} of {name}"
        key, price = _price_of(entry, tree, where)
        if key in found:
            raise _invalid(f"{where} gives {key[1]!r} at {key[0]} a second price", "one price for each")
        found[key] = price
    return found


def _price_of(entry: Any, tree: Mapping[str, Any], where: str) -> tuple[tuple[str, str], Price]:
    if not isinstance(entry, dict):
        raise _invalid(f"{where} is {type(entry).__name__}", "a mapping")
    for key in map(str, entry):
        if key not in _ENTRY:
            near = difflib.get_close_matches(key, _ENTRY, 1)
            raise _invalid(f"{where} has the key {key!r}", f"`{near[0]}`?" if near else f"one of {', '.join(sorted(_ENTRY))}")
    of = [entry[key] for key in ("base_url", "host") if key in entry]
    if len(of) != 1 or not all(isinstance(text, str) and text for text in (*of, entry.get("model"))):
        raise _invalid(f"{where} does not say of whom it is", "a `model`, and either a `base_url` or a `host`")
    as_of, currency = entry.get("as_of", tree.get("as_of")), entry.get("currency", tree.get("currency"))
    if not isinstance(as_of, date) or not isinstance(currency, str) or not currency:
        raise _invalid(f"{where} has no day or no currency", "`as_of: YYYY-MM-DD` and `currency`, there or at the top of the file")
    for needed in ("input", "output"):
        if needed not in entry:
            raise _invalid(f"{where} has no `{needed}`", "the price of a million tokens; 0 where they are free")
    picos = {
        key: _picos(entry[key], _PER_MILLION if key != "per_request" else PICOS_PER_UNIT, f"`{key}` of {where}") for key in _PRICES if key in entry
    }
    picos = {"cached_input": picos["input"], "reasoning": picos["output"]} | picos
    return (of[0].rstrip("/"), entry["model"]), Price(currency=currency, as_of=_day(as_of), **picos)


def _day(value: date) -> date:
    return date(value.year, value.month, value.day)  # YAML's timestamps are datetimes


def _picos(value: Any, scale: int, where: str) -> Picos:
    if isinstance(value, bool) or not isinstance(value, int | Decimal | str):
        raise _invalid(f"{where} is {value!r}", "a number")
    try:
        amount = Decimal(value)
    except InvalidOperation:
        raise _invalid(f"{where} is {value!r}", "a number") from None
    return _whole(amount, scale, where)


def _whole(amount: Decimal, scale: int, where: str) -> Picos:
    # Compared before it is multiplied: decimals round what has more digits than 28, and an exponent may be anything.
    if not amount.is_finite() or not 0 <= amount <= 10**9 or int(amount.as_tuple().exponent) < -12:
        raise _invalid(f"{where} is {amount}", "a number from 0 to 1,000,000,000 with as many decimals as money has here")
    scaled = amount * scale
    if scaled != int(scaled):
        raise _invalid(f"{where} is {amount}", f"at most {len(str(scale)) - 1} decimals", "what is less than a pico cannot be charged exactly")
    return int(scaled)


def _invalid(found: str, expected: str, why: str = "") -> SpendError:
    return SpendError("prices-invalid", found=found, expected=expected, why=why, do="docs/guides/probe-an-endpoint.md has a whole file.")


# -- caps ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """The most that may be spent, all calls together: picos, and tokens (prompts' and completions'). None is no cap of that kind."""

    money: Picos | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, money: Decimal | int | str | None = None, tokens: int | None = None) -> Caps:
        """`money` in units of the currency, with up to twelve decimals. Raises SpendError 'spend-cap-invalid'."""
        try:
            amount = None if money is None else Decimal(money)
            picos = None if amount is None else _whole(amount, PICOS_PER_UNIT, "the cap")
        except (InvalidOperation, SpendError):
            picos = -1
        if (picos is not None and not 0 <= picos <= LARGEST_MONEY_CAP) or (tokens is not None and not 0 <= tokens < 2**62):
            raise SpendError(
                "spend-cap-invalid",
                found=f"a cap of {money} in money and {tokens} tokens",
                expected=f"an exact amount from 0 to {LARGEST_MONEY_CAP // PICOS_PER_UNIT:,}, and a number of tokens",
                do="Mend the cap.",
            )
        return cls(money=picos, tokens=tokens)

    def require_for(self, price: Price | None, endpoint: Endpoint) -> None:
        """Raises SpendError: 'price-unknown' for money without a price, 'spend-cap-missing' where nothing bounds what is spent at `endpoint`."""
        where = f"{endpoint.model!r} at {endpoint.base_url}"
        if price is None and self.money is not None:
            raise SpendError(
                "price-unknown",
                found=f"a cap in money, and no price of {where}",
                why="a cap in money holds only where the cost of each call is known before it is made",
                do="Write the price into the file of prices (0 where it is free), or cap tokens only.",
            )
        if self.tokens is None and (price is None or self.money is None):
            raise SpendError(
                "spend-cap-missing",
                found=f"no cap on {where}" + (", and no price" if price is None else ""),
                expected="a cap in tokens" if price is None else "a cap in money or in tokens",
                why="what has no bound can cost anything",
                do="Set a cap.",
            )


# -- what a call costs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Amount:
    """Tokens and what they cost; 0 money where the price is not known."""

    tokens: int = 0
    money: Picos = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.tokens + other.tokens, self.money + other.money)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.tokens - other.tokens, self.money - other.money)

    def fits(self, caps: Caps) -> bool:
        return (caps.tokens is None or self.tokens <= caps.tokens) and (caps.money is None or self.money <= caps.money)


def worst_case(call: Call, price: Price | None, body_bytes: int | None = None) -> Amount:
    """The most that a call can cost. Raises SpendError 'call-unbounded' where its body sets no limit on the completion.

    Prompt: one token for each byte of the body's canonical JSON (`body_bytes`, where the caller knows it), TOKENS_PER_MESSAGE for each message and
    TOKENS_PER_REQUEST. That is a bound for text and for token ids, where the tokenizer is one that never makes two tokens of one byte (byte-level
    and byte-fallback vocabularies are) and the endpoint adds no more than this to what was sent; what images, or files that are named by a link,
    cost is not bounded by it. Completions: the body's limit, reasoning included, for each of the `n` (or `best_of`) completions of each prompt.
    Everything is taken at the dearest price of its kind. An endpoint that bills more breaks its own word, and shows in `Spend.overruns`.
    """
    body = call.body
    limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    if not limits or not all(isinstance(limit, int) and limit >= 0 for limit in limits):
        raise SpendError(
            "call-unbounded",
            found=f"a body with the limits {limits}" if limits else "a body without `max_tokens` and `max_completion_tokens`",
            expected="a whole number of tokens",
            why="what such a call can cost has no bound, so no cap would hold",
            do="Give the call a limit.",
        )
    prompt = (len(canonical_json(body)) if body_bytes is None else body_bytes) + TOKENS_PER_REQUEST
    messages = body.get("messages")
    prompt += TOKENS_PER_MESSAGE * (len(messages) if isinstance(messages, list) else 1)
    completions = max(limits) * _completions(body)
    money = 0
    if price is not None:
        money = prompt * max(price.input, price.cached_input) + completions * max(price.output, price.reasoning) + price.per_request
    return Amount(prompt + completions, money)


def _completions(body: Json) -> int:
    prompts = body.get("prompt")
    several = len(prompts) if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int) else 1
    wanted = [number for name in ("n", "best_of") if isinstance(number := body.get(name), int)]
    return several * max([1, *wanted])


def cost(usage: Usage, price: Price | None) -> Amount:
    """What a call cost by what was counted, exactly. ValueError for counts that cannot be: negative, or more of a kind than there are in all."""
    if not (0 <= usage.cached_tokens <= usage.prompt_tokens and 0 <= usage.reasoning_tokens <= usage.completion_tokens):
        raise ValueError(f"an endpoint cannot have counted {usage}")
    tokens = usage.prompt_tokens + usage.completion_tokens
    if price is None:
        return Amount(tokens)
    prompt = (usage.prompt_tokens - usage.cached_tokens) * price.input + usage.cached_tokens * price.cached_input
    completion = (usage.completion_tokens - usage.reasoning_tokens) * price.output + usage.reasoning_tokens * price.reasoning
    return Amount(tokens, prompt + completion + price.per_request)


def in_units(picos: Picos) -> Decimal:
    """Picos as an exact amount of the currency."""
    return Decimal(picos).scaleb(-12)


# -- reports ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """What was spent and what may be yet. settled <= what the endpoint bills <= settled + reserved <= cap.

    `settled` is what endpoints say they counted; `reserved` the worst case of calls that are under way or may have been billed without our knowing
    (`unknown` of the attempts). `overruns` are attempts that cost more than their worst case. `currency` is None where no price is known.
    `projected` is what the calls that wait are expected to cost, in units of the currency (or in tokens, without a price), with its interval.
    """

    settled: Amount
    reserved: Amount
    caps: Caps
    currency: str | None
    attempts: int
    unknown: int
    overruns: int
    projected_money: Interval | None = None
    projected_tokens: Interval | None = None


def projected(costs: Iterable[float], calls: int) -> Interval | None:
    """What `calls` more calls are expected to cost in all, from what some did cost: their mean times `calls`, with its bootstrap interval.

    It says nothing of calls whose outcome stays unknown. `n` is how many costs were looked at; None where there are none.
    """
    found = mean_interval(list(costs))
    if found is None:
        return None
    return Interval(value=found.value * calls, low=found.low * calls, high=found.high * calls, n=found.n)


@dataclass(frozen=True, slots=True)
class BreakEven:
    """After how many calls a student has paid for itself; None, with the reason, where it never does or that cannot be known."""

    calls: int | None
    reason: str | None = None


def break_even_calls(
    collection_cost: Decimal | None, training_cost: Decimal | None, teacher_cost_per_call: Decimal | None, student_cost_per_call: Decimal | None
) -> BreakEven:
    """The least number of calls at which the teacher would have cost as much as collection, training and the student's calls. One currency, all four."""
    names = ("the cost of collection", "the cost of training", "the teacher's cost of a call", "the student's cost of a call")
    costs = (collection_cost, training_cost, teacher_cost_per_call, student_cost_per_call)
    missing = [name for name, value in zip(names, costs, strict=True) if value is None]
    if missing or collection_cost is None or training_cost is None or teacher_cost_per_call is None or student_cost_per_call is None:
        return BreakEven(None, f"not known: {', '.join(missing)}")
    saved = teacher_cost_per_call - student_cost_per_call
    once = collection_cost + training_cost
    if once <= 0:
        return BreakEven(0)
    if saved <= 0:
        return BreakEven(None, f"a call of the student costs {student_cost_per_call}, which is no less than the teacher's {teacher_cost_per_call}")
    whole, rest = divmod(once, saved)
    return BreakEven(int(whole) + (rest > 0))
