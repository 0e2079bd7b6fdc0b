"""Context parallelism: a sequence cut into equal contiguous parts over ranks, and what ranks must tell each other.

Every op that mixes tokens takes a `SequenceShard` and then computes on this rank's tokens what it would have computed for
them in the whole sequence. Recurrences pass on states, whose size does not depend on the length of the sequence:
a rank's part of a document is an affine map of the state, ``S_out = A S_in + B``. Convolutions and token shifts pass on a
few tokens, softmax attention gathers keys and values.

All exchanges are differentiable and are called by all ranks of the group in the same order, whatever documents they hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.collectives import all_to_all, gather_rows, sum_ranks

GATHER_LIMIT = 8  # ranks up to which one all-gather of all states beats log2(ranks) rounds of one state each


@dataclass(frozen=True)
class SequenceShard:
    """This rank's part of a sequence: tokens [rank * T, (rank + 1) * T) of ranks * T.

    Attributes:
        group, rank, size: the ranks that hold the parts, in the order of the group.
        before: [] int64, tokens of this rank's first document that earlier ranks hold; 0 if it begins here.
        bounds: [N + 1] int32 bounds of the documents in the whole row, None where rows are documents.
        streams: packed documents of an op's call belong to this many streams, laid one after another with equally many
            documents each; only the first document of a stream may have begun earlier, only the last may go on.
        exchange: how states travel: 'gather' (one collective, every state to every rank), 'scan' (log2(ranks) rounds), or
            None to choose by the number of ranks. For softmax layers 'gather' brings keys and values to the queries, and
            None prefers to deal heads instead of tokens.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    before: Tensor
    bounds: Tensor | None = None
    streams: int = 1
    exchange: str | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SequenceShard:
        """The same shard with its tensors on `device`."""
        bounds = None if self.bounds is None else self.bounds.to(device, non_blocking=non_blocking)
        return replace(self, before=self.before.to(device, non_blocking=non_blocking), bounds=bounds)

    @property
    def continues(self) -> Tensor:
        """[] bool: whether this rank's first document began on an earlier rank."""
        return self.before > 0

    def holders(self, length: int) -> Tensor:
        """[ranks] bool: which earlier ranks, of `length` tokens each, hold tokens of this rank's first document."""
        distance = self.rank - 1 - torch.arange(self.size, device=self.before.device)
        return (distance >= 0) & (self.before > distance * length)

    def gather(self, x: Tensor) -> Tensor:
        """[ranks, ...]: x of every rank. The gradient is the sum over ranks of those of this rank's slot."""
        return gather_rows(x.contiguous()[None], self.group)

    def keys(self, x: Tensor, window: int | None = None) -> Tensor:
        """Own tokens [B, T, ...] -> [B, S + T, ...]: before them those that own queries may see.

        They are the tokens of all earlier ranks or, where a window fits into one rank, that rank's last window - 1.
        """
        if window is None or window - 1 > x.shape[1]:
            return self.gather(x)[: self.rank + 1].transpose(0, 1).flatten(1, 2)
        before = self.shift(x[:, x.shape[1] - window + 1 :])
        return torch.cat([before if self.rank else before[:, :0], x], 1)

    def key_bounds(self, cu_seqlens: Tensor | None, earlier: int) -> Tensor | None:
        """[n + 2] int32 bounds of this rank's documents among the tokens of `keys`, of which S = `earlier` are not own.

        The first are those of tokens that lie before this rank's first document. None stays None.
        """
        if cu_seqlens is None:
            return None
        first = (earlier - self.before).clamp(min=0)
        bounds = torch.cat([torch.zeros_like(first)[None], first[None], cu_seqlens[1:] + earlier])
        return bounds.to(torch.int32)

    def deal(self, x: Tensor) -> Tensor:
        """[ranks, ...]: slot r goes to rank r; in its place stands what that rank had for this one."""
        return _Deal.apply(x.contiguous(), self.group)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over ranks, on all of them."""
        return sum_ranks(x, self.group) / self.size

    def shift(self, x: Tensor, distance: int = 1) -> Tensor:
        """x of the rank `distance` places earlier, zeros where there is none."""
        return _Shift.apply(x, distance, self)

    def carry(self, update: Tensor, factor: Tensor, matrix: bool = False) -> Tensor:
        """The state before this rank's first token, from every rank's ``S_out = factor S_in + update``.

        Args:
            update: [G, ...] state of the last document at the end of this rank, computed from zero at its start.
            factor: what this rank does to a state that it starts with, factors of the entries, of a shape that broadcasts
                to update's; or with `matrix` [G, H, K, K], to be multiplied from the left. Zero if a document begins here.

        Returns:
            [G, ...] fp32, zero where this rank's first document begins here.
        """
        update, factor = wide(update), wide(factor) * self.continues
        chosen = self.exchange or ("gather" if self.size <= GATHER_LIMIT else "scan")
        incoming = (self._carry_by_gather if chosen == "gather" else self._carry_by_scan)(update, factor, matrix)
        return incoming * self.continues

    def carry_back(self, change: Tensor, factor: Tensor, matrix: bool = False) -> Tensor:
        """The gradient of the state after this rank's last token, from every rank's ``dS_in = factor dS_out + change``.

        Args:
            change: [G, ...] gradient of the state that the rank's first document starts with, were nothing to come later.
            factor: as in `carry`, transposed if a matrix.

        Returns:
            [G, ...] fp32, zero where the next rank begins a document. Not differentiable.
        """
        change, factor = wide(change) * self.continues, wide(factor) * self.continues
        chosen = self.exchange or ("gather" if self.size <= GATHER_LIMIT else "scan")
        carry = self._carry_by_gather if chosen == "gather" else self._carry_by_scan
        return carry(change, factor, matrix, back=True)

    def _carry_by_gather(self, update: Tensor, factor: Tensor, matrix: bool, back: bool = False) -> Tensor:
        everything = self.gather(torch.cat([update.flatten(), factor.flatten()]))
        updates, factors = everything.split([update.numel(), factor.numel()], 1)
        # Zero, as a function of what was gathered: the first rank, too, takes part in the backward of the exchange.
        state = updates[:0].sum(0).view_as(update)
        for rank in reversed(range(self.rank + 1, self.size)) if back else range(self.rank):
            state = apply_factor(factors[rank].view_as(factor), state, matrix) + updates[rank].view_as(update)
        return state

    def _carry_by_scan(self, update: Tensor, factor: Tensor, matrix: bool, back: bool = False) -> Tensor:
        """Hillis and Steele: after round j a rank knows the map over the 2^j ranks that end (back: begin) with it."""
        distance, sign = 1, -1 if back else 1
        while distance < self.size:
            other = self.shift(torch.cat([update.flatten(), factor.flatten()]), sign * distance)
            first, then = (
                part.view_as(x) for part, x in zip(other.split([update.numel(), factor.numel()]), (update, factor))
            )
            update = apply_factor(factor, first, matrix) + update
            if 2 * distance < self.size:
                factor = apply_factor(factor, then, matrix)
            distance *= 2
        return self.shift(update, sign)

    def tail(self, x: Tensor, width: int) -> Tensor:
        """The `width` tokens [B, width, C] before this rank's first one, zeros where they belong to other documents.

        Raises:
            FlameError: a rank has fewer tokens than that.
        """
        if x.shape[1] < width:
            raise FlameError(
                f"context parallel: {width} earlier tokens are needed and a rank holds only {x.shape[1]}; use longer "
                f"sequences or fewer ranks."
            )
        received = self.shift(x[:, x.shape[1] - width :])
        distance = torch.arange(width, 0, -1, device=x.device)
        return torch.where((distance <= self.before)[:, None], received, 0.0)


def group_of(name: str) -> dist.ProcessGroup:
    """The group of that `group_name`: an op's schema knows words, not groups."""
    return dist.distributed_c10d._resolve_process_group(name)


def apply_factor(factor: Tensor, state: Tensor, matrix: bool) -> Tensor:
    return factor @ state if matrix else factor * state


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def running_sum(x: Tensor, block: int = 256) -> Tensor:
    """x.cumsum(1) of [B, T, ...]. torch scans a column in one thread, which takes long where rows are long and few; blocks
    of tokens run side by side."""
    length, others = x.shape[1], [0, 0] * (x.dim() - 2)
    if length <= block:
        return x.cumsum(1)
    within = F.pad(x, [*others, 0, -length % block]).unflatten(1, (-1, block)).cumsum(2)
    before = F.pad(within[:, :-1, -1].cumsum(1), [*others, 1, 0])
    return (within + before.unsqueeze(2)).flatten(1, 2)[:, :length]


def opening_states(incoming: Tensor, sequences: int) -> Tensor:
    """[G, ...] -> [N, ...]: the state that each stream starts with for its first document, zero for the others."""
    documents = sequences // incoming.shape[0]
    if documents == 1:
        return incoming
    others = incoming.new_zeros(incoming.shape[0], documents - 1, *incoming.shape[1:])
    return torch.cat([incoming[:, None], others], 1).flatten(0, 1)


def closing_states(final: Tensor, streams: int) -> Tensor:
    """[N, ...] -> [G, ...]: the state of every stream's last document."""
    return final.unflatten(0, (streams, -1))[:, -1]


def first_document(tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor | None:
    """[T] bool: the tokens of a row's first document; None when rows are documents."""
    if cu_seqlens is None:
        return None
    return torch.arange(tokens, device=device) < cu_seqlens[1]


def cut_sequence(
    group: dist.ProcessGroup,
    length: int,
    cu_seqlens: Tensor | None = None,
    device: torch.device | str = "cpu",
    exchange: str | None = None,
) -> tuple[SequenceShard, Tensor | None]:
    """This rank's shard of rows of `length` tokens, and the bounds of the documents in its part.

    Args:
        cu_seqlens: [N + 1] bounds in the whole row. Read on the host, so keep them there until here.
        device: of the tensors that are returned.
        exchange: see `SequenceShard`.

    Returns:
        the shard, and [n + 1] int32 bounds of the documents that have tokens here, or None without cu_seqlens.

    Raises:
        FlameError: the ranks do not divide the length.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if length % size:
        raise FlameError(
            f"context parallel: {size} ranks cannot share {length} tokens equally; choose a length that they divide."
        )
    start, end = rank * (length // size), (rank + 1) * (length // size)
    if cu_seqlens is None:
        return SequenceShard(group, rank, size, torch.tensor(start, device=device), exchange=exchange), None
    bounds = cu_seqlens.tolist()
    if bounds[-1] != length:
        raise FlameError(f"context parallel: cu_seqlens end at {bounds[-1]}, the row has {length} tokens.")
    before = start - max(bound for bound in bounds if bound <= start)
    inner = sorted({bound - start for bound in bounds if start < bound < end})
    local = torch.tensor([0, *inner, end - start], dtype=torch.int32)
    whole = cu_seqlens.to(device, torch.int32)
    return SequenceShard(group, rank, size, torch.tensor(before, device=device), whole, exchange=exchange), local.to(
        device
    )


def refuse_states(op: str, *states: Any) -> None:
    """A shard brings the state; raise FlameError if the caller gives or wants one too."""
    if any(state is not None and state is not False for state in states):
        raise FlameError(
            f"{op}: with a sequence shard, states come from and go to the other ranks; give and ask for none."
        )


class _Deal(torch.autograd.Function):
    """An all-to-all of equal slots, which is its own inverse and transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_to_all(x, [1] * group.size(), [1] * group.size(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ones = [1] * ctx.group.size()
        return all_to_all(grads[0], ones, ones, ctx.group), None


class _Shift(torch.autograd.Function):
    """One message to the rank `distance` later; backwards, one to the rank as much earlier."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, distance: int, shard: SequenceShard) -> Tensor:
        ctx.distance, ctx.shard = distance, shard
        return _send(x, distance, shard)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _send(grads[0], -ctx.distance, ctx.shard), None, None


def _send(x: Tensor, distance: int, shard: SequenceShard) -> Tensor:
    """x of the rank `distance` places earlier, zeros where there is none.

    An all-to-all in which every rank has one message, a form that compilers understand. What goes around the end of the
    row is dropped; no message at all, which only some ranks would have, is what not every backend can do.
    """
    sends, receives = [0] * shard.size, [0] * shard.size
    source, flat = shard.rank - distance, x.contiguous().flatten()
    sends[(shard.rank + distance) % shard.size] = receives[source % shard.size] = flat.numel()
    received = all_to_all(flat, receives, sends, shard.group)
    return received.view_as(x) if 0 <= source < shard.size else torch.zeros_like(x)
