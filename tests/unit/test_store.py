"""The target store: what goes in comes out, it refuses what is not its own, every damage is found and named, and a death loses nothing that counted."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contract import markdown, source
from stillroom.core import durable
from stillroom.core.errors import ModelError, ResourceError, StoreError
from stillroom.core.identities import ModelRef, Sampling, TokenSequence
from stillroom.targets import checked
from stillroom.targets import shards as shards_module
from stillroom.targets.codecs import (
    Codec,
    CodecError,
    DrawnCodec,
    HiddenCodec,
    SampledCodec,
    TextCodec,
    TopKCodec,
    bytes_per_row,
    codec_from,
    describe,
    encode,
    from_bfloat16,
    from_int8,
    measure_error,
    to_bfloat16,
    to_int8,
    whole_log_probs_RV,
)
from stillroom.targets.kinds import DrawnTargets, HiddenTargets, SampledTargets, Targets, TeacherHead, TextTargets, TopKTargets
from stillroom.targets.manifest import manifest_from_bytes
from stillroom.targets.rows import kind_of, row_count, slice_targets
from stillroom.targets.store import StoredRecord, StoreIdentity, TargetStore, record_id

SIZE, WIDTH, K, DRAWS = 19, 6, 5, 7
VOCABULARY = "f" * 64
TEACHER = ModelRef(source="/models/t", kind="directory", revision=None, weights_sha256="a" * 64, architecture="Llama", parameters=10, licence="MIT")
HEAD = TeacherHead(
    weight_VD=numpy.random.default_rng(0).normal(size=(SIZE, WIDTH)).astype(numpy.float32),
    bias_V=numpy.random.default_rng(1).normal(size=SIZE).astype(numpy.float32),
    scale=0.5,
    softcap=4.0,
)
CODECS: dict[str, Codec] = {
    "text": TextCodec(),
    "sampled": SampledCodec(),
    "drawn": DrawnCodec(draws=DRAWS),
    "top_k": TopKCodec(k=K),
    "hidden bfloat16": HiddenCodec(width=WIDTH),
    "hidden float32": HiddenCodec(width=WIDTH, state_dtype="float32"),
    "hidden int8": HiddenCodec(width=WIDTH, state_dtype="int8"),
}
EACH = pytest.mark.parametrize("name", CODECS)


@pytest.fixture(scope="module", autouse=True)
def _no_flushing() -> Iterator[None]:
    """Flushing matters when the power fails, which is tested with `durable`; here it would only make thousands of small writes slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable.os, "fsync", lambda descriptor: None)
        yield


def identity(codec: Codec, **changes: object) -> StoreIdentity:
    made = StoreIdentity(
        teacher=TEACHER,
        vocabulary=VOCABULARY,
        vocabulary_size=SIZE,
        chat_template_sha256=None,
        codec=codec,
        temperature=1.0,
        generation=Sampling(max_new_tokens=8),
    )
    return replace(made, **changes)


def sequence(rng: numpy.random.Generator, spans: int | None = None) -> TokenSequence:
    length = int(rng.integers(1, 12))
    cuts = numpy.sort(
        rng.choice(length + 1, size=min(2 * (int(rng.integers(0, 3)) if spans is None else spans), (length + 1) // 2 * 2), replace=False)
    )
    return TokenSequence(
        ids=tuple(rng.integers(0, SIZE, length).tolist()), answer_spans=tuple(zip(cuts[::2].tolist(), cuts[1::2].tolist(), strict=True))
    )


def targets(codec: Codec, of: TokenSequence, rng: numpy.random.Generator) -> Targets:
    rows = len(of.scored_rows)
    labels_R = numpy.array([of.ids[row + 1] for row in of.scored_rows], dtype=numpy.int64)
    match codec:
        case TextCodec():
            return TextTargets(vocabulary=VOCABULARY, token_ids_R=labels_R)
        case SampledCodec():
            log_probs_R = numpy.log(rng.random(rows)).astype(numpy.float32)
            return SampledTargets(vocabulary=VOCABULARY, temperature=1.0, token_ids_R=labels_R, log_probs_R=log_probs_R)
        case DrawnCodec():
            return drawn(numpy.array([rng.multinomial(DRAWS, rng.dirichlet(numpy.full(SIZE, 0.2))) for _ in range(rows)]).reshape(rows, SIZE), rng)
        case TopKCodec():
            log_probs_RV = numpy.log(rng.dirichlet(numpy.ones(SIZE), size=rows)).reshape(rows, SIZE)
            ids_RK = numpy.argsort(-log_probs_RV, axis=1)[:, :K].astype(numpy.int32)
            kept_RK = numpy.take_along_axis(log_probs_RV, ids_RK, axis=1)
            tail_R = numpy.log(numpy.maximum(1 - numpy.exp(kept_RK).sum(axis=1), 1e-12)).astype(numpy.float32)
            tail_R[:1] = -math.inf
            return TopKTargets(
                vocabulary=VOCABULARY,
                temperature=1.0,
                ids_RK=ids_RK,
                log_probs_RK=kept_RK.astype(numpy.float32),
                tail_log_mass_R=tail_R.astype(numpy.float32),
            )
        case HiddenCodec():
            states_RD = rng.normal(size=(rows, WIDTH)).astype(numpy.float32)
            return HiddenTargets(vocabulary=VOCABULARY, temperature=1.0, states_RD=states_RD, head=HEAD)


def drawn(times_RV: numpy.ndarray, rng: numpy.random.Generator) -> DrawnTargets:
    row_U, ids_U = times_RV.nonzero()
    return DrawnTargets(
        vocabulary=VOCABULARY,
        temperature=1.0,
        draws=DRAWS,
        offsets_R1=numpy.append(0, numpy.cumsum((times_RV > 0).sum(axis=1))),
        ids_U=ids_U.astype(numpy.int32),
        counts_U=times_RV[row_U, ids_U].astype(numpy.int32),
        entropy_R=(rng.random(len(times_RV)) * math.log(SIZE)).astype(numpy.float32),
    )


def records(codec: Codec, count: int, seed: int = 0) -> list[StoredRecord]:
    rng = numpy.random.default_rng(seed)
    made: dict[str, StoredRecord] = {}
    while len(made) < count:
        of = sequence(rng)
        made.setdefault(record_id(of), StoredRecord(sequence=of, targets=targets(codec, of, rng)))
    return list(made.values())


def create(directory: Path, codec: Codec, **changes: object) -> TargetStore:
    return TargetStore.create_or_resume(directory, identity(codec, **changes), HEAD if isinstance(codec, HiddenCodec) else None)


def filled(directory: Path, codec: Codec, shards: Sequence[int] = (5, 1, 4)) -> tuple[TargetStore, list[StoredRecord]]:
    made = records(codec, sum(shards))
    store, rest = create(directory, codec), list(made)
    for count in shards:
        store.append_shard(rest[:count])
        rest = rest[count:]
    return store, made


def arrays(of: Targets) -> list[numpy.ndarray]:
    match of:
        case TextTargets():
            return [of.token_ids_R]
        case SampledTargets():
            return [of.token_ids_R, of.log_probs_R]
        case DrawnTargets():
            return [of.offsets_R1, of.ids_U, of.counts_U, of.entropy_R]
        case TopKTargets():
            return [of.ids_RK, of.log_probs_RK, of.tail_log_mass_R]
        case HiddenTargets():
            return [from_bfloat16(of.states_RD) if of.states_RD.dtype == numpy.uint16 else of.states_RD]
    raise AssertionError(of)


def assert_holds(store: TargetStore, expected: Sequence[StoredRecord]) -> None:
    """The records asked for, in the order asked, bit for bit as the codec writes them."""
    sequences, read = store.read([record_id(record.sequence) for record in expected])
    assert sequences == [record.sequence for record in expected]
    assert kind_of(read) == store.identity.codec.kind
    assert row_count(read) == sum(len(s.scored_rows) for s in sequences)
    start = 0
    for record in expected:
        part = slice_targets(read, start, start + len(record.sequence.scored_rows))
        start += len(record.sequence.scored_rows)
        for got, wanted in zip(arrays(part), arrays(as_written(store.identity.codec, record.targets)), strict=True):
            assert numpy.array_equal(got, wanted)


def as_written(codec: Codec, of: Targets) -> Targets:
    """What the codec states that it keeps of these targets."""
    if isinstance(of, HiddenTargets) and isinstance(codec, HiddenCodec) and codec.state_dtype == "bfloat16":
        return replace(of, states_RD=from_bfloat16(to_bfloat16(of.states_RD)))
    if isinstance(of, HiddenTargets) and isinstance(codec, HiddenCodec) and codec.state_dtype == "int8":
        return replace(of, states_RD=from_int8(*to_int8(of.states_RD)))
    if isinstance(of, DrawnTargets):
        return replace(of, entropy_R=numpy.rint(of.entropy_R * 512) / 512)
    return of


# -- round trip ---------------------------------------------------------------------------------------------------------


@EACH
def test_what_goes_in_comes_out_in_any_order(name: str, tmp_path: Path) -> None:
    store, made = filled(tmp_path / "s", CODECS[name])
    order = numpy.random.default_rng(4).permutation(len(made))
    for opened in (store, TargetStore.open(tmp_path / "s", store.identity)):
        assert opened.record_ids == tuple(record_id(record.sequence) for record in made)
        assert_holds(opened, made)
        assert_holds(opened, [made[i] for i in order])
        assert_holds(opened, [made[3], made[9], made[3]])  # a record may be asked for twice
        assert_holds(opened, [])
        assert len(opened) == 10
        assert opened.rows == sum(len(record.sequence.scored_rows) for record in made)
        assert opened.tokens == sum(len(record.sequence.ids) for record in made)
        assert opened.sequences(opened.record_ids) == [record.sequence for record in made]
        assert opened.scored_tokens(opened.record_ids[:3]) == sum(len(record.sequence.scored_rows) for record in made[:3])
        assert record_id(made[0].sequence) in opened
        assert "0" * 64 not in opened


@given(seed=st.integers(0, 2**32), shards=st.lists(st.integers(1, 6), max_size=4), name=st.sampled_from(sorted(CODECS)))
@settings(deadline=None, max_examples=30)
def test_any_records_round_trip(tmp_path_factory: pytest.TempPathFactory, seed: int, shards: list[int], name: str) -> None:
    directory = tmp_path_factory.mktemp("store")
    made = records(CODECS[name], sum(shards), seed)
    store, rest = create(directory, CODECS[name]), list(made)
    for count in shards:
        assert store.append_shard(rest[:count]) == count
        rest = rest[count:]
    numpy.random.default_rng(seed).shuffle(made)  # type: ignore[arg-type]
    assert_holds(TargetStore.open(directory), made)


@EACH
def test_the_same_records_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    one, other = filled(tmp_path / "a", CODECS[name])[0], filled(tmp_path / "b", CODECS[name])[0]
    assert one.sha256 == other.sha256
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_record_is_its_tokens_and_spans(tmp_path: Path) -> None:
    base = TokenSequence(ids=(1, 2, 3, 4), answer_spans=((2, 4),))
    others = [
        replace(base, ids=(1, 2, 3, 5)),
        replace(base, ids=(1, 2, 3)),
        replace(base, answer_spans=((1, 4),)),
        replace(base, answer_spans=((2, 3), (3, 4))),
        TokenSequence(ids=(1, 2, 3, 4, 1, 2, 4), answer_spans=()),
    ]
    assert len({record_id(s) for s in [base, *others]}) == 6
    store = create(tmp_path / "s", TextCodec())
    record = StoredRecord(sequence=base, targets=targets(TextCodec(), base, numpy.random.default_rng(0)))
    assert store.append_shard([record, record]) == 1
    before = store.sha256
    assert store.append_shard([record]) == 0
    assert (store.sha256, len(store)) == (before, 1)


def test_reading_a_record_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s", TextCodec())
    with pytest.raises(StoreError) as caught:
        store.read(["0" * 64])
    assert caught.value.code == "store-mismatch"
    assert "0" * 64 in caught.value.found


def test_the_head_comes_back_exactly(tmp_path: Path) -> None:
    for name, head in (("all", HEAD), ("bare", TeacherHead(weight_VD=to_bfloat16(HEAD.weight_VD)))):
        TargetStore.create_or_resume(tmp_path / name, identity(HiddenCodec(width=WIDTH)), head)
        read = TargetStore.open(tmp_path / name).head
        assert read is not None
        assert numpy.array_equal(read.weight_VD, head.weight_VD)
        assert read.weight_VD.dtype == head.weight_VD.dtype
        assert (read.bias_V is None) == (head.bias_V is None)
        assert (read.scale, read.softcap) == (head.scale, head.softcap)


# -- refusals -------------------------------------------------------------------------------------------------------------


CHANGES: dict[str, tuple[dict[str, object], str]] = {
    "teacher": ({"teacher": replace(TEACHER, weights_sha256="b" * 64)}, "teacher.weights_sha256"),
    "vocabulary": ({"vocabulary": "e" * 64}, "vocabulary.fingerprint"),
    "template": ({"chat_template_sha256": "c" * 64}, "chat_template_sha256"),
    "k": ({"codec": TopKCodec(k=K + 1)}, "codec.k"),
    "codec": ({"codec": TextCodec()}, "codec.kind"),
    "temperature": ({"temperature": 2.0}, "target_temperature"),
    "arithmetic": ({"arithmetic": "bfloat16"}, "arithmetic: 'float32' here, 'bfloat16' asked for"),
    "sampling": ({"generation": Sampling(max_new_tokens=8, temperature=0.7)}, "generation.temperature"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_store_of_something_else_is_refused_with_the_difference(what: str, tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s", CODECS["top_k"])
    changes, field = CHANGES[what]
    before = contents(tmp_path / "s")
    other = replace(store.identity, **changes)
    for attempt in (lambda: TargetStore.open(tmp_path / "s", other), lambda: TargetStore.create_or_resume(tmp_path / "s", other)):
        with pytest.raises(StoreError) as caught:
            attempt()
        assert caught.value.code == "store-mismatch"
        assert field in caught.value.found
    assert contents(tmp_path / "s") == before


def test_draws_of_another_number_or_seed_are_another_store(tmp_path: Path) -> None:
    filled(tmp_path / "s", CODECS["drawn"])
    for codec, field in (
        (DrawnCodec(draws=DRAWS + 1), "codec.draws: 7 here, 8 asked for"),
        (DrawnCodec(draws=DRAWS, seed=1), "codec.seed: 0 here, 1"),
    ):
        with pytest.raises(StoreError, match=field) as caught:
            create(tmp_path / "s", codec)
        assert caught.value.code == "store-mismatch"


def test_differences_show_both_values_and_nothing_else() -> None:
    one = identity(TextCodec())
    two = replace(one, temperature=2.0, teacher=replace(TEACHER, weights_sha256="b" * 64))
    assert one.differences(two) == [
        f"teacher.weights_sha256: {'a' * 64!r} here, {'b' * 64!r} asked for",
        "target_temperature: 1.0 here, 2.0 asked for",
    ]
    assert one.differences(one) == []


def test_the_same_weights_elsewhere_are_the_same_teacher() -> None:
    one = identity(TextCodec())
    assert one.differences(replace(one, teacher=replace(TEACHER, source="/moved/t", kind="hub", revision="main"))) == []
    unknown = replace(one, teacher=replace(TEACHER, weights_sha256=None))
    moved = replace(unknown, teacher=replace(unknown.teacher, source="/moved/t"))
    assert unknown.differences(moved) == ["teacher.source: '/models/t' here, '/moved/t' asked for"]


def test_targets_of_another_vocabulary_temperature_or_head_are_refused(tmp_path: Path) -> None:
    store, made = filled(tmp_path / "s", CODECS["top_k"])
    record = records(CODECS["top_k"], 20, seed=9)[-1]
    for changed in (replace(record.targets, vocabulary="e" * 64), replace(record.targets, temperature=2.0)):  # type: ignore[call-arg]
        with pytest.raises(StoreError) as caught:
            store.append_shard([replace(record, targets=changed)])
        assert caught.value.code == "store-mismatch"
    create(tmp_path / "h", HiddenCodec(width=WIDTH))
    with pytest.raises(StoreError, match="another head"):
        TargetStore.create_or_resume(tmp_path / "h", identity(HiddenCodec(width=WIDTH)), replace(HEAD, scale=1.0))
    assert_holds(store, made)


def test_what_is_no_number_is_never_stored(tmp_path: Path) -> None:
    of = TokenSequence(ids=(1, 2, 3), answer_spans=((1, 3),))
    good = {name: targets(codec, of, numpy.random.default_rng(3)) for name, codec in CODECS.items()}
    bad = {name: replace(good[name], states_RD=_broken(good[name].states_RD)) for name in good if name.startswith("hidden")}
    bad |= {"drawn": replace(good["drawn"], entropy_R=_broken(good["drawn"].entropy_R))}
    bad |= {"sampled": replace(good["sampled"], log_probs_R=_broken(good["sampled"].log_probs_R))}
    for name, broken in bad.items():
        store = create(tmp_path / name, CODECS[name])
        with pytest.raises(ModelError, match="NaN"):
            store.append_shard([StoredRecord(sequence=of, targets=broken)])
        assert len(TargetStore.open(tmp_path / name)) == 0


def _broken(array: numpy.ndarray) -> numpy.ndarray:
    broken = array.copy()
    broken[1] = numpy.nan
    return broken


# -- damage ---------------------------------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def put(path: Path, data: bytes | None) -> None:
    """A new file in place of the old one, which may still be mapped."""
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)


def flip(data: bytes, at: int, mask: int) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


FILES = {
    "hidden bfloat16": ("manifest.json", "head.weight.npy", "head.bias.npy", "shards/00001.index.arrow", "shards/00001.arrow"),
    "drawn": ("manifest.json", "prior.npz", "shards/00001.index.arrow", "shards/00001.arrow"),
}
DAMAGES: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "missing": (lambda data: None, "is missing"),
    "empty": (lambda data: b"", "is empty|is not JSON"),
    "truncated": (lambda data: data[:-1], "is truncated|is not JSON|not written as"),
    "half": (lambda data: data[: len(data) // 2], "is truncated|is not JSON"),
    "longer": (lambda data: data + b"\n", "is too long|not written as"),
    "flipped": (lambda data: flip(data, len(data) // 2, 0x10), "has been altered|is not JSON|own checksum"),
    "foreign": (lambda data: b"PAR1" + bytes(len(data) - 4), "has been altered|is not JSON"),
}


def read_everything(directory: Path) -> None:
    """As a run does: nothing is asked to be checked."""
    store = TargetStore.open(directory)
    for record in store.record_ids:
        store.read([record])


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named(name: str, file: str, damage: str, tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s", CODECS[name])
    store.verify()
    change, what = DAMAGES[damage]
    path = tmp_path / "s" / file
    put(path, change(path.read_bytes()))
    for reading in (lambda: read_everything(tmp_path / "s"), store.verify):
        with pytest.raises(StoreError) as caught:
            reading()
        assert caught.value.code == "store-corrupt"
        assert f"{path} " in caught.value.found
        assert re.search(what, caught.value.found)


def test_a_file_that_is_not_of_the_store_is_named(tmp_path: Path) -> None:
    filled(tmp_path / "s", CODECS["text"])
    for name in ("notes.txt", "shards/00004.arrow", "shards/copy of 00000.arrow", "head.weight.npy", "prior.npz"):
        path = tmp_path / "s" / name
        path.write_bytes(b"x")
        with pytest.raises(StoreError) as caught:
            TargetStore.open(tmp_path / "s")
        assert caught.value.code == "store-corrupt"
        assert f"{path} is not of this store" in caught.value.found
        path.unlink()
    (tmp_path / "s" / ".DS_Store").write_bytes(b"x")
    TargetStore.open(tmp_path / "s")


def test_a_directory_with_something_else_in_it_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="thesis.txt"):
        create(tmp_path / "s", TextCodec())


def test_shards_without_their_manifest_are_not_overwritten(tmp_path: Path) -> None:
    filled(tmp_path / "s", CODECS["text"])
    (tmp_path / "s" / "manifest.json").unlink()
    before = contents(tmp_path / "s")
    with pytest.raises(StoreError, match=re.escape("manifest.json is missing")):
        create(tmp_path / "s", TextCodec())
    assert contents(tmp_path / "s") == before


def test_the_manifest_of_another_store_does_not_serve(tmp_path: Path) -> None:
    filled(tmp_path / "a", CODECS["top_k"])
    store = create(tmp_path / "b", CODECS["top_k"])
    for part in (5, 1, 4):
        store.append_shard(records(CODECS["top_k"], 30, seed=7)[len(store) : len(store) + part])
    put(tmp_path / "a" / "manifest.json", (tmp_path / "b" / "manifest.json").read_bytes())
    with pytest.raises(StoreError, match=re.escape("00000.")):
        TargetStore.open(tmp_path / "a")


def test_shards_of_another_store_do_not_serve(tmp_path: Path) -> None:
    """Of the same size, with an index of their own that fits them: the manifest knows them apart."""
    for name, seed in (("a", 1), ("b", 2)):
        create(tmp_path / name, TopKCodec(k=K)).append_shard(records_alike(4, seed))
    for file in ("00000.arrow", "00000.index.arrow"):
        put(tmp_path / "a" / "shards" / file, (tmp_path / "b" / "shards" / file).read_bytes())
        with pytest.raises(StoreError, match=re.escape(f"{file} has been altered")):
            read_everything(tmp_path / "a")
        TargetStore.open(tmp_path / "b").verify()
        if file == "00000.arrow":
            put(tmp_path / "a" / "shards" / file, None)
            create(tmp_path / "c", TopKCodec(k=K)).append_shard(records_alike(4, 1))
            put(tmp_path / "a" / "shards" / file, (tmp_path / "c" / "shards" / file).read_bytes())


def records_alike(count: int, seed: int) -> list[StoredRecord]:
    """Records that take the same number of bytes whatever the seed."""
    rng = numpy.random.default_rng(seed)
    made = [TokenSequence(ids=tuple(rng.integers(0, SIZE, 9).tolist()), answer_spans=((4, 9),)) for _ in range(count)]
    return [StoredRecord(sequence=of, targets=targets(CODECS["top_k"], of, rng)) for of in made]


def test_two_shards_exchanged_are_found(tmp_path: Path) -> None:
    filled(tmp_path / "s", CODECS["top_k"], shards=(4, 4))
    for kind in ("arrow", "index.arrow"):
        one, other = (tmp_path / "s" / "shards" / f"0000{i}.{kind}" for i in (0, 1))
        first, second = one.read_bytes(), other.read_bytes()
        put(one, second)
        put(other, first)
        with pytest.raises(StoreError, match=re.escape(f"00000.{kind}")):
            read_everything(tmp_path / "s")
        put(one, first)
        put(other, second)


def test_a_manifest_of_a_later_schema_is_named_as_such(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s", CODECS["text"])
    path = tmp_path / "s" / "manifest.json"
    put(path, path.read_bytes().replace(b'"schema": 2', b'"schema": 3'))
    with pytest.raises(StoreError, match="schema 3"):
        TargetStore.open(store.directory)


def test_a_manifest_edited_by_hand_does_not_match_its_own_checksum(tmp_path: Path) -> None:
    filled(tmp_path / "s", CODECS["text"])
    path = tmp_path / "s" / "manifest.json"
    put(path, path.read_bytes().replace(b'"target_temperature": 1.0', b'"target_temperature": 2.0'))
    with pytest.raises(StoreError, match=re.escape("manifest.json does not match its own checksum")):
        TargetStore.open(tmp_path / "s")


def test_every_single_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    filled(tmp_path / "s", CODECS["hidden bfloat16"], shards=(2,))
    data = (tmp_path / "s" / "manifest.json").read_bytes()
    manifest_from_bytes(data)
    for at in range(len(data)):
        for mask in (0x01, 0x20, 0x80):
            with pytest.raises(ValueError):
                manifest_from_bytes(flip(data, at, mask))


def mutate(directory: Path, whole: dict[str, bytes], rng: numpy.random.Generator) -> str:
    """One random change to one file of the store; returns the file's name."""
    name = str(rng.choice(sorted(whole)))
    data = whole[name]
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 9))
    match int(rng.integers(7)):
        case 0 | 1:
            changed: bytes | None = flip(data, at, 1 << int(rng.integers(8)))
        case 2:
            changed = data[:at] + rng.bytes(length) + data[at + length :]
        case 3:
            changed = data[:at]
        case 4:
            changed = data[:at] + data[at + length :]
        case 5:
            changed = data[:at] + rng.bytes(length) + data[at:]
        case _:
            changed = None
    if changed == data:  # random bytes may be those that were there
        changed = flip(data, at, 1)
    put(directory / name, changed)
    return name


def _mutations(directory: Path, codec: Codec, count: int, block_bytes: int) -> None:
    """Every mutation is found by reading the records one by one, and named; and what is read before it is found is as it was written."""
    with pytest.MonkeyPatch.context() as patch:
        # Blocks of which these small files have many.
        for module in (checked, shards_module):
            patch.setattr(module, "BLOCK_BYTES", block_bytes)
        store, made = filled(directory, codec, shards=(3, 2))
        whole = contents(directory)
        rng = numpy.random.default_rng(20)
        for _ in range(count):
            name = mutate(directory, whole, rng)
            with pytest.raises(StoreError) as caught:
                _read_then_verify(directory, made)
            assert caught.value.code == "store-corrupt"
            assert f"{directory / name} " in caught.value.found
            put(directory / name, whole[name])
        assert_holds(TargetStore.open(directory), made)


def _read_then_verify(directory: Path, made: Sequence[StoredRecord]) -> None:
    opened = TargetStore.open(directory)
    for record in made:
        assert_holds(opened, [record])
    # A byte of padding in a block without any number is used by nobody.
    opened.verify()


@pytest.mark.parametrize("name", ["hidden bfloat16", "drawn"])
@pytest.mark.parametrize("block_bytes", [128, 1 << 20])
def test_random_damage_is_always_found_and_named(name: str, block_bytes: int, tmp_path: Path) -> None:
    _mutations(tmp_path / "s", CODECS[name], 150, block_bytes)


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("block_bytes", [128, 1 << 20])
def test_much_random_damage_is_always_found_and_named(name: str, block_bytes: int, tmp_path: Path) -> None:
    _mutations(tmp_path / "s", CODECS[name], 1_000, block_bytes)


def test_no_damage_of_a_real_block_is_missed_without_asking_for_it(tmp_path: Path) -> None:
    """With blocks as they are, every byte of a shard lies in one that reading all records checks."""
    filled(tmp_path / "s", CODECS["drawn"], shards=(3,))
    path = tmp_path / "s" / "shards" / "00000.arrow"
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        put(path, flip(data, at, 1))
        with pytest.raises(StoreError, match=re.escape("00000.arrow has been altered")):
            read_everything(tmp_path / "s")


# -- death and a full disk ----------------------------------------------------------------------------------------------------


def capture(directory: Path, name: str = "hidden bfloat16") -> None:
    """What a capture does, made to go on wherever it is started again: three shards of what is missing, then the codec's error."""
    store = create(directory, CODECS[name])
    made = records(CODECS[name], 10)
    for start, stop in ((0, 4), (4, 7), (7, 10)):
        store.append_shard(made[start:stop])
    if store.codec_error is None:
        store.record_codec_error(CodecError(mean_kl_nats=0.25, max_kl_nats=0.5, rows=3))


# Three points for each file that is written: three shards of two files and the manifest that names them; the first manifest, and the error's.
_POINTS = 3 * (3 * 3 + 2)
POINTS = {"hidden bfloat16": _POINTS + 3 * 2, "drawn": _POINTS + 3 * 1}  # a head's two arrays; a prior

CHILD = """
import os, sys
from pathlib import Path
from stillroom.core import durable
from unit import test_store
points = iter(range(1, 1_000_000))
durable.write_point = lambda: next(points) == int(sys.argv[2]) and os._exit(9)
test_store.capture(Path(sys.argv[1]), sys.argv[3])
"""


@pytest.mark.parametrize("name", POINTS)
def test_a_death_at_any_write_point_loses_and_repeats_nothing(name: str, tmp_path: Path) -> None:
    assert _dies_at(0, tmp_path / "whole", name) == POINTS[name]
    expected = contents(tmp_path / "whole")
    # Every point in this process, where a death is an exception that nothing catches; some of them also as a real exit of a child.
    for fatal in range(1, POINTS[name] + 1):
        assert _dies_at(fatal, tmp_path / f"{fatal}", name) == fatal
        _settled(tmp_path / f"{fatal}", expected, name)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(source.ROOT / folder) for folder in ("src", "tests"))}
    # A first shard's targets, its index, then the manifest: each written but not in its place, or in its place but not named.
    for fatal in range(POINTS[name] - 3 * 10 + 2, POINTS[name] - 3 * 7 + 1, 2):
        directory = tmp_path / f"exit {fatal}"
        done = subprocess.run([sys.executable, "-c", CHILD, str(directory), str(fatal), name], env=environment, check=False)
        assert done.returncode == 9
        _settled(directory, expected, name)


@pytest.mark.parametrize("name", POINTS)
def test_the_shard_of_a_death_before_its_manifest_is_ignored_then_overwritten(name: str, tmp_path: Path) -> None:
    codec = CODECS[name]
    _dies_at(POINTS[name] - 3 * 8 + 1, tmp_path / "s", name)  # after the first shard, before the manifest that names it
    assert (tmp_path / "s" / "shards" / "00000.index.arrow").exists()
    assert (tmp_path / "s" / "prior.npz").exists() == (name == "drawn")
    assert len(TargetStore.open(tmp_path / "s")) == 0
    other = records(codec, 3, seed=77)
    create(tmp_path / "s", codec).append_shard(other)
    create(tmp_path / "t", codec).append_shard(other)
    assert_holds(TargetStore.open(tmp_path / "s"), other)
    assert contents(tmp_path / "s") == contents(tmp_path / "t")


class _Died(BaseException):
    pass


def _dies_at(fatal: int, directory: Path, name: str) -> int:
    """Captures until the write point of that number (0: to the end); returns the number of points passed."""
    passed = 0

    def write_point() -> None:
        nonlocal passed
        passed += 1
        if passed == fatal:
            raise _Died

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(_Died):
        patch.setattr(durable, "write_point", write_point)
        capture(directory, name)
    return passed


def _settled(directory: Path, expected: dict[str, bytes], name: str) -> None:
    if (directory / "manifest.json").exists():
        TargetStore.open(directory).verify()  # whatever was written before is whole
    capture(directory, name)
    left = {name: data for name, data in contents(directory).items() if not Path(name).name.startswith(".")}
    assert left == expected


@pytest.mark.parametrize("name", ["top_k", "drawn"])
@pytest.mark.parametrize("shards", [(), (5, 1, 4)])
def test_a_full_disk_leaves_the_store_as_it_was(name: str, shards: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, made = filled(tmp_path / "s", CODECS[name], shards)
    more = records(CODECS[name], 30, seed=8)
    before, write = contents(tmp_path / "s"), os.write
    for allowed in range(4 if name == "drawn" and not shards else 3):  # the disk is full at the prior, the targets, the index or the manifest

        def full(descriptor: int, data: bytes, calls: list[int] = [allowed]) -> int:  # noqa: B006 - a counter of its own for each round
            if calls[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            calls[0] -= 1
            return write(descriptor, data)

        monkeypatch.setattr(durable.os, "write", full)
        with pytest.raises(ResourceError) as caught:
            store.append_shard(more)
        assert caught.value.code == "disk-full"
        monkeypatch.undo()
        assert_holds(store, made)
        assert_holds(TargetStore.open(tmp_path / "s"), made)
        assert {name: data for name, data in contents(tmp_path / "s").items() if name in before} == before
    added = [record for record in more if record_id(record.sequence) not in store]
    assert store.append_shard(more) == len(added)
    assert_holds(TargetStore.open(tmp_path / "s"), [*made, *added])


# -- codecs -------------------------------------------------------------------------------------------------------------------


BYTES = {"text": 0, "sampled": 4, "top_k": 8 * K + 4, "hidden bfloat16": 2 * WIDTH, "hidden float32": 4 * WIDTH, "hidden int8": WIDTH + 4}


@EACH
def test_a_codec_is_described_and_has_the_bytes_it_states(name: str, tmp_path: Path) -> None:
    codec = CODECS[name]
    assert codec_from(json.loads(json.dumps(describe(codec)))) == codec
    store, made = filled(tmp_path / "s", codec)
    if isinstance(codec, DrawnCodec):
        assert store.bytes_per_row == store.bytes / store.rows
        return
    record = made[0]
    written = encode(codec, record.targets)
    rows = len(record.sequence.scored_rows)
    assert sum(column.nbytes for column in written.values()) == rows * bytes_per_row(codec)
    assert bytes_per_row(codec) == store.bytes_per_row == BYTES[name]


def test_codecs_refuse_what_they_cannot_write() -> None:
    record = next(r for r in records(CODECS["top_k"], 20) if r.sequence.scored_rows)
    assert isinstance(record.targets, TopKTargets)
    with pytest.raises(ValueError, match="shape"):
        encode(TopKCodec(k=K + 1), record.targets)
    with pytest.raises(ValueError, match="cannot be written"):
        encode(TextCodec(), record.targets)
    with pytest.raises(ValueError, match="twice"):
        encode(TopKCodec(k=K), replace(record.targets, ids_RK=numpy.zeros_like(record.targets.ids_RK)))
    for description in (
        {"kind": "zip"},
        {"kind": "top_k"},
        {"kind": "hidden", "width": 3, "state_dtype": "int4"},
        {"kind": "drawn", "draws": 256},
        {},
    ):
        with pytest.raises(ValueError):
            codec_from(description)


def test_a_store_of_drawn_targets_refuses_what_are_none(tmp_path: Path) -> None:
    of = TokenSequence(ids=(1, 2, 3), answer_spans=((1, 3),))
    good = drawn(numpy.eye(2, SIZE, dtype=int) * (DRAWS - 2) + numpy.eye(2, SIZE, 1, dtype=int) * 2, numpy.random.default_rng(0))
    assert good.ids_U.tolist() == [0, 1, 1, 2]
    wrong = {
        "draws": replace(good, draws=DRAWS + 1),
        "another kind": targets(CODECS["sampled"], of, numpy.random.default_rng(0)),
        "sum to": replace(good, counts_U=good.counts_U + 1),
        "from 1 on": replace(good, counts_U=numpy.array([DRAWS, 0, 5, 2], dtype=numpy.int32)),
        "ascending": replace(good, ids_U=good.ids_U[::-1].copy()),
        f"among {SIZE}": replace(good, ids_U=numpy.array([0, 1, 1, SIZE], dtype=numpy.int32)),
        "offsets": replace(good, offsets_R1=numpy.array([0, 2, 3])),
        "entropy": replace(good, entropy_R=numpy.array([0.5, math.log(SIZE) + 0.1], dtype=numpy.float32)),
    }
    for what, targets_of in wrong.items():
        store = create(tmp_path / what, CODECS["drawn"])
        with pytest.raises(ValueError, match="draw"):
            store.append_shard([StoredRecord(sequence=of, targets=targets_of)])
        assert len(TargetStore.open(tmp_path / what)) == 0
        assert store.append_shard([StoredRecord(sequence=of, targets=good)]) == 1
        with pytest.raises(ValueError, match="token is not one"):
            store.append_shard([StoredRecord(sequence=replace(of, ids=(1, 2, SIZE)), targets=good)])


def _tie(upper: int) -> float:
    """The float32 half-way between two bfloat16 numbers (or a NaN)."""
    return float(numpy.array([upper << 16 | 0x8000], dtype=numpy.uint32).view(numpy.float32)[0])


@given(st.lists(st.floats(width=32, allow_nan=True) | st.integers(0, 2**16 - 1).map(_tie), max_size=30))
@example([_tie(0x3F80), _tie(0x3F81), _tie(0xBF80), _tie(0x7F7F), _tie(0)])
def test_bfloat16_is_the_nearest_one(values: list[float]) -> None:
    """Against the definition: of the two bfloat16 numbers around a float32 the nearer, and of two equally near the even one."""
    plain = numpy.array(values, dtype=numpy.float32)
    for value, bits, got in zip(plain.tolist(), to_bfloat16(plain).tolist(), from_bfloat16(to_bfloat16(plain)).tolist(), strict=True):
        if math.isnan(value):
            assert math.isnan(got)
            continue
        if math.isinf(value):
            assert got == value
            continue
        toward_zero = int(numpy.float32(value).view(numpy.uint32)) >> 16
        # Past the largest bfloat16 comes 2^128, which is written as infinity.
        distances = {candidate: abs(_exact(candidate) - value) for candidate in (toward_zero, toward_zero + 1)}
        nearest = [candidate for candidate, distance in distances.items() if distance == min(distances.values())]
        assert bits in nearest
        assert len(nearest) == 1 or bits % 2 == 0
        if 2**-126 <= abs(value) < 2**127:
            assert abs(got - value) <= 2**-8 * abs(value)


def _exact(bits: int) -> float:
    sign, exponent, fraction = (-1.0 if bits & 0x8000 else 1.0), (bits >> 7) & 0xFF, bits & 0x7F
    return sign * (fraction * 2.0**-133 if exponent == 0 else (128 + fraction) * 2.0 ** (exponent - 134))


@given(st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4), max_size=6))
@example([[0.0] * 4, [1e-45, -1e-45, 0.0, 0.0], [3.4028234663852886e38, -3.4028234663852886e38, 1.0, 0.0], [127.0, 0.5, 1.5, -63.5]])
def test_int8_is_within_its_bound_and_rounding_again_changes_nothing(values: list[list[float]]) -> None:
    states_RD = numpy.array(values, dtype=numpy.float32).reshape(-1, 4)
    rounded_RD, scales_R = to_int8(states_RD)
    back_RD = from_int8(rounded_RD, scales_R)
    # Exact: whole numbers times scales in float64 are the very float32 numbers that are read.
    assert numpy.array_equal(back_RD, rounded_RD.astype(numpy.float64) * scales_R[:, None].astype(numpy.float64))
    error_RD = numpy.abs(states_RD.astype(numpy.float64) - back_RD)
    assert (error_RD <= (0.5 + 2**-16) * scales_R[:, None].astype(numpy.float64)).all()
    largest_R = numpy.abs(states_RD.astype(numpy.float64)).max(axis=1, initial=0.0)
    assert (scales_R <= numpy.maximum(largest_R / 127 * (1 + 2**-15) * (1 + 2**-23), 2**-100)).all()
    again_RD, again_R = to_int8(back_RD)
    assert numpy.array_equal(again_RD, rounded_RD)
    assert numpy.array_equal(again_R, scales_R)


def test_int8_of_what_is_not_finite_is_nan() -> None:
    for value in (numpy.nan, numpy.inf, -numpy.inf):
        rounded_RD, scales_R = to_int8(numpy.array([[1.0, value], [2.0, 1.0]], dtype=numpy.float32))
        assert numpy.isnan(from_int8(rounded_RD, scales_R)[0]).all()
        assert numpy.isfinite(from_int8(rounded_RD, scales_R)[1]).all()


@given(seed=st.integers(0, 2**32), name=st.sampled_from(["hidden bfloat16", "hidden int8", "hidden float32"]), spread=st.floats(0.01, 30.0))
@settings(max_examples=50)
def test_what_rounding_does_to_a_distribution_stays_within_the_stated_bound(seed: int, name: str, spread: float) -> None:
    """Logits, log-probabilities and divergence, in float64; and the bound is no idle one: some distribution comes within a tenth of it (below)."""
    rng = numpy.random.default_rng(seed)
    head = TeacherHead(weight_VD=rng.normal(size=(SIZE, WIDTH)) * spread, bias_V=HEAD.bias_V, scale=-1.5, softcap=rng.choice([None, 30.0]))
    live = HiddenTargets(vocabulary=VOCABULARY, temperature=0.7, states_RD=rng.normal(size=(5, WIDTH)).astype(numpy.float32), head=head)
    error = measure_error(CODECS[name], live, whole_log_probs_RV(live, SIZE))
    assert error is not None
    assert None not in (error.mean_kl_nats, error.kl_bound_nats, error.max_log_prob_error_nats, error.log_prob_bound_nats)
    assert error.mean_kl_nats <= error.max_kl_nats <= error.kl_bound_nats + 1e-12
    assert error.max_log_prob_error_nats <= error.log_prob_bound_nats + 1e-12
    assert (error.log_prob_bound_nats == 0) == (name == "hidden float32")


def test_the_bound_of_int8_is_nearly_reached() -> None:
    """All states half a step off, in the direction of the weights' signs; two ids with opposite weights, equally probable."""
    off = 64 + 0.5 - 2**-12
    states_RD = numpy.array([[127.0, *[off] * (WIDTH - 1)]], dtype=numpy.float32)
    weight_VD = numpy.array([[0.0, *[0.01] * (WIDTH - 1)], [0.0, *[-0.01] * (WIDTH - 1)]])
    bias_V = -(weight_VD @ states_RD[0])
    live = HiddenTargets(vocabulary=VOCABULARY, temperature=1.0, states_RD=states_RD, head=TeacherHead(weight_VD=weight_VD, bias_V=bias_V))
    error = measure_error(CODECS["hidden int8"], live, whole_log_probs_RV(live, 2))
    assert error is not None
    assert error.max_kl_nats is not None
    assert error.kl_bound_nats is not None
    assert 0.99 * error.kl_bound_nats < error.max_kl_nats <= error.kl_bound_nats


def test_measured_error_of_drawn_targets_is_that_of_their_entropy() -> None:
    rng = numpy.random.default_rng(5)
    log_probs_RV = numpy.log(rng.dirichlet(numpy.ones(SIZE), size=40))
    log_probs_RV[0] = [0.0, *[-math.inf] * (SIZE - 1)]
    entropy_R = -numpy.where(log_probs_RV > -math.inf, numpy.exp(log_probs_RV) * numpy.maximum(log_probs_RV, -1e3), 0.0).sum(axis=1)
    draws = drawn(numpy.tile(numpy.eye(1, SIZE, dtype=int) * DRAWS, (40, 1)), rng)
    error = measure_error(CODECS["drawn"], replace(draws, entropy_R=entropy_R.astype(numpy.float32)), log_probs_RV)
    assert error == CodecError(
        rows=40, max_entropy_error_nats=pytest.approx(numpy.abs(numpy.rint(entropy_R * 512) / 512 - entropy_R).max(), abs=1e-12)
    )
    assert error.max_entropy_error_nats is not None
    assert error.max_entropy_error_nats <= 2**-10
    wrong = measure_error(CODECS["drawn"], replace(draws, entropy_R=(entropy_R * 0.9).astype(numpy.float32)), log_probs_RV)
    assert wrong is not None
    assert wrong.max_entropy_error_nats == pytest.approx(0.1 * entropy_R.max(), abs=2**-9)


def test_measured_error_is_the_divergence_of_what_was_written() -> None:
    rng = numpy.random.default_rng(6)
    states_RD = rng.normal(size=(7, WIDTH)).astype(numpy.float32)
    live = HiddenTargets(vocabulary=VOCABULARY, temperature=2.0, states_RD=states_RD, head=HEAD)
    logits_RV = 0.5 * 4.0 * numpy.tanh((states_RD.astype(float) @ HEAD.weight_VD.astype(float).T + HEAD.bias_V) / 4.0) / 2.0
    log_probs_RV = logits_RV - numpy.log(numpy.exp(logits_RV).sum(1, keepdims=True))
    numpy.testing.assert_allclose(whole_log_probs_RV(live, SIZE), log_probs_RV, rtol=1e-12)
    exact = measure_error(CODECS["hidden float32"], live, log_probs_RV)
    assert exact is not None
    assert exact.max_kl_nats < 1e-12
    rounded = measure_error(CODECS["hidden bfloat16"], live, log_probs_RV)
    assert rounded is not None
    assert 1e-9 < rounded.mean_kl_nats <= rounded.max_kl_nats < 1e-3
    assert rounded.rows == 7
    assert measure_error(TextCodec(), TextTargets(vocabulary=VOCABULARY, token_ids_R=numpy.zeros(7)), log_probs_RV) is None


def test_measured_error_of_top_k_counts_what_was_not_kept() -> None:
    """Decoded, the tail is even: the loss is tail mass x KL(tail || even), and nothing where the tail was even."""
    probabilities = numpy.array([[0.5, 0.25, 0.15, 0.1], [0.4, 0.3, 0.15, 0.15]])
    kept = TopKTargets(
        vocabulary=VOCABULARY,
        temperature=1.0,
        ids_RK=numpy.array([[0, 1], [0, 1]], dtype=numpy.int32),
        log_probs_RK=numpy.log(probabilities[:, :2]),
        tail_log_mass_R=numpy.log(probabilities[:, 2:].sum(1)),
    )
    error = measure_error(TopKCodec(k=2), kept, numpy.log(probabilities))
    assert error is not None
    expected = 0.15 * math.log(0.15 / 0.125) + 0.1 * math.log(0.1 / 0.125)
    assert error.max_kl_nats == pytest.approx(expected, rel=1e-5)
    assert error.mean_kl_nats == pytest.approx(expected / 2, rel=1e-5)
    everything = replace(
        kept,
        ids_RK=numpy.array([[0, 1, 2, 3]] * 2, dtype=numpy.int32),
        log_probs_RK=numpy.log(probabilities),
        tail_log_mass_R=numpy.full(2, -math.inf),
    )
    error = measure_error(TopKCodec(k=4), everything, numpy.log(probabilities))
    assert error is not None
    assert error.max_kl_nats < 1e-7


def test_the_codecs_error_is_kept(tmp_path: Path) -> None:
    store, made = filled(tmp_path / "s", CODECS["top_k"])
    assert store.codec_error is None
    error = CodecError(mean_kl_nats=0.125, max_kl_nats=1.5, rows=12)
    store.record_codec_error(error)
    opened = TargetStore.open(tmp_path / "s", identity(CODECS["top_k"]))
    assert opened.codec_error == error
    assert opened.sha256 == store.sha256
    assert json.loads((tmp_path / "s" / "manifest.json").read_bytes())["codec_error"] == asdict(error)
    assert_holds(opened, made)


# -- from its documentation alone ---------------------------------------------------------------------------------------------


@EACH
def test_a_store_opens_with_pyarrow_from_its_page_alone(name: str, tmp_path: Path) -> None:
    page = (source.ROOT / "docs" / "reference" / "target-store.md").read_text(encoding="utf-8")
    (script,) = [block.text for block in markdown.blocks(page) if block.info == ("python", "read_store.py")]
    assert "stillroom" not in script.replace("stillroom target store", "")
    (tmp_path / "read_store.py").write_text(script, encoding="utf-8")
    store, made = filled(tmp_path / "s", CODECS[name])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "read_store.py", "s"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["id"] for line in lines] == [record_id(record.sequence) for record in made]
    for line, record in zip(lines, made, strict=True):
        assert line["tokens"] == list(record.sequence.ids)
        assert line["predicts"] == [record.sequence.ids[row + 1] for row in record.sequence.scored_rows]
        _, read = store.read([record_id(record.sequence)])
        if isinstance(read, SampledTargets):
            assert line["log_probs"] == read.log_probs_R.tolist()
        if isinstance(read, DrawnTargets):
            rows = [slice_targets(read, row, row + 1) for row in range(row_count(read))]
            assert line["ids"] == [row.ids_U.tolist() for row in rows]
            assert line["counts"] == [row.counts_U.tolist() for row in rows]
            assert line["entropy"] == read.entropy_R.tolist()
        if isinstance(read, TopKTargets):
            assert line["best"] == read.ids_RK[:, 0].tolist()
            assert line["tail"] == pytest.approx(numpy.exp(read.tail_log_mass_R).tolist())
        if isinstance(read, HiddenTargets) and row_count(read):
            assert line["best"] == whole_log_probs_RV(read, SIZE).argmax(axis=1).tolist()


def test_the_page_names_every_field_of_the_manifest(tmp_path: Path) -> None:
    page = (source.ROOT / "docs" / "reference" / "target-store.md").read_text(encoding="utf-8")
    for name in ("hidden bfloat16", "drawn"):
        filled(tmp_path / name, CODECS[name])

    def names(tree: object) -> set[str]:
        if isinstance(tree, dict):
            return set(tree) | {name for value in tree.values() for name in names(value)}
        return {name for value in tree for name in names(value)} if isinstance(tree, list) else set()

    for name in ("hidden bfloat16", "drawn"):
        missing = [field for field in names(json.loads((tmp_path / name / "manifest.json").read_bytes())) if f"`{field}`" not in page]
        assert not missing
    with numpy.load(tmp_path / "drawn" / "prior.npz") as prior:
        assert all(f"| `{field}` |" in page for field in prior.files)


def test_a_moved_store_is_the_same_store(tmp_path: Path) -> None:
    store, made = filled(tmp_path / "s", CODECS["top_k"])
    shutil.move(tmp_path / "s", tmp_path / "t")
    moved = TargetStore.open(tmp_path / "t", store.identity)
    assert moved.sha256 == store.sha256
    assert_holds(moved, made)
