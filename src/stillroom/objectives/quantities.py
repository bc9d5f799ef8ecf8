"""The quantities themselves: two distributions over the same buckets, as log-probabilities, to one number for each row.

Shapes: R scored rows, B buckets. `log_p_RB` is the teacher's, `log_q_RB` the student's; the gradient goes to the student's alone. The student's must
be finite; a teacher's probability may be exactly zero (-inf). Each quantity is finite there by its definition, but for those that grow without bound
as p goes to 0 (reverse KL, alpha-beta with alpha = 0): they count a zero as e^-100 (`LOG_OF_ZERO`), which is under the smallest float32, so that the
value is large and the gradient points home.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Room: TypeAlias = Callable[[], Tensor]

LOG_OF_ZERO = -100.0
# Two log-probabilities that differ by no more than so many units of rounding are equal as far as the arithmetic can tell.
_ROUNDING_UNITS = 64


def forward_kl_R(log_p_RB: Tensor, log_q_RB: Tensor) -> Tensor:
    """The sum of p (log p - log q)."""
    p_RB = log_p_RB.exp()
    # 0 log 0 = 0: a bucket without mass has no say, whatever the difference of the logarithms.
    return torch.where(p_RB > 0, p_RB * (log_p_RB - log_q_RB), 0.0).sum(dim=-1)


def reverse_kl_R(log_p_RB: Tensor, log_q_RB: Tensor) -> Tensor:
    """The sum of q (log q - log p)."""
    return (log_q_RB.exp() * (log_q_RB - _without_zeros(log_p_RB))).sum(dim=-1)


def generalized_jsd_R(log_p_RB: Tensor, log_q_RB: Tensor, weight_on_teacher: float) -> Tensor:
    """The mixture w KL(p, m) + (1 - w) KL(q, m), m = w p + (1 - w) q."""
    log_m_RB = _log_mixture_RB(log_p_RB, log_q_RB, weight_on_teacher)
    from_teacher_R = forward_kl_R(log_p_RB, log_m_RB)
    from_student_R = (log_q_RB.exp() * (log_q_RB - log_m_RB)).sum(dim=-1)
    return weight_on_teacher * from_teacher_R + (1.0 - weight_on_teacher) * from_student_R


def skew_forward_kl_R(log_p_RB: Tensor, log_q_RB: Tensor, alpha: float) -> Tensor:
    """KL(p, alpha p + (1 - alpha) q)."""
    return forward_kl_R(log_p_RB, _log_mixture_RB(log_p_RB, log_q_RB, alpha))


def skew_reverse_kl_R(log_p_RB: Tensor, log_q_RB: Tensor, alpha: float) -> Tensor:
    """KL(q, (1 - alpha) p + alpha q)."""
    log_m_RB = _log_mixture_RB(log_p_RB, log_q_RB, 1.0 - alpha)
    return (log_q_RB.exp() * (log_q_RB - log_m_RB)).sum(dim=-1)


def total_variation_R(log_p_RB: Tensor, log_q_RB: Tensor) -> Tensor:
    """The sum of |p - q| / 2. Where p = q there is no derivative; of the slopes between -1 and 1 that would do, 0 is taken."""
    difference_RB = log_p_RB.exp() - log_q_RB.exp()
    # Equal up to rounding is equal: the sign of a rounding error is no direction to learn in.
    equal_RB = (log_p_RB - log_q_RB).abs() <= _ROUNDING_UNITS * torch.finfo(log_q_RB.dtype).eps
    return 0.5 * torch.where(equal_RB, difference_RB.detach(), difference_RB).abs().sum(dim=-1)


def alpha_beta_R(log_p_RB: Tensor, log_q_RB: Tensor, alpha: float, beta: float) -> Tensor:
    """The sum of (alpha/s p^s + beta/s q^s - p^alpha q^beta) / (alpha beta), s = alpha + beta, and its limits where alpha or beta is 0.

    Computed without a division by either: with d = log p - log q and f_c(d) = (e^(c d) - 1) / c, f_0(d) = d, a bucket's share is

        q^s / s (e^(alpha d) f_beta(d) - f_alpha(d))  =  p^s / s (e^(-beta d) f_alpha(-d) - f_beta(-d)),

    of which the first is taken where d <= 0 and the second where d > 0, so that no exponential exceeds 1.
    """
    s = alpha + beta
    finite_RB = _without_zeros(log_p_RB)
    apart_RB = -(finite_RB - log_q_RB).abs()
    teacher_more_RB = _bracket_RB(apart_RB, factor=beta, first=alpha, second=beta)
    student_more_RB = _bracket_RB(apart_RB, factor=alpha, first=beta, second=alpha)
    share_RB = (s * torch.maximum(finite_RB, log_q_RB)).exp() / s * torch.where(finite_RB > log_q_RB, teacher_more_RB, student_more_RB)
    if alpha > 0:
        # The limit of p -> 0, which is finite.
        share_RB = torch.where(log_p_RB == -math.inf, (s * log_q_RB).exp() / (alpha * s), share_RB)
    return share_RB.sum(dim=-1)


# -- values and slopes ---------------------------------------------------------------------------------------------------
#
# The same quantities, in one pass and without autograd: (log p, log q, p, q) to one number for each row and, for each bucket, the derivative with
# respect to log q_b, R x B, up to a multiple of q: a multiple of q moves the logits alike, and a softmax takes it away again. Nothing that is given is
# written to; m is the mixture. `room()` gives another uninitialised tensor of that shape each time: what is large is computed in such.


def forward_kl_slopes(log_p_RB: Tensor, log_q_RB: Tensor, p_RB: Tensor, q_RB: Tensor, room: Room) -> tuple[Tensor, Tensor]:
    """Slopes -p."""
    return _expected_R(p_RB, torch.sub(log_p_RB, log_q_RB, out=room())), torch.neg(p_RB, out=room())


def reverse_kl_slopes(log_p_RB: Tensor, log_q_RB: Tensor, p_RB: Tensor, q_RB: Tensor, room: Room) -> tuple[Tensor, Tensor]:
    """Slopes q (log q - log p)."""
    slopes_RB = torch.sub(log_q_RB, _without_any_zeros(log_p_RB), out=room()).mul_(q_RB)
    return slopes_RB.sum(dim=-1), slopes_RB


def generalized_jsd_slopes(
    log_p_RB: Tensor, log_q_RB: Tensor, p_RB: Tensor, q_RB: Tensor, room: Room, weight_on_teacher: float
) -> tuple[Tensor, Tensor]:
    """Slopes (1 - w) q log(q / m)."""
    log_m_RB = _mixture_RB(p_RB, q_RB, weight_on_teacher, room()).log_()
    slopes_RB = torch.sub(log_q_RB, log_m_RB, out=room()).mul_(q_RB).mul_(1.0 - weight_on_teacher)
    from_teacher_R = _expected_R(p_RB, torch.sub(log_p_RB, log_m_RB, out=log_m_RB))
    return slopes_RB.sum(dim=-1).add_(from_teacher_R, alpha=weight_on_teacher), slopes_RB


def skew_forward_kl_slopes(log_p_RB: Tensor, log_q_RB: Tensor, p_RB: Tensor, q_RB: Tensor, room: Room, alpha: float) -> tuple[Tensor, Tensor]:
    """Slopes -(1 - alpha) p q / m."""
    mixture_RB = _mixture_RB(p_RB, q_RB, alpha, room())
    slopes_RB = torch.mul(p_RB, q_RB, out=room()).div_(mixture_RB).mul_(alpha - 1.0)
    return _expected_R(p_RB, torch.sub(log_p_RB, mixture_RB.log_(), out=mixture_RB)), slopes_RB


def skew_reverse_kl_slopes(log_p_RB: Tensor, log_q_RB: Tensor, p_RB: Tensor, q_RB: Tensor, room: Room, alpha: float) -> tuple[Tensor, Tensor]:
    """Slopes q log(q / m) + (1 - alpha) p q / m."""
    mixture_RB = _mixture_RB(p_RB, q_RB, 1.0 - alpha, room())
    shared_RB = torch.mul(p_RB, q_RB, out=room()).div_(mixture_RB)
    slopes_RB = torch.sub(log_q_RB, mixture_RB.log_(), out=mixture_RB).mul_(q_RB)
    return slopes_RB.sum(dim=-1), slopes_RB.add_(shared_RB, alpha=1.0 - alpha)


def total_variation_slopes(log_p_RB: Tensor, log_q_RB: Tensor, p_RB: Tensor, q_RB: Tensor, room: Room) -> tuple[Tensor, Tensor]:
    """Slopes q sign(q - p) / 2, and 0 where p and q are equal up to rounding."""
    difference_RB = torch.sub(q_RB, p_RB, out=room())
    slopes_RB = torch.sign(difference_RB, out=room()).mul_(q_RB).mul_(0.5)
    slopes_RB.masked_fill_(torch.sub(log_p_RB, log_q_RB, out=room()).abs_() <= _ROUNDING_UNITS * torch.finfo(log_q_RB.dtype).eps, 0.0)
    return difference_RB.abs_().sum(dim=-1).mul_(0.5), slopes_RB


def alpha_beta_slopes(log_p_RB: Tensor, log_q_RB: Tensor, p_RB: Tensor, q_RB: Tensor, room: Room, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Slopes q^beta (q^alpha - p^alpha) / alpha, or q^beta (log q - log p) where alpha is 0; computed as in `alpha_beta_R`, no exponential above 1."""
    finite_RB = _without_any_zeros(log_p_RB)
    apart_RB = torch.sub(finite_RB, log_q_RB, out=room())
    teacher_more_RB = apart_RB > 0
    # By the larger of the two: q^s (1 - e^(alpha d)) / alpha, or q^beta p^alpha (e^(-alpha d) - 1) / alpha.
    weights_RB = torch.maximum(finite_RB, log_q_RB, out=room()).mul_(alpha).add_(log_q_RB, alpha=beta).exp_()
    grown_RB = _grown(apart_RB.abs_().neg_(), alpha)
    slopes_RB = torch.where(teacher_more_RB, grown_RB, -grown_RB).mul_(weights_RB)
    if alpha > 0:
        # The limit of p -> 0, which is finite.
        slopes_RB = torch.where(log_p_RB == -math.inf, ((alpha + beta) * log_q_RB).exp() / alpha, slopes_RB)
    return alpha_beta_R(log_p_RB, log_q_RB, alpha, beta), slopes_RB


def _without_any_zeros(log_p_RB: Tensor) -> Tensor:
    """As `_without_zeros`; where there are none, which is the rule and is cheaper to see than to mend, it is `log_p_RB` itself."""
    return _without_zeros(log_p_RB) if log_p_RB.numel() and log_p_RB.amin().item() == -math.inf else log_p_RB


def _expected_R(p_RB: Tensor, differences_RB: Tensor) -> Tensor:
    """The sum of p times the differences, which are used up. 0 log 0 = 0: a bucket without mass has no say, be its logarithm infinite."""
    smallest = torch.finfo(differences_RB.dtype).min
    return differences_RB.clamp_(min=smallest).mul_(p_RB).sum(dim=-1)


def _mixture_RB(p_RB: Tensor, q_RB: Tensor, weight_on_teacher: float, out_RB: Tensor) -> Tensor:
    """The sum w p + (1 - w) q, and above 0 where both are too small for a float: such a bucket's share is 0 whatever its logarithm."""
    tiny = torch.finfo(q_RB.dtype).tiny
    return torch.mul(q_RB, 1.0 - weight_on_teacher, out=out_RB).add_(p_RB, alpha=weight_on_teacher).clamp_(min=tiny)


def _bracket_RB(apart_RB: Tensor, *, factor: float, first: float, second: float) -> Tensor:
    return (factor * apart_RB).exp() * _grown(apart_RB, first) - _grown(apart_RB, second)


def _grown(x: Tensor, rate: float) -> Tensor:
    return x if rate == 0 else torch.expm1(rate * x) / rate


def _log_mixture_RB(log_p_RB: Tensor, log_q_RB: Tensor, weight_on_teacher: float) -> Tensor:
    return torch.logaddexp(log_p_RB + math.log(weight_on_teacher), log_q_RB + math.log1p(-weight_on_teacher))


def _without_zeros(log_p_RB: Tensor) -> Tensor:
    return torch.where(log_p_RB == -math.inf, LOG_OF_ZERO, log_p_RB)
