"""Cutting a batch, or documents packed into one row, into chunks. Tables are built on the device: nothing syncs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ChunkTable:
    """Where each chunk of a packed row lies. A row of T tokens and N documents has at most T // size + N chunks, and
    that bound is the table's length M; chunks beyond the real ones hold no token.

    token [M, size]: source row of each slot, T where the slot is empty. first [M]: the chunk opens its document.
    document [M]. last [N]: index of each document's last chunk, -1 before any. empty [N]: the document has no token.
    """

    token: Tensor
    first: Tensor
    document: Tensor
    last: Tensor
    empty: Tensor


def chunk_table(cu_seqlens: Tensor, tokens: int, size: int) -> ChunkTable:
    """Chunks of `size` tokens that restart at every document of `cu_seqlens` [N + 1]."""
    bounds = cu_seqlens.long()
    lengths = bounds[1:] - bounds[:-1]
    counts = (lengths + size - 1) // size
    ends = counts.cumsum(0)
    index = torch.arange(tokens // size + lengths.numel(), device=bounds.device)
    # right=True skips documents without chunks; the clamp keeps surplus chunks inside the table.
    document = torch.searchsorted(ends, index, right=True).clamp(max=lengths.numel() - 1)
    position = index - (ends - counts)[document]
    offset = position[:, None] * size + torch.arange(size, device=bounds.device)
    inside = (offset < lengths[document, None]) & (index < ends[-1])[:, None]
    token = torch.where(inside, bounds[document, None] + offset, tokens)
    return ChunkTable(token, position == 0, document, ends - 1, lengths == 0)


def split(x: Tensor, size: int, table: ChunkTable | None) -> Tensor:
    """[B, T, H, ...] to [B, M, H, size, ...]; empty slots are zero."""
    if table is None:
        padding = -x.shape[1] % size
        if padding:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
        x = x.unflatten(1, (-1, size))
    else:
        x = torch.cat([x, x.new_zeros(1, 1, *x.shape[2:])], 1)[:, table.token]
    return x.transpose(2, 3)


def join(x: Tensor, tokens: int, table: ChunkTable | None) -> Tensor:
    """[B, M, H, size, D] back to [B, T, H, D]; tokens outside every document are zero."""
    x = x.transpose(2, 3)
    if table is None:
        return x.flatten(1, 2)[:, :tokens]
    # Empty slots all land on the extra row T, which is dropped.
    out = x.new_zeros(1, tokens + 1, *x.shape[3:])
    return out.index_copy(1, table.token.flatten(), x.flatten(1, 2))[:, :tokens]
