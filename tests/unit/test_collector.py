"""The collecting loop: against the fake endpoint with its faults, and against transports that fail as they are told."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy
import pytest

from stillroom.collect.collector import Collector, Parsed, Policy, Progress, Reader
from stillroom.collect.logprobs import TokenIndex
from stillroom.collect.packing import pack, unpack
from stillroom.collect.rate import RateController
from stillroom.collect.spend import Caps, Price
from stillroom.collect.store import Counts, RequestStore, Row
from stillroom.collect.transport import open_transport
from stillroom.collect.wire import Call, Endpoint, NotSent, OutcomeUnknown, Response
from stillroom.core.errors import CollectError, Interrupted, SpendCapReached, StoreError
from stillroom.core.interrupts import StopRequest
from stillroom.targets.vocabulary import Vocabulary
from stillroom.testing import language
from stillroom.testing.fake_endpoint import fake_endpoint
from stillroom.testing.settings import Limit, Settings

QUICK = Policy(first_wait_seconds=0.01, longest_wait_seconds=0.05, timeout_seconds=5, decoders=0, drain_seconds=5, attempts=12)
# Picos per token, of the fake endpoint's 1 and 4 dollars per million.
PRICE = Price(as_of=date(2026, 11, 1), currency="USD", input=10**6, cached_input=10**6, output=4 * 10**6, reasoning=4 * 10**6, per_request=0)


def endpoint(base_url: str = "http://127.0.0.1:9/v1", **more: Any) -> Endpoint:
    return Endpoint(base_url=base_url, model="fake-teacher", **more)


def row(where: Endpoint, number: int, sample: int = 0, **body: Any) -> Row:
    asked = {"model": where.model, "max_tokens": 16, "messages": [{"role": "user", "content": f"question {number}"}]} | body
    return Row(row=f"{number}/{sample}", prompt=str(number), call=Call(endpoint=where, body=asked, sample=sample))


def opened(path: Path, where: Endpoint, rows: int, *, caps: Caps | None = None, **body: Any) -> RequestStore:
    store = RequestStore.open(path / "requests.sqlite")
    store.permit(where, PRICE, caps or Caps.of(money=1000))
    store.request(row(where, number, **body) for number in range(rows))
    return store


def collect(store: RequestStore, where: Endpoint, transport: Any = None, policy: Policy = QUICK, **options: Any) -> Counts:
    async def main() -> Counts:
        used = transport or open_transport()
        try:
            return await Collector(used, store, where, policy=policy, jitter=random.Random(0), **options).collect()
        finally:
            await used.close()

    return asyncio.run(main())


def answer(body: Mapping[str, Any], text: str = "fine", finish: str = "stop", usage: bool = True) -> bytes:
    counted = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}} if usage else {}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"id": "x", "model": "fake-teacher", "choices": [choice], **counted}).encode()


def refusal(code: str) -> bytes:
    return json.dumps({"error": {"message": "no", "code": code, "type": code}}).encode()


class Scripted:
    """A transport that does, with the n-th sending of a body, what `does` says: a response, or an exception."""

    def __init__(self, does: Callable[[str, int], Response | Exception]) -> None:
        self.does, self.sent = does, Counter[str]()
        self.in_flight = self.most = 0
        self.headers: list[Mapping[str, str]] = []

    async def send(self, url: str, headers: Mapping[str, str], body: bytes, timeout_seconds: float) -> Response:
        asked = json.loads(body)["messages"][0]["content"]
        number = self.sent[asked]
        self.sent[asked] += 1
        self.headers.append(headers)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            await asyncio.sleep(0.002)
            done = self.does(asked, number)
        finally:
            self.in_flight -= 1
        if isinstance(done, Exception):
            raise done
        return done

    async def close(self) -> None:
        pass


def ok(text: str = "fine", finish: str = "stop", usage: bool = True) -> Response:
    return Response(status=200, headers={}, body=answer({}, text, finish, usage), seconds=0.0)


def status(number: int, code: str, **headers: str) -> Response:
    return Response(status=number, headers={name.replace("_", "-"): value for name, value in headers.items()}, body=refusal(code), seconds=0.0)


@pytest.mark.parametrize("rows", [0, 1, 50, 1200])
def test_all_that_is_pending_is_bought_once_and_costs_what_the_server_bills(tmp_path: Path, rows: int) -> None:
    with fake_endpoint(Settings(answer_tokens=4)) as server:
        where = endpoint(server.base_url)
        with opened(tmp_path, where, rows) as store:
            counts = collect(store, where)
            assert counts.answered == counts.requested == rows
            bill, spend = server.bill, store.spend()
            assert bill.received == bill.done == spend.attempts == rows
            assert spend.settled.money == int(bill.exact_micro_dollars * 10**6)
            assert spend.reserved.money == 0
            assert collect(store, where) == counts
            assert server.bill.received == rows


def test_log_probabilities_are_verified_and_packed_in_the_loop_and_in_a_process(tmp_path: Path) -> None:
    with fake_endpoint(Settings(answer_tokens=8)) as server:
        where = endpoint(server.base_url)
        for name, policy in (("loop", QUICK), ("process", Policy(decoders=1, inline_bytes=100))):
            (tmp_path / name).mkdir()
            with opened(tmp_path / name, where, 5, logprobs=True, top_logprobs=20) as store:
                assert collect(store, where, policy=policy).answered == 5
                found = store.unshelved(10)
                assert len(found) == 5
                for key, packed in found:
                    verified = unpack(packed)
                    usage = store.answer(key).usage  # type: ignore[union-attr]
                    assert usage is not None
                    assert abs(len(verified) - usage.completion_tokens) <= 1
                    assert pack(verified) == packed


def refused(*_: object) -> Any:
    raise AssertionError("read in this process")


def test_a_process_that_reads_knows_the_tokenizer_and_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = Vocabulary(tokens=(*language.TOKENS, b""), special={language.END_TEXT: language.END}, end_ids=(language.END,), rows=language.SIZE)
    reader, found = Reader(index=TokenIndex(vocabulary)), {}
    with fake_endpoint(Settings(answer_tokens=8)) as server:
        where = endpoint(server.base_url)
        for name, policy in (("loop", QUICK), ("process", Policy(decoders=1, inline_bytes=0))):
            if name == "process":
                monkeypatch.setattr("stillroom.collect.collector.read_response", refused)
            (tmp_path / name).mkdir()
            with opened(tmp_path / name, where, 20, logprobs=True, top_logprobs=20, seed=1) as store:
                assert collect(store, where, policy=policy, parse=reader).answered == 20
                answers = {row.row: (row.answer and asdict(replace(row.answer, response_id=None)), row.demoted) for row in store.rows()}
                found[name] = dict(store.unshelved(20)), answers
    (packed, rows), (packed_there, rows_there) = found["loop"], found["process"]
    assert packed == packed_there
    assert rows == rows_there
    assert len(packed) > 10
    assert all((unpack(one).ids_T >= 0).all() for one in packed.values())


def test_what_cannot_go_to_a_process_or_outlives_it_is_read_here(tmp_path: Path) -> None:
    here = Policy(decoders=1, inline_bytes=0)
    read: list[int] = []

    def parse(call: Call, response: Response) -> Parsed:  # a function in a function cannot be copied
        read.append(os.getpid())
        return Reader()(call, response)

    where = endpoint()
    with opened(tmp_path, where, 9) as store:
        assert collect(store, where, Scripted(lambda asked, number: ok()), policy=here, parse=parse).answered == 9
    assert read == [os.getpid()] * 9

    def killing(asked: str, number: int) -> Response:
        for process in multiprocessing.active_children():
            process.kill()
        return ok()

    (tmp_path / "killed").mkdir()
    with opened(tmp_path / "killed", where, 30) as store:
        assert collect(store, where, Scripted(killing), policy=here).answered == 30


@pytest.mark.parametrize("lie", ["logprobs-missing", "mass-above-one"])
def test_log_probabilities_that_are_not_believed_leave_text_and_the_raw_body(tmp_path: Path, lie: Any) -> None:
    with fake_endpoint(Settings(answer_tokens=8, lies=frozenset({lie}))) as server:
        where = endpoint(server.base_url)
        with opened(tmp_path, where, 3, logprobs=True, top_logprobs=5) as store:
            assert collect(store, where).answered == 3
            assert all(found.demoted and found.answer and found.answer.text for found in store.rows())
            assert all(store.raw(found.key) for found in store.rows())
            assert store.unshelved(9) == []


FAULTS = {"http-500": 0.08, "http-503": 0.04, "drop-before-work": 0.05, "drop-after-work": 0.05, "drop-in-body": 0.05, "error-in-200": 0.04, "cut-json": 0.04, "http-502-after-work": 0.05, "empty-body": 0.02}  # fmt: skip


def test_under_faults_nothing_is_lost_and_the_account_brackets_the_bill(tmp_path: Path) -> None:
    with fake_endpoint(Settings(answer_tokens=4, faults=FAULTS, most_faults=5)) as server:
        where = endpoint(server.base_url)
        with opened(tmp_path, where, 300) as store:
            counts = collect(store, where)
            counts.require_conserved()
            assert counts.answered == 300
            bill, spend = server.bill, store.spend()
            billed = int(bill.exact_micro_dollars * 10**6)
            assert spend.settled.money < billed <= spend.settled.money + spend.reserved.money
            assert spend.unknown > 0


def test_a_rate_limited_endpoint_is_collected_whole_with_few_refusals(tmp_path: Path) -> None:
    limits = (Limit(requests_per_minute=6000), Limit(after_seconds=1, requests_per_minute=3000))
    with fake_endpoint(Settings(answer_tokens=4, limits=limits, latency_ms=10)) as server:
        where = endpoint(server.base_url)
        with opened(tmp_path, where, 200) as store:
            assert collect(store, where).answered == 200
            assert server.bill.throttled <= 30
            assert store.recall("rates", where) is not None


def test_samples_of_one_prompt_are_kept_when_one_of_them_fails(tmp_path: Path) -> None:
    sent = Counter[str]()

    def does(asked: str, number: int) -> Response:
        sent[asked] += 1
        return status(400, "invalid_request_error") if number == 2 else ok(f"sample {number}")

    where, transport = endpoint(), Scripted(does)
    with RequestStore.open(tmp_path / "s") as store:
        store.permit(where, PRICE, Caps.of(money=1))
        store.request(row(where, 0, sample) for sample in range(5))
        counts = collect(store, where, transport)
        assert (counts.answered, dict(counts.failed)) == (4, {"invalid-request": 1})
        assert sent["question 0"] == 5


def test_a_truncated_answer_is_an_answer_and_not_asked_for_again(tmp_path: Path) -> None:
    where, transport = endpoint(), Scripted(lambda asked, number: ok("cut", "length"))
    with opened(tmp_path, where, 3) as store:
        assert collect(store, where, transport).answered == 3
        assert set(transport.sent.values()) == {1}
        assert {found.answer.finish_reason for found in store.rows() if found.answer} == {"length"}


@pytest.mark.parametrize(
    ("failure", "reserved"), [(NotSent("no"), False), (OutcomeUnknown("no"), True), (status(500, "server_error"), True), (status(429, "rate_limit_exceeded"), False)]
)  # fmt: skip
def test_what_may_have_been_billed_stays_reserved_and_what_cannot_have_been_is_released(tmp_path: Path, failure: Any, reserved: bool) -> None:
    where, transport = endpoint(), Scripted(lambda asked, number: failure if number == 0 else ok())
    with opened(tmp_path, where, 4) as store:
        assert collect(store, where, transport).answered == 4
        assert set(transport.sent.values()) == {2}
        assert (store.spend().reserved.money > 0) == reserved


def test_a_call_that_comes_back_while_the_store_is_read_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, transport = endpoint(), Scripted(lambda asked, number: status(429, "rate_limit_exceeded", retry_after_ms="1") if number < 3 else ok())
    read = RequestStore.pending

    def slow(store: RequestStore, limit: int, after: int = 0) -> Any:
        found = read(store, limit, after)
        if not found:
            time.sleep(0.2)  # in which all that is in flight is refused
        return found

    monkeypatch.setattr(RequestStore, "pending", slow)
    with opened(tmp_path, where, 2) as store:
        assert collect(store, where, transport).answered == 2


def test_tries_are_limited_but_refusals_by_rate_are_not(tmp_path: Path) -> None:
    def does(asked: str, number: int) -> Response:
        return status(500, "server_error") if asked.endswith("0") else status(429, "rate_limit_exceeded", retry_after_ms="1") if number < 20 else ok()

    where, transport = endpoint(), Scripted(does)
    with opened(tmp_path, where, 2) as store:
        counts = collect(store, where, transport, policy=Policy(attempts=3, first_wait_seconds=0.001, decoders=0))
        assert dict(counts.failed) == {"server-error": 1}
        assert counts.answered == 1
        assert transport.sent == {"question 0": 3, "question 1": 21}


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (status(429, "insufficient_quota"), "quota-exhausted"),
        (status(401, "invalid_api_key"), "bad-key"),
        (NotSent("no connection: refused"), "not-sent"),
    ],
)
def test_where_the_endpoint_answers_nobody_the_job_stops_and_can_be_resumed(tmp_path: Path, response: Any, reason: str) -> None:
    where = endpoint()
    broken = True
    transport = Scripted(lambda asked, number: response if broken and asked != "question 0" else ok())
    with opened(tmp_path, where, 100) as store:
        with pytest.raises(CollectError) as raised:
            collect(store, where, transport, policy=Policy(attempts=3, first_wait_seconds=0.001, decoders=0))
        assert raised.value.code == "endpoint-refuses"
        assert reason in str(raised.value)
        counts = store.counts()
        counts.require_conserved()
        assert counts.in_flight == 0
        assert counts.pending == 100
        broken = False
        assert collect(store, where, transport).answered == 100


def test_a_missing_key_stops_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, transport = endpoint(key_variable="NO_SUCH_KEY"), Scripted(lambda asked, number: ok())
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with opened(tmp_path, where, 3) as store:
        with pytest.raises(CollectError, match="NO_SUCH_KEY"):
            collect(store, where, transport)
        assert not transport.sent
        assert store.spend().reserved.money == 0
        monkeypatch.setenv("NO_SUCH_KEY", "sk-planted-0123456789")
        assert collect(store, where, transport).answered == 3
    assert {headers["Authorization"] for headers in transport.headers} == {"Bearer sk-planted-0123456789"}
    assert not any(b"sk-planted" in file.read_bytes() for file in tmp_path.iterdir())


def test_a_cap_stops_the_job_before_it_is_passed_and_a_higher_one_lets_it_go_on(tmp_path: Path) -> None:
    where, transport = endpoint(), Scripted(lambda asked, number: ok())
    with opened(tmp_path, where, 40, caps=Caps.of(tokens=400)) as store:
        with pytest.raises(SpendCapReached):
            collect(store, where, transport)
        spend = store.spend()
        assert spend.settled.tokens + spend.reserved.tokens <= 400
        assert spend.settled.tokens > 0
        assert spend.reserved.tokens == 0
        store.permit(where, PRICE, Caps.of(tokens=30_000))
        assert collect(store, where, transport).answered == 40
        assert set(transport.sent.values()) == {1}


def test_a_request_to_stop_settles_what_is_in_flight_and_the_rest_is_bought_later(tmp_path: Path) -> None:
    stop = StopRequest("Run again.")

    def does(asked: str, number: int) -> Response:
        if asked == "question 10":
            stop.ask()
        return ok()

    where, transport = endpoint(), Scripted(does)
    with opened(tmp_path, where, 500) as store:
        with pytest.raises(Interrupted):
            collect(store, where, transport, stop=stop)
        counts, spend = store.counts(), store.spend()
        assert counts.in_flight == 0
        assert 10 < counts.answered < 400
        assert spend.reserved.money == 0
        assert sum(transport.sent.values()) == counts.answered
        assert collect(store, where, transport).answered == 500
        assert set(transport.sent.values()) == {1}


def test_what_does_not_end_in_time_is_left_unanswered(tmp_path: Path) -> None:
    stop = StopRequest("Run again.")

    class Hanging(Scripted):
        async def send(self, *arguments: Any) -> Response:
            if sum(self.sent.values()) == 3:
                stop.ask()
                await asyncio.sleep(3600)
            return await super().send(*arguments)

    where, transport = endpoint(), Hanging(lambda asked, number: ok())
    with opened(tmp_path, where, 20) as store:
        with pytest.raises(Interrupted):
            collect(store, where, transport, stop=stop, policy=Policy(drain_seconds=0.1, decoders=0))
        assert store.spend().unknown > 0
        assert store.counts().in_flight == 0


def test_never_more_in_flight_than_allowed_and_progress_is_told(tmp_path: Path) -> None:
    told: list[Progress] = []
    where, transport = endpoint(), Scripted(lambda asked, number: ok())
    with opened(tmp_path, where, 300) as store:
        policy = Policy(progress_seconds=0.05, decoders=0)
        collect(store, where, transport, policy=policy, largest_concurrency=7, progress=told.append)
    assert transport.most <= 7
    assert told
    assert [one.answered for one in told] == sorted(one.answered for one in told)
    assert max(one.requests_per_second for one in told) > 0


def test_what_a_reader_or_a_transport_breaks_ends_the_job_with_nothing_lost(tmp_path: Path) -> None:
    def broken(call: Call, response: Response) -> Parsed:
        raise ZeroDivisionError

    where = endpoint()
    with opened(tmp_path, where, 5) as store:
        with pytest.raises(ZeroDivisionError):
            collect(store, where, Scripted(lambda asked, number: ok()), parse=broken)
        with pytest.raises(KeyError):
            collect(store, where, Scripted(lambda asked, number: KeyError("a broken promise")))
        assert store.counts().in_flight == 0
        assert store.spend().unknown > 0
        assert collect(store, where, Scripted(lambda asked, number: ok())).answered == 5


def test_an_answer_without_usage_keeps_its_reservation(tmp_path: Path) -> None:
    where = endpoint()
    with opened(tmp_path, where, 2) as store:
        assert collect(store, where, Scripted(lambda asked, number: ok(usage=False))).answered == 2
        assert store.spend().reserved.money > 0


def test_several_answers_to_one_call_and_calls_to_others_are_refused(tmp_path: Path) -> None:
    where, other, transport = endpoint(), endpoint("http://127.0.0.1:10/v1"), Scripted(lambda asked, number: ok())
    with opened(tmp_path, where, 1, n=3) as store, pytest.raises(ValueError, match="several answers"):
        collect(store, where, transport)
    with pytest.raises(ValueError, match="another endpoint"), RequestStore.open(tmp_path / "requests.sqlite") as store:
        collect(store, other, transport)
    assert not transport.sent


def test_a_controller_may_be_shared_and_starts_where_it_left_off(tmp_path: Path) -> None:
    where = endpoint()
    limits = {"x_ratelimit_limit_requests": "60000", "x_ratelimit_remaining_requests": "59000", "x_ratelimit_reset_requests": "1s"}
    reply = Response(status=200, headers={name.replace("_", "-"): value for name, value in limits.items()}, body=answer({}), seconds=0)
    with opened(tmp_path, where, 5) as store:
        collect(store, where, Scripted(lambda asked, number: reply))
        kept = store.recall("rates", where)
        assert kept is not None
        assert RateController(lambda: 0.0, state=kept).to_json()["buckets"]["requests"]["rate"] == pytest.approx(1000)


def test_packed_log_probabilities_that_were_altered_are_not_read(tmp_path: Path) -> None:
    with fake_endpoint(Settings(answer_tokens=3)) as server:
        where = endpoint(server.base_url)
        with opened(tmp_path, where, 1, logprobs=True, top_logprobs=3) as store:
            collect(store, where)
            ((_, packed),) = store.unshelved(1)
    verified = unpack(packed)
    assert numpy.isfinite(verified.top_logprobs_N).all()
    for at in range(len(packed)):
        altered = bytearray(packed)
        altered[at] ^= 1
        with pytest.raises(StoreError):
            unpack(bytes(altered))
        with pytest.raises(StoreError):
            unpack(packed[:at])


def test_a_reader_asks_for_what_the_body_asked_for() -> None:
    call = row(endpoint(), 0, logprobs=True).call
    assert Reader()(call, ok()).demoted == "absent"
    assert Reader()(row(endpoint(), 0).call, ok()).demoted is None
