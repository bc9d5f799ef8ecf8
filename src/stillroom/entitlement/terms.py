"""What the terms of a teacher say, as far as somebody has read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from stillroom.core.hashing import canonical_json, sha256_hex

Distillation: TypeAlias = Literal["allowed", "allowed-with-obligations", "denied", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TermsStatement:
    """One person's reading of one set of terms, for one purpose.

    `distillation` says whether outputs may train another model; `document` where the text can be read; `read_on` when it was, YYYY-MM-DD;
    `obligations` what the student must then carry.
    """

    licence: str
    distillation: Distillation
    document: str | None = None
    read_on: str | None = None
    obligations: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """SHA-256 of the statement's canonical JSON: what a ledger entry refers to."""
        return sha256_hex(canonical_json(asdict(self)))

    @property
    def evidence(self) -> str:
        """What the statement rests on, as a clause."""
        return f"{self.document or 'no document named'}, {f'read on {self.read_on}' if self.read_on else 'reading not dated'}"


# Names in use for one licence: SPDX ids on the right, and where SPDX has none the id that model cards on the Hugging Face hub use.
_ALIASES = {
    "apache": "apache-2.0",
    "apache2": "apache-2.0",
    "apache-2": "apache-2.0",
    "apache2.0": "apache-2.0",
    "apache-license-2.0": "apache-2.0",
    "apache-license-version-2.0": "apache-2.0",
    "mit-license": "mit",
    "bsd-3": "bsd-3-clause",
    "bsd-2": "bsd-2-clause",
    "cc-by-4": "cc-by-4.0",
    "cc-by-nc-4": "cc-by-nc-4.0",
    "cc-by-sa-4": "cc-by-sa-4.0",
    "llama-2": "llama2",
    "llama-2-community": "llama2",
    "llama-3": "llama3",
    "llama-3-community": "llama3",
    "llama-3.1": "llama3.1",
    "llama-3.1-community": "llama3.1",
    "llama-3.2": "llama3.2",
    "llama-3.2-community": "llama3.2",
    "llama-3.3": "llama3.3",
    "llama-3.3-community": "llama3.3",
    "llama-4": "llama4",
    "llama-4-community": "llama4",
    "gemma-terms-of-use": "gemma",
    "gpl-3.0-only": "gpl-3.0",
    "agpl-3.0-only": "agpl-3.0",
}
# What a model card says when it does not say: "other" stands for terms that the hub has no id for.
_UNTOLD = frozenset({"", "other", "unknown", "none", "n-a"})


def licence_id(name: str | None) -> str | None:
    """One name for each licence, so that two can be compared; None where `name` does not tell which licence it is."""
    if name is None:
        return None
    written = "-".join(name.lower().replace("_", " ").replace(",", " ").replace("-", " ").replace("/", " ").split())
    if written in _UNTOLD:
        return None
    shorter = written.removesuffix("-agreement").removesuffix("-license").removesuffix("-licence")
    return _ALIASES.get(written) or _ALIASES.get(shorter) or shorter
