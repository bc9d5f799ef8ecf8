"""The book: one chained entry per record and stage. The format is documented in `stillroom.ledger.entries`."""

from stillroom.ledger.chain import Head
from stillroom.ledger.entries import (
    Access,
    Circumstances,
    Collected,
    Entry,
    Frozen,
    PromptSource,
    Response,
    Stage,
    Trained,
    commitment,
    leaf_hash,
)
from stillroom.ledger.log import Ledger, verify_ledger

__all__ = [
    "Access",
    "Circumstances",
    "Collected",
    "Entry",
    "Frozen",
    "Head",
    "Ledger",
    "PromptSource",
    "Response",
    "Stage",
    "Trained",
    "commitment",
    "leaf_hash",
    "verify_ledger",
]
