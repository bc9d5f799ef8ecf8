"""False accusations: over redrawn keys no more than the level says, where the naive way makes many more (pitfalls of reference/guard.md, section 6).

Each test redraws the key for a suspect that has nothing to do with it and counts rejections; it fails by chance less than once in a million.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from guard_cases import key, live_key, more_than_chance, random_model, write
from stillroom.guard import prf
from stillroom.guard.decoys import LiveKey
from stillroom.guard.gumbel import GumbelMax
from stillroom.guard.keys import Key
from stillroom.guard.radioactivity import Mode, Radioactivity
from stillroom.guard.red_green import RedGreen
from stillroom.guard.schemes import Scheme
from stillroom.guard.tournament import Tournament
from stillroom.guard.windows import NO_TOKEN, Answer, OncePer, Reading, WindowSet, aligned_reading, exactly_written
from stillroom.targets.vocabulary import Vocabulary

ALPHA = 0.01


def detector(mode: Mode, scheme: Scheme, live: LiveKey, *, size: int, **more: object) -> Radioactivity:
    return Radioactivity(mode=mode, scheme=scheme, key=live, vocabulary="ab" * 32, size=size, **more)  # type: ignore[arg-type]


def log_p(some: Radioactivity, evidence: Sequence[Answer] | Sequence[Reading]) -> float:
    found = some.test(some.plan(alpha=ALPHA), evidence)
    assert found.log_p is not None
    return found.log_p


def rejections(found: Sequence[float]) -> int:
    return sum(some <= math.log(ALPHA) for some in found)


@pytest.mark.parametrize("scheme", [RedGreen(window=1), GumbelMax(window=1), Tournament(window=1)], ids=lambda scheme: scheme.name)
def test_p1_a_pair_that_is_counted_twice_accuses_the_innocent(scheme: Scheme) -> None:
    """Words as frequent as words are, 2,000 of them, under 200 keys: pooled as they come, and each pair once."""
    ids = np.random.default_rng(0).choice(4000, size=2000, p=(1 / np.arange(1, 4001) ** 1.1) / (1 / np.arange(1, 4001) ** 1.1).sum())
    pairs = detector("closed", scheme, live_key(0), size=4000).pairs([Answer(prompt_ids=(), answer_ids=tuple(ids.tolist()))])
    naive, ours = [], []
    for number in range(200):
        naive.append(scheme.log_p(float(scheme.scores(key(number), ids[:-1, None], ids[1:]).sum()), len(ids) - 1))
        ours.append(scheme.log_p(float(scheme.scores(key(number), pairs.windows_NK, pairs.tokens_N).sum()), len(pairs)))
    assert more_than_chance(rejections(naive), 200, ALPHA)
    assert not more_than_chance(rejections(ours), 200, ALPHA)


TABLE = (np.random.default_rng(0).permutation(65_536) < 0.5026 * 65_536).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class FromTable(Tournament):
    """A tournament whose coins come from one table of 65,536, which the key only points into; 1.3 standard deviations more of its entries are 1 than half."""

    layers: int = 30

    def scores(self, key: Key, windows_NK: prf.Ids, tokens_N: prf.Ids) -> np.ndarray:
        words = prf.keyed(key, self.name, windows_NK, tokens_N)
        steps = np.arange(1, 2 * self.layers, 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return sum((TABLE[(words * step) >> np.uint64(48)] for step in steps), start=np.zeros(len(words)))


def test_p2_a_table_in_place_of_the_keyed_function_accuses_the_innocent_and_decoys_do_not() -> None:
    rng = np.random.default_rng(0)
    text = [Answer(prompt_ids=(), answer_ids=tuple(rng.integers(0, 30_000, 10_001).tolist()))]
    findings = []
    for number in range(20):
        some = detector("closed", FromTable(window=1), live_key(number, 19), size=30_000)
        findings.append(some.test(some.plan(alpha=ALPHA), text))
    assert more_than_chance(sum(some.log_p <= math.log(ALPHA) for some in findings if some.log_p is not None), 20, ALPHA)
    assert not more_than_chance(sum(some.rank_p <= 0.05 for some in findings if some.rank_p is not None), 20, 0.05)
    # Four decoys or more beside a p of at most 1 % raise the alarm, so that a rejection is left where the live key is among the first four of 20.
    assert not more_than_chance(sum(some.rejects for some in findings), 20, 0.2)


def copied(prompt: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
    """What a clean model writes that repeats parts of its prompt: five pieces of six tokens."""
    return tuple(token for start in rng.integers(0, len(prompt) - 6, size=5) for token in prompt[start : start + 6])


def test_p3_a_clean_model_that_copies_a_watermarked_prompt_is_not_accused() -> None:
    scheme, size, audits = RedGreen(window=2, delta=3.0), 24, 40
    naive, ours = [], []
    for number in range(audits):
        rng = np.random.default_rng(number)
        live = live_key(number)
        prompts = [tuple(text) for text in write(scheme, live.live, random_model(size, rng), 8, 30, rng).tolist()]
        answers = [copied(prompt, rng) for prompt in prompts]
        some = detector("closed", scheme, live, size=size)
        naive.append(log_p(some, [Answer(prompt_ids=(), answer_ids=answer) for answer in answers]))
        ours.append(log_p(some, [Answer(prompt_ids=prompt, answer_ids=answer) for prompt, answer in zip(prompts, answers, strict=True)]))
    assert more_than_chance(rejections(naive), audits, ALPHA)
    assert not more_than_chance(rejections(ours), audits, ALPHA)


def imitated(text: tuple[int, ...], model: np.ndarray) -> tuple[int, ...]:
    """What a clean model predicts that imitates what it has read: the token that followed when it last read the same one, else its own favourite."""
    followed: dict[int, int] = {}
    found = []
    for place, token in enumerate(text):
        if place:
            followed[text[place - 1]] = token
        found.append(followed.get(token, int(model[token].argmax())))
    return tuple(found)


@pytest.mark.parametrize("once_per", ["pair", "window"])
def test_p3_a_clean_model_that_imitates_the_text_it_reads_is_not_accused(once_per: OncePer) -> None:
    """Naive: every prediction is scored once over the pool, whatever stood before it in the same text."""
    scheme, size, audits = RedGreen(window=1, delta=3.0), 30, 40
    naive, ours = [], []
    for number in range(audits):
        rng = np.random.default_rng(number)
        live, model = live_key(number), random_model(size, rng)
        texts = [tuple(text) for text in write(scheme, live.live, model, 6, 60, rng).tolist()]
        readings = [Reading(context_ids=text, predicted_ids=imitated(text, model)) for text in texts]
        some = detector("open", scheme, live, size=size, once_per=once_per)
        ours.append(log_p(some, readings))
        every = np.unique([pair for reading in readings for pair in zip(reading.context_ids, reading.predicted_ids, strict=True)], axis=0)
        naive.append(scheme.log_p(float(scheme.scores(live.live, every[:, :1], every[:, 1]).sum()), len(every)))
    assert more_than_chance(rejections(naive), audits, ALPHA)
    assert not more_than_chance(rejections(ours), audits, ALPHA)


def shown(row: Sequence[int], green: Sequence[bool], last: int) -> tuple[tuple[int, ...], bool]:
    """A text that goes from one of four windows to the next while their favourites are green, to `last` at the end, and whether it gets there."""
    text: list[int] = []
    for place in (some for some in range(4) if some != last):
        text += [row[place], row[4 + place]]
        if not green[place]:
            return (*text[:-1], 999), False
    return (*text, row[last], row[4 + last]), True


@pytest.mark.parametrize("mode", ["closed", "open"])
def test_texts_that_show_each_other_s_windows_accuse_nobody_once_per_window(mode: Mode) -> None:
    """100 groups of four windows, four texts each, which read three and end at the fourth where those are green. So all four are scored where all are green:
    one by one their coins are fair, but the sum scatters more than its law says.
    """
    scheme, audits = RedGreen(window=1, gamma=0.5), 400
    rows = np.arange(100 * 8).reshape(100, 8)  # four windows and their favourites
    plain = tuple(range(900, 910))
    found: dict[OncePer, list[float]] = {"pair": [], "window": []}
    for number in range(audits):
        live = live_key(number)
        green = scheme.scores(live.live, rows[:, :4].reshape(-1, 1), rows[:, 4:].reshape(-1)).reshape(-1, 4) == 1.0
        texts = [shown(row, coins, last) for row, coins in zip(rows.tolist(), green.tolist(), strict=True) for last in range(4)]
        evidence: list[Answer] | list[Reading]
        if mode == "closed":
            evidence = [Answer(prompt_ids=text[: len(text) - arrived], answer_ids=text[len(text) - arrived :]) for text, arrived in texts]
            evidence.append(Answer(prompt_ids=(), answer_ids=plain))
        else:
            evidence = [
                Reading(context_ids=text[:-1], predicted_ids=(*(NO_TOKEN,) * (len(text) - 2), text[-1] if arrived else NO_TOKEN))
                for text, arrived in texts
            ]
            evidence.append(Reading(context_ids=plain[:-1], predicted_ids=plain[1:]))
        for once_per, log_ps in found.items():
            log_ps.append(log_p(detector(mode, scheme, live, size=1000, once_per=once_per), evidence))
    assert more_than_chance(rejections(found["pair"]), audits, ALPHA)
    assert not more_than_chance(rejections(found["window"]), audits, ALPHA)


LETTERS = b"abcde"
TWO_LETTERS = Vocabulary(tokens=tuple(bytes([a, b]) for a in LETTERS for b in LETTERS), special={}, end_ids=(), rows=25)


def cut(text: bytes, rng: np.random.Generator) -> list[bytes]:
    """The text in pieces of another tokenizer: each place between two bytes is a border or not."""
    bounds = [0, *(np.flatnonzero(rng.random(len(text) - 1) < 0.5) + 1).tolist(), len(text)]
    return [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def test_p12_a_clean_model_that_has_read_half_of_a_token_is_not_accused() -> None:
    """Naive: the next border of the suspect's at or after the window, and the teacher's token that what it read and predicts together begin."""
    scheme, audits = RedGreen(window=2, delta=3.0), 40
    naive, ours = [], []
    for number in range(audits):
        rng = np.random.default_rng(number)
        live, model = live_key(number), random_model(25, rng, spread=2.0)
        some = detector("open", scheme, live, size=25)
        near, exact = [], []
        for ids in write(scheme, live.live, model, 8, 40, rng).tolist():
            text = TWO_LETTERS.bytes_of(ids)
            pieces = cut(text, rng)
            ends = np.cumsum([len(piece) for piece in pieces]).tolist()
            predicted = []  # its favourite token, given all that it has read: two bytes, or the second byte of one that it has begun to read
            for end in ends:
                favourites = model[ids[max(end // 2 - 1, 0)]].copy()
                begun = text[end - 1] if end % 2 else None
                if begun is not None:
                    favourites[[token[0] != begun for token in TWO_LETTERS.tokens]] = -np.inf
                token = TWO_LETTERS.tokens[int(favourites.argmax())]
                predicted.append(token if begun is None else token[1:])
            exact.append(aligned_reading(TWO_LETTERS, tuple(ids), pieces, predicted))
            completed = []
            for place in range(len(ids)):
                border = next((number for number, end in enumerate(ends) if end >= 2 * place + 2), None)
                read = b"" if border is None else text[2 * place + 2 : ends[border]]
                whole = (read + predicted[border])[:2] if border is not None and len(read) < 2 else b""
                completed.append(TWO_LETTERS.tokens.index(whole) if len(whole) == 2 else NO_TOKEN)
            near.append(Reading(context_ids=tuple(ids), predicted_ids=tuple(completed)))
        naive.append(log_p(some, near))
        ours.append(log_p(some, exact))
    assert more_than_chance(rejections(naive), audits, ALPHA)
    assert not more_than_chance(rejections(ours), audits, ALPHA)


def test_p12_a_suspect_s_own_ids_say_nothing_and_its_bytes_say_all() -> None:
    """The suspect repeats watermarked text, in tokens of its own that mean other ids; aligned by bytes the key is found, scored by its ids it is not."""
    scheme, rng, live = RedGreen(window=2, delta=3.0), np.random.default_rng(0), live_key(0)
    some = detector("closed", scheme, live, size=25)
    by_bytes, by_ids = [], []
    for ids in write(scheme, live.live, random_model(25, rng), 40, 40, rng).tolist():
        pieces = cut(TWO_LETTERS.bytes_of(ids), rng)
        exact = exactly_written(TWO_LETTERS, tuple(ids), pieces)
        by_bytes.append(Answer(prompt_ids=(), answer_ids=tuple(ids), exact=exact))
        by_ids.append(Answer(prompt_ids=(), answer_ids=tuple(sum(piece) % 25 for piece in pieces)))
    assert 100 < sum(sum(answer.exact or ()) for answer in by_bytes) < 400  # one in eight of 1,600 tokens is a piece of the suspect's too
    assert log_p(some, by_bytes) < math.log(1e-6)
    assert log_p(some, by_ids) > math.log(1e-6)


@pytest.mark.parametrize("scheme", [RedGreen(window=1), GumbelMax(window=1), Tournament(window=1)], ids=lambda scheme: scheme.name)
def test_the_rank_among_decoys_is_exact(scheme: Scheme) -> None:
    ids = np.random.default_rng(0).integers(0, 20, size=200)
    text = [Answer(prompt_ids=(), answer_ids=tuple(ids.tolist()))]
    audits = 60
    findings = []
    for number in range(audits):
        some = detector("closed", scheme, live_key(number, 19), size=20)
        findings.append(some.test(some.plan(alpha=ALPHA), text))
    for level in (0.05, 0.1, 0.25):
        assert not more_than_chance(sum(some.rank_p <= level for some in findings if some.rank_p is not None), audits, level)
    assert not more_than_chance(sum(some.alarm is not None for some in findings), audits, 1e-3)
    assert not more_than_chance(sum(some.rejects for some in findings), audits, ALPHA)


@pytest.mark.parametrize("scheme", [RedGreen(window=1), GumbelMax(window=1), Tournament(window=1)], ids=lambda scheme: scheme.name)
def test_a_student_of_the_sampler_is_found_and_one_of_the_same_teacher_without_it_is_not(scheme: Scheme) -> None:
    """Students that count what follows each token in 400 texts of 30 tokens, half of them from the keyed sampler, or none. With 40 windows each may enter more than once."""
    size, live = 40, live_key(0, 19)
    rng = np.random.default_rng(0)
    teacher = random_model(size, rng, spread=1.0)
    keyed = write(scheme, live.live, teacher, 200, 30, rng)
    plain = write(None, None, teacher, 400, 30, rng)

    def student(corpus: np.ndarray) -> np.ndarray:
        counts = np.full((size, size), 0.01)
        np.add.at(counts, (corpus[:, :-1].reshape(-1), corpus[:, 1:].reshape(-1)), 1.0)
        return np.log(counts / counts.sum(axis=1, keepdims=True))

    only = WindowSet.of([tuple(text) for text in keyed.tolist()], 1)
    closed = detector("closed", scheme, live, size=size, supervised=True, only=only, once_per="pair")
    opened = detector("open", scheme, live, size=size, once_per="pair")
    for corpus, guilty in ((np.concatenate([keyed, plain[:200]]), True), (plain, False)):
        model = student(corpus)
        answers = [Answer(prompt_ids=tuple(text[:1]), answer_ids=tuple(text[1:])) for text in write(None, None, model, 30, 30, rng).tolist()]
        readings = [Reading(context_ids=tuple(text), predicted_ids=tuple(model[text].argmax(axis=1).tolist())) for text in keyed.tolist()]
        for some, evidence in ((closed, answers), (opened, readings)):
            found = some.test(some.plan(alpha=ALPHA), evidence)  # type: ignore[arg-type]
            assert found.log_p is not None
            assert found.alarm is None
            assert (found.log_p < math.log(1e-3)) == guilty, (some.mode, found.log_p, found.scored)
            assert not guilty or found.rank_p == 0.05
