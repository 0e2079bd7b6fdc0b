"""Where the key blocks of a call lie, and which queries chose which block, as tables built on the device.

Rows of a batch and packed documents are the same thing here: documents in one row of `tokens` tokens. Blocks of all of
them are numbered through. An *entry* is one choice, (query, choosing head, slot); a *bucket* holds the entries of one key
head and block. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flame.kernels.layout import cdiv


@dataclass(frozen=True)
class Blocks:
    """Key blocks of all documents.

    tokens: of all rows. size: keys in a block. count: bound on the number of blocks. columns: most that a document has.
    starts, ends, finish: `[count]` int32, bounds of a block and the end of its document; surplus blocks lie at `tokens`.
    origin, base: `[tokens]` int32, start of a token's document and number of that document's first block.
    """

    tokens: int
    size: int
    count: int
    columns: int
    starts: Tensor
    ends: Tensor
    finish: Tensor
    origin: Tensor
    base: Tensor


def make_blocks(x: Tensor, size: int, cu_seqlens: Tensor | None, longest: int | None = None) -> Blocks:
    """Blocks of the rows of x `[B, T, ...]`, or of the documents packed in its one row, none longer than `longest`."""
    batch, length, device = int(x.shape[0]), int(x.shape[1]), x.device
    tokens, columns = batch * length, cdiv(length, size)
    if cu_seqlens is None:
        bounds, documents = torch.arange(batch + 1, device=device) * length, batch
        count = batch * columns
    else:
        columns = columns if longest is None else min(columns, cdiv(longest, size))
        bounds, documents = cu_seqlens.long(), cu_seqlens.numel() - 1
        count = length // size + documents
    each = (bounds.diff() + size - 1) // size
    last = each.cumsum(0)
    index = torch.arange(count, device=device)
    document = torch.searchsorted(last, index, right=True)
    real = document < documents
    document = document.clamp(max=documents - 1)
    starts = bounds[document] + (index - (last - each)[document]) * size
    finish = bounds[document + 1]
    starts, ends, finish = (
        torch.where(real, x, tokens).int() for x in (starts, torch.minimum(starts + size, finish), finish)
    )
    mine = torch.searchsorted(bounds, torch.arange(tokens, device=device), right=True) - 1
    mine = mine.clamp(max=documents - 1)
    origin, base = bounds[mine].int(), (last - each)[mine].int()
    return Blocks(tokens, size, count, columns, starts, ends, finish, origin, base)


@dataclass(frozen=True)
class Entries:
    """The choices of the queries first .. first + n, sorted by bucket.

    order: `[n * Hs * S]` int32, numbers of the entries, ((query - first) * Hs + head) * S + slot, bucket after bucket,
    by query within one; those that chose nothing come last. offsets: `[buckets + 1]` int32 into it.
    """

    order: Tensor
    offsets: Tensor
    first: int
    buckets: int


def valid_choices(indices: Tensor, blocks: Blocks, first: int) -> Tensor:
    """Numbers through all documents of the blocks in indices `[n, Hs, S]`; -1 for none and for blocks of the future."""
    mine = slice(first, first + indices.shape[0])
    token = torch.arange(first, first + indices.shape[0], device=indices.device, dtype=torch.int32)
    own = (token - blocks.origin[mine]) // blocks.size
    seen = (indices >= 0) & (indices <= own[:, None, None])
    return torch.where(seen, indices + blocks.base[mine, None, None], -1).int()


def sort_entries(choices: Tensor, blocks: Blocks, kv_heads: int, first: int) -> Entries:
    """Entries of `valid_choices`, `[n, Hs, S]`."""
    heads, buckets = choices.shape[1], kv_heads * blocks.count
    head = torch.arange(heads, device=choices.device, dtype=torch.int32) // (heads // kv_heads)
    bucket = torch.where(choices >= 0, choices + head[:, None] * blocks.count, buckets)
    bucket, order = bucket.flatten().sort(stable=True)
    numbers = torch.arange(buckets + 1, device=choices.device, dtype=torch.int32)
    return Entries(order.int(), torch.searchsorted(bucket, numbers, out_int32=True), first, buckets)


@dataclass(frozen=True)
class Pieces:
    """Buckets cut into pieces of at most `length` entries.

    count: bound on their number. bucket, begin: `[count]` int32; a surplus piece begins at the end of all entries.
    slot: `[count]` int32, place of a piece among those of buckets with several, -1 for the only piece of a bucket.
    slots: `[buckets + 1]` int32, where the places of a bucket begin.
    """

    count: int
    length: int
    bucket: Tensor
    begin: Tensor
    slot: Tensor
    slots: Tensor

    @property
    def most_slots(self) -> int:
        """Bound on the places: a bucket with several pieces has at most twice as many as it fills."""
        return max(1, 2 * self.count)


def cut(entries: Entries, length: int) -> Pieces:
    total = entries.order.numel()
    bound = total // length + min(entries.buckets, total)
    each = (entries.offsets.diff() + length - 1) // length
    last = each.cumsum(0)
    index = torch.arange(bound, device=each.device)
    bucket = torch.searchsorted(last, index, right=True)
    real = bucket < entries.buckets
    bucket = bucket.clamp(max=entries.buckets - 1)
    rank = index - (last - each)[bucket]
    begin = torch.where(real, entries.offsets[bucket] + rank * length, total)
    several = torch.where(each > 1, each, 0)
    slots = torch.nn.functional.pad(several.cumsum(0), (1, 0))
    slot = torch.where(each[bucket] > 1, slots[bucket] + rank, -1)
    return Pieces(bound, length, bucket.int(), begin.int(), slot.int(), slots.int())
