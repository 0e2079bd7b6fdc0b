"""How a model is split over tensor-parallel ranks: plans, this rank's view of weights, and the four exchanges.

Megatron's scheme (Shoeybi et al., 1909.08053) with sequence parallelism (Korthikanti et al., 2205.05198): between layers a
rank holds its own tokens of the residual stream (whole rows of the batch where ranks divide them, else a part of every
row); a layer gathers all tokens, works on its own heads or channels, and its output is summed over ranks while tokens are
dealt out again.

One rule makes every gradient right. Between gather and scatter, the gradient that a rank has of anything all ranks hold
alike (activations and weights) is its own share, and shares add up to the whole: over activations when the gather runs
backwards, over weights because their gradients are declared partial sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from flame.errors import ConfigError
from flame.kernels.collectives import all_to_all, gather_rows, scatter_rows, sum_ranks

DEGREE = "parallelism.tensor_parallel_degree"


@dataclass(frozen=True)
class TensorParallel:
    """This rank among those that share every layer.

    Attributes:
        deals_rows: whole rows of a batch may be dealt to ranks. If not, every row's tokens always are, so that a rank's
            part of the stream grows evenly with rows and tokens.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    deals_rows: bool = True

    def by_rows(self, rows: int, length: int) -> bool:
        """Whether whole rows of a batch are dealt to ranks, else every row's tokens, padded to a multiple of the ranks."""
        return self.deals_rows and length > 1 and rows % self.size == 0

    def gather(self, x: Tensor, length: int) -> Tensor:
        """Own tokens [B / ranks, T, D] or [B, ceil(T / ranks), D] -> all tokens [B, T, D]; `length` is T."""
        if x.shape[1] == length > 1:
            return gather_rows(x, self.group)
        return gather_rows(x.transpose(0, 1), self.group).transpose(0, 1)[:, :length]

    def scatter(self, x: Tensor) -> Tensor:
        """Each rank's addend [B, T, D] -> own tokens of the sum."""
        if self.by_rows(*x.shape[:2]):
            return scatter_rows(x, self.group)
        return scatter_rows(self._padded(x).transpose(0, 1), self.group).transpose(0, 1)

    def own_tokens(self, x: Tensor) -> Tensor:
        """Own tokens of what all ranks hold alike [B, T, D]."""
        return self._padded(x).chunk(self.size, 0 if self.by_rows(*x.shape[:2]) else 1)[self.rank]

    def gather_any(self, x: Tensor) -> Tensor:
        """Own tokens [b, t, D] -> all tokens [ranks * b, t, D], in an order of no meaning; for layers that mix none."""
        return gather_rows(x, self.group)

    def scatter_any(self, x: Tensor) -> Tensor:
        """The sum of every rank's addend for `gather_any`'s tokens -> own ones."""
        return scatter_rows(x, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's addend, on all ranks."""
        return sum_ranks(x, self.group)

    def part(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's equal part along `dim` of what all ranks hold alike."""
        return x.chunk(self.size, dim)[self.rank]

    def join(self, x: Tensor) -> Tensor:
        """Every rank's [..., C / ranks] side by side, [..., C]."""
        return gather_rows(x.movedim(-1, 0), self.group).movedim(0, -1)

    def once(self, x: Tensor) -> Tensor:
        """`x`, which all ranks computed alike, where it joins the loss: every rank passes back its share of the gradient."""
        return x / self.size + (x - x / self.size).detach()

    def _padded(self, x: Tensor) -> Tensor:
        missing = 0 if self.by_rows(*x.shape[:2]) else -x.shape[1] % self.size
        return F.pad(x, (0, 0, 0, missing)) if missing else x


class _Deal(torch.autograd.Function):
    """Rows that a rank works on, sent by the ranks that store them; see `Rows`."""

    @staticmethod
    def forward(ctx: Any, stored: Tensor, deal: Rows, group: dist.ProcessGroup) -> Tensor:
        ctx.deal, ctx.group, ctx.shape = deal, group, stored.shape
        outgoing = torch.cat([stored[start:stop] for start, stop in deal.sent])
        return all_to_all(outgoing, deal.receives, deal.sends, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        deal: Rows = ctx.deal
        back = all_to_all(grads[0], deal.sends, deal.receives, ctx.group)
        stored = grads[0].new_zeros(ctx.shape)
        heights = [stop - start for start, stop in deal.sent]
        for (start, stop), piece in zip(deal.sent, back.split(heights)):
            stored[start:stop] += piece
        return stored, None, None


@dataclass(frozen=True)
class Split:
    """Rows of a weight (dimension 0) dealt by units: heads, groups, or as many units as ranks for plain channels.

    `parts`: (rows, units) of every part, in order, for weights in which several lie below one another. A rank takes
    units / ranks neighbouring units of each part. With fewer units than ranks, neighbouring ranks take the same one.
    """

    parts: tuple[tuple[int, int], ...]

    def wanted(self, ranks: int, rank: int) -> list[tuple[int, int]]:
        """[start, stop) of the rows that `rank` works on, ascending."""
        ranges, base = [], 0
        for rows, units in self.parts:
            height = rows // units
            first, count = rank * units // ranks, max(1, units // ranks)
            ranges.append((base + first * height, base + (first + count) * height))
            base += rows
        return ranges

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.parts)

    def is_contiguous(self, ranks: int) -> bool:
        """Whether every rank's rows are one equal chunk, as `Shard(0)` stores them."""
        return len(self.parts) == 1 and self.parts[0][1] % ranks == 0


@dataclass(frozen=True)
class Columns:
    """Columns (dimension 1) of an output projection, in equal chunks: its results are addends."""


@dataclass(frozen=True)
class Addend:
    """Bias of an output projection: every rank adds an equal share of it."""


Use = Split | Columns | Addend


@dataclass(frozen=True)
class Plan:
    """How a layer is split.

    Attributes:
        parameters: by name relative to the layer; parameters that are not named are the same on all ranks.
        config: values that the layer's config shall have on a rank, such as its number of heads.
        spanning: norms, by name, that run over the channels of all ranks.
    """

    parameters: dict[str, Use] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    spanning: tuple[str, ...] = ()


def whole_per_rank(units: int, ranks: int, what: str) -> int:
    """units / ranks.

    Raises:
        ConfigError: it is not whole.
    """
    if units % ranks:
        fitting = [str(degree) for degree in range(1, ranks) if units % degree == 0]
        raise ConfigError(
            f"{DEGREE} = {ranks} does not divide {what} = {units}. "
            f"Use a degree that does ({', '.join(fitting)}), or change the model."
        )
    return units // ranks


def shared_per_rank(units: int, ranks: int, what: str) -> int:
    """units / ranks, or 1 where several ranks share a unit (grouped key/value heads).

    Raises:
        ConfigError: neither divides the other.
    """
    if units < ranks and ranks % units == 0:
        return 1
    return whole_per_rank(units, ranks, what)


@dataclass(frozen=True)
class Rows:
    """An all-to-all in which each rank sends stored rows to the ranks that work on them.

    sent: [start, stop) of the stored rows, one after another for rank 0, 1, ...; sends, receives: rows to and from each.
    """

    sent: tuple[tuple[int, int], ...]
    sends: tuple[int, ...]
    receives: tuple[int, ...]


def deal_rows(split: Split, ranks: int, rank: int) -> Rows:
    """The exchange that turns equal chunks of all rows into the rows that `split` gives to each rank."""
    chunk = split.rows // ranks
    wanted = [split.wanted(ranks, other) for other in range(ranks)]

    def common(receiver: int, sender: int) -> list[tuple[int, int]]:
        low, high = sender * chunk, (sender + 1) * chunk
        cut = [(max(start, low) - low, min(stop, high) - low) for start, stop in wanted[receiver]]
        return [(start, stop) for start, stop in cut if start < stop]

    def count(ranges: list[tuple[int, int]]) -> int:
        return sum(stop - start for start, stop in ranges)

    sent = tuple(piece for receiver in range(ranks) for piece in common(receiver, rank))
    sends = tuple(count(common(receiver, rank)) for receiver in range(ranks))
    receives = tuple(count(common(rank, sender)) for sender in range(ranks))
    return Rows(sent, sends, receives)


def stored_dimension(use: Use | None, ranks: int) -> int | None:
    """The dimension that a parameter of this use is cut along in memory, in equal chunks; None if ranks hold all of it."""
    if isinstance(use, Columns):
        return 1
    return 0 if isinstance(use, Split) and use.rows % ranks == 0 else None


class Reader:
    """Turns a stored parameter (a DTensor over the ranks) into the plain tensor that this rank computes with."""

    def __init__(self, use: Use | None, ranks: TensorParallel) -> None:
        self.ranks, self.divided = ranks, isinstance(use, Addend)
        dim = stored_dimension(use, ranks.size)
        self.placement: Placement = Replicate() if dim is None else Shard(dim)
        self.rows: Rows | None = None
        self.ranges: list[tuple[int, int]] | None = None
        if isinstance(use, Split) and dim is None:
            self.ranges = use.wanted(ranks.size, ranks.rank)
        elif isinstance(use, Split) and not use.is_contiguous(ranks.size):
            self.rows = deal_rows(use, ranks.size, ranks.rank)

    def __call__(self, parameter: Tensor) -> Tensor:
        """Outside a forward, where the parameter is sharded over data-parallel ranks too, it stays as it is."""
        if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:
            return parameter
        if isinstance(self.placement, Shard):
            stored = parameter.to_local()
            return stored if self.rows is None else _Deal.apply(stored, self.rows, self.ranks.group)
        # Without the declaration, each rank would keep its own share of the gradient and none would notice.
        whole = parameter.to_local(grad_placements=[Partial()])
        if self.ranges is not None:
            return torch.cat([whole[start:stop] for start, stop in self.ranges])
        return whole / self.ranks.size if self.divided else whole


def rows(layer: nn.Module, units: int, *names: str) -> dict[str, Use]:
    """Plan entries: the named modules or parameters of `layer` (those it has) consist of `units` equal units of rows."""
    return {
        name: Split(((parameter.shape[0], units),)) for name, parameter in parameters_under(layer, names) if units > 0
    }


def packed(layer: nn.Module, parts: Sequence[tuple[int, int]], *names: str) -> dict[str, Use]:
    """Plan entries for parameters with several `parts`, (rows, units) each, below one another."""
    return {name: Split(tuple(parts)) for name, _ in parameters_under(layer, names)}


def columns(layer: nn.Module, *names: str) -> dict[str, Use]:
    """Plan entries of output projections, whose results are added up over ranks."""
    found = parameters_under(layer, names)
    return {name: Addend() if name.endswith("bias") else Columns() for name, _ in found}


def parameters_under(layer: nn.Module, names: Sequence[str]) -> list[tuple[str, Tensor]]:
    own = layer.named_parameters(remove_duplicate=False)
    return [(key, tensor) for key, tensor in own if any(key == name or key.startswith(name + ".") for name in names)]
