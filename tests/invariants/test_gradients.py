"""One gradient: however a step is cut into batches and chunks, wherever the targets come from, it is that of the mean over the step's scored tokens.

The oracle is the unmodified `transformers` forward pass of each whole sequence by itself, in float64, and PyTorch's own softmax and cross-entropy.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from helpers import tiny_model, tiny_tokenizer
from stillroom.core.identities import ModelRef, Sampling, TokenSequence
from stillroom.data import Prompt
from stillroom.models.local import LocalTeacher, text_targets
from stillroom.models.student import OptimiserSettings, TransformersStudent, named_gradients
from stillroom.models.tokenizers import Renderer, vocabulary_of
from stillroom.objectives.divergences import cross_entropy, forward_kl, generalized_jsd, reverse_kl
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.objectives.tensors import as_arrays
from stillroom.runs.sources import LiveSource, StoredSource, TextSource
from stillroom.targets.codecs import Codec, DrawnCodec, HiddenCodec, TopKCodec
from stillroom.targets.kinds import FullTargets, HiddenTargets, TargetRequest, TopKTargets
from stillroom.targets.protocols import Batch
from stillroom.targets.rows import slice_targets
from stillroom.targets.store import StoredRecord, StoreIdentity, TargetStore, record_id

RELATIVE = 1e-5
# Heads padded beyond the tokenizer, by different amounts.
TEACHER_ROWS, STUDENT_ROWS = 228, 224
FAMILIES = {"tied": "llama", "untied": "mistral", "softcap": "gemma2", "biased head": "phi"}
by_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())

Gradient = dict[str, torch.Tensor]
RowLoss = Callable[[torch.Tensor, TokenSequence], torch.Tensor]


@cache
def tokenizer() -> object:
    return tiny_tokenizer()


def student_of(family: str = "llama", *, rows_per_chunk: int = 2048) -> TransformersStudent:
    return TransformersStudent(
        tiny_model(family, rows=STUDENT_ROWS, seed=2, **_attention(family)),
        vocabulary_of(tokenizer(), STUDENT_ROWS),
        OptimiserSettings(),
        rows_per_chunk=rows_per_chunk,
    )


def teacher_of(family: str = "llama", *, at_once: int = 256) -> LocalTeacher:
    model = tiny_model(family, rows=TEACHER_ROWS, width=48, seed=1, **_attention(family))
    ref = ModelRef(
        source="here", kind="directory", revision=None, weights_sha256="0" * 64, architecture=type(model).__name__, parameters=1, licence=None
    )
    return LocalTeacher(model, ref, vocabulary_of(tokenizer(), TEACHER_ROWS), at_once=at_once)


def _attention(family: str) -> dict[str, str]:
    return {"attn_implementation": "eager"} if family == "gemma2" else {}


def some_sequences(count: int = 8, *, seed: int = 0) -> list[TokenSequence]:
    """Random ids of unequal lengths; answers in one or two places, some followed by what is not scored."""
    draw = random.Random(seed)
    sequences = []
    for index in range(count):
        length = draw.randint(5, 21)
        bounds = sorted(draw.sample(range(1, length + 1), 4 if index % 2 else 2))
        spans = tuple(zip(bounds[::2], bounds[1::2], strict=True))
        sequences.append(TokenSequence(ids=tuple(draw.randrange(220) for _ in range(length)), answer_spans=spans))
    return sequences


def objective_of(*divergences: object) -> Objective:
    return Objective(terms=tuple(WeightedTerm(divergence=divergence, weight=1.0 / (1 + place)) for place, divergence in enumerate(divergences)))


def batch_of(teacher: LocalTeacher, sequences: Sequence[TokenSequence], kind: str = "full", k: int = 0) -> Batch:
    targets = teacher.targets(sequences, TargetRequest(kind=kind, k=k))
    return Batch(sequences=tuple(sequences), targets=targets, labels=text_targets(sequences, teacher.vocabulary))


def gradient_of(student: TransformersStudent, batches: Iterable[Batch], objective: Objective) -> Gradient:
    """What one step accumulates over `batches`."""
    batches = list(batches)
    student.drop_gradient()
    scored = sum(batch.scored_tokens for batch in batches)
    for batch in batches:
        sums = student.forward_backward(batch, objective, divide_by=scored)
        assert sums.scored_tokens == batch.scored_tokens
        assert math.isfinite(sums.objective_nats)
    found = {name: gradient.clone() for name, gradient in named_gradients(student.model)}
    student.drop_gradient()
    return found


def rows_alone(model: PreTrainedModel, sequence: TokenSequence) -> torch.Tensor:
    """Logits at every scored row, by the unmodified forward pass of the whole sequence by itself, padding columns cut off."""
    logits_TV = model(input_ids=torch.tensor([sequence.ids]), use_cache=False).logits[0, :, :220]
    return logits_TV[[place - 1 for start, stop in sequence.answer_spans for place in range(start, stop)]]


def tokens_of(sequence: TokenSequence) -> torch.Tensor:
    """The tokens inside the answer spans."""
    return torch.tensor([sequence.ids[place] for start, stop in sequence.answer_spans for place in range(start, stop)])


def oracle_gradient(model: PreTrainedModel, sequences: Sequence[TokenSequence], loss_R: RowLoss) -> Gradient:
    """The gradient of the mean of `loss_R` over all scored tokens."""
    exact = copy.deepcopy(model).double()
    exact.zero_grad(set_to_none=True)
    torch.cat([loss_R(rows_alone(exact, sequence), sequence) for sequence in sequences]).mean().backward()
    return {name: parameter.grad for name, parameter in exact.named_parameters() if parameter.grad is not None}


def assert_same(found: Gradient, expected: Gradient, relative: float = RELATIVE) -> None:
    """Parameter by parameter, to `relative`; where a parameter's whole gradient is under a thousandth of the model's, that counts as its size."""
    assert found.keys() == expected.keys()
    whole = math.sqrt(sum(float(gradient.double().norm()) ** 2 for gradient in expected.values()))
    assert whole > 1e-3
    for name, gradient in expected.items():
        off = float((found[name].double() - gradient.double()).norm())
        assert off <= relative * max(float(gradient.double().norm()), 1e-3 * whole), f"{name}: off by {off / whole:.1e} of the whole gradient"


def cut(values: Sequence[TokenSequence], sizes: Sequence[int]) -> list[Sequence[TokenSequence]]:
    assert sum(sizes) == len(values)
    ends = list(itertools.accumulate(sizes))
    return [values[end - size : end] for size, end in zip(sizes, ends, strict=True)]


# --- the scale: a mean over the tokens of the whole step ---------------------------------------------------------------------------------

CUTS = {"1x8": (8,), "8x1": (1,) * 8, "3+5": (3, 5), "2+2+1+3": (2, 2, 1, 3)}


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS.keys())
@by_family
def test_the_gradient_is_the_mean_over_the_tokens_of_the_whole_step(family: str, sizes: tuple[int, ...]) -> None:
    student, teacher, sequences = student_of(family), teacher_of(family), some_sequences()
    exact_teacher = copy.deepcopy(teacher.model).double()

    def loss_R(logits_RV: torch.Tensor, sequence: TokenSequence) -> torch.Tensor:
        with torch.no_grad():
            log_p_RV = functional.log_softmax(rows_alone(exact_teacher, sequence), -1)
        log_q_RV = functional.log_softmax(logits_RV, -1)
        kl_R = functional.kl_div(log_q_RV, log_p_RV, reduction="none", log_target=True).sum(-1)
        return kl_R + 0.5 * functional.cross_entropy(logits_RV, tokens_of(sequence), reduction="none")

    expected = oracle_gradient(student.model, sequences, loss_R)
    batches = [batch_of(teacher, part) for part in cut(sequences, sizes)]
    assert_same(gradient_of(student, batches, objective_of(forward_kl(), cross_entropy())), expected)


def test_the_mean_is_not_a_mean_of_the_batches_means() -> None:
    """The same step, scaled as frameworks do that average each micro-batch: the oracle above would see it."""
    student, teacher, sequences = student_of(), teacher_of(), some_sequences()
    whole = gradient_of(student, [batch_of(teacher, sequences)], objective_of(forward_kl()))
    parts = [batch_of(teacher, part) for part in cut(sequences, (1, 7))]
    means = [gradient_of(student, [part], objective_of(forward_kl())) for part in parts]
    averaged = {name: (means[0][name] + means[1][name]) / 2 for name in whole}
    with pytest.raises(AssertionError, match="off by"):
        assert_same(averaged, whole, relative=1e-2)


@by_family
def test_accumulated_is_whole_for_hidden_targets(family: str) -> None:
    student, teacher, sequences = student_of(family), teacher_of(family), some_sequences()
    objective = objective_of(generalized_jsd(0.3), cross_entropy())
    whole = gradient_of(student, [batch_of(teacher, sequences, "hidden")], objective)
    batch = batch_of(teacher, sequences, "hidden")
    for sizes in CUTS.values():
        assert_same(gradient_of(student, _split(batch, sizes), objective), whole)


def _split(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """The same targets, row for row, in smaller batches."""
    parts, row = [], 0
    for sequences in cut(batch.sequences, sizes):
        rows = sum(len(sequence.scored_rows) for sequence in sequences)
        targets, labels = (slice_targets(targets, row, row + rows) for targets in (batch.targets, batch.labels))
        parts.append(Batch(sequences=tuple(sequences), targets=targets, labels=labels))
        row += rows
    return parts


# --- chunks -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "hidden", "top_k"])
@by_family
def test_chunked_is_whole_with_an_uneven_last_chunk(family: str, kind: str) -> None:
    batch = batch_of(teacher_of(family), some_sequences(), kind, k=9)
    rows = batch.scored_tokens
    objective = objective_of(forward_kl(), cross_entropy())
    whole = gradient_of(student_of(family, rows_per_chunk=rows), [batch], objective)
    for rows_per_chunk in (1, 7, rows - 1, rows + 1):
        assert rows_per_chunk == 1 or rows % rows_per_chunk
        assert_same(gradient_of(student_of(family, rows_per_chunk=rows_per_chunk), [batch], objective), whole)


# --- padding ------------------------------------------------------------------------------------------------------------------------------


@by_family
def test_a_padded_batch_is_its_sequences_one_by_one(family: str) -> None:
    """Teacher and student, the shortest beside the longest, in either order."""
    student, sequences = student_of(family), some_sequences(seed=4)
    objective = objective_of(forward_kl())
    alone = gradient_of(student, [batch_of(teacher_of(family, at_once=1), [one]) for one in sequences], objective)
    for order in (sequences, sequences[::-1], sorted(sequences, key=lambda one: len(one.ids))):
        assert_same(gradient_of(student, [batch_of(teacher_of(family, at_once=3), order)], objective), alone)


def test_what_follows_the_last_scored_token_changes_nothing() -> None:
    student, teacher, (sequence, *_) = student_of(), teacher_of(), some_sequences()
    longer = TokenSequence(ids=(*sequence.ids, 5, 6, 7), answer_spans=sequence.answer_spans)
    objective = objective_of(forward_kl(), cross_entropy())
    expected = gradient_of(student, [batch_of(teacher, [sequence])], objective)
    assert_same(gradient_of(student, [batch_of(teacher, [longer])], objective), expected)


def test_padding_columns_of_the_head_get_no_gradient() -> None:
    student, teacher = student_of("mistral"), teacher_of("mistral")
    found = gradient_of(student, [batch_of(teacher, some_sequences())], objective_of(forward_kl(), cross_entropy()))
    assert found["lm_head.weight"].shape[0] == STUDENT_ROWS
    assert not found["lm_head.weight"][220:].any()
    assert found["lm_head.weight"][:220].any(dim=-1).all()


# --- an empty mask ------------------------------------------------------------------------------------------------------------------------

UNSCORED = TokenSequence(ids=(4, 9, 11, 3, 8, 2), answer_spans=())


@pytest.mark.parametrize("kind", ["text", "top_k", "hidden", "full"])
def test_a_batch_without_scored_rows_has_no_gradient(kind: str) -> None:
    student, teacher = student_of(), teacher_of()
    batch = batch_of(teacher, [UNSCORED, UNSCORED], kind, k=5)
    objective = objective_of(cross_entropy()) if kind == "text" else objective_of(forward_kl(), cross_entropy())
    sums = student.forward_backward(batch, objective, divide_by=1)
    assert (sums.objective_nats, sums.scored_tokens) == (0.0, 0)
    assert student.score(batch, objective).scored_tokens == 0
    assert not any(gradient.any() for _, gradient in named_gradients(student.model))
    before = {name: parameter.clone() for name, parameter in student.model.named_parameters()}
    assert student.optim_step(0.1) == 0.0
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.model.named_parameters())


def test_a_step_may_mix_empty_and_other_batches() -> None:
    student, teacher, sequences = student_of(), teacher_of(), some_sequences(5)
    objective = objective_of(forward_kl(), cross_entropy())
    expected = gradient_of(student, [batch_of(teacher, sequences)], objective)
    mixed = [sequences[:2], [UNSCORED], [UNSCORED, *sequences[2:4], UNSCORED], [sequences[4], UNSCORED]]
    assert_same(gradient_of(student, [batch_of(teacher, part) for part in mixed], objective), expected)


def test_a_first_token_has_no_row_that_predicts_it() -> None:
    student, teacher = student_of(), teacher_of()
    whole, rest = (TokenSequence(ids=(4, 9, 11, 3), answer_spans=((start, 4),)) for start in (0, 1))
    assert whole.scored_rows == rest.scored_rows == (0, 1, 2)
    objective = objective_of(forward_kl(), cross_entropy())
    assert_same(gradient_of(student, [batch_of(teacher, [whole])], objective), gradient_of(student, [batch_of(teacher, [rest])], objective))


# --- padding with the end token ------------------------------------------------------------------------------------------------------------


def test_padding_with_the_end_token_leaves_the_end_token_scored_once() -> None:
    """The end token inside a question, ending an answer, and as padding: only the second counts, and each answer's counts once."""
    fast, student = tiny_tokenizer(), student_of()
    assert fast.pad_token_id == fast.eos_token_id == 0
    renderer = Renderer(fast)
    asked = {"1": "PT1H", "at <|end|> of <|end|><|end|>": "the 5th of March 2024", "every weekday": "30 9 * * 1-5"}
    sequences = [renderer.sequence(Prompt.of(question), answer) for question, answer in asked.items()]
    for sequence, (question, answer) in zip(sequences, asked.items(), strict=True):
        written = [sequence.ids[row + 1] for row in sequence.scored_rows]
        assert written == [*fast(answer, add_special_tokens=False)["input_ids"], 0]
        assert sequence.ids.count(0) == 1 + question.count("<|end|>")
    source = TextSource({str(place): sequence for place, sequence in enumerate(sequences)}, student.vocabulary)
    found = gradient_of(student, [source.batch(["0", "1", "2"])], objective_of(cross_entropy()))
    expected = oracle_gradient(
        student.model, sequences, lambda logits_RV, sequence: functional.cross_entropy(logits_RV, tokens_of(sequence), reduction="none")
    )
    assert_same(found, expected)


def test_end_tokens_inside_an_answer_are_scored_like_any_other() -> None:
    """What a teacher wrote is taken id by id; padding by the same id beside it stays out."""
    student, teacher = student_of(), teacher_of()
    inside = TokenSequence(ids=(0, 7, 0, 9, 0, 0), answer_spans=((2, 6),))
    longer = some_sequences(1)[0]
    objective = objective_of(forward_kl(), cross_entropy())
    together = gradient_of(student, [batch_of(teacher, [inside, longer])], objective)
    assert_same(together, gradient_of(student, [batch_of(teacher, [one]) for one in (inside, longer)], objective))
    assert batch_of(teacher, [inside, longer]).labels.token_ids_R[:4].tolist() == [0, 9, 0, 0]


# --- the causal shift -----------------------------------------------------------------------------------------------------------------------


@by_family
def test_row_t_of_the_targets_is_the_teachers_distribution_after_token_t(family: str) -> None:
    teacher, sequences = teacher_of(family, at_once=3), some_sequences()
    with torch.no_grad():
        expected_RV = torch.cat([functional.log_softmax(rows_alone(teacher.model, sequence), -1) for sequence in sequences])
    full = teacher.targets(sequences, TargetRequest(kind="full"))
    top_k = teacher.targets(sequences, TargetRequest(kind="top_k", k=6))
    hidden = teacher.targets(sequences, TargetRequest(kind="hidden"))
    assert isinstance(full, FullTargets)
    assert isinstance(top_k, TopKTargets)
    assert isinstance(hidden, HiddenTargets)
    torch.testing.assert_close(full.log_probs_RV, expected_RV, atol=2e-5, rtol=0)
    kept_RK, ids_RK = expected_RV.topk(6)
    torch.testing.assert_close(top_k.log_probs_RK, kept_RK, atol=2e-5, rtol=0)
    assert torch.equal(top_k.ids_RK.long(), ids_RK)
    torch.testing.assert_close(top_k.tail_log_mass_R.exp() + top_k.log_probs_RK.exp().sum(-1), torch.ones(len(expected_RV)), atol=1e-5, rtol=0)
    with torch.no_grad():
        states = [teacher.model(input_ids=torch.tensor([one.ids]), output_hidden_states=True).hidden_states[-1][0] for one in sequences]
    states_RD = torch.cat([states_TD[list(one.scored_rows)] for states_TD, one in zip(states, sequences, strict=True)])
    torch.testing.assert_close(hidden.states_RD.float(), states_RD, atol=0, rtol=2**-8)
    # A row too early or too late is nowhere near.
    for found_RV, shifted_RV in ((full.log_probs_RV[:-1], expected_RV[1:]), (full.log_probs_RV[1:], expected_RV[:-1])):
        assert float((found_RV - shifted_RV).abs().amax(-1).median()) > 0.5


def test_the_students_loss_is_that_of_the_next_token() -> None:
    student, sequences = student_of(), some_sequences()
    source = TextSource({str(place): sequence for place, sequence in enumerate(sequences)}, student.vocabulary)
    sums = student.score(source.batch([str(place) for place in range(len(sequences))]), objective_of(cross_entropy()))
    with torch.no_grad():
        alone = [functional.cross_entropy(rows_alone(student.model, sequence), tokens_of(sequence), reduction="sum") for sequence in sequences]
    assert sums.objective_nats == pytest.approx(float(sum(alone)), rel=1e-6)
    logprobs = student.logprobs(sequences)
    assert [-sum(one) for one in logprobs] == pytest.approx([float(nats) for nats in alone], rel=1e-5)
    # The same tokens read off the row before or after their own are not as likely.
    one = sequences[0]
    with torch.no_grad():
        log_q_TV = functional.log_softmax(student.model(input_ids=torch.tensor([one.ids])).logits[0, :, :220], -1)
    for shift, same in ((-1, False), (0, True), (1, False)):
        read = [float(log_q_TV[row + shift, one.ids[row + 1]]) for row in one.scored_rows]
        assert (logprobs[0] == pytest.approx(read, abs=1e-4)) == same


def test_another_last_token_changes_the_loss_of_its_own_row_and_no_other() -> None:
    student = student_of()
    one, other = (TokenSequence(ids=(9, 4, 7, 7, 3, last), answer_spans=((2, 6),)) for last in (5, 6))
    first, second = student.logprobs([one]), student.logprobs([other])
    assert first[0][:3] == second[0][:3]
    assert first[0][3] != second[0][3]


def test_no_gradient_reaches_a_token_through_a_row_before_it() -> None:
    """In an untied model an id that stands only where nothing scored follows has no gradient at the input; one place earlier it has."""
    student, teacher = student_of("mistral"), teacher_of("mistral")
    last = TokenSequence(ids=(9, 4, 7, 3, 150), answer_spans=((2, 5),))
    earlier = TokenSequence(ids=(9, 4, 7, 150, 3), answer_spans=((2, 5),))
    for sequence, reached in ((last, False), (earlier, True)):
        found = gradient_of(student, [batch_of(teacher, [sequence])], objective_of(forward_kl(), cross_entropy()))
        assert bool(found["model.embed_tokens.weight"][150].any()) == reached


# --- stored and live ------------------------------------------------------------------------------------------------------------------------


REQUESTS = {
    "hidden": TargetRequest(kind="hidden"),
    "hidden int8": TargetRequest(kind="hidden", state_dtype="int8"),
    "top_k": TargetRequest(kind="top_k", k=7),
    "drawn": TargetRequest(kind="drawn", draws=30),
}
DIVERGENCES = [forward_kl(), reverse_kl(), generalized_jsd(0.5)]


@pytest.mark.parametrize(
    ("kind", "divergence"),
    [(kind, divergence) for kind, request in REQUESTS.items() for divergence in DIVERGENCES if request.kind in divergence.kinds],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@by_family
def test_stored_is_live(family: str, kind: str, divergence: object, tmp_path: Path) -> None:
    """Targets through a store on disk, in two shards, read back in another order; live ones asked for batch by batch."""
    student, teacher = student_of(family), teacher_of(family)
    sequences = {record_id(sequence): sequence for sequence in some_sequences(10)}
    request = REQUESTS[kind]
    stored = StoredSource(stored_targets(tmp_path / "targets", teacher, list(sequences.values()), request), teacher.vocabulary)
    live = LiveSource(teacher, sequences, request)
    objective = objective_of(divergence, cross_entropy())
    order = sorted(sequences)
    batches = [order[:3], order[3:4], order[4:]]
    assert [stored.length(record) for record in order] == [live.length(record) for record in order]
    found = gradient_of(student, list(stored.batches(batches)), objective)
    # States differ by float32's rounding with the company they are computed in; one that lies between two steps of int8 may fall to either side.
    relative = 1e-3 if request.state_dtype == "int8" else RELATIVE
    assert_same(found, gradient_of(student, [live.batch(records) for records in batches], objective), relative)


def stored_targets(directory: Path, teacher: LocalTeacher, sequences: Sequence[TokenSequence], request: TargetRequest) -> TargetStore:
    codecs: dict[str, Codec] = {
        "hidden": HiddenCodec(width=48, state_dtype=request.state_dtype),
        "top_k": TopKCodec(k=max(request.k, 1)),
        "drawn": DrawnCodec(draws=max(request.draws, 1)),
    }
    codec = codecs[request.kind]
    targets = as_arrays(teacher.targets(sequences, request))
    identity = StoreIdentity(
        teacher=teacher.ref,
        vocabulary=teacher.vocabulary.fingerprint,
        vocabulary_size=teacher.vocabulary.size,
        chat_template_sha256=None,
        codec=codec,
        temperature=1.0,
        generation=Sampling(max_new_tokens=8),
    )
    head = targets.head if isinstance(targets, HiddenTargets) else None
    store = TargetStore.create_or_resume(directory, identity, head)
    records, row = [], 0
    for sequence in sequences:
        rows = len(sequence.scored_rows)
        records.append(StoredRecord(sequence=sequence, targets=slice_targets(targets, row, row + rows)))
        row += rows
    store.append_shard(records[:6])
    store.append_shard(records[6:])
    return TargetStore.open(directory, identity)


# --- nothing random ---------------------------------------------------------------------------------------------------------------------------


def test_the_gradient_does_not_depend_on_a_random_generator() -> None:
    """GPT-2 comes with dropout: a step that drew from a global generator could not be resumed bit for bit."""
    student, teacher = student_of("gpt2"), teacher_of("gpt2")
    assert student.model.config.resid_pdrop > 0
    batch, objective = batch_of(teacher, some_sequences()), objective_of(forward_kl())
    first, second = (gradient_of(student, [batch], objective) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    student.sample([(1, 2, 3)], Sampling(max_new_tokens=2))
    third = gradient_of(student, [batch], objective)
    assert all(torch.equal(first[name], third[name]) for name in first)
    assert student.score(batch, objective).objective_nats == student.forward_backward(batch, objective, divide_by=1).objective_nats
