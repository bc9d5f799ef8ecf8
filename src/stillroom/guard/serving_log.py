"""The book of what was served: which requests got two samples, which of the two was served, and commitments to both; written while serving.

A directory has `serving.jsonl`, chained like the ledger (`ledger.chain`), with its head in `serving.head.json`, and `serving.texts.jsonl`: the texts of
both twins, which only their owner can read. Entries have

    version    1
    sequence   position of the line in the file, from 0
    previous   hash of the entry before; 64 zeros in the first
    time       when the entry was written, ISO 8601 in UTC to the millisecond
    kind       "begin" | "request" | "end"

A "begin" entry opens a session, before any request of it:

    session      16 random hexadecimal digits
    epoch        an integer: which subkey of the owner's key is in use
    share        the share of requests that get two samples
    commitment   to the coins' key (`Key.commitment`)

A "request" entry is written for each request that the coins' key selects, when both samples have ended:

    request    "<session>-<number>", numbers counting the session's eligible requests from 0
    account    a pseudonym, never a name or a key
    outcome    "twin"; "equal" where both texts are one; "single" where there are not two texts
    reason     why there are not, else null
    prompt     commitment to the request's body in canonical JSON; null for "single", as are the next three
    first      commitment to the text of the first sample
    second     commitment to the text of the second
    coin       commitment to "0" where the first was served, to "1" where the second was

An "end" entry closes a session in order: `requests`, how many eligible requests it had. A session that a crash ended has none.

**Nothing is chosen afterwards.** The owner's key gives a key of coins (HKDF). It alone says, by HMAC-SHA256 of the request's id, which requests get two
samples (the first 53 bits of that of "share:<request>", as a number in [0, 1), are below the share) and which sample is served (the last bit of that of
"coin:<request>"). The log begins with a commitment to it, before any text exists. When the coins' key is revealed, anybody computes every coin again,
and sees which of the selected numbers have no entry (`missing`).

**Which pairs are in is decided without the coin.** Whether both samples ended, have text and differ is the same whichever of them is served. What comes
after the coin and may depend on it, such as a client that left because the served text was long in coming, must not be a reason to leave a pair out.

**Salts.** Commitments are SHA-256(salt || text), and each salt is HMAC-SHA256 of a secret that is never revealed, so that one pair can be opened and no
other text be guessed: of the coins' key, the coins follow, and no salt.

**What it does not hold.** Who has the key can write any log. Against an owner who means to accuse falsely the log needs its commitment and its heads in
somebody else's hands from the beginning; and who served with that intention could still choose which of two texts he calls the first. A log that
was kept honestly cannot be bent later: that is what the hashes show.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn, TypeAlias

from stillroom.core import durable
from stillroom.core.clock import Clock, iso, now
from stillroom.core.errors import GuardError
from stillroom.core.identities import Json
from stillroom.guard.keys import KEY_BYTES, Key
from stillroom.ledger import Head, commitment
from stillroom.ledger.chain import EMPTY, keep_head, kept_head, read_chain
from stillroom.ledger.entries import derive_salt

VERSION = 1
LOG, HEAD, TEXTS = "serving.jsonl", "serving.head.json", "serving.texts.jsonl"
MISSING = "selected requests that the log does not have"
Outcome: TypeAlias = Literal["twin", "equal", "single"]

_COMMON = frozenset({"version", "sequence", "previous", "time", "kind"})
_FIELDS = {
    "begin": frozenset({"session", "epoch", "share", "commitment"}),
    "request": frozenset({"request", "account", "outcome", "reason", "prompt", "first", "second", "coin"}),
    "end": frozenset({"requests"}),
}
_COMMITTED = ("prompt", "first", "second", "coin")
_DIGEST, _SESSION, _NUMBER = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{16}"), re.compile("0|[1-9][0-9]{0,15}")


@dataclass(frozen=True, slots=True)
class Coins:
    """What decides, in one epoch, which requests get two samples and which sample is served; revealed when pairs are opened."""

    epoch: int
    key: Key
    nonce: bytes = field(repr=False)

    @classmethod
    def of(cls, key: Key, epoch: int) -> Coins:
        """Those that an owner's key has for an epoch. Neither that key nor another epoch's coins follow from them."""
        return cls(epoch, key.subkey("twins", "coins", epoch), key.subkey("twins", "nonce", epoch).secret)

    @property
    def commitment(self) -> str:
        """What the log begins with."""
        return self.key.commitment(self.nonce)

    def selects(self, request: str, share: float) -> bool:
        """Whether the request gets two samples."""
        return self._uniform("share", request) < share

    def audits(self, request: str, share: float) -> bool:
        """Whether the request is in an audit of that share of pairs: fixed, like its coin, before it had texts."""
        return self._uniform("audit", request) < share

    def served(self, request: str) -> int:
        """0 where the first sample is served, 1 where the second is."""
        return self._keyed("coin", request)[-1] & 1

    def as_json(self) -> Json:
        """For an opening: the key is in it."""
        return {"epoch": self.epoch, "key": self.key.secret.hex(), "nonce": self.nonce.hex()}

    @classmethod
    def from_json(cls, tree: Json) -> Coins:
        """Raises GuardError 'guard-evidence' or 'guard-key'."""
        try:
            epoch, key, nonce = tree["epoch"], tree["key"], bytes.fromhex(tree["nonce"])
        except (KeyError, TypeError, ValueError):
            epoch, key, nonce = None, None, b""
        if not (type(epoch) is int and isinstance(key, str) and len(nonce) == KEY_BYTES):
            _refuse("something other than an epoch, a key and a nonce", "the coins of an epoch as they were revealed")
        return cls(epoch, Key.from_hex(key), nonce)

    def _uniform(self, what: str, request: str) -> float:
        return (int.from_bytes(self._keyed(what, request)[:7], "big") >> 3) * 2.0**-53

    def _keyed(self, what: str, request: str) -> bytes:
        return hmac.digest(self.key.secret, f"{what}:{request}".encode(), "sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A request that was selected, after both of its samples have ended. A text is None where a sample failed or has none; `reason` then says why.

    Texts can be encoded in UTF-8.
    """

    request: str
    account: str
    prompt: str
    first: str | None
    second: str | None
    reason: str | None = None

    @property
    def outcome(self) -> Outcome:
        if self.first is None or self.second is None:
            return "single"
        return "equal" if self.first == self.second else "twin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What proves the commitments of one entry: its texts, and the salts in hexadecimal by field."""

    request: str
    prompt: str
    first: str
    second: str
    salts: Mapping[str, str]

    def as_json(self) -> Json:
        return {**asdict(self), "salts": dict(self.salts)}

    @classmethod
    def from_json(cls, tree: Json) -> Opening:
        """Raises GuardError 'guard-evidence'."""
        texts = [tree.get(name) for name in ("request", "prompt", "first", "second")] if isinstance(tree, dict) else [None]
        salts = tree.get("salts") if isinstance(tree, dict) else None
        if not (isinstance(salts, dict) and salts.keys() == set(_COMMITTED) and all(isinstance(one, str) for one in [*texts, *salts.values()])):
            _refuse("something other than a request's texts and salts", "an opening as it was disclosed")
        return cls(request=tree["request"], prompt=tree["prompt"], first=tree["first"], second=tree["second"], salts=salts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two texts of which a coin chose one to be served: the first where `served` is 0. Everything but `served` was there before the coin fell."""

    request: str
    epoch: int
    account: str
    prompt: str
    first: str
    second: str
    served: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A session of a log: `requests` as its end says, or, where it has none, as far as its entries go."""

    session: str
    epoch: int
    share: float
    commitment: str
    requests: int
    ended: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What is in a log that verifies: entries of requests with the number of their line, by request."""

    head: Head
    sessions: tuple[Session, ...]
    requests: Mapping[str, tuple[int, Json]]

    def count(self, outcome: Outcome) -> int:
        """How many requests had that outcome."""
        return sum(entry["outcome"] == outcome for _, entry in self.requests.values())


class ServingLog:
    """A log that one process appends to, in one session. A context manager: at its end the session is closed, and the directory is free again.

    Not for several threads at once; `append` may be called in another thread than `next_request`.
    """

    def __init__(self, directory: Path, key: Key, *, epoch: int = 0, share: float, clock: Clock = now) -> None:
        if not 0.0 <= share <= 1.0:
            _refuse(f"a share of {share}", "a share of requests between 0 and 1")
        self.coins = Coins.of(key, epoch)
        self.session = secrets.token_hex(8)
        self._directory, self._share, self._clock = directory, share, clock
        self._salts, self._accounts = _salts(key, epoch), key.subkey("twins", "accounts").secret
        self._lock = durable.DirectoryLock(directory)
        self._head = EMPTY
        self._requests = 0

    def __enter__(self) -> ServingLog:
        """Begins a session. What a crash tore off is cut. Raises RunError 'run-locked', LedgerError 'ledger-corrupt', GuardError 'guard-evidence'."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock.__enter__()
        try:
            for name in (LOG, TEXTS):
                durable.repair_tail(self._directory / name)
            _private(self._directory / TEXTS)
            self._head = verify_serving_log(self._directory / LOG, kept_head(self._directory / HEAD)).head
            begin = {"session": self.session, "epoch": self.coins.epoch, "share": _plain(self._share), "commitment": self.coins.commitment}
            self._write([{"kind": "begin", **begin}])
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._write([{"kind": "end", "requests": self._requests}])
        finally:
            self._lock.__exit__(kind, error, trace)

    @property
    def head(self) -> Head:
        """What somebody else should be given from time to time."""
        return self._head

    def next_request(self) -> str:
        """The id of the next eligible request of this session."""
        request = f"{self.session}-{self._requests}"
        self._requests += 1
        return request

    def selects(self, request: str) -> bool:
        """Whether it gets two samples."""
        return self.coins.selects(request, self._share)

    def pseudonym(self, account: bytes) -> str:
        """What stands for an account in the log: the owner can compute it again from what the account is known by, and nobody else can."""
        return hmac.digest(self._accounts, account, "sha256")[:16].hex()

    def append(self, sampled: Iterable[Sampled]) -> None:
        """Writes texts, then entries; on disk when it returns. Raises ResourceError 'disk-full', and nothing is then in the log."""
        given = list(sampled)
        texts = [asdict(one) for one in given if one.outcome != "single"]
        kept = ({name: text[name] for name in ("request", "prompt", "first", "second")} for text in texts)
        durable.append_lines(self._directory / TEXTS, [json.dumps(text) for text in kept])
        self._write([self._entry(one) for one in given])

    def _entry(self, one: Sampled) -> Json:
        assert one.request.startswith(f"{self.session}-"), "a request of another session"
        assert self.selects(one.request), "a request that was not selected"
        contents: Mapping[str, str | None] = dict.fromkeys(_COMMITTED)
        if one.outcome != "single":
            assert one.first is not None
            assert one.second is not None
            contents = {"prompt": one.prompt, "first": one.first, "second": one.second, "coin": str(self.coins.served(one.request))}
        committed = {name: None if text is None else commitment(derive_salt(self._salts, name, one.request), text) for name, text in contents.items()}
        return {"kind": "request", "request": one.request, "account": one.account, "outcome": one.outcome, "reason": one.reason, **committed}

    def _write(self, entries: list[Json]) -> None:
        time = iso(self._clock())
        lines, head = [], self._head
        for entry in entries:
            line, head = head.follow({"version": VERSION, "time": time, **entry})
            lines.append(line)
        durable.append_lines(self._directory / LOG, lines)
        self._head = head
        keep_head(self._directory / HEAD, head)


def verify_serving_log(path: Path, head: Head | None = None) -> Contents:
    """Verifies a `serving.jsonl` alone, without any secret; `head` is what it is held to, if anyone knows.

    Every line that was changed, dropped, moved or doubled is found; lines dropped from the end only if `head` says that they were there. Raises
    LedgerError 'ledger-corrupt' where the chain is broken, GuardError 'guard-evidence' where it is whole and says what no log says; both name the
    first line at fault.
    """
    reading = _Reading(path)
    last = EMPTY
    for number, entry, entry_hash in read_chain(path, head, canonical=True):
        reading.add(number, entry)
        last = Head(number, entry_hash)
    return Contents(head=last, sessions=tuple(reading.sessions), requests=reading.requests)


def missing(contents: Contents, coins: Iterable[Coins]) -> list[str]:
    """The requests that the coins select and that have no entry: those under way when a session was killed, and any that were held back."""
    by_commitment = {one.commitment: one for one in coins}
    found = []
    for session in contents.sessions:
        one = by_commitment.get(session.commitment)
        if one is not None:
            requests = (f"{session.session}-{number}" for number in range(session.requests))
            found += [request for request in requests if one.selects(request, session.share) and request not in contents.requests]
    return found


@dataclass(frozen=True, slots=True)
class Selected:
    """A pair of a log by name alone: for tests, whose coins need no texts."""

    request: str
    epoch: int
    account: str


def selected_pairs(path: Path, contents: Contents, coins: Iterable[Coins]) -> list[Selected]:
    """The pairs of the log at `path`, whose `contents` were verified, in its order: of those sessions whose coins were revealed.

    Raises GuardError 'guard-evidence' where an entry is of a request that the coins do not select, or coins are said to be of another epoch than theirs.
    """
    sessions = {session.session: session for session in contents.sessions}
    by_commitment = _of_their_epochs(contents, coins)
    found = []
    for request, (number, entry) in contents.requests.items():
        session = sessions[request.partition("-")[0]]
        drawn = by_commitment.get(session.commitment)
        if drawn is None or entry["outcome"] != "twin":
            continue
        if not drawn.selects(request, session.share):
            _bad(path, number, "is of a request that the coins do not select")
        found.append(Selected(request, session.epoch, entry["account"]))
    return found


def left_out(contents: Contents, coins: Iterable[Coins]) -> dict[str, int]:
    """How many selected requests are no pairs, by reason."""
    return {
        "pairs of one text": contents.count("equal"),
        "requests without two texts": contents.count("single"),
        MISSING: len(missing(contents, coins)),
    }


def disclose(directory: Path, key: Key, requests: Iterable[str] | None = None) -> Iterator[Opening]:
    """Openings of pairs in a log of one's own, in the log's order: of `requests`, or of all whose texts differ. Raises GuardError 'guard-evidence'."""
    contents = verify_serving_log(directory / LOG, kept_head(directory / HEAD))
    epochs = {session.session: session.epoch for session in contents.sessions}
    texts = _texts(directory / TEXTS)
    wanted = [name for name, (_, entry) in contents.requests.items() if entry["outcome"] == "twin"] if requests is None else list(requests)
    for request in wanted:
        if request not in contents.requests or request not in texts:
            _refuse(f"no texts of request {request} in {directory}", "a request of which two texts were kept")
        salts = _salts(key, epochs[request.partition("-")[0]])
        yield Opening(request=request, **texts[request], salts={name: derive_salt(salts, name, request).hex() for name in _COMMITTED})


def open_pairs(path: Path, contents: Contents, coins: Iterable[Coins], openings: Iterable[Opening]) -> list[Pair]:
    """The pairs that openings prove to be in the log at `path`, whose `contents` were verified; needs no secret but the coins that were revealed.

    Raises GuardError 'guard-evidence', naming the line, where an opening does not fit its entry: a text, a salt, the coin or the selection; where two
    are of one request; or where the coins are not those that the log began with, or are said to be of another epoch than theirs.
    """
    sessions = {session.session: session for session in contents.sessions}
    by_commitment = _of_their_epochs(contents, coins)
    pairs: dict[str, Pair] = {}
    for opening in openings:
        if opening.request not in contents.requests:
            _refuse(f"an opening of request {opening.request}, which is not in {path}", "openings of requests in the log")
        number, entry = contents.requests[opening.request]
        session = sessions[opening.request.partition("-")[0]]
        drawn = by_commitment.get(session.commitment)
        if drawn is None:
            _bad(path, number, f"belongs to epoch {session.epoch}, of which no coins were revealed that its session is committed to")
        if not drawn.selects(opening.request, session.share):
            _bad(path, number, "is of a request that the coins do not select")
        if opening.request in pairs:
            _bad(path, number, "was opened twice")
        served = drawn.served(opening.request)
        _check_opening(path, number, entry, opening, served)
        texts = {"prompt": opening.prompt, "first": opening.first, "second": opening.second}
        pairs[opening.request] = Pair(request=opening.request, epoch=session.epoch, account=entry["account"], served=served, **texts)
    return list(pairs.values())


def _of_their_epochs(contents: Contents, coins: Iterable[Coins]) -> dict[str, Coins]:
    """Coins by their commitment, which does not cover the epoch: whoever could say it anew could choose which epoch's coins count for which pairs."""
    by_commitment = {one.commitment: one for one in coins}
    for session in contents.sessions:
        drawn = by_commitment.get(session.commitment)
        if drawn is not None and drawn.epoch != session.epoch:
            _refuse(f"coins that are said to be of epoch {drawn.epoch}", f"epoch {session.epoch}, as session {session.session} began with them")
    return by_commitment


def _check_opening(path: Path, number: int, entry: Json, opening: Opening, served: int) -> None:
    if entry["outcome"] == "single":
        _bad(path, number, "says that there were no two texts, and they were disclosed")
    if (opening.first == opening.second) != (entry["outcome"] == "equal"):
        _bad(path, number, f"says {entry['outcome']}, and the texts disclosed say otherwise")
    contents = {"prompt": opening.prompt, "first": opening.first, "second": opening.second, "coin": str(served)}
    for name, text in contents.items():
        try:
            found = commitment(bytes.fromhex(opening.salts[name]), text)
        except (KeyError, ValueError):
            found = None
        if found != entry[name]:
            _bad(path, number, f"is committed to another {name}")


class _Reading:
    """What has been read of a log so far, and whether the next entry can follow it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.sessions: list[Session] = []
        self.requests: dict[str, tuple[int, Json]] = {}

    def add(self, number: int, entry: Json) -> None:
        kind = entry.get("kind")
        if not isinstance(kind, str) or kind not in _FIELDS or entry.keys() != _COMMON | _FIELDS[kind] or entry["version"] != VERSION:
            _bad(self._path, number, f"is not an entry of version {VERSION}")
        if kind != "begin" and (not self.sessions or self.sessions[-1].ended):
            _bad(self._path, number, "is in no session")
        match kind:
            case "begin":
                self._begin(number, entry)
            case "request":
                self._request(number, entry)
            case _:
                self._end(number, entry)

    def _begin(self, number: int, entry: Json) -> None:
        session, share = entry["session"], entry["share"]
        well = _matches(_SESSION, session) and _matches(_DIGEST, entry["commitment"]) and type(entry["epoch"]) is int
        if not well or type(share) not in (int, float) or not 0 <= share <= 1 or any(session == one.session for one in self.sessions):
            _bad(self._path, number, "begins no session")
        self.sessions.append(
            Session(session=session, epoch=entry["epoch"], share=float(share), commitment=entry["commitment"], requests=0, ended=False)
        )

    def _request(self, number: int, entry: Json) -> None:
        current = self.sessions[-1]
        session, _, place = str(entry["request"]).partition("-")
        if session != current.session or not _NUMBER.fullmatch(place) or entry["request"] in self.requests:
            _bad(self._path, number, "is of another session, or of a request that has an entry")
        single = entry["outcome"] == "single"
        committed = [entry[name] for name in _COMMITTED]
        well = all(one is None for one in committed) if single else all(_matches(_DIGEST, one) for one in committed)
        if not (
            well
            and isinstance(entry["reason"], str) == single
            and isinstance(entry["account"], str)
            and entry["outcome"] in ("twin", "equal", "single")
        ):
            _bad(self._path, number, "is not an entry of a request")
        self.requests[entry["request"]] = (number, entry)
        self._now(max(current.requests, int(place) + 1), ended=False)

    def _end(self, number: int, entry: Json) -> None:
        requests = entry["requests"]
        if type(requests) is not int or requests < self.sessions[-1].requests:
            _bad(self._path, number, "ends its session with fewer requests than it had")
        self._now(requests, ended=True)

    def _now(self, requests: int, *, ended: bool) -> None:
        last = self.sessions[-1]
        self.sessions[-1] = replace(last, requests=requests, ended=ended)


def _salts(key: Key, epoch: int) -> bytes:
    return key.subkey("twins", "salts", epoch).secret


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _private(path: Path) -> None:
    if not path.exists():
        durable.write_bytes_atomic(path, b"", mode=0o600)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        _refuse(f"{path} can be read by others: its mode is {mode:o}", "mode 600")


def _texts(path: Path) -> dict[str, dict[str, str]]:
    found = {}
    for number, line in enumerate(durable.read_lines(path), start=1):
        try:
            tree = json.loads(line)
            found[tree.pop("request")] = {name: str(tree[name]) for name in ("prompt", "first", "second")}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            _bad(path, number, "is not a request with its texts")
    return found


def _bad(path: Path, number: int, what: str) -> NoReturn:
    _refuse(f"line {number} of {path} {what}", "a log as it was written while serving, and openings of it")


def _refuse(found: str, expected: str) -> NoReturn:
    raise GuardError(
        "guard-evidence",
        found=found,
        expected=expected,
        why="evidence that is not what it says proves nothing",
        do="Restore the file from a copy; a pair that cannot be opened is left out of the audit, and counted.",
    )
