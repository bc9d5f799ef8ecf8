"""What a teacher is asked, and what a student may see of the answers."""

from stillroom.data.prompts import LoadedPrompts, Message, Prompt, load_prompts
from stillroom.data.transfer_set import DROP_REASONS, Candidate, Curated, Record, TransferSet, curate, freeze

__all__ = [
    "DROP_REASONS",
    "Candidate",
    "Curated",
    "LoadedPrompts",
    "Message",
    "Prompt",
    "Record",
    "TransferSet",
    "curate",
    "freeze",
    "load_prompts",
]
