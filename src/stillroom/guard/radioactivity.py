"""Whether a suspect was trained on text from a keyed sampler: its tokens, scored with the key (Sander et al. 2024, arXiv 2402.14904, done exactly).

Closed: from the tokens that the suspect answers with. Open ("reading mode"): from what it finds most probable next while it reads texts. Supervised: the
texts it is asked or given are the very ones that were served; the test is the same, and finds more.

Two p-values, each valid by itself: that of the exact law of the scheme's scores, which can be as small as the evidence makes it, and the rank of the live
key among its decoys, which needs no law. Where the two cannot both be right the finding has an alarm and supports nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from stillroom.core.errors import GuardError
from stillroom.core.identities import Json
from stillroom.guard import decoys as ranks
from stillroom.guard.decoys import LiveKey
from stillroom.guard.detector import Finding, Plan, nothing_scored
from stillroom.guard.gumbel import GumbelMax
from stillroom.guard.keys import Key
from stillroom.guard.schemes import Scheme, scheme_from_json
from stillroom.guard.windows import Answer, OncePer, Pairs, Reading, WindowSet, pairs_of_answers, pairs_of_readings

Mode: TypeAlias = Literal["closed", "open"]
TEST = "radioactivity"
AGAIN = (
    "Let your model answer each prompt of answers.jsonl as it was asked, and write its tokens in the ids of the teacher's vocabulary; of a reading, let it read "
    "each text and write what it finds most probable after each token. The key is in openings.json."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Radioactivity:
    """`vocabulary` is the fingerprint of the teacher's vocabulary, `size` its number of tokens: all ids are the teacher's.

    `only` restricts the test to windows fixed beforehand, such as those of the texts that were served: they are where a student has learned something.
    `once_per`: what is scored once over all evidence. "window" has an exact law, for a given number of scored windows, also where the suspect reads texts from
    the keyed sampler. "pair" uses more of what there is, and its law is exact only where neither what the suspect was given nor `only` depends on the live key.
    """

    mode: Mode
    scheme: Scheme
    key: LiveKey
    vocabulary: str
    size: int
    supervised: bool = False
    only: WindowSet | None = None
    once_per: OncePer = "window"

    def plan(self, *, alpha: float) -> Plan:
        """The test, before there is data. It is bound to the keys by its commitment, to the vocabulary and the filter by its scope."""
        return Plan(
            test=TEST,
            null="key",
            alpha=alpha,
            settings={"mode": self.mode, "scheme": self.scheme.as_json(), "once_per": self.once_per, "filtered": self.only is not None},
            commitments=(self.key.commitment,),
            scope={
                "decoys": self.key.decoys,
                "filter_sha256": None if self.only is None else self.only.sha256,
                "supervised": self.supervised,
                "vocabulary": self.vocabulary,
                "tokens": self.size,
            },
        )

    @classmethod
    def planned(cls, plan: Plan, key: LiveKey, only: WindowSet | None = None) -> Radioactivity:
        """The test that has this plan, given what the plan commits to. Raises GuardError 'guard-plan'."""
        settings, scope = plan.settings, plan.scope
        mode, once_per, scheme = settings.get("mode"), settings.get("once_per"), scheme_from_json(settings.get("scheme"))
        vocabulary, size = scope.get("vocabulary"), scope.get("tokens")
        if mode not in ("closed", "open") or once_per not in ("pair", "window") or not isinstance(vocabulary, str) or type(size) is not int:
            raise _other_plan("a plan that is none of this test")
        supervised = scope.get("supervised") is True
        detector = cls(mode=mode, scheme=scheme, key=key, vocabulary=vocabulary, size=size, supervised=supervised, only=only, once_per=once_per)
        detector._require(plan)
        return detector

    def test(self, plan: Plan, evidence: Sequence[Answer] | Sequence[Reading]) -> Finding:
        """What the evidence says of the live key. Raises GuardError 'guard-plan' and 'guard-evidence'."""
        self._require(plan)
        return self._finding(plan, self.pairs(evidence))

    def _finding(self, plan: Plan, pairs: Pairs) -> Finding:
        if not len(pairs):
            return nothing_scored(plan, pairs.left_out)
        total = self.total(self.key.live, pairs)
        log_p = self.scheme.log_p(total, len(pairs))
        details: Json = {
            "mean_score": total / len(pairs),
            "mean_score_under_null": self.scheme.mean,
            "mean_score_that_rejects": mean_score_that_rejects(self.scheme, len(pairs), plan.alpha),
            "scored_share": len(pairs) / (len(pairs) + sum(pairs.left_out.values())),
        }
        rank_p = alarm = None
        if self.key.decoys:
            at_least = sum(self.total(key, pairs) >= total for key in self.key.others)
            rank_p = ranks.rank_p(at_least, self.key.decoys)
            details["decoys_at_least"] = at_least
            if ranks.disagrees(log_p, at_least, self.key.decoys):
                alarm = (
                    f"{at_least} of {self.key.decoys} decoys have at least the live key's statistic, which the law's p makes less probable than "
                    f"{ranks.DISAGREEMENT:g}: the law does not hold of these data"
                )
        return Finding(
            plan=plan, statistic=total, scored=len(pairs), log_p=log_p, rank_p=rank_p, alarm=alarm, left_out=pairs.left_out, details=details
        )

    def pairs(self, evidence: Sequence[Answer] | Sequence[Reading]) -> Pairs:
        """What of the evidence is scored. It is the same for all keys. Raises GuardError 'guard-evidence'."""
        answers = [item for item in evidence if isinstance(item, Answer)]
        readings = [item for item in evidence if isinstance(item, Reading)]
        if readings if self.mode == "closed" else answers:
            raise _unfit(
                "readings in a closed test" if readings else "answers in an open test", "answers for a closed test, readings for an open one"
            )
        if self.mode == "closed":
            pairs = pairs_of_answers(answers, self.scheme.window, once_per=self.once_per, only=self.only)
        else:
            pairs = pairs_of_readings(readings, self.scheme.window, once_per=self.once_per, only=self.only)
        largest = max((int(ids.max()) for ids in (pairs.windows_NK, pairs.tokens_N) if ids.size), default=0)
        if largest >= self.size:
            raise _unfit(f"token {largest:,}", f"ids of the teacher's vocabulary, which has {self.size:,} tokens")
        return pairs

    def total(self, key: Key, pairs: Pairs) -> float:
        """The statistic with one key: the sum of the scores."""
        return float(self.scheme.scores(key, pairs.windows_NK, pairs.tokens_N).sum())

    def _require(self, plan: Plan) -> None:
        mine = self.plan(alpha=plan.alpha)
        if mine != plan:
            differ = [
                name
                for name in ("test", "null", "settings", "commitments", "stopping", "scope", "version")
                if getattr(mine, name) != getattr(plan, name)
            ]
            raise _other_plan(f"a plan with other {' and '.join(differ)}")


def mean_score_that_rejects(scheme: Scheme, pairs: int, alpha: float) -> float | None:
    """The least mean score of so many pairs that has p <= alpha (of Gumbel-max: the sum to 1/1024); None where even the largest has not.

    It says what a test that did not reject could have seen: the more pairs, the nearer to the null's mean.
    """
    per_unit = 1024 if isinstance(scheme, GumbelMax) else 1
    fails, rejects = 0, math.floor(scheme.most * pairs * per_unit)
    if scheme.log_p(rejects / per_unit, pairs) > math.log(alpha):
        return None
    while rejects - fails > 1:
        middle = (fails + rejects) // 2
        fails, rejects = (fails, middle) if scheme.log_p(middle / per_unit, pairs) <= math.log(alpha) else (middle, rejects)
    return rejects / per_unit / pairs


@dataclass(frozen=True, kw_only=True)
class NullRadioactivity:
    """The test for `calibration`: the evidence are the pairs of an innocent student, and each audit scores them with a new live key."""

    detector: Radioactivity

    @property
    def test(self) -> str:
        return TEST

    @property
    def settings(self) -> Json:
        return self.detector.plan(alpha=0.5).settings

    @property
    def law(self) -> Literal["uniform", "super-uniform"]:
        return "uniform" if isinstance(self.detector.scheme, GumbelMax) else "super-uniform"

    def log_ps(self, evidence: Pairs, keys: Sequence[Key]) -> list[float | None]:
        if not len(evidence):
            return [None] * len(keys)
        totals = [self.detector.total(LiveKey(key, 0).live, evidence) for key in keys]
        return [self.detector.scheme.log_p(total, len(evidence)) for total in totals]


def recompute(plan: Plan, opening: object, data: Mapping[str, bytes]) -> Finding:
    """The finding out of what a bundle has of it: the opening of the live key, and the files.

    `answers.jsonl` has in each line an Answer's JSON (`prompt_ids`, `answer_ids`, `exact` where not all are), or, of an open test, a Reading's
    (`context_ids`, `predicted_ids`); `windows.jsonl`, of a test with a filter, in each line the ids of a window, in order. Raises GuardError
    'guard-evidence' or 'guard-plan'.
    """
    if not {"answers.jsonl"} <= data.keys() <= {"answers.jsonl", "windows.jsonl"}:
        raise _unfit(f"the files {', '.join(sorted(data)) or 'none'}", "answers.jsonl, and windows.jsonl where the test has a filter")
    only = WindowSet.from_json(_lines(data, "windows.jsonl")) if "windows.jsonl" in data else None
    detector = Radioactivity.planned(plan, LiveKey.opened(opening), only)
    rows = _lines(data, "answers.jsonl")
    if not all(isinstance(row, dict) for row in rows):
        raise _unfit("a line of answers.jsonl that is no object", "one answer or reading in each line")
    if detector.mode == "closed":
        return detector.test(plan, [Answer.from_json(row) for row in rows])
    return detector.test(plan, [Reading.from_json(row) for row in rows])


def commitments(opening: object) -> tuple[str, ...]:
    """What an opening commits to, as `Plan.commitments` has it. Raises GuardError 'guard-evidence' or 'guard-key'."""
    return (LiveKey.opened(opening).commitment,)


def _lines(data: Mapping[str, bytes], name: str) -> list[Any]:
    try:
        return [json.loads(line) for line in data[name].decode().splitlines()]
    except (ValueError, RecursionError) as error:
        raise _unfit(f"{name} with a line that is no JSON", "one JSON value in each line") from error


def _other_plan(found: str) -> GuardError:
    return GuardError(
        "guard-plan",
        found=found,
        expected="the plan that this test makes",
        why="a test that is chosen after the data were seen has no p",
        do="Run the test that was planned, with the keys and the filter that the plan commits to.",
    )


def _unfit(found: str, expected: str) -> GuardError:
    return GuardError(
        "guard-evidence", found=found, expected=expected, do="Make the evidence with the teacher's vocabulary and for this kind of test."
    )
