"""What ranks have to decide together at a step boundary: to stop, to save.

A signal reaches ranks at different moments, and clocks differ. If each rank followed its own, one would wait in a
collective that another never enters.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Agreement:
    """A wish of any rank becomes known to all of them, one step later.

    The reduction runs on the host while the step computes, so that it costs the step nothing: call `begin` before the
    step and `result` after it.
    """

    def __init__(self, group: dist.ProcessGroup, count: int) -> None:
        self.group = group
        self._wishes = torch.zeros(count, dtype=torch.int32)
        self._work: dist.Work | None = None

    def begin(self, wishes: list[bool]) -> None:
        """Tell the other ranks what this one wants."""
        self._wishes = torch.tensor(wishes, dtype=torch.int32)
        self._work = dist.all_reduce(self._wishes, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

    def result(self) -> list[bool]:
        """What at least one rank wanted when it called `begin`; the same list on every rank."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return [wish > 0 for wish in self._wishes.tolist()]


class StopRequest:
    """Remembers that this process was asked to stop (SIGTERM from a scheduler or torchrun, SIGUSR1 as a warning)."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)

    @property
    def received(self) -> bool:
        return self.signal is not None

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
