"""How long `stillroom terms check RECIPE` takes, start of the interpreter included, beside the floor: `python -c pass`.

What the issue of entitlement asks of it: at most 0.3 s on the base install. Measured are recipes that end with each of the four answers; the denial and
the unknown also look for teachers to suggest. For a base install of its own:

    python -m venv /tmp/base && /tmp/base/bin/pip install -c constraints.txt .
    python benchmarks/terms_check.py --stillroom /tmp/base/bin/stillroom
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from _common import finish, parser

LIMIT_SECONDS = 0.3
CAVEATS = (
    "Wall time on the machine named here, files in the page cache and modules compiled: one run of each comes before those that are counted.",
    "pydantic looks through every installed distribution for plugins, so an environment with more packages takes longer to start.",
    "The user's own terms are empty.",
)
_RELEASED = {"task": "general-llm", "release": "weights", "commercial": True, "monthly_users": 1000}
_COMPETES = {"competes": {"value": True, "asserted_by": "benchmark", "why": "a general model competes with others"}}
# Answer -> exit code, and what the recipe has beside the rest.
RECIPES: dict[str, tuple[int, dict[str, Any]]] = {
    "allow": (0, {"teacher": {"model": "acme/large"}, "terms": {"licence": "apache-2.0"}}),
    "allow-with-obligations": (
        3,
        {"teacher": {"model": "meta-llama/Llama-3.1-8B-Instruct"}, "terms": {"licence": "llama3.1"}, "intent": _RELEASED},
    ),
    "deny": (4, {"teacher": {"model": "gpt-4.1"}, "terms": {"access": "api:openai"}, "intent": _RELEASED | _COMPETES}),
    "unknown": (5, {"teacher": {"model": "gpt-4.1"}, "terms": {"access": "api:openai"}}),
}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--runs", type=int, default=15, help="runs of each that are counted, at least 9")
    arguments.add_argument("--stillroom", type=Path, default=Path(sys.executable).with_name("stillroom"), help="the command to measure")
    given = arguments.parse_args()
    if given.runs < 9:
        arguments.error("--runs is at least 9")
    with tempfile.TemporaryDirectory(prefix="stillroom-bench-") as temporary:
        data = _measured(given.stillroom, given.runs, Path(temporary))
    finish("terms_check", data, caveats=CAVEATS, as_json=given.json)


def _measured(stillroom: Path, runs: int, folder: Path) -> dict[str, Any]:
    commands = {"floor: python -c pass": ([str(stillroom.with_name("python")), "-c", "pass"], 0)}
    for answer, (code, tree) in RECIPES.items():
        commands[answer] = ([str(stillroom), "terms", "check", str(_recipe(folder / f"{answer}.yaml", tree))], code)
    environment = os.environ | {"STILLROOM_TERMS": str(folder / "terms")}
    # An installed package has its modules compiled; where this is set, Stillroom's own would be compiled in each run.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for counted in range(-1, runs):
        # In turn, so that whatever slows the machine for a while slows all of them.
        for name, (command, code) in commands.items():
            took = _seconds(command, code, environment)
            if counted >= 0:
                seconds[name].append(took)
    summary = {name: _summary(values) for name, values in seconds.items()}
    slowest = max(summary[answer]["median_seconds"] for answer in RECIPES)
    return {
        "limit_seconds": LIMIT_SECONDS,
        "runs": runs,
        "seconds": summary,
        "slowest_median_seconds": slowest,
        "distributions_installed_here": len(list(metadata.distributions())),
        "holds": slowest <= LIMIT_SECONDS,
    }


def _recipe(path: Path, tree: dict[str, Any]) -> Path:
    whole = {
        "student": {"from_scratch": {"layers": 2, "width": 64, "heads": 2, "feed_forward": 128}},
        "prompts": {"path": "prompts.jsonl"},
        "targets": {"kind": "text"},
    }
    path.write_text(yaml.safe_dump(whole | tree), encoding="utf-8")
    return path


def _seconds(command: list[str], code: int, environment: dict[str, str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode != code:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}, not {code}\n{done.stderr}")
    return took


def _summary(seconds: list[float]) -> dict[str, float]:
    return {
        "median_seconds": round(statistics.median(seconds), 4),
        "lowest_seconds": round(min(seconds), 4),
        "highest_seconds": round(max(seconds), 4),
    }


if __name__ == "__main__":
    main()
