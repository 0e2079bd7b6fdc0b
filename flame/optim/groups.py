"""Which parameters share optimizer settings: weight decay follows what the modules declare."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn as nn


@dataclass
class ParameterGroup:
    """Parameters that take the same weight decay and the same multiple of the learning rate."""

    name: str
    weight_decay: float
    lr_scale: float = 1.0
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Elements of the full (unsharded) parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def takes_no_decay(name: str, parameter: nn.Parameter, declared: set[str]) -> bool:
    """Biases, every vector (norm weights, A_log, dt_bias, per-head gates), and whatever the model declares."""
    return name in declared or name.endswith("bias") or parameter.ndim <= 1


def parameter_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Groups `decay` and `no_decay` over the trainable parameters of `model`, empty ones left out.

    Args:
        model: its ``no_weight_decay()``, where it has one, names parameters that take none.
    """
    declare = getattr(model, "no_weight_decay", None)
    declared = set(declare()) if callable(declare) else set()
    decay, no_decay = ParameterGroup("decay", weight_decay), ParameterGroup("no_decay", 0.0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = no_decay if takes_no_decay(name, parameter, declared) else decay
            group.parameters[name] = parameter
    return [group for group in (decay, no_decay) if group.parameters]


def split_matrices(
    groups: list[ParameterGroup], prefixes: list[str]
) -> tuple[list[ParameterGroup], list[ParameterGroup]]:
    """Groups of the decayed matrices under `prefixes` (a rule for hidden matrices), and groups of all the rest."""
    matrices, rest = [], []
    for group in groups:
        inside = {
            name: parameter
            for name, parameter in group.parameters.items()
            if group.name == "decay" and parameter.ndim == 2 and name.startswith(tuple(prefixes))
        }
        outside = {name: parameter for name, parameter in group.parameters.items() if name not in inside}
        matrices.append(ParameterGroup("matrices", group.weight_decay, group.lr_scale, inside))
        rest.append(ParameterGroup(group.name, group.weight_decay, group.lr_scale, outside))
    return [group for group in matrices if group.parameters], [group for group in rest if group.parameters]


def describe_groups(groups: list[ParameterGroup], lr: float) -> str:
    """A table for the start of the log: one line a group, with the kinds of parameter in it."""
    lines = [f"{'group':<12}{'tensors':>9}{'elements':>16}{'weight decay':>14}{'peak lr':>12}  parameters"]
    for group in groups:
        line = f"{group.name:<12}{len(group.parameters):>9}{group.numel:>16,}{group.weight_decay:>14g}"
        lines.append(f"{line}{lr * group.lr_scale:>12g}  {summarize_names(list(group.parameters))}")
    return "\n".join(lines)


def summarize_names(names: list[str], limit: int = 8) -> str:
    """Distinct last parts of parameter names, e.g. ``q_proj.weight, A_log``, shortened to `limit` of them."""
    kinds: dict[str, int] = {}
    for name in names:
        parts = [part for part in name.split(".") if not part.isdigit()]
        kind = ".".join(parts[-2:]) if parts[-1] in ("weight", "bias") else parts[-1]
        kinds[kind] = kinds.get(kind, 0) + 1
    shown = list(kinds)[:limit]
    return ", ".join(shown) + (f", and {len(kinds) - limit} more" if len(kinds) > limit else "")
