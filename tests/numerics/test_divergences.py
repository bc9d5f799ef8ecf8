"""Every divergence, from every kind of targets, against its definition in plain float64, finite differences, and what is known of it."""

from __future__ import annotations

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
    LOG_OF_ZERO,
    Divergence,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    teacher_log_probs_RV,
)
from stillroom.objectives.tensors import as_arrays, as_tensors
from stillroom.targets.codecs import from_bfloat16, to_bfloat16
from stillroom.targets.kinds import TARGET_KINDS, FullTargets, HiddenTargets, Targets, TeacherHead, TextTargets, TopKTargets

PAIRS: dict[str, tuple[Divergence, Callable[[list[float], list[float]], float]]] = {
    "forward_kl": (forward_kl(), oracle.forward_kl),
    "reverse_kl": (reverse_kl(), oracle.reverse_kl),
    "jsd 0.5": (generalized_jsd(0.5), lambda p, q: oracle.generalized_jsd(p, q, 0.5)),
    "jsd 0.1": (generalized_jsd(0.1), lambda p, q: oracle.generalized_jsd(p, q, 0.1)),
    "jsd 0.9": (generalized_jsd(0.9), lambda p, q: oracle.generalized_jsd(p, q, 0.9)),
}
EACH = pytest.mark.parametrize("name", PAIRS)
KINDS = pytest.mark.parametrize("kind", ["full", "hidden", "top_k"])
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


@EACH
@KINDS
@TEMPERATURES
def test_value_is_the_definition(name: str, kind: str, temperature: float) -> None:
    divergence, quantity = PAIRS[name]
    case = make(kind, temperature=temperature)
    expected_R = case.expected_R(quantity)
    assert nats(divergence, case).tolist() == pytest.approx(expected_R, rel=1e-9, abs=1e-12)
    assert nats(divergence, case, torch.float32).tolist() == pytest.approx(expected_R, rel=1e-5, abs=1e-6)


@EACH
@KINDS
@TEMPERATURES
def test_gradient_is_that_of_the_value(name: str, kind: str, temperature: float) -> None:
    divergence, _ = PAIRS[name]
    case = make(kind, rows=3, size=7, k=3, temperature=temperature)
    student_RV = torch.from_numpy(case.student_RV).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: divergence.nats(logits, case.targets, temperature), student_RV)


@EACH
@KINDS
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


@EACH
@KINDS
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


@EACH
def test_tail_bucket_never_exceeds_the_whole_and_grows_to_it(name: str) -> None:
    """The data-processing inequality, along a chain of ever finer partitions."""
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


@EACH
def test_tail_bucket_is_exact_where_both_share_the_tail_out_alike(name: str) -> None:
    divergence, quantity = PAIRS[name]
    rng = numpy.random.default_rng(3)
    teacher_RV = numpy.sort(rng.normal(size=(4, 9)), axis=1)[:, ::-1].copy()
    student_RV = teacher_RV + 0.0
    student_RV[:, :3] += rng.normal(size=(4, 3))  # kept ids differ; the others keep their ratios
    case = Case(teacher_RV, student_RV, top_k(teacher_RV, 1.0, 3), 1.0)
    exact_R = Case(teacher_RV, student_RV, full(teacher_RV, 1.0), 1.0).expected_R(quantity)
    assert nats(divergence, case).tolist() == pytest.approx(exact_R, rel=1e-9)


@EACH
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


@pytest.mark.parametrize("divergence", [forward_kl(), reverse_kl(), generalized_jsd(0.3)])
def test_a_teacher_of_zeros(divergence: Divergence) -> None:
    """What the teacher rules out (a masked token) is finite for all: forward KL and JSD by definition, reverse KL by LOG_OF_ZERO."""
    log_probs_RV = torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]).log()
    student_RV = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 4.0]], requires_grad=True)
    value_R = divergence.nats(student_RV, FullTargets(vocabulary="v", temperature=1.0, log_probs_RV=log_probs_RV), 1.0)
    value_R.sum().backward()
    quantities = {
        "forward_kl": oracle.forward_kl,
        "reverse_kl": oracle.reverse_kl,
        "generalized_jsd(0.3)": lambda p, q: oracle.generalized_jsd(p, q, 0.3),
    }
    expected_R = [
        quantities[divergence.name](p, oracle.softmax(q)) for p, q in (([0.75, 0.25, 0.0], [1.0, 2.0, 3.0]), ([1.0, 0.0, 0.0], [0.0, -1.0, 4.0]))
    ]
    assert value_R.tolist() == pytest.approx(expected_R, rel=1e-5)
    assert student_RV.grad is not None
    assert student_RV.grad.isfinite().all()
    assert (student_RV.grad[:, 2] > 0).all(), "descent lowers what the teacher rules out"
    assert LOG_OF_ZERO == oracle.LOG_OF_ZERO


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


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
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


def test_a_head_in_bfloat16_is_widened_not_rounded_further() -> None:
    generator = torch.Generator().manual_seed(2)
    states_RD, weight_VD = torch.randn(6, 8, generator=generator), torch.randn(11, 8, generator=generator).bfloat16()
    targets = HiddenTargets(vocabulary="v", temperature=1.0, states_RD=states_RD, head=TeacherHead(weight_VD=weight_VD))
    expected = torch.log_softmax(states_RD @ weight_VD.float().T, dim=-1)
    for source in (targets, as_arrays(targets)):
        torch.testing.assert_close(teacher_log_probs_RV(as_tensors(source, "cpu"), 1.0, torch.float32), expected)


@EACH
@KINDS
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
