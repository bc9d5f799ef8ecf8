"""Targets on disk: a directory that knows what it holds, grows by whole shards, and is read from memory maps.

    store/
      manifest.json              what the targets are and the checksum of every other file; see manifest.py
      head.weight.npy            only of hidden targets: the teacher's head, once
      head.bias.npy              only if that head has a bias
      prior.npz                  only of drawn targets: the tables that they are coded with, once; see prior.py
      shards/00000.index.arrow   which records a shard has, and the checksum of each block of its targets; see shards.py
      shards/00000.arrow         the targets

A record is found by the hash of its tokens and answer spans, never by its position. A shard counts once the manifest names it: what a crash left
behind is overwritten by the next one. Opening checks the manifest, every index and the size of every file; the rest is checked block by block before
it is first used. docs/reference/target-store.md is enough to read a store without this package.
"""

from __future__ import annotations

import io
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

import numpy
from numpy.typing import NDArray

from stillroom.core import durable
from stillroom.core.errors import ModelError, StoreError
from stillroom.core.hashing import sha256_hex
from stillroom.core.identities import TokenSequence
from stillroom.targets.checked import CheckedFile, corrupt, map_checked, require_size
from stillroom.targets.codecs import CodecError, Column, DrawnCodec, FixedCodec, decode, encode, from_bfloat16
from stillroom.targets.coding import Integers, ranges
from stillroom.targets.kinds import DrawnTargets, Targets, TeacherHead, TextTargets
from stillroom.targets.manifest import FileEntry, HeadEntry, Manifest, ShardEntry, StoreIdentity, manifest_from_bytes
from stillroom.targets.packing import Layout, Packed, in_order, no_rows, pack, require_drawn, scored, tokens_of, unpack_rows, unpack_tokens
from stillroom.targets.prefetch import ahead_of
from stillroom.targets.prior import DrawnPrior, estimate_prior
from stillroom.targets.rows import concatenate, row_count, slice_targets
from stillroom.targets.shards import TOKENS, Shard, ShardIndex, index_bytes, open_shard, packed_shard_bytes, read_index, shard_bytes

__all__ = ["StoreIdentity", "StoredRecord", "TargetStore", "merge", "record_id"]

_MANIFEST = "manifest.json"
_SHARDS = "shards"
_HEAD_WEIGHT = "head.weight.npy"
_HEAD_BIAS = "head.bias.npy"
_PRIOR = "prior.npz"
_RECORD_DOMAIN = b"stillroom record 1\n"
# Each map holds a file open, and a process may open 1,024.
_MAPS = 256
# Rows of drawn targets that are decoded at once where several batches are read.
_ROWS_TOGETHER = 8192


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
    Whatever reads raises StoreError 'store-corrupt', naming the file, rather than return a number of which a byte was not checked.
    """

    def __init__(self, directory: Path, manifest: Manifest, indices: Sequence[ShardIndex]) -> None:
        """For the constructors below; `indices` are those of the manifest's shards, already checked."""
        self.directory = directory
        self._manifest = manifest
        self._index = _Index.of(indices)
        self._files = [_checked(directory, entry, index) for entry, index in zip(manifest.shards, indices, strict=True)]
        self._maps: OrderedDict[int, Shard] = OrderedDict()
        self._lock = Lock()
        self._prior: DrawnPrior | None = None

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
            corrupt(directory / _MANIFEST, "is missing, though there are shards")
        # A creation that died before its manifest leaves the head at most.
        _refuse_foreign(directory, {_HEAD_WEIGHT, _HEAD_BIAS, _SHARDS})
        (directory / _SHARDS).mkdir(parents=True, exist_ok=True)
        manifest = Manifest(identity=identity, head=None if head is None else _write_head(directory, head))
        durable.write_bytes_atomic(directory / _MANIFEST, manifest.to_bytes())
        return cls.open(directory, identity)

    @classmethod
    def open(cls, directory: Path, identity: StoreIdentity | None = None) -> TargetStore:
        """Opens a store: checks its manifest and indices whole, and of every other file that it is there and has its size.

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
        # A death before the manifest was replaced leaves the files of the next shard, and of the first one its prior.
        unnamed = {*_shard_names(len(manifest.shards))} | ({_PRIOR} if not manifest.shards else set())
        _refuse_foreign(directory, {_MANIFEST, _SHARDS, *(entry.file for entry in manifest.files)} | unnamed)
        for entry in manifest.files:
            require_size(directory / entry.file, entry.bytes)
        return cls(directory, manifest, [_read_index(directory, entry) for entry in manifest.shards])

    def verify(self) -> None:
        """Checks every byte of every file. Raises StoreError 'store-corrupt' naming the first that is not as it was written."""
        type(self).open(self.directory, self.identity)
        for entry in self._manifest.files:
            map_checked(self.directory / entry.file, entry.bytes, entry.sha256)

    # -- what it is

    @property
    def identity(self) -> StoreIdentity:
        return self._manifest.identity

    @cached_property
    def head(self) -> TeacherHead | None:
        """The teacher's head, of a store of hidden targets: always the same object, so that it is moved to a device once."""
        entry = self._manifest.head
        return None if entry is None else _read_head(self.directory, entry)

    @property
    def prior(self) -> DrawnPrior:
        """What drawn targets are coded with. Only of a store of drawn targets that has a shard."""
        if self._prior is None:
            entry = self._manifest.prior
            assert entry is not None, "drawn targets have a prior from their first shard on"
            self._prior = _read_prior(self.directory, entry)
        return self._prior

    @property
    def codec_error(self) -> CodecError | None:
        """What the codec was measured to lose, if it has been measured."""
        return self._manifest.codec_error

    @property
    def record_ids(self) -> tuple[str, ...]:
        """Every record, in the order in which they were appended."""
        return tuple(self._index.position)

    @property
    def shard_record_ids(self) -> tuple[tuple[str, ...], ...]:
        """The same, shard by shard: how they were captured."""
        ids, bounds = self.record_ids, numpy.cumsum([0, *(shard.records for shard in self._manifest.shards)]).tolist()
        return tuple(ids[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False))

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
    def bytes_per_row(self) -> float | None:
        """Bytes of targets for each scored row, as the manifest says."""
        return self._manifest.bytes_per_row

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
        full disk (ResourceError 'disk-full'), none of it. The first shard of drawn targets also decides the prior that all later ones are coded
        with: one of some ten thousand rows makes them smallest. Raises StoreError 'store-mismatch' for targets of another vocabulary or temperature,
        and ModelError 'model-unsupported' for targets that are not numbers.
        """
        fresh = {record_id(record.sequence): record for record in records}
        fresh = {key: record for key, record in fresh.items() if key not in self._index.position}
        if not fresh:
            return 0
        for record in fresh.values():
            self._require_own(record)
        sequences = [record.sequence for record in fresh.values()]
        manifest = self._manifest
        if isinstance(self.identity.codec, DrawnCodec):
            drawn = _drawn(self.identity, self.identity.codec, sequences, [record.targets for record in fresh.values()])
            prior = self.prior if manifest.prior is not None else _estimated(sequences, drawn, self.identity.vocabulary_size)
            if manifest.prior is None:
                manifest = replace(manifest, prior=_write(self.directory, _PRIOR, prior.to_bytes()))
            data = packed_shard_bytes(sequences, pack(prior, sequences, drawn))
        else:
            prior, data = None, _fixed_shard_bytes(self.identity.codec, sequences, [record.targets for record in fresh.values()])
        entry = _write_shard(self.directory, len(manifest.shards), list(fresh), sequences, data)
        self._replace_manifest(replace(manifest, shards=(*manifest.shards, entry)))
        self._prior = prior
        index = _read_index(self.directory, entry)
        self._files.append(_checked(self.directory, entry, index))
        self._index = self._index.followed_by(index)
        return len(fresh)

    def record_codec_error(self, error: CodecError) -> None:
        """Keeps in the manifest what the codec was measured to lose."""
        self._replace_manifest(replace(self._manifest, codec_error=error))

    def _require_own(self, record: StoredRecord) -> None:
        targets, identity = record.targets, self.identity
        temperature = identity.temperature if isinstance(targets, TextTargets) else targets.temperature
        if targets.vocabulary != identity.vocabulary or temperature != identity.temperature:
            raise StoreError(
                "store-mismatch",
                found=f"targets of vocabulary {targets.vocabulary} at temperature {temperature:g}",
                expected=f"vocabulary {identity.vocabulary} at temperature {identity.temperature:g}",
                do="Make a store for each vocabulary and temperature.",
            )
        scored_rows = len(record.sequence.scored_rows)
        assert row_count(targets) == scored_rows, f"{row_count(targets)} rows of targets for {scored_rows} scored rows"

    def _replace_manifest(self, manifest: Manifest) -> None:
        durable.write_bytes_atomic(self.directory / _MANIFEST, manifest.to_bytes())
        self._manifest = manifest

    # -- reading

    def read(self, record_ids: Sequence[str]) -> tuple[list[TokenSequence], Targets]:
        """The records asked for, in that order, and the targets of their scored rows laid end to end (new numpy arrays).

        Raises StoreError 'store-mismatch' for a record that is not here.
        """
        places, identity = self._positions(record_ids), self.identity
        if isinstance(identity.codec, DrawnCodec):
            return self._read_drawn(places, identity.codec)
        sequences = self._sequences(places)
        targets = decode(
            identity.codec,
            {column.name: self._gathered(places, column) for column in identity.codec.columns},
            vocabulary=identity.vocabulary,
            temperature=identity.temperature,
            head=self.head,
            labels_R=_labels(sequences),
        )
        return sequences, targets

    def batches(self, batches: Iterable[Sequence[str]], ahead: int = 2) -> Iterator[tuple[list[TokenSequence], Targets]]:
        """What `read` gives for each of `batches` in turn, read in the background, at most `ahead` batches before they are asked for.

        Batches of drawn targets are decoded several at once, up to 8,192 rows or one batch, since a few rows take nearly as long as many: so much
        more may wait, and a batch is a view of what was decoded.
        """
        return ahead_of(self._read_together(batches) if isinstance(self.identity.codec, DrawnCodec) else map(self.read, batches), ahead)

    def _read_together(self, batches: Iterable[Sequence[str]]) -> Iterator[tuple[list[TokenSequence], Targets]]:
        for group in _grouped(batches, self._rows_here, _ROWS_TOGETHER):
            try:
                sequences, targets = self.read([record for batch in group for record in batch])
            except StoreError:
                # What can be read comes before the error, as if each batch had been read alone.
                yield from map(self.read, group)
                continue
            first = start = 0
            for batch in group:
                some = sequences[first : first + len(batch)]
                stop = start + sum(len(sequence.scored_rows) for sequence in some)
                yield some, slice_targets(targets, start, stop)
                first, start = first + len(batch), stop

    def _rows_here(self, batch: Sequence[str]) -> int:
        """Scored rows of those records that are here."""
        return int(self._index.rows[[place for record in batch if (place := self._index.position.get(record)) is not None]].sum())

    def sequences(self, record_ids: Sequence[str]) -> list[TokenSequence]:
        """The tokens alone."""
        return self._sequences(self._positions(record_ids))

    def lengths(self, record_ids: Sequence[str]) -> list[int]:
        """Tokens of each of these records, without reading them."""
        lengths: list[int] = self._index.tokens[self._positions(record_ids)].tolist()
        return lengths

    def scored_tokens(self, record_ids: Sequence[str]) -> int:
        """Scored rows of these records, without reading them."""
        return int(self._index.rows[self._positions(record_ids)].sum())

    def _positions(self, record_ids: Sequence[str]) -> Integers:
        try:
            return numpy.fromiter((self._index.position[key] for key in record_ids), dtype=numpy.int64, count=len(record_ids))
        except KeyError as error:
            raise StoreError(
                "store-mismatch",
                found=f"no record {error.args[0]} in {self.directory}",
                expected="every record of the transfer set",
                do="Run the collect stage again: it adds what is missing.",
            ) from None

    def _read_drawn(self, places: Integers, codec: DrawnCodec) -> tuple[list[TokenSequence], Targets]:
        identity = self.identity
        if len(places) == 0:
            return [], no_rows(codec.draws, vocabulary=identity.vocabulary, temperature=identity.temperature)
        packed = self._packed(places)
        with self._decoding():
            layout = self._layout(places, packed)
            tokens_T = unpack_tokens(self.prior, packed, layout)
            sequences = self._with_spans(places, tokens_T)
            before_R, predicted_R = scored(sequences)
            targets = unpack_rows(
                self.prior,
                packed,
                layout,
                tokens_T[before_R],
                tokens_T[predicted_R],
                vocabulary=identity.vocabulary,
                temperature=identity.temperature,
            )
        return sequences, targets

    def _sequences(self, places: Integers) -> list[TokenSequence]:
        if not isinstance(self.identity.codec, DrawnCodec) or len(places) == 0:
            return self._with_spans(places, self._gathered(places, TOKENS))
        packed = self._packed(places)
        with self._decoding():
            return self._with_spans(places, unpack_tokens(self.prior, packed, self._layout(places, packed)))

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Every byte has been checked by then, so this is a store that was written wrong."""
        try:
            yield
        except ValueError as error:
            corrupt(self.directory / _SHARDS, f"does not decode: {error}")

    def _layout(self, places: Integers, packed: Packed) -> Layout:
        return Layout.of(self._index.tokens[places], self._index.rows[places], packed.lanes_E)

    def _with_spans(self, places: Integers, tokens_T: NDArray[Any]) -> list[TokenSequence]:
        spans: list[tuple[tuple[int, int], ...]] = [()] * len(places)
        for shard, within, at in self._by_shard(places):
            for record, place in zip(within.tolist(), at.tolist(), strict=True):
                spans[place] = shard.spans(record)
        tokens, ends = tokens_T.tolist(), numpy.cumsum(self._index.tokens[places]).tolist()
        return [TokenSequence(ids=tuple(tokens[begin:end]), answer_spans=some) for begin, end, some in zip([0, *ends], ends, spans, strict=False)]

    def _gathered(self, places: Integers, column: Column) -> NDArray[Any]:
        """A column of these records, in order: one numpy gather for each shard, whatever the number of rows."""
        counts = (self._index.tokens if column is TOKENS else self._index.rows)[places]
        starts = numpy.cumsum(counts) - counts
        whole = numpy.empty((int(counts.sum()), column.width) if column.width else int(counts.sum()), dtype=column.dtype)
        for shard, within, at in self._by_shard(places):
            whole[ranges(starts[at], counts[at])] = shard.taken(column.name, within)
        return whole

    def _packed(self, places: Integers) -> Packed:
        parts = [(shard.packed(within), at) for shard, within, at in self._by_shard(places)]
        return in_order([packed for packed, _ in parts], numpy.concatenate([at for _, at in parts]))

    def _by_shard(self, places: Integers) -> Iterator[tuple[Shard, Integers, Integers]]:
        """Each shard that has some of these records, the places of those in it, and their places among all that were asked for."""
        shards = self._index.shard[places]
        order = numpy.argsort(shards, kind="stable")
        for number, at in zip(*_runs(shards[order], order), strict=True):
            yield self._shard(number), self._index.within[places[at]], at

    def _shard(self, number: int) -> Shard:
        with self._lock:
            if number not in self._maps:
                self._maps[number] = open_shard(self._files[number].map(), self.identity.codec)
                if len(self._maps) > _MAPS:
                    self._maps.popitem(last=False)
            self._maps.move_to_end(number)
            return self._maps[number]


def merge(stores: Sequence[TargetStore], into: Path) -> TargetStore:
    """The records of several stores of one identity, which several writers captured, in a store in `into`; the first of the same records stays.

    Every file of it, the manifest too, is byte for byte what one writer gives who appends the stores' shards in this order and measures the codec's
    error as the first of them did. Drawn targets are coded anew where stores have different priors. A merge that died goes on where it stopped. Raises
    StoreError 'store-mismatch' showing what differs between two stores.
    """
    first = stores[0]
    for store in stores[1:]:
        if differences := first.identity.differences(store.identity):
            raise StoreError(
                "store-mismatch",
                found=f"{first.directory} and {store.directory}: " + "; ".join(differences),
                expected="stores made by the same teacher, in the same way",
                why="targets that were made differently would be mixed without a sign",
                do="Merge stores of one recipe.",
            )
        _require_same_head(first.head, store.head, store.directory)
    merged = TargetStore.create_or_resume(into, first.identity, first.head)
    for store in stores:
        for shard in store.shard_record_ids:
            sequences, targets = store.read([record for record in shard if record not in merged])
            merged.append_shard(_split(sequences, targets))
    measured = [store.codec_error for store in stores if store.codec_error is not None]
    if merged.codec_error is None and measured:
        merged.record_codec_error(measured[0])
    return merged


def _split(sequences: Sequence[TokenSequence], targets: Targets) -> Iterator[StoredRecord]:
    start = 0
    for sequence in sequences:
        stop = start + len(sequence.scored_rows)
        yield StoredRecord(sequence=sequence, targets=slice_targets(targets, start, stop))
        start = stop


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """Where each record is, its shard and its place in it, and how much it has."""

    position: dict[str, int]
    shard: Integers
    within: Integers
    tokens: Integers
    rows: Integers

    @classmethod
    def of(cls, shards: Sequence[ShardIndex]) -> _Index:
        sizes = [len(shard.record_ids) for shard in shards]
        empty = numpy.empty(0, dtype=numpy.int64)
        return cls(
            position={key: place for place, key in enumerate(key for shard in shards for key in shard.record_ids)},
            shard=numpy.repeat(numpy.arange(len(shards)), sizes),
            within=numpy.concatenate([empty, *(numpy.arange(size) for size in sizes)]),
            tokens=numpy.concatenate([empty, *(shard.tokens for shard in shards)]),
            rows=numpy.concatenate([empty, *(shard.rows for shard in shards)]),
        )

    def followed_by(self, shard: ShardIndex) -> _Index:
        """The same with one more shard. The dictionary is shared: a copy of it for each shard would take longer the more there are."""
        before, added = len(self.position), len(shard.record_ids)
        self.position.update(zip(shard.record_ids, range(before, before + added), strict=True))
        number = int(self.shard[-1]) + 1 if before else 0
        return _Index(
            position=self.position,
            shard=numpy.append(self.shard, numpy.full(added, number)),
            within=numpy.append(self.within, numpy.arange(added)),
            tokens=numpy.append(self.tokens, shard.tokens),
            rows=numpy.append(self.rows, shard.rows),
        )


def _runs(sorted_numbers: Integers, order: Integers) -> tuple[list[int], list[Integers]]:
    """Each number once, and the parts of `order` that belong to it."""
    numbers, first = numpy.unique(sorted_numbers, return_index=True)
    return numbers.tolist(), numpy.split(order, first[1:]) if len(first) else []


def _grouped(batches: Iterable[Sequence[str]], rows_of: Callable[[Sequence[str]], int], most: int) -> Iterator[list[Sequence[str]]]:
    """Runs of batches with at most `most` rows together, or of one batch."""
    group: list[Sequence[str]] = []
    rows = 0
    for batch in batches:
        more = rows_of(batch)
        if group and rows + more > most:
            yield group
            group, rows = [], 0
        group.append(batch)
        rows += more
    if group:
        yield group


def _labels(sequences: Sequence[TokenSequence]) -> NDArray[numpy.int64]:
    return numpy.array([sequence.ids[row + 1] for sequence in sequences for row in sequence.scored_rows], dtype=numpy.int64)


# -- targets as bytes ------------------------------------------------------------------------------------------------------


def _fixed_shard_bytes(codec: FixedCodec, sequences: Sequence[TokenSequence], targets: Sequence[Targets]) -> bytes:
    encoded = [encode(codec, part) for part in targets]
    if any(_has_nan(column) for part in encoded for column in part.values()):
        _refuse_nan()
    columns = {column.name: numpy.concatenate([part[column.name] for part in encoded]) for column in codec.columns}
    return shard_bytes(sequences, codec, columns)


def _drawn(identity: StoreIdentity, codec: DrawnCodec, sequences: Sequence[TokenSequence], targets: Sequence[Targets]) -> DrawnTargets:
    parts = [part for part in targets if isinstance(part, DrawnTargets)]
    if len(parts) != len(targets) or any(part.draws != codec.draws for part in parts):
        raise ValueError(f"other targets than drawn ones of {codec.draws} draws cannot be written by {codec}")
    whole = concatenate(parts)
    if numpy.isnan(whole.entropy_R).any():
        _refuse_nan()
    require_drawn(sequences, whole, codec.draws, identity.vocabulary_size)
    return whole


def _estimated(sequences: Sequence[TokenSequence], drawn: DrawnTargets, size: int) -> DrawnPrior:
    tokens_T = tokens_of(sequences)
    before_R, predicted_R = scored(sequences)
    return estimate_prior(drawn, tokens_T[before_R], tokens_T[predicted_R], size)


def _has_nan(column: NDArray[Any]) -> bool:
    return bool(numpy.isnan(from_bfloat16(column) if column.dtype == numpy.uint16 else column).any())


def _refuse_nan() -> NoReturn:
    raise ModelError(
        "model-unsupported",
        found="a teacher whose distributions are not numbers (NaN)",
        expected="finite numbers",
        why="a student would learn them",
        do="Load the teacher in float32 (hardware.dtype), or check its weights.",
    )


# -- files ---------------------------------------------------------------------------------------------------------------


def _shard_names(number: int) -> tuple[str, str]:
    """The files of a shard: index and targets."""
    return f"{_SHARDS}/{number:05d}.index.arrow", f"{_SHARDS}/{number:05d}.arrow"


def _read_manifest(directory: Path) -> Manifest:
    path = directory / _MANIFEST
    try:
        return manifest_from_bytes(path.read_bytes())
    except OSError as error:
        corrupt(path, "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}")
    except ValueError as error:
        corrupt(path, str(error))


def _read_index(directory: Path, entry: ShardEntry) -> ShardIndex:
    path = directory / entry.index.file
    index = read_index(path, map_checked(path, entry.index.bytes, entry.index.sha256)[:], entry.bytes)
    if (len(index.record_ids), index.rows.sum(), index.tokens.sum()) != (entry.records, entry.rows, entry.tokens):
        corrupt(path, "does not hold as many records, rows and tokens as the manifest says")
    return index


def _checked(directory: Path, entry: ShardEntry, index: ShardIndex) -> CheckedFile:
    return CheckedFile(directory / entry.file, entry.bytes, index.digests)


def _read_prior(directory: Path, entry: FileEntry) -> DrawnPrior:
    path = directory / entry.file
    try:
        return DrawnPrior.from_bytes(map_checked(path, entry.bytes, entry.sha256)[:])
    except ValueError as error:
        corrupt(path, str(error))


def _refuse_foreign(directory: Path, known: set[str]) -> None:
    """Names anything in the store that is not of it. Hidden files are let be: locks, what a crash left half-written, what desktops leave."""
    for path in sorted([*directory.glob("*"), *(directory / _SHARDS).glob("*")]):
        name = path.relative_to(directory).as_posix()
        if not path.name.startswith(".") and name not in known:
            corrupt(path, "is not of this store")


def _write_head(directory: Path, head: TeacherHead) -> HeadEntry:
    directory.mkdir(parents=True, exist_ok=True)
    return HeadEntry(
        weight=_write(directory, _HEAD_WEIGHT, _npy(head.weight_VD)),
        bias=None if head.bias_V is None else _write(directory, _HEAD_BIAS, _npy(head.bias_V)),
        scale=float(head.scale),
        softcap=None if head.softcap is None else float(head.softcap),
    )


def _write_shard(directory: Path, number: int, record_ids: Sequence[str], sequences: Sequence[TokenSequence], data: bytes) -> ShardEntry:
    index_name, name = _shard_names(number)
    targets = _write(directory, name, data)
    index = _write(directory, index_name, index_bytes(record_ids, sequences, data))
    return ShardEntry(
        file=targets.file,
        bytes=targets.bytes,
        sha256=targets.sha256,
        index=index,
        records=len(record_ids),
        rows=sum(len(sequence.scored_rows) for sequence in sequences),
        tokens=sum(len(sequence.ids) for sequence in sequences),
    )


def _npy(array: Any) -> bytes:
    contents = io.BytesIO()
    numpy.save(contents, numpy.ascontiguousarray(array), allow_pickle=False)
    return contents.getvalue()


def _write(directory: Path, name: str, data: bytes) -> FileEntry:
    durable.write_bytes_atomic(directory / name, data)
    return FileEntry(file=name, bytes=len(data), sha256=sha256_hex(data))


def _read_head(directory: Path, entry: HeadEntry) -> TeacherHead:
    def read(file: FileEntry) -> Any:
        path = directory / file.file
        map_checked(path, file.bytes, file.sha256)
        try:
            return numpy.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            corrupt(path, f"is not an array: {error}")

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
