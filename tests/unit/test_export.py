"""The exported student: plain Hugging Face loads it, runs it and gets the same numbers; the same student is the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from helpers import DEMO_TEMPLATE, END, save_tiny, tiny_model, tiny_tokenizer
from stillroom.core import durable
from stillroom.core.errors import ResourceError
from stillroom.core.hashing import sha256_file
from stillroom.models.export import export_student
from stillroom.models.loading import build_from_scratch, describe, load_model
from stillroom.models.tokenizers import load_tokenizer

CARD = "---\nlicense: apache-2.0\n---\n# A student\n"
FILES = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def digests(directory: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in directory.iterdir()}


def test_plain_hugging_face_loads_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = build_from_scratch(
        layers=2, width=32, heads=2, feed_forward=48, rows=len(tokenizer), context_length=64, end_id=0, pad_id=0, seed=3
    )  # fmt: skip
    export_student(model.train(), tokenizer, tmp_path / "student", CARD)
    assert model.training
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    again = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert again.chat_template == DEMO_TEMPLATE
    assert again("next Monday")["input_ids"] == tokenizer("next Monday")["input_ids"]
    assert {path.name for path in (tmp_path / "student").iterdir()} == FILES
    assert len({path.stat().st_mode for path in (tmp_path / "student").iterdir() if path.name != "README.md"}) == 1
    described = describe(str(tmp_path / "student"))
    assert (described.licence, described.end_ids) == ("apache-2.0", (0,))
    generation = json.loads((tmp_path / "student" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"], generation["do_sample"]) == (0, 0, False)
    assert "bos_token_id" not in generation


def test_the_pipeline_answers_and_stops(tmp_path: Path) -> None:
    """A model taught one answer by plain gradient descent gives it through the pipeline, by text and by messages, and stops after it."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", rows=len(tokenizer), spread=0.02)
    text = f"<|user|>half past 3<|assistant|>15:30{END}"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    export_student(model, tokenizer, tmp_path / "student", CARD)
    generator = pipeline("text-generation", model=str(tmp_path / "student"), device="cpu")
    answer = generator([{"role": "user", "content": "half past 3"}], max_new_tokens=30)
    assert answer[0]["generated_text"][-1] == {"role": "assistant", "content": "15:30"}
    assert generator("<|user|>half past 3<|assistant|>", return_full_text=False, max_new_tokens=30)[0]["generated_text"] == "15:30"


def test_the_same_student_is_the_same_bytes_wherever_it_comes_from(tmp_path: Path) -> None:
    export_student(tiny_model("llama"), tiny_tokenizer(), tmp_path / "made", CARD)
    directory = save_tiny(tmp_path / "somewhere" / "model")
    tokenizer = load_tokenizer(str(directory))
    model = load_model(describe(str(directory)))
    export_student(model, tokenizer, tmp_path / "a", CARD)
    # A tokenizer that has been used remembers how it padded and truncated.
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=7)
    export_student(load_model(describe(str(tmp_path / "a"))), tokenizer, tmp_path / "b", CARD)
    assert digests(tmp_path / "made") == digests(tmp_path / "a") == digests(tmp_path / "b")
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "a").iterdir() if path.suffix != ".safetensors")


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    code = """
import sys; from pathlib import Path; from helpers import tiny_model, tiny_tokenizer; from stillroom.models.export import export_student
export_student(tiny_model("qwen3"), tiny_tokenizer(), Path(sys.argv[1]), "card")
"""
    export_student(tiny_model("qwen3"), tiny_tokenizer(), tmp_path / "here", "card")
    path = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True, env=path)
    assert digests(tmp_path / "here") == digests(tmp_path / "there")


def test_several_end_tokens_are_all_kept(tmp_path: Path) -> None:
    export_student(tiny_model("llama"), tiny_tokenizer(), tmp_path / "student", CARD, end_ids=[5, 0])
    assert json.loads((tmp_path / "student" / "generation_config.json").read_text())["eos_token_id"] == [0, 5]
    assert describe(str(tmp_path / "student")).end_ids == (0, 5)


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    export_student(tiny_model("llama").bfloat16(), tiny_tokenizer(), tmp_path / "student", CARD)
    assert describe(str(tmp_path / "student")).stored_dtype == "BF16"


def test_an_export_replaces_an_older_one_and_a_half_made_one(tmp_path: Path) -> None:
    for name in ("student", ".student.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old.txt").write_text("old")
    export_student(tiny_model("llama"), tiny_tokenizer(), tmp_path / "student", CARD)
    assert {path.name for path in (tmp_path / "student").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "free_bytes", lambda path: 1000)
    with pytest.raises(ResourceError) as caught:
        export_student(tiny_model("llama"), tiny_tokenizer(), tmp_path / "student", CARD)
    assert caught.value.code == "disk-full"
    assert list(tmp_path.iterdir()) == []


def test_exporting_says_nothing_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny_model("gemma2"), tiny_tokenizer()
    export_student(model, tokenizer, tmp_path / "student", CARD)
    assert capfd.readouterr() == ("", "")
