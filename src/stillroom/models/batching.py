"""Sequences of unequal length as one rectangle.

Right padding under causal attention: a scored row never sees what comes after it, so no attention mask is needed and the padding's id does
not matter. B sequences, T positions, R scored rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from stillroom.core.identities import TokenIds, TokenSequence


@dataclass(frozen=True, slots=True)
class Rectangle:
    """`ids_BT` (int64) up to the last scored row; `rows_R` (int64) the scored rows as indices into the flattened B * T, sequence by sequence."""

    ids_BT: torch.Tensor
    rows_R: torch.Tensor


def pack_rectangle(sequences: Sequence[TokenSequence], device: torch.device) -> Rectangle:
    """Right-pads `sequences`; positions after the last scored row of all are cut off, since no row of interest depends on them."""
    scored = [sequence.scored_rows for sequence in sequences]
    width = max((rows[-1] + 1 for rows in scored if rows), default=1)
    ids = torch.zeros((len(sequences), width), dtype=torch.int64)
    for index, sequence in enumerate(sequences):
        part = sequence.ids[:width]
        ids[index, : len(part)] = torch.tensor(part, dtype=torch.int64)
    rows = [index * width + row for index, rows_of in enumerate(scored) for row in rows_of]
    return Rectangle(ids.to(device), torch.tensor(rows, dtype=torch.int64, device=device))


def left_padded(prompts: Sequence[TokenIds], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts as a rectangle that ends where each prompt ends, and its attention mask (None where no padding was needed)."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for index, prompt in enumerate(prompts):
        ids[index, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[index, width - len(prompt) :] = 1
    return ids.to(device), None if bool(mask.all()) else mask.to(device)


def by_length(lengths: Sequence[int], at_once: int) -> Iterator[list[int]]:
    """Indices in groups of at most `at_once`, similar lengths together, so that little is padded; the order is a function of lengths alone."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    for start in range(0, len(order), at_once):
        yield order[start : start + at_once]
