"""How a call is cut into items for the GPU, and small helpers the passes share. All plans are made without a host sync."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flame.kernels import tiles

ANCHOR = 512  # rows between the states kept for the gradient of a decay per channel


@dataclass(frozen=True)
class Items:
    """How time is cut. An item is what one program walks: a sequence, or a segment of one."""

    count: int
    segment: int  # longest item
    per_row: int  # items a batch row has, dense
    starts: Tensor | None = None  # packed: bounds of every item, first item of every document [N + 1]
    ends: Tensor | None = None
    first: Tensor | None = None

    @property
    def cut(self) -> bool:
        """Whether a sequence may have several items, so that opening states are needed."""
        return self.first is not None or (self.starts is None and self.per_row > 1)


@dataclass(frozen=True)
class Layout:
    """Everything about a call but its tensors' contents."""

    kind: str
    batch: int
    tokens: int
    heads: int
    K: int
    V: int
    decay_heads: int
    scale: float
    items: Items

    def slots(self, rows: int) -> int:
        """Bound on blocks of `rows` over all items: block b of the item from row s has slot s // rows + b + item."""
        return self.batch * self.tokens // rows + self.items.count

    @property
    def sequences(self) -> int:
        if self.items.first is not None:
            return self.items.first.numel() - 1
        return self.batch if self.items.starts is None else self.items.count


def power_of_2(x: int) -> int:
    """The smallest power of two that holds x, at least the 16 that a dot needs."""
    return max(16, 1 << (x - 1).bit_length())


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


@lru_cache(maxsize=1024)
def dense_items(batch: int, tokens: int, programs: int, multiprocessors: int) -> Items:
    """Cut time so that at most two programs fall on each multiprocessor; `programs` is how many one item has.

    Two is what fits at once: one program more would make a second wave, as long as the first.
    """
    if batch * programs >= 0.75 * multiprocessors or tokens <= 2 * ANCHOR:
        per_row = 1
    else:
        per_row = min(2 * multiprocessors // (batch * programs), tokens // ANCHOR)
    segment = tokens if per_row == 1 else ceil_div(ceil_div(tokens, per_row), ANCHOR) * ANCHOR
    per_row = max(1, ceil_div(tokens, segment))
    return Items(batch * per_row, segment, per_row)


def packed_items(tokens: int, programs: int, bounds: Tensor, multiprocessors: int) -> Items:
    """The same for documents with bounds [N + 1] int32, whose lengths are known on the device only."""
    wanted = 2 * multiprocessors
    documents = bounds.numel() - 1
    starts, ends, first = bounds[:-1], bounds[1:], None
    # A document's length is not known here, so the cut depends on what is: rows and documents on average.
    segment = max(2 * ANCHOR, power_of_2(max(1, tokens * programs // wanted)))
    if documents * programs < 0.75 * wanted or tokens > 16 * segment:
        if segment < tokens:
            starts, ends, first = segment_bounds(bounds, segment, tokens // segment + documents)
    else:
        segment = tokens
    segment = min(segment, tokens)
    return Items(starts.numel(), segment, 1, starts, ends, first)


def segment_bounds(bounds: Tensor, segment: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of `count` items (surplus ones empty) and the first item of each document, on the device."""
    lengths = bounds[1:] - bounds[:-1]
    per_document = (lengths + segment - 1) // segment
    last = per_document.cumsum(0)
    index = torch.arange(count, device=bounds.device)
    document = torch.searchsorted(last, index, right=True).clamp(max=lengths.numel() - 1)
    start = bounds[document] + (index - (last - per_document)[document]) * segment
    end = torch.minimum(start + segment, bounds[document + 1])
    real = index < last[-1]
    zero = torch.zeros_like(last[:1])
    starts, ends = (torch.where(real, x, 0).to(torch.int32) for x in (start, end))
    return starts, ends, torch.cat([zero, last]).to(torch.int32)


def precision(x: Tensor) -> str:
    """fp32 operands keep fp32 accuracy (three tf32 products); the setting is without effect on 16-bit ones."""
    return "tf32x3" if x.dtype == torch.float32 else "ieee"


def strides(**tensors: Tensor) -> dict[str, int]:
    """Row and head strides as kernel arguments, e.g. stride_at and stride_ah."""
    return {f"stride_{name}{axis}": x.stride(1 if axis == "t" else 2) for name, x in tensors.items() for axis in "th"}


def item_settings(layout: Layout, nothing: Tensor) -> dict[str, object]:
    """The arguments by which a kernel finds its rows; `nothing` stands for tables that a dense batch has not."""
    items = layout.items
    return {
        "starts_ptr": nothing if items.starts is None else items.starts,
        "ends_ptr": nothing if items.ends is None else items.ends,
        "tokens": layout.tokens,
        "segment": items.segment,
        "segments": items.per_row,
        "VARLEN": items.starts is not None,
        "H": layout.heads,
    }


def sum_groups(gradient: Tensor, heads: int) -> Tensor:
    """[B, T, H, D] to [B, T, heads, D]: gradients of heads that share a tensor's head add up."""
    if gradient.shape[2] == heads:
        return gradient
    return gradient.unflatten(2, (heads, -1)).sum(3)


@lru_cache(maxsize=1024)
def backward_key(kind: str, K: int, V: int, shared: bool, dtype: torch.dtype) -> str:
    """The key of a backward pass's tile; `shared` if queries and keys have the same heads, fewer than values have."""
    return tiles.key("backward", kind=kind, K=K, V=V, shared=shared, dtype=dtype)


@lru_cache(maxsize=1024)
def states_key(kind: str, K: int, V: int, dtype: torch.dtype) -> str:
    """The key of the tile of states around every chunk."""
    return tiles.key("states", kind=kind, K=K, V=V, dtype=dtype)
