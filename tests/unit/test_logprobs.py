"""Log-probabilities are believed only after checks: what holds equals a local teacher's targets, and every corruption is demoted with its reason."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import tiny_model, tiny_tokenizer
from stillroom.collect.logprobs import Demoted, Expectations, Tally, TokenIndex, Verified, read, tally, top_k_targets, verify, write_shard
from stillroom.collect.reading import read_response
from stillroom.collect.wire import Answer, Call, Endpoint, Response
from stillroom.core.errors import CollectError, StoreError
from stillroom.core.identities import Json, ModelRef, TokenSequence
from stillroom.models.local import LocalTeacher
from stillroom.objectives.tensors import as_arrays
from stillroom.targets.kinds import FullTargets, TargetRequest, TopKTargets
from stillroom.targets.vocabulary import Vocabulary

CALL = Call(endpoint=Endpoint(base_url="http://127.0.0.1:1/v1", model="m"), body={"model": "m"})
WORDS = [b"<end>", b" a", b"b", b" cc", b"\xe2\x82", b"\xac", b"d\n", b" \xc3\xa9", b"same", b"same"]
VOCABULARY = Vocabulary(tokens=tuple(WORDS), special={"<end>": 0}, end_ids=(0,), rows=12)
INDEX = TokenIndex(VOCABULARY)


def entry(index: int, logprob: float, ids: bool) -> Json:
    return {"token": WORDS[index].decode(errors="replace"), "bytes": list(WORDS[index]), "logprob": logprob} | ({"id": index} if ids else {})


def body(chosen: list[int], *, k: int = 4, seed: int = 0, greedy: bool = False, ids: bool = False, ended: bool = True) -> Json:
    """An honest answer: the tokens `chosen` under made-up distributions of which the `k` likeliest are listed."""
    rng = numpy.random.default_rng(seed)
    content = []
    for token in chosen:
        logits = rng.normal(size=9) * 2
        if greedy:
            logits[token] = logits.max() + 0.5
        values = logits - numpy.log(numpy.exp(logits).sum())
        top = sorted(range(9), key=lambda i: -values[i])[:k]
        content.append(entry(token, float(values[token]), ids) | {"top_logprobs": [entry(i, float(values[i]), ids) for i in top]})
    text = b"".join(WORDS[token] for token in chosen if token).decode()
    choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop" if ended else "length", "logprobs": {"content": content}}
    return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": len(chosen)}}


def answered(of: Json) -> Answer:
    (found,) = read_response(CALL, Response(status=200, headers={}, body=json.dumps(of).encode(), seconds=0.0))
    assert isinstance(found, Answer), found
    return found


def verified(of: Json, **more: Any) -> Verified:
    found = verify(answered(of), Expectations(**{"alternatives": 1, "temperature": 1.0} | more))
    assert isinstance(found, Verified), found
    return found


def reason(of: Json, **more: Any) -> str:
    found = verify(answered(of), Expectations(**{"alternatives": 1, "temperature": 1.0} | more))
    assert isinstance(found, Demoted), found
    return found.reason


HONEST = [1, 2, 4, 5, 7, 6, 0]


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("index", [None, INDEX])
def test_an_honest_answer_is_verified(ids: bool, index: TokenIndex | None) -> None:
    found = verified(body(HONEST, ids=ids, k=9), index=index)
    assert found.ended
    assert found.ids_T.tolist() == (HONEST if index or ids else [-1] * 7)
    assert (found.tokens_T is None) == (index is not None)
    if not index:
        assert found.tokens_T == [WORDS[i] for i in HONEST]
    for t in range(len(found)):
        values = found.top_logprobs_N[found.starts_T1[t] : found.starts_T1[t + 1]]
        assert (numpy.diff(values) <= 0).all()


def test_alternatives_that_cannot_be_told_apart_go_to_the_rest() -> None:
    of = body(HONEST, k=9)
    found = verified(of, index=INDEX)
    listed = of["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert found.starts_T1[1] == 8  # "same" is two ids
    known = math.fsum(math.exp(item["logprob"]) for item in listed if item["token"] != "same")
    assert found.rest_log_mass_T[0] == pytest.approx(math.log(1 - known), abs=1e-12)
    whole = verified(body(HONEST, k=9, ids=True), index=INDEX)
    assert whole.starts_T1[1] == 9


def change(path: str, value: Any, **more: Any) -> Json:
    """An honest greedy answer with one thing changed: `path` goes from the choice's entries, or from the body where it begins with a slash."""
    of = body(HONEST, greedy=True, **more)
    node: Any = of if path.startswith("/") else of["choices"][0]["logprobs"]["content"]
    *way, last = [int(part) if part.isdigit() else part for part in path.strip("/").split("/")]
    for part in way:
        node = node[part]
    node[last] = value(node[last]) if callable(value) else value
    return of


def test_each_corruption_has_its_reason() -> None:
    assert isinstance(verify(answered(body(HONEST, greedy=True)), Expectations(alternatives=4, temperature=0.0)), Verified)
    cases: list[tuple[str, Json]] = [
        ("absent", change("/choices/0/logprobs", None)),
        ("unreadable", change("2/logprob", "x")),
        ("count-differs", change("/choices/0/logprobs/content", lambda entries: entries[:2] + entries[3:])),
        ("count-differs", change("/usage/completion_tokens", 14)),
        ("text-differs", change("/choices/0/message/content", "something else")),
        ("text-differs", change("/choices/0/message/content", lambda text: text.rstrip())),
        ("text-differs", change("1/bytes", list(b"x"))),
        ("text-differs", change("2/bytes", None)),
        ("above-zero", change("1/top_logprobs/3/logprob", 0.5)),
        ("mass-above-one", change("1/top_logprobs/3/logprob", lambda _: -0.05)),
        ("duplicate-alternative", change("1/top_logprobs/3/bytes", list(b"b"))),
        ("chosen-inconsistent", change("1/logprob", lambda value: value - 0.1)),
        ("too-few-alternatives", change("1/top_logprobs", lambda top: top[:3])),
        ("too-few-alternatives", change("1/top_logprobs", [])),
    ]
    for expected, of in cases:
        assert reason(of, temperature=0.0, alternatives=4) == expected, of


def test_values_that_are_not_finite() -> None:
    of = json.dumps(body(HONEST)).replace(json.dumps(body(HONEST)["choices"][0]["logprobs"]["content"][0]["logprob"]), "-Infinity")
    assert reason(json.loads(of)) == "not-finite"


def test_a_token_that_is_not_the_greedy_one_and_one_too_likely_for_outside() -> None:
    assert reason(body([1, 2, 3], k=9, ended=False, seed=3), temperature=0.0) == "not-greedy"
    of = body([1, 2, 3], k=2, ended=False, greedy=True)
    first = of["choices"][0]["logprobs"]["content"][0]
    first["top_logprobs"] = [entry(2, first["logprob"] - 3, False), entry(3, first["logprob"] - 4, False)]
    assert reason(of) == "chosen-inconsistent"


def test_mlx_takes_the_first_of_an_unsorted_list_for_the_token() -> None:
    of = body([1, 2, 3], ended=False, greedy=True)
    for item in of["choices"][0]["logprobs"]["content"]:
        item["top_logprobs"].reverse()
        item |= {name: item["top_logprobs"][0][name] for name in ("token", "bytes", "logprob")}
    assert reason(of, temperature=0.0) in ("text-differs", "not-greedy")
    # An unsorted list by itself is no fault.
    of = body([1, 2, 3], ended=False, greedy=True)
    plain = verified(of)
    for item in of["choices"][0]["logprobs"]["content"]:
        item["top_logprobs"].reverse()
    assert verified(of).top_logprobs_N.tolist() == plain.top_logprobs_N.tolist()


def test_ids_are_held_against_the_bytes_and_the_vocabulary() -> None:
    assert reason(change("1/id", 3, ids=True), index=INDEX) == "id-differs"
    assert reason(change("1/top_logprobs/1/id", lambda i: (i + 1) % 8 or 1, ids=True), index=INDEX) in ("id-differs", "duplicate-alternative")
    assert reason(change("1/top_logprobs/1/id", 400, ids=True), index=INDEX) == "id-differs"
    assert reason(body([1, 8, 1], ended=False), index=INDEX) == "token-unknown"
    assert verified(body([1, 8, 1], ended=False, ids=True), index=INDEX).ids_T.tolist() == [1, 8, 1]
    # A special token is written as nothing by llama.cpp.
    of = body(HONEST, ids=True)
    of["choices"][0]["logprobs"]["content"][-1] |= {"token": "", "bytes": []}
    assert verified(of, index=INDEX).ended


def test_an_end_token_may_be_counted_and_not_listed_but_no_other() -> None:
    of = body(HONEST[:-1])
    of["usage"]["completion_tokens"] = 7
    assert not verified(of).ended
    of["choices"][0]["finish_reason"] = "length"
    assert reason(of) == "count-differs"


def test_stop_strings() -> None:
    of = body([1, 2, 6, 3], ended=True)
    of["choices"][0]["message"]["content"] = " ab"
    assert verified(of, stop=("d",)).tokens_T == [b" a", b"b"]
    of["choices"][0]["message"]["content"] = " abd"
    assert reason(of, stop=("\n",)) == "stop-inside-token"
    assert reason(of) == "text-differs"
    # The last token is all that the text lacks: at a stop string it is no end token.
    of = body([1, 2, 6])
    of["choices"][0]["message"]["content"] = " ab"
    assert len(verified(of, stop=("d\n",))) == 2
    assert verified(of).ended
    assert reason(of, index=INDEX, stop=("x",)) == "text-differs"  # the tokenizer knows that it is none


def test_a_leading_space_and_a_character_that_is_cut() -> None:
    of = body([1, 2], ended=False)
    of["choices"][0]["message"]["content"] = "ab"
    assert len(verified(of)) == 2
    of["choices"][0]["message"]["content"] = "b"
    assert reason(of) == "text-differs"
    of = body([1, 2], ended=False)
    content = of["choices"][0]["logprobs"]["content"]
    content.append(entry(4, content[0]["top_logprobs"][0]["logprob"], False) | {"top_logprobs": content[0]["top_logprobs"]})
    content[-1] = content[-1] | {"top_logprobs": [item for item in content[0]["top_logprobs"] if item["bytes"] != [0xE2, 0x82]]}
    of["choices"][0]["message"]["content"] = " ab\ufffd"
    of["usage"]["completion_tokens"] = 3
    assert reason(of) in ("chosen-inconsistent", "mass-above-one")  # the text holds; the made-up value does not
    content[-1]["logprob"] = -40.0
    assert verified(of).tokens_T == [b" a", b"b", b"\xe2\x82"]


def test_reasoning_among_the_entries_or_apart_from_them() -> None:
    of = body([1, 2, 3, 7, 2, 0])
    of["choices"][0]["message"] = {"content": "éb", "reasoning_content": "ab"}
    of["usage"]["completion_tokens_details"] = {"reasoning_tokens": 3}
    found = verified(of)
    assert (found.skipped, found.ended, found.tokens_T) == (3, True, [b" \xc3\xa9", b"b", b"<end>"])
    found = verified(of, index=INDEX)
    assert (found.skipped, found.ended, found.ids_T.tolist()) == (3, True, [7, 2, 0])
    apart = body([7, 2, 0])
    apart["choices"][0]["message"] = {"content": "éb", "reasoning_content": " ab"}
    apart["choices"][0]["logprobs"]["reasoning_content"] = body([1, 2], ended=False)["choices"][0]["logprobs"]["content"]
    apart["usage"]["completion_tokens"] = 5
    assert verified(apart).skipped == 0
    apart["usage"]["completion_tokens"] = 6
    assert reason(apart) == "count-differs"


def test_the_rates_are_counted_by_reason() -> None:
    results = [verified(body(HONEST)), Demoted(reason="absent"), Demoted(reason="absent"), Demoted(reason="not-greedy")]
    assert tally(results) == Tally(verified=1, demoted={"absent": 2, "not-greedy": 1})
    assert tally(results).rate == 0.25
    assert tally([]).rate is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.data())
def test_any_single_change_of_a_token_or_value_is_noticed_or_harmless(chosen: list[int], data: st.DataObject) -> None:
    of = body(chosen, k=9, ids=True, ended=False, seed=data.draw(st.integers(0, 50)))
    honest = verified(of, index=INDEX, alternatives=9)
    changed = copy.deepcopy(of)
    item = data.draw(st.sampled_from(changed["choices"][0]["logprobs"]["content"]))
    place = data.draw(st.sampled_from([item, *item["top_logprobs"]]))
    name = data.draw(st.sampled_from(["id", "logprob"]))
    place[name] = data.draw(st.integers(0, 8)) if name == "id" else data.draw(st.floats(-20, 1))
    found = verify(answered(changed), Expectations(alternatives=9, temperature=1.0, index=INDEX))
    if isinstance(found, Demoted):
        return
    # Not noticed: then no id has changed, and no mass by more than what a list must leave to be believed.
    assert found.top_ids_N.tolist() == honest.top_ids_N.tolist() or name == "logprob"
    assert numpy.exp(found.top_logprobs_N).sum() <= (1 + 1e-3) * len(found)


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher() -> LocalTeacher:
    ref = ModelRef(source="here", kind="directory", revision=None, weights_sha256="0" * 64, architecture="x", parameters=1, licence=None)
    return LocalTeacher(tiny_model("llama", rows=251, spread=0.6, seed=5), ref, Vocabulary.from_tokenizer(tiny_tokenizer(size=220), 251))


def served(teacher: LocalTeacher, sequence: TokenSequence, listed: int, temperature: float) -> Json:
    """What an honest endpoint of that teacher would say of the answer in `sequence`, with ids."""
    full = teacher.targets([sequence], TargetRequest(kind="full", temperature=temperature))
    assert isinstance(full, FullTargets)
    tokens = teacher.vocabulary.tokens
    content = []
    for row, position in enumerate(sequence.scored_rows):
        values = full.log_probs_RV[row]
        top = torch.topk(values, listed)

        def one(index: int, values: Any = values) -> Json:
            return {"id": index, "token": tokens[index].decode(errors="replace"), "bytes": list(tokens[index]), "logprob": float(values[index])}

        content.append(one(sequence.ids[position + 1]) | {"top_logprobs": [one(int(i)) for i in top.indices]})
    text = b"".join(tokens[i] for i in sequence.ids[1:]).decode(errors="replace")
    choice = {"index": 0, "message": {"content": text}, "finish_reason": "length", "logprobs": {"content": content}}
    return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": len(content)}}


@pytest.mark.parametrize(("listed", "k", "temperature"), [(20, 20, 1.0), (20, 8, 1.0), (20, 8, 0.7), (220, 220, 1.0), (220, 50, 1.0), (5, 1, 1.0)])
def test_verified_top_k_equals_a_local_teachers(teacher: LocalTeacher, listed: int, k: int, temperature: float) -> None:
    rng = numpy.random.default_rng(listed)
    ordinary = [i for i in range(teacher.vocabulary.size) if i not in teacher.vocabulary.special_ids and teacher.vocabulary.tokens[i].isascii()]
    sequence = TokenSequence(ids=tuple(int(i) for i in rng.choice(ordinary, 17)), answer_spans=((1, 17),))
    index = TokenIndex(teacher.vocabulary)
    expected = Expectations(alternatives=k, temperature=temperature, index=index, reported="after" if temperature != 1 else "before")
    found = verify(answered(served(teacher, sequence, listed, temperature)), expected)
    assert isinstance(found, Verified), found
    mine = top_k_targets(found, teacher.vocabulary, k, temperature)
    theirs = as_arrays(teacher.targets([sequence], TargetRequest(kind="top_k", temperature=temperature, k=k)))
    assert isinstance(theirs, TopKTargets)
    assert (mine.vocabulary, mine.temperature) == (theirs.vocabulary, theirs.temperature)
    numpy.testing.assert_array_equal(numpy.sort(mine.ids_RK), numpy.sort(theirs.ids_RK))
    numpy.testing.assert_allclose(mine.log_probs_RK, theirs.log_probs_RK, atol=1e-6)
    numpy.testing.assert_allclose(numpy.exp(mine.tail_log_mass_R), numpy.exp(theirs.tail_log_mass_R), atol=2e-6)
    if k == 220:
        assert (mine.tail_log_mass_R == -math.inf).all()
    totals = numpy.exp(mine.log_probs_RK).sum(1) + numpy.exp(mine.tail_log_mass_R)
    numpy.testing.assert_allclose(totals, 1, atol=1e-5)


def test_what_cannot_be_made_is_refused() -> None:
    found = verified(body(HONEST, ids=True), index=INDEX)
    for arguments in [(5, 1.0), (2, 0.7)]:
        with pytest.raises(CollectError) as error:
            top_k_targets(found, VOCABULARY, *arguments)
        assert error.value.code == "targets-unsupported"
    with pytest.raises(CollectError, match="ids are not known"):
        top_k_targets(verified(body(HONEST)), VOCABULARY, 2, 1.0)
    assert top_k_targets(found, VOCABULARY, 4, 1.0).ids_RK.shape == (7, 4)


# -- on disk -----------------------------------------------------------------------------------------------------------


def made(count: int, tokens: int, k: int, seed: int = 0) -> list[tuple[str, Verified]]:
    rng = numpy.random.default_rng(seed)
    items = []
    for number in range(count):
        ids = rng.zipf(1.2, (tokens, k)).astype(numpy.int64) % 150_000
        values = numpy.sort(rng.normal(-6, 3, (tokens, k)))[:, ::-1]
        values = values - numpy.log(numpy.exp(values).sum(1, keepdims=True)) - rng.exponential(0.05, (tokens, 1))
        items.append(
            (
                f"{number:064x}",
                Verified(
                    ids_T=ids[:, 0].astype(numpy.int32),
                    logprobs_T=values[:, 0],
                    top_ids_N=ids.ravel().astype(numpy.int32),
                    top_logprobs_N=values.ravel(),
                    starts_T1=numpy.arange(tokens + 1) * k,
                    rest_log_mass_T=numpy.log(1 - numpy.exp(values).sum(1)),
                    temperature=1.0,
                    ended=True,
                ),
            )
        )
    return items


def test_a_shard_gives_back_what_was_written_within_the_bound_of_float16(tmp_path: Path) -> None:
    items = [*made(130, 12, 5), ("bytes", verified(body(HONEST))), ("empty", made(1, 0, 5)[0][1])]
    write_shard(tmp_path / "a.parquet", items)
    for places in (None, [131, 0, 64, 130, 64], []):
        wanted = items if places is None else [items[place] for place in places]
        back = read(tmp_path / "a.parquet", places)
        assert [key for key, _ in back] == [key for key, _ in wanted]
        for (_, one), (_, other) in zip(wanted, back, strict=True):
            for name in ("ids_T", "top_ids_N", "starts_T1"):
                numpy.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            for name in ("logprobs_T", "top_logprobs_N"):
                mine, theirs = getattr(one, name), getattr(other, name)
                assert (numpy.abs(mine - theirs) <= 2.0**-11 * numpy.abs(mine) + 2.0**-25).all()
            numpy.testing.assert_allclose(one.rest_log_mass_T, other.rest_log_mass_T, rtol=1e-6)
            assert (one.temperature, one.ended, one.tokens_T, one.top_tokens_N) == (
                other.temperature,
                other.ended,
                other.tokens_T,
                other.top_tokens_N,
            )


def test_values_below_float16_are_kept_finite(tmp_path: Path) -> None:
    (key, one), *_ = made(1, 2, 3)
    one.top_logprobs_N[-1] = -3e38
    write_shard(tmp_path / "a.parquet", [(key, one)])
    assert read(tmp_path / "a.parquet")[0][1].top_logprobs_N[-1] == -65504


def test_an_answer_of_256_tokens_with_20_alternatives_takes_at_most_16_kib(tmp_path: Path) -> None:
    rng = numpy.random.default_rng(1)
    items = made(64, 256, 20)
    for _, one in items:  # the worst case: ids without any regularity
        one.top_ids_N[:] = rng.integers(0, 150_000, one.top_ids_N.shape)
    write_shard(tmp_path / "a.parquet", items)
    assert (tmp_path / "a.parquet").stat().st_size / 64 <= 20 * 1024
    write_shard(tmp_path / "b.parquet", made(64, 256, 20))
    assert (tmp_path / "b.parquet").stat().st_size / 64 <= 17 * 1024


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_corrupt_byte_is_found_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = folder / "whole.parquet"
    if not whole.exists():
        write_shard(whole, [*made(3, 4, 3), ("bytes", verified(body(HONEST)))])
    raw = bytearray(whole.read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    (folder / "bad.parquet").write_bytes(bytes(raw))
    try:
        found = read(folder / "bad.parquet")
    except StoreError:
        return
    for (key, one), (other_key, other) in zip(read(whole), found, strict=True):
        assert key == other_key
        assert one.top_ids_N.tobytes() == other.top_ids_N.tobytes()
        assert one.top_logprobs_N.tobytes() == other.top_logprobs_N.tobytes()
        assert (one.tokens_T, one.ended, one.temperature) == (other.tokens_T, other.ended, other.temperature)


@pytest.mark.parametrize("raw", [b"", b"PAR1", b"not parquet at all"])
def test_what_is_no_shard_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(raw)
    with pytest.raises(StoreError, match="logprobs-corrupt"):
        read(tmp_path / "a.parquet")
    with pytest.raises(StoreError, match="logprobs-corrupt"):
        read(tmp_path / "missing.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(StoreError, match="other columns"):
        read(tmp_path / "other.parquet")
    write_shard(tmp_path / "b.parquet", made(2, 2, 2))
    with pytest.raises(StoreError, match="logprobs-corrupt"):
        read(tmp_path / "b.parquet", [5])
