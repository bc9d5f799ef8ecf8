"""Is the plan right? Whole runs in fresh processes, and what their plans said before: peak memory and the time of each stage.

Four shapes, each dominated by something else:

    demo   the bundled teacher and the demo's student, short sequences: Python, caches, activations
    wide   a vocabulary of 16,384 and a narrow student, top_k targets: logits
    deep   a student of 15 million parameters on stored hidden states: activations and the optimiser
    live   a vocabulary of 4,096 and full distributions from a teacher that is asked at every step

Peak memory is the growth of VmHWM from after the imports and a run of a dozen prompts to the end of the run; the mark is reset before each stage.
What issue 2 asks: memory within 25 %, time within a factor of 2.

    python benchmarks/plan_accuracy.py [--shapes demo wide deep live] [--json]
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _common import ROOT, finish, parser

CAVEATS = (
    "Times are those of a machine that may have other work to do while a run goes on and none while it is planned, or the other way round; "
    "load_before and load_after say how busy it was.",
    "All but the demo have random weights: their answers end by chance, at lengths that the plan is told of.",
)
MEMORY_WITHIN, TIME_WITHIN = 1.25, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A run in a few numbers. Widths are multiples of 32, the width of a head; answers end after `answer` tokens on average, by chance."""

    prompts: int
    prompt: tuple[int, int]
    answer: int
    max_new_tokens: int
    rows: int
    teacher: tuple[int, int, int]
    """Layers, width, width of the feed-forward layers; likewise below."""
    student: tuple[int, int, int]
    targets: dict[str, Any]
    steps: int
    sequences_per_step: int
    items: int = 16


SHAPES = {
    "wide": Shape(
        prompts=1024, prompt=(8, 24), answer=12, max_new_tokens=32, rows=16_384, teacher=(2, 256, 512), student=(2, 96, 256),
        targets={"kind": "top_k", "k": 64}, steps=40, sequences_per_step=64,
    ),
    "deep": Shape(
        prompts=512, prompt=(24, 48), answer=12, max_new_tokens=32, rows=2_048, teacher=(4, 256, 768), student=(8, 384, 1024),
        targets={"kind": "hidden"}, steps=16, sequences_per_step=32,
    ),
    "live": Shape(
        prompts=512, prompt=(8, 40), answer=16, max_new_tokens=48, rows=4_096, teacher=(4, 384, 768), student=(3, 192, 512),
        targets={"kind": "full", "live": True}, steps=20, sequences_per_step=48,
    ),
}  # fmt: skip
_WARM_UP = Shape(
    prompts=12, prompt=(4, 8), answer=4, max_new_tokens=8, rows=300, teacher=(1, 32, 32), student=(1, 32, 32),
    targets={"kind": "hidden"}, steps=2, sequences_per_step=4, items=2,
)  # fmt: skip


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--shapes", nargs="+", default=["demo", *SHAPES], choices=["demo", *SHAPES])
    arguments.add_argument("--threads", type=int, default=1)
    given = arguments.parse_args()
    found = []
    for name in given.shapes:
        found.append(judged(name, run_shape(name, threads=given.threads)))
        if not given.json:
            print(_sentence(found[-1]), flush=True)
    finish("plan_accuracy", {"shapes": found, "load_after": os.getloadavg()[0]}, caveats=CAVEATS, as_json=given.json)


# --- what was found ---------------------------------------------------------------------------------------------------------------------


def run_shape(name: str, *, threads: int = 1, until: str = "reported", scale: float = 1.0) -> dict[str, Any]:
    """Plans and runs one shape in a fresh process, up to a state; `scale` shortens it (fewer prompts and steps, the same models)."""
    request = {"name": name, "threads": threads, "until": until, "scale": scale}
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child"]
    child = subprocess.run(command, input=json.dumps(request), env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def judged(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The ratios of plan to run; time over the stages that were run."""
    planned = {stage: found["planned_seconds"][stage] for stage in found["seconds"]}
    time_ratio = sum(planned.values()) / sum(found["seconds"].values())
    memory_ratio = found["planned_peak_bytes"] / max(found["peak_bytes"].values())
    return {
        "shape": name,
        "memory": {
            "planned_bytes": found["planned_peak_bytes"],
            "measured_bytes": max(found["peak_bytes"].values()),
            "ratio": round(memory_ratio, 3),
        },
        "time": {
            "planned_seconds": round(sum(planned.values()), 1),
            "measured_seconds": round(sum(found["seconds"].values()), 1),
            "ratio": round(time_ratio, 3),
        },
        "memory_holds": 1 / MEMORY_WITHIN <= memory_ratio <= MEMORY_WITHIN,
        "time_holds": 1 / TIME_WITHIN <= time_ratio <= TIME_WITHIN,
        **found,
    }


def _sentence(one: dict[str, Any]) -> str:
    memory, duration = one["memory"], one["time"]
    stages = ", ".join(f"{stage} {one['planned_seconds'][stage]:.0f}/{seconds:.0f}" for stage, seconds in one["seconds"].items())
    peaks = ", ".join(f"{stage} {peak / 1e6:.0f}" for stage, peak in one["peak_bytes"].items())
    return (
        f"{one['shape']:5s} memory {memory['planned_bytes'] / 1e6:.0f}/{memory['measured_bytes'] / 1e6:.0f} MB = {memory['ratio']} ({peaks});"
        f" time {duration['planned_seconds']}/{duration['measured_seconds']} s = {duration['ratio']} (planned/measured: {stages});"
        f" planned in {one['plan_seconds']:.1f} s"
    )


# --- one run, in its own process --------------------------------------------------------------------------------------------------------


class _Watch:
    """An observer that notes the peak of each stage as the next begins."""

    def __init__(self) -> None:
        self.began = _status_bytes("VmRSS")
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", time.monotonic()

    def stage(self, name: str, detail: str) -> None:
        if self._stage:
            self.peaks[self._stage] = _status_bytes("VmHWM") - self.began
            self.seconds[self._stage] = time.monotonic() - self._since
        self._stage, self._since = name, time.monotonic()
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the current resident size

    def progress(self, done: int, total: int, unit: str, fields: dict[str, str]) -> None: ...

    def note(self, text: str) -> None: ...


def _child() -> None:
    request = json.loads(sys.stdin.read())
    import torch

    from stillroom import Recipe, runs

    torch.set_num_threads(request["threads"])
    with tempfile.TemporaryDirectory(prefix="stillroom-plan-") as folder:
        work = Path(folder)
        runs.run(Recipe.from_tree(_random(_WARM_UP, work / "warm-up", 1)), out=work / "warm-up-run", until="trained")
        tree = _tree(request["name"], work / request["name"], request["threads"], request["scale"])
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        watch = _Watch()
        run = runs.run(Recipe.from_tree(tree), out=work / "run", until=request["until"], observer=watch)
        watch.stage("", "")
        plan = json.loads(run.plan_path.read_text())
        print(json.dumps(_found(run.directory, plan["estimate"], watch, request["until"])))


def _found(directory: Path, estimate: dict[str, Any], watch: _Watch, until: str) -> dict[str, Any]:
    seconds = {"collect": sum(json.loads(line)["seconds"] for line in (directory / "collect.jsonl").read_text().splitlines())}
    training = json.loads((directory / "training.json").read_text())
    seconds["train"] = training["seconds"]
    if training["label_only_seconds"] is not None:
        seconds["label_only"] = training["label_only_seconds"]
    if until in ("evaluated", "reported"):
        seconds["evaluate"] = json.loads((directory / "evals" / "summary.json").read_text())["seconds"]
    return {
        "planned_seconds": estimate["seconds"],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "plan_seconds": round(watch.seconds["plan"], 2),
        # Of the stages that were run: the peak of one that was not is no prediction of theirs.
        "planned_peak_bytes": max(peak for stage, peak in estimate["peak_bytes"].items() if stage in seconds),
        "peak_bytes": watch.peaks,
        "label_only_best_step": training["label_only_steps"],
        "load": os.getloadavg()[0],
    }


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


# --- what is run ------------------------------------------------------------------------------------------------------------------------


def _tree(name: str, folder: Path, threads: int, scale: float) -> dict[str, Any]:
    if name == "demo":
        return _demo(folder, threads, scale)
    shape = SHAPES[name]
    return _random(replace(shape, prompts=round(shape.prompts * scale), steps=max(2, round(shape.steps * scale))), folder, threads)


def _demo(folder: Path, threads: int, scale: float) -> dict[str, Any]:
    from stillroom import demo

    tree = demo.prepare(folder, seed=0).model_dump(mode="json")
    tree["prompts"]["limit"], tree["evaluation"]["limit"] = round(6_000 * scale), round(600 * scale)
    tree["training"].update(steps=max(2, round(300 * scale)), checkpoint_every=100)
    tree["hardware"].update(device="cpu", dtype="float32", threads=threads)
    return tree


def _random(shape: Shape, folder: Path, threads: int) -> dict[str, Any]:
    """The recipe of a shape, with everything it names. A digit is a token, in prompts and in answers."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    _teacher(shape, folder / "teacher")
    chance = 1 / shape.answer
    lengths = [next((n for n in range(1, shape.max_new_tokens) if draw.random() < chance), shape.max_new_tokens) for _ in range(256)]
    prompts = [{"prompt": f"{n:06d}".ljust(draw.randint(*shape.prompt), "7")} for n in range(shape.prompts)]
    items = [{"prompt": f"9{n:05d}", "answer": "3" * max(1, lengths[n % 256] - 1)} for n in range(shape.items)]
    layers, width, feed_forward = shape.student
    return {
        "teacher": {"model": str(folder / "teacher")},
        "terms": {"licence": "Apache-2.0"},
        "student": {"from_scratch": {"layers": layers, "width": width, "heads": width // 32, "feed_forward": feed_forward}},
        "prompts": {"path": _rows(folder / "prompts.jsonl", prompts)},
        "generation": {"max_new_tokens": shape.max_new_tokens, "sampling_temperature": 1.0},
        "targets": shape.targets,
        "training": {"steps": shape.steps, "sequences_per_step": shape.sequences_per_step, "learning_rate": 1e-3},
        "evaluation": {"path": _rows(folder / "items.jsonl", items), "fidelity_prompts": 16},
        "hardware": {"device": "cpu", "dtype": "float32", "threads": threads},
    }


def _teacher(shape: Shape, directory: Path) -> None:
    """Random weights under which every token is about as likely as any other, so that drawn answers end by chance."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    layers, width, feed_forward = shape.teacher
    config = LlamaConfig(
        vocab_size=shape.rows, hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=layers, num_attention_heads=width // 32,
        num_key_value_heads=width // 32, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=list(range(0, shape.rows, shape.answer)), pad_token_id=0)
    model.save_pretrained(directory)
    _tokenizer(shape.rows).save_pretrained(directory)


def _tokenizer(rows: int) -> Any:
    """A byte-level BPE of exactly so many tokens: an end token, the bytes, pairs of letters, and triples of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = [(a, b) for a in letters for b in letters] + [(a + b, c) for a in letters for b in letters for c in letters]
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = merges[: rows - len(tokens)]
    tokens += [a + b for a, b in merges]
    assert len(tokens) == rows, f"at most {len(tokens)} rows can be made"
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tokens[0], pad_token=tokens[0], model_max_length=512)


def _rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


if __name__ == "__main__":
    _child() if sys.argv[1:] == ["--child"] else main()
