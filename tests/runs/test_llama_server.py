"""The real llama.cpp server over the bundled teacher, asked by the openai client."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from servers import TEACHER, llama_server
from stillroom.core.errors import StillroomError
from stillroom.models.serving import Server

openai = pytest.importorskip("openai")
pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
if not (TEACHER / "model.safetensors").is_file():
    pytest.skip("the bundled teacher is not there", allow_module_level=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with llama_server() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=60) as found:
        yield found


def ask(client: openai.OpenAI, server: Server, **more: object) -> openai.types.chat.ChatCompletion:
    options = {"temperature": 0, "max_tokens": 24} | more
    return client.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": "every weekday at 09:30"}], logprobs=True, top_logprobs=20, **options
    )


def test_it_answers_with_log_probabilities_that_are_a_distribution(client: openai.OpenAI, server: Server) -> None:
    answer = ask(client, server)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    places = choice.logprobs.content
    assert "".join(place.token for place in places) == choice.message.content
    assert answer.usage.completion_tokens >= len(places) > 0
    for place in places:
        assert len(place.top_logprobs) == 20
        assert math.fsum(math.exp(other.logprob) for other in place.top_logprobs) <= 1 + 1e-6
        assert place.token == place.top_logprobs[0].token


def test_it_cuts_and_gives_several(client: openai.OpenAI, server: Server) -> None:
    answer = ask(client, server, n=2, max_tokens=2, temperature=1)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.usage.completion_tokens == 2, "llama.cpp counts one of several choices; where it counts all, the probe's page must change"


def test_a_prompt_beyond_its_context_is_a_bad_request(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(model=server.model, messages=[{"role": "user", "content": "Monday " * 2000}])


def test_it_is_gone_after_the_block() -> None:
    with llama_server() as server:
        pid = server.process.pid
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)


def test_a_file_that_it_does_not_take_says_so(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(StillroomError) as caught, llama_server(tmp_path / "broken.gguf"):
        pass
    assert caught.value.code == "server-failed"
