"""What `test_fused_triton.py` runs in a process of its own: `objectives.fused_triton` against the path for CPUs, and in float64 against the definitions.

Triton decides whether it interprets when it is imported, so TRITON_INTERPRET=1 is there before. STILLROOM_TRITON_DEVICE=cuda runs the same on a GPU.
"""

from __future__ import annotations

import os
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from numerics import test_fused as cpu
from numerics.test_fused import MIXTURES, PAIRS, SHAPES, SIZE, Head, Result, assert_same, head_of, hidden_of, labels_of, only, run, targets_of
from stillroom.models.probing import LiveBytes
from stillroom.objectives import fused, fused_triton
from stillroom.objectives.divergences import Divergence, alpha_beta, cross_entropy, forward_kl, generalized_jsd, reverse_kl, total_variation
from stillroom.objectives.matching import new_projections
from stillroom.objectives.objective import Objective, backward_chunked, sums_chunked
from stillroom.targets.kinds import DrawnTargets, HiddenTargets, Targets

DEVICE = os.environ.get("STILLROOM_TRITON_DEVICE", "cpu")
# A GPU's exponentials, logarithms and quotients are right to a few units of rounding.
RELATIVE = 1e-5 if DEVICE == "cpu" else 1e-4
ROWS = 5
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="its tensors are on the CPU")


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("by autograd")


def _force(patch: pytest.MonkeyPatch) -> None:
    """Nothing but Triton computes; on the CPU in blocks that the vocabulary is no multiple of."""
    patch.setattr(fused, "TRITON_DEVICES", ("cpu", "cuda"))
    patch.setattr(Objective, "rows", _refuse)
    if DEVICE == "cpu":
        patch.setattr(fused_triton, "BLOCK", 16)


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    _force(monkeypatch)


def here(head: Head, goal: Objective, targets: Targets, rows: int = ROWS, block: int | None = None, **more: Any) -> Result:
    """By Triton."""
    head.module.to(DEVICE)
    hidden_RD = more.pop("hidden_RD", hidden_of(rows)).to(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        _force(patch)
        if block is not None:
            patch.setattr(fused_triton, "BLOCK", block)
        found = run(head, goal, targets, hidden_RD=hidden_RD, **more)
    return Result(found.sums, {name: gradient.cpu() for name, gradient in found.gradients.items()})


def elsewhere(head: Head, goal: Objective, targets: Targets, rows: int = ROWS, **more: Any) -> Result:
    """By the path for CPUs."""
    return run(head, goal, targets, **({"hidden_RD": hidden_of(rows)} | more))


# -- the same function --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "shape", "weighted"), [(p, s, w) for p, s, w in zip(PAIRS, cycle(SHAPES), cycle((True, False, False)), strict=False)], ids=cpu.named
)
def test_cpu_path(pair: tuple[Divergence, str], shape: str, weighted: bool) -> None:
    """Value and every gradient, in float32: each divergence from each kind, all shapes of heads in turn, two chunks of different sizes."""
    divergence, kind = pair
    weights_R = torch.tensor([0.0, 2.0, 1.0, 0.5, 3.0]) if weighted else None
    targets = targets_of(kind, rows=ROWS, shape=SHAPES[shape])
    results = (by(head_of(**SHAPES[shape]), only(divergence), targets, weights_R=weights_R, rows_per_chunk=3) for by in (here, elsewhere))
    assert_same(*results, relative=RELATIVE)


@interpreted
@pytest.mark.parametrize(
    ("divergence", "kind"), [(d, kind) for d, kind in PAIRS if d.name in cpu.ORACLES and kind in ("hidden", "full", "top_k")], ids=cpu.named
)
def test_definition(divergence: Divergence, kind: str, on_triton: None) -> None:
    """In float64, against the oracle and its differences, to 1e-9."""
    cpu.test_fused_is_the_definition(divergence, kind, None)


@interpreted
def test_cross_entropy_is_the_definition(on_triton: None) -> None:
    cpu.test_cross_entropy_is_the_definition(None)


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize(("temperature", "shape"), [(1.0, "bias"), (2.5, "everything")])
def test_sums_of_terms(kind: str, temperature: float, shape: str) -> None:
    """Cross-entropy stays at temperature 1 beside terms that are softened; full targets made at 1 are softened further."""
    goal = only(*MIXTURES[kind], match_temperature=temperature, scale_by_temperature_squared=True)
    targets = targets_of(kind, 1.0 if kind == "full" else temperature, rows=ROWS, shape=SHAPES[shape])
    weights_R = torch.tensor([0.3, 0.0, 1.0, 0.8, 0.1])
    results = []
    for by in (here, elsewhere):
        projections = new_projections(goal.state_matches, student_width=cpu.WIDTH, teacher_width=cpu.TEACHER_WIDTH, seed=1)
        projections.to(DEVICE if by is here else "cpu")
        results.append(by(head_of(**SHAPES[shape]), goal, targets, weights_R=weights_R, projections=projections, rows_per_chunk=4))
    assert_same(*results, relative=RELATIVE)


@pytest.mark.parametrize("kind", [kind for kind in cpu.KINDS if kind != "sampled"])
@pytest.mark.parametrize(("rows_per_chunk", "block"), [(1, 64), (3, 4), (1000, 32)])
def test_chunks_and_blocks_change_nothing(kind: str, rows_per_chunk: int, block: int) -> None:
    """Blocks shorter than a list; one that holds everything."""
    goal = only(cross_entropy()) if kind == "text" else only(forward_kl(), cross_entropy())
    targets = targets_of(kind, rows=ROWS)
    whole = here(head_of(bias=True), goal, targets, rows_per_chunk=ROWS)
    assert_same(here(head_of(bias=True), goal, targets, rows_per_chunk=rows_per_chunk, block=block), whole, relative=RELATIVE)


@pytest.mark.parametrize(
    ("divergence", "kind"), [(reverse_kl(), "hidden"), (forward_kl(), "top_k"), (forward_kl(), "drawn"), (cross_entropy(), "text")]
)
def test_sums_alone_are_the_same_sums(divergence: Divergence, kind: str, on_triton: None) -> None:
    head, targets = head_of(softcap=2.0, bias=True), targets_of(kind, rows=ROWS)
    head.module.to(DEVICE)
    goal, hidden_RD = only(divergence), hidden_of(ROWS).to(DEVICE)
    sums = sums_chunked(hidden_RD, head, size=SIZE, objective=goal, targets=targets, labels=labels_of(ROWS), rows_per_chunk=2)
    assert head.module.weight.grad is None
    assert sums == here(head, goal, targets, rows_per_chunk=2).sums


def test_one_row_and_none() -> None:
    one = [by(head_of(bias=True), only(reverse_kl()), targets_of("hidden", rows=1), rows=1) for by in (here, elsewhere)]
    assert_same(*one, relative=RELATIVE)
    none = here(head_of(), only(forward_kl()), targets_of("hidden", rows=0), rows=0)
    assert none.sums.objective_nats == 0.0
    assert set(none.gradients) == {"states"}


def test_an_id_in_every_draw_and_every_id_drawn() -> None:
    """A row whose draws are all of one id, and one without an id that was not drawn."""
    targets = targets_of("drawn", rows=2)
    counts = torch.ones(SIZE, dtype=torch.int32)
    counts[3] += 20 * SIZE - counts.sum()
    edges = cpu.replace(
        targets,
        draws=20 * SIZE,
        offsets_R1=torch.tensor([0, 1, 1 + SIZE]),
        ids_U=torch.cat([torch.tensor([5]), torch.arange(SIZE)]),
        counts_U=torch.cat([torch.tensor([20 * SIZE], dtype=torch.int32), counts]),
    )
    results = (by(head_of(bias=True), only(forward_kl(), cross_entropy()), edges, rows=2) for by in (here, elsewhere))
    assert_same(*results, relative=RELATIVE)


# -- the ends of the scale, and where gradients belong -------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("divergence", [forward_kl(), generalized_jsd(0.1), total_variation(), alpha_beta(0.7, 0.0)], ids=cpu.named)
def test_ids_without_probability_and_students_far_away(divergence: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "TRITON_DEVICES", ("cpu",))
    cpu.test_ids_without_probability_and_students_far_away(divergence, 40.0)


@interpreted
@pytest.mark.parametrize("divergence", [forward_kl(), reverse_kl(), alpha_beta(0.3, 0.2)], ids=cpu.named)
def test_a_tail_that_underflows_keeps_its_logarithm(divergence: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "TRITON_DEVICES", ("cpu",))
    cpu.test_a_tail_that_underflows_keeps_its_logarithm(divergence, torch.float32, 200.0, 1e-4)


@interpreted
@pytest.mark.parametrize("divergence", [forward_kl(), total_variation()], ids=cpu.named)
def test_zero_with_zero_gradient_at_equality(divergence: Divergence, on_triton: None) -> None:
    cpu.test_zero_with_zero_gradient_at_equality(divergence, None)


@interpreted
def test_gradients_are_added_to_what_is_there(on_triton: None) -> None:
    cpu.test_gradients_are_added_to_what_is_there(None)


def test_a_frozen_head_gets_no_gradient_and_lets_it_through() -> None:
    frozen = head_of(bias=True)
    frozen.module.requires_grad_(False)
    targets = targets_of("hidden", rows=2)
    one, other = (here(head, only(forward_kl()), targets, rows=2) for head in (frozen, head_of(bias=True)))
    assert set(one.gradients) == {"states"}
    assert torch.equal(one.gradients["states"], other.gradients["states"])


def test_what_is_given_is_left_alone() -> None:
    for kind in MIXTURES:
        divergences = (cross_entropy(),) if kind == "text" else (forward_kl(), cross_entropy())
        head, targets, hidden_RD = head_of(bias=True, softcap=2.0), targets_of(kind, rows=2, shape=SHAPES["everything"]), hidden_of(2)
        tensors = [*head.module.parameters(), hidden_RD, *(leaf for leaf in tree_leaves(cpu.vars_of(targets)) if isinstance(leaf, Tensor))]
        before = [tensor.detach().clone() for tensor in tensors]
        here(head, only(*divergences), targets, hidden_RD=hidden_RD)
        assert all(torch.equal(tensor.cpu(), copy) for tensor, copy in zip(tensors, before, strict=True)), kind


# -- bfloat16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hidden", "top_k", "drawn", "text"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
def test_half_precision(kind: str, weights: torch.dtype) -> None:
    """Logits are not rounded to bfloat16, as autograd's are, and so the nats are float32's; the gradient with respect to them is rounded once."""
    goal = only(cross_entropy()) if kind == "text" else only(forward_kl(), cross_entropy())
    exact = head_of(bias=True, softcap=3.0, dtype=torch.bfloat16)
    exact.module.double()
    targets, hidden_RD = targets_of(kind, rows=ROWS), hidden_of(ROWS).bfloat16()
    reference = elsewhere(exact, goal, targets, hidden_RD=hidden_RD.double())
    found = []
    for by, rows_per_chunk, more in ((here, 2, {}), (here, 1, {}), (elsewhere, 2, {"by_autograd": True})):
        head = head_of(bias=True, softcap=3.0, dtype=torch.bfloat16)
        head.module.to(weights)
        with torch.autocast(DEVICE if by is here else "cpu", torch.bfloat16, enabled=weights == torch.float32):
            found.append(by(head, goal, targets, hidden_RD=hidden_RD.to(weights), rows_per_chunk=rows_per_chunk, **more))
    ours, in_other_chunks, autograd = found
    assert ours.sums.objective_nats == pytest.approx(reference.sums.objective_nats, rel=RELATIVE)
    assert autograd.sums.objective_nats == pytest.approx(reference.sums.objective_nats, rel=5e-3)
    for name, gradient in ours.gradients.items():
        assert gradient.dtype == weights
        expected = reference.gradients[name]
        # The interpreter cuts off what a GPU rounds: up to 2^-8 of each number.
        assert (gradient - expected).norm() <= 2**-7 * expected.norm(), name
        if weights == torch.float32:
            # Sums over chunks are not rounded to bfloat16.
            assert (gradient - in_other_chunks.gradients[name]).norm() <= RELATIVE * gradient.norm(), name


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["wide", "narrow"])
def test_a_teacher_in_half_precision_has_logits_in_float32(weights: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the student's arithmetic; and its head is widened in pieces."""
    narrow = targets_of("hidden", rows=ROWS, dtype=torch.bfloat16)
    assert isinstance(narrow, HiddenTargets)
    narrow = cpu.replace(narrow, head=cpu.replace(narrow.head, weight_VD=narrow.head.weight_VD.to(weights)))
    wide = cpu.replace(narrow, states_RD=narrow.states_RD.float(), head=cpu.replace(narrow.head, weight_VD=narrow.head.weight_VD.float()))
    monkeypatch.setattr(fused_triton, "PIECE_NUMBERS", 10 * cpu.TEACHER_WIDTH)
    for student in (torch.float32, torch.bfloat16):
        results = (here(head_of(dtype=student), only(forward_kl()), t, hidden_RD=hidden_of(ROWS, student)) for t in (narrow, wide))
        assert_same(*results, relative=1e-6)


# -- what is computed here and what is not ------------------------------------------------------------------------------


def fuses(head: Head, divergence: Divergence, kind: str = "hidden", dtype: torch.dtype = torch.float32) -> bool:
    terms = [fused.FusedTerm(divergence=divergence, factor=1.0, reads_text=divergence.kinds == ("text",))]
    linear = fused.linear_head(head)
    assert linear is not None
    return fused_triton.can_fuse(hidden_of(dtype=dtype), linear, terms, targets_of(kind))


@interpreted
def test_what_is_not_known_here_is_left_to_autograd() -> None:
    assert all(fuses(head_of(), divergence, kind) for divergence, kind in PAIRS)
    own = Divergence(name="own", kinds=("hidden",), nats=reverse_kl().nats)
    assert not fuses(head_of(), own)
    assert not fuses(head_of(), cpu.replace(own, over_buckets=lambda *_: (torch.zeros(()), torch.zeros(())))), "a closed form without a kernel"
    assert not fuses(head_of(), forward_kl(), dtype=torch.float64), "types that differ"
    assert not fuses(head_of(dtype=torch.float16), forward_kl(), dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert fuses(head_of(), forward_kl(), dtype=torch.bfloat16)
        assert not fuses(head_of(dtype=torch.float64), forward_kl(), dtype=torch.float64), "autocast leaves float64 alone"
    with torch.autocast("cpu", torch.float16):
        assert not fuses(head_of(), forward_kl())


@interpreted
@pytest.mark.parametrize("kind", ["hidden", "full", "top_k", "drawn", "text"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(kind: str, on_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of at most 4 rows by memory, whatever was asked for, and no more at a peak for more rows."""
    columns = -(-SIZE // 16) * 16
    monkeypatch.setattr(fused_triton, "GPU_BUFFER_BYTES", 4 * columns * 4 * (2 if kind == "hidden" else 1))
    monkeypatch.setattr(fused_triton, "PIECE_NUMBERS", 8 * cpu.WIDTH)
    divergence = cross_entropy() if kind == "text" else forward_kl()
    peaks = []
    for rows in (8, 24):
        head = head_of(bias=True)
        for parameter in head.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        targets, hidden_RD, labels = targets_of(kind, rows=rows), hidden_of(rows), labels_of(rows)
        with cpu.Largest() as largest, LiveBytes(torch.device("cpu")) as live:
            backward_chunked(
                hidden_RD, head, size=SIZE, objective=only(divergence), targets=targets, labels=labels, divide_by=1.0, rows_per_chunk=2048
            )
        # The gradient of the states and the listed ids are all that has every row.
        of_rows = max(rows * cpu.WIDTH, len(targets.ids_U) if isinstance(targets, DrawnTargets) else 0)
        assert largest.numbers <= max(of_rows, 4 * columns)
        peaks.append(live.peak - 8 * of_rows)
    assert peaks[1] <= peaks[0] + 16 * 128, "flat in rows, but for a few numbers for each"


def test_rows_fill_the_buffers_evenly() -> None:
    head = head_of()
    linear = fused.linear_head(head)
    assert linear is not None
    through = fused_triton.TritonHead(hidden_of(), linear, size=SIZE, terms=[], match_temperature=1.0, backward=True)
    rows = fused_triton.GPU_BUFFER_BYTES // (2 * 48 * 4)
    states = torch.empty(rows + 1, 1)
    assert through.chunks_of(states, targets_of("hidden"), 10**9) == [(0, rows // 2 + 1), (rows // 2 + 1, rows + 1)]
    assert through.chunks_of(states, targets_of("text"), 10**9) == [(0, rows + 1)]
    assert through.chunks_of(states[:5], targets_of("text"), 2) == [(0, 2), (2, 4), (4, 5)]
