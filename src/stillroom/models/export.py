"""A student as a plain Hugging Face directory, or as an adapter that `peft` loads: neither needs anything of Stillroom to be used."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from stillroom.core.durable import replace_directory, require_free_bytes, write_bytes_atomic
from stillroom.models.adapters import save_adapter
from stillroom.models.loading import silence
from stillroom.models.tokenizers import Renderer

# Tokenizer, configuration and card together.
_ROOM_BESIDE_WEIGHTS_BYTES = 64_000_000
_OF_LOADING = ("is_local", "local_files_only", "name_or_path")


def export_student(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path, card_text: str, *, end_ids: Sequence[int] | None = None
) -> None:
    """Writes config.json, model.safetensors, generation_config.json, the tokenizer with its chat template, and `card_text` as README.md.

    `directory` appears complete or not at all; what it held before is replaced. The same model and tokenizer give the same bytes, wherever
    they were loaded from. Generation is greedy and ends at `end_ids` (default: the tokenizer's end token and the template's); padding is the
    tokenizer's, else the end token. Neither argument is changed. Raises ResourceError 'disk-full'.
    """
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    _export(model.save_pretrained, weight_bytes, tokenizer, directory, card_text, end_ids)


def export_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    card_text: str,
    *,
    base: str,
    revision: str | None,
    end_ids: Sequence[int] | None = None,
) -> None:
    """As `export_student`, with adapter_config.json and adapter_model.safetensors in place of configuration and weights: what models.adapters learned.

    `base` is the directory or hub id of the model that the adapter belongs to, `revision` its commit on the hub.
    """
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters() if parameter.requires_grad)
    _export(lambda partial: save_adapter(model, partial, base, revision), weight_bytes, tokenizer, directory, card_text, end_ids)


def _export(
    save_weights: Callable[[Path], object],
    weight_bytes: int,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    card_text: str,
    end_ids: Sequence[int] | None,
) -> None:
    require_free_bytes(directory, weight_bytes + _ROOM_BESIDE_WEIGHTS_BYTES, "the exported student")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with silence():
        save_weights(partial)
        _at_rest(tokenizer).save_pretrained(partial)
        _generation(tokenizer, end_ids).save_pretrained(partial)
    write_bytes_atomic(partial / "README.md", card_text.encode("utf-8"))
    # safetensors writes files that only their owner may read; whoever serves the student may be another user.
    for weights in partial.glob("*.safetensors"):
        weights.chmod((partial / "tokenizer_config.json").stat().st_mode)
    replace_directory(partial, directory)


def _at_rest(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer without the padding and truncation of its last call and without how it was loaded, which it would otherwise save."""
    fresh = copy.deepcopy(tokenizer)
    for key in _OF_LOADING:
        fresh.init_kwargs.pop(key, None)
    fresh.backend_tokenizer.no_padding()
    fresh.backend_tokenizer.no_truncation()
    return fresh


def _generation(tokenizer: PreTrainedTokenizerFast, end_ids: Sequence[int] | None) -> GenerationConfig:
    ends = sorted(Renderer(tokenizer).end_ids if end_ids is None else end_ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None)
    end = ends[0] if len(ends) == 1 else ends or None
    return GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=pad, do_sample=False)
