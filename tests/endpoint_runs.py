"""Recipes whose teacher is behind an endpoint: the fake one, with text alone, or a real llama.cpp server over the bundled teacher, with a probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import save_tiny
from servers import TEACHER
from stillroom import demo
from stillroom.collect.logprobs import TokenIndex
from stillroom.collect.wire import Endpoint
from stillroom.core.errors import EntitlementDenied, EntitlementUnknown
from stillroom.models.tokenizers import load_tokenizer, vocabulary_of
from stillroom.runs import Recipe
from stillroom.runs.probing import Wanted, probe_endpoint
from stillroom.testing.settings import Settings
from tiny_run import tiny_recipe, write_rows

KEY = "sk-planted-0123456789abcdef"
PRICES = """\
as_of: 2026-11-01
currency: USD
prices:
  - base_url: {url}
    model: fake-teacher
    input: 1
    output: 4
"""
# Terms with which a recipe may not learn from the fake teacher, and what says so.
REFUSED_TERMS: list[tuple[dict[str, str], Any]] = [
    ({"access": "api:openai", "model": "gpt-5.2"}, (EntitlementDenied, EntitlementUnknown)),
    ({"access": "api:nobody-knows"}, EntitlementUnknown),
    ({"access": "weights"}, EntitlementUnknown),
]


def settings(**more: Any) -> Settings:
    """Of a fake endpoint that lets `KEY` in alone."""
    return Settings(api_keys=(KEY,), answer_tokens=6, fragment_share=0, **more)


def fake_recipe(folder: Path, url: str, *, prompts: int = 24, **changes: Any) -> Recipe:
    """A tiny recipe whose teacher is the fake endpoint and whose student has a tokenizer of its own: text alone."""
    tree = tiny_recipe(folder, prompts=prompts)
    student = save_tiny(folder / "student", layers=1, width=16)
    (folder / "prices.yaml").write_text(PRICES.format(url=url))
    tree |= {
        "teacher": {"endpoint": {"url": url, "model": "fake-teacher", "key_variable": "FAKE_KEY"}},
        "student": {"model": str(student)},
        "collection": {"prices": str(folder / "prices.yaml"), "max_money": 1.0},
        "generation": {"max_new_tokens": 16, "sampling_temperature": 0.0},
        "targets": {"kind": "text"},
        "objective": {"terms": [{"divergence": "cross_entropy"}]},
    }
    return Recipe.from_tree({**tree, **changes})


def keep_probe(endpoint: Endpoint, place: Path) -> None:
    """Probes, and keeps the report in the store at `place`."""
    tokenizer = load_tokenizer(str(TEACHER))
    index = TokenIndex(vocabulary_of(tokenizer, len(tokenizer)))
    place.parent.mkdir(parents=True, exist_ok=True)
    probe_endpoint(endpoint, place, Wanted(index=index), access="weights", licence="apache-2.0")


def served_recipe(folder: Path, url: str, *, prompts: int, steps: int = 4, **changes: Any) -> Recipe:
    """The demonstration's student over the bundled teacher behind `url`: top_k where a probe of it is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = demo.recipe(folder, seed=0).model_dump(mode="json")
    drawn = demo.expressions.draw(prompts, seed=0, held_out=False)
    labelled = [{"prompt": one.text, "answer": one.answer, "family": one.family} for one in demo.expressions.draw(24, seed=1, held_out=True)]
    write_rows(folder / "items.jsonl", labelled[:8])
    write_rows(folder / "labelled.jsonl", labelled[8:])
    tree["teacher"] = {"endpoint": {"url": url, "model": "teacher"}, "tokenizer": str(TEACHER)}
    tree["terms"]["licence"] = "Apache-2.0"
    tree["prompts"]["path"] = str(write_rows(folder / "prompts.jsonl", [{"prompt": one.text} for one in drawn]))
    tree["collection"] = {"max_tokens": 10_000_000}
    tree["targets"] = {"kind": "auto", "k": 20}
    tree["training"] |= {"steps": steps, "epochs": None, "checkpoint_every": 100}
    tree["evaluation"] |= {"resamples": 100}
    tree["evaluation"]["label_only"] |= {"patience": 1}
    return Recipe.from_tree({**tree, **changes})
