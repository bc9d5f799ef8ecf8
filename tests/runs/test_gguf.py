"""The GGUF file in llama.cpp itself: the same tokens and the same log-probabilities as transformers from the same directory."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import save_tiny, tiny_model, tiny_tokenizer
from stillroom.core.errors import ModelError
from stillroom.models.export_gguf import export_gguf
from stillroom.models.loading import describe, load_model
from stillroom.models.tokenizers import Renderer, load_tokenizer

xllamacpp = pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

TEACHER = Path(__file__).parents[2] / "src" / "stillroom" / "demo" / "teacher"
TEXTS = ("next Monday at half past 3", "every weekday at 09:30", "the 5th of March 2024")
TOP = 20
NEW_TOKENS = 12
# llama.cpp's CPU kernels in float32 against PyTorch's, in nats; with f16 llama.cpp rounds the matrices and what they are multiplied with.
TOLERANCE_NATS = {"f32": 2e-4, "f16": 5e-2}


@contextmanager
def served(file: Path) -> Iterator[str]:
    """The address of llama.cpp's server, in this process, over one GGUF file."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = 256
    params.n_parallel = 1
    params.use_jinja = True
    params.warmup = False
    # Its defaults, a float16 cache and fused attention in float16, would hide an error of the converter.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


def ask(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.fixture(scope="module", params=["tiny", "teacher"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "teacher":
        if not (TEACHER / "model.safetensors").is_file():
            pytest.skip("the bundled teacher is not there")
        return TEACHER
    tokenizer = tiny_tokenizer()
    # Fewer key-value heads than heads, and padded rows: both change the layout.
    model = tiny_model("llama", rows=len(tokenizer) + 4, width=64, heads=4, num_key_value_heads=2, spread=0.2)
    return save_tiny(tmp_path_factory.mktemp("model"), tokenizer=tokenizer, model=model)


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_llama_cpp_gives_the_same_tokens_and_log_probabilities(directory: Path, dtype: str, tmp_path: Path) -> None:
    export_gguf(directory, tmp_path / "model.gguf", quantize=dtype)
    model = load_model(describe(str(directory)))
    renderer = Renderer(load_tokenizer(str(directory)))
    with served(tmp_path / "model.gguf") as address:
        for text in TEXTS:
            prompt = renderer.prompt_ids(_Prompt(text))
            rendered = ask(address, "/apply-template", {"messages": [{"role": "user", "content": text}]})["prompt"]
            tokens = ask(address, "/tokenize", {"content": rendered, "add_special": True, "parse_special": True})["tokens"]
            assert tuple(tokens) == prompt
            answer = ask(
                address, "/completion",
                {"prompt": list(prompt), "n_predict": NEW_TOKENS, "temperature": 0.0, "n_probs": TOP, "cache_prompt": False, "return_tokens": True},
            )  # fmt: skip
            check_steps(model, renderer, prompt, answer, TOLERANCE_NATS[dtype])


def check_steps(model: Any, renderer: Renderer, prompt: tuple[int, ...], answer: dict[str, Any], tolerance: float) -> None:
    """Every step that the server reports, against transformers on the same prefix; the choice too, unless two tokens are nearly equal."""
    ids = list(prompt)
    steps = answer["completion_probabilities"]
    assert steps
    for step in steps:
        with torch.inference_mode():
            log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
        for entry in step["top_logprobs"]:
            assert entry["logprob"] == pytest.approx(float(log_probs[entry["id"]]), abs=tolerance)
        assert len(step["top_logprobs"]) == TOP
        first, second = log_probs.topk(2).values.tolist()
        assert step["id"] == int(log_probs.argmax()) or first - second < 2 * tolerance
        ids.append(step["id"])
    if answer["stop_type"] == "eos":
        with torch.inference_mode():
            end = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        assert ids[-1] in renderer.end_ids or end in renderer.end_ids


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Qwen3ForCausalLM") as caught:
        export_gguf(save_tiny(tmp_path / "qwen", "qwen3"), tmp_path / "model.gguf")
    assert caught.value.code == "model-unsupported"
    assert not list(tmp_path.glob("*.gguf*"))


class _Prompt:
    messages = None

    def __init__(self, text: str) -> None:
        self.text = text
