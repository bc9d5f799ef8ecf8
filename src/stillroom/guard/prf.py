"""The one keyed function of all schemes: SipHash-2-4 of (scheme, window, token), for many pairs at once.

Aumasson and Bernstein, "SipHash: a fast short-input PRF" (2012). Each value is that of the standard function over the bytes

    8 bytes   the scheme's name, padded with zeros
    4 bytes   for each token of the window, in order; little-endian
    4 bytes   the token; little-endian

under the first 16 bytes of the key, so that anybody who is given a key can compute it with any implementation. It is a cryptographic function: without
the key its values cannot be told from independent uniform draws, one for each (window, token). That, and de-duplication, is all that the exact null
of the tests rests on; a table or a linear generator in its place would break it.

N pairs, K tokens of a window, M candidates.
"""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

from stillroom.guard.keys import Key

Words = NDArray[numpy.uint64]
Ids = NDArray[numpy.integer]

NAME_BYTES = 8
# Pairs that are hashed at once: the five arrays of state stay in a processor's cache.
_AT_ONCE = 1 << 14
_INITIAL = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)


def keyed(key: Key, scheme: str, windows_NK: Ids, tokens_N: Ids) -> Words:
    """64 uniform bits for each (window, token). Ids must be in [0, 2**32)."""
    name = _name(scheme)
    windows_NK, tokens_N = _as_uint64(windows_NK), _as_uint64(tokens_N)
    found = numpy.empty(len(tokens_N), numpy.uint64)
    for begin in range(0, len(tokens_N), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        found[part] = _siphash(key, name, windows_NK[part], tokens_N[part])
    return found


def keyed_candidates(key: Key, scheme: str, windows_BK: Ids, candidates_BM: Ids) -> Words:
    """The same for M candidates after each of B windows: B x M."""
    rows, candidates = candidates_BM.shape
    windows_NK = numpy.repeat(_as_uint64(windows_BK), candidates, axis=0)
    return keyed(key, scheme, windows_NK, candidates_BM.reshape(-1)).reshape(rows, candidates)


def uniform(words_N: Words) -> NDArray[numpy.float64]:
    """The top 53 bits as numbers in [0, 1), each a multiple of 2**-53."""
    return (words_N >> numpy.uint64(11)).astype(numpy.float64) * 2.0**-53


def bits(words_N: Words, count: int) -> NDArray[numpy.uint8]:
    """The lowest `count` bits (at most 64) of each, N x count: independent fair coins."""
    assert 0 < count <= 64, "a value has 64 bits"
    shifts = numpy.arange(count, dtype=numpy.uint64)
    return ((words_N[:, None] >> shifts[None, :]) & numpy.uint64(1)).astype(numpy.uint8)


def _name(scheme: str) -> int:
    raw = scheme.encode("ascii")
    assert 0 < len(raw) <= NAME_BYTES, "a scheme's name has at most eight letters"
    return int.from_bytes(raw.ljust(NAME_BYTES, b"\0"), "little")


def _as_uint64(ids: Ids) -> Words:
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= 1 << 32):
        raise ValueError(f"token ids must be in [0, 2**32); found {int(ids.min())} to {int(ids.max())}")
    return ids.astype(numpy.uint64)


def _siphash(key: Key, name: int, windows_NK: Words, tokens_N: Words) -> Words:
    k0, k1 = (int.from_bytes(key.secret[at : at + 8], "little") for at in (0, 8))
    state = [numpy.full(len(tokens_N), initial ^ half, numpy.uint64) for initial, half in zip(_INITIAL, (k0, k1, k0, k1), strict=True)]
    _absorb(state, numpy.full(len(tokens_N), name, numpy.uint64))
    numbers = [*windows_NK.T, tokens_N]
    for low, high in zip(numbers[0::2], numbers[1::2], strict=False):
        _absorb(state, low | (high << numpy.uint64(32)))
    length = NAME_BYTES + 4 * len(numbers)
    last = numpy.full(len(tokens_N), (length & 0xFF) << 56, numpy.uint64)
    _absorb(state, last | numbers[-1] if len(numbers) % 2 else last)
    state[2] ^= numpy.uint64(0xFF)
    for _ in range(4):
        _round(state)
    return state[0] ^ state[1] ^ state[2] ^ state[3]


def _absorb(state: list[Words], word: Words) -> None:
    state[3] ^= word
    _round(state)
    _round(state)
    state[0] ^= word


def _round(state: list[Words]) -> None:
    """One SipRound, in place; addition of uint64 arrays wraps around as it must."""
    v0, v1, v2, v3 = state
    v0 += v1
    v2 += v3
    v1 = state[1] = _rotated(v1, 13)
    v3 = state[3] = _rotated(v3, 16)
    v1 ^= v0
    v3 ^= v2
    v0 = state[0] = _rotated(v0, 32)
    v2 += v1
    v0 += v3
    v1 = state[1] = _rotated(v1, 17)
    v3 = state[3] = _rotated(v3, 21)
    v1 ^= v2
    v3 ^= v0
    state[2] = _rotated(v2, 32)


def _rotated(word: Words, by: int) -> Words:
    return (word << numpy.uint64(by)) | (word >> numpy.uint64(64 - by))
