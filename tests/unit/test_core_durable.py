"""What is on disk after every kind of accident: deaths at each write point, torn lines, a full disk, two processes."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.core import durable
from stillroom.core.errors import ResourceError, RunError

SRC = Path(durable.__file__).parents[2]


def child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


DYING = """
    import os, sys
    from pathlib import Path
    from stillroom.core import durable
    left = [int(sys.argv[1])]
    def die():
        left[0] -= 1
        if left[0] < 0:
            os._exit(77)
    durable.write_point = die
    here = Path(sys.argv[2])
"""


def deaths(action: str, prepare: Callable[[Path], None], root: Path) -> Iterator[Path]:
    """The directory after a death at the first, second, ... write point of `action`; ends with the one in which it lived."""
    for point in range(20):
        here = root / str(point)
        here.mkdir()
        prepare(here)
        done = child(DYING + textwrap.indent(textwrap.dedent(action), "    "), point, here)
        assert done.returncode in (0, 77), done.stderr
        yield here
        if done.returncode == 0:
            assert point >= 2, "no write points were met"
            return
    pytest.fail("it never came to its end")


def test_a_file_is_the_old_or_the_new_wherever_the_writer_dies(tmp_path: Path) -> None:
    seen = []
    for here in deaths("durable.write_bytes_atomic(here / 'file', b'new')", lambda here: durable.write_bytes_atomic(here / "file", b"old"), tmp_path):
        seen.append((here / "file").read_bytes())
        durable.write_bytes_atomic(here / "file", b"newer")  # what the dead left is in nobody's way
        assert [path.name for path in here.iterdir()] == ["file"]
    assert seen == [b"old", b"old", b"new", b"new"]


def test_an_append_is_there_or_not_wherever_the_writer_dies(tmp_path: Path) -> None:
    seen = []
    for here in deaths("durable.append_lines(here / 'log', ['b', 'c'])", lambda here: durable.append_lines(here / "log", ["a"]), tmp_path):
        seen.append(list(durable.read_lines(here / "log")))
    assert seen == [["a"], ["a", "b", "c"], ["a", "b", "c"], ["a", "b", "c"]]


def test_a_directory_is_the_old_or_the_new_wherever_the_writer_dies(tmp_path: Path) -> None:
    def prepare(here: Path) -> None:
        for name, text in (("final", "old"), ("partial", "new")):
            (here / name / "deep").mkdir(parents=True)
            (here / name / "deep" / "file").write_text(text)

    seen = []
    for here in deaths("durable.replace_directory(here / 'partial', here / 'final')", prepare, tmp_path):
        durable.settle_directory(here / "final")
        seen.append((here / "final" / "deep" / "file").read_text())
        if (here / "partial").exists():
            durable.replace_directory(here / "partial", here / "final")
        assert (here / "final" / "deep" / "file").read_text() == "new"
        assert [path.name for path in here.iterdir()] == ["final"]
    assert seen == ["old", "old", "new", "new"]


def test_a_directory_is_published_where_there_was_none(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "file").write_text("x")
    durable.replace_directory(tmp_path / "partial", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "x"
    assert not (tmp_path / "partial").exists()


@given(st.binary(max_size=200))
def test_a_torn_tail_is_cut_and_nothing_else(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        path.write_bytes(content)
        whole = content[: content.rfind(b"\n") + 1]
        assert durable.repair_tail(path) == len(content) - len(whole)
        assert path.read_bytes() == whole
        assert durable.repair_tail(path) == 0


def test_a_torn_tail_longer_than_what_is_read_at_once_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a\n" + b"x" * 200_000)
    assert list(durable.read_lines(path)) == ["a"]
    assert durable.repair_tail(path) == 200_000
    assert path.read_bytes() == b"a\n"
    path.write_bytes(b"x" * 200_000)
    assert durable.repair_tail(path) == 200_000
    assert path.read_bytes() == b""


def test_lines_that_are_not_there_are_none(tmp_path: Path) -> None:
    assert list(durable.read_lines(tmp_path / "log")) == []
    assert durable.repair_tail(tmp_path / "log") == 0
    durable.append_lines(tmp_path / "log", [])
    assert not (tmp_path / "log").exists()


def test_lines_come_back_as_they_went(tmp_path: Path) -> None:
    lines = ["", "é\u2028x", "\r", "{}"]
    durable.append_lines(tmp_path / "log", lines, sync=False)
    durable.append_lines(tmp_path / "log", ["last"])
    assert list(durable.read_lines(tmp_path / "log")) == [*lines, "last"]
    durable.keep_lines(tmp_path / "log", lambda line: len(line) < 4)
    assert list(durable.read_lines(tmp_path / "log")) == lines


def test_keeping_lines_drops_a_torn_one_and_minds_its_own_business(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a\nb\nto")
    durable.keep_lines(path, lambda line: True)
    assert path.read_bytes() == b"a\nb\n"
    before = path.stat().st_ino
    durable.keep_lines(path, lambda line: True)
    assert path.stat().st_ino == before
    durable.keep_lines(tmp_path / "none", lambda line: True)
    assert not (tmp_path / "none").exists()


def test_a_line_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"good\n\xff\n")
    with pytest.raises(RunError, match=r"line 2 is not UTF-8") as raised:
        list(durable.read_lines(tmp_path / "log"))
    assert raised.value.code == "run-corrupt"


def test_json_is_sorted_and_comes_back(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": {"é": True}}
    durable.write_json_atomic(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert durable.read_json(tmp_path / "x.json") == value
    assert text.index('"a"') < text.index('"b"')
    assert "é" in text
    assert text.endswith("}\n")


def test_nan_is_never_written(tmp_path: Path) -> None:
    durable.write_json_atomic(tmp_path / "x.json", 1)
    with pytest.raises(ValueError, match="JSON compliant"):
        durable.write_json_atomic(tmp_path / "x.json", [float("nan")])
    assert durable.read_json(tmp_path / "x.json") == 1


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[NaN]", b"[" * 100_000], ids=["missing", "empty", "half", "bytes", "nan", "deep"])
def test_json_that_cannot_be_read_is_one_clear_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=r"x\.json") as raised:
        durable.read_json(path)
    assert raised.value.code == "run-corrupt"


def test_a_secret_is_never_readable_by_others(tmp_path: Path) -> None:
    (tmp_path / ".secret.partial").write_text("left by a crash, with another mode")
    durable.write_bytes_atomic(tmp_path / "secret", b"x", mode=0o600)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def fail_after(monkeypatch: pytest.MonkeyPatch, count: int, number: int) -> None:
    """The disk takes `count` more bytes and then fails, as a real one does: with a short write first."""
    left = [count]
    write = os.write

    def filling(descriptor: int, data: bytes) -> int:
        if left[0] == 0:
            raise OSError(number, os.strerror(number))
        written = write(descriptor, data[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", filling)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    durable.write_bytes_atomic(tmp_path / "file", b"old")
    fail_after(monkeypatch, taken, errno.ENOSPC)
    with pytest.raises(ResourceError) as raised:
        durable.write_bytes_atomic(tmp_path / "file", b"something new")
    assert raised.value.code == "disk-full"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_full_disk_takes_back_half_an_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    durable.append_lines(tmp_path / "log", ["one"])
    fail_after(monkeypatch, taken, errno.EDQUOT)
    with pytest.raises(ResourceError):
        durable.append_lines(tmp_path / "log", ["two", "three"])
    monkeypatch.undo()
    assert (tmp_path / "log").read_bytes() == b"one\n"


def test_another_failure_of_the_disk_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_after(monkeypatch, 2, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        durable.write_bytes_atomic(tmp_path / "file", b"something new")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    durable.write_json_atomic(small_disk / "file", ["old"])
    durable.append_lines(small_disk / "log", ["one"])
    with pytest.raises(ResourceError):
        durable.write_bytes_atomic(small_disk / "file", b"x" * 2_000_000)
    with pytest.raises(ResourceError):
        durable.append_lines(small_disk / "log", ["x" * 2_000_000])
    assert durable.read_json(small_disk / "file") == ["old"]
    assert list(durable.read_lines(small_disk / "log")) == ["one"]
    assert sorted(path.name for path in small_disk.iterdir()) == ["file", "log"]
    with pytest.raises(ResourceError):
        durable.require_free_bytes(small_disk, 2_000_000, "targets")


def test_room_is_asked_for_where_the_path_will_be(tmp_path: Path) -> None:
    not_yet = tmp_path / "not" / "yet"
    free = durable.free_bytes(not_yet)
    assert free > 0
    durable.require_free_bytes(not_yet, 1, "a byte")
    with pytest.raises(ResourceError, match="TB for targets") as raised:
        durable.require_free_bytes(not_yet, 10**18, "targets")
    assert raised.value.code == "disk-full"
    assert not not_yet.exists()


# -- a large file, written by a library ------------------------------------------------------------------------------------

WRITE_WHOLE = """
    with durable.whole_file(here / "file") as place:
        with open(place, "wb") as stream:
            stream.write(b"new" * 1000)
            stream.flush()
            die()
"""


@pytest.mark.parametrize("nameless", [True, False])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_whole_file_is_old_or_new_wherever_the_writer_dies(old: bytes | None, nameless: bool, tmp_path: Path) -> None:
    def prepare(here: Path) -> None:
        if old is not None:
            (here / "file").write_bytes(old)

    action = WRITE_WHOLE if nameless else "\n    durable._nameless_file = lambda directory: None" + WRITE_WHOLE
    seen = set()
    for here in deaths(action, prepare, tmp_path):
        file = here / "file"
        seen.add(file.read_bytes() if file.exists() else None)
        left = {path.name for path in here.iterdir()} - {"file"}
        assert left <= {".file.partial"}
        # Without an older file nothing is ever left; with one, only in the moment of its replacement.
        assert not left or not nameless or (old is not None and (here / ".file.partial").read_bytes() == b"new" * 1000)
        with durable.whole_file(file) as place:
            place.write_bytes(b"newer")
        assert [(path.name, path.read_bytes()) for path in here.iterdir()] == [("file", b"newer")]
    assert seen == {old, b"new" * 1000}


@pytest.mark.parametrize("nameless", [True, False])
def test_a_whole_file_that_fails_leaves_what_was_there(nameless: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not nameless:
        monkeypatch.setattr(durable, "_nameless_file", lambda directory: None)
    (tmp_path / "file").write_bytes(b"old")

    def fail() -> None:
        with durable.whole_file(tmp_path / "file") as place:
            place.write_bytes(b"half")
            raise KeyError("a fault of the library")

    with pytest.raises(KeyError):
        fail()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_a_whole_file_on_a_full_disk(small_disk: Path) -> None:
    (small_disk / "file").write_bytes(b"old")

    def fill() -> None:
        with durable.whole_file(small_disk / "file") as place:
            place.write_bytes(b"x" * 2_000_000)

    with pytest.raises(ResourceError) as caught:
        fill()
    assert caught.value.code == "disk-full"
    assert [(path.name, path.read_bytes()) for path in small_disk.iterdir()] == [("file", b"old")]
    assert durable.free_bytes(small_disk) > 900_000


HOLD = """
    import sys, time
    from pathlib import Path
    from stillroom.core.durable import DirectoryLock
    with DirectoryLock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


def test_a_lock_keeps_others_out_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(SRC)}, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(RunError, match=f"process {holder.pid}") as raised, durable.DirectoryLock(tmp_path):
                pytest.fail("two hold one lock")
            assert raised.value.code == "run-locked"
        finally:
            holder.send_signal(signal.SIGKILL)
    with durable.DirectoryLock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    with durable.DirectoryLock(tmp_path):
        pass


def test_a_lock_is_released_by_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with durable.DirectoryLock(tmp_path):
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()


def test_sizes_are_written_as_disks_are_sold() -> None:
    sizes = {0: "0 B", 999: "999 B", 1500: "1.5 kB", 2_000_000: "2.0 MB", 1_500_000_000: "1.5 GB", 10**18: "1000000.0 TB"}
    assert {count: durable._size(count) for count in sizes} == sizes
