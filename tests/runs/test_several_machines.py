"""One collection bought by several machines: each a range of the calls, then their stores are one, and the run goes on without buying anything again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from endpoint_runs import KEY, fake_recipe, keep_probe, served_recipe, settings
from stillroom.cli.main import app
from stillroom.collect.machines import merge_stores
from stillroom.collect.store import RequestStore
from stillroom.core.errors import RecipeError, RequestStoreError
from stillroom.runs import Recipe, Run, collect_shard, run
from stillroom.runs.endpoints import endpoint_of
from stillroom.testing.fake_endpoint import fake_endpoint
from tiny_run import tiny_recipe


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_KEY", KEY)


def digest(done: Run) -> dict[str, str]:
    """Of every file of the target store, and of the prompts and records that are learned from."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(done.store_path.rglob("*")) if path.is_file()}
    lines = [json.loads(line) for line in done.collect_path.read_text(encoding="utf-8").splitlines()]
    return files | {"collected": str([(line["prompt_id"], line["record_id"], line["answer"], line["left_out"]) for line in lines])}


def divided(recipe: Recipe, folder: Path, count: int, begin: Callable[[Path], object] = lambda store: None) -> Run:
    """The run of what `count` machines bought."""
    stores = []
    for index in range(count):
        store = folder / f"machine-{index}" / "requests.sqlite"
        begin(store)
        collect_shard(recipe, out=store.parent, index=index, count=count)
        stores.append(store)
    merge_stores(stores, folder / "run" / "requests.sqlite")
    assert merge_stores(stores, folder / "run" / "requests.sqlite").answers == 0  # once
    return run(recipe, out=folder / "run", until="collected")


def test_two_machines_collect_what_one_does_and_nothing_is_bought_again(tmp_path: Path) -> None:
    with fake_endpoint(settings()) as server:
        recipe = fake_recipe(tmp_path / "in", server.base_url)
        alone = run(recipe, out=tmp_path / "alone", until="collected")
        before = server.bill
        together = divided(recipe, tmp_path, 2)
        bill = server.bill
    assert bill.received == 2 * before.received == 2 * 24
    assert digest(together) == digest(alone)
    with RequestStore.open(together.requests_path) as store:
        store.verify()
        assert store.spend().settled.money == int((bill.exact_micro_dollars - before.exact_micro_dollars) * 10**6)
        assert store.counts().requested == 24
    bought = json.loads(together.bought_path.read_text())
    assert bought["rows"]["collect"]["requested"] == 24


def test_log_probabilities_come_along(tmp_path: Path, served: str) -> None:
    recipe = served_recipe(tmp_path / "in", served, prompts=16)
    keep_probe(endpoint_of(recipe), tmp_path / "probed.sqlite")

    def begin(store: Path) -> None:
        store.parent.mkdir(parents=True)
        shutil.copy(tmp_path / "probed.sqlite", store)

    together = divided(recipe, tmp_path, 2, begin)
    with RequestStore.open(together.requests_path) as store:
        shards, endpoint = store.shards(), endpoint_of(recipe)
        assert store.recall("probe", endpoint) is not None
        answers = [row.answer.text for row in store.rows() if row.answer is not None and row.row.startswith("collect/")]
        attempts = store.spend().attempts
    assert len(shards) == 2
    assert sorted(path.name for path in (tmp_path / "run" / "requests-logprobs").iterdir()) == shards
    assert len(answers) == 16
    begin(tmp_path / "alone" / "requests.sqlite")
    assert digest(run(recipe, out=tmp_path / "alone", until="collected")).keys() == digest(together).keys()
    with RequestStore.open(tmp_path / "alone" / "requests.sqlite") as store:
        # The probe's calls are in both machines' stores, as copies, and count once.
        assert store.spend().attempts == attempts
        assert sorted(row.answer.text for row in store.rows() if row.answer is not None) == sorted(answers)
    shutil.rmtree(tmp_path / "machine-1" / "requests-logprobs")
    with pytest.raises(RequestStoreError, match=r"not there[\s\S]*nothing was changed[\s\S]*from that machine too"):
        merge_stores([tmp_path / f"machine-{index}" / "requests.sqlite" for index in range(2)], tmp_path / "new.sqlite")
    assert not (tmp_path / "new.sqlite").exists()


def test_stores_that_are_not_of_one_collection(tmp_path: Path) -> None:
    stores = {}
    with fake_endpoint(settings(models=("fake-teacher", "another"))) as server:
        for model in ("fake-teacher", "another"):
            tree = fake_recipe(tmp_path / model, server.base_url, prompts=6, collection={"max_tokens": 100_000}).model_dump(mode="json")
            tree["teacher"]["endpoint"]["model"] = model
            stores[model] = tmp_path / f"{model}-run" / "requests.sqlite"
            collect_shard(Recipe.from_tree(tree), out=stores[model].parent, index=0, count=1)
    with pytest.raises(RequestStoreError, match=r"'fake-teacher' at[\s\S]*'another' at[\s\S]*nothing was changed"):
        merge_stores([stores["fake-teacher"], stores["another"]], tmp_path / "into.sqlite")
    with pytest.raises(RequestStoreError, match="no file"):
        merge_stores([stores["fake-teacher"], tmp_path / "nowhere.sqlite"], tmp_path / "into.sqlite")
    with pytest.raises(RequestStoreError, match="among the stores"):
        merge_stores([stores["fake-teacher"]], stores["fake-teacher"])
    assert not (tmp_path / "into.sqlite").exists()


def test_answers_that_differ_are_told_and_the_first_stay(tmp_path: Path) -> None:
    with fake_endpoint(settings(fresh_draws=True)) as server:
        recipe = fake_recipe(tmp_path / "in", server.base_url, prompts=6, generation={"max_new_tokens": 16, "sampling_temperature": 1.0})
        for name in ("a", "b"):
            collect_shard(recipe, out=tmp_path / name, index=0, count=1)
    stores = [tmp_path / name / "requests.sqlite" for name in ("a", "b")]
    told = CliRunner().invoke(app, ["merge", *map(str, stores), "--into", str(tmp_path / "run" / "requests.sqlite")])
    assert told.exit_code == 2, told.output
    assert "request-stores-differ" in told.output
    with RequestStore.open(stores[0]) as first, RequestStore.open(tmp_path / "run" / "requests.sqlite") as merged:
        merged.verify()
        assert [(row.row, row.answer) for row in merged.rows()] == [(row.row, row.answer) for row in first.rows()]
        assert merged.spend().attempts == 12  # both were paid


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3", ""])
def test_a_shard_that_is_none(shard: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{}")
    told = CliRunner().invoke(app, ["collect", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--shard", shard])
    assert told.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_shard_is_not_bought_where_a_call_is_to_be_explained(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{}")
    told = CliRunner().invoke(app, ["collect", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--shard", "1/2", "--explain", "ab"])
    assert told.exit_code == 2
    assert "does not go with --shard" in told.output


def test_of_processes_that_were_started_together_one_buys(
    tmp_path: Path, stillroom: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    (tmp_path / "recipe.yaml").write_text("{}")
    for what in (("--shard", "1/2"), ("--explain", "ab")):
        assert stillroom("collect", tmp_path / "recipe.yaml", "--out", tmp_path / "run", *what) == (0, "", "")


def test_nothing_is_divided_that_is_not_asked_of_an_endpoint(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing is asked of an endpoint"):
        collect_shard(Recipe.from_tree(tiny_recipe(tmp_path)), out=tmp_path / "run", index=0, count=2)
