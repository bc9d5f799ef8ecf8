"""A store of drawn targets at a large vocabulary: bytes per token, time to make and write, to read back and to open.

    .venv/bin/python benchmarks/store.py [--json]

1. Bytes: what a teacher with realistic distributions (`language_model.py`; its perplexity on text that it has not seen is printed) makes of a store,
   every file of the directory counted, per scored token.
2. Overhead: drawing, coding and writing (`LocalTeacher.targets` and `TargetStore.append_shard`, less the forward pass), over the forward pass of a random
   teacher of 12 layers and width 768 on the same tokens: its body on all tokens and its head on all scored rows, in the product's own chunks.
   What is drawn from are the realistic distributions: they are put in the place of what the head gives, and the time for that is taken off again.
3. Reading: scored rows a second through `TargetStore.batches`, over what a training step consumes (student of 4 layers and width 256, 32,000 ids).
4. Opening: `TargetStore.open` of 10^7 tokens in a fresh process.

R scored rows, V vocabulary size, N draws, B sequences, T positions.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from _common import ROOT, finish, parser
from language_model import NGrams, Text, text_here, tokens_of, trained_tokenizer

sys.path.insert(0, str(ROOT / "src"))

from stillroom.core.identities import ModelRef, Sampling, TokenSequence
from stillroom.models.loading import count_parameters, head_of
from stillroom.models.local import DRAWN_AT_ONCE, LocalTeacher, unique_draws
from stillroom.models.student import OptimiserSettings, TransformersStudent
from stillroom.objectives.divergences import forward_kl
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.objectives.tensors import as_arrays
from stillroom.targets.codecs import DrawnCodec
from stillroom.targets.kinds import DrawnTargets, TargetRequest, Targets, TextTargets
from stillroom.targets.protocols import Batch
from stillroom.targets.rows import row_count, slice_targets
from stillroom.targets.store import StoredRecord, StoreIdentity, TargetStore
from stillroom.targets.vocabulary import Vocabulary

LIMITS = {"drawn_bytes_per_token": 20.0, "capture_overhead": 0.10, "read_over_consumed": 20.0, "open_seconds": 1.0}
AT_LEAST = {"read_over_consumed"}
CAVEATS = (
    "The text is the sources and documentation of the Python packages installed where this ran (teacher.package_characters), mostly code, and so are what"
    " was trained on and what was asked about: other text and another teacher give other bytes. More ids are unique where a teacher is less sure.",
    "Of a record all tokens but the first are scored. The tokens are in the bytes too, so a store with long prompts and short answers has more per scored token.",
    "Overhead is over a forward pass in float32 on the processor named here; a faster pass (a GPU, bfloat16) leaves other shares.",
    "Files are in the page cache: this is no measurement of a disk. Reading is measured alone, not beside a training step.",
    "The store that is opened repeats the records of the first one with other first tokens. The time of its opening has no imports in it.",
)
STUDENT_IDS = 32_000


# -- the teacher's distributions -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Records of text that the teacher has not seen, and what it says about their scored rows, end to end."""

    sequences: list[TokenSequence]
    ids_RN: NDArray[numpy.int32]
    entropy_R: NDArray[numpy.float32]

    def records(self, vocabulary: str, draws: int) -> list[StoredRecord]:
        """With the first `draws` of each row's draws, which are as many independent ones."""
        offsets_R1, ids_U, counts_U = unique_draws(torch.from_numpy(self.ids_RN[:, :draws].astype(numpy.int64)))
        targets = as_arrays(
            DrawnTargets(
                vocabulary=vocabulary,
                temperature=1.0,
                draws=draws,
                offsets_R1=offsets_R1,
                ids_U=ids_U,
                counts_U=counts_U,
                entropy_R=torch.from_numpy(self.entropy_R),
            )
        )
        return list(stored(self.sequences, targets))


def stored(sequences: Sequence[TokenSequence], targets: DrawnTargets) -> Iterator[StoredRecord]:
    start = 0
    for sequence in sequences:
        stop = start + len(sequence.scored_rows)
        yield StoredRecord(sequence=sequence, targets=slice_targets(targets, start, stop))
        start = stop


def trained(arguments: argparse.Namespace) -> tuple[NGrams, Vocabulary, NDArray[numpy.int64], dict[str, Any]]:
    """The model, its vocabulary padded to the size that was asked for, the tokens that it has not seen, and what it was made of."""
    began = time.perf_counter()
    text = text_here(int(arguments.text_megabytes * 1e6), share=0.15)
    tokenizer = trained_tokenizer(text.training, arguments.vocabulary)
    size = tokenizer.get_vocab_size()
    tokens = [tokenizer.id_to_token(index).encode() for index in range(size)] + [b""] * (arguments.vocabulary - size)
    vocabulary = Vocabulary(tokens=tuple(tokens), special={"<|end|>": 0}, end_ids=(0,), rows=arguments.vocabulary)
    training_T, held_out_T = tokens_of(tokenizer, text.training), tokens_of(tokenizer, text.held_out)
    model = NGrams(training_T, arguments.vocabulary)
    facts = _facts_of(text) | {
        "vocabulary": arguments.vocabulary,
        "ids_with_a_token": size,
        "training_tokens": len(training_T),
        "held_out_tokens": len(held_out_T),
        "seconds_to_train": time.perf_counter() - began,
    }
    return model, vocabulary, held_out_T, facts


def _facts_of(text: Text) -> dict[str, Any]:
    return {
        "package_characters": text.package_characters,
        "text_sha256": text.sha256,
        "training_texts": len(text.training),
        "held_out_texts": len(text.held_out),
    }


def ask(model: NGrams, held_out_T: NDArray[numpy.int64], records: int, length: int, draws: int) -> tuple[Asked, dict[str, Any]]:
    """Records from all over the text, each without the text before it; and how sure the model is of them."""
    if len(held_out_T) < records * length:
        raise SystemExit(f"{len(held_out_T)} tokens of text are held out, {records * length} are asked for: more --text-megabytes or fewer --records")
    draw = numpy.random.default_rng(0)
    sequences, ids, entropies, nats = [], [], [], 0.0
    for start in numpy.arange(records) * (len(held_out_T) - length) // max(records - 1, 1):
        tokens_T = held_out_T[start : start + length]
        sequences.append(TokenSequence(ids=tuple(tokens_T.tolist()), answer_spans=((1, length),)))
        for row, token in zip(model.rows(tokens_T[:-1]), tokens_T[1:].tolist(), strict=True):
            ids.append(model.draws_N(row, draw.random(draws)).astype(numpy.int32))
            entropies.append(model.entropy(row))
            nats -= math.log(model.probability(row, token))
    asked = Asked(sequences=sequences, ids_RN=numpy.stack(ids), entropy_R=numpy.array(entropies, dtype=numpy.float32))
    return asked, {
        "asked_rows": len(ids),
        "perplexity": math.exp(nats / len(ids)),
        "perplexity_asked_for": [5, 60],
        "mean_entropy_nats": float(numpy.mean(entropies)),
    }


def logits_of(model: NGrams, sequences: Sequence[TokenSequence]) -> torch.Tensor:
    """Log-probabilities, float32, of the scored rows of `sequences` (R x V)."""
    logits_RV = torch.empty(sum(len(sequence.scored_rows) for sequence in sequences), model.size)
    rows = (row for sequence in sequences for row in model.rows(numpy.array(sequence.ids[:-1])))
    for place, row in enumerate(rows):
        logits_RV[place] = torch.from_numpy(numpy.log(model.whole_V(row)))
    return logits_RV


# -- 1: bytes ------------------------------------------------------------------------------------------------------------


def identity(vocabulary: Vocabulary, draws: int) -> StoreIdentity:
    teacher = ModelRef(
        source="/benchmark", kind="directory", revision=None, weights_sha256="0" * 64, architecture="ngrams", parameters=0, licence=None
    )  # fmt: skip
    return StoreIdentity(
        teacher=teacher,
        vocabulary=vocabulary.fingerprint,
        vocabulary_size=vocabulary.size,
        chat_template_sha256=None,
        codec=DrawnCodec(draws=draws),
        temperature=1.0,
        generation=Sampling(max_new_tokens=1),
    )


def sizes(asked: Asked, vocabulary: Vocabulary, draws: int, shard: int, directory: Path) -> dict[str, Any]:
    """A store with shards of `shard` records, the first of which its prior is learned from; and what it takes."""
    records = asked.records(vocabulary.fingerprint, draws)
    store = TargetStore.create_or_resume(directory, identity(vocabulary, draws))
    seconds = []
    for start in range(0, len(records), shard):
        began = time.perf_counter()
        store.append_shard(records[start : start + shard])
        seconds.append(time.perf_counter() - began)
    first_rows = sum(len(record.sequence.scored_rows) for record in records[:shard])
    first_bytes = sum(path.stat().st_size for path in (directory / "shards").glob("00000*"))
    shards_bytes = sum(path.stat().st_size for path in (directory / "shards").iterdir())
    whole_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    unique = sum(len(record.targets.ids_U) for record in records if isinstance(record.targets, DrawnTargets))
    later_rows = store.rows - first_rows
    return {
        "scored_tokens": store.rows,
        "tokens": store.tokens,
        "shards": len(seconds),
        "mean_unique_ids": unique / store.rows,
        "bytes": whole_bytes,
        "prior_bytes": (directory / "prior.npz").stat().st_size,
        "drawn_bytes_per_token": whole_bytes / store.rows,
        "bytes_per_token_of_later_shards": (shards_bytes - first_bytes) / later_rows if later_rows else None,
        "first_shard_seconds": seconds[0],
        "later_rows_per_second": later_rows / sum(seconds[1:]) if later_rows else None,
    }


# -- 2: overhead ---------------------------------------------------------------------------------------------------------


def qwen(layers: int, width: int, size: int) -> Any:
    """Random, in the proportions of Qwen3-0.6B: feed-forward three times the width, two heads of queries to one of keys, tied head."""
    heads = max(2, width // 64)
    config = transformers.Qwen3Config(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=width // heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Qwen3ForCausalLM(config).float().eval()


class Replayed:
    """What LocalTeacher takes for a model: its hidden states are the numbers of rows, and its head looks these rows' logits up."""

    def __init__(self, config: Any, sequences: Sequence[TokenSequence], logits_RV: torch.Tensor) -> None:
        self.config, self.device, self.dtype = config, torch.device("cpu"), torch.float32
        self._body, self._head = _Numbers(sequences), _Logits(logits_RV)

    def get_decoder(self) -> nn.Module:
        return self._body

    def get_output_embeddings(self) -> nn.Module:
        return self._head

    def taken_seconds(self) -> float:
        """How long body and head have taken since this was asked."""
        taken = self._body.seconds + self._head.seconds
        self._body.seconds = self._head.seconds = 0.0
        return taken


class _Numbers(nn.Module):
    def __init__(self, sequences: Sequence[TokenSequence]) -> None:
        super().__init__()
        self.seconds = 0.0
        self._first = {}
        rows = 0
        for sequence in sequences:
            self._first[sequence.ids[:-1]] = rows
            rows += len(sequence.scored_rows)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        began = time.perf_counter()
        firsts_B = torch.tensor([self._first[tuple(ids)] for ids in input_ids.tolist()])
        numbers_BT = firsts_B[:, None] + torch.arange(input_ids.shape[1])
        self.seconds += time.perf_counter() - began
        return SimpleNamespace(last_hidden_state=numbers_BT[..., None].float())


class _Logits(nn.Module):
    def __init__(self, logits_RV: torch.Tensor) -> None:
        super().__init__()
        self.seconds, self.weight = 0.0, logits_RV
        # Always the same memory: to give back what a head has asked for takes time, which is in the forward pass already.
        self._room_RV = torch.empty_like(logits_RV[: max(1, DRAWN_AT_ONCE // logits_RV.shape[1])])

    def forward(self, states_RD: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        logits_RV = torch.index_select(self.weight, 0, states_RD[:, 0].long(), out=self._room_RV[: len(states_RD)])
        self.seconds += time.perf_counter() - began
        return logits_RV


@torch.inference_mode()
def forward(teacher: LocalTeacher, sequences: Sequence[TokenSequence]) -> tuple[float, float]:
    """Seconds of the body on all tokens and of the head on all scored rows: what there would be without targets, too."""
    began = time.perf_counter()
    states_RD = teacher.hidden_states(sequences)
    between = time.perf_counter()
    for chunk_RD in states_RD.split(max(1, DRAWN_AT_ONCE // teacher.vocabulary.size)):
        head_of(teacher.model)(chunk_RD)
    return between - began, time.perf_counter() - between


def overhead(model: NGrams, asked: Asked, vocabulary: Vocabulary, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of drawing and writing some records, the last, and of a forward pass. The prior is that of a shard of the first ones."""
    sequences = asked.sequences[-arguments.step_records :]
    learned = TargetStore.create_or_resume(folder / "learned", identity(vocabulary, arguments.draws))
    learned.append_shard(asked.records(vocabulary.fingerprint, arguments.draws)[: arguments.shard_records])
    network = qwen(arguments.teacher_layers, arguments.teacher_width, vocabulary.size)
    reference = ModelRef(source="", kind="from_scratch", revision=None, weights_sha256=None, architecture="", parameters=0, licence=None)
    replayed = Replayed(network.config, sequences, logits_of(model, sequences))
    teacher = LocalTeacher(network, reference, vocabulary)
    drawing = LocalTeacher(replayed, reference, vocabulary)  # type: ignore[arg-type]
    request = TargetRequest(kind="drawn", draws=arguments.draws)
    seconds: dict[str, list[float]] = {"body": [], "head": [], "draw": [], "write": []}
    for turn in range(arguments.repeats + 1):
        gc.collect()
        body, head = forward(teacher, sequences)
        replayed.taken_seconds()
        began = time.perf_counter()
        targets = as_arrays(drawing.targets(sequences, request))
        draw = time.perf_counter() - began - replayed.taken_seconds()
        assert isinstance(targets, DrawnTargets)
        took = {"body": body, "head": head, "draw": draw, "write": _write_seconds(learned, stored(sequences, targets), folder / "copy")}
        # The first turn warms up.
        for name, one in took.items() if turn else ():
            seconds[name].append(one)
    forward_seconds = [body + head for body, head in zip(seconds["body"], seconds["head"], strict=True)]
    medians = {name: statistics.median(some) for name, some in (seconds | {"forward": forward_seconds}).items()}
    return {
        "scored_tokens": sum(len(sequence.scored_rows) for sequence in sequences),
        "teacher_parameters": count_parameters(network),
        "forward_is": "body on all tokens, head (all ids) on all scored rows, float32",
        "seconds": seconds,
        "median_seconds": medians,
        "capture_overhead": (medians["draw"] + medians["write"]) / medians["forward"],
    }


def _write_seconds(learned: TargetStore, records: Iterator[StoredRecord], copied: Path) -> float:
    """Of appending records to a copy of a store, so that every time is the first."""
    shutil.copytree(learned.directory, copied)
    store = TargetStore.open(copied)
    assert store.prior is not None, "read before the clock starts, as a store that is being written has it"
    began = time.perf_counter()
    added = store.append_shard(records)
    took = time.perf_counter() - began
    assert added, "the records were not there yet"
    shutil.rmtree(copied)
    return took


# -- 3: reading ----------------------------------------------------------------------------------------------------------


def reading(store: TargetStore, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows a second read in batches of one step's records, ahead and each when it is asked for, and what a step consumes."""
    ids = numpy.array(store.record_ids)
    numpy.random.default_rng(0).shuffle(ids)
    student, batch = training_step(store, arguments)
    objective = Objective(terms=(WeightedTerm(divergence=forward_kl()),))
    batches = [ids[start : start + arguments.step_records].tolist() for start in range(0, len(ids), arguments.step_records)]
    rates: dict[str, list[float]] = {"read": [], "read_alone": [], "consumed": []}
    for turn in range(arguments.repeats + 1):
        began = time.perf_counter()
        student.forward_backward(batch, objective, divide_by=batch.scored_tokens)
        student.optim_step(1e-3)
        took = {"consumed": batch.scored_tokens / (time.perf_counter() - began)}
        took["read"] = _rows_per_second(store.batches(batches))
        took["read_alone"] = _rows_per_second(map(store.read, batches))
        for name, rate in took.items() if turn else ():
            rates[name].append(rate)
    medians = {name: statistics.median(some) for name, some in rates.items()}
    return {
        "rows_per_batch": batch.scored_tokens,
        "read_is": "TargetStore.batches, records in random order; read_alone: TargetStore.read of one batch after the other",
        "student_parameters": count_parameters(student.model),
        "step_is": f"forward and backward of forward KL to drawn targets over {STUDENT_IDS} ids, clipping and AdamW, float32",
        "rows_per_second": rates,
        "median_rows_per_second": medians,
        "read_over_consumed": medians["read"] / medians["consumed"],
    }


def _rows_per_second(stream: Iterable[tuple[list[TokenSequence], Targets]]) -> float:
    gc.collect()
    began = time.perf_counter()
    rows = sum(row_count(targets) for _, targets in stream)
    return rows / (time.perf_counter() - began)


def training_step(store: TargetStore, arguments: argparse.Namespace) -> tuple[TransformersStudent, Batch]:
    """A student of fewer ids, and records of the store whose ids are brought among these."""
    tokens = tuple(str(index).encode() for index in range(STUDENT_IDS))
    vocabulary = Vocabulary(tokens=tokens, special={}, end_ids=(0,), rows=STUDENT_IDS)
    student = TransformersStudent(qwen(arguments.student_layers, arguments.student_width, STUDENT_IDS), vocabulary, OptimiserSettings())
    sequences, targets = store.read(store.record_ids[: arguments.step_records])
    assert isinstance(targets, DrawnTargets)
    sequences = [replace(sequence, ids=tuple(token % STUDENT_IDS for token in sequence.ids)) for sequence in sequences]
    labels = [sequence.ids[row + 1] for sequence in sequences for row in sequence.scored_rows]
    return student, Batch(
        sequences=tuple(sequences),
        targets=fewer_ids(targets, STUDENT_IDS, vocabulary.fingerprint),
        labels=TextTargets(vocabulary=vocabulary.fingerprint, token_ids_R=torch.tensor(labels)),
    )


def fewer_ids(targets: DrawnTargets, size: int, vocabulary: str) -> DrawnTargets:
    """The same draws with every id modulo `size`."""
    rows = len(targets.entropy_R)
    row_U = numpy.repeat(numpy.arange(rows), numpy.diff(targets.offsets_R1))
    keys, entry_U = numpy.unique(row_U * size + targets.ids_U % size, return_inverse=True)
    return replace(
        targets,
        vocabulary=vocabulary,
        offsets_R1=numpy.append(0, numpy.cumsum(numpy.bincount(keys // size, minlength=rows))),
        ids_U=(keys % size).astype(numpy.int32),
        counts_U=numpy.bincount(entry_U, targets.counts_U).astype(numpy.int32),
    )


# -- 4: opening ----------------------------------------------------------------------------------------------------------


_OPEN = """
import json, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from stillroom.targets.store import TargetStore
began = time.perf_counter()
store = TargetStore.open(pathlib.Path(sys.argv[2]))
print(json.dumps([time.perf_counter() - began, store.tokens, len(store)]))
"""


def opening(asked: Asked, vocabulary: Vocabulary, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Seconds to open a store of `open_tokens` tokens."""
    records = asked.records(vocabulary.fingerprint, arguments.draws)
    store = TargetStore.create_or_resume(directory, identity(vocabulary, arguments.draws))
    began, added = time.perf_counter(), 0
    while store.tokens < arguments.open_tokens:
        # Another first token makes another record. It is not scored; the row after it has a context that does not fit its targets.
        fresh = [_with_first(records[place % len(records)], place // len(records)) for place in range(added, added + arguments.shard_records)]
        added += store.append_shard(fresh)
    built = time.perf_counter() - began
    seconds = []
    for _ in range(arguments.repeats):
        command = [sys.executable, "-c", _OPEN, str(ROOT / "src"), str(directory)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        assert found[1:] == [store.tokens, added], f"opened {found[1:]} tokens and records of {store.tokens} and {added}"
        seconds.append(found[0])
    return {
        "tokens": store.tokens,
        "records": len(store),
        "shards": len(store.shard_record_ids),
        "bytes": store.bytes,
        "seconds_to_build": built,
        "seconds": seconds,
        "open_seconds": statistics.median(seconds),
    }


def _with_first(record: StoredRecord, token: int) -> StoredRecord:
    return replace(record, sequence=replace(record.sequence, ids=(token, *record.sequence.ids[1:])))


# -- the program --------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    arguments = arguments_of(argv)
    data = measure(arguments)
    if not arguments.json:
        for name, found in data["limits"].items():
            print(f"{name}: {found['value']:.4g}, {'at least' if name in AT_LEAST else 'at most'} {found['limit']:g}: {found['holds']}")
    finish("store", data, caveats=CAVEATS, as_json=arguments.json)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--vocabulary", type=int, default=151_936)
    options.add_argument("--text-megabytes", type=float, default=90.0)
    options.add_argument("--draws", type=int, default=50, help="N of the numbers that have a limit")
    options.add_argument("--other-draws", type=int, nargs="*", default=[25, 100], help="N of which the bytes are printed, too")
    options.add_argument("--records", type=int, default=768, help="in the store")
    options.add_argument("--record-tokens", type=int, default=256)
    options.add_argument("--shard-records", type=int, default=256)
    options.add_argument("--step-records", type=int, default=8, help="of a forward pass of the teacher and of a training step")
    options.add_argument("--teacher-layers", type=int, default=12)
    options.add_argument("--teacher-width", type=int, default=768)
    options.add_argument("--student-layers", type=int, default=4)
    options.add_argument("--student-width", type=int, default=256)
    options.add_argument("--open-tokens", type=int, default=10_000_000)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = options.parse_args(argv)
    if arguments.records < arguments.shard_records + arguments.step_records:
        options.error("--records is at least --shard-records and --step-records together: the prior is to be that of another shard")
    return arguments


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All four."""
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    model, vocabulary, held_out_T, facts = trained(arguments)
    draws = sorted({arguments.draws, *arguments.other_draws})
    asked, sureness = ask(model, held_out_T, arguments.records, arguments.record_tokens, draws[-1])
    with tempfile.TemporaryDirectory(prefix="stillroom-bench-") as temporary:
        folder = Path(temporary)
        bytes_by_draws = {number: sizes(asked, vocabulary, number, arguments.shard_records, folder / f"drawn-{number}") for number in draws}
        capturing = overhead(model, asked, vocabulary, arguments, folder)
        del model
        readable = reading(TargetStore.open(folder / f"drawn-{arguments.draws}"), arguments)
        opened = opening(asked, vocabulary, arguments, folder / "large")
    found = {
        "drawn_bytes_per_token": bytes_by_draws[arguments.draws]["drawn_bytes_per_token"],
        "capture_overhead": capturing["capture_overhead"],
        "read_over_consumed": readable["read_over_consumed"],
        "open_seconds": opened["open_seconds"],
    }
    return {
        "limits": {
            name: {"value": value, "limit": LIMITS[name], "holds": value >= LIMITS[name] if name in AT_LEAST else value <= LIMITS[name]}
            for name, value in found.items()
        },
        "settings": {name: value for name, value in vars(arguments).items() if name != "json"},
        "teacher": facts | sureness | {"mean_unique_ids": bytes_by_draws[arguments.draws]["mean_unique_ids"]},
        "bytes": {str(number): one for number, one in bytes_by_draws.items()},
        "overhead": capturing,
        "reading": readable,
        "opening": opened,
        "seconds_in_all": time.perf_counter() - began,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main()
