"""The sampler as a function on logits: what it changes and what not, on numpy and on torch, in `transformers` and in our own teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from guard_cases import key, live_key, more_than_chance, vocabulary
from helpers import tiny_model
from stillroom.core.errors import GuardError
from stillroom.core.identities import ModelRef, Sampling
from stillroom.guard.gumbel import GumbelMax
from stillroom.guard.radioactivity import Radioactivity
from stillroom.guard.red_green import RedGreen
from stillroom.guard.sampler import ELIGIBLE, NO_CHOICE, OUTSIDE, REPEATED, SHORT, KeyedSampler, Survey
from stillroom.guard.schemes import Scheme
from stillroom.guard.tournament import Tournament
from stillroom.guard.windows import Answer
from stillroom.models.local import LocalTeacher
from stillroom.targets.protocols import LogitsTransform

SIZE, ROWS = 300, 320
SCHEMES: list[Scheme] = [RedGreen(window=2), GumbelMax(window=2), Tournament(window=2)]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def sampler(scheme: Scheme = SCHEMES[0], **more: Any) -> KeyedSampler:
    return KeyedSampler(**{"scheme": scheme, "key": key(0), "vocabulary": vocabulary(SIZE, ROWS), **more})


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    """Contexts without a repeated window, and logits."""
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(np.arange(1, SIZE))[:9] for _ in range(6)]), (rng.normal(size=(6, ROWS)) * 3).astype(np.float32)


@each_scheme
def test_within_the_candidates_it_is_the_scheme_and_beyond_them_nothing_changes(scheme: Scheme, rows: tuple[np.ndarray, np.ndarray]) -> None:
    contexts, logits = rows
    temperature = 0.7
    found = softmax(sampler(scheme, temperature=temperature, candidates=40)(contexts, logits), temperature)
    before = softmax(logits[:, :SIZE], temperature)
    assert (found[:, SIZE:] == 0.0).all()
    top = np.argsort(-logits[:, :SIZE], axis=1)[:, :40]
    mass = np.take_along_axis(before, top, axis=1).sum(axis=1, keepdims=True)
    expected = before.copy()
    within = scheme.watermarked(key(0), contexts[:, -2:], top, np.log(np.take_along_axis(before, top, axis=1) / mass))
    np.put_along_axis(expected, top, mass * np.exp(within), axis=1)
    assert found[:, :SIZE] == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert not np.allclose(found[:, :SIZE], before, atol=1e-3)


TRUNCATIONS = [{}, {"top_k": 20}, {"top_p": 0.8}, {"top_p": 0.999}, {"top_k": 50, "top_p": 0.6}, {"top_p": 1e-6}]


@each_scheme
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_torch_and_numpy_agree(scheme: Scheme, truncation: dict[str, Any], rows: tuple[np.ndarray, np.ndarray]) -> None:
    contexts, logits = rows
    some = sampler(scheme, temperature=0.9, candidates=30, **truncation)
    given = torch.from_numpy(logits.copy())
    found = some(torch.from_numpy(contexts), given)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == given.dtype
    assert (given.numpy() == logits).all(), "what was given was changed"
    assert np.asarray(found) == pytest.approx(some(contexts, logits), rel=1e-5)


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_without_a_watermark_the_distribution_is_the_one_of_transformers(
    truncation: dict[str, Any], temperature: float, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    contexts, logits = rows
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if "top_k" in truncation:
        warpers.append(TopKLogitsWarper(truncation["top_k"]))
    if "top_p" in truncation:
        warpers.append(TopPLogitsWarper(truncation["top_p"]))
    given = torch.from_numpy(logits[:, :SIZE].copy())
    expected = warpers(torch.from_numpy(contexts), given).softmax(-1)
    some = sampler(temperature=temperature, candidates=30, share=0.0, **truncation)
    for found in (some(torch.from_numpy(contexts), given), torch.from_numpy(some(contexts, logits[:, :SIZE]))):
        assert (found / temperature).softmax(-1).numpy() == pytest.approx(expected.numpy(), abs=1e-6)


@each_scheme
@pytest.mark.parametrize("truncation", [{"top_k": 20}, {"top_p": 0.8}], ids=str)
def test_what_truncation_cuts_off_stays_cut_off(scheme: Scheme, truncation: dict[str, Any], rows: tuple[np.ndarray, np.ndarray]) -> None:
    contexts, logits = rows
    plain = sampler(scheme, share=0.0, **truncation)(contexts, logits)
    marked = sampler(scheme, **truncation)(contexts, logits)
    assert (np.isneginf(marked) | ~np.isneginf(plain)).all()
    assert np.isneginf(marked)[:, SIZE:].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_type_of_the_logits_is_kept(dtype: torch.dtype, rows: tuple[np.ndarray, np.ndarray]) -> None:
    contexts, logits = rows
    given = torch.from_numpy(logits).to(dtype)
    found = sampler(GumbelMax(window=2))(torch.from_numpy(contexts), given)
    assert found.dtype == dtype
    assert found.device == given.device
    exact = sampler(GumbelMax(window=2))(torch.from_numpy(contexts), given.double())
    assert found[:, :SIZE].argmax(-1).tolist() == exact[:, :SIZE].argmax(-1).tolist()
    untouched = sampler(share=0.0)(torch.from_numpy(contexts), given)
    assert torch.equal(untouched[:, :SIZE], given[:, :SIZE])


@pytest.mark.parametrize("width", [SIZE - 1, SIZE + 1, ROWS - 1, ROWS + 1, 0, 1])
def test_logits_of_another_width_are_refused(width: int) -> None:
    for logits in (np.zeros((1, width), np.float32), torch.zeros((1, width))):
        with pytest.raises(GuardError, match="logits of") as refused:
            sampler()(np.array([[1, 2, 3]]), logits)
        assert refused.value.code == "guard-logits"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": 0.0}, "temperature 0"),  # pitfall P11
        ({"temperature": -1.0}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 1}, "top_k 1"),
        ({"candidates": 1}, "1 candidates"),
        ({"top_p": 0.0}, "top_p 0"),
        ({"share": 1.5}, "share 1.5"),
    ],
)
def test_settings_under_which_nothing_could_be_found_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(GuardError, match=says) as refused:
        sampler(**settings)
    assert refused.value.code == "guard-sampler"


# -- windows -----------------------------------------------------------------------------------------------------------


def state(some: KeyedSampler, context: list[int]) -> str:
    survey = some.survey(np.array([context]), np.linspace(0, 1, ROWS, dtype=np.float32)[None])
    return next(why for why, count in survey.counts.items() if count)


def test_a_window_that_the_answer_has_used_is_sampled_from_normally() -> None:
    some = sampler(begins_after=(90, 91))
    prompt = [5, 6, 7, 8, 5, 6, 90, 91]
    assert state(some, prompt) == ELIGIBLE  # the window 90 91
    assert state(some, [*prompt, 5]) == ELIGIBLE
    assert state(some, [*prompt, 5, 6]) == ELIGIBLE  # in the prompt only
    assert state(some, [*prompt, 5, 6, 7]) == ELIGIBLE
    assert state(some, [*prompt, 5, 6, 7, 5, 6]) == REPEATED
    assert state(some, [*prompt, 5, 6, 7, 5, 6, 90, 91]) == ELIGIBLE  # a new turn is a new answer
    assert state(some, [*prompt, 3, 3]) == ELIGIBLE
    assert state(some, [*prompt, 3, 3, 3]) == REPEATED
    assert state(sampler(), [*prompt, 5, 6]) == REPEATED  # without a mark, the prompt counts too


def test_a_context_shorter_than_a_window_and_padding() -> None:
    assert state(sampler(), [5]) == SHORT
    assert state(sampler(), [0, 0, 0, 5]) == SHORT
    assert state(sampler(), [0, 0, 0]) == SHORT
    assert state(sampler(), []) == SHORT
    assert state(sampler(pad_id=9), [9, 9, 9, 5]) == SHORT
    assert state(sampler(), [0, 0, 5, 6]) == state(sampler(), [5, 6]) == ELIGIBLE


@each_scheme
def test_a_row_s_result_is_its_own(scheme: Scheme) -> None:
    """The same with other rows beside it, in another order, and with padding: rows may leave a batch."""
    rng = np.random.default_rng(0)
    contexts, logits = rng.integers(1, 4, size=(8, 12)), (rng.normal(size=(8, ROWS)) * 2).astype(np.float32)
    contexts[:, 3] = 9
    some = sampler(scheme, begins_after=(9,), share=0.5, candidates=20)
    whole = some(contexts, logits)
    assert 0 < some.survey(contexts, logits).counts[REPEATED] < 8
    padded = np.concatenate([np.zeros((8, 3), np.int64), contexts], axis=1)
    assert (some(padded, logits) == whole).all()
    for row in range(8):
        assert (some(contexts[row : row + 1], logits[row : row + 1])[0] == whole[row]).all()
    assert (some(contexts[::-2], logits[::-2]) == whole[::-2]).all()


# -- the share of traffic ----------------------------------------------------------------------------------------------


def test_a_request_is_watermarked_whole_or_not_at_all() -> None:
    rng = np.random.default_rng(0)
    some = sampler(begins_after=(9,), share=0.4)
    chosen = 0
    for _ in range(100):
        prompt = [*rng.integers(10, SIZE, size=6).tolist(), 9]
        answer = rng.permutation(np.arange(10, SIZE))[:5].tolist()
        states = {state(some, [*prompt, *answer[:length]]) for length in (0, 2, 5)}
        assert states in ({ELIGIBLE}, {OUTSIDE})
        chosen += states == {ELIGIBLE}
    assert not more_than_chance(chosen, 100, 0.4)
    assert not more_than_chance(100 - chosen, 100, 0.6)
    assert state(some, [11, 12, 13]) == OUTSIDE  # no mark, so no request that could be chosen


def test_the_share_is_the_key_s_to_choose_and_by_name_where_there_are_no_prompts() -> None:
    some = sampler(share=0.4)
    with pytest.raises(GuardError, match="a share of 0.4") as refused:
        state(some, [5, 6, 7])
    assert refused.value.code == "guard-sampler"
    names = [f"request {number}" for number in range(300)]
    chosen = [some.for_request(name).share for name in names]
    assert set(chosen) == {0.0, 1.0}
    assert not more_than_chance(int(sum(chosen)), 300, 0.4)
    assert not more_than_chance(300 - int(sum(chosen)), 300, 0.6)
    assert chosen == [some.for_request(name).share for name in names]
    assert chosen != [sampler(key=key(1), share=0.4).for_request(name).share for name in names]
    assert state(some.for_request(names[chosen.index(1.0)]), [5, 6, 7]) == ELIGIBLE
    assert state(some.for_request(names[chosen.index(0.0)]), [5, 6, 7]) == OUTSIDE
    assert sampler(share=1.0).for_request("any").share == 1.0
    assert sampler(share=0.0).for_request("any").share == 0.0


# -- pitfall P11: next to nothing to choose ----------------------------------------------------------------------------


def test_a_teacher_that_has_nothing_to_choose_is_found_out_before_it_is_served(rows: tuple[np.ndarray, np.ndarray]) -> None:
    contexts, logits = rows
    some = sampler()
    varied = some.survey(contexts, logits)
    assert varied.eligible_share == 1.0
    before = softmax(logits[:, :SIZE])
    assert varied.mean_bits == pytest.approx(float(-(before * np.log2(before)).sum(axis=1).mean()), rel=0.02)
    varied.require()
    certain = np.full_like(logits, -20.0)
    certain[:, 7] = 20.0
    nothing = some.survey(contexts, certain)
    assert nothing.counts[NO_CHOICE] == 6
    assert nothing.eligible_share == 0.0
    with pytest.raises(GuardError, match="0 of 6 positions that can carry a watermark.*6 with next to nothing to choose") as refused:
        nothing.require()
    assert refused.value.code == "guard-sampler"
    both = Survey.of([varied, nothing])
    assert (both.positions, both.eligible_share) == (12, 0.5)
    with pytest.raises(GuardError, match="0 of 0 positions"):
        Survey.of([]).require()
    masked = logits.copy()
    masked[:, 1:] = -np.inf
    assert some.survey(contexts, masked).mean_bits == 0.0


# -- put into teachers -------------------------------------------------------------------------------------------------


def detected(some: KeyedSampler, texts: list[tuple[tuple[int, ...], tuple[int, ...]]], number: int) -> float:
    """Log p of the closed test of what a sampler with live_key(0) wrote, under live_key(number)."""
    detector = Radioactivity(
        mode="closed", scheme=some.scheme, key=live_key(number), vocabulary=some.vocabulary.fingerprint, size=some.vocabulary.size
    )
    found = detector.test(detector.plan(alpha=0.01), [Answer(prompt_ids=prompt, answer_ids=answer) for prompt, answer in texts])
    assert found.log_p is not None
    return found.log_p


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(rows=220, spread=0.15)


def of_model(scheme: Scheme, **more: Any) -> KeyedSampler:
    return KeyedSampler(scheme=scheme, key=live_key(0).live, vocabulary=vocabulary(200, 220), begins_after=(9,), **more)


TINY = ModelRef(source="tiny", kind="directory", revision=None, weights_sha256=None, architecture=None, parameters=None, licence=None)
PROMPTS = [(*np.random.default_rng(seed).integers(10, 200, size=3 + seed % 3).tolist(), 9) for seed in range(12)]


@each_scheme
def test_our_own_teacher_writes_with_it(scheme: Scheme, model: Any) -> None:
    some: LogitsTransform = of_model(scheme, temperature=1.3)
    assert isinstance(some, KeyedSampler)
    teacher = LocalTeacher(model, TINY, some.vocabulary, transform=some)
    written = teacher.generate(PROMPTS, Sampling(max_new_tokens=30, temperature=1.3, seed=0))
    texts = list(zip(PROMPTS, written, strict=True))
    assert max(max(answer) for answer in written) < 200
    assert detected(some, texts, 0) < np.log(1e-6)
    assert detected(some, texts, 1) > np.log(1e-6)


@each_scheme
def test_it_is_a_logits_processor_of_transformers(scheme: Scheme, model: Any) -> None:
    some = of_model(scheme, temperature=1.3, top_p=0.95)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in PROMPTS])
    torch.manual_seed(0)
    out = model.generate(
        ids, attention_mask=(ids != 0).long(), max_new_tokens=30, do_sample=True, temperature=1.3, top_k=0, top_p=1.0, logits_processor=[some]
    )
    texts = [(prompt, tuple(row[longest:].tolist())) for prompt, row in zip(PROMPTS, out, strict=True)]
    assert detected(some, texts, 0) < np.log(1e-6)
    assert detected(some, texts, 1) > np.log(1e-6)


def test_it_does_the_same_in_both(model: Any) -> None:
    """Gumbel-max leaves nothing to chance while no window repeats: both write one text."""
    some = of_model(GumbelMax(window=3))
    teacher = LocalTeacher(model, TINY, some.vocabulary, transform=some)
    ours = teacher.generate(PROMPTS[:1], Sampling(max_new_tokens=12, temperature=1.0, seed=0))[0]
    ids = torch.tensor([PROMPTS[0]])
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=True, temperature=1.0, top_k=0, logits_processor=[some]
    )
    assert tuple(theirs[0, len(PROMPTS[0]) :].tolist()) == ours


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_it_works_without_gradients_and_on_what_requires_them(make: Callable[[Any], Any], rows: tuple[np.ndarray, np.ndarray]) -> None:
    contexts, logits = rows
    given = make(logits)
    if isinstance(given, torch.Tensor):
        given = given.clone().requires_grad_(True)
    found = sampler()(make(contexts), given)
    assert not getattr(found, "requires_grad", False)
