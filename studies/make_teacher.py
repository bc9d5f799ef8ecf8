"""Make the study's teacher: tokenizer and a small Llama, trained from scratch on tales.

    python -m studies.make_teacher --out studies/teacher

Only questions outside the held-out rule are drawn for training. At the end the held-out ones are asked at temperature 1 and greedily; exact match,
and the bits of entropy of each token that is sampled, go into the model's card.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from stillroom.core.identities import Sampling, TokenSequence
from stillroom.models.student import TransformersStudent
from studies import learning, tales

STEPS, PER_STEP, PEAK = 4_000, 64, 3e-3
LAYERS, WIDTH = 4, 96


def fresh_steps(tokenizer: PreTrainedTokenizerFast, per_step: int) -> Iterator[list[TokenSequence]]:
    """Steps of new tales, sorted by length over 16 of them, so that little is padded, and shuffled again."""
    corpus, rng = tales.corpus(1), random.Random("steps")
    while True:
        pool = sorted(learning.encoded(tokenizer, list(itertools.islice(corpus, 16 * per_step))), key=lambda sequence: len(sequence.ids))
        steps = [pool[begin : begin + per_step] for begin in range(0, len(pool), per_step)]
        rng.shuffle(steps)
        yield from steps


def measured(student: TransformersStudent, tokenizer: PreTrainedTokenizerFast, temperature: float, count: int = 2_000) -> tuple[float, float]:
    """Share of held-out questions whose sampled answer ends in the right result; mean bits of entropy of the sampled tokens."""
    asked = tales.questions(count, seed=2, held_out=True)
    prompts = [learning.prompt_ids(tokenizer, question) for question in asked]
    written = student.sample(prompts, Sampling(max_new_tokens=96, temperature=temperature, seed=3))
    right = sum(tales.is_right(question, tokenizer.decode(ids, skip_special_tokens=True)) for question, ids in zip(asked, written, strict=True))
    sequences = [learning.as_sequence(prompt, ids) for prompt, ids in zip(prompts, written, strict=True)][:400]
    with torch.inference_mode():
        log_probs_RV = torch.log_softmax(student._logits_of(sequences), -1)
    bits = float(-(log_probs_RV.exp() * log_probs_RV).sum(-1).mean()) / 0.6931471805599453
    return right / count, bits


def main() -> None:
    """Trains, measures, and writes the teacher."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "teacher")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    tokenizer = learning.tokenizer_of(learning.WORDS)
    model = learning.fresh(tokenizer, layers=LAYERS, width=WIDTH, seed=0)
    student = learning.student_of(model, tokenizer)
    print(f"{sum(one.numel() for one in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    began = time.monotonic()

    def told(step: int, nats: float) -> None:
        if step % 250 == 249:
            greedy, _ = measured(student, tokenizer, 0.0, 200)
            print(f"step {step + 1}: {nats:.4f} nats, greedy {greedy:.3f}, {time.monotonic() - began:,.0f} s", flush=True)

    learning.train(student, fresh_steps(tokenizer, PER_STEP), count=args.steps, peak=PEAK, warmup=200, told=told)
    greedy, _ = measured(student, tokenizer, 0.0)
    sampled, bits = measured(student, tokenizer, 1.0)
    print(f"held out: greedy {greedy:.4f}, temperature 1 {sampled:.4f}, {bits:.2f} bits a token")
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
