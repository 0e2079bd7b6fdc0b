"""Linear + cross-entropy over a vocabulary that is split across the ranks of a group (tensor parallelism of the head).

Each rank makes the logits of its own rows of the weight. Ranks exchange five numbers a token (logsumexp, label's logit, sum,
max and its column) and never logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flame.kernels.cross_entropy.linear import Chunking, default_chunking, through_logits
from flame.kernels.cross_entropy.ops import row_functions, scaled
from flame.kernels.cross_entropy.options import Statistics, Terms


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of the output embedding.

    `reduce_hidden`: sum the gradient of hidden over the group, as hidden that is the same on all ranks needs. Turn it off
    where the caller's own backward reduces it (an all-gather of sequence-parallel activations does).
    """

    group: dist.ProcessGroup
    first_column: int
    vocabulary: int
    reduce_hidden: bool = True


def merged(mine: Statistics, group: dist.ProcessGroup) -> Statistics:
    """Statistics of whole rows from every rank's shard; largest_at stays only on the first rank that has the max."""
    packed = torch.stack([mine.lse, mine.target, mine.summed, mine.largest])  # [4, n]
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed, group=group)
    lse, target, summed, largest = torch.stack(gathered, dim=1)  # [ranks, n] each
    top, owner = largest.max(dim=0)
    at = torch.where(owner == dist.get_rank(group), mine.largest_at, -1)
    return Statistics(torch.logsumexp(lse, dim=0), target.sum(0), summed.sum(0), top, at)


class _VocabularyParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard, terms: Terms, backend: str
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        form, losses = row_functions(backend), []

        def make_gradient(logits: Tensor, rows: slice) -> None:
            loss = _rows(form, logits, labels[rows], shard, terms, need_hidden or need_weight)
            losses.append(loss.sum())

        chunking = _same_on_all_ranks(hidden, shard)
        hidden_grad, weight_grad = through_logits(hidden, weight, make_gradient, need_hidden, need_weight, chunking)
        if need_hidden and shard.reduce_hidden:
            dist.all_reduce(hidden_grad, group=shard.group)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype, ctx.backend = weight.dtype, backend
        return torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dh = scaled(hidden_grad, grads[0], hidden_grad.dtype, ctx.backend) if need_hidden else None
        dw = scaled(weight_grad, grads[0], ctx.weight_dtype, ctx.backend) if need_weight else None
        return dh, dw, None, None, None, None


def _same_on_all_ranks(hidden: Tensor, shard: VocabularyShard) -> Chunking:
    """Chunks by the mean shard, since every chunk is a meeting and shards may be uneven."""
    columns = -(-shard.vocabulary // dist.get_world_size(shard.group))
    rows = default_chunking(hidden).size(len(hidden), columns * hidden.element_size())
    return Chunking(bytes=0, multiple=rows)


def _rows(
    form: ModuleType, logits: Tensor, labels: Tensor, shard: VocabularyShard, terms: Terms, write: bool
) -> Tensor:
    """Loss of each row, the same on every rank, and with `write` the gradients of this shard in place of its logits."""
    whole = merged(form.statistics(logits, labels, terms, shard.first_column), shard.group)
    if write:
        grad = form.gradient(logits, labels, whole, terms, shard.vocabulary, shard.first_column)
        if grad is not logits:
            logits.copy_(grad)
    return whole.loss(labels, terms, shard.vocabulary)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard, terms: Terms, backend: str
) -> Tensor:
    """Loss sum over valid tokens, the same on every rank of the group."""
    return _VocabularyParallel.apply(hidden, weight, labels.contiguous(), shard, terms, backend)
