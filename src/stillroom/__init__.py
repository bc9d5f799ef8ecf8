"""Stillroom distils large language models into small ones, and keeps the book on it.

import stillroom

recipe = stillroom.Recipe(teacher=..., student=..., prompts=..., terms=..., intent=...)
run = stillroom.run(recipe, out="runs/first")
print(run.report.quality.gap_recovered)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.core.errors import StillroomError
    from stillroom.runs import Plan, Recipe, Run, compare, plan, run
    from stillroom.runs.report import Report

__version__ = "0.1.0"

__all__ = ["Plan", "Recipe", "Report", "Run", "StillroomError", "__version__", "compare", "plan", "run"]

_HOMES = {"Report": "stillroom.runs.report", "StillroomError": "stillroom.core.errors"}


def __getattr__(name: str) -> Any:
    # Looked up when it is asked for: a command that needs none of it should not wait for it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "stillroom.runs")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
