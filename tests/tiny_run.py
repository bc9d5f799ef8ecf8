"""A whole run in a second or two: a tiny teacher that ends its answers, prompts, labelled items, and the recipe over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers import save_tiny, tiny_model, tiny_tokenizer
from stillroom.data import Prompt
from stillroom.models.loading import body_of
from stillroom.models.tokenizers import Renderer

# How readily the teacher ends: with it, answers have one to a dozen tokens, and some run into the limit, so that every way of leaving a record out occurs.
_READINESS_TO_END = 2.0


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(count: int) -> list[str]:
    """Distinct short texts."""
    return [f"{number} hours and {number * 7 % 60} minutes" for number in range(count)]


def teacher_that_ends(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, readiness: float = _READINESS_TO_END) -> PreTrainedModel:
    """A random untied model whose end token's row lies along its usual state, so that sampled answers end after some tokens."""
    model = tiny_model("llama", rows=len(tokenizer), layers=1, width=16, spread=0.5, seed=seed, tie_word_embeddings=False)
    renderer = Renderer(tokenizer)
    with torch.no_grad():
        prompts = [torch.tensor([renderer.prompt_ids(Prompt.of(text))]) for text in questions(16)]
        usual_D = torch.stack([body_of(model)(input_ids=ids_BT).last_hidden_state[0, -1] for ids_BT in prompts]).mean(0)
        weight_VD = model.get_output_embeddings().weight
        assert isinstance(weight_VD, torch.Tensor)
        weight_VD[tokenizer.eos_token_id] = readiness * usual_D / usual_D.norm()
    return model


def tiny_recipe(folder: Path, *, prompts: int = 24) -> dict[str, Any]:
    """A recipe as a tree of plain values, with everything that it names written under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    teacher = save_tiny(folder / "teacher", tokenizer=tokenizer, model=teacher_that_ends(tokenizer))
    asked = write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in questions(prompts)])
    labelled = [{"prompt": f"{n} days", "answer": f"P{n}D", "family": "odd" if n % 2 else "even"} for n in range(14)]
    items = write_rows(folder / "items.jsonl", labelled[:6])
    pairs = write_rows(folder / "labelled.jsonl", labelled[6:])
    return {
        "name": "tiny",
        "teacher": {"model": str(teacher)},
        "terms": {"licence": "Apache-2.0", "base_licence": "Apache-2.0"},
        "student": {"from_scratch": {"layers": 1, "width": 16, "heads": 2, "feed_forward": 32}},
        "prompts": {"path": str(asked)},
        "generation": {"max_new_tokens": 10, "sampling_temperature": 1.0},
        "targets": {"kind": "hidden"},
        "training": {
            "steps": 6,
            "sequences_per_step": 4,
            "micro_batch": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "validation_fraction": 0.2,
            "validate_every": 3,
            "checkpoint_every": 2,
        },
        "evaluation": {
            "path": str(items),
            "fidelity_prompts": 4,
            "resamples": 100,
            # So high a rate that it soon gets worse: the baseline stops early.
            "label_only": {"path": str(pairs), "validation_fraction": 0.25, "patience": 1, "validate_every": 2, "learning_rate": 0.3},
        },
        "hardware": {"device": "cpu", "dtype": "float32", "threads": 1},
        "seed": 3,
    }


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "wall"} for line in lines]
