"""One tiny pair, ten steps, against a stored trajectory: whoever moves a loss, knowingly or not, meets this test.

Where the change is meant, say so in CHANGELOG.md under Numerics, and write the trajectory again:

    PYTHONPATH=src:tests python tests/runs/test_golden.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

import stillroom
from stillroom.runs.recipe import Recipe
from tiny_run import metrics_of, tiny_recipe

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "metrics.jsonl"
# Another processor rounds otherwise; a wrong factor, a shifted row or a lost token shows in the first digits.
RELATIVE = 1e-4


def trajectory(folder: Path) -> list[dict[str, Any]]:
    """Every part of a step: several micro-batches of unequal token counts, warm-up, clipping, weight decay, validation, two terms."""
    tree = tiny_recipe(folder / "in")
    tree["objective"] = {"terms": [{"divergence": "forward_kl"}, {"divergence": "cross_entropy", "weight": 0.2}]}
    tree["training"] |= {"steps": 10, "sequences_per_step": 5, "weight_decay": 0.1, "clip_norm": 0.5, "validate_every": 4}
    tree["evaluation"] = {}
    return metrics_of(stillroom.run(Recipe.from_tree(tree), out=folder / "run", until="trained").directory)


def test_the_trajectory_is_the_stored_one(tmp_path: Path) -> None:
    expected = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    assert len(expected) == 13
    found = trajectory(tmp_path)
    assert [(line["step"], line["name"], line["scored_tokens"]) for line in found] == [
        (line["step"], line["name"], line["scored_tokens"]) for line in expected
    ]
    for line, stored in zip(found, expected, strict=True):
        assert _flat(line) == pytest.approx(_flat(stored), rel=RELATIVE), f"step {stored['step']}, {stored['name']}"


def _flat(line: dict[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
    return numbers | {f"terms.{name}": value for name, value in line["terms"].items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        GOLDEN.write_text("".join(json.dumps(line) + "\n" for line in trajectory(Path(name))), encoding="utf-8")
