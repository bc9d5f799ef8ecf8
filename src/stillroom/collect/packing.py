"""Verified log-probabilities as bytes, for the time between their answer's commit and their shard's: quick to write, exact, and checked when read."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy

from stillroom.collect.logprobs import Verified
from stillroom.core.errors import StoreError

_ARRAYS = {
    "ids_T": "<i4",
    "logprobs_T": "<f8",
    "top_ids_N": "<i4",
    "top_logprobs_N": "<f8",
    "starts_T1": "<i8",
    "rest_log_mass_T": "<f8",
}
_TOKENS = ("tokens_T", "top_tokens_N")
_HEAD = struct.Struct("<II")  # CRC-32 of all that follows, bytes of the description


def pack(verified: Verified) -> bytes:
    """A description in JSON (lengths, temperature, ...), then arrays and tokens end to end, under a CRC-32."""
    described: dict[str, Any] = {"temperature": verified.temperature, "ended": verified.ended, "skipped": verified.skipped}
    pieces = []
    for name, kind in _ARRAYS.items():
        values = getattr(verified, name)
        described[name] = len(values)
        pieces.append(numpy.ascontiguousarray(values, kind).tobytes())
    for name in _TOKENS:
        tokens = getattr(verified, name)
        described[name] = None if tokens is None else list(map(len, tokens))
        pieces.extend(tokens or ())
    description = json.dumps(described, separators=(",", ":")).encode()
    rest = struct.pack("<I", len(description)) + description + b"".join(pieces)
    return struct.pack("<I", zlib.crc32(rest)) + rest


def unpack(data: bytes) -> Verified:
    """The inverse of `pack`, to the last bit. Raises StoreError 'logprobs-corrupt' for bytes that it did not write."""
    if len(data) < _HEAD.size or zlib.crc32(data[4:]) != struct.unpack_from("<I", data)[0]:
        raise StoreError(
            "logprobs-corrupt",
            found=f"{len(data)} bytes of packed log-probabilities that do not match their checksum",
            expected="bytes as Stillroom packed them",
            do="Restore the request store from a copy, or leave them out: the answer remains as text.",
        )
    _, length = _HEAD.unpack_from(data)
    at = _HEAD.size + length
    described = json.loads(data[_HEAD.size : at])
    values: dict[str, Any] = {}
    for name, kind in _ARRAYS.items():
        values[name] = numpy.frombuffer(data, kind, described[name], at)
        at += values[name].nbytes
    for name in _TOKENS:
        tokens = None
        if described[name] is not None:
            tokens = []
            for size in described[name]:
                tokens.append(data[at : at + size])
                at += size
        values[name] = tokens
    return Verified(**values, temperature=described["temperature"], ended=described["ended"], skipped=described["skipped"])
