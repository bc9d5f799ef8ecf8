"""Writing to disk so that it survives: the only module that writes what a run must not lose.

A file is replaced whole or not at all; a log grows by whole lines, and a line that a crash tore is cut off when the log is opened again; a directory
appears complete or not at all. All of it is flushed to the disk before a function returns. A disk that is full leaves what was there before.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from stillroom.core.errors import ResourceError, RunError

# EFBIG: a limit on the size of files was met (`ulimit -f`, or that of the file system).
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a path that somebody chose is answered with, where it cannot be written.
_UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO,
)  # fmt: skip
_TAIL_BYTES = 1 << 16


def write_point() -> None:
    """Called wherever a process may die between two effects on the disk. Does nothing; a test's child process replaces it to die at the n-th."""


def write_bytes_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Makes `data` the content of `path`; at any moment the path holds the old content or the new. Raises ResourceError 'disk-full'.

    `mode` holds from the first byte on, so a secret is never readable by others for a moment.
    """
    partial = path.with_name(f".{path.name}.partial")
    write_point()
    with full_disk_reported(path, remove=partial):
        partial.unlink(missing_ok=True)  # what a crash left has that crash's mode
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        write_point()
        os.replace(partial, path)
        write_point()
        _sync_directory(path.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place for a library to write a large file to, which becomes `path` when the block ends, whole and flushed. Raises ResourceError 'disk-full'.

    The place has no name, so that nothing is left of it where the block fails or the process is killed. On a file system without such files, and
    for a moment where an older `path` is replaced, it is called `.NAME.partial`: what a death leaves there the next one removes.
    """
    partial = path.with_name(f".{path.name}.partial")
    write_point()
    with ExitStack() as stack:
        stack.enter_context(full_disk_reported(path))
        stack.callback(partial.unlink, missing_ok=True)
        partial.unlink(missing_ok=True)
        nameless = _nameless_file(path.parent)
        if nameless is not None:
            stack.callback(os.close, nameless)
        place = partial if nameless is None else Path(f"/proc/self/fd/{nameless}")
        yield place
        _sync_file(place)
        write_point()
        if nameless is None or not _named(place, path):
            if nameless is not None:
                _named(place, partial)
            write_point()
            os.replace(partial, path)
        write_point()
        _sync_directory(path.parent)


def _nameless_file(directory: Path) -> int | None:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except AttributeError:  # an operating system without them
        return None
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            return None
        raise


def _named(place: Path, name: Path) -> bool:
    """Gives a nameless file a name; False where another file has it."""
    directory = os.open(name.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # With a directory given Python calls linkat and follows the link in /proc; without, it calls link and does not.
        os.link(place, name.absolute(), src_dir_fd=directory, follow_symlinks=True)
    except FileExistsError:
        return False
    finally:
        os.close(directory)
    return True


def write_json_atomic(path: Path, value: Any) -> None:
    """Makes `value` the content of `path` as JSON: sorted keys, two spaces of indentation, UTF-8. ValueError for NaN and infinities."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, indent=2)
    write_bytes_atomic(path, f"{text}\n".encode())


def append_lines(path: Path, lines: Iterable[str], *, sync: bool = True) -> None:
    """Adds whole lines (given without their line feeds) to `path` in one write, and flushes. Creates the file. Raises ResourceError 'disk-full'.

    Where the write fails, what it had written is taken back. Nothing may be appended after a torn line: call `repair_tail` before the first append.
    Without `sync` the lines outlive the process but perhaps not a power failure: for logs that are cheap to lose.
    """
    data = "".join(f"{line}\n" for line in lines).encode()
    if not data:
        return
    write_point()
    with full_disk_reported(path):
        new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, data)
                write_point()
                if sync:
                    os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)
        if new and sync:
            _sync_directory(path.parent)
    write_point()


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises RunError 'run-corrupt' where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        _corrupt(path, "is missing")
    except OSError as error:
        _corrupt(path, f"cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:  # not UTF-8 and not JSON are both ValueErrors
        _corrupt(path, f"is not JSON: {error}")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of `path` without their line feeds; none where there is no file. A last line without a line feed was torn by a crash and is left out.

    Raises RunError 'run-corrupt' where a line is not UTF-8.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield line[:-1].decode()
            except UnicodeDecodeError as error:
                _corrupt(path, f"line {number} is not UTF-8: {error.reason} at byte {error.start}")


def repair_tail(path: Path) -> int:
    """Cuts off what follows the last line feed of `path`: a line torn by a crash. Returns the number of bytes cut, 0 for a whole or missing file."""
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        return 0
    with file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - _TAIL_BYTES)
            file.seek(begin)
            last = file.read(end - begin).rfind(b"\n")
            if last >= 0:
                end = begin + last + 1
                break
            end = begin
        if end < size:
            write_point()
            file.truncate(end)
            os.fsync(file.fileno())
    return size - end


def keep_lines(path: Path, keep: Callable[[str], bool]) -> None:
    """Leaves in `path` only the whole lines of which `keep` is true, atomically; does nothing to a file it need not change, or that is missing."""
    kept = [line for line in read_lines(path) if keep(line)]
    data = "".join(f"{line}\n" for line in kept).encode()
    if path.exists() and path.stat().st_size != len(data):
        write_bytes_atomic(path, data)


def replace_directory(partial: Path, final: Path) -> None:
    """Publishes the directory `partial` as `final`, on the same file system, after flushing every file in it; what `final` held is removed.

    No half-written directory is ever `final`. A death between the two renames that replacing takes leaves `final` absent and the old one beside it:
    `settle_directory` puts it back.
    """
    with full_disk_reported(final):
        settle_directory(final)
        for folder, _, names in os.walk(partial):
            for name in names:
                _sync_file(Path(folder) / name)
            _sync_directory(Path(folder))
        old = _replaced(final)
        write_point()
        if final.exists():
            os.replace(final, old)
            write_point()
        os.replace(partial, final)
        write_point()
        _sync_directory(final.parent)
        if old.exists():
            shutil.rmtree(old)


def settle_directory(final: Path) -> None:
    """Undoes what a death in the middle of `replace_directory` left: the old `final` is put back if it is missing, else its remains are removed."""
    old = _replaced(final)
    if not old.exists():
        return
    if final.exists():
        shutil.rmtree(old)
    else:
        os.replace(old, final)
    _sync_directory(final.parent)


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write to the disk that `path` is on, or would be on."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def require_free_bytes(path: Path, needed: int, what: str) -> None:
    """Raises ResourceError 'disk-full' unless the disk of `path` has room for `needed` bytes, which are for `what`."""
    free = free_bytes(path)
    if free < needed:
        raise ResourceError(
            "disk-full",
            found=f"{_size(free)} free where {path} is",
            expected=f"{_size(needed)} for {what}",
            do="Free some space, or choose an output directory on another disk.",
        )


@contextmanager
def unwritable_reported(path: Path, option: str) -> Iterator[None]:
    """Turns the system's refusal to write `path`, which somebody gave as `option`, into ResourceError 'path-unwritable'.

    Around the writing alone: what is missing elsewhere would be taken for it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        names = [Path(os.fspath(name)) for name in (error.filename2, error.filename) if isinstance(name, str | os.PathLike)]
        finals = [name.with_name(name.name[1:].removesuffix(".partial")) if name.name.endswith(".partial") else name for name in names]
        where = next((name for name in finals if name != path and not name.is_relative_to("/proc/self/fd")), None)
        raise ResourceError(
            "path-unwritable",
            found=f"{path}: {error.strerror}" + (f" ({where})" if where is not None else ""),
            expected="a place where this user may write, and no directory in the place of a file",
            why="what was there before is unchanged",
            do=f"Choose another {option}, or make that place writable.",
        ) from error


@contextmanager
def full_disk_reported(path: Path, remove: Path | None = None) -> Iterator[None]:
    """Turns a full disk into ResourceError 'disk-full', whoever was writing, and removes what was being written after any OSError."""
    try:
        yield
    except Exception as error:
        if remove is not None and isinstance(error, OSError):
            remove.unlink(missing_ok=True)
        if not _is_full_disk(error):
            raise
        raise ResourceError(
            "disk-full",
            found=f"{_no_room_for(error)} while writing {path}",
            why="what was there before is unchanged",
            do="Free some space and run again; the run goes on where it stopped.",
        ) from error


class DirectoryLock:
    """Inside the with block no other process holds the lock of `directory`, which must exist. Raises RunError 'run-locked'.

    The operating system releases it when the process dies. The file `.lock` stays, and names the last holder.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptor: int | None = None

    def __enter__(self) -> DirectoryLock:
        assert self._descriptor is None, "a lock is not taken twice"
        descriptor = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise RunError(
                "run-locked",
                found=f"{self._directory} is in use by process {holder or 'unknown'}",
                why="two processes writing into one run would spoil both",
                do="Wait until it has ended or stop it, or choose another --out.",
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    _sync_file(path)


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _is_full_disk(error: Exception) -> bool:
    # Libraries that are not written in Python (safetensors) have errors of their own, with the system's text in them.
    return error.errno in _FULL if isinstance(error, OSError) else os.strerror(errno.ENOSPC) in str(error)


def _no_room_for(error: Exception) -> str:
    too_large = isinstance(error, OSError) and error.errno == errno.EFBIG
    return "the limit on the size of a file (ulimit -f) is reached" if too_large else "the disk is full"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _corrupt(path: Path, what: str) -> NoReturn:
    raise RunError(
        "run-corrupt",
        found=f"{path} {what}",
        expected="a file as Stillroom wrote it",
        do="Restore the file from a copy, or run again in a new directory.",
    )


def _size(count: int) -> str:
    """Decimal units, as disks are sold: 1.5 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
