"""The command line: parses, calls, prints. `main` is the `stillroom` command."""

from stillroom.cli.main import main

__all__ = ["main"]
