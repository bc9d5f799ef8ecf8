"""What a teacher said about a sequence: the closed union of target kinds.

Every kind holds one entry per *scored row*, rows of several sequences laid end to end. **Row t is the distribution after token t**: it
predicts token t + 1. Arrays are numpy when they come from a store and torch tensors when they come from a live model; the objectives take
either. Shapes: R scored rows, V vocabulary size (real tokens, never the padded width), K kept ids, D width of the teacher.
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

    `states_RD` float32 or bfloat16 (stored as its upper 16 bits, uint16). The distribution is softmax(head(states) / temperature).
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


Targets: TypeAlias = TextTargets | TopKTargets | HiddenTargets | FullTargets

TARGET_KINDS: dict[str, type[Targets]] = {"text": TextTargets, "top_k": TopKTargets, "hidden": HiddenTargets, "full": FullTargets}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRequest:
    """Which targets are wanted: a name from `TARGET_KINDS`, the temperature they are made at, and `k` for top_k."""

    kind: str
    temperature: float = 1.0
    k: int = 0
