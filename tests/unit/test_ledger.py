"""The ledger: what is written is what the schema says, every alteration is found and named, nothing is written twice, and it survives its writer."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import random
import stat
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom.core import durable
from stillroom.core.errors import LedgerError, ResourceError
from stillroom.core.identities import ModelRef, Sampling
from stillroom.ledger import (
    Access,
    Circumstances,
    Collected,
    Frozen,
    Head,
    Ledger,
    PromptSource,
    Response,
    Trained,
    commitment,
    log,
    verify_ledger,
)
from stillroom.ledger.entries import COMMON_FIELDS, STAGE_FIELDS
from stillroom.ledger.entries import __doc__ as SCHEMA

SRC = Path(durable.__file__).parents[2]
TEACHER = ModelRef(
    source="/home/somebody/teacher",
    kind="directory",
    revision=None,
    weights_sha256="a" * 64,
    architecture="LlamaForCausalLM",
    parameters=1,
    licence="apache-2.0",
)
LOCAL = Circumstances(
    teacher=TEACHER,
    sampling=Sampling(max_new_tokens=24, temperature=0.7, seed=2**62),
    prompt_source=PromptSource(name="prompts.jsonl", sha256="b" * 64),
    signal="top_k",
    terms=("d" * 64, "c" * 64),
    decision="e" * 64,
)
SERVED = Circumstances(
    teacher=ModelRef(source="big-model", kind="hub", revision=None, weights_sha256=None, architecture="unknown", parameters=0, licence=None),
    sampling=Sampling(max_new_tokens=24, temperature=1.0),
    prompt_source=PromptSource(name="org/data", sha256=None),
    signal="text",
    terms=(),
    decision="e" * 64,
    access=Access(path="api", endpoint="https://example.org/v1", account="account-1"),
    top_p=0.9,
)
SECRET_PROMPT, SECRET_OUTPUT = "who is the mole", "it is Ümit"


def clock() -> datetime:
    return datetime(2026, 11, 24, 6, 57, 27, 123_000, tzinfo=UTC)


def ident(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def collected(number: int, circumstances: Circumstances = LOCAL, **more: Any) -> Collected:
    facts: dict[str, Any] = {"prompt": SECRET_PROMPT, "output": SECRET_OUTPUT, "prompt_tokens": 5, "output_tokens": 4}
    return Collected(record_id=ident(number), circumstances=circumstances, **(facts | more))


def entries_in(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["entry"] for line in durable.read_lines(directory / "ledger.jsonl")]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Three records through all stages: nine entries."""
    ledger = Ledger.open(tmp_path, clock)
    ledger.append([collected(n) for n in range(3)])
    ledger.append([Frozen(record_id=ident(0)), Frozen(record_id=ident(1), reason="truncated"), Frozen(record_id=ident(2))])
    ledger.append(Trained(record_id=ident(n)) for n in range(3))
    return ledger


# --- what an entry says


def test_an_entry_has_the_facts_and_the_salted_digests(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, clock)
    response = Response(model="big-model-2026", id="r-1", fingerprint="fp")
    hashes = ledger.append([collected(1), collected(2, SERVED, response=response, reasoning_tokens=7)])
    secret = bytes.fromhex((tmp_path / "ledger.secret").read_text())

    def committed(field: str, number: int, content: str) -> str:
        salt = hmac.new(secret, f"{field}:{ident(number)}".encode(), hashlib.sha256).digest()
        return hashlib.sha256(salt + content.encode()).hexdigest()

    local, served = entries_in(tmp_path)
    assert local == {
        "version": 1,
        "sequence": 0,
        "previous": "0" * 64,
        "time": "2026-11-24T06:57:27.123Z",
        "stage": "collect",
        "record": committed("record", 1, ident(1)),
        "prompt": committed("prompt", 1, SECRET_PROMPT),
        "output": committed("output", 1, SECRET_OUTPUT),
        "prompt_source": {"name": "prompts.jsonl", "sha256": "b" * 64},
        "signal": "top_k",
        "teacher": {"kind": "directory", "source": "teacher", "revision": None, "weights_sha256": "a" * 64, "licence": "apache-2.0"},
        "sampling": {"temperature": 0.7, "top_p": None, "max_new_tokens": 24, "seed": str(2**62)},
        "access": {"path": "local", "endpoint": None, "account": None},
        "response": None,
        "tokens": {"prompt": 5, "output": 4, "reasoning": None},
        "terms": ["c" * 64, "d" * 64],
        "decision": "e" * 64,
    }
    assert served["previous"] == hashes[0]
    assert served["response"] == {"model": "big-model-2026", "id": "r-1", "fingerprint": "fp"}
    assert served["tokens"]["reasoning"] == 7
    assert served["sampling"]["top_p"] == 0.9
    assert served["access"] == {"path": "api", "endpoint": "https://example.org/v1", "account": "account-1"}
    assert served["teacher"]["source"] == "big-model"


def test_later_stages_refer_to_the_collect_entry(ledger: Ledger, tmp_path: Path) -> None:
    entries = entries_in(tmp_path)
    by_hash = {json.loads(line)["hash"]: json.loads(line)["entry"] for line in durable.read_lines(tmp_path / "ledger.jsonl")}
    assert [entry["stage"] for entry in entries] == ["collect"] * 3 + ["freeze"] * 3 + ["train"] * 3
    assert [(entry["kept"], entry["reason"]) for entry in entries[3:6]] == [(True, None), (False, "truncated"), (True, None)]
    for entry in entries[3:]:
        assert by_hash[entry["collected"]]["record"] == entry["record"]
        assert by_hash[entry["collected"]]["stage"] == "collect"


def test_lines_are_canonical_json_and_rfc_6962_leaves(ledger: Ledger, tmp_path: Path) -> None:
    """Any RFC 8785 encoder and SHA-256 can check a line; the last hash is the head."""
    previous = "0" * 64
    for line in (tmp_path / "ledger.jsonl").read_bytes().splitlines():
        tree = json.loads(line)
        assert rfc8785.dumps(tree) == line
        assert tree["hash"] == hashlib.sha256(b"\x00" + rfc8785.dumps(tree["entry"])).hexdigest()
        assert tree["entry"]["previous"] == previous
        previous = tree["hash"]
    assert ledger.head == previous
    assert ledger.count == 9
    assert durable.read_json(tmp_path / "ledger.head.json") == {"entries": 9, "head": previous}


def test_neither_texts_nor_salts_nor_record_ids_can_be_read_from_it(ledger: Ledger, tmp_path: Path) -> None:
    text = (tmp_path / "ledger.jsonl").read_text(encoding="utf-8")
    secret = (tmp_path / "ledger.secret").read_text()
    hidden = [
        SECRET_PROMPT,
        SECRET_OUTPUT,
        secret,
        ident(0),
        hashlib.sha256(SECRET_PROMPT.encode()).hexdigest(),
        ledger.salt(ident(0), "prompt"),
        "/home",
    ]
    assert [word for word in hidden if word in text] == []
    assert len({entry["prompt"] for entry in entries_in(tmp_path)[:3]}) == 3  # the same prompt three times cannot be told
    assert stat.S_IMODE((tmp_path / "ledger.secret").stat().st_mode) == 0o600


def test_one_salt_proves_one_text(ledger: Ledger, tmp_path: Path) -> None:
    entry = entries_in(tmp_path)[1]
    salt = bytes.fromhex(ledger.salt(ident(1), "prompt"))
    assert commitment(salt, SECRET_PROMPT) == entry["prompt"]
    assert commitment(salt, SECRET_OUTPUT) != entry["output"]
    assert len({ledger.salt(ident(n), field) for n in range(3) for field in ("record", "prompt", "output")}) == 9


def test_two_runs_share_no_salts(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Ledger.open(tmp_path / name, clock).append([collected(0)])
    a, b = entries_in(tmp_path / "a")[0], entries_in(tmp_path / "b")[0]
    assert {field for field in a if a[field] != b[field]} == {"record", "prompt", "output"}


def test_the_schema_is_written_down_field_by_field(ledger: Ledger) -> None:
    reference = (SRC.parent / "docs" / "reference" / "ledger.md").read_text(encoding="utf-8")
    for field in COMMON_FIELDS.union(*STAGE_FIELDS.values()):
        assert f"`{field}`" in reference
        assert SCHEMA is not None
        assert field in SCHEMA


# --- nothing twice, nothing unknown


def test_what_is_there_is_not_written_again(ledger: Ledger, tmp_path: Path) -> None:
    before = (tmp_path / "ledger.jsonl").read_bytes()
    again = ledger.append([collected(1, SERVED), Frozen(record_id=ident(1)), Trained(record_id=ident(2)), Trained(record_id=ident(2))])
    assert again == [ledger.hash_of(ident(1), "collect"), ledger.hash_of(ident(1), "freeze"), *[ledger.hash_of(ident(2), "train")] * 2]
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    new = ledger.append([collected(7), collected(7), Frozen(record_id=ident(7)), Frozen(record_id=ident(7))])
    assert new[0] == new[1] != new[2] == new[3]
    assert ledger.count == 11
    ledger.verify()


def test_it_knows_what_it_has_also_after_it_was_opened_again(ledger: Ledger, tmp_path: Path) -> None:
    for book in (ledger, Ledger.open(tmp_path, clock)):
        assert book.has(ident(0), "train")
        assert not book.has(ident(9), "collect")
        assert (book.head, book.count) == (ledger.head, 9)
        assert book.salt(ident(0), "record") == ledger.salt(ident(0), "record")
        with pytest.raises(LedgerError) as raised:
            book.hash_of(ident(9), "collect")
        assert raised.value.code == "ledger-unknown-record"


def test_it_knows_the_decision_of_every_record(tmp_path: Path) -> None:
    """Also where decisions come back, other stages stand between them, and after it was opened again."""
    decisions = [letter * 64 for letter in "aabca"]
    book = Ledger.open(tmp_path, clock)
    for number, decision in enumerate(decisions):
        book.append([collected(number, replace(LOCAL, decision=decision)), Frozen(record_id=ident(number))])
    book.append([collected(0, replace(LOCAL, decision="f" * 64))])  # it keeps the entry that it has
    for ledger in (book, Ledger.open(tmp_path, clock)):
        assert [ledger.decision_of(ident(number)) for number in range(5)] == decisions
        with pytest.raises(LedgerError) as raised:
            ledger.decision_of(ident(9))
        assert raised.value.code == "ledger-unknown-record"


@pytest.mark.parametrize("entry", [Frozen(record_id=ident(9)), Trained(record_id=ident(9))])
def test_a_record_that_was_never_collected_is_refused(ledger: Ledger, tmp_path: Path, entry: Frozen | Trained) -> None:
    with pytest.raises(LedgerError, match=ident(9)) as raised:
        ledger.append([collected(8), entry])
    assert raised.value.code == "ledger-unknown-record"
    assert ledger.count == 9
    ledger.append([collected(9), entry])
    ledger.verify()


# --- alterations


def altered(path: Path, lines: list[bytes]) -> int | None:
    """Number of the line named by verification; None where nothing was found."""
    path.write_bytes(b"".join(lines))
    head = durable.read_json(path.with_name("ledger.head.json"))
    try:
        verify_ledger(path, Head(head["entries"], head["head"]))
    except LedgerError as found:
        error = found
    else:
        return None
    assert error.code == "ledger-corrupt"
    assert error.found.startswith("line ")
    return int(error.found.split()[1])


def test_an_untouched_ledger_verifies(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.verify() == verify_ledger(tmp_path / "ledger.jsonl") == Head(9, ledger.head)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120)
@given(data=st.data())
def test_any_flipped_byte_is_found_and_its_line_named(ledger: Ledger, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "ledger.jsonl"
    original = path.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = bytearray(original)
    changed[place] ^= flip
    named = altered(path, [bytes(changed)])
    assert named == original[:place].count(b"\n") + 1
    path.write_bytes(original)


def test_every_dropped_doubled_or_swapped_line_is_found_and_named(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for number in range(len(lines)):
        assert altered(path, lines[:number] + lines[number + 1 :]) == number + 1
        assert altered(path, lines[: number + 1] + lines[number:]) == number + 2
        for other in range(number + 1, len(lines)):
            swapped = list(lines)
            swapped[number], swapped[other] = swapped[other], swapped[number]
            assert altered(path, swapped) == number + 1
    assert altered(path, []) == 1
    assert altered(path, [*lines, lines[-1]]) == 10
    assert altered(path, [*lines[:-1], lines[-1][:-1]]) == 9
    assert altered(path, lines) is None


def rewritten(lines: list[bytes], number: int, change: dict[str, Any]) -> list[bytes]:
    """Line `number` (from 0) changed by somebody who knows the format: hashes and the chain are made to fit again."""
    trees = [json.loads(line) for line in lines]
    trees[number]["entry"].update(change)
    for place, tree in enumerate(trees[number:], start=number):
        if place > number:
            tree["entry"]["previous"] = trees[place - 1]["hash"]
        tree["hash"] = hashlib.sha256(b"\x00" + rfc8785.dumps(tree["entry"])).hexdigest()
    return [rfc8785.dumps(tree) + b"\n" for tree in trees]


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (8, {"time": "2020-01-01T00:00:00.000Z"}),  # consistent within the file, but not the head that was kept
        (0, {"surplus": 1}),
        (1, {"version": 2}),
        (2, {"stage": "other"}),
        (2, {"stage": ["collect"]}),
        (4, {"record": "none"}),
        (4, {"collected": "f" * 64}),
        (2, {"prompt": None}),
        (3, {"sequence": "3"}),
        (3, {"previous": None}),
        (5, {"sequence": 6}),
    ],
)
def test_a_clever_alteration_is_found_too(ledger: Ledger, tmp_path: Path, number: int, change: dict[str, Any]) -> None:
    path = tmp_path / "ledger.jsonl"
    assert altered(path, rewritten(path.read_bytes().splitlines(), number, change)) == number + 1


def test_a_hash_over_what_is_not_canonical_is_found(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for text in (json.dumps(json.loads(lines[-1])["entry"]).encode(), b"[" * 50_000, b"\xff", b"3", b'{"stage":1e999}'):
        line = b'{"entry":' + text + b',"hash":"' + hashlib.sha256(b"\x00" + text).hexdigest().encode() + b'"}\n'
        assert altered(path, [*lines[:-1], line]) == 9


def test_opening_an_altered_ledger_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for broken in (lines[:-1], lines[1:], [lines[0].replace(b"top_k", b"top_9"), *lines[1:]], []):
        path.write_bytes(b"".join(broken))
        with pytest.raises(LedgerError) as raised:
            Ledger.open(tmp_path, clock)
        assert raised.value.code == "ledger-corrupt"


@pytest.mark.parametrize("content", [None, "", "00", "no digits"])
def test_a_lost_secret_is_not_replaced(ledger: Ledger, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ledger.secret"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(LedgerError, match="secret"):
        Ledger.open(tmp_path, clock)


@pytest.mark.parametrize("content", ["{}", "[]", '{"entries": "x", "head": ""}'])
def test_a_head_that_is_none_is_refused(ledger: Ledger, tmp_path: Path, content: str) -> None:
    (tmp_path / "ledger.head.json").write_text(content)
    with pytest.raises(LedgerError, match="head"):
        Ledger.open(tmp_path, clock)


# --- deaths and full disks


def test_a_torn_line_is_cut_and_its_record_may_come_again(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    whole = path.read_bytes()
    Ledger.open(tmp_path, clock).append([collected(5)])
    line = path.read_bytes()[len(whole) :]
    durable.write_json_atomic(tmp_path / "ledger.head.json", {"entries": 9, "head": ledger.head})
    for length in (1, len(line) // 2, len(line) - 1):
        path.write_bytes(whole + line[:length])
        book = Ledger.open(tmp_path, clock)
        assert path.read_bytes() == whole
        assert not book.has(ident(5), "collect")
        book.verify()
    path.write_bytes(whole + line)  # the head lags behind: the writer died between the two
    book = Ledger.open(tmp_path, clock)
    assert book.has(ident(5), "collect")
    assert durable.read_json(tmp_path / "ledger.head.json")["entries"] == 10


DYING = """
    import os, sys
    from pathlib import Path
    from stillroom.core import durable
    from stillroom.core.identities import ModelRef, Sampling
    from stillroom.ledger import Circumstances, Collected, Frozen, Ledger, PromptSource
    left = [int(sys.argv[1])]
    def die():
        left[0] -= 1
        if left[0] < 0:
            os._exit(77)
    durable.write_point = die
    teacher = ModelRef(source="t", kind="hub", revision=None, weights_sha256=None, architecture="a", parameters=1, licence=None)
    source = PromptSource(name="p", sha256=None)
    how = Circumstances(teacher=teacher, sampling=Sampling(max_new_tokens=1), prompt_source=source, signal="text", terms=(), decision="e" * 64)
    ledger = Ledger.open(Path(sys.argv[2]))
    names = ["0" * 64, "1" * 64]
    ledger.append(Collected(record_id=n, prompt=n, output=n, prompt_tokens=1, output_tokens=1, circumstances=how) for n in names)
    ledger.append(Frozen(record_id=n) for n in names)
"""


def test_it_can_be_gone_on_with_wherever_its_writer_dies(tmp_path: Path) -> None:
    """Dies at every write point in turn, in the same directory each time: the work is handed in again and is in the book once."""
    counts = []
    for point in range(40):
        command = [sys.executable, "-c", textwrap.dedent(DYING), str(point), str(tmp_path)]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(SRC)}, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode in (0, 77), done.stderr
        counts.append(Ledger.open(tmp_path, clock).verify().entries)
        if done.returncode == 0:
            break
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 4
    assert {2} < set(counts)
    assert [entry["stage"] for entry in entries_in(tmp_path)] == ["collect", "collect", "freeze", "freeze"]


def test_a_full_disk_leaves_the_ledger_as_it_was(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(ResourceError):
            ledger.append([collected(5)])
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    assert not ledger.has(ident(5), "collect")
    ledger.append([collected(5)])
    assert ledger.verify().entries == 10


# --- size


def test_many_entries_are_chained_over_several_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_ENTRIES_PER_WRITE", 7)
    order = list(range(100))
    random.Random(0).shuffle(order)
    book = Ledger.open(tmp_path, clock)
    hashes = book.append(collected(n) for n in order)
    assert hashes == [book.hash_of(ident(n), "collect") for n in order]
    assert book.verify() == Head(100, hashes[-1])


def test_entries_are_written_quickly(tmp_path: Path) -> None:
    """60,000 in a few seconds: at most 0.15 ms of processor time each, three times what an idle core needs."""
    book = Ledger.open(tmp_path, clock)
    began = time.process_time()
    book.append(collected(n) for n in range(4000))
    assert time.process_time() - began < 4000 * 150e-6
