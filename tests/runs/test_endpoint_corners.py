"""Corners of runs over an endpoint: log-probabilities that lie, given answers, the completions route, a shared store, comparing and publishing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from endpoint_runs import KEY, fake_recipe, keep_probe, served_recipe, settings
from servers import TEACHER, llama_server, relayed
from stillroom.collect.store import RequestStore
from stillroom.core.errors import RequestStoreError, SpendCapReached
from stillroom.data import TransferSet
from stillroom.runs import Recipe, compare, plan, run
from stillroom.runs.collecting import store_identity
from stillroom.runs.endpoints import endpoint_of
from stillroom.runs.planning import prepare
from stillroom.targets.kinds import TopKTargets
from stillroom.targets.store import TargetStore
from stillroom.testing.fake_endpoint import fake_endpoint
from tiny_run import write_rows


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_KEY", KEY)


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    with llama_server(TEACHER, exact=True) as server:
        yield server.base_url


def collect_lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "collect.jsonl").read_text(encoding="utf-8").splitlines()]


# --- log-probabilities that lie -------------------------------------------------------------------------------------------------------------


def double_the_mass(asked: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Of prompts of an even length: every alternative but the first is as likely as the first."""
    if asked.get("logprobs") and len(asked["messages"][-1]["content"]) % 2 == 0:
        for entry in answer["choices"][0]["logprobs"]["content"]:
            for other in entry["top_logprobs"][1:]:
                other["logprob"] = entry["top_logprobs"][0]["logprob"]
    return answer


def test_rows_whose_log_probabilities_lie_are_left_out_and_counted(tmp_path: Path, served: str) -> None:
    with relayed(served) as relay:
        recipe = served_recipe(tmp_path / "in", relay.base_url, prompts=24, evaluation={})
        keep_probe(endpoint_of(recipe), tmp_path / "run" / "requests.sqlite")
        relay.change = double_the_mass
        done = run(recipe, out=tmp_path / "run")
        asked = len(relay.asked)
        assert run(recipe, out=tmp_path / "run").state == "reported"
        assert len(relay.asked) == asked
    prompts = [json.loads(line)["prompt"] for line in Path(recipe.prompts.path or "").read_text().splitlines()]
    lied = [len(prompt) % 2 == 0 for prompt in prompts]
    assert 0 < sum(lied) < 24
    lines = collect_lines(done.directory)
    assert [line["left_out"] == "unverified-logprobs" for line in lines] == lied
    assert all((line["record_id"] is None) == wrong for line, wrong in zip(lines, lied, strict=True))
    collection = done.report.collection
    assert collection is not None
    assert collection.logprobs_demoted == {"mass-above-one": sum(lied)}
    assert collection.logprobs_verified == 24 - sum(lied)
    transfer = TransferSet.load(done.transfer_set_path)
    assert transfer.dropped["unverified-logprobs"] == collection.rows["collect"].rejected["unverified-logprobs"] == sum(lied)
    page = done.page_path.read_text(encoding="utf-8")
    assert "mass-above-one" in page
    with RequestStore.open(tmp_path / "run" / "requests.sqlite", read_only=True) as store:
        rows = [row for row in store.rows() if row.demoted is not None]
        assert len(rows) == sum(lied)
        assert all(store.raw(row.key) for row in rows), "what was not believed is kept as it came"
