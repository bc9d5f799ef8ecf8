"""Cards are found by plain paths, as the Hugging Face library would find them, and read without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.core.cards import cached_snapshot, declared_licence, hub_cache, hub_id_of, is_hub_id


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which owner/name has the commit 123abc as its main and as v1."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    (repository / "snapshots" / "123abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text("123abc")
    return tmp_path


@pytest.mark.parametrize("revision", [None, "main", "v1", "123abc"])
def test_a_snapshot_is_found_by_branch_tag_and_commit(cache: Path, revision: str | None) -> None:
    found = cached_snapshot("owner/name", revision)
    assert found == cache / "models--owner--name" / "snapshots" / "123abc"
    assert hub_id_of(found) == "owner/name"


@pytest.mark.parametrize(("name", "revision"), [("owner/other", None), ("owner/name", "v2"), ("owner/name", "../../../etc"), ("owner/name", "/etc")])
def test_what_is_not_in_the_cache_is_not_there(cache: Path, name: str, revision: str | None) -> None:
    assert cached_snapshot(name, revision) is None
    assert cached_snapshot("owner/name", None, kind="datasets") is None


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "/x"},
        {"XDG_CACHE_HOME": "/x", "HF_HOME": "/y"},
        {"HUGGINGFACE_HUB_CACHE": "/w"},
        {"HF_HOME": "/y", "HF_HUB_CACHE": "/z"},
    ],
)
def test_it_is_found_where_the_hub_library_looks(variables: dict[str, str]) -> None:
    environment = {"HOME": "/home/someone", "PATH": os.environ["PATH"]} | variables
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert str(hub_cache(environment)).replace(str(Path.home()), "/home/someone") == done.stdout.strip()


def test_a_directory_that_is_no_snapshot_has_no_id(tmp_path: Path) -> None:
    assert hub_id_of(tmp_path) is None
    assert hub_id_of(Path("/")) is None
    assert hub_id_of(tmp_path / "other--x" / "snapshots" / "1") is None


def test_what_a_hub_id_looks_like() -> None:
    assert all(map(is_hub_id, ["gpt2", "owner/name", "Qwen/Qwen2.5-0.5B-Instruct"]))
    assert not any(map(is_hub_id, ["/absolute/path", "./here", "a/b/c", "~/x", "", "owner/", "../x"]))


@given(st.binary(max_size=80))
def test_any_card_tells_or_does_not(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "README.md").write_bytes(b"---\nlicense: mit\n" + data + b"\n---\n")
    assert declared_licence(folder) is None or isinstance(declared_licence(folder), str)


@pytest.mark.parametrize("front", ["date: 2024-13-45", "license: " + "[" * 3000, "license: {a: b}", "license: N/A", "license: Other"])
def test_a_card_that_cannot_be_read_or_does_not_tell(tmp_path: Path, front: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert declared_licence(tmp_path) is None
