"""What goes wrong for a user goes wrong through the command line: one error with a code and an exit code, no traceback, and nothing lost."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import stillroom
from helpers import save_tiny, tiny_model, tiny_tokenizer
from stillroom.cli import main
from stillroom.core import durable
from stillroom.evals import cost
from stillroom.evals.measured import Absence
from stillroom.models import student as engine
from stillroom.models.student import TransformersStudent
from stillroom.runs.recipe import Recipe
from tiny_run import metrics_of, tiny_recipe, write_rows

Tree = dict[str, Any]


class Case:
    """A recipe on disk, a run directory, and the command line over them."""

    def __init__(self, tree: Tree, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.tree, self.folder, self._monkeypatch, self._capsys = tree, folder, monkeypatch, capsys
        self.recipe, self.out = folder / "recipe.yaml", folder / "out"

    def stillroom(self, *arguments: str) -> tuple[int, str]:
        """Runs one command; its exit code, and all that it wrote."""
        self._monkeypatch.setattr(sys, "argv", ["stillroom", *arguments])
        self._capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as done:
            code = int(done.code or 0)
        written = self._capsys.readouterr()
        return code, written.out + written.err

    def run(self, command: str = "train") -> tuple[int, str]:
        """The recipe as it is now: `run` up to the report, or all stages up to the command's own."""
        self.recipe.write_text(yaml.safe_dump(self.tree), encoding="utf-8")
        if command == "train":
            code, text = self.stillroom("collect", str(self.recipe), "--out", str(self.out))
            return (code, text) if code else self.stillroom("train", str(self.recipe), "--out", str(self.out))
        return self.stillroom(command, str(self.recipe), "--out", str(self.out))

    def refused(self, code: str, *, exit_code: int = 2, command: str = "run", says: tuple[str, ...] = ()) -> None:
        """The command fails with this code, says these words, and leaves what was there as it was."""
        before = contents(self.out)
        found, text = self.run(command)
        assert_error(found, text, code, exit_code, says)
        assert_kept(before, contents(self.out))


def assert_error(found: int, text: str, code: str, exit_code: int = 2, says: tuple[str, ...] = ()) -> None:
    assert f"[{code}]" in text, text
    assert found == exit_code, text
    assert "Traceback" not in text
    assert "  found     " in text
    assert "  do        " in text
    for word in says:
        assert word in text, text


def assert_kept(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """Every file that was there is there as it was; logs may have grown."""
    for name, data in before.items():
        if name == "ledger.jsonl":
            assert after[name].startswith(data)
        elif name != "ledger.head.json":
            assert after.get(name) == data, f"{name} was lost or changed"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Case:
    return Case(tiny_recipe(tmp_path / "in") | {"evaluation": {}}, tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def collected_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, Path]:
    folder = tmp_path_factory.mktemp("collected")
    tree = tiny_recipe(folder / "in") | {"evaluation": {}}
    return tree, stillroom.run(Recipe.from_tree(tree), out=folder / "run", until="collected").directory


@pytest.fixture
def collected(collected_once: tuple[Tree, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Case:
    """A case whose targets are there already. Its inputs are shared: they must stay as they are."""
    tree, directory = collected_once
    case = Case(copy.deepcopy(tree), tmp_path, monkeypatch, capsys)
    shutil.copytree(directory, case.out)
    return case


# --- the recipe ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"training": {"learning_rat": 0.1}}, ("`training.learning_rat`", "Did you mean `learning_rate`?")),
        ({"promts": {"path": "x"}}, ("`promts`", "Did you mean `prompts`?")),
        ({"objective": {"terms": [{"divergence": "forward_kl", "wieght": 1}]}}, ("Did you mean `weight`?",)),
    ],
)
def test_an_unknown_key_and_the_nearest_known_one(case: Case, change: Tree, says: tuple[str, ...]) -> None:
    case.tree |= change
    case.refused("recipe-unknown-key", says=says)
    assert not case.out.exists()


@pytest.mark.parametrize("command", ["run", "plan", "collect"])
def test_a_recipe_that_is_not_there(case: Case, command: str) -> None:
    options = [] if command == "plan" else ["--out", str(case.out)]
    found, text = case.stillroom(command, str(case.folder / "nowhere.yaml"), *options)
    assert_error(found, text, "recipe-missing", says=("nowhere.yaml", "stillroom init"))


def test_a_recipe_that_is_not_yaml(case: Case) -> None:
    case.recipe.write_text("teacher: [unclosed\n")
    assert_error(*case.stillroom("run", str(case.recipe)), "recipe-syntax")


@pytest.mark.parametrize(
    ("section", "value", "says"),
    [
        ("seed", -1, "seed"),
        ("training", {"steps": "many"}, "training.steps"),
        ("student", {"model": "a", "from_scratch": {"layers": 1, "width": 8, "heads": 1, "feed_forward": 8}}, "exactly one"),
        ("targets", {"kind": "logits"}, "targets.kind"),
    ],
)
def test_a_value_that_cannot_be(case: Case, section: str, value: Any, says: str) -> None:
    case.tree[section] = value
    case.refused("recipe-invalid", says=(says,))


def test_a_student_that_cannot_be_built(case: Case) -> None:
    case.tree["student"] = {"from_scratch": {"layers": 1, "width": 15, "heads": 2, "feed_forward": 8}}
    case.refused("student-shape")


def test_targets_that_the_objective_cannot_use(case: Case) -> None:
    case.tree["targets"] = {"kind": "text"}
    case.refused("targets-unsupported", says=("forward_kl", "hidden"))


# --- prompts --------------------------------------------------------------------------------------------------------------------------------------


def test_prompts_that_are_not_there(case: Case) -> None:
    case.tree["prompts"]["path"] = str(case.folder / "nowhere.jsonl")
    case.refused("prompts-missing", says=("nowhere.jsonl",))


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_prompts(case: Case, text: str) -> None:
    Path(case.tree["prompts"]["path"]).write_text(text)
    case.refused("prompts-empty")


def test_prompts_that_are_none(case: Case) -> None:
    Path(case.tree["prompts"]["path"]).write_text('{"prompt": "one"}\n{"prompt": \n')
    case.refused("prompts-invalid", says=("2",))


def test_answers_that_are_asked_for_and_not_given(case: Case) -> None:
    case.tree["prompts"]["answers"] = "given"
    case.refused("prompts-invalid", says=("prompts.answers",))


def test_a_teacher_that_finishes_no_answer(case: Case) -> None:
    case.tree["generation"] = {"max_new_tokens": 1, "sampling_temperature": 0.0}
    case.refused("transfer-set-empty", says=("max_new_tokens",))


@pytest.mark.parametrize("kind", ["path", "label_only"])
def test_items_without_answers_are_refused_by_the_plan(case: Case, kind: str) -> None:
    path = str(write_rows(case.folder / "unanswered.jsonl", [{"prompt": f"the {number}th of May"} for number in range(6)]))
    case.tree["evaluation"][kind] = path if kind == "path" else {"path": path}
    case.recipe.write_text(yaml.safe_dump(case.tree), encoding="utf-8")
    found, text = case.stillroom("plan", str(case.recipe))
    assert_error(found, text, "items-invalid", says=("6 items",))


# --- models -----------------------------------------------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_not_there(case: Case) -> None:
    case.tree["teacher"] = {"model": str(case.folder / "nowhere" / "at" / "all")}
    case.refused("model-missing")


def test_a_teacher_without_weights(case: Case) -> None:
    (Path(case.tree["teacher"]["model"]) / "model.safetensors").unlink()
    case.refused("model-no-weights", says=("model.safetensors",))


def test_a_teacher_without_a_tokenizer(case: Case) -> None:
    (Path(case.tree["teacher"]["model"]) / "tokenizer.json").unlink()
    case.refused("model-no-tokenizer")


def test_a_teacher_with_pickled_weights_alone(case: Case) -> None:
    weights = Path(case.tree["teacher"]["model"]) / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    case.refused("model-pickle")


def _cut_off(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _header_garbled(data: bytes) -> bytes:
    return data[:8] + b"?" * 40 + data[48:]


@pytest.mark.parametrize(
    "damage", [_cut_off, _header_garbled, lambda data: b"", lambda data: data + b"more"], ids=["half", "header", "empty", "longer"]
)
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_corrupt_safetensors(case: Case, which: str, damage: Callable[[bytes], bytes]) -> None:
    directory = save_tiny(case.folder / "student", layers=1, width=16, seed=9)
    case.tree["student"] = {"model": str(directory)}
    weights = (Path(case.tree["teacher"]["model"]) if which == "teacher" else directory) / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    case.refused("model-corrupt", says=("model.safetensors",))


def test_weights_that_are_not_numbers(case: Case) -> None:
    """A poisoned student is met when its weights are first read, after collecting: what was collected stays."""
    directory = save_tiny(case.folder / "student", layers=1, width=16, seed=9)
    case.tree["student"] = {"model": str(directory)}
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    assert case.run("collect")[0] == 0
    case.refused("model-corrupt", says=("not finite",))


def test_teacher_and_student_whose_vocabularies_differ(case: Case) -> None:
    other = tiny_tokenizer(special=("<|stop|>", "<|user|>", "<|assistant|>"))
    case.tree["student"] = {"model": str(save_tiny(case.folder / "student", tokenizer=other, layers=1, width=16))}
    case.refused("vocabulary-mismatch", says=("id 0 is b'<|end|>' (special)", "b'<|stop|>' (special)", "from_scratch"))


def test_vocabularies_of_one_size_are_not_one(case: Case) -> None:
    """The same ids, two of them exchanged: sizes compared as numbers would let it pass."""
    directory = save_tiny(case.folder / "student", layers=1, width=16)
    path = directory / "tokenizer.json"
    tree = json.loads(path.read_text())
    tokens = tree["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    path.write_text(json.dumps(tree))
    case.tree["student"] = {"model": str(directory)}
    case.refused("vocabulary-mismatch")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(case: Case, device: str) -> None:
    if {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}[device]():
        pytest.skip(f"there is a {device} device")
    case.tree["hardware"]["device"] = device
    case.refused("device-unavailable", says=(device, "cpu"))


# --- terms ------------------------------------------------------------------------------------------------------------------------------------------


# A local stand-in of which the recipe says that it is an old Llama: its licence forbids to improve other models with it.
FORBIDDEN = {"licence": "llama2"}


@pytest.mark.parametrize("command", ["run", "collect"])
def test_terms_that_forbid_it(case: Case, command: str) -> None:
    case.tree["terms"] = FORBIDDEN
    case.refused("entitlement-denied", exit_code=4, command=command, says=("llama-2@", "What would change it"))
    assert not contents(case.out)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_service_that_forbids_it_is_refused_before_anything_is_looked_at(case: Case, command: str) -> None:
    """No model of that name is anywhere, and nobody looks for it."""
    case.tree["teacher"] = {"model": "gpt-5.2"}
    case.tree["terms"] = {"access": "api:openai"}
    case.tree["intent"] = {"task": "general-llm", "release": "internal", "commercial": True}
    case.tree["prompts"]["path"] = "nowhere.jsonl"
    case.recipe.write_text(yaml.safe_dump(case.tree), encoding="utf-8")
    options = [] if command == "plan" else ["--out", str(case.out)]
    found, text = case.stillroom(command, str(case.recipe), *options)
    assert_error(found, text, "entitlement-denied", exit_code=4, says=("openai-services-agreement@", "no-competing-models", "What would change it"))
    assert not case.out.exists()


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({}, ("Under which licence",)),
        ({"licence": "Acme Licence 1"}, ("Acme Licence 1", "stillroom terms add")),
        ({"access": "host:nobody-knows-them", "licence": "Apache-2.0"}, ("nobody-knows-them", "stillroom terms add")),
    ],
)
def test_terms_that_are_not_known(case: Case, terms: Tree, says: tuple[str, ...]) -> None:
    case.tree["terms"] = terms
    case.refused("entitlement-unknown", exit_code=5, says=says)
    assert not contents(case.out)


def test_a_card_that_says_another_licence_than_the_recipe(case: Case) -> None:
    (Path(case.tree["teacher"]["model"]) / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    case.refused("entitlement-unknown", exit_code=5, says=("under Apache-2.0, as the recipe says, or under mit, as its card does",))
    assert not contents(case.out)


def test_an_intent_to_evaluate_only(case: Case) -> None:
    case.tree["intent"] = {"purpose": "evaluate"}
    case.refused("recipe-invalid", says=("`intent.purpose`", "stillroom terms check"))
    assert not contents(case.out)
    assert_error(*case.stillroom("plan", str(case.recipe)), "recipe-invalid")


def test_a_written_permission_that_is_not_there(case: Case) -> None:
    case.tree["terms"]["authorisations"] = ["nowhere.yaml"]
    case.refused("terms-missing", says=("nowhere.yaml",))


def test_another_catalogue_than_the_recipe_was_read_against(case: Case) -> None:
    case.tree["terms"]["catalogue"] = "2025-01-01"
    case.refused("recipe-invalid", says=("`terms.catalogue` is 2025-01-01",))


# --- the run directory --------------------------------------------------------------------------------------------------------------------------------


def test_a_directory_of_another_recipe(collected: Case) -> None:
    collected.tree["training"]["learning_rate"] = 0.5
    collected.refused("run-other-recipe", says=("training.learning_rate",))


def test_a_directory_of_something_else(case: Case) -> None:
    case.out.mkdir()
    (case.out / "thesis.tex").write_text("years of work")
    case.refused("run-not-a-run")
    assert contents(case.out) == {"thesis.tex": b"years of work"}


def test_a_file_where_the_directory_should_be(case: Case) -> None:
    case.out.write_text("a file")
    found, text = case.run("run")
    assert_error(found, text, "run-not-a-run")
    assert case.out.read_text() == "a file"


def test_a_locked_directory(case: Case) -> None:
    """Held by another process, which really is there."""
    case.out.mkdir()
    program = "import sys, pathlib; from stillroom.core.durable import DirectoryLock\nwith DirectoryLock(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"
    environment = os.environ | {"PYTHONPATH": str(Path(durable.__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(case.out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        case.refused("run-locked", says=(str(holder.pid),))
        holder.communicate("\n")
    assert case.run("collect")[0] == 0


@pytest.mark.parametrize("command", ["train", "evaluate", "report"])
def test_a_stage_before_its_time(case: Case, command: str) -> None:
    case.recipe.write_text(yaml.safe_dump(case.tree), encoding="utf-8")
    assert_error(*case.stillroom(command, str(case.recipe), "--out", str(case.out)), "run-not-a-run")


@pytest.mark.parametrize(
    ("file", "damage", "code"),
    [
        ("transfer_set.json", lambda data: data.replace(b'"requested": 24', b'"requested": 25'), "transfer-set-corrupt"),
        ("plan.json", lambda data: data[:-40], "run-corrupt"),
        ("ledger.jsonl", lambda data: data.replace(b'"sequence":3', b'"sequence":4'), "ledger-corrupt"),
        ("targets/shards/00000.arrow", lambda data: data[:-100] + bytes(100), "store-corrupt"),
        ("recipe.json", lambda data: b"{", "run-corrupt"),
    ],
)
def test_a_damaged_file_of_the_run(collected: Case, file: str, damage: Callable[[bytes], bytes], code: str) -> None:
    path = collected.out / file
    data = damage(path.read_bytes())
    assert data != path.read_bytes()
    path.write_bytes(data)
    collected.refused(code, says=(Path(file).name,))


def test_a_damaged_checkpoint(collected: Case) -> None:
    assert collected.run("train")[0] == 0
    (collected.out / "training.json").unlink()
    (weights,) = collected.out.glob("checkpoints/*/weights.safetensors")
    weights.write_bytes(_cut_off(weights.read_bytes()))
    collected.refused("run-corrupt", says=("checkpoint",))


def test_a_teacher_that_changed_since_the_run_began(case: Case) -> None:
    assert case.run("collect")[0] == 0
    save_tiny(Path(case.tree["teacher"]["model"]), model=tiny_model("llama", layers=1, width=16, seed=8, tie_word_embeddings=False))
    case.refused("store-mismatch", says=("SHA-256",))


def test_prompts_that_changed_since_the_run_began(case: Case) -> None:
    assert case.run("collect")[0] == 0
    path = Path(case.tree["prompts"]["path"])
    rows = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*rows[1:], rows[0]]) + "\n", encoding="utf-8")
    case.refused("prompts-changed", says=("new directory",))


# --- what the machine has ------------------------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_found_before_anything_is_done(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    case.refused("disk-full", says=("1.0 kB free",))
    assert not contents(case.out)


def test_a_disk_that_fills_up_before_a_checkpoint(collected: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # type: ignore[attr-defined]
        collected.refused("disk-full", says=("a checkpoint",))
    assert collected.run("train")[0] == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of its own, which only root can mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(case: Case, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is being written when the disk fills up, although it was thought to have room: one error, and with more room the same bytes."""
    whole = case.out
    assert case.run("train")[0] == 0
    used = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    case.out = small_disk / "run"
    monkeypatch.setattr(durable, "free_bytes", lambda path: 10**12)
    # Filled up to so many bytes, then given a little more each time until the run gets through.
    failures = 0
    ballast = small_disk / "ballast"
    for room in [*range(4_000, used + 200_000, 24_000), None]:
        ballast.unlink(missing_ok=True)
        if room is not None:
            taken = sum(path.stat().st_blocks * 512 for path in small_disk.rglob("*"))
            with ballast.open("wb") as file:
                file.write(bytes(max(0, 64 * 2**20 - taken - room)))
        before = contents(case.out) if case.out.exists() else {}
        code, text = case.run("train")
        if code == 0:
            break
        failures += 1
        assert_error(code, text, "disk-full")
        assert before.keys() - contents(case.out).keys() <= {name for name in before if "partial" in name or "checkpoints/" in name}
    assert failures >= 3
    assert (case.out / "student" / "model.safetensors").read_bytes() == (whole / "student" / "model.safetensors").read_bytes()
    assert metrics_of(case.out) == metrics_of(whole)


# --- numbers that are none --------------------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number(case: Case) -> None:
    case.tree["training"]["learning_rate"] = 1e30
    assert case.run("collect")[0] == 0
    case.refused("diverged", says=("training.learning_rate",))
    assert not (case.out / "student").exists()


# --- memory ---------------------------------------------------------------------------------------------------------------------------------------------------


def test_running_out_of_memory_halves_the_micro_batch_and_says_so(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as with the small micro-batch from the start; said on the screen and in the report."""
    case.tree["training"] |= {"micro_batch": 1}
    asked = case.out
    assert case.run("train")[0] == 0
    case.tree["training"] |= {"micro_batch": 4}
    case.out = case.folder / "small"
    whole = TransformersStudent.forward_backward

    def forward_backward(self: TransformersStudent, batch: Any, objective: Any, divide_by: int) -> Any:
        if len(batch.sequences) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return whole(self, batch, objective, divide_by)

    assert case.run("collect")[0] == 0
    monkeypatch.setattr(engine.TransformersStudent, "forward_backward", forward_backward)
    monkeypatch.setattr(cost, "measure_peak_memory", lambda *_: Absence(absent="not measured in this test"))
    code, text = case.run("run")
    assert code == 0, text
    assert "out of memory at step 1: going on with micro-batches of 2" in text
    assert "out of memory at step 1: going on with micro-batches of 1" in text
    assert (case.out / "student" / "model.safetensors").read_bytes() == (asked / "student" / "model.safetensors").read_bytes()
    assert metrics_of(case.out) == metrics_of(asked)
    decisions = json.loads((case.out / "report.json").read_text())["provenance"]["decisions"]
    halvings = [(one["chosen"], one["why"]) for one in decisions if one["what"] == "training.micro_batch"]
    assert halvings == [("2", "out of memory at step 1"), ("1", "out of memory at step 1")]


def test_one_sequence_that_does_not_fit(collected: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_backward(self: TransformersStudent, batch: Any, objective: Any, divide_by: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(engine.TransformersStudent, "forward_backward", forward_backward)
    collected.refused("out-of-memory")


# --- the command line itself ----------------------------------------------------------------------------------------------------------------------------------


def test_compare_asks_for_one_thing(case: Case) -> None:
    for arguments in ([], ["--prompt", "a", "--file", "b"]):
        code, text = case.stillroom("compare", str(case.folder), *arguments)
        assert_error(code, text, "recipe-invalid")
    assert_error(*case.stillroom("compare", str(case.folder), "--prompt", "a"), "run-not-a-run")


def test_an_option_that_does_not_exist(case: Case) -> None:
    code, text = case.stillroom("run", "recipe.yaml", "--fast")
    assert code == 2
    assert "--fast" in text
    assert "Traceback" not in text


def test_init_does_not_overwrite(case: Case) -> None:
    case.recipe.write_text("mine")
    assert_error(*case.stillroom("init", "--out", str(case.recipe)), "run-not-a-run")
    assert case.recipe.read_text() == "mine"


def test_prompts_of_the_wrong_kind_of_file(case: Case) -> None:
    case.tree["prompts"]["path"] = str(write_rows(case.folder / "prompts.csv", [{"prompt": "x"}]))
    case.refused("prompts-invalid", says=(".csv",))
