"""Sequences of unequal length as one rectangle, or as one line.

Right padding under causal attention: a scored row never sees what comes after it, so no attention mask is needed and the padding's id does
not matter. B sequences, T positions, R scored rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

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


@dataclass(frozen=True, slots=True)
class Line:
    """Sequences end to end, the shortest first: `ids_1T` and `positions_1T` (int64), `rows_R` (int64) the scored rows as indices into T, in the order that
    the sequences were given in, and `lengths`, ascending, which sum to T.
    """

    ids_1T: torch.Tensor
    positions_1T: torch.Tensor
    rows_R: torch.Tensor
    lengths: tuple[int, ...]


def lay_end_to_end(sequences: Sequence[TokenSequence], device: torch.device) -> Line:
    """Every sequence up to its own last scored row; one without any is left out. Where none has any, one token stands for them."""
    scored = [sequence.scored_rows for sequence in sequences]
    order = sorted((index for index, rows in enumerate(scored) if rows), key=lambda index: scored[index][-1])
    lengths = [scored[index][-1] + 1 for index in order]
    starts = dict(zip(order, accumulate(lengths, initial=0), strict=False))
    ids = [token for index, length in zip(order, lengths, strict=True) for token in sequences[index].ids[:length]]
    positions = [position for length in lengths for position in range(length)]
    rows = [starts[index] + row for index, rows_of in enumerate(scored) for row in rows_of]
    ids_1T, positions_1T, rows_R = (torch.tensor(numbers, dtype=torch.int64).to(device) for numbers in (ids or [0], positions or [0], rows))
    return Line(ids_1T[None], positions_1T[None], rows_R, tuple(lengths) or (1,))


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
