"""Tiny students of every kind that becomes a GGUF file: shapes, rotary positions, tokenizers, templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers import ASSISTANT, END, USER, save_tiny, tiny_model, tiny_tokenizer

START = "<|start|>"
# The patterns of Qwen2's and Llama 3's tokenizer.json.
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

_CORPUS = (
    "It's 12345 o'clock, isn't IT? They'll've  gone; 2024-03-05T09:30:00Z.", "Größe, naïve café — «добрый день», 你好，世界！ こんにちは",
    "def f(x):\n    return x ** 2  # comment\r\n\t\tif x<10: pass", "🙂🙃 👩‍👩‍👧 é à ñ ½ ² ٣٤", "the quick brown fox jumps over the lazy dog " * 3,
)  # fmt: skip
# Uses what templates use: loops, filters, namespaces, a test of whether a variable is there, a system turn.
CHATML = (
    "{%- set ns = namespace(n=0) %}{%- for message in messages %}{%- set ns.n = ns.n + 1 %}"
    "{{- '<|user|>' + message.role + '\n' + message.content | trim + '<|end|>' + '\n' }}{%- endfor %}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '[no thought ' ~ ns.n ~ ']' }}{%- endif %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>assistant\n' }}{%- endif %}"
)
LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|user|>' + message['role'] + '\n\n' + message['content'] | trim + '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def split_tokenizer(
    pattern: str, *, size: int = 520, normalizer: str | None = None, start: bool = False, template: str | None = CHATML
) -> PreTrainedTokenizerFast:
    """A byte-level BPE over all bytes, which splits as Qwen2 or Llama 3; with `start` it puts a start token before a text, as Llama 3 does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pattern == LLAMA3))
    if normalizer == "NFC":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, USER, ASSISTANT, START]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text for text in _CORPUS for _ in range(3)], trainer)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", pair=f"{START} $A {START} $B", special_tokens=[(START, tokenizer.token_to_id(START))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, bos_token=START if start else None)
    fast.add_special_tokens({"additional_special_tokens": special[1:3]})
    fast.add_tokens(["[tool call]"])  # an added token that is not special
    fast.chat_template = template
    return fast


def _ascii(directory: Path) -> Path:
    tokenizer = tiny_tokenizer()
    # As many key-value heads as heads, a tied head, padded rows.
    model = tiny_model("llama", rows=len(tokenizer) + 4, width=64, heads=4, num_key_value_heads=4, spread=0.2)
    return save_tiny(directory, tokenizer=tokenizer, model=model)


def _bytes(directory: Path) -> Path:
    tokenizer = tiny_tokenizer(size=300, ascii_only=False)
    model = tiny_model("llama", rows=len(tokenizer) + 37, width=64, heads=4, num_key_value_heads=2, tie_word_embeddings=False, spread=0.2)
    return save_tiny(directory, tokenizer=tokenizer, model=model)


def _llama3(directory: Path) -> Path:
    tokenizer = split_tokenizer(LLAMA3, start=True, template=LLAMA3_TEMPLATE)
    more = {"rope_parameters": LLAMA3_ROPE, "head_dim": 32, "bos_token_id": tokenizer.bos_token_id}
    model = tiny_model("llama", rows=len(tokenizer), width=64, heads=4, num_key_value_heads=1, tie_word_embeddings=False, spread=0.2, **more)
    return save_tiny(directory, tokenizer=tokenizer, model=model)


def _qwen3(directory: Path) -> Path:
    tokenizer = split_tokenizer(QWEN2, normalizer="NFC")
    # The heads together are wider than the model, as Qwen3's are.
    model = tiny_model("qwen3", rows=len(tokenizer) + 8, width=64, heads=4, num_key_value_heads=2, head_dim=32, spread=0.2)
    return save_tiny(directory, tokenizer=tokenizer, model=model)


def _qwen3_untied(directory: Path) -> Path:
    tokenizer = split_tokenizer(QWEN2)
    model = tiny_model("qwen3", rows=len(tokenizer), width=64, heads=2, num_key_value_heads=2, head_dim=32, tie_word_embeddings=False, spread=0.2)
    return save_tiny(directory, tokenizer=tokenizer, model=model)


CASES: dict[str, Callable[[Path], Path]] = {
    "llama-ascii": _ascii, "llama-bytes": _bytes, "llama-3": _llama3, "qwen3": _qwen3, "qwen3-untied": _qwen3_untied,
}  # fmt: skip
