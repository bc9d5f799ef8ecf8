"""The serving log: what is written is what the format says, coins follow from the key alone, any alteration is found, and it survives its writer."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from stillroom.core import durable
from stillroom.core.errors import GuardError, LedgerError, ResourceError, RunError
from stillroom.guard import serving_log
from stillroom.guard.keys import Key
from stillroom.guard.laws import log_binomial_tail
from stillroom.guard.serving_log import Coins, Opening, Sampled, ServingLog, disclose, missing, open_pairs, verify_serving_log
from stillroom.ledger import Head
from stillroom.ledger.chain import kept_head

KEY = Key(hashlib.sha256(b"a key for tests of the serving log").digest())
OTHER = Key(hashlib.sha256(b"another one").digest())
SECRET_PROMPT, SECRET_TEXT = '{"messages":"who is the mole"}', "it is Ümit \U0001f980 "


def clock() -> datetime:
    return datetime(2026, 11, 29, 6, 57, 27, 123_000, tzinfo=UTC)


def sampled(request: str, **more: Any) -> Sampled:
    facts: dict[str, Any] = {"account": "0" * 32, "prompt": SECRET_PROMPT, "first": SECRET_TEXT + "a", "second": SECRET_TEXT + "b"}
    return Sampled(request=request, **(facts | more))


def write(directory: Path, count: int = 6, *, key: Key = KEY, share: float = 1.0, epoch: int = 0) -> list[str]:
    """A session of `count` eligible requests; those selected are logged. Returns their names."""
    with ServingLog(directory, key, share=share, epoch=epoch, clock=clock) as log:
        names = [name for name in (log.next_request() for _ in range(count)) if log.selects(name)]
        log.append(sampled(name) for name in names)
    return names


def entries(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["entry"] for line in durable.read_lines(directory / "serving.jsonl")]


def opened(directory: Path, coins: list[Coins], openings: list[Opening]) -> list[serving_log.Pair]:
    path = directory / "serving.jsonl"
    return open_pairs(path, verify_serving_log(path), coins, openings)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


# --- what it says


def test_an_entry_is_as_the_format_says(tmp_path: Path) -> None:
    (name,) = write(tmp_path, 1)
    begin, entry, end = entries(tmp_path)
    common = {"version": 1, "time": "2026-11-29T06:57:27.123Z"}
    session = name.partition("-")[0]
    assert name == f"{session}-0"
    coins = Coins.of(KEY, 0)
    assert begin == common | {
        "sequence": 0, "previous": "0" * 64, "kind": "begin", "session": session, "epoch": 0, "share": 1, "commitment": coins.commitment
    }  # fmt: skip
    opening = next(disclose(tmp_path, KEY))
    texts = {"prompt": SECRET_PROMPT, "first": SECRET_TEXT + "a", "second": SECRET_TEXT + "b", "coin": str(coins.served(name))}
    committed = {field: hashlib.sha256(bytes.fromhex(opening.salts[field]) + text.encode()).hexdigest() for field, text in texts.items()}
    told = {"kind": "request", "request": name, "account": "0" * 32, "outcome": "twin", "reason": None, "sequence": 1}
    assert {field: value for field, value in entry.items() if field != "previous"} == common | told | committed
    assert end["requests"] == 1
    assert serving_log.__doc__ is not None
    page = (Path(serving_log.__file__).parents[3] / "docs" / "reference" / "serving-log.md").read_text(encoding="utf-8")
    for field in begin.keys() | entry.keys() | end.keys():
        assert f" {field} " in serving_log.__doc__ or f"`{field}`" in serving_log.__doc__
        assert f"`{field}`" in page


def test_lines_are_chained_as_the_ledgers_are(log: Path) -> None:
    previous = "0" * 64
    for line in (log / "serving.jsonl").read_bytes().splitlines():
        tree = json.loads(line)
        assert rfc8785.dumps(tree) == line
        assert tree["hash"] == hashlib.sha256(b"\x00" + rfc8785.dumps(tree["entry"])).hexdigest()
        assert tree["entry"]["previous"] == previous
        previous = tree["hash"]
    assert kept_head(log / "serving.head.json") == Head(8, previous) == verify_serving_log(log / "serving.jsonl").head


def test_the_log_has_no_texts_and_no_secrets(log: Path) -> None:
    text = (log / "serving.jsonl").read_text()
    opening = next(disclose(log, KEY))
    hidden = [
        KEY.secret.hex(),
        Coins.of(KEY, 0).key.secret.hex(),
        *opening.salts.values(),
        hashlib.sha256(SECRET_PROMPT.encode()).hexdigest(),
        "mole",
    ]
    assert [word for word in hidden if word in text] == []
    assert stat.S_IMODE((log / "serving.texts.jsonl").stat().st_mode) == 0o600


def test_what_is_not_a_pair_says_so(tmp_path: Path) -> None:
    with ServingLog(tmp_path, KEY, share=1.0) as log:
        names = [log.next_request() for _ in range(3)]
        log.append([sampled(names[0]), sampled(names[1], second=SECRET_TEXT + "a"), sampled(names[2], second=None, reason="a sample failed")])
        log.append([])
    contents = verify_serving_log(tmp_path / "serving.jsonl")
    assert [contents.count(outcome) for outcome in ("twin", "equal", "single")] == [1, 1, 1]
    assert entries(tmp_path)[3] | {"outcome": "single", "reason": "a sample failed", "prompt": None, "coin": None} == entries(tmp_path)[3]
    assert [opening.request for opening in disclose(tmp_path, KEY)] == names[:1]
    # That two texts were one can be proved as well.
    (pair,) = opened(tmp_path, [Coins.of(KEY, 0)], list(disclose(tmp_path, KEY, names[1:2])))
    assert pair.first == pair.second
    with pytest.raises(GuardError, match=names[2]):
        list(disclose(tmp_path, KEY, names[2:]))


# --- coins


def test_anybody_with_the_coins_key_computes_coins_and_selection() -> None:
    coins = Coins.of(KEY, 3)
    for number in range(50):
        name = f"0123456789abcdef-{number}"
        coin = hmac.new(coins.key.secret, f"coin:{name}".encode(), hashlib.sha256).digest()[-1] % 2
        uniform = int.from_bytes(hmac.new(coins.key.secret, f"share:{name}".encode(), hashlib.sha256).digest(), "big") >> (256 - 53)
        assert coins.served(name) == coin
        assert coins.selects(name, 0.3) == (uniform / 2**53 < 0.3)
        assert coins.selects(name, 1.0)
        assert not coins.selects(name, 0.0)


def test_coins_are_fair_and_the_share_is_kept() -> None:
    coins = Coins.of(KEY, 0)
    names = [f"0123456789abcdef-{number}" for number in range(4000)]
    for count, p in ((sum(map(coins.served, names)), 0.5), (sum(coins.selects(name, 0.1) for name in names), 0.1)):
        assert min(log_binomial_tail(4000, p, count), log_binomial_tail(4000, 1 - p, 4000 - count)) > -14.5  # 5e-7 on either side


def test_epochs_and_sessions_have_coins_of_their_own(tmp_path: Path) -> None:
    names = [f"0123456789abcdef-{number}" for number in range(64)]
    drawn = {tuple(map(Coins.of(key, epoch).served, names)) for key in (KEY, OTHER) for epoch in (0, 1)}
    assert len(drawn) == 4
    for directory in ("a", "b"):  # two logs of one key and epoch: the same coins would count twice
        write(tmp_path / directory)
    assert not verify_serving_log(tmp_path / "a" / "serving.jsonl").requests.keys() & verify_serving_log(tmp_path / "b" / "serving.jsonl").requests


def test_coins_can_be_handed_over() -> None:
    coins = Coins.of(KEY, 7)
    assert Coins.from_json(json.loads(json.dumps(coins.as_json()))) == coins
    assert coins.key.secret.hex() not in repr(coins)
    for tree in ({}, [], coins.as_json() | {"epoch": "7"}, coins.as_json() | {"nonce": "00"}, coins.as_json() | {"key": 1}):
        with pytest.raises(GuardError):
            Coins.from_json(tree)  # type: ignore[arg-type]


def test_a_pseudonym_is_the_accounts_own_and_stays(tmp_path: Path) -> None:
    with ServingLog(tmp_path / "a", KEY, share=1.0) as one, ServingLog(tmp_path / "b", KEY, share=1.0, epoch=4) as other:
        assert one.pseudonym(b"Bearer sk-1") == other.pseudonym(b"Bearer sk-1") != one.pseudonym(b"Bearer sk-2")
    with ServingLog(tmp_path / "c", OTHER, share=1.0) as third:
        assert third.pseudonym(b"Bearer sk-1") != one.pseudonym(b"Bearer sk-1")


# --- openings


def test_pairs_are_opened_with_what_was_revealed_alone(log: Path) -> None:
    write(log, 4, epoch=1)
    coins = [Coins.from_json(Coins.of(KEY, epoch).as_json()) for epoch in (0, 1)]
    openings = [Opening.from_json(json.loads(json.dumps(one.as_json()))) for one in disclose(log, KEY)]
    pairs = opened(log, coins, openings)
    assert [pair.epoch for pair in pairs] == [0] * 6 + [1] * 4
    assert all(pair.served == coins[pair.epoch].served(pair.request) for pair in pairs)
    assert {(pair.prompt, pair.first, pair.second) for pair in pairs} == {(SECRET_PROMPT, SECRET_TEXT + "a", SECRET_TEXT + "b")}
    with pytest.raises(GuardError, match="epoch 1"):
        opened(log, coins[:1], openings)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "another"},
        {"first": SECRET_TEXT + "c"},
        {"second": SECRET_TEXT + "c"},
        {"first": SECRET_TEXT + "b", "second": SECRET_TEXT + "a"},  # the served one and its twin exchanged
        {"second": SECRET_TEXT + "a"},
        {"first": "\ud800"},
        {"salts": {"prompt": "", "first": "", "second": "", "coin": ""}},
        {"salts": {"prompt": "x"}},
    ],
)
def test_another_text_or_salt_is_found_and_its_line_named(log: Path, change: dict[str, Any]) -> None:
    openings = list(disclose(log, KEY))
    openings[3] = replace(openings[3], **change)
    with pytest.raises(GuardError, match="line 5 ") as raised:
        opened(log, [Coins.of(KEY, 0)], openings)
    assert raised.value.code == "guard-evidence"


def test_an_opening_counts_once_and_belongs_to_its_log(log: Path, tmp_path: Path) -> None:
    openings = list(disclose(log, KEY))
    with pytest.raises(GuardError, match="line 2 .*twice"):
        opened(log, [Coins.of(KEY, 0)], [openings[0], openings[0]])
    write(tmp_path / "other")
    with pytest.raises(GuardError, match="not in"):
        opened(log, [Coins.of(KEY, 0)], list(disclose(tmp_path / "other", KEY)))
    for tree in (None, {}, openings[0].as_json() | {"first": 1}, openings[0].as_json() | {"salts": {"first": ""}}):
        with pytest.raises(GuardError):
            Opening.from_json(tree)  # type: ignore[arg-type]


def test_coins_of_another_key_do_not_open_it(log: Path) -> None:
    openings = list(disclose(log, KEY))
    forged = replace(Coins.of(OTHER, 0), nonce=Coins.of(KEY, 0).nonce)
    for coins in (Coins.of(OTHER, 0), forged):  # a key that was chosen after the fact
        with pytest.raises(GuardError, match="line 2 .*committed"):
            opened(log, [coins], openings)


def test_an_entry_of_a_request_that_was_not_selected_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ServingLog(tmp_path, KEY, share=0.5) as log:
        names = [log.next_request() for _ in range(40)]
        unwanted = next(name for name in names if not log.selects(name))
        with pytest.raises(AssertionError):
            log.append([sampled(unwanted)])
        monkeypatch.setattr(log, "selects", lambda request: True)
        log.append([sampled(unwanted)])
    with pytest.raises(GuardError, match="line 2 .*do not select"):
        opened(tmp_path, [Coins.of(KEY, 0)], list(disclose(tmp_path, KEY)))


def test_pairs_that_were_held_back_are_missed(tmp_path: Path) -> None:
    write(tmp_path, 50, share=0.5)
    with ServingLog(tmp_path, KEY, share=0.5) as log:
        selected = [name for name in (log.next_request() for _ in range(50)) if log.selects(name)]
        log.append(sampled(name) for name in selected[::2])
    contents = verify_serving_log(tmp_path / "serving.jsonl")
    assert missing(contents, [Coins.of(KEY, 0)]) == selected[1::2]
    assert missing(contents, [Coins.of(OTHER, 0)]) == []


# --- alterations


def found_at(path: Path, data: bytes) -> int | None:
    """The line named by verification; None where nothing was found."""
    path.write_bytes(data)
    try:
        verify_serving_log(path, kept_head(path.with_name("serving.head.json")))
    except (LedgerError, GuardError) as error:
        found = error.found.split()
    else:
        return None
    assert found[0] == "line"
    return int(found[1])


def test_a_flipped_byte_is_found_wherever_it_is_and_its_line_named(tmp_path: Path) -> None:
    write(tmp_path, 2)
    path = tmp_path / "serving.jsonl"
    data = path.read_bytes()
    for place in range(0, len(data), 5):
        changed = bytearray(data)
        changed[place] ^= 1 + place % 255
        assert found_at(path, bytes(changed)) == data[:place].count(b"\n") + 1, place
    assert found_at(path, data) is None


def test_every_dropped_doubled_or_swapped_line_is_found(log: Path) -> None:
    path = log / "serving.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for number in range(len(lines)):
        assert found_at(path, b"".join(lines[:number] + lines[number + 1 :])) == number + 1
        assert found_at(path, b"".join(lines[: number + 1] + lines[number:])) == number + 2
        if number:
            assert found_at(path, b"".join([*lines[: number - 1], lines[number], lines[number - 1], *lines[number + 1 :]])) == number


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (0, {"share": 2}),
        (0, {"share": True}),
        (0, {"session": "x"}),
        (0, {"commitment": "none"}),
        (0, {"kind": "request"}),
        (0, {"kind": ["begin"]}),
        (1, {"surplus": 1}),
        (1, {"version": 2}),
        (1, {"outcome": "won"}),
        (1, {"outcome": "single"}),
        (1, {"first": None}),
        (1, {"reason": "none"}),
        (1, {"account": None}),
        (2, {"request": "0" * 16 + "-1"}),
        (2, {"request": 5}),
        (7, {"requests": 5}),
        (7, {"requests": None}),
    ],
)
def test_an_entry_that_no_log_has_is_found_also_where_the_chain_is_whole(log: Path, number: int, change: dict[str, Any]) -> None:
    path = log / "serving.jsonl"
    trees = [json.loads(line) for line in path.read_bytes().splitlines()]
    trees[number]["entry"].update(change)
    for place, tree in enumerate(trees):
        tree["entry"]["previous"] = trees[place - 1]["hash"] if place else "0" * 64
        tree["hash"] = hashlib.sha256(b"\x00" + rfc8785.dumps(tree["entry"])).hexdigest()
    (log / "serving.head.json").unlink()
    assert found_at(path, b"".join(rfc8785.dumps(tree) + b"\n" for tree in trees)) == number + 1


def test_an_altered_log_is_not_gone_on_with(log: Path) -> None:
    path = log / "serving.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    for _ in range(2):  # the directory was let go of
        with pytest.raises(LedgerError, match="line 8 "):
            write(log)


def test_texts_that_others_can_read_or_that_were_lost_are_refused(log: Path) -> None:
    texts = log / "serving.texts.jsonl"
    texts.chmod(0o644)
    with pytest.raises(GuardError, match="644"):
        write(log)
    texts.chmod(0o600)
    kept = texts.read_text().splitlines(keepends=True)
    texts.write_text("".join(kept[1:]))
    with pytest.raises(GuardError, match="no texts of request"):
        list(disclose(log, KEY))
    for broken in ("[]\n", "{}\n", "x\n", '{"request": 1}\n'):
        texts.write_text(kept[0] + broken)
        with pytest.raises(GuardError, match=r"line 2 of .*texts"):
            list(disclose(log, KEY))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(GuardError):
        ServingLog(tmp_path, KEY, share=share)


# --- deaths, full disks, two writers


def write_and_die(directory: Path, point: int) -> None:
    """Ends the process: with 77 at a write point, with 0 where there were not so many."""
    left = iter(range(point))

    def die() -> None:
        if next(left, None) is None:
            os._exit(77)

    durable.write_point = die
    try:
        write(directory, 3)
        os._exit(0)
    finally:
        os._exit(1)


def deaths(directory: Path) -> Iterator[None]:
    """A writer that dies at the first, second, ... write point, in the same directory each time; at last it lives."""
    for point in range(100):
        child = os.fork()  # a new interpreter for each point would take a minute
        if child == 0:
            write_and_die(directory, point)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 77)
        yield
        if code == 0:
            return
    pytest.fail("it never came to its end")


def test_it_verifies_and_goes_on_wherever_its_writer_dies(tmp_path: Path) -> None:
    counts = []
    for _ in deaths(tmp_path):
        contents = verify_serving_log(tmp_path / "serving.jsonl", kept_head(tmp_path / "serving.head.json"))
        # Whatever is in the log can be opened: texts are on disk before the entries that are committed to them.
        assert len(opened(tmp_path, [Coins.of(KEY, 0)], list(disclose(tmp_path, KEY)) if contents.requests else [])) == len(contents.requests)
        assert [session.ended for session in contents.sessions][-1:] in ([], [False], [True])
        counts.append(len(contents.requests))
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[-1]
    sessions = verify_serving_log(tmp_path / "serving.jsonl").sessions
    assert {session.ended for session in sessions} == {True, False}


def test_a_torn_line_is_cut(log: Path) -> None:
    before = (log / "serving.jsonl").read_bytes()
    for name in ("serving.jsonl", "serving.texts.jsonl"):
        with (log / name).open("ab") as file:
            file.write(b'{"entry":{"acc')
    write(log, 2)
    assert (log / "serving.jsonl").read_bytes().startswith(before)
    assert len(list(disclose(log, KEY))) == 8


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ServingLog(tmp_path, KEY, share=1.0) as log:
        first, second = log.next_request(), log.next_request()
        log.append([sampled(first)])
        before = (tmp_path / "serving.jsonl").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, data: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            with pytest.raises(ResourceError):
                log.append([sampled(second)])
        assert (tmp_path / "serving.jsonl").read_bytes() == before
        log.append([sampled(second)])
    assert len(opened(tmp_path, [Coins.of(KEY, 0)], list(disclose(tmp_path, KEY)))) == 2


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    with ServingLog(tmp_path, KEY, share=1.0), pytest.raises(RunError) as raised, ServingLog(tmp_path, KEY, share=1.0):
        pass
    assert raised.value.code == "run-locked"
