"""One training step on a CPU: teacher forward, student forward and backward, heads and divergence, against TRL's GKD step and against the parts alone.

    .venv/bin/python benchmarks/train_step.py [--json]

A Qwen3-shaped teacher (12 layers, width 768) and student (4 layers, width 256) of random weights, V = 32,000, 8 sequences of 257 tokens: 2,048 scored rows.
A step goes from tokens to gradients; the optimiser, which is the same AdamW for both, is left out of it. In turns on the same tokens and weights:

- trl: `GKDTrainer.compute_loss` of TRL and its backward (off-policy, the mode in which it is given the answers);
- ours: `TransformersStudent.forward_backward` on what a live `LocalTeacher` says in float32; `bf16_teacher`, the same with a teacher that computes in
  bfloat16; `stored`, from a `TargetStore` of drawn targets (N = 50), reading included, for which no teacher runs;
- parts: the teacher's body, the student's body and back, and the four products of the heads by `torch.mm` into outputs that are there, each alone.

Then once more with half of the rows scored, and with sequences of uneven lengths (log-normal, median 100, at most 256), padded and end to end. Peak
memory is how far VmHWM grows in a fresh process. Runs in the environment of `peers.py`, which it makes if it has to.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from _common import ROOT, finish, parser
from peers import ENVIRONMENT

sys.path.insert(0, str(ROOT / "src"))

from stillroom.core.identities import ModelRef, Sampling, TokenSequence
from stillroom.models.loading import body_of
from stillroom.models.local import LocalTeacher, text_targets
from stillroom.models.packing import pack
from stillroom.models.student import OptimiserSettings, TransformersStudent
from stillroom.objectives.divergences import Divergence, forward_kl, generalized_jsd
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.objectives.tensors import as_arrays
from stillroom.targets.codecs import DrawnCodec
from stillroom.targets.kinds import TargetRequest, Targets
from stillroom.targets.protocols import Batch
from stillroom.targets.rows import slice_targets
from stillroom.targets.store import StoredRecord, StoreIdentity, TargetStore, record_id
from stillroom.targets.vocabulary import Vocabulary

DIVERGENCES: dict[str, tuple[Divergence, float]] = {"forward_kl": (forward_kl(), 0.0), "jsd": (generalized_jsd(0.5), 0.5)}
DRAWS = 50
MEDIAN_LENGTH, SPREAD, LONGEST = 100, 0.6, 256
CAVEATS = (
    "Weights are random and of the spread that training starts from; no arithmetic here depends on the values, but memory and cache do on sizes.",
    "The optimiser's step is in none of the figures: it is the same for all.",
    "TRL computes logits of the last token of each sequence too, which predicts nothing: 1 of 257.",
    "One machine and one set of sizes; other work on the machine hits all contenders, taken in turns, but not alike.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Layers and widths of both models, the vocabulary, and sequences by scored rows of each."""

    teacher: tuple[int, int] = (12, 768)
    student: tuple[int, int] = (4, 256)
    size: int = 32_000
    sequences: int = 8
    rows: int = 256


def model_of(layers: int, width: int, size: int, seed: int) -> PreTrainedModel:
    """Qwen3-shaped, heads of 64, feed-forward layers of three times the width."""
    heads = max(1, width // 64)
    config = Qwen3Config(
        vocab_size=size, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=width // heads, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():  # or all distributions would be even
        model.lm_head.weight.normal_(std=2.5 * width**-0.5, generator=torch.Generator().manual_seed(seed))
    return model


def sequence_of(tokens: int, scored: int, size: int, draw: numpy.random.Generator) -> TokenSequence:
    """Random tokens, of which the last so many are the answer."""
    return TokenSequence(ids=tuple(draw.integers(0, size, tokens).tolist()), answer_spans=((tokens - scored, tokens),))


class Bench:
    """Models, tokens and the contenders over them."""

    def __init__(self, sizes: Sizes, *, scored: float = 1.0) -> None:
        draw = numpy.random.Generator(numpy.random.Philox(0))
        self.sizes = sizes
        self.vocabulary = Vocabulary(tokens=tuple(f"<{index}>".encode() for index in range(sizes.size)), special={}, end_ids=(), rows=sizes.size)
        self.sequences = [sequence_of(sizes.rows + 1, round(scored * sizes.rows), sizes.size, draw) for _ in range(sizes.sequences)]
        self.ids_BT = torch.tensor([sequence.ids for sequence in self.sequences])
        self.teacher_model = model_of(*sizes.teacher, sizes.size, 1)
        self.student = TransformersStudent(model_of(*sizes.student, sizes.size, 2), self.vocabulary, OptimiserSettings())

    # -- ours

    @property
    def teacher(self) -> LocalTeacher:
        return self._teacher_in(self.teacher_model)

    @cached_property
    def half_teacher(self) -> LocalTeacher:
        """The same weights in bfloat16."""
        model = model_of(*self.sizes.teacher, self.sizes.size, 1).to(torch.bfloat16)
        return self._teacher_in(model)

    def _teacher_in(self, model: PreTrainedModel) -> LocalTeacher:
        ref = ModelRef(source="random", kind="directory", revision=None, weights_sha256="0" * 64, architecture="Qwen3", parameters=1, licence=None)
        return LocalTeacher(model, ref, self.vocabulary)

    def live(self, divergence: Divergence, teacher: LocalTeacher) -> float:
        state_dtype = "float32" if teacher.model.dtype == torch.float32 else "bfloat16"
        targets = teacher.targets(self.sequences, TargetRequest(kind="hidden", state_dtype=state_dtype))
        return self.learn(self.sequences, targets, divergence)

    def learn(self, sequences: Sequence[TokenSequence], targets: Targets, divergence: Divergence) -> float:
        """Nats per scored token; gradients are left in the student."""
        batch = Batch(sequences=tuple(sequences), targets=targets, labels=text_targets(sequences, self.vocabulary))
        objective = Objective(terms=(WeightedTerm(divergence=divergence),))
        return self.student.forward_backward(batch, objective, batch.scored_tokens).objective_nats / batch.scored_tokens

    def store(self, directory: Path) -> TargetStore:
        """The same sequences with ids drawn from the teacher."""
        codec = DrawnCodec(draws=DRAWS)
        identity = StoreIdentity(
            teacher=self.teacher.ref,
            vocabulary=self.vocabulary.fingerprint,
            vocabulary_size=self.vocabulary.size,
            chat_template_sha256=None,
            codec=codec,
            temperature=1.0,
            generation=Sampling(max_new_tokens=1),
        )
        store = TargetStore.create_or_resume(directory, identity)
        targets = as_arrays(self.teacher.targets(self.sequences, TargetRequest(kind="drawn", draws=DRAWS)))
        rows, records = 0, []
        for sequence in self.sequences:
            stop = rows + len(sequence.scored_rows)
            records.append(StoredRecord(sequence=sequence, targets=slice_targets(targets, rows, stop)))
            rows = stop
        store.append_shard(records)
        return store

    def stored(self, store: TargetStore, divergence: Divergence) -> float:
        sequences, targets = store.read([record_id(sequence) for sequence in self.sequences])
        return self.learn(sequences, targets, divergence)

    # -- TRL's

    def trl(self, beta: float) -> float:
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

        ids_BT, labels_BT = self.ids_BT, torch.full_like(self.ids_BT, -100)
        for index, sequence in enumerate(self.sequences):
            for start, stop in sequence.answer_spans:
                labels_BT[index, start:stop] = ids_BT[index, start:stop]
        trainer = SimpleNamespace(teacher_model=self.teacher_model, beta=beta, generalized_jsd_loss=GKDTrainer.generalized_jsd_loss)
        inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": labels_BT}
        loss = GKDTrainer.compute_loss(trainer, self.student.model, inputs)
        loss.backward()
        return float(loss.detach())

    # -- the parts

    @torch.inference_mode()
    def teacher_body(self) -> None:
        body_of(self.teacher_model)(input_ids=self.ids_BT, use_cache=False)

    def student_body(self) -> None:
        states_BTD = body_of(self.student.model)(input_ids=self.ids_BT, use_cache=False).last_hidden_state
        states_BTD.backward(torch.ones_like(states_BTD))

    @cached_property
    def _products(self) -> SimpleNamespace:
        rows = sum(len(sequence.scored_rows) for sequence in self.sequences)
        weight_VD, weight_VE = self.student.model.lm_head.weight.detach(), self.teacher_model.lm_head.weight.detach()
        return SimpleNamespace(
            weight_VD=weight_VD,
            weight_VE=weight_VE,
            states_RD=torch.randn(rows, weight_VD.shape[1]),
            states_RE=torch.randn(rows, weight_VE.shape[1]),
            student_RV=torch.zeros(rows, len(weight_VD)),
            teacher_RV=torch.zeros(rows, len(weight_VD)),
            gradient_VD=torch.zeros_like(weight_VD),
            gradient_RD=torch.zeros(rows, weight_VD.shape[1]),
        )

    @torch.no_grad()
    def heads(self) -> None:
        made = self._products
        torch.mm(made.states_RE, made.weight_VE.T, out=made.teacher_RV)
        torch.mm(made.states_RD, made.weight_VD.T, out=made.student_RV)
        torch.mm(made.student_RV.T, made.states_RD, out=made.gradient_VD)
        torch.mm(made.student_RV, made.weight_VD, out=made.gradient_RD)


# -- measuring ----------------------------------------------------------------------------------------------------------


def in_turns(bench: Bench, contenders: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each, the first turn left out, and what each returned."""
    seconds: dict[str, list[float]] = {who: [] for who in contenders}
    found: dict[str, Any] = {}
    for turn in range(repeats + 1):
        for who, run in contenders.items():
            bench.student.drop_gradient()
            gc.collect()
            began = time.perf_counter()
            found[who] = run()
            if turn:
                seconds[who].append(time.perf_counter() - began)
    return seconds, found


def measure_steps(sizes: Sizes, repeats: int, *, scored: float) -> dict[str, Any]:
    """All contenders on one batch."""
    bench = Bench(sizes, scored=scored)
    with tempfile.TemporaryDirectory() as folder:
        store = bench.store(Path(folder) / "store")
        contenders: dict[str, Callable[[], Any]] = {
            "teacher_body": bench.teacher_body,
            "student_body": bench.student_body,
            "heads": bench.heads,
            "bf16_teacher": lambda: bench.live(DIVERGENCES["forward_kl"][0], bench.half_teacher),
            "stored": lambda: bench.stored(store, DIVERGENCES["forward_kl"][0]),
        }
        for name, (divergence, beta) in DIVERGENCES.items():
            contenders[name] = lambda divergence=divergence: bench.live(divergence, bench.teacher)
            contenders[f"trl_{name}"] = lambda beta=beta: bench.trl(beta)
        seconds, found = in_turns(bench, contenders, repeats)
    medians = {who: statistics.median(taken) for who, taken in seconds.items()}
    parts = {name: medians[name] for name in ("teacher_body", "student_body", "heads")}
    trl, jsd = medians["trl_forward_kl"], medians["trl_jsd"]
    return {
        "scored_rows": sum(len(sequence.scored_rows) for sequence in bench.sequences),
        "seconds": seconds,
        "median_seconds": medians,
        "parts_of_the_step": parts | {"divergence_and_the_rest": medians["forward_kl"] - sum(parts.values()), "step": medians["forward_kl"]},
        "ratio_to_parts": medians["forward_kl"] / sum(parts.values()),
        "speedup_over_trl_gkd": trl / medians["forward_kl"],
        "jsd_speedup_over_trl_gkd": jsd / medians["jsd"],
        "bf16_teacher_speedup_over_trl_gkd": trl / medians["bf16_teacher"],
        "stored_speedup_over_trl_gkd": trl / medians["stored"],
        "nats_per_token": {who: found[who] for who in ("forward_kl", "trl_forward_kl", "jsd", "trl_jsd", "bf16_teacher", "stored")},
        "relative_loss_difference": {
            "forward_kl": abs(found["forward_kl"] / found["trl_forward_kl"] - 1),
            "jsd": abs(found["jsd"] / found["trl_jsd"] - 1),
            "bf16_teacher": abs(found["bf16_teacher"] / found["forward_kl"] - 1),
        },
    }


def measure_uneven(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Sequences of uneven lengths, in the order in which they come, padded and end to end; teacher and student alike."""
    bench = Bench(sizes)
    draw = numpy.random.Generator(numpy.random.Philox(1))
    lengths = numpy.minimum(LONGEST, numpy.exp(numpy.log(MEDIAN_LENGTH) + SPREAD * draw.standard_normal(4 * sizes.sequences))).astype(int).clip(2)
    longest = sizes.rows / LONGEST  # smaller sizes are for trying this program
    bench.sequences = [sequence_of(n, n - 1, sizes.size, draw) for n in numpy.maximum(2, lengths * longest).astype(int).tolist()]
    packed = Bench(sizes)
    packed.sequences = bench.sequences
    for model in (packed.teacher_model, packed.student.model):
        why = pack(model)
        assert why is None, why
    contenders: dict[str, Callable[[], Any]] = {
        "padded": lambda: bench.live(forward_kl(), bench.teacher),
        "packed": lambda: packed.live(forward_kl(), packed.teacher),
    }
    seconds: dict[str, list[float]] = {who: [] for who in contenders}
    found: dict[str, float] = {}
    for turn in range(repeats + 1):
        for who, one in (("padded", bench), ("packed", packed)):
            one.student.drop_gradient()
            gc.collect()
            began = time.perf_counter()
            found[who] = contenders[who]()
            if turn:
                seconds[who].append(time.perf_counter() - began)
    tokens = [len(sequence.ids) for sequence in bench.sequences]
    return {
        "sequences": len(tokens),
        "tokens": sum(tokens),
        "tokens_padded": len(tokens) * max(tokens),
        "seconds": seconds,
        "packed_speedup_over_padded": statistics.median(seconds["padded"]) / statistics.median(seconds["packed"]),
        "relative_loss_difference": abs(found["packed"] / found["padded"] - 1),
    }


def peak_bytes(who: str, sizes: Sizes) -> int:
    """In this process, which must be fresh: by how much a step raises VmHWM. A small one first brings the code into memory."""
    for some in (Sizes(teacher=(1, 64), student=(1, 64), size=256, sequences=2, rows=8), sizes):
        bench = Bench(some)
        run = (lambda b=bench: b.trl(0.0)) if who == "trl" else (lambda b=bench: b.live(forward_kl(), b.teacher))
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status_bytes("VmRSS")
        run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


# -- the program --------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--small", action="store_true", help="sizes at which the program itself can be tried in seconds")
    options.add_argument("--peak", choices=["ours", "trl"], help="print the peak memory of one in this process, and nothing else")
    arguments = options.parse_args(argv)
    if Path(sys.prefix).resolve() != ENVIRONMENT.resolve():
        _in_the_peers_environment(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(arguments.threads)
    sizes = Sizes(teacher=(2, 128), student=(1, 64), size=2_000, sequences=4, rows=32) if arguments.small else Sizes()
    if arguments.peak:
        print(json.dumps({"peak_bytes": peak_bytes(arguments.peak, sizes)}))
        return
    data = {
        "settings": {
            "sizes": {name: getattr(sizes, name) for name in Sizes.__dataclass_fields__},
            "repeats": arguments.repeats,
            "threads": arguments.threads,
        },
        "all_rows": measure_steps(sizes, arguments.repeats, scored=1.0),
        "half_of_the_rows": measure_steps(sizes, arguments.repeats, scored=0.5),
        "uneven": measure_uneven(sizes, arguments.repeats),
        "peak_bytes": {who: _peak(who, arguments) for who in ("ours", "trl")},
    }
    if not arguments.json:
        for name in ("all_rows", "half_of_the_rows", "uneven"):
            print(name, json.dumps({key: value for key, value in data[name].items() if key != "seconds"}, indent=1))
    finish("train_step_tried" if arguments.small else "train_step", data, caveats=CAVEATS, as_json=arguments.json)


def _peak(who: str, arguments: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--peak", who, "--threads", str(arguments.threads), *(["--small"] if arguments.small else [])]
    return int(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)["peak_bytes"])


def _in_the_peers_environment(argv: Sequence[str]) -> None:
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "peers.py")], check=True, stdout=sys.stderr)
    os.execv(python, [str(python), __file__, *argv])


if __name__ == "__main__":
    main()
