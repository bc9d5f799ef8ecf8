"""Modules that are loaded when they are first used, so that a command takes the time of what it needs and no more."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Later:
    """Stands for the module of this name. Beside it stands the same import under TYPE_CHECKING, so that its uses are checked."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
