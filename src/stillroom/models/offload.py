"""An optimiser whose state is in host memory, for weights on an accelerator that has no room for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class HostOptimiser:
    """Steps float32 copies of the parameters on the CPU, with gradients that come from the device, and writes the result back.

    Used as the optimiser itself: `state` is by the device's parameters, whatever was loaded into it. What it computes is bit for bit what `make`'s
    optimiser computes on the CPU. The copies and the moments take 12 bytes of host memory for each number; the device keeps weights and gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]) -> None:
        self._copies = {parameter: nn.Parameter(_on_host(parameter)) for parameter in parameters}
        self._gradients: dict[nn.Parameter, torch.Tensor] = {}
        self._versions = {parameter: parameter._version for parameter in self._copies}
        self._optimiser = make(self._copies.values())
        self.state: dict[nn.Parameter, dict[str, torch.Tensor]] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimiser.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """One step of every parameter that has a gradient."""
        for parameter, copy in self._copies.items():
            self._adopt(parameter, copy)
            copy.grad = self._fetched(parameter)
        _wait(self._copies)
        self._optimiser.step()
        for parameter, copy in self._copies.items():
            if copy.grad is None:
                continue
            self.state[parameter] = self._optimiser.state[copy]
            parameter.copy_(copy, non_blocking=True)
            self._versions[parameter] = parameter._version
        # Until the weights are there, the copies must not change.
        _wait(self._copies)

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Forgets the gradients on the device."""
        for parameter in self._copies:
            if set_to_none or parameter.grad is None:
                parameter.grad = None
            else:
                parameter.grad.zero_()

    def _adopt(self, parameter: nn.Parameter, copy: nn.Parameter) -> None:
        """Takes over what was loaded since the last step: state, and weights, which PyTorch counts the changes of."""
        loaded = self.state.get(parameter)
        if loaded is not None and loaded is not self._optimiser.state.get(copy):
            self._optimiser.state[copy] = self.state[parameter] = {name: _on_host(value) for name, value in loaded.items()}
        if parameter._version != self._versions[parameter]:
            copy.copy_(parameter)

    def _fetched(self, parameter: nn.Parameter) -> torch.Tensor | None:
        if parameter.grad is None:
            return None
        if parameter not in self._gradients:
            self._gradients[parameter] = _pinned(parameter)
        return self._gradients[parameter].copy_(parameter.grad, non_blocking=True)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, from which a GPU can fetch without waiting."""
    return _pinned(tensor).copy_(tensor.detach())


def _pinned(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")


def _wait(parameters: Iterable[nn.Parameter]) -> None:
    """Until every copy that was begun is done."""
    if any(parameter.device.type == "cuda" for parameter in parameters):
        torch.cuda.synchronize()
