"""The embedded default: a bundled teacher that turns time expressions into machine notation, its task, and a recipe to distil it.

The student sees unlabelled prompts only. The 500 labelled pairs train the label-only baseline, and the 2,000 evaluation items are held out by
a hash rule (expressions.is_held_out) from everything that any of the models was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path

from stillroom.core import durable
from stillroom.demo import expressions
from stillroom.runs.recipe import Recipe

__all__ = ["EVALUATION_ITEMS", "LABELLED_PAIRS", "PROMPTS", "TEACHER", "expressions", "prepare", "recipe"]

TEACHER = Path(__file__).parent / "teacher"
PROMPTS, LABELLED_PAIRS, EVALUATION_ITEMS = 14_000, 500, 2_000
_STEPS = 2_600


def prepare(out: Path, seed: int) -> Recipe:
    """Writes the demo's inputs under `out`/inputs (prompts without answers, labelled pairs, evaluation items) and returns its recipe.

    Everything but the teacher is a function of `seed`; the evaluation items are the same for every seed.
    """
    inputs = out.resolve() / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    prompts = expressions.draw(PROMPTS, seed=2 * seed, held_out=False)
    labelled = expressions.draw(LABELLED_PAIRS, seed=2 * seed + 1, held_out=False)
    items = expressions.draw(EVALUATION_ITEMS, seed=0, held_out=True)
    _write(inputs / "prompts.jsonl", [{"prompt": e.text} for e in prompts])
    _write(inputs / "labelled.jsonl", [{"prompt": e.text, "answer": e.answer, "family": e.family} for e in labelled])
    _write(inputs / "items.jsonl", [{"prompt": e.text, "answer": e.answer, "family": e.family} for e in items])
    return recipe(inputs, seed)


def recipe(inputs: Path, seed: int) -> Recipe:
    """The demo's recipe over the files that `prepare` wrote."""
    return Recipe.from_tree(
        {
            "name": "time-expressions",
            "teacher": {"model": str(TEACHER)},
            "student": {"from_scratch": {"layers": 3, "width": 96, "heads": 3, "feed_forward": 320}},
            "prompts": {"path": str(inputs / "prompts.jsonl")},
            "generation": {"max_new_tokens": 24},
            "objective": {"terms": [{"divergence": "forward_kl"}]},
            "training": {
                "steps": _STEPS,
                "sequences_per_step": 64,
                "length_window": 8,
                "learning_rate": 3e-3,
                "warmup_steps": 200,
                "weight_decay": 0.1,
                "adam_betas": [0.9, 0.98],
                "validate_every": 200,
                "checkpoint_every": 1_000,
            },
            "evaluation": {
                "path": str(inputs / "items.jsonl"),
                "label_only": {"path": str(inputs / "labelled.jsonl"), "learning_rate": 2e-3},
            },
            "seed": seed,
        },
        name="the demo's recipe",
    )


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        durable.write_bytes_atomic(path, text.encode())
