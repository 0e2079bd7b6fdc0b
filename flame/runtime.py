"""Settings of the process as a whole: seeds, determinism, garbage collection."""

from __future__ import annotations

import gc
import os
import random

import numpy as np
import torch


def seed_everything(seed: int, rank: int) -> None:
    """Seed all generators of this process. Weights and data have generators of their own and do not depend on this."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def make_deterministic(enable: bool) -> None:
    """Use deterministic algorithms only; torch raises where there is none."""
    if not enable:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be repeatable
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class GarbageCollection:
    """Python's collector, off except at chosen steps.

    Left alone, it would pause each rank at a moment of its own, and the others would wait for it every time.
    """

    def __init__(self, frequency: int) -> None:
        self.frequency = max(frequency, 1)
        gc.collect(1)
        gc.disable()

    def collect_if_due(self, step: int) -> None:
        """Collect young objects every `frequency` steps."""
        if step % self.frequency == 0:
            gc.collect(1)

    def stop(self) -> None:
        """Hand collection back to Python."""
        gc.enable()
