"""The transfer set: everything is accounted for, it is known by its hash, and it is backed by the ledger and the store."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom.core import durable
from stillroom.core.errors import DataError, LedgerError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import ModelRef, Sampling
from stillroom.data import DROP_REASONS, Candidate, Record, TransferSet, curate, freeze
from stillroom.data.transfer_set import DropReason
from stillroom.ledger import Circumstances, Collected, Ledger, PromptSource

CIRCUMSTANCES = Circumstances(
    teacher=ModelRef(source="t", kind="hub", revision=None, weights_sha256=None, architecture="a", parameters=1, licence=None),
    sampling=Sampling(max_new_tokens=1),
    prompt_source=PromptSource(name="p", sha256=None),
    signal="text",
    terms=(),
    decision="e" * 64,
)


def ident(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def candidate(number: int, *, tokens: int = 10, answer: str = "yes", finished: bool = True) -> Candidate:
    return Candidate(id=ident(number), prompt_id=ident(1000 + number), tokens=tokens, answer=answer, finished=finished)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger.open(tmp_path)
    ledger.append(
        Collected(record_id=ident(n), prompt="p", output="o", prompt_tokens=1, output_tokens=1, circumstances=CIRCUMSTANCES) for n in range(5)
    )
    return ledger


@pytest.fixture
def frozen(ledger: Ledger) -> TransferSet:
    return freeze(curate([candidate(0), candidate(1), candidate(2, answer=" "), candidate(3)], max_tokens=64), ledger, decision="e" * 64)


def test_each_candidate_that_teaches_nothing_is_dropped_with_its_reason() -> None:
    found = curate(
        [
            candidate(0),
            candidate(1, tokens=65),
            candidate(2, tokens=64),
            candidate(3, finished=False),
            candidate(4, answer=" \n"),
            candidate(0),
            candidate(5, tokens=65, finished=False, answer=""),
            candidate(6, finished=False, answer=""),
            candidate(6, finished=False, answer=""),
        ],
        max_tokens=64,
    )
    assert [kept.id for kept in found.kept] == [ident(0), ident(2)]
    reasons = [(dropped.id, reason) for dropped, reason in found.dropped]
    assert reasons == [
        (ident(1), "too-long"),
        (ident(3), "truncated"),
        (ident(4), "empty-answer"),
        (ident(0), "duplicate"),
        (ident(5), "too-long"),
        (ident(6), "truncated"),
        (ident(6), "truncated"),
    ]
    assert {reason for _, reason in reasons} <= set(DROP_REASONS)


@pytest.mark.parametrize("reason", DROP_REASONS)
def test_what_a_curation_step_left_out_is_left_out_for_its_reason_and_counted_so(reason: DropReason, ledger: Ledger, tmp_path: Path) -> None:
    left_out = replace(candidate(1, tokens=65, finished=False), left_out=reason)
    found = freeze(curate([candidate(0), left_out], max_tokens=64), ledger, decision="e" * 64)
    found.save(tmp_path / "transfer_set.json")
    assert TransferSet.load(tmp_path / "transfer_set.json").dropped == {reason: 1}


@given(st.lists(st.builds(candidate, st.integers(0, 5), tokens=st.integers(1, 9), answer=st.sampled_from(["", "a"]), finished=st.booleans())))
def test_nobody_is_lost(candidates: list[Candidate]) -> None:
    found = curate(candidates, max_tokens=6)
    assert sorted([*found.kept, *(dropped for dropped, _ in found.dropped)], key=repr) == sorted(candidates, key=repr)
    assert len({kept.id for kept in found.kept}) == len(found.kept)
    assert curate(found.kept, max_tokens=6).kept == found.kept


def test_a_set_says_what_was_asked_and_what_became_of_it(frozen: TransferSet, ledger: Ledger) -> None:
    assert (frozen.requested, frozen.accepted, frozen.dropped) == (4, 3, {"empty-answer": 1})
    assert frozen.ids == (ident(0), ident(1), ident(3))
    assert [record.ledger for record in frozen.records] == [ledger.hash_of(i, "collect") for i in frozen.ids]
    assert frozen.records[2].prompt_id == ident(1003)


def test_it_comes_back_and_its_hash_can_be_computed_by_anyone(frozen: TransferSet, tmp_path: Path) -> None:
    path = tmp_path / "transfer_set.json"
    frozen.save(path)
    assert TransferSet.load(path) == frozen
    tree = json.loads(path.read_text())
    assert tree.pop("sha256") == frozen.sha256 == sha256_hex(canonical_json(tree))
    assert (tree["requested"], tree["accepted"], tree["dropped"], tree["version"]) == (4, 3, {"empty-answer": 1}, 1)


def test_a_set_is_known_by_its_order_too(ledger: Ledger) -> None:
    one = freeze(curate([candidate(0), candidate(1)], max_tokens=64), ledger, decision="e" * 64)
    other = freeze(curate([candidate(1), candidate(0)], max_tokens=64), ledger, decision="e" * 64)
    assert one.sha256 != other.sha256
    assert one.sha256 != freeze(curate([candidate(0), candidate(1)], max_tokens=64), ledger, decision="f" * 64).sha256


def test_an_empty_set_is_refused_and_says_why(ledger: Ledger) -> None:
    with pytest.raises(DataError, match="2 because the answer was cut off at max_new_tokens") as raised:
        freeze(curate([candidate(0, finished=False), candidate(1, finished=False)], max_tokens=64), ledger, decision="e" * 64)
    assert raised.value.code == "transfer-set-empty"


def test_a_record_without_a_ledger_entry_is_refused(ledger: Ledger) -> None:
    with pytest.raises(LedgerError) as raised:
        freeze(curate([candidate(0), candidate(9)], max_tokens=64), ledger, decision="e" * 64)
    assert raised.value.code == "ledger-unknown-record"


WHOLE = TransferSet(
    requested=3,
    dropped={"duplicate": 1},
    decision="e" * 64,
    records=tuple(Record(id=ident(n), prompt_id=ident(n + 10), ledger=ident(n + 20)) for n in range(2)),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0), put=st.sampled_from('0aZ"{}[], \n'))
def test_any_changed_character_is_found(tmp_path: Path, place: int, put: str) -> None:
    path = tmp_path / "transfer_set.json"
    WHOLE.save(path)
    original = path.read_text()
    place %= len(original)
    path.write_text(original[:place] + put + original[place + 1 :])
    if json.loads(original) == _parsed(path):
        assert TransferSet.load(path) == WHOLE  # white space between tokens is nobody's content
        return
    with pytest.raises(DataError) as raised:
        TransferSet.load(path)
    assert raised.value.code == "transfer-set-corrupt"


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def change(path: Path, **fields: Any) -> None:
    """Changes fields and makes the hash fit again."""
    body = {name: value for name, value in durable.read_json(path).items() if name != "sha256"} | fields
    durable.write_json_atomic(path, body | {"sha256": sha256_hex(canonical_json(body))})


@pytest.mark.parametrize(
    "fields",
    [
        {"requested": 7},
        {"accepted": 2},
        {"dropped": {}},
        {"dropped": {"empty-answer": -1, "duplicate": 2}},
        {"dropped": []},
        {"requested": "4"},
        {"decision": None},
        {"version": 2},
        {"records": None},
        {"records": [1, 2, 3]},
        {"records": [{"id": 1, "prompt_id": "", "ledger": ""}] * 3},
    ],
)
def test_a_set_that_contradicts_itself_is_refused_though_its_hash_fits(frozen: TransferSet, tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "transfer_set.json"
    frozen.save(path)
    change(path, **fields)
    with pytest.raises(DataError) as raised:
        TransferSet.load(path)
    assert raised.value.code == "transfer-set-corrupt"


def test_a_record_twice_is_refused(frozen: TransferSet, tmp_path: Path) -> None:
    path = tmp_path / "transfer_set.json"
    frozen.save(path)
    records = durable.read_json(path)["records"]
    change(path, records=[*records[:2], records[0]])
    with pytest.raises(DataError, match="twice"):
        TransferSet.load(path)


@pytest.mark.parametrize(
    "content", [None, "", "[]", "null", "[1", '{"version": 1}', '{"version": 1, "sha256": "x", "requested": 99999999999999999999}']
)
def test_a_file_that_is_no_set_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "transfer_set.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"transfer_set\.json") as raised:
        TransferSet.load(path)
    assert raised.value.code == "transfer-set-corrupt"


def test_it_is_backed_by_the_ledger_and_the_store(frozen: TransferSet, ledger: Ledger, tmp_path: Path) -> None:
    frozen.require_backed(ledger, set(frozen.ids))
    with pytest.raises(DataError, match="not in the target store"):
        frozen.require_backed(ledger, set(frozen.ids[1:]))
    (tmp_path / "other").mkdir()
    other = Ledger.open(tmp_path / "other")
    with pytest.raises(DataError, match=frozen.ids[0]):
        frozen.require_backed(other, set(frozen.ids))
    other.append(Collected(record_id=i, prompt="p", output="o", prompt_tokens=1, output_tokens=1, circumstances=CIRCUMSTANCES) for i in frozen.ids)
    with pytest.raises(DataError, match="names the ledger entry"):
        frozen.require_backed(other, set(frozen.ids))
