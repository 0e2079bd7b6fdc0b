"""The arguments of a PaTH attention, checked, in one object."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """q `[B, Tq, H, K]`, k `[B, Tk, Hk, K]`, v `[B, Tk, Hk, V]`, w `[B, Tq, Hk, K]`, beta `[B, Tq, Hk]`,
    log_forget `[B, Tk, H]` or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    beta: Tensor
    log_forget: Tensor | None
    scale: float
    cu_seqlens: Tensor | None

    def documents(self) -> Iterator[Problem]:
        """Each packed document as a problem of its own. Reads cu_seqlens on the host."""
        if self.cu_seqlens is None:
            yield self
            return
        bounds = self.cu_seqlens.tolist()
        for start, end in zip(bounds, bounds[1:]):
            if end > start:
                part = {name: getattr(self, name)[:, start:end] for name in ("q", "k", "v", "w", "beta")}
                gate = None if self.log_forget is None else self.log_forget[:, start:end]
                yield replace(self, **part, log_forget=gate, cu_seqlens=None)
