"""What a test says before it sees data, what it found, and which sentence that allows.

A test is planned (`Plan`: its null, its settings, alpha, when it stops, commitments to the secrets), and the plan's digest is fixed before data. Its
`Finding` names the plan. A p-value is printed only where something was scored and a calibration of the same test, with the same settings, has passed
(`calibration.reported`); otherwise the finding says why there is none.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol, TypeAlias, TypeVar

from stillroom.core.errors import GuardError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.guard.laws import log10

VERSION = 1
Null: TypeAlias = Literal["key", "coin", "code"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What is assumed under a null, what its rejection proves, and what it does not."""

    null: str
    proves: str
    does_not_prove: str


CLAIMS: dict[Null, Claim] = {
    "key": Claim(
        null="The suspect does not depend on the secret key, given all else; nor does what it was asked, but for text that it was shown, whose windows are not scored.",
        proves="The suspect was trained on text from the sampler that has this key.",
        does_not_prove="Who asked for that text, that anybody asked our service, or that terms were broken: others may have published or sold it.",
    ),
    "coin": Claim(
        null="The suspect, and how it was asked, do not depend on the coins that chose which of two answers was served.",
        proves="The suspect was trained on the very answers that were served, not only on others of the same teacher.",
        does_not_prove="Who passed them on: an account that was served may have published them.",
    ),
    "code": Claim(
        null="The suspect, and how it was asked, do not depend on the codes, which were drawn after their triggers had been fixed.",
        proves="The suspect was trained on answers that have these codes.",
        does_not_prove="Who asked for them.",
    ),
}
NEGATIVE = "A test that does not reject clears nobody: too little of the text may have been used, or it was changed."


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A test, fixed before data. `settings` are all that the statistic depends on beside the data and the secrets; `commitments` bind to the secrets.

    `scope` is what else is fixed and anybody may read, such as counts and the digest of the prompts: part of the plan's identity, and no part of what a
    calibration is found by.
    """

    test: str
    null: Null
    alpha: float
    settings: Json
    commitments: tuple[str, ...] = ()
    stopping: Literal["fixed", "sequential"] = "fixed"
    scope: Json = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise ValueError(f"alpha lies between 0 and 1; found {self.alpha}")

    @property
    def sha256(self) -> str:
        """The plan's identity: SHA-256 of its canonical JSON."""
        return sha256_hex(canonical_json(self.as_json()))

    @property
    def calibrated_as(self) -> str:
        """What a calibration of this test is found by: test and settings, without alpha and secrets."""
        return sha256_hex(canonical_json({"test": self.test, "settings": self.settings}))

    def as_json(self) -> Json:
        return {**asdict(self), "commitments": list(self.commitments)}

    @classmethod
    def from_json(cls, tree: object) -> Plan:
        """The plan that `as_json` wrote. Raises GuardError 'guard-plan' for anything else."""
        known: Json = tree if isinstance(tree, dict) else {}
        try:
            plan = cls(**{**known, "commitments": tuple(known["commitments"])})
            if plan.as_json() == tree and plan.version == VERSION and plan.null in CLAIMS and plan.stopping in ("fixed", "sequential"):
                return plan
        except (TypeError, KeyError, ValueError):
            pass
        raise GuardError(
            "guard-plan",
            found="something that is no plan",
            expected=f"the fields of a plan of version {VERSION}",
            do="Take the plan as it was registered.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a test found in its data.

    `log_p` is the natural logarithm of the exact p, `log_e` that of the e-value of a sequential test; both None where `refused` says why. `scored` counts
    what entered the statistic, and `left_out` what did not, by reason. `rank_p` is the exact p of the live secret among decoys, where there were any.
    `alarm` says what makes the finding doubtful; a finding with an alarm supports no claim.
    """

    plan: Plan
    statistic: float | None
    scored: int
    log_p: float | None = None
    log_e: float | None = None
    rank_p: float | None = None
    refused: str | None = None
    alarm: str | None = None
    calibration: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    details: Json = field(default_factory=dict)

    @property
    def rejects(self) -> bool:
        """Whether the null is rejected at the plan's alpha, nothing speaking against the finding."""
        if self.refused is not None or self.alarm is not None:
            return False
        if self.log_p is not None:
            return self.log_p <= math.log(self.plan.alpha)
        return self.log_e is not None and self.log_e >= -math.log(self.plan.alpha)

    @property
    def p_text(self) -> str:
        """The p as it is printed: three digits, whatever its size; or why there is none. A test whose calibration is not named has none to print."""
        if self.refused is not None:
            return f"no p: {self.refused}"
        if self.log_p is None:
            return "no p"
        return "no p: it has not been held to a calibration" if self.calibration is None else power_of_ten(self.log_p)

    def as_json(self) -> Json:
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__ if name != "plan"},
            "plan_sha256": self.plan.sha256,
            "rejects": self.rejects,
        }


def power_of_ten(natural: float) -> str:
    """exp(natural) with three digits, also where it is no float64 any more."""
    if natural == -math.inf:
        return "0"
    if natural > math.log(1e-4):
        return f"{math.exp(natural):.3g}"
    exponent = math.floor(log10(natural))
    digits = f"{10.0 ** (log10(natural) - exponent):.2f}"
    return f"1.00e{exponent + 1}" if digits == "10.00" else f"{digits}e{exponent}"


E = TypeVar("E", contravariant=True)


class Detector(Protocol[E]):
    """A test over evidence of one kind. `plan` makes no use of data; `test` of nothing but evidence, secrets and the plan."""

    def plan(self, *, alpha: float) -> Plan: ...

    def test(self, plan: Plan, evidence: E) -> Finding:
        """Raises GuardError 'guard-plan' where the plan is of another test, other settings or other secrets."""
        ...


def nothing_scored(plan: Plan, left_out: dict[str, int]) -> Finding:
    """The finding where there is nothing to score: no p, and no p of 1 either."""
    why = "; ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count) or "there was no data"
    return Finding(plan=plan, statistic=None, scored=0, refused=f"nothing was left to score ({why})", left_out=left_out)
