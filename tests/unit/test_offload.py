"""The optimiser in host memory computes bit for bit what it computes where the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import tiny_model, tiny_tokenizer
from stillroom.core.errors import RecipeError
from stillroom.core.identities import TokenSequence
from stillroom.models import student as student_module
from stillroom.models.local import text_targets
from stillroom.models.offload import HostOptimiser
from stillroom.models.student import OptimiserSettings, TransformersStudent, adamw, optimiser_of
from stillroom.models.tokenizers import vocabulary_of
from stillroom.objectives.divergences import cross_entropy
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.runs.recipe import Recipe
from stillroom.targets.protocols import Batch

ROWS = 220
SETTINGS = OptimiserSettings(weight_decay=0.1, clip_norm=0.5)
OBJECTIVE = Objective(terms=(WeightedTerm(divergence=cross_entropy()),))


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a device: everything goes through the host's copies."""
    monkeypatch.setattr(
        student_module, "optimiser_of", lambda parameters, settings, _: HostOptimiser(parameters, lambda copies: adamw(copies, settings))
    )


def student_of(device: str = "cpu", **settings: Any) -> TransformersStudent:
    model = tiny_model("mistral", rows=ROWS)
    nn.Module.to(model, device)
    return TransformersStudent(model, vocabulary_of(tiny_tokenizer(), ROWS), OptimiserSettings(weight_decay=0.1, clip_norm=0.5, **settings))


def steps(student: TransformersStudent, numbers: range) -> list[float]:
    norms = []
    for number in numbers:
        draw = torch.Generator().manual_seed(number)
        sequences = (TokenSequence(ids=tuple(torch.randint(ROWS, (9,), generator=draw).tolist()), answer_spans=((2, 9),)),)
        batch = Batch(sequences=sequences, targets=(text := text_targets(sequences, student.vocabulary)), labels=text)
        student.forward_backward(batch, OBJECTIVE, divide_by=batch.scored_tokens)
        norms.append(student.optim_step(1e-2 / (1 + number)))
    return norms


def weights_of(student: TransformersStudent) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in student.model.named_parameters()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_same_steps_the_same_bits_and_the_same_checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    plain = student_of()
    norms = steps(plain, range(4))
    plain.save(tmp_path / "plain")
    request.getfixturevalue("forced")
    offloaded = student_of()
    assert isinstance(offloaded._optimiser, HostOptimiser)
    assert steps(offloaded, range(4)) == norms
    assert_equal(weights_of(offloaded), weights_of(plain))
    offloaded.save(tmp_path / "offloaded")
    for name in ("weights.safetensors", "optimiser.safetensors", "student.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "offloaded" / name).read_bytes()


@pytest.mark.usefixtures("forced")
def test_what_is_loaded_is_what_it_goes_on_from(tmp_path: Path) -> None:
    """Into a fresh student, and into one that has gone on: as where the best weights are loaded at the end."""
    whole = student_of()
    steps(whole, range(2))
    whole.save(tmp_path)
    steps(whole, range(2, 5))
    fresh, gone_on = student_of(), student_of()
    steps(gone_on, range(7, 10))
    for student in (fresh, gone_on):
        student.load(tmp_path)
        steps(student, range(2, 5))
        assert_equal(weights_of(student), weights_of(whole))


@pytest.mark.usefixtures("forced")
def test_a_parameter_without_a_gradient_stays_as_it_is() -> None:
    parameters = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))]
    optimiser = HostOptimiser(parameters, lambda copies: adamw(copies, SETTINGS))
    for group in optimiser.param_groups:
        group["lr"] = 0.1
    parameters[0].grad = torch.ones(3, 2)
    optimiser.step()
    assert not torch.equal(parameters[0], torch.ones(3, 2))
    assert torch.equal(parameters[1], torch.ones(2))
    optimiser.zero_grad()
    assert parameters[0].grad is None
    before = parameters[0].detach().clone()
    optimiser.step()
    assert torch.equal(parameters[0], before), "a gradient that was forgotten must not be used again"


def test_on_a_cpu_the_recipes_key_changes_nothing() -> None:
    assert isinstance(optimiser_of([nn.Parameter(torch.ones(2, 2))], OptimiserSettings(offload=True), torch.device("cpu")), torch.optim.AdamW)
    assert isinstance(optimiser_of([nn.Parameter(torch.ones(2, 2))], OptimiserSettings(offload=True), torch.device("meta")), HostOptimiser)
    tree = {"teacher": {"model": "t"}, "prompts": {"path": "p.jsonl"}, "student": {"model": "m"}}
    assert Recipe.from_tree(tree | {"training": {"optimiser_offload": True}}).training.optimiser_offload
    with pytest.raises(RecipeError, match="optimiser_ofload"):
        Recipe.from_tree(tree | {"training": {"optimiser_ofload": True}})


@pytest.mark.gpu
def test_on_a_gpu_the_state_is_in_host_memory_and_the_steps_are_the_cpus(tmp_path: Path) -> None:
    device = "cuda"
    plain, offloaded = student_of(device), student_of(device, offload=True)
    for student in (plain, offloaded):
        steps(student, range(3))
    state = offloaded._optimiser.state
    assert {value.device.type for one in state.values() for value in one.values()} == {"cpu"}
    for name, values in weights_of(plain).items():
        torch.testing.assert_close(weights_of(offloaded)[name], values, rtol=1e-4, atol=1e-6)
    # Bit for bit the CPU's optimiser on the GPU's gradients.
    ours, theirs = [nn.Parameter(torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).to(place)) for place in (device, "cpu")]
    host = HostOptimiser([ours], lambda copies: adamw(copies, SETTINGS))
    reference = adamw([theirs], SETTINGS)
    for step in range(3):
        gradient = torch.randn(300, 70, generator=torch.Generator().manual_seed(step + 1))
        ours.grad, theirs.grad = gradient.to(device), gradient.clone()
        for optimiser in (host, reference):
            for group in optimiser.param_groups:
                group["lr"] = 0.01
            optimiser.step()
        assert torch.equal(ours.detach().cpu(), theirs.detach())
    offloaded.save(tmp_path)
    again = student_of(device, offload=True)
    again.load(tmp_path)
    for student in (offloaded, again):
        steps(student, range(3, 5))
    assert_equal(weights_of(again), weights_of(offloaded))
