"""What a local teacher gives as targets: each kind against the distribution itself, and the same whatever it is asked together with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import pytest
import torch

from helpers import tiny_model, tiny_tokenizer
from stillroom.core.errors import ModelError
from stillroom.core.identities import ModelRef, TokenSequence
from stillroom.models import local
from stillroom.models.local import LocalTeacher, draw_places, head_draws, rounded_states, unique_draws
from stillroom.objectives.tensors import as_arrays
from stillroom.targets.codecs import from_int8, to_int8
from stillroom.targets.kinds import TARGET_KINDS, DrawnTargets, FullTargets, HiddenTargets, SampledTargets, TargetRequest, Targets, TextTargets
from stillroom.targets.rows import slice_targets
from stillroom.targets.vocabulary import Vocabulary

ROWS = 251  # of which 220 are real
SIZE = 220
PLACES = [[0.5448829177227863, 0.6688562429149137, 0.7387238396895981], [0.8121340418608912, 0.9118905930172414, 0.28438261822341604]]


def teacher(family: str = "llama", *, spread: float = 0.6, at_once: int = 256) -> LocalTeacher:
    model = tiny_model(family, rows=ROWS, spread=spread, seed=5)
    ref = ModelRef(source="here", kind="directory", revision=None, weights_sha256="0" * 64, architecture="x", parameters=1, licence=None)
    return LocalTeacher(model, ref, Vocabulary.from_tokenizer(tiny_tokenizer(size=SIZE), ROWS), at_once=at_once)


def sequences(count: int, seed: int = 0) -> list[TokenSequence]:
    rng = numpy.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(rng.integers(6, 20))
        made.append(
            TokenSequence(ids=tuple(rng.integers(0, SIZE, length).tolist()), answer_spans=((2, 4), (5, length)) if number % 2 else ((1, length),))
        )
    return made


def log_probs(one: LocalTeacher, of: Sequence[TokenSequence], temperature: float) -> torch.Tensor:
    """In float64 and one by one, from the unmodified forward pass."""
    rows = []
    with torch.inference_mode():
        for sequence in of:
            logits_TV = one.model(input_ids=torch.tensor([sequence.ids])).logits[0, :, :SIZE].double()
            rows.append(torch.log_softmax(logits_TV[list(sequence.scored_rows)] / temperature, -1))
    return torch.cat(rows)


def parts(of: Sequence[TokenSequence], whole: Targets) -> list[Targets]:
    made, start = [], 0
    for sequence in of:
        made.append(as_arrays(slice_targets(whole, start, start + len(sequence.scored_rows))))
        start += len(sequence.scored_rows)
    return made


def test_a_teacher_gives_every_kind_and_says_so() -> None:
    one, of = teacher(), sequences(3)
    assert one.capabilities == set(TARGET_KINDS)
    for kind, expected in TARGET_KINDS.items():
        assert isinstance(one.targets(of, TargetRequest(kind=kind, k=3, draws=3)), expected)


def test_a_teacher_whose_logits_are_changed_gives_text_alone() -> None:
    one = teacher()
    changed = LocalTeacher(one.model, one.ref, one.vocabulary, transform=lambda context_BT, logits_BV: logits_BV)
    assert changed.capabilities == {"text"}
    with pytest.raises(ModelError, match="drawn"):
        changed.targets(sequences(1), TargetRequest(kind="drawn", draws=3))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere"])
def test_sampled_targets_are_the_log_probabilities_of_the_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "VALUES_AT_ONCE", 5 * SIZE)  # several uneven chunks
    one, of = teacher(family), sequences(7)
    found = one.targets(of, TargetRequest(kind="sampled", temperature=0.7))
    text = one.targets(of, TargetRequest(kind="text"))
    assert isinstance(found, SampledTargets)
    assert isinstance(text, TextTargets)
    assert torch.equal(found.token_ids_R, text.token_ids_R)
    expected_R = log_probs(one, of, 0.7).gather(-1, text.token_ids_R[:, None]).squeeze(-1)
    assert torch.allclose(found.log_probs_R.double(), expected_R, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere"])
def test_the_entropy_of_drawn_targets_is_that_of_the_whole_distribution(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "DRAWN_AT_ONCE", 12 * SIZE)
    monkeypatch.setattr(local, "_WEIGHTS_AT_ONCE", 5 * SIZE)
    one, of = teacher(family), sequences(9)
    found = one.targets(of, TargetRequest(kind="drawn", temperature=1.3, draws=4))
    assert isinstance(found, DrawnTargets)
    log_p_RV = log_probs(one, of, 1.3)
    assert torch.allclose(found.entropy_R.double(), -(log_p_RV.exp() * log_p_RV).sum(-1), atol=1e-5)


def test_ids_are_drawn_as_often_as_they_are_probable() -> None:
    """Every row's counts, over many seeds, by a chi-square test of the whole table; the level is one in a million."""
    one, of, draws, times = teacher(spread=0.35), sequences(2, seed=3), 100, 60
    p_RV = log_probs(one, of, 0.8).exp().numpy()
    counts_RV = numpy.zeros_like(p_RV)
    for seed in range(times):
        found = as_arrays(one.targets(of, TargetRequest(kind="drawn", temperature=0.8, draws=draws, seed=seed)))
        assert isinstance(found, DrawnTargets)
        row_U = numpy.repeat(numpy.arange(len(p_RV)), numpy.diff(found.offsets_R1))
        counts_RV[row_U, found.ids_U] += found.counts_U
    assert (counts_RV.sum(axis=1) == draws * times).all()
    # Cells that expect less than five are one.
    expected_RV = p_RV * draws * times
    few_RV = expected_RV < 5
    cells = [numpy.append(table[row][~few_RV[row]], table[row][few_RV[row]].sum()) for table in (counts_RV, expected_RV) for row in range(len(p_RV))]
    seen, wanted = numpy.concatenate(cells[: len(p_RV)]), numpy.concatenate(cells[len(p_RV) :])
    statistic, freedom = ((seen - wanted) ** 2 / numpy.maximum(wanted, 1e-9))[wanted > 5].sum(), int((wanted > 5).sum()) - len(p_RV)
    assert freedom > 500
    # Wilson and Hilferty: the cube root of chi-square over its degrees of freedom is nearly normal.
    deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(deviation) < 4.9


def test_a_draw_finds_the_id_whose_share_its_place_lies_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one running sum over the whole vocabulary in float64, for places all over [0, 1); an id without probability is never drawn."""
    monkeypatch.setattr(local, "_BLOCK", 16)
    rng = torch.Generator().manual_seed(0)
    for size in (2, 16, 100, 1000):
        logits_RV = 4 * torch.randn(6, size, generator=rng)
        logits_RV[:, 1::3] = -torch.inf
        logits_RV[0] = -torch.inf
        logits_RV[0, size // 2] = 3.0
        head = torch.nn.Linear(size, size, bias=False)
        head.weight.data = torch.eye(size)
        places_RN = torch.cat([torch.tensor([0.0, 1 - 2**-53]).double().expand(6, 2), torch.rand(6, 60, generator=rng, dtype=torch.float64)], dim=1)
        # The head of a model whose states are the logits themselves; minus infinity times zero would be no number.
        found_RN, entropy_R = _through(head, logits_RV, places_RN)
        p_RV = torch.softmax(logits_RV.double(), -1)
        until_RV = p_RV.cumsum(-1)
        assert (p_RV.gather(-1, found_RN) > 0).all()
        below, above = until_RV.gather(-1, found_RN) - p_RV.gather(-1, found_RN), until_RV.gather(-1, found_RN)
        assert (places_RN >= below - 1e-6).all()
        assert (places_RN <= above + 1e-6).all()
        assert torch.allclose(entropy_R.double(), -torch.xlogy(p_RV, p_RV).sum(-1), atol=1e-5)
        assert entropy_R[0] == 0


def _through(head: torch.nn.Module, logits_RV: torch.Tensor, places_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    size = logits_RV.shape[1]
    weights_RV = torch.zeros(len(logits_RV), size + -size % local._BLOCK)
    return local._draw(logits_RV.clone(), weights_RV, places_RN)


def test_what_is_drawn_depends_on_the_record_and_the_seed_alone() -> None:
    """In any order, in any company, in batches of any size: the same ids. Another seed or another record: others."""
    of = sequences(8)
    together = parts(of, teacher().targets(of, TargetRequest(kind="drawn", draws=20)))
    backwards = parts(of[::-1], teacher(at_once=64).targets(of[::-1], TargetRequest(kind="drawn", draws=20)))[::-1]
    alone = [as_arrays(teacher().targets([one], TargetRequest(kind="drawn", draws=20))) for one in of]
    for other in (backwards, alone):
        for one, two in zip(together, other, strict=True):
            assert isinstance(one, DrawnTargets)
            assert isinstance(two, DrawnTargets)
            assert numpy.array_equal(one.offsets_R1, two.offsets_R1)
            assert numpy.array_equal(one.ids_U, two.ids_U)
            assert numpy.array_equal(one.counts_U, two.counts_U)
            assert numpy.allclose(one.entropy_R, two.entropy_R, atol=1e-6)
    places = draw_places(of[:2], 20, 0)
    assert places.shape == (len(of[0].scored_rows) + len(of[1].scored_rows), 20)
    assert ((places >= 0) & (places < 1)).all()
    assert numpy.array_equal(places[: len(of[0].scored_rows)], draw_places(of[:1], 20, 0))
    assert not numpy.isclose(places, draw_places(of[:2], 20, 1)).any()
    assert len(numpy.unique(places)) == places.size


def test_places_are_what_they_were() -> None:
    """A store that is captured again tomorrow, or elsewhere, is the same: these numbers may never change."""
    of = TokenSequence(ids=(1, 2, 3), answer_spans=((1, 3),))
    assert draw_places([of], 3, 7).tolist() == PLACES


def test_unique_draws_count_each_row_by_itself() -> None:
    offsets_R1, ids_U, counts_U = unique_draws(torch.tensor([[3, 1, 3, 3], [3, 3, 3, 3], [0, 2, 1, 9]]))
    assert offsets_R1.tolist() == [0, 2, 3, 7]
    assert ids_U.tolist() == [1, 3, 3, 0, 1, 2, 9]
    assert counts_U.tolist() == [1, 3, 4, 1, 1, 1, 1]
    assert (ids_U.dtype, counts_U.dtype) == (torch.int32, torch.int32)
    empty = unique_draws(torch.empty(0, 4, dtype=torch.int64))
    assert [part.tolist() for part in empty] == [[0], [], []]


def test_no_rows_no_draws() -> None:
    one = teacher()
    of = [TokenSequence(ids=(1, 2), answer_spans=())]
    found = one.targets(of, TargetRequest(kind="drawn", draws=5))
    assert isinstance(found, DrawnTargets)
    assert (found.offsets_R1.tolist(), len(found.ids_U), len(found.entropy_R), found.draws) == ([0], 0, 0, 5)
    sampled = one.targets(of, TargetRequest(kind="sampled"))
    assert isinstance(sampled, SampledTargets)
    assert len(sampled.log_probs_R) == 0
    assert head_draws(one.model, torch.empty(0, 32), SIZE, torch.empty(0, 5, dtype=torch.float64), 1.0)[0].shape == (0, 5)


def test_states_are_rounded_as_a_store_rounds_them() -> None:
    one, of = teacher(), sequences(4)
    exact = one.targets(of, TargetRequest(kind="hidden", state_dtype="float32"))
    assert isinstance(exact, HiddenTargets)
    assert exact.states_RD.dtype == torch.float32
    for state_dtype in ("bfloat16", "int8"):
        rounded = one.targets(of, TargetRequest(kind="hidden", state_dtype=state_dtype))
        assert isinstance(rounded, HiddenTargets)
        assert torch.equal(rounded.states_RD, rounded_states(exact.states_RD, state_dtype))
        assert not torch.equal(rounded.states_RD.float(), exact.states_RD)
    wide = torch.randn(200, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-45, 38, 200)[:, None].clamp(max=1e37)
    wide[7] = 0
    assert numpy.array_equal(rounded_states(wide, "int8").numpy(), from_int8(*to_int8(wide.numpy())))
    full = one.targets(of, TargetRequest(kind="full"))
    assert isinstance(full, FullTargets)
