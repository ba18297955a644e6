"""Batches made ahead by one thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates over fn(start), ..., fn(stop - 1), computed in order by a thread that stays at most `depth` ahead.

    An exception of `fn` is raised in place of its result. Leaving the `with` block stops the thread: it finishes at
    most the call that it is in.
    """

    def __init__(self, fn: Callable[[int], T], start: int, stop: int, depth: int = 2):
        self._fn, self._range = fn, range(start, stop)
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self.waited = 0.0
        """Seconds that the iterating thread has waited for results."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        for _ in self._range:
            began = time.perf_counter()
            result, error = self._ready.get()
            self.waited += time.perf_counter() - began
            if error is not None:
                raise error
            yield result  # type: ignore[misc]

    def _work(self) -> None:
        torch.set_num_threads(1)
        for index in self._range:
            if self._stopped.is_set():
                return
            try:
                self._ready.put((self._fn(index), None))
            except BaseException as error:
                self._ready.put((None, error))
                return

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        while not self._ready.empty():  # frees the thread if it waits for room; no other thread takes results
            self._ready.get()
        # A call may wait for another machine; the message of an error must not wait for it.
        self._thread.join(timeout=1.0)
