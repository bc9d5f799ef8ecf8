"""Divergences between a teacher's rows and a student's: value and gradient of the quantity named, zero at equality, in nats but where stated.

Shapes: R scored rows, V vocabulary size (real tokens, padding sliced off), K kept ids, U unique drawn ids, B buckets over which two distributions
are compared.

A divergence sees both distributions as log-probabilities over the same B buckets:

- full and hidden targets: one bucket for each id, B = V; the divergence is exact;
- top_k targets: one bucket for each kept id and one for all the others together, B = K + 1. What is computed is the same divergence between the
  two coarsened distributions. For every divergence that accepts top_k it never exceeds the full divergence, can only grow with K, and is exact with
  K = V. For f-divergences that is the data-processing inequality (Csiszar 1967), with equality where the two agree on how the tail is shared out;
  `alpha_beta` says what holds for it.

With P and Q the mass that teacher and student give to the ids that were not kept, and p', q' their distributions within that tail, each docstring
says by how much the full divergence exceeds what is computed.

Forward KL alone accepts drawn targets, of which it makes an estimate with the right mean. Student logits must be finite; a teacher may give
probability exactly zero (see `quantities`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, assert_never

import torch
from torch import Tensor

from stillroom.core.errors import RecipeError, StillroomError
from stillroom.objectives import quantities
from stillroom.objectives.tensors import head_logits_RV
from stillroom.targets.kinds import DrawnTargets, FullTargets, HiddenTargets, SampledTargets, Targets, TextTargets, TopKTargets

# Kinds that give a distribution: in full, and as far as the kept ids go.
WHOLE = ("full", "hidden")
DISTRIBUTIONS = (*WHOLE, "top_k")
# Kinds that can be softened no further: they say nothing of the ids they lack.
_OF_ONE_TEMPERATURE = {
    "top_k": "the mass outside the kept ids cannot be softened without knowing how it is shared out",
    "drawn": "ids drawn at one temperature say little of the distribution at another",
}

Compare: TypeAlias = Callable[[Tensor, Targets, float], Tensor]
Slopes: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, quantities.Room], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """A named quantity per row. `kinds` are the target kinds it can be computed from.

    `nats(student_logits_RV, targets, match_temperature)` gives one number per row (nats, where the divergence has a unit), in the type of the
    logits, which should be float32 or wider; it is pure, and differentiable in the logits alone. Targets are tensors on the logits' device
    (`tensors.as_tensors`).

    What `objectives.fused` can do without autograd: `over_buckets` gives value and slopes from both distributions (`quantities`, "values and slopes");
    `over_ids` says that from text or drawn targets it is -sum share log q over the listed ids, but for what does not depend on the student. Without
    these it is computed by autograd.
    """

    name: str
    kinds: tuple[str, ...]
    nats: Compare
    over_buckets: Slopes | None = None
    over_ids: bool = False

    @property
    def softens(self) -> bool:
        """Whether match_temperature acts on it: yes for all that compare distributions, no for cross-entropy on text."""
        return self.kinds != ("text",)

    def check(self, kind: str, target_temperature: float, match_temperature: float) -> None:
        """Raises StillroomError 'targets-unsupported', naming the kinds that would do, if targets of this kind and temperature will not."""
        require_kind(self.name, kind, self.kinds)
        if kind in _OF_ONE_TEMPERATURE and target_temperature != match_temperature:
            raise StillroomError(
                "targets-unsupported",
                found=f"{self.name} at match_temperature {match_temperature:g} from {kind} targets made at temperature {target_temperature:g}",
                expected=f"{kind} targets made at {match_temperature:g}, or targets of kind {', '.join(WHOLE)}",
                why=_OF_ONE_TEMPERATURE[kind],
                do=f"Set targets.target_temperature to {match_temperature:g}, or targets.kind to {' or '.join(WHOLE)}.",
            )


def require_kind(name: str, kind: str, kinds: tuple[str, ...]) -> None:
    """Raises StillroomError 'targets-unsupported' unless `kind` is among the `kinds` that the term `name` can be computed from."""
    if kind not in kinds:
        raise StillroomError(
            "targets-unsupported",
            found=f"{name} from targets of kind {kind}",
            expected=f"targets of kind {', '.join(kinds)}",
            do=f"Set targets.kind to {' or '.join(kinds)}, or choose another term.",
        )


def forward_kl() -> Divergence:
    """KL(teacher || student) = sum_b p_b (log p_b - log q_b), from full, hidden, top_k and drawn targets. An f-divergence.

    top_k: the full one is larger by P KL(p', q'), which nothing that is kept bounds. drawn: sum_u (c_u / N) (-log q_u) - entropy; over the draws its
    mean is forward KL and the mean of its gradient forward KL's gradient, but a single row may be negative, and zero at equality is a matter of the
    mean (Anshumann et al. 2025, arXiv 2503.16870).
    """
    compare = _over_buckets(quantities.forward_kl_R)

    def nats_R(student_logits_RV: Tensor, targets: Targets, match_temperature: float) -> Tensor:
        if isinstance(targets, DrawnTargets):
            assert targets.temperature == match_temperature, "Divergence.check refuses this at plan time"
            return _forward_kl_drawn_R(student_logits_RV / match_temperature, targets)
        return compare(student_logits_RV, targets, match_temperature)

    return Divergence(name="forward_kl", kinds=(*DISTRIBUTIONS, "drawn"), nats=nats_R, over_buckets=quantities.forward_kl_slopes, over_ids=True)


def reverse_kl() -> Divergence:
    """KL(student || teacher) = sum_b q_b (log q_b - log p_b), from full, hidden and top_k targets. An f-divergence.

    top_k: the full one is larger by Q KL(q', p'), which nothing that is kept bounds.
    """
    return Divergence(name="reverse_kl", kinds=DISTRIBUTIONS, nats=_over_buckets(quantities.reverse_kl_R), over_buckets=quantities.reverse_kl_slopes)


def generalized_jsd(weight_on_teacher: float = 0.5) -> Divergence:
    """JSD_w = w KL(p || m) + (1 - w) KL(q || m) with m = w p + (1 - w) q and w = `weight_on_teacher` in (0, 1), from full, hidden and top_k targets.

    An f-divergence, at most h(w) = -w log w - (1 - w) log(1 - w). top_k: with M = w P + (1 - w) Q the full one is larger by M JSD_{wP/M}(p', q'), at
    most M h(wP/M) <= M log 2. It vanishes at both ends of w; divided by w (1 - w) it tends to forward KL as w -> 0 and to reverse KL as w -> 1.
    Source: Agarwal et al. 2024, arXiv 2306.13649, equation 1, with beta = w. Raises RecipeError for a w at which it is nothing.
    """
    _require_inside(
        "weight_on_teacher", weight_on_teacher, "Use forward_kl or reverse_kl for the limits.", "at the ends it is zero for every student"
    )

    compare = partial(quantities.generalized_jsd_R, weight_on_teacher=weight_on_teacher)
    slopes = partial(quantities.generalized_jsd_slopes, weight_on_teacher=weight_on_teacher)
    return Divergence(name=f"generalized_jsd({weight_on_teacher:g})", kinds=DISTRIBUTIONS, nats=_over_buckets(compare), over_buckets=slopes)


def skew_forward_kl(alpha: float = 0.1) -> Divergence:
    """KL(p || alpha p + (1 - alpha) q) with alpha in (0, 1), from full, hidden and top_k targets.

    An f-divergence, at most -log alpha. top_k: with M = alpha P + (1 - alpha) Q the full one is larger by at most P log(M / (alpha P)). alpha -> 0 is
    forward KL; at 1 it is zero for every student. Source: Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.1, which recommends 0.1.
    """
    _require_inside("alpha", alpha, "Use forward_kl for the limit alpha = 0.", "at 0 it is forward_kl, and at 1 zero for every student")

    compare = partial(quantities.skew_forward_kl_R, alpha=alpha)
    slopes = partial(quantities.skew_forward_kl_slopes, alpha=alpha)
    return Divergence(name=f"skew_forward_kl({alpha:g})", kinds=DISTRIBUTIONS, nats=_over_buckets(compare), over_buckets=slopes)


def skew_reverse_kl(alpha: float = 0.1) -> Divergence:
    """KL(q || (1 - alpha) p + alpha q) with alpha in (0, 1), from full, hidden and top_k targets.

    An f-divergence, at most -log alpha. top_k: with M = (1 - alpha) P + alpha Q the full one is larger by at most Q log(M / (alpha Q)). alpha -> 0 is
    reverse KL; at 1 it is zero for every student. Source: Ko et al. 2024 (DistiLLM), arXiv 2402.03898, section 3.1, which recommends 0.1.
    """
    _require_inside("alpha", alpha, "Use reverse_kl for the limit alpha = 0.", "at 0 it is reverse_kl, and at 1 zero for every student")

    compare = partial(quantities.skew_reverse_kl_R, alpha=alpha)
    slopes = partial(quantities.skew_reverse_kl_slopes, alpha=alpha)
    return Divergence(name=f"skew_reverse_kl({alpha:g})", kinds=DISTRIBUTIONS, nats=_over_buckets(compare), over_buckets=slopes)


def total_variation() -> Divergence:
    """sum_b |p_b - q_b| / 2, a probability between 0 and 1 and not nats, from full, hidden and top_k targets. An f-divergence.

    1 minus it is the rate at which speculative decoding accepts the student's tokens. top_k: the full one is larger by at most min(P, Q). It has no
    derivative where an id's p and q are equal; ids that are equal up to rounding get the slope 0, so that the gradient vanishes at equality.
    """
    return Divergence(
        name="total_variation", kinds=DISTRIBUTIONS, nats=_over_buckets(quantities.total_variation_R), over_buckets=quantities.total_variation_slopes
    )


def alpha_beta(alpha: float = 0.5, beta: float = 0.5) -> Divergence:
    """sum_b (alpha/s p^s + beta/s q^s - p^alpha q^beta) / (alpha beta), s = alpha + beta, for alpha, beta >= 0, not both 0; it has no unit.

    Where one of them is 0 it is the limit: at (alpha, 0) sum (alpha p^alpha (log p - log q) - p^alpha + q^alpha) / alpha^2, and at (0, beta) the same
    with p and q exchanged; (1, 0) is forward KL, (0, 1) reverse KL, (1/2, 1/2) 4 (1 - sum sqrt(p q)), (1, 1) half the squared distance. Exact from full
    and hidden targets.

    top_k only where s <= 1. With s = 1 it is an f-divergence. With s < 1 it is none, but still never grows when buckets are merged: a bucket's share
    T(p, q) is homogeneous of degree s, and T^(1/s) is convex (docs/concepts.md has the proof), hence subadditive, and so is T. The full one is larger
    by at most n^(1-s) (P^s / (beta s) + Q^s / (alpha s)), n being the number of ids not kept; where alpha or beta is 0 nothing bounds it. With s > 1
    merging buckets can make it larger, n^(s-1) times where the tail is flat: such a number bounds nothing, so top_k is not accepted.

    Source: Wang et al. 2025 (ABKD), arXiv 2505.04560, with p the teacher; the divergence is that of Cichocki, Cruces and Amari 2011. Raises RecipeError
    outside the range.
    """
    if not (alpha >= 0.0 and beta >= 0.0 and 0.0 < alpha + beta < math.inf):
        raise RecipeError(
            "recipe-invalid",
            found=f"alpha_beta with alpha {alpha} and beta {beta}",
            expected="two numbers of at least 0, not both 0",
            why="with a negative one the least probable ids weigh most, and one probability of zero makes it infinite",
            do="Choose both from 0 on; (1, 0) is forward_kl and (0, 1) is reverse_kl.",
        )

    compare = partial(quantities.alpha_beta_R, alpha=alpha, beta=beta)
    slopes = partial(quantities.alpha_beta_slopes, alpha=alpha, beta=beta)
    # 0.7 + 0.3 may be a rounding above 1.
    kinds = DISTRIBUTIONS if alpha + beta <= 1.0 + 1e-9 else WHOLE
    return Divergence(name=f"alpha_beta({alpha:g},{beta:g})", kinds=kinds, nats=_over_buckets(compare), over_buckets=slopes)


def cross_entropy() -> Divergence:
    """-log q(token) of the text's own token, at temperature 1 whatever the match temperature: the KL from the one-hot distribution of the text."""

    def nats_R(student_logits_RV: Tensor, targets: Targets, match_temperature: float) -> Tensor:
        assert isinstance(targets, TextTargets), "cross_entropy is computed from text; Objective sees to that"
        log_q_RV = torch.log_softmax(student_logits_RV, dim=-1)
        return -log_q_RV.gather(-1, targets.token_ids_R.long().unsqueeze(-1)).squeeze(-1)

    return Divergence(name="cross_entropy", kinds=("text",), nats=nats_R, over_ids=True)


DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "generalized_jsd": generalized_jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "alpha_beta": alpha_beta,
    "cross_entropy": cross_entropy,
}


def _require_inside(name: str, value: float, do: str, why: str) -> None:
    if not 0.0 < value < 1.0:
        raise RecipeError("recipe-invalid", found=f"{name} {value}", expected="a number between 0 and 1, neither included", why=why, do=do)


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
        case TextTargets() | SampledTargets() | DrawnTargets():
            raise AssertionError("no distribution over buckets; Divergence.check refuses this at plan time")
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


def _forward_kl_drawn_R(student_logits_RV: Tensor, targets: DrawnTargets) -> Tensor:
    rows = student_logits_RV.shape[0]
    entries_R = targets.offsets_R1.diff()
    row_of_U = torch.repeat_interleave(torch.arange(rows, device=student_logits_RV.device), entries_R)
    share_U: Tensor = targets.counts_U.to(student_logits_RV.dtype) / targets.draws
    drawn_U = share_U * student_logits_RV[row_of_U, targets.ids_U.long()]
    # -log q_u = logsumexp(logits) - logit_u, and the shares of a row sum to 1.
    drawn_R = drawn_U.new_zeros(rows).index_add(0, row_of_U, drawn_U)
    entropy_R: Tensor = targets.entropy_R.to(drawn_R.dtype)
    return student_logits_RV.logsumexp(dim=-1) - drawn_R - entropy_R
