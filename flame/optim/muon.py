"""Muon for the matrices of the blocks: momentum made orthogonal (Jordan et al., 2024).

Every update is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size of an AdamW update
(https://arxiv.org/abs/2502.16982), so that one learning rate and one weight decay serve both optimizers.

Orthogonalizing needs the whole matrix. With sharded parameters, W matrices at a time are exchanged so that each of the
W ranks holds one of them whole, works on it, and sends the rows back: every matrix is orthogonalized once, not W times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from flame.errors import FlameError
from flame.optim.clipping import local
from flame.optim.groups import ParameterGroup

QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero among those that keep singular values near 1


@dataclass(frozen=True)
class MuonOptions:
    momentum: float = 0.95
    iterations: int = 5


def newton_schulz(matrix: Tensor, iterations: int) -> Tensor:
    """The nearest orthogonal matrix to `matrix` [R, C], singular values within about 0.7 to 1.2, in bf16."""
    x = matrix.to(torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    a, b, c = QUINTIC
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Muon over 2-D parameters, decided on the device like `AdamW`.

    Args:
        groups: matrices only, plain or sharded over rows.
    """

    def __init__(self, groups: list[ParameterGroup], options: MuonOptions) -> None:
        self.groups = groups
        self.options = options
        self.momentum = {
            name: torch.zeros_like(parameter.detach())
            for group in groups
            for name, parameter in group.parameters.items()
        }

    @torch.no_grad()
    def step(self, lr: Tensor, apply: Tensor) -> None:
        """One update; `apply` (0-d bool, the same on every rank) at False leaves everything as it is."""
        mask = apply.to(torch.float32)
        rate = lr * mask
        for group in self.groups:
            names = [name for name, parameter in group.parameters.items() if parameter.grad is not None]
            directions = [self._direction(name, group.parameters[name], apply, mask) for name in names]
            matrices = [group.parameters[name] for name in names]
            for matrix, direction in zip(matrices, orthogonalize(matrices, directions, self.options.iterations)):
                target, scale = local(matrix.detach()), 0.2 * math.sqrt(max(matrix.shape))
                target.mul_(1 - rate * group.lr_scale * group.weight_decay)
                target.sub_(direction.to(target.dtype) * (rate * group.lr_scale * scale))

    def _direction(self, name: str, parameter: Tensor, apply: Tensor, mask: Tensor) -> Tensor:
        """This rank's rows of the Nesterov momentum, after adding the gradient to it."""
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        gradient = torch.where(apply, gradient, torch.zeros_like(gradient))
        momentum = local(self.momentum[name])
        momentum.add_((gradient - momentum) * ((1 - self.options.momentum) * mask))
        return torch.lerp(gradient, momentum, self.options.momentum)

    def state_dict(self) -> dict[str, Any]:
        """Momentum by parameter name, DTensors like the parameters."""
        return {"momentum": dict(self.momentum)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy a state of the same parameters in place."""
        for name, target in self.momentum.items():
            target.copy_(state["momentum"][name])


def orthogonalize(matrices: list[Any], directions: list[Tensor], iterations: int) -> list[Tensor]:
    """This rank's rows of the orthogonalized directions.

    Args:
        matrices: parameters, for their layout.
        directions: this rank's rows of the direction of each.
    """
    results: list[Tensor] = []
    group, world = row_group(matrices[0]) if matrices else (None, 1)
    if group is None or world == 1:
        return [newton_schulz(direction, iterations) for direction in directions]
    for start in range(0, len(matrices), world):
        batch = slice(start, start + world)
        results += exchange(matrices[batch], directions[batch], group, iterations)
    return results


def row_group(matrix: Tensor) -> tuple[dist.ProcessGroup | None, int]:
    """The ranks among which the rows of `matrix` are dealt, and their number."""
    if not isinstance(matrix, DTensor):
        return None, 1
    dims = [dim for dim, placement in enumerate(matrix.placements) if isinstance(placement, Shard)]
    if len(dims) > 1 or any(matrix.placements[dim] != Shard(0) for dim in dims):
        raise FlameError(f"Muon takes matrices sharded over rows, once; found {matrix.placements}. Use AdamW.")
    if not dims:
        return None, 1
    return matrix.device_mesh.get_group(dims[0]), matrix.device_mesh.size(dims[0])


def rows_by_rank(rows: int, world: int) -> list[int]:
    """Rows that each rank holds of a matrix: equal chunks, the last ones shorter or empty."""
    chunk = -(-rows // world)
    return [min(max(rows - rank * chunk, 0), chunk) for rank in range(world)]


def exchange(matrices: list[Any], directions: list[Tensor], group: dist.ProcessGroup, iterations: int) -> list[Tensor]:
    """Orthogonalize up to W matrices on W ranks: matrix j travels to rank j whole and comes back in rows."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = [direction.numel() for direction in directions] + [0] * (world - len(directions))
    outgoing = torch.cat([direction.to(torch.bfloat16).flatten() for direction in directions])
    owned = matrices[rank].shape if rank < len(matrices) else torch.Size((0, 0))
    incoming_sizes = [rows * owned[1] for rows in rows_by_rank(owned[0], world)]
    whole = outgoing.new_empty(sum(incoming_sizes))
    dist.all_to_all_single(whole, outgoing, incoming_sizes, mine, group=group)
    if whole.numel():
        whole = newton_schulz(whole.view(owned), iterations).contiguous().flatten()
    back = torch.empty_like(outgoing)
    dist.all_to_all_single(back, whole, mine, incoming_sizes, group=group)
    pieces = back.split(mine[: len(directions)])
    return [piece.view(direction.shape) for piece, direction in zip(pieces, directions)]
