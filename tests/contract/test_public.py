"""What `import stillroom` gives: small, lazy, and all of it there."""

from __future__ import annotations

import importlib
import subprocess
import sys

import stillroom
from contract import source
from stillroom.core.errors import StillroomError

# Frozen on purpose: a name is added here and in the CHANGELOG, or it is not public.
PUBLIC = {"Plan", "Recipe", "Report", "Run", "StillroomError", "__version__", "compare", "plan", "run"}


def test_the_public_names_are_these() -> None:
    assert set(stillroom.__all__) == PUBLIC
    assert list(stillroom.__all__) == sorted(stillroom.__all__, key=str)


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    for name in PUBLIC - {"__version__"}:
        assert (getattr(stillroom, name).__doc__ or "").strip(), f"stillroom.{name} has no docstring"
    assert set(stillroom.__all__) <= set(dir(stillroom))


def test_a_public_name_is_the_one_of_its_room() -> None:
    assert stillroom.StillroomError is StillroomError
    assert stillroom.Recipe is importlib.import_module("stillroom.runs.recipe").Recipe
    assert stillroom.Report is importlib.import_module("stillroom.runs.report").Report


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(stillroom, "Distiller")


def test_using_the_public_types_loads_no_weights_library() -> None:
    code = (
        "import sys, stillroom\n"
        "stillroom.Recipe.model_json_schema(), stillroom.Report.model_json_schema()\n"
        "heavy = {'torch', 'transformers', 'peft', 'tokenizers', 'safetensors', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source.ROOT / "src", capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_version_is_in_the_changelog() -> None:
    assert f"## [{stillroom.__version__}]" in (source.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
