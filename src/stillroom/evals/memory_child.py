"""Run in a fresh process (`python -m stillroom.evals.memory_child`): how much memory loading a model and answering with it takes.

Reads one JSON object from standard input (directory, prompts as token ids, max_new_tokens, device, dtype, threads), prints one: bytes, how.
What the libraries take is not counted: they are imported, and a model of a few kilobytes has been loaded and has answered, before the mark is set.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

if sys.platform != "win32":
    import resource

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"  # proc(5): resets VmHWM to the current resident size


@torch.inference_mode()
def answer(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding at batch 1 with a key-value cache, `max_new_tokens` tokens whatever they are."""
    inputs_BT = torch.tensor([prompt], dtype=torch.int64, device=model.device)
    cache, written = None, []
    for _ in range(max_new_tokens):
        output = model(input_ids=inputs_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        inputs_BT = output.logits[:, -1].argmax(-1, keepdim=True)
        written.append(int(inputs_BT))
    return written


def main() -> None:
    """Measures what standard input asks for and prints it."""
    request = json.loads(sys.stdin.read())
    torch.set_num_threads(request["threads"])
    _warm_up(request)
    config = AutoConfig.from_pretrained(request["directory"], local_files_only=True, trust_remote_code=False)
    for name in config.architectures or ():
        getattr(transformers, name, None)  # imports the architecture's module, which is lazy
    _settle()
    print(json.dumps(_growth(request)))


def _growth(request: dict[str, Any]) -> dict[str, Any]:
    if request["device"].startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _load_and_answer(request)
        return {"bytes": torch.cuda.max_memory_allocated() - before, "how": "peak of GPU memory allocated by torch"}
    if not _STATUS.exists():
        before = _max_resident()
        _load_and_answer(request)
        how = "growth of ru_maxrss, which cannot be reset: a lower bound where the imports' peak was higher than the memory used at the end of them"
        return {"bytes": _max_resident() - before, "how": how}
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER)
        before, how = _status_bytes("VmRSS"), "growth of the resident set's high-water mark (VmHWM), reset after the imports"
    except OSError:
        before = _status_bytes("VmHWM")
        how = (
            "growth of VmHWM, which could not be reset here: a lower bound where the imports' peak was higher than the memory used at the end of them"
        )
    _load_and_answer(request)
    return {"bytes": _status_bytes("VmHWM") - before, "how": how}


def _load_and_answer(request: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        request["directory"], dtype=getattr(torch, request["dtype"]), local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    model = model.to(request["device"]).eval()
    for prompt in request["prompts"]:
        answer(model, prompt, request["max_new_tokens"])


def _warm_up(request: dict[str, Any]) -> None:
    """Thread pools, kernels and what is imported late are the libraries', not the model's: a model of a few kilobytes takes the same path first."""
    config = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(config).save_pretrained(directory)
        _load_and_answer(request | {"directory": directory, "prompts": [[1, 2, 3]], "max_new_tokens": 2})


def _settle() -> None:
    """Gives freed memory back to the system, where it would otherwise be used again by the model and hide its growth."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform != "win32" else None
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _max_resident() -> int:
    if sys.platform == "win32":
        raise SystemExit("this system does not tell a process its peak memory")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
