"""The target store while it grows and while it is read: several writers, captures continued later, streams, and no byte that nobody checked."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from stillroom.core import durable
from stillroom.core.errors import StoreError
from stillroom.core.identities import TokenSequence
from stillroom.targets import checked, store
from stillroom.targets import shards as shards_module
from stillroom.targets.checked import CheckedFile
from stillroom.targets.codecs import CodecError, HiddenCodec, TextCodec
from stillroom.targets.kinds import DrawnTargets, HiddenTargets, TextTargets
from stillroom.targets.prefetch import ahead_of
from stillroom.targets.rows import concatenate, slice_targets
from stillroom.targets.store import StoredRecord, TargetStore, merge, record_id
from unit.test_store import (
    CODECS,
    EACH,
    HEAD,
    VOCABULARY,
    assert_holds,
    contents,
    create,
    drawn,
    filled,
    flip,
    identity,
    put,
    records,
    targets,
)


@pytest.fixture(scope="module", autouse=True)
def _no_flushing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable.os, "fsync", lambda descriptor: None)
        yield


def write(directory: Path, name: str, parts: Sequence[Sequence[StoredRecord]], error: CodecError | None = None) -> TargetStore:
    made = create(directory, CODECS[name])
    for number, part in enumerate(parts):
        made.append_shard(part)
        if number == 0 and error is not None:
            made.record_codec_error(error)
    return made


def visible(directory: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(directory).items() if not Path(name).name.startswith(".")}


# -- a format that lasts ---------------------------------------------------------------------------------------------------------


def test_a_store_that_was_written_once_is_read_for_ever() -> None:
    """Bytes that lie in the repository (tests/fixtures/make_drawn_store.py wrote them), not those that the code of today writes."""
    fixtures = Path(__file__).parents[1] / "fixtures"
    expected = json.loads((fixtures / "drawn_store.json").read_text(encoding="utf-8"))
    opened = TargetStore.open(fixtures / "drawn_store")
    opened.verify()
    assert opened.record_ids == tuple(expected)
    for record, wanted in expected.items():
        (sequence,), read = opened.read([record])
        assert isinstance(read, DrawnTargets)
        assert (list(sequence.ids), [list(span) for span in sequence.answer_spans]) == (wanted["tokens"], wanted["spans"])
        found = {"offsets": read.offsets_R1, "ids": read.ids_U, "counts": read.counts_U, "entropy": read.entropy_R}
        assert {name: part.tolist() for name, part in found.items()} == {name: wanted[name] for name in found}


# -- several writers ----------------------------------------------------------------------------------------------------------


@EACH
def test_two_writers_merged_are_one(name: str, tmp_path: Path) -> None:
    """Every file and every byte; records that both captured are there once, with what the first said of them."""
    made = records(CODECS[name], 16, seed=5)
    parts = [made[:6], made[6:9], made[9:14], made[14:]]
    first, second = CodecError(rows=6, mean_kl_nats=0.5), CodecError(rows=5, mean_kl_nats=0.25)
    one = write(tmp_path / "one", name, [*parts[:2], [*made[:2], *parts[2]], [*parts[3], made[8]]], first)
    a = write(tmp_path / "a", name, parts[:2], first)
    b = write(tmp_path / "b", name, [[*made[:2], *parts[2]], [*parts[3], made[8]]], second)
    merged = merge([a, b], tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "one")
    assert merged.sha256 == one.sha256
    assert_holds(merged, made)
    assert_holds(TargetStore.open(tmp_path / "merged", one.identity), made[::-1])
    if name == "drawn":
        # The second writer coded with a prior of its own: what it wrote was coded anew.
        assert (tmp_path / "a" / "prior.npz").read_bytes() != (tmp_path / "b" / "prior.npz").read_bytes()
        assert (tmp_path / "merged" / "prior.npz").read_bytes() == (tmp_path / "a" / "prior.npz").read_bytes()


def test_a_merge_of_one_store_is_a_copy_and_of_empty_ones_is_empty(tmp_path: Path) -> None:
    one, _ = filled(tmp_path / "one", CODECS["drawn"])
    merge([one], tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tmp_path / "one")
    nothing = merge([create(tmp_path / "e", CODECS["drawn"]), create(tmp_path / "f", CODECS["drawn"])], tmp_path / "g")
    assert (len(nothing), nothing.sha256) == (0, create(tmp_path / "h", CODECS["drawn"]).sha256)
    assert nothing.bytes_per_row is None


def test_stores_that_were_made_differently_are_not_merged(tmp_path: Path) -> None:
    one = create(tmp_path / "one", CODECS["top_k"])
    other = create(tmp_path / "other", CODECS["top_k"], temperature=2.0)
    with pytest.raises(StoreError) as caught:
        merge([one, other], tmp_path / "merged")
    assert caught.value.code == "store-mismatch"
    assert "target_temperature: 1.0 here, 2.0 asked for" in caught.value.found
    hidden = HiddenCodec(width=6)
    with_head = TargetStore.create_or_resume(tmp_path / "h1", identity(hidden), HEAD)
    with_another = TargetStore.create_or_resume(tmp_path / "h2", identity(hidden), replace(HEAD, scale=2.0))
    with pytest.raises(StoreError, match="another head"):
        merge([with_head, with_another], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


class _Died(BaseException):
    pass


@pytest.mark.parametrize("name", ["drawn", "hidden int8"])
def test_a_merge_that_died_anywhere_goes_on(name: str, tmp_path: Path) -> None:
    made = records(CODECS[name], 9, seed=6)
    sources = [
        write(tmp_path / "a", name, [made[:3], made[3:5]], CodecError(rows=3)),
        write(tmp_path / "b", name, [made[4:8], made[8:]], CodecError(rows=1)),
    ]
    merge(sources, tmp_path / "whole")
    expected, fatal = contents(tmp_path / "whole"), 0
    while True:
        fatal += 1
        left = fatal

        def write_point() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise _Died

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(_Died):
            patch.setattr(durable, "write_point", write_point)
            merge(sources, tmp_path / f"{fatal}")
        if left > 0:
            break
        merge(sources, tmp_path / f"{fatal}")
        assert visible(tmp_path / f"{fatal}") == expected
    # A manifest of its own, four shards of three files, the codec's error; the prior, or the head's two arrays: three points each.
    assert fatal - 1 == 3 * (1 + 4 * 3 + 1 + (1 if name == "drawn" else 2))


# -- continued later ------------------------------------------------------------------------------------------------------------


@EACH
def test_a_store_is_continued_later_with_new_prompts(name: str, tmp_path: Path) -> None:
    """What was there stays byte for byte; a student that was trained on it finds its records where they were."""
    store_then, made = filled(tmp_path / "s", CODECS[name], (4, 3))
    before = contents(tmp_path / "s")
    more = [record for record in records(CODECS[name], 30, seed=40) if record_id(record.sequence) not in store_then][:7]
    later = create(tmp_path / "s", CODECS[name])
    assert later.append_shard([*made[:2], *more]) == 7
    assert later.record_ids[:7] == store_then.record_ids
    after = contents(tmp_path / "s")
    assert {file: data for file, data in after.items() if file in before and file != "manifest.json"} == {
        file: data for file, data in before.items() if file != "manifest.json"
    }
    assert set(after) - set(before) == {"shards/00002.arrow", "shards/00002.index.arrow"}
    for opened in (later, TargetStore.open(tmp_path / "s")):
        assert_holds(opened, [*more, *made])
        assert opened.shard_record_ids == (opened.record_ids[:4], opened.record_ids[4:7], opened.record_ids[7:])


def test_a_store_of_many_shards_holds_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_MAPS", 3)
    _, made = filled(tmp_path / "s", CODECS["drawn"], (1,) * 20)
    opened = TargetStore.open(tmp_path / "s")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for record in made:
            assert_holds(opened, [record])
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    assert_holds(opened, made)


def test_a_shard_that_changes_while_it_is_not_mapped_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_MAPS", 1)
    _, made = filled(tmp_path / "s", CODECS["top_k"], (2, 2))
    opened = TargetStore.open(tmp_path / "s")
    assert_holds(opened, made[:2])
    assert_holds(opened, made[2:])  # the first shard is let go
    path = tmp_path / "s" / "shards" / "00000.arrow"
    data = path.read_bytes()
    put(path, flip(data, len(data) // 2, 1))
    with pytest.raises(StoreError, match=re.escape("00000.arrow has been altered")):
        opened.read(opened.record_ids[:2])
    put(path, data)
    assert_holds(opened, made[:2])
    # What stays the same is not read again only to be checked.
    checks = []
    monkeypatch.setattr(checked, "sha256", lambda data: checks.append(len(data)))
    assert_holds(opened, made[2:])
    assert_holds(opened, made[:2])
    assert checks == []


# -- nothing unchecked ---------------------------------------------------------------------------------------------------------


def big_store(directory: Path, records_of: int, rows: int, width: int, seed: int = 0, shards: int = 1) -> tuple[TargetStore, list[StoredRecord]]:
    """Hidden float32 targets: records_of records of `rows` rows of `width` numbers in each shard."""
    rng = numpy.random.default_rng(seed)
    codec = HiddenCodec(width=width, state_dtype="float32")
    head = replace(HEAD, weight_VD=numpy.ones((19, width), dtype=numpy.float32))
    made = TargetStore.create_or_resume(directory, identity(codec), head)
    everything = []
    for _ in range(shards):
        part = []
        for _ in range(records_of):
            of = TokenSequence(ids=tuple(rng.integers(0, 19, rows + 1).tolist()), answer_spans=((1, rows + 1),))
            states_RD = rng.standard_normal((rows, width), dtype=numpy.float32)
            part.append(StoredRecord(sequence=of, targets=HiddenTargets(vocabulary=VOCABULARY, temperature=1.0, states_RD=states_RD, head=head)))
        made.append_shard(part)
        everything += part
    return made, everything


def test_damage_is_found_where_it_is_read_and_only_there(tmp_path: Path) -> None:
    """A shard of six blocks: a flipped byte spoils the records that lie in its block; all others are read as they were written."""
    _, made = big_store(tmp_path / "s", records_of=48, rows=32, width=1024)
    path = tmp_path / "s" / "shards" / "00000.arrow"
    assert 6 <= path.stat().st_size / checked.BLOCK_BYTES < 7
    at = 3 * checked.BLOCK_BYTES + 5
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 4]))
    opened = TargetStore.open(tmp_path / "s")  # has not read it yet
    errors = {number: error for number, record in enumerate(made) if (error := failure_of(opened, record)) is not None}
    where = f"{path} has been altered between byte {3 * checked.BLOCK_BYTES} and byte {4 * checked.BLOCK_BYTES}"
    assert all(error.code == "store-corrupt" and error.found == where for error in errors.values())
    spoiled = list(errors)
    assert spoiled == list(range(spoiled[0], spoiled[-1] + 1))
    assert 8 <= len(spoiled) <= 10  # eight records of 128 KiB, and those that reach over its ends
    with pytest.raises(StoreError, match="has been altered"):
        opened.verify()


def failure_of(opened: TargetStore, *made: StoredRecord) -> StoreError | None:
    try:
        assert_holds(opened, made)
    except StoreError as error:
        return error
    return None


def test_every_number_that_is_read_lies_in_a_checked_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of 64 bytes: had a block been skipped that a record uses, damage to it would change what is read unnoticed."""
    for module in (checked, shards_module):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    ends = 1536
    monkeypatch.setattr(checked, "_ENDS_BYTES", ends)  # Arrow's own, which is checked when the file is mapped
    for name in ("text", "drawn", "top_k", "hidden int8"):
        directory = tmp_path / name
        _, made = filled(directory, CODECS[name], (150,))
        path = directory / "shards" / "00000.arrow"
        data = path.read_bytes()
        places, found = range(ends, len(data) - ends, 96), 0
        for at in places:
            put(path, flip(data, at, 0x11))
            opened = TargetStore.open(directory)
            # What is read one by one is as it was written or it is an error: `failure_of` compares.
            alone = [failure_of(opened, record) for record in made[at % 19 :: 19]]
            found += any(alone) or failure_of(opened, *made) is not None
            put(path, data)
        assert len(places) > 10
        assert found > 0.9 * len(places)  # the rest is padding


def test_opening_reads_no_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, codec in CODECS.items():
        filled(tmp_path / name, codec)
        for path in [*(tmp_path / name / "shards").glob("0000?.arrow"), tmp_path / name / "prior.npz", tmp_path / name / "head.weight.npy"]:
            if path.exists():
                put(path, bytes(path.stat().st_size))
        opened = TargetStore.open(tmp_path / name)
        assert len(opened.record_ids) == 10
        assert opened.lengths(opened.record_ids) == [len(record.sequence.ids) for record in records(codec, 10)]
        with pytest.raises(StoreError, match="has been altered"):
            opened.sequences(opened.record_ids)


def test_a_shard_cut_off_after_opening_is_an_error_and_no_crash(tmp_path: Path) -> None:
    _, _made = filled(tmp_path / "s", CODECS["drawn"])
    opened = TargetStore.open(tmp_path / "s")
    path = tmp_path / "s" / "shards" / "00001.arrow"
    put(path, path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="is truncated"):
        opened.read(opened.record_ids)
    put(path, None)
    with pytest.raises(StoreError, match="is missing"):
        opened.read(opened.record_ids)


def test_a_whole_file_is_checked_at_its_ends_when_it_is_mapped(tmp_path: Path) -> None:
    path, data = tmp_path / "f", bytes(range(256)) * 20_000
    path.write_bytes(data)
    digests = checked.block_digests(data)
    assert len(digests) == 5
    mapped = CheckedFile(path, len(data), digests).map()
    array = numpy.frombuffer(mapped.mapped, dtype="<u4")
    mapped.require(array)
    for at in (0, len(data) - 1):
        put(path, flip(data, at, 1))
        with pytest.raises(StoreError, match="altered between"):
            CheckedFile(path, len(data), digests).map()


def test_opening_and_reading_load_no_pandas() -> None:
    """pyarrow does, where it is installed, to make numpy arrays of its own: a third of a second at the first opening."""
    folder = Path(__file__).resolve().parents[1] / "fixtures" / "drawn_store"
    program = (
        "import pathlib, sys; from stillroom.targets.store import TargetStore; "
        "store = TargetStore.open(pathlib.Path(sys.argv[1])); store.read(store.record_ids); print('pandas' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "False"


# -- streams ---------------------------------------------------------------------------------------------------------------------


@EACH
def test_a_stream_is_what_reading_gives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, made = filled(tmp_path / "s", CODECS[name])
    ids = [record_id(record.sequence) for record in made]
    batches = [[], ids[:3], ids[3:4], [], ids[5:], ids[:1]]
    for ahead, together in ((1, 1), (2, 5), (50, 12), (2, 8192)):
        monkeypatch.setattr(store, "_ROWS_TOGETHER", together)
        streamed = list(opened.batches(batches, ahead))
        assert len(streamed) == len(batches)
        for batch, (sequences, part) in zip(batches, streamed, strict=True):
            assert sequences == [record.sequence for record in made if record_id(record.sequence) in batch]
            assert_same(part, opened.read(batch)[1])


def assert_same(one: object, other: object) -> None:
    assert type(one) is type(other)
    for name in type(one).__slots__:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert numpy.array_equal(mine, theirs) if isinstance(mine, numpy.ndarray) else mine is theirs or mine == theirs


def test_a_stream_reads_ahead_in_the_background_and_no_further() -> None:
    made: list[tuple[int, str]] = []
    asked = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(10):
            made.append((number, threading.current_thread().name))
            asked.release()
            yield number

    stream = ahead_of(items(), 2)
    assert next(stream) == 0
    # Three more than were taken: two that wait, and one that has no room yet.
    for _ in range(4):
        assert asked.acquire(timeout=10)
    time.sleep(0.2)
    assert [number for number, _ in made] == [0, 1, 2, 3]
    assert {thread for _, thread in made} == {"stillroom-prefetch"}
    assert list(stream) == list(range(1, 10))


def test_what_goes_wrong_in_the_background_is_raised_in_its_turn(tmp_path: Path) -> None:
    opened, made = filled(tmp_path / "s", CODECS["drawn"])
    stream = opened.batches([[record_id(made[0].sequence)], ["0" * 64], [record_id(made[1].sequence)]])
    assert next(stream)[0] == [made[0].sequence]
    with pytest.raises(StoreError, match="no record 000"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_a_stream_that_is_left_ends_its_thread(tmp_path: Path) -> None:
    opened, made = filled(tmp_path / "s", CODECS["top_k"])
    stream = opened.batches([[record_id(record.sequence)] for record in made], ahead=1)
    next(stream)
    assert [thread.name for thread in threading.enumerate()].count("stillroom-prefetch") == 1
    stream.close()
    assert "stillroom-prefetch" not in [thread.name for thread in threading.enumerate()]


def test_a_store_is_read_in_little_memory(tmp_path: Path) -> None:
    """A store of 64 MiB through a stream of batches of 1 MiB: what is on the heap at any time are a few batches."""
    made, everything = big_store(tmp_path / "s", records_of=32, rows=64, width=1024, shards=8)
    assert made.bytes > 64 * 2**20
    first = everything[0]
    del everything
    opened = TargetStore.open(tmp_path / "s")
    ids = opened.record_ids
    numpy.random.default_rng(0).shuffle(order := numpy.arange(len(ids)))
    tracemalloc.start()
    try:
        total = 0
        for sequences, part in opened.batches([[ids[at] for at in order[start : start + 4]] for start in range(0, len(ids), 4)], ahead=2):
            assert isinstance(part, HiddenTargets)
            total += part.states_RD.nbytes
            del sequences, part
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 64 * 2**20
    assert peak < 10 * 2**20
    assert_holds(opened, [first])


def test_several_threads_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_MAPS", 2)
    _, made = filled(tmp_path / "s", CODECS["drawn"], (4, 4, 4, 4))
    opened = TargetStore.open(tmp_path / "s")

    def read(seed: int) -> None:
        rng = numpy.random.default_rng(seed)
        for _ in range(15):
            assert_holds(opened, [made[at] for at in rng.integers(0, 16, 5)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(8)))


@pytest.mark.soak
@pytest.mark.parametrize(("length", "part"), [(200, 512), (20, 4096)])
def test_a_store_of_ten_million_tokens_opens_in_a_second(length: int, part: int, tmp_path: Path) -> None:
    rng = numpy.random.default_rng(0)
    made = create(tmp_path / "s", TextCodec())
    for _ in range(0, 10**7, length * part):
        tokens = rng.integers(0, 19, (part, length)).tolist()
        sequences = [TokenSequence(ids=tuple(one), answer_spans=((1, length),)) for one in tokens]
        labels = [TextTargets(vocabulary=VOCABULARY, token_ids_R=numpy.array(one[1:])) for one in tokens]
        made.append_shard([StoredRecord(sequence=of, targets=label) for of, label in zip(sequences, labels, strict=True)])
    assert made.tokens >= 10**7
    began = time.monotonic()
    opened = TargetStore.open(tmp_path / "s", made.identity)
    assert time.monotonic() - began < 1.0
    assert opened.tokens == made.tokens


# -- rows -------------------------------------------------------------------------------------------------------------------------


@EACH
def test_rows_put_together_are_the_rows_that_were_taken_apart(name: str) -> None:
    of = TokenSequence(ids=tuple(range(12)), answer_spans=((2, 6), (7, 12)))
    whole = targets(CODECS[name], of, numpy.random.default_rng(1))
    parts = [slice_targets(whole, start, stop) for start, stop in ((0, 3), (3, 3), (3, 4), (4, 9))]
    assert_same(concatenate(parts), whole)
    if isinstance(whole, DrawnTargets):
        assert parts[2].offsets_R1.tolist() == [0, len(parts[2].ids_U)]
        assert_same(parts[1], drawn(numpy.empty((0, 19), dtype=int), numpy.random.default_rng(0)))
