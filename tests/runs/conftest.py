"""What several runs share: a real llama.cpp server over the bundled teacher, one for each test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from servers import TEACHER, llama_server


@pytest.fixture(scope="session")
def served() -> Iterator[str]:
    """Its base URL. Its arithmetic is that of the teacher here, as near as llama.cpp has it."""
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    with llama_server(TEACHER, exact=True) as server:
        yield server.base_url
