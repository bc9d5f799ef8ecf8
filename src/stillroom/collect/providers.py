"""How providers of OpenAI-compatible endpoints differ from one another, as data.

What a row says, it has from its `source`, looked up on 2026-11-29 where that is a page, a package or a thread, and otherwise general knowledge; the probe
decides what is true. A provider is known by its host; servers that one runs oneself have no host of their own, and are the generic provider.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """`hosts` are the ends of host names. `max_tokens` names the limit on the chat route. `top_logprobs_limit` is the documented one: 0 where
    log-probabilities are refused or passed over, None where nothing is said. `chat_logprobs_as_count`: the chat route takes their number as `logprobs`.
    `source` is where the row is from.
    """

    name: str
    source: str
    hosts: tuple[str, ...] = ()
    max_tokens: str = "max_tokens"
    top_logprobs_limit: int | None = None
    chat_logprobs_as_count: bool = False


_UNREAD = "general knowledge; its documentation was not read"
GENERIC = Provider(name="generic", source="OpenAI's protocol before max_completion_tokens, which servers that one runs oneself take")
PROVIDERS: tuple[Provider, ...] = (
    Provider(
        name="openai",
        hosts=("api.openai.com",),
        max_tokens="max_completion_tokens",
        top_logprobs_limit=20,
        source="package openai 3.54, chat/completion_create_params.py",
    ),
    Provider(
        name="azure",
        hosts=("openai.azure.com", "services.ai.azure.com"),
        max_tokens="max_completion_tokens",
        top_logprobs_limit=20,
        source="as OpenAI; that it returns log-probabilities is from a thread (vercel/ai #10932)",
    ),
    Provider(name="deepseek", hosts=("api.deepseek.com",), top_logprobs_limit=20, source=_UNREAD),
    Provider(name="openrouter", hosts=("openrouter.ai",), top_logprobs_limit=20, source=_UNREAD),
    Provider(
        name="together",
        hosts=("api.together.xyz", "api.together.ai"),
        top_logprobs_limit=20,
        chat_logprobs_as_count=True,
        source="docs.together.ai/docs/logprobs; togethercomputer/openapi #104",
    ),
    Provider(
        name="fireworks",
        hosts=("api.fireworks.ai",),
        top_logprobs_limit=5,
        source="docs.fireworks.ai/api-reference/post-chatcompletions (max_tokens); a user's report of its HTTP 400 above 5",
    ),
    Provider(name="gemini", hosts=("generativelanguage.googleapis.com",), top_logprobs_limit=20, source=_UNREAD),
    Provider(name="xai", hosts=("api.x.ai",), top_logprobs_limit=8, source="package xai-sdk, chat.py; max_tokens is general knowledge"),
    Provider(
        name="groq",
        hosts=("api.groq.com",),
        max_tokens="max_completion_tokens",
        top_logprobs_limit=0,
        source="package groq, resources/chat/completions.py: not yet supported by any of its models",
    ),
    Provider(
        name="cerebras",
        hosts=("api.cerebras.ai",),
        max_tokens="max_completion_tokens",
        top_logprobs_limit=20,
        source="package cerebras-cloud-sdk, types/chat/completion_create_params.py",
    ),
    Provider(
        name="anthropic",
        hosts=("api.anthropic.com",),
        top_logprobs_limit=0,
        source="docs.anthropic.com/en/api/openai-sdk, read in translation: logprobs and top_logprobs are ignored, max_tokens is taken",
    ),
    Provider(name="mistral", hosts=("api.mistral.ai",), top_logprobs_limit=0, source=_UNREAD),
)


def provider_of(host: str) -> Provider:
    """The provider whose host, or the parent of whose host, `host` (lower case) is; the generic one where there is none."""
    for provider in PROVIDERS:
        if any(host == known or host.endswith(f".{known}") for known in provider.hosts):
            return provider
    return GENERIC


# Where a message keeps its reasoning, in the order that is looked through.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")

# Header names of limits, in lower case, the most used first. What a value means follows from its form: see `reading.seconds_of`.
RATE_HEADERS: dict[str, tuple[str, ...]] = {
    "requests_limit": (
        "x-ratelimit-limit-requests",
        "anthropic-ratelimit-requests-limit",
        "x-ratelimit-limit-requests-minute",
        "x-ratelimit-limit-req-minute",
        "x-ratelimit-limit",
        "ratelimit-limit",
    ),
    "requests_left": (
        "x-ratelimit-remaining-requests",
        "anthropic-ratelimit-requests-remaining",
        "x-ratelimit-remaining-requests-minute",
        "x-ratelimit-remaining-req-minute",
        "x-ratelimit-remaining",
        "ratelimit-remaining",
    ),
    "requests_reset_seconds": (
        "x-ratelimit-reset-requests",
        "anthropic-ratelimit-requests-reset",
        "x-ratelimit-reset-requests-minute",
        "x-ratelimit-reset",
        "ratelimit-reset",
    ),
    "tokens_limit": (
        "x-ratelimit-limit-tokens",
        "anthropic-ratelimit-tokens-limit",
        "x-ratelimit-limit-tokens-minute",
        "x-tokenlimit-limit",
    ),
    "tokens_left": (
        "x-ratelimit-remaining-tokens",
        "anthropic-ratelimit-tokens-remaining",
        "x-ratelimit-remaining-tokens-minute",
        "x-tokenlimit-remaining",
    ),
    "tokens_reset_seconds": (
        "x-ratelimit-reset-tokens",
        "anthropic-ratelimit-tokens-reset",
        "x-ratelimit-reset-tokens-minute",
        "x-tokenlimit-reset",
    ),
}

# What error bodies say, in lower case: in their codes and types (whole), and in their messages (a part). OpenAI, Azure, DeepSeek, OpenRouter, Qwen,
# Gemini, Anthropic, Groq, Together, Mistral, vLLM, SGLang, TGI, llama.cpp, Ollama, LM Studio.
FILTER_CODES = frozenset(
    {"content_filter", "content_policy_violation", "responsibleaipolicyviolation", "data_inspection_failed", "moderation_blocked", "sensitive"}
)
FILTER_WORDS = (
    "content management policy",
    "content policy",
    "flagged by",
    "requires moderation",
    "input was flagged",
    "violating our usage policy",
    "inappropriate content",
    "content exists risk",
)
QUOTA_CODES = frozenset(
    {
        "insufficient_quota",
        "insufficient_balance",
        "billing_hard_limit_reached",
        "billing_not_active",
        "insufficient_credits",
        "payment_required",
        "quota_exceeded",
    }
)
QUOTA_WORDS = (
    "insufficient balance",
    "insufficient credit",
    "insufficient fund",
    "credit balance is too low",
    "hard limit has been reached",
    "out of credits",
    "requires more credits",
    "spending limit",
    "spend limit",
    "monthly limit",
    "exceeded your current quota",
)
KEY_CODES = frozenset(
    {
        "invalid_api_key",
        "invalid_authentication_error",
        "authentication_error",
        "api_key_invalid",
        "account_deactivated",
        "permission_error",
        "permission_denied",
        "unauthenticated",
    }
)
KEY_WORDS = (
    "api key not valid",
    "incorrect api key",
    "invalid api key",
    "invalid authentication",
    "no api key",
    "authentication fails",
    "unauthorized",
)
MODEL_CODES = frozenset({"model_not_found", "deploymentnotfound", "not_found_error", "model_not_available", "invalid_model"})
MODEL_WORDS = (
    "model not exist",
    "model does not exist",
    "model not found",
    "is not a valid model",
    "unknown model",
    "no such model",
    "unable to access model",
    "no endpoints found",
    "invalid model",
)
OVERFLOW_CODES = frozenset(
    {"context_length_exceeded", "exceed_context_size_error", "string_above_max_length", "tokens_limit_reached", "request_too_large", "input_too_long"}
)
OVERFLOW_WORDS = (
    "context length", "context size", "context window", "maximum model length", "max_model_len", "prompt is too long", "prompt too long", "input is too long",
    "input token count", "longer than the maximum", "exceeds the maximum number of tokens", "reduce the length", "max_new_tokens must be", "too many input tokens", "request too large", "n_ctx",
)  # fmt: skip
OVERLOAD_CODES = frozenset(
    {"overloaded_error", "engine_overloaded", "engine_overloaded_error", "overloaded", "capacity_exceeded", "unavailable", "unavailable_error"}
)
OVERLOAD_WORDS = (
    "overloaded",
    "no capacity",
    "over capacity",
    "at capacity",
    "capacity exceeded",
    "loading model",
    "no available workers",
    "server is busy",
    "high demand",
)
THROTTLE_CODES = frozenset({"rate_limit_exceeded", "rate_limit_error", "rate_limit", "too_many_requests", "resource_exhausted", "throttling"})
THROTTLE_WORDS = ("rate limit", "too many requests", "tokens per min", "requests per min")
INVALID_CODES = frozenset(
    {"invalid_request_error", "badrequesterror", "invalid_argument", "bad_request", "unsupported_parameter", "unsupported_value", "invalid_value"}
)


def is_loopback(host: str) -> bool:
    """Whether the name means this machine: localhost, or an address of 127.0.0.0/8 or ::1. Nothing is looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
