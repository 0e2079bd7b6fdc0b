"""Which implementation of an op runs: `triton` on a GPU, `chunked` elsewhere, or what the caller or FLAME_BACKEND names."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from flame.errors import FlameError, unknown_name


def select_backend(
    x: Tensor, requested: str | None = None, available: Sequence[str] = ("triton", "chunked", "reference")
) -> str:
    """The name of the implementation to run for an op whose input is `x`.

    Args:
        x: any input of the op; its device decides the default.
        requested: the caller's choice, or None for the default.
        available: what the op has, fastest first.

    FLAME_BACKEND overrides the default (not an explicit request), so that a user who doubts a kernel can run the plain
    torch form of every op: ``FLAME_BACKEND=chunked``. An op without that form keeps its own default.
    """
    if requested is not None:
        if requested not in available:
            raise FlameError(unknown_name("backend", requested, available))
        return requested
    wanted = os.environ.get("FLAME_BACKEND")
    if wanted is not None and wanted in available:
        return wanted
    if "triton" in available and x.is_cuda:
        return "triton"
    return next(name for name in available if name != "triton")
