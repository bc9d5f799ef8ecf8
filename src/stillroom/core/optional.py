"""The one door to what the base install may lack: a missing optional package becomes an error that names the extra to install."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
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
        raise _missing(missing, extra) from error


def require(module: str, *, extra: str) -> None:
    """Raises like `load` where `module`, a top-level package, is not installed; imports nothing."""
    if find_spec(module) is None:
        raise _missing(module, extra)


def _missing(package: str, extra: str) -> StillroomError:
    return StillroomError(
        "missing-extra", found=f"no package `{package}`", expected=f"the extra `{extra}`", do=f"Install it: pip install 'stillroom[{extra}]'"
    )
