"""A memory-mapped file of which no byte is used before the block it lies in was compared with its checksum.

Blocks are compared when they are first asked for, so that opening a store of any size reads little, and reading some of it reads little more.
What is not as it was written raises StoreError 'store-corrupt', naming the file and what is wrong with it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeAlias

import numpy
from numpy.typing import NDArray

from stillroom.core.errors import StoreError

BLOCK_BYTES = 1 << 20
# Enough for what Arrow reads first: the schema and a batch's description at the beginning, the footer at the end.
_ENDS_BYTES = 1 << 16

# What tells a file from another that took its name, or from itself after it was written to.
_Signature: TypeAlias = tuple[int, int, int, int]


def corrupt(path: Path, what: str) -> NoReturn:
    """Raises StoreError 'store-corrupt': `what` says what is wrong with the file and follows its name."""
    raise StoreError(
        "store-corrupt",
        found=f"{path} {what}",
        expected="the store as it was written",
        why="a student would learn from damaged targets without a sign",
        do=f"Restore {path.name} from a copy, or remove the store and run the collect stage again.",
    )


def block_digests(data: bytes) -> tuple[str, ...]:
    """SHA-256 (hex) of each block."""
    view = memoryview(data)
    return tuple(sha256(view[begin : begin + BLOCK_BYTES]).hexdigest() for begin in range(0, len(data), BLOCK_BYTES))


class CheckedFile:
    """A file of `size` bytes whose blocks have these digests. What is known of it is kept from one map to the next, as long as it stays the same."""

    def __init__(self, path: Path, size: int, digests: Sequence[str]) -> None:
        self.path = path
        self._size = size
        self._digests = digests
        self._known = numpy.zeros(0, dtype=bool)
        self._signature: _Signature | None = None

    def map(self) -> CheckedMap:
        """The file as it is now."""
        with opened(self.path, self._size) as file:
            status = os.fstat(file.fileno())
            signature = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            if signature != self._signature:
                # A new array: maps of the file that was there before go on with theirs.
                self._known, self._signature = numpy.zeros(len(self._digests), dtype=bool), signature
            return CheckedMap(self.path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), self._digests, self._known)


class CheckedMap:
    """A map of which the first and the last bytes are checked, and the rest as it is required."""

    def __init__(self, path: Path, mapped: mmap.mmap, digests: Sequence[str], known: NDArray[numpy.bool_]) -> None:
        self.path, self.mapped = path, mapped
        self._digests, self._known = digests, known
        self._address = _address(numpy.frombuffer(mapped, dtype=numpy.uint8))
        self._require_bytes(0, min(len(mapped), _ENDS_BYTES))
        self._require_bytes(max(0, len(mapped) - _ENDS_BYTES), len(mapped))

    def require(self, array: NDArray[Any], starts: NDArray[numpy.int64] | None = None, stops: NDArray[numpy.int64] | None = None) -> None:
        """Checks the blocks in which these ranges of `array`, a view of the map, lie (without ranges: all of it)."""
        if starts is None or stops is None:
            starts, stops = numpy.array([0]), numpy.array([len(array)])
        some, begin = stops > starts, _address(array) - self._address
        item = array.itemsize * int(numpy.prod(array.shape[1:]))
        # Ranges that lie in the same blocks are one.
        for low, high in set(
            zip(((begin + starts[some] * item) // BLOCK_BYTES).tolist(), ((begin + stops[some] * item - 1) // BLOCK_BYTES).tolist(), strict=True)
        ):
            for block in range(low, high + 1):
                self._require_block(block)

    def _require_bytes(self, begin: int, end: int) -> None:
        for block in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            self._require_block(block)

    def _require_block(self, block: int) -> None:
        if self._known[block]:
            return
        begin, end = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, len(self.mapped))
        if sha256(memoryview(self.mapped)[begin:end]).hexdigest() != self._digests[block]:
            corrupt(self.path, f"has been altered between byte {begin} and byte {end}")
        self._known[block] = True


def opened(path: Path, size: int) -> BinaryIO:
    """The file, open for reading, if it is there and of this size."""
    with _missing_reported(path):
        file = path.open("rb")
        actual = os.fstat(file.fileno()).st_size
    if actual != size:
        file.close()
        _wrong_size(path, actual, size)
    return file


def require_size(path: Path, size: int) -> None:
    """The same without opening it."""
    with _missing_reported(path):
        actual = path.stat().st_size
    if actual != size:
        _wrong_size(path, actual, size)


def map_checked(path: Path, size: int, digest: str) -> mmap.mmap:
    """The whole file, mapped, if its bytes have this SHA-256."""
    with opened(path, size) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if (actual := sha256(mapped).hexdigest()) != digest:
        corrupt(path, f"has been altered: its SHA-256 is {actual}, the manifest says {digest}")
    return mapped


@contextmanager
def _missing_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        corrupt(path, "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}")


def _wrong_size(path: Path, actual: int, size: int) -> NoReturn:
    what = "is empty" if actual == 0 else "is truncated" if actual < size else "is too long"
    corrupt(path, f"{what}: {actual} bytes, the manifest says {size}")


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
