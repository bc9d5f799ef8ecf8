"""The request store: nothing bought twice, nothing lost, and never more spent than the cap, whatever dies or breaks."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stillroom.collect import database
from stillroom.collect.spend import Amount, Caps, Price, cost, worst_case
from stillroom.collect.store import Requested, RequestStore, Reservation, Row, shard
from stillroom.collect.wire import Answer, Call, Endpoint, Failure, FailureReason, Usage
from stillroom.core.errors import RequestStoreError, ResourceError, SpendCapReached, SpendError

T = TypeVar("T")
ENDPOINT = Endpoint(base_url="https://api.example.com/v1", model="large", key_variable="STILLROOM_TEST_KEY")
PRICE = Price(currency="USD", as_of=date(2026, 11, 1), input=2, cached_input=1, output=8, reasoning=9)
MUCH = Caps.of("1000", 10**12)
USAGE = Usage(prompt_tokens=5, completion_tokens=3)
ANSWER = Answer(text="four", finish_reason="stop", usage=USAGE, model="large-0711", fingerprint="f1", provider="p")


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies leaves what it wrote to the system; only a power failure needs the flushing."""
    monkeypatch.setattr(database, "_SYNCHRONOUS", "OFF")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RequestStore]:
    with RequestStore.open(tmp_path / "requests.sqlite") as opened:
        opened.permit(ENDPOINT, PRICE, MUCH)
        yield opened


def call(text: str = "2 + 2?", sample: int = 0, endpoint: Endpoint = ENDPOINT, **body: Any) -> Call:
    return Call(endpoint=endpoint, sample=sample, body={"model": "large", "messages": [{"role": "user", "content": text}], "max_tokens": 16} | body)


def rows(count: int, begin: int = 0) -> Iterator[Row]:
    return (Row(row=f"r{number}", prompt=f"p{number}", call=call(f"{number}?")) for number in range(begin, begin + count))


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def buy(store: RequestStore, asked: Call, answer: Answer = ANSWER, **settling: Any) -> None:
    await store.settle(await store.begin(asked), answer, **settling)


# -- keys: what is the same call, and what is not -----------------------------------------------------------------------------------


def test_the_same_call_in_another_order_is_a_hit(store: RequestStore) -> None:
    store.request([Row(row="a", prompt="p", call=call(temperature=0.5, stop=["x"]))])
    run(buy(store, store.pending(1)[0]))
    body = call(temperature=0.5, stop=["x"]).body
    reordered = {name: body[name] for name in reversed(body)} | {"messages": [{"content": "2 + 2?", "role": "user"}]}
    found = store.request([Row(row="b", prompt="p", call=Call(endpoint=replace(ENDPOINT, key_variable="OTHER"), body=reordered))])
    assert found == Requested(new=1, hits=1)
    assert store.pending(10) == []


@pytest.mark.parametrize(
    "other",
    [
        call("2 + 3?"),
        call(sample=1),
        call(max_tokens=17),
        call(temperature=0.0),
        call(seed=1),
        call(logprobs=True),
        call(model="small"),
        call(messages=[{"role": "system", "content": "2 + 2?"}]),
        call(messages=[]),
        call(stop=None),
        call(endpoint=replace(ENDPOINT, model="small")),
        call(endpoint=replace(ENDPOINT, base_url="https://other.example.com/v1")),
        call(endpoint=replace(ENDPOINT, route="completions")),
    ],
)
def test_any_other_field_is_a_miss_that_is_explained(other: Call, store: RequestStore) -> None:
    store.request([Row(row="a", prompt="p", call=call())])
    run(buy(store, store.pending(1)[0]))
    assert store.request([Row(row="b", prompt="p", call=other)]) == Requested(new=1)
    assert [waiting.key for waiting in store.pending(10)] == [other.key]
    found = store.explain(other.key[:12])
    assert found is not None
    assert (found.state, found.nearest, found.nearest_state) == ("pending", call().key, "answered")
    assert len(found.differences) >= 1
    assert found == store.explain(other)


def test_an_explanation_names_the_fields_and_both_values(store: RequestStore) -> None:
    long = "A long text that goes on and on, and on, and on, until it comes to " * 4
    store.request([Row(row="a", prompt="p", call=call(long + "one")), Row(row="z", prompt="q", call=call("something else", max_tokens=3))])
    for waiting in store.pending(2):
        run(buy(store, waiting))
    found = store.explain(call(long + "two", sample=2, temperature=1))
    assert found is not None
    assert found.state is None
    assert found.nearest == call(long + "one").key
    assert found.differences[1:] == ("body.temperature: 1 asked, absent stored", "sample: 2 asked, 0 stored")
    assert found.differences[0].startswith("body.messages[0].content: ...'")
    assert "two' asked" in found.differences[0]
    assert len(found.differences[0]) < 200
    assert "is not in the store" in str(found)
    assert store.explain("00" * 32) is None
    with pytest.raises(ValueError, match="hexadecimal"):
        store.explain("no key")
    with pytest.raises(ValueError, match="begins several"):
        store.explain("")


def test_true_is_not_one(store: RequestStore) -> None:
    store.request([Row(row="a", prompt="p", call=call(logprobs=True))])
    found = store.explain(call(logprobs=1))
    assert found is not None
    assert found.differences == ("body.logprobs: 1 asked, True stored",)


# -- rows ---------------------------------------------------------------------------------------------------------------------------


def test_no_rows(store: RequestStore) -> None:
    assert store.request([]) == Requested()
    counts = store.counts()
    counts.require_conserved()
    assert (counts.requested, counts.pending) == (0, 0)
    assert store.pending(10) == []
    assert list(store.rows()) == []
    assert store.spend().projected_money is None


def test_rows_are_conserved_at_every_stage(store: RequestStore) -> None:
    store.request(rows(8))
    waiting = store.pending(8)
    assert [(one.row, one.prompt, one.tried) for one in waiting] == [(f"r{n}", f"p{n}", 0) for n in range(8)]
    assert [one.key for one in waiting] == [call(f"{n}?").key for n in range(8)]

    async def work() -> Reservation:
        for one in waiting[:4]:
            await buy(store, one)
        refused = await store.begin(waiting[4])
        await store.settle(refused, Failure(reason="content-filtered", message="no", status=400))
        again = await store.begin(waiting[5])
        await store.settle(again, Failure(reason="server-error", message="oops", status=500))
        await store.give_up(waiting[6], "server-error")
        return await store.begin(waiting[7])

    run(work())
    store.accept(["r0", "r1"])
    store.reject([("r2", "refusal")])
    counts = store.counts()
    counts.require_conserved()
    assert counts.requested == 8
    assert counts.accepted == 2
    assert counts.rejected == {"refusal": 1}
    assert counts.failed == {"content-filtered": 1, "server-error": 1}
    assert (counts.pending, counts.in_flight, counts.answered) == (3, 1, 1)
    assert [one.row for one in store.pending(9)] == ["r5"]
    assert store.retry_failed(["server-error"]) == 1
    assert [one.row for one in store.pending(9)] == ["r5", "r6"]
    store.counts().require_conserved()


def test_a_row_that_vanishes_is_missed(store: RequestStore) -> None:
    store.request(rows(3))
    other = sqlite3.connect(store.path)
    other.execute("DELETE FROM rows WHERE row = 'r1'")
    other.commit()
    with pytest.raises(AssertionError, match="3 rows were requested, and 2 are"):
        store.counts().require_conserved()
    other.execute("INSERT INTO rows (row, prompt, call) VALUES ('r1', 'p1', 99)")
    other.commit()
    other.close()
    with pytest.raises(AssertionError, match="3 rows were requested, and 2 are"):
        store.counts().require_conserved()
    with pytest.raises(RequestStoreError, match="request-store-corrupt"):
        store.verify()


def test_requests_are_repeated_without_effect_and_pages_do_not_overlap(store: RequestStore) -> None:
    assert store.request(rows(5000)) == Requested(new=5000)
    assert store.request(rows(5001)) == Requested(new=1, known=5000)
    seen: list[str] = []
    after = 0
    while page := store.pending(700, after):
        seen += [one.row for one in page]
        after = page[-1].position
    assert seen == [f"r{n}" for n in range(5001)]


def test_a_row_means_one_call(store: RequestStore) -> None:
    store.request(rows(1))
    with pytest.raises(RequestStoreError, match="request-conflict"):
        store.request([Row(row="r0", prompt="p0", call=call("another"))])
    assert store.counts().requested == 1
    assert len(store.pending(9)) == 1


def test_rows_that_want_the_same_thing_share_one_call(store: RequestStore) -> None:
    store.request([Row(row="a", prompt="p", call=call()), Row(row="b", prompt="q", call=call())])
    assert [one.row for one in store.pending(9)] == ["a"]
    run(buy(store, store.pending(9)[0]))
    assert [(one.row, one.answer and one.answer.text) for one in store.rows()] == [("a", "four"), ("b", "four")]
    assert store.counts().answered == 2
    assert store.spend().attempts == 1


def test_a_truncated_answer_is_asked_again_with_more_room_and_the_others_kept(store: RequestStore) -> None:
    store.request(rows(2))
    for one in store.pending(2):
        run(buy(store, one, replace(ANSWER, finish_reason="length")))
    store.reject([("r0", "truncated")])
    larger = call("0?", max_tokens=64)
    store.supersede("r0", larger, "truncated")
    store.counts().require_conserved()
    assert [one.key for one in store.pending(9)] == [larger.key]
    with pytest.raises(ValueError, match="pending"):
        store.supersede("r0", call("0?", max_tokens=128), "truncated")
    run(buy(store, store.pending(1)[0]))
    assert store.request(rows(2)) == Requested(known=2)  # the earlier call is still known to be the row's
    found = {one.row: one for one in store.rows()}
    assert (found["r0"].key, found["r0"].verdict) == (larger.key, None)
    assert found["r1"].key == call("1?").key
    assert store.answer(call("0?").key) == replace(ANSWER, finish_reason="length")
    with pytest.raises(ValueError, match="not there"):
        store.supersede("none", larger, "truncated")


def test_only_what_has_an_answer_is_decided_about(store: RequestStore) -> None:
    store.request(rows(2))
    run(buy(store, store.pending(1)[0]))
    with pytest.raises(ValueError, match="r1"):
        store.accept(["r0", "r1"])
    assert store.counts().accepted == 0


@pytest.mark.parametrize("text", ["", "Grüße 🙂\x00\u2028", "\ud83d half a pair", "x" * 100_000])
def test_answers_come_back_as_they_were(text: str, store: RequestStore) -> None:
    answer = Answer(
        text=text,
        finish_reason=None,
        usage=None,
        reasoning=text,
        thinking="unterminated",
        token_ids=(1, 2, 3),
        model=text[:50],
        fingerprint=text[:50],
        provider=text[:50],
        response_id="id",
    )
    store.request([Row(row="é🙂", prompt="p", call=call("é🙂\x00"))])
    run(buy(store, store.pending(1)[0], answer, request_id=text[:9]))
    assert next(store.rows()).answer == answer
    assert next(store.rows()).row == "é🙂"
    store.verify()


# -- spend --------------------------------------------------------------------------------------------------------------------------


def test_a_reservation_becomes_what_was_counted(store: RequestStore) -> None:
    reservation = run(store.begin(call()))
    assert reservation.worst == worst_case(call(), PRICE)
    assert store.spend().reserved == reservation.worst
    run(store.settle(reservation, ANSWER))
    spend = store.spend()
    assert (spend.settled, spend.reserved) == (cost(USAGE, PRICE), Amount())
    assert (spend.attempts, spend.unknown, spend.overruns, spend.currency) == (1, 0, 0, "USD")


@pytest.mark.parametrize(
    ("failure", "settled", "stays", "state"),
    [
        (Failure(reason="throttled", message="", status=429), False, False, "pending"),
        (Failure(reason="bad-key", message="", status=401), False, False, "pending"),
        (Failure(reason="quota-exhausted", message="", status=429), False, False, "pending"),
        (Failure(reason="context-overflow", message="", status=400), False, False, "failed"),
        (Failure(reason="server-error", message="", status=500), False, True, "pending"),
        (Failure(reason="malformed", message="", status=200), False, True, "pending"),
        (Failure(reason="content-filtered", message="", status=200), False, True, "failed"),
        (Failure(reason="content-filtered", message="", status=200, usage=USAGE), True, False, "failed"),
        (Failure(reason="malformed", message="", status=200, usage=Usage(prompt_tokens=-5, completion_tokens=0)), False, True, "pending"),
    ],
)
def test_failures_cost_what_they_may_have_cost(failure: Failure, settled: bool, stays: bool, state: str, store: RequestStore) -> None:
    store.request([Row(row="a", prompt="p", call=call())])
    reservation = run(store.begin(call()))
    run(store.settle(reservation, failure))
    spend = store.spend()
    assert spend.settled == (cost(USAGE, PRICE) if settled else Amount())
    assert spend.reserved == (reservation.worst if stays else Amount())
    assert spend.unknown == int(stays)
    assert (len(store.pending(1)) == 1) == (state == "pending")
    assert sum(store.counts().failed.values()) == (state == "failed")


def test_an_answer_without_usage_keeps_its_reservation(store: RequestStore) -> None:
    reservation = run(store.begin(call()))
    run(store.settle(reservation, replace(ANSWER, usage=None)))
    assert store.spend().reserved == reservation.worst
    assert store.answer(call().key) is not None


def test_an_endpoint_that_bills_more_than_it_may_is_told(store: RequestStore) -> None:
    run(buy(store, call(), replace(ANSWER, usage=Usage(prompt_tokens=5, completion_tokens=1000))))
    assert store.spend().overruns == 1
    assert store.spend().settled.tokens == 1005


def test_the_cap_is_never_passed_by_many_at_once(tmp_path: Path) -> None:
    worst = worst_case(call("0?"), PRICE)
    for caps in (Caps(money=worst.money * 7 + 1), Caps(tokens=worst.tokens * 8 - 1)):
        with RequestStore.open(tmp_path / f"{caps.money}.sqlite") as opened:
            opened.permit(ENDPOINT, PRICE, caps)

            async def all_at_once(opened: RequestStore = opened) -> list[Any]:
                return await asyncio.gather(*[opened.begin(call(f"{n}?")) for n in range(10)], return_exceptions=True)

            found = run(all_at_once())
            assert [type(one).__name__ for one in found] == ["Reservation"] * 7 + ["SpendCapReached"] * 3
            assert found[7].may_fit_later
            assert opened.spend().reserved == Amount(worst.tokens * 7, worst.money * 7)
            run(opened.release(found[0], "not-sent"))
            run(opened.unanswered(run(opened.begin(call("9?")))))
            for reservation in found[1:7]:
                run(opened.unanswered(reservation))
            with pytest.raises(SpendCapReached) as caught:
                run(opened.begin(call("8?")))
            assert not caught.value.may_fit_later
            opened.permit(ENDPOINT, PRICE, replace(caps, money=caps.money and caps.money * 2, tokens=caps.tokens and caps.tokens * 2))
            run(opened.begin(call("8?")))


def test_nothing_is_begun_without_caps_or_twice(tmp_path: Path, store: RequestStore) -> None:
    with RequestStore.open(tmp_path / "other.sqlite") as other, pytest.raises(SpendError, match="spend-cap-missing"):
        run(other.begin(call()))
    with pytest.raises(SpendError, match="price-unknown"):
        store.permit(ENDPOINT, None, MUCH)
    with pytest.raises(SpendError, match="EUR"):
        store.permit(replace(ENDPOINT, model="b"), replace(PRICE, currency="EUR"), MUCH)
    with pytest.raises(SpendError, match="call-unbounded"):
        run(store.begin(call(max_tokens=None)))
    reservation = run(store.begin(call()))
    with pytest.raises(AssertionError, match="in-flight"):
        run(store.begin(call()))
    run(store.settle(reservation, ANSWER))
    with pytest.raises(AssertionError, match="ended before"):
        run(store.settle(reservation, ANSWER))
    with pytest.raises(AssertionError, match="ended before"):
        run(store.release(reservation, "not-sent"))
    with pytest.raises(AssertionError, match="answered"):
        run(store.begin(call()))
    assert store.spend().settled == cost(USAGE, PRICE)


def test_tokens_alone_can_be_capped_where_no_price_is_known(tmp_path: Path) -> None:
    with RequestStore.open(tmp_path / "s.sqlite") as opened:
        opened.permit(ENDPOINT, None, Caps.of(tokens=10**6))
        run(buy(opened, call()))
        spend = opened.spend()
        assert (spend.settled, spend.currency, spend.projected_money) == (Amount(8, 0), None, None)


def test_a_price_holds_from_the_reservation_to_the_settlement(store: RequestStore) -> None:
    reservation = run(store.begin(call()))
    store.permit(ENDPOINT, replace(PRICE, output=10**6, reasoning=10**6), MUCH)
    run(store.settle(reservation, ANSWER))
    assert store.spend().settled == cost(USAGE, PRICE)


def test_what_was_reserved_for_a_cancelled_task_is_given_back(store: RequestStore) -> None:
    async def work() -> None:
        task = asyncio.ensure_future(store.begin(call()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while store.spend().attempts == 0 or store.spend().reserved != Amount():
            await asyncio.sleep(0.01)

    run(asyncio.wait_for(work(), 20))
    assert run(store.begin(call())).worst == store.spend().reserved


def test_the_projection_is_of_the_calls_that_wait(store: RequestStore) -> None:
    store.request(rows(30))
    for one in store.pending(20):
        run(buy(store, one))
    spend = store.spend()
    assert spend.projected_tokens is not None
    assert (spend.projected_tokens.value, spend.projected_tokens.n) == (80.0, 20)
    assert spend.projected_money is not None
    assert spend.projected_money.value == pytest.approx(10 * cost(USAGE, PRICE).money / 1e12)


def test_commits_are_grouped_and_do_not_block_the_loop(store: RequestStore, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = []
    monkeypatch.setattr(database, "write_point", lambda: commits.append(threading.current_thread().name))

    async def work() -> int:
        ticks, done = 0, asyncio.gather(*[buy(store, call(f"{n}?")) for n in range(200)])
        while not done.done():
            await asyncio.sleep(0.001)
            ticks += 1
        await done
        return ticks

    assert run(work()) >= 3
    assert set(commits) == {"stillroom-requests"}
    assert 8 <= len(commits) // 2 <= 40  # of 400 works, 50 together at most


# -- deaths -------------------------------------------------------------------------------------------------------------------------


def assert_sound(path: Path, bill: Amount, caps: Caps = MUCH) -> None:
    with RequestStore.open(path) as opened:
        opened.verify()
        opened.counts().require_conserved()
        assert opened.counts().in_flight == 0
        spend = opened.spend()
        most = spend.settled + spend.reserved
        assert spend.settled.money <= bill.money <= most.money
        assert spend.settled.tokens <= bill.tokens <= most.tokens
        assert most.fits(caps)


# Buys rows at an endpoint that writes its bill to a file before it answers, and dies in the middle; argv: store, bill, caps in money, seed, seconds.
_CHILD = """
import asyncio, os, random, sys, threading, time
from pathlib import Path
from unit.test_request_store import *

path, bill, cap, seed, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
database._SYNCHRONOUS = "OFF"
chance = random.Random(seed)
bill_file = os.open(bill, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def served(asked):
    usage = Usage(prompt_tokens=chance.randrange(1, 40), completion_tokens=chance.randrange(17))
    os.write(bill_file, f"{asked.key} {usage.prompt_tokens} {usage.completion_tokens}\\n".encode())
    return usage

async def one(store, asked):
    reservation = await store.begin(asked)
    await asyncio.sleep(chance.random() * 0.01)
    end = chance.random()
    if end < 0.1:
        await store.release(reservation, "not-sent")
    elif end < 0.2:
        served(asked)
        await store.unanswered(reservation)
    elif end < 0.3:
        await store.settle(reservation, Failure(reason="throttled", message="slow down", status=429))
    else:
        usage = served(asked)
        await asyncio.sleep(chance.random() * 0.01)
        await store.settle(reservation, Answer(text="x" * chance.randrange(2000), finish_reason="stop", usage=usage), packed=b"p" * 500)

async def main():
    with RequestStore.open(path) as store:
        print("open", flush=True)
        store.permit(ENDPOINT, PRICE, Caps(money=cap))
        store.request(rows(300))
        while waiting := store.pending(40):
            found = await asyncio.gather(*[one(store, asked) for asked in waiting], return_exceptions=True)
            if any(isinstance(error, SpendCapReached) and not error.may_fit_later for error in found):
                print("cap"); return
            for error in found:
                if error is not None and not isinstance(error, SpendCapReached): raise error
    print("done", flush=True)

def die():
    time.sleep(seconds)
    os.kill(os.getpid(), 9)
if seconds > 0:
    threading.Thread(target=die, daemon=True).start()
asyncio.run(main())
"""


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def child(path: Path, bill: Path, cap: int, seed: int, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _CHILD, *map(str, (path, bill, cap, seed, seconds))]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)


def billed(bill: Path) -> tuple[Amount, list[str]]:
    total, keys = Amount(), []
    for line in bill.read_text().splitlines() if bill.exists() else []:
        key, prompt, completion = line.split()
        keys.append(key)
        total += cost(Usage(prompt_tokens=int(prompt), completion_tokens=int(completion)), PRICE)
    return total, keys


def die_and_go_on(tmp_path: Path, seed: int, deaths: int) -> None:
    """Kills the collector at random moments, looks at what it left each time, and lets the last one come to its end."""
    path, bill, chance = tmp_path / "s.sqlite", tmp_path / "bill", random.Random(seed)
    caps = Caps(money=10**6)
    for number in range(deaths):
        done = child(path, bill, 10**6, seed * 100 + number, 0.02 + chance.random() * 0.6)
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
        assert_sound(path, billed(bill)[0], caps)
    done = child(path, bill, 10**6, seed * 100 + deaths, 0)
    assert done.stdout.split() == ["open", "done"], done.stdout + done.stderr
    total, keys = billed(bill)
    assert_sound(path, total, caps)
    with RequestStore.open(path) as opened:
        assert opened.counts().answered == 300
        unknown = opened._rows_of("SELECT c.key, count(*) FROM attempts a JOIN calls c ON c.id = a.call WHERE a.state = 'unanswered' GROUP BY 1")
    often = {key.hex(): number for key, number in unknown}
    assert all(keys.count(key) <= 1 + often.get(key, 0) for key in set(keys))  # bought again only where the outcome was unknown


def test_a_killed_collector_loses_nothing_and_buys_nothing_twice(tmp_path: Path) -> None:
    die_and_go_on(tmp_path, 1, 2)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 32))
def test_a_collector_killed_again_and_again_loses_nothing(seed: int, tmp_path: Path) -> None:
    die_and_go_on(tmp_path, seed, 8)


def test_a_collector_stops_at_its_cap_and_not_beyond_it(tmp_path: Path) -> None:
    cap = worst_case(call("0?"), PRICE).money * 20
    done = child(tmp_path / "s", tmp_path / "bill", cap, 3, 0)
    assert done.stdout.split() == ["open", "cap"], done.stdout + done.stderr
    assert_sound(tmp_path / "s", billed(tmp_path / "bill")[0], Caps(money=cap))


@pytest.mark.parametrize("place", range(1, 11))
def test_a_death_at_any_point_of_a_commit_leaves_it_done_or_not(place: int, tmp_path: Path) -> None:
    program = f"""
import os
from unit.test_request_store import *
count = 0
def die():
    global count
    count += 1
    if count == {place}: os.kill(os.getpid(), 9)
database.write_point = die
with RequestStore.open({str(tmp_path / "s")!r}) as store:
    store.permit(ENDPOINT, PRICE, MUCH)
    store.request(rows(3))
    run(buy(store, call("0?")))
    os.write(1, b"bought")
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, check=False, timeout=120)
    assert (done.returncode == -signal.SIGKILL) == (place <= 10 and b"bought" not in done.stdout), done.stderr
    with RequestStore.open(tmp_path / "s") as opened:
        opened.verify()
        assert opened.counts().requested in (0, 3)
        spend = opened.spend()
        assert spend.reserved == (worst_case(call("0?"), PRICE) if spend.unknown else Amount())
        assert (opened.answer(call("0?").key) is not None) == (spend.settled != Amount())


class Spending(RuleBasedStateMachine):
    """Against a model of the bill: what the endpoint did and charged, whatever the store was told of it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "s.sqlite"
        self.caps = Caps(money=6 * worst_case(call("0?"), PRICE).money)
        self.under_way: list[Reservation] = []
        self.bill, self.answered, self.next = Amount(), set[str](), 0
        database._SYNCHRONOUS = "OFF"
        self.store = RequestStore.open(self.path)
        self.store.permit(ENDPOINT, PRICE, self.caps)

    @rule(count=st.integers(0, 3))
    def request(self, count: int) -> None:
        found = self.store.request(rows(count, self.next))
        assert found == Requested(new=count)
        self.next += count

    @rule()
    def request_again(self) -> None:
        assert self.store.request(rows(self.next)) == Requested(known=self.next)

    @rule()
    def begin(self) -> None:
        for asked in self.store.pending(1):
            assert asked.key not in self.answered
            spend = self.store.spend()
            fits = (spend.settled + spend.reserved + worst_case(asked, PRICE)).fits(self.caps)
            try:
                self.under_way.append(run(self.store.begin(asked)))
            except SpendCapReached:
                assert not fits
            else:
                assert fits

    @precondition(lambda self: self.under_way)
    @rule(at=st.integers(0, 99), prompt=st.integers(1, 20), completion=st.integers(0, 16), counted=st.booleans())
    def answer(self, at: int, prompt: int, completion: int, counted: bool) -> None:
        reservation = self.under_way.pop(at % len(self.under_way))
        usage = Usage(prompt_tokens=prompt, completion_tokens=completion)
        self.bill += cost(usage, PRICE)
        run(self.store.settle(reservation, replace(ANSWER, usage=usage if counted else None)))
        self.answered.add(reservation.call.key)

    @precondition(lambda self: self.under_way)
    @rule(at=st.integers(0, 99), reason=st.sampled_from(["throttled", "bad-key", "invalid-request"]))
    def refuse(self, at: int, reason: FailureReason) -> None:
        reservation = self.under_way.pop(at % len(self.under_way))
        run(self.store.settle(reservation, Failure(reason=reason, message="")))

    @precondition(lambda self: self.under_way)
    @rule(at=st.integers(0, 99))
    def release(self, at: int) -> None:
        run(self.store.release(self.under_way.pop(at % len(self.under_way)), "not-sent"))

    @precondition(lambda self: self.under_way)
    @rule(at=st.integers(0, 99), done=st.booleans())
    def lose(self, at: int, done: bool) -> None:
        reservation = self.under_way.pop(at % len(self.under_way))
        if done:
            self.bill += cost(USAGE, PRICE)
        run(self.store.unanswered(reservation))

    @rule(done=st.booleans())
    def crash(self, done: bool) -> None:
        """What a process that is killed leaves: the files as they are now."""
        for _ in self.under_way:
            if done:
                self.bill += cost(USAGE, PRICE)
        self.under_way.clear()
        copy = self.path.with_name(f"{self.path.stem}x.sqlite")
        for ending in ("", "-wal"):
            if (there := Path(f"{self.path}{ending}")).exists():
                shutil.copy(there, f"{copy}{ending}")
        self.store.close()
        self.path = copy
        self.store = RequestStore.open(copy)

    @invariant()
    def holds(self) -> None:
        counts, spend = self.store.counts(), self.store.spend()
        counts.require_conserved()
        assert counts.requested == self.next
        assert counts.in_flight == len(self.under_way)
        assert counts.answered == len(self.answered)
        most = spend.settled + spend.reserved
        assert spend.settled.money <= self.bill.money <= most.money <= (self.caps.money or 0)
        assert spend.settled.tokens <= self.bill.tokens <= most.tokens

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


TestSpending = Spending.TestCase
TestSpending.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


@pytest.mark.soak
class TestSpendingLong(Spending.TestCase):
    settings = settings(max_examples=400, stateful_step_count=60, deadline=None)


# -- files that are not what they should be -----------------------------------------------------------------------------------------


def test_a_store_is_of_one_process_and_one_owner(store: RequestStore) -> None:
    with pytest.raises(RequestStoreError, match=f"process {os.getpid()}") as caught:
        RequestStore.open(store.path)
    assert caught.value.code == "request-store-locked"
    program = f"from unit.test_request_store import *; RequestStore.open({str(store.path)!r})"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert "request-store-locked" in done.stderr
    store.request(rows(1))
    with RequestStore.open(store.path, read_only=True) as reader:
        assert reader.counts().pending == 1
        reservation = run(store.begin(call("0?")))
        assert reader.counts().in_flight == 1  # it is still under way
        assert reader.spend().reserved == reservation.worst
        with pytest.raises(RuntimeError, match="read only"):
            reader.request(rows(1))
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        store.request(rows(1))
    with RequestStore.open(store.path) as again:
        assert again.spend().unknown == 1


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 5000, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_another_file_is_no_store(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(content)
    if content == b"":  # what a death at the very beginning leaves
        with RequestStore.open(tmp_path / "s") as opened:
            assert opened.counts().requested == 0
        return
    with pytest.raises(RequestStoreError) as caught:
        RequestStore.open(tmp_path / "s")
    assert caught.value.code in ("request-store-other", "request-store-corrupt")
    assert (tmp_path / "s").read_bytes() == content


def test_another_database_and_a_newer_version_are_no_store(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(RequestStoreError, match="something else"):
        RequestStore.open(tmp_path / "other")
    RequestStore.open(tmp_path / "s").close()
    newer = sqlite3.connect(tmp_path / "s")
    newer.execute("PRAGMA user_version = 2")
    newer.close()
    with pytest.raises(RequestStoreError, match="version 2"):
        RequestStore.open(tmp_path / "s")
    with pytest.raises(RequestStoreError):
        RequestStore.open(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()


def test_bytes_that_were_altered_are_an_error_and_never_another_answer(tmp_path: Path) -> None:
    with RequestStore.open(tmp_path / "s") as opened:
        opened.permit(ENDPOINT, PRICE, MUCH)
        opened.request(rows(40))
        for one in opened.pending(40):
            run(buy(opened, one, replace(ANSWER, text=f"answer {one.row} " * 9), raw=b"raw" * 50, demoted="short"))
        expected = list(opened.rows())
    data = (tmp_path / "s").read_bytes()
    chance, found = random.Random(0), 0
    for _ in range(60):
        at = chance.randrange(100, len(data))
        (tmp_path / "s").write_bytes(data[:at] + bytes(byte ^ 0x55 for byte in data[at : at + 8]) + data[at + 8 :])
        try:
            with RequestStore.open(tmp_path / "s") as opened:
                opened.verify()
                assert [(one.row, one.answer) for one in opened.rows()] == [(one.row, one.answer) for one in expected]
        except RequestStoreError as error:
            found += 1
            assert error.code == "request-store-corrupt"  # noqa: PT017 - not every place is one that matters
    assert found > 5  # most places hold nothing, or what is not compared here


def test_a_disk_that_is_full_loses_nothing(store: RequestStore) -> None:
    store.request(rows(50))
    first, second = store.pending(2)
    reservation = run(store.begin(first))
    connection = store._connections[-1]
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    before = store.spend()
    with pytest.raises(ResourceError) as caught:
        store.request(rows(5000, 50))
    assert caught.value.code == "disk-full"
    with pytest.raises(ResourceError, match="disk-full"):
        run(store.settle(reservation, ANSWER, packed=os.urandom(200_000)))
    assert store.counts().requested == 50
    assert store.spend() == before
    connection.execute("PRAGMA max_page_count = 1000000")
    run(store.settle(reservation, ANSWER, packed=b"p"))  # what came is still in hand
    run(buy(store, second))
    store.verify()
    assert store.spend().settled == cost(USAGE, PRICE) + cost(USAGE, PRICE)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    path = small_disk / "s"
    with RequestStore.open(path) as opened:
        opened.permit(ENDPOINT, PRICE, MUCH)
        opened.request(rows(100))
        done = 0
        for one in opened.pending(100):
            try:
                run(buy(opened, one, packed=os.urandom(30_000)))
            except ResourceError as error:
                assert error.code == "disk-full"  # noqa: PT017 - where it is raised depends on the disk
                break
            done += 1
    assert 3 < done < 100
    shutil.copytree(small_disk, small_disk.parent / "large")
    with RequestStore.open(small_disk.parent / "large" / "s") as opened:
        opened.verify()
        assert opened.counts().answered == done
        assert opened.spend().settled.tokens == done * 8


# -- secrets ------------------------------------------------------------------------------------------------------------------------


def test_a_key_is_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-planted-0123456789abcdef"
    monkeypatch.setenv("STILLROOM_TEST_KEY", key)
    with RequestStore.open(tmp_path / "s") as opened:
        opened.permit(ENDPOINT, PRICE, MUCH)
        opened.request(rows(4))
        one, two, three, four = opened.pending(4)
        echo = f"You sent Authorization: Bearer {key}"
        run(buy(opened, one, replace(ANSWER, text=echo), raw=echo.encode(), demoted="short"))
        run(opened.settle(run(opened.begin(two)), Failure(reason="bad-key", message=echo, status=401)))
        run(opened.settle(run(opened.begin(three)), Failure(reason="invalid-request", message=echo, status=400)))
        run(opened.begin(four))
        assert opened.raw(one.key) == b"You sent Authorization: Bearer [key]"
        everything = json.dumps([[repr(value) for value in opened._rows_of(f"SELECT * FROM {table}")] for table in TABLES])
        assert key not in everything
        assert key not in repr(list(opened.rows()))
        for _ in range(2):
            assert all(key.encode() not in path.read_bytes() for path in tmp_path.iterdir())
            opened.close()


TABLES = ("facts", "endpoints", "calls", "bodies", "rows", "outcomes", "attempts", "sessions", "prices")


# -- log-probabilities, facts -------------------------------------------------------------------------------------------------------


def test_log_probabilities_wait_until_their_shard_is_there(store: RequestStore) -> None:
    store.request(rows(4))
    for number, one in enumerate(store.pending(3)):
        run(buy(store, one, raw=b"raw", packed=None if number == 2 else bytes([number]), demoted="mass" if number == 2 else None))
    found = store.unshelved(10)
    assert found == [(call("0?").key, b"\x00"), (call("1?").key, b"\x01")]
    assert store.raw(call("0?").key) is None
    assert store.raw(call("2?").key) == b"raw"
    with pytest.raises(ValueError, match="no answer"):
        store.shelve("a.parquet", [found[0][0], call("3?").key])
    assert len(store.unshelved(10)) == 2
    store.shelve("a.parquet", [key for key, _ in reversed(found)])
    assert store.unshelved(10) == []
    assert [(one.logprobs, one.demoted) for one in store.rows()] == [(("a.parquet", 1), None), (("a.parquet", 0), None), (None, "mass"), (None, None)]


def test_what_waited_for_its_shard_takes_no_room_in_the_end(store: RequestStore) -> None:
    store.request(rows(20))
    for one in store.pending(20):
        run(buy(store, one, packed=os.urandom(60_000)))
    store.shelve("a.parquet", [key for key, _ in store.unshelved(20)])
    store.close()
    assert store.path.stat().st_size < 200_000


def test_facts_are_kept_for_each_endpoint(store: RequestStore) -> None:
    assert store.recall("rates", ENDPOINT) is None
    store.remember("rates", ENDPOINT, {"in_flight": 3})
    store.remember("rates", ENDPOINT, {"in_flight": 4})
    store.remember("probe", ENDPOINT, {"n": "ignored"})
    assert store.recall("rates", ENDPOINT) == {"in_flight": 4}
    assert store.recall("probe", replace(ENDPOINT, key_variable=None)) == {"n": "ignored"}
    assert store.recall("probe", replace(ENDPOINT, model="other")) is None


def test_a_call_that_no_row_wants_is_charged_and_never_waits(store: RequestStore) -> None:
    reservation = run(store.begin(call("probe")))
    run(store.unanswered(reservation))
    assert store.pending(9) == []
    assert store.counts().requested == 0
    assert store.spend().reserved == reservation.worst
    store.request([Row(row="a", prompt="p", call=call("probe"))])
    assert [one.tried for one in store.pending(9)] == [1]


# -- several machines ---------------------------------------------------------------------------------------------------------------


def test_shards_are_all_rows_once() -> None:
    for count in (1, 2, 3, 7):
        parts = [[row.row for row in shard(rows(500), index, count)] for index in range(count)]
        assert sorted(sum(parts, [])) == sorted(row.row for row in rows(500))
        assert all(len(part) > 500 / count / 2 for part in parts)
    with pytest.raises(ValueError, match="no shard 2 of 2"):
        shard(rows(1), 2, 2)


def filled(path: Path, asked: Iterator[Row], answer: Answer = ANSWER, decide: Callable[[RequestStore], None] = lambda store: None) -> Path:
    with RequestStore.open(path) as opened:
        opened.permit(ENDPOINT, PRICE, MUCH)
        opened.request(asked)
        waiting = opened.pending(10**6)

        async def work() -> None:
            await asyncio.gather(*[buy(opened, one, answer, packed=b"p") for one in waiting[1:]])
            for one in waiting[:1]:
                await opened.unanswered(await opened.begin(one))

        run(work())
        decide(opened)
    return path


def test_shards_merge_into_the_whole_and_once(tmp_path: Path) -> None:
    parts = [
        filled(tmp_path / f"{index}", shard(rows(300), index, 3), decide=lambda opened: opened.shelve("x", [opened.unshelved(1)[0][0]]))
        for index in range(3)
    ]
    worst = Amount()
    for part in parts:
        with RequestStore.open(part) as opened:
            worst += opened.spend().reserved
    with RequestStore.open(tmp_path / "whole") as whole:
        whole.request(rows(10))
        merged = whole.merge(parts)
        assert (merged.answers, merged.attempts, merged.rows, merged.conflicts, merged.shards) == (297, 300, 290, (), {"x"})
        state = (whole.counts(), whole.spend(), list(whole.rows()))
        again = whole.merge(reversed(parts))
        assert (again.calls, again.answers, again.attempts, again.rows, again.conflicts) == (0, 0, 0, 0, ())
        assert (whole.counts(), whole.spend(), list(whole.rows())) == state
        whole.verify()
        assert whole.counts().requested == 300
        assert whole.counts().answered == 297
        assert whole.spend().settled.tokens == 297 * 8
        assert whole.spend().reserved == worst
        assert len(whole.pending(9)) == 3
        assert len(whole.unshelved(1000)) == 294
        whole.permit(ENDPOINT, PRICE, MUCH)
        run(buy(whole, whole.pending(1)[0]))
    with RequestStore.open(tmp_path / "whole") as whole:
        assert whole.spend().settled.tokens == 298 * 8


def test_conflicts_of_a_merge_are_told_and_change_nothing(tmp_path: Path) -> None:
    one = filled(tmp_path / "one", rows(4), decide=lambda opened: opened.accept(["r1"]))
    two = filled(tmp_path / "two", rows(4), replace(ANSWER, text="five"), lambda opened: opened.reject([("r1", "wrong"), ("r2", "wrong")]))
    with RequestStore.open(two) as opened:
        opened.request([Row(row="r9", prompt="p", call=call("9?"))])
    with RequestStore.open(one) as opened:
        opened.request([Row(row="r9", prompt="p", call=call("other"))])
        found = opened.merge([two])
        assert sorted((conflict.what, conflict.of) for conflict in found.conflicts) == sorted(
            [("answer", call(f"{n}?").key) for n in (1, 2, 3)] + [("verdict", "r1"), ("call", "r9")]
        )
        assert [row.answer and row.answer.text for row in opened.rows()] == [None, "four", "four", "four", None]
        assert {row.row: row.verdict for row in opened.rows()} == {"r0": None, "r1": "accepted", "r2": "rejected", "r3": None, "r9": None}
        assert opened.spend().settled.tokens == 2 * 3 * 8  # both were paid
        opened.counts().require_conserved()
        assert {waiting.row for waiting in opened.pending(9)} == {"r0", "r9"}
        opened.verify()


def test_a_row_that_was_asked_again_elsewhere_is_that_row(tmp_path: Path) -> None:
    larger = call("1?", max_tokens=64)
    one = filled(tmp_path / "one", rows(2))
    two = filled(tmp_path / "two", rows(2), decide=lambda opened: opened.supersede("r1", larger, "truncated, twice"))
    for source, target in ((two, one), (one, two)):
        copy = tmp_path / f"copy of {target.name}"
        shutil.copy(target, copy)
        with RequestStore.open(copy) as opened:
            assert opened.merge([source]).conflicts == ()
            assert [row.key for row in opened.rows()] == [call("0?").key, larger.key]
            assert larger.key in [waiting.key for waiting in opened.pending(9)]
            assert opened.request(rows(2)) == Requested(known=2)
            opened.verify()


# -- many rows ----------------------------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_rows_in_little_memory(tmp_path: Path) -> None:
    with RequestStore.open(tmp_path / "s") as opened:
        tracemalloc.start()
        try:
            assert opened.request(rows(8_000)) == Requested(new=8_000)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 16 * 2**20
        assert opened.request(rows(92_000, 8_000)) == Requested(new=92_000)
    began = time.monotonic()
    with RequestStore.open(tmp_path / "s") as opened:
        assert opened.counts().pending == 100_000
        assert [one.row for one in opened.pending(2)] == ["r0", "r1"]
    assert time.monotonic() - began < 10
