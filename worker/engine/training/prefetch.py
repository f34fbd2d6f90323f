"""Batches made ready in a background thread while the device works on the one before."""

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")

DEPTH = 2
"""Batches that wait at most."""
_LOOK_SECONDS = 0.1


class _End:
    """After the last item; with the error that ended the source early, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


@contextmanager
def prefetch(source: Iterable[T], depth: int = DEPTH) -> Iterator[Iterator[T]]:
    """Give the items of `source` in their order, up to `depth` of them (and one in the making) ahead of the consumer.

    An error of the source is raised where its item would have come. The thread has ended when the block is left,
    however it is left; an item that is being made is finished first. `source` must draw random numbers from generators
    of its own, or the order of two threads would decide what they are.
    """
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    left = threading.Event()
    worker = threading.Thread(target=_fill, args=(source, ready, left), name="prefetch", daemon=True)
    worker.start()
    try:
        yield _drain(ready)
    finally:
        left.set()
        with suppress(queue.Empty):
            while True:  # wake the thread where it waits for room
                ready.get_nowait()
        worker.join()


def _fill(source: Iterable[T], ready: "queue.Queue[T | _End]", left: threading.Event) -> None:
    try:
        for item in source:
            if not _put(ready, item, left):
                return
        _put(ready, _End(), left)
    except BaseException as error:  # it belongs to the consumer, whatever it is
        _put(ready, _End(error), left)


def _put(ready: "queue.Queue[T | _End]", item: T | _End, left: threading.Event) -> bool:
    while not left.is_set():
        try:
            ready.put(item, timeout=_LOOK_SECONDS)
        except queue.Full:
            continue
        return not left.is_set()
    return False


def _drain(ready: "queue.Queue[T | _End]") -> Iterator[T]:
    while True:
        item = ready.get()
        if isinstance(item, _End):
            if item.error is not None:
                raise item.error
            return
        yield item
