"""The loop's own decisions: order, learning rate, splits, stopping early, smaller micro-batches, and what it does when numbers cease to be numbers."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from helpers import tiny_model
from stillroom.core.errors import DivergedError, Interrupted, ResourceError
from stillroom.core.identities import TokenSequence
from stillroom.core.interrupts import StopRequest
from stillroom.models.student import OptimiserSettings, TransformersStudent
from stillroom.objectives.divergences import cross_entropy
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.runs.loop import Loop, LoopSettings, step_records
from stillroom.runs.observer import Silent
from stillroom.runs.sources import TextSource
from stillroom.runs.training import split
from stillroom.targets.protocols import Batch, StepSums
from stillroom.targets.vocabulary import Vocabulary
from tiny_run import metrics_of

ROWS = 24
CROSS_ENTROPY = Objective(terms=(WeightedTerm(divergence=cross_entropy()),))
SETTINGS = LoopSettings(
    steps=6,
    sequences_per_step=4,
    micro_batch=4,
    learning_rate=1e-2,
    schedule="constant",
    warmup_steps=0,
    validate_every=2,
    checkpoint_every=2,
    seed=5,
)


# --- order --------------------------------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 12), per_step=st.integers(1, 30), steps=st.integers(1, 6), seed=st.integers(0, 2**53 - 1))
def test_every_epoch_is_a_permutation(count: int, per_step: int, steps: int, seed: int) -> None:
    records = [f"record {number}" for number in range(count)]
    stream = [record for step in range(steps) for record in step_records(records, step, per_step, seed)]
    assert len(stream) == steps * per_step
    for start in range(0, len(stream) - count + 1, count):
        assert sorted(stream[start : start + count]) == sorted(records)
    assert len(set(stream[len(stream) // count * count :])) == len(stream) % count


def test_the_order_is_a_function_of_seed_and_step_alone() -> None:
    records = [str(number) for number in range(40)]
    assert step_records(records, 7, 8, 0) == step_records(records, 7, 8, 0)
    epochs = [[record for step in range(5 * epoch, 5 * epoch + 5) for record in step_records(records, step, 8, 0)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != records
    assert step_records(records, 0, 40, 1) != epochs[0]


# --- learning rate ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "theirs"), [("cosine", "get_cosine_schedule_with_warmup"), ("linear", "get_linear_schedule_with_warmup")])
@pytest.mark.parametrize("warmup", [0, 5])
def test_after_the_warm_up_the_rate_is_that_of_transformers(schedule: str, theirs: str, warmup: int) -> None:
    settings = replace(SETTINGS, steps=20, schedule=schedule, warmup_steps=warmup, learning_rate=0.5)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = getattr(transformers, theirs)(optimiser, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        if step >= warmup:
            assert settings.learning_rate_at(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimiser.step()
        scheduler.step()


@pytest.mark.parametrize("lowest", [0.0, 0.125])
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(
    ("schedule", "theirs", "options"),
    [
        ("cosine", "cosine_with_min_lr", {"min_lr": "lowest"}),
        ("linear", "polynomial", {"lr_end": "lowest", "power": 1.0}),
        ("warmup_stable_decay", "warmup_stable_decay", {"min_lr_ratio": "share", "num_decay_steps": 6, "decay_type": "1-sqrt"}),
        ("warmup_stable_decay", "warmup_stable_decay", {"min_lr_ratio": "share", "num_decay_steps": 1, "decay_type": "1-sqrt"}),
        ("constant", "constant_with_warmup", {}),
    ],
)
def test_every_schedule_ends_where_that_of_transformers_does(schedule: str, theirs: str, options: dict[str, Any], warmup: int, lowest: float) -> None:
    lowest = 0.0 if schedule == "constant" else lowest
    values = {"lowest": lowest, "share": lowest / 0.5}
    options = {name: values.get(value, value) for name, value in options.items()}
    decay = options.get("num_decay_steps", 0)
    settings = replace(SETTINGS, steps=20, schedule=schedule, warmup_steps=warmup, learning_rate=0.5, min_learning_rate=lowest, decay_steps=decay)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = transformers.get_scheduler(theirs, optimiser, num_warmup_steps=warmup, num_training_steps=20, scheduler_specific_kwargs=options)
    for step in range(20):
        if step >= warmup:
            assert settings.learning_rate_at(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12), step
        optimiser.step()
        scheduler.step()


def test_the_warm_up_is_that_of_transformers_which_loses_no_step() -> None:
    settings = replace(SETTINGS, steps=20, schedule="cosine", warmup_steps=5, learning_rate=0.5)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = transformers.get_scheduler("cosine_warmup_with_min_lr", optimiser, 5, 20, {"min_lr": 0.0})
    for step in range(5):
        assert settings.learning_rate_at(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimiser.step()
        scheduler.step()


def test_a_decay_longer_than_what_is_left_begins_after_the_warm_up() -> None:
    settings = replace(SETTINGS, steps=10, schedule="warmup_stable_decay", warmup_steps=4, learning_rate=1.0, decay_steps=99)
    rates = [settings.learning_rate_at(step) for step in range(10)]
    assert rates[3] == rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[9] == pytest.approx(1 - (5 / 6) ** 0.5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_warm_up_rises_to_the_rate_that_was_asked_for(schedule: str) -> None:
    settings = replace(SETTINGS, steps=20, schedule=schedule, warmup_steps=4, learning_rate=2.0)
    assert [settings.learning_rate_at(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    later = [settings.learning_rate_at(step) for step in range(5, 20)]
    assert later == sorted(later, reverse=True)
    assert min(later) > 0
    assert (set(later) == {2.0}) == (schedule == "constant")


def test_a_run_that_is_all_warm_up_divides_by_nothing() -> None:
    assert replace(SETTINGS, schedule="cosine", warmup_steps=6).learning_rate_at(5) == SETTINGS.learning_rate


# --- splits -------------------------------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 60), fraction=st.floats(0, 0.99), seed=st.integers(0, 2**53 - 1))
def test_a_split_parts_the_records_and_keeps_their_order(count: int, fraction: float, seed: int) -> None:
    records = [f"{number:03d}" for number in range(count)]
    training, validation = split(records, fraction, seed)
    assert sorted(training + validation) == records
    assert training == sorted(training)
    assert validation == sorted(validation)
    assert training
    assert bool(validation) == (fraction > 0 and count > 1)
    assert abs(len(validation) - fraction * count) <= 1
    assert (training, validation) == split(records, fraction, seed)


def test_a_split_is_random() -> None:
    records = [str(number) for number in range(50)]
    counts = numpy.zeros(50)
    for seed in range(400):
        counts[[int(record) for record in split(records, 0.2, seed)[1]]] += 1
    # Each is chosen 80 times of 400 on average, standard deviation 8.
    assert 40 < counts.min() < counts.max() < 120


# --- the loop over a real student -----------------------------------------------------------------------------------------------------------


class Watcher(Silent):
    """Keeps the notes, and does something at a step."""

    def __init__(self, at: int = -1, action: Callable[[], None] = lambda: None) -> None:
        self.notes: list[str] = []
        self._at, self._action = at, action

    def progress(self, done: int, total: int, unit: str, fields: dict[str, str]) -> None:
        if done == self._at:
            self._action()

    def note(self, text: str) -> None:
        self.notes.append(text)


class SmallMemory(TransformersStudent):
    """A student for which only so many sequences fit at once."""

    def __init__(self, fits: int) -> None:
        super().__init__(tiny_model(rows=ROWS, layers=1, width=16), vocabulary(), OptimiserSettings(weight_decay=0.1))
        self.fits = fits

    def forward_backward(self, batch: Batch, objective: Objective, divide_by: int) -> StepSums:
        if len(batch.sequences) > self.fits:
            # Some of the gradient is there already when memory runs out.
            some = replace(batch, sequences=batch.sequences[:1], targets=_first_rows(batch), labels=_first_rows(batch))
            super().forward_backward(some, objective, divide_by)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward_backward(batch, objective, divide_by)

    def score(self, batch: Batch, objective: Objective) -> StepSums:
        if len(batch.sequences) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().score(batch, objective)


def _first_rows(batch: Batch) -> Any:
    return replace(batch.labels, token_ids_R=batch.labels.token_ids_R[: len(batch.sequences[0].scored_rows)])


def vocabulary() -> Vocabulary:
    return Vocabulary(tokens=tuple(bytes([65 + number]) for number in range(ROWS)), special={}, end_ids=(0,), rows=ROWS)


def loop_in(directory: Path, settings: LoopSettings = SETTINGS, *, student: TransformersStudent | None = None, **options: Any) -> Loop:
    """Random texts to learn by heart, and others to be held to."""
    draw = numpy.random.default_rng(3)
    texts = [TokenSequence(ids=tuple(draw.integers(0, ROWS, 5 + number % 5).tolist()), answer_spans=((2, 5 + number % 5),)) for number in range(14)]
    source = TextSource({str(number): text for number, text in enumerate(texts)}, vocabulary())
    options = {"observer": Silent(), "stop": StopRequest("Run it again."), **options}
    student = student or SmallMemory(fits=99)
    return Loop(student, CROSS_ENTROPY, source, [str(n) for n in range(10)], [str(n) for n in range(10, 14)], settings, directory, **options)


def weights_of(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in loop.student.model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_stops_when_validation_no_longer_gains_and_keeps_the_best_weights(tmp_path: Path) -> None:
    """Texts learned by heart make the others less likely; the weights kept are bit for bit those of a run that ends at the best step."""
    settings = replace(SETTINGS, steps=200, patience=3)
    stopped = loop_in(tmp_path / "stopped", settings)
    progress = stopped.run()
    curve = {line["step"]: line["nats_per_token"] for line in metrics_of(tmp_path / "stopped") if line["name"] == "validation"}
    assert progress.stopped_early
    assert 0 < progress.best_step < progress.step < 200
    assert curve[progress.best_step] == min(curve.values())
    assert progress.step == progress.best_step + 3 * settings.validate_every == max(curve)
    short = loop_in(tmp_path / "short", replace(settings, steps=progress.best_step, patience=None))
    short.run()
    assert equal(weights_of(stopped), weights_of(short))
    # Run once more, it has nothing left to do and gives the same.
    again = loop_in(tmp_path / "stopped", settings)
    assert again.run().step == progress.step
    assert equal(weights_of(again), weights_of(stopped))


def test_every_record_is_asked_about_before_the_first_step_and_whenever_it_goes_on(tmp_path: Path) -> None:
    asked: list[list[str]] = []
    loop_in(tmp_path, replace(SETTINGS, steps=2), admitted=lambda records: asked.append(list(records))).run()
    loop_in(tmp_path, replace(SETTINGS, steps=4), admitted=lambda records: asked.append(list(records))).run()
    assert asked == [[str(number) for number in range(14)]] * 2

    def refuse(records: Sequence[str]) -> None:
        raise PermissionError(records[0])

    with pytest.raises(PermissionError):
        loop_in(tmp_path / "refused", admitted=refuse).run()
    assert not (tmp_path / "refused").exists()


def test_it_keeps_the_last_checkpoint_and_a_line_for_every_step(tmp_path: Path) -> None:
    loop_in(tmp_path, replace(SETTINGS, steps=5)).run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    lines = metrics_of(tmp_path)
    assert [(line["name"], line["step"]) for line in lines] == [
        ("train", 1),
        ("train", 2),
        ("validation", 2),
        ("train", 3),
        ("train", 4),
        ("validation", 4),
        ("train", 5),
        ("validation", 5),
    ]
    trained = [line for line in lines if line["name"] == "train"]
    assert all(line["nats_per_token"] == line["terms"]["cross_entropy"] for line in lines)
    assert trained[0]["nats_per_token"] > trained[-1]["nats_per_token"]
    assert json.loads((tmp_path / "checkpoints" / "step-00000005" / "loop.json").read_text())["scored_tokens"] == sum(
        line["scored_tokens"] for line in trained
    )


def test_every_record_of_a_step_is_handed_over_before_its_checkpoint_is_there(tmp_path: Path) -> None:
    handed: list[tuple[int, Sequence[str]]] = []

    def consumed(records: Sequence[str]) -> None:
        handed.append((len(list((tmp_path / "checkpoints").glob("step-*"))), list(records)))

    loop_in(tmp_path, consumed=consumed).run()
    assert [there for there, _ in handed] == [0, 1, 1]
    expected = [record for step in range(6) for record in step_records([str(n) for n in range(10)], step, 4, 5)]
    assert [record for _, records in handed for record in records] == expected


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_request_to_stop_is_met_after_the_step_and_resumed_to_the_same_bytes(tmp_path: Path, step: int) -> None:
    whole = loop_in(tmp_path / "whole")
    whole.run()
    stop = StopRequest("Run it again.")
    with pytest.raises(Interrupted, match=f"after step {step} of 6") as caught:
        loop_in(tmp_path / "parts", observer=Watcher(step, lambda: stop._ask(signal.SIGINT, None)), stop=stop).run()
    assert "Run it again." in str(caught.value)
    resumed = loop_in(tmp_path / "parts")
    resumed.run()
    assert equal(weights_of(resumed), weights_of(whole))
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_death_between_two_checkpoints_repeats_no_line_and_no_record(tmp_path: Path, step: int) -> None:
    whole = loop_in(tmp_path / "whole")
    whole.run()

    def die() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop_in(tmp_path / "parts", observer=Watcher(step, die)).run()
    assert len([line for line in metrics_of(tmp_path / "parts") if line["name"] == "train"]) == step
    handed: list[str] = []
    resumed = loop_in(tmp_path / "parts", consumed=handed.extend)
    resumed.run()
    assert equal(weights_of(resumed), weights_of(whole))
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")
    checkpointed = step // 2 * 2
    assert handed == [record for at in range(checkpointed, 6) for record in step_records([str(n) for n in range(10)], at, 4, 5)]


# --- memory -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fits", [1, 2, 3])
def test_running_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(tmp_path: Path, fits: int) -> None:
    watcher = Watcher()
    small = loop_in(tmp_path / "small", student=SmallMemory(fits), observer=watcher)
    progress = small.run()
    used = 2 if fits == 3 else fits
    asked = loop_in(tmp_path / "asked", replace(SETTINGS, micro_batch=used))
    asked.run()
    assert equal(weights_of(small), weights_of(asked))
    assert metrics_of(tmp_path / "small") == metrics_of(tmp_path / "asked")
    expected = [2] if used == 2 else [2, 1]
    assert [(halving.step, halving.micro_batch) for halving in progress.halvings] == [(1, size) for size in expected]
    assert [f"micro-batches of {size}" in note for size, note in zip(expected, watcher.notes, strict=True)] == [True] * len(expected)


def test_a_resumed_run_remembers_how_small_its_micro_batches_had_to_be(tmp_path: Path) -> None:
    stop = StopRequest("Run it again.")
    with pytest.raises(Interrupted):
        loop_in(tmp_path, student=SmallMemory(2), observer=Watcher(3, lambda: stop._ask(signal.SIGINT, None)), stop=stop).run()
    progress = loop_in(tmp_path, student=SmallMemory(2)).run()
    assert progress.micro_batch == 2
    assert [halving.step for halving in progress.halvings] == [1]


def test_where_one_sequence_does_not_fit_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        loop_in(tmp_path, student=SmallMemory(0)).run()
    assert caught.value.code == "out-of-memory"


def test_other_errors_of_the_engine_are_not_taken_for_memory(tmp_path: Path) -> None:
    class Broken(SmallMemory):
        def forward_backward(self, batch: Batch, objective: Objective, divide_by: int) -> StepSums:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        loop_in(tmp_path, student=Broken(9)).run()


# --- numbers that are none ------------------------------------------------------------------------------------------------------------------


def poisoned(loop: Loop, value: float) -> Callable[[], None]:
    def poison() -> None:
        with torch.no_grad():
            next(iter(loop.student.model.parameters()))[0, 0] = value

    return poison


def assert_only_numbers(directory: Path) -> None:
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} in metrics.jsonl"))


@pytest.mark.parametrize("step", [1, 2, 3, 6])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_stop_the_loop_and_the_last_checkpoint_stands(tmp_path: Path, step: int, value: float) -> None:
    """Whether training or validation (after steps 2, 4 and 6) meets them first; they are never checkpointed and never logged."""
    student = SmallMemory(99)
    watcher = Watcher(step)
    loop = loop_in(tmp_path, student=student, observer=watcher)
    watcher._action = poisoned(loop, value)
    with pytest.raises(DivergedError) as caught:
        loop.run()
    assert caught.value.code == "diverged"
    assert_only_numbers(tmp_path)
    for checkpoint in (tmp_path / "checkpoints").glob("step-*"):
        assert int(checkpoint.name[5:]) < step
    fresh = loop_in(tmp_path)
    fresh.run()
    whole = loop_in(tmp_path.with_name("whole"))
    whole.run()
    assert equal(weights_of(fresh), weights_of(whole))


def test_a_learning_rate_that_is_far_too_high_ends_in_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"Lower training\.learning_rate"):
        loop_in(tmp_path, replace(SETTINGS, learning_rate=1e30)).run()
    assert_only_numbers(tmp_path)
