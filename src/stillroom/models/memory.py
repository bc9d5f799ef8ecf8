"""Recognising that a device has run out of memory, whatever it is called there."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's and MPS's own error, for Python's MemoryError, and for the CPU allocator's RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text or "out of memory" in text)
