"""Muon for the matrices of the blocks: momentum made orthogonal (Jordan et al., 2024).

Every update is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size of an AdamW update
(https://arxiv.org/abs/2502.16982), so that one learning rate and one weight decay serve both optimizers.

Orthogonalizing needs the whole matrix. With sharded parameters, W matrices at a time are exchanged so that each of the
W ranks holds one of them whole, works on it, and sends the pieces back: every matrix is orthogonalized once, not W times.
Where parameters are sharded over two mesh axes (tensor and data parallel), pieces travel along one axis, then the other.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

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
        groups: matrices only, plain or sharded.
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
        """This rank's piece of the Nesterov momentum, after adding the gradient to it."""
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
    """This rank's pieces of the orthogonalized directions.

    Args:
        matrices: parameters, for their layout.
        directions: this rank's piece of the direction of each.
    """
    by_layout: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for index, matrix in enumerate(matrices):
        key = (matrix.device_mesh, sharded_axes(matrix)) if isinstance(matrix, DTensor) else (None, ())
        by_layout.setdefault(key, []).append(index)
    results: dict[int, Tensor] = {}
    for (mesh, axes), indices in by_layout.items():
        if not axes:
            results |= {index: newton_schulz(directions[index], iterations) for index in indices}
            continue
        world = math.prod(mesh.size(axis) for axis in axes)
        for start in range(0, len(indices), world):
            batch = indices[start : start + world]
            exchange = Exchange([matrices[index] for index in batch], axes, iterations)
            results |= zip(batch, exchange([directions[index] for index in batch]))
    return [results[index] for index in range(len(matrices))]


def sharded_axes(matrix: DTensor) -> tuple[int, ...]:
    """Mesh axes over which a matrix lies spread, inner ones first."""
    mesh = matrix.device_mesh
    spread = [axis for axis, placement in enumerate(matrix.placements) if not placement.is_replicate()]
    return tuple(axis for axis in reversed(spread) if mesh.size(axis) > 1)


def rectangle(matrix: DTensor, coordinate: dict[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a matrix that the rank at `coordinate` (by mesh axis) holds; inner axes cut first."""
    bounds = [(0, size) for size in matrix.shape]
    for axis in sharded_axes(matrix):
        dim = matrix.placements[axis].dim
        low, high = bounds[dim]
        chunk = -(-(high - low) // matrix.device_mesh.size(axis))
        start = min(low + coordinate[axis] * chunk, high)
        bounds[dim] = (start, min(start + chunk, high))
    return slice(*bounds[0]), slice(*bounds[1])


class Exchange:
    """Orthogonalizes up to W matrices on W ranks: each travels to one rank whole and comes back in pieces.

    Args:
        matrices: parameters of one mesh, sharded over the same axes of it.
        axes: these axes, in the order in which pieces travel along them.
    """

    def __init__(self, matrices: list[DTensor], axes: tuple[int, ...], iterations: int) -> None:
        self.matrices, self.axes, self.iterations = matrices, axes, iterations
        self.mesh = matrices[0].device_mesh
        self.here = {axis: self.mesh.get_local_rank(axis) for axis in axes}

    def __call__(self, directions: list[Tensor]) -> list[Tensor]:
        """Pieces in, pieces out."""
        pieces = {index: direction.to(torch.bfloat16).flatten() for index, direction in enumerate(directions)}
        done = self.along(0, pieces)
        return [done[index].view(direction.shape) for index, direction in enumerate(directions)]

    def along(self, level: int, pieces: dict[int, Tensor]) -> dict[int, Tensor]:
        """Collect each matrix on one rank of an axis, go on there, and send what comes of it back."""
        if level == len(self.axes):
            return {index: self.whole(index, flat) for index, flat in pieces.items()}
        axis = self.axes[level]
        group, ranks = self.mesh.get_group(axis), range(self.mesh.size(axis))
        before = math.prod(self.mesh.size(axis) for axis in self.axes[:level])
        owned = {rank: [index for index in pieces if index // before % len(ranks) == rank] for rank in ranks}
        mine = owned[self.here[axis]]
        sizes = {rank: [self.held(index, level, rank) for index in mine] for rank in ranks}

        sent = [sum(pieces[index].numel() for index in owned[rank]) for rank in ranks]
        received = [sum(sizes[rank]) for rank in ranks]
        outgoing = torch.cat([pieces[index] for rank in ranks for index in owned[rank]])
        incoming = outgoing.new_empty(sum(received))
        dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
        parts = [part.split(sizes[rank]) for rank, part in zip(ranks, incoming.split(received))]
        collected = {index: torch.cat([part[place] for part in parts]) for place, index in enumerate(mine)}

        done = self.along(level + 1, collected)
        parts = [done[index].split([sizes[rank][place] for rank in ranks]) for place, index in enumerate(mine)]
        answers = [part[rank] for rank in ranks for part in parts]
        back = torch.empty_like(outgoing)
        dist.all_to_all_single(back, torch.cat(answers) if answers else incoming, sent, received, group=group)
        order = [index for rank in ranks for index in owned[rank]]
        return dict(zip(order, back.split([pieces[index].numel() for index in order])))

    def held(self, index: int, level: int, rank: int) -> int:
        """Elements of a matrix that `rank` of an axis brings to it, after collecting along the axes before."""
        coordinates = self.coordinates(level, {**self.here, self.axes[level]: rank})
        return sum(math.prod(cut.stop - cut.start for cut in self.rectangle(index, each)) for each in coordinates)

    def coordinates(self, level: int, at: dict[int, int]) -> list[dict[int, int]]:
        """Of all ranks along the first `level` axes, the last of them outermost."""
        axes = self.axes[:level][::-1]
        places = itertools.product(*(range(self.mesh.size(axis)) for axis in axes))
        return [{**at, **dict(zip(axes, place))} for place in places]

    def rectangle(self, index: int, coordinate: dict[int, int]) -> tuple[slice, slice]:
        return rectangle(self.matrices[index], coordinate)

    def whole(self, index: int, flat: Tensor) -> Tensor:
        """Put a matrix together, orthogonalize it, and take it apart in the same order."""
        cuts = [self.rectangle(index, each) for each in self.coordinates(len(self.axes), self.here)]
        shapes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in cuts]
        matrix = flat.new_empty(self.matrices[index].shape)
        for cut, shape, piece in zip(cuts, shapes, flat.split([math.prod(shape) for shape in shapes])):
            matrix[cut] = piece.view(shape)
        matrix = newton_schulz(matrix, self.iterations)
        return torch.cat([matrix[cut].flatten() for cut in cuts])
