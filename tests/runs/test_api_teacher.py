"""A teacher behind an endpoint, in whole runs: text from the fake endpoint, log-probabilities from a real llama.cpp server over the bundled teacher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

from endpoint_runs import KEY, REFUSED_TERMS, fake_recipe, keep_probe, served_recipe, settings
from servers import TEACHER
from stillroom.collect.store import RequestStore
from stillroom.core import durable
from stillroom.core.errors import CollectError, ModelError, RecipeError, SpendCapReached, SpendError
from stillroom.data import TransferSet
from stillroom.ledger import Ledger
from stillroom.models.loading import describe, load_model
from stillroom.models.local import LocalTeacher
from stillroom.models.tokenizers import load_tokenizer, vocabulary_of
from stillroom.runs import Recipe, plan, run
from stillroom.runs.collecting import store_identity
from stillroom.runs.endpoints import endpoint_of
from stillroom.runs.planning import prepare
from stillroom.targets.kinds import TargetRequest, TopKTargets
from stillroom.targets.store import TargetStore
from stillroom.testing.fake_endpoint import fake_endpoint


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_KEY", KEY)


def test_a_whole_run_on_text(tmp_path: Path) -> None:
    with fake_endpoint(settings()) as server:
        recipe = fake_recipe(tmp_path / "in", server.base_url)
        done = run(recipe, out=tmp_path / "run")
        bill = server.bill
        assert run(recipe, out=tmp_path / "run").state == "reported"
        assert server.bill.received == bill.received == 24 + 6  # prompts and items, each asked once
    report, transfer = done.report, TransferSet.load(done.transfer_set_path)
    assert report.collection is not None
    collected, evaluated = report.collection.rows["collect"], report.collection.rows["evaluate"]
    assert collected.requested == 24 == collected.accepted + sum(collected.rejected.values()) + sum(collected.failed.values()) + collected.pending
    assert collected.accepted == transfer.accepted
    assert collected.rejected == transfer.dropped
    assert (evaluated.requested, evaluated.accepted) == (6, 6)
    spent = report.collection.spent_money
    assert spent.value == pytest.approx(float(bill.exact_micro_dollars) / 1e6, abs=1e-12)
    assert report.making.money.unit == "USD"
    assert "absent" in report.fidelity.forward_kl_nats.model_dump()
    assert "absent" in report.cost.teacher.parameters.model_dump()
    assert report.cost.student.parameters.value > 0
    assert report.provenance.teacher["kind"] == "endpoint"
    entry = json.loads((done.directory / "ledger.jsonl").read_text().splitlines()[0])["entry"]
    assert entry["access"]["path"] == "self-hosted"
    assert entry["access"]["endpoint"] == recipe.teacher.endpoint.url
    assert Ledger.open(done.directory).count > 0
    assert "What was asked of the endpoint" in done.page_path.read_text(encoding="utf-8")
    for path in done.directory.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_items_that_the_endpoint_does_not_answer_are_no_wrong_answers(tmp_path: Path) -> None:
    """No model is scored on them, and they are told apart."""
    with fake_endpoint(settings(lies=frozenset({"content-filtered"}), lies_share=0.5)) as server:
        done = run(fake_recipe(tmp_path / "in", server.base_url), out=tmp_path / "run")
    assert done.report.collection is not None
    rows = done.report.collection.rows["evaluate"]
    assert rows.failed == {"content-filtered": rows.requested - rows.accepted}
    assert 0 < rows.accepted < rows.requested == 6
    scores = {name: json.loads((done.directory / "evals" / f"{name}.json").read_text()) for name in ("teacher", "student", "student_before")}
    prompts = [[item["prompt"] for item in found["items"]] for found in scores.values()]
    assert prompts[0] == prompts[1] == prompts[2]
    assert len(prompts[0]) == rows.accepted


def test_a_cap_ends_a_run_that_goes_on_when_it_is_raised(tmp_path: Path) -> None:
    with fake_endpoint(settings()) as server:
        small = fake_recipe(tmp_path / "in", server.base_url, collection={"max_tokens": 700})
        with pytest.raises(SpendCapReached, match=r"\d+ of 24 rows are bought, \d+ are missing") as caught:
            run(small, out=tmp_path / "run", until="collected")
        assert "collection.max_tokens" in caught.value.do
        bought = server.bill.done
        assert 0 < bought < 24
        large = fake_recipe(tmp_path / "in", server.base_url, collection={"max_tokens": 300_000})
        done = run(large, out=tmp_path / "run", until="collected")
        assert done.state == "collected"
        assert server.bill.done == 24
        assert json.loads(done.recipe_path.read_text())["collection"]["max_tokens"] == 300_000


_CHILD = "import sys; from pathlib import Path; from stillroom.runs import Recipe, run; run(Recipe.from_yaml(Path(sys.argv[1])), out=sys.argv[2], until='collected')"


def test_a_killed_collection_buys_nothing_twice(tmp_path: Path) -> None:
    with fake_endpoint(settings(latency_ms=60), process=True) as server:
        recipe = fake_recipe(tmp_path / "in", server.base_url, prompts=150, collection={"max_tokens": 10_000_000, "in_flight": 2})
        written = tmp_path / "recipe.yaml"
        written.write_text(json.dumps(recipe.model_dump(mode="json")))
        child = subprocess.Popen([sys.executable, "-c", _CHILD, str(written), str(tmp_path / "run")], env=os.environ | {"OMP_NUM_THREADS": "1"})
        begun = time.monotonic()
        while server.bill.done < 20 and time.monotonic() - begun < 120:
            assert child.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        run(recipe, out=tmp_path / "run", until="collected")
        bill = server.bill
    with RequestStore.open(tmp_path / "run" / "requests.sqlite", read_only=True) as store:
        spend, counts = store.spend(), store.counts()
        store.verify()
    assert counts.requested == 150
    assert counts.pending == 0
    # What was under way at the kill may be billed, and is reserved; nothing else was bought again.
    assert spend.settled.tokens <= bill.prompt_tokens + bill.completion_tokens <= spend.settled.tokens + spend.reserved.tokens
    assert bill.done <= 150 + spend.unknown


@pytest.mark.parametrize(("terms", "raised"), REFUSED_TERMS)
def test_a_teacher_that_may_not_be_learned_from_is_not_asked(tmp_path: Path, terms: dict[str, str], raised: type[Exception]) -> None:
    with fake_endpoint(settings()) as server:
        with pytest.raises(raised):
            run(fake_recipe(tmp_path / "in", server.base_url, terms=terms), out=tmp_path / "run")
        assert server.bill.received == 0


@pytest.mark.parametrize(
    ("changes", "raised", "says"),
    [
        ({"targets": {"kind": "hidden"}}, ModelError, "targets.kind: hidden"),
        ({"targets": {"kind": "drawn"}}, ModelError, "targets.kind: drawn"),
        ({"targets": {"kind": "top_k"}}, ModelError, "teacher.tokenizer is not given"),
        ({"targets": {"kind": "text", "live": True}}, ModelError, "targets.live"),
        ({"student": {"from_teacher": {"layers": [0]}}}, ModelError, "student.from_teacher"),
        ({"objective": {"terms": [{"divergence": "forward_kl"}]}, "targets": {}}, ModelError, "text alone"),
        ({"collection": None}, SpendError, "no cap"),
        ({"collection": {"max_money": 1.0}}, SpendError, "no price"),
    ],
)
def test_what_cannot_be_had_is_refused_by_the_plan(tmp_path: Path, changes: dict[str, Any], raised: type[Exception], says: str) -> None:
    with fake_endpoint(settings()) as server:
        with pytest.raises(raised, match=says):
            plan(fake_recipe(tmp_path / "in", server.base_url, **changes))
        assert server.bill.received == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher": {"model": "a", "endpoint": {"url": "http://localhost:1/v1", "model": "b"}}}, "exactly one of model, endpoint"),
        ({"teacher": {"model": "a", "tokenizer": "b"}}, "tokenizer"),
        ({"teacher": {"endpoint": {"url": "https://api.openai.com/v1", "model": "b"}}}, "api:openai"),
        ({"teacher": {"model": "a"}, "collection": {"max_tokens": 1}}, "teacher.endpoint"),
        ({"student": {"from_scratch": {"layers": 1, "width": 16, "heads": 2, "feed_forward": 32}}}, "teacher.tokenizer"),
    ],
)
def test_recipes_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        fake_recipe(tmp_path, "http://localhost:1/v1", **changes)


def test_a_key_in_the_url_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(CollectError) as caught:
        endpoint_of(fake_recipe(tmp_path, f"http://me:{KEY}@localhost:1/v1"))
    assert KEY not in str(caught.value)


# --- the real server ----------------------------------------------------------------------------------------------------------------------


def test_a_whole_run_on_verified_log_probabilities(tmp_path: Path, served: str) -> None:
    recipe = served_recipe(tmp_path / "in", served, prompts=40)
    assert plan(recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"terms": _CROSS_ENTROPY})})).signal.kind == "text"
    keep_probe(endpoint_of(recipe), tmp_path / "run" / "requests.sqlite")
    done = run(recipe, out=tmp_path / "run")
    report = done.report
    assert report.collection is not None
    assert report.collection.logprobs_verified == 40
    assert not report.collection.logprobs_demoted
    store = TargetStore.open(done.store_path)
    assert store.identity.codec.kind == "top_k"
    assert len(store) >= 39
    assert report.collection.rows["collect"].accepted == TransferSet.load(done.transfer_set_path).accepted >= 30


_CROSS_ENTROPY = Recipe.from_tree(
    {
        "teacher": {"model": "a"},
        "student": {"model": "b"},
        "prompts": {"path": "c"},
        "objective": {"terms": [{"divergence": "cross_entropy"}]},
    }
).objective.terms


# float16 on the disk moves a log-probability by 2^-11 of itself at most, and the server's arithmetic is not PyTorch's.
RELATIVE, ABSOLUTE_NATS, ABSOLUTE_TAIL = 2.0**-11, 1e-4, 1e-4


@pytest.mark.parametrize("prompts", [100, pytest.param(1_000, marks=pytest.mark.soak)])
def test_targets_that_are_served_are_those_of_the_same_teacher_here(tmp_path: Path, served: str, prompts: int) -> None:
    recipe = served_recipe(tmp_path / "in", served, prompts=prompts, collection={"max_tokens": 10_000_000, "in_flight": 16})
    keep_probe(endpoint_of(recipe), tmp_path / "run" / "requests.sqlite")
    done = run(recipe, out=tmp_path / "run", until="collected")
    assert not durable.read_json(done.bought_path)["demoted"]
    prepared = prepare(recipe, out=done.directory)
    store = TargetStore.open(done.store_path, store_identity(prepared))
    assert len(store) >= 0.97 * prompts  # prompts may share a record
    sequences, found = store.read(list(store.record_ids))
    assert isinstance(found, TopKTargets)
    description = describe(str(TEACHER))
    vocabulary = vocabulary_of(load_tokenizer(str(TEACHER)), description.shape.rows, description.end_ids)
    assert vocabulary.fingerprint == found.vocabulary
    local = LocalTeacher(load_model(description), description.ref, vocabulary)
    expected = local.targets(sequences, TargetRequest(kind="top_k", k=20))
    assert isinstance(expected, TopKTargets)
    full = local.log_probs(local.hidden_states(sequences), 1.0).numpy()
    ends = numpy.cumsum([len(sequence.scored_rows) for sequence in sequences]) - 1
    rows = numpy.setdiff1d(numpy.arange(len(full)), ends)  # of the end token the server says nothing
    there = numpy.take_along_axis(full[rows], numpy.asarray(found.ids_RK)[rows].astype(numpy.int64), 1)
    stored = numpy.asarray(found.log_probs_RK)[rows]
    worst = (numpy.abs(stored - there) - RELATIVE * numpy.abs(there)).max()
    tails = numpy.abs(numpy.exp(numpy.asarray(found.tail_log_mass_R)[rows]) - numpy.exp(expected.tail_log_mass_R.numpy()[rows])).max()
    print(
        f"{len(sequences)} answers, {len(rows)} rows: beyond float16's rounding at most {worst:.2e} nats, tails at most {tails:.2e}"
    )  # for pytest -s
    assert worst < ABSOLUTE_NATS
    assert tails < ABSOLUTE_TAIL
    assert (full[ends].argmax(-1) == [sequence.ids[-1] for sequence in sequences]).all()
