"""A thread that prepares the next item while the present one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_PATIENCE = 0.1  # seconds between looks at the stop flag while the queue is full


class Ahead(Generic[T]):
    """Iterates `source` in a thread of its own, at most `depth` items ahead; errors come out where the item would.

    `stop` ends the thread; it must not be in the middle of the source when what the source reads from is closed.
    """

    def __init__(self, source: Iterator[T], depth: int = 1) -> None:
        self._source = source
        self._items: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="data-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:  # whatever it is, the consumer must get it instead of waiting for ever
            self._put((None, error))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        """Whether the entry could be handed over before `stop`."""
        while not self._stopped.is_set():
            try:
                self._items.put(entry, timeout=_PATIENCE)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended is not None:
            raise self._ended
        item, self._ended = self._items.get()
        if self._ended is not None:
            raise self._ended
        return item  # type: ignore[return-value]

    def stop(self) -> None:
        """End the thread and forget what it has prepared."""
        self._stopped.set()
        self._thread.join()
