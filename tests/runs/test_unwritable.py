"""Where a command may not write, and where there is no room: one error that names the place, exit code 2, and nothing half-written or lost."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from endpoint_runs import KEY, fake_recipe, settings
from helpers import save_tiny
from stillroom.collect.store import RequestStore
from stillroom.testing.fake_endpoint import fake_endpoint

Command = Callable[..., tuple[int, str, str]]
NOBODY = 65534
PAIR = '{"prompt": "two days", "answer": "P2D"}\n'


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom permissions bind, which they do not root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "student")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """An empty directory that only its owner, somebody else, may write in."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    directory = tmp_path / "read only"
    directory.mkdir(mode=0o555)
    yield directory
    directory.chmod(0o755)


def places(tmp_path: Path) -> dict[str, Path]:
    """Where no file can be: below a file, in a directory of the system's own, where a directory is, under a name that is too long."""
    (tmp_path / "a file").touch()
    (tmp_path / "a directory" / "x").mkdir(parents=True)
    return {
        "below a file": tmp_path / "a file" / "out",
        "of the system": Path("/proc/stillroom/out"),
        "a directory": tmp_path / "a directory",
        "too long": tmp_path / ("n" * 300),
    }


def tree(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def assert_refused(done: tuple[int, str, str], codes: tuple[str, ...] = ("path-unwritable",)) -> None:
    code, out, err = done
    assert code == 2, err
    assert any(err.startswith(f"[{one}]") or f"\n[{one}]" in err for one in codes), err
    assert "  do        " in err
    assert out == ""


@pytest.mark.parametrize("where", ["below a file", "of the system", "a directory", "too long"])
def test_a_place_where_no_file_can_be(where: str, tmp_path: Path, student: Path, stillroom: Command) -> None:
    place = places(tmp_path)[where]
    (tmp_path / "pairs.jsonl").write_text(PAIR)
    before = tree(tmp_path)
    pairs, good = tmp_path / "pairs.jsonl", tmp_path / "good.jsonl"
    # The system's own directories say that they have no room.
    assert_refused(stillroom("export", student, "--out", place), ("path-unwritable", "run-not-a-run", "disk-full"))
    assert_refused(stillroom("init", "--out", place), ("path-unwritable", "run-not-a-run"))
    assert_refused(stillroom("import", pairs, "--to", place))
    assert_refused(stillroom("import", pairs, "--to", good, "--rejected", place))
    with fake_endpoint() as server:
        options = ("--model", "fake-teacher", "--access", "weights", "--licence", "own", "--store", place)
        assert_refused(stillroom("probe", server.base_url, *options), ("path-unwritable", "request-store-other"))
        assert server.bill.received == 0
    assert_refused(stillroom("requests", place), ("request-store-other",))
    assert tree(tmp_path) == before


def test_a_directory_that_may_not_be_written(
    tmp_path: Path, read_only: Path, student: Path, stillroom: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_KEY", KEY)
    (tmp_path / "pairs.jsonl").write_text(PAIR)
    with fake_endpoint(settings()) as server:
        recipe = fake_recipe(tmp_path / "in", server.base_url)
        (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json())
        store = tmp_path / "in" / "requests.sqlite"
        with RequestStore.open(store):
            pass
        for path in (store, store.with_name("requests.sqlite.lock")):
            path.chmod(0o444)
        # The interpreter may lie where that user finds no module: each is loaded before.
        assert stillroom("collect", tmp_path / "recipe.yaml", "--out", tmp_path / "good")[0] == 0
        asked = server.bill.received
        for path in student.rglob("*"):
            path.chmod(0o644)
        before = tree(tmp_path)
        probe = (
            "probe",
            server.base_url,
            "--model",
            "fake-teacher",
            "--access",
            "weights",
            "--licence",
            "own",
            "--key-variable",
            "FAKE_KEY",
            "--store",
        )
        with unprivileged():
            for words in (
                ("export", student, "--out", read_only / "student.gguf"),
                ("init", "--out", read_only / "recipe.yaml"),
                ("import", tmp_path / "pairs.jsonl", "--to", read_only / "prompts.jsonl"),
                (*probe, read_only / "requests.sqlite"),
                (*probe, store),
                ("collect", tmp_path / "recipe.yaml", "--out", read_only),
                ("demo", "--out", read_only),
            ):
                assert_refused(stillroom(*words))
            assert_refused(stillroom("collect", tmp_path / "recipe.yaml", "--out", read_only / "run"), ("run-not-a-run",))
        assert server.bill.received == asked
    assert tree(tmp_path) == before


@pytest.mark.parametrize("where", ["below a file", "of the system", "a file"])
def test_a_run_where_no_directory_can_be(where: str, tmp_path: Path, stillroom: Command) -> None:
    place = places(tmp_path).get(where, tmp_path / "a file")
    with fake_endpoint(settings()) as server:
        recipe = fake_recipe(tmp_path / "in", server.base_url)
        (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json())
        before = tree(tmp_path)
        for command in ("run", "collect", "train", "report"):
            assert_refused(stillroom(command, tmp_path / "recipe.yaml", "--out", place), ("run-not-a-run",))
        assert server.bill.received == 0
    assert_refused(stillroom("demo", "--out", place), ("path-unwritable",))
    assert tree(tmp_path) == before


def test_imported_rows_are_not_written_over_one_another(tmp_path: Path, stillroom: Command) -> None:
    pairs, other = tmp_path / "pairs.jsonl", tmp_path / "other.jsonl"
    pairs.write_text(PAIR)
    assert_refused(stillroom("import", pairs, "--to", other, "--rejected", other))
    assert_refused(stillroom("import", pairs, "--to", pairs))
    assert_refused(stillroom("import", pairs, "--to", other, "--rejected", tmp_path / "in" / ".." / "pairs.jsonl"))
    assert pairs.read_text() == PAIR
    assert tree(tmp_path) == ["pairs.jsonl"]


@contextmanager
def files_no_larger_than(limit: int) -> Iterator[None]:
    """As `ulimit -f` does it: a write that would go beyond fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_the_size_of_files_leaves_nothing_half_written(tmp_path: Path, student: Path, stillroom: Command) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(PAIR.replace("two", str(number)) for number in range(2000)))
    (tmp_path / "kept.jsonl").write_text("of an earlier import")
    before = tree(tmp_path)
    with fake_endpoint() as server:
        probe = ("probe", server.base_url, "--model", "fake-teacher", "--access", "weights", "--licence", "own", "--store", tmp_path / "s.sqlite")
        for words, limit in (
            (("export", student, "--out", tmp_path / "student.gguf"), 16 << 10),
            (("import", tmp_path / "pairs.jsonl", "--to", tmp_path / "kept.jsonl"), 16 << 10),
            (("init", "--out", tmp_path / "recipe.yaml"), 1 << 10),
            (probe, 16 << 10),
        ):
            with files_no_larger_than(limit):
                assert_refused(stillroom(*words), ("disk-full",))
            assert [name for name in tree(tmp_path) if not name.startswith("s.sqlite")] == before
        assert server.bill.received == 0
        assert (tmp_path / "kept.jsonl").read_text() == "of an earlier import"
        assert stillroom(*probe)[0] == 0, "the store goes on where there is room again"
