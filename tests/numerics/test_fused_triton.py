"""The fused head and divergence in Triton: on a CPU by Triton's interpreter, compiled for a GPU that is not there, and on a GPU where there is one.

The cases are in `triton_cases.py` and run in processes of their own: what Triton interprets or compiles is settled when it is imported, and PyTorch may
import it for the other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from numerics.test_fused import assert_same, head_of, only, run, targets_of
from stillroom.objectives import fused
from stillroom.objectives.divergences import cross_entropy, forward_kl

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is made for Linux")


def pytest_in_a_process(file: str, keyword: str, cache: Path, **variables: str) -> None:
    """Runs the tests of `file` that `keyword` selects, which must be some."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0", str(HERE / file), "-k", keyword]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "PYTEST_"))}
    environment |= {"TRITON_CACHE_DIR": str(cache)} | variables
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize("cases", ["test_cpu_path", "test_definition", "not test_cpu_path and not test_definition"])
def test_interpreted_it_is_the_same_function(cases: str, tmp_path: Path) -> None:
    pytest_in_a_process("triton_cases.py", cases, tmp_path, TRITON_INTERPRET="1")


@needs_triton
def test_it_compiles_for_a_gpu(tmp_path: Path) -> None:
    pytest_in_a_process("triton_compiles.py", "test", tmp_path)


@needs_triton
@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same_function(tmp_path: Path) -> None:
    pytest_in_a_process("triton_cases.py", "test", tmp_path, STILLROOM_TRITON_DEVICE="cuda")


def test_without_triton_autograd_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "TRITON_DEVICES", ("cpu",))
    # As if it were not installed.
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("fused_triton", "fused_kernels"):
        monkeypatch.delitem(sys.modules, f"stillroom.objectives.{name}", raising=False)
    goal = only(forward_kl(), cross_entropy())
    results = (run(head_of(bias=True), goal, targets_of("hidden"), by_autograd=by_autograd) for by_autograd in (False, True))
    assert_same(*results, relative=0.0)
    assert torch.is_grad_enabled()
