"""Seeds for parts of a run, derived from the run's one seed, so that no two parts share a stream and none depends on what ran before it."""

from __future__ import annotations

from stillroom.core.hashing import canonical_json, sha256_hex


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2**53) for the part that `names` name.

    It fits a JSON number. It is the first 53 bits of the SHA-256 of the canonical JSON of [seed, *names], integers as {"int": decimal digits}:
    the text "1" and the number 1 are two names, and 0 is a seed like any other.
    """
    tagged = [{"int": str(int(name))} if isinstance(name, int) else name for name in (seed, *names)]
    return int(sha256_hex(canonical_json(tagged))[:14], 16) >> 3
