"""Memory that has run out, whatever that is called on a device, and memory that is no longer needed."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's and MPS's own error, for Python's MemoryError, and for the CPU allocator's RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text or "out of memory" in text)


def release_memory() -> None:
    """Gives what is no longer referenced back to the system or the device.

    glibc keeps freed blocks for itself; what one stage held would be counted against the next, which asks for blocks of other sizes.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """The quick part of it, for within a stage: what glibc keeps goes back to the system. No-op elsewhere."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without malloc_trim (musl)
            ctypes.CDLL(None).malloc_trim(0)
