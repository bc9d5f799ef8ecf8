"""Every divergence through every family's own head: teacher and student as the engine runs them, in float32, against the definition in float64.

The oracle is the unmodified `transformers` forward pass of each whole sequence by itself in float64: its dense logits have whatever the family does to
them (bias, factor, soft cap, tied weights). Padding rows, of which teacher and student have different numbers, are masked to -inf there; the engine cuts
them off. R scored rows, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from helpers import tiny_model
from stillroom.core.identities import ModelRef, TokenSequence
from stillroom.models.loading import head_of, teacher_head_arrays
from stillroom.models.local import LocalTeacher, text_targets
from stillroom.models.student import OptimiserSettings, TransformersStudent, named_gradients
from stillroom.objectives.divergences import (
    Divergence,
    alpha_beta,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.targets.kinds import HiddenTargets, TargetRequest, Targets
from stillroom.targets.protocols import Batch
from stillroom.targets.vocabulary import Vocabulary

RELATIVE = 1e-5
SIZE, TEACHER_ROWS, STUDENT_ROWS = 61, 64, 72

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 30.0, "attn_implementation": "eager"},
    "gpt2": {},
    "cohere": {},
    "granite": {},
    "mistral": {},
    "phi": {},
}
# Factors on the final norm, so that logits reach far enough for a cap of 30 to matter, and are not all alike once they are scaled down.
_LOUDER = {"gemma2": 20.0, "cohere": 4.0, "granite": 8.0}
# Each family once as the teacher and once as the student, and llama with itself.
PAIRS = [*zip(FAMILIES, [*list(FAMILIES)[1:], "llama"], strict=True), ("llama", "llama")]
by_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")

Quantity = Callable[[Tensor, Tensor], Tensor]


def _kl(p_RV: Tensor, q_RV: Tensor) -> Tensor:
    return (p_RV * (p_RV / q_RV).log()).sum(-1)


def _alpha_beta(a: float, b: float) -> Quantity:
    s = a + b
    return lambda p, q: ((a / s) * p**s + (b / s) * q**s - p**a * q**b).sum(-1) / (a * b)


# Teacher's and student's probabilities to one number a row, as the definitions have it.
DEFINITIONS: list[tuple[Divergence, Quantity]] = [
    (forward_kl(), _kl),
    (reverse_kl(), lambda p, q: _kl(q, p)),
    (generalized_jsd(0.3), lambda p, q: 0.3 * _kl(p, 0.3 * p + 0.7 * q) + 0.7 * _kl(q, 0.3 * p + 0.7 * q)),
    (skew_forward_kl(0.1), lambda p, q: _kl(p, 0.1 * p + 0.9 * q)),
    (skew_reverse_kl(0.1), lambda p, q: _kl(q, 0.9 * p + 0.1 * q)),
    (total_variation(), lambda p, q: 0.5 * (p - q).abs().sum(-1)),
    (alpha_beta(0.4, 0.6), _alpha_beta(0.4, 0.6)),
    (alpha_beta(0.8, 0.7), _alpha_beta(0.8, 0.7)),
]
CASES = [(divergence.name, kind) for divergence, _ in DEFINITIONS for kind in ("full", "hidden", "top_k") if kind in divergence.kinds]

SEQUENCES = tuple(
    TokenSequence(ids=tuple((7 * i * i + 11 * t * (i + 1) + t * t) % SIZE for t in range(6 + 2 * i)), answer_spans=((2 + i, 5 + 2 * i),))
    for i in range(4)
)
ROWS = sum(len(sequence.scored_rows) for sequence in SEQUENCES)


@cache
def model_of(family: str, role: str) -> PreTrainedModel:
    rows, width, seed = (TEACHER_ROWS, 48, 1) if role == "teacher" else (STUDENT_ROWS, 32, 2)
    model = tiny_model(family, rows=rows, width=width, seed=seed, spread=0.2, **FAMILIES[family])
    if family in _LOUDER:
        with torch.no_grad():
            model.model.norm.weight.mul_(_LOUDER[family])
    return model


@cache
def dense_probabilities(family: str) -> Tensor:
    """The teacher's, R x SIZE."""
    with torch.no_grad():
        return _dense_probabilities(copy.deepcopy(model_of(family, "teacher")).double())


def _dense_probabilities(model: PreTrainedModel) -> Tensor:
    rows = []
    for sequence in SEQUENCES:
        logits_TV = model(input_ids=torch.tensor([sequence.ids]), use_cache=False).logits[0]
        masked_TV = logits_TV.index_fill(-1, torch.arange(SIZE, logits_TV.shape[-1]), -math.inf)
        rows.append(functional.softmax(masked_TV[list(sequence.scored_rows)], -1)[:, :SIZE])
    return torch.cat(rows)


@cache
def expected(pair: tuple[str, str]) -> dict[str, tuple[float, dict[str, Tensor]]]:
    """By divergence: the mean over rows, and its gradient with respect to each of the student's parameters."""
    student = copy.deepcopy(model_of(pair[1], "student")).double()
    q_RV, p_RV = _dense_probabilities(student), dense_probabilities(pair[0])
    parameters = dict(student.named_parameters())
    found = {}
    for divergence, quantity in DEFINITIONS:
        mean = quantity(p_RV, q_RV).mean()
        gradients = torch.autograd.grad(mean, list(parameters.values()), retain_graph=True, allow_unused=True)
        found[divergence.name] = (mean.item(), {name: one for name, one in zip(parameters, gradients, strict=True) if one is not None})
    return found


@cache
def targets_of(family: str, kind: str) -> Targets:
    """As the engine makes them, but for hidden states, which are kept in float32."""
    model = model_of(family, "teacher")
    ref = ModelRef(source="here", kind="directory", revision=None, weights_sha256=None, architecture="", parameters=1, licence=None)
    teacher = LocalTeacher(model, ref, vocabulary(TEACHER_ROWS), at_once=2)
    if kind == "hidden":
        head = teacher_head_arrays(model, SIZE)
        return HiddenTargets(vocabulary=teacher.vocabulary.fingerprint, temperature=1.0, states_RD=teacher.hidden_states(SEQUENCES), head=head)
    return teacher.targets(SEQUENCES, TargetRequest(kind=kind, k=SIZE))


def vocabulary(rows: int) -> Vocabulary:
    return Vocabulary(tokens=tuple(bytes([i]) for i in range(SIZE)), special={}, end_ids=(0,), rows=rows)


def learn(family: str, batch: Batch, objective: Objective) -> tuple[float, dict[str, Tensor]]:
    """The engine's mean over rows, and its gradients."""
    student = TransformersStudent(model_of(family, "student"), vocabulary(STUDENT_ROWS), OptimiserSettings(), rows_per_chunk=5)
    sums = student.forward_backward(batch, objective, divide_by=batch.scored_weight)
    found = {name: gradient.clone() for name, gradient in named_gradients(student.model)}
    student.drop_gradient()
    return sums.objective_nats / sums.scored_weight, found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float = RELATIVE, least: float = 1e-3) -> None:
    """Parameter by parameter; where a parameter's gradient is under `least` of the whole model's, that counts as its size."""
    assert found.keys() == wanted.keys()
    whole = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in wanted.values()))
    assert whole > 1e-3
    for name, gradient in wanted.items():
        off = float((found[name].double() - gradient).norm())
        assert off <= relative * max(float(gradient.norm()), least * whole), f"{name}: off by {off / whole:.1e} of the whole gradient"


@pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda part: part)
@by_pair
def test_value_and_gradient_are_those_of_the_dense_logits(pair: tuple[str, str], name: str, kind: str) -> None:
    divergence = next(divergence for divergence, _ in DEFINITIONS if divergence.name == name)
    objective = Objective(terms=(WeightedTerm(divergence=divergence),))
    targets = targets_of(pair[0], kind)
    objective.check(kind)
    value, gradients = learn(pair[1], Batch(sequences=SEQUENCES, targets=targets, labels=text_targets(SEQUENCES, vocabulary(1 << 10))), objective)
    expected_value, expected_gradients = expected(pair)[name]
    assert value == pytest.approx(expected_value, rel=RELATIVE)
    assert_same(gradients, expected_gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_entropy_is_that_of_the_dense_logits(family: str) -> None:
    labels = text_targets(SEQUENCES, vocabulary(STUDENT_ROWS))
    value, gradients = learn(
        family, Batch(sequences=SEQUENCES, targets=labels, labels=labels), Objective(terms=(WeightedTerm(divergence=cross_entropy()),))
    )
    student = copy.deepcopy(model_of(family, "student")).double()
    mean = -_dense_probabilities(student).gather(-1, labels.token_ids_R[:, None]).log().mean()
    mean.backward()
    assert value == pytest.approx(mean.item(), rel=RELATIVE)
    assert_same(gradients, {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_are_what_they_are_here_for(family: str) -> None:
    """What each head does is there, and leaving it out would show."""
    model = model_of(family, "teacher")
    head = head_of(model)
    assert (head.scale, head.softcap) == {"gemma2": (1.0, 30.0), "cohere": (0.25, None), "granite": (1 / 8, None)}.get(family, (1.0, None))
    assert (head.bias_V is not None) == (family == "phi")
    assert (model.get_input_embeddings().weight is head.weight_VD) == (family not in ("llama", "mistral", "granite", "phi"))
    targets = targets_of(family, "hidden")
    assert isinstance(targets, HiddenTargets)
    without = replace(targets, head=replace(targets.head, bias_V=None, scale=1.0, softcap=None))
    exact = (head.scale, head.softcap, head.bias_V) == (1.0, None, None)
    p_RV = dense_probabilities(family).log()
    off = float((forward_kl().nats(p_RV.float(), without, 1.0)).mean())
    assert (off < 1e-6) == exact, off
    if family == "gemma2":
        assert off > 1e-3, "the logits do not reach far enough for the cap to matter"


def test_the_oracle_would_see_another_factor() -> None:
    """The same student with Granite's division left out: no longer the same gradient."""
    pair = ("cohere", "granite")
    objective = Objective(terms=(WeightedTerm(divergence=forward_kl()),))
    batch = Batch(sequences=SEQUENCES, targets=targets_of(pair[0], "full"), labels=text_targets(SEQUENCES, vocabulary(STUDENT_ROWS)))
    model = copy.deepcopy(model_of(pair[1], "student"))
    model.config.logits_scaling = 1.0
    student = TransformersStudent(model, vocabulary(STUDENT_ROWS), OptimiserSettings())
    student.forward_backward(batch, objective, divide_by=ROWS)
    with pytest.raises(AssertionError, match="off by"):
        assert_same(dict(named_gradients(student.model)), expected(pair)["forward_kl"][1], relative=1e-2)


def _widths() -> Sequence[tuple[str, int, int, int]]:
    return [("small", 29, 32, 40), ("as Qwen2.5 has them", 151_665, 151_936, 152_064)]


@pytest.mark.parametrize("kind", ["full", "hidden", "top_k"])
@pytest.mark.parametrize(("size", "teacher_rows", "student_rows"), [one[1:] for one in _widths()], ids=[one[0] for one in _widths()])
def test_heads_padded_to_different_widths_are_compared_on_the_real_tokens(kind: str, size: int, teacher_rows: int, student_rows: int) -> None:
    """One tokenizer, two paddings: value and gradient are those of the dense logits with padding masked to -inf on both sides."""
    options = {"layers": 1, "heads": 1, "head_dim": 4, "num_key_value_heads": 1}
    teacher, student = (tiny_model("llama", rows=rows, width=4, seed=seed, **options) for rows, seed in ((teacher_rows, 1), (student_rows, 2)))
    sequences = (TokenSequence(ids=(1, size - 1, 5, size // 2, 7), answer_spans=((2, 5),)), TokenSequence(ids=(9, 8, 7), answer_spans=((1, 3),)))
    rows = 5
    masked = []
    for model in (teacher, copy.deepcopy(student)):
        logits_RV = torch.cat(
            [model.double()(input_ids=torch.tensor([one.ids]), use_cache=False).logits[0, list(one.scored_rows)] for one in sequences]
        )
        masked.append((model, logits_RV.index_fill(-1, torch.arange(size, logits_RV.shape[-1]), -math.inf).log_softmax(-1)[:, :size]))
    (teacher, log_p_RV), (exact, log_q_RV) = masked
    log_p_RV = log_p_RV.detach()
    mean = (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum() / rows
    mean.backward()

    tokens = tuple(i.to_bytes(3, "little") for i in range(size))
    vocabularies = [Vocabulary(tokens=tokens, special={}, end_ids=(0,), rows=count) for count in (teacher_rows, student_rows)]
    ref = ModelRef(source="here", kind="directory", revision=None, weights_sha256=None, architecture="", parameters=1, licence=None)
    local = LocalTeacher(teacher.float(), ref, vocabularies[0])
    targets = local.targets(sequences, TargetRequest(kind=kind, k=size))
    if kind == "hidden":
        targets = replace(targets, states_RD=local.hidden_states(sequences))
    batch = Batch(sequences=sequences, targets=targets, labels=text_targets(sequences, vocabularies[0]))
    engine = TransformersStudent(student, vocabularies[1], OptimiserSettings(), rows_per_chunk=2)
    sums = engine.forward_backward(batch, Objective(terms=(WeightedTerm(divergence=forward_kl()),)), divide_by=rows)
    assert sums.objective_nats / rows == pytest.approx(mean.item(), rel=RELATIVE)
    found = dict(named_gradients(engine.model))
    # Against the whole gradient: after sums over 151,665 ids in float32, what is a fiftieth of it has lost a digit.
    assert_same(found, {name: parameter.grad for name, parameter in exact.named_parameters() if parameter.grad is not None}, least=1.0)
    width = head_of(engine.model).weight_VD
    assert width.shape[0] == student_rows
    assert width.grad is not None
    assert not width.grad[size:].any()
