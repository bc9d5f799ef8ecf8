"""A Llama or a Qwen3 with a byte-level BPE as one GGUF file, for llama.cpp.

Our own mapping over the `gguf` package's writer. Whatever of the configuration, the tensors or the tokenizer is not known to come out the same in
llama.cpp is refused by name; what cannot be the same but need not matter is said in the notes that come back.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stillroom import __version__
from stillroom.core import durable
from stillroom.core.errors import ModelError, RunError
from stillroom.core.optional import load
from stillroom.models.loading import ModelDescription, describe
from stillroom.models.tokenizers import Renderer, load_tokenizer
from stillroom.models.weight_files import check_safetensors

Quantisation: TypeAlias = Literal["f32", "f16", "q8_0"]

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
_INSIDE_QWEN3 = _INSIDE | {"self_attn.q_norm.weight": "attn_q_norm.weight", "self_attn.k_norm.weight": "attn_k_norm.weight"}
_LAYERS = "model.layers."
# What older checkpoints hold beside the weights: it follows from the configuration.
_FOLLOWS = "rotary_emb.inv_freq"
_ROPE_FACTORS = "rope_freqs.weight"

# Fields of the two configurations that are read or checked here ...
_READ = """
    architectures attention_bias head_dim hidden_act hidden_size intermediate_size is_encoder_decoder layer_types max_position_embeddings mlp_bias
    num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters tie_word_embeddings use_sliding_window vocab_size
""".split()
# ... and those that change nothing in what a trained model computes.
_WITHOUT_EFFECT = """
    _name_or_path attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id id2label initializer_range label2id max_window_layers
    model_type output_attentions output_hidden_states pad_token_id pretraining_tp problem_type return_dict sliding_window transformers_version use_cache
""".split()
_LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}

_LARGEST_HALF = 65504.0
# Numbers that share a scale in q8_0.
_BLOCK = 32
# Header, tokenizer and documents together.
_ROOM_BESIDE_WEIGHTS_BYTES = 64_000_000
# Before the names of the file's facts that GGUF has no name for.
_OURS = "stillroom"
_DOCUMENTS = ("README.md", "NOTICE", "LICENSE", "obligations.md", "LICENSES/*")
_LONGEST_DOCUMENT_BYTES = 1_000_000

# How a text is split before its bytes are merged: the pattern in tokenizer.json, and what llama.cpp calls it.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AROUND_NUMBERS = (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_SPLITS = {r"\p{N}".join(_AROUND_NUMBERS): "qwen2", r"\p{N}{1,3}".join(_AROUND_NUMBERS): "llama-bpe"}
# Of these, llama.cpp takes a word that is a token as it is, without merging it together.
_TAKES_WHOLE_WORDS = ("llama-bpe",)


@dataclass(frozen=True, slots=True)
class Exported:
    """A GGUF file, and in `notes` what llama.cpp does with it otherwise than transformers does with the directory."""

    file: Path
    notes: tuple[str, ...]


def export_gguf(directory: Path, file: Path, *, quantize: Quantisation = "f32") -> Exported:
    """Converts a Hugging Face directory to the GGUF file `file`, which appears complete or not at all.

    f32 keeps every number (bfloat16 and float16 are exact in it). f16 rounds the matrices to half precision; q8_0 rounds them to 8 bits with a
    scale for each 32, embedding and head included. Norms stay float32. The file carries the licence, the digest of the weights and the documents
    that lie beside them (card, NOTICE, licences, obligations) in its metadata.

    Raises ModelError 'model-unsupported' for what is not known to come out the same; whatever `describe` and `load_tokenizer` raise; ResourceError
    'disk-full' and 'path-unwritable'; StillroomError 'missing-extra' without the package `gguf`.
    """
    gguf = load("gguf", extra="export")
    if os.path.isdir(file):
        raise RunError(
            "run-not-a-run", found=f"{file} is a directory", expected="the name of a file", do="Choose another --out, such as student.gguf."
        )
    _refuse_adapter(directory)
    description = describe(str(directory))
    _check_config(description)
    spelling = _spelling(load_tokenizer(str(directory)), description)
    tensors = list(_tensors(description, quantize))
    durable.require_free_bytes(file.parent, sum(one.bytes(gguf) for one in tensors) + _ROOM_BESIDE_WEIGHTS_BYTES, "the GGUF file")
    with durable.unwritable_reported(file, "--out"):
        file.parent.mkdir(parents=True, exist_ok=True)
    with durable.unwritable_reported(file, "--out"), durable.whole_file(file) as place:
        writer = gguf.GGUFWriter(place, description.config.model_type)
        try:
            _write_facts(writer, description)
            _write_shape(writer, description)
            writer.add_file_type(_file_type(gguf, quantize))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _write_spelling(writer, spelling, gguf.TokenType)
            _write_tensors(gguf, writer, tensors, description)
        finally:
            writer.close()
    return Exported(file, (*spelling.notes, *_kept_in_half(tensors, quantize)))


# -- what is refused ----------------------------------------------------------------------------------------------------


def _refuse_adapter(directory: Path) -> None:
    if (directory / "adapter_config.json").is_file():
        raise ModelError(
            "model-unsupported",
            found=f"{directory} with a LoRA adapter",
            expected="a whole model",
            do="Merge it into its base model and save that (peft's merge_and_unload, then save_pretrained), or train with student.lora.save: merged.",
        )


def _check_config(description: ModelDescription) -> None:
    """Every field that transformers knows of such a model is known here too, and those with an effect have a value that llama.cpp computes."""
    config, source = description.config, repr(description.source)
    if not (isinstance(config, LlamaConfig | Qwen3Config) and description.architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")):
        raise _unsupported(f"{source}, a {description.architecture}", "LlamaForCausalLM or Qwen3ForCausalLM")
    for name in type(config)().to_dict():
        if name not in _READ and name not in _WITHOUT_EFFECT:
            raise _unsupported(f"{source}, whose configuration has the field {name}", "fields that this converter knows")
    if config.attention_bias or getattr(config, "mlp_bias", False):
        raise _unsupported(f"{source} with biases", "a model without biases")
    if config.hidden_act != "silu":
        raise _unsupported(f"{source} with the activation {config.hidden_act}", "silu")
    if getattr(config, "use_sliding_window", False) or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise _unsupported(f"{source} with sliding-window attention", "full attention in every layer")
    _check_rope(config, source)


def _check_rope(config: PretrainedConfig, source: str) -> None:
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    kind = rope.pop("rope_type", "default")
    if kind != "default" and not (kind == "llama3" and isinstance(config, LlamaConfig)):
        raise _unsupported(f"{source} with {kind} rotary positions", "plain rotary positions, or for a Llama those of Llama 3")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported(f"{source} with partial rotary positions", "rotary positions on the whole head")
    unknown = set(rope) - {"rope_theta"} - (_LLAMA3_ROPE if kind == "llama3" else set())
    if unknown:
        raise _unsupported(f"{source} with {', '.join(sorted(unknown))} in rope_parameters", "rotary positions that this converter knows")


def _unsupported(found: str, expected: str) -> ModelError:
    return ModelError("model-unsupported", found=found, expected=expected, do="Use llama.cpp's own converter for this model, or serve it with vLLM.")


# -- what it is ---------------------------------------------------------------------------------------------------------


def _write_facts(writer: Any, description: ModelDescription) -> None:
    """Where the file comes from and what its user must know of it: llama.cpp ignores what it does not know."""
    writer.add_name(description.directory.name)
    if description.licence is not None:
        writer.add_license(description.licence)
    writer.add_string(f"{_OURS}.version", __version__)
    writer.add_string(f"{_OURS}.source.weights_sha256", description.weights_sha256)
    documents = {
        str(path.relative_to(description.directory)): path.read_text(encoding="utf-8", errors="replace")
        for pattern in _DOCUMENTS
        for path in sorted(description.directory.glob(pattern))
        if path.is_file() and path.stat().st_size <= _LONGEST_DOCUMENT_BYTES
    }
    if documents:
        writer.add_array(f"{_OURS}.documents.names", list(documents))
        writer.add_array(f"{_OURS}.documents.texts", list(documents.values()))


def _write_shape(writer: Any, description: ModelDescription) -> None:
    config, shape = description.config, description.shape
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_value_heads)
    writer.add_key_length(shape.head_dimension)
    writer.add_value_length(shape.head_dimension)
    writer.add_rope_dimension_count(shape.head_dimension)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(shape.rows)


def _file_type(gguf: ModuleType, quantize: Quantisation) -> int:
    kinds = gguf.LlamaFileType
    file_type: int = {"f32": kinds.ALL_F32, "f16": kinds.MOSTLY_F16, "q8_0": kinds.MOSTLY_Q8_0}[quantize]
    return file_type


# -- the tensors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the GGUF file: its name there and in `file`, its shape, how its numbers are stored, and the heads to turn (see `_neighbours`)."""

    name: str
    source: str
    file: Path
    shape: tuple[int, ...]
    stored: str
    heads: int | None

    def bytes(self, gguf: ModuleType) -> int:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.stored]]
        count: int = int(np.prod(self.shape, dtype=np.int64)) // block * size
        return count

    def read(self) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(self.source)
        return tensor.float() if self.heads is None else _neighbours(tensor.float(), self.heads)


def _tensors(description: ModelDescription, quantize: Quantisation) -> Iterator[_Tensor]:
    """Every tensor of the files once, those left out that say nothing new."""
    inside = _INSIDE_QWEN3 if isinstance(description.config, Qwen3Config) else _INSIDE
    seen: dict[str, str] = {}
    for path in description.weight_files:
        for source, entry in check_safetensors(path).items():
            if source.endswith(_FOLLOWS) or (source == "lm_head.weight" and description.shape.tied_embeddings):
                continue
            name, shape = _named(source, inside), tuple(entry["shape"])
            if name in seen:
                raise _unsupported(f"two tensors {source!r}", "each tensor once")
            seen[name] = source
            yield _Tensor(name, source, path, shape, _stored(shape, quantize), _heads(source, description))


def _named(source: str, inside: dict[str, str]) -> str:
    if source in _OUTSIDE:
        return _OUTSIDE[source]
    index, _, rest = source.removeprefix(_LAYERS).partition(".")
    if not source.startswith(_LAYERS) or rest not in inside or not index.isdecimal():
        raise _unsupported(f"a tensor {source!r}", "the tensors of such a model")
    return f"blk.{index}.{inside[rest]}"


def _stored(shape: tuple[int, ...], quantize: Quantisation) -> str:
    """How llama.cpp's own tools store it: vectors in float32, and a matrix whose rows do not fill the blocks of q8_0 in float16."""
    if len(shape) < 2 or quantize == "f32":
        return "F32"
    return "Q8_0" if quantize == "q8_0" and shape[-1] % _BLOCK == 0 else "F16"


def _heads(source: str, description: ModelDescription) -> int | None:
    """A Llama's queries and keys are turned number by number: transformers turns number i of a head with number i + half of it, llama.cpp with its
    neighbour. Of a Qwen3 it does as transformers.
    """
    if isinstance(description.config, Qwen3Config):
        return None
    shape = description.shape
    return {"self_attn.q_proj.weight": shape.heads, "self_attn.k_proj.weight": shape.key_value_heads}.get(".".join(source.split(".")[-3:]))


def _neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_tensors(gguf: ModuleType, writer: Any, tensors: list[_Tensor], description: ModelDescription) -> None:
    """One after the other, so that one is in memory at a time."""
    factors = _rope_factors(description)
    for one in tensors:
        kind = gguf.GGMLQuantizationType[one.stored]
        shape = one.shape if one.stored != "Q8_0" else gguf.quant_shape_to_byte_shape(one.shape, kind)
        writer.add_tensor_info(one.name, shape, np.dtype(np.uint8 if one.stored == "Q8_0" else np.float32), one.bytes(gguf), kind)
    if factors is not None:
        writer.add_tensor_info(_ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for one in tensors:
            writer.write_tensor_data(_laid_out(gguf, one))
        if factors is not None:
            writer.write_tensor_data(factors)
    except OSError as error:
        if error.errno is None:  # numpy says of a write that fell short only how much it wrote
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _laid_out(gguf: ModuleType, one: _Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    tensor = one.read()
    largest = float(tensor.abs().max())
    if not largest < float("inf"):
        found = f"{one.file}, whose tensor {one.source!r} is not finite"
        raise ModelError("model-corrupt", found=found, expected="numbers", do="Fetch or copy the weights again.")
    if one.stored != "F32" and largest > _LARGEST_HALF:
        raise _unsupported(f"a tensor {one.source!r} with {largest:g} in it", f"numbers up to {_LARGEST_HALF:g}, or no --quantize")
    quantised: np.ndarray[Any, np.dtype[Any]] = gguf.quants.quantize(tensor.contiguous().numpy(), gguf.GGMLQuantizationType[one.stored])
    return quantised


def _rope_factors(description: ModelDescription) -> np.ndarray[Any, np.dtype[Any]] | None:
    """What Llama 3 divides each frequency of plain rotary positions by, as transformers computes it; None where positions are plain."""
    config, half = description.config, description.shape.head_dimension // 2
    if config.rope_parameters.get("rope_type", "default") == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(half, dtype=torch.float64) / half)
    factors: np.ndarray[Any, np.dtype[Any]] = (plain / scaled.double()).float().numpy()
    return factors


def _kept_in_half(tensors: list[_Tensor], quantize: Quantisation) -> tuple[str, ...]:
    wide = [one.name for one in tensors if one.stored == "F16"] if quantize == "q8_0" else []
    return (f"{len(wide)} matrices whose rows are no multiple of {_BLOCK} numbers are in float16 ({wide[0]}, ...)",) if wide else ()


# -- the tokenizer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spelling:
    """The tokenizer as llama.cpp takes it. `kinds` are names of gguf's TokenType; `end_ids` are all at which an answer ends, the tokenizer's first."""

    pre: str
    tokens: list[str]
    kinds: list[str]
    merges: list[str]
    end_ids: tuple[int, ...]
    start_id: int | None
    pad_id: int | None
    adds_start: bool
    template: str | None
    notes: tuple[str, ...]


def _spelling(tokenizer: PreTrainedTokenizerFast, description: ModelDescription) -> _Spelling:
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _pre_tokenizer(tree)
    _check_merging(tree["model"], pre)
    tokens, kinds = _tokens(tokenizer, description.shape.rows)
    template = _template(tokenizer)
    renderer = Renderer(tokenizer)
    return _Spelling(
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"]["merges"]],
        end_ids=_end_ids(tokenizer, description, renderer),
        start_id=tokenizer.bos_token_id,
        pad_id=tokenizer.pad_token_id,
        adds_start=_adds_start(tokenizer, renderer, template),
        template=template,
        notes=tuple(_notes(tree, tokenizer, template)),
    )


def _pre_tokenizer(tree: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which the tokenizer splits a text."""
    split = tree["pre_tokenizer"] or {}
    if _is_byte_level(split, use_regex=True):
        return _with_normalizer("gpt-2", tree["normalizer"])
    match split:
        case {
            "type": "Sequence",
            "pretokenizers": [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, then],
        } if pattern in _SPLITS and _is_byte_level(then, use_regex=False):
            return _with_normalizer(_SPLITS[pattern], tree["normalizer"])
    kind = tree["model"]["type"]
    raise _unsupported(f"a tokenizer of type {kind} with the pre-tokenizer {split.get('type')}", "byte-level BPE split as GPT-2, Qwen2 or Llama 3 do")


def _is_byte_level(split: dict[str, Any], *, use_regex: bool) -> bool:
    plain = split.get("type") == "ByteLevel" and not split.get("add_prefix_space", False)
    return plain and split.get("use_regex", True) == use_regex


def _with_normalizer(pre: str, normalizer: dict[str, Any] | None) -> str:
    # NFC changes few texts, and every Qwen has it: the notes say so.
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise _unsupported(f"a tokenizer with the normalizer {normalizer.get('type')}", "none, or NFC")
    return pre


def _check_merging(model: dict[str, Any], pre: str) -> None:
    if model["type"] != "BPE":
        raise _unsupported(f"a tokenizer of type {model['type']}", "byte-level BPE")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise _unsupported(f"a BPE with {name} = {model[name]!r}", "a byte-level BPE without it")
    if bool(model.get("ignore_merges")) != (pre in _TAKES_WHOLE_WORDS):
        raise _unsupported(f"a BPE with ignore_merges = {model.get('ignore_merges')} and {pre}'s way to split", "what llama.cpp does with that way")


def _tokens(tokenizer: PreTrainedTokenizerFast, rows: int) -> tuple[list[str], list[str]]:
    """The text and the kind of each of the head's rows."""
    added = tokenizer.added_tokens_decoder
    texts = {index: text for text, index in tokenizer.get_vocab().items()} | {index: str(token) for index, token in added.items()}
    if max(texts) >= rows:
        raise _unsupported(f"a token {texts[max(texts)]!r} with the id {max(texts)}, for which the head has no row", f"ids below {rows}")
    for token in added.values():
        if token.lstrip or token.rstrip or token.single_word:
            raise _unsupported(
                f"an added token {str(token)!r} that takes the white space around it, or is only a word", "added tokens that do neither"
            )
    # A row that no token has still needs an entry of its own. No text is ever split into one with a plain space in it.
    tokens = [texts.get(index, f"[unused {index}]") for index in range(rows)]
    kinds = ["NORMAL" if index in texts else "UNUSED" for index in range(rows)]
    for index, token in added.items():
        kinds[index] = "CONTROL" if token.special else "USER_DEFINED"
    return tokens, kinds


def _template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        raise _unsupported(f"several chat templates ({', '.join(template)})", "one")
    if template and "bos_token" in template and tokenizer.bos_token_id is None:
        raise _unsupported("a chat template with bos_token, which the tokenizer does not have", "a tokenizer that has it")
    return template or None


def _end_ids(tokenizer: PreTrainedTokenizerFast, description: ModelDescription, renderer: Renderer) -> tuple[int, ...]:
    end = tokenizer.eos_token_id
    if end is None:
        raise _unsupported("a tokenizer without an end token (llama.cpp would take another for it)", "an eos_token")
    others = sorted({*description.end_ids, *renderer.end_ids} - {end})
    if len(others) > 2:
        raise _unsupported(f"{len(others) + 1} ids at which an answer ends", "at most three")
    return (end, *others)


def _adds_start(tokenizer: PreTrainedTokenizerFast, renderer: Renderer, template: str | None) -> bool:
    """Whether the tokenizer puts its start token before a text. llama.cpp does so before a conversation too, unless its text begins with it."""
    start, before = tokenizer.bos_token_id, renderer.start_ids
    if before not in ((), (start,)):
        raise _unsupported(f"a tokenizer that puts the ids {list(before)} before a text", "its start token, or nothing")
    if before and template and not _rendered(tokenizer).startswith(str(tokenizer.bos_token)):
        raise _unsupported("a tokenizer that puts its start token before a text, with a chat template that does not", "both, or neither")
    return bool(before)


def _rendered(tokenizer: PreTrainedTokenizerFast, **more: Any) -> str:
    return str(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True, **more))


def _notes(tree: dict[str, Any], tokenizer: PreTrainedTokenizerFast, template: str | None) -> Iterator[str]:
    if tree["normalizer"] is not None:
        yield "llama.cpp does not compose characters (NFC): a text that is not composed already becomes other tokens than in training"
    missing = len(set(pre_tokenizers.ByteLevel.alphabet()) - set(tokenizer.get_vocab()))
    if missing:
        yield f"{missing} of the 256 bytes have no token: a text with one of them may become other tokens than in training"
    if template and "enable_thinking" in template and _rendered(tokenizer) != _rendered(tokenizer, enable_thinking=True):
        yield "the chat template thinks only where enable_thinking is given: with llama.cpp, say chat_template_kwargs of a request what it shall be"
    if template is None:
        yield "there is no chat template: llama.cpp would put one of its own around messages, so ask for completions of a text"


def _write_spelling(writer: Any, spelling: _Spelling, kinds: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(spelling.pre)
    writer.add_token_list(spelling.tokens)
    writer.add_token_types([kinds[kind] for kind in spelling.kinds])
    writer.add_token_merges(spelling.merges)
    end, *others = spelling.end_ids
    writer.add_eos_token_id(end)
    for add, index in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(index)
    # Without one llama.cpp would take GPT-2's own id for the start token.
    writer.add_bos_token_id(end if spelling.start_id is None else spelling.start_id)
    writer.add_pad_token_id(end if spelling.pad_id is None else spelling.pad_id)
    writer.add_add_bos_token(spelling.adds_start)
    writer.add_add_eos_token(False)
    if spelling.template is not None:
        writer.add_chat_template(spelling.template)
