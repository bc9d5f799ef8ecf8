"""Secret keys: drawn, kept in files of their owner's alone, derived for epochs and cohorts, and committed to before they are used.

Whoever knows a key can tell, and can forge, what was made with it. So a key is never printed, never derived from something guessable, and the keys
that other software publishes as its defaults are refused: text made with one of those proves nothing about who made it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from stillroom.core import durable
from stillroom.core.errors import GuardError
from stillroom.core.hashing import canonical_json

VERSION = 1
KEY_BYTES = 32
_LEAST_DISTINCT_BYTES = 8
_COMMITMENT_DOMAIN = b"stillroom guard key 1\n"
_DERIVATION_DOMAIN = b"stillroom guard subkey 1\n"
# The numbers that transformers, lm-watermarking and synthid-text have as defaults or in their examples.
_PUBLISHED_INTEGERS = (0, 1, 42, 1234, 35317, 15485863, 2**32 - 1, 2**64 - 1)
_PUBLISHED_LISTS = (
    (
        654,
        400,
        836,
        123,
        340,
        443,
        597,
        160,
        57,
        29,
        590,
        639,
        13,
        715,
        468,
        990,
        966,
        226,
        324,
        585,
        118,
        504,
        421,
        521,
        129,
        669,
        732,
        225,
        90,
        960,
    ),
    (90, 191, 22, 86, 14, 124, 3, 13, 21, 76, 1, 24, 56, 33, 21, 96, 44, 20, 66, 11),
)


@dataclass(frozen=True, slots=True)
class Key:
    """32 secret bytes. Two keys are one where their bytes are."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            _refuse(f"{len(self.secret)} bytes", f"{KEY_BYTES} bytes")
        if _is_published(self.secret) or len(set(self.secret)) < _LEAST_DISTINCT_BYTES:
            _refuse("a key that anybody could guess", "one that was drawn at random")

    @classmethod
    def generate(cls) -> Key:
        """A new key from the operating system's source of randomness."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_hex(cls, text: str) -> Key:
        """The key written in 64 hexadecimal digits. Raises GuardError 'guard-key'."""
        try:
            return cls(bytes.fromhex(text.strip()))
        except ValueError:
            _refuse("something other than hexadecimal digits", f"{2 * KEY_BYTES} hexadecimal digits")

    def subkey(self, *names: str | int) -> Key:
        """The key for what `names` name, such as an epoch and a cohort: HKDF-SHA256 (RFC 5869), from which neither this key nor another subkey follows."""
        information = _DERIVATION_DOMAIN + canonical_json([str(name) if isinstance(name, int) else {"name": name} for name in names])
        return Key(hkdf_sha256(self.secret, information))

    def commitment(self, nonce: bytes) -> str:
        """What may be published before the key is used: SHA-256 in hexadecimal of a domain line, `nonce` (32 random bytes) and the key.

        It binds to the key, and with the nonce kept secret it tells nothing of it.
        """
        assert len(nonce) == KEY_BYTES, "a nonce has 32 bytes"
        return hashlib.sha256(_COMMITMENT_DOMAIN + nonce + self.secret).hexdigest()

    def save(self, path: Path) -> None:
        """Writes the key to a new file that its owner alone can read. Raises GuardError 'guard-key' where `path` exists: a key is never overwritten."""
        if path.exists():
            _refuse(f"{path} exists", "a new file: a key that was overwritten can prove nothing any more")
        durable.write_bytes_atomic(path, (json.dumps({"version": VERSION, "key": self.secret.hex()}) + "\n").encode(), mode=0o600)

    @classmethod
    def load(cls, path: Path) -> Key:
        """The key in a file that `save` wrote. Raises GuardError 'guard-key' where it cannot be used, or others than its owner can read it."""
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            tree = json.loads(path.read_bytes())
        except OSError as error:
            _refuse(f"{path}: {error.strerror}", "a key file")
        except (ValueError, RecursionError):  # its text is not in the message: it may be a key
            _refuse(f"{path} is not JSON", "a key file")
        if mode & 0o077:
            _refuse(f"{path} can be read by others: its mode is {mode:o}", "mode 600")
        secret = tree.get("key") if isinstance(tree, dict) and tree.get("version") == VERSION else None
        if not isinstance(secret, str):
            _refuse(f"{path} is not a key file of version {VERSION}", "a key file")
        return cls.from_hex(secret)


def hkdf_sha256(secret: bytes, information: bytes, *, salt: bytes = b"", length: int = KEY_BYTES) -> bytes:
    """HKDF with SHA-256 (RFC 5869): `length` bytes, at most 8,160, for `information` out of `secret`."""
    assert 0 < length <= 255 * 32, "HKDF gives at most 255 blocks"
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    expanded = block = b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + information + bytes([number]), "sha256")
        expanded += block
    return expanded[:length]


def _is_published(secret: bytes) -> bool:
    """Whether it is a published number or list, as bytes in some order, padded or hashed: as somebody who has only that would make a key of it."""
    return secret in _PUBLISHED


def _spellings() -> frozenset[bytes]:
    texts = [str(number).encode() for number in _PUBLISHED_INTEGERS]
    texts += [separator.join(map(str, numbers)).encode() for numbers in _PUBLISHED_LISTS for separator in (",", ", ", " ")]
    texts += [b"", b"key", b"secret", b"password", b"test", b"stillroom"]
    raw = [number.to_bytes(KEY_BYTES, order) for number in _PUBLISHED_INTEGERS for order in ("big", "little")]
    return frozenset(raw + [hashlib.sha256(text).digest() for text in texts] + [text[:KEY_BYTES].ljust(KEY_BYTES, b"\0") for text in texts])


_PUBLISHED = _spellings()


def _refuse(found: str, expected: str) -> NoReturn:
    raise GuardError(
        "guard-key",
        found=found,
        expected=expected,
        why="what is made with a key that others know, or could guess, proves nothing",
        do="Draw one: stillroom guard key --out FILE.",
    )
