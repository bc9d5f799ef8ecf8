"""What every benchmark writes: a dated file that says where it was measured."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location("benchmarks_common", ROOT / "benchmarks" / "_common.py")
assert _SPEC is not None
assert _SPEC.loader is not None
common = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(common)


def test_the_environment_names_machine_and_code() -> None:
    found = json.loads(json.dumps(common.environment()))
    assert found["cores"] >= 1
    assert found["versions"]["numpy"]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["commit"] is None or re.fullmatch("[0-9a-f]{40}", found["commit"])
    assert datetime.fromisoformat(found["time"]).tzinfo is not None


def test_a_result_is_dated_and_says_first_what_it_does_not_show(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    path = common.write_result("speed", {"tokens_per_second": 5.0}, caveats=["one machine"], directory=tmp_path / "results")
    assert path.name in {f"{moment:%Y-%m-%d}-speed.json" for moment in (before, datetime.now(UTC))}
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written) == ["caveats", "environment", "tokens_per_second"]
    assert os.listdir(path.parent) == [path.name]


def test_what_json_cannot_hold_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        common.write_result("speed", {"tokens_per_second": math.nan}, directory=tmp_path)
    assert os.listdir(tmp_path) == []


def test_json_is_the_only_line_on_standard_output(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import pathlib, _common; _common.ROOT = pathlib.Path({str(tmp_path)!r})\n"
        f"_common.write_result.__kwdefaults__['directory'] = _common.ROOT\n"
        "arguments = _common.parser('A benchmark.').parse_args()\n"
        "_common.finish('speed', {'found': 1}, as_json=arguments.json)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["found"] == 1
    assert done.stdout.count("\n") == 1
    plain = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert plain.startswith("written to ")
