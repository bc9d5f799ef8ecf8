"""Which of the usual pairs fit on graphics cards of 80 GB and of 141 GB, and how: a table for docs/guides/what-fits-where.md.

    .venv/bin/python benchmarks/cards.py [--json]

For each pair `models.cards.fits` is asked twice: with targets that are stored (ids drawn from the teacher), and with a teacher that is asked at every step.
Shapes are those of the published configurations; no weights are loaded. 64 sequences a step, of 512 prompt and 512 answer tokens each, AdamW, the student's
weights and moments in float32, products in bfloat16, the teacher in bfloat16. Then this machine's own check: `tests/runs/test_plan_accuracy.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from _common import ROOT, finish, parser

sys.path.insert(0, str(ROOT / "src"))

from stillroom.models.cards import CARDS, SHARE, fits
from stillroom.models.estimate import Workload
from stillroom.models.loading import count_parameters, shape_of, skeleton_of
from stillroom.models.probing import Outline
from stillroom.objectives.divergences import forward_kl
from stillroom.objectives.objective import Objective, WeightedTerm

PROMPT, ANSWER, SEQUENCES = 512, 512, 64
DRAWS, DRAWN_BYTES = 50, 20
CAVEATS = (
    "Predicted, not measured on a card: what a copy of a model takes is followed on a processor in the card's arithmetic, and what only a GPU has is counted.",
    "Of a card nine tenths may be planned: the allocator's gaps and the libraries' workspaces are not counted.",
)


def qwen3(width: int, feed_forward: int, layers: int, heads: int, *, tied: bool = False) -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=151_936, hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=tied,
    )  # fmt: skip


def llama3(width: int, feed_forward: int, layers: int, heads: int, *, tied: bool = False, head: int = 128) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=128_256, hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=head, max_position_embeddings=131_072, tie_word_embeddings=tied,
    )  # fmt: skip


MODELS = {
    "Qwen3 0.6B": qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3 1.7B": qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3 4B": qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3 8B": qwen3(4096, 12_288, 36, 32),
    "Qwen3 32B": qwen3(5120, 25_600, 64, 64),
    "Llama 3.2 1B": llama3(2048, 8192, 16, 32, tied=True, head=64),
    "Llama 3.1 8B": llama3(4096, 14_336, 32, 32),
    "Llama 3.1 70B": llama3(8192, 28_672, 80, 64),
}
PAIRS = (
    ("Qwen3 8B", "Qwen3 0.6B"),
    ("Qwen3 8B", "Qwen3 1.7B"),
    ("Qwen3 32B", "Qwen3 4B"),
    ("Qwen3 32B", "Qwen3 8B"),
    ("Llama 3.1 8B", "Llama 3.2 1B"),
    ("Llama 3.1 70B", "Llama 3.2 1B"),
    ("Llama 3.1 70B", "Llama 3.1 8B"),
)


def outline(name: str) -> Outline:
    skeleton = skeleton_of(MODELS[name])
    return Outline(config=MODELS[name], shape=shape_of(skeleton), parameters=count_parameters(skeleton))


def workload(teacher: Outline, student: Outline, *, live: bool) -> Workload:
    """A run on a card, with what a recipe has by default."""
    return Workload(
        teacher=teacher,
        student=student,
        mapped_bytes=0,
        size=student.shape.rows,
        objective=Objective(terms=(WeightedTerm(divergence=forward_kl()),)),
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        teacher_dtype=torch.bfloat16,
        teacher_int8=False,
        packing=("student", "teacher"),
        recomputed=False,
        threads=torch.get_num_threads(),
        prompts=10_000,
        prompt_tokens=(PROMPT,) * 16,
        answer_tokens=(ANSWER,) * 16,
        max_new_tokens=ANSWER,
        written=10_000,
        sampling_temperature=1.0,
        teacher_at_once=64,
        target_kind="hidden" if live else "drawn",
        k=0 if live else DRAWS,
        live=live,
        row_bytes=2 * teacher.shape.width if live else DRAWN_BYTES,
        from_teacher=False,
        steps=1000,
        sequences_per_step=SEQUENCES,
        micro_batch=SEQUENCES,
        length_window=1,
        rows_per_chunk=2048,
        validation_fraction=0.02,
        validate_every=100,
        checkpoint_every=100,
        label_only=None,
        items=500,
        fidelity_prompts=200,
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--pairs", type=int, default=len(PAIRS), help="only the first so many")
    arguments = options.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for teacher, student in PAIRS[: arguments.pairs]:
        two = outline(teacher), outline(student)
        for live in (False, True):
            for fit in fits(workload(*two, live=live)):
                rows.append({"teacher": teacher, "student": student, "targets": "live" if live else "stored", **asdict(fit)})
                if not arguments.json:
                    print({key: value for key, value in rows[-1].items() if key != "usable_bytes"}, flush=True)
    settings = {"prompt_tokens": PROMPT, "answer_tokens": ANSWER, "sequences_per_step": SEQUENCES, "draws": DRAWS, "share": SHARE}
    finish("cards", {"settings": settings, "cards": [asdict(card) for card in CARDS], "rows": rows}, caveats=CAVEATS, as_json=arguments.json)


if __name__ == "__main__":
    main()
