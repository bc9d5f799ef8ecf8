"""The rate controller, on a simulated endpoint and a simulated clock: nothing here waits."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rate_simulation import Phase, Simulation
from stillroom.collect.rate import BURST_SECONDS, RateController, Ticket
from stillroom.collect.wire import Rates

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
    made = Simulation([Phase(0, concurrency=32)], 120, headers=False, retry_after=False).run()
    assert len(made.served) / 120 >= 0.7 * 32 / 0.06
    assert len(made.refusals) < 0.01 * len(made.served)


@pytest.mark.parametrize("kind", ["requests", "concurrency"])
def test_without_a_word_of_limits_long_answers_are_asked_for_about_as_fast_as_is_allowed(kind: str) -> None:
    """With ten seconds for an answer, a limit that falls to half and comes back."""
    phases = [
        Phase(at, 900 * share) if kind == "requests" else Phase(at, concurrency=round(128 * share)) for at, share in ((0, 1), (300, 0.5), (600, 1))
    ]
    made = Simulation(phases, 900, latency=10.0, network_seconds=0.02, headers=False).run()
    assert made.allowed_rate_taken >= 0.8
    assert made.refused_share <= 0.02


def test_what_long_answers_take_of_a_limit_on_tokens_is_known_after_the_first_of_them() -> None:
    made = Simulation([Phase(0, None, 90_000)], 300, latency=10.0, network_seconds=0.02).run()
    assert made.allowed_rate_taken >= 0.9
    assert made.refused_share <= 0.01


def test_a_rate_that_was_learnt_too_low_is_left_again() -> None:
    """Found by a schedule of faults on a busy machine: a rate of less than a call in three seconds was kept for ever."""
    made = Simulation([Phase(0)], 120, headers=False)
    controller = RateController(
        lambda: made.now, state={"buckets": {"requests": {"rate": 1 / 60, "told": False, "trim": 1.0}}, "ceiling": 8, "concurrency": 8}
    )
    made.run(controller)
    assert sum(at > 90 for at in made.served) > 1000


def test_an_endpoint_that_fails_often_is_still_asked() -> None:
    """Found by a schedule of faults: overloads, a quarter of all answers, say nothing of a rate, and are not to lower one without end."""
    time = Time()
    controller = RateController(time, state={"buckets": {"requests": {"rate": 20.0, "told": False, "trim": 1.0}}, "ceiling": 8, "concurrency": 8})
    begun = 0
    while time.now < 120:
        answer = controller.start(10)
        if isinstance(answer, float):
            time.now += answer
            continue
        begun += 1
        time.now += 0.05
        controller.finish(answer, "overloaded" if begun % 4 == 0 else "answered", used_tokens=10)
    assert begun / 120 > 5


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
