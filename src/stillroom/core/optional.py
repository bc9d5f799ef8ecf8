"""The one door to what the base install may lack: a missing optional package becomes an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from stillroom.core.errors import StillroomError


def load(module: str, *, extra: str) -> ModuleType:
    """Imports `module`. Raises StillroomError 'missing-extra' where a package that belongs to `extra` is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", "stillroom"):
            raise
        raise StillroomError(
            "missing-extra", found=f"no package `{missing}`", expected=f"the extra `{extra}`", do=f"Install it: pip install 'stillroom[{extra}]'"
        ) from error
