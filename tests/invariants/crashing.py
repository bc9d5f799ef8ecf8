"""A process in which children run a tiny run and die: at every write point in turn, by os._exit, and then are resumed by another child.

    python crashing.py DIRECTORY KIND MODE...    one line of JSON for each death: {stage, point, died, resumed, differences, output}

KIND is that of the targets. A MODE is a state ("collected": die at each write point of the stage that ends there, beginning where the state before ended; resume to that
state), or "whole" (die at each write point of a whole run, the resumed run dies once more further on, and a third goes to the end).

Children are forked, since importing torch takes longer than the run itself: this process computes no gradient and starts no thread.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas  # noqa: F401  (pyarrow imports it where it is installed: here once, and not in each child)
import tensorboard.compat.proto.event_pb2
import tensorboard.summary.writer.record_writer  # noqa: F401  (likewise, for the loop)
import torch

from stillroom.core import durable
from stillroom.core.errors import StillroomError
from stillroom.data import TransferSet
from stillroom.evals import cost
from stillroom.evals.cost import CostMeasurements
from stillroom.evals.measured import Absence
from stillroom.ledger import Ledger
from stillroom.runs import Plan, collecting, evaluating, planning, run, stages
from stillroom.runs.directory import STATES
from stillroom.runs.recipe import Recipe
from stillroom.targets.store import TargetStore
from tiny_run import metrics_of, tiny_recipe

DIED = 137
# Small enough that the few prompts make several parts.
_PART = 10


def main(directory: Path, kind: str, modes: list[str]) -> None:
    """Makes the uninterrupted run, then one death after another."""
    recipe = Recipe.from_tree(tiny_recipe(directory / "in") | {"targets": {"kind": kind}})
    _quicken(recipe, directory / "planned once")
    # A collection in a child would touch, and so copy, all the memory that it shares with this process.
    gc.collect()
    gc.freeze()
    snapshots = _uninterrupted(recipe, directory, STATES[-1] if "whole" in modes else modes[-1])
    for mode in modes:
        for line in _deaths(recipe, directory / "case", snapshots, mode):
            print(json.dumps(line), flush=True)
            if line["differences"] or line["resumed"] != 0 or line["died"] != DIED:
                return


def _quicken(recipe: Recipe, out: Path) -> None:
    """Several parts out of few prompts; and what takes long, writes nothing and is tested elsewhere is done once or not at all."""
    collecting.PART = _PART
    cost.measure_peak_memory = lambda *_: Absence(absent="not measured in this test")
    code, output = in_child(lambda: run(recipe, out=out, until="planned"))
    assert code == 0, output
    prepared = planning.prepare(recipe, planned=Plan.model_validate(durable.read_json(out / "plan.json")))
    stages.prepare = lambda *_, **__: prepared


def _uninterrupted(recipe: Recipe, directory: Path, last: str) -> dict[str, Path]:
    """A copy of the run's directory at each state."""
    snapshots = {"new": directory / "new"}
    snapshots["new"].mkdir()
    for before, state in itertools.pairwise(STATES[: STATES.index(last) + 1]):
        snapshots[state] = directory / state
        shutil.copytree(snapshots[before], snapshots[state])
        code, output = in_child(lambda state=state: run(recipe, out=snapshots[state], until=state))
        assert code == 0, output
        if state == "evaluated":
            _measure_no_more(snapshots[state] / "evals" / "cost.json")
    return snapshots


def _measure_no_more(path: Path) -> None:
    """From here on measuring what the models cost gives what it gave the first time."""
    measured = CostMeasurements.model_validate_json(path.read_bytes())
    evaluating.measure_cost = lambda *_, **__: measured


def _deaths(recipe: Recipe, case: Path, snapshots: dict[str, Path], mode: str) -> Any:
    before, last = ("new", STATES[-1]) if mode == "whole" else (STATES[STATES.index(mode) - 1], mode)
    for point in itertools.count(1):
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(snapshots[before], case)
        died, output = in_child(lambda point=point: _until_death(recipe, case, last, point))
        if died == 0:
            return
        if mode == "whole":
            # Further on by a number of points that is different each time.
            again, output = in_child(lambda point=point: _until_death(recipe, case, last, 1 + point * 7 % 40))
            died = DIED if again in (0, DIED) else again
        resumed, output = in_child(lambda: run(recipe, out=case, until=last))
        found = differences(recipe, snapshots[last], case) if resumed == 0 else []
        yield {"stage": mode, "point": point, "died": died, "resumed": resumed, "differences": found, "output": output}


def _until_death(recipe: Recipe, out: Path, until: str, point: int) -> None:
    count = itertools.count(1)

    def write_point() -> None:
        if next(count) == point:
            os._exit(DIED)

    durable.write_point = write_point
    run(recipe, out=out, until=until)


def in_child(action: Callable[[], object]) -> tuple[int, str]:
    """Runs `action` in a forked process; its exit code (1 for an exception) and the last of what it wrote."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        code = 1
        try:
            action()
            code = 0
        except StillroomError as error:
            print(error, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as stream:
        output = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output[-3000:]


# --- what must be the same ----------------------------------------------------------------------------------------------------------------


def differences(recipe: Recipe, expected: Path, found: Path) -> list[str]:
    """Names of what a resumed run has otherwise than the uninterrupted one; clocks aside, nothing may be."""
    one, other = facts_of(expected), facts_of(found)
    return [
        f"{name}: {one.get(name)!r:.300} became {other.get(name)!r:.300}"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name)
    ]


def facts_of(directory: Path) -> dict[str, Any]:
    """Everything in a run's directory that the recipe decides."""
    facts: dict[str, Any] = {"unfinished files": _unfinished(directory)}
    for name in ("recipe.json", "decision.json", "samples.jsonl", "student/model.safetensors", "label_only/student/model.safetensors"):
        facts[name] = _bytes(directory / name)
    if (directory / "transfer_set.json").exists():
        facts |= _collected(directory)
    for part in (directory, directory / "label_only"):
        if (directory / "training.json").exists() and (part / "metrics.jsonl").exists():
            facts[f"metrics of {part.name if part != directory else 'student'}"] = metrics_of(part)
            facts["training.json"] = _timeless(durable.read_json(directory / "training.json"))
    for path in sorted((directory / "evals").glob("*.json")):
        if path.name != "summary.json":
            facts[path.name] = durable.read_json(path)
    if (directory / "report.json").exists():
        report = durable.read_json(directory / "report.json")
        facts |= {f"report: {name}": report[name] for name in ("quality", "fidelity", "curves", "samples")}
        facts["report.html"] = (directory / "report.html").stat().st_size > 1000
    return facts


def _collected(directory: Path) -> dict[str, Any]:
    """Transfer set, store and ledger; hashes in the ledger are salted by a secret of the run, so its entries are counted and looked up."""
    transfer_set = TransferSet.load(directory / "transfer_set.json")
    store = TargetStore.open(directory / "targets")
    ledger = Ledger.open(directory)
    head = ledger.verify()
    transfer_set.require_backed(ledger, store)
    entries = [json.loads(line)["entry"] for line in durable.read_lines(directory / "ledger.jsonl")]
    stages_of = {stage: [record for record in store.record_ids if ledger.has(record, stage)] for stage in ("collect", "freeze", "train")}
    return {
        "transfer set": [(record.id, record.prompt_id) for record in transfer_set.records],
        "dropped": (transfer_set.requested, transfer_set.dropped),
        "store": (store.sha256, store.record_ids),
        "collect.jsonl": [_timeless(json.loads(line)) for line in durable.read_lines(directory / "collect.jsonl")],
        "ledger": (head.entries, stages_of),
        "ledger: entries of each stage": {stage: sum(entry["stage"] == stage for entry in entries) for stage in stages_of},
        "ledger: repeated": len(entries) - len({(entry["stage"], entry["record"]) for entry in entries}),
    }


def _unfinished(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.name.endswith((".partial", ".replaced")))


def _timeless(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if "seconds" not in name}


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
