"""A process in which children train a student together, two at a time, and in some cases die at it. Nothing here is a test; test_parallel.py is.

    python ranks.py DIRECTORY CASE...    lines of JSON, one for each thing looked at

Children are forked, as in crashing.py and for the same reasons. Those of one group have the environment that torchrun would give them.
"""

from __future__ import annotations

import faulthandler
import gc
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from crashing import DIED, facts_of
from safetensors.torch import load_file, save_file
from test_gradients import FAMILIES, STUDENT_ROWS, some_sequences, teacher_of, tiny_model, tokenizer, vocabulary_of

import stillroom
from helpers import save_tiny, tiny_tokenizer
from stillroom.core import durable
from stillroom.core.errors import StillroomError
from stillroom.core.identities import TokenSequence
from stillroom.core.interrupts import StopRequest
from stillroom.core.launch import EndedElsewhere
from stillroom.models import parallel, student
from stillroom.models.parallel import Processes, Sharding, join, whole_tensor
from stillroom.models.student import OptimiserSettings, TransformersStudent
from stillroom.objectives.divergences import cross_entropy, forward_kl
from stillroom.objectives.matching import hidden_cosine, new_projections
from stillroom.objectives.objective import Objective, WeightedTerm
from stillroom.runs import Plan, loop, planning, sources, stages, training
from stillroom.runs.loop import Loop, LoopSettings
from stillroom.runs.observer import Silent
from stillroom.runs.recipe import Recipe
from stillroom.runs.sources import LiveSource
from stillroom.targets.kinds import TargetRequest
from tiny_run import metrics_of, tiny_recipe

MODES = ("replicate", "shard")
# A group that has not ended by then hangs, on a machine with other work too; where, it says a little before.
PATIENCE_SECONDS = 150.0


# --- processes ----------------------------------------------------------------------------------------------------------------------------


def group(size: int, action: Callable[[], object]) -> list[tuple[int, str]]:
    """Runs `action` in `size` forked processes that know of each other; of each its exit code and what it wrote. Those that hang are killed."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(size):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            _end(action)
        os.close(writing)
        children.append((child, reading))
    return _ended(children)


def _end(action: Callable[[], object]) -> None:
    """As the command line does: an error is its text and its code, one that another process tells of is its code."""
    faulthandler.dump_traceback_later(0.9 * PATIENCE_SECONDS)
    code = 1
    try:
        action()
        code = 0
    except EndedElsewhere as error:
        code = error.exit_code
    except StillroomError as error:
        code = error.exit_code
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ended(children: Sequence[tuple[int, int]]) -> list[tuple[int, str]]:
    until = time.monotonic() + PATIENCE_SECONDS
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child, _ in children:
            if child in codes:
                continue
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    results = []
    for child, reading in children:
        with os.fdopen(reading, errors="replace") as stream:
            results.append((codes[child], stream.read()[-3000:]))
    return results


def must(results: Sequence[tuple[int, str]]) -> None:
    assert all(code == 0 for code, _ in results), results


def rank() -> int:
    return int(os.environ["RANK"])


# --- one step -------------------------------------------------------------------------------------------------------------------------------

# Sequences of a step, and of a micro-batch. 8 by 3: shares of 4, in 3 and 1. 7: shares of 3 and 4. 1: a process without records.
# "unscored": one process's whole share has no scored row.
STEPS = {"8 by 3": (8, 3), "7 by 2": (7, 2), "1": (1, 2), "unscored": (2, 1), "8 by 8": (8, 8)}
OBJECTIVES = {
    "fused": Objective(terms=(WeightedTerm(divergence=forward_kl()), WeightedTerm(divergence=cross_entropy(), weight=0.5))),
    "projected": Objective(terms=(WeightedTerm(divergence=forward_kl()), WeightedTerm(divergence=hidden_cosine(), weight=0.5))),
}


def _student(family: str, mode: str, processes: Processes, *, autograd: bool = False, dtype: torch.dtype = torch.float32) -> TransformersStudent:
    model = tiny_model(family, rows=STUDENT_ROWS, seed=2, **({"attn_implementation": "eager"} if family == "gemma2" else {}))
    if autograd:
        # A head with a hook is not taken for a plain one: its rows go through autograd.
        model.get_output_embeddings().register_forward_hook(lambda *_: None)
    return TransformersStudent(
        model,
        vocabulary_of(tokenizer(), STUDENT_ROWS),
        OptimiserSettings(clip_norm=1e9),
        dtype=dtype,
        projections=new_projections([hidden_cosine()], student_width=32, teacher_width=48, seed=0),
        processes=processes,
        sharding=Sharding(device=torch.device("cpu")) if mode == "shard" else None,
        rows_per_chunk=13,
    )


def _loop(learner: TransformersStudent, family: str, objective: Objective, step: str, folder: Path) -> tuple[Loop, list[str]]:
    count, micro_batch = STEPS[step]
    sequences = {f"{number:02d}": sequence for number, sequence in enumerate(some_sequences(count))}
    if step == "unscored":
        sequences = {"00": TokenSequence(ids=(1, 2, 3), answer_spans=()), "01": sequences["01"]}
    settings = LoopSettings(
        steps=3, sequences_per_step=count, micro_batch=micro_batch, learning_rate=1e-3, schedule="constant", warmup_steps=0, validate_every=9,
        checkpoint_every=9, seed=0,
    )  # fmt: skip
    source = LiveSource(teacher_of(family), sequences, TargetRequest(kind="hidden"))
    records = sorted(sequences)
    return Loop(learner, objective, source, records, [], settings, folder, observer=Silent(), stop=StopRequest("")), records


def one_gradient(mode: str, family: str, name: str, step: str, file: Path, *, autograd: bool) -> None:
    """The gradient that an optimiser's step of all processes sees, its norm and the sums, written by the first."""
    processes = join()
    with processes.together():
        learner = _student(family, mode, processes, autograd=autograd)
        found: dict[str, torch.Tensor] = {}

        def keep() -> None:
            for parameter_name, parameter in learner._parameters.items():
                if parameter.grad is not None:
                    found[parameter_name] = whole_tensor(parameter.grad).clone()

        learner._optimiser.step = keep  # type: ignore[method-assign]
        trainer, records = _loop(learner, family, OBJECTIVES[name], step, file.parent)
        sums = trainer._accumulate(records)
        norm = learner.optim_step(0.0)
        numbers = [norm, sums.objective_nats, *sums.terms_nats.values(), sums.scored_tokens, sums.scored_weight]
        scored = trainer._added_up(_scored(trainer, records), False, False)[2]
        numbers += [scored.objective_nats, scored.scored_tokens]
        if processes.is_first:
            save_file(found | {"numbers": torch.tensor(numbers, dtype=torch.float64)}, file)


def _scored(trainer: Loop, records: list[str]) -> Any:
    return loop._added([trainer.student.score(batch, trainer.objective) for batch in trainer._batches(records, 2)])


def gradients(directory: Path) -> Iterator[dict[str, Any]]:
    """One process against two, in each of the ways."""
    for family, (name, autograd) in itertools.product(FAMILIES.values(), (("fused", False), ("projected", True))):
        for step in STEPS:
            if step != "8 by 3" and (family in ("gemma2", "phi") or (autograd and step != "1")):
                continue
            files = {mode: directory / f"{mode}.safetensors" for mode in ("none", *MODES)}
            for mode, file in files.items():
                action = partial(one_gradient, mode, family, name, step, file, autograd=autograd)
                must(group(1 if mode == "none" else 2, action))
            expected = load_file(files["none"])
            for mode in MODES:
                found = load_file(files[mode])
                yield {"case": f"{mode}, {family}, {name}, {step}", "names": found.keys() == expected.keys()} | _off(found, expected)


def _off(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest relative difference of a parameter's gradient, those under a thousandth of the whole as if they were that; and of a number."""
    names = [name for name in expected if name != "numbers"]
    whole = sum(float(expected[name].double().square().sum()) for name in names) ** 0.5
    off = [float((found[n].double() - expected[n].double()).norm()) / max(float(expected[n].double().norm()), 1e-3 * whole) for n in names]
    numbers = (found["numbers"] - expected["numbers"]).abs() / expected["numbers"].abs().clamp(min=1e-30)
    return {"gradient": max(off), "numbers": float(numbers.max()), "whole": whole}


# --- small things -----------------------------------------------------------------------------------------------------------------------------


def agreement(directory: Path) -> Iterator[dict[str, Any]]:
    """What processes tell each other."""

    def differing() -> None:
        processes = join()
        with processes.together():
            learner = _student("llama", "replicate", processes)
            learner.require_same()
            if rank() == 1:
                next(learner.model.parameters()).data[0, 0] += 1e-6
            learner.require_same()

    def verbs() -> None:
        """What needs the whole of a student in parts, before and after a step."""
        processes = join()
        with processes.together():
            learner, plain = _student("mistral", "shard", processes), _student("mistral", "none", parallel.ALONE)
            batch = _loop(plain, "mistral", OBJECTIVES["fused"], "8 by 3", directory)[0].source.batch(["01", "02"])
            for _ in range(2):
                for one, divide_by in ((learner, 2 * batch.scored_tokens), (plain, batch.scored_tokens)):
                    assert one.score(batch, OBJECTIVES["fused"]).scored_tokens == batch.scored_tokens
                    one.forward_backward(batch, OBJECTIVES["fused"], divide_by)
                norms = [one.optim_step(1e-2) for one in (learner, plain)]
                assert abs(norms[0] / norms[1] - 1) < 1e-5, norms
                ours, theirs = (one.logprobs(batch.sequences) for one in (learner, plain))
                torch.testing.assert_close([torch.tensor(row) for row in ours], [torch.tensor(row) for row in theirs], rtol=1e-4, atol=1e-5)
                prompts, sampling = [(1, 2, 3), (4, 5)], stillroom.core.identities.Sampling(max_new_tokens=5)
                assert learner.sample(prompts, sampling) == plain.sample(prompts, sampling)
            whole = learner.whole_model()
            assert (whole is None) == (rank() == 1)
            if whole is not None:
                for name, parameter in whole.named_parameters():
                    torch.testing.assert_close(parameter, dict(plain.model.named_parameters())[name], rtol=1e-4, atol=1e-5)

    def narrow() -> None:
        """In bfloat16 the sum of another order is another number, but not by much."""
        processes = join()
        with processes.together():
            norms = []
            for mode, of in (("none", parallel.ALONE), ("replicate", processes), ("shard", processes)):
                learner = _student("mistral", mode, of, dtype=torch.bfloat16)
                trainer, records = _loop(learner, "mistral", OBJECTIVES["projected"], "8 by 3", directory)
                nats = trainer._accumulate(records).objective_nats
                assert all(p.dtype == p.grad.dtype == torch.float32 for p in learner._parameters.values() if p.grad is not None)
                norms.append((nats, learner.optim_step(1e-3)))
            assert all(abs(a / b - 1) < 0.02 for one in norms[1:] for a, b in zip(one, norms[0], strict=True)), norms

    results = group(2, differing)
    yield {"case": "another weight", "codes": [code for code, _ in results], "words": sum("[processes-differ]" in text for _, text in results)}
    results = group(2, verbs)
    yield {"case": "verbs", "codes": [code for code, _ in results], "output": results}
    results = group(2, narrow)
    yield {"case": "bfloat16", "codes": [code for code, _ in results], "output": results}


# --- whole runs -------------------------------------------------------------------------------------------------------------------------------


class Runs:
    """One recipe collected once, from which the train stage is run again and again."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        self.directory = directory
        tree = tiny_recipe(directory / "in", prompts=60) | {"evaluation": {}} | changes
        tree["training"] |= {"sequences_per_step": 5, "steps": 5}
        self.recipes = {mode: Recipe.from_tree(tree | {"hardware": tree["hardware"] | {"parallel": mode}}) for mode in ("auto", "shard", "none")}
        self.recipes["replicate"] = self.recipes["auto"]
        self.collected = {mode: directory / f"collected {mode}" for mode in ("auto", "shard")}
        for mode, out in self.collected.items():
            must(group(1, lambda m=mode, o=out: stillroom.run(self.recipes[m], out=o, until="collected")))
            _prepare_once(self.recipes[mode], out)

    def fresh(self, mode: str, name: str) -> Path:
        """A new copy of the collected run."""
        out = self.directory / name
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.collected["shard" if mode == "shard" else "auto"], out)
        return out

    def train(self, mode: str, out: Path, size: int = 2, before: Callable[[], object] = lambda: None) -> list[tuple[int, str]]:
        """The train stage in `out`, begun or resumed; `before` is done first in each process."""

        def action() -> None:
            before()
            stillroom.run(self.recipes[mode], out=out, until="trained")

        return group(size, action)

    def whole(self, mode: str, size: int = 2) -> Path:
        """The uninterrupted train stage."""
        out = self.fresh(mode, f"whole {mode} {size}")
        must(self.train(mode, out, size))
        return out


_prepared: dict[str, Any] = {}


def _prepare_once(recipe: Recipe, out: Path) -> None:
    """What every child would do again and is tested elsewhere."""
    planned = Plan.model_validate(durable.read_json(out / "plan.json"))
    _prepared[recipe.sha256] = planning.prepare(recipe, planned=planned)
    prepare = planning.prepare
    stages.prepare = lambda of, **more: _prepared.get(of.sha256) or prepare(of, **more)  # type: ignore[assignment]


def differences(expected: Path, found: Path) -> list[str]:
    """Names of what is not the same bytes, clocks aside."""
    one, other = facts_of(expected), facts_of(found)
    one.pop("recipe.json"), other.pop("recipe.json")
    return [f"{name}: {one.get(name)!r:.200} became {other.get(name)!r:.200}" for name in sorted(one | other) if one.get(name) != other.get(name)]


def apart(expected: Path, found: Path) -> dict[str, float]:
    """How far two students and their curves are from each other, relatively."""
    one, other = (load_file(path / "student" / "model.safetensors") for path in (expected, found))
    assert one.keys() == other.keys()
    far = sum(float((one[n].double() - other[n].double()).square().sum()) for n in one) ** 0.5
    curves = list(zip(metrics_of(expected), metrics_of(found), strict=True))
    assert all(a["step"] == b["step"] and a["scored_tokens"] == b["scored_tokens"] for a, b in curves)
    return {
        "weights": far / sum(float(value.double().square().sum()) for value in one.values()) ** 0.5,
        "curve": max(abs(b["nats_per_token"] / a["nats_per_token"] - 1) for a, b in curves),
    }


def trajectories(directory: Path) -> Iterator[dict[str, Any]]:
    """Whole train stages: two processes against one; twice; and resumed by another number of processes."""
    runs = Runs(directory)
    alone = runs.whole("auto", 1)
    for mode in MODES:
        yield from _one_is_two(runs, alone, mode, "hidden")
        yield from _other_sizes(runs, alone, mode)


def live_trajectories(directory: Path) -> Iterator[dict[str, Any]]:
    """Each process with a teacher of its own, and a student that is read from disk."""
    runs = Runs(directory, targets={"kind": "top_k", "k": 5, "live": True}, student={"model": str(_on_disk(directory / "student"))})
    alone = runs.whole("auto", 1)
    for mode in MODES:
        yield from _one_is_two(runs, alone, mode, "live, from disk")


def _one_is_two(runs: Runs, alone: Path, mode: str, kind: str) -> Iterator[dict[str, Any]]:
    two = runs.whole(mode)
    yield {"case": f"one is two, {mode}, {kind}"} | apart(alone, two)
    again = runs.fresh(mode, "again")
    must(runs.train(mode, again))
    yield {"case": f"twice, {mode}, {kind}", "differences": differences(two, again)}


def _on_disk(directory: Path) -> Path:
    return save_tiny(directory, "mistral", tokenizer=tiny_tokenizer(), width=16, layers=2)


def _other_sizes(runs: Runs, alone: Path, mode: str) -> Iterator[dict[str, Any]]:
    for begin, go_on in ((2, 1), (1, 2)):
        out = runs.fresh(mode, "resized")
        runs.train(mode, out, begin, lambda: _stop_after(4))
        steps = [int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*")]
        files = sorted(path.name.split("-")[0] for path in (out / "checkpoints").glob("*/*.safetensors"))
        must(runs.train(mode, out, go_on))
        yield {"case": f"{begin} to {go_on}, {mode}", "steps": steps, "files": files} | apart(alone, out)


def _stop_after(step: int) -> None:
    """The process's loop is asked to stop when that step begins."""
    of = loop.step_records

    def stopping(records: Any, now: int, *rest: Any, **more: Any) -> list[str]:
        if now == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return of(records, now, *rest, **more)

    loop.step_records = stopping


def from_disk(directory: Path) -> Iterator[dict[str, Any]]:
    """A student in parts never has all its weights in one process, where its files allow that; else that is said."""
    runs = Runs(directory, student={"model": str(_on_disk(directory / "student"))})

    def refuse(*_: object) -> None:
        raise AssertionError("the whole student was loaded")

    whole = runs.fresh("shard", "lazily")
    results = runs.train("shard", whole, before=lambda: setattr(training, "load_model", refuse))
    yield {"case": "part by part", "codes": [code for code, _ in results], "output": results}
    out = runs.fresh("shard", "otherwise")
    must(runs.train("shard", out, before=lambda: setattr(training, "stored_by_parameter", lambda *_: False)))
    yield {"case": "whole at first", "codes": [0, 0], "output": "", "differences": differences(whole, out)}


# --- what goes wrong ----------------------------------------------------------------------------------------------------------------------------


FAILURES = (("an error", "shard"), ("killed", "replicate"), ("a signal", "shard"), ("disk", "replicate"))


def failures(directory: Path, others: bool = False) -> Iterator[dict[str, Any]]:
    """One process fails in its own way; all must end, one must say why, and the run must go on from there to the same bytes.

    Of each way in one mode, or with `others` in the other.
    """
    runs = Runs(directory)
    wholes = {mode: runs.whole(mode) for mode in MODES}
    ways: dict[str, Callable[[], None]] = {
        "an error": lambda: _at_third_batch(_raise(ValueError("the third batch is bad"))),
        "killed": lambda: _at_third_batch(lambda: os.kill(os.getpid(), signal.SIGKILL)),
        "a signal": lambda: _stop_after(3),
        "disk": lambda: setattr(durable, "write_point", _full_disk) if rank() == 0 else None,
    }
    for mode, (way, fail) in itertools.product(MODES, ways.items()):
        if ((way, mode) in FAILURES) == others:
            continue
        out = runs.fresh(mode, "failing")
        began = time.monotonic()
        results = runs.train(mode, out, before=lambda f=fail, w=way: f() if rank() == 1 or w == "disk" else None)
        seconds = time.monotonic() - began
        must(runs.train(mode, out))
        yield {
            "case": f"{way}, {mode}", "codes": [code for code, _ in results], "texts": [text for _, text in results], "seconds": seconds,
            "differences": differences(wholes[mode], out),
        }  # fmt: skip
    results = group(2, lambda: stillroom.run(runs.recipes["none"], out=directory / "none", until="planned"))
    yield {"case": "none", "codes": [code for code, _ in results], "texts": [text for _, text in results]}


def _raise(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def _at_third_batch(act: Callable[[], object]) -> None:
    of, count = sources.StoredSource.batch, itertools.count(1)

    def batch(self: Any, record_ids: Any) -> Any:
        if next(count) == 3:
            act()
        return of(self, record_ids)

    sources.StoredSource.batch = batch  # type: ignore[method-assign]


def _full_disk() -> None:
    if any(frame.name == "replace_directory" for frame in traceback.extract_stack()):
        raise OSError(28, "No space left on device")


def memory(directory: Path) -> Iterator[dict[str, Any]]:
    """One process has not enough memory for two sequences at once."""
    runs = Runs(directory)
    for mode in MODES:
        out = runs.fresh(mode, "memory")
        told = []
        results = runs.train(mode, out, before=_little_memory)
        while any(results[0]) and len(told) < 3:
            told.append([(code, text) for code, text in results])
            results = runs.train(mode, out, before=_little_memory)
        yield {
            "case": f"memory, {mode}", "codes": [code for code, _ in results], "told": told, "halvings": durable.read_json(out / "training.json")["halvings"],
        } | apart(runs.whole(mode), out)  # fmt: skip


def _little_memory() -> None:
    of = student.TransformersStudent._states

    def states(self: Any, sequences: Any) -> torch.Tensor:
        if rank() == 1 and len(sequences) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return of(self, sequences)

    student.TransformersStudent._states = states  # type: ignore[method-assign]


# --- every write point --------------------------------------------------------------------------------------------------------------------------


def deaths(directory: Path, mode: str, every: int) -> Iterator[dict[str, Any]]:
    """Each process in turn dies at every `every`-th of its write points in the train stage; the run is resumed to the same bytes."""
    runs = Runs(directory, evaluation={"label_only": tiny_recipe(directory / "in")["evaluation"]["label_only"]})
    whole = runs.whole(mode)
    for dying in (0, 1):
        for point in itertools.count(1, every):
            out = runs.fresh(mode, "case")
            results = runs.train(mode, out, before=lambda p=point, d=dying: _die_at(p) if rank() == d else None)
            if all(code == 0 for code, _ in results):
                break
            resumed = runs.train(mode, out)
            found = differences(whole, out) if all(code == 0 for code, _ in resumed) else []
            yield {
                "case": f"{mode}, process {dying}, write point {point}", "rank": dying, "point": point, "died": results[dying][0], "other": results[1 - dying][0],
                "resumed": [code for code, _ in resumed], "differences": found, "output": [text for _, text in [*results, *resumed]],
            }  # fmt: skip


def _die_at(point: int) -> None:
    count = itertools.count(1)

    def write_point() -> None:
        if next(count) == point:
            os._exit(DIED)

    durable.write_point = write_point


CASES: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    "gradients": gradients,
    "agreement": agreement,
    "trajectories": trajectories,
    "live trajectories": live_trajectories,
    "from disk": from_disk,
    "failures": failures,
    "other failures": partial(failures, others=True),
    "memory": memory,
    **{f"deaths {mode}": lambda directory, mode=mode: deaths(directory, mode, 31) for mode in MODES},
    **{f"all deaths {mode}": lambda directory, mode=mode: deaths(directory, mode, 1) for mode in MODES},
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    # A collection in a child would touch, and so copy, all the memory that it shares with this process.
    gc.collect()
    gc.freeze()
    for case in sys.argv[2:]:
        folder = Path(sys.argv[1]) / case
        folder.mkdir(parents=True)
        for line in CASES[case](folder):
            print(json.dumps(line), flush=True)
