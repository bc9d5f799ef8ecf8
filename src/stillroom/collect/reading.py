"""What came back, read: answers, limits, and why there is no answer.

Nothing here raises, whatever the bytes. An error's text is never an answer: it is the message of a Failure, shortened, with all that looks like a key
taken out. Reading a body with log-probabilities costs about what `json.loads` of it costs: the rest goes into packed arrays.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import accumulate
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

from stillroom.collect import providers
from stillroom.collect.wire import Answer, Call, Failure, FailureReason, Outcome, Places, Rates, Response, Usage
from stillroom.core.identities import Json

_MESSAGE_CHARACTERS = 300
_LARGEST_COUNT = 2**53
_LARGEST_WAIT_SECONDS = 30 * 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A response read: one outcome for each choice that it has, in the order of their indexes, or one Failure. `document` is its JSON, where it is an
    object.
    """

    outcomes: list[Outcome]
    document: Json | None

    def body_without_logprobs(self) -> bytes:
        """The JSON of the body without its log-probabilities, in UTF-8; b"" where the body was no JSON object."""
        if self.document is None:
            return b""
        kept = {name: value for name, value in self.document.items() if name not in _BULKY}
        choices = kept.get("choices")
        if isinstance(choices, list):
            kept["choices"] = [{n: v for n, v in choice.items() if n not in _BULKY} if isinstance(choice, dict) else choice for choice in choices]
        return json.dumps(kept, ensure_ascii=True, separators=(",", ":")).encode()


_BULKY = frozenset({"logprobs", "prompt_logprobs", "completion_probabilities"})


def read_response(call: Call, response: Response) -> list[Outcome]:
    """The outcomes of `read`: at least one. Fewer than the body's `n` means that the endpoint gave fewer."""
    return read(call, response).outcomes


def read(call: Call, response: Response) -> Reading:
    """Reads a response to `call`. Raises nothing.

    A status of 200 is not believed: an error inside, a body that is cut off, HTML or nothing at all is a Failure. So is a choice that the endpoint
    filtered or broke off with an error; a choice cut at its limit of tokens is an Answer whose finish reason says so.
    """
    document = _json_object(response.body)
    if not 200 <= response.status < 300 or document is None or document.get("error"):
        return Reading(outcomes=[classify(response.status, response.headers, response.body)], document=document)
    usage = usage_of(document)
    choices = document.get("choices")
    if not isinstance(choices, list) or not choices:
        found = "the answer has no choices" if "choices" in document else "the body is JSON without choices"
        return Reading(outcomes=[Failure(reason="malformed", message=found, status=response.status, usage=usage)], document=document)
    outcomes = [_outcome(call, document, choice, response) for choice in sorted(choices, key=_index)]
    outcomes[0] = replace(outcomes[0], usage=usage)
    return Reading(outcomes=outcomes, document=document)


def _json_object(body: bytes) -> Json | None:
    try:
        value = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _index(choice: Any) -> int:
    index = choice.get("index") if isinstance(choice, dict) else None
    return index if type(index) is int else 0


# -- one choice --------------------------------------------------------------------------------------------------------


def _outcome(call: Call, document: Json, choice: Any, response: Response) -> Outcome:
    if not isinstance(choice, dict):
        return Failure(reason="malformed", message="a choice is not an object", status=response.status)
    finish = choice.get("finish_reason")
    if choice.get("error") or finish == "error":
        return _failure_of(choice.get("error"), response.status, response.headers)
    if finish == "content_filter":
        return Failure(reason="content-filtered", message="finish reason content_filter", status=response.status)
    text, reasoning, problem = _texts(choice)
    if text is None or not (_is_unicode(text) and _is_unicode(reasoning or "")):
        reason: FailureReason = "content-filtered" if problem.startswith("refused") else "malformed"
        return Failure(reason=reason, message=problem if text is None else "text that is not Unicode", status=response.status)
    places, unreadable = _places(choice.get("logprobs"), "content")
    reasoning_places, _ = _places(choice.get("logprobs"), "reasoning_content")
    return Answer(
        text=text,
        finish_reason=finish if isinstance(finish, str) else None,
        usage=None,
        reasoning=reasoning,
        thinking=_thinking(text),
        places=places,
        places_unreadable=unreadable,
        reasoning_places=reasoning_places,
        token_ids=_token_ids(choice.get("token_ids")),
        model=_name(document.get("model")),
        fingerprint=_name(document.get("system_fingerprint")),
        provider=_name(document.get("provider")),
        response_id=_name(document.get("id")),
    )


def _texts(choice: Json) -> tuple[str | None, str | None, str]:
    """The text and the reasoning of a choice, and why there is no text where there is none."""
    message = choice.get("message")
    if not isinstance(message, dict):
        text = choice.get("text")
        return (text if isinstance(text, str) else None), _first_text(choice), "a choice without a message and without a text"
    reasoning = _first_text(message)
    match message.get("content"):
        case str(text):
            if not text and isinstance(message.get("refusal"), str) and message["refusal"]:
                return None, None, f"refused: {clean(message['refusal'])}"
            return text, reasoning, ""
        case list(parts):
            spoken, thought = _joined(parts)
            return spoken, reasoning or thought or None, "a content whose parts cannot be read"
        case None if isinstance(message.get("refusal"), str) and message["refusal"]:
            return None, None, f"refused: {clean(message['refusal'])}"
        case None if reasoning is not None or choice.get("finish_reason") == "length":
            return "", reasoning, ""
        case _:
            return None, None, "a message without content"


def _first_text(message: Json) -> str | None:
    return next((message[name] for name in providers.REASONING_FIELDS if isinstance(message.get(name), str) and message[name]), None)


def _joined(parts: list[Any]) -> tuple[str | None, str]:
    """The texts and the thoughts of a content in parts; no text where a part is of a kind that is not known."""
    spoken, thought = [], []
    for part in parts:
        match part:
            case {"type": "text" | "output_text", "text": str(text)}:
                spoken.append(text)
            case {"type": "thinking" | "reasoning", "thinking": list(inner)}:
                thought.append(_joined(inner)[0] or "")
            case {"type": "thinking" | "reasoning", "thinking": str(text)} | {"type": "thinking" | "reasoning", "text": str(text)}:
                thought.append(text)
            case _:
                return None, ""
    return "".join(spoken), "".join(thought)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        return False
    return True


_OPEN, _CLOSE = re.compile(r"<think(?:ing)?>"), re.compile(r"</think(?:ing)?>")


def _thinking(text: str) -> Literal["none", "closed", "unterminated"]:
    """Where the chat template itself opens the block, a text has only its end, which counts as a whole block. Tags later in a text may be quoted."""
    head = text.lstrip()
    if _OPEN.match(head):
        return "closed" if _CLOSE.search(head) else "unterminated"
    end = _CLOSE.search(head)
    return "closed" if end and not _OPEN.search(head, 0, end.start()) else "none"


def _token_ids(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**31 for item in value):
        return None
    return tuple(value)


def _name(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) and value and _is_unicode(value) else None


def usage_of(document: Json) -> Usage | None:
    """The usage in a body, or None where there is none or its counts are no counts."""
    usage = document.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    if prompt is None and completion is None:
        return None

    def detail(group: str, name: str) -> int:
        details = usage.get(group)
        return (_count(details.get(name)) if isinstance(details, dict) else None) or 0

    cached = detail("prompt_tokens_details", "cached_tokens") or _count(usage.get("prompt_cache_hit_tokens")) or 0
    reasoning = detail("completion_tokens_details", "reasoning_tokens")
    return Usage(prompt_tokens=prompt or 0, completion_tokens=completion or 0, reasoning_tokens=reasoning, cached_tokens=cached)


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < _LARGEST_COUNT else None


# -- log-probabilities -------------------------------------------------------------------------------------------------


def _places(value: Any, part: str) -> tuple[Places | None, bool]:
    """The log-probabilities of a choice, in any shape that servers use, on either route; and whether there are some that cannot be read."""
    if not isinstance(value, dict):
        return None, value is not None and part == "content"
    try:
        if isinstance(value.get(part), list):
            return (_entry_places(value[part]), False) if value[part] or part == "content" else (None, False)
        if part == "content" and isinstance(value.get("token_logprobs"), list):
            return _array_places(value), False
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError):
        return None, True
    return None, part == "content" and any(value.get(name) is not None for name in ("content", "tokens", "token_logprobs", "top_logprobs"))


def _entry_places(entries: list[Json]) -> Places:
    """The chat route's shape: an object for each token with its likeliest alternatives inside. llama.cpp has it on the completions route too."""
    lists = [entry.get("top_logprobs") or [] for entry in entries]
    flat = [alternative for alternatives in lists for alternative in alternatives]
    return Places(
        tokens_T=_tokens(entries),
        logprobs_T=_logprobs([entry["logprob"] for entry in entries]),
        ids_T=_ids(entries),
        top_tokens_N=_tokens(flat),
        top_logprobs_N=_logprobs([alternative["logprob"] for alternative in flat]),
        top_ids_N=_ids(flat),
        starts_T1=_starts(map(len, lists)),
    )


def _tokens(entries: list[Json]) -> list[bytes] | None:
    given = [entry.get("bytes") for entry in entries]
    kinds = set(map(type, given))
    if kinds <= {list}:
        return [bytes(values) for values in given]  # type: ignore[arg-type]
    if not kinds <= {list, type(None)}:  # bytes(5) would be five zeros
        raise ValueError("bytes are a list of numbers")
    if not any("token" in entry for entry in entries):
        return None
    return [_encoded(entry["token"]) if values is None else bytes(values) for entry, values in zip(entries, given, strict=True)]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _logprobs(values: list[Any]) -> NDArray[numpy.float64]:
    array = numpy.array(values)
    if array.ndim != 1 or (len(values) and array.dtype.kind not in "fiu"):
        raise ValueError("log-probabilities that are not numbers")
    return array.astype(numpy.float64, copy=False)


def _ids(entries: list[Json]) -> NDArray[numpy.int64] | None:
    if not entries or "id" not in entries[0]:
        return None
    return _id_array([entry["id"] for entry in entries])


def _id_array(values: list[Any]) -> NDArray[numpy.int64]:
    ids = numpy.array(values)
    if ids.ndim != 1 or (len(values) and ids.dtype.kind != "i"):
        raise ValueError("ids that are not integers")
    return ids.astype(numpy.int64, copy=False)


def _starts(lengths: Iterable[int]) -> NDArray[numpy.int64]:
    return numpy.fromiter(accumulate(lengths, initial=0), numpy.int64)


_TOKEN_ID = re.compile(r"token_id:(\d{1,9})", re.ASCII)


def _array_places(value: Json) -> Places:
    """The completions route's shape: arrays side by side, the alternatives of a token as one object from text to log-probability, in which tokens of
    the same text are one. vLLM can write a token as its id (token_id:5).
    """
    texts, chosen = value.get("tokens"), value["token_logprobs"]
    tops = value.get("top_logprobs") or [{}] * len(chosen)
    lists = [_pairs(top) for top in tops]
    if len(lists) != len(chosen) or (texts is not None and len(texts) != len(chosen)):
        raise ValueError("arrays of different lengths")
    flat = [pair for pairs in lists for pair in pairs]
    ids_T, tokens_T = _named(texts)
    top_ids_N, top_tokens_N = _named([text for text, _ in flat])
    given = value.get("token_ids")
    return Places(
        tokens_T=tokens_T,
        logprobs_T=_logprobs(chosen),
        ids_T=ids_T if given is None else _id_array(given),
        top_tokens_N=top_tokens_N,
        top_logprobs_N=_logprobs([logprob for _, logprob in flat]),
        top_ids_N=top_ids_N,
        starts_T1=_starts(map(len, lists)),
    )


def _pairs(top: Any) -> list[tuple[str, Any]]:
    if top is None:
        return []
    if isinstance(top, list):  # Together and others: a list of objects, of one entry each
        return [pair for item in top for pair in item.items()]
    return list(top.items())


def _named(texts: list[str] | None) -> tuple[NDArray[numpy.int64] | None, list[bytes] | None]:
    if texts is None:
        return None, None
    if texts and all(text.startswith("token_id:") for text in texts):
        found = [_TOKEN_ID.fullmatch(text) for text in texts]
        if all(found):
            return _id_array([int(match.group(1)) for match in found if match]), None
    return None, [_encoded(text) for text in texts]


# -- why there is no answer --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    """What an error says: its codes and types in lower case, and its message as it came."""

    codes: frozenset[str]
    message: str

    def say(self, codes: frozenset[str], words: Iterable[str]) -> bool:
        lower = self.message.lower().replace("`", "")
        return not self.codes.isdisjoint(codes) or any(word in lower for word in words)


def classify(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    """Why a response has no answer, by its status, its headers and the words of its body. For any status, 200 with an error inside among them."""
    document = _json_value(body)
    if isinstance(document, list) and document and isinstance(document[0], dict):  # Gemini wraps its errors in a list
        document = document[0]
    if not isinstance(document, dict):
        return _unreadable(status, headers, body)
    error = next((document[name] for name in ("error", "errors", "detail") if document.get(name)), document)
    failure = _failure_of(error, status, headers)
    return replace(failure, usage=usage_of(document))


def _json_value(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _unreadable(status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    start = body[:4096].decode("utf-8", "replace")
    if not body.strip():
        message = "an empty body"
    elif start.lstrip()[:1] == "<":
        message = f"HTML: {re.sub(r'<[^<>]*>', ' ', start)}"
    elif start.lstrip()[:1] in ("{", "["):
        message = "JSON that is cut off or broken" if status < 300 else start
    else:
        message = start
    words = _Words(codes=frozenset(), message=message)
    reason: FailureReason = "malformed" if 200 <= status < 300 else _reason(status, words, waits=False)
    return Failure(reason=reason, message=clean(message), status=status, retry_after_seconds=retry_after(headers, message if status >= 300 else ""))


def _failure_of(error: Any, status: int, headers: Mapping[str, str]) -> Failure:
    """From an error object or text; inside a 200 the error's own code may be a status."""
    words = _words_of(error)
    effective = status
    if 200 <= status < 300:
        own = next((int(code) for code in words.codes if re.fullmatch("[45][0-9][0-9]", code)), None)
        effective = own or 200
    wait = retry_after(headers, words.message, error)
    return Failure(
        reason=_reason(effective, words, waits=wait is not None),
        message=clean(words.message) or f"status {status} without a message",
        status=status,
        retry_after_seconds=wait,
    )


def _words_of(error: Any, depth: int = 0) -> _Words:
    """Looks through the nestings that are met: a list of errors, an error in an error, the upstream's own words under `metadata`, Azure's `innererror`."""
    if isinstance(error, str):
        return _Words(codes=frozenset(), message=error)
    if isinstance(error, list):
        found = [_words_of(item, depth + 1) for item in error[:5]] if depth < 4 else []
        return _Words(
            codes=frozenset().union(*(words.codes for words in found)), message="; ".join(words.message for words in found if words.message)
        )
    if not isinstance(error, dict):
        return _Words(codes=frozenset(), message="")
    codes = {
        str(error[name]).lower()
        for name in ("code", "type", "status")
        if isinstance(error.get(name), str | int) and len(str(error[name])[:100]) < 100
    }
    messages = [error[name] for name in ("message", "msg", "detail") if isinstance(error.get(name), str)][:1]
    for name in ("error", "innererror", "metadata", "details"):
        if isinstance(error.get(name), dict | list) and depth < 4:
            inner = _words_of(error[name], depth + 1)
            codes |= inner.codes
            messages += [inner.message] if inner.message else []
    raw = error.get("raw")
    return _Words(codes=frozenset(codes), message=": ".join([*messages, *([raw] if isinstance(raw, str) else [])]))


def _reason(status: int, words: _Words, *, waits: bool) -> FailureReason:
    """The first that holds. `waits`: the endpoint says when to come again, so that words on a quota mean a limit by the minute (Gemini)."""
    client_error = 400 <= status < 500
    if status < 300 or client_error:
        if words.say(providers.FILTER_CODES, providers.FILTER_WORDS):
            return "content-filtered"
        if status == 402 or words.codes & providers.QUOTA_CODES or (not waits and words.say(frozenset(), providers.QUOTA_WORDS)):
            return "quota-exhausted"
    can_overflow = status < 300 or status == 500 or (client_error and status not in (401, 403, 404))
    # "Request too large" comes as 429 too: it would be refused for ever.
    if can_overflow and (status == 413 or words.say(providers.OVERFLOW_CODES, providers.OVERFLOW_WORDS)):
        return "context-overflow"
    if status < 300:
        return _reason_by_words(words)
    if status == 429:
        return "overloaded" if words.say(providers.OVERLOAD_CODES, providers.OVERLOAD_WORDS) else "throttled"
    if status in (401, 403):
        return "bad-key"
    if status in (404, 405, 410) or status < 400:  # a redirect is not followed: the URL is not right
        return "not-found"
    if status in (498, 503, 529):
        return "overloaded"
    if status == 425:
        return "throttled"
    if status in (408, 409) or status >= 500:
        return "server-error"
    if words.say(providers.KEY_CODES, providers.KEY_WORDS):
        return "bad-key"
    return "not-found" if words.say(providers.MODEL_CODES, providers.MODEL_WORDS) else "invalid-request"


def _reason_by_words(words: _Words) -> FailureReason:
    """Of an error without a status of its own."""
    if words.say(providers.THROTTLE_CODES, providers.THROTTLE_WORDS):
        return "throttled"
    if words.say(providers.OVERLOAD_CODES, providers.OVERLOAD_WORDS):
        return "overloaded"
    if words.say(providers.KEY_CODES, providers.KEY_WORDS):
        return "bad-key"
    if words.say(providers.MODEL_CODES, providers.MODEL_WORDS):
        return "not-found"
    return "invalid-request" if words.codes & providers.INVALID_CODES else "server-error"


_SECRETS = re.compile(
    r"""
      (?i:\bbearer\s+)\S+                                         # an Authorization header
    | (?i:\b(?:sk|pk|rk|ak|gsk|xai|hf|nvapi|pplx|fw|tgp|csk|r8|or|ghp|gho|glpat|xox[abprs]|api[-_]?key|key|token)[-_=:]["']?)(?i:bearer\s+)?[A-Za-z0-9_\-*.]{6,}
    | \b(?:AIza|AKIA|ASIA|eyJ)[A-Za-z0-9_\-.]{8,}
    | \b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b
    | \b(?=[A-Za-z0-9]*[0-9])(?=[A-Za-z0-9]*[A-Za-z])[A-Za-z0-9]{16,}
    | [A-Za-z0-9+/]{40,}={0,2}
    | [A-Za-z0-9*]*\*{3,}[A-Za-z0-9*]*                            # a key of which the endpoint shows the ends
    | [\w.+\-]+@[\w\-]+(?:\.[\w\-]+)+                             # an e-mail address
    | \b\d(?:[ \-]?\d){12,18}\b                                   # the digits of a card
    """,
    re.VERBOSE,
)


def clean(text: str, limit: int = _MESSAGE_CHARACTERS) -> str:
    """One line of at most `limit` characters without anything that looks like a key, a card number or an e-mail address."""
    start = text[: 8 * limit].encode("utf-8", "replace").decode()
    if len(text) > 8 * limit:  # half of a key is not known as one
        start = start.rpartition(" ")[0]
    line = " ".join("".join(character if character.isprintable() else " " for character in start).split())
    line = _SECRETS.sub("[removed]", line)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


# -- limits and waits --------------------------------------------------------------------------------------------------


def rates_of(headers: Mapping[str, str]) -> Rates:
    """What the headers (names in lower case) say of the endpoint's limits; None for what they do not say, or not as a number."""
    return Rates(
        requests_limit=_limit("requests_limit", headers),
        requests_left=_limit("requests_left", headers),
        requests_reset_seconds=_reset("requests_reset_seconds", headers),
        tokens_limit=_limit("tokens_limit", headers),
        tokens_left=_limit("tokens_left", headers),
        tokens_reset_seconds=_reset("tokens_reset_seconds", headers),
    )


def _limit(name: str, headers: Mapping[str, str]) -> int | None:
    counts = (_header_count(headers[known]) for known in providers.RATE_HEADERS[name] if known in headers)
    return next((count for count in counts if count is not None), None)


def _reset(name: str, headers: Mapping[str, str]) -> float | None:
    waits = (seconds_of(headers[known], headers) for known in providers.RATE_HEADERS[name] if known in headers)
    return next((wait for wait in waits if wait is not None), None)


def _header_count(value: str) -> int | None:
    match = re.match(r"\s*(\d{1,15})(?:\.\d+)?\s*(?:$|[,;])", value, re.ASCII)
    return int(match.group(1)) if match else None


def retry_after(headers: Mapping[str, str], message: str = "", error: Any = None) -> float | None:
    """In how many seconds the endpoint wants to be asked again: by its headers, else by Gemini's retryDelay, else by its words. None where it says nothing."""
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return _wait(milliseconds / 1000)
    if "retry-after" in headers and (seconds := seconds_of(headers["retry-after"], headers)) is not None:
        return seconds
    details = error.get("details") if isinstance(error, dict) else None
    for detail in details if isinstance(details, list) else []:
        if isinstance(detail, dict) and isinstance(detail.get("retryDelay"), str):
            return seconds_of(detail["retryDelay"], headers)
    spoken = re.search(r"(?i)\b(?:try again|retry) (?:in|after) (\d[\d.]*\s?(?:ms|[smh])?(?:\d[\d.]*(?:ms|[smh]))*)", message)
    return seconds_of(spoken.group(1).replace(" ", "").rstrip("."), headers) if spoken else None


_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?", re.ASCII)


def seconds_of(value: str, headers: Mapping[str, str]) -> float | None:
    """Seconds from now that a header's value means: a number of seconds, a duration (6m0s, 20ms), a time since 1970 in seconds or milliseconds, an
    ISO or an HTTP date. "Now" is the response's own Date where it has one, so that two clocks need not agree. None for anything else.
    """
    value = value.strip()[:64]
    number = _number(value)
    if number is not None:
        if number < 1e9:
            return _wait(number)
        return _wait((number / 1000 if number >= 1e12 else number) - _now(headers))
    duration = _DURATION.fullmatch(value)
    if value and duration:
        days, hours, minutes, seconds, milliseconds = (float(part or 0) for part in duration.groups())
        return _wait(86400 * days + 3600 * hours + 60 * minutes + seconds + milliseconds / 1000)
    moment = _moment(value)
    return None if moment is None else _wait(moment - _now(headers))


def _number(value: str) -> float | None:
    return float(value) if re.fullmatch(r"\d{1,18}(?:\.\d{1,18})?", value.strip(), re.ASCII) else None


def _wait(seconds: float) -> float | None:
    return min(max(seconds, 0.0), _LARGEST_WAIT_SECONDS) if math.isfinite(seconds) else None


def _now(headers: Mapping[str, str]) -> float:
    date = _moment(headers.get("date", "")[:64])
    return time.time() if date is None else date


def _moment(value: str) -> float | None:
    """Seconds since 1970 of an HTTP or an ISO date; one without a zone is in UTC."""
    for parse in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            moment = parse(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, TypeError, OverflowError, IndexError):
            continue
    return None
