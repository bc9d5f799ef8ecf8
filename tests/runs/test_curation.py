"""Curation and redaction in whole runs: what the recipe says is what happens, everything that is left out is told, and secrets stay where they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripted import Scripted, asked_recipe, scripted_endpoint
from stillroom import demo
from stillroom.collect.store import RequestStore
from stillroom.core.errors import DataError, ModelError
from stillroom.data import Prompt, TransferSet
from stillroom.data.curation import Row
from stillroom.data.decontamination import Decontamination, EvaluationItem, hits_by_item
from stillroom.data.redaction import Redactor
from stillroom.runs import Recipe, compare, plan, run
from stillroom.runs.directory import Run
from tiny_run import tiny_recipe, write_rows

KEY = "sk-planted-0123456789abcdef"
ANSWERS = {
    "Capital of Peru?": "Lima.",
    "capital of peru": "LIMA",
    "Capital of Chile?": ("The capital of Ch", "length"),
    "Who are you?": "I am a large language model.",
    "Open this lock.": "I'm sorry, but I can't help with that.",
    "Capital of Bolivia?": "Sucre.",
    "Capital of Ecuador?": "the city of quito",
    "Say nothing.": "\u200b \u200b",
    "Capital of France?": "Paris.",
    "Capital of Italy?": "Rome.",
}
CHECKS = """\
def capitalised(prompt, answer):
    if "france" in prompt.lower():
        raise RuntimeError("not about France")
    return answer[:1].isupper() or "begins with a small letter \\ud800"
"""


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIPTED_KEY", KEY)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ITEMS = [{"prompt": "Capital of  BOLIVIA", "answer": "Sucre."}, {"prompt": "Capital of Spain?", "answer": "Madrid."}]


def test_what_is_left_out_is_told_by_step_and_by_item(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "checks.py").write_text(CHECKS)
    steps = ["truncation", "emptiness", "refusal", "identity", "prompt_echo", "exact_duplicates", "near_duplicates", "decontamination"]
    with scripted_endpoint(Scripted(answers=ANSWERS)) as server:
        curation = {"steps": steps, "verifier": {"function": str(tmp_path / "in" / "checks.py:capitalised")}}
        recipe = asked_recipe(tmp_path / "in", server.base_url, list(ANSWERS), ITEMS, curation=curation)
        done = run(recipe, out=tmp_path / "run")
        assert done.state == "reported"
    expected = {
        "truncated": 1, "empty-answer": 1, "refusal": 1, "identity": 1, "duplicate": 1, "verifier": 1, "verifier-error": 1, "contaminated": 1,
    }  # fmt: skip
    transfer = TransferSet.load(done.transfer_set_path)
    assert transfer.dropped == expected
    assert (transfer.requested, transfer.accepted) == (10, 2)

    found = json.loads(done.curation_path.read_text())
    names = [step["step"] for step in found["steps"]]
    ours = [
        "truncation",
        "emptiness",
        "refusal",
        "identity",
        "prompt-echo",
        "exact-duplicates",
        "near-duplicates",
        "verifier-function",
        "decontamination",
    ]
    assert names == ["collecting", *ours, "last-gate"]
    left = 10
    for step in found["steps"]:
        assert step["before"] == left
        left = step["after"]
        assert step["before"] == step["after"] + sum(step["dropped"].values())
    assert left == 2
    assert found["splits"] == [{"split": "evaluation", "items": 2, "hit": 1, "by_overlap": 0, "by_prompt_alone": 2}]
    assert found["items"] == [{"item": "evaluation/1", "rows": 1}]

    evidence = {line["prompt"]: line for line in lines(done.left_out_path)}
    assert len(evidence) == 8
    assert evidence["Capital of Ecuador?"]["evidence"] == "begins with a small letter ?"
    assert evidence["Capital of France?"]["reason"] == "verifier-error"
    assert evidence["Capital of Bolivia?"]["against"] == ["evaluation/1"]

    report = done.report
    assert report.curation is not None
    assert report.curation.sha256 == found["sha256"] == json.loads(done.plan_path.read_text())["curation"]["sha256"]
    assert report.curation.accepted.value == 2
    assert report.collection is not None
    assert report.collection.rows["collect"].rejected == expected  # the store tells the same
    assert report.curation.steps[1].shares["truncated"].value == pytest.approx(0.1)
    page = done.page_path.read_text(encoding="utf-8")
    assert "What was left out, and why" in page
    assert "evaluation/1 in 1" in page

    # Other rules over what was paid for: another run, and no request.
    with scripted_endpoint(Scripted(answers={})) as silent:
        assert silent.received == 0
        looser = recipe.model_copy(
            update={"curation": recipe.curation.model_copy(update={"steps": (), "verifier": None}),
                    "collection": recipe.collection.model_copy(update={"store": str(done.requests_path)})},
        )  # fmt: skip
        again = run(looser, out=tmp_path / "again", until="collected")
    assert TransferSet.load(again.transfer_set_path).dropped == {"truncated": 1}


def test_auto_depends_on_who_answers(tmp_path: Path) -> None:
    """Weights that are here are trusted with all but the evaluation; what comes from elsewhere is looked at."""
    fuller = ["truncation", "emptiness", "refusal", "identity", "decontamination"]
    asked = asked_recipe(tmp_path / "endpoint", "http://127.0.0.1:1/v1", ["Who?"], ITEMS)
    assert plan(asked).curation.steps == fuller
    tree = tiny_recipe(tmp_path / "local")
    assert plan(Recipe.from_tree(tree)).curation.steps == ["decontamination"]
    assert plan(Recipe.from_tree({**tree, "evaluation": {}})).curation.steps == []
    write_rows(tmp_path / "local" / "prompts.jsonl", [{"prompt": f"{n} hours", "answer": f"PT{n}H"} for n in range(24)])
    given = {**tree, "prompts": {**tree["prompts"], "answers": "given"}}
    assert plan(Recipe.from_tree(given)).curation.steps == fuller


def test_a_local_run_leaves_its_evaluation_out_and_says_so(tmp_path: Path) -> None:
    tree = tiny_recipe(tmp_path / "in")
    tree["evaluation"].pop("label_only")
    write_rows(tmp_path / "in" / "items.jsonl", [{"prompt": f"{n} hours and {n * 7 % 60} minutes", "answer": "x"} for n in range(3)])
    done = run(Recipe.from_tree(tree), out=tmp_path / "run", until="collected")
    assert TransferSet.load(done.transfer_set_path).dropped["contaminated"] == 3
    collected, contaminated = lines(done.collect_path), [line for line in lines(done.left_out_path) if line["reason"] == "contaminated"]
    assert [line["prompt_id"] for line in contaminated] == [line["prompt_id"] for line in collected[:3]]


def test_lines_of_before_are_curated_as_they_are(tmp_path: Path) -> None:
    """A collection that was begun before lines had a finish reason goes on."""
    done = run(Recipe.from_tree(tiny_recipe(tmp_path / "in")), out=tmp_path / "run", until="collected")
    before = done.transfer_set_path.read_bytes()
    old = [
        {key: value for key, value in line.items() if key not in ("finish_reason", "reasoning", "placeholders_unknown")}
        for line in lines(done.collect_path)
    ]
    write_rows(done.collect_path, old)
    done.transfer_set_path.unlink()
    run(done.recipe, out=tmp_path / "run", until="collected")
    assert done.transfer_set_path.read_bytes() == before


@pytest.mark.parametrize(
    ("verifier", "says"),
    [
        ({"function": "nowhere.py:check"}, "nowhere.py"),
        ({"function": "check"}, "module:function"),
        ({"function": "CHECKS:missing"}, "no function missing"),
        ({"function": "BROKEN:check"}, "ZeroDivisionError"),
        ({"regex": "("}, "regular expression"),
        ({"json_schema": "nowhere.json"}, "No such file"),
        ({"json_schema": "NAN"}, "schema"),
        ({"json_schema": {"type": "string", "format": "email"}}, "format"),
    ],
)
def test_a_verifier_that_cannot_be_used_is_refused_by_the_plan(tmp_path: Path, verifier: dict[str, Any], says: str) -> None:
    (tmp_path / "checks.py").write_text(CHECKS)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    named = {"CHECKS": tmp_path / "checks.py", "BROKEN": tmp_path / "broken.py"}
    (tmp_path / "nan.json").write_text('{"minimum": NaN}')
    if verifier.get("json_schema") == "NAN":
        verifier = {"json_schema": str(tmp_path / "nan.json")}
    if "function" in verifier:
        file, _, name = verifier["function"].rpartition(":")
        verifier = {"function": f"{named.get(file, file)}:{name}" if file else name}
    with pytest.raises(DataError, match=says) as caught:
        run(Recipe.from_tree({**tiny_recipe(tmp_path / "in"), "curation": {"verifier": verifier}}), out=tmp_path / "run")
    assert caught.value.code == "verifier-invalid"
    assert not (tmp_path / "run" / "collect.jsonl").exists()


def test_rules_that_changed_under_a_run_are_noticed(tmp_path: Path) -> None:
    checks = tmp_path / "checks.py"
    checks.write_text("def check(prompt, answer):\n    return True\n")
    recipe = Recipe.from_tree({**tiny_recipe(tmp_path / "in"), "curation": {"verifier": {"function": f"{checks}:check"}}})
    run(recipe, out=tmp_path / "run", until="planned")
    checks.write_text("def check(prompt, answer):\n    return len(answer) > 1\n")
    with pytest.raises(DataError) as caught:
        run(recipe, out=tmp_path / "run", until="collected")
    assert caught.value.code == "curation-changed"
    checks.write_text("def check(prompt, answer):\n    return True\n")
    assert run(recipe, out=tmp_path / "run", until="collected").state == "collected"


def test_paths_of_a_verifier_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "checks.py").write_text(CHECKS)
    (tmp_path / "schema.json").write_text("{}")
    tree = {
        "teacher": {"model": "t"}, "student": {"from_teacher": {"layers": [0]}}, "prompts": {"path": "p.jsonl"},
        "curation": {"verifier": {"function": "checks.py:capitalised", "json_schema": "schema.json"}},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    found = Recipe.from_yaml(tmp_path / "recipe.yaml").curation.verifier
    assert found is not None
    assert found.function == f"{tmp_path / 'checks.py'}:capitalised"
    assert found.json_schema == str(tmp_path / "schema.json")


def test_another_rule_is_another_recipe_and_nothing_is_left_where_all_is_dropped(tmp_path: Path) -> None:
    recipe = Recipe.from_tree({**tiny_recipe(tmp_path / "in"), "curation": {"verifier": {"regex": "no answer has this"}}})
    with pytest.raises(DataError, match=r"curation\.jsonl") as caught:
        run(recipe, out=tmp_path / "run", until="collected")
    assert caught.value.code == "transfer-set-empty"
    found = lines(tmp_path / "run" / "curation.jsonl")
    assert len(found) == 24
    assert json.loads((tmp_path / "run" / "curation.json").read_text())["accepted"] == 0


def test_what_the_demo_leaves_out() -> None:
    """Prompts that are an item but for punctuation and spacing, and those with half of an item's phrases. And redaction finds nothing in it."""
    items, prompts = demo.expressions.draw(demo.EVALUATION_ITEMS, seed=0, held_out=True), demo.expressions.draw(demo.PROMPTS, seed=0, held_out=False)
    held_out = Decontamination(items=tuple(EvaluationItem(split="e", id=str(n), prompt=item.text) for n, item in enumerate(items)))
    dropped = held_out.sift([Row(key=str(n), prompt=Prompt.of(one.text), answer=one.answer) for n, one in enumerate(prompts)]).dropped
    assert len(dropped) == 111
    assert sum(drop.finding.evidence.startswith("the prompt of") for drop in dropped) == 19
    assert len(hits_by_item(dropped)) == 43
    redactor = Redactor()
    assert all(redactor.redact(text).text == text for one in [*prompts[:3000], *items] for text in (one.text, one.answer))


# --- redaction ----------------------------------------------------------------------------------------------------------------------------

MAILS = ["ada@example.org", "bob@example.net", "eve@example.com"]
LETTERS = [f"Write to {mail} that we meet." for mail in MAILS] + ["Say hello."]
LETTER_ITEMS = [{"prompt": "Who is fay@example.org?", "answer": "It is fay@example.org."}]


def echo(prompt: str) -> str:
    """An answer that has what was asked in it, and a placeholder that nobody gave."""
    return f"{prompt.split()[2] if len(prompt.split()) > 2 else 'Hello'} and <EMAIL_99>."


def collected_answers(found: Run) -> list[str]:
    return [line["answer"] for line in lines(found.collect_path)]


def test_placeholders_are_all_that_anybody_sees(tmp_path: Path) -> None:
    with scripted_endpoint(Scripted(echo=echo)) as server:
        done = run(asked_recipe(tmp_path / "in", server.base_url, LETTERS, LETTER_ITEMS), out=tmp_path / "run")
        assert sorted(server.prompts) == sorted([*(f"Write to <EMAIL_{n}> that we meet." for n in (1, 2, 3)), "Say hello.", "Who is <EMAIL_4>?"])
        compared = compare(done, prompt="Write to ada@example.org and zoe@example.org.")
        assert server.prompts[-1] == "Write to <EMAIL_1> and <EMAIL_5>."
    assert collected_answers(done)[0] == "<EMAIL_1> and <EMAIL_99>."
    assert compared[0].teacher == "ada@example.org and <EMAIL_99>."
    assert compared[0].prompt == "Write to ada@example.org and zoe@example.org."
    redaction = done.report.curation.redaction
    assert redaction.mode == "placeholders"
    kind = redaction.kinds["EMAIL"]
    assert (kind.places.value, kind.distinct.value, kind.texts.value) == (5, 4, 4)
    assert redaction.placeholders_unknown.value == 4
    assert "What the endpoint did not see" in done.page_path.read_text(encoding="utf-8")
    for path in done.directory.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(mail.encode() in data for mail in (*MAILS, "fay@example.org", "zoe@example.org")), path
    with RequestStore.open(done.requests_path, read_only=True) as store:
        texts = [answer.text for row in store.rows() if (answer := store.answer(row.key)) is not None]
        assert len(texts) == 6
        assert not any("example" in text for text in texts)


def test_restored_answers_are_learned_and_the_endpoint_sees_placeholders(tmp_path: Path) -> None:
    with scripted_endpoint(Scripted(echo=echo)) as server:
        recipe = asked_recipe(tmp_path / "in", server.base_url, LETTERS, LETTER_ITEMS)
        recipe = recipe.model_copy(update={"collection": recipe.collection.model_copy(update={"redaction": "restored"})})
        done = run(recipe, out=tmp_path / "run")
        assert not any("@" in prompt for prompt in server.prompts)
        assert len(server.prompts) == 5
    assert collected_answers(done)[:3] == [f"{mail} and <EMAIL_99>." for mail in MAILS]
    sample = lines(done.directory / "samples.jsonl")[0]
    assert (sample["prompt"], sample["teacher"]) == ("Who is fay@example.org?", "fay@example.org? and <EMAIL_99>.")
    assert done.report.curation.redaction.placeholders_unknown.value == 4


def test_off_sends_them(tmp_path: Path) -> None:
    with scripted_endpoint(Scripted(echo=echo)) as server:
        recipe = asked_recipe(tmp_path / "in", server.base_url, LETTERS, LETTER_ITEMS)
        recipe = recipe.model_copy(update={"collection": recipe.collection.model_copy(update={"redaction": "off"})})
        run(recipe, out=tmp_path / "run", until="collected")
        assert sorted(server.prompts) == sorted(LETTERS)


def test_a_bare_off_is_the_word(tmp_path: Path) -> None:
    tree = asked_recipe(tmp_path, "http://127.0.0.1:1/v1", ["Who?"], ITEMS).model_dump(mode="json")
    tree["collection"]["redaction"] = yaml.safe_load("off")
    assert tree["collection"]["redaction"] is False
    assert Recipe.from_tree(tree).buying.redaction == "off"


def test_an_item_whose_answer_nobody_can_know_is_warned_of_and_so_are_prompts_that_are_asked_in_vain(tmp_path: Path) -> None:
    items = [*LETTER_ITEMS, {"prompt": "What is the address of the desk?", "answer": "desk@example.org"}, {"prompt": "say hello", "answer": "Hello."}]
    warnings = plan(asked_recipe(tmp_path, "http://127.0.0.1:1/v1", LETTERS, items)).warnings
    assert any("in 1 of 3 evaluation items" in warning for warning in warnings)
    assert any("1 of 4 prompts" in warning for warning in warnings)


def test_restored_text_has_no_log_probabilities(tmp_path: Path) -> None:
    tree = asked_recipe(tmp_path, "http://127.0.0.1:1/v1", LETTERS, LETTER_ITEMS).model_dump(mode="json")
    tree["teacher"]["tokenizer"] = tree["student"]["model"]
    tree["collection"] |= {"redaction": "restored", "top_logprobs": 5}
    recipe = Recipe.from_tree({**tree, "targets": {"kind": "top_k", "k": 5}, "objective": {"terms": [{"divergence": "forward_kl"}]}})
    with pytest.raises(ModelError, match="restored") as caught:
        plan(recipe)
    assert "collection.redaction to placeholders" in caught.value.do


def test_given_answers_are_redacted_too(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"Address {n}?", "answer": mail} for n, mail in enumerate(MAILS)]
    rows.append({"messages": [{"role": "user", "content": "Whose?"}, {"role": "assistant", "content": "That of ada@example.org."}]})
    recipe = asked_recipe(tmp_path / "in", "http://127.0.0.1:1/v1", ["x"], LETTER_ITEMS)
    tree = recipe.model_dump(mode="json")
    tree["prompts"] = {"path": str(write_rows(tmp_path / "in" / "given.jsonl", rows)), "answers": "given"}
    done = run(Recipe.from_tree(tree), out=tmp_path / "run", until="collected")
    assert collected_answers(done) == ["<EMAIL_1>", "<EMAIL_2>", "<EMAIL_3>", "That of <EMAIL_1>."]


_Stillroom = Callable[..., tuple[int, str, str]]


def test_the_plan_page_says_which_steps_will_run_and_what_is_replaced(tmp_path: Path, stillroom: _Stillroom) -> None:
    recipe = asked_recipe(tmp_path / "in", "http://127.0.0.1:1/v1", LETTERS, LETTER_ITEMS)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    code, out, _ = stillroom("plan", tmp_path / "recipe.yaml")
    assert code == 0
    words = " ".join(out.split())
    assert "truncation, emptiness, refusal, identity, decontamination" in words
    assert "5 EMAIL in 4" in words
    assert "ada@example.org" not in out
