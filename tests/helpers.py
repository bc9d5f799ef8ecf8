"""Small real parts for tests: tokenizers, models and model directories, made from nothing in milliseconds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"

# The bundled teacher's template (scripts/make_teacher.py), and others as they are met in the wild.
DEMO_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_WORDS = (
    "next Monday at half past 3 in the afternoon", "the 5th of March 2024", "every weekday at 09:30", "two hours and 15 minutes",
    "What is the capital of France?", "The capital of France is Paris.", "2024-03-05", "PT2H15M", "30 9 * * 1-5",
)  # fmt: skip


def tiny_tokenizer(
    *,
    size: int = 220,
    template: str | None = DEMO_TEMPLATE,
    special: tuple[str, ...] = (END, USER, ASSISTANT),
    ascii_only: bool = True,
    pad: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's pre-tokenizer. special[0] is the end token, and the padding too unless `pad` names another special.

    With `ascii_only` (as the bundled teacher) bytes from 128 on have no token and are lost.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if ascii_only:
        latin_from_128 = {chr(code) for code in range(128, 256)} | {chr(code) for code in range(256 + 34, 256 + 68)}
        alphabet = [letter for letter in alphabet if letter not in latin_from_128]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([word for word in _WORDS for _ in range(3)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=pad or special[0], model_max_length=128)
    fast.add_special_tokens({"additional_special_tokens": list(special[1:])})
    fast.chat_template = template
    return fast


_LLAMA_LIKE: dict[str, Any] = {"num_key_value_heads": 2}
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_LLAMA_LIKE, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_LLAMA_LIKE, "head_dim": 16, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**_LLAMA_LIKE, "logit_scale": 0.25}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {**_LLAMA_LIKE, "logits_scaling": 8.0}),
    "phi": ("PhiConfig", "PhiForCausalLM", {"partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
}
FAMILIES = tuple(_FAMILIES)


def tiny_model(
    family: str = "llama", *, rows: int = 220, layers: int = 2, width: int = 32, heads: int = 2, seed: int = 0, spread: float = 0.3, **more: Any
) -> PreTrainedModel:
    """A random model (float32, evaluation mode) of one of `FAMILIES`. `spread` is the standard deviation of its matrices: large enough that
    distributions differ from row to row."""
    config_name, model_name, options = _FAMILIES[family]
    options = {
        "vocab_size": rows, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "max_position_embeddings": 128, "initializer_range": spread, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, **options, **more,
    }  # fmt: skip
    if family == "gpt2":
        options["n_inner"] = options.pop("intermediate_size")
    config = getattr(transformers, config_name)(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, model_name)(config).float().eval()
        # Biases and norms begin as constants, under which a mistake in either would not show.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@cache
def _default_tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def save_tiny(
    directory: Path, family: str = "llama", *, tokenizer: PreTrainedTokenizerFast | None = None, model: PreTrainedModel | None = None, **options: Any
) -> Path:
    """A Hugging Face directory with a tiny model and its tokenizer; returns it. `options` are those of `tiny_model`."""
    tokenizer = tokenizer or _default_tokenizer()
    model = model if model is not None else tiny_model(family, **{"rows": len(tokenizer), **options})
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
