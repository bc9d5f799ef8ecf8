"""What rounding a teacher's hidden states does to loss and gradient stays within the bounds that docs/reference/target-store.md states.

States go through the codec as a store writes and reads them, and everything after it is computed in float64, so that what is seen is the codec's alone.
e is `codecs.logit_bound_R`: the most that a logit over the temperature can be off. R rows, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from helpers import FAMILIES, tiny_model
from stillroom import demo
from stillroom.core.identities import TokenSequence
from stillroom.models.loading import body_of, describe, head_of, load_model, teacher_head_arrays
from stillroom.models.local import text_targets
from stillroom.models.student import OptimiserSettings, TransformersStudent
from stillroom.objectives.divergences import (
    Divergence,
    alpha_beta,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from stillroom.objectives.matching import StateMatch, hidden_cosine, hidden_mse
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.objectives.tensors import as_arrays, as_tensors, head_logits_RV
from stillroom.targets.codecs import HiddenCodec, decode, encode, logit_bound_R, state_bound_RD
from stillroom.targets.kinds import HiddenTargets, TeacherHead
from stillroom.targets.protocols import Batch
from stillroom.targets.vocabulary import Vocabulary

SIZE, PADDED = 61, 64
ROUNDED = ("bfloat16", "int8")
FLOAT64 = 1e-11  # of what is compared, and of the numbers that it is made of


@dataclass(frozen=True)
class Facts:
    """What a bound may depend on: e of each row, both teachers and the student as log-probabilities."""

    e_R: Tensor
    log_p_RV: Tensor
    log_rounded_RV: Tensor
    log_q_RV: Tensor


Bound = Callable[[Facts], Tensor]


def _deviation_R(log_p_RV: Tensor, log_q_RV: Tensor) -> Tensor:
    """m: how far log p / q is from its mean, F, in the mean over p."""
    ratio_RV, p_RV = log_p_RV - log_q_RV, log_p_RV.exp()
    return (p_RV * (ratio_RV - (p_RV * ratio_RV).sum(-1, keepdim=True)).abs()).sum(-1).clamp(min=1e-300)


def _grown_R(e_R: Tensor) -> Tensor:
    """exp(2 e) - 1, and where that is past all use, infinity: what it is multiplied with may have come out as 0."""
    return torch.where(e_R > 100, math.inf, torch.expm1(2 * e_R))


def _through_m(e_R: Tensor, m_R: Tensor | float) -> Tensor:
    return _grown_R(e_R) / 2 * m_R + e_R**2 / 2


def _most_m(kl: float) -> float:
    return 2 * kl + math.sqrt(2 * kl)


def _unsure_R(facts: Facts) -> Tensor:
    """The sum of p (1 - p)."""
    p_RV = facts.log_p_RV.exp()
    return (p_RV * (1 - p_RV)).sum(-1).clamp(min=1e-300)


def _in_doubt_R(facts: Facts) -> Tensor:
    """Q: what the student gives to ids whose two log-probabilities are within 2 e."""
    near_RV = (facts.log_p_RV - facts.log_q_RV).abs() <= 2 * facts.e_R[:, None] + FLOAT64
    return (facts.log_q_RV.exp() * near_RV).sum(-1)


def _spread(facts: Facts, s: float) -> float:
    return float(facts.log_p_RV.shape[1] ** max(0.0, 1 - s))


# Divergence, bound of the value's change, bound of the gradient's: its absolute entries summed, times match_temperature.
W, ALPHA = 0.3, 0.1
BOUNDS: list[tuple[Divergence, Bound | None, Bound]] = [
    (
        forward_kl(),
        lambda f: _through_m(f.e_R, _deviation_R(f.log_p_RV, f.log_q_RV)),
        lambda f: torch.minimum(2 * torch.tanh(f.e_R / 2), _grown_R(f.e_R) * _unsure_R(f)),
    ),
    (reverse_kl(), lambda f: 2 * f.e_R, lambda f: f.e_R),
    (generalized_jsd(W), lambda f: W * _through_m(f.e_R, _most_m(-math.log(W))), lambda f: (1 - W) * f.e_R),
    (skew_forward_kl(ALPHA), lambda f: (_most_m(-math.log(ALPHA)) + 0.5) * f.e_R, lambda f: 2 * f.e_R),
    (skew_reverse_kl(ALPHA), lambda f: 2 * f.e_R, lambda f: f.e_R),
    (total_variation(), lambda f: torch.tanh(f.e_R / 2), lambda f: 2 * _in_doubt_R(f)),
    (alpha_beta(0.4, 0.6), lambda f: 4 / 0.6 * f.e_R, lambda f: 4 * f.e_R),
    (alpha_beta(0.3, 0.4), lambda f: 4 / 0.4 * _spread(f, 0.7) * f.e_R, lambda f: 4 * _spread(f, 0.7) * f.e_R),
    (alpha_beta(0.8, 0.7), lambda f: 4 / 0.7 * f.e_R, lambda f: 4 * f.e_R),
    (alpha_beta(0.0, 0.8), lambda f: 4 / 0.8 * _spread(f, 0.8) * f.e_R, lambda f: 4 * _spread(f, 0.8) * f.e_R),
    (alpha_beta(0.8, 0.0), None, lambda f: 4 * _spread(f, 0.8) * f.e_R),
]


# -- what is compared ----------------------------------------------------------------------------------------------------


def stored(targets: HiddenTargets, state_dtype: str) -> HiddenTargets:
    """The targets as a store gives them back."""
    arrays = as_arrays(targets)
    codec = HiddenCodec(width=arrays.states_RD.shape[1], state_dtype=state_dtype)
    read = decode(codec, encode(codec, arrays), vocabulary="v", temperature=targets.temperature, head=arrays.head, labels_R=numpy.empty(0))
    assert isinstance(read, HiddenTargets)
    return read


def facts_of(targets: HiddenTargets, state_dtype: str, student_RV: Tensor, temperature: float) -> tuple[Facts, Facts]:
    """With e as the codec bounds it, and as it turned out: half the range of what the logits changed by."""
    codec = HiddenCodec(width=targets.states_RD.shape[1], state_dtype=state_dtype)
    bound_R = torch.from_numpy(logit_bound_R(codec, as_arrays(replace(targets, temperature=temperature))))
    log_p_RV, log_rounded_RV = (_log_probs_RV(one, temperature) for one in (targets, stored(targets, state_dtype)))
    changes_RV = log_rounded_RV - log_p_RV
    seen_R = (changes_RV.amax(-1) - changes_RV.amin(-1)) / 2
    assert (seen_R <= bound_R + FLOAT64 * (1 + log_p_RV.abs().amax(-1))).all()
    log_q_RV = torch.log_softmax(student_RV / temperature, -1)
    return Facts(bound_R, log_p_RV, log_rounded_RV, log_q_RV), Facts(seen_R, log_p_RV, log_rounded_RV, log_q_RV)


def _log_probs_RV(targets: HiddenTargets, temperature: float) -> Tensor:
    on = as_tensors(targets, "cpu")
    return torch.log_softmax(head_logits_RV(on.states_RD, on.head, torch.float64) / temperature, -1)


def value_and_gradient(divergence: Divergence, student_RV: Tensor, targets: HiddenTargets, temperature: float) -> tuple[Tensor, Tensor]:
    logits_RV = student_RV.clone().requires_grad_()
    nats_R = divergence.nats(logits_RV, as_tensors(targets, "cpu"), temperature)
    nats_R.sum().backward()
    assert logits_RV.grad is not None
    return nats_R.detach(), logits_RV.grad


@dataclass(frozen=True)
class Seen:
    """The share of its bound that each row's change came to: of the codec's bound, and of that for the e that was seen."""

    value_R: tuple[Tensor, ...]
    gradient_R: tuple[Tensor, Tensor]


def held(targets: HiddenTargets, student_RV: Tensor, state_dtype: str, temperature: float = 1.0) -> dict[str, Seen]:
    """Every divergence's change of value and gradient, each of which must be within its bounds."""
    both, rounded, seen = facts_of(targets, state_dtype, student_RV, temperature), stored(targets, state_dtype), {}
    for divergence, value_bound, gradient_bound in BOUNDS:
        value_R, gradient_RV = value_and_gradient(divergence, student_RV, targets, temperature)
        other_R, other_RV = value_and_gradient(divergence, student_RV, rounded, temperature)
        values, gradients = [], []
        for facts in both:
            if value_bound is not None:
                size_R = 1 + value_R.abs() + facts.log_p_RV.abs().amax(-1)
                values.append(_share_R((other_R - value_R).abs(), value_bound(facts), size_R, divergence.name))
            summed_R, bound_R = (other_RV - gradient_RV).abs().sum(-1), gradient_bound(facts) / temperature
            gradients.append(_share_R(summed_R, bound_R, 1 + gradient_RV.abs().sum(-1), divergence.name))
            assert ((other_RV - gradient_RV).norm(dim=-1) <= summed_R / math.sqrt(2) + FLOAT64).all(), "the entries of a gradient sum to 0"
        seen[divergence.name] = Seen(tuple(values), (gradients[0], gradients[1]))
    kl_R = value_and_gradient(forward_kl(), student_RV, targets, temperature)[0].clamp(min=0)
    assert (_deviation_R(both[0].log_p_RV, both[0].log_q_RV) <= 2 * kl_R + (2 * kl_R).sqrt() + 1e-7).all()
    return seen


def _share_R(change_R: Tensor, bound_R: Tensor, size_R: Tensor, name: str) -> Tensor:
    assert (change_R <= bound_R + FLOAT64 * size_R).all(), f"{name}: {change_R} where {bound_R} is the most"
    return change_R / bound_R.clamp(min=1e-300)


def random_targets(rng: numpy.random.Generator, *, size: int, width: int, rows: int, loud: float, heavy: bool) -> HiddenTargets:
    """States and a head drawn at random; `heavy`: with outliers in both, as real states have them."""

    def drawn(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_t(1.5, size=shape).clip(-1e4, 1e4) if heavy else rng.normal(size=shape)).float()

    return HiddenTargets(
        vocabulary="v",
        temperature=1.0,
        states_RD=drawn(rows, width),
        head=TeacherHead(
            weight_VD=loud / math.sqrt(width) * drawn(size, width),
            bias_V=loud * drawn(size) if rng.random() < 0.5 else None,
            scale=float(rng.choice([1.0, 0.25, -1.5])),
            softcap=float(rng.choice([3.0, 30.0])) if rng.random() < 0.4 else None,
        ),
    )


# -- random and adversarial distributions ----------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32),
    state_dtype=st.sampled_from(ROUNDED),
    size=st.integers(1, 40),
    width=st.integers(1, 24),
    rows=st.integers(1, 4),
    loud=st.sampled_from([1e-3, 0.3, 3.0, 100.0]),
    heavy=st.booleans(),
    distance=st.sampled_from([0.0, 1e-3, 1.0, 20.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
)
@settings(max_examples=100)
def test_every_divergence_stays_within_its_bounds(
    seed: int, state_dtype: str, size: int, width: int, rows: int, loud: float, heavy: bool, distance: float, temperature: float
) -> None:
    """Flat to peaked, tame and with outliers, the student as near as equal and as far as unrelated."""
    rng = numpy.random.default_rng(seed)
    targets = random_targets(rng, size=size, width=width, rows=rows, loud=loud, heavy=heavy)
    student_RV = temperature * _log_probs_RV(targets, temperature) + distance * torch.from_numpy(rng.normal(size=(rows, size)))
    held(targets, student_RV, state_dtype, temperature)


@pytest.mark.parametrize("state_dtype", ROUNDED)
def test_tiny_and_huge_states_stay_within_the_bounds(state_dtype: str) -> None:
    """From below the smallest normal float32, where bfloat16 has fewer bits, to near the largest; a row of zeros; one row, one number."""
    rng = numpy.random.default_rng(1)
    factors_R1 = torch.tensor([0.0, 1e-44, 1e-40, 1e-37, 1e-30, 1.0, 1e20, 1e37])[:, None]
    states_RD = torch.from_numpy(rng.normal(size=(8, 16))).float() * factors_R1
    for factor in (1.0, 1e38, 1e-37):
        head = TeacherHead(weight_VD=torch.from_numpy(rng.normal(size=(9, 16))).double() * factor, softcap=30.0)
        targets = HiddenTargets(vocabulary="v", temperature=1.0, states_RD=states_RD, head=head)
        held(targets, torch.from_numpy(rng.normal(size=(8, 9))), state_dtype, 1.0)


def aligned(state_dtype: str, e: float, width: int = 64) -> HiddenTargets:
    """Two ids with opposite weights, and every state rounded as far as it goes, all in the direction of the first id's weights; equally probable
    half-way between what they were and what they become."""
    if state_dtype == "bfloat16":
        state = torch.full((1, width), 1 + 2.0**-8 - 2.0**-20)
        lost = (2.0**-8) * width
    else:
        state = torch.full((1, width), 64.5 - 2.0**-12)
        state[0, 0] = 127.0
        lost = 0.5 * width
    weight_VD = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) * torch.full((1, width), e / lost, dtype=torch.float64)
    targets = HiddenTargets(vocabulary="v", temperature=1.0, states_RD=state, head=TeacherHead(weight_VD=weight_VD))
    ends_RV = [
        head_logits_RV(torch.as_tensor(as_tensors(one, "cpu").states_RD), targets.head, torch.float64)
        for one in (targets, stored(targets, state_dtype))
    ]
    return replace(targets, head=replace(targets.head, bias_V=-((ends_RV[0] + ends_RV[1]) / 2)[0]))


@pytest.mark.parametrize("e", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("state_dtype", ROUNDED)
def test_the_bounds_are_nearly_reached(state_dtype: str, e: float) -> None:
    """No smaller ones would hold: an aligned teacher comes within a few hundredths of the bound of total variation and of forward KL's gradient, and
    while e is small of forward KL's value and of reverse KL's."""
    targets = aligned(state_dtype, e)
    student_RV = torch.tensor([[0.0, 9.0]], dtype=torch.float64)
    seen = held(targets, student_RV, state_dtype)
    assert facts_of(targets, state_dtype, student_RV, 1.0)[0].e_R.item() == pytest.approx(e, rel=0.02)
    assert seen["forward_kl"].gradient_R[0].item() > 0.96
    assert seen["forward_kl"].value_R[0].item() > 0.96 * math.exp(-2 * e)
    # The student is sure of the one id that the rounding takes from.
    tilted = replace(targets, head=replace(targets.head, bias_V=torch.tensor([30.0, 0.0], dtype=torch.float64)))
    assert held(tilted, student_RV, state_dtype)["reverse_kl"].value_R[0].item() > 0.96
    far = held(targets, torch.tensor([[0.0, 40.0]], dtype=torch.float64), state_dtype)
    assert far["total_variation"].value_R[0].item() > 0.96


# -- models ----------------------------------------------------------------------------------------------------------------

SEQUENCES = tuple(
    TokenSequence(ids=tuple((7 * i * i + 11 * t * (i + 1) + t * t) % SIZE for t in range(6 + 2 * i)), answer_spans=((2 + i, 5 + 2 * i),))
    for i in range(4)
)
# Factors on the final norm: all ids nearly alike, as initialised, and one id that has nearly all.
LOUD = {"flat": 0.05, "plain": 1.0, "peaked": 30.0}


@cache
def teacher_of(family: str, loud: str) -> HiddenTargets:
    """Hidden targets in float32 of a random model of the family, whose logits have three padding rows."""
    options = {"final_logit_softcapping": 30.0, "attn_implementation": "eager"} if family == "gemma2" else {}
    model = tiny_model(family, rows=PADDED, width=48, seed=1, spread=0.2, **options)
    return HiddenTargets(vocabulary="v", temperature=1.0, states_RD=LOUD[loud] * states_of(model, SEQUENCES), head=teacher_head_arrays(model, SIZE))


@torch.no_grad()
def states_of(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> Tensor:
    return torch.cat([body_of(model)(input_ids=torch.tensor([one.ids])).last_hidden_state[0, list(one.scored_rows)] for one in sequences])


@cache
def student_of(family: str) -> PreTrainedModel:
    return tiny_model(family, rows=72, width=32, seed=2, spread=0.2)


@pytest.mark.parametrize("state_dtype", ROUNDED)
@pytest.mark.parametrize("loud", LOUD)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stays_within_the_bounds(family: str, loud: str, state_dtype: str) -> None:
    """With soft caps, factors, biases, tied heads and padding; against an unrelated student and one that has nearly learned."""
    targets = teacher_of(family, loud)
    student = student_of(family)
    with torch.no_grad():
        unrelated_RV = head_of(student)(states_of(student, SEQUENCES))[:, :SIZE].double()
    near_RV = _log_probs_RV(targets, 1.0) + 0.1 * torch.randn(unrelated_RV.shape, generator=torch.Generator().manual_seed(0)).double()
    for temperature in (1.0, 2.0):
        for student_RV in (unrelated_RV, near_RV):
            seen = held(targets, student_RV, state_dtype, temperature)
            # Not idle: 48 roundings of random signs come to a little of the codec's bound (least where a soft cap takes most of it away), and what they
            # do come to changes the gradient by a share of what it may.
            of_codec_R, of_seen_R = seen["forward_kl"].gradient_R
            assert of_codec_R.max() > 1 / 200
            assert of_seen_R.max() > 1 / 50


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
def test_the_gradient_of_every_parameter_stays_within_the_bound(family: str) -> None:
    """Through the engine, row by row: the whole gradient changes in length by at most (exp(2 e) - 1) / 2 sum_v p_v |dy_v - mean|, dy_v being the
    derivative of logit v with respect to all parameters and the mean that over p."""
    sequences = [TokenSequence(ids=one.ids[: row + 2], answer_spans=((row + 1, row + 2),)) for one in SEQUENCES for row in one.scored_rows][::3]
    every = teacher_of(family, "plain")
    rows = range(0, len(every.states_RD), 3)
    student = student_of(family)
    for row, sequence in zip(rows, sequences, strict=True):
        targets = replace(every, states_RD=every.states_RD[row : row + 1])
        exact, derivatives_VP = engine_gradient(student, sequence, targets), logit_derivatives_VP(student, sequence)
        for state_dtype in ROUNDED:
            facts, _ = facts_of(targets, state_dtype, torch.zeros(1, SIZE).double(), 1.0)
            p_V = facts.log_p_RV[0].exp()
            deviation = float(p_V @ (derivatives_VP - p_V @ derivatives_VP).norm(dim=1))
            bound = math.expm1(2 * facts.e_R.item()) / 2 * deviation
            change = float((engine_gradient(student, sequence, stored(targets, state_dtype)) - exact).norm())
            rounding = 1e-5 * float(exact.norm())
            # Far below, for it is the worst of cases: neither 48 roundings nor 61 derivatives lie in one direction.
            assert bound / 500 < change <= bound + rounding
            assert bound > 10 * rounding, "so small that the engine's own rounding would do as much"


def engine_gradient(student: PreTrainedModel, sequence: TokenSequence, targets: HiddenTargets) -> Tensor:
    """Forward KL's, with respect to all parameters, end to end."""
    vocabulary = Vocabulary(tokens=tuple(bytes([i]) for i in range(SIZE)), special={}, end_ids=(0,), rows=72)
    engine = TransformersStudent(student, vocabulary, OptimiserSettings())
    batch = Batch(sequences=(sequence,), targets=targets, labels=text_targets([sequence], vocabulary))
    engine.forward_backward(batch, Objective(terms=(WeightedTerm(divergence=forward_kl()),)), divide_by=1)
    parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in student.parameters()]
    engine.drop_gradient()
    return torch.cat([part.flatten() for part in parts]).double()


def logit_derivatives_VP(student: PreTrainedModel, sequence: TokenSequence) -> Tensor:
    parameters = list(student.parameters())
    logits_V = head_of(student)(body_of(student)(input_ids=torch.tensor([sequence.ids])).last_hidden_state[0, list(sequence.scored_rows)])[0, :SIZE]
    of_each = [torch.autograd.grad(logit, parameters, retain_graph=True, materialize_grads=True) for logit in logits_V]
    return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in of_each]).double()


@pytest.mark.parametrize("state_dtype", ROUNDED)
@pytest.mark.parametrize("term", [hidden_mse(learned=False), hidden_cosine(learned=False)], ids=lambda term: term.name)
def test_distances_of_states_stay_within_their_bounds(term: StateMatch, state_dtype: str) -> None:
    rng = numpy.random.default_rng(3)
    for heavy in (False, True):
        targets = random_targets(rng, size=2, width=40, rows=50, loud=1.0, heavy=heavy)
        e_RD = torch.from_numpy(state_bound_RD(HiddenCodec(width=40, state_dtype=state_dtype), targets.states_RD.numpy()))
        student_RD = torch.from_numpy(rng.normal(size=(50, 40)))
        found = []
        for one in (targets, stored(targets, state_dtype)):
            states_RD = student_RD.clone().requires_grad_()
            wide = as_tensors(one, "cpu")
            distance_R = term.compare_R(states_RD, replace(wide, states_RD=wide.states_RD.double()), None)
            distance_R.sum().backward()
            assert states_RD.grad is not None
            found.append((distance_R.detach(), states_RD.grad))
        (value_R, gradient_RD), (other_R, other_RD) = found
        off_RD = (student_RD - targets.states_RD.double()).abs()
        if term.name == "hidden_mse":
            value_bound_R, gradient_bound_R = (e_RD * (2 * off_RD + e_RD)).mean(-1), 2 * e_RD.norm(dim=-1) / 40
        else:
            value_bound_R = 2 * e_RD.norm(dim=-1) / targets.states_RD.double().norm(dim=-1)
            gradient_bound_R = value_bound_R / student_RD.norm(dim=-1)
        assert (_share_R((other_R - value_R).abs(), value_bound_R, 1 + value_R.abs(), term.name) > 0).any()
        change_R = (other_RD - gradient_RD).norm(dim=-1)
        assert _share_R(change_R, gradient_bound_R, 1 + gradient_RD.norm(dim=-1), term.name).median() > 1 / 10


@pytest.mark.parametrize(("state_dtype", "most_e"), [("bfloat16", 0.1), ("int8", 0.7)])
def test_how_much_of_the_bounds_a_trained_teacher_uses(state_dtype: str, most_e: float) -> None:
    """The demo's teacher, width 192, against itself with noise; `pytest -s` shows the figures."""
    model = load_model(describe(str(demo.TEACHER))).float()
    sequences = [TokenSequence(ids=tuple((37 * i + 11 * t + t * t) % 512 for t in range(24)), answer_spans=((4, 24),)) for i in range(8)]
    targets = HiddenTargets(vocabulary="v", temperature=1.0, states_RD=states_of(model, sequences), head=teacher_head_arrays(model, 512))
    log_p_RV = _log_probs_RV(targets, 1.0)
    student_RV = log_p_RV + 0.5 * torch.randn(log_p_RV.shape, generator=torch.Generator().manual_seed(0)).double()
    of_codec, as_seen = facts_of(targets, state_dtype, student_RV, 1.0)
    seen = held(targets, student_RV, state_dtype)
    print(f"\n{state_dtype}, {len(log_p_RV)} rows: e at most {of_codec.e_R.mean():.4f} in the mean, seen {as_seen.e_R.mean():.4f}")
    print("mean share of the codec's bound, and of that for the e that was seen")
    for name, one in seen.items():
        values, gradients = (" ".join(f"{share_R.mean():.4f}" for share_R in shares) for shares in (one.value_R, one.gradient_R))
        print(f"{name:22} value {values or 'no bound':14} gradient {gradients}")
    assert of_codec.e_R.max() < most_e
    assert seen["forward_kl"].gradient_R[0].mean() > 1 / 100
    assert seen["forward_kl"].gradient_R[1].mean() > 1 / 10
