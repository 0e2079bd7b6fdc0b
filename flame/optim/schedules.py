"""Learning-rate schedules: pure functions of the number of updates already applied.

A schedule has three parts: linear warm-up to the peak, a flat part, and a decay to ``min_lr_factor`` of the peak. The
decay takes everything after the warm-up unless ``decay_ratio`` says how large a part of the run it is; with one, the
schedule is warm-up/stable/decay (WSD, https://arxiv.org/abs/2404.06395).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flame.errors import ConfigError, unknown_name

DECAY_SHAPES = {
    "linear": lambda progress: 1.0 - progress,
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


@dataclass(frozen=True)
class Schedule:
    """A learning-rate factor in [0, 1] for every update of a run.

    Attributes:
        total_steps: updates after which the factor stays at the floor.
        warmup_steps: updates of linear warm-up; the first of them already has the factor 1 / warmup_steps.
        decay_ratio: part of total_steps spent decaying, at the end; None decays from the end of the warm-up.
        decay_type: shape of the decay, one of linear, sqrt, cosine.
        min_lr_factor: floor, a fraction of the peak.
    """

    total_steps: int
    warmup_steps: int = 0
    decay_ratio: float | None = None
    decay_type: str = "linear"
    min_lr_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.decay_type not in DECAY_SHAPES:
            raise ConfigError(f"lr_scheduler.decay_type: {unknown_name('decay', self.decay_type, DECAY_SHAPES)}")
        if self.total_steps < 1:
            raise ConfigError(f"lr_scheduler.total_steps = {self.total_steps} must be at least 1.")
        if self.warmup_steps < 0:
            raise ConfigError(f"lr_scheduler.warmup_steps = {self.warmup_steps} must not be negative.")
        if self.decay_ratio is not None and not 0.0 <= self.decay_ratio <= 1.0:
            raise ConfigError(f"lr_scheduler.decay_ratio = {self.decay_ratio} must lie between 0 and 1.")
        if not 0.0 <= self.min_lr_factor <= 1.0:
            raise ConfigError(f"lr_scheduler.min_lr_factor = {self.min_lr_factor} must lie between 0 and 1.")
        if self.decay_ratio is not None and self.warmup_steps + self.decay_steps > self.total_steps:
            raise ConfigError(
                f"lr_scheduler: {self.warmup_steps} warm-up steps and {self.decay_steps} decay steps do not fit into "
                f"{self.total_steps} steps; lower warmup_steps or decay_ratio."
            )

    @property
    def decay_steps(self) -> int:
        if self.decay_ratio is None:
            return max(self.total_steps - self.warmup_steps, 0)
        return round(self.total_steps * self.decay_ratio)

    def factor(self, updates: int) -> float:
        """Fraction of the peak learning rate for the next update, `updates` of them being done."""
        if updates < self.warmup_steps:
            return (updates + 1) / self.warmup_steps
        decay_start = self.total_steps - self.decay_steps
        if updates < decay_start:
            return 1.0
        if updates >= self.total_steps:
            return self.min_lr_factor
        shape = DECAY_SHAPES[self.decay_type]((updates - decay_start) / self.decay_steps)
        return self.min_lr_factor + (1.0 - self.min_lr_factor) * shape

    def table(self) -> torch.Tensor:
        """[total_steps + 1] fp32: the factor of every update; the last entry is the floor."""
        return torch.tensor([self.factor(updates) for updates in range(self.total_steps + 1)], dtype=torch.float32)


class LearningRate:
    """A schedule that lives on the device: it advances with applied updates, and only the device knows which those are.

    Args:
        peak: learning rate at factor 1.
        device: where the optimizer's parameters are.
    """

    def __init__(self, schedule: Schedule, peak: float, device: torch.device) -> None:
        self._rates = (schedule.table() * peak).to(device)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    def current(self) -> torch.Tensor:
        """Learning rate of the next update, 0-d fp32 on the device."""
        index = self.updates.clamp(max=self._rates.numel() - 1)
        return self._rates.index_select(0, index.view(1)).view(())  # plain indexing would read the index on the host

    def advance(self, apply: torch.Tensor) -> None:
        """Count one update if `apply` (0-d bool) is true."""
        self.updates += apply

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.updates.copy_(state["updates"])
