"""What every benchmark needs: the machine and the code it ran on, a dated result file, and `--json`.

A result file says first what it does not show (`caveats`), then where it was measured, then what was found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_DISTRIBUTIONS = ("stillroom", "torch", "transformers", "numpy", "pyarrow", "tokenizers", "safetensors")


def environment() -> dict[str, Any]:
    """Versions, machine, commit and command; what cannot be found out is None, and a package that is not installed is left out."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "memory_bytes": _memory_bytes(),
        "accelerator": _accelerator(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in _DISTRIBUTIONS if (version := _version(name)) is not None},
    }


def write_result(name: str, data: Mapping[str, Any], *, caveats: Sequence[str] = (), directory: Path = RESULTS) -> Path:
    """Writes benchmarks/results/YYYY-MM-DD-`name`.json (UTC date) and returns its path. A second result of a day takes the first one's place.

    ValueError where `data` has a number that is not finite, which JSON cannot hold.
    """
    result = {"caveats": list(caveats), "environment": environment(), **data}
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{datetime.now(UTC):%Y-%m-%d}-{name}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
    return path


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser that has `--json`."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", action="store_true", help="print one JSON object and nothing else on standard output")
    return made


def finish(name: str, data: Mapping[str, Any], *, caveats: Sequence[str] = (), as_json: bool) -> Path:
    """Writes the result; then prints it as one JSON object on one line, or says where it is."""
    path = write_result(name, data, caveats=caveats)
    print(json.dumps(json.loads(path.read_text(encoding="utf-8"))) if as_json else f"written to {path.relative_to(ROOT)}")
    return path


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu() -> str | None:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _accelerator() -> str | None:
    """The name of the CUDA device, where a benchmark has loaded torch and there is one."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
