"""The fake endpoint: what it says when it is honest, each of its faults and lies, and its bill."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, get_args

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.core.errors import StillroomError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.testing import account, language
from stillroom.testing.answers import Answered, Answerer
from stillroom.testing.asking import Refused, parse_body, read_request
from stillroom.testing.fake_endpoint import Running, fake_endpoint, serve
from stillroom.testing.settings import WORK_DONE, Fault, Lie, Limit, Settings, make_settings, read_settings

openai = pytest.importorskip("openai")
MODEL = "fake-teacher"
QUESTION = [{"role": "user", "content": "Where is the river?"}]
SOURCE = Path(__file__).parents[2] / "src"


def chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": QUESTION, "max_tokens": 40} | more


def post(server: Running, body: Any, route: str = "/chat/completions", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one plain request; whatever breaks is raised."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.base_url + route, raw, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {name.lower(): value for name, value in error.headers.items()}, error.read()


def answer(server: Running, body: Any, route: str = "/chat/completions") -> dict[str, Any]:
    status, _, read = post(server, body, route)
    assert status == 200, read
    return json.loads(read)


def refusal(server: Running, body: Any, route: str = "/chat/completions", **headers: str) -> tuple[int, str | None]:
    status, _, read = post(server, body, route, **headers)
    return status, json.loads(read)["error"]["code"]


@pytest.fixture(scope="module")
def honest() -> Iterator[Running]:
    with fake_endpoint() as server:
        yield server


@pytest.fixture(scope="module")
def client(honest: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=honest.base_url, api_key="any", max_retries=0) as found:
        yield found


def check_places(places: list[Any], text: str, alternatives: int) -> None:
    """Entries re-join to the text byte for byte, and are a distribution each."""
    assert b"".join(bytes(place["bytes"]) for place in places).decode(errors="replace") == text
    for place in places:
        top = [other["logprob"] for other in place["top_logprobs"]]
        assert len(top) == alternatives
        assert top == sorted(top, reverse=True)
        assert math.fsum(map(math.exp, top)) <= 1
        listed = [other["logprob"] for other in place["top_logprobs"] if other["bytes"] == place["bytes"]]
        assert listed == [place["logprob"]] if listed else place["logprob"] <= top[-1]


# -- honest ---------------------------------------------------------------------------------------------------------------


def test_the_openai_client_gets_chat_with_log_probabilities(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=40, n=3, logprobs=True, top_logprobs=20, seed=1)
    assert len(got.choices) == len({choice.message.content for choice in got.choices}) == 3
    for choice in got.choices:
        check_places([place.model_dump() for place in choice.logprobs.content], choice.message.content, 20)
        assert choice.finish_reason in ("stop", "length")
    assert got.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in got.choices)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert got.system_fingerprint.startswith("fp_")
    assert got.model == MODEL
    assert got._request_id.startswith("req_")


def test_the_openai_client_gets_completions_with_echo(client: openai.OpenAI) -> None:
    got = client.completions.create(model=MODEL, prompt="It was é", max_tokens=6, echo=True, logprobs=4, temperature=0)
    shape = got.choices[0].logprobs
    assert got.choices[0].text.startswith("It was é")
    assert len(shape.tokens) == len(shape.token_logprobs) == len(shape.top_logprobs) == len(shape.text_offset)
    assert shape.tokens[:6] == ["I", "t", " was", " ", "bytes:\\xc3", "bytes:\\xa9"]
    assert shape.token_logprobs[0] is None
    assert all(value < 0 for value in shape.token_logprobs[1:])
    assert got.usage.prompt_tokens == 6
    # What the prompt's end and its answer get as a prompt is what they got when they were drawn.
    again = client.completions.create(model=MODEL, prompt=got.choices[0].text, max_tokens=0, echo=True, logprobs=4)
    assert again.choices[0].logprobs.token_logprobs[1:] == shape.token_logprobs[1:]


def test_the_openai_client_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_the_same_body_has_the_same_bytes_in_another_server_of_the_same_seed() -> None:
    bodies = [chat(seed=seed, logprobs=True, top_logprobs=3) for seed in range(5)]
    with fake_endpoint() as one, fake_endpoint(Settings(), process=True) as two, fake_endpoint(Settings(seed=1)) as other:
        first, second, third = ([post(server, body)[2] for body in bodies] for server in (one, two, other))
        assert first == second
        assert all(a != b for a, b in zip(first, third, strict=True))
        assert len(set(first)) == len(bodies)
        assert json.loads(post(one, bodies[0])[2])["choices"] == json.loads(first[0])["choices"]


def test_a_body_without_a_seed_can_be_drawn_anew() -> None:
    with fake_endpoint(Settings(fresh_draws=True)) as server:
        unseeded = [answer(server, chat(max_tokens=20))["choices"] for _ in range(3)]
        seeded = [answer(server, chat(max_tokens=20, seed=5))["choices"] for _ in range(3)]
    assert unseeded[0] != unseeded[1] != unseeded[2]
    assert seeded[0] == seeded[1] == seeded[2]


def test_temperature_moves_the_draw_and_not_the_log_probabilities(honest: Running) -> None:
    first = [answer(honest, chat(temperature=heat, logprobs=True, top_logprobs=20))["choices"][0]["logprobs"]["content"][0] for heat in (0, 0.5, 2)]
    assert first[0]["top_logprobs"] == first[1]["top_logprobs"] == first[2]["top_logprobs"]
    assert first[0]["token"] == first[0]["top_logprobs"][0]["token"]
    assert len({answer(honest, chat(temperature=0, seed=seed))["choices"][0]["message"]["content"] for seed in range(4)}) == 1


def test_draws_follow_the_distribution_that_is_reported() -> None:
    model = language.Language(0)
    found = model.next(language.Context())
    draws, count = language.draws("test"), 20_000
    sums = found.sums(1.0, 1.0)
    drawn = [found.ids[sum(value <= u * sums[-1] for value in sums[:40])] for u in (next(draws) for _ in range(count))]
    for id in found.ids[:5]:
        share = math.exp(found.logprob(id))
        assert drawn.count(id) / count == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / count))


@pytest.mark.parametrize("opened", [b"", b"\xf0\x9f"])
def test_every_token_has_some_mass_and_the_masses_sum_to_one(opened: bytes) -> None:
    found = language.Language(3).next(language.Context(12345 << 40, opened))
    assert sorted(found.ids) == list(range(language.SIZE))
    total = math.fsum(map(math.exp, found.logprobs))
    assert 1 - 1e-4 < total <= 1


def test_answers_are_cut_at_a_stop_and_the_entries_with_them(honest: Running) -> None:
    whole = answer(honest, chat(temperature=0, max_tokens=30))["choices"][0]["message"]["content"]
    stop = whole[9:12]
    got = answer(honest, chat(temperature=0, max_tokens=30, stop=["never", stop], logprobs=True, top_logprobs=2))
    choice = got["choices"][0]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    check_places(choice["logprobs"]["content"], choice["message"]["content"], 2)
    assert got["usage"]["completion_tokens"] == len(choice["logprobs"]["content"])


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_answers_are_cut_at_the_limit(honest: Running, name: str) -> None:
    got = answer(honest, {"model": MODEL, "messages": QUESTION, name: 3, "n": 4})
    assert got["usage"]["completion_tokens"] <= 12
    assert "length" in {choice["finish_reason"] for choice in got["choices"]}


def test_a_fixed_length_is_exact_and_ends_no_character_in_its_middle() -> None:
    with fake_endpoint(Settings(fixed_length=True, answer_tokens=20, fragment_share=0.5)) as server:
        for seed in range(20):
            got = answer(server, chat(seed=seed, max_tokens=30))
            assert 20 <= got["usage"]["completion_tokens"] <= 23
            assert got["choices"][0]["finish_reason"] == "stop"
            assert "\ufffd" not in got["choices"][0]["message"]["content"]


def test_tokens_may_be_parts_of_characters(honest: Running) -> None:
    got = [answer(honest, chat(seed=seed, logprobs=True, top_logprobs=1))["choices"][0] for seed in range(10)]
    assert any(place["token"] == "\ufffd" for choice in got for place in choice["logprobs"]["content"])
    assert any(ord(character) > 0xFFFF for choice in got for character in choice["message"]["content"])


def test_a_form_is_kept_to(honest: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"day": {"enum": ["Monday", "Friday"]}, "count": {"type": "integer", "minimum": 3, "maximum": 4}, "of": {"$ref": "#/$defs/of"}},
        "required": ["day", "count"],
        "$defs": {"of": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}},
    }
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    got = answer(honest, chat(response_format=form, max_tokens=300, logprobs=True, top_logprobs=2))["choices"][0]
    value = json.loads(got["message"]["content"])
    assert value["day"] in ("Monday", "Friday")
    assert value["count"] in (3, 4)
    assert len(value["of"]) == 2
    check_places(got["logprobs"]["content"], got["message"]["content"], 2)
    assert isinstance(json.loads(answer(honest, chat(response_format={"type": "json_object"}))["choices"][0]["message"]["content"]), dict)
    form["json_schema"]["schema"] = {"type": "object", "patternProperties": {}}
    assert refusal(honest, chat(response_format=form)) == (400, "invalid_json_schema")


def test_reasoning_is_counted_and_billed() -> None:
    with fake_endpoint(Settings(reasoning_tokens=7)) as server:
        got = answer(server, chat(logprobs=True, top_logprobs=1))
        choice = got["choices"][0]
        assert len(choice["message"]["reasoning_content"].split()) == 7
        assert got["usage"]["completion_tokens_details"] == {"reasoning_tokens": 7}
        assert got["usage"]["completion_tokens"] == 7 + len(choice["logprobs"]["content"]) == server.bill.completion_tokens
        cut = answer(server, chat(max_tokens=5))
        assert (cut["choices"][0]["message"]["content"], cut["choices"][0]["finish_reason"]) == ("", "length")


# -- refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"top_logprobs": 21, "logprobs": True}, "integer_above_max_value"), ({"top_logprobs": 3}, "invalid_value"), ({"stream": True}, "unsupported_parameter"),
        ({"tools": [{}]}, "unsupported_parameter"), ({"n": 0}, "invalid_value"), ({"n": 1.5}, "invalid_type"), ({"temperature": 2.1}, "invalid_value"),
        ({"max_tokens": 5000}, "context_length_exceeded"), ({"messages": [{"role": "user", "content": "x" * 5000}]}, "context_length_exceeded"),
        ({"messages": []}, "missing_required_parameter"), ({"messages": [{"role": "user"}]}, "invalid_type"), ({"stop": [""]}, "invalid_value"),
        ({"model": None}, "missing_required_parameter"), ({"response_format": {"type": "xml"}}, "invalid_value"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_a_bad_request_and_costs_nothing(honest: Running, more: dict[str, Any], code: str) -> None:
    before = honest.bill
    assert refusal(honest, chat() | more) == (400, code)
    assert honest.bill.micro_dollars == before.micro_dollars
    assert honest.bill.done == before.done


def test_errors_are_what_the_openai_client_calls_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=9999)
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with fake_endpoint(Settings(api_keys=("right",), quota_requests=1, faults_in_order=("none", "none", "http-503"))) as server:
        with openai.OpenAI(base_url=server.base_url, api_key="wrong", max_retries=0) as wrong, pytest.raises(openai.AuthenticationError):
            wrong.chat.completions.create(model=MODEL, messages=QUESTION)
        with openai.OpenAI(base_url=server.base_url, api_key="right", max_retries=0) as right:
            right.chat.completions.create(model=MODEL, messages=QUESTION)
            with pytest.raises(openai.RateLimitError) as out:
                right.chat.completions.create(model=MODEL, messages=QUESTION)
        assert out.value.code == "insufficient_quota"
        assert "retry-after" not in out.value.response.headers
        assert not any("right" in json.dumps(received.headers) for received in server.requests)
    with fake_endpoint(Settings(faults={"http-529": 1})) as server, openai.OpenAI(base_url=server.base_url, api_key="k", max_retries=0) as it:
        with pytest.raises(openai.InternalServerError) as overloaded:
            it.chat.completions.create(model=MODEL, messages=QUESTION)
        assert overloaded.value.status_code == 529


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    "messages prompt max_tokens max_completion_tokens n seed stop temperature top_p logprobs top_logprobs response_format echo stream tools"
).split()
messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": json_values}), max_size=2)
forms = st.fixed_dictionaries(
    {"type": st.sampled_from(["json_schema", "json_object"])},
    optional={
        "json_schema": st.fixed_dictionaries({
            "name": st.just("x"),
            "schema": st.recursive(
                st.dictionaries(st.sampled_from("type minItems maxItems minimum maximum enum const $ref required".split()),
                                json_values | st.sampled_from("object array string integer number # #/anyOf".split()), max_size=3),
                lambda inner: st.dictionaries(st.sampled_from("items properties anyOf $defs".split()),
                                              inner | st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_size=3),
                max_leaves=5),
        })
    },
)  # fmt: skip


@given(
    route=st.sampled_from(["chat", "completions"]),
    base=st.fixed_dictionaries({}, optional={name: json_values | st.integers(0, 30) for name in NAMES}),
    likely=st.fixed_dictionaries({}, optional={"messages": messages, "prompt": st.text(), "response_format": forms, "logprobs": st.booleans()}),
    lies=st.frozensets(st.sampled_from(get_args(Lie))),
)
def test_any_json_is_answered_or_refused(route: Any, base: dict[str, Any], likely: dict[str, Any], lies: Any) -> None:
    settings = Settings(context_tokens=200, lies=lies, reasoning_tokens=3)
    raw = json.dumps({"model": MODEL, "messages": QUESTION, "prompt": "It"} | base | likely).encode()
    outcome = answered_or_refused(route, raw, settings)
    if isinstance(outcome, Refused):
        assert 400 <= outcome.status < 500
        assert json.loads(outcome.body)["error"]["message"]
    else:
        json.loads(b"{" + outcome.body)
        assert outcome.completion_tokens >= 0


def answered_or_refused(route: Any, raw: bytes, settings: Settings) -> Answered | Refused:
    try:
        return Answerer(settings).answer(read_request(route, parse_body(raw), settings), 0)
    except Refused as refused:
        return refused


@given(raw=st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_refused_or_read(raw: bytes) -> None:
    parsed = parse_body(raw)
    assert len(parsed.key) == 64
    with pytest.raises(Refused):
        read_request("chat", parsed, Settings())


@pytest.mark.parametrize("raw", [b"", b"[" * 100_000, b'{"a": NaN}', b'{"a":"\\ud800"}', b'{"a":1' + b"0" * 5000 + b"}", b"\xff"])
def test_what_is_no_json_is_a_bad_request(honest: Running, raw: bytes) -> None:
    assert refusal(honest, raw)[0] == 400


def test_an_address_that_is_not_there_says_so(honest: Running) -> None:
    assert refusal(honest, {}, "/embeddings") == (404, "unknown_url")


# -- the bill -------------------------------------------------------------------------------------------------------------


def test_the_bill_adds_up_under_concurrency() -> None:
    settings = Settings(price_in=Decimal("0.15"), price_out=Decimal("0.075"), latency_ms=5)
    with fake_endpoint(settings) as server:
        bodies = [chat(seed=number % 60) for number in range(120)]
        with ThreadPoolExecutor(16) as pool:
            usages = [json.loads(read)["usage"] for _, _, read in pool.map(lambda body: post(server, body), bodies)]
        bill = server.bill
    prompt, completion = (sum(usage[name] for usage in usages) for name in ("prompt_tokens", "completion_tokens"))
    assert (bill.prompt_tokens, bill.completion_tokens) == (prompt, completion)
    assert bill.exact_micro_dollars == prompt * Decimal("0.15") + completion * Decimal("0.075")
    assert abs(bill.micro_dollars - bill.exact_micro_dollars) <= Decimal("0.5")
    assert (bill.received, bill.done, bill.in_flight, bill.statuses) == (120, 120, 0, {"200": 120})
    assert 1 < bill.most_in_flight <= 16
    assert bill.bodies == {sha256_hex(canonical_json(body)): {"received": 2, "done": 2} for body in bodies}


def test_the_bill_can_be_read_over_http_and_is_the_same() -> None:
    with fake_endpoint() as server:
        answer(server, chat())
        with urllib.request.urlopen(server.base_url.removesuffix("/v1") + "/_stillroom/bill") as read:
            assert account.Bill.from_json(json.load(read)) == server.bill
        with urllib.request.urlopen(server.base_url.removesuffix("/v1") + "/_stillroom/bill?bodies=no") as read:
            assert json.load(read)["bodies"] == {}


def test_what_a_client_gave_up_on_is_billed() -> None:
    with fake_endpoint(Settings(latency_ms=300)) as server:
        host = server.base_url.removeprefix("http://").removesuffix("/v1")
        connection = http.client.HTTPConnection(host, timeout=0.05)
        connection.request("POST", "/v1/chat/completions", json.dumps(chat()))
        with pytest.raises(TimeoutError):
            connection.getresponse()
        connection.close()
        wait_until(lambda: server.bill.done == 1)
        assert server.bill.micro_dollars > 0


def test_an_idempotency_key_is_a_part_of_a_body_and_may_be_honoured() -> None:
    for honoured, done in ((False, 4), (True, 3)):
        with fake_endpoint(Settings(idempotency=honoured)) as server:
            got = [
                post(server, chat(), **headers)[2] for headers in ({}, {"Idempotency-Key": "a"}, {"Idempotency-Key": "a"}, {"Idempotency-Key": "b"})
            ]
            assert len({json.loads(read)["choices"][0]["message"]["content"] for read in got}) == 1
            key = sha256_hex(canonical_json(chat()))
            assert server.bill.done == done
            assert server.bill.bodies[f"{key}:a"] == {"received": 2, "done": 1 if honoured else 2}


def test_requests_are_remembered_without_their_key() -> None:
    for process in (False, True):
        with fake_endpoint(Settings(remember_requests=2), process=process) as server:
            for seed in range(3):
                post(server, chat(seed=seed), Authorization="Bearer sk-secret")
        kept = server.requests
        assert server.bill.done == 3
        assert [json.loads(received.body)["seed"] for received in kept] == [1, 2]
        assert [(received.number, received.status, received.done) for received in kept] == [(1, 200, True), (2, 200, True)]
        assert "sk-secret" not in repr(kept)


def wait_until(true: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# -- limits ---------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def admitted(limits: account.Limits, tokens: int = 0) -> int:
    """How many are let in at once."""
    for count in range(1000):
        try:
            limits.admit(tokens)
        except Refused:
            return count
    raise AssertionError("no limit")


def test_limits_move_along_their_schedule() -> None:
    clock = Clock()
    schedule = (Limit(requests_per_minute=600), Limit(after_seconds=10, requests_per_minute=60), Limit(after_seconds=20, requests_per_minute=1200))
    limits = account.Limits(Settings(limits=schedule), clock)
    counts = []
    for second in range(23):
        clock.now = 1000 + second
        counts.append(admitted(limits))
    assert counts == [10] * 10 + [1] * 11 + [20] * 2
    assert limits.requests.allowed == pytest.approx(10 + 100 + 10 + 40)


def test_tokens_are_limited_too_and_a_large_request_is_let_in_when_the_bucket_is_full() -> None:
    clock = Clock()
    limits = account.Limits(Settings(limits=(Limit(tokens_per_minute=6000),)), clock)
    assert admitted(limits, 30) == 3
    clock.now += 1
    limits.admit(250)  # the bucket holds 100
    with pytest.raises(Refused) as caught:
        limits.admit(1)
    assert caught.value.headers["retry-after-ms"] == "1510"
    assert caught.value.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 1.52
    limits.admit(1)


def test_a_refused_request_takes_nothing_and_headers_say_what_is_left() -> None:
    with fake_endpoint(Settings(limits=(Limit(requests_per_minute=2, tokens_per_minute=1e6),), burst_seconds=60)) as server:
        seen = [post(server, chat()) for _ in range(4)]
        bill = server.bill
    assert [status for status, _, _ in seen] == [200, 200, 429, 429]
    assert [headers["x-ratelimit-remaining-requests"] for _, headers, _ in seen] == ["1", "0", "0", "0"]
    assert seen[0][1]["x-ratelimit-limit-requests"] == "2"
    assert int(seen[0][1]["x-ratelimit-remaining-tokens"]) < int(seen[0][1]["x-ratelimit-limit-tokens"]) == 1_000_000
    assert seen[0][1]["x-ratelimit-reset-requests"].endswith("s")
    assert 25 < int(seen[3][1]["retry-after"]) <= 30
    assert 25_000 < int(seen[3][1]["retry-after-ms"]) <= 30_000
    assert json.loads(seen[3][2])["error"] == {
        "message": json.loads(seen[3][2])["error"]["message"], "type": "requests", "param": None, "code": "rate_limit_exceeded",
    }  # fmt: skip
    assert (bill.throttled, bill.done, bill.received) == (2, 2, 4)


@pytest.mark.parametrize("style", ["date", "none"])
def test_when_to_come_again_is_said_in_several_ways(style: Any) -> None:
    with fake_endpoint(Settings(limits=(Limit(requests_per_minute=2),), retry_after=style, rate_headers=False)) as server:
        post(server, chat())
        before = time.time()
        _, headers, _ = post(server, chat())
    assert not [name for name in headers if name.startswith("x-ratelimit")]
    assert "retry-after-ms" not in headers
    if style == "date":
        assert 28 < parsedate_to_datetime(headers["retry-after"]).timestamp() - before < 33
    else:
        assert "retry-after" not in headers


def test_requested_tokens_can_be_charged() -> None:
    settings = Settings(limits=(Limit(tokens_per_minute=60_000),), tokens_charged="requested")
    with fake_endpoint(settings) as server:
        _, headers, read = post(server, chat(max_tokens=400, n=2))
        left = 1000 - json.loads(read)["usage"]["prompt_tokens"] - 800
        assert left <= int(headers["x-ratelimit-remaining-tokens"]) <= left + 100


def test_more_at_a_time_than_allowed_are_throttled() -> None:
    with fake_endpoint(Settings(concurrency=2, latency_ms=400)) as server, ThreadPoolExecutor(5) as pool:
        statuses = list(pool.map(lambda seed: post(server, chat(seed=seed))[0], range(5)))
    assert sorted(statuses) == [200, 200, 429, 429, 429]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0ms"), (0.0165, "17ms"), (1.5, "1.5s"), (360, "6m0s"), (3723, "1h2m3s"), (59.9999, "1m0s")])
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert account.duration(seconds) == text


# -- faults ---------------------------------------------------------------------------------------------------------------

BROKEN = (http.client.HTTPException, ConnectionError, urllib.error.URLError, TimeoutError)


@pytest.mark.parametrize("fault", get_args(Fault))
def test_each_fault_breaks_the_answer_and_is_billed_where_the_work_was_done(fault: Any) -> None:
    settings = Settings(faults_in_order=(fault,), hang_seconds=0.3, slow_seconds=0.2, fragment_share=0.5)
    with fake_endpoint(settings) as server:
        start = time.monotonic()
        got: tuple[int, dict[str, str], bytes] | Exception
        try:
            got = post(server, chat())
        except BROKEN as error:
            got = error
        took = time.monotonic() - start
        right = post(server, chat())[2]
        bill = server.bill
    whole = right.replace(b'-1",', b'-0",', 1)  # the id counts the attempts
    assert bill.faults == {fault: 1}
    assert bill.done == 1 + (fault in WORK_DONE)
    assert server.requests[0].done == (fault in WORK_DONE)
    match fault:
        case "http-500" | "http-502" | "http-503" | "http-529" | "http-502-after-work":
            assert got[0] == int(fault[5:8])
            assert json.loads(got[2])["error"]["type"] == "server_error"
        case "html-error-page":
            assert (got[0], got[1]["content-type"]) == (502, "text/html")
        case "error-in-200":
            assert (got[0], list(json.loads(got[2]))) == (200, ["error"])
        case "drop-before-work" | "drop-after-work":
            assert isinstance(got, http.client.RemoteDisconnected | urllib.error.URLError)
        case "drop-in-body":
            assert isinstance(got, http.client.IncompleteRead)
            assert whole.startswith(got.partial)
        case "hang-after-work" | "slow-body":
            assert took >= 0.19  # the loop's timers may be early by its resolution
            assert got[2] == whole
        case "cut-utf8":
            assert whole.startswith(got[2])
            with pytest.raises(UnicodeDecodeError):
                got[2].decode()
        case "cut-json" | "empty-body":
            assert got[0] == 200
            assert whole.startswith(got[2])
            with pytest.raises(ValueError):
                json.loads(got[2])
        case "wrong-content-type":
            assert got[1]["content-type"].startswith("text/plain")
            assert got[2] == whole


def outcomes(settings: Settings, bodies: list[dict[str, Any]]) -> list[Fault | None]:
    with fake_endpoint(settings) as server:
        for body in bodies:
            with suppress(*BROKEN):
                post(server, body)
        return [received.fault for received in sorted(server.requests, key=lambda received: (received.key, received.attempt))]


def test_faults_depend_on_the_body_and_the_attempt_and_on_no_order() -> None:
    settings = Settings(faults={"http-500": 0.3, "empty-body": 0.2, "drop-before-work": 0.1})
    bodies = [chat(seed=number % 40) for number in range(80)]
    first = outcomes(settings, bodies)
    assert first == outcomes(settings, [*reversed(bodies)])
    assert first != outcomes(Settings(seed=1, faults=settings.faults), bodies)
    shares = {fault: first.count(fault) / len(first) for fault in settings.faults}
    assert all(abs(shares[fault] - expected) < 0.2 for fault, expected in settings.faults.items()), shares
    assert first[0::2] != first[1::2]


def test_faults_can_end_and_can_go_by_the_order_of_arrival() -> None:
    bodies = [chat(seed=number % 10) for number in range(30)]
    assert outcomes(Settings(faults={"http-500": 1}, most_faults=2), bodies) == ["http-500", "http-500", None] * 10
    with fake_endpoint(Settings(faults={"http-500": 0.5}, faults_by="number")) as server:
        for seed in range(30):
            post(server, chat(seed=seed))
        by_number = [received.fault for received in server.requests]
    with fake_endpoint(Settings(faults={"http-500": 0.5}, faults_by="number")) as server:
        for _ in range(30):
            post(server, chat())
        assert [received.fault for received in server.requests] == by_number
    assert None in by_number


def test_a_server_that_hangs_can_be_stopped() -> None:
    start = time.monotonic()
    with fake_endpoint(Settings(faults={"hang-after-work": 1})) as server:
        connection = http.client.HTTPConnection(server.base_url.removeprefix("http://").removesuffix("/v1"), timeout=0.2)
        connection.request("POST", "/v1/chat/completions", json.dumps(chat()))
        with pytest.raises(TimeoutError):
            connection.getresponse()
        connection.close()
        assert server.bill.done == 1
    assert time.monotonic() - start < 8


# -- lies -----------------------------------------------------------------------------------------------------------------

ASKED = chat(logprobs=True, top_logprobs=10, n=2, temperature=0.7, seed=3)


def told(lie: str, body: dict[str, Any] = ASKED, route: str = "/chat/completions", **settings: Any) -> dict[str, Any]:
    with fake_endpoint(Settings(lies={lie}, **settings)) as server:
        return answer(server, body, route)


def places_of(got: dict[str, Any]) -> list[Any]:
    return [place for choice in got["choices"] for place in choice["logprobs"]["content"]]


def test_chosen_wrong() -> None:
    got, right = told("chosen-wrong"), told("usage-missing")
    assert [choice["message"] for choice in got["choices"]] == [choice["message"] for choice in right["choices"]]
    for place, true in zip(places_of(got), places_of(right), strict=True):
        assert place["token"] == place["top_logprobs"][0]["token"]
        assert place["bytes"] != true["bytes"]
        tops = [other["logprob"] for other in place["top_logprobs"]]
        assert tops != sorted(tops, reverse=True)


def test_logprobs_missing_short_and_unsupported() -> None:
    assert [choice["logprobs"] for choice in told("logprobs-missing")["choices"]] == [None, None]
    short = told("logprobs-short", ASKED | {"n": 6}, fragment_share=0.3)
    assert short["usage"]["completion_tokens"] > len(places_of(short))
    with fake_endpoint(Settings(lies={"logprobs-unsupported"})) as server:
        assert refusal(server, ASKED) == (400, "unsupported_parameter")
        assert post(server, chat())[0] == 200


def test_tokens_share_text_and_bytes_missing() -> None:
    for place in places_of(told("tokens-share-text", token_ids=True)):
        texts = [(other["token"], tuple(other["bytes"] or ())) for other in place["top_logprobs"]]
        assert len(set(texts)) < len(texts)
        assert len({other["id"] for other in place["top_logprobs"]}) == len(texts)
        assert math.fsum(math.exp(other["logprob"]) for other in place["top_logprobs"]) <= 1
    got = places_of(told("bytes-missing"))
    assert {place["bytes"] for place in got} == {other["bytes"] for place in got for other in place["top_logprobs"]} == {None}


def test_mass_above_one_and_after_temperature() -> None:
    assert any(math.fsum(math.exp(other["logprob"]) for other in place["top_logprobs"]) > 1.1 for place in places_of(told("mass-above-one")))
    hot, cold = (places_of(told("logprobs-after-temperature", ASKED | {"temperature": heat}))[0] for heat in (1.5, 0))
    true = places_of(told("usage-missing"))[0]
    ranked = [{other["token"]: other["logprob"] for other in place["top_logprobs"]} for place in (hot, true)]
    assert list(ranked[0]) == list(ranked[1])
    first, second = list(ranked[0])[:2]
    assert ranked[0][first] - ranked[0][second] == pytest.approx((ranked[1][first] - ranked[1][second]) / 1.5, abs=1e-6)
    assert [other["logprob"] for other in cold["top_logprobs"][:2]] == [0.0, -9999.0]


def test_fewer_alternatives_than_asked() -> None:
    assert {len(place["top_logprobs"]) for place in places_of(told("top-logprobs-fewer"))} == {5}


def test_n_seed_stop_form_and_limit_ignored() -> None:
    assert len(told("n-ignored")["choices"]) == 1
    with fake_endpoint(Settings(lies={"seed-ignored"})) as server:
        assert answer(server, ASKED)["choices"] != answer(server, ASKED)["choices"]
    whole = told("usage-missing", chat(seed=3))["choices"][0]["message"]["content"]
    assert told("stop-ignored", chat(seed=3, stop=[" "]))["choices"][0]["message"]["content"].count(" ") > 1 < whole.count(" ")
    with pytest.raises(ValueError):
        json.loads(told("response-format-ignored", chat(response_format={"type": "json_object"}))["choices"][0]["message"]["content"])
    assert told("max-tokens-ignored", chat(max_tokens=1, n=10))["usage"]["completion_tokens"] > 10


def test_usage_missing_and_wrong() -> None:
    assert "usage" not in told("usage-missing")
    for lie, factor in (("usage-wrong", 2.0), ("usage-of-one-choice", None)):
        with fake_endpoint(Settings(lies={lie})) as server:
            got = answer(server, ASKED)
            expected = factor * len(places_of(got)) if factor else len(got["choices"][0]["logprobs"]["content"])
            assert got["usage"]["completion_tokens"] == expected
            assert server.bill.completion_tokens == len(places_of(got))


def test_finish_reason_filter_and_error_text() -> None:
    assert {choice["finish_reason"] for choice in told("finish-reason-always-stop", chat(max_tokens=2, n=5))["choices"]} == {"stop"}
    filtered = told("content-filtered")["choices"][0]
    assert (filtered["message"]["content"], filtered["finish_reason"]) == ("", "content_filter")
    assert told("error-as-content")["choices"][0]["message"]["content"].startswith("ERROR")


def test_a_long_prompt_is_cut_in_silence() -> None:
    got = told("context-cut", chat(messages=[{"role": "user", "content": "x" * 5000}]))
    assert got["usage"]["prompt_tokens"] == 2048


def test_two_models_behind_one_name() -> None:
    with fake_endpoint(Settings(lies={"models-mixed"})) as server:
        first, second, third = (answer(server, ASKED) for _ in range(3))
    assert first["model"] != second["model"]
    assert first["system_fingerprint"] != second["system_fingerprint"]
    assert first["choices"] != second["choices"]
    assert (first["model"], first["choices"]) == (third["model"], third["choices"])


def test_the_completions_route_as_llama_cpp_has_it() -> None:
    body = {"model": MODEL, "prompt": "It was", "max_tokens": 8, "logprobs": 3, "echo": True}
    got = told("completions-logprobs-chat-shaped", body, "/completions")["choices"][0]
    assert list(got["logprobs"]) == ["content"]
    assert not told("echo-ignored", body, "/completions")["choices"][0]["text"].startswith("It was")


def test_some_bodies_only_can_be_lied_to() -> None:
    with fake_endpoint(Settings(lies={"logprobs-missing"}, lies_share=0.5)) as server:
        missing = [answer(server, ASKED | {"seed": seed})["choices"][0]["logprobs"] is None for seed in range(40)]
    assert 8 <= sum(missing) <= 32


def test_every_lie_has_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert not [lie for lie in get_args(Lie) if f'"{lie}"' not in source]


# -- settings, in a loop, on the command line -----------------------------------------------------------------------------


def test_settings_are_read_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("seed: 4\nprice_in: '0.25'\nlimits:\n  - {requests_per_minute: 60}\nfaults: {http-500: 0.1}\nlies: [n-ignored]\n")
    got = read_settings(file)
    assert (got.seed, got.price_in, got.limits[0].requests_per_minute, got.lies) == (4, Decimal("0.25"), 60, {"n-ignored"})
    assert make_settings(json.loads(got.model_dump_json())) == got


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("latency: 4", "latency_ms"), ("faults: {http-50: 1}", "http-50"), ("lies: [n-ignore]", "n-ignored"), ("faults: {http-500: 0.7, http-502: 0.7}", "1.4"),
        ("limits: [{}, {}]", "increase"), ("[]", "list"), ("a: [", "YAML"), ("price_in: .nan", "price_in"), ("price_in: -1", "price_in"),
        ("limits: [{tokens: 1}]", "tokens"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong_are_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(StillroomError, match=words) as caught:
        read_settings(file)
    assert caught.value.code == "endpoint-settings"
    assert str(file) in str(caught.value)


def test_settings_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StillroomError, match="No such file"):
        read_settings(tmp_path / "none.yaml")


async def status_of(base_url: str, body: bytes) -> int:
    async with aiohttp.ClientSession() as session, session.post(f"{base_url}/chat/completions", data=body) as got:
        await got.read()
        return got.status


def test_it_runs_inside_a_loop() -> None:
    async def main() -> None:
        async with serve(Settings(latency_ms=20)) as (endpoint, base_url):
            statuses = await asyncio.gather(*(status_of(base_url, json.dumps(chat(seed=seed)).encode()) for seed in range(30)))
            assert statuses == [200] * 30
            assert endpoint.bill.done == 30

    asyncio.run(main())


def run_command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stillroom.testing.fake_endpoint", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_starts_prints_and_stops_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "it.yaml").write_text("answer_tokens: 5\nfixed_length: true\nfaults_in_order: [none, hang-after-work]\n")
    with run_command("--config", str(tmp_path / "it.yaml"), "--price-out", "2.5", "--latency-ms", "1") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        ready = json.loads(process.stdout.readline())
        running = type("Running", (), {"base_url": ready["base_url"]})()
        assert ready["models"] == [MODEL]
        assert answer(running, chat())["usage"]["completion_tokens"] == 5
        host = ready["base_url"].removeprefix("http://").removesuffix("/v1")
        connection = http.client.HTTPConnection(host, timeout=5)
        connection.request("POST", "/v1/chat/completions", json.dumps(chat()))
        time.sleep(0.3)
        process.send_signal(number)
        assert process.wait(20) == 0
        assert process.stdout.read() == ""
        words = process.stderr.read()
        connection.close()
    assert words.startswith("done 2 of 2 requests")
    assert "Traceback" not in words


@pytest.mark.parametrize("arguments", [("--config", "none.yaml"), ("--price-in", "x"), ("--latency-ms", "-1")])
def test_the_command_refuses_what_it_does_not_know(arguments: tuple[str, ...]) -> None:
    with run_command(*arguments) as process:
        out, words = process.communicate(timeout=30)
    assert process.returncode == 2
    assert out == ""
    assert "endpoint-settings" in words
    assert "Traceback" not in words


def test_a_port_that_is_taken_says_so() -> None:
    with fake_endpoint() as server, run_command("--port", server.base_url.removesuffix("/v1").rpartition(":")[2]) as process:
        assert process.wait(30) == 2
        assert process.stderr is not None
        assert "address already in use" in process.stderr.read()
