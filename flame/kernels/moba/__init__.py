"""MoBA, mixture of block attention (Lu et al., arXiv 2502.13189): a query sees its own chunk and the best earlier ones."""

from __future__ import annotations

from torch import Tensor

from flame.errors import FlameError
from flame.kernels.block_attention import check_shapes, fast_or_plain, plain_backend
from flame.kernels.head_exchange import whole_rows
from flame.kernels.moba import chunked, reference
from flame.kernels.sequence import SequenceShard
from flame.kernels.softmax_attention import softmax_attention

__all__ = ["moba"]


def moba(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    topk: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    means: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> Tensor:
    """One softmax over the query's own chunk, causally, and the topk - 1 earlier chunks whose mean key it likes best.

    A chunk's score for a query head is the product of the query with the mean of the chunk's keys (rounded to their
    dtype, product in fp32). Equal scores go to the earlier chunk. The choice has no gradient.

    Args:
        q: `[B, Tq, H, K]`.
        k: `[B, Tk, Hk, K]`, Tk >= Tq, the last query aligned with the last key; Hk divides H. Each query head chooses
            for itself.
        v: `[B, Tk, Hk, V]`.
        chunk_size: keys in a chunk, counted from the document's start.
        topk: chunks a query sees, its own included. 1 or less means all: full causal attention.
        scale: of the scores; K^-0.5 by default.
        cu_seqlens: `[N + 1]` boundaries of packed documents (B = 1, Tq = Tk).
        max_seqlen: no document is longer; saves memory and programs.
        means: mean keys of the complete chunks `[B, Tk // chunk_size, Hk, K]`, where a decoder has kept them; not with
            cu_seqlens.
        backend: 'triton' (needs Tq = Tk), 'chunked' or 'reference'; default by device.
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part.

    Returns:
        `[B, Tq, H, V]` in q.dtype. Gradients flow to q, k and v.

    Raises:
        FlameError: shapes that do not fit together, chunk_size < 1, an unknown backend.
    """
    if shard is not None:
        return whole_rows(
            lambda own, others, bounds: moba(
                own[0],
                others[0],
                others[1],
                chunk_size=chunk_size,
                topk=topk,
                scale=scale,
                cu_seqlens=bounds,
                max_seqlen=max_seqlen,
                backend=backend,
            ),
            [q],
            [k, v],
            cu_seqlens,
            shard,
        )
    check_shapes("moba", q, k, v, cu_seqlens)
    if chunk_size < 1:
        raise FlameError(f"moba: chunk_size must be at least 1; got {chunk_size}.")
    if means is not None and cu_seqlens is not None:
        raise FlameError("moba: means are for decoding plain rows; leave them out with cu_seqlens.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if topk <= 1 or k.shape[1] <= chunk_size:
        return softmax_attention(
            q, k, v, scale=scale, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, backend=plain_backend(backend)
        )
    chosen = fast_or_plain(q, k, v, backend)
    if chosen == "triton":
        from flame.kernels.moba import triton_op  # a CPU needs no triton

        return triton_op.moba(q, k, v, chunk_size, topk, scale, cu_seqlens, max_seqlen)
    if chosen == "reference":
        return reference.moba(q, k, v, chunk_size, topk, scale, cu_seqlens)
    return chunked.moba(q, k, v, chunk_size, topk, scale, cu_seqlens, means)
