"""Stopping cleanly: the first Ctrl-C asks, the work stops at its next safe point; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from stillroom.core.errors import Interrupted


class StopRequest:
    """Inside the with block SIGINT and SIGTERM set a flag; `check` turns the flag into Interrupted where it is safe to stop.

    Outside the main thread signals cannot be caught, and nothing is.
    """

    def __init__(self, how_to_resume: str) -> None:
        self._how_to_resume = how_to_resume
        self._asked = False
        self._previous: dict[int, object] = {}

    @property
    def asked(self) -> bool:
        """True once a signal has come."""
        return self._asked

    def ask(self) -> None:
        """As if a signal had come: it came to another process of the run."""
        self._asked = True

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def check(self, where: str) -> None:
        """Raises Interrupted if a signal has come; everything before `where` is on disk."""
        if self._asked:
            raise Interrupted("interrupted", found=f"a request to stop; stopped {where}", do=self._how_to_resume)
