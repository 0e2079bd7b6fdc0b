"""The optimizer of a run: one or two update rules that share a schedule."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from flame.optim.groups import ParameterGroup
from flame.optim.schedules import LearningRate


class UpdateRule(Protocol):
    """What `AdamW` and `Muon` have in common."""

    groups: list[ParameterGroup]

    def step(self, lr: torch.Tensor, apply: torch.Tensor) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Optimizer:
    """Applies update rules, each to its own parameters, with one learning rate.

    Args:
        rules: update rules by the name under which checkpoints keep their state.
        rate: the schedule.
    """

    def __init__(self, rules: dict[str, UpdateRule], rate: LearningRate) -> None:
        self.rules = rules
        self.rate = rate
        self.parameters = [
            parameter for rule in rules.values() for group in rule.groups for parameter in group.parameters.values()
        ]

    def gradients(self) -> list[torch.Tensor]:
        """Gradients of all parameters that have one."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, apply: torch.Tensor) -> torch.Tensor:
        """One update; the learning rate it used.

        Args:
            apply: 0-d bool on the device, the same on every rank; False leaves parameters, state and schedule alone.
        """
        lr = self.rate.current()
        apply = apply.to(lr.device)
        for rule in self.rules.values():
            rule.step(lr, apply)
        self.rate.advance(apply)
        return lr

    def state_dict(self) -> dict[str, Any]:
        """States of the rules by name. The schedule is saved on its own, so that it can be started afresh."""
        return {name: rule.state_dict() for name, rule in self.rules.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, rule in self.rules.items():
            rule.load_state_dict(state[name])
