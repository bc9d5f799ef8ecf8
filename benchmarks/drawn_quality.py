"""How good a student is that learns from N ids drawn for each row, beside one that learns from the whole distribution.

What the issue of the heart asks of it: on the demo pair over 3 seeds, with the same batches, the student's held-out forward KL as a ratio to that of dense
training, upper 95 % bound <= 1.05.

Dense training reads the hidden states that the demo stores. Drawn training reads a store of the same records with N draws a row. Everything else is one
thing: prompts, the teacher's greedy answers, initial weights, order, steps, forward KL, the loop. A seed decides the initial weights, the order, which records
validate, and the draws; prompts and answers are the same for all seeds. Held-out forward KL is over the whole vocabulary, on the teacher's own answers to
expressions that no model was trained on.

With `--work` everything is kept there and what is finished is not done again; several processes may share it once the answers are there, each with seeds of its
own and `--part`. A small one: --prompts 600 --steps 40 --held-out 200 --seeds 0 1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch

from _common import finish, parser
from stillroom import Recipe, demo, runs
from stillroom.core import durable
from stillroom.core.identities import TokenSequence
from stillroom.core.interrupts import StopRequest
from stillroom.core.seeds import derive_seed
from stillroom.core.statistics import Interval, paired_statistic_interval
from stillroom.data import Prompt, TransferSet
from stillroom.evals.fidelity import FidelitySums, RowLogits, measure_fidelity
from stillroom.models.loading import silence
from stillroom.models.local import LocalTeacher
from stillroom.models.student import OptimiserSettings, TransformersStudent
from stillroom.objectives.tensors import as_arrays
from stillroom.runs.collecting import sampling_of, store_identity
from stillroom.runs.loop import Loop, LoopSettings
from stillroom.runs.observer import Silent
from stillroom.runs.planning import Prepared, prepare
from stillroom.runs.sources import StoredSource
from stillroom.runs.stages import teacher_of
from stillroom.runs.training import split, untrained_student
from stillroom.targets.codecs import DrawnCodec
from stillroom.targets.kinds import DrawnTargets, TargetRequest
from stillroom.targets.rows import slice_targets
from stillroom.targets.store import StoredRecord, TargetStore, record_id

CAVEATS = (
    "One pair: 512 ids, and a teacher that is nearly certain of most tokens (see `teacher_entropy_nats` and `mean_unique_ids`). Of a teacher that is less "
    "certain, whose draws differ more from its distribution, this says nothing.",
    "`pooled_ratio` and its interval are of these very students: only the held-out sequences are resampled. What another seed would give is in `over_seeds`.",
    "Training ends elsewhere for any rounding: `control`, where there is one, is dense training with half the micro-batch, as a ratio to dense training. A "
    "difference of drawn and dense training that is not beyond that of control and dense shows nothing.",
)
LIMIT = 1.05
RESAMPLES = 10_000
_PART = 2048
# Student's t, 97.5th percentile, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_DENSE, _CONTROL = "dense", "control"


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--draws", type=int, nargs="+", default=[50], help="N; several are compared with one dense training")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--prompts", type=int, default=demo.PROMPTS, help="of the demo's prompts, how many")
    arguments.add_argument("--steps", type=int, help="of training; by default the demo's")
    arguments.add_argument("--held-out", type=int, default=10_000, help="held-out expressions to draw; equal ones count once")
    arguments.add_argument("--control", action="store_true", help="also train densely with half the micro-batch: the same but for rounding")
    arguments.add_argument("--work", type=Path, help="where to keep everything; by default it is removed")
    arguments.add_argument("--part", action="store_true", help="train and measure into --work, and write no result")
    given = arguments.parse_args()
    if given.part and given.work is None:
        arguments.error("--part needs --work")
    with tempfile.TemporaryDirectory(prefix="stillroom-bench-") as temporary:
        study = Study.begin(given.work or Path(temporary), given)
        arms = [_DENSE, *([_CONTROL] if given.control else []), *(f"drawn-{draws}" for draws in given.draws)]
        sums = {arm: [study.measured(seed, arm) for seed in given.seeds] for arm in arms}
        if given.part:
            return
        data = {"study": study.described(given), "dense": _described(given.seeds, sums[_DENSE])}
        for arm in arms[1:]:
            data[arm] = _compared(given.seeds, sums[arm], sums[_DENSE])
            if arm != _CONTROL:
                data[arm]["store"] = [study.store_facts(seed, arm) for seed in given.seeds]
    finish("drawn_quality", data, caveats=CAVEATS, as_json=given.json)


@dataclass(frozen=True)
class Study:
    """What all trainings have in common: the teacher, its answers, their dense targets, and held-out sequences."""

    work: Path
    recipe: Recipe
    teacher: LocalTeacher
    store: TargetStore
    records: tuple[str, ...]
    held_out: list[TokenSequence]

    @classmethod
    def begin(cls, work: Path, given: argparse.Namespace) -> Study:
        """Prompts, answers and dense targets as the demo's run makes them for seed 0; then the held-out answers."""
        threads = torch.get_num_threads()
        demo.prepare(work, 0)
        recipe = _recipe(work, given)
        run = runs.run(recipe, out=work / "run", until="collected")
        torch.set_num_threads(threads)  # the run took what its plan says
        torch.use_deterministic_algorithms(True, warn_only=True)
        with silence():
            prepared = prepare(recipe)
            teacher = teacher_of(prepared)
        store = TargetStore.open(run.store_path, store_identity(prepared))
        held_out = _held_out(work / f"held-out-{given.held_out}.json", prepared, teacher, given.held_out)
        return cls(work, recipe, teacher, store, TransferSet.load(run.transfer_set_path).ids, held_out)

    def measured(self, seed: int, arm: str) -> FidelitySums:
        """The student of this seed and kind of targets on the held-out sequences, trained if it is not there yet."""
        directory = self.work / f"seed-{seed}" / arm
        path = directory / f"held-out-{len(self.held_out)}.json"
        if not path.exists():
            prepared = prepare(Recipe.model_validate(self.recipe.model_dump() | {"seed": seed}))
            student = self._trained(prepared, arm, directory)
            durable.write_bytes_atomic(path, measure_fidelity(_rows(self.teacher), _rows(student), self.held_out).model_dump_json().encode())
        return FidelitySums.model_validate_json(path.read_text(encoding="utf-8"))

    def _trained(self, prepared: Prepared, arm: str, directory: Path) -> LocalTeacher:
        """As runs.training trains the student of this recipe, from the records' targets of this arm."""
        training, seed, vocabulary = prepared.recipe.training, prepared.recipe.seed, prepared.student.vocabulary
        student = TransformersStudent(
            untrained_student(prepared, self.teacher),
            vocabulary,
            OptimiserSettings(weight_decay=training.weight_decay, betas=training.adam_betas, clip_norm=training.clip_norm),
            dtype=prepared.dtype,
            rows_per_chunk=training.rows_per_chunk,
        )
        records, validation = split(self.records, training.validation_fraction, derive_seed(seed, "validation"))
        settings = LoopSettings(
            steps=prepared.plan.steps,
            sequences_per_step=training.sequences_per_step,
            micro_batch=prepared.plan.hardware.micro_batch // (2 if arm == _CONTROL else 1),
            learning_rate=training.learning_rate,
            schedule=training.schedule,
            warmup_steps=min(training.warmup_steps, prepared.plan.steps),
            validate_every=training.validate_every,
            checkpoint_every=training.checkpoint_every,
            seed=seed,
            length_window=training.length_window,
        )
        store = self._drawn_store(seed, arm) if arm.startswith("drawn") else self.store
        source = StoredSource(store, vocabulary)
        with StopRequest("To resume, run the same command again.") as stop:
            Loop(student, prepared.objective, source, records, validation, settings, directory, observer=Silent(), stop=stop).run()
        return replace(self.teacher, model=student.model)

    def _drawn_store(self, seed: int, arm: str) -> TargetStore:
        """N ids for each row of the same records, drawn by the seed; what is there already is not drawn again."""
        codec = DrawnCodec(draws=int(arm.partition("-")[2]), seed=derive_seed(seed, "draws"))
        store = TargetStore.create_or_resume(self.work / f"seed-{seed}" / f"{arm}-targets", replace(self.store.identity, codec=codec))
        request = TargetRequest(kind="drawn", draws=codec.draws, seed=codec.seed, temperature=self.store.identity.temperature)
        missing = [record for record in self.records if record not in store]
        for at in range(0, len(missing), _PART):
            sequences = self.store.sequences(missing[at : at + _PART])
            targets = as_arrays(self.teacher.targets(sequences, request))
            records, start = [], 0
            for sequence in sequences:
                stop = start + len(sequence.scored_rows)
                records.append(StoredRecord(sequence=sequence, targets=slice_targets(targets, start, stop)))
                start = stop
            store.append_shard(records)
        return store

    def store_facts(self, seed: int, arm: str) -> dict[str, Any]:
        store = self._drawn_store(seed, arm)
        _, targets = store.read(self.records)
        assert isinstance(targets, DrawnTargets)
        return {
            "seed": seed,
            "bytes_per_row": store.bytes_per_row,
            "mean_unique_ids": len(targets.ids_U) / store.rows,
            "teacher_entropy_nats": float(numpy.mean(targets.entropy_R)),
        }

    def described(self, given: argparse.Namespace) -> dict[str, Any]:
        training = self.recipe.training
        return {
            "prompts": given.prompts,
            "records": len(self.records),
            "rows": self.store.rows,
            "held_out_sequences": len(self.held_out),
            "held_out_rows": sum(len(sequence.scored_rows) for sequence in self.held_out),
            "steps": training.steps,
            "demo_steps": demo.recipe(self.work / "inputs", 0).training.steps,
            "sequences_per_step": training.sequences_per_step,
            "dense_targets": f"hidden, {self.store.identity.codec}",
            "objective": "forward_kl",
            "torch_threads": torch.get_num_threads(),
            "limit": LIMIT,
            "interval": f"95 % percentile bootstrap, {RESAMPLES} draws of whole held-out sequences, the same for both students: a ratio of sums",
            "pooled_ratio": "the ratio of what all seeds' students sum to on each sequence; `holds` compares the upper end of its interval with the limit",
            "over_seeds": "mean of the seeds' log ratios and its 95 % interval by Student's t: of three seeds it is wide",
        }


def _recipe(work: Path, given: argparse.Namespace) -> Recipe:
    tree = demo.recipe(work / "inputs", 0).model_dump()
    tree["prompts"]["limit"] = given.prompts
    tree["training"]["steps"] = given.steps or tree["training"]["steps"]
    return Recipe.model_validate(tree)


def _held_out(path: Path, prepared: Prepared, teacher: LocalTeacher, count: int) -> list[TokenSequence]:
    """The teacher's answers to expressions on the held-out side of the demo's rule, each sequence once."""
    if not path.exists():
        prompts = [Prompt.of(expression.text) for expression in demo.expressions.draw(count, seed=0, held_out=True)]
        completions = teacher.generate([prepared.renderer.prompt_ids(prompt) for prompt in prompts], sampling_of(prepared))
        sequences = [prepared.renderer.sequence(prompt, completion=answer) for prompt, answer in zip(prompts, completions, strict=True)]
        distinct = {record_id(sequence): sequence for sequence in sequences}
        durable.write_json_atomic(path, [[list(one.ids), [list(span) for span in one.answer_spans]] for one in distinct.values()])
    read = json.loads(path.read_text(encoding="utf-8"))
    return [TokenSequence(ids=tuple(ids), answer_spans=tuple((start, stop) for start, stop in spans)) for ids, spans in read]


def _rows(model: LocalTeacher) -> RowLogits:
    return lambda sequences: model.log_probs(model.hidden_states(sequences), 1.0)


def _nats(sums: FidelitySums) -> list[float]:
    return [sequence.forward_kl_nats for sequence in sums.sequences]


def _described(seeds: Sequence[int], sums: Sequence[FidelitySums]) -> list[dict[str, Any]]:
    return [{"seed": seed} | _facts(one) for seed, one in zip(seeds, sums, strict=True)]


def _facts(sums: FidelitySums) -> dict[str, float]:
    tokens = sums.scored_tokens
    return {
        "held_out_forward_kl_nats": sum(_nats(sums)) / tokens,
        "top1_agreement": sum(sequence.agreements for sequence in sums.sequences) / tokens,
        "acceptance": sum(sequence.acceptance for sequence in sums.sequences) / tokens,
    }


def _compared(seeds: Sequence[int], sums: Sequence[FidelitySums], dense: Sequence[FidelitySums]) -> dict[str, Any]:
    """Each seed's ratio, the ratio of what all seeds sum to, and what the seeds' ratios say of another one."""
    pairs = list(zip(sums, dense, strict=True))
    by_seed = [{"seed": seed} | _facts(one) | {"ratio": _ratio([one], [other])} for seed, (one, other) in zip(seeds, pairs, strict=True)]
    pooled = _ratio(sums, dense)
    logs = [math.log(sum(_nats(one)) / sum(_nats(other))) for one, other in pairs]
    return {"seeds": by_seed, "pooled_ratio": pooled, "holds": pooled["high"] <= LIMIT, "over_seeds": _over_seeds(logs)}


def _ratio(sums: Sequence[FidelitySums], dense: Sequence[FidelitySums]) -> dict[str, float]:
    columns = {name: numpy.sum([_nats(one) for one in group], axis=0) for name, group in (("one", sums), ("dense", dense))}
    interval = paired_statistic_interval(columns, lambda means: means["one"] / means["dense"], resamples=RESAMPLES)
    assert isinstance(interval, Interval), "the student is never the teacher itself"
    return {"value": interval.value, "low": interval.low, "high": interval.high, "n": interval.n}


def _over_seeds(logs: Sequence[float]) -> dict[str, float] | None:
    if len(logs) - 1 not in _T:
        return None
    mean, half = statistics.mean(logs), _T[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"value": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half), "n": len(logs)}


if __name__ == "__main__":
    main()
