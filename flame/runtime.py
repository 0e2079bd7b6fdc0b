"""Settings of the process as a whole: seeds, determinism, garbage collection."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import numpy as np
import torch

from flame.errors import ConfigError


def writable_folder(folder: Path) -> Path:
    """Make the folder a run writes to, before anything is spent on the run.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"job.dump_folder = {folder} cannot be made ({error.strerror}). Name a folder on a disk you may write to."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"job.dump_folder = {folder} may not be written to. Name another or change its permissions.")
    return folder


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
