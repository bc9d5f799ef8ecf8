"""Corners of runs over an endpoint: log-probabilities that lie, given answers, the completions route, a shared store, comparing and publishing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml

from endpoint_runs import KEY, fake_recipe, keep_probe, served_recipe, settings
from helpers import save_tiny, tiny_tokenizer
from servers import TEACHER, relayed
from stillroom.collect.store import RequestStore
from stillroom.core.errors import ModelError, RequestStoreError, SpendCapReached
from stillroom.data import TransferSet
from stillroom.runs import Recipe, Run, compare, plan, run
from stillroom.runs.collecting import store_identity
from stillroom.runs.directory import REQUESTS
from stillroom.runs.endpoints import endpoint_of
from stillroom.runs.planning import prepare
from stillroom.targets.kinds import TopKTargets
from stillroom.targets.store import TargetStore
from stillroom.testing.fake_endpoint import Running, fake_endpoint
from tiny_run import questions, write_rows


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_KEY", KEY)


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_items(recipe: Recipe) -> Recipe:
    return Recipe.from_tree(recipe.model_dump(mode="json") | {"evaluation": {}})


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
        recipe = without_items(served_recipe(tmp_path / "in", relay.base_url, prompts=24))
        keep_probe(endpoint_of(recipe), tmp_path / "run" / REQUESTS)
        relay.change = double_the_mass
        done = run(recipe, out=tmp_path / "run")
        asked = len(relay.asked)
        assert run(recipe, out=tmp_path / "run").state == "reported"
        assert len(relay.asked) == asked
    lied = [len(line["prompt"]) % 2 == 0 for line in json_lines(tmp_path / "in" / "prompts.jsonl")]
    assert 0 < sum(lied) < 24
    lines = json_lines(done.collect_path)
    assert [line["left_out"] == "unverified-logprobs" for line in lines] == lied
    assert all((line["record_id"] is None) == wrong for line, wrong in zip(lines, lied, strict=True))
    collection = done.report.collection
    assert collection is not None
    assert collection.logprobs_demoted == {"mass-above-one": sum(lied)}
    assert collection.logprobs_verified == 24 - sum(lied)
    transfer = TransferSet.load(done.transfer_set_path)
    assert transfer.dropped["unverified-logprobs"] == collection.rows["collect"].rejected["unverified-logprobs"] == sum(lied)
    assert any(one.what == "transfer set" and one.chosen == f"{sum(lied)} records left out" for one in done.report.provenance.decisions)
    assert f"{sum(lied)} mass above one" in done.page_path.read_text(encoding="utf-8")
    with RequestStore.open(done.requests_path, read_only=True) as store:
        rows = [row for row in store.rows() if row.demoted is not None]
        assert len(rows) == sum(lied)
        assert all(store.raw(row.key) for row in rows), "what was not believed is kept as it came"


# --- answers that are given -----------------------------------------------------------------------------------------------------------------


def test_given_answers_are_not_bought_and_items_are(tmp_path: Path) -> None:
    with fake_endpoint(settings()) as server:
        recipe = fake_recipe(tmp_path / "in", server.base_url)
        pairs = [{"prompt": text, "answer": f"answer {number}"} for number, text in enumerate(questions(24))]
        given = {"path": str(write_rows(tmp_path / "in" / "pairs.jsonl", pairs)), "answers": "given"}
        recipe = Recipe.from_tree(recipe.model_dump(mode="json") | {"prompts": given})
        done = run(recipe, out=tmp_path / "run", until="collected")
        assert server.bill.received == 0
        done = run(recipe, out=tmp_path / "run")
        assert server.bill.received == server.bill.done == 6
        bill = server.bill
    report = done.report
    assert report.collection is not None
    assert list(report.collection.rows) == ["evaluate"]
    assert report.collection.rows["evaluate"].accepted == 6
    assert report.collection.spent_money.value == pytest.approx(float(bill.exact_micro_dollars) / 1e6, abs=1e-12)
    assert report.making.teacher_tokens.value == 0
    assert report.making.prompts.value == 24
    collected = [line["entry"] for line in json_lines(done.directory / "ledger.jsonl") if line["entry"]["stage"] == "collect"]
    assert len(collected) == 24
    assert all(entry["response"] is None for entry in collected), "no response of the endpoint's is behind them"
    assert TransferSet.load(done.transfer_set_path).accepted == 24


# --- the completions route ------------------------------------------------------------------------------------------------------------------


def by_completions(recipe: Recipe, tokenizer: str | None) -> Recipe:
    tree = recipe.model_dump(mode="json")
    tree["teacher"]["endpoint"]["route"] = "completions"
    tree["teacher"]["tokenizer"] = tokenizer
    return Recipe.from_tree(tree)


def test_the_completions_route_with_text_alone(tmp_path: Path) -> None:
    with fake_endpoint(settings()) as server:
        done = run(by_completions(without_items(fake_recipe(tmp_path / "in", server.base_url)), None), out=tmp_path / "run", until="collected")
        paths = {request.path for request in server.requests}
        assert server.bill.done == 24
    assert paths == {"/v1/completions"}
    assert any(line["answer"] for line in json_lines(done.collect_path))
    assert TransferSet.load(done.transfer_set_path).accepted > 0


def targets_of(done: Run, recipe: Recipe) -> dict[tuple[int, ...], TopKTargets]:
    """By the sequence that they are of."""
    store = TargetStore.open(done.store_path, store_identity(prepare(recipe, out=done.directory)))
    found = {}
    for record in store.record_ids:
        (sequence,), targets = store.read([record])
        assert isinstance(targets, TopKTargets)
        found[tuple(sequence.ids)] = targets
    return found


def test_both_routes_give_the_same_targets(tmp_path: Path, served: str) -> None:
    """Of prompts that are rendered alike: by the server's template on one route, by ours on the other."""
    with relayed(served) as relay:
        chat = without_items(served_recipe(tmp_path / "in", relay.base_url, prompts=24))
        plain = by_completions(chat, str(TEACHER))
        found = {}
        for name, recipe in (("chat", chat), ("completions", plain)):
            keep_probe(endpoint_of(recipe), tmp_path / name / REQUESTS)
            asked = len(relay.asked)
            done = run(recipe, out=tmp_path / name, until="collected")
            assert json.loads(done.plan_path.read_text())["signal"]["kind"] == "top_k", name
            found[name] = targets_of(done, recipe)
            assert all(isinstance(body.get("prompt"), list) == (name == "completions") for body in relay.asked[asked:])
    assert len(found["chat"]) >= 20
    assert found["chat"].keys() == found["completions"].keys()
    for ids, targets in found["chat"].items():
        other = found["completions"][ids]
        for one, two in ((targets.log_probs_RK, other.log_probs_RK), (targets.tail_log_mass_R, other.tail_log_mass_R)):
            assert numpy.allclose(numpy.exp(one), numpy.exp(two), atol=1e-3)


# --- a store that several use ---------------------------------------------------------------------------------------------------------------


def sharing(recipe: Recipe, store: Path, **changes: Any) -> Recipe:
    tree = recipe.model_dump(mode="json") | changes
    tree["collection"] |= {"store": str(store)}
    return Recipe.from_tree(tree)


def test_what_another_run_bought_into_the_store_is_not_bought_again(tmp_path: Path) -> None:
    shared = tmp_path / "shared" / "store.sqlite"
    with fake_endpoint(settings()) as server:
        first = sharing(without_items(fake_recipe(tmp_path / "in", server.base_url)), shared)
        one = run(first, out=tmp_path / "one", until="collected")
        assert server.bill.done == 24
        two = run(first, out=tmp_path / "two", until="collected")
        assert server.bill.received == 24
        longer = sharing(first, shared, generation=first.generation.model_dump() | {"max_new_tokens": 20})
        run(longer, out=tmp_path / "three", until="collected")
        assert server.bill.done == 48, "another setting is another call"
        more = sharing(first, shared, prompts={"path": str(write_rows(tmp_path / "more.jsonl", [{"prompt": text} for text in questions(30)]))})
        four = run(more, out=tmp_path / "four", until="collected")
        assert server.bill.done == 54, "the prompts that are new"
    assert not one.requests_path.exists()
    assert [line["answer"] for line in json_lines(one.collect_path)] == [line["answer"] for line in json_lines(two.collect_path)]
    assert TransferSet.load(one.transfer_set_path).ids == TransferSet.load(two.transfer_set_path).ids
    assert len(json_lines(four.collect_path)) == 30
    with RequestStore.open(shared, read_only=True) as store:
        store.verify()


def test_what_another_recipe_left_waiting_is_left_to_it(tmp_path: Path) -> None:
    """Its calls are not bought under this recipe's caps, and those of another model are no mistake."""
    shared = tmp_path / "store.sqlite"
    with fake_endpoint(settings(models=("fake-teacher", "another"))) as server:
        first = without_items(fake_recipe(tmp_path / "in", server.base_url, collection={"max_tokens": 700}))
        with pytest.raises(SpendCapReached, match="of 24 rows are bought"):
            run(sharing(first, shared), out=tmp_path / "one", until="collected")
        bought = server.bill.done
        assert 0 < bought < 24
        other = without_items(fake_recipe(tmp_path / "other", server.base_url, prompts=5, collection={"max_tokens": 50_000}))
        tree = other.model_dump(mode="json")
        tree["teacher"]["endpoint"]["model"] = "another"
        for recipe, name in ((Recipe.from_tree(tree), "two"), (sharing(other, shared, generation={"max_new_tokens": 12}), "three")):
            run(sharing(recipe, shared), out=tmp_path / name, until="collected")
        assert server.bill.done == bought + 10
        first = without_items(fake_recipe(tmp_path / "in", server.base_url, collection={"max_tokens": 50_000}))
        assert run(sharing(first, shared), out=tmp_path / "one", until="collected").state == "collected"
        assert server.bill.done == 34


def test_a_probe_that_was_made_before_is_taken_from_the_store(tmp_path: Path, served: str) -> None:
    shared = tmp_path / "probed.sqlite"
    with relayed(served) as relay:
        recipe = sharing(without_items(served_recipe(tmp_path / "in", relay.base_url, prompts=6)), shared)
        with pytest.raises(ModelError, match="no probe of the endpoint is stored"):
            plan(recipe)
        keep_probe(endpoint_of(recipe), shared)
        asked = len(relay.asked)
        assert plan(recipe).signal.kind == "top_k"
        assert len(relay.asked) == asked
        assert run(recipe, out=tmp_path / "run", until="collected").state == "collected"
        assert len(relay.asked) == asked + 6
        # The same ids would mean other tokens.
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        student = save_tiny(tmp_path / "student", tokenizer=tokenizer)
        tree = recipe.model_dump(mode="json")
        tree["teacher"]["tokenizer"], tree["student"] = str(tmp_path / "tokenizer"), {"model": str(student)}
        tree["terms"]["base_licence"] = "Apache-2.0"
        with pytest.raises(RequestStoreError, match="a tokenizer whose fingerprint") as caught:
            run(Recipe.from_tree(tree), out=tmp_path / "other", until="collected")
        assert caught.value.code == "request-store-other"
        assert len(relay.asked) == asked + 6


_CHILD = "import sys; from pathlib import Path; from stillroom.cli import main; sys.argv = ['stillroom', 'collect', sys.argv[1], '--out', sys.argv[2]]; main()"


def test_two_processes_with_one_store(tmp_path: Path) -> None:
    """The second says who has it, and loses nothing; when the first is done it buys nothing either."""
    shared = tmp_path / "store.sqlite"
    with fake_endpoint(settings()) as server:
        recipe = sharing(without_items(fake_recipe(tmp_path / "in", server.base_url)), shared)
        written = tmp_path / "recipe.yaml"
        written.write_text(recipe.model_dump_json())
        with RequestStore.open(shared):
            child = subprocess.run([sys.executable, "-c", _CHILD, str(written), str(tmp_path / "two")], capture_output=True, text=True, check=False)
            assert child.returncode == 2
            assert "[request-store-locked]" in child.stderr
            assert "Traceback" not in child.stderr
            assert f"process {os.getpid()}" in child.stderr
            assert server.bill.received == 0
        assert run(recipe, out=tmp_path / "one", until="collected").state == "collected"
        assert run(recipe, out=tmp_path / "two", until="collected").state == "collected"
        assert server.bill.received == 24


# --- comparing and publishing ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    """A finished run, and its endpoint."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patched, fake_endpoint(settings()) as server:
        patched.setenv("FAKE_KEY", KEY)
        intent = {"release": "weights", "student_name": "house-of-bees"}
        recipe = without_items(fake_recipe(folder / "in", server.base_url, intent=intent))
        yield server, run(recipe, out=folder / "run").directory


def test_comparing_buys_what_was_not_asked_before(finished: tuple[Running, Path], stillroom: Callable[..., tuple[int, str, str]]) -> None:
    server, directory = finished
    before = server.bill.received
    (one,) = compare(Run.open(directory), prompt="half past nine")
    assert one.prompt == "half past nine"
    assert one.teacher
    assert server.bill.received == before + 1
    assert compare(Run.open(directory), prompt="half past nine") == [one]
    assert server.bill.received == before + 1
    code, said, _ = stillroom("compare", directory, "--prompt", "half past nine")
    assert code == 0
    assert one.teacher[:20] in said
    path = directory / "recipe.json"
    kept = path.read_text()
    tree = json.loads(kept)
    tree["collection"] |= {"max_money": 0.0}
    path.write_text(json.dumps(tree))
    try:
        code, _, told = stillroom("compare", directory, "--prompt", "another prompt")
        assert code == 2
        assert "[spend-cap-reached]" in told
        assert stillroom("compare", directory, "--prompt", "half past nine")[0] == 0, "what is there needs no money"
    finally:
        path.write_text(kept)
    assert server.bill.received == before + 1


def test_an_answer_that_did_not_come_is_no_empty_answer(finished: tuple[Running, Path]) -> None:
    _, directory = finished
    path = directory / "recipe.json"
    kept = path.read_text()
    with fake_endpoint(settings(lies=frozenset({"content-filtered"}))) as refusing:
        tree = json.loads(kept)
        tree["teacher"]["endpoint"]["url"] = refusing.base_url
        tree["collection"] |= {"max_money": None, "prices": None, "max_tokens": 50_000}
        path.write_text(json.dumps(tree))
        try:
            (one,) = compare(Run.open(directory), prompt="half past nine")
        finally:
            path.write_text(kept)
        assert refusing.bill.received == 1
    assert one.teacher == "(no answer)"


def test_publishing_names_the_endpoints_model(finished: tuple[Running, Path], stillroom: Callable[..., tuple[int, str, str]]) -> None:
    server, directory = finished
    before = server.bill.received
    code, said, told = stillroom("publish", directory)
    assert code == 0, told
    assert "NOT MET" not in said
    assert stillroom("publish", directory, "--check")[0] == 0
    assert server.bill.received == before, "publishing asks nothing of the endpoint"
    student = directory / "student"
    card = (student / "README.md").read_text(encoding="utf-8")
    (teacher,) = yaml.safe_load(card.split("---\n")[1])["teachers"]
    records = TransferSet.load(directory / "transfer_set.json").accepted
    assert teacher["source"] == "fake-teacher"
    assert 0 < teacher["records"] <= records
    assert "weights_sha256" not in teacher
    assert "revision" not in teacher
    assert "fake-teacher, which answered through an endpoint" in card
    assert "- teacher fake-teacher: apache-2.0@" in (student / "NOTICE").read_text(encoding="utf-8")
    for path in student.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert KEY.encode() not in data, path
            assert server.base_url.encode() not in data, path
    (student / "NOTICE").unlink()
    assert stillroom("publish", directory, "--check")[0] == 2
    assert stillroom("publish", directory)[0] == 0
