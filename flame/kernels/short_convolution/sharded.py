"""What a rank's convolutions need of the ranks before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.kernels.sequence import SequenceShard, opening_states


def state_before(x: Tensor, width: int, cu_seqlens: Tensor | None, shard: SequenceShard) -> Tensor:
    """[N, C, W]: for the document that began earlier the inputs before x [B, T, C], for the others zeros.

    Only W - 1 inputs are ever read, so only they travel; the oldest column is left zero.
    """
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if cu_seqlens is None or shard.streams == 1:
        before = shard.tail(x, width - 1)
    else:
        before = tails_of_streams(x, width - 1, cu_seqlens, shard)
    return opening_states(F.pad(before.mT, (1, 0)), sequences)


def tails_of_streams(x: Tensor, width: int, cu_seqlens: Tensor, shard: SequenceShard) -> Tensor:
    """[G, width, C]: the rows before the first document of every stream in x [1, R, C].

    Ranks share tokens, not rows: a stream may have few rows on a rank, or none, and look back over several ranks.
    """
    bounds = cu_seqlens.long().unfold(0, 2, 1).unflatten(0, (shard.streams, -1))
    starts, ends = bounds[:, -1].unbind(-1)
    place = torch.arange(width, device=x.device)  # oldest first
    rows = ends[:, None] - width + place
    own = torch.where((rows >= starts[:, None])[..., None], x[0, rows.clamp(min=0)], 0.0)
    count = (ends - starts).clamp(max=width)
    goes_through = shard.continues & (bounds.shape[1] == 1)
    notes = torch.cat([count, goes_through[None]]).to(x.dtype)  # small whole numbers, exact in any dtype
    everything = shard.gather(torch.cat([own.flatten(), notes]))
    before = everything[:0, : own.numel()].sum(0).view_as(own)
    for rank in range(shard.rank):
        tail, count, through = everything[rank].split([own.numel(), shard.streams, 1])
        both = torch.cat([before * through, tail.view_as(own)], 1)
        count = count.detach().long()[:, None]
        index = torch.where(width - 1 - place < count, width + place, place + count)
        before = both.gather(1, index[..., None].expand_as(own))
    return before * shard.continues
