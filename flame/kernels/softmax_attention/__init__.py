"""Causal softmax attention (Vaswani et al., arXiv 1706.03762) with grouped heads, windows and packed documents."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.backend import select_backend
from flame.kernels.head_exchange import can_deal_heads, whole_rows
from flame.kernels.sequence import SequenceShard
from flame.kernels.softmax_attention import chunked, library, reference

__all__ = ["softmax_attention"]


def softmax_attention(  # noqa: PLR0913 (the options of one op)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    sink: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> Tensor:
    """Every query sees the keys up to its own position, or the last `window` of them.

    Args:
        q: `[B, Tq, H, Dqk]`.
        k: `[B, Tk, Hk, Dqk]`, Tk >= Tq: the last query is aligned with the last key, so a decode step passes one query
            and the whole cache. Hk divides H; head h reads key head `h // (H / Hk)`.
        v: `[B, Tk, Hv, Dv]`, Hv divides H; Dv may differ from Dqk.
        scale: of the scores; Dqk^-0.5 by default.
        window: query i sees keys i - window + 1 .. i; None for all.
        cu_seqlens: `[N + 1]` boundaries, among the keys, of packed documents (B = 1); none sees another.
        max_seqlen: no document is longer; saves launching programs for documents as long as the row.
        sink: `[H]` logits, one a query head, that take part in every softmax of the head and carry no value.
        backend: 'library' (torch's fast kernels, the default on a GPU where they can), 'triton' (ours, what a GPU uses
            with a sink), 'chunked' (any device; with cu_seqlens it waits for the device) or 'reference'.
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part.

    Returns:
        `[B, Tq, H, Dv]` in q.dtype, softmax in fp32. Gradients flow to q, k, v and sink.

    Raises:
        FlameError: shapes that do not fit together, a window under 1, an unknown backend.
    """
    _check(q, k, v, window, cu_seqlens, sink)
    if shard is not None:
        near = window is not None and window <= q.shape[1] // 2  # then few keys travel, and all ranks work alike
        if sink is None and not near and can_deal_heads([q.shape[2]], [k.shape[2], v.shape[2]], shard):
            options = {"scale": scale, "window": window, "max_seqlen": max_seqlen, "backend": backend}
            return whole_rows(
                lambda own, others, bounds: softmax_attention(*own, *others, cu_seqlens=bounds, **options),  # type: ignore[arg-type]
                [q],
                [k, v],
                cu_seqlens,
                shard,
            )
        k, v = shard.keys(k, window), shard.keys(v, window)
        cu_seqlens = shard.key_bounds(cu_seqlens, k.shape[1] - q.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend is None and q.is_cuda and "FLAME_BACKEND" not in os.environ:
        chosen = _fastest(q, k, v, window, cu_seqlens, sink)
    else:
        chosen = select_backend(q, backend, ("chunked", "reference", "library", "triton"))
    if chosen == "triton":
        from flame.kernels.softmax_attention import triton_flash  # imports triton, which a CPU does not need

        k, v = library.same_heads(q, k, v)
        return triton_flash.tiled_attention(q, k, v, sink=sink, cu_seqlens=cu_seqlens, scale=scale, window=window)
    if chosen == "library":
        if sink is not None:
            raise FlameError("softmax_attention: torch's kernels have no sinks; take backend 'triton' or 'chunked'.")
        return library.softmax_attention(q, k, v, scale, window, cu_seqlens, max_seqlen)
    return (chunked if chosen == "chunked" else reference).softmax_attention(q, k, v, scale, window, cu_seqlens, sink)


def _fastest(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None, sink: Tensor | None
) -> str:
    """The backend of a GPU, by what can take the inputs."""
    if sink is not None:
        return "triton" if q.dtype != torch.float64 and max(q.shape[3], v.shape[3]) <= 256 else "chunked"
    return "library" if library.supports(q, k, v, window, cu_seqlens) else "chunked"


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None, sink: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4) or q.shape[3] != k.shape[3] or k.shape[:2] != v.shape[:2]:
        raise FlameError(
            f"softmax_attention: q [B, Tq, H, Dqk], k [B, Tk, Hk, Dqk], v [B, Tk, Hv, Dv] needed; got {shapes}."
        )
    if q.shape[0] != k.shape[0] or q.shape[1] > k.shape[1]:
        raise FlameError(f"softmax_attention: k needs the batch of q and at least as many tokens; got {shapes}.")
    if q.shape[2] % k.shape[2] or q.shape[2] % v.shape[2]:
        raise FlameError(f"softmax_attention: the heads of k and v must divide those of q; got {shapes}.")
    if window is not None and window < 1:
        raise FlameError(f"softmax_attention: window must be at least 1, or None for no window; got {window}.")
    if cu_seqlens is not None and q.shape[0] != 1:
        raise FlameError(f"softmax_attention: cu_seqlens needs B = 1; got {shapes}.")
    if sink is not None and sink.shape != (q.shape[2],):
        raise FlameError(f"softmax_attention: sink needs one logit a head, [{q.shape[2]}]; got {tuple(sink.shape)}.")
