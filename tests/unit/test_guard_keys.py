"""Keys: derivation against RFC 5869, files that others cannot read, and keys that prove nothing refused (pitfall P14)."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest

from guard_cases import key
from stillroom.core.errors import GuardError
from stillroom.guard.keys import KEY_BYTES, Key, hkdf_sha256

# RFC 5869, appendix A.1 to A.3: secret, salt, information, length, output.
RFC_5869 = (
    (
        bytes([0x0B] * 22),
        bytes(range(13)),
        bytes(range(0xF0, 0xFA)),
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)),
        bytes(range(0x60, 0xB0)),
        bytes(range(0xB0, 0x100)),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (bytes([0x0B] * 22), b"", b"", "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"),
)


@pytest.mark.parametrize("case", RFC_5869, ids=["A.1", "A.2", "A.3"])
def test_derivation_is_that_of_the_standard(case: tuple[bytes, bytes, bytes, str]) -> None:
    secret, salt, information, output = case
    assert hkdf_sha256(secret, information, salt=salt, length=len(output) // 2).hex() == output


def test_subkeys_differ_by_every_name_and_by_the_type_of_a_name() -> None:
    names: list[tuple[str | int, ...]] = [
        (),
        ("a",),
        ("b",),
        ("a", "b"),
        ("b", "a"),
        ("ab",),
        ("1",),
        (1,),
        ("",),
        ("", ""),
        ("epoch", 1),
        ("epoch", "1"),
    ]
    found = {key(0).subkey(*some) for some in names}
    assert len(found | {key(0)}) == len(names) + 1
    assert key(0).subkey("a") == key(0).subkey("a")
    assert key(0).subkey("a") != key(1).subkey("a")


@pytest.mark.parametrize(
    "secret",
    [
        bytes(KEY_BYTES),
        b"\xff" * KEY_BYTES,
        (15485863).to_bytes(KEY_BYTES, "little"),  # hashing_key of transformers and lm-watermarking
        hashlib.sha256(b"15485863").digest(),
        (42).to_bytes(KEY_BYTES, "big"),
        hashlib.sha256(b"0").digest(),
        hashlib.sha256(
            b"654,400,836,123,340,443,597,160,57,29,590,639,13,715,468,990,966,226,324,585,118,504,421,521,129,669,732,225,90,960"
        ).digest(),
        b"password".ljust(KEY_BYTES, b"\0"),
        bytes([1, 2, 3, 4] * 8),
    ],
)
def test_a_key_that_anybody_could_have_is_refused(secret: bytes) -> None:
    with pytest.raises(GuardError, match="anybody could guess") as refused:
        Key(secret)
    assert refused.value.code == "guard-key"
    assert secret.hex() not in str(refused.value)


@pytest.mark.parametrize("text", ["", "00", "ab" * 31, "zz" * 32, "ab" * 33])
def test_what_is_no_key_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(GuardError) as refused:
        Key.from_hex(text)
    assert refused.value.code == "guard-key"
    assert not text or text not in str(refused.value)


def test_a_key_is_not_printed() -> None:
    some = key(0)
    assert some.secret.hex() not in repr(some)
    assert repr(some.secret)[2:-1] not in repr(some)


def test_keys_are_drawn_anew() -> None:
    assert len({Key.generate() for _ in range(100)}) == 100


def test_a_commitment_binds_to_key_and_nonce() -> None:
    nonce = bytes(range(32))
    assert key(0).commitment(nonce) == hashlib.sha256(b"stillroom guard key 1\n" + nonce + key(0).secret).hexdigest()
    assert len({key(0).commitment(nonce), key(1).commitment(nonce), key(0).commitment(bytes(range(1, 33)))}) == 3


def test_a_key_file_is_its_owners_alone_and_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    key(0).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Key.load(path) == key(0)
    before = path.read_bytes()
    with pytest.raises(GuardError, match="exists"):
        key(1).save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key.json"
    key(0).save(path)
    path.chmod(mode)
    with pytest.raises(GuardError, match=f"mode is {mode:o}"):
        Key.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"version": 2, "key": "' + b"ab" * 32 + b'"}',
        b'{"version": 1}',
        b'{"version": 1, "key": 3}',
        b"[" * 100_000,
    ],
)
def test_a_file_that_is_no_key_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key.json"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(GuardError) as refused:
        Key.load(path)
    assert refused.value.code == "guard-key"


def test_a_key_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuardError, match="No such file"):
        Key.load(tmp_path / "none.json")


def test_a_key_in_a_file_is_tried_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    path.write_text(json.dumps({"version": 1, "key": "00" * 32}))
    path.chmod(0o600)
    with pytest.raises(GuardError, match="anybody could guess"):
        Key.load(path)
