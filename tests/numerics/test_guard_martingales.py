"""Tests by betting: fair under the null whatever one does, at any time one stops; never far from the best strategy; the same in one piece or in many."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from stillroom.core.errors import GuardError
from stillroom.guard import martingales
from stillroom.guard.laws import log_binomial_tail
from stillroom.guard.martingales import Bet, Bounded, Signs, Symmetric, Uniform, Wealth, log_average, log_e_of_p, log_product

BETS: tuple[Bet, ...] = (Bounded(0.25), Bounded(0.001), Signs(), Symmetric(), Uniform())
# A count of rejections this unlikely under what is claimed fails a test.
IMPOSSIBLE = math.log(1e-6)


def wealths(bet: Bet, values_RN: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Ln e at the end, and ln of the highest, of each of R paths."""
    found = [Wealth.of(bet).after(values_N) for values_N in values_RN]
    return numpy.array([one.log_e for one in found]), numpy.array([one.log_highest for one in found])


def few_enough(rejections: int, trials: int, alpha: float) -> bool:
    return log_binomial_tail(trials, alpha, rejections) > IMPOSSIBLE


@pytest.mark.parametrize(("bet", "outcomes"), [
    (Bounded(0.25), ((0.0, 0.75), (1.0, 0.25))),
    (Bounded(0.25), ((0.0, 0.5), (0.5, 0.5))),
    (Bounded(0.01), ((0.0, 0.99), (1.0, 0.01))),
    (Signs(), ((-3.0, 0.3), (0.0, 0.4), (7.0, 0.3))),
    (Symmetric(), ((-1.0, 0.25), (1.0, 0.25), (-8.0, 0.25), (8.0, 0.25))),
])  # fmt: skip
def test_the_expectation_of_wealth_is_one(bet: Bet, outcomes: tuple[tuple[float, float], ...]) -> None:
    """Over all paths of some values, exactly."""
    total = 0.0
    for path in itertools.product(outcomes, repeat=8 if len(outcomes) == 2 else 5):
        total += math.prod(share for _, share in path) * math.exp(Wealth.of(bet).after([value for value, _ in path]).log_e)
    assert total == pytest.approx(1.0, rel=1e-11)


def test_a_smaller_mean_or_larger_ps_lose() -> None:
    """The null is a bound: 1 is an upper limit of the expectation for means below and for p's above uniform ones."""
    for bet, outcomes in (
        (Bounded(0.25), ((0.0, 0.8), (1.0, 0.2))),
        (Uniform(), tuple((number / 8, 1 / 8) for number in range(1, 9))),
    ):
        for length in (1, 2, 4):
            total = sum(
                math.prod(share for _, share in path) * math.exp(Wealth.of(bet).after([value for value, _ in path]).log_e)
                for path in itertools.product(outcomes, repeat=length)
            )
            assert total < 1.0


def test_calibrators_integrate_to_one() -> None:
    """The mean over a fine grid of p's is below the integral, which is 1, and tends to it."""
    grid = (numpy.arange(1 << 14) + 1.0) / (1 << 14)
    gains = numpy.exp(martingales._uniform_log_gains(numpy.log(grid))).mean(axis=0)
    assert (gains < 1.0).all()
    edge = (1 << 14) ** -martingales._POWERS  # what lies left of the first point, of which the grid has its lowest value only
    assert (gains + edge > 1.0).all()


PATHS, STEPS = 2000, 300


def draws(kind: str) -> tuple[Bet, numpy.ndarray]:
    """Null paths: fair in each step given the past, and otherwise as awkward as they come."""
    generator = numpy.random.default_rng(0)
    uniform = generator.random((PATHS, STEPS))
    signs = numpy.where(generator.random((PATHS, STEPS)) < 0.5, -1.0, 1.0)
    match kind:
        case "hits":
            return Bounded(0.25), (uniform < 0.25).astype(float)
        case "rare hits":
            return Bounded(0.001), (uniform < 0.001).astype(float)
        case "spread that depends on the past":
            hits = uniform < 0.25
            after_hit = numpy.hstack([numpy.zeros((PATHS, 1), bool), hits[:, :-1]])
            return Bounded(0.25), numpy.where(after_hit, hits, 0.25 + 0.25 * (uniform - 0.5))
        case "signs":
            return Signs(), signs
        case "heavy tails":
            return Symmetric(), signs * numpy.abs(generator.standard_cauchy((PATHS, STEPS)))
        case "sizes that depend on the past":
            growing = numpy.exp(0.2 * numpy.abs(numpy.hstack([numpy.zeros((PATHS, 1)), numpy.cumsum(signs, axis=1)[:, :-1]])))
            return Symmetric(), signs * growing
        case "gumbel":
            return Uniform(), 1.0 - uniform
        case "coarse p":
            return Uniform(), numpy.ceil(uniform * 20 + 1e-12) / 20
        case _:
            raise AssertionError(kind)


KINDS = ("hits", "rare hits", "spread that depends on the past", "signs", "heavy tails", "sizes that depend on the past", "gumbel", "coarse p")


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_at_the_highest_rejects_no_oftener_than_alpha(kind: str) -> None:
    """P7: whoever stops at the best moment of 300 has seen the highest wealth there was."""
    bet, values = draws(kind)
    _, highest = wealths(bet, values)
    for alpha in (0.5, 0.05, 0.01):
        assert few_enough(int((highest >= -math.log(alpha)).sum()), PATHS, alpha)


def test_a_fixed_test_that_is_looked_at_again_and_again_does_reject_oftener() -> None:
    """P7, planted: the exact binomial p, stopped where it is smallest, is no p any more; a product of e-values of the same looks would be one."""
    _, values = draws("hits")
    hits = values[:400].cumsum(axis=1).astype(int)
    tails = {n: [log_binomial_tail(n, 0.25, count) for count in range(n + 1)] for n in range(10, STEPS + 1, 5)}
    stopped = sum(any(tails[n][path[n - 1]] <= math.log(0.05) for n in tails) for path in hits)
    assert not few_enough(stopped, 400, 0.05)


@pytest.mark.parametrize("bet", BETS)
@given(data=st.data())
@settings(max_examples=25)
def test_pieces_make_no_difference_nor_does_a_stop_between(bet: Bet, data: st.DataObject) -> None:
    low, high = {Bounded: (0.0, 1.0), Uniform: (1e-12, 1.0)}.get(type(bet), (-1e3, 1e3))
    values = data.draw(st.lists(st.floats(low, high), max_size=30))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    whole, pieces = Wealth.of(bet).after(values), Wealth.of(bet)
    for begin, end in itertools.pairwise([0, *cuts, len(values)]):
        pieces = Wealth.from_json(json.loads(json.dumps(pieces.after(values[begin:end]).as_json())))
    assert pieces.count == whole.count == len(values)
    assert pieces.log_e == pytest.approx(whole.log_e, abs=1e-9)
    assert pieces.log_highest == pytest.approx(whole.log_highest, abs=1e-9)
    assert whole.log_highest >= max(0.0, whole.log_e) - 1e-12
    assert whole.log_p <= 0.0


def test_many_values_are_taken_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = numpy.random.default_rng(0).normal(0.1, 1.0, 5000)
    whole = Wealth.of(Symmetric()).after(values)
    monkeypatch.setattr(martingales, "_AT_ONCE", 7)
    pieces = Wealth.of(Symmetric()).after(values)
    assert pieces.log_e == pytest.approx(whole.log_e, rel=1e-9)
    assert pieces.log_highest == pytest.approx(whole.log_highest, rel=1e-9)


@pytest.mark.parametrize("bet", [Bounded(0.25), Signs()])
def test_the_mixture_is_near_the_best_strategy_in_hindsight(bet: Bet) -> None:
    values = (numpy.random.default_rng(0).random(20_000) < 0.27).astype(float) if isinstance(bet, Bounded) else numpy.where(
        numpy.random.default_rng(0).random(20_000) < 0.52, 1.0, -1.0
    )  # fmt: skip
    found = Wealth.of(bet).after(values)
    best = max(found.log_wealth_K)
    assert best - math.log(len(found.log_wealth_K)) <= found.log_e <= best
    # and the best of the grid is near the best constant there is, which is Kelly's: n times a relative entropy
    share, null = (values.mean(), 0.25) if isinstance(bet, Bounded) else ((values > 0).mean(), 0.5)
    kelly = 20_000 * (special.rel_entr(share, null) + special.rel_entr(1 - share, 1 - null))
    assert found.log_e >= 0.8 * kelly - math.log(len(found.log_wealth_K))


def test_a_power_of_the_planted_effects() -> None:
    """Effects that a fixed test of the same size finds with certainty are found by every bet."""
    generator = numpy.random.default_rng(0)
    hits = Wealth.of(Bounded(1 / 1000)).after([0, 0, 1, 0, 1, 0, 0, 1, 0, 0])
    assert hits.log_p < math.log(1e-5)
    twins = Wealth.of(Symmetric()).after(generator.normal(0.2, 1.0, 3000))
    assert twins.log_p < math.log(1e-6)
    gumbel = Wealth.of(Uniform()).after(generator.random(3000) ** 1.2)
    assert gumbel.log_p < math.log(1e-6)


def test_zero_differences_say_nothing() -> None:
    values = [1.0, -2.0, 3.0, 3.0]
    padded = [0.0, 1.0, 0.0, -2.0, 3.0, 0.0, 3.0, 0.0]
    assert Wealth.of(Signs()).after(padded).log_e == pytest.approx(Wealth.of(Signs()).after(values).log_e)
    for bet in (Signs(), Symmetric()):
        assert Wealth.of(bet).after(numpy.zeros(100)).log_e == 0.0
        assert Wealth.of(bet).log_e == 0.0
        assert Wealth.of(bet).log_p == 0.0


@pytest.mark.parametrize("bet", [Signs(), Symmetric()])
def test_flipping_all_coins_flips_what_is_betted_on(bet: Bet) -> None:
    """Under the null a path and its mirror are equally likely: their mean wealth is at most that of either strategy's mean, not above 1 for one step."""
    up, down = Wealth.of(bet).after([2.5]), Wealth.of(bet).after([-2.5])
    assert (math.exp(up.log_e) + math.exp(down.log_e)) / 2 == pytest.approx(1.0)


def test_sizes_do_not_matter_to_a_scale_free_bet() -> None:
    values = numpy.random.default_rng(1).normal(0.1, 1.0, 200)
    assert Wealth.of(Symmetric()).after(values * 1e-6).log_e == pytest.approx(Wealth.of(Symmetric()).after(values * 1e6).log_e)


@pytest.mark.parametrize(
    ("bet", "values"),
    [
        (Bounded(0.5), [1.5]),
        (Bounded(0.5), [-0.1]),
        (Bounded(0.5), [math.nan]),
        (Uniform(), [0.0]),
        (Uniform(), [1.0001]),
        (Signs(), [math.inf]),
        (Symmetric(), [[1.0]]),
    ],
)
def test_values_out_of_range_are_refused_and_never_dropped(bet: Bet, values: list[object]) -> None:
    with pytest.raises(ValueError, match="values"):
        Wealth.of(bet).after(values)


def test_a_mean_that_is_none_is_refused() -> None:
    for mean in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="mean"):
            Bounded(mean)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"bet": {"kind": "certain"}},
        {"bet": {"kind": "bounded", "mean": 2.0}},
        {"log_wealth": [0.0]},
        {"log_wealth": None},
        {"count": -1},
        {"log_highest": -1.0},
        {"log_highest": math.nan},
        {"squares": math.inf},
    ],
)
def test_a_state_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(GuardError, match="guard-evidence"):
        Wealth.from_json(Wealth.of(Bounded(0.5)).after([1.0, 0.0]).as_json() | change)


def test_a_state_that_forgot_its_highest_is_refused() -> None:
    wealth = Wealth.of(Bounded(0.001)).after([1.0])
    with pytest.raises(GuardError, match="guard-evidence"):
        Wealth.from_json(replace(wealth, log_highest=0.0).as_json())


def test_a_mean_of_dependent_e_values_is_one_and_their_product_is_not() -> None:
    """The same coins looked at by five tests, over all paths of eight: the product counts them five times."""
    ends = [Wealth.of(Signs()).after(path).log_e for path in itertools.product((-1.0, 1.0), repeat=8)]
    assert numpy.mean([math.exp(log_average([end] * 5)) for end in ends]) == pytest.approx(1.0)
    assert numpy.mean([math.exp(log_product([end] * 5)) for end in ends]) > 1000.0


def test_a_product_over_disjoint_data_is_the_wealth_of_all_of_it() -> None:
    """The expectation over independent coins, exactly: a product of two e-values has expectation 1."""
    paths = list(itertools.product((-1.0, 1.0), repeat=5))
    ends = [Wealth.of(Signs()).after(path).log_e for path in paths]
    mean = sum(math.exp(log_product([a, b])) for a in ends for b in ends) / len(paths) ** 2
    assert mean == pytest.approx(1.0)
    with pytest.raises(ValueError, match="nothing"):
        log_average([])


def test_an_e_value_of_a_p_falls_in_it_and_is_finite_where_p_is_no_float() -> None:
    found = [log_e_of_p(log_p) for log_p in (0.0, -1.0, -10.0, -100.0, -1000.0, -1e6)]
    assert found == sorted(found)
    assert found[0] < 0.0
    assert 0.9 * 1e6 < found[-1] < 1e6
    assert log_e_of_p(-5.0) == pytest.approx(Wealth.of(Uniform()).after([math.exp(-5.0)]).log_e)
    with pytest.raises(ValueError, match="above 0"):
        log_e_of_p(0.1)
