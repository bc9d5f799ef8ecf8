"""Teachers that compute in less than float32: how far their losses and gradients are from those of the same teacher in float32, and layers computed again."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from helpers import FAMILIES, tiny_model, tiny_tokenizer
from stillroom.core.errors import ModelError, ResourceError
from stillroom.core.identities import ModelRef, Sampling, TokenSequence
from stillroom.models import arithmetic
from stillroom.models.arithmetic import Int8Linear, compile_body, quantise, recompute_layers, require_compiler
from stillroom.models.loading import body_of, head_of, layers_of, teacher_head_arrays
from stillroom.models.local import LocalTeacher, text_targets
from stillroom.models.packing import pack, scored_states
from stillroom.models.probing import LiveBytes
from stillroom.models.student import OptimiserSettings, TransformersStudent, named_gradients
from stillroom.models.tokenizers import vocabulary_of
from stillroom.objectives.divergences import forward_kl
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.targets.kinds import HiddenTargets, TargetRequest
from stillroom.targets.protocols import Batch

VOCABULARY = vocabulary_of(tiny_tokenizer(), 220)
REF = ModelRef(source="here", kind="directory", revision=None, weights_sha256="0" * 64, architecture="x", parameters=1, licence=None)
by_family = pytest.mark.parametrize("family", FAMILIES)


def sequences() -> list[TokenSequence]:
    draw = random.Random(5)
    lengths = [draw.randint(4, 24) for _ in range(12)]
    return [TokenSequence(ids=tuple(draw.randrange(220) for _ in range(length)), answer_spans=((1, length),)) for length in lengths]


def model_of(family: str, *, seed: int = 1, width: int = 48, spread: float = 0.15, **more: Any) -> PreTrainedModel:
    eager = {"attn_implementation": "eager"} if family == "gemma2" else {}
    return tiny_model(family, width=width, seed=seed, spread=spread, **eager | more)


def teacher_of(family: str, dtype: str) -> LocalTeacher:
    model = model_of(family)
    if dtype != "float32":
        nn.Module.to(model, torch.bfloat16)
    if dtype == "int8":
        quantise(model)
    return LocalTeacher(model, REF, VOCABULARY)


def loss_and_gradient(teacher: LocalTeacher, kind: str) -> tuple[float, torch.Tensor]:
    """Forward KL in nats per token, and the whole gradient, of a student in float32."""
    student = TransformersStudent(model_of("llama", seed=2, width=32), VOCABULARY, OptimiserSettings())
    asked = sequences()
    targets = teacher.targets(asked, TargetRequest(kind=kind, k=40))
    batch = Batch(sequences=tuple(asked), targets=targets, labels=text_targets(asked, VOCABULARY))
    sums = student.forward_backward(batch, Objective(terms=(WeightedTerm(divergence=forward_kl()),)), divide_by=batch.scored_tokens)
    return sums.objective_nats / batch.scored_tokens, torch.cat([gradient.reshape(-1) for _, gradient in named_gradients(student.model)])


# Forward KL of these pairs is 0.1 to 1.1 nats per token. Of whole distributions, found at most: loss 0.0006 (bfloat16) and 0.0008 (int8) of itself, gradient
# 0.0084 and 0.0148 of its norm. Of the 40 most probable ids of nearly even distributions, where others are kept: 0.0019 and 0.0012, 0.072 and 0.114.
LOSS = 0.004
GRADIENT = {"bfloat16": 0.02, "int8": 0.03}
GRADIENT_TOP_K = {"bfloat16": 0.15, "int8": 0.25}


@pytest.mark.parametrize("kind", ["hidden", "full", "top_k"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@by_family
def test_what_a_teacher_in_less_than_float32_moves(family: str, dtype: str, kind: str) -> None:
    (expected, whole), (found, moved) = (loss_and_gradient(teacher_of(family, of), kind) for of in ("float32", dtype))
    assert abs(found - expected) <= LOSS * expected
    allowed = (GRADIENT_TOP_K if kind == "top_k" else GRADIENT)[dtype]
    assert 0 < float((moved - whole).norm()) <= allowed * float(whole.norm())


@by_family
def test_the_head_of_a_bfloat16_teacher_is_multiplied_as_it_is(family: str) -> None:
    """Hidden targets carry states and head in bfloat16, exactly the teacher's own; its full targets are their distribution up to the logits' rounding."""
    teacher = teacher_of(family, "bfloat16")
    hidden, full = (teacher.targets(sequences(), TargetRequest(kind=kind)) for kind in ("hidden", "full"))
    assert isinstance(hidden, HiddenTargets)
    assert (hidden.states_RD.dtype, hidden.head.weight_VD.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(hidden.head.weight_VD, head_of(teacher.model).weight_VD[:220])
    assert teacher_head_arrays(teacher_of(family, "float32").model, 220).weight_VD.dtype == torch.float32
    losses = [loss_and_gradient(teacher, kind)[0] for kind in ("hidden", "full")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert full.log_probs_RV.dtype == torch.float32


# --- eight bits -------------------------------------------------------------------------------------------------------------------------


def test_a_weight_in_eight_bits_is_off_by_half_a_step_at_most() -> None:
    weight_VD = torch.randn(40, 24) * torch.logspace(-6, 3, 40)[:, None]
    weight_VD[7] = 0.0
    layer = Int8Linear(weight_VD, torch.randn(40))
    kept_VD = layer.weight.float() * layer.scale_V[:, None]
    assert layer.weight.dtype == torch.int8
    assert bool(((kept_VD - weight_VD).abs() <= 0.5001 * layer.scale_V[:, None]).all())
    assert not kept_VD[7].any()
    states = torch.randn(3, 5, 24)
    torch.testing.assert_close(layer(states), states @ kept_VD.T + layer.bias, rtol=1e-4, atol=1e-4)
    assert layer(states.bfloat16()).dtype == torch.bfloat16


@by_family
def test_linear_layers_of_the_body_alone_are_kept_in_eight_bits(family: str) -> None:
    model = model_of(family)
    before = sum(one.numel() * one.element_size() for one in layers_of(model).state_dict().values())
    head = head_of(model).weight_VD.clone()
    quantise(model)
    assert sum(isinstance(module, Int8Linear) for module in body_of(model).modules()) >= 8
    assert not any(isinstance(module, nn.Linear) for module in layers_of(model).modules())
    assert torch.equal(head_of(model).weight_VD, head)
    after = sum(one.numel() * one.element_size() for one in layers_of(model).state_dict().values())
    assert after < 0.4 * before


def test_a_model_in_eight_bits_packs_and_writes() -> None:
    teacher = teacher_of("qwen3", "int8")
    padded = teacher.hidden_states(sequences())
    assert pack(teacher.model) is None
    assert float((teacher.hidden_states(sequences()) - padded).norm() / padded.norm()) < 0.02
    assert len(teacher.generate([(1, 2, 3)], Sampling(max_new_tokens=4))) == 1


def test_a_body_without_linear_layers_cannot_be_kept_in_eight_bits() -> None:
    model = model_of("llama")
    quantise(model)
    with pytest.raises(ModelError, match="eight bits"):
        quantise(model)


# --- layers computed again --------------------------------------------------------------------------------------------------------------


def whole_gradient(model: PreTrainedModel, autocast: bool = False) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states = scored_states(model, sequences())
    states.backward(torch.linspace(-1, 1, states.numel()).view_as(states).to(states.dtype))
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("autocast", [False, True])
@by_family
def test_layers_computed_again_give_the_same_gradient(family: str, autocast: bool) -> None:
    model = model_of(family)
    expected = whole_gradient(model, autocast)
    names = list(model.state_dict())
    recompute_layers(model)
    assert list(model.state_dict()) == names
    assert not any(module.training for module in model.modules())
    found = whole_gradient(model, autocast)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_computed_again_take_less_memory() -> None:
    """Twelve layers: what is kept of one token until the way back, and the most that lives at once."""
    kept, peaks = [], []
    for again in (False, True):
        model = model_of("llama", layers=12)
        if again:
            recompute_layers(model)
        with LiveBytes(torch.device("cpu")) as live:
            states = scored_states(model, sequences())
            kept.append(live.now)
            states.backward(torch.ones_like(states))
        peaks.append(live.peak)
    assert kept[1] < kept[0] / 6
    assert peaks[1] < 0.6 * peaks[0]


def test_a_copy_of_a_model_computes_its_own_layers_again() -> None:
    model = model_of("llama")
    recompute_layers(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in layers_of(twin).parameters():
            parameter.zero_()
    assert not torch.equal(scored_states(twin, sequences()), scored_states(model, sequences()))
    whole_gradient(twin)
    assert not any(parameter.grad is not None for parameter in model.parameters())


# --- compiled ---------------------------------------------------------------------------------------------------------------------------


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(function: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(arithmetic.torch, "compile", fails)
    with pytest.raises(ResourceError, match="no C\\+\\+ compiler") as caught:
        require_compiler(torch.device("cpu"))
    assert caught.value.code == "compiler-unavailable"


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_body_computes_the_same(packed: bool) -> None:
    """Shapes that change from batch to batch, and writing in between, which is not compiled."""
    require_compiler(torch.device("cpu"))
    model = model_of("llama")
    expected = whole_gradient(model)
    teacher = LocalTeacher(model, REF, VOCABULARY)
    written = teacher.generate([(1, 2, 3), (4,)], Sampling(max_new_tokens=6))
    if packed:
        assert pack(model) is None
    compile_body(model)
    found = whole_gradient(model)
    again = whole_gradient(model)
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(whole)
        assert torch.equal(found[name], again[name])
    # Other lengths, and other numbers of sequences: of what is padded more than one, since a compiler takes one for another kind of number.
    with torch.compiler.set_stance("fail_on_recompile"):
        for asked in (sequences()[:3], sequences()[4 : 5 if packed else 6]):
            states = scored_states(model, asked)
            states.sum().backward()
            assert states.shape[0] == sum(len(one.scored_rows) for one in asked)
    assert teacher.generate([(1, 2, 3), (4,)], Sampling(max_new_tokens=6)) == written
