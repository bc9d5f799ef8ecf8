"""Fidelity against sums written out in fp64, the theorem of speculative sampling, and the coverage of its intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.core.errors import DivergedError, VocabularyError
from stillroom.core.identities import TokenSequence
from stillroom.core.statistics import Interval
from stillroom.evals.fidelity import FidelitySums, RowLogits, SequenceFidelity, acceptance, compare_rows, forward_kl, measure_fidelity, top1_agreement
from stillroom.evals.measured import Absence

VOCABULARY = 11


def sequences_of(answers: Sequence[int]) -> list[TokenSequence]:
    """One sequence for each answer length; the first token tells the sequences apart."""
    return [TokenSequence(ids=(index, *range(length + 2)), answer_spans=((3, 3 + length),)) for index, length in enumerate(answers)]


def lookup(seed: int, spread: float = 2.0, dtype: torch.dtype = torch.float32) -> RowLogits:
    """A model whose logits depend on the sequence and the row alone, as a real one's do."""

    def logits(sequences: Sequence[TokenSequence]) -> torch.Tensor:
        rows = [
            np.random.default_rng([seed, sequence.ids[0], row]).normal(scale=spread, size=VOCABULARY)
            for sequence in sequences
            for row in sequence.scored_rows
        ]
        return torch.tensor(np.array(rows)).to(dtype)

    return logits


def oracle(teacher: torch.Tensor, student: torch.Tensor) -> tuple[float, int, float]:
    """Sums over rows of KL, agreement and acceptance, one probability at a time."""
    kl, agreements, accepted = 0.0, 0, 0.0
    for teacher_row, student_row in zip(teacher.double().tolist(), student.double().tolist(), strict=True):
        p, q = (softmax(row) for row in (teacher_row, student_row))
        kl += math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        agreements += p.index(max(p)) == q.index(max(q))
        accepted += 1.0 - 0.5 * math.fsum(abs(a - b) for a, b in zip(p, q, strict=True))
    return kl, agreements, accepted


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(value - top) for value in row]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_equal_the_oracle_for_each_sequence(dtype: torch.dtype) -> None:
    teacher, student = lookup(1, dtype=dtype), lookup(2, dtype=dtype)
    sequences = sequences_of([3, 1, 0, 5, 2])
    sums = measure_fidelity(teacher, student, sequences, sequences_per_chunk=2, rows_per_chunk=2)
    assert [sequence.scored_tokens for sequence in sums.sequences] == [3, 1, 0, 5, 2]
    for sequence, found in zip(sequences, sums.sequences, strict=True):
        if sequence.scored_rows:
            kl, agreements, accepted = oracle(teacher([sequence]), student([sequence]))
            assert found.forward_kl_nats == pytest.approx(kl, rel=1e-12)
            assert found.agreements == agreements
            assert found.acceptance == pytest.approx(accepted, rel=1e-12)
        else:
            assert found == SequenceFidelity(scored_tokens=0, forward_kl_nats=0.0, agreements=0, acceptance=0.0)


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=9), sequences=st.integers(1, 10), rows=st.integers(1, 9))
@settings(deadline=None, max_examples=25)
def test_chunks_change_nothing(lengths: list[int], sequences: int, rows: int) -> None:
    whole = measure_fidelity(lookup(3), lookup(4), sequences_of(lengths), sequences_per_chunk=1000, rows_per_chunk=1000)
    parts = measure_fidelity(lookup(3), lookup(4), sequences_of(lengths), sequences_per_chunk=sequences, rows_per_chunk=rows)
    for one, other in zip(whole.sequences, parts.sequences, strict=True):
        assert (one.scored_tokens, one.agreements) == (other.scored_tokens, other.agreements)
        assert one.forward_kl_nats == pytest.approx(other.forward_kl_nats, rel=1e-12)
        assert one.acceptance == pytest.approx(other.acceptance, rel=1e-12)


def test_log_probabilities_do_as_well_as_logits() -> None:
    logits, shifted = lookup(5)(sequences_of([40])), lookup(6)(sequences_of([40])) + 7.0
    as_log_probs = compare_rows(logits.double().log_softmax(-1), shifted.double().log_softmax(-1))
    torch.testing.assert_close(compare_rows(logits, shifted), as_log_probs, rtol=1e-9, atol=1e-12)


def test_a_model_is_wholly_faithful_to_itself() -> None:
    logits_RV = lookup(7)(sequences_of([30]))
    rows_R3 = compare_rows(logits_RV, logits_RV)
    assert rows_R3[:, 0].tolist() == [0.0] * 30
    assert rows_R3[:, 1].tolist() == [1.0] * 30
    torch.testing.assert_close(rows_R3[:, 2], torch.ones(30, dtype=torch.float64), rtol=0, atol=1e-14)


def test_pinsker_bounds_total_variation_by_kl() -> None:
    rows_R3 = compare_rows(lookup(8)(sequences_of([300])), lookup(9)(sequences_of([300])))
    assert bool(((1.0 - rows_R3[:, 2]) <= (rows_R3[:, 0] / 2.0).sqrt()).all())


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_acceptance_is_the_rate_of_speculative_sampling(spread: float) -> None:
    """The student drafts, the teacher accepts a draft x with probability min(1, p(x) / q(x)); 400,000 drafts at four standard errors."""
    teacher_RV, student_RV = lookup(10, spread)(sequences_of([20])), lookup(11, spread)(sequences_of([20]))
    p_RV, q_RV = (logits_RV.double().softmax(-1).numpy() for logits_RV in (teacher_RV, student_RV))
    generator = np.random.default_rng(0)
    drafts, accepted = 20_000, []
    for p_V, q_V in zip(p_RV, q_RV, strict=True):
        drafted = generator.choice(VOCABULARY, size=drafts, p=q_V / q_V.sum())
        accepted.append(generator.random(drafts) * q_V[drafted] < p_V[drafted])
    rates = np.array(accepted).mean(axis=1)
    expected_R = compare_rows(teacher_RV, student_RV)[:, 2].numpy()
    error_R = np.sqrt(expected_R * (1 - expected_R) / drafts)
    assert abs(rates.mean() - expected_R.mean()) < 4 * np.sqrt((error_R**2).sum()) / len(error_R)
    assert (np.abs(rates - expected_R) < 5 * error_R + 1e-9).all()


def test_excluded_tokens() -> None:
    teacher = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 1.0, -math.inf]])
    student = torch.tensor([[0.0, 1.0, -math.inf], [0.0, -math.inf, 0.0]])
    rows_R3 = compare_rows(teacher, student)
    assert rows_R3[0].tolist() == pytest.approx([0.0, 1.0, 1.0])
    assert rows_R3[1].tolist() == pytest.approx([math.inf, 0.0, 1 / (1 + math.e)])


def test_ties_go_to_the_lowest_id() -> None:
    rows_R3 = compare_rows(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 2.0]]))
    assert rows_R3[0, 1] == 1.0


def test_models_of_two_vocabularies_are_not_compared() -> None:
    wider: RowLogits = lambda sequences: torch.nn.functional.pad(lookup(1)(sequences), (0, 1))  # noqa: E731
    with pytest.raises(VocabularyError):
        measure_fidelity(lookup(1), wider, sequences_of([2]))


def test_nan_is_an_error_and_not_a_number() -> None:
    broken: RowLogits = lambda sequences: lookup(1)(sequences) * math.nan  # noqa: E731
    with pytest.raises(DivergedError, match="student"):
        measure_fidelity(lookup(1), broken, sequences_of([2]))


def test_numbers_are_means_over_tokens() -> None:
    sums = measure_fidelity(lookup(12), lookup(13), sequences_of([9, 1, 4, 0, 6]))
    kl, agreements, accepted = oracle(lookup(12)(sequences_of([9, 1, 4, 0, 6])), lookup(13)(sequences_of([9, 1, 4, 0, 6])))
    for found, total in ((forward_kl, kl), (top1_agreement, agreements), (acceptance, accepted)):
        interval = found(sums, resamples=200, seed=0)
        assert isinstance(interval, Interval)
        assert interval.value == pytest.approx(total / 20, rel=1e-12)
        assert interval.low <= interval.value <= interval.high
        assert interval.n == 4  # sequences with scored tokens
    assert sums.scored_tokens == 20


def test_an_infinite_divergence_is_absent_with_its_reason_and_survives_json() -> None:
    sums = FidelitySums(
        teacher="t", student="s", sequences=(SequenceFidelity(scored_tokens=2, forward_kl_nats=math.inf, agreements=1, acceptance=0.5),) * 3
    )
    assert FidelitySums.model_validate_json(sums.model_dump_json()) == sums
    absent = forward_kl(sums, resamples=200, seed=0)
    assert isinstance(absent, Absence)
    assert "infinite" in absent.absent
    assert isinstance(acceptance(sums, resamples=200, seed=0), Interval)


def test_nothing_scored_is_absent() -> None:
    sums = measure_fidelity(lookup(1), lookup(2), sequences_of([0, 0]))
    for found in (forward_kl, top1_agreement, acceptance):
        assert isinstance(found(sums, resamples=200, seed=0), Absence)


def test_intervals_cover_where_tokens_of_a_sequence_are_alike() -> None:
    """Every token of an answer agrees or none does, answers of unequal length: the interval must be one over answers, near 95 % coverage."""
    generator = np.random.default_rng(1)
    truth, covered, studies = 0.7, 0, 200
    for study in range(studies):
        lengths = generator.integers(1, 20, size=60)
        agrees = generator.random(60) < truth
        entries = tuple(
            SequenceFidelity(scored_tokens=int(length), forward_kl_nats=0.0, agreements=int(length) * bool(agree), acceptance=0.0)
            for length, agree in zip(lengths, agrees, strict=True)
        )
        interval = top1_agreement(FidelitySums(teacher="t", student="s", sequences=entries), resamples=300, seed=study)
        assert isinstance(interval, Interval)
        covered += interval.low <= truth <= interval.high
    # Resampling tokens would cover about 40 %.
    assert 0.88 <= covered / studies <= 0.99
