"""The fused head and divergence on a GPU in bfloat16: time, peak memory and error, against TRL's chunked divergence and Liger-Kernel's fused linear JSD.

    .venv/bin/python benchmarks/fused_divergence_gpu.py [--json]

No result exists yet: nobody has run it on a GPU. Contenders and shapes are those of `fused_divergence.py`, at sizes for a GPU, taken in turns on the same
tensors, heads and states in bfloat16. A peer that cannot be imported is left out, and the result says so. Peak memory is what PyTorch allocated at most
over inputs, gradients included. The error is that of value and gradients against autograd in float64 on the same tensors, a few rows at a time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from _common import finish, parser
from fused_divergence import DIVERGENCES, Found, Head, Pair, dense, ours, pair_of, trl

CAVEATS = (
    "Logits are those of random states and weights (standard deviation 2.5).",
    "Heads are in bfloat16, and so are their gradients; ours adds them up in float32 over chunks, which costs memory that the peers do not use.",
    "One card and one set of sizes.",
)
REFERENCE_ROWS = 256


def on_gpu(pair: Pair, dtype: torch.dtype) -> Pair:
    """A copy."""

    def head(given: Head) -> Head:
        module = nn.utils.skip_init(nn.Linear, given.module.in_features, given.module.out_features, bias=False, device="cuda", dtype=dtype)
        with torch.no_grad():
            module.weight.copy_(given.module.weight)
        return Head(module=module, softcap=None)

    hidden_RD, teacher_RE = (states.to("cuda", dtype) for states in (pair.hidden_RD, pair.teacher_RE))
    return Pair(hidden_RD=hidden_RD, student=head(pair.student), teacher_RE=teacher_RE, teacher=head(pair.teacher))


def liger(pair: Pair, beta: float) -> Found:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    hidden_RD, weight_VD = pair.hidden_RD.detach().requires_grad_(), pair.student.module.weight
    nats = LigerFusedLinearJSDFunction.apply(hidden_RD, weight_VD, pair.teacher_RE, pair.teacher.module.weight.detach(), None, beta)
    nats.backward()
    assert hidden_RD.grad is not None
    assert weight_VD.grad is not None
    return nats.item(), hidden_RD.grad, weight_VD.grad


def exact(pair: Pair, name: str) -> Found:
    """In float64, on the CPU afterwards."""
    wide = on_gpu(pair, torch.float64)
    rows = len(pair.hidden_RD)
    parts = [slice(start, start + REFERENCE_ROWS) for start in range(0, rows, REFERENCE_ROWS)]
    assert rows % REFERENCE_ROWS == 0, "the mean of the parts' means is the mean"
    values, gradients = [], []
    for some in parts:
        part = Pair(hidden_RD=wide.hidden_RD[some], student=wide.student, teacher_RE=wide.teacher_RE[some], teacher=wide.teacher)
        nats, gradient_RD, _ = dense(part, name)
        values.append(nats)
        gradients.append(gradient_RD.cpu())
    weight_gradient = wide.student.module.weight.grad
    assert weight_gradient is not None
    return statistics.fmean(values), torch.cat(gradients) / len(parts), weight_gradient.cpu() / len(parts)


def error(found: Found, reference: Found) -> dict[str, float]:
    """How far value and gradients are from the reference, relative to it."""

    def far(a: Tensor, b: Tensor) -> float:
        return float((a.cpu().double() - b).norm() / b.norm())

    return {"value": abs(found[0] - reference[0]) / abs(reference[0]), "states": far(found[1], reference[1]), "weight": far(found[2], reference[2])}


def measure(name: str, arguments: argparse.Namespace, peers: Sequence[str]) -> dict[str, Any]:
    """Milliseconds, bytes and errors of every contender."""
    divergence, beta = DIVERGENCES[name]
    pair = on_gpu(pair_of(arguments.rows, arguments.size, arguments.width, arguments.teacher_width, dressed=False), torch.bfloat16)
    contenders: dict[str, Callable[[], Found]] = {"ours": lambda: ours(pair, divergence)}
    contenders |= {"trl": lambda: trl(pair, beta)} if "trl" in peers else {}
    contenders |= {"liger": lambda: liger(pair, beta)} if "liger_kernel" in peers else {}
    reference = exact(pair, name)
    milliseconds: dict[str, list[float]] = {who: [] for who in contenders}
    peaks, errors = {}, {}
    for turn in range(arguments.repeats + 1):
        for who, run in contenders.items():
            pair.student.module.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            found = run()
            end.record()
            torch.cuda.synchronize()
            # The first turn warms up, and compiles.
            if turn:
                milliseconds[who].append(begin.elapsed_time(end))
                peaks[who] = torch.cuda.max_memory_allocated() - before
            else:
                errors[who] = error(found, reference)
            del found
    medians = {who: statistics.median(taken) for who, taken in milliseconds.items()}
    others = [median for who, median in medians.items() if who != "ours"]
    speedup = {"speedup_over_the_faster_peer": min(others) / medians["ours"]} if others else {}
    return speedup | {"median_milliseconds": medians, "milliseconds": milliseconds, "peak_bytes": peaks, "relative_error": errors}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--rows", type=int, default=8192)
    options.add_argument("--size", type=int, default=151_936, help="vocabulary")
    options.add_argument("--width", type=int, default=4096, help="of the student")
    options.add_argument("--teacher-width", type=int, default=4096)
    options.add_argument("--repeats", type=int, default=5)
    arguments = options.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    peers = [name for name in ("trl", "liger_kernel") if find_spec(name) is not None]
    results = {name: measure(name, arguments, peers) for name in DIVERGENCES}
    settings = {key: getattr(arguments, key) for key in ("rows", "size", "width", "teacher_width", "repeats")}
    finish("fused_divergence_gpu", {"settings": settings, "peers": peers, "cases": results}, caveats=CAVEATS, as_json=arguments.json)


if __name__ == "__main__":
    main()
