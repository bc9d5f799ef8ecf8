"""The probe's verdicts on an honest endpoint and on each lie of the fake one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from stillroom.collect.probe import MOST_CALLS, ProbeReport, probe, signal
from stillroom.collect.wire import Call, Endpoint, Failure, Response
from stillroom.core.errors import CollectError
from stillroom.testing.fake_endpoint import Endpoint as Fake
from stillroom.testing.fake_endpoint import serve
from stillroom.testing.settings import Settings, make_settings


async def probed(settings: Settings, **more: Any) -> tuple[ProbeReport, list[Call], Fake]:
    calls: list[Call] = []
    async with serve(settings) as (fake, base_url), aiohttp.ClientSession() as session:

        async def buy(call: Call) -> Response | Failure:
            calls.append(call)
            async with session.post(call.endpoint.url, data=call.content, headers={"content-type": "application/json"}) as got:
                return Response(status=got.status, headers={k.lower(): v for k, v in got.headers.items()}, body=await got.read(), seconds=0.0)

        report = await probe(Endpoint.parse(base_url, "fake-teacher", **{k: more.pop(k) for k in ("route",) if k in more}), buy, **more)
        return report, calls, fake


def run(lie: str | None = None, *, overflow_tokens: int | None = 600, **more: Any) -> ProbeReport:
    settings = {"context_tokens": 512, **{k: v for k, v in more.items() if k != "route"}} | ({"lies": [lie]} if lie else {})
    route = {"route": more["route"]} if "route" in more else {}
    report, calls, _ = asyncio.run(probed(make_settings(settings), overflow_tokens=overflow_tokens, **route))
    assert report.calls == len(calls) <= MOST_CALLS
    assert len({call.key for call in calls}) == len(calls)  # every call is another purchase
    return report


HONEST = {
    "chat": "proved",
    "completions": "proved",
    "answers": "proved",
    "logprobs": "proved",
    "top_logprobs": "proved",
    "entries": "proved",
    "temperature": "proved",
    "token_ids": "not-supported",
    "usage": "proved",
    "n": "proved",
    "seed": "proved",
    "stop": "proved",
    "max_tokens": "proved",
    "finish_reason": "proved",
    "response_format": "proved",
    "echo": "proved",
    "prompt_logprobs": "refuted",
    "context": "proved",
    "one_model": "proved",
}


def verdicts(report: ProbeReport) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in report.findings}


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_an_honest_endpoint(route: str) -> None:
    report = run(route=route)
    # The fake's completions route has no response_format, and passes over it.
    assert verdicts(report) == HONEST | ({"response_format": "refuted"} if route == "completions" else {})
    assert report["top_logprobs"].value == 20
    assert report["temperature"].value == "before"
    assert report["context"].value == "error"
    assert report.calls <= 20
    chosen = signal(report)
    assert (chosen.kind, chosen.k, chosen.reported, chosen.usage_trusted) == ("top_k", 20, "before", True)


# What differs from the honest verdicts, and what can be collected.
LIES: dict[str, tuple[dict[str, str], str]] = {
    "chosen-wrong": ({"entries": "refuted"}, "text"),
    "logprobs-missing": ({"logprobs": "refuted", "top_logprobs": "not-tested", "entries": "not-tested", "temperature": "not-tested"}, "text"),
    "logprobs-short": ({"entries": "refuted"}, "any"),
    "tokens-share-text": ({"entries": "refuted"}, "text"),
    "logprobs-after-temperature": ({}, "top_k"),
    "mass-above-one": ({"entries": "refuted"}, "text"),
    "logprobs-unsupported": (
        {"logprobs": "not-supported", "top_logprobs": "not-supported", "entries": "not-tested", "temperature": "not-tested"},
        "text",
    ),
    "top-logprobs-fewer": ({"top_logprobs": "refuted"}, "top_k"),
    "bytes-missing": ({"entries": "refuted"}, "any"),
    "completions-logprobs-chat-shaped": ({}, "top_k"),
    "echo-ignored": ({"echo": "refuted"}, "top_k"),
    "n-ignored": ({"n": "refuted"}, "top_k"),
    "seed-ignored": ({"seed": "refuted"}, "top_k"),
    "response-format-ignored": ({"response_format": "refuted"}, "top_k"),
    "stop-ignored": ({"stop": "refuted"}, "top_k"),
    "max-tokens-ignored": ({"max_tokens": "refuted", "finish_reason": "not-tested"}, "top_k"),
    "usage-missing": ({"usage": "refuted"}, "top_k"),
    "usage-wrong": ({"usage": "refuted"}, "top_k"),
    "finish-reason-always-stop": ({"finish_reason": "refuted"}, "top_k"),
    "context-cut": ({"context": "refuted"}, "top_k"),
    "models-mixed": ({"one_model": "refuted"}, "any"),
}


@pytest.mark.parametrize("lie", LIES)
def test_each_lie_is_found_and_nothing_else_is_accused(lie: str) -> None:
    differs, kind = LIES[lie]
    report = run(lie)
    found = verdicts(report)
    # Seeds, stops and limits cannot be judged where every other answer is another model's.
    free = {"seed", "stop", "max_tokens", "entries", "n", "temperature"} if lie == "models-mixed" else set()
    expected = HONEST | differs
    assert {name: found[name] for name in expected if name not in free} == {name: expected[name] for name in expected if name not in free}, [
        finding for finding in report.findings if finding.verdict != expected[finding.name]
    ]
    chosen = signal(report)
    assert kind in ("any", chosen.kind), chosen
    assert chosen.why


def test_what_the_lies_leave() -> None:
    assert run("logprobs-after-temperature")["temperature"].value == "after"
    fewer = run("top-logprobs-fewer")
    assert (fewer["top_logprobs"].value, signal(fewer).k) == (10, 10)
    assert run("context-cut")["context"].value == "truncation"
    assert run("completions-logprobs-chat-shaped")["completions"].value == "chat"
    assert not signal(run("usage-wrong")).usage_trusted
    mixed = run("models-mixed")
    assert len(mixed.models) == 2
    assert len(mixed.fingerprints) == 2


def test_no_answer_at_all() -> None:
    report = run("content-filtered")
    assert report["chat"].verdict == "refuted"
    assert "content-filtered" in report["chat"].evidence
    assert signal(report).kind == "text"
    error = run("error-as-content")
    assert error["answers"].verdict == "refuted"
    assert error["logprobs"].verdict == "refuted"
    assert error["seed"].verdict == "refuted"


@pytest.mark.parametrize(("limit", "found"), [(0, None), (4, None), (5, 5), (8, 8), (11, 11), (20, 20), (50, 50), (400, 128)])
def test_the_limit_of_alternatives_is_found(limit: int, found: int | None) -> None:
    report = run(top_logprobs_limit=limit, token_ids=True)
    assert report["top_logprobs"].value == found
    if found is None:
        assert report["logprobs"].verdict == "not-supported"
    else:
        assert report["token_ids"].verdict == "proved"


def test_a_probe_is_stopped_by_what_every_call_would_meet() -> None:
    report = run(quota_requests=6)
    assert report["chat"].verdict == "proved"
    assert report["seed"].verdict == "not-tested"
    assert "quota-exhausted" in report["seed"].evidence
    assert report.calls == 8
    locked = run(api_keys=["x"])
    assert locked.calls == 1
    assert "bad-key" in locked["chat"].evidence


def test_faults_leave_findings_untested_and_accuse_nobody() -> None:
    report = run(faults={"http-500": 0.2, "cut-json": 0.1, "empty-body": 0.1}, seed=3)
    for finding in report.findings:
        assert finding.verdict != "refuted" or finding.name == "prompt_logprobs", finding


def test_a_report_is_read_back_and_another_version_is_refused() -> None:
    report = run()
    assert ProbeReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    good = report.to_json()
    for bad in (good | {"version": 2}, good | {"findings": good["findings"][1:]}, [], None, good | {"findings": [{}]}, good | {"calls": "x"}):
        with pytest.raises(CollectError) as error:
            ProbeReport.from_json(bad)
        assert error.value.code == "probe-invalid"
