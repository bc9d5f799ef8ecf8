"""The fused head and divergence: the same function as autograd through all logits, and as the definitions; never more logits than a chunk's.

Shapes: R scored rows, V vocabulary size, K kept ids, D width of the student, E of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from numerics import oracle
from stillroom.models.probing import LiveBytes
from stillroom.objectives import fused
from stillroom.objectives.divergences import (
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
from stillroom.objectives.matching import StateMatch, hidden_cosine, hidden_mse, new_projections
from stillroom.objectives.objective import Objective, WeightedTerm, backward_chunked, sums_chunked
from stillroom.targets.kinds import DrawnTargets, FullTargets, HiddenTargets, SampledTargets, Targets, TeacherHead, TextTargets, TopKTargets
from stillroom.targets.protocols import StepSums

ROWS, SIZE, WIDTH, TEACHER_WIDTH = 23, 37, 8, 5
DIVERGENCES: list[Divergence] = [
    forward_kl(),
    reverse_kl(),
    generalized_jsd(0.5),
    generalized_jsd(0.1),
    skew_forward_kl(0.1),
    skew_reverse_kl(0.3),
    total_variation(),
    alpha_beta(0.5, 0.5),
    alpha_beta(0.3, 0.2),
    alpha_beta(1.5, 0.75),
    alpha_beta(0.0, 0.8),
    alpha_beta(0.7, 0.0),
    cross_entropy(),
]
ORACLES: dict[str, Callable[[list[float], list[float]], float]] = {
    "forward_kl": oracle.forward_kl,
    "reverse_kl": oracle.reverse_kl,
    "generalized_jsd(0.5)": lambda p, q: oracle.generalized_jsd(p, q, 0.5),
    "generalized_jsd(0.1)": lambda p, q: oracle.generalized_jsd(p, q, 0.1),
    "skew_forward_kl(0.1)": lambda p, q: oracle.skew_forward_kl(p, q, 0.1),
    "skew_reverse_kl(0.3)": lambda p, q: oracle.skew_reverse_kl(p, q, 0.3),
    "total_variation": oracle.total_variation,
    "alpha_beta(0.5,0.5)": lambda p, q: oracle.alpha_beta(p, q, 0.5, 0.5),
    "alpha_beta(0.3,0.2)": lambda p, q: oracle.alpha_beta(p, q, 0.3, 0.2),
    "alpha_beta(1.5,0.75)": lambda p, q: oracle.alpha_beta(p, q, 1.5, 0.75),
    "alpha_beta(0,0.8)": lambda p, q: oracle.alpha_beta(p, q, 0.0, 0.8),
    "alpha_beta(0.7,0)": lambda p, q: oracle.alpha_beta(p, q, 0.7, 0.0),
}


def named(value: object) -> str:
    return value if isinstance(value, str) else str(getattr(value, "name", value))


KINDS = ("hidden", "full", "top_k", "every_id", "drawn", "text", "sampled")
PAIRS = [(d, kind) for d in DIVERGENCES for kind in KINDS if {"every_id": "top_k", "sampled": "text"}.get(kind, kind) in d.kinds]
EACH_PAIR = pytest.mark.parametrize(("divergence", "kind"), PAIRS, ids=named)


@dataclass(frozen=True)
class Head:
    """As models.loading.OutputHead."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, states_RD: Tensor) -> Tensor:
        logits_RV: Tensor = self.module(states_RD)
        if self.softcap is not None:
            logits_RV = self.softcap * torch.tanh(logits_RV / self.softcap)
        return logits_RV * self.scale


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.6},
    "softcap": {"softcap": 3.0},
    "padded": {"padded": 4, "bias": True},
    "everything": {"padded": 4, "bias": True, "scale": 1.7, "softcap": 2.0},
}
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def head_of(*, bias: bool = False, scale: float = 1.0, softcap: float | None = None, padded: int = 0, dtype: torch.dtype = torch.float32) -> Head:
    torch.manual_seed(3)
    return Head(nn.Linear(WIDTH, SIZE + padded, bias=bias).to(dtype), scale, softcap)


def hidden_of(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    return 2.0 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def labels_of(rows: int = ROWS) -> TextTargets:
    return TextTargets(vocabulary="v", token_ids_R=torch.randint(SIZE, (rows,), generator=torch.Generator().manual_seed(5)))


def teacher_head_of(dtype: torch.dtype, shape: dict[str, Any]) -> TeacherHead:
    generator = torch.Generator().manual_seed(2)
    weight_VD = torch.randn(SIZE, TEACHER_WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    bias_V = torch.randn(SIZE, generator=generator, dtype=torch.float64).to(dtype) if shape.get("bias") else None
    return TeacherHead(weight_VD=weight_VD, bias_V=bias_V, scale=shape.get("scale", 1.0), softcap=shape.get("softcap"))


def targets_of(
    kind: str, temperature: float = 1.0, rows: int = ROWS, dtype: torch.dtype = torch.float32, shape: dict[str, Any] | None = None
) -> Targets:
    """All kinds are of one teacher."""
    generator = torch.Generator().manual_seed(11)
    head = teacher_head_of(dtype, shape or {})
    states_RD = torch.randn(rows, TEACHER_WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "hidden":
        return HiddenTargets(vocabulary="v", temperature=1.0, states_RD=states_RD, head=head)
    logits = Head(_linear(head), head.scale, head.softcap)(states_RD.double()).detach()
    log_probs_RV = torch.log_softmax(logits / temperature, dim=-1)
    if kind == "full":
        return FullTargets(vocabulary="v", temperature=temperature, log_probs_RV=log_probs_RV.to(dtype))
    if kind in ("top_k", "every_id"):
        kept_RK, ids_RK = log_probs_RV.topk(6 if kind == "top_k" else SIZE)
        tail_R = log_probs_RV.scatter(-1, ids_RK, -torch.inf).logsumexp(-1).to(dtype)
        return TopKTargets(vocabulary="v", temperature=temperature, ids_RK=ids_RK.int(), log_probs_RK=kept_RK.to(dtype), tail_log_mass_R=tail_R)
    if kind == "drawn":
        counts_RV = torch.zeros(rows, SIZE, dtype=torch.int32)
        ids_RN = torch.multinomial(log_probs_RV.exp(), 20, replacement=True, generator=generator)
        counts_RV.scatter_add_(1, ids_RN, torch.ones_like(ids_RN, dtype=torch.int32))
        row_of_U, ids_U = counts_RV.nonzero(as_tuple=True)
        return DrawnTargets(
            vocabulary="v",
            temperature=temperature,
            draws=20,
            offsets_R1=torch.cat([torch.zeros(1, dtype=torch.int64), (counts_RV > 0).sum(1).cumsum(0)]),
            ids_U=ids_U.int(),
            counts_U=counts_RV[row_of_U, ids_U],
            entropy_R=-(log_probs_RV.exp() * log_probs_RV).sum(-1).float(),
        )
    labels = labels_of(rows)
    if kind == "sampled":
        return SampledTargets(vocabulary="v", temperature=temperature, token_ids_R=labels.token_ids_R, log_probs_R=torch.zeros(rows))
    return labels


def _linear(head: TeacherHead) -> nn.Linear:
    linear = nn.Linear(TEACHER_WIDTH, SIZE, bias=head.bias_V is not None, dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(head.weight_VD)
    if head.bias_V is not None:
        linear.bias.copy_(head.bias_V)
    return linear


@dataclass
class Result:
    sums: StepSums
    gradients: dict[str, Tensor]


def run(
    head: Head | nn.Module,
    goal: Objective,
    targets: Targets,
    *,
    by_autograd: bool = False,
    rows_per_chunk: int = 7,
    weights_R: Tensor | None = None,
    divide_by: float = 17.0,
    projections: nn.ModuleDict | None = None,
    hidden_RD: Tensor | None = None,
) -> Result:
    """Sums and gradients: of the states, of the head, of projections. `by_autograd`: the same through a head that is not known for what it is."""
    module = head.module if isinstance(head, Head) else head
    hidden_RD = hidden_of(dtype=next(module.parameters()).dtype) if hidden_RD is None else hidden_RD
    gradient_RD, sums = backward_chunked(
        hidden_RD,
        (lambda states_RD: head(states_RD)) if by_autograd else head,
        size=SIZE,
        objective=goal,
        targets=targets,
        labels=labels_of(len(hidden_RD)),
        divide_by=divide_by,
        rows_per_chunk=rows_per_chunk,
        weights_R=weights_R,
        projections=projections,
    )
    named = [*module.named_parameters(), *(projections or nn.ModuleDict()).named_parameters(prefix="projections")]
    return Result(sums, {"states": gradient_RD} | {name: p.grad.clone() for name, p in named if p.grad is not None})


def assert_same(one: Result, other: Result, relative: float = 1e-5) -> None:
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in other.gradients.items():
        assert (one.gradients[name] - gradient).norm() <= relative * gradient.norm(), name
    assert one.sums.terms_nats == pytest.approx(other.sums.terms_nats, rel=relative, abs=1e-6)
    assert one.sums.objective_nats == pytest.approx(other.sums.objective_nats, rel=relative, abs=1e-6)
    assert (one.sums.scored_tokens, one.sums.scored_weight) == (other.sums.scored_tokens, other.sums.scored_weight)


def only(*divergences: Divergence | StateMatch, **settings: Any) -> Objective:
    weights = (1.0, 0.25, 3.0, 0.5, 2.0)
    return Objective(terms=tuple(WeightedTerm(divergence=d, weight=w) for d, w in zip(divergences, weights, strict=False)), **settings)


@pytest.fixture
def no_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails if anything is computed by autograd: what it looks at is the fused path."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("not fused")

    monkeypatch.setattr(Objective, "rows", refuse)


# -- the same function --------------------------------------------------------------------------------------------------


@EACH_PAIR
@EACH_SHAPE
@pytest.mark.parametrize("weighted", [False, True])
def test_fused_is_autograd(divergence: Divergence, kind: str, shape: dict[str, Any], weighted: bool) -> None:
    """Value and every gradient, in float32, with a last chunk of another size; a row of weight 0 among the weighted."""
    goal, targets = only(divergence), targets_of(kind, shape=shape)
    weights_R = (torch.arange(ROWS) % 4).float() if weighted else None
    one = run(head_of(**shape), goal, targets, weights_R=weights_R)
    other = run(head_of(**shape), goal, targets, by_autograd=True, weights_R=weights_R)
    assert_same(one, other)


@pytest.mark.parametrize(("divergence", "kind"), [(d, kind) for d, kind in PAIRS if d.name in ORACLES and kind != "drawn"], ids=named)
def test_fused_is_the_definition(divergence: Divergence, kind: str, no_autograd: None) -> None:
    """In float64: the value against the oracle, and each gradient against differences of the oracle's value."""
    shape: dict[str, Any] = {"bias": True, "scale": 1.3, "softcap": 4.0}
    rows, temperature = 3, 2.0 if kind in ("hidden", "full") else 1.0
    targets = targets_of(kind, rows=rows, dtype=torch.float64, shape=shape)
    hidden_RD = hidden_of(rows, torch.float64)
    head = head_of(dtype=torch.float64, **shape)
    found = run(head, only(divergence, match_temperature=temperature), targets, hidden_RD=hidden_RD, rows_per_chunk=2, divide_by=1.0)

    teacher = teacher_head_of(torch.float64, shape)
    hidden = targets_of("hidden", rows=rows, dtype=torch.float64)
    assert isinstance(hidden, HiddenTargets)
    assert isinstance(head.module, nn.Linear)
    p = oracle.head(hidden.states_RD.numpy(), teacher.weight_VD.numpy(), teacher.bias_V.numpy(), teacher.scale, teacher.softcap)
    kept = [row.tolist() for row in targets.ids_RK] if isinstance(targets, TopKTargets) and kind == "top_k" else [range(SIZE)] * rows

    def value(states_RD: numpy.ndarray, bias_V: numpy.ndarray) -> float:
        assert isinstance(head.module, nn.Linear)
        q = oracle.head(states_RD, head.module.weight.detach().numpy(), bias_V, head.scale, head.softcap)
        softened = zip(p, q, kept, strict=True)
        of = ORACLES[divergence.name]
        return math.fsum(
            of(oracle.coarsen(oracle.softmax(a, temperature), ids), oracle.coarsen(oracle.softmax(b, temperature), ids)) for a, b, ids in softened
        )

    states, bias = hidden_RD.numpy(), head.module.bias.detach().numpy()
    assert found.sums.objective_nats == pytest.approx(value(states, bias), rel=1e-9)
    rng = numpy.random.default_rng(0)
    step = 1e-5
    for name, changed in (("states", states), ("bias", bias)):
        direction = rng.standard_normal(changed.shape)
        up, down = changed + step * direction, changed - step * direction
        slope = (value(up, bias) - value(down, bias)) if name == "states" else (value(states, up) - value(states, down))
        assert float((found.gradients[name].numpy() * direction).sum()) == pytest.approx(slope / (2 * step), rel=1e-5, abs=1e-8), name
    # The weights' gradient is that of the logits times the states, as the bias's is that of the logits times 1.
    assert found.gradients["weight"].shape == (SIZE, WIDTH)


def test_cross_entropy_is_the_definition(no_autograd: None) -> None:
    head = head_of(dtype=torch.float64, bias=True)
    found = run(head, only(cross_entropy()), labels_of(), divide_by=1.0)
    logits_RV = head(hidden_of(dtype=torch.float64)).detach()
    labels = labels_of().token_ids_R.tolist()
    assert found.sums.objective_nats == pytest.approx(
        math.fsum(oracle.cross_entropy(token, oracle.softmax(row.tolist())) for row, token in zip(logits_RV, labels, strict=True)), rel=1e-12
    )
    expected_RV = torch.softmax(logits_RV, dim=-1) - nn.functional.one_hot(labels_of().token_ids_R, SIZE)
    torch.testing.assert_close(found.gradients["weight"], expected_RV.T @ hidden_of(dtype=torch.float64))
    torch.testing.assert_close(found.gradients["bias"], expected_RV.sum(0))


MIXTURES = {
    "hidden": (forward_kl(), cross_entropy(), generalized_jsd(0.3), total_variation(), hidden_mse()),
    "full": (reverse_kl(), cross_entropy(), skew_reverse_kl(), alpha_beta(1.0, 1.0)),
    "top_k": (forward_kl(), cross_entropy(), reverse_kl(), skew_forward_kl()),
    "every_id": (forward_kl(), cross_entropy(), total_variation()),
    "drawn": (forward_kl(), cross_entropy()),
    "text": (cross_entropy(),),
}


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("squared", [False, True])
@EACH_SHAPE
def test_sums_of_terms_at_any_temperature(kind: str, temperature: float, squared: bool, shape: dict[str, Any]) -> None:
    """Cross-entropy stays at temperature 1 beside terms that are softened; full targets made at 1 are softened further."""
    goal = only(*MIXTURES[kind], match_temperature=temperature, scale_by_temperature_squared=squared)
    targets = targets_of(kind, 1.0 if kind == "full" else temperature, shape=shape)
    weights_R = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    results = []
    for by_autograd in (False, True):
        projections = new_projections(goal.state_matches, student_width=WIDTH, teacher_width=TEACHER_WIDTH, seed=1)
        results.append(run(head_of(**shape), goal, targets, by_autograd=by_autograd, weights_R=weights_R, projections=projections))
    assert_same(*results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 22, 23, 1000])
def test_chunks_and_blocks_change_nothing(kind: str, rows_per_chunk: int, no_autograd: None, monkeypatch: pytest.MonkeyPatch) -> None:
    divergences = (cross_entropy(),) if kind in ("text", "sampled") else (forward_kl(), cross_entropy())
    goal = only(*divergences)
    whole = run(head_of(bias=True), goal, targets_of(kind), rows_per_chunk=ROWS)
    monkeypatch.setattr(fused, "BLOCK_VALUES", 4 * SIZE)
    assert_same(run(head_of(bias=True), goal, targets_of(kind), rows_per_chunk=rows_per_chunk), whole)


@pytest.mark.parametrize("kind", ["hidden", "top_k", "drawn", "text"])
def test_runs_are_equal_to_the_bit(kind: str, no_autograd: None) -> None:
    goal = only(cross_entropy()) if kind == "text" else only(forward_kl(), cross_entropy())
    one, other = (run(head_of(bias=True, softcap=3.0), goal, targets_of(kind)) for _ in range(2))
    assert one.sums == other.sums
    assert all(torch.equal(gradient, other.gradients[name]) for name, gradient in one.gradients.items())


@EACH_PAIR
def test_sums_alone_are_the_same_sums(divergence: Divergence, kind: str, no_autograd: None) -> None:
    head, targets = head_of(softcap=2.0), targets_of(kind)
    weights_R = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    sums = sums_chunked(
        hidden_of(), head, size=SIZE, objective=only(divergence), targets=targets, labels=labels_of(), rows_per_chunk=7, weights_R=weights_R
    )
    assert head.module.weight.grad is None
    assert sums == run(head, only(divergence), targets, weights_R=weights_R).sums


# -- gradients where they belong ----------------------------------------------------------------------------------------


def test_gradients_are_added_to_what_is_there(no_autograd: None) -> None:
    """To the tensors themselves, tied weights among them; padding rows get exactly nothing."""
    head = head_of(padded=4, bias=True)
    embedding = nn.Embedding(SIZE + 4, WIDTH)
    embedding.weight = head.module.weight  # type: ignore[assignment]
    alone = run(head, only(forward_kl()), targets_of("hidden"))
    weight_grad, bias_grad = embedding.weight.grad, head.module.bias.grad
    assert isinstance(weight_grad, Tensor)
    assert isinstance(bias_grad, Tensor)
    assert (weight_grad[SIZE:] == 0).all()
    assert (bias_grad[SIZE:] == 0).all()
    twice = run(head, only(forward_kl()), targets_of("hidden"))
    assert embedding.weight.grad is weight_grad
    assert head.module.bias.grad is bias_grad
    assert (weight_grad[SIZE:] == 0).all()
    for name in ("weight", "bias"):
        torch.testing.assert_close(twice.gradients[name], 2 * alone.gradients[name])
    torch.testing.assert_close(twice.gradients["states"], alone.gradients["states"])


def test_a_frozen_head_gets_no_gradient_and_lets_it_through(no_autograd: None) -> None:
    frozen, free = head_of(bias=True), head_of(bias=True)
    frozen.module.requires_grad_(False)
    one, other = run(frozen, only(forward_kl()), targets_of("hidden")), run(free, only(forward_kl()), targets_of("hidden"))
    assert set(one.gradients) == {"states"}
    assert torch.equal(one.gradients["states"], other.gradients["states"])


def test_what_is_given_is_left_alone(no_autograd: None) -> None:
    for kind in KINDS:
        goal = only(cross_entropy()) if kind in ("text", "sampled") else only(forward_kl(), cross_entropy())
        head, targets, hidden_RD = head_of(bias=True, softcap=2.0), targets_of(kind, shape=SHAPES["everything"]), hidden_of()
        tensors = [head.module.weight, head.module.bias, hidden_RD]
        tensors += [leaf for leaf in tree_leaves(vars_of(targets)) if isinstance(leaf, Tensor)]
        before = [tensor.detach().clone() for tensor in tensors]
        run(head, goal, targets, hidden_RD=hidden_RD)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True)), kind


def vars_of(value: Any) -> Any:
    names = getattr(value, "__dataclass_fields__", None)
    return value if names is None else [vars_of(getattr(value, name)) for name in names]


# -- the ends of the scale ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if "full" in d.kinds], ids=named)
@pytest.mark.parametrize("spread", [1.0, 40.0, 150.0])
def test_ids_without_probability_and_students_far_away(divergence: Divergence, spread: float) -> None:
    """Teachers that exclude ids, students whose probabilities underflow: finite, and autograd's."""
    generator = torch.Generator().manual_seed(4)
    log_probs_RV = torch.log_softmax(spread * torch.randn(ROWS, SIZE, generator=generator), dim=-1)
    log_probs_RV[:, 3:9] = -torch.inf
    targets = FullTargets(vocabulary="v", temperature=1.0, log_probs_RV=torch.log_softmax(log_probs_RV, dim=-1))
    heads = [head_of(scale=spread) for _ in range(2)]
    one, other = run(heads[0], only(divergence), targets), run(heads[1], only(divergence), targets, by_autograd=True)
    assert all(gradient.isfinite().all() for gradient in one.gradients.values())
    assert_same(one, other, relative=1e-4 if spread > 1 else 1e-5)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if "top_k" in d.kinds], ids=named)
@pytest.mark.parametrize(("dtype", "gap", "relative"), [(torch.float32, 200.0, 1e-4), (torch.float64, 1000.0, 1e-9)], ids=named)
def test_a_tail_that_underflows_keeps_its_logarithm(divergence: Divergence, dtype: torch.dtype, gap: float, relative: float) -> None:
    """The student puts e^-200 on all that the teacher's kept ids are not: no float32, but its logarithm is one. (A logit of 200 has a ulp of 2e-5.)"""
    targets = targets_of("top_k", dtype=dtype)
    assert isinstance(targets, TopKTargets)
    same = replace(targets, ids_RK=targets.ids_RK[:1].expand(ROWS, -1).contiguous())
    results = []
    for by_autograd in (False, True):
        head = head_of(bias=True, dtype=dtype)
        with torch.no_grad():
            head.module.bias[same.ids_RK[0].long()] += gap  # type: ignore[index]
        results.append(run(head, only(divergence), same, by_autograd=by_autograd))
    assert all(gradient.isfinite().all() for gradient in results[0].gradients.values())
    assert_same(*results, relative=relative)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if "hidden" in d.kinds], ids=named)
def test_zero_with_zero_gradient_at_equality(divergence: Divergence, no_autograd: None) -> None:
    head = head_of(bias=True, softcap=3.0)
    teacher = TeacherHead(weight_VD=head.module.weight.detach(), bias_V=head.module.bias.detach(), softcap=3.0)
    found = run(head, only(divergence), HiddenTargets(vocabulary="v", temperature=1.0, states_RD=hidden_of(), head=teacher), divide_by=1.0)
    assert abs(found.sums.objective_nats) < 1e-5
    assert all(gradient.abs().max() < 1e-5 for gradient in found.gradients.values())


# -- what is fused and what is not --------------------------------------------------------------------------------------


def test_no_rows_leave_no_gradient() -> None:
    head = head_of()
    found = run(head, only(forward_kl()), targets_of("hidden", rows=0), hidden_RD=hidden_of(0))
    assert found.sums.objective_nats == 0.0
    assert set(found.gradients) == {"states"}


class LowRank(nn.Linear):
    """A subclass of nn.Linear, as adapters are."""

    def __init__(self) -> None:
        super().__init__(WIDTH, SIZE)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, SIZE, bias=False)

    def forward(self, states_RD: Tensor) -> Tensor:
        logits: Tensor = super().forward(states_RD) + self.up(self.down(states_RD))
        return logits


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _hooked() -> nn.Module:
    module = nn.Linear(WIDTH, SIZE)
    module.register_forward_hook(lambda _, __, logits: 2 * logits)
    return module


def _parametrised() -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(WIDTH, SIZE), "weight", Doubled())


@pytest.mark.parametrize("make", [LowRank, _hooked, _parametrised])
def test_heads_that_do_more_than_their_weights_say_go_by_autograd(make: Callable[[], nn.Module]) -> None:
    results = []
    for by_autograd in (False, True):
        torch.manual_seed(0)
        module = make()
        assert fused.linear_head(Head(module)) is None
        results.append(run(Head(module), only(forward_kl(), cross_entropy()), targets_of("hidden"), by_autograd=by_autograd))
    assert_same(*results, relative=0.0)


def test_a_plain_linear_layer_is_a_head(no_autograd: None) -> None:
    bare, dressed = head_of(bias=True).module, head_of(bias=True)
    assert_same(run(bare, only(forward_kl()), targets_of("hidden")), run(dressed, only(forward_kl()), targets_of("hidden")), relative=0.0)


def test_a_term_without_a_closed_form_goes_by_autograd() -> None:
    own = Divergence(name="own", kinds=("hidden", "full"), nats=reverse_kl().nats)
    assert_same(run(head_of(), only(own), targets_of("hidden")), run(head_of(), only(own), targets_of("hidden"), by_autograd=True), relative=0.0)


def test_distances_between_states_are_beside_the_head(no_autograd: None) -> None:
    goal = only(forward_kl(), hidden_cosine())
    projections = new_projections(goal.state_matches, student_width=WIDTH, teacher_width=TEACHER_WIDTH, seed=1)
    found = run(head_of(), goal, targets_of("hidden"), projections=projections)
    assert set(found.gradients) == {"states", "weight", "projections.hidden_cosine.weight"}
    assert list(found.sums.terms_nats) == ["forward_kl", "hidden_cosine"]


@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16])
def test_half_precision_students_go_by_autograd(student: torch.dtype) -> None:
    """Autocast, as the engine uses it, and weights in bfloat16: the product is bfloat16, the divergence float32, as it was."""
    results = []
    for by_autograd in (False, True):
        head = head_of(bias=True, dtype=student)
        with torch.autocast("cpu", torch.bfloat16, enabled=student == torch.float32):
            results.append(run(head, only(forward_kl()), targets_of("hidden"), by_autograd=by_autograd))
    assert_same(*results, relative=0.0)


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.float16])
def test_a_teacher_whose_head_is_in_another_type_is_widened(
    states: torch.dtype, weights: torch.dtype, no_autograd: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = targets_of("hidden")
    assert isinstance(targets, HiddenTargets)
    narrow = replace(targets, states_RD=targets.states_RD.to(states), head=replace(targets.head, weight_VD=targets.head.weight_VD.to(weights)))
    wide = replace(targets, states_RD=narrow.states_RD.float(), head=replace(targets.head, weight_VD=narrow.head.weight_VD.float()))
    monkeypatch.setattr(fused, "_WEIGHTS_AT_ONCE", 10 * TEACHER_WIDTH)
    assert_same(run(head_of(), only(forward_kl()), narrow), run(head_of(), only(forward_kl()), wide), relative=1e-6)


@pytest.mark.parametrize("shape", [{}, {"bias": True, "softcap": 2.0, "scale": 0.5}], ids=["plain", "all"])
def test_a_teacher_that_computes_in_bfloat16_is_multiplied_in_it(shape: dict[str, Any], no_autograd: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused and by autograd alike, and no further from the product in float32 than the rounding of its logits."""
    targets = targets_of("hidden", shape=shape)
    assert isinstance(targets, HiddenTargets)
    head = targets.head
    bias_V = None if head.bias_V is None else head.bias_V.bfloat16()
    half = replace(targets, states_RD=targets.states_RD.bfloat16(), head=replace(head, weight_VD=head.weight_VD.bfloat16(), bias_V=bias_V))
    wide_bias_V = None if bias_V is None else bias_V.float()
    wide = replace(half, states_RD=half.states_RD.float(), head=replace(half.head, weight_VD=half.head.weight_VD.float(), bias_V=wide_bias_V))
    monkeypatch.setattr(fused, "_WEIGHTS_AT_ONCE", 10 * TEACHER_WIDTH)
    found, expected = (run(head_of(), only(forward_kl()), one) for one in (half, wide))
    assert found.sums.objective_nats != expected.sums.objective_nats
    assert_same(found, expected, relative=2**-6)
    by_autograd = teacher_log_probs_RV(half, 1.0, torch.float32)
    assert by_autograd.dtype == torch.float32
    assert not torch.equal(by_autograd, teacher_log_probs_RV(wide, 1.0, torch.float32))
    torch.testing.assert_close(by_autograd, teacher_log_probs_RV(wide, 1.0, torch.float32), atol=0.05, rtol=2**-7)


def test_a_bfloat16_teacher_is_the_same_fused_and_by_autograd() -> None:
    targets = targets_of("hidden")
    assert isinstance(targets, HiddenTargets)
    half = replace(targets, states_RD=targets.states_RD.bfloat16(), head=replace(targets.head, weight_VD=targets.head.weight_VD.bfloat16()))
    assert_same(run(head_of(), only(forward_kl()), half), run(head_of(), only(forward_kl()), half, by_autograd=True), relative=1e-4)


def test_a_live_teachers_tensors_may_come_from_inference_mode(no_autograd: None) -> None:
    for kind in ("hidden", "full", "top_k"):
        with torch.inference_mode():
            targets = targets_of(kind)
        assert_same(run(head_of(), only(forward_kl()), targets), run(head_of(), only(forward_kl()), targets_of(kind)), relative=0.0)


# -- memory -------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most numbers in one tensor's storage that was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self.numbers = max(self.numbers, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return made


@pytest.mark.parametrize(("divergence", "kind"), [(d, k) for d, k in PAIRS if k in ("hidden", "top_k", "drawn", "text")], ids=named)
def test_no_tensor_is_larger_than_a_chunk_of_logits(divergence: Divergence, kind: str, no_autograd: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of at most 6 rows by memory, whatever was asked for: neither 300 rows nor a whole vocabulary of them at once, nor a second gradient."""
    monkeypatch.setattr(fused, "BUFFER_BYTES", 2 * 6 * SIZE * 4)
    monkeypatch.setattr(fused, "BLOCK_VALUES", 2 * SIZE)
    peaks = []
    for rows in (60, 300):
        head = head_of(bias=True)
        # What there is before: the gradient, which grows in place.
        for parameter in head.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        targets, hidden_RD = targets_of(kind, rows=rows), hidden_of(rows)
        with Largest() as largest, LiveBytes(torch.device("cpu")) as live:
            backward_chunked(
                hidden_RD,
                head,
                size=SIZE,
                objective=only(divergence),
                targets=targets,
                labels=labels_of(rows),
                divide_by=1.0,
                rows_per_chunk=2048,
            )
        # The gradient of the states and the listed ids are all that has every row.
        of_rows = max(rows * WIDTH, len(targets.ids_U) if isinstance(targets, DrawnTargets) else 0)
        assert largest.numbers <= max(of_rows, (6 if kind == "hidden" else 12) * SIZE)
        peaks.append(live.peak - 8 * of_rows)
    assert peaks[1] <= peaks[0] + 240 * 128, "flat in rows, but for a few numbers for each"


def test_chunks_share_the_rows_evenly() -> None:
    targets = targets_of("hidden")
    size = 151_936
    assert fused.chunks_of(512, size, targets, torch.float32, 2048) == [(0, 171), (171, 342), (342, 512)]
    assert fused.chunks_of(512, size, targets_of("text"), torch.float32, 2048) == [(0, 256), (256, 512)]
    assert fused.chunks_of(10, SIZE, targets, torch.float32, 4) == [(0, 4), (4, 7), (7, 10)]
    assert fused.chunks_of(0, SIZE, targets, torch.float32, 4) == []
    assert fused.chunks_of(2, 10**9, targets, torch.float32, 4) == [(0, 1), (1, 2)]
