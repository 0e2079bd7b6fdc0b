"""Global gradient norm over sharded and replicated parameters, without a host synchronisation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from flame.errors import FlameError


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, sharing its storage; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharding_groups(gradient: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Process groups over which the pieces of `gradient` lie spread (none for a replicated or plain tensor)."""
    if not isinstance(gradient, DTensor):
        return ()
    groups = []
    for dim, placement in enumerate(gradient.placements):
        if placement.is_replicate():
            continue
        if placement.is_partial():
            raise FlameError(f"a gradient has placement {placement}, whose norm is undefined before it is reduced.")
        groups.append(gradient.device_mesh.get_group(dim))
    return tuple(groups)


@torch.no_grad()
def global_grad_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Two-norm over all gradients of the whole model, the same fp32 scalar on every rank.

    Gradients sharded over the same mesh dimensions are summed together and reduced once per dimension, so gradients
    on different meshes may be mixed.
    """
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[torch.Tensor]] = {}
    for gradient in gradients:
        by_groups.setdefault(sharding_groups(gradient), []).append(local(gradient))
    if not by_groups:
        raise FlameError("no parameter has a gradient; was backward() run?")
    squares = []
    for groups, tensors in by_groups.items():
        norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
        square = torch.stack(norms).square().sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


@torch.no_grad()
def clip_gradients(gradients: list[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their global norm is at most `max_norm`; `max_norm <= 0` leaves them."""
    if max_norm <= 0:
        return
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
