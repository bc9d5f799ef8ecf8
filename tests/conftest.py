"""What holds for all tests: one thread a process, no network, no deadlines on a shared machine, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable

import pytest
from hypothesis import settings

# Before anything imports torch or transformers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # a hub id in a test must fail at once and not wait for a network
os.environ["STILLROOM_TERMS"] = os.path.join(tempfile.gettempdir(), "no-terms-of-a-user")  # what whoever runs the tests has confirmed is not asked

settings.register_profile("stillroom", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("stillroom")


@pytest.fixture
def stillroom(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: its exit code, and what it writes to both streams. It never shows a traceback."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from stillroom.cli import main

        monkeypatch.setattr(sys, "argv", ["stillroom", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as done:
            code = int(done.code or 0)
        written = capsys.readouterr()
        assert "Traceback" not in written.err
        return code, written.out, written.err

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest test first; skips tests marked `gpu` where there is no CUDA device, and says so."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
