"""How a call is cut: chunks for what is parallel over time, items for what sweeps along it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flame.kernels import tiles

CHUNK = 64
SHORTEST_SEGMENT = 8  # chunks
# The gradients that each launch makes where the transition is diagonal plus low rank (see triton_dplr_gradients).
LAUNCHES = (("READS",), ("WRITES", "VALUES"))


@dataclass(frozen=True)
class Cut:
    """Sizes of a plan, known without looking at the device: bounds where documents are packed."""

    num_chunks: int
    num_items: int
    segment: int  # tokens of an item at most, a multiple of CHUNK where anything is cut
    cut: bool  # some sequence may have several items


@dataclass(frozen=True)
class Plan:
    """Tables on the device, int32.

    chunks [M, 2]: first token and tokens of each chunk (0 where the row has fewer chunks than the bound M).
    items [I, 5]: first token, end, first chunk, sequence, and 1 if it opens the sequence + 2 if it ends it.
    first_item [N + 1]: items of every sequence.
    """

    chunks: Tensor
    items: Tensor
    first_item: Tensor


def make_cut(batch: int, tokens: int, documents: int | None, columns: int, processors: int) -> Cut:
    """Cut [batch, tokens] so that items * columns programs fill the GPU, two to a processor, if that leaves long segments.

    documents: how many are packed into the row; None for plain rows. columns: independent programs an item has (heads
    times value tiles). A packed row is judged by its worst case, one long document.
    """
    rows = batch if documents is None else 1
    wanted = max(1, 2 * processors // max(1, rows * columns))
    length = max(SHORTEST_SEGMENT * CHUNK, -(-tokens // (wanted * CHUNK)) * CHUNK)
    whole = rows * columns >= processors or length * 2 > tokens
    if documents is None:
        per_row = 1 if whole else -(-tokens // length)
        return Cut(batch * -(-tokens // CHUNK), batch * per_row, tokens if whole else length, not whole)
    # A sequence of t tokens has at most t // size + 1 pieces.
    items = documents if whole else tokens // length + documents
    return Cut(tokens // CHUNK + documents, items, tokens if whole else length, not whole)


def backward_parts(cut: Cut, batch: int, columns: int, packed: bool, device: torch.device) -> int:
    """How many parts of the batch the backward takes, one after the other.

    What it holds between its kernels goes down with their number. Parts are no more than may be had without running the
    sweeps' programs, one to a processor, in more waves than those of the whole batch.
    """
    programs, processors = cut.num_items * columns, tiles.multiprocessors(device)
    waves = -(-programs // processors)
    parts = [n for n in range(1, batch + 1) if batch % n == 0 and n * -(-programs // (n * processors)) <= waves]
    return 1 if packed else max(parts, default=1)


def part_of(tensors: Sequence[Tensor | None], part: int, parts: int) -> list[Tensor | None]:
    """Of tensors whose first axis is the batch, or its chunks or items, the rows of one part of the batch."""
    return [None if x is None else x[len(x) * part // parts : len(x) * (part + 1) // parts] for x in tensors]


def make_plan(cut: Cut, batch: int, tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Plan:
    """The tables of a cut. Those of plain rows are kept from call to call."""
    return _dense_plan(cut, batch, tokens, device) if cu_seqlens is None else _plan(cut, cu_seqlens.long())


@lru_cache(maxsize=64)
def _dense_plan(cut: Cut, batch: int, tokens: int, device: torch.device) -> Plan:
    return _plan(cut, torch.arange(batch + 1, device=device) * tokens)


def _plan(cut: Cut, bounds: Tensor) -> Plan:
    segment = max(1, cut.segment)
    lengths = bounds[1:] - bounds[:-1]
    chunks = (lengths + CHUNK - 1) // CHUNK
    sequence, index, real = _pieces(chunks, cut.num_chunks)
    offset = index * CHUNK
    length = torch.where(real, (lengths[sequence] - offset).clamp(max=CHUNK), 0)
    chunk_table = torch.stack([torch.where(real, bounds[sequence] + offset, 0), length], 1)
    pieces = ((lengths + segment - 1) // segment).clamp(min=1)
    sequence, index, real = _pieces(pieces, cut.num_items)
    start = bounds[sequence] + index * segment
    end = torch.minimum(start + segment, bounds[sequence + 1])
    first_chunk = (chunks.cumsum(0) - chunks)[sequence] + index * (segment // CHUNK)
    ends = (index == 0).long() + 2 * (index == pieces[sequence] - 1).long()
    columns = (start, end, first_chunk, sequence, ends)
    item_table = torch.stack([torch.where(real, x, 0) for x in columns], 1)
    first_item = torch.cat([bounds.new_zeros(1), pieces.cumsum(0)])
    return Plan(chunk_table.int(), item_table.int(), first_item.int())


def _pieces(counts: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """For `total` slots: the sequence each belongs to, its index there, and whether it is one of the sum(counts) real ones."""
    ends = counts.cumsum(0)
    slot = torch.arange(total, device=counts.device)
    sequence = torch.searchsorted(ends, slot, right=True).clamp(max=counts.numel() - 1)
    return sequence, slot - (ends - counts)[sequence], slot < ends[-1]


def tile_key(name: str, decay: str, K: int, V: int, dtype: torch.dtype, erase: bool) -> str:
    """A sweep that reads an erase direction beside the key holds more in shared memory: it has tiles of its own."""
    own = {"erase": "own"} if erase and name in ("forward", "reverse") else {}
    return tiles.key(name, decay=decay, K=K, V=V, dtype=dtype, **own)
