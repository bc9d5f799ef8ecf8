"""Whether a suspect was trained on text from a keyed sampler: its tokens, scored with the key (Sander et al. 2024, arXiv 2402.14904, done exactly).

Closed: from the tokens that the suspect answers with. Open ("reading mode"): from what it finds most probable next while it reads texts. Supervised: the
texts it is asked or given are the very ones that were served; the test is the same, and finds more.

Two p-values, each valid by itself: that of the exact law of the scheme's scores, which can be as small as the evidence makes it, and the rank of the live
key among its decoys, which needs no law. Where the two cannot both be right the finding has an alarm and supports nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from stillroom.core.errors import GuardError
from stillroom.core.identities import Json
from stillroom.guard import decoys as ranks
from stillroom.guard.decoys import LiveKey
from stillroom.guard.detector import Finding, Plan, nothing_scored
from stillroom.guard.keys import Key
from stillroom.guard.schemes import Scheme, scheme_from_json
from stillroom.guard.windows import Answer, OncePer, Pairs, Reading, WindowSet, pairs_of_answers, pairs_of_readings

Mode: TypeAlias = Literal["closed", "open"]
TEST = "radioactivity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Radioactivity:
    """`vocabulary` is the fingerprint of the teacher's vocabulary, `size` its number of tokens: all ids are the teacher's.

    `only` restricts the test to windows fixed beforehand, such as those of the texts that were served: they are where a student has learned something.
    `once_per`: what is scored once over all evidence. "pair" uses all that there is, and its law is exact where what the suspect was given does not depend on
    the live key. "window" uses less, and its law is exact for a given number of scored windows also where the suspect reads texts from the keyed sampler.
    """

    mode: Mode
    scheme: Scheme
    key: LiveKey
    vocabulary: str
    size: int
    supervised: bool = False
    only: WindowSet | None = None
    once_per: OncePer = "pair"

    def plan(self, *, alpha: float) -> Plan:
        """The test, before there is data. Its commitments bind to the keys and what they served, to the vocabulary and, where there is one, to the filter."""
        settings: Json = {
            "mode": self.mode,
            "scheme": self.scheme.as_json(),
            "supervised": self.supervised,
            "filtered": self.only is not None,
            "once_per": self.once_per,
            "decoys": self.key.decoys,
        }
        commitments = (
            self.key.commitment,
            " ".join(("served", *self.key.at)),
            f"vocabulary {self.vocabulary} of {self.size} tokens",
            *(() if self.only is None else (f"filter {self.only.sha256}",)),
        )
        return Plan(test=TEST, null="key", alpha=alpha, settings=settings, commitments=commitments)

    @classmethod
    def planned(cls, plan: Plan, key: LiveKey, *, vocabulary: str, size: int, only: WindowSet | None = None) -> Radioactivity:
        """The test that has this plan, given what the plan commits to. Raises GuardError 'guard-plan'."""
        settings = plan.settings
        try:
            detector = cls(
                mode=settings["mode"],
                scheme=scheme_from_json(settings["scheme"]),
                key=key,
                vocabulary=vocabulary,
                size=size,
                supervised=settings["supervised"],
                only=only,
                once_per=settings["once_per"],
            )
        except (KeyError, TypeError) as error:
            raise _other_plan(f"settings of another test ({type(error).__name__}: {error})") from error
        detector._require(plan)
        return detector

    def test(self, plan: Plan, evidence: Sequence[Answer] | Sequence[Reading]) -> Finding:
        """What the evidence says of the live key. Raises GuardError 'guard-plan' and 'guard-evidence'."""
        self._require(plan)
        return self.finding(plan, self.pairs(evidence))

    def finding(self, plan: Plan, pairs: Pairs) -> Finding:
        """The same of pairs that `pairs` gave, whose plan nobody compares: for a calibration, which scores the same pairs with many keys."""
        if not len(pairs):
            return nothing_scored(plan, pairs.left_out)
        total = self.total(self.key.live, pairs)
        log_p = self.scheme.log_p(total, len(pairs))
        details: Json = {
            "mean_score": total / len(pairs),
            "mean_score_under_null": self.scheme.mean,
            "scored_share": len(pairs) / (len(pairs) + sum(pairs.left_out.values())),
            "decoys": self.key.decoys,
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
                name for name in ("test", "null", "settings", "commitments", "stopping", "version") if getattr(mine, name) != getattr(plan, name)
            ]
            raise _other_plan(f"a plan with other {' and '.join(differ)}")


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
