"""The fused head and divergence on a GPU: the same function as `fused.FusedHead`, with the element-wise work in Triton.

Shapes: R scored rows, V vocabulary size, K kept ids, U listed ids of all rows together, D width of the student, E width of the teacher.

Each head is applied once, a chunk of rows at a time, into a buffer that the next chunk uses again. One kernel then reads the logits two or three times,
a row to a program: for the sums of both softmaxes; for the sum of the slopes, unless it is known beforehand, as for forward KL; and for the nats and
the gradient with respect to the student's product, the row's coefficient in it. Two more products give the gradients of
head and states. `fused` and `quantities` say what is computed. The closed forms are in `fused_kernels` once, for every kind of targets.

The arithmetic is that of the states, or autocast's. In bfloat16 the factors of every product are bfloat16, and so is the gradient with respect to the
student's product, which is one of them. Logits, everything between the products, and sums over rows are float32: `nn.Linear` would round logits to
bfloat16, which knows one of 16 to a sixteenth, at less memory traffic. In float32 the gradient takes the product's place. float64 is for tests. Under
TRITON_INTERPRET=1 Triton runs the kernels on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from stillroom.objectives import fused_kernels, quantities
from stillroom.objectives.divergences import Divergence
from stillroom.objectives.fused import GPU_BUFFER_BYTES, FusedTerm, LinearHead, even_chunks, gpu_row_bytes, padded
from stillroom.targets.kinds import DrawnTargets, FullTargets, HiddenTargets, Targets, TextTargets, TopKTargets

# Ids that a program works on at a time, eight for each of its threads.
BLOCK = 2048
WARPS = 8
# Numbers of a head (32 MiB in float32) that are widened, or whose gradient is formed, at a time: what is added to must come from memory, what is added
# should still be in the cache.
PIECE_NUMBERS = 2**23

# Products of bfloat16 that come out in float32: of PyTorch 2.8 and later, on NVIDIA's cards.
_WIDENS = "dtype_out" in torch.ops.aten.mm.overloads() and torch.version.hip is None

# Name of a quantity and its two parameters.
Form: TypeAlias = tuple[str, float, float]

_FORMS = {
    quantities.forward_kl_slopes: "forward_kl",
    quantities.reverse_kl_slopes: "reverse_kl",
    quantities.generalized_jsd_slopes: "generalized_jsd",
    quantities.skew_forward_kl_slopes: "skew_forward_kl",
    quantities.skew_reverse_kl_slopes: "skew_reverse_kl",
    quantities.total_variation_slopes: "total_variation",
    quantities.alpha_beta_slopes: "alpha_beta",
}


def form_of(divergence: Divergence) -> Form | None:
    """What the kernels call the closed form of a divergence, and its parameters in the order of its signature; None for one they do not know."""
    slopes = divergence.over_buckets
    function, parameters = (slopes.func, slopes.keywords) if isinstance(slopes, partial) else (slopes, {})
    name = _FORMS.get(function)  # type: ignore[arg-type]
    if name is None:
        return None
    first, second = (*parameters.values(), 0.0, 0.0)[:2]
    return name, float(first), float(second)


def arithmetic_of(hidden_RD: Tensor, head: LinearHead) -> torch.dtype | None:
    """The type in which the head is applied; None where there is none that is known here."""
    device = hidden_RD.device.type
    given = {hidden_RD.dtype, head.weight_VD.dtype}
    if torch.is_autocast_enabled(device):
        allowed = given <= {torch.float32, torch.bfloat16} and torch.get_autocast_dtype(device) == torch.bfloat16
        dtype = torch.bfloat16 if allowed else None
    else:
        dtype = hidden_RD.dtype if len(given) == 1 else None
    if dtype == torch.bfloat16:
        return dtype if _WIDENS or device == "cpu" else None
    return dtype if dtype in (torch.float32, torch.float64) else None


def can_fuse(hidden_RD: Tensor, head: LinearHead, terms: Sequence[FusedTerm], targets: Targets) -> bool:
    """Whether `TritonHead` computes this: every term with a closed form that is known here, in one of the types above."""
    listed = isinstance(targets, DrawnTargets)
    closed = all(term.divergence.over_ids if term.reads_text or listed else form_of(term.divergence) is not None for term in terms)
    alike = hidden_RD.device == head.weight_VD.device and arithmetic_of(hidden_RD, head) is not None
    return bool(terms) and closed and alike


# -- through the head and back ------------------------------------------------------------------------------------------


class TritonHead:
    """Takes chunks of rows through a head and back. Its buffers are as large as the largest chunk and live as long as it does, and so do, where the
    types ask for them, the head in bfloat16 and the gradient of a head of bfloat16 in float32.
    """

    def __init__(
        self, hidden_RD: Tensor, head: LinearHead, *, size: int, terms: Sequence[FusedTerm], match_temperature: float, backward: bool
    ) -> None:
        dtype = arithmetic_of(hidden_RD, head)
        assert dtype is not None, "can_fuse sees to that"
        self._head = head
        self._size = size
        self._terms = tuple(terms)
        self._match_temperature = match_temperature
        self._backward = backward
        self._dtype = dtype
        self._wide = torch.promote_types(dtype, torch.float32)
        # All of it at once, as autocast itself does: in pieces it would be narrowed twice for every chunk.
        self._weight_VD = head.weight_VD.detach()[:size].to(dtype)
        self._buffers: dict[str, Tensor] = {}
        self._weight_sum = _GradientSum(head.weight_VD, size, self._wide) if backward else None
        self._bias_sum = _GradientSum(head.bias_V, size, self._wide) if backward else None

    def chunks_of(self, hidden_RD: Tensor, targets: Targets, most: int) -> list[tuple[int, int]]:
        """(start, stop) of chunks of at most `most` rows whose logits fit into `GPU_BUFFER_BYTES`, as even as can be."""
        beside = isinstance(targets, HiddenTargets) or _keeps_every_id(targets, self._size)
        return even_chunks(len(hidden_RD), max(1, min(most, GPU_BUFFER_BYTES // gpu_row_bytes(self._size, beside, self._dtype))))

    @torch.no_grad()
    def chunk(
        self, hidden_RD: Tensor, targets: Targets, labels: TextTargets, coefficients_R: Tensor, gradient_RD: Tensor | None
    ) -> dict[str, Tensor]:
        """As `fused.FusedHead.chunk`; the gradient of a head of bfloat16 is added to it by `finish`."""
        # Kernels are launched on the current device; and what is multiplied here has the type that it should have.
        with torch.cuda.device_of(hidden_RD), torch.autocast(hidden_RD.device.type, enabled=False):
            states_RD = hidden_RD.to(self._dtype)
            logits_RV = self._buffer("student", len(hidden_RD), self._wide, hidden_RD.device)
            _multiply(states_RD, self._weight_VD.T, logits_RV)
            slopes_RV = logits_RV
            if self._backward and self._dtype != self._wide:
                slopes_RV = self._buffer("slopes", len(hidden_RD), self._dtype, hidden_RD.device)
            nats_TR = self._rows(logits_RV, slopes_RV, targets, labels, coefficients_R)
            if self._backward:
                assert gradient_RD is not None
                self._back(slopes_RV, states_RD, gradient_RD)
        soft = [term for term in self._terms if not term.reads_text]
        return {term.divergence.name: nats_TR[len(soft) if term.reads_text else soft.index(term)] for term in self._terms}

    def finish(self) -> None:
        """To be called after the last chunk."""
        for added in (self._weight_sum, self._bias_sum):
            if added is not None:
                added.finish()

    def _buffer(self, name: str, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if name not in self._buffers or len(self._buffers[name]) < rows:
            self._buffers[name] = torch.empty(rows, padded(self._size), dtype=dtype, device=device)
        return self._buffers[name][:rows, : self._size]

    def _back(self, slopes_RV: Tensor, states_RD: Tensor, gradient_RD: Tensor) -> None:
        """From the gradient with respect to the product to those of weights, bias and states."""
        assert self._weight_sum is not None
        assert self._bias_sum is not None
        _multiply(slopes_RV, self._weight_VD, gradient_RD)
        if self._weight_sum.wanted:
            self._weight_sum.add_product(slopes_RV.T, states_RD)
        if self._bias_sum.wanted:
            self._bias_sum.add(slopes_RV.sum(dim=0, dtype=self._wide))

    # -- between the products ---------------------------------------------------------------------------------------------

    def _rows(self, logits_RV: Tensor, slopes_RV: Tensor, targets: Targets, labels: TextTargets, coefficients_R: Tensor) -> Tensor:
        """Nats of each soft term, then of text, T x R. Uses up the products in `logits_RV` and writes the gradient with respect to them."""
        soft = [term for term in self._terms if not term.reads_text]
        hard = [term.factor for term in self._terms if term.reads_text]
        rows, dtype = len(logits_RV), self._wide
        nats_TR = torch.zeros(len(soft) + 1, rows, dtype=dtype, device=logits_RV.device)
        labels_R1 = labels.token_ids_R.long().unsqueeze(-1)
        student = {
            "student": logits_RV,
            "student_stride": logits_RV.stride(0),
            "student_bias": self._head.bias_V,
            "out": slopes_RV,
            "out_stride": slopes_RV.stride(0),
            "labels": labels_R1,
            "label_products": logits_RV.gather(-1, labels_R1),
            "coefficients": coefficients_R.to(dtype),
            "nats": nats_TR,
            "size": self._size,
            "SCALE": float(self._head.scale),
            "SOFTCAP": self._head.softcap,
            "TEMPERATURE": float(self._match_temperature) if soft else 1.0,
            "TERM_LANES": triton.next_power_of_2(max(1, len(soft))),
            "HARD": float(sum(hard)) if hard else None,
            "BACKWARD": self._backward,
            "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
            "num_warps": WARPS,
            # Named because its default is about to change (Triton 3.10).
            "enable_fp_fusion": True,
        }
        match targets:
            case TopKTargets() if soft and not _keeps_every_id(targets, self._size):
                self._over_list(student, targets, soft)
            case DrawnTargets() if soft:
                self._over_list(student, targets, soft)
                nats_TR[:-1] -= targets.entropy_R.to(dtype)
            case _:
                self._over_all(student, targets, soft)
        return nats_TR

    def _over_all(self, student: dict[str, Any], targets: Targets, soft: Sequence[FusedTerm]) -> None:
        teacher = self._teacher(targets, student["student"]) if soft else {"teacher": None, "teacher_stride": 0, "teacher_bias": None}
        forms = _terms(soft)
        fused_kernels.over_all[(len(student["student"]),)](
            **student,
            **({"TEACHER_FACTOR": None, "TEACHER_SOFTCAP": None} | teacher),
            TERMS=forms,
            FORWARD=all(name == "forward_kl" for name, *_ in forms),
            BLOCK=BLOCK,
        )

    def _teacher(self, targets: Targets, logits_RV: Tensor) -> dict[str, Any]:
        """What the kernel is to know of the teacher: logits and how to finish them, or log-probabilities, which have no factor."""
        match targets:
            case HiddenTargets():
                head = targets.head
                product_RV = self._project_teacher(targets, logits_RV)
                return {
                    "teacher": product_RV,
                    "teacher_stride": product_RV.stride(0),
                    "teacher_bias": head.bias_V,
                    "TEACHER_FACTOR": float(head.scale / self._match_temperature),
                    "TEACHER_SOFTCAP": head.softcap,
                }
            case FullTargets():
                log_p_RV = targets.log_probs_RV
                log_p_RV = log_p_RV if log_p_RV.stride(-1) == 1 else log_p_RV.contiguous()
                known = targets.temperature == self._match_temperature
                factor = None if known else targets.temperature / self._match_temperature
                return {"teacher": log_p_RV, "teacher_stride": log_p_RV.stride(0), "teacher_bias": None, "TEACHER_FACTOR": factor}
            case TopKTargets():
                log_p_RV = self._buffer("teacher", len(logits_RV), self._wide, logits_RV.device)
                log_p_RV.scatter_(-1, targets.ids_RK.long(), targets.log_probs_RK.to(self._wide))
                return {"teacher": log_p_RV, "teacher_stride": log_p_RV.stride(0), "teacher_bias": None}
            case _:
                raise AssertionError("no distribution; Divergence.check refuses this at plan time")

    def _project_teacher(self, targets: HiddenTargets, logits_RV: Tensor) -> Tensor:
        """Teacher's states times weights in float32 or wider. Of factors in bfloat16 where both the arithmetic and the head are, else widened."""
        weight_VE: Tensor = targets.head.weight_VD
        factors = torch.bfloat16 if self._dtype == weight_VE.dtype == torch.bfloat16 else self._wide
        states_RE = targets.states_RD.to(factors)
        out_RV = self._buffer("teacher", len(logits_RV), self._wide, logits_RV.device)
        for ids in [slice(None)] if weight_VE.dtype == factors else _pieces(weight_VE):
            _multiply(states_RE, weight_VE[ids].to(factors).T, out_RV[:, ids])
        return out_RV

    def _over_list(self, student: dict[str, Any], targets: TopKTargets | DrawnTargets, soft: Sequence[FusedTerm]) -> None:
        logits_RV, slopes_RV, dtype = student["student"], student["out"], self._wide
        rows = len(logits_RV)
        if isinstance(targets, TopKTargets):
            kept = targets.ids_RK.shape[1]
            offsets_R1 = torch.arange(0, rows * kept + 1, kept, device=logits_RV.device)
            ids_U, of_ids_U, of_others_R = targets.ids_RK.reshape(-1).long(), targets.log_probs_RK.reshape(-1).to(dtype), targets.tail_log_mass_R
            forms, most = _terms(soft), kept
        else:
            offsets_R1, ids_U, of_ids_U = targets.offsets_R1, targets.ids_U.long(), targets.counts_U.to(dtype) / targets.draws
            of_others_R = torch.zeros_like(student["coefficients"])
            forms, most = tuple(("listed", 0.0, 0.0, float(term.factor)) for term in soft), targets.draws
        rows_U = torch.repeat_interleave(torch.arange(rows, device=ids_U.device), offsets_R1.diff(), output_size=len(ids_U))
        products_U = logits_RV[rows_U, ids_U]
        gradients_U = torch.empty_like(products_U, dtype=slopes_RV.dtype)
        # Marks them for the kernel, which must tell them from the others.
        logits_RV[rows_U, ids_U] = -torch.inf
        fused_kernels.over_list[(rows,)](
            **student,
            ids=ids_U,
            products=products_U,
            of_ids=of_ids_U,
            of_others=of_others_R.to(dtype),
            offsets=offsets_R1,
            gradients=gradients_U,
            TERMS=forms,
            BLOCK=BLOCK,
            LIST_BLOCK=min(BLOCK, triton.next_power_of_2(most + 1)),
        )
        if self._backward:
            slopes_RV[rows_U, ids_U] = gradients_U


class _GradientSum:
    """The gradient of a parameter's first rows, added up over chunks: in `grad` itself, or beside it where that is narrower than `wide`."""

    def __init__(self, parameter: Tensor | None, size: int, wide: torch.dtype) -> None:
        self._parameter, self._size, self._wide = parameter, size, wide
        self._beside: Tensor | None = None

    @property
    def wanted(self) -> bool:
        return self._parameter is not None and self._parameter.requires_grad

    def add(self, term_V: Tensor) -> None:
        sum_V, first = self._sum()
        if first:
            sum_V.copy_(term_V)
        else:
            sum_V.add_(term_V)

    def add_product(self, left_VR: Tensor, right_RD: Tensor) -> None:
        """Adds `left_VR` @ `right_RD`, a piece at a time."""
        sum_VD, first = self._sum()
        for ids in _pieces(sum_VD):
            if first:
                _multiply(left_VR[ids], right_RD, sum_VD[ids])
            elif left_VR.dtype == sum_VD.dtype:
                sum_VD[ids].addmm_(left_VR[ids], right_RD)
            else:
                # addmm takes a sum of another type than its factors' in the newest versions alone.
                sum_VD[ids] += _multiply(left_VR[ids], right_RD, torch.empty_like(sum_VD[ids]))

    def finish(self) -> None:
        if self._beside is None:
            return
        parameter = self._parameter
        assert parameter is not None
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad[: self._size] += self._beside
        self._beside = None

    def _sum(self) -> tuple[Tensor, bool]:
        """Where to add to; and whether nothing is there yet, not even zeros, which would be one more pass over as many numbers as the head has."""
        parameter = self._parameter
        assert parameter is not None
        if parameter.dtype != torch.promote_types(parameter.dtype, self._wide):
            first = self._beside is None
            if self._beside is None:
                self._beside = torch.empty(self._size, *parameter.shape[1:], dtype=self._wide, device=parameter.device)
            return self._beside, first
        first = parameter.grad is None
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
            parameter.grad[self._size :] = 0.0
        return parameter.grad[: self._size], first


def _terms(soft: Sequence[FusedTerm]) -> tuple[tuple[str, float, float, float], ...]:
    """What the kernels are compiled for: form, its parameters, factor."""
    forms = [(form_of(term.divergence), term.factor) for term in soft]
    return tuple((*form, float(factor)) for form, factor in forms if form is not None)


def _keeps_every_id(targets: Targets, size: int) -> bool:
    return isinstance(targets, TopKTargets) and targets.ids_RK.shape[-1] == size


def _pieces(weight_VD: Tensor) -> list[slice]:
    rows = max(1, PIECE_NUMBERS // weight_VD.shape[1])
    return [slice(start, min(start + rows, len(weight_VD))) for start in range(0, len(weight_VD), rows)]


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """The product of two matrices of one type in the type of `out`, that or float32."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)
