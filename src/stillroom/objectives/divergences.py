"""Divergences between a teacher's rows and a student's: value and gradient of the quantity named, in nats, zero at equality.

Shapes: R scored rows, V vocabulary size (real tokens, padding sliced off), K kept ids, B buckets over which two distributions are compared.

A divergence sees both distributions as log-probabilities over the same B buckets:

- full and hidden targets: one bucket for each id, B = V; the divergence is exact;
- top_k targets: one bucket for each kept id and one for all the others together, B = K + 1. What is computed is the same divergence between the
  two coarsened distributions. Both sides are coarsened by the same map, so by the data-processing inequality, which every f-divergence obeys
  (Csiszar 1967; forward and reverse KL and generalized JSD are f-divergences), it never exceeds the full divergence, and equals it where the two
  agree on how the tail is shared out. With K = V it is exact.

Student logits must be finite; a teacher may give probability exactly zero. Forward KL and JSD are finite there. Reverse KL is infinite, with no
useful gradient; it counts a zero as e^-100 (`LOG_OF_ZERO`), which is under the smallest float32, so the value is large and the gradient points home.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, assert_never

import torch
from torch import Tensor

from stillroom.core.errors import StillroomError
from stillroom.objectives.tensors import head_logits_RV
from stillroom.targets.kinds import FullTargets, HiddenTargets, Targets, TextTargets, TopKTargets

LOG_OF_ZERO = -100.0
DISTRIBUTIONS = ("full", "hidden", "top_k")

Compare: TypeAlias = Callable[[Tensor, Targets, float], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """A named quantity per row. `kinds` are the target kinds it can be computed from.

    `nats(student_logits_RV, targets, match_temperature)` gives one number of nats per row, in the type of the logits, which should be float32
    or wider; it is pure, and differentiable in the logits alone. Targets are tensors on the logits' device (`tensors.as_tensors`).
    """

    name: str
    kinds: tuple[str, ...]
    nats: Compare

    @property
    def softens(self) -> bool:
        """Whether match_temperature acts on it: yes for all that compare distributions, no for cross-entropy on text."""
        return self.kinds != ("text",)

    def check(self, kind: str, target_temperature: float, match_temperature: float) -> None:
        """Raises StillroomError 'targets-unsupported', naming the kinds that would do, if targets of this kind and temperature will not."""
        if kind not in self.kinds:
            raise StillroomError(
                "targets-unsupported",
                found=f"{self.name} from targets of kind {kind}",
                expected=f"targets of kind {', '.join(self.kinds)}",
                do=f"Set targets.kind to {' or '.join(self.kinds)}, or choose another divergence.",
            )
        if kind == "top_k" and target_temperature != match_temperature:
            exact = tuple(other for other in self.kinds if other != "top_k")
            raise StillroomError(
                "targets-unsupported",
                found=f"{self.name} at match_temperature {match_temperature:g} from top_k targets made at temperature {target_temperature:g}",
                expected=f"top_k targets made at {match_temperature:g}, or targets of kind {', '.join(exact)}",
                why="the mass outside the kept ids cannot be softened without knowing how it is shared out",
                do=f"Set targets.target_temperature to {match_temperature:g}, or targets.kind to {' or '.join(exact)}.",
            )


def forward_kl() -> Divergence:
    """KL(teacher || student) = sum_b p_b (log p_b - log q_b)."""
    return Divergence(name="forward_kl", kinds=DISTRIBUTIONS, nats=_over_buckets(_forward_kl_R))


def reverse_kl() -> Divergence:
    """KL(student || teacher) = sum_b q_b (log q_b - log p_b)."""
    return Divergence(name="reverse_kl", kinds=DISTRIBUTIONS, nats=_over_buckets(_reverse_kl_R))


def generalized_jsd(weight_on_teacher: float = 0.5) -> Divergence:
    """JSD_w = w KL(p || m) + (1 - w) KL(q || m) with m = w p + (1 - w) q and w = `weight_on_teacher` in (0, 1).

    Source: Agarwal et al. 2024, arXiv 2306.13649, equation 1, with beta = w. It vanishes at both ends of w; divided by w (1 - w) it tends to
    forward KL as w -> 0 and to reverse KL as w -> 1.
    """
    if not 0.0 < weight_on_teacher < 1.0:
        raise StillroomError(
            "recipe-invalid",
            found=f"weight_on_teacher {weight_on_teacher}",
            expected="a number between 0 and 1, neither included",
            why="at the ends the quantity is zero for every student",
            do="Use forward_kl or reverse_kl for the limits.",
        )

    def compare(log_p_RB: Tensor, log_q_RB: Tensor) -> Tensor:
        return _generalized_jsd_R(log_p_RB, log_q_RB, weight_on_teacher)

    return Divergence(name=f"generalized_jsd({weight_on_teacher:g})", kinds=DISTRIBUTIONS, nats=_over_buckets(compare))


def cross_entropy() -> Divergence:
    """-log q(token) of the text's own token, at temperature 1 whatever the match temperature: the KL from the one-hot distribution of the text."""

    def nats_R(student_logits_RV: Tensor, targets: Targets, match_temperature: float) -> Tensor:
        assert isinstance(targets, TextTargets), "cross_entropy is computed from text; Objective sees to that"
        log_q_RV = torch.log_softmax(student_logits_RV, dim=-1)
        return -log_q_RV.gather(-1, targets.token_ids_R.long().unsqueeze(-1)).squeeze(-1)

    return Divergence(name="cross_entropy", kinds=("text",), nats=nats_R)


DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "generalized_jsd": generalized_jsd,
    "cross_entropy": cross_entropy,
}


# -- both distributions over the same buckets ---------------------------------------------------------------------------


def teacher_log_probs_RV(targets: FullTargets | HiddenTargets, match_temperature: float, dtype: torch.dtype) -> Tensor:
    """The teacher's whole distribution at `match_temperature`, as log-probabilities.

    From log-probabilities made at temperature s: log p at T is log_softmax(s / T * log p at s), since both come from the same logits.
    """
    with torch.no_grad():
        if isinstance(targets, HiddenTargets):
            return torch.log_softmax(head_logits_RV(targets.states_RD, targets.head, dtype) / match_temperature, dim=-1)
        log_probs_RV: Tensor = targets.log_probs_RV.to(dtype)
        if targets.temperature == match_temperature:
            return log_probs_RV
        return torch.log_softmax(log_probs_RV * (targets.temperature / match_temperature), dim=-1)


def _over_buckets(compare: Callable[[Tensor, Tensor], Tensor]) -> Compare:
    def nats_R(student_logits_RV: Tensor, targets: Targets, match_temperature: float) -> Tensor:
        return compare(*_buckets_RB(student_logits_RV, targets, match_temperature))

    return nats_R


def _buckets_RB(student_logits_RV: Tensor, targets: Targets, match_temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student over the same buckets."""
    log_q_RV = torch.log_softmax(student_logits_RV / match_temperature, dim=-1)
    match targets:
        case FullTargets() | HiddenTargets():
            return teacher_log_probs_RV(targets, match_temperature, log_q_RV.dtype), log_q_RV
        case TopKTargets():
            assert targets.temperature == match_temperature, "Divergence.check refuses this at plan time"
            return _kept_and_tail(targets, log_q_RV)
        case TextTargets():
            raise AssertionError("text is no distribution; Divergence.check refuses this at plan time")
        case _:
            assert_never(targets)


def _kept_and_tail(targets: TopKTargets, log_q_RV: Tensor) -> tuple[Tensor, Tensor]:
    ids_RK = targets.ids_RK.long()
    log_p_RK = targets.log_probs_RK.to(log_q_RV.dtype)
    kept_RK = log_q_RV.gather(-1, ids_RK)
    if ids_RK.shape[-1] == log_q_RV.shape[-1]:
        return log_p_RK, kept_RK
    # The student's tail is summed over the ids that were not kept: 1 - sum(kept) would cancel where the student is confident.
    tail_R1 = log_q_RV.scatter(-1, ids_RK, -math.inf).logsumexp(dim=-1, keepdim=True)
    tail_log_mass_R1 = targets.tail_log_mass_R.to(log_q_RV.dtype).unsqueeze(-1)
    return torch.cat([log_p_RK, tail_log_mass_R1], dim=-1), torch.cat([kept_RK, tail_R1], dim=-1)


# -- the quantities themselves ------------------------------------------------------------------------------------------


def _forward_kl_R(log_p_RB: Tensor, log_q_RB: Tensor) -> Tensor:
    p_RB = log_p_RB.exp()
    # 0 log 0 = 0: a bucket without mass has no say, whatever the difference of the logarithms.
    return torch.where(p_RB > 0, p_RB * (log_p_RB - log_q_RB), 0.0).sum(dim=-1)


def _reverse_kl_R(log_p_RB: Tensor, log_q_RB: Tensor) -> Tensor:
    log_p_RB = torch.where(log_p_RB == -math.inf, LOG_OF_ZERO, log_p_RB)
    return (log_q_RB.exp() * (log_q_RB - log_p_RB)).sum(dim=-1)


def _generalized_jsd_R(log_p_RB: Tensor, log_q_RB: Tensor, weight_on_teacher: float) -> Tensor:
    log_m_RB = torch.logaddexp(log_p_RB + math.log(weight_on_teacher), log_q_RB + math.log1p(-weight_on_teacher))
    from_teacher_R = _forward_kl_R(log_p_RB, log_m_RB)
    from_student_R = (log_q_RB.exp() * (log_q_RB - log_m_RB)).sum(dim=-1)
    return weight_on_teacher * from_teacher_R + (1.0 - weight_on_teacher) * from_student_R
