"""A Llama with a byte-level BPE as one GGUF file, for llama.cpp.

Our own mapping over the `gguf` package's writer. It covers what `build_from_scratch` makes and what is bundled: plain rotary positions,
no biases, GPT-2's pre-tokenizer. Everything else is refused by name.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, PreTrainedTokenizerFast

from stillroom.core.errors import ModelError
from stillroom.core.optional import load
from stillroom.models.loading import ModelDescription, describe
from stillroom.models.tokenizers import load_tokenizer

_OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
_INSIDE = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_LAYERS = "model.layers."


def export_gguf(directory: Path, file: Path, *, quantize: Literal["f32", "f16"] = "f32") -> None:
    """Converts a Hugging Face directory to the GGUF file `file`, which appears complete or not at all.

    With f16 the matrices are rounded to half precision and the norms stay float32. Raises ModelError 'model-unsupported' for another
    architecture, scaled rotary positions, biases, or another kind of tokenizer; and whatever `describe` and `load_tokenizer` raise;
    StillroomError 'missing-extra' without the package `gguf`.
    """
    gguf = load("gguf", extra="export")
    description = describe(str(directory))
    config = _plain_llama(description)
    tokenizer = load_tokenizer(str(directory))
    partial = file.with_name(f".{file.name}.partial")
    writer = gguf.GGUFWriter(partial, "llama")
    try:
        _write_shape(writer, config, description, gguf.LlamaFileType.MOSTLY_F16 if quantize == "f16" else gguf.LlamaFileType.ALL_F32)
        _write_tokenizer(writer, tokenizer, config.vocab_size, gguf.TokenType)
        for path in description.weight_files:
            for name, tensor in load_file(path).items():
                mapped = _named(name, description.shape.tied_embeddings)
                if mapped is not None:
                    writer.add_tensor(mapped, _laid_out(name, tensor, config, quantize))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise
    writer.close()
    os.replace(partial, file)


def _plain_llama(description: ModelDescription) -> LlamaConfig:
    config = description.config
    if not isinstance(config, LlamaConfig) or description.architecture != "LlamaForCausalLM":
        raise _unsupported(f"{description.source!r}, a {description.architecture}", "LlamaForCausalLM")
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") != "default":
        raise _unsupported(f"{description.source!r} with {rope['rope_type']} rotary positions", "plain rotary positions")
    if config.attention_bias or config.mlp_bias:
        raise _unsupported(f"{description.source!r} with biases", "a Llama without biases")
    if config.hidden_act != "silu":
        raise _unsupported(f"{description.source!r} with the activation {config.hidden_act}", "silu")
    return config


def _write_shape(writer: Any, config: LlamaConfig, description: ModelDescription, file_type: int) -> None:
    shape = description.shape
    writer.add_name(description.directory.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_value_heads)
    writer.add_key_length(shape.head_dimension)
    writer.add_value_length(shape.head_dimension)
    writer.add_rope_dimension_count(shape.head_dimension)
    writer.add_rope_freq_base(dict[str, Any](config.rope_parameters or {}).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(shape.rows)
    writer.add_file_type(file_type)


def _write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, rows: int, token_type: Any) -> None:
    merges = _merges(tokenizer)
    added = tokenizer.added_tokens_decoder
    texts = {index: text for text, index in tokenizer.get_vocab().items()} | {index: str(token) for index, token in added.items()}
    # An id of the head that no token has still needs an entry, and no two entries may be equal.
    tokens = [texts.get(index, f"[unused {index}]") for index in range(rows)]
    types = [token_type.NORMAL if index in texts else token_type.UNUSED for index in range(rows)]
    for index, token in added.items():
        types[index] = token_type.CONTROL if token.special else token_type.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    if end is not None:
        writer.add_eos_token_id(end)
        # llama.cpp would otherwise take GPT-2's own id for the start token.
        writer.add_bos_token_id(end if start is None else start)
        writer.add_pad_token_id(end if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _merges(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The BPE's merges as llama.cpp reads them, if the tokenizer splits text as GPT-2's does."""
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    model, split = tree["model"], tree["pre_tokenizer"] or {}
    like_gpt2 = split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split.get("add_prefix_space", False)
    if model["type"] != "BPE" or not like_gpt2 or tree["normalizer"]:
        raise _unsupported(
            f"a tokenizer of type {model['type']} with the pre-tokenizer {split.get('type')}", "byte-level BPE with GPT-2's pre-tokenizer"
        )
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _named(name: str, tied: bool) -> str | None:
    """The tensor's name in GGUF; None for a head that is the embedding again, which llama.cpp finds by itself."""
    if name == "lm_head.weight" and tied:
        return None
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    index, _, rest = name.removeprefix(_LAYERS).partition(".")
    if not name.startswith(_LAYERS) or rest not in _INSIDE:
        raise _unsupported(f"a tensor {name!r}", "the tensors of LlamaForCausalLM")
    return f"blk.{index}.{_INSIDE[rest]}"


def _laid_out(name: str, tensor: torch.Tensor, config: LlamaConfig, dtype: str) -> np.ndarray[Any, np.dtype[Any]]:
    """The tensor in GGUF's layout. transformers turns number i of a head with number i + half of it, llama.cpp with its neighbour."""
    if name.endswith("q_proj.weight"):
        tensor = _neighbours(tensor, config.num_attention_heads)
    elif name.endswith("k_proj.weight"):
        tensor = _neighbours(tensor, config.num_key_value_heads or config.num_attention_heads)
    wanted = torch.float16 if dtype == "f16" and tensor.ndim > 1 else torch.float32
    return tensor.to(wanted).contiguous().numpy()


def _neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _unsupported(found: str, expected: str) -> ModelError:
    return ModelError("model-unsupported", found=found, expected=expected, do="Use llama.cpp's own converter for this model.")
