"""One thread ahead: what an iterator makes is made in the background, a little before it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")

_DONE = object()
# How long a thread that may not put or take anything sleeps before it looks whether it is still wanted.
_PATIENCE_SECONDS = 0.05


def ahead_of(items: Iterable[T], ahead: int) -> Iterator[T]:
    """The same items in the same order, at most `ahead` of them (and the one in the making) waiting in memory.

    What `items` raises is raised where its item would have come. Closing the iterator, or dropping it, ends the thread.
    """
    assert ahead >= 1, "at least one item waits"
    queue: Queue[object] = Queue(maxsize=ahead)
    unwanted = Event()

    def make() -> None:
        last: object = _DONE
        try:
            for item in items:
                if not _put(queue, item, unwanted):
                    return
        except BaseException as error:  # handed on, whatever it is
            last = _Raised(error)
        _put(queue, last, unwanted)

    thread = Thread(target=make, name="stillroom-prefetch", daemon=True)
    thread.start()
    try:
        while (item := _get(queue)) is not _DONE:
            if isinstance(item, _Raised):
                raise item.error
            yield item  # type: ignore[misc]  # only items and the two marks are put
    finally:
        unwanted.set()
        _drain(queue)
        thread.join()


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _put(queue: Queue[object], item: object, unwanted: Event) -> bool:
    while not unwanted.is_set():
        try:
            queue.put(item, timeout=_PATIENCE_SECONDS)
        except Full:
            continue
        return True
    return False


def _get(queue: Queue[object]) -> object:
    # With a timeout, so that an interrupt of the user's is not left waiting for the thread.
    while True:
        try:
            return queue.get(timeout=_PATIENCE_SECONDS)
        except Empty:
            continue


def _drain(queue: Queue[object]) -> None:
    while not queue.empty():
        queue.get_nowait()
