"""What an endpoint really honours, proved by a few cheap calls and not by its documentation.

Every call goes through `buy`, so that whoever pays reserves, charges and keeps it. A usual probe makes 14 to 20 calls, `MOST_CALLS` at the worst, nearly
all of at most 48 tokens. A finding is proved or refuted by what came back, with the evidence in words and the keys of the calls that show it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy

from stillroom.collect.logprobs import Demoted, Expectations, TokenIndex, Verified, verify
from stillroom.collect.reading import clean, read
from stillroom.collect.wire import Answer, Call, Endpoint, Failure, Messages, Places, Response, Route, Settings, chat_body, completion_body
from stillroom.core.errors import CollectError
from stillroom.core.identities import Json

VERSION = 1
MOST_CALLS = 40
_TOKENS = 24  # of most answers
_LONG_TOKENS = 48  # of those that have to differ by chance
_TOP = 5  # alternatives that every endpoint with log-probabilities gives
_ENOUGH = 128  # more alternatives than that are not looked for
_SEED_ROUNDS = 6
_CHANCE = 1e-3  # of a false verdict on `seed`, at most, where log-probabilities tell it

Verdict: TypeAlias = Literal["proved", "refuted", "not-supported", "not-tested"]
Name: TypeAlias = Literal[
    "chat",  # the chat route answers
    "completions",  # the completions route answers; its value is the shape of its log-probabilities
    "answers",  # unlike questions get unlike answers
    "logprobs",
    "top_logprobs",  # as many alternatives as asked; its value is the most that are listed
    "entries",  # log-probabilities pass verification; its value is the share of answers that do
    "temperature",  # its value: whether log-probabilities are from "before" it or "after" it
    "token_ids",
    "usage",
    "n",
    "seed",
    "stop",
    "max_tokens",
    "finish_reason",
    "response_format",
    "echo",
    "prompt_logprobs",
    "context",  # past the context length: its value is "error", "truncation" or "silence"
    "one_model",  # one model, fingerprint and provider in every answer
]

# Given in place of an answer where a call cannot be had: the response, or why there is none.
Buy: TypeAlias = Callable[[Call], Awaitable[Response | Failure]]

_MESSAGES: Messages = ({"role": "user", "content": "Tell me a short story about a lighthouse, a violin and a lost letter."},)
_FORCED = "zo\u00eb \u65e5\u672c \U0001f642"  # no model says it unasked, and byte-level tokenizers cut it inside characters
_FORCED_PLAIN = "zqx-7431"


def _format(value: str) -> Json:
    properties = {"colour": {"type": "string", "enum": [value]}}
    schema = {"type": "object", "properties": properties, "required": ["colour"], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "colour", "strict": True, "schema": schema}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`calls` are the keys of the calls that show it."""

    name: Name
    verdict: Verdict
    evidence: str
    value: str | int | float | None = None
    calls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """One finding for each name, in the order of `Name`. `calls`: how many were made. `models`, `fingerprints`, `providers`: all that answers named."""

    endpoint: Json
    findings: tuple[Finding, ...]
    calls: int
    models: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()

    def __getitem__(self, name: Name) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)

    def proved(self, name: Name) -> bool:
        return self[name].verdict == "proved"

    def to_json(self) -> Json:
        """Plain values, with the version of this form."""
        return {"format": "stillroom probe", "version": VERSION, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_json(cls, value: Any) -> ProbeReport:
        """What `to_json` gave. Raises CollectError 'probe-invalid' for anything else."""
        try:
            if value["format"] != "stillroom probe" or value["version"] != VERSION:
                raise ValueError(f"version {value['version']!r}")
            findings = tuple(Finding(**{**item, "calls": tuple(item["calls"])}) for item in value["findings"])
            if tuple(finding.name for finding in findings) != get_args(Name) or any(f.verdict not in get_args(Verdict) for f in findings):
                raise ValueError("other findings than this version has")
            names = {name: tuple(str(item) for item in value[name]) for name in ("models", "fingerprints", "providers")}
            return cls(endpoint=dict(value["endpoint"]), findings=findings, calls=int(value["calls"]), **names)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            expected, do = f"a report of version {VERSION}", "Probe the endpoint again."
            raise CollectError("probe-invalid", found=f"a report that cannot be read: {clean(str(error))}", expected=expected, do=do) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """Which targets can be collected. `k` and `reported` hold for top_k. `usage_trusted`: whether a row's count of tokens may be held against it."""

    kind: Literal["text", "top_k"]
    why: str
    k: int = 0
    reported: Literal["before", "after"] = "before"
    usage_trusted: bool = True


def signal(report: ProbeReport) -> Signal:
    """The richest targets that the findings allow: top_k where log-probabilities were verified, text otherwise."""
    if not report.proved("chat") and not report.proved("completions"):
        return Signal(kind="text", why=f"no route was seen to answer: {report['chat'].evidence}")
    for name in ("logprobs", "entries", "temperature"):
        finding = report[name]
        share = finding.value if name == "entries" and isinstance(finding.value, float) else None
        if finding.verdict != "proved" and not (share is not None and share >= 0.5):
            return Signal(kind="text", why=f"{name} {finding.verdict}: {finding.evidence}")
    k = report["top_logprobs"].value
    if not isinstance(k, int) or k < 1:
        return Signal(kind="text", why=f"no alternatives: {report['top_logprobs'].evidence}")
    why = f"{k} alternatives for each token; {report['entries'].evidence}"
    reported: Literal["before", "after"] = "after" if report["temperature"].value == "after" else "before"
    return Signal(kind="top_k", why=why, k=k, reported=reported, usage_trusted=report["usage"].verdict != "refuted")


async def probe(
    endpoint: Endpoint,
    buy: Buy,
    *,
    messages: Messages = _MESSAGES,
    overflow_tokens: int | None = None,
    index: TokenIndex | None = None,
    first_sample: int = 0,
) -> ProbeReport:
    """Asks, and reports. `messages` is what the chat route is asked: something that has more than one answer, best one of the job's own prompts.

    `overflow_tokens` is a length past the context that may be sent and paid for (None: that is not tested). `index` is the teacher's tokenizer, where it
    is known. `first_sample` is that of the calls: with another, all are other purchases (samples are at most 1 apart). Whatever `buy` raises ends the
    probe. A failure that is not the endpoint's refusal of what was asked leaves its finding not tested.
    """
    run = _Probe(endpoint, buy, messages, index, first_sample)
    await run.all(overflow_tokens)
    return run.report()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One call, and what came: answers, or why there are none."""

    call: Call
    answers: list[Answer]
    failure: Failure | None = None
    document: Json | None = None

    @property
    def first(self) -> Answer | None:
        return self.answers[0] if self.answers else None

    @property
    def refused(self) -> bool:
        return self.failure is not None and self.failure.reason in ("invalid-request", "not-found")


class _Stopped(Exception):
    """A failure after which every further call would fail too."""


@dataclass(slots=True)
class _Probe:
    endpoint: Endpoint
    buy: Buy
    messages: Messages
    index: TokenIndex | None
    first_sample: int
    found: dict[str, Finding] = field(default_factory=dict)
    asked: list[_Asked] = field(default_factory=list)
    checked: list[tuple[_Asked, Answer, float, bool]] = field(default_factory=list)  # with the temperature, and whether the text was forced
    top: int | None = None  # alternatives that may be asked for; None: no log-probabilities
    not_asked: str = "the chat route does not answer"

    # -- asking

    async def ask(self, settings: Settings, *, route: Route | None = None, messages: Messages | None = None, sample: int = 0) -> _Asked:
        endpoint, messages = replace(self.endpoint, route=route or self.endpoint.route), messages or self.messages
        if endpoint.route == "chat":
            body = chat_body(endpoint, messages, settings)
        else:
            body = completion_body(endpoint, _prompt_of(messages), settings)
        call = Call(endpoint=endpoint, body=body, sample=self.first_sample + sample)
        got = await self.buy(call)
        if isinstance(got, Failure):
            asked = _Asked(call=call, answers=[], failure=got)
        else:
            reading = read(call, got)
            failures = [outcome for outcome in reading.outcomes if isinstance(outcome, Failure)]
            answers = [outcome for outcome in reading.outcomes if isinstance(outcome, Answer)]
            asked = _Asked(call=call, answers=answers, failure=failures[0] if failures and not answers else None, document=reading.document)
        self.asked.append(asked)
        if asked.failure is not None and asked.failure.reason in ("quota-exhausted", "bad-key"):
            raise _Stopped(_words(asked.failure))
        if settings.top_logprobs is not None:
            temperature = 1.0 if settings.temperature is None else settings.temperature
            forced = settings.response_format is not None
            # A server may write the part of a token before a stop string as other tokens, and an echo begins with what it did not generate.
            plain = settings.response_format == _format(_FORCED_PLAIN)  # shows nothing of fragments, and servers tidy such a text
            if not settings.stop and not settings.extra.get("echo") and not plain:
                self.checked += [(asked, answer, temperature, forced) for answer in asked.answers]
        return asked

    def settings(self, *, tokens: int = _TOKENS, temperature: float = 0.0, top: int | None = None, **more: Any) -> Settings:
        return Settings(max_tokens=tokens, temperature=temperature, top_logprobs=self.top if top is None else top, **more)

    def note(self, name: Name, verdict: Verdict, evidence: str, *asked: _Asked, value: str | int | float | None = None) -> None:
        self.found[name] = Finding(name=name, verdict=verdict, evidence=evidence, value=value, calls=tuple(one.call.key for one in asked))

    def fail(self, name: Name, asked: _Asked) -> None:
        """Notes why a call has no answer: what was asked is refused, or something else was in the way."""
        assert asked.failure is not None, "there is an answer"
        self.note(name, "not-supported" if asked.refused else "not-tested", _words(asked.failure), asked)

    # -- the order of calls

    async def all(self, overflow_tokens: int | None) -> None:
        try:
            greedy = await self.main_route()
            if greedy is not None:
                await self.rest(greedy)
                await self.overflow(overflow_tokens)
            await self.other_route()
            await self.echo()
        except _Stopped as stopped:
            self.not_asked = f"the probe was stopped: {stopped}"

    async def rest(self, greedy: _Asked) -> None:
        await self.alternatives()
        await self.temperature()
        await self.several()
        await self.seed()
        await self.stop(greedy)
        await self.limit(greedy)
        await self.form()
        await self.extras()

    async def main_route(self) -> _Asked | None:
        route = self.endpoint.route
        self.top = _TOP
        greedy = await self.ask(self.settings())
        if greedy.refused:
            with_logprobs, self.top = greedy, None
            greedy = await self.ask(self.settings())
            if greedy.first is not None:
                self.note("logprobs", "not-supported", _words(with_logprobs.failure), with_logprobs)
        if greedy.first is None:
            self.no_answer(route, greedy)
            self.top, self.not_asked = None, f"the {route} route gave no answer: {_words(greedy.failure)}"
            return None
        self.route_answers(route, greedy)
        return greedy

    async def other_route(self) -> None:
        route: Route = "completions" if self.endpoint.route == "chat" else "chat"
        asked = await self.ask(self.settings(), route=route)
        if asked.refused and self.top is not None:
            asked = await self.ask(replace(self.settings(), top_logprobs=None), route=route)
        if asked.first is None:
            self.no_answer(route, asked)
        else:
            self.route_answers(route, asked)

    def route_answers(self, route: Route, asked: _Asked) -> None:
        shape = _shape(asked.document)
        characters = len(asked.first.text) if asked.first is not None else 0
        self.note(route, "proved", f"{characters} characters came; log-probabilities: {shape}", asked, value=shape)

    def no_answer(self, route: Route, asked: _Asked) -> None:
        verdict: Verdict = "refuted" if asked.failure is not None and asked.failure.reason == "content-filtered" else "not-tested"
        self.note(route, "not-supported" if asked.refused else verdict, _words(asked.failure), asked)

    async def alternatives(self) -> None:
        """Whether log-probabilities come at all, and how many alternatives at most: 20, one more, many; then by halves."""
        if self.top is None:
            self.note("top_logprobs", "not-supported", self.found["logprobs"].evidence)
            return
        first = self.asked[0]
        if first.first is None or first.first.places is None:
            unreadable = first.first is not None and first.first.places_unreadable
            self.note("logprobs", "refuted", "what came cannot be read" if unreadable else "they were asked for, and the answer has none", first)
            self.note("top_logprobs", "not-tested", "there are no log-probabilities")
            self.top = None
            return
        self.note("logprobs", "proved", f"{len(first.first.places)} entries", first)
        listed, asked_for = {_TOP: _listed(first.first.places)}, [first]
        good, bad = _TOP, _ENOUGH + 1
        for wanted in (20, 21, _ENOUGH):
            if good < wanted < bad:
                good, bad = await self._try(wanted, good, bad, listed, asked_for)
        while bad - good > 1 and good < _ENOUGH:
            good, bad = await self._try((good + bad) // 2, good, bad, listed, asked_for)
        limit = f"{good} may be asked for" + ("" if good < _ENOUGH else " and perhaps more")
        most = listed[good]
        whole_vocabulary = good > 20 and most == len({listed[wanted] for wanted in listed if wanted >= most}) * most
        if most >= good or whole_vocabulary:
            self.note("top_logprobs", "proved", f"{limit}, and {most} are listed", *asked_for, value=most)
        else:
            self.note("top_logprobs", "refuted", f"{limit}, but only {most} are listed", *asked_for, value=most)

    async def _try(self, wanted: int, good: int, bad: int, listed: dict[int, int], asked_for: list[_Asked]) -> tuple[int, int]:
        asked = await self.ask(self.settings(tokens=1, top=wanted))
        asked_for.append(asked)
        if asked.first is None or asked.first.places is None:
            return good, wanted
        listed[wanted] = _listed(asked.first.places)
        return wanted, bad

    async def temperature(self) -> None:
        """The same place at two temperatures: before it the two lists are one, after it the one's differences are a multiple of the other's."""
        if self.top is None:
            self.note("temperature", "not-tested", "there are no log-probabilities")
            return
        one, half = [await self.ask(self.settings(tokens=tokens, temperature=value)) for tokens, value in ((_LONG_TOKENS, 1.0), (1, 0.5))]
        if one.first is None or half.first is None:
            self.fail("temperature", one if one.first is None else half)
            return
        ratio = _ratio(one.first.places, half.first.places)
        evidence = f"at temperature 0.5 the differences at one place are {ratio:.2f} times those at 1" if ratio is not None else ""
        if ratio is None:
            self.note("temperature", "not-tested", "too few alternatives are in both lists, or all are as likely", one, half)
        elif abs(ratio - 1) < 0.1:
            self.note("temperature", "proved", evidence, one, half, value="before")
        elif abs(ratio - 2) < 0.2:
            self.note("temperature", "proved", evidence, one, half, value="after")
        else:
            self.note("temperature", "refuted", f"{evidence}: neither the same nor twice", one, half)

    async def several(self) -> None:
        asked = await self.ask(self.settings(tokens=8, temperature=1.0, n=3))
        if asked.first is None:
            self.fail("n", asked)
            return
        came = len(asked.answers)
        evidence = f"3 asked for, {came} came"
        entries = sum(len(answer.places) for answer in asked.answers if answer.places is not None)
        usage = asked.first.usage
        if came == 3 and usage is not None and entries > usage.completion_tokens:
            evidence += f"; the usage counts {usage.completion_tokens} of their {entries} tokens"
        self.note("n", "proved" if came == 3 else "refuted", evidence, asked)

    async def seed(self) -> None:
        """The same seed twice, then another, until equal texts can no longer be chance. Asks for a story: a job's own prompt may have one answer."""
        pairs: list[tuple[_Asked, _Asked]] = []
        chance = 1.0
        for number in range(_SEED_ROUNDS):
            settings = self.settings(tokens=_LONG_TOKENS, temperature=1.0, seed=1009 + number)
            pair = (await self.ask(settings, messages=_MESSAGES), await self.ask(settings, messages=_MESSAGES, sample=1))
            failed = next((asked for asked in pair if asked.first is None), None)
            if failed is not None:
                self.fail("seed", failed)
                return
            pairs.append(pair)
            if not _same(pair):
                self.note("seed", "refuted", f"seed {1009 + number} twice gave two texts", *pair)
                return
            known = _chance(pair[0].first)
            chance *= known if known is not None else 0.1
            texts = {one.first.text for one, _ in pairs if one.first is not None}
            if chance < _CHANCE and len(pairs) > 1:
                break
        every = [asked for pair in pairs for asked in pair]
        measured = self.top is not None
        said = f"{len(pairs)} seeds, each twice: {len(texts)} texts, equal within each seed"
        if len(texts) == 1 and (chance < _CHANCE or not measured):
            self.note("seed", "refuted", f"{said}; another seed or a temperature of 1 changes nothing", *every)
        elif chance >= _CHANCE and measured:
            self.note(
                "seed", "not-tested", f"{said}; equal by chance with a probability of about {chance:.1g}: the prompt leaves too little choice", *every
            )
        else:
            odds = f"by chance with a probability of about {chance:.0e}" if measured else "the chance of that is not known"
            self.note("seed", "proved", f"{said}; {odds}", *every)

    async def stop(self, greedy: _Asked) -> None:
        text = greedy.first.text if greedy.first is not None else ""
        string = _stop_in(text)
        if string is None:
            self.note("stop", "not-tested", "the answer is too short to stop inside it", greedy)
            return
        asked = await self.ask(self.settings(stop=(string,)))
        if asked.first is None:
            self.fail("stop", asked)
            return
        before, came = text[: text.index(string)], asked.first.text
        if came.rstrip() == before.rstrip():
            self.note("stop", "proved", f"the answer ends before {string!r}", greedy, asked)
        elif string in came:
            self.note(
                "stop", "refuted", f"the answer goes on after {string!r}" if not came.endswith(string) else f"{string!r} is kept", greedy, asked
            )
        else:
            self.note("stop", "not-tested", "at temperature 0 another answer came, without the stop string", greedy, asked)

    async def limit(self, greedy: _Asked) -> None:
        asked = await self.ask(self.settings(tokens=2))
        if asked.first is None:
            self.fail("max_tokens", asked)
            self.note("finish_reason", "not-tested", "no answer that was cut")
            return
        answer, whole = asked.first, greedy.first.text if greedy.first is not None else ""
        entries = len(answer.places) if answer.places is not None else None
        counted = answer.usage.completion_tokens if answer.usage is not None else None
        longest = max([2 * 24, *(len(token) for token in (answer.places.tokens_T or [] if answer.places is not None else []))])
        if (entries is not None and entries > 2) or len(answer.text) > 2 * longest or (answer.text == whole and len(whole) > 2 * longest):
            self.note("max_tokens", "refuted", f"2 tokens asked for, {entries or counted or 'more'} came", asked)
            self.note("finish_reason", "not-tested", "no answer could be cut", asked)
            return
        cut = answer.text != whole or (greedy.first is not None and greedy.first.finish_reason == "length")
        if not cut and len(whole) <= 4:
            self.note("max_tokens", "not-tested", "the whole answer may have no more than 2 tokens", asked)
            self.note("finish_reason", "not-tested", "no answer was cut", asked)
            return
        self.note("max_tokens", "proved", f"2 tokens asked for, {entries if entries is not None else counted} came", asked)
        right = answer.finish_reason == "length"
        self.note("finish_reason", "proved" if right else "refuted", f"an answer that was cut says {answer.finish_reason!r}", asked)

    async def form(self) -> None:
        """A schema with one value; a plain one after it where the first fails, for a grammar can only say what the tokenizer can."""
        for value in (_FORCED, _FORCED_PLAIN):
            asked = await self.ask(self.settings(tokens=4 * _TOKENS, temperature=1.0, response_format=_format(value)))
            if asked.first is not None:
                held = _is_forced(asked.first.text, value)
                evidence = "the only value that the schema allows came" if held else "what came is not what the schema allows"
                self.note("response_format", "proved" if held else "refuted", evidence, asked)
                return
            self.fail("response_format", asked)
            if asked.refused:
                return

    async def extras(self) -> None:
        """The fields of vLLM's own, which others refuse or pass over."""
        asked = await self.ask(self.settings(tokens=1, extra={"prompt_logprobs": 1, "return_token_ids": True}))
        document = asked.document or {}
        choices = document.get("choices") if isinstance(document.get("choices"), list) else []
        prompt = [*(choice.get("prompt_logprobs") for choice in choices or [] if isinstance(choice, dict)), document.get("prompt_logprobs")]
        if asked.first is None:
            self.fail("prompt_logprobs", asked)
        elif any(isinstance(value, list) and value for value in prompt):
            self.note("prompt_logprobs", "proved", "they came beside the answer", asked)
        else:
            self.note("prompt_logprobs", "refuted", "asked for and passed over", asked)
        with_ids = [one for one, answer, _, _ in self.checked if answer.places is not None and answer.places.ids_T is not None]
        if with_ids:
            self.note("token_ids", "proved", "every entry has an id", with_ids[0], value="entries")
        elif asked.first is not None and asked.first.token_ids is not None:
            self.note("token_ids", "proved", "they come as a list when asked for", asked, value="list")
        else:
            self.note("token_ids", "not-supported", "no ids in entries, and none when asked for", asked)

    async def echo(self) -> None:
        completions = self.found["completions"]
        if completions.verdict != "proved":
            self.note("echo", "not-tested", "the completions route gave no answer")
            return
        with_logprobs = completions.value != "none"
        settings = replace(self.settings(tokens=1, extra={"echo": True}), top_logprobs=1 if with_logprobs else None)
        asked = await self.ask(settings, route="completions")
        if asked.first is None:
            self.fail("echo", asked)
            return
        said = asked.first.text.lstrip().startswith(_prompt_of(self.messages).lstrip()[:20])
        entries = len(asked.first.places) if asked.first.places is not None else 0
        evidence = f"the text {'begins' if said else 'does not begin'} with the prompt; {entries} entries of log-probabilities for 1 token"
        self.note("echo", "proved" if said and (entries > 1 or not with_logprobs) else "refuted", evidence, asked)

    async def overflow(self, tokens: int | None) -> None:
        if tokens is None:
            self.note("context", "not-tested", "no length was given that may be sent")
            return
        messages = ({"role": "user", "content": "word " * tokens},)
        asked = await self.ask(self.settings(tokens=1), messages=messages)
        if asked.failure is not None:
            if asked.failure.reason == "context-overflow":
                self.note("context", "proved", _words(asked.failure), asked, value="error")
            else:
                self.fail("context", asked)
            return
        usage = asked.first.usage if asked.first is not None else None
        if usage is None:
            self.note("context", "refuted", f"an answer to {tokens} words, and no usage", asked, value="silence")
        elif usage.prompt_tokens < tokens:
            self.note(
                "context", "refuted", f"an answer to {tokens} words, of which {usage.prompt_tokens} tokens were read", asked, value="truncation"
            )
        else:
            self.note("context", "not-tested", f"{usage.prompt_tokens} tokens fit into the context", asked)

    # -- what all calls say together

    def report(self) -> ProbeReport:
        self._entries()
        self._usage()
        self._one_model()
        self._answers()
        findings = tuple(self.found.get(name) or Finding(name=name, verdict="not-tested", evidence=self.not_asked) for name in get_args(Name))
        seen = [answer for asked in self.asked for answer in asked.answers]
        return ProbeReport(
            endpoint=self.endpoint.identity,
            findings=findings,
            calls=len(self.asked),
            models=tuple(sorted({answer.model for answer in seen if answer.model})),
            fingerprints=tuple(sorted({answer.fingerprint for answer in seen if answer.fingerprint})),
            providers=tuple(sorted({answer.provider for answer in seen if answer.provider})),
        )

    def _results(self) -> list[tuple[_Asked, Answer, Verified | Demoted, bool]]:
        """Every answer that log-probabilities were asked for with, checked without its usage, which is a matter of its own."""
        reported: Literal["before", "after"] = "after" if "temperature" in self.found and self.found["temperature"].value == "after" else "before"
        results: list[tuple[_Asked, Answer, Verified | Demoted, bool]] = []
        for asked, answer, temperature, forced in self.checked:
            # What a schema forces is not the likeliest.
            expected = Expectations(alternatives=0, temperature=1.0 if forced else temperature, reported=reported, index=self.index)
            text = _with_its_spaces(answer) if forced else answer.text
            result = verify(replace(answer, text=text, usage=None), expected)
            results.append((asked, answer, result, forced))
        short = [
            (number, answer) for number, (asked, answer, result, _) in enumerate(results) if len(asked.answers) == 1 and _is_short(answer, result)
        ]
        # Where tokens are seen to be missing, or only answers with characters of several tokens are short, the entries lack; otherwise the usage is wrong.
        missing = any(isinstance(result, Demoted) and result.reason == "text-differs" for _, _, result, _ in results)
        if missing or not any(answer.text.isascii() for _, answer in short):
            for number, _ in short:
                asked, answer, _, forced = results[number]
                results[number] = (asked, answer, Demoted(reason="count-differs"), forced)
        return results

    def _entries(self) -> None:
        results = [item for item in self._results() if item[1].places is not None or item[1].places_unreadable]
        if not results:
            return
        reasons = Counter(result.reason for _, _, result, _ in results if isinstance(result, Demoted))
        free = [isinstance(result, Verified) for _, _, result, forced in results if not forced]
        share = sum(free) / len(free) if free else 0.0
        bad = [asked for asked, _, result, _ in results if isinstance(result, Demoted)]
        if not reasons:
            self.note("entries", "proved", f"all {len(results)} answers with log-probabilities pass verification", value=1.0)
            return
        told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        forced = " (where a schema forces characters of several tokens)" if share == 1.0 else ""
        self.note("entries", "refuted", f"{len(bad)} of {len(results)} answers fail verification{forced}: {told}", *bad, value=share)

    def _usage(self) -> None:
        single = [
            (asked, asked.first) for asked in self.asked if len(asked.answers) == 1 and asked.first is not None and "echo" not in asked.call.body
        ]
        if not single:
            return
        missing = [asked for asked, answer in single if answer.usage is None]
        if missing:
            self.note("usage", "refuted", f"{len(missing)} of {len(single)} answers have none", *missing)
            return
        results = [
            (asked, answer, result) for asked, answer, result, _ in self._results() if isinstance(result, Verified) and len(asked.answers) == 1
        ]
        wrong = [asked for asked, answer, result in results if _is_short(answer, result)]
        if wrong:
            self.note("usage", "refuted", f"in {len(wrong)} of {len(results)} answers it is not the number of tokens", *wrong)
            return
        limits = [(asked, answer, _limit_of(asked.call)) for asked, answer in single if answer.finish_reason == "length"]
        over = [asked for asked, answer, most in limits if answer.usage is not None and answer.usage.completion_tokens != most]
        if over and not results:
            self.note("usage", "refuted", "an answer cut at its limit has another number of tokens than the limit", *over)
        elif results or limits:
            shown = (
                f"{len(results)} answers have as many tokens as entries" if results else f"{len(limits)} answers have as many tokens as their limit"
            )
            self.note("usage", "proved", shown)
        else:
            self.note("usage", "not-tested", "there is a usage, and nothing to hold it against")

    def _one_model(self) -> None:
        seen = Counter((answer.model, answer.fingerprint, answer.provider) for asked in self.asked for answer in asked.answers)
        if not seen:
            return
        total = sum(seen.values())
        told = "; ".join(f"{'/'.join(part or '-' for part in which)} {count}" for which, count in seen.most_common(4))
        if len(seen) > 1:
            self.note("one_model", "refuted", f"{len(seen)} among {total} answers: {told}")
        elif all(part is None for part in next(iter(seen))):
            self.note("one_model", "not-tested", "answers name no model")
        else:
            self.note("one_model", "proved", f"all {total} answers: {told}")

    def _answers(self) -> None:
        bodies = {asked.call.key: asked.first.text for asked in self.asked if asked.first is not None and _limit_of(asked.call) > 2}
        if len(bodies) < 4:
            return
        different = len(set(bodies.values()))
        verdict: Verdict = "proved" if different > 1 else "refuted"
        self.note("answers", verdict, f"{different} texts in {len(bodies)} answers to different questions")


# -- small readings ----------------------------------------------------------------------------------------------------


def _prompt_of(messages: Messages) -> str:
    """What the completions route is asked: the last message's text."""
    content = messages[-1].get("content")
    return content if isinstance(content, str) else ""


def _words(failure: Failure | None) -> str:
    return "no answer" if failure is None else f"{failure.reason}: {failure.message}"


def _listed(places: Places) -> int:
    """The most alternatives that a place has."""
    return int(numpy.diff(places.starts_T1).max(initial=0))


def _ratio(one: Places | None, half: Places | None) -> float | None:
    """How many times the differences between log-probabilities at the first place are larger in `half`: the median over what both list."""
    lists = [_first_place(places) for places in (one, half)]
    shared = sorted(lists[0].keys() & lists[1].keys(), key=lambda token: -lists[0][token])
    ratios = []
    for token in shared[1:]:
        base, other = (values[shared[0]] - values[token] for values in lists)
        if base > 0.2:
            ratios.append(other / base)
    return float(numpy.median(ratios)) if ratios else None


def _first_place(places: Places | None) -> dict[Any, float]:
    if places is None or not len(places):
        return {}
    stop = int(places.starts_T1[1])
    names: Sequence[Any] = places.top_ids_N.tolist() if places.top_ids_N is not None else places.top_tokens_N or []
    return {name: value for name, value in zip(names[:stop], places.top_logprobs_N[:stop].tolist(), strict=True) if value > -9000}


def _same(pair: tuple[_Asked, _Asked]) -> bool:
    one, other = (asked.first for asked in pair)
    return one is not None and other is not None and one.text == other.text and one.reasoning == other.reasoning


def _chance(answer: Answer | None) -> float | None:
    """That an independent draw gives the same tokens, by the answer's own log-probabilities; None without them."""
    if answer is None or answer.places is None:
        return None
    total = float(answer.places.logprobs_T.sum())
    return math.exp(min(total, 0.0)) if math.isfinite(total) else None


def _stop_in(text: str) -> str | None:
    """Two characters from the middle of a text, whose first occurrence is not at its beginning."""
    for start in [*range(len(text) // 2, len(text) - 1), *range(1, len(text) // 2)]:
        string = text[start : start + 2]
        if string.isascii() and string.isprintable() and string.strip() == string and len(string) == 2 and text.index(string) > 0:
            return string
    return None


def _with_its_spaces(answer: Answer) -> str:
    """The text with the white space at its ends that its tokens have: a grammar lets it be said, and servers take it away."""
    said = b"".join(answer.places.tokens_T or []).decode("utf-8", "replace") if answer.places is not None else answer.text
    return said if said.strip() == answer.text.strip() else answer.text


def _is_forced(text: str, value: str) -> bool:
    """Whether the text is the schema's one value, or the beginning of it where it was cut."""
    try:
        return bool(json.loads(text) == {"colour": value})
    except (ValueError, RecursionError):
        compact = "".join(text.split())
        whole = "".join(json.dumps({"colour": value}, ensure_ascii=False).split())
        return len(compact) > len('{"colour":"') and whole.startswith(compact.rstrip("\ufffd"))


def _is_short(answer: Answer, result: Verified | Demoted) -> bool:
    """Whether the usage counts another number of tokens than the answer has entries; an end token without one is no gap."""
    usage, places = answer.usage, answer.places
    if usage is None or places is None or isinstance(result, Demoted):
        return False
    entries = len(places) + (len(answer.reasoning_places) if answer.reasoning_places is not None else 0)
    possible = {usage.completion_tokens, usage.completion_tokens - (answer.finish_reason == "stop" and not result.ended)}
    return entries not in possible | {count - usage.reasoning_tokens for count in possible}


def _limit_of(call: Call) -> int:
    return int(call.body.get("max_tokens") or call.body.get("max_completion_tokens") or 0)


def _shape(document: Json | None) -> str:
    """That of the first choice's log-probabilities: the route's own arrays, or the chat route's entries."""
    choices = (document or {}).get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    if not isinstance(logprobs, dict):
        return "none"
    return "chat" if isinstance(logprobs.get("content"), list) else "arrays"
