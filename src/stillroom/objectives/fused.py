"""A plain linear head and divergences in one: values and gradients without autograd, and without either model's logits ever existing in full.

Shapes: R scored rows, V vocabulary size, K kept ids, U listed ids of all rows together, B buckets, D width of the student, E width of the teacher.

Rows go through the student's head, and through the teacher's where it is given, a few hundred at a time. Each head is applied once. Where the
student's logits were, the gradient with respect to them is formed at once, from the closed forms in `quantities`: in blocks of a few rows, which stay
in the processor's cache between one step and the next. Two more products then give the gradients of the head, which is added to `weight.grad` where it
lies, and of the hidden states. Products whose factors are all there are the only work that grows with both a width and V: four for hidden targets,
three for others.

That a gradient is taken in the forward pass is possible because it is the gradient of a sum, known up to a factor for each row (its weight over
`divide_by`), which is multiplied into the hidden states rather than into the logits. Liger-Kernel does the same
(`chunked_loss/fused_linear_distillation.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stillroom.objectives.divergences import Divergence, teacher_log_probs_RV
from stillroom.objectives.quantities import Room
from stillroom.objectives.tensors import product_dtype
from stillroom.targets.kinds import DrawnTargets, FullTargets, HiddenTargets, Targets, TeacherHead, TextTargets, TopKTargets
from stillroom.targets.rows import slice_targets

# What the logits of one chunk may take, both models' together. The element-wise work needs about a tenth of it besides.
BUFFER_BYTES = 208 * 2**20
# The same on a GPU, with the gradient. More rows at once mean fewer passes over the gradient of the head.
GPU_BUFFER_BYTES = 3 * 2**29
# Logits of one block: half a dozen arrays of this size, 2 MiB each, should find room in the cache.
BLOCK_VALUES = 2**19
# A product takes so many of a head's rows at a time, and on the way to the logits no more than so many weights (4 MiB in float32). MKL takes a quarter
# longer for a few hundred rows and a whole head at once; a sum over the vocabulary is the more exact for being made of partial sums; and a teacher's
# head in another type is widened in small pieces.
_IDS_AT_ONCE = 8192
_WEIGHTS_AT_ONCE = 2**20
_DTYPES = (torch.float32, torch.float64)
# Types of device on which `fused_triton` does the work.
TRITON_DEVICES: tuple[str, ...] = ("cuda",)


# -- what can be fused --------------------------------------------------------------------------------------------------


@runtime_checkable
class CappedHead(Protocol):
    """A head that is scale * softcap(module(states)), as `models.loading.OutputHead` is."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearHead:
    """Logits are scale * softcap(states @ weight.T + bias), softcap c meaning c * tanh(x / c). V here counts all rows, padding included."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    softcap: float | None = None


def linear_head(head: object) -> LinearHead | None:
    """`head` as weights, where it is nothing but a linear layer with a factor and a soft cap; else None.

    A layer with an adapter, a hook, a parametrisation or sharded weights does something that its weights alone do not tell.
    """
    module, scale, softcap = (head.module, head.scale, head.softcap) if isinstance(head, CappedHead) else (head, 1.0, None)
    if type(module) is not nn.Linear:
        return None
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    parameters = [p for p in (module.weight, module.bias) if p is not None]
    if any(hooks) or any(type(p) is not nn.Parameter or p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
        return None
    return LinearHead(weight_VD=module.weight, bias_V=module.bias, scale=scale, softcap=softcap)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedTerm:
    """A divergence, what it is multiplied by in the sum, and whether it reads the text rather than the targets."""

    divergence: Divergence
    factor: float
    reads_text: bool


class RowsThroughHead(Protocol):
    """Takes scored rows through a head and back, chunk by chunk: `FusedHead` on a CPU, `fused_triton.TritonHead` on a GPU."""

    def chunks_of(self, hidden_RD: Tensor, targets: Targets, most: int) -> list[tuple[int, int]]:
        """(start, stop) of chunks of at most `most` rows, as many as memory allows."""

    def chunk(
        self, hidden_RD: Tensor, targets: Targets, labels: TextTargets, coefficients_R: Tensor, gradient_RD: Tensor | None
    ) -> dict[str, Tensor]:
        """See `FusedHead.chunk`."""

    def finish(self) -> None:
        """To be called after the last chunk: only then are all gradients where they belong."""


def fuse(
    hidden_RD: Tensor,
    head: object,
    *,
    size: int,
    terms: Sequence[FusedTerm],
    targets: Targets,
    match_temperature: float,
    backward: bool,
) -> RowsThroughHead | None:
    """What does this without autograd on the device of the states; None where nothing does."""
    linear = linear_head(head)
    if linear is None:
        return None
    if hidden_RD.device.type in TRITON_DEVICES:
        triton = _triton()
        if triton is None or not triton.can_fuse(hidden_RD, linear, terms, targets):
            return None
        through: RowsThroughHead = triton.TritonHead(
            hidden_RD, linear, size=size, terms=terms, match_temperature=match_temperature, backward=backward
        )
        return through
    if not can_fuse(hidden_RD, linear, terms, targets):
        return None
    return FusedHead(linear, size=size, terms=terms, match_temperature=match_temperature, backward=backward)


def _triton() -> ModuleType | None:
    """The module for GPUs, unless Triton is not installed (PyTorch for Linux brings it)."""
    try:
        return import_module("stillroom.objectives.fused_triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None


def can_fuse(hidden_RD: Tensor, head: LinearHead, terms: Sequence[FusedTerm], targets: Targets) -> bool:
    """Whether `FusedHead` computes this: on a CPU, in float32 or float64 without autocast, every term with a closed form."""
    listed = isinstance(targets, DrawnTargets)
    closed = all(term.divergence.over_ids if term.reads_text or listed else term.divergence.over_buckets is not None for term in terms)
    alike = hidden_RD.dtype == head.weight_VD.dtype and hidden_RD.device == head.weight_VD.device
    on_cpu = hidden_RD.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return closed and alike and on_cpu and hidden_RD.dtype in _DTYPES and bool(terms)


def chunks_of(rows: int, size: int, targets: Targets, dtype: torch.dtype, most: int) -> list[tuple[int, int]]:
    """(start, stop) of chunks of at most `most` rows whose logits fit into `BUFFER_BYTES`, as even as can be."""
    return even_chunks(rows, min(most, rows_that_fit(size, isinstance(targets, HiddenTargets), dtype)))


def even_chunks(rows: int, most: int) -> list[tuple[int, int]]:
    """(start, stop) of as few chunks of at most `most` rows as there can be, all within one row of the same size, the first no smaller than the others."""
    count = -(-rows // most)
    edges = [-(-rows * place // count) for place in range(count + 1)] if count else []
    return list(zip(edges, edges[1:], strict=False))


def rows_that_fit(size: int, hidden: bool, dtype: torch.dtype) -> int:
    """How many rows' logits `BUFFER_BYTES` hold, both models' where targets are hidden states; at least one."""
    return max(1, BUFFER_BYTES // ((1 + hidden) * size * dtype.itemsize))


def _block_rows(size: int) -> int:
    """Rows of a block: as many for each thread as for the others, since a softmax gives whole rows to threads."""
    rows, threads = max(1, BLOCK_VALUES // size), torch.get_num_threads()
    return rows - rows % threads if rows > threads else rows


def gpu_row_bytes(size: int, beside: bool, dtype: torch.dtype) -> int:
    """What `fused_triton` keeps of a row in a chunk that goes through a head in `dtype`: logits, also the teacher's where they lie `beside`, in float32 or
    wider, and the gradient with respect to them.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return padded(size) * ((2 if beside else 1) * wide.itemsize + (dtype.itemsize if dtype != wide else 0))


def padded(size: int) -> int:
    """Numbers in a row of a GPU's buffer, which starts where 16 bytes can be read at a time."""
    return -(-size // 16) * 16


# -- through the head and back ------------------------------------------------------------------------------------------


class FusedHead:
    """Takes chunks of rows through a head and back. Its buffers are as large as the largest chunk and live as long as it does."""

    def __init__(self, head: LinearHead, *, size: int, terms: Sequence[FusedTerm], match_temperature: float, backward: bool) -> None:
        self._head = head
        self._size = size
        self._terms = tuple(terms)
        self._match_temperature = match_temperature
        self._backward = backward
        self._buffers: dict[str, Tensor] = {}
        self._blocks = _Blocks()

    def chunks_of(self, hidden_RD: Tensor, targets: Targets, most: int) -> list[tuple[int, int]]:
        return chunks_of(len(hidden_RD), self._size, targets, hidden_RD.dtype, most)

    def finish(self) -> None:
        """Nothing is left to do: every chunk adds its gradients to where they belong."""

    @torch.no_grad()
    def chunk(
        self, hidden_RD: Tensor, targets: Targets, labels: TextTargets, coefficients_R: Tensor, gradient_RD: Tensor | None
    ) -> dict[str, Tensor]:
        """Nats per row of each term by its divergence's name, neither weighted nor scaled.

        With `backward`, the gradient of the sum over rows of coefficient x (sum of factor x nats) is added to the head's parameters and written to
        `gradient_RD`.
        """
        coefficients_R = coefficients_R * self._head.scale
        logits_RV = _project(hidden_RD, self._head.weight_VD[: self._size], self._buffer("student", hidden_RD))
        teacher_RV = None
        if isinstance(targets, HiddenTargets) and not all(term.reads_text for term in self._terms):
            states_RE = targets.states_RD.to(product_dtype(targets.head, hidden_RD.dtype))
            teacher_RV = _project(states_RE, targets.head.weight_VD, self._buffer("teacher", hidden_RD))
        bias_V = self._gradient_of(self._head.bias_V) if self._backward else None
        parts: list[list[Tensor]] = []
        for start in range(0, len(hidden_RD), block_rows := _block_rows(self._size)):
            rows = slice(start, min(start + block_rows, len(hidden_RD)))
            self._blocks.start(logits_RV[rows])
            block, text = slice_targets(targets, rows.start, rows.stop), slice_targets(labels, rows.start, rows.stop)
            parts.append(self._block(logits_RV[rows], None if teacher_RV is None else teacher_RV[rows], block, text))
            if bias_V is not None:
                bias_V.addmv_(logits_RV[rows].T, coefficients_R[rows])
        if self._backward:
            assert gradient_RD is not None
            self._back(logits_RV, hidden_RD, coefficients_R.unsqueeze(-1), gradient_RD)
        names = (term.divergence.name for term in self._terms)
        return {name: torch.cat(pieces) for name, pieces in zip(names, zip(*parts, strict=True), strict=True)}

    def _buffer(self, name: str, like_RD: Tensor) -> Tensor:
        rows = len(like_RD)
        if name not in self._buffers or len(self._buffers[name]) < rows:
            self._buffers[name] = like_RD.new_empty(rows, self._size)
        return self._buffers[name][:rows]

    def _back(self, slopes_RV: Tensor, hidden_RD: Tensor, coefficients_R1: Tensor, gradient_RD: Tensor) -> None:
        """From the gradient with respect to states times weights, but for the rows' coefficients, to those of weights and states."""
        weight_VD, weighted_RD = self._head.weight_VD, hidden_RD * coefficients_R1
        first = weight_VD.requires_grad and weight_VD.grad is None
        if first:
            # Not zeros, which would be one more pass over as many numbers as the head has.
            weight_VD.grad = torch.empty_like(weight_VD)
            weight_VD.grad[self._size :] = 0.0
        weight_gradient_VD = self._gradient_of(weight_VD)
        gradient_RD.zero_()
        for ids in _pieces(self._size, _IDS_AT_ONCE):
            # Not addmm_, which may add the summands to what is there one by one.
            gradient_RD += torch.mm(slopes_RV[:, ids], weight_VD[ids])
            if weight_gradient_VD is None:
                continue
            if first:
                torch.mm(slopes_RV[:, ids].T, weighted_RD, out=weight_gradient_VD[ids])
            else:
                weight_gradient_VD[ids].addmm_(slopes_RV[:, ids].T, weighted_RD)
        gradient_RD.mul_(coefficients_R1)

    def _gradient_of(self, parameter: Tensor | None) -> Tensor | None:
        """Where the gradient of the real tokens' rows is to be added; None where none is wanted."""
        if parameter is None or not parameter.requires_grad:
            return None
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad[: self._size]

    # -- a few rows, in the cache -----------------------------------------------------------------------------------------

    def _block(self, logits_RV: Tensor, teacher_RV: Tensor | None, targets: Targets, labels: TextTargets) -> list[Tensor]:
        """Nats per row of each term. The products in `logits_RV` give way to the gradient with respect to them; `teacher_RV` is used up."""
        head, temperature = self._head, self._match_temperature
        capped_RV = _finish(logits_RV, head.bias_V, head.softcap, head.scale, self._blocks)
        soft, hard = ([term for term in self._terms if term.reads_text == reads] for reads in (False, True))
        if soft and hard and temperature != 1.0:
            plain_RV = self._blocks().copy_(logits_RV)
            nats = self._at_one_temperature(plain_RV, None, labels, labels, [], hard)
            nats |= self._at_one_temperature(logits_RV.div_(temperature), teacher_RV, targets, labels, soft, [])
            torch.add(plain_RV, logits_RV, alpha=1.0 / temperature, out=logits_RV)
        else:
            softening = temperature if soft else 1.0
            if softening != 1.0:
                logits_RV.div_(softening)
            nats = self._at_one_temperature(logits_RV, teacher_RV, targets, labels, soft, hard)
            if softening != 1.0:
                logits_RV.div_(softening)
        if capped_RV is not None:
            # d tanh(x) / dx = 1 - tanh(x)^2
            logits_RV.addcmul_(torch.mul(logits_RV, capped_RV, out=self._blocks()), capped_RV, value=-1.0)
        return [nats[term.divergence.name] for term in self._terms]

    def _at_one_temperature(
        self,
        logits_RV: Tensor,
        teacher_RV: Tensor | None,
        targets: Targets,
        labels: TextTargets,
        soft: Sequence[FusedTerm],
        hard: Sequence[FusedTerm],
    ) -> dict[str, Tensor]:
        """The nats of `soft` and `hard` terms, which see the student's logits as softened as they are here. The gradient takes their place."""
        dtype = logits_RV.dtype
        listed = [_listed(term, labels, dtype) for term in hard]
        match targets:
            case HiddenTargets() | FullTargets() if soft:
                return _over_all(logits_RV, self._teacher_log_probs(teacher_RV, targets, dtype), soft, listed, self._blocks)
            case TopKTargets() if soft and targets.ids_RK.shape[-1] == logits_RV.shape[-1]:
                log_p_RV = self._blocks().scatter_(-1, targets.ids_RK.long(), targets.log_probs_RK.to(dtype))
                return _over_all(logits_RV, log_p_RV, soft, listed, self._blocks)
            case TopKTargets() if soft:
                return _over_kept(logits_RV, targets, soft, listed)
            case DrawnTargets() if soft:
                return _over_ids(logits_RV, [*(_listed(term, targets, dtype) for term in soft), *listed])
            case _:
                return _over_ids(logits_RV, listed)

    def _teacher_log_probs(self, product_RV: Tensor | None, targets: HiddenTargets | FullTargets, dtype: torch.dtype) -> Tensor:
        if product_RV is None:
            return teacher_log_probs_RV(targets, self._match_temperature, dtype)
        assert isinstance(targets, HiddenTargets)
        head: TeacherHead = targets.head
        _finish(product_RV, head.bias_V, head.softcap, head.scale / self._match_temperature, self._blocks)
        return torch.log_softmax(product_RV, dim=-1, out=product_RV)


class _Blocks:
    """Tensors as large as a block, each call another one, the same again for the next block: malloc would scatter them over a hundred MiB."""

    def __init__(self) -> None:
        self._all: list[Tensor] = []
        self._used = self._rows = 0
        self._like_RV = torch.empty(0, 0)

    def start(self, block_RV: Tensor) -> None:
        """From now on for this block."""
        if len(block_RV) > len(self._like_RV):
            self._all, self._like_RV = [], block_RV
        self._used, self._rows = 0, len(block_RV)

    def __call__(self) -> Tensor:
        if self._used == len(self._all):
            self._all.append(torch.empty_like(self._like_RV))
        self._used += 1
        return self._all[self._used - 1][: self._rows]


def _project(states_RE: Tensor, weight_VE: Tensor, out_RV: Tensor) -> Tensor:
    """States times weights, in the type of the states: neither bias nor scale nor cap yet."""
    for ids in _pieces(len(weight_VE), _WEIGHTS_AT_ONCE // weight_VE.shape[1]):
        if states_RE.dtype == out_RV.dtype:
            torch.mm(states_RE, weight_VE[ids].to(states_RE.dtype).T, out=out_RV[:, ids])
        else:
            out_RV[:, ids] = torch.mm(states_RE, weight_VE[ids].T)
    return out_RV


def _pieces(size: int, most: int) -> list[slice]:
    ids = max(1, min(_IDS_AT_ONCE, most))
    return [slice(start, min(start + ids, size)) for start in range(0, size, ids)]


def _finish(product_RV: Tensor, bias_V: Tensor | None, softcap: float | None, factor: float, room: Room) -> Tensor | None:
    """In place, from states times weights to factor * softcap(product + bias). Returns what tanh gave, where there is a cap."""
    capped_RV = None
    if bias_V is not None:
        product_RV.add_(bias_V[: product_RV.shape[-1]])
    if softcap is not None:
        capped_RV = torch.tanh(product_RV.div_(softcap), out=room())
        torch.mul(capped_RV, softcap * factor, out=product_RV)
    elif factor != 1.0:
        product_RV.mul_(factor)
    return capped_RV


# -- the gradient with respect to softened logits, in their place --------------------------------------------------------
#
# With slopes g_b = df / d(log q_b), and log q = logits - logsumexp, df / d(logits) = g - q sum(g) / sum(q). The sum of q is 1 but for the rounding of
# logsumexp; divided by it, that rounding falls out of the gradient, which matters where p and q are close and so small that nothing else is left.


@dataclass(frozen=True, slots=True)
class _Listed:
    """-sum_u share_u log q_u - constant for each row: cross-entropy, and forward KL from drawn ids. The shares of a row sum to 1."""

    term: FusedTerm
    rows_U: Tensor
    ids_U: Tensor
    shares_U: Tensor
    constant_R: Tensor | None

    def nats_R(self, log_q_RV: Tensor) -> Tensor:
        shared_U = self.shares_U * log_q_RV[self.rows_U, self.ids_U]
        nats_R = log_q_RV.new_zeros(len(log_q_RV)).index_add_(0, self.rows_U, shared_U).neg_()
        return nats_R if self.constant_R is None else nats_R.sub_(self.constant_R)

    def add_slopes_to(self, slopes_RV: Tensor) -> None:
        size = slopes_RV.shape[-1]
        slopes_RV.view(-1).index_add_(0, self.rows_U * size + self.ids_U, self.shares_U, alpha=-self.term.factor)


def _listed(term: FusedTerm, targets: Targets, dtype: torch.dtype) -> _Listed:
    if isinstance(targets, TextTargets):
        ids_R = targets.token_ids_R.long()
        rows_R = torch.arange(len(ids_R))
        return _Listed(term, rows_R, ids_R, torch.ones(len(ids_R), dtype=dtype), None)
    assert isinstance(targets, DrawnTargets)
    entries_R = targets.offsets_R1.diff()
    rows_U = torch.repeat_interleave(torch.arange(len(entries_R)), entries_R)
    return _Listed(term, rows_U, targets.ids_U.long(), targets.counts_U.to(dtype) / targets.draws, targets.entropy_R.to(dtype))


def _over_ids(logits_RV: Tensor, listed: Sequence[_Listed]) -> dict[str, Tensor]:
    log_q_RV = torch.log_softmax(logits_RV, dim=-1, out=logits_RV)
    nats = {one.term.divergence.name: one.nats_R(log_q_RV) for one in listed}
    q_RV = logits_RV.exp_()
    q_RV.mul_(sum(one.term.factor for one in listed) / q_RV.sum(dim=-1, keepdim=True))
    for one in listed:
        one.add_slopes_to(logits_RV)
    return nats


def _over_all(logits_RV: Tensor, log_p_RV: Tensor, terms: Sequence[FusedTerm], listed: Sequence[_Listed], room: Room) -> dict[str, Tensor]:
    log_q_RV = torch.log_softmax(logits_RV, dim=-1, out=logits_RV)
    q_RV = torch.exp(log_q_RV, out=room())
    nats, slopes_RV = _slopes(log_p_RV, log_q_RV, q_RV, terms, room)
    for one in listed:
        nats[one.term.divergence.name] = one.nats_R(log_q_RV)
        one.add_slopes_to(slopes_RV)
    total_R1 = slopes_RV.sum(dim=-1, keepdim=True) / q_RV.sum(dim=-1, keepdim=True)
    torch.addcmul(slopes_RV, q_RV, total_R1, value=-1.0, out=logits_RV)
    return nats


def _over_kept(logits_RV: Tensor, targets: TopKTargets, terms: Sequence[FusedTerm], listed: Sequence[_Listed]) -> dict[str, Tensor]:
    """As `_over_all`, with one bucket for all ids that are not kept; an id in it has its share of the bucket's slope."""
    ids_RK, dtype = targets.ids_RK.long(), logits_RV.dtype
    kept_RK = logits_RV.gather(-1, ids_RK)
    nats = {one.term.divergence.name: one.nats_R(logits_RV) for one in listed}
    # The tail is summed over the ids that were not kept: 1 - sum(kept) would cancel where the student is confident.
    logits_RV.scatter_(-1, ids_RK, -math.inf)
    top_R1 = logits_RV.amax(dim=-1, keepdim=True)
    sum_R1 = logits_RV.sub_(top_R1).exp_().sum(dim=-1, keepdim=True)
    bucket_logits_RB = torch.cat([kept_RK, top_R1 + sum_R1.log()], dim=-1)
    log_normaliser_R1 = bucket_logits_RB.logsumexp(dim=-1, keepdim=True)
    for one in listed:
        nats[one.term.divergence.name] += log_normaliser_R1.squeeze(-1)
    log_q_RB = bucket_logits_RB - log_normaliser_R1
    log_p_RB = torch.cat([targets.log_probs_RK.to(dtype), targets.tail_log_mass_R.to(dtype).unsqueeze(-1)], dim=-1)
    q_RB = log_q_RB.exp()
    of_terms, slopes_RB = _slopes(log_p_RB, log_q_RB, q_RB, terms, lambda: torch.empty_like(q_RB))
    total_R1 = slopes_RB.sum(dim=-1, keepdim=True) - sum(one.term.factor for one in listed)
    gradient_RB = slopes_RB - q_RB * (total_R1 / q_RB.sum(dim=-1, keepdim=True))
    logits_RV.mul_(gradient_RB[:, -1:] / sum_R1)
    logits_RV.scatter_(-1, ids_RK, gradient_RB[:, :-1])
    for one in listed:
        one.add_slopes_to(logits_RV)
    return nats | of_terms


def _slopes(log_p_RB: Tensor, log_q_RB: Tensor, q_RB: Tensor, terms: Sequence[FusedTerm], room: Room) -> tuple[dict[str, Tensor], Tensor]:
    """The nats of each term, and the slopes of their sum, up to a multiple of q: what sum(g) takes away again."""
    p_RB = torch.exp(log_p_RB, out=room())
    nats: dict[str, Tensor] = {}
    sum_RB: Tensor | None = None
    for term in terms:
        assert term.divergence.over_buckets is not None, "can_fuse sees to that"
        nats[term.divergence.name], slopes_RB = term.divergence.over_buckets(log_p_RB, log_q_RB, p_RB, q_RB, room)
        if term.factor != 1.0:
            slopes_RB.mul_(term.factor)
        sum_RB = slopes_RB if sum_RB is None else sum_RB.add_(slopes_RB)
    assert sum_RB is not None
    return nats, sum_RB
