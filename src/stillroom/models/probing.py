"""Small copies of models, and what running them takes: seconds by the clock, bytes by following every tensor that is made.

A copy has one or two of a model's layers and a few of its vocabulary's rows, so that a model too large for this machine is probed as well. Layers
are alike: what a quantity is for any number of them follows from what it is for one and for two.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from stillroom.models.loading import ModelShape, config_from_teacher, count_parameters, skeleton_of

# A copy's embeddings and head have at most so many numbers each; what the rest of the vocabulary takes is in proportion.
HEAD_NUMBERS = 2**23
# Two layers may take this share of the memory that is free; of wider models a narrower stand-in is probed.
_SHARE_OF_FREE_MEMORY = 0.25
_STAND_IN_WIDTH = 1024
# An action is repeated until its two fastest runs are so near each other that nothing came between, but no longer than this.
_LEAST_REPEATS, _REPEATS, _NEAR = 3, 40, 1.1
_SECONDS_OF_REPEATS = 0.5


# --- what it takes ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one action: wall seconds; the most bytes of its tensors that lived at once; those that its result keeps alive."""

    seconds: float
    peak_bytes: float
    kept_bytes: float

    def per(self, count: int) -> Cost:
        """The share of one of `count`."""
        return Cost(self.seconds / count, self.peak_bytes / count, self.kept_bytes / count)


class Meter:
    """Measures actions on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slowdowns: list[float] = []

    @property
    def slowdown(self) -> float:
        """How much longer an action took on average than at its fastest: what other work on this machine costs. At least 1.

        Of the actions the middle one: a pause of the machine, which one of them met, says nothing of a run.
        """
        return statistics.median(self._slowdowns) if self._slowdowns else 1.0

    def cost(self, action: Callable[[], object]) -> Cost:
        """Weighs `action` in one run and times it in others; the first run is also the warm-up."""
        peak, kept = self.bytes(action)
        return Cost(self.seconds(action), peak, kept)

    def bytes(self, action: Callable[[], object]) -> tuple[int, int]:
        """The most bytes that lived at once on the device, and those that the result of `action` keeps alive."""
        with LiveBytes(self.device) as live:
            result = action()
            kept = live.now
            del result
        return live.peak, kept

    def seconds(self, action: Callable[[], object]) -> float:
        """The fastest of a few runs."""
        taken: list[float] = []
        while len(taken) < _REPEATS and sum(taken) < _SECONDS_OF_REPEATS and not _settled(taken):
            self._wait()
            began = time.perf_counter()
            action()
            self._wait()
            taken.append(time.perf_counter() - began)
        self._slowdowns.append(statistics.fmean(taken) / min(taken))
        return min(taken)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def _settled(taken: Sequence[float]) -> bool:
    """Whether the fastest run was no chance."""
    if len(taken) < _LEAST_REPEATS:
        return False
    fastest, next_fastest = sorted(taken)[:2]
    return next_fastest <= _NEAR * fastest


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, on one kind of device, for as long as each lives: `now`, and `peak`, their maximum."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._device = device
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {_address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(made):
            # A view of what was there before is not new.
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self._device.type and _address(tensor) not in given:
                self._follow(tensor.untyped_storage())
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._storages:
            return

        def gone(_: weakref.ref[torch.UntypedStorage]) -> None:
            self.now -= size
            del self._storages[address]

        self._storages[address] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _address(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


@contextmanager
def as_in_a_run(threads: int) -> Iterator[None]:
    """Torch as a run sets it: so many threads, deterministic algorithms. Everything, the generator too, is as before afterwards."""
    threads_before = torch.get_num_threads()
    deterministic, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_num_threads(threads_before)


# --- copies -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A model as it is known without its weights."""

    config: PretrainedConfig
    shape: ModelShape
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """What copies are made from: a configuration whose `rows` are a part of the model's vocabulary.

    A stand-in is of another, narrower model; a layer of the model itself takes `scale` times as long, and its states are `widening` times as wide.
    """

    config: PretrainedConfig
    layers: int
    rows: int
    layer_parameters: float
    scale: float = 1.0
    widening: float = 1.0
    stands_in: bool = False


def pattern_of(outline: Outline, bytes_per_parameter: int, device: torch.device) -> Pattern:
    """How a model is to be probed: by its own layers, or by a stand-in where they are too wide for the memory that is free, or cannot be cut."""
    rows = max(256, min(outline.shape.rows, HEAD_NUMBERS // outline.shape.width))
    try:
        one, two = (_parameters(_cut(outline.config, depth, rows)) for depth in (1, 2))
    except Exception:  # whatever an architecture makes of a configuration of one layer
        return stand_in(outline)
    if 2 * (two - one) * bytes_per_parameter > _SHARE_OF_FREE_MEMORY * _free_bytes(device):
        return stand_in(outline)
    return Pattern(config=outline.config, layers=outline.shape.layers, rows=rows, layer_parameters=float(two - one))


def stand_in(outline: Outline) -> Pattern:
    """A Llama of moderate width, whose layers take as much less time as they have fewer parameters."""
    width, shape = min(_STAND_IN_WIDTH, outline.shape.width), outline.shape
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2, num_attention_heads=max(1, width // 64), head_dim=64
    )
    narrow = _parameters(_cut(config, 2, 256)) - _parameters(_cut(config, 1, 256))
    each = max(1.0, (outline.parameters - (1 if shape.tied_embeddings else 2) * shape.rows * shape.width) / shape.layers)
    return Pattern(
        config=config,
        layers=shape.layers,
        rows=256,
        layer_parameters=float(narrow),
        scale=each / narrow,
        widening=shape.width / width,
        stands_in=True,
    )


def copy_of(pattern: Pattern, depth: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A copy of `depth` layers, in evaluation mode; its weights mean nothing."""
    config = _cut(pattern.config, depth, pattern.rows)
    # As when it is loaded: fused attention cannot cap its logits.
    eager = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) is not None else {}
    model: Any
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype, **eager)
    model = model.to_empty(device=device).eval()
    assert isinstance(model, PreTrainedModel)
    # Small and not all alike: no number is so small that arithmetic with it is slow, and experts are chosen as by chance.
    noise = 0.02 * torch.randn(2**16 + 1, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            for part in tensor.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)]) if tensor.is_floating_point() else part.zero_()
    return model


def _cut(config: PretrainedConfig, depth: int, rows: int) -> PretrainedConfig:
    cut = config_from_teacher(config, [min(index, int(config.num_hidden_layers) - 1) for index in range(depth)])
    cut.vocab_size = rows
    cut.pad_token_id = None
    return cut


def _parameters(config: PretrainedConfig) -> int:
    return count_parameters(skeleton_of(config))


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else int(psutil.virtual_memory().available)
