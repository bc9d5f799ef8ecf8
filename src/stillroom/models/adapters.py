"""Low-rank adapters on a student, through `peft`: what is learned is B A beside a weight that stays as it is (LoRA, Hu et al. 2021, section 4.1).

A layer with an adapter gives states @ (W + alpha / rank * B A).T. `merged` makes plain weights of that, `save_adapter` a directory that `peft` loads.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stillroom.core import durable
from stillroom.core.errors import ModelError
from stillroom.core.seeds import derive_seed
from stillroom.models.loading import body_of, head_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER = "default"
# Before the name of a module in a file that `peft` wrote.
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Which layers get an adapter, and how large it is. `targets` are names of linear layers of the body, None for all of them; `head` is apart.

    There is no dropout: its draws could not be resumed.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...] | None = None
    head: bool = False
    seed: int = 0


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PreTrainedModel:
    """Puts an adapter beside each layer that is asked for, in place, and freezes all else; the model computes what it did before. Returns it.

    Adapters are float32 and lie where their layer lies. A is drawn uniformly from +-1 / sqrt(inputs), from a generator of its own for each layer, so
    that it depends on the seed and the layer's name alone; B is zero. Raises ModelError 'lora-targets' for a name that no linear layer has.
    """
    names = _targeted(model, settings)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=_as_peft_matches(model, names), task_type="CAUSAL_LM")
    # peft draws first weights from the global generator, and warns of tied weights, which `merged` parts, and of GPT-2's transposed ones.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for name, layer in _adapted(model):
        weight_A, weight_B = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        generator = torch.Generator().manual_seed(derive_seed(settings.seed, "lora", name))
        bound = 1.0 / math.sqrt(weight_A.shape[1])
        with torch.no_grad():
            weight_A.copy_(torch.empty(weight_A.shape).uniform_(-bound, bound, generator=generator))
            weight_B.zero_()
    return model


def has_adapter(model: nn.Module) -> bool:
    """Whether a layer of the model has an adapter."""
    return any(True for _ in _adapted(model))


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _targeted(model: PreTrainedModel, settings: LoraSettings) -> list[str]:
    """Full names of the layers that get an adapter."""
    inside, head = {id(module) for module in body_of(model).modules()}, head_of(model).module
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    body = [name for name, module in linear.items() if id(module) in inside]
    heads = [name for name, module in linear.items() if module is head]
    chosen = set(body)
    if settings.targets is not None:
        found = {target: [name for name in body if f".{name}".endswith(f".{target}")] for target in settings.targets}
        for target, names in found.items():
            if not names:
                raise _no_such_layer(model, target, body, heads)
        chosen = {name for names in found.values() for name in names}
    if settings.head:
        chosen.update(heads)
    return [name for name in linear if name in chosen]


def _no_such_layer(model: PreTrainedModel, target: str, body: list[str], heads: list[str]) -> ModelError:
    known = sorted({name.rpartition(".")[2] for name in body})
    near = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    if any(f".{name}".endswith(f".{target}") for name in heads):
        hint = " The head is adapted by student.lora.head: true."
    return ModelError(
        "lora-targets",
        found=f"{target!r}, which no linear layer of the body of {type(model).__name__} is called",
        expected=f"some of {', '.join(known)}",
        do=f"Correct student.lora.targets, or set it to all-linear.{hint}",
    )


def _as_peft_matches(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The last parts of the names if they mean these layers and no others, as adapters are usually written; else the full names."""
    short = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short) if meant == set(names) else sorted(names)


# -- what becomes of it -------------------------------------------------------------------------------------------------


@torch.no_grad()
def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model whose weights are W + alpha / rank * B A. It shares the weights without an adapter with `model`, which stays as it is.

    A head with an adapter that is tied to the embeddings becomes a weight of its own, since the embeddings did not change.
    """
    plain = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad})
    embeddings = plain.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    for name, layer in list(_adapted(plain)):
        base = layer.get_base_layer()
        if base.weight is embeddings.weight:
            plain.config.get_text_config(decoder=True).tie_word_embeddings = False
            plain.config.tie_word_embeddings = False
        # A new parameter: peft's own merge writes into the one that is there, which may be the embeddings' too.
        base.weight = nn.Parameter(base.weight + layer.get_delta_weight(_ADAPTER), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, base)
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain


def save_adapter(model: PreTrainedModel, directory: Path, base: str, revision: str | None) -> None:
    """Writes adapter_config.json, which names the base model and its commit, and adapter_model.safetensors, both as `peft` reads them."""
    config: Any = model.peft_config[_ADAPTER]
    tree = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.fan_in_fan_out,
        "target_modules": sorted(config.target_modules),
        "inference_mode": True,
    }
    durable.write_bytes_atomic(directory / CONFIG, f"{json.dumps(tree, indent=2)}\n".encode())
    weights = {_in_file(name): parameter.detach().contiguous().cpu() for name, parameter in _learned(model).items()}
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: PreTrainedModel, directory: Path) -> None:
    """The weights that `save_adapter` wrote into the adapters of `model`. Raises ModelError 'model-corrupt' where they are not those of such a model."""
    learned, path = _learned(model), directory / WEIGHTS
    try:
        weights = load_file(path)
        if weights.keys() != {_in_file(name) for name in learned}:
            raise KeyError("it has other layers")
        for name, parameter in learned.items():
            if weights[_in_file(name)].shape != parameter.shape:
                raise ValueError(f"{name} is of another shape")
            parameter.copy_(weights[_in_file(name)])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ModelError(
            "model-corrupt",
            found=f"{path}: {error}",
            expected="the adapter of this student, as it was written",
            do="Restore the file from a copy, or train again in a new directory.",
        ) from error


def _learned(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _in_file(name: str) -> str:
    return _PREFIX + name.replace(f".{_ADAPTER}.", ".")
