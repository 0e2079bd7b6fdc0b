"""Softmax attention with a forget gate: FoX (Lin et al., arXiv 2503.02130)."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.backend import select_backend
from flame.kernels.forgetting_attention import chunked, reference
from flame.kernels.head_exchange import can_deal_heads, whole_rows
from flame.kernels.sequence import SequenceShard

__all__ = ["forgetting_attention"]

PRUNE = 2.0**-20


def forgetting_attention(  # noqa: PLR0913 (one op)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    prune: float = PRUNE,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> Tensor:
    """Causal attention whose score of (i, j) is ``scale * q_i . k_j + sum of log_forget over j + 1 .. i``.

    Args:
        q: `[B, Tq, H, K]`.
        k: `[B, Tk, Hk, K]`, Tk >= Tq, the last query aligned with the last key; Hk divides H.
        v: `[B, Tk, Hk, V]`.
        log_forget: `[B, Tk, H]` fp32, <= 0, one gate a query head; of all keys, cached ones included.
        scale: of the products; K^-0.5 by default. It does not scale the gates.
        cu_seqlens: `[N + 1]` boundaries, among the keys, of packed documents (B = 1).
        prune: keys so far back that their weights together are below this share of a query's are left out, tile by tile;
            0 for none. The bound is proved from the gates and the largest norms of q and k. Only 'triton' prunes.
        backend: 'triton' (heads up to 256), 'chunked' or 'reference'; default by device.
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part.

    Returns:
        `[B, Tq, H, V]` in q.dtype. Gradients flow to q, k, v and log_forget.

    Raises:
        FlameError: shapes that do not fit together, or an unknown backend.
    """
    if shard is not None and can_deal_heads([q.shape[2]] * 2, [k.shape[2], v.shape[2]], shard):
        return whole_rows(
            lambda own, others, bounds: forgetting_attention(
                own[0], others[0], others[1], own[1], scale=scale, cu_seqlens=bounds, prune=prune, backend=backend
            ),
            [q, log_forget],
            [k, v],
            cu_seqlens,
            shard,
        )
    if shard is not None:
        k, v, log_forget = shard.keys(k), shard.keys(v), shard.keys(log_forget)
        cu_seqlens = shard.key_bounds(cu_seqlens, k.shape[1] - q.shape[1])
    if q.shape[1] > k.shape[1] or k.shape[:3] != v.shape[:3] or q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3]:
        raise FlameError(
            "forgetting_attention: needs q [B, Tq, H, K], k [B, Tk, Hk, K], v [B, Tk, Hk, V] with Tk >= Tq and Hk "
            f"dividing H; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if log_forget.shape != (k.shape[0], k.shape[1], q.shape[2]):
        expected = (k.shape[0], k.shape[1], q.shape[2])
        raise FlameError(
            f"forgetting_attention: log_forget must be [B, Tk, H] = {expected}; got {tuple(log_forget.shape)}."
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = select_backend(q, backend)
    if chosen == "triton" and (backend is not None or _tiled(q, v)):
        from flame.kernels.softmax_attention import triton_flash  # imports triton, which a CPU does not need

        return triton_flash.tiled_attention(
            q, k, v, log_forget=log_forget, scale=scale, cu_seqlens=cu_seqlens, prune=prune
        )
    form = reference if chosen == "reference" else chunked
    return form.forgetting_attention(q, k, v, log_forget, scale, cu_seqlens)


def _tiled(q: Tensor, v: Tensor) -> bool:
    return q.dtype != torch.float64 and max(q.shape[-1], v.shape[-1]) <= 256
