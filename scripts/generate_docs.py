"""Write the generated pages of docs/reference: cli.md, recipe.md, plan.md, cards.md, report.md, report.schema.json, fake-endpoint.md,
servers.md, errors.md.

    python scripts/generate_docs.py [--check]

`--check` writes nothing and ends with 1 if a page is not what it would write. A contract test holds the pages equal.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import typer
import typer.core
import typer.main
from pydantic import BaseModel

from stillroom.core import errors
from stillroom.runs.plan import Plan
from stillroom.runs.recipe import Recipe
from stillroom.runs.report import Report

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
NOTE = "<!-- Written by scripts/generate_docs.py (`make docs`); edit the source it is made from. -->"

JsonSchema: TypeAlias = dict[str, Any]


# --- tables -------------------------------------------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table; bars and line breaks inside a cell are made harmless."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]


def page(title: str, introduction: str, body: list[str]) -> str:
    return "\n".join([NOTE, "", f"# {title}", "", introduction, "", *body]).rstrip() + "\n"


# --- recipe and report --------------------------------------------------------------------------------------------------------------


def type_text(schema: JsonSchema, link: Callable[[str], str]) -> str:
    """A JSON Schema type in words."""
    if "$ref" in schema:
        return link(schema["$ref"].rsplit("/", 1)[1])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(type_text(part, link) for part in schema["anyOf"])
    kind = schema.get("type", "any")
    if kind == "null":
        return "nothing"
    if kind == "array":
        items = schema.get("items") or {}
        if "prefixItems" in schema:
            return "list of " + ", ".join(type_text(part, link) for part in schema["prefixItems"])
        return f"list of {type_text(items, link)}" + (f", at least {schema['minItems']}" if schema.get("minItems") else "")
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"mapping of names to {type_text(schema['additionalProperties'], link)}"
    words = {"string": "text", "boolean": "true or false", "object": "mapping"}
    bounds = {"exclusiveMinimum": "> ", "minimum": ">= ", "exclusiveMaximum": "< ", "maximum": "<= "}
    limits = [f"{sign}{schema[key]:g}" for key, sign in bounds.items() if key in schema]
    return " ".join([words.get(kind, kind), ", ".join(limits)]).strip()


def default_text(schema: JsonSchema, required: bool) -> str:
    if required:
        return "required"
    default = schema.get("default")
    if "default" not in schema or isinstance(default, dict) or (isinstance(default, list) and any(isinstance(part, dict) for part in default)):
        return "see there"
    return "nothing" if default is None else f"`{json.dumps(default)}`"


def fields_table(schema: JsonSchema, definitions: JsonSchema, link: Callable[[str], str]) -> list[str]:
    """One row for each field; a field without words of its own has those of the section it holds."""
    required = set(schema.get("required", ()))
    rows = []
    for name, field in schema.get("properties", {}).items():
        words = field.get("description") or " ".join(definitions[target].get("description", "") for target in _targets(field)[:1])
        rows.append((f"`{name}`", type_text(field, link), default_text(field, name in required), words))
    return table(("key", "value", "default", "what it is"), rows)


def recipe_page() -> str:
    """One section for each section of the recipe, headed by its path in the YAML."""
    schema = Recipe.model_json_schema()
    definitions = schema.get("$defs", {})
    paths = dict(_paths(schema, definitions, ""))

    def link(name: str) -> str:
        return f"[{paths[name]}](#{anchor(paths[name])})"

    body = fields_table(schema, definitions, link)
    for name, path in paths.items():
        body += ["", f"## {path}", "", definitions[name].get("description", ""), "", *fields_table(definitions[name], definitions, link)]
    introduction = (
        "A recipe is one YAML file, or `stillroom.Recipe` in Python: the same object. An unknown key is refused with the nearest known one. "
        "The SHA-256 of its canonical JSON (RFC 8785, defaults included) is the run's identity. `stillroom init` writes a commented one."
    )
    return page("Recipe", introduction, body)


def _paths(schema: JsonSchema, definitions: JsonSchema, prefix: str) -> Iterator[tuple[str, str]]:
    """Each definition's name and its path from the root, in the order of the fields."""
    for name, field in schema.get("properties", {}).items():
        for target in _targets(field):
            path = f"{prefix}{name}"
            yield target, path
            yield from _paths(definitions[target], definitions, f"{path}.")


def _targets(field: JsonSchema) -> list[str]:
    """Names of the definitions that a field's schema refers to."""
    return re.findall(r'"#/\$defs/(\w+)"', json.dumps(field))


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def report_page() -> str:
    introduction = (
        "`report.json` of a run directory. Every number says its unit, where it came from and, where it is a sample's, how many observations stand "
        "behind it and a 95 % interval; a number that is not there is an `Absent` with the reason. "
        "The same as JSON Schema: [report.schema.json](report.schema.json)."
    )
    return page("Report", introduction, model_sections(Report))


def plan_page() -> str:
    introduction = (
        "`plan.json` of a run directory, and what `stillroom plan --json` prints. Nothing in it was measured on the run itself: it comes before."
    )
    return page("Plan", introduction, model_sections(Plan))


def cards_page() -> str:
    """The newest result of benchmarks/cards.py."""
    path = max((ROOT / "benchmarks" / "results").glob("*-cards.json"))
    result = json.loads(path.read_text(encoding="utf-8"))
    settings = result["settings"]
    introduction = (
        "Which of the usual pairs fit on a card of 80 GB and on one of 141 GB. `stillroom plan RECIPE --cards` says the same of your own pair. "
        f"{' '.join(result['caveats'])}\n\n"
        f"{settings['sequences_per_step']} sequences a step, {settings['prompt_tokens']} tokens of prompt and {settings['answer_tokens']} of answer each; student and AdamW's "
        "moments in float32, products in bfloat16, teacher in bfloat16. **Stored**: the teacher's distributions are collected first (`targets.kind: drawn`), and no teacher is "
        "there while the student learns; **live**: it is asked at every step, on the same card. Where a pair does not fit as the recipe has it, these are tried in turn, and the "
        "first that fits is named: `training.gradient_checkpointing` (time), `training.optimiser_offload` (time), `hardware.parallel: shard` on 2, 4, 8 cards, and `teacher.dtype: "
        "int8` (exactness).\n\n"
        f"From [{path.name}](../../benchmarks/results/{path.name})."
    )
    return page(
        "What fits on which card",
        introduction,
        table(("teacher", "student", "targets", *(f"cards of {card['name']}" for card in result["cards"])), _pairs(result)),
    )


def _pairs(result: dict[str, Any]) -> list[tuple[str, ...]]:
    pairs: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in result["rows"]:
        pairs.setdefault((row["teacher"], row["student"], row["targets"]), {})[row["card"]] = _fit(row)
    return [(*pair, *(of_cards[card["name"]] for card in result["cards"])) for pair, of_cards in pairs.items()]


def _fit(row: dict[str, Any]) -> str:
    stage = max(row["peak_bytes"], key=row["peak_bytes"].__getitem__)
    peak = f"{row['peak_bytes'][stage] / 1e9:.0f} GB ({stage})"
    if not row["fits"]:
        return f"does not fit: {peak}"
    number = f"{row['cards']} cards, " if row["cards"] > 1 else ""
    needed = f"; {', '.join(f'`{setting}`' for setting in row['settings'])}" if row["settings"] else ""
    return f"{number}micro-batch {row['micro_batch']}, {peak}{needed}"


def model_sections(model: type[BaseModel]) -> list[str]:
    """One section for each class, the outermost first."""
    schema = model.model_json_schema(mode="serialization")
    definitions = schema.get("$defs", {})

    def link(name: str) -> str:
        return f"[{name}](#{anchor(name)})"

    body = []
    for name, definition in [(model.__name__, schema), *definitions.items()]:
        body += [f"## {name}", "", definition.get("description", ""), "", *fields_table(definition, definitions, link), ""]
    return body


def report_schema() -> str:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema(mode="serialization")}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


# --- the rehearsal endpoint ---------------------------------------------------------------------------------------------------------


def fake_endpoint_page() -> str:
    """Every setting, fault and lie of the fake endpoint, read from the syntax tree and the comments of its settings."""
    source = (ROOT / "src" / "stillroom" / "testing" / "settings.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    body: list[str] = []
    for name, heading in (("Settings", "Settings"), ("Limit", "Each of limits")):
        body += [f"## {heading}", "", flow(ast.get_docstring(classes[name]) or ""), "", *_settings_table(classes[name]), ""]
    for name, heading in (("Fault", "Faults"), ("Lie", "Lies")):
        words = _words_after(tree, name)
        rows = [(f"`{choice}`", comment) for choice, comment in _commented_choices(source, name)]
        body += [f"## {heading}", "", words, "", *table(("name", "what happens"), rows), ""]
    introduction = (
        "`python -m stillroom.testing.fake_endpoint --config settings.yaml` is an endpoint to rehearse against, as "
        "[What an endpoint really honours](../guides/probe-an-endpoint.md) shows; in Python it is `stillroom.testing.fake_endpoint.fake_endpoint(settings)`. "
        "The same settings and the same requests always get the same answers."
    )
    return page("The rehearsal endpoint", introduction, body)


def _settings_table(section: ast.ClassDef) -> list[str]:
    """The fields with the docstring below each; those of several in a row stand at the last one."""
    rows = []
    for node, after in zip(section.body, [*section.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            default = node.value
            if isinstance(default, ast.Call):  # Field(...), Decimal("1"), frozenset()
                default = next((keyword.value for keyword in default.keywords if keyword.arg == "default"), next(iter(default.args), None))
            words = ast.literal_eval(after.value) if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            rows.append((f"`{ast.unparse(node.target)}`", f"`{ast.unparse(default)}`" if default is not None else "none", str(words)))
    return table(("setting", "default", "what it is"), rows)


def _words_after(tree: ast.Module, name: str) -> str:
    """The docstring below an assignment."""
    at = next(n for n, node in enumerate(tree.body) if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name)
    return next(str(ast.literal_eval(node.value)) for node in tree.body[at:] if isinstance(node, ast.Expr))


def _commented_choices(source: str, name: str) -> list[tuple[str, str]]:
    """The choices of a Literal with the comment behind each."""
    lines = source[source.index(f"{name}: TypeAlias = Literal[") :].split("\n]")[0].splitlines()[1:]
    return [(choice, comment) for line in lines for choice, comment in re.findall(r'^ +"([^"]+)",(?: +# (.*))?$', line)]


# --- what servers honour ------------------------------------------------------------------------------------------------------------


def servers_page() -> str:
    """The newest result of benchmarks/servers.py."""
    path = max((ROOT / "benchmarks" / "results").glob("*-servers.json"))
    result = json.loads(path.read_text(encoding="utf-8"))
    servers = result["servers"]
    findings = [{finding["name"]: finding for finding in server["findings"]} for server in servers]
    rows = [(f"`{name}`", *(_found(found[name]) for found in findings)) for name in findings[0]]
    body = table(("finding", *(server["name"] for server in servers)), rows)
    for server, found in zip(servers, findings, strict=True):
        signal = server["signal"]
        kind = f"`top_k` with k = {signal['k']}, {signal['reported']} temperature" if signal["kind"] == "top_k" else f"`{signal['kind']}`"
        body += ["", f"## {server['name']}", "", f"{server['version']}, {server['model']}; {server['settings']}. {server['calls']} calls.", ""]
        body += [f"A collection can have {kind}: {signal['why']}.", ""]
        body += table(("finding", "verdict", "evidence"), [(f"`{name}`", _verdict(one), one["evidence"]) for name, one in found.items()])
    introduction = (
        "What `stillroom probe` found on the servers that are here. [What an endpoint really honours](../guides/probe-an-endpoint.md) says what a finding means, and finds out "
        "the same of yours.\n\n"
        f"{' '.join(result['caveats'])} `python benchmarks/servers.py` asks both again; a test holds the llama.cpp that is installed to what stands here.\n\n"
        f"From [{path.name}](../../benchmarks/results/{path.name})."
    )
    return page("What servers honour", introduction, body)


def _found(finding: dict[str, Any]) -> str:
    return _verdict(finding) + ("" if finding["value"] is None else f": {finding['value']}")


def _verdict(finding: dict[str, Any]) -> str:
    return str(finding["verdict"]).replace("-", " ")


# --- errors -------------------------------------------------------------------------------------------------------------------------


def errors_page() -> str:
    """Each code with its meaning, its exit code and what the places that raise it tell the user to do."""
    raised = raising_calls()
    rows = []
    for code, meaning in errors.CODES.items():
        exits = sorted({getattr(errors, name).exit_code for name, _ in raised.get(code, ())})
        rows.append((f"[`{code}`](#{code})", meaning, ", ".join(map(str, exits))))
    body = table(("code", "what it means", "exit code"), rows)
    for code, meaning in errors.CODES.items():
        calls = raised.get(code, [])
        body += ["", f'<a id="{code}"></a>', "", f"## {code}", "", meaning]
        if calls:
            body += ["", "Raised as " + ", ".join(f"`{name}`" for name in sorted({name for name, _ in calls})) + ". What to do:", ""]
            body += [f"- {advice}" for advice in dict.fromkeys(advice if advice.strip(". ") else "The message says it." for _, advice in calls)]
    introduction = (
        "Every error that a user can mend has a code. The message says what was found, what was expected, why it matters where that is not plain, "
        "and what to do; there is no traceback. `...` stands for a value of the case at hand."
    )
    return page("Errors", introduction, body)


def raising_calls() -> dict[str, list[tuple[str, str]]]:
    """For each code the (class, advice) of every place in the source that raises it, read from the syntax trees."""
    classes = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.StillroomError)}
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted((ROOT / "src" / "stillroom").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or (name := ast.unparse(node.func).split(".")[-1]) not in classes or not node.args:
                continue
            first = node.args[0]
            advice = next((text_of(keyword.value) for keyword in node.keywords if keyword.arg == "do"), "")
            for part in (first.body, first.orelse) if isinstance(first, ast.IfExp) else (first,):
                if isinstance(part, ast.Constant):
                    found.setdefault(part.value, []).append((name, advice))
    return found


def text_of(node: ast.expr) -> str:
    """The text of a string expression, `...` for what is only known when it runs."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part) for part in parts)
        case ast.IfExp(body=one, orelse=other):
            return f"{text_of(one)} / {text_of(other)}"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left) + text_of(right)
    return "..."


# --- command line -------------------------------------------------------------------------------------------------------------------


def cli_page(app: typer.Typer) -> str:
    """The command line: every command with its arguments and options, read from the app itself."""
    group: Any = typer.main.get_command(app)
    commands = dict(_commands(group, ""))
    rows = [(f"[`stillroom {name}`](#{anchor(f'stillroom {name}')})", first_sentence(command.help)) for name, command in commands.items()]
    body = table(("command", "what it does"), rows)
    for name, command in commands.items():
        body += ["", f"## stillroom {name}", "", "    " + usage(name, command), "", flow(command.help or ""), "", *_parameters(command)]
    body += ["", "## Exit codes", "", *table(("code", "meaning"), EXIT_CODES)]
    return page("Command line", flow(group.help or ""), body)


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every command that can be given, those of a group below it."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


EXIT_CODES = [
    ("0", "done"),
    ("2", "bad input: the message carries a code, see [errors](errors.md)"),
    ("3", "only of `stillroom terms check`: allowed, with obligations"),
    ("4", "the teacher's terms deny this use"),
    ("5", "a fact about the teacher's terms is missing; the message asks for it"),
    ("130", "interrupted; the same command resumes"),
]


def usage(name: str, command: Any) -> str:
    arguments = [p for p in command.params if isinstance(p, typer.core.TyperArgument)]
    words = [value_name(p) if p.required else f"[{value_name(p)}]" for p in arguments]
    options = ["[OPTIONS]"] if len(arguments) < len(command.params) else []
    return " ".join(["stillroom", name, *options, *words])


def _parameters(command: Any) -> list[str]:
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name in ("install_completion", "show_completion"):
            continue
        default = "required" if parameter.required else "" if parameter.default is None or parameter.default is False else f"`{parameter.default}`"
        if isinstance(parameter, typer.core.TyperArgument):
            rows.append((f"`{value_name(parameter)}`", default, parameter.help or ""))
        else:
            value = "" if parameter.is_flag else f" {value_name(parameter)}"
            names = ", ".join(f"`{option}{value}`" for option in [*parameter.opts, *parameter.secondary_opts])
            rows.append((names, default, parameter.help or ""))
    return table(("parameter", "default", "what it does"), rows) if rows else []


def value_name(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def first_sentence(text: str | None) -> str:
    return (text or "").split("\n\n")[0].replace("\n", " ")


def flow(text: str) -> str:
    """Paragraphs as single lines; indented or marked blocks as they are."""
    blocks = inspect.cleandoc(text.replace("\b\n", "")).split("\n\n")
    return "\n\n".join(block if block.startswith((" ", "-", "|")) else " ".join(block.split()) for block in blocks)


# --- all of them --------------------------------------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """File name -> content of every generated page."""
    from stillroom.cli.main import app

    return {
        "cli.md": cli_page(app),
        "recipe.md": recipe_page(),
        "plan.md": plan_page(),
        "cards.md": cards_page(),
        "report.md": report_page(),
        "report.schema.json": report_schema(),
        "fake-endpoint.md": fake_endpoint_page(),
        "servers.md": servers_page(),
        "errors.md": errors_page(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if a page is stale")
    check = parser.parse_args().check
    stale = []
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, content in pages().items():
        path = REFERENCE / name
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            stale.append(name)
            if not check:
                path.write_text(content, encoding="utf-8")
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
