"""Packed = padded: sequences laid end to end give each the states and the gradient that it has alone, and none sees another."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional
from transformers import PreTrainedModel

import stillroom
from helpers import tiny_model, tiny_tokenizer
from stillroom.core.errors import ModelError
from stillroom.core.identities import ModelRef, TokenSequence
from stillroom.models import packing
from stillroom.models.arithmetic import recompute_layers
from stillroom.models.batching import lay_end_to_end
from stillroom.models.loading import build_from_teacher, load_model
from stillroom.models.local import LocalTeacher, text_targets
from stillroom.models.packing import pack, packs, require_packing, scored_states
from stillroom.models.student import OptimiserSettings, TransformersStudent, named_gradients
from stillroom.models.tokenizers import vocabulary_of
from stillroom.objectives.divergences import cross_entropy, forward_kl
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.runs.recipe import Recipe
from stillroom.targets.kinds import HiddenTargets, TargetRequest
from stillroom.targets.protocols import Batch
from tiny_run import metrics_of, tiny_recipe

RELATIVE = 1e-5
# Windows shorter than the sequences, alternating with layers that see everything; soft caps, sinks, biases, absolute positions, experts.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"},
    "gpt2": {},
    "phi": {},
    "granite": {},
    "cohere": {},
}
by_family = pytest.mark.parametrize("family", FAMILIES)


def model_of(family: str, **more: Any) -> PreTrainedModel:
    return tiny_model(family, **FAMILIES[family] | more)


def packed(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    assert pack(model) is None
    return model


def uneven(seed: int = 0) -> list[TokenSequence]:
    """Lengths from one token on, several of one length, some with nothing scored, some with more after what is scored."""
    draw = random.Random(seed)
    sequences = [
        TokenSequence(ids=tuple(draw.randrange(220) for _ in range(length)), answer_spans=((length // 2, length),))
        for length in (2, 9, 17, 9, 21, 3, 9)
    ]
    sequences.insert(2, TokenSequence(ids=(5,), answer_spans=()))
    sequences.insert(4, TokenSequence(ids=(7, 8, 9, 10, 11, 12, 13), answer_spans=((1, 2), (3, 5))))
    sequences.append(TokenSequence(ids=(3, 4, 5), answer_spans=()))
    return sequences


def states_of(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> torch.Tensor:
    with torch.no_grad():
        return scored_states(model, sequences)


def gradient_of(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> tuple[float, dict[str, torch.Tensor]]:
    student = TransformersStudent(model, vocabulary_of(tiny_tokenizer(), 220), OptimiserSettings())
    teacher = LocalTeacher(tiny_model("llama", width=48, seed=1), REF, student.vocabulary)
    objective = Objective(terms=(WeightedTerm(divergence=forward_kl()), WeightedTerm(divergence=cross_entropy(), weight=0.3)))
    targets = teacher.targets(sequences, TargetRequest(kind="full"))
    batch = Batch(sequences=tuple(sequences), targets=targets, labels=text_targets(sequences, student.vocabulary))
    sums = student.forward_backward(batch, objective, divide_by=batch.scored_tokens)
    assert student.score(batch, objective).objective_nats == pytest.approx(sums.objective_nats, rel=1e-6)
    found = {name: gradient.clone() for name, gradient in named_gradients(student.model)}
    student.drop_gradient()
    return sums.objective_nats, found


REF = ModelRef(source="here", kind="directory", revision=None, weights_sha256="0" * 64, architecture="x", parameters=1, licence=None)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = RELATIVE) -> None:
    assert found.keys() == expected.keys()
    whole = float(torch.stack([gradient.double().norm() for gradient in expected.values()]).norm())
    for name, gradient in expected.items():
        off = float((found[name].double() - gradient.double()).norm())
        assert off <= relative * max(float(gradient.double().norm()), 1e-3 * whole), f"{name}: off by {off / whole:.1e} of the whole"


# --- the same ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [uneven(), uneven()[:1], uneven()[4:5]], ids=["uneven", "one", "one, cut"])
@by_family
def test_packed_is_padded(family: str, sequences: list[TokenSequence]) -> None:
    model = model_of(family)
    whole = packed(model)
    torch.testing.assert_close(states_of(whole, sequences), states_of(model, sequences), atol=1e-5, rtol=1e-5)
    (nats, found), (padded_nats, expected) = gradient_of(whole, sequences), gradient_of(model, sequences)
    assert nats == pytest.approx(padded_nats, rel=1e-6)
    assert_same(found, expected)


@by_family
def test_packed_is_the_unmodified_model_on_each_sequence_alone(family: str) -> None:
    """In float64, where nothing but a mistake is left."""
    model = model_of(family).double()
    whole, sequences = packed(model), uneven(3)
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([one.ids]), output_hidden_states=True).hidden_states[-1][0, list(one.scored_rows)] for one in sequences]
    torch.testing.assert_close(states_of(whole, sequences), torch.cat(alone), atol=1e-12, rtol=1e-12)


@by_family
def test_layers_computed_again_give_the_same_gradient_packed(family: str) -> None:
    """The second computation happens on the way back, when no sequences are laid end to end any more."""
    model, sequences = packed(model_of(family)), uneven()
    _, expected = gradient_of(model, sequences)
    recompute_layers(model)
    _, found = gradient_of(model, sequences)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@by_family
def test_no_token_of_one_sequence_reaches_another(family: str) -> None:
    model, sequences = packed(model_of(family)), uneven()
    before = states_of(model, sequences)
    counts = [len(one.scored_rows) for one in sequences]
    for index, one in enumerate(sequences):
        if not one.scored_rows:
            continue
        others = [TokenSequence(ids=tuple((token + 101) % 220 for token in each.ids), answer_spans=each.answer_spans) for each in sequences]
        others[index] = one
        after = states_of(model, others)
        parts = zip(before.split(counts), after.split(counts), strict=True)
        for place, (old, new) in enumerate(parts):
            assert torch.equal(old, new) == (place == index or not counts[place])


def test_a_model_that_packs_reads_and_writes_as_before() -> None:
    """With a cache, and with a padded batch and its mask."""
    for family in FAMILIES:
        model = model_of(family)
        whole = packed(model)
        ids, mask = torch.arange(14).reshape(2, 7), torch.ones(2, 7, dtype=torch.int64)
        mask[1, :3] = 0
        with torch.no_grad():
            for arguments in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
                assert torch.equal(whole(**arguments).logits, model(**arguments).logits)
            caches = [one(input_ids=ids, use_cache=True).past_key_values for one in (whole, model)]
            steps = [one(input_ids=ids[:, :1], past_key_values=cache).logits for one, cache in zip((whole, model), caches, strict=True)]
        assert torch.equal(*steps)


def test_nothing_scored_is_no_rows() -> None:
    none = [TokenSequence(ids=(4, 9, 11), answer_spans=()), TokenSequence(ids=(4,), answer_spans=())]
    assert states_of(packed(model_of("llama")), none).shape == (0, 32)


def test_a_line_holds_no_more_than_the_scored_rows_need() -> None:
    sequences = uneven()
    line = lay_end_to_end(sequences, torch.device("cpu"))
    assert line.ids_1T.shape == line.positions_1T.shape == (1, sum(one.scored_rows[-1] + 1 for one in sequences if one.scored_rows))
    assert list(line.lengths) == sorted(line.lengths)
    tokens = [one.ids[row] for one in sequences for row in one.scored_rows]
    assert line.ids_1T[0, line.rows_R].tolist() == tokens
    assert line.positions_1T[0, line.rows_R].tolist() == [row for one in sequences for row in one.scored_rows]


# --- what may not be packed -------------------------------------------------------------------------------------------------------------

_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
OTHERS: dict[str, dict[str, Any]] = {
    "Mamba": {},
    "Mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "Rwkv": {},
    "RecurrentGemma": {"num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3},
    "Bloom": {"n_head": 2},
    "Mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2},
    "Jamba": _ATTENTION | {"attn_layer_offset": 1, "attn_layer_period": 2},
    "Lfm2": _ATTENTION | {"layer_types": ["full_attention", "conv"]},
}
AS_WELL: dict[str, dict[str, Any]] = {
    "GptOss": _ATTENTION | {"num_local_experts": 4, "head_dim": 16, "sliding_window": 4},
    "Mixtral": _ATTENTION | {"num_local_experts": 4},
    "Gemma3Text": _ATTENTION | {"head_dim": 16, "sliding_window": 4, "num_hidden_layers": 7},
    "Cohere2": _ATTENTION | {"sliding_window": 4},
    "OPT": {"num_attention_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": 32},
}


def made(name: str, options: dict[str, Any]) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(
        **{"vocab_size": 220, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0} | options
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_the_same_packed_is_padded(name: str) -> None:
    model = made(name, OTHERS[name])
    before = model.config._attn_implementation
    why = pack(model)
    assert why
    assert not packs(model)
    assert model.config._attn_implementation == before
    with pytest.raises(ModelError, match="packing-unsupported"):
        require_packing(model, "student")


@pytest.mark.parametrize("name", AS_WELL)
def test_experts_sinks_and_other_windows_pack(name: str) -> None:
    model, sequences = made(name, AS_WELL[name]), uneven()
    torch.testing.assert_close(states_of(packed(model), sequences), states_of(model, sequences), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fault", ["leak", "positions"])
def test_the_proof_finds_what_is_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that sees a hair of another sequence, far under rounding; and positions that go on."""
    model, right = model_of("llama"), packing.through

    def wrong(body: Any, line: Any) -> torch.Tensor:
        if fault == "positions":
            line = packing.Line(line.ids_1T, torch.arange(line.ids_1T.shape[1])[None], line.rows_R, line.lengths)
        states = right(body, line)
        return states + 1e-12 * states.roll(5, dims=1) if fault == "leak" else states

    monkeypatch.setattr(packing, "through", wrong)
    # Rotary positions are relative, so that only absolute ones can be wrong.
    why = pack(model if fault == "leak" else model_of("gpt2"))
    assert why is not None
    assert ("other sequences" in why) == (fault == "leak")


def test_a_student_of_the_teachers_layers_is_proved_by_itself() -> None:
    teacher = packed(model_of("gemma2"))
    student = build_from_teacher(teacher, [0])
    assert not packs(student)
    assert student.config._attn_implementation == "eager"


def test_what_is_exported_knows_nothing_of_it(tmp_path: Path) -> None:
    packed(model_of("llama")).save_pretrained(tmp_path)
    assert "stillroom" not in (tmp_path / "config.json").read_text(encoding="utf-8")


# --- on a GPU ---------------------------------------------------------------------------------------------------------------------------


def test_flash_attention_of_uneven_lengths_is_called_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: a stand-in with the signature of torch.nn.attention.varlen.varlen_attn, and tensors that say they are on one."""
    asked: list[tuple[int, ...]] = []

    def varlen_attn(
        query: Any, key: Any, value: Any, ends_q: Any, ends_k: Any, max_q: int, max_k: int, *, scale: Any, window_size: Any, enable_gqa: bool
    ) -> Any:
        assert (window_size, enable_gqa) == ((-1, 0), True)
        assert ends_q is ends_k
        assert ends_q.dtype == torch.int32
        assert max_q == max_k == max(ends_q.diff())
        asked.append(tuple(ends_q.tolist()))
        parts = [
            functional.scaled_dot_product_attention(
                *(one[start:stop].transpose(0, 1) for one in (query, key, value)), is_causal=True, scale=scale, enable_gqa=True
            )
            for start, stop in zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), strict=True)
        ]
        return torch.cat([part.transpose(0, 1) for part in parts])

    stand_in = ModuleType("torch.nn.attention.varlen")
    stand_in.varlen_attn = varlen_attn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", stand_in)
    monkeypatch.setattr(packing, "_on_gpu", lambda tensor: True)
    model = tiny_model("llama", heads=4).bfloat16()
    whole, sequences = packed(model), uneven()
    asked.clear()
    found, expected = states_of(whole, sequences), states_of(model, sequences)
    assert asked == [(0, *torch.tensor(lay_end_to_end(sequences, torch.device("cpu")).lengths).cumsum(0).tolist())] * 2
    torch.testing.assert_close(found.float(), expected.float(), atol=0.1, rtol=0.1)


# --- a teacher, a run -------------------------------------------------------------------------------------------------------------------


@by_family
def test_a_packed_teacher_says_what_a_padded_one_says(family: str) -> None:
    model, sequences = model_of(family), uneven()
    vocabulary = vocabulary_of(tiny_tokenizer(), 220)
    teachers = [LocalTeacher(one, REF, vocabulary, at_once=4) for one in (packed(model), model)]
    for kind in ("hidden", "top_k"):
        found, expected = (teacher.targets(sequences, TargetRequest(kind=kind, k=5, state_dtype="float32")) for teacher in teachers)
        if isinstance(found, HiddenTargets):
            torch.testing.assert_close(found.states_RD, expected.states_RD, atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(found.log_probs_RK, expected.log_probs_RK, atol=1e-5, rtol=1e-5)
            assert torch.equal(found.ids_RK, expected.ids_RK)


def run_of(tree: dict[str, Any], out: Path, **training: Any) -> stillroom.Run:
    return stillroom.run(Recipe.from_tree(tree | {"training": tree["training"] | training, "evaluation": {}}), out=out, until="trained")


def test_a_run_is_the_same_packed_and_padded(tmp_path: Path) -> None:
    tree = tiny_recipe(tmp_path / "in")
    end_to_end, padded = (metrics_of(run_of(tree, tmp_path / name, packing=name).directory) for name in ("auto", "off"))
    assert end_to_end != padded
    for found, expected in zip(end_to_end, padded, strict=True):
        assert found["nats_per_token"] == pytest.approx(expected["nats_per_token"], rel=1e-4)
    plans = {name: stillroom.plan(Recipe.from_tree(tree | {"training": tree["training"] | {"packing": name}})) for name in ("auto", "on", "off")}
    assert [plan.hardware.packing for plan in plans.values()] == [["student", "teacher"], ["student", "teacher"], []]
    assert [one.degraded for one in plans["auto"].decisions if one.what == "training.packing"] == [False]


def test_a_teacher_that_cannot_be_packed_is_padded_and_it_is_recorded(tmp_path: Path) -> None:
    tree = tiny_recipe(tmp_path / "in")
    tokenizer = tiny_tokenizer()
    directory = tmp_path / "bloom"
    made("Bloom", {"n_head": 2, "vocab_size": len(tokenizer)}).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    assert load_model(stillroom.models.loading.describe(str(directory))) is not None
    tree["teacher"] = {"model": str(directory)}
    tree["generation"] = {"max_new_tokens": 4}
    plan = stillroom.plan(Recipe.from_tree(tree))
    assert plan.hardware.packing == ["student"]
    (decision,) = [one for one in plan.decisions if one.what == "training.packing"]
    assert decision.degraded
    assert "teacher are padded" in decision.why
    tree["training"] |= {"packing": "on"}
    with pytest.raises(ModelError, match="packing-unsupported"):
        stillroom.plan(Recipe.from_tree(tree))
