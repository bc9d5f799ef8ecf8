"""Hidden states as a term of an objective: value, gradient, the learned projection, and how the student keeps it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

from helpers import tiny_model
from stillroom.core.errors import RunError, StillroomError
from stillroom.core.identities import TokenSequence
from stillroom.models.local import text_targets
from stillroom.models.student import OptimiserSettings, TransformersStudent
from stillroom.objectives.divergences import cross_entropy, forward_kl
from stillroom.objectives.matching import STATE_MATCHES, StateMatch, hidden_cosine, hidden_mse, new_projections
from stillroom.objectives.objective import Objective, WeightedTerm, backward_chunked, sums_chunked
from stillroom.targets.kinds import TARGET_KINDS, FullTargets, HiddenTargets, TeacherHead, TextTargets
from stillroom.targets.protocols import Batch
from stillroom.targets.vocabulary import Vocabulary

ROWS, SIZE, STUDENT_WIDTH, TEACHER_WIDTH = 11, 13, 6, 9
EACH = pytest.mark.parametrize("make", STATE_MATCHES.values(), ids=STATE_MATCHES.keys())


def oracle_mse(projected: numpy.ndarray, teacher: numpy.ndarray) -> float:
    return math.fsum((a - b) ** 2 for a, b in zip(projected.tolist(), teacher.tolist(), strict=True)) / len(teacher)


def oracle_cosine(projected: numpy.ndarray, teacher: numpy.ndarray) -> float:
    inner, *squares = (math.fsum((a * b).tolist()) for a, b in ((projected, teacher), (projected, projected), (teacher, teacher)))
    return 1 - inner / math.sqrt(squares[0] * squares[1])


ORACLES: dict[str, Callable[[numpy.ndarray, numpy.ndarray], float]] = {"hidden_mse": oracle_mse, "hidden_cosine": oracle_cosine}


def states_of(width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def targets_of(states_RD: Tensor) -> HiddenTargets:
    weight_VD = torch.randn(SIZE, states_RD.shape[1], generator=torch.Generator().manual_seed(7), dtype=states_RD.dtype)
    return HiddenTargets(vocabulary="v", temperature=1.0, states_RD=states_RD, head=TeacherHead(weight_VD=weight_VD))


def objective_of(*terms: object) -> Objective:
    return Objective(terms=tuple(WeightedTerm(divergence=term, weight=1.0 / (1 + place)) for place, term in enumerate(terms)))


LABELS = TextTargets(vocabulary="v", token_ids_R=torch.arange(ROWS) % SIZE)


# -- value and gradient ---------------------------------------------------------------------------------------------------


@EACH
def test_value_is_the_definition_and_the_gradient_that_of_the_value(make: Callable[..., StateMatch]) -> None:
    match = make()
    projections = new_projections([match], student_width=STUDENT_WIDTH, teacher_width=TEACHER_WIDTH, seed=3).double()
    states_RD, targets = states_of(STUDENT_WIDTH, 1), targets_of(states_of(TEACHER_WIDTH, 2))
    weight_ED = projections[match.name].weight.detach().numpy()
    expected_R = [
        ORACLES[match.name](weight_ED @ state, teacher) for state, teacher in zip(states_RD.numpy(), targets.states_RD.numpy(), strict=True)
    ]
    assert match.compare_R(states_RD, targets, projections).tolist() == pytest.approx(expected_R, rel=1e-10)
    narrow = match.compare_R(states_RD.float(), targets, projections.float())
    assert narrow.dtype == torch.float32
    assert narrow.tolist() == pytest.approx(expected_R, rel=1e-5)

    def value(states_RD: Tensor, weight_ED: Tensor) -> Tensor:
        return torch.func.functional_call(Term(match, projections), {"projections." + match.name + ".weight": weight_ED}, (states_RD, targets))

    projections.double()
    assert torch.autograd.gradcheck(value, (states_RD.requires_grad_(), projections[match.name].weight))


class Term(nn.Module):
    def __init__(self, match: StateMatch, projections: nn.ModuleDict) -> None:
        super().__init__()
        self.match, self.projections = match, projections

    def forward(self, states_RD: Tensor, targets: HiddenTargets) -> Tensor:
        return self.match.compare_R(states_RD, targets, self.projections)


@EACH
@pytest.mark.parametrize("learned", [True, False])
def test_zero_value_and_gradient_at_equality(make: Callable[..., StateMatch], learned: bool) -> None:
    """Where the projected states are the teacher's; without a projection, where the states are."""
    match = make(learned=learned)
    projections = new_projections([match], student_width=STUDENT_WIDTH, teacher_width=STUDENT_WIDTH, seed=0)
    states_RD = states_of(STUDENT_WIDTH, 1, torch.float32).requires_grad_()
    with torch.no_grad():
        teacher_RD = projections[match.name](states_RD) if learned else states_RD.clone()
    value_R = match.compare_R(states_RD, targets_of(teacher_RD), projections)
    value_R.sum().backward()
    gradients = [states_RD.grad, *(parameter.grad for parameter in projections.parameters())]
    assert value_R.abs().max().item() < 1e-6
    assert all(gradient is not None and gradient.abs().max().item() < 3e-6 for gradient in gradients)


def test_cosine_does_not_see_lengths_and_mse_does() -> None:
    states_RD, targets = states_of(TEACHER_WIDTH, 1), targets_of(states_of(TEACHER_WIDTH, 2))
    for match, changes in ((hidden_cosine(learned=False), False), (hidden_mse(learned=False), True)):
        once_R, longer_R = (match.compare_R(factor * states_RD, targets, None) for factor in (1.0, 3.0))
        assert torch.allclose(once_R, longer_R) != changes
    opposite_R = hidden_cosine(learned=False).compare_R(-targets.states_RD, targets, None)
    torch.testing.assert_close(opposite_R, torch.full((ROWS,), 2.0, dtype=torch.float64))


@EACH
def test_states_made_in_inference_mode_can_be_learned_from(make: Callable[..., StateMatch]) -> None:
    match, states_RD = make(learned=False), states_of(STUDENT_WIDTH, 1, torch.float32)
    with torch.inference_mode():
        live = targets_of(states_of(STUDENT_WIDTH, 2, torch.float32))
    assert live.states_RD.is_inference()
    gradients = []
    for targets in (live, targets_of(states_of(STUDENT_WIDTH, 2, torch.float32))):
        student_RD = states_RD.clone().requires_grad_()
        match.compare_R(student_RD, targets, None).sum().backward()
        gradients.append(student_RD.grad)
    assert torch.equal(*gradients)


# -- in an objective --------------------------------------------------------------------------------------------------------


class Head(nn.Linear):
    def __init__(self) -> None:
        super().__init__(STUDENT_WIDTH, SIZE)
        torch.nn.init.normal_(self.weight, generator=torch.Generator().manual_seed(4))
        torch.nn.init.zeros_(self.bias)


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunked_is_whole_for_states_head_and_projections(rows_per_chunk: int, weighted: bool) -> None:
    goal = objective_of(forward_kl(), hidden_mse(), cross_entropy(), hidden_cosine())
    targets = targets_of(states_of(TEACHER_WIDTH, 2, torch.float32))
    weights_R = torch.arange(ROWS).float() if weighted else None
    results = []
    for whole in (True, False):
        head = Head()
        projections = new_projections(goal.state_matches, student_width=STUDENT_WIDTH, teacher_width=TEACHER_WIDTH, seed=3)
        states_RD = states_of(STUDENT_WIDTH, 1, torch.float32).requires_grad_()
        if whole:
            total_R, terms_R = goal.rows(head(states_RD), targets, LABELS, states_RD=states_RD, projections=projections)
            each_R = torch.ones(ROWS) if weights_R is None else weights_R
            ((total_R * each_R).sum() / 5).backward()
            terms = {name: (nats_R * each_R).sum().item() for name, nats_R in terms_R.items()}
            gradient_RD = states_RD.grad
        else:
            gradient_RD, sums = backward_chunked(
                states_RD.detach(),
                head,
                size=SIZE,
                objective=goal,
                targets=targets,
                labels=LABELS,
                divide_by=5,
                rows_per_chunk=rows_per_chunk,
                weights_R=weights_R,
                projections=projections,
            )
            terms = sums.terms_nats
        results.append((terms, [gradient_RD, *(parameter.grad for parameter in (*head.parameters(), *projections.parameters()))]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()
        assert one.norm() > 0


def test_temperature_does_not_act_on_states() -> None:
    goal = replace(objective_of(hidden_mse(learned=False)), match_temperature=3.0, scale_by_temperature_squared=True)
    targets, states_RD = targets_of(states_of(STUDENT_WIDTH, 2)), states_of(STUDENT_WIDTH, 1)
    total_R, terms_R = goal.rows(states_RD.new_zeros(ROWS, SIZE), targets, LABELS, states_RD=states_RD)
    assert torch.equal(total_R, terms_R["hidden_mse"])
    goal.check("hidden", 1.0)


def test_states_of_half_precision_are_widened_and_autocast_stops_before_the_projection() -> None:
    goal = objective_of(hidden_mse())
    projections = new_projections(goal.state_matches, student_width=STUDENT_WIDTH, teacher_width=TEACHER_WIDTH, seed=3)
    states_RD, targets = states_of(STUDENT_WIDTH, 1, torch.bfloat16), targets_of(states_of(TEACHER_WIDTH, 2, torch.bfloat16))
    arguments = {"size": SIZE, "objective": goal, "targets": targets, "labels": LABELS, "rows_per_chunk": 4, "projections": projections}
    with torch.autocast("cpu", torch.bfloat16):
        sums = sums_chunked(states_RD, Head(), **arguments)
    exact_R = hidden_mse().compare_R(states_RD.double(), targets, projections.double())
    assert sums.objective_nats == pytest.approx(exact_R.sum().item(), rel=1e-5)


# -- what is refused --------------------------------------------------------------------------------------------------------


@EACH
def test_states_are_asked_of_hidden_targets_alone(make: Callable[..., StateMatch]) -> None:
    goal = objective_of(forward_kl(), make())
    assert goal.required_kinds == ("hidden",)
    assert not objective_of(make()).reads_text_alone
    goal.check("hidden", 2.0)
    for kind in set(TARGET_KINDS) - {"hidden"}:
        with pytest.raises(StillroomError, match="Set targets.kind to hidden") as caught:
            goal.check(kind)
        assert caught.value.code == "targets-unsupported"


@EACH
def test_unequal_widths_need_a_projection(make: Callable[..., StateMatch]) -> None:
    make().check_widths(6, 9)
    make(learned=False).check_widths(6, 6)
    for act in (
        lambda: make(learned=False).check_widths(6, 9),
        lambda: new_projections([make(learned=False)], student_width=6, teacher_width=9, seed=0),
    ):
        with pytest.raises(StillroomError, match="6 numbers \\(student\\) and 9 \\(teacher\\)") as caught:
            act()
        assert caught.value.code == "recipe-invalid"


def test_a_new_projection_is_a_function_of_its_arguments_and_leaves_the_global_generator_alone() -> None:
    matches = (hidden_mse(), hidden_cosine(), replace(hidden_mse(learned=False), name="other"))
    before = torch.random.get_rng_state()
    one, same, other = (new_projections(matches, student_width=64, teacher_width=64, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert set(one) == {"hidden_mse", "hidden_cosine"}
    for name in one:
        assert torch.equal(one[name].weight, same[name].weight)
        assert not torch.equal(one[name].weight, other[name].weight)
        assert one[name].weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert not torch.equal(one["hidden_mse"].weight, one["hidden_cosine"].weight)


# -- in a student -----------------------------------------------------------------------------------------------------------

VOCABULARY = Vocabulary(tokens=tuple(bytes([i]) for i in range(32)), special={}, end_ids=(0,), rows=32)
GOAL = objective_of(forward_kl(), hidden_mse(), hidden_cosine())
SEQUENCES = tuple(TokenSequence(ids=(3, 1, 4, 1, 5, 9, 2 + i), answer_spans=((2, 7),)) for i in range(4))


def student_of(matches: tuple[StateMatch, ...] = GOAL.state_matches) -> TransformersStudent:
    projections = new_projections(matches, student_width=32, teacher_width=48, seed=5)
    return TransformersStudent(
        tiny_model(rows=32, seed=2), VOCABULARY, OptimiserSettings(weight_decay=0.1), rows_per_chunk=7, projections=projections
    )


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    states_RD, weight_VD = torch.randn(20, 48, generator=generator), torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    targets = HiddenTargets(vocabulary=VOCABULARY.fingerprint, temperature=1.0, states_RD=states_RD, head=TeacherHead(weight_VD=weight_VD))
    return Batch(sequences=SEQUENCES, targets=targets, labels=text_targets(SEQUENCES, VOCABULARY))


def learn(student: TransformersStudent, steps: range, goal: Objective = GOAL) -> list[float]:
    nats = []
    for step in steps:
        nats.append(student.forward_backward(batch_of(step), goal, divide_by=20).objective_nats)
        assert student.optim_step(1e-2) > 0
    return nats


def test_projections_are_learned_and_resumed_bit_for_bit_and_stay_out_of_the_model(tmp_path: Path) -> None:
    straight, stopped, resumed = student_of(), student_of(), student_of()
    fresh = new_projections(GOAL.state_matches, student_width=32, teacher_width=48, seed=5)
    learn(stopped, range(2))
    stopped.save(tmp_path / "checkpoint")
    resumed.load(tmp_path / "checkpoint")
    assert learn(straight, range(4))[2:] == learn(resumed, range(2, 4))
    straight.save(tmp_path / "one")
    resumed.save(tmp_path / "other")
    for name in ("weights.safetensors", "optimiser.safetensors", "student.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert len((tmp_path / "one" / "weights.safetensors").read_bytes()) > len((tmp_path / "one" / "optimiser.safetensors").read_bytes()) / 3
    assert straight.checkpoint_bytes == 12 * sum(p.numel() for p in (*straight.model.parameters(), *fresh.parameters()))
    learned = straight._projections
    assert not any(torch.equal(learned[name].weight, fresh[name].weight) for name in fresh)
    assert not any("projections" in name for name, _ in straight.model.named_parameters())


def test_the_gradients_norm_counts_the_projections_and_a_step_forgets_their_gradient() -> None:
    student = student_of()
    student.forward_backward(batch_of(0), GOAL, divide_by=20)
    parameters = [*student.model.parameters(), *student._projections.parameters()]
    whole = math.sqrt(sum(float(parameter.grad.norm()) ** 2 for parameter in parameters if parameter.grad is not None))
    alone = math.sqrt(sum(float(parameter.grad.norm()) ** 2 for parameter in student.model.parameters() if parameter.grad is not None))
    assert whole > alone
    assert student.optim_step(1e-3) == pytest.approx(whole, rel=1e-6)
    assert all(parameter.grad is None for parameter in parameters)


def test_a_checkpoint_without_the_projections_is_refused(tmp_path: Path) -> None:
    student_of(()).save(tmp_path)
    with pytest.raises(RunError, match="projections.hidden_mse.weight"):
        student_of().load(tmp_path)


def test_scoring_sees_the_states_too() -> None:
    student = student_of()
    scored = student.score(batch_of(0), GOAL)
    assert scored == student.forward_backward(batch_of(0), GOAL, divide_by=1)
    assert set(scored.terms_nats) == {"forward_kl", "hidden_mse", "hidden_cosine"}


def test_a_student_takes_weights_from_the_batch() -> None:
    """Gradient and sums of a batch in which the second half of the rows counts double are those of that half given twice."""
    twice, weighted = student_of(()), student_of(())
    full = FullTargets(vocabulary="v", temperature=1.0, log_probs_RV=torch.randn(20, 32, generator=torch.Generator().manual_seed(1)).log_softmax(-1))
    labels = text_targets(SEQUENCES, VOCABULARY)
    goal = objective_of(forward_kl(), cross_entropy())
    whole = Batch(sequences=SEQUENCES, targets=full, labels=labels)
    half = Batch(
        sequences=SEQUENCES[2:],
        targets=replace(full, log_probs_RV=full.log_probs_RV[10:]),
        labels=replace(labels, token_ids_R=labels.token_ids_R[10:]),
    )
    parts = [twice.forward_backward(batch, goal, divide_by=30) for batch in (whole, half)]
    batch = replace(whole, weights_R=torch.tensor([1.0] * 10 + [2.0] * 10))
    sums = weighted.forward_backward(batch, goal, divide_by=batch.scored_weight)
    assert batch.scored_weight == sums.scored_weight == 30.0
    assert sums.scored_tokens == 20
    assert sums.objective_nats == pytest.approx(sum(part.objective_nats for part in parts), rel=1e-5)
    for one, other in zip(twice.model.parameters(), weighted.model.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-5 * one.grad.norm()
    assert weighted.score(batch, goal).objective_nats == pytest.approx(sums.objective_nats, rel=1e-6)
