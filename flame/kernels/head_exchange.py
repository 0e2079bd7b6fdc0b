"""Attention over a sequence that is cut into ranks, by whole rows: ranks trade tokens for heads, or gather tokens.

An attention whose heads do not depend on one another can run on whole rows if every rank takes some of the heads (Jacobs et
al., DeepSpeed-Ulysses, 2309.14509): one exchange of the inputs, one of the output, the same work for every rank, and the op
itself needs to know nothing. Where the ranks do not divide the heads, each gathers the tokens up to its own and computes
the heads for queries that it does not own, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from flame.kernels.sequence import SequenceShard

Attention = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None], Tensor]


def whole_rows(
    attend: Attention,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    shard: SequenceShard,
    sharing: bool = True,
) -> Tensor:
    """`attend` on whole rows, of which this rank holds and gets its own tokens.

    Args:
        attend: takes queries, keys, and the bounds of packed documents; gives [B, T, H, V].
        queries: own tokens [B, T, H, ...] of whatever goes with a query and its head.
        keys: own tokens [B, T, Hx, ...] of whatever goes with a key; Hx divides H.
        sharing: the query heads of one key head may be computed on different ranks.
    """
    if can_deal_heads([x.shape[2] for x in queries], [x.shape[2] for x in keys], shard, sharing):
        o = attend([take_heads(x, shard) for x in queries], [take_heads(x, shard) for x in keys], shard.bounds)
        return return_heads(o, shard)
    earlier = shard.rank * queries[0].shape[1]
    padded = [F.pad(x, [0, 0] * (x.dim() - 2) + [earlier, 0]) for x in queries]
    o = attend(padded, [shard.keys(x) for x in keys], shard.key_bounds(cu_seqlens, earlier))
    return o[:, earlier:]


def can_deal_heads(queries: Sequence[int], keys: Sequence[int], shard: SequenceShard, sharing: bool = True) -> bool:
    """Whether every rank can have equally many of those head counts, key heads being copied where `sharing`."""
    if shard.exchange == "gather" or any(heads % shard.size for heads in queries):
        return False
    return all(heads % shard.size == 0 or (sharing and shard.size % heads == 0) for heads in keys)


def take_heads(x: Tensor, shard: SequenceShard) -> Tensor:
    """Own tokens of all heads [B, T, H, ...] -> all tokens of own heads [B, ranks * T, max(1, H / ranks), ...]."""
    if x.shape[2] < shard.size:
        x = x.repeat_interleave(shard.size // x.shape[2], 2)
    slots = x.unflatten(2, (shard.size, -1)).movedim(2, 0)  # [ranks, B, T, H / ranks, ...]
    return shard.deal(slots).transpose(0, 1).flatten(1, 2)


def return_heads(x: Tensor, shard: SequenceShard) -> Tensor:
    """The inverse of `take_heads`, on the output [B, ranks * T, H / ranks, V]."""
    slots = x.unflatten(1, (shard.size, -1)).transpose(0, 1)
    return shard.deal(slots).movedim(0, 2).flatten(2, 3)
