"""Adapters: merged = unmerged, gradients those of the dense weights, and a run with them what a run without them is: repeatable, resumable, whole."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

import stillroom
from helpers import FAMILIES, save_tiny, tiny_model, tiny_tokenizer
from stillroom.core.errors import ModelError, RecipeError, RunError
from stillroom.core.identities import TokenSequence
from stillroom.evals import cost
from stillroom.evals.measured import Absence
from stillroom.models import export_gguf
from stillroom.models.adapters import LoraSettings, add_lora, has_adapter, load_adapter, merged, save_adapter
from stillroom.models.export import export_adapter
from stillroom.models.loading import describe, head_of, load_model, skeleton_of
from stillroom.models.student import OptimiserSettings, TransformersStudent
from stillroom.models.tokenizers import vocabulary_of
from stillroom.objectives.divergences import forward_kl
from stillroom.objectives.fused import linear_head
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.runs.observer import Silent
from stillroom.runs.publishing import publish
from stillroom.runs.recipe import Recipe
from stillroom.targets.kinds import FullTargets, TextTargets
from stillroom.targets.protocols import Batch
from tiny_run import metrics_of, tiny_recipe

ROWS, SIZE = 224, 220
IDS_BT = torch.arange(40).reshape(2, 20) * 5 % SIZE
OBJECTIVE = Objective(terms=(WeightedTerm(divergence=forward_kl()),))
by_family = pytest.mark.parametrize("family", FAMILIES)
with_head = pytest.mark.parametrize("head", [False, True], ids=["body", "body and head"])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft's, of tied weights
        yield


def model_of(family: str, seed: int = 2) -> PreTrainedModel:
    return tiny_model(family, rows=ROWS, seed=seed, **({"attn_implementation": "eager"} if family == "gemma2" else {}))


def adapted(family: str = "llama", *, head: bool = False, **settings: Any) -> PreTrainedModel:
    """A model whose adapters are no longer zero."""
    model = add_lora(model_of(family), LoraSettings(**{"rank": 3, "alpha": 5, "head": head, **settings}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS_BT, use_cache=False).logits
    return found


def off_by(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def weights_of(model: torch.nn.Module, learned: bool) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad is learned}


def student_of(model: PreTrainedModel) -> TransformersStudent:
    return TransformersStudent(model, vocabulary_of(tiny_tokenizer(), ROWS), OptimiserSettings(weight_decay=0.1))


def batch_of(seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    sequences = tuple(
        TokenSequence(ids=tuple(torch.randint(SIZE, (length,), generator=draw).tolist()), answer_spans=((3, length),)) for length in (9, 14, 6)
    )
    rows = [token for sequence in sequences for token in sequence.ids[3:]]
    log_probs_RV = torch.log_softmax(2 * torch.randn(len(rows), SIZE, generator=draw), dim=-1).numpy()
    return Batch(
        sequences=sequences,
        targets=FullTargets(vocabulary="", temperature=1.0, log_probs_RV=log_probs_RV),
        labels=TextTargets(vocabulary="", token_ids_R=torch.tensor(rows).numpy()),
    )


# --- the model ----------------------------------------------------------------------------------------------------------------------------


@by_family
@with_head
def test_a_new_adapter_changes_nothing_and_a_merged_one_equals_an_unmerged_one(family: str, head: bool, tmp_path: Path) -> None:
    plain = model_of(family)
    assert torch.equal(logits_of(add_lora(copy.deepcopy(plain), LoraSettings(rank=4, alpha=8, head=head))), logits_of(plain))
    model = adapted(family, head=head)
    before = logits_of(model)
    assert off_by(before, logits_of(plain)) > 0.1
    one = merged(model)
    assert type(one) is type(plain)
    assert not has_adapter(one)
    assert off_by(logits_of(one), before) <= 1e-5
    assert torch.equal(logits_of(model), before), "merging changed what was merged"
    one.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again), logits_of(one))
    assert torch.equal(again.get_input_embeddings().weight, plain.get_input_embeddings().weight)


def test_merging_shares_what_it_does_not_change() -> None:
    model = adapted("llama", targets=("q_proj",))
    one = merged(model)
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    own = [name for name, parameter in one.named_parameters() if parameter.data_ptr() not in pointers]
    assert own == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "phi", "gpt2"], ids=["tied", "untied", "softcap", "biases", "transposed"])
@with_head
def test_the_gradient_of_an_adapter_is_that_of_the_dense_weights(family: str, head: bool) -> None:
    """The oracle knows no adapter: a plain model in float64 with W + alpha / rank * B A in place of W, and autograd."""
    model, batch = adapted(family, head=head), batch_of()
    student = student_of(model)
    assert (linear_head(head_of(model)) is None) is head
    sums = student.forward_backward(batch, OBJECTIVE, divide_by=batch.scored_tokens)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)

    exact = model_of(family).double()
    leaves = {name: parameter.detach().double().requires_grad_() for name, parameter in model.named_parameters() if parameter.requires_grad}
    dense = {name: parameter.detach() for name, parameter in exact.named_parameters(remove_duplicate=False)}
    for name in [name for name in leaves if ".lora_A." in name]:
        layer = name.partition(".lora_A.")[0]
        delta = leaves[name.replace("lora_A", "lora_B")] @ leaves[name] * (5 / 3)
        transposed = family == "gpt2" and not layer.endswith("lm_head")
        dense[f"{layer}.weight"] = dense[f"{layer}.weight"] + (delta.T if transposed else delta)
    total = torch.zeros((), dtype=torch.float64)
    rows = torch.tensor(batch.targets.log_probs_RV).double().split([len(s.scored_rows) for s in batch.sequences])
    for sequence, log_p_RV in zip(batch.sequences, rows, strict=True):
        output = functional_call(exact, dense, (), {"input_ids": torch.tensor([sequence.ids]), "use_cache": False}, tie_weights=False)
        log_q_RV = torch.log_softmax(output.logits[0, list(sequence.scored_rows), :SIZE], dim=-1)
        total = total + (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum()
    (total / batch.scored_tokens).backward()
    assert sums.objective_nats == pytest.approx(float(total), rel=1e-5)
    whole = math.sqrt(sum(float(leaf.grad.norm()) ** 2 for leaf in leaves.values()))
    assert whole > 1e-3
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = leaves[name].grad
            assert float((parameter.grad.double() - expected).norm()) <= 1e-5 * max(float(expected.norm()), 1e-3 * whole), name


def test_adapters_are_a_function_of_the_seed_and_of_each_layers_name() -> None:
    def adapters(seed: int, state: int, targets: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
        model = model_of("llama")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(state)
            before = torch.random.get_rng_state()
            add_lora(model, LoraSettings(rank=3, alpha=3, seed=seed, targets=targets))
            assert torch.equal(torch.random.get_rng_state(), before)
        return {name: values for name, values in weights_of(model, learned=True).items() if "lora_A" in name}

    one, same, other, fewer = adapters(0, 1), adapters(0, 2), adapters(1, 1), adapters(0, 3, ("q_proj", "down_proj"))
    assert len(one) == 14
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)
    assert len(fewer) == 4
    assert all(torch.equal(one[name], fewer[name]) for name in fewer)
    first, second = (one[f"model.layers.{layer}.self_attn.q_proj.lora_A.default.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)
    assert 0.8 / math.sqrt(32) < float(first.abs().max()) <= 1 / math.sqrt(32)


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("q_prj", " Did you mean `q_proj`?"),
        ("attention", ""),
        ("lm_head", " The head is adapted by student.lora.head: true."),
        ("norm", ""),
        ("roj", " Did you mean `v_proj`?"),
    ],
)
def test_a_name_that_no_layer_has_is_refused_with_those_that_there_are(target: str, hint: str) -> None:
    model = model_of("llama")
    with pytest.raises(ModelError) as caught:
        add_lora(model, LoraSettings(rank=2, alpha=2, targets=("q_proj", target)))
    assert caught.value.code == "lora-targets"
    assert caught.value.found == f"{target!r}, which no linear layer of the body of LlamaForCausalLM is called"
    assert caught.value.expected == "some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert caught.value.do == f"Correct student.lora.targets, or set it to all-linear.{hint}"
    assert not has_adapter(model)


def test_names_may_be_parts_of_paths_and_mean_these_layers_alone() -> None:
    model = adapted("llama", targets=("layers.1.self_attn.v_proj", "mlp.up_proj"))
    found = {name.partition(".lora_")[0] for name in weights_of(model, learned=True)}
    assert found == {"model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}


def test_parameters_are_counted_without_memory() -> None:
    real, skeleton = add_lora(model_of("llama"), LoraSettings(rank=3, alpha=3)), skeleton_of(model_of("llama").config)
    add_lora(skeleton, LoraSettings(rank=3, alpha=3))
    assert all(parameter.device.type == "meta" for parameter in skeleton.parameters())
    shapes = [{name: value.shape for name, value in weights_of(model, learned=True).items()} for model in (real, skeleton)]
    assert shapes[0] == shapes[1]


# --- the student --------------------------------------------------------------------------------------------------------------------------


@with_head
def test_only_adapters_are_learned_saved_and_loaded(head: bool, tmp_path: Path) -> None:
    def stepped(student: TransformersStudent, steps: range) -> None:
        for step in steps:
            student.forward_backward(batch_of(step), OBJECTIVE, divide_by=10)
            student.optim_step(1e-2)

    whole, parts = student_of(adapted(head=head)), student_of(adapted(head=head))
    frozen, learned = weights_of(whole.model, learned=False), weights_of(whole.model, learned=True)
    stepped(whole, range(4))
    stepped(parts, range(2))
    parts.save(tmp_path)
    saved = load_file(tmp_path / "weights.safetensors")
    assert saved.keys() == learned.keys()
    size = sum(tensor.numel() for tensor in saved.values())
    state = load_file(tmp_path / "optimiser.safetensors")
    assert parts.checkpoint_bytes == 12 * size == 4 * (size + sum(tensor.numel() for name, tensor in state.items() if not name.startswith("step:")))
    resumed = student_of(adapted(head=head, seed=99))
    resumed.load(tmp_path)
    stepped(resumed, range(2, 4))
    after = weights_of(whole.model, learned=True)
    assert all(torch.equal(after[name], values) for name, values in weights_of(resumed.model, learned=True).items())
    assert all(torch.equal(frozen[name], values) for name, values in weights_of(whole.model, learned=False).items())
    assert all(not torch.equal(after[name], values) for name, values in learned.items())
    plain = student_of(model_of("llama"))
    with pytest.raises(RunError, match="run-corrupt"):
        plain.load(tmp_path)


# --- on disk ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "phi", "gpt2"])
@with_head
def test_peft_itself_loads_an_exported_adapter(family: str, head: bool, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", model=model_of(family))
    model = adapted(family, head=head)
    export_adapter(model, tiny_tokenizer(), tmp_path / "adapter", "card", base=str(base), revision=None)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert not (tmp_path / "adapter" / "config.json").exists()
    expected = logits_of(model)
    for loaded in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"),
    ):
        assert off_by(logits_of(loaded.eval()), expected) <= 1e-6
    own = add_lora(load_model(describe(str(base))), LoraSettings(rank=3, alpha=5, head=head))
    load_adapter(own, tmp_path / "adapter")
    assert torch.equal(logits_of(own), expected)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["r"], config["lora_alpha"]) == (str(base), None, 3, 5)
    assert ("lm_head" in config["target_modules"]) is head


def test_an_adapter_of_another_student_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path, "base", "abc")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "abc"
    for other in (adapted(rank=4), adapted(targets=("q_proj",)), adapted(head=True)):
        before = logits_of(other)
        with pytest.raises(ModelError) as caught:
            load_adapter(other, tmp_path)
        assert caught.value.code == "model-corrupt"
        assert torch.equal(logits_of(other), before)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="adapter_model"):
        load_adapter(adapted(), tmp_path)


def test_a_merged_student_becomes_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    save_tiny(tmp_path / "student", model=merged(adapted(head=True)))
    export_gguf.export_gguf(tmp_path / "student", tmp_path / "student.gguf")
    assert (tmp_path / "student.gguf").stat().st_size > 4 * 2 * ROWS * 32, "embeddings and head are two"


# --- a run --------------------------------------------------------------------------------------------------------------------------------


def tree_of(folder: Path, **lora: Any) -> dict[str, Any]:
    tree = tiny_recipe(folder)
    tokenizer = tiny_tokenizer()
    base = save_tiny(folder / "base", tokenizer=tokenizer, model=tiny_model("llama", rows=len(tokenizer), layers=2, width=16, seed=5))
    return tree | {"student": {"model": str(base), "lora": {"rank": 4, "alpha": 8, **lora}}}


class Dies(Silent):
    """Ends the process, as far as the run can tell, at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def progress(self, done: int, total: int, unit: str, fields: dict[str, str]) -> None:
        if unit == "step" and done == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("lora", "file"),
    [
        ({"head": True}, "model.safetensors"),
        ({"save": "adapter", "targets": ["q_proj", "down_proj"]}, "adapter_model.safetensors"),
    ],
    ids=["merged", "adapter"],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(lora: dict[str, Any], file: str, tmp_path: Path) -> None:
    tree = tree_of(tmp_path / "in", **lora) | {"evaluation": {}}
    tree["objective"] = {"terms": [{"divergence": "forward_kl"}, {"divergence": "hidden_cosine", "weight": 0.1}]}
    recipe = Recipe.from_tree(tree)
    whole = stillroom.run(recipe, out=tmp_path / "whole", until="trained").directory
    for step in (1, 3, 6):
        parts = tmp_path / f"died at {step}"
        with pytest.raises(KeyboardInterrupt):
            stillroom.run(recipe, out=parts, until="trained", observer=Dies(step))
        torch.rand(3)  # whatever else draws from the global generator
        stillroom.run(recipe, out=parts, until="trained")
        assert metrics_of(parts) == metrics_of(whole)
        assert (parts / "student" / file).read_bytes() == (whole / "student" / file).read_bytes()
    losses = [line["nats_per_token"] for line in metrics_of(whole) if line["name"] == "train"]
    assert losses[-1] < losses[0]


def test_a_run_that_saves_an_adapter_is_evaluated_and_published_as_the_merged_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Processes that measure memory take most of the time, and are tested elsewhere.
    monkeypatch.setattr(cost, "measure_peak_memory", lambda *_: Absence(absent="not measured in this test"))
    tree = tree_of(tmp_path / "in", head=True)
    tree["intent"] = {"release": "weights", "student_name": "small"}
    runs = {}
    for save in ("merged", "adapter"):
        tree["student"]["lora"]["save"] = save
        runs[save] = stillroom.run(Recipe.from_tree(tree), out=tmp_path / save)
        publish(tmp_path / save)
    merged_run, adapter_run = runs["merged"].directory, runs["adapter"].directory
    for name in ("student.json", "student_before.json", "label_only.json", "fidelity.json"):
        assert (merged_run / "evals" / name).read_bytes() == (adapter_run / "evals" / name).read_bytes()
    assert (merged_run / "samples.jsonl").read_bytes() == (adapter_run / "samples.jsonl").read_bytes()
    costs = [json.loads((directory / "evals" / "cost.json").read_text())["student"] for directory in (merged_run, adapter_run)]
    assert costs[0]["bytes"] == costs[1]["bytes"]
    assert costs[0]["parameters"] == costs[1]["parameters"]
    names = {path.name for path in (adapter_run / "student").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "NOTICE", "LICENSE", "obligations.md"}
    assert not names & {"model.safetensors", "config.json"}
    assert not list(adapter_run.rglob("*.merged*"))
    front = yaml.safe_load((adapter_run / "student" / "README.md").read_text().split("---\n")[1])
    assert front["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM" in (adapter_run / "student" / "README.md").read_text()
    assert "AutoPeftModelForCausalLM" not in (merged_run / "student" / "README.md").read_text()
    report = runs["adapter"].report
    assert any(one.what == "student.lora" and "adapter alone" in one.why for one in report.provenance.decisions)
    plan = json.loads((adapter_run / "plan.json").read_text())
    learned = sum(tensor.numel() for tensor in load_file(adapter_run / "student" / "adapter_model.safetensors").values())
    assert plan["student"]["trainable"] == learned < plan["student"]["parameters"] == 8_720
    assert report.provenance.student["parameters"] == 8_720 + 220 * 16, "a tied head with an adapter is a weight of its own"
    [answer] = stillroom.compare(runs["adapter"], prompt="3 hours and 4 minutes")
    [same] = stillroom.compare(runs["merged"], prompt="3 hours and 4 minutes")
    assert answer == same
    # What is given away is what peft makes of it.
    by_peft = AutoPeftModelForCausalLM.from_pretrained(adapter_run / "student").eval()
    assert off_by(logits_of(by_peft), logits_of(load_model(describe(str(merged_run / "student"))))) <= 1e-5


def test_layers_of_the_teacher_may_have_adapters(tmp_path: Path) -> None:
    tree = tiny_recipe(tmp_path / "in") | {"evaluation": {}, "student": {"from_teacher": {"layers": [0]}, "lora": {"rank": 2, "targets": ["o_proj"]}}}
    directory = stillroom.run(Recipe.from_tree(tree), out=tmp_path / "out", until="trained").directory
    student, teacher = load_file(directory / "student" / "model.safetensors"), load_file(tmp_path / "in" / "teacher" / "model.safetensors")
    assert {name for name in student if not torch.equal(student[name], teacher[name])} == {"model.layers.0.self_attn.o_proj.weight"}


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"from_scratch": {"layers": 1, "width": 16, "heads": 2, "feed_forward": 32}, "lora": {}}, "those of from_scratch are random numbers"),
        ({"from_teacher": {"layers": [0]}, "lora": {"save": "adapter"}}, "lora.save: adapter needs student.model"),
        ({"model": "m", "lora": {"rank": 0}}, "student.lora.rank"),
        ({"model": "m", "lora": {"targets": []}}, "student.lora.targets"),
        ({"model": "m", "lora": {"dropout": 0.1}}, "student.lora.dropout"),
    ],
)
def test_recipes_of_adapters_that_could_not_be_are_refused(student: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.from_tree({"teacher": {"model": "t"}, "prompts": {"path": "p.jsonl"}, "student": student})


def test_a_wrong_name_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Did you mean `up_proj`") as caught:
        stillroom.run(Recipe.from_tree(tree_of(tmp_path / "in", targets=["up_project"])), out=tmp_path / "out")
    assert caught.value.code == "lora-targets"
    assert not (tmp_path / "out" / "recipe.json").exists()
