"""What a block needs to know besides its input, in one object, so that signatures stay short."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.sequence import SequenceShard, first_document

LayerCache = dict[str, Tensor]


@dataclass
class Cache:
    """Decode state of a model: per layer a dict of tensors that the mixer names, and the number of tokens seen."""

    layers: list[LayerCache]
    seen: int = 0

    @classmethod
    def empty(cls, num_layers: int) -> Cache:
        return cls([{} for _ in range(num_layers)])


@dataclass(frozen=True)
class Context:
    """Shared by the layers of one forward.

    Attributes:
        cu_seqlens: [N + 1] int32 starts of the packed documents and the total length, or None when rows are documents.
        max_seqlen: no packed document is longer than this; None where it is not known.
        positions: [T] int64 index of each token in its document, counting cached tokens.
        cache: this layer's decode state, read and written by its mixer; None when training.
        shard: this rank's part of rows that are cut over context-parallel ranks; the other fields are those of the part.
        carried: tensors that pass from block to block beside the hidden state (RWKV7's first values, router losses).
            Every block gets its own copy of the dict and returns it, so recomputation sees what the forward saw.
    """

    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    positions: Tensor | None = None
    cache: LayerCache | None = None
    shard: SequenceShard | None = None
    carried: dict[str, Tensor] = field(default_factory=dict)

    def at_layer(self, cache: LayerCache | None, carried: dict[str, Tensor]) -> Context:
        return replace(self, cache=cache, carried=dict(carried))


def make_context(
    length: int,
    device: torch.device,
    cu_seqlens: Tensor | None = None,
    cache: Cache | None = None,
    max_seqlen: int | None = None,
    shard: SequenceShard | None = None,
) -> Context:
    """The context of a forward over `length` tokens a row.

    Raises:
        FlameError: packed documents together with a cache that already holds tokens; a cache together with a shard.
    """
    if shard is not None and cache is not None:
        raise FlameError("context parallel is for training; decode whole rows instead.")
    if cu_seqlens is not None and cache is not None and cache.seen:
        raise FlameError(
            "cu_seqlens cannot be combined with a cache that already holds tokens; decode plain rows instead."
        )
    if cu_seqlens is not None and "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        # Else compiled blocks are compiled again for the second number of documents that they meet.
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
    positions = token_positions(length, device, cu_seqlens, cache.seen if cache else 0)
    if shard is not None:  # the first document began earlier
        first = first_document(length, cu_seqlens, device)
        positions = positions + (shard.before if first is None else shard.before * first)
    return Context(cu_seqlens, max_seqlen, positions, shard=shard)


def token_positions(length: int, device: torch.device, cu_seqlens: Tensor | None = None, offset: int = 0) -> Tensor:
    """[T] int64 index of every token in its document."""
    index = torch.arange(length, device=device)
    if cu_seqlens is None:
        return index + offset
    starts = cu_seqlens.to(torch.int64)
    document = torch.searchsorted(starts, index, right=True) - 1
    return index - starts[document]
