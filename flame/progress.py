"""How far a run is, and the state beside weights that resuming it exactly takes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


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
    """Random generators of this rank: Python, numpy, torch on the CPU and on the GPU."""

    def __init__(self, rank: int) -> None:
        self.key = f"rank_{rank}"

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state().numpy() if torch.cuda.is_available() else None
        return {self.key: (random.getstate(), np.random.get_state(), torch.get_rng_state().numpy(), cuda)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's generators; a rank that did not exist when saving keeps its fresh ones."""
        if self.key not in state:
            return
        python, numpy, cpu, cuda = state[self.key]
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch.from_numpy(cpu))
        if cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.from_numpy(cuda))
