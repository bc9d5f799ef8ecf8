"""How a model computes: linear layers kept in eight bits, layers computed again for their gradient, bodies that are compiled.

Each changes a model in place and leaves what it computes the same up to what is said of it. V and D are the rows and columns of a layer's weight.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stillroom.core.errors import ModelError, ResourceError
from stillroom.models.loading import body_of, head_of, layers_of
from stillroom.models.packing import leave_to_python, packs

# -- eight bits -----------------------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept as int8 and one float32 scale for each of its rows, the row's largest number over 127; no gradient reaches it.

    A weight is off by at most half its row's scale. Products are in the type of what comes in: every int8 is a number of bfloat16, and the scale is
    applied to the sum.
    """

    weight: torch.Tensor
    scale_V: torch.Tensor

    def __init__(self, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> None:
        super().__init__()
        weight_VD = weight_VD.detach().float()
        scale_V = weight_VD.abs().amax(dim=-1).clamp_(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (weight_VD / scale_V[:, None]).round_().to(torch.int8))
        self.register_buffer("scale_V", scale_V)
        self.bias = None if bias_V is None else nn.Parameter(bias_V.detach().clone(), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`states` times the weight, plus the bias, in their type."""
        summed = functional.linear(states, self.weight.to(states.dtype)) * self.scale_V
        return (summed if self.bias is None else summed + self.bias).to(states.dtype)


def quantise(model: PreTrainedModel) -> None:
    """The linear layers of the body become `Int8Linear`; embeddings, norms and head stay. Raises ModelError 'model-unsupported' where there are none."""
    head = head_of(model).module
    found = [
        (parent, name, layer)
        for parent in body_of(model).modules()
        for name, layer in parent.named_children()
        if type(layer) in (nn.Linear, Conv1D) and layer is not head
    ]
    if not found:
        raise ModelError(
            "model-unsupported",
            found=f"{type(model).__name__}, whose body has no linear layers that could be kept in eight bits",
            expected="torch.nn.Linear or transformers' Conv1D",
            do="Set teacher.dtype to bfloat16.",
        )
    while found:  # so that each layer is let go when the one that takes its place is there
        parent, name, layer = found.pop()
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        bias = layer.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        setattr(parent, name, Int8Linear(weight.T if isinstance(layer, Conv1D) else weight, bias))


# -- layers computed again ------------------------------------------------------------------------------------------------


def recompute_layers(model: PreTrainedModel) -> None:
    """From now on a pass keeps only the input of each decoder layer and computes the layer again for its gradient: the same numbers.

    `transformers` does this in training mode alone, which would bring dropout with it. Raises ModelError 'model-unsupported' for a decoder whose layers
    are not one list.
    """
    for layer in layers_of(model):
        # Of the layer, not its class: hooks stay outside, so that what they gather or free is not gathered again within.
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *arguments: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    # Nothing in a layer is drawn at random, in evaluation mode.
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


# -- compiled -------------------------------------------------------------------------------------------------------------


def compile_body(model: PreTrainedModel) -> None:
    """Has torch.compile make kernels of the body when it is first called; shapes may change from call to call. Call `require_compiler` first."""
    if packs(model):
        leave_to_python()
    body_of(model).compile(dynamic=True)


def not_compiled(model: PreTrainedModel) -> AbstractContextManager[object]:
    """Within, a compiled body computes as it did before: for writing, where each token is another shape, a cache is filled and little is computed."""
    # Asking torch.compiler for anything loads the compiler, which takes a second and memory.
    return torch.compiler.set_stance("force_eager") if body_of(model)._compiled_call_impl is not None else nullcontext()


def require_compiler(device: torch.device) -> None:
    """Compiles one line. Raises ResourceError 'compiler-unavailable' with what the compiler said."""
    try:
        torch.compile(lambda x: torch.sin(x) * 2)(torch.ones(64, device=device))
    except Exception as error:  # whatever the compilers of a machine raise
        raise ResourceError(
            "compiler-unavailable",
            found=f"torch.compile on {device.type}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            expected="a C++ compiler on a CPU, Triton on a GPU",
            do="Install one, or set hardware.compile to false.",
        ) from error
