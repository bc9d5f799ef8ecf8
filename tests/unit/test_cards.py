"""What fits on which card: the order in which ways are tried, and what each of them does to the memory that is planned."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from stillroom.models.cards import SHARE, Card, Fit, fits
from stillroom.models.estimate import Measured, Workload, measure, peak_bytes
from stillroom.models.loading import count_parameters, shape_of, skeleton_of
from stillroom.models.probing import Outline

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import cards as benchmark


def outline(layers: int, width: int) -> Outline:
    config = LlamaConfig(vocab_size=4096, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=width // 32)
    skeleton = skeleton_of(config)
    return Outline(config=config, shape=shape_of(skeleton), parameters=count_parameters(skeleton))


def workload(*, live: bool = False, teacher: tuple[int, int] = (4, 128), student: tuple[int, int] = (2, 64)) -> Workload:
    return benchmark.workload(outline(*teacher), outline(*student), live=live)


@cache
def probed(live: bool, recomputed: bool) -> Measured:
    return measure(replace(workload(live=live), device=torch.device("cpu"), recomputed=recomputed))


def measured(work: Workload) -> Measured:
    """Of the small pair, whichever is asked about: costs of a token and a row, which `peak_bytes` multiplies."""
    return probed(work.live, work.recomputed)


def fit_on(megabytes: float, work: Workload) -> Fit:
    return fits(work, cards=[Card(name="test", usable_bytes=round(megabytes * 1e6))], measured=measured)[0]


def test_with_room_enough_nothing_is_changed() -> None:
    work = workload()
    found = fit_on(1e6, work)
    assert (found.fits, found.cards, found.settings, found.micro_batch) == (True, 1, (), work.sequences_per_step)


def test_less_room_means_smaller_micro_batches_and_then_other_settings() -> None:
    """Shrinking the card step by step, nothing ever gets larger, and what is planned stays within its share."""
    work = workload(live=True, teacher=(24, 512), student=(6, 256))
    before = fit_on(1e6, work)
    rungs: list[tuple[str, ...]] = []
    megabytes = max(before.peak_bytes.values()) / 1e6 / SHARE
    while True:
        found = fit_on(megabytes, work)
        if not found.fits:
            break
        assert max(found.peak_bytes.values()) <= SHARE * megabytes * 1e6
        if found.settings == before.settings and found.cards == before.cards:
            assert found.micro_batch <= before.micro_batch
        if found.settings not in rungs:
            rungs.append(found.settings)
        before, megabytes = found, 0.93 * megabytes
    assert rungs[0] == ()
    assert ("training.gradient_checkpointing: true", "training.optimiser_offload: true") in rungs
    eight_bits = [index for index, settings in enumerate(rungs) if "teacher.dtype: int8" in settings]
    assert eight_bits, "with a teacher that is most of it, its bits are what is left to save"
    assert eight_bits == list(range(min(eight_bits), len(rungs))), "and exactness is given up last"
    assert max(found.peak_bytes.values()) > SHARE * megabytes * 1e6, "what does not fit is told with what it would take at the least"


@pytest.mark.parametrize(
    ("change", "stage"),
    [({"teacher_int8": True}, "collect"), ({"optimiser_offload": True}, "train"), ({"recomputed": True}, "train"), ({"parts": 2}, "train")],
)
def test_each_setting_takes_memory_from_the_stage_that_it_is_for(change: dict[str, object], stage: str) -> None:
    work = replace(workload(student=(6, 256)), micro_batch=8)
    other = replace(work, **change)  # type: ignore[arg-type]
    assert peak_bytes(other, measured(other))[stage] < peak_bytes(work, measured(work))[stage]


def test_a_student_in_parts_keeps_what_is_fetched_whole() -> None:
    """In 8 parts an eighth of weights, gradients and moments; embeddings and head come back whole, with their gradient."""
    work = replace(workload(student=(6, 256)), recomputed=True, micro_batch=1)
    one, eight = (peak_bytes(replace(work, parts=parts), measured(work))["train"] for parts in (1, 8))
    assert one / 8 < eight < one
    shape = work.student.shape
    assert eight > 2 * 4 * 2 * shape.rows * shape.width


def test_adapters_and_offloaded_moments_are_not_cut_into_parts() -> None:
    work = replace(workload(student=(6, 256)), optimiser_offload=True, recomputed=True)
    settings = {fit_on(megabytes, work).cards for megabytes in (1, 10, 100, 1000, 10_000)}
    assert settings == {1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_is_planned_for_a_card_is_what_a_step_takes() -> None:
    """Head and body of a micro-batch on the device at hand, by PyTorch's own count."""
    from stillroom.models.costs import _head_and_back, _learn  # the same actions that are probed
    from stillroom.models.probing import copy_of, pattern_of

    work = replace(workload(student=(2, 512)), micro_batch=8, sequences_per_step=16)
    model = copy_of(pattern_of(work.student, 16, torch.device("cuda")), 2, torch.float32, torch.device("cuda"))
    moments = [torch.zeros_like(parameter) for parameter in model.parameters() for _ in range(2)]
    rows = work.micro_batch * benchmark.ANSWER
    _learn(model, work.micro_batch, benchmark.PROMPT + benchmark.ANSWER, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    _learn(model, work.micro_batch, benchmark.PROMPT + benchmark.ANSWER, torch.bfloat16)
    _head_and_back(model, work.objective, "drawn", 50, 128, work.size, torch.bfloat16, rows)()
    taken = torch.cuda.max_memory_allocated()
    found = measure(replace(work, device=torch.device("cpu")))
    assert 0.75 < taken / peak_bytes(work, found)["train"] < 1.25
    del moments
