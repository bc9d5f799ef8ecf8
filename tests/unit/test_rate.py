"""The rate controller, on a simulated endpoint and a simulated clock: nothing here waits."""

from __future__ import annotations

import heapq
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.collect.rate import BURST_SECONDS, RateController, Signal, Ticket
from stillroom.collect.wire import Rates


@dataclass
class Phase:
    """Limits from a moment on, per minute; None is no limit."""

    at: float
    requests: float | None
    tokens: float | None = None


@dataclass
class Bucket:
    burst_seconds: float
    per_second: float | None = None
    level: float = 0.0
    allowed: float = 0.0
    begun: bool = False

    def set_rate(self, per_minute: float | None) -> None:
        self.per_second = None if per_minute is None else per_minute / 60
        if self.per_second is not None:
            self.level = min(self.level, self.capacity) if self.begun else self.capacity
            self.begun = True

    @property
    def capacity(self) -> float:
        return max((self.per_second or 0) * self.burst_seconds, 1.0)

    def pass_seconds(self, seconds: float) -> None:
        if self.per_second is not None:
            self.level = min(self.level + self.per_second * seconds, self.capacity)
            self.allowed += self.per_second * seconds

    def wait(self, amount: float) -> float:
        return 0.0 if self.per_second is None else max(min(amount, self.capacity) - self.level, 0.0) / self.per_second


@dataclass
class Simulation:
    """An endpoint behind a network, and a client that always has something to send."""

    phases: Sequence[Phase]
    seconds: float
    latency: float = 0.05
    jitter: float = 0.3
    headers: bool = True
    retry_after: bool = True
    concurrency: int | None = None
    tokens: int = 100
    worst: int = 300
    charged: int | None = None
    burst_seconds: float = 1.0
    largest: int = 256
    seed: int = 0
    now: float = 0.0
    refusals: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    usable: float = 0.0
    wake_at: float = -1.0

    def run(self, controller: RateController | None = None) -> Simulation:
        self.controller = controller or RateController(lambda: self.now, largest_concurrency=self.largest)
        self.requests, self.token = Bucket(self.burst_seconds), Bucket(self.burst_seconds)
        self.random, self.events, self.working, self.counter = random.Random(self.seed), [], 0, 0
        self.phase = -1
        for at in [phase.at for phase in self.phases]:
            self.put(at, "phase", None)
        while self.events and self.events[0][0] < self.seconds:
            at, _, kind, what = heapq.heappop(self.events)
            self.move(at)
            getattr(self, f"on_{kind}")(what)
            self.send()
        self.move(self.seconds)
        return self

    def put(self, at: float, kind: str, what: object) -> None:
        self.counter += 1
        heapq.heappush(self.events, (at, self.counter, kind, what))

    def move(self, at: float) -> None:
        passed, self.now = at - self.now, at
        self.requests.pass_seconds(passed)
        self.token.pass_seconds(passed)
        rates = [rate for rate in (self.requests.per_second, self.token.per_second and self.token.per_second / (self.charged or self.tokens)) if rate]
        self.usable += min(rates, default=0.0) * passed

    def send(self) -> None:
        while not isinstance(answer := self.controller.start(self.worst), float):
            self.starts.append(self.now)
            self.put(self.now + self.network(), "arrive", answer)
        at = self.now + max(answer, 1e-6)
        if at < self.wake_at or self.wake_at <= self.now:  # an earlier one looks again anyway
            self.wake_at = at
            if math.isfinite(at):
                self.put(at, "wake", None)

    def network(self) -> float:
        return self.latency / 10 * self.random.uniform(1 - self.jitter, 1 + self.jitter)

    def on_phase(self, _: object) -> None:
        self.phase += 1
        self.requests.set_rate(self.phases[self.phase].requests)
        self.token.set_rate(self.phases[self.phase].tokens)

    def on_wake(self, _: object) -> None:
        pass

    def on_arrive(self, ticket: Ticket) -> None:
        charge = self.charged or self.tokens
        wait = max(self.requests.wait(1), self.token.wait(charge))
        full = self.concurrency is not None and self.working >= self.concurrency
        if wait > 1e-9 or full:
            self.put(self.now + self.network(), "answer", (ticket, "refused", self.rates(), wait if self.retry_after else None))
            return
        self.requests.level -= 1
        self.token.level -= charge
        self.working += 1
        self.put(self.now + self.latency * self.random.uniform(1 - self.jitter, 1 + self.jitter), "worked", ticket)

    def on_worked(self, ticket: Ticket) -> None:
        self.working -= 1
        self.put(self.now + self.network(), "answer", (ticket, "answered", self.rates(), None))

    def on_answer(self, what: tuple[Ticket, Signal, Rates | None, float | None]) -> None:
        ticket, signal, rates, wait = what
        (self.refusals if signal == "refused" else self.served).append(self.now)
        used = self.tokens if signal == "answered" else None
        self.controller.finish(ticket, signal, used_tokens=used, rates=rates, retry_after_seconds=wait)

    def rates(self) -> Rates | None:
        if not self.headers:
            return None
        known = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.token)):
            if bucket.per_second is not None:
                known[f"{name}_limit"] = round(bucket.per_second * 60)
                known[f"{name}_left"] = max(math.floor(bucket.level), 0)
                known[f"{name}_reset_seconds"] = bucket.wait(bucket.capacity)
        return Rates(**known)

    @property
    def allowed_rate_used(self) -> float:
        return len(self.served) / self.usable


MOVING = (Phase(0, 6000), Phase(20, 3000), Phase(40, 6000), Phase(60, 1500), Phase(80, 6000), Phase(100, 12000))
MOVING_TOKENS = tuple(Phase(phase.at, 60_000, (phase.requests or 0) * 100) for phase in MOVING)
LOW = tuple(Phase(phase.at, (phase.requests or 0) / 20) for phase in MOVING)


@pytest.mark.parametrize(
    ("name", "made", "least", "refusals"),
    [
        ("requests", Simulation(MOVING, 120), 0.95, 5),
        ("tokens", Simulation(MOVING_TOKENS, 120), 0.95, 5),
        ("tokens, charged by what was asked for", Simulation(MOVING_TOKENS, 120, charged=300), 0.95, 40),
        ("few a minute", Simulation(LOW, 120), 0.94, 20),
        ("no retry-after", Simulation(MOVING, 120, retry_after=False), 0.95, 5),
    ],
)
def test_moving_limits_are_used_and_hardly_ever_met(name: str, made: Simulation, least: float, refusals: int) -> None:
    made.run()
    assert made.allowed_rate_used >= least, name
    assert len(made.refusals) <= refusals, name


def test_after_a_limit_rises_the_new_rate_is_reached_at_once_and_after_it_falls_refusals_end() -> None:
    made = Simulation(MOVING, 120).run()
    for begin, rate in ((20, 50), (40, 100), (60, 25), (80, 100), (100, 200)):
        served = sum(begin + 1 <= at < begin + 3 for at in made.served)
        assert served >= 0.9 * 2 * rate
        assert not [at for at in made.refusals if at > begin + 2 and at < begin + 20]


def test_without_any_word_of_limits_most_of_a_rate_is_found_by_refusals() -> None:
    made = Simulation(MOVING, 120, headers=False, retry_after=False).run()
    assert made.allowed_rate_used >= 0.7
    assert len(made.refusals) < 0.03 * len(made.served)


def test_a_limit_on_concurrency_is_found_and_kept_to() -> None:
    made = Simulation([Phase(0, None)], 120, headers=False, retry_after=False, concurrency=32).run()
    assert len(made.served) / 120 >= 0.7 * 32 / 0.06
    assert len(made.refusals) < 0.01 * len(made.served)


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_only_the_first_refusal_of_a_burst_has_an_effect() -> None:
    time = Time()
    controller = RateController(time, largest_concurrency=64, state={"concurrency": 40})
    tickets = [controller.start(10) for _ in range(40)]
    assert controller.start(10) == math.inf
    time.now = 0.1
    for ticket in tickets:
        assert isinstance(ticket, Ticket)
        controller.finish(ticket, "refused")
    assert controller.concurrency == 30
    assert controller.refusals == 40


def test_retry_after_is_waited_for_and_an_endpoint_that_only_refuses_is_asked_ever_more_rarely() -> None:
    time = Time()
    controller = RateController(time)
    ticket = controller.start(10)
    assert isinstance(ticket, Ticket)
    controller.finish(ticket, "refused", retry_after_seconds=7)
    assert controller.start(10) == pytest.approx(7)
    asked = 0
    while time.now < 600:
        answer = controller.start(10)
        if isinstance(answer, float):
            time.now += answer
        else:
            asked += 1
            time.now += 0.05
            controller.finish(answer, "refused")
    assert asked < 25


def test_a_limit_of_a_day_is_not_taken_for_one_of_a_minute() -> None:
    time = Time()
    controller = RateController(time)
    ticket = controller.start(10)
    assert isinstance(ticket, Ticket)
    # 14,400 a day, 720 of them used: all are there again in 72 minutes
    controller.finish(ticket, "answered", used_tokens=5, rates=Rates(requests_limit=14400, requests_left=13680, requests_reset_seconds=4320))
    assert controller.to_json()["buckets"]["requests"]["rate"] == pytest.approx(14400 / 86400)


SIGNALS = st.sampled_from(["answered", "refused", "overloaded", "failed", "unsent"])
COUNTS = st.none() | st.integers(0, 10**6)
SECONDS = st.none() | st.floats(0, 100)
RATES = st.none() | st.builds(
    Rates,
    requests_limit=COUNTS, requests_left=COUNTS, requests_reset_seconds=SECONDS, tokens_limit=COUNTS, tokens_left=COUNTS, tokens_reset_seconds=SECONDS,
)  # fmt: skip
STEPS = st.lists(st.tuples(st.floats(0, 5), SIGNALS, st.none() | st.integers(0, 5000), RATES, SECONDS, st.booleans()), max_size=60)


@settings(max_examples=200)
@given(STEPS, st.integers(1, 40))
def test_whatever_an_endpoint_says_the_controller_lets_calls_go_again_and_never_more_than_allowed(steps: list, largest: int) -> None:
    time = Time()
    controller = RateController(time, largest_concurrency=largest)
    flying: list[Ticket] = []
    for passed, signal, used, rates, wait, end in steps:
        time.now += passed
        answer = controller.start(1000)
        if isinstance(answer, float):
            assert answer > 0
            assert flying or answer < math.inf  # nobody waits for an answer that cannot come
        else:
            flying.append(answer)
        assert controller.in_flight == len(flying) <= largest
        if end and flying:
            controller.finish(flying.pop(0), signal, used_tokens=used, rates=rates, retry_after_seconds=wait)
    for ticket in flying:
        controller.finish(ticket, "answered")
    for _ in range(100):  # waits add up to a moment at which one may go
        answer = controller.start(1000)
        if isinstance(answer, Ticket):
            break
        assert math.isfinite(answer)
        time.now += answer
    else:
        pytest.fail("stuck")


@settings(max_examples=50)
@given(st.integers(1, 20_000), st.floats(0.01, 2), st.integers(0, 2**32))
def test_never_above_the_rate_it_was_told(limit: int, latency: float, seed: int) -> None:
    made = Simulation([Phase(0, limit)], min(20.0, 60 * 200 / limit + 2 * latency), latency=latency, seed=seed, largest=50).run()
    if not made.served:
        return
    known = made.served[0]
    rate = limit / 60
    starts = [at for at in made.starts if at > known]
    for index in range(0, len(starts), 7):
        for other in range(index, len(starts), 11):
            assert other - index <= rate * (starts[other] - starts[index]) + rate * BURST_SECONDS + 2


def test_what_was_learnt_is_kept_as_json() -> None:
    made = Simulation(MOVING_TOKENS, 50, charged=300).run()
    state = json.loads(json.dumps(made.controller.to_json(), allow_nan=False))
    again = RateController(Time(), largest_concurrency=256, state=state)
    assert again.to_json() == state
    later = Simulation([Phase(0, 60_000, 600_000)], 20, charged=300)
    later.run(RateController(lambda: later.now, state=state))
    assert len(later.refusals) <= 5
    assert later.allowed_rate_used >= 0.9


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda of: st.lists(of) | st.dictionaries(st.sampled_from(["buckets", "requests", "rate", "trim", "concurrency", "ceiling", "told"]), of)))  # fmt: skip
def test_a_state_that_is_no_state_is_only_a_worse_beginning(state: object) -> None:
    controller = RateController(Time(), state=state if isinstance(state, dict) else {"buckets": state, "concurrency": state, "ceiling": state})
    assert isinstance(controller.start(10), Ticket)
