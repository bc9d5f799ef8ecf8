"""What a teacher said about a sequence: the closed union of target kinds.

Every kind holds one entry per *scored row*, rows of several sequences laid end to end. **Row t is the distribution after token t**: it
predicts token t + 1. Arrays are numpy when they come from a store and torch tensors when they come from a live model; the objectives take
either. Shapes: R scored rows, V vocabulary size (real tokens, never the padded width), K kept ids, D width of the teacher, U unique drawn ids
of all rows together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

Array: TypeAlias = Any  # numpy.ndarray or torch.Tensor; this room imports no torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTargets:
    """The tokens themselves. `token_ids_R`: int64, the token that each row predicts."""

    vocabulary: str  # fingerprint
    token_ids_R: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTargets:
    """The tokens themselves, and how probable the teacher found each: all that many served models say.

    `token_ids_R` int64: the token that each row predicts; `log_probs_R` float, in nats: what the teacher at `temperature` gives to that token.
    """

    vocabulary: str
    temperature: float
    token_ids_R: Array
    log_probs_R: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKTargets:
    """The K most probable ids of each row, and the mass of all the others, which is kept and never renormalised away.

    `ids_RK` int32; `log_probs_RK` float, in nats, under the teacher at `temperature`; `tail_log_mass_R` float: the log of
    1 - sum(exp(log_probs)), -inf where the kept ids are the whole vocabulary.
    """

    vocabulary: str
    temperature: float
    ids_RK: Array
    log_probs_RK: Array
    tail_log_mass_R: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnTargets:
    """`draws` ids drawn from the teacher at `temperature`, with replacement, as unique ids and how often each was drawn.

    Row r has the entries offsets_R1[r] to offsets_R1[r + 1] (exclusive) of `ids_U` and `counts_U`: ids ascending, counts at least 1 that sum to
    `draws`. `offsets_R1` int64 from 0 to U, `ids_U` int32, `counts_U` int32. counts / draws is an unbiased estimate of the teacher's probabilities, so
    sum_u (c_u / N) (-log q_u) - entropy is one of forward KL, and its gradient of the gradient (Anshumann et al. 2025, arXiv 2503.16870, section 4).
    `entropy_R` float32, nats: the entropy of the teacher's whole distribution.
    """

    vocabulary: str
    temperature: float
    draws: int
    offsets_R1: Array
    ids_U: Array
    counts_U: Array
    entropy_R: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherHead:
    """What turns a teacher's last hidden state into logits: `scale * softcap(states @ weight.T + bias)`.

    `weight_VD` has exactly the vocabulary's real tokens as rows. `softcap` c means c * tanh(x / c); None means none.
    """

    weight_VD: Array
    bias_V: Array | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTargets:
    """The teacher's last hidden state (after the final norm) of each row, and its head: the whole distribution at D numbers a row.

    `states_RD` float32 or bfloat16 (in numpy its upper 16 bits, uint16); states stored as int8 are read back as float32. The distribution is
    softmax(head(states) / temperature).
    """

    vocabulary: str
    temperature: float
    states_RD: Array
    head: TeacherHead


@dataclass(frozen=True, slots=True, kw_only=True)
class FullTargets:
    """The whole distribution: `log_probs_RV` in nats, normalised, at `temperature`. Live only, never stored."""

    vocabulary: str
    temperature: float
    log_probs_RV: Array


Targets: TypeAlias = TextTargets | SampledTargets | DrawnTargets | TopKTargets | HiddenTargets | FullTargets

TARGET_KINDS: dict[str, type[Targets]] = {
    "text": TextTargets,
    "sampled": SampledTargets,
    "drawn": DrawnTargets,
    "top_k": TopKTargets,
    "hidden": HiddenTargets,
    "full": FullTargets,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRequest:
    """Which targets are wanted: a name from `TARGET_KINDS`, the temperature they are made at, and what the kind needs besides.

    `k` for top_k: how many ids are kept. `draws` for drawn: N; `seed`: another draws other ids. `state_dtype` for hidden: what the states are rounded
    to (codecs.STATE_DTYPES).
    """

    kind: str
    temperature: float = 1.0
    k: int = 0
    draws: int = 0
    seed: int = 0
    state_dtype: str = "bfloat16"
