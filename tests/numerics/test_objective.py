"""An objective through a student's head: in chunks as in one piece, whatever the head is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy
import pytest
import torch
from torch import Tensor, nn

from stillroom.core.errors import RecipeError, StillroomError
from stillroom.core.identities import TokenSequence
from stillroom.objectives.divergences import Divergence, alpha_beta, cross_entropy, forward_kl, generalized_jsd, reverse_kl
from stillroom.objectives.objective import Objective, WeightedTerm, backward_chunked, sums_chunked
from stillroom.objectives.tensors import as_arrays
from stillroom.targets.kinds import DrawnTargets, FullTargets, HiddenTargets, Targets, TeacherHead, TextTargets, TopKTargets
from stillroom.targets.protocols import Batch
from stillroom.targets.rows import slice_targets

ROWS, SIZE, WIDTH = 23, 37, 8
KINDS = pytest.mark.parametrize("kind", ["full", "hidden", "top_k", "drawn", "text"])


def objective(*divergences: Divergence, **settings: object) -> Objective:
    weights = (1.0, 0.25, 3.0)
    return Objective(terms=tuple(WeightedTerm(divergence=d, weight=w) for d, w in zip(divergences, weights, strict=False)), **settings)  # type: ignore[arg-type]


MIXED = objective(forward_kl(), cross_entropy(), generalized_jsd(0.3))
GOALS = {"text": objective(cross_entropy()), "drawn": objective(forward_kl(), cross_entropy())}


def targets_of(kind: str, rows: int = ROWS) -> Targets:
    generator = torch.Generator().manual_seed(11)
    log_probs_RV = torch.log_softmax(3 * torch.randn(rows, SIZE, generator=generator), dim=-1)
    if kind == "full":
        return FullTargets(vocabulary="v", temperature=1.0, log_probs_RV=log_probs_RV)
    if kind == "hidden":
        weight_VD = torch.randn(SIZE, 5, generator=generator)
        return HiddenTargets(
            vocabulary="v", temperature=1.0, states_RD=torch.randn(rows, 5, generator=generator), head=TeacherHead(weight_VD=weight_VD)
        )
    if kind == "top_k":
        kept_RK, ids_RK = log_probs_RV.topk(6)
        tail_R = log_probs_RV.scatter(-1, ids_RK, -torch.inf).logsumexp(-1)
        return TopKTargets(vocabulary="v", temperature=1.0, ids_RK=ids_RK.int(), log_probs_RK=kept_RK, tail_log_mass_R=tail_R)
    if kind == "drawn":
        counts_RV = torch.zeros(rows, SIZE, dtype=torch.int32)
        ids_RN = torch.multinomial(log_probs_RV.exp(), 20, replacement=True, generator=generator) if rows else counts_RV[:, :20].long()
        counts_RV.scatter_add_(1, ids_RN, torch.ones_like(ids_RN, dtype=torch.int32))
        row_of_U, ids_U = counts_RV.nonzero(as_tuple=True)
        offsets_R1 = torch.cat([torch.zeros(1, dtype=torch.int64), (counts_RV > 0).sum(1).cumsum(0)])
        entropy_R = -(log_probs_RV.exp() * log_probs_RV).sum(-1)
        return DrawnTargets(
            vocabulary="v",
            temperature=1.0,
            draws=20,
            offsets_R1=offsets_R1,
            ids_U=ids_U.int(),
            counts_U=counts_RV[row_of_U, ids_U],
            entropy_R=entropy_R,
        )
    return labels_of(rows)


def labels_of(rows: int = ROWS) -> TextTargets:
    return TextTargets(vocabulary="v", token_ids_R=torch.randint(SIZE, (rows,), generator=torch.Generator().manual_seed(5)))


class Student(nn.Module):
    """A body and a head, whose rows may be padded beyond the vocabulary; tied: the head is the embedding, as in many small models."""

    def __init__(self, *, padded: int = 0, tied: bool = False, bias: bool = False, softcap: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(SIZE + padded, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, SIZE + padded, bias=bias)
        self.softcap = softcap
        if tied:
            self.lm_head.weight = self.embedding.weight

    def hidden(self, rows: int = ROWS) -> Tensor:
        ids = torch.arange(rows) % SIZE
        states: Tensor = torch.tanh(self.body(self.embedding(ids)))
        return states

    def head(self, states_RD: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(states_RD)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def whole(student: Student, goal: Objective, targets: Targets, labels: TextTargets, divide_by: int) -> float:
    """The plain way: all logits at once."""
    total_R, _ = goal.rows(student.head(student.hidden(len(labels.token_ids_R)))[:, :SIZE], targets, labels)
    (total_R.sum() / divide_by).backward()
    return total_R.sum().item()


def chunked(
    student: Student,
    goal: Objective,
    targets: Targets,
    labels: TextTargets,
    divide_by: float,
    rows_per_chunk: int,
    weights_R: Tensor | numpy.ndarray | None = None,
) -> float:
    hidden_RD = student.hidden(len(labels.token_ids_R))
    gradient_RD, sums = backward_chunked(
        hidden_RD.detach(),
        student.head,
        size=SIZE,
        objective=goal,
        targets=targets,
        labels=labels,
        divide_by=divide_by,
        rows_per_chunk=rows_per_chunk,
        weights_R=weights_R,
    )
    assert sums.scored_weight == (len(hidden_RD) if weights_R is None else float(weights_R.sum()))
    hidden_RD.backward(gradient_RD)
    return sums.objective_nats


def gradients(student: Student) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], relative: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert (gradient - other[name]).norm() <= relative * gradient.norm(), name


@KINDS
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 22, 23, 1000])
def test_chunked_is_whole(kind: str, rows_per_chunk: int) -> None:
    """Among them a last chunk of 3 rows, of one row, and chunks of one row."""
    goal = GOALS.get(kind, MIXED)
    one, other = Student(padded=3, bias=True), Student(padded=3, bias=True)
    value = whole(one, goal, targets_of(kind), labels_of(), 17)
    assert chunked(other, goal, targets_of(kind), labels_of(), 17, rows_per_chunk) == pytest.approx(value, rel=1e-6)
    assert_close(gradients(one), gradients(other))


@pytest.mark.parametrize("make", [lambda: Student(tied=True), lambda: Student(tied=True, padded=5), lambda: Student(softcap=2.0, bias=True)])
def test_chunked_is_whole_for_tied_padded_and_capped_heads(make: Callable[[], Student]) -> None:
    one, other = make(), make()
    whole(one, MIXED, targets_of("top_k"), labels_of(), 23)
    chunked(other, MIXED, targets_of("top_k"), labels_of(), 23, 4)
    assert_close(gradients(one), gradients(other))
    assert "embedding.weight" in gradients(one)


def test_chunked_is_whole_for_a_head_with_an_adapter() -> None:
    class LowRank(nn.Module):
        def __init__(self, frozen: nn.Linear) -> None:
            super().__init__()
            torch.manual_seed(9)
            self.frozen = frozen.requires_grad_(False)
            self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, SIZE, bias=False)

        def forward(self, states_RD: Tensor) -> Tensor:
            logits: Tensor = self.frozen(states_RD) + self.up(self.down(states_RD))
            return logits

    students = [Student(), Student()]
    for student in students:
        student.lm_head = LowRank(student.lm_head)  # type: ignore[assignment]
    whole(students[0], MIXED, targets_of("full"), labels_of(), 23)
    chunked(students[1], MIXED, targets_of("full"), labels_of(), 23, 7)
    assert_close(gradients(students[0]), gradients(students[1]))
    assert "lm_head.frozen.weight" not in gradients(students[1])
    assert "lm_head.up.weight" in gradients(students[1])


@KINDS
@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one_row(kind: str, rows: int) -> None:
    goal = GOALS.get(kind, MIXED)
    student = Student()
    value = chunked(student, goal, targets_of(kind, rows), labels_of(rows), 1, 4)
    assert all(gradient.isfinite().all() for gradient in gradients(student).values())
    if rows == 0:
        assert value == 0.0
        assert all((gradient == 0).all() for gradient in gradients(student).values())
        sums = sums_chunked(
            torch.zeros(0, WIDTH), student.head, size=SIZE, objective=goal, targets=targets_of(kind, 0), labels=labels_of(0), rows_per_chunk=4
        )
        assert sums.terms_nats == dict.fromkeys(goal.term_names, 0.0)
        assert sums.scored_tokens == 0
    else:
        other = Student()
        assert value == pytest.approx(whole(other, goal, targets_of(kind, rows), labels_of(rows), 1), rel=1e-6)
        assert_close(gradients(other), gradients(student))


def test_accumulating_two_parts_over_one_count_is_the_token_mean_of_the_whole() -> None:
    """The gradient's scale: sums divided once by the step's count, however rows are spread over micro-batches."""
    goal, targets, labels = MIXED, targets_of("full"), labels_of()
    one = Student()
    total_R, _ = goal.rows(one.head(one.hidden())[:, :SIZE], targets, labels)
    total_R.mean().backward()
    other = Student()
    for start, stop in ((0, 4), (4, ROWS)):  # as uneven as 4 to 19
        hidden_RD = other.hidden()[start:stop]
        gradient_RD, _ = backward_chunked(
            hidden_RD.detach(),
            other.head,
            size=SIZE,
            objective=goal,
            targets=slice_targets(targets, start, stop),
            labels=slice_targets(labels, start, stop),
            divide_by=ROWS,
            rows_per_chunk=3,
        )
        hidden_RD.backward(gradient_RD)
    assert_close(gradients(one), gradients(other))


# -- a weight for each row ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "top_k", "drawn"])
@pytest.mark.parametrize("rows_per_chunk", [4, ROWS])
def test_a_row_of_weight_w_counts_as_w_rows(kind: str, rows_per_chunk: int) -> None:
    """Repeated rows are the oracle: weight 0 is a row left out, 2 and 3 are rows given twice and three times."""
    goal, targets, labels = GOALS.get(kind, MIXED), targets_of(kind), labels_of()
    weights_R = torch.arange(ROWS) % 4
    one, other = Student(bias=True), Student(bias=True)
    total_R, _ = goal.rows(one.head(one.hidden()), targets, labels)
    repeated_R = torch.repeat_interleave(total_R, weights_R)
    repeated_R.mean().backward()
    nats = chunked(other, goal, targets, labels, float(weights_R.sum()), rows_per_chunk, weights_R.float())
    assert nats == pytest.approx(repeated_R.sum().item(), rel=1e-6)
    assert_close(gradients(one), gradients(other))


def test_weights_of_one_are_no_weights_and_numpy_weights_are_as_good() -> None:
    results = []
    for weights_R in (None, torch.ones(ROWS), numpy.ones(ROWS, dtype=numpy.float32)):
        student = Student()
        results.append((chunked(student, MIXED, targets_of("full"), labels_of(), ROWS, 5, weights_R), gradients(student)))
    for nats, gradient in results[1:]:
        assert nats == results[0][0]
        assert all(torch.equal(gradient[name], results[0][1][name]) for name in gradient)


def test_terms_are_summed_by_weight_and_rows_are_counted() -> None:
    student, targets, labels = Student(), targets_of("full"), labels_of()
    weights_R = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    _, terms_R = MIXED.rows(student.head(student.hidden()), targets, labels)
    sums = sums_chunked(
        student.hidden(), student.head, size=SIZE, objective=MIXED, targets=targets, labels=labels, rows_per_chunk=4, weights_R=weights_R
    )
    assert sums.terms_nats == pytest.approx({name: (nats_R * weights_R).sum().item() for name, nats_R in terms_R.items()}, rel=1e-5)
    assert (sums.scored_tokens, sums.scored_weight) == (ROWS, pytest.approx(weights_R.sum().item()))


def test_a_batch_says_what_its_rows_weigh() -> None:
    sequences = (TokenSequence(ids=(1, 2, 3, 4), answer_spans=((2, 4),)), TokenSequence(ids=(5, 6), answer_spans=((1, 2),)))
    batch = Batch(sequences=sequences, targets=labels_of(3), labels=labels_of(3))
    assert (batch.scored_tokens, batch.scored_weight) == (3, 3.0)
    assert replace(batch, weights_R=numpy.array([0.5, 0.0, 2.0])).scored_weight == 2.5
    with pytest.raises(AssertionError, match="weights disagree"):
        chunked(Student(), MIXED, targets_of("full"), labels_of(), ROWS, 5, torch.ones(ROWS - 1))


@pytest.mark.parametrize("kind", ["full", "hidden", "top_k"])
def test_padding_rows_change_nothing_and_get_no_gradient(kind: str) -> None:
    narrow, wide = Student(bias=True), Student(padded=9, bias=True)
    with torch.no_grad():
        wide.lm_head.weight[:SIZE], wide.lm_head.weight[SIZE:] = narrow.lm_head.weight, 50.0
        assert wide.lm_head.bias is not None
        wide.lm_head.bias[:SIZE], wide.lm_head.bias[SIZE:] = narrow.lm_head.bias, 50.0
        wide.body.load_state_dict(narrow.body.state_dict())
        wide.embedding.weight[:SIZE] = narrow.embedding.weight
    values = [chunked(student, MIXED, targets_of(kind), labels_of(), ROWS, 5) for student in (narrow, wide)]
    assert values[0] == values[1]
    assert wide.lm_head.weight.grad is not None
    assert narrow.lm_head.weight.grad is not None
    assert (wide.lm_head.weight.grad[SIZE:] == 0).all()
    torch.testing.assert_close(wide.lm_head.weight.grad[:SIZE], narrow.lm_head.weight.grad)
    # The same as the padded logits masked to -inf before the softmax.
    masked = wide.head(wide.hidden()).index_fill(-1, torch.arange(SIZE, SIZE + 9), -torch.inf)
    torch.testing.assert_close(masked.log_softmax(-1)[:, :SIZE], narrow.head(narrow.hidden()).log_softmax(-1))


def test_sums_are_those_of_the_rows_and_terms_are_unweighted() -> None:
    goal, targets, labels, student = MIXED, targets_of("full"), labels_of(), Student()
    logits_RV = student.head(student.hidden())
    total_R, terms_R = goal.rows(logits_RV, targets, labels)
    expected = {
        "forward_kl": forward_kl().nats(logits_RV, targets, 1.0).sum().item(),
        "cross_entropy": cross_entropy().nats(logits_RV, labels, 1.0).sum().item(),
        "generalized_jsd(0.3)": generalized_jsd(0.3).nats(logits_RV, targets, 1.0).sum().item(),
    }
    assert {name: nats_R.sum().item() for name, nats_R in terms_R.items()} == pytest.approx(expected, rel=1e-6)
    weighted = expected["forward_kl"] + 0.25 * expected["cross_entropy"] + 3.0 * expected["generalized_jsd(0.3)"]
    assert total_R.sum().item() == pytest.approx(weighted, rel=1e-6)
    sums = sums_chunked(student.hidden(), student.head, size=SIZE, objective=goal, targets=targets, labels=labels, rows_per_chunk=4)
    assert sums.objective_nats == pytest.approx(weighted, rel=1e-6)
    assert sums.terms_nats == pytest.approx(expected, rel=1e-6)
    assert sums.scored_tokens == ROWS
    assert gradients(student) == {}


def test_temperature_squared_multiplies_softened_terms_alone() -> None:
    plain = objective(reverse_kl(), cross_entropy(), match_temperature=3.0)
    squared = replace(plain, scale_by_temperature_squared=True)
    logits_RV, targets, labels = torch.randn(ROWS, SIZE), targets_of("full"), labels_of()
    plain_R, terms_R = plain.rows(logits_RV, targets, labels)
    squared_R, squared_terms_R = squared.rows(logits_RV, targets, labels)
    torch.testing.assert_close(squared_R, 9.0 * terms_R["reverse_kl"] + 0.25 * terms_R["cross_entropy"])
    torch.testing.assert_close(plain_R, terms_R["reverse_kl"] + 0.25 * terms_R["cross_entropy"])
    torch.testing.assert_close(terms_R, squared_terms_R)


def test_temperature_squared_keeps_the_gradients_size() -> None:
    """At high temperature, T^2 x gradient tends to (student - teacher logits, both centred) / V, which does not depend on T."""
    generator = torch.Generator().manual_seed(0)
    teacher_RV, student_RV = (torch.randn(3, SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = FullTargets(vocabulary="v", temperature=1.0, log_probs_RV=teacher_RV.log_softmax(-1))
    limit_RV = (student_RV - student_RV.mean(-1, keepdim=True) - teacher_RV + teacher_RV.mean(-1, keepdim=True)) / SIZE
    logits_RV = student_RV.clone().requires_grad_()
    total_R, _ = objective(forward_kl(), match_temperature=500.0, scale_by_temperature_squared=True).rows(logits_RV, targets, labels_of(3))
    total_R.sum().backward()
    torch.testing.assert_close(logits_RV.grad, limit_RV, rtol=0, atol=2e-2 * limit_RV.abs().max().item())


def test_autocast_stops_at_the_head() -> None:
    """In bfloat16 arithmetic the student's head is bfloat16; the teacher's distribution and the divergence are not."""
    student, targets, labels = Student(), targets_of("hidden"), labels_of()
    with torch.autocast("cpu", torch.bfloat16):
        hidden_RD = student.hidden()
        _, sums = backward_chunked(
            hidden_RD.detach(),
            student.head,
            size=SIZE,
            objective=objective(forward_kl()),
            targets=targets,
            labels=labels,
            divide_by=1,
            rows_per_chunk=4,
        )
        logits_RV = student.head(hidden_RD)
    assert logits_RV.dtype == torch.bfloat16
    exact = forward_kl().nats(logits_RV.detach().float(), targets, 1.0).sum().item()
    assert sums.objective_nats == pytest.approx(exact, rel=1e-5)


def test_numpy_targets_are_as_good_as_tensors() -> None:
    for kind in ("full", "hidden", "top_k", "drawn"):
        one, goal = Student(), GOALS.get(kind, MIXED)
        other = copy.deepcopy(one)
        first = chunked(one, goal, targets_of(kind), labels_of(), ROWS, 5)
        second = chunked(other, goal, as_arrays(targets_of(kind)), as_arrays(labels_of()), ROWS, 5)
        assert first == second
        assert all(torch.equal(gradient, gradients(other)[name]) for name, gradient in gradients(one).items())


def test_required_kinds_and_check() -> None:
    assert objective(cross_entropy()).required_kinds == ("text", "sampled", "drawn", "top_k", "hidden", "full")
    assert objective(forward_kl(), cross_entropy()).required_kinds == ("drawn", "top_k", "hidden", "full")
    assert MIXED.required_kinds == ("top_k", "hidden", "full")
    assert objective(forward_kl(), alpha_beta(1.0, 0.5)).required_kinds == ("hidden", "full")
    assert objective(cross_entropy()).reads_text_alone
    assert not MIXED.reads_text_alone
    objective(cross_entropy()).check("text")
    MIXED.check("hidden", 1.0)
    replace(MIXED, match_temperature=2.0).check("top_k", 2.0)
    for goal, kind, temperature in ((MIXED, "text", 1.0), (replace(MIXED, match_temperature=2.0), "top_k", 1.0)):
        with pytest.raises(StillroomError) as caught:
            goal.check(kind, temperature)
        assert caught.value.code == "targets-unsupported"


def test_a_term_given_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="more than once"):
        objective(forward_kl(), forward_kl())
    with pytest.raises(RecipeError, match="without terms"):
        objective()
    objective(generalized_jsd(0.1), generalized_jsd(0.9))
