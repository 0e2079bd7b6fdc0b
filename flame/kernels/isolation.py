"""Processes for kernels that may take the process down with them.

After an illegal memory access nothing more runs in a CUDA context, so a kernel on trial runs in a process of its own; one
that broke its context, died or hangs is replaced, and only its own case is lost.
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

Result = tuple[bool, Any]  # (done, value), or (False, why not)


def device_is_dead() -> bool:
    """Whether this process can no longer use its GPU."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _serve(pipe: Connection, function: Callable[..., Any]) -> None:
    while (arguments := pipe.recv()) is not None:
        try:
            result: Result = (True, function(*arguments))
        except Exception as error:  # whatever a kernel raises is a finding, not the end of the run
            result = (False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
        dead = device_is_dead()
        pipe.send((result, dead))
        if dead:
            return


class _Worker:
    """One process that serves calls of `function`, started anew when it is lost."""

    def __init__(self, function: Callable[..., Any], timeout: float) -> None:
        self.function, self.timeout = function, timeout
        self.context = multiprocessing.get_context("spawn")
        self.process: Any = None

    def call(self, arguments: tuple[Any, ...]) -> Result:
        if self.process is None:
            self.pipe, theirs = self.context.Pipe()
            self.process = self.context.Process(target=_serve, args=(theirs, self.function), daemon=True)
            self.process.start()
            theirs.close()
        self.pipe.send(arguments)
        try:
            if not self.pipe.poll(self.timeout):
                self._replace()
                return False, f"no answer within {self.timeout:.0f} s"
            result, dead = self.pipe.recv()
        except (EOFError, OSError):
            self._replace()
            return False, "the process died"
        if dead:
            self._replace()
        return result

    def _replace(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.process = None

    def close(self) -> None:
        if self.process is not None:
            self.pipe.send(None)
            self.process.join(10)
            self._replace()


def run_isolated(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int, timeout: float = 300.0
) -> Iterator[Result]:
    """Results of `function(*call)` in the order of `calls`, from `jobs` processes.

    `function` must be importable by name. A call that raises, breaks its GPU context, dies or exceeds `timeout` seconds
    gives (False, reason) and harms no other.
    """
    waiting: queue.SimpleQueue[tuple[int, tuple[Any, ...]]] = queue.SimpleQueue()
    for item in enumerate(calls):
        waiting.put(item)
    results: list[Result | None] = [None] * len(calls)
    done = [threading.Event() for _ in calls]

    def work() -> None:
        worker = _Worker(function, timeout)
        while True:
            try:
                index, arguments = waiting.get_nowait()
            except queue.Empty:
                break
            results[index] = worker.call(arguments)
            done[index].set()
        worker.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(calls)))]
    for thread in threads:
        thread.start()
    for index, event in enumerate(done):
        event.wait()
        yield results[index] or (False, "not run")
    for thread in threads:
        thread.join()
