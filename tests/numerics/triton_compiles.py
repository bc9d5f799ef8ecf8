"""Compiles the kernels of `objectives.fused_triton` for an NVIDIA H100, which needs none; run by `test_fused_triton.py` in a process of its own.

The interpreter lets pass what the compiler refuses (a variable that changes its shape in a loop). Compiled is what `TritonHead` launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from numerics.test_fused import MIXTURES, SHAPES, head_of, hidden_of, only, run, targets_of
from stillroom.objectives import fused, fused_kernels
from stillroom.objectives.divergences import Divergence, alpha_beta, cross_entropy, skew_forward_kl
from stillroom.objectives.objective import Objective

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", int: "i32"}
OTHERS = (alpha_beta(0.3, 0.2), skew_forward_kl(), alpha_beta(0.0, 0.8), alpha_beta(0.7, 0.0), cross_entropy())


class Compiles:
    """Takes a kernel's place."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.times = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *, num_warps: int, enable_fp_fusion: bool, **given: Any) -> None:
        names = self.kernel.arg_names
        assert set(given) == set(names)
        variable = {name: isinstance(given[name], torch.Tensor) or name == "size" or name.endswith("stride") for name in names}
        signature = {name: TYPES[getattr(given[name], "dtype", int)] if variable[name] else "constexpr" for name in names}
        source = ASTSource(self.kernel, signature, {name: given[name] for name in names if not variable[name]})
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
        self.times += 1


@pytest.mark.parametrize("kind", [*MIXTURES, "others"])
@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16], ids=["one plain term", "everything"])
def test_compiles(kind: str, student: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [Compiles(fused_kernels.over_all), Compiles(fused_kernels.over_list)]
    monkeypatch.setattr(fused_kernels, "over_all", kernels[0])
    monkeypatch.setattr(fused_kernels, "over_list", kernels[1])
    monkeypatch.setattr(fused, "TRITON_DEVICES", ("cpu",))
    monkeypatch.setattr(Objective, "rows", None)
    terms = [term for term in MIXTURES.get(kind, OTHERS) if isinstance(term, Divergence)]
    shape, temperature, terms = (SHAPES["plain"], 1.0, terms[:1]) if student == torch.float32 else (SHAPES["everything"], 2.0, terms)
    targets = targets_of(kind if kind in MIXTURES else "hidden", 1.0 if kind == "full" else temperature, rows=2, shape=shape)
    run(head_of(dtype=student, **shape), only(*terms, match_temperature=temperature), targets, hidden_RD=hidden_of(2, student))
    assert [kernel.times for kernel in kernels] == ([0, 1] if kind in ("top_k", "drawn") else [1, 0])
