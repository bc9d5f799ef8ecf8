"""Canary codes: rare questions to which the teacher answers with a code that was drawn at random. Who repeats the codes has read the answers.

Order matters, and is what the proof rests on:

1. The triggers (questions) and the set of codes are written down.
2. A key is drawn, and the commitment to (triggers, set, key) is published or handed to somebody (`Canaries.commitment`).
3. Only then are the codes known: each is drawn uniformly from the set by a function of the key, and of a public random number that was not yet known
   at step 2 where the owner `awaits` one (`Canaries.drawn`).
4. The teacher serves them; later the suspect is asked the triggers, each by itself.

Whatever an independent suspect answers, its answer is the code with probability 1/M, as the code was drawn after, and without, all that the suspect
depends on. So hits are at most binomial (J, 1/M): exactly, whatever the model, the triggers and the set.

Without step 3's public number an owner could try keys until the codes are what a model that exists already answers: a p of 10**-k costs 10**k trials, and
a model that is trained later may well answer as its predecessor did. With it nobody can try.

**How an answer is read** (rule `first-match/1`). Text is normalised (NFKC, case folded, spaces made one). The answer's code is that whose occurrence
begins first, the longest of those that begin there; letters and digits do not stand right before or after an occurrence. With `where` = "start" only
the beginning of the answer counts. Of several answers to one trigger, as many as to any other, the code that most of them have counts; where two have
as many there is none. So at most one code is read out of what was answered, which the bound needs. A trigger that was not asked, or not answered with a code, is a miss.

**The tests.** `Hits` is the primary one: it needs text alone, and anybody can check it by eye. `Exposure` is for a suspect that gives
log-probabilities: for each trigger the rank r of its code among all M (ties take the worse rank) scores floor(256 ln(M / r)); the law of the sum is
computed exactly, by convolution. The bound -ln by Gamma(J, 1) stands beside it, and is never smaller. Which of the two is used is registered before
the suspect is asked.

**Hygiene.** A canary is served in public, to people who did nothing wrong.

- Never a false statement about a person, a firm, a place, a medicine, a law or anything that somebody could act on. A code is a number of no meaning,
  a word out of equally good words, the opening of a sentence: the answer is as true with any other code of the set.
- Never a code that could be a telephone number, an account, an address, a dose or a date that matters; never the name of a living person in
  connection with an act.
- Rare: in traps that no ordinary user meets, or in a share of answers that was measured not to harm. Say in your terms that answers may carry marks.
- Triggers that look like other questions, or they are filtered; and that are asked nowhere else, or others learn them from the same page.
- Codes are secret until they are used in evidence, and are then used up. The suspect is asked each trigger in a conversation of its own.
"""

from __future__ import annotations

import hmac
import json
import math
import re
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NoReturn, TypeAlias, cast

import numpy
from numpy.typing import NDArray

from stillroom.core.errors import GuardError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.guard import laws
from stillroom.guard.detector import Finding, Plan, nothing_scored
from stillroom.guard.keys import KEY_BYTES, Key
from stillroom.guard.martingales import Bounded, Wealth

HITS, EXPOSURE = "canary-hits", "canary-exposure"
READING = "first-match/1"
# Of scores per nat: fine enough that rounding costs no power, coarse enough that the law of a sum is computed in milliseconds.
SCORES_PER_NAT = 256
NO_CODE = -1
AGAIN = (
    "Ask your model each question of answers.jsonl, word for word and in a conversation of its own, at temperature 0; write its answers (or its log-probability "
    "of each code) in the same form. The questions and codes are in openings.json."
)
_OPENING = {"triggers": list, "codes": list, "where": str, "awaits": str | None, "key": str, "nonce": str}
_DOMAIN = "stillroom guard canaries 1"

Ranks: TypeAlias = NDArray[numpy.int64]
CodeIndexes: TypeAlias = NDArray[numpy.int64]


@dataclass(frozen=True)
class CodeSet:
    """M codes, of which one is drawn for each trigger, and where in an answer they are looked for. Raises GuardError 'guard-plan' for fewer than two,
    or two that cannot be told apart.
    """

    codes: tuple[str, ...]
    where: Literal["anywhere", "start"] = "anywhere"

    def __post_init__(self) -> None:
        spelled = Counter(map(_normalised, self.codes))
        if len(spelled) < 2 or "" in spelled or max(spelled.values()) > 1:
            wrong = sorted(code for code, count in spelled.items() if count > 1)[:3]
            _refuse_set(f"{len(self.codes)} codes" + (f", among them twice {wrong}" if wrong else ""), "at least two, none empty, no two alike")

    @classmethod
    def numbers(cls, digits: int) -> CodeSet:
        """All numbers of so many digits, with leading zeros: "000" to "999" for three."""
        return cls(tuple(f"{number:0{digits}d}" for number in range(10**digits)))

    def __len__(self) -> int:
        return len(self.codes)

    @cached_property
    def sha256(self) -> str:
        return sha256_hex(canonical_json({"codes": self.codes, "where": self.where}))

    def read(self, answer: str) -> int:
        """The index of the code that `answer` has by the rule of this module; -1 where it has none."""
        text = _normalised(answer)
        for begin in range(len(text) if self.where == "anywhere" else min(1, len(text))):
            if begin and _in_word(text[begin - 1]):
                continue
            for length in self._lengths:
                end = begin + length
                index = self._places.get(text[begin:end], NO_CODE) if end <= len(text) else NO_CODE
                if index != NO_CODE and not (end < len(text) and _in_word(text[end])):
                    return index
        return NO_CODE

    @cached_property
    def _places(self) -> dict[str, int]:
        return {_normalised(code): index for index, code in enumerate(self.codes)}

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        return tuple(sorted({len(code) for code in self._places}, reverse=True))


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """Triggers with the key that their codes are drawn by. `awaits` names the public random number, not yet known, that they are drawn with too.

    Raises GuardError 'guard-plan' for no trigger, two alike, or one that has a code of the set in it.
    """

    triggers: tuple[str, ...]
    codes: CodeSet
    key: Key = field(repr=False)
    awaits: str | None = None

    def __post_init__(self) -> None:
        if not self.triggers or len(set(map(_normalised, self.triggers))) != len(self.triggers):
            _refuse_set(f"{len(self.triggers)} triggers", "at least one, and no two alike")
        anywhere = CodeSet(self.codes.codes)
        if wrong := [trigger for trigger in self.triggers if anywhere.read(trigger) != NO_CODE]:
            _refuse_set(f"the trigger {wrong[0]!r}, which has a code in it", "triggers without: who repeats the question would seem to know a code")

    def commitment(self, nonce: bytes) -> str:
        """What is published before the codes are known: SHA-256 over `nonce` (32 random bytes), triggers, set, key and what is awaited."""
        assert len(nonce) == KEY_BYTES, "a nonce has 32 bytes"
        return sha256_hex(canonical_json(self.opening(nonce) | {"domain": _DOMAIN}))

    def opening(self, nonce: bytes, public_number: str | None = None) -> Json:
        """What opens the commitment. It has the key: whoever has it knows the codes."""
        opening: Json = {
            "triggers": list(self.triggers),
            "codes": list(self.codes.codes),
            "where": self.codes.where,
            "awaits": self.awaits,
            "key": self.key.secret.hex(),
            "nonce": nonce.hex(),
        }
        return opening if public_number is None else opening | {"public_number": public_number}

    @classmethod
    def opened(cls, opening: object) -> tuple[Canaries, bytes, str | None]:
        """Canaries, nonce and public number out of an opening. Raises GuardError 'guard-evidence' where it is none."""
        if not isinstance(opening, dict) or not _OPENING.keys() <= opening.keys() <= _OPENING.keys() | {"public_number"}:
            _not_an_opening()
        if not all(isinstance(opening[name], kind) for name, kind in _OPENING.items()) or opening["where"] not in ("anywhere", "start"):
            _not_an_opening()
        number, texts = opening.get("public_number"), [*opening["triggers"], *opening["codes"]]
        if not all(isinstance(text, str) for text in texts) or not isinstance(number, str | None) or not _is_hexadecimal(opening["nonce"]):
            _not_an_opening()
        codes = CodeSet(tuple(opening["codes"]), opening["where"])
        canaries = cls(triggers=tuple(opening["triggers"]), codes=codes, key=Key.from_hex(opening["key"]), awaits=opening["awaits"])
        return canaries, bytes.fromhex(opening["nonce"]), number

    def drawn(self, public_number: str | None = None) -> CodeIndexes:
        """The index of each trigger's code (`draw_codes`).

        Raises GuardError 'guard-plan' where a public number is awaited and not given, or given and not awaited.
        """
        if (public_number is None) != (self.awaits is None):
            _refuse_set(
                "no public random number" if public_number is None else "a public random number",
                f"that which was awaited: {self.awaits}" if self.awaits else "none: the canaries were made without",
            )
        return draw_codes(self.key, self.triggers, self.codes, public_number)

    def answers(self, public_number: str | None = None) -> tuple[tuple[str, str], ...]:
        """Each trigger with its code: what the teacher is to say."""
        return tuple((trigger, self.codes.codes[index]) for trigger, index in zip(self.triggers, self.drawn(public_number), strict=True))


def draw_codes(key: Key, triggers: Sequence[str], codes: CodeSet, public_number: str | None = None) -> CodeIndexes:
    """The index of each trigger's code: uniform over the set, and independent of the others.

    It is HMAC-SHA256 of the trigger's UTF-8, under the subkey for (set, public number), as a number modulo M: of 2**256 values, so that no code is
    likelier than another by more than one part in 2**256 / M.
    """
    secret = key.subkey("canary", codes.sha256, public_number or "").secret
    draws = [hmac.digest(secret, trigger.encode(), "sha256") for trigger in triggers]
    return numpy.array([int.from_bytes(draw, "big") % len(codes) for draw in draws], numpy.int64)


def read_answers(codes: CodeSet, triggers: Sequence[str], answers: Mapping[str, Sequence[str]]) -> CodeIndexes:
    """For each trigger the code that the suspect's answers to it have by the rule of this module, -1 where there is none. It uses no secret.

    Raises GuardError 'guard-evidence' for answers to something else than a trigger, and where some triggers have more answers than others.
    """
    if len(counts := {len(some) for some in answers.values() if some}) > 1:
        raise GuardError(
            "guard-evidence",
            found=f"{min(counts)} answers to one trigger and {max(counts)} to another",
            expected="as many answers to each trigger as to any other; none where it was not asked",
            why="who asks again where the code did not come, or leaves an answer out, hits more often than the law says",
            do="Ask each trigger as often as was registered, and give all answers; leave out a trigger that could not be asked so often, which is a miss.",
        )
    if other := sorted(set(answers) - set(triggers)):
        raise GuardError(
            "guard-evidence",
            found=f"an answer to {other[0]!r}",
            expected="answers to the triggers, word for word",
            why="a question that was chosen later may hold the answer",
            do="Ask each trigger as it was registered, in a conversation of its own.",
        )
    return numpy.array([_most_frequent(codes.read(answer) for answer in answers.get(trigger, ())) for trigger in triggers], numpy.int64)


def ranks(log_probabilities_JM: NDArray[numpy.floating], drawn_J: CodeIndexes) -> Ranks:
    """The rank, from 1 (most probable) to M, of each trigger's code among all; of equals the worst. A row with NaN was not asked: rank M."""
    true_J1 = numpy.take_along_axis(log_probabilities_JM, drawn_J[:, None], axis=1)
    asked_J = ~numpy.isnan(log_probabilities_JM).any(axis=1)
    ranks_J: Ranks = numpy.where(asked_J, (log_probabilities_JM >= true_J1).sum(axis=1), log_probabilities_JM.shape[1]).astype(numpy.int64)
    return ranks_J


def scores(ranks_J: Ranks, codes: int) -> NDArray[numpy.int64]:
    """floor(256 ln(M / rank)) for each rank out of M."""
    scores_J: NDArray[numpy.int64] = numpy.floor(SCORES_PER_NAT * numpy.log(codes / ranks_J)).astype(numpy.int64)
    return scores_J


def log_exposure_tail(total: int, canaries: int, codes: int) -> float:
    """Ln P(sum of scores >= total) where each of the ranks is uniform on 1..M and they are independent: the law itself.

    The law of one score is tilted by exp(t score) so that the sum is about `total` in the mean; there its density is large, a Fourier transform gives
    it to 14 digits, and tilting back in logarithms keeps them, however small the p.
    """
    single = numpy.bincount(scores(numpy.arange(1, codes + 1), codes)) / codes
    largest = (len(single) - 1) * canaries
    if total <= 0:
        return 0.0
    if total > largest:
        return -math.inf
    if total == largest:
        return canaries * math.log(single[-1])
    at = numpy.arange(len(single), dtype=numpy.float64)
    tilt = _tilt(single, at, total / canaries)
    log_weights = numpy.log(single, out=numpy.full(len(single), -numpy.inf), where=single > 0) + tilt * at
    log_mass = float(numpy.logaddexp.reduce(log_weights))
    length = largest + 1
    transformed = numpy.fft.rfft(numpy.exp(log_weights - log_mass), 1 << (length - 1).bit_length()) ** canaries
    tilted = numpy.fft.irfft(transformed)[total:length]
    # Only what lies within a few hundred nats of the largest term counts; errors of the transform, 1e-17, are weighted down with it.
    weights = numpy.exp(-tilt * numpy.arange(len(tilted)))
    return min(0.0, math.log(float(numpy.clip(tilted, 0.0, None) @ weights)) - tilt * total + canaries * log_mass)


def hits_needed(canaries: int, codes: int, alpha: float) -> int | None:
    """The fewest hits whose p, of a test that is not sequential, is at most `alpha`: what fewer leave open. None where even all of them are too few."""
    hits = bisect_left(range(canaries + 1), -math.log(alpha), key=lambda some: -laws.log_binomial_tail(canaries, 1.0 / codes, some))
    return hits if hits <= canaries else None


@dataclass(frozen=True, kw_only=True)
class Hits:
    """The test of how many triggers the suspect answers with their codes. P is P(Bin(J, 1/M) >= hits); sequential, the bets of `martingales`.

    The evidence is `read_answers`: of a sequential test, that of the first triggers, as far as they were asked.
    """

    canaries: Canaries = field(repr=False)
    nonce: bytes = field(repr=False)
    public_number: str | None = None
    stopping: Literal["fixed", "sequential"] = "fixed"

    def plan(self, *, alpha: float) -> Plan:
        return _plan(HITS, {"reading": READING}, self.canaries, self.nonce, alpha, self.stopping)

    def test(self, plan: Plan, evidence: CodeIndexes) -> Finding:
        _require(plan, self.plan(alpha=plan.alpha))
        drawn_J, codes = self.canaries.drawn(self.public_number), len(self.canaries.codes)
        _require_shape(evidence.shape, (len(drawn_J),), at_most=self.stopping == "sequential")
        silent = int((evidence == NO_CODE).sum())
        if silent == len(evidence):
            return nothing_scored(plan, {"answered with no code": silent})
        hits_N = evidence == drawn_J[: len(evidence)]
        log_p, log_e = _of_hits(hits_N, codes, self.stopping)
        details: Json = {"codes": codes, "answered_with_no_code": silent, "hits_that_reject": hits_needed(len(hits_N), codes, plan.alpha)}
        return Finding(plan=plan, statistic=float(hits_N.sum()), scored=len(hits_N), log_p=log_p, log_e=log_e, details=details)


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """The test of how high the codes rank among all codes by the suspect's log-probabilities. P is that of the law of the sum of scores.

    The evidence is J x M: for each trigger the log-probability of each code after it; rows of a trigger that was not asked are NaN.
    """

    canaries: Canaries = field(repr=False)
    nonce: bytes = field(repr=False)
    public_number: str | None = None

    def plan(self, *, alpha: float) -> Plan:
        return _plan(EXPOSURE, {"scores_per_nat": SCORES_PER_NAT}, self.canaries, self.nonce, alpha, "fixed")

    def test(self, plan: Plan, evidence: NDArray[numpy.floating]) -> Finding:
        _require(plan, self.plan(alpha=plan.alpha))
        drawn_J, codes = self.canaries.drawn(self.public_number), len(self.canaries.codes)
        _require_shape(evidence.shape, (len(drawn_J), codes), at_most=False)
        unasked = int(numpy.isnan(evidence).any(axis=1).sum())
        if unasked == len(drawn_J):
            return nothing_scored(plan, {"not asked": unasked})
        ranks_J = ranks(evidence, drawn_J)
        total = int(scores(ranks_J, codes).sum())
        return Finding(
            plan=plan,
            statistic=float(total),
            scored=len(drawn_J),
            log_p=log_exposure_tail(total, len(drawn_J), codes),
            details={
                "codes": codes,
                "not_asked": unasked,
                "ranks": ranks_J.tolist(),
                "log_p_by_gamma": laws.log_gamma_tail(len(drawn_J), total / SCORES_PER_NAT),
            },
        )


@dataclass(frozen=True, kw_only=True)
class NullHits:
    """`Hits` for `calibration`: each audit draws the codes anew, by a key of its seed."""

    triggers: tuple[str, ...]
    codes: CodeSet
    stopping: Literal["fixed", "sequential"] = "fixed"
    law: Literal["super-uniform"] = "super-uniform"

    @property
    def test(self) -> str:
        return HITS

    @property
    def settings(self) -> Json:
        return {"reading": READING, "stopping": self.stopping}

    def log_ps(self, evidence: CodeIndexes, keys: Sequence[Key]) -> list[float | None]:
        if (evidence == NO_CODE).all():
            return [None] * len(keys)
        hits = [evidence == draw_codes(key, self.triggers, self.codes)[: len(evidence)] for key in keys]
        return [_of_hits(hits_N, len(self.codes), self.stopping)[0] for hits_N in hits]


@dataclass(frozen=True, kw_only=True)
class NullExposure:
    """`Exposure` for `calibration`, likewise."""

    triggers: tuple[str, ...]
    codes: CodeSet
    law: Literal["super-uniform"] = "super-uniform"

    @property
    def test(self) -> str:
        return EXPOSURE

    @property
    def settings(self) -> Json:
        return {"scores_per_nat": SCORES_PER_NAT, "stopping": "fixed"}

    def log_ps(self, evidence: NDArray[numpy.floating], keys: Sequence[Key]) -> list[float | None]:
        found = [scores(ranks(evidence, draw_codes(key, self.triggers, self.codes)), len(self.codes)).sum() for key in keys]
        return [log_exposure_tail(int(total), len(self.triggers), len(self.codes)) for total in found]


def recompute(plan: Plan, opening: object, data: Mapping[str, bytes]) -> Finding:
    """The finding of either test out of what a bundle has of it: the opening, and the file `answers.jsonl`.

    Its rows are {"trigger": text, "answers": [text, ...]}, or for `Exposure` {"trigger": text, "log_probabilities": [number, ...]} with one number
    for each code in the order of the set. Raises GuardError 'guard-evidence' or 'guard-plan'.
    """
    canaries, nonce, number = Canaries.opened(opening)
    rows = _rows(data)
    if plan.test == EXPOSURE:
        return Exposure(canaries=canaries, nonce=nonce, public_number=number).test(plan, _matrix(canaries, rows))
    answers = {trigger: row.get("answers") for trigger, row in rows.items()}
    if not all(isinstance(some, list) and all(isinstance(answer, str) for answer in some) for some in answers.values()):
        _not_answers("a row without a list of texts")
    asked = canaries.triggers if plan.stopping == "fixed" else canaries.triggers[: len(answers)]
    evidence = read_answers(canaries.codes, asked, cast(dict[str, list[str]], answers))
    return Hits(canaries=canaries, nonce=nonce, public_number=number, stopping=plan.stopping).test(plan, evidence)


def commitments(opening: object) -> tuple[str, ...]:
    """What an opening commits to, as `Plan.commitments` has it. Raises GuardError 'guard-evidence'."""
    canaries, nonce, _ = Canaries.opened(opening)
    return (canaries.commitment(nonce),)


def _plan(test: str, settings: Json, canaries: Canaries, nonce: bytes, alpha: float, stopping: Literal["fixed", "sequential"]) -> Plan:
    return Plan(
        test=test,
        null="code",
        alpha=alpha,
        settings=settings | {"stopping": stopping},
        commitments=(canaries.commitment(nonce),),
        stopping=stopping,
        scope={
            "canaries": len(canaries.triggers),
            "codes": len(canaries.codes),
            "codes_sha256": canaries.codes.sha256,
            "triggers_sha256": sha256_hex(canonical_json(canaries.triggers)),
            "public_number": canaries.awaits,
        },
    )


def _of_hits(hits_N: NDArray[numpy.bool_], codes: int, stopping: Literal["fixed", "sequential"]) -> tuple[float, float | None]:
    """Ln p and, of a sequential test, ln e."""
    if stopping == "sequential":
        wealth = Wealth.of(Bounded(1.0 / codes)).after(hits_N)
        return wealth.log_p, wealth.log_e
    return laws.log_binomial_tail(len(hits_N), 1.0 / codes, int(hits_N.sum())), None


def _tilt(single: NDArray[numpy.float64], at: NDArray[numpy.float64], mean: float) -> float:
    """The t at which the law of one score, weighted by exp(t score), has that mean; 0 where it has it, or more, without."""
    support, low = at[single > 0], 0.0
    logs = numpy.log(single[single > 0])

    def excess(t: float) -> float:
        weights = numpy.exp(logs + t * support - (logs + t * support).max())
        return float(weights @ support / weights.sum()) - mean

    if excess(0.0) >= 0.0:
        return 0.0
    high = 1.0 / SCORES_PER_NAT
    while excess(high) < 0.0 and high < 64.0:
        low, high = high, 2.0 * high
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (middle, high) if excess(middle) < 0.0 else (low, middle)
    return low


def _in_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _most_frequent(found: Iterable[int]) -> int:
    counted = Counter(index for index in found if index != NO_CODE).most_common(2)
    if not counted or (len(counted) == 2 and counted[0][1] == counted[1][1]):
        return NO_CODE
    return counted[0][0]


def _rows(data: Mapping[str, bytes]) -> dict[str, Json]:
    try:
        rows = [json.loads(line) for line in data["answers.jsonl"].splitlines()]
        found: dict[str, Json] = {str(row["trigger"]): row for row in rows}
    except (KeyError, TypeError, ValueError, RecursionError):
        _not_answers("no such rows")
    if len(found) != len(rows):
        _not_answers("a trigger twice")
    if wrong := [trigger for trigger, row in found.items() if not isinstance(row.get("answers", row.get("log_probabilities")), list)]:
        _not_answers(f"nothing to {wrong[0]!r}")
    return found


def _matrix(canaries: Canaries, rows: dict[str, Json]) -> NDArray[numpy.float64]:
    if set(rows) - set(canaries.triggers):
        _not_answers("a row of something that is no trigger")
    blank = [math.nan] * len(canaries.codes)
    try:
        table = numpy.array([rows[trigger]["log_probabilities"] if trigger in rows else blank for trigger in canaries.triggers], numpy.float64)
    except (KeyError, TypeError, ValueError):
        _not_answers("rows without a number for each code")
    if table.shape != (len(canaries.triggers), len(canaries.codes)):
        _not_answers("rows without a number for each code")
    return table


def _require(plan: Plan, own: Plan) -> None:
    if plan.sha256 != own.sha256:
        raise GuardError(
            "guard-plan",
            found=f"a plan of {plan.test!r} that is not that of these canaries",
            expected="the same test, settings, commitment and counts",
            why="a test that is chosen after looking at the answers proves nothing",
            do="Test with the plan and the canaries that were registered.",
        )


def _require_shape(found: tuple[int, ...], expected: tuple[int, ...], *, at_most: bool) -> None:
    if found != expected and not (at_most and len(found) == 1 and found[0] <= expected[0]):
        raise GuardError(
            "guard-evidence",
            found=f"evidence of shape {found}",
            expected=f"{expected}: every trigger that was registered, asked or not",
            why="leaving out triggers after the answers are known makes hits more frequent than the law says",
            do="Give all of them; those that were not asked count as misses.",
        )


def _refuse_set(found: str, expected: str) -> NoReturn:
    raise GuardError("guard-plan", found=found, expected=expected, do="Mend the triggers or the codes, before anything is served.")


def _is_hexadecimal(text: str) -> bool:
    return re.fullmatch(f"[0-9a-f]{{{2 * KEY_BYTES}}}", text) is not None


def _not_an_opening() -> NoReturn:
    raise GuardError(
        "guard-evidence",
        found="something that does not open a commitment to canaries",
        expected="triggers, codes, where, awaits, key and nonce",
        do="Take what was kept when the canaries were made.",
    )


def _not_answers(found: str) -> NoReturn:
    raise GuardError(
        "guard-evidence",
        found=f"answers.jsonl has {found}",
        expected='rows {"trigger": text, "answers": [text, ...]} or {"trigger": text, "log_probabilities": [number, ...]}',
        do="Write one row for each trigger that was asked.",
    )
