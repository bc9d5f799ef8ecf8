"""Several processes that do one run together, as `torchrun` starts them: which of them this one is. No torch here.

`torchrun` gives each process RANK, WORLD_SIZE and LOCAL_RANK in its environment. Without them, a process is alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """Process `rank` of `size`; `local_rank` counts those of this machine, and is the number of the device that it takes."""

    rank: int
    size: int
    local_rank: int


class EndedElsewhere(Exception):
    """Another process of the run failed and says why: this one ends with `exit_code` and says nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this run failed, and says why")
        self.exit_code = exit_code


def launched() -> Launch:
    """This process, by its environment."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or size is None or int(size) < 2:
        return Launch(0, 1, 0)
    return Launch(int(rank), int(size), int(os.environ.get("LOCAL_RANK", rank)))
