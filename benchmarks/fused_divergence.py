"""The fused head and divergence on a CPU: time over that of the products it cannot do without, against TRL's and against autograd on all logits; memory.

    .venv/bin/python benchmarks/fused_divergence.py [--json]

Forward and backward of a divergence between a teacher's and a student's distributions, from hidden states and heads to the gradients of the student's
states and head. Four products are needed: two for the logits, two for the gradients. Everything is measured in turns on the same tensors:

- floor: these four, unchunked, by `torch.mm` into outputs that are there already;
- ours: `objectives.objective.backward_chunked`;
- trl: `ChunkedDivergenceFunction` of `trl.kernels.chunked_divergence` and its backward;
- dense: all logits at once, log_softmax, the divergence as its formula says, autograd.

What each leaves behind is compared: value and gradients of ours, TRL's and the dense one. Peak memory is how far VmHWM grows in a fresh process over
what inputs, outputs and gradients take. Runs in the environment of `peers.py`, which it makes if it has to. R rows, V vocabulary, D student, E teacher.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _common import ROOT, finish, parser
from peers import ENVIRONMENT

sys.path.insert(0, str(ROOT / "src"))

from stillroom.objectives.divergences import Divergence, forward_kl, generalized_jsd, reverse_kl
from stillroom.objectives.objective import Objective, WeightedTerm, backward_chunked
from stillroom.targets.kinds import HiddenTargets, TeacherHead, TextTargets

# TRL's beta is the teacher's weight in the mixture, but at its ends.
DIVERGENCES: dict[str, tuple[Divergence, float]] = {
    "forward_kl": (forward_kl(), 0.0),
    "reverse_kl": (reverse_kl(), 1.0),
    "jsd": (generalized_jsd(0.5), 0.5),
}
CASES = [f"{name}{more}" for name in DIVERGENCES for more in ("", "+softcap+bias")]
SOFTCAP = 30.0
CAVEATS = (
    "Logits are those of random states and weights (standard deviation 2.5): no arithmetic here depends on the values, but memory and cache do on sizes.",
    "The floor writes into outputs that exist; the others start without a gradient, as a training step does, and make it.",
    "One machine and one set of sizes; other work on the machine hits all contenders, taken in turns, but not alike.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A head as the engine hands it over (models.loading.OutputHead)."""

    module: nn.Linear
    softcap: float | None
    scale: float = 1.0

    def __call__(self, states_RD: Tensor) -> Tensor:
        logits_RV: Tensor = self.module(states_RD)
        return logits_RV if self.softcap is None else self.softcap * torch.tanh(logits_RV / self.softcap)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Hidden states and heads of both models."""

    hidden_RD: Tensor
    student: Head
    teacher_RE: Tensor
    teacher: Head


def pair_of(rows: int, size: int, width: int, teacher_width: int, *, dressed: bool) -> Pair:
    """Random ones; `dressed`: with bias and soft-cap."""
    generator = torch.Generator().manual_seed(0)

    def head(inputs: int) -> Head:
        module = nn.utils.skip_init(nn.Linear, inputs, size, bias=dressed)
        with torch.no_grad():
            module.weight.normal_(std=2.5 * inputs**-0.5, generator=generator)
            if dressed:
                module.bias.normal_(generator=generator)
        return Head(module=module, softcap=SOFTCAP if dressed else None)

    hidden_RD, teacher_RE = torch.randn(rows, width, generator=generator), torch.randn(rows, teacher_width, generator=generator)
    return Pair(hidden_RD=hidden_RD, student=head(width), teacher_RE=teacher_RE, teacher=head(teacher_width))


# -- the contenders: each returns the mean over rows in nats and leaves gradients behind ---------------------------------

Found = tuple[float, Tensor, Tensor]


def ours(pair: Pair, divergence: Divergence) -> Found:
    module = pair.teacher.module
    head = TeacherHead(weight_VD=module.weight.detach(), bias_V=None if module.bias is None else module.bias.detach(), softcap=pair.teacher.softcap)
    rows = len(pair.hidden_RD)
    gradient_RD, sums = backward_chunked(
        pair.hidden_RD,
        pair.student,
        size=len(module.weight),
        objective=Objective(terms=(WeightedTerm(divergence=divergence),)),
        targets=HiddenTargets(vocabulary="", temperature=1.0, states_RD=pair.teacher_RE, head=head),
        labels=TextTargets(vocabulary="", token_ids_R=torch.zeros(rows, dtype=torch.int64)),
        divide_by=rows,
        rows_per_chunk=2048,
    )
    return sums.objective_nats / rows, gradient_RD, _weight_gradient(pair)


def trl(pair: Pair, beta: float) -> Found:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden_RD, student, teacher = pair.hidden_RD.detach().requires_grad_(), pair.student, pair.teacher
    nats_R, _ = ChunkedDivergenceFunction.apply(
        hidden_RD,
        student.module.weight,
        student.module.bias,
        pair.teacher_RE,
        teacher.module.weight.detach(),
        None if teacher.module.bias is None else teacher.module.bias.detach(),
        beta,
        1.0,
        1.0,
        student.softcap,
        1.0,
        teacher.softcap,
    )
    nats_R.mean().backward()
    assert hidden_RD.grad is not None
    return nats_R.mean().item(), hidden_RD.grad, _weight_gradient(pair)


def dense(pair: Pair, name: str) -> Found:
    hidden_RD = pair.hidden_RD.detach().requires_grad_()
    with torch.no_grad():
        log_p_RV = torch.log_softmax(pair.teacher(pair.teacher_RE), dim=-1)
    log_q_RV = torch.log_softmax(pair.student(hidden_RD), dim=-1)

    def kl(of_RV: Tensor, against_RV: Tensor) -> Tensor:
        return nn.functional.kl_div(against_RV, of_RV, reduction="none", log_target=True).sum(-1)

    if name == "forward_kl":
        nats_R = kl(log_p_RV, log_q_RV)
    elif name == "reverse_kl":
        nats_R = kl(log_q_RV, log_p_RV)
    else:
        log_m_RV = torch.logaddexp(log_p_RV, log_q_RV) - math.log(2.0)
        nats_R = (kl(log_p_RV, log_m_RV) + kl(log_q_RV, log_m_RV)) / 2
    nats_R.mean().backward()
    assert hidden_RD.grad is not None
    return nats_R.mean().item(), hidden_RD.grad, _weight_gradient(pair)


def _weight_gradient(pair: Pair) -> Tensor:
    gradient = pair.student.module.weight.grad
    assert gradient is not None
    return gradient


class Floor:
    """The four products."""

    def __init__(self, pair: Pair) -> None:
        rows, size = len(pair.hidden_RD), len(pair.student.module.weight)
        self._pair = pair
        self._student_RV, self._teacher_RV = torch.zeros(rows, size), torch.zeros(rows, size)
        self._weight_VD, self._hidden_RD = torch.zeros_like(pair.student.module.weight), torch.zeros_like(pair.hidden_RD)

    @torch.no_grad()
    def run(self) -> None:
        pair = self._pair
        torch.mm(pair.teacher_RE, pair.teacher.module.weight.T, out=self._teacher_RV)
        torch.mm(pair.hidden_RD, pair.student.module.weight.T, out=self._student_RV)
        torch.mm(self._student_RV.T, pair.hidden_RD, out=self._weight_VD)
        torch.mm(self._student_RV, pair.student.module.weight, out=self._hidden_RD)


# -- time ---------------------------------------------------------------------------------------------------------------


def measure(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every contender, in turns, and how far their results are apart."""
    name, _, dressed = case.partition("+")
    divergence, beta = DIVERGENCES[name]
    pair = pair_of(arguments.rows, arguments.size, arguments.width, arguments.teacher_width, dressed=bool(dressed))
    floor = Floor(pair)
    contenders: dict[str, Callable[[], Any]] = {
        "floor": floor.run,
        "ours": lambda: ours(pair, divergence),
        "trl": lambda: trl(pair, beta),
        "dense": lambda: dense(pair, name),
    }
    contenders = {who: run for who, run in contenders.items() if who in ("floor", "ours") or who not in arguments.without}
    seconds: dict[str, list[float]] = {who: [] for who in contenders}
    reference: Found | None = None
    apart: dict[str, dict[str, float]] = {}
    for turn in range(arguments.repeats + 1):
        for who, run in contenders.items():
            pair.student.module.zero_grad(set_to_none=True)
            gc.collect()
            began = time.perf_counter()
            found = run()
            # The first turn warms up.
            if turn:
                seconds[who].append(time.perf_counter() - began)
            elif who == "ours":
                reference = found
            elif who != "floor" and reference is not None:
                apart[who] = _apart(reference, found)
            del found
        reference = None
    medians = {who: statistics.median(taken) for who, taken in seconds.items()}
    result: dict[str, Any] = {"seconds": seconds, "ratio_to_gemm_floor": medians["ours"] / medians["floor"]}
    if "trl" in medians:
        result["speedup_over_trl_chunked"] = medians["trl"] / medians["ours"]
    if "dense" in medians:
        result["speedup_over_dense"] = medians["dense"] / medians["ours"]
    return result | {"median_seconds": medians, "relative_difference": apart}


def _apart(one: Found, other: Found) -> dict[str, float]:
    def far(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    return {"value": abs(one[0] - other[0]) / abs(other[0]), "states": far(one[1], other[1]), "weight": far(one[2], other[2])}


# -- memory -------------------------------------------------------------------------------------------------------------


def peak_extra_bytes(case: str, arguments: argparse.Namespace) -> int:
    """In this process, which must be fresh: growth of VmHWM over inputs, outputs and gradients. A small run first brings the code into memory."""
    name, _, dressed = case.partition("+")
    ours(pair_of(8, 4096, arguments.width, arguments.teacher_width, dressed=bool(dressed)), DIVERGENCES[name][0])
    pair = pair_of(arguments.rows, arguments.size, arguments.width, arguments.teacher_width, dressed=bool(dressed))
    for parameter in pair.student.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.fill_(0.0)  # or its pages would not be there yet
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_bytes("VmRSS")
    found = ours(pair, DIVERGENCES[name][0])
    return _status_bytes("VmHWM") - before - found[1].nbytes


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _peaks(case: str, arguments: argparse.Namespace) -> dict[str, int]:
    """By number of rows, each in a process of its own."""
    peaks = {}
    for rows in (arguments.rows, 4 * arguments.rows):
        command = [sys.executable, __file__, "--peak", case, "--rows", str(rows), "--threads", str(arguments.threads)]
        command += ["--size", str(arguments.size), "--width", str(arguments.width), "--teacher-width", str(arguments.teacher_width)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[str(rows)] = int(json.loads(done.stdout)["peak_extra_bytes"])
    return peaks


# -- the program --------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--rows", type=int, default=512)
    options.add_argument("--size", type=int, default=151_936, help="vocabulary")
    options.add_argument("--width", type=int, default=1024, help="of the student")
    options.add_argument("--teacher-width", type=int, default=2048)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    options.add_argument("--without", nargs="+", choices=["trl", "dense", "peak"], default=[], help="leave these out")
    options.add_argument("--peak", choices=CASES, help="print the peak memory of one case in this process, and nothing else")
    arguments = options.parse_args(argv)
    if "trl" not in arguments.without and not arguments.peak and Path(sys.prefix).resolve() != ENVIRONMENT.resolve():
        _in_the_peers_environment(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(json.dumps({"peak_extra_bytes": peak_extra_bytes(arguments.peak, arguments)}))
        return
    cases = {}
    for case in arguments.cases:
        cases[case] = measure(case, arguments)
        if "peak" not in arguments.without:
            cases[case]["peak_extra_bytes"] = _peaks(case, arguments)
        if not arguments.json:
            print(_line(case, cases[case]), flush=True)
    settings = {key: getattr(arguments, key) for key in ("rows", "size", "width", "teacher_width", "repeats", "threads")}
    finish("fused_divergence", {"settings": settings, "cases": cases}, caveats=CAVEATS, as_json=arguments.json)


def _in_the_peers_environment(argv: Sequence[str]) -> None:
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "peers.py")], check=True, stdout=sys.stderr)
    os.execv(python, [str(python), __file__, *argv])


def _line(case: str, result: dict[str, Any]) -> str:
    seconds = ", ".join(f"{who} {median:.2f} s" for who, median in result["median_seconds"].items())
    ratios = ", ".join(
        f"{key} {result[key]:.2f}" for key in ("ratio_to_gemm_floor", "speedup_over_trl_chunked", "speedup_over_dense") if key in result
    )
    peaks = ", ".join(f"{count / 2**20:.0f} MiB for {rows} rows" for rows, count in result.get("peak_extra_bytes", {}).items())
    return f"{case}: {seconds}; {ratios}" + (f"; peak {peaks}" if peaks else "")


if __name__ == "__main__":
    main()
