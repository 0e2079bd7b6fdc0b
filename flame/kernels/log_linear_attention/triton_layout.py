"""How a call is cut into chunks. Tables of packed documents are built on the device, without a host sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flame.kernels.linear_attention.triton_layout import ceil_div, power_of_2

CHUNK = 64  # tokens
RUN = 16  # chunks whose states one program makes


@dataclass(frozen=True)
class Layout:
    """Everything about a call but its tensors' contents. `chunks` bounds the number of chunks of all rows together."""

    batch: int
    tokens: int
    heads: int
    K: int
    V: int
    levels: int
    scale: float
    chunks: int
    per_row: int  # chunks of a row, dense
    table: Tensor | None = None  # packed: [chunks, 4] int32 first row, rows left, position, the document's chunks
    documents: Tensor | None = None  # packed: [N, 2] int32 first chunk, number of chunks
    order: Tensor | None = None  # packed: [chunks] int32, chunks by falling size of the node they end

    @property
    def inside(self) -> int:
        """Levels that lie inside a chunk."""
        return CHUNK.bit_length()

    @property
    def depth(self) -> int:
        """Levels of the largest tree."""
        return max(0, ceil_div(self.tokens, CHUNK) - 1).bit_length()

    @property
    def trees(self) -> int:
        return self.batch if self.documents is None else self.documents.shape[0]


def make_layout(q: Tensor, v: Tensor, weights: Tensor, cu_seqlens: Tensor | None, scale: float) -> Layout:
    # Plain numbers: under torch.compile a length is part of the plan, so another length compiles anew.
    batch, tokens, heads, V = (int(size) for size in v.shape)
    K, levels = int(q.shape[3]), int(weights.shape[3])
    per_row = ceil_div(tokens, CHUNK)
    if cu_seqlens is None:
        return Layout(batch, tokens, heads, K, V, levels, scale, batch * per_row, per_row)
    chunks = tokens // CHUNK + cu_seqlens.numel() - 1
    tables = chunk_tables(cu_seqlens, chunks)
    return Layout(batch, tokens, heads, K, V, levels, scale, chunks, per_row, *tables)


def chunk_tables(cu_seqlens: Tensor, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Table, documents and order of a `Layout`; surplus chunks have no rows."""
    bounds = cu_seqlens.long()
    lengths = bounds[1:] - bounds[:-1]
    counts = (lengths + CHUNK - 1) // CHUNK
    ends = counts.cumsum(0)
    index = torch.arange(chunks, device=bounds.device)
    # right=True skips documents without chunks; the clamp keeps surplus chunks inside the table.
    document = torch.searchsorted(ends, index, right=True).clamp(max=lengths.numel() - 1)
    position = index - (ends - counts)[document]
    real = index < ends[-1]
    position = torch.where(real, position, 0)
    left = torch.where(real, lengths[document] - position * CHUNK, 0)
    start = torch.where(real, bounds[document] + position * CHUNK, 0)
    table = torch.stack([start, left, position, torch.where(real, counts[document], 1)], 1)
    documents = torch.stack([ends - counts, counts], 1)
    size = (position + 1) & -(position + 1)
    order = torch.where(real, size, 0).argsort(descending=True, stable=True)
    return table.to(torch.int32), documents.to(torch.int32), order.to(torch.int32)


def settings(layout: Layout, nothing: Tensor) -> dict[str, object]:
    """The arguments by which a kernel finds its rows; `nothing` stands for a table that a dense batch has not."""
    return {
        "table_ptr": nothing if layout.table is None else layout.table,
        "tokens": layout.tokens,
        "per_row": layout.per_row,
        "H": layout.heads,
        "BT": CHUNK,
        "VARLEN": layout.table is not None,
    }


def blocks(layout: Layout) -> dict[str, int]:
    """Sizes of whole tiles of keys and values."""
    return {"K": layout.K, "V": layout.V, "BK": power_of_2(layout.K), "BV": power_of_2(layout.V)}
