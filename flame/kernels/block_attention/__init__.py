"""Causal attention of every query over key blocks chosen for it: the sparse part of NSA and of MoBA.

Native sparse attention: Yuan et al., arXiv 2502.11089. MoBA: Lu et al., arXiv 2502.13189.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.backend import select_backend
from flame.kernels.block_attention import chunked, reference

__all__ = ["block_attention"]


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One softmax over the keys of the chosen blocks, up to the query's own position.

    Args:
        q: `[B, Tq, H, K]`.
        k: `[B, Tk, Hk, K]`, Tk >= Tq, the last query aligned with the last key; Hk divides H.
        v: `[B, Tk, Hk, V]`.
        indices: `[B, Tq, Hs, S]` integers, the blocks that each query may see, without repetition; -1 for none. Block n
            of a document holds its keys n * block_size up to (n + 1) * block_size. Hs is a multiple of Hk and divides H:
            the heads h with the same `h // (H / Hs)` share a choice.
        block_size: keys in a block; the last of a document may be shorter.
        scale: of the scores; K^-0.5 by default.
        cu_seqlens: `[N + 1]` boundaries of packed documents (B = 1, Tq = Tk). Blocks are counted from the document's
            start.
        backend: 'triton' (needs Tq = Tk), 'chunked' or 'reference'; default by device.

    Returns:
        `[B, Tq, H, V]` in q.dtype, zero where a query has no key. Gradients flow to q, k and v.

    Raises:
        FlameError: shapes that do not fit together, or an unknown backend.
    """
    check_shapes("block_attention", q, k, v, cu_seqlens)
    heads, expected = indices.shape[2], (*q.shape[:2], indices.shape[2], indices.shape[3])
    if tuple(indices.shape) != expected or heads % k.shape[2] or q.shape[2] % heads:
        raise FlameError(
            f"block_attention: indices must be [B, Tq, Hs, S] with Hs a multiple of {k.shape[2]} and a divisor of "
            f"{q.shape[2]}; got {tuple(indices.shape)} for q {tuple(q.shape)}."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = fast_or_plain(q, k, v, backend)
    if chosen == "triton":
        from flame.kernels.block_attention.triton_op import block_attention_triton  # a CPU needs no triton

        return block_attention_triton(q, k, v, indices, cu_seqlens, block_size, scale)[0]
    form = reference if chosen == "reference" else chunked
    return form.block_attention(q, k, v, indices, block_size, scale, cu_seqlens)


PROVEN_WIDTH = 128  # channels of a head up to which the kernels' gradients have been checked on a GPU


def fast_or_plain(q: Tensor, k: Tensor, v: Tensor, backend: str | None) -> str:
    """The backend to run. The kernels are for whole rows in at most fp32; a decoder's few queries take the torch form, and
    so do wide heads unless the kernels are asked for."""
    whole = q.shape[1] == k.shape[1] and q.dtype != torch.float64
    proven = max(k.shape[3], v.shape[3]) <= PROVEN_WIDTH
    if backend is None and not (whole and proven):
        return "chunked"
    chosen = select_backend(q, backend)
    if chosen == "triton" and not whole:
        raise FlameError(
            f"The triton backend needs Tq = Tk in at most fp32; got {tuple(q.shape)}, {tuple(k.shape)}, {q.dtype}."
        )
    return chosen


def plain_backend(backend: str | None) -> str | None:
    """The same choice for softmax_attention, whose fast form is torch's own."""
    return None if backend == "triton" else backend


def check_shapes(op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    """Refuse q, k, v that do not fit together, naming the op."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
    if not fits or q.shape[0] != k.shape[0] or q.shape[1] > k.shape[1] or q.shape[2] % k.shape[2]:
        raise FlameError(
            f"{op}: needs q [B, Tq, H, K], k [B, Tk, Hk, K], v [B, Tk, Hk, V] with Tk >= Tq and Hk dividing H; "
            f"got {shapes}."
        )
    if cu_seqlens is not None and (q.shape[0] != 1 or q.shape[1] != k.shape[1]):
        raise FlameError(f"{op}: cu_seqlens needs B = 1 and Tq = Tk; got {shapes}.")
