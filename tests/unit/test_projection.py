"""What a pilot projects: its interval against populations whose total is known, the draw, and the caps that would do."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.collect.spend import Amount, Caps, Price
from stillroom.collect.store import Attempt
from stillroom.collect.wire import Usage
from stillroom.core.statistics import predicted_total
from stillroom.data import Prompt
from stillroom.runs.projection import Fate, Pilot, Whole, caps_needed, drawn, estimate, kept_pilot

PRICE = Price(as_of=date(2026, 11, 1), currency="USD", input=10**6, cached_input=5 * 10**5, output=4 * 10**6, reasoning=6 * 10**6, per_request=7)
PROMPTS = [Prompt.of(f"question {number}") for number in range(60)]

# Answers end by themselves, often early and now and then late, or are cut at a limit: populations as transfer sets have them.
POPULATIONS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "even": lambda chance: chance.normal(100, 20, 600),
    "skewed": lambda chance: 30 + chance.exponential(100, 600),
    "long and cut": lambda chance: np.minimum(chance.lognormal(4, 0.8, 600), 400),
}


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_interval_covers_about_as_often_as_it_says(name: str) -> None:
    """Whatever the draw: 300 samples of 20. At a true coverage of 0.9 fewer than 246 happen once in 100,000 times."""
    chance = np.random.default_rng()
    values = POPULATIONS[name](chance)
    covered = 0
    for _ in range(300):
        sample = chance.choice(values, 20, replace=False)
        found = predicted_total(sample, len(values) - 20, most=1000.0, resamples=400, seed=int(chance.integers(1 << 30)))
        assert found is not None
        covered += found.low <= values.sum() <= found.high
    assert covered >= 246, covered


def test_what_is_known_has_no_interval_and_one_value_knows_nothing_of_the_rest() -> None:
    whole = predicted_total([3.0, 5.0], 0)
    assert whole is not None
    assert (whole.value, whole.low, whole.high) == (8.0, 8.0, 8.0)
    one = predicted_total([3.0], 10, most=7.0)
    assert one is not None
    assert (one.value, one.low, one.high) == (33.0, 3.0, 73.0)
    assert predicted_total([3.0], 10) is None  # nothing bounds it
    assert predicted_total([], 10, most=7.0) is None
    equal = predicted_total([4.0] * 6, 10, most=7.0)
    assert equal is not None
    assert (equal.low, equal.high) == (64.0, 64.0)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.integers(0, 10**6))
def test_the_interval_has_its_value_and_keeps_to_what_can_be(values: list[float], more: int) -> None:
    found = predicted_total(values, more, most=2e6, resamples=100)
    assert found is not None
    total = math.fsum(values)
    slack = 1e-9 * (1 + total + 2e6 * more)
    assert found.low - slack <= found.value <= found.high + slack
    assert total - slack <= found.low
    assert found.high <= total + 2e6 * more + slack


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**31))
def test_a_larger_draw_contains_a_smaller_one_wherever_prompts_stand(few: int, more: int, seed: int) -> None:
    few, more = sorted((few, more))
    small, large = drawn(PROMPTS, few, seed), drawn(PROMPTS, more, seed)
    assert len(small) == few
    assert {prompt.id for prompt in small} <= {prompt.id for prompt in large}
    assert {prompt.id for prompt in drawn(PROMPTS[::-1], few, seed)} == {prompt.id for prompt in small}
    chosen = {prompt.id for prompt in large}
    assert [prompt.id for prompt in large] == [prompt.id for prompt in PROMPTS if prompt.id in chosen]


def test_a_draw_is_of_all_prompts_and_of_the_seed() -> None:
    assert drawn(PROMPTS, 1000, 0) == PROMPTS
    assert drawn([], 5, 0) == []
    first = {prompt.id for seed in range(400) for prompt in drawn(PROMPTS[:8], 1, seed)}
    assert len(first) == 8  # each comes first under some seed


def usage(prompt: int, completion: int, reasoning: int = 0, cached: int = 0) -> Usage:
    return Usage(prompt_tokens=prompt, completion_tokens=completion, reasoning_tokens=reasoning, cached_tokens=cached)


def attempt(counted: Usage | None, *, began: float = 0.0, held: int = 0, answered: bool = True) -> Attempt:
    return Attempt(answered=answered, usage=counted, held=Amount(held, held * 4 * 10**6), seconds=2.0, began=began)


def whole(**changes: object) -> Whole:
    fields: dict[str, object] = {
        "prompts": 10,
        "items": 2,
        "bought": 4,
        "used": Amount(),
        "worst": Amount(500, 500),
        "worst_mean": Amount(400, 10**10),
    }
    return Whole(**fields | changes)  # type: ignore[arg-type]


def test_rows_cost_what_was_counted_of_every_attempt() -> None:
    """Cached and reasoning tokens at their own prices, and a request that was billed without an answer with the others of its row."""
    rows = [
        Fate(attempts=[attempt(usage(100, 20, 5, 40), answered=False), attempt(usage(100, 30, 10, 0), began=1.0)]),
        Fate(attempts=[attempt(None, held=300, began=10.0)]),
        Fate(failed="invalid-request"),
        Fate(left_out="too-long"),
    ]
    first = (60 * 10**6 + 40 * 5 * 10**5 + 15 * 4 * 10**6 + 5 * 6 * 10**6 + 7) + (100 * 10**6 + 20 * 4 * 10**6 + 10 * 6 * 10**6 + 7)
    assert rows[0].charged(PRICE) == Amount(250, first)
    assert rows[0].charged(None) == Amount(250, 0)
    found = estimate(rows, whole(bought=12, used=Amount(550, first)), PRICE, day="2026-11-29", asks="x")
    assert found.tokens.value == pytest.approx(250 + 8 * 250 / 4)
    assert found.money is not None
    assert found.money.value == pytest.approx(3 * first / 1e12)
    assert (found.failed, found.left_out, found.unknown) == ({"invalid-request": 1}, {"too-long": 1}, 1)
    assert (found.prompt_tokens, found.completion_tokens, found.reasoning_tokens) == (100, 30, 10)
    assert found.answers_per_second == pytest.approx(2 / 5)  # from 0 to 3 and from 10 to 12 something was under way
    # All has been bought: no more is needed than is used.
    assert found.cap_tokens_needed == 550
    assert found.suffices(Caps(tokens=550, money=first))
    assert not found.suffices(Caps(tokens=549))
    assert not found.suffices(Caps(money=first - 1))


def test_the_caps_that_would_do_hold_what_is_used_what_is_to_come_and_the_worst_of_the_last_call() -> None:
    rows = [Fate(attempts=[attempt(usage(50, 50))]) for _ in range(4)]
    found = estimate(rows, whole(used=Amount(1400, 0)), None, day="2026-11-29", asks="x")
    assert (found.money, found.cap_money_needed, found.price) == (None, None, None)
    assert found.cap_tokens_needed == 1400 + 8 * 100 + 500
    assert not found.suffices(Caps(money=10**15))  # nobody knows what it costs
    assert caps_needed(found) == "collection.max_tokens: 2700"
    held = estimate([Fate(attempts=[attempt(None, held=350)]) for _ in range(4)], whole(used=Amount(1400, 0)), None, day="", asks="")
    assert held.tokens.value == 0
    assert held.cap_tokens_needed == 1400 + 8 * 350 + 500  # what is never counted stays reserved


def test_what_this_version_cannot_read_is_no_pilot() -> None:
    rows = [Fate(attempts=[attempt(usage(50, 50))])]
    found = estimate(rows, whole(), PRICE, day="2026-11-29", asks="x")
    kept = found.model_dump(mode="json")
    assert kept_pilot(kept) == found
    assert isinstance(kept_pilot(kept), Pilot)
    assert kept_pilot(None) is None
    assert kept_pilot({}) is None
    assert kept_pilot(kept | {"rows": "many"}) is None
    assert kept_pilot(kept | {"unheard": 1}) is None
