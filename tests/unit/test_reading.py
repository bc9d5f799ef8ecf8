"""What comes back is read: bodies as real servers write them, and every way in which there is no answer. Fuzzed: nothing raises."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from typing import Any

import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

from stillroom.collect.reading import classify, clean, rates_of, read, read_response, seconds_of
from stillroom.collect.wire import Answer, Call, Endpoint, Failure, Rates, Response, Usage

CALL = Call(endpoint=Endpoint(base_url="http://127.0.0.1:1/v1", model="m"), body={"model": "m"})


def response(body: Any, status: int = 200, **headers: str) -> Response:
    return Response(status=status, headers=headers, body=body if isinstance(body, bytes) else json.dumps(body).encode(), seconds=0.1)


def answer(body: Any) -> Answer:
    (found,) = read_response(CALL, response(body))
    assert isinstance(found, Answer), found
    return found


def failure(body: Any, status: int = 200, **headers: str) -> Failure:
    (found,) = read_response(CALL, response(body, status, **headers))
    assert isinstance(found, Failure), found
    return found


def entry(text: str, logprob: float, top: list[tuple[str, float]] | None = None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"token": text, "logprob": logprob, "bytes": list(text.encode()), **more}
    if top is not None:
        found["top_logprobs"] = [{"token": t, "logprob": v, "bytes": list(t.encode())} for t, v in top]
    return found


OPENAI = {
    "id": "chatcmpl-AbC",
    "object": "chat.completion",
    "created": 1760000000,
    "model": "gpt-4o-2024-08-06",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi é", "refusal": None, "annotations": []},
            "logprobs": {
                "content": [entry("Hi", -0.1, [("Hi", -0.1), ("Yo", -3.5)]), entry(" é", -0.5, [(" e", -0.9), (" é", -0.5)])],
                "refusal": None,
            },
            "finish_reason": "stop",
        }
    ],
    "usage": {
        "prompt_tokens": 9,
        "completion_tokens": 2,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "accepted_prediction_tokens": 0},
    },
    "service_tier": "default",
    "system_fingerprint": "fp_07871e2ad8",
}


def test_an_openai_answer_is_read_as_the_openai_client_reads_it() -> None:
    read_ = answer(OPENAI)
    oracle = ChatCompletion.model_validate(OPENAI)
    choice = oracle.choices[0]
    assert read_.text == choice.message.content
    assert (read_.finish_reason, read_.model, read_.fingerprint, read_.response_id) == ("stop", oracle.model, oracle.system_fingerprint, oracle.id)
    assert read_.usage == Usage(prompt_tokens=9, completion_tokens=2, cached_tokens=4)
    places, content = read_.places, choice.logprobs.content  # type: ignore[union-attr]
    assert places is not None
    assert content is not None
    assert places.tokens_T == [bytes(item.bytes or []) for item in content]
    assert places.logprobs_T.tolist() == [item.logprob for item in content]
    flat = [alternative for item in content for alternative in item.top_logprobs]
    assert places.top_tokens_N == [bytes(item.bytes or []) for item in flat]
    assert places.top_logprobs_N.tolist() == [item.logprob for item in flat]
    assert places.starts_T1.tolist() == [0, 2, 4]
    assert places.ids_T is None
    assert not read_.places_unreadable


def test_several_choices_come_in_the_order_of_their_indexes_and_fewer_than_asked_are_visible() -> None:
    body = {"choices": [{"index": i, "message": {"content": str(i)}, "finish_reason": "stop"} for i in (2, 0, 1)], "usage": OPENAI["usage"]}
    found = read_response(Call(endpoint=CALL.endpoint, body={"n": 4}), response(body))
    assert [item.text for item in found if isinstance(item, Answer)] == ["0", "1", "2"]
    assert [item.usage is not None for item in found] == [True, False, False]  # the response's usage is counted once


def test_one_filtered_choice_keeps_the_others() -> None:
    body = {
        "choices": [
            {"index": 0, "message": {"content": "a"}, "finish_reason": "content_filter"},
            {"index": 1, "message": {"content": "b"}, "finish_reason": "stop"},
        ]
    }
    first, second = read_response(CALL, response(body))
    assert isinstance(first, Failure)
    assert first.reason == "content-filtered"
    assert isinstance(second, Answer)
    assert second.text == "b"


def chat(message: dict[str, Any], finish: str | None = "stop", **more: Any) -> dict[str, Any]:
    return {"id": "x", "model": "m", "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish, **more}]}


@pytest.mark.parametrize(
    ("message", "text", "reasoning"),
    [
        ({"content": "4", "reasoning_content": "2+2"}, "4", "2+2"),  # DeepSeek, vLLM before 0.12, llama.cpp
        ({"content": "4", "reasoning": "2+2", "reasoning_details": []}, "4", "2+2"),  # OpenRouter, vLLM
        ({"content": "4", "reasoning_content": None, "reasoning": None}, "4", None),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "2+2"}]}, {"type": "text", "text": "4"}]}, "4", "2+2"),  # Mistral
        ({"content": [{"type": "text", "text": "4"}]}, "4", None),
        ({"content": None, "reasoning_content": "2+"}, "", "2+"),
    ],
)
def test_reasoning_is_kept_apart_wherever_it_stands(message: dict[str, Any], text: str, reasoning: str | None) -> None:
    found = answer(chat(message))
    assert (found.text, found.reasoning) == (text, reasoning)


@pytest.mark.parametrize(
    ("text", "thinking"),
    [("<think>a</think>b", "closed"), ("\n<think>a", "unterminated"), ("a</think>b", "closed"), ("plain", "none"), ("the tag <think> opens", "none"), ("x <think>a</think>", "none"), ("<thinking>a", "unterminated"), ("", "none")],
)  # fmt: skip
def test_a_think_block_that_never_ends_is_noticed(text: str, thinking: str) -> None:
    assert answer(chat({"content": text}, "length")).thinking == thinking


def test_deepseek_keeps_two_lists_of_log_probabilities() -> None:
    logprobs = {"content": [entry("4", -0.1)], "reasoning_content": [entry("2", -0.2), entry("+2", -0.3)]}
    found = answer(chat({"content": "4", "reasoning_content": "2+2"}, logprobs=logprobs))
    assert found.places is not None
    assert found.places.tokens_T == [b"4"]
    assert found.reasoning_places is not None
    assert found.reasoning_places.tokens_T == [b"2", b"+2"]


def test_llama_cpp_has_ids_and_the_chat_shape_on_the_completions_route() -> None:
    top = [{"id": 5, "token": "a", "bytes": [97], "logprob": -0.1}, {"id": 9, "token": "\ufffd", "bytes": [0xE2, 0x82], "logprob": -4.0}]
    logprobs = {"content": [{"id": 5, "token": "a", "bytes": [97], "logprob": -0.1, "top_logprobs": top}]}
    body = {
        "choices": [{"text": "a", "index": 0, "logprobs": logprobs, "finish_reason": "length"}],
        "object": "text_completion",
        "system_fingerprint": "b6000-abc",
    }
    places = answer(body).places
    assert places is not None
    assert places.ids_T is not None
    assert places.top_ids_N is not None
    assert (places.ids_T.tolist(), places.top_ids_N.tolist(), places.top_tokens_N) == ([5], [5, 9], [b"a", b"\xe2\x82"])


def test_the_completions_routes_arrays() -> None:
    logprobs = {"tokens": ["a", " b"], "token_logprobs": [-0.5, -1.5], "top_logprobs": [{"a": -0.5, "x": -2.0}, {" b": -1.5}], "text_offset": [0, 1]}
    body = {"choices": [{"text": "a b", "index": 0, "logprobs": logprobs, "finish_reason": "stop"}]}
    places = answer(body).places
    assert places is not None
    assert (places.tokens_T, places.top_tokens_N, places.starts_T1.tolist()) == ([b"a", b" b"], [b"a", b"x", b" b"], [0, 2, 3])


def test_vllm_can_write_tokens_as_ids() -> None:
    logprobs = {"tokens": ["token_id:7"], "token_logprobs": [-0.5], "top_logprobs": [{"token_id:7": -0.5, "token_id:8": -2.0}]}
    found = answer({"choices": [{"text": "a", "index": 0, "logprobs": logprobs, "token_ids": [7], "finish_reason": "stop"}]})
    assert found.places is not None
    assert found.places.tokens_T is None
    assert found.places.top_ids_N is not None
    assert found.places.top_ids_N.tolist() == [7, 8]
    assert found.token_ids == (7,)


def test_together_has_arrays_on_the_chat_route_and_mlx_names_no_token() -> None:
    together = answer(chat({"content": "a"}, logprobs={"tokens": ["a"], "token_logprobs": [-0.5], "token_ids": [64]}))
    assert together.places is not None
    assert together.places.ids_T is not None
    assert (together.places.ids_T.tolist(), len(together.places.top_logprobs_N)) == ([64], 0)
    mlx = answer(chat({"content": "a"}, logprobs={"content": [{"id": 64, "logprob": -0.5}]}))
    assert mlx.places is not None
    assert mlx.places.tokens_T is None


@pytest.mark.parametrize("logprobs", [{"content": [{"token": "a"}]}, {"content": [{"token": "a", "logprob": None}]}, {"content": [{"token": "a", "logprob": "-1"}]},
    {"content": [5]}, {"content": [{"token": "a", "logprob": -1.0, "bytes": [256]}]}, {"content": [{"token": "a", "logprob": -1.0, "bytes": 4}]},
    {"content": [{"token": 5, "logprob": -1.0}]}, {"content": "x"}, [1], "x", {"tokens": ["a"], "token_logprobs": [-1.0, -2.0]}, {"token_logprobs": [None]},
    {"content": [{"token": "a", "id": "five", "logprob": -1.0}]}, {"content": [{"token": "a", "logprob": -1.0, "top_logprobs": {"a": 1}}]}])  # fmt: skip
def test_log_probabilities_that_cannot_be_read_leave_the_text(logprobs: Any) -> None:
    found = answer(chat({"content": "a"}, logprobs=logprobs))
    assert (found.text, found.places, found.places_unreadable) == ("a", None, True)


@pytest.mark.parametrize("logprobs", [None, {"content": None, "refusal": None}, {}])
def test_log_probabilities_that_are_not_there_are_not_unreadable(logprobs: Any) -> None:
    found = answer(chat({"content": "a"}, logprobs=logprobs))
    assert (found.places, found.places_unreadable) == (None, False)


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        # 429 is three things
        (429, {"error": {"message": "Rate limit reached for gpt-4o in organization org-x on tokens per min (TPM): Limit 30000, Used 29000.", "type": "tokens", "code": "rate_limit_exceeded"}}, "throttled"),
        (429, {"error": {"message": "You exceeded your current quota, please check your plan and billing details.", "type": "insufficient_quota", "param": None, "code": "insufficient_quota"}}, "quota-exhausted"),
        (429, {"error": {"message": "The engine is currently overloaded, please try again later", "type": "server_error", "code": None}}, "overloaded"),
        (429, {"error": {"message": "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 40000.", "code": "rate_limit_exceeded"}}, "context-overflow"),
        (429, [{"error": {"code": 429, "message": "You exceeded your current quota. Please retry in 34.07s.", "status": "RESOURCE_EXHAUSTED", "details": [{"retryDelay": "34s"}]}}], "throttled"),
        (429, b"", "throttled"),
        (402, {"error": {"message": "Insufficient Balance", "type": "unknown_error", "param": None, "code": "invalid_request_error"}}, "quota-exhausted"),
        (403, {"error": {"message": "You have reached your spending limit", "code": 403}}, "quota-exhausted"),
        # keys and names
        (401, {"error": {"message": "Incorrect API key provided: sk-ab***wxyz.", "type": "invalid_request_error", "code": "invalid_api_key"}}, "bad-key"),
        (401, {"detail": "Unauthorized"}, "bad-key"),
        (400, [{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key.", "status": "INVALID_ARGUMENT"}}], "bad-key"),
        (403, {"error": "Forbidden"}, "bad-key"),
        (404, {"error": {"message": "The model `x` does not exist or you do not have access to it.", "code": "model_not_found"}}, "not-found"),
        (404, {"object": "error", "message": "The model `x` does not exist.", "type": "NotFoundError", "code": 404}, "not-found"),
        (404, {"detail": "Not Found"}, "not-found"),
        (400, {"error": {"message": "Model Not Exist", "type": "invalid_request_error", "code": "invalid_request_error"}}, "not-found"),
        (405, b"", "not-found"),
        (301, b"<html>moved</html>", "not-found"),
        # too long, in the words of each
        (400, {"error": {"message": "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.", "code": "context_length_exceeded"}}, "context-overflow"),
        (400, {"object": "error", "message": "This model's maximum context length is 512 tokens. However, you requested 600.", "type": "BadRequestError", "code": 400}, "context-overflow"),
        (400, {"error": {"code": 400, "message": "the request exceeds the available context size, try increasing it", "type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 4}}, "context-overflow"),
        (422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000", "error_type": "validation"}, "context-overflow"),
        (400, [{"error": {"code": 400, "message": "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."}}], "context-overflow"),
        (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 210000 tokens > 200000 maximum"}}, "context-overflow"),
        (413, b"<html>Request Entity Too Large</html>", "context-overflow"),
        # filters
        (400, {"error": {"message": "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.", "code": "content_filter", "status": 400,
                         "innererror": {"code": "ResponsibleAIPolicyViolation"}}}, "content-filtered"),
        (403, {"error": {"code": 403, "message": "Your chosen model requires moderation and your input was flagged", "metadata": {"reasons": ["x"]}}}, "content-filtered"),
        (400, {"error": {"code": "data_inspection_failed", "message": "Input data may contain inappropriate content."}}, "content-filtered"),
        # the rest of 4xx, and 5xx
        (400, {"error": {"message": "Unsupported parameter: 'max_tokens'", "type": "invalid_request_error", "code": "unsupported_parameter"}}, "invalid-request"),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "Input should be less than 2", "type": "less_than"}]}, "invalid-request"),
        (500, {"error": {"message": "The server had an error while processing your request.", "type": "server_error"}}, "server-error"),
        (502, b"<html><h1>502 Bad Gateway</h1></html>", "server-error"),
        (504, b"", "server-error"),
        (503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}, "overloaded"),
        (529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "overloaded"),
        (498, {"error": {"message": "capacity exceeded", "code": "capacity_exceeded"}}, "overloaded"),
        (408, b"", "server-error"),
        # 200 is not believed
        (200, {"error": {"code": 429, "message": "Provider returned error", "metadata": {"raw": "slow down"}}}, "throttled"),
        (200, {"error": {"code": 502, "message": "Provider returned error"}}, "server-error"),
        (200, {"error": {"message": "upstream is overloaded", "type": "overloaded_error"}}, "overloaded"),
        (200, {"error": {"message": "bad", "type": "invalid_request_error"}}, "invalid-request"),
        (200, {"error": "something broke"}, "server-error"),
        (200, {"error": {"message": "insufficient_quota", "code": "insufficient_quota"}, "choices": [{"message": {"content": "I am an error"}}]}, "quota-exhausted"),
        (200, b"", "malformed"),
        (200, b"<html><body>Welcome to the hotel's network</body></html>", "malformed"),
        (200, json.dumps(OPENAI).encode()[:200], "malformed"),
        (200, json.dumps(chat({"content": "\u00e9"}), ensure_ascii=False).encode("latin-1"), "malformed"),
        (200, {"choices": []}, "malformed"),
        (200, {"message": "ok"}, "malformed"),
        (200, chat({"content": None}), "malformed"),
        (200, chat({"content": "\ud800"}), "malformed"),
        (200, chat({"content": None, "refusal": "I cannot help with that."}), "content-filtered"),
        (200, chat({"content": "Err"}, "error"), "server-error"),
        (200, chat({"content": ""}, None, error={"code": 502, "message": "upstream"}), "server-error"),
    ],
)  # fmt: skip
def test_why_there_is_no_answer(status: int, body: Any, reason: str) -> None:
    found = failure(body, status)
    assert found.reason == reason
    assert found.status == status
    assert found.message


def test_what_looks_like_a_secret_is_not_in_a_message() -> None:
    planted = ["sk-proj-abcDEF123", "sk-ab***wxyz", "gsk_1a2B3c4D5e6F7g8H", "AIzaSyA1234567890abcdef", "0123456789abcdef0123456789abcdef", "ann@example.org", "4111 1111 1111 1111",
               "8f14e45f-ceea-467f-9b0d-1234567890ab", "eyJhbGciOi.eyJzdWIi.c2ln", "QWxhZGRpbjpvcGVuIHNlc2FtZQQWxhZGRpbjpvcGVuI="]  # fmt: skip
    for secret in [*planted, "Bearer hunter2"]:
        for text in (f"Incorrect API key provided: {secret}. See x", f"key={secret}", f"<p>{secret}</p>"):
            found = classify(401, {}, json.dumps({"error": {"message": text}}).encode())
            assert secret.removeprefix("Bearer ") not in found.message
            assert secret.removeprefix("Bearer ") not in classify(502, {}, text.encode()).message
    assert clean("The model `gpt-4o-mini-2024-07-18` does not exist") == "The model `gpt-4o-mini-2024-07-18` does not exist"
    assert len(clean("word " * 1000)) == 300
    assert clean("a\x00b\n\x1b[31mc\ud800") == "a b [31mc?"


DATE = "Tue, 24 Nov 2026 10:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "message", "seconds"),
    [
        ({"retry-after": "7"}, "", 7.0),
        ({"retry-after": "0.25"}, "", 0.25),
        ({"retry-after-ms": "250", "retry-after": "1"}, "", 0.25),
        ({"retry-after": "Tue, 24 Nov 2026 10:01:30 GMT", "date": DATE}, "", 90.0),
        ({"retry-after": "Tue, 24 Nov 2026 09:00:00 GMT", "date": DATE}, "", 0.0),
        ({"retry-after": "soon"}, "", None),
        ({"retry-after": "-5"}, "", None),
        ({"retry-after": "9" * 17}, "", 30 * 86400.0),
        ({}, "Please try again in 6.5s. Visit", 6.5),
        ({}, "Please try again in 1m30s.", 90.0),
        ({}, "Please try again in 20ms.", 0.02),
        ({}, "please retry after 12 seconds", 12.0),
        ({}, "no hint", None),
    ],
)
def test_retry_after_in_every_spelling(headers: dict[str, str], message: str, seconds: float | None) -> None:
    assert failure({"error": {"message": message}}, 429, **headers).retry_after_seconds == seconds


def test_an_http_date_without_a_date_header_is_compared_with_the_clock() -> None:
    found = seconds_of(formatdate(time.time() + 60, usegmt=True), {})
    assert found is not None
    assert 57 <= found <= 60


@pytest.mark.parametrize(
    ("headers", "rates"),
    [
        ({"x-ratelimit-limit-requests": "500", "x-ratelimit-remaining-requests": "499", "x-ratelimit-reset-requests": "120ms", "x-ratelimit-limit-tokens": "30000",
          "x-ratelimit-remaining-tokens": "29980", "x-ratelimit-reset-tokens": "6m0s"},
         Rates(requests_limit=500, requests_left=499, requests_reset_seconds=0.12, tokens_limit=30000, tokens_left=29980, tokens_reset_seconds=360.0)),
        ({"anthropic-ratelimit-requests-limit": "50", "anthropic-ratelimit-requests-remaining": "0", "anthropic-ratelimit-requests-reset": "2026-11-24T10:00:12Z", "date": DATE},
         Rates(requests_limit=50, requests_left=0, requests_reset_seconds=12.0)),
        ({"x-ratelimit-limit": "60", "x-ratelimit-remaining": "59", "x-ratelimit-reset": "1795514405000", "date": DATE},
         Rates(requests_limit=60, requests_left=59, requests_reset_seconds=5.0)),
        ({"x-ratelimit-limit": "10, 10;w=1", "x-ratelimit-remaining": "many", "x-ratelimit-reset": "nan"}, Rates(requests_limit=10)),
        ({}, Rates()),
    ],
)  # fmt: skip
def test_limits_in_headers(headers: dict[str, str], rates: Rates) -> None:
    assert rates_of(headers) == rates


def test_the_stored_body_is_the_body_without_its_log_probabilities() -> None:
    kept = json.loads(read(CALL, response(OPENAI)).body_without_logprobs())
    expected = json.loads(json.dumps(OPENAI))
    del expected["choices"][0]["logprobs"]
    assert kept == expected
    assert read(CALL, response(b"nothing")).body_without_logprobs() == b""


# -- nothing raises ----------------------------------------------------------------------------------------------------

JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.sampled_from(["stop", "content_filter", "rate limit"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                "error code message type choices index message content text finish_reason logprobs token logprob bytes id top_logprobs tokens token_logprobs usage prompt_tokens "
                "completion_tokens details metadata raw model retryDelay refusal reasoning token_ids reasoning_content completion_tokens_details".split()
            )
            | st.text(max_size=3),
            inner,
            max_size=6,
        )
    ),
    max_leaves=25,
)


def checked(status: int, headers: dict[str, str], body: bytes) -> None:
    outcomes = read_response(CALL, Response(status=status, headers=headers, body=body, seconds=0.0))
    assert outcomes
    for outcome in outcomes:
        if isinstance(outcome, Answer):
            assert 200 <= status < 300
            assert outcome.places is None or len(outcome.places.starts_T1) == len(outcome.places) + 1
            json.dumps(outcome.text).encode()
        else:
            assert len(outcome.message) <= 300
    assert classify(status, headers, body).reason
    rates_of(headers)
    read(CALL, Response(status=status, headers=headers, body=body, seconds=0.0)).body_without_logprobs()


STATUSES = st.sampled_from([200, 200, 200, 201, 301, 400, 401, 403, 404, 413, 429, 500, 503])
HEADERS = st.dictionaries(
    st.sampled_from(["retry-after", "retry-after-ms", "date", "x-ratelimit-reset-requests", "x-ratelimit-limit-requests"]), st.text(max_size=20)
)


@settings(max_examples=60, deadline=None)
@given(STATUSES, HEADERS, st.binary(max_size=200))
@example(200, {}, b"[" * 100_000)
@example(200, {}, b"9" * 100_000)
@example(200, {}, b"\xff\xfe{\x00}\x00")
@example(500, {"retry-after": "\u0663"}, b"<" * 5000)
def test_any_bytes_are_read(status: int, headers: dict[str, str], body: bytes) -> None:
    checked(status, headers, body)


@settings(max_examples=60, deadline=None)
@given(STATUSES, HEADERS, JSONS, JSONS, JSONS)
def test_any_json_is_read(status: int, headers: dict[str, str], message: Any, logprobs: Any, whole: Any) -> None:
    checked(status, headers, json.dumps(whole).encode())
    checked(status, headers, json.dumps({"error": message}).encode())
    checked(status, headers, json.dumps({"choices": [{"message": {"content": "a"}, "logprobs": logprobs}, message], "usage": whole}).encode())
    checked(status, headers, json.dumps({"choices": [{"message": message, "logprobs": {"content": [logprobs]}}]}).encode())
    checked(
        status,
        headers,
        json.dumps({"choices": [{"text": "a", "logprobs": {"tokens": logprobs, "token_logprobs": [message], "top_logprobs": whole}}]}).encode(),
    )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_body_cut_anywhere_is_no_answer(data: st.DataObject) -> None:
    whole = json.dumps(OPENAI).encode()
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert failure(whole[:cut]).reason == "malformed"


def test_packing_keeps_no_object_for_an_alternative() -> None:
    content = [entry("a", -0.5, [(chr(97 + i), -0.5 - i) for i in range(20)]) for _ in range(32)]
    places = answer(chat({"content": "a" * 32}, logprobs={"content": content})).places
    assert places is not None
    assert places.top_logprobs_N.dtype == numpy.float64
    assert len(places.top_logprobs_N) == 640
