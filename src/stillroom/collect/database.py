"""The file of a request store: one SQLite database, one process that writes, one thread that commits for all.

Works from any number of tasks and threads are done in the order in which they came, up to 50 or as many as come within 20 ms in one transaction, which
is flushed to the disk before any of them is told. What cannot be committed has not happened, for all of its transaction.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from stillroom.core.durable import unwritable_reported, write_point
from stillroom.core.errors import RequestStoreError, ResourceError

T = TypeVar("T")
Work: TypeAlias = Callable[[sqlite3.Connection], T]

APPLICATION_ID = 0x53744C52
SCHEMA_VERSION = 1
# What SQLite says where the system took no more of a file. A disk that fails says so too, and is no store that was spoilt either.
_NO_ROOM = ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC", "SQLITE_IOERR_DIR_FSYNC", "SQLITE_IOERR_TRUNCATE", "SQLITE_IOERR_SHMSIZE")
_MAGIC = b"SQLite format 3\x00"
_SYNCHRONOUS = "FULL"
_TOGETHER = 50
_TOGETHER_SECONDS = 0.020
_WAL_BYTES = 64 << 20
_CACHE_KIB = 32 << 10

# In tables WITHOUT ROWID the columns of the key come first: SQLite 3.40's integrity check finds NULLs that are not there where they do not.
SCHEMA = """
CREATE TABLE facts (kind TEXT NOT NULL, subject TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (kind, subject)) STRICT, WITHOUT ROWID;
CREATE TABLE endpoints (id INTEGER PRIMARY KEY, identity TEXT NOT NULL UNIQUE, key_variable TEXT, price TEXT REFERENCES prices (id)) STRICT;
CREATE TABLE prices (id TEXT PRIMARY KEY, price TEXT NOT NULL) STRICT;
CREATE TABLE calls (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, endpoint INTEGER NOT NULL REFERENCES endpoints (id), sample INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'in-flight', 'answered', 'failed')),
    reason TEXT, wanted INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, text BLOB NOT NULL
) STRICT;
CREATE INDEX waiting ON calls (id) WHERE state = 'pending' AND wanted = 1;
CREATE INDEX same_text ON calls (text);
CREATE TABLE bodies (call INTEGER PRIMARY KEY REFERENCES calls (id), body BLOB NOT NULL) STRICT;
CREATE TABLE rows (
    id INTEGER PRIMARY KEY, row TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, call INTEGER NOT NULL REFERENCES calls (id),
    verdict TEXT CHECK (verdict IN ('accepted', 'rejected')), reason TEXT
) STRICT;
CREATE INDEX rows_of_call ON rows (call);
CREATE INDEX rows_of_prompt ON rows (prompt);
CREATE TABLE superseded (row INTEGER NOT NULL REFERENCES rows (id), call INTEGER NOT NULL REFERENCES calls (id), reason TEXT NOT NULL,
    PRIMARY KEY (row, call)) STRICT, WITHOUT ROWID;
CREATE TABLE outcomes (
    call INTEGER PRIMARY KEY REFERENCES calls (id), answer BLOB NOT NULL, demoted TEXT, raw BLOB, shard TEXT, place INTEGER
) STRICT;
CREATE TABLE unshelved (call INTEGER PRIMARY KEY REFERENCES calls (id), packed BLOB NOT NULL) STRICT;
CREATE TABLE sessions (id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY, session INTEGER NOT NULL REFERENCES sessions (id), number INTEGER NOT NULL, call INTEGER NOT NULL REFERENCES calls (id),
    state TEXT NOT NULL CHECK (state IN ('open', 'settled', 'released', 'unanswered', 'unmetered')),
    reserved_tokens INTEGER NOT NULL, reserved_money INTEGER NOT NULL, cost_tokens INTEGER NOT NULL DEFAULT 0, cost_money INTEGER NOT NULL DEFAULT 0,
    price TEXT REFERENCES prices (id), began_ms INTEGER NOT NULL, ended_ms INTEGER, reason TEXT, message TEXT, status INTEGER,
    prompt_tokens INTEGER, completion_tokens INTEGER, reasoning_tokens INTEGER, cached_tokens INTEGER,
    request_id TEXT, model TEXT, fingerprint TEXT, provider TEXT, UNIQUE (session, number)
) STRICT;
CREATE INDEX attempts_of_call ON attempts (call);
CREATE TABLE conflicts (key BLOB NOT NULL, what TEXT NOT NULL, there TEXT NOT NULL, here TEXT NOT NULL, PRIMARY KEY (key, what, there)) STRICT, WITHOUT ROWID;
"""


@contextmanager
def errors_reported(path: Path) -> Iterator[None]:
    """Turns SQLite's errors into ours: 'disk-full', 'path-unwritable', 'request-store-locked', 'request-store-corrupt'."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        if name in _NO_ROOM or (name.startswith("SQLITE_IOERR") and _no_room(path)):
            raise ResourceError(
                "disk-full",
                found=f"{path} cannot be written any further: {error}",
                why="the disk is full, or a limit on the size of a file (ulimit -f) is reached; what was there before is unchanged",
                do="Free some space and run again; what was bought is kept, and is not bought again.",
            ) from error
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise locked(path, "another program") from error
        if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            raise ResourceError(
                "path-unwritable",
                found=f"{path}: {error}",
                expected="a request store that this user may read and write, in a directory where it may make files",
                why="what was there before is unchanged",
                do="Choose another --store, or collection.store, or make that place writable.",
            ) from error
        if isinstance(error, sqlite3.ProgrammingError | sqlite3.InterfaceError):
            raise  # our own mistake
        raise RequestStoreError(
            "request-store-corrupt",
            found=f"{path}: {error}",
            expected="a request store as Stillroom wrote it",
            do="Restore the file from a copy (with its -wal file, if there is one), or begin a new one.",
        ) from error


def _no_room(path: Path) -> bool:
    try:
        there = os.statvfs(path.parent)
    except OSError:
        return False
    return there.f_bavail * there.f_frsize < 1 << 20


def locked(path: Path, holder: str) -> RequestStoreError:
    """The error that says who has the store."""
    return RequestStoreError(
        "request-store-locked",
        found=f"{path} is in use by {holder}",
        why="two collectors with one store would buy the same calls twice",
        do="Wait until it has ended or stop it; to use several machines, give each a store and a shard, and merge.",
    )


class StoreLock:
    """Holds `PATH.lock` until it is closed, or the process dies: the operating system releases it. Raises 'request-store-locked', 'path-unwritable'.

    It is a file of its own, because closing any descriptor of the database would drop SQLite's locks on it.
    """

    def __init__(self, path: Path) -> None:
        if os.path.isdir(path):
            raise _other(path, "is a directory")
        with unwritable_reported(path, "--store, or collection.store"):
            self._descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise locked(path, f"process {holder or 'unknown'}") from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        os.close(self._descriptor)


def connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """A connection to a request store, which is made where there is none (unless `read_only`). Raises 'request-store-other', and what is above."""
    _require_sqlite(path)
    if read_only and not os.path.exists(path):
        raise _other(path, "is not there")
    with errors_reported(path):
        mode = "ro" if read_only else "rwc"
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=10.0)
    try:
        with errors_reported(path):
            _require_ours(connection, path, read_only)
            if not read_only:
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # heeded only before there is a table
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(f"PRAGMA synchronous = {_SYNCHRONOUS}")
                connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
                connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                _make_tables(connection)
        return connection
    except BaseException:
        connection.close()
        raise


def _require_sqlite(path: Path) -> None:
    """SQLite takes a file of a few bytes for an empty database, and writes over it."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(_MAGIC))
    except OSError:
        return  # there is none, or SQLite says what is wrong with it
    if begin not in (b"", _MAGIC):
        raise _other(path, "is no SQLite database")


def _require_ours(connection: sqlite3.Connection, path: Path, read_only: bool) -> None:
    application, version, tables = (
        connection.execute(text).fetchone()[0] for text in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if application == 0 and version == 0 and tables == 0 and not read_only:
        return
    if application != APPLICATION_ID:
        raise _other(path, "is a database of something else" if tables else "is empty")
    if version != SCHEMA_VERSION:
        raise _other(path, f"has version {version} of the request store's schema, and this Stillroom knows version {SCHEMA_VERSION}")


def _other(path: Path, what: str) -> RequestStoreError:
    return RequestStoreError(
        "request-store-other",
        found=f"{path} {what}",
        expected="a request store",
        do="Give another path, or use the version of Stillroom that wrote it.",
    )


def _make_tables(connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID:
        return
    write_point()
    statements = [SCHEMA, f"PRAGMA application_id = {APPLICATION_ID};", f"PRAGMA user_version = {SCHEMA_VERSION};"]
    connection.executescript("BEGIN IMMEDIATE;\n" + "\n".join(statements) + "\nCOMMIT;")
    write_point()


@dataclass(slots=True)
class _Waiting(Generic[T]):
    """A work, and who waits for it: a task of an event loop, or a thread."""

    work: Work[T]
    future: asyncio.Future[T] | concurrent.futures.Future[T]
    loop: asyncio.AbstractEventLoop | None
    value: Any = None
    error: BaseException | None = None

    def deliver(self) -> None:
        if self.future.done():  # whoever waited has given up
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.value)


class GroupCommit:
    """The thread that writes. `on_rollback` is called in it before the next work, after a transaction has been taken back whole."""

    def __init__(self, connection: sqlite3.Connection, path: Path, on_rollback: Work[None]) -> None:
        self._connection, self._path, self._on_rollback = connection, path, on_rollback
        self._queue: list[_Waiting[Any]] = []
        self._urgent = self._closing = self._taken_back = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="stillroom-requests", daemon=True)
        self._thread.start()

    def run(self, work: Work[T]) -> T:
        """Does a work and returns what it returns, durably; waits for it, and for no other to come."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._put(_Waiting(work, future, None), urgent=True)
        return future.result()

    def submit(self, work: Work[T]) -> asyncio.Future[T]:
        """The same from a task of the running event loop, which is not blocked."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._put(_Waiting(work, future, loop), urgent=False)
        return future

    def close(self) -> None:
        """Does what is waiting, and ends the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _put(self, waiting: _Waiting[Any], *, urgent: bool) -> None:
        with self._wake:
            if self._closing:
                raise RuntimeError(f"{self._path} has been closed")
            self._queue.append(waiting)
            self._urgent = self._urgent or urgent
            # Waking the thread for each would cost more than the writing: it is woken when there is something, and when there is enough.
            if self._urgent or len(self._queue) in (1, _TOGETHER):
                self._wake.notify()

    def _run(self) -> None:
        while batch := self._next():
            self._do(batch)
            by_loop: dict[asyncio.AbstractEventLoop, list[_Waiting[Any]]] = {}
            for waiting in batch:
                if waiting.loop is None:
                    waiting.deliver()
                else:
                    by_loop.setdefault(waiting.loop, []).append(waiting)
            for loop, several in by_loop.items():
                with suppress(RuntimeError):  # a loop that has been closed: nobody waits any more
                    loop.call_soon_threadsafe(_deliver, several)

    def _next(self) -> list[_Waiting[Any]]:
        with self._wake:
            self._wake.wait_for(lambda: self._queue or self._closing)
            self._wake.wait_for(lambda: len(self._queue) >= _TOGETHER or self._urgent or self._closing, _TOGETHER_SECONDS)
            batch, self._queue = self._queue[:_TOGETHER], self._queue[_TOGETHER:]
            self._urgent = self._urgent and bool(self._queue)
            return batch

    def _do(self, batch: list[_Waiting[Any]]) -> None:
        try:
            with errors_reported(self._path):
                if self._taken_back:
                    self._on_rollback(self._connection)
                    self._taken_back = False
                self._connection.execute("BEGIN IMMEDIATE")
                for waiting in batch:
                    self._do_one(waiting)
                write_point()
                self._connection.execute("COMMIT")
                write_point()
        except BaseException as error:
            self._taken_back = True
            with suppress(sqlite3.Error):  # SQLite may have done it
                self._connection.execute("ROLLBACK")
            for waiting in batch:
                waiting.error = waiting.error or error

    def _do_one(self, waiting: _Waiting[Any]) -> None:
        self._connection.execute("SAVEPOINT work")
        try:
            waiting.value = waiting.work(self._connection)
        except sqlite3.Error:
            raise  # SQLite may have taken back the whole transaction
        except BaseException as error:
            waiting.error = error
            self._connection.execute("ROLLBACK TO work")
        self._connection.execute("RELEASE work")


def _deliver(several: list[_Waiting[Any]]) -> None:
    for waiting in several:
        waiting.deliver()
