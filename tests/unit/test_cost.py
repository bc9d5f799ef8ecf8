"""What it takes to run a model, measured on real tiny models: counts against arithmetic, times against known delays, memory against known sizes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from stillroom.core.errors import ModelError
from stillroom.core.identities import TokenIds
from stillroom.evals.cost import (
    CostMeasurements,
    CostSubject,
    Decode,
    bytes_on_disk,
    flops_per_token,
    measure_cost,
    measure_peak_memory,
    parameters,
    quantile_interval,
    ratio_of,
    take_timings,
    torch_threads,
)
from stillroom.evals.measured import Absence, Measured

END = 1


def llama(*, width: int = 32, layers: int = 2, vocabulary: int = 64, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def decoder(model: LlamaForCausalLM, *, stop: bool) -> Decode:
    @torch.inference_mode()
    def decode(prompts: Sequence[TokenIds], tokens: int) -> list[TokenIds]:
        written = []
        for prompt in prompts:
            inputs, cache, answer = torch.tensor([prompt]), DynamicCache(config=model.config), []
            while len(answer) < tokens and not (stop and answer and answer[-1] == END):
                inputs = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
                answer.append(int(inputs))
            written.append(tuple(answer))
        return written

    return decode


def subject_of(model: LlamaForCausalLM, directory: Path) -> CostSubject:
    model.save_pretrained(directory)
    return CostSubject(model=model, directory=directory, answer=decoder(model, stop=True), answer_at_length=decoder(model, stop=False))


def sleeping(subject: CostSubject, seconds_per_token: float, log: list[tuple[str, int, int]], name: str) -> CostSubject:
    """A decoder of known speed in the place of a model's own."""

    def decode(prompts: Sequence[TokenIds], tokens: int) -> list[TokenIds]:
        log.append((name, len(prompts), tokens))
        time.sleep(seconds_per_token * tokens)
        return [(2,) * tokens for _ in prompts]

    return CostSubject(model=subject.model, directory=subject.directory, answer=decode, answer_at_length=decode)


# --- counted --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_counted_once(tied: bool) -> None:
    width, layers, vocabulary = 32, 2, 64
    attention, feed_forward = 2 * width * width + 2 * width * (width // 2), 3 * width * 2 * width
    expected = vocabulary * width * (1 if tied else 2) + layers * (attention + feed_forward + 2 * width) + width
    assert parameters(llama(tied=tied)) == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("width", "layers", "vocabulary"), [(32, 2, 64), (64, 3, 100)])
def test_operations_of_one_token_equal_the_analytic_count(attention: str, width: int, layers: int, vocabulary: int) -> None:
    model = llama(width=width, layers=layers, vocabulary=vocabulary)
    model.set_attn_implementation(attention)
    query_and_output, key_and_value = 2 * width * width, 2 * width * (width // 2)
    products = layers * (query_and_output + key_and_value + 3 * width * 2 * width) + vocabulary * width
    scores_and_values = layers * 2 * width  # one position that sees itself, in all heads together
    assert flops_per_token(model) == 2 * (products + scores_and_values)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = llama().train()
    flops_per_token(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bytes_are_those_of_the_weights(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    (tmp_path / "sharded" / "left-over.safetensors").write_bytes(b"x" * 10**6)
    for directory in ("whole", "sharded"):
        assert 4 * parameters(model) < bytes_on_disk(tmp_path / directory) < 4 * parameters(model) + 20_000
    assert bytes_on_disk(tmp_path / "whole") == (tmp_path / "whole" / "model.safetensors").stat().st_size


def test_no_weights_is_an_error(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError) as raised:
        bytes_on_disk(tmp_path)
    assert raised.value.code == "model-no-weights"


# --- timed ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantile", "n"), [(0.5, 7), (0.5, 30), (0.95, 100), (0.5, 12), (0.95, 73)])
def test_quantile_intervals_cover_the_true_quantile(quantile: float, n: int) -> None:
    """Of a skewed distribution whose quantiles are known; the rule is conservative, so coverage is at least 95 % for each end that is given."""
    studies, covered = 2000, 0
    draws = np.random.default_rng(0).exponential(size=(studies, n))
    truth = -np.log(1.0 - quantile)
    for values in draws:
        low, high = quantile_interval(values.tolist(), quantile)
        covered += (low is None or low <= truth) and (high is None or truth <= high)
    assert 0.94 < covered / studies < 0.999


def test_too_few_values_give_no_end_to_an_interval() -> None:
    assert quantile_interval([1.0] * 5, 0.5) == (None, None)
    assert quantile_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0], 0.5) == (1.0, 6.0)
    low, high = quantile_interval([float(value) for value in range(71)], 0.95)
    assert low is not None
    assert high is None
    assert quantile_interval([float(value) for value in range(72)], 0.95)[1] == 71.0
    assert None not in quantile_interval([float(value) for value in range(5000)], 0.5)


def test_threads_are_restored_even_after_an_error() -> None:
    before = torch.get_num_threads()
    inside = []
    with pytest.raises(RecursionError):  # noqa: PT012
        with torch_threads(before + 1):
            inside.append(torch.get_num_threads())
            raise RecursionError
    assert inside == [before + 1]
    assert torch.get_num_threads() == before


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> tuple[CostSubject, CostSubject]:
    teacher = subject_of(llama(width=64, layers=6), tmp_path_factory.mktemp("teacher"))
    return teacher, subject_of(llama(width=32, layers=1), tmp_path_factory.mktemp("student"))


def test_the_models_take_turns_and_do_the_same_work(subjects: tuple[CostSubject, CostSubject]) -> None:
    log: list[tuple[str, int, int]] = []
    teacher, student = sleeping(subjects[0], 0.002, log, "teacher"), sleeping(subjects[1], 0.001, log, "student")
    prompts = [(2,) * length for length in (3, 5, 4)]
    found = take_timings(teacher, student, prompts, max_new_tokens=2, tokens_per_answer=5, repeats=7)
    assert [name for name, *_ in log] == ["teacher", "student"] * (len(log) // 2)
    warmed, asked = 2 * (7 + 1), 2 * (len(prompts) + 1)
    assert [(batch, tokens) for _, batch, tokens in log] == [(1, 5)] * warmed + [(32, 5)] * warmed + [(1, 2)] * asked
    assert (found.batch_1.tokens, found.batch_32.tokens) == (5, 160)
    for timings, count, tokens in ((found.batch_1, 7, 5), (found.batch_32, 7, 5), (found.answers, 3, 2)):
        for seconds, per_token in ((timings.teacher_seconds, 0.002), (timings.student_seconds, 0.001)):
            assert len(seconds) == count
            # Sleeping can take longer than asked, never shorter.
            assert min(seconds) >= tokens * per_token
            assert min(seconds) < 3 * tokens * per_token


def test_a_decoder_that_stops_early_cannot_win(subjects: tuple[CostSubject, CostSubject]) -> None:
    student = CostSubject(
        model=subjects[1].model, directory=subjects[1].directory, answer=subjects[1].answer, answer_at_length=lambda prompts, _: [(2,)]
    )
    with pytest.raises(AssertionError, match="exactly as many"):
        take_timings(subjects[0], student, [(2, 3)], max_new_tokens=2, tokens_per_answer=3, repeats=1)


def test_real_models_are_measured_in_every_number(subjects: tuple[CostSubject, CostSubject]) -> None:
    generator = np.random.default_rng(0)
    prompts = [tuple(generator.integers(2, 64, size=length).tolist()) for length in generator.integers(2, 9, size=72)]
    threads = torch.get_num_threads()
    found = measure_cost(*subjects, prompts, max_new_tokens=3, tokens_per_answer=2, threads=1)
    assert torch.get_num_threads() == threads
    assert CostMeasurements.model_validate_json(found.model_dump_json()) == found
    for cost in (found.teacher, found.student, found.ratios):
        for name in type(cost).model_fields:
            number = getattr(cost, name)
            assert isinstance(number, Measured), f"{name}: {number}"
            assert number.value > 0
            assert number.unit
            assert number.how
    for name in ("tokens_per_second", "tokens_per_second_batch_32", "latency_p50_seconds", "latency_p95_seconds"):
        for cost in (found.teacher, found.student, found.ratios):
            number = getattr(cost, name)
            assert number.low <= number.value <= number.high
            assert number.n == (72 if name.startswith("latency") else 7)
    student_speeds = [32 * 2 / seconds for seconds in found.timings.batch_32.student_seconds]
    assert found.student.tokens_per_second_batch_32.value == pytest.approx(np.median(student_speeds))
    assert found.teacher.latency_p95_seconds.value == pytest.approx(np.quantile(found.timings.answers.teacher_seconds, 0.95))
    assert found.ratios.parameters.value == parameters(subjects[0].model) / parameters(subjects[1].model)
    # Six layers against one.
    assert found.ratios.tokens_per_second.value > 2
    assert found.ratios.latency_p50_seconds.value > 2


def test_a_ratio_of_nothing_is_absent() -> None:
    number, nothing = Measured(value=6.0, unit="bytes", how="counted"), Absence(absent="not measured")
    assert isinstance(ratio_of(number, nothing), Absence)
    assert isinstance(ratio_of(nothing, number), Absence)
    assert isinstance(ratio_of(number, Measured(value=0.0, unit="bytes", how="counted")), Absence)
    ratio = ratio_of(number, Measured(value=4.0, unit="bytes", how="counted"))
    assert isinstance(ratio, Measured)
    assert ratio.value == 1.5


# --- memory ---------------------------------------------------------------------------------------------------------------------------


def test_peak_memory_is_that_of_the_weights(tmp_path: Path) -> None:
    """Not the hundreds of megabytes of the libraries, not twice the weights, and not nothing."""
    subject = subject_of(llama(width=256, vocabulary=32_000), tmp_path)
    peak = measure_peak_memory(subject, [(2, 3, 4)], 3)
    assert isinstance(peak, Measured), peak
    weights = bytes_on_disk(tmp_path)
    assert weights > 37e6
    assert 0.95 * weights < peak.value < 1.3 * weights


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    subject = subject_of(llama(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    peak = measure_peak_memory(subject, [(2, 3)], 1)
    assert isinstance(peak, Absence)
    assert "exit code 1" in peak.absent
