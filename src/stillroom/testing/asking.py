"""What a request asks for, read from its body: every body gives either that or a refusal in the words of an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.testing.language import END, draws, encode_json, tokens_of
from stillroom.testing.schemas import SchemaRefused, check_schema
from stillroom.testing.settings import Lie, Settings

Route: TypeAlias = Literal["chat", "completions"]
_MOST_CHOICES = 128


class Refused(Exception):
    """A request that is answered with an error: its status and what the error object says. `headers` come with it."""

    def __init__(self, status: int, code: str | None, message: str, *, kind: str = "invalid_request_error", param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.kind, self.param = status, code, kind, param
        self.headers: dict[str, str] = {}

    @property
    def body(self) -> bytes:
        """As JSON."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return encode_json({"error": error}).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request that can be answered."""

    route: Route
    key: str
    """SHA-256 of the canonical JSON of the body."""
    model: str
    prompt: tuple[int, ...]
    choices: int
    seed: int | None
    stops: tuple[bytes, ...]
    most_tokens: int
    """Never more than the context has left."""
    temperature: float
    top_p: float
    logprobs: int | None
    """How many alternatives; None: no log-probabilities."""
    form: Any
    """A JSON Schema for the answer; None: any text."""
    echo: bool
    lies: frozenset[Lie]
    """Those that this body is told."""


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body: the SHA-256 of its canonical JSON, or of its bytes where it has none, and its value: None where it is no JSON object."""

    key: str
    value: dict[str, Any] | None


def parse_body(raw: bytes) -> Body:
    """Whatever the bytes are."""
    value = None
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse_constant)
        return Body(sha256_hex(canonical_json(value)), value if isinstance(value, dict) else None)
    except (ValueError, RecursionError):  # half a pair of surrogates is a ValueError here, and so is an integer that canonical JSON does not have
        return Body(sha256_hex(raw), value if isinstance(value, dict) and _is_unicode(value) else None)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_unicode(value: Any) -> bool:
    try:
        encode_json(value).encode()
    except (ValueError, RecursionError):
        return False
    return True


def read_request(route: Route, parsed: Body, settings: Settings) -> Asked:
    """What a body asks for. Raises Refused."""
    body, key = parsed.value, parsed.key
    if body is None:
        raise Refused(400, None, "The body is not a JSON object in UTF-8.")
    lies = settings.lies if settings.lies and next(draws(settings.seed, "lies", key)) < settings.lies_share else frozenset[Lie]()
    field = _Fields(body)
    model = field.text("model")
    if model not in settings.models:
        raise Refused(404, "model_not_found", f"The model `{model}` does not exist.", param="model")
    for name in ("stream", "tools", "functions", "best_of", "suffix"):
        if body.get(name) not in (None, False, [], 1, ""):
            raise _invalid(name, f"'{name}' is not supported by this endpoint.", "unsupported_parameter")
    prompt = _chat_prompt(field) if route == "chat" else _plain_prompt(field)
    limit = field.whole("max_completion_tokens", 1) if route == "chat" else None
    limit = field.whole("max_tokens", 0 if route == "completions" else 1) if limit is None else limit
    prompt, most = _within_context(prompt, limit, settings, cut="context-cut" in lies)
    return Asked(
        route=route,
        key=key,
        model=model,
        prompt=prompt,
        choices=field.whole("n", 1, _MOST_CHOICES) or 1,
        seed=field.whole("seed", -(2**63), 2**63 - 1),
        stops=_stops(field),
        most_tokens=most if limit is None or "max-tokens-ignored" in lies else min(most, limit),
        temperature=field.number("temperature", 0, 2, 1.0),
        top_p=field.number("top_p", 0, 1, 1.0),
        logprobs=_logprobs(field, route, settings, supported="logprobs-unsupported" not in lies),
        form=_form(field) if route == "chat" else None,
        echo=route == "completions" and field.flag("echo") and "echo-ignored" not in lies,
        lies=lies,
    )


def _invalid(name: str, message: str, code: str = "invalid_value") -> Refused:
    return Refused(400, code, message, param=name)


@dataclass(frozen=True, slots=True)
class _Fields:
    body: dict[str, Any]

    def text(self, name: str) -> str:
        value = self.body.get(name)
        if not isinstance(value, str):
            raise _invalid(name, f"'{name}' is required and is a text.", "missing_required_parameter" if value is None else "invalid_type")
        return value

    def whole(self, name: str, least: int, most: float = math.inf) -> int | None:
        value = self.body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise _invalid(name, f"'{name}' must be an integer.", "invalid_type")
        if not least <= value <= most:
            raise _invalid(name, f"'{name}' must be at least {least}" + (f" and at most {most}." if most != math.inf else "."))
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _invalid(name, f"'{name}' must be a number.", "invalid_type")
        if not least <= value <= most:
            raise _invalid(name, f"'{name}' must be at least {least} and at most {most}.")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.body.get(name)
        if value is not None and not isinstance(value, bool):
            raise _invalid(name, f"'{name}' must be true or false.", "invalid_type")
        return bool(value)


def _chat_prompt(field: _Fields) -> tuple[int, ...]:
    messages = field.body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages", "'messages' is required and is a list of at least one message.", "missing_required_parameter")
    parts = []
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant", "tool"):
            raise _invalid(f"messages[{place}].role", "A message needs a role: system, developer, user, assistant or tool.")
        parts.append(f"\x02{message['role']}\n{_content(message.get('content'), message['role'], place)}\x03")
    return tuple(tokens_of("".join(parts) + "\x02assistant\n"))


def _content(content: Any, role: str, place: int) -> str:
    if content is None and role == "assistant":
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise _invalid(f"messages[{place}].content", "The content of a message is a text, or a list of parts of type text.", "invalid_type")


def _plain_prompt(field: _Fields) -> tuple[int, ...]:
    prompt = field.body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return tuple(tokens_of(prompt))
    if isinstance(prompt, list) and prompt and all(type(id) is int and 0 <= id < END for id in prompt):
        return tuple(prompt)
    raise _invalid("prompt", f"'prompt' is required and is one text, or one list of token ids below {END}.", "invalid_type")


def _within_context(prompt: tuple[int, ...], limit: int | None, settings: Settings, *, cut: bool) -> tuple[tuple[int, ...], int]:
    """The prompt that is read, and how many tokens the context has left."""
    wanted = len(prompt) + settings.reasoning_tokens + max(limit or 0, 1)
    if wanted > settings.context_tokens and not cut:
        raise Refused(
            400,
            "context_length_exceeded",
            f"This model's maximum context length is {settings.context_tokens} tokens. However, you requested {wanted} tokens "
            f"({len(prompt)} in the prompt, {wanted - len(prompt)} in the completion). Please reduce the length of either.",
        )
    if wanted > settings.context_tokens:
        prompt = prompt[-max(settings.context_tokens // 2, 1) :]
    return prompt, max(settings.context_tokens - len(prompt) - settings.reasoning_tokens, 1)


def _stops(field: _Fields) -> tuple[bytes, ...]:
    stop = field.body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(text, str) and text for text in stops):
        raise _invalid("stop", "'stop' is a text or a list of at most 4, none of them empty.")
    return tuple(text.encode() for text in stops)


def _logprobs(field: _Fields, route: Route, settings: Settings, *, supported: bool) -> int | None:
    if route == "completions":
        wanted = field.whole("logprobs", 0)
    else:
        wanted = field.whole("top_logprobs", 0)
        if not field.flag("logprobs"):
            if wanted is not None:
                raise _invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true.")
            return None
        wanted = wanted or 0
    if wanted is None:
        return None
    if not supported:
        raise _invalid("logprobs", "This model does not support log-probabilities.", "unsupported_parameter")
    if wanted > settings.top_logprobs_limit:
        name = "logprobs" if route == "completions" else "top_logprobs"
        raise _invalid(name, f"Invalid value for '{name}': must be at most {settings.top_logprobs_limit}.", "integer_above_max_value")
    return wanted


def _form(field: _Fields) -> Any:
    """The JSON Schema that the answer has to meet."""
    form = field.body.get("response_format")
    if form is None:
        return None
    if not isinstance(form, dict):
        raise _invalid("response_format", "'response_format' is an object with a type.", "invalid_type")
    readers: dict[Any, Callable[[], Any]] = {"text": lambda: None, "json_object": lambda: {"type": "object"}, "json_schema": lambda: _schema(form)}
    kind = form.get("type")
    if not isinstance(kind, str) or kind not in readers:
        raise _invalid("response_format.type", f"'response_format.type' is one of {', '.join(readers)}.")
    return readers[kind]()


def _schema(form: dict[str, Any]) -> Any:
    wrapper = form.get("json_schema")
    if not isinstance(wrapper, dict) or not isinstance(wrapper.get("name"), str) or not isinstance(wrapper.get("schema"), dict):
        raise _invalid("response_format.json_schema", "'json_schema' has a name and a schema.", "missing_required_parameter")
    try:
        check_schema(wrapper["schema"])
    except SchemaRefused as error:
        raise _invalid("response_format.json_schema.schema", f"Invalid schema: {error}", "invalid_json_schema") from None
    return wrapper["schema"]
