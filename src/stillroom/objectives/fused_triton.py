"""The fused head and divergence on a GPU: the same function as `fused.FusedHead`, with the element-wise work in Triton.

Shapes: R scored rows, V vocabulary size, K kept ids, U listed ids of all rows together, D width of the student, E width of the teacher.

Each head is applied once, a chunk of rows at a time, into a buffer that the next chunk uses again. One kernel then reads the logits two or three times,
a row to a program: for the sums of both softmaxes; for the sum of the slopes, unless it is known beforehand, as for forward KL; and for the nats and
the gradient with respect to the student's product, which takes the product's place. Two more products give the gradients of head and states. `fused`
and `quantities` say what is computed; the quantities are here once, in `_value_and_slope`, for every kind of targets.

The arithmetic is that of the states, or autocast's. In bfloat16 the student's product is rounded to it, as `nn.Linear` does, and so is the gradient with
respect to it; all between the two, the teacher's logits, and sums over rows are float32. float64 is for tests. Under TRITON_INTERPRET=1 Triton runs the
kernels on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from stillroom.objectives import quantities
from stillroom.objectives.divergences import Divergence
from stillroom.objectives.fused import FusedTerm, LinearHead, even_chunks
from stillroom.targets.kinds import DrawnTargets, FullTargets, HiddenTargets, Targets, TextTargets, TopKTargets

# What the logits of one chunk may take, both models' together. More rows at once mean fewer passes over the gradient of the head.
BUFFER_BYTES = 2**30
# Ids that a program works on at a time, eight for each of its threads.
BLOCK = 2048
WARPS = 8
# Numbers of a head (32 MiB in float32) that are widened, or whose gradient is formed, at a time: what is added to must come from memory, what is added
# should still be in the cache.
PIECE_NUMBERS = 2**23

LOG_OF_ZERO = tl.constexpr(quantities.LOG_OF_ZERO)

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


# Products of bfloat16 that come out in float32: of PyTorch 2.8 and later, on NVIDIA's cards.
_WIDENS = "dtype_out" in torch.ops.aten.mm.overloads() and torch.version.hip is None


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
        """(start, stop) of chunks of at most `most` rows whose logits fit into `BUFFER_BYTES`, as even as can be."""
        beside = isinstance(targets, HiddenTargets) or _keeps_every_id(targets, self._size)
        row_bytes = _padded(self._size) * (self._dtype.itemsize + (self._wide.itemsize if beside else 0))
        return even_chunks(len(hidden_RD), max(1, min(most, BUFFER_BYTES // row_bytes)))

    @torch.no_grad()
    def chunk(
        self, hidden_RD: Tensor, targets: Targets, labels: TextTargets, coefficients_R: Tensor, gradient_RD: Tensor | None
    ) -> dict[str, Tensor]:
        """As `fused.FusedHead.chunk`; the gradient of a head of bfloat16 is added to it by `finish`."""
        # Kernels are launched on the current device; and what is multiplied here has the type that it should have.
        with torch.cuda.device_of(hidden_RD), torch.autocast(hidden_RD.device.type, enabled=False):
            states_RD = hidden_RD.to(self._dtype)
            logits_RV = self._buffer("student", len(hidden_RD), self._dtype, hidden_RD.device)
            torch.mm(states_RD, self._weight_VD.T, out=logits_RV)
            nats_TR = self._rows(logits_RV, targets, labels, coefficients_R)
            if self._backward:
                assert gradient_RD is not None
                self._back(logits_RV, states_RD, gradient_RD)
        soft = [term for term in self._terms if not term.reads_text]
        return {term.divergence.name: nats_TR[len(soft) if term.reads_text else soft.index(term)] for term in self._terms}

    def finish(self) -> None:
        """To be called after the last chunk."""
        for added in (self._weight_sum, self._bias_sum):
            if added is not None:
                added.finish()

    def _buffer(self, name: str, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if name not in self._buffers or len(self._buffers[name]) < rows:
            self._buffers[name] = torch.empty(rows, _padded(self._size), dtype=dtype, device=device)
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

    def _rows(self, logits_RV: Tensor, targets: Targets, labels: TextTargets, coefficients_R: Tensor) -> Tensor:
        """Nats of each soft term, then of text, T x R. The products in `logits_RV` give way to the gradient with respect to them."""
        soft = [term for term in self._terms if not term.reads_text]
        hard = [term.factor for term in self._terms if term.reads_text]
        rows, dtype = len(logits_RV), self._wide
        nats_TR = torch.zeros(len(soft) + 1, rows, dtype=dtype, device=logits_RV.device)
        labels_R1 = labels.token_ids_R.long().unsqueeze(-1)
        student = {
            "student": logits_RV,
            "student_stride": logits_RV.stride(0),
            "student_bias": self._head.bias_V,
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
        _over_all_kernel[(len(student["student"]),)](
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
                    "TEACHER_FACTOR": head.scale / self._match_temperature,
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
        logits_RV, dtype = student["student"], self._wide
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
        gradients_U = torch.empty_like(products_U)
        # Marks them for the kernel, which must tell them from the others.
        logits_RV[rows_U, ids_U] = -torch.inf
        _over_list_kernel[(rows,)](
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
            logits_RV[rows_U, ids_U] = gradients_U


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


def _padded(size: int) -> int:
    """A row of a buffer: starts where 16 bytes can be read at a time."""
    return -(-size // 16) * 16


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


# -- the kernels --------------------------------------------------------------------------------------------------------
#
# A program has one row. Sums over a row are kept apart by lane until its end. What is compiled in is in capitals. An id beyond the vocabulary, or one
# that is marked as listed, has the logit -inf. Names as in `fused`: z a finished logit, p and q probabilities of teacher and student.


@triton.jit
def _over_all_kernel(
    student,
    student_stride,
    student_bias,
    labels,
    label_products,
    coefficients,
    nats,
    size,
    teacher,
    teacher_stride,
    teacher_bias,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TEACHER_FACTOR: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    TERMS: tl.constexpr,
    TERM_LANES: tl.constexpr,
    FORWARD: tl.constexpr,
    HARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Distributions over all ids: any number of terms on them, and the text's. TEACHER_FACTOR None: the teacher's are log-probabilities."""
    APART: tl.constexpr = HARD is not None and TEMPERATURE != 1.0
    SOFT: tl.constexpr = len(TERMS) > 0
    COOL: tl.constexpr = 1.0 / TEMPERATURE
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    lanes = tl.arange(0, BLOCK)

    top_q, sum_q = _nothing(BLOCK, WIDE)
    top_1, sum_1 = _nothing(BLOCK, WIDE)
    top_p, sum_p = _nothing(BLOCK, WIDE)
    for start in range(0, size, BLOCK):
        z, _ = _logits(student, student_bias, start + lanes, size, SOFTCAP, SCALE, WIDE)
        top_q, sum_q = _add_exp(top_q, sum_q, z * COOL)
        if APART:
            top_1, sum_1 = _add_exp(top_1, sum_1, z)
        if SOFT:
            y, _ = _logits(teacher + row * teacher_stride, teacher_bias, start + lanes, size, TEACHER_SOFTCAP, TEACHER_FACTOR, WIDE)
            if TEACHER_FACTOR is None:
                sum_p += tl.exp(y)
            else:
                top_p, sum_p = _add_exp(top_p, sum_p, y)
    top_q, sum_q = _over_lanes(top_q, sum_q)
    top_1, sum_1 = _over_lanes(top_1, sum_1)
    if TEACHER_FACTOR is None:
        # Log-probabilities that were rounded when they were stored do not sum to 1.
        mass = tl.sum(sum_p, 0)
    else:
        top_p, sum_p = _over_lanes(top_p, sum_p)
        mass = 1.0

    slopes_sum = tl.zeros([BLOCK], WIDE)
    if SOFT and not FORWARD and BACKWARD:
        for start in range(0, size, BLOCK):
            z, _ = _logits(student, student_bias, start + lanes, size, SOFTCAP, SCALE, WIDE)
            y, _ = _logits(teacher + row * teacher_stride, teacher_bias, start + lanes, size, TEACHER_SOFTCAP, TEACHER_FACTOR, WIDE)
            log_q, q = _normalised(z * COOL, top_q, sum_q)
            log_p, p = _teacher_normalised(y, top_p, sum_p, TEACHER_FACTOR)
            for place in tl.static_range(len(TERMS)):
                _, slopes = _value_and_slope(log_p, log_q, p, q, TERMS[place][0], TERMS[place][1], TERMS[place][2])
                slopes_sum += tl.where(start + lanes < size, TERMS[place][3] * slopes, 0.0)
    total = tl.sum(slopes_sum, 0)
    if SOFT and FORWARD:
        for place in tl.static_range(len(TERMS)):
            total -= TERMS[place][3] * mass
    if HARD is not None and not APART:
        total -= HARD

    if SOFT or BACKWARD:
        label = tl.load(labels + row)
        coefficient = tl.load(coefficients + row) * SCALE
        values = tl.zeros([TERM_LANES], WIDE)
        for start in range(0, size, BLOCK):
            ids = start + lanes
            z, capped = _logits(student, student_bias, ids, size, SOFTCAP, SCALE, WIDE)
            log_q, q = _normalised(z * COOL, top_q, sum_q)
            gradient = -total * q
            if SOFT:
                y, _ = _logits(teacher + row * teacher_stride, teacher_bias, ids, size, TEACHER_SOFTCAP, TEACHER_FACTOR, WIDE)
                log_p, p = _teacher_normalised(y, top_p, sum_p, TEACHER_FACTOR)
                for place in tl.static_range(len(TERMS)):
                    value, slopes = _value_and_slope(log_p, log_q, p, q, TERMS[place][0], TERMS[place][1], TERMS[place][2])
                    value_sum = tl.sum(tl.where(ids < size, value, 0.0), 0)
                    values += tl.where(tl.arange(0, TERM_LANES) == place, value_sum, 0.0)
                    gradient += TERMS[place][3] * slopes
            if BACKWARD:
                gradient *= COOL
                if HARD is not None:
                    gradient -= tl.where(ids == label, HARD, 0.0)
                if APART:
                    _, q_1 = _normalised(z, top_1, sum_1)
                    gradient += HARD * q_1
                gradient = _through_cap(gradient * coefficient, capped, SOFTCAP)
                tl.store(student + ids, gradient.to(student.dtype.element_ty), mask=ids < size)
        _store_values(nats, values, row, len(TERMS), TERM_LANES)
    if HARD is not None:
        _store_hard(nats, label_products, student_bias, labels, row, len(TERMS), top_1, sum_1, top_q, sum_q, APART, SOFTCAP, SCALE, WIDE)


@triton.jit
def _over_list_kernel(
    student,
    student_stride,
    student_bias,
    labels,
    label_products,
    coefficients,
    nats,
    size,
    ids,
    products,
    of_ids,
    of_others,
    offsets,
    gradients,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    TERMS: tl.constexpr,
    TERM_LANES: tl.constexpr,
    HARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
):
    """Each listed id is a bucket, and all the others, whose products are the only ones above -inf in `student`, are one more: the last of the list."""
    APART: tl.constexpr = HARD is not None and TEMPERATURE != 1.0
    COOL: tl.constexpr = 1.0 / TEMPERATURE
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    begin = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    label = tl.load(labels + row)
    coefficient = tl.load(coefficients + row) * SCALE

    top_o, sum_o = _nothing(BLOCK, WIDE)
    top_1, sum_1 = _nothing(BLOCK, WIDE)
    for start in range(0, size, BLOCK):
        z, _ = _logits(student, student_bias, start + tl.arange(0, BLOCK), size, SOFTCAP, SCALE, WIDE)
        top_o, sum_o = _add_exp(top_o, sum_o, z * COOL)
        if APART:
            top_1, sum_1 = _add_exp(top_1, sum_1, z)
    top_o, sum_o = _over_lanes(top_o, sum_o)
    others_z = top_o + tl.log(sum_o)
    top_1, sum_1 = _over_lanes(top_1, sum_1)

    top_q, sum_q = _nothing(LIST_BLOCK, WIDE)
    top_l, sum_l = _nothing(LIST_BLOCK, WIDE)
    for first in range(begin, end + 1, LIST_BLOCK):
        _, _, z, _ = _listed(ids, products, student_bias, first, end, SOFTCAP, SCALE, WIDE, LIST_BLOCK)
        top_q, sum_q = _add_exp(top_q, sum_q, _bucket_logits(z, others_z, first, end, COOL, LIST_BLOCK))
        if APART:
            top_l, sum_l = _add_exp(top_l, sum_l, z)
    top_q, sum_q = _over_lanes(top_q, sum_q)
    if APART:
        top_l, sum_l = _over_lanes(top_l, sum_l)
        top_both = tl.maximum(top_1, top_l)
        sum_1 = sum_1 * tl.exp(top_1 - top_both) + sum_l * tl.exp(top_l - top_both)
        top_1 = top_both

    slopes_sum = tl.zeros([LIST_BLOCK], WIDE)
    others_slope = tl.zeros([LIST_BLOCK], WIDE)
    values = tl.zeros([TERM_LANES], WIDE)
    for first in range(begin, end + 1, LIST_BLOCK):
        entries = first + tl.arange(0, LIST_BLOCK)
        _, _, z, _ = _listed(ids, products, student_bias, first, end, SOFTCAP, SCALE, WIDE, LIST_BLOCK)
        log_q, q = _normalised(_bucket_logits(z, others_z, first, end, COOL, LIST_BLOCK), top_q, sum_q)
        log_p = _of_buckets(of_ids, of_others, row, first, end, LIST_BLOCK)
        for place in tl.static_range(len(TERMS)):
            value, slopes = _value_and_slope(log_p, log_q, tl.exp(log_p), q, TERMS[place][0], TERMS[place][1], TERMS[place][2])
            value_sum = tl.sum(tl.where(entries <= end, value, 0.0), 0)
            values += tl.where(tl.arange(0, TERM_LANES) == place, value_sum, 0.0)
            slopes_sum += tl.where(entries <= end, TERMS[place][3] * slopes, 0.0)
            others_slope += tl.where(entries == end, TERMS[place][3] * slopes, 0.0)
    total = tl.sum(slopes_sum, 0)
    if HARD is not None and not APART:
        total -= HARD
    _store_values(nats, values, row, len(TERMS), TERM_LANES)
    if HARD is not None:
        _store_hard(nats, label_products, student_bias, labels, row, len(TERMS), top_1, sum_1, top_q, sum_q, APART, SOFTCAP, SCALE, WIDE)

    if BACKWARD:
        # An id in the last bucket has its share of the bucket's gradient.
        _, others_q = _normalised(others_z, top_q, sum_q)
        share = COOL * (tl.sum(others_slope, 0) - total * others_q) / sum_o
        for start in range(0, size, BLOCK):
            others = start + tl.arange(0, BLOCK)
            z, capped = _logits(student, student_bias, others, size, SOFTCAP, SCALE, WIDE)
            gradient = _add_text(share * tl.exp(z * COOL - top_o), z, others, label, top_1, sum_1, HARD, APART)
            gradient = _through_cap(gradient * coefficient, capped, SOFTCAP)
            tl.store(student + others, gradient.to(student.dtype.element_ty), mask=z > float("-inf"))
        for first in range(begin, end + 1, LIST_BLOCK):
            entries = first + tl.arange(0, LIST_BLOCK)
            inside, listed, z, capped = _listed(ids, products, student_bias, first, end, SOFTCAP, SCALE, WIDE, LIST_BLOCK)
            log_q, q = _normalised(z * COOL, top_q, sum_q)
            log_p = _of_buckets(of_ids, of_others, row, first, end, LIST_BLOCK)
            gradient = -total * q
            for place in tl.static_range(len(TERMS)):
                _, slopes = _value_and_slope(log_p, log_q, tl.exp(log_p), q, TERMS[place][0], TERMS[place][1], TERMS[place][2])
                gradient += TERMS[place][3] * slopes
            gradient = _add_text(gradient * COOL, z, listed, label, top_1, sum_1, HARD, APART)
            gradient = _through_cap(gradient * coefficient, capped, SOFTCAP)
            tl.store(gradients + entries, gradient.to(gradients.dtype.element_ty), mask=inside)


# -- parts of a kernel --------------------------------------------------------------------------------------------------


@triton.jit
def _logits(products, bias, ids, size, SOFTCAP: tl.constexpr, FACTOR: tl.constexpr, WIDE: tl.constexpr):
    """A row's logits at `ids`, and what tanh gave where there is a cap. FACTOR None: what is there is finished."""
    raw = tl.load(products + ids, mask=ids < size, other=float("-inf")).to(WIDE)
    if bias is not None:
        raw += tl.load(bias + ids, mask=ids < size, other=0.0).to(WIDE)
    return _finished(raw, SOFTCAP, FACTOR)


@triton.jit
def _listed(ids, products, bias, first, end, SOFTCAP: tl.constexpr, FACTOR: tl.constexpr, WIDE: tl.constexpr, LIST_BLOCK: tl.constexpr):
    """Entries of the list from `first` on: whether there are so many, their ids, logits, and what tanh gave."""
    entries = first + tl.arange(0, LIST_BLOCK)
    inside = entries < end
    listed = tl.load(ids + entries, mask=inside, other=0)
    raw = tl.load(products + entries, mask=inside, other=float("-inf")).to(WIDE)
    if bias is not None:
        raw += tl.load(bias + listed, mask=inside, other=0.0).to(WIDE)
    z, capped = _finished(raw, SOFTCAP, FACTOR)
    return inside, listed, z, capped


@triton.jit
def _finished(raw, SOFTCAP: tl.constexpr, FACTOR: tl.constexpr):
    capped = raw
    if SOFTCAP is not None:
        capped = _tanh(raw * (1.0 / SOFTCAP))
        # tanh would bring back what is marked.
        raw = tl.where(raw == float("-inf"), raw, capped * (SOFTCAP * FACTOR))
    elif FACTOR is not None:
        raw = raw * FACTOR
    return raw, capped


@triton.jit
def _bucket_logits(z, others_z, first, end, COOL: tl.constexpr, LIST_BLOCK: tl.constexpr):
    return tl.where(first + tl.arange(0, LIST_BLOCK) == end, others_z, z * COOL)


@triton.jit
def _of_buckets(of_ids, of_others, row, first, end, LIST_BLOCK: tl.constexpr):
    entries = first + tl.arange(0, LIST_BLOCK)
    return tl.where(entries == end, tl.load(of_others + row), tl.load(of_ids + entries, mask=entries < end, other=0.0))


@triton.jit
def _through_cap(gradient, capped, SOFTCAP: tl.constexpr):
    # d tanh(x) / dx = 1 - tanh(x)^2
    if SOFTCAP is not None:
        gradient = gradient * (1.0 - capped * capped)
    return gradient


@triton.jit
def _add_text(gradient, z, ids, label, top_1, sum_1, HARD: tl.constexpr, APART: tl.constexpr):
    if HARD is not None:
        gradient -= tl.where(ids == label, HARD, 0.0)
    if APART:
        _, q_1 = _normalised(z, top_1, sum_1)
        gradient += HARD * q_1
    return gradient


@triton.jit
def _store_values(nats, values, row, TERMS: tl.constexpr, TERM_LANES: tl.constexpr):
    places = tl.arange(0, TERM_LANES)
    tl.store(nats + places * tl.num_programs(0) + row, values, mask=places < TERMS)


@triton.jit
def _store_hard(
    nats,
    products,
    bias,
    labels,
    row,
    TERMS: tl.constexpr,
    top_1,
    sum_1,
    top_q,
    sum_q,
    APART: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """-log q of the text's token, at temperature 1."""
    raw = tl.load(products + row).to(WIDE)
    if bias is not None:
        raw += tl.load(bias + tl.load(labels + row)).to(WIDE)
    z, _ = _finished(raw, SOFTCAP, SCALE)
    if APART:
        log_q, _ = _normalised(z, top_1, sum_1)
    else:
        log_q, _ = _normalised(z, top_q, sum_q)
    tl.store(nats + TERMS * tl.num_programs(0) + row, -log_q)


# Sums of exponentials, as (top, sum of e^(z - top)).


@triton.jit
def _nothing(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    # Below every logit, and not -inf, of which a difference would be no number.
    return tl.full([BLOCK], -3e38, WIDE), tl.zeros([BLOCK], WIDE)


@triton.jit
def _add_exp(top, total, z):
    """One more logit for each lane, with one exponential: that of the larger is 1."""
    smaller = tl.exp(-tl.abs(z - top))
    return tl.maximum(top, z), tl.where(z > top, total * smaller + 1.0, total + smaller)


@triton.jit
def _over_lanes(top, total):
    highest = tl.max(top, 0)
    return highest, tl.sum(total * tl.exp(top - highest), 0)


@triton.jit
def _normalised(z, top, total):
    """The logarithm of q, and q. The q of a row sum to 1 as the same exponentials sum to `total`: no rounding of the logarithm is in them."""
    return z - top - tl.log(total), tl.exp(z - top) / total


@triton.jit
def _teacher_normalised(y, top, total, FACTOR: tl.constexpr):
    if FACTOR is None:
        return y, tl.exp(y)
    return _normalised(y, top, total)


# The quantities, as in `quantities`: one bucket's share of the value, and its slope, up to a multiple of q.


@triton.jit
def _value_and_slope(log_p, log_q, p, q, FORM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    if FORM == "forward_kl":
        return _expected(p, log_p - log_q), -p
    elif FORM == "listed":
        # From drawn ids: p's place is taken by the share, log_p, of an id among the draws.
        return _expected(log_p, -log_q), -log_p
    elif FORM == "reverse_kl":
        slopes = q * (log_q - _without_zeros(log_p))
        return slopes, slopes
    elif FORM == "generalized_jsd":
        log_m = tl.log(_mixture(p, q, FIRST))
        slopes = (1.0 - FIRST) * q * (log_q - log_m)
        return FIRST * _expected(p, log_p - log_m) + slopes, slopes
    elif FORM == "skew_forward_kl":
        m = _mixture(p, q, FIRST)
        return _expected(p, log_p - tl.log(m)), (FIRST - 1.0) * (p * q / m)
    elif FORM == "skew_reverse_kl":
        m = _mixture(p, q, 1.0 - FIRST)
        value = q * (log_q - tl.log(m))
        return value, value + (1.0 - FIRST) * (p * q / m)
    elif FORM == "total_variation":
        # Equal up to rounding is equal.
        equal = tl.abs(log_p - log_q) <= (64.0 * 2.0**-52 if q.dtype == tl.float64 else 64.0 * 2.0**-23)
        half = 0.5 * q
        return 0.5 * tl.abs(q - p), tl.where(equal, 0.0, tl.where(q > p, half, tl.where(q < p, -half, 0.0)))
    else:
        tl.static_assert(FORM == "alpha_beta")
        return _alpha_beta(log_p, log_q, FIRST, SECOND)


@triton.jit
def _alpha_beta(log_p, log_q, ALPHA: tl.constexpr, BETA: tl.constexpr):
    S: tl.constexpr = ALPHA + BETA
    finite = _without_zeros(log_p)
    more = finite > log_q
    highest = tl.maximum(finite, log_q)
    apart = -tl.abs(finite - log_q)
    of_alpha = _grown(apart, ALPHA)
    of_beta = _grown(apart, BETA)
    share = tl.where(more, tl.exp(BETA * apart) * of_alpha - of_beta, tl.exp(ALPHA * apart) * of_beta - of_alpha)
    share = share * tl.exp(S * highest) / S
    slopes = tl.where(more, of_alpha, -of_alpha) * tl.exp(ALPHA * highest + BETA * log_q)
    if ALPHA > 0:
        zero = log_p == float("-inf")
        alone = tl.exp(S * log_q)
        share = tl.where(zero, alone / (ALPHA * S), share)
        slopes = tl.where(zero, alone / ALPHA, slopes)
    return share, slopes


@triton.jit
def _grown(x, RATE: tl.constexpr):
    if RATE == 0:
        return x
    return _expm1(RATE * x) / RATE


@triton.jit
def _without_zeros(log_p):
    return tl.where(log_p == float("-inf"), LOG_OF_ZERO, log_p)


@triton.jit
def _expected(p, difference):
    return tl.where(p > 0, p * difference, 0.0)


@triton.jit
def _mixture(p, q, WEIGHT_ON_P: tl.constexpr):
    tiny = 2.2250738585072014e-308 if q.dtype == tl.float64 else 1.1754943508222875e-38
    return tl.maximum(WEIGHT_ON_P * p + (1.0 - WEIGHT_ON_P) * q, tiny)


@triton.jit
def _tanh(x):
    grown = _expm1(-2.0 * tl.abs(x))
    return tl.where(x < 0, grown, -grown) / (2.0 + grown)


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 0, by its series where the difference would cancel. The interpreter knows no libdevice, which has one."""
    TERMS: tl.constexpr = 15 if x.dtype == tl.float64 else 8
    series = x * 0.0 + 1.0
    for place in tl.static_range(TERMS - 1):
        series = 1.0 + series * x * (1.0 / (TERMS - place))
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)
