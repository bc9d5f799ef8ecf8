"""What the card of a model or a dataset says of its licence, read from a directory or from the Hugging Face cache by plain paths.

No Hugging Face library is needed, and nothing is fetched: what is not on this machine has no card here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import yaml

# What a card says when it does not say: "other" stands for terms that the hub has no id for.
_UNTOLD = frozenset({"", "other", "unknown", "none", "n/a"})
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id (owner/name, or a name alone); whether the hub has it is another matter."""
    return _HUB_ID.fullmatch(name) is not None


def hub_id_of(directory: Path) -> str | None:
    """The hub id that a snapshot in a Hugging Face cache is of; None where `directory` is something else."""
    kind, *parts = directory.parent.parent.name.split("--") if directory.parent.name == "snapshots" else [""]
    return "/".join(parts) if kind in ("models", "datasets") and parts else None


def cached_snapshot(hub_id: str, revision: str | None, *, kind: Literal["models", "datasets"] = "models") -> Path | None:
    """Where the Hugging Face cache has that revision (None: main) of a model or dataset; None where it does not."""
    repository = hub_cache(os.environ) / "--".join([kind, *hub_id.split("/")])
    revision = revision or "main"
    if ".." in Path(revision).parts or Path(revision).is_absolute():
        return None
    commit = revision
    with suppress(OSError, UnicodeDecodeError):  # a commit has no such file
        commit = (repository / "refs" / revision).read_text(encoding="ascii").strip()
    snapshot = repository / "snapshots" / commit
    # A cache that this user may not look into is one that has nothing for it.
    return snapshot if commit and os.path.isdir(snapshot) else None


def hub_cache(environment: Mapping[str, str]) -> Path:
    """The folder of the Hugging Face cache, by the variables that its own library looks at, in the same order."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return Path(environment[name]).expanduser()
    home = environment.get("HF_HOME") or str(Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(home).expanduser() / "hub"


def declared_licence(directory: Path) -> str | None:
    """`license` from the front matter of the card in `directory`, the name of the licence where that says `other`; None where the card does not tell."""
    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    parts = text.split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        front = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that is none is a ValueError
        return None
    if not isinstance(front, dict) or not front.get("license") or isinstance(front["license"], dict):
        return None
    licence = front["license"]
    if licence == "other" and front.get("license_name"):
        licence = front["license_name"]
    told = ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence)
    return None if told.lower() in _UNTOLD else told
