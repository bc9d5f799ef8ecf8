"""What `stillroom import` does: it converts, and says what became of every row."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from stillroom.data.importing import REJECTIONS, import_answers


def import_(file: Path, to: Path, rejected: Path | None) -> None:
    """Imports `file` and prints the account."""
    counts = import_answers(file, to, rejected_to=rejected)
    say = Console().print
    say(f"{counts.imported} of {counts.rows} rows of {counts.source} are in {to}", soft_wrap=True, highlight=False, markup=False)
    for reason, count in sorted(counts.rejected.items(), key=lambda one: -one[1]):
        say(f"{count} rejected, {reason}: {REJECTIONS[reason]}", soft_wrap=True, highlight=False, markup=False)
