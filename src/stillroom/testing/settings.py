"""What a fake endpoint does, as one frozen value: read from YAML or JSON, or built in Python. Unknown keys are refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from stillroom.core.errors import StillroomError

Fault: TypeAlias = Literal[
    "http-500",  # before the work
    "http-502",  # likewise
    "http-503",  # likewise
    "http-529",  # likewise
    "html-error-page",  # a proxy's: 502, HTML, before the work
    "error-in-200",  # status 200, and the body is an error; no work was done
    "drop-before-work",  # the connection is closed without an answer, and nothing was done
    "drop-after-work",  # the same, but the work was done
    "drop-in-body",  # the work was done, and the connection is closed after a part of the body
    "hang-after-work",  # the work was done, and the answer comes only after `hang_seconds`
    "http-502-after-work",  # a proxy gives up on an answer that was made
    "slow-body",  # a whole answer whose body takes `slow_seconds`
    "cut-utf8",  # a complete response whose body ends inside a character, or, where it has only ASCII, anywhere
    "cut-json",  # a complete response whose body ends anywhere
    "empty-body",  # a complete response without a byte of body
    "wrong-content-type",  # the right body as text/plain
]
"""What can go wrong with a request."""

WORK_DONE: frozenset[Fault] = frozenset(
    {
        "drop-after-work", "drop-in-body", "hang-after-work", "http-502-after-work", "slow-body", "cut-utf8", "cut-json", "empty-body",
        "wrong-content-type",
    }
)  # fmt: skip
"""The faults after which the request is on the bill."""

Lie: TypeAlias = Literal[
    "chosen-wrong",  # the list of alternatives is unsorted, and the entry's own token is the first of it (as mlx-lm does)
    "logprobs-missing",  # null although they were asked for
    "logprobs-short",  # a token that ends inside a character has no entry (as llama.cpp does); usage counts it
    "tokens-share-text",  # every token's mass is split over two tokens of the same text and bytes
    "logprobs-after-temperature",  # the reported distribution is the one that was drawn from
    "mass-above-one",  # the probabilities of a list sum to more than 1
    "logprobs-unsupported",  # 400 where they are asked for
    "top-logprobs-fewer",  # half as many alternatives as asked
    "bytes-missing",  # `bytes` is null in every entry
    "completions-logprobs-chat-shaped",  # on the completions route (as llama.cpp does)
    "echo-ignored",  # passed over in silence
    "n-ignored",  # one answer, however many are asked for
    "seed-ignored",  # every request is drawn anew, whatever its seed
    "response-format-ignored",  # passed over in silence
    "stop-ignored",  # the answer goes on
    "max-tokens-ignored",  # answers end where they end by themselves
    "usage-missing",  # in every answer
    "usage-wrong",  # twice the tokens of the answer
    "usage-of-one-choice",  # of `n` choices the first alone is counted (as llama.cpp does); all are billed
    "finish-reason-always-stop",  # of answers that were cut, too
    "context-cut",  # a prompt that is too long loses its beginning in silence
    "models-mixed",  # every other request is answered by another model, under its own name and fingerprint
    "content-filtered",  # no text, finish_reason content_filter
    "error-as-content",  # the text of an error as if it were an answer
]
"""What the endpoint may do other than it says, with status 200 (but for logprobs-unsupported)."""

Probability: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Price: TypeAlias = Annotated[Decimal, Field(ge=0, max_digits=18, decimal_places=9)]
Seconds: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Limit(_Section):
    """Rates that hold from a moment on. None is no limit."""

    after_seconds: Seconds = 0
    """Counted from the first request."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Of all models together."""
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Prompts and answers, as `tokens_charged` counts them."""


class Settings(_Section):
    """All that a fake endpoint does. The defaults are an honest one without limits that never fails and takes no time."""

    seed: int = 0
    """Of everything that is drawn: answers, faults."""
    models: tuple[str, ...] = Field(default=("fake-teacher",), min_length=1)
    """Names that are answered; another one is a 404."""
    api_keys: tuple[str, ...] = ()
    """Keys that are let in; none: anybody is."""
    latency_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    """What the work of a request takes."""

    price_in: Price = Decimal("1")
    """US dollars for a million tokens of prompt."""
    price_out: Price = Decimal("4")
    """US dollars for a million tokens of answer, reasoning included."""

    answer_tokens: Annotated[int, Field(gt=0)] = 32
    """How long answers are that end by themselves: about, or with `fixed_length` exactly."""
    fixed_length: bool = False
    """Every answer has `answer_tokens` tokens, unless it is cut."""
    fragment_share: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """The share of tokens that begin a character of several tokens, whose bytes by themselves are not valid UTF-8."""
    context_tokens: Annotated[int, Field(gt=0)] = 4096
    """The most that prompt and answer may have together."""
    top_logprobs_limit: Annotated[int, Field(ge=0)] = 20
    """Asking for more is a 400."""
    token_ids: bool = False
    """Entries of log-probabilities have an `id` (as llama.cpp's do)."""
    reasoning_tokens: Annotated[int, Field(ge=0)] = 0
    """Before a chat answer, in `reasoning_content`; they are counted and billed."""
    fresh_draws: bool = False
    """A body without `seed` gets another answer each time it is sent. Otherwise the same body always has the same answers."""

    limits: tuple[Limit, ...] = ()
    """In order of `after_seconds`, each until the next. The first begins at once, whatever its `after_seconds`."""
    burst_seconds: Annotated[float, Field(gt=0)] = 1.0
    """How long an unused rate is saved up: a bucket holds that much of its rate, and at least one request."""
    tokens_charged: Literal["used", "requested"] = "used"
    """What a request takes from the bucket of tokens: what it will use, or its prompt and the most it may generate."""
    retry_after: Literal["seconds", "date", "none"] = "seconds"
    """How a 429 says when to come again; with `seconds` there is a retry-after-ms too."""
    rate_headers: bool = True
    """Whether there are x-ratelimit-* headers."""
    concurrency: Annotated[int, Field(gt=0)] | None = None
    """More requests than that at a time are a 429."""
    quota_requests: Annotated[int, Field(ge=0)] | None = None
    """After so many that were done, every request is a 429 with code insufficient_quota."""
    idempotency: bool = False
    """A request whose Idempotency-Key was seen with the same body is answered again and not billed again."""

    faults: dict[Fault, Probability] = {}
    """How likely each is. Which requests they meet depends on the seed, on `faults_by` and on how often the same body has been received."""
    faults_by: Literal["body", "number"] = "body"
    """body: whatever the order in which requests arrive. number: by their order alone."""
    faults_in_order: tuple[Fault | Literal["none"], ...] = ()
    """Of the first requests received, before the probabilities hold."""
    most_faults: Annotated[int, Field(ge=0)] | None = None
    """A body that has been received so often is met by no more faults."""
    hang_seconds: Seconds = 3600
    """Of hang-after-work."""
    slow_seconds: Seconds = 2
    """Of slow-body."""

    lies: frozenset[Lie] = frozenset()
    """What it does other than it says, all at once."""
    lies_share: Probability = 1.0
    """Of bodies that are lied to; the others are answered honestly."""
    remember_requests: Annotated[int, Field(ge=0)] = 1000
    """How many of the last requests are kept for whoever asks."""

    @field_validator("faults")
    @classmethod
    def _at_most_one(cls, faults: dict[Fault, float]) -> dict[Fault, float]:
        if sum(faults.values()) > 1 + 1e-9:
            raise ValueError(f"their probabilities sum to {sum(faults.values()):g}, and a request meets one at most")
        return faults

    @field_validator("limits")
    @classmethod
    def _in_order(cls, limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        if any(first.after_seconds >= then.after_seconds for first, then in zip(limits, limits[1:], strict=False)):
            raise ValueError("after_seconds must increase from one to the next")
        return limits


def read_settings(path: str | Path) -> Settings:
    """The settings in a YAML or JSON file. Raises StillroomError 'endpoint-settings' where it cannot be read or has anything unknown in it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _error(f"{path}: {' '.join(str(error).split())}", "a YAML or JSON file") from error
    return make_settings({} if values is None else values, where=str(path))


def make_settings(values: Any, *, where: str = "the settings") -> Settings:
    """Settings of plain values, as they stand in a file. Raises StillroomError 'endpoint-settings'."""
    if not isinstance(values, dict):
        raise _error(f"{where}: {type(values).__name__}", "names with values")
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise _error(f"{where}: {name}: {first['msg']}{_nearest(first, name)}", "values as the settings describe them") from None


def _nearest(error: Any, name: str) -> str:
    if error["type"] == "extra_forbidden":
        known: Iterable[str] = (*Settings.model_fields, *Limit.model_fields)
    elif name.startswith("faults"):
        known = get_args(Fault)
    elif name.startswith("lies"):
        known = get_args(Lie)
    else:
        return ""
    wrong = error["input"] if isinstance(error["input"], str) and error["type"] != "extra_forbidden" else name.split(".")[-1]
    near = difflib.get_close_matches(str(wrong), known, n=1)
    return f"; the nearest known name is {near[0]}" if near else f"; known are {', '.join(known)}"


def _error(found: str, expected: str) -> StillroomError:
    return StillroomError(
        "endpoint-settings", found=found, expected=expected, do="Mend it; src/stillroom/testing/settings.py describes every setting of the endpoint."
    )
