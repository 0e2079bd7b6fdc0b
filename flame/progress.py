"""How far a run is, and the state beside weights that resuming it exactly takes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@dataclass
class Progress:
    """
    Attributes:
        step: steps done, skipped ones included.
        tokens: input positions read so far, on all ranks.
        left_out: steps whose data is read but not trained on, because it once gave a non-finite gradient.
        first_validation, last_validation: figures to compare at the end of the run.
    """

    step: int = 0
    tokens: int = 0
    left_out: list[int] = field(default_factory=list)
    first_validation: dict[str, float] = field(default_factory=dict)
    last_validation: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, keeping the steps that are to be left out since it was saved."""
        left_out = sorted({*self.left_out, *state["left_out"]})
        for name in self.__dataclass_fields__:
            setattr(self, name, state[name])
        self.left_out = left_out


class RandomState:
    """Random generators of every rank: Python, numpy, torch on the CPU and on the GPU.

    Args:
        group: all ranks; saving gathers their states, so that what is stored does not depend on who stores it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def state_dict(self) -> dict[str, Any]:
        states: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(states, capture_random(), group=self.group)
        return {"ranks": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's generators; a rank that did not exist when saving keeps its fresh ones."""
        rank = dist.get_rank(self.group)
        if rank < len(state["ranks"]):
            restore_random(state["ranks"][rank])


def capture_random() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int, rank: int) -> None:
    """Seed all generators of this process. Weights have generators of their own and do not depend on this."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
