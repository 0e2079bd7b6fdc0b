"""NSA, native sparse attention (Yuan et al., arXiv 2502.11089): compressed, selected and window branches under gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.block_attention import check_shapes, fast_or_plain, plain_backend
from flame.kernels.head_exchange import whole_rows
from flame.kernels.native_sparse_attention import chunked, reference
from flame.kernels.sequence import SequenceShard
from flame.kernels.softmax_attention import softmax_attention

__all__ = ["SparsePattern", "native_sparse_attention"]


@dataclass(frozen=True)
class SparsePattern:
    """What a query sees.

    block_size: keys in a block. block_count: blocks that the selected branch attends to. window: newest keys that the
    window branch attends to; 0 leaves the branch out.
    """

    block_size: int = 64
    block_count: int = 16
    window: int = 512


def native_sparse_attention(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    pattern: SparsePattern,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    means: tuple[Tensor, Tensor] | None = None,
    block_indices: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> Tensor:
    """``g_0 compressed + g_1 selected + g_2 window``, each a softmax attention of its own.

    - compressed: over the means of keys and values of the blocks that end at or before the query; zero without any.
    - selected: over the keys, up to the query, of `block_count` blocks. The query's own block, the one before it and the
      document's first are always among them, in this order of preference; the others are those with the largest
      compressed attention weight, summed over the query heads of a key head. Equal weights go to the earlier block. The
      choice has no gradient.
    - window: over the newest `window` keys.

    Args:
        q: `[B, Tq, H, K]`.
        k: `[B, Tk, Hk, K]`, Tk >= Tq, the last query aligned with the last key; Hk divides H.
        v: `[B, Tk, Hk, V]`.
        gates: `[B, Tq, H, 3]`, factors of the three branches, not negative.
        scale: of the scores; K^-0.5 by default.
        cu_seqlens: `[N + 1]` boundaries of packed documents (B = 1, Tq = Tk); blocks are counted from their starts.
        max_seqlen: no document is longer; saves memory and programs.
        means: means of k and v over their complete blocks, `[B, Tk // block_size, Hk, .]`, where a decoder has kept
            them; not with cu_seqlens.
        block_indices: `[B, Tq, Hk, S]` blocks to use instead of choosing any, as in `block_attention`.
        backend: 'triton' (needs Tq = Tk), 'chunked' or 'reference'; default by device.
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part.

    Returns:
        `[B, Tq, H, V]` in q.dtype. Gradients flow to q, k, v and gates.

    Raises:
        FlameError: shapes that do not fit together, a pattern with nothing in it, an unknown backend.
    """
    if shard is not None:  # the query heads of a key head choose blocks together
        return whole_rows(
            lambda own, others, bounds: native_sparse_attention(
                own[0],
                others[0],
                others[1],
                own[1],
                pattern,
                scale=scale,
                cu_seqlens=bounds,
                max_seqlen=max_seqlen,
                backend=backend,
            ),
            [q, gates],
            [k, v],
            cu_seqlens,
            shard,
            sharing=False,
        )
    _check(q, k, v, gates, pattern, cu_seqlens)
    if means is not None and cu_seqlens is not None:
        raise FlameError("native_sparse_attention: means are for decoding plain rows; leave them out with cu_seqlens.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = fast_or_plain(q, k, v, backend)
    window = None
    if pattern.window:
        window = softmax_attention(
            q, k, v, scale=scale, window=pattern.window, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
            backend=plain_backend(backend),
        )  # fmt: skip
    if chosen == "triton":
        from flame.kernels.native_sparse_attention import triton_op  # a CPU needs no triton

        call = triton_op.Call(pattern.block_size, pattern.block_count, scale, max_seqlen)
        return triton_op.attend(q, k, v, window, gates, call, cu_seqlens, block_indices)
    form = reference if chosen == "reference" else chunked
    parts = form.branches(q, k, v, pattern, scale, cu_seqlens, means, block_indices)
    return _gated_sum((*parts, window), gates).to(q.dtype)


def _gated_sum(branches: tuple[Tensor | None, ...], gates: Tensor) -> Tensor:
    wide = torch.promote_types(gates.dtype, torch.float32)
    factors = gates.to(wide).unsqueeze(-1).unbind(3)  # each [B, T, H, 1]
    terms = [g * x for g, x in zip(factors, branches) if x is not None]
    return sum(terms[1:], terms[0])


def _check(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, pattern: SparsePattern, cu_seqlens: Tensor | None) -> None:
    check_shapes("native_sparse_attention", q, k, v, cu_seqlens)
    if gates.shape != (*q.shape[:3], 3):
        raise FlameError(
            f"native_sparse_attention: gates must be [B, Tq, H, 3] = {(*q.shape[:3], 3)}; got {tuple(gates.shape)}."
        )
    if pattern.block_size < 1 or pattern.block_count < 1 or pattern.window < 0:
        raise FlameError(
            f"native_sparse_attention: block_size and block_count must be at least 1, window at least 0; got {pattern}."
        )
