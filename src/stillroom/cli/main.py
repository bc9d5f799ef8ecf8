"""The commands. Exit codes: 0 done, 2 bad input, 3 allowed with obligations, 4 denied by the terms, 5 terms unknown, 130 interrupted and resumable."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import stillroom
from stillroom.cli.later import Later
from stillroom.cli.terms import app as terms
from stillroom.core.errors import StillroomError
from stillroom.core.launch import EndedElsewhere, launched

if TYPE_CHECKING:
    from stillroom.cli import commands, importing, probing
else:
    commands = Later("stillroom.cli.commands")
    importing = Later("stillroom.cli.importing")
    probing = Later("stillroom.cli.probing")


def _typer() -> typer.Typer:
    return typer.Typer(
        name="stillroom",
        help="Distil a large language model into a small one, and keep the book on it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


app = _typer()

# The commands that several processes do together; any other is done by the first alone.
_TOGETHER = ("run", "collect", "train", "evaluate", "report")

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML); `stillroom init` writes one.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Run directory; by default runs/NAME beside where you are.")]
StudentArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face directory, such as the student/ of a run.")]
QuantizeOption = Annotated[
    Literal["f32", "f16", "q8_0"],
    typer.Option("--quantize", help="How matrices are stored: f32 keeps every number, f16 takes half and q8_0 about a quarter of that space."),
]
StageOutOption = Annotated[Path, typer.Option("--out", help="Run directory.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Run directory.")] = Path("stillroom-demo"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the student, the prompts and the order.")] = 0,
    api: Annotated[
        bool, typer.Option("--api", help="With the teacher behind an address: llama.cpp serves it here, and only its answers are learned from.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="Port of that server; 0 is any that is free. By default 18391, or the one the run began with."),
    ] = None,
) -> None:
    """Teach a small model what the bundled teacher knows, and report how much of it was kept."""
    if port is not None and not api:
        raise typer.BadParameter("goes with --api", param_hint="--port")
    commands.demo(out, seed, api, port)


@app.command()
def init(out: Annotated[Path, typer.Option("--out", help="Where to write it.")] = Path("recipe.yaml")) -> None:
    """Write a commented recipe to start from."""
    commands.init(out)


@app.command()
def plan(
    recipe: RecipeArgument,
    out: OutOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json instead of a page.")] = False,
    cards: Annotated[bool, typer.Option("--cards", help="Say also which graphics cards it would fit on, and how; some seconds more.")] = False,
) -> None:
    """Say what would happen: signal and why, vocabularies, memory, time, terms. Makes no request, spends nothing."""
    commands.plan(recipe, out, as_json, cards)


@app.command()
def run(recipe: RecipeArgument, out: OutOption = None) -> None:
    """Plan, collect, train, evaluate, report; run again with the same --out to resume."""
    commands.finish(commands.stage(recipe, out, "reported"))


@app.command()
def pilot(
    recipe: RecipeArgument,
    out: OutOption = None,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=1, help="How many prompts to buy the answers to.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Buy a few answers, for the run in --out, and say from them what the whole collection will cost, with an interval."""
    commands.pilot(recipe, out, rows, as_json)


@app.command()
def collect(
    recipe: RecipeArgument,
    out: StageOutOption,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard", metavar="I/N", help="Only buy what the I-th of N machines is to buy of an endpoint; `stillroom merge` makes one of them."
        ),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain", metavar="KEY", help="Ask nobody: say what is known of this call (the beginning of its key will do), and what it differs in."
        ),
    ] = None,
) -> None:
    """Ask the teacher: answers and targets for every prompt."""
    if explain is not None:
        probing.explain(recipe, out, explain)
    elif shard is None:
        commands.stage(recipe, out, "collected")
    else:
        commands.collect_shard(recipe, out, shard)


@app.command()
def train(recipe: RecipeArgument, out: StageOutOption) -> None:
    """Train the student on what was collected."""
    commands.stage(recipe, out, "trained", needs="collected")


@app.command()
def evaluate(recipe: RecipeArgument, out: StageOutOption) -> None:
    """Measure teacher, student and baseline on the same items."""
    commands.stage(recipe, out, "evaluated", needs="trained")


@app.command()
def report(recipe: RecipeArgument, out: StageOutOption) -> None:
    """Write report.json and report.html, and print the main figures."""
    commands.finish(commands.stage(recipe, out, "reported", needs="evaluated"))


@app.command()
def compare(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory with a trained student.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="One prompt.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A .jsonl or .parquet file of prompts.")] = None,
) -> None:
    """Show teacher and student side by side."""
    commands.compare(directory, prompt, file)


@app.command()
def publish(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a finished run.")],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="The run's recipe with another `intent`: a name or a release settled since.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing: only say what is there and what is missing; exit code 2 where something is.")
    ] = False,
) -> None:
    """Write what the student must carry when it is given away (model card, NOTICE, licences), and check that all of it is there."""
    if not commands.publish(directory, recipe, check):
        raise typer.Exit(2)


@app.command()
def export(
    directory: StudentArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.")],
    form: Annotated[Literal["gguf"], typer.Option("--format", help="What to write: gguf, which llama.cpp reads.")] = "gguf",
    quantize: QuantizeOption = "f32",
) -> None:
    """Write a student (or any Llama- or Qwen3-shaped Hugging Face directory) as one file for another engine."""
    commands.export(directory, out, quantize)


@app.command()
def serve(
    student: Annotated[Path, typer.Argument(metavar="DIR", help="A student's directory, any Hugging Face directory, or a .gguf file.")],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on this machine's own address; 0 takes any that is free.")] = 8080,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Tokens of one request with its answer; by default requests at once share the student's own."),
    ] = None,
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="Requests that are answered at once.")] = 4,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="llama.cpp's threads; by default half of the cores. More than are idle is slower than one.")
    ] = None,
    quantize: QuantizeOption = "f32",
    backend: Annotated[
        Literal["auto", "llama.cpp", "vllm"], typer.Option("--backend", help="The server; auto is llama.cpp where it is installed, else vLLM.")
    ] = "auto",
) -> None:
    """Serve a student behind an OpenAI-compatible address until Ctrl-C, and print a curl line that asks it."""
    commands.serve(student, port, context, parallel, threads, quantize, backend)


@app.command("import")
def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A .jsonl or .parquet file of stored completions, fine-tuning conversations, or pairs of prompt and answer."
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="Where to write the prompts with their answers, as JSON lines.")],
    rejected: Annotated[
        Path | None, typer.Option("--rejected", help="Where to write the rows that could not be used: row, reason, evidence.")
    ] = None,
) -> None:
    """Turn answers that are there already into prompts with answers, for a recipe with prompts.answers: given."""
    importing.import_(file, to, rejected)


@app.command()
def probe(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where OpenAI clients are pointed, such as https://host/v1.")],
    model: Annotated[str, typer.Option("--model", metavar="M", help="The model's name at that endpoint.")],
    route: Annotated[Literal["chat", "completions"], typer.Option("--route", help="The route that answers are to be collected from.")] = "chat",
    key_variable: Annotated[
        str | None, typer.Option("--key-variable", metavar="NAME", help="The environment variable that holds the key; without it no key is sent.")
    ] = None,
    allow_http: Annotated[
        bool, typer.Option("--allow-http", help="Let key and prompts go to another machine in clear, over a network that is yours.")
    ] = False,
    access: Annotated[
        str | None,
        typer.Option("--access", help="Who serves it: weights (you, from its weights), api:PROVIDER (its maker), host:NAME (somebody else)."),
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", metavar="ID", help="What the model is under, as `terms search` finds it; own for one of yours.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="RECIPE", help="A recipe whose intent and terms hold, where the options do not say.")
    ] = None,
    prices: Annotated[Path | None, typer.Option("--prices", metavar="FILE", help="A YAML file of prices, which --max-money needs.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=0, help="The most tokens that this command may spend; without it 50,000, and 5 for each word of --context-test."
        ),
    ] = None,
    max_money: Annotated[str | None, typer.Option("--max-money", metavar="N", help="The most money, in the currency of the prices.")] = None,
    store: Annotated[
        Path, typer.Option("--store", metavar="FILE", help="The request store, where calls, answers and the report are kept; made if missing.")
    ] = Path("requests.sqlite"),
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="DIR", help="The model's tokenizer, so that ids are checked too; needs stillroom[train].")
    ] = None,
    context_test: Annotated[
        int | None,
        typer.Option("--context-test", metavar="WORDS", min=1, help="Send one prompt of so many words, more than the context, to see what happens."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Buy everything anew instead of reading what was found before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a page.")] = False,
) -> None:
    """Find out by a few cheap calls what an endpoint really honours. Asks the terms first; keeps every call; a second time reads what was found."""
    options = probing.Options(url, model, route, key_variable, allow_http, access, licence, recipe, prices, max_tokens, max_money, store, tokenizer)
    probing.probe(options, context_test, again, as_json)


@app.command()
def requests(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A request store (.sqlite) of a probe or a collection; it may be in use.")],
    explain: Annotated[
        str | None,
        typer.Option("--explain", metavar="KEY", help="Say what is known of this call (the beginning of its key will do), and what it differs in."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say where the rows of a request store are, what was spent and what is reserved, or why a call is not one that was made before."""
    probing.requests(store, explain, as_json)


@app.command()
def merge(
    stores: Annotated[
        list[Path], typer.Argument(metavar="STORE...", help="Request stores (.sqlite) of several machines, each with the files beside it.")
    ],
    into: Annotated[
        Path, typer.Option("--into", metavar="FILE", help="The request store to take them into, such as RUN/requests.sqlite; made if missing.")
    ],
) -> None:
    """Make one request store of those of several machines (`collect --shard`): answers, log-probabilities and accounts, each once."""
    if not probing.merge(stores, into):
        raise typer.Exit(2)


app.add_typer(terms)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(stillroom.__version__)


def main() -> None:
    """Runs the command line; every StillroomError becomes its text on standard error and its exit code."""
    if launched().rank > 0 and not set(sys.argv[1:2]) & set(_TOGETHER):
        return
    try:
        # A command that ends with typer.Exit hands its exit code back; the others hand back nothing.
        code = _app_for(sys.argv[1:])(standalone_mode=False)
    except StillroomError as error:
        _errors().print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except EndedElsewhere as error:
        # torchrun ends all when it sees one end; the process that says why should have said it by then.
        time.sleep(1.0)
        sys.exit(error.exit_code)
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
    if code:
        sys.exit(code)


def _app_for(words: list[str]) -> typer.Typer:
    """The app; for `terms ...` one without all other commands, which take time to build and are not asked for."""
    if words[:1] != [terms.info.name]:
        return app
    alone = _typer()
    alone.add_typer(terms)
    return alone


def _errors() -> Any:
    """Standard error as a rich console, loaded where there is something to say."""
    return import_module("rich.console").Console(stderr=True)
