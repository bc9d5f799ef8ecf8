"""What benchmarks/store.py rests on: the language model's distributions against a slow one, and that what it times is the product; a run at toy size."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch

from helpers import tiny_model
from stillroom.core.identities import ModelRef, TokenSequence
from stillroom.models.local import LocalTeacher
from stillroom.objectives.tensors import as_arrays
from stillroom.targets.kinds import DrawnTargets, TargetRequest
from stillroom.targets.vocabulary import Vocabulary

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import language_model
import store as benchmark

_SIZE = 40


@pytest.fixture(scope="module")
def tokens() -> numpy.ndarray:
    """A text in which some ids never occur, and contexts of every length do and do not."""
    rng = numpy.random.default_rng(0)
    return numpy.minimum(rng.zipf(1.5, 3000), _SIZE - 5).astype(numpy.int64)


def slow_V(text: list[int], context: list[int]) -> numpy.ndarray:
    """Absolute discounting, interpolated, as its formula says."""
    times = Counter(text)
    left = 0.75 * len(times) / _SIZE
    p_V = numpy.array([(max(times[v] - 0.75, 0) + left) / len(text) for v in range(_SIZE)])
    for order in range(1, min(4, len(context)) + 1):
        wanted = context[-order:]
        following = Counter(text[at + order] for at in range(len(text) - order) if text[at : at + order] == wanted)
        total = sum(following.values())
        if total:
            p_V = numpy.array([max(following[v] - 0.75, 0) / total + 0.75 * len(following) / total * p_V[v] for v in range(_SIZE)])
    return p_V


def test_the_model_is_interpolated_absolute_discounting(tokens: numpy.ndarray) -> None:
    model = language_model.NGrams(tokens, _SIZE)
    asked = numpy.append(tokens[100:130], [_SIZE - 1, 1, 1, 2])
    rows = list(model.rows(asked))
    assert len(rows) == len(asked)
    for place, row in enumerate(rows):
        expected_V = slow_V(tokens.tolist(), asked[: place + 1].tolist())
        assert model.whole_V(row) == pytest.approx(expected_V, rel=1e-12)
        assert expected_V.sum() == pytest.approx(1.0, abs=1e-12)
        assert [model.probability(row, token) for token in range(_SIZE)] == pytest.approx(expected_V, rel=1e-12)
        assert model.entropy(row) == pytest.approx(-(expected_V * numpy.log(expected_V)).sum(), rel=1e-9)
    # What has not been seen has no order, and is drawn from all the same.
    assert rows[-4].orders == ()


def test_draws_are_of_the_distribution(tokens: numpy.ndarray) -> None:
    """Places that are evenly spread meet each id as often as its probability says, but for the ends of its few parts."""
    model = language_model.NGrams(tokens, _SIZE)
    number = 100_000
    for row in model.rows(numpy.append(tokens[7:19], [_SIZE - 1])):
        ids_N = model.draws_N(row, (numpy.arange(number) + 0.5) / number)
        found_V = numpy.bincount(ids_N, minlength=_SIZE) / number
        assert numpy.abs(found_V - model.whole_V(row)).max() <= (len(row.orders) + 1) / number
    assert model.draws_N(row, numpy.array([0.0, 1 - 2**-53])).max() < _SIZE


def test_text_comes_from_all_packages_and_held_out_text_is_other_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        for name, times in (("standard", 1), ("site/small", 1), ("site/large", 10)):
            path = tmp_path / name / f"{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {name} {number}\n" + "pass\n" * 200 * times, encoding="utf-8")
    for name in ("standard/site-packages/other.py", "site/small/data.bin", "site/small/short.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x" * (100 if "short" in name else 1000), encoding="utf-8")
    (tmp_path / "site/small/same.py").write_text((tmp_path / "site/small/1.py").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(language_model.sysconfig, "get_paths", lambda: {"stdlib": tmp_path / "standard", "purelib": tmp_path / "site"})
    text = language_model.text_here(1_000_000, share=0.3)
    assert text == language_model.text_here(1_000_000, share=0.3)
    texts = (*text.training, *text.held_out)
    assert len(set(texts)) == len(texts) > len(text.training) > len(text.held_out) > 0
    assert sum(map(len, texts)) == sum(text.package_characters.values())
    # All of the small ones, of the large one its share (and the rest of the last file, which rounding hides).
    assert {name: round(characters, -4) for name, characters in text.package_characters.items()} == {
        "large": 300_000,
        "the standard library": 200_000,
        "small": 200_000,
    }


def test_replayed_logits_are_drawn_from_as_the_model_that_gave_them() -> None:
    model = tiny_model("qwen3", rows=220)
    sequences = [TokenSequence(ids=tuple(range(start, start + 9)), answer_spans=((1, 9),)) for start in (0, 30, 60)]
    vocabulary = Vocabulary(tokens=tuple(str(index).encode() for index in range(220)), special={}, end_ids=(0,), rows=220)
    reference = ModelRef(source="", kind="from_scratch", revision=None, weights_sha256=None, architecture="", parameters=0, licence=None)
    teacher = LocalTeacher(model, reference, vocabulary)
    with torch.inference_mode():
        logits_RV = torch.cat([model(torch.tensor([sequence.ids])).logits[0, :-1] for sequence in sequences])
    replayed = benchmark.Replayed(model.config, sequences, logits_RV)
    kept = logits_RV.clone()
    request = TargetRequest(kind="drawn", draws=50)
    for _ in range(2):
        mine, theirs = (
            as_arrays(LocalTeacher(replayed, reference, vocabulary).targets(sequences, request)),
            as_arrays(teacher.targets(sequences, request)),
        )
        assert isinstance(mine, DrawnTargets)
        assert isinstance(theirs, DrawnTargets)
        assert numpy.array_equal(mine.ids_U, theirs.ids_U)
        assert numpy.array_equal(mine.counts_U, theirs.counts_U)
        assert mine.entropy_R == pytest.approx(theirs.entropy_R, abs=1e-5)
    assert torch.equal(logits_RV, kept)
    assert replayed.taken_seconds() > 0 == replayed.taken_seconds()


def test_fewer_ids_are_the_same_draws_modulo_their_number() -> None:
    rows = [{3: 2, 13: 1, 27: 2}, {5: 5}, {1: 1, 2: 3, 12: 1}]
    targets = DrawnTargets(
        vocabulary="a", temperature=1.0, draws=5, offsets_R1=numpy.array([0, 3, 4, 7]), ids_U=numpy.array([id_ for row in rows for id_ in row]),
        counts_U=numpy.array([count for row in rows for count in row.values()]), entropy_R=numpy.zeros(3, dtype=numpy.float32),
    )  # fmt: skip
    fewer = benchmark.fewer_ids(targets, 10, "b")
    found = [
        dict(zip(fewer.ids_U[a:b].tolist(), fewer.counts_U[a:b].tolist(), strict=True))
        for a, b in zip(fewer.offsets_R1, fewer.offsets_R1[1:], strict=False)
    ]
    assert found == [{3: 3, 7: 2}, {5: 5}, {1: 1, 2: 4}]
    assert fewer.vocabulary == "b"


def test_a_run_at_toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tuple(path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py")))
    text = language_model.Text(training=texts[:-1], held_out=texts[-1:], package_characters={"json": sum(map(len, texts))})
    monkeypatch.setattr(benchmark, "text_here", lambda size, share: text)
    sizes = {
        "vocabulary": 700,
        "records": 12,
        "record-tokens": 16,
        "shard-records": 4,
        "step-records": 2,
        "repeats": 1,
        "open-tokens": 300,
        "threads": 1,
    }
    shapes = {"teacher-layers": 1, "teacher-width": 32, "student-layers": 1, "student-width": 32}
    threads = torch.get_num_threads()
    try:
        found = benchmark.measure(benchmark.arguments_of([f"--{name}={value}" for name, value in (sizes | shapes).items()]))
    finally:
        torch.set_num_threads(threads)
    json.dumps(found, allow_nan=False)
    assert set(found["limits"]) == set(benchmark.LIMITS)
    assert all(one["value"] > 0 for one in found["limits"].values())
    assert list(found["bytes"]) == ["25", "50", "100"]
    fifty = found["bytes"]["50"]
    assert (fifty["scored_tokens"], fifty["tokens"], fifty["shards"]) == (12 * 15, 12 * 16, 3)
    assert fifty["drawn_bytes_per_token"] == fifty["bytes"] / fifty["scored_tokens"]
    assert 1 <= found["bytes"]["25"]["mean_unique_ids"] <= fifty["mean_unique_ids"] <= 50
    assert 1 < found["teacher"]["perplexity"] < 700
    assert 0 < found["teacher"]["mean_entropy_nats"] < math.log(700)
    assert (found["opening"]["tokens"], found["opening"]["records"]) == (320, 20)
