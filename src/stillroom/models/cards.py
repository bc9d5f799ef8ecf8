"""Which graphics cards a pair of models fits on, and with which settings: the terms of `estimate`, for devices that need not be here.

What is measured for it are copies of both models on this machine's processor, in the arithmetic of the card, with every tensor followed; buffers that only
a GPU has are counted by the rules that make them. Nothing of it has been compared with a card's own figures yet where no dated result says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from stillroom.models.estimate import Measured, Workload, measure, peak_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A graphics card by the memory that is printed on it, and what of that a process can have."""

    name: str
    usable_bytes: int


# What PyTorch finds free on an H100 and an H200 before anything is there.
CARDS = (Card(name="80 GB", usable_bytes=78 * 2**30), Card(name="141 GB", usable_bytes=139 * 2**30))
# The allocator's gaps, the libraries' own workspaces, and what the estimate does not know.
SHARE = 0.9

_LIGHTER = "training.gradient_checkpointing: true"
_OFFLOADED = "training.optimiser_offload: true"
_CUT = "hardware.parallel: shard"
_EIGHT_BITS = "teacher.dtype: int8"
_PARTS = (2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a pair fits on cards of one kind: with which settings beyond the recipe's, how many cards, and the largest micro-batch of each; or that it
    does not, with what comes nearest. `peak_bytes` are those of the first card, by stage.
    """

    card: str
    usable_bytes: int
    fits: bool
    cards: int
    settings: tuple[str, ...]
    micro_batch: int
    peak_bytes: dict[str, int]


def fits(work: Workload, *, cards: Sequence[Card] = CARDS, measured: Callable[[Workload], Measured] = measure) -> list[Fit]:
    """For each card the first of a fixed order of ways that fits: as it is, then what costs time, then more cards, then what costs exactness.

    `work` is a run on a GPU. `measured` probes a workload on this machine.
    """
    found: dict[bool, Measured] = {}

    def probed(way: Workload) -> Measured:
        if way.recomputed not in found:
            found[way.recomputed] = measured(replace(way, device=torch.device("cpu"), parts=1))
        return found[way.recomputed]

    return [_fit(card, work, probed) for card in cards]


def _fit(card: Card, work: Workload, probed: Callable[[Workload], Measured]) -> Fit:
    nearest: Fit | None = None
    for settings, way in _ways(work):
        micro_batch = max(1, way.sequences_per_step // way.parts)
        while True:
            peaks = peak_bytes(replace(way, micro_batch=micro_batch), probed(way))
            most = max(peaks.values())
            one = Fit(
                card=card.name,
                usable_bytes=card.usable_bytes,
                fits=most <= SHARE * card.usable_bytes,
                cards=way.parts,
                settings=settings,
                micro_batch=micro_batch,
                peak_bytes={stage: round(peak) for stage, peak in peaks.items()},
            )
            if one.fits:
                return one
            if micro_batch == 1:
                break
            micro_batch //= 2
        if nearest is None or most < max(nearest.peak_bytes.values()):
            nearest = one
    assert nearest is not None, "there is always a way to try"
    return nearest


def _ways(work: Workload) -> Iterator[tuple[tuple[str, ...], Workload]]:
    """Settings that are not the recipe's, and the work with them, the least change first."""
    lighter = replace(work, recomputed=True)
    changed = () if work.recomputed else (_LIGHTER,)
    ways = [((), work), (changed, lighter)]
    if not work.optimiser_offload:
        ways.append(((*changed, _OFFLOADED), replace(lighter, optimiser_offload=True)))
    if work.lora is None and not work.optimiser_offload:  # models.parallel refuses these in parts
        ways += [((*changed, _CUT), replace(lighter, parts=parts)) for parts in _PARTS]
    seen = []
    for settings, way in [*ways, *(((*settings, _EIGHT_BITS), replace(way, teacher_int8=True)) for settings, way in ways)]:
        if way not in seen:
            seen.append(way)
            yield settings, way
