"""Endpoints as users write them, and bodies as they go over the wire."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.collect.providers import PROVIDERS, provider_of
from stillroom.collect.wire import Call, Endpoint, Settings, chat_body, completion_body
from stillroom.core.errors import CollectError


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1"),
        ("HTTPS://API.OpenAI.com:443/v1/", "https://api.openai.com/v1"),
        ("https://host/v1/chat/completions", "https://host/v1"),
        ("https://host/v1/completions/", "https://host/v1"),
        ("https://host", "https://host"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("http://127.0.0.1:80/v1", "http://127.0.0.1/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
    ],
)
def test_one_endpoint_has_one_url(url: str, base: str) -> None:
    endpoint = Endpoint.parse(url, "m")
    assert endpoint.base_url == base
    assert Endpoint.parse(endpoint.base_url, "m") == endpoint
    assert endpoint.url == f"{base}/chat/completions"


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://user:hunter2@host/v1", "credentials"),
        ("https://hunter2@host/v1", "credentials"),
        ("https://host/v1?key=hunter2", "query"),
        ("https://host/v1#hunter2", "query"),
        ("ftp://host/v1", "scheme"),
        ("file:///etc/passwd", "host"),
        ("host/v1", "scheme"),
        ("", "scheme"),
        ("https:///v1", "host"),
        ("http://example.org/v1", "http to the host"),
        ("http://127.0.0.1.example.org/v1", "http to the host"),
        ("https://host:99999/v1", "cannot be read"),
        ("https://[::1/v1", "cannot be read"),
        ("https://ho st/v1", "space"),
        ("https://host/v1\nX: y", "space"),
        ("https://host\\@evil/v1", "backslash"),
    ],
)
def test_a_url_that_is_refused_says_why_and_repeats_no_secret(url: str, found: str) -> None:
    with pytest.raises(CollectError, match=found) as error:
        Endpoint.parse(url, "m")
    assert error.value.code == "endpoint-invalid"
    assert "hunter2" not in str(error.value)


def test_http_to_another_machine_is_allowed_in_so_many_words() -> None:
    assert Endpoint.parse("http://10.0.0.5:8000/v1", "m", allow_http=True).base_url == "http://10.0.0.5:8000/v1"
    with pytest.raises(CollectError, match="model name"):
        Endpoint.parse("https://host/v1", " ")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_url_is_taken_or_refused(url: str) -> None:
    for text in (url, f"https://{url}", f"https://host/{url}"):
        try:
            endpoint = Endpoint.parse(text, "m")
        except CollectError:
            continue
        assert Endpoint.parse(endpoint.base_url, "m") == endpoint


def test_where_the_key_is_kept_is_not_in_a_calls_key() -> None:
    one, other = (Call(endpoint=Endpoint.parse("https://host/v1", "m", key_variable=name), body={"a": 1}) for name in ("A", "B"))
    assert one.key == other.key
    keys = {
        Call(endpoint=Endpoint.parse(url, model, route=route), body=body, sample=sample).key
        for url, model, route, body, sample in [
            ("https://host/v1", "m", "chat", {"a": 1}, 0),
            ("https://host/v2", "m", "chat", {"a": 1}, 0),
            ("https://host/v1", "n", "chat", {"a": 1}, 0),
            ("https://host/v1", "m", "completions", {"a": 1}, 0),
            ("https://host/v1", "m", "chat", {"a": 2}, 0),
            ("https://host/v1", "m", "chat", {"a": 1}, 1),
        ]
    }
    assert len(keys) == 6
    assert Call(endpoint=one.endpoint, body={"b": 1, "a": 2}).key == Call(endpoint=one.endpoint, body={"a": 2, "b": 1}).key


def test_what_is_sent_is_what_the_key_is_of() -> None:
    call = Call(endpoint=Endpoint.parse("https://host/v1", "m"), body={"b": "é", "a": 1.0})
    assert call.content == '{"a":1,"b":"é"}'.encode()
    assert json.loads(call.content) == call.body


FULL = Settings(
    max_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=("x",), n=2, top_logprobs=5, response_format={"type": "json_object"}, extra={"top_k": 1}
)
COMMON = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "n": 2, "response_format": {"type": "json_object"}, "top_k": 1, "model": "m"}


def test_bodies_are_final() -> None:
    local, openai, together = (
        Endpoint.parse(url, "m") for url in ("http://localhost:1/v1", "https://api.openai.com/v1", "https://api.together.xyz/v1")
    )
    messages = [{"role": "user", "content": "hi"}]
    assert chat_body(local, messages, FULL) == COMMON | {"messages": messages, "max_tokens": 7, "logprobs": True, "top_logprobs": 5}
    assert chat_body(openai, messages, FULL) == COMMON | {"messages": messages, "max_completion_tokens": 7, "logprobs": True, "top_logprobs": 5}
    assert chat_body(together, messages, FULL) == COMMON | {"messages": messages, "max_tokens": 7, "logprobs": 5}
    assert completion_body(local, "hi", FULL) == COMMON | {"prompt": "hi", "max_tokens": 7, "logprobs": 5}
    assert completion_body(openai, (1, 2), Settings(max_tokens=7)) == {"model": "m", "prompt": [1, 2], "max_tokens": 7}
    assert chat_body(local, messages, Settings(max_tokens=1)) == {"model": "m", "messages": messages, "max_tokens": 1}


@pytest.mark.parametrize("extra", [{"max_tokens": 9}, {"temperature": 0}, {"model": "n"}, {"stream": True}, {"stream": False}])
def test_nothing_is_said_twice(extra: dict[str, object]) -> None:
    with pytest.raises(CollectError) as error:
        chat_body(Endpoint.parse("http://localhost:1/v1", "m"), [], Settings(max_tokens=1, temperature=1.0, extra=extra))
    assert error.value.code == "request-invalid"


def test_a_provider_is_known_by_its_host() -> None:
    assert provider_of("my-resource.openai.azure.com").name == "azure"
    assert provider_of("api.openai.com.evil.org").name == "generic"
    assert provider_of("notopenrouter.ai").name == "generic"
    assert len({provider.name for provider in PROVIDERS}) == len(PROVIDERS)
