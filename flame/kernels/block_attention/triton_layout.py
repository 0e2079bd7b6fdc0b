"""Where the key blocks of a call lie, and which queries chose which block, as tables built on the device.

Rows of a batch and packed documents are the same thing here: documents in one row of `tokens` tokens. Blocks of all of
them are numbered through. An *entry* is one choice, (query, choosing head, slot); a *bucket* holds the entries of one key
head and block. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flame.kernels.direct import unobserved
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
    batch, length = int(x.shape[0]), int(x.shape[1])
    if cu_seqlens is None and unobserved(x) and not torch.is_inference_mode_enabled():
        return _cached_blocks(batch, length, size, x.device)
    return _make_blocks(batch, length, size, x.device, cu_seqlens, longest)


@lru_cache(maxsize=8)
def _cached_blocks(batch: int, length: int, size: int, device: torch.device) -> Blocks:
    """Rows without documents: every layer asks for the same tables."""
    return _make_blocks(batch, length, size, device, None, None)


def _make_blocks(
    batch: int, length: int, size: int, device: torch.device, cu_seqlens: Tensor | None, longest: int | None
) -> Blocks:
    tokens, columns = batch * length, cdiv(length, size)
    if cu_seqlens is None:
        bounds, documents = torch.arange(batch + 1, device=device) * length, batch
        count = batch * columns
    else:
        columns = columns if longest is None else min(columns, cdiv(longest, size))
        bounds, documents = cu_seqlens.long(), cu_seqlens.numel() - 1
        count = length // size + (documents if size > 1 else 0)
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


def _aligned(columns: int) -> int:
    return cdiv(columns, 4) * 4


@dataclass(frozen=True)
class Entries:
    """The choices of all queries, sorted by band of queries, then by bucket, then by query.

    choices: `[tokens, Hs, S]` int32, blocks numbered through all documents, -1 for none. order: `[tokens * Hs * S]` int32,
    places in the choices of the entry's band; those that chose nothing come last. offsets: int32
    into it, a row of buckets + 1 for each band and a few more, so that every row is aligned as kernels like it.
    """

    choices: Tensor
    order: Tensor
    offsets: Tensor
    band: int
    bands: int
    buckets: int

    def queries(self) -> list[tuple[int, int]]:
        """First query of each band, and its end."""
        tokens = self.choices.shape[0]
        return [(first, min(first + self.band, tokens)) for first in range(0, tokens, self.band)]


def sort_entries(indices: Tensor, blocks: Blocks, kv_heads: int, band: int) -> Entries:
    """Entries of indices `[tokens, Hs, S]`, numbered in each document; blocks of the future are no choices."""
    tokens, heads, _ = indices.shape
    bands, buckets = cdiv(tokens, band), kv_heads * blocks.count
    token = torch.arange(tokens, device=indices.device, dtype=torch.int32)
    own = (token - blocks.origin) // blocks.size
    seen = (indices >= 0) & (indices <= own[:, None, None])
    choices = torch.where(seen, indices + blocks.base[:, None, None], -1).int()
    head = torch.arange(heads, device=indices.device, dtype=torch.int32) // (heads // kv_heads)
    place = (token // band * buckets)[:, None] + (head * blocks.count)[None, :]
    bucket, order = torch.where(seen, choices + place[:, :, None], bands * buckets).int().flatten().sort(stable=True)
    band_starts = torch.arange(bands, device=indices.device, dtype=torch.int32)[:, None] * buckets
    numbers = band_starts + torch.arange(_aligned(buckets + 1), device=indices.device, dtype=torch.int32)
    offsets = torch.searchsorted(bucket, numbers, out_int32=True)
    order = order % (band * choices[0].numel())
    return Entries(choices, order.int(), offsets, band, bands, buckets)


@dataclass(frozen=True)
class Pieces:
    """Buckets cut into pieces of at most `length` entries.

    count, most_slots: bounds on the pieces and the slots of a band. bucket, begin: `[bands, count]` int32, a piece's bucket
    and first entry in `order`; a surplus piece begins after all entries. slot: `[bands, count]` int32, a place among the
    pieces of a band's buckets with several, -1 for the only piece of a bucket. slots: int32, rows of buckets + 1 and
    a few more, where a bucket's places begin.
    """

    count: int
    length: int
    most_slots: int
    bucket: Tensor
    begin: Tensor
    slot: Tensor
    slots: Tensor


def cut(entries: Entries, length: int) -> Pieces:
    total = entries.band * entries.choices[0].numel()
    bound = _aligned(total // length + min(entries.buckets, total))
    sizes = entries.offsets[:, : entries.buckets + 1].diff()
    each = (sizes + length - 1) // length
    last = each.cumsum(1)
    index = torch.arange(bound, device=each.device).repeat(entries.bands, 1)
    bucket = torch.searchsorted(last, index, right=True)
    real = bucket < entries.buckets
    bucket = bucket.clamp(max=entries.buckets - 1)
    pieces = each.gather(1, bucket)
    rank = index - last.gather(1, bucket) + pieces
    begin = torch.where(real, entries.offsets.gather(1, bucket) + rank * length, entries.order.numel())
    several = torch.where(each > 1, each, 0).cumsum(1)
    slots = torch.nn.functional.pad(several, (1, _aligned(entries.buckets + 1) - entries.buckets - 1))
    slot = torch.where(pieces > 1, slots.gather(1, bucket) + rank, -1)
    # A bucket with several pieces fills all but its last, so it has at most twice as many as it fills.
    most_slots = max(1, 2 * (total // length))
    return Pieces(bound, length, most_slots, *(x.int() for x in (bucket, begin, slot, slots)))
