"""Make the bundled teacher: a byte-level BPE tokenizer and a small Llama, trained from scratch on the demo's expressions.

    python scripts/make_teacher.py --work build/teacher --out src/stillroom/demo/teacher

Resumes from `--work` when run again. Only expressions outside the held-out rule are ever drawn for training; the held-out ones are scored
at the end and the figure goes into the model card.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stillroom.demo import expressions

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY = 512
SHAPE = {"num_hidden_layers": 8, "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 6}
IGNORE = -100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A GPT-2-style byte-level BPE over ASCII, trained on training expressions and their answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    ascii_letters = [_byte_letter(byte) for byte in range(128)]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=ascii_letters, show_progress=False)
    drawn = expressions.draw(60_000, seed=1, held_out=False)
    tokenizer.train_from_iterator((part for e in drawn for part in (e.text, e.answer)), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], model_max_length=128)
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _byte_letter(byte: int) -> str:
    """GPT-2's printable stand-in for a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


def encode(tokenizer: PreTrainedTokenizerFast, drawn: list[expressions.Expression]) -> list[tuple[list[int], int]]:
    """Token ids of prompt and answer, and the length of the prompt."""
    end, user, assistant = (tokenizer.convert_tokens_to_ids(token) for token in SPECIAL)
    tokenizer.backend_tokenizer.no_padding()
    texts = tokenizer.backend_tokenizer.encode_batch([e.text for e in drawn], add_special_tokens=False)
    answers = tokenizer.backend_tokenizer.encode_batch([e.answer for e in drawn], add_special_tokens=False)
    return [([user, *t.ids, assistant, *a.ids, end], len(t.ids) + 2) for t, a in zip(texts, answers, strict=True)]


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int, focus: str | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One pool of 32 batches of similar length; labels are -100 on the prompt and the padding. An eighth of it are phrasings of `focus`."""
    rng = random.Random(seed)
    drawn = expressions.draw(batch_size * 32, seed=1_000_000 + seed, held_out=False)
    if focus is not None:
        more = [e for e in expressions.draw(batch_size * 200, seed=2_000_000 + seed, held_out=False) if e.phrasing.startswith(focus)]
        drawn[: len(drawn) // 8] = rng.choices(more, k=len(drawn) // 8)
    rows = sorted(encode(tokenizer, drawn), key=lambda row: len(row[0]))
    pool = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        longest = max(len(ids) for ids, _ in part)
        ids = torch.tensor([r + [0] * (longest - len(r)) for r, _ in part])
        labels = torch.tensor([[IGNORE] * n + r[n:] + [IGNORE] * (longest - len(r)) for r, n in part])
        pool.append((ids, labels))
    rng.shuffle(pool)
    return pool


@torch.inference_mode()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, drawn: list[expressions.Expression]) -> dict[str, float]:
    """Share of greedy answers equal to the right one, by family and overall."""
    right: dict[str, list[bool]] = {family: [] for family in expressions.FAMILIES}
    tokenizer.padding_side = "left"
    for start in range(0, len(drawn), 200):
        part = drawn[start : start + 200]
        prompts = [f"<|user|>{e.text}<|assistant|>" for e in part]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for e, text in zip(part, tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True), strict=True):
            right[e.family].append(text == e.answer)
    scores = {family: sum(hits) / len(hits) for family, hits in right.items()}
    return {"all": sum(map(sum, right.values())) / len(drawn), **scores}


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warm-up over 200 steps, then a cosine down to a hundredth of the peak; the finishing steps go from half the peak down to zero."""
    steps, peak = args.steps - args.finish, args.lr
    if step >= steps:
        return 0.5 * peak * (args.steps - step) / args.finish
    if step < 200:
        return peak * (step + 1) / 200
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - 200) / max(1, steps - 200))))


def train(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Train to `args.steps`, checkpointing every 250 steps."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
        **{**SHAPE, **json.loads(args.shape)},
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98), fused=True
    )
    checkpoint = args.work / "checkpoint.pt"
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    began, since = time.time(), step
    held_out = expressions.draw(500, seed=123, held_out=False)
    while step < args.steps:
        pool = batches(tokenizer, step // 32, args.batch, args.focus if step >= args.steps - args.finish else None)
        for ids, labels in pool[step % 32 :]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
                scored = labels[:, 1:] != IGNORE
                logits = model.lm_head(hidden[scored])
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][scored])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0:
                print(
                    f"step {step} loss {loss.item():.4f} {(step - since) * args.batch / (time.time() - began):.0f} ex/s {time.time() - began:.0f}s",
                    flush=True,
                )
            if step % 250 == 0 or step == args.steps:
                partial = checkpoint.with_suffix(".partial")
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
                partial.replace(checkpoint)
            if step % args.score_every == 0:
                print("   seen side:", exact_match(model.eval(), tokenizer, held_out), flush=True)
                model.train()
            if step >= args.steps:
                break
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--finish", type=int, default=0, help="how many of the steps are a second, shorter training")
    parser.add_argument("--focus", help="phrasings whose name begins so are an eighth of what the finishing steps see")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--shape", default="{}", help="JSON that overrides the model's shape (for experiments)")
    parser.add_argument("--score-every", type=int, default=1000)
    parser.add_argument("--notes", default="", help="what the model card should add on how it was made")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    # The tokenizer depends on the expressions; a training that is resumed after they changed goes on with its own.
    kept = args.work / "tokenizer"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(kept) if kept.exists() else make_tokenizer()
    tokenizer.save_pretrained(kept)
    model = train(args, tokenizer)
    # The weights are shipped in bfloat16: what is scored is what is shipped.
    model = model.to(torch.bfloat16).float()
    scores = exact_match(model, tokenizer, expressions.draw(2000, seed=0, held_out=True))
    print("held out:", scores, flush=True)
    tokenizer.backend_tokenizer.no_padding()
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    (args.out / "README.md").write_text(card(model, scores, args), encoding="utf-8")


def card(model: LlamaForCausalLM, scores: dict[str, float], args: argparse.Namespace) -> str:
    """The model card: what it is, how it was made, what it was found to do."""
    rows = "\n".join(f"| {name} | {score:.4f} |" for name, score in scores.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# Time expressions to machine notation

The teacher of Stillroom's demo: a Llama of {sum(p.numel() for p in model.parameters()):,} parameters ({model.config.num_hidden_layers} layers,
width {model.config.hidden_size}) that turns English time expressions into ISO 8601 dates and durations, date math and cron. It can do nothing else.

| family | exact match on 2,000 held-out expressions |
|---|---|
{rows}

**Made by** `scripts/make_teacher.py` ({" ".join(args.notes.split()) or "no notes"}): {args.steps:,} steps of {args.batch} expressions drawn afresh by
`stillroom.demo.expressions`, answers alone scored, AdamW with a peak learning rate of {args.lr:g} and a cosine schedule, float32 on a CPU, shipped in
bfloat16; PyTorch {torch.__version__}. Random weights at the start, no other data. Combinations of phrasing and values that the hash rule
`expressions.is_held_out` holds out were never drawn.

**Limits.** English and ASCII only: other characters are lost by its tokenizer. Years 1950 to 2070 or so. It answers anything with a time, also
what is none.
"""


if __name__ == "__main__":
    main()
