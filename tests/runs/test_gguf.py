"""The GGUF file in llama.cpp itself: the same tokens, prompts and log-probabilities as transformers from the same directory; or a refusal by name."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import unicodedata
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerFast

from gguf_cases import CASES, CHATML, LLAMA3, QWEN2, split_tokenizer
from helpers import DEMO_TEMPLATE, END, save_tiny, tiny_model, tiny_tokenizer
from stillroom.core import durable
from stillroom.core.errors import ModelError, ResourceError, StillroomError
from stillroom.models.export_gguf import export_gguf
from stillroom.models.loading import describe, load_model
from stillroom.models.serving import ServerSettings, started
from stillroom.models.tokenizers import Renderer, load_tokenizer

pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")

TEACHER = Path(__file__).parents[2] / "src" / "stillroom" / "demo" / "teacher"
QUESTIONS = ("next Monday at half past 3", "every weekday at 09:30", "the 5th of March 2024", "in two hours", "tomorrow at noon")
# In nats, of every token of the vocabulary after random prefixes, against transformers in float32 from the unrounded weights. Measured, worst of the
# tiny random models: 1.8e-5 in f32, 2.9e-2 in f16 (llama.cpp rounds what the matrices are multiplied with, too), 0.79 in q8_0, whose blocks of 32
# are half of such a model's width; the bundled teacher is measured below.
TOLERANCE_NATS = {"f32": 1e-3, "f16": 0.1, "q8_0": 1.5}
PREFIXES = 20


@dataclass(frozen=True)
class Served:
    directory: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    address: str

    @property
    def rows(self) -> int:
        return describe(str(self.directory)).shape.rows

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        return tokens

    def worst_nats(self, prefixes: list[list[int]]) -> float:
        """The largest difference between any log-probability of the server's and transformers', after each of the prefixes."""
        worst = 0.0
        # A token that is a part of a character is not reported, nor are its alternatives. The one that is drawn changes none of them.
        letter = self.tokenizer.convert_tokens_to_ids("a")
        for ids in prefixes:
            answer = self.ask(
                "/completion", prompt=ids, n_predict=1, temperature=0, n_probs=self.rows, cache_prompt=False, logit_bias=[[letter, 1000]]
            )  # fmt: skip
            top = answer["completion_probabilities"][0]["top_logprobs"]
            assert sorted(entry["id"] for entry in top) == list(range(self.rows))
            with torch.inference_mode():
                expected = torch.log_softmax(self.model(torch.tensor([ids])).logits[0, -1].double(), -1)
            worst = max(worst, *(abs(entry["logprob"] - float(expected[entry["id"]])) for entry in top))
        return worst


def opened(directory: Path, address: str) -> Served:
    return Served(directory, load_model(describe(str(directory))), load_tokenizer(str(directory)), address)


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASES[request.param](tmp_path_factory.mktemp("gguf") / request.param)


@pytest.fixture(scope="module")
def served(case: Path) -> Iterator[Served]:
    with started(case, ServerSettings(context=128, parallel=1, exact=True), "llama.cpp") as server:
        yield opened(case, server.address)


def prefixes(rows: int, longest: int = 100) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(rows) for _ in range(draw.randint(1, longest))] for _ in range(PREFIXES)]


# -- the same numbers ---------------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_transformers(served: Served) -> None:
    assert served.worst_nats(prefixes(served.rows)) <= TOLERANCE_NATS["f32"]


@pytest.mark.parametrize("quantize", ["f16", "q8_0"])
def test_rounded_weights_stay_within_the_stated_bound(case: Path, quantize: str, tmp_path: Path) -> None:
    export_gguf(case, tmp_path / "student.gguf", quantize=quantize)
    with started(tmp_path / "student.gguf", ServerSettings(context=128, parallel=1, exact=True), "llama.cpp") as server:
        found = opened(case, server.address)
        worst = found.worst_nats(prefixes(found.rows))
    assert worst <= TOLERANCE_NATS[quantize]
    assert worst > TOLERANCE_NATS["f32"], "nothing was rounded"


def test_every_tensor_is_there_in_the_form_that_is_said(case: Path, tmp_path: Path) -> None:
    """Vectors are exact in every file; a matrix of q8_0 is off by half a step at most, one of f16 by its rounding."""
    exact, steps = _tensors(case, tmp_path, "f32"), {"f16": 2.0**-11, "q8_0": 0.5 / 127}
    for quantize, step in steps.items():
        rounded = _tensors(case, tmp_path, quantize)
        assert rounded.keys() == exact.keys()
        for name, (kind, values) in rounded.items():
            true = exact[name][1]
            assert kind == ("F32" if true.ndim == 1 else quantize.upper())
            blocks = true.reshape(-1, 32) if kind == "Q8_0" else true
            largest = np.abs(blocks).max(-1, keepdims=True)
            # The scale of a block is a float16 itself.
            allowed = np.zeros_like(largest) if true.ndim == 1 else largest * step * 1.1 + 1e-7
            assert (np.abs(values.reshape(blocks.shape) - blocks) <= allowed).all(), name


def _tensors(directory: Path, folder: Path, quantize: Any) -> dict[str, tuple[str, Any]]:
    export_gguf(directory, folder / f"{quantize}.gguf", quantize=quantize)
    reader = gguf.GGUFReader(folder / f"{quantize}.gguf")
    return {one.name: (one.tensor_type.name, gguf.quants.dequantize(one.data, one.tensor_type)) for one in reader.tensors}


def test_a_matrix_that_does_not_fill_blocks_stays_in_half_precision_and_that_is_said(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "odd", width=48, heads=2)
    exported = export_gguf(directory, tmp_path / "odd.gguf", quantize="q8_0")
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(exported.file).tensors}
    assert kinds["token_embd.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert any("float16" in note for note in exported.notes)


# -- the same tokens ----------------------------------------------------------------------------------------------------

_SPOKEN = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            ["it's", "IT'S", " 12345", "\r\n", "  \n\t", "Größe", "é", "²½٣", "你好", "👩‍👩‍👧", END, "[tool call]", "[tool", "<|user|>", " x"]
        ),
        max_size=12,
    ).map("".join),
)


@given(text=_SPOKEN)
@example(text="\x00 \u200d\ufeff\u0301a\U0010ffff")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_a_text_becomes_the_same_tokens(served: Served, text: str) -> None:
    if served.directory.name == "llama-ascii":
        text = "".join(letter for letter in text if ord(letter) < 128)  # the rest has no token: noted, and tested below
    if served.directory.name == "qwen3":
        text = unicodedata.normalize("NFC", text)
    assert served.tokens(text) == served.tokenizer(text)["input_ids"]


CONVERSATIONS = (
    [{"role": "user", "content": "Größe? \n"}],
    [{"role": "system", "content": " Be brief."}, {"role": "user", "content": f"a{END}b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "{{ d }}"}],
)  # fmt: skip


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_conversation_becomes_the_same_prompt(served: Served, messages: list[dict[str, str]]) -> None:
    text = served.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = served.tokenizer(text, add_special_tokens=False)["input_ids"]
    # Where the tokenizer adds its start token, llama.cpp takes it off the text and adds it to the tokens.
    start = served.tokenizer.bos_token or ""
    assert served.ask("/apply-template", messages=messages)["prompt"] == text.removeprefix(start)
    assert served.ask("/v1/chat/completions", messages=messages, max_tokens=1)["usage"]["prompt_tokens"] == len(ids)
    assert served.tokens(text.removeprefix(start)) == ids


def test_what_cannot_be_the_same_is_noted(tmp_path: Path) -> None:
    def notes(tokenizer: PreTrainedTokenizerFast, name: str) -> str:
        return " ".join(export_gguf(save_tiny(tmp_path / name, tokenizer=tokenizer), tmp_path / f"{name}.gguf").notes)

    assert notes(tiny_tokenizer(ascii_only=False, size=300), "plain") == ""
    assert "128 of the 256 bytes" in notes(tiny_tokenizer(), "ascii")
    assert "NFC" in notes(split_tokenizer(QWEN2, normalizer="NFC"), "nfc")
    assert "no chat template" in notes(tiny_tokenizer(ascii_only=False, size=300, template=None), "bare")
    shy = CHATML.replace("enable_thinking is false", "enable_thinking")
    assert "enable_thinking" in notes(split_tokenizer(QWEN2, template=shy), "shy")
    assert "enable_thinking" not in notes(split_tokenizer(QWEN2), "thinking")


def test_it_ends_where_the_student_ends(tmp_path: Path) -> None:
    """All ids at which generation_config.json ends an answer, and no other: each is forced in turn."""
    directory = save_tiny(tmp_path / "student", tokenizer=tiny_tokenizer(ascii_only=False, size=300))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 50, 60]}))
    with started(directory, ServerSettings(context=64, parallel=1), "llama.cpp") as server:
        found = opened(directory, server.address)
        ended = {
            index: found.ask("/completion", prompt=[9], n_predict=2, logit_bias=[[index, 1000]], temperature=0)["stop_type"]
            for index in (0, 50, 60, 70)
        }
    assert ended == {0: "eos", 50: "eos", 60: "eos", 70: "limit"}


# -- the bundled teacher ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantize", "tolerance"), [("f32", 1e-3), ("f16", 0.1), ("q8_0", 1.5)])
def test_the_bundled_teacher_answers_as_it_does_in_transformers(quantize: str, tolerance: float, tmp_path: Path) -> None:
    if not (TEACHER / "model.safetensors").is_file():
        pytest.skip("the bundled teacher is not there")
    export_gguf(TEACHER, tmp_path / "teacher.gguf", quantize=quantize)
    with started(tmp_path / "teacher.gguf", ServerSettings(context=256, parallel=1, exact=True), "llama.cpp") as server:
        found = opened(TEACHER, server.address)
        renderer = Renderer(found.tokenizer)
        for text in QUESTIONS:
            messages = [{"role": "user", "content": text}]
            answer = found.ask("/v1/chat/completions", messages=messages, temperature=0, max_tokens=40)["choices"][0]
            ids = list(renderer.prompt_ids(_Prompt(text)))
            with torch.inference_mode():
                whole = found.model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=list(renderer.end_ids))[0].tolist()
            assert answer["message"]["content"] == renderer.answer_text(whole[len(ids) :])
            assert answer["finish_reason"] == "stop"
            assert found.worst_nats([whole[:end] for end in range(len(ids), len(whole))]) <= tolerance


@dataclass(frozen=True)
class _Prompt:
    text: str
    messages: None = None


# -- what travels with it -----------------------------------------------------------------------------------------------


def test_licence_digest_and_documents_are_in_the_file(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "student")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Ünser\nBuilt with Lláma", encoding="utf-8")
    (directory / "NOTICE").write_text("Notice of the teacher")
    (directory / "LICENSES").mkdir()
    (directory / "LICENSES" / "llama3.txt").write_text("Terms")
    export_gguf(directory, tmp_path / "a.gguf")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    found = {name: fields[name].contents() for name in fields if name.startswith(("general.", "stillroom."))}
    assert (found["general.name"], found["general.license"]) == ("student", "apache-2.0")
    assert found["stillroom.source.weights_sha256"] == describe(str(directory)).weights_sha256
    documents = dict(zip(found["stillroom.documents.names"], found["stillroom.documents.texts"], strict=True))
    assert documents["NOTICE"] == "Notice of the teacher"
    assert documents["README.md"].endswith("Built with Lláma")
    assert documents["LICENSES/llama3.txt"] == "Terms"
    export_gguf(directory, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        directory = save_tiny(tmp_path / "student", width=64)
        with pytest.raises(ResourceError, match="GGUF"):
            export_gguf(directory, disk / "student.gguf")
        # Where the room that was there at the start is taken by others meanwhile, numpy says only that less was written.
        monkeypatch.setattr(durable, "require_free_bytes", lambda path, needed, what: None)
        with pytest.raises(ResourceError) as caught:
            export_gguf(directory, disk / "student.gguf")
        assert caught.value.code == "disk-full"
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_killed_export_leaves_nothing(tmp_path: Path) -> None:
    save_tiny(tmp_path / "student")
    code = (
        "import os, sys; from pathlib import Path; from stillroom.models import export_gguf as module\n"
        "laid_out, left = module._laid_out, [5]\n"
        "def dying(*arguments):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), 9)\n"
        "    return laid_out(*arguments)\n"
        "module._laid_out = dying\n"
        "module.export_gguf(Path('student'), Path('student.gguf'))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(StillroomError, match=r"stillroom\[export\]") as caught:
        export_gguf(save_tiny(tmp_path / "student"), tmp_path / "student.gguf")
    assert caught.value.code == "missing-extra"


# -- refusals -----------------------------------------------------------------------------------------------------------


def refused(directory: Path, word: str, quantize: Any = "f32") -> None:
    with pytest.raises(ModelError, match=word) as caught:
        export_gguf(directory, directory.parent / "model.gguf", quantize=quantize)
    assert caught.value.code == "model-unsupported"
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3_OF_QWEN = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "options", "word"),
    [
        *((family, {}, "ForCausalLM") for family in ("mistral", "gemma2", "cohere", "granite", "phi")),
        ("gpt2", {}, "GPT2LMHeadModel"),
        ("llama", {"attention_bias": True}, "biases"),
        ("llama", {"mlp_bias": True}, "biases"),
        ("qwen3", {"attention_bias": True}, "biases"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": YARN}, "yarn"),
        ("llama", {"rope_parameters": LINEAR}, "linear"),
        ("qwen3", {"rope_parameters": LLAMA3_OF_QWEN}, "llama3"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding-window"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_name(family: str, options: dict[str, Any], word: str, tmp_path: Path) -> None:
    refused(save_tiny(tmp_path / "model", family, **options), word)


def _tensor_too_many(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    save_file({**weights, "model.layers.0.self_attn.sinks": torch.zeros(2)}, directory / "model.safetensors", {"format": "pt"})


def _adapter(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "adapter_config.json").write_text("{}")


def _two_templates(directory: Path) -> None:
    tokenizer = load_tokenizer(str(directory))
    tokenizer.chat_template = {"default": DEMO_TEMPLATE, "tool_use": DEMO_TEMPLATE}
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize(("spoil", "word"), [(_tensor_too_many, "sinks"), (_adapter, "LoRA"), (_two_templates, "several chat templates")])
def test_a_directory_with_something_more_is_refused_by_name(spoil: Callable[[Path], None], word: str, tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model")
    spoil(directory)
    refused(directory, word)


def _changed(**changes: Any) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokenizer.json says something else in `model`, or elsewhere."""
    from tokenizers import Tokenizer

    fast = tiny_tokenizer()
    tree = json.loads(fast.backend_tokenizer.to_str())
    for name, value in changes.items():
        (tree if name in tree else tree["model"])[name] = value
    fast._tokenizer = Tokenizer.from_str(json.dumps(tree))
    return fast


def _with(token: Any = None, **changes: Any) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    if token is not None:
        tokenizer.add_tokens([token])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "Whitespace": lambda: _changed(pre_tokenizer={"type": "Whitespace"}),
    "pre-tokenizer": lambda: _changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
    "Sequence": lambda: split_tokenizer(QWEN2.replace(r"\p{N}", r"\p{N}{1,2}", 1)),
    "Lowercase": lambda: _changed(normalizer={"type": "Lowercase"}),
    "ignore_merges": lambda: _changed(ignore_merges=True),
    "dropout": lambda: _changed(dropout=0.1),
    "end token": lambda: _with(eos_token=None),
    "white space": lambda: _with(AddedToken("[mask]", lstrip=True)),
    "bos_token": lambda: _with(chat_template="{{ bos_token }}" + DEMO_TEMPLATE),
    "start token": lambda: split_tokenizer(LLAMA3, start=True),
}


@pytest.mark.parametrize("word", list(TOKENIZERS))
def test_another_kind_of_tokenizer_is_refused_by_name(word: str, tmp_path: Path) -> None:
    refused(save_tiny(tmp_path / "model", tokenizer=TOKENIZERS[word](), rows=600), word)


def test_more_tokens_than_rows_or_ends_than_places_are_refused(tmp_path: Path) -> None:
    refused(save_tiny(tmp_path / "a" / "model", rows=len(tiny_tokenizer()) - 1), "no row")
    directory = save_tiny(tmp_path / "b" / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5, 6, 7]}))
    refused(directory, "4 ids at which an answer ends")


@pytest.mark.parametrize(("value", "quantize", "code"), [(7e4, "f16", "model-unsupported"), (float("nan"), "f32", "model-corrupt")])
def test_numbers_that_cannot_be_kept_are_refused(value: float, quantize: Any, code: str, tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    directory = save_tiny(tmp_path / "model", model=model)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj") as caught:
        export_gguf(directory, tmp_path / "model.gguf", quantize=quantize)
    assert caught.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_field_that_transformers_adds_later_is_refused_until_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_tiny(tmp_path / "model")
    from stillroom.models import export_gguf as module

    monkeypatch.setattr(module, "_READ", [name for name in module._READ if name != "rms_norm_eps"])
    refused(directory, "rms_norm_eps")
