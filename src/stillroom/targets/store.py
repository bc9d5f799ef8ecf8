"""Targets on disk: a directory that knows what it holds, grows by whole shards, and is read from memory maps.

    store/
      manifest.json        what the targets are and the checksum of every other file; see manifest.py
      head.weight.npy      only of hidden targets: the teacher's head, once
      head.bias.npy        only if that head has a bias
      shards/00000.arrow   records; see shards.py

A record is found by the hash of its tokens and answer spans, never by its position. A shard counts once the manifest names it: what a crash left
behind is overwritten by the next one. docs/reference/target-store.md is enough to read a store without this package.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import numpy
from numpy.typing import NDArray

from stillroom.core import durable
from stillroom.core.errors import ModelError, StoreError
from stillroom.core.hashing import sha256_hex
from stillroom.core.identities import TokenSequence
from stillroom.targets.codecs import Codec, CodecError, decode, encode, from_bfloat16
from stillroom.targets.kinds import Targets, TeacherHead, TextTargets
from stillroom.targets.manifest import FileEntry, HeadEntry, Manifest, ShardEntry, StoreIdentity, manifest_from_bytes
from stillroom.targets.rows import row_count
from stillroom.targets.shards import Shard, map_file, open_shard, sha256_of, shard_bytes

__all__ = ["StoreIdentity", "StoredRecord", "TargetStore", "record_id"]

_MANIFEST = "manifest.json"
_SHARDS = "shards"
_HEAD_WEIGHT = "head.weight.npy"
_HEAD_BIAS = "head.bias.npy"
_RECORD_DOMAIN = b"stillroom record 1\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    """A sequence and what the teacher said about its scored rows: numpy arrays, one entry per row of `sequence.scored_rows`."""

    sequence: TokenSequence
    targets: Targets


def record_id(sequence: TokenSequence) -> str:
    """SHA-256 (hex) of the tokens and answer spans.

    Hashed: the domain line, u32 number of tokens, u32 per token, u32 number of spans, u32 start and u32 stop per span; all little-endian.
    """
    bounds = [bound for span in sequence.answer_spans for bound in span]
    numbers = (len(sequence.ids), *sequence.ids, len(sequence.answer_spans), *bounds)
    return sha256(_RECORD_DOMAIN + struct.pack(f"<{len(numbers)}I", *numbers)).hexdigest()


class TargetStore:
    """The targets of one teacher, by one codec, at one temperature; made by `create_or_resume` or `open`.

    One process writes at a time (a run's lock sees to that); any number may read. Reading changes nothing and may be done from several threads.
    """

    def __init__(self, directory: Path, manifest: Manifest, head: TeacherHead | None, shards: Sequence[Shard]) -> None:
        """For the constructors below; `shards` are those of the manifest, already verified."""
        self.directory = directory
        self._manifest = manifest
        self._head = head
        self._shards = list(shards)
        self._index = _Index.of(self._shards)

    # -- opening

    @classmethod
    def create_or_resume(cls, directory: Path, identity: StoreIdentity, head: TeacherHead | None = None) -> TargetStore:
        """A new store in `directory`, or the one that is there if it is of this identity. `head` (numpy arrays) is needed for hidden targets.

        Raises StoreError 'store-mismatch' showing every difference, 'store-corrupt' as `open` does; ResourceError 'disk-full'.
        """
        assert (head is not None) == (identity.codec.kind == "hidden"), "hidden targets, and no others, come with their teacher's head"
        if (directory / _MANIFEST).exists():
            store = cls.open(directory, identity)
            _require_same_head(store.head, head, directory)
            return store
        if any((directory / _SHARDS).glob("*.arrow")):
            _corrupt(directory / _MANIFEST, "is missing, though there are shards")
        # A creation that died before its manifest leaves the head at most.
        _refuse_foreign(directory, {_HEAD_WEIGHT, _HEAD_BIAS, _SHARDS})
        (directory / _SHARDS).mkdir(parents=True, exist_ok=True)
        manifest = Manifest(identity=identity, head=None if head is None else _write_head(directory, head))
        durable.write_bytes_atomic(directory / _MANIFEST, manifest.to_bytes())
        return cls.open(directory, identity)

    @classmethod
    def open(cls, directory: Path, identity: StoreIdentity | None = None) -> TargetStore:
        """Opens a store after verifying every byte of it.

        Raises StoreError 'store-corrupt', naming the file and what is wrong with it: missing, empty, truncated, altered, or not of this store;
        'store-mismatch' if `identity` is given and is not the store's, showing each field that differs.
        """
        manifest = _read_manifest(directory)
        if identity is not None and (differences := manifest.identity.differences(identity)):
            raise StoreError(
                "store-mismatch",
                found=f"{directory}: " + "; ".join(differences),
                expected="a store made with what is asked for now",
                why="targets of another teacher, vocabulary or temperature would teach something else without a sign",
                do="Choose another output directory, or change the recipe back.",
            )
        known = {_MANIFEST, _SHARDS, *(entry.file for entry in manifest.files), _shard_name(len(manifest.shards))}
        _refuse_foreign(directory, known)
        head = None if manifest.head is None else _read_head(directory, manifest.head)
        return cls(directory, manifest, head, [_read_shard(directory, entry, manifest.identity.codec) for entry in manifest.shards])

    # -- what it is

    @property
    def identity(self) -> StoreIdentity:
        return self._manifest.identity

    @property
    def head(self) -> TeacherHead | None:
        """The teacher's head, of a store of hidden targets: always the same object, so that it is moved to a device once."""
        return self._head

    @property
    def codec_error(self) -> CodecError | None:
        """What the codec was measured to lose, if it has been measured."""
        return self._manifest.codec_error

    @property
    def record_ids(self) -> tuple[str, ...]:
        """Every record, in the order in which they were appended."""
        return tuple(self._index.position)

    @property
    def rows(self) -> int:
        """Scored rows of all records."""
        return self._manifest.rows

    @property
    def tokens(self) -> int:
        """Tokens of all records, scored or not."""
        return self._manifest.tokens

    @property
    def bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.bytes for entry in self._manifest.files)

    @property
    def sha256(self) -> str:
        """Identity of the whole content: the manifest's own checksum, which covers that of every file."""
        return self._manifest.sha256

    def __len__(self) -> int:
        return len(self._index.position)

    def __contains__(self, record: object) -> bool:
        return record in self._index.position

    # -- writing

    def append_shard(self, records: Iterable[StoredRecord]) -> int:
        """Writes the records that are not here yet as one shard, and returns how many those were; none, and nothing is written.

        The same tokens with the same spans are the same record: the first stays. Either the whole shard counts afterwards or, after a crash or a
        full disk (ResourceError 'disk-full'), none of it. Raises StoreError 'store-mismatch' for targets of another vocabulary or temperature, and
        ModelError 'model-unsupported' for targets that are not numbers.
        """
        fresh = {record_id(record.sequence): record for record in records}
        fresh = {key: record for key, record in fresh.items() if key not in self._index.position}
        if not fresh:
            return 0
        identity = self.identity
        encoded = [self._encoded(record) for record in fresh.values()]
        columns = {column.name: numpy.concatenate([part[column.name] for part in encoded]) for column in identity.codec.columns}
        sequences = [record.sequence for record in fresh.values()]
        data = shard_bytes(list(fresh), sequences, identity.codec, columns)
        entry = ShardEntry(
            file=_shard_name(len(self._shards)),
            bytes=len(data),
            sha256=sha256_hex(data),
            records=len(fresh),
            rows=sum(len(sequence.scored_rows) for sequence in sequences),
            tokens=sum(len(sequence.ids) for sequence in sequences),
        )
        durable.write_bytes_atomic(self.directory / entry.file, data)
        self._replace_manifest(replace(self._manifest, shards=(*self._manifest.shards, entry)))
        self._shards.append(open_shard(map_file(self.directory / entry.file), identity.codec))
        self._index = _Index.of(self._shards)
        return len(fresh)

    def record_codec_error(self, error: CodecError) -> None:
        """Keeps in the manifest what the codec was measured to lose."""
        self._replace_manifest(replace(self._manifest, codec_error=error))

    def _encoded(self, record: StoredRecord) -> dict[str, NDArray[Any]]:
        targets, identity = record.targets, self.identity
        temperature = identity.temperature if isinstance(targets, TextTargets) else targets.temperature
        if targets.vocabulary != identity.vocabulary or temperature != identity.temperature:
            raise StoreError(
                "store-mismatch",
                found=f"targets of vocabulary {targets.vocabulary} at temperature {temperature:g}",
                expected=f"vocabulary {identity.vocabulary} at temperature {identity.temperature:g}",
                do="Make a store for each vocabulary and temperature.",
            )
        scored = len(record.sequence.scored_rows)
        assert row_count(targets) == scored, f"{row_count(targets)} rows of targets for {scored} scored rows"
        columns = encode(identity.codec, targets)
        if any(_has_nan(column) for column in columns.values()):
            raise ModelError(
                "model-unsupported",
                found="a teacher whose distributions are not numbers (NaN)",
                expected="finite numbers",
                why="a student would learn them",
                do="Load the teacher in float32 (hardware.dtype), or check its weights.",
            )
        return columns

    def _replace_manifest(self, manifest: Manifest) -> None:
        durable.write_bytes_atomic(self.directory / _MANIFEST, manifest.to_bytes())
        self._manifest = manifest

    # -- reading

    def read(self, record_ids: Sequence[str]) -> tuple[list[TokenSequence], Targets]:
        """The records asked for, in that order, and the targets of their scored rows laid end to end (new numpy arrays).

        Raises StoreError 'store-mismatch' for a record that is not here.
        """
        places, index = self._positions(record_ids), self._index
        shard_of, within = index.shard[places], index.within[places]
        sequences = [self._shards[shard].sequence(at) for shard, at in zip(shard_of.tolist(), within.tolist(), strict=True)]
        identity = self.identity
        targets = decode(
            identity.codec,
            self._gather(places),
            vocabulary=identity.vocabulary,
            temperature=identity.temperature,
            head=self._head,
            labels_R=_labels(sequences),
        )
        return sequences, targets

    def sequences(self, record_ids: Sequence[str]) -> list[TokenSequence]:
        """The tokens alone."""
        index = self._index
        return [self._shards[index.shard[place]].sequence(index.within[place]) for place in self._positions(record_ids).tolist()]

    def scored_tokens(self, record_ids: Sequence[str]) -> int:
        """Scored rows of these records, without reading them."""
        return int(self._index.row_count[self._positions(record_ids)].sum())

    def _positions(self, record_ids: Sequence[str]) -> NDArray[numpy.int64]:
        try:
            return numpy.fromiter((self._index.position[key] for key in record_ids), dtype=numpy.int64, count=len(record_ids))
        except KeyError as error:
            raise StoreError(
                "store-mismatch",
                found=f"no record {error.args[0]} in {self.directory}",
                expected="every record of the transfer set",
                do="Run the collect stage again: it adds what is missing.",
            ) from None

    def _gather(self, places: NDArray[numpy.int64]) -> dict[str, NDArray[Any]]:
        """The columns of the rows of these records, in order: one numpy gather for each shard and column, whatever the number of rows."""
        index = self._index
        counts = index.row_count[places]
        starts = numpy.cumsum(counts) - counts
        by_shard = numpy.argsort(index.shard[places], kind="stable")
        source = _ranges(index.row_start[places[by_shard]], counts[by_shard])
        target = _ranges(starts[by_shard], counts[by_shard])
        shards, first = numpy.unique(index.shard[places[by_shard]], return_index=True)
        bounds = [*(numpy.cumsum(counts[by_shard]) - counts[by_shard])[first].tolist(), len(source)]
        gathered = {}
        for column in self.identity.codec.columns:
            sorted_rows = numpy.empty((len(source), column.width) if column.width else len(source), dtype=column.dtype)
            for shard, begin, end in zip(shards.tolist(), bounds, bounds[1:], strict=False):
                # Clipping never happens; it is the mode in which numpy writes straight into `out`.
                self._shards[shard].columns[column.name].take(source[begin:end], axis=0, out=sorted_rows[begin:end], mode="clip")
            whole = numpy.empty_like(sorted_rows)
            whole[target] = sorted_rows
            gathered[column.name] = whole
        return gathered


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """Where each record is: its shard, its place in it, and its rows there."""

    position: dict[str, int]
    shard: NDArray[numpy.int64]
    within: NDArray[numpy.int64]
    row_start: NDArray[numpy.int64]
    row_count: NDArray[numpy.int64]

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> _Index:
        sizes = [len(shard.record_ids) for shard in shards]
        empty = numpy.empty(0, dtype=numpy.int64)
        return cls(
            position={key: place for place, key in enumerate(key for shard in shards for key in shard.record_ids)},
            shard=numpy.repeat(numpy.arange(len(shards)), sizes),
            within=numpy.concatenate([empty, *(numpy.arange(size) for size in sizes)]),
            row_start=numpy.concatenate([empty, *(shard.row_offsets[:-1].astype(numpy.int64) for shard in shards)]),
            row_count=numpy.concatenate([empty, *(numpy.diff(shard.row_offsets).astype(numpy.int64) for shard in shards)]),
        )


def _ranges(starts: NDArray[numpy.int64], counts: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
    """start, start + 1, ... of each range, end to end."""
    before = numpy.cumsum(counts) - counts
    return numpy.repeat(starts - before, counts) + numpy.arange(int(counts.sum()))


def _labels(sequences: Sequence[TokenSequence]) -> NDArray[numpy.int64]:
    return numpy.array([sequence.ids[row + 1] for sequence in sequences for row in sequence.scored_rows], dtype=numpy.int64)


def _has_nan(column: NDArray[Any]) -> bool:
    return bool(numpy.isnan(from_bfloat16(column) if column.dtype == numpy.uint16 else column).any())


# -- files ---------------------------------------------------------------------------------------------------------------


def _shard_name(index: int) -> str:
    return f"{_SHARDS}/{index:05d}.arrow"


def _read_manifest(directory: Path) -> Manifest:
    path = directory / _MANIFEST
    try:
        return manifest_from_bytes(path.read_bytes())
    except OSError as error:
        _corrupt(path, "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}")
    except ValueError as error:
        _corrupt(path, str(error))


def _read_shard(directory: Path, entry: ShardEntry, codec: Codec) -> Shard:
    try:
        shard = open_shard(_verified(directory, entry), codec)
    except ValueError as error:
        _corrupt(directory / entry.file, str(error))
    return shard


def _verified(directory: Path, entry: FileEntry) -> Any:
    """The memory map of a file whose every byte is what the manifest says."""
    path = directory / entry.file
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            what = "is empty" if size == 0 else "is truncated" if size < entry.bytes else "is too long"
            _corrupt(path, f"{what}: {size} bytes, the manifest says {entry.bytes}")
        mapped = map_file(path)
    except OSError as error:
        _corrupt(path, "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}")
    if (actual := sha256_of(mapped)) != entry.sha256:
        _corrupt(path, f"has been altered: its SHA-256 is {actual}, the manifest says {entry.sha256}")
    return mapped


def _refuse_foreign(directory: Path, known: set[str]) -> None:
    """Names anything in the store that is not of it. Hidden files are let be: locks, what a crash left half-written, what desktops leave."""
    for path in sorted([*directory.glob("*"), *(directory / _SHARDS).glob("*")]):
        name = path.relative_to(directory).as_posix()
        if not path.name.startswith(".") and name not in known:
            _corrupt(path, "is not of this store")


def _write_head(directory: Path, head: TeacherHead) -> HeadEntry:
    directory.mkdir(parents=True, exist_ok=True)
    return HeadEntry(
        weight=_write_array(directory, _HEAD_WEIGHT, head.weight_VD),
        bias=None if head.bias_V is None else _write_array(directory, _HEAD_BIAS, head.bias_V),
        scale=float(head.scale),
        softcap=None if head.softcap is None else float(head.softcap),
    )


def _write_array(directory: Path, name: str, array: Any) -> FileEntry:
    contents = io.BytesIO()
    numpy.save(contents, numpy.ascontiguousarray(array), allow_pickle=False)
    data = contents.getvalue()
    durable.write_bytes_atomic(directory / name, data)
    return FileEntry(file=name, bytes=len(data), sha256=sha256_hex(data))


def _read_head(directory: Path, entry: HeadEntry) -> TeacherHead:
    def read(file: FileEntry) -> Any:
        _verified(directory, file)
        try:
            return numpy.load(directory / file.file, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            _corrupt(directory / file.file, f"is not an array: {error}")

    return TeacherHead(
        weight_VD=read(entry.weight), bias_V=None if entry.bias is None else read(entry.bias), scale=entry.scale, softcap=entry.softcap
    )


def _require_same_head(stored: TeacherHead | None, given: TeacherHead | None, directory: Path) -> None:
    if stored is None or given is None:
        return
    pairs = ((stored.weight_VD, given.weight_VD), (stored.bias_V, given.bias_V))
    arrays = all((a is None and b is None) or (a is not None and b is not None and numpy.array_equal(a, b)) for a, b in pairs)
    if not arrays or (stored.scale, stored.softcap) != (given.scale, given.softcap):
        raise StoreError(
            "store-mismatch",
            found=f"{directory} with another head than the teacher's",
            expected="the head that the stored states were made for",
            do="Choose another output directory.",
        )


def _corrupt(path: Path, what: str) -> NoReturn:
    raise StoreError(
        "store-corrupt",
        found=f"{path} {what}",
        expected="the store as it was written",
        why="a student would learn from damaged targets without a sign",
        do=f"Restore {path.name} from a copy, or remove the store and run the collect stage again.",
    )
