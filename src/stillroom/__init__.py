"""Stillroom distils large language models into small ones, and keeps the book on it.

import stillroom

recipe = stillroom.Recipe(teacher=..., student=..., prompts=..., terms=...)
run = stillroom.run(recipe, out="runs/first")
print(run.report.quality.gap_recovered)
"""

from stillroom.core.errors import StillroomError
from stillroom.runs import Plan, Recipe, Run, compare, plan, run
from stillroom.runs.report import Report

__version__ = "0.1.0"

__all__ = ["Plan", "Recipe", "Report", "Run", "StillroomError", "__version__", "compare", "plan", "run"]
