"""A live key among decoys: a test that is exact whatever the keyed function or the tokenizer, where what the suspect was given is the same for all keys.

Before anything is served, D + 1 keys are drawn, one of them is chosen by chance to serve with, and all of it is committed to. A suspect that does not depend
on the live key knows nothing of which it was: any of the keys is as likely as any other to have the largest statistic, and p = (1 + decoys with at least
the live key's statistic) / (D + 1) is exact. It cannot be smaller than 1 / (D + 1), which is why it stands beside the law and not in its place.

Texts from the live key that the suspect was given, or a filter made of them, tell which key it was. With them the rank is as good as the rules of `windows`,
like the law: it is no check on those.

What makes either p worth anything is that the secret was fixed before the suspect was: of 2**40 secrets some give an innocent suspect's answers a p of
2**-40. So the commitment belongs into a registration whose hash others hold before the suspect is trained (`registration`).

The decoys also try the law itself. Where it holds, each decoy reaches the live key's statistic with probability p, the law's p, independently: the number
that do is Bin(D, p), whatever the suspect has learned. A number that this makes less probable than `DISAGREEMENT` says that the law does not hold of these
data, and a finding is not to be relied on: `disagrees`. It is a false alarm with at most that probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from stillroom.core.errors import GuardError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.guard.keys import Key, hkdf_sha256
from stillroom.guard.laws import log_binomial_tail

DECOYS, MOST_DECOYS = 99, 9_999
DISAGREEMENT = 1e-3
_NONCE_DOMAIN = b"stillroom guard decoys 1\n"


@dataclass(frozen=True)
class LiveKey:
    """The live key and its decoys, and which one is live, out of one secret: whoever is given it can check everything.

    With no decoys it is a live key alone. `for_serving` makes one for an epoch and a cohort, with a secret and a commitment of its own, so that to open one
    to others gives none of the rest away.
    """

    secret: Key = field(repr=False)
    decoys: int = DECOYS

    def __post_init__(self) -> None:
        if not 0 <= self.decoys <= MOST_DECOYS:
            raise ValueError(f"there are 0 to {MOST_DECOYS:,} decoys; found {self.decoys}")

    @classmethod
    def generate(cls, decoys: int = DECOYS) -> LiveKey:
        """A new one from the operating system's source of randomness."""
        return cls(Key.generate(), decoys)

    @classmethod
    def load(cls, path: Path, decoys: int = DECOYS) -> LiveKey:
        """The one whose secret is in a key file. Raises GuardError 'guard-key'."""
        return cls(Key.load(path), decoys)

    @property
    def commitment(self) -> str:
        """What is published before the first token is served: it binds to all keys, to their number and to which of them is live, and tells nothing of them."""
        nonce = hkdf_sha256(self.secret.secret, _NONCE_DOMAIN)
        return sha256_hex(canonical_json({"decoys": self.decoys, "secret": self.secret.commitment(nonce)}))

    def opening(self) -> Json:
        """What opens the commitment: the secret. Nothing is to be served with it any more."""
        return {"secret": self.secret.secret.hex(), "decoys": self.decoys}

    @classmethod
    def opened(cls, opening: object) -> LiveKey:
        """The one whose `opening` this is. Raises GuardError 'guard-evidence', or 'guard-key' for a secret that is no key."""
        if isinstance(opening, dict) and opening.keys() == {"secret", "decoys"}:
            secret, decoys = opening["secret"], opening["decoys"]
            if isinstance(secret, str) and type(decoys) is int and 0 <= decoys <= MOST_DECOYS:
                return cls(Key.from_hex(secret), decoys)
        raise GuardError(
            "guard-evidence",
            found="an opening that is not one of a live key",
            expected="`secret`, in hexadecimal digits, and `decoys`, their number",
            do="Write it with LiveKey.opening.",
        )

    def for_serving(self, *, epoch: str, cohort: str) -> LiveKey:
        """What one cohort of accounts is served with during one epoch: what is learned of it tells nothing of another's."""
        return LiveKey(self.secret.subkey("serving", epoch, cohort), self.decoys)

    @cached_property
    def place(self) -> int:
        """Which of the keys is live."""
        return int.from_bytes(self.secret.subkey("place").secret, "big") % (self.decoys + 1)

    @cached_property
    def live(self) -> Key:
        """The key to serve with."""
        return self._key(self.place)

    @cached_property
    def others(self) -> tuple[Key, ...]:
        """The decoys, which nothing is ever served with."""
        return tuple(self._key(place) for place in range(self.decoys + 1) if place != self.place)

    def _key(self, place: int) -> Key:
        return self.secret.subkey("key", place)


def rank_p(at_least: int, decoys: int) -> float:
    """The exact p where `at_least` of `decoys` decoys have at least the live key's statistic."""
    if not 0 <= at_least <= decoys or decoys < 1:
        raise ValueError(f"a rank is among at least one decoy; found {at_least} of {decoys}")
    return (1 + at_least) / (1 + decoys)


def disagrees(log_p: float, at_least: int, decoys: int, *, level: float = DISAGREEMENT) -> bool:
    """Whether so many, or so few, decoys reach the live key's statistic that the law that says exp(log_p) is refuted at `level` (both sides together)."""
    p = math.exp(log_p)
    if p == 0.0 or p == 1.0:
        return at_least != p * decoys
    too_many = log_binomial_tail(decoys, p, at_least)
    too_few = log_binomial_tail(decoys, 1.0 - p, decoys - at_least) if p > 1e-15 else 0.0
    return min(too_many, too_few) <= math.log(level / 2.0)
