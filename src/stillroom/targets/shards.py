"""A shard: some records of a target store as two Arrow IPC files, an index and the targets, each with one record batch and one entry a record.

The index is small and read whole when the store is opened: `record_id`, `tokens`, `rows`, and in its metadata the SHA-256 of each block of the other
file. The targets are read in place from a memory map, and only where they are asked for: `span_starts` and `span_stops`, then for drawn targets
`lane_words` and `words` (see `packing`), and for all others `token_ids` and for each column of the codec a list with one element per scored row.
Nothing is compressed by Arrow, so that a row is found by its offset and never unpacked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.ipc
from numpy.typing import NDArray

from stillroom.core.identities import TokenSequence
from stillroom.targets.checked import BLOCK_BYTES, CheckedMap, block_digests, corrupt
from stillroom.targets.codecs import Codec, Column, DrawnCodec
from stillroom.targets.coding import Integers, ranges
from stillroom.targets.packing import Packed

TOKENS = Column(name="token_ids", dtype="<i4", width=0)

_BLOCKS = b"blocks"
# The types of numbers that a shard has, by Arrow's names.
_DTYPES = {"int8": "i1", "uint16": "<u2", "int32": "<i4", "uint32": "<u4", "float": "<f4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """What a store knows of a shard without opening it."""

    record_ids: tuple[str, ...]
    tokens: Integers
    rows: Integers
    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """A column of lists: record i has values[offsets[i]] to values[offsets[i + 1]] (exclusive)."""

    values: NDArray[Any]
    offsets: NDArray[numpy.int32]

    def bounds(self, records: Integers) -> tuple[Integers, Integers]:
        """Where the lists of these records begin and end."""
        return self.offsets[records].astype(numpy.int64), self.offsets[records + 1].astype(numpy.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The targets' file as numpy views of its memory map. Values are only taken once the blocks that they lie in are checked."""

    map: CheckedMap
    span_starts: Lists
    span_stops: Lists
    columns: dict[str, Lists] = field(default_factory=dict)

    def spans(self, record: int) -> tuple[tuple[int, int], ...]:
        """The answer spans of a record."""
        place = slice(self.span_starts.offsets[record], self.span_starts.offsets[record + 1])
        return tuple(zip(self.span_starts.values[place].tolist(), self.span_stops.values[place].tolist(), strict=True))

    def taken(self, name: str, records: Integers) -> NDArray[Any]:
        """What these records have of a column, end to end: a copy."""
        column = self.columns[name]
        starts, stops = column.bounds(records)
        self.map.require(column.values, starts, stops)
        taken: NDArray[Any] = column.values.take(ranges(starts, stops - starts), axis=0)
        return taken

    def packed(self, records: Integers) -> Packed:
        """The lanes of these records, of drawn targets."""
        starts, stops = self.columns["lane_words"].bounds(records)
        lengths_L = self.taken("lane_words", records).astype(numpy.int64)
        return Packed(lanes_E=stops - starts, lengths_L=lengths_L, words=self.taken("words", records))


def index_bytes(record_ids: Sequence[str], sequences: Sequence[TokenSequence], targets: bytes) -> bytes:
    """The file of the index of a shard whose other file is `targets`."""
    arrays = {
        "record_id": pyarrow.array([bytes.fromhex(record_id) for record_id in record_ids], type=pyarrow.binary(32)),
        "tokens": pyarrow.array([len(sequence.ids) for sequence in sequences], type=pyarrow.int32()),
        "rows": pyarrow.array([len(sequence.scored_rows) for sequence in sequences], type=pyarrow.int32()),
    }
    blocks = {"block_bytes": BLOCK_BYTES, "sha256": block_digests(targets)}
    return _file(arrays, {_BLOCKS: json.dumps(blocks).encode()})


def read_index(path: Path, data: bytes, size: int) -> ShardIndex:
    """The index that `path` holds, of a file of `size` bytes. Raises StoreError 'store-corrupt' if it is not one."""
    try:
        batch = _batch(data)
        blocks = json.loads(batch.schema.metadata[_BLOCKS])
        raw_ids = batch.column("record_id").buffers()[1].to_pybytes().hex()
        tokens, rows = (_numbers(batch.column(name)).astype(numpy.int64) for name in ("tokens", "rows"))
        digests = tuple(blocks["sha256"])
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
        corrupt(path, f"is not the index of a shard: {error}")
    if blocks["block_bytes"] != BLOCK_BYTES or len(digests) != -(-size // BLOCK_BYTES):
        corrupt(path, "is the index of another shard: its blocks are not those of the shard beside it")
    return ShardIndex(
        record_ids=tuple(raw_ids[place : place + 64] for place in range(0, 64 * batch.num_rows, 64)), tokens=tokens, rows=rows, digests=digests
    )


def shard_bytes(sequences: Sequence[TokenSequence], codec: Codec, columns: dict[str, NDArray[Any]]) -> bytes:
    """The file of the targets, for all codecs but that of drawn targets. `columns` hold the scored rows of all sequences laid end to end."""
    tokens = numpy.fromiter((token for sequence in sequences for token in sequence.ids), dtype=numpy.int32)
    row_offsets = _offsets([len(sequence.scored_rows) for sequence in sequences])
    arrays = {TOKENS.name: _lists(_offsets([len(sequence.ids) for sequence in sequences]), pyarrow.array(tokens))}
    arrays |= {column.name: _lists(row_offsets, _column_array(column, columns[column.name])) for column in codec.columns}
    return _file(_span_arrays(sequences) | arrays, None)


def packed_shard_bytes(sequences: Sequence[TokenSequence], packed: Packed) -> bytes:
    """The file of drawn targets."""
    words_E = numpy.diff(numpy.append(0, numpy.cumsum(packed.lengths_L))[numpy.append(0, numpy.cumsum(packed.lanes_E))])
    arrays = {
        "lane_words": _lists(_offsets(packed.lanes_E), pyarrow.array(packed.lengths_L.astype(numpy.uint16))),
        "words": _lists(_offsets(words_E), pyarrow.array(packed.words)),
    }
    return _file(_span_arrays(sequences) | arrays, None)


def open_shard(checked: CheckedMap, codec: Codec) -> Shard:
    """Views of the columns. Offsets and spans, which are small, are checked at once. Raises StoreError if it is not a shard that `codec` writes."""
    widths = {"lane_words": 0, "words": 0} if isinstance(codec, DrawnCodec) else {one.name: one.width for one in (TOKENS, *codec.columns)}
    try:
        batch = _batch(checked.mapped)
        spans = [_list_column(batch.column(name), 0) for name in ("span_starts", "span_stops")]
        columns = {name: _list_column(batch.column(name), width) for name, width in widths.items()}
    except (pyarrow.ArrowException, KeyError, IndexError, TypeError, ValueError) as error:
        corrupt(checked.path, f"is not a shard of this store: {error}")
    for lists in (*spans, *columns.values()):
        checked.require(lists.offsets)
    for lists in spans:
        checked.require(lists.values)
    return Shard(map=checked, span_starts=spans[0], span_stops=spans[1], columns=columns)


def _batch(data: Any) -> Any:
    return pyarrow.ipc.open_file(pyarrow.BufferReader(pyarrow.py_buffer(data))).get_batch(0)


def _file(arrays: dict[str, Any], metadata: dict[bytes, bytes] | None) -> bytes:
    # Required fields: a null is no value here.
    schema = pyarrow.schema([pyarrow.field(name, array.type, nullable=False) for name, array in arrays.items()], metadata=metadata)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pyarrow.record_batch(list(arrays.values()), schema=schema))
    contents: bytes = sink.getvalue().to_pybytes()
    return contents


def _span_arrays(sequences: Sequence[TokenSequence]) -> dict[str, Any]:
    offsets = _offsets([len(sequence.answer_spans) for sequence in sequences])
    spans = [span for sequence in sequences for span in sequence.answer_spans]
    return {
        "span_starts": _lists(offsets, pyarrow.array([start for start, _ in spans], type=pyarrow.int32())),
        "span_stops": _lists(offsets, pyarrow.array([stop for _, stop in spans], type=pyarrow.int32())),
    }


def _offsets(counts: Sequence[int] | Integers) -> NDArray[numpy.int32]:
    offsets = numpy.zeros(len(counts) + 1, dtype=numpy.int64)
    numpy.cumsum(counts, out=offsets[1:])
    assert offsets[-1] < 2**31, "a shard holds fewer than 2^31 tokens and rows; append fewer records at a time"
    return offsets.astype(numpy.int32)


def _lists(offsets: NDArray[numpy.int32], values: Any) -> Any:
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), values, type=pyarrow.list_(pyarrow.field("item", values.type, nullable=False)))


def _column_array(column: Column, array: NDArray[Any]) -> Any:
    if column.width == 0:
        return pyarrow.array(array)
    flat = pyarrow.array(array.reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, type=pyarrow.list_(pyarrow.field("item", flat.type, nullable=False), column.width))


def _list_column(lists: Any, width: int) -> Lists:
    values = _numbers(lists.values) if width == 0 else _numbers(lists.values.values).reshape(-1, width)
    return Lists(values=values, offsets=_numbers(lists.offsets))


def _numbers(array: Any) -> NDArray[Any]:
    """A view. Not by pyarrow's `to_numpy`, which loads pandas where that is installed: a third of a second when the first store is opened."""
    dtype = numpy.dtype(_DTYPES[str(array.type)])
    if array.null_count:
        raise pyarrow.ArrowInvalid("a null is no number")
    if len(array) == 0:
        return numpy.empty(0, dtype=dtype)
    return numpy.frombuffer(array.buffers()[1], dtype=dtype, count=len(array), offset=array.offset * dtype.itemsize)
