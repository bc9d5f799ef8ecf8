"""What the commands do that need the runs: they plan, run, report, publish, and print. Loaded when one of them is called (see later.py)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stillroom import demo as bundled
from stillroom import runs
from stillroom.cli import view
from stillroom.core import durable, optional
from stillroom.core.errors import RunError
from stillroom.core.interrupts import StopRequest
from stillroom.core.launch import launched
from stillroom.demo.api import run_api
from stillroom.models import serving
from stillroom.runs import publishing
from stillroom.runs.directory import Run
from stillroom.runs.recipe import Recipe
from stillroom.runs.template import recipe_template


def demo(out: Path, seed: int, api: bool, port: int | None) -> None:
    """Runs the bundled pair; with `api`, the teacher behind an address."""
    with view.Screen(errors()) as screen:
        finish(run_api(out, seed, port=port, observer=screen) if api else _demo(out, seed, screen))


def _demo(out: Path, seed: int, screen: view.Screen) -> Run:
    with durable.unwritable_reported(out, "--out"):
        recipe = bundled.prepare(out, seed)
    return runs.run(recipe, out=out, observer=screen)


def init(out: Path) -> None:
    """Writes the commented recipe. Raises RunError where `out` exists."""
    with durable.unwritable_reported(out, "--out"):
        if out.exists():
            raise RunError("run-not-a-run", found=f"{out} exists", expected="a new file", do="Choose another --out, or move that file away.")
        durable.write_bytes_atomic(out, recipe_template().encode())
    output().print(f"Wrote {out}. Edit teacher, terms, student and prompts, then: stillroom plan {out}", soft_wrap=True, highlight=False)


def plan(recipe: Path, out: Path | None, as_json: bool, cards: bool) -> None:
    """Prints the plan."""
    read = Recipe.from_yaml(recipe)
    found = runs.plan(read, out=out or _default_out(read), cards=cards)
    if as_json:
        print(json.dumps(found.model_dump(mode="json"), indent=2))
    else:
        output().print(view.plan_page(found))


def pilot(recipe: Path, out: Path | None, rows: int, as_json: bool) -> None:
    """Buys a few answers, and prints what the whole will cost."""
    read = Recipe.from_yaml(recipe)
    with view.Screen(errors()) as screen:
        piloted = runs.pilot(read, out=out or _default_out(read), rows=rows, observer=screen)
    if as_json:
        print(json.dumps(piloted.to_json(), indent=2))
    else:
        output().print(view.pilot_page(piloted))
        if not piloted.probed:
            output().print(view.probe_advice(piloted), soft_wrap=True, highlight=False, markup=False)


def _default_out(recipe: Recipe) -> Path:
    return Path("runs") / recipe.name


def stage(recipe: Path, out: Path | None, until: str, needs: str | None = None) -> Run:
    """Takes a run up to a state."""
    found = Recipe.from_yaml(recipe)
    return runs.run(found, out=out or _default_out(found), until=until, needs=needs, observer=view.Screen(errors()))


def collect_shard(recipe: Path, out: Path, shard: str) -> None:
    """Buys one machine's part of a collection. Raises typer.BadParameter for a shard that is none."""
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise typer.BadParameter(f"{shard!r} is not I/N with 1 <= I <= N, such as 2/4", param_hint="--shard")
    found = Recipe.from_yaml(recipe)
    runs.collect_shard(found, out=out, index=int(index) - 1, count=int(count), observer=view.Screen(errors()))


def finish(run: Run) -> None:
    """Prints the main figures of a finished run, and where its files are; once, of several processes."""
    if launched().rank > 0:
        return
    output().print(view.report_page(run.report))
    output().print(f"Report   {run.page_path}\nStudent  {run.student_path}", soft_wrap=True, highlight=False)


def compare(directory: Path, prompt: str | None, file: Path | None) -> None:
    """Prints both answers to each prompt. Raises RunError unless there is one of `prompt` and `file`."""
    if (prompt is None) == (file is None):
        raise RunError("recipe-invalid", found="both or neither of --prompt and --file", expected="one of them", do="Give --prompt TEXT or --file F.")
    output().print(view.side_by_side(runs.compare(Run.open(directory), prompt=prompt, file=file)))


def publish(directory: Path, recipe: Path | None, check: bool) -> bool:
    """Publishes, or only checks; prints each duty with whether it is met, and returns whether all are."""
    settled = Recipe.from_yaml(recipe) if recipe is not None else None
    if check:
        published = publishing.check(directory, recipe=settled)
    else:
        published = publishing.publish(directory, recipe=settled, observer=view.Screen(errors()))
    output().print(_account(published))
    return not published.unmet


def export(directory: Path, out: Path, quantize: serving.Quantisation) -> None:
    """Writes the GGUF file; prints where it is, and what is to be known of it."""
    exported = optional.load("stillroom.models.export_gguf", extra="train").export_gguf(directory, out, quantize=quantize)
    _print_notes(exported.notes)
    print(f"Wrote {out} ({out.stat().st_size:,} bytes)")


def serve(
    student: Path,
    port: int,
    context: int | None,
    parallel: int,
    threads: int | None,
    quantize: serving.Quantisation,
    backend: Literal["auto", "llama.cpp", "vllm"],
) -> None:
    """Serves until it is asked to stop. Whoever reads its output can ask the server once the last line is there."""
    threads = threads or max(1, len(os.sched_getaffinity(0)) // 2)
    settings = serving.ServerSettings(port=port, context=context, parallel=parallel, threads=threads, quantize=quantize)
    with serving.started(student, settings, serving.choose_backend(backend)) as server, StopRequest("Start it again.") as stop:
        _print_notes(server.notes)
        print(f"{server.model} is served by {server.backend} at {server.base_url}. Ctrl-C stops it. Ask it:\n{server.curl()}", flush=True)
        server.until(stop)


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"Note: {note}.", file=sys.stderr)


def _account(published: publishing.Published) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("student", Text(f"{published.name}, in {published.directory}"))
    table.add_row("licence", Text(f"{published.licence.licence} is proposed: {published.licence.why}"))
    for item in published.items:
        table.add_row("met" if item.met else Text("NOT MET", style="red"), Text(item.what if item.met else f"{item.what}. {item.do}"))
    table.add_row("files", Text(", ".join(published.files)))
    return table


def output() -> Console:
    """Standard output."""
    return Console()


def errors() -> Console:
    """Standard error."""
    return Console(stderr=True)
