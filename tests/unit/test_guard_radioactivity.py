"""The detector: what a plan binds to, what is refused, what a finding says; and the decoys' exact rank."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from guard_cases import key, live_key, random_model, write
from stillroom.core.errors import GuardError
from stillroom.core.hashing import canonical_json
from stillroom.guard import evidence
from stillroom.guard.decoys import DISAGREEMENT, LiveKey, disagrees, rank_p
from stillroom.guard.detector import Plan, power_of_ten
from stillroom.guard.evidence import RECOMPUTED, Submission
from stillroom.guard.gumbel import GumbelMax
from stillroom.guard.radioactivity import TEST, Mode, NullRadioactivity, Radioactivity, commitments, mean_score_that_rejects, recompute
from stillroom.guard.red_green import RedGreen
from stillroom.guard.registration import Registration
from stillroom.guard.schemes import Scheme
from stillroom.guard.tournament import Tournament
from stillroom.guard.windows import NO_TOKEN, READ_BEFORE, SCORED_BEFORE, SHORT, Answer, Reading, WindowSet

SIZE = 50


def detector(mode: Mode = "closed", **more: object) -> Radioactivity:
    settings = {"mode": mode, "scheme": RedGreen(window=1), "key": live_key(0, 9), "vocabulary": "ab" * 32, "size": SIZE}
    return Radioactivity(**{**settings, **more})  # type: ignore[arg-type]


def answers(number: int = 0, count: int = 20) -> list[Answer]:
    rng = np.random.default_rng(number)
    return [Answer(prompt_ids=tuple(rng.integers(0, SIZE, 4).tolist()), answer_ids=tuple(rng.integers(0, SIZE, 12).tolist())) for _ in range(count)]


OTHERS = [
    {"mode": "open"},
    {"scheme": RedGreen(window=2)},
    {"scheme": RedGreen(window=1, gamma=0.5)},
    {"scheme": GumbelMax(window=1)},
    {"key": live_key(1, 9)},
    {"key": live_key(0, 8)},
    {"key": live_key(0, 9).for_serving(epoch="1", cohort="a")},
    {"vocabulary": "cd" * 32},
    {"size": SIZE + 1},
    {"supervised": True},
    {"only": WindowSet.of([(1, 2)], 1)},
    {"once_per": "pair"},
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_a_plan_is_of_one_test_alone(other: dict[str, object]) -> None:
    plan = detector(**other).plan(alpha=0.01)
    assert plan.sha256 != detector().plan(alpha=0.01).sha256
    with pytest.raises(GuardError, match="a plan with other") as refused:
        detector().test(plan, answers())
    assert refused.value.code == "guard-plan"


def test_a_plan_was_there_before_the_data_and_alpha_is_a_part_of_it() -> None:
    mine = detector()
    assert mine.plan(alpha=0.01) == mine.plan(alpha=0.01) != mine.plan(alpha=0.05)
    with pytest.raises(GuardError, match="stopping"):
        mine.test(dataclasses.replace(mine.plan(alpha=0.01), stopping="sequential"), answers())
    only = WindowSet.of([(1, 2), (3, 4)], 1)
    plan = detector(only=only, once_per="window", supervised=True).plan(alpha=0.01)
    assert Radioactivity.planned(plan, live_key(0, 9), only) == detector(only=only, once_per="window", supervised=True)
    settings = (
        dataclasses.replace(plan, settings=plan.settings | {"scheme": {}}),
        dataclasses.replace(plan, settings=plan.settings | {"mode": "half"}),
    )
    for wrong in (
        lambda: Radioactivity.planned(plan, live_key(1, 9), only),
        lambda: Radioactivity.planned(plan, live_key(0, 9), WindowSet.of([(1, 2)], 1)),
        lambda: Radioactivity.planned(plan, live_key(0, 9)),
        lambda: Radioactivity.planned(dataclasses.replace(plan, settings={}), live_key(0, 9), only),
        lambda: Radioactivity.planned(dataclasses.replace(plan, scope={}), live_key(0, 9), only),
        lambda: Radioactivity.planned(settings[0], live_key(0, 9), only),
        lambda: Radioactivity.planned(settings[1], live_key(0, 9), only),
    ):
        with pytest.raises(GuardError) as refused:
            wrong()
        assert refused.value.code == "guard-plan"


def test_nothing_of_a_plan_or_a_finding_is_a_key() -> None:
    mine = detector()
    plan = mine.plan(alpha=0.01)
    text = f"{plan} {plan.as_json()} {mine} {mine.test(plan, answers()).as_json()}"
    for some in (mine.key.secret, mine.key.live, *mine.key.others):
        assert some.secret.hex() not in text
        assert repr(some.secret)[2:-1] not in text


def test_the_finding_is_the_law_and_the_rank_of_the_scores() -> None:
    mine = detector()
    plan = mine.plan(alpha=0.01)
    found = mine.test(plan, answers())
    pairs = mine.pairs(answers())
    totals = [float(mine.scheme.scores(some, pairs.windows_NK, pairs.tokens_N).sum()) for some in (mine.key.live, *mine.key.others)]
    assert found.statistic == totals[0]
    assert found.scored == len(pairs)
    assert found.log_p == mine.scheme.log_p(totals[0], len(pairs))
    assert found.rank_p == (1 + sum(total >= totals[0] for total in totals[1:])) / 10
    assert found.refused is None
    assert found.details["scored_share"] == pytest.approx(len(pairs) / 240)
    assert sum(found.left_out.values()) + found.scored == 240
    alone = detector(key=live_key(0, 0))
    assert alone.test(alone.plan(alpha=0.01), answers()).rank_p is None


@pytest.mark.parametrize("scheme", [RedGreen(window=1), GumbelMax(window=1), Tournament(window=1)], ids=lambda scheme: scheme.name)
def test_a_finding_says_what_would_have_been_rejected(scheme: Scheme) -> None:
    """Pitfall P13: a negative clears nobody, and says what it could have seen."""
    means = []
    for pairs in (20, 500, 100_000):
        mean = mean_score_that_rejects(scheme, pairs, 0.01)
        assert mean is not None
        total, unit = mean * pairs, 1 / 1024 if isinstance(scheme, GumbelMax) else 1.0
        assert scheme.log_p(total, pairs) <= math.log(0.01) < scheme.log_p(total - unit, pairs)
        means.append(mean)
    assert means == sorted(means, reverse=True)
    assert means[-1] < 1.02 * scheme.mean
    mine = detector(scheme=scheme)
    found = mine.test(mine.plan(alpha=0.01), answers())
    assert found.details["mean_score_that_rejects"] == mean_score_that_rejects(scheme, found.scored, 0.01)


def test_of_few_pairs_no_score_may_be_enough() -> None:
    assert mean_score_that_rejects(RedGreen(window=1), 3, 0.01) is None  # even three of three: 1/64
    assert mean_score_that_rejects(RedGreen(window=1), 4, 0.01) == 1.0


@pytest.mark.parametrize("mode", ["closed", "open"])
def test_without_anything_to_score_there_is_no_p(mode: Mode) -> None:
    mine = detector(mode)
    plan = mine.plan(alpha=0.05)
    empty = mine.test(plan, [])
    assert (empty.log_p, empty.rank_p, empty.statistic, empty.scored, empty.rejects) == (None, None, None, 0, False)
    assert empty.p_text == "no p: nothing was left to score (there was no data)"
    repeats = (3, 4, 3, 4, 3, 4)
    if mode == "closed":
        copied = mine.test(plan, [Answer(prompt_ids=repeats, answer_ids=(3, 4, 3, 4))])
    else:
        copied = mine.test(plan, [Reading(context_ids=repeats, predicted_ids=(NO_TOKEN, NO_TOKEN, 4, 3, 4, 3))])
    assert copied.log_p is None
    assert f"4 {READ_BEFORE}" in copied.p_text


def test_a_p_is_printed_with_three_digits_whatever_its_size() -> None:
    some = {"0.0123": 0.01234, "0.000101": 1.01e-4, "1.00e-4": 9.9999e-5, "9.99e-5": 9.994e-5, "1.00e-5": 9.996e-6, "2.50e-7": 2.5e-7}
    assert [power_of_ten(math.log(p)) for p in some.values()] == list(some)
    assert power_of_ten(math.log(9.998) - 401 * math.log(10.0)) == "1.00e-400"
    assert power_of_ten(-math.inf) == "0"


def test_a_suspect_that_always_answers_the_same_leaves_little_to_score() -> None:
    """Pitfall P11: at temperature 0 a thousand answers to one prompt are one answer, and the finding says how much of the text was scored."""
    mine = detector(key=live_key(0, 0))
    one = Answer(prompt_ids=(1, 2), answer_ids=(5, 6, 7, 8))
    found = mine.test(mine.plan(alpha=0.01), [one] * 1000)
    assert found.scored == 4
    assert found.left_out == {SHORT: 0, "where the suspect's token is none of the teacher's": 0, READ_BEFORE: 0, SCORED_BEFORE: 3996}
    assert found.details["scored_share"] == pytest.approx(0.001)
    assert found.log_p is not None
    assert found.log_p >= 4 * math.log(0.25)


def test_evidence_of_the_other_kind_or_of_another_vocabulary_is_refused() -> None:
    reading = Reading(context_ids=(1, 2), predicted_ids=(2, 3))
    for mine, given, says in (
        (detector("closed"), [reading], "readings in a closed test"),
        (detector("open"), answers(count=1), "answers in an open test"),
        (detector("closed"), [Answer(prompt_ids=(1,), answer_ids=(SIZE,))], f"token {SIZE}"),
        (detector("open"), [Reading(context_ids=(1,), predicted_ids=(SIZE,))], f"token {SIZE}"),
        (detector("closed"), [Answer(prompt_ids=(1,), answer_ids=(-1,))], "token ids from -1"),
    ):
        with pytest.raises(GuardError, match=says) as refused:
            mine.test(mine.plan(alpha=0.01), given)
        assert refused.value.code == "guard-evidence"


def test_only_what_an_epoch_and_a_cohort_were_served_with_finds_it() -> None:
    """Pitfalls P4 and P14: keys of a later epoch, and of other accounts, are free negative controls; a leaked one tells nothing of the others."""
    secret = live_key(0, 9)
    served = secret.for_serving(epoch="2026-11", cohort="a")
    scheme = RedGreen(window=1, delta=4.0)
    rng = np.random.default_rng(0)
    texts = [Answer(prompt_ids=(), answer_ids=tuple(text)) for text in write(scheme, served.live, random_model(SIZE, rng), 40, 30, rng).tolist()]

    def log_p(some: LiveKey) -> float:
        mine = detector(scheme=scheme, key=some)
        found = mine.test(mine.plan(alpha=0.01), texts)
        assert found.log_p is not None
        return found.log_p

    assert log_p(served) < math.log(1e-20)
    for other in (secret, secret.for_serving(epoch="2026-12", cohort="a"), secret.for_serving(epoch="2026-11", cohort="b"), live_key(1, 9)):
        assert log_p(other) > math.log(1e-6)
    assert secret.for_serving(epoch="2026-11", cohort="a") == served
    assert len({some.commitment for some in (served, secret, secret.for_serving(epoch="2026-11", cohort="b"))}) == 3


# -- bundles and calibration -------------------------------------------------------------------------------------------


def lines(rows: Sequence[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


READINGS = [Reading(context_ids=(1, 2, 3, 4), predicted_ids=(2, NO_TOKEN, 9, 9))]


@pytest.mark.parametrize("mode", ["closed", "open"])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_finding_is_recomputed_to_the_bit_from_files(mode: Mode, filtered: bool) -> None:
    only = WindowSet.of([(1, 2, 3), *(answer.answer_ids for answer in answers(count=3))], 1) if filtered else None
    mine = detector(mode, only=only)
    evidence = answers() if mode == "closed" else READINGS
    plan = Plan.from_json(json.loads(canonical_json(mine.plan(alpha=0.01).as_json())))
    data = {"answers.jsonl": lines([item.as_json() for item in evidence])}
    if only is not None:
        data["windows.jsonl"] = lines(only.windows_NK.tolist())
    assert recompute(plan, mine.key.opening(), data) == mine.test(plan, evidence)


def test_files_that_are_not_those_of_the_test_are_refused() -> None:
    mine = detector(only=WindowSet.of([(1, 2, 3)], 1))
    plan, opening = mine.plan(alpha=0.01), mine.key.opening()
    good, windows = lines([answer.as_json() for answer in answers()]), b"[1]\n[2]\n"
    assert recompute(plan, opening, {"answers.jsonl": good, "windows.jsonl": windows}).plan == plan
    filters = (b"[2]\n[1]\n", b"[1]\n[1]\n", b"[1]\n[2, 3]\n", b"[]\n", b'["1"]\n[2]\n', b"1\n2\n", b"[1]\n[3]\n", b"[-1]\n[2]\n", b"")
    for data in (
        {},
        {"answers.jsonl": good},  # without the filter it is another test
        {"windows.jsonl": windows},
        {"answers.jsonl": good, "windows.jsonl": windows, "more": b""},
        {"answers.jsonl": b"\xff", "windows.jsonl": windows},
        {"answers.jsonl": b"{", "windows.jsonl": windows},
        {"answers.jsonl": b"[1]\n", "windows.jsonl": windows},
        {"answers.jsonl": lines([READINGS[0].as_json()]), "windows.jsonl": windows},
        *({"answers.jsonl": good, "windows.jsonl": wrong} for wrong in filters),
    ):
        with pytest.raises(GuardError) as refused:
            recompute(plan, opening, data)
        assert refused.value.code in ("guard-evidence", "guard-plan")
    with pytest.raises(GuardError, match="other commitments"):
        recompute(plan, live_key(1, 9).opening(), {"answers.jsonl": good, "windows.jsonl": windows})


def test_a_bundle_with_it_is_verified_and_one_with_another_key_is_not(tmp_path: Path) -> None:
    only = WindowSet.of([answer.answer_ids for answer in answers(count=3)], 1)
    mine = detector(only=only, scheme=GumbelMax(window=1))
    registration = Registration.begin(tmp_path / "registration.jsonl", owner="A. Owner", purpose="To find out who learned from our answers.")
    registration.commit("key", scheme="gumbel", commitment=mine.key.commitment)
    registration.plan("copied", mine.plan(alpha=0.01), suspect="model M, by its public API")
    head = registration.seal(alpha=0.01)
    data = {"answers.jsonl": lines([answer.as_json() for answer in answers()]), "windows.jsonl": lines(only.windows_NK.tolist())}
    sealed = (tmp_path / "registration.jsonl").read_bytes()
    evidence.write(tmp_path / "bundle", sealed, {"copied": Submission(opening=mine.key.opening(), data=data)})
    assert evidence.verify(tmp_path / "bundle", held=[head]).failures == ()
    results = json.loads((tmp_path / "bundle" / "results.json").read_bytes())
    assert "has not been calibrated" in json.dumps(results)
    with pytest.raises(GuardError, match="not those that were committed to"):
        evidence.write(tmp_path / "other", sealed, {"copied": Submission(opening=live_key(1, 9).opening(), data=data)})


def test_the_keys_are_those_that_the_reference_says_how_to_derive() -> None:
    """docs/reference/evidence.md, written out with nothing of the guard's own."""

    def hkdf(secret: bytes, information: bytes) -> bytes:
        return hmac.digest(hmac.digest(bytes(32), secret, "sha256"), information + b"\x01", "sha256")

    def derived(secret: bytes, names: str) -> bytes:
        return hkdf(secret, b"stillroom guard subkey 1\n" + names.encode())

    one, secret = live_key(0, 9), key(0).secret
    nonce = hkdf(secret, b"stillroom guard decoys 1\n")
    inner = hashlib.sha256(b"stillroom guard key 1\n" + nonce + secret).hexdigest()
    assert one.commitment == hashlib.sha256(f'{{"decoys":9,"secret":"{inner}"}}'.encode()).hexdigest()
    place = int.from_bytes(derived(secret, '[{"name":"place"}]'), "big") % 10
    keys = [derived(secret, f'[{{"name":"key"}},"{number}"]') for number in range(10)]
    assert one.live.secret == keys[place]
    assert [some.secret for some in one.others] == keys[:place] + keys[place + 1 :]


def test_an_audit_of_a_calibration_is_the_test_with_another_key() -> None:
    assert RECOMPUTED[TEST].finds is recompute
    schemes: list[tuple[Scheme, str]] = [(RedGreen(window=1), "super-uniform"), (GumbelMax(window=1), "uniform")]
    for scheme, law in schemes:
        mine = detector(scheme=scheme)
        audit = NullRadioactivity(detector=mine)
        plan = mine.plan(alpha=0.01)
        assert (audit.test, audit.settings, audit.law) == (plan.test, plan.settings, law)
        keys = [key(number) for number in range(3)]
        others = [detector(scheme=scheme, key=LiveKey(some, 0)) for some in keys]
        assert audit.log_ps(mine.pairs(answers()), keys) == [other.test(other.plan(alpha=0.01), answers()).log_p for other in others]
        assert audit.log_ps(mine.pairs([]), keys) == [None] * 3


# -- decoys ------------------------------------------------------------------------------------------------------------


def test_one_secret_gives_the_keys_and_which_is_live() -> None:
    one = live_key(0, 9)
    assert len({one.live, *one.others}) == 10
    assert one.place == live_key(0, 9).place
    places = [live_key(number, 3).place for number in range(400)]
    assert stats.chisquare(np.bincount(places, minlength=4)).pvalue > 1e-6
    assert live_key(0, 0).place == 0
    assert live_key(0, 0).others == ()
    for wrong in (-1, 10_000):
        with pytest.raises(ValueError, match="0 to 9,999 decoys"):
            live_key(0, wrong)


def test_the_commitment_binds_to_secret_and_number_of_decoys() -> None:
    assert len({live_key(0, 9).commitment, live_key(0, 10).commitment, live_key(1, 9).commitment}) == 3
    assert LiveKey.generate().commitment != LiveKey.generate().commitment


def test_an_opening_opens_the_commitment_and_nothing_else_does() -> None:
    assert LiveKey.opened(live_key(0, 9).opening()) == live_key(0, 9)
    assert commitments(live_key(0, 9).opening()) == detector().plan(alpha=0.01).commitments
    good = live_key(0, 9).opening()
    decoys = [good | {"decoys": wrong} for wrong in (True, -1, 10**9, "9", None)]
    for wrong in (None, [], {}, {"secret": good["secret"]}, good | {"more": 1}, good | {"secret": 3}, *decoys):
        with pytest.raises(GuardError) as refused:
            LiveKey.opened(wrong)
        assert refused.value.code == "guard-evidence"
    with pytest.raises(GuardError) as refused:
        LiveKey.opened(good | {"secret": "00" * 32})
    assert refused.value.code == "guard-key"


def test_a_live_key_comes_from_a_key_file(tmp_path: Path) -> None:
    key(3).save(tmp_path / "key.json")
    assert LiveKey.load(tmp_path / "key.json", 9) == live_key(3, 9)
    assert key(3).secret.hex() not in repr(LiveKey.load(tmp_path / "key.json"))


def test_the_rank_s_p() -> None:
    assert rank_p(0, 99) == 0.01
    assert rank_p(99, 99) == 1.0
    for at_least, decoys in ((-1, 9), (10, 9), (0, 0)):
        with pytest.raises(ValueError):
            rank_p(at_least, decoys)


@pytest.mark.parametrize("decoys", [1, 19, 99, 199])
def test_a_law_that_holds_is_called_wrong_as_seldom_as_it_says(decoys: int) -> None:
    """Exactly: for each p of the law, the probability of all counts that raise the alarm."""
    counts = np.arange(decoys + 1)
    for p in (1e-300, 1e-12, 1e-6, 1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0):
        alarms = [count for count in counts.tolist() if disagrees(math.log(p), count, decoys)]
        assert float(stats.binom.pmf(alarms, decoys, p).sum()) <= DISAGREEMENT
        assert len(alarms) > 0 or decoys < 19


def test_the_floor_of_the_rank_is_no_disagreement_and_a_shifted_law_is() -> None:
    assert not disagrees(-5000.0, 0, 99)
    assert not disagrees(-math.inf, 0, 99)
    assert disagrees(-5000.0, 1, 99)
    assert disagrees(-math.inf, 1, 99)
    assert not disagrees(math.log(0.01), 1, 99)
    assert disagrees(math.log(0.01), 50, 99)
    assert disagrees(math.log(0.5), 0, 99)
    assert disagrees(0.0, 98, 99)
    assert not disagrees(0.0, 99, 99)


def test_an_alarm_takes_the_claim_away() -> None:
    class Shifted(RedGreen):
        """A law that is wrong for every key: it takes a quarter of the pairs to be green where half are."""

        def scores(self, key, windows_NK, tokens_N):  # type: ignore[no-untyped-def]
            return RedGreen(window=1, gamma=0.5).scores(key, windows_NK, tokens_N)

    mine = detector(scheme=Shifted(window=1), key=live_key(0, 99))
    found = mine.test(mine.plan(alpha=0.01), answers())
    assert found.log_p is not None
    assert found.log_p < math.log(0.01)
    assert found.rank_p is not None
    assert found.rank_p > 0.01
    assert found.alarm is not None
    assert not found.rejects
