"""Every divergence, from every kind of targets, against its definition in plain float64, finite differences, and what is known of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from numerics import oracle
from stillroom.core.errors import StillroomError
from stillroom.objectives.divergences import (
    DIVERGENCES,
    Divergence,
    alpha_beta,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    teacher_log_probs_RV,
    total_variation,
)
from stillroom.objectives.quantities import LOG_OF_ZERO
from stillroom.objectives.tensors import as_arrays, as_tensors
from stillroom.targets.codecs import from_bfloat16, to_bfloat16
from stillroom.targets.kinds import (
    TARGET_KINDS,
    DrawnTargets,
    FullTargets,
    HiddenTargets,
    Targets,
    TeacherHead,
    TextTargets,
    TopKTargets,
)

PAIRS: dict[str, tuple[Divergence, Callable[[list[float], list[float]], float]]] = {
    "forward_kl": (forward_kl(), oracle.forward_kl),
    "reverse_kl": (reverse_kl(), oracle.reverse_kl),
    "jsd 0.5": (generalized_jsd(0.5), lambda p, q: oracle.generalized_jsd(p, q, 0.5)),
    "jsd 0.1": (generalized_jsd(0.1), lambda p, q: oracle.generalized_jsd(p, q, 0.1)),
    "jsd 0.9": (generalized_jsd(0.9), lambda p, q: oracle.generalized_jsd(p, q, 0.9)),
    "skew forward 0.1": (skew_forward_kl(0.1), lambda p, q: oracle.skew_forward_kl(p, q, 0.1)),
    "skew forward 0.7": (skew_forward_kl(0.7), lambda p, q: oracle.skew_forward_kl(p, q, 0.7)),
    "skew reverse 0.1": (skew_reverse_kl(0.1), lambda p, q: oracle.skew_reverse_kl(p, q, 0.1)),
    "skew reverse 0.7": (skew_reverse_kl(0.7), lambda p, q: oracle.skew_reverse_kl(p, q, 0.7)),
    "total variation": (total_variation(), oracle.total_variation),
    "alpha-beta .5 .5": (alpha_beta(0.5, 0.5), lambda p, q: oracle.alpha_beta(p, q, 0.5, 0.5)),
    "alpha-beta .2 .7": (alpha_beta(0.2, 0.7), lambda p, q: oracle.alpha_beta(p, q, 0.2, 0.7)),
    "alpha-beta .6 0": (alpha_beta(0.6, 0.0), lambda p, q: oracle.alpha_beta(p, q, 0.6, 0.0)),
    "alpha-beta 0 .8": (alpha_beta(0.0, 0.8), lambda p, q: oracle.alpha_beta(p, q, 0.0, 0.8)),
    "alpha-beta 1 .5": (alpha_beta(1.0, 0.5), lambda p, q: oracle.alpha_beta(p, q, 1.0, 0.5)),
}
EACH = pytest.mark.parametrize("name", PAIRS)
# Those that accept top_k: alpha-beta with alpha + beta above 1 does not.
SPARSE = pytest.mark.parametrize("name", [name for name, (divergence, _) in PAIRS.items() if "top_k" in divergence.kinds])
F_DIVERGENCES = pytest.mark.parametrize("name", [name for name in PAIRS if not name.startswith("alpha-beta") or name == "alpha-beta .5 .5"])
EACH_KIND = pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, (divergence, _) in PAIRS.items() for kind in ("full", "hidden", "top_k") if kind in divergence.kinds]
)
TEMPERATURES = pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])


@dataclass(frozen=True)
class Case:
    """A teacher's logits and a student's, and targets of a kind made from the former at a temperature."""

    teacher_RV: numpy.ndarray
    student_RV: numpy.ndarray
    targets: Targets
    temperature: float

    def expected_R(self, quantity: Callable[[list[float], list[float]], float]) -> list[float]:
        values = []
        for row in range(len(self.teacher_RV)):
            p, q = (oracle.softmax(logits[row].tolist(), self.temperature) for logits in (self.teacher_RV, self.student_RV))
            if isinstance(self.targets, TopKTargets):
                kept = numpy.asarray(self.targets.ids_RK)[row].tolist()
                p, q = oracle.coarsen(p, kept), oracle.coarsen(q, kept)
            values.append(quantity(p, q))
        return values


def full(teacher_RV: numpy.ndarray, temperature: float) -> FullTargets:
    log_probs = [[math.log(p) for p in oracle.softmax(row.tolist(), temperature)] for row in teacher_RV]
    return FullTargets(vocabulary="v", temperature=temperature, log_probs_RV=torch.tensor(log_probs, dtype=torch.float64).reshape(teacher_RV.shape))


def top_k(teacher_RV: numpy.ndarray, temperature: float, k: int) -> TopKTargets:
    ids_RK = numpy.argsort(-teacher_RV, axis=1, kind="stable")[:, :k].astype(numpy.int32)
    buckets = [oracle.coarsen(oracle.softmax(row.tolist(), temperature), ids.tolist()) for row, ids in zip(teacher_RV, ids_RK, strict=True)]
    logs = [[math.log(p) if p > 0 else -math.inf for p in bucket] for bucket in buckets]
    return TopKTargets(
        vocabulary="v",
        temperature=temperature,
        ids_RK=torch.from_numpy(ids_RK),
        log_probs_RK=torch.tensor([row[:k] for row in logs], dtype=torch.float64),
        tail_log_mass_R=torch.tensor([row[k] if len(row) > k else -math.inf for row in logs], dtype=torch.float64),
    )


def make(kind: str, *, rows: int = 5, size: int = 13, k: int = 4, temperature: float = 1.0, spread: float = 3.0, seed: int = 0) -> Case:
    rng = numpy.random.default_rng(seed)
    student_RV = spread * rng.normal(size=(rows, size))
    if kind == "hidden":
        states_RD, weight_VD, bias_V = rng.normal(size=(rows, 6)), rng.normal(size=(size, 6)), rng.normal(size=size)
        teacher_RV = numpy.array(oracle.head(states_RD, weight_VD, bias_V, scale=0.7, softcap=5.0))
        head = TeacherHead(weight_VD=torch.from_numpy(weight_VD), bias_V=torch.from_numpy(bias_V), scale=0.7, softcap=5.0)
        # States say nothing of temperature: what they were made at does not matter.
        return Case(
            teacher_RV, student_RV, HiddenTargets(vocabulary="v", temperature=1.0, states_RD=torch.from_numpy(states_RD), head=head), temperature
        )
    teacher_RV = spread * rng.normal(size=(rows, size))
    targets = full(teacher_RV, temperature) if kind == "full" else top_k(teacher_RV, temperature, k)
    return Case(teacher_RV, student_RV, targets, temperature)


def nats(divergence: Divergence, case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    return divergence.nats(torch.from_numpy(case.student_RV).to(dtype), case.targets, case.temperature)


# -- against the definition --------------------------------------------------------------------------------------------


@EACH_KIND
@TEMPERATURES
def test_value_is_the_definition(name: str, kind: str, temperature: float) -> None:
    divergence, quantity = PAIRS[name]
    case = make(kind, temperature=temperature)
    expected_R = case.expected_R(quantity)
    assert nats(divergence, case).tolist() == pytest.approx(expected_R, rel=1e-9, abs=1e-12)
    assert nats(divergence, case, torch.float32).tolist() == pytest.approx(expected_R, rel=1e-5, abs=1e-6)


@EACH_KIND
@TEMPERATURES
def test_gradient_is_that_of_the_value(name: str, kind: str, temperature: float) -> None:
    divergence, _ = PAIRS[name]
    case = make(kind, rows=3, size=7, k=3, temperature=temperature)
    student_RV = torch.from_numpy(case.student_RV).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: divergence.nats(logits, case.targets, temperature), student_RV)


@EACH_KIND
@TEMPERATURES
def test_gradient_in_float32_is_that_of_the_oracle(name: str, kind: str, temperature: float) -> None:
    """Central differences of the oracle itself, which shares nothing with the code."""
    divergence, quantity = PAIRS[name]
    case = make(kind, rows=2, size=6, k=3, temperature=temperature)
    student_RV = torch.from_numpy(case.student_RV).float().requires_grad_()
    divergence.nats(student_RV, case.targets, temperature).sum().backward()
    assert student_RV.grad is not None
    step = 1e-5
    for row, column in numpy.ndindex(case.student_RV.shape):
        values = []
        for sign in (1, -1):
            moved = case.student_RV.copy()
            moved[row, column] += sign * step
            values.append(replace(case, student_RV=moved).expected_R(quantity)[row])
        assert student_RV.grad[row, column].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=2e-6)


@EACH_KIND
@TEMPERATURES
def test_zero_value_and_gradient_at_equality(name: str, kind: str, temperature: float) -> None:
    divergence, _ = PAIRS[name]
    case = make(kind, temperature=temperature)
    # Logits are free up to a constant for each row.
    shift_R1 = numpy.linspace(-30, 30, len(case.teacher_RV))[:, None]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        student_RV = torch.from_numpy(case.teacher_RV + shift_R1).to(dtype).requires_grad_()
        value_R = divergence.nats(student_RV, case.targets, temperature)
        value_R.sum().backward()
        assert student_RV.grad is not None
        assert value_R.abs().max().item() < tolerance
        assert student_RV.grad.abs().max().item() < tolerance


def test_cross_entropy_is_the_definition_at_temperature_one() -> None:
    case = make("full")
    tokens = [0, 12, 3, 3, 7]
    targets = TextTargets(vocabulary="v", token_ids_R=torch.tensor(tokens))
    expected_R = [oracle.cross_entropy(token, oracle.softmax(row.tolist())) for token, row in zip(tokens, case.student_RV, strict=True)]
    for match_temperature in (1.0, 4.0):
        value_R = cross_entropy().nats(torch.from_numpy(case.student_RV), targets, match_temperature)
        assert value_R.tolist() == pytest.approx(expected_R, rel=1e-10)
    assert torch.autograd.gradcheck(lambda logits: cross_entropy().nats(logits, targets, 1.0), torch.from_numpy(case.student_RV).requires_grad_())


def test_cross_entropy_is_forward_kl_from_the_one_hot_distribution() -> None:
    student_RV = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([0, 8, 4, 4])
    one_hot = FullTargets(vocabulary="v", temperature=1.0, log_probs_RV=torch.nn.functional.one_hot(tokens, 9).double().log())
    text = TextTargets(vocabulary="v", token_ids_R=tokens)
    results = []
    for divergence, targets in ((cross_entropy(), text), (forward_kl(), one_hot)):
        logits = student_RV.clone().requires_grad_()
        value_R = divergence.nats(logits, targets, 1.0)
        value_R.sum().backward()
        results.append((value_R.detach(), logits.grad))
    torch.testing.assert_close(results[0], results[1])


# -- the tail bucket ----------------------------------------------------------------------------------------------------


@SPARSE
def test_tail_bucket_never_exceeds_the_whole_and_grows_to_it(name: str) -> None:
    """The data-processing inequality (for alpha-beta with alpha + beta < 1: subadditivity), along a chain of ever finer partitions."""
    divergence, quantity = PAIRS[name]
    whole = make("full", size=11)
    exact_R = numpy.array(whole.expected_R(quantity))
    before_R = numpy.zeros_like(exact_R)
    for k in range(1, 12):
        case = Case(whole.teacher_RV, whole.student_RV, top_k(whole.teacher_RV, 1.0, k), 1.0)
        value_R = nats(divergence, case).numpy()
        assert (value_R <= exact_R + 1e-12).all()
        assert (value_R >= before_R - 1e-12).all()
        before_R = value_R
    assert before_R.tolist() == pytest.approx(exact_R.tolist(), rel=1e-9)


@F_DIVERGENCES
def test_tail_bucket_is_exact_where_both_share_the_tail_out_alike(name: str) -> None:
    divergence, quantity = PAIRS[name]
    rng = numpy.random.default_rng(3)
    teacher_RV = numpy.sort(rng.normal(size=(4, 9)), axis=1)[:, ::-1].copy()
    student_RV = teacher_RV + 0.0
    student_RV[:, :3] += rng.normal(size=(4, 3))  # kept ids differ; the others keep their ratios
    case = Case(teacher_RV, student_RV, top_k(teacher_RV, 1.0, 3), 1.0)
    exact_R = Case(teacher_RV, student_RV, full(teacher_RV, 1.0), 1.0).expected_R(quantity)
    assert nats(divergence, case).tolist() == pytest.approx(exact_R, rel=1e-9)


@SPARSE
@pytest.mark.parametrize("k", [4, 7])
def test_tail_of_mass_zero(name: str, k: int) -> None:
    """K = V, and a teacher that gives exactly nothing to what was not kept: finite values and gradients, as defined."""
    divergence, quantity = PAIRS[name]
    base = make("full", rows=3, size=7)
    order = numpy.argsort(-base.teacher_RV, axis=1)[:, :k]
    kept = numpy.take_along_axis(base.teacher_RV, order, axis=1)
    log_probs = numpy.array([[math.log(p) for p in oracle.softmax(row.tolist())] for row in kept])
    targets = TopKTargets(
        vocabulary="v",
        temperature=1.0,
        ids_RK=torch.from_numpy(order.astype(numpy.int32)),
        log_probs_RK=torch.from_numpy(log_probs),
        tail_log_mass_R=torch.full((3,), -math.inf),
    )
    expected_R = []
    for row in range(3):
        p = [*numpy.exp(log_probs[row]).tolist(), *([0.0] if k < 7 else [])]
        q = oracle.coarsen(oracle.softmax(base.student_RV[row].tolist()), order[row].tolist())
        expected_R.append(quantity(p, q))
    student_RV = torch.from_numpy(base.student_RV).requires_grad_()
    value_R = divergence.nats(student_RV, targets, 1.0)
    assert value_R.tolist() == pytest.approx(expected_R, rel=1e-9)
    assert torch.autograd.gradcheck(lambda logits: divergence.nats(logits, targets, 1.0), student_RV)


def test_a_confident_students_tail_does_not_cancel() -> None:
    """1 - sum(kept) is 0 in float32 here, its logarithm -inf; the sum over the other ids is exact."""
    student_RV = torch.tensor([[40.0, 0.0, 0.0, 0.0]])
    targets = top_k(numpy.array([[2.0, 1.0, 1.0, 1.0]]), 1.0, 1)
    expected = oracle.forward_kl(
        oracle.coarsen(oracle.softmax([2.0, 1.0, 1.0, 1.0]), [0]),
        oracle.coarsen(oracle.softmax([40.0, 0.0, 0.0, 0.0]), [0]),
    )
    assert forward_kl().nats(student_RV, targets, 1.0).item() == pytest.approx(expected, rel=1e-6)


@EACH
def test_a_teacher_of_zeros(name: str) -> None:
    """What the teacher rules out (a masked token) is finite for all: by definition, and where that is infinite by LOG_OF_ZERO."""
    divergence, quantity = PAIRS[name]
    log_probs_RV = torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]).log()
    student_RV = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 4.0]], requires_grad=True)
    value_R = divergence.nats(student_RV, FullTargets(vocabulary="v", temperature=1.0, log_probs_RV=log_probs_RV), 1.0)
    value_R.sum().backward()
    expected_R = [quantity(p, oracle.softmax(q)) for p, q in (([0.75, 0.25, 0.0], [1.0, 2.0, 3.0]), ([1.0, 0.0, 0.0], [0.0, -1.0, 4.0]))]
    assert value_R.tolist() == pytest.approx(expected_R, rel=1e-5)
    assert student_RV.grad is not None
    assert student_RV.grad.isfinite().all()
    assert (student_RV.grad[:, 2] > 0).all(), "descent lowers what the teacher rules out"
    assert LOG_OF_ZERO == oracle.LOG_OF_ZERO


# -- what the tail hides, at most -----------------------------------------------------------------------------------------


def binary_entropy(share: float) -> float:
    return -math.fsum(x * math.log(x) for x in (share, 1 - share) if x > 0)


def jsd_tail(w: float) -> Callable[[float, float, int], float]:
    return lambda p, q, n: (w * p + (1 - w) * q) * binary_entropy(w * p / (w * p + (1 - w) * q))


def skew_forward_tail(a: float) -> Callable[[float, float, int], float]:
    return lambda p, q, n: p * math.log((a * p + (1 - a) * q) / (a * p))


def skew_reverse_tail(a: float) -> Callable[[float, float, int], float]:
    return lambda p, q, n: q * math.log(((1 - a) * p + a * q) / (a * q))


def alpha_beta_tail(a: float, b: float) -> Callable[[float, float, int], float]:
    s = a + b
    return lambda p, q, n: n ** (1 - s) * (p**s / (b * s) + q**s / (a * s))


# By how much the full divergence may exceed what is computed, as the docstrings have it: from the tails' masses and the number of ids in it.
TAILS: dict[str, Callable[[float, float, int], float]] = {
    "jsd 0.5": jsd_tail(0.5),
    "jsd 0.1": jsd_tail(0.1),
    "jsd 0.9": jsd_tail(0.9),
    "skew forward 0.1": skew_forward_tail(0.1),
    "skew forward 0.7": skew_forward_tail(0.7),
    "skew reverse 0.1": skew_reverse_tail(0.1),
    "skew reverse 0.7": skew_reverse_tail(0.7),
    "total variation": lambda p, q, n: min(p, q),
    "alpha-beta .5 .5": alpha_beta_tail(0.5, 0.5),
    "alpha-beta .2 .7": alpha_beta_tail(0.2, 0.7),
}


@pytest.mark.parametrize("name", TAILS)
@given(st.integers(0, 10_000), st.integers(1, 10), st.sampled_from([0.3, 2.0, 8.0]))
@settings(max_examples=60)
def test_the_tail_hides_no_more_than_is_stated(name: str, seed: int, k: int, spread: float) -> None:
    divergence, quantity = PAIRS[name]
    whole = make("full", rows=3, size=11, spread=spread, seed=seed)
    exact_R = numpy.array(whole.expected_R(quantity))
    value_R = nats(divergence, Case(whole.teacher_RV, whole.student_RV, top_k(whole.teacher_RV, 1.0, k), 1.0)).numpy()
    for row, hidden in enumerate(exact_R - value_R):
        kept = numpy.argsort(-whole.teacher_RV[row], kind="stable")[:k]
        p, q = (1 - math.fsum(numpy.array(oracle.softmax(logits[row].tolist()))[kept]) for logits in (whole.teacher_RV, whole.student_RV))
        assert hidden <= TAILS[name](max(p, 1e-300), max(q, 1e-300), 11 - k) + 1e-9


@pytest.mark.parametrize("name", ["jsd 0.5", "skew forward 0.1", "skew reverse 0.1", "total variation"])
def test_the_stated_bound_is_met_where_the_tails_have_nothing_in_common(name: str) -> None:
    divergence, quantity = PAIRS[name]
    teacher_RV, student_RV = numpy.array([[1.0, 0.0, -90.0]]), numpy.array([[0.0, -90.0, 0.4]])
    p, q = (1 - oracle.softmax(logits[0].tolist())[0] for logits in (teacher_RV, student_RV))
    case = Case(teacher_RV, student_RV, top_k(teacher_RV, 1.0, 1), 1.0)
    hidden = replace(case, targets=full(teacher_RV, 1.0)).expected_R(quantity)[0] - nats(divergence, case).item()
    assert hidden == pytest.approx(TAILS[name](p, q, 2), rel=1e-9)


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 10_000))
@settings(max_examples=200)
def test_alpha_beta_with_a_sum_of_at_most_one_never_grows_when_buckets_are_merged(share: float, s: float, seed: int) -> None:
    """What docs/concepts.md proves, over the whole range of parameters for which top_k is accepted."""
    s = max(s, 0.02)
    alpha, beta = share * s, s - share * s
    alpha, beta = (0.0 if x < 1e-3 else x for x in (alpha, beta))
    divergence = alpha_beta(alpha, beta)
    assert "top_k" in divergence.kinds
    whole = make("full", rows=2, size=8, spread=5.0, seed=seed)
    before_R = torch.zeros(2, dtype=torch.float64)
    for k in range(1, 9):
        value_R = nats(divergence, Case(whole.teacher_RV, whole.student_RV, top_k(whole.teacher_RV, 1.0, k), 1.0))
        assert (value_R >= before_R * (1 - 1e-9) - 1e-9).all()
        before_R = value_R
    torch.testing.assert_close(before_R, nats(divergence, whole), rtol=1e-8, atol=1e-10)


def test_alpha_beta_with_a_sum_above_one_grows_when_buckets_are_merged_and_so_refuses_top_k() -> None:
    """A flat tail of n ids: n^(s - 1) times what it is."""
    n, alpha, beta = 8, 1.0, 0.5
    teacher_RV, student_RV = (numpy.array([[first, *[0.0] * n]]) for first in (1.0, 3.0))
    case = Case(teacher_RV, student_RV, top_k(teacher_RV, 1.0, 1), 1.0)
    exact = replace(case, targets=full(teacher_RV, 1.0))
    head = oracle.alpha_beta(*([oracle.softmax(logits[0].tolist())[0]] for logits in (teacher_RV, student_RV)), alpha, beta)
    merged, whole = (nats(alpha_beta(alpha, beta), one).item() for one in (case, exact))
    assert (merged - head) / (whole - head) == pytest.approx(n ** (alpha + beta - 1), rel=1e-9)
    assert alpha_beta(alpha, beta).kinds == ("full", "hidden")
    assert "top_k" in alpha_beta(0.7, 0.3).kinds
    with pytest.raises(StillroomError, match="full or hidden"):
        alpha_beta(alpha, beta).check("top_k", 1.0, 1.0)


# -- what is known of alpha-beta, skew and total variation ---------------------------------------------------------------


def test_alpha_beta_has_the_others_among_its_cases() -> None:
    case = make("full")
    p_RV, q_RV = (torch.from_numpy(logits).softmax(-1) for logits in (case.teacher_RV, case.student_RV))
    expected = {
        (1.0, 0.0): nats(forward_kl(), case),
        (0.0, 1.0): nats(reverse_kl(), case),
        (0.5, 0.5): 4 * (1 - (p_RV * q_RV).sqrt().sum(-1)),
        (1.0, 1.0): 0.5 * (p_RV - q_RV).square().sum(-1),
    }
    for (alpha, beta), value_R in expected.items():
        torch.testing.assert_close(nats(alpha_beta(alpha, beta), case), value_R, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.0), (0.0, 0.6), (1.0, 0.0), (0.0, 1.0)])
def test_alpha_beta_is_continuous_where_its_formula_divides_by_zero(alpha: float, beta: float) -> None:
    """In float32 too, in which the formula as it is printed would have lost every digit at 1e-7."""
    case = make("full")
    at_R = nats(alpha_beta(alpha, beta), case)
    for small in (1e-4, 1e-7):
        near = alpha_beta(alpha or small, beta or small)
        if small == 1e-4:  # small enough to be near, and not so small that the oracle has lost its digits
            expected_R = case.expected_R(lambda p, q: oracle.alpha_beta(p, q, alpha or 1e-4, beta or 1e-4))
            assert nats(near, case).tolist() == pytest.approx(expected_R, rel=1e-8)
        torch.testing.assert_close(nats(near, case), at_R, rtol=20 * small, atol=0)
        torch.testing.assert_close(nats(near, case, torch.float32).double(), nats(near, case), rtol=1e-5, atol=0)


@given(st.floats(0.05, 2.0), st.floats(0.05, 2.0), st.integers(0, 10_000))
@settings(max_examples=50)
def test_alpha_beta_is_no_less_than_zero_and_symmetric_under_exchange(alpha: float, beta: float, seed: int) -> None:
    case = make("full", seed=seed)
    swapped = Case(case.student_RV, case.teacher_RV, full(case.student_RV, 1.0), 1.0)
    value_R = nats(alpha_beta(alpha, beta), case)
    assert (value_R >= 0).all()
    torch.testing.assert_close(value_R, nats(alpha_beta(beta, alpha), swapped), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), [(-0.1, 0.5), (0.5, -0.1), (0.0, 0.0), (math.nan, 0.5), (math.inf, 0.5), (1.0, -1.0)])
def test_alpha_beta_refuses_what_a_vocabulary_cannot_bear(alpha: float, beta: float) -> None:
    with pytest.raises(StillroomError, match="alpha_beta with alpha") as caught:
        alpha_beta(alpha, beta)
    assert caught.value.code == "recipe-invalid"


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
@settings(max_examples=50)
def test_generalized_jsd_is_made_of_the_two_skew_divergences(seed: int, weight: float) -> None:
    case = make("full", seed=seed)
    made_R = weight * nats(skew_forward_kl(weight), case) + (1 - weight) * nats(skew_reverse_kl(1 - weight), case)
    torch.testing.assert_close(nats(generalized_jsd(weight), case), made_R, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("make_skew", [skew_forward_kl, skew_reverse_kl])
def test_skew_divergences_are_bounded_and_tend_to_what_they_skew(make_skew: Callable[[float], Divergence]) -> None:
    case = make("full", spread=30.0)
    for alpha in (0.1, 0.5, 0.9):
        value_R = nats(make_skew(alpha), case)
        assert (value_R <= -math.log(alpha) + 1e-12).all()
        assert value_R.max().item() > 0.9 * -math.log(alpha), "two models as far apart as can be"
    near, limit = make("full", spread=1.0), forward_kl() if make_skew is skew_forward_kl else reverse_kl()
    torch.testing.assert_close(nats(make_skew(1e-7), near), nats(limit, near), rtol=1e-5, atol=0)
    for alpha in (0.0, 1.0, -0.2, 1.3, math.nan):
        with pytest.raises(StillroomError, match="alpha"):
            make_skew(alpha)


@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 10.0]))
@settings(max_examples=50)
def test_total_variation_is_one_minus_what_is_shared_and_obeys_pinsker(seed: int, spread: float) -> None:
    case = make("full", seed=seed, spread=spread)
    p_RV, q_RV = (torch.from_numpy(logits).softmax(-1) for logits in (case.teacher_RV, case.student_RV))
    value_R = nats(total_variation(), case)
    torch.testing.assert_close(value_R, 1 - torch.minimum(p_RV, q_RV).sum(-1), rtol=1e-10, atol=1e-13)
    assert (value_R**2 <= nats(forward_kl(), case) / 2 + 1e-12).all()


def test_total_variations_slope_is_zero_on_ids_that_are_equal_up_to_rounding_alone() -> None:
    """Ids 0 and 1 agree up to one rounding; ids 2 and 3 differ by a part in a thousand, and are told apart."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    student_RV = (p * torch.tensor([1 + 2**-52, 1 - 2**-52, 1.001, 0.998], dtype=torch.float64)).log().unsqueeze(0).requires_grad_()
    targets = FullTargets(vocabulary="v", temperature=1.0, log_probs_RV=p.log().unsqueeze(0))
    total_variation().nats(student_RV, targets, 1.0).sum().backward()
    slopes = torch.tensor([0.0, 0.0, 0.5, -0.5], dtype=torch.float64)
    q = student_RV.detach().softmax(-1)[0]
    assert student_RV.grad is not None
    torch.testing.assert_close(student_RV.grad[0], q * (slopes - (q * slopes).sum()), rtol=1e-9, atol=1e-12)


# -- ids drawn from the teacher ---------------------------------------------------------------------------------------------


def drawn(counts_RV: numpy.ndarray, teacher_RV: numpy.ndarray, temperature: float = 1.0) -> DrawnTargets:
    """Targets of these counts; every row has as many draws."""
    rows, ids = counts_RV.nonzero()
    p_RV = [oracle.softmax(row.tolist(), temperature) for row in teacher_RV]
    return DrawnTargets(
        vocabulary="v",
        temperature=temperature,
        draws=int(counts_RV[0].sum()),
        offsets_R1=numpy.concatenate([[0], numpy.cumsum((counts_RV > 0).sum(1))]).astype(numpy.int64),
        ids_U=ids.astype(numpy.int32),
        counts_U=counts_RV[rows, ids].astype(numpy.int32),
        entropy_R=numpy.array([-math.fsum(p * math.log(p) for p in row) for row in p_RV]),
    )


@TEMPERATURES
def test_forward_kl_from_drawn_ids_is_the_cross_entropy_of_the_draws_less_the_entropy(temperature: float) -> None:
    case = make("full", rows=6, size=9)
    counts_RV = numpy.stack(
        [numpy.random.default_rng(row).multinomial(20, oracle.softmax(logits.tolist())) for row, logits in enumerate(case.teacher_RV)]
    )
    targets = as_tensors(drawn(counts_RV, case.teacher_RV, temperature), "cpu")
    student_RV = torch.from_numpy(case.student_RV)
    value_R = forward_kl().nats(student_RV, targets, temperature)
    for row, value in enumerate(value_R.tolist()):
        q = oracle.softmax(case.student_RV[row].tolist(), temperature)
        cross = math.fsum(count / 20 * -math.log(q[v]) for v, count in enumerate(counts_RV[row]) if count)
        assert value == pytest.approx(cross - float(targets.entropy_R[row]), rel=1e-10)
    assert torch.autograd.gradcheck(lambda logits: forward_kl().nats(logits, targets, temperature), student_RV.requires_grad_())
    torch.testing.assert_close(forward_kl().nats(student_RV.float(), targets, temperature).double(), value_R, rtol=1e-5, atol=1e-6)


def test_forward_kl_from_drawn_ids_has_the_right_mean_over_all_draws() -> None:
    """Not sampled: every way in which 4 draws can fall on 4 ids, times its probability. Value and gradient."""
    draws, size = 4, 4
    case = make("full", rows=1, size=size)
    p = oracle.softmax(case.teacher_RV[0].tolist())
    ways = [way for way in itertools.product(range(draws + 1), repeat=size) if sum(way) == draws]
    chance_R = torch.tensor([math.factorial(draws) * math.prod(p[v] ** n / math.factorial(n) for v, n in enumerate(way)) for way in ways])
    assert chance_R.sum().item() == pytest.approx(1.0)
    targets = as_tensors(drawn(numpy.array(ways), case.teacher_RV.repeat(len(ways), axis=0)), "cpu")
    found, expected = (torch.from_numpy(case.student_RV).requires_grad_() for _ in range(2))
    mean = (chance_R.double() * forward_kl().nats(found.expand(len(ways), size), targets, 1.0)).sum()
    exact = forward_kl().nats(expected, case.targets, 1.0).sum()
    mean.backward()
    exact.backward()
    assert mean.item() == pytest.approx(exact.item(), rel=1e-6)
    assert found.grad is not None
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-6, atol=1e-7)
    at_equality = torch.from_numpy(case.teacher_RV)
    assert (chance_R.double() * forward_kl().nats(at_equality.expand(len(ways), size), targets, 1.0)).sum().item() == pytest.approx(0.0, abs=1e-7)


def test_drawn_targets_serve_forward_kl_at_the_temperature_they_were_drawn_at_and_nothing_else() -> None:
    forward_kl().check("drawn", 2.0, 2.0)
    with pytest.raises(StillroomError, match="drawn at one temperature") as caught:
        forward_kl().check("drawn", 1.0, 2.0)
    assert "target_temperature to 2" in caught.value.do
    for name, make_divergence in DIVERGENCES.items():
        assert ("drawn" in make_divergence().kinds) == (name == "forward_kl")
        assert "sampled" not in make_divergence().kinds


# -- what is known of generalized JSD ------------------------------------------------------------------------------------


def test_jsd_over_its_weights_tends_to_forward_and_reverse_kl() -> None:
    """The derivative of JSD_w at w = 0 is KL(p || q), at w = 1 minus KL(q || p): JSD_w / (w (1 - w)) tends to them, with an error of order w."""
    case = make("full", spread=1.0)
    for limit, weight_at in ((forward_kl(), lambda small: small), (reverse_kl(), lambda small: 1.0 - small)):
        target_R = nats(limit, case)
        errors = []
        for small in (1e-2, 1e-3, 1e-4):
            weight = weight_at(small)
            errors.append((nats(generalized_jsd(weight), case) / (weight * (1 - weight)) - target_R).abs().max().item())
        assert errors[2] < 1e-3 * target_R.max().item()
        assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.3)
        assert errors[2] / errors[1] == pytest.approx(0.1, rel=0.3)


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=50)
def test_jsd_is_symmetric_under_exchange_and_bounded_by_the_entropy_of_its_weights(seed: int, weight: float) -> None:
    case = make("full", seed=seed, spread=6.0)
    swapped = Case(case.student_RV, case.teacher_RV, full(case.student_RV, 1.0), 1.0)
    value_R = nats(generalized_jsd(weight), case)
    torch.testing.assert_close(value_R, nats(generalized_jsd(1 - weight), swapped), rtol=1e-8, atol=1e-10)
    entropy = -weight * math.log(weight) - (1 - weight) * math.log1p(-weight)
    assert value_R.max().item() <= entropy + 1e-12


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.1, 1.5])
def test_jsd_refuses_weights_at_which_it_is_nothing(weight: float) -> None:
    with pytest.raises(StillroomError, match="weight_on_teacher"):
        generalized_jsd(weight)


# -- temperature ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("made_at", "match"), [(1.0, 2.5), (2.0, 1.0), (0.7, 0.7)])
def test_log_probabilities_made_at_one_temperature_serve_another(made_at: float, match: float) -> None:
    teacher_RV = make("full").teacher_RV
    moved_RV = teacher_log_probs_RV(full(teacher_RV, made_at), match, torch.float64)
    torch.testing.assert_close(moved_RV, full(teacher_RV, match).log_probs_RV, rtol=1e-10, atol=1e-12)


def test_a_zero_stays_zero_at_every_temperature() -> None:
    log_probs_RV = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    moved_RV = teacher_log_probs_RV(FullTargets(vocabulary="v", temperature=1.0, log_probs_RV=log_probs_RV), 3.0, torch.float64)
    assert moved_RV.exp().tolist() == [[pytest.approx(0.5), pytest.approx(0.5), 0.0]]


# -- properties over random shapes and extreme numbers ---------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Case]:
    rows, size = draw(st.integers(0, 5)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["full", "top_k"]))
    temperature = draw(st.sampled_from([0.5, 1.0, 2.0]))
    logits = st.floats(-80, 80, width=32)
    teacher_RV, student_RV = (
        numpy.array(draw(st.lists(logits, min_size=rows * size, max_size=rows * size)), dtype=numpy.float64).reshape(rows, size) for _ in range(2)
    )
    k = draw(st.integers(1, size))
    targets: Targets = full(teacher_RV, temperature)
    if kind == "top_k":
        targets = top_k(teacher_RV, temperature, k) if rows else _no_rows(k, temperature)
    return kind, Case(teacher_RV, student_RV, targets, temperature)


def _no_rows(k: int, temperature: float) -> TopKTargets:
    return TopKTargets(
        vocabulary="v",
        temperature=temperature,
        ids_RK=torch.zeros(0, k, dtype=torch.int32),
        log_probs_RK=torch.zeros(0, k),
        tail_log_mass_R=torch.zeros(0),
    )


@EACH
@given(cases())
@settings(deadline=None, max_examples=60)
def test_extreme_numbers_in_float32(name: str, drawn: tuple[str, Case]) -> None:
    divergence, quantity = PAIRS[name]
    case = drawn[1]
    targets = as_tensors(_in_float32(case.targets), "cpu")
    student_RV = torch.from_numpy(case.student_RV).float().requires_grad_()
    value_R = divergence.nats(student_RV, targets, case.temperature)
    value_R.sum().backward()
    assert student_RV.grad is not None
    assert value_R.shape == (len(case.teacher_RV),)
    assert value_R.isfinite().all()
    assert student_RV.grad.isfinite().all()
    # Gradients of a row sum to zero, since a constant added to its logits changes nothing.
    assert student_RV.grad.sum(dim=-1).abs().max().item() < 1e-3 if len(case.teacher_RV) else True
    assert (value_R >= -1e-4).all()
    assert value_R.tolist() == pytest.approx(case.expected_R(quantity), rel=1e-4, abs=1e-4)


def _in_float32(targets: Targets) -> Targets:
    if isinstance(targets, TopKTargets):
        return replace(targets, log_probs_RK=targets.log_probs_RK.float(), tail_log_mass_R=targets.tail_log_mass_R.float())
    assert isinstance(targets, FullTargets)
    return replace(targets, log_probs_RV=targets.log_probs_RV.float())


# -- what a divergence refuses, at plan time --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_refuses_what_it_cannot_use_and_names_what_would_do(name: str) -> None:
    divergence = DIVERGENCES[name]()
    for kind in TARGET_KINDS:
        if kind in divergence.kinds:
            divergence.check(kind, 1.0, 1.0)
            continue
        with pytest.raises(StillroomError) as caught:
            divergence.check(kind, 1.0, 1.0)
        assert caught.value.code == "targets-unsupported"
        assert all(other in caught.value.do for other in divergence.kinds)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "cross_entropy"])
def test_top_k_serves_the_temperature_it_was_made_at_alone(name: str) -> None:
    divergence = DIVERGENCES[name]()
    divergence.check("top_k", 2.0, 2.0)
    divergence.check("full", 1.0, 2.0)
    divergence.check("hidden", 1.0, 2.0)
    with pytest.raises(StillroomError) as caught:
        divergence.check("top_k", 1.0, 2.0)
    assert caught.value.code == "targets-unsupported"
    assert "target_temperature to 2" in caught.value.do
    assert "full or hidden" in caught.value.do


# -- where targets come from --------------------------------------------------------------------------------------------------


def test_hidden_states_as_bfloat16_bits_are_those_of_torch() -> None:
    states_RD = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) * 10
    stored = to_bfloat16(states_RD.numpy())
    assert (torch.from_numpy(stored).view(torch.bfloat16) == states_RD.bfloat16()).all()
    assert (torch.from_numpy(from_bfloat16(stored)) == states_RD.bfloat16().float()).all()


@EACH
def test_stored_states_give_what_live_states_rounded_alike_give(name: str) -> None:
    divergence, _ = PAIRS[name]
    generator = torch.Generator().manual_seed(2)
    states_RD, weight_VD, student_RV = (torch.randn(*shape, generator=generator) for shape in ((6, 8), (11, 8), (6, 11)))
    live = HiddenTargets(vocabulary="v", temperature=1.0, states_RD=states_RD.bfloat16(), head=TeacherHead(weight_VD=weight_VD))
    stored = replace(live, states_RD=to_bfloat16(states_RD.numpy()), head=TeacherHead(weight_VD=weight_VD.numpy()))
    values = [divergence.nats(student_RV, as_tensors(targets, "cpu"), 1.0) for targets in (live, stored)]
    assert torch.equal(values[0], values[1])


def test_a_head_in_bfloat16_is_widened_for_float64_and_multiplied_with_in_its_own_type_for_float32() -> None:
    """A teacher that computed in bfloat16 is no more exact than such a product: factors and result are each rounded to 2^-9 of themselves."""
    generator = torch.Generator().manual_seed(2)
    states_RD, weight_VD = torch.randn(6, 8, generator=generator), torch.randn(11, 8, generator=generator).bfloat16()
    targets = HiddenTargets(vocabulary="v", temperature=1.0, states_RD=states_RD, head=TeacherHead(weight_VD=weight_VD))
    exact_RV = states_RD.double() @ weight_VD.double().T
    bound = 2.0**-8 * float((states_RD.double().abs() @ weight_VD.double().abs().T + exact_RV.abs()).max())
    for source in (targets, as_arrays(targets)):
        tensors = as_tensors(source, "cpu")
        torch.testing.assert_close(teacher_log_probs_RV(tensors, 1.0, torch.float64), exact_RV.log_softmax(-1))
        off = (teacher_log_probs_RV(tensors, 1.0, torch.float32) - exact_RV.log_softmax(-1)).abs().max()
        # A logit that is off by so much moves a log-probability by twice that.
        assert 0 < off <= 2 * bound


@EACH_KIND
def test_targets_made_in_inference_mode_can_be_learned_from(name: str, kind: str) -> None:
    divergence, _ = PAIRS[name]
    case = make(kind)
    with torch.inference_mode():
        targets = as_tensors(as_arrays(case.targets), "cpu")
        # As a live teacher makes them: every tensor an inference tensor, ids as int64.
        targets = replace(
            targets, **{n: getattr(targets, n).clone() for n in ("ids_RK", "log_probs_RK", "log_probs_RV", "states_RD") if hasattr(targets, n)}
        )
    student_RV = torch.from_numpy(case.student_RV).requires_grad_()
    divergence.nats(student_RV, as_tensors(targets, "cpu"), 1.0).sum().backward()
    expected_RV = torch.from_numpy(case.student_RV).requires_grad_()
    divergence.nats(expected_RV, case.targets, 1.0).sum().backward()
    torch.testing.assert_close(student_RV.grad, expected_RV.grad)


def test_no_gradient_reaches_the_teacher() -> None:
    weight_VD = torch.randn(11, 8, requires_grad=True)
    targets = HiddenTargets(vocabulary="v", temperature=1.0, states_RD=torch.randn(3, 8), head=TeacherHead(weight_VD=weight_VD))
    student_RV = torch.randn(3, 11, requires_grad=True)
    forward_kl().nats(student_RV, targets, 1.0).sum().backward()
    assert weight_VD.grad is None
