"""A shard: some records of a target store as one Arrow IPC file, read in place from a memory map.

A record is one entry of each column: `record_id` (32 bytes), `token_ids` (list of int32), `span_starts` and `span_stops` (lists of int32), and for
each column of the codec a list with one element per scored row. Nothing is compressed, so that a row is found by its offset and never unpacked.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.ipc
from numpy.typing import NDArray

from stillroom.core.identities import TokenSequence
from stillroom.targets.codecs import Codec, Column

Integers = NDArray[numpy.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The columns of a shard as numpy views of its memory map. `*_offsets[i]` to `*_offsets[i + 1]` is what record i has of a column."""

    record_ids: tuple[str, ...]
    token_ids: Integers
    token_offsets: Integers
    span_starts: Integers
    span_stops: Integers
    span_offsets: Integers
    row_offsets: Integers
    columns: dict[str, NDArray[Any]]

    def sequence(self, index: int) -> TokenSequence:
        """The tokens of record `index`."""
        tokens = self.token_ids[self.token_offsets[index] : self.token_offsets[index + 1]].tolist()
        spans = slice(self.span_offsets[index], self.span_offsets[index + 1])
        return TokenSequence(
            ids=tuple(tokens), answer_spans=tuple(zip(self.span_starts[spans].tolist(), self.span_stops[spans].tolist(), strict=True))
        )


def shard_bytes(record_ids: Sequence[str], sequences: Sequence[TokenSequence], codec: Codec, columns: dict[str, NDArray[Any]]) -> bytes:
    """The file of a shard. `columns` hold the scored rows of all sequences laid end to end."""
    row_offsets = _offsets([len(sequence.scored_rows) for sequence in sequences])
    spans = [span for sequence in sequences for span in sequence.answer_spans]
    span_offsets = _offsets([len(sequence.answer_spans) for sequence in sequences])
    tokens = numpy.fromiter((token for sequence in sequences for token in sequence.ids), dtype=numpy.int32)
    arrays = {
        "record_id": pyarrow.array([bytes.fromhex(record_id) for record_id in record_ids], type=pyarrow.binary(32)),
        "token_ids": _lists(_offsets([len(sequence.ids) for sequence in sequences]), pyarrow.array(tokens)),
        "span_starts": _lists(span_offsets, pyarrow.array([start for start, _ in spans], type=pyarrow.int32())),
        "span_stops": _lists(span_offsets, pyarrow.array([stop for _, stop in spans], type=pyarrow.int32())),
        "rows": pyarrow.array(numpy.diff(row_offsets)),
    }
    arrays |= {column.name: _lists(row_offsets, _column_array(column, columns[column.name])) for column in codec.columns}
    # Required fields: a null is no value here.
    schema = pyarrow.schema([pyarrow.field(name, array.type, nullable=False) for name, array in arrays.items()])
    batch = pyarrow.record_batch(list(arrays.values()), schema=schema)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    contents: bytes = sink.getvalue().to_pybytes()
    return contents


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes without reading them all into memory. ValueError for an empty file."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def sha256_of(mapped: mmap.mmap) -> str:
    """SHA-256 of the mapped bytes, those that will be read."""
    return sha256(mapped).hexdigest()


def open_shard(mapped: mmap.mmap, codec: Codec) -> Shard:
    """Views of the columns of a shard. Raises ValueError if it is not a shard that `codec` writes."""
    try:
        batch = pyarrow.ipc.open_file(pyarrow.BufferReader(pyarrow.py_buffer(mapped))).get_batch(0)
        tokens, starts, stops = (batch.column(name) for name in ("token_ids", "span_starts", "span_stops"))
        raw_ids = batch.column("record_id").buffers()[1].to_pybytes()
        lists = {column.name: batch.column(column.name) for column in codec.columns}
    except (pyarrow.ArrowException, KeyError, IndexError) as error:
        raise ValueError(f"is not a shard of this store: {error}") from error
    return Shard(
        record_ids=tuple(raw_ids[place : place + 32].hex() for place in range(0, 32 * batch.num_rows, 32)),
        token_ids=_numbers(tokens.values),
        token_offsets=_numbers(tokens.offsets),
        span_starts=_numbers(starts.values),
        span_stops=_numbers(stops.values),
        span_offsets=_numbers(starts.offsets),
        row_offsets=_offsets(_numbers(batch.column("rows"))),
        columns={column.name: _column_numbers(column, lists[column.name]) for column in codec.columns},
    )


def _offsets(counts: Sequence[int] | Integers) -> Integers:
    offsets = numpy.zeros(len(counts) + 1, dtype=numpy.int64)
    numpy.cumsum(counts, out=offsets[1:])
    assert offsets[-1] < 2**31, "a shard holds fewer than 2^31 tokens and rows; append fewer records at a time"
    return offsets.astype(numpy.int32)


def _lists(offsets: Integers, values: Any) -> Any:
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), values, type=pyarrow.list_(pyarrow.field("item", values.type, nullable=False)))


def _column_array(column: Column, array: NDArray[Any]) -> Any:
    if column.width == 0:
        return pyarrow.array(array)
    flat = pyarrow.array(array.reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, type=pyarrow.list_(pyarrow.field("item", flat.type, nullable=False), column.width))


def _column_numbers(column: Column, lists: Any) -> NDArray[Any]:
    if column.width == 0:
        return _numbers(lists.values)
    return _numbers(lists.values.values).reshape(-1, column.width)


def _numbers(array: Any) -> NDArray[Any]:
    numbers: NDArray[Any] = array.to_numpy(zero_copy_only=True)
    return numbers
