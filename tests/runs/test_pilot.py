"""`stillroom pilot`, what plan and report make of it, and the account of a whole run: against the fake endpoint's exact bill."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from endpoint_runs import KEY, PRICES, REFUSED_TERMS, fake_recipe, keep_probe, served_recipe, settings
from servers import TEACHER, llama_server
from stillroom.collect.store import RequestStore
from stillroom.collect.wire import Endpoint
from stillroom.core.errors import RecipeError, SpendCapReached
from stillroom.runs import Recipe, Run, pilot, plan, run
from stillroom.runs.endpoints import endpoint_of
from stillroom.runs.reporting import build_report
from stillroom.testing.account import Bill
from stillroom.testing.fake_endpoint import fake_endpoint

Stillroom = Callable[..., tuple[int, str, str]]
COLLECTION = {"max_tokens": 100_000}
# Reasoning at a price of its own; the fake endpoint puts a fixed number of reasoning tokens before each answer.
DEARER = f"{PRICES}    reasoning: 6.5\n    per_request: 0.000003\n"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "200")


def written(recipe: Recipe, path: Path) -> Path:
    path.write_text(json.dumps(recipe.model_dump(mode="json")), encoding="utf-8")
    return path


def same_bill(one: Bill, other: Bill) -> bool:
    """The same bodies, each as often, and the same tokens: whatever the order in which they were sent."""
    return (one.bodies, one.prompt_tokens, one.completion_tokens) == (other.bodies, other.prompt_tokens, other.completion_tokens)


def test_a_pilot_and_the_run_together_buy_what_the_run_alone_does(tmp_path: Path) -> None:
    with fake_endpoint(settings()) as alone, fake_endpoint(settings()) as piloted:
        run(fake_recipe(tmp_path / "alone", alone.base_url), out=tmp_path / "a", until="collected")
        recipe = fake_recipe(tmp_path / "piloted", piloted.base_url)
        found = pilot(recipe, out=tmp_path / "b", rows=8)
        assert piloted.bill.received == piloted.bill.done == 8
        assert found.spent.tokens == piloted.bill.prompt_tokens + piloted.bill.completion_tokens
        again = pilot(recipe, out=tmp_path / "b", rows=8)
        assert piloted.bill.received == 8, "what was bought was bought again"
        assert (again.pilot, again.spent.tokens) == (found.pilot, 0)
        pilot(recipe, out=tmp_path / "b", rows=10)
        assert piloted.bill.received == 10, "a larger pilot begins with the smaller one's rows"
        run(recipe, out=tmp_path / "b", until="collected")
        assert same_bill(piloted.bill, alone.bill)


def test_a_pilot_of_all_prompts_knows_the_bill(tmp_path: Path) -> None:
    """Without items nothing is left to be projected; what is left out is what the run leaves out."""
    with fake_endpoint(settings()) as server:
        recipe = fake_recipe(tmp_path / "in", server.base_url, evaluation={})
        found = pilot(recipe, out=tmp_path / "run", rows=1000).pilot
        bill = server.bill
        assert bill.done == found.rows == found.prompts == 24
        tokens = bill.prompt_tokens + bill.completion_tokens
        assert (found.tokens.low, found.tokens.value, found.tokens.high) == (tokens, tokens, tokens)
        assert found.money is not None
        assert found.money.low == found.money.high == pytest.approx(float(bill.exact_micro_dollars) / 1e6, rel=1e-12)
        assert found.cap_tokens_needed == tokens
        run(recipe, out=tmp_path / "run", until="collected")
    bought = json.loads((tmp_path / "run" / "requests.json").read_text())
    assert found.left_out == bought["rows"]["collect"]["rejected"]
    assert bought["projected_tokens"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert bought["pilot"]["tokens"]["value"] == bought["spent_tokens"] == bought["answers_tokens"] == tokens


@pytest.mark.parametrize(("terms", "raised"), REFUSED_TERMS)
def test_a_teacher_that_may_not_be_learned_from_is_not_asked(tmp_path: Path, terms: dict[str, str], raised: type[Exception]) -> None:
    with fake_endpoint(settings()) as server:
        with pytest.raises(raised):
            pilot(fake_recipe(tmp_path / "in", server.base_url, terms=terms), out=tmp_path / "run")
        assert server.bill.received == 0
        assert not (tmp_path / "run").exists()


def test_nothing_is_piloted_where_nothing_is_bought(tmp_path: Path) -> None:
    with fake_endpoint(settings()) as server:
        recipe = fake_recipe(tmp_path / "in", server.base_url)
        given = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"answers": "given"})})
        with pytest.raises(RecipeError, match="given with the prompts"):
            pilot(given, out=tmp_path / "run")
        assert server.bill.received == 0


def test_a_cap_ends_a_pilot_that_goes_on_when_it_is_raised(tmp_path: Path) -> None:
    with fake_endpoint(settings()) as server:
        with pytest.raises(SpendCapReached, match=r"\d of 8 rows are bought"):
            pilot(fake_recipe(tmp_path / "in", server.base_url, collection={"max_tokens": 400}), out=tmp_path / "run", rows=8)
        bill = server.bill
        assert 0 < bill.done < 8
        assert bill.prompt_tokens + bill.completion_tokens <= 400
        pilot(fake_recipe(tmp_path / "in", server.base_url, collection=COLLECTION), out=tmp_path / "run", rows=8)
        assert server.bill.done == 8


def test_a_pilot_of_a_collection_that_was_stopped_buys_its_own_rows_alone_and_says_which_cap_will_do(tmp_path: Path) -> None:
    with fake_endpoint(settings(fixed_length=True)) as server:
        with pytest.raises(SpendCapReached):
            run(fake_recipe(tmp_path / "in", server.base_url, collection={"max_tokens": 700}), out=tmp_path / "run", until="collected")
        stopped = server.bill.done
        found = pilot(fake_recipe(tmp_path / "in", server.base_url, collection=COLLECTION), out=tmp_path / "run", rows=6)
        assert stopped < server.bill.done <= stopped + 6 < 24
        needed = found.pilot.cap_tokens_needed
        recipe = fake_recipe(tmp_path / "in", server.base_url, collection={"max_tokens": needed})
        assert plan(recipe, out=tmp_path / "run").collection is not None
        run(recipe, out=tmp_path / "run", until="collected")  # what counts is below the upper end, and room for one call
        bill = server.bill
        assert bill.done == 24
        assert bill.prompt_tokens + bill.completion_tokens <= needed < 2 * (bill.prompt_tokens + bill.completion_tokens)


def test_a_plan_reads_the_pilot_of_its_own_collection_and_asks_nobody(tmp_path: Path) -> None:
    with fake_endpoint(settings()) as server:
        recipe, out = fake_recipe(tmp_path / "in", server.base_url), tmp_path / "run"

        def facts(changed: Recipe) -> Any:
            found = plan(changed, out=out).collection
            assert found is not None
            return found

        before = facts(recipe)
        assert (before.pilot, before.no_pilot, before.prompts, before.items) == (None, "none was made", 24, 6)
        assert before.cap_money == "1"
        found = pilot(recipe, out=out, rows=8)
        asked = server.bill.received
        assert facts(recipe).pilot == found.pilot
        assert found.pilot.tokens.high <= before.most_tokens
        # A cap, or how fast one buys, changes nothing of what is asked; a limit, the prompts or a price does.
        assert facts(fake_recipe(tmp_path / "in", server.base_url, collection={**recipe.buying.model_dump(), "in_flight": 3})).pilot == found.pilot
        longer = facts(fake_recipe(tmp_path / "in", server.base_url, generation={"max_new_tokens": 17, "sampling_temperature": 0.0}))
        assert (longer.pilot, "something else" in longer.no_pilot) == (None, True)
        unpriced = facts(fake_recipe(tmp_path / "in", server.base_url, collection=COLLECTION))
        assert (unpriced.pilot, "other prices" in unpriced.no_pilot) == (None, True)
        assert "something else" in facts(fake_recipe(tmp_path / "in", server.base_url, prompts=25)).no_pilot
        with RequestStore.open(out / "requests.sqlite") as store:
            store.remember("pilot", Endpoint.parse(server.base_url, "fake-teacher"), {"of": "a version that is not this one"})
        assert facts(fake_recipe(tmp_path / "in", server.base_url)).no_pilot == "none was made"
        assert server.bill.received == asked


def test_the_commands_say_it(stillroom: Stillroom, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with fake_endpoint(settings()) as server:
        recipe = written(fake_recipe(tmp_path / "in", server.base_url, collection={"max_tokens": 1100}), tmp_path / "recipe.yaml")
        assert "stillroom pilot RECIPE" in stillroom("plan", recipe, "--out", out)[1]
        code, page, err = stillroom("pilot", recipe, "--out", out, "--rows", "6")
        assert code == 0, err
        assert server.bill.received == 6
        assert "24 prompts and 6 evaluation items" in page
        assert "1,100 tokens may be reached; collection.max_tokens:" in page
        assert f"stillroom probe {server.base_url} --model fake-teacher --store {out / 'requests.sqlite'}" in " ".join(page.split())
        shown = stillroom("plan", recipe, "--out", out)[1]
        assert "by the pilot of" in shown
        assert "warning: the cap may be reached" in shown
        code, told, _ = stillroom("pilot", recipe, "--out", out, "--rows", "6", "--json")
        tree = json.loads(told)
        assert (code, tree["suffices"], tree["this_command"]["spent"]["tokens"], tree["rows"]) == (0, False, 0, 6)
        with RequestStore.open(out / "requests.sqlite", read_only=True) as store:
            key = next(store.rows()).key
        code, told, _ = stillroom("collect", recipe, "--out", out, "--explain", key[:20])
        assert (code, f"call {key} is answered" in told) == (0, True)
        assert stillroom("requests", out / "requests.sqlite", "--explain", key[:20])[1] == told
        assert stillroom("collect", recipe, "--out", out, "--explain", "no key")[0] == 2
        code, _, err = stillroom("collect", recipe, "--out", tmp_path / "nowhere", "--explain", key)
        assert (code, "request-store-other" in err) == (2, True)
        assert stillroom("pilot", recipe, "--out", out, "--rows", "0")[0] == 2
        assert server.bill.received == 6


def test_rows_with_log_probabilities_are_the_runs_own_too(tmp_path: Path) -> None:
    """A real server: what they cost is what they cost, and the files beside the store are there before the run begins."""
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    with llama_server(TEACHER, exact=True) as server:
        recipe, out = served_recipe(tmp_path / "in", server.base_url, prompts=14), tmp_path / "run"
        keep_probe(endpoint_of(recipe), out / "requests.sqlite")
        found = pilot(recipe, out=out, rows=5)
        assert (found.signal, found.probed, found.pilot.demoted, found.pilot.rows) == ("top_k", True, {}, 5)
        assert (out / "requests-logprobs").is_dir()
        done = run(recipe, out=out, until="collected")
    bought = json.loads(done.bought_path.read_text())
    assert (bought["verified"], bought["rows"]["collect"]["requested"]) == (14, 14)
    assert bought["pilot"]["asks"] == found.pilot.asks
    assert 0 < bought["answers_tokens"] < bought["spent_tokens"]  # the rest is the probe's
    with RequestStore.open(done.requests_path, read_only=True) as store:
        assert all(len(store.attempts(row.key)) == 1 for row in store.rows())


# --- the account of a whole run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Recipe, Bill]:
    """A pilot and a run at an endpoint that fails before and after the work and bills reasoning; prices of every kind; and its bill."""
    folder = tmp_path_factory.mktemp("faulty")
    faults = {"drop-after-work": 0.06, "cut-json": 0.06, "http-500": 0.06, "http-502-after-work": 0.06}
    patch = pytest.MonkeyPatch()
    patch.setenv("FAKE_KEY", KEY)
    with fake_endpoint(settings(faults=faults, most_faults=2, reasoning_tokens=3)) as server:
        recipe = fake_recipe(
            folder / "in",
            server.base_url,
            generation={"max_new_tokens": 24, "sampling_temperature": 0.0},
            hardware={"device": "cpu", "threads": 1, "price_per_hour": 0.0001, "currency": "USD"},
        )
        (folder / "in" / "prices.yaml").write_text(DEARER.format(url=server.base_url), encoding="utf-8")
        pilot(recipe, out=folder / "run", rows=10)
        done = run(recipe, out=folder / "run")
        bill = server.bill
    patch.undo()
    return done, recipe, bill


def micro_dollars(bill: Bill) -> Decimal:
    """By the prices of the file, with the three reasoning tokens of each request that was done."""
    reasoning = 3 * bill.done
    return bill.prompt_tokens + 4 * (bill.completion_tokens - reasoning) + Decimal("6.5") * reasoning + 3 * bill.done


def test_what_was_settled_and_what_is_reserved_hold_the_bill_between_them(faulty: tuple[Run, Recipe, Bill]) -> None:
    """In money to the last digit, and in tokens, from recipe to report."""
    done, _, bill = faulty
    bought, report = json.loads(done.bought_path.read_text()), done.report.collection
    assert report is not None
    settled, reserved, cap = (Decimal(bought[f"{name}_money"]) * 10**6 for name in ("spent", "reserved", "cap"))
    assert settled <= micro_dollars(bill) <= settled + reserved <= cap == 10**6
    tokens = bill.prompt_tokens + bill.completion_tokens
    assert bought["spent_tokens"] <= tokens <= bought["spent_tokens"] + bought["reserved_tokens"]
    assert bought["unknown"] > 0, "no request was lost after the work, and nothing was shown"
    for name in ("spent", "reserved"):
        assert getattr(report, f"{name}_money").value == float(bought[f"{name}_money"])
        assert getattr(report, f"{name}_tokens").value == bought[f"{name}_tokens"]
    assert report.answers_money == replace_source(report.answers_money, report.spent_money)  # there was no probe
    assert (report.projected_tokens.value, report.projected_money.value) == (0, 0)


def replace_source(number: Any, other: Any) -> Any:
    """The other number with this one's source."""
    return other.model_copy(update={"source": number.source})


def test_the_report_has_what_the_pilot_had_projected(faulty: tuple[Run, Recipe, Bill]) -> None:
    done, _, _ = faulty
    report, bought = done.report.collection, json.loads(done.bought_path.read_text())
    assert report is not None
    assert report.pilot_tokens.value == bought["pilot"]["tokens"]["value"]
    assert (report.pilot_money.n, report.pilot_money.unit) == (10, "USD")
    assert report.pilot_money.low <= report.pilot_money.value <= report.pilot_money.high
    page = done.page_path.read_text(encoding="utf-8")
    for words in ("A pilot had projected for them", "Still to be bought", "The student has paid for itself after"):
        assert words in page
    assert "by the pilot" not in page  # that is the plan's


def test_the_student_has_paid_for_itself_at_the_first_call_at_which_it_is_cheaper(faulty: tuple[Run, Recipe, Bill]) -> None:
    done, _, _ = faulty
    bought, training = json.loads(done.bought_path.read_text()), json.loads(done.trained_path.read_text())
    latency = json.loads((done.evals_path / "cost.json").read_text())["student"]["latency_p50_seconds"]["value"]
    per_second = Decimal("0.0001") / 3600
    spent = Decimal(bought["spent_money"])
    answered = sum(rows["accepted"] + sum(rows["rejected"].values()) for rows in bought["rows"].values())
    assert answered == 30
    once, teacher, student = spent + per_second * Decimal(str(training["seconds"])), spent / answered, per_second * Decimal(str(latency))
    report = done.report.collection
    assert report is not None
    calls = int(report.break_even_calls.value)
    assert calls > 0
    assert calls * teacher >= once + calls * student
    assert (calls - 1) * teacher < once + (calls - 1) * student


@pytest.mark.parametrize(
    ("hardware", "unpriced", "why"),
    [
        ({"price_per_hour": None}, False, "hardware.price_per_hour, in USD, is not given"),
        ({"currency": "EUR"}, False, "the machine's price is in EUR, and the teacher's in USD"),
        ({"price_per_hour": 1e6}, False, "no less than the teacher's"),
        ({}, True, "the teacher's price is not known"),
    ],
)
def test_why_it_is_not_known_when_a_student_has_paid_for_itself(
    faulty: tuple[Run, Recipe, Bill], tmp_path: Path, hardware: dict[str, Any], unpriced: bool, why: str
) -> None:
    done, recipe, _ = faulty
    other = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update=hardware)})
    kept = done.bought_path.read_bytes()
    try:
        if unpriced:
            tree = json.loads(kept) | {"currency": None, "spent_money": None, "reserved_money": None, "answers_money": None, "projected_money": None}
            done.bought_path.write_text(json.dumps(tree))
        report = build_report(replace(done, recipe=other))
    finally:
        done.bought_path.write_bytes(kept)
    assert report.collection is not None
    assert why in report.collection.break_even_calls.model_dump()["absent"]
