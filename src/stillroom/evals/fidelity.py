"""How close the student's next-token distributions are to the teacher's, on the teacher's own held-out answers.

Sums are kept for each sequence, so that intervals resample sequences: tokens of one answer are not independent. All arithmetic in float64.
S sequences, R scored rows, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from stillroom.core.errors import DivergedError, VocabularyError
from stillroom.core.identities import TokenSequence
from stillroom.core.statistics import Interval, paired_statistic_interval
from stillroom.evals.measured import Absence, Evidence

RowLogits: TypeAlias = Callable[[Sequence[TokenSequence]], torch.Tensor]
"""Logits or log-probabilities (R x V, real tokens only, at temperature 1) of the scored rows of sequences laid end to end."""


class SequenceFidelity(Evidence):
    """Sums over the scored rows of one sequence."""

    scored_tokens: int
    forward_kl_nats: float
    agreements: int
    """Rows on which both have the same most probable token; among equals the lowest id counts."""
    acceptance: float
    """Sum over rows of sum over v of min(teacher, student) = 1 - total variation."""


class FidelitySums(Evidence):
    """The content of an evals/*.json file: one entry for each sequence, in order."""

    teacher: str
    student: str
    sequences: tuple[SequenceFidelity, ...]

    @property
    def scored_tokens(self) -> int:
        return sum(sequence.scored_tokens for sequence in self.sequences)


def measure_fidelity(
    teacher: RowLogits,
    student: RowLogits,
    sequences: Sequence[TokenSequence],
    *,
    names: tuple[str, str] = ("teacher", "student"),
    sequences_per_chunk: int = 32,
    rows_per_chunk: int = 256,
) -> FidelitySums:
    """Compares both models on every scored row of `sequences`; memory is bounded by the two chunk sizes, which change nothing else.

    Raises VocabularyError where the two widths differ, DivergedError where a model gives NaN.
    """
    results: list[SequenceFidelity] = []
    for start in range(0, len(sequences), sequences_per_chunk):
        chunk = sequences[start : start + sequences_per_chunk]
        counts = [len(sequence.scored_rows) for sequence in chunk]
        if sum(counts) == 0:
            results += [SequenceFidelity(scored_tokens=0, forward_kl_nats=0.0, agreements=0, acceptance=0.0) for _ in chunk]
            continue
        with torch.inference_mode():
            rows_R3 = _compare(teacher(chunk), student(chunk), sum(counts), rows_per_chunk)
        for count, part in zip(counts, torch.split(rows_R3, counts), strict=True):
            kl, agreements, acceptance = part.sum(0).tolist()
            results.append(SequenceFidelity(scored_tokens=count, forward_kl_nats=kl, agreements=round(agreements), acceptance=acceptance))
    return FidelitySums(teacher=names[0], student=names[1], sequences=tuple(results))


def _compare(teacher_RV: torch.Tensor, student_RV: torch.Tensor, rows: int, rows_per_chunk: int) -> torch.Tensor:
    """R x 3 on the CPU: forward KL, agreement, acceptance of each row."""
    if teacher_RV.shape != student_RV.shape:
        raise VocabularyError(
            "vocabulary-mismatch",
            found=f"rows of {tuple(teacher_RV.shape)} from the teacher and {tuple(student_RV.shape)} from the student",
            expected="the same rows over the same tokens",
            do="Compare models with one vocabulary, each cut to its real tokens.",
        )
    assert teacher_RV.shape[0] == rows, f"{teacher_RV.shape[0]} rows given for {rows} scored rows"
    for who, logits_RV in (("teacher", teacher_RV), ("student", student_RV)):
        if bool(logits_RV.isnan().any()):
            raise DivergedError("diverged", found=f"NaN among the {who}'s logits", do="Train again with a lower learning rate, or in float32.")
    chunks = zip(torch.split(teacher_RV, rows_per_chunk), torch.split(student_RV, rows_per_chunk), strict=True)
    return torch.cat([compare_rows(teacher_chunk_RV, student_chunk_RV) for teacher_chunk_RV, student_chunk_RV in chunks])


def compare_rows(teacher_RV: torch.Tensor, student_RV: torch.Tensor) -> torch.Tensor:
    """R x 3, float64, on the CPU: KL(teacher || student) in nats, 1 where the most probable tokens agree, and sum over v of min(p, q).

    The last is the probability that speculative sampling accepts a token drafted by the student (Leviathan et al. 2023, Theorem 3.5).
    KL is infinite where the student excludes a token that the teacher may say.
    """
    teacher_log_RV, student_log_RV = (torch.log_softmax(_float64(logits_RV), dim=-1) for logits_RV in (teacher_RV, student_RV))
    teacher_p_RV = teacher_log_RV.exp()
    nats_RV = torch.where(teacher_p_RV > 0, teacher_p_RV * (teacher_log_RV - student_log_RV), 0.0)
    agrees_R = teacher_log_RV.argmax(-1) == student_log_RV.argmax(-1)
    accepted_R = torch.minimum(teacher_p_RV, student_log_RV.exp()).sum(-1)
    return torch.stack([nats_RV.sum(-1), agrees_R.double(), accepted_R], dim=-1).cpu()


def _float64(logits: torch.Tensor) -> torch.Tensor:
    """Apple's mps has no float64."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()


def forward_kl(sums: FidelitySums, *, resamples: int, seed: int) -> Interval | Absence:
    """Mean KL(teacher || student) in nats per scored token. Absent where it is infinite."""
    totals = [sequence.forward_kl_nats for sequence in sums.sequences]
    if not all(map(math.isfinite, totals)):
        return Absence(absent="infinite: the student gives probability 0 to a token that the teacher may say")
    return _per_token(sums, totals, resamples, seed)


def top1_agreement(sums: FidelitySums, *, resamples: int, seed: int) -> Interval | Absence:
    """Share of scored rows on which both have the same most probable token."""
    return _per_token(sums, [float(sequence.agreements) for sequence in sums.sequences], resamples, seed)


def acceptance(sums: FidelitySums, *, resamples: int, seed: int) -> Interval | Absence:
    """Mean of 1 - total variation: the expected acceptance when the student drafts for the teacher at temperature 1."""
    return _per_token(sums, [sequence.acceptance for sequence in sums.sequences], resamples, seed)


def _per_token(sums: FidelitySums, totals: Sequence[float], resamples: int, seed: int) -> Interval | Absence:
    """Sum over scored tokens; its interval draws whole sequences, and the interval's n counts those that have scored tokens."""
    pairs = [(total, sequence.scored_tokens) for total, sequence in zip(totals, sums.sequences, strict=True) if sequence.scored_tokens]
    columns = {"total": [total for total, _ in pairs], "tokens": [float(tokens) for _, tokens in pairs]}
    interval = paired_statistic_interval(columns, lambda means: means["total"] / means["tokens"], resamples=resamples, seed=seed)
    return interval or Absence(absent="there are no scored tokens")
