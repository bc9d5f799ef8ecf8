"""The keyed function is SipHash-2-4: its authors' vectors, and a plain implementation over bytes."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard_cases import key
from stillroom.guard import prf
from stillroom.guard.keys import Key

MASK = 2**64 - 1
# From vectors.h of the reference implementation (github.com/veorq/SipHash): key 00 01 .. 0f, message 00 01 .. of the length named.
VECTORS = {
    12: 0x751E8FBC860EE5FB, 16: 0x3F2ACC7F57C29BDB, 20: 0xBED65CF21AA2EE98, 24: 0xB8AD50C6F649AF94, 28: 0xDE4DAAACA71DC9A5,
    32: 0x7127512F72F27CCE, 36: 0x314DFFBE0815A3B4, 40: 0x0E3EA96B5304A7D0, 44: 0xF935451DE4F21DF2, 48: 0xE612A3CB9ECBA951,
    52: 0x0A8787BF8ECB74B2, 56: 0xB78DBFAF3A8D83BD, 60: 0x6CA4ECB15C5F91E1,
}  # fmt: skip
REFERENCE_KEY = Key(bytes(range(32)))


def siphash_24(secret: bytes, message: bytes) -> int:
    """The standard function over bytes, one message at a time, after the paper's section 2."""
    k0, k1 = struct.unpack("<QQ", secret[:16])
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rotate(word: int, by: int) -> int:
        return ((word << by) | (word >> (64 - by))) & MASK

    def one_round() -> None:
        v[0] = (v[0] + v[1]) & MASK
        v[1] = rotate(v[1], 13) ^ v[0]
        v[0] = rotate(v[0], 32)
        v[2] = (v[2] + v[3]) & MASK
        v[3] = rotate(v[3], 16) ^ v[2]
        v[0] = (v[0] + v[3]) & MASK
        v[3] = rotate(v[3], 21) ^ v[0]
        v[2] = (v[2] + v[1]) & MASK
        v[1] = rotate(v[1], 17) ^ v[2]
        v[2] = rotate(v[2], 32)

    padded = message + bytes(7 - len(message) % 8) + bytes([len(message) & 0xFF])
    for (word,) in struct.iter_unpack("<Q", padded):
        v[3] ^= word
        one_round()
        one_round()
        v[0] ^= word
    v[2] ^= 0xFF
    for _ in range(4):
        one_round()
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def message_of(scheme: str, window: list[int], token: int) -> bytes:
    return scheme.encode().ljust(8, b"\0") + struct.pack(f"<{len(window) + 1}I", *window, token)


@pytest.mark.parametrize("length", VECTORS)
def test_it_is_the_standard_function(length: int) -> None:
    message = bytes(range(length))
    words = list(struct.unpack(f"<{(length - 8) // 4}I", message[8:]))
    found = prf.keyed(REFERENCE_KEY, message[:8].decode("ascii"), np.array([words[:-1]], dtype=np.int64).reshape(1, -1), np.array([words[-1]]))
    assert int(found[0]) == VECTORS[length] == siphash_24(REFERENCE_KEY.secret, message)


def test_the_plain_implementation_gives_the_papers_own_value() -> None:
    assert siphash_24(bytes(range(16)), bytes(range(15))) == 0xA129CA6149BE45E5


ids = st.integers(0, 2**32 - 1)


@given(
    st.sampled_from(["redgreen", "gumbel", "x"]),
    st.lists(st.tuples(ids, ids, ids, ids), min_size=1, max_size=5),
    st.integers(0, 3),
    st.integers(0, 9),
)
def test_it_is_a_function_of_key_scheme_window_and_token(scheme: str, rows: list[tuple[int, ...]], window: int, number: int) -> None:
    array = np.array(rows, dtype=np.uint64)
    found = prf.keyed(key(number), scheme, array[:, :window], array[:, -1])
    expected = [siphash_24(key(number).secret, message_of(scheme, list(row[:window]), row[-1])) for row in rows]
    assert found.tolist() == expected


def test_many_at_once_are_each_by_itself_and_what_is_given_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    windows, tokens = rng.integers(0, 50_000, size=(40_000, 3)), rng.integers(0, 50_000, size=40_000)
    before = windows.copy(), tokens.copy()
    found = prf.keyed(key(0), "gumbel", windows, tokens)
    for place in (0, 1, 16_383, 16_384, 39_999):
        assert int(found[place]) == siphash_24(key(0).secret, message_of("gumbel", windows[place].tolist(), int(tokens[place])))
    assert (windows == before[0]).all()
    assert (tokens == before[1]).all()
    assert len(prf.keyed(key(0), "gumbel", windows[:0], tokens[:0])) == 0


def test_candidates_are_pairs_with_the_row_s_window() -> None:
    rng = np.random.default_rng(0)
    windows, candidates = rng.integers(0, 99, size=(5, 2)), rng.integers(0, 99, size=(5, 7))
    found = prf.keyed_candidates(key(0), "gumbel", windows, candidates)
    for row in range(5):
        assert (found[row] == prf.keyed(key(0), "gumbel", np.repeat(windows[row : row + 1], 7, axis=0), candidates[row])).all()


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_ids_beyond_32_bits_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match="token ids"):
        prf.keyed(key(0), "gumbel", np.array([[bad]]), np.array([0]))
    with pytest.raises(ValueError, match="token ids"):
        prf.keyed(key(0), "gumbel", np.array([[0]]), np.array([bad]))


def test_uniforms_and_coins_are_bits_of_the_value() -> None:
    words = np.array([0, 1, 2**11 - 1, 2**11, 2**63, 2**64 - 1], dtype=np.uint64)
    assert prf.uniform(words).tolist() == [0.0, 0.0, 0.0, 2.0**-53, 0.5, 1.0 - 2.0**-53]
    coins = prf.bits(words, 64)
    assert (coins.astype(object) @ np.array([1 << place for place in range(64)], dtype=object) == words.astype(object)).all()
    assert prf.bits(words, 3).tolist() == coins[:, :3].tolist()


def test_a_key_that_differs_in_one_bit_gives_other_values() -> None:
    """Half of the bits differ: over 64,000 of them, at most six standard deviations from it."""
    secret = bytearray(hashlib.sha256(b"one").digest())
    one = Key(bytes(secret))
    secret[0] ^= 1
    other = Key(bytes(secret))
    windows, tokens = np.zeros((1000, 1), np.int64), np.arange(1000)
    differ = np.bitwise_count(prf.keyed(one, "gumbel", windows, tokens) ^ prf.keyed(other, "gumbel", windows, tokens)).sum()
    assert abs(int(differ) - 32_000) <= 6 * 126.5
