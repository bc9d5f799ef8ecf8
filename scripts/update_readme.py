"""Put a real run's output and the stored results into README.md.

    python scripts/update_readme.py RUN     from a finished run directory of the demo (it writes its report beside the benchmarks)
    python scripts/update_readme.py --run   runs `stillroom demo` first, in a temporary directory
    python scripts/update_readme.py         only from what is stored: benchmarks/results

A test holds the README equal to what this writes.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from stillroom.cli.view import report_page
from stillroom.runs.report import Report

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
STORED = RESULTS / "readme-report.json"
WIDTH = 132

OUTPUT = ("<!-- demo-output:begin -->", "<!-- demo-output:end -->")
TABLE = ("<!-- results:begin -->", "<!-- results:end -->")


def terminal_text(report: Report) -> str:
    """What `stillroom report` prints, on a terminal of `WIDTH` columns without colours."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(report_page(report))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


def pasted(readme: str) -> str:
    """The demo output that a README shows; empty where it shows none."""
    fenced = re.search(r"```text\n(.*?)\n```", between(readme, OUTPUT), re.DOTALL)
    return fenced[1] if fenced else ""


def between(text: str, markers: tuple[str, str]) -> str:
    begin, end = text.index(markers[0]) + len(markers[0]), text.index(markers[1])
    return text[begin:end]


def put_between(text: str, markers: tuple[str, str], content: str) -> str:
    return text.replace(markers[0] + between(text, markers) + markers[1], f"{markers[0]}\n{content}\n{markers[1]}")


def with_output(readme: str, report: Report) -> str:
    return put_between(readme, OUTPUT, f"```text\n{terminal_text(report)}\n```")


def with_results(readme: str) -> str:
    """The README with a row for each seed of each benchmark of the demo in benchmarks/results, newest first."""
    rows = [row for path in sorted(RESULTS.glob("*-demo.json"), reverse=True) for row in _rows(path)]
    if not rows:
        return put_between(readme, TABLE, "No benchmark has been run yet. `make bench` writes one.")
    head = (
        "| demo | teacher | student | label-only | text-only | gap recovered | parameters | tokens/s, batch 1 / 32 | commit | hardware |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    return put_between(readme, TABLE, "\n".join([head, *rows]))


def _rows(path: Path) -> list[str]:
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return [_row(result, tree["environment"], f"[{path.stem[:10]}](benchmarks/results/{path.name})") for result in tree["seeds"]]


def _row(result: dict[str, Any], where: dict[str, Any], link: str) -> str:
    match, ratios = result["exact_match"], result["ratios"]
    cells = [
        f"{link}, seed {result['seed']}",
        *(_percent(match[name]) for name in ("teacher", "student", "label_only")),
        _percent(result.get("text_only", {}).get("exact_match", {"absent": ""})),
        _percent(result["gap_recovered"]),
        _times(ratios["parameters"]),
        f"{_times(ratios['tokens_per_second'])} / {_times(ratios['tokens_per_second_batch_32'])}",
        f"`{(where.get('commit') or 'none')[:10]}`" + (" with changes" if where.get("uncommitted_changes") else ""),
        ", ".join(filter(None, [where.get("cpu"), f"{where.get('cores')} cores", where.get("accelerator")])),
    ]
    return "| " + " | ".join(cells) + " |"


def _percent(number: dict[str, Any]) -> str:
    if "absent" in number:
        return "absent"
    interval = f" [{100 * number['low']:.1f}, {100 * number['high']:.1f}]" if "low" in number else ""
    return f"{100 * number['value']:.1f}{interval} %"


def _times(number: dict[str, Any]) -> str:
    return "absent" if "absent" in number else f"{number['value']:.1f}x"


def store(run: Path) -> Report:
    """Keeps the run's report beside the benchmarks, without this machine's paths, and returns it."""
    text = (run / "report.json").read_text(encoding="utf-8")
    for path, name in ((str(run.resolve()), "demo-run"), (str(run), "demo-run"), (f"{ROOT}/", "")):
        text = text.replace(path, name)
    report = Report.model_validate_json(text)
    RESULTS.mkdir(parents=True, exist_ok=True)
    STORED.write_text(json.dumps(report.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, metavar="RUN", help="a finished run directory of the demo")
    parser.add_argument("--run", action="store_true", help="run the demo first")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = arguments.directory
        if arguments.run:
            directory = Path(folder) / "demo-run"
            subprocess.run([Path(sys.executable).with_name("stillroom"), "demo", "--out", directory], check=True)
        if directory is not None:
            store(directory)
    text = README.read_text(encoding="utf-8")
    if STORED.exists():
        text = with_output(text, Report.model_validate_json(STORED.read_text(encoding="utf-8")))
    README.write_text(with_results(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
