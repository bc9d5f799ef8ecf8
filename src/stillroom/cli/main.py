"""The commands. Exit codes: 0 done, 2 bad input, 4 denied by the terms, 5 terms unknown, 130 interrupted and resumable."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import stillroom
from stillroom import demo as bundled
from stillroom import runs
from stillroom.cli import view
from stillroom.core import durable
from stillroom.core.errors import RunError, StillroomError
from stillroom.runs.directory import Run
from stillroom.runs.recipe import Recipe
from stillroom.runs.template import recipe_template

app = typer.Typer(
    name="stillroom",
    help="Distil a large language model into a small one, and keep the book on it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML); `stillroom init` writes one.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Run directory; by default runs/NAME beside where you are.")]
StageOutOption = Annotated[Path, typer.Option("--out", help="Run directory.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Run directory.")] = Path("stillroom-demo"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the student, the prompts and the order.")] = 0,
) -> None:
    """Teach a small model what the bundled teacher knows, and report how much of it was kept."""
    recipe = bundled.prepare(out, seed)
    _finish(runs.run(recipe, out=out, observer=view.Screen(_errors())))


@app.command()
def init(out: Annotated[Path, typer.Option("--out", help="Where to write it.")] = Path("recipe.yaml")) -> None:
    """Write a commented recipe to start from."""
    if out.exists():
        raise RunError("run-not-a-run", found=f"{out} exists", expected="a new file", do="Choose another --out, or move that file away.")
    durable.write_bytes_atomic(out, recipe_template().encode())
    _out().print(f"Wrote {out}. Edit teacher, terms, student and prompts, then: stillroom plan {out}", soft_wrap=True, highlight=False)


@app.command()
def plan(recipe: RecipeArgument, as_json: Annotated[bool, typer.Option("--json", help="Print plan.json instead of a page.")] = False) -> None:
    """Say what would happen: signal and why, vocabularies, memory, time, terms. Makes no request, spends nothing."""
    found = runs.plan(Recipe.from_yaml(recipe))
    if as_json:
        _print_json(found.model_dump(mode="json"))
    else:
        _out().print(view.plan_page(found))


@app.command()
def run(recipe: RecipeArgument, out: OutOption = None) -> None:
    """Plan, collect, train, evaluate, report; run again with the same --out to resume."""
    _finish(_stage(recipe, out, "reported"))


@app.command()
def collect(recipe: RecipeArgument, out: StageOutOption) -> None:
    """Ask the teacher: answers and targets for every prompt."""
    _stage(recipe, out, "collected")


@app.command()
def train(recipe: RecipeArgument, out: StageOutOption) -> None:
    """Train the student on what was collected."""
    _stage(recipe, out, "trained", needs="collected")


@app.command()
def evaluate(recipe: RecipeArgument, out: StageOutOption) -> None:
    """Measure teacher, student and baseline on the same items."""
    _stage(recipe, out, "evaluated", needs="trained")


@app.command()
def report(recipe: RecipeArgument, out: StageOutOption) -> None:
    """Write report.json and report.html, and print the main figures."""
    _finish(_stage(recipe, out, "reported", needs="evaluated"))


@app.command()
def compare(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory with a trained student.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="One prompt.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A .jsonl or .parquet file of prompts.")] = None,
) -> None:
    """Show teacher and student side by side."""
    if (prompt is None) == (file is None):
        raise RunError("recipe-invalid", found="both or neither of --prompt and --file", expected="one of them", do="Give --prompt TEXT or --file F.")
    _out().print(view.side_by_side(runs.compare(Run.open(directory), prompt=prompt, file=file)))


@app.command()
def version() -> None:
    """Print the version."""
    _out().print(stillroom.__version__, highlight=False)


def main() -> None:
    """Runs the command line; every StillroomError becomes its text on standard error and its exit code."""
    try:
        app(standalone_mode=False)
    except StillroomError as error:
        _errors().print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        _errors().print("Stopped. What was finished is on disk; the same command resumes.", highlight=False)
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _errors().print(f"stillroom: {error.format_message()}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _stage(recipe: Path, out: Path | None, until: str, needs: str | None = None) -> Run:
    found = Recipe.from_yaml(recipe)
    return runs.run(found, out=out or Path("runs") / found.name, until=until, needs=needs, observer=view.Screen(_errors()))


def _finish(run: Run) -> None:
    _out().print(view.report_page(run.report))
    _out().print(f"Report   {run.page_path}\nStudent  {run.student_path}", soft_wrap=True, highlight=False)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def _out() -> Console:
    return Console()


def _errors() -> Console:
    return Console(stderr=True)
