"""The coin-flip twin test: does a suspect prefer the answers that were served to their twins, which were not?

For some requests the teacher gave two answers, drawn alike, and a coin chose which of the two was served (`serving_log`). Take any number d_i that a
suspect gives to the first text of pair i minus what it gives to the second, such as a mean log-likelihood per token under the suspect's own
tokenizer. With e_i = +1 where the first was served and -1 where the second was, the statistic is T = sum of e_i o_i a_i, where o_i is the sign of d_i and
a_i >= 0 a score of |d_i|: an integer, made of all |d| and of no coin. So T is odd in the coins: with every coin the other way round it is -T.

**The null.** If the suspect, and how it was asked, do not depend on the coins, then given the pairs the e_i are fair and independent and everything else
is fixed, whatever the suspect, its data, its tokenizer, the tails of d and the dependence between pairs. Then T has the law of a sum of independent +-a_i
(`SignLaw`), and P(T >= what was seen) is the exact p. It is the primary one. Beside it stand the share of redrawn coins that do as well, (1 + #)/(M + 1),
which checks it, and two bounds that need no computation of a law: Chernoff's, and the looser exp(-z^2/2) of self-normalised sums.

**What it asks of the pairs.** They must not depend on the coins of other pairs. A conversation breaks this: its next prompt holds what was served before.
So the proxy twins first turns only. Where later pairs may depend on earlier coins (people ask on where they were served well), the test over a fixed number of
pairs is not exact: who stops, or asks for less, when it looks well has peeked. A plan with stopping "sequential" is: it bets (`martingales.Symmetric`) on
x_i = e_i o_i r_i, where r_i is the rank of |d_i| among the first i, over i, so that given all that was before the coin i the sign alone is random.

**References.** What other models think of both texts says how different they are, not which was served. From d the mean difference under reference models is
subtracted, times the least-squares coefficient, which is made of first-minus-second differences and so of no coin either.

N pairs, R reference models, M redraws of the coins.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NoReturn, TypeAlias, get_args

import numpy
from numpy.typing import NDArray
from scipy import special

from stillroom.core.errors import GuardError
from stillroom.core.identities import Json
from stillroom.guard.detector import Finding, Plan, nothing_scored
from stillroom.guard.keys import Key
from stillroom.guard.laws import log_binomial_tail
from stillroom.guard.martingales import Symmetric, Wealth
from stillroom.guard.multiplicity import holm
from stillroom.guard.serving_log import LOG, MISSING, Coins, Opening, Selected, left_out, open_pairs, selected_pairs, verify_serving_log

Floats: TypeAlias = NDArray[numpy.float64]
Integers: TypeAlias = NDArray[numpy.int64]
Scores: TypeAlias = Literal["ranks", "clipped"]

TWINS, BY_GROUP = "twins", "twins by group"
DIFFERENCES, OPENINGS = "differences.jsonl", "openings.jsonl"
AGAIN = (
    "For each pair of openings.jsonl take the mean log-likelihood per token that your model gives to the text `first` after `prompt`, less that of `second`, by its "
    "own tokenizer (or what the plan's settings name in its place), and write it to differences.jsonl in the same form. The coins are in openings.json."
)
_FLIPS_AT_ONCE = 1 << 22
_TOTALS_ONE_BY_ONE, _LARGEST_WHOLE_LAW, _LEAST_OF_WHOLE_LAW = 5, 4e8, 1e-290
# The chance that the exact law and the redrawn coins are found to disagree where both are right.
_FALSE_ALARM = 1e-6
_LEAST = 1e-14
_ZERO, _UNSCORED = "pairs that the suspect does not tell apart", "pairs without a score"
# Of selected requests, that a log may lack: those that were under way when a server was killed.
_MOST_MISSING = 0.01


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TwinEvidence:
    """What a suspect makes of pairs, in the order of the log: `differences_N` and `references_NR` are of the first text minus the second, whichever was
    served. `accounts` are pseudonyms, `left_out` counts what is not among the pairs, by reason. Which pairs are in it, and their order, must not
    depend on the coins.

    Raises GuardError 'guard-evidence' where lengths differ, a request comes twice or a number is not finite.
    """

    requests: tuple[str, ...]
    epochs: tuple[int, ...]
    accounts: tuple[str, ...]
    differences_N: Floats
    references_NR: Floats
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.requests)
        lengths = (len(self.epochs), len(self.accounts), len(self.differences_N), len(self.references_NR))
        if any(length != count for length in lengths) or self.differences_N.ndim != 1 or self.references_NR.ndim != 2:
            _refuse(f"{count} requests with {lengths} epochs, accounts, differences and references", "one of each for each request")
        if len(set(self.requests)) != count:
            _refuse("a request that comes twice", "pairs of different requests: one coin counts once")
        if not (numpy.isfinite(self.differences_N).all() and numpy.isfinite(self.references_NR).all()):
            _refuse("a difference that is not finite", "finite numbers; a pair that could not be scored is left out and counted")

    @classmethod
    def of(cls, entries: Sequence[Selected], rows: Iterable[Json], left_out: Mapping[str, int]) -> TwinEvidence:
        """Entries of a log, in its order, with what the suspect makes of them: rows are {request, difference, references}, in any order.

        A pair that has no row is counted, and makes the finding doubtful: who leaves out pairs can choose which. Raises GuardError 'guard-evidence' for a row of anything else.
        """
        scored: dict[str, tuple[float, list[float]]] = {}
        for row in rows:
            request, difference, references = (
                (row.get(name) for name in ("request", "difference", "references")) if isinstance(row, dict) else (None,) * 3
            )
            numbers: list[Any] = [difference, *references] if isinstance(references, list) else [None]
            if not isinstance(request, str) or request in scored or not all(type(number) in (int, float) for number in numbers):
                _refuse("a row that is not of one request, once, with numbers", "rows {request, difference, references}")
            scored[request] = float(numbers[0]), [float(number) for number in numbers[1:]]
        kept = [entry for entry in entries if entry.request in scored]
        if unknown := scored.keys() - {entry.request for entry in kept}:
            _refuse(f"a row of {min(unknown)}, which is no pair of the log", "rows of pairs in the log")
        widths = {len(scored[entry.request][1]) for entry in kept}
        if len(widths) > 1:
            _refuse("rows of several widths", "the same reference models in each row")
        return cls(
            requests=tuple(entry.request for entry in kept),
            epochs=tuple(entry.epoch for entry in kept),
            accounts=tuple(entry.account for entry in kept),
            differences_N=numpy.array([scored[entry.request][0] for entry in kept], dtype=numpy.float64),
            references_NR=numpy.array([scored[entry.request][1] for entry in kept], dtype=numpy.float64).reshape(len(kept), max(widths, default=0)),
            left_out={**left_out, _UNSCORED: len(entries) - len(kept)},
        )

    def of_accounts(self, accounts: frozenset[str], *, others: bool = False) -> TwinEvidence:
        """Those pairs that were served to `accounts`; with `others` those that were not."""
        kept_N = numpy.array([(account in accounts) != others for account in self.accounts], dtype=bool)

        def of(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(value for value, keep in zip(values, kept_N, strict=True) if keep)

        epochs = tuple(epoch for epoch, keep in zip(self.epochs, kept_N, strict=True) if keep)
        return TwinEvidence(
            requests=of(self.requests), epochs=epochs, accounts=of(self.accounts),
            differences_N=self.differences_N[kept_N], references_NR=self.references_NR[kept_N],
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinTest:
    """The test, with the coins of all epochs that pairs are of.

    `statistic` says what the differences are of and `references` which models they are compared with; both are part of what is fixed before data.
    `audited_share` of the log's pairs are scored, those that the coins' key says (`Coins.audits`); fewer than all save work with a long log.
    `scores` "ranks" makes a_i the rank of |d_i|, in `levels` steps; "clipped" |d_i| itself up to `clip` times the median, in as many.
    """

    coins: tuple[Coins, ...]
    statistic: str
    references: tuple[str, ...] = ()
    audited_share: float = 1.0
    scores: Scores = "ranks"
    levels: int = 64
    clip: float = 4.0
    flips: int = 9_999
    stopping: Literal["fixed", "sequential"] = "fixed"

    def __post_init__(self) -> None:
        whole = all(type(number) is int and number >= 1 for number in (self.levels, self.flips))
        known = self.scores in get_args(Scores) and self.stopping in ("fixed", "sequential") and isinstance(self.statistic, str)
        if not (whole and known and self.clip > 0.0 and 0.0 < self.audited_share <= 1.0):
            raise GuardError(
                "guard-plan",
                found=f"a twin test with the settings {self.settings} over a share of {self.audited_share}",
                expected="whole numbers of levels and flips, a clip above 0, a share in (0, 1], and scores and stopping that there are",
                do="Plan the test with settings that it has.",
            )
        if len({one.epoch for one in self.coins}) != len(self.coins):
            _refuse("two coins of one epoch", "the coins of each epoch, once: which of them decided for a pair would be open")

    @property
    def settings(self) -> Json:
        """All that the statistic depends on beside differences and coins."""
        if self.stopping == "sequential":
            how: Json = {"scores": "sequential ranks", "bet": "symmetric"}
        else:
            how = {"scores": self.scores, "levels": self.levels, "flips": self.flips} | ({"clip": self.clip} if self.scores == "clipped" else {})
        return {"statistic": self.statistic, "references": list(self.references), "stopping": self.stopping, **how}

    def plan(self, *, alpha: float) -> Plan:
        """The plan, which binds to the coins by their commitments."""
        commitments = tuple(one.commitment for one in self.coins)
        scope = {"audited_share": self.audited_share}
        return Plan(test=TWINS, null="coin", alpha=alpha, settings=self.settings, commitments=commitments, stopping=self.stopping, scope=scope)

    def test(self, plan: Plan, evidence: TwinEvidence) -> Finding:
        """Of a fixed plan the exact p; of a sequential one the e-value of all pairs, in order, and the p 1/(the largest on the way)."""
        _hold(plan, self.plan(alpha=plan.alpha))
        if evidence.references_NR.shape[1] != len(self.references):
            _refuse(f"{evidence.references_NR.shape[1]} references", f"differences under {len(self.references)} reference models, as planned")
        signs_N = self.signs_of(evidence)
        if self.stopping == "sequential":
            return self._sequential(plan, evidence, signs_N)
        residuals_N = residuals(evidence.differences_N, evidence.references_NR)
        levels_N = self.levels_of(residuals_N)
        left_out = dict(evidence.left_out) | {_ZERO: int((levels_N == 0).sum())}
        if not levels_N.any():
            return nothing_scored(plan, left_out)
        return self._fixed(plan, signs_N, residuals_N, levels_N, left_out)

    def levels_of(self, residuals_N: Floats) -> Integers:
        """The scores a_i: functions of |d| alone."""
        magnitudes_N = numpy.abs(residuals_N)
        return rank_levels(magnitudes_N, self.levels) if self.scores == "ranks" else clipped_levels(magnitudes_N, self.levels, self.clip)

    def signs_of(self, evidence: TwinEvidence) -> Integers:
        """+1 where the first text was served, -1 where the second was."""
        by_epoch = {one.epoch: one for one in self.coins}
        if unknown := set(evidence.epochs) - by_epoch.keys():
            _refuse(f"pairs of the epochs {sorted(unknown)}", "pairs of epochs whose coins were revealed")
        served = [by_epoch[epoch].served(request) for request, epoch in zip(evidence.requests, evidence.epochs, strict=True)]
        return 1 - 2 * numpy.array(served, dtype=numpy.int64)

    def _fixed(self, plan: Plan, signs_N: Integers, residuals_N: Floats, levels_N: Integers, left_out: dict[str, int]) -> Finding:
        signed_N = levels_N * numpy.sign(residuals_N).astype(numpy.int64)
        total = int(signed_N @ signs_N)
        law = SignLaw(levels_N)
        log_p = law.log_tail(total)
        as_good = flipped_as_good(levels_N, total, self.flips, seed=int(plan.sha256, 16))
        z = total / math.sqrt(law.variance)
        details = {
            "sum": total,
            "log_bound": law.log_bound(total),
            "log_self_normalised_bound": -z * z / 2.0 if z > 0 else 0.0,
            "mean_served_minus_twin": math.fsum(residuals_N * signs_N) / len(signs_N),
            "flips_as_good": as_good,
        }
        return Finding(
            plan=plan, statistic=z, scored=int((levels_N > 0).sum()), log_p=log_p, rank_p=(1 + as_good) / (1 + self.flips),
            alarm=_disagreement(log_p, as_good, self.flips) or _doubt(left_out, len(signs_N)), left_out=left_out, details=details,
        )  # fmt: skip

    def _sequential(self, plan: Plan, evidence: TwinEvidence, signs_N: Integers) -> Finding:
        residuals_N = running_residuals(evidence.differences_N, evidence.references_NR)
        zero_N = residuals_N == 0
        left_out = dict(evidence.left_out) | {_ZERO: int(zero_N.sum())}
        if zero_N.all():
            return nothing_scored(plan, left_out)
        signed_N = numpy.sign(residuals_N) * sequential_ranks(numpy.abs(residuals_N))
        wealth = Wealth.of(Symmetric()).after(signed_N * signs_N)
        return Finding(
            plan=plan, statistic=wealth.log_e, scored=int((~zero_N).sum()), log_p=wealth.log_p, log_e=wealth.log_e, left_out=left_out,
            alarm=_doubt(left_out, len(signs_N)), details={"log_highest": wealth.log_highest},
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetedTwinTest:
    """The test on what was served to each of some groups of accounts, which were named before: to whom was served what the suspect was trained on?

    Each group's p is exact by itself, and Holm's (1979) correction holds the chance that any group is named wrongly to alpha. The finding's p is the
    smallest after correction; its details name the groups whose null is rejected, and what the test says of all other pairs, the negative control.
    """

    twins: TwinTest
    groups: Mapping[str, frozenset[str]]

    def __post_init__(self) -> None:
        members = [account for accounts in self.groups.values() for account in accounts]
        if not self.groups or len(members) != len(set(members)):
            _refuse("no group, or an account in two of them", "groups of accounts that share none")

    def plan(self, *, alpha: float) -> Plan:
        """The twin test's plan with the groups in it."""
        groups = {name: sorted(accounts) for name, accounts in self.groups.items()}
        plan = self.twins.plan(alpha=alpha)
        return replace(plan, test=BY_GROUP, scope={**plan.scope, "groups": groups})

    def test(self, plan: Plan, evidence: TwinEvidence) -> Finding:
        """A group of which there is nothing to score is not named, and counts in the correction like any other."""
        _hold(plan, self.plan(alpha=plan.alpha))
        single = self.twins.plan(alpha=plan.alpha)
        findings = {name: self.twins.test(single, evidence.of_accounts(accounts)) for name, accounts in self.groups.items()}
        rest = self.twins.test(single, evidence.of_accounts(frozenset().union(*self.groups.values()), others=True))
        left_out = dict(evidence.left_out)
        if all(finding.refused is not None for finding in findings.values()):
            return nothing_scored(plan, left_out | {"pairs of no group": len(evidence.requests)})
        adjusted = holm({name: finding.log_p for name, finding in findings.items()})
        smallest = min(adjusted, key=lambda name: adjusted[name])
        doubt = _doubt(left_out, len(evidence.requests))
        alarms = ([] if doubt is None else [doubt]) + [
            f"{name}: {finding.alarm}" for name, finding in {**findings, "the rest": rest}.items() if finding.alarm is not None
        ]
        details = {
            "attributed": [name for name, log_p in adjusted.items() if log_p <= math.log(plan.alpha)],
            "groups": {name: _summary(finding) | {"adjusted_log_p": adjusted[name]} for name, finding in findings.items()},
            "rest": _summary(rest),
        }
        return Finding(
            plan=plan, statistic=findings[smallest].statistic, scored=sum(finding.scored for finding in findings.values()),
            log_p=adjusted[smallest], alarm="; ".join(alarms) or None, left_out=left_out, details=details,
        )  # fmt: skip


class SignLaw:
    """The law of T = sum of +-a_i with independent fair signs, for integers a_i >= 0: exact but for rounding, at any size of tail.

    The law is tilted so that its mean is where the tail begins, where it is computed from its characteristic function by one FFT, and tilted back
    (relative error about 1e-12; tests compare it with counting all signs in whole numbers). An FFT without tilt would lose every tail below 1e-16.
    """

    def __init__(self, levels_N: Integers) -> None:
        if len(levels_N) and int(levels_N.min()) < 0:
            raise ValueError("scores are not negative")
        values, counts = numpy.unique(levels_N[levels_N > 0], return_counts=True)
        self._values, self._counts = values.astype(numpy.float64), counts.astype(numpy.float64)
        self._largest = int((values * counts).sum())
        self.variance = int((values * values * counts).sum())

    def log_tail(self, total: int) -> float:
        """Ln P(T >= total); -inf beyond the largest value."""
        if total > self._largest:
            return -math.inf
        if total <= -self._largest:
            return 0.0
        # T has the parity of its largest value.
        total += (total - self._largest) % 2
        if total == self._largest:
            return -float(self._counts.sum()) * math.log(2.0)
        if total <= 0:
            return math.log1p(-math.exp(self.log_tail(2 - total)))
        tilt = self._tilt(total)
        steps = self._tilted_law(tilt, total)
        weights = numpy.exp(-2.0 * tilt * numpy.arange(len(steps)))
        return self._log_moment(tilt) - tilt * total + math.log(math.fsum(steps * weights))

    def log_tails(self, totals: Iterable[int]) -> dict[int, float]:
        """`log_tail` of each; of many at once it is quicker to add up the whole law, pair by pair, which loses tails below 1e-290 alone."""
        wanted = list(totals)
        if len(wanted) < _TOTALS_ONE_BY_ONE or self._largest * float(self._counts.sum()) > _LARGEST_WHOLE_LAW:
            return {total: self.log_tail(total) for total in wanted}
        law = numpy.ones(1)
        for value in numpy.repeat(self._values, self._counts.astype(numpy.int64)).astype(numpy.int64).tolist():
            following = numpy.zeros(len(law) + value)
            following[: len(law)] += law
            following[value:] += law
            law = following / 2.0
        tails = numpy.minimum(numpy.cumsum(law[::-1])[::-1], 1.0)
        # (T + largest)/2 is a whole number from 0 up.
        places = {total: min(max(0, (total + self._largest + 1) // 2), len(law) - 1) for total in wanted}
        usual = {total: abs(total) <= self._largest and float(tails[places[total]]) > _LEAST_OF_WHOLE_LAW for total in wanted}
        return {total: math.log(float(tails[places[total]])) if usual[total] else self.log_tail(total) for total in wanted}

    def log_bound(self, total: int) -> float:
        """Chernoff's bound of ln P(T >= total), min over x of sum of ln cosh(x a_i) - x total: never above -z^2/2, which ln cosh(x) <= x^2/2 gives."""
        if total >= self._largest:
            return self.log_tail(total)
        if total <= 0:
            return 0.0
        tilt = self._tilt(total)
        return min(0.0, self._log_moment(tilt) - tilt * total)

    def _tilt(self, total: int) -> float:
        """Where the tilted law's mean, sum of a tanh(x a), is `total`."""
        low, high = 0.0, 1.0
        while self._tilted_mean(high) < total:
            high *= 2.0
        for _ in range(60):
            middle = (low + high) / 2.0
            low, high = (middle, high) if self._tilted_mean(middle) < total else (low, middle)
        return high

    def _tilted_mean(self, tilt: float) -> float:
        return math.fsum(self._counts * self._values * numpy.tanh(tilt * self._values))

    def _log_moment(self, tilt: float) -> float:
        x = tilt * self._values
        return math.fsum(self._counts * (x + numpy.log1p(numpy.exp(-2.0 * x)) - math.log(2.0)))

    def _tilted_law(self, tilt: float, total: int) -> Floats:
        """The tilted probabilities of total, total + 2, ..., as far as they matter."""
        # Hoeffding: beyond half a period from its mean the tilted law of T/2 has less than exp(-42) of its mass, which alone wraps around.
        period = 1 << max(6, math.ceil(math.log2(2.0 * math.sqrt(21.0 * self.variance) + 4.0)))
        frequencies = numpy.arange(period // 2 + 1) * (2.0 * math.pi / period)
        logarithm = numpy.zeros(len(frequencies), dtype=numpy.complex128)
        for value, count in zip(self._values, self._counts, strict=True):
            up = float(special.expit(2.0 * tilt * value))
            turned = numpy.exp(1j * numpy.mod(frequencies * value, 2.0 * math.pi))
            with numpy.errstate(divide="ignore"):
                logarithm += count * numpy.log((1.0 - up) + up * turned)
        # (T + largest)/2 begins at 0; the tail begins at `first`, which is turned to place 0.
        first = (total + self._largest) // 2
        turn = numpy.exp(-1j * numpy.mod(frequencies * (first % period), 2.0 * math.pi))
        probabilities = numpy.fft.irfft(numpy.conj(numpy.exp(logarithm) * turn), n=period)
        return numpy.maximum(probabilities[: period // 2], 0.0)


@dataclass(frozen=True)
class TwinAudit:
    """The test for the null harness (`calibration.Audit`): coins drawn anew over fixed evidence, whose law is computed once."""

    twins: TwinTest
    law: Literal["super-uniform"] = "super-uniform"

    @property
    def test(self) -> str:
        return TWINS

    @property
    def settings(self) -> Json:
        return self.twins.settings

    def log_ps(self, evidence: TwinEvidence, keys: Sequence[Key]) -> list[float | None]:
        """Ln p with the coins that each key gives. Of sequential plans each audit is run as it is."""
        epochs = sorted(set(evidence.epochs))
        drawn = [replace(self.twins, coins=tuple(Coins.of(key, epoch) for epoch in epochs)) for key in keys]
        if self.twins.stopping == "sequential":
            return [test.test(test.plan(alpha=0.5), evidence).log_p for test in drawn]
        residuals_N = residuals(evidence.differences_N, evidence.references_NR)
        levels_N = self.twins.levels_of(residuals_N)
        if not levels_N.any():
            return [None] * len(keys)
        signed_N, law = levels_N * numpy.sign(residuals_N).astype(numpy.int64), SignLaw(levels_N)
        totals = [int(signed_N @ test.signs_of(evidence)) for test in drawn]
        tails = law.log_tails(set(totals))
        return [tails[total] for total in totals]


def commitments(opening: object) -> tuple[str, ...]:
    """What an opening commits to, as `Plan.commitments` has it: it is {"coins": [as `Coins.as_json` writes them]}. Raises GuardError 'guard-evidence'."""
    return tuple(one.commitment for one in _opened(opening))


def recompute(plan: Plan, opening: object, data: Mapping[str, bytes]) -> Finding:
    """The finding of either test out of what a bundle has of it. Raises GuardError 'guard-evidence' or 'guard-plan', LedgerError 'ledger-corrupt'.

    The files are `serving.jsonl` (the log), `differences.jsonl` (rows of `TwinEvidence.of`) and, where the texts are shown, `openings.jsonl`: each must
    then open its entry. Pairs of the log that have no difference are counted, and so are selected requests that the log does not have. A log that was cut
    short at its end is whole by itself: the details have its head, to be compared with the last one that somebody else was given.
    """
    coins = _opened(opening)
    with TemporaryDirectory(prefix="stillroom-") as directory:
        path = Path(directory) / LOG
        path.write_bytes(data.get(LOG, b""))
        contents = verify_serving_log(path)
        open_pairs(path, contents, coins, (Opening.from_json(row) for row in _rows(data, OPENINGS)))
        entries = selected_pairs(path, contents, coins)
    twins = _planned(plan, coins)
    by_epoch, share = {one.epoch: one for one in coins}, plan.scope["audited_share"]
    entries = [entry for entry in entries if by_epoch[entry.epoch].audits(entry.request, share)]
    evidence = TwinEvidence.of(entries, _rows(data, DIFFERENCES), left_out(contents, coins))
    finding = twins.test(plan, evidence)
    return replace(finding, details={**finding.details, "log": {"entries": contents.head.entries, "head": contents.head.hash}})


def _planned(plan: Plan, coins: tuple[Coins, ...]) -> TwinTest | TargetedTwinTest:
    """The test that a plan is of; what in it is of another version shows when the plan is held to the test's own."""
    known = {name: plan.settings[name] for name in ("statistic", "stopping", "scores", "levels", "flips", "clip") if name in plan.settings}
    if plan.stopping == "sequential":
        known.pop("scores", None)
    try:
        twins = TwinTest(
            coins=coins, references=tuple(plan.settings.get("references", ())), audited_share=float(plan.scope["audited_share"]), **known
        )
        if plan.test == TWINS:
            return twins
        return TargetedTwinTest(twins=twins, groups={name: frozenset(accounts) for name, accounts in plan.scope["groups"].items()})
    except (TypeError, ValueError, KeyError, AttributeError):
        _refuse("a plan of a twin test with other settings than it has", "a plan as it was registered")


def _opened(opening: object) -> tuple[Coins, ...]:
    listed = opening.get("coins") if isinstance(opening, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        _refuse("an opening without coins", '{"coins": [...]}, as they were revealed')
    return tuple(map(Coins.from_json, listed))


def _rows(data: Mapping[str, bytes], name: str) -> list[Json]:
    try:
        return [json.loads(line) for line in data.get(name, b"").splitlines()]
    except (ValueError, RecursionError):
        _refuse(f"{name} is not JSON, line by line", "one row in each line")


def rank_levels(magnitudes_N: Floats, levels: int) -> Integers:
    """The rank of each magnitude among those that are not zero, ties at their mean, in `levels` steps from 1 up; 0 for zero."""
    found_N = numpy.zeros(len(magnitudes_N), dtype=numpy.int64)
    present = magnitudes_N > 0
    if present.any():
        _, places, counts = numpy.unique(magnitudes_N[present], return_inverse=True, return_counts=True)
        ranks = numpy.cumsum(counts) - (counts - 1) / 2.0
        found_N[present] = numpy.maximum(1, numpy.rint(ranks[places] * levels / present.sum())).astype(numpy.int64)
    return found_N


def clipped_levels(magnitudes_N: Floats, levels: int, clip: float) -> Integers:
    """Each magnitude, at most `clip` times the median of those that are not zero, in `levels` steps."""
    present = magnitudes_N[magnitudes_N > 0]
    if not len(present):
        return numpy.zeros(len(magnitudes_N), dtype=numpy.int64)
    most = clip * float(numpy.median(present))
    return numpy.rint(levels * (numpy.minimum(magnitudes_N, most) / most)).astype(numpy.int64)


def residuals(differences_N: Floats, references_NR: Floats) -> Floats:
    """Differences less what the references' mean explains of them, by one coefficient for all."""
    if not references_NR.shape[1] or not len(differences_N):
        return differences_N
    mean_N, coefficients_N = _explained(differences_N, references_NR)
    return differences_N - float(coefficients_N[-1]) * mean_N


def running_residuals(differences_N: Floats, references_NR: Floats) -> Floats:
    """The same with the coefficient of the pairs up to each: nothing that comes later enters."""
    if not references_NR.shape[1]:
        return differences_N
    mean_N, coefficients_N = _explained(differences_N, references_NR)
    return differences_N - coefficients_N * mean_N


def _explained(differences_N: Floats, references_NR: Floats) -> tuple[Floats, Floats]:
    """The references' mean, and the least-squares coefficient of the pairs up to each; cumulative sums have one order on every machine."""
    mean_N = numpy.cumsum(references_NR, axis=1)[:, -1] / references_NR.shape[1]
    squares_N = numpy.cumsum(mean_N * mean_N)
    products_N = numpy.cumsum(mean_N * differences_N)
    return mean_N, numpy.divide(products_N, squares_N, out=numpy.zeros_like(squares_N), where=squares_N > 0)


def flipped_as_good(levels_N: Integers, total: int, flips: int, *, seed: int) -> int:
    """In how many of `flips` redraws of all coins the sum is at least `total`."""
    generator = numpy.random.Generator(numpy.random.Philox(numpy.random.SeedSequence(seed)))
    scored = levels_N[levels_N > 0].astype(numpy.float64)
    least = (total + float(scored.sum())) / 2.0
    at_once = max(1, _FLIPS_AT_ONCE // max(1, len(scored)))
    found = 0
    for begin in range(0, flips, at_once):
        heads_MN = generator.integers(2, size=(min(at_once, flips - begin), len(scored)), dtype=numpy.uint8)
        # Sums of whole numbers below 2**53 are exact in any order.
        found += int((heads_MN.astype(numpy.float64) @ scored >= least).sum())
    return found


def sequential_ranks(magnitudes_N: Floats) -> Floats:
    """The rank of each magnitude among those up to it that are not zero, ties at their mean, over their number; 0 for zero."""
    seen: list[float] = []
    found_N = numpy.zeros(len(magnitudes_N))
    for place, magnitude in enumerate(magnitudes_N.tolist()):
        if magnitude > 0:
            bisect.insort(seen, magnitude)
            found_N[place] = (bisect.bisect_left(seen, magnitude) + bisect.bisect_right(seen, magnitude) + 1) / 2.0 / len(seen)
    return found_N


def words(text: str) -> list[str]:
    """A text's words, for comparing texts across tokenizers."""
    return text.split()


def lcs_ratio(sample: Sequence[str], text: Sequence[str]) -> float:
    """Twice the length of the longest common subsequence over the sum of lengths (ROUGE-L's F1); 0 where both are empty."""
    together = len(sample) + len(text)
    return 2.0 * lcs_length(sample, text) / together if together else 0.0


def lcs_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Of the longest common subsequence, with one bit for each word of `one` (Hyyrö 2004)."""
    masks: dict[str, int] = {}
    for place, word in enumerate(one):
        masks[word] = masks.get(word, 0) | (1 << place)
    whole = (1 << len(one)) - 1
    row = whole
    for word in other:
        matched = row & masks.get(word, 0)
        row = ((row + matched) | (row - matched)) & whole
    return len(one) - row.bit_count()


def containment(sample: Sequence[str], text: Sequence[str], n: int = 3) -> float:
    """The share of the text's different n-grams that the sample has; 0 where it has none."""
    inside, wanted = ({tuple(found[at : at + n]) for at in range(len(found) - n + 1)} for found in (sample, text))
    return len(inside & wanted) / len(wanted) if wanted else 0.0


def agreement_difference(
    samples: Sequence[str], first: str, second: str, measure: Callable[[Sequence[str], Sequence[str]], float] = lcs_ratio
) -> float:
    """By how much a suspect's samples for the prompt agree more with the first text than with the second, on average; for suspects that show text alone."""
    if not samples:
        raise ValueError("no samples of the suspect")
    first_words, second_words = words(first), words(second)
    return math.fsum(measure(words(sample), first_words) - measure(words(sample), second_words) for sample in samples) / len(samples)


def _disagreement(log_p: float, as_good: int, flips: int) -> str | None:
    """Whether so many redraws would do as well if the law's p were right: the two are computed apart, and one of them is wrong."""
    # So far from 0 and 1 that it and its complement are floats of their own; flips do not tell the difference.
    p = min(max(math.exp(log_p), _LEAST), 1.0 - _LEAST)
    tails = log_binomial_tail(flips, p, as_good), log_binomial_tail(flips, 1.0 - p, flips - as_good)
    unlikely = min(tails) < math.log(_FALSE_ALARM / 2.0)
    return f"{as_good:,} of {flips:,} redraws of the coins do as well, which does not go with the exact law's p" if unlikely else None


def _doubt(left_out: Mapping[str, int], scored: int) -> str | None:
    """What was left out that somebody could have chosen."""
    if unscored := left_out.get(_UNSCORED, 0):
        return f"{unscored:,} pairs of the log were not scored: who leaves out pairs can choose them"
    absent = left_out.get(MISSING, 0)
    if absent > _MOST_MISSING * (absent + scored):
        return f"{absent:,} selected requests are not in the log, which are more than a server that was killed leaves"
    return None


def _summary(finding: Finding) -> Json:
    return {"scored": finding.scored, "log_p": finding.log_p, "statistic": finding.statistic, "refused": finding.refused}


def _hold(plan: Plan, expected: Plan) -> None:
    if plan != expected:
        raise GuardError(
            "guard-plan",
            found=f"a plan {plan.sha256[:16]} of {plan.test}",
            expected=f"the plan {expected.sha256[:16]} of this test, with its settings and its coins",
            why="a test that is chosen after the data have been seen proves nothing",
            do="Run the test that was planned; plan another one for other data.",
        )


def _refuse(found: str, expected: str) -> NoReturn:
    raise GuardError(
        "guard-evidence",
        found=found,
        expected=expected,
        why="the law of the test is that of other evidence",
        do="Make the evidence from the serving log again.",
    )
