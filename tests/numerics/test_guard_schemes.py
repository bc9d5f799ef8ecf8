"""The schemes against their formulas: what a key does to a distribution, that two of them do not distort it, and the laws of the scores."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from guard_cases import CHANCE, key, more_than_chance
from stillroom.core.errors import GuardError
from stillroom.guard import prf
from stillroom.guard.gumbel import GumbelMax
from stillroom.guard.red_green import RedGreen
from stillroom.guard.schemes import SCHEMES, Scheme, scheme_from_json
from stillroom.guard.tournament import Tournament, winners

PLAIN = [RedGreen(window=2), GumbelMax(window=2), Tournament(window=2)]
DISTRIBUTIONS = {
    "two": np.ones(2) / 2,
    "skewed": np.array([0.9, 0.07, 0.02, 0.01]),
    "six": np.array([0.3, 0.25, 0.2, 0.15, 0.07, 0.03]),
    "with none": np.array([0.5, 0.0, 0.3, 0.2]),
}


def logs(probabilities: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(probabilities)


def over_windows(scheme: Scheme, probabilities: np.ndarray, keys: int, windows: int) -> np.ndarray:
    """The watermarked distributions after many windows under several keys, one a row."""
    size = len(probabilities)
    found = []
    for number in range(keys):
        places = np.column_stack([np.full(windows, number), np.arange(windows)])
        rows = np.broadcast_to(logs(probabilities), (windows, size))
        found.append(np.exp(scheme.watermarked(key(number), places, np.broadcast_to(np.arange(size), (windows, size)), rows)))
    return np.concatenate(found)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "scheme", [GumbelMax(window=2), Tournament(window=2), Tournament(window=2, layers=1)], ids=["gumbel", "20 layers", "1 layer"]
)
def test_over_keys_the_distribution_is_the_model_s(scheme: Scheme, name: str) -> None:
    """Tokens drawn from the watermarked distributions, counted, against the model's: chi-square at one in a million."""
    probabilities = DISTRIBUTIONS[name]
    found = over_windows(scheme, probabilities, keys=20, windows=1000)
    assert found.sum(axis=1) == pytest.approx(1.0)
    drawn = (found.cumsum(axis=1) > np.random.default_rng(0).random((len(found), 1))).argmax(axis=1)
    counts = np.bincount(drawn, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    some = probabilities > 0
    assert stats.chisquare(counts[some], probabilities[some] * len(found)).pvalue > CHANCE


def test_red_green_distorts_and_the_same_test_sees_it() -> None:
    probabilities = DISTRIBUTIONS["skewed"]
    counts = over_windows(RedGreen(window=2), probabilities, keys=20, windows=1000).sum(axis=0)
    assert stats.chisquare(counts, probabilities * counts.sum()).pvalue < CHANCE


def test_red_green_is_its_formula() -> None:
    scheme = RedGreen(window=2, gamma=0.3, delta=1.7)
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(9), size=50)
    windows, candidates = rng.integers(0, 99, size=(50, 2)), rng.permuted(np.broadcast_to(np.arange(9) * 11, (50, 9)), axis=1)
    found = np.exp(scheme.watermarked(key(0), windows, candidates, np.log(probabilities)))
    green = prf.uniform(prf.keyed_candidates(key(0), "redgreen", windows, candidates)) < 0.3
    raised = probabilities * np.where(green, math.exp(1.7), 1.0)
    assert found == pytest.approx(raised / raised.sum(axis=1, keepdims=True), rel=1e-12)
    assert (scheme.scores(key(0), np.repeat(windows, 9, axis=0), candidates.reshape(-1)) == green.reshape(-1)).all()


def test_gumbel_takes_the_token_with_the_largest_root() -> None:
    scheme = GumbelMax(window=2)
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(9), size=200)
    windows, candidates = rng.integers(0, 99, size=(200, 2)), np.broadcast_to(np.arange(9), (200, 9))
    found = np.exp(scheme.watermarked(key(0), windows, candidates, np.log(probabilities)))
    uniforms = prf.uniform(prf.keyed_candidates(key(0), "gumbel", windows, candidates))
    assert (found.argmax(axis=1) == (uniforms ** (1.0 / probabilities)).argmax(axis=1)).all()
    assert ((found == 0.0) | (found == 1.0)).all()
    assert (found.sum(axis=1) == 1.0).all()
    chosen = found.argmax(axis=1)
    assert scheme.scores(key(0), windows, chosen) == pytest.approx(-np.log1p(-uniforms[np.arange(200), chosen]))


def every_coin(size: int, layers: int) -> np.ndarray:
    return np.array(list(itertools.product((0, 1), repeat=size * layers)), dtype=np.uint8).reshape(-1, size, layers)


@pytest.mark.parametrize(("size", "layers"), [(2, 1), (3, 1), (2, 3), (3, 3), (4, 2)])
def test_over_all_coins_a_tournament_distorts_nothing(size: int, layers: int) -> None:
    probabilities = np.arange(1, size + 1) / np.arange(1, size + 1).sum()
    coins = every_coin(size, layers)
    found = winners(np.broadcast_to(probabilities, (len(coins), size)), coins)
    assert found.mean(axis=0) == pytest.approx(probabilities, abs=1e-14)


def test_a_tournament_s_distribution_is_that_of_its_matches() -> None:
    """Two layers: four tokens drawn from p, two matches by the first coin, one by the second; ties by a fair coin. All outcomes are enumerated."""
    probabilities = np.array([0.6, 0.3, 0.1])

    def better(one: int, other: int, coins: np.ndarray) -> dict[int, float]:
        if coins[one] == coins[other]:
            return {one: 0.5, other: 0.5} if one != other else {one: 1.0}
        return {one if coins[one] > coins[other] else other: 1.0}

    for coins in every_coin(3, 2):
        expected = np.zeros(3)
        for a, b, c, d in itertools.product(range(3), repeat=4):
            for left, in_left in better(a, b, coins[:, 0]).items():
                for right, in_right in better(c, d, coins[:, 0]).items():
                    for won, in_final in better(left, right, coins[:, 1]).items():
                        expected[won] += probabilities[[a, b, c, d]].prod() * in_left * in_right * in_final
        assert winners(probabilities[None], coins[None])[0] == pytest.approx(expected, abs=1e-14)


def test_a_tournament_uses_as_many_bits_of_one_value_as_it_has_layers() -> None:
    rng = np.random.default_rng(0)
    windows, tokens = rng.integers(0, 99, size=(500, 2)), rng.integers(0, 99, size=500)
    words = prf.keyed(key(0), "tourney", windows, tokens)
    for layers in (1, 20, 63, 64):
        expected = [bin(int(word) & ((1 << layers) - 1)).count("1") for word in words]
        assert Tournament(window=2, layers=layers).scores(key(0), windows, tokens).tolist() == expected


def expected_uplifts(probabilities_M: np.ndarray, layers: int, *, draws: int, seed: int) -> np.ndarray:
    """For each layer, how far above 1/2 the coin of a token lies that a tournament chose among these probabilities: the mean over `draws` sets of coins."""
    coins_BML = np.random.default_rng(seed).integers(0, 2, size=(draws, len(probabilities_M), layers), dtype=np.uint8)
    won_BM = np.broadcast_to(probabilities_M, (draws, len(probabilities_M)))
    found = []
    for layer in range(layers):
        won_BM = winners(np.asarray(won_BM), coins_BML[:, :, layer : layer + 1])
        # A later layer leaves the mean coin of an earlier one as it is: over its own coins it distorts nothing.
        found.append(float((won_BM * coins_BML[:, :, layer]).sum(axis=1).mean()) - 0.5)
    return np.array(found)


def test_twenty_layers_are_near_the_best_number_whatever_the_distribution() -> None:
    """What n pairs give is the sum of the layers' uplifts over the root of their number (tournament.py); the best number is among 1 to 40."""
    at_least = {0.9: [np.ones(2), np.ones(4), np.ones(8), np.ones(16), 0.5 ** np.arange(12), 0.8 ** np.arange(40)], 0.85: []}
    at_least[0.85] = [np.array([0.9, 0.1]), np.ones(64), 1.0 / np.arange(1, 257)]
    for share, distributions in at_least.items():
        for weights in distributions:
            uplifts = expected_uplifts(weights / weights.sum(), 40, draws=1500, seed=0)
            power = np.cumsum(uplifts) / np.sqrt(np.arange(1, 41))
            assert power[Tournament().layers - 1] >= share * power.max(), weights[:4]


def test_the_first_layer_s_uplift_is_known() -> None:
    """A quarter of the chance that two draws differ (Dathathri et al. 2024, supplementary information)."""
    for weights in (np.ones(2) / 2, np.ones(4) / 4, np.array([0.6, 0.3, 0.1])):
        coins = every_coin(len(weights), 1)
        found = winners(np.broadcast_to(weights, (len(coins), len(weights))), coins)
        uplift = (found * coins[:, :, 0]).sum(axis=1).mean() - 0.5
        assert uplift == pytest.approx(0.25 * (1 - (weights**2).sum()))
        assert expected_uplifts(weights, 1, draws=20_000, seed=0)[0] == pytest.approx(uplift, abs=0.02)


def test_a_tournament_of_many_layers_stays_a_distribution() -> None:
    rng = np.random.default_rng(0)
    found = winners(rng.dirichlet(np.full(300, 0.05), size=200), rng.integers(0, 2, size=(200, 300, 64), dtype=np.uint8))
    assert (found >= 0.0).all()
    assert found.sum(axis=1) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("scheme", PLAIN, ids=lambda scheme: scheme.name)
def test_the_law_of_the_scores_holds_over_keys(scheme: Scheme) -> None:
    """1,000 keys over one set of pairs: rejections at 5 % and 1 % no more than chance, and for the continuous law p uniform."""
    rng = np.random.default_rng(0)
    windows, tokens = rng.integers(0, 30, size=(150, 2)), rng.integers(0, 30, size=150)
    pairs = np.unique(np.column_stack([windows, tokens]), axis=0)
    log_p = np.array([scheme.log_p(float(scheme.scores(key(number), pairs[:, :2], pairs[:, 2]).sum()), len(pairs)) for number in range(1000)])
    for alpha in (0.05, 0.01):
        assert not more_than_chance(int((log_p <= math.log(alpha)).sum()), len(log_p), alpha)
    # And not fewer than a law that is exact allows: discreteness leaves at least half of 5 %.
    assert (log_p <= math.log(0.05)).mean() > 0.025
    if isinstance(scheme, GumbelMax):
        assert stats.kstest(np.exp(log_p), "uniform").pvalue > CHANCE


@pytest.mark.parametrize("scheme", PLAIN, ids=lambda scheme: scheme.name)
def test_the_mean_of_a_score_is_what_the_scheme_says(scheme: Scheme) -> None:
    rng = np.random.default_rng(0)
    windows, tokens = rng.integers(0, 2**31, size=(200_000, 2)), rng.integers(0, 2**31, size=200_000)
    scores = scheme.scores(key(0), windows, tokens)
    assert abs(scores.mean() - scheme.mean) < 6 * scores.std() / math.sqrt(len(scores))


@pytest.mark.parametrize("scheme", PLAIN, ids=lambda scheme: scheme.name)
def test_what_a_sampler_writes_scores_higher_under_its_key_alone(scheme: Scheme) -> None:
    probabilities = np.ones(8) / 8
    rng = np.random.default_rng(0)
    windows = np.column_stack([np.zeros(2000, np.int64), np.arange(2000)])
    rows = np.broadcast_to(np.log(probabilities), (2000, 8))
    found = np.exp(scheme.watermarked(key(0), windows, np.broadcast_to(np.arange(8), (2000, 8)), rows))
    tokens = (found.cumsum(axis=1) > rng.random((2000, 1))).argmax(axis=1)
    assert scheme.log_p(float(scheme.scores(key(0), windows, tokens).sum()), 2000) < math.log(1e-30)
    assert scheme.log_p(float(scheme.scores(key(1), windows, tokens).sum()), 2000) > math.log(CHANCE)


def test_the_schemes_are_told_apart_by_the_keyed_function() -> None:
    windows, tokens = np.zeros((1, 2), np.int64), np.array([7])
    assert len({int(prf.keyed(key(0), kind.name, windows, tokens)[0]) for kind in SCHEMES}) == len(SCHEMES)


@pytest.mark.parametrize("scheme", [*PLAIN, RedGreen(window=1, gamma=0.5, delta=0.1), Tournament(window=4, layers=64)], ids=str)
def test_a_scheme_is_its_settings(scheme: Scheme) -> None:
    assert scheme_from_json(scheme.as_json()) == scheme


@pytest.mark.parametrize(
    "settings",
    [
        {},
        None,
        [],
        {"scheme": "gumbel"},
        {"scheme": "gumbel", "window": True},
        {"scheme": "gumbel", "window": 2.0},
        {"scheme": "redgreen", "window": 2, "gamma": "0.5", "delta": 1},
        {"scheme": "redgreen", "window": 2, "gamma": 0.5, "delta": float("nan")},
        {"scheme": "redgreen", "window": 2, "gamma": 0.5, "delta": float("inf")},
        {"scheme": "other"},
        {"scheme": "gumbel", "window": 0},
        {"scheme": "gumbel", "windows": 2},
        {"scheme": "redgreen", "window": 2, "gamma": 1.0, "delta": 1.0},
        {"scheme": "tourney", "window": 2, "layers": 65},
    ],
)
def test_settings_that_are_no_scheme_s_are_refused(settings: object) -> None:
    with pytest.raises(GuardError) as refused:
        scheme_from_json(settings)
    assert refused.value.code == "guard-plan"
