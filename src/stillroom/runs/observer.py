"""What a run tells whoever watches it. The command line draws it; by default nobody watches."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Called by the stages as they go; must not raise."""

    def stage(self, name: str, detail: str) -> None:
        """A stage begins."""
        ...

    def progress(self, done: int, total: int, unit: str, fields: dict[str, str]) -> None:
        """`done` of `total` units of the current stage; `fields` are short texts to show beside it."""
        ...

    def note(self, text: str) -> None:
        """Something a person should know: a choice made, a path degraded."""
        ...


class Silent:
    """Watches nothing."""

    def stage(self, name: str, detail: str) -> None: ...

    def progress(self, done: int, total: int, unit: str, fields: dict[str, str]) -> None: ...

    def note(self, text: str) -> None: ...
