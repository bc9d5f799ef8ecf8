"""The answers of the fake endpoint: what it says to a request, honestly or with the lies it was told to tell, as the bytes of a response.

Everything is a function of the settings, the request and `attempt` (how often the body was received before), and of nothing else: no clock.
"""

from __future__ import annotations

import codecs
import json
import math
from array import array
from dataclasses import dataclass
from typing import Any

from stillroom.core.hashing import sha256_hex
from stillroom.testing import language
from stillroom.testing.asking import Asked, Refused
from stillroom.testing.language import END, SIZE, Distribution, Language, Place, encode_json
from stillroom.testing.schemas import SchemaRefused, any_value
from stillroom.testing.settings import Settings

CREATED = 1767225600
"""Of every answer: the first second of 2026, so that an answer depends on no clock."""
_ERROR_TEXT = "ERROR: the upstream model failed (status 500). Please try again later."
_LEAST = -9999.0  # how a mass of zero is written


@dataclass(frozen=True, slots=True)
class Answered:
    """A response's body without its id, which goes before it, and what the work costs."""

    body: bytes
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class _Choice:
    places: list[Place]
    finish: str
    text: str
    reasoning: str | None
    tokens: int
    reasoning_tokens: int


class Answerer:
    """Answers requests. Two with the same settings give the same answers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        options = {"answer_tokens": settings.answer_tokens, "fixed_length": settings.fixed_length, "fragment_share": settings.fragment_share}
        self._languages = [Language(settings.seed + other, **options) for other in range(2 if "models-mixed" in settings.lies else 1)]  # type: ignore[arg-type]
        self._fingerprints = [f"fp_{sha256_hex(f'{settings.seed + other}'.encode())[:10]}" for other in range(2)]
        self._shown: dict[tuple[int, float, frozenset[str]], Distribution] = {}

    def variant(self, asked: Asked, attempt: int, number: int) -> int:
        """What an answer depends on beside the request: the same number, the same answer."""
        fresh = "seed-ignored" in asked.lies or (self._settings.fresh_draws and asked.seed is None)
        other = number % 2 if "models-mixed" in asked.lies else 0
        return 2 * (attempt if fresh else 0) + other

    def answer(self, asked: Asked, variant: int) -> Answered:
        """The response. Raises Refused where the schema of `asked` leads to what no value is made for."""
        draw, other = divmod(variant, 2)
        speaker = self._languages[other]
        context = speaker.after(asked.prompt)
        count = 1 if "n-ignored" in asked.lies else asked.choices
        choices = [self._choice(asked, speaker, context, index, draw) for index in range(count)]
        model = asked.model + ("-quantised" if other else "")
        kind = "chat.completion" if asked.route == "chat" else "text_completion"
        told = b",".join(self._choice_json(asked, choice, index, speaker) for index, choice in enumerate(choices))
        completion = sum(choice.tokens for choice in choices)
        parts = [
            f'"object":"{kind}","created":{CREATED},"model":{encode_json(model)},"choices":['.encode(),
            told,
            b"]",
            self._usage(asked, completion, sum(choice.reasoning_tokens for choice in choices)),
            f',"system_fingerprint":"{self._fingerprints[other]}"}}'.encode(),
        ]
        return Answered(b"".join(parts), len(asked.prompt), completion)

    def _usage(self, asked: Asked, completion: int, reasoning: int) -> bytes:
        if "usage-missing" in asked.lies:
            return b""
        said = 2 * completion if "usage-wrong" in asked.lies else completion
        prompt = len(asked.prompt)
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}
        if self._settings.reasoning_tokens:
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return b',"usage":' + encode_json(usage).encode()

    def _choice(self, asked: Asked, speaker: Language, context: language.Context, index: int, draw: int) -> _Choice:
        if "content-filtered" in asked.lies:
            return _Choice([], "content_filter", "", None, 0, 0)
        if "error-as-content" in asked.lies:
            return _Choice([], "stop", _ERROR_TEXT, None, len(language.tokens_of(_ERROR_TEXT)), 0)
        chances = language.draws(self._settings.seed, asked.key, index, draw)
        thought = min(self._settings.reasoning_tokens, asked.most_tokens) if asked.route == "chat" else 0
        reasoning = language.words(thought, chances) if thought else None
        limit = asked.most_tokens - thought
        if asked.form is not None and "response-format-ignored" not in asked.lies:
            places, ended = self._formed(asked, speaker, context, limit, chances)
        else:
            places, ended = speaker.write(context, limit=limit, temperature=asked.temperature, top_p=asked.top_p, draws=chances)
        if asked.stops and "stop-ignored" not in asked.lies:
            places, ended = _until_stop(places, ended, asked.stops, speaker, context)
        finish = "stop" if ended or "finish-reason-always-stop" in asked.lies else "length"
        text = language.bytes_of([place.id for place in places]).decode(errors="replace")
        return _Choice(places, finish, text, reasoning, len(places) + thought, thought)

    def _formed(self, asked: Asked, speaker: Language, context: language.Context, limit: int, chances: Any) -> tuple[list[Place], bool]:
        try:
            value = any_value(asked.form, chances, language.WORDS)
        except SchemaRefused as error:
            raise Refused(400, "invalid_json_schema", f"Invalid schema: {error}", param="response_format.json_schema.schema") from None
        ids = language.tokens_of(json.dumps(value, ensure_ascii=False))
        places, _ = speaker.read(ids[:limit], context)
        return places, len(ids) <= limit

    def _choice_json(self, asked: Asked, choice: _Choice, index: int, speaker: Language) -> bytes:
        places = choice.places
        text = choice.text
        if asked.echo:
            before, _ = speaker.read(asked.prompt)
            places = before + places
            text = language.bytes_of([place.id for place in places]).decode(errors="replace")
        written = encode_json(text).encode()
        if asked.route == "chat":
            more = b"" if choice.reasoning is None else b',"reasoning_content":' + encode_json(choice.reasoning).encode()
            said = b'"message":{"role":"assistant","content":' + written + b',"refusal":null' + more + b"}"
        else:
            said = b'"text":' + written
        ends = f',"finish_reason":"{choice.finish}"}}'.encode()
        return f'{{"index":{index},'.encode() + said + b',"logprobs":' + self._logprobs(asked, places) + ends

    def _logprobs(self, asked: Asked, places: list[Place]) -> bytes:
        if asked.logprobs is None or asked.lies & {"logprobs-missing", "content-filtered", "error-as-content"}:
            return b"null"
        alternatives = asked.logprobs // 2 if "top-logprobs-fewer" in asked.lies else asked.logprobs
        if asked.route == "completions" and "completions-logprobs-chat-shaped" not in asked.lies:
            return self._plain_logprobs(asked, places, alternatives)
        if "logprobs-short" in asked.lies:
            places = [place for place in places if not place.open]
        entries = b",".join([self._entry(asked, place, alternatives) for place in places])
        return b'{"content":[' + entries + (b'],"refusal":null}' if asked.route == "chat" else b"]}")

    def _entry(self, asked: Asked, place: Place, alternatives: int) -> bytes:
        shown = self._distribution(asked, place) if asked.lies else place.distribution
        with_bytes = "bytes-missing" not in asked.lies
        if "chosen-wrong" in asked.lies:
            return self._wrong_entry(shown, place.id, alternatives, with_bytes)
        found = shown.written.get((place.id, alternatives, with_bytes))
        if found is None:
            top = shown.written.get((-1, alternatives, with_bytes))
            if top is None:
                top = shown.written[-1, alternatives, with_bytes] = self._list(shown, list(shown.ids[:alternatives]), with_bytes)
            found = self._item(shown, place.id, with_bytes)[:-1] + b',"top_logprobs":' + top + b"}"
            if len(shown.written) < 64:
                shown.written[place.id, alternatives, with_bytes] = found
        return found

    def _wrong_entry(self, shown: Distribution, id: int, alternatives: int, with_bytes: bool) -> bytes:
        """The alternatives begin with one that was not chosen, and the entry claims that it was."""
        top = [*shown.ids[: max(alternatives, 2)]]
        first = top[-1] if top[-1] != id else top[0]
        top = [first, *(other for other in reversed(top) if other != first)]
        listed = self._list(shown, top[:alternatives], with_bytes)
        return self._item(shown, first, with_bytes)[:-1] + b',"top_logprobs":' + listed + b"}"

    def _list(self, shown: Distribution, ids: list[int], with_bytes: bool) -> bytes:
        return b"[" + b",".join([self._item(shown, id, with_bytes) for id in ids]) + b"]"

    def _item(self, shown: Distribution, id: int, with_bytes: bool) -> bytes:
        before, after = language.token_json(id, self._settings.token_ids, with_bytes)
        return before + repr(shown.logprob(id)).encode() + after + b"}"

    def _plain_logprobs(self, asked: Asked, places: list[Place], alternatives: int) -> bytes:
        """In the shape of the completions route. Of an echoed prompt the first token has none: nothing stands before it."""
        tokens, logprobs, tops, offsets = [], [], [], []
        decoder, offset = codecs.getincrementaldecoder("utf-8")("replace"), 0
        for number, place in enumerate(places):
            shown = self._distribution(asked, place) if asked.lies else place.distribution
            ids = [*shown.ids[:alternatives], place.id]
            tokens.append(_plain_text(place.id))
            first = asked.echo and number == 0
            logprobs.append(None if first else shown.logprob(place.id))
            tops.append(None if first else {_plain_text(id % SIZE): shown.logprob(id) for id in ids})
            offsets.append(offset)
            offset += len(decoder.decode(language.TOKENS[place.id]))
        shape = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops if alternatives else None, "text_offset": offsets}
        return encode_json(shape).encode()

    def _distribution(self, asked: Asked, place: Place) -> Distribution:
        """What is reported in place of the model's own distribution."""
        lies = frozenset(str(lie) for lie in asked.lies & {"logprobs-after-temperature", "tokens-share-text", "mass-above-one"})
        if not lies:
            return place.distribution
        key = (id(place.distribution), asked.temperature, lies)  # distributions live as long as their language
        found = self._shown.get(key)
        if found is None:
            if len(self._shown) >= 4096:
                self._shown.clear()
            found = self._shown[key] = _falsified(place.distribution, asked.temperature, lies)
        return found


def _falsified(true: Distribution, temperature: float, lies: frozenset[str]) -> Distribution:
    pairs = list(zip(true.ids, true.logprobs, strict=True))
    if "logprobs-after-temperature" in lies:
        pairs = _tempered(pairs, temperature)
    if "tokens-share-text" in lies:
        pairs = sorted(
            ((id + twin, value + math.log(share)) for id, value in pairs for twin, share in ((0, 0.7), (SIZE, 0.3))), key=lambda pair: -pair[1]
        )
    if "mass-above-one" in lies:
        pairs = [(id, min(value + math.log(2), 0.0)) for id, value in pairs]
    return Distribution(tuple(id for id, _ in pairs), array("d", (value for _, value in pairs)), {id: rank for rank, (id, _) in enumerate(pairs)})


def _tempered(pairs: list[tuple[int, float]], temperature: float) -> list[tuple[int, float]]:
    if not temperature:
        return [(id, _LEAST if rank else 0.0) for rank, (id, _) in enumerate(pairs)]
    total = math.log(math.fsum(math.exp(value / temperature) for _, value in pairs))
    return [(id, max(math.floor((value / temperature - total) * 1e7) / 1e7, _LEAST)) for id, value in pairs]


def _until_stop(places: list[Place], ended: bool, stops: tuple[bytes, ...], speaker: Language, context: language.Context) -> tuple[list[Place], bool]:
    """Cut before the first stop. Where one begins inside a token, the part before it stands as single bytes, as if it had been drawn so."""
    text = language.bytes_of([place.id for place in places])
    found = [at for at in map(text.find, stops) if at >= 0]
    if not found:
        return places, ended
    cut, length, ids = min(found), 0, []
    for place in places:
        token = language.TOKENS[place.id]
        if length + len(token) > cut:
            break
        ids.append(place.id)
        length += len(token)
    return speaker.read([*ids, *text[length:cut]], context)[0], True


def _plain_text(id: int) -> str:
    """A token's text on the completions route: bytes that are no text by themselves are spelt out."""
    if id == END:
        return language.END_TEXT
    try:
        return language.TOKENS[id].decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{value:02x}" for value in language.TOKENS[id])
