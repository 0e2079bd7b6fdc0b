"""AdamW (https://arxiv.org/abs/1711.05101) on the local shards of the parameters.

The update is elementwise, so every rank works on its own shards as plain tensors: no DTensor dispatch, and parameters
on different meshes can be mixed. Whether the update is applied, and with which learning rate, is decided on the device:
a non-finite gradient leaves parameters, moments and schedule untouched without the host having to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flame.errors import ConfigError, unknown_name
from flame.optim.clipping import local
from flame.optim.groups import ParameterGroup

IMPLEMENTATIONS = ("fused", "foreach", "for-loop")


@dataclass(frozen=True)
class AdamWOptions:
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    implementation: str = "fused"

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise ConfigError(
                f"optimizer.implementation: {unknown_name('implementation', self.implementation, IMPLEMENTATIONS)}"
            )


class AdamW:
    """AdamW over groups of parameters.

    Args:
        groups: parameters by weight decay (`flame.optim.groups.parameter_groups`).
        options: betas, eps, implementation.
    """

    def __init__(self, groups: list[ParameterGroup], options: AdamWOptions) -> None:
        self.groups = groups
        self.options = options
        device = local(next(iter(groups[0].parameters.values()))).device
        # Updates applied so far, for bias correction. Only the device knows which steps were skipped.
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        # Moments are DTensors like their parameters, so that checkpoints can be loaded on another layout.
        self.moments = {
            name: (torch.zeros_like(parameter.detach()), torch.zeros_like(parameter.detach()))
            for group in groups
            for name, parameter in group.parameters.items()
        }

    @torch.no_grad()
    def step(self, lr: torch.Tensor, apply: torch.Tensor) -> None:
        """One update.

        Args:
            lr: 0-d fp32 on the device, before a group's own multiple.
            apply: 0-d bool on the device, the same on every rank; False leaves everything as it is.
        """
        self.count += apply
        # On a skipped step the value does not matter, but 0 would divide by zero.
        count = self.count.clamp(min=1).to(torch.float32)
        for group in self.groups:
            tensors = self._local_tensors(group)
            if not tensors.parameters:
                continue
            if self.options.implementation == "fused":
                self._fused(tensors, group, lr, count, apply)
            else:
                singles = tensors.split() if self.options.implementation == "for-loop" else [tensors]
                for part in singles:
                    self._foreach(part, group, lr, count, apply)

    def _local_tensors(self, group: ParameterGroup) -> LocalTensors:
        tensors = LocalTensors([], [], [], [])
        for name, parameter in group.parameters.items():
            if parameter.grad is None or local(parameter).numel() == 0:
                continue
            first, second = self.moments[name]
            tensors.parameters.append(local(parameter.detach()))
            tensors.gradients.append(local(parameter.grad))
            tensors.first.append(local(first))
            tensors.second.append(local(second))
        return tensors

    def _fused(
        self, tensors: LocalTensors, group: ParameterGroup, lr: torch.Tensor, count: torch.Tensor, apply: torch.Tensor
    ) -> None:
        """One kernel a group. It skips everything when found_inf is 1."""
        torch._fused_adamw_(
            tensors.parameters,
            tensors.gradients,
            tensors.first,
            tensors.second,
            [],
            [count] * len(tensors.parameters),
            lr=lr * group.lr_scale,
            beta1=self.options.beta1,
            beta2=self.options.beta2,
            weight_decay=group.weight_decay,
            eps=self.options.eps,
            amsgrad=False,
            maximize=False,
            found_inf=(~apply).to(torch.float32),
        )

    def _foreach(
        self, tensors: LocalTensors, group: ParameterGroup, lr: torch.Tensor, count: torch.Tensor, apply: torch.Tensor
    ) -> None:
        """The same update from foreach operations, every increment multiplied by 0 or 1.

        NaN times 0 is NaN, so gradients are replaced by zeros first when the step is skipped.
        """
        options, mask = self.options, apply.to(torch.float32)
        gradients = [torch.where(apply, gradient, torch.zeros_like(gradient)) for gradient in tensors.gradients]
        change = torch._foreach_sub(gradients, tensors.first)
        torch._foreach_add_(tensors.first, torch._foreach_mul(change, (1 - options.beta1) * mask))
        change = torch._foreach_sub(torch._foreach_mul(gradients, gradients), tensors.second)
        torch._foreach_add_(tensors.second, torch._foreach_mul(change, (1 - options.beta2) * mask))

        rate = lr * group.lr_scale * mask
        torch._foreach_mul_(tensors.parameters, 1 - rate * group.weight_decay)
        denominators = torch._foreach_sqrt(tensors.second)
        torch._foreach_div_(denominators, (1 - options.beta2**count).sqrt())
        torch._foreach_add_(denominators, options.eps)
        updates = torch._foreach_div(tensors.first, denominators)
        torch._foreach_mul_(updates, -rate / (1 - options.beta1**count))
        torch._foreach_add_(tensors.parameters, updates)

    def state_dict(self) -> dict[str, Any]:
        """Moments by parameter name (DTensors like the parameters) and the count of applied updates."""
        return {
            "count": self.count,
            "exp_avg": {name: first for name, (first, _) in self.moments.items()},
            "exp_avg_sq": {name: second for name, (_, second) in self.moments.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a state of the same parameters in place."""
        self.count.copy_(state["count"])
        for name, (first, second) in self.moments.items():
            first.copy_(state["exp_avg"][name])
            second.copy_(state["exp_avg_sq"][name])


@dataclass
class LocalTensors:
    """Parallel lists of this rank's shards: parameter, gradient, first and second moment."""

    parameters: list[torch.Tensor]
    gradients: list[torch.Tensor]
    first: list[torch.Tensor]
    second: list[torch.Tensor]

    def split(self) -> list[LocalTensors]:
        """One entry a parameter."""
        columns = zip(self.parameters, self.gradients, self.first, self.second)
        return [LocalTensors(*([tensor] for tensor in column)) for column in columns]
