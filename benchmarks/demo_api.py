"""The demo with its teacher behind an address (`stillroom demo --api`) over several seeds, each in a fresh process and directory.

What is asked of it: a real llama.cpp server is probed, asked for top log-probabilities under a cap and accounted for; gap recovered >= 0.90 with the
training settings of the demo; the targets that came over the wire are those of the same teacher here.

    python benchmarks/demo_api.py [--seeds 0 1 2] [--keep DIR]

With --keep the run directories stay, and runs that are there already are gone on with.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy

from _common import finish, parser
from stillroom import Run, demo
from stillroom.models.loading import describe, load_model
from stillroom.models.local import LocalTeacher
from stillroom.models.tokenizers import load_tokenizer, vocabulary_of
from stillroom.targets.kinds import TargetRequest, TopKTargets
from stillroom.targets.store import TargetStore

CAVEATS = (
    "Wall time is of the machine named here, on which llama.cpp's server and the run share the cores; other work on it slows both.",
    "The three seeds vary student, prompts, labelled pairs and order; the teacher and the 2,000 evaluation items are the same.",
    "The endpoint is a server of our own on the same machine: it bills nothing, throttles nothing and does not lie. No hosted provider was asked.",
)
_COMPARED_PROMPTS = 1_000
# float16 on the disk moves a log-probability by 2^-11 of itself at most: not a difference of the two teachers.
_ROUNDING = 2.0**-11


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--keep", type=Path, help="where to keep the run directories; by default they are removed")
    arguments.add_argument("--caveat", action="append", default=[], help="what else is to be known of these runs")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillroom-bench-") as temporary:
        results = [_one(seed, given.keep or Path(temporary)) for seed in given.seeds]
    server = {name: metadata.version(name) for name in ("xllamacpp", "gguf")}
    data = {"server": server, "seeds": results, "holds": [_holds(result) for result in results]}
    finish("demo_api", data, caveats=(*given.caveat, *CAVEATS), as_json=given.json)


def _one(seed: int, work: Path) -> dict[str, Any]:
    out = work / f"seed-{seed}"
    command = [sys.executable, "-m", "stillroom", "demo", "--api", "--out", str(out), "--seed", str(seed)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL if "--json" in sys.argv else sys.stderr)
    run = Run.open(out)
    report = json.loads(run.report_path.read_text())
    quality, collection = report["quality"], report["collection"]
    seconds = {name: number["value"] for name, number in report["making"]["wall_seconds"].items()}
    return {
        "seed": seed,
        "wall_seconds": round(sum(seconds.values()), 1),
        "stage_seconds": seconds,
        "exact_match": {name: _number(quality[name]["exact_match"]) for name in ("teacher", "student", "label_only", "student_before")},
        "student_by_family": {name: _number(number) for name, number in quality["student"]["families"].items()},
        "gap_recovered": _number(quality["gap_recovered"]),
        "fidelity": {name: _number(number) for name, number in report["fidelity"].items()},
        "rows": collection["rows"],
        "logprobs_verified": collection["logprobs_verified"],
        "logprobs_demoted": collection["logprobs_demoted"],
        "spent_tokens": collection["spent_tokens"]["value"],
        "reserved_tokens": collection["reserved_tokens"]["value"],
        "cap_tokens": _number(collection["cap_tokens"]),
        "served_and_local": _agreement(run),
    }


def _agreement(run: Run) -> dict[str, Any]:
    """The stored targets of the first prompts beside those that the same teacher gives here, in float32."""
    store = TargetStore.open(run.store_path)
    sequences, served = store.read(list(store.record_ids)[:_COMPARED_PROMPTS])
    assert isinstance(served, TopKTargets)
    description = describe(str(demo.TEACHER))
    vocabulary = vocabulary_of(load_tokenizer(str(demo.TEACHER)), description.shape.rows, description.end_ids)
    assert vocabulary.fingerprint == served.vocabulary
    teacher = LocalTeacher(load_model(description), description.ref, vocabulary)
    k = served.ids_RK.shape[1]
    here = teacher.targets(sequences, TargetRequest(kind="top_k", k=k))
    assert isinstance(here, TopKTargets)
    full = teacher.log_probs(teacher.hidden_states(sequences), 1.0).numpy()
    ends = numpy.cumsum([len(sequence.scored_rows) for sequence in sequences]) - 1
    rows = numpy.setdiff1d(numpy.arange(len(full)), ends)  # of the end token the server says nothing
    local = numpy.take_along_axis(full[rows], numpy.asarray(served.ids_RK)[rows].astype(numpy.int64), 1)
    differences = numpy.abs(numpy.asarray(served.log_probs_RK)[rows] - local)
    tails = numpy.abs(numpy.exp(numpy.asarray(served.tail_log_mass_R)[rows]) - numpy.exp(here.tail_log_mass_R.numpy()[rows]))
    return {
        "answers": len(sequences),
        "rows": len(rows),
        "k": k,
        "largest_difference_nats": float(differences.max()),
        "largest_difference_beyond_rounding_nats": float((differences - _ROUNDING * numpy.abs(local)).max()),
        "largest_difference_of_tails": float(tails.max()),
        "least_likely_end_token": float(numpy.exp(full[ends].max(-1)).min()),
    }


def _number(number: dict[str, Any]) -> dict[str, Any]:
    kept = {name: number[name] for name in ("value", "low", "high", "n") if number.get(name) is not None}
    return kept or {"absent": number["absent"]}


def _holds(result: dict[str, Any]) -> dict[str, bool]:
    match, gap = result["exact_match"], result["gap_recovered"]
    rows, agreement = result["rows"]["collect"], result["served_and_local"]
    ended = rows["accepted"] + sum(rows["rejected"].values()) + sum(rows["failed"].values())
    return {
        "teacher at least 0.98": match["teacher"]["value"] >= 0.98,
        "gap recovered at least 0.90": gap["value"] >= 0.90,
        "rows conserved, none pending": rows["requested"] == ended,
        "served and local within 1e-4 nats beyond float16's rounding": agreement["largest_difference_beyond_rounding_nats"] < 1e-4,
        "at most 10 minutes": result["wall_seconds"] <= 600,
    }


if __name__ == "__main__":
    main()
